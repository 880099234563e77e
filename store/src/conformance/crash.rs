//! Power cuts: what was acknowledged is there, whatever part of the unsynced rest survived.

use std::time::Duration;

use proptest::prelude::*;

use super::{Machine, Open, model::Model};
use crate::{StoreOptions, files::faulty::Chance};

/// Settles and merges all the time.
fn options(chance: &mut Chance) -> StoreOptions {
    StoreOptions {
        settle_bytes: 1 + chance.below(20_000) as usize,
        settle_commits: 1 + chance.below(20),
        settle_idle: Duration::from_millis(1 + chance.below(3)),
        commit_here_within: Duration::from_secs(3600 * chance.below(2)),
        log_ahead_bytes: chance.pick(&[0, 0, 1, 20_000, 200_000]),
        cache_bytes: if chance.percent(50) { 1 } else { 1 << 20 },
        background_bytes_per_second: u64::MAX,
        reserve_bytes: 0,
        ..StoreOptions::default()
    }
}

/// A machine, and what is known of its shard.
struct Known {
    machine: Machine,
    /// What the shard may hold: what was acknowledged, or that and the last batch.
    may_be: Vec<Model>,
}

impl Known {
    /// Cuts the power; the machine comes back with power for so many operations.
    fn power_cut(&mut self, operations: i64, chance: &mut Chance) {
        self.machine = self.machine.after_power_cut(operations, chance);
    }

    fn power_is_off(&self) -> bool {
        self.machine.files.power().is_off()
    }

    /// Reads everything, which must be one of the things it may be.
    fn check(&mut self, open: &Open, chance: &mut Chance) {
        let found = match Model::read_back(open, chance) {
            Ok(found) => found,
            Err(_) if self.power_is_off() => return,
            Err(error) => panic!("{error}"),
        };
        let differences = || self.may_be.iter().map(|model| model.difference(&found)).collect::<String>();
        assert!(self.may_be.contains(&found), "{}", differences());
        self.may_be = vec![found];
    }

    /// Opens, checks, and commits until the power goes.
    fn run(&mut self, options: &StoreOptions, chance: &mut Chance) {
        let mut open = match self.machine.open(options) {
            Ok(open) => open,
            Err(_) if self.power_is_off() => return,
            Err(error) => panic!("refused: {error}"),
        };
        self.check(&open, chance);
        if self.may_be.len() == 1 {
            let mut now = self.may_be[0].clone();
            loop {
                let mut next = now.clone();
                let batch = next.batch(chance);
                match open.commit(&batch) {
                    Ok(_) => now = next,
                    Err(_) if self.power_is_off() => {
                        self.may_be = vec![now, next];
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
                if chance.percent(3) {
                    // Let it settle and merge for a moment.
                    std::thread::park_timeout(Duration::from_millis(3));
                }
                if chance.percent(2) {
                    let found = Model::read_back(&open, chance);
                    assert!(self.power_is_off() || found.as_ref() == Ok(&now), "{found:?}");
                }
            }
        }
        open.abandon();
    }
}

fn power_cuts(seed: u64) {
    let mut chance = Chance::new(seed);
    let mut known = Known { machine: Machine::new(), may_be: vec![Model::default()] };
    for _ in 0..4 {
        let options = options(&mut chance);
        // Often during open, replay and rebuild; most often while it works.
        let most = if chance.percent(30) { 60 } else { 1_500 };
        known.power_cut(1 + chance.below(most) as i64, &mut chance);
        known.run(&options, &mut chance);
    }
    known.power_cut(i64::MAX, &mut chance);
    let open = known.machine.open(&options(&mut chance)).unwrap_or_else(|error| panic!("refused: {error}"));
    known.check(&open, &mut chance);
    open.abandon();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn acknowledged_commits_survive_power_cuts(seed in any::<u64>()) {
        power_cuts(seed);
    }
}

#[test]
#[ignore = "a campaign: many more seeds than a test run has time for"]
fn power_cut_campaign() {
    let began = std::time::Instant::now();
    let from = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let mut failed = Vec::new();
    let mut done = 0;
    for seed in from..from + 2_000 {
        if std::panic::catch_unwind(|| power_cuts(seed)).is_err() {
            failed.push(seed);
        }
        done += 1;
        if began.elapsed() > Duration::from_secs(110) {
            break;
        }
    }
    println!("{done} seeds from {from} on, {} failed: {failed:?}", failed.len());
    assert_eq!(failed, Vec::<u64>::new());
}

//! One seed: its world from the beginning to the verdict.
//!
//! Not here: many of them (`bin/sim`).

use std::time::Duration;

use fulmar_badnet::checker::Counters;

use crate::bite::Bites;
use crate::people;
use crate::plan::{Plan, calm_path};
use crate::world::World;

/// How long a seed's world may last in its own time.
const LIMIT: Duration = Duration::from_secs(900);

/// What came of a seed.
#[derive(Debug)]
pub struct SeedReport {
    /// Which.
    pub seed: u64,
    /// What went wrong, one line each; none: every promise was kept.
    pub failures: Vec<String>,
    /// Which faults bit.
    pub bites: Bites,
    /// What was counted.
    pub counters: Counters,
    /// Lines of the event log.
    pub log_count: u64,
    /// Their hash.
    pub log_hash: u64,
    /// The lines, if they were kept.
    pub log: Option<Vec<u8>>,
    /// Virtual time from beginning to end.
    pub lasted: Duration,
    /// Virtual time from the end of the faults until everything was where it belongs.
    pub converged_after: Duration,
}

impl SeedReport {
    /// Whether every promise was kept.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.failures.is_empty()
    }
}

/// Runs the world of a seed; see [`World::hash_keys`] for the last.
#[must_use]
pub fn run_seed(seed: u64, keep_log: bool, hash_keys: u32) -> SeedReport {
    let plan = Plan::of(seed);
    let mut world = World::new(seed)
        .path(calm_path())
        .keep_log(keep_log)
        .limit(LIMIT)
        .kept_for(plan.kept_for)
        .hash_keys(hash_keys);
    if plan.broadcast {
        world = world.broadcast(people::BROADCAST, people::names(&plan));
    }
    let ended = world.run(async move |sim| {
        let outcome = people::live(sim, seed, plan).await?;
        anyhow::ensure!(sim.gateway().failed().is_none(), "the gateway: {:?}", sim.gateway().failed());
        Ok(outcome)
    });
    let mut failures = Vec::new();
    let (mut counters, mut converged_after) = (Counters::default(), Duration::ZERO);
    match ended.value {
        Ok(outcome) => {
            converged_after = outcome.converged_after;
            failures.extend(outcome.report.violations.iter().map(ToString::to_string));
            if failures.is_empty() && !outcome.report.holds() {
                failures.push("the checker found breaches of which none was kept".to_owned());
            }
            failures.extend(outcome.troubles);
            counters = outcome.report.counters;
        }
        Err(error) => failures.push(format!("{error:#}")),
    }
    SeedReport {
        seed,
        failures,
        bites: ended.bites,
        counters,
        log_count: ended.log_count,
        log_hash: ended.log_hash,
        log: ended.log,
        lasted: ended.lasted,
        converged_after,
    }
}

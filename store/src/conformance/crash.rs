//! Power cuts at random writes: what was acknowledged is there, whatever part of the unsynced rest survived.

use std::{path::Path, sync::Arc, time::Duration};

use proptest::prelude::*;
use rand_free::Chance;

use super::{Open, append, conversation, message, seq, user};
use crate::{Limits, Member, Op, Role, StoreOptions, engine::faulty::Volatile, shard::tip::Tip};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

/// A small generator, so that a failing case is its seed.
mod rand_free {
    pub(super) struct Chance(pub(super) u64);

    impl Chance {
        pub(super) fn below(&mut self, n: u64) -> u64 {
            // xorshift64*
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Acked {
    seq: [u64; 3],
    read: u64,
}

fn options(chance: &mut Chance) -> StoreOptions {
    StoreOptions {
        settle_bytes: 1 + chance.below(20_000) as usize,
        settle_commits: 1 + chance.below(20),
        settle_idle: Duration::from_millis(1),
        ..StoreOptions::default()
    }
}

/// Commits until the power goes; returns what was acknowledged, and what was only tried.
fn run(engine: Arc<Volatile>, tip: &Path, chance: &mut Chance, start: Acked) -> (Acked, Acked) {
    let mut acked = start;
    let Ok(mut open) = Open::over(engine, Some(tip), &options(chance)) else { return (acked, acked) };
    let tried = loop {
        let mut next = acked;
        let mut batch = Vec::new();
        for _ in 0..=chance.below(12) {
            let c = chance.below(3) as usize;
            next.seq[c] += 1;
            let most = if chance.below(10) == 0 { 16_384 } else { 300 };
            let size = chance.below(most);
            batch.push(append(c as u64 + 1, next.seq[c], vec![next.seq[c] as u8; size as usize]));
        }
        next.read += 1;
        let row = Member { role: Role::Member, joined: seq(1), since: Default::default() };
        batch.push(Op::Member { conversation: conversation(1), user: user(next.read), row: Some(row) });
        batch.push(Op::Read { conversation: conversation(1), user: user(1), seq: seq(next.read) });
        if open.commit(&batch).is_err() {
            break next;
        }
        acked = next;
        if chance.below(40) == 0 {
            // Let it settle by itself for a moment.
            let (wait, _guard) = (std::sync::Condvar::new(), std::sync::Mutex::new(()));
            let held = _guard.lock().unwrap();
            drop(wait.wait_timeout(held, Duration::from_millis(8)).unwrap());
        }
    };
    open.abandon();
    (acked, tried)
}

fn check(engine: Arc<Volatile>, tip: &Path, acked: Acked, tried: Acked) -> Acked {
    let open = Open::over(engine, Some(tip), &StoreOptions::default()).unwrap();
    let mut found =
        Acked { read: open.reader.read_cursor(conversation(1), user(1)).unwrap().get(), ..Acked::default() };
    for c in 0..3 {
        let conversation = conversation(c as u64 + 1);
        let head = open.reader.head(conversation).unwrap().unwrap_or_default();
        found.seq[c] = head.seq.get();
        let records = open.reader.records(conversation, seq(1), seq(u64::from(u32::MAX)), ALL).unwrap();
        assert_eq!(records.len() as u64, head.seq.get());
        for (n, record) in (1..).zip(&records) {
            assert_eq!(*record, message(n, record.payload.clone()));
            assert!(record.payload.iter().all(|byte| *byte == n as u8));
        }
        if head.seq.get() > 0 {
            let lane = open.reader.lane(conversation, user(1), message(1, "").device).unwrap().unwrap();
            assert_eq!(lane.last.get(), head.seq.get());
        }
    }
    // All of the last batch, or nothing of it.
    assert!(found == acked || found == tried, "found {found:?}, acknowledged {acked:?}, tried {tried:?}");
    assert_eq!(open.reader.member_count(conversation(1)).unwrap(), found.read);
    let members = open.reader.members(conversation(1), None, usize::MAX).unwrap();
    assert_eq!(members.len() as u64, found.read);
    open.abandon();
    found
}

fn power_cuts(seed: u64) {
    let mut chance = Chance(seed | 1);
    let folder = tempfile::tempdir().unwrap();
    let tip = folder.path().join("tip");
    let mut engine = Arc::new(Volatile::new(40 + chance.below(600) as i64));
    let mut known = Acked::default();
    for _ in 0..4 {
        let (acked, tried) = run(Arc::clone(&engine), &tip, &mut chance, known);
        // After a power cut the tip may be older than it was.
        if chance.below(3) == 0 {
            std::fs::remove_file(&tip).unwrap();
        }
        let keep = chance.below(101);
        let cut = Arc::new(engine.after_power_cut(i64::MAX, || chance.below(100) < keep));
        known = check(Arc::clone(&cut), &tip, acked, tried);
        // Opening and checking wrote as well: cut again, with everything that was synced.
        engine = Arc::new(cut.after_power_cut(40 + chance.below(600) as i64, || chance.below(2) == 0));
    }
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
    for seed in 0..2_000 {
        power_cuts(seed * 0x9e37_79b9 + 1);
    }
}

#[test]
fn the_tip_alone_tells_a_torn_commit_from_a_lost_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tip");
    let engine = Arc::new(Volatile::new(i64::MAX));
    let options = StoreOptions { settle_idle: Duration::from_secs(3600), ..StoreOptions::default() };
    let mut open = Open::over(Arc::<Volatile>::clone(&engine), Some(&path), &options).unwrap();
    open.commit(&[append(1, 1, vec![1; 10_000])]).unwrap();
    let acked = open.writer.last();
    open.abandon();
    // The last chunk goes missing.
    let key = crate::key::Key::commit(acked.number, 2);
    crate::engine::Engine::remove(&*engine, crate::key::Table::Commit, key.as_ref()).unwrap();
    let refused = Open::over(Arc::<Volatile>::clone(&engine), Some(&path), &options).err().unwrap();
    assert!(
        matches!(refused, crate::OpenError::Damaged { commit, .. } if commit == acked.number),
        "{refused}"
    );
    // The same, when it was never acknowledged.
    let before = folder.path().join("before");
    let (tip, _) = Tip::open(&before).unwrap();
    tip.write(crate::CommitId { number: acked.number - 1, chain: previous_chain(&engine, acked.number) })
        .unwrap();
    let open = Open::over(engine, Some(&before), &options).unwrap();
    assert_eq!(open.reader.head(conversation(1)).unwrap(), None);
    open.abandon();
}

fn previous_chain(engine: &Volatile, number: u64) -> crate::ChainHash {
    let key = crate::key::Key::commit(number, 0);
    let chunk = crate::engine::Engine::get(engine, crate::key::Table::Commit, key.as_ref()).unwrap().unwrap();
    crate::commit::Header::decode(&chunk).unwrap().previous
}

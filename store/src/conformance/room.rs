//! Room ahead of the log's end: zeros behind the last commit are its clean end, zeros in the place of any other are damage, and room
//! that can't be made harms nobody.

use std::time::Duration;

use proptest::prelude::*;

use super::{
    Machine, Open, append,
    damage::{change, commit, logged, logged_in_parts, logs, never_settles, opened},
    faults::{commit_in_the_end, each_way, fault, found_later, lasting, payloads},
    shard_id, until,
};
use crate::{
    Durability, OpenError, StoreOptions,
    commit::{self, CommitId, Header},
    files::{
        Files,
        faulty::{Call, Chance, Failing},
    },
    shard::{
        committer::Request,
        journal::{self, HEADER_BYTES, Proven},
        tip::Tip,
    },
};

fn with_room() -> StoreOptions {
    StoreOptions { log_ahead_bytes: 40_000, ..never_settles() }
}

/// Where the commits of a log file begin, and where the last one ends.
fn places(bytes: &[u8]) -> Vec<usize> {
    let mut places = vec![HEADER_BYTES];
    while let Ok(header) = Header::decode(&bytes[places[places.len() - 1]..]) {
        places.push(places[places.len() - 1] + commit::HEADER_BYTES + header.body_bytes);
    }
    places
}

/// How the log ends: what it proves, and how many bytes are torn.
fn end(machine: &Machine) -> Result<(Proven, u64), OpenError> {
    let (tip, _) = Tip::read(&machine.files).unwrap();
    let proven = journal::Reader::new(&machine.files, shard_id(), tip).read(CommitId::ZERO, |_| Ok(()))?;
    let files = journal::list(&machine.files).unwrap();
    let bytes: u64 = files.iter().map(|(_, bytes)| bytes).sum();
    let headers = (files.len() * HEADER_BYTES) as u64;
    Ok((proven, bytes - headers - proven.bytes - proven.room))
}

/// Waits until the shard's thread has done what was asked of it before.
fn let_the_thread_look(open: &Open) {
    let (reply, answer) = tokio::sync::oneshot::channel();
    open.shard.requests.send(Request::Canary(reply)).unwrap();
    // Whether there is a log to write beside is no matter.
    let _ = answer.blocking_recv().unwrap();
}

#[test]
fn zeros_behind_the_last_commit_are_the_clean_end_of_the_log_however_many() {
    for zeros in [0, 1, 71, 72, 73, 511, 4_096, 65_535, 65_536, 65_537, 65_608, 300_000] {
        for tip in [true, false] {
            let machine = logged(5, "x", &never_settles());
            let log = logs(&machine).remove(0);
            change(&machine, &log, |bytes| bytes.resize(bytes.len() + zeros, 0));
            if !tip {
                machine.files.take("tip");
            }
            let (proven, torn) = end(&machine).unwrap();
            assert_eq!((proven.last.number, proven.room, torn), (6, zeros as u64, 0));
            assert_eq!(opened(&machine, &never_settles()).unwrap(), 5);
        }
    }
}

#[test]
fn zeros_are_the_end_or_torn_or_damage_by_where_they_lie() {
    type Change = fn(&mut Vec<u8>, &[usize]);
    /// The last commit, whether bytes are torn; or the commit that is damaged.
    type Want = Result<(u64, bool), u64>;
    // Commits 1 to 6; `places[n]` is where commit n + 1 begins, `places[6]` where room begins. With the tip at 6, at 5, and without.
    let table: [(&str, Change, [Want; 3]); 12] = [
        ("as it is", |_, _| {}, [Ok((6, false)); 3]),
        ("no room", |bytes, at| bytes.truncate(at[6]), [Ok((6, false)); 3]),
        ("room that is not whole", |bytes, at| bytes.truncate(at[6] + 17), [Ok((6, false)); 3]),
        (
            "the last commit",
            |bytes, at| bytes[at[5]..at[6]].fill(0),
            [Err(6), Ok((5, false)), Ok((5, false))],
        ),
        (
            "its beginning",
            |bytes, at| bytes[at[5]..at[6] - 9].fill(0),
            [Err(6), Ok((5, true)), Ok((5, true))],
        ),
        ("its end", |bytes, at| bytes[at[5] + 9..at[6]].fill(0), [Err(6), Ok((5, true)), Ok((5, true))]),
        ("one before it", |bytes, at| bytes[at[4]..at[5]].fill(0), [Err(5); 3]),
        ("two in the middle", |bytes, at| bytes[at[2]..at[4]].fill(0), [Err(3); 3]),
        ("all of them", |bytes, at| bytes[at[0]..].fill(0), [Err(1), Err(1), Ok((0, false))]),
        (
            "zeros, and a later commit behind them",
            |bytes, at| {
                let before = CommitId { number: 7, ..CommitId::ZERO };
                let (_, later) = commit::encode(before, 0, b"");
                bytes.resize(at[6] + 70_000, 0);
                bytes.extend_from_slice(&later);
                bytes.resize(bytes.len() + 5_000, 0);
            },
            [Err(7); 3],
        ),
        (
            "zeros, and an earlier commit behind them",
            |bytes, at| {
                let earlier = bytes[at[2]..at[3]].to_vec();
                bytes[at[6] + 100..at[6] + 100 + earlier.len()].copy_from_slice(&earlier);
            },
            [Ok((6, true)); 3],
        ),
        ("a flipped bit in the room", |bytes, at| bytes[at[6] + 50] ^= 1, [Ok((6, true)); 3]),
    ];
    let earlier = logged(4, "x", &with_room()).files.get("tip").unwrap();
    for (what, damage, wants) in table {
        for (n, want) in wants.into_iter().enumerate() {
            let machine = logged(5, "x", &with_room());
            let log = logs(&machine).remove(0);
            change(&machine, &log, |bytes| {
                let places = places(bytes);
                assert!(places.len() == 7 && bytes.len() > places[6] + 1_000);
                assert!(bytes[places[6]..].iter().all(|byte| *byte == 0));
                damage(bytes, &places);
            });
            match n {
                0 => {}
                1 => machine.files.set("tip", earlier.clone()),
                _ => machine.files.take("tip"),
            }
            let found = match end(&machine) {
                Ok((proven, torn)) => Ok((proven.last.number, torn > 0)),
                Err(OpenError::Damaged { commit, .. }) => Err(commit),
                Err(error) => panic!("{what}: {error}"),
            };
            assert_eq!(found, want, "{what}, tip {n}");
            // The shard says the same.
            match (want, opened(&machine, &with_room())) {
                (Ok((last, _)), Ok(records)) => assert_eq!(records, last.saturating_sub(1), "{what}"),
                (Err(commit), Err(OpenError::Damaged { commit: found, .. })) => {
                    assert_eq!(found, commit, "{what}")
                }
                (_, other) => panic!("{what}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_file_that_was_closed_keeps_its_room_and_must_have_all_its_commits() {
    let made = || logged_in_parts(3, 5, "x", &with_room());
    let machine = made();
    let (proven, torn) = end(&machine).unwrap();
    assert!(torn == 0 && proven.room > 3 * 1_000 && proven.last.number == 18, "{proven:?}");
    assert_eq!(opened(&machine, &with_room()).unwrap(), 15);
    for log in logs(&made()).drain(..2) {
        let at = places(&made().files.get(&log).unwrap());
        // What lies in its room is void.
        for damage in [
            (|bytes, at| bytes[at + 700] = 7) as fn(&mut Vec<u8>, usize),
            |bytes, at| bytes.truncate(at),
            |bytes, at| bytes.truncate(at + 1),
        ] {
            let machine = made();
            change(&machine, &log, |bytes| damage(bytes, at[6]));
            assert_eq!(opened(&machine, &with_room()).unwrap(), 15);
        }
        // Its last commit is not.
        for tip in [true, false] {
            let machine = made();
            change(&machine, &log, |bytes| bytes[at[5]..at[6]].fill(0));
            if !tip {
                machine.files.take("tip");
            }
            assert!(matches!(opened(&machine, &with_room()), Err(OpenError::Damaged { .. })));
        }
    }
}

#[test]
fn room_begins_small_doubles_and_is_left_alone_by_large_commits() {
    let length = |machine: &Machine| machine.files.get(logs(machine).last().unwrap()).unwrap().len();
    let options = StoreOptions { log_ahead_bytes: 1 << 16, ..never_settles() };
    let machine = Machine::new();
    let mut open = machine.open(&options).unwrap();
    assert_eq!(length(&machine), 8_192, "a shard nobody uses: one sixteenth, to the next 4 KiB");
    let mut lengths = Vec::new();
    for n in 1..=1_000 {
        commit(&mut open, n, &"x".repeat(200));
        let_the_thread_look(&open);
        let bytes = machine.files.get(logs(&machine).last().unwrap()).unwrap();
        assert!(bytes.len() > *places(&bytes).last().unwrap(), "always ahead");
        lengths.push(bytes.len());
    }
    lengths.dedup();
    let steps: Vec<usize> = lengths.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(steps[..5], [8_192, 16_384, 32_768, 65_536, 65_536], "{lengths:?}");
    let stats = open.shard.stats();
    // One of each commit, the epoch record's among them, one of each canary, one of each step.
    assert_eq!(stats.barriers, 1_001 + 1_000 + steps.len() as u64);
    open.abandon();

    let machine = Machine::new();
    let mut open = machine.open(&options).unwrap();
    for n in 1..=20 {
        commit(&mut open, n, &"x".repeat(9_000));
    }
    let bytes = machine.files.get(&logs(&machine)[0]).unwrap();
    assert_eq!(bytes.len(), *places(&bytes).last().unwrap(), "no room ahead of large commits");
    open.abandon();

    for off in [
        StoreOptions { durability: Durability::Process, ..options },
        StoreOptions { log_ahead_bytes: 0, ..never_settles() },
    ] {
        let machine = logged(20, "x", &off);
        let bytes = machine.files.get(&logs(&machine)[0]).unwrap();
        assert_eq!(bytes.len(), *places(&bytes).last().unwrap());
    }
}

#[test]
fn without_space_for_room_commits_go_on() {
    let payload = "x".repeat(500);
    each_way(|options| {
        let options = StoreOptions { log_ahead_bytes: 40_000, ..options.clone() };
        for how in [Failing::Full, Failing::Partly] {
            // From the beginning, and once there was some.
            for after in [0, 1, 2] {
                let machine = Machine::new();
                let mut room = lasting(Call::Room, ".log", how);
                room.after = after;
                machine.files.fail(room);
                let mut open = machine.open(&options).unwrap();
                let mut want = Vec::new();
                for n in 1..=60 {
                    commit(&mut open, n, &payload);
                    let_the_thread_look(&open);
                    want.push(payload.clone());
                }
                assert_eq!(open.shard.stats().failing, None);
                until("an attempt", || machine.files.failed_calls() >= 1);
                assert_eq!(machine.files.failed_calls(), 1, "once in a file");
                assert_eq!(logs(&machine).len(), 1);
                assert_eq!(machine.files.broken_promises(), Vec::<String>::new());
                found_later(&machine, &want, &format!("{how:?}"));
                open.close().unwrap();
                found_later(&machine, &want, &format!("{how:?}, closed"));
            }
        }
    });
}

#[test]
fn room_that_can_not_be_written_or_synced_ends_its_file_and_fails_no_commit() {
    let payload = "x".repeat(500);
    each_way(|options| {
        let options = StoreOptions { log_ahead_bytes: 40_000, ..options.clone() };
        for (call, how) in [
            (Call::Sync, Failing::Broken),
            (Call::Sync, Failing::Full),
            (Call::Sync, Failing::Done),
            (Call::Room, Failing::Broken),
            (Call::Room, Failing::Done),
        ] {
            let (mut of_room, mut of_commits) = (0, 0);
            for after in 0..if call == Call::Sync { 40 } else { 2 } {
                let machine = Machine::new();
                let mut open = machine.open(&options).unwrap();
                let first = logs(&machine);
                let mut failing = fault(call, ".log", how);
                failing.after = after;
                machine.files.fail(failing);
                let mut refused = false;
                let mut want = Vec::new();
                for n in 1..=60 {
                    if open.commit(&[append(1, n, payload.clone())]).is_err() {
                        refused = true;
                        commit_in_the_end(&mut open, n, &payload);
                    }
                    let_the_thread_look(&open);
                    want.push(payload.clone());
                }
                if refused {
                    of_commits += 1;
                } else {
                    until("the failure", || machine.files.failed_calls() == 1);
                    until("another file", || logs(&machine).iter().any(|log| !first.contains(log)));
                    until("it works", || open.shard.stats().failing.is_none());
                    of_room += 1;
                }
                assert_eq!(payloads(&open), want);
                assert_eq!(machine.files.broken_promises(), Vec::<String>::new());
                found_later(&machine, &want, &format!("{how:?} after {after}"));
                open.abandon();
            }
            assert!(
                of_room > 0 && (of_commits > 10 || call == Call::Room),
                "{call:?}: {of_room} {of_commits}"
            );
        }
    });
}

/// Room that fails and no other file to be had is a log that failed: refused until it works again.
#[test]
fn room_that_can_not_be_synced_without_another_file_is_a_log_that_failed() {
    let payload = "x".repeat(500);
    let machine = Machine::new();
    let mut open = machine.open(&with_room()).unwrap();
    machine.files.fail(lasting(Call::Create, ".log", Failing::Broken));
    let mut n = 0;
    let mut sync = fault(Call::Sync, ".log", Failing::Broken);
    sync.after = 9;
    machine.files.fail(sync);
    let mut want = Vec::new();
    while open.commit(&[append(1, n + 1, payload.clone())]).is_ok() {
        n += 1;
        want.push(payload.clone());
        let_the_thread_look(&open);
        assert!(n < 100);
    }
    assert!(open.shard.stats().failing.is_some());
    machine.files.heal();
    commit_in_the_end(&mut open, n + 1, "kept");
    want.push("kept".to_owned());
    assert_eq!(payloads(&open), want);
    assert_eq!(machine.files.broken_promises(), Vec::<String>::new());
    found_later(&machine, &want, "healed");
    open.abandon();
}

/// Commits done by whoever asks may be quicker than the thread that makes room. It is asked once, and then gets the next commit, too, so
/// that it has its turn; what else it is asked for has its place in the queue.
#[test]
fn room_that_is_late_leaves_the_queue_to_others() {
    let options =
        StoreOptions { commit_here_within: Duration::from_secs(3600), log_ahead_bytes: 1, ..never_settles() };
    let machine = Machine::new();
    let mut open = machine.open(&options).unwrap();
    let mut next = 1;
    for _ in 0..40 {
        // Room is wanted with each of them.
        for _ in 0..30 {
            commit(&mut open, next, "x");
            next += 1;
        }
        // Too large for that.
        let batch: Vec<_> = (next..next + 33).map(|n| append(1, n, "x")).collect();
        open.commit(&batch).unwrap();
        next += 33;
    }
    let_the_thread_look(&open);
    let bytes = machine.files.get(&logs(&machine)[0]).unwrap();
    assert!(bytes.len() > *places(&bytes).last().unwrap(), "it came in the end");
    open.abandon();
}

/// Zeros in the log as a power cut may leave them: the last commit in part, sector by sector, and room of any length.
fn cut_image(acked: u64, payload: usize, room: u64, seed: u64) -> (Machine, Vec<usize>, u64) {
    let options = StoreOptions { log_ahead_bytes: room, ..never_settles() };
    let payload = "x".repeat(payload);
    let machine = logged(acked + 1, &payload, &options);
    machine.files.set("tip", logged(acked, &payload, &options).files.get("tip").unwrap());
    let log = logs(&machine).remove(0);
    let mut chance = Chance::new(seed);
    let mut whole = true;
    let mut at = Vec::new();
    change(&machine, &log, |bytes| {
        at = places(bytes);
        let (durable, written) = (at[at.len() - 2], at[at.len() - 1]);
        let mut from = durable;
        while from < written {
            let to = ((from / 512 + 1) * 512).min(written);
            if chance.percent(40) {
                whole &= bytes[from..to].iter().all(|byte| *byte == 0);
                bytes[from..to].fill(0);
            }
            from = to;
        }
        let length = durable + chance.below((bytes.len() - durable) as u64 + 1) as usize;
        whole &= length >= written;
        bytes.truncate(length);
    });
    (machine, at, acked + u64::from(whole))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whatever_part_of_the_last_commit_and_the_room_is_there_the_rest_is_read(
        acked in 1..12u64, payload in 0..3_000usize, room in prop::sample::select(vec![0, 1, 9_000, 100_000]), seed in any::<u64>(),
    ) {
        let (machine, _, records) = cut_image(acked, payload, room, seed);
        prop_assert_eq!(opened(&machine, &with_room()).unwrap(), records);
    }

    #[test]
    fn zeros_over_anything_acknowledged_are_damage(
        acked in 1..12u64, payload in 0..3_000usize, room in prop::sample::select(vec![0, 1, 9_000, 100_000]), seed in any::<u64>(),
        from in any::<prop::sample::Index>(), length in 1..5_000usize,
    ) {
        let (machine, at, _) = cut_image(acked, payload, room, seed);
        let log = logs(&machine).remove(0);
        // From somewhere in what was acknowledged on.
        let from = HEADER_BYTES + from.index(at[at.len() - 2] - HEADER_BYTES);
        let mut changed = false;
        change(&machine, &log, |bytes| {
            let to = (from + length).min(at[at.len() - 2]);
            changed = bytes[from..to].iter().any(|byte| *byte != 0);
            let to = (from + length).min(bytes.len());
            bytes[from..to].fill(0);
        });
        let found = opened(&machine, &with_room());
        if changed {
            let first = at.iter().filter(|place| **place <= from).count() as u64;
            match found {
                Err(OpenError::Damaged { commit, .. }) => prop_assert!(commit >= first && commit <= acked + 1, "{}", commit),
                other => prop_assert!(false, "{:?}", other),
            }
        }
    }
}

#[test]
fn room_and_commits_lie_in_a_real_file_as_in_one_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let disk = crate::files::disk::Disk::new(folder.path());
    let faulty = Machine::new().files;
    for files in [&disk as &dyn Files, &faulty] {
        let mut file = files.create("a").unwrap();
        file.append(b"first").unwrap();
        file.make_room(200_000).unwrap();
        file.make_room(100).unwrap();
        file.append(b"second").unwrap();
        file.sync().unwrap();
        file.append(&[7; 150_000]).unwrap();
        file.append(&[8; 60_000]).unwrap();
        file.make_room(210_020).unwrap();
        file.append(b"third").unwrap();
        file.sync().unwrap();
        let read = files.open("a").unwrap();
        let mut bytes = vec![1; usize::try_from(read.len().unwrap()).unwrap()];
        read.read_exact_at(&mut bytes, 0).unwrap();
        let want = [&b"firstsecond"[..], &[7; 150_000], &[8; 60_000], b"third", &[0; 4]].concat();
        assert!(bytes == want, "{} bytes", bytes.len());
    }
}

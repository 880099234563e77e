//! Failing calls: a refused commit never happened, earlier ones stay, and the shard goes on by itself when the fault ends.

use std::{
    sync::mpsc::{RecvTimeoutError, sync_channel},
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{
    Machine, Open, append, conversation,
    model::{ALL, Model},
    seq, until,
};
use crate::{
    CommitError, ReadError, StoreOptions,
    engine::{
        EngineError,
        faulty::{EngineCall, EngineFault},
    },
    files::faulty::{Call, Chance, Failing, Fault},
    shard::committer::RETRY_FIRST,
};

fn never_settles() -> StoreOptions {
    StoreOptions {
        settle_commits: 1 << 40,
        settle_bytes: 1 << 40,
        settle_idle: Duration::from_secs(3600),
        background_bytes_per_second: u64::MAX,
        reserve_bytes: 0,
        ..StoreOptions::default()
    }
}

/// With commits handed to the shard's thread, and done by whoever asks.
pub(super) fn each_way(check: impl Fn(&StoreOptions)) {
    for commit_here_within in [Duration::ZERO, Duration::from_secs(3600)] {
        check(&StoreOptions { commit_here_within, ..never_settles() });
    }
}

fn settles_often() -> StoreOptions {
    StoreOptions {
        settle_commits: 4,
        settle_bytes: 1 << 20,
        settle_idle: Duration::from_millis(2),
        ..never_settles()
    }
}

pub(super) fn fault(call: Call, name: &'static str, how: Failing) -> Fault {
    Fault { call, name, after: 0, times: 1, how }
}

pub(super) fn lasting(call: Call, name: &'static str, how: Failing) -> Fault {
    Fault { times: u64::MAX, ..fault(call, name, how) }
}

/// Payloads of conversation 1.
pub(super) fn payloads(open: &Open) -> Vec<String> {
    let records = open.reader.records(conversation(1), seq(1), seq(9_999), ALL).unwrap();
    let head = open.reader.head(conversation(1)).unwrap().unwrap_or_default();
    assert_eq!(records.len() as u64, head.seq.get());
    records.iter().map(|record| String::from_utf8(record.payload.to_vec()).unwrap()).collect()
}

fn commit(open: &mut Open, n: u64, payload: &str) -> Result<(), CommitError> {
    open.commit(&[append(1, n, payload.to_owned())]).map(|_| ())
}

/// Commits when that works again.
pub(super) fn commit_in_the_end(open: &mut Open, n: u64, payload: &str) {
    until("a commit", || match commit(open, n, payload) {
        Ok(()) => true,
        Err(CommitError::Unavailable { .. } | CommitError::Full { .. } | CommitError::Read(_)) => false,
        Err(error) => panic!("{error}"),
    });
}

fn refused_as(how: Failing, error: &CommitError) -> bool {
    match how {
        Failing::Full | Failing::Partly => matches!(error, CommitError::Full { .. }),
        Failing::Broken | Failing::Done => matches!(error, CommitError::Unavailable { .. }),
    }
}

/// Every way in which the log of one commit can fail.
fn log_faults() -> Vec<Fault> {
    let mut faults = Vec::new();
    for how in [Failing::Broken, Failing::Full, Failing::Partly, Failing::Done] {
        faults.push(fault(Call::Append, ".log", how));
    }
    for how in [Failing::Broken, Failing::Full, Failing::Done] {
        faults.push(fault(Call::Sync, ".log", how));
    }
    faults.push(fault(Call::SlotWrite, "tip", Failing::Broken));
    faults.push(fault(Call::SlotWrite, "tip", Failing::Full));
    faults
}

/// Looks at what is found after the process was killed and after several power cuts.
pub(super) fn found_later(machine: &Machine, want: &[String], what: &str) {
    let mut later = vec![machine.after_kill()];
    for seed in 0..4 {
        later.push(machine.after_power_cut(i64::MAX, &mut Chance::new(seed)));
    }
    for machine in later {
        for _ in 0..2 {
            let open = machine.open(&never_settles()).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(payloads(&open), want, "{what}");
            open.abandon();
        }
    }
}

#[test]
fn a_commit_whose_log_failed_never_happened_and_the_shard_goes_on_by_itself() {
    each_way(|options| {
        for fault in log_faults() {
            // The first commit of its file, or a later one; failing once or twice in a row.
            'case: for (before, twice) in [(0, false), (3, false), (3, true)] {
                let what = format!("{fault:?} after {before}, twice: {twice}");
                let machine = Machine::new();
                let mut open = machine.open(options).unwrap();
                let mut want: Vec<String> = Vec::new();
                for n in 1..=before {
                    commit(&mut open, n, "before").unwrap();
                    want.push("before".to_owned());
                }
                let next = before + 1;
                for _ in 0..=u32::from(twice) {
                    until("the log", || open.shard.stats().failing.is_none());
                    machine.files.fail(fault.clone());
                    let failed = Instant::now();
                    let error = commit(&mut open, next, "void").unwrap_err();
                    let told = open.shard.stats().failing;
                    assert!(
                        told == Some(error.to_string()) || failed.elapsed() >= RETRY_FIRST,
                        "{what}: it is told, not {told:?}"
                    );
                    assert!(refused_as(fault.how, &error), "{what}: {error}");
                    assert_eq!(payloads(&open), want, "{what}: not shown");
                    if commit(&mut open, next, "at once").is_ok() {
                        // On a machine that was busy elsewhere the new file was begun meanwhile; there is nothing more to see.
                        assert!(failed.elapsed() >= RETRY_FIRST, "{what}: not before a new file is begun");
                        continue 'case;
                    }
                }
                until("the log", || commit(&mut open, next, "real").is_ok());
                want.push("real".to_owned());
                found_later(&machine, &want, &what);
                for n in 1..=5 {
                    commit(&mut open, next + n, "later").unwrap();
                    want.push("later".to_owned());
                }
                assert_eq!(payloads(&open), want, "{what}");
                assert_eq!(machine.files.broken_promises(), Vec::<String>::new());
                found_later(&machine, &want, &what);
                open.close().unwrap();
                found_later(&machine, &want, &what);
            }
        }
    });
}

#[test]
fn a_log_that_fails_for_a_while_is_refused_for_a_while() {
    each_way(|options| {
        for (call, name) in [
            (Call::Append, ".log"),
            (Call::Sync, ".log"),
            (Call::Create, ".log"),
            (Call::Rename, ".log"),
            (Call::SyncFolder, ""),
            (Call::SlotWrite, "tip"),
        ] {
            for how in [Failing::Broken, Failing::Full] {
                let machine = Machine::new();
                let mut open = machine.open(options).unwrap();
                for n in 1..=3 {
                    commit(&mut open, n, "before").unwrap();
                }
                machine.files.fail(lasting(call, name, how));
                // For those calls that only a new file makes.
                machine.files.fail(fault(Call::Append, ".log", how));
                let failed = machine.files.failed_calls();
                until("a few attempts", || {
                    let error = commit(&mut open, 4, "void").unwrap_err();
                    assert!(refused_as(how, &error), "{call:?} {how:?}: {error}");
                    assert_eq!(payloads(&open).len(), 3);
                    machine.files.failed_calls() >= failed + 3
                });
                machine.files.heal();
                commit_in_the_end(&mut open, 4, "real");
                let want = ["before", "before", "before", "real"].map(str::to_owned);
                assert_eq!(payloads(&open), want);
                found_later(&machine, &want, &format!("{call:?} {how:?}"));
            }
        }
    });
}

/// Kills the process, or cuts the power, at every operation between a refused commit and the next one that works.
#[test]
fn a_refused_commit_is_there_whole_or_not_at_all_wherever_the_process_ends() {
    each_way(|options| {
        for fault in [
            fault(Call::Sync, ".log", Failing::Done),
            fault(Call::Append, ".log", Failing::Partly),
            fault(Call::SlotWrite, "tip", Failing::Broken),
        ] {
            let mut operations = 0;
            loop {
                let machine = Machine::new();
                let mut open = machine.open(options).unwrap();
                for n in 1..=3 {
                    commit(&mut open, n, "before").unwrap();
                }
                machine.files.fail(fault.clone());
                commit(&mut open, 4, "void").unwrap_err();
                machine.files.power().allow(operations);
                let mut acked = false;
                until("the end", || {
                    acked = commit(&mut open, 4, "real").is_ok();
                    acked || machine.files.power().is_off()
                });
                open.abandon();
                let mut later = vec![machine.after_kill()];
                later.extend((0..3).map(|seed| machine.after_power_cut(i64::MAX, &mut Chance::new(seed))));
                for machine in later {
                    let what = format!("{fault:?}, {operations} operations, acknowledged: {acked}");
                    let mut open = machine.open(options).unwrap_or_else(|error| panic!("{what}: {error}"));
                    let mut found = payloads(&open);
                    match found.get(3).map(String::as_str) {
                        None | Some("void") => assert!(!acked, "{what}: {found:?}"),
                        Some("real") => {}
                        Some(other) => panic!("{what}: {other}"),
                    }
                    commit(&mut open, found.len() as u64 + 1, "after").unwrap();
                    found.push("after".to_owned());
                    open.abandon();
                    // What was found first stays.
                    found_later(&machine, &found, &what);
                }
                if acked {
                    break;
                }
                operations += 1;
            }
            assert!(operations > 5, "{operations} operations");
        }
    });
}

#[test]
fn a_commit_that_was_refused_before_the_log_was_begun_again_does_not_come_back_when_it_fails_again() {
    each_way(|options| {
        let mut operations = 0;
        loop {
            let machine = Machine::new();
            let mut open = machine.open(options).unwrap();
            commit(&mut open, 1, "before").unwrap();
            // The file with the refused commit stays.
            machine.files.fail(lasting(Call::Remove, "1.log", Failing::Broken));
            machine.files.fail(fault(Call::Sync, ".log", Failing::Done));
            commit(&mut open, 2, "void").unwrap_err();
            // The log is begun again by itself, and then fails with its first commit.
            until("a new file", || open.shard.stats().failing.is_none());
            machine.files.fail(fault(Call::Append, ".log", Failing::Broken));
            commit(&mut open, 2, "void too").unwrap_err();
            machine.files.power().allow(operations);
            let mut acked = false;
            until("the end", || {
                acked = commit(&mut open, 2, "real").is_ok();
                acked || machine.files.power().is_off()
            });
            open.abandon();
            for seed in 0..4 {
                let killed = machine.after_kill();
                let machine = if seed == 0 {
                    killed
                } else {
                    machine.after_power_cut(i64::MAX, &mut Chance::new(seed))
                };
                let open = machine.open(options).unwrap();
                let found = payloads(&open);
                assert_ne!(
                    found.get(1).map(String::as_str),
                    Some("void"),
                    "{operations} operations: {found:?}"
                );
                assert!(!acked || found == ["before", "real"], "{found:?}");
                open.abandon();
            }
            if acked {
                break;
            }
            operations += 1;
        }
    });
}

/// Everything that settling does, failing.
fn settle_faults() -> Vec<(Option<Fault>, Option<EngineFault>, Failing)> {
    let mut faults = Vec::new();
    for how in [Failing::Broken, Failing::Full] {
        for (call, name) in [
            (Call::Create, ".seg"),
            (Call::Append, ".seg"),
            (Call::Sync, ".seg"),
            (Call::Create, "manifest.new"),
            (Call::Append, "manifest.new"),
            (Call::Sync, "manifest.new"),
            (Call::Rename, "manifest"),
        ] {
            faults.push((Some(lasting(call, name, how)), None, how));
        }
        let error = match how {
            Failing::Full => EngineError::Full,
            _ => EngineError::Failed("broken".to_owned()),
        };
        for call in [EngineCall::Write, EngineCall::Barrier] {
            let fault = EngineFault { call, after: 0, times: u64::MAX, error: error.clone(), panics: false };
            faults.push((None, Some(fault), how));
        }
    }
    faults.push((Some(lasting(Call::Rename, "manifest", Failing::Done)), None, Failing::Done));
    faults.push((Some(lasting(Call::Append, ".seg", Failing::Partly)), None, Failing::Partly));
    faults.push((Some(lasting(Call::Open, ".seg", Failing::Broken)), None, Failing::Broken));
    faults
}

#[test]
fn while_settling_fails_commits_go_on_to_the_bound_and_nothing_is_lost() {
    for (fault, engine_fault, how) in settle_faults() {
        let what = format!("{fault:?} {engine_fault:?}");
        let machine = Machine::new();
        let options = settles_often();
        let mut open = machine.open(&options).unwrap();
        let mut want = Vec::new();
        for n in 1..=30 {
            commit_in_the_end(&mut open, n, "before");
            want.push("before".to_owned());
        }
        until("settling", || open.shard.stats().overlay_commits == 0);
        let segments =
            |machine: &Machine| machine.files.names().iter().filter(|name| name.ends_with(".seg")).count();
        until("merging", || segments(&machine) < 8);
        let before = segments(&machine);
        if let Some(fault) = fault {
            machine.files.fail(fault);
        }
        if let Some(fault) = engine_fault.clone() {
            machine.engines.fail(fault);
        }
        let mut went_on = 0;
        let error = loop {
            match commit(&mut open, want.len() as u64 + 1, "while") {
                Ok(()) => want.push("while".to_owned()),
                Err(error) => break error,
            }
            went_on += 1;
            assert!(went_on < 100, "{what}: no bound");
        };
        assert!(went_on >= 8, "{what}: only {went_on} went on: {error}");
        assert!(refused_as(how, &error), "{what}: {error}");
        let failing = open.shard.stats().failing;
        assert!(failing.is_some(), "{what}");
        let failed = || machine.files.failed_calls() + machine.engines.failed_calls();
        let so_far = failed();
        until("a few attempts", || {
            // What is in the caches and layers is read, whatever fails; the rest is never wrong.
            assert_eq!(open.reader.head(conversation(1)).unwrap().unwrap().seq.get(), want.len() as u64);
            match open.reader.records(conversation(1), seq(1), seq(9_999), ALL) {
                Ok(records) => assert_eq!(records.len(), want.len(), "{what}"),
                Err(ReadError::Engine { .. }) => assert!(engine_fault.is_some(), "{what}"),
                Err(error) => panic!("{what}: {error}"),
            }
            failed() >= so_far + 3
        });
        assert!(segments(&machine) <= before + 1, "{what}: attempts leave files behind");
        // Killed now, nothing is missing; whoever opens it needs what works.
        found_later(&machine, &want, &what);
        machine.files.heal();
        machine.engines.heal();
        for _ in 0..20 {
            commit_in_the_end(&mut open, want.len() as u64 + 1, "later");
            want.push("later".to_owned());
        }
        until("settling", || open.shard.stats().failing.is_none());
        assert_eq!(payloads(&open), want, "{what}");
        assert_eq!(machine.files.broken_promises(), Vec::<String>::new());
        open.close().unwrap();
        found_later(&machine, &want, &what);
    }
}

#[test]
fn a_disk_that_is_full_everywhere_loses_nothing_and_says_so() {
    let machine = Machine::new();
    let mut open = machine.open(&settles_often()).unwrap();
    let mut want = Vec::new();
    for n in 1..=30 {
        commit_in_the_end(&mut open, n, "before");
        want.push("before".to_owned());
    }
    for call in [Call::Create, Call::Append, Call::Sync] {
        machine.files.fail(lasting(call, "", Failing::Full));
    }
    let full =
        |call| EngineFault { call, after: 0, times: u64::MAX, error: EngineError::Full, panics: false };
    machine.engines.fail(full(EngineCall::Write));
    machine.engines.fail(full(EngineCall::Barrier));
    let failed = machine.files.failed_calls();
    until("many attempts", || {
        match commit(&mut open, 31, "void") {
            Err(CommitError::Full { .. }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(payloads(&open), want);
        machine.files.failed_calls() > failed + 4
    });
    found_later(&machine, &want, "full");
    machine.files.heal();
    machine.engines.heal();
    commit_in_the_end(&mut open, 31, "after");
    want.push("after".to_owned());
    open.close().unwrap();
    found_later(&machine, &want, "after");
}

#[test]
fn an_index_that_cannot_be_made_again_is_read_as_it_is() {
    let machine = Machine::new();
    let mut open = machine.open(&settles_often()).unwrap();
    let mut want = Vec::new();
    for n in 1..=30 {
        commit_in_the_end(&mut open, n, "before");
        want.push("before".to_owned());
    }
    // The index takes nothing any more, and to make it again there is no space either.
    let write = EngineCall::Write;
    machine.engines.fail(EngineFault {
        call: write,
        after: 0,
        times: u64::MAX,
        error: EngineError::Full,
        panics: false,
    });
    machine.files.fail(lasting(Call::Create, "canary", Failing::Full));
    let failed = machine.files.failed_calls();
    until("attempts to make it again", || {
        if commit(&mut open, want.len() as u64 + 1, "meanwhile").is_ok() {
            want.push("meanwhile".to_owned());
        }
        assert_eq!(payloads(&open), want, "reads go on");
        machine.files.failed_calls() > failed + 4
    });
    machine.files.heal();
    machine.engines.heal();
    commit_in_the_end(&mut open, want.len() as u64 + 1, "after");
    want.push("after".to_owned());
    assert_eq!(payloads(&open), want);
    open.close().unwrap();
    found_later(&machine, &want, "after");
}

/// Any faults, any time: what was acknowledged is there, what was refused is not.
fn faults_at_random(seed: u64) {
    let mut chance = Chance::new(seed);
    let machine = Machine::new();
    let options = StoreOptions {
        settle_bytes: 1 + chance.below(20_000) as usize,
        settle_commits: 1 + chance.below(12),
        commit_here_within: Duration::from_secs(3600 * chance.below(2)),
        ..settles_often()
    };
    let mut open = machine.open(&options).unwrap();
    let mut now = Model::default();
    for _ in 0..6 {
        for _ in 0..=chance.below(2) {
            let calls = [
                (Call::Create, ".seg"),
                (Call::Create, ".log"),
                (Call::Create, "manifest.new"),
                (Call::Append, ".seg"),
                (Call::Append, ".log"),
                (Call::Append, "manifest.new"),
                (Call::Sync, ".seg"),
                (Call::Sync, ".log"),
                (Call::Sync, "manifest.new"),
                (Call::SyncFolder, ""),
                (Call::Rename, ""),
                (Call::Remove, ""),
                (Call::Open, ""),
                (Call::Read, ""),
                (Call::SlotWrite, "tip"),
            ];
            let (call, name) = calls[chance.below(calls.len() as u64) as usize];
            let how =
                [Failing::Broken, Failing::Full, Failing::Partly, Failing::Done][chance.below(4) as usize];
            let (after, times) = (chance.below(30), 1 + chance.below(3));
            machine.files.fail(Fault { call, name, after, times, how });
        }
        if chance.percent(60) {
            let call = [EngineCall::Write, EngineCall::Barrier, EngineCall::Read, EngineCall::Open];
            let call = call[chance.below(4) as usize];
            let error =
                if chance.percent(50) { EngineError::Full } else { EngineError::Failed("broken".to_owned()) };
            let (after, times) = (chance.below(200), 1 + chance.below(2));
            machine.engines.fail(EngineFault { call, after, times, error, panics: false });
        }
        for _ in 0..chance.below(60) {
            let mut next = now.clone();
            let batch = next.batch(&mut chance);
            match open.commit(&batch) {
                Ok(_) => now = next,
                Err(CommitError::Invalid(text)) => panic!("{text}"),
                Err(CommitError::Read(ReadError::Damaged { what, .. })) => panic!("{what}"),
                Err(_) => std::thread::park_timeout(Duration::from_millis(10)),
            }
            if chance.percent(10) {
                match Model::read_back(&open, &mut chance) {
                    Ok(found) => assert!(found == now, "{}", found.difference(&now)),
                    Err(ReadError::Engine { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
        machine.files.heal();
        machine.engines.heal();
        // It goes on by itself, and with that everything that was refused is void.
        until("a commit that works", || {
            let mut next = now.clone();
            let batch = next.batch(&mut chance);
            let worked = open.commit(&batch).is_ok();
            if worked {
                now = next;
            }
            worked
        });
        let mut found = Err(ReadError::Engine { shard: super::shard_id(), reason: String::new() });
        until("reads that work", || {
            found = Model::read_back(&open, &mut chance);
            !matches!(found, Err(ReadError::Engine { .. }))
        });
        let found = found.unwrap_or_else(|error| panic!("{error}"));
        assert!(found == now, "{}", found.difference(&now));
        for later in [machine.after_kill(), machine.after_power_cut(i64::MAX, &mut chance)] {
            let open = later.open(&options).unwrap_or_else(|error| panic!("refused: {error}"));
            let found = Model::read_back(&open, &mut chance).unwrap_or_else(|error| panic!("{error}"));
            assert!(found == now, "later: {}", found.difference(&now));
            open.abandon();
        }
        assert_eq!(machine.files.broken_promises(), Vec::<String>::new());
    }
    open.abandon();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]
    #[test]
    fn nothing_is_lost_and_nothing_refused_comes_back_whatever_fails(seed in any::<u64>()) {
        faults_at_random(seed);
    }
}

#[test]
#[ignore = "a campaign: many more seeds than a test run has time for"]
fn fault_campaign() {
    let began = Instant::now();
    let from = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let mut failed = Vec::new();
    let mut done = 0;
    for seed in from..from + 2_000 {
        if std::panic::catch_unwind(|| faults_at_random(seed)).is_err() {
            failed.push(seed);
        }
        done += 1;
        if began.elapsed() > Duration::from_secs(100) {
            break;
        }
    }
    println!("{done} seeds from {from} on, {} failed: {failed:?}", failed.len());
    assert_eq!(failed, Vec::<u64>::new());
}

// ---- nobody waits for ever

/// Runs something that must come to an end.
fn bounded(what: &str, work: impl FnOnce() + Send + 'static) {
    let (done, waiting) = sync_channel(1);
    let thread = std::thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    match waiting.recv_timeout(Duration::from_secs(60)) {
        Err(RecvTimeoutError::Timeout) => panic!("{what}: it hangs"),
        _ => thread.join().unwrap(),
    }
}

#[test]
fn closing_and_stopping_come_to_an_end_whatever_the_settler_does() {
    type Trouble = fn(&Machine);
    let troubles: [(&str, Trouble); 4] = [
        ("it fails", |machine| machine.files.fail(lasting(Call::Append, ".seg", Failing::Broken))),
        ("the index fails", |machine| {
            let error = EngineError::Failed("broken".to_owned());
            let call = EngineCall::Write;
            machine.engines.fail(EngineFault { call, after: 3, times: u64::MAX, error, panics: false });
        }),
        ("it is slow", |machine| machine.files.set_delay(Duration::from_millis(3))),
        ("it panics", |machine| {
            let error = EngineError::Full;
            let call = EngineCall::Write;
            machine.engines.fail(EngineFault { call, after: 3, times: u64::MAX, error, panics: true });
        }),
    ];
    for (what, trouble) in troubles {
        for close in [false, true] {
            for commits in [2, 40] {
                bounded(what, move || {
                    let machine = Machine::new();
                    let mut open = machine.open(&settles_often()).unwrap();
                    trouble(&machine);
                    let mut acked = 0;
                    for _ in 0..commits {
                        if commit(&mut open, acked + 1, "x").is_ok() {
                            acked += 1;
                        }
                    }
                    assert!(acked >= 2, "{what}");
                    if close {
                        let closed = open.close();
                        assert_eq!(closed.is_ok(), what == "it is slow", "{what}: {closed:?}");
                    } else {
                        open.abandon();
                    }
                    machine.files.set_delay(Duration::ZERO);
                    found_later(&machine, &vec!["x".to_owned(); acked as usize], what);
                });
            }
        }
    }
}

//! Damaged, missing and foreign files, each with its answer: refused with the place, or made again; never served wrongly.

use std::time::Duration;

use super::{
    Machine, Open, append, conversation,
    model::{ALL, Model},
    seq, shard_id, until,
};
use crate::{
    Durability, OpenError, ReadError, StoreOptions,
    commit::{self, CommitId, Header},
    engine::faulty::Fate,
    files::faulty::Chance,
    shard::{
        journal::{self, HEADER_BYTES},
        manifest::Manifest,
    },
};

pub(super) fn never_settles() -> StoreOptions {
    StoreOptions {
        settle_commits: 1 << 40,
        settle_bytes: 1 << 40,
        settle_idle: Duration::from_secs(3600),
        background_bytes_per_second: u64::MAX,
        reserve_bytes: 0,
        ..StoreOptions::default()
    }
}

pub(super) fn commit(open: &mut Open, n: u64, payload: &str) -> CommitId {
    open.commit(&[append(1, n, payload.to_owned())]).unwrap()
}

/// A machine whose log holds an epoch record and `records` commits of one record each, in one file.
pub(super) fn logged(records: u64, payload: &str, options: &StoreOptions) -> Machine {
    let machine = Machine::new();
    let mut open = machine.open(options).unwrap();
    for n in 1..=records {
        commit(&mut open, n, payload);
    }
    open.abandon();
    machine
}

/// The same in `parts` files of `records` each; every part begins with an epoch record.
pub(super) fn logged_in_parts(parts: u64, records: u64, payload: &str, options: &StoreOptions) -> Machine {
    let machine = Machine::new();
    for part in 0..parts {
        let mut open = machine.open(options).unwrap();
        for n in 1..=records {
            commit(&mut open, part * records + n, payload);
        }
        open.abandon();
    }
    machine
}

pub(super) fn logs(machine: &Machine) -> Vec<String> {
    machine.files.names().into_iter().filter(|name| name.ends_with(".log")).collect()
}

/// Where the commits of a log file begin, and where the last one ends.
fn places(bytes: &[u8]) -> Vec<usize> {
    let mut at = HEADER_BYTES;
    let mut places = vec![at];
    while at < bytes.len() {
        at += commit::HEADER_BYTES + Header::decode(&bytes[at..]).unwrap().body_bytes;
        places.push(at);
    }
    places
}

pub(super) fn change(machine: &Machine, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = machine.files.get(name).unwrap();
    change(&mut bytes);
    machine.files.set(name, bytes);
}

/// Gives the header of a log file a right checksum again.
fn seal_header(bytes: &mut [u8]) {
    let crc = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_be_bytes());
}

/// Opens it twice, and returns how many records there are, or why it was refused.
pub(super) fn opened(machine: &Machine, options: &StoreOptions) -> Result<u64, OpenError> {
    let mut found = Vec::new();
    for _ in 0..2 {
        let open = machine.open(options)?;
        let head = open.reader.head(conversation(1)).unwrap().unwrap_or_default().seq.get();
        let records = open.reader.records(conversation(1), seq(1), seq(9_999), ALL).unwrap();
        assert_eq!(records.len() as u64, head);
        open.abandon();
        found.push(head);
    }
    assert_eq!(found[0], found[1], "the same when it is opened again");
    Ok(found[0])
}

fn damaged_at(machine: &Machine) -> (u64, String) {
    match opened(machine, &never_settles()) {
        Err(OpenError::Damaged { commit, what, .. }) => (commit, what),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_tip_tells_a_torn_commit_from_a_lost_one() {
    // The epoch record is commit 1, so record n is commit n + 1.
    let tip_of = |records| logged(records, "x", &never_settles()).files.get("tip").unwrap();
    for cut in [1, 30, 70, 80] {
        let torn = |tip: Option<Vec<u8>>| {
            let machine = logged(5, "x", &never_settles());
            let log = logs(&machine).remove(0);
            change(&machine, &log, |bytes| bytes.truncate(bytes.len() - cut));
            match tip {
                Some(tip) => machine.files.set("tip", tip),
                None => machine.files.take("tip"),
            }
            machine
        };
        assert_eq!(opened(&torn(Some(tip_of(4))), &never_settles()).unwrap(), 4, "never acknowledged");
        assert_eq!(opened(&torn(None), &never_settles()).unwrap(), 4, "nobody can tell");
        assert_eq!(damaged_at(&torn(Some(tip_of(5)))).0, 6, "acknowledged");
        assert_eq!(damaged_at(&torn(Some(tip_of(6)))).0, 6, "acknowledged, and one more");
    }
    let machine = logged(5, "x", &never_settles());
    machine.files.set("tip", tip_of(6));
    assert_eq!(damaged_at(&machine), (7, "the log ends here, but commit 7 was acknowledged".to_owned()));
    machine.files.set("tip", logged(5, "y", &never_settles()).files.get("tip").unwrap());
    assert_eq!(
        damaged_at(&machine),
        (6, "it is not the commit that was acknowledged (chain hash)".to_owned())
    );
}

#[test]
fn damage_in_the_log_is_refused_and_says_where() {
    type Change = fn(&Machine, &[String]);
    let table: [(&str, Change, u64, &str); 9] = [
        (
            "the body of a commit in the middle",
            |machine, logs| {
                change(machine, &logs[1], |bytes| {
                    let at = places(bytes)[2] - 1;
                    bytes[at] ^= 1;
                });
            },
            8,
            "malformed commit body checksum",
        ),
        (
            "the header of a commit in the last file, the next one intact, and no tip",
            |machine, logs| {
                machine.files.take("tip");
                change(machine, &logs[2], |bytes| {
                    let at = places(bytes)[1] + 9;
                    bytes[at] ^= 1;
                });
            },
            14,
            "malformed commit header checksum, and later commits lie behind it",
        ),
        (
            "a hole in the last file",
            |machine, logs| {
                machine.files.take("tip");
                change(machine, &logs[2], |bytes| {
                    let (from, to) = (places(bytes)[2], places(bytes)[4]);
                    bytes[from..to].fill(0);
                });
            },
            15,
            "malformed commit magic, and later commits lie behind it",
        ),
        (
            "a missing file",
            |machine, logs| machine.files.take(&logs[1]),
            7,
            "the commits from 7 to 12 are missing",
        ),
        (
            "missing commits",
            |machine, logs| {
                change(machine, &logs[1], |bytes| {
                    let (from, to) = (places(bytes)[2], places(bytes)[3]);
                    bytes.drain(from..to);
                });
            },
            9,
            "commit 10 lies in its place",
        ),
        (
            "the header of a file in the middle",
            |machine, logs| change(machine, &logs[1], |bytes| bytes[20] ^= 1),
            7,
            "the header of its file 0000000000000007.log is unreadable: malformed log file checksum",
        ),
        (
            "the header of the last file",
            |machine, logs| change(machine, &logs[2], |bytes| bytes[0] ^= 1),
            13,
            "the header of its file 000000000000000d.log is unreadable: malformed log file magic",
        ),
        (
            "a file of another shard",
            |machine, logs| {
                change(machine, &logs[1], |bytes| {
                    bytes[7] ^= 1;
                    seal_header(bytes);
                });
            },
            7,
            "the header of its file 0000000000000007.log is unreadable: it is of shard 2",
        ),
        (
            "a file of another history",
            |machine, logs| {
                let other = logged_in_parts(3, 5, "other", &never_settles());
                machine.files.set(&logs[1], other.files.get(&logs[1]).unwrap());
            },
            7,
            "it does not follow the commit before it (chain hash)",
        ),
    ];
    assert_eq!(opened(&logged_in_parts(3, 5, "x", &never_settles()), &never_settles()).unwrap(), 15);
    for (what, change, commit, text) in table {
        let machine = logged_in_parts(3, 5, "x", &never_settles());
        let logs = logs(&machine);
        assert_eq!(logs.len(), 3);
        change(&machine, &logs);
        assert_eq!(damaged_at(&machine), (commit, text.to_owned()), "{what}");
    }
    // A commit of another history, whole and with the right number.
    let machine = logged(5, "x", &never_settles());
    let log = logs(&machine).remove(0);
    change(&machine, &log, |bytes| {
        let places = places(bytes);
        let before = CommitId { number: 3, chain: crate::ChainHash([1; 16]) };
        let (_, foreign) = commit::encode(before, 0, b"");
        bytes.splice(places[3]..places[4], foreign);
    });
    assert_eq!(damaged_at(&machine), (4, "it does not follow the commit before it (chain hash)".to_owned()));
}

#[test]
fn files_that_were_begun_again_and_void_ends_are_told_from_damage() {
    // Opened again and again without a commit: a file of the same name each time but for the epoch record.
    let machine = logged(3, "x", &never_settles());
    for _ in 0..5 {
        assert_eq!(opened(&machine, &never_settles()).unwrap(), 3);
    }
    // The header of a last file that holds nothing.
    let machine = logged(3, "x", &never_settles());
    for bytes in [vec![], vec![0; 10], vec![0; HEADER_BYTES], vec![7; HEADER_BYTES]] {
        machine.files.set(&journal::name(5), bytes.clone());
        let machine = machine.after_kill();
        assert_eq!(opened(&machine, &never_settles()).unwrap(), 3);
        // The same, when it is in the middle by now.
        let open = machine.open(&never_settles()).unwrap();
        open.abandon();
        assert_eq!(opened(&machine, &never_settles()).unwrap(), 3);
    }
    // Behind it in the log, a whole commit that was refused.
    let machine = logged(3, "x", &never_settles());
    machine.files.set(&journal::name(4), Vec::new());
    machine.files.take("tip");
    assert_eq!(opened(&machine, &never_settles()).unwrap(), 3, "it was never begun again: it is there");
    // A void end, followed by the file that made it void.
    for torn in [0, 1, 40] {
        let machine = logged(4, "x", &never_settles());
        let longer = logged(4, "y", &never_settles());
        let log = logs(&machine).remove(0);
        let bytes = machine.files.get(&log).unwrap();
        let at = places(&bytes)[4];
        let before = Header::decode(&bytes[places(&bytes)[3]..]).unwrap();
        // Its first commit is 5, as that of the refused record 4.
        let mut next = longer.files.get(&log).unwrap()[..HEADER_BYTES].to_vec();
        next[8..16].copy_from_slice(&5u64.to_be_bytes());
        next[16..32].copy_from_slice(&before.id.chain.0);
        seal_header(&mut next);
        let mut body = Vec::new();
        append(1, 4, "real").encode(&mut body);
        let (id, commit) = commit::encode(before.id, 1, &body);
        assert_eq!(id.number, 5);
        next.extend_from_slice(&commit);
        machine.files.take("tip");
        machine.files.set(&journal::name(5), next);
        change(&machine, &log, |bytes| bytes.truncate(bytes.len() - torn));
        assert!(at < bytes.len());
        let open = machine.open(&never_settles()).unwrap();
        let records = open.reader.records(conversation(1), seq(1), seq(99), ALL).unwrap();
        assert_eq!(records.last().unwrap().payload.as_ref(), b"real");
        open.abandon();
        assert_eq!(opened(&machine, &never_settles()).unwrap(), 4);
    }
}

#[test]
fn the_level_process_may_lose_its_end_in_a_power_cut_and_never_otherwise() {
    let process = StoreOptions { durability: Durability::Process, ..never_settles() };
    for reopen_as in [Durability::Process, Durability::Power] {
        let options = StoreOptions { durability: reopen_as, ..process.clone() };
        for lost in [1, 50, 200, 400] {
            let machine = logged(20, "x", &process);
            let log = logs(&machine).remove(0);
            change(&machine, &log, |bytes| {
                // Some of the end is missing, with something intact behind it.
                let (at, end) = (places(bytes)[10], places(bytes)[12]);
                if lost == 400 { bytes[at..end].fill(0) } else { bytes.truncate(bytes.len() - lost) }
            });
            assert!(matches!(opened(&machine, &options), Err(OpenError::Damaged { .. })), "the same start");
            change(&machine, &log, |bytes| {
                bytes[32] ^= 1;
                seal_header(bytes);
            });
            let open = machine.open(&options).unwrap();
            let left = open.reader.head(conversation(1)).unwrap().unwrap().seq.get();
            assert!((5..20).contains(&left), "{left}");
            open.abandon();
            // What the tip said before is no longer asked for, however soon it is opened again.
            let mut again = vec![machine];
            if reopen_as == Durability::Power {
                // From here on nothing is lost any more.
                let cut = again[0].after_power_cut(i64::MAX, &mut Chance::new(lost as u64));
                again.push(cut);
            }
            for machine in again {
                assert_eq!(opened(&machine, &options).unwrap(), left);
            }
        }
    }
}

#[test]
fn damage_in_what_is_settled_of_the_last_file_is_in_nobodys_way() {
    let machine = logged(10, "x", &never_settles());
    // Settled, and killed before the log file was removed.
    let kept = logs(&machine).remove(0);
    let bytes = machine.files.get(&kept).unwrap();
    machine.open(&never_settles()).unwrap().close().unwrap();
    for log in logs(&machine) {
        machine.files.take(&log);
    }
    let mut damaged = bytes;
    let at = places(&damaged)[4] + 80;
    damaged[at] ^= 1;
    machine.files.set(&kept, damaged);
    // The last settled one is the epoch record of the second opening.
    assert_eq!(opened(&machine, &never_settles()).unwrap(), 10);
}

// ---- what is settled

/// A machine with ten settled records in each of `segments` segments, which are not merged.
fn settled(segments: u64) -> Machine {
    let machine = Machine::new();
    for part in 0..segments {
        let mut open = machine.open(&never_settles()).unwrap();
        for n in 1..=10 {
            commit(&mut open, part * 10 + n, "settled");
        }
        open.close().unwrap();
    }
    machine
}

fn segments(machine: &Machine) -> Vec<String> {
    machine.files.names().into_iter().filter(|name| name.ends_with(".seg")).collect()
}

#[test]
fn a_manifest_or_segment_that_is_not_the_right_one_is_refused() {
    type Change = fn(&Machine);
    let table: [(&str, Change, &str); 6] = [
        ("a missing manifest", |machine| machine.files.take("manifest"), "are missing"),
        (
            "an older manifest",
            |machine| machine.files.set("manifest", settled(2).files.get("manifest").unwrap()),
            "are missing",
        ),
        (
            "a damaged manifest",
            |machine| change(machine, "manifest", |bytes| bytes[30] ^= 1),
            "the manifest is damaged",
        ),
        ("a missing segment", |machine| machine.files.take(&segments(machine)[1]), "can't be used"),
        (
            "a segment of another shard",
            |machine| {
                let files = crate::files::memory::MemoryFiles::default();
                let other = fulmar_protocol::id::ShardId::new(9).unwrap();
                let writer = crate::segment::SegmentWriter::create(&files, other, 1).unwrap();
                writer.finish(1..=9).unwrap();
                let file = crate::files::Files::open(&files, &crate::segment::name(1)).unwrap();
                let mut bytes = vec![0; file.len().unwrap() as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                machine.files.set(&segments(machine)[1], bytes);
            },
            "can't be used",
        ),
        (
            "one segment in the place of another",
            |machine| {
                let first = machine.files.get(&segments(machine)[0]).unwrap();
                machine.files.set(&segments(machine)[1], first);
            },
            "can't be used",
        ),
    ];
    assert_eq!(opened(&settled(3), &never_settles()).unwrap(), 30);
    for (what, change, text) in table {
        let machine = settled(3);
        machine.files.set("00000000000000ff.seg", b"an orphan".to_vec());
        change(&machine);
        let before = machine.files.names();
        let refused = opened(&machine, &never_settles()).unwrap_err();
        assert!(refused.to_string().contains(text), "{what}: {refused}");
        assert_eq!(machine.files.names(), before, "{what}: nothing was removed");
    }
    let machine = settled(3);
    machine.files.set("00000000000000ff.seg", b"an orphan".to_vec());
    assert_eq!(opened(&machine, &never_settles()).unwrap(), 30);
    assert!(!segments(&machine).contains(&"00000000000000ff.seg".to_owned()), "removed when all is proven");
}

#[test]
fn damaged_runs_are_never_served_and_the_rest_is() {
    let machine = settled(3);
    let name = segments(&machine)[1].clone();
    let whole = machine.files.get(&name).unwrap();
    let mut refused = 0;
    for at in (0..whole.len()).step_by(17) {
        let machine = machine.after_kill();
        change(&machine, &name, |bytes| bytes[at] ^= 0x10);
        let Ok(open) = machine.open(&never_settles()) else {
            refused += 1;
            continue;
        };
        match open.reader.records(conversation(1), seq(1), seq(30), ALL) {
            Ok(records) => {
                assert_eq!(records.len(), 30);
                assert!(records.iter().all(|record| record.payload.as_ref() == b"settled"));
            }
            Err(ReadError::Damaged { seq: Some(first), .. }) => {
                refused += 1;
                assert_eq!(first, seq(11), "byte {at}");
                assert_eq!(open.reader.records(conversation(1), seq(1), seq(10), ALL).unwrap().len(), 10);
                assert_eq!(open.reader.records(conversation(1), seq(21), seq(30), ALL).unwrap().len(), 10);
            }
            Err(error) => panic!("byte {at}: {error}"),
        }
        open.abandon();
    }
    assert!(refused > 10, "{refused}");
}

#[test]
fn an_index_that_is_not_at_the_manifest_is_brought_there_or_made_again() {
    let stages: Vec<Machine> = (0..=4).map(settled).collect();
    let last = &stages[4];
    for (n, stage) in stages.iter().enumerate() {
        // One step behind, far behind, not there at all.
        let mut machine = last.after_kill();
        machine.engines =
            stage.engines.after_power_cut(machine.files.power().clone(), Fate::Whole, &mut Chance::new(1));
        assert_eq!(opened(&machine, &never_settles()).unwrap(), 40, "behind: {n}");
        // Ahead.
        let mut machine = stage.after_kill();
        machine.engines =
            last.engines.after_power_cut(machine.files.power().clone(), Fate::Whole, &mut Chance::new(1));
        assert_eq!(opened(&machine, &never_settles()).unwrap(), n as u64 * 10, "ahead of {n}");
    }
    // Of another history, of the same length.
    let mut machine = Machine::new();
    for part in 0..4 {
        let mut open = machine.open(&never_settles()).unwrap();
        for n in 1..=10 {
            commit(&mut open, part * 10 + n, "another");
        }
        open.close().unwrap();
    }
    machine.engines = last.after_kill().engines;
    let open = machine.open(&never_settles()).unwrap();
    let records = open.reader.records(conversation(1), seq(1), seq(99), ALL).unwrap();
    assert!(records.len() == 40 && records.iter().all(|record| record.payload.as_ref() == b"another"));
    open.abandon();
    // Garbage, with and without a mark that can be read, below settled commits and below none.
    use crate::{engine::Engine, key::Table};
    for stage in [&stages[0], last] {
        for garble_mark in [false, true] {
            let machine = stage.after_kill();
            let engine = machine.engines.engine();
            for table in Table::ALL {
                for n in 0..5u64 {
                    engine.insert(table, &n.to_be_bytes(), b"garbage").unwrap();
                }
            }
            if garble_mark {
                engine.insert(Table::Shard, b"applied", b"garbage").unwrap();
                let want = if std::ptr::eq(stage, last) { 40 } else { 0 };
                assert_eq!(opened(&machine, &never_settles()).unwrap(), want);
                let engine = machine.engines.engine();
                assert_eq!(engine.get(Table::Member, &1u64.to_be_bytes()).unwrap(), None, "made again");
            }
        }
    }
}

/// Whatever is there of a closed folder is needed: a file that goes missing from it is always noticed.
#[test]
fn a_merge_that_closing_cut_short_leaves_no_file() {
    // More than a merge writes in a few steps.
    let payload = "x".repeat(16_000);
    let machine = Machine::new();
    for part in 0..8 {
        let mut open = machine.open(&StoreOptions { segment_bytes_max: 1, ..never_settles() }).unwrap();
        let batch: Vec<_> = (1..=40).map(|n| append(1, part * 40 + n, payload.clone())).collect();
        open.commit(&batch).unwrap();
        open.close().unwrap();
    }
    let before = segments(&machine).len();
    // At one byte a second it is begun, and waits.
    let slowly = StoreOptions {
        settle_bytes: 1 << 30,
        segment_bytes_max: 1 << 40,
        background_bytes_per_second: 1,
        ..never_settles()
    };
    let open = machine.open(&slowly).unwrap();
    until("the beginning of a merge", || segments(&machine).len() > before);
    open.close().unwrap();
    let named = Manifest::load(&machine.files, shard_id()).unwrap().segments;
    let named: Vec<_> = named.iter().map(|entry| crate::segment::name(entry.id)).collect();
    assert_eq!(segments(&machine), named);
}

/// Cuts the power at every operation of a merge.
#[test]
fn a_merge_that_is_cut_off_anywhere_is_gone_on_with() {
    let mut chance = Chance::new(7);
    // Eight segments with records, rows and marks in them; the ninth opening merges them.
    let machine = Machine::new();
    let mut model = Model::default();
    for _ in 0..8 {
        let mut open = machine.open(&StoreOptions { segment_bytes_max: 1, ..never_settles() }).unwrap();
        for _ in 0..4 {
            open.commit(&model.batch(&mut chance)).unwrap();
        }
        open.close().unwrap();
    }
    let merges = StoreOptions { settle_bytes: 1 << 30, segment_bytes_max: 1 << 40, ..never_settles() };
    let mut operations = 0;
    let mut cut = 0;
    loop {
        let machine = machine.after_kill();
        machine.files.power().allow(operations);
        let mut merged = false;
        if let Ok(open) = machine.open(&merges) {
            until("the merge", || {
                merged = open.shard.stats().merges > 0;
                merged || machine.files.power().is_off()
            });
            open.abandon();
        }
        cut += u64::from(!merged);
        for _ in 0..2 {
            let machine = machine.after_power_cut(i64::MAX, &mut chance);
            let open = machine.open(&merges).unwrap_or_else(|error| panic!("{operations}: {error}"));
            let found =
                Model::read_back(&open, &mut chance).unwrap_or_else(|error| panic!("{operations}: {error}"));
            assert!(found == model, "{operations}: {}", found.difference(&model));
            until("the merge", || open.shard.stats().segments <= 2);
            let found =
                Model::read_back(&open, &mut chance).unwrap_or_else(|error| panic!("{operations}: {error}"));
            assert!(found == model, "{operations}, merged: {}", found.difference(&model));
            open.abandon();
            assert!(segments(&machine).len() <= 3, "inputs are removed");
        }
        if merged {
            break;
        }
        operations += 1;
    }
    // Opening, writing and moving: how many there are in all depends on when the other thread has its turn.
    assert!(cut > 10, "{cut} operations");
    assert_eq!(shard_id(), machine.open(&merges).unwrap().reader.shard());
}

//! Damage of every kind in every file, and rows that contradict each other.

use super::*;
use crate::{
    engine::Engine,
    files::disk::Disk,
    key::{Key, Table},
    maintain::verify::Repair,
    row::{Head, LaneState, Number, Row},
    segment::{self, SegmentWriter},
    shard::{
        manifest::{Entry, Manifest},
        view::{open_row, seal_row},
    },
    store::engine_opener,
};

fn made(rounds: u64, close: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), EngineKind::Sled, rounds, close);
    folder
}

/// Damages a copy of the folder, and gives what was found.
fn after(original: &Path, damage: impl FnOnce(&Path)) -> Vec<Problem> {
    let folder = tempfile::tempdir().unwrap();
    copy(original, folder.path());
    damage(folder.path());
    problems(folder.path())
}

fn file_of(path: &Path) -> String {
    format!("shard-001/{}", path.file_name().unwrap().to_string_lossy())
}

#[test]
fn a_flipped_byte_is_found_in_its_file_wherever_it_lies() {
    let original = made(45, false);
    let shard = original.path().join("shard-001");
    let last_log = files_of(&shard, ".log").pop().unwrap();
    // Not those of a merge that was interrupted.
    let manifest = Manifest::load(&Disk::new(&shard), super::shard(1)).unwrap();
    let segments: Vec<PathBuf> =
        manifest.segments.iter().map(|entry| shard.join(segment::name(entry.id))).collect();
    assert!(segments.len() > 1);
    let mut files = vec![shard.join("manifest"), last_log];
    files.extend(segments);
    for file in files {
        let length = written(&file);
        for n in 0..12 {
            let at = if n == 11 { length - 1 } else { n * length / 11 + n };
            let name = file.file_name().unwrap();
            let found = after(original.path(), |path| flip(&path.join("shard-001").join(name), at));
            assert!(
                found.iter().any(|problem| problem.file == file_of(&file) && problem.repair == Repair::No),
                "byte {at} of {name:?}: {found:#?}"
            );
            assert!(found.iter().all(|problem| problem.shard == Some(1)), "{found:#?}");
        }
    }
}

#[test]
fn a_damaged_record_is_told_with_its_place_and_nothing_else_is() {
    let original = made(45, true);
    let shard = original.path().join("shard-001");
    let manifest = Manifest::load(&Disk::new(&shard), super::shard(1)).unwrap();
    let file = &shard.join(segment::name(manifest.segments.last().unwrap().id));
    let found =
        after(original.path(), |path| flip(&path.join("shard-001").join(file.file_name().unwrap()), 100));
    let [problem] = found.as_slice() else { panic!("{found:#?}") };
    assert_eq!((problem.file.clone(), problem.conversation), (file_of(file), Some(conversation(1, 1))));
    let (first, last) = problem.seqs.unwrap();
    assert!(first > Seq::ZERO && first <= last && last <= seq(180), "{problem:?}");
}

#[test]
fn files_that_are_gone_or_cut_off_are_missed() {
    let original = made(45, false);
    let shard = original.path().join("shard-001");
    let manifest = Manifest::load(&Disk::new(&shard), super::shard(1)).unwrap();
    let segment = shard.join(segment::name(manifest.segments[0].id));
    let log = files_of(&shard, ".log").pop().unwrap();
    let gone = |name: &Path| {
        let name = name.file_name().unwrap().to_owned();
        after(original.path(), |path| fs::remove_file(path.join("shard-001").join(name)).unwrap())
    };
    let at = |found: &[Problem], file: &Path| {
        assert!(found.iter().any(|problem| problem.file == file_of(file)), "{found:#?}");
    };
    at(&gone(&segment), &segment);
    let found = gone(&log);
    assert!(found.iter().any(|problem| problem.what.contains("acknowledged")), "{found:#?}");
    for file in [&segment, &log, &shard.join("manifest")] {
        let name = file.file_name().unwrap();
        let found = after(original.path(), |path| {
            let path = path.join("shard-001").join(name);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..written(&path) - 3]).unwrap();
        });
        at(&found, file);
    }
    let found = after(original.path(), |path| fs::remove_dir_all(path.join("shard-001")).unwrap());
    assert_eq!((found.len(), found[0].file.as_str()), (1, "shard-001"));
    // Without a manifest, and with no log from the first commit on, the rest says nothing.
    let closed = made(45, true);
    let found = after(closed.path(), |path| fs::remove_file(path.join("shard-001/manifest")).unwrap());
    at(&found, &shard.join("manifest"));
    // The tip may be gone: it is never synced. Of two slots one is enough.
    let folder = tempfile::tempdir().unwrap();
    copy(original.path(), folder.path());
    flip(&folder.path().join("shard-001/tip"), 5);
    let found = problems(folder.path());
    assert_eq!((found.len(), found[0].file.as_str(), found[0].repair), (1, "shard-001/tip", Repair::Start));
    fs::remove_file(folder.path().join("shard-001/tip")).unwrap();
    sound(folder.path());
    fs::write(folder.path().join("FORMAT"), "fulmar data folder\nformat = 2\n").unwrap();
    assert!(verify(folder.path(), &mut |_| {}).unwrap_err().to_string().contains("FORMAT"));
}

fn with_engine(path: &Path, change: impl FnOnce(&dyn Engine)) {
    let opener = engine_opener(&path.join("shard-001"), &options(EngineKind::Sled));
    let engine = opener(false).unwrap();
    change(engine.as_ref());
    engine.barrier().unwrap();
}

#[test]
fn an_index_that_is_not_what_it_must_be_is_told_row_by_row() {
    let original = made(45, true);
    let head = Key::conversation(conversation(1, 2));
    let index = |found: &[Problem], table: &str, what: &str| {
        let [problem] = found else { panic!("{found:#?}") };
        assert_eq!((problem.file.as_str(), problem.repair), ("shard-001/index", Repair::Index));
        assert!(problem.what.contains(table) && problem.what.contains(what), "{problem:?}");
    };
    let changed = |change: &dyn Fn(&dyn Engine)| after(original.path(), |path| with_engine(path, change));
    let found = changed(&|engine| {
        let value = engine.get(Table::Head, head.as_ref()).unwrap().unwrap();
        let row = open_row(Table::Head, head.as_ref(), &value).unwrap();
        let stale = Head { count: 1, ..Head::from_row(&row).unwrap() };
        engine
            .insert(Table::Head, head.as_ref(), &seal_row(Table::Head, head.as_ref(), &stale.to_row()))
            .unwrap();
    });
    index(&found, "head", "not the newest");
    assert_eq!(found[0].conversation, Some(conversation(1, 2)));
    index(&changed(&|engine| engine.remove(Table::Head, head.as_ref()).unwrap()), "head", "missing");
    index(
        &changed(&|engine| engine.insert(Table::Head, head.as_ref(), b"xxxxxx").unwrap()),
        "head",
        "damaged",
    );
    let extra = Key::conversation(conversation(1, 77));
    index(
        &changed(&|engine| engine.insert(Table::Head, extra.as_ref(), b"x").unwrap()),
        "head",
        "must not be",
    );
    let runs = |engine: &dyn Engine| {
        let all =
            engine.scan(Table::Run, &[], None, crate::engine::Direction::Ascending, usize::MAX).unwrap();
        all.into_iter().next_back().unwrap()
    };
    index(
        &changed(&|engine| engine.remove(Table::Run, &runs(engine).0).unwrap()),
        "run",
        "no row for the run",
    );
    let found = changed(&|engine| {
        let (key, value) = runs(engine);
        let row = open_row(Table::Run, &key, &value).unwrap();
        let mut other = row.to_vec();
        *other.last_mut().unwrap() ^= 1;
        engine.insert(Table::Run, &key, &seal_row(Table::Run, &key, &other)).unwrap();
    });
    assert!(found.iter().any(|problem| problem.what.contains("no such run")), "{found:#?}");
    assert!(found.iter().all(|problem| problem.repair == Repair::Index));
    // One of another history, or none: the next start makes it.
    let found = changed(&|engine| engine.remove(Table::Shard, b"applied").unwrap());
    assert_eq!((found.len(), found[0].repair), (1, Repair::Start));
    let folder = tempfile::tempdir().unwrap();
    copy(original.path(), folder.path());
    fs::remove_dir_all(folder.path().join("shard-001/index")).unwrap();
    assert!(!sound(folder.path()).shards[1].index_compared);
    crate::engine::place::forget(&folder.path().join("shard-000/index")).unwrap();
    assert!(!sound(folder.path()).shards[0].index_compared, "one that was copied is not used");
    assert!(folder.path().join("shard-000/index/db").exists());
}

/// A shard of one segment with these records and rows, which need not make sense.
fn of_one_segment(records: &[u64], rows: &[(Table, Key, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions { shards: 1, ..options(EngineKind::Sled) };
    Store::open(folder.path(), &options).unwrap().close().unwrap();
    let at = folder.path().join("shard-000");
    for file in files_of(&at, "") {
        if file.is_dir() { fs::remove_dir_all(file).unwrap() } else { fs::remove_file(file).unwrap() }
    }
    let files = Disk::new(&at);
    let mut writer = SegmentWriter::create(&files, shard(0), 1).unwrap();
    let c = conversation(0, 1);
    for n in records {
        let mut bytes = Vec::new();
        record(c, *n).encode(c, &mut bytes);
        writer.record(c, seq(*n), time(*n), &bytes).unwrap();
    }
    let mut rows: Vec<_> =
        rows.iter().map(|(table, key, row)| (*table as u8, key.as_ref().to_vec(), row)).collect();
    rows.sort();
    for (table, key, row) in rows {
        writer.row(table, &key, Some(row)).unwrap();
    }
    let summary = writer.finish(1..=1).unwrap();
    let mut manifest = Manifest::default().next();
    manifest.settled.number = 1;
    manifest.next_segment = 2;
    manifest.segments.push(Entry::new(&summary, 1, Vec::new()));
    manifest.store(&files, shard(0)).unwrap();
    folder
}

fn head_row(last: u64) -> (Table, Key, Vec<u8>) {
    let head = Head { seq: seq(last), count: last, time: time(last), ..Head::default() };
    (Table::Head, Key::conversation(conversation(0, 1)), head.to_row())
}

fn lane_rows(last: u64) -> Vec<(Table, Key, Vec<u8>)> {
    let lane = |sender: u64| {
        let mut lane = LaneState::default();
        for n in (1..=last).filter(|n| 1 + n % 3 == sender) {
            lane.note(Epoch::FIRST, Pseq::new(n).unwrap(), seq(n));
        }
        (Table::Lane, Key::lane(conversation(0, 1), user(0, sender), DeviceId::FIRST), lane.to_row())
    };
    (1..=3).map(lane).collect()
}

/// Records 1 to 9 with all that belongs to them, and then some rows instead or more.
fn nine_with(more: Vec<(Table, Key, Vec<u8>)>) -> tempfile::TempDir {
    let mut rows = lane_rows(9);
    rows.push(head_row(9));
    for row in more {
        rows.retain(|(table, key, _)| (*table, key) != (row.0, &row.1));
        rows.push(row);
    }
    of_one_segment(&(1..=9).collect::<Vec<_>>(), &rows)
}

#[test]
fn rows_and_records_that_contradict_each_other_are_found() {
    sound(nine_with(Vec::new()).path());
    let c = conversation(0, 1);
    let one = |folder: &tempfile::TempDir, what: &str| {
        let found = problems(folder.path());
        let [problem] = found.as_slice() else { panic!("{found:#?}") };
        assert!(problem.what.contains(what) && problem.repair == Repair::No, "{problem:?}");
        found[0].clone()
    };
    let gap = |records: &[u64]| {
        let mut rows = lane_rows(9);
        rows.push(head_row(9));
        of_one_segment(records, &rows)
    };
    let missing = one(&gap(&[1, 2, 3, 6, 7, 8, 9]), "records are missing");
    assert_eq!((missing.conversation, missing.seqs), (Some(c), Some((seq(4), seq(5)))));
    assert_eq!(one(&gap(&[3, 4, 5, 6, 7, 8, 9]), "missing").seqs, Some((seq(1), seq(2))));
    assert_eq!(one(&gap(&[1, 2, 3, 4, 5, 6]), "missing at the end").seqs, Some((seq(7), seq(9))));
    let none = one(&gap(&[]), "missing at the end");
    assert_eq!(none.seqs, Some((seq(1), seq(9))));
    let head = |change: &dyn Fn(&mut Head)| {
        let mut head = Head { seq: seq(9), count: 9, time: time(9), ..Head::default() };
        change(&mut head);
        nine_with(vec![(Table::Head, Key::conversation(c), head.to_row())])
    };
    assert_eq!(one(&head(&|head| head.seq = seq(8)), "after its head").seqs, Some((seq(9), seq(9))));
    one(&head(&|head| head.count = 8), "count and time");
    one(&head(&|head| head.time = time(8)), "count and time");
    one(&head(&|head| head.members = 2), "2 members, there are 0");
    sound(head(&|head| (head.low, head.low_count) = (seq(4), 4)).path());
    let member = Member { role: Role::Member, joined: seq(1), since: time(1) };
    let row = (Table::Member, Key::conversation_user(c, user(0, 7)), member.to_row());
    one(&nine_with(vec![row]), "0 members, there are 1");
    let lane = |row: LaneState| {
        nine_with(vec![(Table::Lane, Key::lane(c, user(0, 1), DeviceId::FIRST), row.to_row())])
    };
    one(&lane(LaneState::default()), "the lane of user");
    sound(lane(LaneState { epoch: Epoch::new(2).unwrap(), ..LaneState::default() }).path());
    let orphan = of_one_segment(&[1, 2, 3], &lane_rows(3));
    one(&orphan, "its head is missing");
    one(&of_one_segment(&[1, 2], &[head_row(2), lane_rows(2).remove(1)]), "is missing");

    let app = AppId::of("demo");
    let alice = User { app, name: "alice".to_owned(), created: time(1) };
    let name = |number: u64| (Table::Name, Key::name(app, 0, "alice"), Number(number).to_row());
    let row = (Table::User, Key::user(user(0, 1)), alice.to_row());
    sound(nine_with(vec![name(user(0, 1).get()), row.clone()]).path());
    one(&nine_with(vec![row.clone()]), "not found by its name");
    one(&nine_with(vec![name(user(0, 1).get())]), "which is not there");
    let found = problems(nine_with(vec![name(user(0, 2).get()), row]).path());
    assert!(found.iter().any(|problem| problem.what.contains("leads to")), "{found:#?}");

    let device = Device {
        uid: DeviceUid([7; 16]),
        class: DeviceClass::Phone,
        epoch: Epoch::FIRST,
        class_epoch: Default::default(),
        seen: time(1),
    };
    let row = (Table::Device, Key::device(user(0, 1), DeviceId::FIRST), device.to_row());
    let uid = |uid: u8| (Table::Uid, Key::uid(user(0, 1), DeviceUid([uid; 16])), Number(1).to_row());
    sound(nine_with(vec![row.clone(), uid(7)]).path());
    one(&nine_with(vec![row.clone()]), "not found by its uid");
    one(&nine_with(vec![row, uid(7), uid(8)]), "which is another");
    let elsewhere = (Table::User, Key::user(user(1, 1)), alice.to_row());
    let found = problems(nine_with(vec![elsewhere]).path());
    assert!(found.iter().any(|problem| problem.what.contains("another shard")), "{found:#?}");
    one(
        &nine_with(vec![(Table::Read, Key::conversation_user(c, user(0, 1)), vec![9])]),
        "malformed number row",
    );
    assert_eq!(segment::name(1), "0000000000000001.seg");
}

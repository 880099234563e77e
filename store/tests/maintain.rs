//! Whole data folders on a real disk, through the public API: another engine, compacted, copied while in use, read-only, and
//! under a clock that goes backwards. Whatever interrupts it, nothing that was committed changes.

#![expect(clippy::unwrap_used, reason = "a test fails loudly")]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};
use fulmar_store::{
    EngineKind, Limits, MaintainError, Member, Op, OpenError, Progress, Record, RecordKind, Role,
    ShardWriter, Store, StoreOptions, compact, migrate, upgrade,
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };
const SHARDS: u16 = 2;
const CONVERSATIONS: u64 = 4;
const BOTH: [EngineKind; 2] = [EngineKind::Sled, EngineKind::Fjall];

fn shard(n: u16) -> ShardId {
    ShardId::new(n).unwrap()
}

fn conversation(shard_number: u16, local: u64) -> ConversationId {
    ConversationId::new(shard(shard_number).number(local).unwrap()).unwrap()
}

fn user(local: u64) -> UserId {
    UserId::new(shard(0).number(local).unwrap()).unwrap()
}

fn seq(n: u64) -> Seq {
    Seq::new(n).unwrap()
}

/// The clock goes backwards every now and then.
fn record(n: u64) -> Record {
    Record {
        seq: seq(n),
        kind: RecordKind::Message,
        sender: user(1),
        device: DeviceId::FIRST,
        epoch: Epoch::FIRST,
        pseq: Pseq::new(n).unwrap(),
        time: UnixMillis::new(1_700_000_000_000 + n - n / 7 * 10_000_000).unwrap(),
        count: n,
        target: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: Bytes::from(vec![u8::try_from(n % 251).unwrap(); usize::try_from(n * 97 % 700).unwrap()]),
    }
}

/// Settles often, so that there are many segments; nothing merges them meanwhile.
fn options(engine: EngineKind) -> StoreOptions {
    StoreOptions {
        shards: SHARDS,
        engine,
        settle_bytes: 20_000,
        settle_commits: 6,
        segment_bytes_max: 1,
        ..StoreOptions::default()
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn commit(writer: &mut ShardWriter, batch: &[Op]) {
    block_on(writer.commit(batch)).unwrap();
}

/// Records, members that come and go, cursors, and retention; the end is in the log only.
fn fill(path: &Path, engine: EngineKind) {
    let store = Store::open(path, &options(engine)).unwrap();
    for n in 0..SHARDS {
        let (mut writer, _) = store.shard(shard(n)).unwrap();
        for round in 0..30u64 {
            let mut batch = Vec::new();
            for local in 1..=CONVERSATIONS {
                let c = conversation(n, local);
                batch.extend((1..=5).map(|i| Op::Append { conversation: c, record: record(round * 5 + i) }));
                let row = Member { role: Role::Member, joined: Seq::FIRST, since: UnixMillis::default() };
                batch.push(Op::Member { conversation: c, user: user(round + 1), row: Some(row) });
                if round > 3 {
                    batch.push(Op::Member { conversation: c, user: user(round - 2), row: None });
                }
                batch.push(Op::Read { conversation: c, user: user(1), seq: seq(round * 5 + 1) });
                if local == 2 && round % 8 == 7 {
                    batch.push(Op::Low { conversation: c, low: seq(round * 4), count: round * 4 });
                }
            }
            commit(&mut writer, &batch);
        }
    }
    drop(store);
    let later = StoreOptions { settle_commits: 1_000, settle_bytes: 1 << 20, ..options(engine) };
    let store = Store::open(path, &later).unwrap();
    let (mut writer, _) = store.shard(shard(1)).unwrap();
    commit(&mut writer, &[Op::Append { conversation: conversation(1, 1), record: record(151) }]);
}

/// Everything a reader can see of a folder.
fn look(path: &Path, engine: EngineKind) -> Result<String, OpenError> {
    use std::fmt::Write;
    let options = StoreOptions { settle_commits: 1_000, settle_bytes: 1 << 20, ..options(engine) };
    let store = Store::open(path, &options)?;
    let mut seen = String::new();
    for n in 0..store.shards() {
        let reader = store.reader(shard(n)).unwrap();
        for local in 1..=CONVERSATIONS {
            let c = conversation(n, local);
            let records = reader.records(c, Seq::FIRST, seq(9_999), ALL).unwrap();
            assert!(records.iter().all(|found| *found == record(found.seq.get())));
            let seqs: Vec<u64> = records.iter().map(|found| found.seq.get()).collect();
            writeln!(seen, "{c} {:?} {seqs:?}", reader.head(c).unwrap()).unwrap();
            writeln!(seen, "{:?}", reader.members(c, None, 99).unwrap()).unwrap();
            writeln!(seen, "{:?}", reader.read_cursor(c, user(1)).unwrap()).unwrap();
            writeln!(seen, "{:?}", reader.lane(c, user(1), DeviceId::FIRST).unwrap()).unwrap();
        }
    }
    Ok(seen)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let Ok(entry) = entry else { continue };
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            // It may be gone by now, as for `cp -r`.
            let _ = fs::copy(entry.path(), target);
        }
    }
}

fn other(engine: EngineKind) -> EngineKind {
    if engine == EngineKind::Sled { EngineKind::Fjall } else { EngineKind::Sled }
}

fn engine_of(path: &Path) -> EngineKind {
    let marker = fs::read_to_string(path.join("FORMAT")).unwrap();
    EngineKind::from_name(marker.lines().find_map(|line| line.strip_prefix("engine = ")).unwrap()).unwrap()
}

/// Folders beside `index` that a finished work has no use for.
fn leftovers(path: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for n in 0..SHARDS {
        for entry in fs::read_dir(path.join(format!("shard-{n:03}"))).unwrap() {
            let name = entry.unwrap().file_name().to_string_lossy().into_owned();
            if name.starts_with("index.") {
                found.push(name);
            }
        }
    }
    found
}

#[test]
fn the_engine_is_changed_there_and_back() {
    for from in BOTH {
        let folder = tempfile::tempdir().unwrap();
        fill(folder.path(), from);
        let before = look(folder.path(), from).unwrap();
        let error = Store::open(folder.path(), &options(other(from))).unwrap_err();
        let want = format!(
            "change it with `fulmar store migrate --to {}`, or set the engine to {:?}",
            other(from).name(),
            from.name()
        );
        assert!(error.to_string().ends_with(&want), "{error}");
        for to in [other(from), from] {
            let mut done = Vec::new();
            let report = migrate(folder.path(), to, &mut |progress| done.push(progress)).unwrap();
            assert_eq!((report.from.as_str(), report.to.as_str()), (other(to).name(), to.name()));
            assert!(report.rows > 100 && report.segment_bytes > 0, "{report:?}");
            assert!(report.index_bytes_before > 0 && report.index_bytes_after > 0, "{report:?}");
            assert!(done.iter().all(|progress| progress.done <= progress.of), "{done:?}");
            assert_eq!(leftovers(folder.path()), [""; 0]);
            assert_eq!(look(folder.path(), to).unwrap(), before);
            // What nobody needs to do is done at once.
            let again = migrate(folder.path(), to, &mut |_| {}).unwrap();
            assert_eq!((again.rows, again.from, again.to), (0, to.name().to_owned(), to.name().to_owned()));
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    let none = migrate(&path, EngineKind::Fjall, &mut |_| {}).unwrap_err();
    assert!(matches!(none, MaintainError::NoFolder { .. }), "{none}");
    assert!(!path.exists(), "nothing was made");
    assert!(matches!(compact(&path, &mut |_| {}), Err(MaintainError::NoFolder { .. })));
    assert!(matches!(upgrade(&path, &mut |_| {}), Err(MaintainError::NoFolder { .. })));
    let store = Store::open(&path, &options(EngineKind::Sled)).unwrap();
    for busy in
        [migrate(&path, EngineKind::Fjall, &mut |_| {}).map(drop), compact(&path, &mut |_| {}).map(drop)]
    {
        assert!(matches!(busy, Err(MaintainError::Folder(OpenError::InUse { .. }))), "{busy:?}");
    }
    drop(store);
    let memory = migrate(&path, EngineKind::Memory, &mut |_| {}).unwrap_err().to_string();
    assert!(memory.contains("keeps nothing on disk"), "{memory}");
    // An empty folder has an engine as well.
    migrate(&path, EngineKind::Fjall, &mut |_| {}).unwrap();
    assert!(Store::open(&path, &options(EngineKind::Fjall)).is_ok());
}

/// Interrupts a work whenever it begins with something else, then looks at the folder, as it is or after the work was done again.
fn interrupt(work: impl Fn(&Path, &mut dyn FnMut(Progress))) {
    let original = tempfile::tempdir().unwrap();
    fill(original.path(), EngineKind::Sled);
    let before = look(original.path(), EngineKind::Sled).unwrap();
    let mut rounds = 0;
    for stop_at in 0.. {
        let folder = tempfile::tempdir().unwrap();
        copy(original.path(), folder.path());
        let mut steps = 0;
        let mut last = None;
        let ended = catch_unwind(AssertUnwindSafe(|| {
            work(folder.path(), &mut |progress| {
                let step = Some((progress.shard, progress.doing));
                if last != step {
                    last = step;
                    steps += 1;
                }
                assert!(steps <= stop_at, "interrupted");
            });
        }));
        let done = ended.is_ok();
        if stop_at % 2 == 0 {
            assert_eq!(
                look(folder.path(), engine_of(folder.path())).unwrap(),
                before,
                "stopped at {stop_at}"
            );
            assert_eq!(leftovers(folder.path()), [""; 0], "stopped at {stop_at}");
        }
        work(folder.path(), &mut |_| {});
        assert_eq!(leftovers(folder.path()), [""; 0], "stopped at {stop_at}");
        assert_eq!(look(folder.path(), engine_of(folder.path())).unwrap(), before, "stopped at {stop_at}");
        if done {
            break;
        }
        rounds += 1;
    }
    assert!(rounds > 8, "{rounds}");
}

#[test]
fn changing_the_engine_is_interrupted_at_every_step() {
    interrupt(|path, progress| {
        migrate(path, EngineKind::Fjall, progress).unwrap();
    });
}

#[test]
fn compacting_is_interrupted_at_every_step() {
    interrupt(|path, progress| {
        compact(path, progress).unwrap();
    });
}

#[test]
fn shards_that_were_finished_are_not_done_again() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), EngineKind::Sled);
    look(folder.path(), EngineKind::Sled).unwrap();
    let stop_in = |shard_number| {
        catch_unwind(AssertUnwindSafe(|| {
            migrate(folder.path(), EngineKind::Fjall, &mut |progress| {
                assert!(
                    progress.shard != shard(shard_number) || progress.doing != "making the index",
                    "stop"
                );
            })
        }))
    };
    assert!(stop_in(1).is_err());
    let report = migrate(folder.path(), EngineKind::Fjall, &mut |_| {}).unwrap();
    assert_eq!(report.shards_done_before, 1);
    // Opened in between, what was finished is of no use any more.
    assert!(
        catch_unwind(AssertUnwindSafe(|| {
            migrate(folder.path(), EngineKind::Sled, &mut |progress| {
                assert!(progress.shard != shard(1) || progress.doing != "making the index", "stop");
            })
        }))
        .is_err()
    );
    let before = look(folder.path(), EngineKind::Fjall).unwrap();
    let report = migrate(folder.path(), EngineKind::Sled, &mut |_| {}).unwrap();
    assert_eq!(report.shards_done_before, 0);
    assert_eq!(look(folder.path(), EngineKind::Sled).unwrap(), before);
}

#[test]
fn compacting_takes_what_is_dead() {
    for engine in BOTH {
        let folder = tempfile::tempdir().unwrap();
        fill(folder.path(), engine);
        let before = look(folder.path(), engine).unwrap();
        let report = compact(folder.path(), &mut |_| {}).unwrap();
        assert!(report.segments_before > 6 && report.segments_after == 2, "{report:?}");
        assert!(report.segment_bytes_after < report.segment_bytes_before, "{report:?}");
        assert!(report.rows > 50 && report.index_bytes_after > 0, "{report:?}");
        assert_eq!(look(folder.path(), engine).unwrap(), before);
        // Compact is as small as it gets; retention leaves something to take again.
        let again = compact(folder.path(), &mut |_| {}).unwrap();
        assert_eq!(again.segment_bytes_before, again.segment_bytes_after);
        {
            let store = Store::open(folder.path(), &options(engine)).unwrap();
            let (mut writer, _) = store.shard(shard(0)).unwrap();
            commit(&mut writer, &[Op::Low { conversation: conversation(0, 3), low: seq(149), count: 149 }]);
            store.close().unwrap();
        }
        let before = look(folder.path(), engine).unwrap();
        let report = compact(folder.path(), &mut |_| {}).unwrap();
        assert!(report.segment_bytes_after + 20_000 < report.segment_bytes_before, "{report:?}");
        assert_eq!(look(folder.path(), engine).unwrap(), before);
    }
}

#[test]
fn damage_is_not_carried_into_another_index() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), EngineKind::Sled);
    look(folder.path(), EngineKind::Sled).unwrap();
    let segment = fs::read_dir(folder.path().join("shard-000"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .min()
        .unwrap();
    // Behind the records: index and rows.
    let mut bytes = fs::read(&segment).unwrap();
    let at = bytes.len() - 300;
    bytes[at] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let error = migrate(folder.path(), EngineKind::Fjall, &mut |_| {}).unwrap_err();
    assert!(matches!(error, MaintainError::Damaged { .. }), "{error}");
    assert_eq!(engine_of(folder.path()), EngineKind::Sled);
    assert!(matches!(compact(folder.path(), &mut |_| {}), Err(MaintainError::Damaged { .. })));
}

#[test]
fn a_folder_of_format_1_is_upgraded_first() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1");
    for to in BOTH {
        let folder = tempfile::tempdir().unwrap();
        copy(&fixture, folder.path());
        migrate(folder.path(), to, &mut |_| {}).unwrap();
        compact(folder.path(), &mut |_| {}).unwrap();
        let store = Store::open(folder.path(), &options(to)).unwrap();
        let records =
            store.reader(shard(0)).unwrap().records(conversation(0, 1), Seq::FIRST, seq(99), ALL).unwrap();
        assert_eq!(records.len(), 40);
    }
}

// ---- copies

#[test]
fn a_copy_of_a_folder_in_use_is_right_or_refused() {
    for engine in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        // Merges, too, and settles all the time.
        let busy = StoreOptions { segment_bytes_max: 1 << 20, ..options(engine) };
        let store = Store::open(&path, &busy).unwrap();
        let acked = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        let (mut right, mut refused) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut writer, _) = store.shard(shard(0)).unwrap();
                let c = conversation(0, 1);
                let mut n = 0;
                while !stop.load(Ordering::Relaxed) {
                    let row = Member { role: Role::Member, joined: seq(n + 1), since: UnixMillis::default() };
                    let mut batch: Vec<Op> =
                        (1..=3).map(|i| Op::Append { conversation: c, record: record(n + i) }).collect();
                    batch.push(Op::Member { conversation: c, user: user(1), row: Some(row) });
                    commit(&mut writer, &batch);
                    n += 3;
                    acked.store(n, Ordering::Release);
                }
            });
            let until = Instant::now() + Duration::from_secs(3);
            let mut round = 0;
            while round < 10 || Instant::now() < until {
                round += 1;
                if round >= 40 {
                    break;
                }
                let known = acked.load(Ordering::Acquire);
                let copied = folder.path().join("copy");
                copy(&path, &copied);
                match Store::open(&copied, &options(engine)) {
                    Ok(opened) => {
                        right += 1;
                        let reader = opened.reader(shard(0)).unwrap();
                        let c = conversation(0, 1);
                        let head = reader.head(c).unwrap().unwrap_or_default().seq.get();
                        assert!(
                            head >= known && head % 3 == 0,
                            "round {round}: {head}, {known} were acknowledged"
                        );
                        let records = reader.records(c, Seq::FIRST, seq(1 << 40), ALL).unwrap();
                        assert_eq!(records.len() as u64, head);
                        assert!(records.iter().zip(1..).all(|(found, n)| *found == record(n)));
                        // A row is as new as the records beside it.
                        let members = reader.members(c, None, 9).unwrap();
                        let joined = members.first().map_or(0, |(_, member)| member.joined.get());
                        assert_eq!(joined, (head + 1).saturating_sub(3).max(u64::from(head > 0)));
                    }
                    Err(error) => {
                        refused += 1;
                        let text = error.to_string();
                        assert!(text.contains("backup"), "{text}");
                        assert!(matches!(error, OpenError::Copied { .. }), "{text}");
                        assert!(text.contains("copy it with `fulmar store backup`"), "{text}");
                    }
                }
                fs::remove_dir_all(&copied).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(right + refused >= 10, "{right} right, {refused} refused");
        eprintln!("{engine:?}: {right} copies were right, {refused} refused");
    }
}

#[test]
fn an_index_that_was_copied_is_made_again() {
    for engine in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        fill(&path, engine);
        let before = look(&path, engine).unwrap();
        let copied = folder.path().join("copy");
        copy(&path, &copied);
        // The index of another moment, which opens without a complaint.
        let empty = folder.path().join("empty");
        Store::open(&empty, &options(engine)).unwrap().close().unwrap();
        for n in 0..SHARDS {
            let index = |path: &Path| path.join(format!("shard-{n:03}/index"));
            let place = fs::read(index(&copied).join("place")).unwrap();
            fs::remove_dir_all(index(&copied)).unwrap();
            copy(&index(&empty), &index(&copied));
            fs::write(index(&copied).join("place"), place).unwrap();
        }
        assert_eq!(look(&copied, engine).unwrap(), before);
        // A folder that was moved keeps its index.
        let moved = folder.path().join("moved");
        fs::rename(&path, &moved).unwrap();
        let place = fs::metadata(moved.join("shard-000/index/place")).unwrap().created().ok();
        assert_eq!(look(&moved, engine).unwrap(), before);
        assert_eq!(fs::metadata(moved.join("shard-000/index/place")).unwrap().created().ok(), place);
    }
}

// ---- read-only

const READ_ONLY: &str = "FULMAR_STORE_TEST_READ_ONLY";

#[test]
#[ignore = "started by another test, with a read-only folder"]
fn the_child_with_a_read_only_folder() {
    let Some(path) = std::env::var_os(READ_ONLY) else { return };
    let error = Store::open(&path, &options(EngineKind::Sled)).unwrap_err();
    let maintain = compact(&path, &mut |_| {}).unwrap_err();
    println!("\nrefused: {error}\nrefused: {maintain}");
}

#[test]
fn a_read_only_folder_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), EngineKind::Sled);
    // In a mount namespace of its own; where that is not allowed there is nothing to be seen.
    let script =
        "mount --bind \"$1\" \"$1\" && mount -o remount,ro,bind \"$1\" || exit 77; shift; exec \"$@\"";
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", script, "sh"])
        .arg(folder.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "the_child_with_a_read_only_folder", "--ignored", "--nocapture"])
        .env(READ_ONLY, folder.path())
        .output();
    let Ok(output) = output else { return };
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() && !text.contains("running 1 test") {
        eprintln!("no read-only mount here: {}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let want = format!(
        "refused: the data folder {} can't be written to (Read-only file system (os error 30)): make it writable for this user, or choose another folder",
        folder.path().display()
    );
    assert_eq!(text.lines().filter(|line| *line == want).count(), 2, "{text}");
}

// ---- other processes

const CHILD_FOLDER: &str = "FULMAR_STORE_TEST_MAINTAIN";

/// Changes the engine and compacts until it is killed.
#[test]
#[ignore = "started by another test, in a process of its own"]
fn the_child_that_is_killed() {
    let Some(path) = std::env::var_os(CHILD_FOLDER) else { return };
    let path = Path::new(&path);
    loop {
        migrate(path, other(engine_of(path)), &mut |_| {}).unwrap();
        println!("\nround");
        compact(path, &mut |_| {}).unwrap();
        std::io::stdout().flush().unwrap();
    }
}

#[test]
fn a_work_that_was_killed_leaves_everything() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), EngineKind::Sled);
    let before = look(folder.path(), EngineKind::Sled).unwrap();
    let mut finished = 0;
    for round in 0..16u64 {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_child_that_is_killed", "--ignored", "--nocapture"])
            .env(CHILD_FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let patience = Duration::from_millis(20 + round * 131 % 700);
        let killer = std::thread::spawn(move || {
            let began = Instant::now();
            while began.elapsed() < patience {
                std::thread::park_timeout(patience.saturating_sub(began.elapsed()));
            }
            process.kill().unwrap();
            process.wait().unwrap();
        });
        finished += out.lines().map_while(Result::ok).filter(|line| line == "round").count();
        killer.join().unwrap();
        if round % 2 == 1 {
            assert_eq!(look(folder.path(), engine_of(folder.path())).unwrap(), before, "round {round}");
            assert_eq!(leftovers(folder.path()), [""; 0]);
        }
    }
    eprintln!("{finished} rounds were finished");
    assert_eq!(look(folder.path(), engine_of(folder.path())).unwrap(), before);
}

//! A shard with a cold tier: everything is read as it was before, through restarts, merges, retention and failures.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::{ColdOptions, ColdStore, Stop, folder::Local, memory::MemoryStore};
use crate::{
    Limits, Op, ReadError, Record, StoreOptions,
    conformance::{Open, append, conversation, in_memory, message, seq, shard_id},
    engine::memory::Memory,
    files::{
        Files,
        faulty::{Chance, FaultyFiles, Names, Power},
        memory::MemoryFiles,
    },
    shard::{ShardStats, manifest::Manifest},
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

const CONVERSATIONS: u64 = 5;

/// What people write: it repeats itself.
fn text(local: u64, n: u64) -> String {
    let words = ["shall we meet at the harbour", "the ferry is late again", "see you there", "thank you"];
    let word = |k: u64| words[usize::try_from((local * 7 + n * k) % 4).unwrap()];
    format!("{} {n}, {} and {}", word(1), word(2), word(3)).repeat(1 + usize::try_from(n % 9).unwrap())
}

fn expected(local: u64, from: u64, to: u64) -> Vec<Record> {
    (from..=to).map(|n| message(n, text(local, n))).collect()
}

/// A folder, its engine and its object store.
#[derive(Clone, Debug, Default)]
struct World {
    files: MemoryFiles,
    engine: Arc<Memory>,
    store: MemoryStore,
    /// Records of each conversation.
    length: u64,
    /// Up to where they are gone.
    low: u64,
}

impl World {
    /// Old records, settled in many small segments.
    fn new(length: u64) -> Self {
        let mut world = Self { length, ..Self::default() };
        let mut open = world.open_with(&Self::options());
        for n in 1..=length {
            let batch: Vec<Op> = (1..=CONVERSATIONS).map(|local| append(local, n, text(local, n))).collect();
            open.commit(&batch).unwrap();
        }
        open.close().unwrap();
        world.length = length;
        world
    }

    fn options() -> StoreOptions {
        StoreOptions {
            settle_commits: 8,
            settle_bytes: 4 << 10,
            cache_bytes: 1,
            background_bytes_per_second: u64::MAX,
            reserve_bytes: 0,
            ..StoreOptions::default()
        }
    }

    fn cold_options(&self) -> StoreOptions {
        let mut cold = ColdOptions::new("file:///unused", Duration::from_secs(30 * 24 * 3600));
        cold.object_bytes_min = 1;
        // Nothing stays in memory: every read is one of the object store.
        cold.cache_bytes = 0;
        cold.connect_to(Arc::new(self.store.clone()), "f".repeat(32));
        StoreOptions { cold: Some(cold), ..Self::options() }
    }

    fn open_with(&self, options: &StoreOptions) -> Open {
        Open::over(Arc::new(self.files.clone()), in_memory(&self.engine), options).unwrap()
    }

    fn open(&self) -> Open {
        self.open_with(&self.cold_options())
    }

    /// Opens it and waits until everything that is settled has gone cold.
    fn open_cold(&self) -> Open {
        let open = self.open();
        wait(&open, |_| self.is_cold(&[]));
        open
    }

    fn is_cold(&self, other: &[String]) -> bool {
        is_cold(&self.files, other)
    }

    fn manifest(&self) -> Manifest {
        Manifest::load(&self.files, shard_id()).unwrap()
    }

    /// Everything is there, however it is read.
    fn check(&self, open: &Open) {
        for local in 1..=CONVERSATIONS {
            let all = expected(local, self.low + 1, self.length);
            let c = conversation(local);
            assert_eq!(open.reader.records(c, seq(1), seq(self.length), ALL).unwrap(), all);
            assert_eq!(open.reader.records_before(c, seq(self.length + 1), ALL).unwrap(), all);
            for n in [self.low + 1, (self.low + self.length) / 2, self.length] {
                let one = message(n, text(local, n));
                assert_eq!(open.reader.record(c, seq(n)).unwrap(), Some(one));
            }
        }
    }
}

/// All settled records are in objects, and in none of `other`. Not if the power is off, which it may be since the caller looked.
fn is_cold(files: &dyn Files, other: &[String]) -> bool {
    let Ok(Manifest { segments, .. }) = Manifest::load(files, shard_id()) else { return false };
    let cold = |object: Option<&String>| object.is_some_and(|object| !other.contains(object));
    segments.iter().any(|entry| entry.cold.is_some())
        && segments
            .iter()
            .all(|entry| entry.replaces.is_empty() && (entry.run_bytes == 0 || cold(entry.cold.as_ref())))
}

/// Waits until the figures are as wanted.
fn wait(open: &Open, done: impl Fn(&ShardStats) -> bool) {
    let began = Instant::now();
    while !done(&open.shard.stats()) {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not get on: {:?}", open.shard.stats());
        std::thread::yield_now();
    }
}

#[test]
fn old_records_go_cold_and_are_read_as_before() {
    let mut world = World::new(100);
    let run_bytes: u64 = world.manifest().segments.iter().map(|entry| entry.run_bytes).sum();
    let mut open = world.open_cold();
    let stats = open.shard.stats();
    assert!(stats.cold_bytes * 2 < run_bytes, "text shrinks: {} of {run_bytes}", stats.cold_bytes);
    world.check(&open);
    assert!(open.shard.stats().cold_reads > 0, "they were read there");

    // Later commits do not mind, and a read goes from one tier to the other.
    for n in 101..=140 {
        let batch: Vec<Op> = (1..=CONVERSATIONS).map(|local| append(local, n, text(local, n))).collect();
        open.commit(&batch).unwrap();
    }
    world.length = 140;
    world.check(&open);
    open.close().unwrap();

    // A restart, and one with an index that is made again.
    let open = world.open_cold();
    world.check(&open);
    open.abandon();
    world.engine.clear();
    let open = world.open_cold();
    world.check(&open);
    open.close().unwrap();
    assert!(world.is_cold(&[]));
}

#[test]
fn a_frame_is_fetched_once_for_all_its_runs() {
    let world = World::new(400);
    let mut options = world.cold_options();
    let cold = options.cold.as_mut().unwrap();
    // Room for one frame and a little.
    cold.cache_bytes = 300 << 10;
    cold.connect_to(Arc::new(world.store.clone()), "f".repeat(32));
    let open = world.open_with(&options);
    wait(&open, |_| world.is_cold(&[]));
    let before = open.shard.stats().cold_reads;
    let runs: u64 = world.manifest().segments.iter().map(|entry| entry.runs).sum();
    let frames: u64 = world.manifest().segments.iter().map(|entry| entry.run_bytes.div_ceil(256 << 10)).sum();
    for local in 1..=CONVERSATIONS {
        let read = open.reader.records(conversation(local), seq(1), seq(400), ALL).unwrap();
        assert_eq!(read, expected(local, 1, 400));
    }
    let reads = open.shard.stats().cold_reads - before;
    assert!(reads < runs, "{reads} reads for {runs} runs in {frames} frames");
    open.close().unwrap();
}

#[test]
fn without_a_cold_tier_what_lies_there_is_refused_and_the_rest_is_read() {
    let world = World::new(40);
    world.open_cold().close().unwrap();
    let mut open = world.open_with(&World::options());
    let read = open.reader.records(conversation(1), seq(1), seq(10), ALL);
    assert!(
        matches!(&read, Err(ReadError::Engine { reason, .. }) if reason.contains("cold tier")),
        "{read:?}"
    );
    open.commit(&[append(1, 41, "new")]).unwrap();
    let new = open.reader.record(conversation(1), seq(41)).unwrap().unwrap();
    assert_eq!(new.payload, "new");
    open.close().unwrap();
}

#[test]
fn what_retention_takes_goes_from_the_object_store_after_a_day() {
    let mut world = World::new(400);
    let mut open = world.open_cold();
    let foreign = format!("{}/shard-003/0000000000000001-00.seg.zst", "e".repeat(32));
    world.store.put(&foreign, b"not of this folder");
    let before = world.store.names();

    // More than half: what is left goes into a smaller object.
    let low = |n| -> Vec<Op> {
        (1..=CONVERSATIONS)
            .map(|c| Op::Low { conversation: conversation(c), low: seq(n), count: n })
            .collect()
    };
    open.commit(&low(350)).unwrap();
    world.low = 350;
    open.close().unwrap();
    let open = world.open();
    wait(&open, |_| world.is_cold(&before));
    world.check(&open);
    open.close().unwrap();
    let named: Vec<String> =
        world.manifest().segments.iter().filter_map(|entry| entry.cold.clone()).collect();
    assert!(before.iter().all(|name| world.store.names().contains(name)), "not before a day is over");

    // A day later.
    world.store.set_age(Duration::from_secs(25 * 3600));
    let mut open = world.open();
    wait(&open, |_| world.store.names().len() <= named.len() + 1);
    assert!(world.store.names().contains(&foreign), "what others made stays");
    world.check(&open);

    // Everything: no object is left.
    open.commit(&low(400)).unwrap();
    world.low = 400;
    open.close().unwrap();
    let open = world.open();
    wait(&open, |stats| stats.cold_segments == 0);
    open.close().unwrap();
    world.store.set_age(Duration::from_secs(25 * 3600));
    let open = world.open();
    wait(&open, |_| world.store.names() == std::slice::from_ref(&foreign));
    assert_eq!(open.reader.records(conversation(1), seq(1), seq(400), ALL).unwrap(), []);
    open.close().unwrap();
}

#[test]
fn damage_over_there_is_never_served() {
    let world = World::new(60);
    let open = world.open_cold();
    let name = world.manifest().segments[0].cold.clone().unwrap();
    let c = conversation(1);
    let read = || open.reader.records(c, seq(1), seq(60), ALL);
    let right = expected(1, 1, 60);
    assert_eq!(read().unwrap(), right);

    // One flipped bit anywhere among the frames.
    let mut refused = 0;
    for at in (0..4000).step_by(97) {
        let mut there = true;
        world.store.change(&name, |bytes| match bytes.get_mut(at) {
            Some(byte) => *byte ^= 0x10,
            None => there = false,
        });
        match read() {
            Ok(records) => assert_eq!(records, right, "byte {at}"),
            Err(ReadError::Damaged { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        if there {
            world.store.change(&name, |bytes| bytes[at] ^= 0x10);
        }
    }
    assert!(refused > 0);
    assert_eq!(read().unwrap(), right);

    // Cut off.
    let mut whole = Vec::new();
    world.store.change(&name, |bytes| whole = std::mem::take(bytes));
    let error = read().unwrap_err();
    assert!(matches!(&error, ReadError::Engine { reason, .. } if reason.contains(&name)), "{error}");
    world.store.change(&name, |bytes| bytes.clone_from(&whole));
    assert_eq!(read().unwrap(), right, "it is read again as soon as it is there again");

    // Another segment's object under this name.
    world.store.change(&name, |bytes| bytes.reverse());
    assert!(read().is_err());
    world.store.change(&name, |bytes| *bytes = whole);

    // Away: only what lies there is refused, and the next reads do not wait for it.
    world.store.down.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let error = read().unwrap_err();
        assert!(
            matches!(&error, ReadError::Engine { reason, .. } if reason.contains("cold tier")),
            "{error}"
        );
    }
    assert_eq!(open.reader.head(c).unwrap().unwrap().seq, seq(60));
    assert!(open.shard.stats().cold_failures >= 3);
    world.store.down.store(false, Ordering::SeqCst);
    open.close().unwrap();
}

#[test]
fn the_object_store_may_fail_at_any_call() {
    let first = World::new(60);
    for calls in 0.. {
        let world = World {
            files: copy(&first.files),
            engine: Arc::default(),
            store: MemoryStore::default(),
            ..first.clone()
        };
        world.store.fail_after(calls);
        let open = world.open();
        wait(&open, |stats| stats.cold_failures > 0 || stats.cold_segments > 0);
        // Nobody who reads or commits notices, unless it is his read that fails.
        if !world.store.has_failed() {
            open.close().unwrap();
            assert!(calls > 5, "a sweep, a begin, writes, an end, a size and reads come before: {calls}");
            return;
        }
        world.check(&open);
        // The process ends here. The next one finds what it needs, and tries again.
        open.abandon();
        let open = world.open_cold();
        world.check(&open);
        open.close().unwrap();
        let named: Vec<_> = world.manifest().segments.iter().filter_map(|entry| entry.cold.clone()).collect();
        assert!(named.iter().all(|name| world.store.names().contains(name)));
        let files = world.files.list().unwrap();
        let segments = files.iter().filter(|(name, _)| name.ends_with(".seg")).count();
        assert_eq!(segments, world.manifest().segments.len(), "nothing is left behind: {files:?}");
    }
}

#[test]
fn power_may_be_cut_at_any_operation_on_the_way() {
    let first = World::new(40);
    let mut chance = Chance::new(7);
    for operations in 1.. {
        let files = FaultyFiles::new(Power::of(operations));
        for (name, bytes) in contents(&first.files) {
            files.set(&name, bytes);
        }
        let world = World { store: MemoryStore::default(), engine: Arc::default(), ..first.clone() };
        let open = |files: &FaultyFiles, engine: &Arc<Memory>| {
            Open::over(Arc::new(files.clone()), in_memory(engine), &world.cold_options())
        };
        let power = files.power().clone();
        let mut done = false;
        // The power may go off while it is opened.
        if let Ok(open) = open(&files, &world.engine) {
            let began = Instant::now();
            while !done && !power.is_off() {
                assert!(began.elapsed() < Duration::from_secs(60));
                done = open.shard.stats().cold_segments > 0 && !power.is_off() && is_cold(&files, &[]);
                std::thread::yield_now();
            }
            // The power may go off at any moment: what it holds is read below.
            open.abandon();
        }
        // The index is lost, and what was not synced may be.
        let found = files.after_power_cut(Power::for_ever(), Names::Any, &mut chance);
        let open = open(&found, &Arc::default()).unwrap();
        world.check(&open);
        wait(&open, |_| is_cold(&found, &[]));
        world.check(&open);
        open.close().unwrap();
        assert_eq!(files.broken_promises(), Vec::<String>::new());
        if done {
            assert!(operations > 20, "there are more: {operations}");
            return;
        }
    }
}

#[test]
fn an_object_that_is_not_what_was_written_is_not_trusted() {
    let store = MemoryStore::lying();
    let world = World { store, ..World::new(60) };
    let open = world.open();
    wait(&open, |stats| stats.cold_failures > 0);
    world.check(&open);
    open.close().unwrap();
    assert!(world.manifest().segments.iter().all(|entry| entry.cold.is_none()));
    // All of it is still in the segments: whoever knows no object store reads it.
    let open = world.open_with(&World::options());
    world.check(&open);
    open.close().unwrap();
}

#[test]
fn what_is_new_stays() {
    let world = World::default();
    let mut open = world.open();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let time = fulmar_protocol::id::UnixMillis::new(u64::try_from(now.as_millis()).unwrap()).unwrap();
    for n in 1..=100 {
        let record = Record { time, ..message(n, "new") };
        open.commit(&[Op::Append { conversation: conversation(1), record }]).unwrap();
    }
    wait(&open, |stats| stats.segments > 0);
    open.close().unwrap();
    assert_eq!(world.store.names(), Vec::<String>::new());
}

fn contents(files: &MemoryFiles) -> Vec<(String, Vec<u8>)> {
    let read = |(name, bytes): (String, u64)| {
        let mut buffer = vec![0; usize::try_from(bytes).unwrap()];
        files.open(&name).unwrap().read_exact_at(&mut buffer, 0).unwrap();
        (name, buffer)
    };
    files.list().unwrap().into_iter().map(read).collect()
}

fn copy(files: &MemoryFiles) -> MemoryFiles {
    let copy = MemoryFiles::default();
    for (name, bytes) in contents(files) {
        copy.create(&name).unwrap().append(&bytes).unwrap();
    }
    copy
}

/// What every object store has to make true.
fn is_an_object_store(store: &dyn ColdStore) {
    let stop = Stop::default();
    let name = "abc/shard-000/1.seg.zst";
    store.remove(name, &stop).unwrap();
    drop(store.begin(name, &stop).unwrap());
    assert_eq!(
        store.list("abc/shard-000/", 10, &stop).unwrap(),
        [],
        "nothing is left of what was not finished"
    );
    let mut upload = store.begin(name, &stop).unwrap();
    upload.write(b"hello ").unwrap();
    upload.write(b"there").unwrap();
    // More than a part of an upload, for those that have parts.
    upload.write(&vec![7; 9 << 20]).unwrap();
    assert!(store.size(name, &stop).is_err(), "not before it is finished");
    upload.finish().unwrap();
    assert_eq!(store.size(name, &stop).unwrap(), 11 + (9 << 20));
    assert_eq!(store.read(name, 6, 5, &stop).unwrap(), "there");
    assert_eq!(store.read(name, (9 << 20) + 9, 2, &stop).unwrap(), [7, 7].as_slice());
    assert!(store.read(name, (9 << 20) + 9, 3, &stop).is_err(), "not fewer than asked for");
    assert!(store.read(name, 10 << 20, 1, &stop).is_err());
    let listed = store.list("abc/shard-000/", 10, &stop).unwrap();
    assert_eq!(listed.iter().map(|object| object.name.as_str()).collect::<Vec<_>>(), [name]);
    assert!(listed[0].age < Duration::from_secs(3600));
    assert_eq!(store.list("abc/shard-001/", 10, &stop).unwrap(), []);
    store.remove(name, &stop).unwrap();
    store.remove(name, &stop).unwrap();
    assert!(store.read(name, 0, 1, &stop).is_err());
}

#[test]
fn a_local_folder_is_an_object_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = Local::new(folder.path().to_owned());
    is_an_object_store(&store);
    let stop = Stop::default();
    for bad in ["../x", "/etc/passwd", "a//b", "a/./b", ""] {
        assert!(store.read(bad, 0, 1, &stop).is_err(), "{bad}");
    }
    let gone = Local::new(folder.path().join("not-mounted"));
    assert!(gone.begin("a/b", &stop).is_err());
}

/// By hand: `FULMAR_S3_URL=s3://bucket/prefix AWS_…= cargo test -p fulmar-store --features s3 -- --ignored s3`.
#[cfg(feature = "s3")]
#[test]
#[ignore = "needs an S3-compatible object store, named by FULMAR_S3_URL"]
fn s3_is_an_object_store() {
    let url = std::env::var("FULMAR_S3_URL").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut cold = ColdOptions::new(url, Duration::from_secs(30 * 24 * 3600));
    cold.object_bytes_min = 1;
    cold.connect(super::identity::of(folder.path()).unwrap()).unwrap();
    is_an_object_store(cold.connected.as_ref().unwrap().store.as_ref());
    let world = World::new(200);
    let options = StoreOptions { cold: Some(cold), ..World::options() };
    for _ in 0..2 {
        let open = world.open_with(&options);
        wait(&open, |_| world.is_cold(&[]));
        world.check(&open);
        assert_eq!(open.shard.stats().cold_failures, 0);
        open.close().unwrap();
    }
}

#[test]
fn addresses_are_checked() {
    for (url, right) in [
        ("file:///srv/cold", true),
        ("file://srv/cold", false),
        ("/srv/cold", false),
        ("http://x", false),
        ("s3://", false),
        ("s3://bucket", cfg!(feature = "s3")),
        ("s3://bucket/a/b", cfg!(feature = "s3")),
    ] {
        assert_eq!(ColdOptions::check_url(url).is_ok(), right, "{url}");
    }
}

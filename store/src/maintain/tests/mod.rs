//! Folders that are made, damaged in every way, proven, copied and saved.

mod backup;
mod damage;
mod salvage;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use fulmar_protocol::id::{
    AppId, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId,
};

use super::verify::{Problem, VerifyReport, verify};
use crate::{
    ConversationClass, ConversationMeta, Device, EngineKind, Limits, Listed, Member, Op, Record, RecordKind,
    Role, ShardReader, ShardWriter, Store, StoreOptions, User,
};

pub(super) const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

/// Conversations per shard.
pub(super) const CONVERSATIONS: u64 = 4;

pub(super) fn shard(n: u16) -> ShardId {
    ShardId::new(n).unwrap()
}

pub(super) fn conversation(at: u16, local: u64) -> ConversationId {
    ConversationId::new(shard(at).number(local).unwrap()).unwrap()
}

pub(super) fn user(at: u16, local: u64) -> UserId {
    UserId::new(shard(at).number(local).unwrap()).unwrap()
}

pub(super) fn seq(n: u64) -> Seq {
    Seq::new(n).unwrap()
}

pub(super) fn time(n: u64) -> UnixMillis {
    UnixMillis::new(1_700_000_000_000 + n).unwrap()
}

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

pub(super) fn record(conversation: ConversationId, n: u64) -> Record {
    let length = usize::try_from((conversation.get() * 31 + n * 97) % 900).unwrap();
    Record {
        seq: seq(n),
        kind: RecordKind::Message,
        sender: user(0, 1 + n % 3),
        device: DeviceId::FIRST,
        epoch: Epoch::FIRST,
        pseq: Pseq::new(n).unwrap(),
        time: time(n),
        count: n,
        target: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: Bytes::from(vec![u8::try_from(n % 251).unwrap(); length]),
    }
}

pub(super) fn append(conversation: ConversationId, n: u64) -> Op {
    Op::Append { conversation, record: record(conversation, n) }
}

/// Settles often, into small segments, and leaves the rest in the log.
pub(super) fn options(engine: EngineKind) -> StoreOptions {
    StoreOptions {
        shards: 2,
        engine,
        settle_bytes: 60_000,
        settle_commits: 20,
        settle_idle: Duration::from_secs(3_600),
        segment_bytes_max: 4 << 20,
        cache_bytes: 1 << 20,
        engine_cache_bytes: 1 << 20,
        log_ahead_bytes: 100_000,
        ..StoreOptions::default()
    }
}

/// The first commit of a shard: users, conversations, members, devices.
pub(super) fn people(at: u16) -> Vec<Op> {
    let app = AppId::of("demo");
    let mut batch = Vec::new();
    for local in 1..=5 {
        let row = User { app, name: format!("user {local} of {at}"), created: time(local) };
        batch.push(Op::NameUser { user: user(at, local), row });
        let uid = DeviceUid([u8::try_from(local).unwrap(); 16]);
        let row = Device {
            uid,
            class: DeviceClass::Phone,
            epoch: Epoch::FIRST,
            class_epoch: Default::default(),
            seen: time(1),
        };
        batch.push(Op::Device { user: user(at, local), device: DeviceId::FIRST, row });
    }
    for local in 1..=CONVERSATIONS {
        let c = conversation(at, local);
        let row = ConversationMeta {
            app,
            class: ConversationClass::Group,
            name: format!("group {local} of {at}"),
            creator: user(at, 1),
            created: time(0),
        };
        batch.push(Op::NameConversation { conversation: c, row });
        for member in 1..=local {
            let row = Member { role: Role::Member, joined: Seq::ZERO, since: time(0) };
            batch.push(Op::Member { conversation: c, user: user(0, member), row: Some(row) });
            if at == 0 {
                let row = Listed { joined: Seq::ZERO, cleared: Seq::ZERO, muted: false, changed: time(0) };
                batch.push(Op::Listed { user: user(0, member), conversation: c, row: Some(row) });
            }
        }
    }
    batch
}

/// One more commit: `round` is counted from 0, and every conversation has `4 * (round + 1)` records after it.
pub(super) fn round_of(at: u16, round: u64) -> Vec<Op> {
    let mut batch = Vec::new();
    for local in 1..=CONVERSATIONS {
        let c = conversation(at, local);
        batch.extend((1..=4).map(|n| append(c, round * 4 + n)));
        let reader = user(0, 1 + round % 3);
        batch.push(Op::Read { conversation: c, user: reader, seq: seq(round * 4 + 1) });
        if round % 7 == 6 {
            let row = Member { role: Role::Admin, joined: seq(round), since: time(round) };
            let row = round.is_multiple_of(2).then_some(row);
            batch.push(Op::Member { conversation: c, user: user(0, 100 + round / 14), row });
        }
        if round % 10 == 9 {
            let low = round * 2;
            batch.push(Op::Low { conversation: c, low: seq(low), count: low });
        }
    }
    batch
}

pub(super) fn low_after(rounds: u64) -> u64 {
    (0..rounds).filter(|round| round % 10 == 9).map(|round| round * 2).max().unwrap_or(0)
}

pub(super) fn open(path: &Path, engine: EngineKind) -> Store {
    Store::open(path, &options(engine)).unwrap()
}

pub(super) fn write(writer: &mut ShardWriter, batch: &[Op]) {
    block_on(writer.commit(batch)).unwrap();
}

/// Makes a folder of two shards with so many rounds in each; `close`: everything is settled. Otherwise the last round is in a
/// log file of its own, after the epoch record of a second start.
pub(super) fn make(path: &Path, engine: EngineKind, rounds: u64, close: bool) {
    let last = if close { rounds } else { rounds.saturating_sub(1) };
    {
        let store = open(path, engine);
        for at in 0..2 {
            let (mut writer, _) = store.shard(shard(at)).unwrap();
            write(&mut writer, &people(at));
            for round in 0..last {
                write(&mut writer, &round_of(at, round));
            }
        }
        if close {
            store.close().unwrap();
        }
    }
    if last < rounds {
        // Nothing is settled from here on.
        let options = StoreOptions { settle_bytes: 1 << 30, settle_commits: 1 << 30, ..options(engine) };
        let store = Store::open(path, &options).unwrap();
        for at in 0..2 {
            let (mut writer, _) = store.shard(shard(at)).unwrap();
            write(&mut writer, &round_of(at, last));
        }
    }
}

/// Commits in a folder that [`make`] made.
pub(super) fn commits(rounds: u64, close: bool) -> u64 {
    2 + rounds + u64::from(!close && rounds > 0)
}

/// Compares everything in a shard with what so many rounds make.
pub(super) fn compare(reader: &ShardReader, at: u16, rounds: u64) {
    for local in 1..=CONVERSATIONS {
        let c = conversation(at, local);
        let head = reader.head(c).unwrap().unwrap();
        let low = low_after(rounds);
        assert_eq!((head.seq, head.low), (seq(rounds * 4), seq(low)), "{c}");
        let got = reader.records(c, Seq::FIRST, seq(1 << 40), ALL).unwrap();
        let want: Vec<Record> = (low + 1..=rounds * 4).map(|n| record(c, n)).collect();
        assert!(got == want, "{c}: {} records, {} wanted", got.len(), want.len());
        let members = reader.members(c, None, usize::MAX).unwrap();
        assert_eq!(members.len() as u64, head.members);
        for sender in 1..=3u64 {
            let last = (1..=rounds * 4).rev().find(|n| 1 + n % 3 == sender).unwrap();
            let lane = reader.lane(c, user(0, sender), DeviceId::FIRST).unwrap().unwrap();
            assert_eq!(lane.last.get(), last);
        }
    }
    let app = AppId::of("demo");
    for local in 1..=5 {
        assert_eq!(
            reader.user_by_name(app, &format!("user {local} of {at}")).unwrap(),
            Some(user(at, local))
        );
    }
}

pub(super) fn proven(path: &Path) -> VerifyReport {
    verify(path, &mut |_| {}).unwrap()
}

#[track_caller]
pub(super) fn sound(path: &Path) -> VerifyReport {
    let report = proven(path);
    assert!(report.is_sound(), "{} problems: {:#?}", report.problem_count, report.problems);
    report
}

/// The problems of a folder that has some.
#[track_caller]
pub(super) fn problems(path: &Path) -> Vec<Problem> {
    let report = proven(path);
    assert!(!report.is_sound(), "nothing was found");
    report.problems
}

pub(super) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
    // Of a closed store, so that the copied index is as good as the first one.
    if to.join("place").exists() {
        crate::engine::place::note(to).unwrap();
    }
}

pub(super) fn files_of(folder: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(suffix))
        .collect();
    found.sort();
    found
}

/// Bytes of a file that were written; without the room ahead of a log's end.
pub(super) fn written(path: &Path) -> usize {
    let bytes = fs::read(path).unwrap();
    if path.extension().is_some_and(|extension| extension == "log") {
        bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
    } else {
        bytes.len()
    }
}

pub(super) fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    // A new file: the old one may be linked elsewhere.
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_a_store_writes_is_sound() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        for (rounds, close) in [(0, false), (3, false), (90, false), (90, true)] {
            let folder = tempfile::tempdir().unwrap();
            make(folder.path(), engine, rounds, close);
            let mut told = Vec::new();
            let report = verify(folder.path(), &mut |progress| told.push(progress)).unwrap();
            assert!(report.is_sound(), "{:#?}", report.problems);
            assert_eq!(report.shards.len(), 2);
            for shard in &report.shards {
                assert_eq!(shard.last_commit, commits(rounds, close));
                assert!(shard.commits == 0 || !close, "{shard:?}");
                assert_eq!(shard.torn_bytes, 0);
                if close {
                    assert!(shard.index_compared && shard.rows > 50 && shard.segments > 0);
                    let low = low_after(rounds);
                    assert!(shard.records >= (rounds * 4 - low) * CONVERSATIONS, "{shard:?}");
                    assert_eq!(shard.conversations, CONVERSATIONS);
                }
            }
            assert!(told.iter().all(|progress| progress.done <= progress.of.max(1)), "{told:?}");
            assert!(report.bytes_per_second > 0);
            // And it opens as before.
            let store = open(folder.path(), engine);
            if rounds > 0 {
                for at in 0..2 {
                    compare(&store.reader(shard(at)).unwrap(), at, rounds);
                }
            }
        }
    }
}

#[test]
fn a_folder_that_is_open_is_not_verified() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path(), EngineKind::Sled);
    let refused = verify(folder.path(), &mut |_| {}).unwrap_err();
    let pid = std::process::id().to_string();
    assert!(
        refused.to_string().contains("in use by process") && refused.to_string().contains(&pid),
        "{refused}"
    );
    drop(store);
    sound(folder.path());
    let nothing = verify(folder.path().join("nothing"), &mut |_| {}).unwrap_err();
    assert!(nothing.to_string().contains("not a Fulmar data folder"), "{nothing}");
}

#[test]
fn figures_are_those_of_the_files() {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path(), EngineKind::Sled, 50, true);
    let store = open(folder.path(), EngineKind::Sled);
    let (mut writer, _) = store.shard(shard(1)).unwrap();
    write(&mut writer, &round_of(1, 50));
    let stats = super::inspect::inspect(folder.path()).unwrap();
    assert_eq!((stats.engine.as_str(), stats.in_use_by), ("sled", Some(std::process::id())));
    assert!(stats.created > UnixMillis::default());
    let [first, second] = stats.shards.as_slice() else { panic!("{stats:?}") };
    assert_eq!((first.unsettled_commits, second.unsettled_commits), (0, 2), "the epoch record and one more");
    assert_eq!(second.settled_commit, 52);
    assert_eq!(second.problem, None);
    assert_eq!(second.newest, time(200));
    assert!((time(1)..=time(200)).contains(&second.oldest), "{second:?}");
    assert_eq!(second.tiers.iter().map(|tier| tier.segments).sum::<u64>(), second.segments);
    assert_eq!(second.record_bytes + second.row_bytes, second.segment_bytes);
    let on_disk = |suffix: &str| -> u64 {
        let files = files_of(&folder.path().join("shard-001"), suffix);
        files.iter().map(|file| fs::metadata(file).unwrap().len()).sum()
    };
    drop((writer, store));
    let stats = super::inspect::inspect(folder.path()).unwrap();
    assert_eq!(stats.in_use_by, None);
    let second = &stats.shards[1];
    // A merge may have been interrupted.
    assert_eq!(second.segment_bytes + second.leftover_bytes, on_disk(".seg"));
    assert_eq!(second.log_bytes, on_disk(".log"));
    assert!(second.index_bytes > 0);
}

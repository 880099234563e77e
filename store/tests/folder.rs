//! A data folder on a real disk, through the public API: made, opened again, locked, refused, killed.

#![expect(clippy::unwrap_used, reason = "a test fails loudly")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::id::{AppId, ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};
use fulmar_store::{
    CommitError, ConversationClass, ConversationMeta, Durability, EngineKind, Limits, Member, Op, OpenError,
    Record, RecordKind, Role, ShardError, Store, StoreOptions, User, migrate,
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

fn shard(n: u16) -> ShardId {
    ShardId::new(n).unwrap()
}

fn conversation(shard_number: u16, local: u64) -> ConversationId {
    ConversationId::new(shard(shard_number).number(local).unwrap()).unwrap()
}

fn user(local: u64) -> UserId {
    UserId::new(shard(0).number(local).unwrap()).unwrap()
}

fn payload(conversation: ConversationId, n: u64) -> Bytes {
    let length = usize::try_from((conversation.get() * 31 + n * 97) % 700).unwrap();
    Bytes::from(vec![u8::try_from(n % 251).unwrap(); length])
}

fn record(conversation: ConversationId, n: u64) -> Record {
    Record {
        seq: Seq::new(n).unwrap(),
        kind: RecordKind::Message,
        sender: user(1),
        device: DeviceId::FIRST,
        epoch: Epoch::FIRST,
        pseq: Pseq::new(n).unwrap(),
        time: UnixMillis::new(1_700_000_000_000 + n).unwrap(),
        count: n,
        target: None,
        ttl: None,
        more: false,
        continues: false,
        silent: false,
        payload: payload(conversation, n),
    }
}

fn append(conversation: ConversationId, n: u64) -> Op {
    Op::Append { conversation, record: record(conversation, n) }
}

fn two_shards() -> StoreOptions {
    StoreOptions { shards: 2, ..StoreOptions::default() }
}

#[tokio::test]
async fn a_folder_is_made_closed_and_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    let c = conversation(1, 1);
    for round in 0..3u64 {
        // The count of the creation stays, whatever is asked for later.
        let options = StoreOptions { shards: if round == 0 { 2 } else { 7 }, ..StoreOptions::default() };
        let store = Store::open(&path, &options).unwrap();
        assert_eq!(store.shards(), 2);
        let (mut writer, reader) = store.shard(shard(1)).unwrap();
        assert_eq!(store.shard(shard(1)).unwrap_err(), ShardError::Taken(shard(1)));
        assert!(matches!(store.shard(shard(2)), Err(ShardError::NoSuchShard { shards: 2, .. })));
        for n in 1..=40 {
            let n = round * 40 + n;
            writer.commit(&[append(c, n)]).await.unwrap();
        }
        let got = reader.records(c, Seq::FIRST, Seq::new(1_000).unwrap(), ALL).unwrap();
        let want: Vec<Record> = (1..=(round + 1) * 40).map(|n| record(c, n)).collect();
        assert_eq!(got, want);
        store.canary_write(shard(0)).await.unwrap();
        let stats = store.stats(shard(1)).unwrap();
        assert_eq!(stats.commits, 41, "40 and the epoch record");
        assert!(stats.disk_bytes > 0);
        if round == 1 {
            continue; // Dropped without being closed.
        }
        store.close().unwrap();
        let refused = writer.commit(&[append(c, 1)]).await;
        assert!(
            matches!(refused, Err(CommitError::Unavailable { .. } | CommitError::Invalid(_))),
            "{refused:?}"
        );
    }
}

#[tokio::test]
async fn settled_rows_are_read_from_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let c = conversation(0, 1);
    let store = Store::open(folder.path(), &two_shards()).unwrap();
    let (mut writer, _) = store.shard(shard(0)).unwrap();
    for n in 0..20u64 {
        let batch: Vec<Op> = (1..=50).map(|i| append(c, n * 50 + i)).collect();
        writer.commit(&batch).await.unwrap();
    }
    store.close().unwrap();
    drop((store, writer));
    let store = Store::open(folder.path(), &two_shards()).unwrap();
    let reader = store.reader(shard(0)).unwrap();
    assert_eq!(store.stats(shard(0)).unwrap().replayed, 0, "a closed store has nothing to replay");
    for from in [1u64, 2, 400, 951, 1_000] {
        let got = reader.records(c, Seq::new(from).unwrap(), Seq::new(1_000).unwrap(), ALL).unwrap();
        assert_eq!(got, (from..=1_000).map(|n| record(c, n)).collect::<Vec<_>>());
    }
}

#[test]
fn a_newer_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    Store::open(folder.path(), &two_shards()).unwrap().close().unwrap();
    let marker = folder.path().join("FORMAT");
    let text = std::fs::read_to_string(&marker).unwrap();
    std::fs::write(&marker, text.replace("format = 2", "format = 3")).unwrap();
    let error = Store::open(folder.path(), &two_shards()).unwrap_err();
    assert!(matches!(error, OpenError::Newer { found: 3, known: 2, .. }), "{error}");
}

#[test]
fn a_snapshot_that_was_never_finished_is_in_nobodys_way() {
    let folder = tempfile::tempdir().unwrap();
    Store::open(folder.path(), &two_shards()).unwrap().close().unwrap();
    let leftover = folder.path().join("shard-000/index/snap.0000000000000007.generating");
    std::fs::write(&leftover, b"half a snapshot").unwrap();
    Store::open(folder.path(), &two_shards()).unwrap();
    assert!(!leftover.exists());
}

#[tokio::test]
async fn too_little_space_is_full_and_not_final() {
    let folder = tempfile::tempdir().unwrap();
    let c = conversation(0, 1);
    let full = StoreOptions { reserve_bytes: u64::MAX, ..two_shards() };
    let store = Store::open(folder.path(), &full).unwrap();
    let refused = store.shard(shard(0)).unwrap_err();
    assert!(matches!(refused, ShardError::Commit(CommitError::Full { .. })), "{refused:?}");
    let canary = store.canary_write(shard(0)).await;
    assert!(matches!(canary, Err(ShardError::Commit(CommitError::Full { .. }))), "{canary:?}");
    store.close().unwrap();
    drop(store);
    let store = Store::open(folder.path(), &two_shards()).unwrap();
    let (mut writer, _) = store.shard(shard(0)).unwrap();
    writer.commit(&[append(c, 1)]).await.unwrap();
}

/// Copies a folder, so that opening it does not change the original.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn fixture_meta() -> ConversationMeta {
    ConversationMeta {
        app: AppId::of("demo"),
        class: ConversationClass::Group,
        name: "crew".to_owned(),
        creator: user(1),
        created: UnixMillis::new(1_700_000_000_000).unwrap(),
    }
}

/// Run by hand, once per format: `cargo test -p fulmar-store --test folder -- --ignored write_the_fixture`.
#[tokio::test]
#[ignore = "writes the fixture of the present format into the source tree"]
async fn write_the_fixture() {
    let fixture = fixture(&format!("format-{}", fulmar_store::FORMAT_VERSION));
    assert!(!fixture.exists(), "a fixture is written once and then kept");
    let options = StoreOptions { shards: 1, ..StoreOptions::default() };
    let c = conversation(0, 1);
    let since = UnixMillis::new(1_700_000_000_000).unwrap();
    {
        let store = Store::open(&fixture, &options).unwrap();
        let (mut writer, _) = store.shard(shard(0)).unwrap();
        let named = |name: &str| User { app: AppId::of("demo"), name: name.to_owned(), created: since };
        let member = |role| Some(Member { role, joined: Seq::FIRST, since });
        writer
            .commit(&[
                Op::NameUser { user: user(1), row: named("alice") },
                Op::NameUser { user: user(2), row: named("bob") },
                Op::NameConversation { conversation: c, row: fixture_meta() },
                Op::Member { conversation: c, user: user(1), row: member(Role::Owner) },
                Op::Member { conversation: c, user: user(2), row: member(Role::Member) },
            ])
            .await
            .unwrap();
        let batch: Vec<Op> = (1..=30).map(|n| append(c, n)).collect();
        writer.commit(&batch).await.unwrap();
        store.close().unwrap();
    }
    // And some that are in the log only.
    let options = StoreOptions { settle_idle: Duration::from_secs(3600), ..options };
    let store = Store::open(&fixture, &options).unwrap();
    let (mut writer, _) = store.shard(shard(0)).unwrap();
    for n in 31..=40 {
        writer.commit(&[append(c, n)]).await.unwrap();
    }
    writer.commit(&[Op::Read { conversation: c, user: user(2), seq: Seq::new(33).unwrap() }]).await.unwrap();
    drop((store, writer));
    // Nobody trusts an index that was copied.
    std::fs::remove_dir_all(fixture.join("shard-000/index")).unwrap();
    std::fs::remove_file(fixture.join("LOCK")).unwrap();
}

/// Looks at everything in a copy of a fixture.
fn check_fixture(store: &Store) {
    assert_eq!(store.shards(), 1);
    let reader = store.reader(shard(0)).unwrap();
    let c = conversation(0, 1);
    assert_eq!(reader.user_by_name(AppId::of("demo"), "bob").unwrap(), Some(user(2)));
    let found = reader.conversation_by_name(AppId::of("demo"), ConversationClass::Group, "crew").unwrap();
    assert_eq!(found, Some(c));
    assert_eq!(reader.meta(c).unwrap(), Some(fixture_meta()));
    assert_eq!(reader.member_count(c).unwrap(), 2);
    assert_eq!(reader.members(c, None, usize::MAX).unwrap().len(), 2);
    assert_eq!(reader.read_cursor(c, user(2)).unwrap(), Seq::new(33).unwrap());
    let got = reader.records(c, Seq::FIRST, Seq::new(99).unwrap(), ALL).unwrap();
    assert_eq!(got, (1..=40).map(|n| record(c, n)).collect::<Vec<_>>());
    assert_eq!(reader.lane(c, user(1), DeviceId::FIRST).unwrap().unwrap().last, Pseq::new(40).unwrap());
}

#[tokio::test]
async fn a_folder_of_format_1_opens() {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixture("format-1"), folder.path());
    let store = Store::open(folder.path(), &StoreOptions::default()).unwrap();
    assert_eq!(store.stats(shard(0)).unwrap().replayed, 12, "what was not settled is in the log still");
    check_fixture(&store);
    drop(store);
    let marker = std::fs::read_to_string(folder.path().join("FORMAT")).unwrap();
    assert!(marker.contains("format = 2\nshards = 1\nengine = sled\ncreated = 1795241796111\n"), "{marker}");
    assert!(!folder.path().join("shard-000/sled").exists());
    // It goes on where it was.
    let store = Store::open(folder.path(), &StoreOptions::default()).unwrap();
    check_fixture(&store);
    let (mut writer, reader) = store.shard(shard(0)).unwrap();
    let c = conversation(0, 1);
    writer.commit(&[append(c, 41)]).await.unwrap();
    store.close().unwrap();
    drop((store, writer, reader));
    let store = Store::open(folder.path(), &StoreOptions::default()).unwrap();
    let got = store.reader(shard(0)).unwrap().records(c, Seq::FIRST, Seq::new(99).unwrap(), ALL).unwrap();
    assert_eq!(got, (1..=41).map(|n| record(c, n)).collect::<Vec<_>>());
}

#[test]
fn a_folder_of_format_2_opens_with_any_engine() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let folder = tempfile::tempdir().unwrap();
        copy(&fixture("format-2"), folder.path());
        // The fixture has no index: it is made from the segments.
        migrate(folder.path(), engine, &mut |_| {}).unwrap();
        let options = StoreOptions { engine, ..StoreOptions::default() };
        let store = Store::open(folder.path(), &options).unwrap();
        assert_eq!(store.stats(shard(0)).unwrap().replayed, 12);
        check_fixture(&store);
        store.close().unwrap();
    }
}

/// What a folder whose bytes were changed answered.
#[derive(Debug, Default)]
struct Answers {
    right: u64,
    refused: u64,
}

/// The files of a shard whose names end like this; those of the index for "index/".
fn files_of(shard: &Path, ending: &str) -> Vec<PathBuf> {
    let folder = if ending == "index/" { shard.join("index") } else { shard.to_owned() };
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file() && (ending == "index/" || path.to_str().unwrap().ends_with(ending)))
        .filter(|path| path.metadata().unwrap().len() > 0)
        .collect();
    found.sort();
    found
}

/// Flips bits in the files of a shard that end like this, and looks at everything: right, or refused, never wrong.
fn flips(engine: EngineKind, rounds: u64, records: u64, settled: bool, ending: &str) -> Answers {
    const COMMITS: u64 = 20;
    let original = tempfile::tempdir().unwrap();
    let c = conversation(0, 1);
    let options =
        StoreOptions { shards: 1, engine, settle_idle: Duration::from_secs(3600), ..StoreOptions::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let members = 50u64;
    {
        let store = Store::open(original.path(), &options).unwrap();
        let (mut writer, _) = store.shard(shard(0)).unwrap();
        for n in 0..COMMITS {
            let mut batch: Vec<Op> = (1..=records).map(|i| append(c, n * records + i)).collect();
            let row = Member { role: Role::Admin, joined: Seq::FIRST, since: UnixMillis::default() };
            batch.extend((0..members).map(|i| Op::Member {
                conversation: c,
                user: user(i + 1),
                row: Some(row),
            }));
            runtime.block_on(writer.commit(&batch)).unwrap();
        }
        if settled {
            store.close().unwrap();
        }
    }
    // A copy is to be opened with the index that was copied.
    let options = StoreOptions { trust_copied_index: true, ..options };
    let whole: Vec<Record> = (1..=records * COMMITS).map(|n| record(c, n)).collect();
    let look = |path: &Path, what: &str| -> Result<(), String> {
        let store = Store::open(path, &options).map_err(|error| error.to_string())?;
        let reader = store.reader(shard(0)).map_err(|error| error.to_string())?;
        let got = reader
            .records(c, Seq::FIRST, Seq::new(1 << 40).unwrap(), ALL)
            .map_err(|error| error.to_string())?;
        assert!(got == whole, "{what}: {} records", got.len());
        let count = reader.member_count(c).map_err(|error| error.to_string())?;
        assert_eq!(count, members, "{what}");
        let listed = reader.members(c, None, 100).map_err(|error| error.to_string())?;
        assert_eq!(listed.len() as u64, members, "{what}");
        Ok(())
    };
    let files = files_of(&original.path().join("shard-000"), ending);
    assert!(!files.is_empty(), "there are files that end in {ending}");
    let mut answers = Answers::default();
    for round in 0..rounds {
        let folder = tempfile::tempdir().unwrap();
        copy(original.path(), folder.path());
        let file = files.get(usize::try_from(round).unwrap() % files.len()).unwrap();
        let mut bytes = std::fs::read(file).unwrap();
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1) as u64;
        let at = usize::try_from(round.wrapping_mul(0x9e37_79b9_7f4a_7c15) % used).unwrap();
        *bytes.get_mut(at).unwrap() ^= 1 << (round % 8);
        let inside = file.strip_prefix(original.path()).unwrap();
        std::fs::write(folder.path().join(inside), bytes).unwrap();
        match look(folder.path(), &format!("byte {at} of {}", inside.display())) {
            Ok(()) => answers.right += 1,
            Err(_) => answers.refused += 1,
        }
    }
    answers
}

#[test]
fn flipped_bytes_of_the_log_and_of_segments_are_refused_and_never_served() {
    // Of the log, only the last file may hold nothing; the epoch record and 20 commits lie in the first.
    let log = flips(EngineKind::Sled, 24, 10, false, "0000000000000001.log");
    assert_eq!((log.right, log.refused), (0, 24), "every byte of the log is proven");
    let segment = flips(EngineKind::Sled, 24, 10, true, ".seg");
    assert!(segment.refused > 8, "{segment:?}: what is not read again is not noticed here");
    let manifest = flips(EngineKind::Sled, 8, 10, true, "manifest");
    assert_eq!((manifest.right, manifest.refused), (0, 8), "every byte of the manifest is proven");
    let tip = flips(EngineKind::Sled, 8, 10, false, "tip");
    assert_eq!((tip.right, tip.refused), (8, 0), "the tip only ever says more than the log");
}

#[test]
fn flipped_bytes_of_the_index_are_made_good_or_refused_and_never_served() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let index = flips(engine, 10, 10, true, "index/");
        assert!(index.right > 0, "{index:?}");
    }
}

#[test]
fn an_index_that_is_gone_is_made_again() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let folder = tempfile::tempdir().unwrap();
        let c = conversation(0, 1);
        let options = StoreOptions { shards: 1, engine, ..StoreOptions::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let store = Store::open(folder.path(), &options).unwrap();
        let (mut writer, reader) = store.shard(shard(0)).unwrap();
        let batch: Vec<Op> = (1..=100).map(|n| append(c, n)).collect();
        runtime.block_on(writer.commit(&batch)).unwrap();
        store.close().unwrap();
        drop((store, writer, reader));
        std::fs::remove_dir_all(folder.path().join("shard-000/index")).unwrap();
        let store = Store::open(folder.path(), &options).unwrap();
        let reader = store.reader(shard(0)).unwrap();
        let got = reader.records(c, Seq::FIRST, Seq::new(1_000).unwrap(), ALL).unwrap();
        assert_eq!(got, (1..=100).map(|n| record(c, n)).collect::<Vec<_>>());
    }
}

#[test]
#[ignore = "a campaign: many more damaged files than a test run has time for"]
fn flipped_bytes_campaign() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        for (records, settled) in [(10, false), (10, true), (600, false), (600, true)] {
            for ending in [".log", ".seg", "index/", "manifest", "tip"] {
                let nothing = (ending == ".seg" || ending == "manifest") && !settled && records == 10;
                if !nothing {
                    println!(
                        "{engine:?} {records} {settled} {ending}: {:?}",
                        flips(engine, 40, records, settled, ending)
                    );
                }
            }
        }
    }
}

// ---- other processes

const CHILD_FOLDER: &str = "FULMAR_STORE_TEST_FOLDER";
const CONVERSATIONS: u64 = 3;

fn child(folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "the_child_that_is_killed", "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD_FOLDER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// Commits until it is killed, and says after each commit what was acknowledged.
#[tokio::test]
#[ignore = "started by other tests, in a process of its own"]
async fn the_child_that_is_killed() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER) else { return };
    // Settle often, so that kills hit every stage of it.
    let options = StoreOptions {
        settle_bytes: 40_000,
        settle_commits: 25,
        settle_idle: Duration::from_millis(10),
        durability: Durability::Power,
        ..two_shards()
    };
    let store = Store::open(folder, &options).unwrap();
    let mut writers = Vec::new();
    for n in 0..2 {
        let (writer, reader) = store.shard(shard(n)).unwrap();
        let mut heads = BTreeMap::new();
        for local in 1..=CONVERSATIONS {
            let head = reader.head(conversation(n, local)).unwrap().unwrap_or_default();
            heads.insert(conversation(n, local), head.seq.get());
        }
        writers.push((writer, heads));
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nready 0").unwrap();
    for round in 0u64.. {
        let (writer, heads) = &mut writers[usize::try_from(round % 2).unwrap()];
        let mut batch = Vec::new();
        for (c, head) in heads.iter_mut() {
            for _ in 0..(round + c.get()) % 9 {
                *head += 1;
                batch.push(append(*c, *head));
            }
        }
        if batch.is_empty() {
            continue;
        }
        writer.commit(&batch).await.unwrap();
        for (c, head) in heads.iter() {
            writeln!(out, "{c} {head}").unwrap();
        }
        out.flush().unwrap();
    }
}

#[test]
fn a_second_process_is_refused_and_told_who_has_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = child(folder.path()).spawn().unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let ready = lines.map_while(Result::ok).any(|line| line.starts_with("ready"));
    assert!(ready, "the other process opened the folder");
    let error = Store::open(folder.path(), &two_shards()).unwrap_err();
    let pid = process.id();
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(matches!(error, OpenError::InUse { pid: Some(found), .. } if found == pid), "{error}");
    Store::open(folder.path(), &two_shards()).expect("the lock dies with the process");
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let mut acked: BTreeMap<u64, u64> = BTreeMap::new();
    for round in 0..20u64 {
        let mut process = child(folder.path()).spawn().unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        // Killed after so much time or so many commits, sometimes while it still opens.
        let began = Instant::now();
        let patience = Duration::from_millis(5 + round * 37 % 400);
        let killer = std::thread::spawn(move || {
            while began.elapsed() < patience {
                std::thread::park_timeout(patience - began.elapsed());
            }
            process.kill().unwrap();
            process.wait().unwrap();
        });
        for line in out.lines().map_while(Result::ok) {
            if let Some((c, head)) = line.split_once(' ')
                && let (Ok(c), Ok(head)) = (c.parse::<u64>(), head.parse::<u64>())
            {
                acked.insert(c, head);
            }
        }
        killer.join().unwrap();

        let store = Store::open(folder.path(), &two_shards()).unwrap();
        for n in 0..2 {
            let reader = store.reader(shard(n)).unwrap();
            for local in 1..=CONVERSATIONS {
                let c = conversation(n, local);
                let head = reader.head(c).unwrap().unwrap_or_default().seq.get();
                let known = acked.get(&c.get()).copied().unwrap_or(0);
                assert!(head >= known, "round {round}: {c} ends at {head}, {known} was acknowledged");
                let got = reader.records(c, Seq::FIRST, Seq::new(1 << 40).unwrap(), ALL).unwrap();
                assert_eq!(got.len() as u64, head);
                assert!((1..).zip(&got).all(|(n, found)| *found == record(c, n)));
            }
        }
    }
    assert!(acked.values().sum::<u64>() > 1_000, "the rounds did commit: {acked:?}");
}

//! Exports and imports through the public API: what comes out goes in again, in any engine and any number of shards.

#![expect(clippy::unwrap_used, reason = "a test fails loudly")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use bytes::Bytes;
use fulmar_protocol::id::{
    AppId, ClassEpoch, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, Pseq, Seq, ShardId,
    UnixMillis, UserId,
};
use fulmar_store::{
    ConversationClass, ConversationMeta, Device, EngineKind, ExportOptions, ExportReport, ExportTo,
    ImportOptions, ImportReport, Limits, Listed, MaintainError, Member, Numbers, Op, PendingLink, Record,
    RecordKind, Role, ShardReader, ShardWriter, Store, StoreOptions, User, export, import,
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

static RUNNING: AtomicBool = AtomicBool::new(false);

/// Payloads of `Joined` are a user's number in digits; names of direct conversations are two of them.
struct Digits;

impl Numbers for Digits {
    fn payload(
        &self,
        kind: RecordKind,
        payload: &Bytes,
        map: &mut dyn FnMut(UserId) -> Option<UserId>,
    ) -> Option<Bytes> {
        if kind != RecordKind::Joined {
            return Some(payload.clone());
        }
        let text = std::str::from_utf8(payload).ok()?;
        Some(map(UserId::new(text.parse().ok()?)?)?.to_string().into())
    }

    fn name(
        &self,
        class: ConversationClass,
        name: &str,
        map: &mut dyn FnMut(UserId) -> Option<UserId>,
    ) -> Option<String> {
        if class != ConversationClass::Direct {
            return Some(name.to_owned());
        }
        let (a, b) = name.split_once(':')?;
        let mut number = |text: &str| map(UserId::new(text.parse().ok()?)?);
        let (a, b) = (number(a)?, number(b)?);
        Some(format!("{}:{}", a.min(b), a.max(b)))
    }
}

/// Groups, but for one.
fn class_of(name: &str) -> ConversationClass {
    if name == "four" { ConversationClass::Broadcast } else { ConversationClass::Group }
}

fn options(shards: u16, engine: EngineKind) -> StoreOptions {
    StoreOptions { shards, engine, ..StoreOptions::default() }
}

fn time(n: u64) -> UnixMillis {
    UnixMillis::new(1_700_000_000_000 + n).unwrap()
}

fn seq(n: u64) -> Seq {
    Seq::new(n).unwrap()
}

/// An open store with all its writers.
struct World {
    store: Store,
    shards: Vec<(ShardWriter, ShardReader)>,
}

impl World {
    fn open(path: &Path, options: &StoreOptions) -> Self {
        let store = Store::open(path, options).unwrap();
        let shards = (0..store.shards()).map(|n| store.shard(ShardId::new(n).unwrap()).unwrap()).collect();
        Self { store, shards }
    }

    async fn commit(&mut self, shard: ShardId, batch: &[Op]) {
        self.shards.get_mut(usize::from(shard.get())).unwrap().0.commit(batch).await.unwrap();
    }

    fn reader(&self, shard: ShardId) -> &ShardReader {
        &self.shards.get(usize::from(shard.get())).unwrap().1
    }

    async fn user(&mut self, app: &str, name: &str) -> UserId {
        let app = AppId::of(app);
        let shard = self.store.shard_of_user(app, name);
        let user = self.reader(shard).allocate_user().unwrap();
        let row = User { app, name: name.to_owned(), created: time(1) };
        let device = Device {
            uid: DeviceUid([u8::try_from(user.get() % 251).unwrap(); 16]),
            class: DeviceClass::Tablet,
            epoch: Epoch::FIRST,
            class_epoch: ClassEpoch::FIRST,
            seen: time(2),
        };
        let login = Op::ClassEpoch { user, class: DeviceClass::Tablet, epoch: ClassEpoch::FIRST };
        let device = Op::Device { user, device: DeviceId::FIRST, row: device };
        self.commit(shard, &[Op::NameUser { user, row }, device, login]).await;
        user
    }

    async fn conversation(
        &mut self,
        app: &str,
        class: ConversationClass,
        name: &str,
        members: &[UserId],
    ) -> ConversationId {
        let app = AppId::of(app);
        let shard = self.store.shard_of_conversation(app, class, name);
        let conversation = self.reader(shard).allocate_conversation().unwrap();
        let creator = *members.first().unwrap();
        let row = ConversationMeta { app, class, name: name.to_owned(), creator, created: time(3) };
        let mut ops = vec![Op::NameConversation { conversation, row }];
        for (n, user) in (1..).zip(members) {
            let mut record = message(*user, n, 0);
            record.kind = RecordKind::Joined;
            record.count = 0;
            record.pseq = Pseq::ZERO;
            record.payload = user.to_string().into();
            ops.push(Op::Append { conversation, record });
            let row = Some(Member { role: Role::Admin, joined: seq(n), since: time(n) });
            ops.push(Op::Member { conversation, user: *user, row });
        }
        self.commit(shard, &ops).await;
        for user in members {
            let row = Some(Listed { joined: seq(1), cleared: Seq::ZERO, muted: true, changed: time(9) });
            let recv = Op::Recv { user: *user, device: DeviceId::FIRST, conversation, seq: seq(2) };
            self.commit(user.shard(), &[Op::Listed { user: *user, conversation, row }, recv]).await;
        }
        conversation
    }
}

fn message(sender: UserId, n: u64, pseq: u64) -> Record {
    Record {
        seq: seq(n),
        kind: RecordKind::Message,
        sender,
        device: DeviceId::FIRST,
        epoch: Epoch::FIRST,
        pseq: Pseq::new(pseq).unwrap(),
        time: time(n),
        count: n,
        target: n.is_multiple_of(7).then(|| seq(n - 1)),
        ttl: n.is_multiple_of(5).then_some(60),
        more: n.is_multiple_of(11),
        continues: n.is_multiple_of(13),
        silent: n.is_multiple_of(3),
        payload: Bytes::from(vec![u8::try_from(n % 251).unwrap(); usize::try_from(n * 37 % 900).unwrap()]),
    }
}

/// Two apps, users, groups, a direct conversation, records that retention took, everything a folder can hold.
async fn made(path: &Path, options: &StoreOptions) -> ConversationId {
    let mut world = World::open(path, options);
    let mut users = Vec::new();
    for name in ["alice", "bob", "carol", "dave", "erin"] {
        users.push(world.user("acme", name).await);
    }
    let other = world.user("other", "alice").await;
    let mut last = ConversationId::default();
    for name in ["one", "two", "three", "four"] {
        let group = world.conversation("acme", class_of(name), name, &users).await;
        for batch in 0..4u64 {
            let records = (1..=25u64).map(|i| {
                let n = batch * 25 + i;
                let sender = *users.get(usize::try_from(n % 3).unwrap()).unwrap();
                let pseq = n.div_ceil(3);
                Op::Append { conversation: group, record: message(sender, n + 5, pseq) }
            });
            world.commit(group.shard(), &records.collect::<Vec<_>>()).await;
        }
        let (first, second) = (*users.first().unwrap(), *users.get(1).unwrap());
        let link = PendingLink { conversation: group, user: second, listed: None };
        world
            .commit(
                group.shard(),
                &[
                    Op::Low { conversation: group, low: seq(40), count: 40 },
                    Op::Read { conversation: group, user: first, seq: seq(50) },
                    Op::Member { conversation: group, user: second, row: None },
                    Op::Refuse {
                        conversation: group,
                        user: first,
                        device: DeviceId::FIRST,
                        epoch: Epoch::FIRST,
                        pseq: Pseq::new(35).unwrap(),
                    },
                    Op::Link(link),
                ],
            )
            .await;
        last = group;
    }
    let (alice, bob) = (*users.first().unwrap(), *users.get(1).unwrap());
    let name = format!("{}:{}", alice.min(bob), alice.max(bob));
    world.conversation("acme", ConversationClass::Direct, &name, &[alice, bob]).await;
    world.conversation("other", ConversationClass::Group, "one", &[other]).await;
    world.store.close().unwrap();
    last
}

fn exported(from: &Path, to: &Path, app: Option<&str>, only: Option<ConversationId>) -> ExportReport {
    let what =
        ExportOptions { app: app.map(AppId::of), conversation: only, numbers: &Digits, stop: &RUNNING };
    let mut told = 0;
    let report = export(from, &StoreOptions::default(), ExportTo::File(to), &what, &mut |progress| {
        assert!(progress.done <= progress.of, "{progress:?}");
        told += 1;
    });
    assert!(told > 0);
    report.unwrap()
}

fn imported(
    from: &Path,
    to: &Path,
    engine: EngineKind,
    shards: Option<u16>,
) -> Result<ImportReport, MaintainError> {
    let how = ImportOptions { shards, numbers: &Digits, stop: &RUNNING };
    import(from, to, &options(4, engine), &how, &mut |_| {})
}

/// All lines but the first, which says when the file was written and of what.
fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().skip(1).map(str::to_owned).collect()
}

#[tokio::test]
async fn what_is_exported_and_imported_is_exported_again_in_any_engine() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    made(&at("old"), &options(3, EngineKind::Sled)).await;
    let report = exported(&at("old"), &at("a.jsonl"), None, None);
    assert_eq!(
        (report.users, report.devices, report.conversations, report.records),
        (6, 6, 6, 4 * 65 + 2 + 1)
    );
    assert_eq!(fs::metadata(at("a.jsonl")).unwrap().len(), report.bytes);
    assert_eq!(
        exported(&at("old"), &at("a.jsonl.zst"), None, None),
        ExportReport { bytes: report.bytes, ..report.clone() }
    );
    assert!(fs::metadata(at("a.jsonl.zst")).unwrap().len() < report.bytes / 2, "it is compressed");
    for (engine, name, source) in
        [(EngineKind::Fjall, "fjall", at("a.jsonl")), (EngineKind::Sled, "sled", at("a.jsonl.zst"))]
    {
        let made = imported(&source, &at(name), engine, None).unwrap();
        assert_eq!((made.shards, made.engine.as_str(), made.renumbered), (3, name, false));
        assert_eq!(made.imported.sha256, report.sha256);
        let again = at(&format!("{name}.jsonl"));
        exported(&at(name), &again, None, None);
        assert_eq!(lines(&again), lines(&at("a.jsonl")));
        // A folder like any other: it takes what comes next, and hands out numbers after the old ones.
        let mut world = World::open(&at(name), &options(3, engine));
        let frank = world.user("acme", "frank").await;
        let old = lines(&at("a.jsonl"));
        assert!(!old.iter().any(|line| line.contains(&format!("\"user\":{frank},"))), "{frank} is new");
        let group = world.store.shard_of_conversation(AppId::of("acme"), ConversationClass::Group, "one");
        let one =
            world.reader(group).conversation_by_name(AppId::of("acme"), ConversationClass::Group, "one");
        let one = one.unwrap().unwrap();
        world.commit(group, &[Op::Append { conversation: one, record: message(frank, 106, 1) }]).await;
        assert_eq!(world.reader(group).head(one).unwrap().unwrap().seq, seq(106));
        world.store.close().unwrap();
    }
}

#[tokio::test]
async fn another_shard_count_gives_new_numbers_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    made(&at("old"), &options(3, EngineKind::Sled)).await;
    let report = exported(&at("old"), &at("a.jsonl"), None, None);
    let made = imported(&at("a.jsonl"), &at("new"), EngineKind::Sled, Some(5)).unwrap();
    assert_eq!((made.shards, made.renumbered), (5, true));
    assert_eq!(made.imported.records, report.records);

    let old = World::open(&at("old"), &options(3, EngineKind::Sled));
    let new = World::open(&at("new"), &options(5, EngineKind::Sled));
    let app = AppId::of("acme");
    let user = |world: &World, name: &str| {
        world.reader(world.store.shard_of_user(app, name)).user_by_name(app, name).unwrap().unwrap()
    };
    let names = ["alice", "bob", "carol", "dave", "erin"];
    let users: Vec<(UserId, UserId)> =
        names.iter().map(|name| (user(&old, name), user(&new, name))).collect();
    let map = |old: UserId| users.iter().find(|(from, _)| *from == old).unwrap().1;
    for (before, after) in &users {
        assert!(after.get() > before.get(), "no number that was used means something else");
        let devices = new.reader(after.shard()).devices(*after, None, 10).unwrap();
        assert_eq!(devices, old.reader(before.shard()).devices(*before, None, 10).unwrap());
        let listed = new.reader(after.shard()).user_conversations(*after, None, 100).unwrap();
        let were = old.reader(before.shard()).user_conversations(*before, None, 100).unwrap();
        assert_eq!(listed.len(), were.len());
        for (conversation, _) in listed {
            let meta = new.reader(conversation.shard()).meta(conversation).unwrap();
            assert_eq!(meta.map(|meta| meta.app), Some(app), "a list names what is there");
        }
    }
    let direct = |world: &World, a: UserId, b: UserId| {
        (ConversationClass::Direct, format!("{}:{}", a.min(b), a.max(b)), world.store.shards())
    };
    let ((old_alice, alice), (old_bob, bob)) = (*users.first().unwrap(), *users.get(1).unwrap());
    let mut pairs = vec![(direct(&old, old_alice, old_bob), direct(&new, alice, bob))];
    for name in ["one", "two", "three", "four"] {
        let group = |world: &World| (class_of(name), name.to_owned(), world.store.shards());
        pairs.push((group(&old), group(&new)));
    }
    for ((class, from, _), (_, to, _)) in pairs {
        let find = |world: &World, name: &str| {
            let shard = world.store.shard_of_conversation(app, class, name);
            world.reader(shard).conversation_by_name(app, class, name).unwrap().unwrap()
        };
        let (before, after) = (find(&old, &from), find(&new, &to));
        let (was, is) = (old.reader(before.shard()), new.reader(after.shard()));
        assert_eq!(is.head(after).unwrap(), was.head(before).unwrap());
        let records = is.records(after, Seq::FIRST, seq(1_000), ALL).unwrap();
        let expected =
            was.records(before, Seq::FIRST, seq(1_000), ALL).unwrap().into_iter().map(|record| Record {
                sender: map(record.sender),
                payload: match record.kind {
                    RecordKind::Joined => {
                        let number: u64 = std::str::from_utf8(&record.payload).unwrap().parse().unwrap();
                        map(UserId::new(number).unwrap()).to_string().into()
                    }
                    _ => record.payload.clone(),
                },
                ..record
            });
        assert_eq!(records, expected.collect::<Vec<_>>());
        let mut members: Vec<_> = was.members(before, None, 100).unwrap();
        members.iter_mut().for_each(|(user, _)| *user = map(*user));
        members.sort_unstable_by_key(|(user, _)| *user);
        assert_eq!(is.members(after, None, 100).unwrap(), members);
        for (from, to) in &users {
            assert_eq!(is.read_cursor(after, *to), was.read_cursor(before, *from));
            assert_eq!(is.lane(after, *to, DeviceId::FIRST), was.lane(before, *from, DeviceId::FIRST));
            let recv = new.reader(to.shard()).recv_cursor(*to, DeviceId::FIRST, after);
            assert_eq!(recv, old.reader(from.shard()).recv_cursor(*from, DeviceId::FIRST, before));
        }
    }
}

#[tokio::test]
async fn a_part_is_whole_in_itself() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let last = made(&at("old"), &options(3, EngineKind::Sled)).await;
    let acme = exported(&at("old"), &at("acme.jsonl"), Some("acme"), None);
    assert_eq!((acme.users, acme.conversations, acme.records), (5, 5, 4 * 65 + 2));
    let other = exported(&at("old"), &at("other.jsonl"), Some("other"), None);
    assert_eq!((other.users, other.conversations, other.records), (1, 1, 1));
    let one = exported(&at("old"), &at("one.jsonl"), None, Some(last));
    assert_eq!((one.users, one.conversations, one.records), (5, 1, 65));
    for name in ["acme", "other", "one"] {
        let file = at(&format!("{name}.jsonl"));
        imported(&file, &at(name), EngineKind::Sled, None).unwrap();
        let again = at(&format!("{name}.again.jsonl"));
        exported(&at(name), &again, None, None);
        assert_eq!(lines(&again), lines(&file), "{name}");
        let renumbered = imported(&file, &at(&format!("{name}.2")), EngineKind::Fjall, Some(2)).unwrap();
        assert!(renumbered.renumbered);
    }
    let what = ExportOptions {
        app: None,
        conversation: ConversationId::new(99 * 256),
        numbers: &Digits,
        stop: &RUNNING,
    };
    let missing = export(&at("old"), &StoreOptions::default(), ExportTo::File(&at("x")), &what, &mut |_| {});
    assert!(matches!(missing, Err(MaintainError::NoConversation { .. })), "{missing:?}");
    assert!(!at("x").exists());
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

#[tokio::test]
async fn what_can_not_be_imported_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    made(&at("old"), &options(2, EngineKind::Sled)).await;
    exported(&at("old"), &at("good.jsonl"), None, None);
    let good = fs::read_to_string(at("good.jsonl")).unwrap();
    let all: Vec<&str> = good.split_inclusive('\n').collect();
    let record = all.iter().position(|line| line.starts_with("{\"type\":\"record\"")).unwrap();
    let without = |n: usize| {
        all.iter().enumerate().filter(|(at, _)| *at != n).map(|(_, line)| *line).collect::<String>()
    };
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full/letter.txt"), "dear").unwrap();
    fs::write(at("bad.jsonl"), "").unwrap();
    let before = entries(folder.path());
    for (what, text, want) in [
        ("nothing", String::new(), "it is not whole"),
        ("something else", "hello\n".to_owned(), "not an export of a data folder"),
        ("no header", all.get(1..).unwrap().concat(), "not an export of a data folder"),
        ("a newer one", good.replacen("\"version\":1", "\"version\":2", 1), "use a newer program"),
        ("no end", all.get(..all.len() - 1).unwrap().concat(), "it is not whole"),
        ("cut within a line", good.get(..good.len() - 9).unwrap().to_owned(), "it is not whole"),
        ("a record missing", without(record), "out of place"),
        ("a line missing", without(2), "damaged or was changed"),
        ("another name", good.replacen("\"bob\"", "\"rob\"", 1), "the hash is not that of the lines"),
        (
            "a user twice",
            good.replacen(all.get(2).unwrap(), &[*all.get(2).unwrap(); 2].concat(), 1),
            "for the second time",
        ),
        ("something behind it", format!("{good}{{}}\n"), "something follows its last line"),
        ("a line without end", format!("{}{}", all.first().unwrap(), "x".repeat(100_000)), "too long"),
    ] {
        fs::write(at("bad.jsonl"), &text).unwrap();
        let refused = imported(&at("bad.jsonl"), &at("new"), EngineKind::Sled, None).unwrap_err();
        assert!(matches!(refused, MaintainError::Line { .. }), "{what}: {refused}");
        assert!(refused.to_string().contains(want), "{what}: {refused}");
        assert_eq!(entries(folder.path()), before, "{what}");
    }
    let refused = imported(&at("good.jsonl"), &at("full"), EngineKind::Sled, None).unwrap_err();
    assert!(matches!(refused, MaintainError::NotEmpty { .. }), "{refused}");
    assert_eq!(entries(&at("full")).len(), 1, "what is there stays");

    // Told to stop, in the middle.
    let stop = AtomicBool::new(false);
    let how = ImportOptions { shards: None, numbers: &Digits, stop: &stop };
    let stopped = import(&at("good.jsonl"), &at("new"), &options(2, EngineKind::Sled), &how, &mut |told| {
        if told.doing == "importing" {
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    });
    assert!(matches!(stopped, Err(MaintainError::Stopped)), "{stopped:?}");
    assert_eq!(entries(folder.path()), before);

    // What an import left that was killed does not stand in the way of the next one.
    let killed = at(".new.importing");
    drop(Store::open(&killed, &options(7, EngineKind::Fjall)).unwrap());
    imported(&at("good.jsonl"), &at("new"), EngineKind::Sled, None).unwrap();
    assert!(!killed.exists());
    let twice = ExportOptions { app: None, conversation: None, numbers: &Digits, stop: &RUNNING };
    let exists =
        export(&at("new"), &StoreOptions::default(), ExportTo::File(&at("good.jsonl")), &twice, &mut |_| {});
    assert!(matches!(exists, Err(MaintainError::Exists { .. })), "{exists:?}");
}

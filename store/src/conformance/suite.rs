//! The suite that every engine passes, settled often and hardly ever, open and opened again.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fulmar_protocol::id::{ClassEpoch, DeviceClass, DeviceId, DeviceUid, Epoch, Pseq, Seq, UnixMillis};

use super::{Open, acquire, app, append, block_on, conversation, in_memory, message, seq, until, user};
use crate::{
    CommitError, ConversationClass, ConversationMeta, Device, EngineKind, Limits, Listed, Member, Op,
    PendingLink, Record, Role, StoreOptions, User,
    engine::{Direction, memory::Memory},
    files::{Files, disk::Disk, memory::MemoryFiles},
    key::Table,
    shard::{journal, segments::Placed, settler::EngineOpener, view::open_row},
    store::engine_opener,
};

const ALL: Limits = Limits { records: usize::MAX, bytes: usize::MAX };

/// How a shard is opened for the first time and again.
trait Kind {
    fn files(&self) -> Arc<dyn Files>;
    fn opener(&self) -> EngineOpener;

    fn open(&self, options: &StoreOptions) -> Result<Open, crate::OpenError> {
        Open::over(self.files(), self.opener(), options)
    }
}

struct OnDisk {
    folder: tempfile::TempDir,
    engine: EngineKind,
}

impl OnDisk {
    fn new(engine: EngineKind) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), engine }
    }
}

impl Kind for OnDisk {
    fn files(&self) -> Arc<dyn Files> {
        Arc::new(Disk::new(self.folder.path()))
    }

    fn opener(&self) -> EngineOpener {
        let options =
            StoreOptions { engine: self.engine, engine_cache_bytes: 1 << 20, ..StoreOptions::default() };
        engine_opener(self.folder.path(), &options)
    }
}

#[derive(Default)]
struct InMemory {
    files: MemoryFiles,
    engine: Arc<Memory>,
}

impl Kind for InMemory {
    fn files(&self) -> Arc<dyn Files> {
        Arc::new(self.files.clone())
    }

    fn opener(&self) -> EngineOpener {
        in_memory(&self.engine)
    }
}

/// Settles after every few commits and commits where it is asked to; or never by itself, and by the shard's thread.
fn settling(often: bool) -> StoreOptions {
    StoreOptions {
        settle_bytes: if often { 2_000 } else { 8 << 20 },
        settle_commits: if often { 3 } else { 1 << 20 },
        settle_idle: if often { Duration::from_millis(1) } else { Duration::from_secs(3600) },
        commit_here_within: if often { Duration::from_secs(3600) } else { Duration::ZERO },
        log_ahead_bytes: if often { 20_000 } else { 0 },
        ..StoreOptions::default()
    }
}

fn everywhere(check: impl Fn(&dyn Kind, &StoreOptions)) {
    for often in [false, true] {
        check(&InMemory::default(), &settling(often));
        check(&OnDisk::new(EngineKind::Sled), &settling(often));
        check(&OnDisk::new(EngineKind::Fjall), &settling(often));
    }
}

/// Runs `look` on the shard as it is, after it was dropped and opened again, and after it was closed and opened again.
fn stays(kind: &dyn Kind, options: &StoreOptions, open: Open, look: impl Fn(&Open)) {
    look(&open);
    open.abandon();
    let open = kind.open(options).unwrap();
    look(&open);
    open.close().unwrap();
    let open = kind.open(options).unwrap();
    look(&open);
    open.abandon();
}

fn payload(n: u64) -> Bytes {
    Bytes::from(vec![n as u8; (n as usize * 37) % 900])
}

#[test]
fn records_come_back_as_they_were_written() {
    everywhere(|kind, options| {
        let mut open = kind.open(options).unwrap();
        let mut n = 0;
        for commit in 0..40 {
            let mut batch = Vec::new();
            for _ in 0..=commit % 7 {
                n += 1;
                batch.push(append(1, n, payload(n)));
                batch.push(append(2, n, payload(n + 5)));
            }
            open.commit(&batch).unwrap();
            assert_eq!(open.reader.head(conversation(1)).unwrap().unwrap().seq, seq(n));
        }
        let all: Vec<Record> = (1..=n).map(|n| message(n, payload(n))).collect();
        stays(kind, options, open, |open| {
            let read =
                |from, to, limits| open.reader.records(conversation(1), seq(from), seq(to), limits).unwrap();
            assert_eq!(read(1, n + 10, ALL), all);
            assert_eq!(read(0, 3, ALL), all[..3]);
            for (from, to) in [(1, 1), (5, 50), (n - 1, n), (77, 76), (n + 1, n + 5), (100, n)] {
                let want: Vec<Record> =
                    all.iter().filter(|r| (from..=to).contains(&r.seq.get())).cloned().collect();
                assert_eq!(read(from, to, ALL), want, "{from}..={to}");
            }
            assert_eq!(read(10, n, Limits { records: 7, bytes: usize::MAX }), all[9..16]);
            assert_eq!(read(10, n, Limits { records: 7, bytes: 1 }), all[9..10], "one at least");
            let before =
                |before, limits| open.reader.records_before(conversation(1), seq(before), limits).unwrap();
            assert_eq!(before(n + 1, Limits { records: 50, bytes: usize::MAX }), all[all.len() - 50..]);
            assert_eq!(before(60, Limits { records: 50, bytes: usize::MAX }), all[9..59]);
            assert_eq!(before(4, ALL), all[..3]);
            assert_eq!(before(1, ALL), []);
            let few = before(n + 1, Limits { records: 50, bytes: 3_000 });
            assert!(!few.is_empty() && few.len() < 50 && all.ends_with(&few));
            assert_eq!(open.reader.record(conversation(1), seq(33)).unwrap().as_ref(), all.get(32));
            assert_eq!(open.reader.record(conversation(1), seq(n + 1)).unwrap(), None);
            assert_eq!(open.reader.count_at(conversation(1), seq(33)).unwrap(), 33);
            assert_eq!(open.reader.records(conversation(9), seq(1), seq(5), ALL).unwrap(), []);
            assert_eq!(open.reader.head(conversation(9)).unwrap(), None);
        });
    });
}

#[test]
fn large_and_small_records_lie_side_by_side() {
    everywhere(|kind, options| {
        let mut open = kind.open(options).unwrap();
        let sizes = [0usize, 16_384, 5, 4_096, 4_000, 4_090, 16_384, 16_384, 3, 9_000, 1, 2];
        let records: Vec<Record> =
            sizes.iter().zip(1..).map(|(size, n)| message(n, vec![n as u8; *size])).collect();
        for pair in records.chunks(2) {
            let batch: Vec<Op> = pair
                .iter()
                .map(|record| Op::Append { conversation: conversation(1), record: record.clone() })
                .collect();
            open.commit(&batch).unwrap();
        }
        stays(kind, options, open, |open| {
            for from in 1..=12 {
                let read = open.reader.records(conversation(1), seq(from), seq(99), ALL).unwrap();
                assert_eq!(read, records[from as usize - 1..]);
            }
        });
    });
}

#[test]
fn rows_of_every_kind_come_back() {
    everywhere(|kind, options| {
        let mut open = kind.open(options).unwrap();
        let alice = open.reader.allocate_user().unwrap();
        let bob = open.reader.allocate_user().unwrap();
        let group = open.reader.allocate_conversation().unwrap();
        assert_eq!((alice, bob, group), (user(1), user(2), conversation(1)));
        let now = UnixMillis::new(5).unwrap();
        let named = |name: &str| User { app: app(), name: name.to_owned(), created: now };
        let meta = ConversationMeta {
            app: app(),
            class: ConversationClass::Group,
            name: "crew".to_owned(),
            creator: alice,
            created: now,
        };
        let member = Member { role: Role::Owner, joined: seq(1), since: now };
        let listed = Listed { joined: seq(1), cleared: Seq::ZERO, muted: true, changed: now };
        let device = Device {
            uid: DeviceUid([7; 16]),
            class: DeviceClass::Desktop,
            epoch: Epoch::FIRST,
            class_epoch: ClassEpoch::FIRST,
            seen: now,
        };
        let replaced = Device { uid: DeviceUid([8; 16]), epoch: Epoch::new(2).unwrap(), ..device };
        let link = PendingLink { conversation: group, user: bob, listed: Some(listed) };
        open.commit(&[
            Op::NameUser { user: alice, row: named("alice") },
            Op::NameUser { user: bob, row: named("bob") },
            Op::NameConversation { conversation: group, row: meta.clone() },
            append(1, 1, "created"),
            Op::Member { conversation: group, user: alice, row: Some(member) },
            Op::Member { conversation: group, user: bob, row: Some(Member { role: Role::Admin, ..member }) },
            Op::Listed { user: alice, conversation: group, row: Some(listed) },
            Op::Device { user: alice, device: DeviceId::FIRST, row: device },
            Op::ClassEpoch { user: alice, class: DeviceClass::Desktop, epoch: ClassEpoch::FIRST },
            Op::Link(link),
            Op::Link(PendingLink { user: alice, ..link }),
        ])
        .unwrap();
        assert_eq!(open.reader.member_count(group).unwrap(), 2);
        assert_eq!(open.reader.pending_links(None, 10).unwrap().len(), 2);
        assert_eq!(open.reader.pending_links(Some((group, alice)), 10).unwrap(), [link]);
        open.commit(&[
            Op::Member { conversation: group, user: bob, row: Some(member) },
            Op::Member { conversation: group, user: user(9), row: Some(member) },
            Op::Member { conversation: group, user: user(9), row: None },
            Op::LinkDone { conversation: group, user: alice },
            Op::Device { user: alice, device: DeviceId::FIRST, row: replaced },
            Op::Recv { user: alice, device: DeviceId::FIRST, conversation: group, seq: seq(9) },
            Op::Recv { user: alice, device: DeviceId::FIRST, conversation: group, seq: seq(4) },
            Op::Read { conversation: group, user: bob, seq: seq(8) },
        ])
        .unwrap();
        open.commit(&[
            Op::Read { conversation: group, user: bob, seq: seq(2) },
            Op::Read { conversation: group, user: alice, seq: seq(1) },
            Op::Listed { user: alice, conversation: conversation(77), row: Some(listed) },
            Op::Listed { user: alice, conversation: conversation(78), row: Some(listed) },
            Op::Listed { user: alice, conversation: conversation(77), row: None },
        ])
        .unwrap();
        stays(kind, options, open, |open| {
            let reader = &open.reader;
            assert_eq!(reader.user(alice).unwrap(), Some(named("alice")));
            assert_eq!(reader.user_by_name(app(), "bob").unwrap(), Some(bob));
            assert_eq!(reader.user_by_name(app(), "crew").unwrap(), None, "kinds of names are kept apart");
            let by_name = |class, name| reader.conversation_by_name(app(), class, name).unwrap();
            assert_eq!(by_name(ConversationClass::Group, "crew"), Some(group));
            assert_eq!(by_name(ConversationClass::Direct, "crew"), None);
            assert_eq!(reader.meta(group).unwrap(), Some(meta.clone()));
            assert_eq!(reader.member(group, bob).unwrap(), Some(member));
            assert_eq!(reader.members(group, None, 10).unwrap(), [(alice, member), (bob, member)]);
            assert_eq!(reader.members(group, Some(alice), 10).unwrap(), [(bob, member)]);
            assert_eq!(reader.members(group, None, 1).unwrap(), [(alice, member)]);
            assert_eq!(reader.member_count(group).unwrap(), 2);
            assert_eq!(
                reader.user_conversations(alice, None, 10).unwrap(),
                [(group, listed), (conversation(78), listed)]
            );
            assert_eq!(reader.user_conversation(alice, conversation(77)).unwrap(), None);
            assert_eq!(reader.devices(alice, None, 10).unwrap(), [(DeviceId::FIRST, replaced)]);
            let by_uid = |uid| reader.device_by_uid(alice, DeviceUid([uid; 16])).unwrap();
            assert_eq!((by_uid(7), by_uid(8)), (None, Some((DeviceId::FIRST, replaced))));
            assert_eq!(reader.class_epoch(alice, DeviceClass::Desktop).unwrap(), ClassEpoch::FIRST);
            assert_eq!(reader.class_epoch(alice, DeviceClass::Phone).unwrap(), ClassEpoch::ZERO);
            assert_eq!(
                reader.recv_cursor(alice, DeviceId::FIRST, group).unwrap(),
                seq(9),
                "never moves back"
            );
            assert_eq!(reader.recv_cursors(alice, DeviceId::FIRST, None, 9).unwrap(), [(group, seq(9))]);
            assert_eq!(reader.read_cursor(group, bob).unwrap(), seq(8), "never moves back");
            assert_eq!(reader.read_cursors(group, None, 9).unwrap(), [(alice, seq(1)), (bob, seq(8))]);
            assert_eq!(reader.pending_links(None, 10).unwrap(), [link]);
            // Numbers that were committed are not handed out again.
            assert!(reader.allocate_user().unwrap() > bob);
            assert!(reader.allocate_conversation().unwrap() > group);
        });
    });
}

#[test]
fn lists_longer_than_a_page_are_walked_whole() {
    everywhere(|kind, options| {
        let mut open = kind.open(options).unwrap();
        let member = Member { role: Role::Member, joined: seq(1), since: UnixMillis::default() };
        let set = |n, row| Op::Member { conversation: conversation(1), user: user(n), row };
        for start in [0, 2, 1] {
            let batch: Vec<Op> = (0..100).map(|i| set(1 + start + i * 3, Some(member))).collect();
            open.commit(&batch).unwrap();
        }
        let gone: Vec<Op> = (0..50).map(|i| set(100 + i, None)).collect();
        open.commit(&gone).unwrap();
        let want: Vec<_> = (1..=300).filter(|n| !(100..150).contains(n)).map(user).collect();
        stays(kind, options, open, |open| {
            let mut found = Vec::new();
            loop {
                let page = open.reader.members(conversation(1), found.last().copied(), 7).unwrap();
                if page.is_empty() {
                    break;
                }
                found.extend(page.into_iter().map(|(user, _)| user));
            }
            assert_eq!(found, want);
            assert_eq!(open.reader.member_count(conversation(1)).unwrap(), 250);
        });
    });
}

#[test]
fn lanes_follow_from_records_and_refusals() {
    everywhere(|kind, options| {
        let mut open = kind.open(options).unwrap();
        for n in 1..=70 {
            open.commit(&[append(1, n, "x")]).unwrap();
        }
        let (one, lane) = (user(1), DeviceId::FIRST);
        let refuse = |pseq| Op::Refuse {
            conversation: conversation(1),
            user: one,
            device: lane,
            epoch: Epoch::FIRST,
            pseq: Pseq::new(pseq).unwrap(),
        };
        open.commit(&[refuse(71)]).unwrap();
        let other = Record {
            sender: user(2),
            device: DeviceId::new(5).unwrap(),
            pseq: Pseq::FIRST,
            ..message(71, "y")
        };
        open.commit(&[Op::Append { conversation: conversation(1), record: other }]).unwrap();
        stays(kind, options, open, |open| {
            let state = open.reader.lane(conversation(1), one, lane).unwrap().unwrap();
            assert_eq!((state.epoch, state.last), (Epoch::FIRST, Pseq::new(71).unwrap()));
            assert_eq!(state.seq_of(Pseq::new(70).unwrap()), Some(seq(70)));
            assert_eq!(state.seq_of(Pseq::new(71).unwrap()), Some(Seq::ZERO), "refused for good");
            assert_eq!(state.recent.len(), 64);
            let lanes = open.reader.lanes(conversation(1), None, 10).unwrap();
            let found: Vec<_> = lanes.iter().map(|(u, d, l)| (*u, d.get(), l.last.get())).collect();
            assert_eq!(found, [(one, 1, 71), (user(2), 5, 1)]);
            assert_eq!(open.reader.lanes(conversation(1), Some((one, lane)), 10).unwrap().len(), 1);
            assert_eq!(open.reader.lanes(conversation(1), None, 1).unwrap().len(), 1);
        });
    });
}

#[test]
fn retention_takes_records_and_keeps_the_count() {
    everywhere(|kind, options| {
        let mut open = kind.open(options).unwrap();
        for n in 1..=200 {
            open.commit(&[append(1, n, payload(n))]).unwrap();
        }
        open.commit(&[Op::Low { conversation: conversation(1), low: seq(120), count: 120 }]).unwrap();
        open.commit(&[Op::Low { conversation: conversation(1), low: seq(50), count: 50 }]).unwrap();
        stays(kind, options, open, |open| {
            let head = open.reader.head(conversation(1)).unwrap().unwrap();
            assert_eq!((head.low, head.low_count, head.seq), (seq(120), 120, seq(200)));
            let read = open.reader.records(conversation(1), seq(1), seq(200), ALL).unwrap();
            assert_eq!(read.first().unwrap().seq, seq(121));
            assert_eq!(read.len(), 80);
            assert_eq!(open.reader.records_before(conversation(1), seq(201), ALL).unwrap(), read);
            assert_eq!(open.reader.record(conversation(1), seq(120)).unwrap(), None);
            assert_eq!(open.reader.count_at(conversation(1), seq(7)).unwrap(), 120);
        });
        let engine = kind.opener()(false).unwrap();
        let runs = engine.scan(Table::Run, &[], None, Direction::Ascending, usize::MAX).unwrap();
        for (key, value) in &runs {
            let first = seq(crate::key::number_at(key, 1).unwrap());
            let row = open_row(Table::Run, key, value).unwrap();
            let run = Placed::decode(conversation(1), first, &row).unwrap().run;
            assert!(run.last() > seq(120), "no run below the mark is left: {run:?}");
        }
    });
}

#[test]
fn what_breaks_a_rule_is_refused_and_nothing_is_written() {
    let kind = InMemory::default();
    let mut open = kind.open(&settling(false)).unwrap();
    open.commit(&[append(1, 1, "a")]).unwrap();
    let elsewhere = fulmar_protocol::id::ConversationId::new(256).unwrap();
    let row = User { app: app(), name: "alice".to_owned(), created: UnixMillis::default() };
    open.commit(&[Op::NameUser { user: user(1), row: row.clone() }]).unwrap();
    let last = open.writer.last();
    let bad: Vec<(&str, Vec<Op>)> = vec![
        ("empty", vec![]),
        ("the same seq again", vec![append(1, 1, "b")]),
        ("a gap", vec![append(1, 3, "b")]),
        ("not from 1", vec![append(2, 2, "b")]),
        ("a gap within the batch", vec![append(1, 2, "b"), append(1, 4, "b")]),
        ("another shard", vec![Op::Append { conversation: elsewhere, record: message(1, "b") }]),
        ("too large", vec![append(1, 2, vec![0; 16_385])]),
        ("low beyond the head", vec![Op::Low { conversation: conversation(1), low: seq(2), count: 2 }]),
        ("a name that is taken", vec![Op::NameUser { user: user(2), row: row.clone() }]),
        (
            "one name for two",
            [5, 6]
                .map(|n| Op::NameUser {
                    user: user(n),
                    row: User { name: "carol".to_owned(), ..row.clone() },
                })
                .to_vec(),
        ),
        ("no name", vec![Op::NameUser { user: user(2), row: User { name: String::new(), ..row.clone() } }]),
        ("the store's own", vec![Op::Acquire { epoch: 9 }]),
        (
            "the count goes back",
            vec![Op::Append {
                conversation: conversation(1),
                record: Record { count: 0, ..message(2, "b") },
            }],
        ),
    ];
    for (what, batch) in bad {
        let result = open.commit(&batch);
        assert!(matches!(result, Err(CommitError::Invalid(_))), "{what}: {result:?}");
    }
    let many: Vec<Op> = (2..300).map(|n| append(1, n, vec![1; 16_384])).collect();
    assert!(matches!(open.commit(&many), Err(CommitError::Invalid(_))), "too many bytes");
    assert_eq!(open.writer.last(), last);
    open.commit(&[append(1, 2, "b")]).unwrap();
}

#[test]
fn a_writer_that_acquires_later_fences_the_earlier() {
    let kind = InMemory::default();
    let mut open = kind.open(&settling(false)).unwrap();
    open.commit(&[append(1, 1, "a")]).unwrap();
    let (epoch, last) = acquire(&open.shard).unwrap();
    assert_eq!(
        open.commit(&[append(1, 2, "b")]),
        Err(CommitError::Fenced { mine: epoch - 1, newest: epoch })
    );
    let mut writer = open.shard.writer(epoch, last);
    let stale = crate::CommitId::ZERO;
    let mut body = Vec::new();
    append(1, 2, "b").encode(&mut body);
    let result = block_on(crate::Writer::commit(&mut writer, stale, 1, body.clone().into()));
    assert_eq!(result, Err(CommitError::Conflict { expected: stale, actual: last }));
    let id = block_on(crate::Writer::commit(&mut writer, last, 1, body.into())).unwrap();
    assert_eq!(id.number, last.number + 1);
    assert_eq!(open.reader.head(conversation(1)).unwrap().unwrap().seq, seq(2));
}

#[test]
fn a_commit_whose_future_was_dropped_is_in_the_log_all_the_same() {
    let kind = InMemory::default();
    let mut open = kind.open(&settling(false)).unwrap();
    block_on(async {
        let batch = [append(1, 1, "a")];
        let commit = open.writer.commit(&batch);
        let mut commit = Box::pin(commit);
        // Polled once: the request is in the queue; then nobody waits.
        let _ = futures_poll_once(commit.as_mut()).await;
        drop(commit);
        // The next commit first learns what became of it, and then goes on behind it. Whether the check sees it yet
        // depends on nothing else.
        open.writer.commit(&[append(1, 2, "b")]).await.unwrap();
    });
    assert_eq!(open.reader.records(conversation(1), seq(1), seq(9), ALL).unwrap().len(), 2);
}

async fn futures_poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

#[test]
fn small_commits_are_done_by_who_asks_and_the_threads_look_after_the_rest() {
    let kind = InMemory::default();
    let here = StoreOptions { commit_here_within: Duration::from_secs(3600), ..settling(false) };

    // Never, if not asked for; large ones never.
    let mut open = kind.open(&settling(false)).unwrap();
    open.commit(&[append(1, 1, "a")]).unwrap();
    assert_eq!(open.shard.stats().commits_here, 0);
    open.abandon();
    let mut open = kind.open(&here).unwrap();
    let mut next = 2;
    let mut some = |n: u64| {
        let batch: Vec<Op> = (next..next + n).map(|seq| append(1, seq, "b")).collect();
        next += n;
        batch
    };
    for n in [1, 32, 33, 1] {
        open.commit(&some(n)).unwrap();
    }
    let stats = open.shard.stats();
    assert_eq!(
        (stats.commits_here, stats.commits),
        (3, 5),
        "the epoch's and one of 33 operations are the thread's"
    );
    open.abandon();

    // A layer that is due is closed and settled by the threads, and one that nobody adds to: four commits, with the epoch's.
    for (settle_commits, settle_idle, left) in
        [(3, Duration::from_secs(3600), 1), (1 << 20, Duration::from_millis(2), 0)]
    {
        let mut open =
            InMemory::default().open(&StoreOptions { settle_commits, settle_idle, ..here.clone() }).unwrap();
        for seq in 1..=3 {
            open.commit(&[append(1, seq, "c")]).unwrap();
        }
        until("settled", || open.shard.stats().overlay_commits <= left);
        open.abandon();
    }

    // Nothing is committed beside a shard that is closed, or gone.
    for close in [true, false] {
        let open = kind.open(&here).unwrap();
        let Open { shard, mut writer, reader } = open;
        let head = reader.head(conversation(1)).unwrap().unwrap().seq;
        if close {
            let (reply, answer) = std::sync::mpsc::sync_channel(1);
            shard.requests.send(crate::shard::committer::Request::Close(reply)).unwrap();
            answer.recv().unwrap().unwrap();
        }
        drop(shard);
        let late = [append(1, head.get() + 1, "late")];
        assert!(matches!(block_on(writer.commit(&late)), Err(CommitError::Unavailable { .. })));
        assert_eq!(reader.head(conversation(1)).unwrap().unwrap().seq, head);
    }
}

#[test]
fn readers_see_every_acknowledged_commit_while_it_is_being_settled() {
    everywhere(|kind, _| {
        let options = settling(true);
        let mut open = kind.open(&options).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let acked = std::sync::atomic::AtomicU64::new(0);
        let reader = open.reader.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                use std::sync::atomic::Ordering::SeqCst;
                let mut round = 0u64;
                while !stop.load(SeqCst) {
                    round += 1;
                    let at_least = acked.load(SeqCst);
                    let head = reader.head(conversation(1)).unwrap().unwrap_or_default().seq.get();
                    assert!(head >= at_least, "head {head}, acknowledged {at_least}");
                    let from = 1 + (round * 7) % at_least.max(1);
                    let read = reader.records(conversation(1), seq(from), seq(at_least), ALL).unwrap();
                    let want: Vec<u64> = (from..=at_least).collect();
                    assert_eq!(read.iter().map(|r| r.seq.get()).collect::<Vec<_>>(), want);
                    let members = reader.members(conversation(1), None, 1_000).unwrap();
                    assert!(members.len() as u64 >= at_least, "{} members, {at_least}", members.len());
                    assert!(reader.read_cursor(conversation(1), user(1)).unwrap().get() >= at_least);
                }
            });
            let member = Member { role: Role::Member, joined: seq(1), since: UnixMillis::default() };
            for n in 1..=300 {
                open.commit(&[
                    append(1, n, payload(n)),
                    Op::Member { conversation: conversation(1), user: user(n), row: Some(member) },
                    Op::Read { conversation: conversation(1), user: user(1), seq: seq(n) },
                ])
                .unwrap();
                acked.store(n, std::sync::atomic::Ordering::SeqCst);
            }
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        open.abandon();
    });
}

#[test]
fn commits_that_are_settled_leave_the_log() {
    everywhere(|kind, options| {
        let mut open = kind.open(options).unwrap();
        for n in 1..=50 {
            open.commit(&[append(1, n, payload(n))]).unwrap();
        }
        open.close().unwrap();
        let logs = journal::list(kind.files().as_ref()).unwrap();
        let [(first, bytes)] = logs.as_slice() else { panic!("one file, not {logs:?}") };
        assert_eq!(*first, 52, "without a commit");
        // What it may have ahead: 1 and 4 KiB, to the next 4 KiB; in memory nothing.
        assert!(*bytes == journal::HEADER_BYTES as u64 || options.log_ahead_bytes > 0 && *bytes == 8_192);
    });
}

//! A conversation that grows beyond what everybody is served as it comes, and shrinks again: who has it open gets every record all
//! the time, the others are told where it stands, once for whatever came, until it is small enough.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that finds something wrong stops there"
)]

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use fulmar_gateway::{
    conversation::{
        Command, GroupRequest, MembersRequest,
        shard::{self, IntakeLimits, ShardHandle, ShardLimits, Worker},
    },
    fanout::{owed::Owed, ring::RingLimits, roster::AwayLimits},
    ground::unix_now,
    metrics::Metrics,
};
use fulmar_protocol::{
    frame::{RecordKind, Send},
    id::{AppId, ConversationId, DeviceId, Epoch, Producer, Pseq, Seq, ShardId, UserId},
};
use fulmar_store::{EngineKind, MemoryDisk, Store, StoreOptions};

const INLINE_MAX: usize = 10;

struct World {
    shard: ShardHandle,
    worker: Worker,
    users: Vec<(UserId, String)>,
    conversation: ConversationId,
    pseq: Pseq,
    _store: Store,
}

fn app() -> AppId {
    AppId::of("demo")
}

impl World {
    /// A group of the first so many of 20 users.
    async fn of(members: usize) -> Self {
        let options = StoreOptions {
            shards: 1,
            engine: EngineKind::Memory,
            memory: Some(MemoryDisk::default()),
            ..StoreOptions::default()
        };
        let store = Store::open("", &options).unwrap();
        let (writer, reader) = store.shard(ShardId::new(0).unwrap()).unwrap();
        let limits = ShardLimits {
            ring: RingLimits { records: 64, bytes: 65_536 },
            loaded_max: 1_000,
            members_max: 100,
            inline_members_max: INLINE_MAX,
            receipts_members_max: 2,
            away: AwayLimits { lasts: Duration::from_secs(60), bytes: 1 << 20, marks: 10, members: 10 },
            intake: IntakeLimits::waiting_for(Duration::from_secs(3_600)),
            cursor_delay: Duration::from_secs(3_600),
        };
        let (shard, worker) =
            shard::start(ShardId::new(0).unwrap(), writer, reader, limits, Metrics::default()).unwrap();
        let mut users = Vec::new();
        for number in 0..20 {
            let name = format!("user-{number}");
            let asked = name.clone();
            let user = shard
                .ask(|answer| Command::User { app: app(), name: asked, create: true, answer })
                .await
                .unwrap();
            users.push((user, name));
        }
        let mut all = users.iter().take(members).cloned();
        let owner = all.next().unwrap();
        let request = GroupRequest { app: app(), name: "large".to_owned(), owner, members: all.collect() };
        let (conversation, _) = shard.ask(|answer| Command::Group(request, answer)).await.unwrap();
        Self { shard, worker, users, conversation, pseq: Pseq::ZERO, _store: store }
    }

    fn user(&self, number: usize) -> (UserId, String) {
        self.users.get(number).unwrap().clone()
    }

    async fn online(&self, number: usize) -> Arc<Owed> {
        let (user, _) = self.user(number);
        let session = Arc::new(Owed::new(user, DeviceId::FIRST, number as u64, 1_000));
        let arriving = Arc::clone(&session);
        let _ = self.shard.tell(|answer| Command::Arrive(arriving, answer)).await.unwrap();
        session
    }

    async fn change(&self, add: &[usize], remove: &[usize]) {
        let request = MembersRequest {
            app: app(),
            conversation: self.conversation,
            by: self.user(0).0,
            add: add.iter().map(|number| self.user(*number)).collect(),
            remove: remove.iter().map(|number| self.user(*number)).collect(),
        };
        self.shard.ask(|answer| Command::Members(request, answer)).await.unwrap();
        self.settle().await;
    }

    async fn settle(&self) {
        self.shard.ask(Command::Flush).await.unwrap();
    }

    /// The owner sends so many; answers the head.
    async fn send(&mut self, times: usize) -> Seq {
        for _ in 0..times {
            self.pseq = self.pseq.next().unwrap();
            let user = self.user(0).0;
            let send = Send {
                kind: RecordKind::Message,
                conversation: self.conversation,
                pseq: self.pseq,
                seen: Seq::ZERO,
                reference: None,
                ttl: None,
                more: false,
                continues: false,
                silent: false,
                cancel: false,
                payload: Bytes::from_static(b"hi"),
            };
            let producer = Producer { user, device: DeviceId::FIRST, epoch: Epoch::FIRST };
            let session = Arc::new(Owed::new(user, DeviceId::FIRST, 0, 1_000));
            self.shard.send(Command::Send { session, app: app(), producer, send }).await.unwrap();
        }
        self.settle().await;
        self.shard.reader.head(self.conversation).unwrap().unwrap().seq
    }
}

/// Records that come as they are.
fn live(session: &Owed) -> usize {
    std::iter::from_fn(|| session.take_live(1 << 20, unix_now())).map(|taken| taken.frames.len()).sum()
}

/// Heads that are told, a second later.
fn heads(session: &Owed, told: &mut HashMap<ConversationId, Seq>) -> Vec<Seq> {
    session.remind_heads(told);
    session.take_control().heads.into_iter().map(|head| head.head).collect()
}

#[tokio::test]
async fn whoever_has_a_large_conversation_open_gets_everything_the_others_its_head() {
    let mut world = World::of(INLINE_MAX).await;
    let (opened, other) = (world.online(1).await, world.online(2).await);
    opened.prefer(world.conversation);
    let mut told = HashMap::new();
    world.send(3).await;
    assert_eq!((live(&opened), live(&other)), (3, 3), "a small one: as it comes");
    assert_eq!(heads(&other, &mut told), []);

    // One more member than everybody is served for.
    world.change(&[10], &[]).await;
    let head = world.send(5).await;
    assert_eq!((live(&opened), live(&other)), (6, 0), "the join and five messages, or nothing");
    assert_eq!(heads(&other, &mut told), [head], "once for all of them");
    assert_eq!(heads(&other, &mut told), [], "and not again");
    let head = world.send(2).await;
    assert_eq!(heads(&other, &mut told), [head]);

    // It pulls what there is; what comes then is told as before.
    other.pulled(world.conversation, Seq::FIRST, head.next().unwrap());
    assert_eq!((live(&opened), live(&other)), (2, 0));
    let head = world.send(1).await;
    assert_eq!((live(&opened), live(&other)), (1, 0));
    assert_eq!(heads(&other, &mut told), [head]);

    // Down to the bound and a little below it nothing changes.
    world.change(&[], &[10]).await;
    world.change(&[], &[9]).await;
    let head = world.send(1).await;
    assert_eq!((live(&opened), live(&other)), (3, 0), "10 members, then 9");
    assert_eq!(heads(&other, &mut told), [head]);
    other.pulled(world.conversation, Seq::FIRST, head.next().unwrap());

    // Nine tenths, and it is a small one again.
    world.change(&[], &[8]).await;
    world.send(4).await;
    assert_eq!((live(&opened), live(&other)), (5, 5), "who left, and four messages");
    assert_eq!(heads(&other, &mut told), []);

    // And up again: at the bound it still is.
    world.change(&[8, 9], &[]).await;
    world.send(1).await;
    assert_eq!((live(&opened), live(&other)), (2, 2), "10 members");
    world.change(&[10], &[]).await;
    assert_eq!((live(&opened), live(&other)), (1, 0), "11");

    let World { shard, worker, .. } = world;
    drop(shard);
    assert!(worker.ended().await);
}

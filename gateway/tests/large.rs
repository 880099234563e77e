//! A conversation that grows beyond what everybody is served as it comes, and shrinks again: who has it open gets every record all
//! the time, the others are told where it stands, once for whatever came, until it is small enough.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that finds something wrong stops there"
)]

#[path = "support/shard.rs"]
mod lone_shard;

use std::{collections::HashMap, sync::Arc};

use fulmar_gateway::{
    conversation::{Command, MembersRequest, shard::ShardLimits},
    fanout::owed::Owed,
    ground::unix_now,
};
use fulmar_protocol::id::{AppId, ConversationId, DeviceId, Seq, UserId};
use lone_shard::LoneShard;

const INLINE_MAX: usize = 10;

struct World {
    shard: LoneShard,
    owner: Arc<Owed>,
    users: Vec<(UserId, String)>,
    conversation: ConversationId,
    pseq: u64,
}

fn app() -> AppId {
    AppId::of("demo")
}

impl World {
    /// A group of the first so many of 20 users.
    async fn of(members: usize) -> Self {
        let limits = ShardLimits { inline_members_max: INLINE_MAX, ..lone_shard::limits() };
        let shard = LoneShard::start(limits, |writer| writer);
        let mut users = Vec::new();
        for number in 0..20 {
            let name = format!("user-{number}");
            users.push((shard.user(app(), &name).await, name));
        }
        let conversation = shard.group(app(), "large", users.iter().take(members).cloned()).await;
        let owner = Arc::new(Owed::new(users.first().unwrap().0, DeviceId::FIRST, 0, 1_000));
        Self { shard, owner, users, conversation, pseq: 0 }
    }

    fn user(&self, number: usize) -> (UserId, String) {
        self.users.get(number).unwrap().clone()
    }

    async fn online(&self, number: usize) -> Arc<Owed> {
        self.shard.arrive(app(), self.user(number).0, number as u64).await
    }

    async fn change(&self, add: &[usize], remove: &[usize]) {
        let request = MembersRequest {
            app: app(),
            conversation: self.conversation,
            by: self.user(0).0,
            add: add.iter().map(|number| self.user(*number)).collect(),
            remove: remove.iter().map(|number| self.user(*number)).collect(),
        };
        self.shard.handle.ask(|answer| Command::Members(request, answer)).await.unwrap();
        self.settle().await;
    }

    async fn settle(&self) {
        self.shard.handle.ask(Command::Flush).await.unwrap();
    }

    /// The owner sends so many; answers the head.
    async fn send(&mut self, times: usize) -> Seq {
        for _ in 0..times {
            self.pseq += 1;
            self.shard.send(&self.owner, app(), self.conversation, self.pseq, "hi").await;
        }
        self.settle().await;
        self.shard.handle.reader.head(self.conversation).unwrap().unwrap().seq
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

    let LoneShard { handle, worker, .. } = world.shard;
    drop(handle);
    assert!(worker.ended().await);
}

//! A shard that gets more than it can write: who may write is shared between apps, who may not is told so before anything is
//! decided, with a time to come again; whoever comes again then loses nothing and keeps the order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that finds something wrong stops there"
)]

#[path = "support/shard.rs"]
mod lone_shard;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fulmar_gateway::{
    conversation::shard::{CommitLog, ShardLimits},
    fanout::{
        owed::{Owed, Settled},
        ring::RingLimits,
    },
};
use fulmar_protocol::{
    close::RefusalCode,
    frame::SendRefused,
    id::{AppId, ConversationId, DeviceId, Pseq, Seq},
};
use fulmar_store::{CommitError, Limits, Op, ShardWriter};
use lone_shard::LoneShard;
use tokio::sync::Semaphore;

/// A disk that writes a batch when it is let.
struct Gate {
    writer: ShardWriter,
    open: Arc<Semaphore>,
    begun: Arc<AtomicUsize>,
}

impl CommitLog for Gate {
    async fn commit(&mut self, batch: &[Op]) -> Result<(), CommitError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.open.acquire().await.unwrap().forget();
        self.writer.commit(batch).await.map(|_| ())
    }
}

struct World {
    shard: LoneShard,
    open: Arc<Semaphore>,
    begun: Arc<AtomicUsize>,
}

/// A user of an app with a group of its own, and so many devices that send to it.
struct Crowd {
    app: AppId,
    conversation: ConversationId,
    devices: Vec<Sender>,
}

struct Sender {
    session: Arc<Owed>,
    last: u64,
    acked: Vec<u64>,
    refused: Vec<SendRefused>,
}

impl Sender {
    /// Takes in what the shard has said.
    fn listen(&mut self) {
        for settled in self.session.take_control().settled {
            match settled {
                Settled::Acked { pseq, .. } => self.acked.push(pseq.get()),
                Settled::Refused(refused) => self.refused.push(refused),
                Settled::Before { .. } => panic!("nothing is forgotten"),
            }
        }
    }
}

impl Crowd {
    fn listen(&mut self) -> (usize, usize) {
        self.devices.iter_mut().for_each(Sender::listen);
        let acked = self.devices.iter().map(|device| device.acked.len()).sum();
        (acked, self.devices.iter().map(|device| device.refused.len()).sum())
    }
}

impl World {
    fn new() -> Self {
        let limits = ShardLimits { ring: RingLimits { records: 16, bytes: 65_536 }, ..lone_shard::limits() };
        let (open, begun) = (Arc::new(Semaphore::new(1_000)), Arc::new(AtomicUsize::new(0)));
        let (let_in, counted) = (Arc::clone(&open), Arc::clone(&begun));
        let shard = LoneShard::start(limits, |writer| Gate { writer, open: let_in, begun: counted });
        Self { shard, open, begun }
    }

    async fn crowd(&self, app: &str, devices: u64) -> Crowd {
        let (app, name) = (AppId::of(app), "somebody".to_owned());
        let user = self.shard.user(app, &name).await;
        let conversation = self.shard.group(app, "group", std::iter::once((user, name))).await;
        let devices = (1..=devices).map(|device| {
            let session =
                Arc::new(Owed::new(user, DeviceId::new(device).unwrap(), device, 1_000).of_app(app));
            Sender { session, last: 0, acked: Vec::new(), refused: Vec::new() }
        });
        Crowd { app, conversation, devices: devices.collect() }
    }

    async fn send(&self, crowd: &Crowd, device: usize, pseq: u64) {
        let (session, text) = (&crowd.devices[device].session, format!("{device} {pseq}"));
        self.shard.send(session, crowd.app, crowd.conversation, pseq, text).await;
    }

    /// Every device sends the next so many.
    async fn flood(&self, crowd: &mut Crowd, each: u64) {
        for _ in 0..each {
            for device in 0..crowd.devices.len() {
                crowd.devices[device].last += 1;
                self.send(crowd, device, crowd.devices[device].last).await;
            }
        }
    }

    async fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        for _ in 0..20_000 {
            if done() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{what}: {} wait, {} commits", self.shard.handle.queued(), self.begun.load(Ordering::SeqCst));
    }

    /// So many more batches are written, and the next one is on its way.
    async fn write(&self, batches: usize) {
        let before = self.begun.load(Ordering::SeqCst);
        self.open.add_permits(batches);
        self.until("batches", || self.begun.load(Ordering::SeqCst) >= before + batches).await;
    }

    /// What the log has of a crowd: (device, pseq), in its order.
    fn log(&self, crowd: &Crowd) -> Vec<(u64, u64)> {
        let (mut from, mut found) = (Seq::FIRST, Vec::new());
        let limits = Limits { records: 512, bytes: 1 << 20 };
        loop {
            let page = self
                .shard
                .handle
                .reader
                .records(crowd.conversation, from, Seq::new(1 << 40).unwrap(), limits)
                .unwrap();
            let Some(last) = page.last() else { return found };
            from = last.seq.next().unwrap();
            found.extend(
                page.iter()
                    .filter(|record| record.pseq != Pseq::ZERO)
                    .map(|record| (record.device.get(), record.pseq.get())),
            );
        }
    }
}

#[tokio::test]
async fn a_flood_of_one_app_takes_nothing_of_another_and_what_is_refused_leaves_no_trace() {
    let world = World::new();
    let mut flood = world.crowd("flood", 300).await;
    let mut quiet = world.crowd("quiet", 1).await;
    // From here on the disk writes nothing.
    world.open.forget_permits(1_000);
    let begun = world.begun.load(Ordering::SeqCst);
    world.flood(&mut flood, 1).await;
    world.until("a batch is on its way", || world.begun.load(Ordering::SeqCst) > begun).await;
    world.flood(&mut flood, 60).await;
    let (mut refused, mut looks) = (0, 0);
    let sent = flood.devices.len() * 61;
    world
        .until("the flood is refused", || {
            // The intake is full, and nothing is on its way to it: what is counted as waiting may be a moment old, so it has to stay.
            let before = std::mem::replace(&mut refused, flood.listen().1);
            let full = refused > 1_000 && world.shard.handle.queued() == 8_192;
            looks = if full && refused == before { looks + 1 } else { 0 };
            looks >= 100
        })
        .await;
    assert!(world.log(&flood).is_empty(), "nothing is written, and nobody waits in silence");
    for refusal in flood.devices.iter().flat_map(|device| &device.refused) {
        assert_eq!(
            (refusal.code, refusal.expected),
            (RefusalCode::Busy, refusal.pseq),
            "its number is not used up"
        );
        assert!(refusal.retry_after_ms >= 50, "{refusal:?}");
    }
    // A flood is not alone in the world: others are let in, and have their turn before all of the flood has had it.
    world.flood(&mut quiet, 40).await;
    world.until("the flood gives way", || flood.listen().1 == refused + 40).await;
    assert_eq!(quiet.listen(), (0, 0), "not one of the others is refused");
    world.write(3).await;
    world.until("the quiet ones are written", || quiet.listen().0 == 40).await;
    let (acked, refused) = flood.listen();
    assert!(acked + 4_000 < sent - refused, "before much of the flood: {acked} of {}", sent - refused);
    assert_eq!(world.log(&quiet), (1..=40).map(|pseq| (1, pseq)).collect::<Vec<_>>());

    // Everything that was let in is written, what was refused is not there.
    world.open.add_permits(1_000);
    world
        .until("all is settled", || {
            let (acked, refused) = flood.listen();
            acked + refused == sent
        })
        .await;
    let log = world.log(&flood);
    let (acked, refused) = flood.listen();
    assert_eq!((log.len(), acked + refused), (acked, sent));
    for (number, device) in (1u64..).zip(&flood.devices) {
        let written: Vec<u64> = log.iter().filter(|(of, _)| *of == number).map(|(_, pseq)| *pseq).collect();
        assert_eq!(written, (1..=device.acked.len() as u64).collect::<Vec<_>>(), "no hole, no refused one");
        assert_eq!(written, device.acked);
    }
    assert!(
        world.shard.metrics.encode().contains("fulmar_sends_turned_away_total{reason=\"full\"}"),
        "it is counted"
    );

    // Their clients come again, each with the first that was refused and then the others.
    tokio::time::sleep(Duration::from_millis(10)).await;
    for device in 0..flood.devices.len() {
        flood.devices[device].refused.clear();
        let first = flood.devices[device].acked.len() as u64 + 1;
        for pseq in first..=flood.devices[device].last {
            world.send(&flood, device, pseq).await;
            while world.shard.handle.queued() > 1_000 {
                tokio::task::yield_now().await;
            }
        }
    }
    world.until("everything is written", || flood.listen().0 == sent).await;
    for device in &flood.devices {
        assert_eq!(device.acked, (1..=61).collect::<Vec<_>>(), "once, in order");
        assert!(device.refused.is_empty(), "{:?}", device.refused);
    }
    assert_eq!(world.log(&flood).len(), sent);
    let LoneShard { handle, worker, .. } = world.shard;
    drop(handle);
    assert!(worker.ended().await);
}

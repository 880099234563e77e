//! One shard without a gateway around it, its log in memory: what it decides and whom it tells, without connections.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part of it")]

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fulmar_gateway::{
    conversation::{
        Command, GroupRequest,
        shard::{self, CommitLog, IntakeLimits, ShardHandle, ShardLimits, Worker},
    },
    fanout::{owed::Owed, ring::RingLimits, roster::AwayLimits},
    metrics::Metrics,
};
use fulmar_protocol::{
    frame::{RecordKind, Send},
    id::{AppId, ConversationId, DeviceId, Epoch, Producer, Pseq, Seq, ShardId, UserId},
};
use fulmar_store::{EngineKind, MemoryDisk, ShardWriter, Store, StoreOptions};

/// Bounds that nothing in a small test comes near.
pub fn limits() -> ShardLimits {
    ShardLimits {
        ring: RingLimits { records: 64, bytes: 65_536 },
        loaded_max: 1_000,
        members_max: 100,
        inline_members_max: 100,
        receipts_members_max: 2,
        away: AwayLimits { lasts: Duration::from_secs(60), bytes: 1 << 20, marks: 10, members: 10 },
        intake: IntakeLimits::waiting_for(Duration::from_secs(3_600)),
        cursor_delay: Duration::from_secs(3_600),
    }
}

/// A shard that runs.
#[derive(Debug)]
pub struct LoneShard {
    pub handle: ShardHandle,
    pub worker: Worker,
    pub metrics: Metrics,
    _store: Store,
}

impl LoneShard {
    /// With something between it and its log.
    pub fn start<W: CommitLog>(limits: ShardLimits, wrap: impl FnOnce(ShardWriter) -> W) -> Self {
        let options = StoreOptions {
            shards: 1,
            engine: EngineKind::Memory,
            memory: Some(MemoryDisk::default()),
            ..StoreOptions::default()
        };
        let store = Store::open("", &options).unwrap();
        let number = ShardId::new(0).unwrap();
        let (writer, reader) = store.shard(number).unwrap();
        let metrics = Metrics::default();
        let (handle, worker) = shard::start(number, wrap(writer), reader, limits, metrics.clone()).unwrap();
        Self { handle, worker, metrics, _store: store }
    }

    /// The number of a user, who may be new.
    pub async fn user(&self, app: AppId, name: &str) -> UserId {
        let name = name.to_owned();
        self.handle.ask(|answer| Command::User { app, name, create: true, answer }).await.unwrap()
    }

    /// A group; the first of its members makes it.
    pub async fn group(
        &self,
        app: AppId,
        name: &str,
        mut members: impl Iterator<Item = (UserId, String)>,
    ) -> ConversationId {
        let owner = members.next().unwrap();
        let request = GroupRequest { app, name: name.to_owned(), owner, members: members.collect() };
        self.handle.ask(|answer| Command::Group(request, answer)).await.unwrap().0
    }

    /// A session of a user's first device.
    pub async fn arrive(&self, app: AppId, user: UserId, connection: u64) -> Arc<Owed> {
        let session = Arc::new(Owed::new(user, DeviceId::FIRST, connection, 1_000).of_app(app));
        let arriving = Arc::clone(&session);
        let _ = self.handle.tell(|answer| Command::Arrive(arriving, answer)).await.unwrap();
        session
    }

    /// A message; its fate is told to `session`.
    pub async fn send(
        &self,
        session: &Arc<Owed>,
        app: AppId,
        conversation: ConversationId,
        pseq: u64,
        payload: impl Into<Bytes>,
    ) {
        let producer = Producer { user: session.user, device: session.device, epoch: Epoch::FIRST };
        let send = Send {
            kind: RecordKind::Message,
            conversation,
            pseq: Pseq::new(pseq).unwrap(),
            seen: Seq::ZERO,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: payload.into(),
        };
        let session = Arc::clone(session);
        self.handle.send(Command::Send { session, app, producer, send }).await.unwrap();
    }
}

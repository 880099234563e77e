//! What is written: records of 200 bytes, one conversation after the other, from one producer.
//!
//! Not here: how fast (the modules that measure).

use anyhow::Context as _;
use bytes::Bytes;
use fulmar_benches::payload::Payloads;
use fulmar_protocol::id::{AppId, ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UnixMillis, UserId};
use fulmar_store::{
    ConversationClass, ConversationMeta, EngineKind, Op, Record, RecordKind, ShardReader, ShardStats,
    ShardWriter, Store, StoreOptions, User,
};

/// Bytes of a record's payload.
pub(crate) const PAYLOAD_BYTES: usize = 200;

/// Bytes of a record besides its payload; what a record of the store has, about, and what the bare file writes.
pub(crate) const HEADER_BYTES: usize = 26;

/// Bytes of a record.
pub(crate) const RECORD_BYTES: usize = PAYLOAD_BYTES + HEADER_BYTES;

/// Conversations the records are spread over, unless a measurement is about their number.
pub(crate) const CONVERSATIONS: u64 = 100;

/// Conversations named in one commit.
const NAMED_AT_ONCE: usize = 1_000;

/// Different payloads; a power of two.
const BODIES: u64 = 1_024;

/// Payloads, the same in every process.
pub(crate) fn bodies() -> Vec<Bytes> {
    let mut payloads = Payloads::new(1);
    (0..BODIES).map(|_| payloads.body(PAYLOAD_BYTES)).collect()
}

/// A store as it is opened here: everything at its default, but a shard that nobody writes to settles soon, so that
/// the end of settling and merging can be waited for.
pub(crate) fn options(engine: EngineKind, shards: u16) -> StoreOptions {
    StoreOptions {
        shards,
        engine,
        settle_idle: std::time::Duration::from_millis(300),
        ..StoreOptions::default()
    }
}

/// One shard being written.
pub(crate) struct Load {
    user: UserId,
    heads: Vec<(ConversationId, u64)>,
    bodies: Vec<Bytes>,
    written: u64,
}

impl Load {
    /// Names the user and the conversations.
    pub(crate) async fn prepare(
        writer: &mut ShardWriter,
        reader: &ShardReader,
        conversations: u64,
    ) -> anyhow::Result<Self> {
        let app = AppId::of("bench");
        let user = reader.allocate_user().context("no more users")?;
        let created = UnixMillis::default();
        let name = format!("writer {}", writer.shard());
        let mut ops = vec![Op::NameUser { user, row: User { app, name, created } }];
        let mut heads = Vec::new();
        for number in 0..conversations {
            let conversation = reader.allocate_conversation().context("no more conversations")?;
            let (class, name) = (ConversationClass::Group, format!("group {number}"));
            let row = ConversationMeta { app, class, name, creator: user, created };
            ops.push(Op::NameConversation { conversation, row });
            heads.push((conversation, 0));
            if ops.len() >= NAMED_AT_ONCE {
                writer.commit(&ops).await?;
                ops.clear();
            }
        }
        if !ops.is_empty() {
            writer.commit(&ops).await?;
        }
        Ok(Self { user, heads, bodies: bodies(), written: 0 })
    }

    /// Appends the next `count` records to `ops`.
    pub(crate) fn fill(&mut self, ops: &mut Vec<Op>, count: usize) -> anyhow::Result<()> {
        for _ in 0..count {
            let turn = usize::try_from(self.written)? % self.heads.len();
            ops.push(self.append(turn)?);
        }
        Ok(())
    }

    /// The next record of one conversation.
    pub(crate) fn append(&mut self, turn: usize) -> anyhow::Result<Op> {
        let body = usize::try_from(self.written % BODIES)?;
        let payload = self.bodies.get(body).context("a payload")?.clone();
        let (conversation, head) = self.heads.get_mut(turn).context("a conversation")?;
        *head += 1;
        self.written += 1;
        let record = Record {
            seq: Seq::new(*head).context("seq")?,
            kind: RecordKind::Message,
            sender: self.user,
            device: DeviceId::FIRST,
            epoch: Epoch::FIRST,
            pseq: Pseq::new(*head).context("pseq")?,
            time: UnixMillis::new(1_800_000_000_000 + self.written).context("time")?,
            count: *head,
            target: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload,
        };
        Ok(Op::Append { conversation: *conversation, record })
    }

    /// Records so far.
    pub(crate) const fn written(&self) -> u64 {
        self.written
    }

    /// Who writes.
    pub(crate) const fn user(&self) -> UserId {
        self.user
    }

    /// The conversations, with the seq of the last record of each.
    pub(crate) fn heads(&self) -> &[(ConversationId, u64)] {
        &self.heads
    }
}

/// A writer and a reader of each shard.
pub(crate) fn shards(store: &Store) -> anyhow::Result<Vec<(ShardWriter, ShardReader)>> {
    let ids = (0..store.shards()).map(|number| ShardId::new(number).context("a shard"));
    ids.map(|id| Ok(store.shard(id?)?)).collect()
}

/// A current-thread runtime: each thread that commits has one.
pub(crate) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_time().build()
}

/// The figures of all shards together; those that can't be added are the first shard's.
pub(crate) fn stats(store: &Store) -> anyhow::Result<ShardStats> {
    let mut sum = ShardStats::default();
    for number in 0..store.shards() {
        let one = store.stats(ShardId::new(number).context("a shard")?)?;
        if let Some(why) = one.failing {
            anyhow::bail!("the store fails: {why}");
        }
        sum.commits += one.commits;
        sum.barriers += one.barriers;
        sum.background_syncs += one.background_syncs;
        sum.settle_behind += one.settle_behind;
        sum.overlay_commits += one.overlay_commits;
        sum.segments += one.segments;
        sum.segment_bytes += one.segment_bytes;
        sum.merges += one.merges;
        sum.log_bytes += one.log_bytes;
        sum.index_bytes += one.index_bytes;
        sum.disk_bytes += one.disk_bytes;
        sum.replayed += one.replayed;
    }
    Ok(sum)
}

//! Writing a shard: batches are checked, encoded, committed to the log, and visible to readers when the answer comes.
//!
//! - One writer per shard, and one commit in flight: [`ShardWriter::commit`] borrows it.
//! - A batch that breaks a rule of the log is refused before anything is written.
//!
//! Not here: who may do what (the gateway), what is written and by whom (`shard::committer`).

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        mpsc::{SyncSender, TrySendError},
    },
};

use bytes::Bytes;
use fulmar_protocol::{
    id::{ConversationId, Seq, ShardId, UserId},
    limit::NAME_BYTES_MAX,
};
use rustc_hash::FxHashMap;
use tokio::sync::oneshot;

use crate::{
    commit::CommitId,
    error::CommitError,
    key::{self, Key, Table},
    log::Writer,
    op::{BATCH_BYTES_MAX, BATCH_OPS_MAX, Op},
    reader::ShardReader,
    record::RECORD_PAYLOAD_BYTES_MAX,
    row::Number,
    shard::committer::{Committer, Request},
};

/// What became of a batch: it is in the log for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The commit that holds it.
    pub commit: CommitId,
}

/// Writes one shard. There is one at a time; whoever acquires the shard later fences this one.
#[derive(Debug)]
pub struct ShardWriter {
    pub(crate) writer: EmbeddedWriter,
    pub(crate) reader: ShardReader,
}

impl ShardWriter {
    /// The shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.reader.shard()
    }

    /// The last commit this writer knows of.
    #[must_use]
    pub fn last(&self) -> CommitId {
        self.writer.last()
    }

    /// Commits a batch: all of it or nothing, durable when this returns `Ok`, and readers see it then.
    ///
    /// Dropping the future does not take the batch back; the next commit waits until it is decided. A small batch may be committed
    /// on this thread, which waits for the disk meanwhile, if [`StoreOptions::commit_here_within`](crate::StoreOptions) says so.
    ///
    /// # Errors
    /// [`CommitError`]; nothing of the batch is acknowledged. After [`CommitError::Unavailable`] it may be in the log or
    /// not, which the next opening shows; after the others it is not.
    pub async fn commit(&mut self, batch: &[Op]) -> Result<Committed, CommitError> {
        self.writer.settle_pending().await;
        let (ops, body) = self.encode(batch)?;
        let expected = self.writer.last();
        let commit = self.writer.commit(expected, ops, body).await?;
        Ok(Committed { commit })
    }

    fn encode(&self, batch: &[Op]) -> Result<(u32, Bytes), CommitError> {
        if batch.is_empty() || batch.len() > BATCH_OPS_MAX {
            let text = format!("a batch has 1 to {BATCH_OPS_MAX} operations, not {}", batch.len());
            return Err(CommitError::Invalid(text));
        }
        let mut check = Check {
            reader: &self.reader,
            logs: FxHashMap::default(),
            members: FxHashMap::default(),
            names: HashMap::new(),
        };
        let mut body = Vec::with_capacity(64 * batch.len());
        for op in batch {
            check.op(op)?;
            op.encode(&mut body);
        }
        let mut ops = batch.len();
        for (conversation, log) in check.logs {
            if let Some(members) = log.new_member_count {
                Op::MemberCount { conversation, members }.encode(&mut body);
                ops += 1;
            }
        }
        if body.len() > BATCH_BYTES_MAX {
            let text =
                format!("a batch of {} bytes is too large, {BATCH_BYTES_MAX} are the limit", body.len());
            return Err(CommitError::Invalid(text));
        }
        Ok((u32::try_from(ops).unwrap_or(u32::MAX), body.into()))
    }
}

/// What a batch did to a conversation's log so far.
#[derive(Debug)]
struct Log {
    seq: Seq,
    count: u64,
    members: u64,
    new_member_count: Option<u64>,
}

/// The rules of the log.
struct Check<'a> {
    reader: &'a ShardReader,
    logs: FxHashMap<ConversationId, Log>,
    /// Memberships as the batch left them so far.
    members: FxHashMap<(ConversationId, UserId), bool>,
    /// Names the batch gave so far, by their keys.
    names: HashMap<Vec<u8>, u64>,
}

impl Check<'_> {
    fn op(&mut self, op: &Op) -> Result<(), CommitError> {
        match op {
            Op::Append { conversation, record } => {
                if record.payload.len() > RECORD_PAYLOAD_BYTES_MAX {
                    let bytes = record.payload.len();
                    return invalid(format!("a payload of {bytes} bytes is too large for a record"));
                }
                let log = self.log(*conversation)?;
                let next = log.seq.next();
                if Some(record.seq) != next {
                    let seq = record.seq;
                    return invalid(format!(
                        "conversation {conversation}: record {seq} does not follow {}",
                        log.seq
                    ));
                }
                if record.count < log.count {
                    return invalid(format!(
                        "conversation {conversation}: the count goes back at {}",
                        record.seq
                    ));
                }
                log.seq = record.seq;
                log.count = record.count;
                Ok(())
            }
            Op::Member { conversation, user, row } => {
                let known = match self.members.get(&(*conversation, *user)) {
                    Some(known) => *known,
                    None => self.reader.member(*conversation, *user)?.is_some(),
                };
                let log = self.log(*conversation)?;
                match (known, row.is_some()) {
                    (false, true) => log.members = log.members.saturating_add(1),
                    (true, false) => log.members = log.members.saturating_sub(1),
                    (true, true) | (false, false) => {}
                }
                log.new_member_count = Some(log.members);
                self.members.insert((*conversation, *user), row.is_some());
                Ok(())
            }
            Op::Low { conversation, low, .. } => {
                let head = self.log(*conversation)?.seq;
                if *low > head {
                    return invalid(format!(
                        "conversation {conversation}: low {low} is beyond the head {head}"
                    ));
                }
                Ok(())
            }
            Op::NameUser { user, row } => {
                self.here(user.shard())?;
                self.name(&Key::name(row.app, key::KIND_USER, &row.name), &row.name, user.get())
            }
            Op::NameConversation { conversation, row } => {
                self.here(conversation.shard())?;
                let name = Key::name(row.app, key::kind_of(row.class), &row.name);
                self.name(&name, &row.name, conversation.get())
            }
            Op::Refuse { conversation, .. }
            | Op::Read { conversation, .. }
            | Op::LinkDone { conversation, .. } => self.here(conversation.shard()),
            Op::Link(link) => self.here(link.conversation.shard()),
            Op::Listed { user, .. }
            | Op::Device { user, .. }
            | Op::ClassEpoch { user, .. }
            | Op::Recv { user, .. } => self.here(user.shard()),
            Op::MemberCount { .. } | Op::Acquire { .. } => invalid("the store writes that itself".to_owned()),
        }
    }

    fn here(&self, shard: ShardId) -> Result<(), CommitError> {
        let mine = self.reader.shard();
        if shard == mine { Ok(()) } else { invalid(format!("a row of shard {shard} in shard {mine}")) }
    }

    fn name(&mut self, key: &Key, name: &str, number: u64) -> Result<(), CommitError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return invalid(format!("a name has 1 to {NAME_BYTES_MAX} bytes, not {}", name.len()));
        }
        let stored: Option<Number> = self.reader.shared.view.row(Table::Name, key)?;
        let owner = *self
            .names
            .entry(key.as_ref().to_vec())
            .or_insert_with(|| stored.map_or(number, |stored| stored.0));
        if owner == number { Ok(()) } else { invalid(format!("the name belongs to {owner}")) }
    }

    fn log(&mut self, conversation: ConversationId) -> Result<&mut Log, CommitError> {
        use std::collections::hash_map::Entry;
        self.here(conversation.shard())?;
        match self.logs.entry(conversation) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let head = self.reader.head(conversation)?.unwrap_or_default();
                let log =
                    Log { seq: head.seq, count: head.count, members: head.members, new_member_count: None };
                Ok(entry.insert(log))
            }
        }
    }
}

fn invalid<T>(text: String) -> Result<T, CommitError> {
    Err(CommitError::Invalid(text))
}

/// Writes to the embedded log of one shard.
#[derive(Debug)]
pub struct EmbeddedWriter {
    requests: SyncSender<Request>,
    committer: Arc<Mutex<Committer>>,
    epoch: u64,
    last: CommitId,
    /// The answer to a commit that nobody has waited for to the end.
    pending: Option<oneshot::Receiver<Result<CommitId, CommitError>>>,
}

impl EmbeddedWriter {
    pub(crate) fn new(
        requests: SyncSender<Request>,
        committer: Arc<Mutex<Committer>>,
        epoch: u64,
        last: CommitId,
    ) -> Self {
        Self { requests, committer, epoch, last, pending: None }
    }

    /// Commits on this thread, if that is expected to be quick and the shard's own thread has nothing to do.
    fn commit_here(
        &mut self,
        expected: CommitId,
        ops: u32,
        body: &Bytes,
    ) -> Option<Result<CommitId, CommitError>> {
        let (result, look) = self.committer.try_lock().ok()?.commit_here(self.epoch, expected, ops, body)?;
        if look {
            // A full queue has the thread's attention already.
            let _ = self.requests.try_send(Request::Look);
        }
        if let Ok(id) = result {
            self.last = id;
        }
        Some(result)
    }

    async fn settle_pending(&mut self) {
        if self.pending.is_some() {
            let _ = self.answer().await;
        }
    }

    async fn answer(&mut self) -> Result<CommitId, CommitError> {
        let Some(pending) = &mut self.pending else { return Err(gone()) };
        let result = pending.await.unwrap_or_else(|_| Err(gone()));
        self.pending = None;
        if let Ok(id) = result {
            self.last = id;
        }
        result
    }
}

fn gone() -> CommitError {
    CommitError::Unavailable { reason: "the shard's thread is gone".to_owned() }
}

/// Puts a request into a committer's queue without waiting.
pub(crate) fn ask(requests: &SyncSender<Request>, request: Request) -> Result<(), CommitError> {
    requests.try_send(request).map_err(|error| match error {
        TrySendError::Full(_) => {
            CommitError::Unavailable { reason: "too many requests wait for the shard".to_owned() }
        }
        TrySendError::Disconnected(_) => gone(),
    })
}

impl Writer for EmbeddedWriter {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn last(&self) -> CommitId {
        self.last
    }

    async fn commit(&mut self, expected: CommitId, ops: u32, body: Bytes) -> Result<CommitId, CommitError> {
        self.settle_pending().await;
        if let Some(result) = self.commit_here(expected, ops, &body) {
            return result;
        }
        let (reply, answer) = oneshot::channel();
        ask(&self.requests, Request::Commit { epoch: self.epoch, expected, ops, body, reply })?;
        self.pending = Some(answer);
        self.answer().await
    }
}

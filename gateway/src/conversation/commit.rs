//! A batch on its way to disk: the operations, and what happens once they are there.
//!
//! - Effects run in the order in which they were decided, and only after the commit; when it fails, whoever wanted to
//!   write is refused, whoever only asked is asked for again, and nothing is published.
//! - A batch is closed by its bounds; what comes after waits in the shard's queue.

use std::sync::Arc;

use fulmar_protocol::{
    frame::SendRefused,
    id::{ConversationId, Pseq, Seq, UnixMillis, UserId},
};
use fulmar_store::{BATCH_BYTES_MAX, BATCH_OPS_MAX, Op, Record};

use super::command::{Command, Refusal};
use crate::fanout::owed::{Owed, Settled};

/// What happens once a batch is on disk.
pub(super) enum Effect {
    /// Tell a session the fate of its send.
    Settle(Arc<Owed>, Settled),
    /// Hand a record to whoever is here.
    Publish {
        /// The conversation.
        conversation: ConversationId,
        /// The record.
        record: Record,
        /// Who is to be told from this record on.
        joined: Vec<UserId>,
        /// Who is not to be told after this record.
        left: Vec<UserId>,
    },
    /// Answer somebody.
    Answer {
        /// The conversation the answer is about, if one.
        about: Option<ConversationId>,
        /// Gives it.
        give: Give,
    },
    /// Readers who are here learn that a conversation begins later now.
    Trimmed {
        /// The conversation.
        conversation: ConversationId,
        /// The last record that is gone.
        low: Seq,
        /// Its `count`.
        count: u64,
    },
}

/// Answers that the batch is on disk, or the refusal. Whoever only asked gives the question back when the batch failed:
/// it can be answered without it.
pub(super) type Give = Box<dyn FnOnce(Result<(), Refusal>) -> Option<Command> + Send>;

impl Effect {
    /// The conversation it is about, if one.
    pub(super) fn about(&self) -> Option<ConversationId> {
        match self {
            Self::Settle(
                _,
                Settled::Acked { conversation, .. }
                | Settled::Before { conversation, .. }
                | Settled::Refused(SendRefused { conversation, .. }),
            )
            | Self::Publish { conversation, .. }
            | Self::Trimmed { conversation, .. } => Some(*conversation),
            Self::Answer { about, .. } => *about,
        }
    }
}

/// The conversation of this shard whose log an operation changes, if it changes one.
pub(super) const fn conversation_of(op: &Op) -> Option<ConversationId> {
    match op {
        Op::Append { conversation, .. }
        | Op::Refuse { conversation, .. }
        | Op::NameConversation { conversation, .. }
        | Op::Member { conversation, .. }
        | Op::Read { conversation, .. }
        | Op::Low { conversation, .. }
        | Op::LinkDone { conversation, .. }
        | Op::MemberCount { conversation, .. } => Some(*conversation),
        Op::Link(link) => Some(link.conversation),
        Op::NameUser { .. }
        | Op::Listed { .. }
        | Op::Device { .. }
        | Op::ClassEpoch { .. }
        | Op::Recv { .. }
        | Op::Acquire { .. } => None,
    }
}

impl std::fmt::Debug for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Settle(_, settled) => f.debug_tuple("Settle").field(settled).finish(),
            Self::Publish { conversation, record, .. } => f
                .debug_struct("Publish")
                .field("conversation", conversation)
                .field("seq", &record.seq)
                .finish(),
            Self::Answer { about, .. } => {
                f.debug_struct("Answer").field("about", about).finish_non_exhaustive()
            }
            Self::Trimmed { conversation, low, .. } => f
                .debug_struct("Trimmed")
                .field("conversation", conversation)
                .field("low", low)
                .finish_non_exhaustive(),
        }
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) ops: Vec<Op>,
    pub(super) effects: Vec<Effect>,
    bytes: usize,
}

/// Bytes an operation may take besides its payload; a generous bound, the store checks the exact one.
const OP_BYTES: usize = 512;

impl Batch {
    pub(super) fn push(&mut self, op: Op) {
        self.bytes += OP_BYTES
            + match &op {
                Op::Append { record, .. } => record.payload.len(),
                _ => 0,
            };
        self.ops.push(op);
    }

    pub(super) fn extend(&mut self, ops: impl IntoIterator<Item = Op>) {
        for op in ops {
            self.push(op);
        }
    }

    /// Whether the next command still fits, whatever it is.
    pub(super) fn has_room(&self) -> bool {
        self.ops.len() + 4 * fulmar_protocol::service::PAGE_MAX < BATCH_OPS_MAX
            && self.bytes < BATCH_BYTES_MAX / 2
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ops.is_empty() && self.effects.is_empty()
    }

    pub(super) fn acked(
        &mut self,
        session: Arc<Owed>,
        conversation: ConversationId,
        pseq: Pseq,
        seq: Seq,
        time: UnixMillis,
    ) {
        self.effects.push(Effect::Settle(session, Settled::Acked { conversation, pseq, seq, time }));
    }

    pub(super) fn refused(
        &mut self,
        session: Arc<Owed>,
        conversation: ConversationId,
        pseq: Pseq,
        refusal: Refusal,
        expected: Pseq,
    ) {
        self.effects.push(Effect::Settle(
            session,
            Settled::Refused(send_refused(conversation, pseq, refusal, expected)),
        ));
    }

    pub(super) fn answer(&mut self, about: Option<ConversationId>, give: Give) {
        self.effects.push(Effect::Answer { about, give });
    }

    /// Takes out everything about one conversation, and returns what was to happen after its commit.
    pub(super) fn take_out(&mut self, conversation: ConversationId) -> Vec<Effect> {
        let before = std::mem::take(self);
        let mut out = Vec::new();
        for op in before.ops {
            if conversation_of(&op) != Some(conversation) {
                self.push(op);
            }
        }
        for effect in before.effects {
            if effect.about() == Some(conversation) { out.push(effect) } else { self.effects.push(effect) }
        }
        out
    }
}

/// A refusal as the client is told it.
pub(super) fn send_refused(
    conversation: ConversationId,
    pseq: Pseq,
    refusal: Refusal,
    expected: Pseq,
) -> SendRefused {
    SendRefused { conversation, pseq, code: refusal.code, expected, retry_after_ms: refusal.retry_after_ms }
}

//! What a device that connects has missed: its cursors against the heads of its user's conversations.
//!
//! - As a rule it is known where something may have changed while the device was away (`fanout::roster`): then work follows
//!   what changed. Where nothing is known, every conversation of its user is looked at ([`missed`]).
//! - Either way a conversation is judged alike, and bytes only follow what changed.
//! - The session is present in the rosters before this runs, so nothing falls between.

use std::collections::HashMap;

use fulmar_protocol::{
    frame,
    id::{ConversationId, DeviceId, Seq, UserId},
};
use fulmar_store::{ReadError, ShardReader};

use super::catchup::{low, member};
use crate::fanout::owed::Owed;

/// One conversation in which the device lacks something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// The first record it lacks and may see.
    pub next: Seq,
    /// Records between its cursor and `next` are gone, or were never for it: it must be told.
    pub gap: bool,
    /// How far the conversation has come.
    pub head: frame::Head,
}

/// What was found, and how many heads were read for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// The shortest first: most conversations are complete soonest, and a long one harms no other.
    pub missed: Vec<Missed>,
    /// Conversations that were looked at.
    pub heads: u64,
}

impl Looked {
    fn at(
        &mut self,
        reader: &ShardReader,
        conversation: ConversationId,
        (user, open_to_all): (UserId, bool),
        cursor: Seq,
    ) -> Result<(), ReadError> {
        self.heads += 1;
        let Some(head) = reader.head(conversation)? else { return Ok(()) };
        if cursor >= head.seq {
            return Ok(());
        }
        let Some(member) = member(reader, conversation, user, open_to_all)? else { return Ok(()) };
        let low = low(&head, &member);
        let next = cursor.saturating_add(1).max(low);
        let head = frame::Head { conversation, head: head.seq, count: head.count, low };
        self.missed.push(Missed { next, gap: next.prev() > cursor, head });
        Ok(())
    }

    fn sorted(mut self) -> Self {
        self.missed
            .sort_unstable_by_key(|missed| (missed.head.head.since(missed.next), missed.head.conversation));
        self
    }
}

/// Finds out what is missed in all conversations of a user, and in those everybody of the user's app reads (`broadcasts`). `shard_of`
/// gives the reader of a conversation's shard. Blocks while it reads.
///
/// # Errors
/// A list or a head can't be read.
pub fn missed(
    user_reader: &ShardReader,
    shard_of: impl Fn(ConversationId) -> Option<ShardReader>,
    user: UserId,
    broadcasts: &[ConversationId],
    cursors: &HashMap<ConversationId, Seq>,
) -> Result<Looked, ReadError> {
    let mut looked = Looked::default();
    let cursor = |conversation| cursors.get(&conversation).copied().unwrap_or_default();
    for conversation in broadcasts {
        let Some(reader) = shard_of(*conversation) else { continue };
        looked.at(&reader, *conversation, (user, true), cursor(*conversation))?;
    }
    let mut after = None;
    loop {
        let page = user_reader.user_conversations(user, after, 1_024)?;
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        for (conversation, _) in &page {
            let Some(reader) = shard_of(*conversation) else { continue };
            looked.at(&reader, *conversation, (user, false), cursor(*conversation))?;
        }
    }
    Ok(looked.sorted())
}

/// Finds out what is missed in these conversations, which are all in which something may be; `cursors` are those of the
/// device there. Membership is the conversation's own word, so a list that does not follow yet hides nothing. Blocks while
/// it reads.
///
/// # Errors
/// A head can't be read.
pub fn missed_among(
    conversations: impl IntoIterator<Item = ConversationId>,
    shard_of: impl Fn(ConversationId) -> Option<ShardReader>,
    user: UserId,
    broadcasts: &[ConversationId],
    cursors: &HashMap<ConversationId, Seq>,
) -> Result<Looked, ReadError> {
    let mut looked = Looked::default();
    for conversation in conversations {
        let Some(reader) = shard_of(conversation) else { continue };
        let cursor = cursors.get(&conversation).copied().unwrap_or_default();
        looked.at(&reader, conversation, (user, broadcasts.contains(&conversation)), cursor)?;
    }
    Ok(looked.sorted())
}

/// A device's receive cursors, as far as they are on disk. Blocks while it reads.
///
/// # Errors
/// They can't be read.
pub fn cursors_on_disk(
    user_reader: &ShardReader,
    user: UserId,
    device: DeviceId,
) -> Result<HashMap<ConversationId, Seq>, ReadError> {
    let mut cursors = HashMap::new();
    let mut after = None;
    loop {
        let page = user_reader.recv_cursors(user, device, after, 4_096)?;
        let Some((last, _)) = page.last() else { return Ok(cursors) };
        after = Some(*last);
        cursors.extend(page);
    }
}

/// Owes a session what it missed. From here on it knows all that its device may lack.
pub fn owe(session: &Owed, missed: &[Missed]) {
    for missed in missed {
        session.resume(missed.head.conversation, missed.next, missed.gap, missed.head);
    }
    session.caught_up();
}

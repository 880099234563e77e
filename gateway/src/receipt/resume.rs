//! What a device that connects has missed: its cursors against the heads of its user's conversations.
//!
//! - Work is one look at a head per conversation of the user, bytes only follow what changed.
//! - The session is present in the rosters before this runs, so nothing falls between.

use std::collections::HashMap;

use fulmar_protocol::{
    frame,
    id::{ConversationId, Seq, UserId},
};
use fulmar_store::{ReadError, ShardReader};

use super::catchup::low;
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

/// Finds out what is missed. `shard_of` gives the reader of a conversation's shard. Blocks while it reads.
///
/// # Errors
/// A list or a head can't be read.
pub fn missed(
    user_reader: &ShardReader,
    shard_of: impl Fn(ConversationId) -> Option<ShardReader>,
    user: UserId,
    cursors: &HashMap<ConversationId, Seq>,
) -> Result<Vec<Missed>, ReadError> {
    let mut missed = Vec::new();
    let mut after = None;
    loop {
        let page = user_reader.user_conversations(user, after, 1_024)?;
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        for (conversation, _) in &page {
            let Some(reader) = shard_of(*conversation) else { continue };
            let Some(head) = reader.head(*conversation)? else { continue };
            let cursor = cursors.get(conversation).copied().unwrap_or_default();
            if cursor >= head.seq {
                continue;
            }
            let Some(member) = reader.member(*conversation, user)? else { continue };
            let low = low(&head, &member);
            let next = cursor.saturating_add(1).max(low);
            let head = frame::Head { conversation: *conversation, head: head.seq, count: head.count, low };
            missed.push(Missed { next, gap: next.prev() > cursor, head });
        }
    }
    // The shortest first: most conversations are complete soonest, and a long one harms no other.
    missed.sort_unstable_by_key(|missed| missed.head.head.since(missed.next));
    Ok(missed)
}

/// Owes a session what it missed.
pub fn owe(session: &Owed, missed: &[Missed]) {
    for missed in missed {
        session.resume(missed.head.conversation, missed.next, missed.gap, missed.head);
    }
}

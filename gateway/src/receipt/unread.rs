//! How many messages of others a user has not read.

use fulmar_protocol::{
    id::{ConversationId, Seq, UserId},
    service::UNREAD_MAX,
};
use fulmar_store::{Head, Limits, ReadError, RecordKind, ShardReader};

/// Countable messages of others after `read`, exact up to [`UNREAD_MAX`] and then that. Blocks while it reads; a
/// conversation read to its head costs nothing.
///
/// # Errors
/// The log can't be read there.
pub fn unread(
    reader: &ShardReader,
    conversation: ConversationId,
    user: UserId,
    head: &Head,
    read: Seq,
) -> Result<u32, ReadError> {
    let mut from = read.max(head.low).saturating_add(1);
    let mut unread = 0;
    let mut looked = 0;
    while from <= head.seq && unread < UNREAD_MAX && looked < 4 * UNREAD_MAX {
        let limits = Limits { records: 256, bytes: 1 << 20 };
        let records = reader.records(conversation, from, head.seq, limits)?;
        let Some(last) = records.last() else { break };
        from = last.seq.saturating_add(1);
        for record in &records {
            looked += 1;
            let counts = record.kind == RecordKind::Message && !record.silent && !record.more;
            unread += u32::from(counts && record.sender != user);
        }
    }
    Ok(if looked >= 4 * UNREAD_MAX { UNREAD_MAX } else { unread.min(UNREAD_MAX) })
}

//! BLOCKs of past records from the log.
//!
//! - A block holds consecutive records, at least one if there are any in range, and fits its frame limit.
//! - It says the oldest record there is for this member, so that a gap is known to be one.

use fulmar_protocol::{
    frame::{Block, WireTime},
    id::{ConversationId, RequestId, Seq, UserId},
    limit::{BLOCK_BYTES_MAX, BLOCK_RECORDS_MAX},
};
use fulmar_store::{Head, Limits, Member, ReadError, Record, ShardReader};

use crate::record::{origin, to_wire};

/// The oldest record `member` may see, [`Seq::FIRST`] at least.
#[must_use]
pub fn low(head: &Head, member: &Member) -> Seq {
    head.low.saturating_add(1).max(member.joined).max(Seq::FIRST)
}

/// What a block is asked for.
#[derive(Clone, Copy, Debug)]
pub struct BlockRequest {
    /// The PULL, or 0.
    pub pull: RequestId,
    /// Whose log.
    pub conversation: ConversationId,
    /// Who asks.
    pub user: UserId,
    /// The first record wanted.
    pub from: Seq,
    /// The last record wanted.
    pub to: Seq,
}

/// Reads one block, and says where the next one begins; `None` when the asker is no member (any more).
///
/// Blocks the thread while it reads.
///
/// # Errors
/// The log can't be read there.
pub fn block(reader: &ShardReader, request: BlockRequest) -> Result<Option<(Block, Seq)>, ReadError> {
    let Some(member) = reader.member(request.conversation, request.user)? else { return Ok(None) };
    let Some(head) = reader.head(request.conversation)? else { return Ok(None) };
    let low = low(&head, &member);
    let from = request.from.max(low);
    let to = request.to.min(head.seq);
    let mut block = Block {
        pull: request.pull,
        last: false,
        conversation: request.conversation,
        low,
        head: head.seq,
        first: from,
        records: Vec::new(),
    };
    let mut next = from;
    if from <= to {
        let limits = Limits { records: BLOCK_RECORDS_MAX, bytes: BLOCK_BYTES_MAX - Block::HEADER_LEN_MAX };
        let mut bytes = Block::HEADER_LEN_MAX;
        for record in reader.records(request.conversation, from, to, limits)? {
            let wire = wire(request.conversation, request.user, &record);
            let len = Block::record_len_max(&wire);
            if !block.records.is_empty() && bytes + len > BLOCK_BYTES_MAX
                || block.records.len() >= BLOCK_RECORDS_MAX
            {
                break;
            }
            bytes += len;
            next = record.seq.saturating_add(1);
            block.records.push(wire);
        }
    }
    block.last = next > to;
    Ok(Some((block, next)))
}

fn wire(conversation: ConversationId, user: UserId, record: &Record) -> fulmar_protocol::frame::Deliver {
    let mut wire = to_wire(conversation, record, WireTime::Full(record.time));
    if record.sender == user {
        wire.origin = origin(record);
    }
    wire
}

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

use crate::{
    broadcasts::READER,
    record::{origin, to_wire},
};

/// The oldest record `member` may see, [`Seq::FIRST`] at least.
#[must_use]
pub fn low(head: &Head, member: &Member) -> Seq {
    head.low.saturating_add(1).max(member.joined).max(Seq::FIRST)
}

/// The membership of a user, as the log knows it. `open_to_all`: everybody is a reader.
///
/// # Errors
/// The log can't be read there.
pub fn member(
    reader: &ShardReader,
    conversation: ConversationId,
    user: UserId,
    open_to_all: bool,
) -> Result<Option<Member>, ReadError> {
    if open_to_all {
        return Ok(Some(READER));
    }
    reader.member(conversation, user)
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
    /// Whether everybody reads it who may ask.
    pub open_to_all: bool,
    /// The first record wanted.
    pub from: Seq,
    /// The last record wanted.
    pub to: Seq,
    /// Bytes the block may have, at most [`BLOCK_BYTES_MAX`]; the first record comes anyway.
    pub bytes: usize,
}

/// Reads one block, and says where the next one begins; `None` when the asker is no member (any more).
///
/// Blocks the thread while it reads.
///
/// # Errors
/// The log can't be read there.
pub fn block(reader: &ShardReader, request: BlockRequest) -> Result<Option<(Block, Seq)>, ReadError> {
    let BlockRequest { conversation, user, open_to_all, .. } = request;
    let Some(member) = member(reader, conversation, user, open_to_all)? else { return Ok(None) };
    let Some(head) = reader.head(request.conversation)? else { return Ok(None) };
    let from = request.from.max(low(&head, &member));
    let to = request.to.min(head.seq);
    let bytes = request.bytes.min(BLOCK_BYTES_MAX).saturating_sub(Block::HEADER_LEN_MAX);
    let limits = Limits { records: BLOCK_RECORDS_MAX, bytes };
    let records =
        if from <= to { reader.records(request.conversation, from, to, limits)? } else { Vec::new() };
    // Retention may have taken what was still there when the head was read. Read again after the records, it says of
    // their beginning what is true of them.
    let head = reader.head(request.conversation)?.unwrap_or(head);
    Ok(Some(assemble(BlockRequest { from, to, ..request }, head.seq, low(&head, &member), records)))
}

/// A block of `records`, which are what is left of the range that was asked for.
fn assemble(request: BlockRequest, head: Seq, low: Seq, records: Vec<Record>) -> (Block, Seq) {
    let BlockRequest { pull, conversation, user, from, to, open_to_all: _, bytes: most } = request;
    let most = most.min(BLOCK_BYTES_MAX);
    let first = records.first().map_or_else(|| from.max(low), |first| first.seq);
    // What is in the block is there for its reader, even if it went from the log after it was read.
    let low = low.min(first);
    let mut block = Block { pull, last: false, conversation, low, head, first, records: Vec::new() };
    let mut next = first;
    let mut bytes = Block::HEADER_LEN_MAX;
    for record in records {
        let wire = wire(conversation, user, &record);
        let len = Block::record_len_max(&wire);
        if !block.records.is_empty() && bytes + len > most || block.records.len() >= BLOCK_RECORDS_MAX {
            break;
        }
        bytes += len;
        next = record.seq.saturating_add(1);
        block.records.push(wire);
    }
    block.last = next > to;
    (block, next)
}

fn wire(conversation: ConversationId, user: UserId, record: &Record) -> fulmar_protocol::frame::Deliver {
    let mut wire = to_wire(conversation, record, WireTime::Full(record.time));
    if record.sender == user {
        wire.origin = origin(record);
    }
    wire
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fulmar_protocol::id::{DeviceId, Epoch, Pseq, UnixMillis};
    use fulmar_store::RecordKind;

    use super::*;

    fn seq(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    fn record(n: u64) -> Record {
        Record {
            seq: seq(n),
            kind: RecordKind::Message,
            sender: UserId::new(257).unwrap(),
            device: DeviceId::ZERO,
            epoch: Epoch::ZERO,
            pseq: Pseq::ZERO,
            time: UnixMillis::new(n).unwrap(),
            count: n,
            target: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload: Bytes::from_static(b"hi"),
        }
    }

    /// (first, last, low, next) of a block that was asked for from 5 to 10 and found these records.
    fn found(low: u64, records: std::ops::Range<u64>) -> (u64, bool, u64, u64) {
        let request = BlockRequest {
            pull: RequestId::ZERO,
            conversation: ConversationId::new(256).unwrap(),
            user: UserId::new(257).unwrap(),
            open_to_all: false,
            from: seq(5),
            to: seq(10),
            bytes: BLOCK_BYTES_MAX,
        };
        let count = records.clone().count();
        let (block, next) = assemble(request, seq(20), seq(low), records.map(record).collect());
        assert_eq!(block.records.len(), count);
        // The seqs of its records follow from the first one's.
        let firsts: Vec<u64> = block.records.iter().map(|record| record.seq.get()).collect();
        assert!(firsts.iter().copied().eq((block.first.get()..).take(count)), "{firsts:?}");
        (block.first.get(), block.last, block.low.get(), next.get())
    }

    #[test]
    fn a_block_begins_with_its_first_record_wherever_the_log_begins_meanwhile() {
        assert_eq!(found(1, 5..11), (5, true, 1, 11));
        assert_eq!(found(1, 5..8), (5, false, 1, 8));
        assert_eq!(found(8, 8..11), (8, true, 8, 11), "5 to 7 went while it was read");
        assert_eq!(found(8, 5..11), (5, true, 5, 11), "they went after they were read");
        assert_eq!(found(9, 5..5), (9, false, 9, 9), "5 to 8 went: the rest is to be asked for");
        assert_eq!(found(15, 5..5), (15, true, 15, 15), "everything asked for went");
    }
}

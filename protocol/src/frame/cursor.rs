//! Where readers are: CURSORS, ACK, MARK, HEAD, RECEIPTS, and the PULL that fetches what is missing.

use bytes::BytesMut;

use super::{Body, Fields, put_varint, varint_len};
use crate::{
    error::DecodeError,
    id::{ConversationId, RequestId, Seq, UserId},
    limit::{BLOCK_RECORDS_MAX, CONTROL_FRAME_BYTES_MAX, ENTRIES_PER_FRAME_MAX},
};

/// Entries of at most `widest` bytes each that fit a frame of the control stream, whatever their numbers.
const fn fitting(widest: usize) -> usize {
    // Type, flag, count, and what grease may add.
    let fit = (CONTROL_FRAME_BYTES_MAX - 32) / widest;
    if fit < ENTRIES_PER_FRAME_MAX { fit } else { ENTRIES_PER_FRAME_MAX }
}

/// Entries of a CURSORS or ACK frame that always fit.
pub(crate) const PAIRS_FIT: usize = fitting(2 * 8);

macro_rules! split {
    ($name:ident, $entry:ty, $widest:expr) => {
        impl $name {
            /// As many frames as `entries` need: none exceeds the control stream's limit, whatever the numbers.
            pub fn split(entries: &[$entry]) -> impl Iterator<Item = Self> + '_ {
                entries.chunks(fitting($widest)).map(|chunk| Self { entries: chunk.to_vec() })
            }
        }
    };
}

split!(Ack, (ConversationId, Seq), 2 * 8);
split!(Heads, Head, 4 * 8);
split!(Receipts, Receipt, 4 * 8);

fn decode_pairs(fields: &mut Fields<'_>) -> Result<Vec<(ConversationId, Seq)>, DecodeError> {
    let count = fields.count("entries", ENTRIES_PER_FRAME_MAX)?;
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push((fields.id("conversation")?, fields.id("seq")?));
    }
    Ok(entries)
}

fn pairs_len(entries: &[(ConversationId, Seq)]) -> usize {
    varint_len(entries.len() as u64)
        + entries.iter().map(|(c, s)| varint_len(c.get()) + varint_len(s.get())).sum::<usize>()
}

fn encode_pairs(entries: &[(ConversationId, Seq)], out: &mut BytesMut) {
    put_varint(out, entries.len() as u64);
    for (conversation, seq) in entries {
        put_varint(out, conversation.get());
        put_varint(out, seq.get());
    }
}

/// The device's receive cursors, in answer to a WELCOME that asks for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursors {
    /// Nothing follows.
    pub last: bool,
    /// Conversation and the last seq the device has committed.
    pub entries: Vec<(ConversationId, Seq)>,
}

impl Body for Cursors {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let last = match fields.varint("last")? {
            0 => false,
            1 => true,
            _ => return Err(DecodeError::BadValue { field: "last" }),
        };
        Ok(Self { last, entries: decode_pairs(fields)? })
    }

    fn len(&self) -> usize {
        1 + pairs_len(&self.entries)
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.last.into());
        encode_pairs(&self.entries, out);
    }
}

/// Records the client has committed to its own storage. Cumulative per conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Conversation and the last seq committed.
    pub entries: Vec<(ConversationId, Seq)>,
}

impl Body for Ack {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self { entries: decode_pairs(fields)? })
    }

    fn len(&self) -> usize {
        pairs_len(&self.entries)
    }

    fn encode(&self, out: &mut BytesMut) {
        encode_pairs(&self.entries, out);
    }
}

/// How far the user has read. The larger of two wins, so a replay is harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The conversation.
    pub conversation: ConversationId,
    /// The last seq read.
    pub read: Seq,
}

impl Body for Mark {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self { conversation: fields.id("conversation")?, read: fields.id("read")? })
    }

    fn len(&self) -> usize {
        varint_len(self.conversation.get()) + varint_len(self.read.get())
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.conversation.get());
        put_varint(out, self.read.get());
    }
}

/// How far one conversation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The conversation.
    pub conversation: ConversationId,
    /// Its newest seq.
    pub head: Seq,
    /// Countable messages up to `head`.
    pub count: u64,
    /// Its oldest seq.
    pub low: Seq,
}

/// How far conversations have come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heads {
    /// One per conversation.
    pub entries: Vec<Head>,
}

impl Body for Heads {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let count = fields.count("entries", ENTRIES_PER_FRAME_MAX)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            entries.push(Head {
                conversation: fields.id("conversation")?,
                head: fields.id("head")?,
                count: fields.varint("count")?,
                low: fields.id("low")?,
            });
        }
        Ok(Self { entries })
    }

    fn len(&self) -> usize {
        varint_len(self.entries.len() as u64)
            + self
                .entries
                .iter()
                .map(|e| {
                    varint_len(e.conversation.get())
                        + varint_len(e.head.get())
                        + varint_len(e.count)
                        + varint_len(e.low.get())
                })
                .sum::<usize>()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.entries.len() as u64);
        for entry in &self.entries {
            put_varint(out, entry.conversation.get());
            put_varint(out, entry.head.get());
            put_varint(out, entry.count);
            put_varint(out, entry.low.get());
        }
    }
}

/// How far one member has come in one conversation, over all the member's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The conversation.
    pub conversation: ConversationId,
    /// The member; the own user when another device of it has read.
    pub user: UserId,
    /// The furthest any device has received.
    pub recv: Seq,
    /// The furthest the user has read.
    pub read: Seq,
}

/// How far members have received and read. Only small conversations have receipts; coalesced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipts {
    /// One per conversation and member.
    pub entries: Vec<Receipt>,
}

impl Body for Receipts {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let count = fields.count("entries", ENTRIES_PER_FRAME_MAX)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            entries.push(Receipt {
                conversation: fields.id("conversation")?,
                user: fields.id("user")?,
                recv: fields.id("recv")?,
                read: fields.id("read")?,
            });
        }
        Ok(Self { entries })
    }

    fn len(&self) -> usize {
        varint_len(self.entries.len() as u64)
            + self
                .entries
                .iter()
                .map(|e| {
                    varint_len(e.conversation.get())
                        + varint_len(e.user.get())
                        + varint_len(e.recv.get())
                        + varint_len(e.read.get())
                })
                .sum::<usize>()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.entries.len() as u64);
        for entry in &self.entries {
            put_varint(out, entry.conversation.get());
            put_varint(out, entry.user.get());
            put_varint(out, entry.recv.get());
            put_varint(out, entry.read.get());
        }
    }
}

/// Asks for records of the past; BLOCKs with the same number answer, the last one marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pull {
    /// The request, from 1.
    pub id: RequestId,
    /// Whose log.
    pub conversation: ConversationId,
    /// The first seq wanted.
    pub from: Seq,
    /// The last seq wanted.
    pub to: Seq,
    /// Records at the most; from the newest end of the range when `newest`, else from the oldest.
    pub limit: u32,
    /// See `limit`. The records of a block always ascend.
    pub newest: bool,
}

impl Body for Pull {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let id: RequestId = fields.id("id")?;
        if id == RequestId::ZERO {
            return Err(DecodeError::BadValue { field: "id" });
        }
        let conversation = fields.id("conversation")?;
        let from = fields.id("from")?;
        let to = fields.id("to")?;
        let limit = fields.u32("limit")?;
        if limit == 0 || limit as usize > BLOCK_RECORDS_MAX * 8 {
            return Err(DecodeError::BadValue { field: "limit" });
        }
        let newest = match fields.varint("newest")? {
            0 => false,
            1 => true,
            _ => return Err(DecodeError::BadValue { field: "newest" }),
        };
        Ok(Self { id, conversation, from, to, limit, newest })
    }

    fn len(&self) -> usize {
        varint_len(self.id.get())
            + varint_len(self.conversation.get())
            + varint_len(self.from.get())
            + varint_len(self.to.get())
            + varint_len(self.limit.into())
            + 1
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.id.get());
        put_varint(out, self.conversation.get());
        put_varint(out, self.from.get());
        put_varint(out, self.to.get());
        put_varint(out, self.limit.into());
        put_varint(out, self.newest.into());
    }
}

//! DELIVER and BLOCK: records on their way to a client. No field depends on the recipient, but for the origin, which
//! only the sender's own devices are sent, unless the record is a piece of a body.

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    Body, Fields,
    codec::{unzigzag, zigzag},
    put_varint, varint_len,
};
use crate::{
    error::DecodeError,
    id::{ConversationId, DeviceId, Epoch, Pseq, RequestId, Seq, UnixMillis, UserId},
    limit::{BLOCK_RECORDS_MAX, SEND_PAYLOAD_BYTES_MAX},
};

const ORIGIN: u64 = 1;
const REFERENCE: u64 = 1 << 1;
const FULL_TIME: u64 = 1 << 2;
const KIND: u64 = 1 << 3;
const MORE: u64 = 1 << 4;
const TTL: u64 = 1 << 5;
const SILENT: u64 = 1 << 6;
const CONTINUES: u64 = 1 << 7;
const FLAGS: u64 = ORIGIN | REFERENCE | FULL_TIME | KIND | MORE | TTL | SILENT | CONTINUES;

/// What a record is. Every state change of a conversation is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordKind {
    /// A message of a member.
    #[default]
    Message,
    /// New content for an earlier message of the same sender (`reference`).
    Edit,
    /// An earlier message (`reference`) is taken back.
    Recall,
    /// A reaction to an earlier message (`reference`); empty payload takes it away.
    Reaction,
    /// The conversation was made; the payload is [`crate::service::Roster`].
    Created,
    /// Members joined; the payload is [`crate::service::Roster`].
    Joined,
    /// Members left or were removed; the payload is [`crate::service::Roster`].
    Left,
    /// A notice of the business.
    Notice,
}

impl RecordKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Message,
        Self::Edit,
        Self::Recall,
        Self::Reaction,
        Self::Created,
        Self::Joined,
        Self::Left,
        Self::Notice,
    ];

    /// The number on the wire and on disk.
    #[must_use]
    pub const fn number(self) -> u64 {
        self as u64
    }

    /// The kind with this number.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }

    /// Whether a client may send it.
    #[must_use]
    pub const fn sendable(self) -> bool {
        matches!(self, Self::Message | Self::Edit | Self::Recall | Self::Reaction)
    }

    /// Whether it needs a `reference`.
    #[must_use]
    pub const fn refers(self) -> bool {
        matches!(self, Self::Edit | Self::Recall | Self::Reaction)
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Self::from_number(fields.varint("kind")?).ok_or(DecodeError::BadValue { field: "kind" })
    }
}

/// A record's time as it travels: the low 30 bits of its milliseconds (12.4 days), or all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireTime {
    /// The low 30 bits; for records younger than three days when they leave.
    Short(u32),
    /// The whole time.
    Full(UnixMillis),
}

impl WireTime {
    const SPAN: u64 = 1 << 30;

    /// Milliseconds of age up to which [`Self::Short`] may be used.
    pub const SHORT_AGE_MS_MAX: u64 = 3 * 24 * 3600 * 1000;

    /// The short form of `time`.
    #[must_use]
    pub const fn short(time: UnixMillis) -> Self {
        Self::Short((time.get() % Self::SPAN) as u32)
    }

    /// The whole time: the one nearest to `now` (the client's notion of the gateway's clock, right to within days).
    #[must_use]
    pub fn expand(self, now: UnixMillis) -> UnixMillis {
        match self {
            Self::Full(time) => time,
            Self::Short(low) => {
                let base = now.get() - now.get() % Self::SPAN + u64::from(low);
                let near = [base.checked_sub(Self::SPAN), Some(base), base.checked_add(Self::SPAN)]
                    .into_iter()
                    .flatten()
                    .min_by_key(|time| time.abs_diff(now.get()))
                    .unwrap_or(base);
                UnixMillis::new(near).unwrap_or(now)
            }
        }
    }
}

/// Where a record came from, so that the sending device knows its echo, and everybody which pieces are of one body. All
/// three together, and the sender: an older incarnation
/// of the same device counted its pseqs from 1 too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The sender's device.
    pub device: DeviceId,
    /// The incarnation of the device's database.
    pub epoch: Epoch,
    /// The send's number.
    pub pseq: Pseq,
}

/// One record of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deliver {
    /// What it is.
    pub kind: RecordKind,
    /// Whose log it is in.
    pub conversation: ConversationId,
    /// Its position there.
    pub seq: Seq,
    /// Who sent it.
    pub sender: UserId,
    /// When the gateway stored it.
    pub time: WireTime,
    /// For the sender's own devices, and with pieces of bodies, which need it to be put together.
    pub origin: Option<Origin>,
    /// The record it refers to.
    pub reference: Option<Seq>,
    /// Seconds after `time` from which it is of no use.
    pub ttl: Option<u32>,
    /// More pieces of the same body follow, from the same device under the next pseqs.
    pub more: bool,
    /// A piece of a body that an earlier record began: the one that the same device sent before this one.
    pub continues: bool,
    /// Not counted as unread.
    pub silent: bool,
    /// The business's bytes.
    pub payload: Bytes,
}

impl Deliver {
    fn flags(&self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.origin.is_some(), ORIGIN)
            | bit(self.reference.is_some(), REFERENCE)
            | bit(matches!(self.time, WireTime::Full(_)), FULL_TIME)
            | bit(self.kind != RecordKind::Message, KIND)
            | bit(self.more, MORE)
            | bit(self.continues, CONTINUES)
            | bit(self.ttl.is_some(), TTL)
            | bit(self.silent, SILENT)
    }

    fn optional_len(&self) -> usize {
        usize::from(self.kind != RecordKind::Message)
            + self.origin.map_or(0, |origin| {
                varint_len(origin.device.get())
                    + varint_len(origin.epoch.get())
                    + varint_len(origin.pseq.get())
            })
            + self.reference.map_or(0, |seq| varint_len(seq.get()))
            + self.ttl.map_or(0, |ttl| varint_len(ttl.into()))
    }

    fn encode_optional(&self, out: &mut BytesMut) {
        if self.kind != RecordKind::Message {
            put_varint(out, self.kind.number());
        }
        if let Some(origin) = self.origin {
            put_varint(out, origin.device.get());
            put_varint(out, origin.epoch.get());
            put_varint(out, origin.pseq.get());
        }
        if let Some(reference) = self.reference {
            put_varint(out, reference.get());
        }
        if let Some(ttl) = self.ttl {
            put_varint(out, ttl.into());
        }
    }

    fn decode_optional(&mut self, flags: u64, fields: &mut Fields<'_>) -> Result<(), DecodeError> {
        if flags & KIND != 0 {
            self.kind = RecordKind::decode(fields)?;
            if self.kind == RecordKind::Message {
                return Err(DecodeError::BadValue { field: "kind" });
            }
        }
        if flags & ORIGIN != 0 {
            self.origin = Some(Origin {
                device: fields.id("origin device")?,
                epoch: fields.id("origin epoch")?,
                pseq: fields.id("origin pseq")?,
            });
        }
        if flags & REFERENCE != 0 {
            self.reference = Some(fields.id("reference")?);
        }
        if flags & TTL != 0 {
            self.ttl = Some(fields.u32("ttl")?);
        }
        self.more = flags & MORE != 0;
        self.continues = flags & CONTINUES != 0;
        self.silent = flags & SILENT != 0;
        self.payload = fields.rest("payload", SEND_PAYLOAD_BYTES_MAX)?;
        Ok(())
    }

    fn time_number(&self) -> u64 {
        match self.time {
            WireTime::Short(low) => low.into(),
            WireTime::Full(time) => time.get(),
        }
    }

    /// Bytes this record takes inside a BLOCK whose base time is `base`.
    fn block_len(&self, base: UnixMillis) -> usize {
        varint_len(self.flags() & !FULL_TIME)
            + varint_len(self.sender.get())
            + varint_len(time_delta(self.time.expand(base), base))
            + self.optional_len()
            + self.payload.len()
    }
}

fn time_delta(time: UnixMillis, base: UnixMillis) -> u64 {
    zigzag(time.get().cast_signed() - base.get().cast_signed())
}

impl Body for Deliver {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let flags = fields.varint("flags")?;
        if flags & !FLAGS != 0 {
            return Err(DecodeError::BadValue { field: "flags" });
        }
        let conversation = fields.id("conversation")?;
        let seq: Seq = fields.id("seq")?;
        if seq == Seq::ZERO {
            return Err(DecodeError::BadValue { field: "seq" });
        }
        let sender = fields.id("sender")?;
        let time = if flags & FULL_TIME != 0 {
            WireTime::Full(fields.id("time")?)
        } else {
            match fields.u32("time")? {
                low if u64::from(low) < WireTime::SPAN => WireTime::Short(low),
                _ => return Err(DecodeError::BadValue { field: "time" }),
            }
        };
        let mut deliver = Self {
            kind: RecordKind::Message,
            conversation,
            seq,
            sender,
            time,
            origin: None,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload: Bytes::new(),
        };
        deliver.decode_optional(flags, fields)?;
        Ok(deliver)
    }

    fn len(&self) -> usize {
        varint_len(self.flags())
            + varint_len(self.conversation.get())
            + varint_len(self.seq.get())
            + varint_len(self.sender.get())
            + varint_len(self.time_number())
            + self.optional_len()
            + self.payload.len()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.flags());
        put_varint(out, self.conversation.get());
        put_varint(out, self.seq.get());
        put_varint(out, self.sender.get());
        put_varint(out, self.time_number());
        self.encode_optional(out);
        out.put_slice(&self.payload);
    }
}

/// Consecutive records of one conversation, from the log. Each record's seq is its predecessor's plus one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// The PULL this answers; 0 for catch-up the gateway started by itself.
    pub pull: RequestId,
    /// Nothing of this answer follows.
    pub last: bool,
    /// Whose log.
    pub conversation: ConversationId,
    /// The oldest record there is: what was before it is gone by retention.
    pub low: Seq,
    /// The newest record there was when the block was built.
    pub head: Seq,
    /// Seq of the first record; the position asked for when there are none.
    pub first: Seq,
    /// The records; their `conversation` and `seq` follow from the block, their times are [`WireTime::Full`].
    pub records: Vec<Deliver>,
}

impl Block {
    fn base(&self) -> UnixMillis {
        match self.records.first().map(|record| record.time) {
            Some(WireTime::Full(time)) => time,
            Some(WireTime::Short(low)) => UnixMillis::new(low.into()).unwrap_or_default(),
            None => UnixMillis::default(),
        }
    }

    /// Bytes `record` adds to a block at the most; builders sum this up against the limit.
    #[must_use]
    pub fn record_len_max(record: &Deliver) -> usize {
        // Length prefix, flags, sender and time at their widest.
        4 + 2 + 8 + 8 + record.optional_len() + record.payload.len()
    }

    /// Bytes of the fields before the records at the most, frame length and type included.
    pub const HEADER_LEN_MAX: usize = 8 * 8 + 16;
}

const LAST: u64 = 1;

impl Body for Block {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let pull = fields.id("pull")?;
        let block_flags = fields.varint("flags")?;
        if block_flags & !LAST != 0 {
            return Err(DecodeError::BadValue { field: "flags" });
        }
        let conversation = fields.id("conversation")?;
        let low = fields.id("low")?;
        let head = fields.id("head")?;
        let first: Seq = fields.id("first")?;
        let base: UnixMillis = fields.id("base time")?;
        let count = fields.count("records", BLOCK_RECORDS_MAX)?;
        if count > 0 && first == Seq::ZERO {
            return Err(DecodeError::BadValue { field: "first" });
        }
        let mut records = Vec::with_capacity(count.min(64));
        let mut seq = first;
        for index in 0..count {
            let len = fields.count("record length", SEND_PAYLOAD_BYTES_MAX + 64)?;
            let mut bytes = fields.take(len, "record")?;
            let mut fields = Fields(&mut bytes);
            let flags = fields.varint("record flags")?;
            if flags & !FLAGS != 0 || flags & FULL_TIME != 0 {
                return Err(DecodeError::BadValue { field: "record flags" });
            }
            let sender = fields.id("sender")?;
            let delta = unzigzag(fields.varint("time")?);
            let time = base.get().checked_add_signed(delta).and_then(UnixMillis::new);
            let time = time.ok_or(DecodeError::BadValue { field: "time" })?;
            if index == 0 && delta != 0 {
                return Err(DecodeError::BadValue { field: "time" });
            }
            let mut record = Deliver {
                kind: RecordKind::Message,
                conversation,
                seq,
                sender,
                time: WireTime::Full(time),
                origin: None,
                reference: None,
                ttl: None,
                more: false,
                continues: false,
                silent: false,
                payload: Bytes::new(),
            };
            record.decode_optional(flags, &mut fields)?;
            records.push(record);
            if index + 1 < count {
                seq = seq.next().ok_or(DecodeError::BadValue { field: "first" })?;
            }
        }
        Ok(Self { pull, last: block_flags & LAST != 0, conversation, low, head, first, records })
    }

    fn len(&self) -> usize {
        let base = self.base();
        varint_len(self.pull.get())
            + 1
            + varint_len(self.conversation.get())
            + varint_len(self.low.get())
            + varint_len(self.head.get())
            + varint_len(self.first.get())
            + varint_len(base.get())
            + varint_len(self.records.len() as u64)
            + self
                .records
                .iter()
                .map(|record| {
                    let len = record.block_len(base);
                    varint_len(len as u64) + len
                })
                .sum::<usize>()
    }

    fn encode(&self, out: &mut BytesMut) {
        let base = self.base();
        put_varint(out, self.pull.get());
        put_varint(out, if self.last { LAST } else { 0 });
        put_varint(out, self.conversation.get());
        put_varint(out, self.low.get());
        put_varint(out, self.head.get());
        put_varint(out, self.first.get());
        put_varint(out, base.get());
        put_varint(out, self.records.len() as u64);
        for record in &self.records {
            put_varint(out, record.block_len(base) as u64);
            put_varint(out, record.flags() & !FULL_TIME);
            put_varint(out, record.sender.get());
            put_varint(out, time_delta(record.time.expand(base), base));
            record.encode_optional(out);
            out.put_slice(&record.payload);
        }
    }
}

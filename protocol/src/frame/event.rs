//! EVENT, PING and PONG.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Body, Fields, put_varint, varint_len};
use crate::{
    error::DecodeError,
    id::{ConversationId, UnixMillis, UserId},
    limit::{EVENT_PAYLOAD_BYTES_MAX, PING_PADDING_BYTES_MAX},
};

/// What an EVENT says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventKind {
    /// The sender is typing (payload empty).
    Typing,
    /// The sender came (payload `1`) or went (payload `0`).
    Presence,
    /// The business's own, from 16 on.
    Custom(u32),
}

impl EventKind {
    fn number(self) -> u64 {
        match self {
            Self::Typing => 1,
            Self::Presence => 2,
            Self::Custom(number) => number.into(),
        }
    }
}

/// Something that need not be stored. Newest wins per (conversation, kind, sender); dropped when stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where.
    pub conversation: ConversationId,
    /// What.
    pub kind: EventKind,
    /// Who: set by the gateway; 0 from a client.
    pub sender: UserId,
    /// Increasing per sender, so that a late one is known.
    pub number: u64,
    /// Milliseconds of use.
    pub ttl_ms: u32,
    /// The business's bytes.
    pub payload: Bytes,
}

impl Body for Event {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let conversation = fields.id("conversation")?;
        let kind = match fields.u32("kind")? {
            1 => EventKind::Typing,
            2 => EventKind::Presence,
            custom if custom >= 16 => EventKind::Custom(custom),
            _ => return Err(DecodeError::BadValue { field: "kind" }),
        };
        Ok(Self {
            conversation,
            kind,
            sender: fields.id("sender")?,
            number: fields.varint("number")?,
            ttl_ms: fields.u32("ttl")?,
            payload: fields.rest("payload", EVENT_PAYLOAD_BYTES_MAX)?,
        })
    }

    fn len(&self) -> usize {
        varint_len(self.conversation.get())
            + varint_len(self.kind.number())
            + varint_len(self.sender.get())
            + varint_len(self.number)
            + varint_len(self.ttl_ms.into())
            + self.payload.len()
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.conversation.get());
        put_varint(out, self.kind.number());
        put_varint(out, self.sender.get());
        put_varint(out, self.number);
        put_varint(out, self.ttl_ms.into());
        out.put_slice(&self.payload);
    }
}

/// What a PING wants besides its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PingFlags(pub u64);

impl PingFlags {
    /// Answer at once and flush what is due: something seems to be lost.
    pub const NUDGE: Self = Self(1);
    /// No PONG is wanted: that the transport acknowledges the packet is sign enough of life, and keeps the mappings on the
    /// way. Whoever does not know this bit answers all the same.
    pub const QUIET: Self = Self(2);
}

/// Asks for a PONG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// Correlates the PONG.
    pub id: u64,
    /// The asker's clock, milliseconds, opaque to the other side.
    pub time_ms: u64,
    /// See [`PingFlags`]; unknown bits are ignored.
    pub flags: u64,
    /// Bytes that mean nothing behind the fields, at most [`PING_PADDING_BYTES_MAX`]: until a new path is validated, the
    /// other side may send only three times what came.
    pub padding: u16,
}

impl Body for Ping {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let (id, time_ms, flags) = (fields.varint("id")?, fields.varint("time")?, fields.varint("flags")?);
        let padding = fields.rest("padding", PING_PADDING_BYTES_MAX)?.len();
        Ok(Self { id, time_ms, flags, padding: u16::try_from(padding).unwrap_or(u16::MAX) })
    }

    fn len(&self) -> usize {
        varint_len(self.id)
            + varint_len(self.time_ms)
            + varint_len(self.flags)
            + usize::from(self.padding).min(PING_PADDING_BYTES_MAX)
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.id);
        put_varint(out, self.time_ms);
        put_varint(out, self.flags);
        out.put_bytes(0, usize::from(self.padding).min(PING_PADDING_BYTES_MAX));
    }
}

/// Answers a PING. Everything the asker sent before it on the control stream has been taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pong {
    /// The PING's number.
    pub id: u64,
    /// The PING's time, returned.
    pub time_ms: u64,
    /// The answerer's clock.
    pub server_time: UnixMillis,
}

impl Body for Pong {
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            id: fields.varint("id")?,
            time_ms: fields.varint("time")?,
            server_time: fields.id("server time")?,
        })
    }

    fn len(&self) -> usize {
        varint_len(self.id) + varint_len(self.time_ms) + varint_len(self.server_time.get())
    }

    fn encode(&self, out: &mut BytesMut) {
        put_varint(out, self.id);
        put_varint(out, self.time_ms);
        put_varint(out, self.server_time.get());
    }
}

//! The frames: their numbers, who may send them where, and their bytes.
//!
//! `frame = len:v type:v body`; `len` counts type and body. A stream starts with `kind:v index:v`
//! ([`StreamHeader`]). Hot frames are coded by hand, the payload is the rest of the frame; cold frames are a fixed
//! postcard core followed by TLVs (`tag:v len:v bytes`), unknown tags are skipped. Even types must be understood,
//! odd ones may be skipped.
//!
//! Not here: when a frame may come (`session`), what a call's body means (`service`).

mod call;
mod codec;
mod cold;
mod cursor;
mod deliver;
mod event;
mod send;

use bytes::{BufMut, Bytes, BytesMut};

use self::codec::Fields;
pub(crate) use self::cursor::PAIRS_FIT;
pub use self::{
    call::{Call, CallStatus, Reply},
    codec::{Decoder, peek_varint, put_varint, varint_len},
    cold::{
        Auth, AuthProof, Bytes8, ConversationClass, Error, Goaway, Hello, Kicked, Limits, NetworkHint,
        NetworkKind, Open, OpenTarget, Opened, Resumption, SendRefused, Welcome,
    },
    cursor::{Ack, Cursors, Head, Heads, Mark, Pull, Receipt, Receipts},
    deliver::{Block, Deliver, Origin, RecordKind, WireTime},
    event::{Event, EventKind, Ping, PingFlags, Pong},
    send::{AckRun, Send, SendAck},
};
use crate::{
    error::{DecodeError, Violation},
    limit::{
        BLOCK_BYTES_MAX, CONTROL_FRAME_BYTES_MAX, DATAGRAM_BYTES_MAX, LANE_FRAME_BYTES_MAX, TLV_BYTES_MAX,
        UPLINK_FRAME_BYTES_MAX,
    },
};

/// Which half of a connection a frame comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The client.
    Client,
    /// The gateway.
    Gateway,
}

/// The channels of one connection. On streams, the kind is the first varint of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Channel {
    /// C0: the client's first bidirectional stream.
    Control,
    /// U0: the client's unidirectional stream of sends.
    Uplink,
    /// L0 … Ln-1: the gateway's unidirectional streams of live records.
    Lane(u8),
    /// B0: the gateway's unidirectional stream of catch-up and history.
    Backlog,
    /// QUIC datagrams (RFC 9221).
    Datagram,
}

impl Channel {
    /// The largest frame the channel takes, bytes.
    #[must_use]
    pub const fn frame_limit(self) -> usize {
        match self {
            Self::Control => CONTROL_FRAME_BYTES_MAX,
            Self::Uplink => UPLINK_FRAME_BYTES_MAX,
            Self::Lane(_) => LANE_FRAME_BYTES_MAX,
            Self::Backlog => BLOCK_BYTES_MAX,
            Self::Datagram => DATAGRAM_BYTES_MAX,
        }
    }

    /// Its name in logs and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Uplink => "uplink",
            Self::Lane(_) => "lane",
            Self::Backlog => "backlog",
            Self::Datagram => "datagram",
        }
    }

    /// The header a stream of this channel starts with; `None` for datagrams.
    #[must_use]
    pub const fn header(self) -> Option<StreamHeader> {
        let (kind, index) = match self {
            Self::Control => (0, 0),
            Self::Uplink => (1, 0),
            Self::Lane(index) => (2, index),
            Self::Backlog => (3, 0),
            Self::Datagram => return None,
        };
        Some(StreamHeader { kind, index: index as u64 })
    }
}

/// The first two varints of every stream, written by whoever opens it. The answering half of the control stream has
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// 0 control, 1 uplink, 2 lane, 3 backlog.
    pub kind: u64,
    /// Which of its kind.
    pub index: u64,
}

impl StreamHeader {
    /// Appends the header.
    pub fn encode(self, out: &mut impl BufMut) {
        put_varint(out, self.kind);
        put_varint(out, self.index);
    }

    /// The channel this header opens.
    ///
    /// # Errors
    /// [`Violation::BadStream`] for an unknown kind or an index that may not be.
    pub fn channel(self) -> Result<Channel, Violation> {
        match (self.kind, self.index) {
            (0, 0) => Ok(Channel::Control),
            (1, 0) => Ok(Channel::Uplink),
            (2, index) => match u8::try_from(index) {
                Ok(index) if index < crate::limit::LANES_MAX => Ok(Channel::Lane(index)),
                _ => Err(Violation::BadStream("lane number out of range")),
            },
            (3, 0) => Ok(Channel::Backlog),
            (0 | 1 | 3, _) => Err(Violation::BadStream("there is only one stream of this kind")),
            _ => Err(Violation::BadStream("unknown kind of stream")),
        }
    }
}

/// Decodes and encodes one frame's fields.
trait Body: Sized {
    /// Reads the fields off `fields`; the caller checks that nothing is left.
    fn decode(fields: &mut Fields<'_>) -> Result<Self, DecodeError>;
    /// Length of what [`Self::encode`] appends.
    fn len(&self) -> usize;
    /// Appends the fields.
    fn encode(&self, out: &mut BytesMut);
}

macro_rules! frames {
    ($($(#[$doc:meta])* $name:ident($body:ty) = $number:literal, $sides:pat, $channels:pat, $early:literal;)*) => {
        /// A decoded frame.
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Frame {
            $($(#[$doc])* $name($body),)*
        }

        impl Frame {
            /// Number, name, and whether it may ride in 0-RTT data, of every frame.
            pub const TABLE: &'static [(u64, &'static str, bool)] = &[$(($number, stringify!($name), $early),)*];

            /// The frame's type number.
            #[must_use]
            pub const fn number(&self) -> u64 {
                match self { $(Self::$name(_) => $number,)* }
            }

            /// The frame's name.
            #[must_use]
            pub const fn name(&self) -> &'static str {
                match self { $(Self::$name(_) => stringify!($name),)* }
            }

            /// Whether a replay of this frame is harmless, so that it may ride in 0-RTT data.
            #[must_use]
            pub const fn replayable(&self) -> bool {
                match self { $(Self::$name(_) => $early,)* }
            }

            /// Whether the frame may come from `side` on `channel`.
            ///
            /// # Errors
            /// [`Violation::WrongChannel`].
            pub const fn check_channel(&self, side: Side, channel: Channel) -> Result<(), Violation> {
                let allowed = match self {
                    $(Self::$name(_) => matches!(side, $sides) && matches!(channel, $channels),)*
                };
                if allowed {
                    Ok(())
                } else {
                    Err(Violation::WrongChannel { frame: self.name(), channel: channel.name() })
                }
            }

            fn body_len(&self) -> usize {
                match self { $(Self::$name(body) => Body::len(body),)* }
            }

            fn encode_body(&self, out: &mut BytesMut) {
                match self { $(Self::$name(body) => Body::encode(body, out),)* }
            }

            fn decode_body(number: u64, fields: &mut Fields<'_>) -> Result<Option<Self>, DecodeError> {
                let frame = match number {
                    $($number => Self::$name(<$body as Body>::decode(fields)?),)*
                    odd if odd % 2 == 1 => return Ok(None),
                    even => return Err(DecodeError::UnknownFrame(even)),
                };
                fields.end()?;
                Ok(Some(frame))
            }
        }
    };
}

frames! {
    /// Opens a connection.
    Hello(Hello) = 0x02, Side::Client, Channel::Control, true;
    /// Answers a HELLO.
    Welcome(Welcome) = 0x04, Side::Gateway, Channel::Control, false;
    /// A fresh token before the old one ends.
    Auth(Auth) = 0x06, Side::Client, Channel::Control, false;
    /// The device's cursors.
    Cursors(Cursors) = 0x08, Side::Client, Channel::Control, true;
    /// Looks a conversation up, or makes a direct one.
    Open(Open) = 0x0a, Side::Client, Channel::Control, true;
    /// Answers an OPEN.
    Opened(Opened) = 0x0c, Side::Gateway, Channel::Control, false;
    /// A message or another change of a conversation.
    Send(Send) = 0x0e, Side::Client, Channel::Uplink | Channel::Datagram, true;
    /// Sends that are on disk.
    SendAck(SendAck) = 0x10, Side::Gateway, Channel::Control | Channel::Datagram, false;
    /// A send that will not be stored under its number, and why.
    SendRefused(SendRefused) = 0x12, Side::Gateway, Channel::Control, false;
    /// A live record.
    Deliver(Deliver) = 0x14, Side::Gateway, Channel::Lane(_) | Channel::Backlog | Channel::Datagram, false;
    /// Records of the past.
    Block(Block) = 0x16, Side::Gateway, Channel::Backlog, false;
    /// How far conversations have come: there is more, pull when you like.
    Heads(Heads) = 0x18, Side::Gateway, Channel::Control, false;
    /// Records the client has committed.
    Ack(Ack) = 0x1a, Side::Client, Channel::Control, true;
    /// How far the user has read.
    Mark(Mark) = 0x1c, Side::Client, Channel::Uplink, true;
    /// How far members have received and read.
    Receipts(Receipts) = 0x1d, Side::Gateway, Channel::Control, false;
    /// Asks for records of the past.
    Pull(Pull) = 0x1e, Side::Client, Channel::Control, true;
    /// Calls a service.
    Call(Call) = 0x20, Side::Client | Side::Gateway, Channel::Control, false;
    /// Answers a CALL.
    Reply(Reply) = 0x22, Side::Client | Side::Gateway, Channel::Control, false;
    /// Something that need not be stored: typing, presence.
    Event(Event) = 0x25, Side::Client | Side::Gateway, Channel::Datagram | Channel::Control, false;
    /// Asks for a PONG.
    Ping(Ping) = 0x26, Side::Client | Side::Gateway, Channel::Control, false;
    /// Answers a PING.
    Pong(Pong) = 0x28, Side::Client | Side::Gateway, Channel::Control, false;
    /// The gateway is leaving: connect elsewhere, then close.
    Goaway(Goaway) = 0x2a, Side::Gateway, Channel::Control, false;
    /// This device is logged out.
    Kicked(Kicked) = 0x2c, Side::Gateway, Channel::Control, false;
    /// A request was refused.
    Error(Error) = 0x2e, Side::Gateway, Channel::Control, false;
}

impl Frame {
    /// Decodes type and body of one frame, without its length. `None`: an unknown odd type, to be skipped.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(mut bytes: Bytes) -> Result<Option<Self>, DecodeError> {
        let mut fields = Fields(&mut bytes);
        let number = fields.varint("type")?;
        Self::decode_body(number, &mut fields)
    }

    /// Bytes of the whole frame, length included.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        let inner = varint_len(self.number()) + self.body_len();
        varint_len(inner as u64) + inner
    }

    /// Appends the whole frame, length included.
    pub fn encode(&self, out: &mut BytesMut) {
        let inner = varint_len(self.number()) + self.body_len();
        out.reserve(inner + 8);
        put_varint(out, inner as u64);
        put_varint(out, self.number());
        self.encode_body(out);
    }

    /// The whole frame in a buffer of its own, to be shared.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.encoded_len());
        self.encode(&mut out);
        out.freeze()
    }

    /// Like [`Self::encode`], preceded or followed by things a peer has to skip: an unknown odd frame, or an unknown
    /// TLV in a cold frame. Which, and with what bytes, is taken from `seed`.
    pub fn encode_greased(&self, out: &mut BytesMut, seed: u64) {
        if seed & 1 == 1 {
            grease(out, seed >> 2);
        }
        let tlv_room =
            self.number() != 0x26 && self.is_cold() && self.encoded_len() < CONTROL_FRAME_BYTES_MAX / 2;
        if seed & 2 == 0 || !tlv_room {
            return self.encode(out);
        }
        let tag = 0x1f * (1 + (seed >> 2) % 64) + 0x21;
        let value = (seed >> 8).to_be_bytes();
        let tlv = varint_len(tag) + varint_len(value.len() as u64) + value.len();
        let inner = varint_len(self.number()) + self.body_len() + tlv;
        put_varint(out, inner as u64);
        put_varint(out, self.number());
        self.encode_body(out);
        put_varint(out, tag);
        put_varint(out, value.len() as u64);
        out.put_slice(&value);
    }

    const fn is_cold(&self) -> bool {
        matches!(
            self,
            Self::Hello(_)
                | Self::Welcome(_)
                | Self::Auth(_)
                | Self::Open(_)
                | Self::Opened(_)
                | Self::SendRefused(_)
                | Self::Goaway(_)
                | Self::Kicked(_)
                | Self::Error(_)
        )
    }
}

/// Appends a frame of a reserved odd type (`0x40 n + 0x3f`) that every peer must skip.
pub fn grease(out: &mut BytesMut, seed: u64) {
    let number = 0x40 * (1 + seed % 200) + 0x3f;
    let body = seed.to_be_bytes();
    let len = usize::try_from(seed % 8).unwrap_or(0);
    put_varint(out, (varint_len(number) + len) as u64);
    put_varint(out, number);
    out.extend(body.iter().take(len));
}

/// Hands the TLVs after a cold frame's core to `take`, tag and value; what it does not know it skips.
fn read_tlvs(
    fields: &mut Fields<'_>,
    mut take: impl FnMut(u64, &[u8]) -> Result<(), DecodeError>,
) -> Result<(), DecodeError> {
    if fields.0.len() > TLV_BYTES_MAX {
        return Err(DecodeError::BadValue { field: "extensions" });
    }
    while !fields.0.is_empty() {
        let tag = fields.varint("extension tag")?;
        let len = fields.varint("extension length")?;
        let len = usize::try_from(len).map_err(|_| DecodeError::BadValue { field: "extension length" })?;
        take(tag, &fields.take(len, "extension")?)?;
    }
    Ok(())
}

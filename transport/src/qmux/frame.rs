//! The bytes: records, frames, transport parameters, and what is wrong with those that break the rules.
//!
//! Encodings are those of RFC 9000 sections 16, 18 and 19 and RFC 9221; records, `QX_TRANSPORT_PARAMETERS` and `QX_PING`
//! are those of draft-ietf-quic-qmux. Nothing here remembers anything.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The largest number a variable-length integer can say.
pub const VARINT_MAX: u64 = (1 << 62) - 1;

/// Bytes of frames in one record, unless the peer allows more: with its length it fills one TLS record.
pub const RECORD_BYTES: usize = 16_382;

/// Streams of one kind there can ever be (RFC 9000 section 4.6).
const STREAMS_MAX: u64 = 1 << 60;

/// The longest reason a close carries; more is cut.
const REASON_BYTES_MAX: usize = 1_024;

const PADDING: u64 = 0x00;
const RESET_STREAM: u64 = 0x04;
const STOP_SENDING: u64 = 0x05;
const STREAM: u64 = 0x08;
const STREAM_LAST: u64 = 0x0f;
const FIN: u64 = 0x01;
const LEN: u64 = 0x02;
const OFF: u64 = 0x04;
const MAX_DATA: u64 = 0x10;
const MAX_STREAM_DATA: u64 = 0x11;
const MAX_STREAMS_BIDI: u64 = 0x12;
const MAX_STREAMS_UNI: u64 = 0x13;
const DATA_BLOCKED: u64 = 0x14;
const STREAM_DATA_BLOCKED: u64 = 0x15;
const STREAMS_BLOCKED_BIDI: u64 = 0x16;
const STREAMS_BLOCKED_UNI: u64 = 0x17;
const CONNECTION_CLOSE: u64 = 0x1c;
const APPLICATION_CLOSE: u64 = 0x1d;
const DATAGRAM: u64 = 0x30;
const DATAGRAM_LEN: u64 = 0x31;
const TRANSPORT_PARAMETERS: u64 = 0x3f51_5330_0d0a_0d0a;
const PING: u64 = 0x348c_6752_9ef8_c7bd;
const PONG: u64 = 0x348c_6752_9ef8_c7be;

/// How the peer broke the rules. Each has an error code of RFC 9000 section 20.1, with which the connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// More data than was allowed.
    FlowControl,
    /// More streams than were allowed.
    StreamLimit,
    /// A frame about a stream that can't have it.
    StreamState,
    /// A stream ended somewhere else than it had ended before, or before what was sent of it.
    FinalSize,
    /// A frame or record that can't be decoded, is too large, or has no place here.
    FrameEncoding,
    /// The transport parameters are not first, not alone, or not possible.
    TransportParameters,
    /// Bytes of a stream out of order, or another rule.
    Protocol,
}

impl Violation {
    /// The error code, as in CONNECTION_CLOSE.
    #[must_use]
    pub const fn code(self) -> u64 {
        match self {
            Self::FlowControl => 0x03,
            Self::StreamLimit => 0x04,
            Self::StreamState => 0x05,
            Self::FinalSize => 0x06,
            Self::FrameEncoding => 0x07,
            Self::TransportParameters => 0x08,
            Self::Protocol => 0x0a,
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FlowControl => "more data than was allowed",
            Self::StreamLimit => "more streams than were allowed",
            Self::StreamState => "a frame about a stream that can't have it",
            Self::FinalSize => "a stream that ended in two places",
            Self::FrameEncoding => "bytes that are no frame",
            Self::TransportParameters => "transport parameters that are not first or not possible",
            Self::Protocol => "bytes of a stream out of order",
        })
    }
}

impl std::error::Error for Violation {}

/// Who a connection is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who connected.
    Client,
    /// Who was connected to.
    Server,
}

/// In which directions a stream carries data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// Both.
    Bi,
    /// From its opener.
    Uni,
}

impl Direction {
    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Bi => 0,
            Self::Uni => 1,
        }
    }
}

/// A stream (RFC 9000 section 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u64);

impl StreamId {
    pub(crate) const fn new(opener: Side, direction: Direction, number: u64) -> Self {
        let opener = match opener {
            Side::Client => 0,
            Side::Server => 1,
        };
        let direction = match direction {
            Direction::Bi => 0,
            Direction::Uni => 2,
        };
        Self(number << 2 | direction | opener)
    }

    /// Its number on the wire.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Who opened it.
    #[must_use]
    pub const fn opener(self) -> Side {
        if self.0 & 1 == 0 { Side::Client } else { Side::Server }
    }

    /// Its direction.
    #[must_use]
    pub const fn direction(self) -> Direction {
        if self.0 & 2 == 0 { Direction::Bi } else { Direction::Uni }
    }

    /// Which one of its kind it is, from 0.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0 >> 2
    }
}

/// Why a peer closes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Close {
    /// It is the application that closes, not the transport.
    pub application: bool,
    /// The error code.
    pub code: u64,
    /// For people.
    pub reason: Bytes,
}

/// What one side allows the other, and how it is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Milliseconds of silence after which the connection is gone; 0: never.
    pub max_idle_timeout: u64,
    /// Bytes on all streams together.
    pub max_data: u64,
    /// Bytes on a bidirectional stream that the sender of this opens.
    pub max_stream_data_bidi_local: u64,
    /// Bytes on a bidirectional stream that the receiver of this opens.
    pub max_stream_data_bidi_remote: u64,
    /// Bytes on a unidirectional stream.
    pub max_stream_data_uni: u64,
    /// Bidirectional streams.
    pub max_streams_bidi: u64,
    /// Unidirectional streams.
    pub max_streams_uni: u64,
    /// Bytes of a DATAGRAM frame, type and length included; 0: none.
    pub max_datagram_frame_size: u64,
    /// Bytes of frames in a record.
    pub max_record_size: u64,
}

impl Default for Parameters {
    /// What holds for whoever says nothing.
    fn default() -> Self {
        Self {
            max_idle_timeout: 0,
            max_data: 0,
            max_stream_data_bidi_local: 0,
            max_stream_data_bidi_remote: 0,
            max_stream_data_uni: 0,
            max_streams_bidi: 0,
            max_streams_uni: 0,
            max_datagram_frame_size: 0,
            max_record_size: RECORD_BYTES as u64,
        }
    }
}

const MAX_RECORD_SIZE: u64 = 0x0571_c594_29cd_0845;

impl Parameters {
    const IDS: [u64; 9] = [0x01, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x20, MAX_RECORD_SIZE];

    fn fields(&mut self) -> [&mut u64; 9] {
        [
            &mut self.max_idle_timeout,
            &mut self.max_data,
            &mut self.max_stream_data_bidi_local,
            &mut self.max_stream_data_bidi_remote,
            &mut self.max_stream_data_uni,
            &mut self.max_streams_bidi,
            &mut self.max_streams_uni,
            &mut self.max_datagram_frame_size,
            &mut self.max_record_size,
        ]
    }

    fn encode(&self, out: &mut BytesMut) {
        let (mut own, mut default) = (*self, Self::default());
        for ((id, value), default) in Self::IDS.into_iter().zip(own.fields()).zip(default.fields()) {
            if *value != *default {
                put_varint(out, id);
                put_varint(out, varint_len(*value) as u64);
                put_varint(out, *value);
            }
        }
    }

    fn decode(mut bytes: Bytes) -> Result<Self, Violation> {
        let wrong = Violation::TransportParameters;
        let mut parameters = Self::default();
        let mut seen = [false; 9];
        while bytes.has_remaining() {
            let id = get_varint(&mut bytes).ok_or(wrong)?;
            let len = get_varint(&mut bytes).and_then(|len| usize::try_from(len).ok()).ok_or(wrong)?;
            if len > bytes.len() {
                return Err(wrong);
            }
            let mut value = bytes.split_to(len);
            let Some(index) = Self::IDS.iter().position(|known| *known == id) else {
                // The others of RFC 9000 speak of packets, paths and connection ids.
                if id <= 0x10 {
                    return Err(wrong);
                }
                continue;
            };
            let number = get_varint(&mut value).filter(|_| value.is_empty()).ok_or(wrong)?;
            let first = seen.get_mut(index).is_some_and(|seen| !std::mem::replace(seen, true));
            if !first {
                return Err(wrong);
            }
            if let Some(field) = parameters.fields().into_iter().nth(index) {
                *field = number;
            }
        }
        let possible = parameters.max_streams_bidi <= STREAMS_MAX
            && parameters.max_streams_uni <= STREAMS_MAX
            && parameters.max_record_size >= RECORD_BYTES as u64;
        possible.then_some(parameters).ok_or(wrong)
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The sender's parameters: its first frame.
    Parameters(Parameters),
    /// The sender gives a stream up.
    ResetStream {
        /// Which one.
        id: StreamId,
        /// The application's code.
        code: u64,
        /// Bytes sent of it.
        final_size: u64,
    },
    /// The sender reads a stream no more.
    StopSending {
        /// Which one.
        id: StreamId,
        /// The application's code.
        code: u64,
    },
    /// Bytes of a stream.
    Stream {
        /// Which one.
        id: StreamId,
        /// Where they stand in it.
        offset: u64,
        /// They are the last.
        fin: bool,
        /// The bytes.
        data: Bytes,
    },
    /// Bytes that may be sent on all streams together, from the beginning.
    MaxData(u64),
    /// Bytes that may be sent on a stream, from its beginning.
    MaxStreamData {
        /// Which one.
        id: StreamId,
        /// How many.
        max: u64,
    },
    /// Streams that may be opened, from the beginning.
    MaxStreams {
        /// Of which kind.
        direction: Direction,
        /// How many.
        max: u64,
    },
    /// The sender would send more: DATA_BLOCKED, STREAM_DATA_BLOCKED (with a stream) or STREAMS_BLOCKED.
    Blocked(Option<StreamId>),
    /// The end.
    Close(Close),
    /// A message for itself.
    Datagram(Bytes),
    /// Answer with the same number.
    Ping(u64),
    /// The answer.
    Pong(u64),
}

impl Frame {
    /// Appends the frame. Numbers are at most [`VARINT_MAX`].
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Parameters(parameters) => {
                let mut body = BytesMut::new();
                parameters.encode(&mut body);
                put_varints(out, &[TRANSPORT_PARAMETERS, body.len() as u64]);
                out.put(body);
            }
            Self::ResetStream { id, code, final_size } => {
                put_varints(out, &[RESET_STREAM, id.0, *code, *final_size]);
            }
            Self::StopSending { id, code } => put_varints(out, &[STOP_SENDING, id.0, *code]),
            Self::Stream { id, offset, fin, data } => {
                put_stream_header(out, *id, *offset, data.len(), *fin);
                out.put_slice(data);
            }
            Self::MaxData(max) => put_varints(out, &[MAX_DATA, *max]),
            Self::MaxStreamData { id, max } => put_varints(out, &[MAX_STREAM_DATA, id.0, *max]),
            Self::MaxStreams { direction: Direction::Bi, max } => put_varints(out, &[MAX_STREAMS_BIDI, *max]),
            Self::MaxStreams { direction: Direction::Uni, max } => put_varints(out, &[MAX_STREAMS_UNI, *max]),
            // This side never says so; what is decoded forgets the numbers, which change nothing.
            Self::Blocked(None) => put_varints(out, &[DATA_BLOCKED, 0]),
            Self::Blocked(Some(id)) => put_varints(out, &[STREAM_DATA_BLOCKED, id.0, 0]),
            Self::Close(close) => {
                let reason = close.reason.get(..REASON_BYTES_MAX).unwrap_or(&close.reason);
                if close.application {
                    put_varints(out, &[APPLICATION_CLOSE, close.code]);
                } else {
                    // Which frame it was about is not said: 0.
                    put_varints(out, &[CONNECTION_CLOSE, close.code, 0]);
                }
                put_varint(out, reason.len() as u64);
                out.put_slice(reason);
            }
            Self::Datagram(data) => {
                put_varints(out, &[DATAGRAM_LEN, data.len() as u64]);
                out.put_slice(data);
            }
            Self::Ping(number) => put_varints(out, &[PING, *number]),
            Self::Pong(number) => put_varints(out, &[PONG, *number]),
        }
    }

    /// Takes the next frame of a record; `None` at its end. Payloads share the record's memory.
    ///
    /// # Errors
    /// What stands there is no frame that may be here, or is cut.
    pub fn decode(record: &mut Bytes) -> Result<Option<Self>, Violation> {
        let cut = Violation::FrameEncoding;
        let kind = loop {
            if record.is_empty() {
                return Ok(None);
            }
            match get_varint(record).ok_or(cut)? {
                PADDING => {}
                kind => break kind,
            }
        };
        let mut number = || get_varint(record).ok_or(cut);
        let frame = match kind {
            RESET_STREAM => {
                Self::ResetStream { id: StreamId(number()?), code: number()?, final_size: number()? }
            }
            STOP_SENDING => Self::StopSending { id: StreamId(number()?), code: number()? },
            STREAM..=STREAM_LAST => {
                let id = StreamId(number()?);
                let offset = if kind & OFF == 0 { 0 } else { number()? };
                let data = if kind & LEN == 0 {
                    record.split_to(record.len())
                } else {
                    get_bytes(record).ok_or(cut)?
                };
                if offset.saturating_add(data.len() as u64) > VARINT_MAX {
                    return Err(cut);
                }
                Self::Stream { id, offset, fin: kind & FIN != 0, data }
            }
            MAX_DATA => Self::MaxData(number()?),
            MAX_STREAM_DATA => Self::MaxStreamData { id: StreamId(number()?), max: number()? },
            MAX_STREAMS_BIDI | MAX_STREAMS_UNI => {
                let direction = if kind == MAX_STREAMS_BIDI { Direction::Bi } else { Direction::Uni };
                let max = number()?;
                if max > STREAMS_MAX {
                    return Err(cut);
                }
                Self::MaxStreams { direction, max }
            }
            DATA_BLOCKED | STREAMS_BLOCKED_BIDI | STREAMS_BLOCKED_UNI => {
                number()?;
                Self::Blocked(None)
            }
            STREAM_DATA_BLOCKED => {
                let id = StreamId(number()?);
                number()?;
                Self::Blocked(Some(id))
            }
            CONNECTION_CLOSE | APPLICATION_CLOSE => {
                let code = number()?;
                if kind == CONNECTION_CLOSE {
                    number()?;
                }
                let reason = get_bytes(record).ok_or(cut)?;
                let reason = reason.get(..REASON_BYTES_MAX).unwrap_or(&reason);
                let reason = Bytes::copy_from_slice(reason);
                Self::Close(Close { application: kind == APPLICATION_CLOSE, code, reason })
            }
            DATAGRAM => Self::Datagram(record.split_to(record.len())),
            DATAGRAM_LEN => Self::Datagram(get_bytes(record).ok_or(cut)?),
            TRANSPORT_PARAMETERS => Self::Parameters(Parameters::decode(get_bytes(record).ok_or(cut)?)?),
            PING => Self::Ping(number()?),
            PONG => Self::Pong(number()?),
            _ => return Err(cut),
        };
        Ok(Some(frame))
    }
}

/// Appends a STREAM frame up to its data.
pub(super) fn put_stream_header(out: &mut BytesMut, id: StreamId, offset: u64, len: usize, fin: bool) {
    let (at, fin) = (if offset > 0 { OFF } else { 0 }, if fin { FIN } else { 0 });
    put_varints(out, &[STREAM | LEN | at | fin, id.0]);
    if offset > 0 {
        put_varint(out, offset);
    }
    put_varint(out, len as u64);
}

/// Bytes of a STREAM frame up to its data, at most.
pub(super) const fn stream_header_max(id: StreamId, offset: u64) -> usize {
    1 + varint_len(id.0) + varint_len(offset) + 4
}

/// Bytes of a variable-length integer. Above [`VARINT_MAX`]: as many as for that.
#[must_use]
pub const fn varint_len(value: u64) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Appends a variable-length integer; [`VARINT_MAX`] for what is larger.
pub fn put_varint(out: &mut BytesMut, value: u64) {
    let value = if value > VARINT_MAX { VARINT_MAX } else { value };
    match varint_len(value) {
        1 => out.put_uint(value, 1),
        2 => out.put_uint(value | 0x4000, 2),
        4 => out.put_uint(value | 0x8000_0000, 4),
        _ => out.put_u64(value | 0xc000_0000_0000_0000),
    }
}

fn put_varints(out: &mut BytesMut, values: &[u64]) {
    for value in values {
        put_varint(out, *value);
    }
}

/// Takes a variable-length integer; `None` and nothing taken if it is cut.
pub fn get_varint(bytes: &mut impl Buf) -> Option<u64> {
    let first = *bytes.chunk().first()?;
    let len = 1usize << (first >> 6);
    if bytes.remaining() < len {
        return None;
    }
    let mask = u64::MAX >> (64 - 8 * len + 2);
    Some(bytes.get_uint(len) & mask)
}

fn get_bytes(bytes: &mut Bytes) -> Option<Bytes> {
    let len = usize::try_from(get_varint(bytes)?).ok()?;
    (len <= bytes.len()).then(|| bytes.split_to(len))
}

//! Bytes of the primitive fields, and the incremental decoder of a stream.
//!
//! - Integers are QUIC variable-length integers (RFC 9000 section 16).
//! - A decoder holds at most one frame's worth of bytes (its channel's limit) beyond what was last pushed.
//! - A payload is a slice of what came in: no copy, but it pins its receive buffer; copy what outlives the tick.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::Frame;
use crate::{error::DecodeError, limit::VARINT_MAX};

/// Bytes the variable-length encoding of `value` takes: 1, 2, 4 or 8.
#[must_use]
pub const fn varint_len(value: u64) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Appends `value`; values above [`VARINT_MAX`] have no encoding and are written as it (ids can't exceed it).
#[expect(clippy::cast_possible_truncation, reason = "each arm holds only values that fit")]
pub fn put_varint(out: &mut impl BufMut, value: u64) {
    match varint_len(value) {
        1 => out.put_u8(value as u8),
        2 => out.put_u16(0x4000 | value as u16),
        4 => out.put_u32(0x8000_0000 | value as u32),
        _ => out.put_u64(0xc000_0000_0000_0000 | value.min(VARINT_MAX)),
    }
}

/// Reads an integer off the front of `input` without consuming it: value and length, `None` when it is cut.
#[must_use]
pub fn peek_varint(input: &[u8]) -> Option<(u64, usize)> {
    let first = *input.first()?;
    let len = 1usize << (first >> 6);
    let bytes = input.get(1..len)?;
    let value = bytes.iter().fold(u64::from(first & 0x3f), |value, byte| (value << 8) | u64::from(*byte));
    Some((value, len))
}

/// Reads fields off one frame's bytes.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a mut Bytes);

impl Fields<'_> {
    pub(super) fn varint(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        let (value, len) = peek_varint(self.0).ok_or(DecodeError::Truncated { field })?;
        self.0.advance(len);
        Ok(value)
    }

    pub(super) fn id<T: TryFrom<u64>>(&mut self, field: &'static str) -> Result<T, DecodeError> {
        T::try_from(self.varint(field)?).map_err(|_| DecodeError::BadValue { field })
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        u32::try_from(self.varint(field)?).map_err(|_| DecodeError::BadValue { field })
    }

    /// A count of entries, at most `max`.
    pub(super) fn count(&mut self, field: &'static str, max: usize) -> Result<usize, DecodeError> {
        match usize::try_from(self.varint(field)?) {
            Ok(count) if count <= max => Ok(count),
            _ => Err(DecodeError::BadValue { field }),
        }
    }

    pub(super) fn take(&mut self, len: usize, field: &'static str) -> Result<Bytes, DecodeError> {
        if len > self.0.len() {
            return Err(DecodeError::Truncated { field });
        }
        Ok(self.0.split_to(len))
    }

    /// Everything that is left, at most `max` bytes.
    pub(super) fn rest(&mut self, field: &'static str, max: usize) -> Result<Bytes, DecodeError> {
        if self.0.len() > max {
            return Err(DecodeError::BadValue { field });
        }
        Ok(self.0.split_off(0))
    }

    pub(super) fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::TrailingBytes(self.0.len())) }
    }
}

/// Maps signed numbers onto unsigned ones, small magnitudes first.
pub(super) const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

/// The inverse of [`zigzag`].
pub(super) const fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

/// Cuts a stream of bytes into frames.
///
/// ```
/// use fulmar_protocol::frame::{Decoder, Frame, Ping};
/// let ping = Frame::Ping(Ping { id: 7, time_ms: 1, flags: 0, padding: 0 });
/// let bytes = ping.to_bytes();
/// let mut decoder = Decoder::new(4096);
/// decoder.push(bytes.slice(..2));
/// assert_eq!(decoder.next()?, None);
/// decoder.push(bytes.slice(2..));
/// assert_eq!(decoder.next()?, Some(ping));
/// # Ok::<(), fulmar_protocol::error::DecodeError>(())
/// ```
#[derive(Debug)]
pub struct Decoder {
    /// Bytes that came in one piece and are not consumed yet.
    whole: Bytes,
    /// A frame that was cut; while this is not empty, `whole` is.
    cut: BytesMut,
    limit: usize,
    consumed: u64,
}

impl Decoder {
    /// A decoder that refuses frames of more than `limit` bytes (type and body).
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { whole: Bytes::new(), cut: BytesMut::new(), limit, consumed: 0 }
    }

    /// Changes the limit, for frames whose length was not read yet.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Takes the next bytes of the stream. Call [`Self::next`] until it says `None` before pushing more, so that no
    /// more than one frame is ever held.
    pub fn push(&mut self, bytes: Bytes) {
        if self.whole.is_empty() && self.cut.is_empty() {
            self.whole = bytes;
        } else {
            if !self.whole.is_empty() {
                self.cut.extend_from_slice(&self.whole);
                self.whole = Bytes::new();
            }
            self.cut.extend_from_slice(&bytes);
        }
    }

    /// Bytes pushed and not yet returned as frames.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.whole.len() + self.cut.len()
    }

    /// Bytes of the stream consumed by the frames returned (or skipped) so far: where an error is.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.consumed
    }

    /// The next varint, for the header of a stream (`kind index`).
    pub fn next_varint(&mut self) -> Option<u64> {
        let (value, len) = peek_varint(self.front())?;
        self.advance(len);
        Some(value)
    }

    /// The next frame; `None` when more bytes are needed. Unknown odd types are skipped.
    ///
    /// # Errors
    /// The stream can't be read on: close the connection with [`DecodeError::close_code`].
    #[expect(clippy::should_implement_trait, reason = "an iterator would hide that more bytes may come")]
    pub fn next(&mut self) -> Result<Option<Frame>, DecodeError> {
        loop {
            let Some((length, header)) = peek_varint(self.front()) else { return Ok(None) };
            let body = match usize::try_from(length) {
                Ok(body) if body <= self.limit => body,
                _ => return Err(DecodeError::TooLarge { length, limit: self.limit }),
            };
            if self.front().len() < header + body {
                return Ok(None);
            }
            let bytes = if self.cut.is_empty() {
                self.whole.advance(header);
                self.whole.split_to(body)
            } else {
                self.cut.advance(header);
                self.cut.split_to(body).freeze()
            };
            let frame = Frame::decode(bytes)?;
            self.consumed += (header + body) as u64;
            if let Some(frame) = frame {
                return Ok(Some(frame));
            }
        }
    }

    fn front(&self) -> &[u8] {
        if self.cut.is_empty() { &self.whole } else { &self.cut }
    }

    fn advance(&mut self, len: usize) {
        self.consumed += len as u64;
        if self.cut.is_empty() { self.whole.advance(len) } else { self.cut.advance(len) }
    }
}

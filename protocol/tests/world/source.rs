//! Choices read off a string of bytes; when it ends, every choice is the first one.

use bytes::Bytes;
use fulmar_protocol::limit::VARINT_MAX;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Source<'a> {
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    /// Choices off `bytes`.
    #[must_use]
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Whether nothing is left to choose from.
    #[must_use]
    pub(crate) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Any byte.
    pub(crate) fn byte(&mut self) -> u8 {
        match self.bytes.split_first() {
            Some((first, rest)) => {
                self.bytes = rest;
                *first
            }
            None => 0,
        }
    }

    /// One of two.
    pub(crate) fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// A number below `n` (at most 256 different ones).
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n.max(1)
    }

    /// Any number: first its width, then its bytes, so that small ones and the edges come up.
    pub(crate) fn wide(&mut self) -> u64 {
        match self.byte() % 8 {
            0..=3 => u64::from(self.byte()),
            4 => u64::from(self.byte()) << 8 | u64::from(self.byte()),
            5 => (0..4).fold(0, |number, _| number << 8 | u64::from(self.byte())),
            6 => (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte())),
            _ => u64::MAX - u64::from(self.byte()),
        }
    }

    /// A number that has an encoding.
    pub(crate) fn varint(&mut self) -> u64 {
        self.wide().min(VARINT_MAX)
    }

    /// A number of at most 32 bits.
    pub(crate) fn narrow(&mut self) -> u32 {
        u32::try_from(self.wide()).unwrap_or(u32::MAX)
    }

    /// An id.
    pub(crate) fn id<T: TryFrom<u64>>(&mut self) -> T
    where
        T::Error: core::fmt::Debug,
    {
        T::try_from(self.varint()).expect("a varint is an id")
    }

    /// An id that is not zero.
    pub(crate) fn some_id<T: TryFrom<u64>>(&mut self) -> T
    where
        T::Error: core::fmt::Debug,
    {
        T::try_from(self.varint().max(1)).expect("a varint is an id")
    }

    /// At most `max` bytes, mostly few.
    pub(crate) fn payload(&mut self, max: usize) -> Bytes {
        let len = match self.byte() {
            255 => max,
            254 => max / 2,
            short => usize::from(short) % 24,
        };
        (0..len.min(max)).map(|_| self.byte()).collect()
    }

    /// A string of at most `max` bytes.
    pub(crate) fn text(&mut self, max: usize) -> String {
        let bytes = self.payload(max);
        String::from_utf8_lossy(&bytes).chars().filter(char::is_ascii).collect()
    }

    /// A list of at most `max`, mostly few.
    pub(crate) fn list<T>(&mut self, max: usize, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let len = match self.byte() {
            255 => max,
            short => usize::from(short) % 6,
        };
        (0..len.min(max)).map(|_| one(self)).collect()
    }
}

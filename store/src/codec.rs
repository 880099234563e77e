//! Reading and writing the fields of records, operations and rows.
//!
//! - Integers are LEB128 varints (7 bits per byte, low bits first) unless a layout says "big-endian".
//! - A [`Cursor`] never reads past its end and never allocates: damaged bytes give [`Malformed`], nothing else.
//!
//! Not here: what the fields mean (`record`, `op`, `row`), keys (`key`).

use fulmar_protocol::id::NumberTooLarge;

/// Bytes that are not what was written: the field that could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0}")]
pub struct Malformed(pub &'static str);

/// Longest varint: 64 bits at 7 bits per byte.
const VARINT_BYTES_MAX: usize = 10;

/// Appends `value` as a varint.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let [low, ..] = value.to_le_bytes();
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

/// Walks over bytes from disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes walked over so far.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        let byte = *self.bytes.get(self.at).ok_or(Malformed(what))?;
        self.at += 1;
        Ok(byte)
    }

    pub(crate) fn varint(&mut self, what: &'static str) -> Result<u64, Malformed> {
        let mut value = 0u64;
        for n in 0..VARINT_BYTES_MAX {
            let byte = self.u8(what)?;
            let bits = u64::from(byte & 0x7f);
            if n == VARINT_BYTES_MAX - 1 && bits > 1 {
                return Err(Malformed(what));
            }
            value |= bits << (7 * n);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed(what))
    }

    /// A varint that must be a number of the wire (62 bits).
    pub(crate) fn number<T: TryFrom<u64, Error = NumberTooLarge>>(
        &mut self,
        what: &'static str,
    ) -> Result<T, Malformed> {
        T::try_from(self.varint(what)?).map_err(|_| Malformed(what))
    }

    pub(crate) fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(n).ok_or(Malformed(what))?;
        let slice = self.bytes.get(self.at..end).ok_or(Malformed(what))?;
        self.at = end;
        Ok(slice)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        self.take(N, what)?.try_into().map_err(|_| Malformed(what))
    }

    /// A varint length that fits what is left.
    pub(crate) fn length(&mut self, what: &'static str) -> Result<usize, Malformed> {
        let n = usize::try_from(self.varint(what)?).map_err(|_| Malformed(what))?;
        if n > self.bytes.len() - self.at { Err(Malformed(what)) } else { Ok(n) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn varints_come_back(values in proptest::collection::vec(any::<u64>(), 0..20)) {
            let mut out = Vec::new();
            for value in &values {
                put_varint(&mut out, *value);
            }
            let mut cursor = Cursor::new(&out);
            for value in &values {
                prop_assert_eq!(cursor.varint("v"), Ok(*value));
            }
            prop_assert!(cursor.is_empty());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut cursor = Cursor::new(&bytes);
            while cursor.varint("v").is_ok() {}
            let mut cursor = Cursor::new(&bytes);
            if let Ok(n) = cursor.length("n") {
                prop_assert!(cursor.take(n, "body").is_ok());
            }
        }
    }

    #[test]
    fn a_varint_of_more_than_64_bits_is_refused() {
        let mut bytes = [0xff; 10];
        bytes[9] = 0x02;
        assert_eq!(Cursor::new(&bytes).varint("v"), Err(Malformed("v")));
        bytes[9] = 0x01;
        assert_eq!(Cursor::new(&bytes).varint("v"), Ok(u64::MAX));
    }
}

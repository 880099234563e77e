//! Blocks: consecutive records of one conversation, gathered into values the engine likes.
//!
//! - A block of several records fits one chunk; a record too large for that is a block of its own in several chunks.
//! - Bytes: `version (1), records, length of what follows` (varints), then the records as `record` writes them.
//! - Every record is verified whenever a block is read, and must have the seq its place says.
//!
//! Not here: when blocks are written (`shard::settle`), reading ranges (`shard::view`).

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, Seq};

use crate::{
    codec::{Cursor, Malformed, put_varint},
    commit::CHUNK_BYTES,
    record::Record,
};

const VERSION: u8 = 1;

/// Bytes before the records, every number at its widest a block can have.
const HEADER_BYTES_MAX: usize = 1 + 2 + 3;

/// Bytes of records that fit a block of one chunk.
pub(crate) const RECORDS_BYTES: usize = CHUNK_BYTES - HEADER_BYTES_MAX;

/// A last block smaller than this is written again with more records in it; a larger one is left alone. Small blocks
/// cost a row each, and rewriting costs their bytes again: this bounds both.
pub(crate) const REWRITE_BELOW_BYTES: usize = CHUNK_BYTES / 2;

/// Puts records together until the block is full.
#[derive(Debug)]
pub(crate) struct Builder {
    pub(crate) first: Seq,
    pub(crate) count: u64,
    records: Vec<u8>,
}

impl Builder {
    pub(crate) fn new(first: Seq) -> Self {
        Self { first, count: 0, records: Vec::with_capacity(CHUNK_BYTES) }
    }

    /// Whether one more record of so many bytes belongs into this block.
    pub(crate) fn fits(&self, bytes: usize) -> bool {
        self.count == 0 || self.records.len() + bytes <= RECORDS_BYTES
    }

    pub(crate) fn push(&mut self, encoded: &[u8]) {
        self.records.extend_from_slice(encoded);
        self.count += 1;
    }

    /// The block's bytes, to be cut into chunks.
    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.records.len() + HEADER_BYTES_MAX);
        out.push(VERSION);
        put_varint(&mut out, self.count);
        put_varint(&mut out, self.records.len() as u64);
        out.extend_from_slice(&self.records);
        out
    }
}

/// What the start of chunk 0 says about a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) count: u64,
    header_bytes: usize,
    records_bytes: usize,
}

impl Header {
    pub(crate) fn decode(chunk: &[u8]) -> Result<Self, Malformed> {
        let mut at = Cursor::new(chunk);
        if at.u8("block version")? != VERSION {
            return Err(Malformed("block version"));
        }
        let count = at.varint("block record count")?;
        let records_bytes =
            usize::try_from(at.varint("block length")?).map_err(|_| Malformed("block length"))?;
        if count == 0 || records_bytes > crate::op::BATCH_BYTES_MAX {
            return Err(Malformed("block length"));
        }
        Ok(Self { count, header_bytes: at.at(), records_bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.header_bytes + self.records_bytes
    }

    pub(crate) fn chunks(&self) -> usize {
        self.bytes().div_ceil(CHUNK_BYTES)
    }
}

/// The records of a whole block with the bytes each was read from, all verified.
pub(crate) fn decode(
    conversation: ConversationId,
    first: Seq,
    bytes: &Bytes,
) -> Result<Vec<(Record, Bytes)>, Malformed> {
    let header = Header::decode(bytes)?;
    if bytes.len() != header.bytes() {
        return Err(Malformed("block length"));
    }
    let mut records = Vec::new();
    let mut at = header.header_bytes;
    let mut expected = first;
    while at < bytes.len() {
        let rest = bytes.slice(at..);
        let (record, taken) = Record::decode(conversation, &rest)?;
        if record.seq != expected {
            return Err(Malformed("block: a record out of place"));
        }
        expected = expected.next().ok_or(Malformed("block: seq"))?;
        records.push((record, rest.slice(..taken)));
        at += taken;
    }
    if records.len() as u64 != header.count {
        return Err(Malformed("block record count"));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{DeviceId, Epoch, Pseq, UnixMillis, UserId};
    use proptest::prelude::*;

    use super::*;
    use crate::record::RecordKind;

    fn record(seq: u64, payload: &'static [u8]) -> Record {
        Record {
            seq: Seq::new(seq).unwrap(),
            kind: RecordKind::Message,
            sender: UserId::new(256).unwrap(),
            device: DeviceId::ZERO,
            epoch: Epoch::ZERO,
            pseq: Pseq::ZERO,
            time: UnixMillis::new(1).unwrap(),
            count: seq,
            target: None,
            ttl: None,
            more: false,
            silent: false,
            payload: Bytes::from_static(payload),
        }
    }

    fn block(first: u64, n: u64) -> Bytes {
        let mut builder = Builder::new(Seq::new(first).unwrap());
        for seq in first..first + n {
            let mut encoded = Vec::new();
            record(seq, b"hi").encode(ConversationId::new(256).unwrap(), &mut encoded);
            assert!(builder.fits(encoded.len()));
            builder.push(&encoded);
        }
        builder.finish().into()
    }

    #[test]
    fn a_block_comes_back_and_its_bytes_are_pinned() {
        let conversation = ConversationId::new(256).unwrap();
        let bytes = block(5, 2);
        assert_eq!(crate::hex(&bytes), GOLDEN);
        let back = decode(conversation, Seq::new(5).unwrap(), &bytes).unwrap();
        assert_eq!(
            back.iter().map(|(r, _)| r.clone()).collect::<Vec<_>>(),
            [record(5, b"hi"), record(6, b"hi")]
        );
        assert!(
            decode(conversation, Seq::new(4).unwrap(), &bytes).is_err(),
            "not the place it was written to"
        );
    }

    // version, two records, 28 bytes | record 5 | record 6
    const GOLDEN: &str = "01021c01000501800205026869ebbefeb201000601800206026869bbb0980b";

    proptest! {
        #[test]
        fn damage_is_noticed(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = block(5, 3).to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode(ConversationId::new(256).unwrap(), Seq::new(5).unwrap(), &bytes.into()).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(ConversationId::new(256).unwrap(), Seq::new(5).unwrap(), &bytes.into());
        }
    }
}

//! The segments a shard has open, and the index rows that point into them.
//!
//! - A row of the `run` table says in which segment a run lies. Rows are moved to a merged segment before the segments it was
//!   made from are closed; a reader that comes too late finds the segment gone and looks the row up again.
//!
//! Not here: a segment's bytes (`segment`), which of them there are (`manifest`).

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, Seq};

use crate::{
    codec::{Cursor, Malformed, put_varint},
    segment::{Run, Segment, SegmentError},
};

const VERSION: u8 = 1;

/// Where a run lies: a row of the `run` table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) segment: u64,
    pub(crate) run: Run,
}

impl Placed {
    /// The row; its key has the conversation and the first seq.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(32);
        out.push(VERSION);
        put_varint(&mut out, self.segment);
        put_varint(&mut out, self.run.count);
        put_varint(&mut out, self.run.newest.get());
        put_varint(&mut out, self.run.offset);
        put_varint(&mut out, u64::from(self.run.bytes));
        out.extend_from_slice(&self.run.crc.to_be_bytes());
        out
    }

    pub(crate) fn decode(conversation: ConversationId, first: Seq, row: &[u8]) -> Result<Self, Malformed> {
        let mut at = Cursor::new(row);
        if at.u8("run row version")? != VERSION {
            return Err(Malformed("run row version"));
        }
        let segment = at.varint("run row segment")?;
        let count = at.varint("run row count")?;
        let newest = at.number("run row time")?;
        let offset = at.varint("run row offset")?;
        let bytes = u32::try_from(at.varint("run row length")?).map_err(|_| Malformed("run row length"))?;
        let crc = u32::from_be_bytes(at.array("run row checksum")?);
        if count == 0 || !at.is_empty() {
            return Err(Malformed("run row"));
        }
        Ok(Self { segment, run: Run { conversation, first, count, newest, offset, bytes, crc } })
    }
}

/// Why a run could not be read.
#[derive(Debug)]
pub(crate) enum RunError<E> {
    /// The segment was merged into another meanwhile: look the row up again.
    Gone,
    Failed(E),
}

/// The open segments of a shard.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    open: RwLock<HashMap<u64, Arc<Segment>>>,
}

impl Segments {
    pub(crate) fn add(&self, id: u64, segment: Arc<Segment>) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(id, segment);
    }

    pub(crate) fn remove(&self, id: u64) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    pub(crate) fn get(&self, id: u64) -> Option<Arc<Segment>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// The bytes of a run, verified.
    pub(crate) fn run(&self, placed: &Placed) -> Result<Bytes, RunError<SegmentError>> {
        let segment = self.get(placed.segment).ok_or(RunError::Gone)?;
        segment.run(&placed.run).map_err(RunError::Failed)
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::UnixMillis;
    use proptest::prelude::*;

    use super::*;

    fn placed() -> Placed {
        let run = Run {
            conversation: ConversationId::new(256).unwrap(),
            first: Seq::new(7).unwrap(),
            count: 3,
            newest: UnixMillis::new(300).unwrap(),
            offset: 64,
            bytes: 200,
            crc: 0x0102_0304,
        };
        Placed { segment: 5, run }
    }

    #[test]
    fn bytes_are_pinned() {
        let row = placed().encode();
        assert_eq!(crate::hex(&row), "010503ac0240c80101020304");
        assert_eq!(Placed::decode(placed().run.conversation, placed().run.first, &row), Ok(placed()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Placed::decode(placed().run.conversation, placed().run.first, &bytes);
        }
    }
}

//! Segments: the settled log of a shard, in files that are written once and never changed.
//!
//! - A segment holds what a range of commits left behind: *runs*, consecutive records of one conversation, and the *rows*
//!   that changed, each with what it became or with the word that it is gone.
//! - Runs lie in order of (conversation, seq), rows in order of (table, key). Every byte of a file belongs to something that
//!   a checksum covers, and nothing is given out before that checksum was verified.
//! - The checksums of index, rows, directory and footer are seeded with the header and the place, so that a block of another
//!   segment, or of another place, is damage.
//! - Memory is bounded on both sides, whatever the file says: writing keeps a buffer, one index block and 16 bytes for every index
//!   block written; reading keeps one block or one run; merging keeps that once per input.
//!
//! [`Runs`], [`Rows`], [`Records`] and [`Verifier`] own what they need (a [`Segment`] is a cheap clone), so that they can be kept
//! between steps. [`changes`] says what a merge means for the table of runs.
//!
//! ```text
//! header 64 │ runs │ index block │ runs │ index block │ … │ row blocks │ directory blocks │ footer 128
//! ```
//!
//! The runs of a *cold* segment lie elsewhere, cut into compressed frames ([`frames`]); its file has everything else.
//!
//! Not here: which segments make up a shard (the manifest), when they are merged, where readers find a run (the engine's table).

use std::{io, ops::RangeInclusive};

use fulmar_protocol::id::{ConversationId, Seq, ShardId, UnixMillis};

use crate::{
    codec::Malformed,
    record::{RECORD_HEADER_BYTES_MAX, RECORD_PAYLOAD_BYTES_MAX},
};

mod frames;
mod layout;
mod merge;
mod reader;
mod rescue;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

pub(crate) use self::{
    frames::{FRAME_BYTES, FRAME_COMPRESSED_MAX, FrameWriter, Frames},
    merge::{Merge, MergeError, Step},
    reader::{Row, Rows, Runs, Segment, records},
    rescue::rescue,
    verify::{Progress, Verifier},
    writer::SegmentWriter,
};

/// A run's records' bytes at most, unless one record alone is larger.
pub(crate) const RUN_BYTES: usize = 32 * 1024;

/// Bytes of the largest run there is.
pub(crate) const RUN_BYTES_MAX: usize = {
    let record = RECORD_PAYLOAD_BYTES_MAX + RECORD_HEADER_BYTES_MAX;
    if record > RUN_BYTES { record } else { RUN_BYTES }
};

/// Bytes of key and row together at most.
pub(crate) const ROW_BYTES_MAX: usize = crate::op::BATCH_BYTES_MAX;

/// How the name of every segment's file ends.
pub(crate) const SUFFIX: &str = ".seg";

/// What the file of the segment `id` is called.
pub(crate) fn name(id: u64) -> String {
    format!("{id:016x}{SUFFIX}")
}

/// Where a run lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) conversation: ConversationId,
    /// The first record; not zero.
    pub(crate) first: Seq,
    /// Records in it; not zero.
    pub(crate) count: u64,
    /// Time of the newest record, which is the last.
    pub(crate) newest: UnixMillis,
    /// Where its bytes begin in the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
    /// crc32c of its bytes.
    pub(crate) crc: u32,
}

impl Run {
    /// The last record.
    pub(crate) fn last(&self) -> Seq {
        self.first.saturating_add(self.count.saturating_sub(1))
    }
}

/// What the footer says about the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) shard: ShardId,
    pub(crate) id: u64,
    pub(crate) first_commit: u64,
    pub(crate) last_commit: u64,
    pub(crate) runs: u64,
    /// Rows, those that are gone included.
    pub(crate) rows: u64,
    pub(crate) records: u64,
    /// Of the whole file.
    pub(crate) bytes: u64,
    /// Of all runs.
    pub(crate) run_bytes: u64,
    /// Time of the newest record; zero if there are none.
    pub(crate) newest: UnixMillis,
    /// Time of the oldest record; zero if there are none.
    pub(crate) oldest: UnixMillis,
}

/// Why a segment could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SegmentError {
    /// The operating system refused.
    #[error("the segment can't be read: {0}")]
    Io(#[from] io::Error),
    /// What lies on disk is not what was written.
    #[error("the segment is damaged: {0}")]
    Malformed(#[from] Malformed),
}

/// Which part of which segment can't be read, and why.
#[derive(Debug, thiserror::Error)]
#[error("segment {segment:016x}{}: {what}", place(*conversation, seqs.as_ref()))]
pub(crate) struct SegmentDamage {
    pub(crate) segment: u64,
    /// The conversation, if the damage is within its records.
    pub(crate) conversation: Option<ConversationId>,
    /// The records that are affected, if they are known.
    pub(crate) seqs: Option<RangeInclusive<Seq>>,
    pub(crate) what: SegmentError,
}

impl SegmentDamage {
    /// Of the segment as a whole.
    fn whole(segment: u64, what: impl Into<SegmentError>) -> Self {
        Self { segment, conversation: None, seqs: None, what: what.into() }
    }

    /// Of one run.
    fn of(segment: u64, run: &Run, what: impl Into<SegmentError>) -> Self {
        Self {
            segment,
            conversation: Some(run.conversation),
            seqs: Some(run.first..=run.last()),
            what: what.into(),
        }
    }
}

fn place(conversation: Option<ConversationId>, seqs: Option<&RangeInclusive<Seq>>) -> String {
    match (conversation, seqs) {
        (Some(conversation), Some(seqs)) => {
            format!(" (conversation {conversation}, seqs {} to {})", seqs.start(), seqs.end())
        }
        (Some(conversation), None) => format!(" (conversation {conversation})"),
        (None, _) => String::new(),
    }
}

//! Figures of a data folder, without opening it: beside a running gateway, too.
//!
//! Not here: figures a running store keeps (`ShardStats`), whether the folder is sound (`verify`).

use fulmar_protocol::id::UnixMillis;
use serde::Serialize;

/// Segments of about the same size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tier {
    /// Every segment of the tier has at most so many bytes.
    pub up_to_bytes: u64,
    /// Segments.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Figures of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardFigures {
    /// The shard.
    pub shard: u16,
    /// The edition of the manifest: how often what is settled has changed.
    pub edition: u64,
    /// The last settled commit.
    pub settled_commit: u64,
    /// The last commit that was acknowledged, as far as the tip tells.
    pub acknowledged_commit: u64,
    /// Whole commits of the log that are not settled.
    pub unsettled_commits: u64,
    /// Segments by size, small ones first.
    pub tiers: Vec<Tier>,
    /// Segments.
    pub segments: u64,
    /// Bytes of segments.
    pub segment_bytes: u64,
    /// Segments in the cold tier among them.
    pub cold_segments: u64,
    /// Records in segments, those that are gone but not yet merged away included.
    pub records: u64,
    /// Bytes of these records.
    pub record_bytes: u64,
    /// Rows in segments, older versions included.
    pub rows: u64,
    /// Bytes of segments that are not records: rows, indexes of runs, headers.
    pub row_bytes: u64,
    /// Time of the oldest record in a segment; zero if there is none.
    pub oldest: UnixMillis,
    /// Time of the newest record in a segment; zero if there is none.
    pub newest: UnixMillis,
    /// Bytes of log files.
    pub log_bytes: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// Bytes of files that belong to nothing: what an interrupted step left, removed at the next start.
    pub leftover_bytes: u64,
    /// What could not be read, if anything.
    pub problem: Option<String>,
}

/// Figures of a data folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FolderStats {
    /// The format.
    pub format: u64,
    /// The engine.
    pub engine: String,
    /// When the folder was made.
    pub created: UnixMillis,
    /// The process that has it open, if there is one that could be told.
    pub in_use_by: Option<u32>,
    /// Shard by shard.
    pub shards: Vec<ShardFigures>,
}

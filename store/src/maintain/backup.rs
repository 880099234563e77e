//! Copying a data folder while a gateway runs on it.
//!
//! Not here: copies in an object store (`cold`).

use serde::Serialize;

/// What was copied of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardCopied {
    /// The shard.
    pub shard: u16,
    /// The last commit in the copy; all before it are in it, and nothing after it.
    pub last_commit: u64,
    /// Segments in the copy.
    pub segments: u64,
    /// Segments that were there from an earlier backup.
    pub kept: u64,
    /// Segments that are the same file as in the source (hard links).
    pub linked: u64,
    /// Bytes written.
    pub copied_bytes: u64,
    /// Bytes of the copy.
    pub bytes: u64,
    /// How often it was begun again because the gateway had changed its files.
    pub retries: u32,
}

/// What backing a folder up did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BackupReport {
    /// Shard by shard.
    pub shards: Vec<ShardCopied>,
}

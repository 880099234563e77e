//! Proving a data folder: every byte of it is read and compared with what must be there.
//!
//! Not here: saving what is left of a folder that is damaged (`salvage`).

use fulmar_protocol::id::{ConversationId, Seq};
use serde::Serialize;

/// Whether something that is wrong can be made right without losing anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Repair {
    /// Only the index is wrong: `fulmar store compact` makes it again from the segments, and so does a start after the
    /// shard's folder `index` was removed.
    Index,
    /// The log itself is damaged: restore a backup, or keep what proves itself with `fulmar store salvage`.
    No,
}

/// One thing that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The shard; `None`: the folder as a whole.
    pub shard: Option<u16>,
    /// The file, relative to the data folder.
    pub file: String,
    /// The conversation, if it is about one.
    pub conversation: Option<ConversationId>,
    /// The first and the last record that are affected, if they are known.
    pub seqs: Option<(Seq, Seq)>,
    /// What is wrong.
    pub what: String,
    /// What can be done about it.
    pub repair: Repair,
}

/// What was found in one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardVerified {
    /// The shard.
    pub shard: u16,
    /// Bytes of files that were read and compared.
    pub bytes: u64,
    /// Segments among them.
    pub segments: u64,
    /// Commits of the log that are not settled yet.
    pub commits: u64,
    /// The last commit of the log that proves itself.
    pub last_commit: u64,
    /// Bytes after it that no commit was acknowledged from: the end of a process or a power cut left them.
    pub torn_bytes: u64,
    /// Conversations.
    pub conversations: u64,
    /// Records.
    pub records: u64,
    /// Rows of the index that were compared.
    pub rows: u64,
}

/// What verifying a folder found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Shard by shard.
    pub shards: Vec<ShardVerified>,
    /// What is wrong, at most [`PROBLEMS_MAX`] of it, in the order in which it was found.
    pub problems: Vec<Problem>,
    /// How much is wrong, with what is not listed.
    pub problem_count: u64,
    /// Bytes read per second.
    pub bytes_per_second: u64,
}

/// Problems that are listed in a report; more are only counted.
pub const PROBLEMS_MAX: usize = 1_000;

impl VerifyReport {
    /// Nothing is wrong.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problem_count == 0
    }

    /// Nothing is wrong but indexes, which can be made again.
    #[must_use]
    pub fn only_indexes(&self) -> bool {
        self.problem_count <= self.problems.len() as u64
            && self.problems.iter().all(|problem| problem.repair == Repair::Index)
    }
}

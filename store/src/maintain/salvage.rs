//! Saving what is left of a damaged data folder into a new one.
//!
//! Not here: finding out whether a folder is damaged (`verify`).

use fulmar_protocol::id::{ConversationId, Seq};
use serde::Serialize;

/// Records of one conversation that are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// The shard.
    pub shard: u16,
    /// The conversation.
    pub conversation: ConversationId,
    /// The first and the last record that are gone.
    pub seqs: (Seq, Seq),
    /// Why.
    pub what: String,
}

/// What was saved of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardSalvaged {
    /// The shard.
    pub shard: u16,
    /// Conversations in the new folder.
    pub conversations: u64,
    /// Records in the new folder.
    pub records: u64,
    /// Rows in the new folder.
    pub rows: u64,
    /// The last commit whose effects are in the new folder.
    pub last_commit: u64,
    /// The last commit that had been acknowledged, as far as the old folder tells.
    pub acknowledged: u64,
    /// What could not be read or did not prove itself, in words; at most [`super::verify::PROBLEMS_MAX`].
    pub damage: Vec<String>,
    /// Heads, lanes and members that were worked out again from records and other rows.
    pub rows_made_again: u64,
}

/// What salvaging a folder did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SalvageReport {
    /// Shard by shard.
    pub shards: Vec<ShardSalvaged>,
    /// Records that are gone, by conversation; at most [`super::verify::PROBLEMS_MAX`] ranges.
    pub lost: Vec<Lost>,
    /// Records that are gone and are known to have been there, with those that are not listed.
    pub lost_records: u64,
}

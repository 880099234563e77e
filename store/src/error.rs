//! What can go wrong, by whose fault it is and what to do about it.

use std::path::PathBuf;

use fulmar_protocol::id::{ConversationId, Seq, ShardId};

use crate::commit::CommitId;

/// Why a data folder could not be opened. Every text is one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has the folder open.
    #[error("the data folder {} is in use by {}: stop it first, or choose another folder", path.display(), holder(*pid))]
    InUse {
        /// The data folder.
        path: PathBuf,
        /// The other process, if it could be told.
        pid: Option<u32>,
    },
    /// A newer Fulmar wrote it.
    #[error(
        "the data folder {} has format {found}, this program knows formats up to {known}: use a newer program",
        path.display()
    )]
    Newer {
        /// The data folder.
        path: PathBuf,
        /// The folder's format.
        found: u64,
        /// The newest format this program knows.
        known: u64,
    },
    /// Nothing can be written there.
    #[error(
        "the data folder {} can't be written to ({source}): make it writable for this user, or choose another folder",
        path.display()
    )]
    ReadOnly {
        /// The data folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A shard of a folder that was copied is damaged.
    #[error(
        "{source}; the folder is a copy: if it was in use while it was copied, copy it with `fulmar store backup` instead"
    )]
    Copied {
        /// What is wrong with the shard.
        source: Box<OpenError>,
    },
    /// The folder has things in it, but no format marker.
    #[error(
        "{} is not empty and not a Fulmar data folder (no readable FORMAT file): choose an empty or new folder",
        path.display()
    )]
    NotOurs {
        /// The folder.
        path: PathBuf,
    },
    /// The format marker is there but makes no sense.
    #[error("the FORMAT file of {} is damaged ({what}): restore the folder from a backup", path.display())]
    Marker {
        /// The data folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The folder was made by another engine.
    #[error("the data folder {} was made with the engine {found:?}, not {wanted:?}: change it with `fulmar store migrate --to {wanted}`, or set the engine to {found:?}", path.display())]
    OtherEngine {
        /// The data folder.
        path: PathBuf,
        /// The engine that made it.
        found: String,
        /// The engine that was asked for.
        wanted: String,
    },
    /// An option has no sense.
    #[error("the store can't be opened: {0}")]
    Options(&'static str),
    /// The operating system refused.
    #[error("{} {}: {source}", doing, path.display())]
    Io {
        /// What was being done, as in "can't create".
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The engine could not open a shard's database.
    #[error("shard {shard}: the database could not be opened: {reason}")]
    Engine {
        /// The shard.
        shard: ShardId,
        /// The engine's words.
        reason: String,
    },
    /// The cold tier can't be used at all.
    #[error("the cold tier: {reason}")]
    Cold {
        /// Why not.
        reason: String,
    },
    /// A shard's own files could not be read or written.
    #[error("shard {shard}: {reason}; see to the disk, then start again")]
    Log {
        /// The shard.
        shard: ShardId,
        /// What was being done, and why it failed.
        reason: String,
    },
    /// What is settled is not what was written, or is not there.
    #[error(
        "shard {shard}: {what}; restore the folder from a backup, or keep what can be proven: `fulmar store salvage`"
    )]
    Settled {
        /// The shard.
        shard: ShardId,
        /// What is wrong.
        what: String,
    },
    /// A shard can't prove its log, and so refuses to serve.
    #[error(
        "shard {shard}: its log is damaged at commit {commit}: {what}; restore the folder from a backup, or keep what can be proven: `fulmar store salvage`"
    )]
    Damaged {
        /// The shard.
        shard: ShardId,
        /// The first commit that is not as it was written.
        commit: u64,
        /// What is wrong with it.
        what: String,
    },
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

/// Why something could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// What lies on disk is not what was written. It is never served.
    #[error("shard {shard}: damaged {what} (conversation {conversation:?}, seq {seq:?})")]
    Damaged {
        /// The shard.
        shard: ShardId,
        /// The conversation, if it is known.
        conversation: Option<ConversationId>,
        /// The first record that is affected, if it is known.
        seq: Option<Seq>,
        /// What is damaged.
        what: String,
    },
    /// The engine failed.
    #[error("shard {shard}: reading failed: {reason}")]
    Engine {
        /// The shard.
        shard: ShardId,
        /// The engine's words.
        reason: String,
    },
}

/// Why a commit did not happen. None of the batch is in the log, and none of it will be: what a file that failed says about it
/// is void. (Only if the process ends before the shard has recovered may the next start find the batch, whole.)
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// Another writer has taken the shard over: stop, and drop what you know of it.
    #[error("this writer (epoch {mine}) was fenced by a newer one (epoch {newest})")]
    Fenced {
        /// The epoch of this writer.
        mine: u64,
        /// The epoch of the one that has the shard now.
        newest: u64,
    },
    /// The shard takes no commits: an input/output error, from which it recovers by itself as soon as the disk works again,
    /// a thread that is gone, or a closed store. Try again in a moment.
    #[error("the shard is unavailable: {reason}")]
    Unavailable {
        /// Why.
        reason: String,
    },
    /// The disk is full (or nearly: a reserve is kept). Nothing was written; try again when there is room.
    #[error("the disk is full: {reason}")]
    Full {
        /// How full.
        reason: String,
    },
    /// The log does not end where the writer thinks; the writer's view is stale.
    #[error("the log ends at commit {}, not {}", actual.number, expected.number)]
    Conflict {
        /// Where the writer thought it ended.
        expected: CommitId,
        /// Where it ends.
        actual: CommitId,
    },
    /// The batch breaks a rule of the log: a mistake of the caller. Nothing was written.
    #[error("the batch is invalid: {0}")]
    Invalid(String),
    /// What the batch builds on could not be read. Nothing was written.
    #[error(transparent)]
    Read(#[from] ReadError),
}

//! What is done to a whole data folder: proving it, saving what is left of it, copying it, looking at it.
//!
//! - Each works shard by shard and tells a callback how far it has come, in bytes.
//! - Nothing here changes a folder it only reads, and nothing writes into a folder another process has open.
//!
//! Not here: the command line (the gateway's `store` commands), what a running shard does by itself (`shard::settler`).

use std::{
    io,
    path::{Path, PathBuf},
};

use fulmar_protocol::id::{ConversationId, ShardId};

use crate::error::{OpenError, ReadError};

pub(crate) mod backup;
pub(crate) mod compact;
pub(crate) mod export;
pub(crate) mod folder;
pub(crate) mod import;
pub(crate) mod inspect;
mod line;
pub(crate) mod migrate;
pub(crate) mod salvage;
pub(crate) mod scrub;
#[cfg(test)]
mod tests;
pub(crate) mod upgrade;
pub(crate) mod verify;

/// How far a work on a data folder has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The shard that is being worked on.
    pub shard: ShardId,
    /// What is being done to it, as in "checking segments".
    pub doing: &'static str,
    /// Bytes that are done.
    pub done: u64,
    /// Bytes there are to do, about.
    pub of: u64,
}

/// Why a work on a data folder could not be done. Each is a sentence that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaintainError {
    /// The folder can't be opened: in use, not a data folder, of a newer format, or with an unreadable marker.
    #[error(transparent)]
    Folder(#[from] OpenError),
    /// There is no data folder.
    #[error("{} is not a Fulmar data folder (no FORMAT file): name the folder a gateway keeps its data in", path.display())]
    NoFolder {
        /// The path that was named.
        path: PathBuf,
    },
    /// The folder has an older format.
    #[error(
        "the data folder {} has format {found}: start a gateway with it once, or run `fulmar store upgrade`, which bring it to format {wanted}",
        path.display()
    )]
    OlderFormat {
        /// The data folder.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// The format that is needed.
        wanted: u64,
    },
    /// An index in memory makes no data folder.
    #[error("{} can't be changed to the engine \"memory\", which keeps nothing on disk: choose \"sled\" or \"fjall\"", path.display())]
    MemoryEngine {
        /// The data folder.
        path: PathBuf,
    },
    /// What is to be written into is there already and holds something else.
    #[error("{} is not empty: name a folder that is empty or does not exist", path.display())]
    NotEmpty {
        /// The folder that was to be written.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{} {}: {source}", doing, path.display())]
    Io {
        /// What was being done, as in "can't read".
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A shard is damaged so that the work would not give what it promises.
    #[error("shard {shard}: {what}; see `fulmar store verify` for all of it")]
    Damaged {
        /// The shard.
        shard: ShardId,
        /// What is wrong.
        what: String,
    },
    /// A running gateway changed its files faster than they could be read.
    #[error("shard {shard} was changed {attempts} times while it was read: try again when less is written")]
    Changing {
        /// The shard.
        shard: ShardId,
        /// How often reading it was begun.
        attempts: u32,
    },
    /// Something in the folder could not be read.
    #[error("{0}; see `fulmar store verify` for all of it")]
    Read(#[from] ReadError),
    /// What the log holds could not be settled.
    #[error("{} can't be settled: {reason}", path.display())]
    Settle {
        /// The data folder.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A file that was to be written is there already.
    #[error("{} exists: name another file", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// There is no such conversation.
    #[error("there is no conversation {conversation} in the data folder")]
    NoConversation {
        /// Its number.
        conversation: ConversationId,
    },
    /// A file to be imported is not an export, is damaged, or can't be imported like this.
    #[error("{}, line {line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong with it.
        what: String,
    },
    /// What was written does not read back as it was written.
    #[error("what was imported does not read back as it was written ({what}); nothing was kept")]
    Differs {
        /// What is different.
        what: String,
    },
    /// It was told to stop.
    #[error("stopped; nothing was kept of what was begun")]
    Stopped,
    /// The engine of a shard failed.
    #[error("shard {shard}: the index failed: {reason}")]
    Engine {
        /// The shard.
        shard: ShardId,
        /// The engine's words.
        reason: String,
    },
}

impl MaintainError {
    /// For `map_err`: what was being done, and to which path.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }
}

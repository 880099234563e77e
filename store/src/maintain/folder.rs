//! A data folder that is read and not changed: its marker, its lock, its shards.
//!
//! - The lock is taken on a descriptor that can only read, so that a folder on a read-only disk can be looked at, too.
//!
//! Not here: opening a folder to serve from it (`format`, `store`).

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use fulmar_protocol::id::ShardId;

use super::MaintainError;
use crate::{
    error::OpenError,
    format::{self, FORMAT_VERSION, Marker},
};

const LOCK: &str = "LOCK";

/// A data folder as its marker describes it.
#[derive(Debug)]
pub(crate) struct ReadFolder {
    pub(crate) path: PathBuf,
    pub(crate) marker: Marker,
    /// Holds the lock until it is dropped.
    _lock: Option<File>,
}

impl ReadFolder {
    /// Looks at the folder, whether or not a gateway has it open.
    pub(crate) fn look(path: &Path) -> Result<Self, MaintainError> {
        let Some((found, marker)) = format::read_marker(path)? else {
            return Err(MaintainError::NoFolder { path: path.to_owned() });
        };
        if found < FORMAT_VERSION {
            return Err(MaintainError::OlderFormat { path: path.to_owned(), found, wanted: FORMAT_VERSION });
        }
        Ok(Self { path: path.to_owned(), marker, _lock: None })
    }

    /// Looks at the folder and keeps others from opening it.
    pub(crate) fn hold(path: &Path) -> Result<Self, MaintainError> {
        let folder = Self::look(path)?;
        Ok(Self { _lock: hold(path)?, ..folder })
    }

    /// Its shards and their folders.
    pub(crate) fn shards(&self) -> impl Iterator<Item = (ShardId, PathBuf)> {
        (0..self.marker.shards)
            .filter_map(ShardId::new)
            .map(|shard| (shard, self.path.join(shard_name(shard))))
    }
}

/// What the folder of a shard is called.
pub(crate) fn shard_name(shard: ShardId) -> String {
    format!("shard-{:03}", shard.get())
}

/// Takes the lock of a folder; `None`: there is none, because nobody ever opened the folder.
pub(crate) fn hold(path: &Path) -> Result<Option<File>, MaintainError> {
    let lock = path.join(LOCK);
    let mut file = match File::open(&lock) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(MaintainError::io("can't open", &lock)(error)),
    };
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let pid = holder(&mut file);
            Err(OpenError::InUse { path: path.to_owned(), pid }.into())
        }
        Err(error) => Err(MaintainError::io("can't lock", &lock)(error.into())),
    }
}

/// Whether somebody has the folder open.
pub(crate) fn is_held(path: &Path) -> bool {
    File::open(path.join(LOCK)).is_ok_and(|file| {
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared)
            == Err(rustix::io::Errno::WOULDBLOCK)
    })
}

/// The process that has the folder open, if there is one that says so.
pub(crate) fn in_use_by(path: &Path) -> Option<u32> {
    is_held(path).then(|| holder(&mut File::open(path.join(LOCK)).ok()?)).flatten()
}

fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

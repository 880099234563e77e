//! What the store asks of a storage engine: single inserts, ordered scans, and a barrier.
//!
//! - A single insert or remove is atomic; nothing is asked to be atomic across two.
//! - What was written before [`Engine::barrier`] returned survives what the engine was opened to survive; what was written
//!   after may survive or not, each write by itself. A write is visible to reads at once.
//! - No type of an engine leaves its module.
//!
//! Not here: what is written (`key`, `row`, `commit`), and in which order (`shard`).

use bytes::Bytes;

use crate::key::Table;

pub(crate) mod closed;
#[cfg(test)]
pub(crate) mod faulty;
pub(crate) mod fjall;
pub(crate) mod memory;
pub(crate) mod place;
pub(crate) mod sled;

/// Bytes of a value at most. sled keeps much larger ones in files of their own, which it never syncs.
pub(crate) const VALUE_BYTES_MAX: usize = 4096;

/// An engine's failure. The first one is final: the shard takes no more commits until it is opened again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EngineError {
    #[error("no space left on the device")]
    Full,
    #[error("{0}")]
    Failed(String),
}

impl From<std::io::Error> for EngineError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::StorageFull {
            Self::Full
        } else {
            Self::Failed(error.to_string())
        }
    }
}

/// Which way a scan goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Ascending,
    Descending,
}

/// A row as a scan returns it.
pub(crate) type Entry = (Vec<u8>, Bytes);

/// One shard's database.
pub(crate) trait Engine: Send + Sync + std::fmt::Debug {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// Values are at most [`VALUE_BYTES_MAX`].
    fn insert(&self, table: Table, key: &[u8], value: &[u8]) -> Result<(), EngineError>;

    fn remove(&self, table: Table, key: &[u8]) -> Result<(), EngineError>;

    /// At most `limit` rows with `from <= key`, and `key < to` if there is a `to`.
    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<Entry>, EngineError>;

    /// Waits until everything written so far is durable.
    fn barrier(&self) -> Result<(), EngineError>;

    /// Bytes on disk.
    fn size(&self) -> u64;
}

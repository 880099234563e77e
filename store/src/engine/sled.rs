//! sled 0.34.7, one database per shard. `docs/storage.md` tells what is known about it; the guards stand here.
//!
//! - Single inserts only: batches and transactions take a lock over every database of the process.
//! - The barrier is `flush()` and then `fdatasync` on a descriptor of our own: sled's `flush` ends in `sync_file_range`,
//!   which does not reach the disk's cache and does not write the file's size. `flush_async` is never used (it deadlocks).
//! - `conf` is synced after opening: sled never does, and opens nothing without it.
//! - `snap.*.generating`, left by a process that was killed while it opened the database, is removed before opening.
//! - A panic inside sled (it asserts on damaged files) becomes an error of the call that met it.
//! - sled's flusher stays on: its garbage collector runs nowhere else.
//!
//! [`Old`] reads databases of format 1, which held log and records as well.
//!
//! Not here: any promise about several writes at once.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{Direction, Engine, EngineError, Entry, VALUE_BYTES_MAX};
use crate::key::Table;

/// Milliseconds between rounds of sled's flusher, which also collects its garbage.
const FLUSH_EVERY_MS: u64 = 500;

/// How long the lock of a database is waited for that was just closed.
const LOCK_WAIT: Duration = Duration::from_secs(5);

const LOCK_POLL: Duration = Duration::from_millis(5);

/// An open sled database.
pub(crate) struct Sled {
    tables: Vec<::sled::Tree>,
    /// Our own descriptor of the file sled writes, for `fdatasync`.
    file: File,
    database: ::sled::Db,
}

impl std::fmt::Debug for Sled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sled").finish_non_exhaustive()
    }
}

impl Sled {
    /// Opens or creates the database in the folder `path`.
    pub(crate) fn open(path: &Path, cache_bytes: u64) -> Result<Self, EngineError> {
        std::fs::create_dir_all(path)?;
        for leftover in unfinished_snapshots(path)? {
            tracing::warn!(file = %leftover.display(), "removing a snapshot that was never finished");
            std::fs::remove_file(leftover)?;
        }
        let config = ::sled::Config::default()
            .path(path)
            .cache_capacity(cache_bytes)
            .flush_every_ms(Some(FLUSH_EVERY_MS))
            .print_profile_on_drop(false);
        let database = open_database(&config)?;
        let tables = Table::ALL
            .iter()
            .map(|table| guarded(|| database.open_tree(table.name())))
            .collect::<Result<Vec<_>, _>>()?;
        let file = File::options().read(true).write(true).open(path.join("db"))?;
        let engine = Self { tables, file, database };
        engine.barrier()?;
        // What sled wrote once and never syncs: without `conf` nothing opens the database again.
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                File::open(entry.path())?.sync_all()?;
            }
        }
        for folder in [Some(path), path.parent()].into_iter().flatten() {
            File::open(folder)?.sync_all()?;
        }
        Ok(engine)
    }

    fn table(&self, table: Table) -> Result<&::sled::Tree, EngineError> {
        self.tables
            .get(table.place())
            .ok_or_else(|| EngineError::Failed(format!("the table {table:?} is not open")))
    }
}

impl Engine for Sled {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let table = self.table(table)?;
        let value = guarded(|| table.get(key))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn insert(&self, table: Table, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        if value.len() > VALUE_BYTES_MAX {
            return Err(EngineError::Failed(format!("a value of {} bytes is too large", value.len())));
        }
        let table = self.table(table)?;
        guarded(|| table.insert(key, value))?;
        Ok(())
    }

    fn remove(&self, table: Table, key: &[u8]) -> Result<(), EngineError> {
        let table = self.table(table)?;
        guarded(|| table.remove(key))?;
        Ok(())
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<Entry>, EngineError> {
        if to.is_some_and(|to| to <= from) {
            return Ok(Vec::new());
        }
        let table = self.table(table)?;
        guarded(|| {
            let range = match to {
                Some(to) => table.range(from..to),
                None => table.range(from..),
            };
            let entry = |row: ::sled::Result<(::sled::IVec, ::sled::IVec)>| {
                row.map(|(key, value)| (key.to_vec(), Bytes::copy_from_slice(&value)))
            };
            match direction {
                Direction::Ascending => range.take(limit).map(entry).collect(),
                Direction::Descending => range.rev().take(limit).map(entry).collect(),
            }
        })
    }

    fn barrier(&self) -> Result<(), EngineError> {
        guarded(|| self.database.flush())?;
        rustix::fs::fdatasync(&self.file).map_err(std::io::Error::from)?;
        Ok(())
    }

    fn size(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }
}

/// A database of format 1, to be read: tables by their names, values of at most [`VALUE_BYTES_MAX`].
pub(crate) struct Old {
    tables: BTreeMap<String, ::sled::Tree>,
    database: ::sled::Db,
}

impl std::fmt::Debug for Old {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Old").field("tables", &self.tables.keys()).finish_non_exhaustive()
    }
}

impl Old {
    /// Opens the database in the folder `path`; `None` if there never was one.
    pub(crate) fn open(path: &Path, cache_bytes: u64) -> Result<Option<Self>, EngineError> {
        if !path.join("db").try_exists()? {
            return Ok(None);
        }
        for leftover in unfinished_snapshots(path)? {
            std::fs::remove_file(leftover)?;
        }
        let config = ::sled::Config::default().path(path).cache_capacity(cache_bytes).flush_every_ms(None);
        let database = open_database(&config)?;
        let tables = database
            .tree_names()
            .into_iter()
            .map(|name| {
                let table = guarded(|| database.open_tree(&name))?;
                Ok((String::from_utf8_lossy(&name).into_owned(), table))
            })
            .collect::<Result<_, EngineError>>()?;
        Ok(Some(Self { tables, database }))
    }

    /// One row.
    pub(crate) fn get(&self, table: &str, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let Some(table) = self.tables.get(table) else { return Ok(None) };
        let value = guarded(|| table.get(key))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    /// At most `limit` rows from the key `from` on, ascending.
    pub(crate) fn scan(&self, table: &str, from: &[u8], limit: usize) -> Result<Vec<Entry>, EngineError> {
        let Some(table) = self.tables.get(table) else { return Ok(Vec::new()) };
        guarded(|| {
            let rows = table.range(from..).take(limit);
            rows.map(|row| row.map(|(key, value)| (key.to_vec(), Bytes::copy_from_slice(&value)))).collect()
        })
    }

    /// Bytes on disk.
    pub(crate) fn size(&self) -> u64 {
        self.database.size_on_disk().unwrap_or(0)
    }

    /// Puts a row there, or takes it away.
    #[cfg(test)]
    pub(crate) fn set(&self, table: &str, key: &[u8], value: Option<&[u8]>) {
        let table = self.database.open_tree(table).unwrap();
        match value {
            Some(value) => table.insert(key, value).unwrap(),
            None => table.remove(key).unwrap(),
        };
        self.database.flush().unwrap();
    }
}

/// Opens a database. sled gives its lock back a moment after the database was dropped: one that was just closed here is
/// waited for. Other processes are kept away by the data folder's own lock.
fn open_database(config: &::sled::Config) -> Result<::sled::Db, EngineError> {
    let began = Instant::now();
    loop {
        match guarded(|| config.open()) {
            Err(EngineError::Failed(error))
                if error.contains("could not acquire lock") && began.elapsed() < LOCK_WAIT =>
            {
                std::thread::park_timeout(LOCK_POLL);
            }
            other => return other,
        }
    }
}

/// A call into sled, its errors and panics turned into ours.
fn guarded<T>(call: impl FnOnce() -> ::sled::Result<T>) -> Result<T, EngineError> {
    // Whatever sled left half done stays sled's: a shard stops at the first error.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(failed),
        Err(_) => Err(EngineError::Failed("sled panicked; its files may be damaged".to_owned())),
    }
}

fn failed(error: ::sled::Error) -> EngineError {
    match error {
        ::sled::Error::Io(error) => error.into(),
        other => EngineError::Failed(other.to_string()),
    }
}

fn unfinished_snapshots(folder: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            found.push(entry.path());
        }
    }
    Ok(found)
}

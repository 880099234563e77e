//! fjall 3.1.13, one database per shard. `docs/storage.md` tells what is known about it; the guards stand here.
//!
//! - All tables lie in one keyspace, a byte with the table's number before each key. Sixteen keyspaces took 336 files
//!   instead of 40 for four new shards and ten times as long to make; and only within one keyspace does a journal that lost its
//!   end leave a prefix of what was written, because all rows go to tables in the order of their writes.
//! - Inserts lie in fjall's 8 KiB buffer until a barrier, or until it is full: a system call per row is not needed. The
//!   barrier is `fdatasync` of the active journal. Older journals, tables and version files fjall syncs itself, file, folder
//!   and `current` in that order, before it removes what they replace. What it never syncs is the entry of a new keyspace's
//!   folder: a database is therefore made under another name, synced whole, and renamed.
//! - Rows go from memory to tables when this module says so, never by fjall's own count: beyond that count fjall posts a request
//!   per insert into a queue that only its worker empties, and the worker blocks for good when it finds the queue full.
//! - fjall waits without end for a worker that is dead if there are too many tables or memtables; this module waits earlier, and
//!   looks whether the worker lives.
//! - One worker per database: the first of several spins on the processor while another one compacts.
//! - A panic becomes an error of the call that met it. fjall may abort the process if it panics while it opens damaged files
//!   (it panics again when it drops a poisoned lock); openings that never ended are counted, and after five in a
//!   row the next is refused.
//!
//! Not here: any promise about several writes at once.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write,
    ops::Bound,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use fjall::{
    AbstractTree, Database, Keyspace, KeyspaceCreateOptions, LsmError, PersistMode, compaction::Leveled,
};

use super::{Direction, Engine, EngineError, Entry, VALUE_BYTES_MAX};
use crate::key::Table;

/// The folder of a whole database, and of one that is being made.
const HOME: &str = "db";
const NEW: &str = "new";

/// One byte per opening that has not ended; after this many the next is refused.
const OPENING: &str = "opening";
const OPENINGS_MAX: u64 = 5;

/// The keyspace all rows lie in.
const ROWS: &str = "rows";

/// Bytes of a key, without the table's.
const KEY_BYTES_MAX: usize = u16::MAX as usize - 1;

/// What a row takes in memory beside key and value (measured).
const ROW_OVERHEAD: u64 = 120;

/// Bytes of rows in memory below which they are never written to a table.
const MEMTABLE_BYTES_MIN: u64 = 256 << 10;

/// Bytes of a table in a level: small, so that one step of compaction is short. The worker does nothing else meanwhile.
const TABLE_BYTES: u64 = 8 << 20;

/// Memtables on their way to disk above which writes wait. fjall's own limit is 4.
const SEALED_MAX: usize = 2;

/// Tables in level 0 above which writes wait and help compacting. fjall's own limits are 20 and 30.
const LEVEL_0_MAX: usize = 12;

/// Descriptors of tables kept open.
const FILES_MAX: usize = 64;

const POLL: Duration = Duration::from_millis(1);

/// An open fjall database.
pub(crate) struct Fjall {
    rows: Keyspace,
    database: Database,
    home: PathBuf,
    memtable_bytes: u64,
    /// About the bytes of the active memtable.
    written: AtomicU64,
    /// Held by the thread that puts the memtable away.
    turn: Mutex<()>,
    /// The first error a call met: fjall itself answers only `Poisoned` from then on.
    first: OnceLock<EngineError>,
}

impl std::fmt::Debug for Fjall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fjall").finish_non_exhaustive()
    }
}

impl Fjall {
    /// Opens or creates the database in the folder `path`. Half of `cache_bytes` is for blocks of tables, half for rows that
    /// are not in tables yet.
    pub(crate) fn open(path: &Path, cache_bytes: u64) -> Result<Self, EngineError> {
        std::fs::create_dir_all(path)?;
        let home = path.join(HOME);
        if !home.try_exists()? {
            make(path, &home, cache_bytes)?;
        }
        let opening = path.join(OPENING);
        let unfinished = std::fs::metadata(&opening).map_or(0, |metadata| metadata.len());
        if unfinished >= OPENINGS_MAX {
            return Err(EngineError::Failed(format!(
                "the last {unfinished} openings of {} never ended; its files may be damaged",
                home.display()
            )));
        }
        File::options().create(true).append(true).open(&opening)?.write_all(&[1])?;
        let engine = Self::open_made(home, cache_bytes);
        // An opening that failed has ended, too.
        std::fs::remove_file(&opening)?;
        let engine = engine?;
        for folder in [Some(path), path.parent()].into_iter().flatten() {
            File::open(folder)?.sync_all()?;
        }
        Ok(engine)
    }

    fn open_made(home: PathBuf, cache_bytes: u64) -> Result<Self, EngineError> {
        inspect(&home)?;
        let (database, rows) = guarded(|| {
            let database = builder(&home, cache_bytes).open()?;
            // fjall drops a keyspace whose files are not whole without a word; asked for it, it would make an empty one.
            let rows = if database.keyspace_exists(ROWS) {
                Some(database.keyspace(ROWS, KeyspaceCreateOptions::default)?)
            } else {
                None
            };
            Ok((database, rows))
        })
        .map_err(failed)?;
        let rows = rows
            .ok_or_else(|| EngineError::Failed(format!("{} lost the files of its tables", home.display())))?;
        let replayed = database.write_buffer_size();
        let engine = Self {
            rows,
            database,
            home,
            memtable_bytes: (cache_bytes / 2 / (SEALED_MAX as u64 + 1)).max(MEMTABLE_BYTES_MIN),
            written: AtomicU64::new(replayed),
            turn: Mutex::new(()),
            first: OnceLock::new(),
        };
        engine.barrier()?;
        Ok(engine)
    }

    /// A call, its errors and panics turned into ours.
    fn call<T>(&self, call: impl FnOnce() -> fjall::Result<T>) -> Result<T, EngineError> {
        guarded(call).map_err(|error| match error {
            Cause::Fjall(fjall::Error::Poisoned) => {
                self.first.get().cloned().unwrap_or_else(|| self.gave_up())
            }
            other => self.first.get_or_init(|| failed(other)).clone(),
        })
    }

    /// Why the worker stopped. fjall keeps its error to itself (it is logged); a disk without room for what the worker
    /// writes is taken as the reason.
    fn gave_up(&self) -> EngineError {
        let no_room = rustix::fs::statvfs(&self.home)
            .is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) < TABLE_BYTES);
        if no_room {
            EngineError::Full
        } else {
            EngineError::Failed("fjall gave up after its worker failed; its log says why".to_owned())
        }
    }

    /// Fails if fjall takes no more writes. Does not wait for the disk, except for a sync that is going on.
    fn alive(&self) -> Result<(), EngineError> {
        self.call(|| self.database.persist(PersistMode::Buffer))
    }

    /// Counts a write, and puts the memtable away if it is full.
    fn count(&self, bytes: usize) -> Result<(), EngineError> {
        let bytes = bytes as u64 + ROW_OVERHEAD;
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes < self.memtable_bytes {
            return Ok(());
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.written.load(Ordering::Relaxed) < self.memtable_bytes {
            return Ok(());
        }
        self.put_away()
    }

    /// Seals the memtable and leaves it to the worker. Waits while too much is on its way already.
    #[expect(
        clippy::disallowed_methods,
        reason = "called by a shard's settling thread, which has nothing else to do"
    )]
    fn put_away(&self) -> Result<(), EngineError> {
        while self.rows.sealed_memtable_count() >= SEALED_MAX {
            self.alive()?;
            std::thread::sleep(POLL);
        }
        // fjall compacts one step per flush, which is enough in the long run; if it was not, nothing else would start one.
        while self.rows.l0_table_count() >= LEVEL_0_MAX {
            self.alive()?;
            self.compact()?;
            std::thread::sleep(POLL);
        }
        self.call(|| self.rows.rotate_memtable())?;
        self.written.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// One step of compaction in this thread. The number 0 keeps rows that were replaced: only fjall knows who reads them.
    fn compact(&self) -> Result<(), EngineError> {
        let strategy = Arc::clone(&self.rows.config.compaction_strategy);
        self.call(|| Ok(self.rows.tree.compact(strategy, 0)?))
    }
}

impl Drop for Fjall {
    fn drop(&mut self) {
        // fjall's worker may hold the journal's buffer a little longer than the database's lock; empty, it does no harm.
        if let Err(error) = self.alive() {
            tracing::warn!(%error, "closing a database that failed");
        }
    }
}

impl Engine for Fjall {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let key = row_key(table, key)?;
        let value = self.call(|| self.rows.get(key))?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn insert(&self, table: Table, key: &[u8], value: &[u8]) -> Result<(), EngineError> {
        if value.len() > VALUE_BYTES_MAX {
            return Err(EngineError::Failed(format!("a value of {} bytes is too large", value.len())));
        }
        let key = row_key(table, key)?;
        self.count(key.len() + value.len())?;
        self.call(|| self.rows.insert(key, value))
    }

    fn remove(&self, table: Table, key: &[u8]) -> Result<(), EngineError> {
        let key = row_key(table, key)?;
        self.count(key.len())?;
        self.call(|| self.rows.remove(key))
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<Entry>, EngineError> {
        if limit == 0 || to.is_some_and(|to| to <= from) {
            return Ok(Vec::new());
        }
        let from = row_key(table, from)?;
        let to = match to {
            Some(to) => Bound::Excluded(row_key(table, to)?),
            None => (table as u8).checked_add(1).map_or(Bound::Unbounded, |next| Bound::Excluded(vec![next])),
        };
        self.call(|| {
            let range = self.rows.range::<Vec<u8>, _>((Bound::Included(from), to));
            let entry = |row: fjall::Guard| {
                let (key, value) = row.into_inner()?;
                Ok((key.get(1..).unwrap_or_default().to_vec(), Bytes::copy_from_slice(&value)))
            };
            match direction {
                Direction::Ascending => range.take(limit).map(entry).collect(),
                Direction::Descending => range.rev().take(limit).map(entry).collect(),
            }
        })
    }

    fn barrier(&self) -> Result<(), EngineError> {
        self.call(|| self.database.persist(PersistMode::SyncData))
    }

    fn size(&self) -> u64 {
        // A journal's length says nothing: it is made with 64 MiB, of which only what was written takes space.
        let journals = std::fs::read_dir(&self.home).map_or(0, |entries| {
            let journals =
                entries.flatten().filter(|entry| entry.path().extension() == Some(OsStr::new("jnl")));
            journals.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
        });
        self.rows.disk_space().saturating_add(journals)
    }
}

fn builder(home: &Path, cache_bytes: u64) -> fjall::DatabaseBuilder<Database> {
    Database::builder(home)
        .worker_threads(1)
        .cache_size(cache_bytes / 2)
        .max_cached_files(Some(FILES_MAX))
        .manual_journal_persist(true)
}

/// Makes an empty database. It has its name only when it is whole and durable.
fn make(path: &Path, home: &Path, cache_bytes: u64) -> Result<(), EngineError> {
    let new = path.join(NEW);
    match std::fs::remove_dir_all(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    guarded(|| {
        let database = builder(&new, cache_bytes).open()?;
        // These stay with the keyspace: later openings find them in it.
        let options = KeyspaceCreateOptions::default()
            .manual_journal_persist(true)
            .max_memtable_size(u64::MAX)
            .compaction_strategy(Arc::new(Leveled::default().with_table_target_size(TABLE_BYTES)));
        database.keyspace(ROWS, || options)?;
        database.persist(PersistMode::SyncAll)
    })
    .map_err(failed)?;
    sync_all(&new)?;
    std::fs::rename(&new, home)?;
    File::open(path)?.sync_all()?;
    Ok(())
}

/// Syncs all files and folders in `folder`, and itself.
fn sync_all(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_all(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(folder)?.sync_all()
}

/// Looks at the keyspaces before fjall does: removes what a process left when it was killed while it replaced `current`
/// (fjall never does), and compares the list of tables that `current` names with its checksum (fjall does not, and of all
/// damage this is what it panics about).
fn inspect(home: &Path) -> Result<(), EngineError> {
    for keyspace in std::fs::read_dir(home.join("keyspaces"))? {
        let keyspace = keyspace?;
        if !keyspace.file_type()?.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(keyspace.path())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(".tmp") {
                tracing::warn!(file = %entry.path().display(), "removing a file that was never finished");
                std::fs::remove_file(entry.path())?;
            }
        }
        if !is_current_whole(&keyspace.path())? {
            return Err(EngineError::Failed(format!(
                "the list of tables of {} is damaged",
                keyspace.path().display()
            )));
        }
    }
    Ok(())
}

/// `current`: number of the version file u64 LE, its XXH3-128 u128 LE, kind of checksum u8 (0).
fn is_current_whole(keyspace: &Path) -> Result<bool, EngineError> {
    let current = std::fs::read(keyspace.join("current"))?;
    let Some((number, rest)) = current.split_first_chunk::<8>() else { return Ok(false) };
    let Some((checksum, [0])) = rest.split_first_chunk::<16>() else { return Ok(false) };
    let version = std::fs::read(keyspace.join(format!("v{}", u64::from_le_bytes(*number))))?;
    Ok(xxhash_rust::xxh3::xxh3_128(&version) == u128::from_le_bytes(*checksum))
}

/// A row's key: the table's number, then the key in it.
fn row_key(table: Table, key: &[u8]) -> Result<Vec<u8>, EngineError> {
    if key.len() > KEY_BYTES_MAX {
        return Err(EngineError::Failed(format!("a key of {} bytes is too long", key.len())));
    }
    let mut row = Vec::with_capacity(key.len() + 1);
    row.push(table as u8);
    row.extend_from_slice(key);
    Ok(row)
}

/// Why a call into fjall failed.
enum Cause {
    Fjall(fjall::Error),
    Panic,
}

fn guarded<T>(call: impl FnOnce() -> fjall::Result<T>) -> Result<T, Cause> {
    // Whatever fjall left half done stays fjall's: a shard stops at the first error.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(Cause::Fjall),
        Err(_) => Err(Cause::Panic),
    }
}

fn failed(cause: Cause) -> EngineError {
    match cause {
        Cause::Fjall(fjall::Error::Io(error) | fjall::Error::Storage(LsmError::Io(error))) => error.into(),
        Cause::Fjall(fjall::Error::Locked) => {
            EngineError::Failed("the database is open already, here or in another process".to_owned())
        }
        Cause::Fjall(other) => EngineError::Failed(other.to_string()),
        Cause::Panic => EngineError::Failed("fjall panicked; its files may be damaged".to_owned()),
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "rows made of small numbers")]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const ALL: usize = usize::MAX;

    fn open(folder: &Path) -> Fjall {
        Fjall::open(folder, 1 << 20).unwrap()
    }

    fn key(n: u64) -> [u8; 8] {
        n.to_be_bytes()
    }

    fn rows(engine: &Fjall, table: Table) -> Vec<Entry> {
        engine.scan(table, &[], None, Direction::Ascending, ALL).unwrap()
    }

    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let to = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                copy(&entry.path(), &to);
            } else {
                // A file that fjall replaces meanwhile: a killed process leaves either.
                std::fs::copy(entry.path(), to).unwrap();
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a test waits for another thread")]
    fn wait_for_worker(engine: &Fjall) {
        while engine.rows.sealed_memtable_count() > 0 || engine.database.active_compactions() > 0 {
            std::thread::sleep(POLL);
        }
    }

    #[test]
    fn rows_come_back_with_their_bytes_and_in_their_table() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        let values: [&[u8]; 4] = [&[], &[0], &[0xff; 300], &[7; VALUE_BYTES_MAX]];
        let keys: [&[u8]; 6] = [&[], &[0], &[0, 0], &[0xff], &[0xff; 40], &[5; KEY_BYTES_MAX]];
        for (i, table) in Table::ALL.iter().enumerate() {
            for (j, key) in keys.iter().enumerate() {
                engine.insert(*table, key, values[(i + j) % 4]).unwrap();
            }
        }
        engine.remove(Table::Lane, &[0]).unwrap();
        engine.remove(Table::Lane, b"was never there").unwrap();
        let check = |engine: &Fjall| {
            for (i, table) in Table::ALL.iter().enumerate() {
                let mut want: Vec<Entry> = keys
                    .iter()
                    .enumerate()
                    .map(|(j, key)| (key.to_vec(), Bytes::copy_from_slice(values[(i + j) % 4])))
                    .collect();
                want.sort();
                if *table == Table::Lane {
                    want.retain(|(key, _)| key != &[0]);
                    assert_eq!(engine.get(*table, &[0]).unwrap(), None);
                }
                assert_eq!(rows(engine, *table), want, "{table:?}");
                for (key, value) in want {
                    assert_eq!(engine.get(*table, &key).unwrap(), Some(value));
                }
                assert_eq!(engine.get(*table, &[0, 1]).unwrap(), None);
            }
        };
        check(&engine);
        drop(engine);
        let engine = open(folder.path());
        check(&engine);
        engine.put_away().unwrap();
        wait_for_worker(&engine);
        check(&engine);
    }

    #[test]
    fn what_is_too_large_is_refused_and_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        engine.insert(Table::Head, b"a", b"1").unwrap();
        assert!(engine.insert(Table::Head, b"a", &[0; VALUE_BYTES_MAX + 1]).is_err());
        let long = [1; KEY_BYTES_MAX + 1];
        assert!(engine.insert(Table::Head, &long, b"1").is_err());
        assert!(engine.remove(Table::Head, &long).is_err());
        assert!(engine.get(Table::Head, &long).is_err());
        assert_eq!(rows(&engine, Table::Head), [(b"a".to_vec(), Bytes::from_static(b"1"))]);
        engine.insert(Table::Head, b"b", b"2").unwrap();
        engine.barrier().unwrap();
    }

    #[test]
    fn a_database_is_open_once() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        let error = Fjall::open(folder.path(), 1 << 20).unwrap_err();
        assert!(matches!(error, EngineError::Failed(text) if text.contains("open already")));
        drop(engine);
        open(folder.path());
    }

    /// The folder of a process that was killed: everything before the barrier, and of the rest a beginning.
    #[test]
    fn a_killed_process_keeps_what_a_barrier_covered() {
        let folder = tempfile::tempdir().unwrap();
        let engine = Fjall::open(&folder.path().join("live"), 1 << 20).unwrap();
        let mut written = 0;
        for round in 0..6u64 {
            for _ in 0..400 {
                engine.insert(Table::Member, &key(written), &[written as u8; 200]).unwrap();
                if written % 3 == 0 {
                    engine.remove(Table::Member, &key(written / 2)).unwrap();
                }
                written += 1;
            }
            engine.barrier().unwrap();
            let want = rows(&engine, Table::Member);
            let late = written + 1_000_000;
            for n in 0..100 {
                engine.insert(Table::Lane, &key(late + n), &[1; 300]).unwrap();
            }
            // Nothing moves while it is copied, as after a kill.
            wait_for_worker(&engine);
            let killed = folder.path().join(format!("killed-{round}"));
            copy(&folder.path().join("live"), &killed);
            let found = open(&killed);
            assert_eq!(rows(&found, Table::Member), want);
            let rest = rows(&found, Table::Lane);
            let of_this_round = rest.iter().filter(|(k, _)| k.as_slice() >= &key(late)[..]).count() as u64;
            assert!(of_this_round <= 100);
            for n in 0..of_this_round {
                assert_eq!(found.get(Table::Lane, &key(late + n)).unwrap().unwrap(), [1; 300][..]);
            }
            found.insert(Table::Head, b"after", b"1").unwrap();
            found.barrier().unwrap();
            if round % 2 == 0 {
                engine.put_away().unwrap();
            }
        }
    }

    /// A journal that lost its end, wherever, leaves a prefix of the writes.
    #[test]
    fn a_journal_without_its_end_leaves_a_prefix() {
        let folder = tempfile::tempdir().unwrap();
        let live = folder.path().join("live");
        let engine = open(&live);
        for n in 0..50 {
            engine.insert(Table::ALL[n as usize % Table::ALL.len()], &key(n), &[n as u8; 30]).unwrap();
        }
        engine.barrier().unwrap();
        let mut most = 0;
        for at in (0..5_000).step_by(97) {
            let torn = folder.path().join(format!("torn-{at}"));
            copy(&live, &torn);
            let journal = File::options().write(true).open(torn.join(HOME).join("0.jnl")).unwrap();
            journal.set_len(at).unwrap();
            let found = open(&torn);
            let count = Table::ALL.iter().map(|table| rows(&found, *table).len() as u64).sum::<u64>();
            assert!(count >= most, "longer journals hold more");
            most = count;
            for n in 0..count {
                assert!(found.get(Table::ALL[n as usize % Table::ALL.len()], &key(n)).unwrap().is_some());
            }
            drop(found);
            std::fs::remove_dir_all(torn).unwrap();
        }
        assert_eq!(most, 50);
    }

    #[test]
    fn leftovers_of_killed_openings_are_removed_and_too_many_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join(NEW).join("keyspaces/0")).unwrap();
        std::fs::write(folder.path().join(NEW).join("0.jnl"), [1; 10]).unwrap();
        let engine = open(folder.path());
        engine.insert(Table::User, b"a", b"1").unwrap();
        drop(engine);
        assert!(!folder.path().join(NEW).exists());

        let leftover = folder.path().join(HOME).join("keyspaces/1/.tmpAbCd");
        std::fs::write(&leftover, [1; 10]).unwrap();
        std::fs::write(folder.path().join(OPENING), [1; OPENINGS_MAX as usize - 1]).unwrap();
        let engine = open(folder.path());
        assert_eq!(rows(&engine, Table::User).len(), 1);
        assert!(!leftover.exists() && !folder.path().join(OPENING).exists());
        drop(engine);

        std::fs::write(folder.path().join(OPENING), [1; OPENINGS_MAX as usize]).unwrap();
        for _ in 0..2 {
            let error = Fjall::open(folder.path(), 1 << 20).unwrap_err();
            assert!(matches!(error, EngineError::Failed(text) if text.contains("never ended")));
        }
    }

    #[test]
    fn a_lost_table_is_an_error_and_not_an_empty_database() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        engine.insert(Table::User, b"a", b"1").unwrap();
        drop(engine);
        std::fs::remove_file(folder.path().join(HOME).join("keyspaces/1/current")).unwrap();
        assert!(Fjall::open(folder.path(), 1 << 20).is_err());
        // Not even its folder: fjall would go on without.
        std::fs::remove_dir_all(folder.path().join(HOME).join("keyspaces/1")).unwrap();
        let error = Fjall::open(folder.path(), 1 << 20).unwrap_err();
        assert!(matches!(error, EngineError::Failed(text) if text.contains("lost")));
    }

    #[test]
    fn every_damaged_byte_of_a_list_of_tables_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        engine.insert(Table::User, b"a", b"1").unwrap();
        engine.put_away().unwrap();
        wait_for_worker(&engine);
        drop(engine);
        let keyspace = folder.path().join(HOME).join("keyspaces/1");
        let current = keyspace.join("current");
        let number = u64::from_le_bytes(std::fs::read(&current).unwrap()[..8].try_into().unwrap());
        assert!(is_current_whole(&keyspace).unwrap());
        let lists = [current, keyspace.join(format!("v{number}"))];
        for path in lists {
            let whole = std::fs::read(&path).unwrap();
            for at in 0..whole.len() {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << (at % 8);
                std::fs::write(&path, damaged).unwrap();
                assert!(!is_current_whole(&keyspace).unwrap_or(false), "{} at {at}", path.display());
            }
            std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
            assert!(Fjall::open(folder.path(), 1 << 20).is_err());
            std::fs::write(&path, whole).unwrap();
        }
        assert_eq!(rows(&open(folder.path()), Table::User).len(), 1);
    }

    /// fjall itself would wait for its dead worker without end.
    #[test]
    fn a_failed_worker_is_an_error_of_the_next_writes() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        engine.insert(Table::User, b"a", b"1").unwrap();
        std::fs::remove_dir_all(folder.path().join(HOME).join("keyspaces/1/tables")).unwrap();
        let error = (0..100_000u64).find_map(|n| engine.insert(Table::Lane, &key(n), &[0; 1_000]).err());
        assert!(matches!(error, Some(EngineError::Failed(text)) if text.contains("gave up")));
        assert!(engine.barrier().is_err());
        assert!(engine.insert(Table::User, b"b", b"1").is_err());
    }

    /// The same rows again and again, and rows that come and go: what is on disk stays near what is alive.
    #[test]
    fn churn_does_not_grow_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        let alive = 500 * 300;
        for round in 0..60u64 {
            for n in 0..500 {
                engine.insert(Table::Head, &key(n), &[round as u8; 300]).unwrap();
                engine.insert(Table::Recv, &key(round * 500 + n), &[1; 100]).unwrap();
                if round > 0 {
                    engine.remove(Table::Recv, &key((round - 1) * 500 + n)).unwrap();
                }
            }
        }
        engine.barrier().unwrap();
        wait_for_worker(&engine);
        assert!(engine.rows.table_count() > 0, "rows went to tables");
        let tables = engine.rows.disk_space();
        assert!(tables < 12 * alive, "{tables} bytes of tables for {alive} of rows");
        assert!(engine.size() >= tables);
        assert_eq!(rows(&engine, Table::Head).len(), 500);
        assert_eq!(rows(&engine, Table::Recv).len(), 500);
    }

    #[test]
    fn the_size_is_that_of_the_blocks_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let engine = open(folder.path());
        assert!(engine.size() < 1 << 20, "a journal of 64 MiB takes no space yet");
        for n in 0..4_000 {
            engine.insert(Table::Head, &key(n), &[n as u8; 1_000]).unwrap();
        }
        engine.barrier().unwrap();
        let size = engine.size();
        assert!((4_000_000..40_000_000).contains(&size), "{size}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Table, Vec<u8>, Vec<u8>),
        Remove(Table, Vec<u8>),
        Get(Table, Vec<u8>),
        Scan(Table, Vec<u8>, Option<Vec<u8>>, bool, usize),
        Barrier,
        PutAway,
        Compact,
        Reopen,
    }

    fn a_table() -> impl Strategy<Value = Table> {
        prop_oneof![Just(Table::Head), Just(Table::Shard), Just(Table::Run)]
    }

    /// Keys that are often equal, neighbours, or each other's prefix.
    fn a_key() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![Just(0u8), Just(1), Just(0xfe), Just(0xff)], 0..4)
    }

    fn a_step() -> impl Strategy<Value = Step> {
        let value = proptest::collection::vec(any::<u8>(), 0..40);
        prop_oneof![
            12 => (a_table(), a_key(), value).prop_map(|(t, k, v)| Step::Insert(t, k, v)),
            6 => (a_table(), a_key()).prop_map(|(t, k)| Step::Remove(t, k)),
            6 => (a_table(), a_key()).prop_map(|(t, k)| Step::Get(t, k)),
            12 => (a_table(), a_key(), proptest::option::of(a_key()), any::<bool>(), prop_oneof![Just(ALL), 0..5usize])
                .prop_map(|(t, from, to, up, limit)| Step::Scan(t, from, to, up, limit)),
            1 => Just(Step::Barrier),
            2 => Just(Step::PutAway),
            1 => Just(Step::Compact),
            1 => Just(Step::Reopen),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
        #[test]
        fn does_what_a_sorted_map_does(steps in proptest::collection::vec(a_step(), 1..120)) {
            let folder = tempfile::tempdir().unwrap();
            let mut engine = open(folder.path());
            let mut model: BTreeMap<Table, BTreeMap<Vec<u8>, Bytes>> =
                Table::ALL.iter().map(|table| (*table, BTreeMap::new())).collect();
            for step in steps {
                match step {
                    Step::Insert(table, key, value) => {
                        engine.insert(table, &key, &value).unwrap();
                        model.get_mut(&table).unwrap().insert(key, Bytes::from(value));
                    }
                    Step::Remove(table, key) => {
                        engine.remove(table, &key).unwrap();
                        model.get_mut(&table).unwrap().remove(&key);
                    }
                    Step::Get(table, key) => {
                        prop_assert_eq!(engine.get(table, &key).unwrap(), model[&table].get(&key).cloned());
                    }
                    Step::Scan(table, from, to, up, limit) => {
                        let inside = |key: &Vec<u8>| *key >= from && to.as_ref().is_none_or(|to| key < to);
                        let mut want: Vec<Entry> = model[&table]
                            .iter()
                            .filter(|(key, _)| inside(key))
                            .map(|(key, value)| (key.clone(), value.clone()))
                            .collect();
                        if !up {
                            want.reverse();
                        }
                        want.truncate(limit);
                        let direction = if up { Direction::Ascending } else { Direction::Descending };
                        prop_assert_eq!(engine.scan(table, &from, to.as_deref(), direction, limit).unwrap(), want);
                    }
                    Step::Barrier => engine.barrier().unwrap(),
                    Step::PutAway => engine.put_away().unwrap(),
                    Step::Compact => engine.compact().unwrap(),
                    Step::Reopen => {
                        drop(engine);
                        engine = open(folder.path());
                    }
                }
            }
            for (table, want) in model {
                prop_assert_eq!(rows(&engine, table), want.into_iter().collect::<Vec<_>>());
            }
        }
    }
}

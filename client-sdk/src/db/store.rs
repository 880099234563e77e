//! The open database: transactions and the conversions every table needs.
//!
//! Not here: the operations, which are methods of [`Store`] in `outbox`, `inbox` and `register`.

use fulmar_protocol::id::{ConversationId, DeviceUid};
use rusqlite::{Connection, OpenFlags, Row, TransactionBehavior, config::DbConfig};

use super::schema;
use crate::{
    error::Error,
    options::{Database, Durability},
};

/// The open database; lives on the database's thread.
#[derive(Debug)]
pub(crate) struct Store {
    pub(super) sql: Connection,
    durability: Durability,
    syncing: bool,
}

impl Store {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// See [`Error`]; nothing is changed in a file that is refused.
    pub(crate) fn open(database: &Database, durability: Durability) -> Result<Self, Error> {
        let mut sql = match database {
            Database::Memory => Connection::open_in_memory()?,
            Database::File(path) => {
                let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
                    | OpenFlags::SQLITE_OPEN_CREATE
                    | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                Connection::open_with_flags(path, flags)?
            }
        };
        // The lock is taken by the first write below and kept until the process or the client ends. A client that was
        // closed a moment ago may still be letting go of it.
        sql.busy_timeout(std::time::Duration::from_secs(2))?;
        sql.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        sql.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        sql.pragma_update(None, "synchronous", "FULL")?;
        sql.pragma_update(None, "temp_store", "MEMORY")?;
        sql.pragma_update(None, "cache_size", -512)?;
        sql.set_prepared_statement_cache_capacity(64);
        // Otherwise a statement that compares a range with a parameter is prepared again whenever the parameter changes, in case
        // statistics (STAT4) say that another plan is better for it: more than half of what a received message cost a phone's
        // processor. There are no statistics here, and one plan for each statement.
        sql.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        schema::bring_up(&sql)?;
        let fresh = sql.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut uid = [0; 16];
        getrandom::fill(&mut uid).map_err(|error| Error::Database(error.to_string().into()))?;
        fresh.execute("INSERT OR IGNORE INTO device (one, uid) VALUES (1, ?1)", [&uid[..]])?;
        fresh.commit()?;
        Ok(Self { sql, durability, syncing: true })
    }

    pub(super) fn begin(&mut self, durable: bool) -> Result<(), Error> {
        let syncing = durable && self.durability == Durability::PowerLoss;
        if syncing != self.syncing {
            self.sql.pragma_update(None, "synchronous", if syncing { "FULL" } else { "NORMAL" })?;
            self.syncing = syncing;
        }
        Ok(self.statement("BEGIN")?)
    }

    pub(super) fn savepoint(&self) -> Result<(), Error> {
        Ok(self.statement("SAVEPOINT job")?)
    }

    pub(super) fn release(&self, keep: bool) -> Result<(), Error> {
        if !keep {
            self.statement("ROLLBACK TO job")?;
        }
        Ok(self.statement("RELEASE job")?)
    }

    pub(super) fn commit(&self) -> Result<(), Error> {
        let committed = self.statement("COMMIT");
        if committed.is_err() {
            self.roll_back();
        }
        Ok(committed?)
    }

    pub(super) fn roll_back(&self) {
        // SQLite may have rolled back by itself; then there is nothing left to do.
        let _ = self.statement("ROLLBACK");
    }

    fn statement(&self, text: &str) -> rusqlite::Result<()> {
        self.sql.prepare_cached(text)?.execute([]).map(|_| ())
    }

    /// The database's own name.
    pub(crate) fn uid(&self) -> Result<DeviceUid, Error> {
        let uid: Vec<u8> = self.sql.query_row("SELECT uid FROM device", [], |row| row.get(0))?;
        uid.try_into()
            .map(DeviceUid)
            .map_err(|_| Error::DatabaseForeign("its device name is damaged".to_owned()))
    }

    /// Makes sure there is a row for `conversation`; `true` when there was none.
    pub(super) fn know(&self, conversation: ConversationId) -> Result<bool, Error> {
        let mut insert =
            self.sql.prepare_cached("INSERT OR IGNORE INTO conversations (number) VALUES (?1)")?;
        Ok(insert.execute([int(conversation)])? > 0)
    }
}

/// A number as SQLite keeps it; wire numbers have 62 bits, so nothing is lost.
pub(super) fn int(number: impl Into<u64>) -> i64 {
    i64::try_from(number.into()).unwrap_or(i64::MAX)
}

/// A number from a row.
pub(super) fn number<T: TryFrom<u64>>(row: &Row<'_>, index: usize) -> rusqlite::Result<T> {
    let value: i64 = row.get(index)?;
    u64::try_from(value)
        .ok()
        .and_then(|value| T::try_from(value).ok())
        .ok_or(rusqlite::Error::IntegralValueOutOfRange(index, value))
}

/// A number that may be missing.
pub(super) fn maybe<T: TryFrom<u64>>(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<T>> {
    match row.get::<_, Option<i64>>(index)? {
        None => Ok(None),
        Some(_) => number(row, index).map(Some),
    }
}

//! The tables, and how an older file becomes a newer one.
//!
//! `user_version` is the format. A newer one than [`VERSION`] is refused and left alone; older ones are brought up
//! step by step, each step in one transaction with its new number.

use rusqlite::Connection;

use crate::error::Error;

/// The format this version writes.
pub(crate) const VERSION: i64 = 3;

/// "Fulm" in `application_id`: says whose file it is.
const APPLICATION: i64 = 0x4675_6c6d;

/// Step `n` brings format `n` to `n + 1`.
const STEPS: [&str; 3] = [FIRST, FOLDER_AND_NETWORKS, CHAINS_OF_DEVICES];

const FIRST: &str = "
CREATE TABLE device (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    uid BLOB NOT NULL,
    epoch INTEGER NOT NULL DEFAULT 0,
    user INTEGER,
    device INTEGER,
    ticket BLOB,
    server TEXT NOT NULL DEFAULT '',
    taken INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE conversations (
    number INTEGER PRIMARY KEY,
    kind INTEGER NOT NULL DEFAULT 0,
    name TEXT,
    peer INTEGER NOT NULL DEFAULT 0,
    head INTEGER NOT NULL DEFAULT 0,
    low INTEGER NOT NULL DEFAULT 0,
    recv INTEGER NOT NULL DEFAULT 0,
    read INTEGER NOT NULL DEFAULT 0,
    read_dirty INTEGER NOT NULL DEFAULT 0,
    pseq INTEGER NOT NULL DEFAULT 0,
    time INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX conversations_by_name ON conversations (kind, name) WHERE name IS NOT NULL;
CREATE INDEX conversations_read_dirty ON conversations (number) WHERE read_dirty = 1;
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    body INTEGER,
    conversation INTEGER,
    target_kind INTEGER,
    target_name TEXT,
    pseq INTEGER,
    kind INTEGER NOT NULL,
    flags INTEGER NOT NULL,
    reference INTEGER,
    ttl INTEGER,
    created INTEGER NOT NULL,
    state INTEGER NOT NULL DEFAULT 0,
    seq INTEGER,
    code INTEGER,
    payload BLOB
);
CREATE UNIQUE INDEX outbox_lane ON outbox (conversation, pseq) WHERE state = 0 AND pseq IS NOT NULL;
CREATE INDEX outbox_nameless ON outbox (id) WHERE state = 0 AND conversation IS NULL;
CREATE INDEX outbox_body ON outbox (body) WHERE body IS NOT NULL;
CREATE INDEX outbox_mortal ON outbox (id) WHERE state = 0 AND ttl IS NOT NULL;
CREATE TABLE messages (
    arrival INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    sender INTEGER NOT NULL,
    time INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    flags INTEGER NOT NULL,
    reference INTEGER,
    first INTEGER,
    payload BLOB NOT NULL
);
CREATE UNIQUE INDEX messages_by_seq ON messages (conversation, seq);
CREATE TABLE chains (
    conversation INTEGER NOT NULL,
    sender INTEGER NOT NULL,
    first INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (conversation, sender)
) WITHOUT ROWID;
CREATE TABLE users (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL
);
CREATE TABLE receipts (
    conversation INTEGER NOT NULL,
    user INTEGER NOT NULL,
    recv INTEGER NOT NULL,
    read INTEGER NOT NULL,
    PRIMARY KEY (conversation, user)
) WITHOUT ROWID;
";

/// The gateway's data folder, and what is known of networks.
const FOLDER_AND_NETWORKS: &str = "
ALTER TABLE device ADD COLUMN folder BLOB;
ALTER TABLE device ADD COLUMN networks BLOB;
";

/// Bodies in pieces are kept apart by device. Which device sent the pieces of an older file is not known: a body that was
/// not finished there is let go.
const CHAINS_OF_DEVICES: &str = "
DROP TABLE chains;
CREATE TABLE chains (
    conversation INTEGER NOT NULL,
    sender INTEGER NOT NULL,
    device INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    pseq INTEGER NOT NULL,
    first INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (conversation, sender, device)
) WITHOUT ROWID;
";

/// Brings the file to [`VERSION`].
///
/// # Errors
/// [`Error::DatabaseNewer`], [`Error::DatabaseForeign`], or what SQLite says.
pub(crate) fn bring_up(sql: &Connection) -> Result<(), Error> {
    let found: i64 = sql.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let application: i64 = sql.pragma_query_value(None, "application_id", |row| row.get(0))?;
    if found > VERSION && application == APPLICATION {
        return Err(Error::DatabaseNewer { found, known: VERSION });
    }
    let tables: i64 = sql.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    if application != APPLICATION && (tables > 0 || found != 0) {
        return Err(Error::DatabaseForeign("the file was made by another program".to_owned()));
    }
    let mut version = found;
    for step in STEPS.iter().skip(usize::try_from(found).unwrap_or(0)) {
        version += 1;
        sql.execute_batch(&format!(
            "BEGIN IMMEDIATE; {step} PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {version}; COMMIT;"
        ))?;
    }
    Ok(())
}

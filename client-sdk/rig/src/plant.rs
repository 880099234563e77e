//! Faults that are put into a database between two runs of the app, as a broken SDK might: the rig has to notice each.

use std::{collections::BTreeSet, path::Path};

use clap::ValueEnum;
use rusqlite::{Connection, OptionalExtension, params};

use crate::log::{Entry, Line};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Plant {
    /// A queued message is gone from the outbox
    Lost,
    /// A queued message is in the outbox twice
    Doubled,
    /// Two queued messages change places
    Reordered,
    /// The end of a message is forgotten before the app was told
    Untold,
    /// A cursor passes a message that did not come
    Skipped,
}

/// Puts the fault into the database of an app that wrote `lines`; `false`: there is nothing in it to be broken now.
///
/// # Errors
/// When the database can't be changed.
pub(crate) fn put(plant: Plant, database: &Path, lines: &[Line]) -> anyhow::Result<bool> {
    let mut sql = Connection::open(database)?;
    let sql = sql.transaction()?;
    let done = match plant {
        Plant::Lost => lost(&sql, lines)?,
        Plant::Doubled => doubled(&sql, lines)?,
        Plant::Reordered => reordered(&sql, lines)?,
        Plant::Untold => untold(&sql, lines)?,
        Plant::Skipped => skipped(&sql)?,
    };
    sql.commit()?;
    Ok(done)
}

/// The newest rows of the lanes: nothing behind them would miss them.
const NEWEST: &str = "SELECT o.id, o.conversation FROM outbox o JOIN conversations c ON c.number = o.conversation
    WHERE o.state = 0 AND o.pseq = c.pseq AND o.body IS NULL AND o.flags = 0 AND o.ttl IS NULL ORDER BY o.id DESC";

/// The newest row of a lane that the app was told is queued: id and conversation.
fn newest(sql: &Connection, lines: &[Line]) -> rusqlite::Result<Option<(i64, i64)>> {
    let known = kept(lines);
    let mut select = sql.prepare(NEWEST)?;
    let rows: Vec<(i64, i64)> =
        select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
    Ok(rows.into_iter().find(|(id, _)| known.contains(id)))
}

fn lost(sql: &Connection, lines: &[Line]) -> rusqlite::Result<bool> {
    let Some((id, conversation)) = newest(sql, lines)? else { return Ok(false) };
    sql.execute("DELETE FROM outbox WHERE id = ?1", [id])?;
    sql.execute("UPDATE conversations SET pseq = pseq - 1 WHERE number = ?1", [conversation])?;
    Ok(true)
}

fn doubled(sql: &Connection, lines: &[Line]) -> rusqlite::Result<bool> {
    let Some((id, conversation)) = newest(sql, lines)? else { return Ok(false) };
    sql.execute(
        "INSERT INTO outbox (conversation, pseq, kind, flags, created, payload)
             SELECT conversation, pseq + 1, kind, flags, created, payload FROM outbox WHERE id = ?1",
        [id],
    )?;
    sql.execute("UPDATE conversations SET pseq = pseq + 1 WHERE number = ?1", [conversation])?;
    Ok(true)
}

fn reordered(sql: &Connection, lines: &[Line]) -> rusqlite::Result<bool> {
    let Some((id, conversation)) = newest(sql, lines)? else { return Ok(false) };
    let before: Option<i64> = sql
        .query_row(
            "SELECT id FROM outbox WHERE conversation = ?1 AND state = 0 AND id < ?2 AND body IS NULL AND flags = 0
                 AND ttl IS NULL ORDER BY id DESC LIMIT 1",
            [conversation, id],
            |row| row.get(0),
        )
        .optional()?;
    let Some(before) = before else { return Ok(false) };
    sql.execute(
        "UPDATE outbox SET payload = (SELECT payload FROM outbox o WHERE o.id = CASE outbox.id WHEN ?1 THEN ?2 ELSE ?1
             END) WHERE id IN (?1, ?2)",
        params![id, before],
    )?;
    Ok(true)
}

fn untold(sql: &Connection, lines: &[Line]) -> rusqlite::Result<bool> {
    let known = kept(lines);
    let told = ids(lines, |entry| match entry {
        Entry::Ended { id, .. } => Some(*id),
        _ => None,
    });
    let mut select =
        sql.prepare("SELECT id FROM outbox WHERE state > 0 AND body IS NULL AND flags & 1 = 0")?;
    let settled: Vec<i64> = select.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    let Some(id) = settled.into_iter().find(|id| known.contains(id) && !told.contains(id)) else {
        return Ok(false);
    };
    sql.execute("DELETE FROM outbox WHERE id = ?1", [id])?;
    Ok(true)
}

fn skipped(sql: &Connection) -> rusqlite::Result<bool> {
    let moved = sql.execute(
        "UPDATE conversations SET recv = recv + 1 WHERE recv > 3
             AND number = (SELECT conversation FROM messages GROUP BY conversation ORDER BY count(*) DESC LIMIT 1)",
        [],
    )?;
    Ok(moved > 0)
}

fn kept(lines: &[Line]) -> BTreeSet<i64> {
    ids(lines, |entry| match entry {
        Entry::Kept { id, .. } => Some(*id),
        _ => None,
    })
}

fn ids(lines: &[Line], id: impl Fn(&Entry) -> Option<u64>) -> BTreeSet<i64> {
    lines.iter().filter_map(|(_, entry)| id(entry)).filter_map(|id| i64::try_from(id).ok()).collect()
}

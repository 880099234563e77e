//! Received records: stored once, handed out once, in order.
//!
//! - A record and the move of its conversation's cursor are in one transaction.
//! - (conversation, seq) is unique: a record that comes again is not stored again.
//! - `arrival` orders what was received over all conversations; the app's place in it is one number (`taken`).
//! - The pieces of a large body stay separate rows and are put together when they are handed out: only pieces one device
//!   sent one after the other, from the first to the last. Others are never shown.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use fulmar_protocol::{
    frame::{Deliver, RecordKind},
    id::{ConversationId, DeviceId, Epoch, Pseq, Seq, UnixMillis, UserId},
    limit::BODY_BYTES_MAX,
};
use rusqlite::{OptionalExtension, Row, params};

use super::{
    outbox::Settled,
    store::{Store, int, maybe, number},
};
use crate::{error::Error, event::Received};

/// A piece, but for the last one of a body: not shown by itself.
const PIECE: i64 = 1;
const SILENT: i64 = 2;
const OWN: i64 = 4;
const THIS_DEVICE: i64 = 8;
const TRUNCATED: i64 = 16;

/// Bytes of payload of one page of messages.
const PAGE_BYTES_MAX: usize = 1024 * 1024;

/// How far a conversation's cursor moves, and why.
#[derive(Clone, Debug)]
pub(crate) enum Marker {
    /// A record.
    Record(Box<Deliver>),
    /// Everything up to here is gone by retention.
    Gone(ConversationId, Seq),
}

/// Whose database it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own {
    pub(crate) user: UserId,
    pub(crate) device: DeviceId,
    pub(crate) epoch: Epoch,
}

/// What came of a batch.
#[derive(Debug, Default)]
pub(crate) struct Delivered {
    /// The cursors that moved.
    pub(crate) cursors: BTreeMap<ConversationId, Seq>,
    /// Sends that ended: by their echo, or by an answer.
    pub(crate) settled: Vec<Settled>,
    /// Senders without a name.
    pub(crate) nameless: BTreeSet<UserId>,
    /// Conversations seen for the first time.
    pub(crate) fresh: Vec<ConversationId>,
    /// Pieces of bodies that will never be whole.
    pub(crate) strays: u64,
}

/// A record's place in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It is the body.
    Whole,
    /// One of several, but for the last: the seq of the first, and whether it is beyond what is kept.
    Piece(Seq, bool),
    /// The last of several: the seq of the first, and whether the body was cut.
    Last(Seq, bool),
    /// The one before it never came.
    Stray,
}

/// What the app is handed next.
pub(super) const PAGE: &str =
    "SELECT m.arrival, m.conversation, m.seq, m.sender, m.time, m.kind, m.flags, m.reference, m.first,
         m.payload, u.name FROM messages m LEFT JOIN users u ON u.number = m.sender
         WHERE m.arrival > ?1 AND m.flags & 1 = 0 ORDER BY m.arrival LIMIT ?2";

impl Store {
    /// Stores a record, or notes that it is gone, and moves the cursor behind it.
    pub(crate) fn deliver(
        &self,
        marker: &Marker,
        now: UnixMillis,
        own: Own,
        delivered: &mut Delivered,
    ) -> Result<(), Error> {
        let (conversation, seq) = match marker {
            Marker::Record(record) => (record.conversation, record.seq),
            Marker::Gone(conversation, to) => (*conversation, *to),
        };
        if self.know(conversation)? {
            delivered.fresh.push(conversation);
        }
        if let Marker::Record(record) = marker {
            self.store_record(record, now, own, delivered)?;
        }
        let mut cursor = self.sql.prepare_cached(
            "UPDATE conversations SET recv = ?2, head = max(head, ?2) WHERE number = ?1 AND recv < ?2",
        )?;
        cursor.execute(params![int(conversation), int(seq)])?;
        let moved = delivered.cursors.entry(conversation).or_insert(seq);
        *moved = (*moved).max(seq);
        Ok(())
    }

    fn store_record(
        &self,
        record: &Deliver,
        now: UnixMillis,
        own: Own,
        delivered: &mut Delivered,
    ) -> Result<(), Error> {
        let by_user = record.sender == own.user;
        let this_device = by_user && record.origin.is_some_and(|origin| origin.device == own.device);
        if (record.more || record.continues) && self.stored(record.conversation, record.seq)? {
            return Ok(());
        }
        let place = self.place(record, delivered)?;
        let (first, truncated) = match place {
            Place::Whole => (None, false),
            Place::Piece(first, truncated) | Place::Last(first, truncated) => (Some(first), truncated),
            Place::Stray => (Some(record.seq), true),
        };
        let piece = matches!(place, Place::Piece(..) | Place::Stray);
        let flag = |on: bool, flag: i64| if on { flag } else { 0 };
        let flags = flag(piece, PIECE)
            | flag(record.silent, SILENT)
            | flag(by_user, OWN)
            | flag(this_device, THIS_DEVICE)
            | flag(truncated, TRUNCATED);
        let time = record.time.expand(now);
        let mut insert = self.sql.prepare_cached(
            "INSERT OR IGNORE INTO messages
                 (conversation, seq, sender, time, kind, flags, reference, first, payload)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?;
        let payload: &[u8] = if truncated && piece { &[] } else { &record.payload };
        let inserted = insert.execute(params![
            int(record.conversation),
            int(record.seq),
            int(record.sender),
            int(time),
            int(record.kind.number()),
            flags,
            record.reference.map(int),
            first.map(int),
            payload,
        ])?;
        if inserted == 0 {
            return Ok(());
        }
        if let Some(origin) = record.origin.filter(|origin| this_device && origin.epoch == own.epoch)
            && let Some(settled) = self.acked(record.conversation, origin.pseq, record.seq)?
        {
            delivered.settled.push(settled);
        }
        match record.kind {
            RecordKind::Created | RecordKind::Joined | RecordKind::Left => {
                self.take_roster(record, delivered)?
            }
            _ if !by_user && record.sender.get() != 0 && self.user_name(record.sender)?.is_none() => {
                delivered.nameless.insert(record.sender);
            }
            _ => {}
        }
        self.sql
            .prepare_cached("UPDATE conversations SET time = max(time, ?2) WHERE number = ?1")?
            .execute(params![int(record.conversation), int(time)])?;
        Ok(())
    }

    fn stored(&self, conversation: ConversationId, seq: Seq) -> Result<bool, Error> {
        let mut select =
            self.sql.prepare_cached("SELECT 1 FROM messages WHERE conversation = ?1 AND seq = ?2")?;
        Ok(select.exists(params![int(conversation), int(seq)])?)
    }

    /// Keeps track of the bodies in pieces, one for each device that sends. What does not follow directly on what the
    /// device sent before ends its body: the rest of that one will not come any more, or never was for this reader.
    fn place(&self, record: &Deliver, delivered: &mut Delivered) -> Result<Place, Error> {
        if !record.more && !record.continues {
            return Ok(Place::Whole);
        }
        let Some(origin) = record.origin else {
            delivered.strays += 1;
            return Ok(Place::Stray);
        };
        let key = params![int(record.conversation), int(record.sender), int(origin.device)];
        let open: Option<(Epoch, Pseq, Seq, u64)> = self
            .sql
            .prepare_cached(
                "SELECT epoch, pseq, first, bytes FROM chains
                     WHERE conversation = ?1 AND sender = ?2 AND device = ?3",
            )?
            .query_row(key, |row| Ok((number(row, 0)?, number(row, 1)?, number(row, 2)?, number(row, 3)?)))
            .optional()?;
        let follows = |epoch: Epoch, pseq: Pseq| epoch == origin.epoch && pseq.next() == Some(origin.pseq);
        let (first, bytes) = match open {
            Some((epoch, pseq, first, bytes)) if record.continues && follows(epoch, pseq) => (first, bytes),
            open => {
                if let Some((_, _, first, _)) = open {
                    delivered.strays += self.let_go(record.conversation, first)?;
                }
                if record.continues {
                    delivered.strays += 1;
                    return Ok(Place::Stray);
                }
                (record.seq, 0)
            }
        };
        let bytes = bytes.saturating_add(record.payload.len() as u64);
        let cut = bytes > BODY_BYTES_MAX as u64;
        if !record.more {
            self.sql
                .prepare_cached("DELETE FROM chains WHERE conversation = ?1 AND sender = ?2 AND device = ?3")?
                .execute(key)?;
            return Ok(Place::Last(first, cut));
        }
        self.sql
            .prepare_cached(
                "INSERT OR REPLACE INTO chains (conversation, sender, device, epoch, pseq, first, bytes)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute(params![
                int(record.conversation),
                int(record.sender),
                int(origin.device),
                int(origin.epoch),
                int(origin.pseq),
                int(first),
                int(bytes),
            ])?;
        Ok(Place::Piece(first, cut))
    }

    /// A body will not be finished: its pieces are of no use. Says how many there were.
    fn let_go(&self, conversation: ConversationId, first: Seq) -> Result<u64, Error> {
        self.sql
            .prepare_cached("DELETE FROM chains WHERE conversation = ?1 AND first = ?2")?
            .execute(params![int(conversation), int(first)])?;
        let pieces = self
            .sql
            .prepare_cached(
                "UPDATE messages SET payload = x'' WHERE conversation = ?1 AND seq >= ?2 AND first = ?2 AND flags & 1",
            )?
            .execute(params![int(conversation), int(first)])?;
        Ok(pieces as u64)
    }

    fn take_roster(&self, record: &Deliver, delivered: &mut Delivered) -> Result<(), Error> {
        let roster = fulmar_protocol::service::decode::<fulmar_protocol::service::Roster>(&record.payload);
        let users = roster.map(|roster| roster.users).unwrap_or_default();
        for (user, name) in &users {
            self.name_user(*user, name)?;
            if record.kind == RecordKind::Left {
                // What the leaver began will not be finished.
                let mut select = self
                    .sql
                    .prepare_cached("SELECT first FROM chains WHERE conversation = ?1 AND sender = ?2")?;
                let begun =
                    select.query_map(params![int(record.conversation), int(*user)], |row| number(row, 0))?;
                for first in begun.collect::<Result<Vec<Seq>, _>>()? {
                    delivered.strays += self.let_go(record.conversation, first)?;
                }
            }
        }
        Ok(())
    }

    /// The newest arrival, 0 when there is none.
    pub(crate) fn last_arrival(&self) -> Result<u64, Error> {
        let mut select = self.sql.prepare_cached("SELECT coalesce(max(arrival), 0) FROM messages")?;
        Ok(select.query_row([], |row| number(row, 0))?)
    }

    /// What the app has taken up to now.
    pub(crate) fn taken(&self) -> Result<u64, Error> {
        let mut select = self.sql.prepare_cached("SELECT taken FROM device")?;
        Ok(select.query_row([], |row| number(row, 0))?)
    }

    /// The app has taken everything up to `arrival`.
    pub(crate) fn take(&self, arrival: u64) -> Result<(), Error> {
        let mut update = self.sql.prepare_cached("UPDATE device SET taken = max(taken, ?1)")?;
        update.execute([int(arrival)])?;
        Ok(())
    }

    /// Messages after `arrival`, oldest first; few when they are large.
    pub(crate) fn page(&self, arrival: u64, limit: usize) -> Result<Vec<Received>, Error> {
        let mut select = self.sql.prepare_cached(PAGE)?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut rows = select.query(params![int(arrival), limit])?;
        let mut page = Vec::new();
        let mut bytes = 0;
        while let Some(row) = rows.next()? {
            let received = self.received(row)?;
            bytes += received.payload.len();
            page.push(received);
            if bytes > PAGE_BYTES_MAX {
                break;
            }
        }
        Ok(page)
    }

    /// The newest messages of a conversation before `before`, oldest first.
    pub(crate) fn history(
        &self,
        conversation: ConversationId,
        before: Option<Seq>,
        limit: usize,
    ) -> Result<Vec<Received>, Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT m.arrival, m.conversation, m.seq, m.sender, m.time, m.kind, m.flags, m.reference, m.first,
                 m.payload, u.name FROM messages m LEFT JOIN users u ON u.number = m.sender
                 WHERE m.conversation = ?1 AND m.seq < ?2 AND m.flags & 1 = 0 ORDER BY m.seq DESC LIMIT ?3",
        )?;
        let before = before.map_or(i64::MAX, int);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut rows = select.query(params![int(conversation), before, limit])?;
        let mut page = Vec::new();
        let mut bytes = 0;
        while let Some(row) = rows.next()? {
            let received = self.received(row)?;
            bytes += received.payload.len();
            page.push(received);
            if bytes > PAGE_BYTES_MAX {
                break;
            }
        }
        page.reverse();
        Ok(page)
    }

    fn received(&self, row: &Row<'_>) -> Result<Received, Error> {
        let flags: i64 = row.get(6)?;
        let kind: u64 = number(row, 5)?;
        let mut received = Received {
            arrival: number(row, 0)?,
            conversation: number(row, 1)?,
            seq: number(row, 2)?,
            sender: number(row, 3)?,
            sender_name: row.get(10)?,
            time: number(row, 4)?,
            kind: RecordKind::from_number(kind)
                .ok_or(rusqlite::Error::IntegralValueOutOfRange(5, int(kind)))?,
            reference: maybe(row, 7)?,
            payload: row.get::<_, Vec<u8>>(9)?.into(),
            own: flags & OWN != 0,
            this_device: flags & THIS_DEVICE != 0,
            silent: flags & SILENT != 0,
            truncated: flags & TRUNCATED != 0,
        };
        if let Some(first) = maybe::<Seq>(row, 8)? {
            self.put_together(&mut received, first)?;
        }
        Ok(received)
    }

    /// Puts the pieces from `first` on in front of the last piece. (Pieces from a file of format 2 or older don't say
    /// which body they are of, only whose.)
    fn put_together(&self, received: &mut Received, first: Seq) -> Result<(), Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT payload FROM messages
                 WHERE conversation = ?1 AND seq >= ?2 AND seq < ?3 AND flags & 1
                 AND (first = ?2 OR (first IS NULL AND sender = ?4)) ORDER BY seq",
        )?;
        let mut rows = select.query(params![
            int(received.conversation),
            int(first),
            int(received.seq),
            int(received.sender)
        ])?;
        let mut whole = Vec::new();
        while let Some(row) = rows.next()? {
            let piece: Vec<u8> = row.get(0)?;
            whole.extend_from_slice(&piece);
        }
        if !received.truncated {
            whole.extend_from_slice(&received.payload);
        }
        received.payload = Bytes::from(whole);
        Ok(())
    }
}

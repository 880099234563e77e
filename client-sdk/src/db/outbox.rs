//! Sends: numbered, kept until settled, settled once.
//!
//! - A send to a conversation whose number is known gets the next pseq of its lane in the transaction that stores it;
//!   others get theirs, in the order in which they were queued, when the name is resolved.
//! - The pseqs of a lane's unsettled rows have no holes: an expired row stays as a tombstone until its number is
//!   consumed.
//! - A body larger than a SEND is several rows with consecutive pseqs; the last one carries the outcome.
//! - The pieces of a body keep their payloads until its last one is settled: what the app is shown is the whole of it.
//! - A settled row stays, without its payload, until the app was told ([`Store::told`]), over restarts.

use bytes::Bytes;
use fulmar_protocol::{
    close::RefusalCode,
    frame::{ConversationClass, OpenTarget, Opened, RecordKind, Send},
    id::{ConversationId, Epoch, Pseq, Seq},
};
use rusqlite::{OptionalExtension, Row, params};

use super::store::{Store, int, maybe, number};
use crate::error::Error;

const MORE: i64 = 1;
const SILENT: i64 = 2;
const CANCEL: i64 = 4;

const WAITING: i64 = 0;
const ACKED: i64 = 1;
const REFUSED: i64 = 2;
const EXPIRED: i64 = 3;

pub(super) const DIRECT: i64 = 1;
pub(super) const GROUP: i64 = 2;
pub(super) const BROADCAST: i64 = 3;

/// The number of a class in the database.
pub(super) const fn kind_of(class: ConversationClass) -> i64 {
    match class {
        ConversationClass::Direct => DIRECT,
        ConversationClass::Group => GROUP,
        ConversationClass::Broadcast => BROADCAST,
    }
}

/// Kind and name of a target that is named.
fn named(target: &OpenTarget) -> Option<(i64, &String)> {
    match target {
        OpenTarget::Number(_) => None,
        OpenTarget::Direct(name) => Some((DIRECT, name)),
        OpenTarget::Group(name) => Some((GROUP, name)),
        OpenTarget::Broadcast(name) => Some((BROADCAST, name)),
    }
}

/// A message to be stored.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) target: OpenTarget,
    pub(crate) kind: RecordKind,
    pub(crate) reference: Option<Seq>,
    /// Seconds.
    pub(crate) ttl: Option<u32>,
    pub(crate) silent: bool,
    pub(crate) payload: Bytes,
    /// Bytes of one piece.
    pub(crate) piece: usize,
    /// Milliseconds since 1970 by the device's clock.
    pub(crate) created: u64,
}

/// What was stored.
#[derive(Debug)]
pub(crate) struct Queued {
    /// Names the body: id of its first row.
    pub(crate) id: u64,
    /// `None`: the name has to be resolved first.
    pub(crate) conversation: Option<ConversationId>,
    /// The send, when it is a single one that has its number: what [`Store::waiting`] would say.
    pub(crate) send: Option<WaitingSend>,
}

/// One SEND that waits.
#[derive(Clone, Debug)]
pub(crate) struct WaitingSend {
    pub(crate) id: u64,
    pub(crate) send: Send,
    /// When it is of no use any more, milliseconds since 1970 by the device's clock.
    pub(crate) ends: Option<u64>,
}

/// How a send ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Acked(Seq),
    Refused(RefusalCode),
    Expired,
}

/// A send that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) id: u64,
    pub(crate) conversation: Option<ConversationId>,
    pub(crate) outcome: Outcome,
}

/// What became of a body that is taken back.
#[derive(Debug)]
pub(crate) struct Cancelled {
    /// It ended at once.
    pub(crate) settled: Option<Settled>,
    /// Its sends that have numbers, to be consumed by tombstones.
    pub(crate) numbered: Vec<(ConversationId, Pseq)>,
}

/// A row that was settled.
struct Piece {
    id: u64,
    /// Its body's first row, when that is another one.
    body: Option<u64>,
    flags: i64,
}

/// A body the app was not told the end of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unsettled {
    pub(crate) id: u64,
    pub(crate) target: OpenTarget,
    pub(crate) kind: RecordKind,
    pub(crate) created: u64,
    pub(crate) payload: Bytes,
    pub(crate) outcome: Option<Outcome>,
}

impl Store {
    /// The number behind a name, if this database knows it.
    pub(crate) fn lookup(&self, target: &OpenTarget) -> Result<Option<ConversationId>, Error> {
        if let OpenTarget::Number(conversation) = target {
            return Ok(Some(*conversation));
        }
        let Some((kind, name)) = named(target) else { return Ok(None) };
        let mut select =
            self.sql.prepare_cached("SELECT number FROM conversations WHERE kind = ?1 AND name = ?2")?;
        Ok(select.query_row(params![kind, name], |row| number(row, 0)).optional()?)
    }

    /// Stores a message, cut into pieces, with its pseqs when the conversation's number is known.
    pub(crate) fn enqueue(&self, draft: &Draft) -> Result<Queued, Error> {
        let conversation = self.lookup(&draft.target)?;
        let pieces = draft.payload.len().div_ceil(draft.piece.max(1)).max(1);
        let lane: Option<(Pseq, Seq)> = match conversation {
            Some(conversation) => {
                self.know(conversation)?;
                let mut next = self.sql.prepare_cached(
                    "UPDATE conversations SET pseq = pseq + ?2 WHERE number = ?1 RETURNING pseq - ?2, recv",
                )?;
                let count = i64::try_from(pieces).unwrap_or(i64::MAX);
                let lane = next.query_row(params![int(conversation), count], |row| {
                    Ok((number(row, 0)?, number(row, 1)?))
                })?;
                Some(lane)
            }
            None => None,
        };
        let mut pseq = lane.map(|(last, _)| int(last));
        let (target_kind, target_name) = named(&draft.target).filter(|_| conversation.is_none()).unzip();
        let mut insert = self.sql.prepare_cached(
            "INSERT INTO outbox (body, conversation, target_kind, target_name, pseq, kind, flags, reference, ttl,
                 created, payload) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )?;
        let mut body = None;
        let mut rest = draft.payload.clone();
        for index in 0..pieces {
            let more = index + 1 < pieces;
            let piece = if more { rest.split_to(draft.piece) } else { std::mem::take(&mut rest) };
            pseq = pseq.map(|pseq| pseq + 1);
            let flags = if more { MORE } else { 0 } | if draft.silent { SILENT } else { 0 };
            insert.execute(params![
                body,
                conversation.map(int),
                target_kind,
                target_name,
                pseq,
                int(draft.kind.number()),
                flags,
                draft.reference.map(int),
                draft.ttl,
                int(draft.created),
                &piece[..],
            ])?;
            body = body.or_else(|| Some(self.sql.last_insert_rowid()));
        }
        let id = body.and_then(|id| u64::try_from(id).ok()).unwrap_or(0);
        let send =
            conversation.zip(lane).filter(|_| pieces == 1).map(|(conversation, (last, seen))| WaitingSend {
                id,
                ends: draft.ttl.map(|ttl| draft.created.saturating_add(u64::from(ttl) * 1000)),
                send: Send {
                    kind: draft.kind,
                    conversation,
                    pseq: last.saturating_add(1),
                    seen,
                    reference: draft.reference,
                    ttl: draft.ttl,
                    more: false,
                    continues: false,
                    silent: draft.silent,
                    cancel: false,
                    payload: draft.payload.clone(),
                },
            });
        Ok(Queued { id, conversation, send })
    }

    /// The names sends wait for.
    pub(crate) fn unresolved(&self) -> Result<Vec<OpenTarget>, Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT DISTINCT target_kind, target_name FROM outbox WHERE state = 0 AND conversation IS NULL LIMIT 64",
        )?;
        let rows = select.query_map([], |row| target(row, 0, 1))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// A name got its number: what waits for it is numbered, in the order in which it was queued.
    pub(crate) fn resolved(&self, target: &OpenTarget, opened: &Opened) -> Result<(), Error> {
        self.know(opened.conversation)?;
        let kind = kind_of(opened.class);
        // A name that moved to another conversation (a group was made anew) leaves the old one nameless.
        self.sql.execute(
            "UPDATE conversations SET name = NULL WHERE kind = ?1 AND name = ?2 AND number <> ?3",
            params![kind, opened.name, int(opened.conversation)],
        )?;
        self.sql
            .prepare_cached(
                "UPDATE conversations SET kind = ?2, name = ?3, peer = ?4, head = max(head, ?5), low = max(low, ?6),
                     read = max(read, ?7) WHERE number = ?1",
            )?
            .execute(params![
                int(opened.conversation),
                kind,
                opened.name,
                int(opened.peer),
                int(opened.head),
                int(opened.low),
                int(opened.read),
            ])?;
        if opened.class == ConversationClass::Direct && opened.peer.get() != 0 {
            self.name_user(opened.peer, &opened.name)?;
        }
        let Some((kind, name)) = named(target) else { return Ok(()) };
        let mut select = self.sql.prepare_cached(
            "SELECT id FROM outbox WHERE state = 0 AND conversation IS NULL AND target_kind = ?1 AND target_name = ?2
                 ORDER BY id",
        )?;
        let ids: Vec<i64> =
            select.query_map(params![kind, name], |row| row.get(0))?.collect::<Result<_, _>>()?;
        for id in ids {
            self.sql
                .prepare_cached("UPDATE conversations SET pseq = pseq + 1 WHERE number = ?1")?
                .execute([int(opened.conversation)])?;
            self.sql
                .prepare_cached(
                    "UPDATE outbox SET conversation = ?2,
                         pseq = (SELECT pseq FROM conversations WHERE number = ?2) WHERE id = ?1",
                )?
                .execute(params![id, int(opened.conversation)])?;
        }
        Ok(())
    }

    /// A name will not get a number: what waits for it is refused.
    pub(crate) fn unresolvable(&self, target: &OpenTarget, code: RefusalCode) -> Result<Vec<Settled>, Error> {
        let Some((kind, name)) = named(target) else { return Ok(Vec::new()) };
        let mut update = self.sql.prepare_cached(
            "UPDATE outbox SET state = ?3, code = ?4, payload = NULL
                 WHERE state = 0 AND conversation IS NULL AND target_kind = ?1 AND target_name = ?2
                 RETURNING coalesce(body, id), flags",
        )?;
        let rows = update.query_map(params![kind, name, REFUSED, code.code()], |row| {
            Ok((number::<u64>(row, 0)?, row.get::<_, i64>(1)?))
        })?;
        let mut settled = Vec::new();
        for row in rows {
            let (id, flags) = row?;
            if flags & MORE == 0 {
                settled.push(Settled { id, conversation: None, outcome: Outcome::Refused(code) });
            }
        }
        Ok(settled)
    }

    /// Conversations that have sends waiting.
    pub(crate) fn waiting_conversations(&self) -> Result<Vec<ConversationId>, Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT DISTINCT conversation FROM outbox WHERE state = 0 AND pseq IS NOT NULL AND conversation IS NOT NULL",
        )?;
        let rows = select.query_map([], |row| number(row, 0))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// What waits in one lane after `after`, in order; expired ones as tombstones.
    pub(crate) fn waiting(
        &self,
        conversation: ConversationId,
        after: Pseq,
        limit: usize,
        now: u64,
    ) -> Result<Vec<WaitingSend>, Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT coalesce(body, id), pseq, kind, flags, reference, ttl, created, payload,
                 (SELECT recv FROM conversations WHERE number = ?1), body
                 FROM outbox WHERE conversation = ?1 AND state = 0 AND pseq > ?2 ORDER BY pseq LIMIT ?3",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = select.query_map(params![int(conversation), int(after), limit], |row| {
            let flags: i64 = row.get(3)?;
            let ttl: Option<u32> = row.get(5)?;
            let created: u64 = number(row, 6)?;
            // A body of several pieces is never cut in the middle by its age.
            let whole = flags & MORE == 0 && row.get::<_, Option<i64>>(9)?.is_none();
            let ends = ttl.filter(|_| whole).map(|ttl| created.saturating_add(u64::from(ttl) * 1000));
            let old = ends.is_some_and(|ends| ends <= now);
            let cancel = flags & CANCEL != 0 || old;
            let payload: Option<Vec<u8>> = row.get(7)?;
            Ok(WaitingSend {
                id: number(row, 0)?,
                ends,
                send: Send {
                    kind: kind(row, 2)?,
                    conversation,
                    pseq: number(row, 1)?,
                    seen: number(row, 8)?,
                    reference: maybe(row, 4)?,
                    // The whole ttl, not what is left: a repeated send must have the same bytes.
                    ttl,
                    more: flags & MORE != 0,
                    continues: row.get::<_, Option<i64>>(9)?.is_some(),
                    silent: flags & SILENT != 0,
                    cancel,
                    payload: if cancel { Bytes::new() } else { payload.unwrap_or_default().into() },
                },
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Sends that wait for a name and whose time is over: they have no number yet, so they just end.
    pub(crate) fn expire_nameless(&self, now: u64) -> Result<Vec<Settled>, Error> {
        let mut update = self.sql.prepare_cached(
            "UPDATE outbox SET state = ?1, payload = NULL
                 WHERE state = 0 AND conversation IS NULL AND ttl IS NOT NULL AND created + ttl * 1000 <= ?2
                 RETURNING coalesce(body, id), flags",
        )?;
        let rows = update.query_map(params![EXPIRED, int(now)], |row| {
            Ok((number::<u64>(row, 0)?, row.get::<_, i64>(1)?))
        })?;
        let mut settled = Vec::new();
        for row in rows {
            let (id, flags) = row?;
            if flags & MORE == 0 {
                settled.push(Settled { id, conversation: None, outcome: Outcome::Expired });
            }
        }
        Ok(settled)
    }

    /// Turns a send into a tombstone, or ends it when it has no number yet. What has one is named. A body in several pieces
    /// that has its numbers is left alone: pieces of it may be stored already, and with the rest gone whoever receives them
    /// would take the sender's next message for the end of it.
    pub(crate) fn cancel(&self, id: u64) -> Result<Cancelled, Error> {
        let nameless = self.sql.execute(
            "UPDATE outbox SET state = ?2, payload = NULL
                 WHERE (id = ?1 OR body = ?1) AND state = 0 AND conversation IS NULL",
            params![int(id), EXPIRED],
        )?;
        if nameless > 0 {
            let settled = Settled { id, conversation: None, outcome: Outcome::Expired };
            return Ok(Cancelled { settled: Some(settled), numbered: Vec::new() });
        }
        let mut update = self.sql.prepare_cached(
            "UPDATE outbox SET flags = flags | ?2 WHERE id = ?1 AND state = 0 AND flags & 1 = 0
                 RETURNING conversation, pseq",
        )?;
        let rows =
            update.query_map(params![int(id), CANCEL], |row| Ok((number(row, 0)?, number(row, 1)?)))?;
        Ok(Cancelled { settled: None, numbered: rows.collect::<Result<_, _>>()? })
    }

    /// A send is stored at the gateway. Again: nothing happens.
    pub(crate) fn acked(
        &self,
        conversation: ConversationId,
        pseq: Pseq,
        seq: Seq,
    ) -> Result<Option<Settled>, Error> {
        let mut update = self.sql.prepare_cached(
            "UPDATE outbox SET payload = iif(flags & 1, payload, NULL), seq = ?3,
                 state = CASE WHEN code IS NULL THEN 1 ELSE 2 END
                 WHERE conversation = ?1 AND pseq = ?2 AND state = 0
                 RETURNING id, body, flags, state, code",
        )?;
        let row = update
            .query_row(params![int(conversation), int(pseq), int(seq)], |row| {
                let piece = Piece { id: number(row, 0)?, body: maybe(row, 1)?, flags: row.get(2)? };
                Ok((piece, row.get::<_, i64>(3)?, row.get::<_, Option<u32>>(4)?))
            })
            .optional()?;
        let Some((piece, state, code)) = row else { return Ok(None) };
        if piece.flags & MORE != 0 {
            return Ok(None);
        }
        let id = self.whole(piece)?;
        let outcome = outcome(state, Some(seq), code);
        Ok(outcome.map(|outcome| Settled { id, conversation: Some(conversation), outcome }))
    }

    /// A send was refused for good; its number is consumed.
    pub(crate) fn refused(
        &self,
        conversation: ConversationId,
        pseq: Pseq,
        code: RefusalCode,
    ) -> Result<Option<Settled>, Error> {
        let mut update = self.sql.prepare_cached(
            "UPDATE outbox SET payload = iif(flags & 1, payload, NULL), state = 2, code = coalesce(code, ?3)
                 WHERE conversation = ?1 AND pseq = ?2 AND state = 0 RETURNING id, body, flags, code",
        )?;
        let row = update
            .query_row(params![int(conversation), int(pseq), code.code()], |row| {
                let piece = Piece { id: number(row, 0)?, body: maybe(row, 1)?, flags: row.get(2)? };
                Ok((piece, row.get::<_, u32>(3)?))
            })
            .optional()?;
        let Some((piece, code)) = row else { return Ok(None) };
        if piece.flags & MORE != 0 {
            self.spoil(piece.body.unwrap_or(piece.id), code)?;
            return Ok(None);
        }
        let id = self.whole(piece)?;
        Ok(Some(Settled { id, conversation: Some(conversation), outcome: refusal(code) }))
    }

    /// The last piece of a body is settled: its payload is of no use any more. Gives the body's id.
    fn whole(&self, last: Piece) -> Result<u64, Error> {
        let Some(body) = last.body else { return Ok(last.id) };
        self.sql
            .prepare_cached("UPDATE outbox SET payload = NULL WHERE id = ?1 OR body = ?1")?
            .execute([int(body)])?;
        Ok(body)
    }

    /// A piece of a body will never be stored: the whole body ends as refused, when its last piece is settled.
    fn spoil(&self, id: u64, code: u32) -> Result<(), Error> {
        self.sql.execute(
            "UPDATE outbox SET code = coalesce(code, ?2) WHERE (id = ?1 OR body = ?1) AND state = 0",
            params![int(id), code],
        )?;
        Ok(())
    }

    /// The first sends of every lane, `limit` in all, by age: what may have left before is among them.
    pub(crate) fn oldest_waiting(&self, limit: usize, now: u64) -> Result<Vec<WaitingSend>, Error> {
        let mut select = self.sql.prepare(
            "SELECT conversation, count(*) FROM (SELECT conversation FROM outbox
                 WHERE state = 0 AND pseq IS NOT NULL ORDER BY id LIMIT ?1) GROUP BY conversation",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let lanes = select.query_map([limit], |row| Ok((number(row, 0)?, number::<u64>(row, 1)?)))?;
        let mut sends = Vec::new();
        for lane in lanes {
            let (conversation, count) = lane?;
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            sends.extend(self.waiting(conversation, Pseq::ZERO, count, now)?);
        }
        Ok(sends)
    }

    /// The server handed out the first epoch: sends were numbered from 1 already.
    pub(crate) fn first_epoch(&self, epoch: Epoch) -> Result<(), Error> {
        self.sql.execute("UPDATE device SET epoch = ?1", [int(epoch)])?;
        Ok(())
    }

    /// The server handed out another epoch: what is unsettled is numbered from 1 again, in the same order. A body of which
    /// only some pieces were stored is sent from its first one on: pieces of two epochs are not put together.
    pub(crate) fn new_epoch(&self, epoch: Epoch) -> Result<(), Error> {
        self.first_epoch(epoch)?;
        self.sql.execute(
            "UPDATE outbox SET state = 0, seq = NULL WHERE state = 1 AND flags & 1 AND code IS NULL AND coalesce(body, id)
                 IN (SELECT body FROM outbox WHERE state = 0 AND body IS NOT NULL AND pseq IS NOT NULL AND code IS NULL)",
            [],
        )?;
        let conversations = self.waiting_conversations()?;
        self.sql.execute("UPDATE conversations SET pseq = 0 WHERE pseq > 0", [])?;
        for conversation in conversations {
            let mut select = self.sql.prepare_cached(
                "SELECT id FROM outbox WHERE conversation = ?1 AND state = 0 AND pseq IS NOT NULL ORDER BY pseq",
            )?;
            let ids: Vec<i64> =
                select.query_map([int(conversation)], |row| row.get(0))?.collect::<Result<_, _>>()?;
            let mut pseq = 0i64;
            for id in ids {
                pseq += 1;
                self.sql
                    .prepare_cached("UPDATE outbox SET pseq = ?2 WHERE id = ?1")?
                    .execute(params![id, pseq])?;
            }
            self.sql.execute(
                "UPDATE conversations SET pseq = ?2 WHERE number = ?1",
                params![int(conversation), pseq],
            )?;
        }
        Ok(())
    }

    /// The app knows how these ended: they need not be listed again.
    pub(crate) fn told(&self, ids: &[u64]) -> Result<(), Error> {
        let mut delete =
            self.sql.prepare_cached("DELETE FROM outbox WHERE (id = ?1 OR body = ?1) AND state > 0")?;
        for id in ids {
            delete.execute([int(*id)])?;
        }
        Ok(())
    }

    /// Bodies that are not settled, or whose end the app was not told.
    pub(crate) fn unsettled(&self, limit: usize) -> Result<Vec<Unsettled>, Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT coalesce(body, id), conversation, target_kind, target_name, kind, created, state, seq, code, flags
                 FROM outbox WHERE flags & 1 = 0 ORDER BY id LIMIT ?1",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = select.query_map([limit], |row| {
            let target = match maybe(row, 1)? {
                Some(conversation) => OpenTarget::Number(conversation),
                None => target(row, 2, 3)?,
            };
            Ok(Unsettled {
                id: number(row, 0)?,
                target,
                kind: kind(row, 4)?,
                created: number(row, 5)?,
                payload: Bytes::new(),
                outcome: outcome(row.get(6)?, maybe(row, 7)?, row.get(8)?),
            })
        })?;
        let mut bodies = rows.collect::<Result<Vec<_>, _>>()?;
        let mut pieces = self.sql.prepare_cached(
            "SELECT payload FROM outbox WHERE (id = ?1 OR body = ?1) AND payload IS NOT NULL ORDER BY id",
        )?;
        for body in bodies.iter_mut().filter(|body| body.outcome.is_none()) {
            let mut whole = Vec::new();
            for piece in pieces.query_map([int(body.id)], |row| row.get::<_, Vec<u8>>(0))? {
                whole.extend_from_slice(&piece?);
            }
            body.payload = whole.into();
        }
        Ok(bodies)
    }
}

fn outcome(state: i64, seq: Option<Seq>, code: Option<u32>) -> Option<Outcome> {
    match state {
        WAITING => None,
        ACKED => Some(Outcome::Acked(seq.unwrap_or(Seq::ZERO))),
        EXPIRED => Some(Outcome::Expired),
        _ => Some(refusal(code.unwrap_or(0))),
    }
}

/// A refusal as the app sees it: what was taken back by this side has expired.
fn refusal(code: u32) -> Outcome {
    match RefusalCode::from_code(code) {
        RefusalCode::Cancelled => Outcome::Expired,
        code => Outcome::Refused(code),
    }
}

fn kind(row: &Row<'_>, index: usize) -> rusqlite::Result<RecordKind> {
    let found: u64 = number(row, index)?;
    RecordKind::from_number(found).ok_or(rusqlite::Error::IntegralValueOutOfRange(index, int(found)))
}

fn target(row: &Row<'_>, kind: usize, name: usize) -> rusqlite::Result<OpenTarget> {
    let text: String = row.get(name)?;
    match row.get::<_, i64>(kind)? {
        DIRECT => Ok(OpenTarget::Direct(text)),
        GROUP => Ok(OpenTarget::Group(text)),
        BROADCAST => Ok(OpenTarget::Broadcast(text)),
        other => Err(rusqlite::Error::IntegralValueOutOfRange(kind, other)),
    }
}

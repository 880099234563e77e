//! Who this device is, and what it knows of conversations, users and their receipts.

use fulmar_protocol::{
    frame::{ConversationClass, Head, Receipt},
    id::{ConversationId, DeviceId, DeviceUid, Epoch, FolderId, Seq, UnixMillis, UserId},
    service::{ConversationEntry, UNREAD_MAX},
};
use rusqlite::{OptionalExtension, params};

use super::{
    outbox::{BROADCAST, DIRECT, kind_of},
    store::{Store, int, maybe, number},
};
use crate::error::Error;

/// The device as the gateway knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: DeviceUid,
    pub(crate) epoch: Epoch,
    pub(crate) user: Option<UserId>,
    pub(crate) device: Option<DeviceId>,
    pub(crate) ticket: Option<Vec<u8>>,
    /// The gateway the ticket and the numbers are of.
    pub(crate) server: String,
    /// Its data folder, when it has named one: in another one all numbers here mean something else.
    pub(crate) folder: Option<FolderId>,
}

/// What the protocol half starts with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restore {
    /// Receive cursors above zero.
    pub(crate) cursors: Vec<(ConversationId, Seq)>,
    /// Read marks the gateway may not have.
    pub(crate) marks: Vec<(ConversationId, Seq)>,
}

/// A conversation of the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConversationSummary {
    /// Its number.
    pub conversation: ConversationId,
    /// What kind it is; a group, while that is not known yet.
    pub class: ConversationClass,
    /// The group's or broadcast's name, or the other user's name; empty when not known yet.
    pub name: String,
    /// The other user of a direct conversation.
    pub peer: Option<UserId>,
    /// The newest record known.
    pub head: Seq,
    /// The oldest record there is.
    pub low: Seq,
    /// How far this device has received.
    pub recv: Seq,
    /// How far the user has read.
    pub read: Seq,
    /// Messages of others beyond that, up to [`UNREAD_MAX`].
    pub unread: u32,
    /// When its newest record was stored.
    pub time: UnixMillis,
}

impl Store {
    /// Who this device is.
    pub(crate) fn identity(&self) -> Result<Identity, Error> {
        let (uid, folder) = (self.uid()?, self.folder()?);
        let identity =
            self.sql.query_row("SELECT epoch, user, device, ticket, server FROM device", [], |row| {
                Ok(Identity {
                    uid,
                    epoch: number(row, 0)?,
                    user: maybe(row, 1)?,
                    device: maybe(row, 2)?,
                    ticket: row.get(3)?,
                    server: row.get(4)?,
                    folder,
                })
            })?;
        Ok(identity)
    }

    /// The gateway said who this device is. A database belongs to one user for good.
    pub(crate) fn welcomed(
        &self,
        user: UserId,
        device: DeviceId,
        ticket: &[u8],
        server: &str,
    ) -> Result<(), Error> {
        let known = self.identity()?.user;
        if known.is_some_and(|known| known != user) {
            return Err(Error::DatabaseForeign("it belongs to another user".to_owned()));
        }
        self.sql
            .prepare_cached("UPDATE device SET user = ?1, device = ?2, ticket = ?3, server = ?4")?
            .execute(params![int(user), int(device), ticket, server])?;
        Ok(())
    }

    /// The ticket is of no use any more.
    pub(crate) fn forget_ticket(&self) -> Result<(), Error> {
        self.sql.execute("UPDATE device SET ticket = NULL", [])?;
        Ok(())
    }

    /// What the protocol half starts with.
    pub(crate) fn restore(&self) -> Result<Restore, Error> {
        let pair = |row: &rusqlite::Row<'_>| Ok((number(row, 0)?, number(row, 1)?));
        let mut select = self.sql.prepare("SELECT number, recv FROM conversations WHERE recv > 0")?;
        let cursors = select.query_map([], pair)?.collect::<Result<_, _>>()?;
        let mut select = self.sql.prepare("SELECT number, read FROM conversations WHERE read_dirty = 1")?;
        let marks = select.query_map([], pair)?.collect::<Result<_, _>>()?;
        Ok(Restore { cursors, marks })
    }

    /// The user has read up to `seq`; `false`: had before.
    pub(crate) fn mark_read(&self, conversation: ConversationId, seq: Seq) -> Result<bool, Error> {
        self.know(conversation)?;
        let mut update = self.sql.prepare_cached(
            "UPDATE conversations SET read = ?2, read_dirty = 1 WHERE number = ?1 AND read < ?2",
        )?;
        Ok(update.execute(params![int(conversation), int(seq)])? > 0)
    }

    /// The gateway has the read mark `seq`.
    pub(crate) fn read_known(&self, conversation: ConversationId, seq: Seq) -> Result<(), Error> {
        let mut update = self.sql.prepare_cached(
            "UPDATE conversations SET read_dirty = CASE WHEN read <= ?2 THEN 0 ELSE read_dirty END,
                 read = max(read, ?2) WHERE number = ?1",
        )?;
        update.execute(params![int(conversation), int(seq)])?;
        Ok(())
    }

    /// How far conversations have come; the new ones among them.
    pub(crate) fn heads(&self, heads: &[Head]) -> Result<Vec<ConversationId>, Error> {
        let mut fresh = Vec::new();
        for head in heads {
            if self.know(head.conversation)? {
                fresh.push(head.conversation);
            }
            self.sql
                .prepare_cached(
                    "UPDATE conversations SET head = max(head, ?2), low = max(low, ?3) WHERE number = ?1",
                )?
                .execute(params![int(head.conversation), int(head.head), int(head.low)])?;
        }
        Ok(fresh)
    }

    /// Receipts of members; those of the own user confirm its read marks. What is known with them: a gateway that was killed may
    /// have forgotten what it told before, but a receipt never goes back.
    pub(crate) fn receipts(&self, receipts: &[Receipt], own: Option<UserId>) -> Result<Vec<Receipt>, Error> {
        let mut known = Vec::with_capacity(receipts.len());
        for receipt in receipts {
            let mut upsert = self.sql.prepare_cached(
                "INSERT INTO receipts VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE
                     SET recv = max(recv, excluded.recv), read = max(read, excluded.read)
                     RETURNING recv, read",
            )?;
            let merged = upsert.query_row(
                params![int(receipt.conversation), int(receipt.user), int(receipt.recv), int(receipt.read)],
                |row| Ok(Receipt { recv: number(row, 0)?, read: number(row, 1)?, ..*receipt }),
            )?;
            known.push(merged);
            if own == Some(receipt.user) {
                self.read_known(receipt.conversation, receipt.read)?;
            }
        }
        Ok(known)
    }

    /// What is known of the receipts of a conversation.
    pub(crate) fn receipts_of(&self, conversation: ConversationId) -> Result<Vec<Receipt>, Error> {
        let mut select = self
            .sql
            .prepare_cached("SELECT user, recv, read FROM receipts WHERE conversation = ?1 LIMIT 1000")?;
        let rows = select.query_map([int(conversation)], |row| {
            Ok(Receipt { conversation, user: number(row, 0)?, recv: number(row, 1)?, read: number(row, 2)? })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Takes in what the gateway says of a conversation.
    pub(crate) fn list_entry(&self, entry: &ConversationEntry) -> Result<(), Error> {
        self.know(entry.conversation)?;
        let kind = kind_of(entry.class);
        let name = (!entry.name.is_empty()).then_some(&entry.name);
        self.sql
            .prepare_cached(
                "UPDATE conversations SET name = NULL WHERE kind = ?1 AND name = ?2 AND number <> ?3",
            )?
            .execute(params![kind, name, int(entry.conversation)])?;
        self.sql
            .prepare_cached(
                "UPDATE conversations SET kind = ?2, name = coalesce(?3, name), peer = ?4, head = max(head, ?5),
                     low = max(low, ?6), time = max(time, ?7) WHERE number = ?1",
            )?
            .execute(params![
                int(entry.conversation),
                kind,
                name,
                int(entry.peer),
                int(entry.head),
                int(entry.low),
                int(entry.time),
            ])?;
        self.read_known(entry.conversation, entry.read)?;
        if entry.class == ConversationClass::Direct && entry.peer.get() != 0 && !entry.name.is_empty() {
            self.name_user(entry.peer, &entry.name)?;
        }
        Ok(())
    }

    /// All conversations, the one with the newest record first.
    pub(crate) fn conversations(&self) -> Result<Vec<ConversationSummary>, Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT number, kind, name, peer, head, low, recv, read, time FROM conversations
                 ORDER BY time DESC, number",
        )?;
        let rows = select.query_map([], |row| {
            let peer: UserId = number(row, 3)?;
            Ok(ConversationSummary {
                conversation: number(row, 0)?,
                class: class_of(row.get(1)?),
                name: row.get::<_, Option<String>>(2)?.unwrap_or_default(),
                peer: (peer.get() != 0).then_some(peer),
                head: number(row, 4)?,
                low: number(row, 5)?,
                recv: number(row, 6)?,
                read: number(row, 7)?,
                unread: 0,
                time: number(row, 8)?,
            })
        })?;
        let mut conversations = rows.collect::<Result<Vec<_>, _>>()?;
        for conversation in &mut conversations {
            conversation.unread = self.unread(conversation.conversation, conversation.read)?;
        }
        Ok(conversations)
    }

    /// Messages of others after `read`: complete messages that count, up to [`UNREAD_MAX`].
    fn unread(&self, conversation: ConversationId, read: Seq) -> Result<u32, Error> {
        // flags: no piece before the last (1), not silent (2), not own (4); kind 0 is a message.
        let mut select = self.sql.prepare_cached(
            "SELECT count(*) FROM (SELECT 1 FROM messages
                 WHERE conversation = ?1 AND seq > ?2 AND flags & 7 = 0 AND kind = 0 LIMIT ?3)",
        )?;
        Ok(select.query_row(params![int(conversation), int(read), UNREAD_MAX], |row| row.get(0))?)
    }

    /// The name of a user.
    pub(crate) fn user_name(&self, user: UserId) -> Result<Option<String>, Error> {
        let mut select = self.sql.prepare_cached("SELECT name FROM users WHERE number = ?1")?;
        Ok(select.query_row([int(user)], |row| row.get(0)).optional()?)
    }

    /// Remembers the name of a user.
    pub(crate) fn name_user(&self, user: UserId, name: &str) -> Result<(), Error> {
        let mut insert = self.sql.prepare_cached("INSERT OR REPLACE INTO users VALUES (?1, ?2)")?;
        insert.execute(params![int(user), name])?;
        Ok(())
    }

    /// What a conversation is called.
    pub(crate) fn conversation_name(&self, conversation: ConversationId) -> Result<Option<String>, Error> {
        let mut select = self.sql.prepare_cached(
            "SELECT name FROM conversations WHERE number = ?1 AND name IS NOT NULL AND kind > 0",
        )?;
        Ok(select.query_row([int(conversation)], |row| row.get(0)).optional()?)
    }
}

/// What a number of the database says; what it does not know yet counts as a group.
const fn class_of(kind: i64) -> ConversationClass {
    match kind {
        DIRECT => ConversationClass::Direct,
        BROADCAST => ConversationClass::Broadcast,
        _ => ConversationClass::Group,
    }
}

impl Store {
    /// The data folder the gateway works on. A database belongs to one for good: in another one the same numbers are other
    /// conversations, its cursors skip what it should receive, and its sends go to strangers.
    ///
    /// # Errors
    /// [`Error::DatabaseForeign`] when it belongs to another folder already.
    pub(crate) fn belongs_to(&self, folder: &FolderId) -> Result<(), Error> {
        match self.folder()? {
            Some(known) if known == *folder => Ok(()),
            Some(_) => {
                let why = "it belongs to another gateway, or the gateway lost its data folder and began anew";
                Err(Error::DatabaseForeign(why.to_owned()))
            }
            None => {
                self.sql.execute("UPDATE device SET folder = ?1", [&folder.0[..]])?;
                Ok(())
            }
        }
    }

    /// The folder this database belongs to; `None` until a gateway named its own.
    pub(crate) fn folder(&self) -> Result<Option<FolderId>, Error> {
        let folder: Option<Vec<u8>> =
            self.sql.query_row("SELECT folder FROM device", [], |row| row.get(0))?;
        let damaged = |_| Error::DatabaseForeign("the name of its gateway is damaged".to_owned());
        folder.map(|folder| folder.try_into().map(FolderId).map_err(damaged)).transpose()
    }

    /// What is known of networks, as it was kept.
    pub(crate) fn networks(&self) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.sql.query_row("SELECT networks FROM device", [], |row| row.get(0))?)
    }

    /// Keeps what is known of networks.
    pub(crate) fn keep_networks(&self, blob: &[u8]) -> Result<(), Error> {
        self.sql.prepare_cached("UPDATE device SET networks = ?1")?.execute([blob])?;
        Ok(())
    }
}

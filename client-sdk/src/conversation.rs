//! A conversation in the hands of the app.
//!
//! It may be used before its number is known: sends wait in the outbox under its name until the gateway resolved it.

use std::{sync::Arc, sync::OnceLock, time::Duration};

use bytes::Bytes;
use fulmar_protocol::{
    frame::{Event, EventKind, OpenTarget, Receipt},
    id::{ConversationId, Seq, UserId},
    limit::{BODY_BYTES_MAX, EVENT_PAYLOAD_BYTES_MAX, SEND_PAYLOAD_BYTES_MAX},
    service::{ChangeMembers, ListMembers, MemberEntry, MemberPage, MembersChanged, Method, PAGE_MAX},
};

use crate::{
    client::{Client, REQUEST_TIMEOUT},
    db::Draft,
    driver::Request,
    error::Error,
    event::{Received, RecordKind},
    send::{Progress, SendHandle, SendOptions},
};

/// How long a typing notice is of use.
const TYPING_TTL: Duration = Duration::from_secs(5);

/// Members [`Conversation::members`] lists at the most.
const MEMBERS_MAX: usize = 1_000;

/// A conversation: direct, group or broadcast; cheap to clone.
#[derive(Clone, Debug)]
pub struct Conversation {
    client: Client,
    target: OpenTarget,
    number: Arc<OnceLock<ConversationId>>,
}

impl Conversation {
    pub(crate) fn new(client: Client, target: OpenTarget, number: Option<ConversationId>) -> Self {
        let cell = OnceLock::new();
        if let Some(number) = number {
            let _ = cell.set(number);
        }
        Self { client, target, number: Arc::new(cell) }
    }

    /// Its number, when it is known.
    #[must_use]
    pub fn number(&self) -> Option<ConversationId> {
        self.number.get().copied()
    }

    /// Its number; asks the gateway when it is not known yet.
    ///
    /// # Errors
    /// [`Error::Refused`] when there is no such conversation or user, [`Error::TimedOut`] when there is no connection.
    pub async fn resolved(&self) -> Result<ConversationId, Error> {
        if let Some(number) = self.number() {
            return Ok(number);
        }
        let target = self.target.clone();
        let known = self.client.shared.db.run(false, move |store| store.lookup(&target)).await?;
        let number = match known {
            Some(number) => number,
            None => self.open(false).await?,
        };
        Ok(*self.number.get_or_init(|| number))
    }

    /// Tells the gateway that the conversation is on screen, so that its messages come first.
    ///
    /// # Errors
    /// See [`Self::resolved`].
    pub async fn on_screen(&self) -> Result<(), Error> {
        let number = self.open(true).await?;
        self.number.get_or_init(|| number);
        Ok(())
    }

    async fn open(&self, on_screen: bool) -> Result<ConversationId, Error> {
        let target = self.target.clone();
        let opened = self
            .client
            .request(REQUEST_TIMEOUT, |reply, _| Request::Open { target, on_screen, reply })
            .await?;
        Ok(opened.conversation)
    }

    /// The group's or broadcast's name, or the other user's name; empty when this client does not know it yet.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn name(&self) -> Result<String, Error> {
        match (&self.target, self.number()) {
            (OpenTarget::Direct(name) | OpenTarget::Group(name) | OpenTarget::Broadcast(name), _) => {
                Ok(name.clone())
            }
            (OpenTarget::Number(number), _) => {
                let number = *number;
                let known =
                    self.client.shared.db.run(false, move |store| store.conversation_name(number)).await?;
                Ok(known.unwrap_or_default())
            }
        }
    }

    /// Queues a message. When this returns, it is on disk and will be sent, in order, exactly once, whatever happens to
    /// the connection or to the app.
    ///
    /// # Errors
    /// [`Error::BodyTooLarge`], or when the database fails; then nothing is queued.
    pub async fn send(&self, payload: impl Into<Bytes>) -> Result<SendHandle, Error> {
        self.send_with(payload, SendOptions::default()).await
    }

    /// Queues a message, an edit, a recall or a reaction.
    ///
    /// # Errors
    /// See [`Self::send`]; [`Error::BadRequest`] when kind and reference do not fit.
    pub async fn send_with(
        &self,
        payload: impl Into<Bytes>,
        options: SendOptions,
    ) -> Result<SendHandle, Error> {
        let payload = payload.into();
        if payload.len() > BODY_BYTES_MAX {
            return Err(Error::BodyTooLarge { bytes: payload.len() });
        }
        if !options.kind.sendable() {
            return Err(Error::BadRequest("records of this kind are made by the gateway"));
        }
        if options.kind.refers() && options.reference.is_none() {
            return Err(Error::BadRequest("an edit, recall or reaction needs the record it refers to"));
        }
        let ttl = options.ttl.map(|ttl| {
            let seconds = ttl.as_secs().saturating_add(u64::from(ttl.subsec_nanos() > 0));
            u32::try_from(seconds).unwrap_or(u32::MAX)
        });
        let draft = Draft {
            target: self.number().map_or_else(|| self.target.clone(), OpenTarget::Number),
            kind: options.kind,
            reference: options.reference,
            ttl,
            silent: options.silent,
            payload,
            piece: SEND_PAYLOAD_BYTES_MAX,
            created: self.client.shared.platform.unix_millis(),
        };
        let shared = Arc::clone(&self.client.shared);
        if *shared.closed.borrow() {
            return Err(Error::Closed);
        }
        let (subscribing, committed) = (Arc::clone(&shared), Arc::clone(&shared));
        let (queued, progress) = shared
            .db
            .run_then(
                true,
                move |store| {
                    let queued = store.enqueue(&draft)?;
                    // Before anybody can settle it.
                    let progress = subscribing.subscribe(queued.id, Progress::QUEUED);
                    Ok((queued, progress))
                },
                // In the order of the commits, and also if the caller has gone meanwhile.
                move |(queued, _)| committed.queued(queued.conversation, queued.send.take()),
            )
            .await?;
        if let Some(number) = queued.conversation {
            self.number.get_or_init(|| number);
        }
        Ok(SendHandle::new(queued.id, progress, shared))
    }

    /// Messages before `before` (or the newest), oldest first, at most `limit` and at most 1 MiB of them; from this
    /// client's database, so it works offline.
    ///
    /// # Errors
    /// When the number is not known yet and can't be asked for, or the database fails.
    pub async fn history(&self, before: Option<Seq>, limit: usize) -> Result<Vec<Received>, Error> {
        let number = self.resolved().await?;
        self.client.shared.db.run(false, move |store| store.history(number, before, limit.min(1_000))).await
    }

    /// The user has read up to `seq`. Larger marks win, on all devices; works offline.
    ///
    /// # Errors
    /// When the number is not known yet and can't be asked for, or the database fails.
    pub async fn mark_read(&self, seq: Seq) -> Result<(), Error> {
        let number = self.resolved().await?;
        let shared = &self.client.shared;
        if shared.db.run(true, move |store| store.mark_read(number, seq)).await? {
            shared.marked(number, seq);
        }
        Ok(())
    }

    /// Tells the others that the user is typing. Not stored, not repeated; lost when there is no connection.
    ///
    /// # Errors
    /// When the number is not known yet and can't be asked for.
    pub async fn typing(&self) -> Result<(), Error> {
        self.ephemeral(EventKind::Typing, TYPING_TTL, Bytes::new()).await
    }

    /// Sends something that need not be stored, at most [`EVENT_PAYLOAD_BYTES_MAX`] bytes; lost when there is no
    /// connection. The newest of a kind wins.
    ///
    /// # Errors
    /// [`Error::BodyTooLarge`], or when the number is not known yet and can't be asked for.
    pub async fn ephemeral(&self, kind: EventKind, ttl: Duration, payload: Bytes) -> Result<(), Error> {
        if payload.len() > EVENT_PAYLOAD_BYTES_MAX {
            return Err(Error::BodyTooLarge { bytes: payload.len() });
        }
        let event = Event {
            conversation: self.resolved().await?,
            kind,
            sender: UserId::default(),
            number: self.client.shared.platform.unix_millis(),
            ttl_ms: u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX),
            payload,
        };
        // Full means that the connection can't take it now; the next one will be newer.
        let _ = self.client.requests.try_send(Request::Event(event));
        Ok(())
    }

    /// The members, at most 1 000 of them; larger groups are listed with [`Self::members_after`].
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::TimedOut`].
    pub async fn members(&self) -> Result<Vec<MemberEntry>, Error> {
        let mut members: Vec<MemberEntry> = Vec::new();
        loop {
            let after = members.last().map(|last| last.user).unwrap_or_default();
            let page = self.members_after(after).await?;
            let more = page.more && !page.members.is_empty();
            members.extend(page.members);
            if !more || members.len() >= MEMBERS_MAX {
                return Ok(members);
            }
        }
    }

    /// One page of members, those after `after` (0 for the first page).
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::TimedOut`].
    pub async fn members_after(&self, after: UserId) -> Result<MemberPage, Error> {
        let conversation = self.resolved().await?;
        self.client.builtin(Method::ListMembers, &ListMembers { conversation, after }).await
    }

    /// Adds members by name to a group; those that are in it already change nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::TimedOut`].
    pub async fn add(&self, members: &[&str]) -> Result<MembersChanged, Error> {
        self.change(Method::AddMembers, members).await
    }

    /// Removes members by name from a group; removing oneself is leaving.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::TimedOut`].
    pub async fn remove(&self, members: &[&str]) -> Result<MembersChanged, Error> {
        self.change(Method::RemoveMembers, members).await
    }

    async fn change(&self, method: Method, members: &[&str]) -> Result<MembersChanged, Error> {
        let conversation = self.resolved().await?;
        let mut total = MembersChanged { changed: 0, seq: Seq::ZERO };
        for names in members.chunks(PAGE_MAX / 2) {
            let members = names.iter().map(|name| (*name).to_owned()).collect();
            let changed: MembersChanged =
                self.client.builtin(method, &ChangeMembers { conversation, members }).await?;
            total.changed = total.changed.saturating_add(changed.changed);
            total.seq = total.seq.max(changed.seq);
        }
        Ok(total)
    }

    /// How far the members have received and read, as far as this client knows.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn receipts(&self) -> Result<Vec<Receipt>, Error> {
        let number = self.resolved().await?;
        self.client.shared.db.run(false, move |store| store.receipts_of(number)).await
    }

    /// Takes a message of one's own back, for everybody: a [`RecordKind::Recall`] of it.
    ///
    /// # Errors
    /// See [`Self::send`].
    pub async fn recall(&self, seq: Seq) -> Result<SendHandle, Error> {
        let options =
            SendOptions { kind: RecordKind::Recall, reference: Some(seq), ..SendOptions::default() };
        self.send_with(Bytes::new(), options).await
    }
}

//! What the session half said and the database has to know: gathered, committed together, one commit at a time.
//!
//! Not here: the tables (`db`), what follows from a commit (`driver`).

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use fulmar_protocol::{
    close::RefusalCode,
    frame::{Head, OpenTarget, Opened, Receipt},
    id::{ConversationId, DeviceId, FolderId, Pseq, Seq, UnixMillis, UserId},
};
use tokio::sync::oneshot;

use crate::{
    client::Shared,
    db::{Delivered, Marker, Own, Store},
    error::Error,
    options::BoxFuture,
    platform::Platform,
};

/// Changes and bytes that may wait for the commit before records are not read any more.
const CHANGES_MAX: usize = 512;
const BYTES_MAX: usize = 1024 * 1024;

/// Who waits for the answer to an OPEN.
pub(super) type OpenReplies = Vec<oneshot::Sender<Result<Opened, Error>>>;

/// One thing the database has to know.
#[derive(Debug)]
pub(super) enum Change {
    Marker(Marker),
    Acked(ConversationId, Pseq, Seq),
    Refused(ConversationId, Pseq, RefusalCode),
    Resolved(OpenTarget, Opened, OpenReplies),
    Unresolvable(OpenTarget, RefusalCode),
    Heads(Vec<Head>),
    Receipts(Vec<Receipt>),
    Names(Vec<(UserId, String)>),
    Welcomed {
        user: UserId,
        device: DeviceId,
        ticket: Vec<u8>,
        server: String,
        server_time: UnixMillis,
        /// The gateway's data folder.
        folder: Option<FolderId>,
        /// When, by the platform's monotonic clock.
        at: Duration,
    },
}

/// Answers that wait for the commit.
#[derive(Debug, Default)]
pub(super) struct Replies(Vec<(Opened, OpenReplies)>);

impl Replies {
    pub(super) fn send(self) {
        for (opened, replies) in self.0 {
            for reply in replies {
                // Who asked may have stopped waiting.
                let _ = reply.send(Ok(opened.clone()));
            }
        }
    }
}

/// What was committed.
#[derive(Debug, Default)]
pub(super) struct Committed {
    pub(super) delivered: Delivered,
    pub(super) arrival: u64,
    pub(super) receipts: Vec<Receipt>,
    pub(super) names: Vec<(UserId, String)>,
    /// Conversations whose sends have got their numbers.
    pub(super) resolved: Vec<ConversationId>,
    pub(super) replies: Replies,
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Ledger {
    pending: Vec<Change>,
    bytes: usize,
    committing: Option<BoxFuture<Result<Committed, Error>>>,
    /// Conversations known to have more than is committed here, and their heads.
    behind: HashMap<ConversationId, Seq>,
    /// The gateway's clock at some moment of the platform's.
    clock: Option<(UnixMillis, Duration)>,
}

impl Ledger {
    pub(super) fn push(&mut self, change: Change) {
        if let Change::Marker(Marker::Record(record)) = &change {
            self.bytes += record.payload.len();
        }
        if let Change::Welcomed { server_time, at, .. } = &change {
            self.clock = Some((*server_time, *at));
        }
        self.pending.push(change);
    }

    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < CHANGES_MAX && self.bytes < BYTES_MAX
    }

    /// Nothing waits and nothing is being committed.
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.committing.is_none()
    }

    /// A conversation has records up to `head`.
    pub(super) fn behind(&mut self, conversation: ConversationId, head: Seq) {
        self.behind.insert(conversation, head);
    }

    /// A conversation is committed up to `seq`.
    pub(super) fn reached(&mut self, conversation: ConversationId, seq: Seq) {
        if self.behind.get(&conversation).is_some_and(|head| *head <= seq) {
            self.behind.remove(&conversation);
        }
    }

    /// Everything that is known to exist is committed.
    pub(super) fn is_caught_up(&self) -> bool {
        self.is_empty() && self.behind.is_empty()
    }

    /// Begins the next commit, unless one is under way or it is not known yet whose records these are.
    pub(super) fn start(&mut self, shared: &Arc<Shared>, own: Own) {
        if self.committing.is_some() || self.pending.is_empty() || own.user == UserId::default() {
            return;
        }
        let changes = std::mem::take(&mut self.pending);
        self.bytes = 0;
        // What is acknowledged afterwards has to be on the disk; the rest would come again.
        let durable = changes.iter().any(|change| matches!(change, Change::Marker(_) | Change::Resolved(..)));
        let now = self.server_time(&*shared.platform);
        let shared = Arc::clone(shared);
        self.committing = Some(Box::pin(async move {
            shared.db.run(durable, move |store| apply(store, changes, now, own)).await
        }));
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Committed, Error>> {
        let Some(committing) = &mut self.committing else { return Poll::Pending };
        let committed = std::task::ready!(committing.as_mut().poll(cx));
        self.committing = None;
        Poll::Ready(committed)
    }

    fn server_time(&self, platform: &dyn Platform) -> UnixMillis {
        let now = match self.clock {
            Some((time, at)) => {
                let since = platform.monotonic().saturating_sub(at);
                time.get().saturating_add(u64::try_from(since.as_millis()).unwrap_or(0))
            }
            None => platform.unix_millis(),
        };
        UnixMillis::new(now).unwrap_or_default()
    }
}

fn apply(store: &mut Store, changes: Vec<Change>, now: UnixMillis, own: Own) -> Result<Committed, Error> {
    let mut committed = Committed::default();
    for change in changes {
        match change {
            Change::Marker(marker) => store.deliver(&marker, now, own, &mut committed.delivered)?,
            Change::Acked(conversation, pseq, seq) => {
                committed.delivered.settled.extend(store.acked(conversation, pseq, seq)?);
            }
            Change::Refused(conversation, pseq, code) => {
                committed.delivered.settled.extend(store.refused(conversation, pseq, code)?);
            }
            Change::Resolved(target, opened, replies) => {
                store.resolved(&target, &opened)?;
                committed.resolved.push(opened.conversation);
                committed.replies.0.push((opened, replies));
            }
            Change::Unresolvable(target, code) => {
                committed.delivered.settled.extend(store.unresolvable(&target, code)?);
            }
            Change::Heads(heads) => committed.delivered.fresh.extend(store.heads(&heads)?),
            Change::Receipts(receipts) => {
                committed.receipts.extend(store.receipts(&receipts, Some(own.user))?);
            }
            Change::Names(names) => {
                for (user, name) in &names {
                    store.name_user(*user, name)?;
                }
                committed.names.extend(names);
            }
            Change::Welcomed { user, device, ticket, server, folder, .. } => {
                if let Some(folder) = folder {
                    store.belongs_to(&folder)?;
                }
                store.welcomed(user, device, &ticket, &server)?;
            }
        }
    }
    committed.arrival = store.last_arrival()?;
    Ok(committed)
}

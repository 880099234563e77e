//! The handle of a send: how far one message has come.
//!
//! - A handle is made after the message's row is on disk; it resolves once: Acked, Refused or Expired.
//! - Delivered and Read follow from receipts, in conversations small enough to have them.
//! - A send whose end the app was not told is listed by [`crate::Client::outbox`] again, also after a restart.
//!
//! Not here: the rows (`db::outbox`), who moves them (`driver`).

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fulmar_protocol::{
    close::RefusalCode,
    id::{ConversationId, Seq, UnixMillis},
};
use tokio::sync::watch;

use crate::{
    client::Shared,
    db::{Outcome, Settled},
    error::{Error, SendError},
    event::RecordKind,
};

/// Acked sends whose receipts are followed while their handles live; beyond, the oldest stay at Acked.
const FOLLOWED_MAX: usize = 1024;

/// How far a message has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendStatus {
    /// On disk here; it will leave when there is a connection.
    Queued,
    /// It left over a connection; nothing is promised by that.
    Sent,
    /// On disk at the gateway, at this position of the conversation.
    Acked(Seq),
    /// Another member's device has it.
    Delivered,
    /// Another member has read it.
    Read,
    /// It will never be stored, and why.
    Refused(RefusalCode),
    /// Its time to live ended, or it was cancelled, before it was stored.
    Expired,
}

impl SendStatus {
    const fn rank(self) -> u8 {
        match self {
            Self::Queued => 0,
            Self::Sent => 1,
            Self::Acked(_) => 2,
            Self::Delivered => 3,
            Self::Read => 4,
            Self::Refused(_) | Self::Expired => 5,
        }
    }

    /// Whether it is decided if the message is stored.
    #[must_use]
    pub const fn is_settled(self) -> bool {
        self.rank() >= 2
    }

    /// Whether nothing can follow.
    #[must_use]
    pub const fn is_final(self) -> bool {
        self.rank() >= 4
    }
}

/// Wishes for one message beyond its content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendOptions {
    /// After this long the message is of no use: it is not stored any more (whole seconds, rounded up). The clock starts
    /// at `send`; messages of more than one piece (16 KiB) are not held to it once they are queued.
    pub ttl: Option<Duration>,
    /// The record an edit, recall, reaction or reply refers to.
    pub reference: Option<Seq>,
    /// What it is; only kinds a member may send.
    pub kind: RecordKind,
    /// Do not count it as unread.
    pub silent: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    status: SendStatus,
    seq: Option<Seq>,
}

impl Progress {
    pub(crate) const QUEUED: Self = Self { status: SendStatus::Queued, seq: None };

    pub(crate) const fn of(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Acked(seq) => Self { status: SendStatus::Acked(seq), seq: Some(seq) },
            Outcome::Refused(code) => Self { status: SendStatus::Refused(code), seq: None },
            Outcome::Expired => Self { status: SendStatus::Expired, seq: None },
        }
    }
}

/// Follows one message. Dropping it changes nothing for the message.
#[derive(Debug)]
pub struct SendHandle {
    id: u64,
    progress: watch::Receiver<Progress>,
    told: AtomicBool,
    shared: Arc<Shared>,
}

impl SendHandle {
    pub(crate) fn new(id: u64, progress: watch::Receiver<Progress>, shared: Arc<Shared>) -> Self {
        Self { id, progress, told: AtomicBool::new(false), shared }
    }

    /// The send's name in this database, the same after a restart.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// How far it is now.
    #[must_use]
    pub fn status(&self) -> SendStatus {
        self.progress.borrow().status
    }

    /// Its row is on disk: true since the handle exists, so this returns at once.
    pub async fn queued(&self) {}

    /// Waits until it left over a connection for the first time.
    ///
    /// # Errors
    /// [`SendError`], when it will never be stored.
    pub async fn sent(&self) -> Result<(), SendError> {
        self.reach(1).await.map(|_| ())
    }

    /// Waits until it is on disk at the gateway, and says where in the conversation.
    ///
    /// With the answer the app counts as told: a client that is made later on this database does not tell of this send again. An app
    /// that must not miss it if it is killed before it wrote the answer down follows [`Self::watch`] instead, and drops
    /// the handle when it has.
    ///
    /// # Errors
    /// [`SendError`], when it will never be stored.
    pub async fn acked(&self) -> Result<Seq, SendError> {
        let progress = self.reach(2).await?;
        self.tell();
        Ok(progress.seq.unwrap_or(Seq::ZERO))
    }

    /// Waits until another member's device has it. Never ends in conversations without receipts. Known at once where the
    /// conversation is on screen ([`crate::Conversation::on_screen`]), else within seconds.
    ///
    /// # Errors
    /// [`SendError`], when it will never be stored.
    pub async fn delivered(&self) -> Result<(), SendError> {
        self.reach(3).await.map(|_| ())
    }

    /// Waits until another member has read it. Never ends in conversations without receipts.
    ///
    /// # Errors
    /// [`SendError`], when it will never be stored.
    pub async fn read(&self) -> Result<(), SendError> {
        self.reach(4).await.map(|_| ())
    }

    /// Follows it step by step; the first answer is where it stands now.
    #[must_use]
    pub fn watch(&self) -> SendWatch {
        let mut progress = self.progress.clone();
        progress.mark_changed();
        SendWatch { progress }
    }

    /// Takes it back if it is not stored yet: it then ends as [`SendStatus::Expired`], else as usual.
    ///
    /// A body of more than one piece (16 KiB) is not taken back once its conversation's number is known, nor does its
    /// `ttl` end it then: its first pieces may be stored, and readers wait for the rest.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn cancel(&self) -> Result<(), Error> {
        let id = self.id;
        let cancelled = self.shared.db.run(true, move |store| store.cancel(id)).await?;
        if let Some(settled) = cancelled.settled {
            self.shared.settle(&[settled]);
        }
        self.shared.cancelled(&cancelled.numbered);
        Ok(())
    }

    async fn reach(&self, rank: u8) -> Result<Progress, SendError> {
        let mut progress = self.progress.clone();
        let reached = progress.wait_for(|progress| progress.status.rank() >= rank).await;
        let progress = *reached.map_err(|_| SendError::Closed)?;
        match progress.status {
            SendStatus::Refused(code) => {
                self.tell();
                Err(SendError::Refused(code))
            }
            SendStatus::Expired => {
                self.tell();
                Err(SendError::Expired)
            }
            _ => Ok(progress),
        }
    }

    fn tell(&self) {
        if !self.told.swap(true, Ordering::Relaxed) {
            self.shared.told(self.id);
        }
    }
}

impl Drop for SendHandle {
    fn drop(&mut self) {
        if self.status().is_settled() {
            self.tell();
        }
    }
}

/// The steps of one message.
#[derive(Debug)]
pub struct SendWatch {
    progress: watch::Receiver<Progress>,
}

impl SendWatch {
    /// The next step; steps that follow closely may be skipped. `None` after the last one.
    pub async fn next(&mut self) -> Option<SendStatus> {
        self.progress.changed().await.ok()?;
        Some(self.progress.borrow_and_update().status)
    }
}

/// A send of this or an earlier run whose end the app was not told yet.
#[derive(Debug)]
pub struct OutboxEntry {
    /// Follows it on.
    pub handle: SendHandle,
    /// Where it goes.
    pub conversation: crate::Conversation,
    /// What it is.
    pub kind: RecordKind,
    /// Its content; empty once it is settled.
    pub payload: bytes::Bytes,
    /// When it was queued, by this device's clock.
    pub created: UnixMillis,
}

/// The live handles of one client.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    open: HashMap<u64, watch::Sender<Progress>>,
    sweep_at: usize,
    followed: HashMap<ConversationId, BTreeMap<Seq, watch::Sender<Progress>>>,
    followed_count: usize,
}

impl Handles {
    /// A receiver for the send `id`.
    pub(crate) fn subscribe(&mut self, id: u64, now: Progress) -> watch::Receiver<Progress> {
        if now.status.is_settled() {
            return watch::Sender::new(now).subscribe();
        }
        // Handles that were dropped; looked for ever more rarely when most are alive.
        if self.open.len() >= self.sweep_at {
            self.open.retain(|_, handle| handle.receiver_count() > 0);
            self.sweep_at = FOLLOWED_MAX.max(2 * self.open.len());
        }
        self.open.entry(id).or_insert_with(|| watch::Sender::new(now)).subscribe()
    }

    /// It left.
    pub(crate) fn sent(&self, id: u64) {
        if let Some(handle) = self.open.get(&id) {
            handle.send_if_modified(|progress| {
                let first = progress.status == SendStatus::Queued;
                if first {
                    progress.status = SendStatus::Sent;
                }
                first
            });
        }
    }

    /// It ended; `false`: nobody looks at it any more.
    pub(crate) fn settled(&mut self, settled: &Settled) -> bool {
        let Some(handle) = self.open.remove(&settled.id) else { return false };
        let looked_at = handle.receiver_count() > 0;
        handle.send_replace(Progress::of(settled.outcome));
        if let (Outcome::Acked(seq), Some(conversation), true) =
            (settled.outcome, settled.conversation, looked_at)
        {
            self.follow(conversation, seq, handle);
        }
        looked_at
    }

    fn follow(&mut self, conversation: ConversationId, seq: Seq, handle: watch::Sender<Progress>) {
        if self.followed_count >= FOLLOWED_MAX {
            for followed in self.followed.values_mut() {
                followed.retain(|_, handle| handle.receiver_count() > 0);
            }
            self.followed.retain(|_, followed| !followed.is_empty());
            self.followed_count = self.followed.values().map(BTreeMap::len).sum();
        }
        if self.followed_count < FOLLOWED_MAX
            && self.followed.entry(conversation).or_default().insert(seq, handle).is_none()
        {
            self.followed_count += 1;
        }
    }

    /// Another member has come this far.
    pub(crate) fn receipt(&mut self, conversation: ConversationId, recv: Seq, read: Seq) {
        let Some(followed) = self.followed.get_mut(&conversation) else { return };
        let before = followed.len();
        followed.retain(|seq, handle| {
            let status = if *seq <= read {
                SendStatus::Read
            } else if *seq <= recv {
                SendStatus::Delivered
            } else {
                return true;
            };
            handle.send_if_modified(|progress| {
                let further = progress.status.rank() < status.rank();
                if further {
                    progress.status = status;
                }
                further
            });
            !status.is_final() && handle.receiver_count() > 0
        });
        self.followed_count -= before - followed.len();
        if followed.is_empty() {
            self.followed.remove(&conversation);
        }
    }

    /// The client is closed: nothing is said any more.
    pub(crate) fn close(&mut self) {
        self.open.clear();
        self.followed.clear();
        self.followed_count = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: ConversationId = ConversationId::new(7).unwrap();

    fn s(number: u64) -> Seq {
        Seq::new(number).unwrap()
    }

    fn settled(id: u64, outcome: Outcome) -> Settled {
        Settled { id, conversation: Some(C), outcome }
    }

    #[test]
    fn a_handle_goes_forward_only_and_resolves_once() {
        let mut handles = Handles::default();
        let progress = handles.subscribe(1, Progress::QUEUED);
        let status = || progress.borrow().status;
        handles.sent(1);
        assert_eq!(status(), SendStatus::Sent);
        assert!(handles.settled(&settled(1, Outcome::Acked(s(5)))));
        assert!(!handles.settled(&settled(1, Outcome::Expired)), "it is settled");
        handles.sent(1);
        assert_eq!(status(), SendStatus::Acked(s(5)));
        handles.receipt(C, s(4), s(4));
        assert_eq!(status(), SendStatus::Acked(s(5)), "not this far yet");
        handles.receipt(C, s(5), s(4));
        assert_eq!(status(), SendStatus::Delivered);
        handles.receipt(C, s(9), s(9));
        assert_eq!(status(), SendStatus::Read);
        handles.receipt(C, s(9), s(4));
        assert_eq!((status(), progress.borrow().seq), (SendStatus::Read, Some(s(5))));
        assert_eq!(handles.followed_count, 0);
    }

    #[test]
    fn what_nobody_looks_at_is_not_kept() {
        let mut handles = Handles::default();
        drop(handles.subscribe(1, Progress::QUEUED));
        assert!(!handles.settled(&settled(1, Outcome::Acked(s(1)))), "the app need not be told again");
        assert!(!handles.settled(&settled(2, Outcome::Expired)), "of an earlier run");
        for id in 0..10 * FOLLOWED_MAX as u64 {
            drop(handles.subscribe(id, Progress::QUEUED));
        }
        assert!(handles.open.len() <= 2 * FOLLOWED_MAX, "{}", handles.open.len());
        let alive: Vec<_> = (0..3 * FOLLOWED_MAX as u64)
            .map(|id| {
                let progress = handles.subscribe(id, Progress::QUEUED);
                handles.settled(&settled(id, Outcome::Acked(s(id + 1))));
                progress
            })
            .collect();
        assert_eq!(handles.followed_count, FOLLOWED_MAX);
        assert!(alive.iter().all(|progress| matches!(progress.borrow().status, SendStatus::Acked(_))));
    }

    #[test]
    fn a_handle_of_what_is_settled_says_so_at_once() {
        let mut handles = Handles::default();
        let progress = handles.subscribe(1, Progress::of(Outcome::Refused(RefusalCode::NotAMember)));
        assert_eq!(progress.borrow().status, SendStatus::Refused(RefusalCode::NotAMember));
        assert!(handles.open.is_empty());
    }
}

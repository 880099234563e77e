//! From the outbox to the session half: a lane at a time, in order, as long as there is room.
//!
//! - `fed` is the last pseq of each lane the half was given; what is behind it is never read again.
//! - The half's bound is the bound here: the rest stays in the database.
//!
//! Not here: repeating sends (the half does), settling them (`ledger`).

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use fulmar_protocol::{
    frame::{OpenTarget, Send},
    id::{ConversationId, Pseq},
    session::client::Client as Half,
};

use crate::{
    client::Shared,
    db::{Settled, WaitingSend},
    error::Error,
    options::BoxFuture,
};

/// Lanes of one read, and sends of each.
const LANES_PER_READ: usize = 32;
const SENDS_PER_LANE: usize = 32;

/// How often names that are still not resolved are looked at again, for sends that expire meanwhile.
const NAMES_EVERY: Duration = Duration::from_secs(5);

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Fed {
    lanes: Vec<(ConversationId, Vec<WaitingSend>)>,
    pub(super) unresolved: Option<Vec<OpenTarget>>,
    pub(super) expired: Vec<Settled>,
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Feed {
    fed: HashMap<ConversationId, Pseq>,
    /// Unsettled sends of the half, and their handles.
    sends: HashMap<(ConversationId, Pseq), u64>,
    /// Wall-clock milliseconds at which sends end.
    ends: BTreeSet<(u64, ConversationId, Pseq)>,
    hungry: BTreeSet<ConversationId>,
    names: bool,
    names_at: Option<Duration>,
    unresolved: Vec<OpenTarget>,
    reading: Option<BoxFuture<Result<Fed, Error>>>,
}

impl Feed {
    /// `unacked` was given to the half already; `waiting` are the lanes that may have more.
    pub(super) fn new(unacked: &[WaitingSend], waiting: Vec<ConversationId>) -> Self {
        let mut feed = Self { hungry: waiting.into_iter().collect(), names: true, ..Self::default() };
        for waiting in unacked {
            feed.note(waiting);
        }
        feed
    }

    fn note(&mut self, waiting: &WaitingSend) {
        let send = &waiting.send;
        let key = (send.conversation, send.pseq);
        let fed = self.fed.entry(send.conversation).or_insert(send.pseq);
        *fed = (*fed).max(send.pseq);
        let ending = waiting.ends.filter(|_| !send.cancel);
        if let Some(ends) = ending {
            self.ends.insert((ends, send.conversation, send.pseq));
        }
        self.sends.insert(key, waiting.id);
    }

    /// A send was stored a moment ago. When it is not the next of its lane (more waits before it, or it is not known
    /// how far the lane was read), the lane is read.
    pub(super) fn handed(&mut self, waiting: WaitingSend, half: &mut Half, now: Duration) {
        let conversation = waiting.send.conversation;
        let next = self.fed.get(&conversation).is_some_and(|fed| fed.next() == Some(waiting.send.pseq));
        if next && !self.hungry.contains(&conversation) && half.send(waiting.send.clone(), now).is_ok() {
            self.note(&waiting);
        } else {
            self.hungry.insert(conversation);
        }
    }

    /// A lane has something new.
    pub(super) fn hungry(&mut self, conversation: ConversationId) {
        self.hungry.insert(conversation);
    }

    /// Sends wait for names.
    pub(super) fn look_for_names(&mut self) {
        self.names = true;
    }

    /// A name could not be resolved for now.
    pub(super) fn look_again(&mut self, now: Duration) {
        self.names_at = Some(now + NAMES_EVERY);
    }

    /// The names that sends are known to wait for.
    pub(super) fn unresolved(&self) -> Vec<OpenTarget> {
        self.unresolved.clone()
    }

    /// The handle of an unsettled send.
    pub(super) fn id(&self, conversation: ConversationId, pseq: Pseq) -> Option<u64> {
        self.sends.get(&(conversation, pseq)).copied()
    }

    /// The half has settled a send.
    pub(super) fn settled(&mut self, conversation: ConversationId, pseq: Pseq) {
        self.sends.remove(&(conversation, pseq));
    }

    /// Everything that waits has new numbers, and the half has forgotten the old ones.
    pub(super) fn renumbered(&mut self, waiting: Vec<ConversationId>) {
        *self = Self {
            hungry: waiting.into_iter().collect(),
            names: self.names,
            names_at: self.names_at,
            unresolved: std::mem::take(&mut self.unresolved),
            ..Self::default()
        };
    }

    /// Begins to read what is due, if there is room for it.
    pub(super) fn start(&mut self, shared: &Arc<Shared>, half: &Half) {
        let lanes = !self.hungry.is_empty() && half.has_room();
        if self.reading.is_some() || !(lanes || self.names) {
            return;
        }
        let mut wanted = Vec::new();
        while lanes && wanted.len() < LANES_PER_READ {
            let Some(conversation) = self.hungry.pop_first() else { break };
            wanted.push((conversation, self.fed.get(&conversation).copied().unwrap_or(Pseq::ZERO)));
        }
        let names = std::mem::take(&mut self.names);
        let shared = Arc::clone(shared);
        let now = shared.platform.unix_millis();
        self.reading = Some(Box::pin(async move {
            shared
                .db
                .run(false, move |store| {
                    let mut fed = Fed::default();
                    for (conversation, after) in wanted {
                        let sends = store.waiting(conversation, after, SENDS_PER_LANE, now)?;
                        fed.lanes.push((conversation, sends));
                    }
                    if names {
                        fed.expired = store.expire_nameless(now)?;
                        fed.unresolved = Some(store.unresolved()?);
                    }
                    Ok(fed)
                })
                .await
        }));
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Fed, Error>> {
        let Some(reading) = &mut self.reading else { return Poll::Pending };
        let fed = std::task::ready!(reading.as_mut().poll(cx));
        self.reading = None;
        Poll::Ready(fed)
    }

    /// Gives what was read to the half, as far as it has room.
    pub(super) fn fed(&mut self, fed: Fed, half: &mut Half, now: Duration) {
        for (conversation, sends) in fed.lanes {
            let full_page = sends.len() == SENDS_PER_LANE;
            let mut all = true;
            for waiting in sends {
                // Handed over meanwhile.
                if self.fed.get(&conversation).is_some_and(|fed| *fed >= waiting.send.pseq) {
                    continue;
                }
                if half.send(waiting.send.clone(), now).is_err() {
                    all = false;
                    break;
                }
                self.note(&waiting);
            }
            if full_page || !all {
                self.hungry.insert(conversation);
            }
        }
        if let Some(unresolved) = fed.unresolved {
            self.names_at = (!unresolved.is_empty()).then(|| now + NAMES_EVERY);
            self.unresolved = unresolved;
        }
    }

    /// A send is taken back; if the half has it, a tombstone takes its place.
    pub(super) fn cancel(
        &mut self,
        conversation: ConversationId,
        pseq: Pseq,
        half: &mut Half,
        now: Duration,
    ) {
        if self.sends.contains_key(&(conversation, pseq)) {
            let tombstone = Send {
                kind: fulmar_protocol::frame::RecordKind::Message,
                conversation,
                pseq,
                seen: fulmar_protocol::id::Seq::ZERO,
                reference: None,
                ttl: None,
                more: false,
                continues: false,
                silent: false,
                cancel: true,
                payload: Bytes::new(),
            };
            // Tombstones always have room.
            let _ = half.send(tombstone, now);
        }
    }

    /// `wall`: milliseconds since 1970.
    pub(super) fn poll_timeout(&self, now: Duration, wall: u64) -> Option<Duration> {
        let ends = self.ends.first().map(|(at, ..)| now + Duration::from_millis(at.saturating_sub(wall)));
        [ends, self.names_at].into_iter().flatten().min()
    }

    pub(super) fn handle_timeout(&mut self, half: &mut Half, now: Duration, wall: u64) {
        if self.names_at.is_some_and(|at| at <= now) {
            self.names_at = None;
            self.names = true;
        }
        while let Some(&(at, conversation, pseq)) = self.ends.first() {
            if at > wall {
                break;
            }
            self.ends.pop_first();
            self.cancel(conversation, pseq, half, now);
        }
    }
}

//! What is seen while a scene is played: every message's moments, the history for the checker, marks, phones.
//!
//! - Everything is written down in the order in which it was seen, under one lock; nothing is judged here.
//! - The history is bounded: a gateway that repeats itself for ever ends in a failed scene, not in a full memory.
//!
//! Not here: the judgement (`play`), figures (`outcome`).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fulmar_badnet::SimTime;
use fulmar_badnet::history::{Client, Conversation, Digest, Event, History, Tag};
use fulmar_client::{ConnectionState, Received, RecordKind};
use tokio::time::Instant;

use super::outcome::{Mark, Message};

/// Events that may be seen per message that is planned, and a few besides.
const EVENTS_PER_MESSAGE: usize = 16;
const EVENTS_BESIDES: usize = 20_000;

/// Things that must not happen that are kept; more say nothing new.
const TROUBLES_MAX: usize = 50;

/// What the tasks of a scene write down.
#[derive(Debug)]
pub(super) struct Board {
    seen: Mutex<Seen>,
}

/// Everything that was seen.
#[derive(Debug)]
pub(super) struct Seen {
    started: Instant,
    /// In order.
    pub(super) history: History,
    /// In order of sending.
    pub(super) messages: Vec<Message>,
    digests: Vec<Digest>,
    echoed: Vec<bool>,
    pub(super) marks: Vec<Mark>,
    /// When it became dark, while it is.
    pub(super) dark_since: Option<Duration>,
    /// By phone.
    pub(super) states: Vec<Standing>,
    /// From a phone's start to its first being up to date.
    pub(super) connects: Vec<Duration>,
    /// Things that must not happen and that the history can't express.
    pub(super) troubles: Vec<String>,
    users: HashMap<u64, usize>,
}

/// Where a phone's connection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Standing {
    #[default]
    Offline,
    Connecting,
    Syncing,
    Suspect,
    Live,
}

impl Standing {
    pub(super) fn of(state: &ConnectionState) -> Self {
        match state {
            ConnectionState::Connecting => Self::Connecting,
            ConnectionState::Syncing => Self::Syncing,
            ConnectionState::Suspect => Self::Suspect,
            ConnectionState::Live | ConnectionState::Draining => Self::Live,
            _ => Self::Offline,
        }
    }

    fn connected(self) -> bool {
        matches!(self, Self::Syncing | Self::Suspect | Self::Live)
    }
}

impl Board {
    pub(super) fn new(phones: usize, messages: usize) -> Self {
        let events = messages.saturating_mul(EVENTS_PER_MESSAGE).saturating_add(EVENTS_BESIDES);
        Self {
            seen: Mutex::new(Seen {
                started: Instant::now(),
                history: History::bounded(events),
                messages: Vec::new(),
                digests: Vec::new(),
                echoed: Vec::new(),
                marks: Vec::new(),
                dark_since: None,
                states: vec![Standing::Offline; phones],
                connects: Vec::new(),
                troubles: Vec::new(),
                users: HashMap::new(),
            }),
        }
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        // A panic of another task ends the scene; what was written down stays as true as it was.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The scene begins now: all moments count from here.
    pub(super) fn begins(&self) -> Instant {
        let mut seen = self.seen();
        seen.started = Instant::now();
        seen.started
    }

    pub(super) fn record(&self, event: Event) {
        self.seen().record(event);
    }

    /// It is dark from now on.
    pub(super) fn darkens(&self) {
        let mut seen = self.seen();
        seen.dark_since = Some(seen.now());
    }

    /// Writes down what happened to the network. If that was the dark, it is over.
    pub(super) fn mark(&self, mark: Mark) {
        let mut seen = self.seen();
        seen.dark_since = None;
        seen.marks.push(mark);
    }

    /// The phone's user has this number.
    pub(super) fn is_user(&self, phone: usize, user: u64) {
        let mut seen = self.seen();
        if let Some(other) = seen.users.insert(user, phone)
            && other != phone
        {
            seen.trouble(format!("phones {other} and {phone} have the same user number {user}"));
        }
    }

    /// The phone's connection stands like this now.
    pub(super) fn stands(&self, phone: usize, standing: Standing) {
        let mut seen = self.seen();
        let Some(known) = seen.states.get_mut(phone) else { return };
        let before = std::mem::replace(known, standing);
        let client = client_of(phone);
        match (before.connected(), standing.connected()) {
            (false, true) => seen.record(Event::Connected { client }),
            (true, false) => seen.record(Event::Disconnected { client }),
            _ => {}
        }
    }

    /// A phone was up to date for the first time.
    pub(super) fn connected_after(&self, wait: Duration) {
        self.seen().connects.push(wait);
    }

    /// A message is about to be handed to the SDK; answers with its number and its payload.
    pub(super) fn sending(
        &self,
        speaker: usize,
        listener: usize,
        conversation: u64,
        text: &str,
        burst: bool,
    ) -> (usize, Vec<u8>) {
        let mut seen = self.seen();
        let number = seen.messages.len();
        let tag = tag_of(speaker, number);
        let payload = tag.stamp(text.as_bytes());
        let digest = Digest::of(&payload);
        let sent = seen.now();
        seen.record(Event::Queued {
            client: client_of(speaker),
            conversation: Conversation(conversation),
            tag,
            digest,
        });
        seen.messages.push(Message { speaker, listener, sent, acked: None, delivered: None, burst });
        seen.digests.push(digest);
        seen.echoed.push(false);
        (number, payload)
    }

    /// The message was acked.
    pub(super) fn acked(&self, number: usize, conversation: u64, seq: u64) {
        let mut seen = self.seen();
        let now = seen.now();
        let Some(message) = seen.messages.get_mut(number) else { return };
        message.acked.get_or_insert(now);
        let speaker = message.speaker;
        seen.record(Event::Acked {
            client: client_of(speaker),
            conversation: Conversation(conversation),
            tag: tag_of(speaker, number),
            seq,
        });
    }

    /// The message was refused, or it expired although nothing was to expire.
    pub(super) fn failed(&self, number: usize, why: &str) {
        let mut seen = self.seen();
        let Some(speaker) = seen.messages.get(number).map(|message| message.speaker) else { return };
        seen.record(Event::Refused { client: client_of(speaker), tag: tag_of(speaker, number) });
        seen.trouble(format!("message {} of phone {}: {why}", number + 1, speaker + 1));
    }

    /// A phone's app was handed a record.
    pub(super) fn received(&self, phone: usize, record: &Received) {
        let mut seen = self.seen();
        let now = seen.now();
        let (client, conversation) = (client_of(phone), Conversation(record.conversation.get()));
        let seq = record.seq.get();
        if record.kind != RecordKind::Message {
            seen.record(Event::Notice { client, conversation, seq });
            return;
        }
        let Some((tag, _)) = Tag::read(&record.payload) else {
            seen.record(Event::Notice { client, conversation, seq });
            seen.trouble(format!("phone {} received something that nobody said", phone + 1));
            return;
        };
        let sender = seen.users.get(&record.sender.get()).map_or(Client(u32::MAX), |phone| client_of(*phone));
        let digest = Digest::of(&record.payload);
        seen.record(Event::Delivered { client, conversation, seq, sender, tag, digest });
        let number = usize::try_from(tag.counter).ok().and_then(|counter| counter.checked_sub(1));
        let Some(number) = number.filter(|number| seen.digests.get(*number) == Some(&digest)) else { return };
        if let Some(echoed) = seen.echoed.get_mut(number)
            && record.own
        {
            *echoed = true;
        } else if let Some(message) = seen.messages.get_mut(number)
            && message.listener == phone
        {
            message.delivered.get_or_insert(now);
        }
    }

    /// What is missing for an end: messages not acked, not delivered, not echoed, and phones that are not up to date.
    pub(super) fn missing(&self) -> [usize; 4] {
        let seen = self.seen();
        let count = |missing: fn(&Message) -> bool| seen.messages.iter().filter(|m| missing(m)).count();
        [
            count(|message| message.acked.is_none()),
            count(|message| message.delivered.is_none()),
            seen.echoed.iter().filter(|echoed| !**echoed).count(),
            seen.states.iter().filter(|standing| **standing != Standing::Live).count(),
        ]
    }
}

impl Seen {
    /// Time since the scene began.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn record(&mut self, event: Event) {
        let nanos = u64::try_from(self.now().as_nanos()).unwrap_or(u64::MAX);
        self.history.record(SimTime::from_nanos(nanos), event);
    }

    fn trouble(&mut self, what: String) {
        if self.troubles.len() < TROUBLES_MAX {
            self.troubles.push(what);
        }
    }
}

/// A phone in the history, counted from 1 as people see it.
pub(super) fn client_of(phone: usize) -> Client {
    Client(u32::try_from(phone.saturating_add(1)).unwrap_or(u32::MAX))
}

fn tag_of(speaker: usize, number: usize) -> Tag {
    let counter = u64::try_from(number.saturating_add(1)).unwrap_or(u64::MAX);
    Tag { client: client_of(speaker), counter }
}

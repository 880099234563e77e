//! What happened in a run, as seen from outside.
//!
//! - A history is a list of [`Event`]s in one order. That order, not the times, is what the checker judges by:
//!   **record what starts before you start it** ([`Event::Queued`], [`Event::Read`]) **and what ended after it
//!   ended** (everything else). Then "A stands before B" never claims more than what really was.
//! - A [`Client`] is one application over one SDK database: the same after a restart of the app, another one after
//!   a reinstall.
//! - A message is known by the [`Tag`] its sender gave it, carried in the payload ([`Tag::stamp`]) or mapped by the
//!   caller; never by anything the gateway said.
//! - A history has a bound. Events beyond it are counted, and the checker refuses a history that misses some.
//!
//! Not here: judging (`checker`).

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::time::SimTime;

/// One application over one SDK database, numbered by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Client(pub u32);

/// A conversation, by the gateway's number or the caller's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Conversation(pub u64);

/// What a message is known by: unique in the whole history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    /// Who sends it.
    pub client: Client,
    /// The sender's own count.
    pub counter: u64,
}

impl Tag {
    /// Bytes that a stamp adds to a payload.
    pub const STAMP_BYTES: usize = 12;

    /// A payload that carries the tag before `body`.
    ///
    /// ```
    /// use fulmar_badnet::history::{Client, Tag};
    /// let tag = Tag { client: Client(3), counter: 17 };
    /// let payload = tag.stamp("hello".as_bytes());
    /// assert_eq!(Tag::read(&payload), Some((tag, "hello".as_bytes())));
    /// assert_eq!(Tag::read(b"too short"), None);
    /// ```
    #[must_use]
    pub fn stamp(self, body: &[u8]) -> Vec<u8> {
        let mut payload = Vec::with_capacity(Self::STAMP_BYTES + body.len());
        payload.extend_from_slice(&self.client.0.to_be_bytes());
        payload.extend_from_slice(&self.counter.to_be_bytes());
        payload.extend_from_slice(body);
        payload
    }

    /// The tag and the body of a stamped payload; `None` when it is too short to be one.
    #[must_use]
    pub fn read(payload: &[u8]) -> Option<(Self, &[u8])> {
        let (client, rest) = payload.split_first_chunk()?;
        let (counter, body) = rest.split_first_chunk()?;
        let tag = Self { client: Client(u32::from_be_bytes(*client)), counter: u64::from_be_bytes(*counter) };
        Some((tag, body))
    }
}

/// What a payload is recognised by: a hash, to notice one that was altered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub u64);

impl Digest {
    /// The digest of a payload.
    #[must_use]
    pub fn of(payload: &[u8]) -> Self {
        Self(xxhash_rust::xxh3::xxh3_64(payload))
    }
}

/// One thing that happened. Positions (`seq`) count from 1 in their conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The client is a member: it may send, and should get everything from position `first` on.
    Joined {
        /// Who.
        client: Client,
        /// Where.
        conversation: Conversation,
        /// The first position it should see.
        first: u64,
    },
    /// The client's membership ended with position `last`: it should get what is up to there and nothing later.
    Left {
        /// Who.
        client: Client,
        /// Where.
        conversation: Conversation,
        /// The last position it should see.
        last: u64,
    },
    /// The application is about to hand a message to its SDK. Per client and conversation in the order of sending.
    Queued {
        /// Who sends.
        client: Client,
        /// Where.
        conversation: Conversation,
        /// The message.
        tag: Tag,
        /// Its payload.
        digest: Digest,
    },
    /// The SDK told the sender that the message is stored for good.
    Acked {
        /// Who was told.
        client: Client,
        /// Where.
        conversation: Conversation,
        /// The message.
        tag: Tag,
        /// Its position.
        seq: u64,
    },
    /// The SDK told the sender that the message was refused: it must never appear.
    Refused {
        /// Who was told.
        client: Client,
        /// The message.
        tag: Tag,
    },
    /// The SDK told the sender that the message expired or was cancelled: it must never appear.
    Expired {
        /// Who was told.
        client: Client,
        /// The message.
        tag: Tag,
    },
    /// The application got a message (its own echo counts, too).
    Delivered {
        /// Who got it.
        client: Client,
        /// Where.
        conversation: Conversation,
        /// Its position.
        seq: u64,
        /// From whom, as the gateway says. Where it names a user with several devices: the client of the tag, if
        /// that is one of the user's.
        sender: Client,
        /// Which message the payload says it is.
        tag: Tag,
        /// The payload.
        digest: Digest,
    },
    /// The application got a record that is no message (a join, a name, an edit): it fills its position.
    Notice {
        /// Who got it.
        client: Client,
        /// Where.
        conversation: Conversation,
        /// Its position.
        seq: u64,
    },
    /// The application was told that positions are missing for good, and why not silently.
    GapTold {
        /// Who was told.
        client: Client,
        /// Where.
        conversation: Conversation,
        /// The first that is missing.
        from: u64,
        /// The last that is missing.
        to: u64,
    },
    /// A read cursor, as `client` sees it: its own (then record it before marking), or another's by a receipt.
    Read {
        /// Who sees it.
        client: Client,
        /// Whose cursor it is.
        of: Client,
        /// Where.
        conversation: Conversation,
        /// Read up to here.
        upto: u64,
    },
    /// The client's SDK is connected and in sync.
    Connected {
        /// Who.
        client: Client,
    },
    /// The client's SDK lost its connection.
    Disconnected {
        /// Who.
        client: Client,
    },
    /// The client learned that its session was ended (kicked, revoked, expired): nothing may come or go any more.
    Kicked {
        /// Who.
        client: Client,
    },
    /// The client was let in again after [`Event::Kicked`].
    LoggedIn {
        /// Who.
        client: Client,
    },
    /// The client is gone for good: nothing more is expected of it.
    Gone {
        /// Who.
        client: Client,
    },
    /// The gateway was killed.
    GatewayKilled,
    /// The gateway serves.
    GatewayStarted,
}

/// An event and its time (for people; the order is what counts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When.
    pub at: SimTime,
    /// What.
    pub event: Event,
}

/// Everything that happened in one run.
#[derive(Clone, Debug)]
pub struct History {
    records: Vec<Record>,
    max: usize,
    missed: u64,
}

/// Events a history holds unless told otherwise (64 bytes each).
pub const EVENTS_MAX: usize = 8_000_000;

impl Default for History {
    fn default() -> Self {
        Self::bounded(EVENTS_MAX)
    }
}

impl History {
    /// An empty history for up to [`EVENTS_MAX`] events.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty history for up to `max` events.
    #[must_use]
    pub fn bounded(max: usize) -> Self {
        Self { records: Vec::new(), max, missed: 0 }
    }

    /// Adds an event at the end; beyond the bound it is only counted.
    pub fn record(&mut self, at: SimTime, event: Event) {
        if self.records.len() < self.max {
            self.records.push(Record { at, event });
        } else {
            self.missed += 1;
        }
    }

    /// What happened, in order.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Events that found no room.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// Writes one line per event: number, time in seconds, event. Equal histories give equal bytes.
    ///
    /// # Errors
    /// What `output` answers.
    pub fn write_to(&self, mut output: impl io::Write) -> io::Result<()> {
        for (number, record) in self.records.iter().enumerate() {
            writeln!(output, "{number}\t{}\t{}", record.at, record.event)?;
        }
        Ok(())
    }
}

impl FromIterator<Event> for History {
    /// A history without times.
    fn from_iter<I: IntoIterator<Item = Event>>(events: I) -> Self {
        let mut history = Self::new();
        for event in events {
            history.record(SimTime::START, event);
        }
        history
    }
}

/// Records from many tasks and threads into one history. Cheap to clone; all clones write the same history.
///
/// ```
/// use fulmar_badnet::SimTime;
/// use fulmar_badnet::history::{Client, Event, Recorder};
/// let recorder = Recorder::new(1_000);
/// recorder.record(SimTime::START, Event::Connected { client: Client(1) });
/// assert_eq!(recorder.take().records().len(), 1);
/// ```
#[derive(Clone, Debug)]
pub struct Recorder {
    history: Arc<Mutex<History>>,
}

impl Recorder {
    /// For up to `max` events.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { history: Arc::new(Mutex::new(History::bounded(max))) }
    }

    /// Adds an event; its place in the order is taken now.
    pub fn record(&self, at: SimTime, event: Event) {
        self.history().record(at, event);
    }

    /// Takes what was recorded so far and begins anew.
    #[must_use]
    pub fn take(&self) -> History {
        let mut history = self.history();
        let empty = History::bounded(history.max);
        std::mem::replace(&mut history, empty)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        // An event is in the list or not; a panic of another recorder leaves nothing half done.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {}", self.0)
    }
}

impl fmt::Display for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conversation {}", self.0)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "message {}/{}", self.client.0, self.counter)
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Joined { client, conversation, first } => {
                write!(f, "{client} joined {conversation} from seq {first} on")
            }
            Self::Left { client, conversation, last } => {
                write!(f, "{client} left {conversation} after seq {last}")
            }
            Self::Queued { client, conversation, tag, digest } => {
                write!(f, "{client} queued {tag} for {conversation}, payload {:016x}", digest.0)
            }
            Self::Acked { client, conversation, tag, seq } => {
                write!(f, "{client} got the ack of {tag}: {conversation} seq {seq}")
            }
            Self::Refused { client, tag } => write!(f, "{client} was refused {tag}"),
            Self::Expired { client, tag } => write!(f, "{client} saw {tag} expire"),
            Self::Delivered { client, conversation, seq, sender, tag, digest } => write!(
                f,
                "{client} got {conversation} seq {seq} from {sender}: {tag}, payload {:016x}",
                digest.0
            ),
            Self::Notice { client, conversation, seq } => {
                write!(f, "{client} got {conversation} seq {seq}: no message")
            }
            Self::GapTold { client, conversation, from, to } => {
                write!(f, "{client} was told that {conversation} lacks seq {from} to {to}")
            }
            Self::Read { client, of, conversation, upto } => {
                write!(f, "{client} sees that {of} read {conversation} up to seq {upto}")
            }
            Self::Connected { client } => write!(f, "{client} connected"),
            Self::Disconnected { client } => write!(f, "{client} disconnected"),
            Self::Kicked { client } => write!(f, "{client} was kicked"),
            Self::LoggedIn { client } => write!(f, "{client} was let in again"),
            Self::Gone { client } => write!(f, "{client} is gone"),
            Self::GatewayKilled => f.write_str("the gateway was killed"),
            Self::GatewayStarted => f.write_str("the gateway started"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_history_counts_what_it_misses() {
        let recorder = Recorder::new(2);
        for n in 0..5 {
            recorder.clone().record(SimTime::from_millis(n), Event::GatewayKilled);
        }
        let history = recorder.take();
        assert_eq!((history.records().len(), history.missed()), (2, 3));
        let mut lines = Vec::new();
        history.write_to(&mut lines).unwrap();
        assert_eq!(
            String::from_utf8(lines).unwrap(),
            "0\t0.000000\tthe gateway was killed\n1\t0.001000\tthe gateway was killed\n"
        );
        assert!(recorder.take().records().is_empty());
    }
}

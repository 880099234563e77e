//! The one judge of a history: were the promises kept that can be seen from outside?
//!
//! What is checked, with the number of the promise in the project's design:
//! - (1) what was acked reaches every member who should have it, is never passed over, and is not gone before its time;
//! - (2) nothing arrives that was not sent by then, by that sender, to that conversation, with that payload, by a
//!   member; what was refused or expired never appears;
//! - (3) per sender and conversation, positions are in the order of sending;
//! - (4) one position is one message and one message is one position, for everybody, before and after restarts;
//! - (5) a message that was queued after an ack was seen (by anybody) has the higher position;
//! - (6) an application gets each message and each position once, over its restarts;
//! - (7) deliveries don't go back, and leave out nothing without saying so;
//! - (8) read cursors don't go back, and after the calm don't pass the last position that anybody saw;
//! - (9) nobody gets what is outside of their membership;
//! - (11) after the calm, every outbox is empty, every member has everything, everybody is connected;
//! - (12) a session that was ended neither gets nor sends, and what is queued without one reaches nobody.
//!
//! A history is judged in two passes and in time proportional to its events plus the deliveries that were due. Which
//! figures it reports and which it holds against the run come from the same pass, so they can't contradict.
//!
//! Not here: what only the inside can show (disk, memory), and how long things take.

mod judge;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::history::{Client, Conversation, History, Tag};

/// What is expected of a history beyond what always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The run ended with a calm in which everything had time to settle (promise 11). Without it, what had not
    /// arrived by the end is only counted as [`Counters::pending`].
    pub converged: bool,
    /// Applications get their own messages back as deliveries. Without it, the ack is enough.
    pub echoes: bool,
    /// Every position up to a reader's last one must be a message or a notice that somebody saw. Without it, a
    /// position that nobody saw may be a record that is not shown.
    pub dense: bool,
    /// Retention was at work: a gap that was told excuses what it covers.
    pub gaps_excused: bool,
    /// How long messages are kept at least: no gap may cover what was queued later than this before it was told. `None`: gaps may
    /// cover anything. Times of the history count here.
    pub kept_for: Option<Duration>,
}

impl Default for Rules {
    /// Converged, no echoes wanted, not dense, no gap excused.
    fn default() -> Self {
        Self { converged: true, echoes: false, dense: false, gaps_excused: false, kept_for: None }
    }
}

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Breach {
    /// (1) An acked message that a member never got.
    Lost {
        /// Who should have it.
        reader: Client,
        /// The message.
        tag: Tag,
        /// Where.
        conversation: Conversation,
        /// Its position.
        seq: u64,
    },
    /// (7) A message without an ack that others got and this member did not.
    Skipped {
        /// Who should have it.
        reader: Client,
        /// The message.
        tag: Tag,
        /// Where.
        conversation: Conversation,
        /// Its position.
        seq: u64,
    },
    /// (7) A position below others that nobody can explain.
    Unexplained {
        /// Where.
        conversation: Conversation,
        /// The position.
        seq: u64,
    },
    /// (7) Positions given up although nothing was to be given up.
    GapTold {
        /// Who was told.
        reader: Client,
        /// Where.
        conversation: Conversation,
        /// The first position.
        from: u64,
    },
    /// (1) A message counted as gone before its time.
    GoneTooSoon {
        /// Who was told.
        reader: Client,
        /// Where.
        conversation: Conversation,
        /// Its position.
        seq: u64,
    },
    /// (6) A message or a position came twice to one application.
    Doubled {
        /// To whom.
        reader: Client,
        /// Where.
        conversation: Conversation,
        /// The position of the second coming.
        seq: u64,
    },
    /// (7) A delivery after a later one.
    OutOfOrder {
        /// To whom.
        reader: Client,
        /// Where.
        conversation: Conversation,
        /// The position.
        seq: u64,
        /// The higher one that came before.
        after: u64,
    },
    /// (3) A message before one that its sender had sent earlier.
    SendOrder {
        /// The message that was sent earlier.
        earlier: Tag,
        /// The message that was sent later and stands before it.
        later: Tag,
        /// Where.
        conversation: Conversation,
    },
    /// (5) A message at or before a position that was acked before the message was queued.
    BeforeAcked {
        /// The message.
        tag: Tag,
        /// Its position.
        seq: u64,
        /// The position that was acked already.
        acked: u64,
    },
    /// (4) Two messages at one position.
    PositionShared {
        /// Where.
        conversation: Conversation,
        /// The position.
        seq: u64,
        /// What was seen there first; `None` is a notice.
        first: Option<Tag>,
        /// What was seen there then; `None` is a notice.
        then: Option<Tag>,
    },
    /// (4) One message at two positions.
    TwoPositions {
        /// The message.
        tag: Tag,
        /// The position seen first.
        first: u64,
        /// The position seen then.
        then: u64,
    },
    /// (2) Something arrived or was acked that nobody had sent by then.
    NotSent {
        /// What it claims to be.
        tag: Tag,
    },
    /// (2) The payload is not the one that was sent.
    Altered {
        /// The message.
        tag: Tag,
    },
    /// (2) The message is said to be from somebody else.
    WrongSender {
        /// The message.
        tag: Tag,
        /// From whom it is said to be.
        sender: Client,
    },
    /// (9) The message came up in another conversation than it was sent to.
    WrongConversation {
        /// The message.
        tag: Tag,
        /// Where it came up.
        conversation: Conversation,
    },
    /// (2) A message that was refused or had expired is in the log.
    RefusedAppeared {
        /// The message.
        tag: Tag,
    },
    /// (2) Somebody's message was stored outside of their membership.
    SenderNotMember {
        /// The message.
        tag: Tag,
        /// Where.
        conversation: Conversation,
        /// Its position.
        seq: u64,
    },
    /// (9) Somebody got a position outside of their membership.
    NotMember {
        /// Who got it.
        reader: Client,
        /// Where.
        conversation: Conversation,
        /// The position.
        seq: u64,
    },
    /// (1) A message was resolved twice (acked, refused or expired).
    ResolvedTwice {
        /// The message.
        tag: Tag,
    },
    /// (9) The outcome of a message was told to another client than its sender.
    OutcomeElsewhere {
        /// The message.
        tag: Tag,
        /// Who was told.
        client: Client,
    },
    /// (4) Position 0, which means "nothing yet".
    PositionZero {
        /// Where.
        conversation: Conversation,
    },
    /// (8) A read cursor went back.
    ReadWentBack {
        /// Whose.
        of: Client,
        /// Where.
        conversation: Conversation,
        /// Where it was.
        from: u64,
        /// Where it went.
        to: u64,
    },
    /// (8) A read cursor passed the last position anybody ever saw. Held against converged runs only: before the
    /// calm, a position may be known to nobody who records.
    ReadBeyondHead {
        /// Whose.
        of: Client,
        /// Where.
        conversation: Conversation,
        /// The cursor.
        upto: u64,
        /// The last position.
        head: u64,
    },
    /// (12) Something came to, or went from, a session that was ended.
    AfterKick {
        /// Whose.
        client: Client,
    },
    /// (11) A message without any outcome after the calm.
    Unresolved {
        /// The message.
        tag: Tag,
    },
    /// (11) A client that is not connected after the calm.
    NotConnected {
        /// Who.
        client: Client,
    },
    /// The history itself is no evidence: one tag for two messages.
    TagReused {
        /// The tag.
        tag: Tag,
    },
    /// The history itself is no evidence: it had no room for some events.
    Incomplete {
        /// How many it misses.
        missed: u64,
    },
}

impl Breach {
    /// The promise of the project's design that was broken; `None` when the history itself is at fault.
    #[must_use]
    pub const fn promise(&self) -> Option<u8> {
        match self {
            Self::Lost { .. } | Self::GoneTooSoon { .. } | Self::ResolvedTwice { .. } => Some(1),
            Self::NotSent { .. }
            | Self::Altered { .. }
            | Self::WrongSender { .. }
            | Self::RefusedAppeared { .. }
            | Self::SenderNotMember { .. } => Some(2),
            Self::SendOrder { .. } => Some(3),
            Self::PositionShared { .. } | Self::TwoPositions { .. } | Self::PositionZero { .. } => Some(4),
            Self::BeforeAcked { .. } => Some(5),
            Self::Doubled { .. } => Some(6),
            Self::Skipped { .. }
            | Self::Unexplained { .. }
            | Self::GapTold { .. }
            | Self::OutOfOrder { .. } => Some(7),
            Self::ReadWentBack { .. } | Self::ReadBeyondHead { .. } => Some(8),
            Self::WrongConversation { .. } | Self::NotMember { .. } | Self::OutcomeElsewhere { .. } => {
                Some(9)
            }
            Self::Unresolved { .. } | Self::NotConnected { .. } => Some(11),
            Self::AfterKick { .. } => Some(12),
            Self::TagReused { .. } | Self::Incomplete { .. } => None,
        }
    }

    /// A short name of the kind, stable enough to count by.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Lost { .. } => "lost",
            Self::Skipped { .. } => "skipped",
            Self::Unexplained { .. } => "unexplained",
            Self::GapTold { .. } => "gap-told",
            Self::GoneTooSoon { .. } => "gone-too-soon",
            Self::Doubled { .. } => "doubled",
            Self::OutOfOrder { .. } => "out-of-order",
            Self::SendOrder { .. } => "send-order",
            Self::BeforeAcked { .. } => "before-acked",
            Self::PositionShared { .. } => "position-shared",
            Self::TwoPositions { .. } => "two-positions",
            Self::NotSent { .. } => "not-sent",
            Self::Altered { .. } => "altered",
            Self::WrongSender { .. } => "wrong-sender",
            Self::WrongConversation { .. } => "wrong-conversation",
            Self::RefusedAppeared { .. } => "refused-appeared",
            Self::SenderNotMember { .. } => "sender-not-member",
            Self::NotMember { .. } => "not-member",
            Self::ResolvedTwice { .. } => "resolved-twice",
            Self::OutcomeElsewhere { .. } => "outcome-elsewhere",
            Self::PositionZero { .. } => "position-zero",
            Self::ReadWentBack { .. } => "read-went-back",
            Self::ReadBeyondHead { .. } => "read-beyond-head",
            Self::AfterKick { .. } => "after-kick",
            Self::Unresolved { .. } => "unresolved",
            Self::NotConnected { .. } => "not-connected",
            Self::TagReused { .. } => "tag-reused",
            Self::Incomplete { .. } => "incomplete",
        }
    }
}

/// A breach and the events that show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What went wrong.
    pub breach: Breach,
    /// The event that shows it, as an index into [`History::records`]; `None` when it is one that did not come.
    pub event: Option<usize>,
    /// The earlier event that it contradicts.
    pub against: Option<usize>,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages handed to an SDK.
    pub sent: u64,
    /// Messages acked.
    pub acked: u64,
    /// Messages refused.
    pub refused: u64,
    /// Messages that expired.
    pub expired: u64,
    /// First deliveries to somebody else than the sender.
    pub delivered: u64,
    /// First deliveries to the sender.
    pub echoed: u64,
    /// Deliveries that were due to others than the sender: (message, member) pairs.
    pub due: u64,
    /// Due, and not there at the end of a history that need not have converged.
    pub pending: u64,
    /// Deliveries beyond the first of the same message or position to one application.
    pub duplicates: u64,
    /// Deliveries and sends out of their order.
    pub out_of_order: u64,
    /// Due, and lost.
    pub lost: u64,
    /// Connections beyond each client's first.
    pub reconnects: u64,
    /// How often the gateway was killed.
    pub gateway_kills: u64,
}

/// Violations kept of each kind; more are only counted.
pub const KEPT_PER_KIND: u64 = 100;

/// The judgement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was counted.
    pub counters: Counters,
    /// The first violations of each kind, in the order in which they were found.
    pub violations: Vec<Violation>,
    /// How many there are of each kind ([`Breach::kind`]), kept or not.
    pub by_kind: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Whether every promise was kept.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.by_kind.is_empty()
    }

    /// How many violations there are, kept or not.
    #[must_use]
    pub fn violations_total(&self) -> u64 {
        self.by_kind.values().sum()
    }

    /// The report for people, with the lines of the history that show each violation.
    #[must_use]
    pub fn explain(&self, history: &History) -> String {
        use fmt::Write;
        let mut text = String::new();
        let line = |event: Option<usize>| event.and_then(|at| Some((at, history.records().get(at)?)));
        for violation in &self.violations {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{violation}");
            for (at, record) in [violation.against, violation.event].into_iter().filter_map(line) {
                let _ = writeln!(text, "    event {at}, {} s: {}", record.at, record.event);
            }
        }
        text
    }
}

/// Judges a history.
///
/// ```
/// use fulmar_badnet::checker::{Rules, check};
/// use fulmar_badnet::history::{Client, Conversation, Digest, Event, History, Tag};
/// let (alice, bob, conversation) = (Client(1), Client(2), Conversation(7));
/// let tag = Tag { client: alice, counter: 1 };
/// let digest = Digest::of(b"hello");
/// let mut history: History = [
///     Event::Joined { client: alice, conversation, first: 1 },
///     Event::Joined { client: bob, conversation, first: 1 },
///     Event::Queued { client: alice, conversation, tag, digest },
///     Event::Acked { client: alice, conversation, tag, seq: 1 },
/// ]
/// .into_iter()
/// .collect();
/// let report = check(&history, &Rules::default());
/// assert_eq!(report.counters.lost, 1);
/// assert_eq!(
///     report.violations[0].to_string(),
///     "promise 1, lost: message 1/1 (conversation 7, seq 1) was acked and never reached client 2"
/// );
///
/// history.record(
///     fulmar_badnet::SimTime::START,
///     Event::Delivered { client: bob, conversation, seq: 1, sender: alice, tag, digest },
/// );
/// assert!(check(&history, &Rules::default()).holds());
/// ```
#[must_use]
pub fn check(history: &History, rules: &Rules) -> Report {
    judge::judge(history, rules)
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.breach.fmt(f)
    }
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.promise() {
            Some(promise) => write!(f, "promise {promise}, {}: ", self.kind())?,
            None => write!(f, "history, {}: ", self.kind())?,
        }
        let what = |tag: &Option<Tag>| tag.map_or_else(|| "a notice".to_owned(), |tag| tag.to_string());
        match self {
            Self::Lost { reader, tag, conversation, seq } => {
                write!(f, "{tag} ({conversation}, seq {seq}) was acked and never reached {reader}")
            }
            Self::Skipped { reader, tag, conversation, seq } => {
                write!(f, "{tag} ({conversation}, seq {seq}) reached others and never {reader}")
            }
            Self::Unexplained { conversation, seq } => {
                write!(f, "nobody saw what is at {conversation}, seq {seq}, though later ones arrived")
            }
            Self::GapTold { reader, conversation, from } => {
                write!(f, "{reader} was told of a gap in {conversation} from seq {from} on")
            }
            Self::GoneTooSoon { reader, conversation, seq } => {
                write!(f, "{reader} was told that {conversation}, seq {seq}, is gone, before its time")
            }
            Self::Doubled { reader, conversation, seq } => {
                write!(f, "{reader} got {conversation}, seq {seq}, a second time")
            }
            Self::OutOfOrder { reader, conversation, seq, after } => {
                write!(f, "{reader} got {conversation}, seq {seq}, after seq {after}")
            }
            Self::SendOrder { earlier, later, conversation } => {
                write!(f, "{later} stands before {earlier} in {conversation}, but was sent after it")
            }
            Self::BeforeAcked { tag, seq, acked } => {
                write!(f, "{tag} has seq {seq}, but seq {acked} was acked before it was queued")
            }
            Self::PositionShared { conversation, seq, first, then } => {
                write!(f, "{conversation}, seq {seq}, is {} and {}", what(first), what(then))
            }
            Self::TwoPositions { tag, first, then } => write!(f, "{tag} is at seq {first} and at seq {then}"),
            Self::NotSent { tag } => write!(f, "{tag} had not been sent"),
            Self::Altered { tag } => write!(f, "{tag} has another payload than was sent"),
            Self::WrongSender { tag, sender } => write!(f, "{tag} is said to be from {sender}"),
            Self::WrongConversation { tag, conversation } => write!(f, "{tag} came up in {conversation}"),
            Self::RefusedAppeared { tag } => write!(f, "{tag} was refused or had expired, and is in the log"),
            Self::SenderNotMember { tag, conversation, seq } => {
                write!(f, "{tag} is at {conversation}, seq {seq}, where its sender was no member")
            }
            Self::NotMember { reader, conversation, seq } => {
                write!(f, "{reader} got {conversation}, seq {seq}, without being a member there")
            }
            Self::ResolvedTwice { tag } => write!(f, "{tag} was resolved twice"),
            Self::OutcomeElsewhere { tag, client } => write!(f, "{client} was told the outcome of {tag}"),
            Self::PositionZero { conversation } => write!(f, "seq 0 was used in {conversation}"),
            Self::ReadWentBack { of, conversation, from, to } => {
                write!(f, "the read cursor of {of} in {conversation} went back from {from} to {to}")
            }
            Self::ReadBeyondHead { of, conversation, upto, head } => {
                write!(f, "the read cursor of {of} in {conversation} is {upto}, the head {head}")
            }
            Self::AfterKick { client } => write!(f, "{client} was active after its session was ended"),
            Self::Unresolved { tag } => write!(f, "{tag} has no outcome"),
            Self::NotConnected { client } => write!(f, "{client} is not connected"),
            Self::TagReused { tag } => write!(f, "{tag} was queued twice"),
            Self::Incomplete { missed } => write!(f, "{missed} events found no room in the history"),
        }
    }
}

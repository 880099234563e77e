//! What was seen while it ran: who said what when, what was acked, what reached whom.
//!
//! - Everything goes into one [`History`] in the order in which it was seen; nothing is judged or put right here.
//! - Besides, arrivals are tallied by line and phone: how many of the input's lines are where they belong is known
//!   at any time, from the input alone.
//! - The history is bounded, and one that was too short is no evidence: a gateway that repeats itself for ever ends in
//!   a failed run, not in a full memory.
//!
//! Not here: the judgement (`verdict`).

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fulmar_badnet::SimTime;
use fulmar_badnet::figures::Latencies;
use fulmar_badnet::history::{Client, Conversation, Digest, Event, History, Tag};
use fulmar_client::{Received, RecordKind};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::plan::{Plan, read_payload};

/// Events that may be seen per delivery that is due, and a few besides.
const EVENTS_PER_DELIVERY: usize = 8;
const EVENTS_BESIDES: usize = 100_000;

/// Things that must not happen that are kept; more say nothing new.
const TROUBLES_MAX: usize = 100;

/// What the tasks of a run write down, and tell each other.
#[derive(Debug)]
pub(super) struct Board {
    started: Instant,
    seen: Mutex<Seen>,
    /// By line: its partner has it, so the answer may be given.
    heard: Vec<AtomicBool>,
    /// By room: something was heard there.
    room_wakes: Vec<Notify>,
    /// Lines that may be sent so far: what comes behind a planned kill waits until it happened.
    gate: watch::Sender<usize>,
    /// For the display.
    pub(super) counts: Counts,
}

/// Numbers for the display and the pace; the judgement does not use them.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) sent: AtomicUsize,
    pub(super) acked: AtomicUsize,
    pub(super) delivered: AtomicUsize,
    pub(super) online: AtomicUsize,
}

/// Everything that was seen.
#[derive(Debug)]
pub(super) struct Seen {
    /// In order.
    pub(super) history: History,
    /// (line, phone) → how often the line's own text came to the phone; the speaker's echo counts for itself.
    pub(super) tally: HashMap<(usize, usize), u32>,
    /// By line: when it was handed to the SDK, and when it was acked.
    pub(super) times: Vec<(Option<Duration>, Option<Duration>)>,
    /// From handing over to the ack, and to each recipient.
    pub(super) ack_latencies: Latencies,
    pub(super) deliver_latencies: Latencies,
    /// Things that must not happen and that the history can't express.
    pub(super) troubles: Vec<String>,
    /// The users' numbers.
    users: HashMap<u64, usize>,
}

impl Board {
    pub(super) fn new(plan: &Plan) -> Self {
        let members: usize = plan.lines.len() + plan.deliveries();
        let events = members.saturating_mul(EVENTS_PER_DELIVERY).saturating_add(EVENTS_BESIDES);
        Self {
            started: Instant::now(),
            seen: Mutex::new(Seen {
                history: History::bounded(events),
                tally: HashMap::new(),
                times: vec![(None, None); plan.lines.len()],
                ack_latencies: Latencies::new(),
                deliver_latencies: Latencies::new(),
                troubles: Vec::new(),
                users: HashMap::new(),
            }),
            heard: plan.lines.iter().map(|_| AtomicBool::new(false)).collect(),
            room_wakes: plan.rooms.iter().map(|_| Notify::new()).collect(),
            gate: watch::Sender::new(usize::MAX),
            counts: Counts::default(),
        }
    }

    /// From now on, lines wait once `lines` were sent.
    pub(super) fn open_gate(&self, lines: usize) {
        self.gate.send_replace(lines);
    }

    /// Waits until one more line may be sent.
    pub(super) async fn passes_gate(&self) {
        let open = |limit: &usize| self.counts.sent.load(Ordering::Relaxed) < *limit;
        // The sender is `self`, so the channel does not close.
        let _ = self.gate.subscribe().wait_for(open).await;
    }

    /// Time since the start of the run.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        // A panic of another task ends the run; what was written down stays as true as it was.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an event down; its place in the order is taken now.
    pub(super) fn record(&self, event: Event) {
        self.seen().record(self.now(), event);
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

    /// The line is about to be handed to the SDK.
    pub(super) fn sending(&self, plan: &Plan, line: usize, conversation: u64) {
        let Some(planned) = plan.lines.get(line) else { return };
        let now = self.now();
        let event = Event::Queued {
            client: client_of(planned.speaker),
            conversation: Conversation(conversation),
            tag: tag_of(plan, line),
            digest: Digest::of(planned.payload(line).as_bytes()),
        };
        let mut seen = self.seen();
        seen.record(now, event);
        if let Some((sent, _)) = seen.times.get_mut(line) {
            *sent = Some(now);
        }
        self.counts.sent.fetch_add(1, Ordering::Relaxed);
    }

    /// The line was acked.
    pub(super) fn acked(&self, plan: &Plan, line: usize, conversation: u64, seq: u64) {
        let Some(planned) = plan.lines.get(line) else { return };
        let now = self.now();
        let event = Event::Acked {
            client: client_of(planned.speaker),
            conversation: Conversation(conversation),
            tag: tag_of(plan, line),
            seq,
        };
        let mut seen = self.seen();
        seen.record(now, event);
        if let Some((Some(sent), acked)) = seen.times.get_mut(line) {
            let latency = now.saturating_sub(*sent);
            *acked = Some(now);
            seen.ack_latencies.record(latency);
        }
        self.counts.acked.fetch_add(1, Ordering::Relaxed);
    }

    /// The line was refused, or it expired although nothing was to expire.
    pub(super) fn failed(&self, plan: &Plan, line: usize, why: &str) {
        let Some(planned) = plan.lines.get(line) else { return };
        let event = Event::Refused { client: client_of(planned.speaker), tag: tag_of(plan, line) };
        let now = self.now();
        let mut seen = self.seen();
        seen.record(now, event);
        seen.trouble(format!("{}: {why}", plan.describe(line)));
    }

    /// A phone's app was handed a record.
    pub(super) fn received(&self, plan: &Plan, phone: usize, message: &Received) {
        let now = self.now();
        let (client, conversation) = (client_of(phone), Conversation(message.conversation.get()));
        let seq = message.seq.get();
        if message.kind != RecordKind::Message {
            self.record(Event::Notice { client, conversation, seq });
            return;
        }
        let mut seen = self.seen();
        let Some((line, planned)) =
            read_payload(&message.payload).and_then(|(line, _)| Some((line, plan.lines.get(line)?)))
        else {
            seen.record(now, Event::Notice { client, conversation, seq });
            seen.trouble(format!("{} received something that nobody said", plan.phone(phone)));
            return;
        };
        // A user nobody is becomes a client that is in no conversation.
        let sender =
            seen.users.get(&message.sender.get()).map_or(Client(u32::MAX), |phone| client_of(*phone));
        let digest = Digest::of(&message.payload);
        let tag = tag_of(plan, line);
        seen.record(now, Event::Delivered { client, conversation, seq, sender, tag, digest });
        if message.payload == planned.payload(line).as_bytes() {
            let count = seen.tally.entry((line, phone)).or_default();
            *count = count.saturating_add(1);
            let first = *count == 1;
            if first && planned.speaker != phone {
                if let Some((Some(sent), _)) = seen.times.get(line).copied() {
                    seen.deliver_latencies.record(now.saturating_sub(sent));
                }
                self.counts.delivered.fetch_add(1, Ordering::Relaxed);
            }
        }
        drop(seen);
        if planned.partner == phone
            && let (Some(heard), Some(wake)) = (self.heard.get(line), self.room_wakes.get(planned.room))
        {
            heard.store(true, Ordering::Release);
            wake.notify_waiters();
        }
    }

    /// Waits until the partner of this line has it.
    pub(super) async fn heard(&self, plan: &Plan, line: usize) {
        let room = plan.lines.get(line).map(|planned| planned.room);
        let (Some(heard), Some(wake)) =
            (self.heard.get(line), room.and_then(|room| self.room_wakes.get(room)))
        else {
            return;
        };
        loop {
            // Made before the look, so that a wake-up in between is not missed.
            let woken = wake.notified();
            if heard.load(Ordering::Acquire) {
                return;
            }
            woken.await;
        }
    }

    /// The lines that were not acked, and the (line, phone) pairs where a line did not arrive, the speaker's echo
    /// included; at most `max` of each.
    pub(super) fn missing(&self, plan: &Plan, max: usize) -> (Vec<usize>, Vec<(usize, usize)>) {
        let seen = self.seen();
        let unacked = seen.times.iter().enumerate().filter(|(_, (_, acked))| acked.is_none());
        let unacked = unacked.map(|(line, _)| line).take(max).collect();
        let undelivered = (0..plan.lines.len())
            .flat_map(|line| plan.listeners(line).map(move |phone| (line, phone)))
            .filter(|pair| !seen.tally.contains_key(pair))
            .take(max)
            .collect();
        (unacked, undelivered)
    }

    /// Whether everything was acked and is where it belongs.
    pub(super) fn is_complete(&self, plan: &Plan) -> bool {
        let (sent, acked) =
            (self.counts.sent.load(Ordering::Relaxed), self.counts.acked.load(Ordering::Relaxed));
        if sent < plan.lines.len() || acked < plan.lines.len() {
            return false;
        }
        let (unacked, undelivered) = self.missing(plan, 1);
        unacked.is_empty() && undelivered.is_empty()
    }
}

impl Seen {
    fn record(&mut self, at: Duration, event: Event) {
        let nanos = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
        self.history.record(SimTime::from_nanos(nanos), event);
    }

    fn trouble(&mut self, what: String) {
        if self.troubles.len() < TROUBLES_MAX {
            self.troubles.push(what);
        }
    }
}

/// A phone in the history: client 7 is phone-007.
pub(super) fn client_of(phone: usize) -> Client {
    Client(u32::try_from(phone.saturating_add(1)).unwrap_or(u32::MAX))
}

/// A line in the history, by its speaker and its place in the input, from 1.
pub(super) fn tag_of(plan: &Plan, line: usize) -> Tag {
    let speaker = plan.lines.get(line).map_or(usize::MAX, |planned| planned.speaker);
    Tag { client: client_of(speaker), counter: u64::try_from(line.saturating_add(1)).unwrap_or(u64::MAX) }
}

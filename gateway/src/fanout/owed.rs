//! What one connection is owed: positions, not messages.
//!
//! - For a conversation without an entry the connection has everything that was published before it attached, or
//!   will get it by its resume; the first record published after that makes the entry.
//! - `next` never goes back, but for a resume that finds the device further behind.
//! - Once what the device lacked when it came is owed ([`Owed::caught_up`]), [`Owed::unfinished`] says where it may lack
//!   something: what is not named there it has, and has said so.
//! - Settled sends are bounded by the send window, events by [`EVENTS_MAX`] (newest per key wins), receipts by one per
//!   (conversation, user) and [`RECEIPTS_MAX`], heads by one per conversation.
//!
//! Not here: writing anything (`connection::writer`), reading the log (`receipt::catchup`).

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    desk::{Bell, Bells},
    ring::{Due, Ring},
};
use fulmar_protocol::{
    close::CloseCode,
    frame::{Event, EventKind, Goaway, Head, Receipt, SendRefused},
    id::{AppId, ConversationId, DeviceId, Pseq, Seq, ShardId, UnixMillis, UserId},
};

/// Events that wait for one connection; beyond it the oldest is dropped and counted.
pub const EVENTS_MAX: usize = 64;

/// Receipts that wait for one connection; beyond it new pairs are dropped: receipts are news, not records, and the
/// next one of the pair says it all.
pub const RECEIPTS_MAX: usize = 1_024;

/// Reminders ([`Owed::remind_heads`], about one a second) after which receipts of what is not on screen leave by themselves.
/// Until then they wait for something they can go along with: nobody looks, and a packet of its own and the
/// acknowledgement of that cost more than what it says.
pub const RECEIPTS_WAIT: u32 = 5;

/// Conversations of one connection that count as on screen.
pub const ON_SCREEN_MAX: usize = 4;

/// How a connection is served for one conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// From the ring, on its lane.
    Live,
    /// From the log, on the backlog stream, by the gateway's own doing.
    Backlog,
    /// Too far behind: it was told the head and pulls.
    Pulling,
}

#[derive(Debug)]
struct Lag {
    next: Seq,
    head: Seq,
    /// The furthest the device has acknowledged on this connection.
    acked: Seq,
    mode: Mode,
    ring: Option<Arc<Ring>>,
    queued: bool,
}

/// One send whose fate is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It is on disk, or was before.
    Acked {
        /// The conversation.
        conversation: ConversationId,
        /// The send's number.
        pseq: Pseq,
        /// Its record; [`Seq::ZERO`] when the number was used up without one.
        seq: Seq,
        /// When it was stored.
        time: UnixMillis,
    },
    /// It was settled before, further back than anybody remembers as which record.
    Before {
        /// The conversation.
        conversation: ConversationId,
        /// Everything up to this number is settled.
        up_to: Pseq,
        /// When this was found out.
        time: UnixMillis,
    },
    /// It was refused.
    Refused(SendRefused),
}

/// Why the gateway ends a connection from inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Say GOAWAY, flush, and close when the client does or the deadline passes.
    Drain(Goaway),
    /// Close now.
    Close(CloseCode, &'static str),
}

#[derive(Debug, Default)]
struct Inner {
    lags: HashMap<ConversationId, Lag>,
    live: VecDeque<ConversationId>,
    backlog: VecDeque<ConversationId>,
    settled: Vec<Settled>,
    /// Ordered, as what is told last is: a simulated world repeats itself.
    heads: BTreeMap<ConversationId, Head>,
    receipts: BTreeMap<(ConversationId, UserId), Receipt>,
    /// Reminders that passed since there are receipts.
    receipts_waited: u32,
    /// The next reminder may have something to say.
    reminder: bool,
    events: VecDeque<Event>,
    events_dropped: u64,
    fell_behind: u64,
    on_screen: VecDeque<ConversationId>,
    ending: Option<Ending>,
    caught_up: bool,
    /// The own record that was acked last.
    own_acked: Option<(ConversationId, Seq)>,
}

/// See the module's text. Shared by the connection and the shards.
#[derive(Debug)]
pub struct Owed {
    /// The app of its user.
    pub app: AppId,
    /// The connection's user.
    pub user: UserId,
    /// The connection's device.
    pub device: DeviceId,
    /// Tells two connections of one device apart; the newer one has the higher number.
    pub connection: u64,
    /// Whoever is at the other end is there now, is no copy of an earlier first flight, and goes on with this connection.
    confirmed: AtomicBool,
    /// The client makes its own records from what it sent and the ack.
    acks_are_echoes: bool,
    inner: Mutex<Inner>,
    bells: Arc<Bells>,
    backlog_max: u64,
}

/// Live frames of one conversation, to be written.
#[derive(Debug)]
pub struct Taken {
    /// The conversation.
    pub conversation: ConversationId,
    /// The record of the first frame; the others follow it without a hole.
    pub first: Seq,
    /// The frames, at least one.
    pub frames: Vec<bytes::Bytes>,
}

/// What the control stream has to write.
#[derive(Debug, Default)]
pub struct ControlDue {
    /// Sends whose fate is decided, in the order of the decisions.
    pub settled: Vec<Settled>,
    /// Conversations the client has to pull.
    pub heads: Vec<Head>,
    /// How far others have come.
    pub receipts: Vec<Receipt>,
    /// What need not be stored.
    pub events: Vec<Event>,
    /// The connection is to end.
    pub ending: Option<Ending>,
}

impl Owed {
    /// Of a connection of this thread ([`super::desk`]): nothing owed yet, and of no account for others until [`Self::confirm`]. Whoever is more than `backlog_max` records behind is told the head and pulls.
    #[must_use]
    pub fn new(user: UserId, device: DeviceId, connection: u64, backlog_max: u64) -> Self {
        Self {
            app: AppId::default(),
            user,
            device,
            connection,
            confirmed: AtomicBool::new(false),
            acks_are_echoes: false,
            inner: Mutex::new(Inner::default()),
            bells: Bells::new(),
            backlog_max,
        }
    }

    /// Of a user of this app.
    #[must_use]
    pub const fn of_app(mut self, app: AppId) -> Self {
        self.app = app;
        self
    }

    /// A client that makes its own records from what it sent and the ack is not owed them.
    #[must_use]
    pub const fn acks_are_echoes(mut self, on: bool) -> Self {
        self.acks_are_echoes = on;
        self
    }

    /// Waits until a lane may have something to write.
    pub async fn lanes_due(&self) {
        self.bells.lanes.notified().await;
    }

    /// Waits until the backlog stream may have something to write.
    pub async fn backlog_due(&self) {
        self.bells.backlog.notified().await;
    }

    /// Waits until the control stream may have something to write.
    pub async fn control_due(&self) {
        self.bells.control.notified().await;
    }

    /// Has the connection look at everything.
    pub fn look(&self) {
        for bell in [Bell::Control, Bell::Lanes, Bell::Backlog] {
            self.bells.ring(bell);
        }
    }

    /// The handshake is complete, and the client goes on with this connection of those it may have tried at once.
    pub fn confirm(&self) {
        self.confirmed.store(true, Ordering::Relaxed);
    }

    /// Whether the session counts for others: who is online, and which connection of a device is the one.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        self.confirmed.load(Ordering::Relaxed)
    }

    /// A record was committed and is in `ring`.
    ///
    /// `inline` false: the conversation is too large for everybody to be served as it comes. A session that does not
    /// have it open is told the head instead, at the pace of [`Self::remind_heads`].
    ///
    /// The record whose ack was settled just before, and which the connection wants next, is not owed: the ack stands for it.
    pub fn publish(&self, conversation: ConversationId, seq: Seq, ring: &Arc<Ring>, inline: bool) {
        self.publish_all(conversation, (seq, seq), ring, inline);
    }

    /// The same for the records from `first` to `seq`, which were committed while the connection was here, and of which it may
    /// have been told some.
    pub fn publish_from(&self, conversation: ConversationId, first: Seq, seq: Seq, ring: &Arc<Ring>) {
        self.publish_all(conversation, (first, seq), ring, true);
    }

    fn publish_all(
        &self,
        conversation: ConversationId,
        (first, seq): (Seq, Seq),
        ring: &Arc<Ring>,
        inline: bool,
    ) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let lag = inner.lags.entry(conversation).or_insert_with(|| Lag {
            next: first,
            head: seq,
            acked: Seq::ZERO,
            mode: Mode::Live,
            ring: None,
            queued: false,
        });
        lag.head = lag.head.max(seq);
        let acked = self.acks_are_echoes && inner.own_acked == Some((conversation, seq));
        if acked && lag.mode == Mode::Live && !lag.queued && lag.next == seq {
            lag.next = seq.saturating_add(1);
            return;
        }
        if !inline && lag.mode == Mode::Live && !lag.queued && !inner.on_screen.contains(&conversation) {
            lag.mode = Mode::Pulling;
        }
        if !lag.ring.as_ref().is_some_and(|known| Arc::ptr_eq(known, ring)) {
            lag.ring = Some(Arc::clone(ring));
        }
        let ring = match lag.mode {
            Mode::Live if !lag.queued => {
                lag.queued = true;
                inner.live.push_back(conversation);
                true
            }
            Mode::Pulling => !std::mem::replace(&mut inner.reminder, true),
            Mode::Live | Mode::Backlog => false,
        };
        drop(guard);
        if ring {
            self.bells.ring(Bell::Lanes);
        }
    }

    /// The device has everything before `next` and the conversation has come to `head`: owe it the rest. `gap`: what it
    /// lacks before `next` is gone, so the log is read even if the rest is at hand: only a BLOCK says where a log begins.
    pub fn resume(&self, conversation: ConversationId, next: Seq, gap: bool, head: Head) {
        let mut inner = self.lock();
        let known = inner.lags.remove(&conversation);
        let (known_head, ring) = known.map_or((head.head, None), |lag| (lag.head.max(head.head), lag.ring));
        if next > known_head && !gap {
            // It has everything; an entry is only kept where a ring is known to be live.
            if ring.is_some() {
                let (acked, mode) = (next.prev(), Mode::Live);
                let lag = Lag { next, head: known_head, acked, mode, ring, queued: false };
                inner.lags.insert(conversation, lag);
            }
            return;
        }
        let far = known_head.since(next) >= self.backlog_max;
        let live = !far && !gap && ring.as_ref().is_some_and(|ring| ring.serves(next));
        let mode = if far {
            Mode::Pulling
        } else if live {
            Mode::Live
        } else {
            Mode::Backlog
        };
        let lag = Lag { next, head: known_head, acked: Seq::ZERO, mode, ring, queued: !far };
        inner.lags.insert(conversation, lag);
        match mode {
            Mode::Live => inner.live.push_back(conversation),
            Mode::Backlog => inner.backlog.push_back(conversation),
            Mode::Pulling => {
                inner.heads.insert(conversation, Head { head: known_head, ..head });
            }
        }
        drop(inner);
        match mode {
            Mode::Live => self.bells.ring(Bell::Lanes),
            Mode::Backlog => self.bells.ring(Bell::Backlog),
            Mode::Pulling => self.bells.ring(Bell::Control),
        }
    }

    /// What the device lacked when it came is owed now: from here on this set knows everything it may lack.
    pub fn caught_up(&self) {
        self.lock().caught_up = true;
    }

    /// The device has committed records up to these.
    pub fn acked(&self, entries: &[(ConversationId, Seq)]) {
        let mut inner = self.lock();
        for (conversation, seq) in entries {
            if let Some(lag) = inner.lags.get_mut(conversation) {
                lag.acked = lag.acked.max(*seq);
            }
        }
    }

    /// The conversations of a shard in which the device has not acknowledged everything that was owed or published here,
    /// and whether what it lacked when it came is among that.
    #[must_use]
    pub fn unfinished(&self, shard: ShardId) -> (bool, Vec<ConversationId>) {
        let inner = self.lock();
        let unfinished = inner
            .lags
            .iter()
            .filter(|(conversation, lag)| conversation.shard() == shard && lag.acked < lag.head);
        (inner.caught_up, unfinished.map(|(conversation, _)| *conversation).collect())
    }

    /// `conversation` is on screen: its backlog goes in front of the others, and its records come inline whatever its
    /// size. The last [`ON_SCREEN_MAX`] count as on screen.
    pub fn prefer(&self, conversation: ConversationId) {
        let mut inner = self.lock();
        if inner.on_screen.len() >= ON_SCREEN_MAX && !inner.on_screen.contains(&conversation) {
            inner.on_screen.pop_front();
        }
        if !inner.on_screen.contains(&conversation) {
            inner.on_screen.push_back(conversation);
        }
        if let Some(at) = inner.backlog.iter().position(|waiting| *waiting == conversation) {
            inner.backlog.remove(at);
            inner.backlog.push_front(conversation);
        }
    }

    /// The user is a member again from this record on: what was said in between is not for it, and a BLOCK that begins here
    /// says so.
    pub fn rejoin(&self, conversation: ConversationId, seq: Seq) {
        let behind = self.lock().lags.get(&conversation).is_some_and(|lag| lag.next < seq);
        if behind {
            let head = Head { conversation, head: seq, count: 0, low: Seq::ZERO };
            self.resume(conversation, seq, true, head);
        }
    }

    /// The next conversation with live frames, and the frames. `None`: nothing is due.
    pub fn take_live(&self, budget: usize, now: UnixMillis) -> Option<Taken> {
        let mut guard = self.lock();
        let inner = &mut *guard;
        while let Some(conversation) = inner.live.pop_front() {
            // A resume may have changed its mode while it waited here.
            let Some(lag) = inner.lags.get_mut(&conversation).filter(|lag| lag.mode == Mode::Live) else {
                continue;
            };
            lag.queued = false;
            // Not what follows its head: that is published to it in a moment, or never, if its user is no member any more.
            let owed = lag.next..=lag.head;
            let due = lag.ring.as_ref().map_or(Due::Behind, |ring| ring.due(owed, self.user, budget, now));
            match due {
                Due::Frames { frames, next, more } => {
                    let first = std::mem::replace(&mut lag.next, next);
                    if more {
                        lag.queued = true;
                        inner.live.push_back(conversation);
                    }
                    if !frames.is_empty() {
                        return Some(Taken { conversation, first, frames });
                    }
                }
                Due::Behind if lag.head.since(lag.next) >= self.backlog_max => {
                    inner.fell_behind += 1;
                    lag.mode = Mode::Pulling;
                    let head = Head { conversation, head: lag.head, count: 0, low: Seq::ZERO };
                    inner.heads.insert(conversation, head);
                    self.bells.ring(Bell::Control);
                }
                Due::Behind => {
                    inner.fell_behind += 1;
                    lag.mode = Mode::Backlog;
                    lag.queued = true;
                    inner.backlog.push_back(conversation);
                    self.bells.ring(Bell::Backlog);
                }
            }
        }
        None
    }

    /// The next conversation to be served from the log: from where to where.
    pub fn take_backlog(&self) -> Option<(ConversationId, Seq, Seq)> {
        let mut inner = self.lock();
        while let Some(conversation) = inner.backlog.pop_front() {
            if let Some(lag) = inner.lags.get_mut(&conversation).filter(|lag| lag.mode == Mode::Backlog) {
                lag.queued = false;
                return Some((conversation, lag.next, lag.head));
            }
        }
        None
    }

    /// Everything before `next` of `conversation` is written to the backlog stream. Goes on from the ring where that
    /// is possible, else from the log.
    pub fn backlog_written(&self, conversation: ConversationId, next: Seq) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let Some(lag) = inner.lags.get_mut(&conversation) else { return };
        lag.next = lag.next.max(next);
        if lag.next > lag.head || lag.ring.as_ref().is_some_and(|ring| ring.serves(lag.next)) {
            lag.mode = Mode::Live;
            if lag.next <= lag.head && !lag.queued {
                lag.queued = true;
                inner.live.push_back(conversation);
                self.bells.ring(Bell::Lanes);
            }
        } else if !lag.queued {
            lag.mode = Mode::Backlog;
            lag.queued = true;
            inner.backlog.push_back(conversation);
            self.bells.ring(Bell::Backlog);
        }
    }

    /// A backlog can't be read from the log at the moment: leave it to the client to pull.
    pub fn backlog_failed(&self, conversation: ConversationId) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        if let Some(lag) = inner.lags.get_mut(&conversation) {
            lag.mode = Mode::Pulling;
            let head = Head { conversation, head: lag.head, count: 0, low: Seq::ZERO };
            inner.heads.insert(conversation, head);
            self.bells.ring(Bell::Control);
        }
    }

    /// A PULL was answered with everything from `from` up to before `next`. When that reaches what was published, the
    /// conversation is live again; else its head is told once more.
    pub fn pulled(&self, conversation: ConversationId, from: Seq, next: Seq) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let Some(lag) = inner.lags.get_mut(&conversation) else { return };
        if lag.mode != Mode::Pulling || from > lag.next || next <= lag.next {
            return;
        }
        lag.next = next;
        if next > lag.head || lag.ring.as_ref().is_some_and(|ring| ring.serves(next)) {
            lag.mode = Mode::Live;
            if next <= lag.head && !lag.queued {
                lag.queued = true;
                inner.live.push_back(conversation);
                self.bells.ring(Bell::Lanes);
            }
        } else {
            let head = Head { conversation, head: lag.head, count: 0, low: Seq::ZERO };
            inner.heads.insert(conversation, head);
            self.bells.ring(Bell::Control);
        }
    }

    /// Whether the next reminder may have something to say. [`Self::lanes_due`] ends when that begins: who waits for nothing needs no
    /// timer.
    #[must_use]
    pub fn wants_reminder(&self) -> bool {
        self.lock().reminder
    }

    /// Conversations the client pulls whose head has moved since it was told: tell it again. Receipts that have waited long
    /// enough leave too. Called about once a second.
    pub fn remind_heads(&self, told: &mut HashMap<ConversationId, Seq>) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let mut any = false;
        for (conversation, lag) in &inner.lags {
            if lag.mode == Mode::Pulling && told.get(conversation).is_none_or(|told| *told < lag.head) {
                let head = Head { conversation: *conversation, head: lag.head, count: 0, low: Seq::ZERO };
                inner.heads.insert(*conversation, head);
                told.insert(*conversation, lag.head);
                any = true;
            }
        }
        told.retain(|conversation, _| inner.lags.contains_key(conversation));
        if !inner.receipts.is_empty() {
            inner.receipts_waited += 1;
            any |= inner.receipts_waited >= RECEIPTS_WAIT;
        }
        inner.reminder = !any && !inner.receipts.is_empty();
        drop(guard);
        if any {
            self.bells.ring(Bell::Control);
        }
    }

    /// A send's fate is decided.
    pub fn settle(&self, settled: Settled) {
        let mut inner = self.lock();
        if let Settled::Acked { conversation, seq, .. } = settled {
            inner.own_acked = Some((conversation, seq));
        }
        inner.settled.push(settled);
        drop(inner);
        self.bells.ring(Bell::Control);
    }

    /// Retention took the oldest records of a conversation: the client is told where it begins now.
    pub fn trimmed(&self, head: Head) {
        let mut inner = self.lock();
        let told = inner.heads.entry(head.conversation).or_insert(head);
        *told = Head {
            conversation: head.conversation,
            head: told.head.max(head.head),
            count: told.count.max(head.count),
            low: told.low.max(head.low),
        };
        drop(inner);
        self.bells.ring(Bell::Control);
    }

    /// A member has come further. Told at once where somebody looks, and to the member's own devices; else along with the
    /// next that leaves, and after [`RECEIPTS_WAIT`] at the latest.
    pub fn receipt(&self, receipt: Receipt) {
        let mut inner = self.lock();
        let key = (receipt.conversation, receipt.user);
        if inner.receipts.len() >= RECEIPTS_MAX && !inner.receipts.contains_key(&key) {
            return;
        }
        let known = inner.receipts.entry(key).or_insert(receipt);
        known.recv = known.recv.max(receipt.recv);
        known.read = known.read.max(receipt.read);
        let prompt = receipt.user == self.user || inner.on_screen.contains(&receipt.conversation);
        let begins = !prompt && !std::mem::replace(&mut inner.reminder, true);
        drop(inner);
        if prompt {
            self.bells.ring(Bell::Control);
        } else if begins {
            // Who writes the lanes sees to reminders, the first of which is a second off.
            self.bells.ring_some_time(Bell::Lanes);
        }
    }

    /// Something that need not be stored.
    pub fn event(&self, event: Event) {
        let mut inner = self.lock();
        let key = |event: &Event| -> (ConversationId, EventKind, UserId) {
            (event.conversation, event.kind, event.sender)
        };
        if let Some(known) = inner.events.iter_mut().find(|known| key(known) == key(&event)) {
            if event.number >= known.number {
                *known = event;
            }
        } else {
            if inner.events.len() >= EVENTS_MAX {
                inner.events.pop_front();
                inner.events_dropped += 1;
            }
            inner.events.push_back(event);
        }
        drop(inner);
        self.bells.ring(Bell::Control);
    }

    /// Ends the connection; the first reason stays.
    pub fn end(&self, ending: Ending) {
        let mut inner = self.lock();
        if inner.ending.is_none() || matches!(ending, Ending::Close(..)) {
            inner.ending = Some(ending);
        }
        drop(inner);
        self.bells.ring(Bell::Control);
    }

    /// What the control stream has to write now.
    pub fn take_control(&self) -> ControlDue {
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.receipts_waited = 0;
        ControlDue {
            settled: std::mem::take(&mut inner.settled),
            heads: std::mem::take(&mut inner.heads).into_values().collect(),
            receipts: std::mem::take(&mut inner.receipts).into_values().collect(),
            events: inner.events.drain(..).collect(),
            ending: inner.ending.take(),
        }
    }

    /// Conversations that wait to be written, lanes and backlog; 0 when everything owed is written.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let inner = self.lock();
        inner.live.len() + inner.backlog.len() + inner.settled.len()
    }

    /// Events that were dropped since the last call.
    pub fn take_events_dropped(&self) -> u64 {
        std::mem::take(&mut self.lock().events_dropped)
    }

    /// Times a ring had left what was owed, since the last call.
    pub fn take_fell_behind(&self) -> u64 {
        std::mem::take(&mut self.lock().fell_behind)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Plain data whose invariants hold between any two statements.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::fanout::ring::{RingEntry, RingLimits};

    fn seq(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    fn conversation(n: u64) -> ConversationId {
        ConversationId::new(n).unwrap()
    }

    fn now() -> UnixMillis {
        UnixMillis::new(5_000).unwrap()
    }

    fn owed() -> Owed {
        Owed::new(UserId::new(300).unwrap(), DeviceId::FIRST, 1, 100)
    }

    fn push(ring: &Ring, n: u64) {
        ring.push(RingEntry {
            seq: seq(n),
            sender: UserId::new(301).unwrap(),
            time: now(),
            frame: Bytes::from(n.to_be_bytes().to_vec()),
            own_frame: None,
        });
    }

    fn head(n: u64) -> Head {
        Head { conversation: conversation(1), head: seq(n), count: n, low: seq(1) }
    }

    fn live(owed: &Owed) -> Vec<u64> {
        let mut got = Vec::new();
        while let Some(Taken { first, frames, .. }) = owed.take_live(1 << 20, now()) {
            assert_eq!(first.get().to_be_bytes(), frames[0][..]);
            got.extend(frames.iter().map(|f| u64::from_be_bytes(f[..].try_into().unwrap())));
        }
        got
    }

    #[test]
    fn who_is_no_member_any_more_gets_nothing_of_what_follows() {
        let owed = owed();
        let ring = Arc::new(Ring::new(RingLimits { records: 100, bytes: 100_000 }));
        for n in 1..=3 {
            push(&ring, n);
            owed.publish(conversation(1), seq(n), &ring, true);
        }
        // The user left with 3; before its connection has taken it, others go on.
        push(&ring, 4);
        push(&ring, 5);
        assert_eq!(live(&owed), [1, 2, 3]);
        assert_eq!(live(&owed), [0u64; 0]);
        // It is a member again from 6 on.
        owed.rejoin(conversation(1), seq(6));
        push(&ring, 6);
        owed.publish(conversation(1), seq(6), &ring, true);
        assert_eq!(live(&owed), [0u64; 0], "a BLOCK says that it begins later");
        assert_eq!(owed.take_backlog(), Some((conversation(1), seq(6), seq(6))));
    }

    #[test]
    fn who_is_a_member_again_does_not_get_what_was_said_in_between() {
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 8, bytes: 1_000 })));
        push(&ring, 3);
        owed.publish(conversation(1), seq(3), &ring, true);
        assert_eq!(live(&owed), [3]);
        // 4 is said while the user is no member; 5 is the record by which it is one again.
        push(&ring, 4);
        owed.rejoin(conversation(1), seq(5));
        push(&ring, 5);
        owed.publish(conversation(1), seq(5), &ring, true);
        assert_eq!(live(&owed), [0u64; 0]);
        assert_eq!(owed.take_backlog(), Some((conversation(1), seq(5), seq(5))));
        // Where nothing was said in between, nothing is special.
        owed.backlog_written(conversation(1), seq(6));
        owed.rejoin(conversation(1), seq(6));
        push(&ring, 6);
        owed.publish(conversation(1), seq(6), &ring, true);
        assert_eq!(live(&owed), [6]);
    }

    #[test]
    fn reminders_are_wanted_only_where_there_is_something_to_say() {
        use futures_util::FutureExt as _;
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 8, bytes: 1_000 })));
        let mut told = HashMap::new();
        let woken = || owed.lanes_due().now_or_never().is_some();
        assert!(!owed.wants_reminder() && !woken(), "an idle connection needs no timer");
        // Too large a conversation for everybody to be served as it comes.
        for n in 1..=3 {
            push(&ring, n);
            owed.publish(conversation(1), seq(n), &ring, false);
            assert_eq!(woken(), n == 1, "once until the reminder");
        }
        assert!(owed.wants_reminder());
        owed.remind_heads(&mut told);
        assert!(!owed.wants_reminder() && owed.control_due().now_or_never().is_some());
        assert_eq!(owed.take_control().heads.len(), 1);
        // A receipt that nobody looks at is asked for until it has left.
        owed.receipt(Receipt {
            conversation: conversation(1),
            user: UserId::new(301).unwrap(),
            recv: seq(1),
            read: Seq::ZERO,
        });
        assert!(woken());
        for n in 1..=RECEIPTS_WAIT {
            assert!(owed.wants_reminder());
            owed.remind_heads(&mut told);
            assert_eq!(owed.control_due().now_or_never().is_some(), n == RECEIPTS_WAIT);
        }
        assert!(!owed.wants_reminder());
    }

    #[test]
    fn receipts_wait_unless_somebody_looks() {
        use futures_util::FutureExt as _;
        let owed = owed();
        let woken = || owed.control_due().now_or_never().is_some();
        let receipt = |user, c, n| Receipt {
            conversation: conversation(c),
            user: UserId::new(user).unwrap(),
            recv: seq(n),
            read: Seq::ZERO,
        };
        let mut told = HashMap::new();
        owed.receipt(receipt(301, 1, 4));
        for _ in 1..RECEIPTS_WAIT {
            owed.remind_heads(&mut told);
        }
        assert!(!woken());
        owed.receipt(receipt(301, 1, 5));
        owed.remind_heads(&mut told);
        assert!(woken(), "long enough");
        assert_eq!(owed.take_control().receipts, [receipt(301, 1, 5)]);
        owed.remind_heads(&mut told);
        owed.receipt(receipt(301, 1, 6));
        assert!(!woken());
        let ack = Settled::Before { conversation: conversation(1), up_to: Pseq::FIRST, time: now() };
        owed.settle(ack);
        assert!(woken());
        assert_eq!(owed.take_control().receipts, [receipt(301, 1, 6)], "along with something else");
        owed.receipt(receipt(300, 1, 7));
        assert!(woken(), "what the user did elsewhere");
        owed.prefer(conversation(2));
        owed.receipt(receipt(301, 2, 1));
        assert!(woken(), "on screen");
    }

    #[test]
    fn an_own_record_is_not_owed_when_its_ack_stands_for_it() {
        let ring = Arc::new(Ring::new(RingLimits { records: 8, bytes: 1_000 }));
        let acked = |n| Settled::Acked {
            conversation: conversation(1),
            pseq: Pseq::new(n).unwrap(),
            seq: seq(n),
            time: now(),
        };
        let (owed, plain) = (owed().acks_are_echoes(true), owed());
        let said = |n, own: bool| {
            push(&ring, n);
            for owed in [&owed, &plain] {
                if own {
                    owed.settle(acked(n));
                }
                owed.publish(conversation(1), seq(n), &ring, true);
            }
        };
        said(3, true);
        assert_eq!((live(&owed), live(&plain)), (vec![], vec![3]));
        said(4, false);
        assert_eq!((live(&owed), live(&plain)), (vec![4], vec![4]));
        said(5, true);
        said(6, true);
        said(7, false);
        assert_eq!((live(&owed), live(&plain)), (vec![7], vec![5, 6, 7]));
        said(8, false);
        said(9, true);
        assert_eq!(live(&owed), [8, 9], "what is owed already goes on in order");
        // An older ack of the same conversation, as an answer to a repeated send, stands for nothing new.
        owed.settle(acked(3));
        said(10, false);
        assert_eq!(live(&owed), [10]);
        // A resume that finds the device further behind brings it all.
        said(11, true);
        owed.resume(conversation(1), seq(10), false, head(11));
        assert_eq!(live(&owed), [10, 11]);
    }

    #[test]
    fn live_records_come_once_and_in_order() {
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 8, bytes: 1_000 })));
        for n in 5..=7 {
            push(&ring, n);
            owed.publish(conversation(1), seq(n), &ring, true);
        }
        assert_eq!(live(&owed), [5, 6, 7]);
        assert_eq!(live(&owed), [0u64; 0]);
        push(&ring, 8);
        owed.publish(conversation(1), seq(8), &ring, true);
        assert_eq!(live(&owed), [8]);
    }

    #[test]
    fn a_resume_behind_the_ring_reads_the_log_and_then_goes_on_live() {
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 4, bytes: 1_000 })));
        for n in 1..=10 {
            push(&ring, n);
        }
        owed.publish(conversation(1), seq(10), &ring, true);
        owed.resume(conversation(1), seq(3), false, head(10));
        assert_eq!(live(&owed), [0u64; 0], "3 is not in the ring");
        assert_eq!(owed.take_backlog(), Some((conversation(1), seq(3), seq(10))));
        push(&ring, 11);
        owed.publish(conversation(1), seq(11), &ring, true);
        assert_eq!(live(&owed), [0u64; 0], "live records wait for the backlog of their conversation");
        owed.backlog_written(conversation(1), seq(8));
        assert_eq!(live(&owed), [8, 9, 10, 11]);
        assert_eq!(owed.take_backlog(), None);
    }

    #[test]
    fn who_is_far_behind_pulls_and_then_goes_on_live() {
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 4, bytes: 1_000 })));
        owed.resume(conversation(1), seq(1), false, head(500));
        assert_eq!(owed.take_control().heads, [head(500)]);
        assert_eq!(owed.take_backlog(), None);
        push(&ring, 501);
        owed.publish(conversation(1), seq(501), &ring, true);
        assert_eq!(live(&owed), [0u64; 0]);
        owed.pulled(conversation(1), seq(450), seq(501));
        assert_eq!(live(&owed), [0u64; 0], "a page of the newest leaves a hole before it");
        owed.pulled(conversation(1), seq(1), seq(400));
        assert_eq!(owed.take_control().heads.len(), 1, "not there yet: the head is told again");
        owed.pulled(conversation(1), seq(400), seq(501));
        assert_eq!(live(&owed), [501]);
    }

    #[test]
    fn a_reader_that_falls_behind_while_connected_costs_a_position_only() {
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 4, bytes: 1_000 })));
        for n in 1..=50 {
            push(&ring, n);
            owed.publish(conversation(1), seq(n), &ring, true);
        }
        assert_eq!(live(&owed), [0u64; 0]);
        assert_eq!(owed.take_backlog(), Some((conversation(1), seq(1), seq(50))));
        owed.backlog_written(conversation(1), seq(51));
        for n in 51..=250 {
            push(&ring, n);
            owed.publish(conversation(1), seq(n), &ring, true);
        }
        assert_eq!(live(&owed), [0u64; 0]);
        assert_eq!(owed.take_backlog(), None, "200 behind is too far for the backlog stream");
        let heads = owed.take_control().heads;
        assert_eq!((heads.len(), heads[0].head), (1, seq(250)));
    }

    #[test]
    fn a_large_conversation_is_told_by_its_head_unless_it_is_on_screen() {
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 8, bytes: 1_000 })));
        let mut told = HashMap::new();
        for n in 1..=3 {
            push(&ring, n);
            owed.publish(conversation(1), seq(n), &ring, false);
        }
        assert_eq!(live(&owed), [0u64; 0]);
        owed.remind_heads(&mut told);
        assert_eq!(owed.take_control().heads[0].head, seq(3));
        owed.remind_heads(&mut told);
        assert_eq!(owed.take_control().heads, [], "nothing new to tell");
        owed.pulled(conversation(1), seq(1), seq(4));
        owed.prefer(conversation(1));
        push(&ring, 4);
        owed.publish(conversation(1), seq(4), &ring, false);
        assert_eq!(live(&owed), [4]);
    }

    #[test]
    fn resume_of_what_is_complete_owes_nothing() {
        let owed = owed();
        owed.resume(conversation(1), seq(11), false, head(10));
        assert_eq!((live(&owed).len(), owed.take_backlog(), owed.waiting()), (0, None, 0));
    }

    #[test]
    fn a_gap_is_told_by_the_log_even_if_nothing_else_is_missed() {
        let (owed, ring) = (owed(), Arc::new(Ring::new(RingLimits { records: 8, bytes: 1_000 })));
        for n in 1..=8 {
            push(&ring, n);
        }
        owed.publish(conversation(1), seq(8), &ring, true);
        owed.resume(conversation(1), seq(6), true, head(8));
        assert_eq!(live(&owed), [0u64; 0], "the ring has 6, but can't say that 5 is gone");
        assert_eq!(owed.take_backlog(), Some((conversation(1), seq(6), seq(8))));
        owed.backlog_written(conversation(1), seq(7));
        assert_eq!(live(&owed), [7, 8]);
        owed.resume(conversation(1), seq(9), true, head(8));
        assert_eq!(owed.take_backlog(), Some((conversation(1), seq(9), seq(8))), "everything is gone");
        owed.backlog_written(conversation(1), seq(9));
        assert_eq!((live(&owed).len(), owed.take_backlog()), (0, None));
        push(&ring, 9);
        owed.publish(conversation(1), seq(9), &ring, true);
        assert_eq!(live(&owed), [9]);
    }

    #[test]
    fn a_new_beginning_is_told_once_and_forgets_no_head() {
        let owed = owed();
        owed.resume(conversation(1), seq(1), false, head(500));
        owed.trimmed(Head { low: seq(40), ..head(480) });
        owed.trimmed(Head { low: seq(30), ..head(490) });
        assert_eq!(owed.take_control().heads, [Head { low: seq(40), ..head(500) }]);
    }

    #[test]
    fn events_are_bounded_and_newest_wins() {
        let owed = owed();
        let event = |sender: u64, number| Event {
            conversation: conversation(1),
            kind: EventKind::Typing,
            sender: UserId::new(sender).unwrap(),
            number,
            ttl_ms: 1_000,
            payload: Bytes::new(),
        };
        owed.event(event(1, 2));
        owed.event(event(1, 3));
        owed.event(event(1, 1));
        assert_eq!(owed.take_control().events, [event(1, 3)]);
        for sender in 0..200 {
            owed.event(event(sender, 1));
        }
        assert_eq!(owed.take_control().events.len(), EVENTS_MAX);
        assert_eq!(owed.take_events_dropped(), 200 - EVENTS_MAX as u64);
    }
}

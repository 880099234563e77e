//! One race for a connection: what to try when (pure; the driver makes the attempts and brings the time).
//!
//! - Candidates are the gateway's addresses by QUIC, TLS and WebSocket. Addresses begin [`STAGGER`] apart, the one that
//!   won here last first; TLS joins at 240 ms, WebSocket at 750 ms (both later on a slow network on which QUIC won last, up to [`SLOW_MAX`]), the
//!   stream transport that won here last before the other. Where UDP was found blocked, the streams begin at once and QUIC is tried beside them ([`Udp`]).
//! - **The first answer to a HELLO wins**, not the first handshake: what is lost right behind a quick handshake is repeated
//!   late. An attempt is *connected* when its handshake is complete, *asked* when the HELLO has left on it.
//! - At most [`UNDER_WAY_MAX`] candidates are under way. Of QUIC a candidate may have more attempts, at the same address: the
//!   next one when the last is *overdue*, because a lost packet of a handshake, or of what follows it, is repeated late. They
//!   end with their candidate.
//! - A complete handshake shows that somebody is there: other candidates that were not tried yet wait [`HOLD`] longer.
//! - A failure starts the next candidate at once. When all were tried and some are still under way, tries go on each
//!   second for [`AGAIN_FOR`], one of QUIC and one of a stream: an attempt's own packets come ever more rarely, and a
//!   gateway that has just come back is found sooner by a new one. An attempt is given up when it is [`ATTEMPT_MAX`]
//!   old, which is how a race ends that nobody answers.
//! - When a stream wins, QUIC attempts under way go on for [`PROBE_MAX`]: whether one's handshake gets through is the only
//!   proof that UDP is blocked or not ([`Race::verdict`]); dropping the race earlier only leaves that open.
//!
//! Not here: sockets (`transport`), what is kept of a network (`networks`), when to race (`state`).

use std::{cmp::Reverse, time::Duration};

use serde::{Deserialize, Serialize};

/// From one address to the next.
const STAGGER: Duration = Duration::from_millis(240);

/// When the streams join where QUIC goes first, and where they go first.
const SECOND_AT: Duration = Duration::from_millis(240);
const THIRD_AT: Duration = Duration::from_millis(750);

/// The streams join one and a half round trips after QUIC where it won last, but not later than this.
const SLOW_MAX: Duration = Duration::from_millis(1_500);

/// Candidates under way at once.
pub(crate) const UNDER_WAY_MAX: usize = 3;

/// A candidate that is silent for so long makes room for one that was not tried yet.
const PATIENCE: Duration = Duration::from_millis(1_500);

/// From one try to the next when all were tried.
const AGAIN_EVERY: Duration = Duration::from_secs(1);

/// No try begins later, unless its candidate was not tried yet.
const AGAIN_FOR: Duration = Duration::from_secs(4);

/// What one attempt may take to its handshake, and from there to its answer.
const ATTEMPT_MAX: Duration = Duration::from_secs(4);
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How much longer other candidates wait once a handshake is complete.
const HOLD: Duration = Duration::from_secs(1);

/// Attempts that may follow the first one of a candidate of QUIC.
const FOLLOWERS: u8 = 2;

/// A handshake is overdue after what it usually takes (a round trip, where that is not known) and an eighth of that, or three of the round trip's
/// variations, or this more, but never sooner than that.
const OVERDUE_MORE: Duration = Duration::from_millis(20);
const OVERDUE_MIN: Duration = Duration::from_millis(75);

/// An answer may take so much more than the round trip, or come so much later than the handshake when it was asked for in early data: who has many clients coming back writes and reads for each.
const ANSWER_MORE: Duration = Duration::from_millis(100);

/// The round trip to expect where none was measured.
pub(crate) const RTT_UNKNOWN: Duration = Duration::from_millis(200);

/// How long QUIC may go on when a stream has won: a lost first packet is repeated within.
const PROBE_MAX: Duration = Duration::from_secs(2);

/// Addresses that take part.
const ADDRESSES_MAX: usize = 8;

/// A way to the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Transport {
    /// QUIC over UDP.
    Quic,
    /// TLS over TCP.
    Tls,
    /// WebSocket over TLS over TCP.
    WebSocket,
}

impl From<Transport> for crate::event::TransportKind {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Quic => Self::Quic,
            Transport::Tls => Self::Tls,
            Transport::WebSocket => Self::WebSocket,
        }
    }
}

/// Who won a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Win {
    /// The way.
    pub(crate) transport: Transport,
    /// Which of the gateway's addresses.
    pub(crate) address: u8,
}

/// How to treat UDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Udp {
    /// It works, as far as is known: QUIC goes first.
    #[default]
    First,
    /// It was blocked some time ago: QUIC and a stream begin together.
    Beside,
    /// It was blocked a moment ago: a stream goes first, QUIC joins.
    Later,
}

/// What a race showed of UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// An answer came over UDP.
    Works,
    /// A stream got through, and QUIC did not in the time it was given.
    Blocked,
}

/// What is known of the network the race is on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// The round trip to expect.
    pub(crate) rtt: Option<Duration>,
    /// What a handshake of QUIC took; zero: not known.
    pub(crate) handshake: Duration,
    /// How much longer either may well be.
    pub(crate) spread: Duration,
    /// How UDP fared.
    pub(crate) udp: Udp,
    /// Who won before, the newest first.
    pub(crate) wins: Vec<Win>,
}

/// Names an attempt of one race.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct AttemptId(u32);

/// What the driver has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Begin an attempt.
    Start {
        /// Its name, for [`Race::connected`], [`Race::won`] and [`Race::failed`].
        id: AttemptId,
        /// By which way.
        transport: Transport,
        /// To which of the addresses, by its place in the list the race was made with.
        address: usize,
    },
    /// Give an attempt up; nothing has to be said of it any more.
    Stop(AttemptId),
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    transport: Transport,
    address: usize,
}

#[derive(Clone, Copy, Debug)]
struct Attempt {
    id: AttemptId,
    candidate: usize,
    began: Duration,
    /// When its handshake was complete.
    connected: Option<Duration>,
    /// When the HELLO left on it.
    asked: Option<Duration>,
    second: bool,
    /// How many more its candidate may have, after this one.
    followers: u8,
}

impl Attempt {
    /// Since when the gateway's next sign is waited for; `None`: we are to speak.
    fn waits_since(&self) -> Option<Duration> {
        match (self.connected, self.asked) {
            (None, _) => Some(self.began),
            (Some(connected), Some(asked)) => Some(connected.max(asked)),
            (Some(_), None) => None,
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Race {
    /// In the order in which they are tried.
    candidates: Vec<Candidate>,
    /// When those that were not tried yet are due; the first of them is `tried`.
    due: Vec<Duration>,
    tried: usize,
    /// The next ones to be tried again: of QUIC, and of the streams.
    turns: [usize; 2],
    again_at: Duration,
    again_until: Duration,
    under_way: Vec<Attempt>,
    /// The round trip to expect, what a handshake takes, and how much longer either may well be.
    rtt: Duration,
    handshake: Duration,
    spread: Duration,
    attempt_max: Duration,
    next_id: u32,
    winner: Option<Win>,
    probe_until: Option<Duration>,
    quic_tried: bool,
    verdict: Option<Verdict>,
}

impl Race {
    /// A race that begins now, to the first of so many addresses (at most 8 take part) by the ways that are `offered`.
    pub(crate) fn new(addresses: usize, offered: &[Transport], memory: &Memory, now: Duration) -> Self {
        let rtt = memory.rtt.unwrap_or(RTT_UNKNOWN);
        // No handshake is shorter than a round trip: one measurement that met a loss does not make a network slow.
        let handshake = if memory.handshake.is_zero() { rtt } else { memory.handshake };
        let rtt = rtt.min(handshake);
        let mut order: Vec<usize> = (0..addresses.min(ADDRESSES_MAX)).collect();
        let place = |address: usize| {
            memory.wins.iter().position(|win| usize::from(win.address) == address).unwrap_or(usize::MAX)
        };
        order.sort_by_key(|address| place(*address));
        let mut plan = Vec::new();
        for (transport, joins) in joins(offered, memory) {
            for (place, address) in (0u32..).zip(&order) {
                plan.push((joins + STAGGER * place, Candidate { transport, address: *address }));
            }
        }
        // Stable: of those that are due together, the way that joined first.
        plan.sort_by_key(|(due, _)| *due);
        Self {
            due: plan.iter().map(|(due, _)| now.saturating_add(*due)).collect(),
            candidates: plan.into_iter().map(|(_, candidate)| candidate).collect(),
            tried: 0,
            turns: [0, 0],
            again_at: Duration::MAX,
            again_until: now.saturating_add(AGAIN_FOR),
            under_way: Vec::new(),
            rtt,
            handshake,
            spread: memory.spread.min(handshake),
            attempt_max: ATTEMPT_MAX.max(rtt * 5),
            next_id: 0,
            winner: None,
            probe_until: None,
            quic_tried: false,
            verdict: None,
        }
    }

    /// What is due. To be asked until nothing comes, after everything that happened and when [`Self::poll_timeout`] says.
    pub(crate) fn poll(&mut self, now: Duration) -> Vec<Step> {
        let mut steps = Vec::new();
        self.give_up_old(now, &mut steps);
        if self.winner.is_some() {
            return steps;
        }
        self.start_due(now, &mut steps);
        self.start_followers(now, &mut steps);
        self.start_again(now, &mut steps);
        steps
    }

    /// When [`Self::poll`] has something to do next if nothing happens.
    pub(crate) fn poll_timeout(&self) -> Option<Duration> {
        let ends = self.under_way.iter().filter_map(|attempt| self.ends_at(attempt)).min();
        if self.winner.is_some() {
            return self.probe_until.filter(|_| !self.under_way.is_empty()).into_iter().chain(ends).min();
        }
        let next = self.next_due().map(|due| match self.candidates_under_way() < UNDER_WAY_MAX {
            true => due,
            false => self.oldest().map_or(Duration::MAX, |(_, at)| at.saturating_add(PATIENCE)).max(due),
        });
        let second = self.under_way.iter().filter_map(|attempt| self.follower_at(attempt)).min();
        let again = [true, false].into_iter().find_map(|quic| self.next_turn(quic)).map(|_| self.again_at);
        [ends, next, second, again].into_iter().flatten().min()
    }

    /// An attempt failed: what comes next comes at once. `answered`: the gateway said so itself (it refused, or its
    /// certificate was not believed), the way there is open.
    pub(crate) fn failed(&mut self, id: AttemptId, answered: bool, now: Duration) {
        let Some(attempt) = self.take(id) else { return };
        if answered && self.transport(attempt.candidate) == Some(Transport::Quic) {
            self.verdict = Some(Verdict::Works);
        }
        if self.winner.is_some() {
            self.judge_when_over();
            return;
        }
        if let Some(early) = self.next_due().and_then(|due| due.checked_sub(now)) {
            for due in self.due.iter_mut().skip(self.tried) {
                *due = due.saturating_sub(early);
            }
        }
    }

    /// The handshake of an attempt is complete. Whether it is of use: a HELLO may leave on it.
    pub(crate) fn connected(&mut self, id: AttemptId, now: Duration) -> bool {
        let Some(at) = self.under_way.iter().position(|attempt| attempt.id == id) else { return false };
        let quic = self.under_way.get(at).and_then(|a| self.transport(a.candidate)) == Some(Transport::Quic);
        if quic {
            self.verdict = Some(Verdict::Works);
        }
        if self.winner.is_some() {
            // Only QUIC goes on after a win, and one answer says it all.
            self.take(id);
            self.probe_until = Some(now);
            return false;
        }
        let Some(attempt) = self.under_way.get_mut(at) else { return false };
        attempt.connected = Some(now);
        if quic {
            self.rtt = self.rtt.min(now.saturating_sub(attempt.began));
        }
        let held = now.saturating_add(HOLD);
        for due in self.due.iter_mut().skip(self.tried) {
            *due = held.max(*due);
        }
        self.again_at = self.again_at.max(now.saturating_add(AGAIN_EVERY));
        true
    }

    /// The HELLO has left on an attempt; in early data that is before it is connected.
    pub(crate) fn asked(&mut self, id: AttemptId, now: Duration) {
        if let Some(attempt) = self.under_way.iter_mut().find(|attempt| attempt.id == id) {
            attempt.asked = Some(now);
        }
    }

    /// The HELLO was answered on an attempt. `Some`: it is the winner, to be used and to be remembered, and [`Self::poll`] says
    /// which others to stop.
    pub(crate) fn won(&mut self, id: AttemptId, now: Duration) -> Option<Win> {
        let attempt = self.take(id)?;
        let Candidate { transport, address } = self.candidates.get(attempt.candidate).copied()?;
        if transport == Transport::Quic {
            self.verdict = Some(Verdict::Works);
        }
        if self.winner.is_some() {
            self.probe_until = Some(now);
            return None;
        }
        let win = Win { transport, address: u8::try_from(address).unwrap_or(u8::MAX) };
        self.winner = Some(win);
        let known = self.verdict.is_some();
        self.probe_until =
            Some(if known { now } else { now.saturating_add(PROBE_MAX.max(self.rtt.saturating_mul(2))) });
        self.judge_when_over();
        Some(win)
    }

    /// Whether nothing is under way and nothing will be: without a winner, nobody could be reached.
    pub(crate) fn is_over(&self) -> bool {
        self.under_way.is_empty() && (self.winner.is_some() || self.next_due().is_none())
    }

    /// What the race showed of UDP; `None` as long as that is open.
    pub(crate) const fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// Takes an attempt out of those under way.
    fn take(&mut self, id: AttemptId) -> Option<Attempt> {
        let at = self.under_way.iter().position(|attempt| attempt.id == id)?;
        let attempt = self.under_way.swap_remove(at);
        self.promote();
        Some(attempt)
    }

    /// Of a candidate whose first attempt is gone the next one stands for it.
    fn promote(&mut self) {
        let mut firsts: Vec<usize> = self
            .under_way
            .iter()
            .filter(|attempt| !attempt.second)
            .map(|attempt| attempt.candidate)
            .collect();
        self.under_way.sort_by_key(|attempt| attempt.began);
        for attempt in &mut self.under_way {
            if attempt.second && !firsts.contains(&attempt.candidate) {
                attempt.second = false;
                firsts.push(attempt.candidate);
            }
        }
    }

    fn next_due(&self) -> Option<Duration> {
        self.due.get(self.tried).copied()
    }

    fn transport(&self, candidate: usize) -> Option<Transport> {
        self.candidates.get(candidate).map(|candidate| candidate.transport)
    }

    fn candidates_under_way(&self) -> usize {
        self.under_way.iter().filter(|attempt| !attempt.second).count()
    }

    /// The candidate that is silent for the longest, and since when.
    fn oldest(&self) -> Option<(usize, Duration)> {
        let answers = |candidate| {
            self.under_way.iter().any(|attempt| attempt.candidate == candidate && attempt.connected.is_some())
        };
        self.under_way
            .iter()
            .filter(|attempt| !attempt.second && !answers(attempt.candidate))
            .map(|attempt| (attempt.candidate, attempt.began))
            .min_by_key(|(_, began)| *began)
    }

    /// When an attempt is given up.
    fn ends_at(&self, attempt: &Attempt) -> Option<Duration> {
        let max = if attempt.connected.is_some() { ANSWER_MAX } else { self.attempt_max };
        attempt.waits_since().map(|since| since.saturating_add(max))
    }

    /// Attempts that were silent for too long, and after a win those that have no say any more.
    fn give_up_old(&mut self, now: Duration, steps: &mut Vec<Step>) {
        let over = self.probe_until.is_some_and(|until| until <= now);
        let won = self.winner.is_some();
        let before = self.under_way.len();
        let (keep, stop): (Vec<Attempt>, Vec<Attempt>) =
            std::mem::take(&mut self.under_way).into_iter().partition(|attempt| {
                let quic = self.transport(attempt.candidate) == Some(Transport::Quic);
                let old = self.ends_at(attempt).is_some_and(|at| at <= now);
                !old && !(won && (over || !quic))
            });
        steps.extend(stop.iter().map(|attempt| Step::Stop(attempt.id)));
        self.under_way = keep;
        self.promote();
        if self.under_way.len() < before || over {
            self.judge_when_over();
        }
    }

    fn judge_when_over(&mut self) {
        let stream_won = self.winner.is_some_and(|win| win.transport != Transport::Quic);
        let silent = !self.under_way.iter().any(|a| self.transport(a.candidate) == Some(Transport::Quic));
        if stream_won && silent && self.quic_tried && self.verdict.is_none() {
            self.verdict = Some(Verdict::Blocked);
        }
    }

    fn start_due(&mut self, now: Duration, steps: &mut Vec<Step>) {
        while self.next_due().is_some_and(|due| due <= now) {
            if self.candidates_under_way() >= UNDER_WAY_MAX && !self.make_room(now, steps) {
                return;
            }
            let quic = self.transport(self.tried) == Some(Transport::Quic);
            self.start(self.tried, false, if quic { FOLLOWERS } else { 0 }, now, steps);
            self.tried += 1;
            self.again_at = now.saturating_add(AGAIN_EVERY);
        }
    }

    /// Gives up the candidate that is silent for the longest, if that is long enough.
    fn make_room(&mut self, now: Duration, steps: &mut Vec<Step>) -> bool {
        let Some((oldest, since)) = self.oldest() else { return false };
        if now < since.saturating_add(PATIENCE) {
            return false;
        }
        self.under_way.retain(|attempt| {
            let keep = attempt.candidate != oldest;
            if !keep {
                steps.push(Step::Stop(attempt.id));
            }
            keep
        });
        true
    }

    /// When an attempt is overdue, and its candidate gets the next one.
    fn follower_at(&self, attempt: &Attempt) -> Option<Duration> {
        let since = attempt.waits_since().filter(|_| attempt.followers > 0)?;
        let (usual, least) = match (attempt.connected, attempt.asked) {
            (None, _) => (self.handshake, OVERDUE_MORE),
            // In early data: the answer comes right behind the handshake.
            (Some(connected), Some(asked)) if asked < connected => (Duration::ZERO, ANSWER_MORE),
            _ => (self.rtt, ANSWER_MORE),
        };
        let more = (usual / 8).max(self.spread).max(least);
        Some(since.saturating_add(usual.saturating_add(more).max(OVERDUE_MIN)))
    }

    fn start_followers(&mut self, now: Duration, steps: &mut Vec<Step>) {
        let due: Vec<(AttemptId, usize)> = self
            .under_way
            .iter()
            .filter(|attempt| self.follower_at(attempt).is_some_and(|at| at <= now))
            .map(|attempt| (attempt.id, attempt.candidate))
            .collect();
        for (id, candidate) in due {
            let before = self.under_way.iter_mut().find(|attempt| attempt.id == id);
            let followers = before.map_or(0, |attempt| std::mem::take(&mut attempt.followers));
            self.start(candidate, true, followers.saturating_sub(1), now, steps);
        }
    }

    /// The candidate of QUIC, or of the streams, to be tried again next: one that is not under way when there is room, or
    /// one with several attempts, of which the oldest that is silent is given up. `None`: no more tries.
    fn next_turn(&self, quic: bool) -> Option<usize> {
        // When nothing is under way, everything failed, and the back-off decides when to try again.
        if self.next_due().is_some() || self.under_way.is_empty() || self.again_at > self.again_until {
            return None;
        }
        let room = self.candidates_under_way() < UNDER_WAY_MAX;
        let [quic_turn, stream_turn] = self.turns;
        let turn = if quic { quic_turn } else { stream_turn };
        let all = self.candidates.len();
        (0..all).map(|step| (turn + step) % all).find(|candidate| {
            let wanted = (self.transport(*candidate) == Some(Transport::Quic)) == quic;
            wanted
                && match self.under_way.iter().filter(|attempt| attempt.candidate == *candidate).count() {
                    0 => room,
                    attempts => attempts > 1 && self.silent(*candidate).is_some(),
                }
        })
    }

    /// The oldest attempt of a candidate whose handshake is not complete.
    fn silent(&self, candidate: usize) -> Option<AttemptId> {
        let silent = |attempt: &&Attempt| attempt.candidate == candidate && attempt.connected.is_none();
        self.under_way.iter().filter(silent).min_by_key(|attempt| attempt.began).map(|attempt| attempt.id)
    }

    fn start_again(&mut self, now: Duration, steps: &mut Vec<Step>) {
        if now < self.again_at {
            return;
        }
        let mut any = false;
        for quic in [true, false] {
            let Some(candidate) = self.next_turn(quic) else { continue };
            let [quic_turn, stream_turn] = &mut self.turns;
            *(if quic { quic_turn } else { stream_turn }) = (candidate + 1) % self.candidates.len();
            if let Some(older) = self.silent(candidate) {
                steps.push(Step::Stop(older));
                self.take(older);
            }
            let others = self.under_way.iter().any(|attempt| attempt.candidate == candidate);
            self.start(candidate, others, 0, now, steps);
            any = true;
        }
        if any {
            self.again_at = now.saturating_add(AGAIN_EVERY);
        }
    }

    fn start(&mut self, candidate: usize, second: bool, followers: u8, now: Duration, steps: &mut Vec<Step>) {
        let Some(Candidate { transport, address }) = self.candidates.get(candidate).copied() else { return };
        let id = AttemptId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.quic_tried |= transport == Transport::Quic;
        let (connected, asked) = (None, None);
        self.under_way.push(Attempt { id, candidate, began: now, connected, asked, second, followers });
        steps.push(Step::Start { id, transport, address });
    }
}

/// The ways that are offered, and when their first address is due.
fn joins(offered: &[Transport], memory: &Memory) -> Vec<(Transport, Duration)> {
    let mut streams: Vec<Transport> = [Transport::Tls, Transport::WebSocket]
        .into_iter()
        .filter(|transport| offered.contains(transport))
        .collect();
    // Sorting is stable: TLS before WebSocket unless that won here later.
    streams.sort_by_key(|transport| {
        let won = memory.wins.iter().position(|win| win.transport == *transport);
        Reverse(won.map_or(0, |place| usize::MAX - place))
    });
    let quic = offered.contains(&Transport::Quic).then_some(Transport::Quic);
    let mut streams = streams.into_iter();
    let (one, two) = (streams.next(), streams.next());
    // Where QUIC won last, it is given what a first answer is known to take here: a stream that joins a slow race is not needed.
    let quic_won = memory.wins.first().is_some_and(|win| win.transport == Transport::Quic);
    let slow = memory.rtt.filter(|_| quic_won).map_or(Duration::ZERO, |rtt| rtt.saturating_mul(3) / 2);
    let second = SECOND_AT.max(slow.min(SLOW_MAX));
    let ways = match memory.udp {
        Udp::First => [(quic, Duration::ZERO), (one, second), (two, second + (THIRD_AT - SECOND_AT))],
        Udp::Beside => [(quic, Duration::ZERO), (one, Duration::ZERO), (two, THIRD_AT)],
        Udp::Later => [(one, Duration::ZERO), (quic, SECOND_AT), (two, THIRD_AT)],
    };
    let ways: Vec<_> = ways.into_iter().filter_map(|(way, at)| Some((way?, at))).collect();
    // Whoever is missing is not waited for.
    let first = ways.iter().map(|(_, at)| *at).min().unwrap_or_default();
    ways.into_iter().map(|(way, at)| (way, at.saturating_sub(first))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Transport::*, *};

    const MS: fn(u64) -> Duration = Duration::from_millis;
    const ALL: [Transport; 3] = [Quic, Tls, WebSocket];

    fn win(transport: Transport, address: u8) -> Win {
        Win { transport, address }
    }

    /// What becomes of an attempt: after so many milliseconds it succeeds, fails, or never says anything.
    #[derive(Clone, Copy, Debug)]
    enum Fate {
        Succeeds(u64),
        Fails(u64),
        /// Its handshake is complete, and what is asked then is answered so much later, if at all.
        Connects(u64, Option<u64>),
        Silent,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum News {
        Connected,
        Won,
        Failed,
    }

    /// What one race came to.
    #[derive(Debug, Default)]
    struct Told {
        started: Vec<(u64, Transport, usize)>,
        stopped: Vec<(u64, AttemptId)>,
        won: Option<(u64, Win)>,
        probes: usize,
        verdict: Option<Verdict>,
        over_at: u64,
    }

    /// Runs a race to its end, with the driver's part played by a table.
    fn run(race: &mut Race, fate: impl Fn(Transport, usize, usize) -> Fate) -> Told {
        let mut told = Told::default();
        let mut events: Vec<(Duration, AttemptId, News)> = Vec::new();
        let mut now = Duration::ZERO;
        for _ in 0..10_000 {
            for step in race.poll(now) {
                let at = u64::try_from(now.as_millis()).unwrap();
                match step {
                    Step::Start { id, transport, address } => {
                        let nth =
                            told.started.iter().filter(|(_, t, a)| (*t, *a) == (transport, address)).count();
                        told.started.push((at, transport, address));
                        match fate(transport, address, nth) {
                            Fate::Succeeds(ms) => {
                                events.extend([
                                    (now + MS(ms), id, News::Connected),
                                    (now + MS(ms), id, News::Won),
                                ]);
                            }
                            Fate::Fails(ms) => events.push((now + MS(ms), id, News::Failed)),
                            Fate::Connects(ms, answer) => {
                                events.push((now + MS(ms), id, News::Connected));
                                events.extend(answer.map(|more| (now + MS(ms + more), id, News::Won)));
                            }
                            Fate::Silent => {}
                        }
                    }
                    Step::Stop(id) => {
                        events.retain(|(_, other, _)| *other != id);
                        told.stopped.push((at, id));
                    }
                }
            }
            assert!(race.candidates_under_way() <= UNDER_WAY_MAX);
            told.over_at = u64::try_from(now.as_millis()).unwrap();
            if race.is_over() {
                told.verdict = race.verdict();
                assert_eq!(race.poll_timeout(), None);
                return told;
            }
            events.sort_by_key(|(at, ..)| *at);
            let timeout = race.poll_timeout();
            let due = events.first().copied().filter(|(at, ..)| timeout.is_none_or(|timeout| *at <= timeout));
            match due {
                Some((at, id, News::Connected)) => {
                    events.remove(0);
                    now = at;
                    if race.connected(id, now) {
                        race.asked(id, now);
                    } else {
                        events.retain(|(_, other, _)| *other != id);
                        told.probes += 1;
                    }
                }
                Some((at, id, News::Won)) => {
                    events.remove(0);
                    now = at;
                    let win = race.won(id, now).expect("it was stopped before");
                    told.won = Some((u64::try_from(now.as_millis()).unwrap(), win));
                }
                Some((at, id, News::Failed)) => {
                    events.remove(0);
                    now = at;
                    race.failed(id, false, now);
                }
                None => {
                    let timeout = timeout.expect("a race that is not over waits for something");
                    assert!(timeout > now, "{now:?}: nothing was done at {timeout:?}: {race:?}");
                    now = timeout;
                }
            }
        }
        panic!("it does not end: {race:?}");
    }

    fn race(addresses: usize, memory: &Memory) -> Race {
        Race::new(addresses, &ALL, memory, Duration::ZERO)
    }

    fn known(udp: Udp, wins: &[Win]) -> Memory {
        Memory { rtt: Some(MS(100)), udp, wins: wins.to_vec(), ..Memory::default() }
    }

    #[test]
    fn streams_join_later_where_quic_won_and_answers_are_known_to_be_slow() {
        let joined = |rtt: Option<u64>, wins: &[Win]| {
            let memory = Memory { rtt: rtt.map(MS), wins: wins.to_vec(), ..Memory::default() };
            let told = run(&mut race(1, &memory), |_, _, _| Fate::Silent);
            let of = |way| told.started.iter().find(|(_, t, _)| *t == way).map(|(at, ..)| *at);
            (of(Tls), of(WebSocket))
        };
        let usual = (Some(240), Some(750));
        assert_eq!(joined(None, &[]), usual);
        assert_eq!(joined(Some(100), &[win(Quic, 0)]), usual);
        assert_eq!(joined(Some(600), &[win(Quic, 0)]), (Some(900), Some(1_410)));
        assert_eq!(joined(Some(9_000), &[win(Quic, 0)]), (Some(1_500), Some(2_010)), "not for ever");
        assert_eq!(joined(Some(600), &[]), usual, "QUIC was never seen to work here");
        assert_eq!(joined(Some(600), &[win(Tls, 0), win(Quic, 0)]), usual, "or not lately");
    }

    #[test]
    fn a_clean_network_starts_one_attempt() {
        let told = run(&mut race(2, &Memory::default()), |_, _, _| Fate::Succeeds(100));
        assert_eq!(told.started, [(0, Quic, 0)]);
        assert_eq!((told.won, told.verdict), (Some((100, win(Quic, 0))), Some(Verdict::Works)));
        assert_eq!(told.over_at, 100);
    }

    #[test]
    fn udp_blocked_and_not_known_tls_starts_at_240_ms() {
        // TLS takes two round trips of 100 ms.
        let blocked = |transport, _, _| match transport {
            Quic => Fate::Silent,
            _ => Fate::Succeeds(200),
        };
        for (memory, second) in [(Memory::default(), 225), (known(Udp::First, &[]), 120)] {
            let told = run(&mut race(1, &memory), blocked);
            let mut want = vec![(0, Quic, 0), (240, Tls, 0), (second, Quic, 0)];
            want.extend((second * 2 < 440).then_some((second * 2, Quic, 0)));
            want.sort_by_key(|(at, ..)| *at);
            assert_eq!(told.started, want);
            assert_eq!(told.won, Some((440, win(Tls, 0))));
            assert_eq!(told.verdict, Some(Verdict::Blocked));
            assert_eq!(told.over_at, 2_440, "QUIC was given its time");
        }
    }

    #[test]
    fn udp_blocked_and_remembered_tls_starts_at_once() {
        for (udp, wins, want) in [
            (Udp::Later, vec![win(Tls, 0)], vec![(0, Tls, 0)]),
            (Udp::Later, vec![], vec![(0, Tls, 0)]),
            (Udp::Later, vec![win(WebSocket, 0), win(Tls, 0)], vec![(0, WebSocket, 0)]),
            (Udp::Later, vec![win(Quic, 0), win(WebSocket, 0)], vec![(0, WebSocket, 0)]),
            (Udp::Beside, vec![win(Tls, 0)], vec![(0, Quic, 0), (0, Tls, 0)]),
        ] {
            let told = run(&mut race(1, &known(udp, &wins)), |transport, _, _| match transport {
                Quic => Fate::Silent,
                _ => Fate::Succeeds(200),
            });
            assert_eq!(told.started[..want.len()], want, "{udp:?}, {wins:?}");
            assert!(told.started[want.len()..].iter().all(|(at, ..)| *at == 120), "QUIC again: {told:?}");
            assert_eq!(told.won.unwrap().0, 200);
            let verdict = (udp == Udp::Beside).then_some(Verdict::Blocked);
            assert_eq!(told.verdict, verdict, "{udp:?}: what was not tried says nothing");
        }
    }

    #[test]
    fn udp_that_works_again_is_found_out_beside() {
        // Together: QUIC is faster.
        let told =
            run(&mut race(1, &known(Udp::Beside, &[win(Tls, 0)])), |transport, _, _| match transport {
                Quic => Fate::Succeeds(100),
                _ => Fate::Succeeds(200),
            });
        assert_eq!((told.won.unwrap().1, told.verdict), (win(Quic, 0), Some(Verdict::Works)));
        // Its first packet was lost: TLS wins, and QUIC still counts.
        let told = run(&mut race(1, &known(Udp::First, &[])), |transport, _, _| match transport {
            Quic => Fate::Succeeds(1_100),
            _ => Fate::Succeeds(200),
        });
        assert_eq!(told.won, Some((440, win(Tls, 0))));
        assert_eq!((told.probes, told.verdict), (1, Some(Verdict::Works)));
        assert_eq!(told.over_at, 1_100);
    }

    #[test]
    fn a_gateway_that_refuses_over_udp_is_reached_over_udp() {
        let mut race = race(1, &Memory::default());
        let [Step::Start { id, .. }] = race.poll(MS(0))[..] else { panic!() };
        race.failed(id, true, MS(100));
        let [Step::Start { id, transport: Tls, .. }] = race.poll(MS(100))[..] else { panic!() };
        assert!(race.connected(id, MS(300)));
        assert_eq!(race.won(id, MS(300)), Some(win(Tls, 0)));
        assert_eq!((race.verdict(), race.is_over()), (Some(Verdict::Works), true));
    }

    #[test]
    fn udp_and_tls_blocked_the_websocket_joins_at_750_ms() {
        let told = run(&mut race(1, &Memory::default()), |transport, _, _| match transport {
            WebSocket => Fate::Succeeds(300),
            _ => Fate::Silent,
        });
        let want = [(0, Quic, 0), (225, Quic, 0), (240, Tls, 0), (450, Quic, 0), (750, WebSocket, 0)];
        assert_eq!(told.started[..5], want);
        assert_eq!(told.won, Some((1_050, win(WebSocket, 0))));
    }

    #[test]
    fn a_lost_handshake_packet_is_helped_by_another_attempt_when_it_is_overdue() {
        for nth in [1, 2] {
            let told = run(&mut race(1, &known(Udp::First, &[])), |transport, _, tried| match transport {
                Quic if tried == nth => Fate::Succeeds(100),
                _ => Fate::Silent,
            });
            let want = [(0, Quic, 0), (120, Quic, 0), (240, Quic, 0)];
            let quic: Vec<_> = told.started.iter().filter(|(_, way, _)| *way == Quic).copied().collect();
            assert_eq!(quic, want[..=nth]);
            assert_eq!(told.won, Some((want[nth].0 + 100, win(Quic, 0))));
            assert_eq!(told.stopped.len(), told.started.len() - 1, "the others");
        }
    }

    #[test]
    fn an_answer_to_early_data_is_due_right_behind_the_handshake() {
        for (asked, want) in [(0, 250), (150, 400)] {
            let mut race = race(1, &Memory { rtt: Some(MS(150)), ..known(Udp::First, &[]) });
            let steps = race.poll(Duration::ZERO);
            let [Step::Start { id, .. }] = steps[..] else { panic!("{steps:?}") };
            race.asked(id, MS(asked));
            assert!(race.connected(id, MS(150)));
            assert_eq!(race.follower_at(&race.under_way[0]), Some(MS(want)), "asked at {asked} ms");
        }
    }

    #[test]
    fn a_handshake_that_is_known_to_be_slow_is_given_its_time() {
        let second = |handshake: u64, spread: u64| {
            let memory = Memory { handshake: MS(handshake), spread: MS(spread), ..known(Udp::First, &[]) };
            let told = run(&mut race(1, &memory), |_, _, _| Fate::Silent);
            told.started.iter().filter(|(_, way, _)| *way == Quic).nth(1).map(|(at, ..)| *at)
        };
        for (handshake, spread, want) in
            [(0, 0, 120), (60, 0, 80), (400, 0, 450), (400, 90, 490), (0, 30, 130), (100, 400, 200)]
        {
            assert_eq!(second(handshake, spread), Some(want), "{handshake} ms, {spread} ms more");
        }
    }

    #[test]
    fn a_handshake_that_is_not_followed_by_an_answer_does_not_win() {
        let told = run(&mut race(2, &known(Udp::First, &[])), |transport, _, nth| match (transport, nth) {
            (Quic, 0) => Fate::Connects(100, None),
            (Quic, _) => Fate::Connects(100, Some(100)),
            _ => Fate::Silent,
        });
        // Its answer is overdue 200 ms after the HELLO; who is there makes the other address and the streams wait.
        assert_eq!(told.started, [(0, Quic, 0), (300, Quic, 0)]);
        assert_eq!(told.won, Some((500, win(Quic, 0))));
        assert_eq!(told.stopped, [(500, AttemptId(0))]);
    }

    #[test]
    fn the_first_answer_wins_and_not_the_first_handshake() {
        let told = run(&mut race(1, &known(Udp::Beside, &[])), |transport, _, _| match transport {
            Quic => Fate::Connects(100, Some(1_000)),
            _ => Fate::Connects(200, Some(100)),
        });
        assert_eq!((told.won, told.verdict), (Some((300, win(Tls, 0))), Some(Verdict::Works)));
        assert_eq!(told.over_at, 300, "there is nothing to find out any more");
    }

    #[test]
    fn a_slow_answer_is_waited_for() {
        let told = run(&mut race(1, &known(Udp::First, &[])), |_, _, nth| match nth {
            0 => Fate::Connects(100, Some(4_500)),
            _ => Fate::Silent,
        });
        assert_eq!(told.won, Some((4_600, win(Quic, 0))));
        let told = run(&mut race(1, &known(Udp::First, &[])), |_, _, _| Fate::Connects(100, None));
        assert_eq!(told.won, None, "and given up after five seconds");
        assert!(told.over_at <= 12_000, "{told:?}");
    }

    #[test]
    fn addresses_are_staggered_and_the_one_that_won_goes_first() {
        for (wins, want) in [
            (vec![], [0, 1, 2]),
            (vec![win(Quic, 2)], [2, 0, 1]),
            (vec![win(Quic, 1), win(Quic, 2)], [1, 2, 0]),
            (vec![win(Quic, 99)], [0, 1, 2]),
        ] {
            let mut race = Race::new(3, &[Quic], &known(Udp::First, &wins), Duration::ZERO);
            let last = want[2];
            let told = run(&mut race, |_, address, _| match address == last {
                true => Fate::Succeeds(100),
                false => Fate::Silent,
            });
            let mut order = told.started.clone();
            let mut seen = Vec::new();
            order.retain(|(_, _, address)| {
                !seen.contains(address) && {
                    seen.push(*address);
                    true
                }
            });
            assert_eq!(order, [(0, Quic, want[0]), (240, Quic, want[1]), (480, Quic, want[2])], "{wins:?}");
            assert_eq!(told.won, Some((580, win(Quic, u8::try_from(last).unwrap()))));
        }
    }

    #[test]
    fn a_failure_starts_the_next_at_once() {
        let told =
            run(&mut race(2, &Memory::default()), |transport, address, _| match (transport, address) {
                (Tls, 1) => Fate::Succeeds(20),
                _ => Fate::Fails(5),
            });
        let want = [(0, Quic, 0), (5, Quic, 1), (5, Tls, 0), (10, Tls, 1)];
        assert_eq!(told.started[..4], want);
        assert_eq!(told.won, Some((30, win(Tls, 1))));
        assert_eq!(told.verdict, Some(Verdict::Blocked), "each attempt over UDP failed");
    }

    #[test]
    fn no_network_at_all_ends_at_once() {
        let told = run(&mut race(3, &Memory::default()), |_, _, _| Fate::Fails(0));
        assert_eq!((told.started.len(), told.over_at, told.won), (9, 0, None));
        assert_eq!(told.verdict, None, "nobody got through: that says nothing of UDP");
    }

    #[test]
    fn no_address_or_no_way_is_over_before_it_begins() {
        for mut race in [race(0, &Memory::default()), Race::new(3, &[], &Memory::default(), Duration::ZERO)] {
            assert!(race.is_over());
            assert_eq!((race.poll(MS(0)), race.poll_timeout()), (vec![], None));
        }
    }

    #[test]
    fn a_gateway_that_is_gone_is_asked_each_second_for_four_seconds() {
        // The ports of TCP answer "refused", those of UDP nothing.
        let told = run(&mut race(1, &known(Udp::First, &[])), |transport, _, _| match transport {
            Quic => Fate::Silent,
            _ => Fate::Fails(100),
        });
        let mut at: Vec<u64> = told.started.iter().map(|(at, ..)| *at).collect();
        at.sort_unstable();
        assert!(at.windows(2).all(|pair| pair[1] - pair[0] <= 1_000), "{told:?}");
        let quic: Vec<u64> =
            told.started.iter().filter(|(_, way, _)| *way == Quic).map(|(at, ..)| *at).collect();
        assert!(quic.iter().any(|at| (2_000..=5_000).contains(at)), "{told:?}");
        assert!(*at.last().unwrap() <= 5_000 && told.over_at <= 9_000, "{told:?}");
        assert_eq!((told.won, told.verdict), (None, None));
    }

    #[test]
    fn silent_candidates_make_room() {
        let told =
            run(&mut race(3, &Memory::default()), |transport, address, _| match (transport, address) {
                (WebSocket, 2) => Fate::Succeeds(200),
                _ => Fate::Silent,
            });
        let (at, won) = told.won.unwrap();
        assert_eq!(won, win(WebSocket, 2));
        assert!(at <= 6_000, "{told:?}");
        let mut pairs: Vec<_> = told.started.iter().map(|(_, way, address)| (*way as u8, *address)).collect();
        pairs.sort_unstable();
        pairs.dedup();
        assert_eq!(pairs.len(), 9, "every candidate had its turn");
    }

    #[test]
    fn slow_networks_are_given_more_time() {
        let memory = Memory { rtt: Some(MS(1_000)), ..Memory::default() };
        let told = run(&mut race(1, &memory), |transport, _, _| match transport {
            Quic => Fate::Silent,
            _ => Fate::Succeeds(4_500),
        });
        assert_eq!(told.won, Some((4_740, win(Tls, 0))));
        let told = run(&mut race(1, &Memory::default()), |_, _, _| Fate::Succeeds(4_500));
        assert_eq!(told.won, None, "without knowing the network, 4 s have to do");
    }

    fn fates() -> impl Strategy<Value = Vec<Fate>> {
        let fate = prop_oneof![
            1 => (0..5_000u64).prop_map(Fate::Succeeds),
            3 => (0..5_000u64).prop_map(Fate::Fails),
            2 => (0..5_000u64, prop::option::of(0..6_000u64)).prop_map(|(at, more)| Fate::Connects(at, more)),
            4 => Just(Fate::Silent),
        ];
        prop::collection::vec(fate, 24)
    }

    proptest! {
        #[test]
        fn every_race_ends_within_its_bounds(
            addresses in 0..10usize,
            offered in prop::sample::subsequence(ALL.to_vec(), 0..=3),
            rtt in prop::option::of(0..2_000u64),
            handshake in 0..3_000u64,
            spread in 0..500u64,
            udp in prop::sample::select(vec![Udp::First, Udp::Beside, Udp::Later]),
            wins in prop::collection::vec((prop::sample::select(ALL.to_vec()), any::<u8>()), 0..5),
            fates in fates(),
        ) {
            let wins: Vec<Win> = wins.into_iter().map(|(way, address)| win(way, address % 9)).collect();
            let memory = Memory { rtt: rtt.map(MS), handshake: MS(handshake), spread: MS(spread), udp, wins };
            let mut race = Race::new(addresses, &offered, &memory, Duration::ZERO);
            let fate = |way: Transport, address: usize, nth: usize| {
                fates[(way as usize * 8 + address + 5 * nth) % fates.len()]
            };
            let told = run(&mut race, fate);
            prop_assert!(told.over_at <= 40_000, "{:?}", told);
            prop_assert!(told.started.len() <= 64, "{:?}", told);
            // Who has a winner has only tried what was offered; who has none has tried everything.
            for (_, way, address) in &told.started {
                prop_assert!(offered.contains(way) && *address < addresses.min(ADDRESSES_MAX));
            }
            if told.won.is_none() {
                let mut pairs: Vec<_> = told.started.iter().map(|(_, way, a)| (*way as u8, *a)).collect();
                pairs.sort_unstable();
                pairs.dedup();
                prop_assert_eq!(pairs.len(), addresses.min(ADDRESSES_MAX) * offered.len());
            }
            // Streams alone, or nobody, prove nothing about UDP.
            if told.verdict == Some(Verdict::Blocked) {
                prop_assert!(told.won.is_some_and(|(_, win)| win.transport != Quic));
                prop_assert!(told.started.iter().any(|(_, way, _)| *way == Quic));
            }
            if told.won.is_some_and(|(_, win)| win.transport == Quic) {
                prop_assert_eq!(told.verdict, Some(Verdict::Works));
            }
        }

        #[test]
        fn late_news_changes_nothing(ids in prop::collection::vec((0..40u32, any::<bool>(), any::<bool>()), 0..40)) {
            let mut race = race(2, &Memory::default());
            let mut now = Duration::ZERO;
            let mut winners = 0;
            for (id, succeeds, answered) in ids {
                now += MS(200);
                race.poll(now);
                if succeeds {
                    race.connected(AttemptId(id), now);
                    winners += u32::from(race.won(AttemptId(id), now).is_some());
                } else {
                    race.failed(AttemptId(id), answered, now);
                }
                prop_assert!(race.candidates_under_way() <= UNDER_WAY_MAX);
            }
            prop_assert!(winners <= 1);
        }
    }
}

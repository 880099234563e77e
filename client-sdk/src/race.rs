//! One race for a connection: what to try when (pure; the driver makes the attempts and brings the time).
//!
//! - Candidates are the gateway's addresses by QUIC, TLS and WebSocket. Addresses begin [`STAGGER`] apart, the one that
//!   won here last first; TLS joins at 250 ms, WebSocket at 750 ms, the stream transport that won here last before the
//!   other. Where UDP was found blocked, the streams begin at once and QUIC is tried beside them ([`Udp`]).
//! - At most [`UNDER_WAY_MAX`] candidates are under way. Of QUIC a candidate may have a second attempt: at the same
//!   address, after two round trips, because a lost handshake packet is repeated late. It ends with its candidate.
//! - A failure starts the next candidate at once. When all were tried and some are still under way, tries go on each
//!   second for [`AGAIN_FOR`], one of QUIC and one of a stream: an attempt's own packets come ever more rarely, and a
//!   gateway that has just come back is found sooner by a new one. An attempt is given up when it is [`ATTEMPT_MAX`]
//!   old, which is how a race ends that nobody answers.
//! - The first to succeed wins. When that was not QUIC, QUIC attempts under way go on for [`PROBE_MAX`]: whether one
//!   gets through is the only proof that UDP is blocked or not ([`Race::verdict`]); dropping the race earlier only
//!   leaves that open.
//!
//! Not here: sockets (`transport`), what is kept of a network (`networks`), when to race (`state`).

use std::{cmp::Reverse, time::Duration};

use serde::{Deserialize, Serialize};

/// From one address to the next.
const STAGGER: Duration = Duration::from_millis(250);

/// When the streams join where QUIC goes first, and where they go first.
const SECOND_AT: Duration = Duration::from_millis(250);
const THIRD_AT: Duration = Duration::from_millis(750);

/// Candidates under way at once.
pub(crate) const UNDER_WAY_MAX: usize = 3;

/// A candidate that is silent for so long makes room for one that was not tried yet.
const PATIENCE: Duration = Duration::from_millis(1_500);

/// From one try to the next when all were tried.
const AGAIN_EVERY: Duration = Duration::from_secs(1);

/// No try begins later, unless its candidate was not tried yet.
const AGAIN_FOR: Duration = Duration::from_secs(4);

/// What one attempt may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(4);

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
        /// Its name, for [`Race::won`] and [`Race::failed`].
        id: AttemptId,
        /// By which way.
        transport: Transport,
        /// To which of the addresses, by its place in the list the race was made with.
        address: usize,
    },
    /// Give an attempt up; nothing has to be said of it any more.
    Stop(AttemptId),
}

/// Whether an attempt that succeeded is of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// It is the winner: to be used, and to be remembered.
    First(Win),
    /// QUIC got through after a stream had won. It may take over, or be closed.
    Probe,
    /// The race has a winner, or gave this one up.
    Late,
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
    second: bool,
    /// It will have a second one.
    doubles: bool,
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
    second_after: Duration,
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
            second_after: rtt * 2,
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
        self.start_seconds(now, &mut steps);
        self.start_again(now, &mut steps);
        steps
    }

    /// When [`Self::poll`] has something to do next if nothing happens.
    pub(crate) fn poll_timeout(&self) -> Option<Duration> {
        let ends = self.under_way.iter().map(|attempt| attempt.began.saturating_add(self.attempt_max)).min();
        if self.winner.is_some() {
            return self.probe_until.filter(|_| !self.under_way.is_empty()).into_iter().chain(ends).min();
        }
        let next = self.next_due().map(|due| match self.candidates_under_way() < UNDER_WAY_MAX {
            true => due,
            false => self.oldest().map_or(Duration::MAX, |at| at.saturating_add(PATIENCE)).max(due),
        });
        let second = self.under_way.iter().filter_map(|attempt| self.second_at(attempt)).min();
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

    /// An attempt succeeded. [`Self::poll`] then says which others to stop.
    pub(crate) fn won(&mut self, id: AttemptId, now: Duration) -> Arrival {
        let Some(attempt) = self.take(id) else { return Arrival::Late };
        let Some(Candidate { transport, address }) = self.candidates.get(attempt.candidate).copied() else {
            return Arrival::Late;
        };
        let quic = transport == Transport::Quic;
        if quic {
            self.verdict = Some(Verdict::Works);
        }
        if self.winner.is_some() {
            // Only QUIC goes on after a win, and one answer says it all.
            self.probe_until = Some(now);
            return if quic { Arrival::Probe } else { Arrival::Late };
        }
        let win = Win { transport, address: u8::try_from(address).unwrap_or(u8::MAX) };
        self.winner = Some(win);
        let time = PROBE_MAX.max(self.second_after);
        self.probe_until = Some(if quic { now } else { now.saturating_add(time) });
        self.judge_when_over();
        Arrival::First(win)
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

    /// Second attempts whose first one is gone stand for their candidates.
    fn promote(&mut self) {
        let firsts: Vec<usize> = self
            .under_way
            .iter()
            .filter(|attempt| !attempt.second)
            .map(|attempt| attempt.candidate)
            .collect();
        for attempt in &mut self.under_way {
            attempt.second &= firsts.contains(&attempt.candidate);
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

    fn oldest(&self) -> Option<Duration> {
        self.under_way.iter().filter(|attempt| !attempt.second).map(|attempt| attempt.began).min()
    }

    /// Attempts that were silent for too long, and after a win those that have no say any more.
    fn give_up_old(&mut self, now: Duration, steps: &mut Vec<Step>) {
        let over = self.probe_until.is_some_and(|until| until <= now);
        let won = self.winner.is_some();
        let before = self.under_way.len();
        let candidates = &self.candidates;
        self.under_way.retain(|attempt| {
            let quic = candidates
                .get(attempt.candidate)
                .is_some_and(|candidate| candidate.transport == Transport::Quic);
            let old = now >= attempt.began.saturating_add(self.attempt_max);
            let keep = !old && !(won && (over || !quic));
            if !keep {
                steps.push(Step::Stop(attempt.id));
            }
            keep
        });
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
            self.start(self.tried, false, quic, now, steps);
            self.tried += 1;
            self.again_at = now.saturating_add(AGAIN_EVERY);
        }
    }

    /// Gives up the candidate that is silent for the longest, if that is long enough.
    fn make_room(&mut self, now: Duration, steps: &mut Vec<Step>) -> bool {
        let first = self.under_way.iter().filter(|attempt| !attempt.second);
        let Some(oldest) = first.min_by_key(|attempt| attempt.began).copied() else { return false };
        if now < oldest.began.saturating_add(PATIENCE) {
            return false;
        }
        self.under_way.retain(|attempt| {
            let keep = attempt.candidate != oldest.candidate;
            if !keep {
                steps.push(Step::Stop(attempt.id));
            }
            keep
        });
        true
    }

    /// When the candidate of this attempt gets its second one.
    fn second_at(&self, attempt: &Attempt) -> Option<Duration> {
        attempt.doubles.then(|| attempt.began.saturating_add(self.second_after))
    }

    fn start_seconds(&mut self, now: Duration, steps: &mut Vec<Step>) {
        let due: Vec<usize> = self
            .under_way
            .iter()
            .filter(|attempt| self.second_at(attempt).is_some_and(|at| at <= now))
            .map(|attempt| attempt.candidate)
            .collect();
        for candidate in due {
            for attempt in self.under_way.iter_mut().filter(|attempt| attempt.candidate == candidate) {
                attempt.doubles = false;
            }
            self.start(candidate, true, false, now, steps);
        }
    }

    /// The candidate of QUIC, or of the streams, to be tried again next: one that is not under way when there is room, or
    /// one with two attempts, of which the older one is given up. `None`: no more tries.
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
                    attempts => attempts > 1,
                }
        })
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
            let older =
                self.under_way.iter().find(|attempt| attempt.candidate == candidate && !attempt.second);
            let older = older.map(|attempt| attempt.id);
            if let Some(older) = older {
                steps.push(Step::Stop(older));
                self.take(older);
            }
            self.start(candidate, older.is_some(), false, now, steps);
            any = true;
        }
        if any {
            self.again_at = now.saturating_add(AGAIN_EVERY);
        }
    }

    fn start(&mut self, candidate: usize, second: bool, doubles: bool, now: Duration, steps: &mut Vec<Step>) {
        let Some(Candidate { transport, address }) = self.candidates.get(candidate).copied() else { return };
        let id = AttemptId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.quic_tried |= transport == Transport::Quic;
        self.under_way.push(Attempt { id, candidate, began: now, second, doubles });
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
    let ways = match memory.udp {
        Udp::First => [(quic, Duration::ZERO), (one, SECOND_AT), (two, THIRD_AT)],
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
        Silent,
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
        let mut events: Vec<(Duration, AttemptId, bool)> = Vec::new();
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
                            Fate::Succeeds(ms) => events.push((now + MS(ms), id, true)),
                            Fate::Fails(ms) => events.push((now + MS(ms), id, false)),
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
                Some((at, id, true)) => {
                    events.remove(0);
                    now = at;
                    match race.won(id, now) {
                        Arrival::First(win) => {
                            told.won = Some((u64::try_from(now.as_millis()).unwrap(), win))
                        }
                        Arrival::Probe => told.probes += 1,
                        Arrival::Late => panic!("it was stopped before"),
                    }
                }
                Some((at, id, false)) => {
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
        Memory { rtt: Some(MS(100)), udp, wins: wins.to_vec() }
    }

    #[test]
    fn a_clean_network_starts_one_attempt() {
        let told = run(&mut race(2, &Memory::default()), |_, _, _| Fate::Succeeds(100));
        assert_eq!(told.started, [(0, Quic, 0)]);
        assert_eq!((told.won, told.verdict), (Some((100, win(Quic, 0))), Some(Verdict::Works)));
        assert_eq!(told.over_at, 100);
    }

    #[test]
    fn udp_blocked_and_not_known_tls_starts_at_250_ms() {
        // TLS takes two round trips of 100 ms.
        let blocked = |transport, _, _| match transport {
            Quic => Fate::Silent,
            _ => Fate::Succeeds(200),
        };
        for (memory, second) in [(Memory::default(), 400), (known(Udp::First, &[]), 200)] {
            let told = run(&mut race(1, &memory), blocked);
            let mut want = [(0, Quic, 0), (250, Tls, 0), (second, Quic, 0)];
            want.sort_by_key(|(at, ..)| *at);
            assert_eq!(told.started, want);
            assert_eq!(told.won, Some((450, win(Tls, 0))));
            assert_eq!(told.verdict, Some(Verdict::Blocked));
            assert_eq!(told.over_at, 2_450, "QUIC was given its time");
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
            assert_eq!(told.started, want, "{udp:?}, {wins:?}");
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
        assert_eq!(told.won, Some((450, win(Tls, 0))));
        assert_eq!((told.probes, told.verdict), (1, Some(Verdict::Works)));
        assert_eq!(told.over_at, 1_100);
    }

    #[test]
    fn a_gateway_that_refuses_over_udp_is_reached_over_udp() {
        let mut race = race(1, &Memory::default());
        let [Step::Start { id, .. }] = race.poll(MS(0))[..] else { panic!() };
        race.failed(id, true, MS(100));
        let [Step::Start { id, transport: Tls, .. }] = race.poll(MS(100))[..] else { panic!() };
        assert_eq!(race.won(id, MS(300)), Arrival::First(win(Tls, 0)));
        assert_eq!((race.verdict(), race.is_over()), (Some(Verdict::Works), true));
    }

    #[test]
    fn udp_and_tls_blocked_the_websocket_joins_at_750_ms() {
        let told = run(&mut race(1, &Memory::default()), |transport, _, _| match transport {
            WebSocket => Fate::Succeeds(300),
            _ => Fate::Silent,
        });
        assert_eq!(told.started[..4], [(0, Quic, 0), (250, Tls, 0), (400, Quic, 0), (750, WebSocket, 0)]);
        assert_eq!(told.won, Some((1_050, win(WebSocket, 0))));
    }

    #[test]
    fn a_lost_handshake_packet_is_helped_by_a_second_attempt_after_two_round_trips() {
        let told = run(&mut race(1, &known(Udp::First, &[])), |transport, _, nth| match (transport, nth) {
            (Quic, 1) => Fate::Succeeds(100),
            _ => Fate::Silent,
        });
        assert_eq!(told.started, [(0, Quic, 0), (200, Quic, 0), (250, Tls, 0)]);
        assert_eq!(told.won, Some((300, win(Quic, 0))));
        assert_eq!(told.stopped.len(), 2);
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
            let order: Vec<_> = told.started.iter().filter(|(at, ..)| at % 250 == 0).copied().collect();
            assert_eq!(order, [(0, Quic, want[0]), (250, Quic, want[1]), (500, Quic, want[2])], "{wins:?}");
            assert_eq!(told.won, Some((600, win(Quic, u8::try_from(last).unwrap()))));
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
        assert_eq!(told.won, Some((4_750, win(Tls, 0))));
        let told = run(&mut race(1, &Memory::default()), |_, _, _| Fate::Succeeds(4_500));
        assert_eq!(told.won, None, "without knowing the network, 4 s have to do");
    }

    fn fates() -> impl Strategy<Value = Vec<Fate>> {
        let fate = prop_oneof![
            1 => (0..5_000u64).prop_map(Fate::Succeeds),
            3 => (0..5_000u64).prop_map(Fate::Fails),
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
            udp in prop::sample::select(vec![Udp::First, Udp::Beside, Udp::Later]),
            wins in prop::collection::vec((prop::sample::select(ALL.to_vec()), any::<u8>()), 0..5),
            fates in fates(),
        ) {
            let wins: Vec<Win> = wins.into_iter().map(|(way, address)| win(way, address % 9)).collect();
            let memory = Memory { rtt: rtt.map(MS), udp, wins };
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
                    winners += u32::from(matches!(race.won(AttemptId(id), now), Arrival::First(_)));
                } else {
                    race.failed(AttemptId(id), answered, now);
                }
                prop_assert!(race.candidates_under_way() <= UNDER_WAY_MAX);
            }
            prop_assert!(winners <= 1);
        }
    }
}

//! Where the connection stands and what to do next: a pure state machine, driven by `driver`.
//!
//! ```text
//! Offline ─▶ Racing ─▶ Handshaking ─▶ Syncing ─▶ Live ◀─▶ Suspect
//!    ▲         │ ▲          │            │         │         │ a race beside it is won
//!    │         ▼ │          ▼            ▼         ▼         ▼
//!    │       Backoff ◀───────────── lost ───────────     Handshaking (the next connection)
//!    │                                              GOAWAY ─▶ Draining ─▶ Handshaking (the next connection)
//! Suspended ◀─ from everywhere        Closed ◀─ from everywhere
//! ```
//!
//! - There is at most one connection and one race for the next one; a race goes on beside a connection while Draining,
//!   and while Suspect: who is silent may only be slow, and is not given up before the HELLO is answered elsewhere. Whoever
//!   answers first goes on.
//! - A suspect is asked each second, so that it is found within a second of the end of a dark spell, however long: the
//!   transport's own repeats come ever more rarely.
//! - After a change of network the connection moves to a new socket. Only an answer proves the new path: packets of the
//!   old one may still come in.
//! - Timers exist in Backoff, Suspect and Draining only: no network, no timer; nothing runs while Suspended.
//! - A lost connection is tried again after a full-jitter back-off, whose ceiling falls back to the first after 30 s of
//!   being connected.
//!
//! Not here: sockets and time (`driver`), what is said over the connection (`fulmar_protocol::session::client`).

use std::time::Duration;

use crate::backoff::full_jitter;

/// Being connected for this long makes earlier failures forgotten.
const SETTLED_AFTER: Duration = Duration::from_secs(30);

/// From one nudge to the next.
const NUDGE_EVERY: Duration = Duration::from_secs(1);

/// Nudges at that pace; then the pauses double up to [`NUDGE_RARELY`].
const NUDGES_OFTEN: u32 = 90;

/// The longest pause between nudges.
const NUDGE_RARELY: Duration = Duration::from_secs(8);

/// From the moment a connection is suspect to the race beside it, at least; 1.5 round trips when those are longer.
const RACE_AFTER: Duration = Duration::from_millis(150);

/// The same after a change of network.
const RACE_AFTER_CHANGE: Duration = Duration::from_millis(250);

/// After a change of network the next nudges follow after half a round trip each, at least this: a new path may be dark at
/// first, and whatever comes first through it has to be answered.
const PATH_NUDGE_EVERY: Duration = Duration::from_millis(50);

/// So many of them; then they come as for any suspect.
const PATH_NUDGES: u32 = 8;

/// So many are large enough for a new path: together less than the least window of the transport (10 packets), which later
/// questions need too.
const PATH_NUDGES_LARGE: u32 = 6;

/// Times per minute a send, or the operating system, may cut a back-off short.
const POKES_PER_MINUTE: u32 = 10;

/// Where the connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum State {
    /// Not started.
    Offline,
    /// Attempts to reach the gateway are on their way, each with its HELLO.
    Racing,
    /// Answered; what the answer says is being taken in.
    Handshaking,
    /// Welcomed; what was missed is coming in.
    Syncing,
    /// Up to date.
    Live,
    /// Overdue; nudges leave.
    Suspect,
    /// The gateway will leave; the next connection is being made beside this one.
    Draining,
    /// Waiting before the next attempt.
    Backoff,
    /// The app is in the background.
    Suspended,
    /// Over.
    Closed,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The client was made.
    Start,
    /// A race has a winner: the HELLO was answered.
    Reached,
    /// A race has none.
    Unreached,
    /// A WELCOME came.
    Welcomed,
    /// What was missed is in.
    Synced,
    /// Anything came from the gateway.
    Heard,
    /// An answer came to what was asked in this state.
    Answered,
    /// Something of the gateway's is overdue; `srtt` is the round trip as last measured.
    Overdue {
        srtt: Duration,
    },
    /// The connection is gone or of no use; not again before `after`.
    Lost {
        after: Duration,
    },
    /// A GOAWAY: wait for a part of `spread` before the next connection.
    Goaway {
        spread: Duration,
    },
    /// The operating system says that the network changed; `srtt` is the round trip as last measured.
    NetworkChanged {
        srtt: Duration,
    },
    /// The device slept: mappings may be gone, and the gateway.
    Woke {
        srtt: Duration,
    },
    /// There is something to send.
    Poke,
    Suspend,
    Resume,
    /// It is over.
    Close,
    /// The time [`Machine::poll_timeout`] named has come.
    Timer,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Begin a race for a connection.
    Race,
    /// Give the race up.
    EndRace,
    /// Make the winner of the race the connection; drop what was before.
    Adopt,
    /// Ask the gateway for a sign of life.
    Nudge,
    /// The same in a packet large enough that the gateway may answer a new path in full.
    NudgePath,
    /// Move the connection to a new socket.
    Rebind,
    /// Close the connection.
    Drop,
    /// Make the socket anew at the next race.
    NewSocket,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Machine {
    state: State,
    failures: u32,
    connected_at: Option<Duration>,
    synced: bool,
    racing: bool,
    nudges: u32,
    /// Only an answer ends the suspicion.
    unproven: bool,
    /// Between nudges to a new path.
    path_pause: Duration,
    timer: Option<Duration>,
    /// When the race beside a suspect begins.
    race_at: Option<Duration>,
    pokes: u32,
    pokes_since: Duration,
}

impl Machine {
    pub(crate) const fn new() -> Self {
        Self {
            state: State::Offline,
            failures: 0,
            connected_at: None,
            synced: false,
            racing: false,
            nudges: 0,
            unproven: false,
            path_pause: Duration::ZERO,
            timer: None,
            race_at: None,
            pokes: 0,
            pokes_since: Duration::ZERO,
        }
    }

    pub(crate) const fn state(&self) -> State {
        self.state
    }

    /// When [`Event::Timer`] is due.
    pub(crate) fn poll_timeout(&self) -> Option<Duration> {
        [self.timer, self.race_at].into_iter().flatten().min()
    }

    /// Takes what happened; `random` is uniform and used at most once.
    pub(crate) fn step(&mut self, event: Event, now: Duration, random: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        match (self.state, event) {
            (State::Closed, _) => {}
            (_, Event::Close) => {
                self.leave(&mut actions);
                self.state = State::Closed;
            }
            (State::Suspended, Event::Resume) | (State::Offline, Event::Start) => self.race(&mut actions),
            (State::Suspended | State::Offline, _) => {}
            (_, Event::Suspend) => {
                self.leave(&mut actions);
                self.state = State::Suspended;
            }
            (State::Racing | State::Draining | State::Suspect, Event::Reached) => {
                self.racing = false;
                self.timer = None;
                self.race_at = None;
                self.synced = false;
                self.connected_at = None;
                self.state = State::Handshaking;
                actions.push(Action::Adopt);
            }
            (State::Racing, Event::Unreached) => self.back_off(Duration::ZERO, now, random),
            (State::Racing, Event::NetworkChanged { .. }) => {
                actions.extend([Action::EndRace, Action::NewSocket]);
                self.race(&mut actions);
            }
            (State::Handshaking, Event::NetworkChanged { .. }) => {
                // A connection can't move before its handshake is confirmed.
                actions.extend([Action::Drop, Action::NewSocket]);
                self.race(&mut actions);
            }
            (State::Draining, Event::NetworkChanged { .. }) => {
                actions.push(Action::Rebind);
                if self.racing {
                    actions.extend([Action::EndRace, Action::Race]);
                }
            }
            (State::Handshaking, Event::Welcomed) => {
                self.connected_at = Some(now);
                self.state = State::Syncing;
            }
            (State::Syncing, Event::Synced) => {
                self.synced = true;
                self.state = State::Live;
            }
            (State::Suspect, Event::Synced) => self.synced = true,
            (State::Syncing | State::Live, Event::Overdue { srtt }) => {
                self.state = State::Suspect;
                self.nudges = 0;
                self.unproven = false;
                self.race_at = Some(now + (srtt * 3 / 2).max(RACE_AFTER));
                self.nudge(now, &mut actions);
            }
            (
                State::Syncing | State::Live | State::Suspect,
                Event::NetworkChanged { srtt } | Event::Woke { srtt },
            ) => {
                if std::mem::take(&mut self.racing) {
                    actions.push(Action::EndRace);
                }
                if matches!(event, Event::NetworkChanged { .. }) {
                    actions.push(Action::Rebind);
                }
                self.state = State::Suspect;
                self.nudges = 0;
                self.unproven = true;
                self.path_pause = (srtt / 2).max(PATH_NUDGE_EVERY);
                self.nudge(now, &mut actions);
                self.race_at = Some(now + (srtt * 3 / 2).max(RACE_AFTER_CHANGE));
            }
            (State::Suspect, Event::Heard) if self.unproven => {}
            (State::Suspect, Event::Heard | Event::Answered) => {
                if std::mem::take(&mut self.racing) {
                    actions.push(Action::EndRace);
                }
                self.timer = None;
                self.race_at = None;
                self.state = if self.synced { State::Live } else { State::Syncing };
            }
            (State::Suspect, Event::Timer) => {
                if self.race_at.is_some_and(|at| at <= now) {
                    self.race_at = None;
                    self.racing = true;
                    actions.push(Action::Race);
                }
                if self.timer.is_none_or(|at| at <= now) {
                    self.nudge(now, &mut actions);
                }
            }
            (State::Suspect, Event::Unreached) => {
                self.racing = false;
                self.race_at = Some(now + full_jitter(self.failures, random));
                self.failures = self.failures.saturating_add(1);
            }
            (State::Syncing | State::Live | State::Suspect, Event::Goaway { spread }) => {
                let spread = u64::try_from(spread.as_millis()).unwrap_or(u64::MAX);
                let wait = Duration::from_millis(random % spread.saturating_add(1).max(1));
                self.race_at = None;
                if !self.racing {
                    self.timer = Some(now + wait);
                }
                self.state = State::Draining;
            }
            (State::Draining, Event::Timer) => {
                self.timer = None;
                self.racing = true;
                actions.push(Action::Race);
            }
            (State::Draining, Event::Unreached) => {
                self.racing = false;
                self.timer = Some(now + full_jitter(self.failures, random));
                self.failures = self.failures.saturating_add(1);
            }
            (State::Draining, Event::Lost { .. }) if self.racing => {
                self.timer = None;
                self.race_at = None;
                self.connected_at = None;
                self.state = State::Racing;
            }
            (State::Suspect, Event::Lost { after }) if self.racing && after.is_zero() => {
                // Somebody is there again: attempts that begin now are answered sooner than those under way.
                self.failures = 0;
                actions.push(Action::EndRace);
                self.race(&mut actions);
            }
            (
                State::Handshaking | State::Syncing | State::Live | State::Suspect | State::Draining,
                Event::Lost { after },
            ) => {
                // Failures of races beside a suspect are answered for when somebody says that it is gone.
                let settled =
                    self.connected_at.take().is_some_and(|at| now.saturating_sub(at) >= SETTLED_AFTER);
                if settled || self.state == State::Suspect {
                    self.failures = 0;
                }
                self.back_off(after, now, random);
            }
            (State::Backoff, Event::Timer) => self.race(&mut actions),
            (
                State::Backoff,
                Event::Poke | Event::NetworkChanged { .. } | Event::Woke { .. } | Event::Resume,
            ) => {
                if now.saturating_sub(self.pokes_since) >= Duration::from_secs(60) {
                    self.pokes = 0;
                    self.pokes_since = now;
                }
                if self.pokes < POKES_PER_MINUTE {
                    self.pokes += 1;
                    if matches!(event, Event::NetworkChanged { .. }) {
                        actions.push(Action::NewSocket);
                    }
                    self.race(&mut actions);
                }
            }
            _ => {}
        }
        actions
    }

    fn race(&mut self, actions: &mut Vec<Action>) {
        self.timer = None;
        self.race_at = None;
        self.racing = true;
        self.connected_at = None;
        self.state = State::Racing;
        actions.push(Action::Race);
    }

    fn back_off(&mut self, at_least: Duration, now: Duration, random: u64) {
        self.racing = false;
        self.race_at = None;
        self.timer = Some(now + full_jitter(self.failures, random).max(at_least));
        self.failures = self.failures.saturating_add(1);
        self.state = State::Backoff;
    }

    fn nudge(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.nudges = self.nudges.saturating_add(1);
        let rarer = 1 << self.nudges.saturating_sub(NUDGES_OFTEN).min(3);
        let pause = (NUDGE_EVERY * rarer).min(NUDGE_RARELY);
        let new_path = self.unproven && self.nudges <= PATH_NUDGES;
        self.timer = Some(now + if new_path { self.path_pause.min(pause) } else { pause });
        let large = self.unproven && self.nudges <= PATH_NUDGES_LARGE;
        actions.push(if large { Action::NudgePath } else { Action::Nudge });
    }

    /// Gives up what there is.
    fn leave(&mut self, actions: &mut Vec<Action>) {
        if std::mem::take(&mut self.racing) {
            actions.push(Action::EndRace);
        }
        if matches!(
            self.state,
            State::Handshaking | State::Syncing | State::Live | State::Suspect | State::Draining
        ) {
            actions.push(Action::Drop);
        }
        self.timer = None;
        self.race_at = None;
        self.connected_at = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;
    const OVERDUE: Event = Event::Overdue { srtt: Duration::from_millis(100) };

    /// The shortest way to a state.
    fn at(state: State) -> Machine {
        let mut machine = Machine::new();
        let way: &[Event] = match state {
            State::Offline => &[],
            State::Racing => &[Event::Start],
            State::Handshaking => &[Event::Start, Event::Reached],
            State::Syncing => &[Event::Start, Event::Reached, Event::Welcomed],
            State::Live => &[Event::Start, Event::Reached, Event::Welcomed, Event::Synced],
            State::Suspect => &[Event::Start, Event::Reached, Event::Welcomed, Event::Synced, OVERDUE],
            State::Draining => {
                &[Event::Start, Event::Reached, Event::Welcomed, Event::Goaway { spread: S(1) }]
            }
            State::Backoff => &[Event::Start, Event::Unreached],
            State::Suspended => &[Event::Start, Event::Suspend],
            State::Closed => &[Event::Close],
        };
        for event in way {
            machine.step(*event, S(0), 100);
        }
        assert_eq!(machine.state(), state);
        machine
    }

    #[test]
    fn transitions() {
        use Action::*;
        use State::*;
        const LOST: Event = Event::Lost { after: Duration::ZERO };
        const CHANGED: Event = Event::NetworkChanged { srtt: Duration::from_millis(100) };
        const WOKE: Event = Event::Woke { srtt: Duration::from_millis(100) };
        const GOAWAY: Event = Event::Goaway { spread: Duration::from_secs(1) };
        let all =
            [Offline, Racing, Handshaking, Syncing, Live, Suspect, Draining, Backoff, Suspended, Closed];
        let inputs = [
            Event::Start,
            Event::Reached,
            Event::Unreached,
            Event::Welcomed,
            Event::Synced,
            Event::Heard,
            Event::Answered,
            OVERDUE,
            LOST,
            GOAWAY,
            CHANGED,
            WOKE,
            Event::Poke,
            Event::Suspend,
            Event::Resume,
            Event::Close,
            Event::Timer,
        ];
        // What is not listed changes nothing and asks for nothing.
        #[rustfmt::skip]
        let table: &[(State, Event, State, &[Action])] = &[
            (Offline,     Event::Start,          Racing,      &[Race]),
            (Offline,     Event::Close,          Closed,      &[]),
            (Racing,      Event::Reached,        Handshaking, &[Adopt]),
            (Racing,      Event::Unreached,      Backoff,     &[]),
            (Racing,      CHANGED,               Racing,      &[EndRace, NewSocket, Race]),
            (Racing,      Event::Suspend,        Suspended,   &[EndRace]),
            (Racing,      Event::Close,          Closed,      &[EndRace]),
            (Handshaking, Event::Welcomed,       Syncing,     &[]),
            (Handshaking, LOST,                  Backoff,     &[]),
            (Handshaking, CHANGED,               Racing,      &[Drop, NewSocket, Race]),
            (Handshaking, Event::Suspend,        Suspended,   &[Drop]),
            (Handshaking, Event::Close,          Closed,      &[Drop]),
            (Syncing,     Event::Synced,         Live,        &[]),
            (Syncing,     OVERDUE,               Suspect,     &[Nudge]),
            (Syncing,     CHANGED,               Suspect,     &[Rebind, NudgePath]),
            (Syncing,     WOKE,                  Suspect,     &[NudgePath]),
            (Syncing,     LOST,                  Backoff,     &[]),
            (Syncing,     GOAWAY,                Draining,    &[]),
            (Syncing,     Event::Suspend,        Suspended,   &[Drop]),
            (Syncing,     Event::Close,          Closed,      &[Drop]),
            (Live,        OVERDUE,               Suspect,     &[Nudge]),
            (Live,        CHANGED,               Suspect,     &[Rebind, NudgePath]),
            (Live,        WOKE,                  Suspect,     &[NudgePath]),
            (Live,        LOST,                  Backoff,     &[]),
            (Live,        GOAWAY,                Draining,    &[]),
            (Live,        Event::Suspend,        Suspended,   &[Drop]),
            (Live,        Event::Close,          Closed,      &[Drop]),
            (Suspect,     Event::Heard,          Live,        &[]),
            (Suspect,     Event::Answered,       Live,        &[]),
            (Suspect,     Event::Reached,        Handshaking, &[Adopt]),
            (Suspect,     CHANGED,               Suspect,     &[Rebind, NudgePath]),
            (Suspect,     WOKE,                  Suspect,     &[NudgePath]),
            (Suspect,     Event::Timer,          Suspect,     &[Race, Nudge]),
            (Suspect,     LOST,                  Backoff,     &[]),
            (Suspect,     GOAWAY,                Draining,    &[]),
            (Suspect,     Event::Suspend,        Suspended,   &[Drop]),
            (Suspect,     Event::Close,          Closed,      &[Drop]),
            (Draining,    Event::Timer,          Draining,    &[Race]),
            (Draining,    Event::Reached,        Handshaking, &[Adopt]),
            (Draining,    LOST,                  Backoff,     &[]),
            (Draining,    CHANGED,               Draining,    &[Rebind]),
            (Draining,    Event::Suspend,        Suspended,   &[Drop]),
            (Draining,    Event::Close,          Closed,      &[Drop]),
            (Backoff,     Event::Timer,          Racing,      &[Race]),
            (Backoff,     Event::Poke,           Racing,      &[Race]),
            (Backoff,     Event::Resume,         Racing,      &[Race]),
            (Backoff,     CHANGED,               Racing,      &[NewSocket, Race]),
            (Backoff,     WOKE,                  Racing,      &[Race]),
            (Backoff,     Event::Suspend,        Suspended,   &[]),
            (Backoff,     Event::Close,          Closed,      &[]),
            (Suspended,   Event::Resume,         Racing,      &[Race]),
            (Suspended,   Event::Close,          Closed,      &[]),
        ];
        for state in all {
            for input in inputs {
                let listed = table.iter().find(|row| (row.0, row.1) == (state, input));
                let (next, want) = listed.map_or((state, &[][..]), |row| (row.2, row.3));
                let mut machine = at(state);
                let actions = machine.step(input, S(1), 7);
                assert_eq!((machine.state(), &actions[..]), (next, want), "{state:?} on {input:?}");
            }
        }
    }

    const CHANGED: Event = Event::NetworkChanged { srtt: Duration::from_millis(100) };

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn who_does_not_answer_is_asked_each_second_while_a_race_goes_on_beside() {
        let mut machine = at(State::Suspect);
        assert_eq!(machine.poll_timeout(), Some(ms(150)));
        assert_eq!(machine.step(Event::Timer, ms(150), 0), [Action::Race]);
        for second in 1..=80 {
            assert_eq!(machine.poll_timeout(), Some(S(second)));
            assert_eq!(machine.step(Event::Timer, S(second), 0), [Action::Nudge]);
        }
        assert_eq!(machine.step(Event::Heard, S(81), 0), [Action::EndRace], "it was only dark");
        assert_eq!((machine.state(), machine.poll_timeout()), (State::Live, None));
    }

    #[test]
    fn a_race_beside_a_suspect_that_nobody_wins_is_repeated_and_one_that_somebody_ends_begins_again() {
        let mut machine = at(State::Suspect);
        machine.step(Event::Timer, ms(250), 0);
        assert_eq!(machine.step(Event::Unreached, ms(500), 100), []);
        assert_eq!(machine.poll_timeout(), Some(ms(600)), "full jitter");
        assert_eq!(machine.step(Event::Timer, ms(600), 0), [Action::Race], "the nudge is not due yet");
        let lost = Event::Lost { after: S(0) };
        assert_eq!(machine.step(lost, S(2), 0), [Action::EndRace, Action::Race], "somebody is there again");
        assert_eq!(machine.state(), State::Racing);
        let mut machine = at(State::Suspect);
        for second in 1..6 {
            machine.step(Event::Timer, S(second), 0);
            machine.step(Event::Unreached, S(second), 0);
        }
        machine.step(lost, S(9), 250);
        assert_eq!(machine.poll_timeout(), Some(ms(9_250)), "what failed before does not count");
    }

    #[test]
    fn after_long_darkness_nudges_come_more_rarely() {
        let mut machine = at(State::Suspect);
        let mut now = S(0);
        let mut pauses = Vec::new();
        for _ in 0..100 {
            let next = machine.timer.unwrap();
            pauses.push((next - now).as_secs());
            now = next;
            machine.race_at = None;
            machine.step(Event::Timer, now, 0);
        }
        assert!(pauses[..89].iter().all(|pause| *pause == 1), "{pauses:?}");
        assert_eq!(pauses[95..], [8, 8, 8, 8, 8]);
    }

    #[test]
    fn a_new_path_is_proven_by_an_answer_only() {
        let mut machine = at(State::Live);
        assert_eq!(machine.step(CHANGED, S(1), 0), [Action::Rebind, Action::NudgePath]);
        assert_eq!(machine.step(Event::Heard, ms(1_010), 0), [], "a packet of the old path");
        for at in [1_050, 1_100, 1_150, 1_200] {
            assert_eq!(machine.poll_timeout(), Some(ms(at)), "half a round trip");
            assert_eq!(machine.step(Event::Timer, ms(at), 0), [Action::NudgePath]);
        }
        assert_eq!(machine.poll_timeout(), Some(ms(1_250)));
        let both = [Action::Race, Action::NudgePath];
        assert_eq!(machine.step(Event::Timer, ms(1_250), 0), both, "a race beside the old one");
        assert_eq!(machine.step(Event::Timer, ms(1_275), 0), [], "nothing is due");
        assert_eq!(machine.step(Event::Answered, ms(1_300), 0), [Action::EndRace]);
        assert_eq!(machine.state(), State::Live);
        assert_eq!(machine.step(OVERDUE, S(9), 0), [Action::Nudge], "as usual again");
    }

    #[test]
    fn failures_are_forgotten_after_thirty_seconds_of_connection() {
        let lost = Event::Lost { after: Duration::ZERO };
        for (connected, want) in [(29, 750), (30, 0)] {
            let mut machine = at(State::Racing);
            machine.step(Event::Unreached, S(0), 0);
            machine.step(Event::Timer, S(0), 0);
            for event in [Event::Reached, Event::Welcomed] {
                machine.step(event, S(0), 0);
            }
            // 750 modulo the ceiling of the first attempt (251 values) is 248, of the second (501) 249.
            machine.step(lost, S(connected), 750);
            let wait = machine.poll_timeout().unwrap() - S(connected);
            assert_eq!(wait.as_millis(), if want == 0 { 750 % 251 } else { 750 % 501 });
        }
    }

    #[test]
    fn a_wish_of_the_gateway_is_the_least_wait() {
        let mut machine = at(State::Live);
        machine.step(Event::Lost { after: S(5) }, S(10), 3);
        assert_eq!(machine.poll_timeout(), Some(S(15)));
    }

    #[test]
    fn pokes_are_bounded_per_minute() {
        let mut machine = at(State::Backoff);
        let mut raced = 0;
        for _ in 0..50 {
            raced += machine.step(Event::Poke, S(1), 5).len();
            machine.step(Event::Unreached, S(1), 5);
        }
        assert_eq!(raced, 10);
        assert_eq!(machine.step(Event::Poke, S(61), 5), [Action::Race], "the next minute is a new one");
    }

    #[test]
    fn draining_makes_the_next_connection_before_it_breaks_this_one() {
        let mut machine = at(State::Draining);
        assert_eq!(machine.poll_timeout(), Some(Duration::from_millis(100)), "a part of the spread");
        assert_eq!(machine.step(Event::Timer, S(1), 0), [Action::Race]);
        assert_eq!(machine.step(Event::Unreached, S(1), 9), []);
        assert_eq!(machine.state(), State::Draining, "the old connection still works");
        assert_eq!(machine.step(Event::Timer, S(2), 0), [Action::Race]);
        assert_eq!(machine.step(Event::Lost { after: S(0) }, S(2), 0), []);
        assert_eq!(machine.state(), State::Racing, "the race goes on without it");
        assert_eq!(machine.step(Event::Reached, S(2), 0), [Action::Adopt]);
    }
}

//! Where the connection stands and what to do next: a pure state machine, driven by `driver`.
//!
//! ```text
//! Offline ─▶ Racing ─▶ Handshaking ─▶ Syncing ─▶ Live ◀─▶ Suspect
//!    ▲         │ ▲          │            │         │         │ nobody answers
//!    │         ▼ │          ▼            ▼         ▼         ▼
//!    │       Backoff ◀───────────── lost ───────────     Racing
//!    │                                              GOAWAY ─▶ Draining ─▶ Handshaking (the next connection)
//! Suspended ◀─ from everywhere        Closed ◀─ from everywhere
//! ```
//!
//! - There is at most one connection and one race for the next one; a race goes on beside a connection only while
//!   Draining.
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

/// Nudges without an answer after which the connection is given up.
const NUDGES_MAX: u32 = 3;

/// Times per minute a send, or the operating system, may cut a back-off short.
const POKES_PER_MINUTE: u32 = 10;

/// Where the connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum State {
    /// Not started.
    Offline,
    /// Attempts to reach the gateway are on their way.
    Racing,
    /// Connected; the HELLO has left.
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
    /// A race has a winner.
    Reached,
    /// A race has none.
    Unreached,
    /// A WELCOME came.
    Welcomed,
    /// What was missed is in.
    Synced,
    /// Anything came from the gateway.
    Heard,
    /// Something of the gateway's is overdue.
    Overdue,
    /// The connection is gone or of no use; not again before `after`.
    Lost {
        after: Duration,
    },
    /// A GOAWAY: wait for a part of `spread` before the next connection.
    Goaway {
        spread: Duration,
    },
    /// The operating system says that the network changed.
    NetworkChanged,
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
    /// Make the winner of the race the connection: say HELLO on it, drop what was before.
    Adopt,
    /// Ask the gateway for a sign of life.
    Nudge,
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
    timer: Option<Duration>,
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
            timer: None,
            pokes: 0,
            pokes_since: Duration::ZERO,
        }
    }

    pub(crate) const fn state(&self) -> State {
        self.state
    }

    /// When [`Event::Timer`] is due.
    pub(crate) const fn poll_timeout(&self) -> Option<Duration> {
        self.timer
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
            (State::Racing | State::Draining, Event::Reached) => {
                self.racing = false;
                self.timer = None;
                self.synced = false;
                self.connected_at = None;
                self.state = State::Handshaking;
                actions.push(Action::Adopt);
            }
            (State::Racing, Event::Unreached) => self.back_off(Duration::ZERO, now, random),
            (State::Racing, Event::NetworkChanged) => {
                actions.extend([Action::EndRace, Action::NewSocket]);
                self.race(&mut actions);
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
            (State::Syncing | State::Live, Event::Overdue | Event::NetworkChanged) => {
                self.state = State::Suspect;
                self.nudges = 0;
                self.nudge(now, &mut actions);
            }
            (State::Suspect, Event::Heard) => {
                self.timer = None;
                self.state = if self.synced { State::Live } else { State::Syncing };
            }
            (State::Suspect, Event::Timer) if self.nudges < NUDGES_MAX => self.nudge(now, &mut actions),
            (State::Suspect, Event::Timer) => {
                actions.extend([Action::Drop, Action::NewSocket]);
                self.race(&mut actions);
            }
            (State::Syncing | State::Live | State::Suspect, Event::Goaway { spread }) => {
                let spread = u64::try_from(spread.as_millis()).unwrap_or(u64::MAX);
                let wait = Duration::from_millis(random % spread.saturating_add(1).max(1));
                self.timer = Some(now + wait);
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
                self.connected_at = None;
                self.state = State::Racing;
            }
            (
                State::Handshaking | State::Syncing | State::Live | State::Suspect | State::Draining,
                Event::Lost { after },
            ) => {
                if self.connected_at.take().is_some_and(|at| now.saturating_sub(at) >= SETTLED_AFTER) {
                    self.failures = 0;
                }
                self.back_off(after, now, random);
            }
            (State::Backoff, Event::Timer) => self.race(&mut actions),
            (State::Backoff, Event::Poke | Event::NetworkChanged | Event::Resume) => {
                if now.saturating_sub(self.pokes_since) >= Duration::from_secs(60) {
                    self.pokes = 0;
                    self.pokes_since = now;
                }
                if self.pokes < POKES_PER_MINUTE {
                    self.pokes += 1;
                    if event == Event::NetworkChanged {
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
        self.racing = true;
        self.connected_at = None;
        self.state = State::Racing;
        actions.push(Action::Race);
    }

    fn back_off(&mut self, at_least: Duration, now: Duration, random: u64) {
        self.racing = false;
        self.timer = Some(now + full_jitter(self.failures, random).max(at_least));
        self.failures = self.failures.saturating_add(1);
        self.state = State::Backoff;
    }

    fn nudge(&mut self, now: Duration, actions: &mut Vec<Action>) {
        self.nudges += 1;
        self.timer = Some(now + NUDGE_EVERY);
        actions.push(Action::Nudge);
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
        self.connected_at = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    /// The shortest way to a state.
    fn at(state: State) -> Machine {
        let mut machine = Machine::new();
        let way: &[Event] = match state {
            State::Offline => &[],
            State::Racing => &[Event::Start],
            State::Handshaking => &[Event::Start, Event::Reached],
            State::Syncing => &[Event::Start, Event::Reached, Event::Welcomed],
            State::Live => &[Event::Start, Event::Reached, Event::Welcomed, Event::Synced],
            State::Suspect => &[Event::Start, Event::Reached, Event::Welcomed, Event::Synced, Event::Overdue],
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
            Event::Overdue,
            LOST,
            GOAWAY,
            Event::NetworkChanged,
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
            (Racing,      Event::NetworkChanged, Racing,      &[EndRace, NewSocket, Race]),
            (Racing,      Event::Suspend,        Suspended,   &[EndRace]),
            (Racing,      Event::Close,          Closed,      &[EndRace]),
            (Handshaking, Event::Welcomed,       Syncing,     &[]),
            (Handshaking, LOST,                  Backoff,     &[]),
            (Handshaking, Event::Suspend,        Suspended,   &[Drop]),
            (Handshaking, Event::Close,          Closed,      &[Drop]),
            (Syncing,     Event::Synced,         Live,        &[]),
            (Syncing,     Event::Overdue,        Suspect,     &[Nudge]),
            (Syncing,     Event::NetworkChanged, Suspect,     &[Nudge]),
            (Syncing,     LOST,                  Backoff,     &[]),
            (Syncing,     GOAWAY,                Draining,    &[]),
            (Syncing,     Event::Suspend,        Suspended,   &[Drop]),
            (Syncing,     Event::Close,          Closed,      &[Drop]),
            (Live,        Event::Overdue,        Suspect,     &[Nudge]),
            (Live,        Event::NetworkChanged, Suspect,     &[Nudge]),
            (Live,        LOST,                  Backoff,     &[]),
            (Live,        GOAWAY,                Draining,    &[]),
            (Live,        Event::Suspend,        Suspended,   &[Drop]),
            (Live,        Event::Close,          Closed,      &[Drop]),
            (Suspect,     Event::Heard,          Live,        &[]),
            (Suspect,     Event::Timer,          Suspect,     &[Nudge]),
            (Suspect,     LOST,                  Backoff,     &[]),
            (Suspect,     GOAWAY,                Draining,    &[]),
            (Suspect,     Event::Suspend,        Suspended,   &[Drop]),
            (Suspect,     Event::Close,          Closed,      &[Drop]),
            (Draining,    Event::Timer,          Draining,    &[Race]),
            (Draining,    Event::Reached,        Handshaking, &[Adopt]),
            (Draining,    LOST,                  Backoff,     &[]),
            (Draining,    Event::Suspend,        Suspended,   &[Drop]),
            (Draining,    Event::Close,          Closed,      &[Drop]),
            (Backoff,     Event::Timer,          Racing,      &[Race]),
            (Backoff,     Event::Poke,           Racing,      &[Race]),
            (Backoff,     Event::Resume,         Racing,      &[Race]),
            (Backoff,     Event::NetworkChanged, Racing,      &[NewSocket, Race]),
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

    #[test]
    fn who_does_not_answer_is_given_up_after_three_nudges() {
        let mut machine = at(State::Suspect);
        for second in 1..=2 {
            assert_eq!(machine.poll_timeout(), Some(S(second)));
            assert_eq!(machine.step(Event::Timer, S(second), 0), [Action::Nudge]);
        }
        assert_eq!(
            machine.step(Event::Timer, S(3), 0),
            [Action::Drop, Action::NewSocket, Action::Race],
            "not one probe after the other, but a new connection"
        );
        assert_eq!((machine.state(), machine.poll_timeout()), (State::Racing, None));
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

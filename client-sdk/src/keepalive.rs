//! When to ask a silent connection for a sign of life, learned from the network (pure; the time comes from outside).
//!
//! A phone is reached through mappings that routers forget after a silence. A PING that leaves before that keeps the
//! mapping, one that leaves after it comes too late for what was sent to the phone meanwhile; every PING costs battery.
//!
//! - The interval begins at what the network is known to bear, grows by half after [`QUIET_RUNS`] silences that it
//!   bore, and never leaves the range the gateway allows.
//! - Only proof of a forgotten mapping shortens it: the answer came, but to another address ([`Answer::Moved`]); or no
//!   answer came, while a new path was answered at once ([`Keepalive::reached`]), twice. A network that is dead, or
//!   loses a packet, says nothing about mappings: then nothing grows and nothing shrinks.
//! - What failed is stayed below, by a fifth. After [`FORGIVEN_AFTER`] silences that went well it is tried once more.
//! - After a message it is asked sooner, and ever more rarely: the wait is as long as the last message is ago. Who
//!   waits for an answer notices a dead gateway soon, and a minute after it a PING in 5 s has become one in 40.
//! - While suspended there is no PING.
//!
//! Not here: sending it, and what to do when it is not answered (`driver`, `state`).

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The range until the gateway has named its own.
const RANGE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(120));

/// The first PING after a message.
const AFTER_MESSAGE: Duration = Duration::from_secs(5);

/// Silences of full length that have to go well before a longer one is tried.
const QUIET_RUNS: u32 = 3;

/// Silences of full length after which a length that failed is tried again.
const FORGIVEN_AFTER: u32 = 200;

/// Failures without the proof of another address that make one.
const STRIKES: u32 = 2;

/// What a network taught; kept with it over connections and runs of the app.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Learned {
    /// The longest silence it bore again and again, milliseconds; 0: none yet.
    pub(crate) good_ms: u32,
    /// The shortest silence after which it had forgotten, milliseconds; 0: none yet.
    pub(crate) bad_ms: u32,
}

/// To whom the answer to a PING came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// To the address the gateway knew.
    Same,
    /// To another one: the gateway asked the new path for proof (a PATH_CHALLENGE came in).
    Moved,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(crate) struct Keepalive {
    learned: Learned,
    shortest: Duration,
    longest: Duration,
    interval: Duration,
    /// Silences of full length that went well, one after the other.
    quiet: u32,
    /// The same since the last failure.
    well: u32,
    strikes: u32,
    /// The PING that waits for its answer: after which silence, and when it left.
    asked: Option<(Duration, Duration)>,
    suspended: bool,
}

impl Keepalive {
    /// For a connection on a network that taught `learned`.
    pub(crate) fn new(learned: Learned) -> Self {
        let mut keepalive = Self {
            learned,
            shortest: RANGE.0,
            longest: RANGE.1,
            interval: RANGE.0,
            quiet: 0,
            well: 0,
            strikes: 0,
            asked: None,
            suspended: false,
        };
        keepalive.interval = keepalive.clamped(millis(learned.good_ms));
        keepalive
    }

    /// The range a WELCOME named; one that is empty or upside down is read as its lower end.
    pub(crate) fn range(&mut self, shortest: Duration, longest: Duration) {
        self.shortest = shortest.max(Duration::from_secs(1));
        self.longest = longest.max(self.shortest);
        let wanted = self.interval.max(millis(self.learned.good_ms));
        self.interval = self.clamped(wanted);
    }

    /// The range the interval is held to.
    pub(crate) const fn bounds(&self) -> (Duration, Duration) {
        (self.shortest, self.longest)
    }

    /// What to keep with the network.
    pub(crate) const fn learned(&self) -> Learned {
        self.learned
    }

    /// The silence after which a PING leaves when no message was exchanged lately.
    #[cfg(test)]
    pub(crate) const fn interval(&self) -> Duration {
        self.interval
    }

    /// When a PING is due if nothing is heard: `heard_at` is the last sign of life, or the last PING; `message_at` the
    /// last message in either direction.
    pub(crate) fn ping_at(&self, heard_at: Duration, message_at: Option<Duration>) -> Option<Duration> {
        if self.suspended {
            return None;
        }
        let wait = match message_at {
            Some(message_at) => heard_at.saturating_sub(message_at).max(AFTER_MESSAGE).min(self.interval),
            None => self.interval,
        };
        Some(heard_at.saturating_add(wait))
    }

    /// The app went to the background, or came back.
    pub(crate) fn suspend(&mut self, suspended: bool) {
        self.suspended = suspended;
        self.forget();
    }

    /// A PING left after a silence in both directions. Nudges that follow it change nothing.
    pub(crate) fn pinged(&mut self, silence: Duration, now: Duration) {
        if self.asked.is_none() && silence >= self.full(self.shortest) {
            self.asked = Some((silence, now));
        }
    }

    /// Something came on the connection; `prompt` is how long an answer may take, usually `max(1 s, 3 srtt)`.
    pub(crate) fn heard(&mut self, answer: Answer, prompt: Duration, now: Duration) {
        let Some((silence, asked_at)) = self.asked.take() else { return };
        match answer {
            Answer::Moved => self.failed(silence),
            Answer::Same if now.saturating_sub(asked_at) <= prompt => self.went_well(silence),
            // A loss or a spell of darkness; the path is the old one.
            Answer::Same => self.quiet = 0,
        }
    }

    /// A new path (another socket, another connection on the same network) was answered `took` after its first packet,
    /// whichever attempt that was; a PING on the old one may still wait for its answer.
    pub(crate) fn reached(&mut self, took: Duration, prompt: Duration, now: Duration) {
        let Some((silence, asked_at)) = self.asked.take() else { return };
        self.quiet = 0;
        let old_had_its_time = now.saturating_sub(asked_at) > prompt.saturating_add(took);
        if took > prompt || !old_had_its_time {
            return;
        }
        // The network may just have come back. Twice in a row at this length is no accident.
        self.strikes += 1;
        if self.strikes >= STRIKES {
            self.failed(silence);
        } else {
            let proven = self.clamped(millis(self.learned.good_ms));
            self.interval = self.interval.min(proven);
        }
    }

    /// The connection or the network is another one, for reasons of its own: what was asked says nothing.
    pub(crate) const fn forget(&mut self) {
        self.asked = None;
    }

    fn went_well(&mut self, silence: Duration) {
        if silence < self.full(self.interval) {
            return;
        }
        self.strikes = 0;
        self.quiet += 1;
        self.well += 1;
        if self.well >= FORGIVEN_AFTER {
            self.well = 0;
            self.learned.bad_ms = 0;
        }
        if self.quiet < QUIET_RUNS {
            return;
        }
        self.quiet = 0;
        self.learned.good_ms = self.learned.good_ms.max(to_millis(self.interval));
        self.interval = self.clamped(self.interval.saturating_mul(3) / 2);
    }

    fn failed(&mut self, silence: Duration) {
        self.quiet = 0;
        self.well = 0;
        self.strikes = 0;
        let silence = to_millis(silence).max(1);
        if self.learned.bad_ms == 0 || silence < self.learned.bad_ms {
            self.learned.bad_ms = silence;
        }
        // What was proven once and fails now is proven no more.
        self.learned.good_ms = self.learned.good_ms.min(below(self.learned.bad_ms));
        let proven = millis(self.learned.good_ms).max(self.interval.saturating_mul(2) / 3);
        self.interval = self.clamped(proven.min(self.interval));
    }

    /// What counts as a silence of this length: timers and other packets take their share.
    fn full(&self, interval: Duration) -> Duration {
        interval.saturating_mul(9) / 10
    }

    fn clamped(&self, interval: Duration) -> Duration {
        let allowed = match self.learned.bad_ms {
            0 => self.longest,
            bad => self.longest.min(millis(below(bad))),
        };
        interval.min(allowed).max(self.shortest)
    }
}

/// Clearly shorter than what failed.
const fn below(bad_ms: u32) -> u32 {
    bad_ms - bad_ms / 5
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

fn to_millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;
    const PROMPT: Duration = Duration::from_secs(1);

    /// A network that forgets after some silence.
    struct Nat {
        now: Duration,
        heard_at: Duration,
        forgets_after: Duration,
    }

    impl Nat {
        fn new(forgets_after: Duration) -> Self {
            Self { now: S(0), heard_at: S(0), forgets_after }
        }

        /// One idle interval over QUIC; `true`: the mapping had been forgotten.
        fn idle(&mut self, keepalive: &mut Keepalive) -> bool {
            let at = keepalive.ping_at(self.heard_at, None).unwrap();
            let silence = at - self.heard_at;
            keepalive.pinged(silence, at);
            self.now = at + Duration::from_millis(80);
            let moved = silence > self.forgets_after;
            keepalive.heard(if moved { Answer::Moved } else { Answer::Same }, PROMPT, self.now);
            self.heard_at = self.now;
            moved
        }
    }

    #[test]
    fn it_grows_to_the_longest_where_nothing_is_forgotten() {
        let (mut keepalive, mut nat) = (Keepalive::new(Learned::default()), Nat::new(S(100_000)));
        let mut intervals = Vec::new();
        while nat.now < S(3_600) {
            let interval = keepalive.interval().as_secs_f32();
            if intervals.last() != Some(&interval) {
                intervals.push(interval);
            }
            assert!(!nat.idle(&mut keepalive));
        }
        assert_eq!(intervals, [15.0, 22.5, 33.75, 50.625, 75.9375, 113.90625, 120.0]);
        assert_eq!(keepalive.learned(), Learned { good_ms: 120_000, bad_ms: 0 });
        // The next hour: what the bar of packets is about. A PING that the transport answers is two packets.
        let mut pings = 0;
        let mut again = Keepalive::new(keepalive.learned());
        let end = nat.now + S(3_600);
        while nat.now < end {
            nat.idle(&mut again);
            pings += 1;
        }
        assert_eq!(pings, 30);
    }

    #[test]
    fn what_failed_is_stayed_below() {
        for (forgets_after, least, most) in
            [(30, 15, 30), (35, 20, 35), (60, 30, 60), (65, 40, 65), (119, 60, 119)]
        {
            let (mut keepalive, mut nat) = (Keepalive::new(Learned::default()), Nat::new(S(forgets_after)));
            let mut failures = 0;
            for _ in 0..FORGIVEN_AFTER {
                failures += u32::from(nat.idle(&mut keepalive));
            }
            assert!((1..=2).contains(&failures), "{failures}: one failure or two teach it");
            let interval = keepalive.interval();
            assert!(interval >= S(least) && interval <= S(most), "{forgets_after}: {interval:?}");
            let mut next = Keepalive::new(keepalive.learned());
            assert!(!nat.idle(&mut next), "the next connection begins with what was learned");
            // Tried again after a long time, and learned again.
            let tries: u32 = (0..FORGIVEN_AFTER).map(|_| u32::from(nat.idle(&mut keepalive))).sum();
            assert!(tries <= 2, "{tries}");
        }
    }

    #[test]
    fn a_network_that_forgets_sooner_than_the_gateway_lets_us_ask() {
        let (mut keepalive, mut nat) = (Keepalive::new(Learned::default()), Nat::new(S(10)));
        for _ in 0..50 {
            nat.idle(&mut keepalive);
            assert_eq!(keepalive.interval(), RANGE.0);
        }
    }

    #[test]
    fn a_dead_network_and_a_forgotten_mapping_are_told_apart() {
        // How long the new path took, and when after the PING it was reached; whether that is held against the interval.
        for (what, took, after, learns) in [
            ("answered at once, the old path had its time", S(0), S(4), true),
            ("answered after a while: the network was dead", S(5), S(9), false),
            ("the old path had no time to answer", S(0), Duration::from_millis(900), false),
        ] {
            let mut keepalive = Keepalive::new(Learned { good_ms: 50_000, bad_ms: 0 });
            keepalive.interval = S(75);
            for round in 0..2 {
                let now = S(1_000 * round);
                keepalive.pinged(S(75), now);
                keepalive.pinged(S(1), now + S(1));
                keepalive.reached(took, PROMPT, now + after);
            }
            let want = if learns { (S(50), 75_000) } else { (S(75), 0) };
            assert_eq!((keepalive.interval(), keepalive.learned().bad_ms), want, "{what}");
        }
    }

    #[test]
    fn one_new_path_is_no_proof_but_a_reason_for_care() {
        let mut keepalive = Keepalive::new(Learned { good_ms: 50_000, bad_ms: 0 });
        keepalive.interval = S(75);
        keepalive.pinged(S(75), S(0));
        keepalive.reached(S(0), PROMPT, S(4));
        assert_eq!((keepalive.interval(), keepalive.learned().bad_ms), (S(50), 0));
        // It goes well at 50 s: the strike is forgotten.
        for round in 1..4 {
            keepalive.pinged(S(50), S(100 * round));
            keepalive.heard(Answer::Same, PROMPT, S(100 * round));
        }
        assert_eq!(keepalive.interval(), S(75));
        keepalive.pinged(S(75), S(1_000));
        keepalive.reached(S(0), PROMPT, S(1_004));
        assert_eq!(keepalive.learned().bad_ms, 0);
    }

    #[test]
    fn late_answers_and_losses_change_nothing() {
        let mut keepalive = Keepalive::new(Learned::default());
        for round in 0..100 {
            keepalive.pinged(S(15), S(100 * round));
            keepalive.heard(Answer::Same, PROMPT, S(100 * round + 2));
        }
        assert_eq!((keepalive.interval(), keepalive.learned()), (RANGE.0, Learned::default()));
        // What is heard without having been asked says nothing.
        keepalive.heard(Answer::Moved, PROMPT, S(1));
        keepalive.reached(S(0), PROMPT, S(1));
        assert_eq!(keepalive.learned(), Learned::default());
    }

    #[test]
    fn short_silences_prove_nothing() {
        let mut keepalive = Keepalive::new(Learned { good_ms: 60_000, bad_ms: 0 });
        for round in 0..100 {
            keepalive.pinged(S(20), S(100 * round));
            keepalive.heard(Answer::Same, PROMPT, S(100 * round));
        }
        assert_eq!(keepalive.interval(), S(60));
    }

    #[test]
    fn the_range_is_the_gateways() {
        let mut keepalive = Keepalive::new(Learned { good_ms: 120_000, bad_ms: 0 });
        for (shortest, longest, want) in
            [(15, 120, 120), (15, 60, 60), (15, 300, 120), (150, 300, 150), (30, 10, 30), (0, 0, 1)]
        {
            keepalive.range(S(shortest), S(longest));
            assert_eq!(keepalive.interval(), S(want), "{shortest} to {longest}");
        }
    }

    #[test]
    fn after_a_message_it_is_asked_ever_more_rarely() {
        let keepalive = Keepalive::new(Learned { good_ms: 120_000, bad_ms: 0 });
        let message_at = Some(S(1_000));
        let (mut heard_at, mut asked) = (S(1_000), Vec::new());
        while heard_at < S(1_500) {
            heard_at = keepalive.ping_at(heard_at, message_at).unwrap();
            asked.push((heard_at - S(1_000)).as_secs());
        }
        assert_eq!(asked, [5, 10, 20, 40, 80, 160, 280, 400, 520]);
        // Where the network bears little, it is never asked later than that.
        let keepalive = Keepalive::new(Learned { good_ms: 30_000, bad_ms: 40_000 });
        let mut heard_at = S(1_000);
        for want in [5, 10, 20, 40, 70, 100] {
            heard_at = keepalive.ping_at(heard_at, message_at).unwrap();
            assert_eq!(heard_at, S(1_000 + want));
        }
    }

    #[test]
    fn nothing_is_asked_while_suspended() {
        let mut keepalive = Keepalive::new(Learned::default());
        keepalive.pinged(S(15), S(15));
        keepalive.suspend(true);
        assert_eq!(keepalive.ping_at(S(0), None), None);
        assert_eq!(keepalive.ping_at(S(0), Some(S(0))), None);
        keepalive.suspend(false);
        assert_eq!(keepalive.ping_at(S(20), None), Some(S(35)));
        keepalive.reached(S(0), PROMPT, S(3_600));
        assert_eq!(keepalive.strikes, 0, "what was asked before says nothing");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Pinged(u64),
        Heard(bool, u64),
        Reached(u64, u64),
        Range(u64, u64),
        Suspend(bool),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..200u64).prop_map(Step::Pinged),
            (any::<bool>(), 0..5u64).prop_map(|(moved, later)| Step::Heard(moved, later)),
            (0..5u64, 0..10u64).prop_map(|(took, later)| Step::Reached(took, later)),
            (0..400u64, 0..400u64).prop_map(|(a, b)| Step::Range(a, b)),
            any::<bool>().prop_map(Step::Suspend),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn whatever_happens_it_stays_in_the_range_and_below_what_failed(
            good_ms: u32, bad_ms: u32, steps in steps()
        ) {
            let mut keepalive = Keepalive::new(Learned { good_ms, bad_ms });
            let mut now = S(0);
            for step in steps {
                match step {
                    Step::Pinged(silence) => keepalive.pinged(S(silence), now),
                    Step::Heard(moved, later) => {
                        now += S(later);
                        keepalive.heard(if moved { Answer::Moved } else { Answer::Same }, PROMPT, now);
                    }
                    Step::Reached(took, later) => {
                        now += S(later);
                        keepalive.reached(S(took), PROMPT, now);
                    }
                    Step::Range(a, b) => keepalive.range(S(a), S(b)),
                    Step::Suspend(suspended) => keepalive.suspend(suspended),
                }
                let (interval, bad) = (keepalive.interval(), keepalive.learned().bad_ms);
                prop_assert!(interval >= keepalive.shortest && interval <= keepalive.longest);
                prop_assert!(
                    bad == 0 || interval == keepalive.shortest || interval <= millis(below(bad)),
                    "{:?}", keepalive
                );
                prop_assert!(keepalive.ping_at(now, None).is_none_or(|at| at == now + interval));
                prop_assert!(keepalive.ping_at(now, Some(now)).is_none_or(|at| at <= now + interval));
            }
        }

        /// Whatever the network forgets after, and whatever is lost besides: it is learned, and failures get rare.
        #[test]
        fn every_network_is_learned(forgets_after in 16..200u64, lost in prop::collection::vec(0..10u8, 400)) {
            let (mut keepalive, mut nat) = (Keepalive::new(Learned::default()), Nat::new(S(forgets_after)));
            let mut failures = 0;
            for lost in lost {
                if lost == 0 {
                    // The PING is lost, a nudge gets through.
                    let at = keepalive.ping_at(nat.heard_at, None).unwrap();
                    keepalive.pinged(at - nat.heard_at, at);
                    keepalive.heard(Answer::Same, PROMPT, at + S(2));
                    nat.heard_at = at + S(2);
                } else {
                    failures += u32::from(nat.idle(&mut keepalive));
                }
            }
            prop_assert!(failures <= 4, "{failures}");
            prop_assert!(keepalive.interval() >= S(15) && keepalive.interval() <= S(120));
            prop_assert!(keepalive.interval() >= S(forgets_after.min(120)) / 3);
        }
    }
}

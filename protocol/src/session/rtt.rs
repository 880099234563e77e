//! How long an answer takes, learned from answers as RFC 6298 does, on links that lose packets.
//!
//! - An answer that came later than one waits for ([`Rtt::overdue_after`]) may be the answer to a repetition, the
//!   transport's or ours: Karn's rule would leave it out. Here it counts as a little slower than usual, so that single
//!   losses hardly move the estimate; after three of them in a row the path itself has become slower, and
//!   the shortest of them is the new estimate.
//! - A seed is what a network was like before: a first sample of about that size is taken in, any other replaces it.
//!   What a handshake takes is no seed: it is two round trips or three.
//!
//! Not here: who asks and who answers (`client`, `hedge`).

use core::time::Duration;

/// The shortest time after which an answer counts as overdue.
pub const OVERDUE_MIN: Duration = Duration::from_millis(40);

/// So many late answers without a timely one between them mean that the path is slower than it was.
const LATE_IN_A_ROW: u32 = 3;

/// See the module's text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rtt {
    /// Smoothed; `None` before anything is known.
    smoothed: Option<Duration>,
    variation: Duration,
    /// Only a seed is known.
    seeded: bool,
    /// The estimate was made from late answers: a clearly shorter one shows that those were losses.
    doubtful: bool,
    late: u32,
    /// The shortest of the late ones in a row.
    late_min: Duration,
}

impl Rtt {
    /// Knows what was remembered of this network, or nothing.
    #[must_use]
    pub fn new(seed: Option<Duration>) -> Self {
        let mut rtt = Self::default();
        if let Some(seed) = seed.filter(|seed| !seed.is_zero()) {
            rtt.restart(seed);
            rtt.seeded = true;
        }
        rtt
    }

    /// The smoothed round trip, the answerer's work included. `None`: nothing is known yet.
    #[must_use]
    pub const fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    /// After how long an answer is overdue: `max(1.25 srtt, srtt + 4 rttvar, 40 ms)`. `None`: nothing is known yet.
    #[must_use]
    pub fn overdue_after(&self) -> Option<Duration> {
        let smoothed = self.smoothed?;
        Some((smoothed + smoothed / 4).max(smoothed + 4 * self.variation).max(OVERDUE_MIN))
    }

    /// An answer took this long. `repeated`: the question left more than once, so this may be the answer to a copy.
    pub fn sample(&mut self, took: Duration, repeated: bool) {
        let (Some(smoothed), Some(overdue)) = (self.smoothed, self.overdue_after()) else {
            return self.restart(took);
        };
        // What was repeated says little, also about a seed.
        if !repeated && core::mem::take(&mut self.seeded) && (took < smoothed * 3 / 4 || took > smoothed * 2)
        {
            return self.restart(took);
        }
        if self.doubtful && took < smoothed * 3 / 4 {
            return self.restart(took);
        }
        if !repeated && took <= overdue {
            self.late = 0;
            return self.take_in(smoothed, took);
        }
        self.late_min = if self.late == 0 { took } else { self.late_min.min(took) };
        self.late += 1;
        if self.late >= LATE_IN_A_ROW {
            self.restart(self.late_min);
            self.doubtful = true;
            return;
        }
        self.take_in(smoothed, took.min(smoothed + (2 * self.variation).max(smoothed / 8)));
    }

    fn take_in(&mut self, smoothed: Duration, took: Duration) {
        self.variation = (3 * self.variation + smoothed.abs_diff(took)) / 4;
        self.smoothed = Some((7 * smoothed + took) / 8);
    }

    /// Nothing but this is known. A hedge that leaves too early costs little, so the variation starts lower than a
    /// retransmission timer's would.
    fn restart(&mut self, took: Duration) {
        *self = Self { smoothed: Some(took), variation: took / 8, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn after(seed: Option<u64>, samples: impl IntoIterator<Item = (u64, bool)>) -> Rtt {
        let mut rtt = Rtt::new(seed.map(ms));
        for (took, repeated) in samples {
            rtt.sample(ms(took), repeated);
        }
        rtt
    }

    #[test]
    fn what_is_known_after_a_few_answers() {
        let rows = [
            ("nothing", None, vec![], None, None),
            ("a seed", Some(100), vec![], Some(100), Some(150)),
            ("no seed is zero", Some(0), vec![], None, None),
            ("a first answer", None, vec![(80, false)], Some(80), Some(120)),
            ("a steady path", None, vec![(100, false); 20], Some(100), Some(125)),
            ("a fast path", None, vec![(2, false); 20], Some(2), Some(40)),
            ("a seed of another path", Some(400), vec![(50, false)], Some(50), Some(75)),
            ("a seed of this path", Some(100), vec![(108, false)], Some(101), Some(146)),
            ("a seed, and a loss at once", Some(100), vec![(280, true)], Some(103), Some(165)),
            (
                "two losses",
                None,
                [vec![(100, false); 20], vec![(280, false); 2]].concat(),
                Some(103),
                Some(128),
            ),
            (
                "a slower path",
                None,
                [vec![(100, false); 20], vec![(320, true), (300, false), (310, true)]].concat(),
                Some(300),
                Some(450),
            ),
            (
                "three losses in a row, and then as before",
                None,
                [vec![(100, false); 20], vec![(280, true), (230, false), (300, true)], vec![(100, false); 3]]
                    .concat(),
                Some(100),
                Some(128),
            ),
        ];
        for (what, seed, samples, smoothed, overdue) in rows {
            let rtt = after(seed, samples);
            let millis = |at: Option<Duration>| at.map(|at| u64::try_from(at.as_millis()).unwrap());
            assert_eq!((millis(rtt.smoothed()), millis(rtt.overdue_after())), (smoothed, overdue), "{what}");
        }
    }

    #[test]
    fn a_repeated_question_never_makes_the_estimate_shorter() {
        let mut rtt = after(None, vec![(100, false); 20]);
        rtt.sample(ms(130), true);
        assert!(rtt.smoothed() > Some(ms(100)) && rtt.overdue_after() < Some(ms(135)), "{rtt:?}");
    }

    #[test]
    fn one_answer_in_five_late_for_ever_keeps_the_estimate_useful() {
        let mut rtt = Rtt::new(None);
        for n in 0..1_000 {
            rtt.sample(ms(if n % 5 == 4 { 280 } else { 100 }), false);
            assert!(rtt.overdue_after() <= Some(ms(160)), "{n}: {rtt:?}");
        }
    }

    #[test]
    fn a_jumping_path_is_given_time() {
        let mut rtt = Rtt::new(None);
        let mut state = 7u64;
        let mut late = 0;
        for _ in 0..2_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let took = ms(70 + (state >> 33) % 61);
            late += u32::from(rtt.overdue_after().is_some_and(|overdue| took > overdue));
            rtt.sample(took, false);
        }
        assert!(late < 60, "{late} of 2000 answers on a path of 70 to 130 ms were called overdue");
        assert!(rtt.overdue_after() < Some(ms(190)), "{rtt:?}");
    }
}

//! How long an answer takes, learned from answers as RFC 6298 does, on links that lose packets.
//!
//! - An answer that came later than one waits for ([`Rtt::overdue_after`]) is of one of two kinds. It took about a round trip
//!   from the first copy on (or, without a copy, about two from the question on): that is what a **loss** looks like, and it says
//!   nothing about the path, as in Karn's rule. It came sooner than that: then it answers the question itself, and it was
//!   **late**; it counts as a little slower than usual. (Eifel, RFC 3522, tells them apart by time stamps.)
//! - Three late ones in a row mean that the path itself has become slower, and the shortest of them is the new estimate. A path more
//!   than twice as slow looks like losses: it takes eight of those in a row, which chance hardly brings.
//! - A seed is what a network was like before: a first sample of about that size is taken in, any other replaces it.
//!   What a handshake takes is no seed: it is two round trips or three.
//!
//! Not here: who asks and who answers (`client`, `hedge`).

use core::time::Duration;

/// The shortest time after which an answer counts as overdue.
pub const OVERDUE_MIN: Duration = Duration::from_millis(40);

/// What late answers without a timely one between them weigh together when the path is slower than it was.
const SLOWER: u32 = 8;

/// What one of them weighs, and what one weighs that looks like a loss.
const LATE: u32 = 3;
const LOST: u32 = 1;

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
    /// What the late ones in a row weigh.
    late: u32,
    /// The shortest of them.
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

    /// After how long an answer is overdue: `max(17/16 srtt, srtt + 4 rttvar, 40 ms)`. `None`: nothing is known yet.
    #[must_use]
    pub fn overdue_after(&self) -> Option<Duration> {
        let smoothed = self.smoothed?;
        Some((smoothed + smoothed / 16).max(smoothed + 4 * self.variation).max(OVERDUE_MIN))
    }

    /// An answer took this long. `since_copy`: the question left more than once, and so long ago for the second time.
    pub fn sample(&mut self, took: Duration, since_copy: Option<Duration>) {
        let (Some(smoothed), Some(overdue)) = (self.smoothed, self.overdue_after()) else {
            return self.restart(took);
        };
        // What was repeated says little, also about a seed.
        if since_copy.is_none()
            && core::mem::take(&mut self.seeded)
            && (took < smoothed * 3 / 4 || took > smoothed * 2)
        {
            return self.restart(took);
        }
        if self.doubtful && took < smoothed * 3 / 4 {
            return self.restart(took);
        }
        if since_copy.is_none() && took <= overdue {
            self.late = 0;
            return self.take_in(smoothed, took);
        }
        let lost = match since_copy {
            Some(since) => since >= smoothed * 3 / 4,
            None => took >= smoothed * 7 / 4,
        };
        self.late_min = if self.late == 0 { took } else { self.late_min.min(took) };
        self.late += if lost { LOST } else { LATE };
        if self.late >= SLOWER {
            self.restart(self.late_min);
            self.doubtful = true;
        } else if !lost {
            self.take_in(smoothed, took.min(smoothed + (2 * self.variation).max(smoothed / 8)));
        }
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

    fn after(seed: Option<u64>, samples: impl IntoIterator<Item = (u64, Option<u64>)>) -> Rtt {
        let mut rtt = Rtt::new(seed.map(ms));
        for (took, since_copy) in samples {
            rtt.sample(ms(took), since_copy.map(ms));
        }
        rtt
    }

    #[test]
    fn what_is_known_after_a_few_answers() {
        let steady = || vec![(100, None); 20];
        let rows = [
            ("nothing", None, vec![], None, None),
            ("a seed", Some(100), vec![], Some(100), Some(150)),
            ("no seed is zero", Some(0), vec![], None, None),
            ("a first answer", None, vec![(80, None)], Some(80), Some(120)),
            ("a steady path", None, steady(), Some(100), Some(106)),
            ("a fast path", None, vec![(2, None); 20], Some(2), Some(40)),
            ("a seed of another path", Some(400), vec![(50, None)], Some(50), Some(75)),
            ("a seed of this path", Some(100), vec![(108, None)], Some(101), Some(146)),
            ("a seed, and a loss at once", Some(100), vec![(280, Some(130))], Some(100), Some(150)),
            (
                "losses",
                None,
                [steady(), [(206, Some(100)), (280, None)].repeat(3)].concat(),
                Some(100),
                Some(106),
            ),
            (
                "a slower path",
                None,
                [steady(), vec![(155, Some(49)), (150, None), (160, Some(54))]].concat(),
                Some(150),
                Some(225),
            ),
            (
                "a much slower path",
                None,
                [steady(), vec![(300, Some(194)); 8]].concat(),
                Some(300),
                Some(450),
            ),
            (
                "three slow answers, and then as before",
                None,
                [steady(), vec![(165, Some(59)), (150, None), (160, Some(54))], vec![(100, None); 3]]
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
        let mut rtt = after(None, vec![(100, None); 20]);
        rtt.sample(ms(130), Some(ms(24)));
        assert!(rtt.smoothed() > Some(ms(100)) && rtt.overdue_after() < Some(ms(135)), "{rtt:?}");
    }

    #[test]
    fn one_answer_in_five_late_for_ever_keeps_the_estimate_useful() {
        let mut rtt = Rtt::new(None);
        for n in 0..1_000 {
            rtt.sample(ms(if n % 5 == 4 { 280 } else { 100 }), None);
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
            rtt.sample(took, None);
        }
        assert!(late < 60, "{late} of 2000 answers on a path of 70 to 130 ms were called overdue");
        assert!(rtt.overdue_after() < Some(ms(190)), "{rtt:?}");
    }
}

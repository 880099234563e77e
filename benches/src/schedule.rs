//! When messages are due, decided before and without a look at what comes back (an open loop): a gateway that is late does
//! not get fewer of them, and each is measured from when it was due. (What a closed loop leaves out is known as coordinated
//! omission; Gil Tene, "How NOT to Measure Latency", 2013.)

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

/// How messages are spread over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Arrivals {
    /// Independent of each other, as many people's are: gaps are exponential
    Poisson,
    /// At equal distances
    Even,
}

/// The times at which one thread's messages are due.
#[derive(Debug)]
pub struct Schedule {
    arrivals: Arrivals,
    gap: Duration,
    next: Duration,
    random: SmallRng,
}

impl Schedule {
    /// `rate` messages a second from `begin` on; `None`: there are none.
    #[must_use]
    pub fn new(arrivals: Arrivals, rate: f64, begin: Duration, seed: u64) -> Option<Self> {
        let gap = Duration::try_from_secs_f64(1.0 / rate).ok().filter(|gap| !gap.is_zero())?;
        let mut schedule = Self { arrivals, gap, next: begin, random: SmallRng::seed_from_u64(seed) };
        // Threads do not begin with a message each at the same moment.
        schedule.next += gap.mul_f64(schedule.random.random::<f64>());
        Some(schedule)
    }

    /// When the next message is due.
    #[must_use]
    pub const fn peek(&self) -> Duration {
        self.next
    }

    /// Takes the next message.
    pub fn take(&mut self) -> Duration {
        let due = self.next;
        let gap = match self.arrivals {
            Arrivals::Even => self.gap,
            // 1 - x is never 0.
            Arrivals::Poisson => self.gap.mul_f64(-(1.0 - self.random.random::<f64>()).ln()),
        };
        self.next += gap;
        due
    }

    /// A number below `bound`, for whose turn it is.
    pub fn turn(&mut self, bound: usize) -> usize {
        self.random.random_range(0..bound.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(arrivals: Arrivals) -> Vec<Duration> {
        let mut schedule = Schedule::new(arrivals, 1_000.0, Duration::from_secs(1), 3).unwrap();
        (0..10_000).map(|_| schedule.take()).collect()
    }

    #[test]
    fn as_many_come_as_were_asked_for() {
        for arrivals in [Arrivals::Even, Arrivals::Poisson] {
            let times = times(arrivals);
            let lasts = times[9_999] - Duration::from_secs(1);
            // 10 000 exponential gaps of a millisecond: 10 s, one standard deviation being 0.1 s.
            assert!((9.5..10.5).contains(&lasts.as_secs_f64()), "{arrivals:?}: {lasts:?}");
            assert!(times.is_sorted());
            assert!(times[0] >= Duration::from_secs(1));
        }
    }

    #[test]
    fn poisson_gaps_are_exponential() {
        let times = times(Arrivals::Poisson);
        let longer = times.windows(2).filter(|pair| pair[1] - pair[0] > Duration::from_millis(1)).count();
        // A share of 1/e is longer than the mean: 3 679 of 10 000, one standard deviation being 48.
        assert!((3_400..3_950).contains(&longer), "{longer}");
    }

    #[test]
    fn no_rate_is_no_schedule() {
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Schedule::new(Arrivals::Even, rate, Duration::ZERO, 1).is_none(), "{rate}");
        }
    }
}

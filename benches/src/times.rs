//! Times and how they are spread, in nanoseconds to three digits (HDR histograms: G. Tene, <http://hdrhistogram.org>).

use std::time::Duration;

use hdrhistogram::Histogram;

/// The longest time that is told apart from longer ones.
const TIME_MAX: Duration = Duration::from_secs(600);

/// Times, as they are spread.
#[derive(Clone, Debug)]
pub struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        let max = u64::try_from(TIME_MAX.as_nanos()).unwrap_or(u64::MAX);
        // Only a bound below 2 or more than five digits is refused.
        let histogram = Histogram::new_with_bounds(1_000, max, 3).or_else(|_| Histogram::new(3));
        Self(histogram.unwrap_or_else(|_| unreachable!("three digits are few enough")))
    }
}

impl Times {
    /// Adds one; what is longer than ten minutes counts as ten minutes.
    pub fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Adds those of another.
    pub fn append(&mut self, other: &Self) {
        // Both have the same bounds.
        let _ = self.0.add(&other.0);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.0.reset();
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The time that this share (0 to 1) of them don't exceed; zero if there is none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        Duration::from_nanos(if self.0.is_empty() { 0 } else { self.0.value_at_quantile(share) })
    }

    /// The longest.
    #[must_use]
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.0.max())
    }

    /// Points of the curve "what share took no longer": (time, share).
    #[must_use]
    pub fn curve(&self) -> Vec<(Duration, f64)> {
        let mut points = Vec::new();
        for value in self.0.iter_quantiles(4) {
            points.push((Duration::from_nanos(value.value_iterated_to()), value.quantile()));
        }
        points
    }
}

/// A time with three digits.
#[must_use]
pub fn spoken(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    match us {
        us if us < 1.0 => "0".to_owned(),
        us if us < 1_000.0 => format!("{us:.0} µs"),
        us if us < 10_000.0 => format!("{:.2} ms", us / 1e3),
        us if us < 100_000.0 => format!("{:.1} ms", us / 1e3),
        us if us < 1e6 => format!("{:.0} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_times_are_no_trouble() {
        let mut times = Times::default();
        assert_eq!((times.quantile(0.99), times.max()), (Duration::ZERO, Duration::ZERO));
        times.add(Duration::from_secs(10_000));
        assert!(times.max() >= Duration::from_secs(599));
    }

    #[test]
    fn times_are_spoken() {
        for (us, said) in [
            (0, "0"),
            (5, "5 µs"),
            (1_234, "1.23 ms"),
            (45_600, "45.6 ms"),
            (789_000, "789 ms"),
            (2_500_000, "2.50 s"),
        ] {
            assert_eq!(spoken(Duration::from_micros(us)), said);
        }
    }
}

//! Latencies of a run, and what a person wants to know of them.
//!
//! - Kept in microseconds with three significant digits (an error of at most 0.1 %), in a fixed amount of memory
//!   however many are recorded.
//! - Longer than [`LATENCY_MAX`] counts as that long: the tail is never left out.
//!
//! Not here: where the two moments come from (the caller's clock), floors and bars.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The longest latency that is told apart from longer ones.
pub const LATENCY_MAX: Duration = Duration::from_hours(1);

/// A collection of latencies. Merge one per thread instead of sharing one.
///
/// ```
/// use std::time::Duration;
/// use fulmar_badnet::figures::Latencies;
/// let mut latencies = Latencies::new();
/// for millis in 1..=1_000 {
///     latencies.record(Duration::from_millis(millis));
/// }
/// let figures = latencies.figures();
/// assert_eq!(figures.count, 1_000);
/// assert!((figures.p50 - 500.0).abs() < 1.0);
/// assert!((figures.p99 - 990.0).abs() < 2.0);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    /// Made with the first latency.
    histogram: Option<Histogram<u64>>,
}

/// Percentiles in milliseconds; all zero when nothing was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// How many latencies there are.
    pub count: u64,
    /// Half of them are at most this long.
    pub p50: f64,
    /// 99 of 100 are at most this long.
    pub p99: f64,
    /// 999 of 1 000 are at most this long.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

impl Latencies {
    /// An empty collection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one.
    pub fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.min(LATENCY_MAX).as_micros()).unwrap_or(u64::MAX);
        if self.histogram.is_none() {
            self.histogram = Histogram::new_with_bounds(1, micros_max(), 3).ok();
        }
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(micros);
        }
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Self) {
        let Some(theirs) = &other.histogram else { return };
        match &mut self.histogram {
            // Both have the same bounds and digits, so all of it fits.
            Some(ours) => ours.add(theirs).unwrap_or_default(),
            None => self.histogram = Some(theirs.clone()),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.histogram.as_ref().map_or(0, Histogram::len)
    }

    /// The latency that `quantile` (0 to 1) of all do not exceed, in milliseconds; 0 when there is none.
    #[must_use]
    pub fn millis_at(&self, quantile: f64) -> f64 {
        self.histogram.as_ref().map_or(0.0, |histogram| millis(histogram.value_at_quantile(quantile)))
    }

    /// The usual percentiles.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            count: self.count(),
            p50: self.millis_at(0.5),
            p99: self.millis_at(0.99),
            p999: self.millis_at(0.999),
            max: self.histogram.as_ref().map_or(0.0, |histogram| millis(histogram.max())),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms", self.p50, self.p99, self.p999)
    }
}

fn micros_max() -> u64 {
    u64::try_from(LATENCY_MAX.as_micros()).unwrap_or(u64::MAX)
}

fn millis(micros: u64) -> f64 {
    // An hour in microseconds has 32 bits, so nothing is rounded.
    f64::from(u32::try_from(micros).unwrap_or(u32::MAX)) / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_list() {
        let mut all = Latencies::new();
        let mut halves = [Latencies::new(), Latencies::new()];
        for micros in 1..=10_000u64 {
            all.record(Duration::from_micros(micros * 100));
            halves[usize::from(micros % 2 == 0)].record(Duration::from_micros(micros * 100));
        }
        let [mut merged, even] = halves;
        merged.merge(&even);
        assert_eq!(merged.figures(), all.figures());
        let figures = all.figures();
        for (got, want) in
            [(figures.p50, 500.0), (figures.p99, 990.0), (figures.p999, 999.0), (figures.max, 1_000.0)]
        {
            assert!((got - want).abs() <= want * 0.001 + 0.001, "{got} where {want} is right");
        }
        assert_eq!(figures.count, 10_000);
    }

    #[test]
    fn the_edges_are_counted() {
        let mut latencies = Latencies::new();
        assert_eq!(latencies.figures(), Figures::default());
        latencies.record(Duration::ZERO);
        latencies.record(Duration::from_secs(1_000_000));
        assert_eq!(latencies.count(), 2);
        assert!(latencies.figures().max >= 3_599_000.0);
        let mut empty = Latencies::new();
        empty.merge(&latencies);
        empty.merge(&Latencies::new());
        assert_eq!(empty.count(), 2);
    }
}

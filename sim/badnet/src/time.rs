//! Time inside a world.
//!
//! - A [`SimTime`] counts from the start of its world, in nanoseconds; it says nothing about the clock on the wall.
//! - Whoever drives the world knows the time and hands it in: a real-time driver from the monotonic clock, a
//!   virtual-time driver from its own hand. Nothing that decides ever asks a clock.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

/// A moment of a world: nanoseconds since its start. Sums stop at the end of time (584 years) instead of wrapping.
///
/// ```
/// use std::time::Duration;
/// use fulmar_badnet::SimTime;
/// let later = SimTime::START + Duration::from_millis(20);
/// assert_eq!(later.since(SimTime::START), Duration::from_millis(20));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SimTime(u64);

impl SimTime {
    /// When the world begins.
    pub const START: Self = Self(0);
    /// The last moment there is.
    pub const END: Self = Self(u64::MAX);

    /// The moment `nanos` nanoseconds after the start.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// The moment `millis` milliseconds after the start.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// Nanoseconds since the start.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is before.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for SimTime {
    type Output = Self;

    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(nanos_of(span)))
    }
}

impl fmt::Display for SimTime {
    /// Seconds with microseconds: `12.000345`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000_000, self.0 % 1_000_000_000 / 1_000)
    }
}

/// Whole nanoseconds of `span`, stopping at the largest number there is.
pub(crate) fn nanos_of(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

pub(crate) fn duration_of(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stops_instead_of_wrapping() {
        assert_eq!(SimTime::END + Duration::from_secs(1), SimTime::END);
        assert_eq!(SimTime::START.since(SimTime::END), Duration::ZERO);
        assert_eq!((SimTime::from_millis(12_000) + Duration::from_micros(345)).to_string(), "12.000345");
    }
}

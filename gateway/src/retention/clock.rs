//! What time it is beyond doubt. Pure: both clocks are arguments.
//!
//! - What goes by its age is gone, so the system clock is believed only after it has gone as evenly as the monotonic
//!   clock for a while. Any jump, forward or back, starts that while anew; so does a start of the process.
//! - The slack is 10 s and a hundredth of the time between two looks: a clock that is being corrected slowly passes, one
//!   that runs at another speed does not.
//! - A clock that is wrong for longer than the while is believed. Nobody here can know better.
//!
//! A record's own time is no remedy: it is the same clock's, and never goes back within a conversation. A clock that
//! was ahead for a moment therefore makes the records after it look younger, and keeps them longer.

use std::time::{Duration, Instant};

use fulmar_protocol::id::UnixMillis;

/// How far the two clocks may part between two looks, besides a hundredth of the time between them.
const SLACK: Duration = Duration::from_secs(10);

/// Looks further apart than this say little: a clock may have come and gone between them.
pub const LOOK_EVERY: Duration = Duration::from_secs(600);

/// See the module's text.
#[derive(Debug)]
pub struct SteadyClock {
    settle: Duration,
    known: Option<Known>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// When both clocks were last compared from the start.
    wall: UnixMillis,
    at: Instant,
    /// Since when they agree.
    even_since: Instant,
}

impl SteadyClock {
    /// One that is believed after it has gone evenly for `settle`.
    #[must_use]
    pub const fn new(settle: Duration) -> Self {
        Self { settle, known: None }
    }

    /// Compares the clocks; the time if it is beyond doubt, the earlier one where they differ.
    pub fn look(&mut self, wall: UnixMillis, at: Instant) -> Option<UnixMillis> {
        let Some(known) = &mut self.known else {
            self.known = Some(Known { wall, at, even_since: at });
            return None;
        };
        let elapsed = at.saturating_duration_since(known.at);
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let expected = known.wall.get().saturating_add(millis(elapsed));
        if wall.get().abs_diff(expected) > millis(SLACK + elapsed / 100) {
            *known = Known { wall, at, even_since: at };
            return None;
        }
        if elapsed >= LOOK_EVERY {
            // From here on anew, or the slack would grow without end.
            *known = Known { wall, at, ..*known };
        }
        let settled = at.saturating_duration_since(known.even_since) >= self.settle;
        settled.then(|| UnixMillis::new(expected).map_or(wall, |expected| expected.min(wall)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600;
    const YEAR: u64 = 365 * 24 * HOUR;
    const START: u64 = 1_800_000_000;

    /// Looks at (seconds of the monotonic clock, seconds by which the system clock is ahead of it).
    fn looks(settle_s: u64, looks: &[(u64, i64)]) -> Vec<Option<u64>> {
        let start = Instant::now();
        let mut clock = SteadyClock::new(Duration::from_secs(settle_s));
        let mut out = Vec::new();
        for (at, ahead) in looks {
            let wall = (START + at).checked_add_signed(*ahead).unwrap() * 1_000;
            let time = clock.look(UnixMillis::new(wall).unwrap(), start + Duration::from_secs(*at));
            out.push(time.map(|time| time.get() / 1_000 - START));
        }
        out
    }

    #[test]
    fn a_clock_is_believed_after_a_while() {
        assert_eq!(
            looks(HOUR, &[(0, 0), (1_800, 0), (3_599, 0), (3_600, 0), (9_000, 1)]),
            [None, None, None, Some(3_600), Some(9_000)]
        );
    }

    #[test]
    fn a_jump_takes_nothing_away_whenever_it_comes() {
        let ahead = i64::try_from(YEAR).unwrap();
        // For a moment, long after the start: at the very look that would have used it.
        assert_eq!(
            looks(HOUR, &[(0, 0), (4_000, 0), (4_100, ahead), (4_200, 0), (4_300, 0), (8_000, 0)]),
            [None, Some(4_000), None, None, None, Some(8_000)]
        );
        // At the start, until somebody sets it.
        assert_eq!(
            looks(HOUR, &[(0, ahead), (3_000, ahead), (3_500, 0), (3_700, 0), (7_100, 0)]),
            [None, None, None, None, Some(7_100)]
        );
        // Back: what was believed may have been the mistake.
        assert_eq!(
            looks(HOUR, &[(0, 0), (4_000, 0), (4_010, -7_200), (4_020, -7_200)]),
            [None, Some(4_000), None, None]
        );
    }

    #[test]
    fn a_clock_of_another_speed_is_noticed_and_a_slow_correction_is_not() {
        let twice: Vec<(u64, i64)> = (0..400).map(|n| (n * 10, i64::try_from(n * 10).unwrap())).collect();
        assert!(looks(HOUR, &twice).iter().all(Option::is_none), "twice as fast");
        let slewed: Vec<(u64, i64)> = (0..1_000).map(|n| (n * 600, i64::try_from(n / 4).unwrap())).collect();
        assert!(looks(HOUR, &slewed).iter().skip(7).all(Option::is_some), "four minutes in a week");
    }
}

//! How many bytes a connection may have in the transport that its client has not acknowledged: few at first and for whoever is stuck,
//! more for whoever takes them.
//!
//! - `least <= window <= most`. The window is `least` and twice what was acknowledged in the last second: enough for a long road that is
//!   fast, and next to nothing for a reader that takes a kibibyte a second.
//! - What was acknowledged is never overestimated: what fits the window in the moment it is handed over leaves no more than a window
//!   unacknowledged, so all before that has been.
//! - After a pause it begins with `least` again. What is in the transport by then stays there; nothing more is added to it.
//!
//! Pure: time is an argument. Not here: handing over (`writer`).

use std::time::Duration;

/// What was acknowledged counts for so long, ms.
const PERIOD_MS: u32 = 1_000;

/// The window's bounds, bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// For who acknowledges nothing.
    pub(super) least: u64,
    /// For anybody.
    pub(super) most: u64,
}

/// See the module's text. Small: every connection has one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    window: u32,
    /// Bytes that may be unacknowledged; never more than the window.
    open: u32,
    /// Bytes that were surely acknowledged in this period, and in the one before.
    current: u32,
    last: u32,
    /// When the period began, ms.
    since: u32,
}

impl Allowance {
    /// Of a connection on which nothing was sent.
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { window: narrow(bounds.least), open: 0, current: 0, last: 0, since: 0 }
    }

    /// The window as it is.
    pub(super) const fn window(&self) -> u32 {
        self.window
    }

    /// Something is to be handed over: the new window, if it is another one, because nothing was for a while.
    pub(super) fn begin(&mut self, bounds: Bounds, now: Duration) -> Option<u64> {
        let now = clock(now);
        if now.wrapping_sub(self.since) < 2 * PERIOD_MS {
            return None;
        }
        let was = self.window;
        *self = Self { since: now, ..Self::new(bounds) };
        (self.window != was).then_some(self.window.into())
    }

    /// The transport took `bytes`, which fitted the window: the new one, if it is another.
    pub(super) fn handed(&mut self, bounds: Bounds, bytes: usize, now: Duration) -> Option<u64> {
        let now = clock(now);
        self.open = self.open.saturating_add(narrow(bytes as u64));
        self.current = self.current.saturating_add(self.open.saturating_sub(self.window));
        self.open = self.open.min(self.window);
        let elapsed = now.wrapping_sub(self.since);
        let is_over = elapsed >= PERIOD_MS;
        if is_over {
            // What came in longer than a period came at that pace.
            let pace = u64::from(self.current) * u64::from(PERIOD_MS) / u64::from(elapsed);
            (self.last, self.current, self.since) = (narrow(pace), 0, now);
        }
        let acknowledged = self.current.max(self.last);
        let wanted = narrow(bounds.least.saturating_add(2 * u64::from(acknowledged)).min(bounds.most));
        let was = self.window;
        if wanted > was || is_over {
            self.window = wanted;
        }
        (self.window != was).then_some(self.window.into())
    }
}

/// Milliseconds, round and round: only differences count.
fn clock(now: Duration) -> u32 {
    narrow(now.as_millis() & u128::from(u32::MAX))
}

/// The number, or as much of it as fits.
fn narrow(wide: impl TryInto<u32>) -> u32 {
    wide.try_into().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { least: LEAST as u64, most: MOST as u64 };
    const LEAST: u32 = 32 << 10;
    const MOST: u32 = 192 << 10;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A road, and a writer that always has more: at most `pace` bytes a second are acknowledged, each a round trip after it was handed
    /// over. Answers, for each second, the window at its end and what was acknowledged in it.
    fn play(allowance: &mut Allowance, from: u64, seconds: u64, rtt: u64, pace: u64) -> Vec<(u32, u64)> {
        let (mut under_way, mut unacked) = (std::collections::VecDeque::new(), 0u64);
        let mut seen = Vec::new();
        for second in 0..seconds {
            let mut sum = 0;
            for at in (from + second * 1_000..from + (second + 1) * 1_000).step_by(10) {
                let mut room = pace / 100;
                while room > 0
                    && let Some((arrives, bytes)) = under_way.front_mut()
                    && *arrives <= at
                {
                    let acked = room.min(*bytes);
                    *bytes -= acked;
                    room -= acked;
                    unacked -= acked;
                    sum += acked;
                    if *bytes == 0 {
                        under_way.pop_front();
                    }
                }
                while unacked < u64::from(allowance.window()) {
                    let bytes = u64::from(allowance.window()) - unacked;
                    unacked += bytes;
                    under_way.push_back((at + rtt, bytes));
                    allowance.handed(BOUNDS, usize::try_from(bytes).unwrap(), ms(at));
                }
            }
            seen.push((allowance.window(), sum));
        }
        seen
    }

    #[test]
    fn who_takes_much_is_allowed_much_and_soon() {
        // 2 Mbit/s over a road of 700 ms: 175 kB are under way.
        let seen = play(&mut Allowance::new(BOUNDS), 0, 6, 700, 250_000);
        assert!(seen[2..].iter().all(|(window, _)| *window == MOST), "{seen:?}");
        assert!(seen[4..].iter().all(|(_, acked)| *acked >= 240_000), "{seen:?}");
        // A quick one has all of it after two round trips.
        let seen = play(&mut Allowance::new(BOUNDS), 0, 1, 250, 10_000_000);
        assert_eq!(seen[0].0, MOST);
        assert!(seen[0].1 > u64::from(3 * MOST / 2), "{seen:?}");
    }

    #[test]
    fn who_is_slow_or_stuck_is_allowed_little() {
        for (pace, more) in [(0, 0), (1_024, 4_096), (6_000, 24_000)] {
            let seen = play(&mut Allowance::new(BOUNDS), 0, 60, 100, pace);
            assert!(seen.iter().all(|(window, _)| *window <= LEAST + more), "{pace}: {seen:?}");
        }
    }

    #[test]
    fn it_shrinks_when_the_reader_gets_slow_and_after_a_pause() {
        let mut allowance = Allowance::new(BOUNDS);
        play(&mut allowance, 0, 5, 100, 1_000_000);
        assert_eq!(allowance.window(), MOST);
        assert_eq!(allowance.begin(BOUNDS, ms(5_500)), None, "it was busy a moment ago");
        let seen = play(&mut allowance, 6_000, 90, 100, 4_000);
        assert!(seen.last().unwrap().0 <= LEAST + 16_000, "{seen:?}");
        let mut allowance = Allowance::new(BOUNDS);
        play(&mut allowance, 0, 5, 100, 1_000_000);
        assert_eq!(allowance.begin(BOUNDS, ms(60_000)), Some(LEAST.into()));
        assert_eq!(allowance.begin(BOUNDS, ms(60_001)), None);
        // A burst then, of which nothing was acknowledged.
        assert_eq!(allowance.handed(BOUNDS, LEAST as usize, ms(60_002)), None);
        assert_eq!(allowance.window(), LEAST);
    }

    #[test]
    fn where_there_is_nothing_to_choose_it_stays() {
        let bounds = Bounds { least: MOST.into(), most: MOST.into() };
        let mut allowance = Allowance::new(bounds);
        for at in 0..5_000 {
            assert_eq!(allowance.begin(bounds, ms(at)), None);
            assert_eq!(allowance.handed(bounds, 10_000, ms(at)), None);
        }
    }

    proptest! {
        /// Whatever happens: the window is within its bounds, and no more counts as acknowledged than was.
        #[test]
        fn nothing_is_overestimated(steps in prop::collection::vec((0..400_000u64, 0..400_000u64, 0..1_500u64), 1..200)) {
            let mut allowance = Allowance::new(BOUNDS);
            let (mut unacked, mut acked, mut counted, mut now) = (0u64, 0u64, 0u64, 0u64);
            for (ack, hand, passes) in steps {
                now += passes;
                let ack = ack.min(unacked);
                unacked -= ack;
                acked += ack;
                let before = allowance;
                let _ = allowance.begin(BOUNDS, ms(now));
                if allowance.since != before.since {
                    // It counts anew; what is under way then is acknowledged later.
                    (acked, counted) = (0, 0);
                }
                let hand = hand.min(u64::from(allowance.window()).saturating_sub(unacked));
                if hand > 0 {
                    unacked += hand;
                    let window = allowance.window();
                    counted += (u64::from(allowance.open) + hand).saturating_sub(window.into());
                    let _ = allowance.handed(BOUNDS, usize::try_from(hand).unwrap(), ms(now));
                }
                prop_assert!((LEAST..=MOST).contains(&allowance.window()));
                prop_assert!(u64::from(allowance.current) <= counted && counted <= acked, "{counted} of {acked}");
            }
        }
    }
}

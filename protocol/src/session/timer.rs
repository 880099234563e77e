//! A handful of deadlines.
//!
//! Not here: the clock; whoever drives the half says what time it is.

use core::time::Duration;

/// Which deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// The HELLO, or its answer, must have come.
    Hello,
    /// Something must have been heard of the peer.
    Idle,
    /// The next PING.
    Ping,
    /// Commits must be acknowledged.
    Ack,
}

/// At most one deadline of each kind.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Timers([Option<Duration>; 4]);

impl Timers {
    fn slot(&mut self, timer: Timer) -> Option<&mut Option<Duration>> {
        self.0.get_mut(timer as usize)
    }

    pub(super) fn set(&mut self, timer: Timer, at: Duration) {
        if let Some(slot) = self.slot(timer) {
            *slot = Some(at);
        }
    }

    /// Sets the deadline unless one is set already.
    pub(super) fn set_if_clear(&mut self, timer: Timer, at: Duration) {
        if let Some(slot) = self.slot(timer) {
            slot.get_or_insert(at);
        }
    }

    pub(super) fn clear(&mut self, timer: Timer) {
        if let Some(slot) = self.slot(timer) {
            *slot = None;
        }
    }

    pub(super) fn clear_all(&mut self) {
        self.0 = [None; 4];
    }

    /// Whether the deadline has passed; clears it then.
    pub(super) fn fired(&mut self, timer: Timer, now: Duration) -> bool {
        match self.slot(timer) {
            Some(slot) if slot.is_some_and(|at| at <= now) => {
                *slot = None;
                true
            }
            _ => false,
        }
    }

    pub(super) fn next(&self) -> Option<Duration> {
        self.0.iter().flatten().min().copied()
    }
}

//! Epochs handed out a moment ago: a device that tries several connections at once says the same HELLO on each, and has to be
//! given one epoch, or the one it goes on with would be an old one already.
//!
//! - Kept in memory for [`RACE_MAX`]; bounded by [`DEVICES_MAX`], beyond which each HELLO is given an epoch of its own, as after a
//!   restart of the gateway. The client then numbers once more what waits.
//! - Nothing was sent under such an epoch before its client had it on disk, so it may be given to the same device again.
//!
//! Not here: which epoch comes next (`people`).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use fulmar_protocol::id::{DeviceUid, Epoch, UserId};

/// HELLOs of one race are no further apart: an attempt begins within 4 s, and its packets may be late.
const RACE_MAX: Duration = Duration::from_secs(10);

/// Devices that are remembered.
const DEVICES_MAX: usize = 16_384;

#[derive(Debug)]
struct Given {
    /// What the HELLO named.
    named: Epoch,
    given: Epoch,
    at: Instant,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct RecentEpochs(HashMap<(UserId, DeviceUid), Given>);

impl RecentEpochs {
    /// What this device was given a moment ago when it named the same.
    pub(super) fn given(&self, device: (UserId, DeviceUid), named: Epoch, now: Instant) -> Option<Epoch> {
        let given = self.0.get(&device)?;
        (given.named == named && now.saturating_duration_since(given.at) < RACE_MAX).then_some(given.given)
    }

    /// A device that named this is given that.
    pub(super) fn give(&mut self, device: (UserId, DeviceUid), named: Epoch, given: Epoch, now: Instant) {
        if self.0.len() >= DEVICES_MAX {
            self.0.retain(|_, given| now.saturating_duration_since(given.at) < RACE_MAX);
        }
        if self.0.len() < DEVICES_MAX {
            self.0.insert(device, Given { named, given, at: now });
        } else {
            self.0.remove(&device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(n: u64) -> (UserId, DeviceUid) {
        let mut uid = [0; 16];
        uid[..8].copy_from_slice(&n.to_be_bytes());
        (UserId::new(256).unwrap(), DeviceUid(uid))
    }

    #[test]
    fn one_race_is_given_one_epoch() {
        let (mut recent, now) = (RecentEpochs::default(), Instant::now());
        assert_eq!(recent.given(device(1), Epoch::ZERO, now), None);
        recent.give(device(1), Epoch::ZERO, Epoch::FIRST, now);
        let late = now + RACE_MAX - Duration::from_millis(1);
        assert_eq!(recent.given(device(1), Epoch::ZERO, late), Some(Epoch::FIRST));
        assert_eq!(recent.given(device(2), Epoch::ZERO, late), None, "another device");
        assert_eq!(recent.given(device(1), Epoch::FIRST, late), None, "another HELLO");
        assert_eq!(recent.given(device(1), Epoch::ZERO, now + RACE_MAX), None, "another race");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_makes_room() {
        let (mut recent, now) = (RecentEpochs::default(), Instant::now());
        for n in 0..DEVICES_MAX as u64 + 5 {
            recent.give(device(n), Epoch::ZERO, Epoch::FIRST, now);
        }
        assert_eq!(recent.0.len(), DEVICES_MAX);
        assert_eq!(recent.given(device(DEVICES_MAX as u64), Epoch::ZERO, now), None);
        recent.give(device(u64::MAX), Epoch::ZERO, Epoch::FIRST, now + RACE_MAX);
        assert_eq!(recent.0.len(), 1);
    }
}

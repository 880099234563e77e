//! Lanes of sending of which something was refused for now. Pure: time is an argument.
//!
//! - What follows a refused send in its lane could not be decided without it, so it is refused as well until that one is back
//!   or its time has come.
//! - At most [`HELD_MAX`] lanes are remembered; beyond it those whose time comes first are forgotten, and what follows in them is
//!   refused for coming too early.
//!
//! Not here: what is refused, and until when (`intake`, `connection::turns`).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use fulmar_protocol::id::{ConversationId, Producer, Pseq};

/// Lanes that are remembered.
const HELD_MAX: usize = 16_384;

/// A producer's sends in one conversation.
pub(crate) type Lane = (ConversationId, Producer);

#[derive(Clone, Copy, Debug)]
struct Held {
    pseq: Pseq,
    until: Duration,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Holds {
    held: BTreeMap<Lane, Held>,
    /// When lanes are let go.
    ends: BTreeSet<(Duration, Lane)>,
}

impl Holds {
    pub(crate) const fn new() -> Self {
        Self { held: BTreeMap::new(), ends: BTreeSet::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The refused send that this one follows, and until when its lane is held.
    pub(crate) fn before(&self, lane: Lane, pseq: Pseq) -> Option<(Pseq, Duration)> {
        self.held.get(&lane).filter(|held| held.pseq < pseq).map(|held| (held.pseq, held.until))
    }

    /// This send is refused until then.
    pub(crate) fn hold(&mut self, lane: Lane, pseq: Pseq, until: Duration) {
        // What is held already is further in front.
        self.release(lane);
        if self.held.len() >= HELD_MAX
            && let Some((_, first)) = self.ends.pop_first()
        {
            self.held.remove(&first);
        }
        self.held.insert(lane, Held { pseq, until });
        self.ends.insert((until, lane));
    }

    /// This send goes on: if it is the one its lane was held for, the lane does too.
    pub(crate) fn back(&mut self, lane: Lane, pseq: Pseq) {
        if self.held.get(&lane).is_some_and(|held| held.pseq == pseq) {
            self.release(lane);
        }
    }

    fn release(&mut self, lane: Lane) {
        if let Some(held) = self.held.remove(&lane) {
            self.ends.remove(&(held.until, lane));
        }
    }

    /// Lets lanes go whose time has come.
    pub(crate) fn let_go(&mut self, now: Duration) {
        while let Some((until, lane)) = self.ends.first().copied()
            && until <= now
        {
            self.ends.pop_first();
            self.held.remove(&lane);
        }
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{DeviceId, Epoch, UserId};

    use super::*;

    fn lane(user: u64) -> Lane {
        let producer =
            Producer { user: UserId::new(user).unwrap(), device: DeviceId::FIRST, epoch: Epoch::FIRST };
        (ConversationId::new(256).unwrap(), producer)
    }

    fn pseq(n: u64) -> Pseq {
        Pseq::new(n).unwrap()
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_lane_is_held_until_its_send_is_back_or_its_time_has_come() {
        let mut holds = Holds::new();
        holds.hold(lane(257), pseq(5), ms(100));
        for (n, want) in [(4, None), (5, None), (6, Some((pseq(5), ms(100))))] {
            assert_eq!(holds.before(lane(257), pseq(n)), want, "{n}");
        }
        assert_eq!(holds.before(lane(258), pseq(6)), None, "another lane");
        holds.back(lane(257), pseq(4));
        assert!(!holds.is_empty(), "it was another send");
        holds.back(lane(257), pseq(5));
        assert!(holds.is_empty());
        holds.hold(lane(257), pseq(5), ms(100));
        holds.hold(lane(257), pseq(3), ms(200));
        holds.let_go(ms(150));
        assert_eq!(
            holds.before(lane(257), pseq(6)),
            Some((pseq(3), ms(200))),
            "the earlier end is forgotten"
        );
        holds.let_go(ms(200));
        assert!(holds.is_empty() && holds.ends.is_empty());
    }

    #[test]
    fn so_many_lanes_are_remembered() {
        let mut holds = Holds::new();
        for user in 0..=HELD_MAX as u64 {
            holds.hold(lane(257 + user), pseq(1), ms(1 + user));
        }
        assert_eq!((holds.held.len(), holds.ends.len()), (HELD_MAX, HELD_MAX));
        assert_eq!(holds.before(lane(257), pseq(2)), None, "the first to end");
    }
}

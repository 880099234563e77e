//! What one connection's client has in flight, held against the limits of its WELCOME.
//!
//! - A send counts from its arrival until it is answered, once however often it is repeated. A copy that arrives after
//!   the answer to a hedged one does not count: the client has let it go already.
//! - Memory is bounded by the limits: who exceeds them is disconnected.
//!
//! Not here: what happens to the sends (`producer`).

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    error::Violation,
    frame::Limits,
    id::{ConversationId, Pseq, RequestId},
    limit::FIRST_FLIGHT_SENDS_MAX,
};

/// Conversations of which it is remembered up to where sends were acked.
const ACKED_KEPT: usize = 256;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Window {
    sends: BTreeMap<ConversationId, BTreeSet<Pseq>>,
    sends_total: usize,
    /// Up to where sends were acked, for the conversations that were last sent to.
    acked: BTreeMap<ConversationId, Pseq>,
    calls: BTreeSet<RequestId>,
    limits: Limits,
}

impl Window {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            sends: BTreeMap::new(),
            sends_total: 0,
            acked: BTreeMap::new(),
            calls: BTreeSet::new(),
            limits,
        }
    }

    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// A send came. Clients keep within the limits; what is enforced is twice as much, for of each send a copy may be
    /// late whose answer the client has seen. The client did not know the limits when it sent its first flight, so
    /// that much is always taken.
    pub(super) fn send(&mut self, conversation: ConversationId, pseq: Pseq) -> Result<(), Violation> {
        if self.acked.get(&conversation).is_some_and(|acked| pseq <= *acked) {
            return Ok(());
        }
        let lane = self.sends.entry(conversation).or_default();
        if lane.insert(pseq) {
            self.sends_total += 1;
        }
        let limit = |limit: u16| 2 * usize::from(limit).max(FIRST_FLIGHT_SENDS_MAX);
        if lane.len() > limit(self.limits.inflight_per_conversation)
            || self.sends_total > limit(self.limits.inflight_per_producer)
        {
            return Err(Violation::WindowExceeded { what: "sends" });
        }
        Ok(())
    }

    /// A send in a datagram came: a copy of one that counts by itself. Whether there is room for it.
    pub(super) fn has_room(&self) -> bool {
        self.sends_total < usize::from(self.limits.inflight_per_producer)
    }

    /// Everything up to `up_to` is settled.
    pub(super) fn acked(&mut self, conversation: ConversationId, up_to: Pseq) {
        if self.acked.len() >= ACKED_KEPT && !self.acked.contains_key(&conversation) {
            self.acked.pop_first();
        }
        let acked = self.acked.entry(conversation).or_default();
        *acked = up_to.max(*acked);
        let Some(lane) = self.sends.get_mut(&conversation) else { return };
        while lane.first().is_some_and(|pseq| *pseq <= up_to) {
            lane.pop_first();
            self.sends_total -= 1;
        }
        if lane.is_empty() {
            self.sends.remove(&conversation);
        }
    }

    /// One send is answered by a refusal. `settled`: for good, so its number and those before it are used up.
    pub(super) fn refused(&mut self, conversation: ConversationId, pseq: Pseq, settled: bool) {
        if settled {
            return self.acked(conversation, pseq);
        }
        let Some(lane) = self.sends.get_mut(&conversation) else { return };
        if lane.remove(&pseq) {
            self.sends_total -= 1;
        }
        if lane.is_empty() {
            self.sends.remove(&conversation);
        }
    }

    /// A call came.
    pub(super) fn call(&mut self, id: RequestId) -> Result<(), Violation> {
        if !self.calls.insert(id) {
            return Err(Violation::OutOfState {
                frame: "Call",
                state: "a call of this number is unanswered",
            });
        }
        if self.calls.len() > usize::from(self.limits.calls_inflight) {
            return Err(Violation::WindowExceeded { what: "calls" });
        }
        Ok(())
    }

    /// A call is answered. Whether it was asked.
    pub(super) fn replied(&mut self, id: RequestId) -> bool {
        self.calls.remove(&id)
    }

    /// Sends and calls unanswered.
    #[cfg(test)]
    fn in_flight(&self) -> (usize, usize) {
        (self.sends_total, self.calls.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn c(n: u64) -> ConversationId {
        ConversationId::new(n).unwrap()
    }

    fn p(n: u64) -> Pseq {
        Pseq::new(n).unwrap()
    }

    #[test]
    fn sends_count_once_until_they_are_answered() {
        let limits = Limits { inflight_per_conversation: 40, inflight_per_producer: 50, ..Limits::default() };
        let mut window = Window::new(limits);
        for pseq in 1..=80 {
            assert_eq!(window.send(c(1), p(pseq)), Ok(()));
            assert_eq!(window.send(c(1), p(pseq)), Ok(()), "a repetition does not count");
        }
        for pseq in 1..=20 {
            assert_eq!(window.send(c(2), p(pseq)), Ok(()));
        }
        assert!(!window.has_room());
        window.acked(c(1), p(79));
        assert_eq!(window.in_flight(), (21, 0));
        window.refused(c(1), p(80), false);
        window.refused(c(1), p(80), true);
        assert_eq!(window.in_flight(), (20, 0));
        for pseq in 81..=160 {
            assert_eq!(window.send(c(1), p(pseq)), Ok(()));
        }
        assert_eq!(window.send(c(3), p(1)), Err(Violation::WindowExceeded { what: "sends" }));
        window.acked(c(3), p(1));
        assert_eq!(window.send(c(1), p(161)), Err(Violation::WindowExceeded { what: "sends" }));
    }

    /// Found by the schedules of `tests/pair.rs`.
    #[test]
    fn a_copy_that_comes_after_the_answer_does_not_count() {
        let mut window = Window::new(Limits { inflight_per_producer: 1, ..Limits::default() });
        window.acked(c(1), p(40));
        for pseq in 1..=40 + 2 * FIRST_FLIGHT_SENDS_MAX as u64 {
            assert_eq!(window.send(c(1), p(pseq)), Ok(()));
        }
        assert!(window.send(c(1), p(199)).is_err());
    }

    #[test]
    fn the_first_flight_is_taken_whatever_the_limits() {
        let limits = Limits { inflight_per_conversation: 1, inflight_per_producer: 1, ..Limits::default() };
        let mut window = Window::new(limits);
        for pseq in 1..=2 * FIRST_FLIGHT_SENDS_MAX as u64 {
            assert_eq!(window.send(c(1), p(pseq)), Ok(()));
        }
        assert!(window.send(c(1), p(99)).is_err());
    }

    #[test]
    fn calls_count_until_they_are_answered() {
        let id = |n| RequestId::new(n).unwrap();
        let mut window = Window::new(Limits { calls_inflight: 2, ..Limits::default() });
        assert_eq!(window.call(id(1)), Ok(()));
        assert!(window.call(id(1)).is_err(), "the same number twice");
        assert_eq!(window.call(id(2)), Ok(()));
        assert!(window.replied(id(1)) && !window.replied(id(1)));
        assert_eq!(window.call(id(3)), Ok(()));
        assert_eq!(window.call(id(4)), Err(Violation::WindowExceeded { what: "calls" }));
    }
}

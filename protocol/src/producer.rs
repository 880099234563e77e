//! Whether a send is new, a repetition, early or refused: the one place that decides exactly-once.
//!
//! - A lane of sending is one producer (user, device, epoch) in one conversation. Its pseqs are contiguous from 1.
//! - `last` only grows within an epoch, and an epoch never goes back: what was decided stays decided.
//! - [`Lane::offer`] decides and changes nothing that lasts; [`Lane::appended`] and [`Lane::consumed`] record what the
//!   caller did. A number is used up exactly once, by one of the two.
//! - A final refusal leaves only when [`Lane::consumed`] is on disk: its sender goes on with the next number, which a
//!   lane that forgot would never accept.
//! - [`Decision::Again`] speaks of the caller's batch, which may not be on disk yet: the ack waits for the commit of
//!   the batch that holds the record, whichever copy of the send asks.
//!
//! Not here: the log itself, who may send (the gateway's conversation stage), windows (`session`).

use std::collections::{BTreeMap, VecDeque};

use core::time::Duration;

use crate::{
    frame::Send,
    id::{Epoch, Pseq, Seq},
    limit::{LANE_ACKS_REMEMBERED, LANE_PARKED_MAX},
};

/// What to do with an offered send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// New and next: append it (then [`Lane::appended`]) or refuse it for good (then [`Lane::consumed`]).
    Append,
    /// Settled before: answer as then.
    Again {
        /// The record; [`Seq::ZERO`] when the number was consumed without one. `None`: further back than a lane
        /// remembers; the number is settled all the same.
        seq: Option<Seq>,
    },
    /// Sends before this one are missing: park it for a moment, then refuse it naming `expected`.
    Early {
        /// The number that must come next.
        expected: Pseq,
    },
    /// The same number was sent before with other content: refuse it, nothing changes.
    Conflict,
    /// The producer is of the past: refuse it, nothing changes.
    Stale {
        /// The epoch that replaced it.
        current: Epoch,
    },
}

/// One settled number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Settled {
    pseq: Pseq,
    seq: Seq,
    fingerprint: u64,
}

/// One producer in one conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lane {
    epoch: Epoch,
    last: Pseq,
    /// Ascending by pseq, at most [`LANE_ACKS_REMEMBERED`].
    recent: VecDeque<Settled>,
    /// The newer epoch of the last offer that said [`Decision::Append`], until its number is used up.
    successor: Option<Epoch>,
}

impl Lane {
    /// A lane in which nothing was sent yet.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        Self { epoch, last: Pseq::ZERO, recent: VecDeque::new(), successor: None }
    }

    /// A lane as the log knows it: the last number that was used up, and the (pseq, seq, fingerprint) of the newest
    /// ones in any order ([`Seq::ZERO`]: consumed without a record; fingerprint 0: not known).
    #[must_use]
    pub fn restore(epoch: Epoch, last: Pseq, recent: impl IntoIterator<Item = (Pseq, Seq, u64)>) -> Self {
        let newest = last.get().saturating_sub(LANE_ACKS_REMEMBERED as u64);
        let settled: BTreeMap<Pseq, Settled> = recent
            .into_iter()
            .filter(|(pseq, ..)| pseq.get() > newest && *pseq <= last)
            .map(|(pseq, seq, fingerprint)| (pseq, Settled { pseq, seq, fingerprint }))
            .collect();
        Self { epoch, last, recent: settled.into_values().collect(), successor: None }
    }

    /// Decides what to do with a send. `fingerprint` is [`fingerprint`] of the send, 0 when it is not known.
    pub fn offer(&mut self, epoch: Epoch, pseq: Pseq, fingerprint: u64) -> Decision {
        self.successor = None;
        if epoch < self.epoch {
            return Decision::Stale { current: self.epoch };
        }
        let last = if epoch > self.epoch { Pseq::ZERO } else { self.last };
        if pseq <= last {
            return self.repeated(pseq, fingerprint);
        }
        if pseq.prev() != last {
            return Decision::Early { expected: last.saturating_add(1) };
        }
        if epoch > self.epoch {
            self.successor = Some(epoch);
        }
        Decision::Append
    }

    fn repeated(&self, pseq: Pseq, fingerprint: u64) -> Decision {
        match self.settled(pseq) {
            Some(known) if known.fingerprint != 0 && fingerprint != 0 && known.fingerprint != fingerprint => {
                Decision::Conflict
            }
            Some(known) => Decision::Again { seq: Some(known.seq) },
            None => Decision::Again { seq: None },
        }
    }

    fn settled(&self, pseq: Pseq) -> Option<&Settled> {
        let index = self.recent.binary_search_by_key(&pseq, |settled| settled.pseq).ok()?;
        self.recent.get(index)
    }

    /// The caller put the send into its batch as record `seq`.
    pub fn appended(&mut self, pseq: Pseq, seq: Seq, fingerprint: u64) {
        self.settle(Settled { pseq, seq, fingerprint });
    }

    /// The caller refused the send for good: its number is used up without a record, what follows goes on.
    pub fn consumed(&mut self, pseq: Pseq) {
        self.settle(Settled { pseq, seq: Seq::ZERO, fingerprint: 0 });
    }

    fn settle(&mut self, settled: Settled) {
        if let Some(epoch) = self.successor.take() {
            self.epoch = epoch;
            self.last = Pseq::ZERO;
            self.recent.clear();
        }
        if settled.pseq <= self.last {
            return;
        }
        self.last = settled.pseq;
        if self.recent.len() >= LANE_ACKS_REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(settled);
    }

    /// The incarnation of the producer.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The last number that was used up.
    #[must_use]
    pub const fn last(&self) -> Pseq {
        self.last
    }

    /// The newest numbers, ascending: (pseq, seq or zero, fingerprint or 0).
    pub fn recent(&self) -> impl Iterator<Item = (Pseq, Seq, u64)> + '_ {
        self.recent.iter().map(|settled| (settled.pseq, settled.seq, settled.fingerprint))
    }

    /// The record a number got; [`Seq::ZERO`] when it was consumed without one, `None` when it is not remembered.
    #[must_use]
    pub fn seq_of(&self, pseq: Pseq) -> Option<Seq> {
        self.settled(pseq).map(|settled| settled.seq)
    }
}

/// What two copies of the same send have in common: xxh3 over everything but `seen`, which a client may know better
/// the second time. 0 ("not known", equal to everything) for a tombstone, which stands for any content. Kept with the
/// lane, so it never changes.
#[must_use]
pub fn fingerprint(send: &Send) -> u64 {
    if send.cancel {
        return 0;
    }
    let mut hasher = xxhash_rust::xxh3::Xxh3Default::new();
    let optional = |number: Option<u64>| number.unwrap_or(u64::MAX);
    for field in [
        send.kind.number(),
        send.conversation.get(),
        send.pseq.get(),
        optional(send.reference.map(Seq::get)),
        optional(send.ttl.map(u64::from)),
        u64::from(send.more) | (u64::from(send.silent) << 1) | (u64::from(send.continues) << 2),
    ] {
        hasher.update(&field.to_be_bytes());
    }
    hasher.update(&send.payload);
    hasher.digest().max(1)
}

/// Sends of one lane that came before their predecessors: at most [`LANE_PARKED_MAX`], each for a limited time.
#[derive(Clone, Debug)]
pub struct Parked<T> {
    waiting: BTreeMap<Pseq, (Duration, T)>,
}

impl<T> Default for Parked<T> {
    fn default() -> Self {
        Self { waiting: BTreeMap::new() }
    }
}

impl<T> Parked<T> {
    /// Keeps `send` until `until`. Of a number that is parked already the newer copy is kept, and the time stays. Returns the
    /// older copy: if it came by another connection, that one waits for an answer of its own.
    ///
    /// # Errors
    /// Returns the send when there is no room: refuse it naming the expected number.
    pub fn insert(&mut self, pseq: Pseq, send: T, until: Duration) -> Result<Option<T>, T> {
        if let Some((_, parked)) = self.waiting.get_mut(&pseq) {
            return Ok(Some(core::mem::replace(parked, send)));
        }
        if self.waiting.len() >= LANE_PARKED_MAX {
            return Err(send);
        }
        self.waiting.insert(pseq, (until, send));
        Ok(None)
    }

    /// Takes the first send that need not wait any more: the one that follows `last`, or one whose number was settled by
    /// another copy, which is to be answered too.
    pub fn take_next(&mut self, last: Pseq) -> Option<T> {
        let next = last.next()?;
        let entry = self.waiting.first_entry().filter(|entry| *entry.key() <= next)?;
        Some(entry.remove().1)
    }

    /// Takes one send whose time is over; call again until `None`.
    pub fn expire(&mut self, now: Duration) -> Option<(Pseq, T)> {
        let pseq = self.waiting.iter().find(|(_, (until, _))| *until <= now).map(|(pseq, _)| *pseq)?;
        self.waiting.remove(&pseq).map(|(_, send)| (pseq, send))
    }

    /// When the first of them is to be expired.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Duration> {
        self.waiting.values().map(|(until, _)| *until).min()
    }

    /// What waits, in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> + '_ {
        self.waiting.values().map(|(_, send)| send)
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{frame::RecordKind, id::ConversationId};

    fn p(n: u64) -> Pseq {
        Pseq::new(n).unwrap()
    }

    fn s(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    fn e(n: u64) -> Epoch {
        Epoch::new(n).unwrap()
    }

    /// Epoch 3; 1 and 2 appended as records 10 and 11, 3 consumed, 4 appended as 15. Fingerprint = 100 + pseq.
    fn lane() -> Lane {
        let mut lane = Lane::new(e(3));
        lane.appended(p(1), s(10), 101);
        lane.appended(p(2), s(11), 102);
        lane.consumed(p(3));
        lane.appended(p(4), s(15), 104);
        lane
    }

    #[test]
    fn decisions() {
        for (epoch, pseq, fingerprint, want) in [
            (3, 5, 105, Decision::Append),
            (3, 4, 104, Decision::Again { seq: Some(s(15)) }),
            (3, 1, 101, Decision::Again { seq: Some(s(10)) }),
            (3, 1, 0, Decision::Again { seq: Some(s(10)) }),
            (3, 1, 999, Decision::Conflict),
            (3, 3, 999, Decision::Again { seq: Some(Seq::ZERO) }),
            (3, 6, 106, Decision::Early { expected: p(5) }),
            (3, 900, 1, Decision::Early { expected: p(5) }),
            (2, 5, 105, Decision::Stale { current: e(3) }),
            (2, 1, 101, Decision::Stale { current: e(3) }),
            (4, 1, 7, Decision::Append),
            (4, 2, 7, Decision::Early { expected: p(1) }),
            (4, 5, 105, Decision::Early { expected: p(1) }),
        ] {
            let mut offered = lane();
            let got = offered.offer(e(epoch), p(pseq), fingerprint);
            assert_eq!(got, want, "epoch {epoch} pseq {pseq} fingerprint {fingerprint}");
            assert_eq!(
                (offered.last(), offered.epoch()),
                (p(4), e(3)),
                "an offer changes nothing that lasts"
            );
        }
    }

    #[test]
    fn every_number_is_settled_once_whatever_is_repeated() {
        let mut lane = Lane::new(e(1));
        let mut log = Vec::new();
        for pseq in [1, 1, 3, 2, 1, 2, 3, 3, 2, 4, 6, 5, 4, 6] {
            if lane.offer(e(1), p(pseq), pseq) == Decision::Append {
                log.push(pseq);
                lane.appended(p(pseq), s(log.len() as u64), pseq);
            }
        }
        assert_eq!(log, [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_newer_epoch_takes_over_when_its_first_number_is_used_up() {
        let mut lane = lane();
        assert_eq!(lane.offer(e(4), p(1), 7), Decision::Append);
        assert_eq!(
            lane.offer(e(3), p(5), 105),
            Decision::Append,
            "not taken over: the offer came to nothing"
        );
        lane.appended(p(5), s(16), 105);
        assert_eq!((lane.epoch(), lane.last()), (e(3), p(5)));
        assert_eq!(lane.offer(e(4), p(1), 7), Decision::Append);
        lane.appended(p(1), s(17), 7);
        assert_eq!((lane.epoch(), lane.last()), (e(4), p(1)));
        assert_eq!(lane.offer(e(3), p(6), 1), Decision::Stale { current: e(4) });
        assert_eq!(lane.offer(e(4), p(1), 7), Decision::Again { seq: Some(s(17)) });
        assert_eq!(lane.seq_of(p(5)), None, "the numbers of the old epoch mean nothing any more");
    }

    #[test]
    fn memory_is_bounded_and_what_is_forgotten_stays_settled() {
        let mut lane = Lane::new(e(1));
        for pseq in 1..=1_000 {
            lane.appended(p(pseq), s(pseq * 2), pseq);
        }
        assert_eq!(lane.recent().count(), LANE_ACKS_REMEMBERED);
        assert_eq!(lane.offer(e(1), p(1), 1), Decision::Again { seq: None });
        assert_eq!(lane.offer(e(1), p(1_000), 1_000), Decision::Again { seq: Some(s(2_000)) });
        let restored = Lane::restore(lane.epoch(), lane.last(), lane.recent());
        assert_eq!(restored, lane);
    }

    #[test]
    fn restoring_takes_any_order_holes_and_nonsense() {
        let mut lane = Lane::restore(
            e(2),
            p(100),
            [(p(100), s(9), 1), (p(97), s(5), 2), (p(101), s(1), 3), (p(3), s(1), 4)],
        );
        assert_eq!(lane.recent().collect::<Vec<_>>(), [(p(97), s(5), 2), (p(100), s(9), 1)]);
        assert_eq!(lane.offer(e(2), p(98), 5), Decision::Again { seq: None });
        assert_eq!(lane.offer(e(2), p(97), 5), Decision::Conflict);
        assert_eq!(lane.offer(e(2), p(101), 5), Decision::Append);
    }

    fn send(payload: &'static str) -> Send {
        Send {
            kind: RecordKind::Message,
            conversation: ConversationId::new(300).unwrap(),
            pseq: p(7),
            seen: s(4),
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: Bytes::from_static(payload.as_bytes()),
        }
    }

    #[test]
    fn fingerprints_tell_contents_apart_and_are_pinned() {
        let base = send("hi");
        assert_eq!(fingerprint(&base), 2_131_159_264_668_003_709, "kept on disk: it never changes");
        assert_eq!(fingerprint(&Send { seen: s(9), ..base.clone() }), fingerprint(&base));
        for other in [
            send("ho"),
            Send { kind: RecordKind::Edit, reference: Some(s(1)), ..base.clone() },
            Send { reference: Some(s(1)), ..base.clone() },
            Send { ttl: Some(1), ..base.clone() },
            Send { more: true, ..base.clone() },
            Send { continues: true, ..base.clone() },
            Send { silent: true, ..base.clone() },
            Send { pseq: p(8), ..base.clone() },
            Send { conversation: ConversationId::new(301).unwrap(), ..base.clone() },
        ] {
            assert_ne!(fingerprint(&other), fingerprint(&base), "{other:?}");
        }
        assert_eq!(fingerprint(&Send { cancel: true, ..base }), 0, "a tombstone stands for any content");
    }

    #[test]
    fn parked_sends_come_out_in_order_or_expire() {
        let at = Duration::from_secs;
        let mut parked = Parked::default();
        assert_eq!(parked.insert(p(4), "d", at(9)), Ok(None));
        assert_eq!(parked.insert(p(3), "c", at(5)), Ok(None));
        assert_eq!(
            parked.insert(p(3), "C", at(50)),
            Ok(Some("c")),
            "who sent the older copy is to be answered"
        );
        assert_eq!(parked.insert(p(9), "i", at(7)), Ok(None));
        assert_eq!(parked.next_expiry(), Some(at(5)));
        assert_eq!(parked.take_next(p(1)), None);
        assert_eq!(parked.take_next(p(2)), Some("C"), "the newer copy");
        assert_eq!(parked.take_next(p(3)), Some("d"));
        assert_eq!(parked.expire(at(6)), None);
        assert_eq!(parked.expire(at(7)), Some((p(9), "i")));
        assert_eq!(parked.expire(at(7)), None);
        for pseq in 0..LANE_PARKED_MAX as u64 {
            assert_eq!(parked.insert(p(20 + pseq), "x", at(1)), Ok(None));
        }
        assert_eq!(parked.insert(p(99), "z", at(1)), Err("z"));
        for _ in 0..LANE_PARKED_MAX {
            assert_eq!(
                parked.take_next(p(98)),
                Some("x"),
                "settled by another copy, but not answered to this one's sender"
            );
        }
        assert_eq!(parked.take_next(p(98)), None);
        assert!(parked.is_empty());
    }
}

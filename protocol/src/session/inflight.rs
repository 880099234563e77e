//! Sends of a client that are not settled, over connections.
//!
//! - A send stays until it is acked or finally refused; a lost connection makes it wait again, nothing else does.
//! - Within a conversation, sends leave in the order of their pseqs. Conversations take turns.
//! - No more fly on one connection than the window allows.
//! - A refusal that may be retried holds its conversation back for a time, then what waits leaves again in order. Each
//!   flying send has its own verdict coming, so one refusal causes one repetition.
//! - After one it goes on with a single send, and with [`OPENING`] more for each that is acked: a gateway that has too much to do is
//!   asked whether it has time again, not given everything once more; once it has, whole windows are what it does most cheaply.
//!
//! Not here: whether a repetition is stored twice (`producer`; it is not).

use std::collections::{BTreeMap, BTreeSet};

use core::{
    ops::Bound::{Excluded, Unbounded},
    time::Duration,
};

use crate::{
    frame::{Frame, Send},
    id::{ConversationId, Pseq, Seq},
    limit::{OUTBOX_BYTES_MAX, OUTBOX_SENDS_MAX},
};

/// The shortest wait before a refused send is sent again; doubled with each failure in a row, up to 2^7 times.
const RETRY_MIN: Duration = Duration::from_millis(50);

/// How many more may fly for each that is acked after a refusal: eight times as many in each round trip.
const OPENING: usize = 7;

/// Who is busy and says when to come again knows when it will have time: no more than that is added by failures in a row.
const RETRY_BUSY_MAX: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Entry {
    send: Send,
    flying: bool,
    /// It may have left, on this connection or an earlier one.
    left: bool,
}

/// What is unsettled in one conversation.
#[derive(Debug, Default)]
struct SendLane {
    entries: BTreeMap<Pseq, Entry>,
    waiting: BTreeSet<Pseq>,
    highest_left: Pseq,
    retry_at: Option<Duration>,
    failures: u32,
    /// How many may fly after a refusal; `None`: as many as the window allows.
    narrowed: Option<usize>,
}

impl SendLane {
    fn flying(&self) -> usize {
        self.entries.len() - self.waiting.len()
    }

    /// How many may fly. The one everything else waits for always may, whatever becomes of those behind it.
    fn window(&self, room: Room) -> usize {
        match self.narrowed {
            Some(few) if self.entries.keys().next() != self.waiting.first() => few.min(room.per_conversation),
            _ => room.per_conversation,
        }
    }
}

/// How many sends may fly.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) per_conversation: usize,
    pub(super) in_all: usize,
    /// Bytes of frames that may still leave.
    pub(super) bytes: usize,
}

/// What a refusal says of when to come again.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wait {
    /// After so long, or zero.
    pub(super) after: Duration,
    /// It was refused because there is too much to do, and for nothing else.
    pub(super) busy: bool,
}

/// What an ack or refusal settles.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Settled {
    pub(super) send: Send,
    /// The record; zero when the number was used up without one, `None` when the answer does not say.
    pub(super) seq: Option<Seq>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Inflight {
    lanes: BTreeMap<ConversationId, SendLane>,
    /// Lanes of which a send could leave, but for the window over all.
    ready: BTreeSet<ConversationId>,
    retries: BTreeSet<(Duration, ConversationId)>,
    served: Option<ConversationId>,
    room: Room,
    flying: usize,
    sends: usize,
    bytes: usize,
}

impl Inflight {
    pub(super) fn new() -> Self {
        Self {
            lanes: BTreeMap::new(),
            ready: BTreeSet::new(),
            retries: BTreeSet::new(),
            served: None,
            room: Room { per_conversation: 0, in_all: 0, bytes: 0 },
            flying: 0,
            sends: 0,
            bytes: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.sends
    }

    pub(super) fn has_room(&self) -> bool {
        self.sends < OUTBOX_SENDS_MAX && self.bytes < OUTBOX_BYTES_MAX
    }

    /// Takes a send, or a tombstone in place of one. `left`: it may have been sent by an earlier process. A number
    /// that was taken before keeps its first content. Returns a tombstone of what flies: it may leave at once, in the
    /// place the first copy has in the window.
    pub(super) fn insert(&mut self, send: Send, left: bool) -> Option<Send> {
        let (conversation, pseq) = (send.conversation, send.pseq);
        let lane = self.lanes.entry(conversation).or_default();
        match lane.entries.get_mut(&pseq) {
            Some(entry) if send.cancel && !entry.send.cancel => {
                self.bytes = self.bytes + send.payload.len() - entry.send.payload.len();
                entry.send = send;
                return entry.flying.then(|| entry.send.clone());
            }
            Some(_) => return None,
            None => {
                self.sends += 1;
                self.bytes += send.payload.len();
                // Of an empty lane, everything before its first number left at some time.
                let before = if lane.entries.is_empty() { pseq.prev() } else { lane.highest_left };
                lane.highest_left = if left { pseq.max(lane.highest_left) } else { before };
                lane.entries.insert(pseq, Entry { send, flying: false, left });
                lane.waiting.insert(pseq);
            }
        }
        self.refresh(conversation);
        None
    }

    /// Where the next connection, or this one from now on, has room.
    pub(super) fn set_room(&mut self, room: Room) {
        self.room = room;
        let lanes: Vec<_> = self.lanes.keys().copied().collect();
        for conversation in lanes {
            self.refresh(conversation);
        }
    }

    fn refresh(&mut self, conversation: ConversationId) {
        let ready = self.lanes.get(&conversation).is_some_and(|lane| {
            lane.retry_at.is_none() && !lane.waiting.is_empty() && lane.flying() < lane.window(self.room)
        });
        if ready {
            self.ready.insert(conversation);
        } else {
            self.ready.remove(&conversation);
        }
    }

    /// The next send that may leave. It flies from now on.
    pub(super) fn take_next(&mut self) -> Option<Send> {
        if self.flying >= self.room.in_all {
            return None;
        }
        let after = self.served.and_then(|served| self.ready.range((Excluded(served), Unbounded)).next());
        let conversation = *after.or_else(|| self.ready.first())?;
        let lane = self.lanes.get_mut(&conversation)?;
        let pseq = *lane.waiting.first()?;
        let entry = lane.entries.get_mut(&pseq)?;
        let send = entry.send.clone();
        let size = Frame::Send(send.clone()).encoded_len();
        self.room.bytes = self.room.bytes.checked_sub(size)?;
        entry.flying = true;
        entry.left = true;
        lane.waiting.remove(&pseq);
        lane.highest_left = lane.highest_left.max(pseq);
        self.flying += 1;
        self.served = Some(conversation);
        self.refresh(conversation);
        Some(send)
    }

    /// What a new connection would say first, if it had this room. Nothing flies by it.
    pub(super) fn first(&self, room: Room) -> Vec<Send> {
        let mut bytes = room.bytes;
        let mut sends = Vec::new();
        for lane in self.lanes.values() {
            for entry in lane.entries.values().take(room.per_conversation) {
                let size = Frame::Send(entry.send.clone()).encoded_len();
                let Some(left) = bytes.checked_sub(size).filter(|_| sends.len() < room.in_all) else {
                    return sends;
                };
                bytes = left;
                sends.push(entry.send.clone());
            }
        }
        sends
    }

    /// A send was said on this connection already. It flies, unless it was settled or taken back since.
    pub(super) fn said(&mut self, send: &Send) {
        let size = Frame::Send(send.clone()).encoded_len();
        self.room.bytes = self.room.bytes.saturating_sub(size);
        let Some(lane) = self.lanes.get_mut(&send.conversation) else { return };
        let Some(entry) = lane.entries.get_mut(&send.pseq) else { return };
        entry.left = true;
        lane.highest_left = lane.highest_left.max(send.pseq);
        if entry.flying || entry.send != *send {
            return;
        }
        entry.flying = true;
        lane.waiting.remove(&send.pseq);
        self.flying += 1;
        self.refresh(send.conversation);
    }

    /// The highest number of a conversation that may have left; `None` when nothing is unsettled there.
    pub(super) fn highest_left(&self, conversation: ConversationId) -> Option<Pseq> {
        self.lanes.get(&conversation).map(|lane| lane.highest_left)
    }

    /// The sends named in `seqs` are settled, with these records. Others up to `up_to` are settled too, but how was
    /// answered to somebody else (an earlier connection): those that fly leave again, to be answered by name.
    pub(super) fn acked(
        &mut self,
        conversation: ConversationId,
        up_to: Pseq,
        seqs: &BTreeMap<Pseq, Seq>,
        now: Duration,
    ) -> Vec<Settled> {
        let settled = self.named(conversation, seqs);
        let Some(lane) = self.lanes.get_mut(&conversation) else { return settled };
        let unnamed: Vec<Pseq> =
            lane.entries.range(..=up_to).filter(|(_, entry)| entry.flying).map(|(pseq, _)| *pseq).collect();
        for pseq in unnamed {
            self.postponed(conversation, pseq, Wait::default(), now);
        }
        settled
    }

    /// The sends named in `seqs` are settled, with these records; nothing is known of others.
    pub(super) fn named(&mut self, conversation: ConversationId, seqs: &BTreeMap<Pseq, Seq>) -> Vec<Settled> {
        let named = seqs.iter().filter_map(|(pseq, seq)| {
            self.remove(conversation, *pseq).map(|send| Settled { send, seq: Some(*seq) })
        });
        let settled: Vec<Settled> = named.collect();
        if let Some(lane) = self.lanes.get_mut(&conversation).filter(|_| !settled.is_empty()) {
            // What left before the refusal says nothing of how it is now.
            if lane.retry_at.is_none() {
                lane.failures = 0;
                if let Some(few) = lane.narrowed {
                    let more = few.saturating_add(settled.len().saturating_mul(OPENING));
                    lane.narrowed = (more < self.room.per_conversation).then_some(more);
                }
            }
            self.refresh(conversation);
        }
        settled
    }

    /// The send, if it left on this connection and is not settled.
    pub(super) fn flies(&self, conversation: ConversationId, pseq: Pseq) -> Option<&Send> {
        let entry = self.lanes.get(&conversation)?.entries.get(&pseq)?;
        entry.flying.then_some(&entry.send)
    }

    /// Everything that left on this connection and is not settled.
    pub(super) fn flying(&self) -> impl Iterator<Item = &Send> + '_ {
        let entries = self.lanes.values().flat_map(|lane| lane.entries.values());
        entries.filter(|entry| entry.flying).map(|entry| &entry.send)
    }

    /// Everything up to `up_to` was settled so long ago that nobody remembers how.
    pub(super) fn forgotten(&mut self, conversation: ConversationId, up_to: Pseq) -> Vec<Settled> {
        let Some(lane) = self.lanes.get(&conversation) else { return Vec::new() };
        let pseqs: Vec<Pseq> = lane.entries.range(..=up_to).map(|(pseq, _)| *pseq).collect();
        let removed = pseqs.into_iter().filter_map(|pseq| self.remove(conversation, pseq));
        removed.map(|send| Settled { send, seq: None }).collect()
    }

    /// The send is settled: stored, or never to be stored under its number.
    pub(super) fn remove(&mut self, conversation: ConversationId, pseq: Pseq) -> Option<Send> {
        let lane = self.lanes.get_mut(&conversation)?;
        let entry = lane.entries.remove(&pseq)?;
        lane.waiting.remove(&pseq);
        self.flying -= usize::from(entry.flying);
        self.sends -= 1;
        self.bytes -= entry.send.payload.len();
        self.drop_if_empty(conversation);
        self.refresh(conversation);
        Some(entry.send)
    }

    /// The send was refused for now: it waits, and its conversation with it, for `after` or longer.
    pub(super) fn postponed(
        &mut self,
        conversation: ConversationId,
        pseq: Pseq,
        Wait { after, busy }: Wait,
        now: Duration,
    ) {
        let Some(lane) = self.lanes.get_mut(&conversation) else { return };
        let lowest = lane.entries.keys().next() == Some(&pseq);
        match lane.entries.get_mut(&pseq) {
            Some(entry) if entry.flying => entry.flying = false,
            _ => return,
        }
        self.flying -= 1;
        lane.waiting.insert(pseq);
        let mut backoff = RETRY_MIN * (1 << lane.failures.min(7));
        if busy && !after.is_zero() {
            backoff = backoff.min(RETRY_BUSY_MAX);
        }
        if lowest {
            lane.failures = lane.failures.saturating_add(1);
        }
        if !after.is_zero() {
            lane.narrowed = Some(1);
        }
        let at = now + after.max(backoff);
        if let Some(before) = lane.retry_at {
            self.retries.remove(&(before, conversation));
        }
        let at = lane.retry_at.map_or(at, |before| before.max(at));
        lane.retry_at = Some(at);
        self.retries.insert((at, conversation));
        self.refresh(conversation);
    }

    /// Lets conversations go on whose wait is over.
    pub(super) fn handle_timeout(&mut self, now: Duration) {
        while let Some(&(at, conversation)) = self.retries.first() {
            if at > now {
                break;
            }
            self.retries.pop_first();
            if let Some(lane) = self.lanes.get_mut(&conversation) {
                lane.retry_at = None;
            }
            self.refresh(conversation);
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Duration> {
        self.retries.first().map(|(at, _)| *at)
    }

    /// Nothing flies any more, and nobody is held back.
    pub(super) fn disconnected(&mut self) {
        self.retries.clear();
        self.flying = 0;
        for lane in self.lanes.values_mut() {
            lane.retry_at = None;
            lane.failures = 0;
            lane.narrowed = None;
            for (pseq, entry) in &mut lane.entries {
                if core::mem::take(&mut entry.flying) {
                    lane.waiting.insert(*pseq);
                }
            }
        }
        self.set_room(Room { per_conversation: 0, in_all: 0, bytes: 0 });
    }

    /// Forgets everything; returns what may have left.
    pub(super) fn forget(&mut self) -> Vec<(ConversationId, Pseq)> {
        let lanes = core::mem::take(&mut self.lanes);
        *self = Self { room: self.room, ..Self::new() };
        lanes
            .into_iter()
            .flat_map(|(conversation, lane)| {
                lane.entries
                    .into_iter()
                    .filter(|(_, entry)| entry.left)
                    .map(move |(pseq, _)| (conversation, pseq))
            })
            .collect()
    }

    fn drop_if_empty(&mut self, conversation: ConversationId) {
        if self.lanes.get(&conversation).is_some_and(|lane| lane.entries.is_empty())
            && let Some(lane) = self.lanes.remove(&conversation)
            && let Some(at) = lane.retry_at
        {
            self.retries.remove(&(at, conversation));
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::frame::RecordKind;

    fn c(n: u64) -> ConversationId {
        ConversationId::new(n).unwrap()
    }

    fn p(n: u64) -> Pseq {
        Pseq::new(n).unwrap()
    }

    fn s(n: u64) -> Seq {
        Seq::new(n).unwrap()
    }

    fn busy(after: Duration) -> Wait {
        Wait { after, busy: true }
    }

    fn send(conversation: u64, pseq: u64) -> Send {
        Send {
            kind: RecordKind::Message,
            conversation: c(conversation),
            pseq: p(pseq),
            seen: Seq::ZERO,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: Bytes::from_static(b"x"),
        }
    }

    const OPEN: Room = Room { per_conversation: 3, in_all: 5, bytes: usize::MAX };

    fn drain(inflight: &mut Inflight) -> Vec<(u64, u64)> {
        core::iter::from_fn(|| inflight.take_next()).map(|s| (s.conversation.get(), s.pseq.get())).collect()
    }

    #[test]
    fn conversations_take_turns_within_the_windows() {
        let mut inflight = Inflight::new();
        for pseq in 1..=5 {
            inflight.insert(send(1, pseq), false);
            inflight.insert(send(2, pseq), false);
        }
        assert_eq!(drain(&mut inflight), [], "no connection, no room");
        inflight.set_room(OPEN);
        assert_eq!(drain(&mut inflight), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]);
        assert_eq!(
            inflight.acked(c(1), p(2), &BTreeMap::from([(p(1), s(8)), (p(2), s(9))]), Duration::ZERO).len(),
            2
        );
        assert_eq!(drain(&mut inflight), [(2, 3), (1, 4)]);
        inflight.disconnected();
        inflight.set_room(OPEN);
        assert_eq!(drain(&mut inflight).len(), 5, "all of them again");
        assert_eq!(inflight.len(), 8);
    }

    #[test]
    fn bytes_bound_the_first_flight() {
        let mut inflight = Inflight::new();
        inflight.insert(send(1, 1), false);
        inflight.insert(send(1, 2), false);
        let one = Frame::Send(send(1, 1)).encoded_len();
        inflight.set_room(Room { bytes: one + 1, ..OPEN });
        assert_eq!(drain(&mut inflight), [(1, 1)]);
        inflight.set_room(OPEN);
        assert_eq!(drain(&mut inflight), [(1, 2)]);
    }

    #[test]
    fn a_postponed_send_holds_its_conversation_back_and_leaves_again_in_order() {
        let at = Duration::from_millis;
        let mut inflight = Inflight::new();
        inflight.set_room(OPEN);
        for pseq in 1..=4 {
            inflight.insert(send(1, pseq), false);
        }
        inflight.insert(send(2, 1), false);
        assert_eq!(drain(&mut inflight), [(1, 1), (2, 1), (1, 2), (1, 3)]);
        inflight.postponed(c(1), p(1), busy(at(200)), at(1_000));
        inflight.postponed(c(1), p(2), busy(at(0)), at(1_010));
        inflight.postponed(c(1), p(2), busy(at(9_000)), at(1_010));
        assert_eq!(drain(&mut inflight), [], "4 would overtake 1");
        assert_eq!(inflight.next_timeout(), Some(at(1_200)));
        inflight.handle_timeout(at(1_199));
        assert_eq!(drain(&mut inflight), []);
        inflight.handle_timeout(at(1_200));
        assert_eq!(drain(&mut inflight), [(1, 1)], "it alone, though 3 still flies");
        assert_eq!(inflight.remove(c(1), p(3)).map(|send| send.pseq), Some(p(3)));
        assert_eq!(drain(&mut inflight), [], "whether there is time again is not known yet");
        assert_eq!(inflight.named(c(1), &BTreeMap::from([(p(1), s(7))])).len(), 1);
        assert_eq!(drain(&mut inflight), [(1, 2), (1, 4)], "a final refusal does not block what follows");
    }

    #[test]
    fn after_a_refusal_the_window_opens_with_what_is_acked() {
        let at = Duration::from_secs;
        let mut inflight = Inflight::new();
        let room = Room { per_conversation: 20, in_all: 100, bytes: 100_000 };
        inflight.set_room(room);
        for pseq in 1..=70 {
            inflight.insert(send(1, pseq), false);
        }
        assert_eq!(drain(&mut inflight).len(), 20);
        for pseq in 1..=20 {
            inflight.postponed(c(1), p(pseq), busy(at(1)), at(1));
        }
        inflight.handle_timeout(at(2));
        let mut flying = drain(&mut inflight);
        assert_eq!(flying, [(1, 1)]);
        let mut seen = vec![flying.len()];
        while seen.len() < 4 {
            let named = flying.iter().map(|(_, pseq)| (p(*pseq), s(100 + *pseq))).collect();
            assert_eq!(inflight.named(c(1), &named).len(), flying.len());
            flying = drain(&mut inflight);
            seen.push(flying.len());
        }
        assert_eq!(seen, [1, 8, 20, 20]);
        // A new connection knows nothing of it.
        inflight.postponed(c(1), p(flying[0].1), busy(at(1)), at(3));
        inflight.disconnected();
        inflight.set_room(room);
        assert_eq!(drain(&mut inflight).len(), 20);
    }

    #[test]
    fn acks_of_what_left_before_a_refusal_open_nothing() {
        let at = Duration::from_secs;
        let mut inflight = Inflight::new();
        inflight.set_room(Room { per_conversation: 20, in_all: 100, bytes: 100_000 });
        for pseq in 1..=40 {
            inflight.insert(send(1, pseq), false);
        }
        assert_eq!(drain(&mut inflight).len(), 20);
        for pseq in 11..=20 {
            inflight.postponed(c(1), p(pseq), busy(at(1)), at(1));
        }
        let before = (1..=10).map(|pseq| (p(pseq), s(pseq))).collect();
        assert_eq!(inflight.named(c(1), &before).len(), 10);
        inflight.handle_timeout(at(2));
        assert_eq!(drain(&mut inflight), [(1, 11)], "one first");
    }

    #[test]
    fn who_is_told_when_to_come_again_waits_little_longer_however_often() {
        let ms = Duration::from_millis;
        let doubled = [50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 6_400];
        for (busy, after, waits) in [
            (true, 0, doubled),
            (false, 50, doubled),
            (false, 1_500, [1_500, 1_500, 1_500, 1_500, 1_500, 1_600, 3_200, 6_400, 6_400]),
            (true, 120, [120, 120, 200, 400, 800, 1_000, 1_000, 1_000, 1_000]),
            (true, 1_500, [1_500; 9]),
        ] {
            let mut inflight = Inflight::new();
            inflight.set_room(OPEN);
            inflight.insert(send(1, 1), false);
            let mut now = ms(5_000);
            for wait in waits {
                assert_eq!(drain(&mut inflight).len(), 1, "after {after} ms, at {now:?}");
                inflight.postponed(c(1), p(1), Wait { after: ms(after), busy }, now);
                assert_eq!(inflight.next_timeout(), Some(now + ms(wait)), "{busy} {after}");
                now += ms(wait);
                inflight.handle_timeout(now);
            }
        }
    }

    #[test]
    fn what_an_ack_covers_but_does_not_name_is_asked_again() {
        let at = Duration::from_secs;
        let mut inflight = Inflight::new();
        inflight.set_room(OPEN);
        for pseq in 1..=3 {
            inflight.insert(send(1, pseq), false);
        }
        assert_eq!(drain(&mut inflight).len(), 3);
        let settled = inflight.acked(c(1), p(2), &BTreeMap::from([(p(2), s(9))]), at(1));
        assert_eq!(settled, [Settled { send: send(1, 2), seq: Some(s(9)) }], "1 may have been refused");
        inflight.handle_timeout(at(2));
        assert_eq!(drain(&mut inflight), [(1, 1)]);
        assert_eq!(inflight.forgotten(c(1), p(3)).len(), 2);
        assert_eq!(inflight.len(), 0);
    }

    /// Found by the schedules of `tests/pair.rs`: the echo was faster than the ack.
    #[test]
    fn a_late_ack_of_what_is_settled_is_no_lie() {
        let mut inflight = Inflight::new();
        inflight.insert(send(1, 1), false);
        assert_eq!(inflight.highest_left(c(1)), Some(p(0)));
        assert!(inflight.remove(c(1), p(1)).is_some());
        assert_eq!(inflight.highest_left(c(1)), None);
        inflight.insert(send(1, 2), false);
        assert_eq!(inflight.highest_left(c(1)), Some(p(1)));
    }

    #[test]
    fn a_tombstone_takes_the_place_of_what_flies() {
        let mut inflight = Inflight::new();
        inflight.set_room(OPEN);
        inflight.insert(send(1, 1), false);
        inflight.insert(send(1, 2), false);
        assert_eq!(drain(&mut inflight).len(), 2);
        let tombstone = Send { cancel: true, payload: Bytes::new(), ..send(1, 1) };
        assert_eq!(inflight.insert(tombstone.clone(), false), Some(tombstone.clone()));
        assert_eq!(inflight.insert(tombstone.clone(), false), None, "once");
        let other = Send { payload: Bytes::from_static(b"other"), ..send(1, 2) };
        assert_eq!(inflight.insert(other, false), None, "other content under a taken number is not sent");
        assert_eq!(drain(&mut inflight), []);
        inflight.disconnected();
        inflight.set_room(OPEN);
        assert_eq!(inflight.take_next(), Some(tombstone), "on the next connection too");
        assert_eq!(inflight.take_next(), Some(send(1, 2)));
    }

    #[test]
    fn forgetting_names_what_may_have_left() {
        let mut inflight = Inflight::new();
        inflight.set_room(Room { per_conversation: 1, ..OPEN });
        inflight.insert(send(1, 7), true);
        inflight.insert(send(2, 1), false);
        inflight.insert(send(2, 2), false);
        assert_eq!(drain(&mut inflight), [(1, 7), (2, 1)]);
        assert_eq!(inflight.forget(), [(c(1), p(7)), (c(2), p(1))]);
        assert_eq!((inflight.len(), inflight.take_next()), (0, None));
    }
}

//! Sends that came before their predecessors: a copy in a datagram overtakes, and a send that was refused for now leaves
//! again after those behind it.
//!
//! - Each waits [`PARKED_FOR`] at the most, then it is refused as before; what it waits for makes it go on at once.
//! - Bounded per lane ([`fulmar_protocol::limit::LANE_PARKED_MAX`]), and in all by [`SENDS_MAX`] and [`BYTES_MAX`]. What does
//!   not fit is refused at once.
//!
//! Not here: deciding about them (they are decided like any send when their turn comes).

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::{
    close::RefusalCode,
    frame,
    id::{AppId, ConversationId, Producer, Pseq},
    producer::Parked,
};

use super::Shard;
use crate::{fanout::owed::Owed, ground::now};

/// How long a send waits for its predecessors: longer than a transport takes to repeat something on a bad path.
const PARKED_FOR: Duration = Duration::from_secs(1);

/// Sends that wait in one shard.
const SENDS_MAX: usize = 1_024;

/// Bytes of their payloads.
const BYTES_MAX: usize = 4 * 1024 * 1024;

/// A send that waits.
#[derive(Debug)]
struct Waiting {
    session: Arc<Owed>,
    app: AppId,
    send: frame::Send,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Parking {
    lanes: BTreeMap<(ConversationId, Producer), Parked<Waiting>>,
    sends: usize,
    bytes: usize,
    began: Option<Instant>,
    /// Nothing expires before.
    next: Option<Duration>,
}

impl Parking {
    /// Time on the clock of the parked.
    fn clock(&mut self) -> Duration {
        let now = now();
        now.saturating_duration_since(*self.began.get_or_insert(now))
    }

    /// Whether there was room.
    fn park(&mut self, session: &Arc<Owed>, app: AppId, producer: Producer, send: &frame::Send) -> bool {
        if self.sends >= SENDS_MAX || self.bytes + send.payload.len() > BYTES_MAX {
            return false;
        }
        let until = self.clock() + PARKED_FOR;
        let lane = self.lanes.entry((send.conversation, producer)).or_default();
        let before = held(lane);
        // The payload is a slice of the receive buffer: a copy lets that go.
        let kept = frame::Send { payload: Bytes::copy_from_slice(&send.payload), ..send.clone() };
        let waiting = Waiting { session: Arc::clone(session), app, send: kept };
        let parked = lane.insert(send.pseq, waiting, until).is_ok();
        let after = held(lane);
        self.count(before, after);
        if !parked {
            return false;
        }
        self.next = Some(self.next.map_or(until, |next| next.min(until)));
        true
    }

    /// The send that follows `last` in its lane, if it waits here.
    fn follower(&mut self, conversation: ConversationId, producer: Producer, last: Pseq) -> Option<Waiting> {
        let lane = self.lanes.get_mut(&(conversation, producer))?;
        let before = held(lane);
        let waiting = lane.take_next(last);
        let after = held(lane);
        if lane.is_empty() {
            self.lanes.remove(&(conversation, producer));
        }
        self.count(before, after);
        waiting
    }

    /// One send whose time is over.
    fn expired(&mut self) -> Option<(Producer, Waiting)> {
        let now = self.clock();
        if self.next.is_none_or(|next| next > now) {
            return None;
        }
        let found = self.lanes.iter_mut().find_map(|(key, lane)| {
            let before = held(lane);
            let (_, waiting) = lane.expire(now)?;
            Some((*key, before, held(lane), waiting))
        });
        let Some((key, before, after, waiting)) = found else {
            self.next = self.lanes.values().filter_map(Parked::next_expiry).min();
            return None;
        };
        if after.0 == 0 {
            self.lanes.remove(&key);
        }
        self.count(before, after);
        Some((key.1, waiting))
    }

    fn count(&mut self, before: (usize, usize), after: (usize, usize)) {
        self.sends = self.sends + after.0 - before.0;
        self.bytes = self.bytes + after.1 - before.1;
        if self.sends == 0 {
            self.next = None;
        }
    }

    /// From now until something may have expired; `None`: nothing waits.
    pub(super) fn next_expiry(&mut self) -> Option<Duration> {
        let next = self.next?;
        Some(next.saturating_sub(self.clock()))
    }
}

/// Sends and bytes of one lane.
fn held(lane: &Parked<Waiting>) -> (usize, usize) {
    (lane.len(), lane.iter().map(|waiting| waiting.send.payload.len()).sum())
}

impl Shard {
    /// Keeps a send whose predecessors are missing; one there is no room for is refused.
    pub(super) fn park(
        &mut self,
        session: Arc<Owed>,
        app: AppId,
        producer: Producer,
        send: &frame::Send,
        expected: Pseq,
    ) {
        if !self.parking.park(&session, app, producer, send) {
            let refusal = RefusalCode::OutOfOrder.into();
            self.batch.refused(session, send.conversation, send.pseq, refusal, expected);
        }
    }

    /// The sends that waited for what was decided last in this lane have their turn.
    pub(super) fn unpark(&mut self, conversation: ConversationId, producer: Producer) {
        while !self.parking.lanes.is_empty() {
            let last = self.loaded.get(&conversation).map(|loaded| loaded.state.last_pseq(producer));
            let Some(last) = last else { return };
            let Some(waiting) = self.parking.follower(conversation, producer, last) else { return };
            self.offer(waiting.session, waiting.app, producer, &waiting.send);
        }
    }

    /// Refuses the sends that waited for too long.
    pub(super) fn refuse_expired(&mut self) {
        while self.batch.has_room()
            && let Some((producer, Waiting { session, send, .. })) = self.parking.expired()
        {
            let conversation = send.conversation;
            let last = self.loaded.get(&conversation).map(|loaded| loaded.state.last_pseq(producer));
            let expected = last.unwrap_or_default().saturating_add(1);
            let refusal = RefusalCode::OutOfOrder.into();
            self.batch.refused(session, conversation, send.pseq, refusal, expected);
        }
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{DeviceId, Epoch, Seq, UserId};

    use super::*;

    fn producer(epoch: u64) -> Producer {
        Producer {
            user: UserId::new(257).unwrap(),
            device: DeviceId::FIRST,
            epoch: Epoch::new(epoch).unwrap(),
        }
    }

    fn send(conversation: u64, pseq: u64, bytes: usize) -> frame::Send {
        frame::Send {
            kind: frame::RecordKind::Message,
            conversation: ConversationId::new(conversation).unwrap(),
            pseq: Pseq::new(pseq).unwrap(),
            seen: Seq::ZERO,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: vec![7; bytes].into(),
        }
    }

    fn session() -> Arc<Owed> {
        Arc::new(Owed::new(UserId::new(257).unwrap(), DeviceId::FIRST, 1, 10))
    }

    fn follower(parking: &mut Parking, epoch: u64, last: u64) -> Option<u64> {
        let conversation = ConversationId::new(1).unwrap();
        let waiting = parking.follower(conversation, producer(epoch), Pseq::new(last).unwrap());
        waiting.map(|waiting| waiting.send.pseq.get())
    }

    #[tokio::test(start_paused = true)]
    async fn sends_wait_for_their_turn_in_their_epoch_and_not_for_ever() {
        let app = AppId::of("demo");
        let mut parking = Parking::default();
        assert_eq!(parking.next_expiry(), None);
        for pseq in [4, 3, 3, 6] {
            assert!(parking.park(&session(), app, producer(1), &send(1, pseq, 10)));
        }
        assert_eq!((parking.sends, parking.bytes), (3, 30));
        assert_eq!(follower(&mut parking, 2, 2), None, "another epoch numbers anew");
        assert_eq!(follower(&mut parking, 1, 1), None);
        assert_eq!(follower(&mut parking, 1, 2), Some(3));
        assert_eq!(follower(&mut parking, 1, 3), Some(4));
        assert_eq!(follower(&mut parking, 1, 4), None);
        assert!(parking.expired().is_none());
        assert_eq!(parking.next_expiry(), Some(PARKED_FOR));
        tokio::time::advance(PARKED_FOR).await;
        assert_eq!(parking.next_expiry(), Some(Duration::ZERO));
        assert_eq!(parking.expired().map(|(_, waiting)| waiting.send.pseq.get()), Some(6));
        assert!(parking.expired().is_none() && parking.lanes.is_empty());
        assert_eq!((parking.sends, parking.bytes, parking.next_expiry()), (0, 0, None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_bounded() {
        let app = AppId::of("demo");
        let mut parking = Parking::default();
        let few = (2..100).filter(|pseq| parking.park(&session(), app, producer(1), &send(1, *pseq, 1)));
        assert_eq!(few.count(), fulmar_protocol::limit::LANE_PARKED_MAX);
        let many = (2..9_000).filter(|n| parking.park(&session(), app, producer(1), &send(*n, 9, 1)));
        assert_eq!(many.count(), SENDS_MAX - fulmar_protocol::limit::LANE_PARKED_MAX);
        let mut parking = Parking::default();
        let large = (2..9_000).filter(|n| parking.park(&session(), app, producer(1), &send(*n, 9, 16_384)));
        assert_eq!(large.count(), BYTES_MAX / 16_384);
    }
}

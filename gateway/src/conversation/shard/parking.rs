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

    /// Who is to be refused now: this session if there was no room, or that of an older copy which this one takes the place of. A
    /// device that tries several connections at once says the same on each, and goes on with one of them: which one is not known
    /// here, so every connection is answered.
    fn park(
        &mut self,
        session: &Arc<Owed>,
        app: AppId,
        producer: Producer,
        send: &frame::Send,
    ) -> Option<Arc<Owed>> {
        if self.sends >= SENDS_MAX || self.bytes + send.payload.len() > BYTES_MAX {
            return Some(Arc::clone(session));
        }
        let until = self.clock() + PARKED_FOR;
        let lane = self.lanes.entry((send.conversation, producer)).or_default();
        let before = held(lane);
        // The payload is a slice of the receive buffer: a copy lets that go.
        let kept = frame::Send { payload: Bytes::copy_from_slice(&send.payload), ..send.clone() };
        let waiting = Waiting { session: Arc::clone(session), app, send: kept };
        let replaced = lane.insert(send.pseq, waiting, until);
        let after = held(lane);
        self.count(before, after);
        match replaced {
            Err(refused) => return Some(refused.session),
            Ok(Some(older)) => return Some(older.session).filter(|older| !Arc::ptr_eq(older, session)),
            Ok(None) => {}
        }
        self.next = Some(self.next.map_or(until, |next| next.min(until)));
        None
    }

    /// A send of the lane that waits for nothing any more now that everything up to `last` is settled.
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
    /// Keeps a send whose predecessors are missing; one there is no room for is refused, and so is an older copy of another connection.
    pub(super) fn park(
        &mut self,
        session: Arc<Owed>,
        app: AppId,
        producer: Producer,
        send: &frame::Send,
        expected: Pseq,
    ) {
        if let Some(refused) = self.parking.park(&session, app, producer, send) {
            let refusal = RefusalCode::OutOfOrder.into();
            self.batch.refused(refused, send.conversation, send.pseq, refusal, expected);
        }
    }

    /// The sends that waited for what was decided last in this lane have their turn; copies of what is settled are answered.
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
        let one = session();
        assert_eq!(parking.next_expiry(), None);
        for pseq in [4, 3, 3, 6] {
            assert!(parking.park(&one, app, producer(1), &send(1, pseq, 10)).is_none());
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

    /// Found by seed 468 of the simulated world: the copy of a connection that lost the race took the place of the winner's,
    /// whose client waited for an answer from then on.
    #[tokio::test(start_paused = true)]
    async fn a_copy_of_another_connection_does_not_take_the_answer_with_it() {
        let app = AppId::of("demo");
        let (one, two) = (session(), session());
        let mut parking = Parking::default();
        assert!(parking.park(&one, app, producer(1), &send(1, 6, 1)).is_none());
        assert!(parking.park(&one, app, producer(1), &send(1, 6, 1)).is_none(), "a datagram and the stream");
        let refused = parking.park(&two, app, producer(1), &send(1, 6, 1)).unwrap();
        assert!(Arc::ptr_eq(&refused, &one));
        assert_eq!(follower(&mut parking, 1, 9), Some(6), "settled by another copy: answered all the same");
        assert_eq!((parking.sends, parking.bytes, parking.lanes.len()), (0, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_bounded() {
        let app = AppId::of("demo");
        let one = session();
        let mut parking = Parking::default();
        let few = (2..100).filter(|pseq| parking.park(&one, app, producer(1), &send(1, *pseq, 1)).is_none());
        assert_eq!(few.count(), fulmar_protocol::limit::LANE_PARKED_MAX);
        let many = (2..9_000).filter(|n| parking.park(&one, app, producer(1), &send(*n, 9, 1)).is_none());
        assert_eq!(many.count(), SENDS_MAX - fulmar_protocol::limit::LANE_PARKED_MAX);
        let mut parking = Parking::default();
        let large =
            (2..9_000).filter(|n| parking.park(&one, app, producer(1), &send(*n, 9, 16_384)).is_none());
        assert_eq!(large.count(), BYTES_MAX / 16_384);
    }
}

//! Stage 5: what is owed is gathered and written, one write per channel and turn.
//!
//! - Control, lanes and backlog wait for the client independently of each other.
//! - A turn of the lanes takes what is due for all conversations, up to a budget per lane, and writes it once.
//! - What may have been lost alone leaves once more in a datagram (`copies`).

use std::{collections::HashMap, convert::Infallible, pin::Pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{Channel, Frame, Heads, Pull, Receipts},
    id::{ConversationId, RequestId, Seq},
    limit::{BLOCK_BYTES_MAX, DATAGRAM_BYTES_MAX},
    version::Features,
};
use tokio::time::{Instant, Sleep};
use tracing::{debug, debug_span, warn};

use super::{
    copies::{CopyTimer, LONE_MAX},
    driver::{Connection, End},
};
use crate::{
    conversation::Refusal,
    fanout::owed::{ControlDue, Ending, Owed, Settled, Taken},
    ground::{blocking, unix_now},
    receipt::{
        self,
        catchup::{self, BlockRequest},
    },
};

/// Bytes of the control stream's buffer that are kept from one write to the next: acks fit. A WELCOME or the answer to a call is
/// nothing to be kept by whoever is idle from then on.
const CONTROL_KEPT: usize = 128;

/// Room for a stream's header and a frame's type and length before a BLOCK.
const BLOCK_HEAD_ROOM: usize = 32;

/// Which lane a conversation uses: spread evenly, the same for the life of a connection.
pub(super) fn lane_of(conversation: ConversationId, lanes: u8) -> u8 {
    let mixed = conversation.get().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    u8::try_from(mixed % u64::from(lanes.max(1))).unwrap_or(0)
}

impl Connection {
    pub(super) async fn write_control(self: &Arc<Self>) -> Result<Infallible, End> {
        let mut out = BytesMut::new();
        let mut ending = None;
        loop {
            // Before the welcome there is no owed set, so nothing else can wake this.
            let owed = self.peer.get().map(|peer| Arc::clone(&peer.owed));
            if let Some(owed) = &owed {
                let due = owed.take_control();
                ending = due.ending.clone().or(ending);
                self.tell_due(due)?;
            }
            for frame in self.take_control() {
                frame.encode(&mut out);
            }
            if !out.is_empty() {
                self.context.metrics.bytes_out(out.len() as u64);
                if let Some(stream) = self.control_out.lock().await.as_mut() {
                    stream.write_all(&out).await?;
                }
                let now = self.now();
                self.copies().left(out.len(), now);
                out.clear();
                if out.capacity() > CONTROL_KEPT {
                    out = BytesMut::new();
                }
                continue;
            }
            match &ending {
                Some(Ending::Close(code, reason)) => return Err(End::Close(*code, (*reason).to_owned())),
                Some(Ending::Drain(_)) | None => {}
            }
            match &owed {
                Some(owed) => tokio::select! {
                    biased;
                    () = self.control_wake.notified() => {}
                    () = owed.control_due() => {}
                },
                None => self.control_wake.notified().await,
            }
        }
    }

    /// Turns what is owed on the control stream into frames.
    fn tell_due(&self, due: ControlDue) -> Result<(), End> {
        let ControlDue { settled, heads, receipts, events, ending } = due;
        let peer = self.peer()?;
        if let Some(Ending::Drain(goaway)) = ending {
            let now = self.now();
            self.tell(|session| session.drain(goaway, now))?;
        }
        if !settled.is_empty() {
            self.tell(|session| {
                for settled in settled {
                    match settled {
                        Settled::Acked { conversation, pseq, seq, time } => {
                            session.acked(conversation, pseq, seq, time);
                        }
                        Settled::Before { conversation, up_to, time } => {
                            session.settled(conversation, up_to, time)
                        }
                        Settled::Refused(refused) => session.refused(refused),
                    }
                }
            })?;
        }
        for heads in Heads::split(&heads) {
            self.tell(|session| session.transmit(Frame::Heads(heads)))?;
        }
        if peer.features.has(Features::RECEIPTS) {
            for receipts in Receipts::split(&receipts) {
                self.tell(|session| session.transmit(Frame::Receipts(receipts)))?;
            }
        }
        for event in events {
            let frame = Frame::Event(event);
            let fits = frame.encoded_len()
                <= DATAGRAM_BYTES_MAX.min(self.transport.max_datagram_size().unwrap_or(0));
            if fits && peer.features.has(Features::DATAGRAM_EVENTS) {
                // Lost or dropped is as good as stale.
                let _ = self.transport.send_datagram(frame.to_bytes());
            } else {
                self.tell(|session| session.transmit(frame))?;
            }
        }
        let dropped = peer.owed.take_events_dropped();
        if dropped > 0 {
            self.context.metrics.events_dropped.inc_by(dropped);
        }
        Ok(())
    }

    pub(super) async fn write_lanes(self: &Arc<Self>) -> Result<Infallible, End> {
        self.wait_ready().await;
        let peer = self.peer()?;
        let budget = self.context.config.fanout.gather_bytes;
        let head_interval = Duration::from_millis(self.context.config.fanout.head_interval_ms);
        let mut lanes: Vec<Lane> = (0..peer.lanes).map(|_| Lane::default()).collect();
        let mut told: HashMap<ConversationId, Seq> = HashMap::new();
        let copies = peer.features.has(Features::HEDGE);
        let mut lone: Vec<(ConversationId, Seq, Bytes)> = Vec::new();
        let mut timer = CopyTimer::new();
        let mut reminder = Reminder::new(head_interval);
        loop {
            let now = unix_now();
            let (mut gathered, mut records) = (0, 0);
            while gathered < budget * lanes.len() {
                let Some(taken) = peer.owed.take_live(budget, now) else { break };
                let Taken { conversation, first, frames } = taken;
                let lane = lane_of(conversation, peer.lanes);
                let Some(lane) = lanes.get_mut(usize::from(lane)) else { break };
                gathered += frames.iter().map(Bytes::len).sum::<usize>();
                self.context.metrics.delivery_batch.observe(frames.len() as f64);
                debug_span!("write", conversation = conversation.get()).in_scope(|| {
                    debug!(frames = frames.len(), lane = lane_of(conversation, peer.lanes), "written")
                });
                records += frames.len();
                if copies && records <= LONE_MAX {
                    let seqs = (0..).map(|at| first.saturating_add(at));
                    lone.extend(seqs.zip(&frames).map(|(seq, frame)| (conversation, seq, frame.clone())));
                }
                lane.frames.extend(frames);
            }
            let behind = peer.owed.take_fell_behind();
            if behind > 0 {
                self.context.metrics.fell_behind.inc_by(behind);
            }
            if gathered == 0 {
                tokio::select! {
                    biased;
                    () = peer.owed.lanes_due() => {}
                    () = self.copy_due(&mut timer) => self.send_copies(),
                    () = reminder.due(&peer.owed) => peer.owed.remind_heads(&mut told),
                }
                continue;
            }
            self.context.metrics.bytes_out(gathered as u64);
            let mut due = lanes.iter_mut().enumerate().filter(|(_, lane)| !lane.frames.is_empty());
            match (due.next(), due.next()) {
                (Some((index, lane)), None) => self.write_lane(index, lane).await?,
                (first, second) => {
                    let writes = first.into_iter().chain(second).chain(due);
                    let writes = writes.map(|(index, lane)| self.write_lane(index, lane));
                    futures_util::future::try_join_all(writes).await?;
                }
            }
            if copies {
                let now = self.now();
                let mut watched = self.copies();
                if watched.wants_rtt() {
                    watched.seed(self.transport.rtt());
                }
                watched.wrote(records, gathered, &mut lone, now);
            }
        }
    }

    async fn write_lane(&self, index: usize, lane: &mut Lane) -> Result<(), End> {
        let stream = match &mut lane.stream {
            Some(stream) => stream,
            None => {
                let stream = self.transport.open_uni().await?;
                let _ = stream.set_priority(2);
                if let Some(header) = Channel::Lane(u8::try_from(index).unwrap_or(0)).header() {
                    let mut bytes = BytesMut::new();
                    header.encode(&mut bytes);
                    lane.frames.insert(0, bytes.freeze());
                }
                lane.stream.insert(stream)
            }
        };
        let written = self.hand_over(stream, &mut lane.frames).await;
        lane.frames.clear();
        Ok(written?)
    }

    /// Hands chunks to the transport, as much at a time as the client is allowed to leave unacknowledged.
    async fn hand_over(
        &self,
        stream: &mut fulmar_transport::SendStream,
        mut chunks: &mut [Bytes],
    ) -> Result<(), fulmar_transport::WriteError> {
        let allow = |window: Option<u64>| {
            if let Some(window) = window {
                self.transport.set_send_window(window);
            }
        };
        let begun = {
            let (mut allowance, bounds) = self.allowance();
            allowance.begin(bounds, self.now())
        };
        allow(begun);
        loop {
            let written = chunks.iter().take_while(|chunk| chunk.is_empty()).count();
            chunks = std::mem::take(&mut chunks).get_mut(written..).unwrap_or_default();
            if chunks.is_empty() {
                return Ok(());
            }
            let bytes = stream.write_chunks(chunks).await?;
            let handed = {
                let (mut allowance, bounds) = self.allowance();
                allowance.handed(bounds, bytes, self.now())
            };
            allow(handed);
        }
    }

    /// Bytes of the next BLOCK: what a stuck reader leaves here is no more than a part of what it may leave in the transport.
    fn block_bytes(&self) -> usize {
        usize::try_from(self.allowance().0.window() / 2).unwrap_or(BLOCK_BYTES_MAX)
    }

    pub(super) async fn write_backlog(self: &Arc<Self>) -> Result<Infallible, End> {
        self.wait_ready().await;
        let owed = Arc::clone(&self.peer()?.owed);
        let mut stream: Option<fulmar_transport::SendStream> = None;
        loop {
            let pull = self.pulls.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop_front();
            if let Some(pull) = pull {
                // Boxed, as below: the log is read now and then, and connections wait most of the time.
                Box::pin(self.answer_pull(&mut stream, pull)).await?;
            } else if let Some((conversation, from, to)) = owed.take_backlog() {
                Box::pin(self.catch_up(&mut stream, conversation, from, to)).await?;
            } else {
                tokio::select! {
                    biased;
                    () = owed.backlog_due() => {}
                    () = self.pulls_wake.notified() => {}
                }
            }
        }
    }

    async fn catch_up(
        &self,
        stream: &mut Option<fulmar_transport::SendStream>,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
    ) -> Result<(), End> {
        let peer = self.peer()?;
        match self.read_block(RequestId::ZERO, conversation, from, to).await {
            Ok(Some((block, next))) => {
                self.context.metrics.backlog_records.inc_by(block.records.len() as u64);
                let next = next.max(block.first);
                let stuck = block.records.is_empty() && next <= from.min(to);
                self.write_block(stream, Frame::Block(block)).await?;
                if stuck {
                    // Nothing where something should be: asking again would bring nothing again.
                    self.said(
                        || warn!(%conversation, seq = %from, "the log has no record where it should; the client is left to pull"),
                    );
                    peer.owed.backlog_failed(conversation);
                } else {
                    peer.owed.backlog_written(conversation, next);
                }
            }
            // No member any more: nothing is owed.
            Ok(None) => peer.owed.backlog_written(conversation, to.saturating_add(1)),
            Err(refusal) => {
                self.said(
                    || warn!(%conversation, code = %refusal.code, "catch-up failed; the client is left to pull"),
                );
                peer.owed.backlog_failed(conversation);
            }
        }
        Ok(())
    }

    async fn answer_pull(
        &self,
        stream: &mut Option<fulmar_transport::SendStream>,
        pull: Pull,
    ) -> Result<(), End> {
        let peer = self.peer()?;
        let head = match self.context.conversation(pull.conversation) {
            Ok(shard) => {
                shard.reader.head(pull.conversation).ok().flatten().map_or(Seq::ZERO, |head| head.seq)
            }
            Err(refusal) => return self.refuse_request(pull.id, refusal),
        };
        let mut to = pull.to.min(head.max(pull.from));
        let mut from = pull.from;
        let limit = u64::from(pull.limit);
        if pull.newest {
            from = from.max(Seq::new(to.get().saturating_sub(limit - 1)).unwrap_or(from));
        } else {
            to = to.min(from.saturating_add(limit - 1));
        }
        let first = from;
        loop {
            let (mut block, next) = match self.read_block(pull.id, pull.conversation, from, to).await {
                Ok(Some(read)) => read,
                Ok(None) => return self.refuse_request(pull.id, RefusalCode::UnknownConversation.into()),
                Err(refusal) => return self.refuse_request(pull.id, refusal),
            };
            let stuck = block.records.is_empty();
            block.last |= stuck;
            let last = block.last;
            self.context.metrics.backlog_records.inc_by(block.records.len() as u64);
            self.write_block(stream, Frame::Block(block)).await?;
            peer.owed.pulled(pull.conversation, first, next);
            if last {
                return Ok(());
            }
            from = next;
        }
    }

    fn refuse_request(&self, id: RequestId, refusal: Refusal) -> Result<(), End> {
        self.tell(|session| session.transmit(Frame::Error(super::dispatch::error_frame(id, refusal))))
    }

    async fn read_block(
        &self,
        pull: RequestId,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
    ) -> Result<Option<(fulmar_protocol::frame::Block, Seq)>, Refusal> {
        let peer = self.peer().map_err(|_| Refusal::new(RefusalCode::Draining))?;
        let reader = self.context.conversation(conversation)?.reader.clone();
        let (app, user) = (peer.app, peer.producer.user);
        let open_to_all = self.context.broadcasts.has(app, conversation);
        let bytes = self.block_bytes();
        let request = BlockRequest { pull, conversation, user, open_to_all, from, to, bytes };
        let read = blocking(move || match reader.meta(conversation)? {
            Some(meta) if meta.app == app => catchup::block(&reader, request),
            _ => Ok(None),
        });
        match read.await {
            Ok(Ok(block)) => Ok(block),
            Ok(Err(error)) => {
                self.said(|| warn!(%conversation, %error, "reading the log failed"));
                Err(Refusal::new(receipt::refusal_code(&error)))
            }
            Err(_) => Err(Refusal::new(RefusalCode::StorageUnavailable)),
        }
    }

    async fn write_block(
        &self,
        stream: &mut Option<fulmar_transport::SendStream>,
        frame: Frame,
    ) -> Result<(), End> {
        // With the room encoding asks for: a block that moves takes twice its size, and keeps it until the last byte is acknowledged.
        let mut out = BytesMut::with_capacity(frame.encoded_len() + BLOCK_HEAD_ROOM);
        let stream = match stream {
            Some(stream) => stream,
            None => {
                if let Some(header) = Channel::Backlog.header() {
                    header.encode(&mut out);
                }
                let opened = self.transport.open_uni().await?;
                let _ = opened.set_priority(-1);
                stream.insert(opened)
            }
        };
        frame.encode(&mut out);
        // A reader that is stuck keeps the bytes, not the records as well.
        drop(frame);
        self.context.metrics.bytes_out(out.len() as u64);
        let size = out.len();
        match self.hand_over(stream, &mut [out.freeze()]).await {
            Ok(()) => {
                let now = self.now();
                let mut copies = self.copies();
                copies.left(size, now);
                copies.doubt(now);
                Ok(())
            }
            Err(fulmar_transport::WriteError::ConnectionLost(error)) => Err(error.into()),
            Err(error) => Err(End::Close(CloseCode::BadStream, error.to_string())),
        }
    }
}

/// When the next reminder is due: a beat that each connection counts from its own beginning, so that those of a large group have
/// theirs at different times. There is only a timer while there is something to remind of.
#[derive(Debug)]
struct Reminder {
    begin: Instant,
    every: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Reminder {
    fn new(every: Duration) -> Self {
        Self { begin: Instant::now(), every, sleep: None }
    }

    /// The first beat after this.
    fn after(&self, now: Instant) -> Instant {
        let every = self.every.max(Duration::from_millis(1));
        let beats = now.saturating_duration_since(self.begin).as_nanos() / every.as_nanos() + 1;
        self.begin + every.saturating_mul(u32::try_from(beats).unwrap_or(u32::MAX))
    }

    /// May be dropped at any await: the beat stays.
    async fn due(&mut self, owed: &Owed) {
        if !owed.wants_reminder() {
            self.sleep = None;
            return std::future::pending().await;
        }
        let next = self.after(Instant::now());
        self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next))).as_mut().await;
        self.sleep = None;
    }
}

#[derive(Debug, Default)]
struct Lane {
    stream: Option<fulmar_transport::SendStream>,
    frames: Vec<Bytes>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reminders_keep_the_beat_of_their_connection() {
        let every = Duration::from_secs(1);
        let reminder = Reminder::new(every);
        for (passed, next) in [(0, 1_000), (1, 1_000), (999, 1_000), (1_000, 2_000), (61_500, 62_000)] {
            let (passed, next) = (Duration::from_millis(passed), Duration::from_millis(next));
            assert_eq!(reminder.after(reminder.begin + passed), reminder.begin + next);
        }
    }

    #[test]
    fn conversations_of_one_shard_spread_over_the_lanes() {
        let mut counts = [0u32; 4];
        for local in 1..=4_000u64 {
            counts[usize::from(lane_of(ConversationId::new(local * 256).unwrap(), 4))] += 1;
        }
        assert!(counts.iter().all(|count| (800..1_200).contains(count)), "{counts:?}");
    }
}

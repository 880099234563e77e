//! One end of a TCP connection, as a state machine: bytes in order over a link that loses, doubles and reorders.
//!
//! - What a phone's TCP does that matters here: handshake of one round trip, slow start and halving, retransmission
//!   after `max(200 ms, srtt + 4 rttvar)` that doubles, fast retransmission after three duplicate acks, in-order release,
//!   bounded buffers that push back.
//! - Positions count from 0: the SYN is at 0, data from 1 on, the FIN behind the last byte.
//! - Memory per end is bounded by [`BUFFER_BYTES`] each way and [`HELD_MAX`] segments out of order.
//!
//! Not here: links and addresses (`network`), tasks and wakers (`stream`).

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use fulmar_badnet::SimTime;

/// Bytes a segment carries at the most.
pub(crate) const SEGMENT_BYTES: usize = 1_360;

/// Bytes of header a segment counts for on a link, beside its data.
pub(crate) const HEADER_BYTES: usize = 32;

/// Bytes either buffer holds.
pub(crate) const BUFFER_BYTES: usize = 256 * 1024;

/// Bytes that may wait in an end without having been sent once, as Linux is told where the SDK and the gateway tune their sockets
/// (`TCP_NOTSENT_LOWAT`): more waits with its writer, who may still put something else first.
const UNSENT_MAX: usize = 16 * 1024;

/// Segments kept that came too early.
const HELD_MAX: usize = 256;

const RTO_MIN: Duration = Duration::from_millis(200);
const RTO_FIRST: Duration = Duration::from_secs(1);
const RTO_MAX: Duration = Duration::from_secs(60);

/// Retransmissions of one position before the connection is given up (as Linux: about a quarter of an hour).
const RESENDS_MAX: u32 = 15;

/// The same for a handshake.
const SYN_RESENDS_MAX: u32 = 6;

/// What travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) reset: bool,
    /// Position of the first byte (or of the SYN or FIN).
    pub(crate) seq: u64,
    /// Everything before this has come; `None` in the first segment.
    pub(crate) ack: Option<u64>,
    /// Bytes the sender of this segment can take beyond `ack`.
    pub(crate) window: u64,
    pub(crate) data: Bytes,
}

impl Segment {
    /// An answer to something that belongs to no connection.
    pub(crate) fn refusal() -> Self {
        Self { syn: false, fin: false, reset: true, seq: 0, ack: None, window: 0, data: Bytes::new() }
    }

    pub(crate) fn len(&self) -> usize {
        HEADER_BYTES + self.data.len()
    }

    fn end(&self) -> u64 {
        self.seq + self.data.len() as u64 + u64::from(self.syn) + u64::from(self.fin)
    }
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    Reset,
    TimedOut,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Some(usize),
    End,
    Wait,
    Broken(Broken),
}

/// One end.
#[derive(Debug)]
pub(crate) struct End {
    broken: Option<Broken>,
    /// The peer's SYN has come.
    greeted: bool,
    /// Bytes from `una` on; the SYN and the FIN are not among them.
    out: VecDeque<u8>,
    /// The first position that is not acked.
    una: u64,
    /// The first position that was not sent yet.
    next: u64,
    /// The highest position ever sent.
    sent_max: u64,
    finishing: bool,
    fin_acked: bool,
    window: u64,
    cwnd: u64,
    ssthresh: u64,
    duplicates: u32,
    /// Fast recovery ends when this is acked.
    recover: Option<u64>,
    resend: bool,
    srtt: Option<(Duration, Duration)>,
    rto: Duration,
    resends: u32,
    /// A segment whose round trip is measured: its end, when it left.
    timed: Option<(u64, SimTime)>,
    timer: Option<SimTime>,
    /// Everything of the peer before this has come.
    expected: u64,
    early: BTreeMap<u64, Segment>,
    inbox: VecDeque<u8>,
    ended: bool,
    ack_due: bool,
    shown_window: u64,
    resent_count: u64,
}

impl End {
    /// The end that opens the connection (`true`) or is called.
    pub(crate) fn new(opens: bool) -> Self {
        Self {
            broken: None,
            greeted: false,
            out: VecDeque::new(),
            una: 0,
            next: if opens { 0 } else { u64::MAX },
            sent_max: 0,
            finishing: false,
            fin_acked: false,
            window: SEGMENT_BYTES as u64,
            cwnd: 10 * SEGMENT_BYTES as u64,
            ssthresh: u64::MAX,
            duplicates: 0,
            recover: None,
            resend: false,
            srtt: None,
            rto: RTO_FIRST,
            resends: 0,
            timed: None,
            timer: None,
            expected: 0,
            early: BTreeMap::new(),
            inbox: VecDeque::new(),
            ended: false,
            ack_due: false,
            shown_window: BUFFER_BYTES as u64,
            resent_count: 0,
        }
    }

    /// Whether both sides have heard of each other.
    pub(crate) fn is_open(&self) -> bool {
        self.greeted && self.una >= 1 && self.broken.is_none()
    }

    pub(crate) fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// Whether nothing more will happen: both directions ended and acked, or broken.
    pub(crate) fn is_over(&self) -> bool {
        self.broken.is_some() || (self.fin_acked && self.ended)
    }

    /// Segments that were sent more than once.
    pub(crate) fn resent_count(&self) -> u64 {
        self.resent_count
    }

    pub(crate) fn has_unread(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// Takes as many bytes as there is room for.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        if self.finishing {
            return Err(Broken::Reset);
        }
        let unsent = self.out.len().saturating_sub(self.in_flight());
        let room = BUFFER_BYTES.saturating_sub(self.out.len()).min(UNSENT_MAX.saturating_sub(unsent));
        let room = room.min(bytes.len());
        self.out.extend(bytes.iter().take(room));
        Ok(room)
    }

    /// Hands out what has come, in order.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> Read {
        if self.inbox.is_empty() {
            return match self.broken {
                Some(broken) => Read::Broken(broken),
                None if self.ended => Read::End,
                None => Read::Wait,
            };
        }
        let taken = into.len().min(self.inbox.len());
        for (place, byte) in into.iter_mut().zip(self.inbox.drain(..taken)) {
            *place = byte;
        }
        // A reader that made much room tells the writer.
        if self.room() >= self.shown_window + BUFFER_BYTES as u64 / 4 {
            self.ack_due = true;
        }
        Read::Some(taken)
    }

    /// Nothing more will be written.
    pub(crate) fn finish(&mut self) {
        self.finishing = true;
    }

    /// Gives the connection up; the segment tells the peer.
    pub(crate) fn reset(&mut self) -> Segment {
        self.broken = Some(Broken::Reset);
        self.timer = None;
        Segment::refusal()
    }

    /// Bytes that were sent at least once and are not acked.
    fn in_flight(&self) -> usize {
        usize::try_from(self.sent_max.saturating_sub(self.una.max(1)))
            .unwrap_or(usize::MAX)
            .min(self.out.len())
    }

    fn room(&self) -> u64 {
        BUFFER_BYTES.saturating_sub(self.inbox.len()) as u64
    }

    /// Takes a segment of the peer.
    pub(crate) fn handle(&mut self, segment: &Segment, now: SimTime) {
        if self.broken.is_some() {
            return;
        }
        if segment.reset {
            self.broken = Some(Broken::Reset);
            self.timer = None;
            return;
        }
        if segment.syn {
            if !self.greeted {
                self.greeted = true;
                self.expected = 1;
                if self.next == u64::MAX {
                    self.next = 0;
                }
            }
            self.ack_due = true;
        }
        if !self.greeted {
            return;
        }
        self.window = segment.window;
        if let Some(ack) = segment.ack {
            self.acked(ack, segment, now);
        }
        if segment.data.is_empty() && !segment.fin {
            return;
        }
        self.ack_due = true;
        if segment.end() > self.expected && (self.early.len() < HELD_MAX || segment.seq <= self.expected) {
            self.early.insert(segment.seq, segment.clone());
        }
        while let Some((_, early)) = self.early.first_key_value() {
            if early.seq > self.expected {
                break;
            }
            let Some((_, early)) = self.early.pop_first() else { break };
            let skip = usize::try_from(self.expected - early.seq).unwrap_or(usize::MAX);
            let fresh = early.data.get(skip..).unwrap_or_default();
            if self.inbox.len() + fresh.len() > BUFFER_BYTES {
                // Beyond the window it was told: it comes again.
                break;
            }
            self.inbox.extend(fresh);
            self.expected += fresh.len() as u64;
            if early.fin && early.end() == self.expected + 1 {
                self.expected += 1;
                self.ended = true;
            }
        }
    }

    fn acked(&mut self, ack: u64, segment: &Segment, now: SimTime) {
        if ack > self.sent_max {
            return;
        }
        if ack <= self.una {
            let is_duplicate = ack == self.una
                && self.sent_max > self.una
                && segment.data.is_empty()
                && !segment.syn
                && !segment.fin;
            if is_duplicate {
                self.duplicates += 1;
                if self.duplicates == 3 && self.recover.is_none() {
                    self.halve();
                    self.cwnd = self.ssthresh + 3 * SEGMENT_BYTES as u64;
                    self.recover = Some(self.sent_max);
                    self.resend = true;
                } else if self.recover.is_some() {
                    self.cwnd += SEGMENT_BYTES as u64;
                }
            }
            return;
        }
        let mut bytes = ack - self.una;
        if self.una == 0 {
            bytes -= 1;
        }
        self.fin_acked |= self.finishing && bytes > self.out.len() as u64;
        let data = usize::try_from(bytes).unwrap_or(usize::MAX).min(self.out.len());
        self.out.drain(..data);
        self.una = ack;
        self.next = self.next.max(ack);
        self.duplicates = 0;
        self.resends = 0;
        if let Some((end, left)) = self.timed
            && ack >= end
        {
            self.timed = None;
            self.measured(now.since(left));
        }
        match self.recover {
            Some(recover) if ack < recover => self.resend = true,
            Some(_) => {
                self.recover = None;
                self.cwnd = self.ssthresh;
            }
            None if self.cwnd < self.ssthresh => self.cwnd += bytes,
            None => self.cwnd += (SEGMENT_BYTES * SEGMENT_BYTES) as u64 / self.cwnd.max(1),
        }
        self.timer = (self.sent_max > self.una).then(|| now + self.rto);
    }

    fn measured(&mut self, rtt: Duration) {
        let (srtt, var) = match self.srtt {
            None => (rtt, rtt / 2),
            Some((srtt, var)) => ((srtt * 7 + rtt) / 8, (var * 3 + srtt.abs_diff(rtt)) / 4),
        };
        self.srtt = Some((srtt, var));
        self.rto = RTO_MIN.max(srtt + 4 * var).min(RTO_MAX);
    }

    fn halve(&mut self) {
        self.ssthresh = ((self.sent_max - self.una) / 2).max(2 * SEGMENT_BYTES as u64);
    }

    /// When [`Self::handle_timeout`] is due.
    pub(crate) fn poll_timeout(&self) -> Option<SimTime> {
        self.timer
    }

    /// Nothing was acked for too long: from the first position again.
    pub(crate) fn handle_timeout(&mut self, now: SimTime) {
        if self.timer.is_none_or(|timer| timer > now) || self.broken.is_some() {
            return;
        }
        self.timer = None;
        self.resends += 1;
        if self.resends > if self.una == 0 { SYN_RESENDS_MAX } else { RESENDS_MAX } {
            self.broken = Some(Broken::TimedOut);
            return;
        }
        self.halve();
        self.cwnd = SEGMENT_BYTES as u64;
        self.recover = None;
        self.duplicates = 0;
        self.timed = None;
        self.next = self.una;
        self.rto = (self.rto * 2).min(RTO_MAX);
    }

    /// The next segment to send.
    pub(crate) fn poll_transmit(&mut self, now: SimTime) -> Option<Segment> {
        if self.broken.is_some() || self.next == u64::MAX {
            return None;
        }
        if self.resend {
            self.resend = false;
            let segment = self.cut(self.una);
            return Some(self.leaves(segment, now));
        }
        if self.next == 0 {
            // A SYN, or the answer to one.
            let segment = Segment { syn: true, ..self.empty(0) };
            self.next = 1;
            return Some(self.leaves(segment, now));
        }
        let end = self.una.max(1) + self.out.len() as u64;
        // A closed window is tried with one segment when the timer fires.
        let limit = self.una.max(1) + self.cwnd.min(self.window.max(SEGMENT_BYTES as u64));
        let may_send = self.greeted && self.una >= 1;
        if may_send && self.next < end && self.next < limit {
            let segment = self.cut(self.next);
            self.next = segment.end();
            return Some(self.leaves(segment, now));
        }
        if may_send && self.finishing && !self.fin_acked && self.next == end {
            let segment = Segment { fin: true, ..self.empty(end) };
            self.next = end + 1;
            return Some(self.leaves(segment, now));
        }
        if self.ack_due {
            let segment = self.empty(self.next);
            self.shown(&segment);
            return Some(segment);
        }
        None
    }

    fn empty(&self, seq: u64) -> Segment {
        let ack = self.greeted.then_some(self.expected);
        Segment { syn: false, fin: false, reset: false, seq, ack, window: self.room(), data: Bytes::new() }
    }

    /// The segment at `from`, of what is not acked.
    fn cut(&self, from: u64) -> Segment {
        if from == 0 {
            return Segment { syn: true, ..self.empty(0) };
        }
        let skip = usize::try_from(from - self.una.max(1)).unwrap_or(usize::MAX);
        let data: Bytes = self.out.iter().skip(skip).take(SEGMENT_BYTES).copied().collect();
        let fin = self.finishing && !self.fin_acked && data.is_empty();
        Segment { data, fin, ..self.empty(from) }
    }

    fn leaves(&mut self, segment: Segment, now: SimTime) -> Segment {
        let end = segment.end();
        if end <= self.sent_max || segment.seq < self.sent_max {
            self.resent_count += 1;
            if self.timed.is_some_and(|(timed, _)| segment.seq < timed) {
                // Karn: what was sent twice is no measure.
                self.timed = None;
            }
        } else if self.timed.is_none() {
            self.timed = Some((end, now));
        }
        self.sent_max = self.sent_max.max(end);
        if self.timer.is_none() {
            self.timer = Some(now + self.rto);
        }
        self.shown(&segment);
        segment
    }

    fn shown(&mut self, segment: &Segment) {
        self.ack_due = false;
        self.shown_window = segment.window;
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use fulmar_badnet::net::{Delay, Impairment, Link, Loss, Reorder, Verdict};
    use fulmar_badnet::{Rng, Share};

    use super::*;

    /// Moves `bytes` from one end to the other over two such links; when the last byte was read, and how many segments
    /// went twice.
    fn transfer(impairment: &Impairment, bytes: usize, seed: u64) -> (SimTime, u64) {
        let mut rng = Rng::new(seed);
        let mut links = [Link::new(impairment.clone()), Link::new(impairment.clone())];
        let mut ends = [End::new(true), End::new(false)];
        let mut flights: BinaryHeap<Reverse<(SimTime, u64, usize)>> = BinaryHeap::new();
        let mut segments: BTreeMap<u64, Segment> = BTreeMap::new();
        let (mut now, mut serial, mut written, mut read) = (SimTime::START, 0u64, 0usize, Vec::new());
        let content = |at: usize| u8::try_from(at % 251).unwrap();
        loop {
            if written < bytes {
                let chunk: Vec<u8> = (written..bytes.min(written + 150_000)).map(content).collect();
                written += ends[0].write(&chunk).unwrap();
            }
            if written == bytes {
                ends[0].finish();
            }
            let mut buffer = [0; 3_000];
            loop {
                match ends[1].read(&mut buffer) {
                    Read::Some(len) => read.extend_from_slice(&buffer[..len]),
                    Read::Wait => break,
                    Read::End => {
                        assert_eq!(read.len(), bytes);
                        assert!(read.iter().enumerate().all(|(at, byte)| *byte == content(at)));
                        return (now, ends[0].resent_count());
                    }
                    Read::Broken(broken) => panic!("{broken:?}"),
                }
            }
            for side in 0..2 {
                while let Some(segment) = ends[side].poll_transmit(now) {
                    if let Verdict::Deliver(arrival) = links[side].offer(now, segment.len(), &mut rng) {
                        for at in [Some(arrival.at), arrival.again_at].into_iter().flatten() {
                            serial += 1;
                            segments.insert(serial, segment.clone());
                            flights.push(Reverse((at, serial, 1 - side)));
                        }
                    }
                }
            }
            let timer = ends.iter().filter_map(End::poll_timeout).min();
            let flight = flights.peek().map(|Reverse((at, ..))| *at);
            now = match (flight, timer) {
                (Some(flight), Some(timer)) => flight.min(timer),
                (Some(at), None) | (None, Some(at)) => at,
                // More to write.
                (None, None) => continue,
            };
            assert!(now < SimTime::from_millis(3_600_000), "stuck");
            while let Some(Reverse((at, serial, side))) = flights.peek().copied() {
                if at > now {
                    break;
                }
                flights.pop();
                ends[side].handle(&segments.remove(&serial).unwrap(), now);
            }
            ends.iter_mut().for_each(|end| end.handle_timeout(now));
        }
    }

    #[test]
    fn a_clean_link_costs_its_round_trips() {
        let clean = Impairment { delay: Delay::fixed(Duration::from_millis(50)), ..Impairment::default() };
        let (end, resent) = transfer(&clean, 1_000, 1);
        // SYN, SYN-ACK, data.
        assert_eq!((end, resent), (SimTime::from_millis(150), 0));
        let (end, resent) = transfer(&clean, 100_000, 1);
        assert_eq!(resent, 0);
        assert!(end < SimTime::from_millis(550), "{end}: slow start doubles");
    }

    #[test]
    fn what_was_never_sent_is_bounded() {
        let now = SimTime::from_millis(1);
        let (mut one, mut two) = (End::new(true), End::new(false));
        two.handle(&one.poll_transmit(now).unwrap(), now);
        one.handle(&two.poll_transmit(now).unwrap(), now);
        let bytes = vec![7; BUFFER_BYTES];
        assert_eq!(one.write(&bytes), Ok(UNSENT_MAX));
        assert_eq!(one.write(&bytes), Ok(0));
        // What leaves makes room, up to what the link takes at once.
        let mut sent = 0;
        while let Some(segment) = one.poll_transmit(now) {
            sent += segment.data.len();
        }
        assert_eq!(sent, 10 * SEGMENT_BYTES);
        assert_eq!(one.write(&bytes), Ok(sent));
        assert_eq!(one.write(&bytes), Ok(0));
    }

    #[test]
    fn bytes_come_in_order_over_any_link() {
        for seed in 0..40 {
            let bad = Impairment {
                delay: Delay::fixed(Duration::from_millis(20)).with_jitter(Duration::from_millis(20)),
                loss: Loss::random(Share::percent(5 * u32::try_from(seed % 5).unwrap())),
                duplicate: Share::percent(5),
                reorder: Reorder { share: Share::percent(10), hold: Duration::from_millis(40) },
                ..Impairment::default()
            };
            let (_, resent) = transfer(&bad, 200_000, seed);
            assert!(seed % 5 == 0 || resent > 0);
        }
    }

    #[test]
    fn a_lone_loss_costs_the_timer() {
        let mut end = End::new(true);
        let now = SimTime::from_millis(1);
        assert!(end.poll_transmit(now).unwrap().syn);
        assert_eq!(end.poll_transmit(now), None);
        assert_eq!(end.poll_timeout(), Some(now + RTO_FIRST));
        end.handle_timeout(now + RTO_FIRST);
        assert!(end.poll_transmit(now + RTO_FIRST).unwrap().syn);
        assert_eq!(end.poll_timeout(), Some(now + 3 * RTO_FIRST), "the timer doubles");
        let answer = Segment { syn: true, ack: Some(1), window: 10_000, ..Segment::refusal() };
        end.handle(&Segment { reset: false, ..answer.clone() }, now + 2 * RTO_FIRST);
        assert!(end.is_open());
        end.handle(&Segment::refusal(), now);
        assert_eq!(end.read(&mut [0; 4]), Read::Broken(Broken::Reset));
        assert!(answer.reset);
    }
}

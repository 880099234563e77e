//! The multiplexer's state: streams, windows, and what is to be said.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::frame::{
    Close, Direction, Frame, Parameters, RECORD_BYTES, Side, StreamId, VARINT_MAX, Violation, get_varint,
    put_stream_header, stream_header_max,
};

/// Pieces of one stream that wait in either direction before small ones are put together: the list costs memory, too.
const PIECES_MAX: usize = 64;

/// Room a record must have left for another frame to be begun.
const ROOM_MIN: usize = 64;

/// Bytes a DATAGRAM frame has beside its data, at most.
const DATAGRAM_OVERHEAD: usize = 5;

/// Larger datagrams are never sent: one always fits a record beside what has to be said first.
const DATAGRAM_FRAME_MAX: usize = RECORD_BYTES / 2;

/// Bytes of a record of streams with a negative priority: what is in it can't be overtaken.
const BACKGROUND_RECORD: usize = 4 * 1024;

/// Bounds of one side.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Bidirectional streams the peer may have open.
    pub streams_bidi: u64,
    /// Unidirectional streams the peer may have open.
    pub streams_uni: u64,
    /// Bytes of one stream that may wait to be read here.
    pub stream_window: u64,
    /// Bytes of all streams that may wait to be read here.
    pub window: u64,
    /// Bytes of one stream that may wait to be sent.
    pub send_buffer: usize,
    /// Bytes of datagrams that may wait to be read; the oldest are dropped.
    pub datagrams_in: usize,
    /// Bytes of datagrams that may wait to be sent; the oldest are dropped.
    pub datagrams_out: usize,
    /// Largest datagram that is taken from the peer; 0: none.
    pub datagram_size: usize,
    /// Milliseconds of silence after which the connection is gone; 0: never.
    pub idle_timeout_ms: u64,
    /// What the peer is known to grant before its parameters come. `None`: nothing.
    pub assumed: Option<Parameters>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            streams_bidi: 8,
            streams_uni: 32,
            stream_window: 128 * 1024,
            window: 512 * 1024,
            send_buffer: 64 * 1024,
            datagrams_in: 16 * 1024,
            datagrams_out: 16 * 1024,
            datagram_size: 1_200,
            idle_timeout_ms: 180_000,
            assumed: None,
        }
    }
}

impl Config {
    fn parameters(&self) -> Parameters {
        let datagram = if self.datagram_size == 0 { 0 } else { self.datagram_size + DATAGRAM_OVERHEAD };
        Parameters {
            max_idle_timeout: self.idle_timeout_ms,
            max_data: self.window,
            max_stream_data_bidi_local: self.stream_window,
            max_stream_data_bidi_remote: self.stream_window,
            max_stream_data_uni: self.stream_window,
            max_streams_bidi: self.streams_bidi,
            max_streams_uni: self.streams_uni,
            max_datagram_frame_size: datagram as u64,
            max_record_size: RECORD_BYTES as u64,
        }
    }
}

/// Something the owner of a stream, or of the connection, may wait for. Each is told once until it is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// The peer opened streams.
    Opened(Direction),
    /// More streams may be opened.
    Available(Direction),
    /// A stream has bytes, or has ended.
    Readable(StreamId),
    /// A stream can take bytes, was stopped, or is sent.
    Writable(StreamId),
    /// A datagram came.
    Datagram,
    /// A ping was answered.
    Pong(u64),
}

/// Not now; an [`Event`] will say when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked;

/// Why a stream can't be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// [`Event::Writable`] comes.
    Blocked,
    /// The peer reads it no more.
    Stopped(u64),
    /// It was finished or reset.
    Closed,
}

/// Why a stream can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// [`Event::Readable`] comes.
    Blocked,
    /// The peer gave it up.
    Reset(u64),
    /// Its end was read, or it was stopped.
    Closed,
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// This side closed it.
    Locally(Close),
    /// The peer broke the rules, and was told.
    Violated(Violation),
    /// The peer closed it.
    Remotely(Close),
}

#[derive(Debug, Default)]
struct SendHalf {
    pieces: VecDeque<Bytes>,
    buffered: usize,
    sent: u64,
    limit: u64,
    priority: i32,
    /// Its place among those that have something to send and may.
    turn: Option<u64>,
    /// Nothing comes after what is buffered.
    finishing: bool,
    finished: bool,
    /// The code of a RESET_STREAM that is to be sent or was.
    reset: Option<u64>,
    /// The peer's code.
    stopped: Option<u64>,
    /// Somebody could not write.
    waiting: bool,
    /// Nobody holds it any more.
    released: bool,
}

#[derive(Debug, Default)]
struct RecvHalf {
    pieces: VecDeque<Bytes>,
    tail: BytesMut,
    /// Bytes that came.
    received: u64,
    /// Bytes that were taken by the reader or thrown away.
    taken: u64,
    /// Bytes that may come.
    limit: u64,
    fin: bool,
    reset: Option<u64>,
    /// Nobody reads it any more.
    stopped: bool,
}

#[derive(Debug, Default)]
struct Stream {
    send: Option<SendHalf>,
    recv: Option<RecvHalf>,
}

/// What is to be said about a stream beside its bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Due {
    window: bool,
    reset: bool,
    stop: Option<u64>,
}

/// One side of a connection. See the module's text.
#[derive(Debug)]
pub struct Mux {
    side: Side,
    config: Config,
    /// A record that has not come whole.
    partial: BytesMut,
    peer: Parameters,
    peer_known: bool,

    streams: BTreeMap<StreamId, Stream>,
    /// Streams this side opened, and may, by direction.
    opened: [u64; 2],
    may_open: [u64; 2],
    /// Streams the peer opened, may, and that were taken by `accept`.
    peer_opened: [u64; 2],
    peer_may_open: [u64; 2],
    accepted: [u64; 2],

    sent: u64,
    may_send: u64,
    received: u64,
    may_receive: u64,
    taken: u64,

    ready: BTreeSet<(Reverse<i32>, u64, StreamId)>,
    /// Streams that are left out of `ready` because of the connection's window.
    starved: BTreeSet<StreamId>,
    turns: u64,

    parameters_sent: bool,
    pong: Option<u64>,
    ping: Option<u64>,
    pinged: u64,
    window_due: bool,
    streams_due: [bool; 2],
    due: BTreeMap<StreamId, Due>,

    datagrams_out: VecDeque<Bytes>,
    datagrams_out_bytes: usize,
    datagrams_in: VecDeque<Bytes>,
    datagrams_in_bytes: usize,
    datagrams_dropped: u64,

    events: BTreeSet<Event>,
    ended: Option<Ended>,
    close_due: Option<Close>,
}

impl Mux {
    /// A connection on a byte stream on which nothing was said yet.
    #[must_use]
    pub fn new(side: Side, config: Config) -> Self {
        let peer = config.assumed.unwrap_or_default();
        Self {
            side,
            partial: BytesMut::new(),
            peer,
            peer_known: false,
            streams: BTreeMap::new(),
            opened: [0; 2],
            may_open: [peer.max_streams_bidi, peer.max_streams_uni],
            peer_opened: [0; 2],
            peer_may_open: [config.streams_bidi, config.streams_uni],
            accepted: [0; 2],
            sent: 0,
            may_send: peer.max_data,
            received: 0,
            may_receive: config.window,
            taken: 0,
            ready: BTreeSet::new(),
            starved: BTreeSet::new(),
            turns: 0,
            parameters_sent: false,
            pong: None,
            ping: None,
            pinged: 0,
            window_due: false,
            streams_due: [false; 2],
            due: BTreeMap::new(),
            datagrams_out: VecDeque::new(),
            datagrams_out_bytes: 0,
            datagrams_in: VecDeque::new(),
            datagrams_in_bytes: 0,
            datagrams_dropped: 0,
            events: BTreeSet::new(),
            ended: None,
            close_due: None,
            config,
        }
    }

    /// Milliseconds of silence after which the connection is gone: the shorter of both sides'. `None`: never.
    #[must_use]
    pub fn idle_timeout_ms(&self) -> Option<u64> {
        let sides = [self.config.idle_timeout_ms, self.peer.max_idle_timeout];
        sides.into_iter().filter(|side| *side > 0).min()
    }

    /// How it ended, once it has.
    #[must_use]
    pub const fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    /// What happened since the last call.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_first()
    }

    /// Datagrams that were dropped in either direction because there was no room.
    #[must_use]
    pub const fn datagrams_dropped(&self) -> u64 {
        self.datagrams_dropped
    }

    /// Bytes of streams and datagrams held in both directions.
    #[must_use]
    pub fn buffered(&self) -> usize {
        let of_stream = |stream: &Stream| {
            let sending = stream.send.as_ref().map_or(0, |send| send.buffered);
            let received = stream.recv.as_ref().map_or(0, |recv| recv.received.saturating_sub(recv.taken));
            sending.saturating_add(usize::try_from(received).unwrap_or(usize::MAX))
        };
        let streams: usize = self.streams.values().map(of_stream).sum();
        streams + self.datagrams_in_bytes + self.datagrams_out_bytes + self.partial.len()
    }

    // ---------------------------------------------------------------- streams

    /// Opens a stream.
    ///
    /// # Errors
    /// The peer allows no more now; [`Event::Available`] comes when it does.
    pub fn open(&mut self, direction: Direction) -> Result<StreamId, Blocked> {
        let (Some(opened), Some(may)) =
            (self.opened.get_mut(direction.index()), self.may_open.get(direction.index()))
        else {
            return Err(Blocked);
        };
        if *opened >= *may {
            return Err(Blocked);
        }
        let id = StreamId::new(self.side, direction, *opened);
        *opened += 1;
        let stream = self.new_stream(id);
        self.streams.insert(id, stream);
        Ok(id)
    }

    /// The next stream the peer opened, in the order of their numbers.
    ///
    /// # Errors
    /// There is none; [`Event::Opened`] comes when there is.
    pub fn accept(&mut self, direction: Direction) -> Result<StreamId, Blocked> {
        let opener = self.peer_side();
        let opened = self.peer_opened.get(direction.index()).copied().unwrap_or(0);
        let accepted = self.accepted.get_mut(direction.index()).filter(|accepted| **accepted < opened);
        let accepted = accepted.ok_or(Blocked)?;
        let id = StreamId::new(opener, direction, *accepted);
        *accepted += 1;
        Ok(id)
    }

    const fn peer_side(&self) -> Side {
        match self.side {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }

    fn new_stream(&self, id: StreamId) -> Stream {
        let ours = id.opener() == self.side;
        let send_limit = match (id.direction(), ours) {
            (Direction::Uni, _) => self.peer.max_stream_data_uni,
            (Direction::Bi, true) => self.peer.max_stream_data_bidi_remote,
            (Direction::Bi, false) => self.peer.max_stream_data_bidi_local,
        };
        let both = id.direction() == Direction::Bi;
        let send = SendHalf { limit: send_limit, ..SendHalf::default() };
        let recv = RecvHalf { limit: self.config.stream_window, ..RecvHalf::default() };
        Stream { send: (both || ours).then_some(send), recv: (both || !ours).then_some(recv) }
    }

    fn send_half(&mut self, id: StreamId) -> Option<&mut SendHalf> {
        self.streams.get_mut(&id)?.send.as_mut()
    }

    /// Takes bytes to be sent, as many as there is room for, from the front of `bytes`.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn write(&mut self, id: StreamId, bytes: &mut Bytes) -> Result<usize, WriteError> {
        let room = self.config.send_buffer;
        let send = self.send_half(id).ok_or(WriteError::Closed)?;
        if let Some(code) = send.stopped {
            return Err(WriteError::Stopped(code));
        }
        if send.finishing || send.reset.is_some() || send.released {
            return Err(WriteError::Closed);
        }
        let taken = room.saturating_sub(send.buffered).min(bytes.len());
        if taken == 0 && !bytes.is_empty() {
            send.waiting = true;
            return Err(WriteError::Blocked);
        }
        if taken > 0 {
            send.buffered += taken;
            push_piece(&mut send.pieces, bytes.split_to(taken));
            self.make_ready(id);
        }
        Ok(taken)
    }

    /// Says that nothing comes after what was written.
    ///
    /// # Errors
    /// It was finished or reset before.
    pub fn finish(&mut self, id: StreamId) -> Result<(), WriteError> {
        let send = self.send_half(id).ok_or(WriteError::Closed)?;
        if send.finishing || send.reset.is_some() && send.stopped.is_none() {
            return Err(WriteError::Closed);
        }
        send.finishing = true;
        self.make_ready(id);
        Ok(())
    }

    /// Gives a stream up: what was not sent is thrown away.
    ///
    /// # Errors
    /// It was finished or reset before.
    pub fn reset(&mut self, id: StreamId, code: u64) -> Result<(), WriteError> {
        let send = self.send_half(id).ok_or(WriteError::Closed)?;
        if send.reset.is_some() {
            return Err(WriteError::Closed);
        }
        self.give_up(id, code);
        Ok(())
    }

    fn give_up(&mut self, id: StreamId, code: u64) {
        let Some(send) = self.send_half(id) else { return };
        send.reset = Some(code.min(VARINT_MAX));
        send.pieces.clear();
        send.buffered = 0;
        self.make_unready(id);
        self.due.entry(id).or_default().reset = true;
    }

    /// Nobody writes the stream any more: it is finished unless it was ended otherwise, and forgotten when that is said.
    pub fn release_send(&mut self, id: StreamId) {
        let _ = self.finish(id);
        if let Some(send) = self.send_half(id) {
            send.released = true;
        }
        self.forget_send(id);
    }

    /// Higher ones are sent first; 0 at the beginning, as in quinn.
    ///
    /// # Errors
    /// It is not there any more.
    pub fn set_priority(&mut self, id: StreamId, priority: i32) -> Result<(), WriteError> {
        self.send_half(id).ok_or(WriteError::Closed)?;
        self.make_unready(id);
        if let Some(send) = self.send_half(id) {
            send.priority = priority;
        }
        // It may have waited for the connection's window: it finds its place again in either case.
        self.make_ready(id);
        Ok(())
    }

    /// `None`: not settled. `Some(None)`: everything was handed to the byte stream. Otherwise the peer's code.
    #[must_use]
    pub fn stopped(&self, id: StreamId) -> Option<Option<u64>> {
        match self.streams.get(&id).and_then(|stream| stream.send.as_ref()) {
            None => Some(None),
            Some(send) if send.stopped.is_some() => Some(send.stopped),
            Some(send) if send.finished || send.reset.is_some() => Some(None),
            Some(_) => None,
        }
    }

    /// Takes up to `max` bytes of a stream; `None` at its end.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read(&mut self, id: StreamId, max: usize) -> Result<Option<Bytes>, ReadError> {
        let recv = self.streams.get_mut(&id).and_then(|stream| stream.recv.as_mut());
        let recv = recv.filter(|recv| !recv.stopped).ok_or(ReadError::Closed)?;
        if let Some(code) = recv.reset {
            self.forget_recv(id);
            return Err(ReadError::Reset(code));
        }
        let piece = match recv.pieces.front_mut() {
            Some(front) if front.len() <= max => recv.pieces.pop_front(),
            Some(front) => Some(front.split_to(max)),
            None if !recv.tail.is_empty() => {
                let len = recv.tail.len().min(max);
                Some(recv.tail.split_to(len).freeze())
            }
            None => None,
        };
        match piece {
            Some(piece) => {
                recv.taken += piece.len() as u64;
                let due = !recv.fin && due(recv.taken, self.config.stream_window, recv.limit);
                if due {
                    self.due.entry(id).or_default().window = true;
                }
                self.take(piece.len() as u64);
                Ok(Some(piece))
            }
            None if recv.fin => {
                self.forget_recv(id);
                Ok(None)
            }
            None => Err(ReadError::Blocked),
        }
    }

    /// Reads a stream no more: what came is thrown away, and the peer is told to stop.
    ///
    /// # Errors
    /// Its end was read, or it was stopped before.
    pub fn stop(&mut self, id: StreamId, code: u64) -> Result<(), ReadError> {
        let recv = self.streams.get_mut(&id).and_then(|stream| stream.recv.as_mut());
        let recv = recv.filter(|recv| !recv.stopped).ok_or(ReadError::Closed)?;
        recv.stopped = true;
        let thrown_away = recv.throw_away();
        let over = recv.fin || recv.reset.is_some();
        self.take(thrown_away);
        if over {
            self.forget_recv(id);
        } else {
            self.due.entry(id).or_default().stop = Some(code.min(VARINT_MAX));
        }
        Ok(())
    }

    /// Bytes were taken out of the connection's window.
    fn take(&mut self, bytes: u64) {
        self.taken += bytes;
        if due(self.taken, self.config.window, self.may_receive) {
            self.window_due = true;
        }
    }

    fn make_ready(&mut self, id: StreamId) {
        let turn = self.turns;
        let Some(send) = self.send_half(id) else { return };
        let something = send.buffered > 0 && send.sent < send.limit || send.buffered == 0 && send.finishing;
        if send.turn.is_none() && something && send.reset.is_none() && !send.finished {
            send.turn = Some(turn);
            let priority = send.priority;
            self.turns += 1;
            self.ready.insert((Reverse(priority), turn, id));
        }
    }

    fn make_unready(&mut self, id: StreamId) {
        self.starved.remove(&id);
        let Some(send) = self.send_half(id) else { return };
        if let Some(turn) = send.turn.take() {
            let key = (Reverse(send.priority), turn, id);
            self.ready.remove(&key);
        }
    }

    /// Forgets a half that has nothing to say any more and that nobody holds or needs.
    fn forget_send(&mut self, id: StreamId) {
        let due = self.due.get(&id).is_some_and(|due| due.reset);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let over = stream.send.as_ref().is_some_and(|send| {
            // What was finished is forgotten at once; what was stopped is kept until its writer knows.
            send.finished || send.reset.is_some() && !due && (send.released || send.stopped.is_none())
        });
        if over {
            stream.send = None;
            self.make_unready(id);
            self.forget(id);
        }
    }

    fn forget_recv(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.recv = None;
        }
        if let Some(due) = self.due.get_mut(&id) {
            (due.window, due.stop) = (false, None);
        }
        self.forget(id);
    }

    fn forget(&mut self, id: StreamId) {
        let over = self.streams.get(&id).is_some_and(|stream| stream.send.is_none() && stream.recv.is_none());
        if !over {
            return;
        }
        self.streams.remove(&id);
        self.due.remove(&id);
        if id.opener() != self.side {
            let index = id.direction().index();
            if let (Some(may), Some(due)) =
                (self.peer_may_open.get_mut(index), self.streams_due.get_mut(index))
            {
                *may += 1;
                *due = true;
            }
        }
    }

    // -------------------------------------------------------------- datagrams

    /// Largest datagram that can be sent; `None`: the peer takes none.
    #[must_use]
    pub fn max_datagram_size(&self) -> Option<usize> {
        let frame = usize::try_from(self.peer.max_datagram_frame_size).unwrap_or(usize::MAX);
        frame.min(DATAGRAM_FRAME_MAX).checked_sub(DATAGRAM_OVERHEAD).filter(|size| *size > 0)
    }

    /// Queues a datagram ahead of all streams; the oldest are dropped if there is no room. `false`: it is too large.
    pub fn send_datagram(&mut self, datagram: Bytes) -> bool {
        if self.max_datagram_size().is_none_or(|max| datagram.len() > max) {
            return false;
        }
        self.datagrams_out_bytes += datagram.len();
        self.datagrams_out.push_back(datagram);
        while self.datagrams_out_bytes > self.config.datagrams_out || self.datagrams_out.len() > PIECES_MAX {
            let Some(oldest) = self.datagrams_out.pop_front() else { break };
            self.datagrams_out_bytes -= oldest.len();
            self.datagrams_dropped += 1;
        }
        true
    }

    /// The next datagram that came.
    pub fn read_datagram(&mut self) -> Option<Bytes> {
        let datagram = self.datagrams_in.pop_front()?;
        self.datagrams_in_bytes -= datagram.len();
        Some(datagram)
    }

    // ------------------------------------------------------------ connection

    /// Asks the peer for an answer, and returns the ping's number: [`Event::Pong`] with it comes back.
    pub fn ping(&mut self) -> u64 {
        self.pinged += 1;
        self.ping = Some(self.pinged);
        self.pinged
    }

    /// Ends the connection: nothing but the reason is sent from now on. The first close counts.
    pub fn close(&mut self, code: u64, reason: Bytes) {
        let close = Close { application: true, code: code.min(VARINT_MAX), reason };
        self.end(Ended::Locally(close.clone()), Some(close));
    }

    fn end(&mut self, ended: Ended, close: Option<Close>) {
        if self.ended.is_some() {
            return;
        }
        self.ended = Some(ended);
        self.close_due = close;
        self.streams.clear();
        self.ready.clear();
        self.starved.clear();
        self.due.clear();
        self.datagrams_out.clear();
        self.datagrams_out_bytes = 0;
        self.partial = BytesMut::new();
    }

    // -------------------------------------------------------------- bytes out

    /// Whether [`Self::transmit`] has something.
    #[must_use]
    pub fn wants_transmit(&self) -> bool {
        if self.ended.is_some() {
            return self.close_due.is_some();
        }
        !self.parameters_sent
            || self.pong.is_some()
            || self.ping.is_some()
            || self.window_due
            || self.streams_due.contains(&true)
            || !self.due.is_empty()
            || !self.datagrams_out.is_empty()
            || !self.ready.is_empty()
    }

    /// The next record, of at most `max` bytes (taken for 256 if it is less): what matters
    /// most now. Call it when the byte stream can take more, not before.
    pub fn transmit(&mut self, max: usize) -> Option<Bytes> {
        let room = max.clamp(256, RECORD_BYTES + 2) - 2;
        // The length is put before the frames when it is known.
        let mut out = BytesMut::new();
        out.put_u16(0);
        let limit = out.len() + room;
        if !self.parameters_sent {
            self.parameters_sent = true;
            Frame::Parameters(self.config.parameters()).encode(&mut out);
        }
        if let Some(close) = self.close_due.take() {
            // What does not fit a record is of no use to anybody.
            let reason = close.reason.slice(..close.reason.len().min(room / 2));
            Frame::Close(Close { reason, ..close }).encode(&mut out);
        } else if self.ended.is_none() {
            self.put_control(&mut out, limit);
            self.put_datagrams(&mut out, limit);
            self.put_streams(&mut out, limit);
        }
        let len = u16::try_from(out.len() - 2).ok().filter(|len| *len > 0)?;
        if len < 64 {
            out.advance(1);
            if let Some(first) = out.first_mut() {
                *first = len.to_be_bytes()[1];
            }
        } else if let Some(length) = out.first_chunk_mut::<2>() {
            *length = (len | 0x4000).to_be_bytes();
        }
        Some(out.freeze())
    }

    fn put_control(&mut self, out: &mut BytesMut, limit: usize) {
        if let Some(number) = self.pong.take() {
            Frame::Pong(number).encode(out);
        }
        if let Some(number) = self.ping.take() {
            Frame::Ping(number).encode(out);
        }
        if std::mem::take(&mut self.window_due) {
            self.may_receive = self.taken + self.config.window;
            Frame::MaxData(self.may_receive).encode(out);
        }
        for direction in [Direction::Bi, Direction::Uni] {
            let index = direction.index();
            if let (Some(due), Some(max)) = (self.streams_due.get_mut(index), self.peer_may_open.get(index))
                && std::mem::take(due)
            {
                Frame::MaxStreams { direction, max: *max }.encode(out);
            }
        }
        while out.len() + ROOM_MIN <= limit {
            let Some((id, due)) = self.due.pop_first() else { break };
            self.put_due(out, id, due);
        }
    }

    fn put_due(&mut self, out: &mut BytesMut, id: StreamId, due: Due) {
        if let Some(code) = due.stop {
            Frame::StopSending { id, code }.encode(out);
        }
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if let Some(recv) = stream.recv.as_mut()
            && due.window
            && !recv.fin
            && !recv.stopped
        {
            recv.limit = recv.taken + self.config.stream_window;
            Frame::MaxStreamData { id, max: recv.limit }.encode(out);
        }
        if let Some(send) = stream.send.as_ref()
            && due.reset
        {
            let code = send.reset.unwrap_or(0);
            Frame::ResetStream { id, code, final_size: send.sent }.encode(out);
            self.events.insert(Event::Writable(id));
            self.forget_send(id);
        }
    }

    /// Datagrams go first, but leave half of a record to the streams.
    fn put_datagrams(&mut self, out: &mut BytesMut, limit: usize) {
        let start = out.len();
        while let Some(next) = self.datagrams_out.front() {
            let with = out.len() + next.len() + DATAGRAM_OVERHEAD;
            let first = out.len() == start;
            if with > limit && !(first && out.len() <= 2 + ROOM_MIN) || !first && with > limit / 2 {
                break;
            }
            if let Some(datagram) = self.datagrams_out.pop_front() {
                self.datagrams_out_bytes -= datagram.len();
                Frame::Datagram(datagram).encode(out);
            }
        }
    }

    /// A record is taken in when it is whole, so it carries streams of one priority only, and little that could wait.
    fn put_streams(&mut self, out: &mut BytesMut, limit: usize) {
        let mut of_record = None;
        let mut limit = limit;
        while let Some(&key) = self.ready.first() {
            let (Reverse(priority), _, id) = key;
            if of_record.is_some_and(|of_record| of_record != priority) {
                break;
            }
            if priority < 0 {
                limit = limit.min(BACKGROUND_RECORD);
            }
            let Some(send) = self.streams.get_mut(&id).and_then(|stream| stream.send.as_mut()) else {
                self.ready.remove(&key);
                continue;
            };
            let room = limit.saturating_sub(out.len() + stream_header_max(id, send.sent));
            if room < ROOM_MIN && out.len() > 2 {
                break;
            }
            let allowed = (self.may_send - self.sent).min(send.limit.saturating_sub(send.sent));
            let len = send.buffered.min(room).min(usize::try_from(allowed).unwrap_or(usize::MAX));
            self.ready.remove(&key);
            send.turn = None;
            if len == 0 && send.buffered > 0 {
                // The connection's window is used up: lower priorities may only finish.
                self.starved.insert(id);
                continue;
            }
            let fin = send.finishing && len == send.buffered;
            of_record = Some(priority);
            put_stream_header(out, id, send.sent, len, fin);
            send.put_pieces(out, len);
            send.sent += len as u64;
            self.sent += len as u64;
            if std::mem::take(&mut send.waiting) || fin {
                self.events.insert(Event::Writable(id));
            }
            if fin {
                send.finished = true;
                self.forget_send(id);
            } else {
                self.make_ready(id);
            }
        }
    }

    // --------------------------------------------------------------- bytes in

    /// Takes bytes in, however they are cut. Payloads share the memory of `bytes`.
    ///
    /// # Errors
    /// The peer broke the rules: the connection has ended, and [`Self::transmit`] says so to the peer.
    pub fn receive(&mut self, mut bytes: Bytes) -> Result<(), Violation> {
        while !bytes.is_empty() && self.ended.is_none() {
            match self.next_record(&mut bytes) {
                Ok(Some(record)) => {
                    if let Err(violation) = self.take_record(record) {
                        self.violated(violation);
                        return Err(violation);
                    }
                }
                Ok(None) => {}
                Err(violation) => {
                    self.violated(violation);
                    return Err(violation);
                }
            }
        }
        Ok(())
    }

    fn violated(&mut self, violation: Violation) {
        let close = Close {
            application: false,
            code: violation.code(),
            reason: Bytes::from(violation.to_string().into_bytes()),
        };
        self.end(Ended::Violated(violation), Some(close));
    }

    /// Takes a record, or all bytes if they make none yet.
    fn next_record(&mut self, bytes: &mut Bytes) -> Result<Option<Bytes>, Violation> {
        if self.partial.is_empty() {
            let mut rest: &[u8] = bytes;
            if let Some(len) = get_varint(&mut rest) {
                let len = checked_len(len)?;
                if rest.len() >= len {
                    bytes.advance(bytes.len() - rest.len());
                    return Ok(Some(bytes.split_to(len)));
                }
            }
            self.partial.put(bytes.split_to(bytes.len()));
            return Ok(None);
        }
        loop {
            let mut rest: &[u8] = &self.partial;
            let Some(len) = get_varint(&mut rest) else {
                if bytes.is_empty() {
                    return Ok(None);
                }
                self.partial.put_u8(bytes.get_u8());
                continue;
            };
            let (header, missing) =
                (self.partial.len() - rest.len(), checked_len(len)?.saturating_sub(rest.len()));
            let taken = missing.min(bytes.len());
            self.partial.put(bytes.split_to(taken));
            if taken < missing {
                return Ok(None);
            }
            // The buffer is not kept: most records come whole.
            let mut record = std::mem::take(&mut self.partial).freeze();
            record.advance(header);
            return Ok(Some(record));
        }
    }

    fn take_record(&mut self, mut record: Bytes) -> Result<(), Violation> {
        while let Some(frame) = Frame::decode(&mut record)? {
            if self.peer_known == matches!(frame, Frame::Parameters(_)) {
                return Err(Violation::TransportParameters);
            }
            self.take_frame(frame)?;
            if self.ended.is_some() {
                break;
            }
        }
        Ok(())
    }

    fn take_frame(&mut self, frame: Frame) -> Result<(), Violation> {
        match frame {
            Frame::Parameters(parameters) => self.take_parameters(parameters),
            Frame::Stream { id, offset, fin, data } => self.take_stream(id, offset, fin, data),
            Frame::ResetStream { id, code, final_size } => self.take_reset(id, code, final_size),
            Frame::StopSending { id, code } => {
                self.sendable(id)?;
                if let Some(send) = self.send_half(id)
                    && send.stopped.is_none()
                    && !send.finished
                {
                    send.stopped = Some(code);
                    let given_up = send.reset.is_some();
                    if !given_up {
                        self.give_up(id, code);
                    }
                    self.events.insert(Event::Writable(id));
                }
                Ok(())
            }
            Frame::MaxData(max) => {
                if max > self.may_send {
                    self.may_send = max;
                    for id in std::mem::take(&mut self.starved) {
                        self.make_ready(id);
                    }
                }
                Ok(())
            }
            Frame::MaxStreamData { id, max } => {
                self.sendable(id)?;
                if let Some(send) = self.send_half(id)
                    && max > send.limit
                {
                    send.limit = max;
                    if !self.starved.contains(&id) {
                        self.make_ready(id);
                    }
                }
                Ok(())
            }
            Frame::MaxStreams { direction, max } => {
                if let Some(may) = self.may_open.get_mut(direction.index())
                    && max > *may
                {
                    *may = max;
                    self.events.insert(Event::Available(direction));
                }
                Ok(())
            }
            Frame::Blocked(Some(id)) => self.receivable(id),
            Frame::Blocked(None) => Ok(()),
            Frame::Close(close) => {
                self.end(Ended::Remotely(close), None);
                Ok(())
            }
            Frame::Datagram(data) => self.take_datagram(data),
            Frame::Ping(number) => {
                self.pong = self.pong.max(Some(number));
                Ok(())
            }
            Frame::Pong(number) => {
                if number == 0 || number > self.pinged {
                    return Err(Violation::Protocol);
                }
                // Only the newest answer counts, so a peer can't make this grow.
                self.events.retain(|event| !matches!(event, Event::Pong(_)));
                self.events.insert(Event::Pong(number));
                Ok(())
            }
        }
    }

    fn take_parameters(&mut self, parameters: Parameters) -> Result<(), Violation> {
        let assumed = self.config.assumed.unwrap_or_default();
        let less = parameters.max_data < assumed.max_data
            || parameters.max_stream_data_bidi_local < assumed.max_stream_data_bidi_local
            || parameters.max_stream_data_bidi_remote < assumed.max_stream_data_bidi_remote
            || parameters.max_stream_data_uni < assumed.max_stream_data_uni
            || parameters.max_streams_bidi < assumed.max_streams_bidi
            || parameters.max_streams_uni < assumed.max_streams_uni
            || parameters.max_datagram_frame_size < assumed.max_datagram_frame_size;
        if less {
            return Err(Violation::TransportParameters);
        }
        self.peer_known = true;
        self.peer = parameters;
        self.may_send = parameters.max_data;
        self.may_open = [parameters.max_streams_bidi, parameters.max_streams_uni];
        self.events.extend([Event::Available(Direction::Bi), Event::Available(Direction::Uni)]);
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            let limit = self.new_stream(id).send.map_or(0, |send| send.limit);
            if let Some(send) = self.send_half(id) {
                send.limit = send.limit.max(limit);
            }
            self.starved.remove(&id);
            self.make_ready(id);
        }
        Ok(())
    }

    /// The peer may speak of a stream this side sends on: it was opened by it, or it opens it now.
    fn sendable(&mut self, id: StreamId) -> Result<(), Violation> {
        let ours = id.opener() == self.side;
        if !ours && id.direction() == Direction::Uni {
            return Err(Violation::StreamState);
        }
        self.known(id)
    }

    fn receivable(&mut self, id: StreamId) -> Result<(), Violation> {
        let ours = id.opener() == self.side;
        if ours && id.direction() == Direction::Uni {
            return Err(Violation::StreamState);
        }
        self.known(id)
    }

    /// A stream of ours must have been opened; one of the peer's is opened by being named, with all before it.
    fn known(&mut self, id: StreamId) -> Result<(), Violation> {
        let index = id.direction().index();
        if id.opener() == self.side {
            let opened = self.opened.get(index).copied().unwrap_or(0);
            return if id.number() < opened { Ok(()) } else { Err(Violation::StreamState) };
        }
        if id.number() >= self.peer_may_open.get(index).copied().unwrap_or(0) {
            return Err(Violation::StreamLimit);
        }
        let opened = self.peer_opened.get(index).copied().unwrap_or(0);
        if id.number() >= opened {
            for number in opened..=id.number() {
                let id = StreamId::new(id.opener(), id.direction(), number);
                let stream = self.new_stream(id);
                self.streams.insert(id, stream);
            }
            if let Some(opened) = self.peer_opened.get_mut(index) {
                *opened = id.number() + 1;
            }
            self.events.insert(Event::Opened(id.direction()));
        }
        Ok(())
    }

    fn take_stream(&mut self, id: StreamId, offset: u64, fin: bool, data: Bytes) -> Result<(), Violation> {
        self.receivable(id)?;
        // A stream that is not there any more had ended.
        let recv = self.streams.get_mut(&id).and_then(|stream| stream.recv.as_mut());
        let recv = recv.ok_or(Violation::StreamState)?;
        if recv.fin || recv.reset.is_some() {
            return Err(Violation::FinalSize);
        }
        if offset != recv.received {
            return Err(Violation::Protocol);
        }
        let len = data.len() as u64;
        if recv.received + len > recv.limit || self.received + len > self.may_receive {
            return Err(Violation::FlowControl);
        }
        recv.received += len;
        recv.fin = fin;
        self.received += len;
        if recv.stopped {
            recv.taken += len;
            self.take(len);
            if fin {
                self.forget_recv(id);
            }
        } else if len > 0 || fin {
            recv.push(data);
            self.events.insert(Event::Readable(id));
        }
        Ok(())
    }

    fn take_reset(&mut self, id: StreamId, code: u64, final_size: u64) -> Result<(), Violation> {
        self.receivable(id)?;
        let recv = self.streams.get_mut(&id).and_then(|stream| stream.recv.as_mut());
        let recv = recv.ok_or(Violation::StreamState)?;
        if recv.reset.is_some() || final_size < recv.received || recv.fin && final_size != recv.received {
            return Err(Violation::FinalSize);
        }
        let more = final_size - recv.received;
        if final_size > recv.limit || self.received + more > self.may_receive {
            return Err(Violation::FlowControl);
        }
        recv.received = final_size;
        recv.reset = Some(code);
        let (stopped, thrown_away) = (recv.stopped, recv.throw_away());
        self.received += more;
        self.take(thrown_away);
        if stopped {
            self.forget_recv(id);
        } else {
            self.events.insert(Event::Readable(id));
        }
        Ok(())
    }

    fn take_datagram(&mut self, data: Bytes) -> Result<(), Violation> {
        if self.config.datagram_size == 0 || data.len() > self.config.datagram_size {
            return Err(Violation::Protocol);
        }
        self.datagrams_in_bytes += data.len();
        self.datagrams_in.push_back(data);
        while self.datagrams_in_bytes > self.config.datagrams_in || self.datagrams_in.len() > PIECES_MAX {
            let Some(oldest) = self.datagrams_in.pop_front() else { break };
            self.datagrams_in_bytes -= oldest.len();
            self.datagrams_dropped += 1;
        }
        self.events.insert(Event::Datagram);
        Ok(())
    }
}

/// Whether it is time to widen a window: a quarter of it was used up.
const fn due(taken: u64, window: u64, limit: u64) -> bool {
    taken + window - limit >= window / 4
}

/// Bytes of a record. One without frames says nothing, and would cost less to send than to take in.
fn checked_len(len: u64) -> Result<usize, Violation> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len == 0 || len > RECORD_BYTES { Err(Violation::FrameEncoding) } else { Ok(len) }
}

fn push_piece(pieces: &mut VecDeque<Bytes>, piece: Bytes) {
    if pieces.len() >= PIECES_MAX
        && let Some(last) = pieces.back_mut()
        && last.len() < 1_024
    {
        let mut together = BytesMut::with_capacity(2 * (last.len() + piece.len()));
        together.put_slice(last);
        together.put(piece);
        *last = together.freeze();
    } else {
        pieces.push_back(piece);
    }
}

impl SendHalf {
    fn put_pieces(&mut self, out: &mut BytesMut, mut len: usize) {
        self.buffered -= len;
        while len > 0 {
            let Some(front) = self.pieces.front_mut() else { break };
            let piece = front.split_to(len.min(front.len()));
            if front.is_empty() {
                self.pieces.pop_front();
            }
            len -= piece.len();
            out.put(piece);
        }
    }
}

impl RecvHalf {
    fn push(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        // Beyond so many pieces they are copied together, or a peer that sends single bytes would cost their list.
        if self.pieces.len() >= PIECES_MAX || !self.tail.is_empty() {
            self.tail.put(data);
        } else {
            self.pieces.push_back(data);
        }
    }

    /// Empties it, and says how many bytes that gives back.
    fn throw_away(&mut self) -> u64 {
        self.pieces.clear();
        self.tail = BytesMut::new();
        std::mem::replace(&mut self.taken, self.received).abs_diff(self.received)
    }
}

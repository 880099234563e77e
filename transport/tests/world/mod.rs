//! Two halves of a connection, or one half and a peer that does anything, led by a string of bytes. Property tests and the
//! fuzz target share it: what one finds, the other replays. A broken promise panics.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Buf, Bytes, BytesMut};
use fulmar_transport::qmux::{
    Close, Config, Direction, Ended, Frame, Mux, Parameters, RECORD_BYTES, ReadError, Side, StreamId,
    Violation, WriteError, get_varint, put_varint,
};

/// Choices, read from bytes; zeros when they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn below(&mut self, bound: usize) -> usize {
        let number = usize::from(self.byte()) << 8 | usize::from(self.byte());
        number % bound.max(1)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Small bounds, so that they are met.
fn config(choices: &mut Choices<'_>) -> Config {
    Config {
        streams_bidi: 1 + choices.below(3) as u64,
        streams_uni: 1 + choices.below(4) as u64,
        stream_window: 64 + choices.below(5_000) as u64,
        window: 64 + choices.below(9_000) as u64,
        send_buffer: 1 + choices.below(20_000),
        datagrams_in: 2_000,
        datagrams_out: 2_000,
        datagram_size: 600,
        idle_timeout_ms: 1_000 * choices.below(3) as u64,
        assumed: None,
    }
}

/// What a stream carries at a place.
fn byte_at(id: StreamId, offset: u64) -> u8 {
    (id.get().wrapping_mul(31).wrapping_add(offset).wrapping_mul(0x9e37_79b9) >> 16).to_le_bytes()[0]
}

#[derive(Debug, Default)]
struct Sent {
    written: u64,
    finished: bool,
    reset: bool,
}

#[derive(Debug, Default)]
struct Read {
    taken: u64,
    over: bool,
    stopped: bool,
}

/// One half, the application on it, and the bytes on their way from it.
struct End {
    mux: Mux,
    config: Config,
    wire: VecDeque<u8>,
    sending: BTreeMap<StreamId, Sent>,
    reading: BTreeMap<StreamId, Read>,
    datagrams: u64,
}

impl End {
    fn new(side: Side, config: Config) -> Self {
        let mux = Mux::new(side, config);
        let (sending, reading) = (BTreeMap::new(), BTreeMap::new());
        Self { mux, config, wire: VecDeque::new(), sending, reading, datagrams: 0 }
    }

    fn add(&mut self, id: StreamId, send: bool, recv: bool) {
        if send {
            self.sending.insert(id, Sent::default());
        }
        if recv {
            self.reading.insert(id, Read::default());
        }
    }

    fn accept(&mut self) {
        for direction in [Direction::Bi, Direction::Uni] {
            while let Ok(id) = self.mux.accept(direction) {
                self.add(id, direction == Direction::Bi, true);
            }
        }
    }

    fn open(&mut self, direction: Direction) {
        if let Ok(id) = self.mux.open(direction) {
            self.add(id, true, direction == Direction::Bi);
        }
    }

    fn write(&mut self, id: StreamId, len: usize) {
        let Some(sent) = self.sending.get_mut(&id) else { return };
        let bytes: Vec<u8> = (0..len as u64).map(|n| byte_at(id, sent.written + n)).collect();
        let mut bytes = Bytes::from(bytes);
        match self.mux.write(id, &mut bytes) {
            Ok(written) => {
                assert!(!sent.finished && !sent.reset);
                assert_eq!(written + bytes.len(), len);
                sent.written += written as u64;
            }
            Err(WriteError::Blocked) => assert!(self.mux.buffered() > 0, "somebody is in the way"),
            Err(WriteError::Stopped(_)) => sent.reset = true,
            Err(WriteError::Closed) => assert!(sent.finished || sent.reset),
        }
    }

    fn read(&mut self, id: StreamId, max: usize) -> bool {
        let Some(read) = self.reading.get_mut(&id) else { return false };
        match self.mux.read(id, max) {
            Ok(Some(bytes)) => {
                assert!(!read.over && !read.stopped && !bytes.is_empty() && bytes.len() <= max);
                for (n, byte) in bytes.iter().enumerate() {
                    assert_eq!(*byte, byte_at(id, read.taken + n as u64), "every byte once and in order");
                }
                read.taken += bytes.len() as u64;
                true
            }
            Ok(None) => {
                assert!(!std::mem::replace(&mut read.over, true), "one end");
                true
            }
            Err(ReadError::Blocked) => false,
            Err(ReadError::Reset(_)) => {
                (read.over, read.stopped) = (true, true);
                true
            }
            Err(ReadError::Closed) => {
                assert!(read.over || read.stopped);
                false
            }
        }
    }

    fn transmit(&mut self, max: usize) -> bool {
        let Some(record) = self.mux.transmit(max) else {
            // Nothing is left undone in silence: what can be said is said now.
            assert!(!self.mux.wants_transmit());
            return false;
        };
        assert!(record.len() <= RECORD_BYTES + 2, "{}", record.len());
        self.wire.extend(record);
        true
    }

    fn check(&mut self) {
        while self.mux.poll_event().is_some() {}
        let streams = self.config.streams_bidi + self.config.streams_uni + self.sending.len() as u64;
        let bound = self.config.window
            + streams * self.config.send_buffer as u64
            + 2_000
            + 2_000
            + RECORD_BYTES as u64
            + 8;
        assert!(self.mux.buffered() as u64 <= bound, "{} > {bound}", self.mux.buffered());
    }
}

/// Delivers up to `len` bytes that `from` sent.
fn deliver(from: &mut End, to: &mut End, len: usize) -> bool {
    let len = len.min(from.wire.len());
    let bytes: Vec<u8> = from.wire.drain(..len).collect();
    to.mux.receive(Bytes::from(bytes)).expect("a half breaks no rule");
    len > 0
}

/// Everything that is written comes out once and in order, whatever the bounds and however the bytes are cut; whoever waits
/// is told; nothing grows beyond its bound.
pub(crate) fn pair(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let mut ends =
        [End::new(Side::Client, config(&mut choices)), End::new(Side::Server, config(&mut choices))];
    let mut steps = 0;
    while !choices.is_empty() && steps < 500 {
        steps += 1;
        let which = choices.below(2);
        let op = choices.below(16);
        let pick = choices.below(8);
        let size = choices.below(3_000);
        let [client, server] = &mut ends;
        let (this, other) = if which == 0 { (client, server) } else { (server, client) };
        let sending = this.sending.keys().copied().nth(pick % this.sending.len().max(1));
        let reading = this.reading.keys().copied().nth(pick % this.reading.len().max(1));
        match (op, sending, reading) {
            (0, ..) => this.open(if pick % 2 == 0 { Direction::Bi } else { Direction::Uni }),
            (1..=3, Some(id), _) => this.write(id, size),
            (4, Some(id), _) => {
                if this.mux.finish(id).is_ok()
                    && let Some(sent) = this.sending.get_mut(&id)
                {
                    sent.finished = true;
                }
            }
            (5, Some(id), _) if pick == 0 => {
                if this.mux.reset(id, size as u64).is_ok()
                    && let Some(sent) = this.sending.get_mut(&id)
                {
                    sent.reset = true;
                }
            }
            (6, Some(id), _) => drop(this.mux.set_priority(id, i32::try_from(pick).unwrap() - 3)),
            (7, _, Some(id)) if pick == 0 => {
                if this.mux.stop(id, 7).is_ok()
                    && let Some(read) = this.reading.get_mut(&id)
                {
                    read.stopped = true;
                }
            }
            (7 | 8, _, Some(id)) => drop(this.read(id, 1 + size)),
            (9, ..) => {
                this.datagrams += u64::from(this.mux.send_datagram(Bytes::from(vec![7; size % 700])));
            }
            (10, ..) => drop(this.mux.ping()),
            (11, ..) => this.accept(),
            (12 | 13, ..) => drop(this.transmit(size)),
            _ => drop(deliver(this, other, size)),
        }
        ends.iter_mut().for_each(End::check);
    }
    settle(&mut ends);
}

/// From here on both applications only read: everything that was written must arrive.
fn settle(ends: &mut [End; 2]) {
    for end in ends.iter_mut() {
        let unfinished: Vec<StreamId> =
            end.sending.iter().filter(|(_, sent)| !sent.finished && !sent.reset).map(|(id, _)| *id).collect();
        for id in unfinished {
            if end.mux.finish(id).is_ok()
                && let Some(sent) = end.sending.get_mut(&id)
            {
                sent.finished = true;
            }
        }
    }
    for round in 0.. {
        assert!(round < 100_000, "it does not come to rest");
        let [client, server] = &mut *ends;
        let mut moved = false;
        moved |= client.transmit(4_000) | deliver(client, server, usize::MAX);
        moved |= server.transmit(4_000) | deliver(server, client, usize::MAX);
        for end in ends.iter_mut() {
            end.accept();
            let ids: Vec<StreamId> = end.reading.keys().copied().collect();
            for id in ids {
                while end.read(id, 1_000) {
                    moved = true;
                }
            }
            while end.mux.read_datagram().is_some() {}
            end.check();
        }
        if !moved {
            break;
        }
    }
    let [client, server] = &*ends;
    for (this, other) in [(client, server), (server, client)] {
        for (id, sent) in this.sending.iter().filter(|(_, sent)| sent.finished && !sent.reset) {
            let read = other.reading.get(id);
            let read = read.unwrap_or_else(|| panic!("{id:?} never came: {sent:?}"));
            let whole = read.taken == sent.written && read.over;
            assert!(whole || read.stopped, "{id:?}: {sent:?} became {read:?}");
        }
        assert_eq!(this.mux.ended(), None);
    }
}

/// A peer that sends anything: frames that `bytes` choose, in records, or the bytes themselves. No panic, bounded memory, and
/// a violation ends the connection with its code.
pub(crate) fn hostile(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let config = config(&mut choices);
    let mut end = End::new(if choices.byte() % 2 == 0 { Side::Server } else { Side::Client }, config);
    let raw = choices.byte() % 4;
    if raw < 3 {
        end.feed(&[Frame::Parameters(parameters(&mut choices))]);
    }
    let mut steps = 0;
    while !choices.is_empty() && end.mux.ended().is_none() && steps < 1_000 {
        steps += 1;
        match choices.byte() % 8 {
            0 => end.open(if choices.byte() % 2 == 0 { Direction::Bi } else { Direction::Uni }),
            1 => {
                let pick = choices.below(8);
                if let Some(id) = end.sending.keys().copied().nth(pick) {
                    end.write(id, choices.below(3_000));
                }
            }
            2 => drop(end.transmit(choices.below(5_000))),
            3 => {
                end.accept();
                let pick = choices.below(8);
                let id = end.reading.keys().copied().nth(pick);
                // Their bytes are not ours to judge.
                id.map(|id| end.mux.read(id, 1 + choices.below(500)).ok());
            }
            4 if raw == 0 => {
                let len = choices.below(40).min(choices.0.len());
                let (now, later) = choices.0.split_at(len);
                choices.0 = later;
                let _ = end.mux.receive(Bytes::copy_from_slice(now));
            }
            _ => {
                let count = 1 + choices.below(3);
                let frames: Vec<Frame> = (0..count).map(|_| frame(&mut choices)).collect();
                end.feed(&frames);
            }
        }
        while end.mux.poll_event().is_some() {}
        end.check();
    }
    if raw == 3 {
        // The bytes as they are.
        for piece in bytes.chunks(1 + usize::from(bytes.first().copied().unwrap_or(0))) {
            let _ = end.mux.receive(Bytes::copy_from_slice(piece));
            end.check();
        }
    }
    let violated = match end.mux.ended() {
        Some(Ended::Violated(violation)) => Some(*violation),
        _ => None,
    };
    if let Some(violation) = violated {
        says_goodbye(&mut end.mux, violation);
    }
}

impl End {
    fn feed(&mut self, frames: &[Frame]) {
        let mut body = BytesMut::new();
        frames.iter().for_each(|frame| frame.encode(&mut body));
        let mut record = BytesMut::new();
        put_varint(&mut record, body.len() as u64);
        record.extend_from_slice(&body);
        let before = self.mux.ended().is_some();
        if let Err(violation) = self.mux.receive(record.freeze()) {
            assert!(!before);
            assert_eq!(self.mux.ended(), Some(&Ended::Violated(violation)));
        }
    }
}

/// The last record of a connection says why it ends, and nothing follows.
fn says_goodbye(mux: &mut Mux, violation: Violation) {
    let mut record = mux.transmit(usize::MAX).expect("the peer is told");
    let len = get_varint(&mut record).expect("a length");
    assert_eq!(len, record.remaining() as u64);
    let mut last = None;
    while let Some(frame) = Frame::decode(&mut record).expect("own frames can be read") {
        last = Some(frame);
    }
    assert!(
        matches!(&last, Some(Frame::Close(Close { application: false, code, .. })) if *code == violation.code()),
        "{last:?}"
    );
    assert!(!mux.wants_transmit() && mux.transmit(usize::MAX).is_none());
}

fn parameters(choices: &mut Choices<'_>) -> Parameters {
    let mut number = || choices.below(20_000) as u64;
    Parameters {
        max_idle_timeout: number(),
        max_data: number(),
        max_stream_data_bidi_local: number(),
        max_stream_data_bidi_remote: number(),
        max_stream_data_uni: number(),
        max_streams_bidi: number() % 8,
        max_streams_uni: number() % 8,
        max_datagram_frame_size: number(),
        max_record_size: RECORD_BYTES as u64 + number(),
    }
}

/// A stream id such as a decoder makes it.
fn stream_id(number: u64) -> StreamId {
    let mut bytes = BytesMut::new();
    put_varint(&mut bytes, 0x05);
    put_varint(&mut bytes, number);
    put_varint(&mut bytes, 0);
    match Frame::decode(&mut bytes.freeze()) {
        Ok(Some(Frame::StopSending { id, .. })) => id,
        other => panic!("{other:?}"),
    }
}

fn frame(choices: &mut Choices<'_>) -> Frame {
    let id = stream_id(choices.below(24) as u64);
    let number = choices.below(12_000) as u64;
    match choices.byte() % 16 {
        0 => Frame::ResetStream { id, code: 1, final_size: number },
        1 => Frame::StopSending { id, code: number },
        2..=6 => {
            let data = Bytes::from(vec![1; choices.below(2_000)]);
            // Mostly where it belongs: at the beginning.
            let offset = if choices.byte().is_multiple_of(4) { number } else { 0 };
            Frame::Stream { id, offset, fin: choices.byte().is_multiple_of(4), data }
        }
        7 => Frame::MaxData(number * 10),
        8 => Frame::MaxStreamData { id, max: number },
        9 => Frame::MaxStreams { direction: id.direction(), max: number },
        10 => Frame::Blocked(Some(id)),
        11 => Frame::Datagram(Bytes::from(vec![2; choices.below(700)])),
        12 => Frame::Ping(number),
        13 => Frame::Pong(number % 3),
        14 if choices.byte().is_multiple_of(8) => {
            Frame::Close(Close { application: true, code: number, reason: Bytes::new() })
        }
        _ => Frame::Stream { id, offset: 0, fin: false, data: Bytes::from_static(b"x") },
    }
}

/// What the fuzz target runs.
pub(crate) fn qmux(bytes: &[u8]) {
    match bytes.split_first() {
        Some((first, rest)) if first % 2 == 0 => pair(rest),
        Some((_, rest)) => hostile(rest),
        None => {}
    }
}

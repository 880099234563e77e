//! The codec: time and allocations per SEND and DELIVER, beside a hand-written floor in the same process.
//!
//! The floor writes and reads the same bytes for exactly this one shape of frame (short forms known in advance, no
//! limits, no optional fields, no typed numbers): what is beyond it is the price of being a protocol.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use fulmar_benches::{
    command::Flags,
    meter::{Samples, thread_cpu},
    payload::Payloads,
    report::Report,
};
use fulmar_protocol::{
    frame::{Channel, Decoder, Deliver, Frame, RecordKind, Send, WireTime},
    id::{ConversationId, Pseq, Seq, UserId},
};

/// Counts what is taken from the system.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[expect(unsafe_code, reason = "the trait is unsafe; every call is passed on as it is")]
// SAFETY: the system's allocator keeps the contract, counting does not touch the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(memory, layout, bytes) }
    }
}

/// Frames in one buffer: about what a busy connection reads at once.
const FRAMES: usize = 64;

fn main() -> anyhow::Result<()> {
    let flags = Flags::read();
    let rounds = flags.pick(41, 7);
    let repeats = flags.pick(4_000, 1_000);
    let mut report = Report::new("codec", flags.quick);

    let mut payloads = Payloads::new(flags.seed);
    let hundred: Vec<Bytes> = (0..FRAMES).map(|_| payloads.body(100)).collect();
    let mixed: Vec<Bytes> = (0..FRAMES).map(|_| payloads.message()).collect();
    for (name, shape, bodies, channel) in [
        ("SEND 100 B", Shape::Send, &hundred, Channel::Uplink),
        ("DELIVER 100 B", Shape::Deliver, &hundred, Channel::Lane(0)),
        ("SEND as people write", Shape::Send, &mixed, Channel::Uplink),
        ("DELIVER as people write", Shape::Deliver, &mixed, Channel::Lane(0)),
    ] {
        let frames = bodies.iter().enumerate().map(|(n, body)| shape.frame(n, body));
        let frames = frames.collect::<Option<Vec<_>>>().context("numbers")?;
        measure(&mut report, name, shape, &frames, channel, rounds, repeats)?;
    }
    report.note(format!(
        "thread CPU time, median of {rounds} rounds, floor and codec in turns; {FRAMES} frames in one buffer, decoded \
         with payloads shared out of it"
    ));
    report.note("allocations are counted over a whole round; the buffers themselves are made before it");
    report.finish(flags.json.as_deref())?;
    Ok(())
}

#[derive(Clone, Copy)]
enum Shape {
    Send,
    Deliver,
}

impl Shape {
    /// Numbers as wide as ordinary ones are.
    fn frame(self, n: usize, payload: &Bytes) -> Option<Frame> {
        let n = n as u64;
        let (kind, payload) = (RecordKind::Message, payload.clone());
        let conversation = ConversationId::new(1_000_000 + n)?;
        let seq = Seq::new(10_000 + n)?;
        Some(match self {
            Self::Send => Frame::Send(Send {
                kind,
                conversation,
                pseq: Pseq::new(5_000 + n)?,
                seen: seq,
                reference: None,
                ttl: None,
                more: false,
                continues: false,
                silent: false,
                cancel: false,
                payload,
            }),
            Self::Deliver => Frame::Deliver(Deliver {
                kind,
                conversation,
                seq,
                sender: UserId::new(2_000_000 + n)?,
                time: WireTime::Short(500_000_000),
                origin: None,
                reference: None,
                ttl: None,
                more: false,
                continues: false,
                silent: false,
                payload,
            }),
        })
    }
}

/// What the floor reads: plain numbers and the payload.
struct Plain {
    numbers: [u64; 4],
    payload: Bytes,
}

mod floor {
    use super::{Buf, BufMut, Bytes, BytesMut, Plain, Shape};

    #[expect(clippy::cast_possible_truncation, reason = "each arm holds only values that fit")]
    fn put(out: &mut BytesMut, value: u64) {
        match value {
            0..=0x3f => out.put_u8(value as u8),
            0x40..=0x3fff => out.put_u16(0x4000 | value as u16),
            0x4000..=0x3fff_ffff => out.put_u32(0x8000_0000 | value as u32),
            _ => out.put_u64(0xc000_0000_0000_0000 | value),
        }
    }

    const fn len(value: u64) -> usize {
        match value {
            0..=0x3f => 1,
            0x40..=0x3fff => 2,
            0x4000..=0x3fff_ffff => 4,
            _ => 8,
        }
    }

    pub(super) fn encode(frame: &Plain, shape: Shape, out: &mut BytesMut) {
        let [a, b, c, d] = frame.numbers;
        let (number, count) = match shape {
            Shape::Send => (0x0e, 3),
            Shape::Deliver => (0x14, 4),
        };
        let last = if count == 4 { len(d) } else { 0 };
        let inner = 2 + len(a) + len(b) + len(c) + last + frame.payload.len();
        out.reserve(inner + 8);
        put(out, inner as u64);
        out.put_u8(number);
        out.put_u8(0);
        put(out, a);
        put(out, b);
        put(out, c);
        if count == 4 {
            put(out, d);
        }
        out.put_slice(&frame.payload);
    }

    fn get(input: &mut Bytes) -> Option<u64> {
        let first = u64::from(*input.first()?);
        let len = 1 << (first >> 6);
        let value = match (len, input.get(..len)?) {
            (2, [a, b]) => u64::from(u16::from_be_bytes([*a, *b])) & 0x3fff,
            (4, [a, b, c, d]) => u64::from(u32::from_be_bytes([*a, *b, *c, *d])) & 0x3fff_ffff,
            (8, [a, b, c, d, e, f, g, h]) => {
                u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]) & 0x3fff_ffff_ffff_ffff
            }
            _ => first,
        };
        input.advance(len);
        Some(value)
    }

    pub(super) fn decode(input: &mut Bytes, shape: Shape) -> Option<Plain> {
        let inner = usize::try_from(get(input)?).ok()?;
        let mut frame = (inner <= input.len()).then(|| input.split_to(inner))?;
        if frame.len() < 2 {
            return None;
        }
        frame.advance(2);
        let (a, b, c) = (get(&mut frame)?, get(&mut frame)?, get(&mut frame)?);
        let d = match shape {
            Shape::Send => 0,
            Shape::Deliver => get(&mut frame)?,
        };
        Some(Plain { numbers: [a, b, c, d], payload: frame })
    }
}

/// A round's result: CPU and allocations per frame.
#[derive(Default)]
struct Cost {
    ns: Samples,
    allocations: f64,
}

impl Cost {
    fn of(&mut self, repeats: u64, mut work: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let frames = repeats as f64 * FRAMES as f64;
        let before = (thread_cpu(), ALLOCATIONS.load(Ordering::Relaxed));
        for _ in 0..repeats {
            work()?;
        }
        let spent: Duration = thread_cpu() - before.0;
        self.ns.add(spent.as_secs_f64() * 1e9 / frames);
        self.allocations = (ALLOCATIONS.load(Ordering::Relaxed) - before.1) as f64 / frames;
        Ok(())
    }
}

fn measure(
    report: &mut Report,
    name: &str,
    shape: Shape,
    frames: &[Frame],
    channel: Channel,
    rounds: u64,
    repeats: u64,
) -> anyhow::Result<()> {
    let mut out = BytesMut::with_capacity(256 * 1024);
    let mut wire = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut wire));
    let wire = wire.freeze();
    let mut read = wire.clone();
    let mut plain = Vec::new();
    while !read.is_empty() {
        plain.push(floor::decode(&mut read, shape).context("the floor can't read the frames")?);
    }
    let mut same = BytesMut::new();
    plain.iter().for_each(|frame| floor::encode(frame, shape, &mut same));
    anyhow::ensure!(plain.len() == frames.len() && same == wire, "the floor writes other bytes");

    let [mut encode, mut decode, mut floor_encode, mut floor_decode] = [(); 4].map(|()| Cost::default());
    for _ in 0..rounds {
        floor_encode.of(repeats, || {
            out.clear();
            plain.iter().for_each(|frame| floor::encode(frame, shape, &mut out));
            black_box(&out);
            Ok(())
        })?;
        encode.of(repeats, || {
            out.clear();
            frames.iter().for_each(|frame| frame.encode(&mut out));
            black_box(&out);
            Ok(())
        })?;
        floor_decode.of(repeats, || {
            let mut input = black_box(&wire).clone();
            while !input.is_empty() {
                black_box(floor::decode(&mut input, shape).context("floor")?);
            }
            Ok(())
        })?;
        decode.of(repeats, || {
            let mut decoder = Decoder::new(channel.frame_limit());
            decoder.push(black_box(&wire).clone());
            while let Some(frame) = decoder.next()? {
                black_box(frame);
            }
            Ok(())
        })?;
    }
    let (e, d) = (encode.ns.median(), decode.ns.median());
    let (fe, fd) = (floor_encode.ns.median(), floor_decode.ns.median());
    report.beside(format!("{name}: encode"), "ns", e, ("by hand", fe));
    report.beside(format!("{name}: decode"), "ns", d, ("by hand", fd));
    report.beside(format!("{name}: both"), "ns", e + d, ("by hand", fe + fd));
    if name.ends_with("100 B") {
        report.bar("≤ 60 ns", e + d <= 60.0);
    }
    let allocations = encode.allocations + decode.allocations;
    report.record(format!("{name}: allocations"), "per frame", allocations);
    report.bar("0", allocations == 0.0);
    Ok(())
}

//! Each half alone, against a peer and an application that do anything at all.

use std::collections::BTreeMap;

use core::time::Duration;

use bytes::Bytes;
use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{
        AuthProof, Channel, Error, Frame, Goaway, Kicked, NetworkHint, OpenTarget, RecordKind, Send,
        SendRefused,
    },
    id::{ConversationId, DeviceClass, DeviceUid, Epoch, Pseq, RequestId, Seq, ServiceId, UnixMillis},
    limit::{FIRST_FLIGHT_FRAMES_MAX, OUTBOX_SENDS_MAX},
    session::{
        client::{self, Client, ClientConfig, Restored},
        gateway::{self, Gateway, GatewayConfig},
        state::{ClientState, GatewayState},
    },
};

use crate::world::{frames, source::Source};

/// The first byte chooses the half, the others what happens to it. No panic, no output that breaks the half's own
/// promises, no state that grows without bound.
pub fn session_ops(bytes: &[u8]) {
    let mut s = Source::new(bytes);
    if s.flag() { ClientRun::new(&mut s).run(&mut s) } else { GatewayRun::new().run(&mut s) }
}

/// A conversation out of few, so that things meet.
fn conversation(s: &mut Source<'_>) -> ConversationId {
    ConversationId::new(256 * (1 + s.below(3) as u64)).unwrap()
}

/// Any frame, now and then about the conversations and numbers the others use.
fn any_frame(s: &mut Source<'_>) -> Frame {
    let mut frame = frames::frame(s);
    if s.flag() {
        let near = |s: &mut Source<'_>| Seq::new(1 + s.below(12) as u64).unwrap();
        let c = conversation(s);
        match &mut frame {
            Frame::Deliver(deliver) => {
                deliver.conversation = c;
                deliver.seq = near(s);
            }
            Frame::Block(block) => {
                block.conversation = c;
                block.first = near(s);
                block.low = Seq::new(s.below(8) as u64).unwrap();
                block.head = near(s);
                block.pull = RequestId::new(s.below(6) as u64).unwrap();
                for (at, record) in block.records.iter_mut().enumerate() {
                    record.conversation = c;
                    record.seq = block.first.saturating_add(at as u64);
                }
            }
            Frame::Heads(heads) => heads.entries.iter_mut().for_each(|head| {
                head.conversation = c;
                head.head = near(s);
            }),
            Frame::SendAck(ack) => {
                ack.conversation = c;
                ack.up_to = Pseq::new(ack.up_to.get() % 20).unwrap();
                let covered: u64 = ack.runs.iter().map(|run| u64::from(run.count)).sum();
                if covered > ack.up_to.get() {
                    ack.runs.clear();
                }
            }
            Frame::SendRefused(refused) => {
                refused.conversation = c;
                refused.pseq = Pseq::new(1 + s.below(12) as u64).unwrap();
            }
            Frame::Send(send) => {
                send.conversation = c;
                send.pseq = Pseq::new(1 + s.below(12) as u64).unwrap();
            }
            Frame::Opened(opened) => opened.id = RequestId::new(s.below(8) as u64).unwrap(),
            Frame::Reply(reply) => reply.id = RequestId::new(s.below(8) as u64).unwrap(),
            Frame::Error(error) => error.refers = RequestId::new(s.below(8) as u64).unwrap(),
            Frame::Pong(pong) => pong.id = s.below(8) as u64,
            Frame::Welcome(welcome) => welcome.epoch = Epoch::new(s.below(3) as u64).unwrap(),
            _ => {}
        }
    }
    frame
}

/// Where a frame comes from: mostly where it may.
fn place(frame: &Frame, side: fulmar_protocol::frame::Side, s: &mut Source<'_>) -> Channel {
    if s.below(16) > 0 {
        let places: Vec<_> = frames::allowed(frame).into_iter().filter(|place| place.0 == side).collect();
        if let Some((_, channel)) = places.get(s.below(places.len())) {
            return *channel;
        }
    }
    frames::everywhere().nth(s.below(10)).unwrap().1
}

struct ClientRun {
    half: Client,
    now: Duration,
    /// Per conversation, the last seq handed out.
    delivered: BTreeMap<ConversationId, Seq>,
    /// Per conversation, the last pseq used; starts again under a new epoch.
    pseqs: BTreeMap<ConversationId, u64>,
    calls: usize,
    connected: bool,
}

impl ClientRun {
    fn new(s: &mut Source<'_>) -> Self {
        let mut config = ClientConfig::new(DeviceUid([7; 16]), DeviceClass::Phone);
        config.reorder_records = 1 + s.below(8);
        config.reorder_bytes = 200 + 16 * s.below(256);
        config.grease = s.wide();
        let restored = Restored { epoch: Epoch::new(s.below(3) as u64).unwrap(), ..Restored::default() };
        Self {
            half: Client::new(config, restored),
            now: Duration::from_secs(1),
            delivered: BTreeMap::new(),
            pseqs: BTreeMap::new(),
            calls: 0,
            connected: false,
        }
    }

    fn run(mut self, s: &mut Source<'_>) {
        for _ in 0..400 {
            if s.is_empty() {
                break;
            }
            self.step(s);
            self.drain();
            assert!(self.half.unacked() <= OUTBOX_SENDS_MAX);
        }
        // Whatever happened, a clean connection works.
        let now = self.now;
        self.half.disconnected(now);
        self.half.connect(AuthProof::Token(String::new()), NetworkHint::default(), now);
        assert_eq!(self.half.phase(), ClientState::Opening);
        let first = self.half.poll_output();
        assert!(first.is_some(), "a HELLO leaves");
    }

    fn step(&mut self, s: &mut Source<'_>) {
        let now = self.now;
        let half = &mut self.half;
        match s.below(24) {
            0..=9 => {
                let frame = any_frame(s);
                let channel = place(&frame, fulmar_protocol::frame::Side::Gateway, s);
                let before = half.phase();
                let taken = half.handle(channel, frame, now);
                if matches!(before, ClientState::Offline | ClientState::Closing) {
                    assert_eq!(taken, Ok(()), "frames of a dead connection are ignored");
                }
                if taken.is_err() {
                    assert_eq!(half.phase(), ClientState::Closing);
                }
            }
            10 | 11 => {
                half.connect(AuthProof::ticket(&[1]), NetworkHint::default(), now);
                self.connected = true;
            }
            12 => {
                let mut welcome = frames::welcome(s);
                welcome.minor = 0;
                welcome.epoch = half.epoch().max(Epoch::FIRST);
                let _ = half.handle(Channel::Control, Frame::Welcome(welcome), now);
            }
            13 => {
                half.disconnected(now);
                self.connected = false;
            }
            14..=16 => {
                let conversation = conversation(s);
                let last = self.pseqs.entry(conversation).or_default();
                let cancel = *last > 0 && s.below(4) == 0;
                if !cancel {
                    *last += 1;
                }
                let send = Send {
                    kind: RecordKind::Message,
                    conversation,
                    pseq: Pseq::new(*last).unwrap(),
                    seen: Seq::ZERO,
                    reference: None,
                    ttl: None,
                    more: false,
                    continues: false,
                    silent: false,
                    cancel,
                    payload: Bytes::from(vec![b'x'; s.below(256) * 16]),
                };
                if half.send(send, now).is_err() {
                    assert!(!half.has_room());
                    *last -= 1;
                }
            }
            17 => {
                let conversation = conversation(s);
                // An application commits what it was handed, or less.
                let to = self.delivered.get(&conversation).copied().unwrap_or_default();
                half.committed(
                    conversation,
                    Seq::new(to.get().saturating_sub(s.below(3) as u64)).unwrap(),
                    now,
                );
            }
            18 => half.mark(conversation(s), s.id(), now),
            19 => {
                half.open(OpenTarget::Number(conversation(s)), s.flag(), now);
            }
            20 => {
                let deadline = Duration::from_millis(s.below(256) as u64 * 20);
                half.call(ServiceId::default(), 1, s.payload(64), deadline, now);
                self.calls += 1;
            }
            21 => {
                half.pull(conversation(s), s.id(), s.id(), s.narrow(), s.flag(), now);
            }
            22 => match s.below(3) {
                0 => half.ping(now),
                1 => half.nudge(false, now),
                _ => half.event(frames::event(s), now),
            },
            _ => {
                self.now += Duration::from_millis(1 << s.below(17));
                let now = self.now;
                for _ in 0..64 {
                    match half.poll_timeout() {
                        Some(at) if at <= now => half.handle_timeout(now),
                        _ => return,
                    }
                }
                panic!("a timeout that never ends: {:?} at {now:?}", half.poll_timeout());
            }
        }
    }

    fn drain(&mut self) {
        let mut outputs = 0;
        while let Some(output) = self.half.poll_output() {
            outputs += 1;
            assert!(outputs < 20_000, "one input makes a bounded number of outputs");
            match output {
                client::Output::Deliver(deliver) => {
                    let last = self.delivered.entry(deliver.conversation).or_default();
                    assert_eq!(deliver.seq.prev(), *last, "records come out once and in order");
                    *last = deliver.seq;
                }
                client::Output::Gap { conversation, from, to } => {
                    let last = self.delivered.entry(conversation).or_default();
                    assert_eq!(from.prev(), *last, "a gap starts where the reader is");
                    assert!(from <= to);
                    *last = to;
                }
                client::Output::Transmit(channel, frame) => {
                    assert!(self.connected, "nothing leaves without a connection");
                    let side = fulmar_protocol::frame::Side::Client;
                    assert_eq!(frame.check_channel(side, channel), Ok(()), "frames leave where they may");
                    let big = matches!(frame, Frame::Call(_) | Frame::Event(_) | Frame::Auth(_));
                    let inner = frame.encoded_len().saturating_sub(8);
                    assert!(big || inner <= channel.frame_limit(), "{} of {inner} bytes", frame.name());
                }
                client::Output::NewEpoch { .. } => self.pseqs.clear(),
                _ => {}
            }
        }
    }
}

struct GatewayRun {
    half: Gateway,
    now: Duration,
    welcomed: bool,
    closed: bool,
    /// Frames handled before the WELCOME.
    early: usize,
}

impl GatewayRun {
    fn new() -> Self {
        let now = Duration::from_secs(1);
        let half = Gateway::new(GatewayConfig::default(), now);
        Self { half, now, welcomed: false, closed: false, early: 0 }
    }

    fn run(mut self, s: &mut Source<'_>) {
        for _ in 0..400 {
            if s.is_empty() {
                break;
            }
            self.step(s);
            self.drain();
        }
        self.half.closed();
        assert_eq!(self.half.poll_output(), None);
        assert_eq!(self.half.poll_timeout(), None);
    }

    fn step(&mut self, s: &mut Source<'_>) {
        let now = self.now;
        let half = &mut self.half;
        match s.below(16) {
            0..=7 => {
                let frame = any_frame(s);
                let channel = place(&frame, fulmar_protocol::frame::Side::Client, s);
                let before = half.state();
                let taken = half.handle(channel, frame, now);
                if matches!(before, GatewayState::Opening | GatewayState::Authenticating) && taken.is_ok() {
                    self.early += usize::from(channel != Channel::Datagram);
                }
                assert!(
                    self.welcomed || self.early <= 2 * FIRST_FLIGHT_FRAMES_MAX,
                    "what is held is bounded"
                );
                if taken.is_err() {
                    assert_eq!(half.state(), GatewayState::Closed);
                }
            }
            8 => {
                let may = half.state() == GatewayState::Authenticating;
                half.welcome(frames::welcome(s), now);
                self.welcomed |= may;
            }
            9 => {
                let code = RefusalCode::BadToken;
                let error = Error {
                    code,
                    refers: RequestId::ZERO,
                    retry: code.retry(),
                    retry_after_ms: 0,
                    text: String::new(),
                };
                if s.below(8) == 0 {
                    half.reject(error, CloseCode::AuthFailed, now);
                }
            }
            10 | 11 => {
                let (pseq, seq) =
                    (Pseq::new(1 + s.below(12) as u64).unwrap(), Seq::new(s.below(40) as u64).unwrap());
                half.acked(conversation(s), pseq, seq, UnixMillis::default());
            }
            12 => half.refused(SendRefused {
                conversation: conversation(s),
                pseq: Pseq::new(1 + s.below(12) as u64).unwrap(),
                code: RefusalCode::ALL[s.below(RefusalCode::ALL.len())],
                expected: Pseq::FIRST,
                retry_after_ms: 0,
            }),
            13 => half.transmit(any_frame(s)),
            14 => match s.below(8) {
                0 => half.kick(Kicked { class_epoch: s.id(), by: String::new(), time: s.id() }),
                1 => half.drain(
                    Goaway {
                        code: CloseCode::Draining,
                        deadline_ms: s.narrow(),
                        spread_ms: 0,
                        addresses: Vec::new(),
                        text: String::new(),
                    },
                    now,
                ),
                _ => half.settled(
                    conversation(s),
                    Pseq::new(s.below(20) as u64).unwrap(),
                    UnixMillis::default(),
                ),
            },
            _ => {
                self.now += Duration::from_millis(1 << s.below(18));
                let now = self.now;
                for _ in 0..4 {
                    match half.poll_timeout() {
                        Some(at) if at <= now => half.handle_timeout(now),
                        _ => return,
                    }
                }
                panic!("a timeout that never ends: {:?} at {now:?}", half.poll_timeout());
            }
        }
    }

    fn drain(&mut self) {
        let mut outputs = 0;
        while let Some(output) = self.half.poll_output() {
            outputs += 1;
            assert!(outputs < 2_000, "one input makes a bounded number of outputs");
            assert!(!self.closed, "nothing follows a close");
            match output {
                gateway::Output::Transmit(frame) => {
                    let side = fulmar_protocol::frame::Side::Gateway;
                    assert_eq!(frame.check_channel(side, Channel::Control), Ok(()));
                }
                gateway::Output::Close { .. } => self.closed = true,
                gateway::Output::Authenticate(_) => {}
                _ => assert!(self.welcomed, "nothing is carried out for a stranger"),
            }
        }
    }
}

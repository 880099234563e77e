//! Clients and a gateway over links that drop, repeat, reorder and are cut anywhere, on a hand-moved clock.
//!
//! - The link is QUIC's: bytes of one stream arrive in order or not at all, streams and datagrams overtake each other,
//!   a cut loses whatever has not arrived, datagrams are lost and repeated.
//! - The log commits in groups; a killed gateway loses what was not committed and everything soft. A killed application
//!   loses what its database does not have.
//! - Checked at every step: an acked send is in the log for good and once; nothing refused is; per producer the log is
//!   in send order; each reader's database holds the log without gap and without repetition, but for records that
//!   retention took away. At the end, when faults stop: everything sent is settled and everybody is at the head.
//!
//! [`Bug`]s can be planted, to see that these checks find them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use core::time::Duration;

use bytes::{Bytes, BytesMut};
use fulmar_protocol::{
    close::{CloseCode, RefusalCode},
    frame::{
        AuthProof, Block, CallStatus, Channel, ConversationClass, Decoder, Deliver, Error, Event, EventKind,
        Frame, Goaway, Head, Heads, Limits, NetworkHint, OpenTarget, Opened, Origin, Pull, RecordKind, Reply,
        Resumption, Send, SendRefused, Side, StreamHeader, Welcome, WireTime,
    },
    id::{
        ClassEpoch, ConversationId, DeviceClass, DeviceId, DeviceUid, Epoch, Pseq, Seq, ServiceId, SessionId,
        UnixMillis, UserId,
    },
    producer::{Decision, Lane, Parked, fingerprint},
    session::{
        client::{self, Client, ClientConfig, Restored},
        digest::CursorDigest,
        gateway::{self, Gateway, GatewayConfig},
        hedge::{Hedges, Left},
        state::ClientState,
    },
};

use super::source::Source;

/// A fault in the code around the halves that the checks must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// The gateway acks when a send is appended, before the commit.
    AckBeforeCommit,
    /// The gateway appends what was appended before.
    NoAgain,
    /// The gateway appends a send whose predecessor is missing.
    NoEarly,
    /// A restarted gateway has forgotten how far each producer was.
    ForgetLanes,
    /// The application acknowledges records before they are in its database.
    CommitBeforeDisk,
    /// The gateway says a refusal before the used-up number is on disk.
    RefuseBeforeCommit,
}

const CONVERSATIONS: u64 = 3;
const CLIENTS: usize = 3;
const RING: u64 = 4;
const TOLD_BY_HEAD: u64 = 14;
const START_MS: u64 = 1_790_000_000_000;
/// Messages one schedule may send: keeps a run short.
const MESSAGES_MAX: usize = 400;
const STEPS_MAX: usize = 3_000;

/// One record of a log.
#[derive(Clone, Debug)]
struct Record {
    user: u64,
    device: u64,
    epoch: Epoch,
    pseq: Pseq,
    time: UnixMillis,
    more: bool,
    continues: bool,
    payload: Bytes,
    /// Where it came in.
    connection: u64,
}

#[derive(Debug, Default)]
struct Log {
    records: Vec<Record>,
    committed: usize,
    low: u64,
}

impl Log {
    fn head(&self) -> u64 {
        self.committed as u64
    }

    fn get(&self, seq: u64) -> Option<&Record> {
        self.records.get(usize::try_from(seq.checked_sub(1)?).ok()?)
    }
}

/// Producer: (user, device), conversation.
type LaneKey = (u64, u64, u64);

/// What a commit lets out.
#[derive(Debug)]
enum Verdict {
    Acked { conversation: ConversationId, pseq: Pseq, seq: Seq },
    Refused(SendRefused),
}

#[derive(Debug, Default)]
struct Server {
    logs: BTreeMap<u64, Log>,
    lanes: BTreeMap<LaneKey, Lane>,
    /// The lanes as of the last commit.
    durable: BTreeMap<LaneKey, Lane>,
    /// By epoch too: each numbers from 1.
    parked: BTreeMap<(LaneKey, Epoch), Parked<(u64, Send)>>,
    /// Verdicts of the batch: connection, what.
    batch: Vec<(u64, Verdict)>,
    epochs: BTreeMap<usize, u64>,
    /// What is known of the devices' cursors; soft.
    cursors: BTreeMap<usize, BTreeMap<u64, u64>>,
    busy: usize,
    connections: u64,
}

/// Bytes on their way on one stream.
#[derive(Debug)]
struct Pipe {
    flying: BytesMut,
    decoder: Decoder,
    header: Vec<u64>,
}

impl Pipe {
    fn new(channel: Channel) -> Self {
        let mut flying = BytesMut::new();
        if let Some(header) = channel.header() {
            header.encode(&mut flying);
        }
        Self { flying, decoder: Decoder::new(channel.frame_limit()), header: Vec::new() }
    }

    /// Lets `n` bytes arrive; returns the frames they complete.
    fn arrive(&mut self, channel: Channel, n: usize) -> Vec<Frame> {
        let bytes = self.flying.split_to(n.min(self.flying.len())).freeze();
        self.decoder.push(bytes);
        while self.header.len() < 2 {
            match self.decoder.next_varint() {
                Some(number) => self.header.push(number),
                None => return Vec::new(),
            }
        }
        let header = StreamHeader { kind: self.header[0], index: self.header[1] };
        assert_eq!(header.channel(), Ok(channel), "the header names the stream");
        let mut frames = Vec::new();
        while let Some(frame) = self.decoder.next().expect("a half sends only what can be read") {
            frames.push(frame);
        }
        frames
    }
}

#[derive(Debug)]
struct Connection {
    id: u64,
    gateway: Gateway,
    up: BTreeMap<Channel, Pipe>,
    down: BTreeMap<Channel, Pipe>,
    up_datagrams: Vec<Bytes>,
    down_datagrams: Vec<Bytes>,
    /// Records that may have been lost alone.
    hedges: Hedges<Seq, Bytes>,
    hello: Option<gateway::Output>,
    welcomed: bool,
    epoch: Epoch,
    /// What is owed: conversation, next seq. `None` until the cursors are known.
    next: Option<BTreeMap<u64, u64>>,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Unsettled,
    Acked(Option<u64>),
    Refused,
    /// Its epoch ended before it was settled: stored once or not at all.
    Unknown,
}

/// What the SDK's database and the process above it hold.
#[derive(Debug, Default)]
struct App {
    epoch: Epoch,
    device: Option<DeviceId>,
    cursors: BTreeMap<u64, u64>,
    outbox: BTreeMap<(u64, u64), (Send, bool)>,
    /// The last number used, per conversation.
    pseqs: BTreeMap<u64, u64>,
    /// Handed out by the half, not in the database yet.
    handed: VecDeque<client::Output>,
    reads: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Device {
    user: u64,
    app: App,
    half: Client,
    link: Option<Connection>,
    /// The first flight of a connection beside the one there is.
    prepared: Option<Vec<(Channel, Frame)>>,
}

/// The world.
#[derive(Debug)]
pub(crate) struct World {
    now: Duration,
    server: Server,
    devices: Vec<Device>,
    fates: BTreeMap<Bytes, Fate>,
    bug: Option<Bug>,
    grease: u64,
}

fn conversation(number: u64) -> ConversationId {
    ConversationId::new(256 * (number + 1)).expect("small")
}

fn number_of(conversation: ConversationId) -> u64 {
    conversation.get() / 256 - 1
}

fn seq(number: u64) -> Seq {
    Seq::new(number).expect("small")
}

fn pseq(number: u64) -> Pseq {
    Pseq::new(number).expect("small")
}

impl World {
    /// A world in which nobody is connected.
    #[must_use]
    pub(crate) fn new(bug: Option<Bug>) -> Self {
        let devices = (0..CLIENTS)
            .map(|index| Device {
                // The first two are devices of one user.
                user: if index < 2 { 1 } else { 2 },
                app: App::default(),
                half: half(index, &App::default()),
                link: None,
                prepared: None,
            })
            .collect();
        let mut server = Server::default();
        for number in 0..CONVERSATIONS {
            server.logs.insert(number, Log { low: 1, ..Log::default() });
        }
        let now = Duration::from_secs(100);
        Self { now, server, devices, fates: BTreeMap::new(), bug, grease: 0 }
    }

    /// Carries out the schedule `bytes` describes, then lets everything come to rest.
    ///
    /// # Panics
    /// A promise is broken.
    pub(crate) fn run(bytes: &[u8], bug: Option<Bug>) {
        let mut world = Self::new(bug);
        let mut source = Source::new(bytes);
        let mut steps = 0;
        while !source.is_empty() && steps < STEPS_MAX {
            world.step(&mut source);
            steps += 1;
        }
        world.rest();
    }

    fn step(&mut self, s: &mut Source<'_>) {
        let op = s.byte();
        let index = s.below(CLIENTS);
        self.grease = self.grease.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        match op % 64 {
            0..=11 => self.write(index, s),
            12..=27 => self.arrive_some(index, s),
            28..=31 => self.commit(),
            32..=35 => self.app_commit(index, s.below(8) + 1),
            36..=40 => self.pass(Duration::from_millis(1 << s.below(12))),
            41 => self.cut(index),
            42..=44 => self.connect(index),
            45 => self.prepare_or_switch(index),
            46..=47 => self.welcome(index),
            48 => self.kill_gateway(),
            49 => self.kill_app(index),
            50 => self.server.busy = s.below(6),
            51 => self.retention(s),
            52..=53 => self.hedge(index, s),
            54..=55 => self.datagram(index, s),
            56..=57 => self.requests(index, s),
            58 => self.cancel(index, s),
            59 => {
                let now = self.now;
                self.devices[index].half.nudge(s.flag(), now);
                self.run_client(index);
            }
            60 => self.drain(index),
            61 => self.lose_epoch(index, s),
            _ => {
                self.arrive_all(index);
                self.commit();
            }
        }
    }

    // ---- What the application does ----

    fn write(&mut self, index: usize, s: &mut Source<'_>) {
        if self.fates.len() >= MESSAGES_MAX {
            return;
        }
        let number = s.below(3) as u64;
        // A payload is unique, so that the log can be read like a list of messages.
        let refused = s.below(16) == 15;
        let kind = if refused { '!' } else { 'm' };
        let payload = Bytes::from(format!("{kind}{index}-{number}-{:06}", self.fates.len()));
        let device = &mut self.devices[index];
        let last = device.app.pseqs.entry(number).or_default();
        *last += 1;
        let send = Send {
            kind: RecordKind::Message,
            conversation: conversation(number),
            pseq: pseq(*last),
            seen: seq(device.app.cursors.get(&number).copied().unwrap_or(0)),
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: s.flag(),
            cancel: false,
            payload: payload.clone(),
        };
        device.app.outbox.insert((number, *last), (send.clone(), false));
        self.fates.insert(payload, Fate::Unsettled);
        let now = self.now;
        self.devices[index].half.send(send, now).expect("the outbox has room for a test");
        self.run_client(index);
    }

    fn cancel(&mut self, index: usize, s: &mut Source<'_>) {
        let device = &mut self.devices[index];
        let count = device.app.outbox.len();
        let which = s.below(count);
        let Some(((_, _), (send, _))) = device.app.outbox.iter_mut().nth(which) else { return };
        // The outbox keeps the content: it is how the test knows which message this was.
        let tombstone = Send { cancel: true, payload: Bytes::new(), ..send.clone() };
        let now = self.now;
        device.half.send(tombstone, now).expect("a tombstone needs no room");
        self.run_client(index);
    }

    fn app_commit(&mut self, index: usize, n: usize) {
        for _ in 0..n {
            let Some(output) = self.devices[index].app.handed.pop_front() else { return };
            self.store(index, output);
        }
        self.run_client(index);
    }

    /// Puts one thing the half handed out into the database, and says so.
    fn store(&mut self, index: usize, output: client::Output) {
        let now = self.now;
        let (number, to) = match output {
            client::Output::Deliver(deliver) => {
                let number = number_of(deliver.conversation);
                let cursor = self.devices[index].app.cursors.get(&number).copied().unwrap_or(0);
                assert_eq!(deliver.seq.get(), cursor + 1, "contiguous and once, device {index} in {number}");
                let log = &self.server.logs[&number];
                assert!(deliver.seq.get() <= log.head(), "delivered before it was committed");
                let record = log.get(deliver.seq.get()).expect("a record that exists");
                assert_eq!(deliver.payload, record.payload, "the record of this seq");
                assert_eq!(deliver.sender.get(), record.user);
                let unix = UnixMillis::new(START_MS + now.as_secs() * 1000).expect("small");
                assert_eq!(deliver.time.expand(unix), record.time, "the time comes through");
                (number, deliver.seq.get())
            }
            client::Output::Gap { conversation, from, to } => {
                let number = number_of(conversation);
                let cursor = self.devices[index].app.cursors.get(&number).copied().unwrap_or(0);
                assert_eq!(from.get(), cursor + 1, "a gap starts where the reader is");
                let log = &self.server.logs[&number];
                let (low, head) = (log.low, log.head());
                assert!(
                    to.get() < low,
                    "device {index}: gap {from}-{to} in {number}, low {low}, head {head}"
                );
                (number, to.get())
            }
            other => unreachable!("{other:?} is not kept for later"),
        };
        self.devices[index].app.cursors.insert(number, to);
        if self.bug != Some(Bug::CommitBeforeDisk) {
            self.devices[index].half.committed(conversation(number), seq(to), now);
        }
    }

    fn requests(&mut self, index: usize, s: &mut Source<'_>) {
        let number = s.below(3) as u64;
        let now = self.now;
        let conversation = conversation(number);
        let read = self.devices[index].app.cursors.get(&number).copied().unwrap_or(0);
        let half = &mut self.devices[index].half;
        match s.below(6) {
            0 => {
                half.open(OpenTarget::Number(conversation), s.flag(), now);
            }
            1 => {
                let service = ServiceId::new(0).expect("small");
                let deadline = Duration::from_millis(200 * s.below(20) as u64);
                half.call(service, 5, Bytes::from_static(b"?"), deadline, now);
            }
            2 => {
                half.pull(conversation, Seq::FIRST, seq(1_000), 5, s.flag(), now);
            }
            3 => {
                half.mark(conversation, seq(read), now);
                let reads = &mut self.devices[index].app.reads;
                let mark = reads.entry(number).or_default();
                *mark = read.max(*mark);
            }
            4 => half.ping(now),
            _ => half.event(
                Event {
                    conversation,
                    kind: EventKind::Typing,
                    sender: UserId::default(),
                    number: 1,
                    ttl_ms: 1_000,
                    payload: Bytes::new(),
                },
                now,
            ),
        }
        self.run_client(index);
    }

    fn kill_app(&mut self, index: usize) {
        self.cut(index);
        let device = &mut self.devices[index];
        device.app.handed.clear();
        device.prepared = None;
        device.half = half(index, &device.app);
    }

    // ---- The link ----

    fn connect(&mut self, index: usize) {
        if self.devices[index].link.is_some() {
            return;
        }
        self.link_up(index);
        let now = self.now;
        self.devices[index].half.connect(AuthProof::Token("t".to_owned()), NetworkHint::default(), now);
        self.run_client(index);
    }

    /// The first time: says what a connection beside this one would begin with. The second time, however much later: that one is
    /// the connection.
    fn prepare_or_switch(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let Some(flight) = device.prepared.take() else {
            let proof = AuthProof::Token("t".to_owned());
            device.prepared = Some(device.half.prepare(proof, NetworkHint::default()));
            return;
        };
        // A new epoch ends the connection it came on, and a race beside that.
        let Some((_, Frame::Hello(hello))) = flight.first() else { unreachable!("a HELLO is said first") };
        if hello.epoch != device.half.epoch() {
            return;
        }
        device.link = None;
        self.link_up(index);
        for (channel, frame) in &flight {
            self.client_output(index, client::Output::Transmit(*channel, frame.clone()));
        }
        let now = self.now;
        self.devices[index].half.switch(&flight, now);
        self.run_client(index);
    }

    fn link_up(&mut self, index: usize) {
        self.server.connections += 1;
        let limits = Limits {
            inflight_per_conversation: 4,
            inflight_per_producer: 7,
            calls_inflight: 2,
            ..Limits::default()
        };
        let config = GatewayConfig { limits, grease: self.grease, ..GatewayConfig::default() };
        let now = self.now;
        self.devices[index].link = Some(Connection {
            id: self.server.connections,
            gateway: Gateway::new(config, now),
            up: BTreeMap::new(),
            down: BTreeMap::new(),
            up_datagrams: Vec::new(),
            down_datagrams: Vec::new(),
            hedges: Hedges::new(Some(Duration::from_millis(50))),
            hello: None,
            welcomed: false,
            epoch: Epoch::ZERO,
            next: None,
        });
    }

    /// The connection is cut: what has not arrived never will.
    fn cut(&mut self, index: usize) {
        let now = self.now;
        let device = &mut self.devices[index];
        if device.link.take().is_some() {
            device.half.disconnected(now);
        }
        self.run_client(index);
    }

    fn arrive_some(&mut self, index: usize, s: &mut Source<'_>) {
        let Some(link) = &self.devices[index].link else { return };
        let up = s.flag();
        let pipes = if up { &link.up } else { &link.down };
        let Some(channel) = pipes.keys().nth(s.below(pipes.len())).copied() else { return };
        let n = match s.byte() {
            few @ 0..=99 => usize::from(few),
            _ => usize::MAX,
        };
        self.arrive(index, up, channel, n);
    }

    fn arrive(&mut self, index: usize, up: bool, channel: Channel, n: usize) {
        let now = self.now;
        let Some(link) = &mut self.devices[index].link else { return };
        let pipes = if up { &mut link.up } else { &mut link.down };
        let Some(pipe) = pipes.get_mut(&channel) else { return };
        for frame in pipe.arrive(channel, n) {
            if up {
                let Some(link) = &mut self.devices[index].link else { return };
                link.gateway.handle(channel, frame, now).expect("a client keeps the rules");
                self.run_gateway(index);
            } else {
                self.devices[index].half.handle(channel, frame, now).expect("a gateway keeps the rules");
                self.run_client(index);
            }
        }
    }

    fn arrive_all(&mut self, index: usize) {
        for up in [true, false] {
            let Some(link) = &self.devices[index].link else { return };
            let channels: Vec<_> = if up { &link.up } else { &link.down }.keys().copied().collect();
            for channel in channels {
                self.arrive(index, up, channel, usize::MAX);
            }
        }
        let Some(link) = &mut self.devices[index].link else { return };
        let down = core::mem::take(&mut link.down_datagrams);
        for datagram in core::mem::take(&mut link.up_datagrams) {
            self.datagram_up(index, datagram);
        }
        for datagram in down {
            self.datagram_down(index, datagram);
        }
    }

    fn datagram_up(&mut self, index: usize, datagram: Bytes) {
        let now = self.now;
        let mut decoder = Decoder::new(Channel::Datagram.frame_limit());
        decoder.push(datagram);
        let frame = decoder.next().expect("readable").expect("whole");
        if let Some(link) = &mut self.devices[index].link {
            link.gateway.handle(Channel::Datagram, frame, now).expect("a client keeps the rules");
            self.run_gateway(index);
        }
    }

    fn datagram_down(&mut self, index: usize, datagram: Bytes) {
        let now = self.now;
        let mut decoder = Decoder::new(Channel::Datagram.frame_limit());
        decoder.push(datagram);
        let frame = decoder.next().expect("readable").expect("whole");
        if self.devices[index].link.is_some() {
            self.devices[index]
                .half
                .handle(Channel::Datagram, frame, now)
                .expect("a gateway keeps the rules");
            self.run_client(index);
        }
    }

    /// One datagram arrives, is repeated, or is lost.
    fn datagram(&mut self, index: usize, s: &mut Source<'_>) {
        let up = s.flag();
        let Some(link) = &mut self.devices[index].link else { return };
        let datagrams = if up { &mut link.up_datagrams } else { &mut link.down_datagrams };
        if datagrams.is_empty() {
            return;
        }
        let which = s.below(datagrams.len());
        let datagram = match s.below(3) {
            0 => datagrams.swap_remove(which),
            1 => datagrams[which].clone(),
            _ => return drop(datagrams.swap_remove(which)),
        };
        if up { self.datagram_up(index, datagram) } else { self.datagram_down(index, datagram) }
    }

    /// A copy of an unsettled send leaves in a datagram beside the stream.
    fn hedge(&mut self, index: usize, s: &mut Source<'_>) {
        let device = &mut self.devices[index];
        let live = device.half.phase() == ClientState::Live;
        let left: Vec<_> = device.app.outbox.values().filter(|(_, left)| *left).collect();
        let Some((send, _)) = left.get(s.below(left.len())) else { return };
        if let (true, Some(link)) = (live, &mut device.link) {
            link.up_datagrams.push(Frame::Send(send.clone()).to_bytes());
        }
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        loop {
            let next = self
                .devices
                .iter()
                .flat_map(|device| {
                    let link = device.link.as_ref();
                    let gateway = link.and_then(|link| link.gateway.poll_timeout());
                    [device.half.poll_timeout(), gateway, link.and_then(|link| link.hedges.next_due())]
                })
                .flatten()
                .chain(self.server.parked.values().filter_map(Parked::next_expiry))
                .min()
                .filter(|at| *at <= until);
            let Some(at) = next else { break };
            self.now = self.now.max(at);
            self.fire();
        }
        self.now = until;
    }

    fn fire(&mut self) {
        let now = self.now;
        for index in 0..CLIENTS {
            if self.devices[index].half.poll_timeout().is_some_and(|at| at <= now) {
                self.devices[index].half.handle_timeout(now);
                self.run_client(index);
            }
            if let Some(link) = &mut self.devices[index].link
                && link.gateway.poll_timeout().is_some_and(|at| at <= now)
            {
                link.gateway.handle_timeout(now);
                self.run_gateway(index);
            }
            if let Some(link) = &mut self.devices[index].link {
                while let Some((_, _, frame)) = link.hedges.take_due(now) {
                    link.down_datagrams.push(frame.clone());
                }
            }
        }
        let keys: Vec<_> = self.server.parked.keys().copied().collect();
        for key in keys {
            while let Some(parked) = self.server.parked.get_mut(&key)
                && let Some((pseq, (connection, send))) = parked.expire(now)
            {
                let expected =
                    self.server.lanes.get(&key.0).map_or(Pseq::FIRST, |lane| lane.last().saturating_add(1));
                self.refuse_now(connection, send.conversation, pseq, RefusalCode::OutOfOrder, expected);
            }
        }
    }

    // ---- What the halves say ----

    fn run_client(&mut self, index: usize) {
        while let Some(output) = self.devices[index].half.poll_output() {
            self.client_output(index, output);
        }
    }

    fn client_output(&mut self, index: usize, output: client::Output) {
        let grease = self.grease;
        let device = &mut self.devices[index];
        match output {
            client::Output::Transmit(channel, frame) => {
                if let Frame::Send(send) = &frame
                    && let Some((_, left)) =
                        device.app.outbox.get_mut(&(number_of(send.conversation), send.pseq.get()))
                {
                    *left = true;
                }
                let Some(link) = &mut device.link else { return };
                if channel == Channel::Datagram {
                    return link.up_datagrams.push(frame.to_bytes());
                }
                let pipe = link.up.entry(channel).or_insert_with(|| Pipe::new(channel));
                frame.encode_greased(&mut pipe.flying, grease);
                assert!(pipe.flying.len() < 1 << 20, "what is in flight is bounded");
            }
            client::Output::Welcomed(welcome) => device.app.device = Some(welcome.device),
            client::Output::NewEpoch { epoch, unsettled, .. } => self.new_epoch(index, epoch, &unsettled),
            client::Output::Deliver(ref deliver) => {
                if self.bug == Some(Bug::CommitBeforeDisk) {
                    let (conversation, seq, now) = (deliver.conversation, deliver.seq, self.now);
                    device.half.committed(conversation, seq, now);
                    device.app.cursors.entry(number_of(conversation)).or_insert(0);
                }
                self.devices[index].app.handed.push_back(output);
            }
            client::Output::Gap { .. } => device.app.handed.push_back(output),
            client::Output::Acked { conversation, pseq, seq, .. } => {
                let number = number_of(conversation);
                let entry = device.app.outbox.remove(&(number, pseq.get()));
                let (send, _) = entry.expect("a send is settled once");
                let (user, dev, epoch) = (device.user, device.app.device, device.app.epoch);
                if let Some(seq) = seq {
                    let log = &self.server.logs[&number];
                    assert!(seq.get() <= log.head(), "acked before it was committed");
                    let record = log.get(seq.get()).expect("an acked send is in the log");
                    let producer = (record.user, Some(record.device), record.epoch, record.pseq);
                    assert_eq!(
                        producer,
                        (user, dev.map(DeviceId::get), epoch, pseq),
                        "acked with its own record"
                    );
                    assert_eq!(record.payload, send.payload);
                }
                let before = self.fates.insert(send.payload, Fate::Acked(seq.map(Seq::get)));
                assert_eq!(before, Some(Fate::Unsettled), "a send is settled once");
            }
            client::Output::Refused(refused) => {
                let key = (number_of(refused.conversation), refused.pseq.get());
                let (send, _) = device.app.outbox.remove(&key).expect("a send is settled once");
                let before = self.fates.insert(send.payload, Fate::Refused);
                assert_eq!(before, Some(Fate::Unsettled), "a send is settled once");
            }
            client::Output::Close(_) => self.cut(index),
            client::Output::Replied(reply) => {
                if reply.status == CallStatus::Ok {
                    assert_eq!(&reply.body[..], b"!");
                }
            }
            client::Output::Failed(error) => panic!("{error:?}"),
            client::Output::Opened(_)
            | client::Output::Page(_)
            | client::Output::Receipts(_)
            | client::Output::Heads(_)
            | client::Output::Event(_)
            | client::Output::RequestRefused(_)
            | client::Output::Goaway(_)
            | client::Output::Kicked(_)
            | client::Output::Rtt(_) => {}
        }
    }

    /// The database renumbers what never left; what may have left under the old epoch is given up.
    fn new_epoch(&mut self, index: usize, epoch: Epoch, unsettled: &[(ConversationId, Pseq)]) {
        let now = self.now;
        let device = &mut self.devices[index];
        let first = device.app.epoch == Epoch::ZERO;
        device.app.epoch = epoch;
        if first {
            assert!(unsettled.is_empty(), "nothing leaves without an epoch");
            return;
        }
        let named: BTreeSet<_> = unsettled.iter().map(|(c, p)| (number_of(*c), p.get())).collect();
        device.app.pseqs.clear();
        for ((number, old), (mut send, left)) in core::mem::take(&mut device.app.outbox) {
            assert!(!left || named.contains(&(number, old)), "what left is named");
            if named.contains(&(number, old)) {
                self.fates.insert(send.payload, Fate::Unknown);
                continue;
            }
            let last = device.app.pseqs.entry(number).or_default();
            *last += 1;
            send.pseq = pseq(*last);
            device.app.outbox.insert((number, *last), (send.clone(), false));
            device.half.send(send, now).expect("room");
        }
    }

    fn run_gateway(&mut self, index: usize) {
        while let Some(output) = self.devices[index].link.as_mut().and_then(|link| link.gateway.poll_output())
        {
            self.gateway_output(index, output);
        }
    }

    fn gateway_output(&mut self, index: usize, output: gateway::Output) {
        let grease = self.grease;
        let Some(link) = &mut self.devices[index].link else { return };
        match output {
            gateway::Output::Transmit(frame) => {
                let pipe = link.down.entry(Channel::Control).or_insert_with(|| Pipe::new(Channel::Control));
                frame.encode_greased(&mut pipe.flying, grease);
            }
            gateway::Output::Datagram(frame) => {
                assert!(frame.check_channel(Side::Gateway, Channel::Datagram).is_ok());
                link.down_datagrams.push(frame.to_bytes());
            }
            gateway::Output::Authenticate(_) => link.hello = Some(output),
            gateway::Output::Send(send) => {
                let connection = link.id;
                self.offer(index, connection, send);
            }
            gateway::Output::Ack(ack) => self.move_cursors(index, &ack.entries, false),
            gateway::Output::Cursors(cursors) => {
                self.move_cursors(index, &cursors.entries, true);
                if cursors.last {
                    self.start(index);
                }
            }
            gateway::Output::Open(open) => {
                let OpenTarget::Number(conversation) = open.target else { unreachable!() };
                let log = &self.server.logs[&number_of(conversation)];
                let opened = Opened {
                    id: open.id,
                    conversation,
                    class: ConversationClass::Group,
                    name: "g".to_owned(),
                    peer: UserId::default(),
                    head: seq(log.head()),
                    count: log.head(),
                    low: seq(log.low),
                    joined: Seq::FIRST,
                    read: Seq::ZERO,
                    last_pseq: Pseq::ZERO,
                };
                link.gateway.transmit(Frame::Opened(opened));
            }
            gateway::Output::Pull(pull) => self.answer_pull(index, pull),
            gateway::Output::Call(call) => {
                let body = Bytes::from_static(b"!");
                link.gateway.transmit(Frame::Reply(Reply { id: call.id, status: CallStatus::Ok, body }));
            }
            gateway::Output::Event(event) => {
                let event = Event { sender: UserId::new(1).expect("small"), ..event };
                for device in &mut self.devices {
                    if let Some(link) = &mut device.link {
                        link.gateway.transmit(Frame::Event(event.clone()));
                    }
                }
            }
            gateway::Output::Close { code, reason } => {
                assert!(
                    matches!(code, CloseCode::HelloTimeout | CloseCode::IdleTimeout | CloseCode::Draining),
                    "{code:?}: {reason}"
                );
                self.cut(index);
            }
            gateway::Output::Mark(_) | gateway::Output::Flush | gateway::Output::Reauthenticate(_) => {}
        }
    }

    // ---- What the gateway does ----

    fn welcome(&mut self, index: usize) {
        let now = self.now;
        let Some(link) = &mut self.devices[index].link else { return };
        let Some(gateway::Output::Authenticate(hello)) = link.hello.take() else { return };
        let current = self.server.epochs.entry(index).or_default();
        if hello.epoch.get() != *current || *current == 0 {
            *current += 1;
        }
        let epoch = Epoch::new(*current).expect("small");
        let fresh = !self.server.cursors.contains_key(&index);
        let known = self.server.cursors.entry(index).or_default();
        for (conversation, seq) in &hello.changed {
            let cursor = known.entry(number_of(*conversation)).or_default();
            *cursor = seq.get().max(*cursor);
        }
        let digest =
            CursorDigest::of(known.iter().map(|(number, cursor)| (conversation(*number), seq(*cursor))));
        let resumption = if fresh && hello.cursor_digest == 0 {
            Resumption::Fresh
        } else if digest.0 == hello.cursor_digest {
            Resumption::Resumed
        } else {
            Resumption::NeedCursors
        };
        link.welcomed = true;
        link.epoch = epoch;
        let welcome = Welcome {
            minor: 0,
            features: hello.features,
            session: SessionId::new(1).expect("small"),
            ticket: Default::default(),
            user: UserId::new(self.devices[index].user).expect("small"),
            device: DeviceId::new(index as u64 + 1).expect("small"),
            epoch,
            class_epoch: ClassEpoch::FIRST,
            server_time: UnixMillis::new(START_MS + u64::try_from(now.as_millis()).expect("small"))
                .expect("small"),
            lanes: 2,
            limits: Limits::default(),
            keepalive_ms: (15_000, 120_000),
            resumption,
            addresses: Vec::new(),
            folder: None,
        };
        if let Some(link) = &mut self.devices[index].link {
            link.gateway.welcome(welcome, now);
        }
        if resumption != Resumption::NeedCursors {
            self.start(index);
        }
        self.run_gateway(index);
    }

    fn move_cursors(&mut self, index: usize, entries: &[(ConversationId, Seq)], replace: bool) {
        let now = self.now;
        let known = self.server.cursors.entry(index).or_default();
        for (conversation, seq) in entries {
            if let Some(link) = &mut self.devices[index].link {
                link.hedges.answered_up_to(*conversation, *seq, now);
            }
            let number = number_of(*conversation);
            let head = self.server.logs[&number].head();
            let actual = self.devices[index].app.cursors.get(&number).copied().unwrap_or(0);
            assert!(seq.get() <= actual, "acknowledged what is not on the device's disk");
            let cursor = known.entry(number).or_default();
            let told = seq.get().min(head);
            *cursor = if replace { told } else { told.max(*cursor) };
        }
    }

    /// The cursors are known: everything after them is owed.
    fn start(&mut self, index: usize) {
        let known = self.server.cursors.get(&index).cloned().unwrap_or_default();
        if let Some(link) = &mut self.devices[index].link {
            let next = (0..CONVERSATIONS).map(|n| (n, known.get(&n).copied().unwrap_or(0) + 1)).collect();
            link.next = Some(next);
        }
        self.fan_out(index);
    }

    fn verdict(&mut self, connection: u64, verdict: Verdict) {
        self.server.batch.push((connection, verdict));
    }

    fn refuse_now(
        &mut self,
        connection: u64,
        conversation: ConversationId,
        pseq: Pseq,
        code: RefusalCode,
        expected: Pseq,
    ) {
        let refused = SendRefused { conversation, pseq, code, expected, retry_after_ms: 40 };
        self.answer(connection, Verdict::Refused(refused));
    }

    fn answer(&mut self, connection: u64, verdict: Verdict) {
        let now = self.now;
        let time = UnixMillis::new(START_MS + u64::try_from(now.as_millis()).expect("small")).expect("small");
        let Some(index) = self
            .devices
            .iter()
            .position(|device| device.link.as_ref().is_some_and(|link| link.id == connection))
        else {
            return;
        };
        let Some(link) = &mut self.devices[index].link else { return };
        match verdict {
            Verdict::Acked { conversation, pseq, seq } => {
                // A client makes its own record from this.
                let record = self.server.logs[&number_of(conversation)].get(seq.get());
                let time = record.map_or(time, |record| record.time);
                link.gateway.acked(conversation, pseq, seq, time);
            }
            Verdict::Refused(refused) => link.gateway.refused(refused),
        }
        self.run_gateway(index);
    }

    fn offer(&mut self, index: usize, connection: u64, send: Send) {
        let (user, device) = (self.devices[index].user, index as u64 + 1);
        let epoch = self.devices[index].link.as_ref().map_or(Epoch::ZERO, |link| link.epoch);
        let key = (user, device, number_of(send.conversation));
        if self.server.busy > 0 {
            self.server.busy -= 1;
            return self.refuse_now(connection, send.conversation, send.pseq, RefusalCode::Busy, send.pseq);
        }
        self.decide(key, epoch, connection, send);
    }

    fn decide(&mut self, key: LaneKey, epoch: Epoch, connection: u64, send: Send) {
        let now = self.now;
        let lane = self.server.lanes.entry(key).or_insert_with(|| Lane::new(epoch));
        let print = fingerprint(&send);
        let mut decision = lane.offer(epoch, send.pseq, print);
        match (self.bug, decision) {
            (Some(Bug::NoAgain), Decision::Again { .. }) => decision = Decision::Append,
            (Some(Bug::NoEarly), Decision::Early { .. }) => decision = Decision::Append,
            _ => {}
        }
        let (conversation, pseq) = (send.conversation, send.pseq);
        match decision {
            Decision::Append => {
                self.append(key, connection, epoch, &send, print);
                loop {
                    let Some(lane) = self.server.lanes.get(&key) else { return };
                    let last = lane.last();
                    let Some(parked) = self.server.parked.get_mut(&(key, epoch)) else { return };
                    let Some((connection, send)) = parked.take_next(last) else { return };
                    self.decide(key, epoch, connection, send);
                }
            }
            Decision::Again { seq } => {
                let seq = seq.expect("a window is no longer than what is remembered");
                self.verdict(connection, Verdict::Acked { conversation, pseq, seq });
            }
            Decision::Early { expected } => {
                let parked = self.server.parked.entry((key, epoch)).or_default();
                let refused = match parked.insert(pseq, (connection, send), now + Duration::from_millis(500))
                {
                    Ok(older) => older.filter(|(older, _)| *older != connection),
                    Err(refused) => Some(refused),
                };
                if let Some((connection, _)) = refused {
                    self.refuse_now(connection, conversation, pseq, RefusalCode::OutOfOrder, expected);
                }
            }
            Decision::Conflict => {
                self.refuse_now(connection, conversation, pseq, RefusalCode::Conflict, pseq);
            }
            Decision::Stale { .. } => {
                self.refuse_now(connection, conversation, pseq, RefusalCode::StaleEpoch, pseq);
            }
        }
    }

    fn append(&mut self, key: LaneKey, connection: u64, epoch: Epoch, send: &Send, print: u64) {
        let (conversation, pseq) = (send.conversation, send.pseq);
        let now = self.now;
        let Some(lane) = self.server.lanes.get_mut(&key) else { return };
        if send.cancel || send.payload.starts_with(b"!") {
            lane.consumed(pseq);
            let verdict = if send.cancel {
                Verdict::Acked { conversation, pseq, seq: Seq::ZERO }
            } else {
                let expected = pseq.saturating_add(1);
                let code = RefusalCode::NotAllowed;
                Verdict::Refused(SendRefused { conversation, pseq, code, expected, retry_after_ms: 0 })
            };
            if self.bug == Some(Bug::RefuseBeforeCommit) {
                self.answer(connection, verdict);
            } else {
                self.verdict(connection, verdict);
            }
            return;
        }
        let log = self.server.logs.entry(key.2).or_default();
        let time = START_MS + u64::try_from(now.as_millis()).expect("small");
        log.records.push(Record {
            user: key.0,
            device: key.1,
            epoch,
            pseq,
            time: UnixMillis::new(time).expect("small"),
            more: send.more,
            continues: send.continues,
            payload: send.payload.clone(),
            connection,
        });
        let seq = seq(log.records.len() as u64);
        lane.appended(pseq, seq, print);
        let verdict = Verdict::Acked { conversation, pseq, seq };
        if self.bug == Some(Bug::AckBeforeCommit) {
            self.answer(connection, verdict);
        } else {
            self.verdict(connection, verdict);
        }
    }

    /// The batch is on disk: answers leave, readers are owed more.
    fn commit(&mut self) {
        for log in self.server.logs.values_mut() {
            log.committed = log.records.len();
        }
        self.server.durable = self.server.lanes.clone();
        for (connection, verdict) in core::mem::take(&mut self.server.batch) {
            self.answer(connection, verdict);
        }
        for index in 0..CLIENTS {
            self.fan_out(index);
        }
    }

    fn deliver(&self, index: usize, number: u64, at: u64, full: bool) -> Deliver {
        let record = self.server.logs[&number].get(at).expect("committed");
        let own = record.user == self.devices[index].user;
        let device = DeviceId::new(record.device).expect("small");
        Deliver {
            kind: RecordKind::Message,
            conversation: conversation(number),
            seq: seq(at),
            sender: UserId::new(record.user).expect("small"),
            time: if full { WireTime::Full(record.time) } else { WireTime::short(record.time) },
            // Others may be told too (pieces of bodies are): it names nothing of theirs.
            origin: (own || at.is_multiple_of(8)).then_some(Origin {
                device,
                epoch: record.epoch,
                pseq: record.pseq,
            }),
            reference: None,
            ttl: None,
            more: record.more,
            continues: record.continues,
            silent: false,
            payload: record.payload.clone(),
        }
    }

    fn fan_out(&mut self, index: usize) {
        let grease = self.grease;
        for number in 0..CONVERSATIONS {
            let log = &self.server.logs[&number];
            let (head, low) = (log.head(), log.low);
            let Some(next) =
                self.devices[index].link.as_ref().and_then(|link| link.next.as_ref()?.get(&number).copied())
            else {
                return;
            };
            if next > head {
                continue;
            }
            let behind = head + 1 - next;
            let (frame, channel) = if behind > TOLD_BY_HEAD {
                let head =
                    Head { conversation: conversation(number), head: seq(head), count: head, low: seq(low) };
                (Frame::Heads(Heads { entries: vec![head] }), Channel::Control)
            } else if behind > RING || next < low {
                let first = next.max(low);
                let records = (first..=head).map(|at| self.deliver(index, number, at, true)).collect();
                let pull = Default::default();
                let conversation = conversation(number);
                let block = Block {
                    pull,
                    last: true,
                    conversation,
                    low: seq(low),
                    head: seq(head),
                    first: seq(first),
                    records,
                };
                (Frame::Block(block), Channel::Backlog)
            } else {
                let lane = Channel::Lane(u8::try_from(number % 2).expect("small"));
                for at in next..=head {
                    let connection = self.devices[index].link.as_ref().map(|link| link.id);
                    if self.server.logs[&number].get(at).map(|record| record.connection) == connection {
                        // Its ack stands for it.
                        continue;
                    }
                    let frame = Frame::Deliver(self.deliver(index, number, at, false));
                    let now = self.now;
                    if let Some(link) = &mut self.devices[index].link {
                        let pipe = link.down.entry(lane).or_insert_with(|| Pipe::new(lane));
                        frame.encode_greased(&mut pipe.flying, grease);
                        let size = frame.encoded_len();
                        let left = Left { size, hedge: true, timed: true, patience: Duration::ZERO };
                        link.hedges.sent(conversation(number), seq(at), frame.to_bytes(), left, now);
                        link.hedges.left(size, now);
                    }
                }
                self.owed(index, number, head + 1);
                continue;
            };
            self.owed(index, number, head + 1);
            if let Some(link) = &mut self.devices[index].link {
                if channel == Channel::Control {
                    link.gateway.transmit(frame);
                } else {
                    let pipe = link.down.entry(channel).or_insert_with(|| Pipe::new(channel));
                    frame.encode_greased(&mut pipe.flying, grease);
                }
            }
            self.run_gateway(index);
        }
    }

    fn owed(&mut self, index: usize, number: u64, next: u64) {
        if let Some(owed) = self.devices[index].link.as_mut().and_then(|link| link.next.as_mut()) {
            owed.insert(number, next);
        }
    }

    fn answer_pull(&mut self, index: usize, pull: Pull) {
        let grease = self.grease;
        let number = number_of(pull.conversation);
        let log = &self.server.logs[&number];
        let (low, head) = (log.low, log.head());
        let Some(link) = &mut self.devices[index].link else { return };
        if self.server.busy > 0 {
            self.server.busy -= 1;
            let code = RefusalCode::Busy;
            let error =
                Error { code, refers: pull.id, retry: code.retry(), retry_after_ms: 10, text: String::new() };
            return link.gateway.transmit(Frame::Error(error));
        }
        let mut from = pull.from.get().max(low);
        let mut to = pull.to.get().min(head);
        let limit = u64::from(pull.limit).min(9);
        if pull.newest {
            from = from.max((to + 1).saturating_sub(limit));
        } else {
            to = to.min((from + limit).saturating_sub(1));
        }
        let mut blocks = Vec::new();
        let mut first = from;
        while first <= to {
            let end = to.min(first + 3);
            blocks.push((first, (first..=end).map(|at| self.deliver(index, number, at, true)).collect()));
            first = end + 1;
        }
        if blocks.is_empty() {
            blocks.push((from.max(1), Vec::new()));
        }
        let count = blocks.len();
        for (at, (first, records)) in blocks.into_iter().enumerate() {
            let block = Block {
                pull: pull.id,
                last: at + 1 == count,
                conversation: pull.conversation,
                low: seq(low),
                head: seq(head),
                first: seq(first),
                records,
            };
            if let Some(link) = &mut self.devices[index].link {
                let pipe = link.down.entry(Channel::Backlog).or_insert_with(|| Pipe::new(Channel::Backlog));
                Frame::Block(block).encode_greased(&mut pipe.flying, grease);
            }
        }
    }

    /// kill -9: what was not committed is gone, and everything soft with it.
    fn kill_gateway(&mut self) {
        for index in 0..CLIENTS {
            self.cut(index);
        }
        self.server.batch.clear();
        self.server.parked.clear();
        self.server.busy = 0;
        self.server.cursors.values_mut().for_each(|known| {
            known.pop_first();
        });
        for log in self.server.logs.values_mut() {
            log.records.truncate(log.committed);
        }
        // Restored the way a store does it: from numbers, not from memory.
        self.server.lanes = self
            .server
            .durable
            .iter()
            .map(|(key, lane)| (*key, Lane::restore(lane.epoch(), lane.last(), lane.recent())))
            .collect();
        if self.bug == Some(Bug::ForgetLanes) {
            self.server.lanes.clear();
        }
    }

    fn retention(&mut self, s: &mut Source<'_>) {
        let number = s.below(3) as u64;
        if let Some(log) = self.server.logs.get_mut(&number) {
            log.low = log.low.max((log.head() / 2).max(1));
        }
    }

    fn drain(&mut self, index: usize) {
        let now = self.now;
        if let Some(link) = &mut self.devices[index].link {
            let goaway = Goaway {
                code: CloseCode::Draining,
                deadline_ms: 3_000,
                spread_ms: 0,
                addresses: Vec::new(),
                text: String::new(),
            };
            link.gateway.drain(goaway, now);
            self.run_gateway(index);
        }
    }

    /// The server takes the device's database for one that lost its state.
    fn lose_epoch(&mut self, index: usize, s: &mut Source<'_>) {
        if s.below(4) == 0
            && let Some(epoch) = self.server.epochs.get_mut(&index)
        {
            *epoch += 1;
        }
    }

    // ---- The end ----

    /// Faults stop; everything must converge.
    fn rest(&mut self) {
        self.server.busy = 0;
        for round in 0..400 {
            for index in 0..CLIENTS {
                self.connect(index);
                self.arrive_all(index);
                self.welcome(index);
                self.arrive_all(index);
            }
            self.commit();
            for index in 0..CLIENTS {
                self.arrive_all(index);
                self.app_commit(index, usize::MAX);
            }
            self.pass(Duration::from_millis(200));
            if round > 3 && self.is_at_rest() {
                break;
            }
        }
        for (index, device) in self.devices.iter().enumerate() {
            assert!(device.app.outbox.is_empty(), "device {index} never settled {:?}", device.app.outbox);
            assert_eq!(device.half.unacked(), 0);
            for (number, log) in &self.server.logs {
                let cursor = device.app.cursors.get(number).copied().unwrap_or(0);
                assert_eq!(cursor, log.head(), "device {index} never got to the head of {number}");
            }
        }
        // A last PING confirms every cursor: the next HELLO has nothing to say.
        let now = self.now;
        for index in 0..CLIENTS {
            self.devices[index].half.ping(now);
            self.run_client(index);
            self.arrive_all(index);
            self.arrive_all(index);
            assert_eq!(self.devices[index].half.dirty().count(), 0, "every cursor is confirmed");
            let known = &self.server.cursors[&index];
            for (number, cursor) in &self.devices[index].app.cursors {
                assert_eq!(known.get(number), Some(cursor), "the gateway knows where device {index} is");
            }
        }
        self.check_logs();
    }

    fn is_at_rest(&self) -> bool {
        self.devices.iter().all(|device| {
            device.app.outbox.is_empty()
                && device.link.is_some()
                && self
                    .server
                    .logs
                    .iter()
                    .all(|(number, log)| device.app.cursors.get(number).copied().unwrap_or(0) == log.head())
        })
    }

    fn check_logs(&self) {
        let mut stored: BTreeMap<&Bytes, u64> = BTreeMap::new();
        for log in self.server.logs.values() {
            let mut last: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
            for (at, record) in log.records.iter().enumerate() {
                let before = stored.insert(&record.payload, at as u64 + 1);
                assert_eq!(before, None, "{:?} is stored twice", record.payload);
                // "m0-1-000042": the writer, then a number that only grows.
                let (writer, number) = record.payload.split_at(4);
                if let Some(before) = last.insert(writer, number) {
                    assert!(before < number, "{:?} is out of order", record.payload);
                }
            }
        }
        for (payload, fate) in &self.fates {
            let at = stored.get(payload).copied();
            match fate {
                Fate::Acked(Some(seq)) => assert_eq!(at, Some(*seq), "{payload:?} was acked"),
                Fate::Acked(None) => assert!(at.is_some(), "{payload:?} was acked"),
                Fate::Refused => assert_eq!(at, None, "{payload:?} was refused"),
                Fate::Unknown => {}
                Fate::Unsettled => panic!("{payload:?} was never settled"),
            }
        }
        for payload in stored.keys() {
            assert!(self.fates.contains_key(*payload), "{payload:?} was never sent");
        }
    }
}

fn half(index: usize, app: &App) -> Client {
    let uid = DeviceUid([u8::try_from(index).expect("small"); 16]);
    let mut config = ClientConfig::new(uid, DeviceClass::Phone);
    config.reorder_records = 6;
    config.reorder_bytes = 2_000;
    config.ack_every = 3;
    config.grease = index as u64 * 37;
    let restored = Restored {
        epoch: app.epoch,
        device: app.device,
        cursors: app.cursors.iter().map(|(number, cursor)| (conversation(*number), seq(*cursor))).collect(),
        dirty: Vec::new(),
        unacked: app.outbox.values().map(|(send, _)| send.clone()).collect(),
        marks: app.reads.iter().map(|(number, read)| (conversation(*number), seq(*read))).collect(),
    };
    Client::new(config, restored)
}

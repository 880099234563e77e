//! What a lost message costs when it travels alone, in virtual time: two clients and a gateway over a model of QUIC.
//!
//! The model is what RFC 9002 and quinn do about loss, and no more: a packet is lost when a later one is acknowledged and
//! 9/8 of a round trip have passed, or three later ones are; a probe after `srtt + 4 rttvar + 25 ms` (doubled each time), of two
//! packets, carries no stream data; streams are in order, datagrams are not repeated. Acknowledgements are not lost and lone ones
//! come 25 ms late. Figures are exact for the model; the simulated world has the real quinn.

use std::collections::{BTreeMap, BinaryHeap};

use core::{cmp::Reverse, time::Duration};

use bytes::Bytes;
use fulmar_protocol::{
    frame::{
        AuthProof, Channel, Deliver, Frame, Limits, NetworkHint, Origin, RecordKind, Resumption, Send,
        Welcome, WireTime,
    },
    id::{ConversationId, DeviceClass, DeviceUid, Epoch, Pseq, Seq, UnixMillis},
    producer::{Decision, Lane, Parked, fingerprint},
    session::{
        client::{self, Client, ClientConfig, Restored},
        gateway::{self, Gateway, GatewayConfig},
        hedge::{Hedges, Left},
    },
    version::Features,
};

const RTT: Duration = Duration::from_millis(100);
const ACK_DELAY: Duration = Duration::from_millis(25);
const SENDER: usize = 0;
const READER: usize = 1;

fn n<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).ok().expect("small")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Up,
    Down,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Arrives(usize, Way, u64),
    Acknowledged(usize, Way, u64),
    Look(usize, Way),
    Timer,
    Say(u64),
}

/// A frame, and its place in its stream.
type Placed = (Channel, u64, Frame);

/// One direction of one connection.
#[derive(Debug, Default)]
struct Path {
    packets: u64,
    /// Sent and neither acknowledged nor given up: when, and what it carried.
    flying: BTreeMap<u64, (Duration, Vec<Placed>)>,
    /// Frames of lost packets that are not to be repeated, and of packets on their way.
    carried: BTreeMap<u64, Vec<Placed>>,
    written: BTreeMap<Channel, u64>,
    read: BTreeMap<Channel, u64>,
    early: BTreeMap<(Channel, u64), Frame>,
    largest_acked: Option<u64>,
    last_sent: Duration,
    probes: u32,
}

#[derive(Debug)]
struct Link {
    client: Client,
    gateway: Gateway,
    hedges: Hedges<Seq, Bytes>,
    up: Path,
    down: Path,
}

impl Link {
    fn path(&mut self, way: Way) -> &mut Path {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }
}

struct World {
    now: Duration,
    chance: u64,
    /// Of a thousand packets, so many are lost.
    loss: u64,
    jitter: f64,
    hedges: bool,
    /// The next packet on this path with a message is lost, as often as this says.
    drops: (usize, Way, u32),
    links: [Link; 2],
    agenda: BinaryHeap<Reverse<(Duration, u64, What)>>,
    planned: u64,
    lane: Lane,
    parked: Parked<Send>,
    log: Vec<Send>,
    said: BTreeMap<u64, Duration>,
    arrived: BTreeMap<u64, Duration>,
    acked: BTreeMap<u64, Duration>,
    read: BTreeMap<u64, Duration>,
    frame_bytes: u64,
}

fn link(index: u8, features: Features) -> Link {
    let mut config = ClientConfig::new(DeviceUid([index; 16]), DeviceClass::Phone);
    config.features = features;
    config.keepalive = Duration::from_secs(120);
    let restored = Restored { epoch: Epoch::FIRST, device: Some(n(1)), ..Restored::default() };
    Link {
        client: Client::new(config, restored),
        gateway: Gateway::new(GatewayConfig::default(), Duration::ZERO),
        hedges: Hedges::new(Some(RTT)),
        up: Path::default(),
        down: Path::default(),
    }
}

fn conversation() -> ConversationId {
    n(256)
}

impl World {
    fn new(seed: u64, loss: u64, jitter: f64, hedges: bool) -> Self {
        let features = if hedges { Features::OURS } else { Features::OURS.without(Features::HEDGE) };
        let mut world = Self {
            now: Duration::from_secs(10),
            chance: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            loss: 0,
            jitter,
            hedges,
            drops: (0, Way::Up, 0),
            links: [link(0, features), link(1, features)],
            agenda: BinaryHeap::new(),
            planned: 0,
            lane: Lane::new(Epoch::FIRST),
            parked: Parked::default(),
            log: Vec::new(),
            said: BTreeMap::new(),
            arrived: BTreeMap::new(),
            acked: BTreeMap::new(),
            read: BTreeMap::new(),
            frame_bytes: 0,
        };
        for index in [SENDER, READER] {
            let hint = NetworkHint::default();
            world.links[index].client.connect(AuthProof::Token("t".to_owned()), hint, world.now);
            world.flush(index);
        }
        world.run(Duration::from_secs(2));
        world.loss = loss;
        world
    }

    /// A number below `below`.
    fn draw(&mut self, below: u64) -> u64 {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        (self.chance >> 20) % below
    }

    fn delay(&mut self) -> Duration {
        let part = self.draw(2_001) as f64 / 1_000.0 - 1.0;
        (RTT / 2).mul_f64(1.0 + self.jitter * part)
    }

    fn plan(&mut self, at: Duration, what: What) {
        self.planned += 1;
        self.agenda.push(Reverse((at, self.planned, what)));
    }

    /// What quinn's estimator knows of such a path.
    fn variation(&self) -> Duration {
        RTT.mul_f64(self.jitter / 3.0).max(Duration::from_millis(1))
    }

    // ---- The network ----

    fn transmit(&mut self, index: usize, way: Way, frames: Vec<Placed>) {
        let now = self.now;
        let message = frames.iter().any(|(_, _, frame)| matches!(frame, Frame::Send(_) | Frame::Deliver(_)));
        let copy = frames.iter().all(|(channel, ..)| *channel == Channel::Datagram);
        let delay = self.delay();
        let mut lost = self.draw(1_000) < self.loss;
        if message && !copy && (self.drops.0, self.drops.1) == (index, way) && self.drops.2 > 0 {
            self.drops.2 -= 1;
            lost = true;
        }
        let path = self.links[index].path(way);
        path.packets += 1;
        let number = path.packets;
        path.flying.insert(number, (now, frames.clone()));
        path.last_sent = now;
        if !lost {
            path.carried.insert(number, frames);
            self.plan(now + delay, What::Arrives(index, way, number));
        }
        self.plan_probe(index, way);
    }

    fn probe_at(&mut self, index: usize, way: Way) -> Option<Duration> {
        let after = RTT + 4 * self.variation() + ACK_DELAY;
        let path = self.links[index].path(way);
        (!path.flying.is_empty()).then(|| path.last_sent + after * (1 << path.probes.min(10)))
    }

    fn plan_probe(&mut self, index: usize, way: Way) {
        if let Some(at) = self.probe_at(index, way) {
            self.plan(at, What::Look(index, way));
        }
    }

    fn arrives(&mut self, index: usize, way: Way, number: u64) {
        let back = self.delay();
        let path = self.links[index].path(way);
        let frames = path.carried.remove(&number).unwrap_or_default();
        let gap = path.flying.keys().next().is_some_and(|first| *first < number);
        let at = self.now + back + if gap { Duration::ZERO } else { ACK_DELAY };
        for (channel, place, frame) in frames {
            if channel == Channel::Datagram {
                self.take(index, way, channel, frame);
                continue;
            }
            self.links[index].path(way).early.insert((channel, place), frame);
            loop {
                let path = self.links[index].path(way);
                let next = path.read.entry(channel).or_default();
                let Some(frame) = path.early.remove(&(channel, *next)) else { break };
                *next += 1;
                self.take(index, way, channel, frame);
            }
        }
        self.plan(at, What::Acknowledged(index, way, number));
        self.flush(index);
    }

    fn acknowledged(&mut self, index: usize, way: Way, number: u64) {
        let path = self.links[index].path(way);
        path.flying.remove(&number);
        path.probes = 0;
        path.largest_acked = path.largest_acked.max(Some(number));
        self.find_lost(index, way);
        self.plan_probe(index, way);
    }

    fn find_lost(&mut self, index: usize, way: Way) {
        let now = self.now;
        let after = RTT * 9 / 8;
        let path = self.links[index].path(way);
        let Some(largest) = path.largest_acked else { return };
        let mut lost = Vec::new();
        let mut look = None;
        for (number, (sent, _)) in path.flying.range(..largest) {
            if *sent + after <= now || number + 3 <= largest {
                lost.push(*number);
            } else {
                look = Some(*sent + after);
            }
        }
        let frames =
            lost.into_iter().filter_map(|number| path.flying.remove(&number)).flat_map(|lost| lost.1);
        let again: Vec<_> = frames.filter(|(channel, ..)| *channel != Channel::Datagram).collect();
        if !again.is_empty() {
            self.transmit(index, way, again);
        }
        if let Some(at) = look {
            self.plan(at, What::Look(index, way));
        }
    }

    fn look(&mut self, index: usize, way: Way) {
        self.find_lost(index, way);
        if self.probe_at(index, way).is_some_and(|at| at <= self.now) {
            self.links[index].path(way).probes += 1;
            (0..2).for_each(|_| self.transmit(index, way, Vec::new()));
        }
    }

    // ---- The two ends ----

    /// What a half wants to send now goes into one packet.
    fn flush(&mut self, index: usize) {
        let mut up = Vec::new();
        while let Some(output) = self.links[index].client.poll_output() {
            match output {
                client::Output::Transmit(channel, frame) => up.push((channel, frame)),
                client::Output::Acked { pseq, .. } => {
                    self.acked.entry(pseq.get()).or_insert(self.now);
                }
                client::Output::Deliver(record) => {
                    if index == READER {
                        self.read.insert(record.seq.get(), self.now);
                    }
                    let now = self.now;
                    self.links[index].client.committed(record.conversation, record.seq, now);
                }
                _ => {}
            }
        }
        self.write(index, Way::Up, up);
        let mut down = Vec::new();
        while let Some(output) = self.links[index].gateway.poll_output() {
            match output {
                gateway::Output::Transmit(frame) => down.push((Channel::Control, frame)),
                gateway::Output::Datagram(frame) => down.push((Channel::Datagram, frame)),
                gateway::Output::Authenticate(_) => {
                    let (now, hedges) = (self.now, self.hedges);
                    self.links[index].gateway.welcome(welcome(hedges), now);
                }
                gateway::Output::Send(send) => self.offer(send),
                gateway::Output::Ack(ack) => {
                    for (conversation, seq) in ack.entries {
                        let now = self.now;
                        self.links[index].hedges.answered_up_to(conversation, seq, now);
                    }
                }
                gateway::Output::Close { code, reason } => panic!("{code:?} {reason}"),
                _ => {}
            }
        }
        self.write(index, Way::Down, down);
        let link = &self.links[index];
        let timers = [link.client.poll_timeout(), link.hedges.next_due()];
        for at in timers.into_iter().flatten() {
            self.plan(at, What::Timer);
        }
    }

    fn write(&mut self, index: usize, way: Way, frames: Vec<(Channel, Frame)>) {
        if frames.is_empty() {
            return;
        }
        let now = self.now;
        let bytes: usize = frames.iter().map(|(_, frame)| frame.encoded_len()).sum();
        self.frame_bytes += bytes as u64;
        if way == Way::Down {
            self.links[index].hedges.left(bytes, now);
        }
        let path = self.links[index].path(way);
        let mut placed = Vec::new();
        for (channel, frame) in frames {
            let place = path.written.entry(channel).or_default();
            placed.push((channel, *place, frame));
            *place += 1;
        }
        self.transmit(index, way, placed);
    }

    fn take(&mut self, index: usize, way: Way, channel: Channel, frame: Frame) {
        let now = self.now;
        let link = &mut self.links[index];
        match way {
            Way::Up => link.gateway.handle(channel, frame, now).expect("the client keeps the rules"),
            Way::Down => link.client.handle(channel, frame, now).expect("the gateway keeps the rules"),
        }
        self.flush(index);
    }

    fn offer(&mut self, send: Send) {
        let now = self.now;
        let pseq = send.pseq;
        self.arrived.entry(pseq.get()).or_insert(now);
        let print = fingerprint(&send);
        match self.lane.offer(Epoch::FIRST, pseq, print) {
            Decision::Append => {
                let seq: Seq = n(self.log.len() as u64 + 1);
                self.lane.appended(pseq, seq, print);
                self.log.push(send.clone());
                self.links[SENDER].gateway.acked(conversation(), pseq, seq, UnixMillis::default());
                self.deliver(SENDER, &send, seq);
                self.deliver(READER, &send, seq);
                while let Some(parked) = self.parked.take_next(self.lane.last()) {
                    self.offer(parked);
                }
            }
            Decision::Again { seq } => {
                let seq = seq.expect("remembered");
                self.links[SENDER].gateway.acked(conversation(), pseq, seq, UnixMillis::default());
            }
            Decision::Early { .. } => {
                let until = now + Duration::from_secs(1);
                self.parked.insert(pseq, send, until).expect("room");
            }
            decision => panic!("{decision:?}"),
        }
    }

    fn deliver(&mut self, index: usize, send: &Send, seq: Seq) {
        let now = self.now;
        let origin = Origin { device: n(1), epoch: Epoch::FIRST, pseq: send.pseq };
        let frame = Frame::Deliver(Deliver {
            kind: RecordKind::Message,
            conversation: conversation(),
            seq,
            sender: n(257),
            time: WireTime::short(UnixMillis::default()),
            origin: (index == SENDER).then_some(origin),
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            payload: send.payload.clone(),
        });
        let size = frame.encoded_len();
        if self.hedges {
            let left = Left { size, hedge: true, timed: true, patience: Duration::ZERO };
            self.links[index].hedges.sent(conversation(), seq, frame.to_bytes(), left, now);
        }
        self.write(index, Way::Down, vec![(Channel::Lane(0), frame)]);
    }

    fn timers(&mut self) {
        let now = self.now;
        for index in [SENDER, READER] {
            if self.links[index].client.poll_timeout().is_some_and(|at| at <= now) {
                self.links[index].client.handle_timeout(now);
            }
            let mut copies = Vec::new();
            while let Some((_, _, bytes)) = self.links[index].hedges.take_due(now) {
                copies.push(bytes.clone());
            }
            for bytes in copies {
                let frame = Frame::decode(bytes.slice(if bytes[0] < 64 { 1.. } else { 2.. }));
                let frame = frame.expect("whole").expect("known");
                self.frame_bytes += frame.encoded_len() as u64;
                self.transmit(index, Way::Down, vec![(Channel::Datagram, 0, frame)]);
            }
            self.flush(index);
        }
    }

    fn say(&mut self, number: u64) {
        let now = self.now;
        self.said.insert(number, now);
        let send = Send {
            kind: RecordKind::Message,
            conversation: conversation(),
            pseq: Pseq::new(number).expect("small"),
            seen: Seq::ZERO,
            reference: None,
            ttl: None,
            more: false,
            continues: false,
            silent: false,
            cancel: false,
            payload: Bytes::from(vec![b'x'; 100]),
        };
        self.links[SENDER].client.send(send, now).expect("room");
        self.flush(SENDER);
    }

    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(Reverse((at, ..))) = self.agenda.peek()
            && *at <= until
        {
            let Some(Reverse((at, _, what))) = self.agenda.pop() else { break };
            self.now = at;
            match what {
                What::Arrives(index, way, number) => self.arrives(index, way, number),
                What::Acknowledged(index, way, number) => self.acknowledged(index, way, number),
                What::Look(index, way) => self.look(index, way),
                What::Timer => self.timers(),
                What::Say(number) => self.say(number),
            }
        }
        self.now = until;
    }

    /// A message each second.
    fn chat(&mut self, messages: u64) {
        let first = self.said.len() as u64 + 1;
        for number in first..first + messages {
            let late = self.draw(200_000);
            let at = self.now + Duration::from_secs(number - first) + Duration::from_micros(late);
            self.plan(at, What::Say(number));
        }
        self.run(Duration::from_secs(messages + 1));
    }

    /// Round trips from saying a message to this.
    fn took(&self, since: &BTreeMap<u64, Duration>, until: &BTreeMap<u64, Duration>, number: u64) -> f64 {
        let (Some(since), Some(until)) = (since.get(&number), until.get(&number)) else {
            return f64::INFINITY;
        };
        (*until - *since).as_secs_f64() / RTT.as_secs_f64()
    }
}

fn welcome(hedges: bool) -> Welcome {
    let features = if hedges { Features::OURS } else { Features::OURS.without(Features::HEDGE) };
    Welcome {
        minor: 0,
        features: features.0,
        session: n(1),
        ticket: Default::default(),
        user: n(257),
        device: n(1),
        epoch: Epoch::FIRST,
        class_epoch: n(1),
        server_time: n(1_790_000_000_000),
        lanes: 4,
        limits: Limits::default(),
        keepalive_ms: (15_000, 120_000),
        resumption: Resumption::Resumed,
        addresses: Vec::new(),
        folder: None,
    }
}

fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((values.len() * percent / 100).min(values.len() - 1)).copied().unwrap_or(f64::INFINITY)
}

/// Percentiles 50 and 95, in round trips, of the way of a lone message whose packet is lost.
fn lone(way: Way, jitter: f64, hedges: bool) -> (f64, f64) {
    let mut took: Vec<f64> = (0..150)
        .map(|seed| {
            let mut world = World::new(seed, 0, jitter, hedges);
            world.chat(12);
            world.drops = if way == Way::Up { (SENDER, way, 1) } else { (READER, way, 1) };
            world.chat(1);
            world.run(Duration::from_secs(2));
            match way {
                Way::Up => world.took(&world.said, &world.arrived, 13),
                Way::Down => world.took(&world.arrived, &world.read, 13),
            }
        })
        .collect();
    (percentile(&mut took, 50), percentile(&mut took, 95))
}

#[test]
fn a_lone_lost_message_takes_less_than_two_round_trips() {
    for way in [Way::Up, Way::Down] {
        for (jitter, p50_max, p95_max) in [(0.0, 1.8, 1.8), (0.3, 1.95, 2.3)] {
            let stock = lone(way, jitter, false);
            let (p50, p95) = lone(way, jitter, true);
            println!(
                "{way:?}, jitter {jitter}: p50 {p50:.2}, p95 {p95:.2} RTT; without copies {:.2}, {:.2}",
                stock.0, stock.1
            );
            assert!(stock.0 > 2.5, "the model makes a lone loss as expensive as it is: {stock:?}");
            assert!(
                p50 <= p50_max && p95 <= p95_max,
                "{way:?}, jitter {jitter}: p50 {p50:.2}, p95 {p95:.2} RTT"
            );
        }
    }
}

/// A chat of a message a second with 5 % loss: percentile 99 of each way, 95 of both together (one in a hundred loses two
/// packets), 99 of the ack, the worst ack, bytes of frames.
fn chat(hedges: bool) -> [f64; 6] {
    let (mut up, mut down, mut read, mut ack, mut bytes) = (vec![], vec![], vec![], vec![], 0);
    for seed in 0..20 {
        let mut world = World::new(seed, 50, 0.0, hedges);
        world.chat(150);
        world.loss = 0;
        world.run(Duration::from_secs(60));
        for number in 1..=150 {
            up.push(world.took(&world.said, &world.arrived, number));
            down.push(world.took(&world.arrived, &world.read, number));
            read.push(world.took(&world.said, &world.read, number));
            ack.push(world.took(&world.said, &world.acked, number));
        }
        bytes += world.frame_bytes;
    }
    let [up, down] = [&mut up, &mut down].map(|values| percentile(values, 99));
    [up, down, percentile(&mut read, 95), percentile(&mut ack, 99), percentile(&mut ack, 100), bytes as f64]
}

#[test]
fn a_chat_with_one_packet_in_twenty_lost_stays_quick() {
    let (stock, ours) = (chat(false), chat(true));
    println!(
        "up, down p99, both p95, ack p99, worst ack (RTT), bytes: {stock:.2?} without copies, {ours:.2?} with"
    );
    assert!(stock[0] > 2.7 && stock[1] > 2.7, "{stock:?}");
    assert!(ours[0] <= 2.0 && ours[1] <= 2.0 && ours[2] <= 2.3 && ours[3] <= 2.5, "{ours:?}");
    assert!(ours[5] <= stock[5] * 1.15, "copies cost {} bytes on top of {}", ours[5] - stock[5], stock[5]);
}

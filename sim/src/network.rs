//! The network of a world: who can reach whom, through which link, and what becomes of every packet.
//!
//! - A phone is in at most one network at a time ([`Net::attach`]). Each has its own links up and down, its own NAT and
//!   its own rules; what is on its way when the phone leaves arrives nowhere.
//! - A gateway sees a phone only by the address its NAT shows. A mapping is made by the first packet out, serves that
//!   gateway alone, and is gone when the NAT forgets it.
//! - Everything that happens to a packet is one line of the log, and what was a fault is counted where it happened.
//! - Time is the runtime's, to its millisecond: a packet arrives in the first millisecond at or after its moment.
//! - Bounded: packets in flight ([`FLIGHTS_MAX`]), each socket's queue, NAT mappings; what is beyond is dropped.
//!
//! Not here: what a link does to a packet (`fulmar_badnet::net`), sockets as quinn sees them (`socket`), streams as the
//! gateway and the SDK see them (`stream`).

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use fulmar_badnet::net::{DropCause, Link, Path, Verdict};
use fulmar_badnet::{Rng, SimTime};
use quinn::udp::EcnCodepoint;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::bite::{Bite, Bites};
use crate::log::Log;
use crate::spent::{Antenna, Spent};
use crate::tcp::{End, Segment};

/// Packets in flight in the whole world.
const FLIGHTS_MAX: usize = 200_000;

/// Bytes a phone's socket holds for its reader unless said; what comes beyond is dropped.
const PHONE_QUEUE_BYTES: usize = 208 * 1024;

/// The same for a gateway's socket.
const GATEWAY_QUEUE_BYTES: usize = 4 * 1024 * 1024;

/// Mappings of one NAT.
const MAPPINGS_MAX: usize = 1_024;

/// Streams that wait to be accepted by one listener.
const BACKLOG_MAX: usize = 128;

/// Which phone, counted from 0.
pub(crate) type PhoneId = usize;

/// One of the two directions of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the phone to the gateway.
    Up,
    /// From the gateway to the phone.
    Down,
}

/// Who holds a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Phone(PhoneId),
    Gateway,
}

/// Which end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Phone,
    Gateway,
}

/// A datagram that has arrived.
#[derive(Debug)]
pub(crate) struct Datagram {
    pub(crate) from: SocketAddr,
    pub(crate) ecn: Option<EcnCodepoint>,
    pub(crate) bytes: Vec<u8>,
}

/// The network; cheap to share.
#[derive(Debug)]
pub(crate) struct Net {
    state: Mutex<State>,
    /// The next arrival may be earlier than the driver thinks.
    sooner: Notify,
}

struct State {
    start: Instant,
    rng: Rng,
    log: Log,
    bites: Bites,
    phones: Vec<Phone>,
    /// Public address → which network of which phone.
    publics: BTreeMap<Ipv4Addr, (PhoneId, u32)>,
    networks: u32,
    gateways: BTreeMap<SocketAddr, u64>,
    listeners: BTreeMap<SocketAddr, Listener>,
    sockets: BTreeMap<u64, Socket>,
    streams: BTreeMap<u64, Stream>,
    flights: BinaryHeap<Flight>,
    serial: u64,
}

#[derive(Debug, Default)]
struct Phone {
    network: Option<Network>,
    /// Sockets go on through a new network (as one bound to no interface does), or are dead with the old one.
    sockets_follow: bool,
    last_used: Option<u32>,
    next_port: u16,
    /// Bytes each of its sockets holds.
    queue_bytes: usize,
    traffic: Traffic,
    antenna: Antenna,
}

/// What a phone's links have carried, dropped packets included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets the phone sent.
    pub sent_packets: u64,
    /// Their bytes, without IP and UDP headers.
    pub sent_bytes: u64,
    /// Packets that were sent to the phone.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
}

/// A network a phone is in.
#[derive(Debug)]
struct Network {
    id: u32,
    up: Way,
    down: Way,
    rng: Rng,
    nat: Nat,
    rules: Rules,
}

#[derive(Debug)]
struct Way {
    link: Link,
    cut: bool,
    dark_until: SimTime,
    latest: SimTime,
}

/// What a network lets through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) udp_blocked: bool,
    /// Only packets with a long header (QUIC's handshakes) get through.
    pub(crate) data_blocked: bool,
}

#[derive(Debug, Default)]
struct Nat {
    idle_max: Option<Duration>,
    out: BTreeMap<(u16, SocketAddr), Mapping>,
    back: BTreeMap<u16, (u16, SocketAddr)>,
    next_port: u16,
}

#[derive(Debug)]
struct Mapping {
    public: Option<u16>,
    last: SimTime,
    /// Why there was none any more.
    lost: Option<Bite>,
}

struct Socket {
    owner: Owner,
    local: SocketAddr,
    /// The network it was made in.
    born: u32,
    queue: VecDeque<Datagram>,
    queued: usize,
    waker: Option<Waker>,
    open: bool,
}

#[derive(Debug, Default)]
struct Listener {
    waiting: VecDeque<(u64, SocketAddr)>,
    waker: Option<Waker>,
}

struct Stream {
    phone: PhoneId,
    network: u32,
    remote: SocketAddr,
    port: u16,
    ends: [Option<End>; 2],
    wakers: [Vec<Waker>; 2],
    /// Nobody holds this end any more.
    left: [bool; 2],
    accepted: bool,
    resent: [u64; 2],
    timers: [Option<SimTime>; 2],
}

enum Cargo {
    Udp { bytes: Vec<u8>, ecn: Option<EcnCodepoint>, port: u16, remote: SocketAddr },
    Tcp { stream: u64, segment: Segment },
    Timer { stream: u64, side: Side },
}

struct Flight {
    at: SimTime,
    serial: u64,
    direction: Direction,
    phone: PhoneId,
    network: u32,
    cargo: Cargo,
}

impl Net {
    /// A network without phones or gateways; its time starts now.
    pub(crate) fn new(rng: Rng, keep_log: bool) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                start: Instant::now(),
                rng,
                log: Log::new(keep_log),
                bites: Bites::default(),
                phones: Vec::new(),
                publics: BTreeMap::new(),
                networks: 0,
                gateways: BTreeMap::new(),
                listeners: BTreeMap::new(),
                sockets: BTreeMap::new(),
                streams: BTreeMap::new(),
                flights: BinaryHeap::new(),
                serial: 0,
            }),
            sooner: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic anywhere ends the world; what is left is only reported.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries packets to where they arrive, for ever.
    pub(crate) async fn drive(&self) {
        loop {
            let next = self.lock().arrive();
            match next {
                Some(at) => {
                    let at = self.instant(at);
                    tokio::select! {
                        biased;
                        () = self.sooner.notified() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
                None => self.sooner.notified().await,
            }
        }
    }

    /// Now, in the world's time.
    pub(crate) fn now(&self) -> SimTime {
        self.lock().now()
    }

    fn instant(&self, at: SimTime) -> Instant {
        self.lock().start + at.since(SimTime::START)
    }

    /// A line of the log about something that is no packet.
    pub(crate) fn note(&self, what: fmt::Arguments<'_>) {
        let mut state = self.lock();
        let now = state.now();
        state.log.line(now, what);
    }

    /// A fault that bit elsewhere.
    pub(crate) fn bite(&self, bite: Bite, what: fmt::Arguments<'_>) {
        let mut state = self.lock();
        let now = state.now();
        state.bites.count(bite);
        state.log.line(now, format_args!("{bite}: {what}"));
    }

    /// What bit so far.
    pub(crate) fn bites(&self) -> Bites {
        self.lock().bites.clone()
    }

    /// Takes the log; an empty one begins.
    pub(crate) fn take_log(&self) -> Log {
        std::mem::replace(&mut self.lock().log, Log::new(false))
    }

    /// A new phone, without a network.
    pub(crate) fn add_phone(&self) -> PhoneId {
        let mut state = self.lock();
        let queue_bytes = PHONE_QUEUE_BYTES;
        state.phones.push(Phone { sockets_follow: true, next_port: 40_000, queue_bytes, ..Phone::default() });
        state.phones.len() - 1
    }

    /// What a phone's links have carried so far.
    pub(crate) fn traffic(&self, phone: PhoneId) -> Traffic {
        self.lock().phones.get(phone).map(|phone| phone.traffic).unwrap_or_default()
    }

    /// What a phone has spent so far; what its processor did is not known here.
    pub(crate) fn spent(&self, phone: PhoneId) -> Spent {
        let state = self.lock();
        let now = state.now();
        state.phones.get(phone).map(|phone| phone.antenna.spent(phone.traffic, now)).unwrap_or_default()
    }

    /// From now on the phone is in a new network with this path. What was its network before is out of reach.
    pub(crate) fn attach(&self, phone: PhoneId, path: Path) {
        let mut state = self.lock();
        let now = state.now();
        state.networks += 1;
        let id = state.networks;
        let public = Ipv4Addr::from(0x6440_0000 + id);
        let rng = state.rng.fork(u64::from(id) << 8);
        let network = Network {
            id,
            up: Way::new(path.up),
            down: Way::new(path.down),
            rng,
            nat: Nat { next_port: 20_000, ..Nat::default() },
            rules: Rules::default(),
        };
        state.publics.insert(public, (phone, id));
        if let Some(phone) = state.phones.get_mut(phone) {
            phone.network = Some(network);
        }
        state.log.line(now, format_args!("phone {phone} is in network {id}"));
    }

    /// The phone has no network any more.
    pub(crate) fn detach(&self, phone: PhoneId) {
        self.change(phone, "has no network", |phone| phone.network = None);
    }

    /// Whether the phone is in a network.
    pub(crate) fn is_attached(&self, phone: PhoneId) -> bool {
        self.lock().phones.get(phone).is_some_and(|phone| phone.network.is_some())
    }

    /// Whether sockets live on when the phone changes its network.
    pub(crate) fn sockets_follow(&self, phone: PhoneId, follow: bool) {
        self.change(phone, "decides about its sockets", |phone| phone.sockets_follow = follow);
    }

    /// How many bytes each socket of the phone holds for its reader; `None`: as many as it did at first.
    pub(crate) fn set_socket_room(&self, phone: PhoneId, bytes: Option<usize>) {
        self.change(phone, "has other sockets", |phone| {
            phone.queue_bytes = bytes.unwrap_or(PHONE_QUEUE_BYTES);
        });
    }

    /// The phone's network gets another path.
    pub(crate) fn set_path(&self, phone: PhoneId, path: Path) {
        self.network(phone, "has another path", |network| {
            network.up.link.set(path.up);
            network.down.link.set(path.down);
        });
    }

    /// Nothing gets through in either direction for so long.
    pub(crate) fn black_out(&self, phone: PhoneId, lasts: Duration) {
        let until = self.now() + lasts;
        self.network(phone, "is in the dark", |network| {
            for way in [&mut network.up, &mut network.down] {
                way.link.black_out(until);
                way.dark_until = way.dark_until.max(until);
            }
        });
    }

    /// One direction is cut (`true`) or mended.
    pub(crate) fn cut(&self, phone: PhoneId, direction: Direction, cut: bool) {
        self.network(phone, if cut { "is cut one way" } else { "is mended" }, |network| {
            let way = network.way(direction);
            way.link.set_cut(cut);
            way.cut = cut;
        });
    }

    /// The phone's NAT forgets everything.
    pub(crate) fn rebind(&self, phone: PhoneId) {
        self.network(phone, "has a NAT that forgets", |network| {
            network.nat.back.clear();
            for mapping in network.nat.out.values_mut() {
                if mapping.public.take().is_some() {
                    mapping.lost = Some(Bite::NatRebound);
                }
            }
        });
    }

    /// The phone's NAT forgets what was idle for longer.
    pub(crate) fn nat_idle_max(&self, phone: PhoneId, idle_max: Option<Duration>) {
        self.network(phone, "has a NAT with a time limit", |network| network.nat.idle_max = idle_max);
    }

    /// What the phone's network lets through from now on.
    pub(crate) fn set_rules(&self, phone: PhoneId, rules: Rules) {
        self.network(phone, "has other rules", |network| network.rules = rules);
    }

    fn change(&self, id: PhoneId, what: &str, change: impl FnOnce(&mut Phone)) {
        let mut state = self.lock();
        let now = state.now();
        state.log.line(now, format_args!("phone {id} {what}"));
        if let Some(phone) = state.phones.get_mut(id) {
            change(phone);
        }
    }

    fn network(&self, id: PhoneId, what: &str, change: impl FnOnce(&mut Network)) {
        self.change(id, what, |phone| {
            if let Some(network) = &mut phone.network {
                change(network);
            }
        });
    }

    /// A socket on a phone, or at a gateway's address. `None`: the address is taken.
    pub(crate) fn bind(&self, owner: Owner, local: SocketAddr) -> Option<(u64, SocketAddr)> {
        let mut state = self.lock();
        state.serial += 1;
        let id = state.serial;
        let (local, born) = match owner {
            Owner::Phone(phone) => {
                let phone = state.phones.get_mut(phone)?;
                let port = if local.port() == 0 { phone.port() } else { local.port() };
                let born = phone.network.as_ref().map_or(0, |network| network.id);
                (SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port), born)
            }
            Owner::Gateway => {
                if state.gateways.contains_key(&local) {
                    return None;
                }
                state.gateways.insert(local, id);
                (local, 0)
            }
        };
        let socket =
            Socket { owner, local, born, queue: VecDeque::new(), queued: 0, waker: None, open: true };
        state.sockets.insert(id, socket);
        Some((id, local))
    }

    /// Nothing comes to the socket any more and nothing leaves it.
    pub(crate) fn close(&self, id: u64) {
        let mut state = self.lock();
        if let Some(socket) = state.sockets.remove(&id)
            && state.gateways.get(&socket.local) == Some(&id)
        {
            state.gateways.remove(&socket.local);
        }
    }

    /// Every socket and stream of `owner` is gone from this moment on, without a word.
    pub(crate) fn vanish(&self, owner: Owner) {
        let mut state = self.lock();
        let mut gone = Vec::new();
        for (id, socket) in &mut state.sockets {
            if socket.owner == owner {
                socket.open = false;
                socket.queue.clear();
                socket.queued = 0;
                gone.push((*id, socket.local));
            }
        }
        if owner == Owner::Gateway {
            for (_, local) in gone {
                state.gateways.remove(&local);
            }
            state.listeners.clear();
        }
        let side = match owner {
            Owner::Phone(_) => Side::Phone,
            Owner::Gateway => Side::Gateway,
        };
        for stream in state.streams.values_mut() {
            if owner == Owner::Gateway || owner == Owner::Phone(stream.phone) {
                let side = side as usize;
                if let Some(end) = stream.ends.get_mut(side) {
                    *end = None;
                }
                if let Some(wakers) = stream.wakers.get_mut(side) {
                    wakers.drain(..).for_each(Waker::wake);
                }
            }
        }
    }

    /// Sends a datagram.
    pub(crate) fn send(&self, id: u64, to: SocketAddr, ecn: Option<EcnCodepoint>, bytes: &[u8]) {
        let sooner = self.lock().send(id, to, ecn, bytes);
        if sooner {
            self.sooner.notify_one();
        }
    }

    /// The datagrams that wait at a socket, at most `max`; none: `waker` is woken when one comes.
    pub(crate) fn receive(&self, id: u64, max: usize, waker: &Waker) -> Vec<Datagram> {
        let mut state = self.lock();
        let Some(socket) = state.sockets.get_mut(&id) else { return Vec::new() };
        let taken: Vec<Datagram> = socket.queue.drain(..max.min(socket.queue.len())).collect();
        socket.queued -= taken.iter().map(|datagram| datagram.bytes.len()).sum::<usize>();
        if taken.is_empty() {
            socket.waker = Some(waker.clone());
        }
        taken
    }

    /// Streams to this address are taken from now on. `false`: the address is taken.
    pub(crate) fn listen(&self, local: SocketAddr) -> bool {
        let mut state = self.lock();
        if state.listeners.contains_key(&local) {
            return false;
        }
        state.listeners.insert(local, Listener::default());
        true
    }

    /// No streams to this address any more.
    pub(crate) fn stop_listening(&self, local: SocketAddr) {
        self.lock().listeners.remove(&local);
    }

    /// A stream somebody opened to this address, and from where; `None`: `waker` is woken when one comes.
    pub(crate) fn accept(&self, local: SocketAddr, waker: &Waker) -> Option<(u64, SocketAddr)> {
        let mut state = self.lock();
        let listener = state.listeners.get_mut(&local)?;
        let accepted = listener.waiting.pop_front();
        if accepted.is_none() {
            listener.waker = Some(waker.clone());
        }
        accepted
    }

    /// Begins to open a stream.
    pub(crate) fn open(&self, phone: PhoneId, remote: SocketAddr) -> u64 {
        let (id, sooner) = {
            let mut state = self.lock();
            state.serial += 1;
            let id = state.serial;
            let (network, port) = state.phones.get_mut(phone).map_or((0, 0), |phone| {
                phone.antenna.stream();
                (phone.network.as_ref().map_or(0, |network| network.id), phone.port())
            });
            let stream = Stream {
                phone,
                network,
                remote,
                port,
                ends: [Some(End::new(true)), None],
                wakers: [Vec::new(), Vec::new()],
                left: [false, true],
                accepted: false,
                resent: [0; 2],
                timers: [None; 2],
            };
            state.streams.insert(id, stream);
            let sooner = state.pump(id, Side::Phone);
            (id, sooner)
        };
        if sooner {
            self.sooner.notify_one();
        }
        id
    }

    /// Does something with one end of a stream; `None` when it is gone. Whatever there is to send leaves. With `wait`,
    /// the waker is woken by the next change of this end.
    pub(crate) fn with_end<T>(
        &self,
        id: u64,
        side: Side,
        wait: Option<&Waker>,
        act: impl FnOnce(&mut End) -> T,
    ) -> Option<T> {
        let (answer, sooner) = {
            let mut state = self.lock();
            let stream = state.streams.get_mut(&id)?;
            if let (Some(waker), Some(wakers)) = (wait, stream.wakers.get_mut(side as usize))
                && !wakers.iter().any(|known| known.will_wake(waker))
            {
                wakers.push(waker.clone());
            }
            let answer = act(stream.ends.get_mut(side as usize)?.as_mut()?);
            (answer, state.pump(id, side))
        };
        if sooner {
            self.sooner.notify_one();
        }
        Some(answer)
    }

    /// Nobody holds this end any more: it ends in order, or with a reset when something was not read.
    pub(crate) fn leave(&self, id: u64, side: Side) {
        let sooner = {
            let mut state = self.lock();
            let Some(stream) = state.streams.get_mut(&id) else { return };
            if let Some(left) = stream.left.get_mut(side as usize) {
                *left = true;
            }
            let Some(Some(end)) = stream.ends.get_mut(side as usize) else { return };
            if end.has_unread() || !end.is_open() {
                let segment = end.reset();
                state.ship(id, side, segment)
            } else {
                end.finish();
                state.pump(id, side)
            }
        };
        if sooner {
            self.sooner.notify_one();
        }
    }
}

impl State {
    fn now(&self) -> SimTime {
        SimTime::START + self.start.elapsed()
    }

    fn say(&mut self, what: fmt::Arguments<'_>) {
        let now = self.now();
        self.log.line(now, what);
    }

    fn send(&mut self, id: u64, to: SocketAddr, ecn: Option<EcnCodepoint>, bytes: &[u8]) -> bool {
        let Some(socket) = self.sockets.get(&id).filter(|socket| socket.open) else { return false };
        let (owner, local, born) = (socket.owner, socket.local, socket.born);
        let len = bytes.len();
        match owner {
            Owner::Phone(phone) => {
                self.count_traffic(phone, Direction::Up, len);
                if let Some(phone) = self.phones.get_mut(phone) {
                    phone.antenna.datagram(bytes);
                }
                let Some(network) = self.way_out(phone, born, local.port(), len) else { return false };
                let rules = network.rules;
                let id = network.id;
                let blocked = match bytes.first() {
                    _ if rules.udp_blocked => Some(Bite::UdpBlocked),
                    Some(first) if rules.data_blocked && first & 0x80 == 0 => Some(Bite::DataBlocked),
                    _ => None,
                };
                if let Some(bite) = blocked {
                    self.bites.count(bite);
                    self.say(format_args!("p{phone}.{id}:{} > {to} {len} {bite}", local.port()));
                    return false;
                }
                let now = self.now();
                let Some(network) = self.current(phone) else { return false };
                let (public, lost) = network.nat.map(local.port(), to, now);
                if let Some(bite) = lost {
                    self.bites.count(bite);
                    self.say(format_args!("p{phone}.{id}:{} goes on as :{public} {bite}", local.port()));
                }
                let cargo = Cargo::Udp { bytes: bytes.to_vec(), ecn, port: public, remote: to };
                self.cross(phone, Direction::Up, len, cargo)
            }
            Owner::Gateway => {
                let IpAddr::V4(ip) = to.ip() else { return false };
                let Some((phone, id)) = self.publics.get(&ip).copied() else { return false };
                self.count_traffic(phone, Direction::Down, len);
                if self.current(phone).is_none_or(|network| network.id != id) {
                    self.bites.count(Bite::OldPath);
                    self.say(format_args!("p{phone}.{id}:{} < {len} {}", to.port(), Bite::OldPath));
                    return false;
                }
                let cargo = Cargo::Udp { bytes: bytes.to_vec(), ecn, port: to.port(), remote: local };
                self.cross(phone, Direction::Down, len, cargo)
            }
        }
    }

    fn count_traffic(&mut self, phone: PhoneId, direction: Direction, len: usize) {
        let Some(phone) = self.phones.get_mut(phone) else { return };
        let (packets, bytes) = match direction {
            Direction::Up => (&mut phone.traffic.sent_packets, &mut phone.traffic.sent_bytes),
            Direction::Down => (&mut phone.traffic.received_packets, &mut phone.traffic.received_bytes),
        };
        *packets += 1;
        *bytes += len as u64;
    }

    fn current(&mut self, phone: PhoneId) -> Option<&mut Network> {
        self.phones.get_mut(phone)?.network.as_mut()
    }

    /// The network through which a socket of the phone sends, if there is one.
    fn way_out(&mut self, id: PhoneId, born: u32, port: u16, len: usize) -> Option<&Network> {
        let now = self.now();
        let phone = self.phones.get_mut(id)?;
        let Some(now_in) = phone.network.as_ref().map(|network| network.id) else {
            self.bites.count(Bite::NoNetwork);
            self.say(format_args!("p{id}:{port} {len} {}", Bite::NoNetwork));
            return None;
        };
        if born != now_in && !phone.sockets_follow {
            self.bites.count(Bite::OldPath);
            self.say(format_args!("p{id}.{born}:{port} {len} {}", Bite::OldPath));
            return None;
        }
        phone.antenna.packet(now);
        let before = phone.last_used.replace(now_in);
        if before.is_some_and(|before| before != now_in) {
            self.bites.count(Bite::AddressChanged);
            self.say(format_args!("p{id}.{now_in} {}", Bite::AddressChanged));
        }
        self.current(id).map(|network| &*network)
    }

    /// Offers a packet to the link of the phone's network. Whether the next arrival is sooner than it was.
    fn cross(&mut self, phone: PhoneId, direction: Direction, len: usize, mut cargo: Cargo) -> bool {
        let now = self.now();
        let Some(network) = self.phones.get_mut(phone).and_then(|phone| phone.network.as_mut()) else {
            return false;
        };
        let id = network.id;
        let arrow = if direction == Direction::Up { '>' } else { '<' };
        let (way, rng) = match direction {
            Direction::Up => (&mut network.up, &mut network.rng),
            Direction::Down => (&mut network.down, &mut network.rng),
        };
        let bursty = way.link.impairment().loss.burst.is_some();
        let verdict = way.link.offer(now, len, rng);
        let arrival = match verdict {
            Verdict::Drop(cause) => {
                let bite = match cause {
                    DropCause::Lost if bursty => Bite::LostInBurst,
                    DropCause::Lost => Bite::Lost,
                    DropCause::QueueFull => Bite::QueueFull,
                    DropCause::TooLarge => Bite::TooLarge,
                    DropCause::Dark if way.cut => Bite::OneWayCut,
                    DropCause::Dark if now < way.dark_until => Bite::Blackout,
                    DropCause::Dark => Bite::DarkSpell,
                };
                self.bites.count(bite);
                self.say(format_args!("p{phone}.{id} {arrow} {cargo} {len} {bite}"));
                return false;
            }
            Verdict::Deliver(arrival) => arrival,
        };
        if arrival.at < way.latest {
            self.bites.count(Bite::Overtaken);
        }
        way.latest = way.latest.max(arrival.at);
        let mut broken_segment = false;
        if let Some(bit) = arrival.flipped_bit {
            self.bites.count(Bite::Corrupted);
            match &mut cargo {
                Cargo::Udp { bytes, .. } => {
                    let at = usize::try_from(bit / 8).unwrap_or(usize::MAX);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << (bit % 8);
                    }
                }
                // TCP's checksum notices.
                Cargo::Tcp { .. } | Cargo::Timer { .. } => broken_segment = true,
            }
        }
        if arrival.again_at.is_some() {
            self.bites.count(Bite::Doubled);
        }
        let (at, again) = (arrival.at.as_nanos(), arrival.again_at.map_or(0, SimTime::as_nanos));
        let bit = arrival.flipped_bit;
        self.say(format_args!("p{phone}.{id} {arrow} {cargo} {len} at {at} {again} {bit:?}"));
        if broken_segment {
            return false;
        }
        let again = arrival.again_at.and_then(|at| Some((at, cargo.copy()?)));
        let mut sooner =
            self.launch(Flight { at: arrival.at, serial: 0, direction, phone, network: id, cargo });
        if let Some((at, cargo)) = again {
            sooner |= self.launch(Flight { at, serial: 0, direction, phone, network: id, cargo });
        }
        sooner
    }

    fn launch(&mut self, mut flight: Flight) -> bool {
        if self.flights.len() >= FLIGHTS_MAX {
            return false;
        }
        self.serial += 1;
        flight.serial = self.serial;
        let sooner = self.flights.peek().is_none_or(|next| flight.at < next.at);
        self.flights.push(flight);
        sooner
    }

    /// Everything that is due arrives; when the next thing does.
    fn arrive(&mut self) -> Option<SimTime> {
        let now = self.now();
        while let Some(next) = self.flights.peek() {
            if next.at > now {
                return Some(next.at);
            }
            let Some(flight) = self.flights.pop() else { break };
            self.arrived(flight, now);
        }
        None
    }

    fn arrived(&mut self, flight: Flight, now: SimTime) {
        let Flight { direction, phone, network: id, cargo, .. } = flight;
        let here = self.current(phone).is_some_and(|network| network.id == id);
        match (direction, cargo) {
            (_, Cargo::Timer { stream, side }) => self.timer(stream, side, now),
            (Direction::Up, Cargo::Udp { bytes, ecn, port, remote }) => {
                let public = Ipv4Addr::from(0x6440_0000 + id);
                let from = SocketAddr::new(IpAddr::V4(public), port);
                let Some(socket) = self.gateways.get(&remote).copied() else {
                    self.bites.count(Bite::NobodyThere);
                    self.say(format_args!("{from} > {remote} {} {}", bytes.len(), Bite::NobodyThere));
                    return;
                };
                self.enqueue(socket, Datagram { from, ecn, bytes });
            }
            (Direction::Down, Cargo::Udp { bytes, ecn, port, remote }) => {
                let len = bytes.len();
                if !here {
                    self.bites.count(Bite::OldPath);
                    self.say(format_args!("p{phone}.{id}:{port} < {len} {}", Bite::OldPath));
                    return;
                }
                let Some(network) = self.current(phone) else { return };
                let rules = network.rules;
                let inside = network.nat.back(port, remote, now);
                let blocked = match (&inside, bytes.first()) {
                    (Err(Some(bite)), _) => Some(*bite),
                    (Err(None), _) => Some(Bite::NobodyThere),
                    (Ok(_), _) if rules.udp_blocked => Some(Bite::UdpBlocked),
                    (Ok(_), Some(first)) if rules.data_blocked && first & 0x80 == 0 => {
                        Some(Bite::DataBlocked)
                    }
                    (Ok(_), _) => None,
                };
                if let Some(bite) = blocked {
                    self.bites.count(bite);
                    self.say(format_args!("p{phone}.{id}:{port} < {len} {bite}"));
                    return;
                }
                if let Some(phone) = self.phones.get_mut(phone) {
                    phone.antenna.packet(now);
                }
                let Ok(inside) = inside else { return };
                let follows = self.phones.get(phone).is_some_and(|phone| phone.sockets_follow);
                let socket = self.sockets.iter().find(|(_, socket)| {
                    socket.open
                        && socket.owner == Owner::Phone(phone)
                        && socket.local.port() == inside
                        && (socket.born == id || follows)
                });
                let Some(socket) = socket.map(|(socket, _)| *socket) else {
                    self.bites.count(Bite::NobodyThere);
                    self.say(format_args!("p{phone}.{id}:{inside} < {len} {}", Bite::NobodyThere));
                    return;
                };
                self.enqueue(socket, Datagram { from: remote, ecn, bytes });
            }
            (Direction::Up, Cargo::Tcp { stream, segment }) => {
                self.segment(stream, Side::Gateway, &segment, now);
            }
            (Direction::Down, Cargo::Tcp { stream, segment }) => {
                if here {
                    if let Some(phone) = self.phones.get_mut(phone) {
                        phone.antenna.packet(now);
                    }
                    self.segment(stream, Side::Phone, &segment, now);
                } else {
                    self.bites.count(Bite::OldPath);
                }
            }
        }
    }

    fn enqueue(&mut self, id: u64, datagram: Datagram) {
        let Some(socket) = self.sockets.get_mut(&id) else { return };
        let len = datagram.bytes.len();
        let max = match socket.owner {
            Owner::Phone(phone) => {
                self.phones.get(phone).map_or(PHONE_QUEUE_BYTES, |phone| phone.queue_bytes)
            }
            Owner::Gateway => GATEWAY_QUEUE_BYTES,
        };
        if socket.queued + len > max {
            let local = socket.local;
            self.bites.count(Bite::SocketFull);
            self.say(format_args!("{local} {len} {}", Bite::SocketFull));
            return;
        }
        socket.queued += len;
        socket.queue.push_back(datagram);
        let (local, waker) = (socket.local, socket.waker.take());
        self.say(format_args!("{local} has {len}"));
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// A segment reaches one end of a stream.
    fn segment(&mut self, id: u64, side: Side, segment: &Segment, now: SimTime) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if side == Side::Gateway && stream.ends[1].is_none() {
            let listening = self.listeners.contains_key(&stream.remote);
            let welcome = segment.syn && !stream.accepted && listening;
            if !welcome {
                if !segment.reset {
                    self.ship(id, Side::Gateway, Segment::refusal());
                }
                return;
            }
            stream.ends[1] = Some(End::new(false));
        }
        let Some(end) = stream.ends.get_mut(side as usize).and_then(Option::as_mut) else { return };
        end.handle(segment, now);
        if side == Side::Gateway && end.is_open() && !stream.accepted {
            stream.accepted = true;
            stream.left[1] = false;
            let from = SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x6440_0000 + stream.network)), stream.port);
            if let Some(listener) = self.listeners.get_mut(&stream.remote)
                && listener.waiting.len() < BACKLOG_MAX
            {
                listener.waiting.push_back((id, from));
                if let Some(waker) = listener.waker.take() {
                    waker.wake();
                }
            }
        }
        if let Some(wakers) = stream.wakers.get_mut(side as usize) {
            wakers.drain(..).for_each(Waker::wake);
        }
        self.pump(id, side);
    }

    fn timer(&mut self, id: u64, side: Side, now: SimTime) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if let Some(timer) = stream.timers.get_mut(side as usize) {
            *timer = None;
        }
        let Some(Some(end)) = stream.ends.get_mut(side as usize) else { return };
        end.handle_timeout(now);
        if end.broken().is_some()
            && let Some(wakers) = stream.wakers.get_mut(side as usize)
        {
            wakers.drain(..).for_each(Waker::wake);
        }
        self.pump(id, side);
    }

    /// Sends what one end of a stream has to send, and sets its timer.
    fn pump(&mut self, id: u64, side: Side) -> bool {
        let now = self.now();
        let mut sooner = false;
        loop {
            let Some(stream) = self.streams.get_mut(&id) else { return sooner };
            let Some(Some(end)) = stream.ends.get_mut(side as usize) else { return sooner };
            let Some(segment) = end.poll_transmit(now) else { break };
            sooner |= self.ship(id, side, segment);
        }
        let Some(stream) = self.streams.get_mut(&id) else { return sooner };
        let Some(Some(end)) = stream.ends.get_mut(side as usize) else { return sooner };
        let resent = end.resent_count();
        let (phone, network, timer) = (stream.phone, stream.network, end.poll_timeout());
        if let Some(known) = stream.resent.get_mut(side as usize)
            && *known < resent
        {
            *known = resent;
            self.bites.count(Bite::TcpResent);
        }
        if let (Some(at), Some(set)) = (timer, stream.timers.get_mut(side as usize))
            && set.is_none_or(|set| at < set)
        {
            *set = Some(at);
            let cargo = Cargo::Timer { stream: id, side };
            let direction = Direction::Up;
            sooner |= self.launch(Flight { at, serial: 0, direction, phone, network, cargo });
        }
        let over = |end: &Option<End>, left: bool| left && end.as_ref().is_none_or(End::is_over);
        if let Some(Stream { ends: [one, two], left: [one_left, two_left], .. }) = self.streams.get(&id)
            && over(one, *one_left)
            && over(two, *two_left)
        {
            self.streams.remove(&id);
        }
        sooner
    }

    /// Puts a segment on its link.
    fn ship(&mut self, id: u64, side: Side, segment: Segment) -> bool {
        let Some(stream) = self.streams.get(&id) else { return false };
        let (phone, network, port) = (stream.phone, stream.network, stream.port);
        let len = segment.len();
        let direction = match side {
            Side::Phone => Direction::Up,
            Side::Gateway => Direction::Down,
        };
        self.count_traffic(phone, direction, len);
        if side == Side::Phone && self.way_out(phone, network, port, len).is_none() {
            return false;
        }
        if self.current(phone).is_none_or(|current| current.id != network) {
            // Streams are bound to the address they were opened from.
            self.bites.count(Bite::OldPath);
            return false;
        }
        self.cross(phone, direction, len, Cargo::Tcp { stream: id, segment })
    }
}

impl Phone {
    fn port(&mut self) -> u16 {
        let port = self.next_port;
        self.next_port = if port >= 60_000 { 40_000 } else { port + 1 };
        port
    }
}

impl Network {
    fn way(&mut self, direction: Direction) -> &mut Way {
        match direction {
            Direction::Up => &mut self.up,
            Direction::Down => &mut self.down,
        }
    }
}

impl Way {
    fn new(impairment: fulmar_badnet::net::Impairment) -> Self {
        Self { link: Link::new(impairment), cut: false, dark_until: SimTime::START, latest: SimTime::START }
    }
}

impl Nat {
    /// The public port of a flow, and what happened if it is another one than before.
    fn map(&mut self, port: u16, remote: SocketAddr, now: SimTime) -> (u16, Option<Bite>) {
        if self.out.len() >= MAPPINGS_MAX && !self.out.contains_key(&(port, remote)) {
            let oldest = self.out.iter().min_by_key(|(_, mapping)| mapping.last).map(|(key, _)| *key);
            if let Some(public) = oldest.and_then(|key| self.out.remove(&key)).and_then(|gone| gone.public) {
                self.back.remove(&public);
            }
        }
        let idle_max = self.idle_max;
        let mapping =
            self.out.entry((port, remote)).or_insert(Mapping { public: None, last: now, lost: None });
        if let Some(public) = mapping.public
            && idle_max.is_some_and(|max| now.since(mapping.last) > max)
        {
            self.back.remove(&public);
            mapping.public = None;
            mapping.lost = Some(Bite::NatExpired);
        }
        mapping.last = now;
        if let Some(public) = mapping.public {
            return (public, None);
        }
        let public = self.next_port;
        self.next_port = if public == u16::MAX { 20_000 } else { public + 1 };
        mapping.public = Some(public);
        self.back.insert(public, (port, remote));
        (public, mapping.lost.take())
    }

    /// The port inside behind a public one, for what comes from this gateway; an error says what was forgotten.
    fn back(&mut self, public: u16, remote: SocketAddr, now: SimTime) -> Result<u16, Option<Bite>> {
        let Some(key) = self.back.get(&public).copied() else { return Err(None) };
        if key.1 != remote {
            return Err(None);
        }
        let Some(mapping) = self.out.get_mut(&key) else { return Err(None) };
        if self.idle_max.is_some_and(|max| now.since(mapping.last) > max) {
            self.back.remove(&public);
            mapping.public = None;
            mapping.lost = Some(Bite::NatExpired);
            return Err(Some(Bite::NatExpired));
        }
        mapping.last = now;
        Ok(key.0)
    }
}

impl Cargo {
    fn copy(&self) -> Option<Self> {
        match self {
            Self::Udp { bytes, ecn, port, remote } => {
                Some(Self::Udp { bytes: bytes.clone(), ecn: *ecn, port: *port, remote: *remote })
            }
            Self::Tcp { stream, segment } => Some(Self::Tcp { stream: *stream, segment: segment.clone() }),
            Self::Timer { .. } => None,
        }
    }
}

impl fmt::Display for Cargo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp { port, remote, .. } => write!(f, "udp :{port} {remote}"),
            Self::Tcp { stream, segment } => {
                let flag = |is: bool, sign: char| if is { sign } else { '-' };
                let (syn, fin) = (flag(segment.syn, 'S'), flag(segment.fin, 'F'));
                let reset = flag(segment.reset, 'R');
                write!(f, "tcp {stream} {syn}{fin}{reset} {} {:?}", segment.seq, segment.ack)
            }
            Self::Timer { stream, .. } => write!(f, "timer {stream}"),
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("phones", &self.phones.len())
            .field("flights", &self.flights.len())
            .finish_non_exhaustive()
    }
}

impl PartialEq for Flight {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

impl Eq for Flight {}

impl PartialOrd for Flight {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Flight {
    /// The heap gives the greatest first: that is the one which arrives first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.serial).cmp(&(self.at, self.serial))
    }
}

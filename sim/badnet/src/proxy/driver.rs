//! The proxy's one task: reads what is ready, asks the links, keeps what is under way, sends what is due.
//!
//! - All work of one round happens at one moment: due packets leave first, then new ones are decided about, so a
//!   packet that may leave at once can't overtake one of its flow that is due.
//! - A round reads a bounded number of packets and then lets the runtime look at its sockets and timers again.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Sleep, sleep_until};

use super::ready::{Bell, Ready};
use super::tcp::{self, Rules};
use super::{Admits, Command, Config, FlowCells, Shared, TrafficCells};
use crate::fault::{Fault, FlowId, Planned, Target};
use crate::net::{Link, Verdict};
use crate::rng::Rng;
use crate::time::SimTime;

/// The largest UDP payload.
const PACKET_MAX: usize = 65_535;
/// Packets read from the clients in one round.
const CLIENT_BATCH: usize = 256;
/// Packets read from the gateway for one flow in one round.
const FLOW_BATCH: usize = 64;
/// What the listening socket asks for: some hundred clients that all speak at once. The system may give less.
const LISTEN_BUFFER: usize = 4 * 1024 * 1024;

/// Opens the listening socket.
pub(super) fn listen(addr: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(addr)?;
    socket.set_nonblocking(true)?;
    let options = socket2::SockRef::from(&socket);
    // A smaller buffer loses packets in the kernel under load; that is no reason to refuse to start.
    for asked in [options.set_recv_buffer_size(LISTEN_BUFFER), options.set_send_buffer_size(LISTEN_BUFFER)] {
        if let Err(error) = asked {
            tracing::debug!(%error, "the proxy's socket keeps its default buffer");
        }
    }
    Ok(socket)
}

/// Runs until the handle is gone.
pub(super) async fn run(
    config: Config,
    listen: std::net::UdpSocket,
    tcp: Option<std::net::TcpListener>,
    mut commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
) -> io::Result<()> {
    let listen = UdpSocket::from_std(listen)?;
    let started = Instant::now();
    let root = Rng::new(config.seed);
    let (tcp_rules, rules) = watch::channel(Rules {
        path: config.path.clone(),
        paths: 0,
        gateway: config.gateway,
        admits: Admits::ALL,
        dark_until: SimTime::START,
        rebinds: 0,
    });
    if let Some(tcp) = tcp {
        // Its chance is apart from that of every flow; it ends with the runtime.
        let chance = root.fork(u64::MAX);
        let serving = tcp::serve(
            TcpListener::from_std(tcp)?,
            rules,
            chance,
            started,
            config.flows_max,
            Arc::clone(&shared),
        );
        tokio::spawn(serving);
    }
    let mut driver = Driver {
        root,
        config,
        admits: Admits::ALL,
        tcp_rules,
        listen,
        shared,
        flows: HashMap::new(),
        by_client: HashMap::new(),
        next_flow: 0,
        under_way: BinaryHeap::new(),
        bytes_under_way: 0,
        next_ordinal: 0,
        plan: VecDeque::new(),
        plan_starts: SimTime::START,
        ready: Arc::new(Ready::default()),
        socket_errors: 0,
    };
    let mut alarm = Box::pin(sleep_until(started));
    let mut armed = SimTime::START;
    let mut noted = Vec::new();
    let mut buffer = vec![0; PACKET_MAX];
    poll_fn(move |cx| {
        driver.ready.watch(cx.waker());
        let now = SimTime::START + started.elapsed();
        loop {
            match commands.poll_recv(cx) {
                Poll::Ready(Some(command)) => driver.carry_out(command, now),
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        driver.play_plan(now);
        driver.send_due(now);
        let mut more = driver.read_clients(cx, now, &mut buffer);
        driver.ready.take(&mut noted);
        for flow in &noted {
            more |= driver.read_gateway(*flow, now, &mut buffer);
        }
        if more || driver.arm(&mut alarm, &mut armed, started, cx) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await;
    Ok(())
}

struct Driver {
    config: Config,
    root: Rng,
    admits: Admits,
    tcp_rules: watch::Sender<Rules>,
    listen: UdpSocket,
    shared: Arc<Shared>,
    flows: HashMap<FlowId, Flow>,
    by_client: HashMap<SocketAddr, FlowId>,
    next_flow: u32,
    under_way: BinaryHeap<Reverse<UnderWay>>,
    bytes_under_way: usize,
    next_ordinal: u64,
    plan: VecDeque<Planned>,
    plan_starts: SimTime,
    ready: Arc<Ready>,
    socket_errors: u64,
}

struct Flow {
    client: SocketAddr,
    gateway_side: UdpSocket,
    bell: Arc<Bell>,
    waker: Waker,
    rng: Rng,
    up: Direction,
    down: Direction,
    last_active: SimTime,
    cells: Arc<FlowCells>,
}

struct Direction {
    link: Link,
    under_way: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

/// A packet between its two sockets.
struct UnderWay {
    at: SimTime,
    /// Order of offering, so that equal times keep it.
    ordinal: u64,
    flow: FlowId,
    way: Way,
    packet: Box<[u8]>,
}

impl UnderWay {
    fn key(&self) -> (SimTime, u64) {
        (self.at, self.ordinal)
    }
}

impl PartialEq for UnderWay {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for UnderWay {}

impl PartialOrd for UnderWay {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for UnderWay {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Flow {
    fn cells(&self, way: Way) -> &TrafficCells {
        match way {
            Way::Up => &self.cells.up,
            Way::Down => &self.cells.down,
        }
    }
}

impl Driver {
    fn carry_out(&mut self, command: Command, now: SimTime) {
        match command {
            Command::Apply(target, fault) => self.apply(target, &fault, now),
            Command::Play(plan) => {
                self.plan = plan.faults().iter().cloned().collect();
                self.plan_starts = now;
            }
            Command::Gateway(gateway) => {
                self.config.gateway = gateway;
                self.tcp_rules.send_modify(|rules| {
                    rules.gateway = gateway;
                    rules.rebinds += 1;
                });
                let flows: Vec<FlowId> = self.flows.keys().copied().collect();
                for flow in flows {
                    self.rebind(flow, now);
                }
            }
            Command::Admit(admits) => {
                self.admits = admits;
                self.tcp_rules.send_modify(|rules| rules.admits = admits);
                tracing::debug!(?admits, "what gets through");
            }
        }
    }

    fn next_planned(&self) -> Option<SimTime> {
        let planned = self.plan.front()?;
        Some(self.plan_starts + planned.at.since(SimTime::START))
    }

    fn play_plan(&mut self, now: SimTime) {
        while self.next_planned().is_some_and(|at| at <= now) {
            let Some(planned) = self.plan.pop_front() else { break };
            self.apply(planned.target, &planned.fault, now);
        }
    }

    fn apply(&mut self, target: Target, fault: &Fault, now: SimTime) {
        if target == Target::All {
            if let Fault::Path(path) = fault {
                self.config.path = (**path).clone();
            }
            self.tcp_rules.send_modify(|rules| match fault {
                Fault::Rebind => rules.rebinds += 1,
                Fault::Blackout(lasts) => rules.dark_until = rules.dark_until.max(now + *lasts),
                Fault::Path(path) => {
                    rules.path = (**path).clone();
                    rules.paths += 1;
                }
            });
        }
        let mut met: Vec<FlowId> = match target {
            Target::Flow(flow) if self.flows.contains_key(&flow) => vec![flow],
            Target::Flow(_) => Vec::new(),
            Target::All | Target::Lot(_) => self.flows.keys().copied().collect(),
        };
        if let Target::Lot(lot) = target {
            met.sort_unstable();
            let count = u64::try_from(met.len()).unwrap_or(u64::MAX);
            let at = lot.checked_rem(count).and_then(|at| usize::try_from(at).ok());
            met = at.and_then(|at| met.get(at).copied()).into_iter().collect();
        }
        if met.is_empty() && target != Target::All {
            self.shared.faults_missed.fetch_add(1, Relaxed);
        }
        for id in met {
            match fault {
                Fault::Rebind => self.rebind(id, now),
                Fault::Blackout(lasts) => {
                    if let Some(flow) = self.flows.get_mut(&id) {
                        flow.up.link.black_out(now + *lasts);
                        flow.down.link.black_out(now + *lasts);
                        self.shared.blackouts.fetch_add(1, Relaxed);
                        tracing::debug!(flow = id.0, ?lasts, "blackout");
                    }
                }
                Fault::Path(path) => {
                    if let Some(flow) = self.flows.get_mut(&id) {
                        flow.up.link.set(path.up.clone());
                        flow.down.link.set(path.down.clone());
                    }
                }
            }
        }
    }

    fn rebind(&mut self, id: FlowId, now: SimTime) {
        let opened = open_gateway_side(self.config.gateway);
        let Some(flow) = self.flows.get_mut(&id) else { return };
        match opened {
            Ok((socket, port)) => {
                flow.gateway_side = socket;
                flow.last_active = now;
                flow.cells.gateway_side_port.store(port, Relaxed);
                flow.cells.rebinds.fetch_add(1, Relaxed);
                tracing::debug!(flow = id.0, port, "rebound");
                // The new socket has not met the bell yet.
                flow.waker.wake_by_ref();
            }
            Err(error) => self.no_socket(&error),
        }
    }

    fn no_socket(&mut self, error: &io::Error) {
        // 1, 2, 4, 8 …: a machine out of descriptors fails for every packet.
        self.socket_errors += 1;
        if self.socket_errors.is_power_of_two() {
            tracing::warn!(%error, times = self.socket_errors, "no socket towards the gateway; raise the open-file limit?");
        }
    }

    /// Whether there may be more to read.
    fn read_clients(&mut self, cx: &mut Context<'_>, now: SimTime, buffer: &mut [u8]) -> bool {
        for _ in 0..CLIENT_BATCH {
            match self.listen.try_recv_from(buffer) {
                Ok((len, client)) => {
                    let Some(id) = self.flow_from(client, now) else {
                        self.shared.refused_flows.fetch_add(1, Relaxed);
                        continue;
                    };
                    if let Some(packet) = buffer.get(..len) {
                        self.offer(id, Way::Up, packet, now);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.listen.poll_recv_ready(cx).is_pending() {
                        return false;
                    }
                }
                // A client's port is gone: the kernel reports on its next use what an earlier send met.
                Err(_) => {}
            }
        }
        true
    }

    /// Whether there may be more to read.
    fn read_gateway(&mut self, id: FlowId, now: SimTime, buffer: &mut [u8]) -> bool {
        for read in 0..FLOW_BATCH {
            let Some(flow) = self.flows.get_mut(&id) else { return false };
            if read == 0 {
                flow.bell.answered();
            }
            match flow.gateway_side.try_recv(buffer) {
                Ok(len) => {
                    if let Some(packet) = buffer.get(..len) {
                        self.offer(id, Way::Down, packet, now);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut cx = Context::from_waker(&flow.waker);
                    if flow.gateway_side.poll_recv_ready(&mut cx).is_pending() {
                        return false;
                    }
                }
                // Nobody listens at the gateway's port: an earlier packet to it was refused.
                Err(_) => {
                    flow.cells.up.refused.fetch_add(1, Relaxed);
                }
            }
        }
        if let Some(flow) = self.flows.get(&id) {
            flow.waker.wake_by_ref();
        }
        true
    }

    /// The flow of a client, opened when it is new; `None` when there is no room for it.
    fn flow_from(&mut self, client: SocketAddr, now: SimTime) -> Option<FlowId> {
        if let Some(id) = self.by_client.get(&client).copied() {
            let last_active = self.flows.get(&id)?.last_active;
            if self.config.nat_timeout.is_some_and(|timeout| now.since(last_active) > timeout) {
                self.rebind(id, now);
            }
            self.flows.get_mut(&id)?.last_active = now;
            return Some(id);
        }
        if self.flows.len() >= self.config.flows_max && !self.forget_idlest(now) {
            return None;
        }
        let (gateway_side, port) = match open_gateway_side(self.config.gateway) {
            Ok(opened) => opened,
            Err(error) => {
                self.no_socket(&error);
                return None;
            }
        };
        let id = FlowId(self.next_flow);
        self.next_flow = self.next_flow.checked_add(1)?;
        let cells = Arc::new(FlowCells {
            flow: id,
            client,
            gateway_side_port: port.into(),
            rebinds: 0.into(),
            up: TrafficCells::default(),
            down: TrafficCells::default(),
        });
        self.shared.flows().live.push(Arc::clone(&cells));
        let bell = Bell::new(id, Arc::clone(&self.ready));
        let waker = Waker::from(Arc::clone(&bell));
        waker.wake_by_ref();
        let direction = |impairment: &crate::net::Impairment| Direction {
            link: Link::new(impairment.clone()),
            under_way: 0,
        };
        let flow = Flow {
            client,
            gateway_side,
            bell,
            waker,
            rng: self.root.fork(u64::from(id.0)),
            up: direction(&self.config.path.up),
            down: direction(&self.config.path.down),
            last_active: now,
            cells,
        };
        self.flows.insert(id, flow);
        self.by_client.insert(client, id);
        tracing::debug!(flow = id.0, %client, port, "new flow");
        Some(id)
    }

    /// Makes room for a new flow; `false` when every flow is in use.
    fn forget_idlest(&mut self, now: SimTime) -> bool {
        let idlest = self.flows.iter().min_by_key(|(id, flow)| (flow.last_active, **id));
        let Some((id, flow)) = idlest else { return false };
        if now.since(flow.last_active) < self.config.evict_after {
            return false;
        }
        let id = *id;
        if let Some(flow) = self.flows.remove(&id) {
            self.by_client.remove(&flow.client);
            let mut flows = self.shared.flows();
            flows.live.retain(|cells| cells.flow != id);
            flows.gone.flows_ever += 1;
            flows.gone.rebinds += flow.cells.rebinds.load(Relaxed);
            flows.gone.up.add(&flow.cells.up.read());
            flows.gone.down.add(&flow.cells.down.read());
        }
        true
    }

    fn offer(&mut self, id: FlowId, way: Way, packet: &[u8], now: SimTime) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let cells = match way {
            Way::Up => &flow.cells.up,
            Way::Down => &flow.cells.down,
        };
        cells.packets.fetch_add(1, Relaxed);
        cells.bytes.fetch_add(u64::try_from(packet.len()).unwrap_or(u64::MAX), Relaxed);
        if way == Way::Down {
            if self.config.nat_timeout.is_some_and(|timeout| now.since(flow.last_active) > timeout) {
                cells.dark.fetch_add(1, Relaxed);
                return;
            }
            flow.last_active = now;
        }
        if !self.admits.udp {
            cells.dark.fetch_add(1, Relaxed);
            return;
        }
        let direction = match way {
            Way::Up => &mut flow.up,
            Way::Down => &mut flow.down,
        };
        let arrival = match direction.link.offer(now, packet.len(), &mut flow.rng) {
            Verdict::Drop(cause) => {
                cells.dropped(cause);
                return;
            }
            Verdict::Deliver(arrival) => arrival,
        };
        if arrival.at <= now && arrival.again_at.is_none() && arrival.flipped_bit.is_none() {
            self.send(id, way, packet);
            return;
        }
        let mut changed;
        let mut packet = packet;
        if let Some(bit) = arrival.flipped_bit {
            changed = packet.to_vec();
            if let Some(byte) = usize::try_from(bit / 8).ok().and_then(|at| changed.get_mut(at)) {
                *byte ^= 1 << (bit % 8);
            }
            packet = &changed;
        }
        self.keep(id, way, arrival.at, packet);
        if let Some(again_at) = arrival.again_at {
            self.keep(id, way, again_at, packet);
        }
    }

    fn keep(&mut self, id: FlowId, way: Way, at: SimTime, packet: &[u8]) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let direction = match way {
            Way::Up => &mut flow.up,
            Way::Down => &mut flow.down,
        };
        if direction.under_way >= self.config.flow_packets_max
            || self.under_way.len() >= self.config.packets_max
            || self.bytes_under_way + packet.len() > self.config.bytes_max
        {
            flow.cells(way).overflow.fetch_add(1, Relaxed);
            return;
        }
        direction.under_way += 1;
        self.bytes_under_way += packet.len();
        let ordinal = self.next_ordinal;
        self.next_ordinal += 1;
        self.under_way.push(Reverse(UnderWay { at, ordinal, flow: id, way, packet: packet.into() }));
    }

    fn send_due(&mut self, now: SimTime) {
        while self.under_way.peek().is_some_and(|Reverse(first)| first.at <= now) {
            let Some(Reverse(due)) = self.under_way.pop() else { break };
            self.bytes_under_way -= due.packet.len();
            if let Some(flow) = self.flows.get_mut(&due.flow) {
                match due.way {
                    Way::Up => flow.up.under_way -= 1,
                    Way::Down => flow.down.under_way -= 1,
                }
                self.send(due.flow, due.way, &due.packet);
            }
        }
    }

    fn send(&self, id: FlowId, way: Way, packet: &[u8]) {
        let Some(flow) = self.flows.get(&id) else { return };
        // Straight to the system: the runtime would first wait to be told that a new socket is writable.
        let sent = match way {
            Way::Up => socket2::SockRef::from(&flow.gateway_side).send(packet),
            Way::Down => socket2::SockRef::from(&self.listen).send_to(packet, &flow.client.into()),
        };
        let cells = flow.cells(way);
        match sent {
            Ok(_) => cells.delivered.fetch_add(1, Relaxed),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => cells.overflow.fetch_add(1, Relaxed),
            Err(_) => cells.refused.fetch_add(1, Relaxed),
        };
    }

    /// Sets the alarm to what comes next; `true` when that is due already.
    fn arm(
        &self,
        alarm: &mut Pin<Box<Sleep>>,
        armed: &mut SimTime,
        started: Instant,
        cx: &mut Context<'_>,
    ) -> bool {
        let due = self.under_way.peek().map(|Reverse(first)| first.at);
        let Some(next) = due.into_iter().chain(self.next_planned()).min() else { return false };
        if next != *armed {
            // A day is far enough for a timer; the round after it sets the alarm anew.
            let wait = next.since(SimTime::START).min(started.elapsed() + Duration::from_hours(24));
            alarm.as_mut().reset(started + wait);
            *armed = next;
        }
        alarm.as_mut().poll(cx).is_ready()
    }
}

/// A socket that speaks with the gateway alone, and its port.
fn open_gateway_side(gateway: SocketAddr) -> io::Result<(UdpSocket, u16)> {
    let socket = std::net::UdpSocket::bind(SocketAddr::new(gateway.ip(), 0))?;
    socket.connect(gateway)?;
    socket.set_nonblocking(true)?;
    let port = socket.local_addr()?.port();
    Ok((UdpSocket::from_std(socket)?, port))
}

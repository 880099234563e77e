//! A bad network between real clients and a real gateway, in real time, on loopback.
//!
//! Clients send to [`Proxy::addr`] instead of the gateway. Each client address is a *flow* with its own socket
//! towards the gateway (so the gateway sees one address per client, which [`Proxy::rebind`] changes), its own two
//! [`Link`](crate::net::Link)s and its own chance, drawn from the seed and the flow's number.
//!
//! - One thread, one task, one listening socket, however many flows: a wake-up costs what is ready, not what exists.
//! - Every queue has a bound ([`Config`]); what does not fit is dropped as by a full router, and counted.
//! - A gateway that is gone (its port answers "refused") stops nothing: flows stay, and traffic goes on when it
//!   listens again.
//! - With [`Config::tcp`] it takes TCP connections on the same port, too, and carries them through the same path. They
//!   are no flows: a fault meets them when it is for all flows.
//! - Counts of packets and bytes are taken *before* loss: what the two ends really sent. What the kernel drops
//!   before the proxy reads it is not seen; the listening socket asks for a large buffer for that reason.
//! - Real time is not exact: packets leave up to about two milliseconds late (the runtime's timer), more when the
//!   machine is busy. Exact figures are for virtual time.
//!
//! Not here: what a link decides (`net`), when things go wrong (`fault`).

mod driver;
mod ready;
mod tcp;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::fault::{Fault, FaultPlan, FlowId, Target};
use crate::net::{DropCause, Path};

/// How a proxy is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients send to; port 0 picks a free one. Must be a loopback address.
    pub listen: SocketAddr,
    /// Where the gateway listens. Must be a loopback address.
    pub gateway: SocketAddr,
    /// Where all chance comes from.
    pub seed: u64,
    /// What new flows meet.
    pub path: Path,
    /// Flows at a time. A new client beyond it takes the place of the flow that was idle longest, if that was for
    /// [`Self::evict_after`]; otherwise its packets are dropped and counted as [`Totals::refused_flows`].
    pub flows_max: usize,
    /// A flow idle for this long may be forgotten when room is needed.
    pub evict_after: Duration,
    /// The NAT forgets a mapping that was idle for this long: the next packet from the client leaves by a new
    /// source port, and packets from the gateway no longer come through until then. `None`: never.
    pub nat_timeout: Option<Duration>,
    /// Packets under way in all, both directions.
    pub packets_max: usize,
    /// Bytes under way in all, both directions.
    pub bytes_max: usize,
    /// Packets under way per flow and direction.
    pub flow_packets_max: usize,
    /// Whether TCP connections are carried, too, from the same port to the gateway's port of the same number.
    pub tcp: bool,
}

/// What gets through at all, whatever the path does to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admits {
    /// UDP.
    pub udp: bool,
    /// TCP.
    pub tcp: bool,
}

impl Admits {
    /// Everything.
    pub const ALL: Self = Self { udp: true, tcp: true };
    /// Nothing: no network at all.
    pub const NONE: Self = Self { udp: false, tcp: false };
    /// TCP only, as many a hotel does it.
    pub const TCP_ONLY: Self = Self { udp: false, tcp: true };
}

impl Default for Admits {
    fn default() -> Self {
        Self::ALL
    }
}

impl Config {
    /// A proxy on a free port of 127.0.0.1 towards `gateway`: seed 0, nothing impaired, 4 096 flows forgotten after
    /// 60 s when room is needed, no NAT timeout, 65 536 packets and 64 MiB under way, 2 048 packets per flow and
    /// direction, UDP only.
    #[must_use]
    pub fn towards(gateway: SocketAddr) -> Self {
        Self {
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            gateway,
            seed: 0,
            path: Path::default(),
            flows_max: 4_096,
            evict_after: Duration::from_secs(60),
            nat_timeout: None,
            packets_max: 65_536,
            bytes_max: 64 * 1024 * 1024,
            flow_packets_max: 2_048,
            tcp: false,
        }
    }

    /// The same, with TCP carried or not.
    #[must_use]
    pub fn tcp(mut self, tcp: bool) -> Self {
        self.tcp = tcp;
        self
    }

    /// The same with another seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The same with another path (a [`Profile`](crate::Profile) is one).
    #[must_use]
    pub fn path(mut self, path: impl Into<Path>) -> Self {
        self.path = path.into();
        self
    }
}

/// Why a proxy could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An impaired path is for this machine only.
    #[error("{0} is not a loopback address")]
    NotLoopback(SocketAddr),
    /// The listening socket could not be opened.
    #[error("cannot listen on {addr}")]
    Listen {
        /// Where.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The proxy's thread or runtime could not be started.
    #[error("cannot start the proxy's thread")]
    Start(#[source] io::Error),
    /// More was asked than the proxy has carried out so far: ask again a little later.
    #[error("the proxy has {COMMANDS_MAX} commands waiting")]
    Busy,
    /// The proxy has stopped.
    #[error("the proxy has stopped")]
    Stopped,
}

/// Commands that may wait for the proxy's thread.
pub const COMMANDS_MAX: usize = 1_024;

/// Packets and bytes (UDP payload) of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets that came in, before any loss.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets handed on, second copies included.
    pub delivered: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Dropped by the bottleneck's full queue.
    pub queue_full: u64,
    /// Dropped in the dark, cut, or behind an expired mapping.
    pub dark: u64,
    /// Dropped for their size.
    pub too_large: u64,
    /// Dropped by the proxy's own bounds or a full socket.
    pub overflow: u64,
    /// Refusals by the other end: nobody listens there. A refusal is learned after the fact, so its packet is among
    /// the delivered ones.
    pub refused: u64,
}

impl Traffic {
    /// Packets dropped on the way, for whatever reason.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.lost + self.queue_full + self.dark + self.too_large + self.overflow
    }

    fn add(&mut self, other: &Self) {
        let Self { packets, bytes, delivered, lost, queue_full, dark, too_large, overflow, refused } = other;
        self.packets += packets;
        self.bytes += bytes;
        self.delivered += delivered;
        self.lost += lost;
        self.queue_full += queue_full;
        self.dark += dark;
        self.too_large += too_large;
        self.overflow += overflow;
        self.refused += refused;
    }
}

/// One direction of all TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpTraffic {
    /// Segments offered to the path, repeated ones included.
    pub segments: u64,
    /// Their bytes, headers of 40 bytes included.
    pub bytes: u64,
    /// Segments the path dropped, which had to be offered again.
    pub repeated: u64,
}

/// What the TCP connections have done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpTotals {
    /// Connections there have been.
    pub connections: u64,
    /// Client to gateway.
    pub up: TcpTraffic,
    /// Gateway to client.
    pub down: TcpTraffic,
}

/// What one flow has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowReport {
    /// Which.
    pub flow: FlowId,
    /// The client's address.
    pub client: SocketAddr,
    /// The port the gateway sees.
    pub gateway_side_port: u16,
    /// How often that port changed.
    pub rebinds: u64,
    /// Client to gateway.
    pub up: Traffic,
    /// Gateway to client.
    pub down: Traffic,
}

/// What the whole proxy has done so far, forgotten flows included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Flows there are now.
    pub flows: u64,
    /// Flows there have been.
    pub flows_ever: u64,
    /// Client to gateway.
    pub up: Traffic,
    /// Gateway to client.
    pub down: Traffic,
    /// Changes of a gateway-side port.
    pub rebinds: u64,
    /// Blackouts that met a flow.
    pub blackouts: u64,
    /// Planned or asked faults that met no flow.
    pub faults_missed: u64,
    /// Packets of clients that could not become a flow (too many of them, or no socket to be had), and TCP connections
    /// beyond that number.
    pub refused_flows: u64,
    /// TCP, which is in none of the figures above but the last one.
    pub tcp: TcpTotals,
}

impl Totals {
    /// Bytes that both ends sent by UDP, before loss.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.up.bytes + self.down.bytes
    }
}

/// A running proxy. Dropping it stops it.
///
/// ```
/// use std::net::UdpSocket;
/// use std::time::Duration;
/// use fulmar_badnet::proxy::{Config, Proxy};
/// use fulmar_badnet::Profile;
///
/// let gateway = UdpSocket::bind("127.0.0.1:0")?;
/// let proxy = Proxy::start(Config::towards(gateway.local_addr()?).seed(42).path(Profile::Clean))?;
///
/// let phone = UdpSocket::bind("127.0.0.1:0")?;
/// phone.send_to(b"hello", proxy.addr())?;
/// let mut buffer = [0; 16];
/// let (len, _from) = gateway.recv_from(&mut buffer)?;
/// assert_eq!(buffer.get(..len), Some(&b"hello"[..]));
///
/// let flow = proxy.flow_of_port(phone.local_addr()?.port());
/// proxy.blackout(flow.unwrap(), Duration::from_millis(300))?;
/// assert_eq!(proxy.stop().up.bytes, 5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Command {
    Apply(Target, Fault),
    Play(FaultPlan),
    Gateway(SocketAddr),
    Admit(Admits),
}

/// How often a port is sought that is free for both UDP and TCP.
const PORTS_TRIED: usize = 50;

impl Proxy {
    /// Starts a proxy on a thread of its own. Returns when it listens.
    ///
    /// # Errors
    /// [`Error::NotLoopback`], [`Error::Listen`], [`Error::Start`].
    pub fn start(config: Config) -> Result<Self, Error> {
        for addr in [config.listen, config.gateway] {
            if !addr.ip().is_loopback() {
                return Err(Error::NotLoopback(addr));
            }
        }
        let refused = |source| Error::Listen { addr: config.listen, source };
        let (listen, tcp) = sockets(&config).map_err(refused)?;
        let addr = listen.local_addr().map_err(refused)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(Error::Start)?;
        let (commands, waiting) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("fulmar-proxy".to_owned())
            .spawn(move || {
                if let Err(error) = runtime.block_on(driver::run(config, listen, tcp, waiting, theirs)) {
                    tracing::error!(%error, "the proxy could not use its listening socket");
                }
            })
            .map_err(Error::Start)?;
        Ok(Self { addr, shared, commands: Some(commands), thread: Some(thread) })
    }

    /// Where clients send to.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The flow of the client that sends from this port; `None` before its first packet came through. With several
    /// clients on one port of different loopback addresses, the newest.
    #[must_use]
    pub fn flow_of_port(&self, client_port: u16) -> Option<FlowId> {
        let flows = self.shared.flows();
        flows.live.iter().rev().find(|flow| flow.client.port() == client_port).map(|flow| flow.flow)
    }

    /// Gives the flow a new source port towards the gateway, as a NAT does that forgot the old one. What is on its
    /// way to the old port is lost. A flow that does not exist is counted in [`Totals::faults_missed`].
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Stopped`].
    pub fn rebind(&self, flow: FlowId) -> Result<(), Error> {
        self.apply(Target::Flow(flow), Fault::Rebind)
    }

    /// Lets nothing through for the flow, either way, for `lasts` from now on.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Stopped`].
    pub fn blackout(&self, flow: FlowId, lasts: Duration) -> Result<(), Error> {
        self.apply(Target::Flow(flow), Fault::Blackout(lasts))
    }

    /// Changes the path of one flow, live.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Stopped`].
    pub fn set_flow_path(&self, flow: FlowId, path: impl Into<Path>) -> Result<(), Error> {
        self.apply(Target::Flow(flow), Fault::Path(Box::new(path.into())))
    }

    /// Changes the path of every flow, and of those to come, live.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Stopped`].
    pub fn set_path(&self, path: impl Into<Path>) -> Result<(), Error> {
        self.apply(Target::All, Fault::Path(Box::new(path.into())))
    }

    /// Lets something go wrong now.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Stopped`].
    pub fn apply(&self, target: Target, fault: Fault) -> Result<(), Error> {
        self.command(Command::Apply(target, fault))
    }

    /// Plays a plan whose time begins now, in place of what is left of an earlier one. An empty plan ends it.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Stopped`].
    pub fn play(&self, plan: FaultPlan) -> Result<(), Error> {
        self.command(Command::Play(plan))
    }

    /// From now on only this gets through. What is under way still arrives.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Stopped`].
    pub fn admit(&self, admits: Admits) -> Result<(), Error> {
        self.command(Command::Admit(admits))
    }

    /// From now on the gateway is elsewhere (it was restarted on another port). Every flow gets a new source port.
    ///
    /// # Errors
    /// [`Error::NotLoopback`], [`Error::Busy`], [`Error::Stopped`].
    pub fn set_gateway(&self, gateway: SocketAddr) -> Result<(), Error> {
        if !gateway.ip().is_loopback() {
            return Err(Error::NotLoopback(gateway));
        }
        self.command(Command::Gateway(gateway))
    }

    /// Sums over all flows. Cheap enough for a progress display, not for every packet.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let flows = self.shared.flows();
        let mut totals = flows.gone;
        totals.flows = u64::try_from(flows.live.len()).unwrap_or(u64::MAX);
        totals.flows_ever += totals.flows;
        for flow in &flows.live {
            totals.rebinds += flow.rebinds.load(Relaxed);
            totals.up.add(&flow.up.read());
            totals.down.add(&flow.down.read());
        }
        totals.blackouts = self.shared.blackouts.load(Relaxed);
        totals.faults_missed = self.shared.faults_missed.load(Relaxed);
        totals.refused_flows = self.shared.refused_flows.load(Relaxed);
        let tcp = &self.shared.tcp;
        totals.tcp = TcpTotals {
            connections: tcp.connections.load(Relaxed),
            up: tcp.up.read(),
            down: tcp.down.read(),
        };
        totals
    }

    /// What each flow there is has done, lowest flow first.
    #[must_use]
    pub fn flows(&self) -> Vec<FlowReport> {
        self.shared.flows().live.iter().map(|flow| flow.read()).collect()
    }

    /// Stops at once (packets under way are gone) and says what was done.
    pub fn stop(mut self) -> Totals {
        self.end();
        self.totals()
    }

    fn end(&mut self) {
        // The driver ends when nobody can command it any more.
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the proxy's thread panicked");
        }
    }

    fn command(&self, command: Command) -> Result<(), Error> {
        let commands = self.commands.as_ref().ok_or(Error::Stopped)?;
        commands.try_send(command).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => Error::Busy,
            mpsc::error::TrySendError::Closed(_) => Error::Stopped,
        })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end();
    }
}

/// The listening sockets, on one port.
fn sockets(config: &Config) -> io::Result<(std::net::UdpSocket, Option<std::net::TcpListener>)> {
    let mut tried = 0;
    loop {
        let udp = driver::listen(config.listen)?;
        if !config.tcp {
            return Ok((udp, None));
        }
        tried += 1;
        match std::net::TcpListener::bind(udp.local_addr()?) {
            Ok(tcp) => {
                tcp.set_nonblocking(true)?;
                return Ok((udp, Some(tcp)));
            }
            // Free for UDP and not for TCP: the system picks another one.
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && config.listen.port() == 0
                    && tried < PORTS_TRIED => {}
            Err(error) => return Err(error),
        }
    }
}

/// What the driver counts and the handle reads.
#[derive(Debug, Default)]
struct Shared {
    flows: Mutex<Flows>,
    blackouts: AtomicU64,
    faults_missed: AtomicU64,
    refused_flows: AtomicU64,
    tcp: AllTcpCells,
}

#[derive(Debug, Default)]
struct AllTcpCells {
    connections: AtomicU64,
    up: TcpCells,
    down: TcpCells,
}

#[derive(Debug, Default)]
struct TcpCells {
    segments: AtomicU64,
    bytes: AtomicU64,
    repeated: AtomicU64,
}

impl TcpCells {
    fn read(&self) -> TcpTraffic {
        TcpTraffic {
            segments: self.segments.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            repeated: self.repeated.load(Relaxed),
        }
    }
}

impl Shared {
    fn flows(&self) -> std::sync::MutexGuard<'_, Flows> {
        // Counters are whole at any moment; a panic elsewhere does not spoil them.
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Flows {
    /// In order of their numbers.
    live: Vec<Arc<FlowCells>>,
    gone: Totals,
}

#[derive(Debug)]
struct FlowCells {
    flow: FlowId,
    client: SocketAddr,
    gateway_side_port: AtomicU16,
    rebinds: AtomicU64,
    up: TrafficCells,
    down: TrafficCells,
}

impl FlowCells {
    fn read(&self) -> FlowReport {
        FlowReport {
            flow: self.flow,
            client: self.client,
            gateway_side_port: self.gateway_side_port.load(Relaxed),
            rebinds: self.rebinds.load(Relaxed),
            up: self.up.read(),
            down: self.down.read(),
        }
    }
}

/// Written by the driver's thread alone, hence relaxed.
#[derive(Debug, Default)]
struct TrafficCells {
    packets: AtomicU64,
    bytes: AtomicU64,
    delivered: AtomicU64,
    lost: AtomicU64,
    queue_full: AtomicU64,
    dark: AtomicU64,
    too_large: AtomicU64,
    overflow: AtomicU64,
    refused: AtomicU64,
}

impl TrafficCells {
    fn read(&self) -> Traffic {
        Traffic {
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            delivered: self.delivered.load(Relaxed),
            lost: self.lost.load(Relaxed),
            queue_full: self.queue_full.load(Relaxed),
            dark: self.dark.load(Relaxed),
            too_large: self.too_large.load(Relaxed),
            overflow: self.overflow.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }

    fn dropped(&self, cause: DropCause) {
        let cell = match cause {
            DropCause::Lost => &self.lost,
            DropCause::QueueFull => &self.queue_full,
            DropCause::Dark => &self.dark,
            DropCause::TooLarge => &self.too_large,
        };
        cell.fetch_add(1, Relaxed);
    }
}

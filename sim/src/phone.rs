//! A phone of the world: its clocks, its network and the process its app runs in, as the SDK's platform.
//!
//! - Suspended, its tasks and its monotonic clock stand still, while the boot clock and the wall clock go on; packets
//!   wait in its sockets, as many as fit.
//! - An app that is killed is gone at once with its sockets; its database file stays.
//!
//! Not here: what the network does (`network`).

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use fulmar_badnet::{Rng, SimTime};
use fulmar_client::{ByteStream, Platform};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime};
use tokio::time::{Instant, Sleep};

use crate::bite::Bite;
use crate::network::{Net, Owner, PhoneId};
use crate::process::{Cpu, Process};
use crate::socket::Socket;
use crate::stream::Stream;

/// As the SDK's own type of this name.
type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What o'clock it is everywhere when a world begins: 2026-01-01 00:00 UTC.
pub(crate) const WALL_START_MS: u64 = 1_767_225_600_000;

/// See the module's text. Cheap to clone; all clones are the same phone.
#[derive(Clone)]
pub(crate) struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    net: Arc<Net>,
    id: PhoneId,
    /// When the world began.
    start: Instant,
    gateways: Vec<SocketAddr>,
    state: Mutex<State>,
}

struct State {
    rng: Rng,
    cpu: Arc<Mutex<Cpu>>,
    process: Process,
    frozen_since: Option<Instant>,
    /// Time spent suspended, before now.
    frozen: Duration,
    /// What the wall clock is ahead of the true time.
    wall_ahead_ms: i64,
}

impl Device {
    /// A phone that knows the gateways by these addresses.
    pub(crate) fn new(net: &Arc<Net>, start: Instant, gateways: Vec<SocketAddr>, rng: Rng) -> Self {
        let id = net.add_phone();
        let cpu = Arc::default();
        let state = State {
            rng,
            process: Process::on(&cpu),
            cpu,
            frozen_since: None,
            frozen: Duration::ZERO,
            wall_ahead_ms: 0,
        };
        let inner = Inner { net: Arc::clone(net), id, start, gateways, state: Mutex::new(state) };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn id(&self) -> PhoneId {
        self.inner.id
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is whole.
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn process(&self) -> Process {
        self.state().process.clone()
    }

    /// Runs a task in the phone's process.
    pub(crate) fn run(&self, task: BoxFuture<()>) {
        let process = self.process();
        process.spawn(task);
    }

    /// Whether anything runs on it.
    pub(crate) fn has_tasks(&self) -> bool {
        self.process().has_tasks()
    }

    /// Suspends the phone, or wakes it up.
    pub(crate) fn set_frozen(&self, frozen: bool) {
        let process = {
            let mut state = self.state();
            match (frozen, state.frozen_since) {
                (true, None) => state.frozen_since = Some(Instant::now()),
                (false, Some(since)) => {
                    state.frozen += since.elapsed();
                    state.frozen_since = None;
                }
                _ => return,
            }
            state.process.clone()
        };
        if frozen {
            self.inner.net.bite(Bite::Frozen, format_args!("phone {}", self.inner.id));
        } else {
            self.inner.net.note(format_args!("phone {} is awake", self.inner.id));
        }
        process.set_frozen(frozen);
    }

    /// How often its apps were woken, and how many of their tasks were run.
    pub(crate) fn cpu(&self) -> (u64, u64) {
        self.state().cpu.lock().unwrap_or_else(PoisonError::into_inner).counts()
    }

    /// Whether it is suspended.
    pub(crate) fn is_frozen(&self) -> bool {
        self.state().frozen_since.is_some()
    }

    /// Kills the app; the next one starts in a new process.
    pub(crate) fn kill(&self) {
        let old = {
            let mut state = self.state();
            let new = Process::on(&state.cpu);
            std::mem::replace(&mut state.process, new)
        };
        self.inner.net.vanish(Owner::Phone(self.inner.id));
        old.kill();
        if self.is_frozen() {
            // The phone sleeps on; whatever starts in it waits.
            self.process().set_frozen(true);
        }
    }

    /// Sets the wall clock ahead of the true time, or behind.
    pub(crate) fn set_wall(&self, ahead_ms: i64) {
        self.state().wall_ahead_ms = ahead_ms;
        self.inner.net.bite(Bite::ClockJumped, format_args!("phone {} by {ahead_ms} ms", self.inner.id));
    }

    /// The tokio instant at which the monotonic clock shows `at`, if the phone is not suspended meanwhile.
    fn instant_at(&self, at: Duration) -> Instant {
        let frozen = {
            let state = self.state();
            state.frozen + state.frozen_since.map_or(Duration::ZERO, |since| since.elapsed())
        };
        self.inner.start + at.saturating_add(frozen)
    }

    fn monotonic_now(&self) -> Duration {
        let state = self.state();
        let now = state.frozen_since.unwrap_or_else(Instant::now);
        now.saturating_duration_since(self.inner.start).saturating_sub(state.frozen)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("id", &self.inner.id).finish_non_exhaustive()
    }
}

impl Platform for Device {
    fn monotonic(&self) -> Duration {
        self.monotonic_now()
    }

    fn boot(&self) -> Duration {
        self.inner.start.elapsed()
    }

    fn unix_millis(&self) -> u64 {
        let passed = u64::try_from(self.inner.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        WALL_START_MS.saturating_add(passed).saturating_add_signed(self.state().wall_ahead_ms)
    }

    fn random(&self) -> u64 {
        self.state().rng.next_u64()
    }

    fn sleep_until(&self, at: Duration) -> BoxFuture<()> {
        let device = self.clone();
        Box::pin(async move {
            while device.monotonic_now() < at {
                tokio::time::sleep_until(device.instant_at(at)).await;
            }
        })
    }

    fn spawn(&self, task: BoxFuture<()>) {
        self.run(task);
    }

    fn quic_runtime(&self) -> Arc<dyn Runtime> {
        Arc::new(QuicRuntime { base: Base::Phone(self.clone()) })
    }

    fn udp(&self, local: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Ok(Socket::bind(&self.inner.net, Owner::Phone(self.inner.id), local)?)
    }

    fn tcp(&self, remote: SocketAddr) -> BoxFuture<io::Result<Box<dyn ByteStream>>> {
        let opening = Stream::open(Arc::clone(&self.inner.net), self.inner.id, remote);
        Box::pin(async move { Ok(Box::new(opening.await?) as Box<dyn ByteStream>) })
    }

    fn resolve(&self, address: &str) -> BoxFuture<io::Result<Vec<SocketAddr>>> {
        let found = if !self.inner.net.is_attached(self.inner.id) {
            Err(io::ErrorKind::NetworkUnreachable.into())
        } else if let Ok(address) = address.parse() {
            Ok(vec![address])
        } else {
            Ok(self.inner.gateways.clone())
        };
        Box::pin(async move { found })
    }

    fn in_place(&self) -> bool {
        true
    }
}

/// What quinn runs on in the world.
#[derive(Debug)]
pub(crate) struct QuicRuntime {
    base: Base,
}

/// Whose clock and tasks they are.
#[derive(Clone, Debug)]
enum Base {
    Phone(Device),
    Gateway(Process),
}

impl QuicRuntime {
    /// For a gateway in this process.
    pub(crate) fn of_gateway(process: Process) -> Self {
        Self { base: Base::Gateway(process) }
    }
}

impl Base {
    fn now(&self) -> std::time::Instant {
        match self {
            Self::Phone(device) => (device.inner.start + device.monotonic_now()).into_std(),
            Self::Gateway(_) => Instant::now().into_std(),
        }
    }

    /// The tokio instant at which [`Self::now`] shows `at`.
    fn instant(&self, at: std::time::Instant) -> Instant {
        match self {
            Self::Phone(device) => {
                let start = device.inner.start.into_std();
                device.instant_at(at.saturating_duration_since(start))
            }
            Self::Gateway(_) => Instant::from_std(at),
        }
    }
}

impl Runtime for QuicRuntime {
    fn new_timer(&self, at: std::time::Instant) -> Pin<Box<dyn AsyncTimer>> {
        let sleep = Box::pin(tokio::time::sleep_until(self.base.instant(at)));
        Box::pin(Timer { base: self.base.clone(), at, sleep })
    }

    fn spawn(&self, future: BoxFuture<()>) {
        match &self.base {
            Base::Phone(device) => device.run(future),
            Base::Gateway(process) => process.spawn(future),
        }
    }

    fn wrap_udp_socket(&self, _: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        // A real socket has no place in the world.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn now(&self) -> std::time::Instant {
        self.base.now()
    }
}

#[derive(Debug)]
struct Timer {
    base: Base,
    at: std::time::Instant,
    sleep: Pin<Box<Sleep>>,
}

impl AsyncTimer for Timer {
    fn reset(mut self: Pin<&mut Self>, at: std::time::Instant) {
        self.at = at;
        let instant = self.base.instant(at);
        self.sleep.as_mut().reset(instant);
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if Future::poll(self.sleep.as_mut(), cx).is_pending() {
                return Poll::Pending;
            }
            if self.base.now() >= self.at {
                return Poll::Ready(());
            }
            // The phone was suspended meanwhile.
            let instant = self.base.instant(self.at);
            self.sleep.as_mut().reset(instant);
        }
    }
}

/// The world's time of an instant, for those who hold both.
pub(crate) fn sim_time(start: Instant, at: Instant) -> SimTime {
    SimTime::START + at.saturating_duration_since(start)
}

//! A world: one thread on which a gateway, phones and the network between them live in virtual time.
//!
//! - Everything that happens follows from the seed and from what the world is asked to do: the same run again gives the same
//!   log, byte for byte.
//! - Time passes only while everybody waits, and then at once: an hour of waiting costs nothing.
//! - What the gateway stores lies in memory and survives [`Gateway::crash`]; a phone's database is a file that survives
//!   [`Phone::kill_app`].
//!
//! Not here: what goes wrong by itself (`plan`), what is said (`chat`), whether it came through (`fulmar_badnet::checker`).

use std::cell::RefCell;
use std::fmt;
use std::hash::RandomState;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use fulmar_badnet::history::{Event, History};
use fulmar_badnet::net::Path;
use fulmar_badnet::{Profile, Rng, SimTime};
use fulmar_client::{Client, Durability, NetworkHint, NetworkKind, Options, Token, Trust};
use fulmar_gateway::config::retention::KeepAge;
use fulmar_gateway::config::{BroadcastConfig, Config, Engine};
use fulmar_gateway::data_folder::DataFolder;
use fulmar_gateway::drain::{Cause, DrainTrigger, drain};
use fulmar_gateway::gateway::Sockets;
use fulmar_gateway::ground;
use fulmar_gateway::identity::token::{Mint, mint};
use fulmar_protocol::id::UnixMillis;
use fulmar_store::MemoryDisk;
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::Instant;

use crate::bite::{Bite, Bites};
use crate::disk::{Disk, DiskManner, OnDisk};
use crate::entropy;
use crate::network::{Direction, Net, Owner, Rules, Traffic};
use crate::phone::{Device, QuicRuntime, WALL_START_MS, sim_time};
use crate::process::Process;
use crate::socket::Socket;
use crate::spent::Spent;
use crate::stream::Listener;

/// The stack of a world's thread: unoptimised futures of two ends on one thread are large.
const STACK_BYTES: usize = 32 * 1024 * 1024;

/// Events a world's history may hold.
const EVENTS_MAX: usize = 2_000_000;

/// The name in the gateway's certificate.
const SERVER_NAME: &str = "localhost";

/// How long the gateway of a world has to drain.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Labels of the independent sources of chance.
mod label {
    pub(super) const ENTROPY: u64 = 1;
    pub(super) const NET: u64 = 2;
    pub(super) const DISK: u64 = 3;
    pub(super) const PHONE: u64 = 4;
    pub(super) const GATEWAY: u64 = 5;
}

/// A world to be.
///
/// ```
/// use fulmar_sim::{Profile, World};
///
/// let ended = World::new(7).profile(Profile::Lift).run(async |sim| {
///     let alice = sim.phone("alice").connect().await?;
///     let bob = sim.phone("bob").connect().await?;
///     let mut inbox = bob.messages();
///     // The lift may be anywhere; the message arrives all the same.
///     alice.direct("bob").await?.send("I'm on my way").await?;
///     loop {
///         let message = inbox.next().await.expect("bob's client runs");
///         if &message.payload[..] == b"I'm on my way" {
///             return Ok(());
///         }
///     }
/// });
/// ended.value.expect("it arrived");
/// ```
#[derive(Clone, Debug)]
pub struct World {
    seed: u64,
    path: Path,
    shards: u16,
    keep_log: bool,
    limit: Duration,
    kept_for: Option<Duration>,
    broadcast: Option<BroadcastConfig>,
    hash_keys: u32,
}

/// What is left of a world.
#[derive(Debug)]
pub struct Ended<T> {
    /// What its people found out.
    pub value: anyhow::Result<T>,
    /// What was recorded with [`Sim::record`].
    pub history: History,
    /// Which faults bit, and how often.
    pub bites: Bites,
    /// Lines of the event log.
    pub log_count: u64,
    /// A hash over all of them.
    pub log_hash: u64,
    /// The lines, if [`World::keep_log`] was asked for.
    pub log: Option<Vec<u8>>,
    /// How long it lasted, in its own time.
    pub lasted: Duration,
}

impl World {
    /// A world with one gateway, a clean network, and this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            path: Path::default(),
            shards: 2,
            keep_log: false,
            limit: Duration::from_secs(3_600),
            kept_for: None,
            broadcast: None,
            hash_keys: 0,
        }
    }

    /// The network new phones are in.
    #[must_use]
    pub fn profile(self, profile: Profile) -> Self {
        self.path(profile.path())
    }

    /// The same, in numbers of your own.
    #[must_use]
    pub fn path(mut self, path: Path) -> Self {
        self.path = path;
        self
    }

    /// Shards of the gateway; 2 unless said.
    #[must_use]
    pub fn shards(mut self, shards: u16) -> Self {
        self.shards = shards;
        self
    }

    /// How long the gateway keeps what was said, in whole seconds; everything and for good unless said. It looks each second.
    #[must_use]
    pub fn kept_for(mut self, age: Option<Duration>) -> Self {
        self.kept_for = age;
        self
    }

    /// Everybody reads the broadcast of this name, and these users write there.
    #[must_use]
    pub fn broadcast(mut self, name: &str, senders: Vec<String>) -> Self {
        self.broadcast = Some(BroadcastConfig { name: name.to_owned(), senders });
        self
    }

    /// Uses so many keys of std's hashes up before the world begins, so that its maps have others. Nothing may come of that: how many are
    /// used is a matter of real time, where the store's own threads are ahead or behind.
    #[must_use]
    pub const fn hash_keys(mut self, used_up: u32) -> Self {
        self.hash_keys = used_up;
        self
    }

    /// Keeps the lines of the event log, not only their hash.
    #[must_use]
    pub fn keep_log(mut self, keep: bool) -> Self {
        self.keep_log = keep;
        self
    }

    /// How long the world may last in its own time; an hour unless said.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Lets the world run until `people` has ended. The thread that asks waits.
    pub fn run<T, F>(self, people: F) -> Ended<T>
    where
        T: Send + 'static,
        F: AsyncFnOnce(&Sim) -> anyhow::Result<T> + Send + 'static,
    {
        let thread = std::thread::Builder::new()
            .name(format!("world-{}", self.seed))
            .stack_size(STACK_BYTES)
            .spawn(move || self.live(people));
        let ended = thread
            .context("a world's thread can't start")
            .and_then(|thread| thread.join().map_err(|panic| anyhow::anyhow!(told(&*panic))));
        ended.unwrap_or_else(|error| Ended {
            value: Err(error),
            history: History::new(),
            bites: Bites::default(),
            log_count: 0,
            log_hash: 0,
            log: None,
            lasted: Duration::ZERO,
        })
    }

    fn live<T, F>(self, people: F) -> Ended<T>
    where
        F: AsyncFnOnce(&Sim) -> anyhow::Result<T>,
    {
        let rng = Rng::new(self.seed);
        entropy::seed_this_thread(rng.fork(label::ENTROPY));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        (0..self.hash_keys).for_each(|_| drop(RandomState::new()));
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => panic_free(&error),
        };
        let local = LocalSet::new();
        let ended = local.block_on(&runtime, self.lived(&rng, people));
        drop(local);
        ended
    }

    async fn lived<T, F>(self, rng: &Rng, people: F) -> Ended<T>
    where
        F: AsyncFnOnce(&Sim) -> anyhow::Result<T>,
    {
        let net = Net::new(rng.fork(label::NET), self.keep_log);
        let start = Instant::now();
        ground::simulate(UnixMillis::new(WALL_START_MS).unwrap_or_default());
        let driving = tokio::task::spawn_local({
            let net = Arc::clone(&net);
            async move { net.drive().await }
        });
        let limit = self.limit;
        let history = Arc::new(Mutex::new(History::bounded(EVENTS_MAX)));
        let value = match Sim::new(&self, rng, &net, start, &history).await {
            Ok(sim) => {
                let value = match tokio::time::timeout(limit, people(&sim)).await {
                    Ok(value) => value,
                    Err(_) => Err(anyhow::anyhow!("the world's time is over after {limit:?}")),
                };
                sim.end().await;
                value
            }
            Err(error) => Err(error),
        };
        driving.abort();
        let bites = net.bites();
        let (log_count, log_hash, log) = net.take_log().close();
        let history = take(&history);
        Ended { value, history, bites, log_count, log_hash, log, lasted: start.elapsed() }
    }
}

#[expect(clippy::panic, reason = "the panic is caught where the thread is joined, and told there")]
fn panic_free(error: &std::io::Error) -> ! {
    panic!("a runtime can't start: {error}")
}

/// What was recorded; nothing is left.
fn take(history: &Mutex<History>) -> History {
    let mut history = history.lock().unwrap_or_else(PoisonError::into_inner);
    std::mem::replace(&mut *history, History::bounded(0))
}

/// What a panic said.
fn told(panic: &(dyn std::any::Any + Send)) -> String {
    let text =
        panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the world panicked: {}", text.unwrap_or("without a word"))
}

/// A world while it lives: what its people see and do.
pub struct Sim {
    net: Arc<Net>,
    start: Instant,
    rng: Rng,
    path: Path,
    folder: tempfile::TempDir,
    gateway: Gateway,
    app: (String, String),
    certificate: Vec<u8>,
    phones: RefCell<Vec<Device>>,
    history: Arc<Mutex<History>>,
}

impl Sim {
    async fn new(
        world: &World,
        rng: &Rng,
        net: &Arc<Net>,
        start: Instant,
        history: &Arc<Mutex<History>>,
    ) -> anyhow::Result<Self> {
        let folder = temporary_folder()?;
        let data = folder.path().join("gateway");
        let mut config = Config::in_folder(&data);
        config.listen.address = SocketAddr::from(([10, 0, 0, 1], 443));
        config.listen.http_address = None;
        config.data.engine = Engine::Memory;
        config.data.shards = world.shards;
        // A token ends when it says so.
        config.auth.leeway_s = 0;
        if let Some(age) = world.kept_for {
            config.retention.age = KeepAge::at(age.as_secs().max(1) * 1_000);
            config.retention.sweep_s = 1;
            config.retention.clock_settle_s = 1;
        }
        if let Some(app) = config.apps.first_mut() {
            app.broadcasts.extend(world.broadcast.clone());
        }
        let keys = DataFolder::prepare(&data, &config.tls.names)?;
        let certificate = std::fs::read(keys.certificate())?;
        let app = config.apps.first().context("a fresh folder has an app")?;
        let app = (app.name.clone(), app.issuer.clone());
        let disk = Disk::new(net, rng.fork(label::DISK));
        let gateway = Gateway {
            net: Arc::clone(net),
            address: config.listen.address,
            config,
            keys: Arc::new(keys),
            memory: MemoryDisk::default(),
            disk,
            rng: RefCell::new(rng.fork(label::GATEWAY)),
            running: RefCell::new(None),
            failed: Rc::new(RefCell::new(None)),
        };
        gateway.start().await?;
        Ok(Self {
            net: Arc::clone(net),
            start,
            rng: rng.clone(),
            path: world.path.clone(),
            folder,
            gateway,
            app,
            certificate,
            phones: RefCell::new(Vec::new()),
            history: Arc::clone(history),
        })
    }

    async fn end(&self) {
        // Phones first: a phone that loses its gateway would begin to look for it.
        for device in self.phones.borrow().iter() {
            device.kill();
        }
        self.gateway.stop().await;
    }

    /// The gateway.
    #[must_use]
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// A new phone of this user, in the world's network, with an app that does not run yet.
    #[must_use]
    pub fn phone(&self, user: &str) -> Phone {
        let number = self.phones.borrow().len();
        let rng = self.rng.fork(label::PHONE + ((number as u64 + 1) << 16));
        let device = Device::new(&self.net, self.start, vec![self.gateway.address], rng);
        self.net.attach(device.id(), self.path.clone());
        self.phones.borrow_mut().push(device.clone());
        Phone {
            net: Arc::clone(&self.net),
            device,
            user: user.to_owned(),
            token: self.token(user),
            database: self.folder.path().join(format!("phone-{number}.db")),
            address: self.gateway.address,
            certificate: self.certificate.clone(),
            started: Arc::new(AtomicBool::new(false)),
        }
    }

    /// A token for this user, valid for a week of the world.
    #[must_use]
    pub fn token(&self, user: &str) -> String {
        self.business().token(user, Duration::from_secs(7 * 86_400))
    }

    /// The business, to be taken along.
    pub(crate) fn business(&self) -> Business {
        Business { keys: Arc::clone(&self.gateway.keys), app: self.app.clone() }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> SimTime {
        sim_time(self.start, Instant::now())
    }

    /// Waits, which takes no time outside of the world.
    pub async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    /// Writes an event into the history and into the log.
    pub fn record(&self, event: Event) {
        self.recorder().record(event);
    }

    /// The same, to be taken along.
    #[must_use]
    pub fn recorder(&self) -> Recorder {
        Recorder { net: Arc::clone(&self.net), history: Arc::clone(&self.history), start: self.start }
    }

    /// What bit so far.
    #[must_use]
    pub fn bites(&self) -> Bites {
        self.net.bites()
    }

    /// What was recorded so far.
    #[must_use]
    pub fn history(&self) -> History {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a fault that its own people make.
    pub(crate) fn bite(&self, bite: Bite, what: fmt::Arguments<'_>) {
        self.net.bite(bite, what);
    }
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim").field("now", &self.now()).finish_non_exhaustive()
    }
}

/// Who says who is who.
#[derive(Clone, Debug)]
pub(crate) struct Business {
    keys: Arc<DataFolder>,
    app: (String, String),
}

impl Business {
    /// A token for this user that is good for so long, in whole seconds, from now.
    pub(crate) fn token(&self, user: &str, good_for: Duration) -> String {
        let claims = Mint { app: &self.app.0, issuer: &self.app.1, user, ttl_s: good_for.as_secs() };
        // A name that may not be gives a token that is refused.
        mint(&self.keys.dev_key, claims, ground::unix_now()).unwrap_or_default()
    }
}

/// In memory where there is a folder for that.
fn temporary_folder() -> anyhow::Result<tempfile::TempDir> {
    let memory = std::path::Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    builder.prefix("fulmar-sim-");
    let folder = if memory.is_dir() { builder.tempdir_in(memory) } else { builder.tempdir() };
    folder.context("a temporary folder can't be made")
}

/// Writes into a world's history.
#[derive(Clone)]
pub struct Recorder {
    net: Arc<Net>,
    history: Arc<Mutex<History>>,
    start: Instant,
}

impl Recorder {
    /// Adds an event; its place in the order is taken now.
    pub fn record(&self, event: Event) {
        self.net.note(format_args!("{event}"));
        let at = sim_time(self.start, Instant::now());
        self.history.lock().unwrap_or_else(PoisonError::into_inner).record(at, event);
    }

    /// Counts a fault.
    pub(crate) fn bite(&self, bite: Bite, what: fmt::Arguments<'_>) {
        self.net.bite(bite, what);
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

/// A phone of a world.
#[derive(Clone, Debug)]
pub struct Phone {
    net: Arc<Net>,
    device: Device,
    user: String,
    token: String,
    database: PathBuf,
    address: SocketAddr,
    certificate: Vec<u8>,
    started: Arc<AtomicBool>,
}

impl Phone {
    /// Whose it is.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// What an app's own code makes its client from.
    #[must_use]
    pub fn options(&self) -> Options {
        self.options_with(self.token.as_str())
    }

    /// The same with a token, or somebody who gives tokens, of your own.
    #[must_use]
    pub fn options_with(&self, token: impl Into<Token>) -> Options {
        Options::new(self.database.clone(), self.address.to_string(), SERVER_NAME, token)
            .trust(Trust::Certificate(self.certificate.clone()))
            .durability(Durability::AppKill)
            .platform(Arc::new(self.device.clone()))
    }

    /// Starts a client on the phone's database.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect(&self) -> Result<Client, fulmar_client::Error> {
        self.connect_with(self.options()).await
    }

    /// Starts a client with these options, which came from this phone.
    pub(crate) async fn connect_with(&self, options: Options) -> Result<Client, fulmar_client::Error> {
        self.started.store(true, Ordering::Relaxed);
        Client::connect(options).await
    }

    /// Runs a task in the phone's process: it stands still while the phone is suspended and ends when the app is killed.
    pub fn run(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.device.run(Box::pin(task));
    }

    /// Kills the app: its tasks and sockets are gone at once, its database stays. Clients made before are of no use any more;
    /// drop them.
    pub fn kill_app(&self) {
        if self.started.swap(false, Ordering::Relaxed) {
            self.net.bite(Bite::AppKilled, format_args!("phone {}", self.device.id()));
        }
        self.device.kill();
    }

    /// Whether its app runs.
    pub(crate) fn has_tasks(&self) -> bool {
        self.device.has_tasks()
    }

    /// Whether it is in a network.
    #[must_use]
    pub fn has_network(&self) -> bool {
        self.net.is_attached(self.device.id())
    }

    /// The app's process ends, after the app itself has come to an end.
    pub fn end_app(&self) {
        self.started.store(false, Ordering::Relaxed);
        self.device.kill();
    }

    /// Suspends the phone (`true`) or wakes it up.
    pub fn freeze(&self, frozen: bool) {
        self.device.set_frozen(frozen);
    }

    /// Whether it is suspended.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.device.is_frozen()
    }

    /// Sets the wall clock ahead of the true time, or behind.
    pub fn set_wall_clock(&self, ahead_ms: i64) {
        self.device.set_wall(ahead_ms);
    }

    /// The phone changes to another network: new address, new path, new NAT. The old one is gone.
    pub fn change_network(&self, path: impl Into<Path>) {
        self.net.attach(self.device.id(), path.into());
    }

    /// The phone has no network until [`Phone::change_network`].
    pub fn lose_network(&self) {
        self.net.detach(self.device.id());
    }

    /// The network stays and its path becomes another.
    pub fn set_path(&self, path: impl Into<Path>) {
        self.net.set_path(self.device.id(), path.into());
    }

    /// Nothing gets through for so long.
    pub fn black_out(&self, lasts: Duration) {
        self.net.black_out(self.device.id(), lasts);
    }

    /// Cuts one direction (`true`), or mends it.
    pub fn cut(&self, direction: Direction, cut: bool) {
        self.net.cut(self.device.id(), direction, cut);
    }

    /// The NAT forgets the phone: it goes on from another port.
    pub fn rebind_nat(&self) {
        self.net.rebind(self.device.id());
    }

    /// From now on the NAT forgets what was idle for longer.
    pub fn nat_idle_max(&self, idle_max: Option<Duration>) {
        self.net.nat_idle_max(self.device.id(), idle_max);
    }

    /// What the network blocks from now on: all of UDP, or only what follows QUIC's handshake.
    pub fn block(&self, udp: bool, data: bool) {
        self.net.set_rules(self.device.id(), Rules { udp_blocked: udp, data_blocked: data });
    }

    /// Whether the phone's sockets live on in another network (they do unless said), or die with their own.
    pub fn sockets_follow(&self, follow: bool) {
        self.net.sockets_follow(self.device.id(), follow);
    }

    /// How many bytes each of the phone's sockets holds for an app that does not read, as one that is suspended; `None`: as many
    /// as Linux gives it, 208 KiB. What comes beyond is dropped.
    pub fn socket_room(&self, bytes: Option<usize>) {
        self.net.set_socket_room(self.device.id(), bytes);
    }

    /// What the phone's links have carried.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.net.traffic(self.device.id())
    }

    /// What the phone has spent since it was made.
    #[must_use]
    pub fn spent(&self) -> Spent {
        let (cpu_wakeups, polls) = self.device.cpu();
        Spent { cpu_wakeups, polls, ..self.net.spent(self.device.id()) }
    }

    /// A hint of this kind for [`Client::network_changed`].
    #[must_use]
    pub fn hint(kind: NetworkKind) -> NetworkHint {
        NetworkHint { kind, ..NetworkHint::default() }
    }
}

/// The gateway of a world.
pub struct Gateway {
    net: Arc<Net>,
    address: SocketAddr,
    config: Config,
    keys: Arc<DataFolder>,
    memory: MemoryDisk,
    disk: Arc<Disk>,
    rng: RefCell<Rng>,
    running: RefCell<Option<Running>>,
    failed: Rc<RefCell<Option<String>>>,
}

struct Running {
    process: Process,
    dead: Arc<AtomicBool>,
    trigger: DrainTrigger,
    draining: bool,
    task: JoinHandle<()>,
}

impl Gateway {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running.borrow().as_ref().is_some_and(|running| !running.task.is_finished())
    }

    /// What went wrong in it, if it ended by itself.
    #[must_use]
    pub fn failed(&self) -> Option<String> {
        self.failed.borrow().clone()
    }

    /// What its disk is like from now on.
    pub fn disk(&self, manner: DiskManner) {
        self.disk.set(manner);
    }

    /// From now on (`true`) it stores what it is sent and hears nothing of that from its disk, so that nobody is told. That ends with
    /// `false`, when it is killed ([`Gateway::crash`]), and when it begins to leave.
    pub fn mute_disk(&self, mute: bool) {
        let serves = self.running.borrow().as_ref().is_some_and(|running| !running.draining);
        self.disk.mute(mute && serves);
    }

    /// Starts it, on what it stored before.
    ///
    /// # Errors
    /// It can't start.
    pub async fn start(&self) -> anyhow::Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let process = Process::default();
        let dead = Arc::new(AtomicBool::new(false));
        let udp = Socket::bind(&self.net, Owner::Gateway, self.address).context("the address is taken")?;
        let mut seed = [0; 32];
        for chunk in seed.chunks_mut(8) {
            chunk.copy_from_slice(&self.rng.borrow_mut().next_u64().to_le_bytes());
        }
        let tcp = Listener::bind(&self.net, self.address).context("the address is taken")?;
        let sockets = Sockets {
            udp,
            tcp: Some(Box::new(tcp)),
            runtime: Arc::new(QuicRuntime::of_gateway(process.clone())),
            rng_seed: Some(seed),
        };
        let (trigger, draining) = drain(DRAIN_DEADLINE);
        let (config, memory) = (self.config.clone(), self.memory.clone());
        let (disk, gone) = (Arc::clone(&self.disk), Arc::clone(&dead));
        let (ready, started) = tokio::sync::oneshot::channel();
        let failed = Rc::clone(&self.failed);
        // A set of its own: dropping it ends the shards' tasks where they are.
        let task = tokio::task::spawn_local(async move {
            let local = LocalSet::new();
            let served = local.run_until(Box::pin(async {
                let wrap = |_, writer| OnDisk::new(&disk, writer, &gone);
                let gateway =
                    fulmar_gateway::gateway::Gateway::start_on(config, sockets, Some(memory), wrap).await;
                match gateway {
                    Ok(gateway) => {
                        let _ = ready.send(Ok(()));
                        gateway.run(draining).await
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        Ok(())
                    }
                }
            }));
            if let Err(error) = served.await {
                *failed.borrow_mut() = Some(format!("{error:#}"));
            }
        });
        self.running.replace(Some(Running { process, dead, trigger, draining: false, task }));
        started.await.context("the gateway ended while it started")?
    }

    /// Kills it: nothing more is sent, stored or said. What was committed stays.
    pub async fn crash(&self) {
        if self.running.borrow().is_some() {
            self.net.bite(Bite::GatewayCrashed, format_args!("gateway"));
            self.stop().await;
        }
    }

    async fn stop(&self) {
        let Some(running) = self.running.take() else { return };
        running.dead.store(true, Ordering::Relaxed);
        self.net.vanish(Owner::Gateway);
        running.process.kill();
        running.task.abort();
        let _ = running.task.await;
        self.disk.crashed();
    }

    /// It begins to leave in order; [`Gateway::drain`] waits for the end of that.
    pub fn begin_drain(&self) {
        if let Some(running) = &mut *self.running.borrow_mut()
            && !running.draining
        {
            running.draining = true;
            self.disk.mute(false);
            running.trigger.start(Cause::Request);
            self.net.bite(Bite::GatewayDrained, format_args!("gateway"));
        }
    }

    /// Whether it leaves, or has left that way.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.running.borrow().as_ref().is_some_and(|running| running.draining)
    }

    /// Lets it leave in order, and waits until it has left.
    ///
    /// # Errors
    /// What it says at its end.
    pub async fn drain(&self) -> anyhow::Result<()> {
        self.begin_drain();
        let Some(running) = self.running.take() else { return Ok(()) };
        let ended = running.task.await;
        running.process.kill();
        self.net.vanish(Owner::Gateway);
        ended.context("the gateway's task ended badly")?;
        match self.failed.take() {
            Some(failed) => Err(anyhow::anyhow!(failed)),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("running", &self.is_running()).finish_non_exhaustive()
    }
}

//! The composition root: opens the store, starts the shards, listens, and takes everything down in order.
//!
//! - Stages don't know this file; it knows all of them.
//! - Order at the start: data folder, store, shards, endpoints, pages. At the end: GOAWAY, connections, shards, store.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Weak, atomic::AtomicU64},
    time::Duration,
};

use anyhow::Context as _;
use fulmar_protocol::id::{FolderId, ShardId};
use fulmar_store::{
    ColdOptions, CommitError, MemoryDisk, OpenError, ShardError, ShardReader, ShardWriter, Store,
    StoreOptions,
};
use fulmar_transport::tcp::Listen;
use futures_util::FutureExt;
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tracing::{error, info, warn};

use crate::{
    accept::{
        book::{self, Book},
        endpoint::{Shared, accept},
        resets, sockets,
        steering::Core,
        stream::Streams,
        tls::{Certificate, endpoint_config, server_config, stream_tls_config, tls_config},
    },
    config::{ColdConfig, Config, Durability, Engine},
    context::{Context, LOOKS_AT_ONCE},
    conversation::{
        route::Route,
        shard::{
            self, CommitLog, IntakeLimits, ShardHandle, ShardLimits, Worker, open_broadcasts, repair_links,
        },
    },
    cores::{Cores, GOODBYE, Post},
    data_folder::{DataFolder, FolderLock},
    drain::Drain,
    fanout::{ring::RingLimits, roster::AwayLimits},
    ground::{blocking, is_simulated, unix_now},
    http::{Canary, HttpServer, Pages, cannot_listen},
    identity::{ticket::Tickets, token::Verifier},
    metrics::Metrics,
    open_files,
    retention::{policy::Policy, sweep::Sweeper},
    telemetry::Complaints,
};

/// Conversations a shard keeps loaded. A loaded one without readers takes a few hundred bytes and its members.
const LOADED_MAX: usize = 50_000;

/// Members a group may have.
const MEMBERS_MAX: usize = 100_000;

/// What a gateway is reached through.
#[derive(Debug)]
pub struct Sockets {
    /// QUIC's socket.
    pub udp: Arc<dyn AsyncUdpSocket>,
    /// Where byte streams come in, for clients that can't use UDP; `None`: nowhere.
    pub tcp: Option<Box<dyn Listen>>,
    /// What quinn runs on.
    pub runtime: Arc<dyn Runtime>,
    /// Seeds what quinn leaves to chance; `None`: the system does.
    pub rng_seed: Option<[u8; 32]>,
}

/// A gateway that listens.
#[derive(Debug)]
pub struct Gateway {
    config: Config,
    folder: DataFolder,
    identity: FolderId,
    _lock: FolderLock,
    certificate: Arc<Certificate>,
    address: SocketAddr,
    doors: Doors,
    http: Option<HttpServer>,
    store: Arc<Store>,
    shards: Vec<ShardHandle>,
    workers: Vec<Worker>,
    metrics: Metrics,
}

/// What was bound, before anything listens.
enum Bound {
    /// To be served where the gateway runs.
    Here(Sockets),
    /// To be served by a thread per UDP socket.
    Cores { udp: Vec<std::net::UdpSocket>, tcp: Option<std::net::TcpListener> },
}

impl Bound {
    fn endpoints(&self) -> u16 {
        self.cores().max(1)
    }

    /// Threads that are to serve; 0: none of their own.
    fn cores(&self) -> u16 {
        match self {
            Self::Here(_) => 0,
            Self::Cores { udp, .. } => u16::try_from(udp.len()).unwrap_or(u16::MAX),
        }
    }

    fn address(&self) -> std::io::Result<SocketAddr> {
        match self {
            Self::Here(sockets) => sockets.udp.local_addr(),
            Self::Cores { udp, .. } => udp
                .first()
                .map_or_else(|| Err(std::io::ErrorKind::NotConnected.into()), |first| first.local_addr()),
        }
    }
}

/// Where clients come in.
#[derive(Debug)]
enum Doors {
    /// One endpoint, which runs where the gateway does.
    Here { endpoint: quinn::Endpoint, udp: Arc<dyn AsyncUdpSocket>, streams: Option<Streams> },
    /// An endpoint per core; they start when the gateway runs.
    Cores(Vec<Post>),
}

impl Doors {
    /// How many endpoints there are.
    fn endpoints(&self) -> u16 {
        match self {
            Self::Here { .. } => 1,
            Self::Cores(posts) => u16::try_from(posts.len()).unwrap_or(u16::MAX),
        }
    }

    /// A socket packets can be sent from.
    fn udp(&self) -> std::io::Result<Arc<dyn AsyncUdpSocket>> {
        match self {
            Self::Here { udp, .. } => Ok(Arc::clone(udp)),
            Self::Cores(posts) => {
                let first = posts.first().ok_or(std::io::ErrorKind::NotConnected)?;
                TokioRuntime.wrap_udp_socket(first.socket.try_clone()?)
            }
        }
    }

    /// Serves until the drain is over.
    async fn serve(self, shared: &Shared, mut drain: Drain) -> anyhow::Result<()> {
        match self {
            Self::Here { endpoint, udp: _, streams } => {
                accept(&endpoint, streams, shared, drain.clone()).await?;
                drain.started().await;
                endpoint.close(0u32.into(), b"");
                // The last CLOSE frames leave, and the port with them.
                let _ = tokio::time::timeout(GOODBYE, endpoint.wait_idle()).await;
                Ok(())
            }
            Self::Cores(posts) => {
                let mut cores = Cores::start(posts, shared, &drain).context("a core's thread can't start")?;
                cores.ended().await
            }
        }
    }
}

impl Gateway {
    /// Opens the data folder (making it at the first start) and takes the addresses. Clients that come before
    /// [`Self::run`] wait.
    ///
    /// # Errors
    /// One line that says what is wrong and what to do.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        Self::start_with(config, |_, writer| writer).await
    }

    /// The same with something between every shard and its log, which `wrap` puts there: tests see from here what a
    /// disk does to a gateway.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with<W: CommitLog>(
        config: Config,
        wrap: impl Fn(ShardId, ShardWriter) -> W,
    ) -> anyhow::Result<Self> {
        // A mistake in the configuration is told before anything takes long.
        let address = config.listen.address;
        let bound = bind(address, config.listen.tcp, config.listen.cores.count())
            .await
            .map_err(|error| anyhow::anyhow!(cannot_listen("listen.address", "--listen", address, &error)))?;
        Self::start_bound(config, bound, None, wrap).await
    }

    /// Starts on sockets that are there already, with one endpoint on the caller's runtime, `memory` being the disk of a store
    /// in memory. In a simulated world ([`crate::ground::simulate`]) nothing of it leaves the calling thread, which must be
    /// inside a tokio `LocalSet`; then there are no pages and the certificate is not looked at again.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_on<W: CommitLog>(
        config: Config,
        sockets: Sockets,
        memory: Option<MemoryDisk>,
        wrap: impl Fn(ShardId, ShardWriter) -> W,
    ) -> anyhow::Result<Self> {
        Self::start_bound(config, Bound::Here(sockets), memory, wrap).await
    }

    async fn start_bound<W: CommitLog>(
        config: Config,
        bound: Bound,
        memory: Option<MemoryDisk>,
        wrap: impl Fn(ShardId, ShardWriter) -> W,
    ) -> anyhow::Result<Self> {
        let open_files = open_files::raise(config.limits.open_files);
        if let Some(warning) = open_files.warning() {
            warn!("{warning}");
        }
        let metrics = Metrics::default();
        metrics.open_files_limit.set(open_files.limit);
        metrics.durability(config.data.durability.word());
        if let Some(warning) = durability_warning(&config) {
            warn!("{warning}");
        }

        let folder = DataFolder::prepare(&config.data.path, &config.tls.names)?;
        let lock = folder.lock()?;
        let identity = folder.identity(memory.is_some())?;
        let certificate = Certificate::load(&config.tls, &folder)?;
        let quic = server_config(
            tls_config(&config.tls, Arc::clone(&certificate))?,
            &folder.endpoint_keys,
            &config.transport,
            &config.limits,
            bound.endpoints(),
        )?;
        let stream_tls = Arc::new(stream_tls_config(&config.tls, Arc::clone(&certificate))?);
        let http = match config.listen.http_address.filter(|_| !is_simulated()) {
            Some(address) => Some(HttpServer::bind(address).await?),
            None => None,
        };

        let options = StoreOptions { memory, ..store_options(&config) };
        let path = folder.store();
        let opened = blocking(move || open_store(&path, &options)).await;
        let (store, taken) = opened.context("opening the log panicked")??;
        let limits = shard_limits(&config);
        let (mut shards, mut workers) = (Vec::new(), Vec::new());
        for (id, writer, reader) in taken {
            let (handle, worker) = shard::start(id, wrap(id, writer), reader, limits, metrics.clone())
                .context("a shard's thread can't start")?;
            shards.push(handle);
            workers.push(worker);
        }

        let endpoint = |core| endpoint_config(&folder.endpoint_keys, &config.transport, core);
        metrics.cores.set(bound.cores().into());
        let address = bound.address().context("the socket is gone")?;
        let doors = match bound {
            Bound::Here(sockets) => {
                let mut endpoint = endpoint(Core::ALONE);
                endpoint.rng_seed(sockets.rng_seed);
                let udp = Arc::clone(&sockets.udp);
                let endpoint = quinn::Endpoint::new_with_abstract_socket(
                    endpoint,
                    Some(quic),
                    sockets.udp,
                    sockets.runtime,
                )
                .context("the QUIC endpoint can't start")?;
                let streams = sockets.tcp.map(|listener| Streams { listener, tls: stream_tls });
                Doors::Here { endpoint, udp, streams }
            }
            Bound::Cores { udp, tcp } => {
                let mut posts = Vec::new();
                for (core, socket) in Core::all(u16::try_from(udp.len())?).zip(udp) {
                    let listener = tcp.as_ref().map(std::net::TcpListener::try_clone).transpose()?;
                    let streams = listener.map(|listener| (listener, Arc::clone(&stream_tls)));
                    posts.push(Post { socket, endpoint: endpoint(core), quic: quic.clone(), streams });
                }
                Doors::Cores(posts)
            }
        };
        Ok(Self {
            config,
            folder,
            identity,
            _lock: lock,
            certificate,
            address,
            doors,
            http,
            store,
            shards,
            workers,
            metrics,
        })
    }

    /// Where clients connect: by UDP, and at the same port by TCP if that is on.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the pages are (TCP), if they are on.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(HttpServer::address)
    }

    /// The certificate clients see.
    #[must_use]
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The data folder.
    #[must_use]
    pub fn data_folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the data folder was made just now.
    #[must_use]
    pub const fn first_start(&self) -> bool {
        self.folder.first_start
    }

    /// Serves until the drain is over. Everything that was acked is on disk before, during and after.
    ///
    /// # Errors
    /// What can't be set up; a core that failed; a store that can't be closed properly.
    pub async fn run(self, drain: Drain) -> anyhow::Result<()> {
        let Self {
            config,
            folder,
            identity,
            _lock,
            certificate,
            address: _,
            doors,
            http,
            store,
            shards,
            workers,
            metrics,
        } = self;
        let verifier = Verifier::new(&config.apps, &config.auth, &folder.dev_key)?;
        let route = Route::new(store.shards());
        let mut start = [0; 8];
        getrandom::fill(&mut start)
            .map_err(|error| anyhow::anyhow!("the system gives no random numbers: {error}"))?;
        let reload = config.tls.reload_s;
        let repeat = Duration::from_secs(config.log.repeat_s);
        let context = Arc::new(Context {
            broadcasts: open_broadcasts(&config.apps, &shards, route).await,
            route,
            verifier,
            tickets: Tickets::new(&folder.ticket_key),
            folder: identity,
            metrics: metrics.clone(),
            complaints: Complaints::new(repeat),
            drain: drain.clone(),
            looks: Semaphore::new(LOOKS_AT_ONCE),
            numbers: AtomicU64::new(u64::from_le_bytes(start) >> 8),
            shards,
            config,
        });
        repair_links(&context.shards, route).await;
        // Ends when this does, however it does.
        let mut housekeeping = JoinSet::new();
        housekeeping.spawn(repair_after_recovery(Arc::downgrade(&context), route));
        if !is_simulated() {
            housekeeping.spawn(reload_certificate(certificate, reload));
        }

        let book = Arc::new(Book::new(folder.live_connections(), context.config.limits.connections));
        let udp = doors.udp().context("the socket is gone")?;
        tell_left_behind(&folder, udp, &context, &mut housekeeping).await;
        housekeeping.spawn(Arc::clone(&book).keep());

        let policy = Arc::new(Policy::new(&context.config.retention, &context.config.apps));
        let mut sweeping = JoinSet::new();
        if !policy.keeps_everything() {
            for shard in &context.shards {
                let sweeper =
                    Sweeper::new(&context.config.retention, Arc::clone(&policy), context.metrics.clone());
                sweeping.spawn(sweeper.run(shard.clone()));
            }
        }

        let (started, ready) = watch::channel(false);
        let pages = http.map(|server| {
            let pages = Pages {
                metrics,
                canary: canary(Arc::clone(&store)),
                faults: context
                    .shards
                    .iter()
                    .map(|shard| (shard.reader.shard(), shard.fault.clone()))
                    .collect(),
                warning: durability_warning(&context.config),
                started: ready,
                drain: drain.clone(),
            };
            let mut stop = drain.clone();
            tokio::spawn(server.serve(pages, async move { stop.deadline().await }))
        });
        started.send_replace(true);

        let shared = Shared::new(Arc::clone(&context), Arc::clone(&book), doors.endpoints());
        let served = Box::pin(doors.serve(&shared, drain)).await;
        drop(shared);
        match &served {
            Ok(()) => info!("all connections have ended; writing down what is left"),
            Err(error) => error!("the gateway can't go on, and leaves: {error:#}"),
        }
        if let Some(pages) = pages {
            pages.abort();
        }
        housekeeping.shutdown().await;
        if served.is_ok()
            && let Ok(Err(error)) = blocking(move || book.discard()).await
        {
            warn!(%error, "the list of connections can't be removed; the next start tells some who know it already");
        }
        sweeping.shutdown().await;
        // The shards end when nobody can ask them any more.
        drop(context);
        let mut panicked = 0;
        for worker in workers {
            panicked += usize::from(!worker.ended().await);
        }
        blocking(move || store.close()).await.context("closing the store panicked")??;
        served?;
        anyhow::ensure!(panicked == 0, "{panicked} shard threads had panicked; what was acked is on disk");
        info!("bye");
        Ok(())
    }
}

/// Tries to find a port that is free for both UDP and TCP, where the system is to choose one.
const PORTS_TRIED: usize = 16;

/// Takes an address for QUIC, and the same for TCP if `tcp` is on. `cores`: threads that are to serve it; `None`: where the
/// gateway runs.
async fn bind(address: SocketAddr, tcp: bool, cores: Option<u16>) -> std::io::Result<Bound> {
    let mut tries = if address.port() == 0 { PORTS_TRIED } else { 1 };
    loop {
        tries -= 1;
        let (mut udp, alone) = sockets::bind(address, cores.unwrap_or(1))?;
        let Some(first) = udp.first() else { return Err(std::io::ErrorKind::AddrNotAvailable.into()) };
        let listener = if tcp {
            match tokio::net::TcpListener::bind(first.local_addr()?).await {
                Ok(listener) => Some(listener.into_std()?),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && tries > 0 => continue,
                Err(error) => return Err(error),
            }
        } else {
            None
        };
        if let Some(error) = alone {
            warn!(%error, "packets can't be steered to cores by connection id here: one core serves everybody");
        }
        if cores.is_some() {
            return Ok(Bound::Cores { udp, tcp: listener });
        }
        let udp = TokioRuntime.wrap_udp_socket(udp.remove(0))?;
        let tcp: Option<Box<dyn Listen>> = match listener {
            Some(listener) => Some(Box::new(tokio::net::TcpListener::from_std(listener)?)),
            None => None,
        };
        return Ok(Bound::Here(Sockets { udp, tcp, runtime: Arc::new(TokioRuntime), rng_seed: None }));
    }
}

type Taken = Vec<(ShardId, ShardWriter, ShardReader)>;

/// Opens the log and takes every shard. Blocks.
fn open_store(path: &Path, options: &StoreOptions) -> anyhow::Result<(Arc<Store>, Taken)> {
    let store = Arc::new(Store::open(path, options).map_err(|error| cannot_open(&error))?);
    if store.shards() != options.shards {
        let (kept, wanted) = (store.shards(), options.shards);
        warn!(
            "data.shards = {wanted}, but the data folder was made with {kept}, which stays: set data.shards = {kept}"
        );
    }
    let mut taken = Vec::new();
    for id in (0..store.shards()).filter_map(ShardId::new) {
        let (writer, reader) = store.shard(id).map_err(|error| cannot_take(path, error))?;
        taken.push((id, writer, reader));
    }
    Ok((store, taken))
}

/// The store's sentence, with the setting it is about.
fn cannot_open(error: &OpenError) -> anyhow::Error {
    match error {
        OpenError::OtherEngine { .. } => anyhow::anyhow!("{error} (data.engine)"),
        OpenError::Io { doing, path, source } if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
            anyhow::anyhow!(
                "{doing} {}: the file system is read-only; choose a data folder elsewhere with --data",
                path.display()
            )
        }
        error => anyhow::anyhow!("{error}"),
    }
}

/// The same for a shard that is open but can't be written.
fn cannot_take(path: &Path, error: ShardError) -> anyhow::Error {
    match error {
        ShardError::Commit(CommitError::Full { reason }) => anyhow::anyhow!(
            "the disk of {} is full: {reason}; make room, or lower data.reserve_mib",
            path.display()
        ),
        error => anyhow::anyhow!("{error}"),
    }
}

/// A shard's thread, or the core that looks at it, commits lone sends itself while the disk is as quick as this. Meanwhile it decides nothing, but
/// what it would decide would wait for that commit anyway; handing the commit over and back costs two wake-ups of threads. On a disk slower than this those
/// don't count, and deciding meanwhile makes the next group ready.
const COMMIT_HERE_WITHIN: Duration = Duration::from_millis(2);

/// Zeros ahead of a shard's log, written before they are needed. A small commit syncs in them for two thirds of the processor time and four
/// fifths of the wait that it takes to extend the file; 256 KiB of them take a millisecond, once in some hundred commits.
const LOG_AHEAD_BYTES: u64 = 256 * 1024;

/// How the log is opened, as configured.
pub(crate) fn store_options(config: &Config) -> StoreOptions {
    let mib = 1024 * 1024;
    StoreOptions {
        shards: config.data.shards,
        engine: match config.data.engine {
            Engine::Sled => fulmar_store::EngineKind::Sled,
            Engine::Fjall => fulmar_store::EngineKind::Fjall,
            Engine::Memory => fulmar_store::EngineKind::Memory,
        },
        durability: match config.data.durability {
            Durability::Power => fulmar_store::Durability::Power,
            Durability::Process => fulmar_store::Durability::Process,
        },
        engine_cache_bytes: config.data.engine_cache_mib * mib / u64::from(config.data.shards.max(1)),
        cache_bytes: config.data.tail_cache_mib * mib,
        reserve_bytes: config.data.reserve_mib * mib,
        cold: cold_options(&config.cold),
        commit_here_within: COMMIT_HERE_WITHIN,
        log_ahead_bytes: LOG_AHEAD_BYTES,
        ..StoreOptions::default()
    }
}

fn cold_options(config: &ColdConfig) -> Option<ColdOptions> {
    if config.url.is_empty() {
        return None;
    }
    let after = Duration::from_millis(config.after.limit()?);
    let mut cold = ColdOptions::new(&config.url, after);
    cold.object_bytes_min = config.object_mib << 20;
    cold.cache_bytes = config.cache_mib << 20;
    Some(cold)
}

fn shard_limits(config: &Config) -> ShardLimits {
    ShardLimits {
        ring: RingLimits { records: config.fanout.ring_frames, bytes: config.fanout.ring_bytes },
        loaded_max: LOADED_MAX,
        members_max: MEMBERS_MAX,
        inline_members_max: usize::try_from(config.fanout.inline_members_max).unwrap_or(usize::MAX),
        receipts_members_max: usize::try_from(config.receipts.members_max).unwrap_or(usize::MAX),
        away: AwayLimits {
            lasts: Duration::from_secs(config.limits.away_s),
            bytes: usize::try_from(config.limits.away_mib.saturating_mul(1 << 20)).unwrap_or(usize::MAX)
                / usize::from(config.data.shards.max(1)),
            marks: config.limits.away_conversations,
            members: config.limits.away_members,
        },
        intake: IntakeLimits::waiting_for(Duration::from_millis(config.limits.send_wait_ms.into())),
        cursor_delay: Duration::from_millis(config.receipts.persist_ms),
    }
}

/// What an operator must know who chose less than the default.
fn durability_warning(config: &Config) -> Option<String> {
    match (config.data.engine, config.data.durability) {
        (Engine::Memory, _) => {
            Some("data.engine = \"memory\": every message is gone when this process ends".to_owned())
        }
        (_, Durability::Process) => Some(
            "data.durability = \"process\": acknowledged messages survive kill -9, but a power cut may lose the newest"
                .to_owned(),
        ),
        (_, Durability::Power) => None,
    }
}

/// Repairs what users' lists missed while a shard could not write, each time one can again.
async fn repair_after_recovery(context: Weak<Context>, route: Route) {
    let Some(mut faults) = context.upgrade().map(|context| {
        let faults = context.shards.iter().map(|shard| shard.fault.clone());
        faults.collect::<Vec<_>>()
    }) else {
        return;
    };
    loop {
        let changes = faults.iter_mut().map(|fault| {
            async move { fault.changed().await.map(|()| fault.borrow_and_update().is_none()) }.boxed()
        });
        let (recovered, ..) = futures_util::future::select_all(changes).await;
        let Some(context) = context.upgrade() else { return };
        match recovered {
            Ok(true) => repair_links(&context.shards, route).await,
            Ok(false) => {}
            // The shards are gone.
            Err(_) => return,
        }
    }
}

fn canary(store: Arc<Store>) -> Canary {
    Arc::new(move || {
        let store = Arc::clone(&store);
        async move {
            for number in 0..store.shards() {
                if let Some(shard) = ShardId::new(number) {
                    store.canary_write(shard).await.map_err(|error| format!("shard {shard}: {error}"))?;
                }
            }
            Ok(())
        }
        .boxed()
    })
}

/// If the last process was killed, those who were connected to it are told.
async fn tell_left_behind(
    folder: &DataFolder,
    udp: Arc<dyn AsyncUdpSocket>,
    context: &Arc<Context>,
    housekeeping: &mut JoinSet<()>,
) {
    let transport = &context.config.transport;
    let (path, within) = (folder.live_connections(), transport.idle_timeout() + book::SWEEP_EVERY);
    let gone = match blocking(move || book::left_behind(&path, within, unix_now())).await {
        Ok(Ok(gone)) => gone,
        Ok(Err(error)) => {
            warn!(%error, "who was connected to the last process can't be read; they notice the restart later");
            return;
        }
        Err(_) => return,
    };
    if !gone.is_empty() {
        let keys = folder.endpoint_keys.clone();
        let metrics = context.metrics.clone();
        housekeeping.spawn(resets::tell(udp, keys, gone, transport.resets_per_second, metrics));
    }
}

/// Presents a new certificate when its file changes or SIGHUP asks for it.
async fn reload_certificate(certificate: Arc<Certificate>, every_s: u64) {
    let Ok(mut hangup) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()) else {
        return;
    };
    loop {
        let tick = async {
            match every_s {
                0 => std::future::pending().await,
                seconds => tokio::time::sleep(Duration::from_secs(seconds)).await,
            }
        };
        tokio::select! {
            biased;
            _ = hangup.recv() => {}
            () = tick => {}
        }
        let path: PathBuf = certificate.path().to_owned();
        let certificate = Arc::clone(&certificate);
        match blocking(move || certificate.reload()).await {
            Ok(Ok(true)) => info!(path = %path.display(), "a new certificate is presented from now on"),
            Ok(Ok(false)) | Err(_) => {}
            Ok(Err(error)) => warn!(%error, "the new certificate can't be used; the old one stays"),
        }
    }
}

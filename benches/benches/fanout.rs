//! One sender, a thousand receivers: CPU of the gateway's process per delivery and how late deliveries are, beside a bare
//! quinn server that writes as many bytes to as many connections with the same transport settings.
//!
//! - Both servers are processes of their own and stay up; they are measured in turns.
//! - The gateway's work is everything: the send's commit, its ack, the deliveries, the receivers' ACKs. The floor's is one
//!   write per receiver and message (or per sixteen).
//! - Lone: twenty messages a second. Saturated: as many as the receivers have room for, never more than a window ahead
//!   of them.

use std::{
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::{Buf as _, Bytes, BytesMut};
use fulmar_benches::{
    bare::{self, MESSAGE_BYTES, READY},
    command::Flags,
    meter::Samples,
    payload::Payloads,
    phone::{Phone, Seen, Tokens},
    process::{self, Server},
    report::Report,
};
use fulmar_protocol::id::ConversationId;
use tokio::task::JoinSet;

/// Endpoints the receivers share: enough that a burst fits their sockets.
const ENDPOINTS: usize = 16;

/// Handshakes at once.
const CONNECTING: usize = 64;

const PAYLOAD_BYTES: usize = 128;

/// Messages a sender may be ahead of the receivers when it saturates.
const WINDOW: u64 = 64;

/// Lone messages.
const PACE: Duration = Duration::from_millis(50);

/// After the last message of a window, how long deliveries may take to come.
const LATE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    if let Some(code) = process::play() {
        return code;
    }
    let flags = Flags::read();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("fanout: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(Box::pin(measure(&flags))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fanout: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Counts deliveries of all receivers of one server.
struct Tally {
    begin: Instant,
    deliveries: AtomicU64,
    /// Microseconds from send to delivery.
    latencies: Mutex<Samples>,
}

impl Tally {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            begin: Instant::now(),
            deliveries: AtomicU64::new(0),
            latencies: Mutex::new(Samples::default()),
        })
    }

    /// What a message starts with.
    fn stamp(&self) -> [u8; 8] {
        u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX).to_be_bytes()
    }

    /// A message that starts with `stamp` was delivered; one in `every` is timed.
    fn delivered(&self, stamp: &[u8], every: u64) {
        let number = self.deliveries.fetch_add(1, Ordering::Relaxed);
        if number.is_multiple_of(every)
            && let Some(stamp) = stamp.first_chunk::<8>()
        {
            let sent = Duration::from_nanos(u64::from_be_bytes(*stamp));
            self.samples().add_us(self.begin.elapsed().saturating_sub(sent));
        }
    }

    fn samples(&self) -> MutexGuard<'_, Samples> {
        self.latencies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) -> u64 {
        self.deliveries.load(Ordering::Relaxed)
    }
}

/// Of how many deliveries one is timed: a thousand a message are enough to see the last ones.
const TIMED_EVERY: u64 = 7;

/// Something that sends messages to all receivers.
trait Sender {
    /// Queues a message; `false`: not now.
    fn queue(&mut self, message: Bytes) -> anyhow::Result<bool>;
    /// Writes what is queued and takes what comes back, until dropped.
    async fn attend(&mut self) -> anyhow::Result<()>;
    /// Bytes of a message.
    fn bytes(&self) -> usize;
}

struct FulmarSender {
    phone: Phone,
    group: ConversationId,
}

impl Sender for FulmarSender {
    fn queue(&mut self, message: Bytes) -> anyhow::Result<bool> {
        self.phone.send(self.group, message)
    }

    async fn attend(&mut self) -> anyhow::Result<()> {
        loop {
            self.phone.next().await?;
        }
    }

    fn bytes(&self) -> usize {
        PAYLOAD_BYTES
    }
}

struct BareSender {
    _connection: quinn::Connection,
    stream: quinn::SendStream,
    waiting: BytesMut,
}

impl Sender for BareSender {
    fn queue(&mut self, message: Bytes) -> anyhow::Result<bool> {
        self.waiting.extend_from_slice(&message);
        Ok(true)
    }

    async fn attend(&mut self) -> anyhow::Result<()> {
        while !self.waiting.is_empty() {
            let written = self.stream.write(&self.waiting).await?;
            self.waiting.advance(written);
        }
        std::future::pending().await
    }

    fn bytes(&self) -> usize {
        MESSAGE_BYTES
    }
}

/// One round's figures.
struct Round {
    cpu_us: f64,
    rate: f64,
    p50_ms: f64,
    p99_ms: f64,
}

#[derive(Default)]
struct Rounds {
    cpu_us: Samples,
    rate: Samples,
    p50_ms: Samples,
    p99_ms: Samples,
}

impl Rounds {
    fn add(&mut self, round: &Round) {
        self.cpu_us.add(round.cpu_us);
        self.rate.add(round.rate);
        self.p50_ms.add(round.p50_ms);
        self.p99_ms.add(round.p99_ms);
    }
}

/// Sends for `time`, lone or as fast as it goes, and waits until everything was delivered.
async fn round(
    server: &Server,
    tally: &Tally,
    sender: &mut impl Sender,
    receivers: u64,
    pace: Option<Duration>,
    time: Duration,
    payloads: &mut Payloads,
) -> anyhow::Result<Round> {
    let body = payloads.body(sender.bytes());
    let before = tally.count();
    std::mem::take(&mut *tally.samples());
    let (begin, cpu) = (Instant::now(), server.cpu()?);
    let mut sent = 0u64;
    let mut due = tokio::time::interval(pace.unwrap_or(Duration::from_micros(500)));
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while begin.elapsed() < time {
        let room = match pace {
            Some(_) => 1,
            None => WINDOW.saturating_sub(sent - (tally.count() - before) / receivers),
        };
        // In sixteens, so that a server that gathers is not left with a part.
        let room = if pace.is_none() { room - room % 16 } else { room };
        for _ in 0..room {
            let mut message = BytesMut::with_capacity(body.len());
            message.extend_from_slice(&tally.stamp());
            message.extend_from_slice(body.get(8..).unwrap_or_default());
            anyhow::ensure!(sender.queue(message.freeze())?, "the sender has no room");
            sent += 1;
        }
        tokio::select! {
            biased;
            attended = sender.attend() => attended?,
            _ = due.tick() => {}
        }
    }
    let last = Instant::now();
    while tally.count() - before < sent * receivers {
        anyhow::ensure!(
            last.elapsed() < LATE,
            "{} of {} deliveries are missing",
            sent * receivers - (tally.count() - before),
            sent * receivers
        );
        tokio::select! {
            biased;
            attended = sender.attend() => attended?,
            () = tokio::time::sleep(Duration::from_millis(1)) => {}
        }
    }
    let elapsed = begin.elapsed();
    // Acknowledgements of the last deliveries belong to them.
    tokio::select! {
        biased;
        attended = sender.attend() => attended?,
        () = tokio::time::sleep(Duration::from_millis(150)) => {}
    }
    let deliveries = (tally.count() - before) as f64;
    anyhow::ensure!(tally.count() - before == sent * receivers, "something was delivered twice");
    let cpu = server.cpu()? - cpu;
    let samples = tally.samples().clone();
    Ok(Round {
        cpu_us: cpu.as_secs_f64() * 1e6 / deliveries,
        rate: deliveries / elapsed.as_secs_f64(),
        p50_ms: samples.median() / 1e3,
        p99_ms: samples.quantile(0.99) / 1e3,
    })
}

async fn measure(flags: &Flags) -> anyhow::Result<()> {
    let receivers = flags.pick(1_000, 200);
    let rounds = flags.pick(5, 1);
    let lone_time = Duration::from_millis(flags.pick(5_000, 1_000));
    let full_time = Duration::from_millis(flags.pick(3_000, 700));
    let folder = flags.fresh_folder()?;
    let mut payloads = Payloads::new(flags.seed);

    let data = folder.path().join("fulmar");
    let gateway = Server::gateway(&data)?;
    let empty = gateway.resident()?;
    let (tally, mut tasks) = (Tally::new(), JoinSet::new());
    let mut sender = fulmar(&gateway, &data, receivers, &tally, &mut tasks).await?;
    let held = (gateway.resident()?.saturating_sub(empty)) as f64 / 1024.0 / receivers as f64;

    let bare_folder = folder.path().join("bare");
    let bare = Server::bare(&bare_folder)?;
    let bare_tally = Tally::new();
    let endpoint = bare_receivers(&bare, &bare_folder, receivers, &bare_tally, &mut tasks).await?;
    let mut single = bare_sender(&endpoint, &bare, 1).await?;
    let mut gathered = bare_sender(&endpoint, &bare, 16).await?;

    let watch = async {
        match tasks.join_next().await {
            Some(Ok(Err(error))) => Err(error).context("a receiver"),
            Some(Err(error)) => Err(error).context("a receiver"),
            _ => std::future::pending().await,
        }
    };
    let work = async {
        let [mut lone, mut full, mut bare_lone, mut bare_single, mut bare_gathered] =
            [(); 5].map(|()| Rounds::default());
        for number in 0..=rounds {
            let (lone_time, full_time) = if number == 0 {
                // Warms congestion windows, caches and the branch predictor; not counted.
                (Duration::from_millis(500), Duration::from_millis(300))
            } else {
                (lone_time, full_time)
            };
            let all = [
                round(&bare, &bare_tally, &mut single, receivers, Some(PACE), lone_time, &mut payloads)
                    .await?,
                round(&gateway, &tally, &mut sender, receivers, Some(PACE), lone_time, &mut payloads).await?,
                round(&bare, &bare_tally, &mut single, receivers, None, full_time, &mut payloads).await?,
                round(&bare, &bare_tally, &mut gathered, receivers, None, full_time, &mut payloads).await?,
                round(&gateway, &tally, &mut sender, receivers, None, full_time, &mut payloads).await?,
            ];
            if number > 0 {
                let into = [&mut bare_lone, &mut lone, &mut bare_single, &mut bare_gathered, &mut full];
                into.into_iter().zip(&all).for_each(|(rounds, round)| rounds.add(round));
            }
        }
        anyhow::Ok([lone, full, bare_lone, bare_single, bare_gathered])
    };
    let [lone, full, bare_lone, bare_single, bare_gathered] = tokio::select! {
        done = Box::pin(work) => done?,
        failed = watch => failed?,
    };

    let mut report = Report::new("fanout", flags.quick);
    let (cpu, floor) = (lone.cpu_us.median(), bare_lone.cpu_us.median());
    report.beside("lone: CPU per delivery", "µs", cpu, ("bare, lone", floor));
    report.bar("≤ 1.25 × floor", cpu <= 1.25 * floor);
    report.beside("lone: p50", "ms", lone.p50_ms.median(), ("bare, lone", bare_lone.p50_ms.median()));
    report.beside("lone: p99", "ms", lone.p99_ms.median(), ("bare, lone", bare_lone.p99_ms.median()));
    let cpu = full.cpu_us.median();
    let floor = bare_gathered.cpu_us.median();
    report.beside("saturated: CPU per delivery", "µs", cpu, ("bare, 16 per write", floor));
    report.bar("≤ 2 × floor", cpu <= 2.0 * floor);
    report.beside(
        "saturated: CPU per delivery",
        "µs",
        cpu,
        ("bare, 1 per write", bare_single.cpu_us.median()),
    );
    let rate = full.rate.median();
    report.beside(
        "saturated: rate",
        "deliveries/s",
        rate,
        ("bare, 16 per write", bare_gathered.rate.median()),
    );
    report.beside("saturated: rate", "deliveries/s", rate, ("bare, 1 per write", bare_single.rate.median()));
    report.beside(
        "saturated: p50",
        "ms",
        full.p50_ms.median(),
        ("bare, 16 per write", bare_gathered.p50_ms.median()),
    );
    report.beside(
        "saturated: p99",
        "ms",
        full.p99_ms.median(),
        ("bare, 16 per write", bare_gathered.p99_ms.median()),
    );
    report.record("memory per connected receiver", "KiB", held);
    report.note(format!(
        "{receivers} receivers on {ENDPOINTS} endpoints, {PAYLOAD_BYTES} B payloads, floors {MESSAGE_BYTES} B; medians of \
         {rounds} rounds of {lone_time:?} (lone) and {full_time:?} (saturated), servers in turns"
    ));
    report.note("CPU: user and kernel of the server's process; senders and receivers share the cores but are not in it");
    report.note("the floor has the gateway's transport settings (ACK frequency, windows) and runtime");
    report.finish(flags.json.as_deref())?;
    Ok(())
}

async fn fulmar(
    gateway: &Server,
    data: &std::path::Path,
    receivers: u64,
    tally: &Arc<Tally>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<FulmarSender> {
    let tokens = Tokens::of(data)?;
    let endpoints = (0..ENDPOINTS).map(|_| bare::client_endpoint(data)).collect::<Result<Vec<_>, _>>()?;
    let mut connecting = JoinSet::new();
    let mut names = Vec::new();
    for (number, endpoint) in (0..receivers).zip(endpoints.iter().cycle()) {
        let name = format!("receiver-{number}");
        let token = tokens.mint(&name)?;
        names.push(name);
        let (endpoint, address) = (endpoint.clone(), gateway.address());
        connecting
            .spawn(async move { Phone::connect(&endpoint, address, token, u128::from(number) + 1).await });
        if connecting.len() == CONNECTING {
            receive(connecting.join_next().await.context("nobody")??.context("connecting")?, tally, tasks);
        }
    }
    while let Some(phone) = connecting.join_next().await {
        receive(phone?.context("connecting")?, tally, tasks);
    }
    let endpoint = endpoints.first().context("no endpoint")?;
    let token = tokens.mint("sender")?;
    let mut phone = Phone::connect(endpoint, gateway.address(), token, u128::MAX).await?;
    let group = phone.create_group("everybody", &names).await?;
    Ok(FulmarSender { phone, group })
}

fn receive(mut phone: Phone, tally: &Arc<Tally>, tasks: &mut JoinSet<anyhow::Result<()>>) {
    let tally = Arc::clone(tally);
    tasks.spawn(async move {
        loop {
            match phone.next().await? {
                // Notices of members joining are records too.
                Seen::Delivered(record)
                    if record.payload.len() == PAYLOAD_BYTES && record.kind.sendable() =>
                {
                    tally.delivered(&record.payload, TIMED_EVERY);
                }
                _ => {}
            }
        }
    });
}

async fn bare_receivers(
    server: &Server,
    folder: &std::path::Path,
    receivers: u64,
    tally: &Arc<Tally>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) -> anyhow::Result<quinn::Endpoint> {
    let endpoints = (0..ENDPOINTS).map(|_| bare::client_endpoint(folder)).collect::<Result<Vec<_>, _>>()?;
    let mut connecting = JoinSet::new();
    for (_, endpoint) in (0..receivers).zip(endpoints.iter().cycle()) {
        let (endpoint, address) = (endpoint.clone(), server.address());
        connecting.spawn(async move {
            let connection = endpoint.connect(address, "localhost")?.await?;
            let (mut wish, _) = connection.open_bi().await?;
            wish.write_all(b"r").await?;
            let mut stream = connection.accept_uni().await?;
            let mut ready = [0];
            stream.read_exact(&mut ready).await?;
            anyhow::ensure!(ready == [READY], "the server says something else");
            Ok((connection, wish, stream))
        });
        if connecting.len() == CONNECTING {
            bare_receive(connecting.join_next().await.context("nobody")???, tally, tasks);
        }
    }
    while let Some(connected) = connecting.join_next().await {
        bare_receive(connected??, tally, tasks);
    }
    endpoints.into_iter().next().context("no endpoint")
}

fn bare_receive(
    (connection, wish, mut stream): (quinn::Connection, quinn::SendStream, quinn::RecvStream),
    tally: &Arc<Tally>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) {
    let tally = Arc::clone(tally);
    tasks.spawn(async move {
        let _alive = (connection, wish);
        let mut cut = BytesMut::new();
        while let Some(chunk) = stream.read_chunk(usize::MAX, true).await? {
            cut.extend_from_slice(&chunk.bytes);
            while cut.len() >= MESSAGE_BYTES {
                tally.delivered(&cut, TIMED_EVERY);
                cut.advance(MESSAGE_BYTES);
            }
        }
        anyhow::bail!("the server ended the stream")
    });
}

async fn bare_sender(endpoint: &quinn::Endpoint, server: &Server, gather: u8) -> anyhow::Result<BareSender> {
    let connection = endpoint.connect(server.address(), "localhost")?.await?;
    let (mut stream, _) = connection.open_bi().await?;
    stream.write_all(&[b's', gather]).await?;
    Ok(BareSender { _connection: connection, stream, waiting: BytesMut::new() })
}

//! Phones by the thousand against a gateway: `cargo run --release -p fulmar-load -- --help`.
//!
//! - An open loop: messages are due at times decided before, and are measured from then (`fulmar_benches::schedule`).
//! - The program looks at itself as hard as at the gateway, and says when it was the bottleneck (`verdict`).
//! - Every delivery is checked: once, in order, none missing.
//!
//! The way of a figure: `plan` → `crowd` (threads of phones) → `tally` → `verdict` → `report`, `page`.

mod crowd;
mod members;
mod page;
mod plan;
mod report;
mod scenario;
mod server;
mod tally;
mod verdict;

use std::{
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use fulmar_benches::{schedule::Arrivals, times::spoken};
use tokio::sync::watch;

use crate::{
    crowd::{Common, Conversations, News, Orders, Phase, Thread},
    plan::{Lengths, Shape},
    report::{Memory, Run, Second},
    scenario::Scenario,
    server::{Reading, Server},
    tally::{Counts, Recent},
    verdict::Circumstances,
};

const EXAMPLES: &str = "\
Examples:
  fulmar-load                                              1 000 phones in one group, 20 messages a second
  fulmar-load --groups 0 --rate 10000                      500 pairs that write to each other
  fulmar-load --groups 100 --group-size 100 --rate 400     many groups
  fulmar-load --phones 5000 --group-size 5000 --absent 5000 --rate 40
                                                           a large group, half of it away
  fulmar-load --phones 20000 --rate 0                      idle phones: what does a connection cost?
  fulmar-load --phones 20000 --pairs 10 --rate 50          10 pairs talk, everybody else is idle
  fulmar-load --slow 30 --slow-bytes 1024                  a third reads 1 KiB a second
  fulmar-load --storm 10 --storm-percent 100               everybody comes back at once after 10 s
  fulmar-load --phones 10040 --pairs 20 --rate 200 --storm 5
                                                           who talks goes on while 10 000 come back
  fulmar-load --scenario slow                              one of the runs that benches/RESULTS.md quotes
  fulmar-load --to 127.0.0.1:4433 --data ./data --pid 77   a gateway that runs already

The gateway is started for the run, in a process of its own and with an empty folder, unless --to is given. On
loopback each socket has an address of its own (127.0.0.1 and up): the gateway counts connections by address. Who measures phones by
the thousand needs open files (ulimit -n) only for --sockets, socket buffers (net.core.rmem_max) for bursts, and memory: a phone takes
about 50 KiB of this program. The gateway's limit for connections is 60 000 unless --config says otherwise.";

/// Many phones against a gateway: latencies, what a delivery costs, and whether to believe it.
#[derive(Clone, Debug, Parser)]
#[command(name = "fulmar-load", version, after_help = EXAMPLES, args_override_self = true)]
struct Flags {
    /// One of the runs that the project's figures are from, and what follows from them; other flags change it
    #[arg(long, value_enum)]
    scenario: Option<Scenario>,
    /// Phones that are online
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    phones: u32,
    /// Groups; 0: phones talk in pairs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=100_000))]
    groups: u32,
    /// Pairs that talk; the other phones are silent [default: all are in pairs]
    #[arg(long, value_name = "N", conflicts_with = "group_size")]
    pairs: Option<u32>,
    /// Members of a group that are online [default: all phones]
    #[arg(long, value_name = "N")]
    group_size: Option<u32>,
    /// Members of each group who are never online
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    absent: u32,
    /// Senders in each group
    #[arg(long, value_name = "N", default_value_t = 1)]
    senders: u32,
    /// Messages a second, of all senders; 0: none. Several numbers, with commas: so many apps, each with its part of the phones
    /// and this rate
    #[arg(long, value_name = "PER SECOND,..", default_value = "20", value_delimiter = ',')]
    rate: Vec<f64>,
    /// Seconds between two broadcasts to all phones (of the first app); 0: none
    #[arg(long, value_name = "S", default_value_t = 0.0, conflicts_with = "to")]
    broadcast_every: f64,
    /// For a while so many times as much is due
    #[arg(long, value_name = "FACTOR", requires = "surge_from")]
    surge: Option<f64>,
    /// Seconds of measuring after which that begins
    #[arg(long, value_name = "S", requires = "surge")]
    surge_from: Option<u64>,
    /// How many seconds it lasts
    #[arg(long, value_name = "S", default_value_t = 10)]
    surge_for: u64,
    /// Messages that may wait at a phone whose window is full; what comes beyond is given up
    #[arg(long, value_name = "N", default_value_t = 4_096)]
    outbox: usize,
    /// How messages are spread over time
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson)]
    arrivals: Arrivals,
    /// Length of a message: a number of bytes, `chat` for what people write, or a file with a length on each line
    #[arg(long, value_name = "BYTES|chat|FILE", default_value = "128")]
    payload: String,
    /// Seconds to measure
    #[arg(long, value_name = "S", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Seconds to talk before that
    #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(u64).range(..=3_600))]
    warm_up: u64,
    /// Connects a second
    #[arg(long, value_name = "PER SECOND", default_value_t = 1_000.0)]
    connect_rate: f64,
    /// Of a hundred phones, how many have their conversations open: above the gateway's bound for inline delivery only they are
    /// served as messages come
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=100))]
    open: u32,
    /// Of a hundred phones, how many read slowly
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=99))]
    slow: u32,
    /// Bytes a second a slow reader takes; 0: none ever
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    slow_bytes: u32,
    /// Seconds after which phones lose their connections and come back all at once
    #[arg(long, value_name = "S")]
    storm: Option<u64>,
    /// Of a hundred phones, how many do
    #[arg(long, value_name = "PERCENT", default_value_t = 100, requires = "storm", value_parser = clap::value_parser!(u32).range(1..=100))]
    storm_percent: u32,
    /// Threads of this program; the gateway needs cores too
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// UDP sockets of each thread
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    sockets: u32,
    /// A gateway that runs already
    #[arg(long, value_name = "ADDRESS", requires = "data", conflicts_with_all = ["gateway", "config"])]
    to: Option<SocketAddr>,
    /// Its data folder, for its certificate and development key; without --to, the folder to start one in [default: a
    /// temporary one]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Its process, to read CPU and memory of
    #[arg(long, value_name = "PID", requires = "to")]
    pid: Option<u32>,
    /// The program to start as gateway [default: `fulmar` beside this one]
    #[arg(long, value_name = "FILE")]
    gateway: Option<PathBuf>,
    /// A configuration file for the gateway that is started
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Fail if the gateway takes more memory than this for each phone in the end
    #[arg(long, value_name = "KIB")]
    memory_max: Option<f64>,
    /// The same seed, the same work
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with plots to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// No progress
    #[arg(long)]
    quiet: bool,
}

/// How long after the last message what is missing may come.
const LATE: Duration = Duration::from_secs(30);

/// How long nothing may happen while phones connect or conversations are made.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let flags = Flags::parse();
    let outcome = match flags.scenario {
        Some(Scenario::Members) => {
            members::measure(flags.gateway.as_deref(), flags.config.as_deref(), &[100, 10_000, 99_000])
                .map(|()| true)
        }
        Some(scenario) => scenario::play(scenario, std::env::args_os().skip(1)),
        None => run(&flags).map(|(_, sound)| sound),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("fulmar-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Flags {
    fn shape(&self) -> Shape {
        Shape {
            phones: self.phones,
            groups: if self.pairs.is_some() { 0 } else { self.groups },
            pairs: self.pairs,
            group_size: self.group_size.unwrap_or(self.phones),
            absent: self.absent,
            senders: self.senders,
            slow_percent: self.slow,
            open_percent: self.open,
            apps: u32::try_from(self.rate.len()).unwrap_or(u32::MAX),
        }
    }

    /// Messages a second, of all apps.
    fn all(&self) -> f64 {
        self.rate.iter().sum()
    }

    fn broadcast_every(&self) -> anyhow::Result<Option<Duration>> {
        let every = Duration::try_from_secs_f64(self.broadcast_every).context("--broadcast-every")?;
        Ok((!every.is_zero()).then_some(every))
    }

    fn work(&self, talks: usize) -> String {
        let mut work = format!("{} phones, ", self.phones);
        work += &match self.shape().groups {
            0 => format!("{} pairs, ", talks - usize::from(self.broadcast_every > 0.0)),
            1 => format!("one group of {} of them, ", self.shape().group_size),
            groups => format!("{groups} groups of {}, ", self.shape().group_size),
        };
        if self.absent > 0 {
            work += &format!("{} members more that are away, ", self.absent);
        }
        if self.open > 0 {
            work += &format!("{} % have it open, ", self.open);
        }
        if self.slow > 0 {
            work += &format!("{} % read {} bytes a second, ", self.slow, self.slow_bytes);
        }
        let rates: Vec<String> = self.rate.iter().map(|rate| format!("{rate:.0}")).collect();
        match rates.join(" and ") {
            rates if self.all() > 0.0 => {
                work += &format!("{rates} messages/s of {} bytes for {} s", self.payload, self.seconds);
            }
            _ => work += &format!("silent for {} s", self.seconds),
        }
        if self.broadcast_every > 0.0 {
            work += &format!(", a broadcast to all every {} s", self.broadcast_every);
        }
        if let Some((factor, after)) = self.surge.zip(self.surge_from) {
            work += &format!("; {factor} times as many for {} s after {after} s", self.surge_for);
        }
        if let Some(after) = self.storm {
            work += &format!("; {} % come back at once after {after} s", self.storm_percent);
        }
        work
    }
}

/// Runs, and tells what came of it; `false`: something was lost, doubled or out of order, somebody could not connect, or a bound was
/// missed; which, was said.
fn run(flags: &Flags) -> anyhow::Result<(Run, bool)> {
    ensure!(flags.rate.iter().all(|rate| rate.is_finite() && *rate >= 0.0), "--rate must be 0 or more");
    ensure!(
        flags.surge.is_none_or(|factor| factor.is_finite() && factor >= 1.0),
        "--surge must be 1 or more"
    );
    ensure!(flags.connect_rate.is_finite() && flags.connect_rate > 0.0, "--connect-rate must be above 0");
    let shape = flags.shape();
    let mut talks = if flags.all() > 0.0 { shape.talks()? } else { Vec::new() };
    let broadcast_every = flags.broadcast_every()?;
    if broadcast_every.is_some() {
        // The last of them: that is how it is told from the others.
        talks.push(shape.broadcast());
    }
    let work = flags.work(talks.len());
    let lengths = Lengths::parse(&flags.payload)?;
    for file in flags.json.iter().chain(&flags.html) {
        // Before the work, not after it.
        std::fs::write(file, "").with_context(|| format!("{} can't be written", file.display()))?;
    }
    let stopped = Arc::new(AtomicBool::new(false));
    listen_for_the_end(&stopped)?;

    let scratch = tempfile::tempdir()?;
    let data = flags.data.clone().unwrap_or_else(|| scratch.path().join("gateway"));
    let server = match flags.to {
        Some(address) => Server::at(address, flags.pid),
        None => {
            let config = config_for(flags, scratch.path())?;
            Server::start(flags.gateway.as_deref(), &data, config.as_deref())?
        }
    };
    let orders = Arc::new(Orders {
        begin: Instant::now(),
        run: u64::from(std::process::id()) << 32
            | u64::from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.subsec_nanos()),
        gateway: server.address(),
        data,
        shape,
        talks,
        rates: flags.rate.clone(),
        broadcast_every,
        surge: flags.surge.zip(flags.surge_from).map(|(factor, after)| {
            (Duration::from_secs(after), Duration::from_secs(after + flags.surge_for), factor)
        }),
        outbox: flags.outbox,
        arrivals: flags.arrivals,
        lengths,
        threads: flags.threads,
        sockets: flags.sockets,
        connect_rate: flags.connect_rate,
        slow_bytes: flags.slow_bytes,
        storm: flags.storm.map(|after| (Duration::from_secs(after), flags.storm_percent)),
        seed: flags.seed,
    });
    let mut play = Play::new(flags, orders, server, stopped)?;
    let outcome = play.through(work);
    play.end();
    let run = outcome?;
    std::io::stdout().lock().write_all(run.table().as_bytes())?;
    if let Some(file) = &flags.json {
        std::fs::write(file, format!("{:#}\n", run.json()))?;
    }
    if let Some(file) = &flags.html {
        std::fs::write(file, page::page(&run))?;
    }
    let mut wrong = run.wrong();
    if let (Some(most), Some([_, end])) = (flags.memory_max, run.per_phone())
        && end > most * 1024.0
    {
        wrong.push(format!("{:.1} KiB of memory for each phone, {most} at the most", end / 1024.0));
    }
    for wrong in &wrong {
        eprintln!("FAILED: {wrong}");
    }
    Ok((run, wrong.is_empty()))
}

/// The configuration for a gateway that is started: with several apps, one that has them.
fn config_for(flags: &Flags, scratch: &Path) -> anyhow::Result<Option<PathBuf>> {
    let broadcast = flags.broadcast_every > 0.0;
    if flags.rate.len() < 2 && !broadcast {
        return Ok(flags.config.clone());
    }
    let mut text = match &flags.config {
        Some(file) => {
            std::fs::read_to_string(file).with_context(|| format!("{} can't be read", file.display()))?
        }
        None => String::new(),
    };
    ensure!(
        !text.contains("[[app]]"),
        "several rates are several apps, and broadcasts are of an app: --config must not name any"
    );
    for app in 0..flags.rate.len() {
        text += &format!("\n[[app]]\nname = \"{}\"\ndev_key = true\n", plan::app_name(app));
        if broadcast && app == 0 {
            text += &format!(
                "broadcasts = [{{ name = \"{}\", senders = [\"{}\"] }}]\n",
                plan::BROADCAST,
                plan::user(0)
            );
        }
    }
    let file = scratch.join("apps.toml");
    std::fs::write(&file, text)?;
    Ok(Some(file))
}

/// SIGTERM and Ctrl-C end the talk early; what was measured until then is told. The second one ends the program.
fn listen_for_the_end(stopped: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stopped = Arc::clone(stopped);
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let Ok(mut terminate) = signal(SignalKind::terminate()) else { return };
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = tokio::signal::ctrl_c() => {}
                }
                if stopped.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
    })?;
    Ok(())
}

/// A run on its way.
struct Play<'a> {
    flags: &'a Flags,
    orders: Arc<Orders>,
    server: Server,
    common: Arc<Common>,
    conversations: Conversations,
    phase: watch::Sender<Phase>,
    news: mpsc::Receiver<News>,
    threads: Vec<Thread>,
    stopped: Arc<AtomicBool>,
    told: Instant,
}

impl<'a> Play<'a> {
    fn new(
        flags: &'a Flags,
        orders: Arc<Orders>,
        server: Server,
        stopped: Arc<AtomicBool>,
    ) -> anyhow::Result<Self> {
        let (tell, news) = mpsc::channel();
        let phase = watch::Sender::new(Phase::Connect);
        let (common, conversations) = (Arc::default(), Arc::default());
        let threads = (0..flags.threads)
            .map(|ordinal| crowd::start(ordinal, &orders, &common, &conversations, &phase.subscribe(), &tell))
            .collect::<anyhow::Result<_>>()?;
        let told = Instant::now();
        Ok(Self { flags, orders, server, common, conversations, phase, news, threads, stopped, told })
    }

    fn through(&mut self, work: String) -> anyhow::Result<Run> {
        let began = self.sample()?;
        let empty = began.reading;
        let phones = self.connect()?;
        let there = self.sample()?;
        let connecting = there.at.saturating_sub(began.at);
        let connected = there.reading;
        self.make()?;
        let (seconds, timeline, from, until) = self.talk()?;
        let counts = self.counts();
        let known = self.server.is_known();
        let most = timeline.iter().map(|second| second.resident).max().unwrap_or(0).max(connected.resident);
        let circumstances = Circumstances {
            busy: until.busy_since(&from),
            busy_connecting: there.busy_since(&began),
            connect_rate: Some((
                self.flags.connect_rate,
                f64::from(phones) / connecting.as_secs_f64().max(1e-9),
            )),
            connects_dropped: there.reading.dropped.saturating_sub(began.reading.dropped),
            dropped: until.reading.dropped.saturating_sub(from.reading.dropped),
            rate: (self.flags.all() > 0.0 && self.flags.surge.is_none()).then_some(self.flags.all()),
            seconds,
            lost: self.common.lasts.lost(),
            missing: self.missing(),
            missing_slowly: self.missing_slowly(),
        };
        let mut doubts = verdict::doubts(&counts, &circumstances);
        if self.stopped.load(Ordering::Relaxed) {
            doubts.push("the run was ended early".to_owned());
        }
        let command_line: Vec<String> =
            std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        Ok(Run {
            command_line: command_line.join(" "),
            work,
            missing: circumstances.missing,
            missing_slowly: circumstances.missing_slowly,
            slow: (0..self.flags.phones).map(|phone| u32::from(self.orders.shape.is_slow(phone))).sum(),
            resident: known.then_some(until.reading.resident),
            surge: self.flags.surge_from.zip(self.flags.surge).map(|(from, _)| {
                let from = (self.flags.warm_up + from) as f64;
                (from, from + self.flags.surge_for as f64)
            }),
            seconds,
            counts,
            doubts,
            cpu: known.then(|| until.reading.cpu.saturating_sub(from.reading.cpu)),
            memory: known.then_some(Memory {
                empty: empty.resident,
                connected: connected.resident,
                end: until.reading.resident,
                most,
            }),
            own_memory: fulmar_benches::meter::resident_of(std::process::id())?,
            phones,
            connect_cpu: known.then(|| connected.cpu.saturating_sub(empty.cpu)),
            connecting,
            packets: until.reading.packets.saturating_sub(from.reading.packets),
            timeline,
        })
    }

    /// Ends the phones.
    fn end(&mut self) {
        self.phase.send_replace(Phase::End);
        for thread in self.threads.drain(..) {
            thread.join();
        }
    }

    /// Deliveries that were to come and did not.
    fn missing(&self) -> u64 {
        let came: u64 = self.threads.iter().map(|thread| thread.tally.counts().delivered).sum();
        self.common.expected.load(Ordering::Relaxed).saturating_sub(came)
    }

    /// The same of slow readers.
    fn missing_slowly(&self) -> u64 {
        let came: u64 = self.threads.iter().map(|thread| thread.tally.counts().delivered_slowly).sum();
        self.common.expected_slowly.load(Ordering::Relaxed).saturating_sub(came)
    }

    fn counts(&self) -> Counts {
        let mut all = Counts::default();
        for thread in &self.threads {
            all.append(&thread.tally.counts());
        }
        all
    }

    /// A line that replaces the one before it, on a terminal; elsewhere one now and then.
    fn progress(&mut self, line: &str) {
        let terminal = std::io::stderr().is_terminal();
        let every = if terminal { Duration::from_millis(200) } else { Duration::from_secs(5) };
        if self.flags.quiet || self.told.elapsed() < every {
            return;
        }
        self.told = Instant::now();
        if terminal {
            eprint!("\r\x1b[K{line}");
        } else {
            eprintln!("{line}");
        }
    }

    fn clear_progress(&self) {
        if !self.flags.quiet && std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
    }

    /// The next news; `None`: nothing for now.
    fn hear(&self, last: Instant) -> anyhow::Result<Option<News>> {
        ensure!(!self.stopped.load(Ordering::Relaxed), "ended before anything was measured");
        match self.news.recv_timeout(Duration::from_millis(100)) {
            Ok(News::Failed(error)) => Err(error),
            Ok(news) => Ok(Some(news)),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                ensure!(
                    last.elapsed() < PATIENCE,
                    "nothing has happened for {} s: is the gateway's limit for connections or handshakes too low?",
                    PATIENCE.as_secs()
                );
                Ok(None)
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("all threads are gone"),
        }
    }

    /// Waits until all phones are connected, or can't be.
    fn connect(&mut self) -> anyhow::Result<u32> {
        let (mut connected, mut failed, mut last) = (0, 0, Instant::now());
        while connected + failed < self.flags.phones {
            if let Some(News::Connected(well)) = self.hear(last)? {
                last = Instant::now();
                if well { connected += 1 } else { failed += 1 }
            }
            let all = self.flags.phones;
            self.progress(&format!("connecting: {connected} of {all}, {failed} failed"));
        }
        self.clear_progress();
        if connected == 0 {
            bail!("nobody could connect: {}", self.counts().refusal.unwrap_or_default());
        }
        Ok(connected)
    }

    fn make(&mut self) -> anyhow::Result<()> {
        let all = self.orders.talks.len();
        let mut made = vec![None; all];
        self.phase.send_replace(Phase::SetUp);
        let to_join: u64 = self.orders.talks.iter().map(plan::Talk::others).sum();
        let (mut done, mut joined, mut last, began) = (0, 0, Instant::now(), Instant::now());
        while done < all {
            match self.hear(last)? {
                Some(News::Made(number, conversation)) => {
                    last = Instant::now();
                    if let Some(place) = made.get_mut(number) {
                        *place = Some(conversation);
                        done += 1;
                    }
                }
                Some(News::Joined(more)) => {
                    last = Instant::now();
                    joined += more;
                }
                _ => {}
            }
            self.progress(&format!("conversations: {done} of {all}, members: {joined} of {to_join}"));
        }
        self.clear_progress();
        if !self.flags.quiet && began.elapsed() > Duration::from_secs(2) {
            let took = began.elapsed().as_secs_f64();
            eprintln!("{all} conversations with {joined} members made in {took:.1} s");
        }
        let made = made.into_iter().collect::<Option<Vec<_>>>().context("a conversation is missing")?;
        ensure!(self.conversations.set(made).is_ok(), "conversations are made once");
        Ok(())
    }

    /// Talks; how many seconds were measured, how they went, and what the kernel said before and after them.
    fn talk(&mut self) -> anyhow::Result<(f64, Vec<Second>, Sample, Sample)> {
        let first = self.orders.begin.elapsed() + Duration::from_millis(200);
        let from = first + Duration::from_secs(self.flags.warm_up);
        let until = from + Duration::from_secs(self.flags.seconds);
        self.phase.send_replace(Phase::Talk(first, from, until));
        let mut timeline = Vec::new();
        let mut before = None;
        let mut sample = self.sample()?;
        let mut next = first;
        let mut after = loop {
            next += Duration::from_secs(1);
            let target = if before.is_none() { next.min(from) } else { next.min(until) };
            while self.orders.begin.elapsed() < target && !self.stopped.load(Ordering::Relaxed) {
                std::thread::park_timeout(
                    Duration::from_millis(20).min(target.saturating_sub(self.orders.begin.elapsed())),
                );
                if let Ok(News::Failed(error)) = self.news.try_recv() {
                    return Err(error);
                }
            }
            let now = self.sample()?;
            let second = self.second(&sample, &now, first);
            self.progress(&format!(
                "{:>4.0} s: {:.0} messages/s, ack p99 {}, {:.0} refused/s, {:.0} deliveries/s, p50 {}, p99 {}, {:.2} cores",
                second.at,
                second.acked,
                spoken(second.ack_p99),
                second.put_off,
                second.delivered,
                spoken(second.p50),
                spoken(second.p99),
                second.cores
            ));
            timeline.push(second);
            sample = now;
            if before.is_none() && self.orders.begin.elapsed() >= from {
                before = Some(self.sample()?);
                next = from;
            } else if self.orders.begin.elapsed() >= until || self.stopped.load(Ordering::Relaxed) {
                break self.sample()?;
            }
        };
        let before = before.unwrap_or_else(|| sample.clone());
        if self.stopped.load(Ordering::Relaxed) {
            // What is due from now on does not count.
            self.phase.send_replace(Phase::Talk(first, from, self.orders.begin.elapsed().max(from)));
        }
        let seconds = after.at.saturating_sub(before.at).as_secs_f64();
        let waiting = Instant::now();
        loop {
            let (missing, away) = (self.missing(), self.common.away.load(Ordering::Relaxed));
            if (missing == 0 && away == 0) || waiting.elapsed() >= LATE {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(50));
            self.progress(&format!("waiting for {missing} deliveries, and {away} phones to come back"));
        }
        // What acknowledges the last deliveries belongs to them; what the gateway did long after the measured time does not.
        if waiting.elapsed() < Duration::from_secs(1) {
            std::thread::park_timeout(Duration::from_millis(150));
            after.reading = Reading { resident: after.reading.resident, ..self.server.read()? };
        }
        if self.common.expected_slowly.load(Ordering::Relaxed) > 0 {
            self.phase.send_replace(Phase::CatchUp);
            let (mut least, mut last) = (u64::MAX, Instant::now());
            while self.missing_slowly() > 0 && last.elapsed() < LATE {
                std::thread::park_timeout(Duration::from_millis(100));
                let missing = self.missing_slowly();
                if missing < least {
                    (least, last) = (missing, Instant::now());
                }
                self.progress(&format!("waiting for {missing} deliveries to slow readers"));
            }
        }
        self.clear_progress();
        Ok((seconds, timeline, before, after))
    }

    fn sample(&self) -> anyhow::Result<Sample> {
        Ok(Sample {
            at: self.orders.begin.elapsed(),
            reading: self.server.read()?,
            threads: self.threads.iter().map(Thread::cpu).collect(),
        })
    }

    fn second(&self, before: &Sample, now: &Sample, first: Duration) -> Second {
        let mut recent = Recent::default();
        for thread in &self.threads {
            thread.tally.take_recent(&mut recent);
        }
        let lasted = now.at.saturating_sub(before.at).as_secs_f64().max(1e-3);
        Second {
            at: now.at.saturating_sub(first).as_secs_f64(),
            acked: recent.acked as f64 / lasted,
            delivered: recent.delivered as f64 / lasted,
            p50: recent.delivery.quantile(0.5),
            p99: recent.delivery.quantile(0.99),
            ack_p50: recent.ack.quantile(0.5),
            ack_p99: recent.ack.quantile(0.99),
            admitted_p99: recent.admitted.quantile(0.99),
            put_off: recent.put_off as f64 / lasted,
            cores: now.reading.cpu.saturating_sub(before.reading.cpu).as_secs_f64() / lasted,
            resident: now.reading.resident,
        }
    }
}

/// What was read at one moment.
#[derive(Clone, Debug)]
struct Sample {
    at: Duration,
    reading: Reading,
    threads: Vec<Duration>,
}

impl Sample {
    /// Of each thread, the share of the time it worked.
    fn busy_since(&self, before: &Self) -> Vec<f64> {
        let seconds = self.at.saturating_sub(before.at).as_secs_f64().max(1e-9);
        let worked = before.threads.iter().zip(&self.threads);
        worked.map(|(from, until)| until.saturating_sub(*from).as_secs_f64() / seconds).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_are_sound() {
        Flags::command().debug_assert();
        let flags = Flags::try_parse_from(["fulmar-load", "--groups", "0", "--slow", "30"]).unwrap();
        assert!(flags.work(500).contains("500 pairs") && flags.work(500).contains("30 %"));
        for wrong in [
            ["--phones", "0"].as_slice(),
            &["--slow", "100"],
            &["--storm-percent", "50"],
            &["--to", "127.0.0.1:1"],
            &["--threads", "0"],
        ] {
            let line = std::iter::once(&"fulmar-load").chain(wrong);
            assert!(Flags::try_parse_from(line).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_starts() {
        for (line, word) in [
            (["fulmar-load", "--rate", "NaN"].as_slice(), "--rate"),
            (&["fulmar-load", "--surge", "0.5", "--surge-from", "1"], "--surge"),
            (&["fulmar-load", "--connect-rate", "0"], "--connect-rate"),
            (&["fulmar-load", "--group-size", "2000"], "--phones"),
            (&["fulmar-load", "--payload", "5"], "28"),
            (&["fulmar-load", "--json", "/no/such/folder/x"], "/no/such/folder"),
        ] {
            let error = run(&Flags::parse_from(line)).unwrap_err();
            assert!(format!("{error:#}").contains(word), "{line:?}: {error:#}");
        }
    }
}

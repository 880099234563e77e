//! The kill rig: apps at work are killed at arbitrary moments, again and again; then they come to rest, and everything
//! that was promised to any of their runs must have come true.
//!
//! - A kill counts from the start of the process, from the first thing that the run wrote down, or from when it is
//!   connected: so it meets the opening, the handshake, and the work, however busy the machine is.
//! - In every fifth spell of [`SPELL`] kills UDP is blocked, and the apps have to get through by TLS.
//! - Every choice follows from the seed; what a kill meets follows from the machine. A seed that failed is worth a few
//!   tries.
//!
//! Not here: what the app does (`work`), what its log proves (`evidence`).

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum as _;
use fulmar_badnet::{
    Path as Road, Proxy, Rng, Share,
    checker::{Report, Rules, check},
    history::Client,
    net::{Delay, Impairment, Loss, Reorder},
    proxy::{Admits, Config},
};

use crate::{
    evidence::{Account, Evidence, Room, put_together},
    gateway::Gateway,
    log::{Entry, Line, read},
    peer::{self, Peer},
    plant::{self, Plant},
};

/// Apps that are killed, each on a database of its own.
const PHONES: u32 = 2;

/// A run of an app lives at most this long after the moment its kill counts from; longer where a fault is to be planted,
/// for which there has to be something in the database.
const LIFE_MS: u64 = 220;
const LIFE_MS_TO_PLANT: u64 = 900;

/// Kills of the first app after which UDP may be blocked, or let through again.
const SPELL: u64 = 10;

/// How long a run may take to come to the moment its kill counts from.
const MOMENT_MAX: Duration = Duration::from_secs(5);

/// A new group is made after so many kills of the first app, up to so many.
const GROUP_EVERY: u64 = 12;
const GROUPS_MAX: usize = 12;

/// How long nothing may change before what is missing then counts as missing.
const STILL_FOR: Duration = Duration::from_secs(10);
const STILL_FOR_PLANTED: Duration = Duration::from_secs(3);

/// How long everything may take to come to rest.
const REST_MAX: Duration = Duration::from_secs(60);

/// How long an app may take to connect for the first time, or to end in order.
const PATIENCE: Duration = Duration::from_secs(30);

/// Findings that are kept; they are whole folders.
const FINDINGS_MAX: usize = 10;

/// Kills in which a planted fault must have found something to break.
const PROVE_ROUNDS: u64 = 120;

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Kill {
    /// How often an app is killed
    #[arg(long, value_name = "N", default_value_t = 500)]
    rounds: u64,
    /// What every choice follows from; if not given, another one each time
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Plant a fault; the run must fail
    #[arg(long, value_enum)]
    plant: Option<Plant>,
    #[command(flatten)]
    place: Place,
}

/// What is asked of the proof.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Prove {
    /// What every choice follows from; if not given, another one each time
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    #[command(flatten)]
    place: Place,
}

#[derive(Clone, Debug, clap::Args)]
struct Place {
    /// The gateway's binary; if not given, `fulmar` beside this program
    #[arg(long, value_name = "FILE")]
    gateway: Option<PathBuf>,
    /// Where findings are left
    #[arg(long, value_name = "DIR", default_value = "target/client-rig")]
    findings: PathBuf,
    /// Say nothing but the result
    #[arg(long)]
    quiet: bool,
}

impl Place {
    fn gateway(&self) -> anyhow::Result<PathBuf> {
        let beside = || Ok::<_, anyhow::Error>(std::env::current_exe()?.with_file_name("fulmar"));
        let program = self.gateway.clone().map_or_else(beside, Ok)?;
        ensure!(program.exists(), "there is no gateway at {}; build it first", program.display());
        Ok(program)
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }
}

/// Checks by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
}

/// Kills apps and judges what is left.
///
/// # Errors
/// When that could not be done; broken promises are in the outcome.
pub(crate) fn run(ask: &Kill) -> anyhow::Result<Outcome> {
    let seed = ask.seed.unwrap_or_else(new_seed);
    let told = campaign(ask, seed)?;
    ensure!(told.planted || ask.plant.is_none(), "nothing could be broken in {} kills", told.kills);
    Ok(Outcome { passed: told.kills.saturating_sub(u64::from(told.broken)), failed: u64::from(told.broken) })
}

/// Plants each fault and sees that it is found.
///
/// # Errors
/// When a fault could not be planted.
pub(crate) fn prove(ask: &Prove) -> anyhow::Result<Outcome> {
    let seed = ask.seed.unwrap_or_else(new_seed);
    let mut outcome = Outcome::default();
    for plant in Plant::value_variants() {
        let kill =
            Kill { rounds: PROVE_ROUNDS, seed: Some(seed), plant: Some(*plant), place: ask.place.clone() };
        let told = campaign(&kill, seed)?;
        ensure!(told.planted, "{plant:?}: nothing could be broken in {} kills", told.kills);
        let found = if told.broken { "found" } else { "NOT FOUND" };
        ask.place.say(&format!("planted fault {plant:?}: {found} ({})", told.kinds));
        outcome.passed += u64::from(told.broken);
        outcome.failed += u64::from(!told.broken);
    }
    Ok(outcome)
}

fn new_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::from(since.subsec_micros()) ^ (since.as_secs() & 0xffff_ffff)
}

/// How a campaign went.
struct Told {
    kills: u64,
    planted: bool,
    broken: bool,
    kinds: String,
}

fn campaign(ask: &Kill, seed: u64) -> anyhow::Result<Told> {
    let scratch = tempfile::Builder::new().prefix("fulmar-client-rig-").tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let place = scratch.path().to_owned();
    let program = ask.place.gateway()?;
    let ask = Arc::new(ask.clone());
    runtime.block_on(async move {
        let gateway = Gateway::start(&program, &place).await?;
        let mut stage = Stage::set(Arc::clone(&ask), seed, place, gateway).await?;
        stage.play().await
    })
}

/// Everything that takes part.
struct Stage {
    ask: Arc<Kill>,
    seed: u64,
    place: PathBuf,
    gateway: Gateway,
    proxy: Arc<Proxy>,
    peer: Peer,
    phones: Vec<Phone>,
    shared: Arc<Shared>,
}

/// What the tasks that kill share.
#[derive(Debug, Default)]
struct Shared {
    /// The groups there are: name and number.
    groups: Mutex<Vec<(String, u64)>>,
    kills: AtomicU64,
    /// Runs that were connected when their kill began to count.
    live: AtomicU64,
    planted: AtomicBool,
    /// UDP is blocked.
    blocked: AtomicBool,
    /// Nobody is killed any more.
    over: AtomicBool,
}

impl Shared {
    fn groups(&self) -> MutexGuard<'_, Vec<(String, u64)>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a kill counts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// The process was started.
    Start,
    /// It wrote something down.
    Work,
    /// It is connected and in sync.
    Live,
}

/// An app and its database.
#[derive(Clone, Debug)]
struct Phone {
    number: u32,
    name: String,
    folder: PathBuf,
    token: String,
    address: String,
    certificate: PathBuf,
    /// The direct conversation with the peer.
    direct: u64,
}

impl Phone {
    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    fn database(&self) -> PathBuf {
        self.folder.join("app.db")
    }

    fn lines(&self) -> anyhow::Result<Vec<Line>> {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        Ok(read(&text)?.0)
    }

    /// Whether the run that began when the log had `before` bytes has come this far.
    fn came_to(&self, moment: Moment, before: u64) -> bool {
        match moment {
            Moment::Start => true,
            Moment::Work => self.log_bytes() > before,
            Moment::Live => {
                let mut text = String::new();
                let file = File::open(self.log()).and_then(|mut log| {
                    log.seek(SeekFrom::Start(before))?;
                    log.read_to_string(&mut text)
                });
                file.is_ok()
                    && read(&text)
                        .is_ok_and(|(lines, _)| lines.iter().any(|(_, entry)| *entry == Entry::Live))
            }
        }
    }

    fn log_bytes(&self) -> u64 {
        fs::metadata(self.log()).map_or(0, |log| log.len())
    }

    /// Starts the app.
    fn start(&self, seed: u64, shared: &Shared, drain: bool) -> anyhow::Result<Child> {
        let errors = File::options().create(true).append(true).open(self.folder.join("stderr"))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("work")
            .args(["--address", &self.address, "--token", &self.token])
            .args(["--client", &self.number.to_string(), "--seed", &seed.to_string()])
            .arg("--database")
            .arg(self.database())
            .arg("--log")
            .arg(self.log())
            .arg("--certificate")
            .arg(&self.certificate)
            .stdout(Stdio::null())
            .stderr(errors);
        if drain {
            command.arg("--drain").stdin(Stdio::piped());
        } else {
            command.args(["--to", &format!("d:{}", peer::NAME)]).stdin(Stdio::null());
            for (name, _) in shared.groups().iter() {
                command.args(["--to", &format!("g:{name}")]);
            }
        }
        command.spawn().context("can't start the app")
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.folder.join("stderr")).unwrap_or_default()
    }
}

/// A road with moderate loss: a handshake takes about 20 ms, and now and then a second.
fn road() -> Road {
    Road::symmetric(Impairment {
        delay: Delay::fixed(Duration::from_millis(4)).with_jitter(Duration::from_millis(4)),
        loss: Loss::random(Share::percent(3)),
        reorder: Reorder { share: Share::percent(1), hold: Duration::from_millis(6) },
        duplicate: Share::percent(1),
        ..Impairment::default()
    })
}

impl Stage {
    async fn set(ask: Arc<Kill>, seed: u64, place: PathBuf, gateway: Gateway) -> anyhow::Result<Self> {
        let proxy = Proxy::start(Config::towards(gateway.address).seed(seed).path(road()).tcp(true))?;
        let proxy = Arc::new(proxy);
        let peer = tokio::time::timeout(PATIENCE, Peer::start(&gateway)).await;
        let peer = peer.context("the peer does not connect")??;
        let shared = Arc::new(Shared::default());
        let mut phones = Vec::new();
        for number in 1..=PHONES {
            let name = format!("phone-{number}");
            let folder = place.join(&name);
            fs::create_dir(&folder)?;
            let token = gateway.token(&name)?;
            let (address, certificate) = (proxy.addr().to_string(), gateway.certificate());
            let mut phone = Phone { number, name, folder, token, address, certificate, direct: 0 };
            // Its first connection makes the user.
            let app = phone.start(seed, &shared, true)?;
            wait_for(&phone, "it does not connect", |lines| {
                lines.iter().any(|(_, entry)| *entry == Entry::Live)
            })
            .await?;
            end_in_order(app, &phone).await?;
            phone.direct = peer.direct(&phone.name).await?;
            phones.push(phone);
        }
        let stage = Self { ask, seed, place, gateway, proxy, peer, phones, shared };
        for _ in 0..2 {
            new_group(&stage.peer, &stage.shared).await?;
        }
        Ok(stage)
    }

    async fn play(&mut self) -> anyhow::Result<Told> {
        let began = Instant::now();
        let (ask, seed) = (Arc::clone(&self.ask), self.seed);
        ask.place.say(&format!(
            "client-kill: {} kills, {PHONES} apps, seed {seed}{}, in {}",
            ask.rounds,
            ask.plant.map_or_else(String::new, |plant| format!(", planted: {plant:?}")),
            self.place.display()
        ));
        let peer = tokio::spawn(self.peer.clone().send(Rng::new(seed).fork(1_000)));
        let tasks: Vec<_> = self
            .phones
            .iter()
            .enumerate()
            .map(|(index, phone)| {
                let rounds = ask.rounds / u64::from(PHONES)
                    + u64::from((index as u64) < ask.rounds % u64::from(PHONES));
                tokio::spawn(kills(
                    phone.clone(),
                    rounds,
                    Rng::new(seed).fork(u64::from(phone.number)),
                    Arc::clone(&ask),
                    Arc::clone(&self.shared),
                    self.peer.clone(),
                    Arc::clone(&self.proxy),
                ))
            })
            .collect();
        let mut broken = Vec::new();
        for task in tasks {
            if let Err(error) = task.await? {
                broken.push(format!("{error:#}"));
            }
        }
        self.gateway.is_running()?;
        self.proxy.admit(Admits::ALL)?;
        self.peer.stop();
        let (evidence, report) = self.rest(&mut broken).await?;
        peer.abort();
        broken.extend(evidence.complaints.iter().take(20).cloned());
        let kinds: Vec<_> = report.by_kind.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let mut kinds = kinds.join(", ");
        if !evidence.complaints.is_empty() {
            kinds = format!("{kinds}; {}", evidence.complaints.first().map_or("", String::as_str));
        }
        let told = Told {
            kills: self.shared.kills.load(Ordering::Relaxed),
            planted: self.shared.planted.load(Ordering::Relaxed),
            broken: !broken.is_empty() || !report.holds(),
            kinds,
        };
        let totals = self.proxy.totals();
        let counters = report.counters;
        ask.place.say(&format!(
            "client-kill, seed {seed}: {} kills, {} of them of apps at work, {} messages queued, {} acked, {} expired, {} deliveries; told again {}, \
             not kept {}; {} of {} packets lost, {} connections by TCP; {:.1} s",
            told.kills,
            self.shared.live.load(Ordering::Relaxed),
            counters.sent,
            counters.acked,
            counters.expired,
            counters.delivered + counters.echoed,
            evidence.told_again,
            evidence.never_kept,
            totals.up.lost + totals.down.lost,
            totals.up.packets + totals.down.packets,
            totals.tcp.connections,
            began.elapsed().as_secs_f64()
        ));
        if told.broken && ask.plant.is_none() {
            self.keep(&evidence, &report, &broken);
        }
        Ok(told)
    }

    /// Starts every app once more, without sending, until everything that was promised is there or nothing moves.
    async fn rest(&self, broken: &mut Vec<String>) -> anyhow::Result<(Evidence, Report)> {
        let mut apps = Vec::new();
        let marks: Vec<usize> =
            self.phones.iter().map(|phone| phone.lines().map_or(0, |l| l.len())).collect();
        for phone in &self.phones {
            apps.push(phone.start(self.seed, &self.shared, true)?);
        }
        let still_for = if self.ask.plant.is_some() { STILL_FOR_PLANTED } else { STILL_FOR };
        let began = Instant::now();
        let mut moved = (Instant::now(), 0);
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let (evidence, report) = self.judge()?;
            let empty = self.phones.iter().zip(&marks).all(|(phone, mark)| {
                phone
                    .lines()
                    .is_ok_and(|lines| lines.iter().skip(*mark).any(|(_, entry)| *entry == Entry::Empty))
            });
            let events = evidence.history.records().len();
            if events != moved.1 {
                moved = (Instant::now(), events);
            }
            let settled = report.holds() && empty && evidence.complaints.is_empty();
            if !settled && moved.0.elapsed() < still_for && began.elapsed() < REST_MAX {
                continue;
            }
            if !empty {
                broken.push("an outbox does not become empty".to_owned());
            }
            for (app, phone) in apps.into_iter().zip(&self.phones) {
                if let Err(error) = end_in_order(app, phone).await {
                    broken.push(format!("{error:#}"));
                }
            }
            // Ending in order may still have told something.
            return if settled { Ok((evidence, report)) } else { self.judge() };
        }
    }

    fn judge(&self) -> anyhow::Result<(Evidence, Report)> {
        let groups = self.shared.groups().clone();
        let numbers = groups.iter().map(|(_, number)| *number);
        let mut accounts = Vec::new();
        let everybody: Vec<Client> =
            [peer::NUMBER].into_iter().chain(self.phones.iter().map(|phone| Client(phone.number))).collect();
        let mut rooms: Vec<Room> =
            numbers.clone().map(|number| Room { number, members: everybody.clone() }).collect();
        for phone in &self.phones {
            let client = Client(phone.number);
            let to = [phone.direct].into_iter().chain(numbers.clone()).collect();
            accounts.push(Account { client, lines: phone.lines()?, to });
            rooms.push(Room { number: phone.direct, members: vec![peer::NUMBER, client] });
        }
        let directs = self.phones.iter().map(|phone| phone.direct);
        let to = directs.chain(numbers).collect();
        accounts.push(Account { client: peer::NUMBER, lines: self.peer.lines(), to });
        let evidence = put_together(&accounts, &rooms);
        let rules =
            Rules { converged: true, echoes: true, dense: false, gaps_excused: false, kept_for: None };
        let report = check(&evidence.history, &rules);
        Ok((evidence, report))
    }

    /// Keeps everything a person needs to find out why.
    fn keep(&self, evidence: &Evidence, report: &Report, broken: &[String]) {
        let say = |text: &str| self.ask.place.say(text);
        for line in broken {
            say(&format!("FAILED: {line}"));
        }
        say(&report.explain(&evidence.history));
        say(&format!("FAILED: cargo xtask client-kill --rounds {} --seed {}", self.ask.rounds, self.seed));
        let findings = &self.ask.place.findings;
        if fs::read_dir(findings).map_or(0, Iterator::count) >= FINDINGS_MAX {
            return say("    not kept: there are enough findings in the folder");
        }
        let folder = findings.join(format!("kill-{}", self.seed));
        let kept = copy_tree(&self.place, &folder).and_then(|()| {
            let history = File::create(folder.join("history"))?;
            evidence.history.write_to(std::io::BufWriter::new(history))?;
            fs::write(
                folder.join("report"),
                format!("{}\n{}", broken.join("\n"), report.explain(&evidence.history)),
            )
        });
        match kept {
            Ok(()) => say(&format!("    databases, logs and history: {}", folder.display())),
            Err(error) => say(&format!("    the finding could not be kept: {error}")),
        }
    }
}

/// Kills one app `rounds` times.
async fn kills(
    phone: Phone,
    rounds: u64,
    mut rng: Rng,
    ask: Arc<Kill>,
    shared: Arc<Shared>,
    peer: Peer,
    proxy: Arc<Proxy>,
) -> anyhow::Result<()> {
    let mut left_after_plant = 2;
    for round in 0..rounds {
        if shared.over.load(Ordering::Relaxed) {
            break;
        }
        if phone.number == 1 && round.is_multiple_of(SPELL) {
            let blocked = ask.plant.is_none() && (round / SPELL) % 5 == 3;
            proxy.admit(if blocked { Admits::TCP_ONLY } else { Admits::ALL })?;
            shared.blocked.store(blocked, Ordering::Relaxed);
        }
        let to_plant = ask.plant.is_some() && phone.number == 1 && !shared.planted.load(Ordering::Relaxed);
        let result = one_kill(&phone, &mut rng, &shared, to_plant).await;
        if let Err(error) = result {
            shared.over.store(true, Ordering::Relaxed);
            return Err(error.context(format!("{}, kill {}", phone.name, round + 1)));
        }
        let kills = shared.kills.fetch_add(1, Ordering::Relaxed) + 1;
        if kills.is_multiple_of(50) {
            ask.place.say(&format!("{kills} of {} kills", ask.rounds));
        }
        if phone.number == 1 && (round + 1).is_multiple_of(GROUP_EVERY) && shared.groups().len() < GROUPS_MAX
        {
            new_group(&peer, &shared).await?;
        }
        let Some(plant) = ask.plant.filter(|_| phone.number == 1) else { continue };
        if shared.planted.load(Ordering::Relaxed) {
            left_after_plant -= 1;
            if left_after_plant == 0 {
                shared.over.store(true, Ordering::Relaxed);
            }
        } else if round > 2 && plant::put(plant, &phone.database(), &phone.lines()?)? {
            shared.planted.store(true, Ordering::Relaxed);
        }
    }
    Ok(())
}

async fn one_kill(phone: &Phone, rng: &mut Rng, shared: &Shared, to_plant: bool) -> anyhow::Result<()> {
    let blocked = shared.blocked.load(Ordering::Relaxed);
    let life_ms = if to_plant { LIFE_MS_TO_PLANT } else { LIFE_MS };
    let (seed, life) = (rng.next_u64(), Duration::from_micros(rng.below(life_ms * 1_000)));
    // The way to a connection is longer where UDP is blocked: few would come that far by chance.
    let moment = match rng.below(100) {
        _ if to_plant => Moment::Work,
        0..40 if blocked => Moment::Live,
        0..25 => Moment::Live,
        25..65 => Moment::Work,
        _ => Moment::Start,
    };
    let before = phone.log_bytes();
    let mut app = phone.start(seed, shared, false)?;
    let began = Instant::now();
    while !phone.came_to(moment, before) && began.elapsed() < MOMENT_MAX {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    shared.live.fetch_add(u64::from(phone.came_to(Moment::Live, before)), Ordering::Relaxed);
    tokio::time::sleep(life).await;
    app.kill()?;
    let status = app.wait()?;
    ensure!(
        status.signal() == Some(9),
        "the app ended by itself with {status}: {}",
        phone.errors().lines().last().unwrap_or("it said nothing")
    );
    Ok(())
}

async fn new_group(peer: &Peer, shared: &Shared) -> anyhow::Result<()> {
    let name = format!("group-{}", shared.groups().len());
    let members: Vec<String> = (1..=PHONES).map(|number| format!("phone-{number}")).collect();
    let members: Vec<&str> = members.iter().map(String::as_str).collect();
    let number = peer.group(&name, &members).await.with_context(|| format!("{name} can't be made"))?;
    shared.groups().push((name, number));
    Ok(())
}

async fn wait_for(phone: &Phone, what: &str, done: impl Fn(&[Line]) -> bool) -> anyhow::Result<()> {
    let began = Instant::now();
    while !done(&phone.lines()?) {
        ensure!(began.elapsed() < PATIENCE, "{}: {what}: {}", phone.name, phone.errors());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Ends an app by the end of its input.
async fn end_in_order(mut app: Child, phone: &Phone) -> anyhow::Result<()> {
    drop(app.stdin.take());
    let began = Instant::now();
    loop {
        if let Some(status) = app.try_wait()? {
            ensure!(status.success(), "{} ended with {status}: {}", phone.name, phone.errors());
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            app.kill()?;
            app.wait()?;
            bail!("{} does not end", phone.name);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

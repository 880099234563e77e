//! `fulmar demo`: the main job in one command, on this machine alone.
//!
//! A gateway as a process of its own, phones that are real clients of the SDK, a bad network between them, dialogues
//! from a file or drawn from a seed, `kill -9` in the middle: and everything that was sent must have been acked, and be
//! with everybody it was for, exactly once and in order.
//!
//! - What is expected comes from the input (`plan`), what happened is written down (`board`), and only the
//!   comparison of the two decides (`verdict`).
//! - Every wait has an end; what is missing then is named.
//! - Nothing is left behind: the gateway's process and the folder go, however the run ends. A run that failed keeps its
//!   folder and says where it is.

mod board;
mod display;
mod phone;
mod plan;
mod play;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use fulmar_badnet::fault::FaultRates;
use fulmar_badnet::history::{Conversation, Event};
use fulmar_badnet::{FaultPlan, Profile, Proxy, Rng, dialogue, proxy};
use fulmar_client::{Database, Durability, Options, Trust};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use self::board::{Board, client_of};
use self::display::Display;
use self::phone::Phone;
use self::plan::Plan;
use self::play::{Opened, play};
use self::verdict::{Outside, Verdict};
use super::rehearsal::{GatewayProcess, number, ratio, tokens};
use crate::open_files;

const EXAMPLES: &str = "\
Examples:
  fulmar demo                                   200 phones, 5,000 messages, 5 % loss, one kill -9
  fulmar demo --input chat.tsv --json out.json  your own dialogues; the figures for a script
  fulmar demo --profile metro --kills 3         on the underground, three kills
  fulmar demo --phones 12 --messages 200        a small one, a few seconds

An input has one line per message: language, dialogue number, speaker (A or B) and text, with tabs between them; the
lines of a dialogue stand together, in order.

Exit code 0 only if everything sent was acked and delivered exactly once and in order.";

/// Messages without an input and without `--messages`.
const MESSAGES_DEFAULT: usize = 5_000;

/// How long all phones may take until they are connected.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// A run in which nothing moves for this long is over.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// After everything is there: what comes twice would come now.
const CALM: Duration = Duration::from_millis(1_500);

/// How long the gateway stays dead.
const DOWN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(1_000));

/// A phone changes its address about this often, until most lines were said.
const REBIND_EVERY: Duration = Duration::from_secs(30);

/// Open files a phone needs here, all in all: its database, its sockets, the proxy's.
const FILES_PER_PHONE: u64 = 12;
const FILES_BESIDES: u64 = 256;

/// Flags of `fulmar demo`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DemoArgs {
    /// Dialogues to replay, instead of drawn ones
    #[arg(short, long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Write the figures to this file, too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// How many phones
    #[arg(short, long, value_name = "COUNT", default_value_t = 200,
        value_parser = clap::value_parser!(u16).range(2..=2_000))]
    pub phones: u16,
    /// How many messages at most [default: the whole input; without one, 5000]
    #[arg(short, long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub messages: Option<u32>,
    /// How often the gateway is killed with SIGKILL and started again, spread over the run
    #[arg(short, long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=100))]
    pub kills: u16,
    /// The network between phones and gateway, one of: clean, wifi, lossy, dark-spells, metro, mobile-tail, lift,
    /// wifi-walkout, rural-edge
    #[arg(long, value_name = "NAME", default_value_t = Profile::Lossy, hide_possible_values = true)]
    pub profile: Profile,
    /// Where all chance comes from: the texts, who talks with whom, what the network does
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,
    /// The phones keep their databases in memory instead of on disk
    #[arg(long)]
    pub in_memory: bool,
    /// Seconds after which the run is over, whatever is missing
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Keep the folder with the gateway's data and log, and the phones' databases
    #[arg(long)]
    pub keep: bool,
}

/// How a run ended.
enum End {
    Judged(Box<Verdict>),
    Interrupted,
}

/// Runs the demo.
///
/// # Errors
/// One line: the input can't be used, or something could not be set up. A run that came to its end is judged instead.
pub fn run(args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let plan = Arc::new(lay_out(args)?);
    let wanted = u64::from(args.phones) * FILES_PER_PHONE + FILES_BESIDES;
    let files = open_files::raise(wanted);
    ensure!(
        files.limit >= wanted,
        "{} phones need {wanted} open files, and the limit is {}: choose fewer with --phones, or raise it (ulimit -Hn)",
        args.phones,
        files.limit
    );
    if let Some(path) = &args.json {
        // Found out now rather than after a minute.
        std::fs::write(path, "").with_context(|| format!("{} can't be written", path.display()))?;
    }
    let folder = tempfile::Builder::new()
        .prefix("fulmar-demo-")
        .tempdir()
        .context("no temporary folder can be made")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("fulmar-demo")
        .build()
        .context("the runtime can't be started")?;
    let end = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        tokio::select! {
            verdict = Box::pin(perform(args, Arc::clone(&plan), folder.path())) => verdict.map(|verdict| End::Judged(Box::new(verdict))),
            _ = interrupt.recv() => Ok(End::Interrupted),
            _ = terminate.recv() => Ok(End::Interrupted),
            _ = hangup.recv() => Ok(End::Interrupted),
        }
    });
    // The phones' databases are let go of before their folder goes.
    runtime.shutdown_timeout(Duration::from_secs(5));
    let failed = !matches!(&end, Ok(End::Interrupted))
        && !matches!(&end, Ok(End::Judged(verdict)) if verdict.passed());
    if args.keep || failed {
        let kept = folder.keep();
        eprintln!("fulmar: the gateway's data and log and the phones' databases are in {}", kept.display());
    }
    match end? {
        End::Interrupted => {
            eprintln!("fulmar: interrupted; the gateway was stopped");
            Ok(ExitCode::from(130))
        }
        End::Judged(verdict) => {
            super::answer(&verdict.table())?;
            if let Some(path) = &args.json {
                std::fs::write(path, format!("{:#}\n", verdict.json()))
                    .with_context(|| format!("{} can't be written", path.display()))?;
            }
            Ok(if verdict.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn lay_out(args: &DemoArgs) -> anyhow::Result<Plan> {
    let messages = args.messages.map(|messages| usize::try_from(messages).unwrap_or(usize::MAX));
    let (dialogues, lines_max) = match &args.input {
        Some(path) => (dialogue::read_file(path)?, messages.unwrap_or(usize::MAX)),
        None => {
            let messages = messages.unwrap_or(MESSAGES_DEFAULT);
            (Plan::drawn(args.seed, messages), messages)
        }
    };
    Ok(Plan::new(dialogues, lines_max, args.phones.into(), args.seed))
}

/// The whole run, from an empty folder to the verdict.
async fn perform(args: &DemoArgs, plan: Arc<Plan>, folder: &Path) -> anyhow::Result<Verdict> {
    let ends_at = Instant::now() + Duration::from_secs(args.timeout);
    let board = Arc::new(Board::new(&plan));
    let display = Display::start(&board, plan.lines.len(), plan.deliveries());
    let groups = plan.rooms.iter().filter(|room| room.group.is_some()).count();
    let shape = format!(
        "{} phones, {} conversations ({groups} groups), network \"{}\" ({}), seed {}",
        plan.phones.len(),
        plan.rooms.len(),
        args.profile,
        args.profile.summary(),
        args.seed
    );
    eprintln!("{shape}");

    display.stage("starting the gateway");
    let (data, databases) = (folder.join("gateway"), folder.join("phones"));
    std::fs::create_dir(&databases).with_context(|| format!("{} can't be made", databases.display()))?;
    let mut gateway = GatewayProcess::start(&data, &folder.join("gateway.log")).await?;
    let config = proxy::Config::towards(gateway.address()).seed(args.seed).path(args.profile);
    let proxy = Proxy::start(config).context("the bad network can't be started")?;

    display.stage("connecting the phones");
    let tokens = tokens(&data, &plan.phones)?;
    let certificate = data.join("tls/cert.pem");
    let mut phones = Vec::with_capacity(plan.phones.len());
    for (number, (name, token)) in plan.phones.iter().zip(tokens).enumerate() {
        let database = match args.in_memory {
            true => Database::Memory,
            false => Database::File(databases.join(format!("{name}.db"))),
        };
        let options = Options::new(database, proxy.addr().to_string(), "localhost", token)
            .trust(Trust::CertificateFile(certificate.clone()))
            .durability(Durability::AppKill);
        phones.push(Phone::start(number, options, Arc::clone(&plan), Arc::clone(&board)).await?);
    }
    let phones = Arc::new(phones);
    all_online(&plan, &phones, &board).await?;

    display.stage("making groups, opening conversations");
    let opened = Arc::new(open_rooms(&plan, &phones, &board).await?);

    let rates =
        FaultRates { rebind_every: Some(REBIND_EVERY / u32::from(args.phones)), ..FaultRates::default() };
    let length = Duration::from_secs(args.timeout.min(3_600));
    proxy.play(FaultPlan::seeded(args.seed, length, &rates)).context("the bad network does not answer")?;

    let mut run = Run {
        plan: &plan,
        board: &board,
        display: &display,
        phones: &phones,
        kills: args.kills.into(),
        killed: 0,
        rng: Rng::new(args.seed).fork(2),
        proxy: &proxy,
        calm: false,
        ends_at,
    };
    run.display.stage("playing");
    let started = Instant::now();
    run.set_gate();
    let lanes = play(&plan, &board, &opened);
    let cut_short = run.until_complete(&mut gateway).await?;
    let seconds = started.elapsed().as_secs_f64();
    if cut_short.is_none() {
        display.stage("waiting for anything that comes twice");
        sleep(CALM).await;
    }
    let killed = run.killed;

    display.stage("judging");
    let traffic = proxy.totals();
    let reconnects = phones.iter().map(Phone::reconnects).sum();
    let packets = traffic.up.packets + traffic.down.packets;
    let outside = Outside {
        reconnects,
        gateway_kills: number(killed),
        wire_bytes: traffic.wire_bytes(),
        rebinds: traffic.rebinds,
        dropped_percent: 100.0 * ratio(traffic.up.dropped() + traffic.down.dropped(), packets),
        seconds,
    };
    // Judged before anything is closed: what is seen while closing down is no part of the run.
    let verdict = Verdict::reach(&plan, &board.seen(), outside, cut_short);
    drop(lanes);
    display.stage("closing the phones");
    // What the bad network was for is over.
    proxy.set_path(Profile::Clean).context("the bad network does not answer")?;
    let phones = Arc::try_unwrap(phones).unwrap_or_default();
    let closing = phones.into_iter().map(Phone::close);
    futures_util::future::join_all(closing).await;
    display.stage("stopping the gateway");
    gateway.stop().await?;
    proxy.stop();
    Ok(verdict)
}

/// Waits until every phone is connected and knows its number.
async fn all_online(plan: &Plan, phones: &[Phone], board: &Board) -> anyhow::Result<()> {
    let connecting = async {
        for (number, phone) in phones.iter().enumerate() {
            ensure!(phone.client().state().live().await, "{} is {}", plan.phone(number), phone.state());
            let user = phone.client().user().await?;
            board.is_user(number, user.context("a phone is connected and has no number")?.get());
        }
        Ok(())
    };
    match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connected) => connected,
        Err(_) => {
            let states = phones.iter().enumerate().map(|(number, phone)| (plan.phone(number), phone.state()));
            let missing: Vec<_> = states.filter(|(_, state)| state != "live").collect();
            let shown: Vec<_> =
                missing.iter().take(5).map(|(name, state)| format!("{name} is {state}")).collect();
            bail!(
                "{} of {} phones were not connected after {} s: {}",
                missing.len(),
                phones.len(),
                CONNECT_TIMEOUT.as_secs(),
                shown.join("; ")
            )
        }
    }
}

/// Makes the groups, and opens every conversation on each member's phone.
async fn open_rooms(plan: &Arc<Plan>, phones: &Arc<Vec<Phone>>, board: &Board) -> anyhow::Result<Opened> {
    let mut rooms = tokio::task::JoinSet::new();
    for number in 0..plan.rooms.len() {
        let (plan, phones) = (Arc::clone(plan), Arc::clone(phones));
        rooms.spawn(async move { open_room(&plan, &phones, number).await });
    }
    let mut opened = Opened::new();
    while let Some(room) = rooms.join_next().await {
        for (key, conversation) in room.context("opening a conversation panicked")?? {
            board.record(Event::Joined {
                client: client_of(key.1),
                conversation: Conversation(conversation.1),
                first: 1,
            });
            opened.insert(key, conversation);
        }
    }
    Ok(opened)
}

async fn open_room(plan: &Plan, phones: &[Phone], number: usize) -> anyhow::Result<Opened> {
    let room = plan.rooms.get(number).context("a conversation that is not in the plan")?;
    let at = |phone: usize| phones.get(phone).context("a phone that is not in the plan");
    if let (Some(group), Some((owner, others))) = (&room.group, room.members.split_first()) {
        let names: Vec<&str> = others.iter().map(|member| plan.phone(*member)).collect();
        at(*owner)?.create_group(group, &names).await?;
    }
    let mut opened = Opened::new();
    for member in &room.members {
        let other = room.members.iter().find(|other| *other != member).copied().unwrap_or_default();
        let (name, is_group) = match &room.group {
            Some(group) => (group.as_str(), true),
            None => (plan.phone(other), false),
        };
        opened.insert((number, *member), at(*member)?.open(name, is_group).await?);
    }
    let mut numbers = opened.values().map(|(_, number)| *number);
    let first = numbers.next();
    ensure!(
        numbers.all(|number| Some(number) == first),
        "the members of one conversation were given different numbers of it"
    );
    Ok(opened)
}

/// The part of a run in which lines are said.
struct Run<'a> {
    plan: &'a Plan,
    board: &'a Arc<Board>,
    display: &'a Display,
    phones: &'a [Phone],
    kills: usize,
    killed: usize,
    rng: Rng,
    proxy: &'a Proxy,
    /// No more changes of address: only loss, delay and reordering go on.
    calm: bool,
    ends_at: Instant,
}

impl Run<'_> {
    /// Waits until everything is where it belongs, killing the gateway on the way; `Some` says why it gave up.
    async fn until_complete(&mut self, gateway: &mut GatewayProcess) -> anyhow::Result<Option<String>> {
        let mut last = (self.progress(), Instant::now());
        loop {
            sleep_until((Instant::now() + Duration::from_millis(50)).min(self.ends_at)).await;
            gateway.still_runs()?;
            if self.killed < self.kills
                && self.board.counts.sent.load(Ordering::Relaxed) >= self.kill_at(self.killed)
            {
                self.kill(gateway).await?;
                last.1 = Instant::now();
            }
            if !self.calm && self.board.counts.sent.load(Ordering::Relaxed) >= self.plan.lines.len() / 5 * 4 {
                self.calm = true;
                self.proxy.play(FaultPlan::default()).context("the bad network does not answer")?;
            }
            if self.killed == self.kills && self.board.is_complete(self.plan) {
                return Ok(None);
            }
            let progress = self.progress();
            let now = Instant::now();
            if progress != last.0 {
                last = (progress, now);
            } else if now >= last.1 + STALL_TIMEOUT {
                return Ok(Some(format!(
                    "nothing moved for {} s; {}",
                    STALL_TIMEOUT.as_secs(),
                    self.what_is_missing()
                )));
            }
            if now >= self.ends_at {
                return Ok(Some(format!("the time was up (--timeout); {}", self.what_is_missing())));
            }
        }
    }

    async fn kill(&mut self, gateway: &mut GatewayProcess) -> anyhow::Result<()> {
        self.display.stage(format!("the gateway is dead (kill -9, {} of {})", self.killed + 1, self.kills));
        gateway.kill().await?;
        self.board.record(Event::GatewayKilled);
        sleep(self.rng.duration(DOWN.0, DOWN.1)).await;
        gateway.launch().await.context("the gateway did not come back")?;
        self.board.record(Event::GatewayStarted);
        self.killed += 1;
        self.set_gate();
        self.display.stage("playing; the gateway is back");
        Ok(())
    }

    fn progress(&self) -> (usize, usize, usize) {
        let counts = &self.board.counts;
        let count = |count: &std::sync::atomic::AtomicUsize| count.load(Ordering::Relaxed);
        (count(&counts.sent), count(&counts.acked), count(&counts.delivered))
    }

    /// Lines sent when the gateway is killed for the `kill`-th time, counted from 0.
    fn kill_at(&self, kill: usize) -> usize {
        self.plan.lines.len().saturating_mul(kill + 1) / (self.kills + 1)
    }

    /// Half of what lies behind the next kill waits for it, so that it is in the middle however fast the phones are.
    fn set_gate(&self) {
        let gate = match self.killed < self.kills {
            true => self
                .kill_at(self.killed)
                .saturating_add(self.plan.lines.len() / (2 * (self.kills + 1)))
                .max(1),
            false => usize::MAX,
        };
        self.board.open_gate(gate);
    }

    /// Which lines are missing where, and how those phones are.
    fn what_is_missing(&self) -> String {
        let shown = 8;
        let (unacked, undelivered) = self.board.missing(self.plan, shown);
        let seen = self.board.seen();
        let mut parts = Vec::new();
        let state = |phone: usize| self.phones.get(phone).map_or_else(String::new, Phone::state);
        for line in unacked {
            let Some(planned) = self.plan.lines.get(line) else { continue };
            let sent = seen.times.get(line).is_some_and(|(sent, _)| sent.is_some());
            let what = if sent { "sent and not acked" } else { "not sent yet" };
            parts.push(format!("{}: {what} (phone {})", self.plan.describe(line), state(planned.speaker)));
        }
        for (line, phone) in undelivered {
            if seen.times.get(line).is_some_and(|(_, acked)| acked.is_some()) {
                let what = self.plan.describe(line);
                parts.push(format!(
                    "{what}: acked and not with {} (which is {})",
                    self.plan.phone(phone),
                    state(phone)
                ));
            }
        }
        parts.truncate(shown);
        if parts.is_empty() {
            "everything was there".to_owned()
        } else {
            format!("missing: {}", parts.join("; "))
        }
    }
}

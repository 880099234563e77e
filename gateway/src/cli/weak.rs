//! `fulmar weak`: networks with names, played one after the other against a real gateway, and drawn.
//!
//! - The gateway is a process of its own, the phones are real clients of the SDK, the network between them is the lossy
//!   proxy in real time.
//! - Nothing is left behind: the gateway's process and the folder go, however the run ends. A run that failed keeps its
//!   folder and says where it is.
//! - Who interrupts gets the report of what was seen until then.

mod board;
mod live;
mod outcome;
mod play;
mod report;
mod scene;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use self::live::{Display, Live};
use self::play::{Stand, play};
use self::report::Run;
use self::scene::{Scene, chosen, known};
use super::rehearsal::GatewayProcess;
use crate::open_files;

const EXAMPLES: &str = "\
Profiles:
  metro          underground train: bursts of loss, two dark tunnels, a new address
  lift           8 s without any network, bursts of loss around them
  rural-edge     350-900 ms there and back, 60 kbit/s up
  hotel-wifi     UDP is blocked: TLS over TCP on the same port
  wifi-walkout   Wi-Fi that fades, then the mobile network with another address
  airplane       twice 10 s dark: once the phone is told that it is over, once not
These are played unless some are named. Besides there are: clean, wifi, lossy, dark-spells, mobile-tail.

Examples:
  fulmar weak                                     all six, two minutes, report in fulmar-weak.html
  fulmar weak --profile lift --profile airplane   these two
  fulmar weak --profile metro --seconds 72 --phones 24 --html metro.html --json metro.json
  fulmar weak --plain 2> progress.log             no screen, a line every few seconds

Exit codes: 0 nothing lost, doubled or out of order; 1 something was, or a profile could not be played;
130 interrupted (the report is written all the same).";

/// Open files a phone needs here: its database, its sockets and those of the network.
const FILES_PER_PHONE: u64 = 16;
const FILES_BESIDES: u64 = 256;

/// Flags of `fulmar weak`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct WeakArgs {
    /// Play this profile; may be repeated [default: the six below]
    #[arg(long, value_name = "NAME", value_parser = known)]
    pub profile: Vec<String>,
    /// Seconds per profile, at least one round of its script [default: each profile's own, about 18]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(2..=3_600))]
    pub seconds: Option<u64>,
    /// How many phones, in pairs
    #[arg(short, long, value_name = "COUNT", default_value_t = 12,
        value_parser = clap::value_parser!(u16).range(2..=200))]
    pub phones: u16,
    /// Where all chance comes from: what the network does, what is said when
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,
    /// Write the report to this file
    #[arg(long, value_name = "FILE", default_value = "fulmar-weak.html")]
    pub html: PathBuf,
    /// Write the figures and every message to this file, too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Lines on standard error instead of a screen; always so when standard output is no terminal
    #[arg(long)]
    pub plain: bool,
}

/// Plays the profiles.
///
/// # Errors
/// One line: something could not be set up, or a report could not be written. A profile that was played is judged instead.
pub fn run(args: &WeakArgs) -> anyhow::Result<ExitCode> {
    ensure!(
        args.phones.is_multiple_of(2),
        "--phones {}: phones chat in pairs, so their number is even",
        args.phones
    );
    let wanted = u64::from(args.phones) * FILES_PER_PHONE + FILES_BESIDES;
    let files = open_files::raise(wanted);
    ensure!(
        files.limit >= wanted,
        "{} phones need {wanted} open files, and the limit is {}: choose fewer with --phones, or raise it (ulimit -Hn)",
        args.phones,
        files.limit
    );
    for path in [Some(&args.html), args.json.as_ref()].into_iter().flatten() {
        // Found out now rather than after two minutes; what stands there is kept until there is something better.
        let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
        opened.with_context(|| format!("{} can't be written", path.display()))?;
    }
    let folder = tempfile::Builder::new()
        .prefix("fulmar-weak-")
        .tempdir()
        .context("no temporary folder can be made")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("fulmar-weak")
        .build()
        .context("the runtime can't be started")?;
    let ran = runtime.block_on(Box::pin(perform(args, folder.path())));
    // The phones' databases are let go of before their folder goes.
    runtime.shutdown_timeout(Duration::from_secs(5));
    if !matches!(&ran, Ok(ran) if ran.passed()) {
        let kept = folder.keep();
        eprintln!("fulmar: the gateway's data and log and the phones' databases are in {}", kept.display());
    }
    let ran = ran?;
    std::fs::write(&args.html, ran.html())
        .with_context(|| format!("{} can't be written", args.html.display()))?;
    if let Some(path) = &args.json {
        std::fs::write(path, format!("{:#}\n", ran.json()))
            .with_context(|| format!("{} can't be written", path.display()))?;
    }
    super::answer(&format!("{}\nreport: {}", ran.table(), args.html.display()))?;
    Ok(match (ran.passed(), ran.interrupted) {
        (false, _) => ExitCode::FAILURE,
        (true, true) => ExitCode::from(130),
        (true, false) => ExitCode::SUCCESS,
    })
}

async fn perform(args: &WeakArgs, folder: &Path) -> anyhow::Result<Run> {
    let scenes: Vec<(&'static Scene, Duration)> =
        chosen(&args.profile).into_iter().map(|scene| (scene, scene.length(args.seconds))).collect();
    let (stop, stopping) = watch::channel(false);
    let signals = tokio::spawn(watch_signals(stop.clone())?);
    let began = report::now();
    let started = Instant::now();

    let (data, databases) = (folder.join("gateway"), folder.join("phones"));
    std::fs::create_dir(&databases).with_context(|| format!("{} can't be made", databases.display()))?;
    let mut gateway = GatewayProcess::start(&data, &folder.join("gateway.log")).await?;
    let live = Arc::new(Live::new(live::head(args.phones.into(), args.seed), scenes.iter().copied()));
    let screen = !args.plain && std::io::stdout().is_terminal();
    let display = Display::start(&live, screen, stop)?;
    let mut stand = Stand {
        gateway: &mut gateway,
        data: &data,
        databases: &databases,
        live: &live,
        stop: stopping.clone(),
        phones: args.phones.into(),
        seed: args.seed,
    };
    let mut outcomes = Vec::with_capacity(scenes.len());
    for (ordinal, (scene, length)) in scenes.iter().enumerate() {
        if *stopping.borrow() {
            break;
        }
        outcomes.push(play(&mut stand, ordinal, scene, *length).await);
    }
    drop(display);
    signals.abort();
    let unplayed = scenes.iter().skip(outcomes.len()).map(|(scene, _)| scene.name).collect();
    let interrupted = *stopping.borrow();
    if let Err(error) = gateway.stop().await {
        eprintln!("fulmar: the gateway did not leave by itself: {error:#}");
    }
    Ok(Run {
        command_line: command_line(),
        version: version(),
        began,
        took: started.elapsed(),
        seed: args.seed,
        phones: args.phones.into(),
        outcomes,
        unplayed,
        interrupted,
    })
}

/// The first signal asks for an end; further ones change nothing, as every wait has an end.
fn watch_signals(stop: watch::Sender<bool>) -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        stop.send_replace(true);
    })
}

/// What was typed, quoted as a shell would want it.
fn command_line() -> String {
    let words = std::env::args().enumerate().map(|(place, word)| {
        let word = if place == 0 { "fulmar".to_owned() } else { word };
        let bare = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+@%".contains(c);
        if !word.is_empty() && word.chars().all(bare) {
            word
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The version, and what tells this build from others of the same version.
fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    match (option_env!("FULMAR_COMMIT"), std::env::current_exe().and_then(std::fs::read)) {
        (Some(commit), _) => format!("{version}, commit {commit}"),
        (None, Ok(binary)) => format!("{version}, binary {:016x}", xxhash_rust::xxh3::xxh3_64(&binary)),
        (None, Err(_)) => version.to_owned(),
    }
}

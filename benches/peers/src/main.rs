//! The same work for Fulmar and for other servers, on this machine in one go: `cargo xtask peers --help`.
//!
//! - Each server is a process of its own with a folder of its own, on loopback, with TLS; nothing of it is left, however this ends.
//! - The clients are one thread of this process; the report says when they were the bottleneck.
//!
//! The way of a figure: `plan` → `programs`, `server` → `drive` (with `client`) → `tally` → `report`, `page`.

mod alarm;
mod client;
mod drive;
mod mqtt;
mod nats;
mod page;
mod plan;
mod programs;
mod report;
mod server;
mod tally;
mod wire;

use std::{
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Parser;
use tokio::task::LocalSet;

use crate::{
    plan::{Peer, Sizes, Work},
    report::{Guest, Report, Row},
    server::Server,
};

const EXAMPLES: &str = "\
Work (--work):
  A  fan-out: one sender, 1 000 receivers, 128 B; 20 messages a second, then as fast as it goes
  B  500 senders, each with a receiver of its own; 10 000 messages a second of all, then as fast as it goes
  C  2 000 connections: full handshakes a second, and memory of each idle one
  D  1 000 clients come back at once, each missed 10 messages: until all have them, in order and once
     (E, lost packets: `cargo run --release -p fulmar-netlab -- --help`)

Examples:
  cargo xtask peers --check                               who is here, and how to get who is not
  cargo xtask peers --install                             get them all (packages as root; crates take minutes), then measure
  cargo xtask peers --json peers.json --html peers.html   everybody who is here, about five minutes
  cargo xtask peers --only fulmar,mosquitto --work A,C    two of them, two pieces of work
  cargo xtask peers --quick                               some seconds each: does it work here?

What an ack means differs between servers, and the table says how: read it before the figures.";

/// The same work for Fulmar and for other servers, side by side on this machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "fulmar-peers", bin_name = "cargo xtask peers", version, after_help = EXAMPLES)]
struct Flags {
    /// Only these servers [default: all that are here]
    #[arg(long, value_name = "SERVERS", value_delimiter = ',', value_enum)]
    only: Vec<Peer>,
    /// Only this work
    #[arg(long, value_name = "WORK", value_delimiter = ',', value_enum)]
    work: Vec<Work>,
    /// A few seconds each: too short to quote
    #[arg(long)]
    quick: bool,
    /// Messages a second of B
    #[arg(long, value_name = "PER SECOND", value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    rate: Option<u32>,
    /// Get programs that are not here: packages with apt-get (as root), crates with cargo install
    #[arg(long)]
    install: bool,
    /// Say who is here, and end
    #[arg(long)]
    check: bool,
    /// Where programs are built to [default: `peers` in cargo's target folder]
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Where servers keep their files meanwhile [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
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

/// No piece of work takes longer.
const WORK_MAX: Duration = Duration::from_secs(300);

/// Open files that are enough for everything.
const OPEN_FILES: u64 = 65_536;

fn main() -> ExitCode {
    if let Some(ended) = server::become_one() {
        return ended;
    }
    match run(&Flags::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let programs = flags.programs.clone().map_or_else(beside_us, Ok)?;
    let peers = if flags.only.is_empty() { Peer::ALL.to_vec() } else { flags.only.clone() };
    let works = if flags.work.is_empty() { Work::ALL.to_vec() } else { flags.work.clone() };
    if flags.install {
        for peer in &peers {
            if programs::find(*peer, &programs).is_none()
                && let Err(error) = programs::install(*peer, &programs)
            {
                eprintln!("peers: {error:#}");
            }
        }
    }
    if flags.check {
        return check(&peers, &programs);
    }
    for file in flags.json.iter().chain(&flags.html) {
        // Before the work, not after it.
        std::fs::write(file, "").with_context(|| format!("{} can't be written", file.display()))?;
    }
    // Servers inherit it.
    let _ = fulmar_gateway::open_files::raise(OPEN_FILES);
    let mut sizes = if flags.quick { Sizes::quick() } else { Sizes::full() };
    if let Some(rate) = flags.rate {
        sizes.pair_rate = rate.into();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measuring = measure(flags, &peers, &works, &sizes, &programs);
    let (guests, rows) = LocalSet::new().block_on(&runtime, async {
        tokio::select! {
            measured = measuring => measured,
            stopped = asked_to_stop() => stopped,
        }
    })?;
    let words: Vec<_> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let report = Report {
        command_line: std::iter::once("cargo xtask peers".to_owned())
            .chain(words)
            .collect::<Vec<_>>()
            .join(" "),
        commit: commit(),
        machine: machine(),
        is_quick: flags.quick,
        sizes,
        guests,
        rows,
    };
    std::io::stdout().lock().write_all(report.table().as_bytes())?;
    if let Some(file) = &flags.json {
        std::fs::write(file, format!("{:#}\n", report.json()))?;
    }
    if let Some(file) = &flags.html {
        std::fs::write(file, page::page(&report))?;
    }
    anyhow::ensure!(!report.rows.is_empty(), "nobody was measured");
    // Who is not here is no failure; who is and could not do its work is.
    let failed = report.guests.iter().any(|guest| !guest.setting.is_empty() && !guest.trouble.is_empty());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn check(peers: &[Peer], programs: &Path) -> anyhow::Result<ExitCode> {
    let mut text = String::new();
    for peer in peers {
        let line = match programs::find(*peer, programs) {
            Some(file) => format!("{} {}", programs::version(*peer, &file), file.display()),
            None => format!("not here: {}", programs::advice(*peer)),
        };
        text += &format!("{:<11} {line}\n", peer.name());
    }
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// `target/peers`, of the target folder this program was built into.
fn beside_us() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target =
        program.parent().and_then(Path::parent).context("this program is in no target folder: --programs")?;
    Ok(target.join("peers"))
}

/// Ctrl-C and SIGTERM.
async fn asked_to_stop<T>() -> anyhow::Result<T> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => {}
        pressed = tokio::signal::ctrl_c() => pressed?,
    }
    bail!("stopped; nothing is left behind")
}

async fn measure(
    flags: &Flags,
    peers: &[Peer],
    works: &[Work],
    sizes: &Sizes,
    programs: &Path,
) -> anyhow::Result<(Vec<Guest>, Vec<Row>)> {
    let (mut guests, mut rows) = (Vec::new(), Vec::new());
    for peer in peers {
        let mut guest = Guest { peer: *peer, setting: String::new(), trouble: Vec::new() };
        match programs::find(*peer, programs) {
            None => guest.trouble.push(programs::advice(*peer)),
            Some(program) => {
                let version = programs::version(*peer, &program);
                guest.setting = format!("{} {version}", programs::program(*peer).0);
                for work in works.iter().filter(|work| work.fits(*peer)) {
                    match one(flags, *peer, *work, sizes, &program, &version).await {
                        Ok((setting, measured)) => {
                            guest.setting = setting;
                            rows.extend(measured);
                        }
                        Err(error) => {
                            tell(flags, &format!("{} {work:?}: FAILED {error:#}", peer.name()));
                            guest.trouble.push(format!("{work:?}: {error:#}"));
                        }
                    }
                }
            }
        }
        guests.push(guest);
    }
    Ok((guests, rows))
}

/// One server, one piece of work; the server and its folder are gone when this returns.
async fn one(
    flags: &Flags,
    peer: Peer,
    work: Work,
    sizes: &Sizes,
    program: &Path,
    version: &str,
) -> anyhow::Result<(String, Vec<Row>)> {
    let mut folder = tempfile::Builder::new();
    let folder = folder.prefix("fulmar-peers-");
    let folder = match &flags.folder {
        Some(place) => folder.tempdir_in(place)?,
        None => folder.tempdir()?,
    };
    let server = Server::start(peer, program, version, folder.path()).await?;
    let progress = |doing: &str| tell(flags, &format!("{:<11} {work:?}: {doing}", peer.name()));
    let working = Box::pin(drive::carry_out(work, &server, sizes, &progress));
    let rows = tokio::time::timeout(WORK_MAX, working)
        .await
        .with_context(|| format!("no end after {} s", WORK_MAX.as_secs()))??;
    let setting = server.setting().to_owned();
    drop(server);
    Ok((setting, rows))
}

/// Progress: on a terminal a line that replaces the one before, but for failures.
fn tell(flags: &Flags, line: &str) {
    if flags.quiet {
        return;
    }
    if std::io::stderr().is_terminal() && !line.contains("FAILED") {
        eprint!("\r\x1b[K{line}");
    } else {
        eprintln!("{line}");
    }
}

/// What git says of the folder we are in.
fn commit() -> String {
    let said =
        std::process::Command::new("git").args(["describe", "--always", "--dirty", "--abbrev=7"]).output();
    let said = said.ok().filter(|said| said.status.success());
    said.map_or_else(
        || "commit unknown".to_owned(),
        |said| String::from_utf8_lossy(&said.stdout).trim().to_owned(),
    )
}

fn machine() -> String {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    format!(
        "{}, {} cores, Linux {}, load {}",
        model.map_or("unknown processor", |(_, name)| name.trim()),
        std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        read("/proc/sys/kernel/osrelease").trim(),
        read("/proc/loadavg").split_whitespace().next().unwrap_or("unknown")
    )
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_are_sound() {
        Flags::command().debug_assert();
        let flags = Flags::try_parse_from(["peers", "--only", "fulmar,rmqtt-quic", "--work", "A,c"]).unwrap();
        assert_eq!(flags.only, [Peer::Fulmar, Peer::RmqttQuic]);
        assert_eq!(flags.work, [Work::A, Work::C]);
        for wrong in [["--only", "kafka"], ["--work", "E"], ["--rate", "0"]] {
            assert!(Flags::try_parse_from(std::iter::once("peers").chain(wrong)).is_err(), "{wrong:?}");
        }
    }
}

//! The same work over QUIC and over TLS/TCP where both meet real packet loss: `cargo run --release -p fulmar-netlab -- --all`.
//!
//! - Each cell (who × which network) runs in a process and namespaces of its own and leaves nothing behind.
//! - What is measured and how to read it: `README.md` beside `Cargo.toml`. What came out: `benches/RESULTS.md`.
//!
//! The way of a packet: client → `fulmar-near` (`tun`) → `link` → `fulmar-far` → server, and back.

mod cell;
mod fulmar;
mod lab;
mod link;
mod measure;
mod mqtt;
mod plan;
mod report;
mod tun;

use std::{io::Write as _, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Parser;
use tokio::{
    io::AsyncReadExt as _,
    sync::{Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

use crate::{
    cell::{Outcome, Spec},
    plan::{Condition, Peer},
    report::Cell,
};

const EXAMPLES: &str = "\
Networks (--network):
  loss-0, loss-1, loss-5, loss-10   that many per cent of the packets are lost, each direction
  dark-5, dark-10                   nothing gets through for 200 ms at a time, that share of the time

Examples:
  fulmar-netlab --all                                   every peer on every network, about half an hour
  fulmar-netlab --all --jobs 3 --json netlab.json       three cells at a time, and a file for plots
  fulmar-netlab --peer fulmar-quic --network loss-5     one cell
  fulmar-netlab --quick                                 all for some seconds: does it work here?
  fulmar-netlab --check                                 is everything here that it takes?

Takes Linux with /dev/net/tun, `unshare` (util-linux), `ip` (iproute2), and root or user namespaces; for the MQTT
peer `mosquitto`. Namespaces, interfaces and processes end with the program, also after Ctrl-C.";

/// The same messages over QUIC and over TLS/TCP, between two network namespaces joined by a bad link.
#[derive(Clone, Debug, Parser)]
#[command(name = "fulmar-netlab", version, after_help = EXAMPLES)]
struct Flags {
    /// Measure every peer on every network
    #[arg(long, conflicts_with_all = ["peer", "network"])]
    all: bool,
    /// Who does the work; may be given again [default: everybody]
    #[arg(long, value_enum)]
    peer: Vec<Peer>,
    /// On which network; may be given again [default: all]
    #[arg(long, value_name = "NAME", value_parser = network)]
    network: Vec<Condition>,
    /// Look whether everything is here that it takes, and end
    #[arg(long)]
    check: bool,
    /// A few seconds per cell: too short to quote
    #[arg(long)]
    quick: bool,
    /// Pairs of a sender and a receiver
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
    pairs: u32,
    /// Seconds that count
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Seconds of the same work before that
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3_600))]
    warm_up: u64,
    /// Seconds to wait for the last messages
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    drain: u64,
    /// Round trip of the wire, ms; the bars are for 100
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    rtt: u64,
    /// Seed of the schedule and of the wire
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// TCP's congestion control in both namespaces, if the kernel allows it there (sysctl
    /// net.ipv4.tcp_allowed_congestion_control); the machine's own unless named. Fulmar's QUIC uses CUBIC
    #[arg(long, value_name = "NAME")]
    congestion: Option<String>,
    /// Cells measured at the same time; the work is light, but the machine must keep up
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    jobs: u32,
    /// Write everything to this file as well, with points for plots and the slowest messages
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write every message to the file, not only the slowest
    #[arg(long, requires = "json")]
    samples: bool,
    /// Where servers keep their files while a cell runs; the system's temporary folder unless named
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// What clients, gateway and wire log, for instance fulmar_client=debug,fulmar_netlab=trace (every packet)
    #[arg(long, value_name = "FILTER")]
    trace: Option<String>,
}

/// How the folders of cells are called.
const FOLDER_PREFIX: &str = "fulmar-netlab-";

/// How often it is tried again to remove a folder.
const REMOVALS_MAX: usize = 40;

fn network(name: &str) -> Result<Condition, String> {
    Condition::named(name).ok_or_else(|| {
        let names: Vec<_> = Condition::ALL.iter().map(|condition| condition.name).collect();
        format!("there are {}", names.join(", "))
    })
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (role, argument) = (arguments.next(), arguments.next());
    let ended = match (role.as_deref(), argument) {
        (Some(lab::AS_INSIDE), Some(spec)) => cell::run(&spec).map(|()| ExitCode::SUCCESS),
        (Some(lab::AS_FAR), Some(spec)) => lab::become_server(&spec),
        _ => run(&Flags::parse()),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("fulmar-netlab: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let peers = if flags.peer.is_empty() { Peer::ALL.to_vec() } else { flags.peer.clone() };
    let networks = if flags.network.is_empty() { Condition::ALL.to_vec() } else { flags.network.clone() };
    lab::check(&peers)?;
    if flags.check {
        say("everything is here\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let asked = flags.all || flags.quick || !flags.peer.is_empty() || !flags.network.is_empty();
    anyhow::ensure!(asked, "say what to measure: --all, or --peer and --network (--help shows more)");
    let specs: Vec<_> =
        networks.iter().flat_map(|network| peers.iter().map(|peer| spec(flags, *peer, *network))).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (cells, failures) = runtime.block_on(measure_all(flags, specs))?;
    if !cells.is_empty() {
        say(&report::table(&cells))?;
    }
    if flags.quick {
        say("quick: too short to quote\n")?;
    }
    if let Some(file) = &flags.json {
        let text = serde_json::to_string_pretty(&report::json(&cells, &commit()))?;
        std::fs::write(file, text).with_context(|| format!("{} can't be written", file.display()))?;
    }
    Ok(if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn spec(flags: &Flags, peer: Peer, network: Condition) -> Spec {
    let quick = |full: u64, quick: u64| if flags.quick { quick } else { full };
    Spec {
        peer,
        condition: network.name.to_owned(),
        pairs: flags.pairs,
        warm_up_s: quick(flags.warm_up, 2),
        seconds: quick(flags.seconds, 8),
        drain_s: flags.drain,
        seed: flags.seed,
        rtt_ms: flags.rtt,
        congestion: flags.congestion.clone(),
        trace: flags.trace.clone(),
        samples: flags.samples,
        folder: PathBuf::new(),
    }
}

/// All cells that could be measured, in the order they were asked for, and how many could not.
async fn measure_all(flags: &Flags, specs: Vec<Spec>) -> anyhow::Result<(Vec<Cell>, usize)> {
    let (cancel, cancelled) = watch::channel(false);
    let room = Arc::new(Semaphore::new(usize::try_from(flags.jobs)?));
    let mut measuring = JoinSet::new();
    for (number, spec) in specs.into_iter().enumerate() {
        let (room, cancelled, folder) = (Arc::clone(&room), cancelled.clone(), flags.folder.clone());
        measuring.spawn(async move {
            let _place = room.acquire_owned().await?;
            let name = format!("{} {}", spec.peer.name(), spec.condition);
            let measured = measure_one(spec, folder, cancelled).await;
            anyhow::Ok((number, measured.with_context(|| name)))
        });
    }
    let (mut cells, mut failures) = (Vec::new(), 0);
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        let stopped = tokio::select! {
            measured = measuring.join_next() => match measured {
                None => break,
                Some(measured) => {
                    match measured?? {
                        (number, Ok(cell)) => {
                            eprintln!("{}", cell.line());
                            cells.push((number, cell));
                        }
                        (_, Err(error)) => {
                            failures += 1;
                            eprintln!("FAILED {error:#}");
                        }
                    }
                    continue;
                }
            },
            ctrl_c = tokio::signal::ctrl_c() => ctrl_c.is_ok(),
            stop = terminate.recv() => stop.is_some(),
        };
        if stopped {
            cancel.send_replace(true);
            // Each ends its own process and removes its own folder.
            while measuring.join_next().await.is_some() {}
            bail!("stopped; nothing is left behind");
        }
    }
    cells.sort_by_key(|(number, _)| *number);
    Ok((cells.into_iter().map(|(_, cell)| cell).collect(), failures))
}

/// A cell in a process and namespaces of its own; both are gone when this returns.
async fn measure_one(
    mut spec: Spec,
    folder: Option<PathBuf>,
    mut cancelled: watch::Receiver<bool>,
) -> anyhow::Result<Cell> {
    if *cancelled.borrow() {
        bail!("stopped");
    }
    let fresh = match folder {
        Some(folder) => tempfile::Builder::new().prefix(FOLDER_PREFIX).tempdir_in(folder)?,
        None => tempfile::Builder::new().prefix(FOLDER_PREFIX).tempdir()?,
    };
    spec.folder = fresh.path().to_owned();
    let mut child = lab::inside(&serde_json::to_string(&spec)?)?
        .kill_on_drop(true)
        .spawn()
        .context("unshare can't be started")?;
    // Held open: the process inside ends when this end is closed.
    let held = child.stdin.take();
    let mut out = child.stdout.take().context("no pipe")?;
    let at_most = Duration::from_secs(spec.warm_up_s + spec.seconds + spec.drain_s + 120);
    let mut said = String::new();
    let stopped = tokio::select! {
        read = timeout(at_most, out.read_to_string(&mut said)) => {
            read.is_err().then(|| format!("not done after {} s", at_most.as_secs()))
        }
        _ = cancelled.changed() => Some("stopped".to_owned()),
    };
    if let Some(why) = stopped {
        child.kill().await?;
        remove(fresh).await?;
        bail!(why);
    }
    drop(held);
    let status = child.wait().await?;
    anyhow::ensure!(status.success() && !said.is_empty(), "it ended with {status} (its reason is above)");
    let outcome: Outcome = serde_json::from_str(&said).context("the outcome can't be read")?;
    Ok(Cell { spec, outcome })
}

/// Removes a folder in which a process that is just being ended may still make a file.
async fn remove(folder: tempfile::TempDir) -> std::io::Result<()> {
    let folder = folder.keep();
    let mut removed = std::fs::remove_dir_all(&folder);
    for _ in 0..REMOVALS_MAX {
        if removed.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        removed = std::fs::remove_dir_all(&folder);
    }
    removed
}

/// What this was built from, as far as git knows.
fn commit() -> String {
    let described = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
    match described {
        Ok(described) if described.status.success() => {
            String::from_utf8_lossy(&described.stdout).trim().to_owned()
        }
        _ => "unknown".to_owned(),
    }
}

fn say(text: &str) -> std::io::Result<()> {
    std::io::stdout().write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Flags::command().debug_assert();
        assert!(Flags::try_parse_from(["fulmar-netlab", "--network", "loss-2"]).is_err());
        let flags = Flags::try_parse_from(["fulmar-netlab", "--network", "dark-5", "--peer", "fulmar-quic"]);
        let flags = flags.unwrap();
        assert_eq!(flags.network.iter().map(|network| network.name).collect::<Vec<_>>(), ["dark-5"]);
        let spec = spec(&flags, flags.peer[0], flags.network[0]);
        assert_eq!((spec.peer, spec.seconds, spec.condition.as_str()), (Peer::FulmarQuic, 120, "dark-5"));
    }
}

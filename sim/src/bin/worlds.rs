//! Runs the worlds of many seeds and says what became of them: `cargo xtask sim --help`.
//!
//! - Seeds that once found something ([`KEPT`]) come first.
//! - Every hundredth seed runs twice; both event logs must be equal to the byte.
//! - A seed that fails is printed with the command that shows it again.
//! - Each world has a process of its own: tokio draws the order in which the watchers of a channel are woken from a counter of
//!   the process, so that only the first world of a process repeats to the byte. Besides, one that hangs can be ended.
//!
//! Not here: what happens in a world (the library).

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use fulmar_sim::{Bite, SeedReport, run_seed};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

/// Seeds that found something.
const KEPT: &str = include_str!("../../seeds.txt");

/// One in so many seeds runs twice.
const TWICE_EVERY: u64 = 100;

/// Failing seeds that are told in full; later ones only count.
const FAILURES_TOLD_MAX: usize = 20;

/// Between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// A seed that takes longer than this on the clock on the wall is ended: it hangs.
const HANGS: Duration = Duration::from_secs(120);

/// Runs whole worlds (real SDK, real gateway, bad network, virtual time), one for each seed
#[derive(Debug, Parser)]
struct Args {
    /// How many seeds
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    seeds: u64,
    /// The first seed; with it, kept seeds are not replayed
    #[arg(long, value_name = "S")]
    from: Option<u64>,
    /// Writes what was found as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the event log of the last seed
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Writes what the gateway and the SDK trace to stderr, with the world's time; levels by module as in `fulmar --log`
    #[arg(long, value_name = "FILTER")]
    trace: Option<String>,
    /// Worlds at a time; as many as there are cores unless said
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Runs this one seed here and writes what came of it as JSON
    #[arg(long, value_name = "SEED", hide = true)]
    one: Option<u64>,
    /// With other hash keys, by so many
    #[arg(long, value_name = "N", hide = true, default_value_t = 0)]
    hash_keys: u32,
}

/// What came of a seed, as a child tells it.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct Told {
    seed: u64,
    failures: Vec<String>,
    bites: BTreeMap<String, u64>,
    sent: u64,
    acked: u64,
    delivered: u64,
    log_count: u64,
    log_hash: u64,
    lasted: Duration,
    converged_after: Duration,
}

impl From<&SeedReport> for Told {
    fn from(report: &SeedReport) -> Self {
        Self {
            seed: report.seed,
            failures: report.failures.clone(),
            bites: report.bites.iter().map(|(bite, count)| (bite.word().to_owned(), count)).collect(),
            sent: report.counters.sent,
            acked: report.counters.acked,
            delivered: report.counters.delivered,
            log_count: report.log_count,
            log_hash: report.log_hash,
            lasted: report.lasted,
            converged_after: report.converged_after,
        }
    }
}

/// Keys that are used up before a second run.
const OTHER_KEYS: u32 = 5;

#[derive(Default)]
struct Found {
    runs: u64,
    twice: u64,
    failed: Vec<(u64, Vec<String>)>,
    failed_count: u64,
    /// Seeds in which a fault bit, and how often in all.
    bites: BTreeMap<Bite, (u64, u64)>,
    sent: u64,
    acked: u64,
    delivered: u64,
    lasted: Duration,
    converged: Vec<Duration>,
    log_lines: u64,
}

impl Found {
    fn add(&mut self, report: Told, twice: bool) {
        self.runs += 1;
        self.twice += u64::from(twice);
        for bite in Bite::ALL {
            if let Some(count) = report.bites.get(bite.word()) {
                let (seeds, times) = self.bites.entry(*bite).or_default();
                *seeds += 1;
                *times += count;
            }
        }
        self.sent += report.sent;
        self.acked += report.acked;
        self.delivered += report.delivered;
        self.lasted += report.lasted;
        self.converged.push(report.converged_after);
        self.log_lines += report.log_count;
        if !report.failures.is_empty() {
            self.failed_count += 1;
            if self.failed.len() < FAILURES_TOLD_MAX {
                tell(&failure(report.seed, &report.failures));
                self.failed.push((report.seed, report.failures));
            }
        }
    }
}

fn failure(seed: u64, failures: &[String]) -> String {
    let mut text =
        format!("seed {seed} FAILED; again: cargo xtask sim --from {seed} --seeds 1 --log seed-{seed}.log\n");
    for failure in failures.iter().take(5) {
        text.push_str(&format!("    {failure}\n"));
    }
    if failures.len() > 5 {
        text.push_str(&format!("    and {} more\n", failures.len() - 5));
    }
    text
}

fn main() -> ExitCode {
    match work(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(args: &Args) -> anyhow::Result<bool> {
    if let Some(seed) = args.one {
        if let Some(filter) = &args.trace {
            trace(filter)?;
        }
        return one(seed, args.log.as_deref(), args.hash_keys);
    }
    let mut seeds: Vec<u64> = match args.from {
        Some(_) => Vec::new(),
        None => kept()?,
    };
    let from = args.from.unwrap_or(0);
    seeds.extend(from..from.saturating_add(args.seeds));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = args.threads.unwrap_or(cores).clamp(1, 256).min(seeds.len().max(1));
    let found = Mutex::new(Found::default());
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    let twice = seed % TWICE_EVERY == 0;
                    let mut report = in_a_child(seed, args.log.as_deref(), args.trace.as_deref(), 0);
                    if twice {
                        report.failures.extend(difference(seed, &report));
                    }
                    found.lock().unwrap_or_else(PoisonError::into_inner).add(report, twice);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| progress(&done, seeds.len() as u64, started));
    });
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary(&found, started.elapsed());
    if let Some(file) = &args.json {
        let json = serde_json::to_vec_pretty(&json(&found, &seeds, started.elapsed()))?;
        std::fs::write(file, json).with_context(|| format!("can't write {}", file.display()))?;
    }
    Ok(found.failed_count == 0)
}

/// The seeds of [`KEPT`].
fn kept() -> anyhow::Result<Vec<u64>> {
    let lines = KEPT.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let seed = line.split_whitespace().next().unwrap_or_default();
            seed.parse().with_context(|| format!("sim/seeds.txt: {line:?} does not begin with a seed"))
        })
        .collect()
}

/// Since the first event of the world.
struct WorldTime(OnceLock<tokio::time::Instant>);

impl FormatTime for WorldTime {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        if tokio::runtime::Handle::try_current().is_err() {
            return w.write_str("-");
        }
        let began = self.0.get_or_init(tokio::time::Instant::now);
        write!(w, "{:.6}", began.elapsed().as_secs_f64())
    }
}

fn trace(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("--trace {filter:?} is no filter"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(WorldTime(OnceLock::new()))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    Ok(())
}

/// Runs a seed in this process.
fn one(seed: u64, log: Option<&Path>, hash_keys: u32) -> anyhow::Result<bool> {
    let report = run_seed(seed, log.is_some(), hash_keys);
    if let (Some(file), Some(lines)) = (log, &report.log) {
        std::fs::write(file, lines).with_context(|| format!("can't write {}", file.display()))?;
    }
    serde_json::to_writer(std::io::stdout().lock(), &Told::from(&report))?;
    Ok(true)
}

/// Runs a seed in a process of its own; what goes wrong with that is a failure of the seed.
fn in_a_child(seed: u64, log: Option<&Path>, trace: Option<&str>, hash_keys: u32) -> Told {
    child(seed, log, trace, hash_keys).unwrap_or_else(|error| Told {
        seed,
        failures: vec![format!("{error:#}")],
        ..Told::default()
    })
}

fn child(seed: u64, log: Option<&Path>, trace: Option<&str>, hash_keys: u32) -> anyhow::Result<Told> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--one", &seed.to_string(), "--hash-keys", &hash_keys.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if let Some(log) = log {
        command.arg("--log").arg(log);
    }
    if let Some(filter) = trace {
        command.args(["--trace", filter]);
    }
    let mut child = command.spawn().context("a child can't start")?;
    let mut output = child.stdout.take().context("a child without output")?;
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).map(|_| text)
    });
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > HANGS {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("the world still ran after {HANGS:?}");
        }
        std::thread::park_timeout(Duration::from_millis(2));
    };
    let text = reading.join().map_err(|_| anyhow::anyhow!("a child could not be read"))??;
    serde_json::from_str(&text).with_context(|| format!("a child ended with {status} and said {text:?}"))
}

/// What a second run of the seed does differently, whose hash keys are others: an order that depends on them shows here.
fn difference(seed: u64, first: &Told) -> Option<String> {
    let second = in_a_child(seed, None, None, OTHER_KEYS);
    if (second.log_hash, second.log_count) == (first.log_hash, first.log_count) {
        return None;
    }
    let log = |number: u32| -> anyhow::Result<String> {
        let file =
            std::env::temp_dir().join(format!("fulmar-sim-{}-{seed}-{number}.log", std::process::id()));
        child(seed, Some(&file), None, number)?;
        let text = std::fs::read(&file)?;
        std::fs::remove_file(&file)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let (one, two) = match (log(0), log(OTHER_KEYS)) {
        (Ok(one), Ok(two)) => (one, two),
        (Err(error), _) | (_, Err(error)) => {
            return Some(format!("two runs differ; their logs can't be had: {error:#}"));
        }
    };
    let mut lines = one.lines().zip(two.lines()).enumerate();
    Some(match lines.find(|(_, (one, two))| one != two) {
        Some((number, (one, two))) => {
            format!("two runs differ, first in line {}:\n      {one}\n      {two}", number + 1)
        }
        None if one.len() != two.len() => "two runs differ: one goes on where the other ends".to_owned(),
        None => "two runs differed, two more did not".to_owned(),
    })
}

fn progress(done: &AtomicU64, all: u64, started: Instant) {
    let mut last = Instant::now();
    loop {
        let done = done.load(Ordering::Relaxed);
        if done >= all {
            return;
        }
        if last.elapsed() >= PROGRESS_EVERY {
            last = Instant::now();
            let per_second = done as f64 / started.elapsed().as_secs_f64();
            tell(&format!("{done} of {all} seeds, {per_second:.1} a second\n"));
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

fn summary(found: &Found, took: Duration) {
    let mut converged = found.converged.clone();
    converged.sort_unstable();
    let at = |share: usize| {
        converged.get(converged.len().saturating_sub(1) * share / 100).copied().unwrap_or_default()
    };
    tell(&format!(
        "{} seeds in {:.0} s ({} ran twice), {:.0} s of their own time; {} messages, {} acked, {} deliveries, {} log lines\n",
        found.runs,
        took.as_secs_f64(),
        found.twice,
        found.lasted.as_secs_f64(),
        found.sent,
        found.acked,
        found.delivered,
        found.log_lines,
    ));
    tell(&format!(
        "calm until all was well: p50 {:.1} s, p99 {:.1} s, longest {:.1} s\n",
        at(50).as_secs_f64(),
        at(99).as_secs_f64(),
        at(100).as_secs_f64()
    ));
    tell("fault                 seeds in which it bit    times\n");
    for bite in Bite::ALL {
        let (seeds, times) = found.bites.get(bite).copied().unwrap_or_default();
        let share = seeds as f64 * 100.0 / found.runs.max(1) as f64;
        tell(&format!("{bite:<22}{share:>20.1} %{times:>9}\n"));
    }
    // What `xtask` counts.
    let _ = writeln!(
        std::io::stdout(),
        "{} passed, {} failed",
        found.runs - found.failed_count,
        found.failed_count
    );
}

fn json(found: &Found, seeds: &[u64], took: Duration) -> serde_json::Value {
    let bites: serde_json::Map<String, serde_json::Value> = Bite::ALL
        .iter()
        .map(|bite| {
            let (seeds, times) = found.bites.get(bite).copied().unwrap_or_default();
            let share = seeds as f64 / found.runs.max(1) as f64;
            (bite.word().to_owned(), serde_json::json!({ "seeds": seeds, "share": share, "times": times }))
        })
        .collect();
    serde_json::json!({
        "seeds": found.runs,
        "first": seeds.first(),
        "last": seeds.last(),
        "ran_twice": found.twice,
        "failed": found.failed_count,
        "failures": found.failed.iter().map(|(seed, what)| serde_json::json!({ "seed": seed, "what": what })).collect::<Vec<_>>(),
        "faults": bites,
        "messages": found.sent,
        "acked": found.acked,
        "deliveries": found.delivered,
        "log_lines": found.log_lines,
        "own_seconds": found.lasted.as_secs_f64(),
        "wall_seconds": took.as_secs_f64(),
    })
}

fn tell(text: &str) {
    // Nobody listens: nothing to do about it.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

//! A measurement and the process it is made in.
//!
//! - Each is made in a process of its own: its CPU and memory are what the kernel says of that process, nothing of an earlier
//!   measurement is warm, and a slower disk is one preloaded library away.
//! - A process is this program again, told with `--cell` what to measure; the figures are the last line it prints.
//!
//! Not here: what is measured (the other modules), which measurements there are and what they are held against (`main`).

use std::{
    collections::BTreeMap,
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use fulmar_store::EngineKind;
use serde::{Deserialize, Serialize};

use crate::{churn, floor, group, life, read, write};

/// The flag that tells a process what to measure.
pub(crate) const FLAG: &str = "--cell";

/// What the delaying library is called, beside this program or in the folder above.
const FAULTDISK: &str = "libfulmar_faultdisk.so";

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Cell {
    /// A bare file: records appended, written and synced once per commit; as many files at once as there are shards.
    File { folder: PathBuf, batch: usize, shards: u16, millis: u64 },
    /// A bare engine: single inserts, made durable once per commit.
    Engine { engine: String, folder: PathBuf, batch: usize, millis: u64 },
    /// The store, through its public API.
    Store { engine: String, folder: PathBuf, batch: usize, shards: u16, millis: u64 },
    /// The same for a fixed number of commits, without timers: its instructions are counted.
    Steps { commits: u64, batch: usize },
    /// Heads and newest pages of conversations, cold and warm.
    Read { engine: String, folder: PathBuf },
    /// Writes so many records, says so, and goes on writing until it is killed.
    Fill { engine: String, folder: PathBuf, records: u64 },
    /// Opens what was filled, holds it against what is known, and closes it.
    Open { engine: String, folder: PathBuf, records: u64, cold: bool },
    /// Producers that wait for their acks, gathered into one commit at a time; without an engine over a bare file.
    Group { engine: Option<String>, folder: PathBuf, producers: usize, millis: u64 },
    /// The newest records of each conversation are kept, while many times as many are written.
    Churn { engine: String, folder: PathBuf, conversations: u64, keep: u64, turnovers: u64 },
}

/// Named figures.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Measured(BTreeMap<String, f64>);

impl Measured {
    pub(crate) fn set(&mut self, name: impl Into<String>, value: f64) {
        self.0.insert(name.into(), value);
    }

    /// Not a number if there is none of this name; such a figure meets no bar.
    pub(crate) fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(f64::NAN)
    }

    /// The median of each figure over several measurements of the same.
    pub(crate) fn medians(all: &[Self]) -> Self {
        let mut medians = Self::default();
        for name in all.iter().flat_map(|one| one.0.keys()) {
            let mut samples = fulmar_benches::meter::Samples::default();
            all.iter().filter_map(|one| one.0.get(name)).for_each(|value| samples.add(*value));
            medians.set(name.clone(), samples.median());
        }
        medians
    }
}

/// The engine of this name.
pub(crate) fn engine(name: &str) -> anyhow::Result<EngineKind> {
    EngineKind::from_name(name).with_context(|| format!("there is no engine {name}"))
}

/// Measures in this process, which was started for it, and prints the figures.
pub(crate) fn play(cell: &str) -> anyhow::Result<()> {
    let figures = match serde_json::from_str(cell).context("not a measurement")? {
        Cell::File { folder, batch, shards, millis } => {
            floor::file(&folder, batch, shards, Duration::from_millis(millis))?
        }
        Cell::Engine { engine: name, folder, batch, millis } => {
            floor::engine(engine(&name)?, &folder, batch, Duration::from_millis(millis))?
        }
        Cell::Store { engine: name, folder, batch, shards, millis } => {
            write::through_the_store(engine(&name)?, &folder, batch, shards, Duration::from_millis(millis))?
        }
        Cell::Steps { commits, batch } => write::steps(commits, batch)?,
        Cell::Read { engine: name, folder } => read::measure(engine(&name)?, &folder)?,
        Cell::Fill { engine: name, folder, records } => life::fill(engine(&name)?, &folder, records)?,
        Cell::Open { engine: name, folder, records, cold } => {
            life::open(engine(&name)?, &folder, records, cold)?
        }
        Cell::Group { engine: None, folder, producers, millis } => {
            group::over_a_file(&folder, producers, Duration::from_millis(millis))?
        }
        Cell::Group { engine: Some(name), folder, producers, millis } => {
            group::over_the_store(engine(&name)?, &folder, producers, Duration::from_millis(millis))?
        }
        Cell::Churn { engine: name, folder, conversations, keep, turnovers } => {
            churn::measure(engine(&name)?, &folder, conversations, keep, turnovers)?
        }
    };
    writeln!(io::stdout().lock(), "{}", serde_json::to_string(&figures)?)?;
    Ok(())
}

impl Cell {
    fn command(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(FLAG).arg(serde_json::to_string(self)?).stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(command)
    }

    /// Measures in a process of its own.
    ///
    /// # Errors
    /// It could not be started, or failed; what it complained about is on standard error.
    pub(crate) fn run(&self) -> anyhow::Result<Measured> {
        self.finish(self.command()?)
    }

    /// The same below a disk on which every sync in `folder` takes so much longer.
    ///
    /// # Errors
    /// As [`Self::run`]; or the delaying library was not built.
    pub(crate) fn run_delayed(&self, folder: &Path, delay: Duration) -> anyhow::Result<Measured> {
        let mut command = self.command()?;
        if !delay.is_zero() {
            command
                .env("LD_PRELOAD", faultdisk()?)
                .env("FULMAR_FAULTDISK_ROOT", folder.canonicalize()?)
                .env("FULMAR_FAULTDISK_SYNC_DELAY_US", delay.as_micros().to_string());
        }
        self.finish(command)
    }

    fn finish(&self, mut command: Command) -> anyhow::Result<Measured> {
        let output = command.stderr(Stdio::inherit()).output()?;
        anyhow::ensure!(output.status.success(), "{self:?} failed: {}", output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().last().with_context(|| format!("{self:?} said nothing"))?;
        serde_json::from_str(line).with_context(|| format!("{self:?} said {line:?}"))
    }

    /// Starts it and waits for its first line. Whoever asked kills it.
    ///
    /// # Errors
    /// It could not be started, or ended without a line.
    pub(crate) fn start(&self) -> anyhow::Result<Started> {
        let mut child = self.command()?.spawn()?;
        let lines = child.stdout.take().context("no pipe")?;
        let mut started = Started(child);
        let mut line = String::new();
        let read = BufReader::new(lines).read_line(&mut line)?;
        if read == 0 {
            anyhow::bail!("{self:?} ended: {}", started.0.wait()?);
        }
        Ok(started)
    }

    /// Instructions all its threads take under valgrind, and those of them in SHA-256: valgrind emulates a processor without
    /// instructions for that.
    ///
    /// # Errors
    /// There is no valgrind, or the measurement failed in it.
    pub(crate) fn instructions(&self) -> anyhow::Result<(f64, f64)> {
        let folder = tempfile::tempdir()?;
        let counts = folder.path().join("counts");
        let mut command = Command::new("valgrind");
        command
            .arg("--tool=callgrind")
            .arg(format!("--callgrind-out-file={}", counts.display()))
            .arg(std::env::current_exe()?)
            .arg(FLAG)
            .arg(serde_json::to_string(self)?);
        let output = command.stdin(Stdio::null()).output().context("valgrind can't be started")?;
        let text = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{self:?} failed under valgrind:\n{text}");
        let collected = text.lines().find_map(|line| line.split_once("Collected :"));
        let count = collected.and_then(|(_, count)| count.split_whitespace().next());
        let all = count.context("valgrind counted nothing")?.parse()?;
        Ok((all, self_cost(&std::fs::read_to_string(counts)?, "sha2::")))
    }
}

/// Instructions in functions whose names hold `what`, calls from them left out, of what callgrind wrote.
fn self_cost(counts: &str, what: &str) -> f64 {
    let mut names: BTreeMap<&str, bool> = BTreeMap::new();
    let (mut inside, mut is_call, mut sum) = (false, false, 0.0);
    for line in counts.lines() {
        if let Some(name) = line.strip_prefix("fn=").or_else(|| line.strip_prefix("cfn=")) {
            // "(number) name" the first time, "(number)" from then on; also for functions that are called.
            let number = name.split(' ').next().unwrap_or_default();
            let found = *names.entry(number).or_insert_with(|| name.contains(what));
            if line.starts_with("fn=") {
                inside = found;
            }
        } else if line.starts_with("calls=") {
            // The line after it has what the call took in all.
            is_call = true;
        } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
            if inside && !is_call {
                sum += line.rsplit(' ').next().and_then(|cost| cost.parse::<f64>().ok()).unwrap_or(0.0);
            }
            is_call = false;
        }
    }
    sum
}

/// A measurement that goes on until it is killed; at the latest when this is dropped.
#[derive(Debug)]
pub(crate) struct Started(Child);

impl Started {
    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// It had ended already, for whatever reason.
    pub(crate) fn kill(mut self) -> anyhow::Result<()> {
        if let Some(status) = self.0.try_wait()? {
            anyhow::bail!("the writing process ended by itself: {status}");
        }
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // Gone already after `kill`.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn faultdisk() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let found =
        program.ancestors().skip(1).take(2).map(|folder| folder.join(FAULTDISK)).find(|path| path.is_file());
    found.with_context(|| {
        format!("{FAULTDISK} is not beside {}: cargo build --release -p fulmar-faultdisk", program.display())
    })
}

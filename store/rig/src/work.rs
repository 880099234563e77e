//! The work that is recorded, killed or left behind: a process of its own that opens a store and commits to it.
//!
//! What it does is told in marks, lines of one file: `opened SHARD COMMIT` (what stands there after opening is promised from
//! then on), `sent SHARD COMMIT` before a commit, `ack SHARD COMMIT` after it.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread::ScopedJoinHandle,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use fulmar_store::{Durability, EngineKind, Limits, Store, StoreOptions};

use crate::{
    chance::Chance,
    check,
    history::{CONVERSATIONS, History, Timeline, conversation, shard_id},
};

/// Engines that keep their data on a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// sled
    #[default]
    Sled,
    /// fjall
    Fjall,
}

impl Engine {
    /// As the store names it.
    #[must_use]
    pub fn kind(self) -> EngineKind {
        match self {
            Self::Sled => EngineKind::Sled,
            Self::Fjall => EngineKind::Fjall,
        }
    }
}

/// What a commit survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Power loss
    #[default]
    Power,
    /// The end of the process
    Process,
}

impl Level {
    /// As the store names it.
    #[must_use]
    pub fn durability(self) -> Durability {
        match self {
            Self::Power => Durability::Power,
            Self::Process => Durability::Process,
        }
    }
}

/// What the process is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Work {
    /// The data folder
    #[arg(long)]
    pub folder: PathBuf,
    /// The file of marks, appended to
    #[arg(long)]
    pub marks: PathBuf,
    /// What was sent so far, and what will be
    #[arg(long)]
    pub history: String,
    /// Engine of the store
    #[arg(long, value_enum, default_value_t)]
    pub engine: Engine,
    /// What a commit is to survive
    #[arg(long, value_enum, default_value_t)]
    pub durability: Level,
    /// Commits on each shard between opening and closing
    #[arg(long)]
    pub commits: u64,
    /// How often the store is opened
    #[arg(long)]
    pub runs: u32,
}

/// How the store of a history is opened: small figures, so that it settles and tidies up all the time.
#[must_use]
pub fn options(engine: Engine, durability: Level, history: &History) -> StoreOptions {
    let mut chance = Chance::of(&[history.seed, 77]);
    let mut pick = |of: &[u64]| chance.pick(of).copied().unwrap_or(1);
    StoreOptions {
        shards: u16::try_from(history.shards.len()).unwrap_or(1),
        engine: engine.kind(),
        durability: durability.durability(),
        cache_bytes: 1 << 20,
        engine_cache_bytes: 1 << 20,
        settle_bytes: usize::try_from(pick(&[4_000, 20_000, 60_000, 200_000])).unwrap_or(4_000),
        settle_commits: pick(&[4, 15, 50, 8_192]),
        settle_idle: Duration::from_millis(pick(&[3, 30, 1_000])),
        segment_bytes_max: pick(&[40_000, 200_000, 1 << 30]),
        ..StoreOptions::default()
    }
}

/// Does the work.
///
/// # Errors
/// When the store does not take it.
pub fn work(work: &Work) -> anyhow::Result<()> {
    let history = History::parse(&work.history)?;
    let options = options(work.engine, work.durability, &history);
    let marks =
        File::options().append(true).create(true).open(&work.marks).context("can't open the marks")?;
    for run in 0..work.runs {
        let store = check::open(&work.folder, &options)?;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0u16..store.shards())
                .map(|shard| {
                    let (store, done) = (&store, &done);
                    scope.spawn(move || read_along(store, shard, done))
                })
                .collect();
            let threads: Vec<_> = (0u16..store.shards())
                .map(|shard| {
                    let (store, history) = (&store, &history);
                    let marks = marks.try_clone();
                    scope.spawn(move || work_on(store, shard, history, work.commits, marks?))
                })
                .collect();
            let joined = |thread: ScopedJoinHandle<'_, anyhow::Result<()>>| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a thread panicked"),
            };
            let worked: Vec<_> = threads.into_iter().map(joined).collect();
            done.store(true, Ordering::Relaxed);
            let read: Vec<_> = readers.into_iter().map(joined).collect();
            worked.into_iter().chain(read).collect::<anyhow::Result<()>>()
        })?;
        if Chance::of(&[history.seed, u64::from(run), 78]).percent(50) {
            store.close()?;
        }
    }
    Ok(())
}

/// Reads while others commit and the store tidies up: nothing may be refused, missing, or out of order.
fn read_along(store: &Store, shard: u16, done: &AtomicBool) -> anyhow::Result<()> {
    let reader = store.reader(shard_id(shard))?;
    let all = Limits { records: usize::MAX, bytes: usize::MAX };
    for round in 0u64.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        // The work is what is recorded; readers take what is left of the machine.
        std::thread::park_timeout(Duration::from_micros(300));
        let id = conversation(shard, 1 + round % CONVERSATIONS);
        let Some(before) = reader.head(id)? else { continue };
        let from = before.low.saturating_add(1);
        let records = reader.records(id, from, before.seq, all)?;
        let after = reader.head(id)?.context("a head that was there is gone")?;
        let first = records.first().map_or(before.seq.saturating_add(1), |record| record.seq);
        let last = records.last().map_or(before.seq, |record| record.seq);
        ensure!(
            first <= from.max(after.low.saturating_add(1)) && last == before.seq,
            "shard {shard}: {id}: records {first} to {last} were read where the head said {before:?}, then {after:?}"
        );
        let in_order =
            records.iter().zip(records.iter().skip(1)).all(|(a, b)| a.seq.saturating_add(1) == b.seq);
        ensure!(in_order, "shard {shard}: {id}: records that do not follow each other");
    }
    Ok(())
}

fn work_on(
    store: &Store,
    shard: u16,
    history: &History,
    commits: u64,
    mut marks: File,
) -> anyhow::Result<()> {
    // One write for each mark: it is whole or not there.
    let mut mark = |what: &str, commit: u64| marks.write_all(format!("{what} {shard} {commit}\n").as_bytes());
    let reader = store.reader(shard_id(shard))?;
    let stands = check::commits(&reader, shard)?;
    mark("opened", stands)?;
    let (mut writer, _) = store.shard(shard_id(shard))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut state = Timeline::new(history.clone(), shard).at(stands);
    for _ in 0..commits {
        let batch = history.advance(&mut state);
        mark("sent", state.commits)?;
        runtime.block_on(writer.commit(&batch))?;
        mark("ack", state.commits)?;
    }
    Ok(())
}

/// How the process is started.
#[derive(Clone, Debug)]
pub struct Starter {
    /// This program.
    pub program: PathBuf,
    /// The library that is preloaded.
    pub preload: PathBuf,
}

impl Starter {
    /// This program, and the library where cargo puts it: beside the program.
    ///
    /// # Errors
    /// When it is not there.
    pub fn find(preload: Option<&Path>) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let preload = match preload {
            Some(preload) => preload.to_owned(),
            None => program.with_file_name("libfulmar_faultdisk.so"),
        };
        if !preload.is_file() {
            bail!("{} is not there: build it with `cargo build -p fulmar-faultdisk`", preload.display());
        }
        Ok(Self { program, preload })
    }

    /// The process, below `root` of a disk that is played.
    #[must_use]
    pub fn command(&self, work: &Work, root: &Path) -> Command {
        let mut command = Command::new(&self.program);
        let level = |level: &dyn ValueName| level.value_name();
        command
            .arg("work")
            .arg("--folder")
            .arg(&work.folder)
            .arg("--marks")
            .arg(&work.marks)
            .args(["--history", &work.history])
            .args(["--engine", &level(&work.engine)])
            .args(["--durability", &level(&work.durability)])
            .args(["--commits", &work.commits.to_string()])
            .args(["--runs", &work.runs.to_string()])
            .env("LD_PRELOAD", &self.preload)
            .env("FULMAR_FAULTDISK_ROOT", root)
            .env("FULMAR_FAULTDISK_MARKS", &work.marks);
        command
    }
}

/// The word for a value on a command line.
pub trait ValueName {
    /// The word.
    fn value_name(&self) -> String;
}

impl<T: ValueEnum> ValueName for T {
    fn value_name(&self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What the marks say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// By shard, the last commit that is promised.
    pub acked: Vec<u64>,
    /// By shard, the last commit that was sent.
    pub sent: Vec<u64>,
}

impl Marks {
    /// Takes note of a mark.
    ///
    /// # Errors
    /// When it makes no sense.
    pub fn note(&mut self, line: &str) -> anyhow::Result<()> {
        let mut words = line.split_whitespace();
        let what = words.next().unwrap_or_default();
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
        let (Some(shard), Some(commit)) = (number(), number()) else {
            bail!("a mark without numbers: {line}")
        };
        let shard = usize::try_from(shard)?;
        let raise = |all: &mut Vec<u64>, to: u64| match all.get_mut(shard) {
            Some(at) => {
                *at = to.max(*at);
                Ok(())
            }
            None => bail!("a mark of a shard that is not there: {line}"),
        };
        match what {
            "sent" => raise(&mut self.sent, commit),
            "ack" => raise(&mut self.acked, commit),
            "opened" => {
                raise(&mut self.acked, commit)?;
                raise(&mut self.sent, commit)
            }
            _ => bail!("no such mark: {line}"),
        }
    }
}

//! The work that is recorded, killed or left behind: a process of its own that opens a store and commits to it.
//!
//! What it does is told in marks, lines of one file: `opened SHARD COMMIT` (what stands there after opening is promised from
//! then on), `sent SHARD COMMIT` before a commit, `ack SHARD COMMIT` after it. Where calls are made to fail: `refused SHARD
//! COMMIT`, and `turns SHARD TURNS`, because what is sent then is something else under the same number.

use std::{
    fmt::Display,
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
use fulmar_store::{Durability, EngineKind, Limits, ReadError, Store, StoreOptions};

use crate::{
    chance::Chance,
    check::{self, Bounds, Judge},
    history::{CONVERSATIONS, History, State, Timeline, Turns, conversation, shard_id},
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
    /// Calls fail: commits are tried again, with something else in them, and the store is opened again if need be
    #[arg(long)]
    pub faults: bool,
}

/// How often a commit is tried before the store is opened again.
const REFUSALS_MAX: u32 = 30;

/// How often a store is opened again.
const FAILURES_MAX: u32 = 30;

/// Time after a refusal.
const AFTER_FAILURE: Duration = Duration::from_millis(15);

impl Work {
    /// The disk is full while this file is there.
    #[must_use]
    pub fn full_while(&self) -> PathBuf {
        self.marks.with_file_name("full")
    }
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
        // Never, now and then, always.
        commit_here_within: Duration::from_micros(pick(&[0, 60, 10_000_000])),
        segment_bytes_max: pick(&[40_000, 200_000, 1 << 30]),
        // What a cut leaves is put together in a folder of its own: its index is to be opened as it is.
        trust_copied_index: true,
        // Never, hardly enough for the next commits, as much as a gateway.
        log_ahead_bytes: pick(&[0, 10_000, 256 << 10]),
        ..StoreOptions::default()
    }
}

/// Does the work.
///
/// # Errors
/// When the store does not take it.
pub fn work(work: &Work) -> anyhow::Result<()> {
    let mut history = History::parse(&work.history)?;
    let options = options(work.engine, work.durability, &history);
    let marks =
        File::options().append(true).create(true).open(&work.marks).context("can't open the marks")?;
    // What was refused and not yet replaced, by shard: an opening may find it all the same.
    let mut void = vec![Vec::new(); history.shards.len()];
    let mut runs = 0;
    let mut failed = 0;
    while runs < work.runs {
        let store = match check::open(&work.folder, &options) {
            Ok(store) => store,
            Err(_) if work.faults && failed < FAILURES_MAX => {
                failed += 1;
                if failed == 3 {
                    // Somebody has made room.
                    let _ = std::fs::remove_file(work.full_while());
                }
                std::thread::park_timeout(AFTER_FAILURE);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let done = AtomicBool::new(false);
        let shards = std::thread::scope(|scope| {
            let readers: Vec<_> = (0u16..store.shards())
                .map(|shard| {
                    let (store, done) = (&store, &done);
                    scope.spawn(move || read_along(store, shard, work.faults, done))
                })
                .collect();
            let workers: Vec<_> = (0u16..store.shards())
                .zip(&void)
                .map(|(shard, void)| {
                    let (store, history) = (&store, history.clone());
                    let marks = marks.try_clone();
                    scope.spawn(move || {
                        let at_work =
                            Worker { store, shard, history, void: void.clone(), marks: marks?, work };
                        at_work.run()
                    })
                })
                .collect();
            let worked: Vec<_> = workers.into_iter().map(joined).collect();
            done.store(true, Ordering::Relaxed);
            let read = readers.into_iter().map(joined).collect::<anyhow::Result<Vec<()>>>();
            let worked = worked.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
            read.map(|_| worked)
        })?;
        let mut is_done = true;
        for ((shard, left), void) in (0u16..).zip(shards).zip(&mut void) {
            history = history.with(shard, &left.turns);
            *void = left.void;
            is_done &= left.is_done;
        }
        if is_done {
            runs += 1;
        } else {
            failed += 1;
            ensure!(failed < FAILURES_MAX, "the store does not recover");
        }
        if Chance::of(&[history.seed, u64::from(runs), 78]).percent(50)
            && let Err(error) = store.close()
            && !work.faults
        {
            return Err(error.into());
        }
    }
    Ok(())
}

fn joined<T>(thread: ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    match thread.join() {
        Ok(result) => result,
        Err(_) => bail!("a thread panicked"),
    }
}

/// Reads while others commit and the store tidies up: nothing may be refused, missing, or out of order.
fn read_along(store: &Store, shard: u16, faults: bool, done: &AtomicBool) -> anyhow::Result<()> {
    let reader = store.reader(shard_id(shard))?;
    let all = Limits { records: usize::MAX, bytes: usize::MAX };
    for round in 0u64.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        // The work is what is recorded; readers take what is left of the machine.
        std::thread::park_timeout(Duration::from_micros(300));
        let id = conversation(shard, 1 + round % CONVERSATIONS);
        let look = || {
            let Some(before) = reader.head(id)? else { return Ok(None) };
            let records = reader.records(id, before.low.saturating_add(1), before.seq, all)?;
            Ok(Some((before, records, reader.head(id)?)))
        };
        let (before, records, after) = match look() {
            Ok(Some(looked)) => looked,
            Ok(None) => continue,
            // An engine whose calls fail may refuse; what is damaged is nobody's call.
            Err(ReadError::Engine { .. }) if faults => continue,
            Err(error) => return Err(error.into()),
        };
        let after = after.context("a head that was there is gone")?;
        let from = before.low.saturating_add(1);
        let first = records.first().map_or_else(|| before.seq.saturating_add(1), |record| record.seq);
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

/// Commits on one shard.
struct Worker<'a> {
    store: &'a Store,
    shard: u16,
    history: History,
    void: Vec<Turns>,
    marks: File,
    work: &'a Work,
}

/// What a worker leaves.
struct Left {
    turns: Turns,
    void: Vec<Turns>,
    /// All commits were made.
    is_done: bool,
}

impl Worker<'_> {
    fn mark(&mut self, what: &str, value: impl Display) -> anyhow::Result<()> {
        // One write for each mark: it is whole or not there.
        Ok(self.marks.write_all(format!("{what} {} {value}\n", self.shard).as_bytes())?)
    }

    /// The commit after `commits` was refused, or the process begins: what follows is of a new turn.
    fn turn(&mut self, commits: u64) -> anyhow::Result<()> {
        self.history.turned(self.shard, commits);
        self.mark("turns", self.turns()?.to_text())
    }

    fn turns(&self) -> anyhow::Result<Turns> {
        self.history.shards.get(usize::from(self.shard)).cloned().context("a shard without turns")
    }

    fn left(self, is_done: bool) -> anyhow::Result<Left> {
        Ok(Left { turns: self.turns()?, void: self.void, is_done })
    }

    fn run(mut self) -> anyhow::Result<Left> {
        let reader = self.store.reader(shard_id(self.shard))?;
        let stands = check::commits(&reader, self.shard)?;
        let mut timeline = Timeline::new(self.history.clone(), self.shard);
        let mut state = timeline.at(stands);
        if !self.void.is_empty() {
            // An opening after a refusal: which of the batches is it, if any?
            let void = std::mem::take(&mut self.void);
            let is = |state: &State| Judge::strict().compare_shard(&reader, state).is_ok();
            if !is(&state) {
                let found = void.into_iter().find(|turns| is(&timeline.at_in(stands, turns)));
                let turns = found.context("the store holds what was never sent")?;
                state = timeline.at_in(stands, &turns);
                self.history = self.history.with(self.shard, &turns);
            }
            self.mark("turns", self.turns()?.to_text())?;
            self.mark("opened", stands)?;
            self.turn(stands)?;
        } else {
            self.mark("opened", stands)?;
        }
        let mut writer = match self.store.shard(shard_id(self.shard)) {
            Ok((writer, _)) => writer,
            Err(_) if self.work.faults => return self.left(false),
            Err(error) => return Err(error.into()),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let mut refused = 0;
        while state.commits < stands + self.work.commits {
            let before = self.work.faults.then(|| state.clone());
            let batch = self.history.advance(&mut state);
            self.mark("sent", state.commits)?;
            match (runtime.block_on(writer.commit(&batch)), before) {
                (Ok(_), _) => {
                    self.mark("ack", state.commits)?;
                    self.void.clear();
                    refused = 0;
                }
                (Err(error), None) => return Err(error.into()),
                (Err(_), Some(before)) => {
                    self.mark("refused", state.commits)?;
                    self.void.push(self.turns()?);
                    self.turn(before.commits)?;
                    state = before;
                    refused += 1;
                    if refused == 3 {
                        // Somebody has made room.
                        let _ = std::fs::remove_file(self.work.full_while());
                    }
                    if refused == REFUSALS_MAX {
                        return self.left(false);
                    }
                    std::thread::park_timeout(AFTER_FAILURE);
                }
            }
        }
        self.left(true)
    }
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
            .args(work.faults.then_some("--faults"))
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks {
    /// By shard, the last commit that is promised.
    pub acked: Vec<u64>,
    /// By shard, the last commit that was sent.
    pub sent: Vec<u64>,
    /// What was sent, as it stands now.
    pub history: History,
    /// By shard, under which turns the commit after the last promised one was refused.
    pub void: Vec<Vec<Turns>>,
}

impl Marks {
    /// Shards of which so much is promised, and nothing else was sent.
    #[must_use]
    pub fn new(history: &History, commits: &[u64]) -> Self {
        Self {
            acked: commits.to_vec(),
            sent: commits.to_vec(),
            history: history.clone(),
            void: vec![Vec::new(); commits.len()],
        }
    }

    /// What a store must hold.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        Bounds { acked: self.acked.clone(), sent: self.sent.clone(), void: self.void.clone() }
    }

    /// Takes note of a mark.
    ///
    /// # Errors
    /// When it makes no sense.
    pub fn note(&mut self, line: &str) -> anyhow::Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (what, shard, value) = match words.as_slice() {
            [what, shard, value] => (*what, shard.parse::<usize>()?, *value),
            _ => bail!("a mark is three words: {line}"),
        };
        let unknown = || anyhow::anyhow!("a mark of a shard that is not there: {line}");
        let acked = self.acked.get_mut(shard).with_context(unknown)?;
        let sent = self.sent.get_mut(shard).with_context(unknown)?;
        let void = self.void.get_mut(shard).with_context(unknown)?;
        let turns = self.history.shards.get_mut(shard).with_context(unknown)?;
        match what {
            "sent" => *sent = value.parse()?,
            "ack" => {
                *acked = value.parse()?;
                void.clear();
            }
            "opened" => {
                let stands = value.parse()?;
                ensure!(
                    (*acked..=*sent).contains(&stands),
                    "shard {shard} was opened by the process at work and stood at commit {stands}, \
                     but {acked} was acknowledged and {sent} were sent"
                );
                (*acked, *sent) = (stands, stands);
                void.clear();
            }
            // What was refused may be there all the same; it is not sent again, another batch is.
            "refused" => {
                ensure!(
                    value.parse() == Ok(*acked + 1),
                    "not the commit after the last one was refused: {line}"
                );
                void.push(turns.clone());
            }
            "turns" => *turns = Turns::parse(value)?,
            _ => bail!("no such mark: {line}"),
        }
        Ok(())
    }
}

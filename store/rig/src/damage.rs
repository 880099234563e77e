//! The damage rig.
//!
//! A folder that was closed, or killed, gets one damage in one file: a flipped bit, a lost end, a block of zeros, a block as it
//! was earlier, a block of another place, or the whole file is missing. A process of its own opens it and reads everything:
//! every answer is right, or refused with a report. It may refuse to open. It may not crash, hang, or answer wrongly. `verify` looks at a copy, and must notice whatever opening or reading does.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use fulmar_store::{Problem, Repair};

use crate::{
    chance::Chance,
    check::{self, Bounds, Judge, Wrong},
    disk::{Entry, Image, read_in, write_out},
    history::{History, Timeline, shard_id},
    power::Outcome,
    scratch::{Scratch, finding, say},
    work::{Engine, Level, Marks, Starter, ValueName as _, Work, options},
};

/// Damage comes in blocks of a file system.
const BLOCK: usize = 4_096;

/// No image of a rig takes so long to open and read.
const PATIENCE: Duration = Duration::from_secs(60);

/// Memory a process may ask for: damaged lengths must not be believed.
const MEMORY: u64 = 8 << 30;

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Damage {
    /// Damaged folders to open
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub images: u64,
    /// What everything follows from, as far as threads let it; if not given, another one each time
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Engine of the store
    #[arg(long, value_enum, default_value_t)]
    pub engine: Engine,
    /// Damages of one folder
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub per_folder: u64,
    /// Only files with this in their path are damaged
    #[arg(long, value_name = "PART", default_value = "")]
    pub only: String,
    /// Folders opened at the same time
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub jobs: usize,
    /// Expect commits that were never made; the run must fail
    #[arg(long)]
    pub plant: bool,
    /// Where findings are left
    #[arg(long, value_name = "DIR", default_value = "target/store-rig")]
    pub findings: PathBuf,
    /// The library to preload; if not given, the one beside this program
    #[arg(long, value_name = "FILE")]
    pub preload: Option<PathBuf>,
    /// Say nothing but the result
    #[arg(long)]
    pub quiet: bool,
}

/// What the process is told that opens a damaged folder.
#[derive(Clone, Debug, clap::Args)]
pub struct Look {
    /// The data folder
    #[arg(long)]
    pub folder: PathBuf,
    /// A copy of it, to be verified
    #[arg(long)]
    pub copy: Option<PathBuf>,
    /// What was sent
    #[arg(long)]
    pub history: String,
    /// Engine of the store
    #[arg(long, value_enum, default_value_t)]
    pub engine: Engine,
    /// By shard, how many commits must be there
    #[arg(long, value_delimiter = ',')]
    pub acked: Vec<u64>,
    /// By shard, how many commits may be there
    #[arg(long, value_delimiter = ',')]
    pub sent: Vec<u64>,
}

/// One kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Bit,
    End,
    Zeros,
    Stale,
    Elsewhere,
    Missing,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Bit, Self::End, Self::Zeros, Self::Stale, Self::Elsewhere, Self::Missing];

    fn name(self) -> &'static str {
        match self {
            Self::Bit => "a flipped bit",
            Self::End => "a lost end",
            Self::Zeros => "a block of zeros",
            Self::Stale => "an earlier block",
            Self::Elsewhere => "a block of another place",
            Self::Missing => "a missing file",
        }
    }
}

/// What became of a damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    AtOpen,
    WhenRead,
    /// By an opening after further commits.
    Later,
    /// By `verify`, while all answers were right.
    ByVerify,
    Nowhere,
}

/// A folder to be damaged.
struct Original {
    image: Image,
    /// The same files, earlier.
    earlier: Image,
    history: History,
    bounds: Bounds,
    closed: bool,
}

/// Damages by kind of file: found at open, found when read, found later, found by `verify`
/// only, found nowhere (all answers right), wrong.
type Table = BTreeMap<(String, Kind), [u64; 6]>;

/// Runs the rig.
///
/// # Errors
/// When it could not be run; wrong answers are in the outcome.
pub fn run(ask: &Damage) -> anyhow::Result<Outcome> {
    let seed = ask.seed.unwrap_or_else(crate::scratch::new_seed);
    let rig = Rig {
        ask,
        seed,
        starter: Starter::find(ask.preload.as_deref())?,
        scratch: Scratch::new()?,
        failed: AtomicU64::new(0),
        table: Mutex::default(),
    };
    say!(ask, "damage: {} folders, engine {}, seed {seed}", ask.images, ask.engine.value_name());
    let began = Instant::now();
    let mut done = 0;
    let mut number = 0;
    while done < ask.images {
        let images = ask.per_folder.min(ask.images - done);
        let original = rig.make(number)?;
        rig.damage(number, &original, images)?;
        done += images;
        number += 1;
        say!(
            ask,
            "{done} of {} folders, {} wrong, {} s",
            ask.images,
            rig.failed.load(Ordering::Relaxed),
            began.elapsed().as_secs()
        );
    }
    let table = rig.table.into_inner().unwrap_or_else(PoisonError::into_inner);
    say!(
        ask,
        "    {:<22} {:<26} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6}",
        "file",
        "damage",
        "at open",
        "by read",
        "later",
        "verify",
        "unseen",
        "wrong"
    );
    let mut sum = [0u64; 6];
    for ((file, kind), counts) in &table {
        let [open, read, later, verify, nowhere, wrong] = counts;
        say!(
            ask,
            "    {file:<22} {:<26} {open:>8} {read:>8} {later:>8} {verify:>8} {nowhere:>8} {wrong:>6}",
            kind.name()
        );
        for (all, one) in sum.iter_mut().zip(counts) {
            *all += one;
        }
    }
    let [open, read, later, verify, nowhere, wrong] = sum;
    say!(
        ask,
        "damage, seed {seed}: found at open {open}, when read {read}, later {later}, by verify {verify}, nowhere (all answers right) {nowhere}, wrong {wrong}; {:.1} s",
        began.elapsed().as_secs_f64()
    );
    Ok(Outcome { passed: open + read + later + verify + nowhere, failed: wrong })
}

struct Rig<'a> {
    ask: &'a Damage,
    seed: u64,
    starter: Starter,
    scratch: Scratch,
    failed: AtomicU64,
    table: Mutex<Table>,
}

impl Rig<'_> {
    /// Makes a folder, and keeps what it was like earlier.
    fn make(&self, number: u64) -> anyhow::Result<Original> {
        let mut chance = Chance::of(&[self.seed, number, 4]);
        let place = self.scratch.path().join("original");
        if place.exists() {
            fs::remove_dir_all(&place)?;
        }
        let root = place.join("root");
        fs::create_dir_all(&root)?;
        let shards = if chance.percent(25) { 2 } else { 1 };
        let history = History::new(chance.draw() >> 16, shards);
        let mut work = Work {
            folder: root.join("data"),
            marks: place.join("marks"),
            history: history.to_text(),
            engine: self.ask.engine,
            durability: Level::Power,
            commits: 10 + chance.below(40),
            runs: 1,
            faults: false,
        };
        let run = |work: &Work, rules: Option<String>| -> anyhow::Result<()> {
            let mut command = self.starter.command(work, &root);
            let is_killed = rules.is_some();
            if let Some(rules) = rules {
                command.env("FULMAR_FAULTDISK_RULES", rules);
            }
            let output = command.output().context("can't start the process that makes a folder")?;
            ensure!(
                output.status.success() || is_killed,
                "the process that makes a folder ended with {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
            Ok(())
        };
        run(&work, None)?;
        let earlier = read_in(&root)?;
        work.commits = 10 + chance.below(60);
        work.runs = 1 + u32::try_from(chance.below(3)).unwrap_or(0);
        let closed = chance.percent(50);
        let kill = format!("kill op=write path=tip nth={} when=after", 5 + chance.below(work.commits));
        run(&work, (!closed).then_some(kill))?;
        if closed {
            // One more opening that is sure to be closed.
            let options = options(self.ask.engine, Level::Power, &history);
            let store = check::open(&work.folder, &options)?;
            store.close()?;
        }
        let mut marks = Marks::new(&history, &vec![0; usize::from(shards)]);
        for line in fs::read_to_string(&work.marks)?.lines() {
            marks.note(line)?;
        }
        let image = read_in(&root)?;
        let copy = place.join("intact");
        fs::create_dir(&copy)?;
        write_out(&image, &copy)?;
        let report = fulmar_store::verify(copy.join("data"), &mut |_| ())?;
        ensure!(
            report.problems.iter().all(|problem| problem.repair == Repair::Start),
            "verify finds fault with an intact folder: {:?}",
            report.problems
        );
        Ok(Original { image, earlier, history, bounds: marks.bounds(), closed })
    }

    fn damage(&self, number: u64, original: &Original, images: u64) -> anyhow::Result<()> {
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.ask.jobs.max(1))
                .map(|job| {
                    let next = &next;
                    scope.spawn(move || -> anyhow::Result<()> {
                        loop {
                            let image = next.fetch_add(1, Ordering::Relaxed);
                            if image >= images {
                                return Ok(());
                            }
                            self.damage_one(number, image, job, original)?;
                        }
                    })
                })
                .collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("a thread panicked"),
            })
        })
    }

    fn damage_one(&self, number: u64, image: u64, job: usize, original: &Original) -> anyhow::Result<()> {
        let mut chance = Chance::of(&[self.seed, number, image, 5]);
        let (damaged, path, kind, what) = spoil(original, &self.ask.only, &mut chance)?;
        let folder = self.scratch.path().join(format!("damaged-{job}"));
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        for copy in ["opened", "verified"] {
            fs::create_dir(folder.join(copy))?;
            write_out(&damaged, &folder.join(copy))?;
        }
        let mut bounds = original.bounds.clone();
        if self.ask.plant
            && let (Some(acked), Some(sent)) = (bounds.acked.first_mut(), bounds.sent.first_mut())
        {
            // Two: the one after the last acknowledged may well be there.
            *acked += 2;
            *sent += 2;
        }
        let look = Look {
            folder: folder.join("opened/data"),
            copy: Some(folder.join("verified/data")),
            history: original.history.to_text(),
            engine: self.ask.engine,
            acked: bounds.acked,
            sent: bounds.sent,
        };
        let mut found = self.look(&look)?;
        // A closed folder has no file of these kinds that nobody needs.
        let needed = [".seg", "/manifest", "/FORMAT"].iter().any(|end| path.ends_with(end));
        if original.closed && needed && found == Ok(Found::Nowhere) {
            found = Err("nobody noticed it, not even verify".to_owned());
        }
        let column = match &found {
            Ok(Found::AtOpen) => 0,
            Ok(Found::WhenRead) => 1,
            Ok(Found::Later) => 2,
            Ok(Found::ByVerify) => 3,
            Ok(Found::Nowhere) => 4,
            Err(_) => 5,
        };
        {
            let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(count) = table.entry((kind_of_file(&path), kind)).or_default().get_mut(column) {
                *count += 1;
            }
        }
        if let Err(wrong) = found {
            self.failed.fetch_add(1, Ordering::Relaxed);
            let state = if original.closed { "closed" } else { "killed" };
            say!(
                self.ask,
                "FAILED: seed {}, folder {number}, image {image} ({state}): {path}: {what}: {wrong}",
                self.seed
            );
            let name = format!("damage-{}-{number}-{image}", self.seed);
            let kept = finding(&self.ask.findings, &name, |place| {
                let text = format!(
                    "engine = {}\nstate = {state}\nfile = {path}\ndamage = {what}\nhistory = {}\nwrong = {wrong}\n",
                    self.ask.engine.value_name(),
                    look.history
                );
                for (name, image) in [("damaged", &damaged), ("intact", &original.image)] {
                    fs::create_dir(place.join(name))?;
                    write_out(image, &place.join(name))?;
                }
                fs::write(place.join("case"), text)?;
                Ok(())
            });
            if let Some(place) = kept {
                let list = |all: &[u64]| all.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
                say!(
                    self.ask,
                    "    again, with a copy of {}/damaged/data as DIR: store-rig look --folder DIR --history {} --acked {} --sent {} --engine {}",
                    place.display(),
                    look.history,
                    list(&look.acked),
                    list(&look.sent),
                    self.ask.engine.value_name(),
                );
            }
        }
        Ok(())
    }

    /// Has a process of its own look at a damaged folder. The inner error is what must not happen.
    fn look(&self, look: &Look) -> anyhow::Result<Result<Found, String>> {
        let list = |all: &[u64]| all.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let mut child = Command::new(&self.starter.program)
            .arg("look")
            .arg("--folder")
            .arg(&look.folder)
            .args(look.copy.iter().flat_map(|copy| ["--copy".as_ref(), copy.as_os_str()]))
            .args(["--history", &look.history])
            .args(["--engine", &look.engine.value_name()])
            .args(["--acked", &list(&look.acked), "--sent", &list(&look.sent)])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("can't start the process that looks at a damaged folder")?;
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if began.elapsed() > PATIENCE {
                child.kill()?;
                child.wait()?;
                return Ok(Err(format!("it did not come to an end within {} s", PATIENCE.as_secs())));
            }
            std::thread::park_timeout(Duration::from_micros(500));
        };
        let mut said = String::new();
        if let Some(mut out) = child.stdout.take() {
            out.read_to_string(&mut said)?;
        }
        Ok(match said.trim().split_once(' ').unwrap_or_else(|| (said.trim(), "")) {
            ("at-open", _) if status.success() => Ok(Found::AtOpen),
            ("when-read", _) if status.success() => Ok(Found::WhenRead),
            ("later", _) if status.success() => Ok(Found::Later),
            ("by-verify", _) if status.success() => Ok(Found::ByVerify),
            ("nowhere", _) if status.success() => Ok(Found::Nowhere),
            ("wrong", what) => Err(what.to_owned()),
            _ => Err(format!("the process that looked at it ended with {status}")),
        })
    }
}

/// Files of one kind are one line of the table.
fn kind_of_file(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    let in_engine = ["sled", "fjall", "index"].iter().find(|engine| path.contains(&format!("/{engine}/")));
    match (in_engine, name.rsplit_once('.')) {
        (Some(engine), _) => {
            let stem: String = name.chars().take_while(char::is_ascii_alphabetic).collect();
            format!("{engine}/{}", if stem.len() == name.len() { &stem } else { "*" })
        }
        (None, Some((_, end))) => format!("*.{end}"),
        (None, None) => name.to_owned(),
    }
}

/// Damages one file: the image, the file, the kind, and a description.
fn spoil(
    original: &Original,
    only: &str,
    chance: &mut Chance,
) -> anyhow::Result<(Image, String, Kind, String)> {
    let files: Vec<(&String, &Arc<Vec<u8>>)> = original
        .image
        .iter()
        .filter_map(|(path, entry)| match entry {
            Entry::File(bytes) if path.contains(only) => Some((path, bytes)),
            _ => None,
        })
        .collect();
    ensure!(!files.is_empty(), "there is no file with {only:?} in its path");
    // Some damages change nothing (a block of zeros that was zero before): then another one is drawn.
    for _ in 0..1_000 {
        // Half of the damages fall on any file, half of them on any byte.
        let picked = if chance.percent(50) {
            chance.pick(&files)
        } else {
            let mut at = chance.below(files.iter().map(|(_, bytes)| bytes.len() as u64).sum());
            files.iter().find(|(_, bytes)| {
                let here = at < bytes.len() as u64;
                at = at.saturating_sub(bytes.len() as u64);
                here
            })
        };
        let Some((path, bytes)) = picked.copied() else { break };
        let Some(kind) = chance.pick(&Kind::ALL).copied() else { break };
        let earlier = match original.earlier.get(path) {
            Some(Entry::File(earlier)) => Some(earlier.as_slice()),
            _ => None,
        };
        let mut image = original.image.clone();
        if kind == Kind::Missing {
            image.remove(path);
            return Ok((image, path.clone(), kind, kind.name().to_owned()));
        }
        let mut spoiled = bytes.to_vec();
        let Some(at) = spoil_bytes(&mut spoiled, kind, earlier, chance) else { continue };
        if spoiled == **bytes {
            continue;
        }
        let what = format!("{} at byte {at} of {}", kind.name(), bytes.len());
        image.insert(path.clone(), Entry::File(Arc::new(spoiled)));
        return Ok((image, path.clone(), kind, what));
    }
    bail!("no file could be damaged")
}

/// Damages bytes; where. `None` if they can't be damaged in this way.
fn spoil_bytes(
    bytes: &mut Vec<u8>,
    kind: Kind,
    earlier: Option<&[u8]>,
    chance: &mut Chance,
) -> Option<usize> {
    // Where something lies: databases reserve more than they use.
    let used = bytes.iter().rposition(|byte| *byte != 0)? + 1;
    let block = chance.index(used.div_ceil(BLOCK)) * BLOCK;
    let end = bytes.len().min(block + BLOCK);
    match kind {
        Kind::Bit => {
            let at = chance.index(used);
            *bytes.get_mut(at)? ^= 1 << chance.below(8);
            Some(at)
        }
        Kind::End => {
            let at =
                if chance.percent(50) { chance.index(used) } else { used - 1 - chance.index(used.min(200)) };
            bytes.truncate(at);
            Some(at)
        }
        Kind::Zeros => {
            bytes.get_mut(block..end)?.fill(0);
            Some(block)
        }
        Kind::Stale => {
            let earlier = earlier?.get(block..end)?.to_vec();
            bytes.get_mut(block..end)?.copy_from_slice(&earlier);
            Some(block)
        }
        Kind::Elsewhere => {
            let from = chance.index(used.div_ceil(BLOCK)) * BLOCK;
            let other = bytes.get(from..from + (end - block))?.to_vec();
            bytes.get_mut(block..end)?.copy_from_slice(&other);
            Some(block)
        }
        Kind::Missing => None,
    }
}

/// Opens a damaged folder and reads everything, and verifies a copy of it; the line says what became of the damage.
///
/// # Errors
/// When the history makes no sense.
pub fn look(look: &Look) -> anyhow::Result<String> {
    let limit = rustix::process::Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) };
    rustix::process::setrlimit(rustix::process::Resource::As, limit)?;
    let proven = look.copy.as_ref().map(|copy| match fulmar_store::verify(copy, &mut |_| ()) {
        // What the next start makes right by itself stands in reports of intact folders as well: it counts for less.
        Ok(report) => {
            let harmless = |problem: &&Problem| problem.repair == Repair::Start;
            let worst =
                report.problems.iter().find(|problem| !harmless(problem)).or_else(|| report.problems.first());
            worst.map(|problem| {
                (problem.repair != Repair::Start, format!("{}: {}", problem.file, problem.what))
            })
        }
        Err(refused) => Some((true, refused.to_string())),
    });
    let line = look_inside(look)?;
    Ok(match (proven, line.split_once(' ').map(|(first, _)| first)) {
        // What nobody else noticed.
        (Some(Some((true, problem))), None) if line == "nowhere" => format!("by-verify {problem}"),
        // What is noticed by opening or reading can't be news to it.
        (Some(None), Some("at-open" | "when-read")) => {
            format!("wrong verify found nothing, but the folder is {line}")
        }
        _ => line,
    })
}

fn look_inside(look: &Look) -> anyhow::Result<String> {
    let history = History::parse(&look.history)?;
    let options = options(look.engine, Level::Power, &history);
    let mut timelines: Vec<Timeline> =
        (0u16..).zip(&history.shards).map(|(shard, _)| Timeline::new(history.clone(), shard)).collect();
    let bounds = Bounds { acked: look.acked.clone(), sent: look.sent.clone(), void: Vec::new() };
    let store = match check::open(&look.folder, &options) {
        Ok(store) => store,
        Err(refused) => return Ok(format!("at-open {refused}")),
    };
    let mut judge = Judge::lenient();
    let stands = match judge.compare(&store, &mut timelines, &bounds) {
        Ok(stands) => stands,
        Err(wrong) => return Ok(told_wrong(&wrong)),
    };
    if let Some(first) = judge.refusals().first() {
        return Ok(format!("when-read {first}"));
    }
    // Nobody has noticed anything: it is worked on further. That may bring the damage out, but not make it a wrong answer.
    let next = check::crashed(history.seed, &stands);
    let states = match check::commit_more(&store, &next, &stands) {
        Ok(states) => states,
        Err(refused) => return Ok(format!("later {refused:#}")),
    };
    let closed = store.close();
    drop(store);
    if let Err(refused) = closed {
        return Ok(format!("later {refused}"));
    }
    let store = match check::open(&look.folder, &options) {
        Ok(store) => store,
        Err(refused) => return Ok(format!("later {refused}")),
    };
    for (shard, state) in (0u16..).zip(&states) {
        let reader = store.reader(shard_id(shard))?;
        if let Err(wrong) = judge.compare_shard(&reader, state) {
            return Ok(told_wrong(&wrong));
        }
    }
    Ok(match judge.refusals().first() {
        Some(first) => format!("later {first}"),
        None => "nowhere".to_owned(),
    })
}

fn told_wrong(wrong: &Wrong) -> String {
    let (Wrong::Different(what) | Wrong::Refused(what) | Wrong::Unreadable(what)) = wrong;
    format!("wrong {}", what.replace('\n', " "))
}

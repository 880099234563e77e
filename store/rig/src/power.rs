//! The power-cut rig.
//!
//! One process works on a store while every change of its files is recorded. Then the power goes, again and again: at each sync
//! boundary and at random points, an image is built of what the disk may hold ([`crate::disk`] says what is assumed), opened
//! with the real store and compared with what had been acknowledged by then. Some images are worked on further, so that power
//! also goes in the middle of a recovery.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;

use crate::{
    chance::Chance,
    check::{self, Bounds, Standing},
    disk::{Disk, Entry, Image, Names, read_in, write_out},
    history::{History, Timeline},
    recording::{self, Event},
    scratch::{Scratch, finding, say},
    work::{Engine, Level, Marks, Starter, ValueName as _, Work, options},
};

/// Name of the data folder below the root that is recorded.
const DATA: &str = "data";

/// A fault that is planted to see that the rig finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Plant {
    /// Syncs that do nothing
    LyingSync,
    /// Files are synced, folders are not
    NoFolderSync,
    /// More commits are expected than were acknowledged
    LostCommit,
}

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct PowerCut {
    /// Images to build and open
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    pub images: u64,
    /// What everything follows from, as far as threads let it; if not given, another one each time
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Engine of the store
    #[arg(long, value_enum, default_value_t)]
    pub engine: Engine,
    /// Level the recorded store is opened at; only `power` promises anything
    #[arg(long, value_enum, default_value_t)]
    pub durability: Level,
    /// Images of one recording
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub per_recording: u64,
    /// Changes of names reach the disk in any order, not in the order of a journal
    #[arg(long)]
    pub any_order: bool,
    /// Of a hundred recordings, so many in which writes, syncs and renames fail or the disk is full at times
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub faults: u64,
    /// Files that lose nothing: those with one of these in their path (to look for what else is wrong)
    #[arg(long, value_name = "PART")]
    pub spare: Vec<String>,
    /// Images opened at the same time
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub jobs: usize,
    /// A fault to plant; the run must fail
    #[arg(long, value_enum)]
    pub plant: Option<Plant>,
    /// Build one image again: a finding's folder, printed with the failure
    #[arg(long, value_name = "FINDING")]
    pub replay: Option<PathBuf>,
    /// With --replay: where the image is written to, before it is opened
    #[arg(long, value_name = "DIR", requires = "replay")]
    pub keep: Option<PathBuf>,
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

/// How it went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Images that held.
    pub passed: u64,
    /// Images that did not.
    pub failed: u64,
}

/// One recording, and all it takes to judge an image of it.
#[derive(Debug)]
struct Recorded {
    number: u64,
    history: History,
    initial: Image,
    /// Bounds before the first event.
    before: Bounds,
    events: Vec<Event>,
    path: PathBuf,
}

/// One image to be opened.
#[derive(Debug)]
struct Case {
    image: Image,
    /// What was sent until then.
    history: History,
    bounds: Bounds,
    /// Events that were played.
    cut: usize,
    seed: u64,
    close: bool,
}

/// Runs the rig.
///
/// # Errors
/// When it could not be run; images that did not hold are in the outcome.
pub fn run(ask: &PowerCut) -> anyhow::Result<Outcome> {
    if let Some(finding) = &ask.replay {
        return replay(ask, finding);
    }
    let seed = ask.seed.unwrap_or_else(crate::scratch::new_seed);
    let rig = Rig {
        ask,
        seed,
        names: if ask.any_order { Names::AnyOrder } else { Names::InOrder },
        starter: Starter::find(ask.preload.as_deref())?,
        scratch: Scratch::new()?,
        passed: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        boundaries: AtomicU64::new(0),
    };
    say!(
        ask,
        "power cuts: {} images, engine {}, seed {seed}, in {}",
        ask.images,
        ask.engine.value_name(),
        rig.scratch.path().display()
    );
    let start = Instant::now();
    let mut left = ask.images;
    let mut chain: Option<Chain> = None;
    let mut number = 0;
    let mut events = 0;
    let mut refused = 0;
    while left > 0 {
        let recorded = rig.record(number, chain.take())?;
        events += recorded.events.len();
        refused += recorded.events.iter().filter(|event| is_mark(event, b"refused")).count();
        let images = left.min(ask.per_recording);
        chain = rig.cut(&recorded, images)?;
        left -= images;
        number += 1;
        say!(
            ask,
            "{} of {} images, {} failed, {number} recordings, {} s",
            ask.images - left,
            ask.images,
            rig.failed.load(Ordering::Relaxed),
            start.elapsed().as_secs()
        );
    }
    let outcome =
        Outcome { passed: rig.passed.load(Ordering::Relaxed), failed: rig.failed.load(Ordering::Relaxed) };
    say!(
        ask,
        "power cuts, seed {seed}: {} of {} images held; {} recordings, {events} events, {refused} commits refused, {} sync boundaries cut, {:.1} s",
        outcome.passed,
        ask.images,
        number,
        rig.boundaries.load(Ordering::Relaxed),
        start.elapsed().as_secs_f64()
    );
    Ok(outcome)
}

/// Where the next recording goes on from.
#[derive(Debug)]
struct Chain {
    image: Image,
    history: History,
    before: Bounds,
    depth: u64,
}

struct Rig<'a> {
    ask: &'a PowerCut,
    seed: u64,
    names: Names,
    starter: Starter,
    scratch: Scratch,
    passed: AtomicU64,
    failed: AtomicU64,
    boundaries: AtomicU64,
}

impl Rig<'_> {
    fn record(&self, number: u64, chain: Option<Chain>) -> anyhow::Result<Recorded> {
        let mut chance = Chance::of(&[self.seed, number, 1]);
        let (initial, history, before) = match chain {
            Some(chain) => (chain.image, chain.history, chain.before),
            None => {
                let shards = if chance.percent(25) { 2 } else { 1 };
                let none = vec![0; usize::from(shards)];
                let void = vec![Vec::new(); usize::from(shards)];
                (
                    Image::new(),
                    History::new(chance.draw() >> 16, shards),
                    Bounds { acked: none.clone(), sent: none, void },
                )
            }
        };
        let place = self.scratch.path().join(format!("recording-{number}"));
        let root = place.join("root");
        fs::create_dir_all(&root)?;
        write_out(&initial, &root)?;
        let path = place.join("recording");
        let work = Work {
            folder: root.join(DATA),
            marks: place.join("marks"),
            history: history.to_text(),
            engine: self.ask.engine,
            durability: self.ask.durability,
            commits: 10 + chance.below(70),
            runs: 1 + u32::try_from(chance.below(3)).unwrap_or(0),
            faults: chance.percent(self.ask.faults) && self.ask.plant.is_none(),
        };
        let mut command = self.starter.command(&work, &root);
        command.env("FULMAR_FAULTDISK_RECORD", &path);
        if self.ask.plant == Some(Plant::LyingSync) {
            command.env("FULMAR_FAULTDISK_RULES", "skip op=sync keep=on");
        }
        let rules = if work.faults { faults(&work, &mut chance) } else { String::new() };
        if work.faults {
            fs::write(work.full_while(), b"")?;
            command.env("FULMAR_FAULTDISK_RULES", &rules);
        }
        let output = command.output().context("can't start the process that is recorded")?;
        ensure!(
            output.status.success(),
            "the process that is recorded (rules {rules:?}, work {work:?}) ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let mut events = recording::read(&path)?;
        spare(&mut events, &self.ask.spare);
        ensure!(!events.is_empty(), "nothing was recorded: is {} preloaded?", self.starter.preload.display());
        if self.ask.plant == Some(Plant::NoFolderSync) {
            without_folder_syncs(&mut events);
        }
        let recorded = Recorded { number, history, initial, before, events, path };
        recorded.prove_complete(&root)?;
        fs::remove_dir_all(&root)?;
        Ok(recorded)
    }

    /// Cuts a recording `images` times. Gives where another recording may go on from.
    fn cut(&self, recorded: &Recorded, images: u64) -> anyhow::Result<Option<Chain>> {
        let mut chance = Chance::of(&[self.seed, recorded.number, 2]);
        let cuts = self.choose_cuts(recorded, images, &mut chance);
        let mut chain = None;
        let chain_at = chance.percent(60).then(|| cuts.len() * 2 / 3 + chance.index(cuts.len() / 3 + 1));
        let found = Mutex::new(None);
        let (sender, cases) = sync_channel::<(usize, Case)>(self.ask.jobs.max(1));
        let cases = Mutex::new(cases);
        std::thread::scope(|scope| {
            // Dropped at the end of this, however it ends: then the threads are done.
            let sender = sender;
            let (cases, found) = (&cases, &found);
            for job in 0..self.ask.jobs.max(1) {
                scope.spawn(move || self.look_at(recorded, cases, job, chain_at, found));
            }
            let mut disk = Disk::new(&recorded.initial)?;
            let mut marks = recorded.marks();
            let mut events = recorded.events.iter();
            let mut played = 0;
            for (at, (cut, seed)) in cuts.iter().enumerate() {
                for event in events.by_ref().take(cut - played) {
                    disk.play(event)?;
                    note_marks(&mut marks, event)?;
                }
                played = *cut;
                let mut chance = Chance::of(&[*seed]);
                let close = chance.percent(50);
                let image = disk.after_power_cut(self.names, &mut chance);
                let mut bounds = marks.bounds();
                if self.ask.plant == Some(Plant::LostCommit)
                    && let Some(acked) = bounds.acked.first_mut()
                {
                    *acked += 2;
                }
                let history = marks.history.clone();
                let case = Case { image, history, bounds, cut: *cut, seed: *seed, close };
                if sender.send((at, case)).is_err() {
                    bail!("all threads that open images are gone");
                }
            }
            Ok(())
        })?;
        if let Some((image, stands, bounds)) = found.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let bounds: Bounds = bounds;
            chain = Some(Chain {
                image,
                history: check::crashed(recorded.history.seed, &stands),
                before: Bounds {
                    acked: bounds.acked,
                    sent: check::commits_of(&stands),
                    void: vec![Vec::new(); stands.len()],
                },
                depth: 1,
            });
        }
        // A store that was cut again and again is made new at times.
        Ok(chain.filter(|chain: &Chain| chain.depth > 0 && !chance.percent(25)))
    }

    /// Positions (events played) and seeds, in order of positions: half of them at sync boundaries.
    fn choose_cuts(&self, recorded: &Recorded, images: u64, chance: &mut Chance) -> Vec<(usize, u64)> {
        let mut boundaries: Vec<usize> = Vec::new();
        for (at, event) in recorded.events.iter().enumerate() {
            match event {
                Event::SyncBegin { .. } => boundaries.push(at),
                Event::SyncEnd { .. } => boundaries.extend([at, at + 1]),
                event if is_mark(event, b"ack") => boundaries.push(at + 1),
                _ => {}
            }
        }
        boundaries.dedup();
        let wanted = boundaries.len().min(usize::try_from(images.div_ceil(2)).unwrap_or(usize::MAX));
        let mut cuts = Vec::new();
        for _ in 0..wanted {
            let at = chance.index(boundaries.len());
            cuts.push(boundaries.swap_remove(at));
        }
        self.boundaries.fetch_add(wanted as u64, Ordering::Relaxed);
        while (cuts.len() as u64) < images {
            cuts.push(chance.index(recorded.events.len() + 1));
        }
        cuts.sort_unstable();
        cuts.into_iter().map(|cut| (cut, chance.draw())).collect()
    }

    fn look_at(
        &self,
        recorded: &Recorded,
        cases: &Mutex<Receiver<(usize, Case)>>,
        job: usize,
        chain_at: Option<usize>,
        found: &Mutex<Option<(Image, Vec<Standing>, Bounds)>>,
    ) {
        let folder = self.scratch.path().join(format!("image-{job}"));
        let mut timelines = timelines(&recorded.history);
        loop {
            let next = cases.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((at, case)) = next else { return };
            let result = open_image(self.ask.engine, &mut timelines, &case, &folder);
            match result {
                Ok(stands) => {
                    self.passed.fetch_add(1, Ordering::Relaxed);
                    if chain_at == Some(at) {
                        *found.lock().unwrap_or_else(PoisonError::into_inner) =
                            Some((case.image, stands, case.bounds));
                    }
                }
                Err(error) => {
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    self.report(recorded, &case, &error);
                }
            }
        }
    }

    fn report(&self, recorded: &Recorded, case: &Case, error: &anyhow::Error) {
        let name = format!("power-cut-{}-{}-{}-{:x}", self.seed, recorded.number, case.cut, case.seed);
        let text = format!(
            "engine = {}\nhistory = {}\nbefore acked = {}\nbefore sent = {}\ncut = {}\nseed = {}\nnames = {}\nspare = {}\nclose = {}\nerror = {error:#}\n",
            self.ask.engine.value_name(),
            recorded.history.to_text(),
            list(&recorded.before.acked),
            list(&recorded.before.sent),
            case.cut,
            case.seed,
            if self.names == Names::InOrder { "in-order" } else { "any-order" },
            self.ask.spare.join(" "),
            case.close,
        );
        let kept = finding(&self.ask.findings, &name, |folder| {
            fs::copy(&recorded.path, folder.join("recording"))?;
            let initial = folder.join("initial");
            fs::create_dir(&initial)?;
            write_out(&recorded.initial, &initial)?;
            fs::write(folder.join("case"), &text)?;
            Ok(())
        });
        say!(
            self.ask,
            "FAILED: seed {}, recording {}, cut after event {} of {}: {error:#}",
            self.seed,
            recorded.number,
            case.cut,
            recorded.events.len()
        );
        match kept {
            Some(folder) => {
                say!(
                    self.ask,
                    "    again: store-rig power-cut --replay {0} --keep {0}/image",
                    folder.display()
                );
            }
            None => {
                say!(self.ask, "    (not kept: there are enough findings in {})", self.ask.findings.display())
            }
        }
    }
}

/// The marks before the first event.
fn marks_from(history: &History, before: &Bounds) -> Marks {
    let mut marks = Marks::new(history, &before.acked);
    marks.sent.clone_from(&before.sent);
    marks
}

impl Recorded {
    fn marks(&self) -> Marks {
        marks_from(&self.history, &self.before)
    }

    /// A recording from which the folder does not come out as it is has missed something.
    fn prove_complete(&self, root: &Path) -> anyhow::Result<()> {
        let mut disk = Disk::new(&self.initial)?;
        for event in &self.events {
            disk.play(event)?;
        }
        let (played, real) = (disk.now(), read_in(root)?);
        if played == real {
            return Ok(());
        }
        let names = |image: &Image| image.keys().cloned().collect::<Vec<_>>();
        ensure!(
            names(&played) == names(&real),
            "the recording has missed something: {:?} came out of it instead of {:?}",
            names(&played),
            names(&real)
        );
        let other = real.iter().find(|(path, entry)| played.get(*path) != Some(*entry)).map(|(path, _)| path);
        bail!("the recording has missed something: {other:?} came out of it with other bytes")
    }
}

fn timelines(history: &History) -> Vec<Timeline> {
    (0u16..).zip(&history.shards).map(|(shard, _)| Timeline::new(history.clone(), shard)).collect()
}

fn is_mark(event: &Event, what: &[u8]) -> bool {
    matches!(event, Event::Mark { bytes } if bytes.starts_with(what))
}

fn note_marks(marks: &mut Marks, event: &Event) -> anyhow::Result<()> {
    if let Event::Mark { bytes } = event {
        for line in String::from_utf8_lossy(bytes).lines() {
            marks.note(line)?;
        }
    }
    Ok(())
}

fn open_image(
    engine: Engine,
    timelines: &mut [Timeline],
    case: &Case,
    folder: &Path,
) -> anyhow::Result<Vec<Standing>> {
    for timeline in &mut *timelines {
        timeline.follow(&case.history);
    }
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    write_out(&case.image, folder)?;
    let options = options(engine, Level::Power, &case.history);
    let data = folder.join(DATA);
    let whole = || check::whole(&data, &options, case.history.seed, timelines, &case.bounds, case.close);
    // A panic of the store is a finding, not the end of the rig.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(whole)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        bail!("panicked: {}", text.unwrap_or_default())
    })
}

/// Makes every write to some files durable at once.
fn spare(events: &mut [Event], parts: &[String]) {
    for event in events {
        if let Event::Open { path, write_through, .. } = event {
            let path = String::from_utf8_lossy(path);
            *write_through |= parts.iter().any(|part| path.contains(part.as_str()));
        }
    }
}

/// One to three calls that fail, or a disk that is full for a while.
fn faults(work: &Work, chance: &mut Chance) -> String {
    const WHERE: &[(&str, &str)] = &[
        ("sync", ".log"),
        ("sync", ".log"),
        ("write", ".log"),
        ("create", ".log"),
        ("sync", ".seg"),
        ("write", ".seg"),
        ("create", ".seg"),
        ("sync", "manifest"),
        ("rename", "manifest"),
        ("sync", "shard-00"),
        ("write", "/index/"),
        ("sync", "/index/"),
        ("write", "tip"),
        ("unlink", "shard-00"),
    ];
    let mut rules = Vec::new();
    for _ in 0..1 + chance.below(3) {
        let (operation, path) = chance.pick(WHERE).copied().unwrap_or(("sync", ".log"));
        let errno = if chance.percent(50) { "EIO" } else { "ENOSPC" };
        rules.push(format!("fail op={operation} path={path} nth={} errno={errno}", 1 + chance.below(40)));
    }
    if chance.percent(30) {
        let bytes = 20_000 + chance.below(400_000);
        rules.push(format!("full bytes={bytes} until={}", work.full_while().display()));
    }
    rules.join(";")
}

/// Takes the syncs of folders out.
fn without_folder_syncs(events: &mut Vec<Event>) {
    let mut folders = std::collections::BTreeSet::new();
    let mut files = std::collections::BTreeSet::new();
    let mut syncs = std::collections::BTreeSet::new();
    for event in events.iter() {
        match event {
            Event::Write { handle, .. } | Event::Length { handle, .. } => {
                files.insert(*handle);
            }
            Event::Mkdir { path } => {
                folders.insert(path.clone());
            }
            _ => {}
        }
    }
    let mut of_folders = std::collections::BTreeSet::new();
    for event in events.iter() {
        match event {
            Event::Open { handle, path, .. } if path.is_empty() || folders.contains(path) => {
                of_folders.insert(*handle);
            }
            Event::SyncBegin { handle, sync, .. }
                if of_folders.contains(handle) && !files.contains(handle) =>
            {
                syncs.insert(*sync);
            }
            _ => {}
        }
    }
    events.retain(|event| match event {
        Event::SyncBegin { sync, .. } | Event::SyncEnd { sync } => !syncs.contains(sync),
        _ => true,
    });
}

fn list(numbers: &[u64]) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

fn unlist(text: &str) -> anyhow::Result<Vec<u64>> {
    Ok(text.split(',').map(str::parse).collect::<Result<_, _>>()?)
}

/// Builds the image of a finding again and opens it.
fn replay(ask: &PowerCut, finding: &Path) -> anyhow::Result<Outcome> {
    let text = fs::read_to_string(finding.join("case")).context("no finding of the power-cut rig")?;
    let fields: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once(" = ")).collect();
    let field = |name: &str| fields.get(name).copied().with_context(|| format!("the finding has no {name}"));
    let engine = Engine::from_str(field("engine")?, true).map_err(anyhow::Error::msg)?;
    let names = if field("names")? == "any-order" { Names::AnyOrder } else { Names::InOrder };
    let history = History::parse(field("history")?)?;
    let (cut, seed) = (field("cut")?.parse::<usize>()?, field("seed")?.parse::<u64>()?);
    let mut disk = Disk::new(&read_in(&finding.join("initial"))?)?;
    let mut events = recording::read(&finding.join("recording"))?;
    let spared: Vec<String> = field("spare")?.split_whitespace().map(str::to_owned).collect();
    spare(&mut events, &spared);
    let before = Bounds {
        acked: unlist(field("before acked")?)?,
        sent: unlist(field("before sent")?)?,
        void: vec![Vec::new(); history.shards.len()],
    };
    let mut marks = marks_from(&history, &before);
    for event in events.iter().take(cut) {
        disk.play(event)?;
        note_marks(&mut marks, event)?;
    }
    let mut chance = Chance::of(&[seed]);
    let close = chance.percent(50);
    let image = disk.after_power_cut(names, &mut chance);
    if let Some(keep) = &ask.keep {
        fs::create_dir_all(keep)?;
        write_out(&image, keep).context("--keep wants an empty folder")?;
        say!(ask, "the image is in {}", keep.display());
    }
    for (path, entry) in &image {
        let now = disk.now();
        let live = match (entry, now.get(path)) {
            (Entry::File(image), Some(Entry::File(now))) if image == now => "as it was",
            (Entry::File(_), Some(_)) => "cut",
            (Entry::File(_), None) => "was gone",
            (Entry::Folder, _) => "folder",
        };
        say!(ask, "    {path}: {live}");
    }
    for path in disk.now().keys().filter(|path| !image.contains_key(*path)) {
        say!(ask, "    {path}: missing");
    }
    let case = Case { image, history: marks.history.clone(), bounds: marks.bounds(), cut, seed, close };
    let scratch = Scratch::new()?;
    let folder = scratch.path().join("image");
    match open_image(engine, &mut timelines(&history), &case, &folder) {
        Ok(stands) => {
            say!(ask, "held: the shards stand at {}", list(&check::commits_of(&stands)));
            Ok(Outcome { passed: 1, failed: 0 })
        }
        Err(error) => {
            say!(ask, "FAILED: {error:#}");
            let _ = std::io::stderr().flush();
            Ok(Outcome { passed: 0, failed: 1 })
        }
    }
}

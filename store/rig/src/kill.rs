//! The kill rig.
//!
//! A process works on a store and is killed: at any time, or at a named point, before or after a call that changes or syncs a
//! file. Then it is killed again while it opens what the first kill left. What stands in the folder afterwards is compared with
//! what had been acknowledged. The folder is worked on further, kill after kill, until it is made new.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    chance::Chance,
    check,
    disk::{read_in, write_out},
    history::{History, Timeline},
    power::Outcome,
    scratch::{Scratch, finding, say},
    work::{Engine, Level, Marks, Starter, ValueName as _, Work, options},
};

/// A point at which a process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// What happens there.
    pub name: &'static str,
    /// The operation, as the rules of `fulmar-faultdisk` name it.
    pub operation: &'static str,
    /// Part of the path.
    pub path: &'static str,
}

/// Where processes are killed; each before the call and after it.
pub const POINTS: &[Point] = &[
    Point { name: "append to the commit log", operation: "write", path: ".log" },
    Point { name: "sync of the commit log", operation: "sync", path: ".log" },
    Point { name: "a new log file", operation: "create", path: ".log" },
    Point { name: "an old log file removed", operation: "unlink", path: ".log" },
    Point { name: "mark of the acknowledged commit", operation: "write", path: "tip" },
    Point { name: "a new segment", operation: "create", path: ".seg" },
    Point { name: "write of a segment", operation: "write", path: ".seg" },
    Point { name: "sync of a segment", operation: "sync", path: ".seg" },
    Point { name: "an old segment removed", operation: "unlink", path: ".seg" },
    Point { name: "write of the manifest", operation: "write", path: "manifest" },
    Point { name: "sync of the manifest", operation: "sync", path: "manifest" },
    Point { name: "rename of the manifest", operation: "rename", path: "manifest" },
    Point { name: "write of the engine", operation: "write", path: ENGINE_FILES },
    Point { name: "sync of the engine", operation: "sync", path: ENGINE_FILES },
    Point { name: "a new file of the engine", operation: "create", path: ENGINE_FILES },
    Point { name: "a name of the engine", operation: "rename", path: ENGINE_FILES },
    Point { name: "a file of the engine removed", operation: "unlink", path: ENGINE_FILES },
    Point { name: "any write", operation: "write", path: "" },
    Point { name: "any sync", operation: "sync", path: "" },
    Point { name: "any call", operation: "any", path: "" },
];

/// Where a data folder becomes one.
const MARKER: Point = Point { name: "marker of the data folder", operation: "rename", path: "FORMAT" };

/// The folders of the engines.
const ENGINE_FILES: &str = "/sled/|/fjall/|/index/";

/// In so many rounds every point must have been reached: a name that nothing answers to tries nothing.
const ROUNDS_FOR_ALL_POINTS: u64 = 200;

/// New folders in which a point that chance left out is looked for by name.
const FOLDERS_FOR_A_MISSED_POINT: u64 = 24;

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Kill {
    /// How often a process is killed at work
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub rounds: u64,
    /// How often, besides, one is killed while it opens what a kill left
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub open_rounds: u64,
    /// What everything follows from, as far as threads let it; if not given, another one each time
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Engine of the store
    #[arg(long, value_enum, default_value_t)]
    pub engine: Engine,
    /// Kills after which the folder is made new
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub per_folder: u64,
    /// Expect more commits than were acknowledged; the run must fail
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

/// How many matching calls are let pass before the kill: adapted to how many there are.
#[derive(Clone, Copy, Debug)]
struct Reach {
    most: u64,
    reached: u64,
    missed: u64,
}

impl Reach {
    fn new(most: u64) -> Self {
        Self { most, reached: 0, missed: 0 }
    }

    /// Nobody came by here yet, and that was tried.
    fn seems_absent(self) -> bool {
        self.reached == 0 && self.missed >= 4
    }

    fn note(&mut self, nth: u64, reached: bool) {
        if reached {
            self.reached += 1;
            self.most = (self.most * 5 / 4).clamp(2, 400);
        } else {
            self.missed += 1;
            self.most = (nth / 2).max(1);
        }
    }
}

/// Runs the rig.
///
/// # Errors
/// When it could not be run; kills that lost something are in the outcome.
pub fn run(ask: &Kill) -> anyhow::Result<Outcome> {
    let seed = ask.seed.unwrap_or_else(crate::scratch::new_seed);
    let mut rig = Rig {
        ask,
        seed,
        starter: Starter::find(ask.preload.as_deref())?,
        scratch: Scratch::new()?,
        points: BTreeMap::new(),
        turn: 0,
        opens: Reach::new(20),
    };
    say!(
        ask,
        "kills: {} at work, {} during open, engine {}, seed {seed}, in {}",
        ask.rounds,
        ask.open_rounds,
        ask.engine.value_name(),
        rig.scratch.path().display()
    );
    let began = Instant::now();
    let mut outcome = Outcome::default();
    let mut opens = 0;
    let mut stay: Option<Stay> = None;
    for round in 0..ask.rounds {
        let mut chance = Chance::of(&[seed, round, 3]);
        let mut current = match stay.take() {
            Some(stay) if stay.kills < ask.per_folder => stay,
            _ => rig.new_stay(round, &mut chance)?,
        };
        let mut how = vec![rig.kill_at_work(&mut current, &mut chance)?];
        // As many kills during open as keep step with the rounds.
        while opens * ask.rounds < ask.open_rounds * (round + 1) {
            how.push(rig.kill_during_open(&mut current, &mut chance)?);
            opens += 1;
        }
        current.kills += 1;
        let kills = how.len() as u64;
        match rig.judge(&mut current, &mut chance) {
            Ok(()) => {
                outcome.passed += kills;
                stay = Some(current);
            }
            Err(error) => {
                outcome.failed += 1;
                outcome.passed += kills - 1;
                rig.report(round, &current, &how, &error);
            }
        }
        if (round + 1) % 50 == 0 || round + 1 == ask.rounds {
            say!(
                ask,
                "{} of {} rounds, {} failed, {} s",
                round + 1,
                ask.rounds,
                outcome.failed,
                began.elapsed().as_secs()
            );
        }
    }
    if ask.rounds >= ROUNDS_FOR_ALL_POINTS {
        drop(stay);
        rig.visit_missed_points(&mut outcome)?;
    }
    for (name, reach) in &rig.points {
        say!(ask, "    {name:<34} killed {:>5} times, not reached {:>4}", reach.reached, reach.missed);
    }
    if ask.rounds >= ROUNDS_FOR_ALL_POINTS {
        for point in POINTS.iter().chain([&MARKER]) {
            if !rig.was_reached(point) {
                say!(ask, "FAILED: nobody was killed at: {}", point.name);
                outcome.failed += 1;
            }
        }
    }
    say!(
        ask,
        "    {:<34} killed {:>5} times, not reached {:>4}",
        "during open",
        rig.opens.reached,
        rig.opens.missed
    );
    say!(
        ask,
        "kills, seed {seed}: {} at work, {opens} during open, {} lost nothing, {:.1} s",
        ask.rounds,
        outcome.passed,
        began.elapsed().as_secs_f64()
    );
    Ok(outcome)
}

struct Rig<'a> {
    ask: &'a Kill,
    seed: u64,
    starter: Starter,
    scratch: Scratch,
    points: BTreeMap<&'static str, Reach>,
    /// Whose turn it is among the points.
    turn: usize,
    opens: Reach,
}

/// A folder that is killed in again and again.
struct Stay {
    place: PathBuf,
    level: Level,
    history: History,
    timelines: Vec<Timeline>,
    marks: Marks,
    kills: u64,
}

impl Stay {
    fn data(&self) -> PathBuf {
        self.place.join("root/data")
    }

    fn marks_file(&self) -> PathBuf {
        self.place.join("marks")
    }

    fn work(&self, engine: Engine, commits: u64, runs: u32) -> Work {
        Work {
            folder: self.data(),
            marks: self.marks_file(),
            history: self.history.to_text(),
            engine,
            durability: self.level,
            commits,
            runs,
            faults: false,
        }
    }

    /// Takes the marks in that were made since the last time.
    fn read_marks(&mut self) -> anyhow::Result<bool> {
        let text = fs::read_to_string(self.marks_file()).unwrap_or_default();
        for line in text.lines() {
            self.marks.note(line)?;
        }
        let _ = fs::remove_file(self.marks_file());
        Ok(!text.is_empty())
    }
}

impl Rig<'_> {
    fn new_stay(&self, round: u64, chance: &mut Chance) -> anyhow::Result<Stay> {
        let place = self.scratch.path().join("stay");
        if place.exists() {
            fs::remove_dir_all(&place)?;
        }
        fs::create_dir_all(place.join("root"))?;
        let shards = if chance.percent(40) { 2 } else { 1 };
        let history = History::new(Chance::of(&[self.seed, round]).draw() >> 16, shards);
        Ok(Stay {
            place,
            level: if chance.percent(70) { Level::Power } else { Level::Process },
            timelines: timelines(&history),
            marks: Marks::new(&history, &vec![0; usize::from(shards)]),
            history,
            kills: 0,
        })
    }

    /// Starts the work and kills it; gives how.
    fn kill_at_work(&mut self, stay: &mut Stay, chance: &mut Chance) -> anyhow::Result<String> {
        let root = stay.place.join("root");
        let at_any_time = chance.percent(50);
        let runs = if at_any_time { 1_000 } else { 4 };
        let work = stay.work(self.ask.engine, 5 + chance.below(60), runs);
        let mut command = self.starter.command(&work, &root);
        command.stderr(Stdio::piped());
        if at_any_time {
            let mut child = command.spawn().context("can't start the process that is killed")?;
            let patience = Duration::from_micros(chance.below(120_000));
            let began = Instant::now();
            // Half of them count from the first mark: they never hit the opening.
            let from_work = chance.percent(50);
            while from_work && !stay.marks_file().exists() && began.elapsed() < Duration::from_secs(20) {
                if child.try_wait()?.is_some() {
                    break;
                }
                std::thread::park_timeout(Duration::from_micros(200));
            }
            let began = Instant::now();
            while began.elapsed() < patience {
                std::thread::park_timeout(patience.saturating_sub(began.elapsed()));
            }
            child.kill()?;
            ended(child)?;
            stay.read_marks()?;
            return Ok(format!(
                "killed {} us after {}",
                patience.as_micros(),
                if from_work { "it opened" } else { "its start" }
            ));
        }
        // A point that this folder does not come to lets the process end by itself: then it is the next one's turn.
        for _ in 0..4 * POINTS.len() {
            // The marker is written once: only a new folder comes by there.
            let at_birth = stay.kills == 0 && chance.percent(40);
            let point = if at_birth {
                MARKER
            } else {
                self.turn += 1;
                POINTS.get(self.turn % POINTS.len()).copied().context("there are no points")?
            };
            let reach =
                self.points.entry(point.name).or_insert_with(|| Reach::new(if at_birth { 1 } else { 30 }));
            if reach.seems_absent() && !chance.percent(20) {
                continue;
            }
            let nth = 1 + chance.below(reach.most);
            if let Some(how) = self.kill_at(&point, nth, stay, &mut command, chance)? {
                return Ok(how);
            }
        }
        bail!("no process could be killed at any of the points")
    }

    /// Starts the work once, to be killed at its `nth` coming by a point; gives how, if it came by.
    fn kill_at(
        &mut self,
        point: &Point,
        nth: u64,
        stay: &mut Stay,
        command: &mut Command,
        chance: &mut Chance,
    ) -> anyhow::Result<Option<String>> {
        let when = if chance.percent(50) { "before" } else { "after" };
        command.env("FULMAR_FAULTDISK_RULES", rules(point, nth, when));
        let status = ended(command.spawn().context("can't start the process that is killed")?)?;
        let killed = was_killed(status);
        self.points.entry(point.name).or_insert_with(|| Reach::new(1)).note(nth, killed);
        stay.read_marks()?;
        Ok(killed.then(|| format!("killed {when} call {nth} of: {}", point.name)))
    }

    fn was_reached(&self, point: &Point) -> bool {
        self.points.get(point.name).is_some_and(|reach| reach.reached > 0)
    }

    /// A point that is passed seldom may be left out by chance in any number of rounds. It is looked for in new folders, at
    /// the first coming by, so that a point nobody was killed at is one that nobody comes by.
    fn visit_missed_points(&mut self, outcome: &mut Outcome) -> anyhow::Result<()> {
        for point in POINTS.iter().chain([&MARKER]) {
            for attempt in 0..FOLDERS_FOR_A_MISSED_POINT {
                if self.was_reached(point) {
                    break;
                }
                let round = self.ask.rounds + attempt;
                let mut chance = Chance::of(&[self.seed, round, 3]);
                let mut stay = self.new_stay(round, &mut chance)?;
                let work = stay.work(self.ask.engine, 5 + chance.below(60), 4);
                let mut command = self.starter.command(&work, &stay.place.join("root"));
                command.stderr(Stdio::piped());
                let Some(how) = self.kill_at(point, 1, &mut stay, &mut command, &mut chance)? else {
                    continue;
                };
                match self.judge(&mut stay, &mut chance) {
                    Ok(()) => outcome.passed += 1,
                    Err(error) => {
                        outcome.failed += 1;
                        self.report(round, &stay, &[how], &error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Starts an opening and kills it; gives how.
    fn kill_during_open(&mut self, stay: &mut Stay, chance: &mut Chance) -> anyhow::Result<String> {
        let work = stay.work(self.ask.engine, 0, 1);
        let mut command = self.starter.command(&work, &stay.place.join("root"));
        // Opening and closing an unopened folder may take fewer calls than before: that is found out again each time.
        for _ in 0..8 {
            let nth = 1 + chance.below(self.opens.most);
            let when = if chance.percent(50) { "before" } else { "after" };
            command.env("FULMAR_FAULTDISK_RULES", format!("kill op=any nth={nth} when={when}"));
            command.stderr(Stdio::piped());
            let status = ended(command.spawn().context("can't start the process that is killed")?)?;
            let opened = stay.read_marks()?;
            let reached = was_killed(status) && !opened;
            self.opens.note(nth, reached);
            if reached {
                return Ok(format!("killed {when} call {nth} of an opening"));
            }
        }
        bail!("no process could be killed during open: opening makes no calls that are seen")
    }

    /// Opens the folder, or a copy of it, and compares everything.
    fn judge(&self, stay: &mut Stay, chance: &mut Chance) -> anyhow::Result<()> {
        let mut bounds = stay.marks.bounds();
        if self.ask.plant
            && let Some(acked) = bounds.acked.first_mut()
        {
            *acked += 2;
        }
        let options = options(self.ask.engine, stay.level, &stay.history);
        let stands = if chance.percent(50) {
            // The next process meets what the kill left; nobody has tidied up.
            let copy = self.scratch.path().join("copy");
            if copy.exists() {
                fs::remove_dir_all(&copy)?;
            }
            fs::create_dir_all(&copy)?;
            write_out(&read_in(&stay.place.join("root"))?, &copy)?;
            check::whole(
                &copy.join("data"),
                &options,
                stay.history.seed,
                &mut stay.timelines,
                &bounds,
                chance.percent(50),
            )?
        } else {
            let store = check::open(&stay.data(), &options)?;
            let stands = check::Judge::strict().compare(&store, &mut stay.timelines, &bounds)?;
            if chance.percent(30) {
                store.close()?;
            }
            stands
        };
        // From here on it stands there for whoever opens it.
        stay.history = check::crashed(stay.history.seed, &stands);
        stay.marks = Marks::new(&stay.history, &check::commits_of(&stands));
        stay.timelines = timelines(&stay.history);
        Ok(())
    }

    fn report(&self, round: u64, stay: &Stay, how: &[String], error: &anyhow::Error) {
        let name = format!("kill-{}-{round}", self.seed);
        let text = format!(
            "engine = {}\nlevel = {}\nhistory = {}\nacked = {:?}\nsent = {:?}\nkilled = {}\nerror = {error:#}\n",
            self.ask.engine.value_name(),
            stay.level.value_name(),
            stay.history.to_text(),
            stay.marks.acked,
            stay.marks.sent,
            how.join("; "),
        );
        let kept = finding(&self.ask.findings, &name, |folder| {
            write_out(&read_in(&stay.place.join("root"))?, folder)?;
            fs::write(folder.join("case"), &text)?;
            Ok(())
        });
        say!(self.ask, "FAILED: seed {}, round {round}: {}: {error:#}", self.seed, how.join("; "));
        if let Some(folder) = kept {
            say!(self.ask, "    the folder as it was found: {}", folder.display());
        }
    }
}

fn timelines(history: &History) -> Vec<Timeline> {
    (0u16..).zip(&history.shards).map(|(shard, _)| Timeline::new(history.clone(), shard)).collect()
}

/// The rules for a point whose paths are separated by `|`.
fn rules(point: &Point, nth: u64, when: &str) -> String {
    let rule = |path: &str| {
        let path = if path.is_empty() { String::new() } else { format!(" path={path}") };
        format!("kill op={}{path} nth={nth} when={when}", point.operation)
    };
    point.path.split('|').map(rule).collect::<Vec<_>>().join(";")
}

/// Waits for the end of a process; one that ended with an error of its own is an error here.
fn ended(child: Child) -> anyhow::Result<ExitStatus> {
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success() || was_killed(output.status),
        "the process ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.status)
}

fn was_killed(status: ExitStatus) -> bool {
    status.signal() == Some(9)
}

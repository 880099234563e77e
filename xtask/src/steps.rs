//! The steps of `cargo xtask test`, in the order in which they run: what finds a mistake soonest comes first.
//!
//! - Each step is one row of [`STEPS`] and one function; a step answers with a count, or with an error that counts
//!   as one failure.
//! - A failed step stops nothing; the closing count is about all of them.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::rig::RigArgs;
use crate::run::{Workspace, on_ci, run as run_program};
use crate::sim::SimArgs;
use crate::tally::{Tally, of_libtest, of_nextest};
use crate::{client_rig, fuzz, instructions, layering, load, rig, sim, tool};

/// Time of a whole run on two cores from an empty target folder; more is said aloud.
const WHOLE_RUN: Duration = Duration::from_secs(60 * 60);

/// No build or test run of this workspace takes that long; whatever does, hangs.
const STEP_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Time to ask for the advisory database.
const FETCH_LIMIT: Duration = Duration::from_secs(3 * 60);

/// What the long steps are told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// How often the crash step kills a gateway.
    pub(crate) crash_rounds: u32,
    /// Time for each fuzz target.
    pub(crate) fuzz_seconds: u64,
}

/// Names of the steps, as `--only` and `--skip` take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StepName {
    /// Formatting
    Fmt,
    /// Who may name whom
    Layering,
    /// Lints
    Clippy,
    /// Documentation
    Doc,
    /// Dependencies
    Deny,
    /// Tests
    Test,
    /// Examples in the documentation
    Doctest,
    /// Power cuts
    PowerCut,
    /// Kills of the store
    StoreKill,
    /// Damaged disks
    Damage,
    /// The crash loop
    Crash,
    /// Kills of the SDK
    ClientKill,
    /// Worlds of the simulator
    Sim,
    /// Many phones
    Load,
    /// Short fuzzing
    Fuzz,
    /// Instructions per delivery
    Instructions,
}

/// One step: its name, what it does in a line, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    name: StepName,
    what: &'static str,
    run: fn(&Workspace, Options) -> anyhow::Result<Tally>,
}

/// All steps in the order in which they run.
const STEPS: &[Step] = &[
    Step { name: StepName::Fmt, what: "cargo fmt --check", run: fmt },
    Step {
        name: StepName::Layering,
        what: "who may name whom: manifests and `use` lines against xtask/src/layering/rules.rs",
        run: layering,
    },
    Step {
        name: StepName::Clippy,
        what: "cargo clippy on every target of every crate, warnings are errors",
        run: clippy,
    },
    Step { name: StepName::Doc, what: "cargo doc, warnings are errors", run: doc },
    Step {
        name: StepName::Deny,
        what: "cargo deny: licences, bans, sources, and advisories if their database can be reached",
        run: deny,
    },
    Step { name: StepName::Test, what: "cargo nextest run on the workspace", run: test },
    Step { name: StepName::Doctest, what: "the examples in the documentation", run: doctest },
    Step {
        name: StepName::PowerCut,
        what: "planted faults are found; then 2 000 power cuts of each engine's store, nothing acked may be lost",
        run: |workspace, _| {
            let proven = rig::rig(workspace, &["prove".to_owned()], &RigArgs::default())?;
            let mut total = power_cut(workspace, 2_000, &RigArgs::default())?;
            total += proven;
            Ok(total)
        },
    },
    Step {
        name: StepName::StoreKill,
        what: "each engine's store killed 200 times at work and 100 times during open",
        run: |workspace, _| store_kill(workspace, 200, 100, &RigArgs::default()),
    },
    Step {
        name: StepName::Damage,
        what: "1 000 damaged folders of each engine: every answer is right or refused",
        run: |workspace, _| damage(workspace, 1_000, &RigArgs::default()),
    },
    Step {
        name: StepName::Crash,
        what: "a gateway killed under load 200 times; nothing acked may be lost",
        run: crash,
    },
    Step {
        name: StepName::ClientKill,
        what: "planted faults are found; then apps killed 500 times: what was queued is stored once, every end is told",
        run: |workspace, _| client_rig::kill(workspace, 500, None, true),
    },
    Step {
        name: StepName::Sim,
        what: "2 000 whole worlds in virtual time: every promise is kept, and 1 % run twice to the same byte",
        run: |workspace, _| sim::worlds(workspace, 2_000, &SimArgs::default()),
    },
    Step {
        name: StepName::Load,
        what: "20 000 phones connected, ten pairs talk: nobody is refused, nothing is lost, idle ones take little memory",
        run: |workspace, _| load::short(workspace),
    },
    Step { name: StepName::Fuzz, what: "each target of fuzz/Cargo.toml for 30 s", run: fuzz_shortly },
    Step {
        name: StepName::Instructions,
        what: "the gateway's instructions per delivery, against benches/instructions.toml",
        run: |workspace, _| instructions::count_if_possible(workspace),
    },
];

/// The steps as a table for people.
pub(crate) fn list() -> String {
    let mut text = String::new();
    for step in STEPS {
        let _ = writeln!(text, "{:<12} {}", word(step.name), step.what);
    }
    text
}

/// The steps named in `only` (all, if it is empty) that are not in `skip`.
pub(crate) fn select(only: &[StepName], skip: &[StepName]) -> Vec<Step> {
    let wanted = |name: StepName| (only.is_empty() || only.contains(&name)) && !skip.contains(&name);
    STEPS.iter().filter(|step| wanted(step.name)).copied().collect()
}

/// Runs the steps one after the other, shows a table of outcomes and times, and gives the sum.
pub(crate) fn run(workspace: &Workspace, steps: &[Step], options: Options) -> Tally {
    let start = Instant::now();
    let mut total = Tally::default();
    let mut table = String::new();
    for (number, step) in steps.iter().enumerate() {
        let name = word(step.name);
        eprintln!("\n=== {}/{} {name}: {}", number + 1, steps.len(), step.what);
        let step_start = Instant::now();
        let tally = (step.run)(workspace, options).unwrap_or_else(|error| {
            eprintln!("error: {name}: {error:#}");
            Tally::of_one(false)
        });
        let outcome = if tally.is_success() { "ok" } else { "FAILED" };
        let took = minutes(step_start.elapsed());
        eprintln!("=== {name}: {outcome} in {took}");
        let _ = writeln!(table, "{name:<12} {outcome:<7} {took:>12}   {tally}");
        total += tally;
    }
    eprintln!("\n{table}{:<12} {:<7} {:>12}\n", "total", "", minutes(start.elapsed()));
    if start.elapsed() > WHOLE_RUN {
        eprintln!("warning: this run took longer than the {} it may take\n", minutes(WHOLE_RUN));
    }
    total
}

fn word(name: StepName) -> String {
    name.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn minutes(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

fn fmt(workspace: &Workspace, _: Options) -> anyhow::Result<Tally> {
    let colour = if std::io::stderr().is_terminal() { "always" } else { "never" };
    one_check(&mut workspace.cargo(["fmt", "--all", "--", "--check", "--color", colour]))
}

fn layering(workspace: &Workspace, _: Options) -> anyhow::Result<Tally> {
    let tree = layering::read_tree(workspace.root())?;
    let violations = layering::check(&tree, layering::rules::CRATES, layering::rules::SOURCES)?;
    for violation in &violations {
        eprintln!("{violation}");
    }
    eprintln!("{} files read, {} violations", tree.len(), violations.len());
    Ok(Tally::of_one(violations.is_empty()))
}

fn clippy(workspace: &Workspace, _: Options) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    let mut command = workspace.cargo(["clippy", "--workspace", "--all-targets"]);
    one_check(locked_on_ci(&mut command).args(["--", "-D", "warnings"]))
}

fn doc(workspace: &Workspace, _: Options) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    let mut command = workspace.cargo(["doc", "--no-deps", "--workspace"]);
    one_check(locked_on_ci(&mut command).env("RUSTDOCFLAGS", "-D warnings"))
}

fn deny(workspace: &Workspace, _: Options) -> anyhow::Result<Tally> {
    tool::DENY.ensure(workspace)?;
    let mut total = Tally::default();
    for what in ["licenses", "bans", "sources"] {
        let mut command = workspace.cargo(["deny", "check", "--hide-inclusion-graph", what]);
        total += one_check(&mut command)?;
    }
    let mut fetch = workspace.cargo(["deny", "fetch", "db"]);
    fetch.env("GIT_TERMINAL_PROMPT", "0");
    if run_program(&mut fetch, FETCH_LIMIT, |_| ()).unwrap_or(false) {
        total += one_check(&mut workspace.cargo(["deny", "check", "--disable-fetch", "advisories"]))?;
    } else {
        eprintln!(
            "advisories NOT checked: their database can't be fetched from here. \
             Run `cargo xtask test --only deny` where github.com can be reached."
        );
        total.skipped += 1;
    }
    Ok(total)
}

fn test(workspace: &Workspace, _: Options) -> anyhow::Result<Tally> {
    nextest(workspace, if on_ci() { "ci" } else { "default" }, |command| {
        command.args(["--workspace", "--no-fail-fast"]);
    })
}

fn doctest(workspace: &Workspace, _: Options) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    let mut command = workspace.cargo(["test", "--doc", "--workspace", "--no-fail-fast"]);
    counted(locked_on_ci(&mut command), of_libtest)
}

/// Kills a gateway under load `options.crash_rounds` times.
///
/// # Errors
/// When the test can't be run.
pub(crate) fn crash(workspace: &Workspace, options: Options) -> anyhow::Result<Tally> {
    nextest(workspace, "crash", |command| {
        command.args(["--package", "fulmar-gateway", "--test", "crash", "--no-capture"]);
        command.env("FULMAR_CRASH_ROUNDS", options.crash_rounds.to_string());
    })
}

/// Cuts the power `images` times for each engine.
///
/// # Errors
/// When the rig can't be run.
pub(crate) fn power_cut(workspace: &Workspace, images: u64, args: &RigArgs) -> anyhow::Result<Tally> {
    rig::rig(workspace, &rig::words("power-cut", &[("--images", images)], workspace), args)
}

/// Kills the store of each engine `rounds` times at work and `open_rounds` times during open.
///
/// # Errors
/// When the rig can't be run.
pub(crate) fn store_kill(
    workspace: &Workspace,
    rounds: u64,
    open_rounds: u64,
    args: &RigArgs,
) -> anyhow::Result<Tally> {
    let counts = [("--rounds", rounds), ("--open-rounds", open_rounds)];
    rig::rig(workspace, &rig::words("kill", &counts, workspace), args)
}

/// Opens `images` damaged folders of each engine.
///
/// # Errors
/// When the rig can't be run.
pub(crate) fn damage(workspace: &Workspace, images: u64, args: &RigArgs) -> anyhow::Result<Tally> {
    rig::rig(workspace, &rig::words("damage", &[("--images", images)], workspace), args)
}

fn fuzz_shortly(workspace: &Workspace, options: Options) -> anyhow::Result<Tally> {
    let targets = fuzz::targets(workspace)?;
    fuzz::run_all(workspace, &targets, options.fuzz_seconds, fuzz::Progress::Hidden)
}

fn nextest(workspace: &Workspace, profile: &str, what: impl FnOnce(&mut Command)) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    tool::NEXTEST.ensure(workspace)?;
    let mut command = workspace.cargo(["nextest", "run", "--profile", profile]);
    what(locked_on_ci(&mut command));
    counted(&mut command, of_nextest)
}

/// On CI the committed `Cargo.lock` is what is tested; at a desk it may be on its way to change.
fn locked_on_ci(command: &mut Command) -> &mut Command {
    if on_ci() { command.arg("--locked") } else { command }
}

/// A check without parts: it holds if the program succeeds.
fn one_check(command: &mut Command) -> anyhow::Result<Tally> {
    Ok(Tally::of_one(run_program(command, STEP_LIMIT, |_| ())?))
}

/// A runner that counts: its closing lines are added up by `read`.
fn counted(command: &mut Command, read: fn(&str) -> Option<Tally>) -> anyhow::Result<Tally> {
    counted_within(command, STEP_LIMIT, read)
}

/// As [`counted`], with another limit.
///
/// # Errors
/// When the runner can't be run, or did not count.
pub(crate) fn counted_within(
    command: &mut Command,
    limit: Duration,
    read: fn(&str) -> Option<Tally>,
) -> anyhow::Result<Tally> {
    let mut total: Option<Tally> = None;
    let success = run_program(command, limit, |line| {
        if let Some(tally) = read(line) {
            *total.get_or_insert_default() += tally;
        }
    })?;
    anyhow::ensure!(total.is_some() || !success, "the runner ended without saying how many tests it ran");
    Ok(total.unwrap_or_default().confirmed(success))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &[StepName], skip: &[StepName]) -> Vec<StepName> {
        select(only, skip).into_iter().map(|step| step.name).collect()
    }

    #[test]
    fn every_step_has_one_row() {
        let rows: Vec<StepName> = STEPS.iter().map(|step| step.name).collect();
        assert_eq!(rows, StepName::value_variants());
    }

    #[test]
    fn only_and_skip_choose_and_keep_the_order() {
        assert_eq!(names(&[], &[]).len(), STEPS.len());
        assert_eq!(names(&[StepName::Clippy, StepName::Fmt], &[]), [StepName::Fmt, StepName::Clippy]);
        assert_eq!(names(&[StepName::Clippy, StepName::Fmt], &[StepName::Fmt]), [StepName::Clippy]);
        assert!(!names(&[], &[StepName::Fuzz]).contains(&StepName::Fuzz));
    }

    #[test]
    fn counts_come_from_the_runner_and_silence_is_no_pass() {
        let sh = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            counted(&mut command, of_libtest)
        };
        let two = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored'; ".repeat(2);
        assert_eq!(sh(&two).unwrap(), Tally { passed: 2, failed: 0, skipped: 0 });
        assert_eq!(sh(&format!("{two} exit 1")).unwrap(), Tally { passed: 2, failed: 1, skipped: 0 });
        assert_eq!(sh("exit 1").unwrap(), Tally { passed: 0, failed: 1, skipped: 0 });
        assert!(sh("true").is_err());
    }

    #[test]
    fn times_read_well() {
        assert_eq!(minutes(Duration::from_secs(59)), "59 s");
        assert_eq!(minutes(Duration::from_secs(125)), "2 min 05 s");
    }
}

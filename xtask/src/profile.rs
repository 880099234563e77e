//! Where the gateway spends its time: a flame graph of it at a piece of work.
//!
//! - The gateway and the load generator are built for release with frame pointers, in a target folder of their own.
//! - `perf` samples the gateway only, and only while messages flow; `inferno` draws.
//!
//! Not here: figures to quote (`bench`, `peers`), and bars (`instructions`).

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;

use crate::run::{Workspace, ask, run};
use crate::tool;

/// Time for the build.
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Time a run may take beyond what is sampled: connecting, and what comes late.
const RUN_SPARE: Duration = Duration::from_secs(5 * 60);

/// Functions that are listed.
const LISTED: usize = 25;

/// What the gateway does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// One group of 1 000, as fast as it goes
    Fanout,
    /// One group of 1 000, 20 messages a second
    Lone,
    /// 500 pairs, 3 000 messages a second
    Pairs,
    /// 2 000 phones that say nothing
    Idle,
}

impl Work {
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Fanout => &["--phones", "1000", "--rate", "4000"],
            Self::Lone => &["--phones", "1000", "--rate", "20"],
            Self::Pairs => &["--phones", "1000", "--groups", "0", "--rate", "3000"],
            Self::Idle => &["--phones", "2000", "--rate", "0"],
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct ProfileArgs {
    /// What the gateway does meanwhile
    #[arg(value_enum)]
    work: Work,
    /// Time to sample
    #[arg(long, value_name = "S", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
    /// Samples a second; a number that nothing else happens as often as
    #[arg(long, value_name = "HZ", default_value_t = 997, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    hz: u32,
}

/// Samples the gateway at work; gives what is to be said: the busiest functions, and where the picture lies.
///
/// # Errors
/// A tool is missing and can't be installed, or something can't be built or run.
pub(crate) fn draw(workspace: &Workspace, args: ProfileArgs) -> anyhow::Result<String> {
    tool::ensure_compilers(workspace)?;
    tool::ensure_package(workspace, "perf", "linux-perf", "it samples the gateway")?;
    tool::INFERNO.ensure(workspace)?;
    let folder = workspace.target().join("profile");
    let mut build =
        workspace.cargo(["build", "--release", "--package", "fulmar-gateway", "--package", "fulmar-load"]);
    build.arg("--target-dir").arg(&folder).env("RUSTFLAGS", "-C force-frame-pointers=yes");
    ensure!(run(&mut build, BUILD_LIMIT, |_| ())?, "the gateway can't be built");

    let name = args.work.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
    let samples = folder.join(format!("{name}.perf"));
    let mut sampler = Sampler::new(workspace, &folder.join("release/fulmar"), &samples, args);
    let mut load = workspace.command(folder.join("release/fulmar-load"));
    // Longer than is sampled: the sampler starts with the first figures.
    load.args(args.work.flags()).args(["--seconds", &(args.seconds + 5).to_string()]);
    let limit = Duration::from_secs(args.seconds.into()) + RUN_SPARE;
    // The generator fails where it was asked for more than there is to give; the samples are good all the same.
    let _ = run(&mut load, limit, |line| {
        if line.contains("deliveries/s") {
            sampler.start();
        }
    })?;
    sampler.end()?;

    let folded = folder.join(format!("{name}.folded"));
    let picture = folder.join(format!("{name}.svg"));
    let mut script = workspace.command("perf");
    script.args(["script", "--input"]).arg(&samples);
    let mut collapse = workspace.command("inferno-collapse-perf");
    pipe(&mut script, &mut collapse, &folded)?;
    let mut graph = workspace.command("inferno-flamegraph");
    graph.args(["--title", &format!("The gateway: {name}")]).arg(&folded);
    graph.stdout(File::create(&picture)?).stderr(Stdio::null());
    ensure!(graph.status().context("can't draw")?.success(), "inferno can't draw {}", folded.display());

    let mut report = workspace.command("perf");
    report.args([
        "report",
        "--no-children",
        "--call-graph",
        "none",
        "--fields",
        "overhead,symbol",
        "--stdio",
        "--input",
    ]);
    let told = ask(report.arg(&samples)).context("perf can't read what it wrote")?;
    let mut text = String::new();
    for line in told.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()).take(LISTED) {
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let _ = writeln!(text, "\nflame graph: {}", picture.display());
    Ok(text)
}

/// Runs `from | to > file`.
fn pipe(from: &mut Command, to: &mut Command, file: &Path) -> anyhow::Result<()> {
    let mut from = from.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("can't start perf")?;
    let lines = from.stdout.take().context("perf has no output")?;
    let ended = to.stdin(lines).stdout(File::create(file)?).stderr(Stdio::null()).status();
    let from = from.wait()?;
    ensure!(ended.context("can't start inferno")?.success() && from.success(), "the samples can't be read");
    Ok(())
}

/// `perf`, which starts when messages flow.
struct Sampler {
    program: PathBuf,
    command: Command,
    seconds: u32,
    running: Option<std::io::Result<Child>>,
}

impl Sampler {
    fn new(workspace: &Workspace, program: &Path, samples: &Path, args: ProfileArgs) -> Self {
        let mut command = workspace.command("perf");
        command.args(["record", "--quiet", "--call-graph", "fp", "--freq", &args.hz.to_string(), "--output"]);
        command.arg(samples).stdout(Stdio::null());
        Self { program: program.to_owned(), command, seconds: args.seconds, running: None }
    }

    fn start(&mut self) {
        if self.running.is_some() {
            return;
        }
        if let Some(pid) = process_of(&self.program) {
            self.command.args(["--pid", &pid.to_string(), "--", "sleep", &self.seconds.to_string()]);
            self.running = Some(self.command.spawn());
        }
    }

    fn end(self) -> anyhow::Result<()> {
        let mut perf = self.running.context("no messages were seen to flow")?.context("can't start perf")?;
        let ended = perf.wait()?;
        ensure!(
            ended.success(),
            "perf failed ({ended}); may it be used here? See /proc/sys/kernel/perf_event_paranoid"
        );
        Ok(())
    }
}

/// The process that runs this program.
fn process_of(program: &Path) -> Option<u32> {
    let program = program.canonicalize().ok()?;
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        (fs::read_link(entry.path().join("exe")).ok()? == program).then_some(pid)
    })
}

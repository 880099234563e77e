//! Instructions per delivery, counted by callgrind: a bar that a busy machine can't move.
//!
//! - The work is a world in virtual time (`sim/src/bin/instructions.rs`), so a build does the same each time, up to some hundredths of
//!   a percent. What phones do is counted by itself; the rest is the gateway, its half of QUIC, the runtime and the simulated network.
//!   The kernel is not in it.
//! - Each work is done with fewer and with more messages. The difference, divided by the deliveries it holds, is the figure: what
//!   starting and connecting cost cancels out.
//! - The figures that hold stand in `benches/instructions.toml`, with the compiler and the kind of processor they were counted with.
//!   Another compiler makes other code of the same source, and cryptography and the C library choose theirs by what the processor can;
//!   then the figures are shown, and nothing is judged.
//!
//! Not here: what takes the instructions (`callgrind_annotate` of the files this leaves, `profile`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::run::{Workspace, ask, run};
use crate::tally::Tally;
use crate::tool;

/// Time to build the program for release.
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Time of one run under callgrind, some fifty times what it takes without.
const RUN_LIMIT: Duration = Duration::from_secs(10 * 60);

/// How much a figure may rise.
const RISE_MAX_PERCENT: f64 = 3.0;

/// Where the figures stand.
const KEPT: &str = "benches/instructions.toml";

/// The function in which phones do what they do.
const PHONES: &str = "turn_of_a_phone";

/// A work by its name, with the messages of its two runs.
const WORKS: &[(&str, [u32; 2])] = &[("lone", [32, 96]), ("gathered", [128, 640])];

/// The figures that hold.
#[derive(Debug, Default, PartialEq)]
struct Kept {
    compiler: String,
    processor: String,
    per_delivery: BTreeMap<String, f64>,
}

impl Kept {
    fn read(text: &str) -> anyhow::Result<Self> {
        let table: toml::Table = text.parse()?;
        let said = |name: &str| {
            let said = table.get(name).and_then(toml::Value::as_str);
            said.map(str::to_owned).with_context(|| format!("`{name}` is missing"))
        };
        let figures = table.get("per_delivery").and_then(toml::Value::as_table);
        let figures = figures.context("`[per_delivery]` is missing")?.iter().map(|(work, figure)| {
            let figure = figure.as_integer().with_context(|| format!("`{work}` is no whole number"))?;
            Ok((work.clone(), figure as f64))
        });
        Ok(Self {
            compiler: said("compiler")?,
            processor: said("processor")?,
            per_delivery: figures.collect::<anyhow::Result<_>>()?,
        })
    }

    fn write(&self) -> String {
        let mut text = String::from(
            "# Instructions per delivery, kernel left out. Written by `cargo xtask instructions --keep`.\n",
        );
        let _ = writeln!(
            text,
            "compiler = {:?}\nprocessor = {:?}\n\n[per_delivery]",
            self.compiler, self.processor
        );
        for (work, figure) in &self.per_delivery {
            let _ = writeln!(text, "{work} = {figure:.0}");
        }
        text
    }
}

/// What is to be said about a figure.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Judged {
    /// It changed by so many percent, which may be.
    Holds(f64),
    /// It rose by so many percent.
    Rose(f64),
    /// There is nothing to compare it with.
    New,
}

fn judge(now: f64, kept: Option<f64>) -> Judged {
    match kept {
        Some(kept) if kept > 0.0 => {
            let change = (now / kept - 1.0) * 100.0;
            if change > RISE_MAX_PERCENT { Judged::Rose(change) } else { Judged::Holds(change) }
        }
        _ => Judged::New,
    }
}

/// As [`count`], for a machine that may be without valgrind and without a way to get it: that is said, and counts as left out.
///
/// # Errors
/// Something can't be built or run, or says nothing.
pub(crate) fn count_if_possible(workspace: &Workspace) -> anyhow::Result<Tally> {
    if let Err(error) = ensure_valgrind(workspace) {
        eprintln!("instructions NOT counted: {error:#}");
        return Ok(Tally { skipped: 1, ..Tally::default() });
    }
    count(workspace, false)
}

fn ensure_valgrind(workspace: &Workspace) -> anyhow::Result<()> {
    tool::ensure_package(workspace, "valgrind", "valgrind", "it counts instructions")
}

/// Counts, and compares with what was kept; with `keep`, keeps the figures instead.
///
/// # Errors
/// Something can't be built or run, or says nothing.
pub(crate) fn count(workspace: &Workspace, keep: bool) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    ensure_valgrind(workspace)?;
    let program = build(workspace)?;
    let file = workspace.root().join(KEPT);
    let kept = match std::fs::read_to_string(&file) {
        Ok(text) => Kept::read(&text).with_context(|| format!("{KEPT} is damaged"))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Kept::default(),
        Err(error) => return Err(error).with_context(|| format!("can't read {}", file.display())),
    };
    let compiler =
        ask(workspace.command("rustc").arg("--version")).context("rustc does not say its version")?;
    let compiler = compiler.trim().to_owned();
    let mut now = Kept { compiler, processor: processor(), ..Kept::default() };
    let comparable = (&kept.compiler, &kept.processor) == (&now.compiler, &now.processor);
    let mut tally = Tally::default();
    let mut table = String::new();
    for (work, messages) in WORKS {
        for (name, figure) in per_delivery(workspace, &program, work, *messages)? {
            let before = kept.per_delivery.get(&name).copied().filter(|_| comparable);
            let judged = judge(figure, before);
            let said = match judged {
                Judged::Holds(change) => format!("{change:+.2} %"),
                Judged::Rose(change) => format!("{change:+.2} %: at most {RISE_MAX_PERCENT} % are let pass"),
                Judged::New => "nothing to compare it with".to_owned(),
            };
            let _ = writeln!(table, "{name:<18} {figure:>10.0} instructions per delivery   {said}");
            tally += match judged {
                Judged::New if !keep => Tally { skipped: 1, ..Tally::default() },
                judged => Tally::of_one(keep || !matches!(judged, Judged::Rose(_))),
            };
            now.per_delivery.insert(name, figure);
        }
    }
    eprintln!("\n{table}");
    if keep {
        std::fs::write(&file, now.write()).with_context(|| format!("can't write {}", file.display()))?;
        eprintln!("kept in {KEPT}");
    } else if !comparable {
        eprintln!(
            "not judged: {KEPT} is of {} on {}, this is {} on {}",
            kept.compiler, kept.processor, now.compiler, now.processor
        );
    } else if !tally.is_success() {
        eprintln!("if that is worth it: `cargo xtask instructions --keep`, and say why in the commit");
    }
    Ok(tally)
}

/// What decides here which code cryptography and the C library choose: valgrind shows programs one model of processor for each of these.
fn processor() -> String {
    let told = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = told.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let mut kind = std::env::consts::ARCH.to_owned();
    for flag in ["aes", "avx", "avx2", "rdrand", "rdseed", "f16c"] {
        if flags.split_whitespace().any(|has| has == flag) {
            kind.push(' ');
            kind.push_str(flag);
        }
    }
    kind
}

fn build(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let mut build =
        workspace.cargo(["build", "--release", "--package", "fulmar-sim", "--bin", "instructions"]);
    ensure!(run(&mut build, BUILD_LIMIT, |_| ())?, "the program can't be built");
    Ok(workspace.target().join("release/instructions"))
}

/// Instructions per delivery, the gateway's and the phones': of what more messages take more.
fn per_delivery(
    workspace: &Workspace,
    program: &Path,
    work: &str,
    [few, many]: [u32; 2],
) -> anyhow::Result<[(String, f64); 2]> {
    let (less, fewer) = counted(workspace, program, work, few)?;
    let (more, all) = counted(workspace, program, work, many)?;
    let figure = |whose: &str, of: fn(Counted) -> u64| {
        let (less, more) = (of(less), of(more));
        ensure!(
            all > fewer && more > less,
            "{work}, {whose}: {less} instructions for {fewer} deliveries, {more} for {all}"
        );
        Ok((format!("{work}-{whose}"), (more - less) as f64 / (all - fewer) as f64))
    };
    Ok([
        figure("gateway", |counted| counted.all - counted.phones)?,
        figure("phone", |counted| counted.phones)?,
    ])
}

/// Instructions of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    all: u64,
    phones: u64,
}

/// Instructions of one run, and its deliveries.
fn counted(
    workspace: &Workspace,
    program: &Path,
    work: &str,
    messages: u32,
) -> anyhow::Result<(Counted, u64)> {
    let folder = workspace.target().join("instructions");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join(format!("{work}-{messages}.out"));
    let mut command = workspace.command("valgrind");
    command.args(["--tool=callgrind", "--quiet"]);
    command.arg(format!("--callgrind-out-file={}", file.display()));
    command.arg(program).args(["--work", work, "--messages", &messages.to_string()]);
    let mut deliveries = None;
    let done =
        run(&mut command, RUN_LIMIT, |line| deliveries = line.trim().parse::<u64>().ok().or(deliveries))?;
    ensure!(done, "{work} with {messages} messages failed under callgrind");
    let deliveries = deliveries.context("the program does not say how many deliveries there were")?;
    let profile = BufReader::new(File::open(&file).context("callgrind left no profile")?);
    let counted = read_profile(profile.lines()).with_context(|| format!("{} is damaged", file.display()))?;
    Ok((counted, deliveries))
}

/// Reads a profile of callgrind's: the total, and what calls of [`PHONES`] took with everything they called.
///
/// The format (manual of callgrind, "Format specification"): names are given a number once, `fn=(7) name`, and called by it later; a
/// call is `cfn=(7)`, then `calls=…`, then a line whose last number is the cost.
fn read_profile(lines: impl Iterator<Item = std::io::Result<String>>) -> anyhow::Result<Counted> {
    let mut counted = Counted::default();
    let mut phones: Option<String> = None;
    let (mut called, mut cost_follows) = (false, false);
    for line in lines {
        let line = line?;
        if let Some(total) = line.strip_prefix("summary:").or_else(|| line.strip_prefix("totals:")) {
            counted.all = total.trim().parse().with_context(|| format!("`{line}` is no total"))?;
        } else if let Some(name) = line.strip_prefix("cfn=").or_else(|| line.strip_prefix("fn=")) {
            let number = name.split_once(')').map_or(name, |(number, _)| number);
            if name.contains(PHONES) {
                phones = Some(number.to_owned());
            }
            called = line.starts_with("cfn=") && phones.as_deref() == Some(number);
        } else if line.starts_with("calls=") {
            cost_follows = std::mem::take(&mut called);
        } else if std::mem::take(&mut cost_follows) {
            let cost = line.rsplit(' ').next().and_then(|cost| cost.parse::<u64>().ok());
            counted.phones += cost.with_context(|| format!("`{line}` has no cost"))?;
        }
    }
    ensure!(counted.phones > 0, "nobody called `{PHONES}`");
    ensure!(counted.all > counted.phones, "the total is missing");
    Ok(counted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_rise_fails() {
        for (now, kept, want) in [
            (102.9, Some(100.0), Judged::Holds(2.9)),
            (103.1, Some(100.0), Judged::Rose(3.1)),
            (50.0, Some(100.0), Judged::Holds(-50.0)),
            (50.0, None, Judged::New),
            (50.0, Some(0.0), Judged::New),
        ] {
            let (got, close) = (judge(now, kept), |a: f64, b: f64| (a - b).abs() < 1e-9);
            let same = match (got, want) {
                (Judged::Holds(a), Judged::Holds(b)) | (Judged::Rose(a), Judged::Rose(b)) => close(a, b),
                (a, b) => a == b,
            };
            assert!(same, "{now} after {kept:?}: {got:?}");
        }
    }

    #[test]
    fn figures_are_kept_as_they_are_and_damage_is_named() {
        let figures = [("gathered".to_owned(), 1_000.0), ("lone".to_owned(), 22_000.0)].into();
        let (compiler, processor) = ("rustc 1.2.3 (\"x\")".to_owned(), "vax".to_owned());
        let kept = Kept { compiler, processor, per_delivery: figures };
        assert_eq!(Kept::read(&kept.write()).unwrap(), kept);
        for text in
            ["", "compiler = 1", "compiler = \"x\"", "compiler = \"x\"\n[per_delivery]\na = \"b\"", "="]
        {
            assert!(Kept::read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn profiles_are_understood() {
        let read = |text: &str| read_profile(text.lines().map(|line| Ok(line.to_owned())));
        let whole = "version: 1\nevents: Ir\nsummary: 1000\n\nfn=(1) main\n10 5\ncfn=(2) sim::turn_of_a_phone\ncalls=3 40\n12 300\n\
            cfn=(3) other\ncalls=1 7\n13 90\n\nfn=(2)\n40 60\ncfn=(4) sqlite\ncalls=2 1\n41 240\n\nfn=(5) again\ncfi=(9)\ncfn=(2)\n\
            calls=1 40\n* 44\n\ntotals: 1000\n";
        assert_eq!(read(whole).unwrap(), Counted { all: 1_000, phones: 344 });
        for damaged in [
            "",
            "summary: 10\nfn=(1) main\n1 10\n",
            "cfn=(2) turn_of_a_phone\ncalls=1 1\n1 7\n",
            "summary: x\n",
            "summary: 10\ncfn=(2) turn_of_a_phone\ncalls=1 1\nfn\n",
        ] {
            assert!(read(damaged).is_err(), "{damaged}");
        }
    }
}

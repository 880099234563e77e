//! Instructions per delivery, counted by callgrind: a bar that a busy machine can't move.
//!
//! - The work is a world in virtual time (`sim/src/bin/instructions.rs`), so a build does the same each time. What phones do is left
//!   out; the kernel is not in it.
//! - Each work is done with fewer and with more messages. The difference, divided by the deliveries it holds, is the figure: what
//!   starting and connecting cost cancels out.
//! - The figures that hold stand in `benches/instructions.toml`, with the compiler they were counted with. Another compiler makes
//!   other code of the same source; then the figures are shown, and nothing is judged.
//!
//! Not here: what takes the instructions (`callgrind_annotate` of the files this leaves, `profile`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
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

/// The function that is left out: what a phone does.
const PHONES: &str = "*turn_of_a_phone*";

/// A work by its name, with the messages of its two runs.
const WORKS: &[(&str, [u32; 2])] = &[("lone", [32, 96]), ("gathered", [128, 640])];

/// The figures that hold.
#[derive(Debug, Default, PartialEq)]
struct Kept {
    compiler: String,
    per_delivery: BTreeMap<String, f64>,
}

impl Kept {
    fn read(text: &str) -> anyhow::Result<Self> {
        let table: toml::Table = text.parse()?;
        let compiler =
            table.get("compiler").and_then(toml::Value::as_str).context("`compiler` is missing")?;
        let figures = table.get("per_delivery").and_then(toml::Value::as_table);
        let figures = figures.context("`[per_delivery]` is missing")?.iter().map(|(work, figure)| {
            let figure = figure.as_integer().with_context(|| format!("`{work}` is no whole number"))?;
            Ok((work.clone(), figure as f64))
        });
        Ok(Self { compiler: compiler.to_owned(), per_delivery: figures.collect::<anyhow::Result<_>>()? })
    }

    fn write(&self) -> String {
        let mut text = String::from(
            "# Instructions of the gateway's half per delivery. Written by `cargo xtask instructions --keep`.\n",
        );
        let _ = writeln!(text, "compiler = {:?}\n\n[per_delivery]", self.compiler);
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

/// Counts, and compares with what was kept; with `keep`, keeps the figures instead.
///
/// # Errors
/// Something can't be built or run, or says nothing.
pub(crate) fn count(workspace: &Workspace, keep: bool) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    tool::ensure_package(workspace, "valgrind", "it counts instructions")?;
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
    let comparable = kept.compiler == compiler;
    let mut now = Kept { compiler, ..Kept::default() };
    let mut tally = Tally::default();
    let mut table = String::new();
    for (work, messages) in WORKS {
        let per_delivery = per_delivery(workspace, &program, work, *messages)?;
        let before = kept.per_delivery.get(*work).copied().filter(|_| comparable);
        let judged = judge(per_delivery, before);
        let said = match judged {
            Judged::Holds(change) => format!("{change:+.2} %"),
            Judged::Rose(change) => format!("{change:+.2} %: at most {RISE_MAX_PERCENT} % are let pass"),
            Judged::New => "nothing to compare it with".to_owned(),
        };
        let _ = writeln!(table, "{work:<10} {per_delivery:>10.0} instructions per delivery   {said}");
        tally += match judged {
            Judged::New if !keep => Tally { skipped: 1, ..Tally::default() },
            judged => Tally::of_one(keep || !matches!(judged, Judged::Rose(_))),
        };
        now.per_delivery.insert((*work).to_owned(), per_delivery);
    }
    eprintln!("\n{table}");
    if keep {
        std::fs::write(&file, now.write()).with_context(|| format!("can't write {}", file.display()))?;
        eprintln!("kept in {KEPT}");
    } else if !comparable {
        eprintln!("not judged: {KEPT} is of {}, this is {}", kept.compiler, now.compiler);
    } else if !tally.is_success() {
        eprintln!("if that is worth it: `cargo xtask instructions --keep`, and say why in the commit");
    }
    Ok(tally)
}

fn build(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let mut build =
        workspace.cargo(["build", "--release", "--package", "fulmar-sim", "--bin", "instructions"]);
    ensure!(run(&mut build, BUILD_LIMIT, |_| ())?, "the program can't be built");
    Ok(workspace.target().join("release/instructions"))
}

/// Instructions per delivery: of what more messages take more.
fn per_delivery(
    workspace: &Workspace,
    program: &Path,
    work: &str,
    [few, many]: [u32; 2],
) -> anyhow::Result<f64> {
    let (less, fewer) = counted(workspace, program, work, few)?;
    let (more, all) = counted(workspace, program, work, many)?;
    ensure!(
        all > fewer && more > less,
        "{work}: {less} instructions for {fewer} deliveries, {more} for {all}"
    );
    Ok((more - less) as f64 / (all - fewer) as f64)
}

/// Instructions of one run, and its deliveries.
fn counted(workspace: &Workspace, program: &Path, work: &str, messages: u32) -> anyhow::Result<(u64, u64)> {
    let folder = workspace.target().join("instructions");
    std::fs::create_dir_all(&folder)?;
    let mut command = workspace.command("valgrind");
    command.args(["--tool=callgrind", "--collect-atstart=yes"]);
    command.arg(format!("--toggle-collect={PHONES}"));
    command.arg(format!("--callgrind-out-file={}", folder.join(format!("{work}-{messages}.out")).display()));
    command.arg(program).args(["--work", work, "--messages", &messages.to_string()]);
    let (mut instructions, mut deliveries) = (None, None);
    let done = run(&mut command, RUN_LIMIT, |line| {
        instructions = collected(line).or(instructions);
        deliveries = line.trim().parse::<u64>().ok().or(deliveries);
    })?;
    ensure!(done, "{work} with {messages} messages failed under callgrind");
    let instructions = instructions.context("callgrind does not say what it collected")?;
    Ok((instructions, deliveries.context("the program does not say how many deliveries there were")?))
}

/// Reads `==77== Collected : 12345`.
fn collected(line: &str) -> Option<u64> {
    line.strip_prefix("==")?.split_once("Collected :")?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_rise_fails() {
        for (now, kept, want) in [
            (103.0, Some(100.0), Judged::Holds(3.0)),
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
        let kept = Kept { compiler: "rustc 1.2.3 (\"x\")".to_owned(), per_delivery: figures };
        assert_eq!(Kept::read(&kept.write()).unwrap(), kept);
        for text in
            ["", "compiler = 1", "compiler = \"x\"", "compiler = \"x\"\n[per_delivery]\na = \"b\"", "="]
        {
            assert!(Kept::read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn callgrind_is_understood() {
        assert_eq!(collected("==4711== Collected : 912345"), Some(912_345));
        assert_eq!(collected("==4711== Events    : Ir"), None);
        assert_eq!(collected("Collected : 1"), None);
    }
}

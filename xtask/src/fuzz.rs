//! Fuzzing: which targets there are, and running each for a while.
//!
//! - Targets are what `fuzz/Cargo.toml` lists as `[[bin]]`; none at all is an error, not a pass.
//! - A target that executed no input fails, whatever it says.
//! - `fuzz/corpus/TARGET` is read and never written; new inputs go below the target folder.

use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use toml::{Table, Value};

use crate::run::{Workspace, ask, run};
use crate::tally::Tally;
use crate::tool::{FUZZ, ensure_compilers};

/// Memory of a fuzz target, MiB; more is a finding.
const RSS_MIB_MAX: u32 = 2048;

/// Time of one input, seconds; more is a finding.
const INPUT_SECONDS_MAX: u32 = 10;

/// Time to build the targets, beyond the time they run.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// The names of all fuzz targets, in the order of `fuzz/Cargo.toml`.
///
/// # Errors
/// When the manifest can't be read or lists none.
pub(crate) fn targets(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let manifest = workspace.root().join("fuzz/Cargo.toml");
    let text = std::fs::read_to_string(&manifest).context("can't read fuzz/Cargo.toml")?;
    targets_of(&text)
}

fn targets_of(manifest: &str) -> anyhow::Result<Vec<String>> {
    let manifest: Table = manifest.parse().context("fuzz/Cargo.toml is not TOML")?;
    let bins = manifest.get("bin").and_then(Value::as_array).into_iter().flatten();
    let names: Vec<String> = bins.filter_map(|bin| bin.get("name")?.as_str()).map(str::to_owned).collect();
    anyhow::ensure!(!names.is_empty(), "fuzz/Cargo.toml lists no [[bin]]");
    Ok(names)
}

/// How much libFuzzer tells while it runs. Findings are always told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Every new input, and a pulse.
    Shown,
    /// Only the closing figures.
    Hidden,
}

/// Fuzzes each target for `seconds`; one that finds something fails, the others still run.
///
/// # Errors
/// When cargo-fuzz can't be had.
pub(crate) fn run_all(
    workspace: &Workspace,
    targets: &[String],
    seconds: u64,
    progress: Progress,
) -> anyhow::Result<Tally> {
    ensure_compilers(workspace)?;
    FUZZ.ensure(workspace)?;
    let nightly = ask(workspace.command("rustup").args(["run", "nightly", "rustc", "--version"]));
    match &nightly {
        Some(version) => eprintln!("fuzzing with AddressSanitizer: {}", version.trim()),
        None => eprintln!("no nightly toolchain: fuzzing on this one, without AddressSanitizer"),
    }
    let mut total = Tally::default();
    for target in targets {
        let mut command = command(workspace, target, seconds, nightly.is_some(), progress)?;
        let limit = BUILD_LIMIT + Duration::from_secs(seconds);
        let mut executed = 0;
        let found_nothing = run(&mut command, limit, |line| executed = executions(line).unwrap_or(executed))?;
        let passed = found_nothing && executed > 0;
        let outcome = if passed { "ok" } else { "FAILED" };
        eprintln!("fuzz target {target}: {outcome}, {executed} inputs executed\n");
        total += Tally::of_one(passed);
    }
    Ok(total)
}

fn command(
    workspace: &Workspace,
    target: &str,
    seconds: u64,
    nightly: bool,
    progress: Progress,
) -> anyhow::Result<Command> {
    let kept = workspace.target().join("fuzz/corpus").join(target);
    std::fs::create_dir_all(&kept).with_context(|| format!("can't create {}", kept.display()))?;
    let mut command = if nightly {
        let mut rustup = workspace.command("rustup");
        rustup.args(["run", "nightly", "cargo"]);
        rustup
    } else {
        workspace.command("cargo")
    };
    command.args(["fuzz", "run", "--fuzz-dir", "fuzz"]);
    command.args(["--sanitizer", if nightly { "address" } else { "none" }]);
    command.arg("--target-dir").arg(workspace.target().join("fuzz/build"));
    command.arg(target).arg(&kept);
    let given = workspace.root().join("fuzz/corpus").join(target);
    if given.is_dir() {
        command.arg(given);
    }
    command.arg("--").args([
        format!("-max_total_time={seconds}"),
        format!("-rss_limit_mb={RSS_MIB_MAX}"),
        format!("-timeout={INPUT_SECONDS_MAX}"),
        format!("-verbosity={}", u8::from(progress == Progress::Shown)),
        "-print_final_stats=1".to_owned(),
    ]);
    // The release profile's link-time optimisation would be paid once for each target, and finds nothing.
    command.env("CARGO_PROFILE_RELEASE_LTO", "false");
    Ok(command)
}

/// Reads libFuzzer's `stat::number_of_executed_units: 1946976`.
fn executions(line: &str) -> Option<u64> {
    line.trim().strip_prefix("stat::number_of_executed_units:")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_bins_of_the_manifest() {
        let manifest =
            "[package]\nname = \"f\"\n[[bin]]\nname = \"frame_decode\"\n[[bin]]\nname = \"pair\"\n";
        assert_eq!(targets_of(manifest).unwrap(), ["frame_decode", "pair"]);
    }

    #[test]
    fn executions_are_read_from_the_closing_figures() {
        assert_eq!(executions("stat::number_of_executed_units: 1946976"), Some(1_946_976));
        assert_eq!(executions("stat::average_exec_per_sec:     389395"), None);
    }

    #[test]
    fn no_targets_is_an_error() {
        assert!(targets_of("[package]\nname = \"f\"\n").is_err());
    }
}

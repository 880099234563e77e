//! Fuzzing: which targets there are, and running each for a while.
//!
//! - Targets are what `fuzz/Cargo.toml` lists as `[[bin]]`; none at all is an error, not a pass.
//! - `fuzz/corpus/TARGET` is read and never written; new inputs go below the target folder.

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

/// Fuzzes each target for `seconds`; one that finds something fails, the others still run.
///
/// # Errors
/// When cargo-fuzz can't be had.
pub(crate) fn run_all(workspace: &Workspace, targets: &[String], seconds: u64) -> anyhow::Result<Tally> {
    ensure_compilers(workspace)?;
    FUZZ.ensure(workspace)?;
    let nightly = ask(workspace.command("rustup").args(["run", "nightly", "rustc", "--version"]));
    match &nightly {
        Some(version) => eprintln!("fuzzing with AddressSanitizer: {}", version.trim()),
        None => eprintln!("no nightly toolchain: fuzzing on this one, without AddressSanitizer"),
    }
    let mut total = Tally::default();
    for target in targets {
        let found_nothing = run_one(workspace, target, seconds, nightly.is_some())?;
        eprintln!("fuzz target {target}: {}", if found_nothing { "ok" } else { "FAILED" });
        total += Tally::of_one(found_nothing);
    }
    Ok(total)
}

fn run_one(workspace: &Workspace, target: &str, seconds: u64, nightly: bool) -> anyhow::Result<bool> {
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
        "-print_final_stats=1".to_owned(),
    ]);
    run(&mut command, BUILD_LIMIT + Duration::from_secs(seconds), |_| ())
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
    fn no_targets_is_an_error() {
        assert!(targets_of("[package]\nname = \"f\"\n").is_err());
    }
}

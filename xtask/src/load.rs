//! Many phones against a gateway: the load generator, built with the gateway for release.
//!
//! Not here: what it measures and how (`benches/load`).

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use crate::run::{Workspace, run};
use crate::tally::Tally;
use crate::tool;

/// Time for the build.
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Time for the run in CI; it takes 95 s on two cores, built for development, with compilers beside it.
const SHORT_LIMIT: Duration = Duration::from_secs(8 * 60);

/// How many phones there are in CI. Each end of each connection is on the same machine.
const PHONES: &str = "20000";

/// KiB of the gateway's memory for each of them. Measured: 40.7 with mimalloc, built for release; it hardly varies.
const MEMORY_MAX: &str = "45";

/// Twenty thousand phones are connected, a few of them talk: nobody is turned away, nothing is lost, and who is idle takes little.
///
/// # Errors
/// When the programs can't be built or started.
pub(crate) fn short(workspace: &Workspace) -> anyhow::Result<Tally> {
    let program = build(workspace, &[])?;
    let mut command = workspace.command(program);
    command.args([
        "--phones",
        PHONES,
        "--pairs",
        "10",
        "--rate",
        "50",
        "--seconds",
        "10",
        "--connect-rate",
        "400",
    ]);
    command.args(["--memory-max", MEMORY_MAX]);
    Ok(Tally::of_one(run(&mut command, SHORT_LIMIT, |_| ())?))
}

/// The generator with these flags, built for release.
///
/// # Errors
/// When the programs can't be built.
pub(crate) fn command(workspace: &Workspace, args: Vec<OsString>) -> anyhow::Result<std::process::Command> {
    let mut command = workspace.command(build(workspace, &["--release"])?);
    // Files are named from where we are called.
    command.current_dir(std::env::current_dir()?).args(args);
    Ok(command)
}

fn build(workspace: &Workspace, profile: &[&str]) -> anyhow::Result<PathBuf> {
    tool::ensure_compilers(workspace)?;
    let packages = ["build", "--package", "fulmar-load", "--package", "fulmar-gateway"];
    let mut build = workspace.cargo(packages.iter().chain(profile));
    anyhow::ensure!(run(&mut build, BUILD_LIMIT, |_| ())?, "the load generator can't be built");
    let folder = if profile.is_empty() { "debug" } else { "release" };
    Some(workspace.target().join(folder).join("fulmar-load"))
        .filter(|file| file.is_file())
        .context("no fulmar-load")
}

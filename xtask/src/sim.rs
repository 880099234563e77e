//! Whole worlds in virtual time: campaigns over seeds, the weak-network bars, and what typical days cost.
//!
//! - The program is built with the same profile as the tests, so that a test run builds nothing twice.
//!
//! Not here: what happens in a world, and what counts as a failure (`sim`).

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use crate::run::{Workspace, run};
use crate::steps::counted_within;
use crate::tally::{Tally, of_rig};
use crate::tool;

/// Time to build the programs.
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);

/// No campaign takes longer.
const CAMPAIGN_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// What a campaign is told.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct SimArgs {
    /// First seed; without it, seeds that once found something come first, then those from 0
    #[arg(long, value_name = "S")]
    from: Option<u64>,
    /// Write what was found as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the event log of the last seed
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Show what gateway and SDK trace, with the world's time; FILTER as for `fulmar --log`, e.g. fulmar_gateway=debug
    #[arg(long, value_name = "FILTER")]
    trace: Option<String>,
}

/// What the bars are told.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct BarsArgs {
    /// Only figures whose names hold this
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Worlds for each figure that depends on chance
    #[arg(long, value_name = "N", default_value_t = 4)]
    worlds: u64,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the event log of the last world
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// What the days are told.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct DaysArgs {
    /// Only days whose names hold this
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Worlds for each day
    #[arg(long, value_name = "N", default_value_t = 2)]
    worlds: u64,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the event log of the last world
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// Runs the worlds of `seeds` seeds.
///
/// # Errors
/// When the program can't be built or does not say how it went.
pub(crate) fn worlds(workspace: &Workspace, seeds: u64, args: &SimArgs) -> anyhow::Result<Tally> {
    let mut command = workspace.command(program(workspace, "worlds")?);
    command.args(["--seeds", &seeds.to_string()]);
    if let Some(from) = args.from {
        command.args(["--from", &from.to_string()]);
    }
    if let Some(json) = &args.json {
        command.arg("--json").arg(json);
    }
    if let Some(log) = &args.log {
        command.arg("--log").arg(log);
    }
    if let Some(filter) = &args.trace {
        command.args(["--trace", filter]);
    }
    counted_within(&mut command, CAMPAIGN_LIMIT, of_rig)
}

/// Measures the weak-network figures beside their bars.
///
/// # Errors
/// When the program can't be built or started.
pub(crate) fn bars(workspace: &Workspace, args: &BarsArgs) -> anyhow::Result<bool> {
    let mut command = workspace.command(program(workspace, "bars")?);
    command.args(["--worlds", &args.worlds.to_string()]);
    if let Some(only) = &args.only {
        command.args(["--only", only]);
    }
    if let Some(json) = &args.json {
        command.arg("--json").arg(json);
    }
    if let Some(log) = &args.log {
        command.arg("--log").arg(log);
    }
    Ok(command.status().context("the bars can't be started")?.success())
}

/// Measures what typical days cost a phone.
///
/// # Errors
/// When the program can't be built or started.
pub(crate) fn days(workspace: &Workspace, args: &DaysArgs) -> anyhow::Result<bool> {
    let mut command = workspace.command(program(workspace, "days")?);
    command.args(["--worlds", &args.worlds.to_string()]);
    if let Some(only) = &args.only {
        command.args(["--only", only]);
    }
    if let Some(json) = &args.json {
        command.arg("--json").arg(json);
    }
    if let Some(log) = &args.log {
        command.arg("--log").arg(log);
    }
    Ok(command.status().context("the days can't be started")?.success())
}

fn program(workspace: &Workspace, name: &str) -> anyhow::Result<PathBuf> {
    tool::ensure_compilers(workspace)?;
    let mut build = workspace.cargo(["build", "--package", "fulmar-sim", "--bins"]);
    anyhow::ensure!(run(&mut build, BUILD_LIMIT, |_| ())?, "the simulator can't be built");
    Ok(workspace.target().join("debug").join(name))
}

//! The rigs of the store: power cuts, kills, damaged disks. Each engine that keeps data on a disk is tried.
//!
//! - The rig and the library it preloads are built first; what they do is told by `store-rig --help`.
//! - Findings are left in `target/store-rig`, each with the command that shows it again.
//!
//! Not here: what is tried and what counts as a failure (`store/rig`).

use std::time::Duration;

use crate::run::{Workspace, run};
use crate::steps::counted_within;
use crate::tally::{Tally, of_rig};
use crate::tool;

/// Engines, by their names in `store-rig`.
const ENGINES: [&str; 2] = ["sled", "fjall"];

/// Time to build the rig.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// No campaign takes longer.
const CAMPAIGN_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// What all rigs are told.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct RigArgs {
    /// What everything follows from, as far as threads let it; without it, another one each time
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Try only this engine
    #[arg(long, value_name = "NAME", value_parser = ENGINES)]
    engine: Option<String>,
    /// Passed on to the rig, see `store-rig --help`
    #[arg(last = true, value_name = "ARGS")]
    rest: Vec<String>,
}

/// Runs a command of the rig for each engine.
///
/// # Errors
/// When the rig can't be built or does not say how it went.
pub(crate) fn rig(workspace: &Workspace, command: &[String], args: &RigArgs) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    let mut build =
        workspace.cargo(["build", "--package", "fulmar-faultdisk", "--package", "fulmar-store-rig"]);
    anyhow::ensure!(run(&mut build, BUILD_LIMIT, |_| ())?, "the rig can't be built");
    let program = workspace.target().join("debug/store-rig");
    let mut total = Tally::default();
    for engine in ENGINES {
        if args.engine.as_deref().is_some_and(|wanted| wanted != engine) {
            continue;
        }
        let mut rig = workspace.command(&program);
        rig.args(command).args(["--engine", engine]);
        if let Some(seed) = args.seed {
            rig.args(["--seed", &seed.to_string()]);
        }
        rig.args(&args.rest);
        total += counted_within(&mut rig, CAMPAIGN_LIMIT, of_rig)?;
    }
    Ok(total)
}

/// The words of a command: its name and its counts.
pub(crate) fn words(name: &str, counts: &[(&str, u64)], workspace: &Workspace) -> Vec<String> {
    let findings = workspace.target().join("store-rig");
    let mut words = vec![name.to_owned(), "--findings".to_owned(), findings.to_string_lossy().into_owned()];
    for (option, count) in counts {
        words.extend([(*option).to_owned(), count.to_string()]);
    }
    words
}

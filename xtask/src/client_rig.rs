//! The rig of the SDK: apps killed at work over a bad network, with a real gateway.
//!
//! - The rig and the gateway are built first; what it does is told by `client-rig --help`.
//! - Findings are left in `target/client-rig`, each with the command that shows it again.
//!
//! Not here: what the apps do and what counts as a failure (`client-sdk/rig`).

use std::time::Duration;

use crate::run::{Workspace, run};
use crate::steps::counted_within;
use crate::tally::{Tally, of_rig};
use crate::tool;

/// Time to build the rig and the gateway.
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

/// No campaign takes longer.
const CAMPAIGN_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Sees that planted faults are found, if that is asked for, and kills apps `rounds` times.
///
/// # Errors
/// When the rig can't be built or does not say how it went.
pub(crate) fn kill(
    workspace: &Workspace,
    rounds: u64,
    seed: Option<u64>,
    prove: bool,
) -> anyhow::Result<Tally> {
    tool::ensure_compilers(workspace)?;
    let mut build =
        workspace.cargo(["build", "--package", "fulmar-client-rig", "--package", "fulmar-gateway"]);
    anyhow::ensure!(run(&mut build, BUILD_LIMIT, |_| ())?, "the rig can't be built");
    let program = workspace.target().join("debug/client-rig");
    let mut total = Tally::default();
    let rounds = rounds.to_string();
    let commands: [&[&str]; 2] = [&["prove"], &["kill", "--rounds", &rounds]];
    for words in commands.into_iter().skip(usize::from(!prove)) {
        let mut rig = workspace.command(&program);
        rig.args(words).arg("--findings").arg(workspace.target().join("client-rig"));
        if let Some(seed) = seed {
            rig.args(["--seed", &seed.to_string()]);
        }
        total += counted_within(&mut rig, CAMPAIGN_LIMIT, of_rig)?;
    }
    Ok(total)
}

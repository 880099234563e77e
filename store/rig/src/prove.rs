//! Do the rigs find what they are there for? Faults are planted, and each must be found.

use std::path::{Path, PathBuf};

use crate::{
    damage::{self, Damage},
    kill::{self, Kill},
    power::{self, Outcome, Plant, PowerCut},
    scratch::Scratch,
    work::{Engine, Level, ValueName as _},
};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Prove {
    /// Engine of the store
    #[arg(long, value_enum, default_value_t)]
    pub engine: Engine,
    /// What everything follows from, as far as threads let it; if not given, another one each time
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// The library to preload; if not given, the one beside this program
    #[arg(long, value_name = "FILE")]
    pub preload: Option<PathBuf>,
}

/// Plants every fault.
///
/// # Errors
/// When a rig could not be run.
pub fn run(ask: &Prove) -> anyhow::Result<Outcome> {
    let seed = ask.seed.unwrap_or_else(crate::scratch::new_seed);
    let scratch = Scratch::new()?;
    let mut outcome = Outcome::default();
    let mut note = |fault: &str, of_run: Outcome| {
        let found = of_run.failed > 0;
        outcome.passed += u64::from(found);
        outcome.failed += u64::from(!found);
        let verdict = if found { "found" } else { "NOT FOUND" };
        eprintln!("planted: {fault:<58} {verdict} ({} of {})", of_run.failed, of_run.failed + of_run.passed);
    };
    let power = |plant: Option<Plant>, durability: Level| {
        power::run(&PowerCut {
            images: 60,
            seed: Some(seed),
            engine: ask.engine,
            durability,
            per_recording: 60,
            any_order: false,
            faults: 0,
            spare: Vec::new(),
            jobs: 2,
            plant,
            replay: None,
            keep: None,
            findings: below(scratch.path(), &plant.map_or_else(String::new, |plant| plant.value_name())),
            preload: ask.preload.clone(),
            quiet: true,
        })
    };
    note("power cut: syncs that do nothing", power(Some(Plant::LyingSync), Level::Power)?);
    note("power cut: folders that are not synced", power(Some(Plant::NoFolderSync), Level::Power)?);
    note(
        "power cut: an acknowledged commit that is not there",
        power(Some(Plant::LostCommit), Level::Power)?,
    );
    note("power cut: a store that was opened at the level `process`", power(None, Level::Process)?);
    let kills = Kill {
        rounds: 10,
        open_rounds: 2,
        seed: Some(seed),
        engine: ask.engine,
        per_folder: 5,
        plant: true,
        findings: below(scratch.path(), "kill"),
        preload: ask.preload.clone(),
        quiet: true,
    };
    note("kill: an acknowledged commit that is not there", kill::run(&kills)?);
    let damages = Damage {
        images: 60,
        seed: Some(seed),
        engine: ask.engine,
        per_folder: 30,
        only: String::new(),
        jobs: 2,
        plant: true,
        findings: below(scratch.path(), "damage"),
        preload: ask.preload.clone(),
        quiet: true,
    };
    note("damage: an answer that is not what was written", damage::run(&damages)?);
    Ok(outcome)
}

fn below(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("findings-{name}"))
}

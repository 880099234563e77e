//! `fulmar store`: looking after the data folder, beside the gateway or instead of it.
//!
//! - What only reads and can bear a running gateway says so in its help; everything else refuses a folder that is in use.
//! - The answer goes to standard output, as text or as one JSON object; progress goes to standard error.
//! - The exit code says whether the folder is sound: 3 is for damage, whatever was asked for.
//!
//! Not here: the work itself (`fulmar_store`).

mod care;
mod copy;
mod lines;
mod meter;
mod numbers;
mod stop;
mod words;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};
use fulmar_store::{MaintainError, OpenError, ReadError};
use serde::Serialize;

use super::ConfigArgs;
use crate::config::Config;

/// Exit code when the folder is damaged.
const DAMAGED: u8 = 3;

const EXAMPLES: &str = "\
Examples:
  fulmar store stats                          how large, how old, how many
  fulmar store backup /backup/fulmar          a copy, beside a running gateway
  fulmar store verify -d /backup/fulmar       is every byte as it was written?
  fulmar store export all.jsonl.zst           everything as lines of JSON
  fulmar store import all.jsonl.zst -d new    a new data folder from it

Beside a running gateway work stats and backup; the others need the gateway
stopped, or a copy of its folder, and refuse otherwise.

Exit codes:
  0   done; for verify and scrub: nothing is wrong
  1   failed; the line on standard error says why and what to do
  2   wrong flags or configuration
  3   damage was found; the answer says where";

/// Flags of `fulmar store`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
pub struct StoreArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: StoreCommand,
}

/// What can be done to a data folder.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Show how large it is and what is in it; also beside a running gateway
    Stats(care::StatsArgs),
    /// Read every byte and prove it; says what is damaged and where
    Verify(care::VerifyArgs),
    /// Verify, and make again what can be made again without loss: the index
    Scrub(care::ScrubArgs),
    /// Write everything as lines of JSON, for other programs or for `import`
    Export(lines::ExportArgs),
    /// Make a new data folder from an export
    Import(lines::ImportArgs),
    /// Merge what can be merged, give back the space of what is gone, and make the index again
    Compact(care::CompactArgs),
    /// Change the engine that keeps the index; can be stopped, and goes on when run again
    Migrate(care::MigrateArgs),
    /// Bring a folder of an older program to the newest format, as the first start would
    Upgrade(care::UpgradeArgs),
    /// Copy the data folder, also beside a running gateway; again into the same place: only what is new
    Backup(copy::BackupArgs),
    /// Make a new data folder of everything in a damaged one that can be proven
    Salvage(copy::SalvageArgs),
}

/// Flags that every command has.
#[derive(Debug, Args)]
pub struct FolderArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Where the configuration, and with it the data folder, is.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Runs the command.
///
/// # Errors
/// One line that says what to do; damage is an exit code instead.
pub fn run(args: &StoreArgs) -> anyhow::Result<ExitCode> {
    let (done, json) = match &args.command {
        StoreCommand::Stats(args) => (care::stats(args), args.folder.json),
        StoreCommand::Verify(args) => (care::verify(args), args.folder.json),
        StoreCommand::Scrub(args) => (care::scrub(args), args.folder.json),
        StoreCommand::Export(args) => (lines::export(args), args.folder.json),
        StoreCommand::Import(args) => (lines::import(args), args.folder.json),
        StoreCommand::Compact(args) => (care::compact(args), args.folder.json),
        StoreCommand::Migrate(args) => (care::migrate(args), args.folder.json),
        StoreCommand::Upgrade(args) => (care::upgrade(args), args.folder.json),
        StoreCommand::Backup(args) => (copy::backup(args), args.folder.json),
        StoreCommand::Salvage(args) => (copy::salvage(args), args.folder.json),
    };
    let Err(error) = done else { return done };
    if json {
        let text = super::in_one_line(&error);
        super::answer(&serde_json::json!({ "error": text }).to_string())?;
    }
    if !error.downcast_ref::<MaintainError>().is_some_and(is_damage) {
        return Err(error);
    }
    eprintln!("fulmar: {}", super::in_one_line(&error));
    Ok(ExitCode::from(DAMAGED))
}

/// What lies on disk is not what was written.
fn is_damage(error: &MaintainError) -> bool {
    match error {
        MaintainError::Damaged { .. } | MaintainError::Read(ReadError::Damaged { .. }) => true,
        MaintainError::Folder(error) => {
            matches!(error, OpenError::Damaged { .. } | OpenError::Settled { .. } | OpenError::Marker { .. })
        }
        _ => false,
    }
}

/// The store's error, with what an operator can do about it here.
fn explained(error: MaintainError) -> anyhow::Error {
    match error {
        MaintainError::Folder(OpenError::InUse { path, pid }) => {
            let by = pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
            anyhow::anyhow!(
                "the data folder {} is in use by {by}: stop it first; or copy the folder with `fulmar store backup`, which \
                 works beside it, and use the copy",
                path.display()
            )
        }
        error => error.into(),
    }
}

/// The folder of the log in the data folder that is configured, or that folder itself if it is one.
fn folder(config: &Config) -> anyhow::Result<PathBuf> {
    let data = &config.data.path;
    if data.join("FORMAT").exists() {
        return Ok(data.clone());
    }
    let store = data.join("store");
    if store.is_dir() {
        return Ok(store);
    }
    if data.exists() {
        bail!("{} is not a data folder (it has no folder \"store\"): name one with --data", data.display());
    }
    bail!("there is no data folder {}: name one with --data", data.display())
}

/// Where the log lies in a data folder that is made now.
fn new_folder(data: &Path) -> anyhow::Result<PathBuf> {
    if data.join("FORMAT").exists() {
        bail!("{} holds a log already: name another folder", data.display());
    }
    std::fs::create_dir_all(data)
        .map_err(|error| anyhow::anyhow!("can't make the folder {}: {error}", data.display()))?;
    Ok(data.join("store"))
}

/// Puts the answer out: text for people, or one object.
fn report(json: bool, object: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string(object)? } else { text() };
    super::answer(&text)?;
    Ok(())
}

/// Lets the store's warnings through, and only those.
fn hear_warnings(config: &Config) -> anyhow::Result<()> {
    let log =
        crate::config::LogConfig { filter: "error,fulmar_store=error".to_owned(), ..config.log.clone() };
    crate::telemetry::start(&log)?;
    Ok(())
}

//! `fulmar store backup` and `salvage`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use fulmar_store::{BackupReport, SalvageReport};

use super::meter::Meter;
use super::stop::{self, Then};
use super::words::{bytes, many};
use super::{DAMAGED, FolderArgs};

const BACKUP_EXAMPLES: &str = "\
Examples:
  fulmar store backup /backup/fulmar          of ./fulmar-data
  fulmar store backup /backup/fulmar          again: only what is new is copied
  17 * * * *  fulmar store backup -d /srv/fulmar /backup/fulmar    every hour

It works beside a running gateway. The copy is a data folder: of each shard it
has everything up to one commit that was acknowledged while it was made, and
nothing after it. Segments on the same file system are links, and cost nothing.
Keys and certificate are not copied: keep keys/ and tls/ elsewhere, once.

To restore: stop the gateway, move the broken folder away, copy the backup to
its place (cp -a), put keys/ and tls/ back, start the gateway.";

const SALVAGE_EXAMPLES: &str = "\
Examples:
  fulmar store salvage /srv/saved             of ./fulmar-data
  fulmar store salvage /srv/saved -d /srv/fulmar --json > lost.json

Everything that proves itself goes into a new data folder; what was lost is
listed by conversation and records. The damaged folder is not changed: keep it
until you have seen the list. A backup that verifies is better than this.
The exit code is 0 if nothing was lost, and 3 if something was.";

/// Flags of `fulmar store backup`.
#[derive(Debug, Args)]
#[command(after_help = BACKUP_EXAMPLES)]
pub struct BackupArgs {
    /// Data folder of the copy: new, or an earlier backup of the same folder
    #[arg(value_name = "DIR")]
    pub to: PathBuf,
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Flags of `fulmar store salvage`.
#[derive(Debug, Args)]
#[command(after_help = SALVAGE_EXAMPLES)]
pub struct SalvageArgs {
    /// Data folder for what is saved: new or empty
    #[arg(value_name = "DIR")]
    pub to: PathBuf,
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Copies the folder.
pub(super) fn backup(args: &BackupArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let from = super::folder(&config)?;
    let to = super::new_folder(&args.to)?;
    super::hear_warnings(&config)?;
    stop::watch(Then::End("run it again to go on"))?;
    let mut meter = Meter::start();
    let done = fulmar_store::backup(&from, &to, &mut |told| meter.update(told));
    let took = meter.elapsed();
    drop(meter);
    let report = done.map_err(super::explained)?;
    super::report(args.folder.json, &report, || {
        copied(&args.to.display().to_string(), &report, took.as_secs_f64())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn copied(to: &str, report: &BackupReport, seconds: f64) -> String {
    let sum = |of: fn(&fulmar_store::ShardCopied) -> u64| report.shards.iter().map(of).sum::<u64>();
    let mut text = format!(
        "{to}: {} in {}, {} written in {seconds:.1} s; {} linked, {} kept from before\n",
        bytes(sum(|shard| shard.bytes)),
        many(sum(|shard| shard.segments), "segment"),
        bytes(sum(|shard| shard.copied_bytes)),
        sum(|shard| shard.linked),
        sum(|shard| shard.kept),
    );
    for shard in &report.shards {
        text.push_str(&format!("shard {}: everything up to commit {}\n", shard.shard, shard.last_commit));
    }
    text
}

/// Saves what can be proven.
pub(super) fn salvage(args: &SalvageArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let from = super::folder(&config)?;
    let to = super::new_folder(&args.to)?;
    super::hear_warnings(&config)?;
    stop::watch(Then::End("remove what was begun, and run it again"))?;
    let mut meter = Meter::start();
    let done = fulmar_store::salvage(&from, &to, &mut |told| meter.update(told));
    drop(meter);
    let report = done.map_err(super::explained)?;
    super::report(args.folder.json, &report, || saved(&args.to.display().to_string(), &report))?;
    Ok(ExitCode::from(if is_whole(&report) { 0 } else { DAMAGED }))
}

fn is_whole(report: &SalvageReport) -> bool {
    report.lost.is_empty() && report.shards.iter().all(|shard| shard.damage.is_empty())
}

fn saved(to: &str, report: &SalvageReport) -> String {
    let mut text = String::new();
    for lost in &report.lost {
        text.push_str(&format!(
            "lost: shard {}, conversation {}, records {} to {}: {}\n",
            lost.shard, lost.conversation, lost.seqs.0, lost.seqs.1, lost.what
        ));
    }
    for shard in &report.shards {
        for damage in &shard.damage {
            text.push_str(&format!("damaged: shard {}: {damage}\n", shard.shard));
        }
    }
    let sum = |of: fn(&fulmar_store::ShardSalvaged) -> u64| report.shards.iter().map(of).sum::<u64>();
    text.push_str(&format!(
        "{to}: {} in {} saved; {} lost",
        many(sum(|shard| shard.records), "record"),
        many(sum(|shard| shard.conversations), "conversation"),
        many(report.lost_records, "record")
    ));
    text
}

//! `fulmar store stats`, `verify`, `scrub`, `compact` and `migrate`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use fulmar_store::{EngineKind, FolderStats, Problem, Repair, ShardFigures, VerifyReport};

use super::meter::Meter;
use super::stop::{self, Then};
use super::words::{bytes, grouped, many, table, time};
use super::{DAMAGED, FolderArgs};
use crate::gateway::store_options;

const STATS_EXAMPLES: &str = "\
Examples:
  fulmar store stats                          of ./fulmar-data
  fulmar store stats -d /srv/fulmar --json | jq '[.shards[].segment_bytes] | add'

Nothing is opened, locked or changed: it works beside a running gateway, and on
a folder that is damaged. What is read is a moment's view of each shard.";

const VERIFY_EXAMPLES: &str = "\
Examples:
  fulmar store verify                         of ./fulmar-data
  fulmar store verify -d /backup/fulmar --json > report.json

Every byte of log, segments and index is read and compared with its checksums
and with each other; nothing is changed. What is wrong is listed with its file,
conversation and records, and whether it can be made right:
  start   the next start makes it right, nothing is lost
  index   `fulmar store scrub` makes the index again, nothing is lost
  no      restore a backup, or `fulmar store salvage` what can be proven
The exit code is 0 if nothing is wrong, and 3 if something is.";

const SCRUB_EXAMPLES: &str = "\
Examples:
  fulmar store scrub
  fulmar store scrub -d /srv/fulmar --json

As verify; and where only the index is wrong, it is made again from the
segments. A running gateway scrubs by itself, in the background.";

const COMPACT_EXAMPLES: &str = "\
Examples:
  fulmar store compact
  fulmar store compact -d /srv/fulmar --json

Segments are merged without what retention took and without rows that were
replaced, and the index is made again from them and compared. A running gateway
merges by itself where it pays; this does it everywhere, now. It needs room for
the segments being merged a second time. It can be stopped at any time, and run
again.";

const MIGRATE_EXAMPLES: &str = "\
Examples:
  fulmar store migrate --to fjall             then set data.engine = \"fjall\"
  fulmar store migrate --to sled -d /srv/fulmar

Log and segments stay as they are; the index is made again by the other engine,
and every row of it compared. It can be stopped at any time: the folder has the
old engine until all is done, and running it again goes on where it stopped.";

const UPGRADE_EXAMPLES: &str = "\
Examples:
  fulmar store upgrade                        of ./fulmar-data
  fulmar store upgrade -d /srv/fulmar --json

A gateway does this by itself at its first start; here it can be done before
that, with progress. A folder that has the newest format is left as it is.";

/// Flags of `fulmar store stats`.
#[derive(Debug, Args)]
#[command(after_help = STATS_EXAMPLES)]
pub struct StatsArgs {
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Flags of `fulmar store verify`.
#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub struct VerifyArgs {
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Flags of `fulmar store scrub`.
#[derive(Debug, Args)]
#[command(after_help = SCRUB_EXAMPLES)]
pub struct ScrubArgs {
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Flags of `fulmar store compact`.
#[derive(Debug, Args)]
#[command(after_help = COMPACT_EXAMPLES)]
pub struct CompactArgs {
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Flags of `fulmar store migrate`.
#[derive(Debug, Args)]
#[command(after_help = MIGRATE_EXAMPLES)]
pub struct MigrateArgs {
    /// The engine that is to keep the index
    #[arg(long, value_name = "ENGINE", value_parser = ["sled", "fjall"])]
    pub to: String,
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Flags of `fulmar store upgrade`.
#[derive(Debug, Args)]
#[command(after_help = UPGRADE_EXAMPLES)]
pub struct UpgradeArgs {
    /// Of which folder.
    #[command(flatten)]
    pub folder: FolderArgs,
}

/// Shows the figures.
pub(super) fn stats(args: &StatsArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let folder = super::folder(&config)?;
    let stats = fulmar_store::inspect(&folder).map_err(super::explained)?;
    super::report(args.folder.json, &stats, || shown(&folder.display().to_string(), &stats))?;
    let damaged = stats.shards.iter().any(|shard| shard.problem.is_some());
    Ok(ExitCode::from(if damaged { DAMAGED } else { 0 }))
}

fn shown(folder: &str, stats: &FolderStats) -> String {
    let mut text = format!(
        "{folder}: format {}, engine {}, {}, made {}",
        stats.format,
        stats.engine,
        many(stats.shards.len() as u64, "shard"),
        time(stats.created)
    );
    match stats.in_use_by {
        Some(pid) => text.push_str(&format!(", in use by process {pid}\n\n")),
        None => text.push_str(", not in use\n\n"),
    }
    let head = [
        "shard",
        "commits",
        "to settle",
        "segments",
        "cold",
        "records",
        "log",
        "segments'",
        "index",
        "oldest",
        "newest",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let row = |name: String, of: &ShardFigures| {
        vec![
            name,
            grouped(of.acknowledged_commit.max(of.settled_commit)),
            grouped(of.unsettled_commits),
            grouped(of.segments),
            grouped(of.cold_segments),
            grouped(of.records),
            bytes(of.log_bytes),
            bytes(of.segment_bytes),
            bytes(of.index_bytes),
            time(of.oldest),
            time(of.newest),
        ]
    };
    let mut all = ShardFigures::default();
    for of in &stats.shards {
        rows.push(row(of.shard.to_string(), of));
        all.acknowledged_commit += of.acknowledged_commit.max(of.settled_commit);
        all.unsettled_commits += of.unsettled_commits;
        all.segments += of.segments;
        all.cold_segments += of.cold_segments;
        all.records += of.records;
        all.record_bytes += of.record_bytes;
        all.log_bytes += of.log_bytes;
        all.segment_bytes += of.segment_bytes;
        all.index_bytes += of.index_bytes;
        all.leftover_bytes += of.leftover_bytes;
        if of.oldest.get() > 0 && (all.oldest.get() == 0 || of.oldest < all.oldest) {
            all.oldest = of.oldest;
        }
        all.newest = all.newest.max(of.newest);
    }
    rows.push(row("all".to_owned(), &all));
    text.push_str(&table(&rows));
    let on_disk = all.log_bytes + all.segment_bytes + all.index_bytes + all.leftover_bytes;
    text.push_str(&format!("\n{} on disk, {} of it records", bytes(on_disk), bytes(all.record_bytes)));
    if all.leftover_bytes > 0 {
        text.push_str(&format!(", {} left over until the next start", bytes(all.leftover_bytes)));
    }
    text.push('\n');
    for of in &stats.shards {
        if let Some(problem) = &of.problem {
            text.push_str(&format!("shard {}: {problem}\n", of.shard));
        }
    }
    text
}

/// Proves the folder.
pub(super) fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let folder = super::folder(&config)?;
    super::hear_warnings(&config)?;
    stop::watch(Then::End("nothing was changed"))?;
    let mut meter = Meter::start();
    let done = fulmar_store::verify(&folder, &mut |told| meter.update(told));
    drop(meter);
    let found = done.map_err(super::explained)?;
    super::report(args.folder.json, &found, || proven(&folder.display().to_string(), &found))?;
    Ok(ExitCode::from(if found.is_sound() { 0 } else { DAMAGED }))
}

/// Proves the folder, and makes indexes again.
pub(super) fn scrub(args: &ScrubArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let folder = super::folder(&config)?;
    super::hear_warnings(&config)?;
    stop::watch(Then::End("run it again to go on"))?;
    let mut meter = Meter::start();
    let done = fulmar_store::scrub(&folder, &store_options(&config), &mut |told| meter.update(told));
    drop(meter);
    let report = done.map_err(super::explained)?;
    super::report(args.folder.json, &report, || {
        let folder = folder.display().to_string();
        let mut text = proven(&folder, &report.found);
        if let Some(after) = &report.after {
            if !report.made_again.is_empty() {
                text.push_str(&format!(
                    "\nmade again: the index of {}",
                    many(report.made_again.len() as u64, "shard")
                ));
            }
            text.push_str(&format!("\nafter that: {}", proven(&folder, after)));
        }
        text
    })?;
    Ok(ExitCode::from(if report.is_sound() { 0 } else { DAMAGED }))
}

fn proven(folder: &str, found: &VerifyReport) -> String {
    let sum = |of: fn(&fulmar_store::ShardVerified) -> u64| found.shards.iter().map(of).sum::<u64>();
    let mut text = String::new();
    for problem in &found.problems {
        text.push_str(&wrong(problem));
        text.push('\n');
    }
    let listed = found.problems.len() as u64;
    if found.problem_count > listed {
        text.push_str(&format!("… and {} more\n", grouped(found.problem_count - listed)));
    }
    text.push_str(&format!(
        "{folder}: {} in {}, {} of index, {} read at {}/s: ",
        many(sum(|shard| shard.records), "record"),
        many(sum(|shard| shard.conversations), "conversation"),
        many(sum(|shard| shard.rows), "row"),
        bytes(sum(|shard| shard.bytes)),
        bytes(found.bytes_per_second)
    ));
    if found.is_sound() {
        text.push_str("sound");
    } else if found.only_indexes() {
        text.push_str(&format!(
            "{}, but nothing is lost: `fulmar store scrub` makes it right",
            many(found.problem_count, "problem")
        ));
    } else {
        text.push_str(&format!(
            "{}; restore a backup, or keep what can be proven with `fulmar store salvage`",
            many(found.problem_count, "problem")
        ));
    }
    text
}

fn wrong(problem: &Problem) -> String {
    let mut text = String::new();
    if let Some(shard) = problem.shard {
        text.push_str(&format!("shard {shard}, "));
    }
    text.push_str(&problem.file);
    if let Some(conversation) = problem.conversation {
        text.push_str(&format!(", conversation {conversation}"));
    }
    if let Some((first, last)) = problem.seqs {
        text.push_str(&format!(", records {first} to {last}"));
    }
    let repair = match problem.repair {
        Repair::Start => "start",
        Repair::Index => "index",
        Repair::No => "no",
    };
    text.push_str(&format!(": {} [repair: {repair}]", problem.what));
    text
}

/// Merges segments and makes the index again.
pub(super) fn compact(args: &CompactArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let folder = super::folder(&config)?;
    super::hear_warnings(&config)?;
    stop::watch(Then::End("what is done stays done; run it again to go on"))?;
    let mut meter = Meter::start();
    let done = fulmar_store::compact(&folder, &mut |told| meter.update(told));
    let took = meter.elapsed();
    drop(meter);
    let report = done.map_err(super::explained)?;
    super::report(args.folder.json, &report, || {
        format!(
            "{}: {} of {} are now {} of {}; the index had {} and has {}, {} compared; in {:.1} s",
            folder.display(),
            many(report.segments_before, "segment"),
            bytes(report.segment_bytes_before),
            many(report.segments_after, "segment"),
            bytes(report.segment_bytes_after),
            bytes(report.index_bytes_before),
            bytes(report.index_bytes_after),
            many(report.rows, "row"),
            took.as_secs_f64()
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Changes the engine.
pub(super) fn migrate(args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    let engine = EngineKind::from_name(&args.to).context("there is no such engine")?;
    let config = args.folder.config.load(Vec::new())?;
    let folder = super::folder(&config)?;
    super::hear_warnings(&config)?;
    stop::watch(Then::End("run it again to go on"))?;
    let mut meter = Meter::start();
    let done = fulmar_store::migrate(&folder, engine, &mut |told| meter.update(told));
    let took = meter.elapsed();
    drop(meter);
    let report = done.map_err(super::explained)?;
    super::report(args.folder.json, &report, || {
        let folder = folder.display();
        if report.from == report.to {
            return format!("{folder}: the engine is {} already", report.to);
        }
        format!(
            "{folder}: the engine is {} now, and was {}; {} of index in {}, {} compared; in {:.1} s",
            report.to,
            report.from,
            bytes(report.index_bytes_after),
            many(u64::from(report.shards), "shard"),
            many(report.rows, "row"),
            took.as_secs_f64()
        )
    })?;
    if config.data.engine.word() != report.to {
        eprintln!("fulmar: set data.engine = {:?} for the gateway that serves it", report.to);
    }
    Ok(ExitCode::SUCCESS)
}

/// Brings the folder to the newest format.
pub(super) fn upgrade(args: &UpgradeArgs) -> anyhow::Result<ExitCode> {
    let config = args.folder.config.load(Vec::new())?;
    let folder = super::folder(&config)?;
    super::hear_warnings(&config)?;
    stop::watch(Then::End("run it again to go on"))?;
    let mut meter = Meter::start();
    let done = fulmar_store::upgrade(&folder, &mut |told| meter.update(told));
    drop(meter);
    let report = done.map_err(super::explained)?;
    super::report(args.folder.json, &report, || {
        let format = fulmar_store::FORMAT_VERSION;
        if report.from == format {
            return format!("{}: the format is {format} already", folder.display());
        }
        format!(
            "{}: the format is {format}, and was {}; {} in {}",
            folder.display(),
            report.from,
            many(report.records, "record"),
            bytes(report.bytes_after)
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

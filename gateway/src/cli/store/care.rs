//! `fulmar store stats`, `verify`, `scrub`, `compact` and `migrate`.

use std::process::ExitCode;

use clap::Args;
use fulmar_store::{FolderStats, Problem, Repair, ShardFigures, VerifyReport};

use super::meter::Meter;
use super::stop::{self, Then};
use super::words::{bytes, grouped, many, table, time};
use super::{DAMAGED, FolderArgs};

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

Segments are written anew without what retention took, and the index is made
again. A running gateway does this by itself where it pays; this does it
everywhere, now. It needs room for the largest shard a second time. It can be
stopped at any time: what is done stays done.";

const MIGRATE_EXAMPLES: &str = "\
Examples:
  fulmar store migrate --to fjall             then set data.engine = \"fjall\"
  fulmar store migrate --to sled -d /srv/fulmar

The log stays as it is; the index is made again by the other engine and
compared. It can be stopped at any time, and goes on when it is run again.";

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
        "shard", "commits", "to settle", "segments", "cold", "records", "log", "segments'", "index", "oldest", "newest",
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
            "{}, in the index only; nothing is lost: `fulmar store scrub` makes it again",
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
        Repair::Index => "index",
        Repair::No => "no",
    };
    text.push_str(&format!(": {} [repair: {repair}]", problem.what));
    text
}

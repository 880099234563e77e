//! Figures of a data folder, without opening it: beside a running gateway, too.
//!
//! - Only the marker, the manifests, the tips and the lengths of files are read.
//!
//! Not here: figures a running store keeps (`ShardStats`), whether the folder is sound (`verify`).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use fulmar_protocol::id::{ShardId, UnixMillis};
use serde::Serialize;

use super::{
    MaintainError,
    folder::{self, ReadFolder},
};
use crate::{
    files::disk::Disk,
    format::FORMAT_VERSION,
    segment,
    shard::{
        journal,
        manifest::{Entry, Manifest},
        tip::Tip,
    },
};

/// The smallest tier's bound; each next one is [`TIER_STEP`] times as large.
const TIER_FIRST: u64 = 1 << 20;

const TIER_STEP: u64 = 8;

/// Segments of about the same size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tier {
    /// Every segment of the tier has at most so many bytes.
    pub up_to_bytes: u64,
    /// Segments.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Figures of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardFigures {
    /// The shard.
    pub shard: u16,
    /// The edition of the manifest: how often what is settled has changed.
    pub edition: u64,
    /// The last settled commit.
    pub settled_commit: u64,
    /// The last commit that was acknowledged, as far as the tip tells.
    pub acknowledged_commit: u64,
    /// Acknowledged commits that are not settled: they lie in the log.
    pub unsettled_commits: u64,
    /// Segments by size, small ones first.
    pub tiers: Vec<Tier>,
    /// Segments.
    pub segments: u64,
    /// Bytes of segments.
    pub segment_bytes: u64,
    /// Segments in the cold tier among them.
    pub cold_segments: u64,
    /// Records in segments, those that are gone but not yet merged away included.
    pub records: u64,
    /// Bytes of these records.
    pub record_bytes: u64,
    /// Rows in segments, older versions included.
    pub rows: u64,
    /// Bytes of segments that are not records: rows, indexes of runs, headers.
    pub row_bytes: u64,
    /// Time of the oldest record in a segment; zero if there is none.
    pub oldest: UnixMillis,
    /// Time of the newest record in a segment; zero if there is none.
    pub newest: UnixMillis,
    /// Bytes of log files.
    pub log_bytes: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// Bytes of segments the manifest does not name: those being written now, and what an interrupted step left, which the
    /// next start removes.
    pub leftover_bytes: u64,
    /// What could not be read, if anything.
    pub problem: Option<String>,
}

/// Figures of a data folder; see [`inspect`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FolderStats {
    /// The format.
    pub format: u64,
    /// The engine.
    pub engine: String,
    /// When the folder was made.
    pub created: UnixMillis,
    /// The process that has it open, if there is one that could be told.
    pub in_use_by: Option<u32>,
    /// Shard by shard.
    pub shards: Vec<ShardFigures>,
}

/// Looks at the data folder at `path`. A gateway may have it open, and goes on meanwhile.
///
/// # Errors
/// It is not a data folder of this format, or can't be read.
pub fn inspect(path: impl AsRef<Path>) -> Result<FolderStats, MaintainError> {
    let path = path.as_ref();
    let found = ReadFolder::look(path)?;
    Ok(FolderStats {
        format: FORMAT_VERSION,
        engine: found.marker.engine.clone(),
        created: UnixMillis::new(found.marker.created).unwrap_or_default(),
        in_use_by: folder::in_use_by(path),
        shards: found.shards().map(|(shard, at)| figures(shard, &at)).collect(),
    })
}

fn figures(shard: ShardId, at: &Path) -> ShardFigures {
    let mut figures = ShardFigures { shard: shard.get(), ..ShardFigures::default() };
    if let Err(what) = look(shard, at, &mut figures) {
        figures.problem = Some(what);
    }
    figures
}

fn look(shard: ShardId, at: &Path, figures: &mut ShardFigures) -> Result<(), String> {
    let files = Disk::new(at);
    figures.index_bytes = bytes_below(&at.join(crate::store::INDEX));
    let listed = list(at).map_err(|error| format!("its folder can't be read: {error}"))?;
    let logs = listed.iter().filter(|(name, _)| journal::first_of(name).is_some());
    figures.log_bytes = logs.map(|(_, bytes)| bytes).sum();
    let (tip, _) = Tip::read(&files).map_err(|error| format!("the tip can't be read: {error}"))?;
    let manifest = Manifest::load(&files, shard).map_err(|error| error.to_string())?;
    figures.edition = manifest.edition;
    figures.settled_commit = manifest.settled.number;
    figures.acknowledged_commit = tip.number.max(manifest.settled.number);
    figures.unsettled_commits = figures.acknowledged_commit - manifest.settled.number;
    for entry in &manifest.segments {
        add(figures, entry);
    }
    let with_records = manifest.segments.iter().filter(|entry| entry.records > 0);
    figures.oldest = with_records.map(|entry| entry.oldest).min().unwrap_or_default();
    figures.newest = manifest.segments.iter().map(|entry| entry.newest).max().unwrap_or_default();
    let named = |name: &str| manifest.segments.iter().any(|entry| segment::name(entry.id) == name);
    let leftover = listed.iter().filter(|(name, _)| name.ends_with(segment::SUFFIX) && !named(name));
    figures.leftover_bytes = leftover.map(|(_, bytes)| bytes).sum();
    Ok(())
}

fn add(figures: &mut ShardFigures, entry: &Entry) {
    figures.segments += 1;
    figures.segment_bytes += entry.bytes;
    figures.records += entry.records;
    figures.record_bytes += entry.run_bytes;
    figures.rows += entry.rows;
    if entry.cold.is_some() {
        figures.cold_segments += 1;
        figures.row_bytes += entry.bytes;
    } else {
        figures.row_bytes += entry.bytes.saturating_sub(entry.run_bytes);
    }
    let mut bound = TIER_FIRST;
    while bound < entry.bytes {
        bound = bound.saturating_mul(TIER_STEP);
    }
    let at = figures.tiers.partition_point(|tier| tier.up_to_bytes < bound);
    if figures.tiers.get(at).is_none_or(|tier| tier.up_to_bytes != bound) {
        figures.tiers.insert(at, Tier { up_to_bytes: bound, ..Tier::default() });
    }
    if let Some(tier) = figures.tiers.get_mut(at) {
        tier.segments += 1;
        tier.bytes += entry.bytes;
    }
}

/// Names and lengths of the files in a folder; one that is removed meanwhile is not among them.
fn list(at: &Path) -> io::Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(at)? {
        let entry = entry?;
        let Ok(data) = entry.metadata() else { continue };
        if data.is_file()
            && let Some(name) = entry.file_name().to_str()
        {
            found.push((name.to_owned(), data.len()));
        }
    }
    Ok(found)
}

/// Bytes of all files below a folder, as many as can be seen.
fn bytes_below(at: &Path) -> u64 {
    let mut bytes = 0;
    let mut folders: Vec<PathBuf> = vec![at.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            match entry.metadata() {
                Ok(data) if data.is_dir() => folders.push(entry.path()),
                Ok(data) => bytes += data.len(),
                Err(_) => {}
            }
        }
    }
    bytes
}

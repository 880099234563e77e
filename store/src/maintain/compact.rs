//! Making a data folder as small as it can be while nobody has it open.
//!
//! - Neighbouring segments are merged up to [`SEGMENT_BYTES_MAX`] each, without what retention took and without rows that were
//!   replaced; then the index is made again from them, verified like that of another engine (`migrate`), and put in place.
//! - A merged segment counts from the moment the manifest names it, and only then its inputs go. From then on the old index
//!   belongs to nothing: interrupted, opening the folder makes it again.
//! - Segments in the cold tier stay as they are; so does what is not settled yet.
//!
//! Not here: merging while a shard runs (`shard::settler`).

use std::{
    collections::{HashMap, HashSet},
    io,
    ops::Range,
    path::Path,
    sync::Arc,
};

use fulmar_protocol::id::{ConversationId, Seq};
use serde::Serialize;

use super::{
    MaintainError, Progress,
    migrate::{self, Made},
    upgrade,
};
use crate::{
    files::Files,
    key::Table,
    segment::{self, Merge, MergeError, Segment, SegmentWriter, Step, Summary},
    shard::manifest::Entry,
    store::INDEX,
};

/// Bytes of a merged segment at most, about.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Bytes merged or verified between two calls of `progress`.
const STEP_BYTES: usize = 4 << 20;

/// What compacting a folder did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompactReport {
    /// Shards.
    pub shards: u16,
    /// Segments there were.
    pub segments_before: u64,
    /// Segments there are.
    pub segments_after: u64,
    /// Bytes the segments had.
    pub segment_bytes_before: u64,
    /// Bytes the segments have.
    pub segment_bytes_after: u64,
    /// Bytes the indexes had.
    pub index_bytes_before: u64,
    /// Bytes the indexes have.
    pub index_bytes_after: u64,
    /// Rows of the indexes, all of them compared with the segments.
    pub rows: u64,
}

/// Merges the segments of the data folder at `path`, which nobody may have open, and makes its indexes again.
///
/// # Errors
/// The folder is in use, is not one, or is damaged, or there is no room for a merged segment beside those it is made from. The
/// folder can be opened as before, and the work be done again.
pub fn compact(
    path: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<CompactReport, MaintainError> {
    let path = path.as_ref();
    let mut folder = migrate::open_folder(path)?;
    upgrade::if_needed(&mut folder, progress)?;
    let engine = migrate::engine_of(&folder)?;
    let mut report = CompactReport { shards: folder.marker.shards, ..CompactReport::default() };
    for (id, at) in migrate::shards_of(&folder)? {
        migrate::put_in_place(&at, engine).map_err(MaintainError::io("can't replace the index in", &at))?;
        let index_bytes =
            || migrate::bytes_in(&at.join(INDEX)).map_err(MaintainError::io("can't read the index in", &at));
        let mut shard = Made::open(id, &at)?;
        report.segments_before += shard.manifest.segments.len() as u64;
        report.segment_bytes_before += shard.segment_bytes();
        report.index_bytes_before += index_bytes()?;
        clean(&mut shard, progress)?;
        report.segments_after += shard.manifest.segments.len() as u64;
        report.segment_bytes_after += shard.segment_bytes();
        report.rows += migrate::make(&shard, engine, progress)?.unwrap_or(0);
        progress(Progress { shard: id, doing: "replacing the index", done: 0, of: 0 });
        migrate::put_in_place(&at, engine).map_err(MaintainError::io("can't replace the index in", &at))?;
        report.index_bytes_after += index_bytes()?;
    }
    Ok(report)
}

/// What is alive in the segments of a shard.
#[derive(Debug, Default)]
struct Alive {
    /// Bytes of runs readers can still get at, by segment.
    run_bytes: HashMap<u64, u64>,
    /// Segments with records that are gone, in runs of which a part is alive.
    cut: HashSet<u64>,
    /// Segments with rows that are gone.
    gone: HashSet<u64>,
    /// Up to where conversations have lost their records.
    low: HashMap<ConversationId, Seq>,
}

/// Merges segments where that makes them fewer or smaller.
fn clean(shard: &mut Made, progress: &mut dyn FnMut(Progress)) -> Result<(), MaintainError> {
    let path = shard.path.clone();
    drop_replaced(shard).map_err(MaintainError::io("can't write into", &path))?;
    let alive = alive(shard)?;
    let groups = groups(&shard.manifest.segments, &alive);
    let of: u64 = groups
        .iter()
        .flat_map(|group| shard.manifest.segments.get(group.clone()))
        .flatten()
        .map(|e| e.bytes)
        .sum();
    let mut done = 0;
    // The newest first, so that the places of those still to be merged stay as they are.
    for group in groups.into_iter().rev() {
        let entries = shard.manifest.segments.get(group.clone()).unwrap_or_default();
        let inputs: Vec<u64> = entries.iter().map(|entry| entry.id).collect();
        let bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let id = shard.id;
        let mut tell = |part: u64| {
            progress(Progress { shard: id, doing: "merging segments", done: done + part.min(bytes), of });
        };
        tell(0);
        let summary = merge(shard, &inputs, group.start == 0, &alive.low, &mut tell)?;
        tell(bytes);
        take_over(shard, group, &summary).map_err(MaintainError::io("can't write into", &path))?;
        done += bytes;
    }
    Ok(())
}

/// Drops segments whose merged one is there already: the index is made again, so nothing points to them any more.
fn drop_replaced(shard: &mut Made) -> io::Result<()> {
    let replaced: HashSet<u64> =
        shard.manifest.segments.iter().flat_map(|entry| entry.replaces.iter().copied()).collect();
    if replaced.is_empty() {
        return Ok(());
    }
    let mut next = shard.manifest.next().next();
    next.segments.retain(|entry| !replaced.contains(&entry.id));
    for entry in &mut next.segments {
        entry.replaces.clear();
    }
    next.store(&shard.files, shard.id)?;
    shard.manifest = next;
    forget(shard, replaced.iter().copied())
}

fn forget(shard: &Made, segments: impl Iterator<Item = u64>) -> io::Result<()> {
    for id in segments {
        shard.segments.remove(id);
        match shard.files.remove(&segment::name(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn alive(shard: &Made) -> Result<Alive, MaintainError> {
    let mut alive = Alive::default();
    let failed = |error| shard.failed(&error);
    let mut expected = shard.expected()?;
    for table in Table::ALL.into_iter().filter(|table| !matches!(table, Table::Shard | Table::Run)) {
        while expected.next_in(table).map_err(failed)?.is_some() {}
    }
    while let Some(placed) = expected.next_run().map_err(failed)? {
        *alive.run_bytes.entry(placed.segment).or_default() += u64::from(placed.run.bytes);
        if placed.run.first <= expected.low_of(placed.run.conversation) {
            alive.cut.insert(placed.segment);
        }
    }
    alive.low = expected.into_low();
    for entry in &shard.manifest.segments {
        let Some(segment) = shard.segments.get(entry.id) else { continue };
        for row in segment.rows() {
            let (_, _, row) = row
                .map_err(|error| failed(crate::shard::index::IndexError::Segment { id: entry.id, error }))?;
            if row.is_none() {
                alive.gone.insert(entry.id);
                break;
            }
        }
    }
    Ok(alive)
}

/// Neighbouring segments that are to become one, oldest first.
fn groups(segments: &[Entry], alive: &Alive) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0u64;
    for (n, entry) in segments.iter().enumerate() {
        let run_bytes = alive.run_bytes.get(&entry.id).copied().unwrap_or(0);
        let size = entry.bytes.saturating_sub(entry.run_bytes).saturating_add(run_bytes);
        let follows = groups.last().is_some_and(|group| group.end == n);
        if entry.cold.is_some() {
            bytes = 0;
            continue;
        }
        match groups.last_mut() {
            Some(group) if follows && bytes.saturating_add(size) <= SEGMENT_BYTES_MAX => {
                group.end = n + 1;
                bytes += size;
            }
            _ => {
                groups.push(n..n + 1);
                bytes = size;
            }
        }
    }
    groups.retain(|group| {
        group.len() > 1
            || segments.get(group.clone()).unwrap_or_default().iter().any(|entry| {
                let run_bytes = alive.run_bytes.get(&entry.id).copied().unwrap_or(0);
                run_bytes < entry.run_bytes
                    || alive.cut.contains(&entry.id)
                    || (group.start == 0 && alive.gone.contains(&entry.id))
            })
    });
    groups
}

/// Merges segments into a new one, durable and verified.
fn merge(
    shard: &mut Made,
    inputs: &[u64],
    oldest: bool,
    low: &HashMap<ConversationId, Seq>,
    progress: &mut dyn FnMut(u64),
) -> Result<Summary, MaintainError> {
    let id = shard.manifest.next_segment;
    // The number is used up, whatever happens.
    shard.manifest.next_segment = id.saturating_add(1);
    let merged = write(shard, id, inputs, oldest, low, progress);
    if merged.is_err() {
        // It may be the room it takes that is missing; and opening the folder removes it as well.
        let _ = shard.files.remove(&segment::name(id));
    }
    merged
}

fn write(
    shard: &Made,
    id: u64,
    inputs: &[u64],
    oldest: bool,
    low: &HashMap<ConversationId, Seq>,
    progress: &mut dyn FnMut(u64),
) -> Result<Summary, MaintainError> {
    let damaged = |what: String| MaintainError::Damaged { shard: shard.id, what };
    let io = || MaintainError::io("can't write into", &shard.path);
    let mut opened = Vec::with_capacity(inputs.len());
    for input in inputs {
        let missing = || damaged(format!("segment {input:016x} is not there"));
        opened.push(shard.segments.get(*input).ok_or_else(missing)?);
    }
    let out = SegmentWriter::create(&shard.files, shard.id, id).map_err(io())?;
    let low = low.clone();
    let low = Box::new(move |conversation| low.get(&conversation).copied().unwrap_or(Seq::ZERO));
    let mut merge = Merge::new(opened, out, low, oldest);
    let mut done = 0u64;
    let summary = loop {
        match merge.step(STEP_BYTES) {
            Ok(Step::Done(summary)) => break summary,
            Ok(Step::More) => done += STEP_BYTES as u64,
            Err(MergeError::Write(error)) => return Err(io()(error)),
            Err(error) => return Err(damaged(error.to_string())),
        }
        progress(done);
    };
    shard.files.sync_folder().map_err(io())?;
    let new = Segment::open(&shard.files, shard.id, id).map_err(|error| damaged(error.to_string()))?;
    let mut verifier = new.verifier();
    loop {
        match verifier.step(STEP_BYTES) {
            Ok(segment::Progress::Done) => break,
            Ok(segment::Progress::More) => progress(done),
            Err(error) => return Err(damaged(error.to_string())),
        }
    }
    shard.segments.add(id, Arc::new(new));
    Ok(summary)
}

/// Names a merged segment instead of those in `group`, and removes them.
fn take_over(shard: &mut Made, group: Range<usize>, summary: &Summary) -> io::Result<()> {
    // Two editions further: no index is one step behind, because to none the step would be known.
    let mut next = shard.manifest.next().next();
    let inputs: Vec<u64> =
        next.segments.get(group.clone()).unwrap_or_default().iter().map(|entry| entry.id).collect();
    let mut entry = Entry::new(summary, next.edition, inputs.clone());
    entry.replaces.clear();
    next.segments.splice(group, [entry]);
    next.store(&shard.files, shard.id)?;
    shard.manifest = next;
    forget(shard, inputs.into_iter())
}

//! Bringing the engine in line with the segments: it is an index of them, and can be made again at any time.
//!
//! - The `applied` mark says up to which edition of the manifest the engine has everything; it is written behind a barrier
//!   and is itself behind a barrier before the manifest changes again. So an engine that kept its promises stands at
//!   the manifest's edition or one before it. One that stands anywhere else is made again from the segments.
//! - What is applied is absolute: applied twice it changes nothing.
//!
//! - Before an index is used, every row of it is compared with the segments: an engine may lose or mix up versions of rows after
//!   damage without a word. Places of runs are compared with the heads; each is proven once more when the run is read.
//!
//! Not here: when segments are made (`settler`), what a read makes of the rows (`view`).

use std::{
    collections::{HashMap, HashSet},
    iter::Peekable,
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, Seq, ShardId};

use super::{
    manifest::{Entry, Manifest},
    segments::{Placed, Segments},
    truth::{Part, TrueRows},
    view::{next_key, open_row, seal_row},
};
use crate::{
    codec::{Cursor, Malformed, put_varint},
    commit::ChainHash,
    engine::{Direction, Engine, EngineError},
    key::{self, Key, Table},
    row::{Head, Row},
    segment::{Run, Runs, Segment, SegmentError},
};

/// Key of the mark in [`Table::Shard`].
pub(crate) const APPLIED: &[u8] = b"applied";

/// Rows read from the engine at a time.
const PAGE_ROWS: usize = 256;

/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Why an engine could not be brought in line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IndexError {
    /// The engine failed: opened again, or made again, it may work.
    #[error("the index failed: {0}")]
    Engine(#[from] EngineError),
    /// What is to be applied can't be read.
    #[error("segment {id:016x}: {error}")]
    Segment { id: u64, error: SegmentError },
    /// The manifest names a segment that is not there.
    #[error("segment {0:016x} is not there")]
    Missing(u64),
}

/// Where an engine stands: an edition of the manifest, and the last commit settled in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Applied {
    edition: u64,
    chain: ChainHash,
}

/// Where the engine stands; `None` if it can't be told.
fn applied(engine: &dyn Engine) -> Result<Option<Applied>, EngineError> {
    let Some(value) = engine.get(Table::Shard, APPLIED)? else { return Ok(None) };
    let read = || -> Result<Applied, Malformed> {
        let row = open_row(Table::Shard, APPLIED, &value)?;
        let mut at = Cursor::new(&row);
        if at.u8("applied mark")? != 1 {
            return Err(Malformed("applied mark"));
        }
        Ok(Applied { edition: at.varint("applied mark")?, chain: ChainHash(at.array("applied mark")?) })
    };
    Ok(read().ok())
}

/// Says, durably, that the engine has everything the manifest says.
pub(crate) fn set_applied(engine: &dyn Engine, manifest: &Manifest) -> Result<(), EngineError> {
    engine.barrier()?;
    let mut row = vec![1];
    put_varint(&mut row, manifest.edition);
    row.extend_from_slice(&manifest.settled.chain.0);
    engine.insert(Table::Shard, APPLIED, &seal_row(Table::Shard, APPLIED, &row))?;
    engine.barrier()
}

/// How far an engine is from a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Distance {
    /// It has everything.
    Here,
    /// It lacks the last step, or part of it.
    OneStep,
    /// It is of another history, or lost what was behind its barriers: it has to be made again.
    Far,
}

/// Compares an engine's mark with a manifest.
pub(crate) fn distance(engine: &dyn Engine, manifest: &Manifest) -> Result<Distance, EngineError> {
    Ok(match applied(engine)? {
        Some(at) if at == (Applied { edition: manifest.edition, chain: manifest.settled.chain }) => {
            Distance::Here
        }
        Some(at) if at.edition.saturating_add(1) == manifest.edition && at.chain == manifest.before => {
            Distance::OneStep
        }
        // Nothing was ever settled, and nothing ever applied.
        None if manifest.edition == 0 && is_empty(engine)? => Distance::Here,
        None | Some(_) => Distance::Far,
    })
}

fn is_empty(engine: &dyn Engine) -> Result<bool, EngineError> {
    for table in Table::ALL {
        if !engine.scan(table, &[], None, Direction::Ascending, 1)?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Applies the last step of the manifest to an engine that is [`Distance::OneStep`] away.
pub(crate) fn catch_up(
    engine: &dyn Engine,
    segments: &Segments,
    manifest: &Manifest,
) -> Result<(), IndexError> {
    for entry in manifest.segments.iter().filter(|entry| entry.edition == manifest.edition && !entry.merged) {
        let segment = open(segments, entry)?;
        apply(engine, entry.id, &segment)?;
        for row in segment.rows() {
            let (table, key, row) = row.map_err(|error| IndexError::Segment { id: entry.id, error })?;
            if table == Table::Head as u8
                && let (Some(row), Ok(conversation)) = (row, id_at(&key, 0))
                && let Ok(head) = Head::from_row(&row)
                && head.low > Seq::ZERO
            {
                remove_below(engine, conversation, head.low, |_| {})?;
            }
        }
    }
    Ok(set_applied(engine, manifest)?)
}

/// Applies every segment to an empty engine, and says so in its mark.
pub(crate) fn rebuild(
    engine: &dyn Engine,
    segments: &Segments,
    manifest: &Manifest,
    shard: ShardId,
) -> Result<(), IndexError> {
    let began = Instant::now();
    let mut told = began;
    let bytes: u64 = manifest.segments.iter().map(|entry| entry.bytes).sum();
    fill(engine, segments, manifest, |done| {
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            tracing::info!(%shard, bytes = done, of = bytes, "making the index again");
        }
    })?;
    set_applied(engine, manifest)?;
    if !manifest.segments.is_empty() {
        tracing::info!(%shard, bytes, took = ?began.elapsed(), "made the index again from the segments");
    }
    Ok(())
}

/// Applies every segment to an empty engine. `progress`: bytes of segments that were applied.
pub(crate) fn fill(
    engine: &dyn Engine,
    segments: &Segments,
    manifest: &Manifest,
    mut progress: impl FnMut(u64),
) -> Result<(), IndexError> {
    let mut done = 0;
    for entry in &manifest.segments {
        apply(engine, entry.id, &*open(segments, entry)?)?;
        done += entry.bytes;
        progress(done);
    }
    let mut low = Vec::new();
    each_row(engine, Table::Head, |key, value| {
        if let (Ok(conversation), Ok(row)) = (id_at(key, 0), open_row(Table::Head, key, value))
            && let Ok(head) = Head::from_row(&row)
            && head.low > Seq::ZERO
        {
            low.push((conversation, head.low));
        }
        ControlFlow::Continue(())
    })?;
    for (conversation, low) in low {
        remove_below(engine, conversation, low, |_| {})?;
    }
    Ok(())
}

/// Whether the engine has exactly the rows the segments say, and places for all records that are settled. What it can't say is
/// no.
pub(crate) fn proves(
    engine: &dyn Engine,
    segments: &Segments,
    manifest: &Manifest,
    mut progress: impl FnMut(u64),
) -> Result<bool, IndexError> {
    let mut parts = Vec::with_capacity(manifest.segments.len());
    for entry in &manifest.segments {
        parts.push(Part { id: entry.id, segment: open(segments, entry)?, cold: entry.cold.is_some() });
    }
    let known: HashSet<u64> = parts.iter().map(|part| part.id).collect();
    let mut truth = TrueRows::new(&parts);
    let mut heads = Vec::new();
    for table in Table::ALL.into_iter().filter(|table| !matches!(table, Table::Shard | Table::Run)) {
        let mut same = true;
        each_row(engine, table, |key, value| {
            let expected = truth.next_up_to(table as u8);
            same = expected.is_some_and(|row| {
                row.table == table as u8
                    && row.key == key
                    && open_row(table, key, value).is_ok_and(|found| found == row.row)
            });
            if !same {
                return ControlFlow::Break(());
            }
            if table == Table::Head {
                match (
                    id_at(key, 0),
                    value.len().checked_sub(4).map(|end| Head::from_row(&value.slice(..end))),
                ) {
                    (Ok(conversation), Some(Ok(head))) => heads.push((conversation, head.low, head.seq)),
                    _ => same = false,
                }
            }
            progress(truth.bytes);
            ControlFlow::Continue(())
        })?;
        if !same || truth.next_up_to(table as u8).is_some() {
            return Ok(false);
        }
    }
    if !truth.take_broken().is_empty() {
        return Ok(false);
    }
    covers(engine, heads, &known)
}

/// Whether the places of runs lead to all records of each conversation, and into segments there are.
fn covers(
    engine: &dyn Engine,
    heads: Vec<(ConversationId, Seq, Seq)>,
    known: &HashSet<u64>,
) -> Result<bool, IndexError> {
    let mut heads = heads.into_iter().peekable();
    let mut next: Option<(ConversationId, Seq)> = None;
    let mut covered = true;
    each_row(engine, Table::Run, |key, value| {
        let Some(placed) = decode(key, value).filter(|placed| known.contains(&placed.segment)) else {
            covered = false;
            return ControlFlow::Break(());
        };
        let run = placed.run;
        // Heads of conversations before this run's must be reached already.
        while let Some((conversation, low, seq)) = heads.peek().copied() {
            let at = match next {
                Some((of, at)) if of == conversation => at,
                Some(_) | None => low.saturating_add(1),
            };
            if conversation < run.conversation {
                if at <= seq {
                    covered = false;
                    return ControlFlow::Break(());
                }
                heads.next();
                continue;
            }
            if conversation > run.conversation || (run.first > at && at <= seq) {
                covered = false;
                return ControlFlow::Break(());
            }
            next = Some((conversation, at.max(run.last().saturating_add(1))));
            return ControlFlow::Continue(());
        }
        covered = false;
        ControlFlow::Break(())
    })?;
    let rest = heads.all(|(conversation, low, seq)| match next {
        Some((of, at)) if of == conversation => at > seq,
        Some(_) | None => low >= seq,
    });
    Ok(covered && rest)
}

fn open(segments: &Segments, entry: &Entry) -> Result<Arc<Segment>, IndexError> {
    segments.get(entry.id).ok_or(IndexError::Missing(entry.id))
}

/// Puts a segment's rows and the places of its runs into the engine.
pub(crate) fn apply(engine: &dyn Engine, id: u64, segment: &Segment) -> Result<(), IndexError> {
    let broken = |error| IndexError::Segment { id, error };
    for run in segment.runs() {
        place(engine, id, run.map_err(broken)?)?;
    }
    for row in segment.rows() {
        let (number, key, row) = row.map_err(broken)?;
        let Some(table) = Table::from_number(number) else {
            return Err(broken(Malformed("segment: a row of an unknown table").into()));
        };
        match row {
            Some(row) => engine.insert(table, &key, &seal_row(table, &key, &row))?,
            None => engine.remove(table, &key)?,
        }
    }
    Ok(())
}

/// Says where a run lies.
pub(crate) fn place(engine: &dyn Engine, segment: u64, run: Run) -> Result<(), EngineError> {
    let key = Key::run(run.conversation, run.first);
    let row = Placed { segment, run }.encode();
    engine.insert(Table::Run, key.as_ref(), &seal_row(Table::Run, key.as_ref(), &row))
}

/// The place of the run that begins at `first`, if the index has one that can be read.
pub(crate) fn placed(
    engine: &dyn Engine,
    conversation: ConversationId,
    first: Seq,
) -> Result<Option<Placed>, EngineError> {
    let key = Key::run(conversation, first);
    let value = engine.get(Table::Run, key.as_ref())?;
    Ok(value.and_then(|value| decode(key.as_ref(), &value)))
}

fn decode(key: &[u8], value: &Bytes) -> Option<Placed> {
    let row = open_row(Table::Run, key, value).ok()?;
    Placed::decode(id_at(key, 0).ok()?, id_at(key, 1).ok()?, &row).ok()
}

fn id_at<T: TryFrom<u64>>(key: &[u8], n: usize) -> Result<T, Malformed> {
    T::try_from(key::number_at(key, n)?).map_err(|_| Malformed("key"))
}

/// Takes runs that end at `low` or before out of the index, and tells `gone` of each.
pub(crate) fn remove_below(
    engine: &dyn Engine,
    conversation: ConversationId,
    low: Seq,
    mut gone: impl FnMut(&Placed),
) -> Result<(), EngineError> {
    let mut from = Key::run(conversation, Seq::ZERO).into_bytes();
    let to = Key::run(conversation, low.saturating_add(1));
    loop {
        let rows = engine.scan(Table::Run, &from, Some(to.as_ref()), Direction::Ascending, PAGE_ROWS)?;
        let whole_page = rows.len() == PAGE_ROWS;
        for (key, value) in rows {
            // A row that can't be read stays: `verify` reports it.
            if let Some(placed) = decode(&key, &value) {
                if placed.run.last() > low {
                    return Ok(());
                }
                engine.remove(Table::Run, &key)?;
                gone(&placed);
            }
            from = next_key(&key);
        }
        if !whole_page {
            return Ok(());
        }
    }
}

/// Bytes of runs the index points to, by segment.
pub(crate) fn live_bytes(engine: &dyn Engine) -> Result<HashMap<u64, u64>, EngineError> {
    let mut live = HashMap::new();
    each_row(engine, Table::Run, |key, value| {
        if let Some(placed) = decode(key, value) {
            *live.entry(placed.segment).or_default() += u64::from(placed.run.bytes);
        }
        ControlFlow::Continue(())
    })?;
    Ok(live)
}

/// Moves the index from the segments in `from` to the one called `id`, some rows at a time.
#[derive(Debug)]
pub(crate) struct Move {
    id: u64,
    /// Runs of the new segment that are to be placed.
    new: Peekable<Runs>,
    /// Runs of the old segments that are to be looked at, by segment, the newest segment first.
    old: Vec<(u64, Runs)>,
    old_ids: HashSet<u64>,
    /// The new places are behind a barrier, and the old ones may go.
    placed: bool,
}

impl Move {
    pub(crate) fn new(id: u64, segment: &Segment, from: &[(u64, Arc<Segment>)]) -> Self {
        Self {
            id,
            new: segment.runs().peekable(),
            // Taken from the end: the oldest segment first. A conversation's old places then go in the order of their records,
            // and whatever is left of them, between two steps as well, has no gap: before the first old place that is still
            // there, the new ones hold; after it, all old ones are there.
            old: from.iter().rev().map(|(id, segment)| (*id, segment.runs())).collect(),
            old_ids: from.iter().map(|(id, _)| *id).collect(),
            placed: false,
        }
    }

    /// Moves about `rows` rows; `low` says up to where a conversation's records are gone. Returns whether all are moved.
    pub(crate) fn step(
        &mut self,
        engine: &dyn Engine,
        rows: usize,
        mut low: impl FnMut(ConversationId) -> Seq,
    ) -> Result<bool, IndexError> {
        let mut moved = 0;
        let mut conversation = None;
        loop {
            // Not in the middle of a conversation: a new place may hide an old one that reaches further than it does.
            let goes_on = matches!(self.new.peek(), Some(Ok(run)) if Some(run.conversation) == conversation);
            if moved >= rows && !goes_on {
                return Ok(false);
            }
            moved += 1;
            // The new places first: until the old ones are gone, both are right.
            if let Some(run) = self.new.next() {
                let run = run.map_err(|error| IndexError::Segment { id: self.id, error })?;
                conversation = Some(run.conversation);
                if run.last() > low(run.conversation) {
                    place(engine, self.id, run)?;
                }
            } else if !self.placed {
                // Of what no barrier covers, the removals may survive alone.
                engine.barrier()?;
                self.placed = true;
            } else if let Some((id, runs)) = self.old.last_mut() {
                let Some(run) = runs.next() else {
                    self.old.pop();
                    continue;
                };
                let run = run.map_err(|error| IndexError::Segment { id: *id, error })?;
                let there = placed(engine, run.conversation, run.first)?;
                if there.is_some_and(|placed| self.old_ids.contains(&placed.segment)) {
                    engine.remove(Table::Run, Key::run(run.conversation, run.first).as_ref())?;
                }
            } else {
                return Ok(true);
            }
        }
    }
}

/// Calls `each` with every row of a table, until it breaks.
pub(crate) fn each_row(
    engine: &dyn Engine,
    table: Table,
    mut each: impl FnMut(&[u8], &Bytes) -> ControlFlow<()>,
) -> Result<(), EngineError> {
    let mut from = Vec::new();
    loop {
        let rows = engine.scan(table, &from, None, Direction::Ascending, PAGE_ROWS)?;
        for (key, value) in &rows {
            if each(key, value).is_break() {
                return Ok(());
            }
        }
        match rows.last() {
            Some((key, _)) if rows.len() == PAGE_ROWS => from = next_key(key),
            _ => return Ok(()),
        }
    }
}

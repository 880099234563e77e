//! A shard's present state: the index and the segments, and over them what is committed but not yet settled.
//!
//! - Only the committer changes it, one commit at a time ([`View::apply`]); anybody reads.
//! - A read finds a row in the newest layer that has it. Layers are dropped only when the tables have their rows, so a
//!   read never sees less than what was committed before it began.
//! - A cached head is at least as new as the index, and is looked at only if no layer has one. Records never change, so a
//!   cached tail can only be short, not wrong.
//!
//! Not here: writing tables (`settle`), the order of a commit (`committer`).

use std::{
    collections::VecDeque,
    ops::Bound,
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::{
    id::{ConversationId, DeviceId, Epoch, Pseq, Seq, ShardId, UserId},
    limit::SHARDS_MAX,
};
use moka::sync::Cache;
use rustc_hash::FxHashMap;

use super::{
    overlay::{Counters, Overlay, Pending, Touched, full_key},
    segments::{Placed, RunError, Segments},
};
use crate::{
    codec::Malformed,
    commit::{Commit, CommitId},
    engine::{Direction, Engine, EngineError, Entry},
    error::ReadError,
    key::{self, Key, Table},
    op::Op,
    record::Record,
    row::{Head, LaneState, Number, Row},
    segment::{self, SegmentError},
};

/// Records a warm tail keeps.
const TAIL_RECORDS: usize = 128;

/// Bytes of records a warm tail keeps.
pub(crate) const TAIL_BYTES: usize = 32 * 1024;

/// Bytes a cached head costs, about.
const HEAD_BYTES: u64 = 256;

/// Rows of the `run` table read at a time.
const SCAN_ROWS: usize = 8;

/// Runs that can begin within one other: as many as it has records.
const RUNS_WITHIN_ONE: usize = segment::RUN_BYTES / crate::record::RECORD_BYTES_MIN;

/// How long a read that finds a gap waits for the places of runs to stop changing under it.
const MOVES_PATIENCE: Duration = Duration::from_secs(5);

/// The pause between two looks of such a read.
const LOOK_AGAIN_AFTER: Duration = Duration::from_micros(200);

/// How much a read may return. At least one record is returned if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Records at most.
    pub records: usize,
    /// Bytes of payload, with 64 for each record's header, at most.
    pub bytes: usize,
}

#[derive(Debug, Default)]
struct Layers {
    active: Overlay,
    frozen: Option<Arc<Overlay>>,
    /// Goes up whenever a layer is dropped.
    dropped: u64,
}

impl Layers {
    /// Newest first.
    fn each(&self) -> impl Iterator<Item = &Overlay> {
        std::iter::once(&self.active).chain(self.frozen.as_deref())
    }
}

#[derive(Debug, Default)]
struct Tail {
    /// Consecutive.
    records: VecDeque<Record>,
    bytes: usize,
}

/// See the module.
pub(crate) struct View {
    shard: ShardId,
    engine: RwLock<Arc<dyn Engine>>,
    segments: Arc<Segments>,
    /// Odd while rows of the index are being changed; see [`View::moving`].
    moves: AtomicU64,
    layers: RwLock<Layers>,
    heads: Cache<ConversationId, Arc<Mutex<Head>>>,
    tails: Cache<ConversationId, Arc<Mutex<Tail>>>,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("shard", &self.shard).finish_non_exhaustive()
    }
}

/// Why a head could not be cached.
#[derive(Clone, Debug)]
enum NoHead {
    Absent,
    Failed(ReadError),
}

impl View {
    pub(crate) fn new(
        shard: ShardId,
        engine: Arc<dyn Engine>,
        segments: Arc<Segments>,
        cache_bytes: u64,
    ) -> Self {
        let tails = (cache_bytes / TAIL_BYTES as u64).max(1);
        let heads = (cache_bytes / 4 / HEAD_BYTES).max(1);
        Self {
            shard,
            engine: RwLock::new(engine),
            segments,
            moves: AtomicU64::new(0),
            layers: RwLock::default(),
            heads: Cache::builder().max_capacity(heads).build(),
            tails: Cache::builder().max_capacity(tails).build(),
        }
    }

    /// The index as it is now; another one takes its place when it fails.
    pub(crate) fn engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.engine.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another engine in the place of the one before, which holds the same rows or none.
    pub(crate) fn set_engine(&self, engine: Arc<dyn Engine>) {
        *self.engine.write().unwrap_or_else(PoisonError::into_inner) = engine;
    }

    pub(crate) fn segments(&self) -> &Arc<Segments> {
        &self.segments
    }

    fn layers(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- rows

    /// One row.
    pub(crate) fn row<R: Row>(&self, table: Table, key: &Key) -> Result<Option<R>, ReadError> {
        let full = full_key(table, key.as_ref());
        {
            let layers = self.layers();
            for layer in layers.each() {
                if let Some(row) = layer.rows.get(&full) {
                    return row.as_ref().map(|row| self.decode_row(row)).transpose();
                }
            }
        }
        self.stored_row(table, key.as_ref())
    }

    fn decode_row<R: Row>(&self, row: &[u8]) -> Result<R, ReadError> {
        R::from_row(row).map_err(|what| self.damaged(None, None, what))
    }

    /// One row as the tables have it.
    pub(crate) fn stored_row<R: Row>(&self, table: Table, key: &[u8]) -> Result<Option<R>, ReadError> {
        match self.engine().get(table, key).map_err(|error| self.failed(error))? {
            None => Ok(None),
            Some(value) => self.decode_row(self.open_row(table, key, &value)?.as_ref()).map(Some),
        }
    }

    /// Takes a stored row's checksum off, having verified it.
    fn open_row(&self, table: Table, key: &[u8], value: &Bytes) -> Result<Bytes, ReadError> {
        open_row(table, key, value).map_err(|what| ReadError::Damaged {
            shard: self.shard,
            conversation: None,
            seq: None,
            what: format!("{what} in table {}", table.name()),
        })
    }

    /// Rows whose keys start with `prefix`, after the key `after`, ascending; at most `limit`.
    pub(crate) fn list<R: Row>(
        &self,
        table: Table,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, R)>, ReadError> {
        let end = key::after_prefix(prefix);
        let mut from = match after {
            Some(after) => next_key(after),
            None => prefix.to_vec(),
        };
        let mut found: Vec<(Vec<u8>, R)> = Vec::new();
        while found.len() < limit {
            let want = limit - found.len();
            let dropped = self.layers().dropped;
            let stored = self
                .engine()
                .scan(table, &from, end.as_deref(), Direction::Ascending, want)
                .map_err(|error| self.failed(error))?;
            // Beyond the last stored row of a full page there may be more stored rows: the page ends there.
            let page_end = if stored.len() < want { None } else { stored.last().map(|(key, _)| key.clone()) };
            let merged = {
                let layers = self.layers();
                if layers.dropped != dropped {
                    // A layer went into the tables after they were read: read them again.
                    continue;
                }
                merge_page(&layers, table, &from, end.as_deref(), page_end.as_deref(), stored, want)
            };
            for (key, value) in merged {
                let row = match value {
                    Merged::Layered(row) => self.decode_row(&row)?,
                    Merged::Stored(value) => self.decode_row(&self.open_row(table, &key, &value)?)?,
                };
                found.push((key, row));
            }
            match page_end {
                None => break,
                Some(page_end) => from = next_key(&page_end),
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    pub(crate) fn counters(&self) -> Counters {
        self.layers().active.counters
    }

    pub(crate) fn overlay_size(&self) -> (u64, usize) {
        let layers = self.layers();
        layers.each().fold((0, 0), |(commits, bytes), layer| (commits + layer.commits, bytes + layer.bytes))
    }

    // ---- heads and lanes

    pub(crate) fn head(&self, conversation: ConversationId) -> Result<Option<Head>, ReadError> {
        // What changed lately is found in the layers; the cache is for what did not.
        if let Some(head) = self.layered_head(conversation) {
            return Ok(Some(head));
        }
        if let Some(cell) = self.heads.get(&conversation) {
            return Ok(Some(*lock(&cell)));
        }
        let loaded = self.heads.try_get_with(conversation, || match self.load_head(conversation) {
            Ok(Some(head)) => Ok(Arc::new(Mutex::new(head))),
            Ok(None) => Err(NoHead::Absent),
            Err(error) => Err(NoHead::Failed(error)),
        });
        match loaded {
            Ok(cell) => Ok(Some(*lock(&cell))),
            Err(reason) => match &*reason {
                NoHead::Absent => Ok(None),
                NoHead::Failed(error) => Err(error.clone()),
            },
        }
    }

    fn layered_head(&self, conversation: ConversationId) -> Option<Head> {
        let layers = self.layers();
        layers.each().find_map(|layer| layer.touched.get(&conversation)).map(|touched| touched.head)
    }

    fn load_head(&self, conversation: ConversationId) -> Result<Option<Head>, ReadError> {
        // It may have come into the layers since the caller looked.
        match self.layered_head(conversation) {
            Some(head) => Ok(Some(head)),
            None => self.stored_row(Table::Head, Key::conversation(conversation).as_ref()),
        }
    }

    /// The head of a conversation as it is settled.
    pub(crate) fn settled_head(&self, conversation: ConversationId) -> Result<Option<Head>, ReadError> {
        self.stored_row(Table::Head, Key::conversation(conversation).as_ref())
    }

    pub(crate) fn lane(
        &self,
        conversation: ConversationId,
        user: UserId,
        device: DeviceId,
    ) -> Result<Option<LaneState>, ReadError> {
        {
            let layers = self.layers();
            for layer in layers.each() {
                let lane = layer.touched.get(&conversation).and_then(|t| t.lanes.get(&(user, device)));
                if let Some(lane) = lane {
                    return Ok(Some(lane.clone()));
                }
            }
        }
        self.stored_row(Table::Lane, Key::lane(conversation, user, device).as_ref())
    }

    /// Lanes of a conversation after one of them, by user and device; at most `limit`.
    pub(crate) fn lanes(
        &self,
        conversation: ConversationId,
        after: Option<(UserId, DeviceId)>,
        limit: usize,
    ) -> Result<Vec<(UserId, DeviceId, LaneState)>, ReadError> {
        // What is layered is taken first: whatever leaves the layers meanwhile is in the tables then, and both agree.
        let mut lanes = std::collections::BTreeMap::new();
        {
            let layers = self.layers();
            for layer in layers.each() {
                let Some(touched) = layer.touched.get(&conversation) else { continue };
                let start = after.map_or(Bound::Unbounded, Bound::Excluded);
                for (at, lane) in touched.lanes.range((start, Bound::Unbounded)).take(limit) {
                    lanes.entry(*at).or_insert_with(|| lane.clone());
                }
            }
        }
        let prefix = Key::conversation(conversation);
        let after = after.map(|(user, device)| Key::lane(conversation, user, device));
        let stored: Vec<(Vec<u8>, LaneState)> =
            self.list(Table::Lane, prefix.as_ref(), after.as_ref().map(AsRef::as_ref), limit)?;
        for (key, lane) in stored {
            let at = (self.id_at(&key, 1)?, self.id_at(&key, 2)?);
            lanes.entry(at).or_insert(lane);
        }
        Ok(lanes.into_iter().take(limit).map(|((user, device), lane)| (user, device, lane)).collect())
    }

    /// The `n`-th number of a key, as the id it is.
    pub(crate) fn id_at<T: TryFrom<u64>>(&self, key: &[u8], n: usize) -> Result<T, ReadError> {
        let number = key::number_at(key, n).map_err(|what| self.damaged(None, None, what))?;
        T::try_from(number).map_err(|_| self.damaged(None, None, Malformed("key")))
    }

    // ---- records

    /// Records `from..=to`, ascending, cut to what there is, to what retention left, and to `limits`.
    pub(crate) fn records(
        &self,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
        limits: Limits,
    ) -> Result<Vec<Record>, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(Vec::new()) };
        let from = from.max(head.low.next().unwrap_or(head.low));
        let to = to.min(head.seq);
        if from > to || limits.records == 0 {
            return Ok(Vec::new());
        }
        let mut page = Page::new(limits);
        if let Some(tail) = self.tails.get(&conversation) {
            let tail = lock(&tail);
            if let (Some(first), Some(last)) = (tail.records.front(), tail.records.back())
                && first.seq <= from
                && last.seq >= to
            {
                let skip = usize::try_from(from.since(first.seq)).unwrap_or(usize::MAX);
                for record in tail.records.iter().skip(skip) {
                    if record.seq > to || !page.push(record) {
                        break;
                    }
                }
                return Ok(page.records);
            }
        }
        match self.read_range(conversation, from, to, &mut page) {
            Err(ReadError::Damaged { seq: Some(seq), .. })
                if self.head(conversation)?.is_some_and(|now| now.low > head.low && now.low >= seq) =>
            {
                // Not damaged: retention took them away meanwhile. Once more from where the log begins now.
                self.records(conversation, from, to, limits)
            }
            Err(error) => Err(error),
            Ok(()) => Ok(page.records),
        }
    }

    /// The newest records before `before`, ascending, cut to `limits`.
    pub(crate) fn records_before(
        &self,
        conversation: ConversationId,
        before: Seq,
        limits: Limits,
    ) -> Result<Vec<Record>, ReadError> {
        let Some(head) = self.head(conversation)? else { return Ok(Vec::new()) };
        let last = before.prev().min(head.seq);
        if last <= head.low || limits.records == 0 {
            return Ok(Vec::new());
        }
        if let Some(page) = self.tail_before(conversation, last, head.low, limits) {
            return Ok(page);
        }
        let step = (limits.bytes / 512).clamp(16, 512).min(limits.records) as u64;
        let mut newest_first: Vec<Record> = Vec::new();
        let mut bytes = 0;
        let mut to = last;
        'pages: while to > head.low {
            let from = Seq::new(to.get().saturating_sub(step) + 1).unwrap_or(to);
            let all = Limits { records: usize::MAX, bytes: usize::MAX };
            let page = self.records(conversation, from, to, all)?;
            let whole = page.first().is_some_and(|record| record.seq == from);
            for record in page.into_iter().rev() {
                bytes += record.weight();
                if newest_first.len() >= limits.records || (bytes > limits.bytes && !newest_first.is_empty())
                {
                    break 'pages;
                }
                newest_first.push(record);
            }
            if !whole || from.prev() == Seq::ZERO {
                break;
            }
            to = from.prev();
        }
        newest_first.reverse();
        if last == head.seq {
            self.warm_tail(conversation, &newest_first);
        }
        Ok(newest_first)
    }

    /// The newest records up to `last`, if the warm tail has all that belong to the page.
    fn tail_before(
        &self,
        conversation: ConversationId,
        last: Seq,
        low: Seq,
        limits: Limits,
    ) -> Option<Vec<Record>> {
        let cell = self.tails.get(&conversation)?;
        let tail = lock(&cell);
        let (first, newest) = (tail.records.front()?.seq, tail.records.back()?.seq);
        if last < first || last > newest {
            return None;
        }
        let end = usize::try_from(last.since(first)).ok()?.checked_add(1)?;
        let mut start = end;
        let mut bytes = 0;
        for record in tail.records.range(..end).rev() {
            bytes += record.weight();
            let taken = end - start;
            if record.seq <= low || taken >= limits.records || (bytes > limits.bytes && taken > 0) {
                return Some(tail.records.range(start..end).cloned().collect());
            }
            start -= 1;
        }
        // All of the tail, which is the page only if that is full or nothing comes before it.
        (first.prev() == low || end - start >= limits.records)
            .then(|| tail.records.range(start..end).cloned().collect())
    }

    /// Puts records in front of a conversation's tail, if they fit there.
    fn warm_tail(&self, conversation: ConversationId, records: &[Record]) {
        let cell = self.tails.get_with(conversation, Arc::default);
        let mut tail = lock(&cell);
        for record in records.iter().rev() {
            let fits = match tail.records.front() {
                None => true,
                Some(first) => first.seq.prev() == record.seq,
            };
            if tail.records.front().is_some_and(|first| record.seq >= first.seq) {
                continue;
            }
            if !fits || tail.records.len() >= TAIL_RECORDS || tail.bytes + record.weight() > TAIL_BYTES {
                break;
            }
            tail.bytes += record.weight();
            tail.records.push_front(own(record));
        }
    }

    /// `from..=to` out of the layers and, below them, the segments.
    fn read_range(
        &self,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
        page: &mut Page,
    ) -> Result<(), ReadError> {
        let mut layered: Vec<Record> = Vec::new();
        {
            let layers = self.layers();
            let mut oldest_first: Vec<&Overlay> = layers.each().collect();
            oldest_first.reverse();
            for layer in oldest_first {
                let Some(touched) = layer.touched.get(&conversation) else { continue };
                let Some(first) = touched.records.front() else { continue };
                let skip = usize::try_from(from.since(first.record.seq)).unwrap_or(usize::MAX);
                for pending in touched.records.iter().skip(skip) {
                    if pending.record.seq > to || layered.len() >= page.limits.records {
                        break;
                    }
                    layered.push(pending.record.clone());
                }
            }
        }
        let mut next = from;
        let below = layered.first().map_or(to, |first| first.seq.prev());
        if from <= below {
            next = self.read_runs(conversation, from, below, page)?;
            if page.full {
                return Ok(());
            }
            if next <= below {
                return Err(self.damaged(
                    Some(conversation),
                    Some(next),
                    Malformed("log: records are missing"),
                ));
            }
        }
        for record in &layered {
            if record.seq != next {
                return Err(self.damaged(
                    Some(conversation),
                    Some(next),
                    Malformed("log: records are missing"),
                ));
            }
            if !page.push(record) {
                break;
            }
            next = next.saturating_add(1);
        }
        Ok(())
    }

    /// Reads runs into `page`; returns the seq after the last record that was read.
    fn read_runs(
        &self,
        conversation: ConversationId,
        from: Seq,
        to: Seq,
        page: &mut Page,
    ) -> Result<Seq, ReadError> {
        let mut next = from;
        let mut since = None;
        loop {
            let before = self.moves.load(Ordering::Acquire);
            let gone = match self.read_runs_once(conversation, to, &mut next, page) {
                Ok(Looked::Done) => return Ok(next),
                Ok(Looked::Gap) => false,
                Err(RunError::Gone) => true,
                Err(RunError::Failed(error)) => return Err(error),
            };
            // The places of runs may have changed behind this look's back. If not, the gap is one.
            let after = self.moves.load(Ordering::Acquire);
            if before == after && before.is_multiple_of(2) {
                let what = Malformed("run: its segment is not there");
                return if gone { Err(self.damaged(Some(conversation), Some(next), what)) } else { Ok(next) };
            }
            if since.get_or_insert_with(Instant::now).elapsed() > MOVES_PATIENCE {
                let reason = "the places of its records keep changing; try again".to_owned();
                return Err(ReadError::Engine { shard: self.shard, reason });
            }
            pause();
        }
    }

    /// Says, for as long as the guard lives, that rows of the index are being changed: what a read does not find meanwhile
    /// may be there all the same. One at a time.
    pub(crate) fn moving(&self) -> Moving<'_> {
        self.moves.fetch_add(1, Ordering::AcqRel);
        Moving(&self.moves)
    }

    /// Looks once through the rows of the runs from `next` on.
    fn read_runs_once(
        &self,
        conversation: ConversationId,
        to: Seq,
        next: &mut Seq,
        page: &mut Page,
    ) -> Result<Looked, RunError<ReadError>> {
        let end = Key::run(conversation, to.saturating_add(1));
        'places: while *next <= to {
            let from = *next;
            let Some(first) = self.run_with(conversation, from).map_err(RunError::Failed)? else {
                return Ok(Looked::Gap);
            };
            let mut cursor = Key::run(conversation, first).into_bytes();
            while *next <= to {
                let rows = self
                    .engine()
                    .scan(Table::Run, &cursor, Some(end.as_ref()), Direction::Ascending, SCAN_ROWS)
                    .map_err(|error| RunError::Failed(self.failed(error)))?;
                let last_key = rows.last().map(|(key, _)| next_key(key));
                for (key, value) in rows {
                    let placed = self.placed(conversation, &key, &value).map_err(RunError::Failed)?;
                    if placed.run.last() < *next {
                        // An earlier run that was merged into the one before reaches no further.
                        continue;
                    }
                    if placed.run.first > *next {
                        if *next > from {
                            // What comes next may lie in a merged run that begins further back.
                            continue 'places;
                        }
                        return Ok(Looked::Gap);
                    }
                    let from = placed.run.first.max(*next);
                    let more = self.read_run(&placed, to, next, page).map_err(|error| match error {
                        RunError::Gone => RunError::Gone,
                        RunError::Failed(error) => RunError::Failed(self.unreadable(&placed, from, &error)),
                    })?;
                    if !more {
                        return Ok(Looked::Done);
                    }
                }
                match last_key {
                    Some(last_key) => cursor = last_key,
                    None if *next > from => continue 'places,
                    None => return Ok(Looked::Gap),
                }
            }
        }
        Ok(Looked::Done)
    }

    /// The first seq of a run that has `seq`. Nearly always that is the last one that begins there or before; while a merge is
    /// not finished, shorter runs it was made of may begin behind it.
    fn run_with(&self, conversation: ConversationId, seq: Seq) -> Result<Option<Seq>, ReadError> {
        let from = Key::run(conversation, Seq::ZERO);
        let mut to = Key::run(conversation, seq.saturating_add(1)).into_bytes();
        let mut looked_at = 0;
        let mut want = 1;
        while looked_at < RUNS_WITHIN_ONE {
            let rows = self
                .engine()
                .scan(Table::Run, from.as_ref(), Some(&to), Direction::Descending, want)
                .map_err(|error| self.failed(error))?;
            for (key, value) in &rows {
                let placed = self.placed(conversation, key, value)?;
                if placed.run.last() >= seq {
                    return Ok(Some(placed.run.first));
                }
            }
            let Some((key, _)) = rows.last() else { return Ok(None) };
            to.clone_from(key);
            looked_at += rows.len();
            want = SCAN_ROWS * 8;
        }
        Ok(None)
    }

    /// Takes the records `next..=to` of one run. Returns whether to go on with the next run.
    fn read_run(
        &self,
        placed: &Placed,
        to: Seq,
        next: &mut Seq,
        page: &mut Page,
    ) -> Result<bool, RunError<SegmentError>> {
        let bytes = self.segments.run(placed)?;
        for record in segment::records(&placed.run, &bytes, *next) {
            let (record, _) = record.map_err(|what| RunError::Failed(what.into()))?;
            if record.seq > to || !page.push(&record) {
                return Ok(false);
            }
            *next = record.seq.saturating_add(1);
        }
        Ok(true)
    }

    /// The first seq of the last run that begins at `seq` or before.
    pub(crate) fn run_at(&self, conversation: ConversationId, seq: Seq) -> Result<Option<Seq>, ReadError> {
        let from = Key::run(conversation, Seq::ZERO);
        let to = Key::run(conversation, seq.saturating_add(1));
        let rows = self
            .engine()
            .scan(Table::Run, from.as_ref(), Some(to.as_ref()), Direction::Descending, 1)
            .map_err(|error| self.failed(error))?;
        rows.first().map(|(key, _)| self.id_at(key, 1)).transpose()
    }

    /// A row of the `run` table, verified.
    pub(crate) fn placed(
        &self,
        conversation: ConversationId,
        key: &[u8],
        value: &Bytes,
    ) -> Result<Placed, ReadError> {
        let first: Seq = self.id_at(key, 1)?;
        let row = self.open_row(Table::Run, key, value)?;
        Placed::decode(conversation, first, &row)
            .map_err(|what| self.damaged(Some(conversation), Some(first), what))
    }

    fn unreadable(&self, placed: &Placed, from: Seq, error: &SegmentError) -> ReadError {
        match error {
            SegmentError::Io(error) => ReadError::Engine { shard: self.shard, reason: error.to_string() },
            SegmentError::Malformed(_) => ReadError::Damaged {
                shard: self.shard,
                conversation: Some(placed.run.conversation),
                seq: Some(from),
                what: format!("segment {:016x}: {error}", placed.segment),
            },
        }
    }

    // ---- change

    /// Applies one commit. Called by one thread only.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub(crate) fn apply(&self, commit: &Commit) -> Result<(), ReadError> {
        self.prepare(commit).map(|change| self.show(change))
    }

    /// Works out what a commit changes. Called by one thread only.
    ///
    /// # Errors
    /// A body that makes no sense, or an index that can't be read. Nothing has changed then.
    pub(crate) fn prepare(&self, commit: &Commit) -> Result<Change, ReadError> {
        let mut delta = Delta { view: self, overlay: Overlay::default(), lanes: FxHashMap::default() };
        delta.overlay.counters = self.counters();
        delta.overlay.last = commit.id;
        delta.overlay.commits = 1;
        delta.overlay.bytes = commit.body.len();
        let mut at = 0;
        let mut ops = 0u32;
        while at < commit.body.len() {
            let bytes = commit.body.slice(at..);
            let decoded = Op::decode(&bytes).map_err(|what| self.damaged(None, None, what))?;
            at += decoded.taken;
            ops = ops.saturating_add(1);
            delta.apply(decoded.op, bytes.slice(decoded.record_at..decoded.taken))?;
        }
        if ops != commit.ops {
            return Err(self.damaged(None, None, Malformed("commit operation count")));
        }
        let Delta { overlay, lanes, .. } = delta;
        Ok(Change { overlay, lanes })
    }

    /// Shows a change to all readers. Nothing may have been applied since it was prepared.
    pub(crate) fn show(&self, change: Change) {
        let Change { overlay, lanes } = change;
        // Tails are made by readers. What nobody reads is in the layer, which is memory as well.
        let appended: Vec<(Arc<Mutex<Tail>>, Vec<Record>)> = overlay
            .touched
            .iter()
            .filter(|(_, touched)| !touched.records.is_empty())
            .filter_map(|(conversation, touched)| {
                // Looking does not count as use.
                let tail = self.tails.contains_key(conversation).then(|| self.tails.get(conversation))??;
                let newest = touched.records.len().saturating_sub(TAIL_RECORDS);
                Some((
                    tail,
                    touched.records.iter().skip(newest).map(|pending| own(&pending.record)).collect(),
                ))
            })
            .collect();
        {
            let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
            layers.active.merge(overlay);
            for ((conversation, user, device), LaneNotes { base, notes }) in lanes {
                let lane = layers.active.lane_mut(conversation, user, device, base);
                for (epoch, pseq, seq) in notes {
                    lane.note(epoch, pseq, seq);
                }
            }
        }
        for (cell, records) in appended {
            let mut tail = lock(&cell);
            for record in records {
                tail.push(record);
            }
        }
    }

    /// What recovery found in the tables: where they stand.
    pub(crate) fn start_from(&self, last: CommitId, counters: Counters) {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.active.last = last;
        layers.active.counters = counters;
    }

    /// Commits and bytes in the layer that still grows.
    pub(crate) fn active_size(&self) -> (u64, usize) {
        let layers = self.layers();
        (layers.active.commits, layers.active.bytes)
    }

    /// Closes the layer that grows, so that it can be settled; `None` if it is empty or another is being settled.
    pub(crate) fn freeze(&self) -> Option<Arc<Overlay>> {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        if layers.frozen.is_some() || layers.active.is_empty() {
            return None;
        }
        let next =
            Overlay { counters: layers.active.counters, last: layers.active.last, ..Overlay::default() };
        let frozen = Arc::new(std::mem::replace(&mut layers.active, next));
        layers.frozen = Some(Arc::clone(&frozen));
        Some(frozen)
    }

    /// Drops the closed layer: the index has all of it.
    pub(crate) fn drop_frozen(&self) {
        let frozen = self.layers().frozen.clone();
        // Cached heads follow while the layer still hides them. Whoever is just filling an entry is waited for (`get_with`), and
        // is then corrected; whoever begins to from here on finds the layer, or the index.
        for (conversation, touched) in frozen.iter().flat_map(|layer| &layer.touched) {
            let cell = self.heads.get_with(*conversation, || Arc::new(Mutex::new(touched.head)));
            *lock(&cell) = touched.head;
        }
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.frozen = None;
        layers.dropped += 1;
    }

    // ---- errors

    pub(crate) fn damaged(
        &self,
        conversation: Option<ConversationId>,
        seq: Option<Seq>,
        what: Malformed,
    ) -> ReadError {
        ReadError::Damaged { shard: self.shard, conversation, seq, what: what.0.to_owned() }
    }

    pub(crate) fn failed(&self, error: EngineError) -> ReadError {
        ReadError::Engine { shard: self.shard, reason: error.to_string() }
    }
}

/// What a commit changes, worked out and not yet shown.
pub(crate) struct Change {
    overlay: Overlay,
    lanes: FxHashMap<(ConversationId, UserId, DeviceId), LaneNotes>,
}

/// One commit's changes while they are being worked out, over the view as it was.
struct Delta<'a> {
    view: &'a View,
    overlay: Overlay,
    lanes: FxHashMap<(ConversationId, UserId, DeviceId), LaneNotes>,
}

/// What a commit does to a lane.
struct LaneNotes {
    /// The lane as it was, if the growing layer does not have it.
    base: Option<LaneState>,
    notes: Vec<(Epoch, Pseq, Seq)>,
}

impl Delta<'_> {
    fn touched(&mut self, conversation: ConversationId) -> Result<&mut Touched, ReadError> {
        use std::collections::hash_map::Entry;
        match self.overlay.touched.entry(conversation) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let layered =
                    self.view.layers().active.touched.get(&conversation).map(|touched| touched.head);
                let head = match layered {
                    Some(head) => head,
                    None => self.view.head(conversation)?.unwrap_or_default(),
                };
                Ok(entry.insert(Touched { head, ..Touched::default() }))
            }
        }
    }

    fn note(
        &mut self,
        conversation: ConversationId,
        (user, device): (UserId, DeviceId),
        (epoch, pseq): (Epoch, Pseq),
        seq: Seq,
    ) -> Result<(), ReadError> {
        use std::collections::hash_map::Entry;
        let notes = match self.lanes.entry((conversation, user, device)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                // A lane that the growing layer has is noted there in place; others are brought there once.
                let base = if self.view.layers().active.lane(conversation, user, device).is_some() {
                    None
                } else {
                    Some(self.view.lane(conversation, user, device)?.unwrap_or_default())
                };
                entry.insert(LaneNotes { base, notes: Vec::new() })
            }
        };
        notes.notes.push((epoch, pseq, seq));
        Ok(())
    }

    /// A row as this commit has left it so far.
    fn row<R: Row>(&self, table: Table, key: &Key) -> Result<Option<R>, ReadError> {
        match self.overlay.rows.get(&full_key(table, key.as_ref())) {
            Some(row) => row.as_ref().map(|row| self.view.decode_row(row)).transpose(),
            None => self.view.row(table, key),
        }
    }

    fn put<R: Row>(&mut self, table: Table, key: &Key, row: Option<&R>) {
        self.overlay.put(table, key.as_ref(), row.map(Row::to_row));
    }

    /// A number that only grows.
    fn raise(&mut self, table: Table, key: &Key, to: u64) -> Result<(), ReadError> {
        if self.row::<Number>(table, key)?.is_none_or(|now| now.0 < to) {
            self.put(table, key, Some(&Number(to)));
        }
        Ok(())
    }

    fn apply(&mut self, op: Op, encoded: Bytes) -> Result<(), ReadError> {
        match op {
            Op::Append { conversation, record } => {
                let view = self.view;
                let producer = (record.sender, record.device);
                let (pseq, seq) = ((record.epoch, record.pseq), record.seq);
                let length = encoded.len();
                let touched = self.touched(conversation)?;
                if touched.head.seq.next() != Some(seq) {
                    return Err(view.damaged(
                        Some(conversation),
                        Some(seq),
                        Malformed("commit: a record out of place"),
                    ));
                }
                touched.head.seq = seq;
                touched.head.count = record.count;
                touched.head.time = record.time;
                touched.records.push_back(Pending { record, encoded });
                self.overlay.weigh_record(length);
                if pseq.1 > Pseq::ZERO {
                    self.note(conversation, producer, pseq, seq)?;
                }
            }
            Op::Refuse { conversation, user, device, epoch, pseq } => {
                self.touched(conversation)?;
                self.note(conversation, (user, device), (epoch, pseq), Seq::ZERO)?;
            }
            Op::NameUser { user, row } => {
                let name = Key::name(row.app, key::KIND_USER, &row.name);
                self.put(Table::Name, &name, Some(&Number(user.get())));
                self.put(Table::User, &Key::user(user), Some(&row));
                let counters = &mut self.overlay.counters;
                counters.users = counters.users.max(user.get() / SHARDS_MAX);
            }
            Op::NameConversation { conversation, row } => {
                let name = Key::name(row.app, key::kind_of(row.class), &row.name);
                self.put(Table::Name, &name, Some(&Number(conversation.get())));
                self.put(Table::Conversation, &Key::conversation(conversation), Some(&row));
                let counters = &mut self.overlay.counters;
                counters.conversations = counters.conversations.max(conversation.get() / SHARDS_MAX);
            }
            Op::Member { conversation, user, row } => {
                self.put(Table::Member, &Key::conversation_user(conversation, user), row.as_ref());
            }
            Op::MemberCount { conversation, members } => self.touched(conversation)?.head.members = members,
            Op::Listed { user, conversation, row } => {
                self.put(Table::Listed, &Key::user_conversation(user, conversation), row.as_ref());
            }
            Op::Device { user, device, row } => {
                let key = Key::device(user, device);
                if let Some(before) = self.row::<crate::row::Device>(Table::Device, &key)?
                    && before.uid != row.uid
                {
                    self.put::<Number>(Table::Uid, &Key::uid(user, before.uid), None);
                }
                self.put(Table::Uid, &Key::uid(user, row.uid), Some(&Number(device.get())));
                self.put(Table::Device, &key, Some(&row));
            }
            Op::ClassEpoch { user, class, epoch } => {
                self.raise(Table::ClassEpoch, &Key::class_epoch(user, class), epoch.get())?;
            }
            Op::Recv { user, device, conversation, seq } => {
                self.raise(Table::Recv, &Key::recv(user, device, conversation), seq.get())?;
            }
            Op::Read { conversation, user, seq } => {
                self.raise(Table::Read, &Key::conversation_user(conversation, user), seq.get())?;
            }
            Op::Low { conversation, low, count } => {
                let touched = self.touched(conversation)?;
                if low > touched.head.low {
                    touched.head.low = low;
                    touched.head.low_count = count;
                }
                touched.low_moved = true;
            }
            Op::Link(link) => {
                self.put(Table::Link, &Key::conversation_user(link.conversation, link.user), Some(&link));
            }
            Op::LinkDone { conversation, user } => {
                let key = Key::conversation_user(conversation, user);
                self.put::<crate::row::PendingLink>(Table::Link, &key, None);
            }
            Op::Acquire { epoch } => {
                let counters = &mut self.overlay.counters;
                counters.epoch = counters.epoch.max(epoch);
            }
        }
        Ok(())
    }
}

/// Waits a moment for the index to settle.
#[expect(clippy::disallowed_methods, reason = "a read that goes to the disk is on a thread that may wait")]
fn pause() {
    std::thread::sleep(LOOK_AGAIN_AFTER);
}

/// See [`View::moving`].
pub(crate) struct Moving<'a>(&'a AtomicU64);

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// How one look through the runs ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looked {
    /// The page is full, or has everything that was asked for.
    Done,
    /// No run has the next record.
    Gap,
}

/// A page of records being filled.
#[derive(Debug)]
struct Page {
    records: Vec<Record>,
    bytes: usize,
    limits: Limits,
    full: bool,
}

impl Page {
    fn new(limits: Limits) -> Self {
        Self { records: Vec::new(), bytes: 0, limits, full: false }
    }

    /// Whether it was taken.
    fn push(&mut self, record: &Record) -> bool {
        let bytes = self.bytes + record.weight();
        if self.records.len() >= self.limits.records
            || (bytes > self.limits.bytes && !self.records.is_empty())
        {
            self.full = true;
            return false;
        }
        self.bytes = bytes;
        self.records.push(record.clone());
        true
    }
}

impl Tail {
    fn push(&mut self, record: Record) {
        if self.records.back().is_some_and(|last| last.seq.saturating_add(1) != record.seq) {
            self.records.clear();
            self.bytes = 0;
        }
        self.bytes += record.weight();
        self.records.push_back(record);
        while self.records.len() > TAIL_RECORDS || (self.bytes > TAIL_BYTES && self.records.len() > 1) {
            if let Some(gone) = self.records.pop_front() {
                self.bytes -= gone.weight();
            }
        }
    }
}

/// A record whose payload keeps nothing else alive.
fn own(record: &Record) -> Record {
    Record { payload: Bytes::copy_from_slice(&record.payload), ..record.clone() }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The smallest key after `key`.
pub(crate) fn next_key(key: &[u8]) -> Vec<u8> {
    let mut next = key.to_vec();
    next.push(0);
    next
}

/// Adds a checksum over table, key and row to a row that is to be stored.
pub(crate) fn seal_row(table: Table, key: &[u8], row: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(row.len() + 4);
    value.extend_from_slice(row);
    value.extend_from_slice(&row_checksum(table, key, row).to_be_bytes());
    value
}

pub(crate) fn open_row(table: Table, key: &[u8], value: &Bytes) -> Result<Bytes, Malformed> {
    let at = value.len().checked_sub(4).ok_or(Malformed("row checksum"))?;
    let row = value.slice(..at);
    if value.get(at..) == Some(&row_checksum(table, key, &row).to_be_bytes()) {
        Ok(row)
    } else {
        Err(Malformed("row checksum"))
    }
}

fn row_checksum(table: Table, key: &[u8], row: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&[table as u8]), key), row)
}

enum Merged {
    Layered(Bytes),
    Stored(Bytes),
}

/// Stored rows and layered rows of one page, in order of keys, the newest of each key, without those that are gone.
fn merge_page(
    layers: &Layers,
    table: Table,
    from: &[u8],
    end: Option<&[u8]>,
    page_end: Option<&[u8]>,
    stored: Vec<Entry>,
    want: usize,
) -> Vec<(Vec<u8>, Merged)> {
    let start = full_key(table, from);
    let stop = match (page_end, end) {
        (Some(last), _) => Bound::Included(full_key(table, last)),
        (None, Some(end)) => Bound::Excluded(full_key(table, end)),
        (None, None) => Bound::Excluded(vec![(table as u8).saturating_add(1)]),
    };
    let range = (Bound::Included(start), stop);
    let mut active = layers.active.rows.range(range.clone()).peekable();
    let none = std::collections::BTreeMap::new();
    let frozen = layers.frozen.as_deref().map_or(&none, |frozen| &frozen.rows);
    let mut frozen = frozen.range(range).peekable();
    let mut stored = stored.into_iter().peekable();
    let mut merged = Vec::new();
    while merged.len() < want {
        let keys = [
            active.peek().and_then(|(key, _)| key.get(1..)),
            frozen.peek().and_then(|(key, _)| key.get(1..)),
            stored.peek().map(|(key, _)| key.as_slice()),
        ];
        let Some(key) = keys.into_iter().flatten().min().map(<[u8]>::to_vec) else { break };
        let mut newest: Option<Option<Merged>> = None;
        for layer in [&mut active, &mut frozen] {
            if let Some((_, row)) = layer.next_if(|(full, _)| full.get(1..) == Some(key.as_slice())) {
                newest.get_or_insert_with(|| row.clone().map(Merged::Layered));
            }
        }
        if let Some((_, value)) = stored.next_if(|(at, _)| *at == key) {
            newest.get_or_insert_with(|| Some(Merged::Stored(value)));
        }
        if let Some(Some(row)) = newest {
            merged.push((key, row));
        }
    }
    merged
}

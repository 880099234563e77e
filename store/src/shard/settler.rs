//! The settler: a shard's second thread. It turns closed layers of the overlay into segments, keeps the index in line with
//! them, and merges segments.
//!
//! The order in which a layer is settled:
//! 1. a segment with its records and rows is written and synced, and the folder synced
//! 2. the manifest that names it takes the place of the one before: from here on the commits are settled
//! 3. rows and places of runs go into the engine; barrier, mark, barrier
//! 4. the layer is dropped, and the log files that held only settled commits are removed
//!
//! - A crash anywhere leaves a log that is replayed, or a step of the manifest the index lacks and is given at the next start.
//! - What fails is tried again with growing pauses, from the layer in memory, into a new file: a file that failed is left
//!   alone. Commits go on meanwhile until the overlay is at its bound, and are then refused.
//! - An engine that failed is made again from the segments, once a file can be written again; until then it is read, and nothing it wrote is trusted after that.
//! - Merging is done in steps between layers, a layer first; scrubbing when there is nothing to merge.
//! - What is old goes to the cold tier as a merge like any other, but on a thread of its own (`cold::freeze`): nothing here waits
//!   for the object store. Its inputs are left alone until it is done.
//!
//! Not here: when a layer is closed (`committer`), what a segment looks like (`segment`).

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fulmar_protocol::id::{ConversationId, Seq, ShardId};

use super::{
    Shared,
    committer::write_canary,
    index::{self, Distance, IndexError, Move},
    journal,
    manifest::{Entry, Manifest, ManifestError},
    overlay::{Overlay, full_key},
    scrub::Scrubber,
};
use crate::{
    cold::{
        Tier,
        freeze::{self, FreezeError, Frozen, Job, Order},
    },
    commit::CommitId,
    engine::{Engine, EngineError, closed::Closed},
    error::{CommitError, OpenError},
    files::Files,
    key::{Key, Table},
    row::Row,
    segment::{self, Merge, MergeError, Segment, SegmentError, SegmentWriter, Step, Summary},
};

/// Segments of one tier that are merged into one of the next.
const MERGE_FAN_IN: usize = 8;

/// Segments above which merging comes before settling: all tiers full, and some.
const SEGMENTS_PRESSED: usize = 1_024;

/// Bytes merged between two looks for a layer to be settled.
const MERGE_STEP_BYTES: usize = 1 << 20;

/// Index rows moved between two looks for a layer to be settled.
const MOVE_STEP_ROWS: usize = 4_096;

/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// The first pause after a failure; doubled with each one that follows.
const RETRY_FIRST: Duration = Duration::from_millis(50);

/// The longest pause between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Opens the engine of a shard; told to, it throws away what there is and begins with an empty one.
pub(crate) type EngineOpener = Box<dyn Fn(bool) -> Result<Arc<dyn Engine>, EngineError> + Send + Sync>;

/// The first pause after the object store failed; doubled with each failure that follows.
const COLD_RETRY_FIRST: Duration = Duration::from_secs(1);

/// The longest pause between two attempts.
const COLD_RETRY_MAX: Duration = Duration::from_secs(10 * 60);

/// Time between two looks for something that has become old.
const COLD_LOOK_EVERY: Duration = Duration::from_secs(10 * 60);

/// Time between two looks for objects that nobody needs.
const SWEEP_EVERY: Duration = Duration::from_secs(24 * 60 * 60);

/// What committer and settler tell each other.
#[derive(Debug, Default)]
pub(crate) struct Settling {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The closed layer, until it is settled.
    layer: Option<Arc<Overlay>>,
    /// Why the log can't be written, as the committer says.
    log_failing: Option<CommitError>,
    /// Why it could not be settled so far.
    failing: Option<CommitError>,
    /// A job of the cold tier has ended.
    woken: bool,
    stop: bool,
}

/// How waiting for the settler ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// No layer is left to be settled.
    Settled,
    /// It does not get on.
    Failing(CommitError),
}

impl Settling {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a closed layer over; the one before is settled.
    pub(crate) fn begin(&self, layer: Arc<Overlay>) {
        self.state().layer = Some(layer);
        self.changed.notify_all();
    }

    /// Waits until the closed layer is settled, or has failed to be.
    pub(crate) fn wait(&self) -> Waited {
        let mut state = self.state();
        loop {
            if state.layer.is_none() {
                return Waited::Settled;
            }
            if let Some(error) = &state.failing {
                return Waited::Failing(error.clone());
            }
            if state.stop {
                return Waited::Failing(CommitError::Unavailable {
                    reason: "the store is closed".to_owned(),
                });
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No layer is being settled.
    pub(crate) fn is_idle(&self) -> bool {
        self.state().layer.is_none()
    }

    /// Why the log can't be written, or settling does not get on, if so.
    pub(crate) fn failing(&self) -> Option<CommitError> {
        let state = self.state();
        state.log_failing.clone().or_else(|| state.failing.clone())
    }

    /// Says whether the log can be written.
    pub(crate) fn set_log_failing(&self, why: Option<CommitError>) {
        self.state().log_failing = why;
    }

    /// Makes the settler look what there is to do.
    pub(crate) fn wake(&self) {
        self.state().woken = true;
        self.changed.notify_all();
    }

    /// Nothing is settled any more.
    fn gone(&self, panicked: bool) {
        let mut state = self.state();
        state.stop = true;
        if panicked {
            let reason = "the thread that settles is gone: start again".to_owned();
            state.failing = Some(CommitError::Unavailable { reason });
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Tells the settler to end.
    pub(crate) fn stop(&self) {
        self.state().stop = true;
        self.changed.notify_all();
    }
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
enum SettleError {
    #[error("a file of the shard could not be written: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("a new segment can't be read: {0}")]
    Segment(#[from] SegmentError),
    #[error("merging failed: {0}")]
    Merge(#[from] MergeError),
}

impl From<EngineError> for SettleError {
    fn from(error: EngineError) -> Self {
        Self::Index(error.into())
    }
}

impl SettleError {
    fn refusal(&self) -> CommitError {
        let full = match self {
            Self::Io(error) => error.kind() == io::ErrorKind::StorageFull,
            Self::Index(IndexError::Engine(EngineError::Full)) => true,
            Self::Index(_) | Self::Segment(_) | Self::Merge(_) => false,
        };
        if full {
            CommitError::Full { reason: self.to_string() }
        } else {
            CommitError::Unavailable { reason: self.to_string() }
        }
    }
}

/// Segments on their way to become one.
enum Merging {
    /// The new segment is being written.
    Writing { id: u64, inputs: Vec<u64>, merge: Box<Merge> },
    /// It is written, and the manifest is to name it.
    Written { inputs: Vec<u64>, summary: Summary, object: Option<String> },
    /// It is written and named by the manifest; the index is being moved to it.
    Moving { id: u64, inputs: Vec<u64>, moving: Box<Move> },
}

impl std::fmt::Debug for Merging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Writing { inputs, .. } => {
                f.debug_struct("Writing").field("inputs", inputs).finish_non_exhaustive()
            }
            Self::Written { inputs, .. } => {
                f.debug_struct("Written").field("inputs", inputs).finish_non_exhaustive()
            }
            Self::Moving { id, inputs, .. } => {
                f.debug_struct("Moving").field("id", id).field("inputs", inputs).finish_non_exhaustive()
            }
        }
    }
}

/// Segments on their way to the cold tier.
#[derive(Debug)]
struct Freezing {
    inputs: Vec<u64>,
    job: Job<Frozen>,
}

/// What the settler keeps of the cold tier.
#[derive(Debug)]
struct Cooling {
    tier: Arc<Tier>,
    freezing: Option<Freezing>,
    sweeping: Option<Job<u64>>,
    /// Nothing is begun before.
    not_before: Instant,
    /// The next pause after a failure.
    pause: Duration,
    sweep_at: Instant,
}

impl Cooling {
    fn new(tier: Arc<Tier>) -> Self {
        let now = Instant::now();
        Self { tier, freezing: None, sweeping: None, not_before: now, pause: COLD_RETRY_FIRST, sweep_at: now }
    }

    fn failed(&mut self, error: &FreezeError, doing: &'static str, shard: ShardId) {
        if matches!(error, FreezeError::Stopped) {
            return;
        }
        self.tier.failed();
        tracing::warn!(%shard, %error, again_in = ?self.pause, "{doing} failed");
        self.not_before = Instant::now() + self.pause;
        self.pause = (self.pause * 2).min(COLD_RETRY_MAX);
    }
}

/// Says that the thread is gone, if only because an engine panicked: whoever waits for it is answered.
struct Gone(Arc<Shared>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.settling.gone(std::thread::panicking());
    }
}

/// The thread's state; before the thread runs, opening uses it.
pub(crate) struct Settler {
    shared: Arc<Shared>,
    files: Arc<dyn Files>,
    opener: EngineOpener,
    manifest: Manifest,
    settle_bytes: u64,
    segment_bytes_max: u64,
    background_bytes_per_second: u64,
    scrubber: Scrubber,
    /// The engine failed and has to be opened again.
    engine_failed: bool,
    merging: Option<Merging>,
    /// The segment of a layer that no manifest names yet, and the layer's last commit.
    written: Option<(CommitId, Summary, Arc<Segment>)>,
    /// Merging waits until then, after a failure.
    merge_after: Option<Instant>,
    /// How long it waits after the next failure.
    merge_pause: Duration,
    /// Bytes the index points to, by segment; `None`: to be counted.
    live: Option<HashMap<u64, u64>>,
    cooling: Option<Cooling>,
}

impl Settler {
    /// Reads the manifest and opens the segments it names.
    pub(crate) fn open_files(
        files: &dyn Files,
        shard: ShardId,
        segments: &super::segments::Segments,
        cold: Option<&Arc<Tier>>,
    ) -> Result<Manifest, OpenError> {
        let settled = |what: String| OpenError::Settled { shard, what };
        let io =
            |error: io::Error| OpenError::Log { shard, reason: format!("its folder can't be read: {error}") };
        let manifest = Manifest::load(files, shard).map_err(|error| match error {
            ManifestError::Io(error) => io(error),
            ManifestError::Malformed(what) => settled(format!("the manifest is damaged: {what}")),
        })?;
        for entry in &manifest.segments {
            let segment = Segment::open(files, shard, entry.id)
                .map_err(|error| settled(format!("segment {:016x} can't be used: {error}", entry.id)))?;
            if segment.summary().bytes != entry.bytes
                || segment.summary().last_commit != entry.last_commit
                || (segment.frames_bytes() > 0) != entry.cold.is_some()
            {
                return Err(settled(format!("segment {:016x} is not the one the manifest means", entry.id)));
            }
            segments.add(entry.id, Arc::new(with_cold(segment, entry.cold.as_deref(), cold)));
        }
        let there = manifest.segments.iter().filter(|entry| entry.cold.is_some()).count();
        if there > 0 && cold.is_none() {
            tracing::warn!(
                %shard, segments = there,
                "records lie in the cold tier, and none is configured: they can't be read"
            );
        }
        Ok(manifest)
    }

    /// Opens the engine and brings it in line with the manifest.
    pub(crate) fn open_engine(
        opener: &EngineOpener,
        shard: ShardId,
        segments: &super::segments::Segments,
        manifest: &Manifest,
    ) -> Result<Arc<dyn Engine>, IndexError> {
        let as_it_is = || -> Result<Option<Arc<dyn Engine>>, IndexError> {
            let engine = opener(false)?;
            match index::distance(engine.as_ref(), manifest)? {
                Distance::Here => {}
                Distance::OneStep => index::catch_up(engine.as_ref(), segments, manifest)?,
                Distance::Far => return Ok(None),
            }
            let began = Instant::now();
            let mut told = began;
            let right = index::proves(engine.as_ref(), segments, manifest, |bytes| {
                if told.elapsed() >= PROGRESS_EVERY {
                    told = Instant::now();
                    tracing::info!(%shard, bytes, "comparing the index with the segments");
                }
            })?;
            Ok(right.then_some(engine))
        };
        match as_it_is() {
            Ok(Some(engine)) => return Ok(engine),
            Ok(None) => {
                tracing::warn!(%shard, "the index is not what the segments say: making it again")
            }
            // Nothing is gained by a new one where there is no room for it.
            Err(error @ IndexError::Engine(EngineError::Full)) => return Err(error),
            Err(IndexError::Engine(error)) => {
                tracing::warn!(%shard, %error, "the index can't be used: making it again");
            }
            Err(error) => return Err(error),
        }
        let engine = opener(true)?;
        index::rebuild(engine.as_ref(), segments, manifest, shard)?;
        Ok(engine)
    }

    pub(crate) fn new(
        shared: Arc<Shared>,
        files: Arc<dyn Files>,
        opener: EngineOpener,
        manifest: Manifest,
        options: &crate::StoreOptions,
    ) -> Self {
        let cooling = shared.cold.clone().map(Cooling::new);
        let mut settler = Self {
            shared,
            cooling,
            files,
            opener,
            manifest,
            settle_bytes: options.settle_bytes as u64,
            segment_bytes_max: options.segment_bytes_max,
            background_bytes_per_second: options.background_bytes_per_second,
            scrubber: Scrubber::new(options),
            engine_failed: false,
            merging: None,
            written: None,
            merge_after: None,
            merge_pause: RETRY_FIRST,
            live: None,
        };
        settler.resume_merging();
        settler.count();
        settler
    }

    /// Removes segments that an interrupted step left, and those a finished one no longer needs. Only when everything else
    /// was proven: what looks like a leftover may be all there is of a shard that lost its manifest.
    pub(crate) fn remove_leftovers(&self) -> io::Result<()> {
        for (name, _) in self.files.list()? {
            let known = self.manifest.segments.iter().any(|entry| segment::name(entry.id) == name);
            if name.ends_with(segment::SUFFIX) && !known {
                tracing::debug!(shard = %self.shared.id, file = name, "removing a segment that is not needed");
                self.files.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Settles the closed layer, if there is one, on the calling thread. For opening, before the thread runs.
    pub(crate) fn settle_here(&mut self) -> Result<(), CommitError> {
        let Some(layer) = self.shared.view.freeze() else { return Ok(()) };
        self.settle(&layer).map_err(|error| error.refusal())?;
        self.shared.view.drop_frozen();
        Ok(())
    }

    /// Runs until it is told to stop.
    pub(crate) fn run(mut self) {
        let _gone = Gone(Arc::clone(&self.shared));
        self.work();
        self.drop_half_merged();
    }

    /// What nothing names yet is begun again after the next start; a file of it would only be in the way of who looks at the folder.
    fn drop_half_merged(&mut self) {
        let Some(Merging::Writing { id, merge, .. }) = self.merging.take() else { return };
        drop(merge);
        if let Err(error) = self.files.remove(&segment::name(id)) {
            tracing::debug!(shard = %self.shared.id, %error, "half a merged segment stays until the next start");
        }
    }

    fn work(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut pause = RETRY_FIRST;
        loop {
            let layer = {
                let state = shared.settling.state();
                if state.stop {
                    return;
                }
                state.layer.clone()
            };
            if let Some(layer) = layer {
                if self.is_pressed() {
                    // What was merged so far is not worth another layer on top: the layer waits, and commits for it.
                    match self.merge_some() {
                        Ok(0) => {}
                        Ok(_) => {
                            self.merge_pause = RETRY_FIRST;
                            continue;
                        }
                        Err(error) => self.merge_failed(&error),
                    }
                }
                match self.settle(&layer) {
                    Ok(()) => {
                        pause = RETRY_FIRST;
                        shared.view.drop_frozen();
                        let mut state = shared.settling.state();
                        state.layer = None;
                        if state.failing.take().is_some() {
                            tracing::info!(shard = %shared.id, "settling goes on");
                        }
                        drop(state);
                        shared.settling.changed.notify_all();
                        self.remove_settled_logs();
                    }
                    Err(error) => {
                        tracing::error!(shard = %shared.id, %error, again_in = ?pause, "settling failed");
                        shared.settling.state().failing = Some(error.refusal());
                        shared.settling.changed.notify_all();
                        if self.sleep(pause) {
                            return;
                        }
                        pause = (pause * 2).min(RETRY_MAX);
                    }
                }
                continue;
            }
            let began = Instant::now();
            match self.merge_some() {
                Ok(0) => {
                    let segments = || self.manifest.segments.iter().map(|entry| entry.id).collect();
                    if let Some(pause) = self.scrubber.step(&shared, segments) {
                        if self.pause_unless_layer(pause) {
                            return;
                        }
                        continue;
                    }
                    let mut state = shared.settling.state();
                    if state.layer.is_none() && !state.stop && !std::mem::take(&mut state.woken) {
                        match self.wait() {
                            Some(wait) => drop(shared.settling.changed.wait_timeout(state, wait)),
                            None => drop(shared.settling.changed.wait(state)),
                        }
                    }
                }
                Ok(bytes) => {
                    self.merge_pause = RETRY_FIRST;
                    let due = if self.is_pressed() {
                        Duration::ZERO
                    } else {
                        Duration::from_secs_f64(bytes as f64 / self.background_bytes_per_second.max(1) as f64)
                    };
                    if self.pause_unless_layer(due.saturating_sub(began.elapsed())) {
                        return;
                    }
                }
                Err(error) => self.merge_failed(&error),
            }
        }
    }

    /// What is merged stays as it is; nothing is lost by trying later.
    fn merge_failed(&mut self, error: &SettleError) {
        let pause = self.merge_pause;
        tracing::error!(shard = %self.shared.id, %error, again_in = ?pause, "merging segments failed");
        if !matches!(self.merging, Some(Merging::Written { .. })) {
            self.merging = None;
            self.resume_merging();
        }
        self.merge_after = Some(Instant::now() + pause);
        self.merge_pause = (pause * 2).min(RETRY_MAX);
    }

    /// Segments take so much more than what is alive in them (half as much again, and two layers), or are so many, that merging
    /// comes before settling.
    fn is_pressed(&mut self) -> bool {
        let here = || self.manifest.segments.iter().filter(|entry| entry.cold.is_none());
        if here().count() > SEGMENTS_PRESSED {
            return true;
        }
        let bytes: u64 = here().map(|entry| entry.run_bytes).sum();
        let slack = self.settle_bytes.saturating_mul(2);
        if bytes <= slack || self.engine_failed {
            return false;
        }
        if self.live.is_none() {
            self.live = index::live_bytes(self.shared.view.engine().as_ref()).ok();
        }
        let Some(live) = &self.live else { return false };
        let alive: u64 = self
            .manifest
            .segments
            .iter()
            .filter(|entry| entry.cold.is_none())
            .map(|entry| live.get(&entry.id).copied().unwrap_or(0))
            .sum();
        bytes > alive.saturating_add(alive / 2).saturating_add(slack)
    }

    /// How long there is nothing to do, if nothing happens.
    fn wait(&self) -> Option<Duration> {
        let cooling = self.cooling.as_ref().filter(|cooling| cooling.freezing.is_none());
        let look = cooling.map(|cooling| {
            let pause = cooling.not_before.saturating_duration_since(Instant::now());
            if pause.is_zero() { COLD_LOOK_EVERY } else { pause }
        });
        let merge = self.merge_after.map(|at| at.saturating_duration_since(Instant::now()));
        look.into_iter().chain(merge).chain(self.scrubber.wait()).min()
    }

    /// Waits, and returns whether it is time to stop.
    fn sleep(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut state = self.shared.settling.state();
        while !state.stop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (next, _) = self
                .shared
                .settling
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
        true
    }

    /// Waits unless a layer is to be settled; returns whether it is time to stop.
    fn pause_unless_layer(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut state = self.shared.settling.state();
        while !state.stop && state.layer.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (next, _) = self
                .shared
                .settling
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
        state.stop
    }

    /// See the module for the order.
    fn settle(&mut self, layer: &Overlay) -> Result<(), SettleError> {
        if self.engine_failed {
            self.reopen_engine()?;
        }
        if self.manifest.settled != layer.last {
            let (summary, segment) = match self.written.take() {
                Some((last, summary, segment)) if last == layer.last => (summary, segment),
                _ => self.write_segment(layer)?,
            };
            let id = summary.id;
            // Kept for the next attempt: a manifest that failed may be the one that is found, so the file can't be removed, and
            // must not be joined by one more with every attempt.
            self.written = Some((layer.last, summary, Arc::clone(&segment)));
            let mut next = self.manifest.next();
            next.settled = layer.last;
            next.counters = layer.counters;
            next.segments.push(Entry::new(&summary, next.edition, Vec::new()));
            self.store(next)?;
            self.written = None;
            self.shared.view.segments().add(id, segment);
            if let Some(live) = &mut self.live {
                live.insert(id, summary.run_bytes);
            }
        }
        let indexed = self.index_layer(layer);
        // A segment that can't be read is no reason to throw the index away.
        self.engine_failed |= matches!(indexed, Err(SettleError::Index(IndexError::Engine(_))));
        indexed
    }

    /// Puts the newest segment, which holds `layer`, into the index.
    fn index_layer(&mut self, layer: &Overlay) -> Result<(), SettleError> {
        let engine = self.shared.view.engine();
        let engine = engine.as_ref();
        let _moving = self.shared.view.moving();
        if let Some(entry) = self.manifest.segments.iter().rev().find(|entry| !entry.merged)
            && entry.last_commit == layer.last.number
        {
            let id = entry.id;
            let segment = self.shared.view.segments().get(id).ok_or(IndexError::Missing(id))?;
            index::apply(engine, id, &segment)?;
        }
        for (conversation, touched) in layer.touched.iter().filter(|(_, touched)| touched.low_moved) {
            let live = &mut self.live;
            index::remove_below(engine, *conversation, touched.head.low, |placed| {
                if let Some(bytes) = live.as_mut().and_then(|live| live.get_mut(&placed.segment)) {
                    *bytes = bytes.saturating_sub(u64::from(placed.run.bytes));
                }
            })?;
        }
        index::set_applied(engine, &self.manifest)?;
        self.count_syncs(2);
        Ok(())
    }

    /// Writes what a layer holds into a new segment, and reads back its ends.
    fn write_segment(&mut self, layer: &Overlay) -> Result<(Summary, Arc<Segment>), SettleError> {
        let id = self.manifest.next_segment;
        // The number is used up, whatever happens.
        self.manifest.next_segment = id.saturating_add(1);
        let first = self.manifest.settled.number.saturating_add(1);
        let files = self.files.as_ref();
        let write = || -> Result<_, SettleError> {
            let mut writer = SegmentWriter::create(files, self.shared.id, id)?;
            write_layer(&mut writer, layer)?;
            let summary = writer.finish(first..=layer.last.number)?;
            files.sync_folder()?;
            Ok((summary, Arc::new(Segment::open(files, self.shared.id, id)?)))
        };
        let written = write();
        match written {
            Ok(_) => self.count_syncs(2),
            // It may be the room it takes that is missing.
            Err(_) => drop(self.files.remove(&segment::name(id))),
        }
        written
    }

    /// Makes a manifest the one that counts.
    fn store(&mut self, next: Manifest) -> Result<(), SettleError> {
        next.store(self.files.as_ref(), self.shared.id)?;
        self.count_syncs(2);
        self.manifest = next;
        self.count();
        Ok(())
    }

    fn count(&self) {
        let counts = &self.shared.counts;
        counts.segments.store(self.manifest.segments.len() as u64, Ordering::Relaxed);
        let bytes = self.manifest.segments.iter().map(|entry| entry.bytes).sum();
        counts.segment_bytes.store(bytes, Ordering::Relaxed);
        let segments = self.shared.view.segments();
        let cold = self.manifest.segments.iter().filter(|entry| entry.cold.is_some());
        let there: Vec<u64> =
            cold.map(|entry| segments.get(entry.id).map_or(0, |s| s.frames_bytes() + entry.bytes)).collect();
        counts.cold_segments.store(there.len() as u64, Ordering::Relaxed);
        counts.cold_bytes.store(there.iter().sum(), Ordering::Relaxed);
    }

    fn count_syncs(&self, n: u64) {
        self.shared.counts.background_syncs.fetch_add(n, Ordering::Relaxed);
    }

    /// Makes the engine again. Its files are not opened as they are: after a failed sync they may show what is not on disk. Where not even
    /// a small file can be written it is left as it is, for what is settled can be read by it: what could not be put into it is kept in memory.
    fn reopen_engine(&mut self) -> Result<(), SettleError> {
        self.count_syncs(1);
        write_canary(self.files.as_ref(), self.manifest.settled)?;
        let shared = &self.shared;
        tracing::warn!(shard = %shared.id, "the index failed: making it again");
        // The old one has to be gone before its folder can go. Readers in between are told that it is away.
        shared.view.set_engine(Arc::new(Closed));
        let engine = (self.opener)(true)?;
        index::rebuild(engine.as_ref(), shared.view.segments(), &self.manifest, shared.id)?;
        shared.view.set_engine(engine);
        self.engine_failed = false;
        // The new index points to the segments of an unfinished merge again, all of them.
        if matches!(self.merging, Some(Merging::Moving { .. })) {
            self.resume_merging();
        }
        self.live = None;
        Ok(())
    }

    /// Removes log files that hold nothing but settled commits.
    fn remove_settled_logs(&self) {
        let remove = || -> io::Result<()> {
            let logs = journal::list(self.files.as_ref())?;
            for (this, next) in logs.iter().zip(logs.iter().skip(1)) {
                if next.0 <= self.manifest.settled.number.saturating_add(1) {
                    self.files.remove(&journal::name(this.0))?;
                }
            }
            Ok(())
        };
        if let Err(error) = remove() {
            tracing::warn!(shard = %self.shared.id, %error, "a settled log file could not be removed");
        }
    }

    // ---- merging

    /// Goes on with a merge, or begins one. Returns how many bytes were worked through; 0: there is nothing to do.
    fn merge_some(&mut self) -> Result<usize, SettleError> {
        if self.merge_after.is_some_and(|at| at > Instant::now()) {
            return Ok(0);
        }
        self.merge_after = None;
        if self.engine_failed {
            self.reopen_engine()?;
        }
        match self.merging.take() {
            None => match self.cool()? {
                0 => match self.begin_merge()? {
                    0 => self.begin_cold(),
                    bytes => Ok(bytes),
                },
                bytes => Ok(bytes),
            },
            Some(Merging::Writing { id, inputs, merge }) => self.merge_on(id, inputs, merge),
            Some(Merging::Written { inputs, summary, object }) => self.name_merged(inputs, summary, object),
            Some(Merging::Moving { id, inputs, moving }) => self.move_on(id, inputs, moving),
        }
    }

    fn begin_merge(&mut self) -> Result<usize, SettleError> {
        if self.live.is_none() {
            let engine = self.shared.view.engine();
            self.live = Some(index::live_bytes(engine.as_ref())?);
        }
        let live = self.live.as_ref();
        let live = |id: u64| live.and_then(|live| live.get(&id)).copied().unwrap_or(0);
        let freezing = self.cooling.as_ref().and_then(|cooling| cooling.freezing.as_ref());
        let busy = freezing.map_or(&[][..], |freezing| &freezing.inputs);
        let Some(range) =
            choose(&self.manifest.segments, live, busy, self.settle_bytes, self.segment_bytes_max)
        else {
            return Ok(0);
        };
        let oldest = range.start == 0;
        let entries = self.manifest.segments.get(range).unwrap_or_default();
        let inputs: Vec<u64> = entries.iter().map(|entry| entry.id).collect();
        let mut opened = Vec::with_capacity(inputs.len());
        for id in &inputs {
            opened.push(self.shared.view.segments().get(*id).ok_or(IndexError::Missing(*id))?);
        }
        let id = self.manifest.next_segment;
        self.manifest.next_segment = id.saturating_add(1);
        let out = SegmentWriter::create(self.files.as_ref(), self.shared.id, id)?;
        let merge = Merge::new(opened, out, self.low(), oldest);
        self.merging = Some(Merging::Writing { id, inputs, merge: Box::new(merge) });
        Ok(1)
    }

    /// Says up to where a conversation's records are gone, as it is settled: a mark that is in the log only may not survive
    /// power loss, and the records have to be there then.
    fn low(&self) -> Box<dyn FnMut(ConversationId) -> Seq + Send> {
        let shared = Arc::clone(&self.shared);
        Box::new(move |conversation| match shared.view.settled_head(conversation) {
            Ok(Some(head)) => head.low,
            // Not known: then nothing is left out.
            Ok(None) | Err(_) => Seq::ZERO,
        })
    }

    fn merge_on(&mut self, id: u64, inputs: Vec<u64>, mut merge: Box<Merge>) -> Result<usize, SettleError> {
        let stepped = merge.step(MERGE_STEP_BYTES).map_err(SettleError::from).and_then(|step| {
            if matches!(step, Step::Done(_)) {
                self.files.sync_folder()?;
            }
            Ok(step)
        });
        match stepped {
            Ok(Step::More) => {
                self.merging = Some(Merging::Writing { id, inputs, merge });
                Ok(MERGE_STEP_BYTES)
            }
            Ok(Step::Done(summary)) => {
                self.count_syncs(2);
                self.name_merged(inputs, summary, None)
            }
            Err(error) => {
                drop(merge);
                // Nothing names it. It may be the room it takes that is missing.
                let _ = self.files.remove(&segment::name(id));
                Err(error)
            }
        }
    }

    /// Makes a segment that was put together from others the one that counts.
    fn merged(
        &mut self,
        inputs: Vec<u64>,
        summary: Summary,
        object: Option<String>,
    ) -> Result<usize, SettleError> {
        self.files.sync_folder()?;
        self.count_syncs(2);
        self.name_merged(inputs, summary, object)
    }

    /// Lets the manifest name a merged segment, whose file is durable.
    fn name_merged(
        &mut self,
        inputs: Vec<u64>,
        summary: Summary,
        object: Option<String>,
    ) -> Result<usize, SettleError> {
        let segment = Segment::open(self.files.as_ref(), self.shared.id, summary.id)?;
        let segment = Arc::new(with_cold(segment, object.as_deref(), self.shared.cold.as_ref()));
        // A manifest that failed may be the one that is found: the next attempt is made with the same segment.
        self.merging = Some(Merging::Written { inputs: inputs.clone(), summary, object: object.clone() });
        let mut next = self.manifest.next();
        let after = next.segments.iter().rposition(|entry| inputs.contains(&entry.id));
        let at = after.map_or(next.segments.len(), |at| at + 1);
        next.segments.insert(at, Entry { cold: object, ..Entry::new(&summary, next.edition, inputs) });
        self.shared.view.segments().add(summary.id, segment);
        self.store(next).inspect_err(|_| self.shared.view.segments().remove(summary.id))?;
        self.merging = None;
        self.resume_merging();
        index::set_applied(self.shared.view.engine().as_ref(), &self.manifest)
            .inspect_err(|_| self.engine_failed = true)?;
        Ok(MERGE_STEP_BYTES)
    }

    /// Goes on with moving the index to a merged segment, if the manifest says that it was not finished.
    fn resume_merging(&mut self) {
        let Some(entry) = self.manifest.segments.iter().find(|entry| !entry.replaces.is_empty()) else {
            return;
        };
        let segments = self.shared.view.segments();
        let Some(segment) = segments.get(entry.id) else { return };
        let from: Vec<_> =
            entry.replaces.iter().filter_map(|id| segments.get(*id).map(|segment| (*id, segment))).collect();
        self.merging = Some(Merging::Moving {
            id: entry.id,
            inputs: entry.replaces.clone(),
            moving: Box::new(Move::new(entry.id, &segment, &from)),
        });
    }

    fn move_on(&mut self, id: u64, inputs: Vec<u64>, mut moving: Box<Move>) -> Result<usize, SettleError> {
        let shared = Arc::clone(&self.shared);
        let _moving = shared.view.moving();
        let engine = self.shared.view.engine();
        let mut low = self.low();
        let moved = moving.step(engine.as_ref(), MOVE_STEP_ROWS, &mut low);
        let done = moved.inspect_err(|error| self.engine_failed = matches!(error, IndexError::Engine(_)))?;
        if !done {
            self.merging = Some(Merging::Moving { id, inputs, moving });
            return Ok(MERGE_STEP_BYTES);
        }
        drop(moving);
        let behind = engine.barrier();
        behind.inspect_err(|_| self.engine_failed = true)?;
        let mut next = self.manifest.next();
        let was_cold = next.segments.iter().any(|entry| inputs.contains(&entry.id) && entry.cold.is_some());
        next.segments.retain(|entry| !inputs.contains(&entry.id));
        if let Some(entry) = next.segments.iter_mut().find(|entry| entry.id == id) {
            entry.replaces.clear();
        }
        self.store(next)?;
        index::set_applied(engine.as_ref(), &self.manifest).inspect_err(|_| self.engine_failed = true)?;
        self.count_syncs(3);
        self.shared.counts.merges.fetch_add(1, Ordering::Relaxed);
        for input in &inputs {
            self.shared.view.segments().remove(*input);
            if let Err(error) = self.files.remove(&segment::name(*input)) {
                tracing::warn!(shard = %self.shared.id, %error, "a merged segment could not be removed");
            }
        }
        if let Some(cooling) = &mut self.cooling
            && was_cold
        {
            cooling.sweep_at = Instant::now();
        }
        // What retention took meanwhile is counted with the rest.
        self.live = None;
        Ok(MERGE_STEP_BYTES)
    }

    // ---- the cold tier

    /// Takes up what the cold tier's threads have done. Returns how many bytes were worked through.
    fn cool(&mut self) -> Result<usize, SettleError> {
        let shard = self.shared.id;
        let Some(cooling) = &mut self.cooling else { return Ok(0) };
        if let Some(outcome) = cooling.sweeping.as_mut().and_then(Job::outcome) {
            cooling.sweeping = None;
            match outcome {
                Ok(0) => {}
                Ok(objects) => {
                    tracing::info!(%shard, objects, "removed objects of the cold tier that nobody needs");
                }
                Err(error) => {
                    cooling.failed(&error, "looking for objects of the cold tier that nobody needs", shard);
                    cooling.sweep_at = cooling.not_before;
                }
            }
        }
        let Some(outcome) = cooling.freezing.as_mut().and_then(|freezing| freezing.job.outcome()) else {
            return Ok(0);
        };
        let inputs = cooling.freezing.take().map(|freezing| freezing.inputs).unwrap_or_default();
        match outcome {
            Ok(Frozen { summary, object }) => {
                cooling.pause = COLD_RETRY_FIRST;
                self.merged(inputs, summary, object)
            }
            Err(error) => {
                cooling.failed(&error, "moving records to the cold tier", shard);
                Ok(0)
            }
        }
    }

    /// Begins what there is to do for the cold tier, on a thread of its own.
    fn begin_cold(&mut self) -> Result<usize, SettleError> {
        // Looking for something to merge has counted it.
        let Some(live) = self.live.as_ref() else { return Ok(0) };
        let live = |id: u64| live.get(&id).copied().unwrap_or(0);
        let shared = Arc::clone(&self.shared);
        let Some(cooling) = &mut self.cooling else { return Ok(0) };
        let now = Instant::now();
        if cooling.freezing.is_some() || cooling.sweeping.is_some() || cooling.not_before > now {
            return Ok(0);
        }
        let tier = Arc::clone(&cooling.tier);
        let wake = Arc::clone(&shared);
        if cooling.sweep_at <= now {
            cooling.sweep_at = now + SWEEP_EVERY;
            let named: Vec<String> =
                self.manifest.segments.iter().filter_map(|entry| entry.cold.clone()).collect();
            cooling.sweeping = Some(Job::begin(
                format!("cold-{}", shared.id),
                move |stop| tier.sweep(&named, stop).map_err(FreezeError::Store),
                move || wake.settling.wake(),
            )?);
            return Ok(0);
        }
        let range = choose_cold(&self.manifest.segments, live, &tier, self.segment_bytes_max);
        let Some(range) = range else { return Ok(0) };
        let oldest = range.start == 0;
        let entries = self.manifest.segments.get(range).unwrap_or_default();
        let ids: Vec<u64> = entries.iter().map(|entry| entry.id).collect();
        let mut inputs = Vec::with_capacity(ids.len());
        for id in &ids {
            inputs.push(shared.view.segments().get(*id).ok_or(IndexError::Missing(*id))?);
        }
        let id = self.manifest.next_segment;
        self.manifest.next_segment = id.saturating_add(1);
        let order = Order {
            files: Arc::clone(&self.files),
            shard: shared.id,
            id,
            inputs,
            low: self.low(),
            oldest,
            tier,
            bytes_per_second: self.background_bytes_per_second,
        };
        let job = Job::begin(
            format!("cold-{}", shared.id),
            move |stop| freeze::freeze(order, stop),
            move || wake.settling.wake(),
        )?;
        if let Some(cooling) = &mut self.cooling {
            cooling.freezing = Some(Freezing { inputs: ids, job });
        }
        Ok(0)
    }
}

/// A segment with the place of its runs, if those are in the cold tier.
fn with_cold(segment: Segment, object: Option<&str>, cold: Option<&Arc<Tier>>) -> Segment {
    match (object, cold) {
        (Some(object), Some(tier)) => {
            let frames = tier.frames(segment.summary().id, object);
            segment.with_frames(frames)
        }
        _ => segment,
    }
}

/// Which segments go to the cold tier: one that is there already, if more than half of it is gone, so that it shrinks; or
/// those following each other in which everything is old, if they are worth an object.
fn choose_cold(
    segments: &[Entry],
    live: impl Fn(u64) -> u64,
    tier: &Tier,
    segment_bytes_max: u64,
) -> Option<std::ops::Range<usize>> {
    let gone = segments
        .iter()
        .position(|entry| entry.cold.is_some() && live(entry.id).saturating_mul(2) < entry.run_bytes);
    if let Some(at) = gone {
        return Some(at..at + 1);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let old = u64::try_from(now.saturating_sub(tier.after).as_millis()).unwrap_or(u64::MAX);
    let fits = |entry: &Entry| entry.cold.is_none() && entry.newest.get() <= old;
    let mut start = 0;
    while start < segments.len() {
        let (mut end, mut bytes, mut records) = (start, 0u64, 0u64);
        while let Some(entry) = segments.get(end).filter(|entry| fits(entry))
            && (end == start || bytes.saturating_add(entry.bytes) <= segment_bytes_max)
        {
            bytes = bytes.saturating_add(entry.bytes);
            records = records.saturating_add(live(entry.id));
            end += 1;
        }
        if records > 0 && records >= tier.object_bytes_min {
            return Some(start..end);
        }
        start = end.max(start + 1);
    }
    None
}

/// Which segments are to be merged: those of which more than half is gone, or [`MERGE_FAN_IN`] newest ones of one tier.
fn choose(
    segments: &[Entry],
    live: impl Fn(u64) -> u64,
    busy: &[u64],
    settle_bytes: u64,
    segment_bytes_max: u64,
) -> Option<std::ops::Range<usize>> {
    let free = |entry: &Entry| entry.cold.is_none() && !busy.contains(&entry.id);
    let gone = segments.iter().position(|entry| {
        free(entry) && entry.run_bytes > 0 && live(entry.id).saturating_mul(2) < entry.run_bytes
    });
    if let Some(at) = gone {
        return Some(at..at + 1);
    }
    let mut tier_bytes = settle_bytes.max(1);
    while tier_bytes.saturating_mul(MERGE_FAN_IN as u64) <= segment_bytes_max {
        let small =
            segments.iter().rev().take_while(|entry| free(entry) && entry.bytes <= tier_bytes).count();
        if small >= MERGE_FAN_IN {
            return Some(segments.len() - small..segments.len());
        }
        tier_bytes = tier_bytes.saturating_mul(MERGE_FAN_IN as u64);
    }
    None
}

/// Everything a layer holds: records by conversation, then rows by table and key.
fn write_layer(writer: &mut SegmentWriter, layer: &Overlay) -> io::Result<()> {
    let mut conversations: Vec<_> = layer.touched.iter().collect();
    conversations.sort_unstable_by_key(|(conversation, _)| **conversation);
    let mut rows: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    for (conversation, touched) in conversations {
        for pending in &touched.records {
            let record = &pending.record;
            writer.record(*conversation, record.seq, record.time, &pending.encoded)?;
        }
        let key = Key::conversation(*conversation);
        rows.push((full_key(Table::Head, key.as_ref()), touched.head.to_row()));
        for ((user, device), lane) in &touched.lanes {
            let key = Key::lane(*conversation, *user, *device);
            rows.push((full_key(Table::Lane, key.as_ref()), lane.to_row()));
        }
    }
    rows.sort_unstable();
    let mut derived = rows.iter().peekable();
    let mut write = |full: &[u8], row: Option<&[u8]>| match full.split_first() {
        Some((table, key)) => writer.row(*table, key, row),
        None => Ok(()),
    };
    for (full, row) in &layer.rows {
        while let Some((before, row)) = derived.next_if(|(derived, _)| derived < full) {
            write(before, Some(row))?;
        }
        write(full, row.as_deref())?;
    }
    for (full, row) in derived {
        write(full, Some(row))?;
    }
    Ok(())
}

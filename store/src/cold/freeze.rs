//! Making a cold segment of others, on a thread of its own.
//!
//! 1. the segments are merged: the new one's runs go, compressed, into a new object, everything else into a new file, which is
//!    synced
//! 2. the file is written behind the frames, so that the object tells by itself what is in it; the object is ended
//! 3. the object is proven: its length, its end against the file, and every run and record in it, read back as readers will
//!
//! The settler then names both in the manifest, as after any merge; before that nothing has changed. What a job that failed
//! or was stopped leaves is removed: the file at once (or at the next start), the object at once (or a day later).
//!
//! Not here: which segments, and when (`shard::settler`).

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, Seq, ShardId};

use super::{ColdStore, Stop, Tier, Upload};
use crate::{
    codec::Malformed,
    files::{Files, ReadAt},
    segment::{
        self, FrameWriter, Frames, Merge, MergeError, Progress, Segment, SegmentDamage, SegmentError,
        SegmentWriter, Step, Summary,
    },
};

/// Bytes worked through between two looks whether to stop.
const STEP_BYTES: usize = 1 << 20;

/// Bytes of a segment's file copied behind the frames, or compared, at a time.
const PIECE_BYTES: u32 = 1 << 20;

/// Why no cold segment could be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FreezeError {
    #[error("the object store failed: {0}")]
    Store(#[source] io::Error),
    #[error("a file of the shard failed: {0}")]
    File(#[from] io::Error),
    #[error("what is to go there can't be merged: {0}")]
    Merge(#[from] MergeError),
    #[error("the segment's file can't be read: {0}")]
    Segment(#[from] SegmentError),
    #[error("what was read back is not what was written: {0}")]
    Proof(#[from] SegmentDamage),
    #[error("what was read back is not what was written: the object's end differs")]
    End,
    #[error("it was stopped")]
    Stopped,
}

/// What a job made.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    pub(crate) summary: Summary,
    /// `None`: nothing of the records was left, so that there is no object.
    pub(crate) object: Option<String>,
}

/// What a job is given.
pub(crate) struct Order {
    pub(crate) files: Arc<dyn Files>,
    pub(crate) shard: ShardId,
    /// Of the new segment.
    pub(crate) id: u64,
    /// Oldest first.
    pub(crate) inputs: Vec<Arc<Segment>>,
    /// Up to where a conversation's records are gone.
    pub(crate) low: Box<dyn FnMut(ConversationId) -> Seq + Send>,
    /// The oldest segment is among them.
    pub(crate) oldest: bool,
    pub(crate) tier: Arc<Tier>,
    pub(crate) bytes_per_second: u64,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Order").field("shard", &self.shard).field("id", &self.id).finish_non_exhaustive()
    }
}

/// What a job came to.
pub(crate) type Outcome<T> = Result<T, FreezeError>;

/// Work on a thread of its own. Dropped, it is stopped and waited for.
#[derive(Debug)]
pub(crate) struct Job<T> {
    stop: Stop,
    outcome: Arc<Mutex<Option<Outcome<T>>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Job<T> {
    /// Begins `work`, and calls `wake` when it has ended.
    pub(crate) fn begin(
        name: String,
        work: impl FnOnce(&Stop) -> Outcome<T> + Send + 'static,
        wake: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Stop::default();
        let outcome = Arc::default();
        let (told, slot) = (stop.clone(), Arc::clone(&outcome));
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let outcome = work(&told);
            let slot: &Mutex<Option<Outcome<T>>> = &slot;
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
            wake();
        })?;
        Ok(Self { stop, outcome, thread: Some(thread) })
    }

    /// What it came to, once, if it has ended.
    pub(crate) fn outcome(&mut self) -> Option<Outcome<T>> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
        if outcome.is_none() && self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            // It ended between the two looks, or panicked.
            let late = self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
            return Some(late.unwrap_or(Err(FreezeError::Stopped)));
        }
        outcome
    }
}

impl<T> Drop for Job<T> {
    fn drop(&mut self) {
        self.stop.tell();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of the cold tier had panicked");
        }
    }
}

/// Does what is ordered.
pub(crate) fn freeze(order: Order, stop: &Stop) -> Outcome<Frozen> {
    let (files, tier, id) = (Arc::clone(&order.files), Arc::clone(&order.tier), order.id);
    let name = tier.name(id).map_err(FreezeError::Store)?;
    let frozen = attempt(order, &name, stop);
    if frozen.is_err() {
        let _ = files.remove(&segment::name(id));
        // The object store may be away: then it is removed with other orphans.
        let _ = tier.store().remove(&name, stop);
    }
    frozen
}

/// The object, begun with its first frame.
#[derive(Debug)]
struct Target {
    store: Arc<dyn ColdStore>,
    name: String,
    stop: Stop,
    upload: Option<Box<dyn Upload>>,
    /// It failed: then the merge has failed as well, and this says why.
    failed: bool,
}

impl Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.upload.is_none() {
            self.upload = Some(self.store.begin(&self.name, &self.stop)?);
        }
        match &mut self.upload {
            Some(upload) => upload.write(bytes),
            None => Ok(()),
        }
    }
}

/// Slows a job down to so many bytes per second.
struct Pace<'a> {
    stop: &'a Stop,
    bytes_per_second: u64,
}

impl Pace<'_> {
    fn keep(&self, bytes: usize, began: Instant) -> Outcome<()> {
        let due = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.max(1) as f64);
        let left = due.saturating_sub(began.elapsed());
        if !left.is_zero() {
            self.stop.pause(left);
        }
        if self.stop.is_told() { Err(FreezeError::Stopped) } else { Ok(()) }
    }
}

fn attempt(order: Order, name: &str, stop: &Stop) -> Outcome<Frozen> {
    let Order { files, shard, id, inputs, low, oldest, tier, bytes_per_second } = order;
    let pace = Pace { stop, bytes_per_second };
    let target = Arc::new(Mutex::new(Target {
        store: Arc::clone(tier.store()),
        name: name.to_owned(),
        stop: stop.clone(),
        upload: None,
        failed: false,
    }));
    let sink = Arc::clone(&target);
    let frames = FrameWriter::new(Box::new(move |bytes| {
        let mut target = sink.lock().unwrap_or_else(PoisonError::into_inner);
        let written = target.write(bytes);
        target.failed |= written.is_err();
        written
    }))?;
    let out = SegmentWriter::create_cold(files.as_ref(), shard, id, frames)?;
    let mut merge = Merge::new(inputs, out, low, oldest);
    let summary = loop {
        let began = Instant::now();
        match merge.step(STEP_BYTES) {
            Ok(Step::More) => pace.keep(STEP_BYTES, began)?,
            Ok(Step::Done(summary)) => break summary,
            Err(MergeError::Write(error)) if target.lock().unwrap_or_else(PoisonError::into_inner).failed => {
                return Err(FreezeError::Store(error));
            }
            Err(error) => return Err(error.into()),
        }
    };
    drop(merge);
    let segment = Segment::open(files.as_ref(), shard, id)?;
    let upload = target.lock().unwrap_or_else(PoisonError::into_inner).upload.take();
    let Some(mut upload) = upload else { return Ok(Frozen { summary, object: None }) };
    let file = files.open(&segment::name(id))?;
    for (at, bytes) in pieces(summary.bytes) {
        let began = Instant::now();
        upload.write(&read(file.as_ref(), at, bytes)?).map_err(FreezeError::Store)?;
        pace.keep(bytes as usize, began)?;
    }
    upload.finish().map_err(FreezeError::Store)?;
    prove(&segment, file.as_ref(), tier.store(), name, &pace)?;
    Ok(Frozen { summary, object: Some(name.to_owned()) })
}

/// Reads all of an object back: what it has must be what was written.
fn prove(
    segment: &Segment,
    file: &dyn ReadAt,
    store: &Arc<dyn ColdStore>,
    name: &str,
    pace: &Pace<'_>,
) -> Outcome<()> {
    let frames_bytes = segment.frames_bytes();
    if store.size(name, pace.stop).map_err(FreezeError::Store)? != frames_bytes + segment.summary().bytes {
        return Err(FreezeError::End);
    }
    for (at, bytes) in pieces(segment.summary().bytes) {
        let began = Instant::now();
        let there = store.read(name, frames_bytes + at, bytes, pace.stop).map_err(FreezeError::Store)?;
        if there != read(file, at, bytes)? {
            return Err(FreezeError::End);
        }
        pace.keep(bytes as usize, began)?;
    }
    let readback = Readback {
        store: Arc::clone(store),
        name: name.to_owned(),
        stop: pace.stop.clone(),
        kept: Mutex::new(None),
    };
    let mut verifier = segment.clone().with_frames(Arc::new(readback)).verifier().with_cold();
    loop {
        let began = Instant::now();
        if verifier.step(STEP_BYTES)? == Progress::Done {
            return Ok(());
        }
        pace.keep(STEP_BYTES, began)?;
    }
}

/// Frames as they are read back: only the last one is kept.
#[derive(Debug)]
struct Readback {
    store: Arc<dyn ColdStore>,
    name: String,
    stop: Stop,
    kept: Mutex<Option<(u64, Bytes)>>,
}

impl Frames for Readback {
    fn read(&self, at: u64, bytes: u32) -> io::Result<Bytes> {
        self.store.read(&self.name, at, bytes, &self.stop)
    }

    fn cached(&self, number: u64) -> Option<Bytes> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().filter(|(kept, _)| *kept == number).map(|(_, frame)| frame.clone())
    }

    fn keep(&self, number: u64, frame: &Bytes) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, frame.clone()));
    }
}

/// `length` bytes cut into pieces: where each begins, and its bytes.
fn pieces(length: u64) -> impl Iterator<Item = (u64, u32)> {
    let step = u64::from(PIECE_BYTES);
    (0..length.div_ceil(step)).map(move |n| {
        let at = n * step;
        (at, u32::try_from(length - at).unwrap_or(u32::MAX).min(PIECE_BYTES))
    })
}

fn read(file: &dyn ReadAt, at: u64, bytes: u32) -> Outcome<Vec<u8>> {
    let length = usize::try_from(bytes).map_err(|_| SegmentError::from(Malformed("segment length")))?;
    let mut buffer = vec![0; length];
    file.read_exact_at(&mut buffer, at)?;
    Ok(buffer)
}

//! Scrubbing: while there is nothing else to do, the settler reads segments again, to find damage before somebody needs what
//! is damaged.
//!
//! - One pass over all segments, at a bounded rate, then a pause. Where a pass stands is kept in memory only.
//! - Damage is logged and counted, and stops nothing: whoever reads what is damaged is refused, everything else goes on.
//!
//! Not here: what is looked at (`segment::Verifier`), proving a whole folder (`maintain::verify`).

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::Shared;
use crate::{
    StoreOptions,
    segment::{Progress, Verifier},
};

/// Time after the start before which no pass begins: a start has other things to do.
const FIRST_AFTER: Duration = Duration::from_secs(60);

/// Bytes read in one step, at least and at most.
const STEP_BYTES: (u64, u64) = (64 * 1024, 1 << 20);

/// Where the passes stand.
#[derive(Debug)]
pub(crate) struct Scrubber {
    bytes_per_second: u64,
    every: Duration,
    /// When the next pass begins.
    next: Instant,
    /// Segments of this pass that were not looked at yet.
    rest: Vec<u64>,
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    id: u64,
    verifier: Verifier,
    /// Bytes of the file.
    bytes: u64,
    counted: u64,
}

impl Scrubber {
    pub(crate) fn new(options: &StoreOptions) -> Self {
        Self {
            bytes_per_second: options.scrub_bytes_per_second,
            every: options.scrub_every,
            next: Instant::now() + FIRST_AFTER.min(options.scrub_every),
            rest: Vec::new(),
            current: None,
        }
    }

    /// How long there is nothing to do; `None`: for good.
    pub(crate) fn wait(&self) -> Option<Duration> {
        if self.bytes_per_second == 0 {
            None
        } else if self.current.is_some() || !self.rest.is_empty() {
            Some(Duration::ZERO)
        } else {
            Some(self.next.saturating_duration_since(Instant::now()))
        }
    }

    /// Looks at a few bytes, if there are any to be looked at now. `segments`: all there are. Returns how long to pause.
    pub(crate) fn step(&mut self, shared: &Shared, segments: impl FnOnce() -> Vec<u64>) -> Option<Duration> {
        if !self.wait()?.is_zero() {
            return None;
        }
        if self.current.is_none() && self.rest.is_empty() {
            self.rest = segments();
            self.rest.reverse();
        }
        let budget = (self.bytes_per_second / 4).clamp(STEP_BYTES.0, STEP_BYTES.1);
        let bytes = self.look(shared, budget);
        if self.current.is_none() && self.rest.is_empty() {
            self.next = Instant::now() + self.every;
            shared.counts.scrubs.fetch_add(1, Ordering::Relaxed);
        }
        Some(Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64))
    }

    /// Returns the bytes that were looked at, about.
    fn look(&mut self, shared: &Shared, budget: u64) -> u64 {
        if self.current.is_none() {
            self.current = self.rest.pop().and_then(|id| {
                let segment = shared.view.segments().get(id)?;
                Some(Current { id, verifier: segment.verifier(), bytes: segment.summary().bytes, counted: 0 })
            });
        }
        let Some(current) = &mut self.current else { return 0 };
        if shared.view.segments().get(current.id).is_none() {
            // Merged into another meanwhile.
            self.current = None;
            return 0;
        }
        let stepped = current.verifier.step(usize::try_from(budget).unwrap_or(usize::MAX));
        let done = matches!(stepped, Ok(Progress::Done));
        let left = current.bytes.saturating_sub(current.counted);
        let bytes = if done { left } else { budget.min(left) };
        current.counted += bytes;
        shared.counts.scrubbed.fetch_add(bytes, Ordering::Relaxed);
        if let Err(damage) = stepped {
            shared.counts.scrub_damage.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                shard = %shared.id, %damage,
                "what is settled is damaged: restore a backup, or keep what can be proven with `fulmar store salvage`"
            );
        }
        if done {
            self.current = None;
        }
        bytes
    }
}

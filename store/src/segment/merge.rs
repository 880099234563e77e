//! Merging: several segments, one after the other in the log, become one.
//!
//! - Records are neither invented nor lost: what comes out are the inputs' records above each conversation's `low`, once each.
//!   Two different records with the same seq end the merge; so does damage, wherever it is found.
//! - A run that no other input overlaps and that lies above `low` is copied as it is, after its checksum was verified, and put
//!   together with its neighbour if both fit one run. Others are taken apart.
//! - Of the rows with the same key the newest input's stays.
//! - One run, one index block and one row block per input are in memory.
//!
//! Not here: which segments to merge and when, the manifest, removing the inputs.

use std::{io, sync::Arc};

use bytes::Bytes;
use fulmar_protocol::id::{ConversationId, Seq};

use super::{
    Run, SegmentDamage, SegmentError, Summary,
    reader::{Records, Row, Rows, Runs, Segment, records},
    writer::SegmentWriter,
};
use crate::{codec::Malformed, record::Record};

/// Why a merge ended. What it wrote is of no use; the inputs are as they were.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MergeError {
    /// An input can't be read.
    #[error(transparent)]
    Damage(#[from] SegmentDamage),
    /// Two inputs have different records in the same place.
    #[error(
        "segments {:016x} and {:016x} have different records at seq {seq} of conversation {conversation}",
        segments.0,
        segments.1
    )]
    Differ { conversation: ConversationId, seq: Seq, segments: (u64, u64) },
    /// The inputs do not belong together: a mistake of the caller.
    #[error("the segments can't be merged: {0}")]
    Inputs(&'static str),
    /// The new segment can't be written.
    #[error("the merged segment can't be written: {0}")]
    Write(#[from] io::Error),
}

/// How far a merge has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// There is more to merge.
    More,
    /// The new segment is written and its bytes are durable.
    Done(Summary),
}

/// What a run or a row costs besides its bytes, so that many small ones are bounded by a budget, too.
const ENTRY_COST: usize = 64;

/// One input, and how far it was read.
#[derive(Debug)]
struct Input {
    segment: Arc<Segment>,
    runs: Runs,
    rows: Rows,
    /// The run that comes next, or is taken apart.
    run: Option<Run>,
    /// The rest of `run`, if it is taken apart.
    open: Option<Open>,
    row: Option<Row>,
}

/// A run that is taken apart.
#[derive(Debug)]
struct Open {
    record: Record,
    encoded: Bytes,
    rest: Records,
}

impl Input {
    fn new(segment: Arc<Segment>) -> Self {
        Self { runs: segment.runs(), rows: segment.rows(), segment, run: None, open: None, row: None }
    }

    fn id(&self) -> u64 {
        self.segment.summary().id
    }

    /// What comes next.
    fn place(&self) -> Option<(ConversationId, Seq)> {
        let run = self.run.as_ref()?;
        Some((run.conversation, self.open.as_ref().map_or(run.first, |open| open.record.seq)))
    }

    fn next_run(&mut self) -> Result<(), SegmentDamage> {
        self.open = None;
        let next = self.runs.next().transpose();
        self.run = next.map_err(|what| SegmentDamage::whole(self.id(), what))?;
        Ok(())
    }

    fn next_row(&mut self) -> Result<(), SegmentDamage> {
        let next = self.rows.next().transpose();
        self.row = next.map_err(|what| SegmentDamage::whole(self.id(), what))?;
        Ok(())
    }

    fn damage(&self, run: &Run, what: impl Into<SegmentError>) -> SegmentDamage {
        SegmentDamage::of(self.id(), run, what)
    }

    /// Takes `run` apart from the record after `low` on, if that was not done yet.
    fn open(&mut self, low: Seq) -> Result<Option<&Open>, SegmentDamage> {
        if self.open.is_none()
            && let Some(run) = self.run
        {
            let bytes = self.segment.run(&run).map_err(|what| self.damage(&run, what))?;
            self.next_record(&run, records(&run, &bytes, low.saturating_add(1)))?;
        }
        Ok(self.open.as_ref())
    }

    fn next_record(&mut self, run: &Run, mut rest: Records) -> Result<(), SegmentDamage> {
        match rest.next() {
            Some(Ok((record, encoded))) => {
                self.open = Some(Open { record, encoded, rest });
                Ok(())
            }
            Some(Err(what)) => Err(self.damage(run, what)),
            None => self.next_run(),
        }
    }
}

/// Which part is being merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Begin,
    Records,
    Rows,
    Ended(Option<Summary>),
}

/// A merge under way.
pub(crate) struct Merge {
    /// Oldest first.
    inputs: Vec<Input>,
    out: Option<SegmentWriter>,
    low: Box<dyn FnMut(ConversationId) -> Seq + Send>,
    /// The last answer of `low`.
    known_low: Option<(ConversationId, Seq)>,
    drop_gone: bool,
    stage: Stage,
}

impl std::fmt::Debug for Merge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merge")
            .field("inputs", &self.inputs)
            .field("drop_gone", &self.drop_gone)
            .field("stage", &self.stage)
            .finish_non_exhaustive()
    }
}

impl Merge {
    /// Merges `inputs`, oldest first, whose commits follow each other, into `out`.
    ///
    /// `low(conversation)`: records up to it are left out; asked once per conversation, in order. `drop_gone`: rows that are gone
    /// are left out, which is right only if no older segment can have the row.
    pub(crate) fn new(
        inputs: Vec<Arc<Segment>>,
        out: SegmentWriter,
        low: Box<dyn FnMut(ConversationId) -> Seq + Send>,
        drop_gone: bool,
    ) -> Self {
        let inputs = inputs.into_iter().map(Input::new).collect();
        Self { inputs, out: Some(out), low, known_low: None, drop_gone, stage: Stage::Begin }
    }

    /// Merges about `budget` bytes, at least one run, record or row. The last step ends in a sync.
    ///
    /// # Errors
    /// See [`MergeError`]; the merge is over then.
    pub(crate) fn step(&mut self, budget: usize) -> Result<Step, MergeError> {
        let done = self.advance(budget);
        if done.is_err() {
            self.stage = Stage::Ended(None);
            self.out = None;
        }
        done
    }

    fn advance(&mut self, budget: usize) -> Result<Step, MergeError> {
        let mut spent = 0usize;
        loop {
            match self.stage {
                Stage::Begin => {
                    self.check_inputs()?;
                    for input in &mut self.inputs {
                        input.next_run()?;
                    }
                    self.stage = Stage::Records;
                }
                Stage::Records => match self.merge_records()? {
                    Some(bytes) => spent += bytes + ENTRY_COST,
                    None => {
                        for input in &mut self.inputs {
                            input.next_row()?;
                        }
                        self.stage = Stage::Rows;
                    }
                },
                Stage::Rows => match self.merge_rows()? {
                    Some(bytes) => spent += bytes + ENTRY_COST,
                    None => {
                        let summary = self.finish()?;
                        self.stage = Stage::Ended(Some(summary));
                    }
                },
                Stage::Ended(Some(summary)) => return Ok(Step::Done(summary)),
                Stage::Ended(None) => return Err(MergeError::Inputs("it failed before")),
            }
            if spent >= budget.max(1) {
                return Ok(Step::More);
            }
        }
    }

    /// Bytes of memory it holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let inputs = self.inputs.iter().map(|input| {
            input.runs.held() + input.rows.held() + input.open.as_ref().map_or(0, |open| open.rest.held())
        });
        inputs.sum::<usize>() + self.out.as_ref().map_or(0, SegmentWriter::held)
    }

    fn check_inputs(&self) -> Result<(), MergeError> {
        if self.inputs.is_empty() {
            return Err(MergeError::Inputs("there are none"));
        }
        for (older, newer) in self.inputs.iter().zip(self.inputs.iter().skip(1)) {
            let (older, newer) = (older.segment.summary(), newer.segment.summary());
            if older.shard != newer.shard {
                return Err(MergeError::Inputs("they are of several shards"));
            }
            if newer.first_commit < older.first_commit
                || newer.last_commit < older.last_commit
                || newer.first_commit > older.last_commit.saturating_add(1)
            {
                return Err(MergeError::Inputs("their commits do not follow each other"));
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Summary, MergeError> {
        let (Some(first), Some(last), Some(out)) = (self.inputs.first(), self.inputs.last(), self.out.take())
        else {
            return Err(MergeError::Inputs("there are none"));
        };
        let commits = first.segment.summary().first_commit..=last.segment.summary().last_commit;
        Ok(out.finish(commits)?)
    }

    fn low_of(&mut self, conversation: ConversationId) -> Seq {
        match self.known_low {
            Some((known, low)) if known == conversation => low,
            _ => {
                let low = (self.low)(conversation);
                self.known_low = Some((conversation, low));
                low
            }
        }
    }

    /// Merges the next run or record. Returns the bytes it took; `None` when there are no more.
    fn merge_records(&mut self) -> Result<Option<usize>, MergeError> {
        let first = self.inputs.iter().enumerate().filter_map(|(n, input)| Some((input.place()?, n))).min();
        let Some((place, n)) = first else { return Ok(None) };
        let low = self.low_of(place.0);
        let Some(input) = self.inputs.get(n) else { return Ok(None) };
        let Some(run) = input.run else { return Ok(None) };
        if input.open.is_some() {
            return self.merge_record(place, low).map(Some);
        }
        if run.last() <= low {
            self.at(n)?.next_run()?;
            return Ok(Some(0));
        }
        let overlapped = self.inputs.iter().enumerate().any(|(other, input)| {
            other != n && input.place().is_some_and(|(c, seq)| c == place.0 && seq <= run.last())
        });
        if overlapped || run.first <= low {
            self.at(n)?.open(low)?;
        } else {
            self.copy(n, &run)?;
        }
        Ok(Some(usize::try_from(run.bytes).unwrap_or(0)))
    }

    /// Copies the next run of the `n`-th input as it is.
    fn copy(&mut self, n: usize, run: &Run) -> Result<(), MergeError> {
        let input = self.at(n)?;
        let bytes = input.segment.run(run).map_err(|what| input.damage(run, what))?;
        let oldest = match records(run, &bytes, Seq::ZERO).next() {
            Some(Ok((record, _))) => record.time,
            Some(Err(what)) => return Err(input.damage(run, what).into()),
            None => return Err(input.damage(run, Malformed("segment run: length")).into()),
        };
        input.next_run()?;
        self.out()?.copy(run, oldest, &bytes)?;
        Ok(())
    }

    /// Merges the record at `place`, which at least one input that is taken apart comes to next.
    fn merge_record(&mut self, place: (ConversationId, Seq), low: Seq) -> Result<usize, MergeError> {
        let (conversation, seq) = place;
        let mut chosen: Option<(u64, Record, Bytes)> = None;
        for input in self.inputs.iter_mut().filter(|input| input.place() == Some(place)) {
            let (Some(run), id) = (input.run, input.id()) else { continue };
            input.open(low)?;
            let Some(open) = input.open.take() else { continue };
            match &chosen {
                None => chosen = Some((id, open.record, open.encoded)),
                Some((_, _, encoded)) if *encoded == open.encoded => {}
                Some((other, ..)) => {
                    return Err(MergeError::Differ { conversation, seq, segments: (*other, id) });
                }
            }
            input.next_record(&run, open.rest)?;
        }
        let Some((_, record, encoded)) = chosen else { return Ok(0) };
        self.out()?.record(conversation, seq, record.time, &encoded)?;
        Ok(encoded.len())
    }

    /// Merges the next row. Returns the bytes it took; `None` when there are no more.
    fn merge_rows(&mut self) -> Result<Option<usize>, MergeError> {
        let next = |input: &Input| input.row.as_ref().map(|(table, key, _)| (*table, key.clone()));
        let Some(place) = self.inputs.iter().filter_map(next).min() else { return Ok(None) };
        let mut newest = None;
        for input in self.inputs.iter_mut().filter(|input| next(input).as_ref() == Some(&place)) {
            newest = input.row.take().and_then(|(_, _, row)| row);
            input.next_row()?;
        }
        let (table, key) = place;
        let bytes = key.len() + newest.as_ref().map_or(0, Bytes::len);
        if newest.is_some() || !self.drop_gone {
            self.out()?.row(table, &key, newest.as_deref())?;
        }
        Ok(Some(bytes))
    }

    fn at(&mut self, n: usize) -> Result<&mut Input, MergeError> {
        self.inputs.get_mut(n).ok_or(MergeError::Inputs("there are fewer than there were"))
    }

    fn out(&mut self) -> Result<&mut SegmentWriter, MergeError> {
        self.out.as_mut().ok_or(MergeError::Inputs("it failed before"))
    }
}

//! What the segments of a shard say together: of every row the newest version, and all runs in order.
//!
//! - Streams: of each segment one block is in memory.
//! - A segment whose list of rows or runs can't be followed is told about once, and ends there.
//!
//! Not here: whether it makes sense (`maintain::verify`), the index of it (`index`).

use std::sync::Arc;

use bytes::Bytes;
use fulmar_protocol::id::ShardId;

use crate::{
    files::Files,
    segment::{Row, Rows, Run, Runs, Segment, SegmentError},
};

/// A segment as the manifest orders them, oldest first.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) id: u64,
    pub(crate) segment: Arc<Segment>,
    /// Its runs lie in the cold tier.
    pub(crate) cold: bool,
}

/// A row, and the segment that has its newest version.
#[derive(Clone, Debug)]
pub(crate) struct TrueRow {
    pub(crate) segment: u64,
    pub(crate) table: u8,
    pub(crate) key: Bytes,
    pub(crate) row: Bytes,
    /// It is gone; only told of when that was asked for.
    pub(crate) gone: bool,
}

/// The newest version of every row, in order of (table, key). A clone goes on from where this one is.
#[derive(Clone, Debug)]
pub(crate) struct TrueRows {
    /// Oldest first.
    inputs: Vec<RowInput>,
    /// Segments whose rows could not be followed; taken by whoever asks.
    broken: Vec<(u64, String)>,
    /// Rows that are gone are told of, too.
    with_gone: bool,
    /// Bytes of rows that were walked over.
    pub(crate) bytes: u64,
}

#[derive(Clone, Debug)]
struct RowInput {
    id: u64,
    rows: Rows,
    next: Option<Row>,
}

impl TrueRows {
    pub(crate) fn new(parts: &[Part]) -> Self {
        let inputs = parts
            .iter()
            .map(|part| RowInput { id: part.id, rows: part.segment.rows(), next: None })
            .collect();
        let mut rows = Self { inputs, broken: Vec::new(), with_gone: false, bytes: 0 };
        for n in 0..rows.inputs.len() {
            rows.step(n);
        }
        rows
    }

    /// Tells of rows that are gone, too.
    pub(crate) fn with_gone(self) -> Self {
        Self { with_gone: true, ..self }
    }

    fn step(&mut self, n: usize) {
        let Some(input) = self.inputs.get_mut(n) else { return };
        input.next = match input.rows.next() {
            Some(Ok(row)) => {
                self.bytes += (row.1.len() + row.2.as_ref().map_or(0, Bytes::len)) as u64;
                Some(row)
            }
            Some(Err(error)) => {
                self.broken.push((input.id, error.to_string()));
                None
            }
            None => None,
        };
    }

    /// The segments whose rows could not be followed since this was asked last.
    pub(crate) fn take_broken(&mut self) -> Vec<(u64, String)> {
        std::mem::take(&mut self.broken)
    }

    /// The next row of the table `below` or of one with a smaller number.
    pub(crate) fn next_up_to(&mut self, below: u8) -> Option<TrueRow> {
        loop {
            let place = |input: &RowInput| input.next.as_ref().map(|(table, key, _)| (*table, key.clone()));
            let (table, key) = self.inputs.iter().filter_map(place).min()?;
            if table > below {
                return None;
            }
            let mut newest = None;
            for n in 0..self.inputs.len() {
                let Some(input) = self.inputs.get_mut(n) else { continue };
                if input.next.as_ref().is_some_and(|(t, k, _)| (*t, k) == (table, &key)) {
                    newest = input.next.take().map(|(_, _, row)| (input.id, row));
                    self.step(n);
                }
            }
            match newest {
                Some((segment, Some(row))) => return Some(TrueRow { segment, table, key, row, gone: false }),
                Some((segment, None)) if self.with_gone => {
                    return Some(TrueRow { segment, table, key, row: Bytes::new(), gone: true });
                }
                Some((_, None)) | None => {}
            }
        }
    }
}

/// The rows of one table, with a look at the one that comes next.
#[derive(Debug)]
pub(crate) struct TableRows {
    rows: TrueRows,
    table: u8,
    next: Option<TrueRow>,
}

impl TableRows {
    /// `rows`: at the first row of the table or before.
    pub(crate) fn new(rows: TrueRows, table: u8) -> Self {
        let mut rows = Self { rows, table, next: None };
        rows.skip();
        rows
    }

    fn skip(&mut self) {
        loop {
            self.next = self.rows.next_up_to(self.table);
            if self.next.as_ref().is_none_or(|row| row.table == self.table) {
                return;
            }
        }
    }

    pub(crate) fn peek(&self) -> Option<&TrueRow> {
        self.next.as_ref()
    }

    pub(crate) fn take(&mut self) -> Option<TrueRow> {
        let row = self.next.take();
        self.skip();
        row
    }

    /// The next row, if its key begins with `prefix`.
    pub(crate) fn take_of(&mut self, prefix: &[u8]) -> Option<TrueRow> {
        self.next.as_ref().is_some_and(|row| row.key.starts_with(prefix)).then(|| self.take()).flatten()
    }
}

/// All runs of all segments, in order of (conversation, first seq), of equal ones the oldest segment's first.
#[derive(Debug)]
pub(crate) struct AllRuns {
    inputs: Vec<RunInput>,
    broken: Vec<(u64, String)>,
}

#[derive(Debug)]
struct RunInput {
    part: Part,
    runs: Runs,
    next: Option<Run>,
}

impl AllRuns {
    pub(crate) fn new(parts: &[Part]) -> Self {
        let inputs = parts
            .iter()
            .map(|part| RunInput { part: part.clone(), runs: part.segment.runs(), next: None })
            .collect();
        let mut runs = Self { inputs, broken: Vec::new() };
        for n in 0..runs.inputs.len() {
            runs.step(n);
        }
        runs
    }

    fn step(&mut self, n: usize) {
        let Some(input) = self.inputs.get_mut(n) else { return };
        input.next = match input.runs.next() {
            Some(Ok(run)) => Some(run),
            Some(Err(error)) => {
                self.broken.push((input.part.id, error.to_string()));
                None
            }
            None => None,
        };
    }

    /// The segments whose runs could not be followed since this was asked last.
    pub(crate) fn take_broken(&mut self) -> Vec<(u64, String)> {
        std::mem::take(&mut self.broken)
    }

    pub(crate) fn peek(&self) -> Option<&Run> {
        self.inputs
            .iter()
            .filter_map(|input| input.next.as_ref())
            .min_by_key(|run| (run.conversation, run.first))
    }

    /// The next run and the segment it lies in.
    pub(crate) fn take(&mut self) -> Option<(Part, Run)> {
        let (_, n) = self
            .inputs
            .iter()
            .enumerate()
            .filter_map(|(n, input)| input.next.map(|run| ((run.conversation, run.first), n)))
            .min()?;
        let input = self.inputs.get_mut(n)?;
        let taken = input.next.take().map(|run| (input.part.clone(), run));
        self.step(n);
        taken
    }
}

/// Opens the segment `id`; `cold`: the manifest says that its runs lie in the cold tier.
pub(crate) fn open(files: &dyn Files, shard: ShardId, id: u64, cold: bool) -> Result<Part, SegmentError> {
    Ok(Part { id, segment: Arc::new(Segment::open(files, shard, id)?), cold })
}

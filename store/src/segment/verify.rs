//! Verifying a segment from end to end, in steps.
//!
//! - Every byte of the file is read and accounted for: header, runs (their checksums, and every record in them), index, rows,
//!   directory, footer, and that they follow each other without a gap.
//! - A damaged run is reported and the next one looked at; index or rows that can't be followed end their part.
//!
//! Not here: when to verify and at what pace, whether a row makes sense to its table.

use fulmar_protocol::id::{Seq, UnixMillis};

use super::{
    Run, SegmentDamage, SegmentError,
    reader::{Rows, Runs, Segment, records},
};
use crate::codec::Malformed;

/// How far a verification has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There is more to look at.
    More,
    /// Everything was looked at; what was damaged has been reported.
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Ends,
    Runs,
    Rows,
    Done,
}

/// Looks at all of a segment.
#[derive(Debug)]
pub(crate) struct Verifier {
    segment: Segment,
    /// The runs of a cold segment are fetched.
    cold: bool,
    stage: Stage,
    runs: Runs,
    rows: Rows,
    oldest: Option<UnixMillis>,
    /// Runs were damaged, so what they say about the whole is not known.
    damaged: bool,
}

/// What a run or a row costs besides its bytes, so that many small ones are bounded by a budget, too.
const ENTRY_COST: usize = 64;

impl Segment {
    /// Looks at all of this segment, as it lies on disk now.
    pub(crate) fn verifier(&self) -> Verifier {
        Verifier {
            segment: self.clone(),
            cold: false,
            stage: Stage::Ends,
            runs: self.runs(),
            rows: self.rows(),
            oldest: None,
            damaged: false,
        }
    }
}

impl Verifier {
    /// Fetches the runs of a cold segment as well, and verifies them like all others. Otherwise its file is verified, and
    /// what lies in the cold tier is not looked at.
    pub(crate) fn with_cold(mut self) -> Self {
        self.cold = true;
        self
    }

    /// Looks at about `budget` bytes, at least at one run or row.
    ///
    /// # Errors
    /// What was found damaged; go on after it, until the answer is [`Progress::Done`].
    pub(crate) fn step(&mut self, budget: usize) -> Result<Progress, SegmentDamage> {
        let segment = self.segment.summary().id;
        let whole = |what: SegmentError| SegmentDamage::whole(segment, what);
        let mut spent = 0usize;
        loop {
            match self.stage {
                Stage::Ends => {
                    self.stage = Stage::Runs;
                    self.segment.check_ends().map_err(whole)?;
                }
                Stage::Runs => match self.runs.next() {
                    Some(Ok(run)) => {
                        spent += ENTRY_COST;
                        if self.segment.is_cold() && !self.cold {
                            // What the whole says about its oldest record can't be known without them.
                            self.damaged = true;
                            continue;
                        }
                        spent += usize::try_from(run.bytes).unwrap_or(0);
                        if let Err(what) = self.check(&run) {
                            self.damaged = true;
                            return Err(SegmentDamage::of(segment, &run, what));
                        }
                    }
                    Some(Err(what)) => {
                        self.stage = Stage::Rows;
                        return Err(whole(what));
                    }
                    None => {
                        self.stage = Stage::Rows;
                        let oldest = self.oldest.unwrap_or_default();
                        if !self.damaged && oldest != self.segment.summary().oldest {
                            return Err(whole(Malformed("segment footer: time of the oldest record").into()));
                        }
                    }
                },
                Stage::Rows => match self.rows.next() {
                    Some(Ok((_, key, row))) => {
                        spent += ENTRY_COST + key.len() + row.map_or(0, |row| row.len());
                    }
                    Some(Err(what)) => {
                        self.stage = Stage::Done;
                        return Err(whole(what));
                    }
                    None => self.stage = Stage::Done,
                },
                Stage::Done => return Ok(Progress::Done),
            }
            if spent >= budget.max(1) {
                return Ok(Progress::More);
            }
        }
    }

    fn check(&mut self, run: &Run) -> Result<(), SegmentError> {
        let bytes = self.segment.run(run)?;
        for record in records(run, &bytes, Seq::ZERO) {
            let (record, _) = record?;
            if record.seq == run.first {
                self.oldest = Some(self.oldest.map_or(record.time, |other| other.min(record.time)));
            }
        }
        Ok(())
    }
}

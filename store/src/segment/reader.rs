//! Reading a segment: what the whole is, its runs and rows in order, the records of one run.
//!
//! - What is given out was verified: a run against its checksum, a run's place or a row against that of its block, order and
//!   sums against the footer.
//! - [`Runs`] and [`Rows`] hold one block at a time and end at the first error.
//! - That the parts follow each other without a gap is part of it: blocks are found by where the part before ends.
//!
//! Not here: whether every record in a run makes sense (`verify`; [`records`] for one run).

use std::{io, sync::Arc};

use bytes::Bytes;
use fulmar_protocol::id::{Seq, ShardId, UnixMillis};

use super::{
    FRAME_BYTES, Frames, Run, SegmentError, Summary, frames,
    layout::{
        self, BLOCK_BYTES, BLOCK_HEADER_BYTES, BlockHeader, Codec, FOOTER_BYTES, Footer, HEADER_BYTES, Kind,
    },
    name,
};
use crate::{
    codec::{Cursor, Malformed},
    files::{Files, ReadAt},
    record::Record,
};

/// A segment that is open for reading. Clones share the file.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    file: Arc<dyn ReadAt>,
    footer: Footer,
    seed: u32,
    /// Where the frames of a cold segment are read.
    frames: Option<Arc<dyn Frames>>,
}

impl Segment {
    /// Opens the segment `id` of `shard` and verifies header, footer and length.
    ///
    /// # Errors
    /// The file can't be read, is another one, or is not whole.
    pub(crate) fn open(files: &dyn Files, shard: ShardId, id: u64) -> Result<Self, SegmentError> {
        let file = files.open(&name(id))?;
        let (footer, seed) = read_ends(file.as_ref(), shard, id)?;
        Ok(Self { file, footer, seed, frames: None })
    }

    /// Says where the frames of a cold segment are read. Without it everything but its runs can be read.
    pub(crate) fn with_frames(self, frames: Arc<dyn Frames>) -> Self {
        Self { frames: Some(frames), ..self }
    }

    /// Its runs lie in the cold tier.
    pub(crate) fn is_cold(&self) -> bool {
        self.footer.codec == Codec::Cold
    }

    /// Bytes its runs take in the cold tier.
    pub(crate) fn frames_bytes(&self) -> u64 {
        self.footer.frames_bytes
    }

    /// Reads header and footer again; they must say what they said.
    pub(super) fn check_ends(&self) -> Result<(), SegmentError> {
        let said = &self.footer.summary;
        let ends = read_ends(self.file.as_ref(), said.shard, said.id)?;
        if ends != (self.footer, self.seed) {
            return Err(Malformed("segment footer").into());
        }
        self.check_frames()
    }

    pub(crate) fn summary(&self) -> &Summary {
        &self.footer.summary
    }

    /// The bytes of a run, verified.
    ///
    /// # Errors
    /// They can't be read, or are not those whose checksum `run` has.
    pub(crate) fn run(&self, run: &Run) -> Result<Bytes, SegmentError> {
        if self.is_cold() {
            return self.cold_run(run);
        }
        let end = run.offset.checked_add(u64::from(run.bytes)).ok_or(Malformed("segment run"))?;
        let length = usize::try_from(run.bytes).map_err(|_| Malformed("segment run"))?;
        if run.offset < HEADER_BYTES as u64 || end > self.footer.rows_at || length > super::RUN_BYTES_MAX {
            return Err(Malformed("segment run: outside of the runs").into());
        }
        let bytes = self.read(run.offset, length)?;
        if crc32c::crc32c(&bytes) != run.crc {
            return Err(Malformed("segment run checksum").into());
        }
        Ok(bytes.into())
    }

    /// The bytes of a run that lies in the cold tier, verified like any other.
    fn cold_run(&self, run: &Run) -> Result<Bytes, SegmentError> {
        let outside = Malformed("segment run: outside of the runs");
        let end = run.offset.checked_add(u64::from(run.bytes)).ok_or(outside)?;
        let length = usize::try_from(run.bytes).map_err(|_| outside)?;
        if end > self.footer.summary.run_bytes || length > super::RUN_BYTES_MAX {
            return Err(outside.into());
        }
        let source = self.frames.as_deref().ok_or_else(|| {
            io::Error::other("its records lie in the cold tier, and no cold tier is configured")
        })?;
        let mut bytes = Vec::with_capacity(length);
        let mut at = run.offset;
        while at < end {
            let number = at / FRAME_BYTES as u64;
            let frame = match source.cached(number) {
                Some(frame) => frame,
                None => {
                    let frame = self.frame(number, source)?;
                    source.keep(number, &frame);
                    frame
                }
            };
            let begin = number * FRAME_BYTES as u64;
            let until = end.min(begin + frame.len() as u64);
            let part = usize::try_from(at - begin).ok().zip(usize::try_from(until - begin).ok());
            let part = part.and_then(|(from, to)| frame.get(from..to)).filter(|part| !part.is_empty());
            bytes.extend_from_slice(part.ok_or(outside)?);
            at = until;
        }
        if crc32c::crc32c(&bytes) != run.crc {
            return Err(Malformed("segment run checksum").into());
        }
        Ok(bytes.into())
    }

    /// Fetches one frame, verified and decompressed.
    fn frame(&self, number: u64, source: &dyn Frames) -> Result<Bytes, SegmentError> {
        let absent = Malformed("segment frames: no such frame");
        let skip = usize::try_from(number).map_err(|_| absent)?;
        let mut offset = 0u64;
        for (at, frame) in self.frame_table().enumerate() {
            let frame = frame?;
            if at < skip {
                offset += u64::from(frame.bytes);
                continue;
            }
            if offset + u64::from(frame.bytes) > self.footer.frames_bytes {
                return Err(absent.into());
            }
            let compressed = source.read(offset, frame.bytes)?;
            if compressed.len() as u64 != u64::from(frame.bytes) {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if crc32c::crc32c_append(self.seed, &compressed) != frame.crc {
                return Err(Malformed("segment frame checksum").into());
            }
            let begin = number.saturating_mul(FRAME_BYTES as u64);
            let left = self.footer.summary.run_bytes.saturating_sub(begin);
            let length = usize::try_from(left).unwrap_or(FRAME_BYTES).min(FRAME_BYTES);
            return Ok(frames::decompress(&compressed, length)?);
        }
        Err(absent.into())
    }

    /// Frames of a cold segment, in order.
    fn frame_table(&self) -> FrameTable<'_> {
        FrameTable { segment: self, block: Body::default(), at: self.footer.frames_at }
    }

    /// The table of frames must come to what the footer says.
    fn check_frames(&self) -> Result<(), SegmentError> {
        if !self.is_cold() {
            return Ok(());
        }
        let (mut count, mut bytes) = (0u64, 0u64);
        for frame in self.frame_table() {
            count += 1;
            bytes += u64::from(frame?.bytes);
        }
        let footer = &self.footer;
        if bytes != footer.frames_bytes || count != footer.summary.run_bytes.div_ceil(FRAME_BYTES as u64) {
            return Err(Malformed("segment frames: they do not come to what the footer says").into());
        }
        Ok(())
    }

    /// All runs, in order of (conversation, seq).
    pub(crate) fn runs(&self) -> Runs {
        Runs {
            segment: self.clone(),
            directory: Body::default(),
            directory_at: self.footer.directory_at,
            index: Body::default(),
            index_end: HEADER_BYTES as u64,
            runs_end: self.runs_begin(),
            offset: self.runs_begin(),
            previous: None,
            in_block: false,
            sums: Sums::default(),
            ended: false,
        }
    }

    /// All rows, in order of (table, key).
    pub(crate) fn rows(&self) -> Rows {
        Rows {
            segment: self.clone(),
            block: Body::default(),
            at: self.footer.rows_at,
            previous: None,
            rows: 0,
            ended: false,
        }
    }

    /// Where the first run begins: in the file, or among the uncompressed runs of a cold segment.
    fn runs_begin(&self) -> u64 {
        match self.footer.codec {
            Codec::Plain => HEADER_BYTES as u64,
            Codec::Cold => 0,
        }
    }

    /// Callers bound `length`.
    fn read(&self, at: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// The block that begins at `at` and ends at `end` or before: its body and where it ends.
    fn block(&self, kind: Kind, at: u64, end: u64) -> Result<(Body, u64), SegmentError> {
        let room = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
        // Nearly all blocks are about as large as they may be, so one read takes the whole of it.
        let mut bytes = self.read(at, room.min(BLOCK_BYTES))?;
        let header = BlockHeader::decode(&bytes, kind)?;
        let length = BLOCK_HEADER_BYTES + header.body_bytes;
        if length > room {
            return Err(kind.what().into());
        }
        if length > bytes.len() {
            bytes = self.read(at, length)?;
        }
        bytes.truncate(length);
        let body = Bytes::from(bytes).slice(BLOCK_HEADER_BYTES..);
        header.check(&body, self.seed, at)?;
        Ok((Body { bytes: body, at: 0, left: header.entries }, at + length as u64))
    }
}

/// Verifies header, footer and length of the file. Returns the footer and the seed of all checksums.
fn read_ends(file: &dyn ReadAt, shard: ShardId, id: u64) -> Result<(Footer, u32), SegmentError> {
    let length = file.len()?;
    let footer_at = length
        .checked_sub(FOOTER_BYTES as u64)
        .filter(|at| *at >= HEADER_BYTES as u64)
        .ok_or(Malformed("segment length"))?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let (codec, seed) = layout::check_header(&header, shard, id)?;
    let mut footer = [0; FOOTER_BYTES];
    file.read_exact_at(&mut footer, footer_at)?;
    Ok((Footer::decode(&footer, (codec, seed), shard, id, length)?, seed))
}

/// What is left of a block's entries.
#[derive(Clone, Debug, Default)]
struct Body {
    bytes: Bytes,
    at: usize,
    left: u32,
}

impl Body {
    /// Reads the next entry; `None` after the last.
    fn next<T>(
        &mut self,
        kind: Kind,
        take: impl FnOnce(&Bytes, &mut Cursor<'_>) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        if self.left == 0 {
            return if self.at == self.bytes.len() { Ok(None) } else { Err(kind.what()) };
        }
        let rest = self.bytes.slice(self.at.min(self.bytes.len())..);
        let mut at = Cursor::new(&rest);
        let entry = take(&rest, &mut at)?;
        self.at += at.at();
        self.left -= 1;
        Ok(Some(entry))
    }
}

/// See [`Segment::frame_table`].
#[derive(Debug)]
struct FrameTable<'a> {
    segment: &'a Segment,
    block: Body,
    /// Where the next block begins.
    at: u64,
}

impl FrameTable<'_> {
    fn step(&mut self) -> Result<Option<layout::Frame>, SegmentError> {
        let footer = &self.segment.footer;
        let footer_at = footer.summary.bytes.saturating_sub(FOOTER_BYTES as u64);
        loop {
            if let Some(frame) = self.block.next(Kind::Frames, |_, at| layout::take_frame(at))? {
                return Ok(Some(frame));
            }
            if self.at == footer_at {
                return Ok(None);
            }
            (self.block, self.at) = self.segment.block(Kind::Frames, self.at, footer_at)?;
        }
    }
}

impl Iterator for FrameTable<'_> {
    type Item = Result<layout::Frame, SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

/// What the runs come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sums {
    runs: u64,
    records: u64,
    run_bytes: u64,
    newest: UnixMillis,
}

/// All runs of a segment, in order. Ends at the first error.
#[derive(Debug)]
pub(crate) struct Runs {
    segment: Segment,
    directory: Body,
    /// Where the next directory block begins.
    directory_at: u64,
    index: Body,
    /// Where the index block that is being read ends.
    index_end: u64,
    /// Where its runs end: in a plain segment, where it begins.
    runs_end: u64,
    /// Where the next run begins.
    offset: u64,
    previous: Option<Run>,
    /// `previous` is of the same block as the next one.
    in_block: bool,
    sums: Sums,
    ended: bool,
}

impl Runs {
    /// Bytes of memory it holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.directory.bytes.len() + self.index.bytes.len()
    }

    fn step(&mut self) -> Result<Option<Run>, SegmentError> {
        loop {
            let before = if self.in_block { self.previous.as_ref() } else { None };
            let offset = self.offset;
            if let Some(run) = self.index.next(Kind::Index, |_, at| layout::take_run(at, before, offset))? {
                return self.accept(run).map(Some);
            }
            if self.offset != self.runs_end {
                return Err(Malformed("segment index: runs and index do not meet").into());
            }
            if !self.next_index()? {
                return Ok(None);
            }
        }
    }

    fn accept(&mut self, run: Run) -> Result<Run, SegmentError> {
        if self.previous.is_some_and(|p| (run.conversation, run.first) <= (p.conversation, p.last())) {
            return Err(Malformed("segment index: a run out of order").into());
        }
        self.offset = self
            .offset
            .checked_add(u64::from(run.bytes))
            .filter(|end| *end <= self.runs_end)
            .ok_or(Malformed("segment index: runs and index do not meet"))?;
        // Bounded by the bytes of the file.
        self.sums.runs += 1;
        self.sums.records += run.count;
        self.sums.run_bytes += u64::from(run.bytes);
        self.sums.newest = self.sums.newest.max(run.newest);
        self.previous = Some(run);
        self.in_block = true;
        Ok(run)
    }

    /// Reads the next index block. Returns false, with all sums checked, if there is none.
    fn next_index(&mut self) -> Result<bool, SegmentError> {
        let footer = &self.segment.footer;
        let directory_end = match footer.codec {
            Codec::Plain => footer.summary.bytes.saturating_sub(FOOTER_BYTES as u64),
            Codec::Cold => footer.frames_at,
        };
        let group = loop {
            if let Some(group) = self.directory.next(Kind::Directory, |_, at| layout::take_group(at))? {
                break group;
            }
            if self.directory_at == directory_end {
                let said = &footer.summary;
                let said = Sums {
                    runs: said.runs,
                    records: said.records,
                    run_bytes: said.run_bytes,
                    newest: said.newest,
                };
                if self.index_end != footer.rows_at || self.sums != said {
                    return Err(Malformed("segment index: it does not come to what the footer says").into());
                }
                return Ok(false);
            }
            (self.directory, self.directory_at) =
                self.segment.block(Kind::Directory, self.directory_at, directory_end)?;
        };
        let misplaced = Malformed("segment directory: a block outside of the runs");
        // In a plain segment runs and index alternate; the runs of a cold one follow each other elsewhere.
        let begin = match footer.codec {
            Codec::Plain => self.index_end,
            Codec::Cold => self.runs_end,
        };
        let runs_end = begin.checked_add(group.run_bytes).ok_or(misplaced)?;
        let at = match footer.codec {
            Codec::Plain => runs_end,
            Codec::Cold => self.index_end,
        };
        let end = at
            .checked_add(u64::from(group.block_bytes))
            .filter(|end| *end <= footer.rows_at)
            .ok_or(misplaced)?;
        let (index, found_end) = self.segment.block(Kind::Index, at, end)?;
        if found_end != end {
            return Err(misplaced.into());
        }
        self.index = index;
        self.offset = begin;
        self.runs_end = runs_end;
        self.index_end = end;
        self.in_block = false;
        Ok(true)
    }
}

impl Iterator for Runs {
    type Item = Result<Run, SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.step().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

/// Table number, key, and the row; `None`: it is gone.
pub(crate) type Row = (u8, Bytes, Option<Bytes>);

/// All rows of a segment, in order. Ends at the first error. A clone goes on from where this one is.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    segment: Segment,
    block: Body,
    /// Where the next block begins.
    at: u64,
    /// Table and key.
    previous: Option<(u8, Bytes)>,
    rows: u64,
    ended: bool,
}

impl Rows {
    /// Bytes of memory it holds; the last key can be of the block before.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        2 * self.block.bytes.len()
    }

    fn step(&mut self) -> Result<Option<Row>, SegmentError> {
        let footer = &self.segment.footer;
        let row = loop {
            if let Some(row) = self.block.next(Kind::Rows, take_row)? {
                break row;
            }
            if self.at == footer.directory_at {
                if self.rows != footer.summary.rows {
                    return Err(Malformed("segment rows: not as many as the footer says").into());
                }
                return Ok(None);
            }
            (self.block, self.at) = self.segment.block(Kind::Rows, self.at, footer.directory_at)?;
        };
        let (table, key, _) = &row;
        if self.previous.as_ref().is_some_and(|(t, k)| (*table, key) <= (*t, k)) {
            return Err(Malformed("segment rows: a row out of order").into());
        }
        self.previous = Some((*table, key.clone()));
        self.rows += 1;
        Ok(Some(row))
    }
}

pub(super) fn take_row(bytes: &Bytes, at: &mut Cursor<'_>) -> Result<Row, Malformed> {
    let what = "segment rows: row";
    let table = at.u8(what)?;
    let length = at.length(what)?;
    let key_at = at.at();
    at.take(length, what)?;
    let key = bytes.slice(key_at..at.at());
    let row = match at.varint(what)?.checked_sub(1) {
        Some(length) => {
            let row_at = at.at();
            at.take(usize::try_from(length).map_err(|_| Malformed(what))?, what)?;
            Some(bytes.slice(row_at..at.at()))
        }
        None => None,
    };
    Ok((table, key, row))
}

impl Iterator for Rows {
    type Item = Result<Row, SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.step().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

/// The records of a run from `from` on, with the bytes each was read from. `bytes` are those that [`Segment::run`] verified; the
/// records before `from` are stepped over, those given out are decoded and verified. Ends at the first error.
pub(crate) fn records(run: &Run, bytes: &Bytes, from: Seq) -> Records {
    Records { run: *run, bytes: bytes.clone(), at: 0, taken: 0, from, ended: false }
}

/// The records of a run, in order. Ends at the first error.
#[derive(Debug)]
pub(crate) struct Records {
    run: Run,
    bytes: Bytes,
    at: usize,
    /// Records given out or stepped over.
    taken: u64,
    from: Seq,
    ended: bool,
}

impl Records {
    /// Bytes of memory it holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.bytes.len()
    }

    fn step(&mut self) -> Result<Option<(Record, Bytes)>, Malformed> {
        loop {
            if self.taken == self.run.count {
                return if self.at == self.bytes.len() {
                    Ok(None)
                } else {
                    Err(Malformed("segment run: length"))
                };
            }
            let rest = self.bytes.slice(self.at.min(self.bytes.len())..);
            let expected = self.run.first.saturating_add(self.taken);
            if expected < self.from {
                self.at += Record::measure(&rest)?;
                self.taken += 1;
                continue;
            }
            let (record, taken) = Record::decode(self.run.conversation, &rest)?;
            if record.seq != expected {
                return Err(Malformed("segment run: a record out of place"));
            }
            self.at += taken;
            self.taken += 1;
            if self.taken == self.run.count && record.time != self.run.newest {
                return Err(Malformed("segment run: time of the newest record"));
            }
            return Ok(Some((record, rest.slice(..taken))));
        }
    }
}

impl Iterator for Records {
    type Item = Result<(Record, Bytes), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.step().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}

//! Writing a segment, once, from front to back.
//!
//! - Records come in order of (conversation, seq), then rows in order of (table, key); anything else is refused with
//!   `InvalidInput` before a byte of it is written.
//! - After an append or a sync that failed nothing more is written.
//!
//! Not here: the bytes of headers and entries (`layout`), removing what an interrupted writer left behind.

use std::{io, ops::RangeInclusive};

use fulmar_protocol::id::{ConversationId, Seq, ShardId, UnixMillis};

use super::{
    FrameWriter, ROW_BYTES_MAX, RUN_BYTES, RUN_BYTES_MAX, Run, Summary,
    layout::{
        self, BLOCK_HEADER_BYTES, BODY_BYTES, Codec, DIRECTORY_ENTRY_BYTES_MAX, FOOTER_BYTES,
        FRAME_ENTRY_BYTES_MAX, Footer, Group, INDEX_ENTRY_BYTES_MAX, Kind,
    },
    name,
};
use crate::{
    files::{Append, Files},
    record::RECORD_BYTES_MIN,
};

/// Bytes gathered before they are handed to the file.
const BUFFER_BYTES: usize = 256 * 1024;

/// A file that is appended to in large pieces.
#[derive(Debug)]
struct Output {
    file: Box<dyn Append>,
    buffer: Vec<u8>,
    /// Where the next byte goes, those in the buffer counted.
    at: u64,
    failed: bool,
}

impl Output {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        self.at += bytes.len() as u64;
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.guarded(|file, buffer| file.append(buffer))?;
        self.buffer.clear();
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.guarded(|file, _| file.sync())
    }

    fn guarded(&mut self, work: impl FnOnce(&mut dyn Append, &[u8]) -> io::Result<()>) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("the segment could not be written before"));
        }
        let done = work(self.file.as_mut(), &self.buffer);
        self.failed = done.is_err();
        done
    }
}

/// A block that is being filled.
#[derive(Debug, Default)]
struct Block {
    body: Vec<u8>,
    entries: u32,
}

/// A segment that is being written.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    out: Output,
    /// Where the runs of a cold segment go.
    frames: Option<FrameWriter>,
    shard: ShardId,
    id: u64,
    seed: u32,
    /// The run that is growing; its bytes are in `out` already.
    run: Option<Run>,
    /// Entries of the runs since the last index block.
    index: Block,
    /// The last run in `index`.
    indexed: Option<Run>,
    /// Where the runs of the next index block begin.
    group_at: u64,
    groups: Vec<Group>,
    /// Where rows begin; `None` while there are still records to come.
    rows_at: Option<u64>,
    rows: Block,
    /// Table and key of the last row.
    last_row: Option<(u8, Vec<u8>)>,
    counts: Counts,
    /// Bytes of a body at most; [`BODY_BYTES`] outside of tests.
    body_bytes: usize,
}

#[derive(Debug, Default)]
struct Counts {
    runs: u64,
    rows: u64,
    records: u64,
    run_bytes: u64,
    newest: UnixMillis,
    oldest: Option<UnixMillis>,
}

fn refused(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

impl SegmentWriter {
    /// Begins the segment `id` of `shard`; a file of the same name is replaced.
    ///
    /// # Errors
    /// The file can't be created.
    pub(crate) fn create(files: &dyn Files, shard: ShardId, id: u64) -> io::Result<Self> {
        Self::begin(files, shard, id, None)
    }

    /// Begins a cold segment, whose runs go to `frames` and whose file has the rest.
    ///
    /// # Errors
    /// The file can't be created.
    pub(crate) fn create_cold(
        files: &dyn Files,
        shard: ShardId,
        id: u64,
        frames: FrameWriter,
    ) -> io::Result<Self> {
        Self::begin(files, shard, id, Some(frames))
    }

    fn begin(
        files: &dyn Files,
        shard: ShardId,
        id: u64,
        mut frames: Option<FrameWriter>,
    ) -> io::Result<Self> {
        let file = files.create(&name(id))?;
        let codec = if frames.is_some() { Codec::Cold } else { Codec::Plain };
        let (header, seed) = layout::header(shard, id, codec);
        if let Some(frames) = &mut frames {
            frames.seed(seed);
        }
        let mut out = Output { file, buffer: Vec::with_capacity(BUFFER_BYTES), at: 0, failed: false };
        out.put(&header)?;
        Ok(Self {
            group_at: if frames.is_some() { 0 } else { out.at },
            out,
            frames,
            shard,
            id,
            seed,
            run: None,
            index: Block::default(),
            indexed: None,
            groups: Vec::new(),
            rows_at: None,
            rows: Block::default(),
            last_row: None,
            counts: Counts::default(),
            body_bytes: BODY_BYTES,
        })
    }

    /// Smaller blocks, so that small segments have many.
    #[cfg(test)]
    pub(super) fn with_bodies_of(mut self, bytes: usize) -> Self {
        self.body_bytes = bytes.min(BODY_BYTES);
        self
    }

    /// Bytes of memory it holds.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        let groups = self.groups.capacity() * size_of::<Group>();
        self.out.buffer.capacity() + self.index.body.capacity() + self.rows.body.capacity() + groups
    }

    /// Appends one record as `Record::encode` wrote it. Runs are cut here.
    ///
    /// # Errors
    /// The file can't be written; or the record does not come after the last one, has seq zero or an impossible length.
    pub(crate) fn record(
        &mut self,
        conversation: ConversationId,
        seq: Seq,
        time: UnixMillis,
        encoded: &[u8],
    ) -> io::Result<()> {
        let piece = Run {
            conversation,
            first: seq,
            count: 1,
            newest: time,
            offset: 0,
            bytes: u32::try_from(encoded.len()).unwrap_or(u32::MAX),
            crc: 0,
        };
        self.append(&piece, time, encoded)
    }

    /// Appends a whole run of another segment, whose bytes were verified; `oldest`: the time of its first record. It is put
    /// together with the run before it if both fit one.
    pub(super) fn copy(&mut self, run: &Run, oldest: UnixMillis, bytes: &[u8]) -> io::Result<()> {
        self.append(run, oldest, bytes)
    }

    fn append(&mut self, piece: &Run, oldest: UnixMillis, bytes: &[u8]) -> io::Result<()> {
        if self.rows_at.is_some() {
            return Err(refused("a record after the rows"));
        }
        if piece.first == Seq::ZERO {
            return Err(refused("a record with seq zero"));
        }
        if bytes.len() > RUN_BYTES_MAX || (bytes.len() as u64) < RECORD_BYTES_MIN as u64 * piece.count {
            return Err(refused("a record of an impossible length"));
        }
        let last = self.run.as_ref().or(self.indexed.as_ref());
        if last.is_some_and(|last| (piece.conversation, piece.first) <= (last.conversation, last.last())) {
            return Err(refused("a record out of order"));
        }
        if !self.run.as_ref().is_some_and(|run| goes_on(run, piece)) {
            self.end_run()?;
            self.run = Some(Run { count: 0, offset: self.runs_end(), bytes: 0, crc: 0, ..*piece });
            self.counts.runs += 1;
            self.counts.oldest = Some(self.counts.oldest.map_or(oldest, |other| other.min(oldest)));
        }
        match &mut self.frames {
            Some(frames) => frames.put(bytes)?,
            None => self.out.put(bytes)?,
        }
        self.counts.records += piece.count;
        self.counts.run_bytes += bytes.len() as u64;
        if let Some(run) = &mut self.run {
            run.count += piece.count;
            run.newest = piece.newest;
            run.bytes += piece.bytes;
            run.crc = crc32c::crc32c_append(run.crc, bytes);
        }
        Ok(())
    }

    /// Where the next run begins: in the file, or among the uncompressed runs of a cold segment.
    fn runs_end(&self) -> u64 {
        self.frames.as_ref().map_or(self.out.at, FrameWriter::taken)
    }

    /// Takes the run that was growing into the index.
    fn end_run(&mut self) -> io::Result<()> {
        let Some(run) = self.run.take() else { return Ok(()) };
        let before = if self.index.entries == 0 { None } else { self.indexed.as_ref() };
        layout::put_run(&mut self.index.body, before, &run);
        self.index.entries += 1;
        self.indexed = Some(run);
        self.counts.newest = self.counts.newest.max(run.newest);
        if self.index.body.len() + INDEX_ENTRY_BYTES_MAX > self.body_bytes {
            self.end_group()
        } else {
            Ok(())
        }
    }

    /// Writes the index of the runs since the last one, if there are any.
    fn end_group(&mut self) -> io::Result<()> {
        if self.index.entries == 0 {
            return Ok(());
        }
        let run_bytes = self.runs_end() - self.group_at;
        let block_bytes = write_block(&mut self.out, &mut self.index, Kind::Index, self.seed)?;
        self.groups.push(Group { run_bytes, block_bytes });
        self.group_at = self.runs_end();
        Ok(())
    }

    fn end_records(&mut self) -> io::Result<u64> {
        if let Some(rows_at) = self.rows_at {
            return Ok(rows_at);
        }
        self.end_run()?;
        self.end_group()?;
        self.rows_at = Some(self.out.at);
        Ok(self.out.at)
    }

    /// Appends one row, after all records. `None`: the row is gone.
    ///
    /// # Errors
    /// The file can't be written; or the row does not come after the last one, or is larger than [`ROW_BYTES_MAX`].
    pub(crate) fn row(&mut self, table: u8, key: &[u8], row: Option<&[u8]>) -> io::Result<()> {
        let bytes = key.len() + row.map_or(0, <[u8]>::len);
        if bytes > ROW_BYTES_MAX {
            return Err(refused("a row that is too large"));
        }
        if self.last_row.as_ref().is_some_and(|(t, k)| (table, key) <= (*t, k.as_slice())) {
            return Err(refused("a row out of order"));
        }
        self.end_records()?;
        if self.rows.entries > 0
            && self.rows.body.len() + bytes + layout::ROW_ENTRY_OVERHEAD_MAX > self.body_bytes
        {
            write_block(&mut self.out, &mut self.rows, Kind::Rows, self.seed)?;
        }
        layout::put_row(&mut self.rows.body, table, key, row);
        self.rows.entries += 1;
        self.counts.rows += 1;
        let (last_table, last_key) = self.last_row.get_or_insert_default();
        *last_table = table;
        last_key.clear();
        last_key.extend_from_slice(key);
        Ok(())
    }

    /// Bytes of the file so far, without the blocks that are still being filled.
    pub(crate) fn bytes_written(&self) -> u64 {
        self.out.at
    }

    /// Ends the segment, which holds what `commits` left behind, and makes its bytes (not its name) durable.
    ///
    /// # Errors
    /// The file can't be written or synced; or there are no `commits`.
    pub(crate) fn finish(mut self, commits: RangeInclusive<u64>) -> io::Result<Summary> {
        if commits.is_empty() {
            return Err(refused("a segment of no commits"));
        }
        let rows_at = self.end_records()?;
        if self.rows.entries > 0 {
            write_block(&mut self.out, &mut self.rows, Kind::Rows, self.seed)?;
        }
        let directory_at = self.out.at;
        let mut directory = Block::default();
        for group in &self.groups {
            if directory.entries > 0 && directory.body.len() + DIRECTORY_ENTRY_BYTES_MAX > self.body_bytes {
                write_block(&mut self.out, &mut directory, Kind::Directory, self.seed)?;
            }
            layout::put_group(&mut directory.body, *group);
            directory.entries += 1;
        }
        if directory.entries > 0 {
            write_block(&mut self.out, &mut directory, Kind::Directory, self.seed)?;
        }
        let (codec, frames_at, frames_bytes) = self.end_frames()?;
        let summary = Summary {
            shard: self.shard,
            id: self.id,
            first_commit: *commits.start(),
            last_commit: *commits.end(),
            runs: self.counts.runs,
            rows: self.counts.rows,
            records: self.counts.records,
            bytes: self.out.at + FOOTER_BYTES as u64,
            run_bytes: self.counts.run_bytes,
            newest: self.counts.newest,
            oldest: self.counts.oldest.unwrap_or_default(),
        };
        self.out.put(
            &Footer { summary, codec, rows_at, directory_at, frames_at, frames_bytes }.encode(self.seed),
        )?;
        self.out.flush()?;
        self.out.sync()?;
        Ok(summary)
    }

    /// Writes the table of frames of a cold segment.
    fn end_frames(&mut self) -> io::Result<(Codec, u64, u64)> {
        let Some(frames) = self.frames.take() else { return Ok((Codec::Plain, 0, 0)) };
        let frames_at = self.out.at;
        let (table, frames_bytes) = frames.finish()?;
        let mut block = Block::default();
        for frame in table {
            if block.entries > 0 && block.body.len() + FRAME_ENTRY_BYTES_MAX > self.body_bytes {
                write_block(&mut self.out, &mut block, Kind::Frames, self.seed)?;
            }
            layout::put_frame(&mut block.body, frame);
            block.entries += 1;
        }
        if block.entries > 0 {
            write_block(&mut self.out, &mut block, Kind::Frames, self.seed)?;
        }
        Ok((Codec::Cold, frames_at, frames_bytes))
    }
}

/// Whether `piece` is the next part of `run`.
fn goes_on(run: &Run, piece: &Run) -> bool {
    run.conversation == piece.conversation
        && run.last().next() == Some(piece.first)
        && u64::from(run.bytes) + u64::from(piece.bytes) <= RUN_BYTES as u64
}

/// Writes a block and empties it. Returns its bytes, header included.
fn write_block(out: &mut Output, block: &mut Block, kind: Kind, seed: u32) -> io::Result<u32> {
    let at = out.at;
    out.put(&layout::block_header(kind, block.entries, &block.body, seed, at))?;
    out.put(&block.body)?;
    let bytes = block.body.len() + BLOCK_HEADER_BYTES;
    block.body.clear();
    block.entries = 0;
    u32::try_from(bytes).map_err(io::Error::other)
}

//! The bytes of a segment's header, blocks and footer. Integers are big-endian here, varints inside blocks.
//!
//! Not here: the order in which they stand in a file (`writer`), reading them from one (`reader`).

use fulmar_protocol::id::{ConversationId, Seq, ShardId, UnixMillis};

use super::{FRAME_COMPRESSED_MAX, ROW_BYTES_MAX, RUN_BYTES_MAX, Run, Summary};
use crate::{
    codec::{Cursor, Malformed, put_varint},
    record::RECORD_BYTES_MIN,
};

const HEADER_MAGIC: [u8; 4] = *b"FLMS";
const FOOTER_MAGIC: [u8; 4] = *b"FLME";
const VERSION: u8 = 1;

/// Where a segment's runs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Codec {
    /// In the file, before each index block: records as they are.
    Plain = 0,
    /// In the cold tier, cut into frames and compressed with zstd; the file has the rest.
    Cold = 1,
}

impl Codec {
    fn from_number(number: u8) -> Option<Self> {
        [Self::Plain, Self::Cold].into_iter().find(|codec| *codec as u8 == number)
    }
}

pub(super) const HEADER_BYTES: usize = 64;
pub(super) const FOOTER_BYTES: usize = 128;
pub(super) const BLOCK_HEADER_BYTES: usize = 16;

/// Bytes of a block with its header, unless one row alone is larger.
pub(super) const BLOCK_BYTES: usize = 64 * 1024;

/// Bytes after a block's header, unless one row alone is larger.
pub(super) const BODY_BYTES: usize = BLOCK_BYTES - BLOCK_HEADER_BYTES;

/// Bytes of an entry of the index, every number at its widest: three numbers of 62 bits, a count and a length, a checksum.
pub(super) const INDEX_ENTRY_BYTES_MAX: usize = 3 * 9 + 3 + 3 + 4;

/// Bytes of a row's entry besides key and row: table, two lengths.
pub(super) const ROW_ENTRY_OVERHEAD_MAX: usize = 1 + 4 + 4;

/// Bytes of an entry of the directory, every number at its widest.
pub(super) const DIRECTORY_ENTRY_BYTES_MAX: usize = 10 + 3;

/// Bytes of a frame's entry, its length at its widest.
pub(super) const FRAME_ENTRY_BYTES_MAX: usize = 3 + 4;

const _: () = {
    assert!(RUN_BYTES_MAX < 1 << 21, "a run's length and count are varints of at most three bytes");
    assert!(ROW_BYTES_MAX < (1 << 28) - 1, "a row's lengths are varints of at most four bytes");
    assert!(FRAME_COMPRESSED_MAX < 1 << 21, "a frame's length is a varint of at most three bytes");
    assert!(BLOCK_BYTES < 1 << 21, "a block's length is a varint of at most three bytes");
};

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Index = 1,
    Rows = 2,
    Directory = 3,
    Frames = 4,
}

impl Kind {
    pub(super) const fn what(self) -> Malformed {
        Malformed(match self {
            Self::Index => "segment index block",
            Self::Rows => "segment row block",
            Self::Directory => "segment directory block",
            Self::Frames => "segment frame block",
        })
    }

    /// Bytes of a body at most.
    pub(super) const fn body_bytes_max(self) -> usize {
        match self {
            Self::Index | Self::Directory | Self::Frames => BODY_BYTES,
            Self::Rows => ROW_BYTES_MAX + ROW_ENTRY_OVERHEAD_MAX,
        }
    }
}

/// The header, and the seed of all checksums after it.
pub(super) fn header(shard: ShardId, id: u64, codec: Codec) -> (Vec<u8>, u32) {
    let mut out = Vec::with_capacity(HEADER_BYTES);
    out.extend_from_slice(&HEADER_MAGIC);
    out.extend_from_slice(&[VERSION, codec as u8]);
    out.extend_from_slice(&shard.get().to_be_bytes());
    out.extend_from_slice(&id.to_be_bytes());
    out.resize(HEADER_BYTES - 4, 0);
    let seed = crc32c::crc32c(&out);
    out.extend_from_slice(&seed.to_be_bytes());
    (out, seed)
}

/// Checks the header of the segment `id` of `shard`. Returns where its runs are, and the seed of all checksums after it.
pub(super) fn check_header(bytes: &[u8], shard: ShardId, id: u64) -> Result<(Codec, u32), Malformed> {
    for codec in [Codec::Plain, Codec::Cold] {
        let (expected, seed) = header(shard, id, codec);
        if bytes == expected {
            return Ok((codec, seed));
        }
    }
    // It is refused; what follows only finds the best word for it.
    let mut at = Cursor::new(bytes);
    if at.array("segment magic")? != HEADER_MAGIC {
        return Err(Malformed("segment magic"));
    }
    if at.u8("segment version")? != VERSION {
        return Err(Malformed("segment version"));
    }
    if Codec::from_number(at.u8("segment codec")?).is_none() {
        return Err(Malformed("segment codec"));
    }
    if at.array("segment shard")? != shard.get().to_be_bytes() {
        return Err(Malformed("segment header: another shard's"));
    }
    if at.array("segment id")? != id.to_be_bytes() {
        return Err(Malformed("segment header: another segment's"));
    }
    Err(Malformed("segment header checksum"))
}

/// What the footer says, and where the parts after the runs begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) summary: Summary,
    pub(super) codec: Codec,
    pub(super) rows_at: u64,
    pub(super) directory_at: u64,
    /// Where the table of frames begins; zero in a plain segment.
    pub(super) frames_at: u64,
    /// Bytes of all frames, compressed; zero in a plain segment.
    pub(super) frames_bytes: u64,
}

impl Footer {
    pub(super) fn encode(&self, seed: u32) -> Vec<u8> {
        let summary = &self.summary;
        let mut out = Vec::with_capacity(FOOTER_BYTES);
        out.extend_from_slice(&FOOTER_MAGIC);
        out.extend_from_slice(&[VERSION, self.codec as u8]);
        out.extend_from_slice(&summary.shard.get().to_be_bytes());
        for number in [
            summary.id,
            summary.first_commit,
            summary.last_commit,
            summary.runs,
            summary.rows,
            summary.records,
            summary.run_bytes,
            summary.oldest.get(),
            summary.newest.get(),
            summary.bytes,
            self.rows_at,
            self.directory_at,
            self.frames_at,
            self.frames_bytes,
        ] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        out.resize(FOOTER_BYTES - 4, 0);
        let crc = crc32c::crc32c_append(seed, &out);
        out.extend_from_slice(&crc.to_be_bytes());
        out
    }

    /// Reads the footer of the segment `id` of `shard`, which has `length` bytes in all.
    pub(super) fn decode(
        bytes: &[u8],
        (codec, seed): (Codec, u32),
        shard: ShardId,
        id: u64,
        length: u64,
    ) -> Result<Self, Malformed> {
        let what = "segment footer";
        let mut at = Cursor::new(bytes);
        let covered = bytes.len().checked_sub(4).and_then(|end| bytes.get(..end)).ok_or(Malformed(what))?;
        let magic: [u8; 4] = at.array(what)?;
        if magic != FOOTER_MAGIC {
            return Err(Malformed("segment footer: the end is missing"));
        }
        if at.array(what)? != [VERSION, codec as u8] || at.array(what)? != shard.get().to_be_bytes() {
            return Err(Malformed(what));
        }
        let mut number = || -> Result<u64, Malformed> { Ok(u64::from_be_bytes(at.array(what)?)) };
        let (found, first_commit, last_commit) = (number()?, number()?, number()?);
        let (runs, rows, records, run_bytes) = (number()?, number()?, number()?, number()?);
        let (oldest, newest, bytes_in_all) = (number()?, number()?, number()?);
        let (rows_at, directory_at) = (number()?, number()?);
        let (frames_at, frames_bytes) = (number()?, number()?);
        let zero: [u8; 4] = at.array(what)?;
        let crc = u32::from_be_bytes(at.array(what)?);
        if crc != crc32c::crc32c_append(seed, covered) {
            return Err(Malformed("segment footer checksum"));
        }
        let time = |n| UnixMillis::new(n).ok_or(Malformed(what));
        let (oldest, newest) = (time(oldest)?, time(newest)?);
        if bytes_in_all != length {
            return Err(Malformed("segment length"));
        }
        let footer_at = length.saturating_sub(FOOTER_BYTES as u64);
        let runs_fit = match codec {
            Codec::Plain => {
                frames_at == 0
                    && frames_bytes == 0
                    && directory_at <= footer_at
                    && run_bytes <= rows_at.saturating_sub(HEADER_BYTES as u64)
            }
            Codec::Cold => directory_at <= frames_at && frames_at <= footer_at,
        };
        let parts_fit = HEADER_BYTES as u64 <= rows_at && rows_at <= directory_at;
        let counts_fit = runs_fit
            && runs <= records
            && records <= run_bytes / RECORD_BYTES_MIN as u64
            && rows <= directory_at.saturating_sub(rows_at);
        if found != id || zero != [0; 4] || first_commit > last_commit || !parts_fit || !counts_fit {
            return Err(Malformed(what));
        }
        let summary = Summary {
            shard,
            id,
            first_commit,
            last_commit,
            runs,
            rows,
            records,
            bytes: length,
            run_bytes,
            newest,
            oldest,
        };
        Ok(Self { summary, codec, rows_at, directory_at, frames_at, frames_bytes })
    }
}

/// A block's header, for a body that stands right after it at offset `at + 16` of the file.
pub(super) fn block_header(
    kind: Kind,
    entries: u32,
    body: &[u8],
    seed: u32,
    at: u64,
) -> [u8; BLOCK_HEADER_BYTES] {
    // No block is larger than ROW_BYTES_MAX and a little.
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let crc = block_crc(kind, length, entries, body, seed, at);
    let mut out = [0; BLOCK_HEADER_BYTES];
    let bytes = [[kind as u8, 0, 0, 0], length.to_be_bytes(), entries.to_be_bytes(), crc.to_be_bytes()];
    for (to, from) in out.iter_mut().zip(bytes.as_flattened()) {
        *to = *from;
    }
    out
}

fn block_crc(kind: Kind, length: u32, entries: u32, body: &[u8], seed: u32, at: u64) -> u32 {
    let mut crc = crc32c::crc32c_append(seed, &at.to_be_bytes());
    for part in [[kind as u8, 0, 0, 0], length.to_be_bytes(), entries.to_be_bytes()] {
        crc = crc32c::crc32c_append(crc, &part);
    }
    crc32c::crc32c_append(crc, body)
}

/// What a block's header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockHeader {
    kind: Kind,
    pub(super) entries: u32,
    pub(super) body_bytes: usize,
    crc: u32,
}

impl BlockHeader {
    /// Bounds the length, proves nothing else: that is up to [`BlockHeader::check`].
    pub(super) fn decode(bytes: &[u8], kind: Kind) -> Result<Self, Malformed> {
        let what = kind.what();
        let mut at = Cursor::new(bytes);
        if at.array(what.0)? != [kind as u8, 0, 0, 0] {
            return Err(what);
        }
        let body_bytes = usize::try_from(u32::from_be_bytes(at.array(what.0)?)).map_err(|_| what)?;
        let entries = u32::from_be_bytes(at.array(what.0)?);
        let crc = u32::from_be_bytes(at.array(what.0)?);
        if entries == 0 || body_bytes > kind.body_bytes_max() {
            return Err(what);
        }
        Ok(Self { kind, entries, body_bytes, crc })
    }

    /// Whether this is the whole body of the block that begins at offset `at` of the file.
    pub(super) fn check(&self, body: &[u8], seed: u32, at: u64) -> Result<(), Malformed> {
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let crc = block_crc(self.kind, length, self.entries, body, seed, at);
        if body.len() == self.body_bytes && crc == self.crc { Ok(()) } else { Err(self.kind.what()) }
    }
}

/// Appends a run's entry; `before`: the one before it in the same block. The offset follows from those before.
pub(super) fn put_run(out: &mut Vec<u8>, before: Option<&Run>, run: &Run) {
    let (conversation, seq) = match before {
        Some(before) if before.conversation == run.conversation => (0, run.first.since(before.last()) - 1),
        Some(before) => (run.conversation.get() - before.conversation.get(), run.first.get()),
        None => (run.conversation.get(), run.first.get()),
    };
    for number in [conversation, seq, run.count, run.newest.get(), u64::from(run.bytes)] {
        put_varint(out, number);
    }
    out.extend_from_slice(&run.crc.to_be_bytes());
}

/// Reads the entry of the run at `offset`. What it returns lies after `before`.
pub(super) fn take_run(at: &mut Cursor<'_>, before: Option<&Run>, offset: u64) -> Result<Run, Malformed> {
    let what = "segment index: run";
    let step = at.varint(what)?;
    let seq = at.varint(what)?;
    let (conversation, first) = match before {
        Some(before) if step == 0 => (Some(before.conversation.get()), before.last().get().checked_add(1)),
        Some(before) => (before.conversation.get().checked_add(step), Some(0)),
        None => (Some(step), Some(0)),
    };
    let conversation = conversation.and_then(ConversationId::new).ok_or(Malformed(what))?;
    let first = first.and_then(|first| first.checked_add(seq)).and_then(Seq::new).ok_or(Malformed(what))?;
    let count = at.varint(what)?;
    let newest = at.number(what)?;
    let bytes = at.varint(what)?;
    let crc = u32::from_be_bytes(at.array(what)?);
    let last = first.get().checked_add(count).and_then(|end| end.checked_sub(1)).and_then(Seq::new);
    let fits = bytes <= RUN_BYTES_MAX as u64 && count <= bytes / RECORD_BYTES_MIN as u64;
    if first == Seq::ZERO || count == 0 || last.is_none() || !fits {
        return Err(Malformed(what));
    }
    let bytes = u32::try_from(bytes).map_err(|_| Malformed(what))?;
    Ok(Run { conversation, first, count, newest, offset, bytes, crc })
}

/// Appends a row's entry.
pub(super) fn put_row(out: &mut Vec<u8>, table: u8, key: &[u8], row: Option<&[u8]>) {
    out.push(table);
    put_varint(out, key.len() as u64);
    out.extend_from_slice(key);
    match row {
        Some(row) => {
            put_varint(out, row.len() as u64 + 1);
            out.extend_from_slice(row);
        }
        None => out.push(0),
    }
}

/// The runs before one index block, and that block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) run_bytes: u64,
    /// With its header.
    pub(super) block_bytes: u32,
}

/// Appends a group's entry.
pub(super) fn put_group(out: &mut Vec<u8>, group: Group) {
    put_varint(out, group.run_bytes);
    put_varint(out, u64::from(group.block_bytes));
}

/// Reads a group's entry.
pub(super) fn take_group(at: &mut Cursor<'_>) -> Result<Group, Malformed> {
    let what = "segment directory: entry";
    let run_bytes = at.varint(what)?;
    let block_bytes = u32::try_from(at.varint(what)?).map_err(|_| Malformed(what))?;
    Ok(Group { run_bytes, block_bytes })
}

/// A frame as the table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Bytes, compressed.
    pub(super) bytes: u32,
    /// crc32c of them, continued from the seed.
    pub(super) crc: u32,
}

/// Appends a frame's entry.
pub(super) fn put_frame(out: &mut Vec<u8>, frame: Frame) {
    put_varint(out, u64::from(frame.bytes));
    out.extend_from_slice(&frame.crc.to_be_bytes());
}

/// Reads a frame's entry.
pub(super) fn take_frame(at: &mut Cursor<'_>) -> Result<Frame, Malformed> {
    let what = "segment frames: entry";
    let bytes = u32::try_from(at.varint(what)?).map_err(|_| Malformed(what))?;
    if bytes == 0 || bytes as usize > FRAME_COMPRESSED_MAX {
        return Err(Malformed(what));
    }
    Ok(Frame { bytes, crc: u32::from_be_bytes(at.array(what)?) })
}

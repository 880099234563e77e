//! Getting out of a damaged segment what still proves itself.
//!
//! - Blocks of the index and of rows are looked for everywhere in the file: each proves its own place by its checksum, which is
//!   seeded with the segment's header. Header, footer and directory are not needed.
//! - An index block says where the runs right before it lie; those with the right checksum, and only right records, are taken.
//! - What is found is written into a new segment of the same number.
//!
//! Not here: segments in the cold tier, what becomes of conversations with holes (`maintain::salvage`).

use std::{io, ops::RangeInclusive};

use bytes::Bytes;
use fulmar_protocol::id::{Seq, ShardId, UnixMillis};

use super::{
    Run, SegmentError, Summary,
    layout::{self, BLOCK_HEADER_BYTES, BlockHeader, Codec, HEADER_BYTES, Kind},
    name,
    reader::{records, take_row},
    writer::SegmentWriter,
};
use crate::{
    codec::{Cursor, Malformed},
    files::{Files, ReadAt},
};

/// Bytes looked through at a time.
const WINDOW_BYTES: usize = 256 * 1024;

/// A block that was found: where it begins, what it is, how many entries it has, its body.
struct Found {
    at: u64,
    kind: Kind,
    entries: u32,
    body: Bytes,
}

/// Writes what proves itself in the segment `id` of `from` into a new one in `to`. `commits`: what it holds is of these. Tells
/// `lost` of each run that is not right.
///
/// # Errors
/// The file can't be read, or the new one can't be written.
pub(crate) fn rescue(
    from: &dyn Files,
    to: &dyn Files,
    shard: ShardId,
    id: u64,
    commits: RangeInclusive<u64>,
    lost: &mut dyn FnMut(&Run, &SegmentError),
) -> io::Result<Summary> {
    let file = from.open(&name(id))?;
    let (_, seed) = layout::header(shard, id, Codec::Plain);
    let mut writer = SegmentWriter::create(to, shard, id)?;
    let mut rows_began = false;
    each_block(file.as_ref(), seed, &mut |found| {
        match found.kind {
            Kind::Index if !rows_began => {
                for run in runs(&found).unwrap_or_default() {
                    match read(file.as_ref(), &run) {
                        Ok(found) => put(&mut writer, &run, &found)?,
                        Err(error) => lost(&run, &error),
                    }
                }
            }
            Kind::Rows => {
                rows_began = true;
                let mut at = 0;
                for _ in 0..found.entries {
                    let rest = found.body.slice(at.min(found.body.len())..);
                    let mut cursor = Cursor::new(&rest);
                    let Ok((table, key, row)) = take_row(&rest, &mut cursor) else { break };
                    at += cursor.at();
                    ordered(writer.row(table, &key, row.as_deref()))?;
                }
            }
            Kind::Index | Kind::Directory | Kind::Frames => {}
        }
        Ok(())
    })?;
    writer.finish(commits)
}

/// Records with their places, times and bytes.
type Read = Vec<(Seq, UnixMillis, Bytes)>;

fn put(writer: &mut SegmentWriter, run: &Run, found: &[(Seq, UnixMillis, Bytes)]) -> io::Result<()> {
    for (seq, time, encoded) in found {
        ordered(writer.record(run.conversation, *seq, *time, encoded))?;
    }
    Ok(())
}

/// What does not fit the order was not written like that: it is left out.
fn ordered(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// The runs an index block tells of, which lie right before it.
fn runs(found: &Found) -> Result<Vec<Run>, Malformed> {
    let walk = |mut offset: u64| -> Result<(Vec<Run>, u64), Malformed> {
        let mut at = Cursor::new(&found.body);
        let mut runs: Vec<Run> = Vec::new();
        for _ in 0..found.entries {
            let run = layout::take_run(&mut at, runs.last(), offset)?;
            offset = offset.saturating_add(u64::from(run.bytes));
            runs.push(run);
        }
        if at.is_empty() { Ok((runs, offset)) } else { Err(Malformed("segment index block")) }
    };
    let (_, bytes) = walk(0)?;
    let begin = found.at.checked_sub(bytes).filter(|begin| *begin >= HEADER_BYTES as u64);
    Ok(walk(begin.ok_or(Malformed("segment index block"))?)?.0)
}

/// The records of a run, if all of them are right.
fn read(file: &dyn ReadAt, run: &Run) -> Result<Read, SegmentError> {
    // The index bounds it to the largest run there is.
    let mut bytes = vec![0; usize::try_from(run.bytes).map_err(|_| Malformed("segment run"))?];
    file.read_exact_at(&mut bytes, run.offset)?;
    if crc32c::crc32c(&bytes) != run.crc {
        return Err(Malformed("segment run checksum").into());
    }
    let mut found = Vec::new();
    for record in records(run, &bytes.into(), Seq::ZERO) {
        let (record, encoded) = record?;
        found.push((record.seq, record.time, encoded));
    }
    Ok(found)
}

/// Hands every block of index or rows that proves itself to `each`, in the order in which they lie.
fn each_block(file: &dyn ReadAt, seed: u32, each: &mut dyn FnMut(Found) -> io::Result<()>) -> io::Result<()> {
    let length = file.len()?;
    let mut window = Vec::new();
    let mut from = HEADER_BYTES as u64;
    while from.saturating_add(BLOCK_HEADER_BYTES as u64) <= length {
        let bytes = usize::try_from(length - from).unwrap_or(usize::MAX).min(WINDOW_BYTES);
        window.resize(bytes, 0);
        file.read_exact_at(&mut window, from)?;
        let mut next = from + (bytes.saturating_sub(BLOCK_HEADER_BYTES) as u64) + 1;
        for (n, header) in window.windows(BLOCK_HEADER_BYTES).enumerate() {
            let kind = match header {
                [1, 0, 0, 0, ..] => Kind::Index,
                [2, 0, 0, 0, ..] => Kind::Rows,
                _ => continue,
            };
            let at = from + n as u64;
            if let Some(found) = block(file, length, seed, kind, at, header)? {
                next = at + (BLOCK_HEADER_BYTES + found.body.len()) as u64;
                each(found)?;
                break;
            }
        }
        from = next;
    }
    Ok(())
}

fn block(
    file: &dyn ReadAt,
    length: u64,
    seed: u32,
    kind: Kind,
    at: u64,
    header: &[u8],
) -> io::Result<Option<Found>> {
    let Ok(header) = BlockHeader::decode(header, kind) else { return Ok(None) };
    let body_at = at + BLOCK_HEADER_BYTES as u64;
    if header.body_bytes as u64 > length.saturating_sub(body_at) {
        return Ok(None);
    }
    let mut body = vec![0; header.body_bytes];
    file.read_exact_at(&mut body, body_at)?;
    let proven = header.check(&body, seed, at).is_ok();
    Ok(proven.then(|| Found { at, kind, entries: header.entries, body: body.into() }))
}

//! Frames: the runs of a cold segment, cut into pieces of one length and compressed, each by itself.
//!
//! - Frame `n` is bytes `n * FRAME_BYTES ..` of the runs, which follow each other without gaps; only the last is shorter. So a
//!   run's frame is known from its offset; a run that lies across two needs both.
//! - A frame's length and checksum stand in the segment's own file; what is read is verified before it is decompressed,
//!   and is decompressed into a buffer of the length it has to have.
//!
//! Not here: where frames are kept (`cold`).

use std::{fmt, io};

use bytes::Bytes;

use super::layout::Frame;
use crate::codec::Malformed;

/// Bytes of runs in a frame.
pub(crate) const FRAME_BYTES: usize = 256 * 1024;

/// Bytes of a frame at most, compressed: what can't be compressed grows by less than this.
pub(crate) const FRAME_COMPRESSED_MAX: usize = FRAME_BYTES + FRAME_BYTES / 128 + 1024;

/// The level of compression: text shrinks to about a third, at some hundred MiB per second.
const LEVEL: i32 = 3;

/// Where the frames of one cold segment are read.
pub(crate) trait Frames: Send + Sync + fmt::Debug {
    /// `bytes` bytes from offset `at` on; an error if there are fewer.
    fn read(&self, at: u64, bytes: u32) -> io::Result<Bytes>;

    /// A frame that was kept, decompressed.
    fn cached(&self, number: u64) -> Option<Bytes>;

    /// Keeps a frame that was decompressed, if there is room.
    fn keep(&self, number: u64, frame: &Bytes);
}

/// Where compressed frames go, one after the other.
pub(crate) type FrameSink = Box<dyn FnMut(&[u8]) -> io::Result<()> + Send>;

/// Cuts runs into frames.
pub(crate) struct FrameWriter {
    sink: FrameSink,
    compressor: zstd::bulk::Compressor<'static>,
    /// What the next frame has so far.
    frame: Vec<u8>,
    table: Vec<Frame>,
    /// Bytes of runs.
    taken: u64,
    /// Bytes of frames.
    written: u64,
    seed: u32,
}

impl fmt::Debug for FrameWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameWriter")
            .field("taken", &self.taken)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl FrameWriter {
    /// Frames go to `sink`.
    ///
    /// # Errors
    /// There is no memory for the compressor.
    pub(crate) fn new(sink: FrameSink) -> io::Result<Self> {
        Ok(Self {
            sink,
            compressor: zstd::bulk::Compressor::new(LEVEL)?,
            frame: Vec::with_capacity(FRAME_BYTES),
            table: Vec::new(),
            taken: 0,
            written: 0,
            seed: 0,
        })
    }

    /// What checksums continue from.
    pub(super) fn seed(&mut self, seed: u32) {
        self.seed = seed;
    }

    /// Bytes of runs so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    pub(super) fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.taken += bytes.len() as u64;
        while !bytes.is_empty() {
            let room = FRAME_BYTES.saturating_sub(self.frame.len()).min(bytes.len());
            let (now, later) = bytes.split_at(room);
            self.frame.extend_from_slice(now);
            bytes = later;
            if self.frame.len() == FRAME_BYTES {
                self.end_frame()?;
            }
        }
        Ok(())
    }

    fn end_frame(&mut self) -> io::Result<()> {
        let compressed = self.compressor.compress(&self.frame)?;
        let bytes = u32::try_from(compressed.len()).map_err(io::Error::other)?;
        if compressed.len() > FRAME_COMPRESSED_MAX {
            return Err(io::Error::other("a frame grew when it was compressed"));
        }
        (self.sink)(&compressed)?;
        self.written += u64::from(bytes);
        self.table.push(Frame { bytes, crc: crc32c::crc32c_append(self.seed, &compressed) });
        self.frame.clear();
        Ok(())
    }

    /// The table of frames, and the bytes of all.
    pub(super) fn finish(mut self) -> io::Result<(Vec<Frame>, u64)> {
        if !self.frame.is_empty() {
            self.end_frame()?;
        }
        Ok((self.table, self.written))
    }
}

/// Decompresses a frame that has `length` bytes; at most as much memory is taken for it.
pub(super) fn decompress(compressed: &[u8], length: usize) -> Result<Bytes, Malformed> {
    let what = Malformed("segment frame: it can't be decompressed");
    let bytes = zstd::bulk::decompress(compressed, length).map_err(|_| what)?;
    if bytes.len() == length { Ok(bytes.into()) } else { Err(what) }
}

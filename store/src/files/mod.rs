//! The folder of a shard, as far as the log and the segments need it: a layer of our own, so that every write, sync, rename
//! and removal can be recorded, delayed, cut off and failed in tests.
//!
//! - Files are flat: a name has no `/`. What an engine keeps in its own folder beside them does not pass through here.
//! - Nothing is durable before it was synced: bytes by [`Append::sync`], names (created, renamed, removed) by
//!   [`Files::sync_folder`].
//! - A file whose `append` or `sync` failed is never written to again; whoever wrote it begins another one.
//!
//! Not here: what the bytes mean (`commit`, `segment`, `shard::journal`, `shard::manifest`).

use std::{fmt::Debug, io, sync::Arc};

pub(crate) mod disk;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers of a generator")]
pub(crate) mod faulty;
pub(crate) mod memory;

/// One folder of files.
pub(crate) trait Files: Send + Sync + Debug {
    /// Creates an empty file to be appended to; one of the same name is replaced.
    fn create(&self, name: &str) -> io::Result<Box<dyn Append>>;

    /// Opens a file to be read.
    fn open(&self, name: &str) -> io::Result<Arc<dyn ReadAt>>;

    /// Opens a small file whose bytes are overwritten in place, or creates it.
    fn open_slots(&self, name: &str) -> io::Result<Box<dyn Slots>>;

    /// Gives a file another name; one that has it already is replaced.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file. Whoever has it open can go on reading.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Names and lengths of all files, in order of names.
    fn list(&self) -> io::Result<Vec<(String, u64)>>;

    /// Makes creations, renames and removals durable.
    fn sync_folder(&self) -> io::Result<()>;

    /// Bytes that can still be written; `None` if nobody knows.
    fn free(&self) -> io::Result<Option<u64>>;
}

/// A file that is written from front to back.
pub(crate) trait Append: Send + Debug {
    /// Writes all of `bytes` behind what was appended before.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Makes the file `until` bytes long, if it is shorter, with zeros that later appends overwrite: a sync that need not note where
    /// new bytes lie, or a new length, is cheaper. Durable with the next sync. A failure may leave some of the zeros, and harms
    /// nothing: the file can be appended to and synced as before.
    fn make_room(&mut self, until: u64) -> io::Result<()>;

    /// Waits until everything appended so far, and room that was made, would survive power loss.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file that is read, from any thread.
pub(crate) trait ReadAt: Send + Sync + Debug {
    /// Fills `buffer` from offset `at` on; an error of kind `UnexpectedEof` if the file ends before that.
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;

    /// Bytes in the file.
    fn len(&self) -> io::Result<u64>;
}

/// A small file whose bytes are overwritten in place.
pub(crate) trait Slots: ReadAt {
    /// Overwrites; not synced.
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;
}

//! The recording: what was done to the files below the root, in the order in which it was done.
//!
//! - A file of frames: `length u32 LE | sequence u64 LE | kind u8 | fields`, after 8 bytes of magic. `length` counts what
//!   follows it. Fields: numbers little-endian, bytes and paths as `length u32 LE | bytes`. Paths are relative to the root.
//! - Sequences go up by one from 1: a recording with a hole is refused by whoever reads it.
//! - A handle is one opening of a file; copies of a descriptor share it. What a handle names is found out by following the
//!   names from the start, so a file keeps its identity when it is renamed.
//! - A sync is two events: what was done to the file before its `SyncBegin` is durable once its `SyncEnd` stands there.
//!
//! This file is compiled into the library that writes recordings and into the rig that reads them.

/// First bytes of a recording.
pub const MAGIC: [u8; 8] = *b"FLMFDSK1";

/// How a sync was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SyncKind {
    /// `fsync`: data and everything known of the file; of a folder, its names.
    Full = 1,
    /// `fdatasync`: data, and the length.
    Data = 2,
    /// `sync_file_range`: begins to write pages; promises nothing (no length, no disk cache).
    Range = 3,
    /// `syncfs` or `sync`: everything.
    All = 4,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A file or folder was opened.
    Open {
        /// The opening.
        handle: u32,
        /// What it was called.
        path: Vec<u8>,
        /// It was emptied.
        truncate: bool,
        /// Every write is durable when it returns (`O_SYNC`, `O_DSYNC`).
        write_through: bool,
    },
    /// Bytes were written.
    Write {
        /// The opening.
        handle: u32,
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// The length was set, to more or less than it was.
    Length {
        /// The opening.
        handle: u32,
        /// Bytes from now on.
        length: u64,
    },
    /// A name was changed; what had the new name is gone.
    Rename {
        /// Old name.
        from: Vec<u8>,
        /// New name.
        to: Vec<u8>,
    },
    /// A file's name was removed.
    Unlink {
        /// The name.
        path: Vec<u8>,
    },
    /// A folder was made.
    Mkdir {
        /// Its name.
        path: Vec<u8>,
    },
    /// A folder was removed.
    Rmdir {
        /// Its name.
        path: Vec<u8>,
    },
    /// A file got a second name.
    Link {
        /// A name it has.
        from: Vec<u8>,
        /// The second one.
        to: Vec<u8>,
    },
    /// A sync was asked for.
    SyncBegin {
        /// The opening.
        handle: u32,
        /// Which sync this is.
        sync: u64,
        /// How.
        kind: SyncKind,
    },
    /// A sync returned without an error.
    SyncEnd {
        /// Which.
        sync: u64,
    },
    /// A sync failed. What was written before it may have reached the disk or not, and no later sync makes up for it: the
    /// system takes those pages for written.
    SyncFail {
        /// The opening.
        handle: u32,
    },
    /// The recorded program had something to say.
    Mark {
        /// Its words.
        bytes: Vec<u8>,
    },
    /// Something was done that a recording can't hold: the recording is worthless.
    Unsupported {
        /// What.
        what: Vec<u8>,
    },
}

impl Event {
    /// Appends the event's frame.
    pub fn encode(&self, sequence: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&sequence.to_le_bytes());
        let bytes = |out: &mut Vec<u8>, bytes: &[u8]| {
            out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        match self {
            Self::Open { handle, path, truncate, write_through } => {
                out.push(1);
                out.extend_from_slice(&handle.to_le_bytes());
                bytes(out, path);
                out.push(u8::from(*truncate) | (u8::from(*write_through) << 1));
            }
            Self::Write { handle, offset, bytes: data } => {
                out.push(2);
                out.extend_from_slice(&handle.to_le_bytes());
                out.extend_from_slice(&offset.to_le_bytes());
                bytes(out, data);
            }
            Self::Length { handle, length } => {
                out.push(3);
                out.extend_from_slice(&handle.to_le_bytes());
                out.extend_from_slice(&length.to_le_bytes());
            }
            Self::Rename { from, to } => {
                out.push(4);
                bytes(out, from);
                bytes(out, to);
            }
            Self::Unlink { path } => {
                out.push(5);
                bytes(out, path);
            }
            Self::Mkdir { path } => {
                out.push(6);
                bytes(out, path);
            }
            Self::Rmdir { path } => {
                out.push(7);
                bytes(out, path);
            }
            Self::Link { from, to } => {
                out.push(8);
                bytes(out, from);
                bytes(out, to);
            }
            Self::SyncBegin { handle, sync, kind } => {
                out.push(9);
                out.extend_from_slice(&handle.to_le_bytes());
                out.extend_from_slice(&sync.to_le_bytes());
                out.push(*kind as u8);
            }
            Self::SyncEnd { sync } => {
                out.push(10);
                out.extend_from_slice(&sync.to_le_bytes());
            }
            Self::Mark { bytes: words } => {
                out.push(11);
                bytes(out, words);
            }
            Self::SyncFail { handle } => {
                out.push(13);
                out.extend_from_slice(&handle.to_le_bytes());
            }
            Self::Unsupported { what } => {
                out.push(12);
                bytes(out, what);
            }
        }
        let length = u32::try_from(out.len() - start - 4).unwrap_or(u32::MAX);
        if let Some(field) = out.get_mut(start..start + 4) {
            field.copy_from_slice(&length.to_le_bytes());
        }
    }
}

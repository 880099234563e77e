//! Where the rigs work, where they leave what they found, and whether they speak of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

/// Findings kept in one folder; they are copies of disks.
const FINDINGS_MAX: usize = 20;

/// Bytes that have to be free in memory for the rigs to work there.
const ROOM_BYTES: u64 = 2 << 30;

/// A folder in memory if there is one with room, else among the temporary files; gone when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Scratch {
    /// Makes the folder.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new() -> anyhow::Result<Self> {
        let in_memory = Path::new("/dev/shm");
        let builder = tempfile::Builder::new().prefix("fulmar-rig-").to_owned();
        // In a container it may be as small as 64 MiB.
        let room =
            rustix::fs::statvfs(in_memory).map_or(0, |space| space.f_bavail.saturating_mul(space.f_frsize));
        let folder = match builder.tempdir_in(in_memory) {
            Ok(folder) if room >= ROOM_BYTES => folder,
            Ok(_) | Err(_) => builder.tempdir().context("no place for temporary files")?,
        };
        // The preloaded library compares names as they are.
        let path = folder.path().canonicalize()?;
        Ok(Self { _folder: folder, path })
    }

    /// The folder, without links in its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A seed nobody asked for.
#[must_use]
pub fn new_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::from(since.subsec_micros()) ^ (since.as_secs() & 0xffff_ffff)
}

/// Keeps a finding in a folder of this name; `None` if there are enough, or it could not be written.
pub fn finding(
    folder: &Path,
    name: &str,
    write: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> Option<PathBuf> {
    let kept = fs::read_dir(folder).map_or(0, Iterator::count);
    let place = folder.join(name);
    if kept >= FINDINGS_MAX || place.exists() {
        return None;
    }
    let result = fs::create_dir_all(&place).map_err(Into::into).and_then(|()| write(&place));
    match result {
        Ok(()) => Some(place),
        Err(error) => {
            eprintln!("can't keep the finding in {}: {error:#}", place.display());
            None
        }
    }
}

/// Says something on standard error, unless a rig was told to be quiet.
macro_rules! say {
    ($ask:expr, $($text:tt)*) => {
        if !$ask.quiet {
            eprintln!($($text)*);
        }
    };
}
pub(crate) use say;

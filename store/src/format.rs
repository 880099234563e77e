//! The data folder: its format marker, its lock, its shards.
//!
//! - `FORMAT` says what wrote the folder: format version, shard count, engine. It is written once, synced and renamed into
//!   place before any shard exists; a folder without it is used only if it is empty.
//! - `LOCK` is held exclusively (flock) for as long as the folder is open, and names the process that holds it.
//!
//! Not here: what lies in a shard's folder (`engine`, `shard::tip`).

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use fulmar_protocol::{id::ShardId, limit::SHARDS_MAX};

use crate::{
    EngineKind,
    error::OpenError,
    files::{Files, disk::Disk},
};

/// The newest format this program reads and writes.
pub const FORMAT_VERSION: u64 = 2;

const MARKER: &str = "FORMAT";
const MARKER_NEW: &str = "FORMAT.new";
const LOCK: &str = "LOCK";

/// The marker is a few short lines; more is not ours.
const MARKER_BYTES_MAX: u64 = 4096;

/// What the marker says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marker {
    /// The format of everything in the folder.
    pub(crate) format: u64,
    pub(crate) shards: u16,
    pub(crate) engine: String,
    /// Milliseconds since 1970; for people.
    pub(crate) created: u64,
}

/// An open, locked data folder.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    pub(crate) marker: Marker,
    /// Holds the lock until it is dropped.
    _lock: File,
}

impl Folder {
    /// Opens the folder, or makes it with `shards` and `engine`.
    pub(crate) fn open(path: &Path, shards: u16, engine: EngineKind) -> Result<Self, OpenError> {
        fs::create_dir_all(path).map_err(io_error("can't create the data folder", path))?;
        let lock = lock(path)?;
        let marker = match read_marker(path)? {
            Some((_, marker)) => marker,
            None => {
                if let Some(other) = first_foreign_entry(path)? {
                    tracing::debug!(entry = %other.display(), "not an empty folder");
                    return Err(OpenError::NotOurs { path: path.to_owned() });
                }
                let marker = Marker {
                    format: FORMAT_VERSION,
                    shards,
                    engine: engine.name().to_owned(),
                    created: now(),
                };
                write_marker(&Disk::new(path), path, &marker)?;
                marker
            }
        };
        if marker.engine != engine.name() {
            return Err(OpenError::OtherEngine {
                path: path.to_owned(),
                found: marker.engine,
                wanted: engine.name().to_owned(),
            });
        }
        Ok(Self { path: path.to_owned(), marker, _lock: lock })
    }

    /// Opens a folder that exists, whatever its engine.
    pub(crate) fn open_existing(path: &Path) -> Result<Self, OpenError> {
        let not_ours = || OpenError::NotOurs { path: path.to_owned() };
        if read_marker(path)?.is_none() {
            return Err(not_ours());
        }
        let lock = lock(path)?;
        // Once more: whoever had the folder may have changed it.
        let (_, marker) = read_marker(path)?.ok_or_else(not_ours)?;
        Ok(Self { path: path.to_owned(), marker, _lock: lock })
    }

    /// Puts another marker in the place of the one there is, durably. `root` is this folder.
    pub(crate) fn set_marker(&mut self, root: &dyn Files, marker: Marker) -> Result<(), OpenError> {
        write_marker(root, &self.path, &marker)?;
        self.marker = marker;
        Ok(())
    }

    /// The folder of a shard, made if it is not there.
    pub(crate) fn shard(&self, shard: ShardId) -> Result<PathBuf, OpenError> {
        let path = self.path.join(format!("shard-{:03}", shard.get()));
        fs::create_dir_all(&path).map_err(io_error("can't create the folder", &path))?;
        Ok(path)
    }

    /// Makes the entries of the folder durable.
    pub(crate) fn sync(&self) -> Result<(), OpenError> {
        sync_folder(&self.path)
    }
}

/// The format of the folder at `path`, and what else its marker says; `None` if there is no marker. Locks nothing.
pub(crate) fn read_marker(path: &Path) -> Result<Option<(u64, Marker)>, OpenError> {
    let at = path.join(MARKER);
    let file = match File::open(&at) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(io_error("can't read", &at)(error)),
    };
    let mut text = String::new();
    file.take(MARKER_BYTES_MAX).read_to_string(&mut text).map_err(io_error("can't read", &at))?;
    let marker = parse(path, &text)?;
    let format = text.lines().find_map(|line| line.strip_prefix("format = ")?.trim().parse().ok());
    Ok(Some((format.unwrap_or_default(), marker)))
}

fn sync_folder(path: &Path) -> Result<(), OpenError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(io_error("can't sync the folder", path))
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { doing, path, source }
}

fn lock(folder: &Path) -> Result<File, OpenError> {
    let path = folder.join(LOCK);
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(|error| {
            match error.kind() {
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                    OpenError::ReadOnly { path: folder.to_owned(), source: error }
                }
                _ => io_error("can't open", &path)(error),
            }
        })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            let pid = file.take(32).read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
            return Err(OpenError::InUse { path: folder.to_owned(), pid });
        }
        Err(error) => return Err(io_error("can't lock", &path)(error.into())),
    }
    let mut note = || {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    note().map_err(io_error("can't write", &path))?;
    Ok(file)
}

/// An entry that is not what an interrupted first opening leaves.
fn first_foreign_entry(folder: &Path) -> Result<Option<PathBuf>, OpenError> {
    let read = io_error("can't read the folder", folder);
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(read)?;
    Ok(entries
        .into_iter()
        .find(|entry| {
            let name = entry.file_name();
            name != LOCK && name != MARKER_NEW
        })
        .map(|entry| entry.path()))
}

fn write_marker(root: &dyn Files, folder: &Path, marker: &Marker) -> Result<(), OpenError> {
    let write = || {
        let mut file = root.create(MARKER_NEW)?;
        file.append(render(marker).as_bytes())?;
        file.sync()?;
        drop(file);
        root.rename(MARKER_NEW, MARKER)?;
        root.sync_folder()
    };
    write().map_err(io_error("can't write", &folder.join(MARKER_NEW)))?;
    // The folder's own entry as well; its parent may not let us.
    if let Some(parent) = folder.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        let _ = sync_folder(parent);
    }
    Ok(())
}

fn render(marker: &Marker) -> String {
    let Marker { format, shards, engine, created } = marker;
    checked(format!(
        "fulmar data folder\nformat = {format}\nshards = {shards}\nengine = {engine}\ncreated = {created}\n"
    ))
}

/// The start of the last line: the checksum of all before it. A wrong shard count would place names elsewhere, unnoticed.
const CHECK: &str = "check = ";

fn checked(mut lines: String) -> String {
    let check = crc32c::crc32c(lines.as_bytes());
    lines.push_str(&format!("{CHECK}{check:08x}\n"));
    lines
}

fn parse(folder: &Path, text: &str) -> Result<Marker, OpenError> {
    let bad = |what: &str| OpenError::Marker { path: folder.to_owned(), what: what.to_owned() };
    let mut lines = text.lines();
    if lines.next() != Some("fulmar data folder") {
        return Err(OpenError::NotOurs { path: folder.to_owned() });
    }
    let fields: Vec<(&str, &str)> = lines
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim(), value.trim()))
        .collect();
    let field = |name: &str| {
        fields
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| *value)
            .ok_or_else(|| bad(&format!("no {name}")))
    };
    let number =
        |name: &str| field(name)?.parse::<u64>().map_err(|_| bad(&format!("{name} is not a number")));
    let found = number("format")?;
    if found > FORMAT_VERSION {
        return Err(OpenError::Newer { path: folder.to_owned(), found, known: FORMAT_VERSION });
    }
    if found == 0 {
        return Err(bad("format 0 never was"));
    }
    // Format 1 had no checksum.
    match text.rsplit_once(CHECK) {
        Some((lines, _)) if found > 1 && checked(lines.to_owned()) == text => {}
        None if found == 1 => {}
        Some(_) | None => return Err(bad("its checksum is wrong")),
    }
    let shards = number("shards")?;
    if shards == 0 || shards > SHARDS_MAX {
        return Err(bad("the shard count is out of range"));
    }
    Ok(Marker {
        format: found,
        shards: u16::try_from(shards).map_err(|_| bad("the shard count is out of range"))?,
        engine: field("engine")?.to_owned(),
        created: number("created")?,
    })
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_is_pinned_and_comes_back() {
        let marker = Marker { format: 2, shards: 4, engine: "sled".to_owned(), created: 1_700_000_000_000 };
        let text = concat!(
            "fulmar data folder\nformat = 2\nshards = 4\nengine = sled\ncreated = 1700000000000\n",
            "check = 401ba810\n"
        );
        assert_eq!(render(&marker), text);
        assert_eq!(parse(Path::new("x"), text).unwrap(), marker);
    }

    #[test]
    fn what_is_not_ours_is_refused_with_its_reason() {
        let folder = Path::new("x");
        let with = |from: &str, to: &str| {
            let text = render(&Marker { format: 2, shards: 4, engine: "sled".to_owned(), created: 1 });
            let (lines, _) = text.rsplit_once(CHECK).unwrap();
            parse(folder, &checked(lines.replace(from, to))).unwrap_err()
        };
        assert!(matches!(with("format = 2", "format = 3"), OpenError::Newer { found: 3, known: 2, .. }));
        assert!(matches!(with("format = 2", "format = 0"), OpenError::Marker { .. }));
        assert!(matches!(with("shards = 4", "shards = 257"), OpenError::Marker { .. }));
        assert!(matches!(with("shards = 4", "shards = 0"), OpenError::Marker { .. }));
        assert!(matches!(with("shards = 4", ""), OpenError::Marker { .. }));
        assert!(matches!(with("fulmar", "other"), OpenError::NotOurs { .. }));
    }

    #[test]
    fn every_damaged_byte_of_the_marker_is_noticed() {
        let text = render(&Marker { format: 2, shards: 4, engine: "sled".to_owned(), created: 1 });
        for at in 0..text.len() {
            for bit in 0..7 {
                let mut bytes = text.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                let Ok(damaged) = String::from_utf8(bytes) else { continue };
                assert!(parse(Path::new("x"), &damaged).is_err(), "{damaged:?}");
            }
        }
    }

    #[test]
    fn a_folder_of_other_things_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("letter.txt"), "dear").unwrap();
        assert!(matches!(Folder::open(folder.path(), 1, EngineKind::Sled), Err(OpenError::NotOurs { .. })));
    }

    #[test]
    fn a_second_opening_is_refused_and_names_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Folder::open(folder.path(), 3, EngineKind::Sled).unwrap();
        let second = Folder::open(folder.path(), 3, EngineKind::Sled).unwrap_err();
        assert!(
            matches!(second, OpenError::InUse { pid: Some(pid), .. } if pid == std::process::id()),
            "{second}"
        );
    }

    #[test]
    fn shard_count_and_engine_are_those_of_the_creation() {
        let folder = tempfile::tempdir().unwrap();
        drop(Folder::open(folder.path(), 3, EngineKind::Sled).unwrap());
        assert_eq!(Folder::open(folder.path(), 8, EngineKind::Sled).unwrap().marker.shards, 3);
        assert!(matches!(
            Folder::open(folder.path(), 8, EngineKind::Fjall),
            Err(OpenError::OtherEngine { .. })
        ));
    }
}

//! Copying a data folder while a gateway runs on it.
//!
//! - Of each shard the copy holds an exact prefix of its commits: the segments of one manifest, and the commits of the log
//!   after what is settled, up to the last acknowledged one. Everything acknowledged before the backup began is in it.
//! - Shards are copied one after the other, each as it is then; a step that one shard owes another is still owed in the copy.
//! - Segments never change, so they are linked where that is possible, and an earlier backup's are kept.
//! - `FORMAT` goes first and comes last: a copy that was not finished is not a data folder.
//! - The index is not copied; the first start makes it again.
//!
//! Not here: copies in an object store (`cold`).

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use fulmar_protocol::id::ShardId;
use serde::Serialize;

use super::{
    MaintainError, Progress,
    folder::{self, ReadFolder, shard_name},
};
use crate::{
    Durability,
    commit::{self, CommitId},
    error::OpenError,
    files::{Append, Files, disk::Disk},
    format,
    segment::{self, Segment},
    shard::{
        journal::{self, Journal},
        manifest::{self, Entry, Manifest, ManifestError},
        tip::{self, Tip},
    },
};

/// How often a shard is begun again at most, when the gateway has changed its files meanwhile.
const ATTEMPTS_MAX: u32 = 100;

/// Attempts after which the same trouble with the same manifest is damage.
const ATTEMPTS_SAME: u32 = 5;

/// The pause before a shard is begun again.
const PAUSE: Duration = Duration::from_millis(20);

/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;

const MARKER: &str = "FORMAT";
const LOCK: &str = "LOCK";

/// What a file is called until it is whole.
const PART: &str = "part";

/// What was copied of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardCopied {
    /// The shard.
    pub shard: u16,
    /// The last commit in the copy; all before it are in it, and nothing after it.
    pub last_commit: u64,
    /// Segments in the copy.
    pub segments: u64,
    /// Segments that were there from an earlier backup.
    pub kept: u64,
    /// Segments that are the same file as in the source (hard links).
    pub linked: u64,
    /// Bytes written.
    pub copied_bytes: u64,
    /// Bytes of the copy.
    pub bytes: u64,
    /// How often it was begun again because the gateway had changed its files.
    pub retries: u32,
}

/// What [`backup`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BackupReport {
    /// Shard by shard.
    pub shards: Vec<ShardCopied>,
}

/// Copies the data folder at `from` to `to`, which is made, is empty, or holds an earlier backup of the same folder. A gateway
/// may run on `from`, which is only read. The copy opens like any data folder.
///
/// # Errors
/// `from` can't be read or is damaged; `to` is something else; or the gateway changes its files faster than they can be copied.
/// `to` is not a data folder then; the next backup into it goes on from what is there.
pub fn backup(
    from: impl AsRef<Path>,
    to: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress),
) -> Result<BackupReport, MaintainError> {
    let (from, to) = (from.as_ref(), to.as_ref());
    let source = ReadFolder::look(from)?;
    prepare(to)?;
    let mut report = BackupReport::default();
    for (shard, at) in source.shards() {
        let target = to.join(shard_name(shard));
        fs::create_dir_all(&target).map_err(MaintainError::io("can't create the folder", &target))?;
        let copy = Copy { shard, root: from, at: &at, to: &target, copied: ShardCopied::default() };
        report.shards.push(copy.run(progress)?);
    }
    // What lies beside the shards: small files the folder can't do without.
    for entry in fs::read_dir(from).map_err(MaintainError::io("can't read the folder", from))? {
        let entry = entry.map_err(MaintainError::io("can't read the folder", from))?;
        let name = entry.file_name();
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && name != MARKER && name != LOCK && !name.to_string_lossy().ends_with(".new") {
            copy_whole(&entry.path(), &to.join(&name))?;
        }
    }
    sync_folder(to)?;
    copy_whole(&from.join(MARKER), &to.join(MARKER))?;
    sync_folder(to)?;
    if let Some(parent) = to.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        // It may not let us.
        let _ = sync_folder(parent);
    }
    Ok(report)
}

/// Makes `to` a folder that is not a data folder yet.
fn prepare(to: &Path) -> Result<(), MaintainError> {
    fs::create_dir_all(to).map_err(MaintainError::io("can't create the folder", to))?;
    // Nobody may be using the copy.
    let _held = folder::hold(to)?;
    let mut entries = Vec::new();
    for entry in fs::read_dir(to).map_err(MaintainError::io("can't read the folder", to))? {
        entries.push(entry.map_err(MaintainError::io("can't read the folder", to))?.file_name());
    }
    let is_data = format::read_marker(to)?.is_some();
    let is_shard = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.starts_with("shard-"));
    let is_part = entries.iter().any(|name| is_shard(name));
    if !entries.is_empty() && !is_data && !is_part {
        return Err(MaintainError::NotEmpty { path: to.to_owned() });
    }
    if is_data {
        remove(&to.join(MARKER))?;
        sync_folder(to)?;
    }
    if to.join(LOCK).exists() {
        // Somebody has opened the copy and may have written to it: nothing in it can be kept.
        for name in entries.iter().filter(|name| is_shard(name)) {
            let path = to.join(name);
            fs::remove_dir_all(&path).map_err(MaintainError::io("can't remove", &path))?;
        }
        remove(&to.join(LOCK))?;
    }
    Ok(())
}

/// One shard being copied.
struct Copy<'a> {
    shard: ShardId,
    /// The data folder.
    root: &'a Path,
    /// The shard's folder in it.
    at: &'a Path,
    /// And in the copy.
    to: &'a Path,
    copied: ShardCopied,
}

/// Why an attempt came to nothing.
enum Stopped {
    /// Something was gone or did not fit: the gateway may have changed it.
    Changed(String),
    Failed(MaintainError),
}

impl From<MaintainError> for Stopped {
    fn from(error: MaintainError) -> Self {
        Self::Failed(error)
    }
}

impl Copy<'_> {
    fn run(mut self, progress: &mut dyn FnMut(Progress)) -> Result<ShardCopied, MaintainError> {
        self.copied.shard = self.shard.get();
        let mut same = (0, 0);
        for attempt in 1..=ATTEMPTS_MAX {
            let source = Disk::new(self.at);
            let manifest = Manifest::load(&source, self.shard).map_err(|error| match error {
                ManifestError::Io(error) => {
                    MaintainError::io("can't read", &self.at.join(manifest::NAME))(error)
                }
                ManifestError::Malformed(what) => self.damaged(format!("the manifest is damaged: {what}")),
            })?;
            match self.attempt(&source, &manifest, progress) {
                Ok(()) => return Ok(self.copied),
                Err(Stopped::Failed(error)) => return Err(error),
                Err(Stopped::Changed(what)) => {
                    same =
                        if same.0 == manifest.edition { (same.0, same.1 + 1) } else { (manifest.edition, 1) };
                    if same.1 >= ATTEMPTS_SAME {
                        return Err(self.damaged(what));
                    }
                    tracing::debug!(shard = %self.shard, attempt, what, "the shard changed while it was copied");
                    self.copied.retries += 1;
                    thread::park_timeout(PAUSE);
                }
            }
        }
        Err(MaintainError::Changing { shard: self.shard, attempts: ATTEMPTS_MAX })
    }

    fn damaged(&self, what: String) -> MaintainError {
        MaintainError::Damaged { shard: self.shard, what }
    }

    fn attempt(
        &mut self,
        source: &Disk,
        manifest: &Manifest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Stopped> {
        let target = Disk::new(self.to);
        let of: u64 = manifest.segments.iter().map(|entry| entry.bytes).sum();
        let mut done = 0;
        (self.copied.segments, self.copied.bytes) = (0, 0);
        for entry in &manifest.segments {
            self.segment(&target, entry)?;
            self.copied.segments += 1;
            self.copied.bytes += entry.bytes;
            done += entry.bytes;
            progress(Progress { shard: self.shard, doing: "copying segments", done, of });
        }
        let to = self.to.to_owned();
        let io = |doing: &'static str| MaintainError::io(doing, &to);
        target.sync_folder().map_err(io("can't sync the folder"))?;
        let last = self.log(source, &target, manifest)?;
        manifest.store(&target, self.shard).map_err(io("can't write the manifest in"))?;
        self.copied.last_commit = last.number;
        self.clean(manifest)?;
        remove(&to.join(tip::NAME))?;
        if last.number > 0 {
            let (tip, _) = Tip::open(&target).map_err(io("can't write the tip in"))?;
            tip.write(last).map_err(io("can't write the tip in"))?;
            let at = to.join(tip::NAME);
            File::open(&at).and_then(|file| file.sync_all()).map_err(MaintainError::io("can't sync", &at))?;
        }
        target.sync_folder().map_err(io("can't sync the folder"))?;
        Ok(())
    }

    /// Links or copies a segment, unless it is there.
    fn segment(&mut self, target: &Disk, entry: &Entry) -> Result<(), Stopped> {
        let name = segment::name(entry.id);
        let (from, to) = (self.at.join(&name), self.to.join(&name));
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let source = match fs::metadata(&from) {
            Ok(data) => data,
            Err(error) if gone(&error) => return Err(Stopped::Changed(format!("{name} is not there"))),
            Err(error) => return Err(MaintainError::io("can't read", &from)(error).into()),
        };
        if let Ok(there) = fs::metadata(&to) {
            let linked = (there.dev(), there.ino()) == (source.dev(), source.ino());
            if linked || is_whole(target, self.shard, entry) {
                self.copied.kept += 1;
                return Ok(());
            }
            remove(&to)?;
        }
        match fs::hard_link(&from, &to) {
            Ok(()) => {
                self.copied.linked += 1;
                return Ok(());
            }
            Err(error) if gone(&error) => return Err(Stopped::Changed(format!("{name} is not there"))),
            // Another file system, or one without links.
            Err(_) => {}
        }
        match copy_file(&from, &to) {
            Ok(bytes) => {
                self.copied.copied_bytes += bytes;
                Ok(())
            }
            Err(error) if gone(&error) => Err(Stopped::Changed(format!("{name} is not there"))),
            Err(error) => Err(MaintainError::io("can't copy", &from)(error).into()),
        }
    }

    /// Writes the commits after what is settled into a log file of the copy. Returns the last one.
    fn log(&mut self, source: &Disk, target: &Disk, manifest: &Manifest) -> Result<CommitId, Stopped> {
        let read = |error: io::Error| MaintainError::io("can't read the log in", self.at)(error);
        let changed = |error: &dyn std::fmt::Display| Stopped::Changed(error.to_string());
        // First whether somebody writes: whoever begins later begins with all that is there.
        let running = folder::is_held(self.root);
        let (tip, damaged) = Tip::read(source).map_err(read)?;
        if running && let Some(what) = damaged.first() {
            // Read while it was written.
            return Err(changed(what));
        }
        // A file of the log begins after everything that counts.
        let logs = journal::list(source).map_err(|error| changed(&error))?;
        let begun_after = logs.last().map_or(0, |(first, _)| first.saturating_sub(1));
        let until = if running { tip.number.max(begun_after) } else { u64::MAX };

        let write = |error: io::Error| MaintainError::io("can't write the log in", self.to)(error);
        let mut log =
            Journal::begin(target, self.shard, Durability::Power, manifest.settled, 0).map_err(write)?;
        let mut last = manifest.settled;
        let mut bytes = 0;
        let mut failed = None;
        let proven = journal::Reader::new(source, self.shard, tip).read(manifest.settled, |commit| {
            if commit.id.number > until || failed.is_some() {
                return Ok(());
            }
            let (id, encoded) = commit::encode(last, commit.ops, &commit.body);
            bytes += encoded.len() as u64;
            last = id;
            failed = log.append(&encoded).err();
            Ok(())
        });
        match proven {
            Ok(_) => {}
            Err(OpenError::Damaged { what, .. }) => return Err(Stopped::Changed(format!("the log: {what}"))),
            Err(error) => return Err(changed(&error)),
        }
        if let Some(error) = failed {
            return Err(write(error).into());
        }
        log.sync().map_err(write)?;
        if last.number < tip.number {
            return Err(Stopped::Changed(format!("the log ends at commit {}", last.number)));
        }
        self.copied.copied_bytes += bytes;
        self.copied.bytes += bytes;
        Ok(last)
    }

    /// Removes what does not belong to the copy: what an earlier one held.
    fn clean(&self, manifest: &Manifest) -> Result<(), MaintainError> {
        let log = journal::name(manifest.settled.number.saturating_add(1));
        for entry in fs::read_dir(self.to).map_err(MaintainError::io("can't read the folder", self.to))? {
            let entry = entry.map_err(MaintainError::io("can't read the folder", self.to))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let keep = name == manifest::NAME
                || name == log.as_str()
                || manifest.segments.iter().any(|entry| segment::name(entry.id) == name);
            if keep {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                fs::remove_dir_all(entry.path()).map_err(MaintainError::io("can't remove", &entry.path()))?;
            } else {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Whether the copy has the segment, whole, as the manifest means it.
fn is_whole(target: &Disk, shard: ShardId, entry: &Entry) -> bool {
    Segment::open(target, shard, entry.id).is_ok_and(|segment| {
        let there = Entry::new(segment.summary(), entry.edition, Vec::new());
        there == Entry { merged: false, replaces: Vec::new(), cold: None, ..entry.clone() }
    })
}

/// Copies a small file.
pub(crate) fn copy_whole(from: &Path, to: &Path) -> Result<(), MaintainError> {
    copy_file(from, to).map(drop).map_err(MaintainError::io("can't copy", from))
}

/// Copies a file: whole and durable under its name, or not there.
fn copy_file(from: &Path, to: &Path) -> io::Result<u64> {
    let mut source = File::open(from)?;
    let part: PathBuf = to.with_extension(PART);
    let (Some(folder), Some(part_name)) = (to.parent(), part.file_name().and_then(|name| name.to_str()))
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut target: Box<dyn Append> = Disk::new(folder).create(part_name)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut copied = 0;
    loop {
        let n = source.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..n).filter(|bytes| !bytes.is_empty()) else { break };
        target.append(bytes)?;
        copied += n as u64;
    }
    target.sync()?;
    fs::rename(&part, to)?;
    Ok(copied)
}

fn remove(path: &Path) -> Result<(), MaintainError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(MaintainError::io("can't remove", path)(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

pub(crate) fn sync_folder(path: &Path) -> Result<(), MaintainError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(MaintainError::io("can't sync the folder", path))
}

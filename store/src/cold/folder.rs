//! Objects as files in a folder: a larger and slower disk, or one that is reached over a network.
//!
//! - An object is written under another name, synced, and renamed; so are the folders it lies in. One that has its name is whole.
//!
//! Not here: what is in the objects.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use super::{ColdStore, Listed, Stop, Upload};

/// How the name of an object ends that is being written.
const PART: &str = ".part";

/// A folder of objects.
#[derive(Debug)]
pub(crate) struct Local {
    path: PathBuf,
}

impl Local {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Names come from the manifest, which someone may have made.
    fn at(&self, name: &str) -> io::Result<PathBuf> {
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        if name.split('/').all(plain) {
            Ok(self.path.join(name))
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name of an object"))
        }
    }
}

#[derive(Debug)]
struct Part {
    /// The folder of all objects.
    root: PathBuf,
    path: PathBuf,
    file: File,
    finished: bool,
}

impl Part {
    fn part(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(PART);
        name.into()
    }
}

impl Upload for Part {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(Self::part(&self.path), &self.path)?;
        self.finished = true;
        // The folders may be new as well.
        for folder in self.path.ancestors().skip(1) {
            File::open(folder)?.sync_all()?;
            if folder == self.root {
                break;
            }
        }
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.finished {
            // What is left of it is removed with other orphans.
            let _ = fs::remove_file(Self::part(&self.path));
        }
    }
}

impl ColdStore for Local {
    fn begin(&self, name: &str, _stop: &Stop) -> io::Result<Box<dyn Upload>> {
        let path = self.at(name)?;
        // The folder itself is not made: one that is not mounted is missing, not empty.
        if !self.path.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the folder {} is not there", self.path.display()),
            ));
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = File::options().write(true).create(true).truncate(true).open(Part::part(&path))?;
        Ok(Box::new(Part { root: self.path.clone(), path, file, finished: false }))
    }

    fn read(&self, name: &str, at: u64, bytes: u32, _stop: &Stop) -> io::Result<Bytes> {
        let mut buffer = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        File::open(self.at(name)?)?.read_exact_at(&mut buffer, at)?;
        Ok(buffer.into())
    }

    fn size(&self, name: &str, _stop: &Stop) -> io::Result<u64> {
        Ok(fs::metadata(self.at(name)?)?.len())
    }

    fn remove(&self, name: &str, _stop: &Stop) -> io::Result<()> {
        match fs::remove_file(self.at(name)?) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn list(&self, prefix: &str, limit: usize, _stop: &Stop) -> io::Result<Vec<Listed>> {
        let folder = self.at(prefix.trim_end_matches('/'))?;
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries.take(limit) {
            let entry = entry?;
            let data = entry.metadata()?;
            let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else {
                continue;
            };
            if data.is_file() {
                // A file from the future is new.
                let age = SystemTime::now().duration_since(data.modified()?).unwrap_or(Duration::ZERO);
                found.push(Listed { name, age });
            }
        }
        Ok(found)
    }
}

//! A folder on disk.
//!
//! Not here: the data folder around it (`format`).

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Append, Files, ReadAt, Slots};

/// A folder on disk.
#[derive(Debug)]
pub(crate) struct Disk {
    path: PathBuf,
}

impl Disk {
    /// The folder at `path`, which exists.
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }
}

#[derive(Debug)]
struct OnDisk(File);

/// A file that is appended to.
#[derive(Debug)]
struct Growing {
    file: File,
    /// Where the next append goes.
    end: u64,
    /// Bytes in the file: more than that while there is room.
    length: u64,
}

/// Zeros written at a time.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

impl Files for Disk {
    fn create(&self, name: &str) -> io::Result<Box<dyn Append>> {
        let path = self.path.join(name);
        let file = File::options().write(true).create(true).truncate(true).open(path)?;
        Ok(Box::new(Growing { file, end: 0, length: 0 }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        Ok(Arc::new(OnDisk(File::open(self.path.join(name))?)))
    }

    fn open_slots(&self, name: &str) -> io::Result<Box<dyn Slots>> {
        let path = self.path.join(name);
        Ok(Box::new(OnDisk(File::options().read(true).write(true).create(true).truncate(false).open(path)?)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let data = entry.metadata()?;
            if data.is_file()
                && let Some(name) = entry.file_name().to_str()
            {
                found.push((name.to_owned(), data.len()));
            }
        }
        found.sort();
        Ok(found)
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }

    fn free(&self) -> io::Result<Option<u64>> {
        let space = rustix::fs::statvfs(&self.path)?;
        Ok(Some(space.f_bavail.saturating_mul(space.f_frsize)))
    }
}

impl Append for Growing {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.end)?;
        self.end = self.end.saturating_add(bytes.len() as u64);
        self.length = self.length.max(self.end);
        Ok(())
    }

    fn make_room(&mut self, until: u64) -> io::Result<()> {
        while self.length < until {
            let bytes = usize::try_from(until - self.length).unwrap_or(usize::MAX).min(ZEROS.len());
            self.file.write_all_at(ZEROS.get(..bytes).unwrap_or_default(), self.length)?;
            self.length += bytes as u64;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        // Writes the file's length as well, if that changed: fdatasync leaves out only what reading does not need.
        self.file.sync_data()
    }
}

impl ReadAt for OnDisk {
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.0, buffer, at)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
}

impl Slots for OnDisk {
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        FileExt::write_all_at(&self.0, bytes, at)
    }
}

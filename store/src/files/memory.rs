//! A folder in memory, for tests and for gateways that need not remember.
//!
//! - "Durable" for as long as the [`MemoryFiles`] lives: clones are the same folder.
//!
//! Not here: faults and power cuts (tests wrap it).

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use fulmar_protocol::id::ShardId;

use super::{Append, Files, ReadAt, Slots};

/// The bytes of one file, shared by all who have it open.
type Content = Arc<RwLock<Vec<u8>>>;

/// A folder in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryFiles {
    files: Arc<Mutex<BTreeMap<String, Content>>>,
}

/// The folders of all shards, in memory: what a store with [`crate::EngineKind::Memory`] writes can be opened again for as long
/// as a clone of this lives, as after a crash of its process.
#[derive(Clone, Debug, Default)]
pub struct MemoryDisk {
    shards: Arc<Mutex<BTreeMap<ShardId, MemoryFiles>>>,
}

impl MemoryDisk {
    pub(crate) fn shard(&self, id: ShardId) -> MemoryFiles {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default().clone()
    }
}

#[derive(Debug)]
struct InMemory(Content);

impl MemoryFiles {
    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Content>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_found(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("no file {name:?} in memory"))
}

impl Files for MemoryFiles {
    fn create(&self, name: &str) -> io::Result<Box<dyn Append>> {
        let content = Content::default();
        self.files().insert(name.to_owned(), Arc::clone(&content));
        Ok(Box::new(InMemory(content)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        let content = self.files().get(name).cloned().ok_or_else(|| not_found(name))?;
        Ok(Arc::new(InMemory(content)))
    }

    fn open_slots(&self, name: &str) -> io::Result<Box<dyn Slots>> {
        Ok(Box::new(InMemory(Arc::clone(self.files().entry(name.to_owned()).or_default()))))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files();
        let content = files.remove(from).ok_or_else(|| not_found(from))?;
        files.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.files().remove(name).map(|_| ()).ok_or_else(|| not_found(name))
    }

    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let files = self.files();
        Ok(files.iter().map(|(name, content)| (name.clone(), read(content).len() as u64)).collect())
    }

    fn sync_folder(&self) -> io::Result<()> {
        Ok(())
    }

    fn free(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

fn read(content: &Content) -> std::sync::RwLockReadGuard<'_, Vec<u8>> {
    content.read().unwrap_or_else(PoisonError::into_inner)
}

impl Append for InMemory {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(())
    }

    fn make_room(&mut self, _until: u64) -> io::Result<()> {
        // There is no disk that would be quicker for it.
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadAt for InMemory {
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let content = read(&self.0);
        let found = usize::try_from(at)
            .ok()
            .and_then(|at| content.get(at..at.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(found);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(read(&self.0).len() as u64)
    }
}

impl Slots for InMemory {
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut content = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(at).map_err(io::Error::other)?;
        let end = start.saturating_add(bytes.len());
        if content.len() < end {
            content.resize(end, 0);
        }
        if let Some(place) = content.get_mut(start..end) {
            place.copy_from_slice(bytes);
        }
        Ok(())
    }
}

//! An object store in memory that fails when told to, for tests.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;

use super::{ColdStore, Listed, Stop, Upload};

type Objects = Arc<Mutex<BTreeMap<String, (Vec<u8>, Duration)>>>;

#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryStore {
    objects: Objects,
    /// Calls until one fails; `None`: none does.
    fuse: Arc<Mutex<Option<u64>>>,
    /// What is read back differs from what was written.
    lies: bool,
    /// All calls fail.
    pub(crate) down: Arc<std::sync::atomic::AtomicBool>,
}

#[derive(Debug)]
struct Part {
    store: MemoryStore,
    name: String,
    bytes: Vec<u8>,
}

impl MemoryStore {
    /// One that loses a byte of everything it is given.
    pub(crate) fn lying() -> Self {
        Self { lies: true, ..Self::default() }
    }

    fn call(&self) -> io::Result<()> {
        if self.down.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(io::Error::other("the object store is down"));
        }
        let mut fuse = self.fuse.lock().unwrap();
        match fuse.as_mut() {
            Some(0) => {
                *fuse = None;
                Err(io::Error::other("the object store failed this call"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The call after `calls` others fails, once.
    pub(crate) fn fail_after(&self, calls: u64) {
        *self.fuse.lock().unwrap() = Some(calls);
    }

    /// Whether the call that was to fail has come.
    pub(crate) fn has_failed(&self) -> bool {
        self.fuse.lock().unwrap().is_none()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.objects.lock().unwrap().keys().cloned().collect()
    }

    pub(crate) fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut self.objects.lock().unwrap().get_mut(name).unwrap().0);
    }

    pub(crate) fn set_age(&self, age: Duration) {
        self.objects.lock().unwrap().values_mut().for_each(|object| object.1 = age);
    }

    pub(crate) fn put(&self, name: &str, bytes: &[u8]) {
        self.objects.lock().unwrap().insert(name.to_owned(), (bytes.to_vec(), Duration::ZERO));
    }
}

impl ColdStore for MemoryStore {
    fn begin(&self, name: &str, _stop: &Stop) -> io::Result<Box<dyn Upload>> {
        self.call()?;
        Ok(Box::new(Part { store: self.clone(), name: name.to_owned(), bytes: Vec::new() }))
    }

    fn read(&self, name: &str, at: u64, bytes: u32, _stop: &Stop) -> io::Result<Bytes> {
        self.call()?;
        let objects = self.objects.lock().unwrap();
        let object = &objects.get(name).ok_or(io::ErrorKind::NotFound)?.0;
        let at = usize::try_from(at).unwrap();
        let end = at + bytes as usize;
        Ok(Bytes::copy_from_slice(object.get(at..end).ok_or(io::ErrorKind::UnexpectedEof)?))
    }

    fn size(&self, name: &str, _stop: &Stop) -> io::Result<u64> {
        self.call()?;
        Ok(self.objects.lock().unwrap().get(name).ok_or(io::ErrorKind::NotFound)?.0.len() as u64)
    }

    fn remove(&self, name: &str, _stop: &Stop) -> io::Result<()> {
        self.call()?;
        self.objects.lock().unwrap().remove(name);
        Ok(())
    }

    fn list(&self, prefix: &str, limit: usize, _stop: &Stop) -> io::Result<Vec<Listed>> {
        self.call()?;
        let objects = self.objects.lock().unwrap();
        let found = objects.iter().filter(|(name, _)| name.starts_with(prefix)).take(limit);
        Ok(found.map(|(name, (_, age))| Listed { name: name.clone(), age: *age }).collect())
    }
}

impl Upload for Part {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.store.call()?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        self.store.call()?;
        let middle = self.bytes.len() / 2;
        if let Some(byte) = self.bytes.get_mut(middle).filter(|_| self.store.lies) {
            *byte ^= 1;
        }
        self.store.put(&self.name, &self.bytes);
        Ok(())
    }
}

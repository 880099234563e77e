//! The cold tier: what is old lies compressed in an object store, and is read from there by the same calls.
//!
//! - A cold segment is two things: an *object* with its runs, cut into frames, and a file beside the other segments with
//!   everything else (index of the runs, rows, checksums of the frames). So opening, making the index again and verifying need
//!   no object store, and what comes back from it is verified as what comes from the disk is.
//! - Nothing local is removed before the whole object was read back and verified, and the manifest names it.
//! - An object store that fails costs the reads of what lies there, each with an answer that says so. Commits, settling and
//!   other reads never wait for it: it is written by a thread of its own ([`freeze`]).
//! - Names of objects hold a random number and are written once. What no manifest names any more is removed after a day,
//!   and only if it was made by this very data folder ([`identity`]).
//!
//! Not here: the bytes of a cold segment (`segment`), when one is made (`shard::settler`).

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use fulmar_protocol::id::ShardId;
use moka::{policy::EvictionPolicy, sync::Cache};

use crate::{error::OpenError, segment::Frames};

pub(crate) mod folder;
pub(crate) mod freeze;
pub(crate) mod identity;
#[cfg(test)]
pub(crate) mod memory;
#[cfg(feature = "s3")]
mod s3;
#[cfg(test)]
mod tests;

/// How long a failing object store is left alone at first; doubled with each failure that follows.
const REST_FIRST: Duration = Duration::from_millis(500);

/// How long at most.
const REST_MAX: Duration = Duration::from_secs(30);

/// Objects that no manifest names are removed when they are older.
pub(crate) const ORPHAN_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Where old records go, and when.
#[derive(Clone, Debug)]
pub struct ColdOptions {
    /// `file:///a/folder`, or `s3://bucket/prefix` if this program was built with the feature `s3`.
    pub url: String,
    /// Records older than this go there, when all in their segment are. Compared with the times the records have: with a clock
    /// that was wrong they go early or late, which nobody notices but by the time a read takes.
    pub after: Duration,
    /// Bytes of records, before they are compressed, that are worth an object of their own.
    pub object_bytes_min: u64,
    /// Bytes of decompressed frames kept in memory, over all shards.
    pub cache_bytes: u64,
    connected: Option<Connected>,
}

/// What the shards of a store share.
#[derive(Clone, Debug)]
struct Connected {
    store: Arc<dyn ColdStore>,
    /// Names the data folder in the object store.
    folder: String,
    /// Frames by shard, segment and number.
    frames: Cache<(ShardId, u64, u64), Bytes>,
}

impl ColdOptions {
    /// Records older than `after` go to `url`.
    #[must_use]
    pub fn new(url: impl Into<String>, after: Duration) -> Self {
        Self { url: url.into(), after, object_bytes_min: 16 << 20, cache_bytes: 32 << 20, connected: None }
    }

    /// Checks the address without using it.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn check_url(url: &str) -> Result<(), &'static str> {
        Address::parse(url).map(drop)
    }

    /// Makes ready to use the object store; `folder` is the name of the data folder there.
    pub(crate) fn connect(&mut self, folder: String) -> Result<(), OpenError> {
        let store: Arc<dyn ColdStore> = match Address::parse(&self.url).map_err(OpenError::Options)? {
            Address::Folder(path) => Arc::new(folder::Local::new(path)),
            #[cfg(feature = "s3")]
            Address::S3 { bucket, prefix } => Arc::new(s3::S3::connect(&bucket, &prefix)?),
        };
        self.connect_to(store, folder);
        Ok(())
    }

    pub(crate) fn connect_to(&mut self, store: Arc<dyn ColdStore>, folder: String) {
        // The runs of a frame are read one after the other: the newest frame has to be kept, however rarely it was read before.
        let frames = Cache::builder()
            .eviction_policy(EvictionPolicy::lru())
            .weigher(|_, frame: &Bytes| u32::try_from(frame.len()).unwrap_or(u32::MAX))
            .max_capacity(self.cache_bytes)
            .build();
        self.connected = Some(Connected { store, folder, frames });
    }

    /// The cold tier of one shard; `None` before it was connected.
    pub(crate) fn tier(&self, shard: ShardId) -> Option<Arc<Tier>> {
        let Connected { store, folder, frames } = self.connected.clone()?;
        Some(Arc::new(Tier {
            store,
            frames,
            shard,
            prefix: format!("{folder}/shard-{:03}/", shard.get()),
            after: self.after,
            object_bytes_min: self.object_bytes_min,
            reads: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            rest: Mutex::default(),
        }))
    }
}

/// Where an object store is.
enum Address {
    Folder(std::path::PathBuf),
    #[cfg(feature = "s3")]
    S3 {
        bucket: String,
        prefix: String,
    },
}

impl Address {
    fn parse(url: &str) -> Result<Self, &'static str> {
        if let Some(path) = url.strip_prefix("file://") {
            return if path.starts_with('/') {
                Ok(Self::Folder(path.into()))
            } else {
                Err("the cold tier's url is file:// and an absolute path, as in file:///srv/cold")
            };
        }
        if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err("the cold tier's url has no bucket: s3://bucket/prefix");
            }
            #[cfg(feature = "s3")]
            return Ok(Self::S3 { bucket: bucket.to_owned(), prefix: prefix.trim_matches('/').to_owned() });
            #[cfg(not(feature = "s3"))]
            {
                let _ = prefix;
                return Err("s3:// needs a program that was built with the feature s3");
            }
        }
        Err("the cold tier's url begins with file:// or s3://")
    }
}

/// An object in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    /// Since it was written.
    pub(crate) age: Duration,
}

/// An object store. Names have `/` between their parts. Calls block, but not for long: what hangs is given up with an error, at
/// once when `stop` is told.
pub(crate) trait ColdStore: Send + Sync + fmt::Debug {
    /// Begins an object. It is there when [`Upload::finish`] has answered, and never in part.
    fn begin(&self, name: &str, stop: &Stop) -> io::Result<Box<dyn Upload>>;

    /// Exactly `bytes` bytes from offset `at` on.
    fn read(&self, name: &str, at: u64, bytes: u32, stop: &Stop) -> io::Result<Bytes>;

    /// Bytes of an object.
    fn size(&self, name: &str, stop: &Stop) -> io::Result<u64>;

    /// Removes an object; it is no error if there is none.
    fn remove(&self, name: &str, stop: &Stop) -> io::Result<()>;

    /// Objects whose names begin with `prefix`, which ends in `/`; at most `limit`.
    fn list(&self, prefix: &str, limit: usize, stop: &Stop) -> io::Result<Vec<Listed>>;
}

/// An object that is being written. Dropped before it was finished, nothing is left of it.
pub(crate) trait Upload: Send + fmt::Debug {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Ends the object, durably.
    fn finish(self: Box<Self>) -> io::Result<()>;
}

/// Tells a thread that works for a shard to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop {
    inner: Arc<(Mutex<bool>, std::sync::Condvar, AtomicBool)>,
}

impl Stop {
    pub(crate) fn tell(&self) {
        self.inner.2.store(true, Ordering::Release);
        *self.inner.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.inner.1.notify_all();
    }

    pub(crate) fn is_told(&self) -> bool {
        self.inner.2.load(Ordering::Acquire)
    }

    /// Waits, unless told before it is over.
    pub(crate) fn pause(&self, pause: Duration) {
        let told = self.inner.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.inner.1.wait_timeout_while(told, pause, |told| !*told));
    }
}

/// How long the object store is left alone, after failures.
#[derive(Debug, Default)]
struct Rest {
    until: Option<Instant>,
    next: Duration,
    why: String,
}

/// The cold tier of one shard.
#[derive(Debug)]
pub(crate) struct Tier {
    store: Arc<dyn ColdStore>,
    frames: Cache<(ShardId, u64, u64), Bytes>,
    shard: ShardId,
    prefix: String,
    pub(crate) after: Duration,
    pub(crate) object_bytes_min: u64,
    reads: AtomicU64,
    failures: AtomicU64,
    rest: Mutex<Rest>,
}

impl Tier {
    pub(crate) fn store(&self) -> &Arc<dyn ColdStore> {
        &self.store
    }

    /// Frames fetched, and calls that failed.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.reads.load(Ordering::Relaxed), self.failures.load(Ordering::Relaxed))
    }

    pub(crate) fn failed(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// A name for the object of the segment `id` that no object had before.
    pub(crate) fn name(&self, id: u64) -> io::Result<String> {
        Ok(format!("{}{id:016x}-{}.seg.zst", self.prefix, identity::random()?))
    }

    /// Where the frames of the segment `id` are read, whose object is called `name`.
    pub(crate) fn frames(self: &Arc<Self>, id: u64, name: &str) -> Arc<dyn Frames> {
        Arc::new(Object { tier: Arc::clone(self), id, name: name.to_owned() })
    }

    /// Removes objects of this shard that `named` does not have, if they are old. Returns how many.
    pub(crate) fn sweep(&self, named: &[String], stop: &Stop) -> io::Result<u64> {
        let mut removed = 0;
        for object in self.store.list(&self.prefix, SWEEP_MAX, stop)? {
            if stop.is_told() {
                break;
            }
            if object.age >= ORPHAN_AGE
                && object.name.starts_with(&self.prefix)
                && !named.contains(&object.name)
            {
                self.store.remove(&object.name, stop)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Reads, unless the object store failed just now: then nobody waits for it to fail again.
    fn read(&self, name: &str, at: u64, bytes: u32) -> io::Result<Bytes> {
        {
            let rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
            if rest.until.is_some_and(|until| until > Instant::now()) {
                self.failed();
                return Err(io::Error::other(format!("the cold tier failed just now: {}", rest.why)));
            }
        }
        self.reads.fetch_add(1, Ordering::Relaxed);
        let read = off_the_runtime(|| self.store.read(name, at, bytes, &Stop::default()));
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(bytes) => {
                *rest = Rest::default();
                Ok(bytes)
            }
            Err(error) => {
                self.failed();
                // An object that is not there, or too short, says nothing about the others.
                if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) {
                    rest.next = (rest.next * 2).clamp(REST_FIRST, REST_MAX);
                    rest.until = Instant::now().checked_add(rest.next);
                    rest.why = error.to_string();
                }
                drop(rest);
                tracing::warn!(shard = %self.shard, object = name, %error, "reading from the cold tier failed");
                Err(io::Error::new(error.kind(), format!("the cold tier can't be read ({name}): {error}")))
            }
        }
    }
}

/// Objects looked at in one sweep.
const SWEEP_MAX: usize = 100_000;

/// A read may take long: if it is one of the runtime's own threads that waits for it, others take over its work.
fn off_the_runtime<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current() {
        Ok(handle) if handle.runtime_flavor() == RuntimeFlavor::MultiThread => {
            tokio::task::block_in_place(work)
        }
        _ => work(),
    }
}

/// One cold segment's object.
#[derive(Debug)]
struct Object {
    tier: Arc<Tier>,
    id: u64,
    name: String,
}

impl Frames for Object {
    fn read(&self, at: u64, bytes: u32) -> io::Result<Bytes> {
        self.tier.read(&self.name, at, bytes)
    }

    fn cached(&self, number: u64) -> Option<Bytes> {
        self.tier.frames.get(&(self.tier.shard, self.id, number))
    }

    fn keep(&self, number: u64, frame: &Bytes) {
        self.tier.frames.insert((self.tier.shard, self.id, number), frame.clone());
    }
}

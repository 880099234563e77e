//! The store: a data folder with its shards open.
//!
//! - Shard count and engine are those the folder was made with.
//! - All shards are proven and replayed before `open` returns, several at a time.
//!
//! Not here: reading and writing a shard (`reader`, `writer`).

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering, mpsc::sync_channel},
    time::Duration,
};

use fulmar_protocol::{
    id::{AppId, ShardId},
    limit::SHARDS_MAX,
};
use tokio::sync::oneshot;

use crate::{
    cold::{self, ColdOptions},
    commit::Commit,
    engine::{Engine, EngineError, fjall::Fjall, memory::Memory, place, sled::Sled},
    error::{CommitError, OpenError, ReadError},
    files::{
        Files,
        disk::Disk,
        memory::{MemoryDisk, MemoryFiles},
    },
    format::Folder,
    key,
    log::Log,
    maintain::{migrate, upgrade},
    reader::ShardReader,
    row::ConversationClass,
    shard::{Shard, ShardStats, committer::Request, journal, settler::EngineOpener},
    writer::{EmbeddedWriter, ShardWriter, ask},
};

/// The engine's folder in a shard's.
pub(crate) const INDEX: &str = "index";

/// Shards opened at the same time.
const OPEN_AT_ONCE: usize = 4;

/// Which engine keeps the index of the shards. The log, and what is settled of it, are the store's own files with any of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// sled 0.34.7: on disk.
    #[default]
    Sled,
    /// fjall 3: on disk.
    Fjall,
    /// In memory, log and all: gone when the store is dropped, unless it was opened on a [`MemoryDisk`]. The path is not
    /// touched.
    Memory,
}

impl EngineKind {
    /// Every engine there is.
    pub const ALL: [Self; 3] = [Self::Sled, Self::Fjall, Self::Memory];

    /// What it is called in configuration and in a data folder.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sled => "sled",
            Self::Fjall => "fjall",
            Self::Memory => "memory",
        }
    }

    /// The engine of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|engine| engine.name() == name)
    }
}

/// What a commit survives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Power loss: every commit ends in an `fdatasync`.
    #[default]
    Power,
    /// The end of the process, `kill -9` included; not power loss.
    Process,
}

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Shards of a folder that is made now; one that exists keeps its count. 1 to 256.
    pub shards: u16,
    /// The engine.
    pub engine: EngineKind,
    /// What a commit survives.
    pub durability: Durability,
    /// Bytes of recent records (and, a quarter as much, of heads) kept in memory, over all shards.
    pub cache_bytes: u64,
    /// Bytes the engine may cache per shard. sled uses more than it is told: keep it small.
    pub engine_cache_bytes: u64,
    /// Bytes of commits, with their overhead in memory, after which a shard settles them into its tables. Up to three
    /// times as much may be in memory per shard, and has to be replayed after a crash.
    pub settle_bytes: usize,
    /// Commits after which a shard settles.
    pub settle_commits: u64,
    /// Time without a commit after which a shard settles what it has, or up to twice that.
    pub settle_idle: Duration,
    /// Small commits are done on the thread that asks for them, as long as one takes no longer than this as a rule; zero: never. It
    /// saves them two wake-ups of threads, and blocks theirs for so long: for callers that can wait.
    pub commit_here_within: Duration,
    /// Bytes of zeros that are written ahead of the log's end at a time, at most; 0: none. With space that was written before, a commit's
    /// sync need not change what the file system knows of the file. Begins with a sixteenth, for shards hardly used. Only at
    /// [`Durability::Power`].
    pub log_ahead_bytes: u64,
    /// Bytes up to which segments are merged into larger ones.
    pub segment_bytes_max: u64,
    /// Bytes of segments merged per second at most, per shard, while commits go on.
    pub background_bytes_per_second: u64,
    /// Bytes of segments read again per second, per shard, while there is nothing else to do, to find damage early; 0: never.
    pub scrub_bytes_per_second: u64,
    /// Time between two such passes over all segments. The first one begins a minute after the start.
    pub scrub_every: Duration,
    /// Free bytes of the file system below which commits are refused as [`CommitError::Full`].
    pub reserve_bytes: u64,
    /// Where old records go; `None`: they stay. A folder that has records there can be opened without, and then refuses to
    /// read them.
    pub cold: Option<ColdOptions>,
    /// Uses an index that was copied to where it is, which is right only if nothing had the folder open while it was copied.
    /// Otherwise the index of a copied folder is made again from the segments.
    pub trust_copied_index: bool,
    /// Where a store in memory keeps its files; `None`: somewhere of its own.
    pub memory: Option<MemoryDisk>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            shards: 4,
            engine: EngineKind::Sled,
            durability: Durability::Power,
            cache_bytes: 64 << 20,
            engine_cache_bytes: 16 << 20,
            settle_bytes: 16 << 20,
            settle_commits: 16_384,
            settle_idle: Duration::from_secs(60),
            commit_here_within: Duration::ZERO,
            log_ahead_bytes: 0,
            segment_bytes_max: 1 << 30,
            background_bytes_per_second: 64 << 20,
            scrub_bytes_per_second: 4 << 20,
            scrub_every: Duration::from_secs(7 * 24 * 60 * 60),
            reserve_bytes: 64 << 20,
            cold: None,
            trust_copied_index: false,
            memory: None,
        }
    }
}

/// Why a shard could not be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// There is no such shard.
    #[error("there is no shard {shard}, only {shards} of them, counted from 0")]
    NoSuchShard {
        /// The shard that was asked for.
        shard: ShardId,
        /// How many there are.
        shards: u16,
    },
    /// Its writer was handed out already.
    #[error("the writer of shard {0} was taken already")]
    Taken(ShardId),
    /// It could not be acquired.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// An open data folder. Clones are handles to the same one; the folder is free for others when the last of them and all
/// writers and readers are dropped.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shards: Vec<Shard>,
}

impl Store {
    /// Opens the data folder at `path`, or makes it. Blocks until every shard is proven and replayed.
    ///
    /// # Errors
    /// [`OpenError`]; each is a sentence that says what to do.
    pub fn open(path: impl AsRef<Path>, options: &StoreOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        if options.shards == 0 || u64::from(options.shards) > SHARDS_MAX {
            return Err(OpenError::Options("a store has 1 to 256 shards"));
        }
        if options.settle_bytes == 0 || options.settle_commits == 0 {
            return Err(OpenError::Options("settle_bytes and settle_commits are at least 1"));
        }
        match options.engine {
            EngineKind::Memory => {
                if options.cold.is_some() {
                    return Err(OpenError::Options("a store in memory has no cold tier"));
                }
                let shards = shard_ids(options.shards)
                    .map(|id| {
                        let disk = options.memory.as_ref();
                        let files = Arc::new(disk.map_or_else(MemoryFiles::default, |disk| disk.shard(id)));
                        Shard::open(id, files, memory_opener(), None, options, options.shards)
                    })
                    .collect::<Result<_, _>>()?;
                Ok(Self { inner: Arc::new(Inner { shards }) })
            }
            EngineKind::Sled | EngineKind::Fjall => {
                let mut folder = Folder::open(path, options.shards, options.engine)?;
                upgrade::if_needed(&mut folder, &mut |_| {})?;
                let folder = Arc::new(folder);
                let mut options = options.clone();
                if let Some(cold) = &mut options.cold {
                    let name = cold::identity::of(path).map_err(|source| OpenError::Io {
                        doing: "can't name the cold tier in",
                        path: path.to_owned(),
                        source,
                    })?;
                    cold.connect(name)?;
                }
                let shards = open_shards(&folder, &options)?;
                folder.sync()?;
                Ok(Self { inner: Arc::new(Inner { shards }) })
            }
        }
    }

    /// How many shards there are.
    #[must_use]
    pub fn shards(&self) -> u16 {
        u16::try_from(self.inner.shards.len()).unwrap_or(u16::MAX)
    }

    /// The shard where the user called `name` lives.
    #[must_use]
    pub fn shard_of_user(&self, app: AppId, name: &str) -> ShardId {
        ShardId::of_name(app, key::KIND_USER, name.as_bytes(), self.shards())
    }

    /// The shard where the conversation called `name` lives.
    #[must_use]
    pub fn shard_of_conversation(&self, app: AppId, class: ConversationClass, name: &str) -> ShardId {
        ShardId::of_name(app, key::kind_of(class), name.as_bytes(), self.shards())
    }

    /// Takes a shard's writer, once, and a reader. Waits for one commit (the epoch record).
    ///
    /// # Errors
    /// [`ShardError`].
    pub fn shard(&self, shard: ShardId) -> Result<(ShardWriter, ShardReader), ShardError> {
        let reader = self.reader(shard)?;
        let found = self.get(shard)?;
        if found.taken.swap(true, Ordering::AcqRel) {
            return Err(ShardError::Taken(shard));
        }
        let (reply, answer) = sync_channel(1);
        let reply = Box::new(move |result| {
            let _ = reply.send(result);
        });
        ask(&found.requests, Request::Acquire(reply))?;
        let (epoch, last) = answer.recv().map_err(|_| thread_gone())??;
        let writer = found.writer(epoch, last);
        Ok((ShardWriter { writer, reader: reader.clone() }, reader))
    }

    /// A reader of a shard; as many as wanted.
    ///
    /// # Errors
    /// [`ShardError::NoSuchShard`].
    pub fn reader(&self, shard: ShardId) -> Result<ShardReader, ShardError> {
        Ok(ShardReader { shared: Arc::clone(&self.get(shard)?.shared) })
    }

    /// Writes a row beside the log of a shard and waits for a barrier: proves that the shard can still commit.
    ///
    /// # Errors
    /// As a commit.
    pub async fn canary_write(&self, shard: ShardId) -> Result<(), ShardError> {
        let (reply, answer) = oneshot::channel();
        ask(&self.get(shard)?.requests, Request::Canary(reply))?;
        Ok(answer.await.unwrap_or_else(|_| Err(thread_gone()))?)
    }

    /// Figures of a shard.
    ///
    /// # Errors
    /// [`ShardError::NoSuchShard`].
    pub fn stats(&self, shard: ShardId) -> Result<ShardStats, ShardError> {
        Ok(self.get(shard)?.stats())
    }

    /// Settles all shards into their tables and stops their threads; commits are refused from then on. Blocks. Not
    /// needed for safety: a store that was only dropped, or killed, replays its log when it is opened again.
    ///
    /// # Errors
    /// The first shard's that could not settle; what it had committed is in its log all the same.
    pub fn close(&self) -> Result<(), CommitError> {
        let mut result = Ok(());
        let mut answers = Vec::new();
        for shard in &self.inner.shards {
            let (reply, answer) = sync_channel(1);
            // A thread that is gone was closed before, or failed and said so.
            if shard.requests.send(Request::Close(reply)).is_ok() {
                answers.push(answer);
            }
        }
        for answer in answers {
            let settled = answer.recv().unwrap_or_else(|_| Err(thread_gone()));
            result = result.and(settled);
        }
        for shard in &self.inner.shards {
            shard.join();
        }
        result
    }

    fn get(&self, shard: ShardId) -> Result<&Shard, ShardError> {
        let found = self.inner.shards.get(usize::from(shard.get()));
        found.ok_or_else(|| ShardError::NoSuchShard { shard, shards: self.shards() })
    }
}

impl Log for Store {
    type Writer = EmbeddedWriter;

    async fn acquire(&self, shard: ShardId) -> Result<EmbeddedWriter, CommitError> {
        let found = self.get(shard).map_err(|error| CommitError::Invalid(error.to_string()))?;
        let (reply, answer) = oneshot::channel();
        let reply = Box::new(move |result| {
            let _ = reply.send(result);
        });
        ask(&found.requests, Request::Acquire(reply))?;
        let (epoch, last) = answer.await.unwrap_or_else(|_| Err(thread_gone()))?;
        Ok(found.writer(epoch, last))
    }

    async fn read(&self, shard: ShardId, from: u64, limit: usize) -> Result<Vec<Commit>, ReadError> {
        let reason = |error: &dyn std::fmt::Display| ReadError::Engine { shard, reason: error.to_string() };
        let files = Arc::clone(&self.get(shard).map_err(|error| reason(&error))?.shared.files);
        journal::read_some(files.as_ref(), from, limit).map_err(|error| reason(&error))
    }
}

fn thread_gone() -> CommitError {
    CommitError::Unavailable { reason: "the shard's thread is gone".to_owned() }
}

fn shard_ids(shards: u16) -> impl Iterator<Item = ShardId> {
    (0..shards).filter_map(ShardId::new)
}

fn open_shards(folder: &Arc<Folder>, options: &StoreOptions) -> Result<Vec<Shard>, OpenError> {
    let shards = folder.marker.shards;
    let ids: Vec<ShardId> = shard_ids(shards).collect();
    let mut opened = Vec::with_capacity(ids.len());
    for group in ids.chunks(OPEN_AT_ONCE) {
        let results: Vec<Result<Shard, OpenError>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                group.iter().map(|id| (*id, scope.spawn(|| open_shard(*id, folder, options)))).collect();
            threads
                .into_iter()
                .map(|(shard, thread)| {
                    thread.join().unwrap_or_else(|_| {
                        let reason = "the engine panicked while it opened".to_owned();
                        Err(OpenError::Engine { shard, reason })
                    })
                })
                .collect()
        });
        for result in results {
            opened.push(result?);
        }
    }
    Ok(opened)
}

fn open_shard(id: ShardId, folder: &Arc<Folder>, options: &StoreOptions) -> Result<Shard, OpenError> {
    let at = folder.shard(id)?;
    let index = at.join(INDEX);
    let io = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Io { doing, path, source }
    };
    migrate::put_in_place(&at, options.engine).map_err(io("can't replace the index in", &at))?;
    let copied = was_copied(&index, options).map_err(io("can't read", &index))?;
    let files: Arc<dyn Files> = Arc::new(Disk::new(&at));
    let opener = engine_opener(&at, options);
    let opened = Shard::open(id, files, opener, Some(Arc::clone(folder)), options, folder.marker.shards);
    match opened {
        Err(source @ (OpenError::Settled { .. } | OpenError::Damaged { .. })) if copied => {
            // The next attempt is to say so as well.
            if let Err(error) = place::forget(&index) {
                tracing::warn!(shard = %id, %error, "the note of an index' place can't be removed");
            }
            Err(OpenError::Copied { source: Box::new(source) })
        }
        other => other,
    }
}

/// Whether there is an index that was copied to where it is, and is not to be trusted.
fn was_copied(index: &Path, options: &StoreOptions) -> std::io::Result<bool> {
    Ok(!options.trust_copied_index && index.try_exists()? && !place::is_here(index)?)
}

/// Opens the engine in a shard's folder.
pub(crate) fn engine_opener(shard: &Path, options: &StoreOptions) -> EngineOpener {
    let index = shard.join(INDEX);
    let options = options.clone();
    Box::new(move |anew| {
        let mut anew = anew || !index.try_exists()?;
        if !anew && was_copied(&index, &options)? {
            tracing::info!(index = %index.display(), "the index was copied here and is not used");
            anew = true;
        }
        if anew && index.try_exists()? {
            std::fs::remove_dir_all(&index)?;
        }
        let engine = open_engine(options.engine, &index, options.engine_cache_bytes)?;
        if options.engine != EngineKind::Memory && (anew || !place::is_here(&index)?) {
            place::note(&index)?;
        }
        Ok(engine)
    })
}

/// Opens or makes the database of an engine in the folder `index`.
pub(crate) fn open_engine(
    kind: EngineKind,
    index: &Path,
    cache_bytes: u64,
) -> Result<Arc<dyn Engine>, EngineError> {
    Ok(match kind {
        EngineKind::Sled => Arc::new(Sled::open(index, cache_bytes)?),
        EngineKind::Fjall => Arc::new(Fjall::open(index, cache_bytes)?),
        EngineKind::Memory => Arc::new(Memory::default()),
    })
}

fn memory_opener() -> EngineOpener {
    let engine = Mutex::new(Arc::new(Memory::default()));
    Box::new(move |anew| {
        let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
        if anew {
            *engine = Arc::default();
        }
        let engine: Arc<dyn Engine> = Arc::<Memory>::clone(&engine);
        Ok(engine)
    })
}

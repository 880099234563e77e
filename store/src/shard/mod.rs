//! One shard: its view, its committer, and what both share.
//!
//! Not here: the public handles (`reader`, `writer`, `store`).

pub(crate) mod block;
pub(crate) mod committer;
pub(crate) mod overlay;
pub(crate) mod recovery;
pub(crate) mod settle;
pub(crate) mod tip;
pub(crate) mod view;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use fulmar_protocol::id::ShardId;

use self::{
    committer::{Committer, Request},
    tip::Tip,
    view::View,
};
use crate::{StoreOptions, commit::CommitId, engine::Engine, error::OpenError, format::Folder};

/// Requests that may wait for a committer: one commit of its writer, and a few canaries.
const REQUESTS_MAX: usize = 16;

/// What readers, writer and committer of a shard share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) id: ShardId,
    pub(crate) view: View,
    pub(crate) counts: Counts,
    /// The last local number handed out.
    pub(crate) users: AtomicU64,
    pub(crate) conversations: AtomicU64,
    /// Keeps the folder locked for as long as anybody can read this shard.
    pub(crate) _folder: Option<Arc<Folder>>,
}

/// What a shard counts.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    commits: AtomicU64,
    bytes: AtomicU64,
    barriers: AtomicU64,
    behind: AtomicU64,
}

impl Counts {
    fn committed(&self, bytes: usize) {
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn barrier(&self) {
        self.barriers.fetch_add(1, Ordering::Relaxed);
    }

    fn behind(&self) {
        self.behind.fetch_add(1, Ordering::Relaxed);
    }
}

/// Figures of one shard since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardStats {
    /// Commits.
    pub commits: u64,
    /// Bytes of their operations.
    pub commit_bytes: u64,
    /// Barriers waited for (each is an `fdatasync` at [`crate::Durability::Power`]).
    pub barriers: u64,
    /// Times a commit was followed by settling everything because settling had fallen behind.
    pub settle_behind: u64,
    /// Commits that are not settled yet.
    pub overlay_commits: u64,
    /// Bytes of memory they take, about.
    pub overlay_bytes: u64,
    /// Bytes of the database on disk.
    pub disk_bytes: u64,
    /// Commits replayed when the shard was opened.
    pub replayed: u64,
}

/// A shard with its thread.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) shared: Arc<Shared>,
    pub(crate) requests: SyncSender<Request>,
    pub(crate) taken: AtomicBool,
    pub(crate) replayed: u64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shard {
    /// Proves and replays the log, then starts the committer.
    pub(crate) fn open(
        id: ShardId,
        engine: Arc<dyn Engine>,
        tip: Option<(Tip, CommitId)>,
        folder: Option<Arc<Folder>>,
        options: &StoreOptions,
        shards: u16,
    ) -> Result<Self, OpenError> {
        let path = folder.as_ref().map(|folder| folder.path.clone());
        let cache_bytes = options.cache_bytes / u64::from(shards.max(1));
        let view = View::new(id, engine, cache_bytes);
        let (tip, acknowledged) = match tip {
            Some((tip, acknowledged)) => (Some(tip), acknowledged),
            None => (None, CommitId::ZERO),
        };
        let recovered = recovery::recover(id, &view, acknowledged, options.settle_bytes)?;
        let counters = view.counters();
        let shared = Arc::new(Shared {
            id,
            view,
            counts: Counts::default(),
            users: AtomicU64::new(counters.users),
            conversations: AtomicU64::new(counters.conversations),
            _folder: folder.clone(),
        });
        let committer = Committer {
            shared: Arc::clone(&shared),
            last: recovered.last,
            settler: recovered.settler,
            tip,
            folder: path.clone(),
            options: options.clone(),
            closed: None,
            until_space_check: 0,
        };
        let (requests, receiver) = sync_channel(REQUESTS_MAX);
        let thread = std::thread::Builder::new()
            .name(format!("store-{id}"))
            .spawn(move || committer.run(&receiver))
            .map_err(|source| OpenError::Io {
                doing: "can't start the thread of a shard in",
                path: path.unwrap_or_default(),
                source,
            })?;
        Ok(Self {
            shared,
            requests,
            taken: AtomicBool::new(false),
            replayed: recovered.replayed,
            thread: Mutex::new(Some(thread)),
        })
    }

    pub(crate) fn stats(&self) -> ShardStats {
        let counts = &self.shared.counts;
        let (overlay_commits, overlay_bytes) = self.shared.view.overlay_size();
        ShardStats {
            commits: counts.commits.load(Ordering::Relaxed),
            commit_bytes: counts.bytes.load(Ordering::Relaxed),
            barriers: counts.barriers.load(Ordering::Relaxed),
            settle_behind: counts.behind.load(Ordering::Relaxed),
            overlay_commits,
            overlay_bytes: overlay_bytes as u64,
            disk_bytes: self.shared.view.engine().size(),
            replayed: self.replayed,
        }
    }

    /// Waits for the committer to be gone, after it was told to close.
    pub(crate) fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(shard = %self.shared.id, "the shard's thread had panicked");
        }
    }

    /// Stops the committer without settling, and waits for it.
    fn stop(&self) {
        // A thread that is gone needs no telling.
        let _ = self.requests.send(Request::Stop);
        self.join();
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.stop();
    }
}

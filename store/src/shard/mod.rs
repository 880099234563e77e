//! One shard: opening it, its threads, and what they share with readers.
//!
//! - `committer` appends to the log (`journal`) and shows commits in the `view`, whose newest layers are an `overlay`.
//! - `settler` turns closed layers into segments, which the `manifest` names, and keeps the engine an `index` of them.
//!
//! Not here: the public handles (`reader`, `writer`, `store`).

mod boot;
pub(crate) mod committer;
pub(crate) mod index;
pub(crate) mod journal;
pub(crate) mod manifest;
pub(crate) mod overlay;
mod scrub;
pub(crate) mod segments;
pub(crate) mod settler;
pub(crate) mod tip;
pub(crate) mod truth;
pub(crate) mod view;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use fulmar_protocol::id::ShardId;

use self::{
    committer::{Committer, Log, Pace, Request},
    index::IndexError,
    journal::Journal,
    segments::Segments,
    settler::{EngineOpener, Settler, Settling},
    tip::Tip,
    view::View,
};
use crate::{
    StoreOptions,
    cold::Tier,
    commit::CommitId,
    error::{CommitError, OpenError},
    files::Files,
    format::Folder,
    writer::EmbeddedWriter,
};

/// Requests that may wait for a committer: one commit of its writer, and a few canaries.
const REQUESTS_MAX: usize = 16;

/// Time between two lines of progress while a shard is opened.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// What readers, writer and the threads of a shard share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) id: ShardId,
    pub(crate) view: View,
    pub(crate) settling: Settling,
    pub(crate) counts: Counts,
    pub(crate) files: Arc<dyn Files>,
    pub(crate) cold: Option<Arc<Tier>>,
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
    commits_here: AtomicU64,
    bytes: AtomicU64,
    syncs: AtomicU64,
    behind: AtomicU64,
    background_syncs: AtomicU64,
    segments: AtomicU64,
    segment_bytes: AtomicU64,
    merges: AtomicU64,
    cold_segments: AtomicU64,
    cold_bytes: AtomicU64,
    scrubs: AtomicU64,
    scrubbed: AtomicU64,
    scrub_damage: AtomicU64,
}

impl Counts {
    fn committed(&self, bytes: usize) {
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn committed_here(&self) {
        self.commits_here.fetch_add(1, Ordering::Relaxed);
    }

    fn sync(&self) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
    }

    fn behind(&self) {
        self.behind.fetch_add(1, Ordering::Relaxed);
    }
}

/// Figures of one shard since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardStats {
    /// Commits.
    pub commits: u64,
    /// Those of them that were done on the thread that asked.
    pub commits_here: u64,
    /// Bytes of their operations.
    pub commit_bytes: u64,
    /// Times the committing thread waited for the disk (`fdatasync`); about one per commit at [`crate::Durability::Power`].
    pub barriers: u64,
    /// Times the settling thread waited for the disk; nobody's acknowledgement waits for those.
    pub background_syncs: u64,
    /// Times commits waited because settling had fallen behind.
    pub settle_behind: u64,
    /// Commits that are not settled yet.
    pub overlay_commits: u64,
    /// Bytes of memory they take, about.
    pub overlay_bytes: u64,
    /// Segments the settled log consists of.
    pub segments: u64,
    /// Bytes of the segments.
    pub segment_bytes: u64,
    /// Merges of segments that were finished.
    pub merges: u64,
    /// Segments among them whose records lie in the cold tier.
    pub cold_segments: u64,
    /// Bytes they have there.
    pub cold_bytes: u64,
    /// Times something was read there for a reader.
    pub cold_reads: u64,
    /// Times the cold tier failed: a read, or an attempt to move something there.
    pub cold_failures: u64,
    /// Times all segments were read again to find damage.
    pub scrubs: u64,
    /// Bytes read for that, about.
    pub scrubbed_bytes: u64,
    /// Places where that found damage.
    pub scrub_damage: u64,
    /// Bytes of the log files: what is not settled yet, and what was settled just now.
    pub log_bytes: u64,
    /// Bytes of the engine's files.
    pub index_bytes: u64,
    /// Bytes on disk: log, segments and index.
    pub disk_bytes: u64,
    /// Commits replayed when the shard was opened.
    pub replayed: u64,
    /// Why nothing can be committed or settled right now, if so.
    pub failing: Option<String>,
}

impl Shared {
    /// Why nothing can be committed or settled right now, if so.
    fn failing(&self) -> Option<CommitError> {
        self.settling.failing()
    }
}

/// A shard with its threads.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) shared: Arc<Shared>,
    pub(crate) requests: SyncSender<Request>,
    pub(crate) committer: Arc<Mutex<Committer>>,
    pub(crate) taken: AtomicBool,
    pub(crate) replayed: u64,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Shard {
    /// Opens what is settled, proves and replays the log, then starts the threads.
    pub(crate) fn open(
        id: ShardId,
        files: Arc<dyn Files>,
        opener: EngineOpener,
        folder: Option<Arc<Folder>>,
        options: &StoreOptions,
        shards: u16,
    ) -> Result<Self, OpenError> {
        let began = Instant::now();
        let cache_bytes = options.cache_bytes / u64::from(shards.max(1));
        let in_log = |doing: &str, error: &dyn std::fmt::Display| OpenError::Log {
            shard: id,
            reason: format!("{doing}: {error}"),
        };
        let segments = Arc::new(Segments::default());
        let cold = options.cold.as_ref().and_then(|cold| cold.tier(id));
        let manifest = Settler::open_files(files.as_ref(), id, &segments, cold.as_ref())?;
        let engine =
            Settler::open_engine(&opener, id, &segments, &manifest).map_err(|error| match error {
                IndexError::Engine(error) => OpenError::Engine { shard: id, reason: error.to_string() },
                IndexError::Segment { .. } | IndexError::Missing(_) => {
                    OpenError::Settled { shard: id, what: error.to_string() }
                }
            })?;
        let (mut tip, acknowledged) =
            Tip::open(files.as_ref()).map_err(|error| in_log("the tip file can't be opened", &error))?;
        let view = View::new(id, engine, segments, cache_bytes);
        view.start_from(manifest.settled, manifest.counters);
        let settled = manifest.settled;
        let shared = Arc::new(Shared {
            id,
            view,
            settling: Settling::default(),
            counts: Counts::default(),
            files: Arc::clone(&files),
            cold,
            users: AtomicU64::new(0),
            conversations: AtomicU64::new(0),
            _folder: folder,
        });
        let mut settler = Settler::new(Arc::clone(&shared), Arc::clone(&files), opener, manifest, options);

        let mut replayed = 0u64;
        let mut told = Instant::now();
        let proven = journal::Reader::new(files.as_ref(), id, acknowledged).read(settled, |commit| {
            shared.view.apply(&commit).map_err(|error| OpenError::Damaged {
                shard: id,
                commit: commit.id.number,
                what: error.to_string(),
            })?;
            replayed += 1;
            if shared.view.active_size().1 >= options.settle_bytes {
                // Replay needs no more memory than running does.
                settler.settle_here().map_err(|error| in_log("settling failed", &error))?;
            }
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                let commit = commit.id.number;
                tracing::info!(shard = %id, commit, acknowledged = acknowledged.number, "replaying the log");
            }
            Ok(())
        })?;
        let last = proven.last;
        if acknowledged.number > last.number || (acknowledged.number == last.number && acknowledged != last) {
            // Before the next log file is begun, after which nothing may be lost any more.
            tip = Tip::begin_again(files.as_ref())
                .map_err(|error| in_log("the tip file can't be made again", &error))?;
        }
        let log = Journal::begin(files.as_ref(), id, options.durability, last, options.log_ahead_bytes)
            .map_err(|error| in_log("a log file can't be begun", &error))?;
        settler.remove_leftovers().map_err(|error| in_log("leftovers can't be removed", &error))?;
        if replayed > 0 {
            tracing::info!(
                shard = %id, replayed, last = last.number, bytes = proven.bytes, took = ?began.elapsed(),
                "replayed the log"
            );
        }
        let counters = shared.view.counters();
        shared.users.store(counters.users, Ordering::Relaxed);
        shared.conversations.store(counters.conversations, Ordering::Relaxed);

        let committer = Committer {
            shared: Arc::clone(&shared),
            files,
            last,
            log: Log::Open(log),
            tip,
            options: options.clone(),
            until_space_check: 0,
            closed: false,
            pace: Pace::default(),
        };
        let committer = Arc::new(Mutex::new(committer));
        let (requests, receiver) = sync_channel(REQUESTS_MAX);
        let shard = Self {
            shared: Arc::clone(&shared),
            requests,
            committer: Arc::clone(&committer),
            taken: AtomicBool::new(false),
            replayed,
            threads: Mutex::default(),
        };
        shard.start("settle", move || settler.run())?;
        if let Err(error) = shard.start("store", move || committer::run(&committer, &shared, &receiver)) {
            // Nobody else tells the settler.
            shard.shared.settling.stop();
            return Err(error);
        }
        Ok(shard)
    }

    /// A writer that has acquired the shard.
    pub(crate) fn writer(&self, epoch: u64, last: CommitId) -> EmbeddedWriter {
        EmbeddedWriter::new(self.requests.clone(), Arc::clone(&self.committer), epoch, last)
    }

    fn start(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), OpenError> {
        let id = self.shared.id;
        let thread =
            std::thread::Builder::new().name(format!("{name}-{id}")).spawn(run).map_err(|error| {
                OpenError::Log { shard: id, reason: format!("a thread can't be started: {error}") }
            })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    pub(crate) fn stats(&self) -> ShardStats {
        let counts = &self.shared.counts;
        let (overlay_commits, overlay_bytes) = self.shared.view.overlay_size();
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let log_bytes = journal::list(self.shared.files.as_ref())
            .map_or(0, |logs| logs.iter().map(|(_, bytes)| bytes).sum());
        let index_bytes = self.shared.view.engine().size();
        let segment_bytes = get(&counts.segment_bytes);
        let (cold_reads, cold_failures) = self.shared.cold.as_ref().map_or((0, 0), |cold| cold.counts());
        ShardStats {
            commits: get(&counts.commits),
            commits_here: get(&counts.commits_here),
            commit_bytes: get(&counts.bytes),
            barriers: get(&counts.syncs),
            background_syncs: get(&counts.background_syncs),
            settle_behind: get(&counts.behind),
            overlay_commits,
            overlay_bytes: overlay_bytes as u64,
            segments: get(&counts.segments),
            segment_bytes,
            merges: get(&counts.merges),
            cold_segments: get(&counts.cold_segments),
            cold_bytes: get(&counts.cold_bytes),
            scrubs: get(&counts.scrubs),
            scrubbed_bytes: get(&counts.scrubbed),
            scrub_damage: get(&counts.scrub_damage),
            cold_reads,
            cold_failures,
            log_bytes,
            index_bytes,
            disk_bytes: log_bytes + segment_bytes + index_bytes,
            replayed: self.replayed,
            failing: self.shared.failing().map(|error| error.to_string()),
        }
    }

    /// Waits for the threads to be gone, after the committer was told to close.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // The committer first: it tells the settler to end.
        for thread in threads.into_iter().rev() {
            if thread.join().is_err() {
                tracing::error!(shard = %self.shared.id, "a thread of the shard had panicked");
                self.shared.settling.stop();
            }
        }
    }

    /// Stops the threads without settling, and waits for them.
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

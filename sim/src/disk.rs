//! The disk under the gateway's log: how long a commit takes, and when it fails.
//!
//! - A commit waits, happens, and waits again before anybody hears of it: a gateway that is killed in the second wait has
//!   stored what nobody was told.
//! - A commit that fails leaves nothing behind.
//! - The commit itself is the store's own, on its own threads; the world's thread does nothing else meanwhile, so the outcome
//!   does not depend on theirs.
//!
//! Not here: what a crash of the machine does to a disk (the store's own rigs).

use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use fulmar_badnet::{Rng, Share};
use fulmar_gateway::conversation::shard::CommitLog;
use fulmar_store::{CommitError, Op, ShardWriter};
use tokio::sync::watch;

use crate::bite::Bite;
use crate::network::Net;

/// What a disk is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskManner {
    /// A commit takes from half of this to all of it.
    pub commit: Duration,
    /// Share of the commits that take [`DiskManner::slow_commit`] more.
    pub slow: Share,
    /// See [`DiskManner::slow`].
    pub slow_commit: Duration,
    /// Share of the commits that fail.
    pub failing: Share,
    /// After a commit, its answer takes up to this long.
    pub answer: Duration,
}

impl Default for DiskManner {
    /// One millisecond, and nothing goes wrong.
    fn default() -> Self {
        Self {
            commit: Duration::from_millis(1),
            slow: Share::NONE,
            slow_commit: Duration::ZERO,
            failing: Share::NONE,
            answer: Duration::ZERO,
        }
    }
}

/// One disk, under all shards of a gateway and over its restarts.
#[derive(Debug)]
pub(crate) struct Disk {
    net: Arc<Net>,
    state: Mutex<(DiskManner, Rng)>,
    /// Commits that happened and were not answered yet.
    unanswered: AtomicUsize,
    /// Nobody hears of a commit.
    mute: watch::Sender<bool>,
}

struct Turn {
    before: Duration,
    fails: bool,
    after: Duration,
}

impl Disk {
    pub(crate) fn new(net: &Arc<Net>, rng: Rng) -> Arc<Self> {
        Arc::new(Self {
            net: Arc::clone(net),
            state: Mutex::new((DiskManner::default(), rng)),
            unanswered: AtomicUsize::new(0),
            mute: watch::Sender::new(false),
        })
    }

    pub(crate) fn set(&self, manner: DiskManner) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = manner;
    }

    /// From now on (`true`) commits happen and nobody hears of them; until the gateway is killed, or this ends.
    pub(crate) fn mute(&self, mute: bool) {
        self.mute.send_replace(mute);
    }

    /// The gateway was killed: whether something was stored that nobody was told.
    pub(crate) fn crashed(&self) {
        self.mute(false);
        if self.unanswered.swap(0, Ordering::Relaxed) > 0 {
            self.net.bite(Bite::CrashedAfterCommit, format_args!("gateway"));
        }
    }

    fn turn(&self) -> Turn {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (manner, rng) = &mut *state;
        let mut before = rng.duration(manner.commit / 2, manner.commit);
        let slow = rng.chance(manner.slow);
        if slow {
            before += manner.slow_commit;
        }
        let fails = rng.chance(manner.failing);
        let after = rng.duration(Duration::ZERO, manner.answer);
        drop(state);
        if slow {
            self.net.bite(Bite::SlowDisk, format_args!("a commit"));
        }
        Turn { before, fails, after }
    }
}

/// A shard's log on the disk.
#[derive(Debug)]
pub(crate) struct OnDisk {
    disk: Arc<Disk>,
    writer: ShardWriter,
    /// The gateway was killed.
    dead: Arc<AtomicBool>,
}

impl OnDisk {
    pub(crate) fn new(disk: &Arc<Disk>, writer: ShardWriter, dead: &Arc<AtomicBool>) -> Self {
        Self { disk: Arc::clone(disk), writer, dead: Arc::clone(dead) }
    }
}

impl CommitLog for OnDisk {
    async fn commit(&mut self, batch: &[Op]) -> Result<(), CommitError> {
        let turn = self.disk.turn();
        tokio::time::sleep(turn.before).await;
        if self.dead.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if turn.fails {
            self.disk.net.bite(Bite::FailingDisk, format_args!("a commit of {}", batch.len()));
            return Err(CommitError::Unavailable { reason: "the disk fails in this world".to_owned() });
        }
        let result = here(self.writer.commit(batch)).map(|_| ());
        self.disk.net.note(format_args!("commit of {}: {}", batch.len(), result.is_ok()));
        let is_mute = *self.disk.mute.borrow();
        if is_mute || !turn.after.is_zero() {
            self.disk.unanswered.fetch_add(1, Ordering::Relaxed);
            if is_mute {
                // The disk is there as long as its logs.
                let _ = self.disk.mute.subscribe().wait_for(|mute| !mute).await;
            }
            tokio::time::sleep(turn.after).await;
            let unanswered = self.disk.unanswered.load(Ordering::Relaxed);
            self.disk.unanswered.store(unanswered.saturating_sub(1), Ordering::Relaxed);
        }
        result
    }
}

/// Waits for `future` on this thread, which does nothing else meanwhile.
pub(crate) fn here<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

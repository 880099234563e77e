//! The committer: a shard's own thread, the only one that writes to its database.
//!
//! - A commit is answered `Ok` after its chunks are behind a barrier, the tip is noted and the view shows it; in that order.
//! - The first failure is final: every later commit is refused until the store is opened again, because an engine that
//!   failed once can't be trusted to have written what came before.
//! - Settling runs in slices after a commit was answered, in proportion to what was committed, and when the shard is idle.
//!
//! Not here: encoding batches (`writer`), proving the log (`recovery`).

use std::{
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Shared, recovery, settle::Settler, tip::Tip};
use crate::{
    StoreOptions,
    commit::{self, CHUNK_BYTES, Commit, CommitId},
    engine::EngineError,
    error::{CommitError, ReadError},
    key::{Key, Table},
    op::Op,
};

/// Bytes settled after a commit, at least; more after larger ones.
const SETTLE_SLICE_BYTES: usize = 8 * 1024;

/// Bytes settled at a time while the shard is idle.
const IDLE_SLICE_BYTES: usize = 256 * 1024;

/// How long the shard must be idle before settling goes on by itself.
const SETTLE_PAUSE: Duration = Duration::from_millis(5);

/// Commits between two looks at the free space.
const SPACE_EVERY: u64 = 32;

/// Key of the canary in [`Table::Shard`].
const CANARY: &[u8] = b"canary";

/// A new writer's epoch, and where the log ends.
pub(crate) type Acquired = Result<(u64, CommitId), CommitError>;

/// What the thread is asked for.
pub(crate) enum Request {
    Commit {
        epoch: u64,
        expected: CommitId,
        ops: u32,
        body: Bytes,
        reply: oneshot::Sender<Result<CommitId, CommitError>>,
    },
    /// Takes the shard over: answers the new epoch and where the log ends.
    Acquire(Box<dyn FnOnce(Acquired) + Send>),
    /// A write and a barrier beside the log.
    Canary(oneshot::Sender<Result<(), CommitError>>),
    /// Stop at once; what is not settled is replayed when the store is opened again.
    Stop,
    /// Settle everything, then stop.
    Close(std::sync::mpsc::SyncSender<Result<(), CommitError>>),
}

/// The thread's state.
pub(crate) struct Committer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) last: CommitId,
    pub(crate) settler: Settler,
    pub(crate) tip: Option<Tip>,
    /// The data folder, to watch the space left; `None`: the engine needs none.
    pub(crate) folder: Option<PathBuf>,
    pub(crate) options: StoreOptions,
    /// Why nothing is committed any more.
    pub(crate) closed: Option<CommitError>,
    pub(crate) until_space_check: u64,
}

impl Committer {
    /// Runs until it is told to close or nobody can ask any more.
    pub(crate) fn run(mut self, requests: &Receiver<Request>) {
        loop {
            let request = if self.closed.is_some() {
                requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else if !self.settler.is_idle() {
                requests.recv_timeout(SETTLE_PAUSE)
            } else if self.shared.view.active_size().0 > 0 {
                requests.recv_timeout(self.options.settle_idle)
            } else {
                requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match request {
                Ok(Request::Commit { epoch, expected, ops, body, reply }) => {
                    let bytes = body.len();
                    let result = self.commit(epoch, expected, ops, body);
                    let committed = result.is_ok();
                    // Nobody waits for it any more: the log has it all the same.
                    let _ = reply.send(result);
                    if committed {
                        self.settle_some(bytes);
                    }
                }
                Ok(Request::Acquire(reply)) => reply(self.acquire()),
                Ok(Request::Canary(reply)) => {
                    let _ = reply.send(self.canary());
                }
                Ok(Request::Close(reply)) => {
                    let _ = reply.send(self.close());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => self.settle_idle(),
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn acquire(&mut self) -> Result<(u64, CommitId), CommitError> {
        let epoch = self.shared.view.counters().epoch.saturating_add(1);
        let mut body = Vec::new();
        Op::Acquire { epoch }.encode(&mut body);
        let last = self.append(1, body.into())?;
        Ok((epoch, last))
    }

    fn commit(
        &mut self,
        epoch: u64,
        expected: CommitId,
        ops: u32,
        body: Bytes,
    ) -> Result<CommitId, CommitError> {
        let newest = self.shared.view.counters().epoch;
        if epoch != newest {
            return Err(CommitError::Fenced { mine: epoch, newest });
        }
        if expected != self.last {
            return Err(CommitError::Conflict { expected, actual: self.last });
        }
        self.append(ops, body)
    }

    fn append(&mut self, ops: u32, body: Bytes) -> Result<CommitId, CommitError> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        if body.len() > crate::op::BATCH_BYTES_MAX {
            return Err(CommitError::Invalid(format!("a commit of {} bytes is too large", body.len())));
        }
        self.check_space()?;
        let previous = self.last;
        let (id, bytes) = commit::encode(previous, ops, &body);
        self.write(id, &bytes).map_err(|error| self.fail(&error))?;
        if let Some(tip) = &self.tip {
            tip.write(id).map_err(|error| self.fail(&error.into()))?;
        }
        self.last = id;
        let length = body.len();
        // The view keeps slices of what was written, so that nothing is copied twice.
        let body = Bytes::from(bytes).slice(commit::HEADER_BYTES..);
        self.shared
            .view
            .apply(&Commit { id, previous: previous.chain, ops, body })
            .map_err(|error| self.fail_reading(&error))?;
        self.shared.counts.committed(length);
        self.on_barrier()?;
        Ok(id)
    }

    fn write(&self, id: CommitId, bytes: &[u8]) -> Result<(), EngineError> {
        let engine = self.shared.view.engine();
        for (n, chunk) in bytes.chunks(CHUNK_BYTES).enumerate() {
            let key = Key::commit(id.number, u16::try_from(n).unwrap_or(u16::MAX));
            engine.insert(Table::Commit, key.as_ref(), chunk)?;
        }
        self.barrier()
    }

    fn barrier(&self) -> Result<(), EngineError> {
        self.shared.counts.barrier();
        self.shared.view.engine().barrier()
    }

    fn on_barrier(&mut self) -> Result<(), CommitError> {
        self.settler.on_barrier(&self.shared.view).map_err(|error| self.fail_reading(&error))
    }

    fn canary(&mut self) -> Result<(), CommitError> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        self.until_space_check = 0;
        self.check_space()?;
        let number = self.last.number.to_be_bytes();
        let written = self.shared.view.engine().insert(Table::Shard, CANARY, &number);
        written.and_then(|()| self.barrier()).map_err(|error| self.fail(&error))?;
        self.on_barrier()
    }

    /// Refuses before the engine could run out of space: an engine that did can't go on.
    fn check_space(&mut self) -> Result<(), CommitError> {
        let Some(folder) = &self.folder else { return Ok(()) };
        if self.until_space_check > 0 {
            self.until_space_check -= 1;
            return Ok(());
        }
        let Ok(space) = rustix::fs::statvfs(folder) else { return Ok(()) };
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        if free < self.options.reserve_bytes {
            let reserve = self.options.reserve_bytes;
            return Err(CommitError::Full {
                reason: format!("{free} bytes are left, {reserve} are kept in reserve"),
            });
        }
        self.until_space_check = SPACE_EVERY;
        Ok(())
    }

    /// After a commit: settle in proportion to it, so that settling keeps up and no commit waits long.
    fn settle_some(&mut self, committed: usize) {
        let (commits, bytes) = self.shared.view.active_size();
        let due = bytes >= self.options.settle_bytes || commits >= self.options.settle_commits;
        if self.settler.is_idle() && due {
            self.settler.begin(&self.shared.view);
        }
        let behind = bytes >= self.options.settle_bytes.saturating_mul(2)
            || commits >= self.options.settle_commits.saturating_mul(2);
        let result = if behind {
            // The layer that grows is at its bound and the other one is not settled yet: that comes first.
            self.shared.counts.behind();
            recovery::settle_all(&self.shared.view, &mut self.settler)
        } else {
            let slice = SETTLE_SLICE_BYTES.max(committed.saturating_mul(2));
            self.settler.step(&self.shared.view, slice).map(|_| ())
        };
        if let Err(error) = result {
            let _ = self.fail_reading(&error);
        }
    }

    fn settle_idle(&mut self) {
        self.settler.begin(&self.shared.view);
        if let Err(error) = self.settler.step(&self.shared.view, IDLE_SLICE_BYTES) {
            let _ = self.fail_reading(&error);
        } else if self.settler.needs_barrier() {
            match self.barrier() {
                Ok(()) => {
                    let _ = self.on_barrier();
                }
                Err(error) => {
                    let _ = self.fail(&error);
                }
            }
        }
    }

    fn close(&mut self) -> Result<(), CommitError> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        recovery::settle_all(&self.shared.view, &mut self.settler)
            .map_err(|error| self.fail_reading(&error))?;
        self.barrier().map_err(|error| self.fail(&error))?;
        self.closed = Some(CommitError::Unavailable { reason: "the store is closed".to_owned() });
        Ok(())
    }

    fn fail(&mut self, error: &EngineError) -> CommitError {
        let closed = match error {
            EngineError::Full => CommitError::Full { reason: error.to_string() },
            EngineError::Failed(reason) => CommitError::Unavailable { reason: reason.clone() },
        };
        self.shut(closed)
    }

    fn fail_reading(&mut self, error: &ReadError) -> CommitError {
        self.shut(CommitError::Unavailable { reason: error.to_string() })
    }

    fn shut(&mut self, closed: CommitError) -> CommitError {
        tracing::error!(shard = %self.shared.id, error = %closed, "the shard takes no more commits");
        self.closed = Some(closed.clone());
        closed
    }
}

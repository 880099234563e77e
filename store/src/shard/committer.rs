//! The committer: what appends to a shard's log. One at a time does, under a lock: the shard's own thread, or the writer's
//! where it stands.
//!
//! - Handing a commit to a thread and the answer back costs two wake-ups, more than a small commit on a quick disk takes. So a
//!   small one is done by the caller ([`Committer::commit_here`]) as long as that is quick ([`Pace`]); a large one, or any on a slow
//!   disk, by the thread, while the caller decides what comes next. Whatever may take long besides is the thread's too: closing a
//!   layer, waiting for the settler, beginning again after a failure.
//! - A commit is answered `Ok` after it is in the log and synced, the tip is noted and the view shows it; in that order.
//! - A commit that is answered with an error is not in the log, and never will be: what a failed file says about it is void.
//!   The file is left alone; before the next one is begun, everything committed so far is settled from memory, so that
//!   nothing depends on the failed one any more. Until that has worked, commits are refused at once.
//! - When the layer that grows has reached its size, it is closed, a new log file is begun, and the settler gets to work.
//!   At twice its size, commits wait for the settler.
//!
//! Not here: encoding batches (`writer`), proving the log (`journal`), what becomes of a closed layer (`settler`).

use std::{
    io,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::{Shared, journal::Journal, settler::Waited, tip::Tip};
use crate::{
    Durability, StoreOptions,
    commit::{self, Commit, CommitId},
    error::CommitError,
    files::Files,
    op::Op,
};

/// Commits between two looks at the free space.
const SPACE_EVERY: u64 = 32;

/// The first pause after the log failed; doubled with each attempt that fails.
pub(crate) const RETRY_FIRST: Duration = Duration::from_millis(50);

/// The longest pause between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Operations up to which a commit may be done by the caller: beyond, deciding meanwhile is worth the wake-ups.
const COMMIT_HERE_OPS_MAX: u32 = 32;

/// The file a canary is written to.
const CANARY: &str = "canary";

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
    /// Something was committed elsewhere: a layer may be due, or has begun, or the log's file needs room.
    Look,
    /// A write and a sync beside the log.
    Canary(oneshot::Sender<Result<(), CommitError>>),
    /// Stop at once; what is not settled is replayed when the store is opened again.
    Stop,
    /// Settle everything, then stop.
    Close(std::sync::mpsc::SyncSender<Result<(), CommitError>>),
}

/// The file that is appended to, or why there is none.
#[derive(Debug)]
pub(crate) enum Log {
    Open(Journal),
    Failed {
        why: CommitError,
        /// When a new file is tried next.
        again: Instant,
        pause: Duration,
    },
}

/// Whether commits have been quick lately.
///
/// One slow commit in five is forgiven: a thread that lost its turn looks like a slow disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pace {
    slow: u8,
}

impl Pace {
    const SLOW_STEP: u8 = 4;
    const SLOW_MAX: u8 = 32;
    const SLOW_FROM: u8 = 8;

    fn note(&mut self, took: Duration, limit: Duration) {
        self.slow = if took <= limit {
            self.slow.saturating_sub(1)
        } else {
            (self.slow + Self::SLOW_STEP).min(Self::SLOW_MAX)
        };
    }

    const fn is_quick(self) -> bool {
        self.slow < Self::SLOW_FROM
    }
}

/// What the thread and the writer share.
#[derive(Debug)]
pub(crate) struct Committer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) files: Arc<dyn Files>,
    pub(crate) last: CommitId,
    pub(crate) log: Log,
    pub(crate) tip: Tip,
    pub(crate) options: StoreOptions,
    pub(crate) until_space_check: u64,
    pub(crate) closed: bool,
    pub(crate) pace: Pace,
}

/// The thread: runs until it is told to close or nobody can ask any more.
pub(crate) fn run(committer: &Mutex<Committer>, shared: &Shared, requests: &Receiver<Request>) {
    /// Ends the settler whatever ends this thread.
    struct Ending<'a>(&'a Shared);
    impl Drop for Ending<'_> {
        fn drop(&mut self) {
            self.0.settling.stop();
        }
    }
    let _ending = Ending(shared);
    // Whoever panicked under the lock left a log nobody knows the state of: the shard is gone.
    let _ = serve(committer, requests);
}

/// What the thread does, until it is told to end. Answers are given without the lock, so that whoever got one can commit at once.
fn serve(committer: &Mutex<Committer>, requests: &Receiver<Request>) -> Result<(), Poisoned> {
    let lock = || committer.lock().map_err(|_| Poisoned);
    loop {
        let (patience, before) = {
            let own = lock()?;
            (own.patience(), own.last)
        };
        let request = match patience {
            Some(patience) => requests.recv_timeout(patience),
            None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match request {
            Ok(Request::Commit { epoch, expected, ops, body, reply }) => {
                let result = lock()?.commit(epoch, expected, ops, body);
                let committed = result.is_ok();
                // Nobody waits for it any more: the log has it all the same.
                let _ = reply.send(result);
                if committed {
                    lock()?.look();
                }
            }
            Ok(Request::Look) => lock()?.look(),
            Ok(Request::Acquire(reply)) => {
                let acquired = lock()?.acquire();
                reply(acquired);
            }
            Ok(Request::Canary(reply)) => {
                let written = lock()?.canary();
                let _ = reply.send(written);
            }
            Ok(Request::Close(reply)) => {
                let closed = lock()?.close();
                let _ = reply.send(closed);
                return Ok(());
            }
            Err(RecvTimeoutError::Timeout) => {
                let mut own = lock()?;
                // The time without requests was a quiet one if nothing was committed elsewhere.
                let quiet = own.last == before;
                own.on_quiet(quiet);
            }
            Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => {
                lock()?.closed = true;
                return Ok(());
            }
        }
    }
}

/// Somebody panicked in the middle of a commit.
struct Poisoned;

impl Committer {
    /// How long the thread waits for a request before it looks after the log by itself.
    fn patience(&self) -> Option<Duration> {
        match &self.log {
            Log::Failed { again, .. } => Some(again.saturating_duration_since(Instant::now())),
            Log::Open(_) if self.shared.view.active_size().0 > 0 => Some(self.options.settle_idle),
            Log::Open(_) => None,
        }
    }

    /// Commits in the caller's thread, if nothing speaks against that being quick; gives whether the thread must look. When it has not looked
    /// since it was asked to make room, it gets the commit as well: a caller that never pauses would keep the lock from it.
    pub(crate) fn commit_here(
        &mut self,
        epoch: u64,
        expected: CommitId,
        ops: u32,
        body: &Bytes,
    ) -> Option<(Result<CommitId, CommitError>, bool)> {
        let (commits, bytes) = self.shared.view.active_size();
        let quick = ops <= COMMIT_HERE_OPS_MAX
            && self.options.commit_here_within > Duration::ZERO
            && self.pace.is_quick()
            && !self.closed
            && matches!(&self.log, Log::Open(journal) if !journal.has_asked_for_room())
            && !self.is_due(commits, bytes);
        if !quick {
            return None;
        }
        let result = self.commit(epoch, expected, ops, body.clone());
        if result.is_ok() {
            self.shared.counts.committed_here();
        }
        let (after, bytes) = self.shared.view.active_size();
        // A layer that is due is closed by the thread, one that has begun wants its attention when all is quiet, and so does a failure.
        // Room ahead is made there, too.
        let look = commits == 0
            || self.is_due(after, bytes)
            || match &mut self.log {
                Log::Open(journal) => journal.ask_for_room(),
                Log::Failed { .. } => true,
            };
        Some((result, look))
    }

    fn acquire(&mut self) -> Result<(u64, CommitId), CommitError> {
        let epoch = self.shared.view.counters().epoch.saturating_add(1);
        let mut body = Vec::new();
        Op::Acquire { epoch }.encode(&mut body);
        let last = self.append(1, &body)?;
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
        self.append(ops, &body)
    }

    fn append(&mut self, ops: u32, body: &[u8]) -> Result<CommitId, CommitError> {
        if body.len() > crate::op::BATCH_BYTES_MAX {
            return Err(CommitError::Invalid(format!("a commit of {} bytes is too large", body.len())));
        }
        self.make_ready()?;
        let previous = self.last;
        let (id, bytes) = commit::encode(previous, ops, body);
        let bytes = Bytes::from(bytes);
        // The view keeps slices of what is written, so that nothing is copied twice.
        let commit = Commit { id, previous: previous.chain, ops, body: bytes.slice(commit::HEADER_BYTES..) };
        // Whatever could fail without the disk fails before anything is written.
        let change = self.shared.view.prepare(&commit)?;
        let began = Instant::now();
        let written = self.write(&bytes);
        self.pace.note(began.elapsed(), self.options.commit_here_within);
        if let Err(error) = written {
            return Err(self.fail(&error));
        }
        if let Err(error) = self.tip.write(id) {
            // It is in the log and durable, and void all the same: a tip that can't be written proves nothing after a kill.
            return Err(self.fail(&error));
        }
        self.last = id;
        self.shared.view.show(change);
        self.shared.counts.committed(body.len());
        Ok(id)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Log::Open(journal) = &mut self.log else {
            return Err(io::Error::other("the log is not open"));
        };
        journal.append(bytes)?;
        if self.options.durability == Durability::Power {
            self.shared.counts.sync();
            journal.sync()?;
        }
        Ok(())
    }

    /// The log failed. What was being written is void.
    fn fail(&mut self, error: &io::Error) -> CommitError {
        let why = refusal("the log could not be written", error);
        tracing::error!(shard = %self.shared.id, %error, "the log failed: commits are refused until it works again");
        self.shared.settling.set_log_failing(Some(why.clone()));
        self.log = Log::Failed { why: why.clone(), again: Instant::now() + RETRY_FIRST, pause: RETRY_FIRST };
        why
    }

    /// Refuses what can't be committed now, before anything is written.
    fn make_ready(&mut self) -> Result<(), CommitError> {
        if self.closed {
            return Err(CommitError::Unavailable { reason: "the store is closed".to_owned() });
        }
        if let Log::Failed { why, again, .. } = &self.log {
            if *again > Instant::now() {
                return Err(why.clone());
            }
            self.begin_again()?;
        }
        self.check_space()?;
        self.wait_for_room()
    }

    /// After a failure: settles everything from memory, then begins a new log file.
    fn begin_again(&mut self) -> Result<(), CommitError> {
        let Log::Failed { pause, .. } = &self.log else { return Ok(()) };
        let pause = (*pause * 2).min(RETRY_MAX);
        let begun = self.settle_all().and_then(|()| {
            // It may name what is void, and must never contradict what will have the same number.
            let tip = Tip::begin_again(self.files.as_ref())
                .map_err(|error| refusal("the tip file can't be made again", &error))?;
            let journal =
                self.begin_file().map_err(|error| refusal("a new log file can't be begun", &error))?;
            Ok((tip, journal))
        });
        match begun {
            Ok((tip, journal)) => {
                self.tip = tip;
                tracing::info!(shard = %self.shared.id, "the log works again");
                self.log = Log::Open(journal);
                self.shared.settling.set_log_failing(None);
                Ok(())
            }
            Err(why) => {
                self.shared.settling.set_log_failing(Some(why.clone()));
                self.log = Log::Failed { why: why.clone(), again: Instant::now() + pause, pause };
                Err(why)
            }
        }
    }

    /// Waits until all that is committed is settled.
    fn settle_all(&self) -> Result<(), CommitError> {
        for _ in 0..2 {
            if let Waited::Failing(why) = self.shared.settling.wait() {
                return Err(why);
            }
            if let Some(layer) = self.shared.view.freeze() {
                self.shared.settling.begin(layer);
            }
        }
        match self.shared.settling.wait() {
            Waited::Settled => Ok(()),
            Waited::Failing(why) => Err(why),
        }
    }

    /// Refuses while there is hardly any space left: what is committed has to be settled as well.
    fn check_space(&mut self) -> Result<(), CommitError> {
        if self.until_space_check > 0 {
            self.until_space_check -= 1;
            return Ok(());
        }
        let Ok(Some(free)) = self.files.free() else { return Ok(()) };
        if free < self.options.reserve_bytes {
            let reserve = self.options.reserve_bytes;
            return Err(CommitError::Full {
                reason: format!("{free} bytes are left, {reserve} are kept in reserve"),
            });
        }
        self.until_space_check = SPACE_EVERY;
        Ok(())
    }

    /// With the growing layer at twice its size, waits until the closed one is settled.
    fn wait_for_room(&mut self) -> Result<(), CommitError> {
        let (commits, bytes) = self.shared.view.active_size();
        let full = bytes >= self.options.settle_bytes.saturating_mul(2)
            || commits >= self.options.settle_commits.saturating_mul(2);
        if !full {
            return Ok(());
        }
        self.shared.counts.behind();
        match self.shared.settling.wait() {
            Waited::Settled => {
                self.close_layer_if_due();
                match &self.log {
                    Log::Open(_) => Ok(()),
                    Log::Failed { why, .. } => Err(why.clone()),
                }
            }
            Waited::Failing(why) => Err(why),
        }
    }

    /// Begins the file for what is committed next.
    fn begin_file(&self) -> io::Result<Journal> {
        let StoreOptions { durability, log_ahead_bytes, .. } = self.options;
        Journal::begin(self.files.as_ref(), self.shared.id, durability, self.last, log_ahead_bytes)
    }

    /// What the thread does after commits, while nobody waits.
    fn look(&mut self) {
        self.close_layer_if_due();
        self.make_room_if_due();
    }

    /// Makes room ahead in the log's file when there is little left. The lock is held meanwhile, for a write and a sync of one step: a
    /// commit beside it would wait just as long, as its sync waits for all that was written to the file.
    fn make_room_if_due(&mut self) {
        let Log::Open(journal) = &mut self.log else { return };
        journal.looked_for_room();
        if self.closed || !journal.needs_room() {
            return;
        }
        self.shared.counts.sync();
        let Err(error) = journal.make_room() else { return };
        // As after any failure nothing rests on this file any more. Commits wait for that, and are refused only if it does not work.
        self.fail(&error);
        // It says so itself.
        let _ = self.begin_again();
    }

    /// Closes the layer that grows when it is large enough, if the one before is settled.
    fn close_layer_if_due(&mut self) {
        let (commits, bytes) = self.shared.view.active_size();
        if self.is_due(commits, bytes) {
            self.close_layer();
        }
    }

    fn is_due(&self, commits: u64, bytes: usize) -> bool {
        bytes >= self.options.settle_bytes || commits >= self.options.settle_commits
    }

    fn close_layer(&mut self) {
        if !self.shared.settling.is_idle() {
            return;
        }
        let Log::Open(journal) = &mut self.log else { return };
        // The next log file begins where the layer ends, so that this one can go when the layer is settled.
        let begun = match journal.sync() {
            Ok(()) => self.begin_file(),
            Err(error) => Err(error),
        };
        self.shared.counts.sync();
        match begun {
            Ok(journal) => {
                self.log = Log::Open(journal);
                if let Some(layer) = self.shared.view.freeze() {
                    self.shared.settling.begin(layer);
                }
            }
            Err(error) => {
                self.fail(&error);
            }
        }
    }

    /// Nobody has asked for a while.
    fn on_quiet(&mut self, quiet: bool) {
        match &self.log {
            Log::Failed { .. } => {
                // It says so itself.
                let _ = self.begin_again();
            }
            Log::Open(_) if quiet => self.close_layer(),
            Log::Open(_) => {}
        }
    }

    fn canary(&mut self) -> Result<(), CommitError> {
        self.until_space_check = 0;
        self.make_ready()?;
        self.shared.counts.sync();
        write_canary(self.files.as_ref(), self.last)
            .map_err(|error| refusal("a file beside the log could not be written", &error))
    }

    fn close(&mut self) -> Result<(), CommitError> {
        if self.closed {
            return Err(CommitError::Unavailable { reason: "the store is closed".to_owned() });
        }
        self.closed = true;
        let _ = self.shared.settling.wait();
        self.close_layer();
        self.settle_all()
    }
}

/// Writes a small file beside the log and syncs it: whether anything can be written at all.
pub(super) fn write_canary(files: &dyn Files, last: CommitId) -> io::Result<()> {
    let mut file = files.create(CANARY)?;
    file.append(&last.number.to_be_bytes())?;
    file.sync()
}

fn refusal(what: &str, error: &io::Error) -> CommitError {
    let reason = format!("{what}: {error}");
    if error.kind() == io::ErrorKind::StorageFull {
        CommitError::Full { reason }
    } else {
        CommitError::Unavailable { reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_quick_until_more_than_one_commit_in_five_is_slow() {
        let limit = Duration::from_micros(250);
        let (quick, slow) = (limit, limit + Duration::from_nanos(1));
        let after = |times: &[(usize, Duration)]| {
            let mut pace = Pace::default();
            for (count, took) in times {
                for _ in 0..*count {
                    pace.note(*took, limit);
                }
            }
            pace.is_quick()
        };
        for (times, want) in [
            (&[][..], true),
            (&[(1, slow)], true),
            (&[(2, slow)], false),
            (&[(1, slow), (4, quick), (1, slow), (4, quick), (1, slow)], true),
            (&[(1, slow), (1, quick), (2, slow)], false),
            (&[(1_000, slow), (24, quick)], false),
            (&[(1_000, slow), (25, quick)], true),
        ] {
            assert_eq!(after(times), want, "{times:?}");
        }
    }
}

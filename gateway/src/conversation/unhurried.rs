//! Commands that nobody waits for, and that wake no shard: they are taken in before the next one that does, or after [`DELAY`].
//!
//! - Acknowledgements are most of what shards are told, and every one went to two of them: to the conversation's, for receipts, and
//!   to the user's, which keeps the cursor. Waking a sleeping thread costs more than all it does about one.
//! - What was left here before another command was sent is taken in before that one: the order of what a connection asks stays.
//! - At most [`WAITING_MAX`]; beyond it a command goes the way of all others.
//!
//! Not here: what the commands do, and those that somebody waits for (`shard`).

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use super::{Command, home::Home, visits};

/// How long a command may lie here. News of others' receipts are as much later.
const DELAY: Duration = Duration::from_millis(5);

/// Commands that may lie here.
const WAITING_MAX: usize = 4_096;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Unhurried {
    waiting: Mutex<Waiting>,
    /// Something lies here.
    some: AtomicBool,
    /// Somebody is going to wake the shard.
    minded: AtomicBool,
    due: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    commands: Vec<Command>,
    /// How much that is.
    work: usize,
}

impl Unhurried {
    /// Leaves a command here for the shard that lives at `home`; it comes back if there is no room. To be called within a runtime.
    #[must_use]
    pub(super) fn leave(self: &Arc<Self>, command: Command, home: Option<&Arc<Home>>) -> Option<Command> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.commands.len() >= WAITING_MAX {
            return Some(command);
        }
        waiting.work += command.work();
        waiting.commands.push(command);
        self.some.store(true, Ordering::SeqCst);
        drop(waiting);
        if !self.minded.swap(true, Ordering::SeqCst) {
            let minding = Minding { unhurried: Arc::clone(self), home: home.cloned() };
            tokio::spawn(async move {
                tokio::time::sleep(DELAY).await;
                drop(minding);
            });
        }
        None
    }

    /// How much lies here.
    pub(super) fn work(&self) -> usize {
        if !self.some.load(Ordering::Acquire) {
            return 0;
        }
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).work
    }

    /// What lies here, in the order in which it came.
    pub(super) fn take(&self) -> Vec<Command> {
        if !self.some.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.some.store(false, Ordering::SeqCst);
        std::mem::take(&mut *waiting).commands
    }

    /// Waits until something has lain here for [`DELAY`].
    pub(super) async fn due(&self) {
        self.due.notified().await;
    }
}

/// Wakes the shard when it is dropped: after the delay, or with the runtime that was to wait for that.
struct Minding {
    unhurried: Arc<Unhurried>,
    home: Option<Arc<Home>>,
}

impl Drop for Minding {
    fn drop(&mut self) {
        // Whoever leaves something from here on minds it, or it is seen in the next line.
        self.unhurried.minded.store(false, Ordering::SeqCst);
        if self.unhurried.some.load(Ordering::SeqCst) {
            visits::call(self.home.as_ref(), || self.unhurried.due.notify_one());
        }
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{ConversationId, Seq, UserId};
    use futures_util::FutureExt as _;

    use super::*;

    fn received(n: u64) -> Command {
        let entries = vec![(ConversationId::new(256).unwrap(), Seq::new(n).unwrap())];
        Command::Received { user: UserId::new(256).unwrap(), entries }
    }

    fn leave(unhurried: &Arc<Unhurried>, n: u64) {
        assert!(unhurried.leave(received(n), None).is_none());
    }

    fn seqs(commands: &[Command]) -> Vec<u64> {
        let seq = |command: &Command| match command {
            Command::Received { entries, .. } => entries[0].1.get(),
            other => panic!("{other:?}"),
        };
        commands.iter().map(seq).collect()
    }

    fn is_due(unhurried: &Unhurried) -> bool {
        unhurried.due().now_or_never().is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn the_shard_is_woken_once_for_what_lies_here_for_a_while() {
        let unhurried = Arc::<Unhurried>::default();
        for round in 0..3 {
            for n in 1..=3 {
                leave(&unhurried, n);
                tokio::time::advance(Duration::from_millis(1)).await;
                assert!(!is_due(&unhurried), "round {round}");
            }
            tokio::time::sleep(DELAY).await;
            assert!(is_due(&unhurried), "round {round}");
            assert!(!is_due(&unhurried), "once");
            assert_eq!(seqs(&unhurried.take()), [1, 2, 3]);
            assert_eq!(seqs(&unhurried.take()), [0; 0]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_taken_meanwhile_wakes_nobody() {
        let unhurried = Arc::<Unhurried>::default();
        leave(&unhurried, 1);
        assert_eq!(seqs(&unhurried.take()), [1]);
        tokio::time::sleep(2 * DELAY).await;
        assert!(!is_due(&unhurried));
        leave(&unhurried, 2);
        tokio::time::sleep(2 * DELAY).await;
        assert!(is_due(&unhurried), "it is minded again");
    }

    #[tokio::test(start_paused = true)]
    async fn full_gives_back_and_keeps_what_is_there() {
        let unhurried = Arc::<Unhurried>::default();
        let most = WAITING_MAX as u64;
        for n in 1..=most {
            leave(&unhurried, n);
        }
        let back = unhurried.leave(received(9_999), None).unwrap();
        assert_eq!(seqs(&[back]), [9_999]);
        assert_eq!(seqs(&unhurried.take()), (1..=most).collect::<Vec<_>>());
    }

    #[test]
    fn a_runtime_that_ends_leaves_nothing_behind() {
        let unhurried = Arc::<Unhurried>::default();
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let first = runtime();
        first.block_on(async { leave(&unhurried, 1) });
        drop(first);
        assert!(is_due(&unhurried), "it was to wake the shard later, and does it now");
        runtime().block_on(async {
            leave(&unhurried, 2);
            tokio::time::timeout(Duration::from_secs(10), unhurried.due()).await.unwrap();
        });
        assert_eq!(seqs(&unhurried.take()), [1, 2]);
    }

    #[test]
    fn none_is_left_lying_when_many_threads_leave_and_one_takes() {
        const EACH: u64 = 2_000;
        let unhurried = Arc::<Unhurried>::default();
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let unhurried = Arc::clone(&unhurried);
                scope.spawn(move || {
                    runtime().block_on(async {
                        for n in 1..=EACH {
                            leave(&unhurried, n);
                            tokio::time::sleep(Duration::from_micros(n % 3)).await;
                        }
                    });
                });
            }
            runtime().block_on(async {
                let mut taken = 0;
                while taken < 2 * EACH {
                    tokio::time::timeout(Duration::from_secs(30), unhurried.due()).await.expect("woken");
                    taken += unhurried.take().len() as u64;
                }
            });
        });
    }
}

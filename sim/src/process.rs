//! A process of the world: tasks that stand still together and are killed together.
//!
//! - A frozen process is not polled. What wakes its tasks meanwhile is kept, and they go on when it is thawed.
//! - A killed process drops its tasks at once, in the order in which they were spawned, without another poll. What is
//!   spawned into it afterwards is dropped unseen.
//!
//! Not here: what stands still beside the tasks, such as clocks (`phone`).

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;

use crate::spent::REST;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;
type Slot = Arc<Mutex<Option<Task>>>;

/// See the module's text. Cheap to clone; all clones are the same process.
#[derive(Clone, Default)]
pub(crate) struct Process {
    state: Arc<Mutex<State>>,
}

/// How often a phone's processes ran, over all of them.
#[derive(Debug, Default)]
pub(crate) struct Cpu {
    /// When a task ran last.
    last: Option<Instant>,
    wakeups: u64,
    polls: u64,
}

impl Cpu {
    /// Wake-ups after a rest of at least [`REST`], and tasks that were run.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.wakeups, self.polls)
    }

    fn runs(&mut self) {
        let now = Instant::now();
        let rested = self.last.replace(now).is_none_or(|last| now.saturating_duration_since(last) >= REST);
        self.wakeups += u64::from(rested);
        self.polls += 1;
    }
}

#[derive(Default)]
struct State {
    /// Where its work is counted, if it is a phone's.
    cpu: Option<Arc<Mutex<Cpu>>>,
    frozen: bool,
    dead: bool,
    next: u64,
    tasks: BTreeMap<u64, Slot>,
    /// Of tasks that wanted to run while the process was frozen.
    held: BTreeMap<u64, Waker>,
}

impl Process {
    /// A process of a phone, whose work is counted there.
    pub(crate) fn on(cpu: &Arc<Mutex<Cpu>>) -> Self {
        Self { state: Arc::new(Mutex::new(State { cpu: Some(Arc::clone(cpu)), ..State::default() })) }
    }

    /// Runs `task` until it ends or the process is killed. Must be called on the world's thread.
    pub(crate) fn spawn(&self, task: Task) {
        let slot: Slot = Arc::new(Mutex::new(Some(task)));
        let id = {
            let mut state = self.lock();
            if state.dead {
                return;
            }
            let id = state.next;
            state.next += 1;
            state.tasks.insert(id, Arc::clone(&slot));
            id
        };
        tokio::spawn(Running { process: self.clone(), id, slot });
    }

    /// Stops polling (`true`), or goes on (`false`).
    pub(crate) fn set_frozen(&self, frozen: bool) {
        let held = {
            let mut state = self.lock();
            state.frozen = frozen;
            if frozen { BTreeMap::new() } else { std::mem::take(&mut state.held) }
        };
        held.into_values().for_each(Waker::wake);
    }

    /// Drops every task.
    pub(crate) fn kill(&self) {
        let (tasks, held) = {
            let mut state = self.lock();
            state.dead = true;
            (std::mem::take(&mut state.tasks), std::mem::take(&mut state.held))
        };
        for slot in tasks.into_values() {
            // A task that kills its own process is dropped when its poll returns.
            let task = match slot.try_lock() {
                Ok(mut slot) => slot.take(),
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().take(),
                Err(TryLockError::WouldBlock) => None,
            };
            drop(task);
        }
        held.into_values().for_each(Waker::wake);
    }

    /// Whether it was killed.
    pub(crate) fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// Whether any task runs in it.
    pub(crate) fn has_tasks(&self) -> bool {
        !self.lock().tasks.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.lock();
        f.debug_struct("Process")
            .field("tasks", &state.tasks.len())
            .field("frozen", &state.frozen)
            .field("dead", &state.dead)
            .finish()
    }
}

struct Running {
    process: Process,
    id: u64,
    slot: Slot,
}

impl Future for Running {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let of_a_phone = {
            let mut state = self.process.lock();
            if state.dead {
                return Poll::Ready(());
            }
            if state.frozen {
                state.held.insert(self.id, cx.waker().clone());
                return Poll::Pending;
            }
            if let Some(cpu) = &state.cpu {
                cpu.lock().unwrap_or_else(PoisonError::into_inner).runs();
            }
            state.cpu.is_some()
        };
        let ended = {
            let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(task) = slot.as_mut() else { return Poll::Ready(()) };
            let polled = if of_a_phone { turn_of_a_phone(task, cx) } else { task.as_mut().poll(cx) };
            if polled.is_pending() && !self.process.is_dead() {
                return Poll::Pending;
            }
            slot.take()
        };
        // Outside of the lock: what a task holds may look at the process again.
        drop(ended);
        self.process.lock().tasks.remove(&self.id);
        Poll::Ready(())
    }
}

/// What a phone's processor does. A function of its own, called nowhere else, so that a profiler can tell it from the gateway's work
/// (`cargo xtask instructions`).
#[inline(never)]
fn turn_of_a_phone(task: &mut Task, cx: &mut Context<'_>) -> Poll<()> {
    let polled = task.as_mut().poll(cx);
    // Not a tail call: this function is left after the work.
    std::hint::black_box(polled)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    struct OnDrop(Arc<AtomicU32>);

    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.fetch_add(1_000, Ordering::Relaxed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn frozen_tasks_stand_still_and_killed_ones_are_gone() {
        let process = Process::default();
        let ticks = Arc::new(AtomicU32::new(0));
        let counted = OnDrop(Arc::clone(&ticks));
        process.spawn(Box::pin(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                counted.0.fetch_add(1, Ordering::Relaxed);
            }
        }));
        let seen = |seconds: u64| {
            let ticks = Arc::clone(&ticks);
            async move {
                tokio::time::sleep(Duration::from_millis(seconds * 1_000 + 100)).await;
                ticks.load(Ordering::Relaxed)
            }
        };
        assert_eq!(seen(3).await, 3);
        process.set_frozen(true);
        assert_eq!(seen(5).await, 3);
        process.set_frozen(false);
        assert!(seen(2).await >= 5);
        let before = ticks.load(Ordering::Relaxed);
        process.kill();
        assert_eq!(ticks.load(Ordering::Relaxed), before + 1_000, "dropped at once");
        assert_eq!(seen(3).await, before + 1_000);
        let unseen = OnDrop(Arc::clone(&ticks));
        process.spawn(Box::pin(async move { drop(unseen) }));
        assert_eq!(ticks.load(Ordering::Relaxed), before + 2_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_may_kill_its_own_process() {
        let process = Process::default();
        let own = process.clone();
        let dropped = Arc::new(AtomicU32::new(0));
        let held = OnDrop(Arc::clone(&dropped));
        process.spawn(Box::pin(async move {
            own.kill();
            std::future::pending::<()>().await;
            drop(held);
        }));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(dropped.load(Ordering::Relaxed), 1_000);
    }
}

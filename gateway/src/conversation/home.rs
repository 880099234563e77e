//! Where a shard runs: at home, on a thread of its own; or for a moment on the thread of a core that has asked it something.
//!
//! - A shard is one future. Whoever runs it looks at it once; nobody else does meanwhile.
//! - Waking a thread that sleeps takes longer than all a shard does about one message, and the way back to the core is another wake-up. So a
//!   core that has left something with a shard that rests (`visits`) looks at it itself.
//! - What is not done with in some microseconds is done at home: a visited shard says so ([`at_home`]), and is looked at there next.
//! - A visit has an end: so much work ([`WORK_MAX`]), one commit at the most, and one core of the process at a time waits for a disk, so that one
//!   which hangs does not stop them all.
//! - A shard that panics ends at home, wherever it was.
//!
//! Not here: when a core may visit (`visits`), what a shard does at home only (`shard`).

use std::{
    any::Any,
    cell::Cell,
    fmt,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;
use tokio::runtime::Handle;

/// Something has happened since the shard was looked at last.
const CALLED: u8 = 1;
/// Somebody looks at it.
const LOOKED_AT: u8 = 2;
/// It has ended.
const ENDED: u8 = 4;

/// What a visited shard may do altogether: commands, or entries of those that have many, each of which is some reads of rows.
const WORK_MAX: usize = 64;

/// A core waits for a disk.
static AT_THE_DISK: AtomicBool = AtomicBool::new(false);

/// What a visited shard may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visit {
    /// Decide.
    Decide,
    /// Decide, and commit what was decided.
    Commit,
}

/// What is left of a visit.
#[derive(Clone, Copy, Debug)]
struct Visiting {
    may_commit: bool,
    /// It has [`AT_THE_DISK`].
    is_at_the_disk: bool,
    work: usize,
}

thread_local! {
    /// The visit that is made on this thread.
    static VISIT: Cell<Option<Visiting>> = const { Cell::new(None) };
    /// Shards are called without waking their threads.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Sets a flag of this thread until it is dropped.
struct While<T: Copy + 'static>(&'static std::thread::LocalKey<Cell<T>>, T);

impl<T: Copy> While<T> {
    fn set(flag: &'static std::thread::LocalKey<Cell<T>>, value: T) -> Self {
        Self(flag, flag.replace(value))
    }
}

impl<T: Copy> Drop for While<T> {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

/// Whether the shard may do so much where it is, which is taken off what a visit may do altogether.
pub(super) fn has_time_for(work: usize) -> bool {
    let Some(visit) = VISIT.get() else { return true };
    let left = visit.work.checked_sub(work);
    if let Some(work) = left {
        VISIT.set(Some(Visiting { work, ..visit }));
    }
    left.is_some()
}

/// Goes on at home: at once, if that is where the shard is.
pub(super) fn at_home() -> impl Future<Output = ()> {
    at_home_unless(|visit| visit.is_none())
}

/// Goes on if the shard may commit where it is, which a visit lets it once, else at home.
pub(super) fn where_it_may_commit() -> impl Future<Output = ()> {
    at_home_unless(|visit| {
        let Some(visit) = visit else { return true };
        let may = visit.may_commit && !AT_THE_DISK.swap(true, Ordering::Acquire);
        if may {
            VISIT.set(Some(Visiting { may_commit: false, is_at_the_disk: true, ..visit }));
        }
        may
    })
}

fn at_home_unless(fits: fn(Option<Visiting>) -> bool) -> impl Future<Output = ()> {
    poll_fn(move |cx| {
        if fits(VISIT.get()) {
            return Poll::Ready(());
        }
        // Whoever visits sees that there is more to do, and calls home.
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// See the module's text.
pub(super) struct Home {
    state: AtomicU8,
    work: Mutex<Option<Work>>,
    /// What it panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// The shard has nothing to do, and may be visited. Kept by the shard.
    rests: Arc<AtomicBool>,
    thread: AtomicWaker,
    /// Where its timers are.
    runtime: Handle,
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home").field("state", &self.state).field("rests", &self.rests).finish_non_exhaustive()
    }
}

/// What came of looking at a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// It waits.
    Waits,
    /// It was called meanwhile: somebody has to look again.
    Again,
    /// Nobody has called it, or somebody else looks at it and is going to see why it was.
    NotNow,
    Ended,
}

impl Home {
    /// A shard that was not looked at yet. `rests`: see there.
    pub(super) fn new(
        work: impl Future<Output = ()> + Send + 'static,
        rests: Arc<AtomicBool>,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: AtomicU8::new(CALLED),
            work: Mutex::new(Some(Box::pin(work))),
            panic: Mutex::new(None),
            rests,
            thread: AtomicWaker::new(),
            runtime,
        })
    }

    /// Runs the shard until it ends. To be awaited on its own thread, within the runtime.
    ///
    /// # Panics
    /// As the shard does, wherever it was.
    pub(super) async fn live(self: Arc<Self>) {
        poll_fn(|cx| {
            self.thread.register(cx.waker());
            loop {
                match self.look() {
                    Look::Again => {}
                    Look::Waits | Look::NotNow => return Poll::Pending,
                    Look::Ended => return Poll::Ready(()),
                }
            }
        })
        .await;
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Lets `call` call the shard without waking its thread. Gives besides whether it has to be visited for that.
    pub(super) fn call_quietly<T>(&self, call: impl FnOnce() -> T) -> (T, bool) {
        let quiet = While::set(&QUIET, true);
        let result = call();
        drop(quiet);
        (result, self.is_called())
    }

    /// It was called, and nobody looks.
    fn is_called(&self) -> bool {
        self.state.load(Ordering::SeqCst) & (CALLED | LOOKED_AT | ENDED) == CALLED
    }

    /// Looks at the shard on this thread if `visit` says so and it rests; has its own thread look if there is something left to do.
    /// Gives whether it was looked at here.
    pub(super) fn visit(self: &Arc<Self>, visit: Option<Visit>) -> bool {
        let Some(visit) = visit.filter(|_| self.rests.load(Ordering::Relaxed)) else {
            if self.is_called() {
                self.thread.wake();
            }
            return false;
        };
        let runtime = self.runtime.enter();
        let visit = Visiting { may_commit: visit == Visit::Commit, is_at_the_disk: false, work: WORK_MAX };
        let visiting = While::set(&VISIT, Some(visit));
        let look = self.look();
        if VISIT.get().is_some_and(|visit| visit.is_at_the_disk) {
            AT_THE_DISK.store(false, Ordering::Release);
        }
        drop(visiting);
        drop(runtime);
        if matches!(look, Look::Again | Look::Ended) {
            self.thread.wake();
        }
        look != Look::NotNow
    }

    fn look(self: &Arc<Self>) -> Look {
        let claim = |state: u8| (state & (CALLED | LOOKED_AT | ENDED) == CALLED).then_some(LOOKED_AT);
        if let Err(state) = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim) {
            return if state & ENDED != 0 { Look::Ended } else { Look::NotNow };
        }
        let mut work = self.work();
        let Some(shard) = work.as_mut() else { return Look::Ended };
        let waker = Waker::from(Arc::clone(self));
        let looked = catch_unwind(AssertUnwindSafe(|| shard.as_mut().poll(&mut Context::from_waker(&waker))));
        let ended = !matches!(looked, Ok(Poll::Pending));
        if ended {
            // With all it holds: whoever asks it from now on is told that it is gone.
            *work = None;
        }
        drop(work);
        if let Err(panic) = looked {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        if ended {
            self.state.store(ENDED, Ordering::SeqCst);
            return Look::Ended;
        }
        if self.state.fetch_and(!LOOKED_AT, Ordering::SeqCst) & CALLED == 0 {
            Look::Waits
        } else {
            Look::Again
        }
    }

    fn work(&self) -> MutexGuard<'_, Option<Work>> {
        // A panic of the shard is caught before it gets here.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Home {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Whoever looks at it sees what is left to do when it is done; whoever called it quietly visits it.
        if self.state.fetch_or(CALLED, Ordering::SeqCst) & (CALLED | LOOKED_AT | ENDED) == 0 && !QUIET.get() {
            self.thread.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::atomic::AtomicUsize,
        thread::{self, ThreadId},
        time::Duration,
    };

    use tokio::sync::mpsc;

    use super::*;

    /// Where commits are made depends on other cores of the process, and so on other tests of it.
    static ALONE: Mutex<()> = Mutex::new(());

    fn alone() -> MutexGuard<'static, ()> {
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    struct Shard {
        home: Arc<Home>,
        rests: Arc<AtomicBool>,
        calls: mpsc::Sender<Call>,
        /// Where each call was carried out.
        done: Arc<Mutex<Vec<(Call, ThreadId)>>>,
        thread: thread::JoinHandle<()>,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Call {
        Brief(usize),
        Long(usize),
        Commit(usize),
        Panic,
    }

    fn shard() -> Shard {
        let (calls, mut queue) = mpsc::channel(16_384);
        let (rests, done) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<_>>>::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let work = {
            let (rests, done) = (Arc::clone(&rests), Arc::clone(&done));
            async move {
                let (alone, mut waiting) = (AtomicUsize::new(0), VecDeque::new());
                loop {
                    rests.store(waiting.is_empty(), Ordering::Relaxed);
                    let Some(call) = queue.recv().await else { break };
                    assert_eq!(alone.fetch_add(1, Ordering::SeqCst), 0, "one at a time");
                    waiting.push_back(call);
                    for call in waiting.drain(..) {
                        match call {
                            Call::Brief(_) => {
                                if !has_time_for(1) {
                                    at_home().await;
                                }
                            }
                            Call::Long(_) => at_home().await,
                            Call::Commit(_) => where_it_may_commit().await,
                            Call::Panic => panic!("as a test wants it"),
                        }
                        done.lock().unwrap().push((call, thread::current().id()));
                    }
                    alone.fetch_sub(1, Ordering::SeqCst);
                }
            }
        };
        let home = Home::new(work, Arc::clone(&rests), runtime.handle().clone());
        let living = Arc::clone(&home).live();
        let thread = thread::spawn(move || runtime.block_on(living));
        let shard = Shard { home, rests, calls, done, thread };
        shard.wait_for_rest();
        shard
    }

    impl Shard {
        #[expect(clippy::disallowed_methods, reason = "another thread is waited for")]
        fn until(&self, mut is: impl FnMut(&Self) -> bool) {
            for _ in 0..20_000 {
                if is(self) {
                    return;
                }
                thread::sleep(Duration::from_micros(500));
            }
            panic!("waited for too long: {:?}", self.home);
        }

        fn wait_for_rest(&self) {
            self.until(|shard| {
                shard.rests.load(Ordering::Relaxed) && shard.home.state.load(Ordering::SeqCst) == 0
            });
        }

        fn call(&self, call: Call) -> bool {
            let (sent, visit) = self.home.call_quietly(|| self.calls.try_send(call));
            sent.unwrap();
            visit
        }

        fn done(&self) -> Vec<(Call, ThreadId)> {
            std::mem::take(&mut *self.done.lock().unwrap())
        }

        fn end(self) -> thread::Result<()> {
            drop(self.calls);
            self.thread.join()
        }
    }

    #[test]
    fn who_visits_does_what_is_brief_and_the_rest_is_done_at_home() {
        use Call::{Brief, Commit, Long};

        let _alone = alone();
        let (shard, here) = (shard(), thread::current().id());
        let home = shard.thread.thread().id();
        for (call, visit, place) in [
            (Brief(1), Some(Visit::Decide), here),
            (Brief(2), None, home),
            (Long(3), Some(Visit::Commit), home),
            (Commit(4), Some(Visit::Decide), home),
            (Commit(5), Some(Visit::Commit), here),
            (Brief(6), Some(Visit::Commit), here),
        ] {
            assert!(shard.call(call), "it is to be visited");
            assert!(shard.done().is_empty(), "nobody was woken");
            assert_eq!(shard.home.visit(visit), visit.is_some());
            shard.until(|shard| !shard.done.lock().unwrap().is_empty());
            assert_eq!(shard.done(), [(call, place)], "{visit:?}");
            shard.wait_for_rest();
        }
        assert!(!shard.home.visit(Some(Visit::Commit)), "nobody has called it");
        shard.calls.try_send(Brief(7)).unwrap();
        shard.until(|shard| !shard.done.lock().unwrap().is_empty());
        assert_eq!(shard.done(), [(Brief(7), home)], "who does not call quietly wakes it");
        shard.rests.store(false, Ordering::Relaxed);
        assert!(shard.call(Brief(8)));
        assert!(!shard.home.visit(Some(Visit::Commit)), "it does not rest");
        shard.until(|shard| !shard.done.lock().unwrap().is_empty());
        assert_eq!(shard.done(), [(Brief(8), home)]);
        shard.end().unwrap();
    }

    #[test]
    fn a_visit_has_one_commit_and_so_much_work() {
        use Call::{Brief, Commit};

        let _alone = alone();
        let (shard, here) = (shard(), thread::current().id());
        let home = shard.thread.thread().id();
        let done = |calls: &[Call]| {
            for call in calls {
                let _ = shard.call(*call);
            }
            assert!(shard.home.visit(Some(Visit::Commit)));
            shard.until(|shard| shard.done.lock().unwrap().len() == calls.len());
            shard.wait_for_rest();
            shard.done().into_iter().map(|(_, place)| place).collect::<Vec<_>>()
        };
        assert_eq!(done(&[Commit(1), Brief(2), Commit(3), Brief(4)]), [here, here, home, home]);
        assert!(!AT_THE_DISK.load(Ordering::SeqCst), "it is left");
        AT_THE_DISK.store(true, Ordering::SeqCst);
        assert_eq!(done(&[Brief(5), Commit(6)]), [here, home], "another core waits for a disk");
        assert!(AT_THE_DISK.swap(false, Ordering::SeqCst), "which is still there");
        assert_eq!(done(&[Commit(7)]), [here]);
        let many: Vec<Call> = (0..=WORK_MAX).map(Brief).collect();
        let places = done(&many);
        assert!(
            places[..WORK_MAX].iter().all(|place| *place == here) && places[WORK_MAX] == home,
            "{places:?}"
        );
        shard.end().unwrap();
    }

    #[test]
    fn a_panic_while_visited_ends_the_shard_and_not_the_visitor() {
        let shard = shard();
        assert!(shard.call(Call::Panic));
        shard.home.visit(Some(Visit::Commit));
        assert!(shard.calls.is_closed(), "who asks it is told that it is gone");
        assert!(shard.end().is_err(), "and its thread ends as it did");
    }

    #[test]
    fn a_panic_at_home_ends_the_shard() {
        let shard = shard();
        shard.calls.try_send(Call::Panic).unwrap();
        shard.until(|shard| shard.calls.is_closed());
        assert!(shard.end().is_err());
    }

    #[test]
    fn no_call_is_lost_whoever_calls_and_visits() {
        const CALLS: usize = 3_000;

        let _alone = alone();
        let shard = shard();
        thread::scope(|scope| {
            for caller in 0..4 {
                let shard = &shard;
                scope.spawn(move || {
                    for n in 0..CALLS {
                        let number = caller * CALLS + n;
                        let call = match n % 7 {
                            0 => Call::Long(number),
                            1 | 2 => Call::Commit(number),
                            _ => Call::Brief(number),
                        };
                        if caller == 3 {
                            shard.calls.try_send(call).unwrap();
                        } else if shard.call(call) {
                            let visits =
                                [None, Some(Visit::Decide), Some(Visit::Commit), Some(Visit::Commit)];
                            shard.home.visit(visits[(n + caller) % 4]);
                        }
                        if n % 64 == 0 {
                            thread::yield_now();
                        }
                    }
                });
            }
        });
        shard.until(|shard| shard.done.lock().unwrap().len() == 4 * CALLS);
        let done = shard.done();
        for caller in 0..4 {
            let number = |call: &Call| match call {
                Call::Brief(n) | Call::Long(n) | Call::Commit(n) => *n,
                Call::Panic => panic!(),
            };
            let of = done.iter().map(|(call, _)| number(call)).filter(|n| n / CALLS == caller);
            assert!(of.eq(caller * CALLS..(caller + 1) * CALLS), "each in its order");
        }
        shard.end().unwrap();
    }
}

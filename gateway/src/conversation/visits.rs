//! What a core leaves with shards, and when it looks at them itself.
//!
//! - Whatever its connections hand over before the core gets to its visits goes into the same commit: a visit is a task like theirs,
//!   so all that were woken together have had their turn by then.
//! - A core that visits serves nobody meanwhile. So it does for a fourth of the time on average ([`Patience`]), and waits for a
//!   disk only where it has to look at one shard: several commit at the same time at home. How long one visit may be, the shard's home says.
//! - A core that has so much to do that its visits come late wakes shards as before for a while ([`BUSY_FOR`]).
//! - Threads that are no core's wake shards as before, and so does everybody once the core has ended.
//!
//! Not here: what a shard does where (`home`, `shard`).

use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::home::{Home, Visit};
use crate::metrics::Metrics;

/// The part of its time a core visits on average: one in so many.
const PART: u32 = 4;

/// What a core that has not visited for long may spend before it has to wait; a visit that was begun is made.
const PATIENCE: Duration = Duration::from_millis(2);

/// A visit that was made so long after a shard was called came late.
const LATE: Duration = Duration::from_millis(1);

/// How long a core that was late with its visits leaves them.
const BUSY_FOR: Duration = Duration::from_millis(20);

thread_local! {
    static HERE: RefCell<Option<Arc<Visits>>> = const { RefCell::new(None) };
}

/// The visits a core has to make.
#[derive(Debug)]
pub(crate) struct Visits {
    due: Mutex<Due>,
    wake: Notify,
    metrics: Metrics,
}

#[derive(Debug)]
struct Due {
    homes: VecDeque<Arc<Home>>,
    /// When the first of them was called.
    since: Instant,
    /// Until then this core has no time for visits.
    busy_until: Instant,
}

impl Visits {
    /// From now on this thread, which is a core's, visits shards. Somebody has to [make](Self::make) the visits on it, until
    /// [`Self::close`].
    pub(crate) fn open(metrics: Metrics) -> Arc<Self> {
        let now = Instant::now();
        let due = Due { homes: VecDeque::new(), since: now, busy_until: now };
        let visits = Arc::new(Self { due: Mutex::new(due), wake: Notify::new(), metrics });
        HERE.set(Some(Arc::clone(&visits)));
        visits
    }

    /// This thread visits nobody any more; the shards it was to visit look themselves.
    pub(crate) fn close() {
        let Some(visits) = HERE.take() else { return };
        for home in visits.due().homes.drain(..) {
            home.visit(None);
        }
    }

    fn due(&self) -> MutexGuard<'_, Due> {
        // Whole after each statement.
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_busy(&self, now: Instant) -> bool {
        now < self.due().busy_until
    }

    /// It was called.
    fn is_to_visit(&self, home: &Arc<Home>, now: Instant) {
        let mut due = self.due();
        if due.homes.is_empty() {
            due.since = now;
            self.wake.notify_one();
        }
        // As many as there are shards at the most.
        if !due.homes.iter().any(|known| Arc::ptr_eq(known, home)) {
            due.homes.push_back(Arc::clone(home));
        }
    }

    /// Makes the visits of this thread, for ever.
    pub(crate) async fn make(&self) {
        let mut patience = Patience::new(Instant::now());
        loop {
            self.wake.notified().await;
            self.make_due(&mut patience);
        }
    }

    fn make_due(&self, patience: &mut Patience) {
        let mut began = Instant::now();
        let count = {
            let mut due = self.due();
            if began.saturating_duration_since(due.since) >= LATE {
                due.busy_until = began + BUSY_FOR;
            }
            due.homes.len()
        };
        let visit = if count > 1 { Visit::Decide } else { Visit::Commit };
        // One by one: what is left when something panics is looked after by `close`.
        for _ in 0..count {
            let Some(home) = self.due().homes.pop_front() else { break };
            let visited = home.visit(patience.is_left(began).then_some(visit));
            let done = Instant::now();
            if visited {
                patience.spend(done - began);
                self.metrics.shard_visits.inc();
            }
            began = done;
        }
    }
}

/// Calls a shard: from a core's thread without waking the shard's, which is visited then.
pub(super) fn call<T>(home: Option<&Arc<Home>>, call: impl FnOnce() -> T) -> T {
    let here = home.and_then(|home| Some((home, HERE.with_borrow(Option::clone)?)));
    let Some((home, visits)) = here else { return call() };
    let now = Instant::now();
    if visits.is_busy(now) {
        return call();
    }
    let (result, visit) = home.call_quietly(call);
    if visit {
        visits.is_to_visit(home, now);
    }
    result
}

/// How long a core may still visit shards.
#[derive(Debug)]
struct Patience {
    /// Visits that may be made at once cost that much; below nothing, none may.
    left: i64,
    counted: Instant,
}

impl Patience {
    fn new(now: Instant) -> Self {
        Self { left: nanos(PATIENCE), counted: now }
    }

    fn is_left(&mut self, now: Instant) -> bool {
        let won = nanos(now.saturating_duration_since(self.counted) / PART);
        self.left = self.left.saturating_add(won).min(nanos(PATIENCE));
        self.counted = now;
        self.left > 0
    }

    fn spend(&mut self, took: Duration) {
        self.left = self.left.saturating_sub(nanos(took));
    }
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    /// A shard that rests on a thread of its own, for somebody else's test.
    pub(crate) struct Resting {
        home: Arc<Home>,
        bell: Arc<Notify>,
        looks: std::sync::mpsc::Receiver<()>,
    }

    impl Resting {
        /// Its thread stays until the process ends.
        pub(crate) fn new() -> Self {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let (look, looks) = std::sync::mpsc::channel();
            let (home, bell) = shard_that(&runtime, move || {
                // Nobody waits for it once the test is over.
                let _ = look.send(());
            });
            let live = Arc::clone(&home).live();
            std::thread::spawn(move || runtime.block_on(live));
            let resting = Self { home, bell, looks };
            // It has come to its first rest when it was looked at once.
            resting.bell()();
            assert!(resting.is_looked_at());
            resting
        }

        /// What calls it, from any thread.
        pub(crate) fn bell(&self) -> impl Fn() + Send + 'static {
            let (home, bell) = (Arc::clone(&self.home), Arc::clone(&self.bell));
            move || call(Some(&home), || bell.notify_one())
        }

        /// Whether it is looked at, now or soon.
        pub(crate) fn is_looked_at(&self) -> bool {
            self.looks.recv_timeout(Duration::from_secs(5)).is_ok()
        }
    }

    /// A shard that does this when it is looked at after it came to rest, and what calls it.
    fn shard_that(
        runtime: &tokio::runtime::Runtime,
        mut look: impl FnMut() + Send + 'static,
    ) -> (Arc<Home>, Arc<Notify>) {
        let (bell, rests) = (Arc::<Notify>::default(), Arc::<AtomicBool>::default());
        let work = {
            let (bell, rests) = (Arc::clone(&bell), Arc::clone(&rests));
            async move {
                rests.store(true, Ordering::Relaxed);
                loop {
                    bell.notified().await;
                    look();
                }
            }
        };
        (Home::new(work, rests, runtime.handle().clone()), bell)
    }

    /// A shard that counts how often it was looked at since it came to rest, and what calls it.
    fn shard(runtime: &tokio::runtime::Runtime) -> (Arc<Home>, Arc<Notify>, Arc<AtomicUsize>) {
        let looks = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&looks);
        let (home, bell) = shard_that(runtime, move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        runtime
            .block_on(async { drop(tokio::time::timeout(Duration::ZERO, Arc::clone(&home).live()).await) });
        (home, bell, looks)
    }

    #[test]
    fn shards_are_visited_together_and_a_core_that_is_late_leaves_it_to_them() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let shards: [_; 3] = std::array::from_fn(|_| shard(&runtime));
        let looks = || shards.each_ref().map(|(_, _, looks)| looks.load(Ordering::Relaxed));
        let ring = |n: usize| call(Some(&shards[n].0), || shards[n].1.notify_one());
        runtime.block_on(async {
            ring(0);
            assert_eq!(looks(), [0; 3], "this is no core: its own thread is woken, which does not run here");
            let metrics = Metrics::default();
            let visits = Visits::open(metrics.clone());
            let mut patience = Patience::new(Instant::now());
            (1..3).for_each(ring);
            ring(1);
            assert_eq!((looks(), visits.due().homes.len()), ([0; 3], 2));
            visits.make_due(&mut patience);
            assert_eq!((looks(), visits.due().homes.len()), ([0, 2, 1], 0), "together");
            ring(1);
            tokio::time::advance(LATE).await;
            visits.make_due(&mut patience);
            assert_eq!(looks(), [0, 3, 1], "late, but made");
            ring(1);
            assert_eq!((looks(), visits.due().homes.len()), ([0, 3, 1], 0), "it is left to its thread");
            tokio::time::advance(BUSY_FOR).await;
            ring(2);
            assert_eq!(visits.due().homes.len(), 1, "visits are made again");
            Visits::close();
            assert_eq!(
                (looks(), visits.due().homes.len()),
                ([0, 3, 1], 0),
                "whoever was to be visited looks itself"
            );
            assert_eq!(metrics.shard_visits.get(), 3);
            ring(2);
            assert!(visits.due().homes.is_empty(), "this is a core no more");
        });
        for n in [1, 2] {
            let (home, _, _) = &shards[n];
            runtime.block_on(async {
                drop(tokio::time::timeout(Duration::ZERO, Arc::clone(home).live()).await)
            });
        }
        assert_eq!(looks(), [0, 4, 3], "nothing is lost");
    }

    #[test]
    fn a_core_visits_for_a_fourth_of_the_time() {
        let us = Duration::from_micros;
        let begin = Instant::now();
        let mut patience = Patience::new(begin);
        let steps = [
            // At, allowed, and took.
            (0, true, 1_900),
            (1_900, true, 500),
            // 400 - 1 900 / 4 were too many.
            (2_400, true, 300),
            (2_700, false, 0),
            (3_000, true, 4_000),
            (7_000, false, 0),
            (18_000, false, 0),
            (18_900, true, 0),
            // However long nobody is visited, no more than that at once.
            (10_000_000, true, 2_001),
            (10_000_002, false, 0),
            (10_000_010, true, 0),
        ];
        for (at, allowed, took) in steps {
            assert_eq!(patience.is_left(begin + us(at)), allowed, "at {at} µs: {patience:?}");
            patience.spend(us(took));
        }
        let (mut now, mut visited) = (begin + Duration::from_secs(20), Duration::ZERO);
        while now < begin + Duration::from_secs(30) {
            if patience.is_left(now) {
                patience.spend(us(300));
                visited += us(300);
                now += us(300);
            }
            now += us(7);
        }
        assert!(
            (Duration::from_millis(2_490)..Duration::from_millis(2_510)).contains(&visited),
            "{visited:?}"
        );
    }
}

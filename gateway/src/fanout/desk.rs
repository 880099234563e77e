//! How a connection is woken by another thread: one crossing per core for many connections.
//!
//! - A core's thread has a [`Desk`]. Whoever wakes a connection of it from another thread leaves the connection's
//!   `Bells` there, and wakes the core when nothing else lay there; the core rings them itself. Waking a thousand
//!   connections of a core costs one wake-up of its thread, not a thousand.
//! - Bells lie on the desk at most once, so a desk is bounded by the connections of its core.
//! - What has time (`Bells::ring_some_time`) is left there without waking anybody: it is rung with the next that wakes the core,
//!   or after a second.
//! - Where there is no desk, and on the core's own thread, bells ring at once.
//!
//! Not here: what there is to write ([`super::owed`]), threads (`cores`).

use std::{
    cell::RefCell,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

/// How long what has time may lie on a desk.
const LOOK_EVERY: Duration = Duration::from_secs(1);

thread_local! {
    static HERE: RefCell<Option<Arc<Desk>>> = const { RefCell::new(None) };
}

/// Where other threads leave word for a core. See the module's text.
#[derive(Debug, Default)]
pub struct Desk {
    lies: Mutex<Lies>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Lies {
    bells: Vec<Arc<Bells>>,
    /// The core knows of something here that has no time.
    woken: bool,
}

impl Desk {
    /// Gives this thread a desk, until [`Self::close`]. Connections that come up on it from now on are woken over it.
    #[must_use]
    pub fn open() -> Arc<Self> {
        let desk = Arc::new(Self::default());
        HERE.set(Some(Arc::clone(&desk)));
        desk
    }

    /// This thread has no desk any more.
    pub fn close() {
        HERE.set(None);
    }

    /// The desk of this thread.
    fn here() -> Option<Arc<Self>> {
        HERE.with_borrow(Option::clone)
    }

    fn is_here(self: &Arc<Self>) -> bool {
        HERE.with_borrow(|here| here.as_ref().is_some_and(|here| Arc::ptr_eq(here, self)))
    }

    fn lies(&self) -> MutexGuard<'_, Lies> {
        // Whole after each statement.
        self.lies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves bells here, or (`None`) has those rung that lie here already.
    fn leave(&self, bells: Option<Arc<Bells>>, hurry: bool) {
        let mut lies = self.lies();
        lies.bells.extend(bells);
        let wake = hurry && !std::mem::replace(&mut lies.woken, true);
        drop(lies);
        if wake {
            self.wake.notify_one();
        }
    }

    /// Rings what is left here, for ever. To be run on the desk's thread.
    pub async fn attend(&self) {
        let mut taken = Vec::new();
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = self.wake.notified() => {}
                _ = look.tick() => {}
            }
            {
                let mut lies = self.lies();
                lies.woken = false;
                std::mem::swap(&mut taken, &mut lies.bells);
            }
            for bells in taken.drain(..) {
                bells.ring_marked();
            }
        }
    }
}

/// Something a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Bell {
    Lanes = 1,
    Backlog = 2,
    Control = 4,
}

/// The mark of bells of which one has no time.
const HURRY: u8 = 8;

/// What wakes one connection.
#[derive(Debug)]
pub(super) struct Bells {
    pub(super) lanes: Notify,
    pub(super) backlog: Notify,
    pub(super) control: Notify,
    /// Those to be rung at the desk; not 0 exactly while these bells lie there.
    marked: AtomicU8,
    desk: Option<Arc<Desk>>,
}

impl Bells {
    /// Of a connection of this thread.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            lanes: Notify::new(),
            backlog: Notify::new(),
            control: Notify::new(),
            marked: AtomicU8::new(0),
            desk: Desk::here(),
        })
    }

    pub(super) fn ring(self: &Arc<Self>, bell: Bell) {
        match &self.desk {
            Some(desk) if !desk.is_here() => {
                let before = self.mark(bell as u8 | HURRY);
                if before & HURRY == 0 {
                    desk.leave((before == 0).then(|| Arc::clone(self)), true);
                }
            }
            _ => self.ring_now(bell as u8),
        }
    }

    /// As [`Self::ring`], but wakes no other thread for it.
    pub(super) fn ring_some_time(self: &Arc<Self>, bell: Bell) {
        match &self.desk {
            Some(desk) if !desk.is_here() => {
                if self.mark(bell as u8) == 0 {
                    self.lie_down(desk);
                }
            }
            _ => self.ring_now(bell as u8),
        }
    }

    /// Marks what is to be rung; gives what was marked before. What was written before this is seen by whoever takes the mark.
    fn mark(&self, bells: u8) -> u8 {
        self.marked.fetch_or(bells, Ordering::SeqCst)
    }

    /// Lies down on the desk, without a hurry.
    fn lie_down(self: &Arc<Self>, desk: &Desk) {
        desk.leave(Some(Arc::clone(self)), false);
        if self.marked.load(Ordering::SeqCst) & HURRY != 0 {
            // Somebody had the core look before these bells lay there.
            desk.leave(None, true);
        }
    }

    fn ring_marked(&self) {
        self.ring_now(self.marked.swap(0, Ordering::SeqCst) & !HURRY);
    }

    fn ring_now(&self, bells: u8) {
        for (bell, notify) in
            [(Bell::Lanes, &self.lanes), (Bell::Backlog, &self.backlog), (Bell::Control, &self.control)]
        {
            if bells & bell as u8 != 0 {
                notify.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn rung(bells: &Bells) -> [bool; 3] {
        [&bells.lanes, &bells.backlog, &bells.control].map(|bell| bell.notified().now_or_never().is_some())
    }

    fn elsewhere(work: impl FnOnce() + Send) {
        std::thread::scope(|scope| scope.spawn(work).join().unwrap());
    }

    #[tokio::test]
    async fn bells_ring_at_once_where_there_is_no_desk() {
        let bells = Bells::new();
        elsewhere(|| bells.ring(Bell::Backlog));
        assert_eq!(rung(&bells), [false, true, false]);
    }

    #[tokio::test]
    async fn other_threads_leave_word_and_the_core_rings() {
        let desk = Desk::open();
        let (one, two) = (Bells::new(), Bells::new());
        one.ring(Bell::Lanes);
        assert_eq!(rung(&one), [true, false, false], "on its own thread at once");
        let attending = tokio::spawn({
            let desk = Arc::clone(&desk);
            async move { desk.attend().await }
        });
        for _ in 0..3 {
            elsewhere(|| {
                one.ring(Bell::Lanes);
                one.ring(Bell::Control);
                one.ring(Bell::Lanes);
                two.ring(Bell::Backlog);
            });
            assert_eq!(desk.lies().bells.len(), 2, "each lies there once");
            assert_eq!((rung(&one), rung(&two)), ([false; 3], [false; 3]));
            tokio::task::yield_now().await;
            assert_eq!((rung(&one), rung(&two)), ([true, false, true], [false, true, false]));
            assert!(desk.lies().bells.is_empty());
        }
        attending.abort();
        Desk::close();
        assert!(Bells::new().desk.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_time_wakes_nobody_and_is_rung_all_the_same() {
        let desk = Desk::open();
        let (one, two) = (Bells::new(), Bells::new());
        let attending = tokio::spawn({
            let desk = Arc::clone(&desk);
            async move { desk.attend().await }
        });
        tokio::time::sleep(LOOK_EVERY / 4).await;
        let settle = tokio::task::yield_now;
        elsewhere(|| one.ring_some_time(Bell::Lanes));
        settle().await;
        assert_eq!((rung(&one), desk.lies().woken), ([false; 3], false), "it lies there");
        // With what another connection has to hear.
        elsewhere(|| two.ring(Bell::Control));
        assert!(desk.lies().woken);
        settle().await;
        assert_eq!((rung(&one), rung(&two)), ([true, false, false], [false, false, true]));
        // With what itself has to hear.
        elsewhere(|| {
            one.ring_some_time(Bell::Lanes);
            one.ring(Bell::Lanes);
            one.ring_some_time(Bell::Backlog);
        });
        assert_eq!(desk.lies().bells.len(), 1, "once");
        assert!(desk.lies().woken);
        settle().await;
        assert_eq!(rung(&one), [true, true, false]);
        // By itself.
        elsewhere(|| one.ring_some_time(Bell::Backlog));
        tokio::time::sleep(LOOK_EVERY).await;
        assert_eq!(rung(&one), [false, true, false]);
        // On its own thread at once.
        one.ring_some_time(Bell::Control);
        assert_eq!(rung(&one), [false, false, true]);
        attending.abort();
        Desk::close();
    }

    #[tokio::test(start_paused = true)]
    async fn who_hurries_is_not_forgotten_between_a_mark_and_the_desk() {
        let desk = Desk::open();
        let bells = Bells::new();
        let attending = tokio::spawn({
            let desk = Arc::clone(&desk);
            async move { desk.attend().await }
        });
        tokio::time::sleep(LOOK_EVERY / 4).await;
        // Somebody with time is not at the desk yet ...
        assert_eq!(bells.mark(Bell::Lanes as u8), 0);
        // ... when somebody without has the core look.
        elsewhere(|| bells.ring(Bell::Control));
        tokio::task::yield_now().await;
        assert_eq!(rung(&bells), [false; 3], "there was nothing");
        bells.lie_down(&desk);
        tokio::task::yield_now().await;
        assert_eq!(rung(&bells), [true, false, true]);
        attending.abort();
        Desk::close();
    }
}

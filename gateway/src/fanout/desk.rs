//! How a connection is woken by another thread: one crossing per core for many connections.
//!
//! - A core's thread has a [`Desk`]. Whoever wakes a connection of it from another thread leaves the connection's
//!   `Bells` there, and wakes the core when nothing else lay there; the core rings them itself. Waking a thousand
//!   connections of a core costs one wake-up of its thread, not a thousand.
//! - Bells lie on the desk at most once, so a desk is bounded by the connections of its core.
//! - Where there is no desk, and on the core's own thread, bells ring at once.
//!
//! Not here: what there is to write ([`super::owed`]), threads (`cores`).

use std::{
    cell::RefCell,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio::sync::Notify;

thread_local! {
    static HERE: RefCell<Option<Arc<Desk>>> = const { RefCell::new(None) };
}

/// Where other threads leave word for a core. See the module's text.
#[derive(Debug, Default)]
pub struct Desk {
    waiting: Mutex<Vec<Arc<Bells>>>,
    wake: Notify,
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

    fn leave(&self, bells: Arc<Bells>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let first = waiting.is_empty();
        waiting.push(bells);
        drop(waiting);
        if first {
            self.wake.notify_one();
        }
    }

    /// Rings what is left here, for ever. To be run on the desk's thread.
    pub async fn attend(&self) {
        let mut taken = Vec::new();
        loop {
            self.wake.notified().await;
            std::mem::swap(&mut taken, &mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
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
                // What was written before is seen by whoever takes the mark.
                if self.marked.fetch_or(bell as u8, Ordering::AcqRel) == 0 {
                    desk.leave(Arc::clone(self));
                }
            }
            _ => self.ring_now(bell as u8),
        }
    }

    fn ring_marked(&self) {
        self.ring_now(self.marked.swap(0, Ordering::AcqRel));
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
            assert_eq!(desk.waiting.lock().unwrap().len(), 2, "each lies there once");
            assert_eq!((rung(&one), rung(&two)), ([false; 3], [false; 3]));
            tokio::task::yield_now().await;
            assert_eq!((rung(&one), rung(&two)), ([true, false, true], [false, true, false]));
            assert!(desk.waiting.lock().unwrap().is_empty());
        }
        attending.abort();
        Desk::close();
        assert!(Bells::new().desk.is_none());
    }
}

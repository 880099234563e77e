//! Loops of one task, each of which is looked at only when it was woken itself.
//!
//! - A connection waits for eight things at once, and as a rule one of them happens. Looking at all of them at each wake-up was a
//!   tenth of what a delivery costs.
//! - A loop that is woken while others run is looked at in the next turn; the order within a turn is that of the list.
//!
//! Not here: what the loops do (`driver`).

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// One of the loops.
pub(super) type Loop<'a, T> = Pin<&'a mut (dyn Future<Output = T> + Send)>;

#[derive(Debug, Default)]
struct Woken {
    /// A bit for each loop.
    loops: AtomicU8,
    task: AtomicWaker,
}

struct OfLoop {
    woken: Arc<Woken>,
    bit: u8,
}

impl Wake for OfLoop {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Whoever is looked at next sees what was written before this.
        if self.woken.loops.fetch_or(self.bit, Ordering::AcqRel) & self.bit == 0 {
            self.woken.task.wake();
        }
    }
}

/// Runs the loops, at most eight, until one of them ends; the others are left where they are.
pub(super) async fn first_end<T, const N: usize>(mut loops: [Loop<'_, T>; N]) -> T {
    const { assert!(N <= 8, "a bit each") };
    let woken = Arc::new(Woken { loops: AtomicU8::new(u8::MAX), task: AtomicWaker::new() });
    let wakers: [Waker; N] = std::array::from_fn(|number| {
        Waker::from(Arc::new(OfLoop { woken: Arc::clone(&woken), bit: 1 << number }))
    });
    poll_fn(|cx| {
        woken.task.register(cx.waker());
        let due = woken.loops.swap(0, Ordering::AcqRel);
        for (number, (future, waker)) in loops.iter_mut().zip(&wakers).enumerate() {
            if due & (1 << number) != 0
                && let Poll::Ready(end) = future.as_mut().poll(&mut Context::from_waker(waker))
            {
                return Poll::Ready(end);
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, sync::atomic::AtomicUsize, time::Duration};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn only_who_was_woken_is_looked_at() {
        let bells: [Notify; 3] = Default::default();
        let looks: [AtomicUsize; 3] = Default::default();
        let looked_at = || looks.each_ref().map(|looks| looks.swap(0, Ordering::Relaxed));
        let work = |number: usize| {
            let (bells, looks) = (&bells, &looks);
            async move {
                loop {
                    let mut waiting = pin!(bells[number].notified());
                    poll_fn(|cx| {
                        looks[number].fetch_add(1, Ordering::Relaxed);
                        waiting.as_mut().poll(cx)
                    })
                    .await;
                    if number == 2 {
                        return "the third has ended";
                    }
                    // The second wakes the first.
                    if number == 1 {
                        bells[0].notify_one();
                    }
                }
            }
        };
        let (first, second, third) = (pin!(work(0)), pin!(work(1)), pin!(work(2)));
        let mut all = pin!(first_end([first as Loop<'_, _>, second, third]));
        let mut turn = async || tokio::time::timeout(Duration::ZERO, all.as_mut()).await.ok();
        assert_eq!((turn().await, looked_at()), (None, [1, 1, 1]), "at the beginning everybody");
        assert_eq!((turn().await, looked_at()), (None, [0, 0, 0]));
        bells[1].notify_one();
        assert_eq!(turn().await, None);
        // Once because it was woken, once more to wait again; and so the one it woke.
        while turn().await.is_none() && looks[0].load(Ordering::Relaxed) < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(looked_at(), [2, 2, 0]);
        bells[2].notify_one();
        assert_eq!((turn().await, looked_at()), (Some("the third has ended"), [0, 0, 1]));
    }

    #[tokio::test]
    async fn wakes_of_other_threads_are_not_lost() {
        let bells: Arc<[Notify; 4]> = Arc::default();
        let rung = Arc::new(AtomicUsize::new(0));
        let work = |number: usize| {
            let (bells, rung) = (Arc::clone(&bells), Arc::clone(&rung));
            async move {
                for _ in 0..500 {
                    bells[number].notified().await;
                    rung.fetch_add(1, Ordering::Relaxed);
                }
                if number < 3 {
                    std::future::pending::<()>().await;
                }
                // The last one of all.
                while rung.load(Ordering::Relaxed) < 2_000 {
                    tokio::task::yield_now().await;
                }
            }
        };
        let ringing: Vec<_> = (0..4)
            .map(|number| {
                let (bells, rung) = (Arc::clone(&bells), Arc::clone(&rung));
                std::thread::spawn(move || {
                    while rung.load(Ordering::Relaxed) < 2_000 {
                        bells[number].notify_one();
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        let (a, b, c, d) = (pin!(work(0)), pin!(work(1)), pin!(work(2)), pin!(work(3)));
        first_end([a as Loop<'_, _>, b, c, d]).await;
        assert_eq!(rung.load(Ordering::Relaxed), 2_000);
        for thread in ringing {
            thread.join().unwrap();
        }
    }
}

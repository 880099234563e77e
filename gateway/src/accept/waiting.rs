//! Attempts that were let in and wait for their handshake to begin, first come, first served.
//!
//! - A handshake's beginning is the most that a single packet can make a core do: some hundred microseconds of signatures and key
//!   exchange, whether it comes by QUIC or in a byte stream. So a core begins one at a time and lets everything else that is due have its turn in between. Ten thousand phones that come
//!   at once take as long as their handshakes take; who is connected already waits for one of them, not for all.
//! - Who waits is counted as a handshake in progress, and so is within the bounds of admission ([`super::admission`]).
//! - Who waited too long has given up or tries again: its handshake would be paid for nothing, and those behind it would be late
//!   as well.
//!
//! - An attempt by QUIC stands in the line itself. One by a byte stream is a task of its own, which asks for its turn ([`Turns`]) once
//!   it knows what the client wants: until then it costs nothing.
//!
//! The time is an argument. Not here: what beginning a handshake means (`endpoint`, `stream`).

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

/// How long an attempt may wait. A client's own patience with an attempt is a few seconds, and it repeats its first packet meanwhile.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    queue: VecDeque<(Instant, T)>,
}

/// Whose turn it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn<T> {
    /// Its handshake is to begin.
    Begin(T),
    /// It waited too long and is to be refused.
    Late(T),
}

impl<T> Waiting<T> {
    /// Nobody waits.
    pub(super) const fn new() -> Self {
        Self { queue: VecDeque::new() }
    }

    /// Takes one in at `now`. Admission has bounded how many there are.
    pub(super) fn push(&mut self, attempt: T, now: Instant) {
        self.queue.push_back((now, attempt));
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The next one, once everything else that was due on this thread has had its turn. May be dropped at any await: nobody is lost.
    pub(super) async fn turn(&mut self, now: impl FnOnce() -> Instant) -> Option<Turn<T>> {
        tokio::task::yield_now().await;
        self.next(now())
    }

    /// The next one.
    pub(super) fn next(&mut self, now: Instant) -> Option<Turn<T>> {
        let (came, attempt) = self.queue.pop_front()?;
        if self.queue.is_empty() {
            // What a storm took is given back.
            self.queue = VecDeque::new();
        }
        let late = now.saturating_duration_since(came) > PATIENCE;
        Some(if late { Turn::Late(attempt) } else { Turn::Begin(attempt) })
    }
}

/// A task that waits for its turn: it has it when this is told, and is refused when this is dropped.
pub(super) type Asked = oneshot::Sender<()>;

/// Where tasks ask for turns in the line of a core.
#[derive(Clone, Debug)]
pub(super) struct Turns(mpsc::Sender<Asked>);

impl Turns {
    /// For `most` tasks that wait at the same time, and what the core takes them in from.
    pub(super) fn new(most: usize) -> (Self, mpsc::Receiver<Asked>) {
        let (turns, asked) = mpsc::channel(most.max(1));
        (Self(turns), asked)
    }

    /// Waits for a turn. `false`: it was refused.
    pub(super) async fn wait(self) -> bool {
        let (asked, turn) = oneshot::channel();
        self.0.send(asked).await.is_ok() && turn.await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[test]
    fn first_come_first_served_and_who_is_late_is_refused() {
        let begin = Instant::now();
        let ms = |ms| begin + Duration::from_millis(ms);
        let mut waiting = Waiting::new();
        assert_eq!(waiting.next(ms(0)), None);
        for (name, at) in [("a", 0), ("b", 10), ("c", 4_000)] {
            waiting.push(name, ms(at));
        }
        assert_eq!(waiting.next(ms(5_000)), Some(Turn::Begin("a")));
        assert_eq!(waiting.next(ms(5_011)), Some(Turn::Late("b")));
        assert_eq!(waiting.next(ms(9_000)), Some(Turn::Begin("c")));
        assert!(waiting.is_empty() && waiting.next(ms(9_000)).is_none());
    }

    #[tokio::test]
    async fn who_is_connected_has_a_turn_between_two_handshakes() {
        const LIVE: usize = 20;
        let turns: Arc<[AtomicUsize; LIVE]> = Arc::new(std::array::from_fn(|_| AtomicUsize::new(0)));
        for live in 0..LIVE {
            let turns = Arc::clone(&turns);
            tokio::spawn(async move {
                loop {
                    turns[live].fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
            });
        }
        let mut waiting = Waiting::new();
        let now = Instant::now();
        (0..1_000).for_each(|n| waiting.push(n, now));
        for n in 0..1_000 {
            assert_eq!(waiting.turn(|| now).await, Some(Turn::Begin(n)));
            let had: Vec<usize> = turns.iter().map(|turns| turns.swap(0, Ordering::Relaxed)).collect();
            assert!(had.iter().all(|had| *had > 0), "before handshake {n}: {had:?}");
        }
    }

    #[tokio::test]
    async fn tasks_have_their_turns_in_the_same_line() {
        let (turns, mut asked) = Turns::new(2);
        let [first, second, third] = [(); 3].map(|()| tokio::spawn(turns.clone().wait()));
        let (mut waiting, now) = (Waiting::new(), Instant::now());
        waiting.push(asked.recv().await.unwrap(), now);
        waiting.push(asked.recv().await.unwrap(), now);
        // Nothing is told to anybody before its turn.
        tokio::task::yield_now().await;
        assert!(!first.is_finished() && !second.is_finished());
        let Some(Turn::Begin(turn)) = waiting.turn(|| now).await else { panic!("the first one is not late") };
        turn.send(()).unwrap();
        assert!(first.await.unwrap());
        assert!(matches!(waiting.next(now + PATIENCE * 2), Some(Turn::Late(_))));
        assert!(!second.await.unwrap(), "who waited too long is refused");
        drop(asked);
        assert!(!third.await.unwrap(), "and so is everybody once nothing is begun any more");
        assert!(!turns.wait().await);
    }
}

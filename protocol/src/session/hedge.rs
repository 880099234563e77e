//! Which small frames leave a second time, in a datagram, because their answer is overdue and QUIC would not notice soon.
//!
//! - QUIC finds a lost packet when a later one is acknowledged. A *lone* packet has none behind it: its loss shows only
//!   after a probe, about 2.8 round trips. So a frame waits for its answer; when nothing else left close behind it and
//!   the answer is overdue ([`Rtt::overdue_after`]), a copy leaves, and once more after the same time again:
//!   [`COPIES_MAX`] in all.
//! - What left close behind (within a quarter of a round trip, or before the answer is overdue) puts the copy off:
//!   QUIC notices by itself, hardly later; the copy is only for the case that it was lost as well.
//! - Copies are paid for: a [`BYTES_SHARE`]th of what was sent, [`BYTES_PER_SECOND`], and a burst of [`BYTES_BURST`].
//!   What can't be paid stays with the transport.
//! - Memory is [`WAITING_MAX`] entries; a newer frame takes the oldest one's place.
//!
//! Both halves use it: for SENDs until their SEND_ACK, for DELIVERs until the device's ACK. Not here: the frames, the
//! datagrams.

use std::collections::VecDeque;

use core::time::Duration;

use super::rtt::Rtt;
use crate::id::ConversationId;

/// Copies of one frame.
pub const COPIES_MAX: u8 = 2;

/// Frames whose answer is waited for.
pub const WAITING_MAX: usize = 8;

/// Of so many bytes sent, one may be a copy's.
pub const BYTES_SHARE: u64 = 16;

/// Bytes of copies per second besides, so that who says little loses little.
pub const BYTES_PER_SECOND: u64 = 64;

/// Bytes of copies at once after a pause.
pub const BYTES_BURST: u64 = 4 * 1024;

/// One frame whose answer is waited for.
#[derive(Debug)]
struct Waiting<N, T> {
    conversation: ConversationId,
    number: N,
    copy: T,
    size: usize,
    left_at: Duration,
    /// Its answer says something about the path.
    timed: bool,
    /// The last thing that left close behind it, or itself.
    followed_at: Duration,
    /// Time the answerer may take on top.
    patience: Duration,
    due: Option<Duration>,
    copies: u8,
    /// When the first of them left.
    copied_at: Option<Duration>,
}

/// How a frame left.
#[derive(Clone, Copy, Debug)]
pub struct Left {
    /// Bytes of the frame.
    pub size: usize,
    /// It may leave again in a datagram; else only its answer is timed.
    pub hedge: bool,
    /// The time to its answer is that of a round trip.
    pub timed: bool,
    /// Time the answerer may take on top of a round trip.
    pub patience: Duration,
}

/// See the module's text. `N` numbers frames within a conversation, `T` is what is needed to send one again.
#[derive(Debug)]
pub struct Hedges<N, T> {
    rtt: Rtt,
    waiting: VecDeque<Waiting<N, T>>,
    /// Bytes that may be spent on copies, times [`BYTES_SHARE`].
    purse: u64,
    purse_at: Duration,
    copies: u64,
}

impl<N: Copy + Ord, T> Hedges<N, T> {
    /// Nothing has left. `seed`: the network's round trip as it was before, if it is known.
    #[must_use]
    pub fn new(seed: Option<Duration>) -> Self {
        Self {
            rtt: Rtt::new(seed),
            waiting: VecDeque::new(),
            purse: BYTES_BURST * BYTES_SHARE,
            purse_at: Duration::ZERO,
            copies: 0,
        }
    }

    /// What is known of the round trip.
    #[must_use]
    pub const fn rtt(&self) -> &Rtt {
        &self.rtt
    }

    /// Something else that was asked got its answer after this time.
    pub fn sample(&mut self, took: Duration) {
        self.rtt.sample(took, None);
    }

    /// The network is another one: what was learned is replaced by what is known of it.
    pub fn reseed(&mut self, seed: Duration) {
        self.rtt = Rtt::new(Some(seed));
    }

    /// Copies that have left, ever.
    #[must_use]
    pub const fn copies(&self) -> u64 {
        self.copies
    }

    /// Whether nothing waits for an answer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// A frame left that is to be answered. Bytes are counted by [`Self::left`].
    pub fn sent(&mut self, conversation: ConversationId, number: N, copy: T, left: Left, now: Duration) {
        self.forget(conversation, number);
        if self.waiting.len() >= WAITING_MAX {
            self.waiting.pop_front();
        }
        let Left { size, hedge, timed, patience } = left;
        let overdue = self.rtt.overdue_after().filter(|_| hedge);
        self.waiting.push_back(Waiting {
            conversation,
            number,
            copy,
            size,
            left_at: now,
            timed,
            followed_at: now,
            patience,
            due: overdue.map(|after| now + after + patience),
            copies: 0,
            copied_at: None,
        });
    }

    /// So many bytes left that the other side's transport acknowledges.
    pub fn left(&mut self, bytes: usize, now: Duration) {
        self.refill(bytes as u64, now);
        if self.waiting.is_empty() {
            return;
        }
        let (Some(smoothed), Some(overdue)) = (self.rtt.smoothed(), self.rtt.overdue_after()) else { return };
        let close = overdue.saturating_sub(smoothed).max(smoothed / 4);
        for waiting in &mut self.waiting {
            let behind = now.saturating_sub(waiting.followed_at);
            if waiting.copies == 0 && waiting.due.is_some() && behind > Duration::ZERO && behind <= close {
                waiting.followed_at = now;
                waiting.due = Some(now + overdue + waiting.patience);
            }
        }
    }

    /// Pays for a copy of so many bytes that leaves for another reason; `false`: it can't be paid.
    pub fn pay(&mut self, bytes: usize, now: Duration) -> bool {
        self.refill(0, now);
        let price = bytes as u64 * BYTES_SHARE;
        let paid = price <= self.purse;
        if paid {
            self.purse -= price;
        }
        paid
    }

    fn refill(&mut self, bytes: u64, now: Duration) {
        let micros = u64::try_from(now.saturating_sub(self.purse_at).as_micros()).unwrap_or(u64::MAX);
        let paused = micros.saturating_mul(BYTES_PER_SECOND * BYTES_SHARE) / 1_000_000;
        if paused > 0 {
            self.purse_at = now;
        }
        self.purse = self.purse.saturating_add(bytes).saturating_add(paused).min(BYTES_BURST * BYTES_SHARE);
    }

    /// This frame was answered.
    pub fn answered(&mut self, conversation: ConversationId, number: N, now: Duration) {
        self.settle(conversation, |waiting| waiting == number, now);
    }

    /// Every frame of the conversation up to this one was answered.
    pub fn answered_up_to(&mut self, conversation: ConversationId, number: N, now: Duration) {
        self.settle(conversation, |waiting| waiting <= number, now);
    }

    fn settle(&mut self, conversation: ConversationId, answered: impl Fn(N) -> bool, now: Duration) {
        let mut newest: Option<(Duration, Duration, Option<Duration>)> = None;
        self.waiting.retain(|waiting| {
            if waiting.conversation != conversation || !answered(waiting.number) {
                return true;
            }
            if waiting.timed {
                newest = Some((waiting.left_at, waiting.patience, waiting.copied_at));
            }
            false
        });
        // Frames that were answered together waited for the last of them. One that is given time on top says nothing.
        if let Some((left_at, Duration::ZERO, copied_at)) = newest {
            let since_copy = copied_at.map(|at| now.saturating_sub(at));
            self.rtt.sample(now.saturating_sub(left_at), since_copy);
        }
    }

    /// The frame is not waited for any more: refused, or it leaves anew.
    pub fn forget(&mut self, conversation: ConversationId, number: N) {
        self.waiting.retain(|waiting| waiting.conversation != conversation || waiting.number != number);
    }

    /// The connection is gone; what is known of the path stays.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }

    /// When [`Self::take_due`] has something.
    #[must_use]
    pub fn next_due(&self) -> Option<Duration> {
        self.waiting.iter().filter_map(|waiting| waiting.due).min()
    }

    /// The next frame of which a copy leaves now: call again until `None`.
    pub fn take_due(&mut self, now: Duration) -> Option<(ConversationId, N, &T)> {
        self.refill(0, now);
        let overdue = self.rtt.overdue_after()?;
        let at = loop {
            let due = |waiting: &Waiting<N, T>| waiting.due.is_some_and(|due| due <= now);
            let (at, waiting) = self.waiting.iter_mut().enumerate().find(|(_, waiting)| due(waiting))?;
            let price = waiting.size as u64 * BYTES_SHARE;
            if price > self.purse {
                waiting.due = None;
                continue;
            }
            self.purse -= price;
            self.copies += 1;
            waiting.copies += 1;
            waiting.copied_at.get_or_insert(now);
            waiting.due = (waiting.copies < COPIES_MAX).then_some(now + overdue);
            break at;
        };
        self.waiting.get(at).map(|waiting| (waiting.conversation, waiting.number, &waiting.copy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn c(n: u64) -> ConversationId {
        ConversationId::new(n).unwrap()
    }

    const SMALL: Left = Left { size: 100, hedge: true, timed: true, patience: Duration::ZERO };

    /// Hedges that know a steady path of 160 ms, so that 170 ms are overdue.
    fn steady() -> Hedges<u64, &'static str> {
        let mut hedges = Hedges::new(Some(ms(160)));
        (0..30).for_each(|_| hedges.sample(ms(160)));
        assert_eq!(hedges.rtt().overdue_after(), Some(ms(170)));
        hedges
    }

    fn due(hedges: &mut Hedges<u64, &'static str>, at: u64) -> Vec<u64> {
        core::iter::from_fn(|| hedges.take_due(ms(at)).map(|(_, number, _)| number)).collect()
    }

    #[test]
    fn a_lone_frame_leaves_twice_more_and_no_more() {
        let mut hedges = steady();
        hedges.sent(c(1), 1, "a", SMALL, ms(1_000));
        hedges.left(100, ms(1_000));
        for (at, next, want) in [
            (1_169, Some(1_170), vec![]),
            (1_170, Some(1_340), vec![1]),
            (1_339, Some(1_340), vec![]),
            (1_340, None, vec![1]),
            (9_000, None, vec![]),
        ] {
            assert_eq!(due(&mut hedges, at), want, "at {at}");
            assert_eq!(hedges.next_due(), next.map(ms), "at {at}");
        }
        assert_eq!((hedges.copies(), hedges.is_empty()), (2, false));
        hedges.answered(c(1), 1, ms(9_000));
        assert!(hedges.is_empty());
    }

    #[test]
    fn what_left_close_behind_puts_the_copy_off() {
        for (then, want) in [(0, 1_170), (10, 1_180), (40, 1_210), (41, 1_170), (90, 1_170)] {
            let mut hedges = steady();
            hedges.sent(c(1), 1, "a", SMALL, ms(1_000));
            hedges.left(100, ms(1_000));
            hedges.left(20, ms(1_000 + then));
            assert_eq!(hedges.next_due(), Some(ms(want)), "something left {then} ms later");
        }
        let mut hedges = steady();
        hedges.sent(c(1), 1, "a", SMALL, ms(1_000));
        (0..100).for_each(|n| hedges.left(20, ms(1_000 + 20 * n)));
        assert_eq!(hedges.next_due(), Some(ms(1_000 + 20 * 99 + 170)), "a busy path never gets there");
    }

    #[test]
    fn answers_end_the_wait_and_are_timed() {
        let mut hedges = steady();
        for number in 1..=3 {
            hedges.sent(c(1), number, "a", SMALL, ms(1_000));
        }
        hedges.sent(c(2), 1, "b", SMALL, ms(1_000));
        hedges.answered(c(1), 2, ms(1_168));
        assert_eq!(hedges.rtt().smoothed(), Some(ms(161)));
        assert_eq!(due(&mut hedges, 1_180), [1, 3, 1]);
        hedges.answered_up_to(c(1), 3, ms(1_340));
        assert_eq!(
            hedges.rtt().smoothed(),
            Some(ms(161)),
            "it was a copy that was answered, a round trip after it left"
        );
        hedges.answered(c(2), 1, ms(1_190));
        assert!(hedges.rtt().smoothed() > Some(ms(161)), "it was not: the path was slow");
        hedges.sent(c(2), 1, "b", SMALL, ms(2_000));
        hedges.forget(c(2), 1);
        assert!(hedges.is_empty());
    }

    #[test]
    fn patience_is_waited_and_says_nothing_about_the_path() {
        let mut hedges = steady();
        let before = *hedges.rtt();
        hedges.sent(c(1), 1, "a", Left { patience: ms(100), ..SMALL }, ms(0));
        hedges.sent(c(1), 2, "a", Left { hedge: false, timed: false, ..SMALL }, ms(0));
        assert_eq!(hedges.next_due(), Some(ms(270)));
        hedges.answered_up_to(c(1), 2, ms(250));
        assert_eq!(*hedges.rtt(), before);
    }

    #[test]
    fn copies_are_paid_for() {
        let mut hedges = steady();
        let mut copies = 0;
        let mut at = 0;
        // Silence, then as fast as it goes: a burst, and then a small part.
        for number in 0..200 {
            hedges.sent(c(number), number, "a", Left { size: 1_000, ..SMALL }, ms(at));
            hedges.left(1_000, ms(at));
            at += 171;
            copies += due(&mut hedges, at).len();
            hedges.forget(c(number), number);
        }
        let share = 200 * 1_000 / BYTES_SHARE + 34 * BYTES_PER_SECOND;
        let most = (BYTES_BURST + share) / 1_000;
        assert!((most - 2..=most).contains(&(copies as u64)), "{copies} of at most {most}");
        assert_eq!(due(&mut hedges, at + 1_000), [0u64; 0]);
    }

    #[test]
    fn memory_is_bounded_and_the_newest_stay() {
        let mut hedges = steady();
        for number in 0..100 {
            hedges.sent(c(1), number, "a", SMALL, ms(0));
        }
        assert_eq!(hedges.waiting.len(), WAITING_MAX);
        assert_eq!(due(&mut hedges, 200), (92..100).collect::<Vec<u64>>());
        hedges.sent(c(1), 99, "b", SMALL, ms(300));
        assert_eq!(hedges.waiting.len(), WAITING_MAX, "a frame is waited for once");
        hedges.clear();
        assert_eq!(hedges.next_due(), None);
    }

    #[test]
    fn nothing_leaves_again_before_the_path_is_known() {
        let mut hedges = Hedges::<u64, ()>::new(None);
        hedges.sent(c(1), 1, (), SMALL, ms(0));
        assert_eq!((hedges.next_due(), hedges.take_due(ms(10_000))), (None, None));
        hedges.answered(c(1), 1, ms(70));
        assert_eq!(hedges.rtt().smoothed(), Some(ms(70)));
        hedges.reseed(ms(300));
        assert_eq!(hedges.rtt().overdue_after(), Some(ms(450)));
    }
}

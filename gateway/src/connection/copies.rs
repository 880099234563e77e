//! Records that may have been lost alone on their way to one client, and when a copy of them is due.
//!
//! - A turn that writes a record or two is watched until the device's ACK covers them, or newer ones take their place:
//!   a bound, a reference to the ring's bytes, and nothing per delivery where many are written
//!   ([`CROWD_MAX`] a round trip): there, QUIC notices a loss by what follows.
//! - An ACK that the client puts off, because it sent one a moment ago, is waited for as much longer; one that it puts off by more than
//!   the transport needs to find a loss is not waited for.
//!
//! Not here: when an answer is overdue and what copies may cost (`fulmar_protocol::session::hedge`).

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{MutexGuard, PoisonError},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use fulmar_protocol::{
    id::{ConversationId, Seq},
    limit::{ACK_DELAY, ACK_DELAY_DENSE, ACK_EVERY, DATAGRAM_BYTES_MAX},
    session::hedge::{Hedges, Left},
};
use tokio::time::{Instant, Sleep};

use super::driver::Connection;

/// Records of one turn that count as lone.
pub(super) const LONE_MAX: usize = 2;

/// Records in one round trip from which on none counts as lone.
const CROWD_MAX: usize = 4;

/// A timer that is of no use is put this far off.
const FAR: Duration = Duration::from_secs(24 * 60 * 60);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Copies {
    hedges: Hedges<Seq, Bytes>,
    /// When the client is thought to send its last ACK, on the clock of writing.
    acks_at: Option<Duration>,
    /// Turns of writing that ACK is for, and their records.
    covers: (u32, u32),
    /// Until then the client may put ACKs off for longer than is thought here: their times are no measure of the path.
    doubtful_until: Duration,
    crowd: usize,
    crowd_since: Duration,
}

impl Copies {
    pub(super) fn new() -> Self {
        Self {
            hedges: Hedges::new(None),
            acks_at: None,
            covers: (0, 0),
            doubtful_until: Duration::ZERO,
            crowd: 0,
            crowd_since: Duration::ZERO,
        }
    }

    /// Whether it has to be told what a round trip takes.
    pub(super) fn wants_rtt(&self) -> bool {
        self.hedges.rtt().smoothed().is_none()
    }

    /// What the transport says a round trip takes.
    pub(super) fn seed(&mut self, rtt: Duration) {
        self.hedges.reseed(rtt);
    }

    /// A turn wrote `records` records of `bytes` bytes; `lone` are those that may leave again, if it was so few.
    pub(super) fn wrote(
        &mut self,
        records: usize,
        bytes: usize,
        lone: &mut Vec<(ConversationId, Seq, Bytes)>,
        now: Duration,
    ) {
        self.hedges.left(bytes, now);
        let window = self.hedges.rtt().smoothed().unwrap_or_default();
        if now.saturating_sub(self.crowd_since) > window {
            (self.crowd, self.crowd_since) = (0, now);
        }
        self.crowd += records;
        let patience = self.patience(records, now);
        if self.covers.0 > 1 {
            self.doubt(now);
        }
        // So long before its ACK, a loss shows sooner by the next packet, or by a probe of the transport's.
        let dense = patience > ACK_DELAY.max(window.saturating_mul(17) / 10);
        if dense || self.crowd > CROWD_MAX || records > LONE_MAX {
            return lone.clear();
        }
        let timed = now >= self.doubtful_until;
        for (conversation, seq, frame) in lone.drain(..) {
            let left = Left { size: frame.len(), hedge: frame.len() <= DATAGRAM_BYTES_MAX, timed, patience };
            self.hedges.sent(conversation, seq, frame, left, now);
        }
    }

    /// Records were written otherwise than by a turn: when they are acknowledged is not followed here.
    pub(super) fn doubt(&mut self, now: Duration) {
        let window = self.hedges.rtt().smoothed().unwrap_or_default();
        self.doubtful_until = now + 2 * ACK_DELAY_DENSE + window;
    }

    /// How long the client may put its ACK of `records` that are written now off, as `docs/wire.md` has it.
    fn patience(&mut self, records: usize, now: Duration) -> Duration {
        let delay = if self.covers.0 > 1 { ACK_DELAY_DENSE } else { ACK_DELAY };
        let mut at = match self.acks_at {
            Some(at) if at >= now => at,
            last => {
                self.covers = (0, 0);
                last.map_or(now, |last| now.max(last + delay))
            }
        };
        let records = u32::try_from(records).unwrap_or(u32::MAX);
        self.covers = (self.covers.0.saturating_add(1), self.covers.1.saturating_add(records));
        if self.covers.1 as usize >= ACK_EVERY {
            at = now;
        }
        self.acks_at = Some(at);
        at.saturating_sub(now)
    }

    /// Something else was written.
    pub(super) fn left(&mut self, bytes: usize, now: Duration) {
        self.hedges.left(bytes, now);
    }

    /// The device has everything up to these.
    pub(super) fn acked(&mut self, entries: &[(ConversationId, Seq)], now: Duration) {
        if self.hedges.is_empty() {
            return;
        }
        for (conversation, seq) in entries {
            self.hedges.answered_up_to(*conversation, *seq, now);
        }
    }
}

/// Wakes the connection when a copy is due.
#[derive(Debug)]
pub(super) struct CopyTimer {
    /// Most connections are quiet: there is none before the first copy may be due.
    sleep: Option<Pin<Box<Sleep>>>,
    armed: Option<Duration>,
}

impl CopyTimer {
    pub(super) fn new() -> Self {
        Self { sleep: None, armed: None }
    }
}

impl Connection {
    pub(super) fn copies(&self) -> MutexGuard<'_, Copies> {
        // Plain data whose invariants hold between any two statements.
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends when a copy is due. It looks anew whenever the connection's task runs: who writes and who takes ACKs in are
    /// parts of it.
    pub(super) async fn copy_due(&self, timer: &mut CopyTimer) {
        poll_fn(|cx| {
            let due = self.copies().hedges.next_due();
            if due != timer.armed {
                timer.armed = due;
                let at = due.map_or_else(|| Instant::now() + FAR, |due| self.at(due));
                match &mut timer.sleep {
                    // Later is cheap: the timer only takes note of it.
                    Some(sleep) => sleep.as_mut().reset(at),
                    None => timer.sleep = Some(Box::pin(tokio::time::sleep_until(at))),
                }
            }
            match &mut timer.sleep {
                Some(sleep) if due.is_some() => sleep.as_mut().poll(cx),
                _ => Poll::Pending,
            }
        })
        .await;
    }

    /// Sends the copies that are due.
    pub(super) fn send_copies(&self) {
        let now = self.now();
        let mut copies = self.copies();
        while let Some((_, _, frame)) = copies.hedges.take_due(now) {
            self.context.metrics.hedged("down");
            self.send_copy(frame.clone());
        }
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

    fn wrote(copies: &mut Copies, seqs: std::ops::Range<u64>, at: u64) {
        let frame = Bytes::from_static(&[0; 40]);
        let mut lone = seqs.clone().map(|seq| (c(1), Seq::new(seq).unwrap(), frame.clone())).collect();
        let records = usize::try_from(seqs.end - seqs.start).unwrap();
        copies.wrote(records, 40 * records, &mut lone, ms(at));
        assert!(lone.is_empty());
    }

    /// When an ACK that takes 100 ms is overdue: a sixteenth more.
    const OVERDUE: Duration = Duration::from_micros(106_250);

    /// Knows that an ACK takes 100 ms.
    fn steady() -> Copies {
        let mut copies = Copies::new();
        assert!(copies.wants_rtt());
        copies.seed(ms(100));
        assert!(!copies.wants_rtt());
        (0..30).for_each(|_| copies.hedges.sample(ms(100)));
        copies
    }

    #[test]
    fn a_lone_record_is_watched_until_its_ack() {
        let mut copies = steady();
        wrote(&mut copies, 1..2, 1_000);
        assert_eq!(copies.hedges.next_due(), Some(ms(1_000) + OVERDUE));
        copies.acked(&[(c(2), Seq::new(9).unwrap())], ms(1_100));
        assert_eq!(copies.hedges.next_due(), Some(ms(1_000) + OVERDUE));
        copies.acked(&[(c(1), Seq::new(1).unwrap())], ms(1_100));
        assert_eq!(copies.hedges.next_due(), None);
    }

    #[test]
    fn an_ack_that_is_put_off_is_waited_for() {
        let mut copies = steady();
        // The client acknowledges at 0, then at 100, then at 200, wherever it is.
        for (seq, at, from) in [(1, 1_000, 1_000), (2, 1_060, 1_100), (3, 1_170, 1_200), (4, 1_500, 1_500)] {
            wrote(&mut copies, seq..seq + 1, at);
            let last = copies.hedges.next_due();
            assert_eq!(last, Some(ms(from) + OVERDUE), "record {seq}");
            copies.hedges.clear();
        }
    }

    #[test]
    fn what_comes_densely_shows_its_losses_by_what_follows() {
        let mut copies = steady();
        // One every 40 ms: the client acknowledges at 0, 100, then each 400 ms.
        let watched: Vec<_> = (0..24)
            .map(|n| {
                wrote(&mut copies, 1 + n..2 + n, 1_000 + 40 * n);
                let watched = !copies.hedges.is_empty();
                copies.hedges.clear();
                watched
            })
            .collect();
        // The one at once, those until 100 ms after it, and those so late before an ACK that it hardly waits.
        let dense = |n: u64| (3..=8).contains(&n) || (13..=18).contains(&n) || n == 23;
        assert_eq!(watched, (0..24).map(|n| !dense(n)).collect::<Vec<_>>());
        // A pause, and it is like the first time.
        wrote(&mut copies, 50..51, 4_000);
        assert_eq!(copies.hedges.next_due(), Some(ms(4_000) + OVERDUE));
    }

    #[test]
    fn an_ack_that_may_have_been_put_off_says_nothing_of_the_path() {
        let rtt = |doubted: bool, after: u64| {
            let mut copies = steady();
            if doubted {
                copies.doubt(ms(1_000));
            }
            // A frame too large for a copy: nothing but its answer is waited for.
            let frame = Bytes::from(vec![0; DATAGRAM_BYTES_MAX + 1]);
            let mut lone = vec![(c(1), Seq::new(1).unwrap(), frame)];
            copies.wrote(1, 2_000, &mut lone, ms(1_000 + after));
            copies.acked(&[(c(1), Seq::new(1).unwrap())], ms(1_140 + after));
            copies.hedges.rtt().smoothed().unwrap()
        };
        assert!(rtt(false, 0) > ms(100));
        assert_eq!(rtt(true, 100), ms(100), "behind a BLOCK");
        assert!(rtt(true, 1_000) > ms(100), "long behind it");
    }

    #[test]
    fn in_a_crowd_nothing_is_watched() {
        let mut copies = steady();
        wrote(&mut copies, 1..4, 1_000);
        assert_eq!(copies.hedges.next_due(), None, "three at once");
        for n in 0..11 {
            wrote(&mut copies, 10 + n..11 + n, 2_000 + 10 * n);
            let watched = !copies.hedges.is_empty();
            copies.hedges.clear();
            assert_eq!(watched, n < CROWD_MAX as u64, "record {n}, one every 10 ms");
        }
    }
}

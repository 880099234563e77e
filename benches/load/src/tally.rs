//! What came of the messages, counted by each thread for itself and put together in the end.
//!
//! - Times are counted from when a message was due.
//! - Only messages that were due within the measured time count; those before warm up.
//! - The last recipient of a message is found over all threads ([`Lasts`]).
//!
//! Not here: whether the figures can be trusted (`verdict`).

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use fulmar_benches::times::Times;

/// Messages under way at the most whose last recipient is found.
const UNDER_WAY: usize = 1 << 16;

/// What one app's senders saw.
#[derive(Clone, Debug, Default)]
pub(crate) struct OfApp {
    /// Messages due.
    pub(crate) due: u64,
    /// Acknowledged as durable.
    pub(crate) acked: u64,
    /// Times one was refused for now.
    pub(crate) put_off: u64,
    /// From due to durable.
    pub(crate) ack: Times,
    /// From when it left for the last time to durable.
    pub(crate) admitted: Times,
}

impl OfApp {
    fn append(&mut self, other: &Self) {
        self.due += other.due;
        self.acked += other.acked;
        self.put_off += other.put_off;
        self.ack.append(&other.ack);
        self.admitted.append(&other.admitted);
    }
}

/// What one thread has counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    /// By app, where there are several.
    pub(crate) apps: Vec<OfApp>,
    /// Times a send was refused for now.
    pub(crate) put_off: u64,
    /// Messages that were dropped here because too many waited for their phone's window.
    pub(crate) given_up: u64,
    /// From when a message left for the last time to durable: without the time it was told to wait.
    pub(crate) admitted: Times,
    /// Messages due, and of them those that were handed over.
    pub(crate) due: u64,
    /// Of them, handed over to the protocol.
    pub(crate) sent: u64,
    /// Acknowledged as durable.
    pub(crate) acked: u64,
    /// Deliveries to readers that keep up.
    pub(crate) delivered: u64,
    /// Times a phone was told how far a conversation has come, and of them those that came less than nine tenths of a second after
    /// the one before.
    pub(crate) heads: u64,
    /// See `heads`.
    pub(crate) heads_early: u64,
    /// Deliveries to slow readers.
    pub(crate) delivered_slowly: u64,
    /// Deliveries that came a second time or out of order.
    pub(crate) disordered: u64,
    /// Messages that had to wait because too many were unacked.
    pub(crate) waited: u64,
    /// From due to durable.
    pub(crate) ack: Times,
    /// From due to each recipient.
    pub(crate) delivery: Times,
    /// Of `delivery`, to phones that have the conversation open, where not all have.
    pub(crate) looking: Times,
    /// The same of those that have not.
    pub(crate) elsewhere: Times,
    /// From due to the last recipient.
    pub(crate) last: Times,
    /// From when a broadcast was due to each recipient; these are not among `delivery`.
    pub(crate) told: Times,
    /// From when a broadcast was due to its last recipient.
    pub(crate) told_last: Times,
    /// How late this program was to hand a message over.
    pub(crate) late: Times,
    /// From the wish to connect to the WELCOME.
    pub(crate) connect: Times,
    /// From the loss of a connection in a storm to the next WELCOME, the times it was turned away included.
    pub(crate) back: Times,
    /// Of `delivery`, what was delivered while phones were on their way back in a storm, and all else.
    pub(crate) stormy: Times,
    /// See `stormy`.
    pub(crate) calm: Times,
    /// Attempts in a storm that were turned away, after which the phone tried again.
    pub(crate) turned_away: u64,
    /// Connects that failed.
    pub(crate) refused: u64,
    /// The first failure, in words.
    pub(crate) refusal: Option<String>,
}

impl Counts {
    /// Adds what another has counted.
    pub(crate) fn append(&mut self, other: &Self) {
        self.due += other.due;
        self.sent += other.sent;
        self.acked += other.acked;
        self.delivered += other.delivered;
        self.delivered_slowly += other.delivered_slowly;
        self.disordered += other.disordered;
        self.put_off += other.put_off;
        self.given_up += other.given_up;
        self.admitted.append(&other.admitted);
        self.apps.resize_with(self.apps.len().max(other.apps.len()), OfApp::default);
        for (mine, other) in self.apps.iter_mut().zip(&other.apps) {
            mine.append(other);
        }
        self.waited += other.waited;
        self.refused += other.refused;
        self.ack.append(&other.ack);
        self.delivery.append(&other.delivery);
        self.looking.append(&other.looking);
        self.elsewhere.append(&other.elsewhere);
        self.heads += other.heads;
        self.heads_early += other.heads_early;
        self.last.append(&other.last);
        self.told.append(&other.told);
        self.told_last.append(&other.told_last);
        self.late.append(&other.late);
        self.connect.append(&other.connect);
        self.back.append(&other.back);
        self.stormy.append(&other.stormy);
        self.calm.append(&other.calm);
        self.turned_away += other.turned_away;
        if self.refusal.is_none() {
            self.refusal.clone_from(&other.refusal);
        }
    }
}

/// What happened since the last look, for the progress line and the plot over time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent {
    /// Messages acked.
    pub(crate) acked: u64,
    /// Deliveries.
    pub(crate) delivered: u64,
    /// From due to each recipient.
    pub(crate) delivery: Times,
    /// From due to durable.
    pub(crate) ack: Times,
    /// From when it left for the last time to durable.
    pub(crate) admitted: Times,
    /// Sends that were refused for now.
    pub(crate) put_off: u64,
}

/// Counts of one thread, which others look at now and then.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<(Counts, Recent)>);

impl Counts {
    /// What the senders of an app saw.
    pub(crate) fn of_app(&mut self, app: usize) -> Option<&mut OfApp> {
        if self.apps.len() <= app {
            self.apps.resize_with(app + 1, OfApp::default);
        }
        self.apps.get_mut(app)
    }
}

impl Tally {
    /// Counts something.
    pub(crate) fn note(&self, note: impl FnOnce(&mut Counts, &mut Recent)) {
        let mut inner = self.lock();
        let (counts, recent) = &mut *inner;
        note(counts, recent);
    }

    /// All there is so far.
    pub(crate) fn counts(&self) -> Counts {
        self.lock().0.clone()
    }

    /// Adds what happened since the last call to `into`.
    pub(crate) fn take_recent(&self, into: &mut Recent) {
        let mut inner = self.lock();
        let recent = &mut inner.1;
        into.acked += std::mem::take(&mut recent.acked);
        into.delivered += std::mem::take(&mut recent.delivered);
        into.delivery.append(&recent.delivery);
        recent.delivery.clear();
        into.ack.append(&recent.ack);
        recent.ack.clear();
        into.admitted.append(&recent.admitted);
        recent.admitted.clear();
        into.put_off += std::mem::take(&mut recent.put_off);
    }

    fn lock(&self) -> MutexGuard<'_, (Counts, Recent)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// The message's number + 1; 0: none.
    number: AtomicU64,
    missing: AtomicU32,
}

/// Who is the last recipient of each message.
#[derive(Debug)]
pub(crate) struct Lasts {
    slots: Box<[Slot]>,
    lost: AtomicU64,
}

impl Default for Lasts {
    fn default() -> Self {
        Self { slots: (0..UNDER_WAY).map(|_| Slot::default()).collect(), lost: AtomicU64::new(0) }
    }
}

impl Lasts {
    fn slot(&self, number: u64) -> Option<&Slot> {
        usize::try_from(number % UNDER_WAY as u64).ok().and_then(|at| self.slots.get(at))
    }

    /// A message is on its way to so many.
    pub(crate) fn begin(&self, number: u64, recipients: u32) {
        let Some(slot) = self.slot(number) else { return };
        if slot.missing.load(Ordering::Relaxed) != 0 {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        slot.number.store(0, Ordering::Release);
        slot.missing.store(recipients, Ordering::Release);
        slot.number.store(number + 1, Ordering::Release);
    }

    /// It has reached one; whether that was the last.
    pub(crate) fn reached(&self, number: u64) -> bool {
        let Some(slot) = self.slot(number) else { return false };
        slot.number.load(Ordering::Acquire) == number + 1 && slot.missing.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Messages that were given up because too many were under way.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_last_recipient_is_found_once() {
        let lasts = Lasts::default();
        lasts.begin(5, 3);
        assert_eq!([5, 5, 5].map(|number| lasts.reached(number)), [false, false, true]);
        assert!(!lasts.reached(6), "nobody sent it");
        lasts.begin(5 + UNDER_WAY as u64, 2);
        assert_eq!(lasts.lost(), 0);
        assert!(!lasts.reached(5), "its place is taken");
        lasts.begin(5 + 2 * UNDER_WAY as u64, 1);
        assert_eq!(lasts.lost(), 1);
    }

    #[test]
    fn what_threads_counted_comes_together() {
        let (one, two) = (Tally::default(), Tally::default());
        for (tally, ms) in [(&one, 1), (&two, 100)] {
            tally.note(|counts, recent| {
                counts.delivered += 1;
                counts.delivery.add(Duration::from_millis(ms));
                recent.delivered += 1;
                recent.delivery.add(Duration::from_millis(ms));
            });
        }
        let mut all = one.counts();
        all.append(&two.counts());
        assert_eq!((all.delivered, all.delivery.len()), (2, 2));
        assert!(
            all.delivery.max() >= Duration::from_millis(100)
                && all.delivery.max() < Duration::from_millis(101)
        );
        assert!(all.delivery.quantile(0.5) < Duration::from_millis(2));
        let mut recent = Recent::default();
        one.take_recent(&mut recent);
        one.take_recent(&mut recent);
        two.take_recent(&mut recent);
        assert_eq!((recent.delivered, recent.delivery.len()), (2, 2));
        let curve = all.delivery.curve();
        assert!(curve.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1) && curve.last().unwrap().1 == 1.0);
    }
}

//! What is noted while the pairs talk, and the figures made from it.
//!
//! - Latency counts from when a message *should* have left ([`crate::plan`]): a sender that was held up does not hide
//!   what its messages suffered (no coordinated omission).
//! - A message that did not come counts as having taken all the time it was waited for: losses lift the percentiles.
//! - Sender and receiver are one process and read one monotonic clock.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::plan::Planned;

/// Messages a cell names as its slowest, unless all are asked for.
pub(crate) const SLOWEST: usize = 12;

/// The moment everything counts from, by both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Zero {
    monotonic: Instant,
    wall_ms: f64,
}

impl Zero {
    /// `ahead` from now.
    pub(crate) fn ahead(ahead: Duration) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + ahead;
        Self { monotonic: Instant::now() + ahead, wall_ms: millis(wall) }
    }

    /// By the monotonic clock.
    pub(crate) const fn instant(&self) -> Instant {
        self.monotonic
    }

    /// How long ago it was.
    pub(crate) fn elapsed(&self) -> Duration {
        self.monotonic.elapsed()
    }
}

/// What became of one message; times count from [`Zero`].
#[derive(Clone, Copy, Debug)]
struct Fate {
    planned: Planned,
    handed: Option<Duration>,
    acked: Option<Duration>,
    read: Option<Duration>,
    /// When the server stored it by its own clock, milliseconds since 1970; not every server says so.
    stored_ms: Option<u64>,
}

#[derive(Debug, Default)]
struct Notes {
    fates: Vec<Fate>,
    newest: Option<u32>,
    duplicates: u64,
    disorder: u64,
    strangers: u64,
    failure: Option<String>,
}

/// The notes of one pair.
#[derive(Debug)]
pub(crate) struct Log {
    pair: u32,
    zero: Zero,
    notes: Mutex<Notes>,
}

impl Log {
    /// Of a pair that is going to follow this plan.
    pub(crate) fn new(pair: u32, zero: Zero, plan: &[Planned]) -> Self {
        let fates = plan
            .iter()
            .map(|planned| Fate { planned: *planned, handed: None, acked: None, read: None, stored_ms: None })
            .collect();
        Self { pair, zero, notes: Mutex::new(Notes { fates, ..Notes::default() }) }
    }

    /// Which pair it is.
    pub(crate) const fn pair(&self) -> u32 {
        self.pair
    }

    /// The moment everything counts from.
    pub(crate) const fn zero(&self) -> Zero {
        self.zero
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, index: u32, note: impl FnOnce(&mut Fate, Duration)) {
        let now = self.zero.elapsed();
        let mut notes = self.notes();
        if let Some(fate) = usize::try_from(index).ok().and_then(|index| notes.fates.get_mut(index)) {
            note(fate, now);
        }
    }

    /// The sender hands message `index` to its client now.
    pub(crate) fn handed(&self, index: u32) {
        self.note(index, |fate, now| fate.handed = fate.handed.or(Some(now)));
    }

    /// The sender knows that the server has it.
    pub(crate) fn acked(&self, index: u32) {
        self.note(index, |fate, now| fate.acked = fate.acked.or(Some(now)));
    }

    /// The receiver's app has these bytes.
    pub(crate) fn read(&self, payload: &[u8], stored_ms: Option<u64>) {
        let now = self.zero.elapsed();
        let mut notes = self.notes();
        let found = crate::plan::which(payload)
            .filter(|(pair, _)| *pair == self.pair)
            .and_then(|(_, index)| Some((index, usize::try_from(index).ok()?)));
        let Some((index, place)) = found.filter(|(_, place)| *place < notes.fates.len()) else {
            notes.strangers += 1;
            return;
        };
        let again = notes.fates.get(place).is_some_and(|fate| fate.read.is_some());
        if again {
            notes.duplicates += 1;
            return;
        }
        if notes.newest.is_some_and(|newest| index < newest) {
            notes.disorder += 1;
        }
        notes.newest = notes.newest.max(Some(index));
        if let Some(fate) = notes.fates.get_mut(place) {
            (fate.read, fate.stored_ms) = (Some(now), stored_ms);
        }
    }

    /// The pair can't go on.
    pub(crate) fn failed(&self, why: &str) {
        self.notes().failure.get_or_insert_with(|| format!("pair {}: {why}", self.pair));
    }

    /// Everything has come, or nothing more will.
    pub(crate) fn is_over(&self) -> bool {
        let notes = self.notes();
        notes.failure.is_some() || notes.fates.iter().all(|fate| fate.read.is_some())
    }
}

/// A distribution of times, in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Curve {
    /// How many.
    pub(crate) count: u64,
    /// Half of them took at most this.
    pub(crate) p50: f64,
    /// 95 %.
    pub(crate) p95: f64,
    /// 99 %.
    pub(crate) p99: f64,
    /// 99.9 %.
    pub(crate) p999: f64,
    /// The longest.
    pub(crate) max: f64,
    /// Points for a plot: share of all, and the time it took at most.
    pub(crate) points: Vec<(f64, f64)>,
}

impl Curve {
    /// Of a histogram of microseconds.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let ms = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1_000.0;
        let at = |quantile: f64| ms(histogram.value_at_quantile(quantile));
        let points = histogram
            .iter_quantiles(5)
            .map(|step| (step.quantile_iterated_to(), ms(step.value_iterated_to())))
            .collect();
        Self {
            count: histogram.len(),
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            p999: at(0.999),
            max: ms(histogram.max()),
            points,
        }
    }
}

/// A message that took long, and where it spent its time, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Slow {
    /// Whose.
    pub(crate) pair: u32,
    /// Which.
    pub(crate) index: u32,
    /// When it should have left, from the moment the link turned bad on.
    pub(crate) due: f64,
    /// Should have left → read.
    pub(crate) total: f64,
    /// Should have left → stored by the server.
    pub(crate) up: Option<f64>,
    /// Stored → read.
    pub(crate) down: Option<f64>,
    /// Should have left → the sender knows that it is stored.
    pub(crate) acked: Option<f64>,
}

/// What came of a whole cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Messages that count.
    pub(crate) sent: u64,
    /// Of these, never read within the time waited.
    pub(crate) lost: u64,
    /// Read twice or more, warm-up included.
    pub(crate) duplicates: u64,
    /// Read after a later one of the same sender, warm-up included.
    pub(crate) disorder: u64,
    /// What is read but was never sent.
    pub(crate) strangers: u64,
    /// Should have left → read.
    pub(crate) latency: Curve,
    /// Should have left → the sender knows that the server has it.
    pub(crate) ack: Curve,
    /// Should have left → stored, where the server says when.
    pub(crate) up: Option<Curve>,
    /// Stored → read.
    pub(crate) down: Option<Curve>,
    /// How late the lab itself handed messages to their clients.
    pub(crate) handed_late: Curve,
    /// The slowest.
    pub(crate) slowest: Vec<Slow>,
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

/// The figures of all pairs together, after waiting until `waited` from [`Zero`] on, with the `kept` slowest messages.
///
/// # Errors
/// A pair failed, or nothing was sent.
pub(crate) fn figures<'a>(
    logs: impl IntoIterator<Item = &'a Log>,
    waited: Duration,
    kept: usize,
) -> anyhow::Result<Figures> {
    let histogram = || Histogram::<u64>::new_with_bounds(1, 3_600_000_000, 3);
    let [mut latency, mut ack, mut up, mut down, mut handed_late] =
        [histogram()?, histogram()?, histogram()?, histogram()?, histogram()?];
    let (mut lost, mut duplicates, mut disorder, mut strangers) = (0, 0, 0, 0);
    let mut slowest: Vec<Slow> = Vec::new();
    let record = |histogram: &mut Histogram<u64>, took: Duration| {
        histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    };
    for log in logs {
        let notes = log.notes();
        if let Some(failure) = &notes.failure {
            anyhow::bail!("{failure}");
        }
        duplicates += notes.duplicates;
        disorder += notes.disorder;
        strangers += notes.strangers;
        for fate in notes.fates.iter().filter(|fate| fate.planned.counted) {
            let due = fate.planned.due;
            let since_due = |at: Option<Duration>| at.unwrap_or(waited).saturating_sub(due);
            lost += u64::from(fate.read.is_none());
            let total = since_due(fate.read);
            record(&mut latency, total);
            record(&mut ack, since_due(fate.acked));
            record(&mut handed_late, since_due(fate.handed));
            let stored = fate.stored_ms.map(|stored| {
                // Whole milliseconds: the middle of the one it was.
                #[expect(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit into 52 bits")]
                let stored = stored as f64 + 0.5 - log.zero.wall_ms;
                Duration::from_secs_f64((stored / 1_000.0).max(0.0))
            });
            let legs = stored.zip(fate.read).map(|(stored, read)| {
                let (to, from) = (stored.saturating_sub(due), read.saturating_sub(stored));
                record(&mut up, to);
                record(&mut down, from);
                (to, from)
            });
            slowest.push(Slow {
                pair: log.pair,
                index: fate.planned.index,
                due: millis(due),
                total: millis(total),
                up: legs.map(|(up, _)| millis(up)),
                down: legs.map(|(_, down)| millis(down)),
                acked: fate.acked.map(|acked| millis(acked.saturating_sub(due))),
            });
        }
    }
    anyhow::ensure!(!latency.is_empty(), "nothing was sent: the schedule is too short");
    slowest.sort_by(|a, b| b.total.total_cmp(&a.total));
    slowest.truncate(kept);
    let known = |histogram: &Histogram<u64>| (!histogram.is_empty()).then(|| Curve::of(histogram));
    Ok(Figures {
        sent: latency.len(),
        lost,
        duplicates,
        disorder,
        strangers,
        latency: Curve::of(&latency),
        ack: Curve::of(&ack),
        up: known(&up),
        down: known(&down),
        handed_late: Curve::of(&handed_late),
        slowest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::payload;

    fn plan(count: u32) -> Vec<Planned> {
        (0..count)
            .map(|index| Planned { index, due: Duration::from_millis(u64::from(index)), counted: index > 0 })
            .collect()
    }

    #[test]
    fn what_never_came_took_all_the_time_there_was() {
        let log = Log::new(4, Zero::ahead(Duration::ZERO), &plan(3));
        log.read(&payload(4, 0), None);
        log.read(&payload(4, 2), None);
        assert!(!log.is_over());
        let figures = figures([&log], Duration::from_secs(7), SLOWEST).unwrap();
        assert_eq!((figures.sent, figures.lost), (2, 1));
        assert!((figures.latency.max - 6_999.0).abs() < 10.0, "{}", figures.latency.max);
        assert!(figures.latency.p50 < 1_000.0);
        assert_eq!(figures.slowest[0].index, 1);
        assert_eq!(figures.up, None, "nobody said when it was stored");
    }

    #[test]
    fn what_comes_wrongly_is_counted() {
        let log = Log::new(4, Zero::ahead(Duration::ZERO), &plan(3));
        for index in [1, 0, 0, 2] {
            log.read(&payload(4, index), Some(1));
        }
        log.read(b"something else", None);
        log.read(&payload(5, 0), None);
        log.read(&payload(4, 3), None);
        assert!(log.is_over());
        let figures = figures([&log], Duration::ZERO, 1).unwrap();
        assert_eq!((figures.lost, figures.duplicates, figures.disorder, figures.strangers), (0, 1, 1, 3));
        assert!(figures.up.is_some_and(|up| up.count == 2));
    }

    #[test]
    fn a_failure_is_no_figure() {
        let log = Log::new(4, Zero::ahead(Duration::ZERO), &plan(3));
        log.failed("the connection ended");
        log.failed("and again");
        assert!(log.is_over());
        let error = figures([&log], Duration::ZERO, 1).unwrap_err();
        assert_eq!(error.to_string(), "pair 4: the connection ended");
        assert!(figures([&Log::new(1, Zero::ahead(Duration::ZERO), &[])], Duration::ZERO, 1).is_err());
    }
}

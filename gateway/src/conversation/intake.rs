//! Sends that wait for their turn at a shard, and those that are turned away before anything is decided about them. Pure: the
//! clock is an argument.
//!
//! - Each app has a line of its own, first in, first out; apps take turns by bytes, so one that floods waits behind itself.
//! - A send that would wait longer than [`IntakeLimits::wait`] is refused at once, and told when to come again. Refused sends get
//!   times one after the other, at a part of the pace at which sends are taken: they don't come back all together.
//! - When all lines together are full, the longest one gives up its newest send; an app within its share loses nothing.
//! - What follows a refused send in its lane of sending is refused as well until that one is back or its time has come: it could not
//!   be decided without it, and the lane's order is kept.
//!
//! Not here: deciding about sends ([`super::state`]), other commands (the shard takes those as they come).

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use fulmar_protocol::id::{AppId, Pseq};

use super::holds::{Holds, Lane};

/// Bounds of what waits at one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntakeLimits {
    /// How long a send may have to wait for its turn.
    pub wait: Duration,
    /// Sends that wait, of all apps.
    pub sends: usize,
    /// Bytes they take.
    pub bytes: usize,
}

impl IntakeLimits {
    /// With a wait, and room for what may come in it.
    #[must_use]
    pub const fn waiting_for(wait: Duration) -> Self {
        Self { wait, sends: 8_192, bytes: 8 * 1024 * 1024 }
    }
}

/// What a send takes besides its payload.
const SEND_BYTES: usize = 512;

/// Bytes an app may have decided before the next one has its turn: a send of any size fits.
const TURN_BYTES: usize = 32 * 1024;

/// The longest time anybody is told to wait: who comes later than that would find a gateway that is long idle again.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// The shortest one.
const WAIT_MIN: Duration = Duration::from_millis(50);

/// Between two refused sends that come again while nothing is known of the pace.
const PACE_UNKNOWN: Duration = Duration::from_micros(50);

/// Refused sends come again at a pace so many times slower than sends are taken: refusing costs something too, and whoever is
/// refused holds back what follows in its lane.
const AGAIN_SLOWER: u32 = 8;

/// Why a send was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// It would wait for too long.
    Late,
    /// Too many wait, and its app has more of them than others.
    Full,
    /// It follows one that was refused.
    Follows,
}

impl Why {
    /// A word for the metrics.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Late => "late",
            Self::Full => "full",
            Self::Follows => "follows",
        }
    }
}

/// A send that is to come again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TurnedAway<T> {
    pub(super) item: T,
    pub(super) why: Why,
    /// After how long.
    pub(super) wait: Duration,
}

#[derive(Debug)]
struct Waiting<T> {
    lane: Lane,
    pseq: Pseq,
    bytes: usize,
    item: T,
}

/// What waits of one app.
#[derive(Debug)]
struct Line<T> {
    waiting: VecDeque<Waiting<T>>,
    bytes: usize,
    /// Bytes it may still have decided in this turn.
    credit: usize,
    /// When the next one that is refused is told to come again.
    again: Duration,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Intake<T> {
    limits: IntakeLimits,
    /// There is one for each app that ever had to wait; apps are those of the configuration.
    lines: BTreeMap<AppId, Line<T>>,
    /// Apps of which something waits, in the order of their turns.
    turns: VecDeque<AppId>,
    sends: usize,
    bytes: usize,
    holds: Holds,
    /// Between two sends that are taken, while some wait.
    pace: Option<Duration>,
    /// When the last batch left, and how many were taken since.
    since: Duration,
    taken: u32,
    before: u32,
}

impl<T> Intake<T> {
    /// Nobody waits.
    pub(super) const fn new(limits: IntakeLimits) -> Self {
        Self {
            limits,
            lines: BTreeMap::new(),
            turns: VecDeque::new(),
            sends: 0,
            bytes: 0,
            holds: Holds::new(),
            pace: None,
            since: Duration::ZERO,
            taken: 0,
            before: 0,
        }
    }

    /// Nothing waits.
    pub(super) const fn is_empty(&self) -> bool {
        self.sends == 0
    }

    /// Sends that wait.
    pub(super) const fn len(&self) -> usize {
        self.sends
    }

    /// Nothing waits, and no lane is held: a send need not come by here.
    pub(super) fn is_calm(&self) -> bool {
        self.sends == 0 && self.holds.is_empty()
    }

    /// A send comes. Answers which one is turned away, if one is: this one, or one of an app that has more than its share.
    pub(super) fn offer(
        &mut self,
        app: AppId,
        lane: Lane,
        pseq: Pseq,
        payload: usize,
        item: T,
        now: Duration,
    ) -> Option<TurnedAway<T>> {
        self.holds.let_go(now);
        if let Some((_, until)) = self.holds.before(lane, pseq) {
            let wait = until.saturating_sub(now).max(WAIT_MIN);
            return Some(TurnedAway { item, why: Why::Follows, wait });
        }
        self.holds.back(lane, pseq);
        let waiting = Waiting { lane, pseq, bytes: SEND_BYTES + payload, item };
        if self.expected(app, now) > self.limits.wait {
            return Some(self.turn_away(app, waiting, Why::Late, now));
        }
        let full =
            self.sends >= self.limits.sends || self.bytes.saturating_add(waiting.bytes) > self.limits.bytes;
        if !full {
            self.put(app, waiting);
            return None;
        }
        // The longest line gives way; at a tie the newcomer's does.
        let mine = self.lines.get(&app).map_or(0, |line| line.waiting.len());
        let longest = self.lines.iter().map(|(app, line)| (line.waiting.len(), *app)).max();
        let last = longest.filter(|(len, _)| *len > mine).and_then(|(_, longest)| {
            let line = self.lines.get_mut(&longest)?;
            let last = line.waiting.pop_back()?;
            line.bytes -= last.bytes;
            self.sends -= 1;
            self.bytes -= last.bytes;
            Some((longest, last))
        });
        match last {
            Some((longest, last)) => {
                self.put(app, waiting);
                Some(self.turn_away(longest, last, Why::Full, now))
            }
            None => Some(self.turn_away(app, waiting, Why::Full, now)),
        }
    }

    /// A send that did not have to wait was taken.
    pub(super) const fn passed(&mut self) {
        self.taken = self.taken.saturating_add(1);
    }

    /// Whose turn it is.
    pub(super) fn take(&mut self) -> Option<T> {
        while let Some(app) = self.turns.front().copied() {
            let Some(line) = self.lines.get_mut(&app) else {
                self.turns.pop_front();
                continue;
            };
            let Some(bytes) = line.waiting.front().map(|first| first.bytes) else {
                line.credit = 0;
                self.turns.pop_front();
                continue;
            };
            if line.credit < bytes {
                line.credit += TURN_BYTES;
                self.turns.rotate_left(1);
                continue;
            }
            let first = line.waiting.pop_front()?;
            line.credit -= first.bytes;
            line.bytes -= first.bytes;
            self.sends -= 1;
            self.bytes -= first.bytes;
            self.taken = self.taken.saturating_add(1);
            return Some(first.item);
        }
        None
    }

    /// A batch goes to disk: what was taken since the last one did shows the pace, if sends had to wait for it.
    pub(super) fn batch_left(&mut self, now: Duration) {
        let lasted = now.saturating_sub(self.since);
        let pace = (self.sends > 0).then_some(lasted).and_then(|lasted| lasted.checked_div(self.taken));
        self.pace = match (self.pace, pace) {
            (Some(before), Some(pace)) => Some((before + pace) / 2),
            (None, pace) => pace,
            // Nobody waits: what was slow for a moment is over.
            (Some(before), None) => (self.sends > 0).then_some(before),
        };
        self.since = now;
        self.before = self.taken;
        self.taken = 0;
    }

    /// How long a send of `app` that comes now has to wait, about.
    fn expected(&self, app: AppId, now: Duration) -> Duration {
        if self.sends == 0 {
            return Duration::ZERO;
        }
        let since = now.saturating_sub(self.since);
        let Some(pace) = self.pace else { return since };
        let mine = self.lines.get(&app).map_or(0, |line| line.waiting.len());
        let ahead: usize = self.lines.values().map(|line| line.waiting.len().min(mine + 1)).sum();
        // A batch that takes longer than the ones before it holds everybody up.
        let overdue = since.saturating_sub(pace.saturating_mul(self.before.max(self.taken)));
        pace.saturating_mul(u32::try_from(ahead).unwrap_or(u32::MAX)).saturating_add(overdue)
    }

    fn put(&mut self, app: AppId, waiting: Waiting<T>) {
        let line = self.line(app);
        let first = line.waiting.is_empty();
        let bytes = waiting.bytes;
        line.bytes += bytes;
        line.waiting.push_back(waiting);
        self.sends += 1;
        self.bytes += bytes;
        if first && !self.turns.contains(&app) {
            self.turns.push_back(app);
        }
    }

    fn line(&mut self, app: AppId) -> &mut Line<T> {
        self.lines.entry(app).or_insert_with(|| Line {
            waiting: VecDeque::new(),
            bytes: 0,
            credit: 0,
            again: Duration::ZERO,
        })
    }

    fn turn_away(&mut self, app: AppId, waiting: Waiting<T>, why: Why, now: Duration) -> TurnedAway<T> {
        let apps = u32::try_from(self.turns.len()).unwrap_or(u32::MAX).max(1);
        let pace = self.pace.unwrap_or(PACE_UNKNOWN).saturating_mul(apps.saturating_mul(AGAIN_SLOWER));
        let earliest = now + self.limits.wait.clamp(WAIT_MIN, WAIT_MAX);
        let line = self.line(app);
        let until = line.again.clamp(earliest, now + WAIT_MAX);
        line.again = until + pace;
        self.holds.hold(waiting.lane, waiting.pseq, until);
        TurnedAway { item: waiting.item, why, wait: until.saturating_sub(now) }
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Producer, UserId};
    use proptest::prelude::*;

    use super::*;

    fn app(name: &str) -> AppId {
        AppId::of(name)
    }

    fn lane(user: u64) -> Lane {
        let producer =
            Producer { user: UserId::new(user).unwrap(), device: DeviceId::FIRST, epoch: Epoch::FIRST };
        (ConversationId::new(256).unwrap(), producer)
    }

    fn pseq(n: u64) -> Pseq {
        Pseq::new(n).unwrap()
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn intake<T>(sends: usize) -> Intake<T> {
        Intake::new(IntakeLimits { wait: ms(100), sends, bytes: 1 << 20 })
    }

    /// Offers a send that is to be let in.
    fn put(intake: &mut Intake<(u64, u64)>, of: &str, user: u64, n: u64, now: Duration) {
        let turned = intake.offer(app(of), lane(user), pseq(n), 100, (user, n), now);
        assert_eq!(turned, None, "{of} {user} {n}");
    }

    fn taken(intake: &mut Intake<(u64, u64)>, most: usize) -> Vec<(u64, u64)> {
        std::iter::from_fn(|| intake.take()).take(most).collect()
    }

    #[test]
    fn an_app_that_floods_waits_behind_itself() {
        let mut intake = intake(1_000);
        for n in 1..=400 {
            put(&mut intake, "flood", 257, n, ms(0));
        }
        for n in 1..=3 {
            put(&mut intake, "quiet", 513, n, ms(1));
        }
        let first = taken(&mut intake, 150);
        assert_eq!(
            first.iter().filter(|(user, _)| *user == 513).count(),
            3,
            "one turn of the other is enough"
        );
        let rest = taken(&mut intake, 1_000);
        let flood: Vec<u64> =
            first.into_iter().chain(rest).filter(|(user, _)| *user == 257).map(|(_, n)| n).collect();
        assert_eq!(flood, (1..=400).collect::<Vec<_>>(), "in order");
        assert!(intake.is_empty() && intake.is_calm());
    }

    #[test]
    fn when_all_is_full_the_longest_line_gives_way() {
        let mut intake = intake(10);
        for n in 1..=10 {
            put(&mut intake, "flood", 257, n, ms(0));
        }
        let turned = intake.offer(app("flood"), lane(258), pseq(1), 100, (258, 1), ms(0)).unwrap();
        assert_eq!((turned.item, turned.why), ((258, 1), Why::Full), "its own newest");
        let turned = intake.offer(app("quiet"), lane(513), pseq(1), 100, (513, 1), ms(0)).unwrap();
        assert_eq!((turned.item, turned.why), ((257, 10), Why::Full), "the newest of the flood");
        assert_eq!(intake.len(), 10);
        // What follows the one that had to go is no use without it.
        let turned = intake.offer(app("flood"), lane(257), pseq(11), 100, (257, 11), ms(0)).unwrap();
        assert_eq!(turned.why, Why::Follows);
        let left = taken(&mut intake, 20);
        assert_eq!(left, (1..=9).map(|n| (257, n)).chain([(513, 1)]).collect::<Vec<_>>());
    }

    #[test]
    fn nobody_is_let_in_to_wait_for_too_long() {
        let mut intake = intake(100_000);
        // 50 are taken every 10 ms: 0.2 ms each, so that 500 may wait.
        let mut now = ms(1_000);
        intake.batch_left(now);
        let (mut let_in, mut late) = (0u64, Vec::new());
        for turn in 0..100 {
            for n in 0..100 {
                let user = 257 + turn * 100 + n;
                match intake.offer(app("demo"), lane(user), pseq(1), 100, (user, 1), now) {
                    None => let_in += 1,
                    Some(turned) => late.push(turned),
                }
            }
            now += ms(10);
            assert!(taken(&mut intake, 50).len() == 50);
            intake.batch_left(now);
        }
        assert!((400..=600).contains(&intake.len()), "{}", intake.len());
        assert_eq!(let_in, 50 * 100 + intake.len() as u64);
        assert!(late.iter().all(|turned| turned.why == Why::Late && turned.wait >= ms(100)));
        // They come again one after the other, not all at once.
        let last = late.last().unwrap();
        assert_eq!(last.wait, WAIT_MAX, "as many are refused as are taken: most of them must stay away");
        let waits: Vec<_> = late[..40].iter().map(|turned| turned.wait).collect();
        assert!(waits.windows(2).all(|pair| pair[0] < pair[1]), "{waits:?}");
    }

    #[test]
    fn a_batch_that_takes_too_long_holds_nobody_without_a_word() {
        let mut intake = intake(1_000);
        intake.batch_left(ms(5_000));
        put(&mut intake, "demo", 257, 1, ms(5_000));
        put(&mut intake, "demo", 258, 1, ms(5_090));
        let turned = intake.offer(app("demo"), lane(259), pseq(1), 100, (259, 1), ms(5_101)).unwrap();
        assert_eq!(turned.why, Why::Late);
        // It is over: what was slow is forgotten.
        assert_eq!(taken(&mut intake, 10), [(257, 1), (258, 1)]);
        intake.batch_left(ms(9_000));
        assert!(!intake.is_calm(), "a lane is held");
        put(&mut intake, "demo", 259, 1, ms(9_000));
        put(&mut intake, "demo", 260, 1, ms(9_000));
        assert_eq!(taken(&mut intake, 10), [(259, 1), (260, 1)]);
        assert!(intake.is_calm());
    }

    #[test]
    fn what_follows_a_refused_send_waits_for_it_and_not_for_ever() {
        let refused = |intake: &mut Intake<(u64, u64)>, n, now| {
            intake
                .offer(app("demo"), lane(257), pseq(n), 100, (257, n), now)
                .map(|turned| (turned.why, turned.wait))
        };
        let mut intake = intake(1);
        put(&mut intake, "demo", 300, 1, ms(0));
        assert_eq!(refused(&mut intake, 5, ms(0)), Some((Why::Full, ms(100))));
        assert_eq!(taken(&mut intake, 1).len(), 1);
        assert_eq!(
            refused(&mut intake, 6, ms(10)),
            Some((Why::Follows, ms(90))),
            "there is room, but not for it"
        );
        assert_eq!(refused(&mut intake, 7, ms(60)), Some((Why::Follows, WAIT_MIN)));
        // A copy of one before it is no reason to let the others in.
        assert_eq!(refused(&mut intake, 4, ms(60)), None);
        assert_eq!(taken(&mut intake, 1), [(257, 4)]);
        assert_eq!(refused(&mut intake, 6, ms(61)), Some((Why::Follows, WAIT_MIN)));
        assert_eq!(refused(&mut intake, 5, ms(70)), None);
        assert_eq!(taken(&mut intake, 1), [(257, 5)]);
        assert_eq!(refused(&mut intake, 6, ms(70)), None);
        assert_eq!(taken(&mut intake, 1), [(257, 6)]);
        // It never comes again: its answer was on its way.
        put(&mut intake, "demo", 300, 1, ms(80));
        assert!(refused(&mut intake, 7, ms(80)).is_some());
        assert_eq!(taken(&mut intake, 1).len(), 1);
        assert_eq!(refused(&mut intake, 8, ms(181)), None, "its time has come");
        assert!(taken(&mut intake, 1).len() == 1 && intake.is_calm());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// Whatever comes: nothing is lost or made up, lanes keep their order, bounds hold, and of apps that always have something
        /// to say none gets less than its share.
        #[test]
        fn lines_are_fair_and_bounded(
            steps in prop::collection::vec((0..4u64, 1..5u64, 0..2_000usize, 0..30u64, 0..6usize), 1..400),
        ) {
            let mut intake = intake::<(u64, u64, u64)>(64);
            let mut now = ms(1_000);
            let mut next: BTreeMap<(u64, u64), u64> = BTreeMap::new();
            let mut last: BTreeMap<(u64, u64), u64> = BTreeMap::new();
            let (mut offered, mut turned_away, mut taken) = (0usize, 0usize, 0usize);
            for (of, user, payload, passes, take) in steps {
                let n = next.entry((of, user)).or_insert(1);
                let id = 257 + 1_024 * of + 256 * user;
                offered += 1;
                let mine = *n;
                let turned = intake.offer(app(&format!("app{of}")), lane(id), pseq(mine), payload, (of, user, mine), now);
                let own = turned.as_ref().is_some_and(|turned| turned.item == (of, user, mine));
                *n += u64::from(!own);
                if let Some(TurnedAway { item: (app, user, refused), wait, .. }) = turned {
                    turned_away += 1;
                    prop_assert!(wait >= WAIT_MIN && wait <= WAIT_MAX);
                    // Its client goes back to it.
                    let next = next.entry((app, user)).or_insert(refused);
                    *next = (*next).min(refused);
                }
                prop_assert!(intake.len() <= 64 && intake.bytes <= 1 << 20);
                now += ms(passes);
                for _ in 0..take {
                    if let Some((app, user, n)) = intake.take() {
                        taken += 1;
                        let before = last.insert((app, user), n).unwrap_or(0);
                        prop_assert!(n > before, "{app} {user}: {n} after {before}");
                    }
                }
                if take > 0 {
                    intake.batch_left(now);
                }
            }
            while let Some((app, user, n)) = intake.take() {
                taken += 1;
                let before = last.insert((app, user), n).unwrap_or(0);
                prop_assert!(n > before);
            }
            prop_assert_eq!(offered, turned_away + taken);
        }

        /// Apps that always have more to say get as many bytes decided as each other, whatever the sizes.
        #[test]
        fn apps_get_equal_shares(sizes in prop::collection::vec(0..16_000usize, 2..5)) {
            let mut intake = Intake::new(IntakeLimits { wait: ms(100), sends: 100_000, bytes: 1 << 30 });
            for (of, size) in sizes.iter().enumerate() {
                for n in 1..=2_000u64 {
                    let id = 257 + 256 * of as u64;
                    let app = app(&format!("app{of}"));
                    prop_assert!(intake.offer(app, lane(id), pseq(n), *size, of, ms(0)).is_none());
                }
            }
            let mut bytes = vec![0usize; sizes.len()];
            for _ in 0..1_000 {
                if let Some(of) = intake.take() {
                    bytes[of] += sizes[of] + SEND_BYTES;
                }
            }
            let (least, most) = (bytes.iter().min().unwrap(), bytes.iter().max().unwrap());
            prop_assert!(most - least <= 2 * TURN_BYTES, "{bytes:?}");
        }
    }
}

//! Who may send while a core is late: a part of its connections at a time, in turns. Pure: time and lateness are arguments.
//!
//! - A core is late when even the least age of a packet at its reading, over a tenth of a second, is above `wait`.
//! - While it is, fewer connections may send, of the app that sends most, until another one does: one within its
//!   share loses nothing.
//! - Connections stand in a circle, and the part of it that may send moves round: so few of them send whole windows, which cost
//!   half of what as many lone sends do, and each has its turn. Who is refused is told when that comes.
//! - What follows a refused send in its lane is refused too until that one is back ([`Holds`]).
//!
//! Not here: how late a core is (`lateness`), a shard that is late (`conversation::intake`).

use std::{collections::BTreeMap, time::Duration};

use fulmar_protocol::id::{AppId, Pseq};

use crate::conversation::holds::{Holds, Lane};

/// How often it is decided anew how many may send.
const INTERVAL: Duration = Duration::from_millis(100);

/// How long the open part takes to go round, if that leaves everybody [`TURN_MIN`].
const ROUND: Duration = Duration::from_secs(5);

/// The shortest turn. A refused client begins with one send and opens its window with what is acked, which takes two
/// round trips; and what is under way when its turn is over, a window, is refused and was read for nothing.
const TURN_MIN: Duration = Duration::from_secs(2);

/// The longest wait anybody is told, whose turn may be later than that: the core may long have time again. After a surge that is
/// what recovery takes.
const WAIT_MAX: Duration = Duration::from_millis(1_500);

/// The shortest one.
const WAIT_MIN: Duration = Duration::from_millis(50);

/// The smallest part that may send.
const SHARE_MIN: f64 = 1.0 / 256.0;

/// So much of what was open stays open when the core is found late, at the least and at the most.
const CUT: (f64, f64) = (0.4, 0.95);

/// So much more is opened in an interval when it is not. A window that opens shows some round trips later.
const OPEN: f64 = 1.03;

/// The same when it is next to idle: what was cut for a surge is open again within seconds.
const OPEN_IDLE: f64 = 1.2;

/// The same when nothing says how late it is, and for an app that does not send most.
const OPEN_BESIDE: f64 = 1.06;

/// How long it may take until those who were refused are heard no more.
const PATIENCE: Duration = Duration::from_secs(1);

/// Sends in an interval below which it is something else that makes the core late.
const FEW: f64 = 25.0;

/// How quickly the pace of an app follows what it sends, in an interval.
const FOLLOW: f64 = 0.3;

/// An app that sends so much of what another one sends, sends as much: what is counted goes up and down.
const NEARLY: f64 = 0.9;

/// Bytes that cost about as much as another send: those of a packet.
const PACKET_BYTES: f64 = 1_200.0;

/// What an app sends, and may.
#[derive(Debug)]
struct OfApp {
    /// The part of its connections that may send.
    share: f64,
    /// Where on the circle that part begins, and when that was so.
    front: (f64, Duration),
    /// What it had sent in this interval: what is refused is read too.
    sent: f64,
    /// What it sends in an interval, smoothed.
    pace: f64,
}

impl OfApp {
    fn new(now: Duration) -> Self {
        Self { share: 1.0, front: (0.0, now), sent: 0.0, pace: 0.0 }
    }

    /// How long the open part takes to go round.
    fn round(&self) -> f64 {
        ROUND.as_secs_f64().max(TURN_MIN.as_secs_f64() / self.share)
    }

    fn front(&self, now: Duration) -> f64 {
        let (front, at) = self.front;
        (front + now.saturating_sub(at).as_secs_f64() / self.round()).fract()
    }

    /// How long a connection has to wait for its turn; `None`: it is on.
    fn until_turn(&self, connection: u64, now: Duration) -> Option<Duration> {
        if self.share >= 1.0 {
            return None;
        }
        let (place, front) = (place(connection), self.front(now));
        if (front - place).rem_euclid(1.0) < self.share {
            return None;
        }
        let wait = (place - front).rem_euclid(1.0) * self.round();
        Some(Duration::from_secs_f64(wait).clamp(WAIT_MIN, WAIT_MAX))
    }

    /// From now on this part may send: what comes in front of it is next, what is let go of was on for longest.
    fn set_share(&mut self, share: f64, now: Duration) {
        self.front = (self.front(now), now);
        self.share = share.clamp(SHARE_MIN, 1.0);
    }
}

/// Where on the circle a connection stands. Those that came one after the other stand far apart.
fn place(connection: u64) -> f64 {
    // A whole number of 53 bits, as a fraction.
    (connection.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1u64 << 53) as f64
}

/// A send that comes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offered {
    pub(super) app: AppId,
    /// The number of its connection.
    pub(super) connection: u64,
    pub(super) lane: Lane,
    pub(super) pseq: Pseq,
    pub(super) bytes: usize,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Turns {
    /// How late the core may be.
    wait: Duration,
    /// There is one for each app that ever sent; apps are those of the configuration.
    apps: BTreeMap<AppId, OfApp>,
    holds: Holds,
    /// When this interval began.
    began: Duration,
    /// Sends that came in it.
    came: f64,
    /// Of them, refused.
    refused: f64,
    /// The least lateness in it.
    least: Option<Duration>,
    /// That of the last interval.
    late: Duration,
    /// What was cut last shows from then on.
    shows: Duration,
}

impl Turns {
    /// Everybody may send.
    pub(super) const fn new(wait: Duration) -> Self {
        Self {
            wait,
            apps: BTreeMap::new(),
            holds: Holds::new(),
            began: Duration::ZERO,
            came: 0.0,
            refused: 0.0,
            least: None,
            late: Duration::ZERO,
            shows: Duration::ZERO,
        }
    }

    /// A packet that is read now has waited for so long.
    pub(super) fn looked(&mut self, late: Duration) {
        self.least = Some(self.least.map_or(late, |least| least.min(late)));
    }

    /// A send comes. Answers after how long it is to come again, if it is refused.
    pub(super) fn offer(&mut self, offered: Offered, now: Duration) -> Option<Duration> {
        self.go_on(now);
        self.came += 1.0;
        let Offered { app, connection, lane, pseq, bytes } = offered;
        let of_app = self.apps.entry(app).or_insert_with(|| OfApp::new(now));
        of_app.sent += 1.0 + bytes as f64 / PACKET_BYTES;
        if of_app.share < 1.0 || !self.holds.is_empty() {
            self.holds.let_go(now);
            if let Some((_, until)) = self.holds.before(lane, pseq) {
                self.refused += 1.0;
                return Some(until.saturating_sub(now).max(WAIT_MIN));
            }
            if let Some(wait) = of_app.until_turn(connection, now) {
                self.refused += 1.0;
                self.holds.hold(lane, pseq, now + wait);
                return Some(wait);
            }
            self.holds.back(lane, pseq);
        }
        None
    }

    /// Time has gone on: at the end of an interval it is decided who may send in the next. Answers whether one has ended.
    pub(super) fn go_on(&mut self, now: Duration) -> bool {
        let lasted = now.saturating_sub(self.began);
        if lasted < INTERVAL {
            return false;
        }
        let intervals = lasted.as_secs_f64() / INTERVAL.as_secs_f64();
        let follow = 1.0 - (1.0 - FOLLOW).powf(intervals);
        for app in self.apps.values_mut() {
            app.pace += (app.sent / intervals - app.pace) * follow;
            app.sent = 0.0;
        }
        let least = self.least.take();
        self.late = least.unwrap_or_default();
        let mut open = 1.0;
        if self.late > self.wait {
            // While most are refused, what makes it late had left before they were told.
            let patience = if self.refused > self.came / 2.0 { PATIENCE } else { Duration::ZERO };
            if now >= self.shows + patience && self.came / intervals >= FEW {
                self.cut(now);
                self.shows = now + self.late + INTERVAL;
            }
        } else if self.late <= self.wait.mul_f64(0.7) {
            open = match least {
                None => OPEN_BESIDE.powf(intervals),
                // A look at one moment says little of a long time.
                Some(least) if least <= self.wait / 8 => OPEN_IDLE.powf(intervals.min(2.0)),
                Some(_) => OPEN.powf(intervals),
            };
        }
        let most = self.most();
        for app in self.apps.values_mut().filter(|app| app.share < 1.0) {
            // Who was the greatest once need not wait until there is time for all.
            let beside = if app.pace < most { OPEN_BESIDE.powf(intervals) } else { 1.0 };
            app.set_share(app.share * open.max(beside), now);
        }
        self.refused = 0.0;
        self.came = 0.0;
        self.began = now;
        true
    }

    /// What an app sends that sends most, or nearly. Whoever sends less than its share is never one of them.
    fn most(&self) -> f64 {
        NEARLY * self.apps.values().map(|app| app.pace).fold(0.0, f64::max)
    }

    /// Fewer may send, of the apps that send most.
    fn cut(&mut self, now: Duration) {
        let (least, most) = CUT;
        let part = (self.wait.as_secs_f64() / self.late.as_secs_f64().max(1e-9)).sqrt().clamp(least, most);
        let most_sent = self.most();
        for app in self.apps.values_mut().filter(|app| app.pace >= most_sent) {
            app.set_share(app.share * part, now);
        }
    }

    /// How late the core was in the last interval, and the smallest part of an app's connections that may send.
    pub(super) fn state(&self) -> (Duration, f64) {
        (self.late, self.apps.values().map(|app| app.share).fold(1.0, f64::min))
    }
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::{ConversationId, DeviceId, Epoch, Producer, UserId};

    use super::*;

    const WAIT: Duration = ms(100);

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn send(app: &str, connection: u64, pseq: u64) -> Offered {
        let user = UserId::new(256 + connection).unwrap();
        let producer = Producer { user, device: DeviceId::FIRST, epoch: Epoch::FIRST };
        let lane = (ConversationId::new(256).unwrap(), producer);
        Offered { app: AppId::of(app), connection, lane, pseq: Pseq::new(pseq).unwrap(), bytes: 100 }
    }

    /// Connections of an app that each send one after the other, whatever becomes of them.
    struct Crowd {
        app: &'static str,
        first: u64,
        connections: u64,
        pseq: u64,
    }

    impl Crowd {
        fn new(app: &'static str, first: u64, connections: u64) -> Self {
            Self { app, first, connections, pseq: 0 }
        }

        /// How many of these sends are refused.
        fn flood(&mut self, turns: &mut Turns, sends: u64, now: Duration) -> u64 {
            let mut refused = 0;
            for n in 0..sends {
                self.pseq += u64::from(n % self.connections == 0);
                let connection = self.first + n % self.connections;
                refused += u64::from(turns.offer(send(self.app, connection, self.pseq), now).is_some());
            }
            refused
        }
    }

    /// So many intervals in which the core is so late, and 1 000 connections send.
    fn late(turns: &mut Turns, late: Duration, from: Duration, intervals: u32) -> Duration {
        let mut crowd = Crowd::new("flood", 1_000_000, 1_000);
        for n in 0..intervals {
            let now = from + INTERVAL * n;
            turns.looked(late);
            crowd.flood(turns, 1_000, now);
        }
        from + INTERVAL * intervals
    }

    #[test]
    fn fewer_may_send_while_it_is_late_and_more_when_it_is_not() {
        for (lateness, seconds, (least, most)) in [
            (ms(0), 5, (1.0, 1.0)),
            (ms(99), 5, (1.0, 1.0)),
            (ms(110), 1, (0.8, 0.95)),
            (ms(400), 1, (0.2, 0.5)),
            (ms(400), 30, (SHARE_MIN, SHARE_MIN)),
        ] {
            let mut turns = Turns::new(WAIT);
            let now = late(&mut turns, lateness, ms(100), 10 * seconds);
            let (_, share) = turns.state();
            assert!(share >= least && share <= most, "{lateness:?} for {seconds} s: {share}");
            for (lateness, seconds, (least, most)) in [
                // It is as it should be.
                (ms(90), 2, (share, share)),
                (ms(50), 1, (share, (share * 1.4).min(1.0))),
                (ms(5), 10, ((share * 300.0).min(1.0), 1.0)),
            ] {
                let mut turns = Turns { late: turns.late, began: turns.began, ..rebuilt(&turns) };
                late(&mut turns, lateness, now, 10 * seconds);
                let (_, then) = turns.state();
                assert!(then >= least - 1e-9 && then <= most + 1e-9, "{share}, {lateness:?}: {then}");
            }
        }
    }

    fn rebuilt(turns: &Turns) -> Turns {
        let mut new = Turns::new(turns.wait);
        for (app, of_app) in &turns.apps {
            new.apps.insert(*app, OfApp { ..*of_app });
        }
        new.shows = turns.shows;
        new
    }

    #[test]
    fn everybody_has_a_turn_and_is_told_when() {
        for share in [0.9, 0.5, 0.1] {
            let mut of_app = OfApp::new(ms(0));
            of_app.set_share(share, ms(0));
            let open = (0..1_000).filter(|n| of_app.until_turn(*n, ms(0)).is_none()).count();
            assert!((open as f64 / 1_000.0 - share).abs() < 0.01, "{open} of 1 000");
            for connection in 0..1_000 {
                let (mut now, mut asked) = (ms(0), 0);
                while let Some(wait) = of_app.until_turn(connection, now) {
                    now += wait + ms(1);
                    asked += 1;
                }
                assert!(now <= Duration::from_secs_f64(of_app.round()) + ms(10), "{now:?}");
                // Who would wait for longer comes before, in vain.
                assert!(asked <= 1 + now.as_millis() / WAIT_MAX.as_millis(), "{asked} times, {now:?}");
                // A turn is as long as it is to be.
                let later = of_app.until_turn(connection, now + TURN_MIN.mul_f64(0.9));
                assert!(asked == 0 || later.is_none(), "{share}");
            }
        }
    }

    #[test]
    fn what_follows_a_refused_send_waits_for_it_even_in_its_turn() {
        let mut turns = Turns::new(WAIT);
        let now = late(&mut turns, ms(400), ms(100), 30);
        turns.go_on(now);
        let of_app = turns.apps.get(&AppId::of("flood")).unwrap();
        let (one, wait) = (1..1_000).find_map(|n| of_app.until_turn(n, now).map(|wait| (n, wait))).unwrap();
        assert_eq!(turns.offer(send("flood", one, 5), now), Some(wait));
        assert!(turns.offer(send("flood", one, 6), now).is_some());
        turns.apps.get_mut(&AppId::of("flood")).unwrap().set_share(1.0, now);
        assert!(turns.offer(send("flood", one, 7), now).is_some(), "5 is not back");
        assert_eq!(turns.offer(send("flood", one, 4), now), None, "it was there before");
        assert!(turns.offer(send("flood", one, 7), now).is_some());
        assert_eq!([5, 6, 7].map(|pseq| turns.offer(send("flood", one, pseq), now)), [None; 3]);
        assert_eq!(turns.offer(send("flood", one + 1, 9), now), None, "another lane");
    }

    #[test]
    fn an_app_within_its_share_is_never_refused() {
        let mut turns = Turns::new(WAIT);
        let (mut quiet, mut flood) = (Crowd::new("quiet", 1, 100), Crowd::new("flood", 1_000, 100));
        let mut refused = (0, 0);
        for n in 1..=600 {
            let (_, share) = turns.state();
            turns.looked(ms(if share > 0.3 { 300 } else { 60 }));
            for part in 0..10 {
                let now = ms(100 * n + 10 * part);
                refused.0 += quiet.flood(&mut turns, 30, now);
                refused.1 += flood.flood(&mut turns, 300, now);
            }
        }
        assert_eq!(refused.0, 0);
        assert!(refused.1 > 600 * 3_000 / 10, "{refused:?}");
    }

    #[test]
    fn one_that_was_loud_is_soon_heard_again_beside_another() {
        let mut turns = Turns::new(WAIT);
        let (mut one, mut other) = (Crowd::new("one", 1, 100), Crowd::new("other", 1_000, 100));
        let mut share = |turns: &mut Turns, one_sends: u64, seconds: std::ops::Range<u64>| {
            for n in 10 * seconds.start + 1..=10 * seconds.end {
                turns.looked(ms(300));
                one.flood(turns, one_sends, ms(100 * n));
                other.flood(turns, 300, ms(100 * n));
            }
            turns.apps[&AppId::of("one")].share
        };
        assert!(share(&mut turns, 3_000, 0..10) < 0.2);
        assert!(share(&mut turns, 100, 10..23) >= 1.0);
    }

    #[test]
    fn a_core_that_something_else_makes_late_refuses_nobody() {
        let mut turns = Turns::new(WAIT);
        let mut crowd = Crowd::new("chat", 1, 20);
        for n in 1..=100 {
            turns.looked(ms(500));
            assert_eq!(crowd.flood(&mut turns, 20, ms(100 * n)), 0);
        }
    }

    #[test]
    fn a_pause_ends_it() {
        let mut turns = Turns::new(WAIT);
        let now = late(&mut turns, ms(800), ms(100), 50);
        assert!(turns.state().1 < 0.2);
        turns.go_on(now + Duration::from_secs(10));
        assert_eq!(turns.state(), (Duration::ZERO, 1.0));
        assert_eq!(Crowd::new("flood", 5_000_000, 1_000).flood(&mut turns, 1_000, now + ms(10_050)), 0);
    }
}

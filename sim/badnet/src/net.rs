//! What a bad network does to packets, decided one packet at a time.
//!
//! - A [`Link`] is one direction. It is told the time and is given its chance, and answers with a [`Verdict`]: it
//!   knows no socket and no clock, so the same model serves the real-time proxy and a world in virtual time.
//! - Without reordering a link is first in, first out, whatever the jitter does: a delayed packet delays those
//!   behind it, as in a queue.
//! - With a [`Rate`], bits never leave faster than the rate, and at most `queue_bytes` wait; what comes on top is
//!   dropped, as by a router. A packet that is lost later has used its share of the rate all the same.
//! - A link keeps a fixed number of bytes of state, however much is offered.
//!
//! Not here: the named profiles (`profile`), which packet meets which link (`proxy`), addresses and their changes.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use crate::rng::{Rng, Share};
use crate::time::{SimTime, duration_of, nanos_of};

/// The second copy of a duplicated packet comes at most this much after the first.
pub const DUPLICATE_LAG_MAX: Duration = Duration::from_millis(5);

/// How long a packet travels, apart from waiting for bandwidth.
///
/// The delay is drawn from a curve (delay over share of draws, straight between its points), and `jitter` more is
/// added per packet, evenly from nothing to all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delay {
    curve: Arc<[(Share, Duration)]>,
    lasts: Duration,
    jitter: Duration,
}

/// A delay curve that is no curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a delay curve needs 1 to {CURVE_POINTS_MAX} points, rising in share and never falling in delay")]
pub struct BadCurve;

/// Points a delay curve may have.
pub const CURVE_POINTS_MAX: usize = 64;

impl Delay {
    /// No delay.
    #[must_use]
    pub fn none() -> Self {
        Self::fixed(Duration::ZERO)
    }

    /// The same for every packet.
    #[must_use]
    pub fn fixed(delay: Duration) -> Self {
        Self { curve: Arc::new([(Share::NONE, delay)]), lasts: Duration::ZERO, jitter: Duration::ZERO }
    }

    /// From a quantile curve: `(share, delay)` says that this share of all draws is at most this delay. Below the
    /// first and above the last point the curve is flat.
    ///
    /// # Errors
    /// [`BadCurve`] when there is no point or more than [`CURVE_POINTS_MAX`], the shares don't rise or a delay falls.
    pub fn quantiles(points: &[(Share, Duration)]) -> Result<Self, BadCurve> {
        let rising =
            points.iter().zip(points.iter().skip(1)).all(|(low, high)| low.0 < high.0 && low.1 <= high.1);
        if points.is_empty() || points.len() > CURVE_POINTS_MAX || !rising {
            return Err(BadCurve);
        }
        Ok(Self { curve: points.into(), lasts: Duration::ZERO, jitter: Duration::ZERO })
    }

    /// Adds up to `jitter` per packet.
    #[must_use]
    pub fn with_jitter(mut self, jitter: Duration) -> Self {
        self.jitter = jitter;
        self
    }

    /// Keeps one draw from the curve for about `mean` (exponential), as a cell or a queue elsewhere would, instead
    /// of drawing for every packet.
    #[must_use]
    pub fn redrawn_every(mut self, mean: Duration) -> Self {
        self.lasts = mean;
        self
    }

    fn at(&self, share: Share) -> Duration {
        let mut low = None;
        for &(point, delay) in self.curve.iter() {
            if point < share {
                low = Some((point, delay));
                continue;
            }
            let Some((from, base)) = low else { return delay };
            let span = u64::from(point.as_millionths() - from.as_millionths());
            let into = u64::from(share.as_millionths() - from.as_millionths());
            let rise =
                u128::from(nanos_of(delay.saturating_sub(base))) * u128::from(into) / u128::from(span.max(1));
            return base + duration_of(u64::try_from(rise).unwrap_or(u64::MAX));
        }
        low.map_or(Duration::ZERO, |(_, delay)| delay)
    }
}

impl Default for Delay {
    fn default() -> Self {
        Self::none()
    }
}

/// Packets that vanish on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Lost one by one, independently, outside bursts.
    pub random: Share,
    /// Lost in bursts (Gilbert-Elliott), if at all.
    pub burst: Option<Burst>,
}

impl Loss {
    /// Independent loss only.
    #[must_use]
    pub const fn random(share: Share) -> Self {
        Self { random: share, burst: None }
    }

    /// The share that is lost in the long run.
    #[must_use]
    pub fn mean(&self) -> Share {
        let Some(burst) = self.burst else { return self.random };
        let [enter, leave, inside, outside] =
            [burst.enter, burst.leave, burst.loss, self.random].map(|s| u64::from(s.as_millionths()));
        let lost = (enter * inside + leave * outside).checked_div(enter + leave).unwrap_or(outside);
        Share::millionths(u32::try_from(lost).unwrap_or(u32::MAX))
    }
}

/// The bad state of a Gilbert-Elliott model; chances are per packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Burst {
    /// Chance to fall into a burst.
    pub enter: Share,
    /// Chance to come out again; its inverse is the mean length of a burst in packets.
    pub leave: Share,
    /// Share lost while inside.
    pub loss: Share,
}

/// Packets that are overtaken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reorder {
    /// Share of the packets that is held back while others pass.
    pub share: Share,
    /// Held back for at most this long, evenly from nothing.
    pub hold: Duration,
}

/// A bottleneck with a queue before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bits that leave per second.
    pub bits_per_second: NonZeroU64,
    /// Bytes that may wait, the packet on the wire included. What does not fit is dropped; a packet that finds the
    /// queue empty always fits.
    pub queue_bytes: u64,
}

impl Rate {
    /// `kbit` thousand bits per second (at least one), with a queue of `queue_bytes`.
    #[must_use]
    pub const fn kbit(kbit: u64, queue_bytes: u64) -> Self {
        let bits_per_second = match NonZeroU64::new(kbit.saturating_mul(1_000)) {
            Some(bits) => bits,
            None => NonZeroU64::MIN,
        };
        Self { bits_per_second, queue_bytes }
    }

    /// How long `bytes` occupy the wire, rounded up so that the rate is never exceeded.
    fn takes(self, bytes: u64) -> Duration {
        let nanos = (u128::from(bytes) * 8_000_000_000).div_ceil(u128::from(self.bits_per_second.get()));
        duration_of(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Spells in which nothing gets through, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DarkSpells {
    /// Mean time of light between two spells (exponential).
    pub every: Duration,
    /// How long each spell lasts.
    pub lasts: Duration,
}

/// Everything that one direction of a path does to packets. The default does nothing.
///
/// ```
/// use std::time::Duration;
/// use fulmar_badnet::net::{Delay, Impairment, Loss};
/// use fulmar_badnet::Share;
/// let direction = Impairment {
///     delay: Delay::fixed(Duration::from_millis(50)).with_jitter(Duration::from_millis(10)),
///     loss: Loss::random(Share::percent(5)),
///     ..Impairment::default()
/// };
/// assert_eq!(direction.loss.mean(), Share::percent(5));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Impairment {
    /// Time of travel.
    pub delay: Delay,
    /// Packets lost.
    pub loss: Loss,
    /// Packets overtaken.
    pub reorder: Reorder,
    /// Share of the packets that arrives twice.
    pub duplicate: Share,
    /// Share of the packets that arrives with one bit turned over.
    pub corrupt: Share,
    /// Bandwidth; `None` is unlimited.
    pub rate: Option<Rate>,
    /// Largest packet (UDP payload, bytes) that gets through; larger ones vanish. `None` lets all through.
    pub mtu: Option<usize>,
    /// Spells without any connection.
    pub dark: Option<DarkSpells>,
}

/// Both directions of a path between a client and the gateway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Client to gateway.
    pub up: Impairment,
    /// Gateway to client.
    pub down: Impairment,
}

impl Path {
    /// The same both ways.
    #[must_use]
    pub fn symmetric(direction: Impairment) -> Self {
        Self { up: direction.clone(), down: direction }
    }
}

/// Why a packet did not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropCause {
    /// Random or bursty loss.
    Lost,
    /// The queue before the bottleneck was full.
    QueueFull,
    /// A blackout, a dark spell or a cut.
    Dark,
    /// Larger than the path's MTU.
    TooLarge,
}

/// When a packet arrives, and as what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// When it arrives; never before it was offered.
    pub at: SimTime,
    /// When its second copy arrives, if there is one; never before the first.
    pub again_at: Option<SimTime>,
    /// The bit that is turned over on the way (counted from the packet's first byte), below `8 * packet_len`.
    pub flipped_bit: Option<u64>,
}

/// What becomes of one packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does not arrive.
    Drop(DropCause),
    /// It arrives.
    Deliver(Arrival),
}

/// One direction of a path and the state it is in.
///
/// ```
/// use std::time::Duration;
/// use fulmar_badnet::net::{Delay, Impairment, Link, Verdict};
/// use fulmar_badnet::{Rng, SimTime};
/// let mut link = Link::new(Impairment {
///     delay: Delay::fixed(Duration::from_millis(20)),
///     ..Impairment::default()
/// });
/// let verdict = link.offer(SimTime::START, 1_200, &mut Rng::new(1));
/// assert!(matches!(verdict, Verdict::Deliver(arrival) if arrival.at == SimTime::from_millis(20)));
/// ```
#[derive(Clone, Debug)]
pub struct Link {
    impairment: Impairment,
    /// When the bottleneck has sent all it holds.
    busy_until: SimTime,
    /// The latest arrival among packets that keep their order.
    last_arrival: SimTime,
    in_burst: bool,
    travel: Duration,
    travel_until: SimTime,
    spell: Option<Spell>,
    dark_until: SimTime,
    cut: bool,
}

#[derive(Clone, Copy, Debug)]
struct Spell {
    from: SimTime,
    to: SimTime,
}

/// Dark spells drawn for one packet before a long silence is skipped: bounds the work of one call.
const SPELLS_PER_OFFER_MAX: u32 = 64;

impl Link {
    /// An idle link.
    #[must_use]
    pub fn new(impairment: Impairment) -> Self {
        Self {
            impairment,
            busy_until: SimTime::START,
            last_arrival: SimTime::START,
            in_burst: false,
            travel: Duration::ZERO,
            travel_until: SimTime::START,
            spell: None,
            dark_until: SimTime::START,
            cut: false,
        }
    }

    /// What the link does to packets now.
    #[must_use]
    pub fn impairment(&self) -> &Impairment {
        &self.impairment
    }

    /// From now on the link does this. What was offered before keeps its verdict, and order is kept across the
    /// change.
    pub fn set(&mut self, impairment: Impairment) {
        self.impairment = impairment;
        self.in_burst = false;
        self.travel_until = SimTime::START;
        self.spell = None;
    }

    /// Nothing gets through before `until`. A later end replaces an earlier one, never the other way round.
    pub fn black_out(&mut self, until: SimTime) {
        self.dark_until = self.dark_until.max(until);
    }

    /// Cuts the direction (`true`) or mends it (`false`). Mending does not end a blackout.
    pub fn set_cut(&mut self, cut: bool) {
        self.cut = cut;
    }

    /// Decides about a packet of `packet_len` bytes that enters at `now`. Calls must not go back in time.
    pub fn offer(&mut self, now: SimTime, packet_len: usize, rng: &mut Rng) -> Verdict {
        let in_spell = self.in_dark_spell(now, rng);
        if self.cut || now < self.dark_until || in_spell {
            return Verdict::Drop(DropCause::Dark);
        }
        if self.impairment.mtu.is_some_and(|mtu| packet_len > mtu) {
            return Verdict::Drop(DropCause::TooLarge);
        }
        let bytes = u64::try_from(packet_len).unwrap_or(u64::MAX);
        let Some(leaves) = self.pass_bottleneck(now, bytes) else {
            return Verdict::Drop(DropCause::QueueFull);
        };
        if self.loses(rng) {
            return Verdict::Drop(DropCause::Lost);
        }
        let mut at = leaves + self.draw_travel(now, rng);
        let Reorder { share, hold } = self.impairment.reorder;
        if rng.chance(share) {
            at = at + rng.duration(Duration::ZERO, hold);
        } else {
            at = at.max(self.last_arrival);
            self.last_arrival = at;
        }
        let again_at = rng
            .chance(self.impairment.duplicate)
            .then(|| at + rng.duration(Duration::ZERO, DUPLICATE_LAG_MAX));
        let corrupted = rng.chance(self.impairment.corrupt) && bytes > 0;
        let flipped_bit = corrupted.then(|| rng.below(bytes.saturating_mul(8)));
        Verdict::Deliver(Arrival { at, again_at, flipped_bit })
    }

    /// When the last bit of the packet has left the bottleneck; `None` when it does not fit into the queue.
    fn pass_bottleneck(&mut self, now: SimTime, bytes: u64) -> Option<SimTime> {
        let Some(rate) = self.impairment.rate else { return Some(now) };
        let waiting = self.busy_until.since(now);
        if !waiting.is_zero() {
            let room = rate.takes(rate.queue_bytes);
            if waiting + rate.takes(bytes) > room {
                return None;
            }
        }
        self.busy_until = self.busy_until.max(now) + rate.takes(bytes);
        Some(self.busy_until)
    }

    fn loses(&mut self, rng: &mut Rng) -> bool {
        let Loss { random, burst } = self.impairment.loss;
        if let Some(burst) = burst {
            let turns = rng.chance(if self.in_burst { burst.leave } else { burst.enter });
            self.in_burst ^= turns;
            if self.in_burst {
                return rng.chance(burst.loss);
            }
        }
        rng.chance(random)
    }

    fn draw_travel(&mut self, now: SimTime, rng: &mut Rng) -> Duration {
        let delay = &self.impairment.delay;
        if now >= self.travel_until {
            let share = Share::millionths(u32::try_from(rng.below(1_000_001)).unwrap_or(0));
            self.travel = delay.at(share);
            self.travel_until = if delay.lasts.is_zero() { now } else { now + rng.exponential(delay.lasts) };
        }
        self.travel + rng.duration(Duration::ZERO, delay.jitter)
    }

    fn in_dark_spell(&mut self, now: SimTime, rng: &mut Rng) -> bool {
        let Some(DarkSpells { every, lasts }) = self.impairment.dark else { return false };
        let mut draw = |light_from: SimTime| {
            let from = light_from + rng.exponential(every);
            Spell { from, to: from + lasts }
        };
        let mut spell = self.spell.unwrap_or_else(|| draw(now));
        for _ in 0..SPELLS_PER_OFFER_MAX {
            if now < spell.to {
                break;
            }
            spell = draw(spell.to);
        }
        if now >= spell.to {
            // Silent for so long that the spells in between met no packet: go on from here.
            spell = draw(now);
        }
        self.spell = Some(spell);
        spell.from <= now && now < spell.to
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rng::Rng;

    const MS: Duration = Duration::from_millis(1);

    fn arrival(verdict: Verdict) -> Option<Arrival> {
        match verdict {
            Verdict::Deliver(arrival) => Some(arrival),
            Verdict::Drop(_) => None,
        }
    }

    #[test]
    fn each_impairment_alone() {
        let none = Impairment::default();
        let at = |ms| {
            Verdict::Deliver(Arrival { at: SimTime::from_millis(ms), again_at: None, flipped_bit: None })
        };
        for (what, impairment, len, want) in [
            ("nothing", none.clone(), 1_200, at(0)),
            ("delay", Impairment { delay: Delay::fixed(50 * MS), ..none.clone() }, 1_200, at(50)),
            ("mtu, fits", Impairment { mtu: Some(1_200), ..none.clone() }, 1_200, at(0)),
            (
                "mtu, too large",
                Impairment { mtu: Some(1_200), ..none.clone() },
                1_201,
                Verdict::Drop(DropCause::TooLarge),
            ),
            // 1000 bytes at 80 kbit/s: 100 ms on the wire.
            ("rate", Impairment { rate: Some(Rate::kbit(80, 1_000)), ..none.clone() }, 1_000, at(100)),
            (
                "an empty queue takes any packet",
                Impairment { rate: Some(Rate::kbit(80, 10)), ..none.clone() },
                1_000,
                at(100),
            ),
            (
                "loss",
                Impairment { loss: Loss::random(Share::ALL), ..none.clone() },
                9,
                Verdict::Drop(DropCause::Lost),
            ),
            (
                "burst",
                Impairment {
                    loss: Loss {
                        random: Share::NONE,
                        burst: Some(Burst { enter: Share::ALL, leave: Share::NONE, loss: Share::ALL }),
                    },
                    ..none.clone()
                },
                9,
                Verdict::Drop(DropCause::Lost),
            ),
            (
                "dark",
                Impairment { dark: Some(DarkSpells { every: Duration::ZERO, lasts: MS }), ..none.clone() },
                9,
                Verdict::Drop(DropCause::Dark),
            ),
        ] {
            assert_eq!(Link::new(impairment).offer(SimTime::START, len, &mut Rng::new(1)), want, "{what}");
        }
    }

    #[test]
    fn duplicates_corruption_and_reordering_happen() {
        let mut rng = Rng::new(3);
        let mut twice =
            Link::new(Impairment { duplicate: Share::ALL, corrupt: Share::ALL, ..Impairment::default() });
        let got = arrival(twice.offer(SimTime::from_millis(4), 2, &mut rng)).unwrap();
        assert!(got.again_at.unwrap() >= got.at);
        assert!(got.flipped_bit.unwrap() < 16);
        assert!(arrival(twice.offer(SimTime::from_millis(4), 0, &mut rng)).unwrap().flipped_bit.is_none());
        let mut link = Link::new(Impairment {
            reorder: Reorder { share: Share::percent(20), hold: 30 * MS },
            ..Impairment::default()
        });
        let arrivals: Vec<_> = (0..500)
            .filter_map(|n| arrival(link.offer(SimTime::from_millis(n), 100, &mut rng)))
            .map(|a| a.at)
            .collect();
        let overtaken = arrivals.windows(2).filter(|pair| pair[1] < pair[0]).count();
        assert!((20..200).contains(&overtaken), "{overtaken}");
    }

    #[test]
    fn blackouts_and_cuts_end() {
        let mut rng = Rng::new(1);
        let mut link = Link::new(Impairment::default());
        link.black_out(SimTime::from_millis(100));
        link.black_out(SimTime::from_millis(50));
        assert_eq!(link.offer(SimTime::from_millis(99), 1, &mut rng), Verdict::Drop(DropCause::Dark));
        assert!(arrival(link.offer(SimTime::from_millis(100), 1, &mut rng)).is_some());
        link.set_cut(true);
        assert_eq!(link.offer(SimTime::from_millis(200), 1, &mut rng), Verdict::Drop(DropCause::Dark));
        link.set_cut(false);
        assert!(arrival(link.offer(SimTime::from_millis(201), 1, &mut rng)).is_some());
    }

    #[test]
    fn dark_spells_take_their_share_of_the_time() {
        let mut rng = Rng::new(9);
        let mut link = Link::new(Impairment {
            dark: Some(DarkSpells { every: 1_800 * MS, lasts: 200 * MS }),
            ..Impairment::default()
        });
        let dark = (0..100_000)
            .filter(|n| {
                link.offer(SimTime::from_millis(n * 10), 1, &mut rng) == Verdict::Drop(DropCause::Dark)
            })
            .count();
        assert!((9_000..11_000).contains(&dark), "{dark}");
        // A silence of a century costs a bounded number of draws.
        link.offer(SimTime::from_millis(3_000_000_000_000), 1, &mut rng);
    }

    #[test]
    fn a_delay_curve_is_met() {
        let points = [
            (Share::percent(50), 175 * MS),
            (Share::percent(95), 362 * MS),
            (Share::percent(99), 1_150 * MS),
        ];
        let delay = Delay::quantiles(&points).unwrap();
        assert_eq!(delay.at(Share::NONE), 175 * MS);
        assert_eq!(delay.at(Share::percent(50)), 175 * MS);
        assert_eq!(delay.at(Share::percent(97)), 756 * MS);
        assert_eq!(delay.at(Share::ALL), 1_150 * MS);
        assert_eq!(Delay::quantiles(&[]), Err(BadCurve));
        assert_eq!(Delay::quantiles(&[(Share::ALL, MS), (Share::NONE, MS)]), Err(BadCurve));
        assert_eq!(Delay::quantiles(&[(Share::NONE, 2 * MS), (Share::ALL, MS)]), Err(BadCurve));
        let mut rng = Rng::new(4);
        // Spaced so widely that no packet waits for the one before.
        let mut link = Link::new(Impairment { delay, ..Impairment::default() });
        let mut delays: Vec<_> = (0..20_000)
            .filter_map(|n| {
                let now = SimTime::from_millis(n * 2_000);
                arrival(link.offer(now, 1, &mut rng)).map(|a| a.at.since(now))
            })
            .collect();
        delays.sort_unstable();
        let p95 = delays[19_000];
        assert!(p95 > 340 * MS && p95 < 390 * MS, "{p95:?}");
    }

    #[test]
    fn a_held_delay_stays_for_a_while() {
        let curve = [(Share::NONE, Duration::ZERO), (Share::ALL, 1_000 * MS)];
        let delay = Delay::quantiles(&curve).unwrap().redrawn_every(500 * MS);
        let mut link = Link::new(Impairment { delay, ..Impairment::default() });
        let mut rng = Rng::new(8);
        let mut travels = Vec::new();
        for n in 0..1_000u64 {
            link.offer(SimTime::from_millis(n * 10), 1, &mut rng);
            travels.push(link.travel);
        }
        travels.dedup();
        assert!((8..60).contains(&travels.len()), "{} draws in 10 s", travels.len());
    }

    #[test]
    fn loss_comes_near_its_share() {
        let burst = Burst { enter: Share::percent(1), leave: Share::percent(20), loss: Share::percent(80) };
        for (what, loss) in [
            ("random 1 %", Loss::random(Share::percent(1))),
            ("random 30 %", Loss::random(Share::percent(30))),
            ("bursts", Loss { random: Share::NONE, burst: Some(burst) }),
            ("both", Loss { random: Share::percent(2), burst: Some(burst) }),
        ] {
            let mut rng = Rng::new(11);
            let mut link = Link::new(Impairment { loss, ..Impairment::default() });
            let lost = (0..200_000u64)
                .filter(|n| {
                    link.offer(SimTime::from_nanos(*n), 9, &mut rng) == Verdict::Drop(DropCause::Lost)
                })
                .count();
            let want = usize::try_from(loss.mean().as_millionths()).unwrap() / 5;
            assert!(lost.abs_diff(want) < want / 10 + 50, "{what}: {lost} lost, {want} expected");
        }
    }

    #[test]
    fn losses_in_bursts_come_together() {
        let mut rng = Rng::new(12);
        let burst = Burst { enter: Share::percent(1), leave: Share::percent(10), loss: Share::ALL };
        let mut link = Link::new(Impairment {
            loss: Loss { random: Share::NONE, burst: Some(burst) },
            ..Impairment::default()
        });
        let fate: Vec<bool> = (0..100_000u64)
            .map(|n| arrival(link.offer(SimTime::from_nanos(n), 9, &mut rng)).is_none())
            .collect();
        let lost = fate.iter().filter(|lost| **lost).count();
        let bursts = fate.windows(2).filter(|pair| !pair[0] && pair[1]).count();
        let mean_len = lost / bursts;
        assert!((8..13).contains(&mean_len), "{mean_len} packets per burst");
    }

    fn share() -> impl Strategy<Value = Share> {
        (0u32..=300_000).prop_map(Share::millionths)
    }

    prop_compose! {
        fn impairment()(
            base in 0u64..300,
            jitter in 0u64..200,
            lasts in 0u64..500,
            random in share(),
            burst in proptest::option::of((share(), share(), share())),
            duplicate in share(),
            rate in proptest::option::of((8u64..5_000, 0u64..200_000)),
            dark in proptest::option::of((1u64..5_000, 1u64..1_000)),
        ) -> Impairment {
            let ms = Duration::from_millis;
            Impairment {
                delay: Delay::fixed(ms(base)).with_jitter(ms(jitter)).redrawn_every(ms(lasts)),
                loss: Loss { random, burst: burst.map(|(enter, leave, loss)| Burst { enter, leave, loss }) },
                duplicate,
                rate: rate.map(|(kbit, queue)| Rate::kbit(kbit, queue)),
                dark: dark.map(|(every, lasts)| DarkSpells { every: ms(every), lasts: ms(lasts) }),
                ..Impairment::default()
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn fifo_without_reordering_and_never_early(
            first in impairment(), second in impairment(), seed: u64,
            gaps in proptest::collection::vec((0u64..20_000_000, 1usize..1_500), 1..300),
        ) {
            let mut rng = Rng::new(seed);
            let mut link = Link::new(first);
            let mut now = SimTime::START;
            let mut last = SimTime::START;
            for (n, (gap, len)) in gaps.iter().enumerate() {
                now = now + Duration::from_nanos(*gap);
                if n == gaps.len() / 2 {
                    link.set(second.clone());
                }
                if let Some(arrival) = arrival(link.offer(now, *len, &mut rng)) {
                    prop_assert!(arrival.at >= last && arrival.at >= now);
                    prop_assert!(arrival.again_at.is_none_or(|again| again >= arrival.at));
                    last = arrival.at;
                }
            }
        }

        #[test]
        fn the_rate_is_never_exceeded_and_the_queue_is_finite(
            kbit in 8u64..5_000, queue in 1_500u64..100_000, seed: u64,
            gaps in proptest::collection::vec((0u64..5_000_000, 1usize..1_500), 1..400),
        ) {
            let rate = Rate::kbit(kbit, queue);
            let mut rng = Rng::new(seed);
            let mut link = Link::new(Impairment { rate: Some(rate), ..Impairment::default() });
            let mut now = SimTime::START;
            let mut through: Vec<(SimTime, u64)> = Vec::new();
            for (gap, len) in gaps {
                now = now + Duration::from_nanos(gap);
                if let Some(arrival) = arrival(link.offer(now, len, &mut rng)) {
                    prop_assert!(arrival.at.since(now) <= rate.takes(queue.max(1_500)) + Duration::from_nanos(2));
                    through.push((arrival.at, len as u64));
                }
            }
            // Over any stretch of departures: what left after the first took at least its time at the rate.
            for (n, (from, _)) in through.iter().enumerate() {
                let mut bytes = 0;
                for (to, len) in through.iter().skip(n + 1) {
                    bytes += len;
                    prop_assert!(to.since(*from) + Duration::from_nanos(1) >= rate.takes(bytes));
                }
            }
        }

        #[test]
        fn a_seed_repeats(impairment in impairment(), seed: u64) {
            let run = || {
                let mut rng = Rng::new(seed);
                let mut link = Link::new(impairment.clone());
                (0..100).map(|n| link.offer(SimTime::from_millis(n), 100, &mut rng)).collect::<Vec<_>>()
            };
            prop_assert_eq!(run(), run());
        }
    }
}

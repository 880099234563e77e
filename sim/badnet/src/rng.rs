//! The one source of chance in a simulated world.
//!
//! - Equal seeds give equal numbers on every machine and with every version of this crate: the generator
//!   (xoshiro256++, seeded by SplitMix64) is written out here and pinned by a test, and nothing in it rounds.
//! - [`Rng::fork`] depends on the seed and the label only, never on how much was drawn before, so one more draw in
//!   one part of the world does not change the others.
//!
//! Not here: secrets. These numbers are predictable on purpose.

use std::time::Duration;

use crate::time::{duration_of, nanos_of};

/// A share of a whole in millionths, from 0 to 1. Exact, so that a seed means the same everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u32);

impl Share {
    /// Never.
    pub const NONE: Self = Self(0);
    /// Always.
    pub const ALL: Self = Self(1_000_000);

    /// `millionths` of the whole; anything above one million is the whole.
    #[must_use]
    pub const fn millionths(millionths: u32) -> Self {
        if millionths > 1_000_000 { Self::ALL } else { Self(millionths) }
    }

    /// `percent` of the whole; anything above 100 is the whole.
    #[must_use]
    pub const fn percent(percent: u32) -> Self {
        if percent > 100 { Self::ALL } else { Self(percent * 10_000) }
    }

    /// The share in millionths.
    #[must_use]
    pub const fn as_millionths(self) -> u32 {
        self.0
    }
}

/// A seeded source of numbers. Cheap to clone; a clone repeats what the original would have drawn.
///
/// ```
/// use fulmar_badnet::Rng;
/// let (mut a, mut b) = (Rng::new(7), Rng::new(7));
/// assert_eq!(a.next_u64(), b.next_u64());
/// assert!(a.below(10) < 10);
/// ```
#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    state: [u64; 4],
}

impl Rng {
    /// The sequence that belongs to `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut walk = seed;
        let state = [split_mix(&mut walk), split_mix(&mut walk), split_mix(&mut walk), split_mix(&mut walk)];
        Self { seed, state }
    }

    /// An independent sequence for one part of the world; depends on the seed and `label` alone.
    #[must_use]
    pub fn fork(&self, label: u64) -> Self {
        let mut walk = self.seed ^ label.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        Self::new(split_mix(&mut walk))
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let drawn = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        drawn
    }

    /// A number below `bound`, each as likely (up to 2^-64 per number); 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        let wide = u128::from(self.next_u64()) * u128::from(bound);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// A number from `low` to `high`, both possible; `low` when they are the wrong way round.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        let span = high.saturating_sub(low);
        low + if span == u64::MAX { self.next_u64() } else { self.below(span + 1) }
    }

    /// True in `share` of all draws.
    pub fn chance(&mut self, share: Share) -> bool {
        // Drawn even for 0 and 1: turning one impairment off does not shift the numbers of the others.
        self.below(1_000_000) < u64::from(share.0)
    }

    /// A duration from `low` to `high`, to the nanosecond.
    pub fn duration(&mut self, low: Duration, high: Duration) -> Duration {
        duration_of(self.between(nanos_of(low), nanos_of(high)))
    }

    /// A waiting time without memory (exponential) that lasts `mean` on average.
    pub fn exponential(&mut self, mean: Duration) -> Duration {
        // Von Neumann's comparison method: no logarithm, hence no rounding that differs between machines.
        let mut whole: u128 = 0;
        let fraction = loop {
            let first = self.next_u64() >> 32;
            let mut smallest = first;
            let mut run = 1u32;
            loop {
                let next = self.next_u64() >> 32;
                if next >= smallest {
                    break;
                }
                smallest = next;
                run += 1;
            }
            if run % 2 == 1 {
                break first;
            }
            whole += 1;
        };
        let scaled = ((whole << 32) + u128::from(fraction)) * u128::from(nanos_of(mean));
        duration_of(u64::try_from(scaled >> 32).unwrap_or(u64::MAX))
    }

    /// One of `items`, each as likely; `None` when there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        let at = self.below(u64::try_from(items.len()).unwrap_or(u64::MAX));
        items.get(usize::try_from(at).unwrap_or(usize::MAX))
    }

    /// Puts `items` into an order in which every permutation is as likely.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.between(0, u64::try_from(last).unwrap_or(u64::MAX));
            items.swap(last, usize::try_from(other).unwrap_or(last));
        }
    }
}

fn split_mix(walk: &mut u64) -> u64 {
    *walk = walk.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *walk;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_for_good() {
        // SplitMix64 from 0 has published outputs; the rest is pinned so that kept seeds stay meaningful.
        let mut walk = 0;
        assert_eq!(split_mix(&mut walk), 0xe220_a839_7b1d_cdaf);
        assert_eq!(split_mix(&mut walk), 0x6e78_9e6a_a1b9_65f4);
        let mut rng = Rng { seed: 0, state: [1, 2, 3, 4] };
        let drawn: Vec<u64> = (0..4).map(|_| rng.next_u64()).collect();
        // The reference sequence of xoshiro256++ from the state 1, 2, 3, 4.
        assert_eq!(drawn, [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386]);
    }

    #[test]
    fn forks_do_not_depend_on_what_was_drawn() {
        let mut drawn = Rng::new(5);
        drawn.next_u64();
        assert_eq!(drawn.fork(3).next_u64(), Rng::new(5).fork(3).next_u64());
        assert_ne!(Rng::new(5).fork(3).next_u64(), Rng::new(5).fork(4).next_u64());
        assert_ne!(Rng::new(5).fork(0).next_u64(), Rng::new(5).next_u64());
    }

    #[test]
    fn chances_and_means_come_out() {
        let mut rng = Rng::new(1);
        let hits = (0..100_000).filter(|_| rng.chance(Share::percent(5))).count();
        assert!((4_700..5_300).contains(&hits), "{hits}");
        let mean = Duration::from_millis(10);
        let total: Duration = (0..100_000).map(|_| rng.exponential(mean)).sum();
        let average = total / 100_000;
        assert!(average > mean.mul_f64(0.98) && average < mean.mul_f64(1.02), "{average:?}");
        assert_eq!((0..1_000).filter(|_| rng.chance(Share::NONE)).count(), 0);
        assert_eq!((0..1_000).filter(|_| rng.chance(Share::ALL)).count(), 1_000);
    }

    #[test]
    fn edges_of_ranges() {
        let mut rng = Rng::new(2);
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
        assert_eq!(rng.between(7, 7), 7);
        assert_eq!(rng.between(7, 3), 7);
        assert_eq!(rng.pick::<u8>(&[]), None);
        let mut seen = [false; 4];
        for _ in 0..200 {
            seen[usize::try_from(rng.between(0, 3)).unwrap()] = true;
        }
        assert_eq!(seen, [true; 4]);
        let mut order: Vec<u32> = (0..50).collect();
        rng.shuffle(&mut order);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}

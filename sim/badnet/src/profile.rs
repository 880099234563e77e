//! Bad networks with names.
//!
//! Each profile is a [`Path`] with the numbers below. They are round figures in the range that field reports give
//! for such places, chosen to be told apart, not a measurement of any one network. RTT is both directions without
//! jitter or queueing; loss is per direction.
//!
//! | profile | RTT | jitter per packet | loss | bandwidth down / up (queue) | dark | else |
//! |---|---|---|---|---|---|---|
//! | `clean` | 0 | 0 | 0 | unlimited | – | – |
//! | `wifi` | 20 ms | 5 ms | 0.2 % | 50 / 20 Mbit/s (256 KB) | – | – |
//! | `metro` | 70–160 ms, redrawn about every 2 s | 15 ms | bursts, 2.4 % in all | 8 / 3 Mbit/s (256 KB) | 2 s about every 20 s | – |
//! | `lift` | 60 ms | 20 ms | bursts, 11 % in all | 5 / 2 Mbit/s (128 KB) | 8 s about every 30 s | – |
//! | `rural-edge` | 350–900 ms, redrawn about every 3 s | 60 ms | 2 % | 180 / 60 kbit/s (48 KB) | – | – |
//! | `wifi-walkout` | 30–300 ms, redrawn about every second | 25 ms | bursts, 15 % in all | 6 / 2 Mbit/s (128 KB) | 1 s about every 6 s | 3 % reordered, 1 % doubled |
//! | `lossy` | 100 ms | 10 ms | 5 % | unlimited | – | 2 % reordered, 1 % doubled |
//! | `dark-spells` | 100 ms | 0 | 0 | unlimited | 200 ms, 10 % of the time | – |
//! | `mobile-tail` | 350 / 725 / 2 300 ms at p50 / p95 / p99, redrawn about every second | 0 | 3.5 % | unlimited | – | – |
//!
//! Not here: changes of address and other events that come at a moment (`fault`).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::net::{Burst, DarkSpells, Delay, Impairment, Loss, Path, Rate, Reorder};
use crate::rng::Share;

/// A bad network with a name; the numbers are in the table of this module.
///
/// ```
/// use fulmar_badnet::Profile;
/// let profile: Profile = "rural-edge".parse()?;
/// assert_eq!(profile, Profile::RuralEdge);
/// println!("{profile}: {}", profile.summary());
/// # Ok::<(), fulmar_badnet::profile::UnknownProfile>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Profile {
    /// Nothing is impaired.
    #[default]
    Clean,
    /// A good Wi-Fi at home.
    Wifi,
    /// An underground train: cells change, tunnels are dark.
    Metro,
    /// In and out of a lift.
    Lift,
    /// A village on EDGE: slow, long queues.
    RuralEdge,
    /// Walking out of the office on its last Wi-Fi.
    WifiWalkout,
    /// Steady 5 % loss at 100 ms.
    Lossy,
    /// Short spells of darkness at 100 ms.
    DarkSpells,
    /// The long tail of a published mobile measurement.
    MobileTail,
}

/// A name that no profile has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown network profile {0:?}; known are: {list}", list = names())]
pub struct UnknownProfile(String);

impl Profile {
    /// All there are, mildest first.
    pub const ALL: [Self; 9] = [
        Self::Clean,
        Self::Wifi,
        Self::Lossy,
        Self::DarkSpells,
        Self::Metro,
        Self::MobileTail,
        Self::Lift,
        Self::WifiWalkout,
        Self::RuralEdge,
    ];

    /// The name on a command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Wifi => "wifi",
            Self::Metro => "metro",
            Self::Lift => "lift",
            Self::RuralEdge => "rural-edge",
            Self::WifiWalkout => "wifi-walkout",
            Self::Lossy => "lossy",
            Self::DarkSpells => "dark-spells",
            Self::MobileTail => "mobile-tail",
        }
    }

    /// What a person should know about it, in one line.
    #[must_use]
    pub const fn summary(self) -> &'static str {
        match self {
            Self::Clean => "nothing impaired",
            Self::Wifi => "good Wi-Fi: 20 ms, 0.2 % loss",
            Self::Metro => "underground train: 70-160 ms, bursts of loss, dark 2 s in 20",
            Self::Lift => "in and out of a lift: bursts of loss, dark 8 s in 40",
            Self::RuralEdge => "village on EDGE: 350-900 ms, 180/60 kbit/s, 2 % loss",
            Self::WifiWalkout => "leaving the office Wi-Fi: bursts of loss, reordering, dark 1 s in 7",
            Self::Lossy => "100 ms, 5 % loss each way, some reordering and duplicates",
            Self::DarkSpells => "100 ms, dark for 200 ms at a time, 10 % of the time",
            Self::MobileTail => "RTT 350/725/2300 ms at p50/p95/p99, 3.5 % loss",
        }
    }

    /// The path it stands for.
    #[must_use]
    pub fn path(self) -> Path {
        let none = Impairment::default();
        match self {
            Self::Clean => Path::default(),
            Self::Wifi => with_rates(
                Impairment {
                    delay: Delay::fixed(ms(10)).with_jitter(ms(5)),
                    loss: Loss::random(Share::millionths(2_000)),
                    ..none
                },
                Rate::kbit(50_000, 256_000),
                Rate::kbit(20_000, 256_000),
            ),
            Self::Metro => with_rates(
                Impairment {
                    delay: wandering(35, 80).redrawn_every(ms(2_000)).with_jitter(ms(15)),
                    loss: bursts(5_000, 10_000, 250_000, 500_000),
                    dark: Some(DarkSpells { every: ms(18_000), lasts: ms(2_000) }),
                    ..none
                },
                Rate::kbit(8_000, 256_000),
                Rate::kbit(3_000, 256_000),
            ),
            Self::Lift => with_rates(
                Impairment {
                    delay: Delay::fixed(ms(30)).with_jitter(ms(20)),
                    loss: bursts(10_000, 30_000, 150_000, 600_000),
                    dark: Some(DarkSpells { every: ms(30_000), lasts: ms(8_000) }),
                    ..none
                },
                Rate::kbit(5_000, 128_000),
                Rate::kbit(2_000, 128_000),
            ),
            Self::RuralEdge => with_rates(
                Impairment {
                    delay: wandering(175, 450).redrawn_every(ms(3_000)).with_jitter(ms(60)),
                    loss: Loss::random(Share::percent(2)),
                    ..none
                },
                Rate::kbit(180, 48_000),
                Rate::kbit(60, 48_000),
            ),
            Self::WifiWalkout => with_rates(
                Impairment {
                    delay: wandering(15, 150).redrawn_every(ms(1_000)).with_jitter(ms(25)),
                    loss: bursts(30_000, 40_000, 150_000, 600_000),
                    reorder: Reorder { share: Share::percent(3), hold: ms(30) },
                    duplicate: Share::percent(1),
                    dark: Some(DarkSpells { every: ms(6_000), lasts: ms(1_000) }),
                    ..none
                },
                Rate::kbit(6_000, 128_000),
                Rate::kbit(2_000, 128_000),
            ),
            Self::Lossy => Path::symmetric(Impairment {
                delay: Delay::fixed(ms(50)).with_jitter(ms(10)),
                loss: Loss::random(Share::percent(5)),
                reorder: Reorder { share: Share::percent(2), hold: ms(20) },
                duplicate: Share::percent(1),
                ..none
            }),
            Self::DarkSpells => Path::symmetric(Impairment {
                delay: Delay::fixed(ms(50)),
                dark: Some(DarkSpells { every: ms(1_800), lasts: ms(200) }),
                ..none
            }),
            Self::MobileTail => Path::symmetric(Impairment {
                delay: curve(&[
                    (Share::NONE, ms(60)),
                    (Share::percent(50), ms(175)),
                    (Share::percent(95), ms(362)),
                    (Share::percent(99), ms(1_150)),
                    (Share::ALL, ms(2_000)),
                ])
                .redrawn_every(ms(1_000)),
                loss: Loss::random(Share::millionths(35_000)),
                ..none
            }),
        }
    }
}

impl From<Profile> for Path {
    fn from(profile: Profile) -> Self {
        profile.path()
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        let known = Self::ALL.into_iter().find(|profile| profile.name() == name);
        known.ok_or_else(|| UnknownProfile(name.chars().take(64).collect()))
    }
}

fn names() -> String {
    Profile::ALL.map(Profile::name).join(", ")
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn with_rates(direction: Impairment, down: Rate, up: Rate) -> Path {
    Path {
        up: Impairment { rate: Some(up), ..direction.clone() },
        down: Impairment { rate: Some(down), ..direction },
    }
}

/// A delay that wanders evenly between two one-way values.
fn wandering(low_ms: u64, high_ms: u64) -> Delay {
    curve(&[(Share::NONE, ms(low_ms)), (Share::ALL, ms(high_ms))])
}

/// A curve from this file's own numbers; the test below reads every profile, so a bad one can't stay.
fn curve(points: &[(Share, Duration)]) -> Delay {
    Delay::quantiles(points).unwrap_or_default()
}

/// Bursty loss from millionths: lost outside bursts, chance to enter, chance to leave, lost inside.
fn bursts(random: u32, enter: u32, leave: u32, inside: u32) -> Loss {
    let [random, enter, leave, loss] = [random, enter, leave, inside].map(Share::millionths);
    Loss { random, burst: Some(Burst { enter, leave, loss }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{DropCause, Link, Verdict};
    use crate::{Rng, SimTime};

    #[test]
    fn names_lead_back() {
        for profile in Profile::ALL {
            assert_eq!(profile.name().parse(), Ok(profile));
            assert!(!profile.summary().is_empty());
        }
        let refused = "metr0".parse::<Profile>().unwrap_err().to_string();
        assert!(refused.contains("metr0") && refused.contains("rural-edge"), "{refused}");
    }

    /// The numbers of the module's table, in the same order: smallest and largest one-way travel in ms of a lone
    /// packet of 100 bytes, lost and dark in millionths.
    #[test]
    fn every_profile_is_what_its_row_says() {
        for (profile, low, high, lost, dark) in [
            (Profile::Clean, 0, 1, 0, 0),
            (Profile::Wifi, 10, 16, 2_000, 0),
            (Profile::Metro, 35, 97, 24_000, 100_000),
            (Profile::Lift, 30, 52, 108_000, 210_000),
            (Profile::RuralEdge, 175, 525, 20_000, 0),
            (Profile::WifiWalkout, 15, 207, 150_000, 143_000),
            (Profile::Lossy, 50, 81, 50_000, 0),
            (Profile::DarkSpells, 50, 51, 0, 100_000),
            (Profile::MobileTail, 60, 2_001, 35_000, 0),
        ] {
            for direction in [profile.path().up, profile.path().down] {
                let mut link = Link::new(direction);
                let mut rng = Rng::new(1);
                let (mut lost_seen, mut dark_seen, mut lit) = (0i64, 0i64, 0i64);
                // So far apart that no packet waits for another, so often that the shares settle.
                for n in 0..100_000 {
                    let now = SimTime::from_millis(n * 2_100);
                    match link.offer(now, 100, &mut rng) {
                        Verdict::Deliver(arrival) => {
                            let travel = arrival.at.since(now);
                            assert!(travel >= ms(low) && travel <= ms(high), "{profile}: {travel:?}");
                        }
                        Verdict::Drop(DropCause::Lost) => lost_seen += 1,
                        Verdict::Drop(DropCause::Dark) => {
                            dark_seen += 1;
                            lit -= 1;
                        }
                        Verdict::Drop(cause) => panic!("{profile}: {cause:?}"),
                    }
                    lit += 1;
                }
                let lost_share = lost_seen * 1_000_000 / lit.max(1);
                assert!((lost_share - lost).abs() <= lost / 10 + 500, "{profile}: {lost_share} lost");
                let dark_share = dark_seen * 10;
                assert!((dark_share - dark).abs() <= dark / 8, "{profile}: {dark_share} dark");
            }
        }
    }
}

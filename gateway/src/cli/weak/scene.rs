//! The networks with names, and what happens on each of them at which moment.
//!
//! - A scene is a table: a path, what gets through, and steps at fixed moments. Chance (which packet is lost) comes from
//!   the seed; the steps are the same in every run, so the report can draw them where they were.
//! - Dark spells are steps and never drawn: nothing gets through, either way, by UDP or TCP.
//! - A scene lasts at least as long as its script. Played for longer, the script begins anew.
//!
//! Not here: carrying the steps out (`play`).

use std::time::Duration;

use fulmar_badnet::net::{Burst, Delay, Impairment, Loss, Rate, Reorder};
use fulmar_badnet::proxy::Admits;
use fulmar_badnet::{Path, Profile, Share};
use fulmar_client::NetworkKind;

/// A network with a name.
#[derive(Debug, PartialEq)]
pub(super) struct Scene {
    /// On the command line.
    pub(super) name: &'static str,
    /// In the report.
    pub(super) title: &'static str,
    /// What it means, for people.
    pub(super) sentence: &'static str,
    /// What packets meet at the beginning.
    pub(super) air: Air,
    /// Whether UDP is blocked all the time.
    pub(super) udp_blocked: bool,
    /// What phones believe to be on.
    pub(super) network: NetworkKind,
    /// How long it is played unless told otherwise, which is also the length of its script.
    pub(super) seconds: u64,
    /// What happens, in order of time.
    pub(super) script: &'static [Step],
    /// Whether it is played when no name is given.
    pub(super) by_default: bool,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Milliseconds after the script's beginning.
    pub(super) at_ms: u64,
    /// What.
    pub(super) act: Act,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Nothing gets through for so many milliseconds.
    Dark { ms: u64, ends: Ends },
    /// Packets meet something else from now on.
    Air(Air),
    /// Every phone has another address, and nobody says so: a NAT forgot, a cell was changed.
    Rebind,
}

/// How a dark spell ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    /// The network is back, and nobody says so.
    Untold,
    /// The network is back, and the operating system tells the app.
    Told,
    /// Another network is there, with another address, and the operating system tells the app.
    Moved(Air),
}

/// What packets meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Air {
    /// A profile of the bad network in a box, without its own dark spells where the script has some.
    Profile(Profile),
    /// Wi-Fi in a hotel.
    Hotel,
    /// The edge of a Wi-Fi: bursts of loss.
    Edge,
    /// Beyond the edge: every third packet is lost.
    Beyond,
    /// A fair mobile network.
    Mobile,
}

/// Every scene there is, in the order in which they are played.
pub(super) const SCENES: &[Scene] = &[
    Scene {
        name: "metro",
        title: "Metro",
        sentence: "An underground train: 70 to 160 ms there and back, bursts of loss, two tunnels of 2 s without any \
                   network, and a new address in between that nobody announces.",
        air: Air::Profile(Profile::Metro),
        udp_blocked: false,
        network: NetworkKind::Cellular,
        seconds: 18,
        script: &[
            Step { at_ms: 3_500, act: Act::Dark { ms: 2_000, ends: Ends::Untold } },
            Step { at_ms: 9_000, act: Act::Rebind },
            Step { at_ms: 12_500, act: Act::Dark { ms: 2_000, ends: Ends::Untold } },
        ],
        by_default: true,
    },
    Scene {
        name: "lift",
        title: "Lift",
        sentence: "Into a lift and out again: 60 ms there and back, one packet in ten lost in bursts, and 8 s without \
                   any network while the doors are closed. Nobody tells the app when it is back.",
        air: Air::Profile(Profile::Lift),
        udp_blocked: false,
        network: NetworkKind::Cellular,
        seconds: 18,
        script: &[Step { at_ms: 4_000, act: Act::Dark { ms: 8_000, ends: Ends::Untold } }],
        by_default: true,
    },
    Scene {
        name: "rural-edge",
        title: "Rural EDGE",
        sentence: "A village on EDGE: 350 to 900 ms there and back, 180 kbit/s down and 60 kbit/s up, 2 % loss each way.",
        air: Air::Profile(Profile::RuralEdge),
        udp_blocked: false,
        network: NetworkKind::Cellular,
        seconds: 16,
        script: &[],
        by_default: true,
    },
    Scene {
        name: "hotel-wifi",
        title: "Hotel Wi-Fi",
        sentence: "Wi-Fi that lets no UDP through: the app falls back to TLS over TCP on the same port. 40 ms there and \
                   back, 1 % loss, and 1.5 s without any network in the middle.",
        air: Air::Hotel,
        udp_blocked: true,
        network: NetworkKind::Wifi,
        seconds: 14,
        script: &[Step { at_ms: 7_000, act: Act::Dark { ms: 1_500, ends: Ends::Untold } }],
        by_default: true,
    },
    Scene {
        name: "wifi-walkout",
        title: "Walking out of the office",
        sentence: "Wi-Fi that fades (bursts of loss from 3 s on, every third packet lost from 6 s on), a second without \
                   anything, then the mobile network with a new address, of which the app is told.",
        air: Air::Profile(Profile::Wifi),
        udp_blocked: false,
        network: NetworkKind::Wifi,
        seconds: 16,
        script: &[
            Step { at_ms: 3_000, act: Act::Air(Air::Edge) },
            Step { at_ms: 6_000, act: Act::Air(Air::Beyond) },
            Step { at_ms: 9_000, act: Act::Dark { ms: 1_000, ends: Ends::Moved(Air::Mobile) } },
        ],
        by_default: true,
    },
    Scene {
        name: "airplane",
        title: "Airplane mode",
        sentence: "A fair mobile network, 60 ms there and back, and twice 10 s without any network: the first time the \
                   operating system tells the app that it is back, the second time nobody does.",
        air: Air::Mobile,
        udp_blocked: false,
        network: NetworkKind::Cellular,
        seconds: 32,
        script: &[
            Step { at_ms: 3_000, act: Act::Dark { ms: 10_000, ends: Ends::Told } },
            Step { at_ms: 17_500, act: Act::Dark { ms: 10_000, ends: Ends::Untold } },
        ],
        by_default: true,
    },
    plain("clean", "Clean", "Nothing is impaired: what the machine itself costs.", Profile::Clean),
    plain("wifi", "Good Wi-Fi", "Wi-Fi at home: 20 ms there and back, 0.2 % loss each way.", Profile::Wifi),
    plain(
        "lossy",
        "Lossy",
        "100 ms there and back, 5 % loss each way, some packets overtaken or doubled.",
        Profile::Lossy,
    ),
    plain(
        "dark-spells",
        "Short dark spells",
        "100 ms there and back, and each direction of each phone's path dark for 200 ms at a time, 10 % of the time, at \
         moments that chance draws.",
        Profile::DarkSpells,
    ),
    plain(
        "mobile-tail",
        "Mobile with a long tail",
        "350, 725 and 2,300 ms there and back at the median, 95th and 99th percentile, 3.5 % loss each way.",
        Profile::MobileTail,
    ),
];

const fn plain(name: &'static str, title: &'static str, sentence: &'static str, profile: Profile) -> Scene {
    Scene {
        name,
        title,
        sentence,
        air: Air::Profile(profile),
        udp_blocked: false,
        network: NetworkKind::Unknown,
        seconds: 15,
        script: &[],
        by_default: false,
    }
}

impl Scene {
    /// What packets meet at the beginning.
    pub(super) fn path(&self) -> Path {
        self.meets(self.air)
    }

    /// What packets meet in this air.
    pub(super) fn meets(&self, air: Air) -> Path {
        let mut path = air.path();
        if !self.script.is_empty() {
            // The script says when it is dark.
            (path.up.dark, path.down.dark) = (None, None);
        }
        path
    }

    /// What gets through when it is not dark.
    pub(super) const fn admits(&self) -> Admits {
        if self.udp_blocked { Admits::TCP_ONLY } else { Admits::ALL }
    }

    /// How long it is played when `asked` seconds are wanted.
    pub(super) fn length(&self, asked: Option<u64>) -> Duration {
        let seconds = match asked {
            None => self.seconds,
            Some(asked) if self.script.is_empty() => asked,
            Some(asked) => asked.max(self.seconds),
        };
        Duration::from_secs(seconds)
    }

    /// What happens in `length`, in order, each with its moment; only what comes to its end.
    pub(super) fn steps(&self, length: Duration) -> impl Iterator<Item = (Duration, Act)> + '_ {
        let round = Duration::from_secs(self.seconds.max(1));
        let rounds = if self.script.is_empty() { 0 } else { length.as_secs() / round.as_secs() };
        let changes = |step: &Step| matches!(step.act, Act::Air(_) | Act::Dark { ends: Ends::Moved(_), .. });
        let changes = self.script.iter().any(changes);
        (0..rounds).flat_map(move |number| {
            let begins = round.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX));
            let anew = (changes && number > 0).then_some((begins, Act::Air(self.air)));
            let steps = self.script.iter();
            anew.into_iter()
                .chain(steps.map(move |step| (begins + Duration::from_millis(step.at_ms), step.act)))
        })
    }
}

/// The scenes of these names, in this order; the usual ones when there is none.
pub(super) fn chosen(names: &[String]) -> Vec<&'static Scene> {
    if names.is_empty() {
        return SCENES.iter().filter(|scene| scene.by_default).collect();
    }
    names.iter().filter_map(|name| SCENES.iter().find(|scene| scene.name == name)).collect()
}

/// Reads a name as clap wants it.
pub(super) fn known(name: &str) -> Result<String, String> {
    if SCENES.iter().any(|scene| scene.name == name) {
        return Ok(name.to_owned());
    }
    let names: Vec<_> = SCENES.iter().map(|scene| scene.name).collect();
    Err(format!("known are: {}", names.join(", ")))
}

impl Air {
    /// The path it stands for.
    pub(super) fn path(self) -> Path {
        let ms = Duration::from_millis;
        let none = Impairment::default();
        let with_rates = |direction: Impairment, down: Rate, up: Rate| Path {
            up: Impairment { rate: Some(up), ..direction.clone() },
            down: Impairment { rate: Some(down), ..direction },
        };
        match self {
            Self::Profile(profile) => profile.path(),
            Self::Hotel => with_rates(
                Impairment {
                    delay: Delay::fixed(ms(20)).with_jitter(ms(10)),
                    loss: Loss::random(Share::percent(1)),
                    ..none
                },
                Rate::kbit(4_000, 128_000),
                Rate::kbit(1_000, 128_000),
            ),
            Self::Edge => with_rates(
                Impairment {
                    delay: Delay::fixed(ms(20)).with_jitter(ms(40)),
                    loss: Loss {
                        random: Share::percent(3),
                        burst: Some(Burst {
                            enter: Share::percent(4),
                            leave: Share::percent(20),
                            loss: Share::percent(60),
                        }),
                    },
                    reorder: Reorder { share: Share::percent(3), hold: ms(30) },
                    duplicate: Share::percent(1),
                    ..none
                },
                Rate::kbit(6_000, 128_000),
                Rate::kbit(2_000, 128_000),
            ),
            Self::Beyond => with_rates(
                Impairment {
                    delay: Delay::fixed(ms(60)).with_jitter(ms(90)),
                    loss: Loss::random(Share::percent(33)),
                    reorder: Reorder { share: Share::percent(5), hold: ms(40) },
                    ..none
                },
                Rate::kbit(1_000, 64_000),
                Rate::kbit(500, 64_000),
            ),
            Self::Mobile => with_rates(
                Impairment {
                    delay: Delay::fixed(ms(30)).with_jitter(ms(15)),
                    loss: Loss::random(Share::millionths(5_000)),
                    ..none
                },
                Rate::kbit(10_000, 256_000),
                Rate::kbit(4_000, 256_000),
            ),
        }
    }

    /// In a few words, for a mark in a plot.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Profile(profile) => profile.name(),
            Self::Hotel => "hotel Wi-Fi",
            Self::Edge => "fading",
            Self::Beyond => "every third packet lost",
            Self::Mobile => "mobile network",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_scenes_take_about_two_minutes() {
        let names: Vec<_> = chosen(&[]).iter().map(|scene| scene.name).collect();
        assert_eq!(names, ["metro", "lift", "rural-edge", "hotel-wifi", "wifi-walkout", "airplane"]);
        let seconds: u64 = chosen(&[]).iter().map(|scene| scene.length(None).as_secs()).sum();
        assert!((100..=125).contains(&seconds), "{seconds}");
    }

    #[test]
    fn names_are_told_apart_and_found() {
        for scene in SCENES {
            assert_eq!(known(scene.name).as_deref(), Ok(scene.name));
            assert_eq!(SCENES.iter().filter(|other| other.name == scene.name).count(), 1, "{}", scene.name);
            assert_eq!(chosen(&[scene.name.to_owned()]), [scene]);
            assert!(!scene.title.is_empty() && scene.sentence.ends_with('.'), "{}", scene.name);
        }
        assert!(known("lfit").unwrap_err().contains("lift, rural-edge"));
    }

    /// Every script leaves time before, between and after its steps: a recovery that is not waited for would be measured
    /// into the next step.
    #[test]
    fn scripts_have_room() {
        for scene in SCENES {
            let mut free_from = 2_500;
            for step in scene.script {
                assert!(step.at_ms >= free_from, "{}: {step:?}", scene.name);
                free_from = match step.act {
                    Act::Dark { ms, .. } => step.at_ms + ms + 3_000,
                    Act::Rebind => step.at_ms + 3_000,
                    Act::Air(_) => step.at_ms + 2_000,
                };
            }
            if !scene.script.is_empty() {
                assert!(free_from <= scene.seconds * 1_000 + 500, "{}", scene.name);
                let path = scene.path();
                assert!(path.up.dark.is_none() && path.down.dark.is_none(), "{}", scene.name);
            }
        }
    }

    #[test]
    fn a_script_is_whole_and_repeats() {
        let scene = chosen(&["lift".to_owned()])[0];
        for (asked, length, darks) in
            [(None, 18, &[4][..]), (Some(3), 18, &[4]), (Some(35), 35, &[4]), (Some(36), 36, &[4, 22])]
        {
            let played = scene.length(asked);
            assert_eq!(played.as_secs(), length);
            let at: Vec<u64> = scene.steps(played).map(|(at, _)| at.as_secs()).collect();
            assert_eq!(at, darks, "{asked:?}");
        }
        // What a round has changed is put back before the next one.
        let walkout = chosen(&["wifi-walkout".to_owned()])[0];
        let steps: Vec<_> = walkout.steps(walkout.length(Some(32))).collect();
        assert_eq!((steps.len(), steps[3]), (7, (Duration::from_secs(16), Act::Air(walkout.air))));
        let plain = chosen(&["lossy".to_owned()])[0];
        assert_eq!(plain.length(Some(3)).as_secs(), 3);
        assert_eq!(plain.steps(Duration::from_secs(300)).count(), 0);
    }

    #[test]
    fn only_the_hotel_blocks_udp() {
        for scene in SCENES {
            assert_eq!(scene.admits() == Admits::TCP_ONLY, scene.name == "hotel-wifi");
        }
    }
}

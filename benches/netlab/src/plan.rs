//! What is measured: who, on which network, and every send with its time. Pure.
//!
//! - Equal seeds give equal schedules and equal dark spells, whoever is measured.
//! - A schedule says when a message *should* leave; it does not wait for the one before (open loop).
//!
//! Not here: the link that does these things to packets (`link`), the bars' verdicts (`report`).

use std::time::Duration;

use clap::ValueEnum;
use fulmar_badnet::{
    Rng, Share,
    net::{Delay, Impairment, Loss},
};
use serde::{Deserialize, Serialize};

/// Bytes of a message.
pub(crate) const PAYLOAD_BYTES: usize = 128;

/// Messages a second the pairs send, in turns: the first pair one, the fifth pair five, the sixth one again.
const RATES: [u64; 5] = [1, 2, 3, 4, 5];

/// How long a dark spell lasts.
pub(crate) const DARK_SPELL: Duration = Duration::from_millis(200);

/// Streams of chance that are drawn from one seed.
const LABEL_SCHEDULE: u64 = 1 << 32;
const LABEL_DARK: u64 = 2 << 32;
const LABEL_LINK: u64 = 3 << 32;

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    /// `fulmar serve` and the SDK over QUIC
    FulmarQuic,
    /// The same where UDP is blocked: the SDK goes over TLS and TCP by itself
    FulmarTls,
    /// mosquitto and an MQTT 3.1.1 client over TLS 1.3 and TCP, QoS 1
    MosquittoTls,
}

impl Peer {
    /// Everybody there is, in the order of the table.
    pub(crate) const ALL: [Self; 3] = [Self::FulmarQuic, Self::FulmarTls, Self::MosquittoTls];

    /// As on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::FulmarQuic => "fulmar-quic",
            Self::FulmarTls => "fulmar-tls",
            Self::MosquittoTls => "mosquitto-tls",
        }
    }

    /// As in the table.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::FulmarQuic => "Fulmar, QUIC",
            Self::FulmarTls => "Fulmar, TLS",
            Self::MosquittoTls => "mosquitto, TLS",
        }
    }

    /// Whether it is the gateway and the SDK.
    pub(crate) const fn is_fulmar(self) -> bool {
        matches!(self, Self::FulmarQuic | Self::FulmarTls)
    }

    /// Whether the bars are about it.
    pub(crate) const fn has_bars(self) -> bool {
        matches!(self, Self::FulmarQuic)
    }

    /// Whether UDP gets through: what makes the SDK go over TLS.
    pub(crate) const fn has_udp(self) -> bool {
        !matches!(self, Self::FulmarTls)
    }
}

/// What the network does beside its delay, and what was asked for there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Condition {
    /// As on the command line.
    pub(crate) name: &'static str,
    /// As in the table.
    pub(crate) title: &'static str,
    /// Lost at random, each direction.
    loss_percent: u32,
    /// Share of the time in which nothing gets through, in either direction.
    dark_percent: u32,
    /// The p99 to reach, ms, for an RTT of 100 ms.
    pub(crate) bar_ms: Option<u32>,
    /// p99 of rmqtt over TLS and over QUIC as measured elsewhere with the same RTT and loss, ms: shows the size of things.
    pub(crate) elsewhere_ms: Option<(u32, u32)>,
}

impl Condition {
    /// All of them, in the order of the table.
    pub(crate) const ALL: [Self; 6] = [
        Self::new("loss-0", "no loss", 0, 0, None, None),
        Self::new("loss-1", "1 % lost", 1, 0, Some(210), Some((701, 329))),
        Self::new("loss-5", "5 % lost", 5, 0, Some(260), Some((795, 464))),
        Self::new("loss-10", "10 % lost", 10, 0, Some(400), Some((1_094, 715))),
        Self::new("dark-5", "dark 5 % of the time", 0, 5, Some(450), Some((1_115, 963))),
        Self::new("dark-10", "dark 10 % of the time", 0, 10, Some(600), Some((1_451, 1_227))),
    ];

    const fn new(
        name: &'static str,
        title: &'static str,
        loss_percent: u32,
        dark_percent: u32,
        bar_ms: Option<u32>,
        elsewhere_ms: Option<(u32, u32)>,
    ) -> Self {
        Self { name, title, loss_percent, dark_percent, bar_ms, elsewhere_ms }
    }

    /// The condition of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|condition| condition.name == name)
    }

    /// What one direction of a link with this round trip does to packets, apart from going dark.
    pub(crate) fn impairment(self, rtt: Duration) -> Impairment {
        Impairment { loss: Loss::random(Share::percent(self.loss_percent)), ..calm(rtt) }
    }

    /// The dark spells of the whole link, from the moment it turns bad on.
    pub(crate) fn spells(self, seed: u64) -> Spells {
        let light = (1..100).contains(&self.dark_percent).then(|| {
            // Of the time `dark_percent` is dark when light lasts this long on average.
            DARK_SPELL * (100 - self.dark_percent) / self.dark_percent
        });
        Spells { rng: Rng::new(seed).fork(LABEL_DARK), light, light_from: Duration::ZERO }
    }
}

/// One direction of a link that only takes its time.
pub(crate) fn calm(rtt: Duration) -> Impairment {
    Impairment { delay: Delay::fixed(rtt / 2), ..Impairment::default() }
}

/// The chance of one direction.
pub(crate) fn link_rng(seed: u64, direction: u64) -> Rng {
    Rng::new(seed).fork(LABEL_LINK + direction)
}

/// When a link is dark: from, to. Without end when there is darkness at all.
#[derive(Clone, Debug)]
pub(crate) struct Spells {
    rng: Rng,
    light: Option<Duration>,
    light_from: Duration,
}

impl Iterator for Spells {
    type Item = (Duration, Duration);

    fn next(&mut self) -> Option<Self::Item> {
        let from = self.light_from + self.rng.exponential(self.light?);
        self.light_from = from + DARK_SPELL;
        Some((from, self.light_from))
    }
}

/// One message that is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    /// Its place in the pair's schedule.
    pub(crate) index: u32,
    /// When it should leave, from the moment the link turned bad on.
    pub(crate) due: Duration,
    /// Counted; `false` during the warm-up.
    pub(crate) counted: bool,
}

/// What pair number `pair` sends: gaps between half and one and a half times the mean, so that nothing keeps step.
pub(crate) fn schedule(seed: u64, pair: u32, warm_up: Duration, measured: Duration) -> Vec<Planned> {
    let mut rng = Rng::new(seed).fork(LABEL_SCHEDULE + u64::from(pair));
    let turn = usize::try_from(pair).unwrap_or_default() % RATES.len();
    let rate = RATES.get(turn).copied().unwrap_or(1);
    let gap = Duration::from_secs(1) / u32::try_from(rate).unwrap_or(1);
    let mut due = rng.duration(Duration::ZERO, gap);
    let mut plan = Vec::new();
    for index in 0.. {
        if due >= warm_up + measured {
            break;
        }
        plan.push(Planned { index, due, counted: due >= warm_up });
        due += rng.duration(gap / 2, gap * 3 / 2);
    }
    plan
}

/// The bytes of message `index` of pair `pair`: both numbers, then what does not compress.
pub(crate) fn payload(pair: u32, index: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PAYLOAD_BYTES);
    bytes.extend(pair.to_be_bytes());
    bytes.extend(index.to_be_bytes());
    let mut rng = Rng::new(u64::from(pair) << 32 | u64::from(index));
    while bytes.len() < PAYLOAD_BYTES {
        bytes.extend(rng.next_u64().to_be_bytes());
    }
    bytes.truncate(PAYLOAD_BYTES);
    bytes
}

/// Which message these bytes are, pair and index; `None` when none of ours.
pub(crate) fn which(payload: &[u8]) -> Option<(u32, u32)> {
    let (pair, rest) = payload.split_first_chunk::<4>()?;
    let index = rest.first_chunk::<4>()?;
    let (pair, index) = (u32::from_be_bytes(*pair), u32::from_be_bytes(*index));
    (self::payload(pair, index) == payload).then_some((pair, index))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_schedule_keeps_its_rate_and_repeats() {
        for (pair, rate) in [(0, 1), (1, 2), (4, 5), (5, 1), (19, 5)] {
            let plan = schedule(7, pair, 10 * SECOND, 100 * SECOND);
            assert_eq!(plan, schedule(7, pair, 10 * SECOND, 100 * SECOND));
            assert_ne!(plan, schedule(8, pair, 10 * SECOND, 100 * SECOND));
            assert!(plan.len().abs_diff(110 * rate) <= 10 + rate, "{} sends of pair {pair}", plan.len());
            assert!(plan.iter().zip(0..).all(|(planned, index)| planned.index == index));
            let gap = SECOND / u32::try_from(rate).unwrap();
            assert!(plan.windows(2).all(|two| {
                let between = two[1].due - two[0].due;
                between >= gap / 2 && between <= gap * 3 / 2
            }));
            let counted = plan.iter().filter(|planned| planned.counted).count();
            assert!(plan.iter().all(|planned| planned.counted == (planned.due >= 10 * SECOND)));
            assert!(counted.abs_diff(100 * rate) <= 10 + rate);
        }
    }

    #[test]
    fn darkness_has_its_share_of_the_time() {
        for (name, want) in [("dark-5", 5.0), ("dark-10", 10.0)] {
            let spells: Vec<_> = Condition::named(name).unwrap().spells(3).take(5_000).collect();
            assert!(spells.windows(2).all(|two| two[0].1 <= two[1].0), "spells never overlap");
            assert!(spells.iter().all(|(from, to)| *to - *from == DARK_SPELL));
            let share = 100.0 * 5_000.0 * DARK_SPELL.as_secs_f64() / spells.last().unwrap().1.as_secs_f64();
            assert!((share - want).abs() < want / 20.0, "{name}: {share} %");
        }
        assert_eq!(Condition::named("loss-10").unwrap().spells(3).next(), None);
    }

    #[test]
    fn a_message_is_known_again() {
        assert_eq!(payload(3, 9).len(), PAYLOAD_BYTES);
        assert_eq!(which(&payload(3, 9)), Some((3, 9)));
        let mut flipped = payload(3, 9);
        flipped[100] ^= 1;
        assert_eq!(which(&flipped), None);
        assert_eq!(which(&payload(3, 9)[..127]), None);
        assert_eq!(which(&[]), None);
    }

    #[test]
    fn names_are_what_the_command_line_takes() {
        for peer in Peer::ALL {
            assert_eq!(Peer::from_str(peer.name(), false), Ok(peer));
        }
        assert_eq!(Peer::value_variants().len(), Peer::ALL.len());
    }
}

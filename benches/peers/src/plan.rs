//! Who is measured at what: names, sizes, bars, and what each server does not do.
//!
//! Not here: how a server is started (`server`), how clients talk (`client`).

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

/// A server, with what it is spoken to by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    /// Fulmar over QUIC
    Fulmar,
    /// Mosquitto over TLS
    Mosquitto,
    /// NATS without JetStream over TLS
    Nats,
    /// NATS with JetStream on disk over TLS
    Jetstream,
    /// rumqttd over TLS
    Rumqttd,
    /// rmqtt over TLS
    RmqttTls,
    /// rmqtt over QUIC
    RmqttQuic,
}

/// What clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Fulmar's own, over QUIC.
    Fulmar,
    /// MQTT 3.1.1 with QoS 1, over TLS and TCP.
    Mqtt,
    /// The same over one stream of QUIC.
    MqttQuic,
    /// NATS, publish and forget.
    Nats,
    /// NATS with JetStream: acks both ways.
    Jetstream,
}

impl Peer {
    /// All there are, in the order of the tables.
    pub(crate) const ALL: [Self; 7] = [
        Self::Fulmar,
        Self::Mosquitto,
        Self::Rumqttd,
        Self::RmqttTls,
        Self::RmqttQuic,
        Self::Nats,
        Self::Jetstream,
    ];

    /// As it stands in tables.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fulmar => "fulmar",
            Self::Mosquitto => "mosquitto",
            Self::Nats => "nats",
            Self::Jetstream => "jetstream",
            Self::Rumqttd => "rumqttd",
            Self::RmqttTls => "rmqtt-tls",
            Self::RmqttQuic => "rmqtt-quic",
        }
    }

    /// What its clients speak.
    pub(crate) const fn protocol(self) -> Protocol {
        match self {
            Self::Fulmar => Protocol::Fulmar,
            Self::Mosquitto | Self::Rumqttd | Self::RmqttTls => Protocol::Mqtt,
            Self::RmqttQuic => Protocol::MqttQuic,
            Self::Nats => Protocol::Nats,
            Self::Jetstream => Protocol::Jetstream,
        }
    }

    /// What an ack means, what survives, and what it does not do.
    pub(crate) const fn honestly(self) -> &'static str {
        match self {
            Self::Fulmar => {
                "QUIC. An ack: on disk (fdatasync, grouped). Order per sender and once, across reconnects; resumes from the log, however \
                 long away; history. Each message is numbered, stored and charged to its conversation."
            }
            Self::Mosquitto => {
                "TLS. An ack: in memory, gone with the process. QoS 1 may deliver twice; order per connection. Resumes from a queue in \
                 memory. No history. One thread."
            }
            Self::Rumqttd => {
                "TLS. An ack: in memory. QoS 1, order per connection. Resumes from a log in memory of fixed size. No history beyond it."
            }
            Self::RmqttTls => {
                "TLS. An ack: in memory (storing is a plug-in, not used here). QoS 1 may deliver twice; order per connection. Resumes from a \
                 queue in memory. No history."
            }
            Self::RmqttQuic => "QUIC, one stream for each client. Otherwise as rmqtt-tls.",
            Self::Nats => {
                "TLS. No acks at all, at most once: what is lost on the way or while away is lost. No resume, no history: not comparable \
                 where these count."
            }
            Self::Jetstream => {
                "TLS. An ack: written to a file, synced as the setting says; acks by each receiver. One stream for all, a push consumer for \
                 each receiver. Resumes, has history."
            }
        }
    }
}

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub(crate) enum Work {
    /// Fan-out: one sender, 1 000 receivers, 128 B
    #[value(name = "A", alias = "a")]
    A,
    /// Pairs: 500 senders, each with a receiver of its own
    #[value(name = "B", alias = "b")]
    B,
    /// Connections: handshakes, and memory of idle ones
    #[value(name = "C", alias = "c")]
    C,
    /// Resume: 1 000 clients come back at once, each missed 10 messages
    #[value(name = "D", alias = "d")]
    D,
}

impl Work {
    /// All there are.
    pub(crate) const ALL: [Self; 4] = [Self::A, Self::B, Self::C, Self::D];

    /// Whether it makes sense for a server.
    pub(crate) const fn fits(self, peer: Peer) -> bool {
        !matches!((self, peer), (Self::D, Peer::Nats))
    }
}

/// How much of everything.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Sizes {
    /// Receivers of the fan-out.
    pub(crate) receivers: u32,
    /// Its messages a second where they are lone.
    pub(crate) fan_out_rate: f64,
    /// Messages the saturating sender of the fan-out is ahead of its receivers at most.
    pub(crate) fan_out_window: u64,
    /// Pairs.
    pub(crate) pairs: u32,
    /// Their messages a second, of all together.
    pub(crate) pair_rate: f64,
    /// Messages a saturating sender of a pair is ahead at most.
    pub(crate) pair_window: u64,
    /// Idle connections.
    pub(crate) idle: u32,
    /// Clients that come back.
    pub(crate) resumers: u32,
    /// What each of them missed.
    pub(crate) missed: u32,
    /// Connects under way at the same time.
    pub(crate) connecting: usize,
    /// Before anything counts.
    pub(crate) warm_up: Duration,
    /// What counts, at a rate.
    pub(crate) paced: Duration,
    /// What counts, saturated.
    pub(crate) saturated: Duration,
    /// How long idle connections are left alone before memory is read.
    pub(crate) rest: Duration,
}

/// Bytes of each message.
pub(crate) const PAYLOAD_BYTES: usize = 128;

impl Sizes {
    /// What is quoted.
    pub(crate) const fn full() -> Self {
        Self {
            receivers: 1_000,
            fan_out_rate: 20.0,
            fan_out_window: 64,
            pairs: 500,
            pair_rate: 10_000.0,
            pair_window: 16,
            idle: 2_000,
            resumers: 1_000,
            missed: 10,
            connecting: 64,
            warm_up: Duration::from_secs(2),
            paced: Duration::from_secs(10),
            saturated: Duration::from_secs(6),
            rest: Duration::from_secs(4),
        }
    }

    /// Some seconds: does it work here?
    pub(crate) const fn quick() -> Self {
        Self {
            receivers: 100,
            pairs: 50,
            pair_rate: 1_000.0,
            idle: 200,
            resumers: 100,
            warm_up: Duration::from_millis(300),
            paced: Duration::from_millis(1_500),
            saturated: Duration::from_secs(1),
            rest: Duration::from_millis(500),
            ..Self::full()
        }
    }
}

/// What one measurement is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Point {
    /// A at a rate.
    FanOutPaced,
    /// A as fast as it goes.
    FanOutSaturated,
    /// B at a rate.
    PairsPaced,
    /// B as fast as it goes.
    PairsSaturated,
    /// C.
    Connections,
    /// D.
    Resume,
}

impl Point {
    /// All, in the order of the tables.
    pub(crate) const ALL: [Self; 6] = [
        Self::FanOutPaced,
        Self::FanOutSaturated,
        Self::PairsPaced,
        Self::PairsSaturated,
        Self::Connections,
        Self::Resume,
    ];

    /// The heading of its table.
    pub(crate) fn title(self, sizes: &Sizes) -> String {
        let (receivers, pairs) = (sizes.receivers, sizes.pairs);
        match self {
            Self::FanOutPaced => format!("A  fan-out 1 to {receivers}, {} messages/s", sizes.fan_out_rate),
            Self::FanOutSaturated => format!("A  fan-out 1 to {receivers}, saturated"),
            Self::PairsPaced => format!("B  {pairs} pairs, {} messages/s", sizes.pair_rate),
            Self::PairsSaturated => format!("B  {pairs} pairs, saturated"),
            Self::Connections => format!("C  {} connections", sizes.idle),
            Self::Resume => {
                format!("D  {} clients come back, {} messages missed each", sizes.resumers, sizes.missed)
            }
        }
    }

    /// What Fulmar is held to: (which figure, at most or at least, how much). Figures are named as in [`crate::report::Row`].
    pub(crate) fn bars(self) -> Vec<Bar> {
        let (most, least) = (Bar::most, Bar::least);
        match self {
            Self::FanOutPaced => {
                vec![most("CPU", 14.0, "µs"), most("p50", 6.0, "ms"), most("p99", 12.0, "ms")]
            }
            Self::FanOutSaturated => vec![most("CPU", 2.0, "µs"), least("rate", 400_000.0, "/s")],
            Self::PairsPaced => vec![most("CPU", 40.0, "µs"), most("p50", 0.7, "ms"), most("p99", 3.0, "ms")],
            Self::PairsSaturated => vec![most("CPU", 40.0, "µs"), least("rate", 40_000.0, "/s")],
            Self::Connections => vec![most("memory", 36.0, "KiB"), least("rate", 3_500.0, "/s")],
            Self::Resume => vec![most("caught up", 250.0, "ms"), most("wrong", 0.0, "")],
        }
    }
}

/// What a figure of Fulmar's is held to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bar {
    /// Which figure.
    pub(crate) figure: &'static str,
    /// The bar.
    pub(crate) value: f64,
    /// Its unit.
    pub(crate) unit: &'static str,
    is_most: bool,
}

impl Bar {
    const fn most(figure: &'static str, value: f64, unit: &'static str) -> Self {
        Self { figure, value, unit, is_most: true }
    }

    const fn least(figure: &'static str, value: f64, unit: &'static str) -> Self {
        Self { figure, value, unit, is_most: false }
    }

    /// In words.
    pub(crate) fn words(&self, value: f64) -> String {
        let sign = if self.is_most { '≤' } else { '≥' };
        let met = if self.is_met(value) { "met" } else { "MISSED" };
        format!("{} {sign} {} {}: {met}", self.figure, self.value, self.unit).replace(" :", ":")
    }

    /// Whether a value will do.
    pub(crate) fn is_met(&self, value: f64) -> bool {
        if self.is_most { value <= self.value } else { value >= self.value }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_is_told_of_once() {
        for peer in Peer::ALL {
            assert_eq!(Peer::ALL.iter().filter(|other| other.name() == peer.name()).count(), 1);
            assert_eq!(Peer::from_str(peer.name(), false), Ok(peer), "the flag is called as the table says");
            assert!(peer.honestly().len() > 40);
        }
        assert_eq!(Peer::value_variants().len(), Peer::ALL.len());
        assert_eq!(Work::value_variants(), Work::ALL);
    }

    #[test]
    fn bars_go_both_ways() {
        let (most, least) = (Bar::most("CPU", 2.0, "µs"), Bar::least("rate", 10.0, "/s"));
        assert!(most.is_met(2.0) && !most.is_met(2.1) && least.is_met(10.0) && !least.is_met(9.0));
        assert!(!most.is_met(f64::NAN) && !least.is_met(f64::NAN), "what is not known is not met");
        assert_eq!(most.words(3.0), "CPU ≤ 2 µs: MISSED");
        assert_eq!(Bar::most("wrong", 0.0, "").words(0.0), "wrong ≤ 0: met");
    }

    #[test]
    fn who_forgets_everything_does_not_resume() {
        assert!(!Work::D.fits(Peer::Nats) && Work::D.fits(Peer::Jetstream) && Work::A.fits(Peer::Nats));
    }
}

//! What came out of a scene: every message with its moments, what happened to the network, and the judgement.
//!
//! - All moments are counted from the scene's beginning. Nothing here knows a clock.
//! - Figures are made from the messages when they are asked for, so table, plots and JSON can't differ.
//!
//! Not here: how it is shown (`report`, `live`), how it came about (`play`).

use std::collections::BTreeMap;
use std::time::Duration;

use fulmar_badnet::figures::Latencies;
use fulmar_badnet::proxy::Totals;

use super::scene::Scene;
use crate::cli::rehearsal::{number, ratio};

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// The phone that sent it, from 0.
    pub(super) speaker: usize,
    /// The phone it was for.
    pub(super) listener: usize,
    /// When it was handed to the SDK.
    pub(super) sent: Duration,
    /// When the sender knew that it is stored.
    pub(super) acked: Option<Duration>,
    /// When the other phone's app had it.
    pub(super) delivered: Option<Duration>,
    /// One of several at once.
    pub(super) burst: bool,
}

impl Message {
    pub(super) fn ack_latency(&self) -> Option<Duration> {
        self.acked.map(|acked| acked.saturating_sub(self.sent))
    }

    pub(super) fn delivery_latency(&self) -> Option<Duration> {
        self.delivered.map(|delivered| delivered.saturating_sub(self.sent))
    }
}

/// What happened to the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// When it began.
    pub(super) from: Duration,
    /// When it ended: the same moment, unless it was dark.
    pub(super) to: Duration,
    /// What it was, in a few words.
    pub(super) label: String,
    /// Whether the phones had something to recover from.
    pub(super) shakes: bool,
}

/// How soon the phones were back after a mark.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Recovery {
    /// What it was.
    pub(super) label: String,
    /// When it had ended.
    pub(super) at: Duration,
    /// By phone, shortest first: from the end of the mark (or the sending, if that was later) to the first message that
    /// reached the phone's app.
    pub(super) waits: Vec<Duration>,
    /// Phones that nothing reached any more.
    pub(super) never: usize,
}

impl Recovery {
    /// The wait in the middle; `None` when nobody was back.
    pub(super) fn median(&self) -> Option<Duration> {
        self.waits.get(self.waits.len() / 2).copied()
    }
}

/// Percentiles in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Percentiles {
    pub(super) count: u64,
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

/// What came out of one scene.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) scene: &'static Scene,
    pub(super) phones: usize,
    /// From the first message to the last moment at which one was waited for.
    pub(super) played: Duration,
    /// In order of sending.
    pub(super) messages: Vec<Message>,
    pub(super) marks: Vec<Mark>,
    /// From the start of a phone's client to its first being up to date, as far as they got there.
    pub(super) connects: Vec<Duration>,
    /// Connections that were welcomed, of all phones.
    pub(super) connections: u64,
    /// What became of the attempts to connect: by way and outcome.
    pub(super) attempts: BTreeMap<(&'static str, &'static str), u64>,
    /// Bytes the phones sent and received while messages were sent.
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    /// What both ends gave to the network in that time: UDP payloads, TCP segments with headers.
    pub(super) network_bytes: u64,
    /// What the bad network did, connecting included.
    pub(super) network: Totals,
    pub(super) duplicates: u64,
    pub(super) out_of_order: u64,
    pub(super) lost: u64,
    /// It was ended before its time.
    pub(super) interrupted: bool,
    /// Everything that is wrong, in words.
    pub(super) problems: Vec<String>,
}

impl Outcome {
    /// One of which nothing is known yet.
    pub(super) fn empty(scene: &'static Scene, phones: usize) -> Self {
        Self {
            scene,
            phones,
            played: Duration::ZERO,
            messages: Vec::new(),
            marks: Vec::new(),
            connects: Vec::new(),
            connections: 0,
            attempts: BTreeMap::new(),
            sent_bytes: 0,
            received_bytes: 0,
            network_bytes: 0,
            network: Totals::default(),
            duplicates: 0,
            out_of_order: 0,
            lost: 0,
            interrupted: false,
            problems: Vec::new(),
        }
    }

    /// Whether nothing is wrong.
    pub(super) fn passed(&self) -> bool {
        self.problems.is_empty()
    }

    pub(super) fn acks(&self) -> Percentiles {
        percentiles(self.messages.iter().filter_map(Message::ack_latency))
    }

    pub(super) fn deliveries(&self) -> Percentiles {
        percentiles(self.messages.iter().filter_map(Message::delivery_latency))
    }

    /// Bytes on the wire per message sent, both ways, of all phones; `None` without a message.
    pub(super) fn bytes_per_message(&self) -> Option<f64> {
        let messages = number(self.messages.len());
        (messages > 0).then(|| ratio(self.sent_bytes + self.received_bytes, messages))
    }

    /// Packets (and TCP segments) the network was given.
    pub(super) fn packets(&self) -> u64 {
        let network = &self.network;
        network.up.packets + network.down.packets + network.tcp.up.segments + network.tcp.down.segments
    }

    /// Packets (and TCP segments) the network dropped.
    pub(super) fn dropped(&self) -> u64 {
        dropped(&self.network)
    }

    /// The share it dropped, in percent.
    pub(super) fn dropped_percent(&self) -> f64 {
        100.0 * ratio(self.dropped(), self.packets())
    }

    /// How soon the phones were back after each mark that shook them.
    pub(super) fn recoveries(&self) -> Vec<Recovery> {
        let shaking = self.marks.iter().filter(|mark| mark.shakes);
        shaking.map(|mark| self.recovery(mark)).collect()
    }

    fn recovery(&self, mark: &Mark) -> Recovery {
        let mut waits = Vec::new();
        let mut never = 0;
        for phone in 0..self.phones {
            // What was on its way when the mark began says nothing about the time after it.
            let for_it = self.messages.iter().filter(|message| message.listener == phone);
            let later = for_it.filter(|message| message.sent >= mark.from);
            let mut any = false;
            let first = later
                .inspect(|_| any = true)
                .filter_map(|message| Some((message.delivered?, message.sent)))
                .filter(|(delivered, _)| *delivered >= mark.to)
                .min();
            match first {
                Some((delivered, sent)) => waits.push(delivered.saturating_sub(sent.max(mark.to))),
                None => never += usize::from(any),
            }
        }
        waits.sort_unstable();
        Recovery { label: mark.label.clone(), at: mark.to, waits, never }
    }
}

/// Packets (and TCP segments) that were dropped.
pub(super) fn dropped(network: &Totals) -> u64 {
    network.up.dropped() + network.down.dropped() + network.tcp.up.repeated + network.tcp.down.repeated
}

/// A duration in milliseconds.
pub(super) fn millis(span: Duration) -> f64 {
    span.as_secs_f64() * 1_000.0
}

pub(super) fn percentiles(latencies: impl Iterator<Item = Duration>) -> Percentiles {
    let mut all = Latencies::new();
    latencies.for_each(|latency| all.record(latency));
    let figures = all.figures();
    Percentiles {
        count: figures.count,
        p50: figures.p50,
        p95: all.millis_at(0.95),
        p99: figures.p99,
        max: figures.max,
    }
}

#[cfg(test)]
mod tests {
    use super::super::scene::SCENES;
    use super::*;

    fn message(speaker: usize, sent: u64, delivered: Option<u64>) -> Message {
        let ms = Duration::from_millis;
        let delivered = delivered.map(ms);
        Message { speaker, listener: 1 - speaker, sent: ms(sent), acked: delivered, delivered, burst: false }
    }

    #[test]
    fn recovery_counts_from_the_end_of_the_dark_or_from_the_sending() {
        let ms = Duration::from_millis;
        let mut outcome = Outcome::empty(&SCENES[0], 2);
        outcome.marks = vec![
            Mark { from: ms(1_000), to: ms(3_000), label: "dark".to_owned(), shakes: true },
            Mark { from: ms(9_000), to: ms(9_000), label: "fading".to_owned(), shakes: false },
        ];
        outcome.messages = vec![
            // On its way when the dark fell, delivered in it: no recovery.
            message(0, 950, Some(1_020)),
            // Sent in the dark: counts from its end.
            message(0, 1_500, Some(3_200)),
            // The other phone heard something only that was sent later.
            message(1, 4_000, Some(4_090)),
        ];
        let recoveries = outcome.recoveries();
        assert_eq!(recoveries.len(), 1);
        assert_eq!(recoveries[0].waits, [ms(90), ms(200)]);
        assert_eq!((recoveries[0].never, recoveries[0].median()), (0, Some(ms(200))));

        outcome.messages = vec![message(0, 1_500, None)];
        let recoveries = outcome.recoveries();
        assert_eq!((recoveries[0].waits.len(), recoveries[0].never, recoveries[0].median()), (0, 1, None));
    }

    #[test]
    fn figures_of_nothing_are_zero_or_absent() {
        let outcome = Outcome::empty(&SCENES[0], 2);
        assert_eq!(outcome.acks(), Percentiles::default());
        assert_eq!(outcome.bytes_per_message(), None);
        assert!(outcome.dropped_percent().abs() < f64::EPSILON);
        assert!(outcome.recoveries().is_empty() && outcome.passed());
    }
}

//! What the gateway counts, for Prometheus.
//!
//! - Every counter a stage needs stands here, so that a name is given once and the list can be read in one place.
//! - Labels are words of this program only: never a name or number of an app, user, conversation or address.
//! - Counting is a relaxed atomic add; [`Metrics`] is cheap to clone and share.
//!
//! Not here: serving the text ([`crate::http`]).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use fulmar_protocol::id::ShardId;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    /// A word of this program, such as `expired`.
    pub reason: &'static str,
}

/// With which code a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Code {
    /// A word of this program, such as `malformed`.
    pub code: &'static str,
}

/// Which queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Queue {
    /// A word of this program, such as `shard`.
    pub queue: &'static str,
}

/// Which core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CoreNumber {
    /// Its number, from 0.
    pub core: u16,
}

/// Which shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Shard {
    /// Its number.
    pub shard: u16,
}

/// What connections run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Transport {
    /// A word of this program: `quic`, `tls` or `websocket`.
    pub transport: &'static str,
}

/// What an ack has survived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Level {
    /// A word of the configuration: `power` or `process`.
    pub level: &'static str,
}

/// Which copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Direction {
    /// `up`: sends that came in datagrams; `down`: records that left in datagrams; `ack`: acks that did.
    pub direction: &'static str,
}

macro_rules! metrics {
    ($(
        #[doc = $help:literal]
        $name:ident : $ty:ty = $make:expr, $unit:expr;
    )*) => {
        /// All counters, gauges and histograms. Clones count into the same ones.
        #[derive(Clone, Debug)]
        pub struct Metrics {
            $( #[doc = $help] pub $name: $ty, )*
            registry: Arc<Registry>,
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::with_prefix("fulmar");
                $(
                    let $name: $ty = $make;
                    let help = $help.trim().trim_end_matches('.');
                    let unit: Option<Unit> = $unit;
                    match unit {
                        Some(unit) => registry.register_with_unit(stringify!($name), help, unit, $name.clone()),
                        None => registry.register(stringify!($name), help, $name.clone()),
                    }
                )*
                Self { $($name,)* registry: Arc::new(registry) }
            }
        }
    };
}

/// From a tenth of a millisecond to about thirteen seconds.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 18))
}

/// From one to 4 096.
fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 13))
}

metrics! {
    /// Connections held now.
    connections: Gauge = Gauge::default(), None;
    /// Connections accepted since the start.
    connections_accepted: Counter = Counter::default(), None;
    /// Connections held now, by what they run on.
    transport_connections: Family<Transport, Gauge> = Family::default(), None;
    /// Connections accepted since the start, by what they run on.
    transport_connections_accepted: Family<Transport, Counter> = Family::default(), None;
    /// Clients of an earlier process that was killed which were told that their connections are gone.
    clients_reset: Counter = Counter::default(), None;
    /// Connection attempts that were refused or asked to prove their address, by reason.
    attempts_turned_away: Family<Reason, Counter> = Family::default(), None;
    /// Handshakes in progress now.
    handshakes: Gauge = Gauge::default(), None;
    /// Handshakes that did not end in a session.
    handshakes_failed: Counter = Counter::default(), None;
    /// Sessions with a live connection now.
    sessions: Gauge = Gauge::default(), None;
    /// Sessions that came back with a ticket.
    sessions_resumed: Counter = Counter::default(), None;
    /// Times it was looked for what a device missed: `kept` where that was known from its last stay, else `full`.
    resume_looks: Family<Reason, Counter> = Family::default(), None;
    /// Conversations whose heads were read for that.
    resume_heads: Counter = Counter::default(), None;
    /// Devices for which it is kept what changes while they are away, by shard.
    away_devices: Family<Shard, Gauge> = Family::default(), None;
    /// Conversations that are kept as changed for devices, by shard.
    away_marks: Family<Shard, Gauge> = Family::default(), None;
    /// Devices of which that was forgotten, by reason: `expired`, `full` or (too many) `marks`.
    away_forgotten: Family<Reason, Counter> = Family::default(), None;
    /// Tokens and tickets that were refused, by reason.
    auth_refusals: Family<Reason, Counter> = Family::default(), None;
    /// Connections closed because the peer broke the protocol, by close code.
    protocol_violations: Family<Code, Counter> = Family::default(), None;
    /// Sends that got a place in the log.
    sends_accepted: Counter = Counter::default(), None;
    /// Sends that had their place already and were acknowledged again.
    sends_repeated: Counter = Counter::default(), None;
    /// Sends that were refused, by reason.
    sends_refused: Family<Reason, Counter> = Family::default(), None;
    /// Sends that were refused because they would have waited for too long, by reason: `late`, `full` or `follows` (one that was).
    sends_turned_away: Family<Reason, Counter> = Family::default(), None;
    /// Group commits.
    commits: Counter = Counter::default(), None;
    /// Group commits that failed; nothing of them is in the log.
    commits_failed: Counter = Counter::default(), None;
    /// Whether a shard's log can be written: 1, or 0 while writes are refused.
    storage_writable: Family<Shard, Gauge> = Family::default(), None;
    /// Requests refused because the log could not be written, by reason.
    storage_refusals: Family<Reason, Counter> = Family::default(), None;
    /// Reads and writes refused because what lies on disk is damaged.
    damaged_reads: Counter = Counter::default(), None;
    /// What an acknowledged message survives: 1 for the level that is configured.
    durability: Family<Level, Gauge> = Family::default(), None;
    /// Time from the start of a group commit until it is durable.
    commit_duration: Histogram = seconds(), Some(Unit::Seconds);
    /// Records per group commit.
    commit_records: Histogram = sizes(), None;
    /// Records written to lanes, once per recipient.
    deliveries: Counter = Counter::default(), None;
    /// Records gathered into one write to a lane.
    delivery_batch: Histogram = sizes(), None;
    /// Records read from the log for catch-up and history.
    backlog_records: Counter = Counter::default(), None;
    /// Copies in datagrams of what seemed to be lost, by direction.
    hedges: Family<Direction, Counter> = Family::default(), None;
    /// Times a connection fell behind a ring and was turned over to the log.
    fell_behind: Counter = Counter::default(), None;
    /// Ephemeral events dropped because they were stale or their queue was full.
    events_dropped: Counter = Counter::default(), None;
    /// Work that found a queue full, by queue.
    queue_full: Family<Queue, Counter> = Family::default(), None;
    /// Calls answered by the built-in service.
    calls: Counter = Counter::default(), None;
    /// Calls that were answered with a refusal, by reason.
    calls_refused: Family<Reason, Counter> = Family::default(), None;
    /// Receipts and cursors taken from devices.
    cursors_moved: Counter = Counter::default(), None;
    /// Bytes read from clients, transport overhead not included.
    received: Counter = Counter::default(), Some(Unit::Bytes);
    /// Bytes written to clients, transport overhead not included.
    sent: Counter = Counter::default(), Some(Unit::Bytes);
    /// Conversations retention looked at.
    retention_conversations: Counter = Counter::default(), None;
    /// Records retention took away.
    retention_records: Counter = Counter::default(), None;
    /// Bytes of records retention took away, about; the space is given back when segments are merged.
    retention: Counter = Counter::default(), Some(Unit::Bytes);
    /// When retention had last looked at all conversations of a shard, in seconds since 1970.
    retention_swept: Family<Shard, Gauge> = Family::default(), Some(Unit::Seconds);
    /// Cores that serve connections, each with an endpoint and a thread of its own; 0: one endpoint on shared threads.
    cores: Gauge<u64, AtomicU64> = Gauge::default(), None;
    /// Connections and handshakes of a core; all of them are core 0's where cores have no threads of their own.
    core_connections: Family<CoreNumber, Gauge> = Family::default(), None;
    /// How late a core reads its packets, the least in a tenth of a second. Above `limits.core_wait_ms` it takes sends in turns.
    core_lateness: Family<CoreNumber, Gauge<f64, AtomicU64>> = Family::default(), Some(Unit::Seconds);
    /// The part of its connections that may send at a time, of the app that may least; 1: all.
    core_open_share: Family<CoreNumber, Gauge<f64, AtomicU64>> = Family::default(), None;
    /// Times a core's thread looked at a shard that rested, in place of waking it.
    shard_visits: Counter = Counter::default(), None;
    /// Open-file limit of the process.
    open_files_limit: Gauge<u64, AtomicU64> = Gauge::default(), None;
}

impl Metrics {
    /// The text Prometheus scrapes (OpenMetrics 1.0).
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        // Writing to a String can't fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Counts a refused token or ticket.
    pub fn auth_refused(&self, reason: &'static str) {
        self.auth_refusals.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a look for what a device missed, and the heads that were read for it.
    pub fn looked(&self, how: &'static str, heads: u64) {
        self.resume_looks.get_or_create(&Reason { reason: how }).inc();
        self.resume_heads.inc_by(heads);
    }

    /// Says what a shard keeps for devices that are away.
    pub fn away(&self, shard: ShardId, devices: usize, marks: usize) {
        let shard = Shard { shard: shard.get() };
        self.away_devices.get_or_create(&shard).set(i64::try_from(devices).unwrap_or(i64::MAX));
        self.away_marks.get_or_create(&shard).set(i64::try_from(marks).unwrap_or(i64::MAX));
    }

    /// Counts devices that are away and of which nothing is known any more.
    pub fn forgotten(&self, reason: &'static str, times: u64) {
        if times > 0 {
            self.away_forgotten.get_or_create(&Reason { reason }).inc_by(times);
        }
    }

    /// Counts a connection that is up, and what it runs on.
    pub fn connected(&self, transport: &'static str) {
        self.connections_accepted.inc();
        self.connections.inc();
        self.transport_connections.get_or_create(&Transport { transport }).inc();
        self.transport_connections_accepted.get_or_create(&Transport { transport }).inc();
    }

    /// Counts a connection that was up and is no more.
    pub fn disconnected(&self, transport: &'static str) {
        self.connections.dec();
        self.transport_connections.get_or_create(&Transport { transport }).dec();
    }

    /// Counts a refused send.
    pub fn send_refused(&self, reason: &'static str) {
        self.sends_refused.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a send that was refused because it would have waited for too long.
    pub fn send_turned_away(&self, reason: &'static str) {
        self.sends_turned_away.get_or_create(&Reason { reason }).inc();
    }

    /// Says whether a shard's log can be written.
    pub fn storage_writable(&self, shard: ShardId, writable: bool) {
        self.storage_writable.get_or_create(&Shard { shard: shard.get() }).set(i64::from(writable));
    }

    /// Counts a request that was refused because the log could not be written.
    pub fn storage_refused(&self, reason: &'static str) {
        self.storage_refusals.get_or_create(&Reason { reason }).inc();
    }

    /// Says which level of durability is configured.
    pub fn durability(&self, level: &'static str) {
        self.durability.get_or_create(&Level { level }).set(1);
    }

    /// Says when retention was through with a shard, in seconds since 1970.
    pub fn retention_swept(&self, shard: ShardId, seconds: u64) {
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        self.retention_swept.get_or_create(&Shard { shard: shard.get() }).set(seconds);
    }

    /// Counts a refused call.
    pub fn call_refused(&self, reason: &'static str) {
        self.calls_refused.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a connection attempt that was not let in.
    pub fn turned_away(&self, reason: &'static str) {
        self.attempts_turned_away.get_or_create(&Reason { reason }).inc();
    }

    /// Counts a connection that was closed because the peer broke the protocol.
    pub fn violation(&self, code: &'static str) {
        self.protocol_violations.get_or_create(&Code { code }).inc();
    }

    /// Counts a copy in a datagram.
    pub fn hedged(&self, direction: &'static str) {
        self.hedges.get_or_create(&Direction { direction }).inc();
    }

    /// Counts work that found a queue full.
    pub fn full(&self, queue: &'static str) {
        self.queue_full.get_or_create(&Queue { queue }).inc();
    }

    /// Counts bytes read from a client.
    pub fn bytes_in(&self, bytes: u64) {
        self.received.inc_by(bytes);
    }

    /// Counts bytes written to a client.
    pub fn bytes_out(&self, bytes: u64) {
        self.sent.inc_by(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_in_the_text() {
        let metrics = Metrics::default();
        metrics.connections.set(2);
        metrics.connected("tls");
        metrics.connected("tls");
        metrics.disconnected("tls");
        metrics.clone().sends_accepted.inc_by(5);
        metrics.auth_refused("expired");
        metrics.auth_refused("expired");
        metrics.violation("malformed");
        metrics.full("shard");
        metrics.hedged("up");
        metrics.bytes_in(10);
        metrics.bytes_out(20);
        metrics.commit_duration.observe(0.000_3);
        metrics.commit_records.observe(64.0);
        let text = metrics.encode();
        for line in [
            "# HELP fulmar_connections Connections held now.",
            "# TYPE fulmar_connections gauge",
            "fulmar_connections 3",
            "fulmar_transport_connections{transport=\"tls\"} 1",
            "fulmar_transport_connections_accepted_total{transport=\"tls\"} 2",
            "fulmar_sends_accepted_total 5",
            "fulmar_auth_refusals_total{reason=\"expired\"} 2",
            "fulmar_protocol_violations_total{code=\"malformed\"} 1",
            "fulmar_queue_full_total{queue=\"shard\"} 1",
            "fulmar_hedges_total{direction=\"up\"} 1",
            "fulmar_received_bytes_total 10",
            "fulmar_sent_bytes_total 20",
            "fulmar_commit_duration_seconds_bucket{le=\"0.0004\"} 1",
            "fulmar_commit_records_bucket{le=\"64.0\"} 1",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}

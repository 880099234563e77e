//! What came of it: rows, a table for people, JSON for machines. The page with plots is in `page`.

use std::{fmt::Write as _, time::Duration};

use fulmar_benches::times::{Times, spoken};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    drive::Between,
    plan::{Peer, Point, Sizes},
    tally::Tally,
};

/// A thread that works more than this share of the time has queues of its own.
const BUSY: f64 = 0.85;

/// Lateness that nobody minds.
const LATE_ANYWAY: Duration = Duration::from_micros(500);

/// Times as they are spread, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// How many there are.
    pub(crate) count: u64,
    /// Half of them took no longer.
    pub(crate) p50: f64,
    /// And so on.
    pub(crate) p90: f64,
    /// And so on.
    pub(crate) p99: f64,
    /// And so on.
    pub(crate) p999: f64,
    /// The longest.
    pub(crate) max: f64,
}

impl From<&Times> for Spread {
    fn from(times: &Times) -> Self {
        let us = |share| times.quantile(share).as_secs_f64() * 1e6;
        let max = times.max().as_secs_f64() * 1e6;
        Self { count: times.len(), p50: us(0.5), p90: us(0.9), p99: us(0.99), p999: us(0.999), max }
    }
}

/// What one measurement of one server came to; what it is not about is `None`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Who.
    pub(crate) peer: Peer,
    /// Doing what.
    pub(crate) point: Point,
    /// Messages posted a second.
    pub(crate) posted: Option<f64>,
    /// Deliveries a second, or handshakes.
    pub(crate) rate: Option<f64>,
    /// CPU of the server for each of them, µs.
    pub(crate) cpu_us: Option<f64>,
    /// Cores the server used.
    pub(crate) cores: f64,
    /// Cores this program used; it has one thread.
    pub(crate) busy: f64,
    /// From due to each reader, or until a client had caught up.
    pub(crate) latency: Option<Spread>,
    /// From due to acked.
    pub(crate) ack: Option<Spread>,
    /// Memory of the server for each connection, KiB.
    pub(crate) memory_kib: Option<f64>,
    /// Until all had caught up, ms.
    pub(crate) caught_up_ms: Option<f64>,
    /// Deliveries that did not come in the time that was waited.
    pub(crate) missing: Option<u64>,
    /// That came after a later one.
    pub(crate) late: Option<u64>,
    /// That came a second time.
    pub(crate) again: Option<u64>,
    /// Syncs to disk for each message, where the server says.
    pub(crate) syncs_per_message: Option<f64>,
    /// What a reader must know.
    pub(crate) doubts: Vec<String>,
    /// The times of `latency`.
    #[serde(skip)]
    pub(crate) curve: Times,
}

impl Row {
    /// Nothing is known yet.
    pub(crate) fn new(peer: Peer, point: Point) -> Self {
        Self {
            peer,
            point,
            rate: None,
            posted: None,
            cpu_us: None,
            cores: 0.0,
            busy: 0.0,
            latency: None,
            ack: None,
            memory_kib: None,
            caught_up_ms: None,
            missing: None,
            late: None,
            again: None,
            syncs_per_message: None,
            doubts: Vec::new(),
            curve: Times::default(),
        }
    }

    fn shares(&mut self, between: &Between, of: u64) {
        let seconds = between.time.as_secs_f64().max(1e-9);
        self.rate = Some(of as f64 / seconds);
        self.cpu_us = (of > 0).then(|| between.server.as_secs_f64() * 1e6 / of as f64);
        self.cores = between.server.as_secs_f64() / seconds;
        self.busy = between.us.as_secs_f64() / seconds;
        if self.busy > BUSY {
            self.doubts.push(format!(
                "our own clients used {:.0} % of a core and have one: rates are what they could do, times hold their queue",
                self.busy * 100.0
            ));
        }
    }

    /// Messages were sent.
    pub(crate) fn measured(&mut self, between: &Between, tally: &Tally) {
        self.shares(between, between.delivered);
        self.posted = Some(between.posted as f64 / between.time.as_secs_f64().max(1e-9));
        self.latency = Some((&tally.delivery).into());
        self.ack = (!tally.ack.is_empty()).then(|| (&tally.ack).into());
        self.curve = tally.delivery.clone();
        self.late = Some(tally.late);
        self.again = Some(tally.again);
        let (handed, half) = (tally.handed.quantile(0.99), tally.delivery.quantile(0.5));
        if handed > LATE_ANYWAY.max(half / 5) {
            self.doubts.push(format!(
                "1 % of the messages were handed over more than {} after they were due, by us or for want of room; times hold that",
                spoken(handed)
            ));
        }
    }

    /// Clients connected.
    pub(crate) fn connected(&mut self, between: &Between, count: u32) {
        self.shares(between, count.into());
    }

    /// A figure by the name bars know it by, in their unit.
    pub(crate) fn figure(&self, name: &str) -> f64 {
        let latency = |of: fn(&Spread) -> f64| self.latency.as_ref().map(|spread| of(spread) / 1e3);
        let wrong = || Some((self.missing? + self.late? + self.again?) as f64);
        let value = match name {
            "CPU" => self.cpu_us,
            "rate" => self.rate,
            "p50" => latency(|spread| spread.p50),
            "p99" => latency(|spread| spread.p99),
            "memory" => self.memory_kib,
            "caught up" => self.caught_up_ms,
            "wrong" => wrong(),
            _ => None,
        };
        value.unwrap_or(f64::NAN)
    }

    /// The bars, and how they were met; only Fulmar has some.
    pub(crate) fn bars(&self) -> Vec<String> {
        let bars = if self.peer == Peer::Fulmar { self.point.bars() } else { Vec::new() };
        bars.iter().map(|bar| bar.words(self.figure(bar.figure))).collect()
    }
}

/// A server that was measured, or was not.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Guest {
    /// Who.
    pub(crate) peer: Peer,
    /// How it was set; empty if it never ran.
    pub(crate) setting: String,
    /// Why something of it is missing.
    pub(crate) trouble: Vec<String>,
}

/// A whole run.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// As it was typed.
    pub(crate) command_line: String,
    /// The commit, if known.
    pub(crate) commit: String,
    /// Processor, kernel, cores, load.
    pub(crate) machine: String,
    /// Too short to quote.
    pub(crate) is_quick: bool,
    /// How much of everything.
    pub(crate) sizes: Sizes,
    /// Who was asked for.
    pub(crate) guests: Vec<Guest>,
    /// What came of it.
    pub(crate) rows: Vec<Row>,
}

/// How to read the figures.
pub(crate) const NOTES: [&str; 4] = [
    "CPU is user and kernel time of the server's process (/proc), for each delivery, handshake or client; ours is not in it.",
    "Times are from when a message was due (paced: open loop) or posted (saturated: a fixed number ahead) to each reader and to the ack.",
    "All clients are one thread of one process on the same machine; `us` is how much of a core it used. Near 1, rates are our limit.",
    "Saturated times are the queue's: they tell how far ahead senders were, not how fast the server is.",
];

impl Report {
    /// Rows of one point, in the order of the servers.
    pub(crate) fn rows_of(&self, point: Point) -> Vec<&Row> {
        self.rows.iter().filter(|row| row.point == point).collect()
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        for point in Point::ALL {
            let rows = self.rows_of(point);
            if !rows.is_empty() {
                let _ = writeln!(text, "\n{}", point.title(&self.sizes));
                write_rows(&mut text, point, &rows);
            }
        }
        let _ = writeln!(text, "\nWho they are");
        for guest in &self.guests {
            if !guest.setting.is_empty() {
                let _ = writeln!(
                    text,
                    "- {}: {}\n  ({})",
                    guest.peer.name(),
                    guest.peer.honestly(),
                    guest.setting
                );
            }
            for trouble in &guest.trouble {
                let _ = writeln!(text, "- {}: NOT MEASURED: {trouble}", guest.peer.name());
            }
        }
        let _ = writeln!(text, "\nHow to read it");
        for note in NOTES {
            let _ = writeln!(text, "- {note}");
        }
        let _ = writeln!(text, "- {}; {}", self.machine, self.commit);
        if self.is_quick {
            text.push_str("- quick: too short to quote\n");
        }
        text
    }

    /// For machines.
    pub(crate) fn json(&self) -> Value {
        json!({
            "bench": "peers",
            "command": self.command_line,
            "commit": self.commit,
            "machine": self.machine,
            "quick": self.is_quick,
            "sizes": self.sizes,
            "peers": self.guests.iter().map(|guest| json!({
                "peer": guest.peer, "honestly": guest.peer.honestly(), "setting": guest.setting, "trouble": guest.trouble,
            })).collect::<Vec<_>>(),
            "rows": self.rows,
            "bars": self.rows.iter().flat_map(|row| row.bars().into_iter().map(|bar| json!({ "point": row.point, "bar": bar }))).collect::<Vec<_>>(),
        })
    }
}

/// A column: its heading, and what stands in it.
type Column = (&'static str, fn(&Row) -> String);

/// The columns of a point's table.
fn columns(point: Point) -> &'static [Column] {
    const CPU: fn(&Row) -> String = |row| row.cpu_us.map_or_else(dash, number);
    const US: fn(&Row) -> String = |row| format!("{:.2}", row.busy);
    const CORES: fn(&Row) -> String = |row| format!("{:.2}", row.cores);
    const RATE: fn(&Row) -> String = |row| row.rate.map_or_else(dash, |rate| format!("{rate:.0}"));
    const LATENCY: fn(&Row) -> String = |row| spread(row.latency.as_ref());
    const ACK: fn(&Row) -> String = |row| spread(row.ack.as_ref());
    const WRONG: fn(&Row) -> String = |row| {
        let word = |count: Option<u64>| count.map_or_else(dash, |count| count.to_string());
        [row.missing, row.late, row.again].map(word).join("/")
    };
    const SYNCS: fn(&Row) -> String =
        |row| row.syncs_per_message.map_or_else(dash, |syncs| format!("{syncs:.3}"));
    match point {
        Point::Connections => &[
            ("handshakes/s", RATE),
            ("CPU each, µs", CPU),
            ("server", CORES),
            ("us", US),
            ("memory each, KiB", |row| row.memory_kib.map_or_else(dash, number)),
        ],
        Point::Resume => &[
            ("all caught up, ms", |row| row.caught_up_ms.map_or_else(dash, number)),
            ("each: p50/p99/p99.9, ms", LATENCY),
            ("CPU each, µs", CPU),
            ("server", CORES),
            ("us", US),
            ("missing/late/twice", WRONG),
        ],
        _ => &[
            ("messages/s", |row| row.posted.map_or_else(dash, |rate| format!("{rate:.0}"))),
            ("deliveries/s", RATE),
            ("CPU each, µs", CPU),
            ("server", CORES),
            ("us", US),
            ("to reader p50/p99/p99.9, ms", LATENCY),
            ("to ack p50/p99/p99.9, ms", ACK),
            ("missing/late/twice", WRONG),
            ("syncs/message", SYNCS),
        ],
    }
}

fn dash() -> String {
    "–".to_owned()
}

fn spread(spread: Option<&Spread>) -> String {
    spread.map_or_else(dash, |spread| {
        [spread.p50, spread.p99, spread.p999].map(|us| number(us / 1e3)).join(" / ")
    })
}

/// Three digits, without an exponent.
fn number(value: f64) -> String {
    match value.abs() {
        magnitude if magnitude >= 100.0 => format!("{value:.0}"),
        magnitude if magnitude >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The cells of one point's table, its heading first.
pub(crate) fn cells(point: Point, rows: &[&Row]) -> Vec<Vec<String>> {
    let heading = std::iter::once("").chain(columns(point).iter().map(|(name, _)| *name)).map(str::to_owned);
    let body = rows.iter().map(|row| {
        let cells = columns(point).iter().map(|(_, cell)| cell(row));
        std::iter::once(row.peer.name().to_owned()).chain(cells).collect()
    });
    std::iter::once(heading.collect()).chain(body).collect()
}

fn write_rows(text: &mut String, point: Point, rows: &[&Row]) {
    let table = cells(point, rows);
    let mut widths = Vec::new();
    for cells in &table {
        widths.resize(widths.len().max(cells.len()), 0);
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = cell.chars().count().max(*width);
        }
    }
    for cells in &table {
        let mut line = String::from("  ");
        for (width, cell) in widths.iter().zip(cells) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    for row in rows {
        for bar in row.bars() {
            let _ = writeln!(text, "  {}: {bar}", row.peer.name());
        }
        for doubt in &row.doubts {
            let _ = writeln!(text, "  - {}: {doubt}", row.peer.name());
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A run of two servers.
    pub(crate) fn report() -> Report {
        let mut rows = Vec::new();
        for (peer, cpu) in [(Peer::Fulmar, 30), (Peer::Nats, 10)] {
            let mut tally = Tally::default();
            tally.came(crate::tally::Arrival::InOrder, Some(Duration::from_millis(5)));
            let between = Between {
                time: Duration::from_secs(10),
                server: Duration::from_secs(cpu),
                us: Duration::from_secs(9),
                delivered: 1_000_000,
                posted: 1_000,
            };
            let mut row = Row::new(peer, Point::FanOutSaturated);
            row.measured(&between, &tally);
            row.missing = Some(3);
            rows.push(row);
        }
        let guest = |peer, setting: &str, trouble: &[&str]| Guest {
            peer,
            setting: setting.to_owned(),
            trouble: trouble.iter().map(|trouble| (*trouble).to_owned()).collect(),
        };
        Report {
            command_line: "fulmar-peers <x>".to_owned(),
            commit: "abc".to_owned(),
            machine: "a machine".to_owned(),
            is_quick: true,
            sizes: Sizes::full(),
            guests: vec![
                guest(Peer::Fulmar, "as it is", &[]),
                guest(Peer::Nats, "core", &[]),
                guest(Peer::Rumqttd, "", &["rumqttd is not built"]),
            ],
            rows,
        }
    }

    #[test]
    fn the_table_says_what_a_delivery_costs_who_was_slow_and_who_is_missing() {
        let table = report().table();
        for words in [
            "fan-out 1 to 1000, saturated",
            "100000",
            "100 ",
            "30.0",
            "3/0/0",
            "CPU ≤ 2 µs: MISSED",
            "our own clients used 90 % of a core",
            "rumqttd: NOT MEASURED: rumqttd is not built",
            "No acks at all",
            "quick: too short to quote",
        ] {
            assert!(table.contains(words), "{words}:\n{table}");
        }
        assert!(!table.contains("nats: CPU ≤"), "bars are Fulmar's");
        assert!(!table.contains("D  "), "what was not measured has no table");
    }

    #[test]
    fn figures_that_are_not_known_are_no_numbers() {
        let row = Row::new(Peer::Fulmar, Point::Resume);
        assert!(row.figure("CPU").is_nan() && row.figure("wrong").is_nan() && row.figure("x").is_nan());
        assert!(row.bars().iter().all(|bar| bar.ends_with("MISSED")));
    }

    #[test]
    fn json_has_the_same() {
        let json = report().json();
        assert_eq!(json["rows"][0]["cpu_us"], 30.0);
        assert_eq!(json["rows"][1]["peer"], "nats");
        assert_eq!(json["rows"][1]["point"], "fan_out_saturated");
        assert_eq!(json["peers"][2]["trouble"][0], "rumqttd is not built");
        assert_eq!(json["sizes"]["receivers"], 1_000);
    }
}

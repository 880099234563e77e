//! The table for people and the file for plots.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::json;

use crate::{
    cell::{Outcome, Spec},
    plan::Condition,
};

/// The round trip the bars are about, ms.
const BARS_RTT_MS: u64 = 100;

/// One measured cell.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    /// What was asked.
    pub(crate) spec: Spec,
    /// What came.
    pub(crate) outcome: Outcome,
}

impl Cell {
    fn condition(&self) -> Option<Condition> {
        Condition::named(&self.spec.condition)
    }

    /// IP bytes of all packets, both directions, per message.
    fn bytes_per_message(&self) -> u64 {
        let bytes: u64 = self.outcome.wire.iter().map(|counts| counts.bytes).sum();
        bytes.checked_div(self.outcome.messages).unwrap_or_default()
    }

    /// One line while others are still measured.
    pub(crate) fn line(&self) -> String {
        let figures = &self.outcome.figures;
        format!(
            "{:<14} {:<8} p50 {:>6.1}  p95 {:>6.1}  p99 {:>6.1}  max {:>7.1} ms  of {}, load {:.1}",
            self.spec.peer.name(),
            self.spec.condition,
            figures.latency.p50,
            figures.latency.p95,
            figures.latency.p99,
            figures.latency.max,
            figures.sent,
            self.outcome.load[1],
        )
    }
}

/// All cells, network by network, with the bars.
pub(crate) fn table(cells: &[Cell]) -> String {
    let mut text = String::new();
    let mut rows = vec![
        [
            "network",
            "peer",
            "p50",
            "p95",
            "p99",
            "max",
            "bar p99",
            "elsewhere p99",
            "lost/twice/late",
            "bytes",
        ]
        .map(str::to_owned),
    ];
    let mut legs = vec![
        [
            "network",
            "peer",
            "up p50",
            "p99",
            "down p50",
            "p99",
            "ack p50",
            "p99",
            "reconnects",
            "by",
            "wire late",
            "load",
        ]
        .map(str::to_owned),
    ];
    for condition in Condition::ALL {
        let of_it = cells.iter().filter(|cell| cell.condition().is_some_and(|c| c.name == condition.name));
        for cell in of_it {
            let (figures, ms) = (&cell.outcome.figures, |value: f64| format!("{value:.0}"));
            let bar =
                condition.bar_ms.filter(|_| cell.spec.rtt_ms == BARS_RTT_MS && cell.spec.peer.has_bars());
            rows.push([
                condition.title.to_owned(),
                cell.spec.peer.title().to_owned(),
                ms(figures.latency.p50),
                ms(figures.latency.p95),
                ms(figures.latency.p99),
                ms(figures.latency.max),
                bar.map_or_else(String::new, |bar| {
                    let met = figures.latency.p99 <= f64::from(bar);
                    format!("{bar}: {}", if met { "met" } else { "MISSED" })
                }),
                condition
                    .elsewhere_ms
                    .map_or_else(String::new, |(tls, quic)| format!("rmqtt TLS {tls}, QUIC {quic}")),
                format!("{}/{}/{}", figures.lost, figures.duplicates, figures.disorder),
                cell.bytes_per_message().to_string(),
            ]);
            let of = |curve: &Option<crate::measure::Curve>, pick: fn(&crate::measure::Curve) -> f64| {
                curve.as_ref().map_or_else(|| "-".to_owned(), |curve| ms(pick(curve)))
            };
            legs.push([
                condition.title.to_owned(),
                cell.spec.peer.title().to_owned(),
                of(&figures.up, |curve| curve.p50),
                of(&figures.up, |curve| curve.p99),
                of(&figures.down, |curve| curve.p50),
                of(&figures.down, |curve| curve.p99),
                ms(figures.ack.p50),
                ms(figures.ack.p99),
                cell.outcome.reconnects.map_or_else(|| "-".to_owned(), |count| count.to_string()),
                cell.outcome.transports.map_or_else(
                    || "-".to_owned(),
                    |by| format!("{}/{}/{}/{}", by.quic, by.tls, by.websocket, by.none),
                ),
                format!("{:.1}/{:.0}", cell.outcome.wire_late.p99, cell.outcome.wire_late.max),
                format!("{:.1}-{:.1}", cell.outcome.load[0], cell.outcome.load[1]),
            ]);
        }
    }
    let _ = writeln!(text, "\nShould have left → read, ms");
    write_rows(&mut text, &rows);
    let _ = writeln!(
        text,
        "\nWhere it goes, ms: up → stored (by the gateway's clock), down → read; ack → the sender knows"
    );
    write_rows(&mut text, &legs);
    if let Some(Cell { spec, outcome }) = cells.first() {
        let _ = writeln!(
            text,
            "\n{} pairs, 1 to 5 messages/s each, 128 B, RTT {} ms, {} s after {} s of warm-up, seed {}; TCP: {}.\n\
             lost/twice/late: never read, read twice, read after a later one. bytes: IP, both directions, per message.\n\
             by: clients by QUIC/TLS/WebSocket/not connected at the end.\n\
             wire late: how late the lab's own wire was, p99/max ms. bar and elsewhere: targets for Fulmar, and what \
             another run of other programs showed.",
            spec.pairs, spec.rtt_ms, spec.seconds, spec.warm_up_s, spec.seed, outcome.congestion
        );
    }
    text
}

fn write_rows<const N: usize>(text: &mut String, rows: &[[String; N]]) {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

/// Everything, for plots.
pub(crate) fn json(cells: &[Cell], commit: &str) -> serde_json::Value {
    let bars: Vec<_> = Condition::ALL
        .iter()
        .map(|condition| {
            json!({
                "condition": condition.name,
                "title": condition.title,
                "bar_p99_ms": condition.bar_ms,
                "elsewhere_p99_ms": condition.elsewhere_ms.map(|(tls, quic)| {
                    json!({ "rmqtt_tls": tls, "rmqtt_quic": quic })
                }),
            })
        })
        .collect();
    json!({
        "bench": "netlab",
        "commit": commit,
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "conditions": bars,
        "cells": cells,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        link::Counts,
        measure::{Curve, Figures},
        plan::Peer,
    };

    fn cell(peer: Peer, condition: &str, p99: f64, rtt_ms: u64) -> Cell {
        let curve = Curve { count: 1, p50: 100.0, p95: 150.0, p99, p999: p99, max: p99, points: vec![] };
        let figures = Figures {
            sent: 1_000,
            lost: 1,
            duplicates: 2,
            disorder: 3,
            strangers: 0,
            latency: curve.clone(),
            ack: curve.clone(),
            up: None,
            down: Some(curve.clone()),
            handed_late: curve.clone(),
            slowest: vec![],
        };
        let spec = Spec {
            peer,
            condition: condition.to_owned(),
            pairs: 20,
            warm_up_s: 1,
            seconds: 2,
            drain_s: 3,
            seed: 4,
            rtt_ms,
            congestion: None,
            trace: None,
            samples: false,
            folder: "/nowhere".into(),
        };
        let wire = [Counts { bytes: 3_000, ..Counts::default() }; 2];
        let outcome = Outcome {
            figures,
            wire,
            wire_late: curve,
            load: [1.0, 2.0],
            congestion: "cubic".to_owned(),
            reconnects: None,
            transports: None,
            messages: 20,
        };
        Cell { spec, outcome }
    }

    #[test]
    fn bars_are_for_fulmar_at_their_round_trip() {
        let verdicts = |cell: Cell| {
            let table = table(&[cell]);
            (table.contains("MISSED"), table.contains(": met"))
        };
        assert_eq!(verdicts(cell(Peer::FulmarQuic, "loss-5", 261.0, 100)), (true, false));
        assert_eq!(verdicts(cell(Peer::FulmarQuic, "loss-5", 259.0, 100)), (false, true));
        assert_eq!(verdicts(cell(Peer::FulmarQuic, "loss-5", 261.0, 200)), (false, false));
        assert_eq!(verdicts(cell(Peer::FulmarQuic, "loss-0", 261.0, 100)), (false, false));
        assert_eq!(verdicts(cell(Peer::MosquittoTls, "loss-5", 261.0, 100)), (false, false));
    }

    #[test]
    fn a_row_says_what_was_measured() {
        let cells =
            [cell(Peer::MosquittoTls, "dark-5", 777.0, 100), cell(Peer::FulmarQuic, "loss-1", 5.0, 100)];
        let table = table(&cells);
        let row = table.lines().find(|line| line.contains("mosquitto") && line.contains("777")).unwrap();
        assert!(row.contains("1/2/3") && row.contains("300"), "{row}");
        let order: Vec<_> = table.lines().filter(|line| line.contains("1/2/3")).collect();
        assert!(order[0].starts_with("1 % lost") && order[1].starts_with("dark 5 %"), "{table}");
        let json = json(&cells, "abc");
        assert_eq!(json["cells"][0]["outcome"]["figures"]["latency"]["p99"], 777.0);
        assert_eq!(json["cells"][0]["spec"]["peer"], "mosquitto-tls");
    }
}

//! What a run came to: a table for people, JSON for machines. The page with plots is in `page`.

use std::{fmt::Write as _, time::Duration};

use serde_json::{Value, json};

use fulmar_benches::times::{Times, spoken};

use crate::tally::Counts;

/// One second of the run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Second {
    /// Seconds after the beginning of the talk.
    pub(crate) at: f64,
    /// Messages acked in it.
    pub(crate) acked: f64,
    /// Deliveries.
    pub(crate) delivered: f64,
    /// Half of the deliveries took no longer.
    pub p50: Duration,
    /// 99 % of them.
    pub p99: Duration,
    /// Half of the messages acked in it were durable no later.
    pub(crate) ack_p50: Duration,
    /// 99 % of them.
    pub(crate) ack_p99: Duration,
    /// 99 % of them, since they had left for the last time.
    pub(crate) admitted_p99: Duration,
    /// Sends that were refused for now.
    pub(crate) put_off: f64,
    /// CPU of the gateway, cores.
    pub(crate) cores: f64,
    /// Its memory, bytes.
    pub(crate) resident: u64,
}

/// Memory of the gateway, bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Before anybody connected.
    pub(crate) empty: u64,
    /// When the last phone had its WELCOME: what handshakes take for a moment is among it.
    pub(crate) connected: u64,
    /// At the end of the measured time.
    pub(crate) end: u64,
    /// At its most.
    pub(crate) most: u64,
}

/// What is known in the end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Run {
    /// As it was typed.
    pub(crate) command_line: String,
    /// What the phones did, in words.
    pub(crate) work: String,
    /// Seconds that were measured.
    pub(crate) seconds: f64,
    /// All counts.
    pub(crate) counts: Counts,
    /// Deliveries that were to come and did not.
    pub(crate) missing: u64,
    /// The same of slow readers.
    pub(crate) missing_slowly: u64,
    /// How many phones read slowly.
    pub(crate) slow: u32,
    /// The gateway's memory when the last message was due.
    pub(crate) resident: Option<u64>,
    /// From when to when more was due, in seconds after the beginning of the talk.
    pub(crate) surge: Option<(f64, f64)>,
    /// What a reader must know.
    pub(crate) doubts: Vec<String>,
    /// The gateway's CPU in the measured time; `None`: not known.
    pub(crate) cpu: Option<Duration>,
    /// Memory of the gateway.
    pub(crate) memory: Option<Memory>,
    /// Memory of this program in the end, bytes.
    pub(crate) own_memory: u64,
    /// Phones that were connected.
    pub(crate) phones: u32,
    /// CPU of the gateway from the first connect to the last WELCOME.
    pub(crate) connect_cpu: Option<Duration>,
    /// How long that took.
    pub(crate) connecting: Duration,
    /// UDP packets of both sides in the measured time.
    pub(crate) packets: u64,
    /// Second by second.
    pub(crate) timeline: Vec<Second>,
}

const SHARES: [(&str, f64); 5] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];

impl Run {
    /// The kinds of times there are, with their names.
    pub(crate) fn times(&self) -> [(&'static str, &Times); 13] {
        let counts = &self.counts;
        [
            ("send to durable ack", &counts.ack),
            ("last sending to durable ack", &counts.admitted),
            ("send to each recipient", &counts.delivery),
            ("… who has it open", &counts.looking),
            ("… who has not", &counts.elsewhere),
            ("send to the last recipient", &counts.last),
            ("broadcast to each recipient", &counts.told),
            ("broadcast to the last recipient", &counts.told_last),
            ("wish to connect to WELCOME", &counts.connect),
            ("lost in a storm to WELCOME", &counts.back),
            ("… deliveries meanwhile", &counts.stormy),
            ("… deliveries otherwise", if counts.back.is_empty() { &counts.back } else { &counts.calm }),
            ("generator's lateness", &counts.late),
        ]
    }

    /// Messages acked a second.
    pub(crate) fn acked_per_second(&self) -> f64 {
        self.counts.acked as f64 / self.seconds.max(1e-9)
    }

    /// Cores the gateway used.
    pub(crate) fn cores(&self) -> Option<f64> {
        self.cpu.map(|cpu| cpu.as_secs_f64() / self.seconds.max(1e-9))
    }

    /// The gateway's CPU per delivery, µs.
    pub(crate) fn cpu_per_delivery(&self) -> Option<f64> {
        self.per(self.cpu, self.counts.delivered)
    }

    /// Seconds from the end of the surge until messages are acked as quickly as before it, and stay so; `None`: not so.
    pub(crate) fn recovered_after(&self) -> Option<f64> {
        let (from, until) = self.surge?;
        let before = self.timeline.iter().filter(|second| second.at < from && second.at > from - 5.0);
        let usual = before.map(|second| second.ack_p99).max()?;
        let bound = (2 * usual).max(Duration::from_millis(20));
        let after = || self.timeline.iter().filter(|second| second.at > until);
        let last_bad = after().filter(|second| second.ack_p99 > bound).map(|second| second.at).next_back();
        let end = after().map(|second| second.at).next_back()?;
        match last_bad {
            None => Some(0.0),
            Some(bad) if bad < end => Some(bad - until),
            Some(_) => None,
        }
    }

    fn per(&self, cpu: Option<Duration>, of: u64) -> Option<f64> {
        cpu.filter(|_| of > 0).map(|cpu| cpu.as_secs_f64() * 1e6 / of as f64)
    }

    /// Deliveries in the measured time, slow readers' left out.
    pub(crate) fn deliveries_per_second(&self) -> f64 {
        self.counts.delivered as f64 / self.seconds.max(1e-9)
    }

    /// What must not be in any run.
    pub(crate) fn wrong(&self) -> Vec<String> {
        let Counts { disordered, refused, refusal, .. } = &self.counts;
        let why = refusal.as_deref().unwrap_or("no word");
        [
            (
                *disordered,
                format!("{disordered} deliveries came twice, out of order, or to a slow reader after a hole"),
            ),
            (
                *refused,
                format!(
                    "{refused} connects or sends were refused or connections ended, the first one: {why}"
                ),
            ),
            (self.missing, format!("{} deliveries did not come", self.missing)),
            (self.missing_slowly, format!("{} deliveries to slow readers did not come", self.missing_slowly)),
        ]
        .into_iter()
        .filter_map(|(count, what)| (count > 0).then_some(what))
        .collect()
    }

    /// Memory of the gateway per connected phone, bytes: at the last WELCOME, and at the end.
    pub(crate) fn per_phone(&self) -> Option<[f64; 2]> {
        let Memory { empty, connected, end, .. } = self.memory?;
        let each = |now: u64| now.saturating_sub(empty) as f64 / f64::from(self.phones);
        (self.phones > 0).then(|| [each(connected), each(end)])
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let counts = &self.counts;
        let mut text = format!("\n{}\n\n", self.work);
        let _ = write!(text, "  {:<28}{:>10}", "", "count");
        for (name, _) in SHARES {
            let _ = write!(text, "{name:>10}");
        }
        text.push('\n');
        for (name, times) in self.times().into_iter().filter(|(_, times)| !times.is_empty()) {
            let _ = write!(text, "  {name:<28}{:>10}", times.len());
            for (_, share) in SHARES {
                let _ = write!(text, "{:>10}", spoken(times.quantile(share)));
            }
            text.push('\n');
        }
        text.push('\n');
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<28}{value}");
        };
        row(
            "messages",
            format!(
                "{} due, {} sent, {} acked in {:.1} s",
                counts.due, counts.sent, counts.acked, self.seconds
            ),
        );
        if counts.put_off > 0 {
            row(
                "refused for now",
                format!("{} times ({:.0}/s)", counts.put_off, counts.put_off as f64 / self.seconds),
            );
        }
        for (app, of_app) in counts.apps.iter().enumerate().filter(|_| counts.apps.len() > 1) {
            row(
                &format!("app {app}"),
                format!(
                    "{:.0}/s due, {:.0}/s acked ({:.1} %), {:.0}/s refused; ack p50 {}, p99 {}; since last sending p99 {}",
                    of_app.due as f64 / self.seconds,
                    of_app.acked as f64 / self.seconds,
                    100.0 * of_app.acked as f64 / of_app.due.max(1) as f64,
                    of_app.put_off as f64 / self.seconds,
                    spoken(of_app.ack.quantile(0.5)),
                    spoken(of_app.ack.quantile(0.99)),
                    spoken(of_app.admitted.quantile(0.99)),
                ),
            );
        }
        if self.surge.is_some() {
            let recovered = self.recovered_after();
            row(
                "as quick as before",
                recovered
                    .map_or_else(|| "not again".to_owned(), |after| format!("{after:.0} s after the surge")),
            );
        }
        row("deliveries", format!("{} ({:.0}/s)", counts.delivered, self.deliveries_per_second()));
        if counts.heads > 0 {
            let each = counts.heads as f64 / self.seconds.max(1e-9) / f64::from(self.phones.max(1));
            row(
                "heads",
                format!(
                    "{} ({:.0}/s, {each:.2}/s a phone), {} of them less than 0.9 s after another",
                    counts.heads,
                    counts.heads as f64 / self.seconds.max(1e-9),
                    counts.heads_early,
                ),
            );
        }
        if counts.delivered_slowly > 0 {
            row(
                "deliveries to slow readers",
                format!("{}, {} missing in the end", counts.delivered_slowly, self.missing_slowly),
            );
        }
        if let Some(cpu) = self.cpu {
            row("gateway's CPU", format!("{:.2} cores", cpu.as_secs_f64() / self.seconds.max(1e-9)));
        }
        if let Some(each) = self.per(self.cpu, counts.delivered) {
            row("… per delivery", format!("{each:.2} µs"));
        }
        if let Some(each) = self.per(self.cpu, counts.acked) {
            row("… per message", format!("{each:.1} µs"));
        }
        if let Some(each) = self.per(self.connect_cpu, u64::from(self.phones)) {
            row("… per connect", format!("{each:.0} µs"));
        }
        row(
            "connects",
            format!(
                "{} in {:.1} s ({:.0}/s)",
                self.phones,
                self.connecting.as_secs_f64(),
                f64::from(self.phones) / self.connecting.as_secs_f64().max(1e-9)
            ),
        );
        if counts.turned_away > 0 {
            row("turned away in a storm", format!("{} attempts, which were made again", counts.turned_away));
        }
        if let (Some(memory), Some([connected, end])) = (self.memory, self.per_phone()) {
            row(
                "gateway's memory",
                format!(
                    "{} MiB empty, {} connected ({:.1} KiB a phone), {} in the end ({:.1}), {} at the most",
                    memory.empty >> 20,
                    memory.connected >> 20,
                    connected / 1024.0,
                    memory.end >> 20,
                    end / 1024.0,
                    memory.most >> 20
                ),
            );
        }
        row("generator's memory", format!("{} MiB", self.own_memory >> 20));
        if counts.delivered > 0 {
            row(
                "packets, both sides",
                format!("{:.2} per delivery", self.packets as f64 / counts.delivered as f64),
            );
        }
        if self.doubts.is_empty() {
            text.push_str("\n  The generator kept up; nothing speaks against these figures.\n");
        } else {
            text.push_str("\n  Read with care:\n");
            for doubt in &self.doubts {
                let _ = writeln!(text, "  - {doubt}");
            }
        }
        text
    }

    /// For machines. Times are in microseconds.
    pub(crate) fn json(&self) -> Value {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let times: serde_json::Map<String, Value> = self
            .times()
            .into_iter()
            .map(|(name, times)| {
                let mut all = serde_json::Map::new();
                all.insert("count".to_owned(), json!(times.len()));
                for (share, at) in SHARES {
                    all.insert(share.to_owned(), json!(us(times.quantile(at))));
                }
                (name.to_owned(), Value::Object(all))
            })
            .collect();
        let counts = &self.counts;
        let timeline: Vec<Value> = self
            .timeline
            .iter()
            .map(|second| {
                json!({
                    "at_s": second.at, "acked": second.acked, "delivered": second.delivered,
                    "p50_us": us(second.p50), "p99_us": us(second.p99),
                    "ack_p50_us": us(second.ack_p50), "ack_p99_us": us(second.ack_p99),
                    "admitted_p99_us": us(second.admitted_p99), "put_off": second.put_off,
                    "cores": second.cores, "resident_bytes": second.resident,
                })
            })
            .collect();
        json!({
            "command": self.command_line,
            "work": self.work,
            "seconds": self.seconds,
            "times_us": times,
            "due": counts.due, "sent": counts.sent, "acked": counts.acked,
            "delivered": counts.delivered, "delivered_slowly": counts.delivered_slowly,
            "missing": self.missing, "missing_slowly": self.missing_slowly, "put_off": counts.put_off,
            "heads": counts.heads, "heads_early": counts.heads_early,
            "given_up": counts.given_up, "resident_bytes": self.resident, "recovered_after_s": self.recovered_after(),
            "apps": counts.apps.iter().map(|of_app| json!({
                "due": of_app.due, "acked": of_app.acked, "put_off": of_app.put_off,
                "ack_p50_us": us(of_app.ack.quantile(0.5)), "ack_p99_us": us(of_app.ack.quantile(0.99)),
                "admitted_p99_us": us(of_app.admitted.quantile(0.99)),
            })).collect::<Vec<_>>(),
             "disordered": counts.disordered, "refused": counts.refused, "waited": counts.waited,
            "turned_away": counts.turned_away,
            "deliveries_per_second": self.deliveries_per_second(),
            "gateway_cpu_s": self.cpu.map(|cpu| cpu.as_secs_f64()),
            "cpu_us_per_delivery": self.per(self.cpu, counts.delivered),
            "cpu_us_per_message": self.per(self.cpu, counts.acked),
            "cpu_us_per_connect": self.per(self.connect_cpu, u64::from(self.phones)),
            "connecting_s": self.connecting.as_secs_f64(),
            "phones": self.phones,
            "memory_bytes": self.memory.map(|Memory { empty, connected, end, most }| {
                json!({ "empty": empty, "connected": connected, "end": end, "most": most })
            }),
            "memory_bytes_per_phone": self.per_phone().map(|[connected, end]| json!({ "connected": connected, "end": end })),
            "generator_memory_bytes": self.own_memory,
            "packets_both_sides": self.packets,
            "doubts": self.doubts,
            "timeline": timeline,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        let mut run = Run {
            work: "100 phones".to_owned(),
            seconds: 10.0,
            phones: 100,
            cpu: Some(Duration::from_secs(2)),
            memory: Some(Memory { empty: 10 << 20, connected: 20 << 20, end: 15 << 20, most: 30 << 20 }),
            connecting: Duration::from_secs(1),
            ..Run::default()
        };
        run.counts.delivered = 100_000;
        run.counts.acked = 1_000;
        run.counts.delivery.add(Duration::from_millis(5));
        run
    }

    #[test]
    fn the_table_says_what_a_delivery_costs_and_whether_to_believe_it() {
        let mut run = run();
        let table = run.table();
        for words in [
            "20.00 µs",
            "0.20 cores",
            "10000/s",
            "102.4 KiB a phone",
            "15 in the end (51.2)",
            "nothing speaks against",
        ] {
            assert!(table.contains(words), "{words}: {table}");
        }
        run.doubts.push("too slow".to_owned());
        run.cpu = None;
        let table = run.table();
        assert!(table.contains("- too slow") && !table.contains("cores"), "{table}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert_eq!(run().wrong(), Vec::<String>::new());
        for (spoil, word) in [
            ((|run| run.missing = 3) as fn(&mut Run), "3 deliveries did not come"),
            (|run| run.counts.disordered = 4, "4 deliveries came twice"),
            (
                |run| (run.counts.refused, run.counts.refusal) = (5, Some("busy".to_owned())),
                "the first one: busy",
            ),
        ] {
            let mut run = run();
            spoil(&mut run);
            assert!(matches!(run.wrong().as_slice(), [wrong] if wrong.contains(word)), "{word}");
        }
    }

    #[test]
    fn json_has_the_same() {
        let json = run().json();
        assert_eq!(json["cpu_us_per_delivery"], 20.0);
        assert_eq!(json["deliveries_per_second"], 10_000.0);
        assert_eq!(json["times_us"]["send to each recipient"]["count"], 1);
        assert!(json["times_us"]["send to durable ack"]["p99"].as_f64().unwrap() == 0.0);
    }
}

//! What typical days cost a phone, hour by hour: packets, bytes, wake-ups of the radio and of the processor, connections.
//! `cargo xtask days --help`.
//!
//! - Counted at the phone's simulated sockets and tasks ([`fulmar_sim::Spent`]), in virtual time; the same every time.
//! - Radio figures are those of a cellular radio with its tail; in hours on Wi-Fi they are not shown.
//! - Bytes are what UDP and TCP carry, TCP's own headers included; IP and UDP headers are 28 bytes a packet more.
//!
//! Not here: what the same costs with other gateways, and what a milliampere is.

mod kinds;
mod live;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use fulmar_client::NetworkKind;

use crate::kinds::DAYS;
use crate::live::Sum;

/// Measures what typical days cost a phone, in virtual time
#[derive(Debug, Parser)]
struct Args {
    /// Only days whose names hold this
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Worlds for each day
    #[arg(long, value_name = "N", default_value_t = 2)]
    worlds: u64,
    /// Writes the figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the event log of the last world
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

fn main() -> ExitCode {
    match work(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(args: &Args) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut all = Vec::new();
    for day in DAYS.iter().filter(|day| args.only.as_ref().is_none_or(|only| day.name.contains(only))) {
        let mut sums: Vec<Sum> = vec![Sum::default(); day.hours.len()];
        for seed in 0..args.worlds.max(1) {
            for (sum, more) in sums.iter_mut().zip(live::day(day, seed, args.log.as_deref())?) {
                sum.add(&more);
            }
        }
        writeln!(out, "{}, of {} worlds: per hour of each kind, and the day", day.name, args.worlds.max(1))?;
        writeln!(
            out,
            "{:<40}{:>6}{:>11}{:>15}{:>17}{:>7}{:>9}{:>8}{:>8}{:>15}{:>7}{:>9}{:>9}",
            "hour",
            "hours",
            "messages",
            "packets",
            "kB",
            "radio",
            "high, s",
            "CPU",
            "tasks",
            "QUIC (0-RTT)",
            "TCP",
            "push",
            "live"
        )?;
        let mut total = Sum::default();
        for ((hour, _), sum) in day.hours.iter().zip(&sums) {
            let cellular = hour.networks.iter().all(|network| network.kind == NetworkKind::Cellular);
            writeln!(out, "{}", line(hour.name, sum, sum.hours, cellular))?;
            total.add(sum);
            all.push(json(day.name, hour.name, sum));
        }
        writeln!(out, "{}\n", line("the day", &total, args.worlds.max(1), false))?;
        all.push(json(day.name, "the day", &total));
        out.flush()?;
    }
    if let Some(file) = &args.json {
        std::fs::write(file, serde_json::to_vec_pretty(&all)?)?;
    }
    Ok(())
}

/// The figures of so many hours or days, each on average.
fn line(name: &str, sum: &Sum, of: u64, cellular: bool) -> String {
    let of = of.max(1) as f64;
    let each = |count: u64| format!("{:.1}", count as f64 / of);
    let two = |one: u64, other: u64| format!("{:.0} + {:.0}", one as f64 / of, other as f64 / of);
    let kb = |one: u64, other: u64| format!("{:.1} + {:.1}", one as f64 / of / 1e3, other as f64 / of / 1e3);
    let (spent, traffic) = (&sum.spent, &sum.spent.traffic);
    let radio = if cellular { each(spent.radio_wakeups) } else { "-".to_owned() };
    let high = if cellular { format!("{:.0}", spent.radio_high.as_secs_f64() / of) } else { "-".to_owned() };
    let middle = |times: &[Duration]| {
        let mut times = times.to_vec();
        times.sort_unstable();
        times
            .get(times.len() / 2)
            .map_or_else(|| "-".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()))
    };
    format!(
        "{name:<40}{:>6.0}{:>11}{:>15}{:>17}{radio:>7}{high:>9}{:>8}{:>8}{:>15}{:>7}{:>9}{:>9}",
        sum.hours as f64,
        two(sum.sent, sum.received),
        two(traffic.sent_packets, traffic.received_packets),
        kb(traffic.sent_bytes, traffic.received_bytes),
        each(spent.cpu_wakeups),
        format!("{:.0}", spent.polls as f64 / of),
        format!("{} ({})", each(spent.quic), each(spent.early)),
        each(spent.tcp),
        middle(&sum.pushed),
        middle(&sum.live),
    )
}

fn json(day: &str, hour: &str, sum: &Sum) -> serde_json::Value {
    let (spent, traffic) = (&sum.spent, &sum.spent.traffic);
    serde_json::json!({
        "day": day,
        "hour": hour,
        "hours": sum.hours,
        "messages_sent": sum.sent,
        "messages_received": sum.received,
        "packets_sent": traffic.sent_packets,
        "packets_received": traffic.received_packets,
        "bytes_sent": traffic.sent_bytes,
        "bytes_received": traffic.received_bytes,
        "radio_wakeups": spent.radio_wakeups,
        "radio_high_s": spent.radio_high.as_secs_f64(),
        "cpu_wakeups": spent.cpu_wakeups,
        "tasks_run": spent.polls,
        "quic_tried": spent.quic,
        "early_tried": spent.early,
        "tcp_tried": spent.tcp,
    })
}

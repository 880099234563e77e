//! Runs with names: what the project's figures are from, each one command. A scenario is one run after the other, where a later
//! one may depend on what an earlier one found out (half of saturation, twice the peak), and a few lines on what follows.
//!
//! Not here: a run (`main`).

use std::{ffi::OsString, fmt::Write as _, io::Write as _};

use clap::Parser as _;
use fulmar_benches::times::spoken;

use crate::{Flags, report::Run, run};

/// A run with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scenario {
    /// 100 groups of 100, one online each: saturated, then at half of that
    Sends,
    /// A group of 10 000, 5 000 online: saturated, at 40 messages/s, at 60 % of saturation
    Large,
    /// The same at 10 messages/s, then with 100 000 members, 5 000 online: a tenth has it open, the others are told a head
    Huge,
    /// A group of 5 000, without slow readers, with 30 % that never read, with 30 % that read 1 KiB/s
    Slow,
    /// As many sends as the gateway takes, twice as many, and a surge
    Overload,
    /// An app alone, and beside another one that floods
    Fair,
    /// Chat of pairs among 5 000 phones, without broadcasts and with one to all phones every second
    Broadcast,
    /// What a join and a page of members cost in groups of 100, 10 000 and 99 000 members
    Members,
}

/// Runs that were made, by name.
type Made = Vec<(&'static str, Run)>;

/// The next run of a scenario, with the flags it has; `None`: that was all.
fn next(scenario: Scenario, made: &[(&'static str, Run)]) -> Option<(&'static str, String)> {
    let acked = |at: usize| made.get(at).map_or(0.0, |(_, run)| run.acked_per_second());
    let delivered = |at: usize| made.get(at).map_or(0.0, |(_, run)| run.deliveries_per_second());
    let sends = "--phones 100 --groups 100 --group-size 1 --absent 99 --warm-up 3 --seconds 15";
    let large = "--phones 5000 --group-size 5000 --senders 50 --warm-up 5";
    let slow = "--phones 5000 --group-size 5000 --senders 50 --warm-up 5 --seconds 90 --rate 20";
    let chat = "--phones 5000 --pairs 100 --rate 500 --warm-up 3 --seconds 20";
    let (name, flags) = match (scenario, made.len()) {
        (Scenario::Sends, 0) => ("saturated", format!("{sends} --rate 80000 --outbox 64")),
        (Scenario::Sends, 1) => ("half", format!("{sends} --rate {:.0}", acked(0) / 2.0)),
        (Scenario::Large, 0) => {
            ("saturated", format!("{large} --absent 5000 --seconds 15 --rate 400 --outbox 4"))
        }
        (Scenario::Large, 1) => ("40/s", format!("{large} --absent 5000 --seconds 20 --rate 40")),
        (Scenario::Large, 2) => {
            let rate = 0.6 * delivered(0) / 4_999.0;
            ("60 %", format!("{large} --absent 5000 --seconds 20 --rate {rate:.1}"))
        }
        (Scenario::Huge, 0) => ("10 000", format!("{large} --absent 5000 --seconds 15 --rate 10")),
        (Scenario::Huge, 1) => {
            ("100 000", format!("{large} --absent 95000 --open 10 --seconds 15 --rate 10"))
        }
        (Scenario::Slow, 0) => ("none", slow.to_owned()),
        (Scenario::Slow, 1) => ("never", format!("{slow} --slow 30 --slow-bytes 0")),
        (Scenario::Slow, 2) => ("1 KiB/s", format!("{slow} --slow 30 --slow-bytes 1024")),
        (Scenario::Overload, 0) => ("peak", format!("{sends} --rate 80000 --outbox 64")),
        (Scenario::Overload, 1) => ("peak again", format!("{sends} --rate {:.0} --outbox 64", acked(0))),
        (Scenario::Overload, 2) => ("twice", format!("{sends} --rate {:.0} --outbox 64", 2.0 * acked(0))),
        (Scenario::Overload, 3) => {
            let rate = acked(0) / 2.0;
            let surge = "--surge 4 --surge-from 10 --surge-for 10 --outbox 64";
            ("surge", format!("{sends} --seconds 40 --rate {rate:.0} {surge}"))
        }
        (Scenario::Broadcast, 0) => ("chat", chat.to_owned()),
        (Scenario::Broadcast, 1) => ("and broadcasts", format!("{chat} --broadcast-every 1")),
        (Scenario::Fair, 0) => ("peak", format!("{sends} --rate 80000 --outbox 64")),
        (Scenario::Fair, 1) => ("quiet", format!("{sends} --rate {:.0},1 --outbox 64", acked(0) / 5.0)),
        (Scenario::Fair, 2) => {
            let (quiet, flood) = (acked(0) / 5.0, 2.0 * acked(0));
            ("flood", format!("{sends} --rate {quiet:.0},{flood:.0} --outbox 64"))
        }
        _ => return None,
    };
    Some((name, flags))
}

/// What follows from all runs of a scenario.
fn conclusion(scenario: Scenario, made: &Made) -> String {
    let mut text = format!("\n{scenario:?}\n");
    for (name, run) in made {
        let counts = &run.counts;
        let _ = writeln!(
            text,
            "  {name:<12}{:>9.0} acked/s{:>10.0} deliveries/s{:>7.2} cores{:>9.2} µs a delivery  ack p50 {}, p99 {}; since last \
             sending p99 {}; delivery p99 {}; last p99 {}; {:.0} refused/s; {} MiB",
            run.acked_per_second(),
            run.deliveries_per_second(),
            run.cores().unwrap_or_default(),
            run.cpu_per_delivery().unwrap_or_default(),
            spoken(counts.ack.quantile(0.5)),
            spoken(counts.ack.quantile(0.99)),
            spoken(counts.admitted.quantile(0.99)),
            spoken(counts.delivery.quantile(0.99)),
            spoken(counts.last.quantile(0.99)),
            counts.put_off as f64 / run.seconds.max(1e-9),
            run.resident.unwrap_or_default() >> 20,
        );
    }
    let Some(((_, first), rest)) = made.split_first() else { return text };
    for (name, run) in rest {
        let slow = f64::from(run.slow);
        if scenario == Scenario::Slow && slow > 0.0 {
            let more = run.resident.unwrap_or_default() as f64 - first.resident.unwrap_or_default() as f64;
            let _ = writeln!(
                text,
                "  {name}: p99 of the others {:.2} ×, {:.1} KiB more memory for each of {slow} slow readers",
                run.counts.delivery.quantile(0.99).as_secs_f64()
                    / first.counts.delivery.quantile(0.99).as_secs_f64().max(1e-9),
                more / 1024.0 / slow,
            );
        }
        if scenario == Scenario::Broadcast {
            let _ = writeln!(
                text,
                "  {name}: p99 of chat {:.2} ×; a broadcast reaches everybody in {} (p50), {} (p99)",
                run.counts.delivery.quantile(0.99).as_secs_f64()
                    / first.counts.delivery.quantile(0.99).as_secs_f64().max(1e-9),
                spoken(run.counts.told_last.quantile(0.5)),
                spoken(run.counts.told_last.quantile(0.99)),
            );
        }
        if scenario == Scenario::Overload {
            let _ = writeln!(
                text,
                "  {name}: {:.1} % of the peak",
                100.0 * run.acked_per_second() / first.acked_per_second().max(1e-9)
            );
        }
    }
    text
}

/// Plays a scenario; `line` is the command line. Answers whether nothing was lost, doubled or out of order.
pub(crate) fn play(scenario: Scenario, line: impl Iterator<Item = OsString>) -> anyhow::Result<bool> {
    let line: Vec<OsString> = line.collect();
    let (mut made, mut all_sound) = (Made::new(), true);
    while let Some((name, flags)) = next(scenario, &made) {
        let preset = flags.split(' ').map(OsString::from);
        let words = std::iter::once(OsString::from("fulmar-load")).chain(preset).chain(line.iter().cloned());
        let flags = Flags::parse_from(words);
        eprintln!("{scenario:?}: {name}");
        let (run, sound) = run(&flags)?;
        all_sound &= sound;
        made.push((name, run));
    }
    std::io::stdout().lock().write_all(conclusion(scenario, &made).as_bytes())?;
    Ok(all_sound)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn every_run_of_every_scenario_has_flags_that_fit() {
        for scenario in Scenario::value_variants().iter().filter(|scenario| **scenario != Scenario::Members) {
            let mut made = Made::new();
            while let Some((name, flags)) = next(*scenario, &made) {
                let flags =
                    Flags::try_parse_from(std::iter::once("fulmar-load").chain(flags.split(' '))).unwrap();
                flags.shape().talks().unwrap();
                let mut run = Run { seconds: 10.0, ..Run::default() };
                run.counts.acked = 100_000;
                run.counts.delivered = 1_000_000;
                made.push((name, run));
            }
            assert!(made.len() >= 2, "{scenario:?}");
            let said = conclusion(*scenario, &made);
            assert!(made.iter().all(|(name, _)| said.contains(name)), "{said}");
        }
    }
}

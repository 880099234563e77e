//! Whether the figures tell of the gateway or of this program: a generator that is late measures its own queues.

use std::time::Duration;

use crate::tally::Counts;

/// A thread that works more than this share of the time has queues of its own.
const BUSY: f64 = 0.85;

/// Lateness that nobody minds: timers have a millisecond.
const LATE_ANYWAY: Duration = Duration::from_millis(2);

/// What is known of a run besides its counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Circumstances {
    /// Of each thread of the generator, the share of the measured time it worked.
    pub(crate) busy: Vec<f64>,
    /// The same while the phones connected.
    pub(crate) busy_connecting: Vec<f64>,
    /// Connects a second that were asked for, and that there were.
    pub(crate) connect_rate: Option<(f64, f64)>,
    /// Packets the system dropped meanwhile.
    pub(crate) connects_dropped: u64,
    /// Packets the system dropped because a socket was full, on either side.
    pub(crate) dropped: u64,
    /// Messages a second that were asked for; `None`: as many as it takes.
    pub(crate) rate: Option<f64>,
    /// Seconds that were measured.
    pub(crate) seconds: f64,
    /// Messages whose last recipient could not be told.
    pub(crate) lost: u64,
    /// Of all deliveries that must come, those that did not.
    pub(crate) missing: u64,
    /// The same of slow readers, when they had time to read on.
    pub(crate) missing_slowly: u64,
}

/// What a reader of the figures must know. Nothing: they are the gateway's.
pub(crate) fn doubts(counts: &Counts, of: &Circumstances) -> Vec<String> {
    let mut doubts = Vec::new();
    for (thread, busy) in of.busy.iter().enumerate().filter(|(_, busy)| **busy > BUSY) {
        doubts.push(format!(
            "the generator's thread {thread} worked {:.0} % of the time: rates are what it could do, times hold its own queue \
             (more --threads, or fewer phones)",
            busy * 100.0
        ));
    }
    if let Some((asked, done)) = of.connect_rate
        && done < 0.9 * asked
    {
        let busiest = of.busy_connecting.iter().copied().fold(0.0, f64::max);
        let whose = if busiest > BUSY {
            "what the generator could do"
        } else {
            "the gateway's pace, or the machine's"
        };
        doubts.push(format!(
            "{done:.0} connects/s of {asked:.0} that were asked for: {whose} (its busiest thread worked {:.0} %)",
            busiest * 100.0
        ));
    }
    if of.connects_dropped > 0 {
        doubts.push(format!(
            "{} packets were dropped at full sockets of this machine while the phones connected: some took a second or more",
            of.connects_dropped
        ));
    }
    let (late, delivered) = (counts.late.quantile(0.99), counts.delivery.quantile(0.5));
    if late > LATE_ANYWAY.max(delivered / 5) {
        doubts.push(format!(
            "1 % of the messages were handed over more than {late:.1?} late (half of the deliveries took up to {delivered:.1?}): \
             times hold that"
        ));
    }
    if counts.waited > 0 {
        doubts.push(format!(
            "{} messages waited because their sender had too many unacked; times hold that, as a user's would",
            counts.waited
        ));
    }
    if let Some(rate) = of.rate
        && of.seconds > 0.0
    {
        let done = counts.acked as f64 / of.seconds;
        if done < 0.95 * rate {
            doubts.push(format!(
                "{done:.0} messages/s were acked of {rate:.0} that were due: this is beyond saturation"
            ));
        }
    }
    if of.dropped > 0 {
        doubts.push(format!(
            "{} packets were dropped at full sockets of this machine, whose ever they were: net.core.rmem_max may be small",
            of.dropped
        ));
    }
    if of.lost > 0 {
        doubts.push(format!(
            "too many messages were under way: of {} the last recipient is not known",
            of.lost
        ));
    }
    if of.missing > 0 {
        doubts.push(format!("{} deliveries had not come when the wait for them ended", of.missing));
    }
    if of.missing_slowly > 0 {
        doubts.push(format!("WRONG: slow readers lack {} deliveries in the end", of.missing_slowly));
    }
    if counts.given_up > 0 {
        doubts.push(format!("{} messages were given up: too many waited at their phone", counts.given_up));
    }
    if counts.disordered > 0 {
        doubts.push(format!(
            "WRONG: {} deliveries came twice, out of order, or to a slow reader after a hole",
            counts.disordered
        ));
    }
    if counts.refused > 0 {
        let first = counts.refusal.as_deref().unwrap_or("no word");
        doubts.push(format!("{} connects failed, the first one: {first}", counts.refused));
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calm() -> (Counts, Circumstances) {
        let mut counts = Counts { acked: 1_000, ..Counts::default() };
        for _ in 0..1_000 {
            counts.delivery.add(Duration::from_millis(10));
            counts.late.add(Duration::from_micros(500));
        }
        (
            counts,
            Circumstances {
                busy: vec![0.5],
                connect_rate: Some((100.0, 95.0)),
                rate: Some(100.0),
                seconds: 10.0,
                ..Circumstances::default()
            },
        )
    }

    #[test]
    fn a_calm_run_is_believed() {
        let (counts, of) = calm();
        assert_eq!(doubts(&counts, &of), Vec::<String>::new());
    }

    #[test]
    fn each_doubt_is_said() {
        type Spoil = fn(&mut Counts, &mut Circumstances);
        let table: [(Spoil, &str); 13] = [
            (|_, of| of.busy = vec![0.1, 0.9], "thread 1"),
            (|counts, _| (0..20).for_each(|_| counts.late.add(Duration::from_millis(50))), "late"),
            (|counts, _| counts.waited = 1, "unacked"),
            (|counts, _| counts.acked = 900, "beyond saturation"),
            (|_, of| of.dropped = 1, "dropped"),
            (|_, of| of.lost = 1, "last recipient"),
            (|_, of| of.missing = 3, "3 deliveries"),
            (|counts, _| counts.disordered = 1, "WRONG"),
            (|_, of| of.connect_rate = Some((1_000.0, 800.0)), "the gateway's pace"),
            (
                |_, of| (of.connect_rate, of.busy_connecting) = (Some((1_000.0, 800.0)), vec![0.99]),
                "the generator could do",
            ),
            (|_, of| of.connects_dropped = 7, "7 packets"),
            (|_, of| of.missing_slowly = 1, "slow readers lack 1"),
            (|counts, _| counts.given_up = 7, "7 messages were given up"),
        ];
        for (spoil, word) in table {
            let (mut counts, mut of) = calm();
            spoil(&mut counts, &mut of);
            let said = doubts(&counts, &of);
            assert!(said.len() == 1 && said[0].contains(word), "{word}: {said:?}");
        }
    }
}

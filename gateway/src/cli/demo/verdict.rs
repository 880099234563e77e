//! The judgement of a run: what was asked for against what was seen.
//!
//! - Two independent views must agree: the simulator's checker over the history (order, positions, senders, payloads),
//!   and a tally of the input's lines at the phones they were for.
//! - It passes only if every line of the plan was sent, acked, and is exactly once with every phone it was for.
//! - A run that was cut short is judged all the same: what did not arrive is lost.

use std::fmt::Write as _;

use fulmar_badnet::checker::{Rules, check};
use fulmar_badnet::figures::Figures;

use super::board::Seen;
use super::plan::Plan;
use crate::cli::rehearsal::{grouped, number, ratio};

/// Lines of explanation that are shown.
const PROBLEMS_MAX: usize = 20;

/// What came out.
#[derive(Debug)]
pub(super) struct Verdict {
    /// Lines handed to the SDK.
    sent: u64,
    /// Lines acked.
    acked: u64,
    /// Lines that every recipient has.
    delivered: u64,
    /// (line, recipient) pairs that are there.
    deliveries: u64,
    /// Comings of a line beyond the first.
    duplicates: u64,
    out_of_order: u64,
    /// (line, recipient) pairs of the input that are not there.
    lost: u64,
    outside: Outside,
    ack: Figures,
    deliver: Figures,
    wire_bytes_per_message: f64,
    /// Everything that is wrong, in words; empty when the run has passed.
    problems: Vec<String>,
}

/// What is known from other places than the board.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outside {
    /// Connections beyond each phone's first.
    pub(super) reconnects: u64,
    /// How often the gateway was killed.
    pub(super) gateway_kills: u64,
    /// Bytes both ends put on the wire, before loss.
    pub(super) wire_bytes: u64,
    /// Changes of a phone's address.
    pub(super) rebinds: u64,
    /// Share of packets that the network swallowed, in percent.
    pub(super) dropped_percent: f64,
    /// Seconds from the first line to the end.
    pub(super) seconds: f64,
}

impl Verdict {
    /// Judges. `cut_short` says why the run ended before everything was there.
    pub(super) fn reach(plan: &Plan, seen: &Seen, outside: Outside, cut_short: Option<String>) -> Self {
        // What had not arrived when a run was cut short is found by the tally; the checker would say it again.
        let rules = Rules { converged: cut_short.is_none(), echoes: true, ..Rules::default() };
        let report = check(&seen.history, &rules);
        let mut problems: Vec<String> = cut_short.into_iter().collect();
        problems.extend(seen.troubles.iter().cloned());
        if !report.holds() {
            problems.extend(report.explain(&seen.history).lines().map(str::to_owned));
        }

        let lines = plan.lines.len();
        let sent = seen.times.iter().filter(|(sent, _)| sent.is_some()).count();
        let acked = seen.times.iter().filter(|(_, acked)| acked.is_some()).count();
        let (mut delivered, mut deliveries, mut lost, mut twice) = (0, 0, 0, 0);
        for line in 0..lines {
            let mut missing = 0;
            for phone in plan.listeners(line) {
                let count = seen.tally.get(&(line, phone)).copied().unwrap_or(0);
                twice += u64::from(count.saturating_sub(1));
                let speaks = plan.lines.get(line).is_some_and(|planned| planned.speaker == phone);
                match (speaks, count) {
                    (true, _) => {}
                    (false, 0) => missing += 1,
                    (false, _) => deliveries += 1,
                }
            }
            delivered += u64::from(missing == 0);
            lost += missing;
        }
        // A text that reached a phone it was not for is in the tally, and in no list above.
        let strangers =
            seen.tally.keys().filter(|(line, phone)| !plan.listeners(*line).any(|p| p == *phone)).count();
        if strangers > 0 {
            problems.push(format!("{strangers} lines reached phones they were not for"));
        }
        let verdict = Self {
            sent: number(sent),
            acked: number(acked),
            delivered,
            deliveries,
            duplicates: twice.max(report.counters.duplicates),
            out_of_order: report.counters.out_of_order,
            lost,
            outside,
            ack: seen.ack_latencies.figures(),
            deliver: seen.deliver_latencies.figures(),
            wire_bytes_per_message: ratio(outside.wire_bytes, number(sent)),
            problems,
        };
        verdict.held_against(number(lines))
    }

    /// Adds what the figures say by themselves, so that no run passes whose table does not.
    fn held_against(mut self, lines: u64) -> Self {
        for (what, count, want) in [
            ("sent", self.sent, lines),
            ("acked", self.acked, lines),
            ("delivered", self.delivered, lines),
            ("duplicates", self.duplicates, 0),
            ("out of order", self.out_of_order, 0),
            ("lost", self.lost, 0),
        ] {
            if count != want {
                self.problems.push(format!("{what}: {}, where {} is right", grouped(count), grouped(want)));
            }
        }
        self
    }

    /// Whether everything sent was acked and delivered exactly once.
    pub(super) fn passed(&self) -> bool {
        self.problems.is_empty()
    }

    /// For machines.
    pub(super) fn json(&self) -> serde_json::Value {
        let latency = |figures: &Figures| serde_json::json!({ "p50": figures.p50, "p99": figures.p99, "p999": figures.p999 });
        serde_json::json!({
            "sent": self.sent,
            "acked": self.acked,
            "delivered": self.delivered,
            "duplicates": self.duplicates,
            "out_of_order": self.out_of_order,
            "lost": self.lost,
            "reconnects": self.outside.reconnects,
            "gateway_kills": self.outside.gateway_kills,
            "ack_ms": latency(&self.ack),
            "deliver_ms": latency(&self.deliver),
            "wire_bytes_per_message": (self.wire_bytes_per_message * 10.0).round() / 10.0,
        })
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, count: u64, note: &str| {
            // Writing to a string can't fail.
            let _ = writeln!(text, "{}", format!("  {name:<24}{:>12}  {note}", grouped(count)).trim_end());
        };
        let Outside { reconnects, gateway_kills, wire_bytes: _, rebinds, dropped_percent, seconds } =
            self.outside;
        row("sent", self.sent, &format!("in {seconds:.1} s"));
        row("acked", self.acked, "on the gateway's disk");
        row(
            "delivered",
            self.delivered,
            &format!("to all of their recipients ({} deliveries)", grouped(self.deliveries)),
        );
        row("duplicates", self.duplicates, "");
        row("out of order", self.out_of_order, "");
        row("lost", self.lost, "checked against the input");
        row("reconnects", reconnects, "");
        row("gateway killed (-9)", gateway_kills, "and started again");
        row(
            "addresses changed",
            rebinds,
            &format!("and {dropped_percent:.1} % of all packets lost on the way"),
        );
        let bytes = format!("{:.0}", self.wire_bytes_per_message);
        let _ = writeln!(
            text,
            "  {:<24}{bytes:>12}  handshakes, acks, repeats: everything",
            "wire bytes per message"
        );
        let _ = writeln!(text);
        let _ = writeln!(text, "  {:<24}{:>12}{:>12}{:>12}", "milliseconds", "p50", "p99", "p99.9");
        for (name, Figures { p50, p99, p999, .. }) in
            [("send to ack", self.ack), ("send to delivery", self.deliver)]
        {
            let _ = writeln!(text, "  {name:<24}{p50:>12.1}{p99:>12.1}{p999:>12.1}");
        }
        let _ = writeln!(text);
        if self.passed() {
            let _ =
                writeln!(text, "passed: everything sent was acked, and delivered exactly once and in order");
        } else {
            let _ = writeln!(text, "FAILED:");
            for problem in self.problems.iter().take(PROBLEMS_MAX) {
                let _ = writeln!(text, "  {problem}");
            }
            if let Some(more) = self.problems.len().checked_sub(PROBLEMS_MAX).filter(|more| *more > 0) {
                let _ = writeln!(text, "  and {more} lines more");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fulmar_badnet::dialogue;
    use fulmar_badnet::history::{Conversation, Event};
    use fulmar_client::{ConversationId, Received, RecordKind, Seq, UnixMillis, UserId};

    use super::super::board::{Board, client_of};
    use super::*;

    const ROOM: u64 = 7;

    /// Two phones that say four lines; `run` writes down what was seen.
    fn judge(run: impl FnOnce(&Plan, &Board)) -> Verdict {
        let dialogues = dialogue::read(
            "x\t1\tA\tone\nx\t1\tB\ttwo\nx\t1\tA\tthree\nx\t1\tA\tthree\n".as_bytes(),
            "x",
            &dialogue::Limits::default(),
        );
        let plan = Plan::new(dialogues.unwrap(), 100, 2, 1);
        let board = Board::new(&plan);
        for phone in 0..2 {
            board.is_user(phone, 100 + phone as u64);
            let (client, conversation) = (client_of(phone), Conversation(ROOM));
            board.record(Event::Joined { client, conversation, first: 1 });
            board.record(Event::Connected { client });
        }
        run(&plan, &board);
        let seen = board.seen();
        Verdict::reach(&plan, &seen, Outside::default(), None)
    }

    fn say(plan: &Plan, board: &Board, line: usize) {
        board.sending(plan, line, ROOM);
        board.acked(plan, line, ROOM, line as u64 + 1);
    }

    fn hear(plan: &Plan, board: &Board, phone: usize, line: usize, seq: usize) {
        hear_bytes(plan, board, phone, line, seq, plan.lines[line].payload(line));
    }

    fn hear_bytes(plan: &Plan, board: &Board, phone: usize, line: usize, seq: usize, payload: String) {
        let speaker = plan.lines[line].speaker;
        let message = Received {
            conversation: ConversationId::new(ROOM).unwrap(),
            seq: Seq::new(seq as u64).unwrap(),
            sender: UserId::new(100 + speaker as u64).unwrap(),
            sender_name: None,
            time: UnixMillis::default(),
            kind: RecordKind::Message,
            reference: None,
            payload: Bytes::from(payload),
            own: speaker == phone,
            this_device: speaker == phone,
            silent: false,
            truncated: false,
            arrival: 0,
        };
        board.received(plan, phone, &message);
    }

    fn all(plan: &Plan, board: &Board) {
        for line in 0..4 {
            say(plan, board, line);
            for phone in 0..2 {
                hear(plan, board, phone, line, line + 1);
            }
        }
    }

    #[test]
    fn a_perfect_run_passes() {
        let verdict = judge(all);
        assert!(verdict.passed(), "{:?}", verdict.problems);
        let json = verdict.json();
        for (field, want) in [
            ("sent", 4),
            ("acked", 4),
            ("delivered", 4),
            ("duplicates", 0),
            ("out_of_order", 0),
            ("lost", 0),
            ("reconnects", 0),
            ("gateway_kills", 0),
        ] {
            assert_eq!(json[field], want, "{field}");
        }
        assert_eq!(json.as_object().unwrap().len(), 11);
        assert!(verdict.table().contains("passed"), "{}", verdict.table());
    }

    #[test]
    fn every_flaw_fails_with_its_figure() {
        type Run = fn(&Plan, &Board);
        let flaws: [(&str, &str, u64, Run); 7] = [
            ("a line never arrived", "lost", 1, |plan, board| {
                for line in 0..4 {
                    say(plan, board, line);
                    let speaker = plan.lines[line].speaker;
                    hear(plan, board, speaker, line, line + 1);
                    if line != 2 {
                        hear(plan, board, 1 - speaker, line, line + 1);
                    }
                }
            }),
            ("a line came twice", "duplicates", 1, |plan, board| {
                all(plan, board);
                hear(plan, board, 0, 3, 4);
            }),
            ("a line was stored twice", "duplicates", 1, |plan, board| {
                all(plan, board);
                hear(plan, board, 0, 3, 5);
            }),
            ("two lines came the wrong way round", "out_of_order", 1, |plan, board| {
                for line in 0..4 {
                    say(plan, board, line);
                }
                // The last two are said by the same phone.
                let speaker = plan.lines[3].speaker;
                for (phone, order) in [(speaker, [0, 1, 2, 3]), (1 - speaker, [0, 1, 3, 2])] {
                    for line in order {
                        hear(plan, board, phone, line, line + 1);
                    }
                }
            }),
            ("a text was altered", "lost", 1, |plan, board| {
                for line in 0..4 {
                    say(plan, board, line);
                    let speaker = plan.lines[line].speaker;
                    hear(plan, board, speaker, line, line + 1);
                    let payload = plan.lines[line].payload(line);
                    let payload = if line == 1 { payload.replace("two", "2") } else { payload };
                    hear_bytes(plan, board, 1 - speaker, line, line + 1, payload);
                }
            }),
            ("the last line was not acked", "acked", 3, |plan, board| {
                for line in 0..4 {
                    if line < 3 {
                        say(plan, board, line);
                    } else {
                        board.sending(plan, line, ROOM);
                    }
                    for phone in 0..2 {
                        hear(plan, board, phone, line, line + 1);
                    }
                }
            }),
            ("a line was never sent", "sent", 3, |plan, board| {
                for line in 0..3 {
                    say(plan, board, line);
                    for phone in 0..2 {
                        hear(plan, board, phone, line, line + 1);
                    }
                }
            }),
        ];
        for (what, field, want, run) in flaws {
            let verdict = judge(run);
            assert!(!verdict.passed(), "{what}");
            assert_eq!(verdict.json()[field], want, "{what}: {:?}", verdict.problems);
            assert!(verdict.table().contains("FAILED"), "{what}");
        }
    }

    #[test]
    fn what_nobody_said_fails() {
        let verdict = judge(|plan, board| {
            all(plan, board);
            hear_bytes(plan, board, 0, 0, 5, "surprise".to_owned());
        });
        assert!(!verdict.passed());
        assert!(verdict.table().contains("that nobody said"), "{}", verdict.table());
    }
}

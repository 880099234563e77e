//! The report: one HTML page that needs nothing but itself, and the same figures as JSON.
//!
//! - No script, no font, no picture from elsewhere: plots are SVG in the page, colours follow the reader's wish for light
//!   or dark, tips are the browser's own.
//! - The page is well-formed XML: every element is closed, every text escaped.
//! - It says what was run (command line, seed, version) and what its figures are worth.
//!
//! Not here: the plots (`plot`), the figures (`outcome`).

mod plot;

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::live::spoken;
use super::outcome::{Outcome, Percentiles, millis, percentiles};
use crate::cli::rehearsal::{grouped, number};

/// Everything the report is made of.
#[derive(Debug)]
pub(super) struct Run {
    /// As it was typed.
    pub(super) command_line: String,
    pub(super) version: String,
    /// When it began, for people.
    pub(super) began: String,
    pub(super) took: Duration,
    pub(super) seed: u64,
    pub(super) phones: usize,
    /// In the order in which they were played.
    pub(super) outcomes: Vec<Outcome>,
    /// Names of profiles that were not reached.
    pub(super) unplayed: Vec<&'static str>,
    pub(super) interrupted: bool,
}

impl Run {
    /// Whether nothing was wrong with anything that was played.
    pub(super) fn passed(&self) -> bool {
        self.outcomes.iter().all(Outcome::passed)
    }

    fn messages(&self) -> u64 {
        self.outcomes.iter().map(|outcome| number(outcome.messages.len())).sum()
    }

    fn verdict(&self) -> String {
        let messages = grouped(self.messages());
        match (self.passed(), self.interrupted) {
            (true, false) => format!(
                "Passed: each of {messages} messages was acked and reached its reader exactly once and in order"
            ),
            (true, true) => format!("Interrupted: nothing was wrong with the {messages} messages until then"),
            (false, _) => {
                let failed = self.outcomes.iter().filter(|outcome| !outcome.passed());
                let names: Vec<_> = failed.map(|outcome| outcome.scene.title).collect();
                format!("FAILED: {}", names.join(", "))
            }
        }
    }

    /// For the terminal.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        let heads =
            ["messages", "p50", "p95", "p99", "max", "ack p50", "recovery", "dropped", "B/msg", "conns"];
        let _ = write!(text, "  {:<26}", "delivery");
        for head in heads {
            let _ = write!(text, "{head:>10}");
        }
        text.push('\n');
        for outcome in &self.outcomes {
            let deliveries = outcome.deliveries();
            let _ = write!(text, "  {:<26}{:>10}", outcome.scene.title, outcome.messages.len());
            for value in [deliveries.p50, deliveries.p95, deliveries.p99, deliveries.max, outcome.acks().p50]
            {
                let _ = write!(
                    text,
                    "{:>10}",
                    if deliveries.count == 0 { "-".to_owned() } else { spoken(value) }
                );
            }
            let slowest =
                slowest_recovery(outcome).map_or_else(|| "-".to_owned(), |wait| spoken(millis(wait)));
            let bytes =
                outcome.bytes_per_message().map_or_else(|| "-".to_owned(), |bytes| format!("{bytes:.0}"));
            let dropped = format!("{:.1} %", outcome.dropped_percent());
            let sign = if outcome.passed() { "" } else { "  FAILED" };
            let _ = writeln!(text, "{slowest:>10}{dropped:>10}{bytes:>10}{:>10}{sign}", outcome.connections);
        }
        let _ = writeln!(
            text,
            "\n  delivery: from the send until the other phone's app has it; recovery: the slowest phone after a dark \
             spell or a new address"
        );
        for outcome in self.outcomes.iter().filter(|outcome| !outcome.passed()) {
            for problem in &outcome.problems {
                let _ = writeln!(text, "  {}: {problem}", outcome.scene.name);
            }
        }
        let _ = write!(text, "\n{}", self.verdict());
        text
    }

    /// For machines: figures, and every message.
    pub(super) fn json(&self) -> Value {
        json!({
            "command": self.command_line,
            "version": self.version,
            "began": self.began,
            "seconds": round(self.took.as_secs_f64()),
            "seed": self.seed,
            "phones": self.phones,
            "passed": self.passed(),
            "interrupted": self.interrupted,
            "unplayed": self.unplayed,
            "profiles": self.outcomes.iter().map(profile_json).collect::<Vec<_>>(),
        })
    }

    /// For people.
    pub(super) fn html(&self) -> String {
        let mut page = String::with_capacity(512 * 1024);
        page.push_str(HEAD);
        self.push_opening(&mut page);
        self.push_summary(&mut page);
        if self.outcomes.iter().any(|outcome| !outcome.messages.is_empty()) {
            self.push_plots(&mut page);
        }
        self.push_profiles(&mut page);
        page.push_str(METHOD);
        page.push_str("</main>\n</body>\n</html>\n");
        page
    }

    fn push_opening(&self, page: &mut String) {
        let class = match (self.passed(), self.interrupted) {
            (true, false) => "good",
            (true, true) => "half",
            (false, _) => "bad",
        };
        let _ = writeln!(page, "<header>\n<h1>Fulmar on weak networks</h1>");
        let _ = writeln!(page, "<p class=\"verdict {class}\">{}</p>", escape(&self.verdict()));
        let _ = writeln!(
            page,
            "<p class=\"lead\">{} phones chat in pairs, one message per second each and a burst now and then, through \
             a real gateway process. Between them and the gateway stands a network that is bad in a way you have met.</p>",
            self.phones
        );
        let mut facts = vec![
            ("command", self.command_line.clone()),
            ("seed", self.seed.to_string()),
            ("version", self.version.clone()),
            ("began", self.began.clone()),
            ("took", format!("{:.0} s", self.took.as_secs_f64())),
        ];
        if !self.unplayed.is_empty() {
            facts.push(("not played", self.unplayed.join(", ")));
        }
        page.push_str("<dl class=\"facts\">\n");
        for (name, value) in facts {
            let _ = writeln!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(&value));
        }
        page.push_str("</dl>\n</header>\n<main>\n");
    }

    fn push_summary(&self, page: &mut String) {
        page.push_str(
            "<section>\n<h2>At a glance</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th rowspan=\"2\">profile</th>\
             <th rowspan=\"2\">messages</th><th colspan=\"4\">send to delivery</th><th colspan=\"4\">send to ack</th>\
             <th colspan=\"2\">recovery</th><th rowspan=\"2\">dropped on<br/>the way</th>\
             <th rowspan=\"2\">bytes per<br/>message</th><th rowspan=\"2\">connec-<br/>tions</th>\
             <th rowspan=\"2\">checker</th></tr>\n<tr><th>p50</th><th>p95</th><th>p99</th><th>max</th><th>p50</th>\
             <th>p95</th><th>p99</th><th>max</th><th>median</th><th>slowest</th></tr></thead>\n<tbody>\n",
        );
        for (ordinal, outcome) in self.outcomes.iter().enumerate() {
            let _ = write!(
                page,
                "<tr><th scope=\"row\"><i class=\"swatch {}\"></i>{}</th><td>{}</td>",
                plot::colour(ordinal),
                escape(outcome.scene.title),
                grouped(number(outcome.messages.len()))
            );
            for figures in [outcome.deliveries(), outcome.acks()] {
                for value in [figures.p50, figures.p95, figures.p99, figures.max] {
                    let _ = write!(
                        page,
                        "<td>{}</td>",
                        if figures.count == 0 { "–".to_owned() } else { spoken(value) }
                    );
                }
            }
            let mut waits: Vec<_> =
                outcome.recoveries().into_iter().flat_map(|recovery| recovery.waits).collect();
            waits.sort_unstable();
            for wait in [waits.get(waits.len() / 2), waits.last()] {
                let _ = write!(
                    page,
                    "<td>{}</td>",
                    wait.map_or_else(|| "–".to_owned(), |wait| spoken(millis(*wait)))
                );
            }
            let bytes =
                outcome.bytes_per_message().map_or_else(|| "–".to_owned(), |bytes| format!("{bytes:.0}"));
            let _ = writeln!(
                page,
                "<td>{:.1} %</td><td>{bytes}</td><td>{}</td><td class=\"{}\">{}</td></tr>",
                outcome.dropped_percent(),
                outcome.connections,
                if outcome.passed() { "good" } else { "bad" },
                match (outcome.passed(), outcome.interrupted) {
                    (true, false) => "passed",
                    (true, true) => "cut short",
                    (false, _) => "failed",
                }
            );
        }
        page.push_str(
            "</tbody>\n</table></div>\n<p class=\"note\">Recovery is the time to the first message after a dark spell \
             or a change of address, phone by phone. Connections are those of all phones together, the first one of \
             each included. Where fewer than 100 messages were sent, p99 is the slowest of them.</p>\n</section>\n",
        );
    }

    fn push_plots(&self, page: &mut String) {
        let outcomes = &self.outcomes;
        let _ = write!(
            page,
            "<section>\n<h2>How long a message takes</h2>\n<p>Read it from below: at the height of 50 % a curve has \
             passed half of its messages. Steep is good, left is good; a foot that runs far to the right is the time \
             in the dark. A message that never arrived counts, so its curve ends below 100 %.</p>\n{}",
            plot::curves(outcomes)
        );
        page.push_str("<div class=\"grid3\">\n");
        for ordinal in 0..outcomes.len() {
            page.push_str(&plot::small_curve(outcomes, ordinal));
        }
        page.push_str(
            "</div>\n<p class=\"note\">Full line: delivered to the other phone. Dashed: acked to the sender, which means \
             on the gateway's disk. Pale: the other profiles.</p>\n</section>\n<section>\n<h2>Message by message</h2>\n\
             <p>Every dot is a message, hollow ones left in a burst of five. Shaded: no network at all; the dotted line \
             in it is the floor nobody can beat, since nothing arrives before the network is back. Broken lines: the \
             network or the address changed. All profiles share one scale of latency.</p>\n",
        );
        for (ordinal, outcome) in outcomes.iter().enumerate() {
            let _ = write!(
                page,
                "<h3>{}</h3>\n<p class=\"note\">{}</p>\n{}",
                escape(outcome.scene.title),
                escape(outcome.scene.sentence),
                plot::timeline(outcomes, ordinal)
            );
        }
        page.push_str("</section>\n");
        let recoveries = plot::recoveries(outcomes);
        if !recoveries.is_empty() {
            let _ = write!(
                page,
                "<section>\n<h2>Back after the dark</h2>\n<p>From the moment the network was there again (or the first \
                 send after it) until a phone's app had its first message.</p>\n{recoveries}</section>\n"
            );
        }
        let _ = write!(
            page,
            "<section>\n<h2>What a message costs</h2>\n<p>Everything the phones' connections sent and received while \
             they chatted, divided by the messages: handshakes, keys, acks, repeats, receipts and the text itself. Bars: \
             what the phones count, UDP payloads or what TLS carried inside. Strokes: what the network was given by both \
             ends, as UDP payloads or TCP segments with their headers of 40 bytes. The difference is what was lost on the \
             way, headers, and above all attempts to connect that came to nothing, in the dark or beside a faster one. \
             Compare QUIC and TLS by these.</p>\n{}</section>\n",
            plot::bytes(outcomes)
        );
    }

    fn push_profiles(&self, page: &mut String) {
        page.push_str("<section>\n<h2>The profiles</h2>\n<div class=\"cards\">\n");
        for (ordinal, outcome) in self.outcomes.iter().enumerate() {
            let _ = write!(
                page,
                "<article>\n<h3><i class=\"swatch {}\"></i>{} <code>{}</code></h3>\n<p>{}</p>\n<ul>\n",
                plot::colour(ordinal),
                escape(outcome.scene.title),
                escape(outcome.scene.name),
                escape(outcome.scene.sentence)
            );
            for fact in facts(outcome) {
                let _ = writeln!(page, "<li>{}</li>", escape(&fact));
            }
            page.push_str("</ul>\n");
            if !outcome.passed() {
                let _ = writeln!(page, "<pre class=\"bad\">{}</pre>", escape(&outcome.problems.join("\n")));
            }
            page.push_str("</article>\n");
        }
        page.push_str("</div>\n</section>\n");
    }
}

/// What else is known of a profile, one thought each.
fn facts(outcome: &Outcome) -> Vec<String> {
    let network = &outcome.network;
    let mut facts = vec![format!(
        "{} sent, {} acked, {} delivered; {} lost, {} doubled, {} out of order; played for {:.1} s",
        grouped(number(outcome.messages.len())),
        grouped(outcome.acks().count),
        grouped(outcome.deliveries().count),
        outcome.lost,
        outcome.duplicates,
        outcome.out_of_order,
        outcome.played.as_secs_f64()
    )];
    let connects = percentiles(outcome.connects.iter().copied());
    if connects.count > 0 {
        facts.push(format!(
            "connected and up to date after {} (median of {} phones, slowest {})",
            spoken(connects.p50),
            connects.count,
            spoken(connects.max)
        ));
    }
    facts.push(format!(
        "{} UDP packets, of which {} lost, {} met the dark or a block, {} a full queue; {} TCP segments, of which {} had \
         to be repeated",
        grouped(network.up.packets + network.down.packets),
        grouped(network.up.lost + network.down.lost),
        grouped(network.up.dark + network.down.dark),
        grouped(network.up.queue_full + network.down.queue_full),
        grouped(network.tcp.up.segments + network.tcp.down.segments),
        grouped(network.tcp.up.repeated + network.tcp.down.repeated)
    ));
    if !outcome.attempts.is_empty() {
        let attempts = outcome.attempts.iter();
        let attempts: Vec<_> =
            attempts.map(|((way, ended), count)| format!("{way} {ended} {count}")).collect();
        facts.push(format!("attempts to connect: {}", attempts.join(", ")));
    }
    facts
}

fn slowest_recovery(outcome: &Outcome) -> Option<Duration> {
    outcome.recoveries().iter().filter_map(|recovery| recovery.waits.last().copied()).max()
}

fn round(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

fn profile_json(outcome: &Outcome) -> Value {
    let figures = |of: Percentiles| {
        json!({
            "count": of.count, "p50": round(of.p50), "p95": round(of.p95), "p99": round(of.p99), "max": round(of.max),
        })
    };
    let ms = |span: Duration| round(millis(span));
    let recoveries = outcome.recoveries();
    let recoveries = recoveries.iter().map(|recovery| {
        json!({
            "what": recovery.label,
            "at_ms": ms(recovery.at),
            "waits_ms": recovery.waits.iter().map(|wait| ms(*wait)).collect::<Vec<_>>(),
            "never": recovery.never,
        })
    });
    let marks = outcome
        .marks
        .iter()
        .map(|mark| json!({ "what": mark.label, "from_ms": ms(mark.from), "to_ms": ms(mark.to) }));
    let attempts = outcome.attempts.iter();
    let attempts =
        attempts.map(|((way, ended), count)| json!({ "way": way, "ended": ended, "count": count }));
    let messages = outcome.messages.iter().map(|message| {
        json!({
            "from": message.speaker + 1,
            "to": message.listener + 1,
            "sent_ms": ms(message.sent),
            "acked_ms": message.acked.map(ms),
            "delivered_ms": message.delivered.map(ms),
            "burst": message.burst,
        })
    });
    json!({
        "profile": outcome.scene.name,
        "meaning": outcome.scene.sentence,
        "passed": outcome.passed(),
        "interrupted": outcome.interrupted,
        "problems": outcome.problems,
        "seconds": round(outcome.played.as_secs_f64()),
        "sent": outcome.messages.len(),
        "lost": outcome.lost,
        "duplicates": outcome.duplicates,
        "out_of_order": outcome.out_of_order,
        "deliver_ms": figures(outcome.deliveries()),
        "ack_ms": figures(outcome.acks()),
        "connect_ms": figures(percentiles(outcome.connects.iter().copied())),
        "recoveries": recoveries.collect::<Vec<_>>(),
        "marks": marks.collect::<Vec<_>>(),
        "connections": outcome.connections,
        "attempts": attempts.collect::<Vec<_>>(),
        "packets": outcome.packets(),
        "dropped": outcome.dropped(),
        "dropped_percent": round(outcome.dropped_percent()),
        "sent_bytes": outcome.sent_bytes,
        "received_bytes": outcome.received_bytes,
        "network_bytes": outcome.network_bytes,
        "wire_bytes_per_message": outcome.bytes_per_message().map(round),
        "messages": messages.collect::<Vec<_>>(),
    })
}

/// Text as it may stand in an element or an attribute.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // XML knows no other control characters.
            c if c.is_control() && c != '\n' && c != '\t' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The time now as people write it, in UTC.
pub(super) fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    utc(since.as_secs())
}

/// `2026-01-02 03:04:05 UTC`.
fn utc(seconds: u64) -> String {
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let mut year = 1970;
    loop {
        let length = 365 + u64::from(leap(year));
        // Beyond any clock; the loop must end all the same.
        if days < length || year > 9_999 {
            break;
        }
        days -= length;
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (rest / 3_600, rest % 3_600 / 60, rest % 60);
    format!("{year:04}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC", days + 1)
}

const HEAD: &str = r#"<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<title>Fulmar on weak networks</title>
<style>
:root { --paper: #fcfcfa; --card: #ffffff; --ink: #1c2024; --soft: #5c656e; --line: #e3e5e3; --rule: #9aa2a9;
  --spell: #1c20241a; --good: #1f7a3d; --bad: #c02626; --half: #946200;
  --k0: #2463d1; --k1: #d35400; --k2: #238046; --k3: #8e3bb0; --k4: #c2255c; --k5: #0b7a8f; --k6: #8a6100; --k7: #5a6470; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #9aa4ad; --line: #2c3238; --rule: #6b757e;
    --spell: #ffffff1c; --good: #5fd38a; --bad: #ff7b72; --half: #f0c04c;
    --k0: #7aa8ff; --k1: #ff9d57; --k2: #66d08a; --k3: #d59bf2; --k4: #ff8bb0; --k5: #50cfe2; --k6: #ecc04f; --k7: #b7c0c9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
h1 { font-size: 2rem; margin: 0 0 12px; letter-spacing: -0.02em; }
h2 { font-size: 1.3rem; margin: 48px 0 8px; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 28px 0 0; }
p { margin: 6px 0 12px; max-width: 74ch; }
.lead { color: var(--soft); }
.note { color: var(--soft); font-size: 0.86rem; }
.verdict { display: inline-block; padding: 6px 14px; border: 1px solid currentColor; border-radius: 999px; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .half { color: var(--half); }
.facts { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 16px 0 0; font-size: 0.86rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.84rem; font-variant-numeric: tabular-nums; width: 100%; }
th { font-weight: 600; } thead th { color: var(--soft); font-weight: 500; padding: 2px 8px; vertical-align: bottom; }
td, tbody th { padding: 7px 8px; border-top: 1px solid var(--line); text-align: right; white-space: nowrap; }
tbody th, thead th:first-child { text-align: left; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; background: var(--k); }
svg { display: block; width: 100%; height: auto; }
svg.wide { min-width: 720px; } section { overflow-x: auto; }
.grid3 { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 16px; margin-top: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 16px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 4px 18px 10px; }
article h3 { margin-top: 12px; } article ul { padding-left: 18px; margin: 6px 0; font-size: 0.84rem; color: var(--soft); }
code, pre { font-family: ui-monospace, monospace; font-size: 0.82rem; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.c0 { --k: var(--k0); } .c1 { --k: var(--k1); } .c2 { --k: var(--k2); } .c3 { --k: var(--k3); }
.c4 { --k: var(--k4); } .c5 { --k: var(--k5); } .c6 { --k: var(--k6); } .c7 { --k: var(--k7); }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg .name { fill: var(--ink); font-weight: 600; } svg .axis { fill: var(--ink); }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
.grid { stroke: var(--line); } .rule { stroke: var(--rule); }
.curve { fill: none; stroke: var(--k); stroke-width: 2.2; stroke-linejoin: round; } .curve.again { stroke-dasharray: 9 3; }
.curve.ack { stroke-dasharray: 3 3; stroke-width: 1.6; } .curve.pale { stroke: var(--rule); stroke-opacity: 0.45; stroke-width: 1.3; }
.dot { fill: var(--k); fill-opacity: 0.72; } .burst { fill: var(--card); fill-opacity: 0.6; stroke: var(--k); stroke-width: 1.4; }
.missing { fill: none; stroke: var(--bad); stroke-width: 2.4; }
.bar { fill: var(--k); fill-opacity: 0.85; } .bar.faint { fill-opacity: 0.38; }
.spell { fill: var(--spell); } .floor { fill: none; stroke: var(--soft); stroke-width: 1.4; stroke-dasharray: 1.5 3.5; stroke-linecap: round; }
.count { stroke: var(--ink); stroke-width: 2; }
.event { stroke: var(--rule); stroke-width: 1.2; stroke-dasharray: 5 4; } .event.shakes { stroke: var(--bad); }
.method { margin-bottom: 60px; }
</style>
</head>
<body>
"#;

const METHOD: &str = "<section class=\"method\">\n<h2>What these figures are worth</h2>\n<ul class=\"note\">\n\
<li>Real time, real sockets, one machine: gateway, phones and network share its processors. A busy machine adds \
milliseconds; it never takes any away.</li>\n\
<li>Both phones of a pair are behind the same bad network, so a message crosses it twice. The two numbers in a profile's \
sentence are for one phone, there and back.</li>\n\
<li>The times run from the call in the sending app to the call in the receiving app; the sender's database is in them.</li>\n\
<li>Loss, delay and bandwidth are drawn from the seed, per phone and direction. The moment a packet meets them is the \
machine's, so two runs with one seed are alike and not equal.</li>\n\
<li>TCP is a model here: a segment that the network drops comes a round trip and 200 ms later, doubled for every loss in a \
row, and what is behind it waits.</li>\n\
<li>The checker compares everything the apps were handed with everything they sent: lost, doubled, altered, out of order, \
or from somebody else.</li>\n\
</ul>\n</section>\n";

#[cfg(test)]
mod tests {
    use super::super::outcome::{Mark, Message};
    use super::super::scene::{SCENES, Scene};
    use super::*;

    /// Elements must be closed in order, attributes quoted, and nothing may be bare that has a meaning. Answers with the
    /// names of all elements.
    fn well_formed(page: &str) -> Vec<String> {
        let body = page.strip_prefix("<!DOCTYPE html>\n").expect("a document type");
        let (mut open, mut all) = (Vec::<String>::new(), Vec::new());
        let mut rest = body;
        while let Some((text, more)) = rest.split_once('<') {
            check_text(text);
            let (tag, more) = more.split_once('>').expect("a tag ends");
            rest = more;
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "closed in order");
                continue;
            }
            let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
            let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{name:?}");
            let quotes: Vec<_> = attributes.split('"').collect();
            assert_eq!(quotes.len() % 2, 1, "{tag}");
            for pair in quotes.chunks_exact(2) {
                assert!(pair[0].trim_start().ends_with('='), "{tag}");
                check_text(pair[1]);
            }
            all.push(name.to_owned());
            if !closed {
                open.push(name.to_owned());
            }
        }
        check_text(rest);
        assert!(open.is_empty(), "left open: {open:?}");
        all
    }

    fn check_text(text: &str) {
        assert!(!text.contains('<') && !text.contains("NaN") && !text.contains("inf "), "{text}");
        for after in text.split('&').skip(1) {
            let entity = after.split(';').next().unwrap_or_default();
            assert!(["amp", "lt", "gt", "quot", "#39"].contains(&entity), "&{entity}");
        }
    }

    fn message(speaker: usize, sent: u64, ack: Option<u64>, delivery: Option<u64>, burst: bool) -> Message {
        let ms = Duration::from_millis;
        Message {
            speaker,
            listener: speaker ^ 1,
            sent: ms(sent),
            acked: ack.map(|latency| ms(sent + latency)),
            delivered: delivery.map(|latency| ms(sent + latency)),
            burst,
        }
    }

    fn sample(scene: &'static Scene, shift: u64) -> Outcome {
        let ms = Duration::from_millis;
        let mut outcome = Outcome::empty(scene, 2);
        outcome.played = ms(20_000);
        outcome.messages = (0..40)
            .map(|n: u64| {
                let latency = 60 + shift + n * n;
                let speaker = usize::try_from(n % 2).unwrap();
                message(speaker, n * 400, Some(latency / 2), Some(latency), n.is_multiple_of(10))
            })
            .collect();
        outcome.marks = vec![
            Mark { from: ms(4_000), to: ms(6_000), label: "dark 2 s".to_owned(), shakes: true },
            Mark { from: ms(9_000), to: ms(9_000), label: "new address, untold".to_owned(), shakes: true },
            Mark { from: ms(14_000), to: ms(14_000), label: "fading".to_owned(), shakes: false },
        ];
        outcome.connects = vec![ms(250), ms(300)];
        outcome.connections = 3;
        outcome.attempts.insert(("QUIC", "won"), 3);
        (outcome.sent_bytes, outcome.received_bytes) = (12_000, 24_000);
        outcome.network_bytes = 38_000;
        outcome.network.up.packets = 1_234;
        outcome.network.up.lost = 61;
        outcome
    }

    fn run(outcomes: Vec<Outcome>) -> Run {
        Run {
            command_line: "fulmar weak --profile '<script>alert(\"&\")</script>'".to_owned(),
            version: "0.1.0".to_owned(),
            began: utc(1_795_262_706),
            took: Duration::from_secs(126),
            seed: 4_711,
            phones: 2,
            outcomes,
            unplayed: Vec::new(),
            interrupted: false,
        }
    }

    #[test]
    fn the_page_is_whole_and_says_every_figure() {
        let run = run(vec![sample(&SCENES[0], 0), sample(&SCENES[1], 500)]);
        let page = run.html();
        let elements = well_formed(&page);
        let count = |name: &str| elements.iter().filter(|element| *element == name).count();
        // All curves, two small ones, two timelines, recoveries and bytes.
        assert_eq!(count("svg"), 7);
        // 40 messages each, and two phones after each of two marks.
        assert_eq!(count("circle"), 2 * 40 + 2 * 2 * 2);
        assert_eq!((count("script"), count("img"), count("link")), (0, 0, 0));
        assert!(!page.contains("src=") && !page.contains("url(") && !page.contains("@import"));
        assert!(page.contains("prefers-color-scheme: dark"));
        let deliveries = run.outcomes[0].deliveries();
        for value in [deliveries.p50, deliveries.p95, deliveries.p99, deliveries.max] {
            assert!(page.contains(&format!("<td>{}</td>", spoken(value))), "{value}");
        }
        for want in [
            "Passed: each of 80 messages",
            "&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;",
            "4711",
            "2026-11-21",
            "n = 40",
            "900 bytes (network: 950), n = 40",
            "<td>4.9 %</td>",
            "dark 2 s, at 6.0 s",
            "new address, untold",
            "QUIC won 3",
            SCENES[1].title,
        ] {
            assert!(page.contains(want), "{want}");
        }
    }

    #[test]
    fn a_page_without_samples_has_no_plots_and_is_well_formed() {
        let empty = Outcome::empty(&SCENES[0], 2);
        for outcomes in [Vec::new(), vec![empty.clone()]] {
            let page = run(outcomes).html();
            assert!(!well_formed(&page).contains(&"svg".to_owned()));
        }
        // One profile has samples, the other does not.
        let page = run(vec![empty, sample(&SCENES[1], 0)]).html();
        assert_eq!(well_formed(&page).iter().filter(|element| *element == "svg").count(), 7);
        assert!(page.contains("nothing delivered") && page.contains("no messages"));
    }

    #[test]
    fn what_is_wrong_is_said_everywhere() {
        let mut outcome = sample(&SCENES[2], 0);
        outcome.messages.push(message(0, 15_000, None, None, false));
        outcome.problems.push("promise 1, lost: <message> 1/41".to_owned());
        let run = run(vec![outcome]);
        let page = run.html();
        well_formed(&page);
        assert!(page.contains("FAILED: Rural EDGE") && page.contains("lost: &lt;message&gt; 1/41"));
        assert!(page.contains("class=\"missing\""));
        assert!(
            run.table().contains("FAILED") && run.table().contains("rural-edge: promise 1"),
            "{}",
            run.table()
        );
        assert_eq!(run.json()["passed"], false);
    }

    #[test]
    fn what_was_interrupted_is_no_failure() {
        let mut run = run(vec![sample(&SCENES[0], 0)]);
        run.interrupted = true;
        run.unplayed = vec!["airplane"];
        let page = run.html();
        well_formed(&page);
        assert!(
            page.contains("Interrupted: nothing was wrong with the 40 messages") && page.contains("airplane")
        );
    }

    #[test]
    fn json_has_figures_and_messages() {
        let json = run(vec![sample(&SCENES[0], 0)]).json();
        let profile = &json["profiles"][0];
        assert_eq!(profile["profile"], "metro");
        assert_eq!(profile["messages"].as_array().unwrap().len(), 40);
        assert_eq!(profile["messages"][1]["delivered_ms"], 461.0);
        assert_eq!(profile["deliver_ms"]["count"], 40);
        assert_eq!(profile["wire_bytes_per_message"], 900.0);
        assert_eq!(profile["recoveries"].as_array().unwrap().len(), 2);
        assert!(!json.to_string().contains("null"));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, want) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_868_799, "2000-02-29 23:59:59 UTC"),
            (1_795_262_706, "2026-11-21 12:05:06 UTC"),
        ] {
            assert_eq!(utc(seconds), want);
        }
        assert!(utc(u64::MAX).contains("UTC"));
    }
}

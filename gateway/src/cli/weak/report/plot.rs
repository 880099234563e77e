//! Plots as SVG, drawn from outcomes.
//!
//! - Colours are classes (`c0` to `c7`) that the page's style gives a colour for light and for dark.
//! - Every axis names its unit, every figure the number of samples behind it. Logarithmic axes carry dots and lines, never
//!   bars: a bar's length means something only from zero on.
//! - What is not there is drawn as missing: a message that never arrived keeps its place in the count, so its curve ends
//!   below 100 %.
//! - All text is escaped, and no coordinate can be anything but a number.
//!
//! Not here: the page around them (`report`), what the figures mean.

use std::fmt::Write as _;
use std::time::Duration;

use super::escape;
use crate::cli::rehearsal::{grouped, number, ratio};
use crate::cli::weak::live::spoken;
use crate::cli::weak::outcome::{Mark, Message, Outcome, millis};

/// Points of a curve, and dots of a timeline, at the most: more would not be seen.
const POINTS_MAX: usize = 500;
const DOTS_MAX: usize = 6_000;

/// Colours there are before they begin anew.
pub(super) const COLOURS: usize = 8;

/// The shortest latency an axis shows, in milliseconds.
const LATENCY_MIN: f64 = 1.0;

/// The place of a plot in its picture.
#[derive(Clone, Copy, Debug)]
struct Frame {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

/// Values to places.
#[derive(Clone, Copy, Debug)]
struct Axis {
    log: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// From zero on.
    fn linear(high: f64, from: f64, to: f64) -> Self {
        Self { log: false, low: 0.0, high: nice_above(high), from, to }
    }

    fn log((low, high): (f64, f64), from: f64, to: f64) -> Self {
        Self { log: true, low, high, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            value / self.high
        };
        self.from + (self.to - self.from) * if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
    }

    /// Where lines and labels belong.
    fn ticks(&self) -> Vec<f64> {
        if !self.log {
            return (0..=4).map(|quarter| self.high * f64::from(quarter) / 4.0).collect();
        }
        let all: Vec<f64> = round_numbers().filter(|tick| *tick >= self.low && *tick <= self.high).collect();
        if all.len() <= 10 {
            return all;
        }
        all.into_iter().filter(|tick| (tick.log10() - tick.log10().round()).abs() < 1e-9).collect()
    }
}

/// 1, 2, 5, 10, 20, 50 … to ten million.
fn round_numbers() -> impl DoubleEndedIterator<Item = f64> {
    (0..=6).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)))
}

/// The next number that divides well into four.
fn nice_above(value: f64) -> f64 {
    let steps = (-2..=9).flat_map(|power| [1.0, 2.0, 4.0, 8.0].map(|digit| digit * 10f64.powi(power)));
    let mut steps = steps.filter(|step| *step >= value);
    steps.next().unwrap_or_else(|| value.max(1.0))
}

/// The range of latencies of all these, in round milliseconds.
fn latency_range<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> (f64, f64) {
    let (mut low, mut high) = (f64::INFINITY, 0.0_f64);
    for message in outcomes.flat_map(|outcome| &outcome.messages) {
        for latency in [message.delivery_latency(), message.ack_latency()].into_iter().flatten() {
            low = low.min(millis(latency));
            high = high.max(millis(latency));
        }
    }
    let low = round_numbers().rev().find(|round| *round <= low.max(LATENCY_MIN)).unwrap_or(LATENCY_MIN);
    let low = if low.is_finite() && high > 0.0 { low } else { 10.0 };
    let high = round_numbers().find(|round| *round >= high.max(low * 10.0)).unwrap_or(1e7);
    (low, high)
}

/// A colour's class for the `ordinal`-th profile, with dashes when the colours have begun anew.
pub(super) fn colour(ordinal: usize) -> String {
    let again = if ordinal / COLOURS % 2 == 1 { " again" } else { "" };
    format!("c{}{again}", ordinal % COLOURS)
}

struct Picture {
    svg: String,
}

impl Picture {
    fn new(width: f64, height: f64, class: &str, what: &str) -> Self {
        let what = escape(what);
        let svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"{class}\" viewBox=\"0 0 {} {}\" role=\"img\" \
             aria-label=\"{what}\">\n",
            px(width),
            px(height)
        );
        Self { svg }
    }

    fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let text = escape(text);
        let _ = writeln!(self.svg, "<text x=\"{}\" y=\"{}\" class=\"{class}\">{text}</text>", px(x), px(y));
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(px);
        let _ =
            writeln!(self.svg, "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" class=\"{class}\"/>");
    }

    fn rect(&mut self, corner: (f64, f64), size: (f64, f64), class: &str) {
        let [x, y, width, height] = [corner.0, corner.1, size.0.max(0.0), size.1.max(0.0)].map(px);
        let _ = writeln!(
            self.svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" class=\"{class}\"/>"
        );
    }

    fn path(&mut self, points: &[(f64, f64)], class: &str) {
        if points.is_empty() {
            return;
        }
        let mut path = String::new();
        for (ordinal, (x, y)) in points.iter().enumerate() {
            let _ = write!(path, "{}{} {}", if ordinal == 0 { "M" } else { "L" }, px(*x), px(*y));
        }
        let _ = writeln!(self.svg, "<path d=\"{path}\" class=\"{class}\"/>");
    }

    fn dot(&mut self, at: (f64, f64), radius: f64, class: &str, tip: &str) {
        let [x, y, radius] = [at.0, at.1, radius].map(px);
        let tip = escape(tip);
        let _ = writeln!(
            self.svg,
            "<circle cx=\"{x}\" cy=\"{y}\" r=\"{radius}\" class=\"{class}\"><title>{tip}</title></circle>"
        );
    }

    fn latency_axis(&mut self, axis: &Axis, frame: Frame, upright: bool) {
        for tick in axis.ticks() {
            let at = axis.at(tick);
            let label = spoken_tick(tick);
            if upright {
                self.line((frame.left, at), (frame.right, at), "grid");
                self.text(frame.left - 8.0, at + 4.0, "tick end", &label);
            } else {
                self.line((at, frame.top), (at, frame.bottom), "grid");
                self.text(at, frame.bottom + 16.0, "tick mid", &label);
            }
        }
    }

    fn end(mut self) -> String {
        self.svg.push_str("</svg>\n");
        self.svg
    }
}

/// A coordinate; what is no number is at zero.
fn px(value: f64) -> String {
    let text = format!("{:.1}", if value.is_finite() { value } else { 0.0 });
    text.strip_suffix(".0").map(str::to_owned).unwrap_or(text)
}

/// Milliseconds at an axis: `20 ms`, `5 s`.
fn spoken_tick(millis: f64) -> String {
    if millis >= 1_000.0 { format!("{:.0} s", millis / 1_000.0) } else { format!("{millis:.0} ms") }
}

/// Latencies in milliseconds, shortest first, and how many there should be.
fn sorted(messages: &[Message], latency: fn(&Message) -> Option<Duration>) -> (Vec<f64>, usize) {
    let mut latencies: Vec<f64> = messages.iter().filter_map(latency).map(millis).collect();
    latencies.sort_by(f64::total_cmp);
    (latencies, messages.len())
}

/// The curve of shares: of all that was sent, how much was there after so long.
fn cumulative(
    messages: &[Message],
    latency: fn(&Message) -> Option<Duration>,
    x: &Axis,
    y: &Axis,
) -> Vec<(f64, f64)> {
    let (latencies, of) = sorted(messages, latency);
    let stride = latencies.len().div_ceil(POINTS_MAX).max(1);
    let last = latencies.len().saturating_sub(1);
    let mut points = Vec::new();
    let mut before = y.at(0.0);
    for (ordinal, latency) in latencies.iter().enumerate() {
        if ordinal % stride != 0 && ordinal != last {
            continue;
        }
        let share = 100.0 * ratio(number(ordinal + 1), number(of));
        let at = (x.at(*latency), y.at(share));
        // A share changes at a latency, not between two.
        points.push((at.0, before));
        points.push(at);
        before = at.1;
    }
    points
}

/// All profiles in one plot.
pub(super) fn curves(outcomes: &[Outcome]) -> String {
    let mut legend: Vec<(usize, &Outcome)> = outcomes.iter().enumerate().collect();
    legend.sort_by(|a, b| a.1.deliveries().p50.total_cmp(&b.1.deliveries().p50));
    let rows = 34.0 * f64::from(u32::try_from(legend.len()).unwrap_or(u32::MAX));
    let height = (rows + 60.0).max(430.0);
    let frame = Frame { left: 56.0, top: 14.0, right: 720.0, bottom: height - 52.0 };
    let x = Axis::log(latency_range(outcomes.iter()), frame.left, frame.right);
    let y = Axis { log: false, low: 0.0, high: 100.0, from: frame.bottom, to: frame.top };
    let mut picture = Picture::new(
        960.0,
        height,
        "wide",
        "Share of messages delivered within a time, one curve per profile",
    );
    for share in [0.0, 25.0, 50.0, 75.0, 95.0, 100.0] {
        picture.line((frame.left, y.at(share)), (frame.right, y.at(share)), "grid");
        if share != 100.0 {
            picture.text(frame.left - 8.0, y.at(share) + 4.0, "tick end", &format!("{share:.0} %"));
        }
    }
    picture.text(frame.left - 8.0, y.at(100.0) - 1.0, "tick end", "100 %");
    picture.latency_axis(&x, frame, false);
    picture.text(
        (frame.left + frame.right) / 2.0,
        height - 12.0,
        "axis mid",
        "from handing a message to the SDK until the other phone's app had it (logarithmic)",
    );
    for (ordinal, outcome) in outcomes.iter().enumerate() {
        let points = cumulative(&outcome.messages, Message::delivery_latency, &x, &y);
        picture.path(&points, &format!("curve {}", colour(ordinal)));
    }
    let mut row = frame.top + 12.0;
    for (ordinal, outcome) in legend {
        let deliveries = outcome.deliveries();
        picture.line((736.0, row - 4.0), (760.0, row - 4.0), &format!("curve {}", colour(ordinal)));
        picture.text(768.0, row, "name", outcome.scene.title);
        let count = grouped(number(outcome.messages.len()));
        let median = match deliveries.count {
            0 => "nothing delivered".to_owned(),
            _ => format!("median {}, n = {count}", spoken(deliveries.p50)),
        };
        picture.text(768.0, row + 14.0, "tick", &median);
        row += 34.0;
    }
    picture.end()
}

/// One profile's curves, with those of the others behind them.
pub(super) fn small_curve(outcomes: &[Outcome], ordinal: usize) -> String {
    let Some(outcome) = outcomes.get(ordinal) else { return String::new() };
    let frame = Frame { left: 44.0, top: 34.0, right: 308.0, bottom: 176.0 };
    let x = Axis::log(latency_range(outcomes.iter()), frame.left, frame.right);
    let y = Axis { log: false, low: 0.0, high: 100.0, from: frame.bottom, to: frame.top };
    let what = format!("Shares delivered and acked within a time: {}", outcome.scene.title);
    let mut picture = Picture::new(320.0, 200.0, "small", &what);
    picture.text(frame.left, 16.0, "name", outcome.scene.title);
    let count = format!("n = {}", grouped(number(outcome.messages.len())));
    picture.text(frame.right, 16.0, "tick end", &count);
    for share in [0.0, 50.0, 100.0] {
        picture.line((frame.left, y.at(share)), (frame.right, y.at(share)), "grid");
        picture.text(frame.left - 6.0, y.at(share) + 4.0, "tick end", &format!("{share:.0} %"));
    }
    let ticks: Vec<f64> = round_numbers().filter(|tick| *tick >= x.low && *tick <= x.high).collect();
    for tick in ticks.into_iter().filter(|tick| (tick.log10() - tick.log10().round()).abs() < 1e-9) {
        picture.line((x.at(tick), frame.top), (x.at(tick), frame.bottom), "grid");
        picture.text(x.at(tick), frame.bottom + 16.0, "tick mid", &spoken_tick(tick));
    }
    for other in outcomes.iter().enumerate().filter(|(other, _)| *other != ordinal).map(|(_, other)| other) {
        picture.path(&cumulative(&other.messages, Message::delivery_latency, &x, &y), "curve pale");
    }
    let colour = colour(ordinal);
    picture
        .path(&cumulative(&outcome.messages, Message::ack_latency, &x, &y), &format!("curve ack {colour}"));
    picture
        .path(&cumulative(&outcome.messages, Message::delivery_latency, &x, &y), &format!("curve {colour}"));
    picture.end()
}

/// Every message of one profile by its time and its latency, with what happened to the network behind them.
pub(super) fn timeline(outcomes: &[Outcome], ordinal: usize) -> String {
    let Some(outcome) = outcomes.get(ordinal) else { return String::new() };
    let frame = Frame { left: 64.0, top: 40.0, right: 944.0, bottom: 224.0 };
    let last = outcome.messages.iter().map(|message| message.sent).max().unwrap_or_default();
    let last = outcome.marks.iter().map(|mark| mark.to).fold(last, Duration::max).as_secs_f64();
    let x = Axis { log: false, low: 0.0, high: last.ceil().max(1.0), from: frame.left, to: frame.right };
    // The same for all profiles, so that heights can be compared.
    let y = Axis::log(latency_range(outcomes.iter()), frame.bottom, frame.top + 6.0);
    let what = format!("Latency of every message over time: {}", outcome.scene.title);
    let mut picture = Picture::new(960.0, 268.0, "wide", &what);
    for (place, mark) in outcome.marks.iter().enumerate() {
        draw_mark(&mut picture, mark, place, &x, frame);
    }
    picture.latency_axis(&y, frame, true);
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0, 3_600.0];
    let step = step.into_iter().find(|step| x.high / step <= 20.0).unwrap_or(36_000.0);
    let mut tick = 0.0;
    while tick <= x.high {
        picture.line((x.at(tick), frame.bottom), (x.at(tick), frame.bottom + 4.0), "rule");
        picture.text(x.at(tick), frame.bottom + 18.0, "tick mid", &format!("{tick:.0}"));
        tick += step;
    }
    picture.line((frame.left, frame.bottom), (frame.right, frame.bottom), "rule");
    picture.text(
        (frame.left + frame.right) / 2.0,
        frame.bottom + 36.0,
        "axis mid",
        "when it was sent, seconds after the beginning",
    );
    for mark in outcome.marks.iter().filter(|mark| mark.to > mark.from) {
        draw_floor(&mut picture, mark, &x, &y);
    }
    let colour = colour(ordinal);
    let stride = outcome.messages.len().div_ceil(DOTS_MAX).max(1);
    for message in outcome.messages.iter().step_by(stride) {
        let sent = x.at(message.sent.as_secs_f64());
        let who = format!("phone {} to phone {}", message.speaker + 1, message.listener + 1);
        let when = format!("sent at {:.2} s", message.sent.as_secs_f64());
        match message.delivery_latency() {
            Some(latency) => {
                let latency = millis(latency);
                let kind = if message.burst { "burst" } else { "dot" };
                let tip = format!("{who}, {when}, delivered after {}", spoken(latency));
                picture.dot((sent, y.at(latency)), 3.2, &format!("{kind} {colour}"), &tip);
            }
            None => {
                let tip = format!("{who}, {when}, never delivered");
                picture.dot((sent, frame.top + 6.0), 5.0, "missing", &tip);
            }
        }
    }
    picture.end()
}

fn draw_mark(picture: &mut Picture, mark: &Mark, place: usize, x: &Axis, frame: Frame) {
    let (from, to) = (x.at(mark.from.as_secs_f64()), x.at(mark.to.as_secs_f64()));
    if mark.to > mark.from {
        picture.rect((from, frame.top), (to - from, frame.bottom - frame.top), "spell");
    } else {
        picture.line(
            (from, frame.top),
            (from, frame.bottom),
            if mark.shakes { "event shakes" } else { "event" },
        );
    }
    // Neighbours' words stand in two rows, and those near the right end stand before their mark.
    let row = frame.top - if place.is_multiple_of(2) { 6.0 } else { 20.0 };
    let late = from > frame.left + (frame.right - frame.left) * 0.75;
    picture.text(if late { to } else { from }, row, if late { "tick end" } else { "tick" }, &mark.label);
}

/// What the dark itself costs: nothing sent in it can arrive before it ends.
fn draw_floor(picture: &mut Picture, mark: &Mark, x: &Axis, y: &Axis) {
    let (total, to) = (millis(mark.to.saturating_sub(mark.from)), mark.to.as_secs_f64());
    let steps = 48;
    // As many points for the last milliseconds as for the first seconds: the axis is logarithmic.
    let points: Vec<_> = (0..=steps)
        .map(|step| total * (y.low / total).min(1.0).powf(f64::from(step) / f64::from(steps)))
        .map(|left| (x.at(to - left / 1_000.0), y.at(left)))
        .collect();
    picture.path(&points, "floor");
}

/// How soon phones were back, one row for everything that shook them. Empty when nothing did.
pub(super) fn recoveries(outcomes: &[Outcome]) -> String {
    let all: Vec<_> = outcomes
        .iter()
        .enumerate()
        .flat_map(|(ordinal, outcome)| {
            outcome.recoveries().into_iter().map(move |recovery| (ordinal, outcome.scene.title, recovery))
        })
        .collect();
    if all.is_empty() {
        return String::new();
    }
    let longest = all.iter().filter_map(|(.., recovery)| recovery.waits.last()).max().copied();
    let height = 34.0 * f64::from(u32::try_from(all.len()).unwrap_or(u32::MAX)) + 60.0;
    let frame = Frame { left: 310.0, top: 10.0, right: 700.0, bottom: height - 46.0 };
    let x = Axis::linear(longest.map_or(1_000.0, millis).max(10.0), frame.left, frame.right);
    let mut picture =
        Picture::new(960.0, height, "wide", "Time to the first message after a dark spell or a new address");
    for tick in x.ticks() {
        picture.line((x.at(tick), frame.top), (x.at(tick), frame.bottom), "grid");
        picture.text(x.at(tick), frame.bottom + 16.0, "tick mid", &spoken(tick).replace("0.00 ms", "0"));
    }
    picture.text(
        (frame.left + frame.right) / 2.0,
        height - 8.0,
        "axis mid",
        "until the first message after it (bar: median; dots: every phone)",
    );
    let mut row = frame.top + 4.0;
    for (ordinal, title, recovery) in &all {
        let colour = colour(*ordinal);
        picture.text(frame.left - 12.0, row + 11.0, "name end", title);
        let what = format!("{}, at {:.1} s", recovery.label, recovery.at.as_secs_f64());
        picture.text(frame.left - 12.0, row + 24.0, "tick end", &what);
        let count = recovery.waits.len() + recovery.never;
        let mut words = match (recovery.median(), recovery.waits.last()) {
            (Some(median), Some(slowest)) => {
                let median = millis(median);
                picture.rect(
                    (frame.left, row + 6.0),
                    (x.at(median) - frame.left, 14.0),
                    &format!("bar {colour}"),
                );
                format!("{} · slowest {} · {count} phones", spoken(median), spoken(millis(*slowest)))
            }
            _ => format!("nobody of {count} phones"),
        };
        for wait in &recovery.waits {
            let wait = millis(*wait);
            picture.dot((x.at(wait), row + 13.0), 3.0, &format!("burst {colour}"), &spoken(wait));
        }
        if recovery.never > 0 && !recovery.waits.is_empty() {
            let _ = write!(words, " · {} never", recovery.never);
        }
        picture.text(frame.right + 12.0, row + 17.0, "tick", &words);
        row += 34.0;
    }
    picture.end()
}

/// What a message costs on the wire, profile by profile.
pub(super) fn bytes(outcomes: &[Outcome]) -> String {
    let height = 30.0 * f64::from(u32::try_from(outcomes.len()).unwrap_or(u32::MAX)) + 60.0;
    let frame = Frame { left: 210.0, top: 10.0, right: 690.0, bottom: height - 46.0 };
    let counted = |outcome: &Outcome| ratio(outcome.network_bytes, number(outcome.messages.len()));
    let most = outcomes.iter().filter_map(Outcome::bytes_per_message).chain(outcomes.iter().map(counted));
    let most = most.fold(100.0, f64::max);
    let x = Axis::linear(most, frame.left, frame.right);
    let mut picture = Picture::new(960.0, height, "wide", "Bytes on the wire per message");
    for tick in x.ticks() {
        picture.line((x.at(tick), frame.top), (x.at(tick), frame.bottom), "grid");
        picture.text(x.at(tick), frame.bottom + 16.0, "tick mid", &format!("{tick:.0}"));
    }
    picture.text(
        (frame.left + frame.right) / 2.0,
        height - 8.0,
        "axis mid",
        "bytes per message, both phones together (full: sent; pale: received; stroke: counted by the network)",
    );
    let mut row = frame.top + 4.0;
    for (ordinal, outcome) in outcomes.iter().enumerate() {
        let colour = colour(ordinal);
        let messages = number(outcome.messages.len());
        picture.text(frame.left - 12.0, row + 15.0, "name end", outcome.scene.title);
        let words = match outcome.bytes_per_message() {
            Some(bytes) => {
                let sent = x.at(ratio(outcome.sent_bytes, messages));
                picture.rect((frame.left, row + 4.0), (sent - frame.left, 14.0), &format!("bar {colour}"));
                picture.rect((sent, row + 4.0), (x.at(bytes) - sent, 14.0), &format!("bar faint {colour}"));
                let network = counted(outcome);
                picture.line((x.at(network), row + 1.0), (x.at(network), row + 21.0), "count");
                format!("{bytes:.0} bytes (network: {network:.0}), n = {}", grouped(messages))
            }
            None => "no messages".to_owned(),
        };
        picture.text(frame.right + 12.0, row + 15.0, "tick", &words);
        row += 30.0;
    }
    picture.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_keep_their_values_inside() {
        let axis = Axis::log((10.0, 1_000.0), 0.0, 200.0);
        for (value, want) in
            [(10.0, 0.0), (100.0, 100.0), (1_000.0, 200.0), (1.0, 0.0), (1e9, 200.0), (0.0, 0.0)]
        {
            assert!((axis.at(value) - want).abs() < 1e-6, "{value}: {}", axis.at(value));
        }
        assert_eq!(axis.ticks(), [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0]);
        assert_eq!(Axis::log((1.0, 1e5), 0.0, 1.0).ticks(), [1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0]);
        let axis = Axis::linear(730.0, 0.0, 100.0);
        assert_eq!(axis.ticks(), [0.0, 200.0, 400.0, 600.0, 800.0]);
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!((0.0..=100.0).contains(&axis.at(bad)));
            assert_eq!(px(bad), "0");
        }
    }

    #[test]
    fn a_range_without_a_sample_is_still_a_range() {
        assert_eq!(latency_range(std::iter::empty()), (10.0, 100.0));
    }
}

//! A run as one HTML page that needs nothing but itself: no script, no font, no picture from elsewhere. It is well-formed
//! XML, follows the reader's wish for light or dark, and every axis names its unit.

use std::{fmt::Write as _, time::Duration};

use crate::{
    report::{Run, Second, spoken},
    tally::Times,
};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 880.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 270.0;

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2733;--paper:#fff;--faint:#d5dbe1;--c0:#0b6fb8;--c1:#c2571a;--c2:#2c8a4b;--c3:#8a4fb0;--c4:#888}
@media (prefers-color-scheme:dark){:root{--ink:#dfe6ec;--paper:#12181e;--faint:#33404c;--c0:#5ab0ee;--c1:#f0935a;--c2:#67c987;--c3:#c493e6;--c4:#999}}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}
svg{width:100%;height:auto;font-size:12px}svg text{fill:var(--ink)}.grid{stroke:var(--faint)}path{fill:none;stroke-width:2}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}
.end{text-anchor:end}.mid{text-anchor:middle}pre{overflow-x:auto;font-size:13px}.doubt{border-left:4px solid var(--c1);padding-left:.8rem}";

/// The page.
pub(crate) fn page(run: &Run) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <title>Fulmar under load</title><style>{STYLE}</style></head><body>\n<h1>Fulmar under load</h1>\n<p>{}</p>\n<p><code>{}</code></p>\n",
        escape(&run.work),
        escape(&run.command_line)
    );
    if run.doubts.is_empty() {
        page.push_str("<p>The generator kept up; nothing speaks against these figures.</p>\n");
    } else {
        page.push_str("<div class=\"doubt\"><p>Read with care:</p><ul>\n");
        for doubt in &run.doubts {
            let _ = writeln!(page, "<li>{}</li>", escape(doubt));
        }
        page.push_str("</ul></div>\n");
    }
    page.push_str("<h2>How long it took</h2>\n");
    page.push_str(&curves(run));
    if run.timeline.len() > 1 {
        page.push_str("<h2>Second by second</h2>\n");
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let plots: [(&str, &[Line<'_>]); 3] = [
            (
                "deliveries in ms",
                &[("p99", "c1", &|second| millis(second.p99)), ("p50", "c0", &|second| millis(second.p50))],
            ),
            ("deliveries per second", &[("deliveries", "c2", &|second| second.delivered)]),
            ("cores the gateway used", &[("cores", "c3", &|second| second.cores)]),
        ];
        for (unit, lines) in plots {
            page.push_str(&timeline(&run.timeline, unit, lines));
        }
    }
    let _ = write!(page, "<h2>Figures</h2>\n<pre>{}</pre>\n</body></html>\n", escape(&run.table()));
    page
}

type Line<'a> = (&'a str, &'a str, &'a dyn Fn(&Second) -> f64);

/// What share of all took no longer. The share's axis has a nine more at each step: the last ones are what matters.
fn curves(run: &Run) -> String {
    const LAST: f64 = 4.0;
    let all: Vec<(&str, &Times)> = run.times().into_iter().filter(|(_, times)| times.len() > 0).collect();
    let low =
        all.iter().map(|(_, times)| times.quantile(0.0)).min().unwrap_or_default().as_secs_f64().max(1e-6);
    let high =
        all.iter().map(|(_, times)| times.max()).max().unwrap_or_default().as_secs_f64().max(low * 10.0);
    let (low, high) = (low.log10().floor(), high.log10().ceil());
    let y = |seconds: f64| {
        BOTTOM - (BOTTOM - TOP) * ((seconds.max(1e-9).log10() - low) / (high - low)).clamp(0.0, 1.0)
    };
    let nines = |share: f64| (-(1.0 - share).max(1e-9).log10()).min(LAST);
    let x = |share: f64| LEFT + (RIGHT - LEFT) * nines(share) / LAST;
    let mut svg = begin("How long messages took, by share");
    let mut decade = low;
    while decade <= high {
        let at = y(10f64.powf(decade));
        grid(&mut svg, (LEFT, at), (RIGHT, at));
        text(&mut svg, (LEFT - 8.0, at + 4.0), "end", &spoken(Duration::from_secs_f64(10f64.powf(decade))));
        decade += 1.0;
    }
    for (label, share) in
        [("0 %", 0.0), ("50 %", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("99.9 %", 0.999), ("99.99 %", 0.9999)]
    {
        grid(&mut svg, (x(share), TOP), (x(share), BOTTOM));
        text(&mut svg, (x(share), BOTTOM + 18.0), "mid", label);
    }
    text(&mut svg, ((LEFT + RIGHT) / 2.0, BOTTOM + 40.0), "mid", "share that took no longer");
    for (ordinal, (name, times)) in all.iter().enumerate() {
        let points: Vec<(f64, f64)> =
            times.curve().iter().map(|(time, share)| (x(*share), y(time.as_secs_f64()))).collect();
        path(&mut svg, &points, &format!("c{ordinal}"), &format!("{name}: {} of them", times.len()));
        legend(&mut svg, ordinal, name);
    }
    svg.push_str("</svg>\n");
    svg
}

fn timeline(seconds: &[Second], unit: &str, lines: &[Line<'_>]) -> String {
    let until = seconds.last().map_or(1.0, |second| second.at).max(1.0);
    let most = lines.iter().flat_map(|(_, _, value)| seconds.iter().map(value)).fold(0.0, f64::max);
    let most = round_above(most);
    let x = |at: f64| LEFT + (RIGHT - LEFT) * at / until;
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * (value / most).clamp(0.0, 1.0);
    let mut svg = begin(unit);
    for quarter in 0..=4 {
        let value = most * f64::from(quarter) / 4.0;
        grid(&mut svg, (LEFT, y(value)), (RIGHT, y(value)));
        text(&mut svg, (LEFT - 8.0, y(value) + 4.0), "end", &figure(value));
        let at = until * f64::from(quarter) / 4.0;
        text(&mut svg, (x(at), BOTTOM + 18.0), "mid", &format!("{at:.0} s"));
    }
    text(&mut svg, ((LEFT + RIGHT) / 2.0, BOTTOM + 40.0), "mid", unit);
    for (ordinal, (name, class, value)) in lines.iter().enumerate() {
        let points: Vec<(f64, f64)> = seconds.iter().map(|second| (x(second.at), y(value(second)))).collect();
        path(&mut svg, &points, class, name);
        if lines.len() > 1 {
            text(&mut svg, (RIGHT - 60.0, TOP + 16.0 * (ordinal as f64 + 1.0)), "", name);
            path(
                &mut svg,
                &[
                    (RIGHT - 90.0, TOP + 16.0 * ordinal as f64 + 12.0),
                    (RIGHT - 66.0, TOP + 16.0 * ordinal as f64 + 12.0),
                ],
                class,
                name,
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn begin(what: &str) -> String {
    let what = escape(what);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{what}\">\n"
    )
}

fn text(svg: &mut String, at: (f64, f64), class: &str, text: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" class=\"{class}\">{}</text>",
        px(at.0),
        px(at.1),
        escape(text)
    );
}

fn grid(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(px);
    let _ = writeln!(svg, "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" class=\"grid\"/>");
}

fn path(svg: &mut String, points: &[(f64, f64)], class: &str, tip: &str) {
    let mut d = String::new();
    for (ordinal, (x, y)) in points.iter().enumerate() {
        let _ = write!(d, "{}{} {}", if ordinal == 0 { "M" } else { "L" }, px(*x), px(*y));
    }
    if !d.is_empty() {
        let _ = writeln!(svg, "<path d=\"{d}\" class=\"{class}\"><title>{}</title></path>", escape(tip));
    }
}

fn legend(svg: &mut String, ordinal: usize, name: &str) {
    let at = TOP + 18.0 * ordinal as f64 + 8.0;
    path(svg, &[(LEFT + 12.0, at), (LEFT + 36.0, at)], &format!("c{ordinal}"), name);
    text(svg, (LEFT + 42.0, at + 4.0), "", name);
}

/// A coordinate; what is no number is at zero.
fn px(value: f64) -> String {
    format!("{:.1}", if value.is_finite() { value } else { 0.0 })
}

fn figure(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.0}k", value / 1e3),
        value if value >= 10.0 || value == 0.0 => format!("{value:.0}"),
        value => format!("{value:.2}"),
    }
}

/// The next number that divides well into four.
fn round_above(value: f64) -> f64 {
    let mut steps = (-3..=12).flat_map(|power| [1.0, 2.0, 4.0, 8.0].map(|digit| digit * 10f64.powi(power)));
    steps.find(|step| *step >= value).unwrap_or(1.0)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_closes_what_it_opens_and_escapes_what_it_was_told() {
        let mut run = Run { work: "a < b & \"c\"".to_owned(), ..Run::default() };
        run.doubts.push("<script>".to_owned());
        run.counts.delivery.add(Duration::from_millis(3));
        run.counts.delivery.add(Duration::from_millis(300));
        run.timeline =
            (1..5).map(|at| Second { at: f64::from(at), delivered: 10.0, ..Second::default() }).collect();
        let page = page(&run);
        assert!(!page.contains("<script>") && page.contains("a &lt; b &amp; &quot;c&quot;"));
        for element in ["html", "body", "svg", "ul", "pre", "div", "path", "text", "h2"] {
            let opened =
                page.matches(&format!("<{element} ")).count() + page.matches(&format!("<{element}>")).count();
            assert_eq!(opened, page.matches(&format!("</{element}>")).count(), "{element}");
        }
        assert_eq!(page.matches("<svg").count(), 4);
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }

    #[test]
    fn a_run_in_which_nothing_happened_is_a_page_too() {
        let page = page(&Run::default());
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}

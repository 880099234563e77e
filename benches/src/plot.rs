//! Plots for pages that need nothing but themselves: no script, no font, no picture from elsewhere. They are well-formed XML and follow
//! the reader's wish for light or dark.
//!
//! Not here: what a page says (`fulmar-load`, `fulmar-peers`).

use std::{fmt::Write as _, time::Duration};

use crate::times::{Times, spoken};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 320.0;
/// Left end of the axes.
pub const LEFT: f64 = 64.0;
/// Right end of the axes.
pub const RIGHT: f64 = 880.0;
/// Upper end of the axes.
pub const TOP: f64 = 16.0;
/// Lower end of the axes.
pub const BOTTOM: f64 = 270.0;

/// What a page of plots looks like.
pub const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1c2733;--paper:#fff;--faint:#d5dbe1;--c0:#0b6fb8;--c1:#c2571a;--c2:#2c8a4b;--c3:#8a4fb0;--c4:#888}
@media (prefers-color-scheme:dark){:root{--ink:#dfe6ec;--paper:#12181e;--faint:#33404c;--c0:#5ab0ee;--c1:#f0935a;--c2:#67c987;--c3:#c493e6;--c4:#999}}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--ink);background:var(--paper)}
svg{width:100%;height:auto;font-size:12px}svg text{fill:var(--ink)}.grid{stroke:var(--faint)}path{fill:none;stroke-width:2}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}
.end{text-anchor:end}.mid{text-anchor:middle}pre{overflow-x:auto;font-size:13px}.doubt{border-left:4px solid var(--c1);padding-left:.8rem}";

/// What share of all took no longer. The share's axis has a nine more at each step: the last ones are what matters.
#[must_use]
pub fn curves(what: &str, of: &[(&str, &Times)]) -> String {
    const LAST: f64 = 4.0;
    let all: Vec<_> = of.iter().filter(|(_, times)| !times.is_empty()).collect();
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
    let mut svg = begin(what);
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

/// Opens a plot that shows `what`; close it with `</svg>`.
#[must_use]
pub fn begin(what: &str) -> String {
    let what = escape(what);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{what}\">\n"
    )
}

/// Words at a point; `class` is empty, `end` or `mid`.
pub fn text(svg: &mut String, at: (f64, f64), class: &str, text: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" class=\"{class}\">{}</text>",
        px(at.0),
        px(at.1),
        escape(text)
    );
}

/// A faint line.
pub fn grid(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(px);
    let _ = writeln!(svg, "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" class=\"grid\"/>");
}

/// A line through points, in the colour of `class` (`c0` to `c7`), with a tip.
pub fn path(svg: &mut String, points: &[(f64, f64)], class: &str, tip: &str) {
    let mut d = String::new();
    for (ordinal, (x, y)) in points.iter().enumerate() {
        let _ = write!(d, "{}{} {}", if ordinal == 0 { "M" } else { "L" }, px(*x), px(*y));
    }
    if !d.is_empty() {
        let _ = writeln!(svg, "<path d=\"{d}\" class=\"{class}\"><title>{}</title></path>", escape(tip));
    }
}

/// The name of the line in the colour of this ordinal.
pub fn legend(svg: &mut String, ordinal: usize, name: &str) {
    let at = TOP + 18.0 * ordinal as f64 + 8.0;
    path(svg, &[(LEFT + 12.0, at), (LEFT + 36.0, at)], &format!("c{ordinal}"), name);
    text(svg, (LEFT + 42.0, at + 4.0), "", name);
}

/// A coordinate; what is no number is at zero.
fn px(value: f64) -> String {
    format!("{:.1}", if value.is_finite() { value } else { 0.0 })
}

/// A number for an axis.
#[must_use]
pub fn figure(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.0}k", value / 1e3),
        value if value >= 10.0 || value == 0.0 => format!("{value:.0}"),
        value => format!("{value:.2}"),
    }
}

/// The next number that divides well into four.
#[must_use]
pub fn round_above(value: f64) -> f64 {
    let mut steps = (-3..=12).flat_map(|power| [1.0, 2.0, 4.0, 8.0].map(|digit| digit * 10f64.powi(power)));
    steps.find(|step| *step >= value).unwrap_or(1.0)
}

/// Text as it stands in a page.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

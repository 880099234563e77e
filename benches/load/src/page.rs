//! A run as one HTML page that needs nothing but itself: no script, no font, no picture from elsewhere. It is well-formed
//! XML, follows the reader's wish for light or dark, and every axis names its unit.

use std::{fmt::Write as _, time::Duration};

use fulmar_benches::plot::{
    BOTTOM, LEFT, RIGHT, STYLE, TOP, begin, curves, escape, figure, grid, path, round_above, text,
};

use crate::report::{Run, Second};

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
    page.push_str(&curves("How long messages took, by share", &run.times()));
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

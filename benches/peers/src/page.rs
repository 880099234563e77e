//! A run as one HTML page that needs nothing but itself. Plots: CPU as bars, times as curves, one of each for each piece of work.

use std::fmt::Write as _;

use fulmar_benches::plot::{
    BOTTOM, LEFT, RIGHT, STYLE, TOP, begin, curves, escape, figure, grid, round_above, text,
};

use crate::{
    plan::Point,
    report::{NOTES, Report, Row, cells},
};

/// The page.
pub(crate) fn page(report: &Report) -> String {
    let mut page = format!(
        "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <title>Fulmar beside the others</title><style>{STYLE}\n.bar{{stroke:none}}.bar.c0{{fill:var(--c0)}}.bar.c4{{fill:var(--c4)}}\
         table{{border-collapse:collapse;font-size:13px}}td,th{{padding:.15rem .6rem .15rem 0;text-align:left;\
         border-bottom:1px solid var(--faint)}}</style></head><body>\n<h1>Fulmar beside the others</h1>\n<p><code>{}</code></p>\n\
         <p>{}; {}</p>\n",
        escape(&report.command_line),
        escape(&report.machine),
        escape(&report.commit)
    );
    if report.is_quick {
        page.push_str("<div class=\"doubt\"><p>Quick: too short to quote.</p></div>\n");
    }
    for point in Point::ALL {
        let rows = report.rows_of(point);
        if !rows.is_empty() {
            section(&mut page, point, report, &rows);
        }
    }
    page.push_str("<h2>Who they are</h2>\n<ul>\n");
    for guest in &report.guests {
        let name = guest.peer.name();
        if !guest.setting.is_empty() {
            let (honestly, setting) = (escape(guest.peer.honestly()), escape(&guest.setting));
            let _ = writeln!(page, "<li><b>{name}</b>: {honestly} <i>{setting}</i></li>");
        }
        for trouble in &guest.trouble {
            let _ = writeln!(page, "<li><b>{name}</b>: not measured: {}</li>", escape(trouble));
        }
    }
    page.push_str("</ul>\n<h2>How to read it</h2>\n<ul>\n");
    for note in NOTES {
        let _ = writeln!(page, "<li>{}</li>", escape(note));
    }
    page.push_str("</ul>\n</body></html>\n");
    page
}

fn section(page: &mut String, point: Point, report: &Report, rows: &[&Row]) {
    let _ = writeln!(page, "<h2>{}</h2>", escape(&point.title(&report.sizes)));
    page.push_str("<table>\n");
    for (number, cells) in cells(point, rows).iter().enumerate() {
        let cell = if number == 0 { "th" } else { "td" };
        page.push_str("<tr>");
        for text in cells {
            let _ = write!(page, "<{cell}>{}</{cell}>", escape(text));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
    let remarks: Vec<String> = rows
        .iter()
        .flat_map(|row| {
            let said = row.bars().into_iter().chain(row.doubts.iter().cloned());
            said.map(|words| format!("{}: {words}", row.peer.name()))
        })
        .collect();
    if !remarks.is_empty() {
        page.push_str("<ul>\n");
        for remark in remarks {
            let _ = writeln!(page, "<li>{}</li>", escape(&remark));
        }
        page.push_str("</ul>\n");
    }
    page.push_str(&bars("CPU of the server for each, µs", rows, |row| row.cpu_us));
    if point == Point::Connections {
        page.push_str(&bars("memory of the server for each connection, KiB", rows, |row| row.memory_kib));
    } else {
        let lines: Vec<_> = rows.iter().map(|row| (row.peer.name(), &row.curve)).collect();
        page.push_str(&curves("How long it took, by share", &lines));
    }
}

/// A bar for each server; Fulmar's has a colour of its own.
fn bars(what: &str, rows: &[&Row], value: impl Fn(&Row) -> Option<f64>) -> String {
    let values: Vec<(&str, f64)> = rows
        .iter()
        .filter_map(|row| Some((row.peer.name(), value(row).filter(|value| value.is_finite())?)))
        .collect();
    let most = round_above(values.iter().map(|(_, value)| *value).fold(0.0, f64::max));
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * (value / most).clamp(0.0, 1.0);
    let mut svg = begin(what);
    for quarter in 0..=4 {
        let value = most * f64::from(quarter) / 4.0;
        grid(&mut svg, (LEFT, y(value)), (RIGHT, y(value)));
        text(&mut svg, (LEFT - 8.0, y(value) + 4.0), "end", &figure(value));
    }
    let width = (RIGHT - LEFT) / values.len().max(1) as f64;
    for (number, (name, value)) in values.iter().enumerate() {
        let left = LEFT + width * number as f64;
        let class = if *name == "fulmar" { "c0" } else { "c4" };
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" class=\"bar {class}\"><title>{name}: {value:.2}</title></rect>",
            left + width * 0.2,
            y(*value),
            width * 0.6,
            BOTTOM - y(*value)
        );
        text(&mut svg, (left + width / 2.0, BOTTOM + 18.0), "mid", name);
        text(&mut svg, (left + width / 2.0, y(*value) - 4.0), "mid", &format!("{value:.1}"));
    }
    text(&mut svg, ((LEFT + RIGHT) / 2.0, BOTTOM + 40.0), "mid", what);
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_page_closes_what_it_opens_and_escapes_what_it_was_told() {
        let page = page(&report());
        assert!(page.contains("fulmar-peers &lt;x&gt;") && !page.contains("<x>"));
        for element in
            ["html", "body", "svg", "ul", "li", "div", "path", "text", "h2", "table", "tr", "td", "rect"]
        {
            let opened =
                page.matches(&format!("<{element} ")).count() + page.matches(&format!("<{element}>")).count();
            assert_eq!(opened, page.matches(&format!("</{element}>")).count(), "{element}");
        }
        assert_eq!(page.matches("<svg").count(), 2);
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }
}

//! What a bench prints and writes: one row per measured thing, its floor beside it.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::Path,
};

use serde_json::{Value, json};

/// One figure and what it is held against.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// The median over the rounds.
    pub value: f64,
    /// The floor's name and value, measured in the same run.
    pub floor: Option<(String, f64)>,
    /// The bar and whether it is met; `None`: recorded only.
    pub bar: Option<(String, bool)>,
}

/// The figures of one bench.
#[derive(Clone, Debug)]
pub struct Report {
    bench: &'static str,
    quick: bool,
    figures: Vec<Figure>,
    notes: Vec<String>,
}

impl Report {
    /// An empty report.
    #[must_use]
    pub const fn new(bench: &'static str, quick: bool) -> Self {
        Self { bench, quick, figures: Vec::new(), notes: Vec::new() }
    }

    /// Adds a figure that is only recorded.
    pub fn record(&mut self, name: impl Into<String>, unit: &'static str, value: f64) {
        self.figures.push(Figure { name: name.into(), unit, value, floor: None, bar: None });
    }

    /// Adds a figure beside its floor.
    pub fn beside(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        value: f64,
        floor: (impl Into<String>, f64),
    ) {
        let floor = Some((floor.0.into(), floor.1));
        self.figures.push(Figure { name: name.into(), unit, value, floor, bar: None });
    }

    /// Sets the bar of the figure added last.
    pub fn bar(&mut self, bar: impl Into<String>, met: bool) {
        if let Some(figure) = self.figures.last_mut() {
            figure.bar = Some((bar.into(), met));
        }
    }

    /// Adds a line about how to read the figures.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// The table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let header = ["what", "value", "unit", "floor", "ratio", "bar"].map(str::to_owned);
        let rows = self.figures.iter().map(|figure| {
            let (floor, ratio) = match &figure.floor {
                Some((name, floor)) => {
                    (format!("{} {name}", number(*floor)), format!("{:.2}", figure.value / floor))
                }
                None => (String::new(), String::new()),
            };
            let bar = match &figure.bar {
                Some((bar, met)) => format!("{bar}: {}", if *met { "met" } else { "MISSED" }),
                None => String::new(),
            };
            [figure.name.clone(), number(figure.value), figure.unit.to_owned(), floor, ratio, bar]
        });
        let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
        let mut widths = [0; 6];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mode = if self.quick { " (quick: too short to quote)" } else { "" };
        let mut text = format!("\n{}{mode}\n", self.bench);
        for row in &rows {
            let mut line = String::new();
            for (width, cell) in widths.iter().zip(row) {
                let _ = write!(line, "{cell:<width$}  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "- {note}");
        }
        text
    }

    /// The figures for machines.
    #[must_use]
    pub fn json(&self) -> Value {
        let figures: Vec<Value> = self
            .figures
            .iter()
            .map(|figure| {
                let floor = figure.floor.as_ref();
                json!({
                    "name": figure.name,
                    "unit": figure.unit,
                    "value": figure.value,
                    "floor": floor.map(|(name, value)| json!({"name": name, "value": value})),
                    "ratio": floor.map(|(_, value)| figure.value / value),
                    "bar": figure.bar.as_ref().map(|(text, met)| json!({"text": text, "met": met})),
                })
            })
            .collect();
        json!({ "bench": self.bench, "quick": self.quick, "figures": figures, "notes": self.notes })
    }

    /// Prints the table and writes the file, if one is named.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn finish(&self, file: Option<&Path>) -> io::Result<()> {
        io::stdout().lock().write_all(self.table().as_bytes())?;
        match file {
            Some(file) => std::fs::write(file, format!("{:#}\n", self.json())),
            None => Ok(()),
        }
    }
}

/// Three significant digits, without an exponent.
fn number(value: f64) -> String {
    match value.abs() {
        magnitude if magnitude >= 100.0 => format!("{value:.0}"),
        magnitude if magnitude >= 10.0 => format!("{value:.1}"),
        magnitude if magnitude >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_bar_is_said_in_both_forms() {
        let mut report = Report::new("b", false);
        report.beside("x", "ns", 30.0, ("floor", 10.0));
        report.bar("≤ 2 × floor", false);
        report.record("y", "", 1.0);
        assert!(report.table().contains("3.00") && report.table().contains("≤ 2 × floor: MISSED"));
        let json = report.json();
        assert_eq!(json["figures"][0]["ratio"], 3.0);
        assert_eq!(json["figures"][0]["bar"]["met"], false);
        assert!(json["figures"][1]["floor"].is_null());
    }
}

//! What is going on, while it goes on: a screen on a terminal, lines elsewhere.
//!
//! - Both read the same rows, made from the board and the network's own counts; nothing is counted for them alone.
//! - The terminal is given back as it was, also after a panic.
//! - On the terminal, `q`, Esc and Ctrl-C ask for an end; elsewhere that is the signals' matter.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use fulmar_badnet::Proxy;
use fulmar_badnet::proxy::Totals;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;
use ratatui::{DefaultTerminal, Frame};
use tokio::sync::watch;

use super::board::{Board, Standing};
use super::outcome::{Message, Outcome, Percentiles, dropped, percentiles};
use super::scene::Scene;
use crate::cli::rehearsal::{number, ratio};

/// How often the screen is drawn, and how soon a key is seen.
const ON_SCREEN: Duration = Duration::from_millis(120);

/// How often a line is written elsewhere.
const ELSEWHERE: Duration = Duration::from_secs(3);

/// How soon the writer of lines sees that it is over.
const GLANCE: Duration = Duration::from_millis(100);

/// Columns of a sparkline at the most.
const SPARK_MAX: u16 = 120;

/// The eighths of a sparkline: the slowest message of a column up to so many milliseconds.
const HEIGHTS: [(u64, char); 8] =
    [(50, '▁'), (100, '▂'), (200, '▃'), (400, '▄'), (800, '▅'), (1_600, '▆'), (4_000, '▇'), (u64::MAX, '█')];

/// Where a scene is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    Connecting,
    /// For so long.
    Playing(Duration),
    /// Nothing more is sent; what is under way arrives.
    Settling,
    /// Whether nothing was wrong.
    Done(bool),
    Interrupted,
}

/// What is shown, shared by those who play and those who look.
#[derive(Debug)]
pub(super) struct Live {
    rows: Mutex<Vec<Row>>,
    over: AtomicBool,
    started: Instant,
    head: String,
}

#[derive(Debug)]
struct Row {
    scene: &'static Scene,
    length: Duration,
    stage: Stage,
    source: Source,
}

/// Where a row's figures come from.
#[derive(Debug)]
enum Source {
    None,
    Running(Arc<Board>, Arc<Proxy>),
    Over(Box<Figures>),
}

/// A row's figures at one moment.
#[derive(Clone, Debug, Default)]
struct Figures {
    now: Duration,
    messages: Vec<Message>,
    /// Dark spells and changes, from and to; the dark that is not over lasts until now.
    marks: Vec<(Duration, Duration)>,
    dark: bool,
    states: Vec<Standing>,
    network: Totals,
    latency: Percentiles,
}

impl Live {
    pub(super) fn new(head: String, scenes: impl Iterator<Item = (&'static Scene, Duration)>) -> Self {
        let row = |(scene, length)| Row { scene, length, stage: Stage::Waiting, source: Source::None };
        Self {
            rows: Mutex::new(scenes.map(row).collect()),
            over: AtomicBool::new(false),
            started: Instant::now(),
            head,
        }
    }

    fn rows(&self) -> MutexGuard<'_, Vec<Row>> {
        // What is shown is whole at any moment.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The scene begins; this is where its figures are.
    pub(super) fn begin(&self, ordinal: usize, board: &Arc<Board>, proxy: &Arc<Proxy>) {
        if let Some(row) = self.rows().get_mut(ordinal) {
            row.stage = Stage::Connecting;
            row.source = Source::Running(Arc::clone(board), Arc::clone(proxy));
        }
    }

    /// The scene is there now.
    pub(super) fn stage(&self, ordinal: usize, stage: Stage) {
        if let Some(row) = self.rows().get_mut(ordinal) {
            row.stage = stage;
        }
    }

    /// The scene's figures do not change any more; lets go of board and network.
    pub(super) fn finish(&self, ordinal: usize, outcome: &Outcome) {
        let figures = Figures {
            now: outcome.played,
            messages: outcome.messages.clone(),
            marks: spans(outcome.marks.iter().map(|mark| (mark.from, mark.to))),
            dark: false,
            states: Vec::new(),
            network: outcome.network,
            latency: outcome.deliveries(),
        };
        if let Some(row) = self.rows().get_mut(ordinal) {
            row.source = Source::Over(Box::new(figures));
        }
    }
}

fn spans(marks: impl Iterator<Item = (Duration, Duration)>) -> Vec<(Duration, Duration)> {
    marks.collect()
}

impl Source {
    fn figures(&self) -> Figures {
        match self {
            Self::None => Figures::default(),
            Self::Running(board, proxy) => {
                let network = proxy.totals();
                let seen = board.seen();
                Figures {
                    now: seen.now(),
                    messages: seen.messages.clone(),
                    marks: spans(
                        seen.marks
                            .iter()
                            .map(|mark| (mark.from, mark.to))
                            .chain(seen.dark_since.map(|since| (since, seen.now()))),
                    ),
                    dark: seen.dark_since.is_some(),
                    states: seen.states.clone(),
                    network,
                    latency: percentiles(seen.messages.iter().filter_map(Message::delivery_latency)),
                }
            }
            Self::Over(figures) => (**figures).clone(),
        }
    }
}

/// Shows what goes on until it is dropped.
#[derive(Debug)]
pub(super) struct Display {
    live: Arc<Live>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Starts to show `live`: on the whole terminal, or in lines on standard error. `stop` is set when a key asks for an
    /// end.
    ///
    /// # Errors
    /// The terminal can't be used.
    pub(super) fn start(live: &Arc<Live>, screen: bool, stop: watch::Sender<bool>) -> anyhow::Result<Self> {
        let theirs = Arc::clone(live);
        let thread = std::thread::Builder::new().name("fulmar-weak-view".to_owned());
        let thread = if screen {
            // Installs a hook that gives the terminal back before a panic is printed.
            let terminal = ratatui::try_init().context("the terminal can't be used; try --plain")?;
            thread.spawn(move || show_screen(&theirs, terminal, &stop))
        } else {
            thread.spawn(move || show_lines(&theirs))
        };
        Ok(Self { live: Arc::clone(live), thread: Some(thread.context("the display can't be started")?) })
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.live.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A display that panicked has given the terminal back and is no reason to fail the run.
            let _ = thread.join();
        }
    }
}

fn show_lines(live: &Live) {
    let mut next = Instant::now();
    let mut told: Vec<Option<Stage>> = vec![None; live.rows().len()];
    loop {
        // Looked at before the rows: how the last scene ended is said, too.
        let over = live.over.load(Ordering::Acquire);
        let due = Instant::now() >= next;
        if due {
            next = Instant::now() + ELSEWHERE;
        }
        let mut lines = Vec::new();
        for (row, told) in live.rows().iter().zip(&mut told) {
            let running = matches!(row.stage, Stage::Playing(_) | Stage::Settling | Stage::Connecting);
            let changed = *told != Some(row.stage) && row.stage != Stage::Waiting;
            if changed || (due && running) {
                *told = Some(row.stage);
                lines.push(plain_line(row));
            }
        }
        for line in lines {
            eprintln!("{:6.1} s  {line}", live.started.elapsed().as_secs_f64());
        }
        if over {
            return;
        }
        std::thread::park_timeout(GLANCE);
    }
}

fn plain_line(row: &Row) -> String {
    let figures = row.source.figures();
    let mut line = format!("{}: {}", row.scene.name, stage_words(row, &figures));
    if !figures.messages.is_empty() {
        let _ = write!(line, "; {}", counters(&figures));
    }
    if !figures.states.is_empty() {
        let _ = write!(line, "; phones {}", glyphs(&figures.states));
    }
    line
}

fn stage_words(row: &Row, figures: &Figures) -> String {
    match row.stage {
        Stage::Waiting => "waiting".to_owned(),
        Stage::Connecting => "connecting".to_owned(),
        Stage::Playing(length) => {
            let dark = if figures.dark { ", dark" } else { "" };
            format!(
                "{:.0} of {} s{dark}",
                figures.now.as_secs_f64().min(length.as_secs_f64()),
                length.as_secs()
            )
        }
        Stage::Settling => "waiting for what is under way".to_owned(),
        Stage::Done(true) => "passed".to_owned(),
        Stage::Done(false) => "FAILED".to_owned(),
        Stage::Interrupted => "interrupted".to_owned(),
    }
}

fn counters(figures: &Figures) -> String {
    let count = |there: fn(&Message) -> bool| figures.messages.iter().filter(|m| there(m)).count();
    let network = &figures.network;
    let packets =
        network.up.packets + network.down.packets + network.tcp.up.segments + network.tcp.down.segments;
    let latency = match figures.latency.count {
        0 => String::new(),
        _ => format!(", p50 {} p99 {}", spoken(figures.latency.p50), spoken(figures.latency.p99)),
    };
    format!(
        "{} sent, {} acked, {} delivered{latency}, {:.1} % of {packets} packets dropped",
        figures.messages.len(),
        count(|message| message.acked.is_some()),
        count(|message| message.delivered.is_some()),
        100.0 * ratio(dropped(network), packets),
    )
}

/// Milliseconds as people say them: `85 ms`, `1.24 s`.
pub(super) fn spoken(millis: f64) -> String {
    if millis < 0.95 {
        format!("{millis:.2} ms")
    } else if millis < 9.95 {
        format!("{millis:.1} ms")
    } else if millis < 999.5 {
        format!("{millis:.0} ms")
    } else if millis < 9_950.0 {
        format!("{:.2} s", millis / 1_000.0)
    } else {
        format!("{:.1} s", millis / 1_000.0)
    }
}

fn glyphs(states: &[Standing]) -> String {
    states.iter().map(|standing| glyph(*standing).0).collect()
}

const fn glyph(standing: Standing) -> (char, Color) {
    match standing {
        Standing::Offline => ('×', Color::Red),
        Standing::Connecting => ('○', Color::Yellow),
        Standing::Syncing => ('◐', Color::Cyan),
        Standing::Suspect => ('◌', Color::Yellow),
        Standing::Live => ('●', Color::Green),
    }
}

fn show_screen(live: &Live, mut terminal: DefaultTerminal, stop: &watch::Sender<bool>) {
    while !live.over.load(Ordering::Acquire) {
        if terminal.draw(|frame| draw(frame, live, *stop.borrow())).is_err() {
            // A terminal that went away is no reason to end the run.
            break;
        }
        match event::poll(ON_SCREEN) {
            Ok(true) => {
                let Ok(event) = event::read() else { break };
                if asks_for_an_end(&event) {
                    stop.send_replace(true);
                }
            }
            Ok(false) => {}
            Err(_) => break,
        }
    }
    ratatui::restore();
}

fn asks_for_an_end(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind != KeyEventKind::Release
        && match key.code {
            KeyCode::Char('c' | 'd') => control,
            KeyCode::Char('q') | KeyCode::Esc => true,
            _ => false,
        }
}

fn draw(frame: &mut Frame<'_>, live: &Live, stopping: bool) {
    let rows = live.rows();
    let count = u16::try_from(rows.len()).unwrap_or(u16::MAX);
    let area = frame.area();
    // Three lines for a scene and one between; without the one, then without figures of those that wait.
    let roomy = area.height >= count.saturating_mul(4).saturating_add(2);
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Fill(1), Constraint::Length(1)]).areas(area);
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let dim = Style::new().fg(Color::DarkGray);
    let mut title = vec![Span::styled("fulmar weak  ", bold), Span::styled(live.head.clone(), dim)];
    if stopping {
        title.push(Span::styled("  stopping", Style::new().fg(Color::Yellow)));
    }
    frame.render_widget(Line::from(title), head);
    let mut lines = Vec::new();
    for row in rows.iter() {
        let figures = row.source.figures();
        let (sign, colour) = match row.stage {
            Stage::Waiting => ('·', Color::DarkGray),
            Stage::Done(true) => ('✓', Color::Green),
            Stage::Done(false) => ('✗', Color::Red),
            Stage::Interrupted => ('–', Color::Yellow),
            _ => ('▶', Color::Cyan),
        };
        let mut first = vec![
            Span::styled(format!("{sign} "), Style::new().fg(colour)),
            Span::styled(format!("{:<26}", row.scene.title), bold),
            Span::styled(stage_words(row, &figures), Style::new().fg(colour)),
        ];
        if !figures.states.is_empty() {
            first.push(Span::raw("   "));
            first.extend(figures.states.iter().map(|standing| {
                let (sign, colour) = glyph(*standing);
                Span::styled(sign.to_string(), Style::new().fg(colour))
            }));
        }
        lines.push(Line::from(first));
        if row.stage != Stage::Waiting {
            lines.push(spark(row, &figures, area.width.saturating_sub(4).min(SPARK_MAX)));
            lines.push(Line::from(Span::styled(format!("  {}", counters(&figures)), dim)));
        }
        if roomy {
            lines.push(Line::default());
        }
    }
    // The scene that is played must be seen on a small screen.
    let height = usize::from(body.height);
    let hidden = lines.len().saturating_sub(height);
    let from = if rows.iter().all(|row| row.stage == Stage::Waiting) { 0 } else { hidden };
    let shown: Vec<_> = lines.into_iter().skip(from).collect();
    frame.render_widget(Paragraph::new(shown), body);
    legend(frame, foot, dim);
}

fn legend(frame: &mut Frame<'_>, area: Rect, dim: Style) {
    let mut spans = vec![Span::styled("columns: slowest message  ", dim)];
    for (sign, what, colour) in [
        ("▃", "≤ 200 ms ", Color::Green),
        ("▅", "≤ 0.8 s ", Color::Yellow),
        ("█", "> 4 s ", Color::Red),
        ("░", "dark ", Color::DarkGray),
        ("?", "under way ", Color::Magenta),
    ] {
        spans.push(Span::styled(format!("{sign} "), Style::new().fg(colour)));
        spans.push(Span::styled(what, dim));
    }
    spans.push(Span::styled("   q: stop and write the report", dim));
    frame.render_widget(Line::from(spans), area);
}

/// The slowest message of each column's time; what has not arrived is a question.
fn spark(row: &Row, figures: &Figures, columns: u16) -> Line<'static> {
    let length = u64::try_from(row.length.as_millis()).unwrap_or(u64::MAX).max(1);
    let ms = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    let at = |time: u64| time.saturating_mul(u64::from(columns)) / length;
    let now = at(ms(figures.now));
    let mut spans = vec![Span::raw("  ")];
    for column in 0..u64::from(columns) {
        if column > now && matches!(row.stage, Stage::Playing(_)) {
            break;
        }
        let within = figures.messages.iter().filter(|message| at(ms(message.sent)) == column);
        let slowest = within.map(|message| message.delivery_latency().map_or(u64::MAX, ms)).max();
        let dark = figures
            .marks
            .iter()
            .any(|(from, to)| from < to && (at(ms(*from))..=at(ms(*to))).contains(&column));
        let (sign, colour) = match slowest {
            Some(u64::MAX) => ('?', Color::Magenta),
            Some(slowest) => {
                let sign =
                    HEIGHTS.iter().find(|(limit, _)| slowest <= *limit).map_or('█', |(_, sign)| *sign);
                let colour = match slowest {
                    0..=200 => Color::Green,
                    201..=800 => Color::Yellow,
                    801..=4_000 => Color::LightRed,
                    _ => Color::Red,
                };
                (sign, colour)
            }
            None if dark => ('░', Color::DarkGray),
            None => (' ', Color::DarkGray),
        };
        let style = Style::new().fg(colour);
        spans.push(Span::styled(sign.to_string(), if dark { style.bg(Color::Black) } else { style }));
    }
    Line::from(spans)
}

/// What the head of the screen says.
pub(super) fn head(phones: usize, seed: u64) -> String {
    format!("{} phones, seed {seed}", number(phones))
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::scene::SCENES;
    use super::*;

    fn shown(live: &Live, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, live, false)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_scene_shows_its_latencies_and_its_figures() {
        let ms = Duration::from_millis;
        let scenes = SCENES.iter().take(2).map(|scene| (scene, Duration::from_secs(10)));
        let live = Live::new(head(2, 7), scenes);
        let mut outcome = Outcome::empty(&SCENES[0], 2);
        outcome.played = ms(10_000);
        let message = |sent, latency: Option<u64>| Message {
            speaker: 0,
            listener: 1,
            sent: ms(sent),
            acked: None,
            delivered: latency.map(|latency| ms(sent + latency)),
            burst: false,
        };
        outcome.messages = vec![message(0, Some(90)), message(5_000, Some(3_000)), message(9_000, None)];
        outcome.network.up.packets = 90;
        outcome.network.up.lost = 9;
        outcome.network.tcp.down.segments = 10;
        outcome.network.tcp.down.repeated = 1;
        live.finish(0, &outcome);
        live.stage(0, Stage::Done(true));
        for height in [6, 40] {
            let screen = shown(&live, 100, height);
            for want in [
                "2 phones, seed 7",
                "Metro",
                "passed",
                "▂",
                "▇",
                "?",
                "3 sent",
                "10.0 % of 100 packets",
                "Lift",
            ] {
                assert!(screen.contains(want) || height < 40, "{want}: {screen}");
            }
        }
        let line = plain_line(&live.rows()[0]);
        assert!(
            line.starts_with("metro: passed; 3 sent, 0 acked, 2 delivered, p50 90 ms p99 3.00 s"),
            "{line}"
        );
    }

    #[test]
    fn a_tiny_screen_is_no_reason_to_fail() {
        let live = Live::new(head(2, 7), SCENES.iter().map(|scene| (scene, Duration::from_secs(10))));
        live.stage(3, Stage::Settling);
        for (width, height) in [(1, 1), (3, 2), (20, 3)] {
            shown(&live, width, height);
        }
    }

    #[test]
    fn milliseconds_are_spoken() {
        for (millis, want) in [
            (0.0, "0.00 ms"),
            (3.12, "3.1 ms"),
            (85.4, "85 ms"),
            (999.6, "1.00 s"),
            (1_240.0, "1.24 s"),
            (12_340.0, "12.3 s"),
        ] {
            assert_eq!(spoken(millis), want);
        }
    }
}

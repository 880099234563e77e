//! The chat on a terminal: conversations at the left, messages, a line to type in, the connection below.
//!
//! - The terminal is given back as it was, also after a panic.
//! - Drawing reads the model and changes nothing but the place on the screen.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use crossterm::event::{
    self, DisableBracketedPaste, EnableBracketedPaste, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers,
};
use crossterm::execute;
use fulmar_client::ConversationClass;
use ratatui::layout::{Constraint, Layout, Position, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Borders, Paragraph};
use ratatui::{DefaultTerminal, Frame};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::command::{self, Command};
use super::core::{Change, Core};
use super::model::{Entry, Mark, Model, Room, mark_of};

/// Keys that may wait.
const KEYS_MAX: usize = 64;

/// How often the screen is drawn without a reason: typing notices end by themselves.
const TICK: Duration = Duration::from_millis(250);

/// How long the reader of keys waits before it looks whether it is still needed.
const POLL: Duration = Duration::from_millis(100);

/// Columns of the list of conversations, and the width below which it is left out.
const LIST_COLUMNS: u16 = 24;
const LIST_FROM: u16 = 64;

/// Columns of names in groups.
const NAME_COLUMNS: usize = 14;

/// Longest message that can be typed, in bytes.
const INPUT_MAX: usize = 8 * 1024;

const COLOURS: [Color; 6] =
    [Color::Cyan, Color::Magenta, Color::Yellow, Color::Blue, Color::LightRed, Color::LightGreen];

/// What only the screen knows.
#[derive(Debug, Default)]
struct View {
    input: Input,
    /// Lines between the newest and the last one shown.
    scroll: usize,
    /// Lines of messages there were, to stay in place while new ones come.
    lines: usize,
    newest: Option<(usize, fulmar_client::Seq)>,
    /// Height of the messages' part.
    height: usize,
    /// Minutes east of Greenwich.
    offset_minutes: i64,
}

/// Runs until the user leaves.
///
/// # Errors
/// The terminal can't be used, or the client's database failed.
pub(super) async fn run(mut core: Core) -> anyhow::Result<ExitCode> {
    // Installs a hook that gives the terminal back before a panic is printed.
    let mut terminal = ratatui::try_init()?;
    let paste = execute!(io::stdout(), EnableBracketedPaste);
    let ended = match paste {
        Ok(()) => talk(&mut core, &mut terminal).await,
        Err(error) => Err(error.into()),
    };
    // Both are tried whatever happened; the first failure is the one to tell.
    let _ = execute!(io::stdout(), DisableBracketedPaste);
    ratatui::restore();
    let left = core.under_way();
    let (_, connection) = core.model.connection_line();
    let closed = core.close().await;
    ended?;
    closed?;
    if connection.starts_with("closed") {
        eprintln!("fulmar: {connection}");
    }
    if left > 0 {
        eprintln!("fulmar: {left} messages are not stored yet; they go out the next time");
    }
    Ok(ExitCode::SUCCESS)
}

async fn talk(core: &mut Core, terminal: &mut DefaultTerminal) -> anyhow::Result<()> {
    let (keys, mut pressed) = mpsc::channel(KEYS_MAX);
    std::thread::Builder::new().name("fulmar-keys".to_owned()).spawn(move || read_keys(&keys))?;
    let mut view = View { offset_minutes: offset_minutes(), ..View::default() };
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let now = core.now();
        terminal.draw(|frame| draw(frame, &core.model, &mut view, now))?;
        let closed = tokio::select! {
            change = core.next() => matches!(change, Change::Closed),
            _ = ticks.tick() => false,
            event = pressed.recv() => match event {
                Some(event) => !handle(core, &mut view, event).await?,
                None => true,
            },
        };
        if closed {
            return Ok(());
        }
    }
}

fn read_keys(keys: &mpsc::Sender<Event>) {
    while !keys.is_closed() {
        match event::poll(POLL) {
            Ok(false) => {}
            Ok(true) => match event::read() {
                Ok(event) => {
                    if keys.blocking_send(event).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            },
            Err(_) => return,
        }
    }
}

/// `false` ends the chat.
async fn handle(core: &mut Core, view: &mut View, event: Event) -> anyhow::Result<bool> {
    match event {
        Event::Key(key) if key.kind != KeyEventKind::Release => handle_key(core, view, key).await,
        Event::Paste(text) => {
            text.chars().for_each(|c| view.input.insert(if c.is_control() { ' ' } else { c }));
            Ok(true)
        }
        _ => Ok(true),
    }
}

async fn handle_key(core: &mut Core, view: &mut View, key: KeyEvent) -> anyhow::Result<bool> {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let alt = key.modifiers.contains(KeyModifiers::ALT);
    match key.code {
        KeyCode::Char('c' | 'q') if control => return Ok(false),
        KeyCode::Char('d') if control && view.input.is_empty() => return Ok(false),
        KeyCode::Char('u') if control => view.input.clear(),
        KeyCode::Char('w') if control => view.input.delete_word(),
        KeyCode::Char('a') if control => view.input.home(),
        KeyCode::Char('e') if control => view.input.end(),
        KeyCode::Char('n') if control => switch(core, view, true),
        KeyCode::Char('p') if control => switch(core, view, false),
        KeyCode::Char(c) if !control && !alt => {
            view.input.insert(c);
            if !view.input.text().starts_with('/') {
                core.typing();
            }
        }
        KeyCode::Enter => {
            let line = view.input.text();
            match command::read(&line) {
                Ok(command) => {
                    view.input.clear();
                    view.scroll = 0;
                    if let Some(command) = command {
                        return Ok(core.execute(command).await?);
                    }
                }
                // The line stays, to be put right.
                Err(wrong) => core.model.notice(wrong),
            }
        }
        KeyCode::Tab => switch(core, view, true),
        KeyCode::BackTab => switch(core, view, false),
        KeyCode::Down if alt => switch(core, view, true),
        KeyCode::Up if alt => switch(core, view, false),
        KeyCode::Backspace => view.input.backspace(),
        KeyCode::Delete => view.input.delete(),
        KeyCode::Left => view.input.left(),
        KeyCode::Right => view.input.right(),
        KeyCode::Home => view.input.home(),
        KeyCode::End => view.input.end(),
        KeyCode::Esc if view.scroll > 0 => view.scroll = 0,
        KeyCode::Esc => view.input.clear(),
        KeyCode::Up => scroll_up(core, view, 1).await?,
        KeyCode::PageUp => scroll_up(core, view, (view.height / 2).max(1)).await?,
        KeyCode::Down => view.scroll = view.scroll.saturating_sub(1),
        KeyCode::PageDown => view.scroll = view.scroll.saturating_sub((view.height / 2).max(1)),
        _ => {}
    }
    Ok(true)
}

fn switch(core: &mut Core, view: &mut View, forward: bool) {
    core.step(forward);
    view.scroll = 0;
}

async fn scroll_up(core: &mut Core, view: &mut View, lines: usize) -> anyhow::Result<()> {
    let most = view.lines.saturating_sub(view.height);
    if view.scroll + lines > most && core.model.room().is_some_and(|room| !room.at_start) {
        core.execute(Command::Older).await?;
    }
    view.scroll = (view.scroll + lines).min(most);
    Ok(())
}

fn draw(frame: &mut Frame<'_>, model: &Model, view: &mut View, now: Duration) {
    let [main, input, status] =
        Layout::vertical([Constraint::Min(3), Constraint::Length(3), Constraint::Length(1)])
            .areas(frame.area());
    let messages = if main.width >= LIST_FROM {
        let [list, messages] =
            Layout::horizontal([Constraint::Length(LIST_COLUMNS), Constraint::Min(20)]).areas(main);
        draw_list(frame, list, model);
        messages
    } else {
        main
    };
    draw_messages(frame, messages, model, view, now);
    draw_input(frame, input, model, view);
    draw_status(frame, status, model);
}

fn draw_list(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let block = Block::new()
        .borders(Borders::ALL)
        .border_type(BorderType::Rounded)
        .border_style(dim())
        .title(" chats ");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let width = usize::from(inner.width);
    let height = usize::from(inner.height);
    // The open one is always in sight.
    let first = model.open.map_or(0, |open| (open + 1).saturating_sub(height));
    let lines: Vec<Line<'_>> = model
        .rooms
        .iter()
        .enumerate()
        .skip(first)
        .take(height)
        .map(|(at, room)| {
            let badge = match room.unread {
                0 => String::new(),
                unread if unread > 99 => " 99+ ".to_owned(),
                unread => format!(" {unread} "),
            };
            let open = model.open == Some(at);
            let left = width.saturating_sub(badge.len() + 3);
            let title = fitted(&room.title(), left);
            let pad = " ".repeat(width.saturating_sub(width_of(&title) + badge.len() + 2));
            let style = match (open, room.unread) {
                (true, _) => Style::new().add_modifier(Modifier::REVERSED),
                (false, 0) => Style::new(),
                (false, _) => Style::new().add_modifier(Modifier::BOLD),
            };
            Line::from(vec![
                Span::styled(format!(" {title}{pad}"), style),
                Span::styled(badge, Style::new().fg(Color::Black).bg(Color::Yellow)),
                Span::styled(" ", style),
            ])
        })
        .collect();
    let lines = if lines.is_empty() { vec![Line::styled(" nobody yet", dim())] } else { lines };
    frame.render_widget(Paragraph::new(lines), inner);
}

fn draw_messages(frame: &mut Frame<'_>, area: Rect, model: &Model, view: &mut View, now: Duration) {
    let title = model.room().map_or_else(|| " fulmar ".to_owned(), |room| format!(" {} ", room.title()));
    let mut block = Block::new()
        .borders(Borders::ALL)
        .border_type(BorderType::Rounded)
        .border_style(dim())
        .title(Span::styled(title, Style::new().add_modifier(Modifier::BOLD)));
    if let Some(typing) = model.typing_line(now) {
        block = block.title_bottom(Span::styled(format!(" {typing} … "), Style::new().fg(Color::Green)));
    }
    let inner = block.inner(area);
    let width = usize::from(inner.width);
    let lines = match model.room() {
        Some(room) => room_lines(model, room, width, view.offset_minutes),
        None => welcome_lines(model, width),
    };
    view.height = usize::from(inner.height);
    let newest = model.open.zip(model.room().and_then(Room::newest));
    if view.scroll > 0 && newest != view.newest && newest.map(|n| n.0) == view.newest.map(|n| n.0) {
        // Somebody reads what is older: it stays where it is.
        view.scroll += lines.len().saturating_sub(view.lines);
    }
    view.newest = newest;
    view.lines = lines.len();
    view.scroll = view.scroll.min(lines.len().saturating_sub(view.height));
    if view.scroll > 0 {
        let below = format!(" {} lines below, Esc goes there ", view.scroll);
        block = block.title_bottom(Line::styled(below, Style::new().fg(Color::Yellow)).right_aligned());
    }
    frame.render_widget(block, area);
    let end = lines.len() - view.scroll;
    let start = end.saturating_sub(view.height);
    // A short conversation stands at the bottom, above the line that is typed.
    let free = view.height.saturating_sub(end - start);
    let shown: Vec<Line<'_>> = std::iter::repeat_n(Line::default(), free)
        .chain(lines.into_iter().skip(start).take(end - start))
        .collect();
    frame.render_widget(Paragraph::new(shown), inner);
}

fn welcome_lines(model: &Model, width: usize) -> Vec<Line<'static>> {
    let mut lines = vec![
        Line::styled(
            format!("Hello {}.", super::model::printable(&model.me)),
            Style::new().add_modifier(Modifier::BOLD),
        ),
        Line::default(),
    ];
    for line in command::HELP {
        lines.push(Line::raw(*line));
    }
    lines.push(Line::default());
    // On a narrow screen there is no list beside this.
    for room in model.rooms.iter().take(5) {
        let unread = if room.unread > 0 { format!(" ({} unread)", room.unread) } else { String::new() };
        lines.push(Line::raw(fitted(&format!("Tab goes to {}{unread}", room.title()), width)));
    }
    for notice in &model.notices {
        lines.extend(wrapped(notice, width, 0).into_iter().map(|line| Line::styled(line, dim())));
    }
    lines
}

fn room_lines(model: &Model, room: &Room, width: usize, offset_minutes: i64) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let mut notices = room.notices.iter().peekable();
    let mut day = None;
    let notice_lines = |text: &str, lines: &mut Vec<Line<'static>>| {
        for line in wrapped(text, width.saturating_sub(2), 0) {
            lines.push(Line::styled(format!("  {line}"), dim()));
        }
    };
    if room.at_start && !room.entries.is_empty() {
        lines.push(Line::styled("the beginning", dim()).centered());
    }
    for (seq, entry) in
        room.entries.iter().filter(|(_, entry)| !(entry.created && room.class == ConversationClass::Direct))
    {
        while let Some((_, text)) = notices.next_if(|(after, _)| after.is_none_or(|after| after < *seq)) {
            notice_lines(text, &mut lines);
        }
        let local = local_minutes(entry.time, offset_minutes);
        let today = local.div_euclid(24 * 60);
        if day.replace(today) != Some(today) {
            lines.push(Line::styled(date(today), dim()).centered());
        }
        entry_lines(model, room, entry, entry.own.then(|| room.mark(*seq)), local, width, &mut lines);
    }
    for (_, text) in notices {
        notice_lines(text, &mut lines);
    }
    for pending in &room.pending {
        let mark = mark_of(pending.status);
        say_lines("you", own_style(), &pending.text, Some(mark), "     ", width, &mut lines);
    }
    lines
}

fn entry_lines(
    model: &Model,
    room: &Room,
    entry: &Entry,
    mark: Option<Mark>,
    local: i64,
    width: usize,
    lines: &mut Vec<Line<'static>>,
) {
    let clock = format!("{:02}:{:02}", local.rem_euclid(24 * 60) / 60, local.rem_euclid(60));
    let Some(sender) = entry.sender else {
        lines.push(Line::styled(format!("{clock} {}", fitted(&entry.text, width.saturating_sub(6))), dim()));
        return;
    };
    let (name, style) = match entry.own {
        true => ("you".to_owned(), own_style()),
        false => {
            let colour = usize::try_from(sender.get() % 6).ok().and_then(|at| COLOURS.get(at)).copied();
            let name = if room.class == ConversationClass::Direct && !room.name.is_empty() {
                room.title()
            } else {
                model.name_of(sender)
            };
            (name, Style::new().fg(colour.unwrap_or_default()).add_modifier(Modifier::BOLD))
        }
    };
    let mut text = entry.text.clone();
    if entry.edited {
        text.push_str(" (edited)");
    }
    for (_, reaction) in &entry.reactions {
        text.push_str(&format!("  [{reaction}]"));
    }
    say_lines(&name, style, &text, mark, &clock, width, lines);
}

/// One message: clock, name, text under itself, and the mark after its last word.
fn say_lines(
    name: &str,
    style: Style,
    text: &str,
    mark: Option<Mark>,
    clock: &str,
    width: usize,
    lines: &mut Vec<Line<'static>>,
) {
    let name = fitted(name, NAME_COLUMNS);
    let indent = clock.len() + 1 + width_of(&name) + 2;
    let sign = mark.map_or("", Mark::sign);
    // Room for the mark on every line, so that it never stands alone.
    let room = width.saturating_sub(indent + 3).max(8);
    let parts = wrapped(text, room, 0);
    let last = parts.len().saturating_sub(1);
    for (at, part) in parts.into_iter().enumerate() {
        let mut spans = match at {
            0 => vec![
                Span::styled(format!("{clock} "), dim()),
                Span::styled(name.clone(), style),
                Span::raw("  "),
            ],
            _ => vec![Span::raw(" ".repeat(indent))],
        };
        spans.push(Span::raw(part));
        if at == last && !sign.is_empty() {
            let colour = match mark {
                Some(Mark::Read) => Style::new().fg(Color::Green),
                Some(Mark::Failed) => Style::new().fg(Color::Red),
                _ => dim(),
            };
            spans.push(Span::styled(format!(" {sign}"), colour));
        }
        lines.push(Line::from(spans));
    }
}

fn draw_input(frame: &mut Frame<'_>, area: Rect, model: &Model, view: &View) {
    let title = match model.room() {
        Some(room) => format!(" to {} ", room.title()),
        None => " /with NAME begins a conversation ".to_owned(),
    };
    let block = Block::new().borders(Borders::ALL).border_type(BorderType::Rounded).title(title);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let width = usize::from(inner.width).saturating_sub(1);
    let (text, column) = view.input.window(width);
    frame.render_widget(Paragraph::new(text), inner);
    let column = u16::try_from(column).unwrap_or(u16::MAX);
    frame.set_cursor_position(Position::new(inner.x.saturating_add(column), inner.y));
}

fn draw_status(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let (good, connection) = model.connection_line();
    let colour = if good { Color::Green } else { Color::Yellow };
    let mut spans = vec![
        Span::styled(format!(" ● {connection}"), Style::new().fg(colour)),
        Span::styled(
            format!("  {}", super::model::printable(&model.me)),
            Style::new().add_modifier(Modifier::BOLD),
        ),
    ];
    match model.unread() {
        0 => {}
        unread => spans.push(Span::styled(format!("  {unread} unread"), Style::new().fg(Color::Yellow))),
    }
    let status = Line::from(spans);
    let left = usize::from(area.width).saturating_sub(status.width());
    frame.render_widget(Paragraph::new(status), area);
    // As many hints as there is room for, at the right.
    let marks = [Mark::Queued, Mark::Sent, Mark::Acked, Mark::Delivered];
    let marks: Vec<String> =
        marks.into_iter().map(|mark| format!("{} {}", mark.sign(), mark.word())).collect();
    let keys = "Tab next chat  PgUp older  /help  Ctrl-C leave ";
    let hints =
        [format!("{}   {keys}", marks.join("  ")), keys.to_owned(), "/help  Ctrl-C leave ".to_owned()];
    let hint = hints.into_iter().find(|hint| width_of(hint) + 2 <= left).unwrap_or_default();
    let right = Rect {
        x: area.right().saturating_sub(cells(width_of(&hint))),
        width: cells(width_of(&hint)),
        ..area
    };
    frame.render_widget(Paragraph::new(Line::styled(hint, dim())), right.intersection(area));
}

/// A width as the terminal counts it.
fn cells(width: usize) -> u16 {
    u16::try_from(width).unwrap_or(u16::MAX)
}

fn dim() -> Style {
    Style::new().fg(Color::DarkGray)
}

fn own_style() -> Style {
    Style::new().fg(Color::Green)
}

/// The line that is typed, cut at the cursor.
#[derive(Debug, Default)]
struct Input {
    left: String,
    right: String,
}

impl Input {
    fn text(&self) -> String {
        format!("{}{}", self.left, self.right)
    }

    fn is_empty(&self) -> bool {
        self.left.is_empty() && self.right.is_empty()
    }

    fn clear(&mut self) {
        self.left.clear();
        self.right.clear();
    }

    fn insert(&mut self, c: char) {
        if self.left.len() + self.right.len() + c.len_utf8() <= INPUT_MAX {
            self.left.push(c);
        }
    }

    fn backspace(&mut self) {
        let last = graphemes(&self.left).pop().map_or(0, |last| last.len());
        self.left.truncate(self.left.len() - last);
    }

    fn delete(&mut self) {
        let first = graphemes(&self.right).first().map_or(0, String::len);
        self.right.drain(..first);
    }

    fn delete_word(&mut self) {
        let kept = self.left.trim_end();
        let kept = kept.rfind(char::is_whitespace).map_or(0, |at| {
            at + kept.get(at..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8)
        });
        self.left.truncate(kept);
    }

    fn left(&mut self) {
        if let Some(last) = graphemes(&self.left).pop() {
            self.left.truncate(self.left.len() - last.len());
            self.right.insert_str(0, &last);
        }
    }

    fn right(&mut self) {
        if let Some(first) = graphemes(&self.right).first() {
            self.left.push_str(first);
            let len = first.len();
            self.right.drain(..len);
        }
    }

    fn home(&mut self) {
        self.right.insert_str(0, &self.left);
        self.left.clear();
    }

    fn end(&mut self) {
        self.left.push_str(&self.right);
        self.right.clear();
    }

    /// The part that fits into `width` columns with the cursor in it, and the cursor's column.
    fn window(&self, width: usize) -> (String, usize) {
        let mut shown = Vec::new();
        let mut column = 0;
        for grapheme in graphemes(&self.left).into_iter().rev() {
            let wide = width_of(&grapheme);
            if column + wide > width {
                break;
            }
            column += wide;
            shown.push(grapheme);
        }
        shown.reverse();
        let mut text = shown.concat();
        let mut used = column;
        for grapheme in graphemes(&self.right) {
            used += width_of(&grapheme);
            if used > width {
                break;
            }
            text.push_str(&grapheme);
        }
        (text, column)
    }
}

fn graphemes(text: &str) -> Vec<String> {
    Span::raw(text).styled_graphemes(Style::new()).map(|grapheme| grapheme.symbol.to_owned()).collect()
}

fn width_of(text: &str) -> usize {
    Span::raw(text).width()
}

/// The start of `text` that fits into `width` columns.
fn fitted(text: &str, width: usize) -> String {
    if width_of(text) <= width {
        return text.to_owned();
    }
    let mut kept = String::new();
    let mut used = 1;
    for grapheme in graphemes(text) {
        used += width_of(&grapheme);
        if used > width {
            break;
        }
        kept.push_str(&grapheme);
    }
    kept.push('…');
    kept
}

/// `text` in lines of at most `width` columns, broken between words where that is possible.
fn wrapped(text: &str, width: usize, first_used: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = Vec::new();
    let mut line = String::new();
    let mut used = first_used;
    for word in text.split_inclusive(' ') {
        let wide = width_of(word.trim_end());
        if used > 0 && used + wide > width {
            lines.push(std::mem::take(&mut line).trim_end().to_owned());
            used = 0;
        }
        if wide <= width {
            line.push_str(word);
            used += width_of(word);
            continue;
        }
        for grapheme in graphemes(word) {
            let wide = width_of(&grapheme);
            if used + wide > width && !line.is_empty() {
                lines.push(std::mem::take(&mut line));
                used = 0;
            }
            line.push_str(&grapheme);
            used += wide;
        }
    }
    lines.push(line.trim_end().to_owned());
    lines
}

/// Minutes since 1970 on the clock on the wall.
fn local_minutes(millis: u64, offset_minutes: i64) -> i64 {
    i64::try_from(millis / 60_000).unwrap_or(i64::MAX / 2) + offset_minutes
}

/// A day since 1970 as people write it.
fn date(day: i64) -> String {
    const WEEKDAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let weekday = usize::try_from(day.rem_euclid(7)).ok().and_then(|at| WEEKDAYS.get(at)).unwrap_or(&"");
    // Years begin in March here, so that the leap day is the last one; eras have 400 years.
    let shifted = day + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 2 } else { from_march - 10 };
    let year = year_of_era + era * 400 + i64::from(month < 2);
    let month = usize::try_from(month).ok().and_then(|at| MONTHS.get(at)).unwrap_or(&"");
    format!("{weekday} {day_of_month} {month} {year}")
}

/// What `date` says of the time zone; 0 when it can't be asked.
fn offset_minutes() -> i64 {
    let asked = std::process::Command::new("date").arg("+%z").output();
    let text =
        asked.map(|answer| String::from_utf8_lossy(&answer.stdout).trim().to_owned()).unwrap_or_default();
    read_offset(&text).unwrap_or(0)
}

/// `+0530` as minutes.
fn read_offset(text: &str) -> Option<i64> {
    let (sign, digits) = text.split_at_checked(1)?;
    let hours: i64 = digits.get(..2)?.parse().ok()?;
    let minutes: i64 = digits.get(2..)?.parse().ok()?;
    let whole = hours * 60 + minutes;
    match sign {
        "+" => Some(whole),
        "-" => Some(-whole),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use fulmar_client::{ConnectionState, SendStatus};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::Pending;
    use super::*;

    fn shown(model: &Model, view: &mut View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, view, Duration::ZERO)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn a_screen_has_it_all_and_fits_any_size() {
        let mut model = Model::new("alice");
        model.connection = Some(ConnectionState::Live);
        let bob = model.named("bob", ConversationClass::Direct);
        let team = model.named("team", ConversationClass::Group);
        model.open = Some(bob);
        model.rooms[team].unread = 3;
        model.rooms[bob].pending.push(Pending {
            id: 1,
            text: "a long message that needs more than one line on a narrow screen".to_owned(),
            status: SendStatus::Queued,
        });
        let mut view = View::default();
        "hello".chars().for_each(|c| view.input.insert(c));
        let screen = shown(&model, &mut view, 80, 20);
        for part in ["chats", "bob", "#team", " 3 ", "to bob", "hello", "● online", "alice", "you", "…"] {
            assert!(screen.contains(part), "{part:?} is not on\n{screen}");
        }
        for (width, height) in [(1, 1), (2, 3), (10, 5), (30, 7), (63, 10), (64, 10), (300, 80)] {
            shown(&model, &mut view, width, height);
        }
        model.open = None;
        assert!(shown(&model, &mut view, 80, 30).contains("/with NAME"));
    }

    #[test]
    fn the_line_is_edited_by_what_people_see_as_characters() {
        let mut input = Input::default();
        "aé👩‍👩‍👧 b".chars().for_each(|c| input.insert(c));
        input.left();
        input.left();
        input.backspace();
        assert_eq!(input.text(), "aé b");
        input.end();
        input.delete_word();
        assert_eq!(input.text(), "aé ");
        input.home();
        input.delete();
        assert_eq!(input.text(), "é ");
        input.right();
        assert_eq!(input.window(10), ("é ".to_owned(), 1));
        input.clear();
        "日本語".chars().for_each(|c| input.insert(c));
        assert_eq!(input.window(5), ("本語".to_owned(), 4));
    }

    #[test]
    fn text_is_wrapped_between_words_or_within_long_ones() {
        assert_eq!(wrapped("one two three", 7, 0), ["one two", "three"]);
        assert_eq!(wrapped("abcdefghij", 4, 0), ["abcd", "efgh", "ij"]);
        assert_eq!(wrapped("日本語", 4, 0), ["日本", "語"]);
        assert_eq!(wrapped("", 4, 0), [""]);
        for width in 1..20 {
            let text = "a bb ccc dddd eeeee 日本 ffffff";
            let lines = wrapped(text, width, 0);
            assert!(lines.iter().all(|line| width_of(line) <= width.max(2)), "{width}: {lines:?}");
            let letters = |text: &str| text.chars().filter(|c| *c != ' ').collect::<String>();
            assert_eq!(letters(&lines.concat()), letters(text));
        }
        assert_eq!(fitted("bob", 3), "bob");
        assert_eq!(fitted("robert", 4), "rob…");
    }

    #[test]
    fn days_have_names() {
        for (day, want) in [
            (0, "Thu 1 January 1970"),
            (19_782, "Thu 29 February 2024"),
            (20_778, "Sat 21 November 2026"),
            (-1, "Wed 31 December 1969"),
        ] {
            assert_eq!(date(day), want);
        }
        for (text, want) in
            [("+0530", Some(330)), ("-0800", Some(-480)), ("", None), ("0530", None), ("+xx", None)]
        {
            assert_eq!(read_offset(text), want);
        }
    }
}

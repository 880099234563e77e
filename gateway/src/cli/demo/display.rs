//! Progress while it runs, on standard error: one line that changes on a terminal, a line every few seconds elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::board::Board;
use crate::cli::rehearsal::{grouped, number};

const ON_TERMINAL: Duration = Duration::from_millis(150);
const ELSEWHERE: Duration = Duration::from_secs(5);

/// Characters of the bar.
const BAR: usize = 24;

/// Shows progress until it is dropped.
#[derive(Debug)]
pub(super) struct Display {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
    terminal: bool,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    board: Arc<Board>,
    lines: usize,
    deliveries: usize,
    /// What is going on.
    stage: Mutex<String>,
}

impl Display {
    /// Starts to show what `board` counts.
    pub(super) fn start(board: &Arc<Board>, lines: usize, deliveries: usize) -> Self {
        let shared = Arc::new(Shared {
            started: Instant::now(),
            board: Arc::clone(board),
            lines,
            deliveries,
            stage: Mutex::default(),
        });
        let terminal = io::stderr().is_terminal();
        let task = tokio::spawn(show(Arc::clone(&shared), terminal));
        Self { shared, task, terminal }
    }

    /// Something else is going on now. Elsewhere than on a terminal it is a line of its own.
    pub(super) fn stage(&self, what: impl Into<String>) {
        let what = what.into();
        if !self.terminal {
            eprintln!("{:6.1} s  {what}", self.shared.started.elapsed().as_secs_f64());
        }
        *self.shared.stage.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.task.abort();
        if self.terminal {
            clear();
        }
    }
}

async fn show(shared: Arc<Shared>, terminal: bool) {
    let mut ticks = interval(if terminal { ON_TERMINAL } else { ELSEWHERE });
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let seconds = shared.started.elapsed().as_secs_f64();
        let figures = shared.figures();
        if !terminal {
            eprintln!("{seconds:6.1} s  {figures}");
            continue;
        }
        let stage = shared.stage.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let line = format!("{seconds:4.0} s {} {stage}: {figures}", shared.bar());
        let width = crossterm::terminal::size().map_or(80, |(columns, _)| usize::from(columns));
        let line: String = line.chars().take(width.saturating_sub(1)).collect();
        let mut out = io::stderr().lock();
        // A terminal that went away is no reason to end the run.
        let _ = write!(out, "\r\x1b[2K{line}").and_then(|()| out.flush());
    }
}

fn clear() {
    let mut out = io::stderr().lock();
    let _ = write!(out, "\r\x1b[2K").and_then(|()| out.flush());
}

impl Shared {
    fn figures(&self) -> String {
        let count = |count: &std::sync::atomic::AtomicUsize| grouped(number(count.load(Ordering::Relaxed)));
        let counts = &self.board.counts;
        format!(
            "{} of {} sent, {} acked, {} of {} delivered, {} phones online",
            count(&counts.sent),
            grouped(number(self.lines)),
            count(&counts.acked),
            count(&counts.delivered),
            grouped(number(self.deliveries)),
            count(&counts.online),
        )
    }

    fn bar(&self) -> String {
        let delivered = self.board.counts.delivered.load(Ordering::Relaxed);
        let full = (delivered.saturating_mul(BAR) / self.deliveries.max(1)).min(BAR);
        format!("[{}{}]", "=".repeat(full), " ".repeat(BAR - full))
    }
}

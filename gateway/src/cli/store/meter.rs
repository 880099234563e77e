//! Progress on standard error: one line that changes on a terminal, a line every few seconds elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use fulmar_store::Progress;

use super::words::bytes;

const ON_TERMINAL: Duration = Duration::from_millis(150);
const ELSEWHERE: Duration = Duration::from_secs(5);

/// Characters of the bar.
const BAR: u64 = 24;

/// Shows how far a work has come, until it is dropped.
#[derive(Debug)]
pub(super) struct Meter {
    started: Instant,
    told: Instant,
    terminal: bool,
    shown: bool,
}

impl Meter {
    pub(super) fn start() -> Self {
        let now = Instant::now();
        Self { started: now, told: now, terminal: io::stderr().is_terminal(), shown: false }
    }

    /// How long it has run.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes note, and shows it if it is time to.
    pub(super) fn update(&mut self, progress: Progress) {
        let now = Instant::now();
        if now.saturating_duration_since(self.told) < if self.terminal { ON_TERMINAL } else { ELSEWHERE } {
            return;
        }
        self.told = now;
        let seconds = now.saturating_duration_since(self.started).as_secs_f64();
        if !self.terminal {
            eprintln!("{seconds:6.1} s  {}", line(&progress));
            return;
        }
        let text = format!("{seconds:4.0} s {} {}", bar(&progress), line(&progress));
        let width = crossterm::terminal::size().map_or(80, |(columns, _)| usize::from(columns));
        let text: String = text.chars().take(width.saturating_sub(1)).collect();
        let mut out = io::stderr().lock();
        // A terminal that went away is no reason to end the work.
        let _ = write!(out, "\r\x1b[2K{text}").and_then(|()| out.flush());
        self.shown = true;
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.shown {
            let mut out = io::stderr().lock();
            let _ = write!(out, "\r\x1b[2K").and_then(|()| out.flush());
        }
    }
}

/// Hundredths that are done.
fn percent(progress: &Progress) -> u64 {
    let hundredths = u128::from(progress.done) * 100 / u128::from(progress.of.max(1));
    u64::try_from(hundredths).unwrap_or(100).min(100)
}

fn line(progress: &Progress) -> String {
    let Progress { shard, doing, done, of } = progress;
    if *of == 0 {
        return format!("shard {shard}: {doing}");
    }
    format!("shard {shard}: {doing}, {} % ({} of {})", percent(progress), bytes(*done), bytes(*of))
}

fn bar(progress: &Progress) -> String {
    let full = BAR * percent(progress) / 100;
    (0..BAR).map(|at| if at < full { '█' } else { '░' }).collect()
}

#[cfg(test)]
mod tests {
    use fulmar_protocol::id::ShardId;

    use super::*;

    #[test]
    fn progress_is_a_line_whatever_the_numbers() {
        let of = |done, of| Progress { shard: ShardId::new(3).unwrap(), doing: "exporting", done, of };
        assert_eq!(line(&of(1 << 20, 4 << 20)), "shard 3: exporting, 25 % (1.0 MiB of 4.0 MiB)");
        assert_eq!(line(&of(0, 0)), "shard 3: exporting");
        assert_eq!(percent(&of(u64::MAX, 1)), 100);
        assert_eq!(bar(&of(1, 2)), "████████████░░░░░░░░░░░░");
        assert_eq!(bar(&of(9, 2)).chars().filter(|c| *c == '█').count(), 24);
    }
}

//! The event log of a world: one line for everything that happened, and a hash over all of them.
//!
//! - Equal worlds give equal bytes. The hash is always kept; the lines only where somebody wants to read them.
//!
//! Not here: what is worth a line (`network`, `world`).

use std::fmt::{self, Write as _};

use fulmar_badnet::SimTime;
use xxhash_rust::xxh3::Xxh3Default;

/// Lines a kept log may hold; later ones only count and enter the hash.
const LINES_MAX: usize = 5_000_000;

/// See the module's text.
pub(crate) struct Log {
    hash: Xxh3Default,
    count: u64,
    line: String,
    lines: Option<Vec<u8>>,
}

impl Log {
    /// An empty log that keeps its lines or not.
    pub(crate) fn new(keep: bool) -> Self {
        Self { hash: Xxh3Default::new(), count: 0, line: String::new(), lines: keep.then(Vec::new) }
    }

    /// Adds a line.
    pub(crate) fn line(&mut self, at: SimTime, what: fmt::Arguments<'_>) {
        self.line.clear();
        // A string takes everything.
        let _ = writeln!(
            self.line,
            "{}.{:09} {what}",
            at.as_nanos() / 1_000_000_000,
            at.as_nanos() % 1_000_000_000
        );
        self.hash.update(self.line.as_bytes());
        self.count += 1;
        if let Some(lines) = &mut self.lines
            && self.count <= LINES_MAX as u64
        {
            lines.extend_from_slice(self.line.as_bytes());
        }
    }

    /// How many lines, their hash, and the lines themselves if they were kept.
    pub(crate) fn close(self) -> (u64, u64, Option<Vec<u8>>) {
        (self.count, self.hash.digest(), self.lines)
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("count", &self.count).finish_non_exhaustive()
    }
}

//! The command line of every bench.

use std::path::PathBuf;

use clap::Parser;

/// Flags of a bench: `cargo bench -p fulmar-benches --bench NAME -- [FLAGS]`.
#[derive(Clone, Debug, Parser)]
pub struct Flags {
    /// A few seconds instead of the whole measurement
    #[arg(long)]
    pub quick: bool,
    /// Write the figures to this file as well
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Seed of the workload
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Folder on the disk to measure; the system's temporary folder unless named
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Cargo says so to every bench
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Flags {
    /// Reads the process's arguments; prints help or what is wrong and ends the process.
    #[must_use]
    pub fn read() -> Self {
        Self::parse()
    }

    /// A fresh folder that is removed in the end.
    ///
    /// # Errors
    /// It can't be made.
    pub fn fresh_folder(&self) -> std::io::Result<tempfile::TempDir> {
        match &self.folder {
            Some(folder) => tempfile::tempdir_in(folder),
            None => tempfile::tempdir(),
        }
    }

    /// `full`, or `quick` when that was asked for.
    #[must_use]
    pub const fn pick(&self, full: u64, quick: u64) -> u64 {
        if self.quick { quick } else { full }
    }
}

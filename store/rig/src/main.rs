//! `store-rig`: power cuts, kills and damage for the store. See `store-rig --help`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use fulmar_store_rig::{
    damage::{self, Damage, Look},
    kill::{self, Kill},
    power::{self, PowerCut},
    prove::{self, Prove},
    work::{self, Work},
};

/// Power cuts, kills and damaged disks for the store.
///
/// Each command ends with a line `N passed, N failed` and the exit status 0 only if nothing failed.
#[derive(Debug, Parser)]
#[command(name = "store-rig")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Record a store at work, cut the power at any point, and open what the disk may hold then
    PowerCut(PowerCut),
    /// Kill a process at work, and while it opens what a kill left, and compare what it leaves with what was acknowledged
    Kill(Kill),
    /// Damage one file of a folder, open it, read everything: right, or refused, never wrong
    Damage(Damage),
    /// Plant a fault for each rig, and see that it is found
    Prove(Prove),
    /// Look at a damaged folder (started by `damage`)
    #[command(hide = true)]
    Look(Look),
    /// The work that is recorded or killed (started by the other commands)
    #[command(hide = true)]
    Work(Work),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::PowerCut(ask) => {
            silence_panics();
            power::run(&ask).map(Some)
        }
        Command::Kill(ask) => {
            silence_panics();
            kill::run(&ask).map(Some)
        }
        Command::Prove(ask) => {
            silence_panics();
            prove::run(&ask).map(Some)
        }
        Command::Damage(ask) => {
            silence_panics();
            damage::run(&ask).map(Some)
        }
        Command::Look(ask) => damage::look(&ask).map(|line| {
            print(&line);
            None
        }),
        Command::Work(ask) => work::work(&ask).map(|()| None),
    };
    match result {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(outcome)) => {
            print(&format!("{} passed, {} failed", outcome.passed, outcome.failed));
            if outcome.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// An engine may panic on what it finds; that is told as the failure of the image, not in between.
fn silence_panics() {
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|_| ()));
    }
}

#[expect(clippy::print_stdout, reason = "the one line that is the result")]
fn print(text: &str) {
    println!("{text}");
}

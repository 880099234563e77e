//! `client-rig`: the SDK killed again and again at work. See `client-rig --help`.
//!
//! - [`work`] is the app that is killed: it queues, cancels and receives, and writes down what it was told ([`log`]).
//! - [`kill`] starts it, kills it, and starts it again, with a real gateway, a bad network between them ([`gateway`]) and
//!   a peer that is left alone ([`peer`]).
//! - [`evidence`] makes one history of what all of them wrote down, for `fulmar_badnet::checker` to judge.
//! - [`plant`] breaks a promise on purpose; the rig has to notice.

mod evidence;
mod gateway;
mod kill;
mod log;
mod peer;
mod plant;
mod work;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The SDK killed again and again at work, over a bad network.
///
/// Each command ends with a line `N passed, N failed` and the exit status 0 only if nothing failed.
#[derive(Debug, Parser)]
#[command(name = "client-rig")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Kill apps that send and receive; at the end everything that was promised must have come true
    Kill(kill::Kill),
    /// Plant each fault, and see that it is found
    Prove(kill::Prove),
    /// The app that is killed (started by the other commands)
    #[command(hide = true)]
    Work(work::Work),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Kill(ask) => kill::run(&ask).map(Some),
        Command::Prove(ask) => kill::prove(&ask).map(Some),
        Command::Work(ask) => work::run(ask).map(|()| None),
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

#[expect(clippy::print_stdout, reason = "the one line that is the result")]
fn print(text: &str) {
    println!("{text}");
}

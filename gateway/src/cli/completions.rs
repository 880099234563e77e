//! `fulmar completions`: what a shell wants to know.

use std::process::ExitCode;

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

const EXAMPLES: &str = "\
Examples:
  fulmar completions bash > /etc/bash_completion.d/fulmar
  fulmar completions zsh > ~/.zfunc/_fulmar
  fulmar completions fish > ~/.config/fish/completions/fulmar.fish";

/// Flags of `fulmar completions`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: Shell,
}

/// Prints the completions.
///
/// # Errors
/// Standard output can't be written.
pub fn run(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "fulmar", &mut script);
    super::answer(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

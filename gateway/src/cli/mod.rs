//! The command line of the binary `fulmar`.
//!
//! - Answers go to standard output, everything else to standard error.
//! - A failure is one line that says what to do; the exit code says whose turn it is.
//!
//! Not here: what the commands do beyond reading their flags.

pub mod chat;
pub mod completions;
pub mod demo;
pub mod inspect;
mod rehearsal;
pub mod serve;
pub mod store;
pub mod token;
pub mod weak;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Assignment, Config, ConfigError};

const EXAMPLES: &str = "\
Examples:
  fulmar serve                                a gateway, data in ./fulmar-data
  fulmar token --user alice                   a token for it
  fulmar serve --print-config > fulmar.toml   every setting, documented
  fulmar inspect 04 26 01 02 00               what do these bytes say?
  fulmar store backup /backup/fulmar          a copy of the data, while it runs

Environment:
  FULMAR_<SECTION>_<KEY>   any setting, such as FULMAR_LISTEN_ADDRESS=[::]:443
  FULMAR_CONFIG            configuration file

Exit codes:
  0   done
  1   failed; the line on standard error says why and what to do
  2   wrong flags or configuration
  3   a gateway was ended before it had finished leaving: by a second signal,
      or at the drain's deadline; of `fulmar store`: damage was found";

/// A realtime messaging gateway for phones on bad networks: QUIC in front, every message in a log on local disk.
#[derive(Debug, Parser)]
#[command(name = "fulmar", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the binary can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the gateway
    Serve(serve::ServeArgs),
    /// The main job in one command: phones on a bad network, kill -9 in the middle, everything checked
    Demo(demo::DemoArgs),
    /// Weak networks with names, played one after the other, measured, checked and drawn
    Weak(weak::WeakArgs),
    /// Chat on this terminal
    Chat(chat::ChatArgs),
    /// Make a development token, and print it
    Token(token::TokenArgs),
    /// Say what frames the given bytes are
    Inspect(inspect::InspectArgs),
    /// Look after the data folder: figures, proof, backup, export, repair
    Store(store::StoreArgs),
    /// Print completions for a shell
    Completions(completions::CompletionsArgs),
}

/// Flags that find the configuration.
#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArgs {
    /// Configuration file [default: fulmar.toml in the data folder, if there is one]
    #[arg(short, long, value_name = "FILE", env = "FULMAR_CONFIG", help_heading = "Configuration")]
    pub config: Option<PathBuf>,
    /// Data folder, instead of data.path [default: fulmar-data] [env: FULMAR_DATA_PATH]
    #[arg(short, long, value_name = "DIR", help_heading = "Configuration")]
    pub data: Option<PathBuf>,
    /// Set anything, such as --set fanout.ring_frames=512; may be repeated
    #[arg(long, value_name = "SECTION.KEY=VALUE", help_heading = "Configuration")]
    pub set: Vec<String>,
}

impl ConfigArgs {
    /// Reads the configuration; `more` are further flags of the command that stand for settings.
    ///
    /// # Errors
    /// One line that says which value will not do.
    pub fn load(&self, more: Vec<Assignment>) -> Result<Config, ConfigError> {
        let mut flags = self.set.iter().map(|text| Assignment::set(text)).collect::<Result<Vec<_>, _>>()?;
        if let Some(path) = &self.data {
            flags.push(Assignment::flag("--data", "data", "path", path.display().to_string()));
        }
        flags.extend(more);
        Config::load(self.config.as_deref(), &flags)
    }
}

/// Runs the command that the arguments name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are answers; clap knows which of its errors are.
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    let done = match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Weak(args) => weak::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Token(args) => token::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Store(args) => store::run(&args),
        Command::Completions(args) => completions::run(&args),
    };
    match done {
        Ok(code) => code,
        // Whoever read our output has heard enough.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fulmar: {}", in_one_line(&e));
            ExitCode::from(if e.is::<ConfigError>() { 2 } else { 1 })
        }
    }
}

fn in_one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Writes an answer to standard output.
pub(crate) fn answer(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_flag_gets_a_suggestion() {
        for (arguments, want) in [
            (&["fulmar", "serv"][..], "'serve'"),
            (&["fulmar", "serve", "--liste", "x"], "'--listen'"),
            (&["fulmar", "token", "--usr", "alice"], "'--user'"),
        ] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(want), "{error}");
        }
    }

    #[test]
    fn errors_are_one_line() {
        let error = anyhow::anyhow!("inner\n  detail").context("outer");
        assert_eq!(in_one_line(&error), "outer: inner detail");
    }

    #[test]
    fn flags_become_settings() {
        let folder = tempfile::tempdir().unwrap();
        let args = ConfigArgs {
            data: Some(folder.path().to_owned()),
            set: vec!["data.reserve_mib=99".to_owned()],
            config: None,
        };
        let config =
            args.load(vec![Assignment::flag("--listen", "listen", "address", "127.0.0.1:0")]).unwrap();
        assert_eq!((config.data.path.as_path(), config.data.reserve_mib), (folder.path(), 99));
        assert_eq!(config.listen.address.port(), 0);
        let error = args.load(vec![Assignment::flag("--listen", "listen", "address", "here")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "flag --listen: listen.address = \"here\": expected an address and port, such as \"0.0.0.0:4433\" or \
             \"[::]:4433\""
        );
    }
}

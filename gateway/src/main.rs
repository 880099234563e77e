//! The binary `fulmar`: see `fulmar --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    fulmar_gateway::cli::run(std::env::args_os())
}

//! Servers in processes of their own, so that the kernel accounts their CPU apart from the clients'.
//!
//! A bench is started again with a first argument that says what to be: the gateway (`fulmar serve`, the same entry
//! point as the binary) or a floor's server.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::Context as _;

use crate::{bare, meter};

const GATEWAY: &str = "as-gateway";
const BARE: &str = "as-bare-server";

/// Plays the server this process was started as; `None`: it is the bench itself. Call it first in `main`.
#[must_use]
pub fn play() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next()?.to_str()? {
        GATEWAY => {
            let line = ["fulmar", "serve"].into_iter().map(OsString::from).chain(arguments);
            Some(fulmar_gateway::cli::run(line))
        }
        BARE => Some(match bare::serve(Path::new(&arguments.next()?)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bare server: {error:#}");
                ExitCode::FAILURE
            }
        }),
        _ => None,
    }
}

/// A server in a process of its own; it ends with this value.
#[derive(Debug)]
pub struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    /// Starts `fulmar serve` on loopback with its data in `folder`, everything else at its default.
    ///
    /// # Errors
    /// It did not come up.
    pub fn gateway(folder: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([GATEWAY, "--listen", "127.0.0.1:0", "--http", "off", "--data"]).arg(folder);
        Self::start(command.stdout(Stdio::null()).stderr(Stdio::piped()))
    }

    /// Starts the floor's server with its certificate in `folder`.
    ///
    /// # Errors
    /// It did not come up.
    pub fn bare(folder: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(BARE).arg(folder);
        Self::start(command.stdout(Stdio::null()).stderr(Stdio::piped()))
    }

    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command.stdin(Stdio::null()).spawn().context("the server can't be started")?;
        let mut lines = BufReader::new(child.stderr.take().context("no pipe")?).lines();
        let mut said = String::new();
        let found = lines.by_ref().map_while(Result::ok).find_map(|line| {
            said.push_str(&line);
            said.push('\n');
            // "  Clients      127.0.0.1:4433 (QUIC, UDP)"
            line.trim().strip_prefix("Clients")?.split_whitespace().next()?.parse().ok()
        });
        // Who does not read its complaints would block it.
        std::thread::spawn(move || {
            for line in
                lines.map_while(Result::ok).filter(|line| line.contains("WARN") || line.contains("ERROR"))
            {
                eprintln!("server: {line}");
            }
        });
        let Some(address) = found else {
            let _ = child.kill();
            let _ = child.wait();
            anyhow::bail!("the server did not come up:\n{said}");
        };
        Ok(Self { child, address })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// CPU it has used so far.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu(&self) -> std::io::Result<Duration> {
        meter::cpu_of(self.child.id())
    }

    /// Memory it has now, bytes.
    ///
    /// # Errors
    /// It is gone.
    pub fn resident(&self) -> std::io::Result<u64> {
        meter::resident_of(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The gateway that is measured: started here, in a process of its own, or one that is there; and what the kernel says of it.

use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};
use fulmar_benches::meter;

/// A gateway, and its process if that is on this machine and known.
#[derive(Debug)]
pub(crate) struct Server {
    child: Option<Child>,
    process: Option<u32>,
    address: SocketAddr,
}

/// What the kernel has counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reading {
    /// CPU the gateway has used; zero if its process is not known.
    pub(crate) cpu: Duration,
    /// Memory it has, bytes.
    pub(crate) resident: u64,
    /// UDP packets that left any process of this network namespace, the phones' included. What leaves as one system call counts
    /// as one.
    pub(crate) packets: u64,
    /// Packets dropped at full sockets.
    pub(crate) dropped: u64,
}

impl Server {
    /// Starts `fulmar serve` with its data in `folder`, and waits until it listens.
    ///
    /// # Errors
    /// It did not come up; what it said is in the error.
    pub(crate) fn start(
        program: Option<&Path>,
        folder: &Path,
        config: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let program = match program {
            Some(program) => program.to_path_buf(),
            None => beside_us()?,
        };
        let mut command = Command::new(&program);
        command.args(["serve", "--listen", "127.0.0.1:0", "--http", "off", "--data"]).arg(folder);
        if let Some(config) = config {
            command.args([OsString::from("--config"), config.into()]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("{} can't be started", program.display()))?;
        let mut lines = BufReader::new(child.stderr.take().context("no pipe")?).lines();
        let mut said = String::new();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
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
                eprintln!("gateway: {line}");
            }
        });
        let process = Some(child.id());
        match address {
            Some(address) => Ok(Self { child: Some(child), process, address }),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("the gateway did not come up:\n{said}")
            }
        }
    }

    /// One that runs already.
    pub(crate) const fn at(address: SocketAddr, process: Option<u32>) -> Self {
        Self { child: None, process, address }
    }

    /// Where it listens.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the kernel says now.
    ///
    /// # Errors
    /// The gateway's process is gone.
    pub(crate) fn read(&self) -> anyhow::Result<Reading> {
        let (cpu, resident) = match self.process {
            Some(process) => (
                meter::cpu_of(process).context("the gateway is gone")?,
                meter::resident_of(process).context("the gateway is gone")?,
            ),
            None => (Duration::ZERO, 0),
        };
        let (packets, dropped) = udp_counters().unwrap_or_default();
        Ok(Reading { cpu, resident, packets, dropped })
    }

    /// Whether its process is known, so that CPU and memory are.
    pub(crate) const fn is_known(&self) -> bool {
        self.process.is_some()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The gateway's program, which is built into the same folder as this one.
fn beside_us() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("fulmar");
    if program.is_file() {
        return Ok(program);
    }
    bail!(
        "{} is not there: build the gateway the same way (cargo build --release --bin fulmar), or name it with --gateway",
        program.display()
    )
}

/// Packets out, and packets dropped at full sockets (in or out).
fn udp_counters() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/net/snmp").ok()?;
    counters(&text)
}

fn counters(text: &str) -> Option<(u64, u64)> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let names = lines.next()?;
    let values = lines.next()?;
    let value = |name: &str| {
        let at = names.split_whitespace().position(|known| known == name)?;
        values.split_whitespace().nth(at)?.parse::<u64>().ok()
    };
    Some((value("OutDatagrams")?, value("RcvbufErrors")? + value("SndbufErrors")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = "Tcp: A B\nTcp: 1 2\nUdp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors\nUdp: 9 8 7 6 5 4\n";
        assert_eq!(counters(text), Some((6, 9)));
        assert_eq!(counters("Udp: x\n"), None);
    }

    #[test]
    fn a_gateway_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Server::start(Some(Path::new("/no/such/program")), folder.path(), None).unwrap_err();
        assert!(format!("{error:#}").contains("/no/such/program"));
    }

    #[test]
    fn a_program_that_ends_at_once_is_told_with_its_words() {
        let folder = tempfile::tempdir().unwrap();
        let error = Server::start(Some(Path::new("/bin/false")), folder.path(), None).unwrap_err();
        assert!(format!("{error:#}").contains("did not come up"), "{error:#}");
    }
}

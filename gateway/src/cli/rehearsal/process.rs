//! The gateway as a process of its own: started, killed with SIGKILL, started again.
//!
//! - It is this same program, with `serve`, on loopback, in a data folder of its own; variables of the environment
//!   that configure a gateway do not reach it.
//! - It never outlives its handle: dropping that kills it and waits for it.
//! - It stands in a process group of its own: Ctrl-C at the terminal is for us.
//! - Its words go to a file; the last ones are shown when it fails.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// How long a start may take, recovery of the log included.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to leave when asked to; then it is killed.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often we look whether it is there, or gone.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Ports that are tried. Below the range that systems hand out by themselves: while the gateway is dead, no phone's
/// new socket may take its port.
const PORTS: std::ops::Range<u16> = 15_000..30_000;

/// Bytes of its last words that are shown.
const LAST_WORDS_BYTES: u64 = 2_000;

/// A gateway process, or the place where one was.
#[derive(Debug)]
pub(in crate::cli) struct GatewayProcess {
    program: PathBuf,
    data: PathBuf,
    log: PathBuf,
    address: SocketAddr,
    pages: SocketAddr,
    child: Option<Child>,
}

impl GatewayProcess {
    /// Starts one in `data` and waits until it is ready.
    ///
    /// # Errors
    /// What failed, with its last words.
    pub(in crate::cli) async fn start(data: &Path, log: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("the path of this program can't be found")?;
        let mut gateway = Self {
            program,
            data: data.to_owned(),
            log: log.to_owned(),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            pages: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            child: None,
        };
        let [address, pages] = free_ports()?;
        gateway.address = address;
        gateway.pages = pages;
        gateway.launch().await?;
        Ok(gateway)
    }

    /// Where it listens for QUIC.
    pub(in crate::cli) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Kills it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// It had ended by itself before, or can't be killed.
    pub(in crate::cli) async fn kill(&mut self) -> anyhow::Result<()> {
        self.still_runs()?;
        if let Some(child) = &mut self.child {
            child.kill().context("the gateway can't be killed")?;
        }
        self.gone(Instant::now() + LEAVE_TIMEOUT).await?.context("the killed gateway is still there")?;
        Ok(())
    }

    /// Starts it again, on the same ports and data folder, and waits until it is ready.
    ///
    /// # Errors
    /// What failed, with its last words.
    pub(in crate::cli) async fn launch(&mut self) -> anyhow::Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("{} can't be written", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command
            .arg("serve")
            .arg("--data")
            .arg(&self.data)
            .arg("--listen")
            .arg(self.address.to_string())
            .arg("--http")
            .arg(self.pages.to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("the gateway's log can't be shared")?)
            .stderr(log)
            .process_group(0);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FULMAR_") {
                command.env_remove(name);
            }
        }
        let child =
            command.spawn().with_context(|| format!("{} can't be started", self.program.display()))?;
        self.child = Some(child);
        let until = Instant::now() + START_TIMEOUT;
        while !is_ready(self.pages).await {
            self.still_runs()?;
            if Instant::now() >= until {
                let limit = START_TIMEOUT.as_secs();
                bail!("the gateway was not ready after {limit} s{}", self.last_words());
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Fails when it has ended.
    ///
    /// # Errors
    /// How it ended, with its last words.
    pub(in crate::cli) fn still_runs(&mut self) -> anyhow::Result<()> {
        let ended = match &mut self.child {
            Some(child) => child.try_wait().context("the gateway can't be watched")?,
            None => return Err(anyhow!("the gateway is not running")),
        };
        match ended {
            None => Ok(()),
            Some(status) => {
                self.child = None;
                bail!("the gateway ended by itself ({status}){}", self.last_words())
            }
        }
    }

    /// Asks it to leave, and kills it when it does not.
    pub(in crate::cli) async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(child) = &self.child {
            let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
            let pid = pid.context("the gateway has no process number")?;
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)
                .context("the gateway can't be asked to leave")?;
            // Whoever does not leave in time is killed by the drop.
            self.gone(Instant::now() + LEAVE_TIMEOUT).await?;
        }
        Ok(())
    }

    async fn gone(&mut self, until: Instant) -> anyhow::Result<Option<ExitStatus>> {
        while let Some(child) = &mut self.child {
            if let Some(status) = child.try_wait().context("the gateway can't be watched")? {
                self.child = None;
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                break;
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(None)
    }

    fn last_words(&self) -> String {
        match tail(&self.log) {
            Ok(words) if !words.is_empty() => format!("; its last words: {words}"),
            _ => String::new(),
        }
    }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may be gone already; then there is nothing to kill.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The last whole lines of a file, in one.
fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let end = file.seek(SeekFrom::End(0))?;
    let start = end.saturating_sub(LAST_WORDS_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LAST_WORDS_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole =
        if start == 0 { &text[..] } else { text.split_once('\n').map_or(&text[..], |(_, rest)| rest) };
    let mut last: Vec<&str> = whole.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
    last.reverse();
    Ok(last.join(" | "))
}

/// A port for QUIC and one for the pages that nobody uses now.
fn free_ports() -> anyhow::Result<[SocketAddr; 2]> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| anyhow!("the system gives no random numbers: {error}"))?;
    let mut rng = fulmar_badnet::Rng::new(u64::from_le_bytes(random));
    for _ in 0..200 {
        let port = rng.between(PORTS.start.into(), u64::from(PORTS.end) - 2);
        let Ok(port) = u16::try_from(port) else { continue };
        let [quic, pages] = [port, port + 1].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        if UdpSocket::bind(quic).is_ok() && TcpListener::bind(pages).is_ok() {
            return Ok([quic, pages]);
        }
    }
    bail!("no two free ports between {} and {} on 127.0.0.1", PORTS.start, PORTS.end)
}

/// Whether `/readyz` says yes.
async fn is_ready(pages: SocketAddr) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(pages).await?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        std::io::Result::Ok(head.ends_with(b" 200"))
    };
    matches!(timeout(Duration::from_secs(2), ask).await, Ok(Ok(true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "").unwrap();
        assert_eq!(tail(&path).unwrap(), "");
        std::fs::write(&path, "one\n\ntwo\nthree\nfour\n").unwrap();
        assert_eq!(tail(&path).unwrap(), "two | three | four");
        std::fs::write(&path, format!("{}\nlast", "x".repeat(5_000))).unwrap();
        assert_eq!(tail(&path).unwrap(), "last");
    }

    #[tokio::test]
    async fn only_a_yes_is_ready() {
        for (answer, want) in
            [("HTTP/1.1 200 OK\r\n\r\n", true), ("HTTP/1.1 503 No\r\n\r\n", false), ("HTT", false)]
        {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let serving = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 16];
                stream.read_exact(&mut request).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
            assert_eq!(is_ready(address).await, want, "{answer}");
            serving.await.unwrap();
        }
        let nobody = free_ports().unwrap()[1];
        assert!(!is_ready(nobody).await);
    }
}

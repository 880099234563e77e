//! The gateway of a run: the real binary on a data folder of its own, and tokens from the same binary.

use std::{
    fs::{File, OpenOptions},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

/// How long a gateway may take to open its folder.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A running gateway; it ends with this.
#[derive(Debug)]
pub(crate) struct Gateway {
    child: Child,
    program: PathBuf,
    data: PathBuf,
    pub(crate) address: SocketAddr,
}

impl Gateway {
    /// Starts `program` on the folder `place/data`; its log is `place/gateway.log`.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn start(program: &Path, place: &Path) -> anyhow::Result<Self> {
        let address = UdpSocket::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?.local_addr()?;
        let (data, log) = (place.join("data"), place.join("gateway.log"));
        let log = OpenOptions::new().create(true).append(true).open(log)?;
        let child = Command::new(program)
            .args(["serve", "--http", "off", "--log", "warn", "--listen", &address.to_string(), "--data"])
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(log_to(&log)?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("can't start the gateway {}", program.display()))?;
        let mut gateway = Self { child, program: program.to_owned(), data, address };
        let began = Instant::now();
        // It says that it serves on standard output; the port answers from then on, and clients try until then.
        while !(gateway.certificate().exists() && gateway.data.join("keys/dev.pem").exists()) {
            gateway.is_running()?;
            ensure!(began.elapsed() < START_LIMIT, "the gateway does not start");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(gateway)
    }

    /// # Errors
    /// It has ended.
    pub(crate) fn is_running(&mut self) -> anyhow::Result<()> {
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none(), "the gateway ended by itself ({ended:?}), see gateway.log");
        Ok(())
    }

    /// The certificate to trust.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.data.join("tls/cert.pem")
    }

    /// A token for a user of the app "demo".
    ///
    /// # Errors
    /// When none could be had.
    pub(crate) fn token(&self, user: &str) -> anyhow::Result<String> {
        let made = Command::new(&self.program)
            .args(["token", "--user", user, "--data"])
            .arg(&self.data)
            .output()
            .context("can't start the gateway's binary")?;
        ensure!(made.status.success(), "no token: {}", String::from_utf8_lossy(&made.stderr));
        Ok(String::from_utf8(made.stdout)?.trim().to_owned())
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_to(log: &File) -> std::io::Result<Stdio> {
    Ok(Stdio::from(log.try_clone()?))
}

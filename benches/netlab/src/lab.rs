//! Two network namespaces, a TUN interface in each, and the server's process in the far one.
//!
//! ```text
//!   namespace of the clients                     namespace of the server
//!   SDK / MQTT clients, this process             fulmar serve / mosquitto
//!   fulmar-near 10.77.0.2  ── the wire ──        fulmar-far 10.77.0.1
//! ```
//!
//! - Nothing is named and nothing persists: namespaces and interfaces live as long as the processes in them. The clients'
//!   process is the first of a PID namespace, so the kernel ends everything in it when that process ends, however it
//!   ends, and it ends itself when whoever started it is gone (its standard input ends).
//! - Namespaces are made by `unshare` (util-linux) and addressed by `ip` (iproute2); who is not root gets a user
//!   namespace as well.
//!
//! Not here: what the wire does (`link`), what the clients do (`cell`).

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::{
    link::{Weather, Wire},
    plan::Peer,
    tun,
};

/// First argument of the process that is the clients' side.
pub(crate) const AS_INSIDE: &str = "as-inside";
/// First argument of the process that becomes the server.
pub(crate) const AS_FAR: &str = "as-far";

const NEAR: &str = "fulmar-near";
const FAR: &str = "fulmar-far";
const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// QUIC and MQTT over TLS; nothing else listens in there.
const FULMAR_PORT: u16 = 4_433;
const MQTT_PORT: u16 = 8_883;

/// Which congestion control TCP uses in this namespace.
const CONGESTION: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Lines of a server's that may wait to be looked at.
const LINES_MAX: usize = 256;

/// What the far process is to become.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Far {
    peer: Peer,
    folder: PathBuf,
    congestion: Option<String>,
    /// What the gateway logs.
    log: String,
}

/// Both sides, joined.
#[derive(Debug)]
pub(crate) struct Lab {
    /// Ends the wire before the server: fields are dropped in this order.
    pub(crate) wire: Wire,
    server: Child,
    /// TCP's congestion control in the clients' namespace.
    pub(crate) congestion: String,
}

/// Where the server of this peer listens.
pub(crate) const fn address(peer: Peer) -> SocketAddr {
    let port = match peer {
        Peer::FulmarQuic | Peer::FulmarTls => FULMAR_PORT,
        Peer::MosquittoTls => MQTT_PORT,
    };
    SocketAddr::new(std::net::IpAddr::V4(SERVER), port)
}

/// The certificate of an MQTT broker that was prepared in `folder`.
pub(crate) fn broker_certificate(folder: &Path) -> PathBuf {
    folder.join("broker.pem")
}

fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/local/sbin"].into_iter().map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// The words before a command that put it into namespaces of its own.
fn unshare(flags: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(flags).arg("--");
    command
}

/// Flags of the clients' side: a network, and the processes that end with it.
fn inside_flags() -> Vec<&'static str> {
    let mut flags = vec!["--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
    if !rustix::process::geteuid().is_root() {
        flags.extend(["--user", "--map-root-user"]);
    }
    flags
}

/// Looks whether everything is here that these peers take.
///
/// # Errors
/// What is missing, each with how to get it.
pub(crate) fn check(peers: &[Peer]) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for (name, package) in [("unshare", "util-linux"), ("ip", "iproute2")] {
        if program(name).is_none() {
            missing.push(format!("{name} is not installed: apt-get install {package}"));
        }
    }
    if peers.contains(&Peer::MosquittoTls) && program("mosquitto").is_none() {
        missing.push(
            "mosquitto is not installed: apt-get install mosquitto, or measure without it: --peer fulmar-quic"
                .to_owned(),
        );
    }
    if !Path::new(tun::DEVICE).exists() {
        missing.push(format!("{} is not there: modprobe tun (as root)", tun::DEVICE));
    }
    if missing.is_empty() {
        let tried =
            unshare(&inside_flags()).args(["ip", "tuntap", "add", "dev", NEAR, "mode", "tun"]).output()?;
        if !tried.status.success() {
            missing.push(format!(
                "namespaces with a TUN interface can't be made here ({}): run it as root, or allow users \
                 their own namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, \
                 kernel.apparmor_restrict_unprivileged_userns) and to open {}",
                String::from_utf8_lossy(&tried.stderr).trim(),
                tun::DEVICE
            ));
        }
    }
    anyhow::ensure!(missing.is_empty(), "the lab can't be set up:\n  {}", missing.join("\n  "));
    Ok(())
}

/// The command that starts this program again as the clients' side of a lab.
///
/// # Errors
/// The program is gone.
pub(crate) fn inside(argument: &str) -> anyhow::Result<tokio::process::Command> {
    let mut command = unshare(&inside_flags());
    command.arg(std::env::current_exe()?).args([AS_INSIDE, argument]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Ok(command.into())
}

impl Lab {
    /// Sets up both sides and waits until the server listens. To be called inside ([`inside`]).
    ///
    /// # Errors
    /// A step failed; the text says which.
    pub(crate) fn start(
        peer: Peer,
        folder: &Path,
        weather: Weather,
        congestion: Option<&str>,
        log: &str,
    ) -> anyhow::Result<Self> {
        let near = tun::open(NEAR)?;
        let far = tun::open(FAR)?;
        let spec = Far {
            peer,
            folder: folder.to_owned(),
            congestion: congestion.map(str::to_owned),
            log: log.to_owned(),
        };
        let mut command = unshare(&["--net"]);
        command.arg(std::env::current_exe()?).args([AS_FAR, &serde_json::to_string(&spec)?]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut server = command.spawn().context("the server's process can't be started")?;
        let mut out = BufReader::new(server.stdout.take().context("no pipe")?);
        let mut line = String::new();
        out.read_line(&mut line)?;
        anyhow::ensure!(line == "made\n", "the server's namespace was not made: {line:?}");

        ip(["link", "set", FAR, "netns", &server.id().to_string()])?;
        raise(NEAR, CLIENTS, SERVER)?;
        set_congestion(congestion)?;
        let wire = Wire::start(near, far, weather)?;
        let mut go = server.stdin.take().context("no pipe")?;
        go.write_all(b"go\n")?;

        let mut lab = Self { wire, server, congestion: congestion_now() };
        lab.wait_until_it_listens(peer)?;
        Ok(lab)
    }

    fn wait_until_it_listens(&mut self, peer: Peer) -> anyhow::Result<()> {
        let lines = BufReader::new(self.server.stderr.take().context("no pipe")?).lines();
        let (tell, told) = mpsc::sync_channel(LINES_MAX);
        // A server whose complaints nobody reads would stop at its pipe.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.try_send(line.clone());
                if ["WARN", "ERROR", "Error", "DEBUG", "TRACE"].iter().any(|mark| line.contains(mark)) {
                    eprintln!("{}: {line}", peer.name());
                }
            }
        });
        let mark = match peer {
            Peer::FulmarQuic | Peer::FulmarTls => "Clients ",
            Peer::MosquittoTls => " running",
        };
        let mut said = Vec::new();
        loop {
            match told.recv_timeout(PATIENCE) {
                Ok(line) if line.contains(mark) => return Ok(()),
                Ok(line) => said.push(line),
                Err(_) => bail!("{} does not listen. It said:\n{}", peer.name(), said.join("\n")),
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Runs `ip`.
fn ip<const N: usize>(arguments: [&str; N]) -> anyhow::Result<()> {
    let done = Command::new("ip").args(arguments).output().context("ip can't be run")?;
    anyhow::ensure!(
        done.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(())
}

fn raise(interface: &str, address: Ipv4Addr, peer: Ipv4Addr) -> anyhow::Result<()> {
    ip(["addr", "add", &address.to_string(), "peer", &peer.to_string(), "dev", interface])?;
    ip(["link", "set", interface, "mtu", "1500", "up"])?;
    ip(["link", "set", "lo", "up"])
}

fn set_congestion(wanted: Option<&str>) -> anyhow::Result<()> {
    let Some(wanted) = wanted else { return Ok(()) };
    std::fs::write(CONGESTION, wanted)
        .with_context(|| format!("the kernel does not allow --congestion {wanted} here"))
}

fn congestion_now() -> String {
    std::fs::read_to_string(CONGESTION).map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// Plays the far side: waits for its interface, then becomes the server.
///
/// # Errors
/// The server can't be started, or it ended.
pub(crate) fn become_server(argument: &str) -> anyhow::Result<std::process::ExitCode> {
    let far: Far = serde_json::from_str(argument)?;
    let mut out = std::io::stdout();
    out.write_all(b"made\n")?;
    out.flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    anyhow::ensure!(line == "go\n", "the clients' side is gone");
    raise(FAR, SERVER, CLIENTS)?;
    set_congestion(far.congestion.as_deref())?;
    match far.peer {
        Peer::FulmarQuic | Peer::FulmarTls => {
            let listen = address(far.peer).to_string();
            let data = far.folder.into_os_string();
            let words: [&OsStr; 10] = [
                "fulmar".as_ref(),
                "serve".as_ref(),
                "--listen".as_ref(),
                listen.as_ref(),
                "--http".as_ref(),
                "off".as_ref(),
                "--log".as_ref(),
                far.log.as_ref(),
                "--data".as_ref(),
                &data,
            ];
            Ok(fulmar_gateway::cli::run(words.into_iter().map(OsString::from)))
        }
        Peer::MosquittoTls => {
            let config = prepare_mosquitto(&far.folder)?;
            let mosquitto = program("mosquitto").context("mosquitto is gone")?;
            let error = std::os::unix::process::CommandExt::exec(
                Command::new(mosquitto).arg("-c").arg(config).stdin(Stdio::null()),
            );
            Err(error).context("mosquitto can't be started")
        }
    }
}

/// A certificate and a configuration that is good to the broker: no Nagle delay, no limit on what is in flight, nothing
/// written to disk.
fn prepare_mosquitto(folder: &Path) -> anyhow::Result<PathBuf> {
    let key = rcgen::KeyPair::generate()?;
    let names = vec![SERVER.to_string(), "localhost".to_owned()];
    let certificate = rcgen::CertificateParams::new(names)?.self_signed(&key)?;
    let (certificate_file, key_file) = (broker_certificate(folder), folder.join("broker-key.pem"));
    std::fs::write(&certificate_file, certificate.pem())?;
    std::fs::write(&key_file, key.serialize_pem())?;
    let config = format!(
        "user root\nlistener {MQTT_PORT} {SERVER}\ncertfile {}\nkeyfile {}\ntls_version tlsv1.3\n\
         allow_anonymous true\npersistence false\nset_tcp_nodelay true\nmax_inflight_messages 0\n\
         max_queued_messages 0\nlog_dest stderr\nlog_type error\nlog_type warning\nlog_type information\n",
        certificate_file.display(),
        key_file.display()
    );
    let file = folder.join("mosquitto.conf");
    std::fs::write(&file, config)?;
    Ok(file)
}

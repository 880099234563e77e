//! A server in a process of its own, on loopback, with TLS and everything it writes in a folder of its own.
//!
//! - Configurations are good to the server: no Nagle delay, no limit on what is in flight or waits, nothing written that the work does
//!   not ask for.
//! - It ends with this value, and with this process, however that ends (the kernel sees to it).
//!
//! Not here: where programs are (`programs`).

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use fulmar_benches::meter;

use crate::{plan::Peer, programs};

/// First argument of the process that becomes a server.
const AS_SERVER: &str = "as-server";

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long it may take to say what it counted.
const ANSWER: Duration = Duration::from_secs(5);

/// The last of what a server said that an error quotes.
const SAID_BYTES: usize = 2_000;

/// Becomes the server this process was started as; `None`: it is the runner itself. Call it first in `main`.
pub(crate) fn become_one() -> Option<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != AS_SERVER {
        return None;
    }
    let parent = rustix::process::getppid();
    let kill = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    if kill.is_err() || rustix::process::getppid() != parent {
        return Some(ExitCode::FAILURE);
    }
    let error = Command::new(words.next()?).args(words).exec();
    eprintln!("can't be started: {error}");
    Some(ExitCode::FAILURE)
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Server {
    peer: Peer,
    child: Child,
    address: SocketAddr,
    metrics: Option<SocketAddr>,
    folder: PathBuf,
    certificate: PathBuf,
    setting: String,
}

impl Server {
    /// Starts `program` with everything in `folder`, and waits until it listens.
    ///
    /// # Errors
    /// It did not come up; what it said last is in the error.
    pub(crate) async fn start(
        peer: Peer,
        program: &Path,
        version: &str,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let metrics =
            if peer == Peer::Fulmar { Some((Ipv4Addr::LOCALHOST, free_port()?).into()) } else { None };
        let (certificate, key) = match peer {
            Peer::Fulmar => (folder.join("data/tls/cert.pem"), PathBuf::new()),
            _ => make_certificate(folder)?,
        };
        let (words, setting) = prepare(peer, version, folder, address, metrics, &certificate, &key)?;
        let log = fs::File::create(folder.join("server.log"))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(AS_SERVER).arg(program).args(words).current_dir(folder);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("{} can't be started", program.display()))?;
        let data = if peer == Peer::Fulmar { folder.join("data") } else { folder.to_owned() };
        let mut server = Self { peer, child, address, metrics, folder: data, certificate, setting };
        server.wait_until_it_listens(&folder.join("server.log")).await?;
        Ok(server)
    }

    async fn wait_until_it_listens(&mut self, log: &Path) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            let listens = match self.peer {
                // "  Clients      127.0.0.1:4433 (QUIC, UDP)"
                Peer::Fulmar => said(log).contains("Clients "),
                Peer::RmqttTls | Peer::RmqttQuic => said(log).contains("listening on"),
                _ => TcpStream::connect_timeout(&self.address, ANSWER).is_ok(),
            };
            if listens {
                return Ok(());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || begin.elapsed() > PATIENCE {
                bail!("{} does not listen. It said:\n{}", self.peer.name(), said(log));
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Which one it is.
    pub(crate) const fn peer(&self) -> Peer {
        self.peer
    }

    /// Where it listens.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its certificate.
    pub(crate) fn certificate(&self) -> &Path {
        &self.certificate
    }

    /// Its data.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// How it was set, in words.
    pub(crate) fn setting(&self) -> &str {
        &self.setting
    }

    /// CPU it has used, and memory it has, bytes.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) fn read(&self) -> anyhow::Result<(Duration, u64)> {
        let gone = || format!("{} is gone", self.peer.name());
        let process = self.child.id();
        Ok((meter::cpu_of(process).with_context(gone)?, meter::resident_of(process).with_context(gone)?))
    }

    /// Commits to disk so far, each one sync; `None`: it does not say.
    pub(crate) fn commits(&self) -> Option<u64> {
        let mut connection = TcpStream::connect_timeout(&self.metrics?, ANSWER).ok()?;
        connection.set_read_timeout(Some(ANSWER)).ok()?;
        connection
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .ok()?;
        let mut page = String::new();
        connection.read_to_string(&mut page).ok()?;
        counter(&page, "fulmar_commits_total")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A counter of a page of metrics.
fn counter(page: &str, name: &str) -> Option<u64> {
    page.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// The last of what a server said.
fn said(log: &Path) -> String {
    let said = fs::read(log).unwrap_or_default();
    let last = said.get(said.len().saturating_sub(SAID_BYTES)..).unwrap_or_default();
    String::from_utf8_lossy(last).into_owned()
}

/// A port that nobody listens at now.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn make_certificate(folder: &Path) -> anyhow::Result<(PathBuf, PathBuf)> {
    let key = rcgen::KeyPair::generate()?;
    let names = vec!["localhost".to_owned(), Ipv4Addr::LOCALHOST.to_string()];
    let certificate = rcgen::CertificateParams::new(names)?.self_signed(&key)?;
    let (certificate_file, key_file) = (folder.join("cert.pem"), folder.join("key.pem"));
    fs::write(&certificate_file, certificate.pem())?;
    fs::write(&key_file, key.serialize_pem())?;
    Ok((certificate_file, key_file))
}

/// Writes what the server reads at its start; its arguments, and how it is set in words.
fn prepare(
    peer: Peer,
    version: &str,
    folder: &Path,
    address: SocketAddr,
    metrics: Option<SocketAddr>,
    certificate: &Path,
    key: &Path,
) -> anyhow::Result<(Vec<String>, String)> {
    let path = |name: &str| folder.join(name).display().to_string();
    let (certificate, key, port) = (certificate.display(), key.display(), address.port());
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    Ok(match peer {
        Peer::Fulmar => {
            let http = metrics.map_or_else(|| "off".to_owned(), |metrics| metrics.to_string());
            let data = path("data");
            let listen = address.to_string();
            (
                words(&["serve", "--listen", &listen, "--http", &http, "--log", "warn", "--data", &data]),
                "fulmar serve as it is: durability power (fdatasync before the ack)".to_owned(),
            )
        }
        Peer::Mosquitto => {
            let user = if rustix::process::geteuid().is_root() { "user root\n" } else { "" };
            let config = format!(
                "{user}listener {port} 127.0.0.1\ncertfile {certificate}\nkeyfile {key}\ntls_version tlsv1.3\n\
                 allow_anonymous true\npersistence false\nset_tcp_nodelay true\nmax_inflight_messages 0\n\
                 max_queued_messages 0\nlog_dest stderr\nlog_type error\nlog_type warning\n"
            );
            let file = path("mosquitto.conf");
            fs::write(&file, config)?;
            (
                words(&["-c", &file]),
                format!(
                    "mosquitto {version}: persistence false, Nagle off, no limits on what is in flight or queued"
                ),
            )
        }
        Peer::Nats | Peer::Jetstream => {
            let mut config = format!(
                "listen: \"{address}\"\ntls {{ cert_file: \"{certificate}\", key_file: \"{key}\", timeout: 30 }}\n\
                 max_connections: 100000\n"
            );
            let mut setting = format!("nats-server {version}");
            if peer == Peer::Jetstream {
                let always = programs::syncs_always(version);
                let sync = if always { "sync_interval: always" } else { "" };
                config += &format!("jetstream {{ store_dir: \"{}\"\n{sync}\n}}\n", path("jetstream"));
                setting += if always {
                    ", JetStream: file, sync_interval always"
                } else {
                    ", JetStream: file, synced every 2 minutes (this version can't sync before its acks)"
                };
            } else {
                setting += ", core: no JetStream";
            }
            let file = path("nats.conf");
            fs::write(&file, config)?;
            (words(&["-c", &file]), setting)
        }
        Peer::Rumqttd => {
            let config = format!(
                "id = 0\n[router]\nid = 0\nmax_connections = 10010\nmax_outgoing_packet_count = 200\n\
                 max_segment_size = 104857600\nmax_segment_count = 10\n[v4.1]\nname = \"tls\"\nlisten = \"{address}\"\n\
                 next_connection_delay_ms = 0\n[v4.1.tls]\ncertpath = \"{certificate}\"\nkeypath = \"{key}\"\n\
                 [v4.1.connections]\nconnection_timeout_ms = 60000\nmax_payload_size = 20480\nmax_inflight_count = 500\n\
                 dynamic_filters = true\n"
            );
            let file = path("rumqttd.toml");
            fs::write(&file, config)?;
            (
                words(&["-c", &file, "-q"]),
                format!(
                    "rumqttd {version}: its own example settings, no delay between connections, 500 in flight"
                ),
            )
        }
        Peer::RmqttTls | Peer::RmqttQuic => (
            vec![certificate.to_string(), key.to_string(), port.to_string()],
            format!(
                "rmqtt {version} as a library, no plug-ins: Nagle off, 65 535 in flight, 1 000 000 queued"
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_by_its_whole_name() {
        let page = "# HELP fulmar_commits_total x\nfulmar_commits_failed_total 3\nfulmar_commits_total 41\n";
        assert_eq!(counter(page, "fulmar_commits_total"), Some(41));
        assert_eq!(counter(page, "fulmar_commits"), None);
    }

    #[test]
    fn a_program_that_ends_at_once_is_told_with_its_words() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        fs::write(&log, "x".repeat(5_000) + "the end").unwrap();
        assert!(said(&log).ends_with("the end") && said(&log).len() == SAID_BYTES);
        assert_eq!(said(Path::new("/no/such/file")), "");
    }

    #[test]
    fn every_server_is_told_its_port_and_says_how_it_is_set() {
        for peer in Peer::ALL {
            let folder = tempfile::tempdir().unwrap();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 45_678));
            let (certificate, key) = make_certificate(folder.path()).unwrap();
            let (words, setting) =
                prepare(peer, "2.10.1", folder.path(), address, None, &certificate, &key).unwrap();
            let files = fs::read_dir(folder.path()).unwrap();
            let written: String =
                files.filter_map(|file| fs::read_to_string(file.unwrap().path()).ok()).collect();
            assert!((words.join(" ") + &written).contains("45678"), "{peer:?}");
            assert!(setting.len() > 15, "{peer:?}");
            assert_eq!(written.contains("sync_interval: always"), peer == Peer::Jetstream);
        }
    }
}

//! QUIC: whom to believe, and the settings of the transport.
//!
//! TLS 1.3 only, one ALPN. Session tickets are kept per client, so that a later connection can resume.

use std::{
    future::ready,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    client::lock,
    error::Error,
    options::BoxFuture,
    options::Trust,
    platform::Platform,
    race::{RTT_UNKNOWN, Transport},
    transport::{
        dial::Progress,
        link::Link,
        meter::{Carried, Metered},
        stream::{Target, stream_tls, tls, websocket},
        window::Floored,
    },
};
use fulmar_protocol::{
    limit::{ADDRESSES_MAX, LANES_MAX},
    version::ALPN,
};
use quinn::{
    Connecting, ConnectionError, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig,
    TransportConfig, VarInt, crypto::rustls::QuicClientConfig,
};
use rustls::{
    RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    time_provider::TimeProvider,
};

/// TLS sessions kept for resumption: a client talks to one gateway.
const SESSIONS_KEPT: usize = 8;

/// The client's TLS settings, made once: its session store lives as long as the client.
#[derive(Clone)]
pub(crate) struct Tls {
    quic: Arc<QuicClientConfig>,
    stream: Arc<rustls::ClientConfig>,
}

/// TLS settings that believe `trust` only.
///
/// # Errors
/// [`Error::Certificate`].
pub(crate) fn client_tls(trust: Option<&Trust>, platform: &Arc<dyn Platform>) -> Result<Tls, Error> {
    let mut tls = tls_config(trust, platform)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // Only what may be replayed leaves early.
    tls.enable_early_data = true;
    let quic = QuicClientConfig::try_from(tls).map_err(|error| Error::Certificate(error.to_string()))?;
    Ok(Tls { quic: Arc::new(quic), stream: stream_tls(trust, platform)? })
}

/// TLS that believes `trust` only, with a session store of its own.
pub(super) fn tls_config(
    trust: Option<&Trust>,
    platform: &Arc<dyn Platform>,
) -> Result<rustls::ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    if let Some(trust) = trust {
        for certificate in certificates(trust)? {
            roots.add(certificate).map_err(|error| Error::Certificate(error.to_string()))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let time = Arc::new(DeviceTime(Arc::clone(platform)));
    let mut tls = rustls::ClientConfig::builder_with_details(provider, time)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| Error::Certificate(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.resumption = Resumption::in_memory_sessions(SESSIONS_KEPT);
    Ok(tls)
}

/// The device's clock, as TLS asks for it.
#[derive(Debug)]
struct DeviceTime(Arc<dyn Platform>);

impl TimeProvider for DeviceTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis(self.0.unix_millis())))
    }
}

fn certificates(trust: &Trust) -> Result<Vec<CertificateDer<'static>>, Error> {
    let bytes = match trust {
        Trust::Certificate(bytes) => bytes.clone(),
        Trust::CertificateFile(path) => {
            std::fs::read(path).map_err(|error| Error::Certificate(format!("{}: {error}", path.display())))?
        }
    };
    if !bytes.starts_with(b"-----") && !bytes.windows(11).any(|window| window == b"-----BEGIN ") {
        return Ok(vec![CertificateDer::from(bytes)]);
    }
    let certificates = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| Error::Certificate(error.to_string()))?;
    if certificates.is_empty() {
        return Err(Error::Certificate("no certificate in the PEM file".to_owned()));
    }
    Ok(certificates)
}

/// Idle connections end after this long; the session's PINGs keep those alive that are wanted.
pub(super) const IDLE_TIMEOUT_MS: u32 = 180_000;

/// Bytes the gateway may have under way to this client, on one stream and in all. A full backlog stream must leave room
/// for the lanes.
pub(super) const STREAM_WINDOW: u32 = 128 * 1024;
pub(super) const WINDOW: u32 = 512 * 1024;

/// Bytes this client may have under way.
const SEND_WINDOW: u64 = 256 * 1024;

/// Bytes of datagrams kept in either direction; they are small and stale soon.
pub(super) const DATAGRAM_BUFFER: usize = 32 * 1024;

/// The socket of a client, and how it reaches a gateway.
pub(crate) struct Dialer {
    platform: Arc<dyn Platform>,
    tls: Tls,
    server_name: String,
    /// Where the gateway is said to be, as the app and the gateway gave it.
    names: Mutex<Vec<String>>,
    /// Where it was found last, for times without name service.
    found: Mutex<Vec<SocketAddr>>,
    /// One for IPv4, one for IPv6.
    sockets: Mutex<[Option<Endpoint>; 2]>,
    carried: Arc<Carried>,
}

impl Dialer {
    pub(crate) fn new(
        platform: Arc<dyn Platform>,
        tls: Tls,
        names: Vec<String>,
        server_name: String,
    ) -> Self {
        Self {
            platform,
            tls,
            server_name,
            names: Mutex::new(names),
            found: Mutex::default(),
            sockets: Mutex::default(),
            carried: Arc::default(),
        }
    }

    /// What the sockets of QUIC have carried.
    pub(crate) const fn carried(&self) -> &Arc<Carried> {
        &self.carried
    }

    /// A socket of QUIC.
    fn socket(&self, v6: bool) -> std::io::Result<Arc<Metered>> {
        self.platform.udp(any(v6)).map(|socket| Metered::new(socket, &self.carried))
    }

    /// By which ways this client can reach a gateway.
    pub(crate) const fn offered(&self) -> &'static [Transport] {
        &[Transport::Quic, Transport::Tls, Transport::WebSocket]
    }

    /// The gateway named more addresses: they are tried after those that are known.
    pub(crate) fn learn(&self, addresses: &[String]) {
        let mut names = lock(&self.names);
        for address in addresses {
            if names.len() < ADDRESSES_MAX && !names.contains(address) {
                names.push(address.clone());
            }
        }
    }

    /// Looks all names up. The text of an error is for people.
    pub(crate) async fn resolve(&self) -> Result<Vec<SocketAddr>, String> {
        let names = lock(&self.names).clone();
        let mut addresses = Vec::new();
        let mut last_error = "no address is known".to_owned();
        for name in &names {
            match self.platform.resolve(name).await {
                Ok(found) if found.is_empty() => last_error = format!("{name}: no address"),
                Ok(found) => addresses.extend(found),
                Err(error) => last_error = format!("{name}: {error}"),
            }
        }
        let mut found = lock(&self.found);
        if addresses.is_empty() {
            // Name service is the first to fail on a bad network.
            addresses.clone_from(&found);
        }
        let mut distinct: Vec<SocketAddr> = Vec::new();
        for address in addresses {
            if distinct.len() < ADDRESSES_MAX && !distinct.contains(&address) {
                distinct.push(address);
            }
        }
        if distinct.is_empty() {
            return Err(last_error);
        }
        found.clone_from(&distinct);
        Ok(distinct)
    }

    /// One attempt. `rtt` is the round trip to expect, `early` whether something waits that may leave in early data.
    pub(crate) fn dial(
        &self,
        transport: Transport,
        address: SocketAddr,
        rtt: Option<Duration>,
        early: bool,
    ) -> BoxFuture<Progress> {
        let grease = self.platform.random();
        match transport {
            Transport::Quic => match self.connecting(address, rtt) {
                Ok(connecting) => Box::pin(attempt(connecting, early, grease)),
                Err(text) => Box::pin(ready(Progress::Failed { text, answered: false })),
            },
            Transport::Tls | Transport::WebSocket => {
                let target = Target {
                    platform: Arc::clone(&self.platform),
                    remote: address,
                    server_name: self.server_name.clone(),
                    tls: Arc::clone(&self.tls.stream),
                    rtt: rtt.unwrap_or(RTT_UNKNOWN),
                };
                Box::pin(stream_attempt(target, transport, grease))
            }
        }
    }

    /// The next race gets new sockets; connections that are up keep theirs.
    pub(crate) fn forget_sockets(&self) {
        *lock(&self.sockets) = [None, None];
    }

    /// Moves connections that are up to new sockets.
    pub(crate) fn rebind(&self) {
        for (v6, endpoint) in [false, true].into_iter().zip(lock(&self.sockets).iter()) {
            let Some(endpoint) = endpoint else { continue };
            let moved = self.socket(v6).and_then(|socket| endpoint.rebind_abstract(socket));
            if let Err(error) = moved {
                tracing::debug!(%error, "no new socket; the old one is kept");
            }
        }
    }

    fn endpoint(&self, v6: bool) -> std::io::Result<Endpoint> {
        let mut config = EndpointConfig::default();
        let mut seed = [0; 32];
        for part in seed.chunks_exact_mut(8) {
            part.copy_from_slice(&self.platform.random().to_le_bytes());
        }
        config.rng_seed(Some(seed));
        let platform = Arc::clone(&self.platform);
        config.cid_generator(move || Box::new(ShortIds(Arc::clone(&platform))));
        let socket = self.socket(v6)?;
        Endpoint::new_with_abstract_socket(config, None, socket, self.platform.quic_runtime())
    }

    fn connecting(&self, address: SocketAddr, rtt: Option<Duration>) -> Result<Connecting, String> {
        let v6 = address.is_ipv6();
        let mut sockets = lock(&self.sockets);
        let [four, six] = &mut *sockets;
        let slot = if v6 { six } else { four };
        let endpoint = match slot {
            Some(endpoint) => endpoint,
            None => slot.insert(self.endpoint(v6).map_err(|error| format!("no socket: {error}"))?),
        };
        endpoint
            .connect_with(client_config(&self.tls, rtt), address, &self.server_name)
            .map_err(|error| format!("{address}: {error}"))
    }
}

/// Ids by which a client tells its connections apart. Every packet to it carries one, and it has few connections: two
/// bytes do where eight are usual. (None at all would do for one connection per socket only.)
struct ShortIds(Arc<dyn Platform>);

impl ShortIds {
    const LEN: usize = 2;
}

impl ConnectionIdGenerator for ShortIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let [first, second, ..] = self.0.random().to_le_bytes();
        ConnectionId::new(&[first, second])
    }

    fn cid_len(&self) -> usize {
        Self::LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// From a handshake to a link.
async fn attempt(connecting: Connecting, early: bool, grease: u64) -> Progress {
    if !early {
        return match connecting.await {
            Ok(connection) => up(connection, grease).await,
            Err(error) => failed(&error),
        };
    }
    let (connection, accepted) = match connecting.into_0rtt() {
        Ok(early) => early,
        Err(connecting) => {
            return match connecting.await {
                Ok(connection) => up(connection, grease).await,
                Err(error) => failed(&error),
            };
        }
    };
    let link = match Link::open(connection.clone().into(), grease).await {
        Ok(link) => link,
        Err(error) => return Progress::Failed { text: error.to_string(), answered: false },
    };
    let confirmed = async move {
        let taken = accepted.await;
        match connection.close_reason() {
            Some(error) => failed(&error),
            None if taken => Progress::Confirmed,
            // The gateway does not remember: all is said again, on streams that count.
            None => up(connection, grease).await,
        }
    };
    Progress::Early(Box::new(link), Box::pin(confirmed))
}

async fn up(connection: impl Into<fulmar_transport::Connection>, grease: u64) -> Progress {
    match Link::open(connection.into(), grease).await {
        Ok(link) => Progress::Up(Box::new(link)),
        Err(error) => Progress::Failed { text: error.to_string(), answered: true },
    }
}

/// From a byte stream to a link.
async fn stream_attempt(target: Target, transport: Transport, grease: u64) -> Progress {
    let stream = match target.platform.tcp(target.remote).await {
        Ok(stream) => stream,
        Err(error) => {
            return Progress::Failed { text: format!("{} by TCP: {error}", target.remote), answered: false };
        }
    };
    let connection = match transport {
        Transport::WebSocket => websocket(stream, &target).await,
        _ => tls(stream, &target).await,
    };
    match connection {
        Ok(connection) => up(connection, grease).await,
        Err(text) => Progress::Failed { text, answered: true },
    }
}

fn failed(error: &ConnectionError) -> Progress {
    let answered = !matches!(error, ConnectionError::TimedOut | ConnectionError::LocallyClosed);
    Progress::Failed { text: error.to_string(), answered }
}

/// QUIC's settings for one connection, on a network with this round trip.
fn client_config(tls: &Tls, rtt: Option<Duration>) -> quinn::ClientConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(0u8.into())
        .max_concurrent_uni_streams((u32::from(LANES_MAX) + 2).into())
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT_MS).into()))
        // The session's PINGs do that, when they are wanted.
        .keep_alive_interval(None)
        // What probes take of a new path's allowance after a move is missing for messages, and those are small.
        .mtu_discovery_config(None)
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(WINDOW.into())
        .send_window(SEND_WINDOW)
        .send_fairness(false)
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER);
    transport.initial_rtt(rtt.unwrap_or(RTT_UNKNOWN)).congestion_controller_factory(Arc::new(Floored));
    let mut config = quinn::ClientConfig::new(Arc::<QuicClientConfig>::clone(&tls.quic));
    config.transport_config(Arc::new(transport));
    config
}

fn any(v6: bool) -> SocketAddr {
    let address = if v6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    SocketAddr::new(address, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_read_as_pem_and_der() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let der = made.cert.der().to_vec();
        let pem = made.cert.pem().into_bytes();
        assert_eq!(certificates(&Trust::Certificate(der.clone())).unwrap(), [der.clone().into()]);
        assert_eq!(certificates(&Trust::Certificate(pem)).unwrap(), [der.into()]);
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let platform: Arc<dyn Platform> = Arc::new(crate::platform::System::default());
        for bytes in
            [&b"rubbish"[..], b"", b"-----BEGIN CERTIFICATE-----\n", b"-----BEGIN X-----\n-----END X-----\n"]
        {
            let refused = client_tls(Some(&Trust::Certificate(bytes.to_vec())), &platform);
            assert!(matches!(refused, Err(Error::Certificate(_))), "{bytes:?}");
        }
        let refused = client_tls(Some(&Trust::CertificateFile("/does/not/exist".into())), &platform);
        assert!(matches!(refused, Err(Error::Certificate(_))));
    }
}

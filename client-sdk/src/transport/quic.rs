//! QUIC: whom to believe, and the settings of the transport.
//!
//! TLS 1.3 only, one ALPN. Session tickets are kept per client, so that a later connection can resume.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::{
    client::lock,
    error::Error,
    options::Trust,
    platform::{Platform, within},
};
use fulmar_protocol::{
    limit::{ADDRESSES_MAX, LANES_MAX},
    version::ALPN,
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use quinn::{
    Connecting, Connection, Endpoint, EndpointConfig, TransportConfig, VarInt,
    crypto::rustls::QuicClientConfig,
};
use rustls::{
    RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, pem::PemObject},
};

/// TLS sessions kept for resumption: a client talks to one gateway.
const SESSIONS_KEPT: usize = 8;

/// The client's TLS settings, made once: its session store lives as long as the client.
#[derive(Clone)]
pub(crate) struct Tls(pub(crate) Arc<QuicClientConfig>);

/// TLS settings that believe `trust` only.
///
/// # Errors
/// [`Error::Certificate`].
pub(crate) fn client_tls(trust: Option<&Trust>) -> Result<Tls, Error> {
    let mut roots = RootCertStore::empty();
    if let Some(trust) = trust {
        for certificate in certificates(trust)? {
            roots.add(certificate).map_err(|error| Error::Certificate(error.to_string()))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| Error::Certificate(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = Resumption::in_memory_sessions(SESSIONS_KEPT);
    let tls = QuicClientConfig::try_from(tls).map_err(|error| Error::Certificate(error.to_string()))?;
    Ok(Tls(Arc::new(tls)))
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

/// Attempts of one race that are under way at once.
const ATTEMPTS_MAX: usize = 3;

/// From one attempt of a race to the next, at the next address.
const STAGGER: Duration = Duration::from_millis(250);

/// From one attempt to the next when all addresses were tried: an attempt's own packets come ever more rarely, so a
/// gateway that has just come back is found sooner by a new one.
const STAGGER_AGAIN: Duration = Duration::from_secs(1);

/// What one attempt may take; no attempt begins later in a race.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(4);

/// Idle connections end after this long; the session's PINGs keep those alive that are wanted.
const IDLE_TIMEOUT_MS: u32 = 180_000;

/// Bytes the gateway may have under way to this client, on one stream and in all. A full backlog stream must leave room
/// for the lanes.
const STREAM_WINDOW: u32 = 128 * 1024;
const WINDOW: u32 = 512 * 1024;

/// Bytes this client may have under way.
const SEND_WINDOW: u64 = 256 * 1024;

/// Bytes of datagrams kept in either direction; they are small and stale soon.
const DATAGRAM_BUFFER: usize = 32 * 1024;

/// The socket of a client, and how it reaches a gateway.
#[derive(Debug)]
pub(crate) struct Dialer {
    platform: Arc<dyn Platform>,
    config: quinn::ClientConfig,
    address: String,
    server_name: String,
    /// One for IPv4, one for IPv6.
    sockets: Mutex<[Option<Endpoint>; 2]>,
}

impl Dialer {
    pub(crate) fn new(platform: Arc<dyn Platform>, tls: Tls, address: String, server_name: String) -> Self {
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(0u8.into())
            .max_concurrent_uni_streams((u32::from(LANES_MAX) + 2).into())
            .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT_MS).into()))
            // The session's PINGs do that, when they are wanted.
            .keep_alive_interval(None)
            .stream_receive_window(STREAM_WINDOW.into())
            .receive_window(WINDOW.into())
            .send_window(SEND_WINDOW)
            .send_fairness(false)
            .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
            .datagram_send_buffer_size(DATAGRAM_BUFFER);
        let mut config = quinn::ClientConfig::new(tls.0);
        config.transport_config(Arc::new(transport));
        Self { platform, config, address, server_name, sockets: Mutex::default() }
    }

    /// The next race gets new sockets; connections that are up keep theirs.
    pub(crate) fn forget_sockets(&self) {
        *lock(&self.sockets) = [None, None];
    }

    /// Moves connections that are up to new sockets.
    pub(crate) fn rebind(&self) {
        for (v6, endpoint) in [false, true].into_iter().zip(lock(&self.sockets).iter()) {
            let Some(endpoint) = endpoint else { continue };
            let moved = self.platform.udp(any(v6)).and_then(|socket| endpoint.rebind_abstract(socket));
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
        let socket = self.platform.udp(any(v6))?;
        Endpoint::new_with_abstract_socket(config, None, socket, self.platform.quic_runtime())
    }

    fn connecting(&self, address: SocketAddr) -> Result<Connecting, String> {
        let v6 = address.is_ipv6();
        let mut sockets = lock(&self.sockets);
        let [four, six] = &mut *sockets;
        let slot = if v6 { six } else { four };
        let endpoint = match slot {
            Some(endpoint) => endpoint,
            None => slot.insert(self.endpoint(v6).map_err(|error| format!("no socket: {error}"))?),
        };
        endpoint
            .connect_with(self.config.clone(), address, &self.server_name)
            .map_err(|error| format!("{address}: {error}"))
    }

    /// Looks the address up and races for a connection: attempts begin 250 ms apart, or when the one before failed; the
    /// first that succeeds wins and ends the others. The text of an error is for people.
    pub(crate) async fn race(&self) -> Result<Connection, String> {
        let found = self.platform.resolve(&self.address).await;
        let mut addresses = found.map_err(|error| format!("{}: {error}", self.address))?;
        addresses.truncate(ADDRESSES_MAX);
        let mut attempts = FuturesUnordered::new();
        let mut last_error = format!("{}: no address", self.address);
        let mut begun = 0;
        let started = self.platform.monotonic();
        let mut next = addresses.first();
        loop {
            if let Some(&address) = next.take() {
                begun += 1;
                match self.connecting(address) {
                    Ok(connecting) => attempts.push(async move {
                        match within(&*self.platform, HANDSHAKE_TIMEOUT, connecting).await {
                            Some(Ok(connection)) => Ok(connection),
                            Some(Err(error)) => Err(format!("{address}: {error}")),
                            None => Err(format!("{address}: no answer")),
                        }
                    }),
                    Err(error) => last_error = error,
                }
            }
            let untried = begun < addresses.len();
            let may_start = untried
                || !attempts.is_empty()
                    && self.platform.monotonic().saturating_sub(started) < HANDSHAKE_TIMEOUT;
            if attempts.is_empty() && !may_start {
                return Err(last_error);
            }
            let stagger = if untried { STAGGER } else { STAGGER_AGAIN };
            let now = self.platform.monotonic();
            tokio::select! {
                biased;
                Some(attempt) = attempts.next(), if !attempts.is_empty() => match attempt {
                    Ok(connection) => return Ok(connection),
                    Err(error) => {
                        last_error = error;
                        next = addresses.get(begun);
                    }
                },
                () = self.platform.sleep_until(now + stagger), if may_start && attempts.len() < ATTEMPTS_MAX => {
                    next = addresses.get(begun % addresses.len().max(1));
                }
            }
        }
    }
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
        for bytes in
            [&b"rubbish"[..], b"", b"-----BEGIN CERTIFICATE-----\n", b"-----BEGIN X-----\n-----END X-----\n"]
        {
            let refused = client_tls(Some(&Trust::Certificate(bytes.to_vec())));
            assert!(matches!(refused, Err(Error::Certificate(_))), "{bytes:?}");
        }
        let refused = client_tls(Some(&Trust::CertificateFile("/does/not/exist".into())));
        assert!(matches!(refused, Err(Error::Certificate(_))));
    }
}

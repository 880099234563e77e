//! What a phone meets first: the certificate, TLS sessions for 0-RTT, and the QUIC settings of the endpoint.
//!
//! - TLS 1.3 only, ALPN [`fulmar_protocol::version::ALPN`] only.
//! - Sessions are kept here (stateful): rustls gives no early data with stateless tickets. The store is bounded by
//!   `tls.sessions`, which should exceed twice the connections.
//! - The certificate can be replaced while the gateway runs; a pair that does not fit is refused and the old one stays.
//! - The keys of resets, validation tokens and connection ids outlive the process: a restarted gateway answers the
//!   packets of old connections with resets, and phones come back at once instead of waiting for their idle timeout.
//! - Windows, streams and buffers are sized for many idle phones; quinn's defaults are for bulk transfer.
//!
//! Not here: binding sockets and accepting (`endpoint`), whether an attempt is welcome ([`super::admission`]), and when
//! the certificate is looked at again (`gateway`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use fulmar_protocol::version::ALPN;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AckFrequencyConfig, EndpointConfig, MtuDiscoveryConfig, ServerConfig, VarInt};
use ring::{hkdf, hmac};
use rustls::CipherSuite;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;

use super::{resets::NotingIds, sessions::Sessions, steering::Core};
use crate::config::{LimitsConfig, TlsConfig, TransportConfig};
use crate::data_folder::{DataFolder, EndpointKeys};
use crate::ground;

/// Bytes of one attempt's early packets that wait until it is accepted: HELLO and the first sends of a resume.
const INCOMING_BUFFER_BYTES: u64 = 64 * 1024;

/// The same for all attempts together.
const INCOMING_BUFFERS_BYTES: u64 = 64 * 1024 * 1024;

/// The certificate or the settings can't be used; one line that says why and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TlsError(String);

/// The certificate that is presented, replaceable at any time.
pub struct Certificate {
    chain_path: PathBuf,
    key_path: PathBuf,
    current: RwLock<Loaded>,
}

#[derive(Clone)]
struct Loaded {
    certified: Arc<CertifiedKey>,
    /// Of the two files, to see whether they changed.
    hash: [u8; 32],
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("chain", &self.chain_path).finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads the configured certificate, or the data folder's own.
    ///
    /// # Errors
    /// One line: a file is missing, is no PEM, or the two don't belong together.
    pub fn load(tls: &TlsConfig, folder: &DataFolder) -> Result<Arc<Self>, TlsError> {
        let chain_path = tls.certificate.clone().unwrap_or_else(|| folder.certificate());
        let key_path = tls.key.clone().unwrap_or_else(|| folder.certificate_key());
        let current = RwLock::new(read_pair(&chain_path, &key_path)?);
        Ok(Arc::new(Self { chain_path, key_path, current }))
    }

    /// Looks at the files; `true` when they changed and the new certificate is presented from now on.
    ///
    /// # Errors
    /// The new pair can't be used; the old one stays.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let fresh = read_pair(&self.chain_path, &self.key_path)?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let changed = fresh.hash != current.hash;
        if changed {
            *current = fresh;
        }
        Ok(changed)
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).certified.clone()
    }

    /// SHA-256 of the leaf certificate, as 64 hexadecimal digits: what a client may pin.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let certified = self.certified();
        let leaf = certified.cert.first().map_or(&[][..], |leaf| leaf.as_ref());
        let digest = ring::digest::digest(&ring::digest::SHA256, leaf);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The file of the chain.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.chain_path
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }
}

fn read_pair(chain_path: &Path, key_path: &Path) -> Result<Loaded, TlsError> {
    let chain_bytes = read_file("certificate", chain_path)?;
    let key_bytes = read_file("private key", key_path)?;
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(&chain_bytes).collect::<Result<_, _>>().map_err(|e| {
            TlsError(format!(
                "certificate {} is not PEM ({e}): give the chain, leaf first",
                chain_path.display()
            ))
        })?;
    if chain.is_empty() {
        return Err(TlsError(format!(
            "certificate {} holds no BEGIN CERTIFICATE: give the chain in PEM, leaf first",
            chain_path.display()
        )));
    }
    let key = PrivateKeyDer::from_pem_slice(&key_bytes).map_err(|_| {
        TlsError(format!(
            "private key {} holds no BEGIN PRIVATE KEY: give the certificate's key in PEM, without a passphrase",
            key_path.display()
        ))
    })?;
    let provider = rustls::crypto::ring::default_provider();
    let certified = CertifiedKey::from_der(chain, key, &provider).map_err(|e| {
        let (chain, key) = (chain_path.display(), key_path.display());
        TlsError(match e {
            rustls::Error::InconsistentKeys(_) => {
                format!("certificate {chain} and private key {key} don't belong together: give a pair")
            }
            _ => format!("certificate {chain} with private key {key} can't be used: {e}"),
        })
    })?;
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(&chain_bytes);
    context.update(&key_bytes);
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    Ok(Loaded { certified: Arc::new(certified), hash })
}

fn read_file(what: &str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|e| {
        TlsError(format!(
            "{what} {} can't be read ({e}): set tls.certificate and tls.key to files this user may read",
            path.display()
        ))
    })
}

/// The gateway's clock, as TLS asks for it.
#[derive(Debug)]
struct GroundTime;

impl TimeProvider for GroundTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis(ground::unix_now().get())))
    }
}

/// Ring, without AES-256: rustls' clients would choose it, its key schedule hashes with SHA-384, for which processors have no
/// instructions, and its packets take more. AES-128 every implementation must have (RFC 8446 section 9.1); who prefers ChaCha20 gets it.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.retain(|suite| suite.suite() != CipherSuite::TLS13_AES_256_GCM_SHA384);
    provider
}

/// TLS as phones meet it.
///
/// # Errors
/// The cryptography this was built with lacks TLS 1.3.
pub fn tls_config(tls: &TlsConfig, certificate: Arc<Certificate>) -> Result<rustls::ServerConfig, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_details(Arc::new(provider()), Arc::new(GroundTime))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| TlsError(format!("TLS 1.3 is not available: {e}")))?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![ALPN.to_vec()];
    if tls.sessions == 0 || tls.tickets == 0 {
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    } else {
        config.session_storage = Arc::new(Sessions::new(tls.sessions));
        config.send_tls13_tickets = tls.tickets;
        // QUIC knows no other size (RFC 9001 section 4.6.1); how much may come is a matter of the windows.
        config.max_early_data_size = u32::MAX;
    }
    Ok(config)
}

/// TLS for byte streams: [`ALPN`] and, for WebSockets, HTTP. Early data is not taken.
///
/// # Errors
/// The cryptography this was built with lacks TLS 1.3 or gives no random numbers.
pub fn stream_tls_config(
    tls: &TlsConfig,
    certificate: Arc<Certificate>,
) -> Result<rustls::ServerConfig, TlsError> {
    let mut config = tls_config(tls, certificate)?;
    config.alpn_protocols = vec![ALPN.to_vec(), fulmar_transport::secure::ALPN_HTTP.to_vec()];
    config.max_early_data_size = 0;
    // Without early data tickets need no memory here.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    if config.send_tls13_tickets > 0 {
        config.ticketer = rustls::crypto::ring::Ticketer::new()
            .map_err(|e| TlsError(format!("tickets are not available: {e}")))?;
    }
    Ok(config)
}

/// QUIC's settings for one connection.
#[must_use]
pub fn transport_config(transport: &TransportConfig) -> quinn::TransportConfig {
    let mut config = quinn::TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(transport.bidi_streams))
        .max_concurrent_uni_streams(VarInt::from_u32(transport.uni_streams))
        .max_idle_timeout(Some(VarInt::from_u32(transport.idle_timeout_ms).into()))
        .stream_receive_window(VarInt::from_u32(transport.stream_window_bytes))
        .receive_window(VarInt::from_u32(transport.connection_window_bytes))
        .send_window(transport.send_window_least_bytes)
        .send_fairness(false)
        .keep_alive_interval(None)
        .datagram_receive_buffer_size(Some(transport.datagram_receive_bytes))
        .datagram_send_buffer_size(transport.datagram_send_bytes)
        .initial_rtt(Duration::from_millis(u64::from(transport.initial_rtt_ms)))
        .initial_mtu(transport.initial_mtu)
        .mtu_discovery_config(transport.mtu_discovery.then(MtuDiscoveryConfig::default))
        .enable_segmentation_offload(transport.segmentation_offload);
    if transport.ack_threshold > 0 {
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(transport.ack_threshold));
        config.ack_frequency_config(Some(acks));
    }
    config
}

/// QUIC's settings for connections that come in by any of `cores` endpoints, which have one ticket store, token key and
/// list of used tokens, and keep the bounds together.
///
/// # Errors
/// The cryptography this was built with lacks the cipher of QUIC's first packets.
pub fn server_config(
    tls: rustls::ServerConfig,
    keys: &EndpointKeys,
    transport: &TransportConfig,
    limits: &LimitsConfig,
    cores: u16,
) -> Result<ServerConfig, TlsError> {
    let crypto =
        QuicServerConfig::try_from(tls).map_err(|e| TlsError(format!("QUIC is not available: {e}")))?;
    let token_key = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(&keys.token);
    let mut config = ServerConfig::new(Arc::new(crypto), Arc::new(token_key));
    config
        .transport_config(Arc::new(transport_config(transport)))
        .migration(true)
        .max_incoming(limits.handshakes)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFERS_BYTES / u64::from(cores.max(1)));
    Ok(config)
}

/// QUIC's settings for a core's socket: what outlives connections, and the process.
#[must_use]
pub fn endpoint_config(keys: &EndpointKeys, transport: &TransportConfig, core: Core) -> EndpointConfig {
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &keys.reset);
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    let id_key = keys.connection_id;
    config.cid_generator(move || Box::new(NotingIds::new(id_key, core))).min_reset_interval(
        Duration::from_secs(1) * u32::from(core.of()) / transport.resets_per_second.max(1),
    );
    config
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

    use quinn::crypto::rustls::QuicClientConfig;
    use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, TokioRuntime};

    use super::*;
    use crate::config::Config;

    struct World {
        _parent: tempfile::TempDir,
        folder: DataFolder,
        config: Config,
    }

    fn world() -> World {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("data");
        let folder = DataFolder::prepare(&path, &[]).unwrap();
        World { _parent: parent, folder, config: Config::in_folder(path) }
    }

    impl World {
        fn serve(&self, address: SocketAddr) -> Endpoint {
            let certificate = Certificate::load(&self.config.tls, &self.folder).unwrap();
            let tls = tls_config(&self.config.tls, certificate).unwrap();
            let keys = &self.folder.endpoint_keys;
            let server = server_config(tls, keys, &self.config.transport, &self.config.limits, 1).unwrap();
            Endpoint::new(
                endpoint_config(keys, &self.config.transport, Core::ALONE),
                Some(server),
                UdpSocket::bind(address).unwrap(),
                Arc::new(TokioRuntime),
            )
            .unwrap()
        }

        fn client(&self, alpn: &[u8]) -> Endpoint {
            let mut roots = rustls::RootCertStore::empty();
            let pem = std::fs::read(self.folder.certificate()).unwrap();
            roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let mut tls = rustls::ClientConfig::builder_with_provider(provider)
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            tls.alpn_protocols = vec![alpn.to_vec()];
            tls.enable_early_data = true;
            let mut endpoint = Endpoint::client(loopback()).unwrap();
            endpoint.set_default_client_config(ClientConfig::new(Arc::new(
                QuicClientConfig::try_from(tls).unwrap(),
            )));
            endpoint
        }
    }

    fn loopback() -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
    }

    /// Accepts connections and answers the first stream of each with one byte.
    fn answer(server: Endpoint) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            while let Some(incoming) = server.accept().await {
                tokio::spawn(async move {
                    let connection = incoming.await?;
                    let (mut send, _recv) = connection.accept_bi().await?;
                    let _ = send.write_all(&[1]).await;
                    connection.closed().await;
                    Ok::<(), ConnectionError>(())
                });
            }
        })
    }

    async fn talk(connection: &Connection) {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(&[0]).await.unwrap();
        recv.read_exact(&mut [0]).await.unwrap();
    }

    #[tokio::test]
    async fn the_second_connect_sends_early_data() {
        let world = world();
        let server = world.serve(loopback());
        let address = server.local_addr().unwrap();
        let serving = answer(server);
        let client = world.client(ALPN);
        let first = client.connect(address, "localhost").unwrap();
        let first = first.into_0rtt().map(drop).unwrap_err().await.unwrap();
        talk(&first).await;
        let (second, accepted) =
            client.connect(address, "localhost").unwrap().into_0rtt().expect("a ticket came");
        talk(&second).await;
        assert!(accepted.await, "the gateway took the early data");
        serving.abort();
    }

    #[tokio::test]
    async fn another_protocol_is_refused() {
        let world = world();
        let server = world.serve(loopback());
        let address = server.local_addr().unwrap();
        let serving = answer(server);
        let refused = world.client(b"h3").connect(address, "localhost").unwrap().await.unwrap_err();
        // TLS alert 120: no_application_protocol.
        let alert = quinn::TransportErrorCode::crypto(120);
        assert!(
            matches!(&refused, ConnectionError::ConnectionClosed(close) if close.error_code == alert),
            "{refused}"
        );
        serving.abort();
    }

    #[tokio::test]
    async fn a_restarted_gateway_tells_its_phones() {
        let world = world();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let before = {
            let _entered = runtime.enter();
            world.serve(loopback())
        };
        let address = before.local_addr().unwrap();
        runtime.spawn(async move {
            let connection = before.accept().await.unwrap().await.unwrap();
            let (mut send, _recv) = connection.accept_bi().await.unwrap();
            let _ = send.write_all(&[1]).await;
            connection.closed().await;
        });
        let client = world.client(ALPN);
        let phone = client.connect(address, "localhost").unwrap().await.unwrap();
        talk(&phone).await;
        // As kill -9 would: no goodbye leaves, the socket is gone.
        runtime.shutdown_background();
        let after = loop {
            match UdpSocket::bind(address) {
                Ok(free) => {
                    drop(free);
                    break world.serve(address);
                }
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let serving = answer(after);
        let mut send = phone.open_uni().await.unwrap();
        send.write_all(&[0; 600]).await.unwrap();
        let end = phone.closed().await;
        assert_eq!(end, ConnectionError::Reset);
        serving.abort();
    }

    #[test]
    fn a_new_certificate_is_presented_and_a_bad_one_is_not() {
        let world = world();
        let tls = TlsConfig {
            certificate: Some(world.folder.path().join("c.pem")),
            key: Some(world.folder.path().join("k.pem")),
            ..TlsConfig::default()
        };
        let put = |name: &str, from: &DataFolder| {
            std::fs::copy(from.certificate(), world.folder.path().join("c.pem")).unwrap();
            std::fs::copy(from.certificate_key(), world.folder.path().join(name)).unwrap();
        };
        put("k.pem", &world.folder);
        let certificate = Certificate::load(&tls, &world.folder).unwrap();
        let first = certificate.fingerprint();
        assert!(!certificate.reload().unwrap());
        let other = self::world();
        put("unused.pem", &other.folder);
        let error = certificate.reload().unwrap_err().to_string();
        assert!(error.contains("don't belong together: give a pair"), "{error}");
        assert_eq!(certificate.fingerprint(), first);
        put("k.pem", &other.folder);
        assert!(certificate.reload().unwrap());
        assert_ne!(certificate.fingerprint(), first);
    }

    #[test]
    fn bad_certificates_are_refused_in_one_sentence() {
        let world = world();
        let at = |name: &str| world.folder.path().join(name);
        std::fs::write(at("text"), "no PEM").unwrap();
        for (certificate, key, want) in [
            (
                at("none"),
                world.folder.certificate_key(),
                format!(
                    "certificate {} can't be read (No such file or directory (os error 2)): set tls.certificate and \
                     tls.key to files this user may read",
                    at("none").display()
                ),
            ),
            (
                at("text"),
                world.folder.certificate_key(),
                format!(
                    "certificate {} holds no BEGIN CERTIFICATE: give the chain in PEM, leaf first",
                    at("text").display()
                ),
            ),
            (
                world.folder.certificate(),
                at("text"),
                format!(
                    "private key {} holds no BEGIN PRIVATE KEY: give the certificate's key in PEM, without a passphrase",
                    at("text").display()
                ),
            ),
        ] {
            let tls = TlsConfig { certificate: Some(certificate), key: Some(key), ..TlsConfig::default() };
            assert_eq!(Certificate::load(&tls, &world.folder).unwrap_err().to_string(), want);
        }
    }
}

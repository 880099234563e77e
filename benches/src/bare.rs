//! The floors' server: quinn and nothing else, with the gateway's own transport settings.
//!
//! A client opens one bidirectional stream and says in its first byte what it wants:
//!
//! - `e`: everything that follows comes back on the same stream.
//! - `r`: it receives; the server opens a unidirectional stream to it.
//! - `s`, then a number of messages (one byte): everything that follows is messages of [`MESSAGE_BYTES`], written to
//!   every receiver, that many gathered in one write.
//!
//! Not here: a protocol, a log, acknowledgements. That is the point.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Context as _;
use bytes::Bytes;
use fulmar_gateway::{
    accept::{
        steering::Core,
        tls::{Certificate, endpoint_config, server_config, tls_config, transport_config},
    },
    config::Config,
    data_folder::DataFolder,
};
use quinn::crypto::rustls::QuicClientConfig;
use tokio::sync::Mutex as AsyncMutex;

/// Bytes of one of the floor's messages: a DELIVER with 128 bytes of payload has as many or a few less.
pub const MESSAGE_BYTES: usize = 146;

/// Bytes of packets that may wait in a client's socket, as far as the system allows.
const RECEIVE_BYTES: usize = 4 * 1024 * 1024;

/// What a receiver reads first, when the server knows it.
pub const READY: u8 = b'!';

/// Runs the server until the process is ended.
///
/// # Errors
/// It can't listen.
pub fn serve(folder: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = Config::in_folder(folder);
        let folder = DataFolder::prepare(folder, &[])?;
        let certificate = Certificate::load(&config.tls, &folder)?;
        let tls = tls_config(&config.tls, certificate)?;
        let quic = server_config(tls, &folder.endpoint_keys, &config.transport, &config.limits, 1)?;
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let settings = endpoint_config(&folder.endpoint_keys, &config.transport, Core::ALONE);
        let endpoint = quinn::Endpoint::new(settings, Some(quic), socket, Arc::new(quinn::TokioRuntime))?;
        eprintln!("Clients {}", endpoint.local_addr()?);
        let receivers = Arc::new(Receivers::default());
        while let Some(incoming) = endpoint.accept().await {
            let receivers = Arc::clone(&receivers);
            tokio::spawn(async move {
                if let Err(error) = attend(incoming, &receivers).await {
                    eprintln!("WARN {error:#}");
                }
            });
        }
        Ok(())
    })
}

#[derive(Default)]
struct Receivers {
    waiting: Mutex<Vec<quinn::SendStream>>,
    taken: AsyncMutex<Vec<quinn::SendStream>>,
}

impl Receivers {
    fn waiting(&self) -> MutexGuard<'_, Vec<quinn::SendStream>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn attend(incoming: quinn::Incoming, receivers: &Receivers) -> anyhow::Result<()> {
    // As the gateway does: what comes early is answered at once.
    let connection = match incoming.accept()?.into_0rtt() {
        Ok((connection, _)) => connection,
        Err(connecting) => connecting.await?,
    };
    let (mut send, mut recv) = connection.accept_bi().await?;
    let mut role = [0];
    recv.read_exact(&mut role).await?;
    match role {
        [b'e'] => {
            // Until the client has left, one way or the other.
            while let Ok(Some(chunk)) = recv.read_chunk(usize::MAX, true).await {
                send.write_chunk(chunk.bytes).await?;
            }
        }
        [b'r'] => {
            let mut stream = connection.open_uni().await?;
            stream.write_all(&[READY]).await?;
            receivers.waiting().push(stream);
            connection.closed().await;
        }
        [b's'] => {
            let mut gather = [0];
            recv.read_exact(&mut gather).await?;
            let [gather] = gather;
            let mut message = vec![0; MESSAGE_BYTES * usize::from(gather)];
            while recv.read_exact(&mut message).await.is_ok() {
                let shared = Bytes::copy_from_slice(&message);
                let mut streams = receivers.taken.lock().await;
                streams.append(&mut receivers.waiting());
                for stream in streams.iter_mut() {
                    stream.write_chunk(shared.clone()).await.context("a receiver left")?;
                }
            }
        }
        _ => anyhow::bail!("unknown wish"),
    }
    Ok(())
}

/// TLS 1.3 for clients that trust one certificate.
///
/// # Errors
/// It can't be read.
pub fn client_tls(certificate: &Path) -> anyhow::Result<rustls::ClientConfig> {
    let pem = std::fs::read(certificate).context("the server's certificate")?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in
        <rustls::pki_types::CertificateDer<'_> as rustls::pki_types::pem::PemObject>::pem_slice_iter(&pem)
    {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// An endpoint for clients, of the gateway as of the floors.
///
/// # Errors
/// The certificate in the server's data folder can't be read.
pub fn client_endpoint(folder: &Path) -> anyhow::Result<quinn::Endpoint> {
    client_endpoint_at(folder, Ipv4Addr::LOCALHOST)
}

/// The same with an address of its own, so that many phones are not one to whoever counts them by address. All of 127.0.0.0/8
/// is this machine.
///
/// # Errors
/// As [`client_endpoint`]; `local` is no address of this machine.
pub fn client_endpoint_at(folder: &Path, local: Ipv4Addr) -> anyhow::Result<quinn::Endpoint> {
    let mut tls = client_tls(&folder.join("tls/cert.pem"))?;
    tls.alpn_protocols = vec![fulmar_protocol::version::ALPN.to_vec()];
    // Phones of one endpoint would take up each other's sessions, as no phones do.
    tls.resumption = rustls::client::Resumption::disabled();
    client_endpoint_with(tls, local)
}

/// Settings of a client with the gateway's transport settings and this TLS, whatever the server is.
///
/// # Errors
/// QUIC can't have this TLS.
pub fn client_config(tls: rustls::ClientConfig) -> anyhow::Result<quinn::ClientConfig> {
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    let mut transport = transport_config(&Config::in_folder(Path::new("")).transport);
    // The gateway opens up to sixteen lanes and the backlog.
    transport.max_concurrent_uni_streams(32u8.into());
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// An endpoint for clients with [`client_config`].
///
/// # Errors
/// There is no socket, or QUIC can't have this TLS.
pub fn client_endpoint_with(tls: rustls::ClientConfig, local: Ipv4Addr) -> anyhow::Result<quinn::Endpoint> {
    let config = client_config(tls)?;
    let socket = std::net::UdpSocket::bind(SocketAddr::from((local, 0)))?;
    // Many phones share it: what comes for all of them at once must find room.
    let _ = socket2::SockRef::from(&socket).set_recv_buffer_size(RECEIVE_BYTES);
    let settings = quinn::EndpointConfig::default();
    let mut endpoint = quinn::Endpoint::new(settings, None, socket, Arc::new(quinn::TokioRuntime))?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

//! From a byte stream to a connection: TLS, and what the two ends agree on in it.
//!
//! - ALPN decides: the application's name means its connection at once, `http/1.1` a WebSocket first. Nothing agreed,
//!   nothing done.
//! - No limit of time is set here: whoever calls wraps the whole handshake in one.

use std::{future::Future, io, pin::Pin, sync::Arc};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};

use crate::{
    connection::{Connection, Kind, Setup},
    websocket::{self, Names, Refused},
};

/// ALPN of a stream on which a WebSocket is asked for.
pub const ALPN_HTTP: &[u8] = b"http/1.1";

/// Bytes that may wait inside TLS: one record. What waits there can't be overtaken.
const TLS_BUFFER: usize = 16 * 1024;

/// Why no connection came of a byte stream.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// TLS failed, or the stream did.
    #[error("{0}")]
    Tls(#[from] io::Error),
    /// The client's turn did not come.
    #[error("its turn did not come")]
    NoTurn,
    /// The other end speaks something else.
    #[error("no protocol in common")]
    Alpn,
    /// The name can't be that of a server.
    #[error("{0:?} is no server name")]
    ServerName(String),
    /// No WebSocket came of it.
    #[error(transparent)]
    WebSocket(#[from] Refused),
}

/// Lets a client in: directly with ALPN `alpn`, by WebSocket with [`ALPN_HTTP`]. `config` offers both.
///
/// `turn` is waited for when the client has said what it wants, and before anything is computed for it; `false` ends it there.
///
/// # Errors
/// See [`HandshakeError`].
pub async fn accept<S>(
    stream: S,
    config: Arc<rustls::ServerConfig>,
    turn: impl Future<Output = bool>,
    alpn: &[u8],
    names: Names,
    setup: Setup,
    spawn: impl FnOnce(Pin<Box<dyn Future<Output = ()> + Send>>),
) -> Result<Connection, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let asked = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
    if !turn.await {
        return Err(HandshakeError::NoTurn);
    }
    let accepting = asked.into_stream_with(config, |tls| tls.set_buffer_limit(Some(TLS_BUFFER)));
    let stream = accepting.await?;
    match stream.get_ref().1.alpn_protocol() {
        Some(agreed) if agreed == alpn => Ok(Connection::over(stream, Kind::Tls, setup, spawn)),
        Some(ALPN_HTTP) => {
            let stream = websocket::accept(stream, names).await?;
            Ok(Connection::over(stream, Kind::WebSocket, setup, spawn))
        }
        _ => Err(HandshakeError::Alpn),
    }
}

/// Connects as a client over TLS, with ALPN `alpn` and no other. `config` says whom to believe; its ALPN is not used.
///
/// # Errors
/// See [`HandshakeError`].
pub async fn connect_tls<S>(
    stream: S,
    server_name: &str,
    config: &rustls::ClientConfig,
    alpn: &[u8],
    setup: Setup,
    spawn: impl FnOnce(Pin<Box<dyn Future<Output = ()> + Send>>),
) -> Result<Connection, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = connect(stream, server_name, config, alpn).await?;
    Ok(Connection::over(stream, Kind::Tls, setup, spawn))
}

/// Connects as a client by WebSocket.
///
/// # Errors
/// See [`HandshakeError`].
pub async fn connect_websocket<S>(
    stream: S,
    server_name: &str,
    config: &rustls::ClientConfig,
    names: Names,
    setup: Setup,
    spawn: impl FnOnce(Pin<Box<dyn Future<Output = ()> + Send>>),
) -> Result<Connection, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = connect(stream, server_name, config, ALPN_HTTP).await?;
    let stream = websocket::connect(stream, server_name, names).await?;
    Ok(Connection::over(stream, Kind::WebSocket, setup, spawn))
}

async fn connect<S>(
    stream: S,
    server_name: &str,
    config: &rustls::ClientConfig,
    alpn: &[u8],
) -> Result<tokio_rustls::client::TlsStream<S>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|_| HandshakeError::ServerName(server_name.to_owned()))?;
    let mut config = config.clone();
    config.alpn_protocols = vec![alpn.to_vec()];
    let connecting = TlsConnector::from(Arc::new(config))
        .connect_with(name, stream, |tls| tls.set_buffer_limit(Some(TLS_BUFFER)));
    let stream = connecting.await?;
    if stream.get_ref().1.alpn_protocol() == Some(alpn) { Ok(stream) } else { Err(HandshakeError::Alpn) }
}

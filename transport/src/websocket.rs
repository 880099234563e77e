//! A WebSocket as a byte stream: for networks that let nothing but the web through.
//!
//! - The bytes are those of [`crate::qmux`], cut into binary messages anywhere: what is cut how means nothing. Messages of
//!   text end the stream with an error.
//! - Pings of the WebSocket are answered, and none are sent: the application has its own.
//! - Nothing is kept back: a write becomes one message, and waits for the stream below when that is full.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async_with_config, client_async_with_config,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        handshake::server::{ErrorResponse, Request, Response},
        http::{HeaderValue, StatusCode, header::SEC_WEBSOCKET_PROTOCOL},
        protocol::WebSocketConfig,
    },
};

/// Bytes of a message that is sent, and twice that of one that is taken.
const MESSAGE_BYTES: usize = 16 * 1024;

/// Where a WebSocket of an application is, and what it is called.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// Path of the HTTP request.
    pub path: &'static str,
    /// Subprotocol, which both must name.
    pub protocol: &'static str,
}

/// The other end is no WebSocket of this application.
#[derive(Debug, thiserror::Error)]
#[error("no WebSocket: {0}")]
pub struct Refused(String);

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        // Idle connections keep it.
        .read_buffer_size(4 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(4 * MESSAGE_BYTES)
        .max_message_size(Some(2 * MESSAGE_BYTES))
        .max_frame_size(Some(2 * MESSAGE_BYTES))
}

/// Asks for a WebSocket on a stream that is secure already.
///
/// # Errors
/// The other end does not answer as one.
pub async fn connect<S>(stream: S, host: &str, names: Names) -> Result<Bytestream<S>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let uri = format!("wss://{host}{}", names.path);
    let mut request = uri.into_client_request().map_err(refused)?;
    request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(names.protocol));
    let (socket, _) = client_async_with_config(request, stream, Some(config())).await.map_err(refused)?;
    Ok(Bytestream::new(socket))
}

/// Answers the request for a WebSocket. Takes as long as the client: the caller sets the limit.
///
/// # Errors
/// The client asks for something else, and was told so.
#[expect(clippy::result_large_err, reason = "the callback's type is the library's")]
pub async fn accept<S>(stream: S, names: Names) -> Result<Bytestream<S>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let check = |request: &Request, mut response: Response| {
        if request.uri().path() != names.path {
            return Err(error_response(StatusCode::NOT_FOUND));
        }
        let offered = request.headers().get_all(SEC_WEBSOCKET_PROTOCOL);
        let mut offered =
            offered.iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
        if !offered.any(|protocol| protocol.trim() == names.protocol) {
            return Err(error_response(StatusCode::BAD_REQUEST));
        }
        response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(names.protocol));
        Ok(response)
    };
    let socket = accept_hdr_async_with_config(stream, check, Some(config())).await.map_err(refused)?;
    Ok(Bytestream::new(socket))
}

fn error_response(status: StatusCode) -> ErrorResponse {
    let mut response = ErrorResponse::new(None);
    *response.status_mut() = status;
    response
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn refused(error: tungstenite::Error) -> Refused {
    Refused(error.to_string())
}

/// The bytes in a WebSocket's messages.
#[derive(Debug)]
pub struct Bytestream<S> {
    socket: WebSocketStream<S>,
    /// What came and was not read.
    message: Bytes,
}

impl<S> Bytestream<S> {
    const fn new(socket: WebSocketStream<S>) -> Self {
        Self { socket, message: Bytes::new() }
    }
}

fn failed(error: tungstenite::Error) -> io::Error {
    match error {
        tungstenite::Error::Io(error) => error,
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            io::ErrorKind::BrokenPipe.into()
        }
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Bytestream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.message.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.message = bytes,
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                // The end, as a byte stream says it.
                Some(Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed)) | None => {
                    return Poll::Ready(Ok(()));
                }
                Some(Ok(Message::Text(_))) => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, "a message of text");
                    return Poll::Ready(Err(error));
                }
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
            }
        }
        let len = self.message.len().min(buffer.remaining());
        buffer.put_slice(self.message.get(..len).unwrap_or_default());
        self.message.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Bytestream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        // Ready only when the message before has left.
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(failed)?;
        let bytes = bytes.get(..MESSAGE_BYTES).unwrap_or(bytes);
        let message = Message::Binary(Bytes::copy_from_slice(bytes));
        match Pin::new(&mut self.socket).start_send(message) {
            Ok(()) => Poll::Ready(Ok(bytes.len())),
            Err(error) => Poll::Ready(Err(failed(error))),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(failed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.socket).poll_close(cx)) {
            // Closed is what it was to be.
            Ok(()) | Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(failed(error))),
        }
    }
}

//! A connection of bytes, TLS over TCP or a stream of QUIC, with what waits to be written and what was read.
//!
//! Made to be good to the server: what a client has to say goes out in one write, and reading never waits for writing.

use std::{
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    task::{Context as TaskContext, Poll},
};

use anyhow::Context as _;
use bytes::{Buf as _, BytesMut};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// Room for reading; grows with what was not understood yet.
const READ_BYTES: usize = 4 * 1024;

/// What a server that talks first may say before TLS begins.
const GREETING_BYTES_MAX: usize = 16 * 1024;

trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// See the module's text.
pub(crate) struct Wire {
    stream: Box<dyn Stream>,
    /// What was read and not taken.
    pub(crate) input: BytesMut,
    /// What waits to be written; [`Self::more`] does.
    pub(crate) output: BytesMut,
    is_flushed: bool,
}

impl core::fmt::Debug for Wire {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Wire").field("input", &self.input.len()).finish_non_exhaustive()
    }
}

impl Wire {
    fn over(stream: impl AsyncRead + AsyncWrite + Unpin + 'static) -> Self {
        let stream = Box::new(stream);
        Self { stream, input: BytesMut::new(), output: BytesMut::new(), is_flushed: true }
    }

    /// TLS over TCP. With `greeted`, the server says a line before TLS begins; it is thrown away.
    ///
    /// # Errors
    /// The server is not there, or not who it should be.
    pub(crate) async fn tls(to: SocketAddr, tls: &TlsConnector, greeted: bool) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(to).await.context("TCP")?;
        stream.set_nodelay(true)?;
        let mut greeting = BytesMut::new();
        while greeted && !greeting.ends_with(b"\r\n") {
            anyhow::ensure!(stream.read_buf(&mut greeting).await? > 0, "the server ended the connection");
            anyhow::ensure!(greeting.len() < GREETING_BYTES_MAX, "the server's greeting has no end");
        }
        let server = ServerName::try_from("localhost")?;
        Ok(Self::over(tls.connect(server, stream).await.context("TLS")?))
    }

    /// The first stream of a QUIC connection.
    ///
    /// # Errors
    /// As above.
    pub(crate) async fn quic(to: SocketAddr, from: &quinn::Endpoint) -> anyhow::Result<Self> {
        let connection = from.connect(to, "localhost")?.await.context("QUIC")?;
        let (send, receive) = connection.open_bi().await?;
        Ok(Self::over(tokio::io::join(receive, send)))
    }

    /// Writes what waits, and reads what there is; returns when something was read. Nothing is lost when it is dropped.
    ///
    /// # Errors
    /// The connection is over.
    pub(crate) async fn more(&mut self) -> anyhow::Result<()> {
        poll_fn(|cx| self.poll_more(cx)).await
    }

    fn poll_more(&mut self, cx: &mut TaskContext<'_>) -> Poll<anyhow::Result<()>> {
        while !self.output.is_empty() {
            let Poll::Ready(written) = Pin::new(&mut self.stream).poll_write(cx, &self.output) else { break };
            self.output.advance(written?);
            self.is_flushed = false;
        }
        if !self.is_flushed
            && let Poll::Ready(flushed) = Pin::new(&mut self.stream).poll_flush(cx)
        {
            flushed?;
            self.is_flushed = true;
        }
        self.input.reserve(READ_BYTES);
        // It keeps nothing between polls.
        let reading = std::pin::pin!(self.stream.read_buf(&mut self.input));
        if std::task::ready!(reading.poll(cx))? == 0 {
            return Poll::Ready(Err(anyhow::anyhow!("the server ended the connection")));
        }
        Poll::Ready(Ok(()))
    }
}

//! TCP as the streams above it want it.

use std::{
    fmt, io,
    net::SocketAddr,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};

/// Bytes the system may hold that were not sent yet. What is in there can't be overtaken any more: 16 KiB are half a
/// second of a line with 256 kbit/s.
#[cfg(any(target_os = "linux", target_os = "android"))]
const UNSENT_BYTES: u32 = 16 * 1024;

/// Sends at once, and keeps little that was not sent yet, so that what matters more can still go first.
///
/// # Errors
/// The socket is gone.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES)?;
    Ok(())
}

/// Something that carries bytes in order, both ways.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// Where byte streams come in: the system's TCP, or a simulated one.
pub trait Listen: Send + fmt::Debug {
    /// The next stream, and where it comes from.
    ///
    /// # Errors
    /// That stream, or the system for now: it may be called again.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Box<dyn ByteStream>, SocketAddr)>>;

    /// Where it listens.
    ///
    /// # Errors
    /// The socket is gone.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

impl Listen for TcpListener {
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Box<dyn ByteStream>, SocketAddr)>> {
        let (stream, from) = ready!(Self::poll_accept(self, cx))?;
        tune(&stream)?;
        Poll::Ready(Ok((Box::new(stream), from)))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Self::local_addr(self)
    }
}

//! Byte streams of the world, as the SDK and the gateway see them.
//!
//! Not here: how bytes travel (`tcp`), over which link (`network`).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use fulmar_transport::tcp::{ByteStream, Listen};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::network::{Net, PhoneId, Side};
use crate::tcp::{Broken, Read};

/// One end of a stream. Dropping it ends the stream in order, or with a reset when something was not read.
#[derive(Debug)]
pub(crate) struct Stream {
    net: Arc<Net>,
    id: u64,
    side: Side,
}

/// Takes the streams that phones open to an address of the gateway.
#[derive(Debug)]
pub(crate) struct Listener {
    net: Arc<Net>,
    local: SocketAddr,
}

impl Listener {
    /// Listens at `local`.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`].
    pub(crate) fn bind(net: &Arc<Net>, local: SocketAddr) -> io::Result<Self> {
        if net.listen(local) {
            Ok(Self { net: Arc::clone(net), local })
        } else {
            Err(io::ErrorKind::AddrInUse.into())
        }
    }
}

impl Listen for Listener {
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Box<dyn ByteStream>, SocketAddr)>> {
        match self.net.accept(self.local, cx.waker()) {
            Some((id, from)) => {
                let stream = Stream { net: Arc::clone(&self.net), id, side: Side::Gateway };
                Poll::Ready(Ok((Box::new(stream), from)))
            }
            None => Poll::Pending,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.net.stop_listening(self.local);
    }
}

impl Stream {
    /// Opens a stream from a phone.
    ///
    /// # Errors
    /// Refused, or nobody answered.
    pub(crate) async fn open(net: Arc<Net>, phone: PhoneId, remote: SocketAddr) -> io::Result<Self> {
        if !net.is_attached(phone) {
            return Err(io::ErrorKind::NetworkUnreachable.into());
        }
        let id = net.open(phone, remote);
        // Dropped half-way, the attempt ends with it.
        let stream = Self { net, id, side: Side::Phone };
        std::future::poll_fn(|cx| {
            let state =
                stream.net.with_end(id, Side::Phone, Some(cx.waker()), |end| (end.is_open(), end.broken()));
            match state {
                Some((true, _)) => Poll::Ready(Ok(())),
                Some((false, None)) => Poll::Pending,
                Some((false, Some(Broken::Reset))) => {
                    Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into()))
                }
                Some((false, Some(broken))) => Poll::Ready(Err(error(broken))),
                None => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
            }
        })
        .await
        .map(|()| stream)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.net.leave(self.id, self.side);
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let into = buf.initialize_unfilled();
        match self.net.with_end(self.id, self.side, Some(cx.waker()), |end| end.read(into)) {
            Some(Read::Some(len)) => {
                buf.advance(len);
                Poll::Ready(Ok(()))
            }
            Some(Read::End) => Poll::Ready(Ok(())),
            Some(Read::Wait) => Poll::Pending,
            Some(Read::Broken(broken)) => Poll::Ready(Err(error(broken))),
            None => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.net.with_end(self.id, self.side, Some(cx.waker()), |end| end.write(bytes)) {
            Some(Ok(0)) if !bytes.is_empty() => Poll::Pending,
            Some(Ok(len)) => Poll::Ready(Ok(len)),
            Some(Err(broken)) => Poll::Ready(Err(error(broken))),
            None => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.net.with_end(self.id, self.side, None, crate::tcp::End::finish);
        Poll::Ready(Ok(()))
    }
}

fn error(broken: Broken) -> io::Error {
    match broken {
        Broken::Reset => io::ErrorKind::ConnectionReset.into(),
        Broken::TimedOut => io::ErrorKind::TimedOut.into(),
    }
}

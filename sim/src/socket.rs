//! UDP sockets of the world, as quinn sees them.
//!
//! - One packet per call, no segmentation offload: every packet meets the network by itself.
//! - Sending never blocks: a link with a full queue drops, as a router does.
//!
//! Not here: what becomes of a packet (`network`).

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use crate::network::{Net, Owner};

/// A socket; closed with its last handle.
#[derive(Debug)]
pub(crate) struct Socket {
    net: Arc<Net>,
    id: u64,
    local: SocketAddr,
}

impl Socket {
    /// A socket of `owner`. Of a phone's address only the port matters.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`].
    pub(crate) fn bind(net: &Arc<Net>, owner: Owner, local: SocketAddr) -> io::Result<Arc<Self>> {
        let (id, local) = net.bind(owner, local).ok_or(io::ErrorKind::AddrInUse)?;
        Ok(Arc::new(Self { net: Arc::clone(net), id, local }))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.net.close(self.id);
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for packet in transmit.contents.chunks(size) {
            self.net.send(self.id, transmit.destination, transmit.ecn, packet);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let datagrams = self.net.receive(self.id, bufs.len().min(meta.len()), cx.waker());
        if datagrams.is_empty() {
            return Poll::Pending;
        }
        let count = datagrams.len();
        for ((datagram, buf), meta) in datagrams.into_iter().zip(bufs).zip(meta) {
            let len = datagram.bytes.len().min(buf.len());
            if let (Some(into), Some(bytes)) = (buf.get_mut(..len), datagram.bytes.get(..len)) {
                into.copy_from_slice(bytes);
            }
            *meta = RecvMeta { addr: datagram.from, len, stride: len, ecn: datagram.ecn, dst_ip: None };
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

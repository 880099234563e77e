//! What a client's QUIC sockets carry, counted where it leaves and comes in: whatever it was for, also attempts that nobody answered.
//!
//! Not here: byte streams, which count themselves (`fulmar_transport`).

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};

/// Bytes of UDP payload, of all sockets of a client.
#[derive(Debug, Default)]
pub(crate) struct Carried {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Carried {
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// A socket that counts.
pub(super) struct Metered {
    socket: Arc<dyn AsyncUdpSocket>,
    carried: Arc<Carried>,
}

impl Metered {
    pub(super) fn new(socket: Arc<dyn AsyncUdpSocket>, carried: &Arc<Carried>) -> Arc<Self> {
        Arc::new(Self { socket, carried: Arc::clone(carried) })
    }
}

impl fmt::Debug for Metered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket.fmt(f)
    }
}

impl AsyncUdpSocket for Metered {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.socket).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)?;
        self.carried.sent.fetch_add(transmit.contents.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let come = ready!(self.socket.poll_recv(cx, bufs, meta))?;
        let bytes: usize = meta.iter().take(come).map(|meta| meta.len).sum();
        self.carried.received.fetch_add(bytes as u64, Ordering::Relaxed);
        Poll::Ready(Ok(come))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}

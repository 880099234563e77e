//! One connection, whatever it runs on. The calls are quinn's, so that whoever knows quinn knows them.
//!
//! Dispatch is by enum and adds no allocation to QUIC.

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{
    error::{ClosedStream, ConnectionError, ReadError, SendDatagramError, WriteError},
    muxed::{Muxed, MuxedRecv, MuxedSend, driver},
    qmux::{Config, Direction, Side},
};

/// What a connection runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// QUIC over UDP.
    Quic,
    /// Streams over TLS over TCP.
    Tls,
    /// Streams in messages of a WebSocket.
    WebSocket,
}

impl Kind {
    /// A word for logs and metrics.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Tls => "tls",
            Self::WebSocket => "websocket",
        }
    }
}

/// What a connection has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// UDP datagrams that came; over a byte stream, reads.
    pub packets_in: u64,
    /// UDP datagrams that were sent; over a byte stream, records.
    pub packets_out: u64,
    /// Bytes that came: UDP payloads, or bytes of the byte stream inside TLS.
    pub bytes_in: u64,
    /// Bytes that were sent.
    pub bytes_out: u64,
    /// Datagrams dropped here because they found no room; not counted with QUIC.
    pub datagrams_dropped: u64,
    /// Times the peer asked for proof of a new path; never over a byte stream.
    pub path_challenges: u64,
    /// The round trip time as it is known.
    pub rtt: Duration,
}

/// A connection. Clones are handles of the same one; when the last is gone, streams included, it is closed with code 0.
#[derive(Clone, Debug)]
pub struct Connection(Inner);

#[derive(Clone, Debug)]
enum Inner {
    Quic(quinn::Connection),
    Muxed(Muxed),
}

impl From<quinn::Connection> for Connection {
    fn from(quic: quinn::Connection) -> Self {
        Self(Inner::Quic(quic))
    }
}

/// How a connection over a byte stream is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Which side this is.
    pub side: Side,
    /// The other end's address, as far as it is known.
    pub remote: SocketAddr,
    /// Bounds.
    pub config: Config,
    /// The round trip time until it was measured.
    pub initial_rtt: Duration,
}

impl Connection {
    /// A connection over a byte stream on which nothing was said yet. Its task goes to `spawn`, for example
    /// `|task| drop(tokio::spawn(task))`; it needs tokio's timer. No handshake is waited for: streams can be opened
    /// as soon as the peer's parameters are here, or at once if they are assumed.
    pub fn over<S>(
        stream: S,
        kind: Kind,
        setup: Setup,
        spawn: impl FnOnce(Pin<Box<dyn Future<Output = ()> + Send>>),
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Setup { side, remote, config, initial_rtt } = setup;
        Self(Inner::Muxed(driver::over(stream, kind, side, remote, config, initial_rtt, spawn)))
    }

    /// The connection's QUIC, if it is one: for what only QUIC has.
    #[must_use]
    pub const fn quic(&self) -> Option<&quinn::Connection> {
        match &self.0 {
            Inner::Quic(quic) => Some(quic),
            Inner::Muxed(_) => None,
        }
    }

    /// What it runs on.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match &self.0 {
            Inner::Quic(_) => Kind::Quic,
            Inner::Muxed(muxed) => muxed.kind(),
        }
    }

    /// Opens a bidirectional stream; waits while the peer allows no more.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        match &self.0 {
            Inner::Quic(quic) => {
                let (send, recv) = quic.open_bi().await?;
                Ok((send.into(), recv.into()))
            }
            Inner::Muxed(muxed) => {
                let id = muxed.open(Direction::Bi).await?;
                Ok((muxed.send_half(id).into(), muxed.recv_half(id).into()))
            }
        }
    }

    /// Opens a unidirectional stream; waits while the peer allows no more.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        match &self.0 {
            Inner::Quic(quic) => Ok(quic.open_uni().await?.into()),
            Inner::Muxed(muxed) => Ok(muxed.send_half(muxed.open(Direction::Uni).await?).into()),
        }
    }

    /// The next bidirectional stream the peer opens.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        match &self.0 {
            Inner::Quic(quic) => {
                let (send, recv) = quic.accept_bi().await?;
                Ok((send.into(), recv.into()))
            }
            Inner::Muxed(muxed) => {
                let id = muxed.accept(Direction::Bi).await?;
                Ok((muxed.send_half(id).into(), muxed.recv_half(id).into()))
            }
        }
    }

    /// The next unidirectional stream the peer opens.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        match &self.0 {
            Inner::Quic(quic) => Ok(quic.accept_uni().await?.into()),
            Inner::Muxed(muxed) => Ok(muxed.recv_half(muxed.accept(Direction::Uni).await?).into()),
        }
    }

    /// The next datagram.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        match &self.0 {
            Inner::Quic(quic) => Ok(quic.read_datagram().await?),
            Inner::Muxed(muxed) => muxed.read_datagram().await,
        }
    }

    /// Bytes of all streams that may be unacknowledged from now on; what is beyond it already stays. Over a byte stream this
    /// changes nothing: there the system's buffer is the one that waits for acknowledgements.
    pub fn set_send_window(&self, bytes: u64) {
        match &self.0 {
            Inner::Quic(quic) => quic.set_send_window(bytes),
            Inner::Muxed(_) => {}
        }
    }

    /// Queues a datagram; if there is no room, the oldest one is dropped.
    ///
    /// # Errors
    /// See [`SendDatagramError`].
    pub fn send_datagram(&self, datagram: Bytes) -> Result<(), SendDatagramError> {
        match &self.0 {
            Inner::Quic(quic) => Ok(quic.send_datagram(datagram)?),
            Inner::Muxed(muxed) => muxed.send_datagram(datagram),
        }
    }

    /// Largest datagram that can be sent now; `None`: none.
    #[must_use]
    pub fn max_datagram_size(&self) -> Option<usize> {
        match &self.0 {
            Inner::Quic(quic) => quic.max_datagram_size(),
            Inner::Muxed(muxed) => muxed.max_datagram_size(),
        }
    }

    /// Ends the connection: what was not sent is lost, and the peer learns `code` and `reason`.
    pub fn close(&self, code: u32, reason: &[u8]) {
        match &self.0 {
            Inner::Quic(quic) => quic.close(code.into(), reason),
            Inner::Muxed(muxed) => muxed.close(code.into(), reason),
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn close_reason(&self) -> Option<ConnectionError> {
        match &self.0 {
            Inner::Quic(quic) => quic.close_reason().map(Into::into),
            Inner::Muxed(muxed) => muxed.close_reason(),
        }
    }

    /// Waits until it has ended.
    pub async fn closed(&self) -> ConnectionError {
        match &self.0 {
            Inner::Quic(quic) => quic.closed().await.into(),
            Inner::Muxed(muxed) => muxed.closed().await,
        }
    }

    /// Where the peer is.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        match &self.0 {
            Inner::Quic(quic) => quic.remote_address(),
            Inner::Muxed(muxed) => muxed.remote_address(),
        }
    }

    /// What it has seen.
    #[must_use]
    pub fn stats(&self) -> Stats {
        match &self.0 {
            Inner::Quic(quic) => {
                let stats = quic.stats();
                Stats {
                    packets_in: stats.udp_rx.datagrams,
                    packets_out: stats.udp_tx.datagrams,
                    bytes_in: stats.udp_rx.bytes,
                    bytes_out: stats.udp_tx.bytes,
                    datagrams_dropped: 0,
                    path_challenges: stats.frame_rx.path_challenge,
                    rtt: stats.path.rtt,
                }
            }
            Inner::Muxed(muxed) => muxed.stats(),
        }
    }

    /// Packets or reads that came so far: it grows while the peer can be heard.
    #[must_use]
    pub fn heard(&self) -> u64 {
        self.stats().packets_in
    }

    /// The round trip time as it is known.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        match &self.0 {
            Inner::Quic(quic) => quic.rtt(),
            Inner::Muxed(muxed) => muxed.stats().rtt,
        }
    }
}

/// The sending half of a stream. Dropped without [`Self::finish`] or [`Self::reset`], it is finished.
#[derive(Debug)]
pub struct SendStream(SendInner);

#[derive(Debug)]
enum SendInner {
    Quic(quinn::SendStream),
    Muxed(MuxedSend),
}

impl From<quinn::SendStream> for SendStream {
    fn from(quic: quinn::SendStream) -> Self {
        Self(SendInner::Quic(quic))
    }
}

impl From<MuxedSend> for SendStream {
    fn from(muxed: MuxedSend) -> Self {
        Self(SendInner::Muxed(muxed))
    }
}

impl SendStream {
    /// Writes some of `bytes`.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, WriteError>> {
        match &mut self.0 {
            SendInner::Quic(quic) => Pin::new(quic).poll_write(cx, bytes).map_err(Into::into),
            SendInner::Muxed(muxed) => muxed.poll_write_copy(cx, bytes),
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// See [`WriteError`]; how much was written is not known.
    pub async fn write_all(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        match &mut self.0 {
            SendInner::Quic(quic) => Ok(quic.write_all(bytes).await?),
            SendInner::Muxed(muxed) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    let written = poll_fn(|cx| muxed.poll_write_copy(cx, rest)).await?;
                    rest = rest.get(written..).unwrap_or_default();
                }
                Ok(())
            }
        }
    }

    /// Writes a chunk without copying it.
    ///
    /// # Errors
    /// As [`Self::write_all`].
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), WriteError> {
        self.write_all_chunks(&mut [chunk]).await
    }

    /// Waits until some of `chunks` can be written, and writes without copying what can be at once: how many bytes that were.
    /// What was written is gone from the chunks.
    ///
    /// # Errors
    /// As [`Self::write_all`].
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<usize, WriteError> {
        match &mut self.0 {
            SendInner::Quic(quic) => Ok(quic.write_chunks(chunks).await?.bytes),
            SendInner::Muxed(muxed) => {
                let all = chunks.iter().map(Bytes::len).sum();
                poll_fn(|cx| muxed.poll_write_chunks(cx, chunks)).await?;
                Ok(all)
            }
        }
    }

    /// Writes chunks without copying them; they are empty afterwards.
    ///
    /// # Errors
    /// As [`Self::write_all`].
    pub async fn write_all_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), WriteError> {
        match &mut self.0 {
            SendInner::Quic(quic) => Ok(quic.write_all_chunks(chunks).await?),
            SendInner::Muxed(muxed) => poll_fn(|cx| muxed.poll_write_chunks(cx, chunks)).await,
        }
    }

    /// Says that nothing comes after what was written.
    ///
    /// # Errors
    /// It was finished or reset before.
    pub fn finish(&mut self) -> Result<(), ClosedStream> {
        match &mut self.0 {
            SendInner::Quic(quic) => quic.finish().map_err(|_| ClosedStream),
            SendInner::Muxed(muxed) => muxed.finish(),
        }
    }

    /// Gives it up.
    ///
    /// # Errors
    /// It was finished or reset before.
    pub fn reset(&mut self, code: u32) -> Result<(), ClosedStream> {
        match &mut self.0 {
            SendInner::Quic(quic) => quic.reset(code.into()).map_err(|_| ClosedStream),
            SendInner::Muxed(muxed) => muxed.reset(code.into()),
        }
    }

    /// Waits until the peer stopped it (its code) or everything is settled (`None`): with QUIC acknowledged by the
    /// peer's stack, over a byte stream handed to it.
    ///
    /// # Errors
    /// The connection ended.
    pub async fn stopped(&mut self) -> Result<Option<u64>, ConnectionError> {
        match &mut self.0 {
            SendInner::Quic(quic) => match quic.stopped().await {
                Ok(code) => Ok(code.map(quinn::VarInt::into_inner)),
                Err(quinn::StoppedError::ConnectionLost(error)) => Err(error.into()),
                Err(quinn::StoppedError::ZeroRttRejected) => {
                    Err(ConnectionError::Lost("0-RTT rejected".into()))
                }
            },
            SendInner::Muxed(muxed) => poll_fn(|cx| muxed.poll_stopped(cx)).await,
        }
    }

    /// Higher ones are sent first; 0 at the beginning.
    ///
    /// # Errors
    /// It is over.
    pub fn set_priority(&self, priority: i32) -> Result<(), ClosedStream> {
        match &self.0 {
            SendInner::Quic(quic) => quic.set_priority(priority).map_err(|_| ClosedStream),
            SendInner::Muxed(muxed) => muxed.set_priority(priority),
        }
    }
}

/// The receiving half of a stream. Dropped before its end was read, it is stopped with code 0.
#[derive(Debug)]
pub struct RecvStream(RecvInner);

#[derive(Debug)]
enum RecvInner {
    Quic(quinn::RecvStream),
    Muxed(MuxedRecv),
}

impl From<quinn::RecvStream> for RecvStream {
    fn from(quic: quinn::RecvStream) -> Self {
        Self(RecvInner::Quic(quic))
    }
}

impl From<MuxedRecv> for RecvStream {
    fn from(muxed: MuxedRecv) -> Self {
        Self(RecvInner::Muxed(muxed))
    }
}

impl RecvStream {
    /// Takes up to `max` bytes, in order; `None` at the end.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn poll_read_chunk(
        &mut self,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, ReadError>> {
        match &mut self.0 {
            RecvInner::Quic(quic) => match pin!(quic.read_chunk(max, true)).poll(cx) {
                Poll::Ready(Ok(chunk)) => Poll::Ready(Ok(chunk.map(|chunk| chunk.bytes))),
                Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
                Poll::Pending => Poll::Pending,
            },
            RecvInner::Muxed(muxed) => muxed.poll_read_chunk(cx, max),
        }
    }

    /// Waits for up to `max` bytes, in order; `None` at the end. Nothing is lost when it is dropped.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, ReadError> {
        poll_fn(|cx| self.poll_read_chunk(cx, max)).await
    }

    /// Reads no more; the peer is told `code`.
    ///
    /// # Errors
    /// Its end was read, or it was stopped before.
    pub fn stop(&mut self, code: u32) -> Result<(), ClosedStream> {
        match &mut self.0 {
            RecvInner::Quic(quic) => quic.stop(code.into()).map_err(|_| ClosedStream),
            RecvInner::Muxed(muxed) => muxed.stop(code.into()),
        }
    }
}

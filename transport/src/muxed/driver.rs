//! The task of a connection over a byte stream: it reads, writes and keeps the time.
//!
//! - **Nothing waits here but one record.** The next one is chosen when the one before has left for good (written and
//!   flushed), so that a live message overtakes all backlog that is not in the system's own buffer. How much that
//!   buffer holds is for whoever made the stream to say ([`crate::tcp::tune`]).
//! - It always reads: what may come is bounded by the windows, and a window update must get through.
//! - A close is written and the stream is shut down before it is let go of, for at most [`LINGER`].
//! - Time is tokio's, so a paused clock is a simulator's. When the task is dropped, its handles learn of it.

use std::{
    future::Future,
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use super::{Muxed, Shared};
use crate::{
    connection::Kind,
    error::ConnectionError,
    qmux::{Config, Mux, Side},
};

/// Bytes read at once, and taken in before anything else is done.
const READ_BYTES: usize = 16 * 1024;

/// Reads and writes in a row before others have their turn.
const TURNS_MAX: usize = 32;

/// How long a close may take to be written and heard.
const LINGER: Duration = Duration::from_secs(2);

/// How old a round trip may be before it is measured again, with the next thing that is sent.
const MEASURE_EVERY: Duration = Duration::from_secs(30);

/// Runs the multiplexer over `io` in a task that `spawn` gets.
pub(crate) fn over<S>(
    io: S,
    kind: Kind,
    side: Side,
    remote: SocketAddr,
    config: Config,
    initial_rtt: Duration,
    spawn: impl FnOnce(Pin<Box<dyn Future<Output = ()> + Send>>),
) -> Muxed
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shared = Arc::new(Shared::new(Mux::new(side, config), kind, remote, initial_rtt));
    let now = Instant::now();
    let driver = Driver {
        io,
        shared: Arc::clone(&shared),
        record: Bytes::new(),
        unflushed: false,
        alive: now,
        heard: true,
        idle: None,
        closing: None,
        shut: false,
    };
    spawn(Box::pin(driver));
    Muxed::new(shared)
}

struct Driver<S> {
    io: S,
    shared: Arc<Shared>,
    /// What is being written.
    record: Bytes,
    unflushed: bool,
    /// When the connection was last known to be alive, and whether something was heard since the last write.
    alive: Instant,
    heard: bool,
    /// The idle timer and the timeout it was set for.
    idle: Option<(Duration, Pin<Box<Sleep>>)>,
    /// Until when the close is cared for.
    closing: Option<Pin<Box<Sleep>>>,
    /// The sending direction is shut down.
    shut: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Driver<S> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        match this.work(cx) {
            Poll::Ready(error) => {
                let mut state = this.shared.lock();
                this.shared.end(&mut state, error);
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S> Drop for Driver<S> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        self.shared.end(&mut state, ConnectionError::Lost("its task was stopped".into()));
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    /// Ready with the reason when there is nothing left to do.
    fn work(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionError> {
        self.shared.lock().driver = Some(cx.waker().clone());
        for _ in 0..TURNS_MAX {
            let wrote = match self.write(cx) {
                Ok(wrote) => wrote,
                Err(error) => return Poll::Ready(lost(&error)),
            };
            let read = match self.read(cx) {
                Ok(read) => read,
                Err(error) => return Poll::Ready(error),
            };
            let over = self.shared.lock().mux.ended().is_some();
            if over && self.linger(cx).is_ready() {
                // The reason was told before.
                return Poll::Ready(ConnectionError::LocallyClosed);
            }
            if !over && self.keep_time(cx).is_ready() {
                return Poll::Ready(ConnectionError::TimedOut);
            }
            if !wrote && !read {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes one record; `true` when that was done.
    fn write(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let wrote = self.write_record(cx)?;
        self.shared.lock().stuck = !self.record.is_empty() || self.unflushed;
        Ok(wrote)
    }

    fn write_record(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        if self.record.is_empty() && !self.unflushed {
            let Some(record) = self.next_record() else { return Ok(false) };
            self.record = record;
            if std::mem::take(&mut self.heard) {
                // As in QUIC: what is sent after something was heard shows that somebody lives here, not more of it.
                self.alive = Instant::now();
            }
        }
        while !self.record.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, &self.record) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(written)) => {
                    self.record.advance(written);
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(false),
            }
        }
        match Pin::new(&mut self.io).poll_flush(cx) {
            Poll::Ready(Ok(())) => {
                self.unflushed = false;
                self.record = Bytes::new();
                Ok(true)
            }
            Poll::Ready(Err(error)) => Err(error),
            Poll::Pending => Ok(false),
        }
    }

    fn next_record(&self) -> Option<Bytes> {
        let mut state = self.shared.lock();
        if !state.mux.wants_transmit() {
            return None;
        }
        let now = Instant::now();
        let old = state.measured.is_none_or(|measured| now - measured >= MEASURE_EVERY);
        // Who sends and hears nothing asks: there are no acknowledgements that would keep the connection alive.
        let silence = state.mux.idle_timeout_ms().map(|timeout| Duration::from_millis(timeout / 3));
        let old = old || silence.is_some_and(|silence| now - self.alive >= silence);
        if old && state.pinged.is_none() && state.mux.ended().is_none() {
            let number = state.mux.ping();
            state.pinged = Some((number, now));
        }
        let record = state.mux.transmit(usize::MAX)?;
        state.stats.packets_out += 1;
        state.stats.bytes_out += record.len() as u64;
        self.shared.settle(&mut state);
        Some(record)
    }

    /// Reads once; `true` when something came.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        // On the stack, so that idle connections keep no buffer.
        let mut space = [MaybeUninit::uninit(); READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut space);
        match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
            Poll::Pending => return Ok(false),
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Err(lost(&error)),
        }
        let bytes = Bytes::copy_from_slice(buffer.filled());
        let mut state = self.shared.lock();
        if bytes.is_empty() {
            return Err(ConnectionError::Lost("the byte stream ended".into()));
        }
        self.alive = Instant::now();
        self.heard = true;
        state.stats.packets_in += 1;
        state.stats.bytes_in += bytes.len() as u64;
        // A violation ends the multiplexer, which is what is looked at.
        let _ = state.mux.receive(bytes);
        self.shared.settle(&mut state);
        Ok(true)
    }

    /// Sees the close off; ready when it was, or when that took too long.
    fn linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = self.closing.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        if deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let written = self.record.is_empty() && !self.unflushed && !self.shared.lock().mux.wants_transmit();
        if written && !self.shut {
            match Pin::new(&mut self.io).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => self.shut = true,
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
        // The peer's end of the stream comes next, in `read`; letting go earlier could take the close back, because
        // bytes that nobody reads are answered with a reset.
        let remotely = matches!(self.shared.lock().mux.ended(), Some(crate::qmux::Ended::Remotely(_)));
        if self.shut && remotely { Poll::Ready(()) } else { Poll::Pending }
    }

    fn keep_time(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(timeout) = self.shared.lock().mux.idle_timeout_ms().map(Duration::from_millis) else {
            return Poll::Pending;
        };
        let alive = self.alive;
        let fresh = || (timeout, Box::pin(tokio::time::sleep_until(alive + timeout)));
        let (set_for, sleep) = self.idle.get_or_insert_with(fresh);
        if *set_for != timeout {
            *set_for = timeout;
            sleep.as_mut().reset(alive + timeout);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            // It is not moved with every byte: it looks when it fires.
            if sleep.deadline() >= alive + timeout {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(alive + timeout);
        }
        Poll::Pending
    }
}

fn lost(error: &io::Error) -> ConnectionError {
    ConnectionError::Lost(error.to_string().into())
}

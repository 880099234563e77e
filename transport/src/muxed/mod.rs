//! Connections over a byte stream: what their handles do, each for a moment, on the state they share with the task that
//! reads and writes ([`driver`]).
//!
//! - One lock per connection, never held over a wait.
//! - When the last handle is gone the connection is closed with code 0, as quinn does it.
//!
//! Not here: the rules of the streams ([`crate::qmux`]).

pub(crate) mod driver;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::Notify, time::Instant};

use crate::{
    connection::{Kind, Stats},
    error::{ClosedStream, ConnectionError, ReadError, SendDatagramError, WriteError},
    qmux::{self, Direction, Event, Mux, StreamId},
};

/// A handle of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Muxed(Arc<Handle>);

/// What all handles of a connection hold together.
#[derive(Debug)]
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close(0, Bytes::new());
    }
}

/// What handles and driver share.
#[derive(Debug)]
pub(crate) struct Shared {
    kind: Kind,
    remote: SocketAddr,
    state: Mutex<State>,
    opened: [Notify; 2],
    available: [Notify; 2],
    datagrams: Notify,
    closed: Notify,
}

#[derive(Debug)]
pub(crate) struct State {
    mux: Mux,
    driver: Option<Waker>,
    /// The byte stream takes nothing more for now, and wakes the driver itself when it does.
    stuck: bool,
    readers: BTreeMap<StreamId, Waker>,
    writers: BTreeMap<StreamId, Waker>,
    stopped: BTreeMap<StreamId, Vec<Waker>>,
    error: Option<ConnectionError>,
    stats: Stats,
    /// The ping that is under way, and since when.
    pinged: Option<(u64, Instant)>,
    measured: Option<Instant>,
}

impl Shared {
    fn new(mux: Mux, kind: Kind, remote: SocketAddr, rtt: Duration) -> Self {
        let state = State {
            mux,
            driver: None,
            stuck: false,
            readers: BTreeMap::new(),
            writers: BTreeMap::new(),
            stopped: BTreeMap::new(),
            error: None,
            stats: Stats { rtt, ..Stats::default() },
            pinged: None,
            measured: None,
        };
        Self {
            kind,
            remote,
            state: Mutex::new(state),
            opened: [Notify::new(), Notify::new()],
            available: [Notify::new(), Notify::new()],
            datagrams: Notify::new(),
            closed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The multiplexer leaves nothing half done when it returns.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with a connection that has not ended, and sees to what follows from it.
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> Result<T, ConnectionError> {
        let mut state = self.lock();
        if let Some(error) = &state.error {
            return Err(error.clone());
        }
        let acted = act(&mut state);
        self.settle(&mut state);
        // Driver and handles may share a task: woken for nothing, it would look again, and wake it again, without end.
        let heeds = !state.stuck || state.mux.ended().is_some();
        if heeds
            && state.mux.wants_transmit()
            && let Some(driver) = state.driver.take()
        {
            driver.wake();
        }
        Ok(acted)
    }

    /// Wakes whoever waits for what has happened.
    fn settle(&self, state: &mut State) {
        while let Some(event) = state.mux.poll_event() {
            match event {
                Event::Opened(direction) => notify(&self.opened, direction),
                Event::Available(direction) => notify(&self.available, direction),
                Event::Readable(id) => wake(state.readers.remove(&id)),
                Event::Writable(id) => {
                    wake(state.writers.remove(&id));
                    wake(state.stopped.remove(&id).into_iter().flatten());
                }
                Event::Datagram => self.datagrams.notify_waiters(),
                Event::Pong(number) => state.ponged(number),
            }
        }
        if let Some(ended) = state.mux.ended()
            && state.error.is_none()
        {
            let error = ended.into();
            self.end(state, error);
        }
    }

    /// The connection is over for everybody who holds it. The first reason counts.
    fn end(&self, state: &mut State, error: ConnectionError) {
        if state.error.is_none() {
            state.error = Some(error);
        }
        // In the order of their ids: a simulated world repeats itself.
        wake(std::mem::take(&mut state.readers).into_values());
        wake(std::mem::take(&mut state.writers).into_values());
        wake(std::mem::take(&mut state.stopped).into_values().flatten());
        self.opened.iter().chain(&self.available).for_each(Notify::notify_waiters);
        self.datagrams.notify_waiters();
        self.closed.notify_waiters();
    }

    fn close(&self, code: u64, reason: Bytes) {
        let _ = self.with(|state| state.mux.close(code, reason));
    }
}

impl State {
    fn ponged(&mut self, number: u64) {
        let Some((pinged, since)) = self.pinged else { return };
        if pinged == number {
            let sample = since.elapsed();
            let rtt = &mut self.stats.rtt;
            *rtt = if self.measured.is_none() { sample } else { (*rtt * 7 + sample) / 8 };
            self.measured = Some(Instant::now());
            self.pinged = None;
        }
    }
}

fn notify(notifies: &[Notify; 2], direction: Direction) {
    if let Some(notify) = notifies.get(direction.index()) {
        notify.notify_waiters();
    }
}

fn wake(wakers: impl IntoIterator<Item = Waker>) {
    wakers.into_iter().for_each(Waker::wake);
}

impl Muxed {
    fn new(shared: Arc<Shared>) -> Self {
        Self(Arc::new(Handle(shared)))
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// Waits until `ready` has something.
    async fn wait<T>(
        &self,
        notify: &Notify,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, ConnectionError> {
        loop {
            // Made before the look, so that nothing is missed in between.
            let notified = notify.notified();
            if let Some(found) = self.shared().with(&mut ready)? {
                return Ok(found);
            }
            notified.await;
        }
    }

    pub(crate) async fn open(&self, direction: Direction) -> Result<StreamId, ConnectionError> {
        let [bi, uni] = &self.shared().available;
        let notify = if direction == Direction::Bi { bi } else { uni };
        self.wait(notify, |state| state.mux.open(direction).ok()).await
    }

    pub(crate) async fn accept(&self, direction: Direction) -> Result<StreamId, ConnectionError> {
        let [bi, uni] = &self.shared().opened;
        let notify = if direction == Direction::Bi { bi } else { uni };
        self.wait(notify, |state| state.mux.accept(direction).ok()).await
    }

    pub(crate) fn send_half(&self, id: StreamId) -> MuxedSend {
        MuxedSend { connection: self.clone(), id }
    }

    pub(crate) fn recv_half(&self, id: StreamId) -> MuxedRecv {
        MuxedRecv { connection: self.clone(), id, over: false }
    }

    pub(crate) async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        self.wait(&self.shared().datagrams, |state| state.mux.read_datagram()).await
    }

    pub(crate) fn send_datagram(&self, datagram: Bytes) -> Result<(), SendDatagramError> {
        let sent = self.shared().with(|state| match state.mux.max_datagram_size() {
            None => Err(SendDatagramError::Unsupported),
            Some(_) if state.mux.send_datagram(datagram) => Ok(()),
            Some(_) => Err(SendDatagramError::TooLarge),
        });
        sent?
    }

    pub(crate) fn max_datagram_size(&self) -> Option<usize> {
        self.shared().lock().mux.max_datagram_size()
    }

    pub(crate) fn close(&self, code: u64, reason: &[u8]) {
        self.shared().close(code, Bytes::copy_from_slice(reason));
    }

    pub(crate) fn close_reason(&self) -> Option<ConnectionError> {
        self.shared().lock().error.clone()
    }

    pub(crate) async fn closed(&self) -> ConnectionError {
        loop {
            let notified = self.shared().closed.notified();
            if let Some(error) = self.close_reason() {
                return error;
            }
            notified.await;
        }
    }

    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.shared().remote
    }

    pub(crate) fn kind(&self) -> Kind {
        self.shared().kind
    }

    pub(crate) fn stats(&self) -> Stats {
        let state = self.shared().lock();
        Stats { datagrams_dropped: state.mux.datagrams_dropped(), ..state.stats }
    }
}

impl From<qmux::WriteError> for WriteError {
    fn from(error: qmux::WriteError) -> Self {
        match error {
            qmux::WriteError::Stopped(code) => Self::Stopped(code),
            // Who is blocked waits and is told nothing.
            qmux::WriteError::Closed | qmux::WriteError::Blocked => Self::ClosedStream,
        }
    }
}

/// The sending half of a stream.
#[derive(Debug)]
pub(crate) struct MuxedSend {
    connection: Muxed,
    id: StreamId,
}

impl MuxedSend {
    /// Writes from the front of `chunks`, which become empty; ready when all are.
    pub(crate) fn poll_write_chunks(
        &mut self,
        cx: &mut Context<'_>,
        chunks: &mut [Bytes],
    ) -> Poll<Result<(), WriteError>> {
        let id = self.id;
        let written = self.connection.shared().with(|state| {
            for chunk in chunks {
                while !chunk.is_empty() {
                    match state.mux.write(id, chunk) {
                        Ok(_) => {}
                        Err(qmux::WriteError::Blocked) => {
                            state.writers.insert(id, cx.waker().clone());
                            return Poll::Pending;
                        }
                        Err(error) => return Poll::Ready(Err(error.into())),
                    }
                }
            }
            Poll::Ready(Ok(()))
        });
        written.unwrap_or_else(|error| Poll::Ready(Err(error.into())))
    }

    /// Writes a copy of a part of `bytes`.
    pub(crate) fn poll_write_copy(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, WriteError>> {
        const COPY_MAX: usize = 16 * 1024;
        let id = self.id;
        let mut copy = Bytes::copy_from_slice(bytes.get(..COPY_MAX).unwrap_or(bytes));
        let written = self.connection.shared().with(|state| match state.mux.write(id, &mut copy) {
            Ok(written) => Poll::Ready(Ok(written)),
            Err(qmux::WriteError::Blocked) => {
                state.writers.insert(id, cx.waker().clone());
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(error.into())),
        });
        written.unwrap_or_else(|error| Poll::Ready(Err(error.into())))
    }

    pub(crate) fn finish(&mut self) -> Result<(), ClosedStream> {
        let id = self.id;
        match self.connection.shared().with(|state| state.mux.finish(id)) {
            Ok(finished) => finished.map_err(|_| ClosedStream),
            // As in quinn, a connection that is gone is told of by whatever comes next.
            Err(_) => Ok(()),
        }
    }

    pub(crate) fn reset(&mut self, code: u64) -> Result<(), ClosedStream> {
        let id = self.id;
        match self.connection.shared().with(|state| state.mux.reset(id, code)) {
            Ok(reset) => reset.map_err(|_| ClosedStream),
            Err(_) => Ok(()),
        }
    }

    pub(crate) fn set_priority(&self, priority: i32) -> Result<(), ClosedStream> {
        let id = self.id;
        match self.connection.shared().with(|state| state.mux.set_priority(id, priority)) {
            Ok(set) => set.map_err(|_| ClosedStream),
            Err(_) => Err(ClosedStream),
        }
    }

    pub(crate) fn poll_stopped(&self, cx: &mut Context<'_>) -> Poll<Result<Option<u64>, ConnectionError>> {
        let id = self.id;
        let stopped = self.connection.shared().with(|state| match state.mux.stopped(id) {
            Some(code) => Poll::Ready(Ok(code)),
            None => {
                let wakers = state.stopped.entry(id).or_default();
                if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                    wakers.push(cx.waker().clone());
                }
                Poll::Pending
            }
        });
        stopped.unwrap_or_else(|error| Poll::Ready(Err(error)))
    }
}

impl Drop for MuxedSend {
    fn drop(&mut self) {
        let id = self.id;
        let _ = self.connection.shared().with(|state| {
            state.writers.remove(&id);
            state.stopped.remove(&id);
            state.mux.release_send(id);
        });
    }
}

/// The receiving half of a stream.
#[derive(Debug)]
pub(crate) struct MuxedRecv {
    connection: Muxed,
    id: StreamId,
    /// Its end was read.
    over: bool,
}

impl MuxedRecv {
    pub(crate) fn poll_read_chunk(
        &mut self,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<Result<Option<Bytes>, ReadError>> {
        let id = self.id;
        if self.over {
            return Poll::Ready(Ok(None));
        }
        let read = self.connection.shared().with(|state| match state.mux.read(id, max) {
            Ok(read) => Poll::Ready(Ok(read)),
            Err(qmux::ReadError::Blocked) => {
                state.readers.insert(id, cx.waker().clone());
                Poll::Pending
            }
            Err(qmux::ReadError::Reset(code)) => Poll::Ready(Err(ReadError::Reset(code))),
            Err(qmux::ReadError::Closed) => Poll::Ready(Err(ReadError::ClosedStream)),
        });
        let read = read.unwrap_or_else(|error| Poll::Ready(Err(error.into())));
        self.over |= matches!(read, Poll::Ready(Ok(None) | Err(ReadError::Reset(_))));
        read
    }

    pub(crate) fn stop(&mut self, code: u64) -> Result<(), ClosedStream> {
        let id = self.id;
        match self.connection.shared().with(|state| state.mux.stop(id, code)) {
            Ok(stopped) => stopped.map_err(|_| ClosedStream),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for MuxedRecv {
    fn drop(&mut self) {
        let id = self.id;
        let over = self.over;
        let _ = self.connection.shared().with(|state| {
            state.readers.remove(&id);
            if !over {
                let _ = state.mux.stop(id, 0);
            }
        });
    }
}

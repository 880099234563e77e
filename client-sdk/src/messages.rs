//! The streams an app reads: messages, connection states, events.
//!
//! Messages are read from the database, not queued: an app that is slow costs no memory, and one that was killed goes
//! on where it was. A message counts as taken when the app asks for the next one (or says [`Messages::done`]); what was
//! not taken is handed out again by the next run.

use std::{collections::VecDeque, sync::Arc};

use futures_util::{Stream, stream};
use tokio::sync::{broadcast, watch};

use crate::{
    client::Shared,
    event::{ClientEvent, ConnectionState, Received},
};

/// Messages read from the database at once.
const PAGE: usize = 64;

/// The messages of a client, each once per database. One stream at a time: a newer one takes over.
#[derive(Debug)]
pub struct Messages {
    shared: Arc<Shared>,
    arrivals: watch::Receiver<u64>,
    readers: watch::Receiver<u64>,
    generation: u64,
    /// Arrival up to which pages were read; `None` before the first.
    position: Option<u64>,
    page: VecDeque<Received>,
    /// The arrival handed out last, not taken yet.
    out: Option<u64>,
}

impl Messages {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let mut generation = 0;
        shared.readers.send_modify(|readers| {
            *readers += 1;
            generation = *readers;
        });
        let (arrivals, readers) = (shared.arrivals.subscribe(), shared.readers.subscribe());
        Self { shared, arrivals, readers, generation, position: None, page: VecDeque::new(), out: None }
    }

    /// The next message; the one before it counts as taken from now on. `None` when the client is closed, its database
    /// failed, or a newer stream took over. Dropping the future loses nothing.
    ///
    /// "Taken" is written down a little later. An app that is killed before that is handed the last messages again when it comes
    /// back, under the same [`Received::arrival`]: who must handle each once remembers the highest one together with what it
    /// did, and skips what is not above it.
    pub async fn next(&mut self) -> Option<Received> {
        self.done();
        loop {
            if *self.readers.borrow() != self.generation {
                return None;
            }
            if let Some(message) = self.page.pop_front() {
                self.out = Some(message.arrival);
                return Some(message);
            }
            let newest = *self.arrivals.borrow_and_update();
            let position = self.position;
            let (position, page) = self
                .shared
                .db
                .run(false, move |store| {
                    let position = match position {
                        Some(position) => position,
                        None => store.taken()?,
                    };
                    Ok((position, store.page(position, PAGE)?))
                })
                .await
                .ok()?;
            self.position = Some(page.last().map_or(position, |last| last.arrival));
            self.page = page.into();
            if self.page.is_empty() && *self.arrivals.borrow() == newest {
                let mut closed = self.shared.closed.subscribe();
                tokio::select! {
                    biased;
                    _ = self.arrivals.wait_for(|arrival| *arrival != newest) => {}
                    _ = self.readers.changed() => {}
                    _ = closed.wait_for(|closed| *closed) => return None,
                }
            }
        }
    }

    /// The message handed out last is taken: it is never handed out again.
    pub fn done(&mut self) {
        if let Some(arrival) = self.out.take() {
            self.shared.take(arrival);
        }
    }

    /// The same as a [`Stream`].
    pub fn into_stream(self) -> impl Stream<Item = Received> + Send {
        stream::unfold(self, |mut messages| async move { Some((messages.next().await?, messages)) })
    }
}

/// The states of a client's connection.
#[derive(Clone, Debug)]
pub struct States {
    states: watch::Receiver<ConnectionState>,
}

impl States {
    pub(crate) fn new(mut states: watch::Receiver<ConnectionState>) -> Self {
        states.mark_changed();
        Self { states }
    }

    /// The state now.
    #[must_use]
    pub fn current(&self) -> ConnectionState {
        self.states.borrow().clone()
    }

    /// The next state, the first time the current one; states that pass quickly may be skipped. `None` after the last.
    pub async fn next(&mut self) -> Option<ConnectionState> {
        self.states.changed().await.ok()?;
        Some(self.states.borrow_and_update().clone())
    }

    /// Waits until the client is connected and up to date; `false` when it was closed instead.
    pub async fn live(&mut self) -> bool {
        let live =
            |state: &ConnectionState| matches!(state, ConnectionState::Live | ConnectionState::Closed { .. });
        matches!(self.states.wait_for(live).await.as_deref(), Ok(ConnectionState::Live))
    }

    /// The same as a [`Stream`].
    pub fn into_stream(self) -> impl Stream<Item = ConnectionState> + Send {
        stream::unfold(self, |mut states| async move { Some((states.next().await?, states)) })
    }
}

/// Things that pass by; who does not look misses them.
#[derive(Debug)]
pub struct Events {
    events: broadcast::Receiver<ClientEvent>,
    shared: Arc<Shared>,
}

impl Events {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { events: shared.events.subscribe(), shared }
    }

    /// The next event; `None` when the client is closed.
    pub async fn next(&mut self) -> Option<ClientEvent> {
        let mut closed = self.shared.closed.subscribe();
        tokio::select! {
            biased;
            event = self.events.recv() => match event {
                Ok(event) => Some(event),
                Err(broadcast::error::RecvError::Lagged(missed)) => Some(ClientEvent::Missed(missed)),
                Err(broadcast::error::RecvError::Closed) => None,
            },
            _ = closed.wait_for(|closed| *closed) => None,
        }
    }

    /// The same as a [`Stream`].
    pub fn into_stream(self) -> impl Stream<Item = ClientEvent> + Send {
        stream::unfold(self, |mut events| async move { Some((events.next().await?, events)) })
    }
}

//! The sockets, and who is let through them.
//!
//! - Every attempt is counted from its first packet to the end of its connection, in all and by IP address, whether it comes by
//!   UDP or by TCP; the counts decide ([`super::admission`]).
//! - One task per connection; a handshake that stalls ends by its own timeout.
//! - Each core has an endpoint; all of them share the counts. In a drain an endpoint goes on refusing until everybody has left
//!   all of them.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use fulmar_transport::Kind;
use tokio::{sync::Barrier, task::JoinSet};
use tracing::{Instrument, debug, warn};

use super::{
    admission::{Load, Refused, Verdict, admit},
    book::Book,
    resets::first_id,
    stream::{Streams, next_stream},
    waiting::{Asked, Turn, Turns, Waiting},
};
use crate::{
    connection::serve,
    context::Context,
    drain::Drain,
    metrics::{CoreNumber, Metrics},
};

/// Attempts that are judged between two handshakes that begin: refusing them, or asking them to prove their address, costs little.
const TAKEN_MAX: usize = 64;

/// Who is here, over all endpoints of the gateway.
#[derive(Debug, Default)]
pub struct Counts {
    connections: usize,
    handshakes: usize,
    by_address: HashMap<IpAddr, (usize, usize)>,
}

/// What is going on when an attempt comes in from `address`.
pub(super) fn load(counts: &Mutex<Counts>, address: IpAddr, validated: bool, draining: bool) -> Load {
    let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    let (connections_of_address, handshakes_of_address) =
        counts.by_address.get(&address).copied().unwrap_or_default();
    Load {
        connections: counts.connections,
        connections_of_address,
        handshakes: counts.handshakes,
        handshakes_of_address,
        validated,
        draining,
    }
}

/// Counts one attempt until it is dropped.
#[derive(Debug)]
pub(super) struct Counted {
    counts: Arc<Mutex<Counts>>,
    address: IpAddr,
    handshaking: bool,
}

impl Counted {
    pub(super) fn new(counts: &Arc<Mutex<Counts>>, address: IpAddr) -> Self {
        let mut guard = counts.lock().unwrap_or_else(PoisonError::into_inner);
        guard.handshakes += 1;
        guard.by_address.entry(address).or_default().1 += 1;
        drop(guard);
        Self { counts: Arc::clone(counts), address, handshaking: true }
    }

    pub(super) fn connected(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.handshakes -= 1;
        counts.connections += 1;
        let of_address = counts.by_address.entry(self.address).or_default();
        of_address.0 += 1;
        of_address.1 = of_address.1.saturating_sub(1);
        self.handshaking = false;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(of_address) = counts.by_address.get_mut(&self.address) else { return };
        if self.handshaking {
            of_address.1 = of_address.1.saturating_sub(1);
        } else {
            of_address.0 = of_address.0.saturating_sub(1);
        }
        if *of_address == (0, 0) {
            counts.by_address.remove(&self.address);
        }
        if self.handshaking {
            counts.handshakes -= 1;
        } else {
            counts.connections -= 1;
        }
    }
}

/// What the endpoints of a gateway share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Which of the endpoints this is.
    pub core: u16,
    /// What connections share.
    pub context: Arc<Context>,
    /// Who is connected by QUIC is noted here.
    pub book: Arc<Book>,
    /// Who is here.
    pub counts: Arc<Mutex<Counts>>,
    /// Passed when everybody has left all endpoints.
    pub left: Arc<Barrier>,
}

impl Shared {
    /// For as many endpoints.
    #[must_use]
    pub fn new(context: Arc<Context>, book: Arc<Book>, endpoints: u16) -> Self {
        let left = Arc::new(Barrier::new(endpoints.max(1).into()));
        Self { core: 0, context, book, counts: Arc::default(), left }
    }

    /// For one of them.
    #[must_use]
    pub fn on(&self, core: u16) -> Self {
        Self { core, ..self.clone() }
    }
}

/// What an endpoint runs on has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the QUIC endpoint has ended by itself, and with it its connections")]
pub struct EndpointGone;

/// Accepts connections until the drain has started and everybody has left all endpoints, or its deadline has passed.
/// `streams` is where those come in that can't use UDP.
///
/// # Errors
/// The endpoint is gone before that.
pub async fn accept(
    endpoint: &quinn::Endpoint,
    streams: Option<Streams>,
    shared: &Shared,
    mut drain: Drain,
) -> Result<(), EndpointGone> {
    let Shared { core, context, book, counts, left: all_left } = shared;
    let here = context.metrics.core_connections.get_or_create_owned(&CoreNumber { core: *core });
    let (mut listener, tls) = match streams {
        Some(Streams { listener, tls }) => (Some(listener), Some(tls)),
        None => (None, None),
    };
    let mut connections = JoinSet::new();
    let mut waiting: Waiting<Attempt> = Waiting::new();
    // Each is counted as a handshake, so there is room for all of them.
    let (turns, mut asked) = Turns::new(context.config.limits.handshakes);
    let mut taken = 0;
    loop {
        here.set(i64::try_from(connections.len()).unwrap_or(i64::MAX));
        tokio::select! {
            biased;
            _ = drain.started() => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                if let Err(error) = ended && error.is_panic() {
                    warn!(%error, "a connection's task panicked; the others go on");
                }
            }
            incoming = endpoint.accept(), if taken < TAKEN_MAX => match incoming {
                Some(incoming) => {
                    taken += 1;
                    if let Some(attempt) = attempt(incoming, context, counts) {
                        waiting.push(attempt, crate::ground::now());
                    }
                }
                None => return Err(EndpointGone),
            },
            Some((stream, from)) = next_stream(&mut listener, context) => {
                if let Some(tls) = &tls {
                    super::stream::attempt(stream, from, tls, context, counts, &turns, &mut connections);
                }
            }
            Some(turn) = asked.recv() => waiting.push(Attempt::Stream(turn), crate::ground::now()),
            turn = waiting.turn(crate::ground::now), if taken > 0 || !waiting.is_empty() => {
                taken = 0;
                match turn {
                    Some(Turn::Begin(attempt)) => attempt.begin(context, book, &mut connections),
                    Some(Turn::Late(attempt)) => attempt.refuse("late", context),
                    None => {}
                }
            }
        }
    }
    // Whoever has not begun is told to go elsewhere, and who asks from now on as well.
    drop(asked);
    while let Some(Turn::Begin(attempt) | Turn::Late(attempt)) = waiting.next(crate::ground::now()) {
        attempt.refuse(Refused::Draining.label(), context);
    }
    let mut deadline = drain.clone();
    let mut left = std::pin::pin!(all_left.wait());
    let mut empty = false;
    loop {
        here.set(i64::try_from(connections.len()).unwrap_or(i64::MAX));
        tokio::select! {
            biased;
            ended = connections.join_next(), if !empty => empty = ended.is_none(),
            _ = &mut left, if empty => break,
            // Who comes now is told to go elsewhere.
            Some(incoming) = endpoint.accept() => incoming.refuse(),
            Some((stream, _)) = next_stream(&mut listener, context) => drop(stream),
            () = deadline.deadline(), if !empty => {
                warn!(connections = connections.len(), "the drain's deadline has passed; the rest is cut off");
                connections.shutdown().await;
                empty = true;
            }
        }
    }
    Ok(())
}

/// Counts a handshake while it goes on, and its connection afterwards.
#[derive(Debug)]
pub(super) struct Handshake<'a> {
    metrics: &'a Metrics,
    going_on: bool,
    connected: Option<Kind>,
}

impl<'a> Handshake<'a> {
    pub(super) fn begin(metrics: &'a Metrics) -> Self {
        metrics.handshakes.inc();
        Self { metrics, going_on: true, connected: None }
    }

    /// It never began: the attempt was refused before.
    pub(super) fn turned_away(mut self) {
        if std::mem::take(&mut self.going_on) {
            self.metrics.handshakes.dec();
        }
    }

    /// It ended, with a connection or without.
    pub(super) fn end(&mut self, up: Option<Kind>) {
        if !std::mem::take(&mut self.going_on) {
            return;
        }
        self.metrics.handshakes.dec();
        if let Some(kind) = up {
            self.connected = Some(kind);
            self.metrics.connected(kind.word());
        } else {
            self.metrics.handshakes_failed.inc();
        }
    }
}

impl Drop for Handshake<'_> {
    fn drop(&mut self) {
        self.end(None);
        if let Some(kind) = self.connected {
            self.metrics.disconnected(kind.word());
        }
    }
}

/// An attempt that was let in. Its handshake has not begun.
#[derive(Debug)]
enum Attempt {
    Quic(Box<quinn::Incoming>, Counted),
    /// The task that counts it and goes on with it.
    Stream(Asked),
}

/// Judges an attempt.
fn attempt(incoming: quinn::Incoming, context: &Context, counts: &Arc<Mutex<Counts>>) -> Option<Attempt> {
    let address = incoming.remote_address().ip();
    let draining = context.drain.is_draining();
    let load = load(counts, address, incoming.remote_address_validated(), draining);
    match admit(&context.config.limits, load) {
        Verdict::Accept => Some(Attempt::Quic(Box::new(incoming), Counted::new(counts, address))),
        Verdict::Retry => {
            context.metrics.turned_away("retry");
            if incoming.may_retry() {
                // Only fails for attempts that came with a token, which are validated.
                let _ = incoming.retry();
            } else {
                incoming.refuse();
            }
            None
        }
        Verdict::Refuse(why) => {
            refuse(incoming, why.label(), context);
            None
        }
    }
}

fn refuse(incoming: quinn::Incoming, why: &'static str, context: &Context) {
    turned_away(why, context);
    incoming.refuse();
}

/// Counts a refusal and says so now and then.
pub(super) fn turned_away(why: &'static str, context: &Context) {
    context.metrics.turned_away(why);
    if let Some(suppressed) = context.complaints.due(why, crate::ground::now()) {
        warn!(why, suppressed, "connection attempts are refused");
    }
}

impl Attempt {
    fn refuse(self, why: &'static str, context: &Context) {
        match self {
            Self::Quic(incoming, _) => refuse(*incoming, why, context),
            Self::Stream(_) => turned_away(why, context),
        }
    }

    fn begin(self, context: &Arc<Context>, book: &Arc<Book>, connections: &mut JoinSet<()>) {
        match self {
            // In a task of its own: a panic there ends nobody else's connection.
            Self::Quic(incoming, counted) => {
                let attending = attend(incoming, counted, Arc::clone(context), Arc::clone(book));
                connections.spawn(attending.in_current_span());
            }
            Self::Stream(turn) => {
                // Gone, if its client went away.
                let _ = turn.send(());
            }
        }
    }
}

/// Begins the handshake and goes on with what comes of it.
async fn attend(
    incoming: Box<quinn::Incoming>,
    mut counted: Counted,
    context: Arc<Context>,
    book: Arc<Book>,
) {
    let timeout = Duration::from_millis(context.config.limits.hello_timeout_ms);
    // A server always has the keys for its half of a round trip: what comes in early data is served at once.
    let (accepted, id) = first_id(|| incoming.accept());
    let early = match accepted.map(quinn::Connecting::into_0rtt) {
        Ok(Ok(early)) => early,
        Ok(Err(_)) => return,
        Err(error) => {
            context.metrics.handshakes_failed.inc();
            debug!(%error, "a handshake failed");
            return;
        }
    };
    let (quic, completed) = early;
    // Not the metrics themselves: they are some ninety pointers, and would be in each connection's task.
    let counting = Arc::clone(&context);
    let mut handshake = Handshake::begin(&counting.metrics);
    let watched = quic.clone();
    // As long as this task.
    let mut noted = None;
    let confirmed = async {
        let completed = tokio::time::timeout(timeout, completed).await;
        // What is resolved says whether early data was taken, not whether there is a connection.
        let up = completed.is_ok() && watched.close_reason().is_none();
        if up {
            noted = id.and_then(|id| book.note(&watched, id));
        }
        drop(watched);
        handshake.end(up.then_some(Kind::Quic));
        if up {
            counted.connected();
        } else {
            debug!(in_time = completed.is_ok(), "a handshake failed");
        }
        up
    };
    // Boxed, as `incoming` is: what the handshake needs is gone when it is over, the task stays.
    serve(quic.into(), Box::pin(confirmed), context).await;
    drop(noted);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the future a function gives.
    const fn size_of_future<A, B, C, D, F>(_: &impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn the_task_of_a_connection_takes_little() {
        // With what tokio has before and behind it, it fits into 5 KiB, which allocators have a size for.
        let task = size_of_future(&attend);
        assert!(task <= 5 * 1_024 - 256, "{task} bytes");
    }
}

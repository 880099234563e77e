//! TCP through the same bad network: what a client falls back to where UDP is blocked.
//!
//! - Bytes are never lost, only late: they leave in segments, each asks its own two links like a packet does, and one
//!   that a link drops is offered again after a retransmission timeout (the handshake's round trip and 200 ms, doubled
//!   for every loss in a row), while everything behind it waits.
//! - Connecting costs a round trip, though the client's system believes to be connected at once: the first bytes wait
//!   for it.
//! - A direction holds at most [`SEGMENTS_MAX`] segments; then the sender is no longer read from, as a full window does.
//! - Order, copies and bit errors are what TCP repairs: of the path only delay, loss, rate and darkness count here.
//!
//! Coarser than a real TCP on purpose (no fast retransmit, no congestion window): right for chat, where one small
//! segment follows another, and not for bulk. Real TCP under real packet loss is the business of `benches/netlab`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Admits, Shared, TcpCells};
use crate::net::{DropCause, Impairment, Link, Path, Verdict};
use crate::rng::Rng;
use crate::time::SimTime;

/// Bytes of a segment.
const SEGMENT_BYTES: usize = 1_200;
/// What headers add to a segment on a bottleneck.
const HEADER_BYTES: usize = 40;
/// Segments of one direction on their way: some 300 KB, more than a phone's window.
const SEGMENTS_MAX: usize = 256;
/// A repeated segment leaves this much after the round trip.
const RETRANSMIT_AFTER: Duration = Duration::from_millis(200);
/// A repeated handshake.
const RETRANSMIT_HANDSHAKE: Duration = Duration::from_secs(1);
/// The longest time between two repetitions.
const RETRANSMIT_MAX: Duration = Duration::from_secs(120);
/// How soon a segment that found the queue full is offered again.
const QUEUE_PAUSE: Duration = Duration::from_millis(20);
/// After a failure to accept (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all connections meet now.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    pub(super) path: Path,
    /// Counts the changes of `path`.
    pub(super) paths: u64,
    pub(super) gateway: SocketAddr,
    pub(super) admits: Admits,
    pub(super) dark_until: SimTime,
    /// Counts changes of all addresses: connections made before the last one carry nothing any more.
    pub(super) rebinds: u64,
}

/// Serves until the runtime ends.
pub(super) async fn serve(
    listener: TcpListener,
    rules: watch::Receiver<Rules>,
    root: Rng,
    started: Instant,
    connections_max: usize,
    shared: Arc<Shared>,
) {
    let mut connections = JoinSet::new();
    let mut ordinal = 0u64;
    loop {
        while connections.try_join_next().is_some() {}
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::debug!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if connections.len() >= connections_max {
            shared.refused_flows.fetch_add(1, Relaxed);
            continue;
        }
        ordinal += 1;
        let rng = root.fork(ordinal);
        let half = |label| Half {
            link: Link::new(Impairment::default()),
            paths: None,
            rng: rng.fork(label),
            rules: rules.clone(),
            started,
            retransmit: RETRANSMIT_HANDSHAKE,
            shared: Arc::clone(&shared),
        };
        let born = rules.borrow().rebinds;
        connections.spawn(carry(
            client,
            Way { up: true, half: half(0) },
            Way { up: false, half: half(1) },
            born,
        ));
    }
}

struct Way {
    up: bool,
    half: Half,
}

/// One connection from its handshake to its end.
async fn carry(client: TcpStream, mut up: Way, mut down: Way, born: u64) {
    let cells = Arc::clone(&up.half.shared);
    cells.tcp.connections.fetch_add(1, Relaxed);
    let asked = Instant::now();
    sleep_until(up.half.pass(HEADER_BYTES, true).await).await;
    let answered = down.half.pass(HEADER_BYTES, false).await;
    sleep_until(answered).await;
    let round_trip = answered.saturating_duration_since(asked);
    for half in [&mut up.half, &mut down.half] {
        half.retransmit = round_trip.min(RETRANSMIT_MAX) + RETRANSMIT_AFTER;
    }
    let gateway = up.half.rules.borrow().gateway;
    let gateway = match TcpStream::connect(gateway).await {
        Ok(gateway) => gateway,
        Err(error) => {
            tracing::debug!(%error, "the gateway does not take a TCP connection");
            return;
        }
    };
    for stream in [&client, &gateway] {
        // Without it the kernel would gather small segments; late, but not wrong.
        let _ = stream.set_nodelay(true);
    }
    let (from_client, to_client) = client.into_split();
    let (from_gateway, to_gateway) = gateway.into_split();
    tokio::join!(pump(from_client, to_gateway, up, born), pump(from_gateway, to_client, down, born));
}

/// Carries one direction until its sender has ended or its receiver is gone.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, way: Way, born: u64) {
    let Way { up, mut half } = way;
    let (segments, mut under_way) = mpsc::channel::<(Instant, Box<[u8]>)>(SEGMENTS_MAX);
    let rules = half.rules.clone();
    let lost = move || rules.borrow().rebinds != born;
    let lost_too = lost.clone();
    let reading = async move {
        let mut buffer = [0; SEGMENT_BYTES];
        while let Ok(len) = from.read(&mut buffer).await {
            let Some(segment) = buffer.get(..len).filter(|segment| !segment.is_empty()) else { break };
            let at = half.pass(HEADER_BYTES + len, up).await;
            // The sender's old address leads nowhere: what it still sends vanishes, and nobody tells it.
            if !lost() && segments.send((at, segment.into())).await.is_err() {
                break;
            }
        }
    };
    let writing = async move {
        while let Some((at, segment)) = under_way.recv().await {
            sleep_until(at).await;
            if !lost_too() && to.write_all(&segment).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

/// One direction of one connection.
struct Half {
    link: Link,
    /// Which path the link has; `None` before the first.
    paths: Option<u64>,
    rng: Rng,
    rules: watch::Receiver<Rules>,
    started: Instant,
    retransmit: Duration,
    shared: Arc<Shared>,
}

impl Half {
    /// Waits until a segment of `bytes` has got onto the link, and says when it comes out.
    async fn pass(&mut self, bytes: usize, up: bool) -> Instant {
        let mut wait = self.retransmit;
        loop {
            let now = SimTime::START + self.started.elapsed();
            let cells = self.cells(up);
            cells.segments.fetch_add(1, Relaxed);
            cells.bytes.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Relaxed);
            match self.offer(now, bytes, up) {
                Verdict::Deliver(arrival) => return self.started + arrival.at.since(SimTime::START),
                Verdict::Drop(cause) => {
                    self.cells(up).repeated.fetch_add(1, Relaxed);
                    if cause == DropCause::QueueFull {
                        sleep(QUEUE_PAUSE).await;
                    } else {
                        sleep(wait).await;
                        wait = wait.saturating_mul(2).min(RETRANSMIT_MAX);
                    }
                }
            }
        }
    }

    fn offer(&mut self, now: SimTime, bytes: usize, up: bool) -> Verdict {
        let rules = self.rules.borrow();
        if self.paths != Some(rules.paths) {
            self.paths = Some(rules.paths);
            let direction = if up { &rules.path.up } else { &rules.path.down };
            self.link.set(repaired(direction));
        }
        self.link.set_cut(!rules.admits.tcp);
        self.link.black_out(rules.dark_until);
        self.link.offer(now, bytes, &mut self.rng)
    }

    fn cells(&self, up: bool) -> &TcpCells {
        if up { &self.shared.tcp.up } else { &self.shared.tcp.down }
    }
}

/// What TCP leaves of an impairment.
fn repaired(impairment: &Impairment) -> Impairment {
    Impairment {
        delay: impairment.delay.clone(),
        loss: impairment.loss,
        rate: impairment.rate,
        dark: impairment.dark,
        ..Impairment::default()
    }
}

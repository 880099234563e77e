//! Those who can't use UDP: byte streams that come in by TCP, and become connections by TLS or by WebSocket.
//!
//! - An attempt is counted and judged as one by QUIC is. Its address has proven itself: TCP's handshake is over.
//! - Nothing is computed for it before its turn, which it has in the same line as attempts by QUIC (`waiting`).
//! - All of it, waiting, TLS and the request for a WebSocket, has one limit of time; whoever sends a byte now and then does not
//!   move it.
//! - A connection and what reads and writes for it are one task: both end together, and with the gateway.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use fulmar_protocol::{
    limit::DATAGRAM_BYTES_MAX,
    version::{ALPN, WEBSOCKET_PATH, WEBSOCKET_PROTOCOL},
};
use fulmar_transport::{
    Setup,
    qmux::{Config, Side},
    secure::{self, HandshakeError},
    tcp::{ByteStream, Listen},
    websocket::Names,
};
use tokio::task::JoinSet;
use tracing::{Instrument, debug, warn};

use super::{
    admission::{Verdict, admit},
    endpoint::{Counted, Counts, Handshake, load, turned_away},
    waiting::Turns,
};
use crate::{config::TransportConfig, connection::serve, context::Context};

/// How long nothing is accepted after the system could not: it has no files left, for example.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The least a stream may have waiting to be sent.
const SEND_BUFFER_MIN: usize = 16 * 1024;

/// Where streams come in, and the TLS that is spoken on them.
pub struct Streams {
    /// Where they come in.
    pub listener: Box<dyn Listen>,
    /// TLS with both ALPNs ([`super::tls::stream_tls_config`]).
    pub tls: Arc<rustls::ServerConfig>,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// The next stream; never, if none are listened for.
pub(super) async fn next_stream(
    listener: &mut Option<Box<dyn Listen>>,
    context: &Context,
) -> Option<(Box<dyn ByteStream>, SocketAddr)> {
    let Some(listener) = listener else { return std::future::pending().await };
    loop {
        match std::future::poll_fn(|cx| listener.poll_accept(cx)).await {
            Ok(accepted) => return Some(accepted),
            Err(error) => {
                if let Some(suppressed) = context.complaints.due("accept", crate::ground::now()) {
                    warn!(%error, suppressed, "a TCP connection could not be accepted");
                }
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

pub(super) fn attempt(
    stream: Box<dyn ByteStream>,
    from: SocketAddr,
    tls: &Arc<rustls::ServerConfig>,
    context: &Arc<Context>,
    counts: &Arc<Mutex<Counts>>,
    turns: &Turns,
    connections: &mut JoinSet<()>,
) {
    let load = load(counts, from.ip(), true, context.drain.is_draining());
    let why = match admit(&context.config.limits, load) {
        Verdict::Accept => None,
        // Only asked of addresses that are not proven.
        Verdict::Retry => Some("retry"),
        Verdict::Refuse(why) => Some(why.label()),
    };
    if let Some(why) = why {
        turned_away(why, context);
        return;
    }
    let counted = Counted::new(counts, from.ip());
    let task = shake_hands(stream, from, Arc::clone(tls), Arc::clone(context), turns.clone(), counted);
    connections.spawn(task.in_current_span());
}

async fn shake_hands(
    stream: Box<dyn ByteStream>,
    from: SocketAddr,
    tls: Arc<rustls::ServerConfig>,
    context: Arc<Context>,
    turns: Turns,
    mut counted: Counted,
) {
    let counting = Arc::clone(&context);
    let mut handshake = Handshake::begin(&counting.metrics);
    let timeout = Duration::from_millis(context.config.limits.hello_timeout_ms);
    let transport = &context.config.transport;
    let setup = Setup {
        side: Side::Server,
        remote: from,
        config: stream_config(transport),
        initial_rtt: Duration::from_millis(u64::from(transport.initial_rtt_ms)),
    };
    let names = Names { path: WEBSOCKET_PATH, protocol: WEBSOCKET_PROTOCOL };
    let mut driver = None;
    let accepting = secure::accept(stream, tls, turns.wait(), ALPN, names, setup, |task| driver = Some(task));
    let connection = match tokio::time::timeout(timeout, accepting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(HandshakeError::NoTurn)) => {
            // Whoever refused it has counted that.
            handshake.turned_away();
            return;
        }
        Ok(Err(error)) => {
            debug!(%error, "a handshake failed");
            return;
        }
        Err(_) => {
            debug!("a handshake took too long");
            return;
        }
    };
    let Some(driver) = driver else { return };
    handshake.end(Some(connection.kind()));
    counted.connected();
    // TLS takes no early data here: the handshake is complete.
    let confirmed = std::future::ready(true);
    // Boxed: most connections come by QUIC and need none of this.
    let serving = Box::pin(serve(connection, confirmed, context));
    futures_util::future::join(serving, driver).await;
}

/// The bounds QUIC has, for streams over TLS.
fn stream_config(transport: &TransportConfig) -> Config {
    // The system's buffer holds what a long road needs.
    let send_buffer = usize::try_from(transport.send_window_least_bytes).unwrap_or(usize::MAX) / 2;
    Config {
        streams_bidi: transport.bidi_streams.into(),
        streams_uni: transport.uni_streams.into(),
        stream_window: transport.stream_window_bytes.into(),
        window: transport.connection_window_bytes.into(),
        send_buffer: send_buffer.max(SEND_BUFFER_MIN),
        datagrams_in: transport.datagram_receive_bytes,
        datagrams_out: transport.datagram_send_bytes,
        datagram_size: DATAGRAM_BYTES_MAX,
        idle_timeout_ms: transport.idle_timeout_ms.into(),
        assumed: None,
    }
}

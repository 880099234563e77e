//! TLS and WebSocket: the way to the gateway where UDP is blocked, on a byte stream the platform gives.
//!
//! - One TLS configuration for both, apart from QUIC's: tickets of one are of no use to the other.
//! - HELLO and the first sends leave with the client's last flight of TLS: what every gateway allows at least is known
//!   (`docs/wire.md`), so its parameters are not waited for.
//! - No limit of time is set here: the race sets it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use fulmar_protocol::{
    limit::{DATAGRAM_BYTES_MAX, LANES_MAX},
    version::{ALPN, WEBSOCKET_PATH, WEBSOCKET_PROTOCOL},
};
use fulmar_transport::{
    Connection, Setup,
    qmux::{Config, Parameters, Side},
    secure,
    websocket::Names,
};

use super::quic::{DATAGRAM_BUFFER, IDLE_TIMEOUT_MS, STREAM_WINDOW, WINDOW, tls_config};
use crate::{
    error::Error,
    options::Trust,
    platform::{ByteStream, Platform},
};

/// Bytes that may wait on one stream to be sent: 64 unacked sends fit the uplink.
const SEND_BUFFER: usize = 128 * 1024;

/// What every gateway allows before it has said anything.
const ASSUMED: Parameters = Parameters {
    max_idle_timeout: 0,
    max_data: 65_536,
    max_stream_data_bidi_local: 0,
    max_stream_data_bidi_remote: 32_768,
    max_stream_data_uni: 32_768,
    max_streams_bidi: 1,
    max_streams_uni: 1,
    max_datagram_frame_size: 0,
    max_record_size: fulmar_transport::qmux::RECORD_BYTES as u64,
};

/// Where a stream goes, and how it is secured.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) platform: Arc<dyn Platform>,
    pub(crate) remote: SocketAddr,
    pub(crate) server_name: String,
    /// [`stream_tls`].
    pub(crate) tls: Arc<rustls::ClientConfig>,
    /// The round trip as it is known, until it was measured.
    pub(crate) rtt: Duration,
}

/// TLS settings for streams that believe `trust` only; made once, as its sessions are kept in it.
///
/// # Errors
/// [`Error::Certificate`].
pub(crate) fn stream_tls(
    trust: Option<&Trust>,
    platform: &Arc<dyn Platform>,
) -> Result<Arc<rustls::ClientConfig>, Error> {
    tls_config(trust, platform).map(Arc::new)
}

impl Target {
    fn setup(&self) -> Setup {
        let config = Config {
            streams_bidi: 0,
            streams_uni: u64::from(LANES_MAX) + 2,
            stream_window: STREAM_WINDOW.into(),
            window: WINDOW.into(),
            send_buffer: SEND_BUFFER,
            datagrams_in: DATAGRAM_BUFFER,
            datagrams_out: DATAGRAM_BUFFER,
            datagram_size: DATAGRAM_BYTES_MAX,
            idle_timeout_ms: IDLE_TIMEOUT_MS.into(),
            assumed: Some(ASSUMED),
        };
        Setup { side: Side::Client, remote: self.remote, config, initial_rtt: self.rtt }
    }
}

/// A connection by TLS on `stream`. The text of an error is for people.
pub(crate) async fn tls(stream: Box<dyn ByteStream>, target: &Target) -> Result<Connection, String> {
    let spawn = |task| target.platform.spawn(task);
    secure::connect_tls(stream, &target.server_name, &target.tls, ALPN, target.setup(), spawn)
        .await
        .map_err(|error| format!("{} by TLS: {error}", target.remote))
}

/// A connection by WebSocket on `stream`. The text of an error is for people.
pub(crate) async fn websocket(stream: Box<dyn ByteStream>, target: &Target) -> Result<Connection, String> {
    let spawn = |task| target.platform.spawn(task);
    let names = Names { path: WEBSOCKET_PATH, protocol: WEBSOCKET_PROTOCOL };
    secure::connect_websocket(stream, &target.server_name, &target.tls, names, target.setup(), spawn)
        .await
        .map_err(|error| format!("{} by WebSocket: {error}", target.remote))
}

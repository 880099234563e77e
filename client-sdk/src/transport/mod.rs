//! How bytes get to the gateway: by QUIC, and by TLS or WebSocket beside it, under the same [`link::Link`].

pub(crate) mod dial;
pub(crate) mod link;
pub(crate) mod meter;
mod quic;
pub(crate) mod stream;
mod window;

pub(crate) use self::quic::{Dialer, Tls, client_tls};

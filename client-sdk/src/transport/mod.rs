//! How bytes get to the gateway. QUIC so far; TLS and WebSocket will stand beside it, under the same [`link::Link`].

pub(crate) mod dial;
pub(crate) mod link;
mod quic;

pub(crate) use self::quic::{Dialer, Tls, client_tls};

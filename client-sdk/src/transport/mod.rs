//! How bytes get to the gateway. QUIC so far; TLS and WebSocket will stand beside it.

mod quic;

pub(crate) use self::quic::{Tls, client_tls};

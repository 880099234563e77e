//! How bytes get from one end to the other: QUIC, and where UDP is blocked the same streams and datagrams over TLS on TCP,
//! or inside a WebSocket.
//!
//! - `Connection`, `SendStream` and `RecvStream` are one set of types for all three. They look like quinn's.
//! - Over a byte stream, [`qmux`] makes streams and datagrams of it: pure, without input or output; one task per
//!   connection does those.
//!
//! Not here: what the streams carry, who may connect, and which way is tried first.

#[cfg(feature = "io")]
mod connection;
#[cfg(feature = "io")]
mod error;
#[cfg(feature = "io")]
mod muxed;
pub mod qmux;
#[cfg(feature = "io")]
pub mod secure;
#[cfg(feature = "io")]
pub mod tcp;
#[cfg(feature = "io")]
pub mod websocket;

#[cfg(feature = "io")]
pub use self::{
    connection::{Connection, Kind, RecvStream, SendStream, Setup, Stats},
    error::{ApplicationClose, ClosedStream, ConnectionError, ReadError, SendDatagramError, WriteError},
};

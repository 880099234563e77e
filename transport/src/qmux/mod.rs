//! QUIC streams and datagrams on an ordered byte stream, without any input or output: bytes come in, bytes go out.
//!
//! The rules are those of draft-ietf-quic-qmux (the version with records), which are those of RFC 9000 and RFC 9221
//! without packets. The differences:
//!
//! - **Assumed limits.** A client may know what a server grants at least (by the application protocol, see
//!   [`Config::assumed`]), and begins before the server's parameters have come: the draft allows that only with what
//!   was remembered of an earlier connection. A server that grants less is closed.
//! - **ALPN.** The application protocol decides; ours has the same name over QUIC and here, which the draft advises
//!   against for the sake of DNS records that we don't use.
//! - `DATA_BLOCKED` and its like are understood and never sent: nobody acts on them.
//!
//! What holds:
//!
//! - **Bounded.** What waits to be sent is bounded per stream, and streams by what the peer allows; what waits to be
//!   read by the windows; datagrams by bytes, and the oldest is dropped. Answers to the peer (window updates, resets,
//!   pongs) are kept as facts, not as a queue: a peer that does not read makes none of them grow.
//! - **Late choice.** Which stream goes next is decided when the byte stream can take more ([`Mux::transmit`]): by
//!   priority, then in turns. Nothing composed waits here.
//! - **In order.** A stream's bytes come in order or the peer is closed; so nothing is ever put back into order.
//! - Every error of the peer is a [`Violation`] and ends the connection with its code.
//!
//! Not here: clocks (idle timeout and round trips are the driver's), wakers, sockets.

mod frame;
mod mux;

pub use self::{
    frame::{
        Close, Direction, Frame, Parameters, RECORD_BYTES, Side, StreamId, VARINT_MAX, Violation, get_varint,
        put_varint, varint_len,
    },
    mux::{Blocked, Config, Ended, Event, Mux, ReadError, WriteError},
};

//! What can be wrong with what a peer sent, and the close code that answers it.

use crate::close::CloseCode;

/// Bytes that are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The frame ends inside a field.
    #[error("the frame ends inside {field}")]
    Truncated {
        /// The field that is cut.
        field: &'static str,
    },
    /// The frame is longer than its channel allows.
    #[error("a frame of {length} bytes on a channel that takes {limit}")]
    TooLarge {
        /// Length the peer announced, bytes.
        length: u64,
        /// Limit of the channel, bytes.
        limit: usize,
    },
    /// A field has a value it may not have.
    #[error("{field} has a value it may not have")]
    BadValue {
        /// The field.
        field: &'static str,
    },
    /// A frame of a type this version does not know and that must be understood (even number).
    #[error("unknown frame type {0:#x} must be understood")]
    UnknownFrame(u64),
    /// Bytes are left after the last field.
    #[error("{0} bytes are left after the last field")]
    TrailingBytes(usize),
    /// A cold frame's core is not valid postcard.
    #[error("the core of {frame} can't be read")]
    BadCore {
        /// Name of the frame.
        frame: &'static str,
    },
}

impl DecodeError {
    /// The code to close the connection with.
    #[must_use]
    pub const fn close_code(self) -> CloseCode {
        match self {
            Self::TooLarge { .. } => CloseCode::TooLarge,
            Self::UnknownFrame(_) => CloseCode::UnknownFrame,
            _ => CloseCode::Malformed,
        }
    }
}

/// A well-formed frame that breaks the rules of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The bytes are not a frame.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The frame may not come from this side or on this channel.
    #[error("{frame} may not come on {channel}")]
    WrongChannel {
        /// Name of the frame.
        frame: &'static str,
        /// Name of the channel.
        channel: &'static str,
    },
    /// The frame may not come in this state.
    #[error("{frame} while {state}")]
    OutOfState {
        /// Name of the frame.
        frame: &'static str,
        /// Name of the state.
        state: &'static str,
    },
    /// More in flight than allowed.
    #[error("more {what} in flight than allowed")]
    WindowExceeded {
        /// Sends or calls.
        what: &'static str,
    },
    /// An acknowledgement of something never sent.
    #[error("an acknowledgement of something never sent")]
    BadAck,
    /// A stream of an unknown kind, or a second one of a kind.
    #[error("stream: {0}")]
    BadStream(&'static str),
    /// No common version.
    #[error("no common protocol version")]
    Version,
}

impl Violation {
    /// The code to close the connection with.
    #[must_use]
    pub const fn close_code(self) -> CloseCode {
        match self {
            Self::Decode(error) => error.close_code(),
            Self::WrongChannel { .. } | Self::OutOfState { .. } => CloseCode::OutOfState,
            Self::WindowExceeded { .. } => CloseCode::WindowExceeded,
            Self::BadAck => CloseCode::BadAck,
            Self::BadStream(_) => CloseCode::BadStream,
            Self::Version => CloseCode::VersionUnsupported,
        }
    }
}

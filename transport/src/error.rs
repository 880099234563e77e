//! What can go wrong, the same for every kind of connection.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use crate::qmux;

/// The application's last word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplicationClose {
    /// The application's code.
    pub code: u64,
    /// For people.
    pub reason: Bytes,
}

impl fmt::Display for ApplicationClose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} {}", self.code, String::from_utf8_lossy(&self.reason))
    }
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    /// The peer's application closed it.
    #[error("closed by peer: {0}")]
    ApplicationClosed(ApplicationClose),
    /// The peer's transport closed it; the number is its error code.
    #[error("aborted by peer: {code:#x} {reason}")]
    ConnectionClosed {
        /// An error code of RFC 9000 section 20.1.
        code: u64,
        /// For people.
        reason: Arc<str>,
    },
    /// The peer broke the transport's rules.
    #[error("the peer broke the transport's rules: {0}")]
    Violation(Arc<str>),
    /// The peer knows nothing of it any more.
    #[error("reset by peer")]
    Reset,
    /// Nothing was heard for the idle timeout.
    #[error("timed out")]
    TimedOut,
    /// This side closed it.
    #[error("closed")]
    LocallyClosed,
    /// What it ran on is gone: the byte stream ended or failed, or QUIC could not go on.
    #[error("lost: {0}")]
    Lost(Arc<str>),
}

impl From<quinn::ConnectionError> for ConnectionError {
    fn from(error: quinn::ConnectionError) -> Self {
        match error {
            quinn::ConnectionError::ApplicationClosed(close) => Self::ApplicationClosed(ApplicationClose {
                code: close.error_code.into_inner(),
                reason: close.reason,
            }),
            quinn::ConnectionError::ConnectionClosed(close) => Self::ConnectionClosed {
                code: u64::from(close.error_code),
                reason: String::from_utf8_lossy(&close.reason).into(),
            },
            quinn::ConnectionError::TransportError(error) => Self::Violation(error.to_string().into()),
            quinn::ConnectionError::Reset => Self::Reset,
            quinn::ConnectionError::TimedOut => Self::TimedOut,
            quinn::ConnectionError::LocallyClosed => Self::LocallyClosed,
            other @ (quinn::ConnectionError::VersionMismatch | quinn::ConnectionError::CidsExhausted) => {
                Self::Lost(other.to_string().into())
            }
        }
    }
}

impl From<&qmux::Ended> for ConnectionError {
    fn from(ended: &qmux::Ended) -> Self {
        match ended {
            qmux::Ended::Locally(_) => Self::LocallyClosed,
            qmux::Ended::Violated(violation) => Self::Violation(violation.to_string().into()),
            qmux::Ended::Remotely(close) if close.application => {
                Self::ApplicationClosed(ApplicationClose { code: close.code, reason: close.reason.clone() })
            }
            qmux::Ended::Remotely(close) => Self::ConnectionClosed {
                code: close.code,
                reason: String::from_utf8_lossy(&close.reason).into(),
            },
        }
    }
}

/// Why a stream can't be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The peer reads it no more; the number is its code.
    #[error("sending stopped by peer: error {0}")]
    Stopped(u64),
    /// The connection ended.
    #[error("connection lost")]
    ConnectionLost(#[from] ConnectionError),
    /// It was finished or reset before.
    #[error("closed stream")]
    ClosedStream,
    /// The gateway did not take the early data it was opened in: everything is to be sent again.
    #[error("0-RTT rejected")]
    ZeroRttRejected,
}

impl From<quinn::WriteError> for WriteError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(code) => Self::Stopped(code.into_inner()),
            quinn::WriteError::ConnectionLost(error) => Self::ConnectionLost(error.into()),
            quinn::WriteError::ClosedStream => Self::ClosedStream,
            quinn::WriteError::ZeroRttRejected => Self::ZeroRttRejected,
        }
    }
}

/// Why a stream can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The peer gave it up; the number is its code.
    #[error("stream reset by peer: error {0}")]
    Reset(u64),
    /// The connection ended.
    #[error("connection lost")]
    ConnectionLost(#[from] ConnectionError),
    /// Its end was read, or it was stopped.
    #[error("closed stream")]
    ClosedStream,
    /// The gateway did not take the early data it was opened in.
    #[error("0-RTT rejected")]
    ZeroRttRejected,
}

impl From<quinn::ReadError> for ReadError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::Reset(code.into_inner()),
            quinn::ReadError::ConnectionLost(error) => Self::ConnectionLost(error.into()),
            quinn::ReadError::ClosedStream | quinn::ReadError::IllegalOrderedRead => Self::ClosedStream,
            quinn::ReadError::ZeroRttRejected => Self::ZeroRttRejected,
        }
    }
}

/// The stream was finished, reset or stopped before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("closed stream")]
pub struct ClosedStream;

/// Why a datagram was not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendDatagramError {
    /// The peer takes none.
    #[error("datagrams are not supported by the peer")]
    Unsupported,
    /// It is larger than [`crate::Connection::max_datagram_size`].
    #[error("datagram too large")]
    TooLarge,
    /// The connection ended.
    #[error("connection lost")]
    ConnectionLost(#[from] ConnectionError),
}

impl From<quinn::SendDatagramError> for SendDatagramError {
    fn from(error: quinn::SendDatagramError) -> Self {
        match error {
            quinn::SendDatagramError::UnsupportedByPeer | quinn::SendDatagramError::Disabled => {
                Self::Unsupported
            }
            quinn::SendDatagramError::TooLarge => Self::TooLarge,
            quinn::SendDatagramError::ConnectionLost(error) => Self::ConnectionLost(error.into()),
        }
    }
}

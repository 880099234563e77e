//! What can go wrong, whose fault it is, and what to do.

use fulmar_protocol::close::RefusalCode;

/// An error of the SDK. A lost connection is none: the client connects again by itself, see
/// [`crate::ConnectionState`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database could not be read or written (disk full, permissions, damage). Nothing was promised.
    #[error("the client's database failed: {0}")]
    Database(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The database was written by a newer version of the SDK: update the app, the data is left alone.
    #[error("the client's database has format {found}, this version reads up to {known}: update the app")]
    DatabaseNewer {
        /// Format of the file.
        found: i64,
        /// The newest format this version knows.
        known: i64,
    },
    /// Another process has the database open. Two would number their messages alike.
    #[error("another process has the client's database open")]
    DatabaseInUse,
    /// The file is a database, but not one of this SDK, or belongs to another user.
    #[error("not a database of this user: {0}")]
    DatabaseForeign(String),
    /// The certificate to trust can't be read.
    #[error("the certificate to trust can't be read: {0}")]
    Certificate(String),
    /// A name is empty or longer than [`fulmar_protocol::limit::NAME_BYTES_MAX`] bytes.
    #[error("a name must have 1 to {max} bytes", max = fulmar_protocol::limit::NAME_BYTES_MAX)]
    BadName,
    /// The body is longer than [`fulmar_protocol::limit::BODY_BYTES_MAX`] bytes.
    #[error("a body of {bytes} bytes, at most {max} are allowed", max = fulmar_protocol::limit::BODY_BYTES_MAX)]
    BodyTooLarge {
        /// Its length.
        bytes: usize,
    },
    /// An argument the protocol can't carry; the text says which.
    #[error("{0}")]
    BadRequest(&'static str),
    /// The gateway refused; [`RefusalCode::retry`] says whether trying again can help.
    #[error("refused: {code}{}", more(*code, text))]
    Refused {
        /// Why.
        code: RefusalCode,
        /// For people, may be empty.
        text: String,
    },
    /// No answer in time. The request may still have been carried out; all requests may be repeated.
    #[error("no answer in time (is the client connected?)")]
    TimedOut,
    /// More requests wait for an answer than the client keeps.
    #[error("too many requests wait for an answer")]
    TooMany,
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
    /// The gateway's answer can't be read: the versions do not fit together.
    #[error("the gateway's answer can't be read")]
    BadAnswer,
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                Self::DatabaseInUse
            }
            _ => Self::Database(Box::new(error)),
        }
    }
}

/// Why a message was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The gateway refused it for good.
    #[error("refused: {0}")]
    Refused(RefusalCode),
    /// Its time to live ended, or it was cancelled, before it was stored. It never will be.
    #[error("it expired or was cancelled before it was stored")]
    Expired,
    /// The client was closed first. The message is in the outbox and goes out when the database is opened again;
    /// [`crate::Client::outbox`] then has its handle.
    #[error("the client was closed; the message stays in the outbox")]
    Closed,
}

/// What a refusal's text says beside what its code says.
fn more(code: RefusalCode, text: &str) -> String {
    if text.is_empty() || text == code.text() { String::new() } else { format!(": {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_everything_once() {
        for (text, want) in [
            ("", "refused: not allowed"),
            ("not allowed", "refused: not allowed"),
            ("only owners may", "refused: not allowed: only owners may"),
        ] {
            let error = Error::Refused { code: RefusalCode::NotAllowed, text: text.to_owned() };
            assert_eq!(error.to_string(), want);
        }
    }
}

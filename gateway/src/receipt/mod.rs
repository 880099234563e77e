//! Stage 6: how far readers are, and what they have missed.
//!
//! - Cursors, not queues: what a device lacks follows from its cursor and the conversation's head.
//! - Unread is counted from the log each time it is asked for; no counter is stored, so none can drift.
//!
//! Not here: live delivery (`fanout`), keeping cursors (the shards' commits).

use fulmar_protocol::close::RefusalCode;
pub use fulmar_store::ReadError;

pub mod catchup;
pub mod resume;
pub mod unread;

/// What a client is told when the log can't be read.
#[must_use]
pub const fn refusal_code(error: &ReadError) -> RefusalCode {
    match error {
        ReadError::Damaged { .. } => RefusalCode::Damaged,
        _ => RefusalCode::StorageUnavailable,
    }
}

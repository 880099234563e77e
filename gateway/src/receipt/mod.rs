//! Stage 6: how far readers are, and what they have missed.
//!
//! - Cursors, not queues: what a device lacks follows from its cursor and the conversation's head.
//! - Unread is counted from the log each time it is asked for; no counter is stored, so none can drift.
//!
//! Not here: live delivery (`fanout`), keeping cursors (the shards' commits).

pub mod catchup;
pub mod resume;
pub mod unread;

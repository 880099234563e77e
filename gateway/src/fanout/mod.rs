//! Stage 4: from one committed record to every connection that is owed it.
//!
//! - A record is encoded once per conversation ([`ring`]); recipients share the bytes.
//! - A connection keeps no message queue, only which conversations it owes and from which seq on ([`owed`]).
//! - Cost follows the sessions that are here ([`roster`]), never the members.
//! - Nobody who publishes ever waits for a reader; who wakes many connections of a core wakes its thread once ([`desk`]).
//!
//! Not here: connections (they take from [`owed`]), the log (whoever falls behind the ring reads it in `receipt`).

pub mod broadcast;
pub mod desk;
pub mod owed;
pub mod push;
pub mod ring;
pub mod roster;

//! Stages 2 and 5: one authenticated connection. Frames go in through `reader` and `dispatch`, what is owed goes
//! out through `writer`.
//!
//! - A connection is one task. What it waits for (streams, its owed set, timers) it waits for concurrently; what it
//!   does with frames it does one after the other, in the order in which they came.
//! - It keeps no messages: the log and the rings do.
//! - Control, lanes and backlog are written independently: a client that does not read its lanes still gets acks.
//!
//! Not here: what a send does (`conversation`), who is owed what (`fanout`).

mod allowance;
mod copies;
mod dispatch;
pub mod driver;
pub(crate) mod lateness;
mod loops;
mod reader;
mod turns;
mod writer;

pub use self::driver::serve;

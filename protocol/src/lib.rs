//! What both ends of Fulmar agree on: frames and their bytes, limits, codes, and the state machines of a session.
//!
//! Nothing here knows a runtime, a socket, a clock, a random source or a file (`clippy.toml` of this crate forbids
//! them). What happened comes in as arguments, what should happen comes out of `poll_*`:
//!
//! 1. [`frame::Decoder`] turns stream bytes into [`frame::Frame`]s; payloads are slices of what came in.
//! 2. [`session::client::Client`] and [`session::gateway::Gateway`] take frames and the time (`handle`), and say what
//!    to transmit or carry out (`poll_output`) and when they want to be woken (`poll_timeout`).
//! 3. [`producer`] is the one place that decides whether a send is new, a repetition, early or refused.
//!
//! Order of calls, for both halves: `handle(..)` any number of times, then `poll_output()` until `None`, then sleep
//! until `poll_timeout()` or the next input.
//!
//! Not here: storage (`fulmar-store`), transport (`fulmar-gateway`, `fulmar-client`).

pub mod close;
pub mod error;
pub mod frame;
pub mod id;
pub mod limit;
pub mod producer;
pub mod service;
pub mod session;
pub mod version;

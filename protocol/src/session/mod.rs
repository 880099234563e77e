//! The session halves: what each end of a connection does about frames and time.
//!
//! - [`client`] outlives connections: it keeps what is unacked, where readers are and what was asked for, and says it
//!   again on the next connection. [`gateway`] lives as long as one connection: everything it knows is soft.
//! - States and their transitions are tables in [`state`].
//! - Nothing here waits, sleeps or draws a number: time is an argument (a duration since any fixed start).
//!
//! Not here: what a record means, who may do what (the gateway's stages), when to reconnect (the SDK's driver).

mod acks;
pub mod client;
pub mod digest;
pub mod gateway;
pub mod hedge;
mod inflight;
mod reading;
mod request;
pub mod rtt;
pub mod state;
mod timer;
mod window;

//! Stage 1: a connection comes in. Is there room for it, and is its handshake in order?
//!
//! - Whoever is let past here is within every bound.
//! - Nothing in here knows conversations.
//!
//! Not here: who it is (`identity`), what it says (`connection`).

pub mod admission;
pub mod book;
pub mod endpoint;
pub mod resets;
mod sessions;
pub mod sockets;
pub mod steering;
pub mod stream;
pub mod tls;
mod waiting;

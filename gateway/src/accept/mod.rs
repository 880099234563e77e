//! 1. A connection comes in: is there room for it, and who is it?
//!
//! - Whoever is let past here has proven who it is, by a token or a ticket, and is within every bound.
//! - Nothing in here knows conversations.
//!
//! Not here: what an admitted connection says (`connection`).

pub mod admission;
pub mod auth;
pub mod endpoint;
pub mod ticket;
pub mod tls;

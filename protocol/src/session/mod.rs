//! Session halves.

pub mod digest;

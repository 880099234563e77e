//! Tests of the protocol from outside: bytes, damage, and two halves over a bad link.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod damage;
mod golden;
mod halves;
mod lone;
mod pair;
mod world;

//! A small world for tests: whatever happens in it is read off a string of bytes, so that property tests and fuzzers
//! drive the same code and what one finds the other replays.
//!
//! `source` turns bytes into choices, `frames` into frames, `pair` into a schedule for clients, gateway, log and link.
//!
//! The fuzz targets include this folder by path.

pub(crate) mod frames;
pub(crate) mod pair;
pub(crate) mod source;

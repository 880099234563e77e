//! The rigs of the store.
fn main() {}

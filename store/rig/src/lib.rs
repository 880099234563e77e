//! The rigs of the store.

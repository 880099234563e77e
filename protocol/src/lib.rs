//! What both ends of Fulmar agree on.
pub mod id;
pub mod limit;

//! The gateway.

pub mod accept;
pub mod config;
pub mod data_folder;

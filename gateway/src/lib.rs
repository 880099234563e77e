//! The gateway.

pub mod accept;
pub mod config;
pub mod data_folder;
pub mod drain;
pub mod http;
pub mod metrics;
pub mod open_files;
pub mod telemetry;

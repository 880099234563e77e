//! The gateway: phones talk to it over QUIC, it keeps every message in a log on local disk, hands it to whoever is
//! online and lets everybody else catch up.
//!
//! The path of a message is the list of folders, in the order in which it meets them:
//!
//! 1. [`accept`]: is there room for this connection?
//! 2. [`connection`]: who is it ([`identity`])? Then its frames, in order, each to whom it concerns.
//! 3. [`conversation`]: the shard that owns the conversation decides, appends, commits; then it answers.
//! 4. [`fanout`]: the committed record is encoded once; whoever is here is owed it.
//! 5. [`connection`] again: its writer gathers what is owed and writes it.
//! 6. [`receipt`]: cursors come back; who missed something catches up from the log.
//!
//! Besides: [`service`] answers calls, [`context`] is what they share, [`ground`] is what they stand on, [`gateway`] wires everything, [`cli`] is the binary `fulmar`.
//!
//! Not here: what the bytes mean (`fulmar_protocol`), how they are kept (`fulmar_store`).

pub mod accept;
pub mod broadcasts;
pub mod cli;
pub mod config;
pub mod connection;
pub mod context;
pub mod conversation;
mod cores;
pub mod data_folder;
pub mod drain;
pub mod fanout;
pub mod gateway;
pub mod ground;
pub mod http;
pub mod identity;
pub mod metrics;
pub mod open_files;
pub mod receipt;
pub mod record;
pub mod retention;
pub mod service;
pub mod telemetry;

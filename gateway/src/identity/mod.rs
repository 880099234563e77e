//! Who somebody is: a token of the business, or a ticket of an earlier session.
//!
//! - A proof says everything that is needed to trust it; nothing is looked up in the log.
//! - Secrets are never printed, and compared in constant time.
//!
//! Not here: letting connections in (`accept`), finding the user and the device in the log (`connection`).

pub mod ticket;
pub mod token;

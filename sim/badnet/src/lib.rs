//! A bad network in a box, and the judge of what came through it.
//!
//! Use it in two ways: put [`Proxy`] between real clients and a real gateway on loopback, or drive the pure parts
//! ([`net`], [`fault`], [`history`], [`checker`]) from a world of your own in virtual time.
//!
//! - Everything that decides is pure: it is handed the time ([`SimTime`]) and its chance ([`Rng`]), so a seed
//!   repeats it exactly.
//! - Only the proxy's driver knows sockets, threads and the clock.
//!
//! | to | use |
//! |---|---|
//! | say what a network does to packets | [`net::Impairment`], [`Path`], or a named [`Profile`] |
//! | let things go wrong at a moment | [`FaultPlan`] |
//! | put that between clients and a gateway | [`Proxy`] |
//! | note what happened, and judge it | [`history::Recorder`], [`checker::check`] |
//! | say how long it took | [`figures::Latencies`] |
//! | have something to say | [`dialogue::read_file`], [`dialogue::generate`] |

pub mod checker;
pub mod dialogue;
pub mod fault;
pub mod figures;
pub mod history;
pub mod net;
pub mod profile;
pub mod proxy;
mod rng;
mod time;

pub use fault::{FaultPlan, FlowId};
pub use net::Path;
pub use profile::Profile;
pub use proxy::Proxy;
pub use rng::{Rng, Share};
pub use time::SimTime;

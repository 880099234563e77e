//! A whole world in one process.
//!
//! Everything that is pure lies in `fulmar-badnet` and is found here under the same names.

mod bite;
mod disk;
mod entropy;
mod log;
mod network;
mod people;
mod phone;
mod plan;
mod process;
mod seed;
mod socket;
mod stream;
mod tcp;
mod world;

pub use bite::{Bite, Bites};
pub use disk::DiskManner;
pub use fulmar_badnet::{
    FaultPlan, FlowId, Path, Profile, Proxy, Rng, Share, SimTime, checker, dialogue, fault, figures, history,
    net, profile, proxy,
};
pub use network::{Direction, Traffic};
pub use seed::{SeedReport, run_seed};
pub use world::{Ended, Gateway, Phone, Recorder, Sim, World};

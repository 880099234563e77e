//! A whole world in one process.
//!
//! Everything that is pure lies in `fulmar-badnet` and is found here under the same names.

pub use fulmar_badnet::{
    FaultPlan, FlowId, Path, Profile, Proxy, Rng, Share, SimTime, checker, dialogue, fault, figures, history,
    net, profile, proxy,
};

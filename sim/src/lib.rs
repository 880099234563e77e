//! A whole world in one process: your app's own code, the real SDK, a real gateway and real QUIC, on a network as bad as you
//! like, in virtual time.
//!
//! - **Exact.** Everything follows from a seed: random numbers (also those of the C library), time, the network, the disk. The
//!   first world of a process repeats to the byte of its event log; later ones may wake the watchers of one channel in another
//!   order, because tokio draws that from a counter of the process.
//! - **Quick.** Time passes only while everybody waits. A day of silence takes milliseconds.
//! - **Bad.** Packets are lost, doubled, reordered, damaged, late and too large; networks go dark, change, forget and block; phones
//!   are suspended, killed and wrong about the time; the gateway is killed and drained; its disk is slow and fails. Which of that
//!   really happened is counted where it happens ([`Bites`]).
//!
//! ```
//! use std::time::Duration;
//! use fulmar_sim::{Profile, World};
//!
//! let ended = World::new(1).profile(Profile::Metro).run(async |sim| {
//!     let phone = sim.phone("alice");
//!     // Hand `phone.options()` to your app's own code, or make a client here.
//!     let alice = phone.connect().await?;
//!     let bob = sim.phone("bob").connect().await?;
//!     // Bob has to be somebody before he can be written to.
//!     anyhow::ensure!(bob.state().live().await, "bob's client closed");
//!     let handle = alice.direct("bob").await?.send("see you at the station").await?;
//!     phone.freeze(true);
//!     sim.sleep(Duration::from_secs(600)).await;
//!     phone.freeze(false);
//!     Ok(handle.acked().await?.get())
//! });
//! assert!(ended.value.expect("it is acked") >= 1);
//! ```
//!
//! | to | use |
//! |---|---|
//! | live in a world | [`World::run`], [`Sim`] |
//! | treat a phone badly | [`Phone`] |
//! | treat the gateway badly | [`Gateway`], [`DiskManner`] |
//! | note what people saw, and have it judged | [`Sim::record`], [`checker::check`] |
//! | know what it cost a phone's radio, processor and data plan | [`Phone::spent`], and `cargo xtask days` for whole days |
//! | let a seed decide everything | [`run_seed`], and `cargo xtask sim` for many |
//!
//! What is pure (links, profiles, histories, the checker) lies in `fulmar-badnet` and is found here under the same names.
//!
//! How it is done: `world` puts a gateway and phones on one thread with tokio's paused clock; `entropy` answers for the C library's
//! random numbers; `network` carries packets between `socket`s and bytes between `stream`s (`tcp`); `phone` is the SDK's platform,
//! and `process` what can be suspended and killed; `disk` lies under the gateway's log. `plan`, `people` and `seed` are the
//! campaign's worlds.

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
mod spent;
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
pub use spent::{RADIO_TAIL, REST, Spent};
pub use world::{Ended, Gateway, Phone, Recorder, Sim, World};

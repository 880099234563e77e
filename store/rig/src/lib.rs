//! Rigs for the store: real processes, real files, and a disk that does what disks do at their worst.
//!
//! - [`power`]: the power goes at any point of a recording; whatever the disk may hold is opened with the real store.
//! - [`kill`]: a process is killed at work and while it opens, at any time and at named points.
//! - [`damage`]: files are damaged; every answer is right, or refused with a report.
//! - [`prove`]: each rig finds a fault that was planted.
//! - What a store must hold is worked out from a [`history`] and compared by [`check`], down to every row.
//!
//! The binary `store-rig` is the way in; `cargo xtask power-cut` builds and starts it. `docs/storage.md` says what the rigs
//! assume of a disk.

pub mod chance;
pub mod check;
pub mod damage;
pub mod disk;
pub mod history;
pub mod kill;
pub mod power;
pub mod prove;
pub mod recording;
pub mod scratch;
pub mod work;

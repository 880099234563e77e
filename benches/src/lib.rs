//! What the benches share: seeded workloads, meters, reports, the floors' servers and a phone without a disk.
//!
//! - A figure counts beside its floor, measured in the same run by the same loop; the report shows the ratio.
//! - CPU is read from the kernel's accounting of the process that does the work, never inferred from elapsed time.
//! - Everything is bounded and seeded; `--quick` is the same work for a few seconds.
//!
//! Not here: what is measured (`benches/`), what came out (`RESULTS.md`).

pub mod bare;
pub mod command;
pub mod meter;
pub mod mqtt;
pub mod payload;
pub mod phone;
pub mod plot;
pub mod process;
pub mod report;
pub mod schedule;
pub mod times;

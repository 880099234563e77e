//! A library to preload (`LD_PRELOAD`) into a process, which then meets a worse disk than the machine has: everything done to
//! files below one folder is recorded, or takes longer, or fails, or is the last thing the process does.
//!
//! - It stands in for the file calls of the C library (also their 64-bit names) and makes the system calls itself. Calls that
//!   go around the C library are not seen: programs that use `rustix` must be built with its feature `use-libc`.
//! - Without `FULMAR_FAULTDISK_ROOT` it does nothing. Files elsewhere are passed through untouched.
//! - Changes below the root are made one at a time, under a lock, so the recording has them in the order in which they
//!   happened. Syncs run beside each other; their begin and end stand in that order.
//!
//! | variable | meaning |
//! |---|---|
//! | `FULMAR_FAULTDISK_ROOT` | the folder, as an absolute path without `..` and links |
//! | `FULMAR_FAULTDISK_RECORD` | the recording is written to this file; its bytes are described in `recording.rs` |
//! | `FULMAR_FAULTDISK_MARKS` | what the program writes to this file stands in the recording as marks |
//! | `FULMAR_FAULTDISK_SYNC_DELAY_US` | every sync takes so many microseconds more |
//! | `FULMAR_FAULTDISK_RULES` | rules, separated by `;`: what fails, is left out, or kills; described in `rule.rs` |
//!
//! A setting that makes no sense ends the process with exit status 112, before it has done anything.
//!
//! Shared writable mappings of a file below the root can't be recorded; neither sled 0.34 nor fjall 3 nor the store use any. One
//! that is made all the same is written down as `Unsupported`, and whoever reads the recording refuses it.
//!
//! Not here: what a recording is used for (`fulmar-store-rig`).

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod disk;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
#[expect(unreachable_pub, reason = "the same file is compiled into the rig, where it is public")]
mod recording;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod rule;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod symbol;
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
mod system;

//! The binary `fulmar`: see `fulmar --help`.

use std::process::ExitCode;

/// Threads that hand messages to each other free what others allocated; mimalloc is quicker at that than the system's allocator, and
/// does not move its heaps' ends with system calls (`benches/RESULTS.md`, "The allocator").
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    fulmar_gateway::cli::run(std::env::args_os())
}

//! The `wattune` command: arguments in, exit status out.

use std::process::ExitCode;

/// Measured against the system's allocator: a training step spends an eighth of the time on allocation.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    wattune::cli::main()
}

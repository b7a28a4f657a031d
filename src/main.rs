//! The `wattune` command: arguments in, exit status out.

use std::process::ExitCode;

/// Measured against the system's allocator: a training step spends an eighth of the time on allocation.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's number of the option `purge_delay`; -1 is never.
const PURGE_DELAY: i32 = 15;

fn main() -> ExitCode {
    // Every step asks for the same memory again: given back to the system in between, its pages would be cleared each time.
    // SAFETY: sets a number inside the allocator.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    wattune::cli::main()
}

//! Mutated files for every reader of files from outside: no panic, no abort, no hang, no flood of memory.
//!
//! Each target mutates valid files for `WATTUNE_FUZZ_SECONDS` (3 where unset; all targets run at once) or for `WATTUNE_FUZZ_INPUTS`
//! inputs, from `WATTUNE_FUZZ_SEED`. An input stays in the target's folder until it has passed, so that also an abort leaves it.
//!
//! ```text
//! WATTUNE_FUZZ_INPUTS=1000000 cargo test --release --test fuzz -- --nocapture
//! ```

mod mutate;
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mutate::Mutator;

/// The longest that one input may take.
const SLOW: Duration = Duration::from_secs(5);
/// The most resident memory of the whole process.
const MEMORY_KIB: u64 = 1 << 20;

/// A reader, and valid files for it.
struct Target {
    name: &'static str,
    /// The name of the file that it reads.
    file: &'static str,
    seeds: Vec<Vec<u8>>,
    /// Words that mutation inserts.
    words: &'static [&'static str],
    read: Box<dyn Fn(&Path)>,
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn fuzz(target: &Target) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join("fuzz")
        .join(target.name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join(target.file);
    for seed in &target.seeds {
        fs::write(&file, seed).unwrap();
        (target.read)(&file);
    }
    let inputs = variable("WATTUNE_FUZZ_INPUTS");
    let seconds = Duration::from_secs(variable("WATTUNE_FUZZ_SECONDS").unwrap_or(3));
    let mut mutator = Mutator::new(variable("WATTUNE_FUZZ_SEED").unwrap_or(1), target.words);
    let begun = Instant::now();
    let mut done = 0;
    while inputs.map_or(begun.elapsed() < seconds, |inputs| done < inputs) {
        fs::write(&file, mutator.next(&target.seeds)).unwrap();
        let started = Instant::now();
        let read = catch_unwind(AssertUnwindSafe(|| (target.read)(&file)));
        assert!(read.is_ok(), "a panic: see {}", file.display());
        assert!(started.elapsed() < SLOW, "slow: see {}", file.display());
        done += 1;
    }
    let peak = peak_kib();
    assert!(peak < MEMORY_KIB, "{peak} KiB after {}", target.name);
    println!(
        "{}: {done} inputs in {:.0} s, peak {} MiB",
        target.name,
        begun.elapsed().as_secs_f64(),
        peak / 1024
    );
    fs::remove_dir_all(&folder).unwrap();
}

/// The largest resident memory of this process so far; zero where the system does not tell.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.map_or(0, |number| number.parse().unwrap())
}

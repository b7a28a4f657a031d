//! Memory bandwidth by level: copies within main memory, and within each cache.
//!
//! Takes a device, a profile and a time, returns bytes per second, read and written. Cache sizes come from Linux's sysfs, else
//! from the profile.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::energy::{MeasuredCache, Profile};
use crate::error::Result;
use crate::measure::machine::memory;
use crate::ops::dtype;
use crate::units::Bytes;
use crate::work::Precision;

/// Bytes per task of a parallel copy.
const CHUNK: usize = 4 << 20;
/// A level must hold this many times the level inside it to be measured.
const MIN_RATIO: u64 = 4;
/// Bytes that a thread copies between clock readings: milliseconds, so that starting threads weighs little.
const BYTES_PER_TIMING: usize = 64 << 20;
/// Linux's description of the first CPU's caches.
const SYSFS: &str = "/sys/devices/system/cpu/cpu0/cache";

/// Bandwidth of main memory, read and write, by copies of `buffer`: the best within `each`, and a caveat. As in STREAM (McCalpin
/// 1995), write-allocate traffic is not counted.
pub(super) fn dram(
    device: &Device,
    buffer: Bytes,
    each: Duration,
) -> Result<(f64, Option<String>)> {
    let room = memory().map_or(buffer.0, |(free, _)| free.0 / 8);
    let bytes = buffer.0.min(room).max(CHUNK as u64) as usize;
    if device.is_cpu() {
        let (source, mut target) = (vec![1u8; bytes], vec![0u8; bytes]);
        let copy = || {
            let parts = target.par_chunks_mut(CHUNK).zip(source.par_chunks(CHUNK));
            parts.for_each(|(target, source)| target.copy_from_slice(source));
            Ok(())
        };
        return Ok((
            best_copy(2.0 * bytes as f64, each, copy)?,
            too_small(2 * bytes as u64, &system_caches(Path::new(SYSFS))),
        ));
    }
    let (source, target) = (
        Tensor::ones(bytes / 4, dtype(Precision::F32), device)?,
        Tensor::zeros(bytes / 4, dtype(Precision::F32), device)?,
    );
    let copy = || {
        target.slice_set(&source, 0, 0)?;
        Ok(device.synchronize()?)
    };
    Ok((best_copy(2.0 * bytes as f64, each, copy)?, None))
}

/// A note if the last cache may have served part of the copy.
fn too_small(copied: u64, caches: &[Cache]) -> Option<String> {
    let last = caches
        .last()
        .filter(|last| copied < MIN_RATIO * last.bytes)?;
    Some(format!(
        "memory: {} were copied, and the system shows a last cache of {}: it may have served a part of them",
        Bytes(copied),
        Bytes(last.bytes)
    ))
}

/// Bandwidth of each cache of `profile` to all threads together, with the sizes of private ones; notes on levels not measured.
pub(super) fn caches(
    profile: &Profile,
    mut each: impl FnMut() -> Duration,
) -> Result<(Vec<MeasuredCache>, Vec<String>)> {
    let mut notes = Vec::new();
    let mut found = Vec::new();
    let mut inner: Option<u64> = None;
    for level in levels(profile, &system_caches(Path::new(SYSFS))) {
        // L1 is not charged: register traffic is part of an operation.
        let set = inner.map(|inner| working_set(inner, level.per_thread));
        inner = Some(level.per_thread);
        let bandwidth = match set {
            Some(Some(set)) => Some((cache_bandwidth(set, each())?.round(), set)),
            Some(None) => {
                notes.push(format!(
                    "{} was not measured: it is not {MIN_RATIO} times what is inside it",
                    level.name
                ));
                None
            }
            None => None,
        };
        found.push(MeasuredCache {
            name: level.name,
            bytes: level.private,
            bandwidth,
        });
    }
    Ok((found, notes))
}

/// A cache level of a profile, sized for this machine.
#[derive(Debug, PartialEq)]
struct Sized {
    name: String,
    /// A thread's share when all threads run.
    per_thread: u64,
    /// Size of a core's private cache, if the system shows it.
    private: Option<Bytes>,
}

/// The profile's levels with the system's sizes: "L1" and "L2" by number, a shared last level as the system's outermost.
fn levels(profile: &Profile, shown: &[Cache]) -> Vec<Sized> {
    let siblings = shown.iter().map(|cache| cache.cpus).min().unwrap_or(1);
    let sized = |level: &crate::energy::profile::CacheLevel| {
        let numbered = |cache: &&Cache| level.name == format!("L{}", cache.level);
        let outermost = shown.last().filter(|cache| level.shared && cache.level > 2);
        let cache = shown.iter().find(numbered).or(outermost);
        let cores = if level.shared {
            profile.cores.unwrap_or(1) as u64
        } else {
            1
        };
        Sized {
            name: level.name.clone(),
            per_thread: cache.map_or(level.bytes.0 / cores, |cache| cache.bytes / cache.cpus),
            private: cache
                .filter(|_| !level.shared)
                .map(|cache| Bytes(cache.bytes * siblings / cache.cpus)),
        }
    };
    profile.caches.iter().map(sized).collect()
}

/// Working set of a thread that fits a level's share `outer` but not `inner`: their geometric mean. `None` if they are too close.
fn working_set(inner: u64, outer: u64) -> Option<Bytes> {
    (outer >= MIN_RATIO * inner).then(|| Bytes((inner as f64 * outer as f64).sqrt() as u64))
}

/// Bandwidth of all threads together, each copying within a private working set of `set` bytes.
fn cache_bandwidth(set: Bytes, each: Duration) -> Result<f64> {
    let half = (set.0 / 2).max(1) as usize;
    let buffers: Vec<_> = (0..rayon::current_num_threads())
        .map(|_| Mutex::new((vec![1u8; half], vec![0u8; half])))
        .collect();
    let times = (BYTES_PER_TIMING / half).max(1);
    let copy = || {
        rayon::broadcast(|context| {
            // Uncontended: each thread locks its own entry.
            let Ok(mut buffers) = buffers[context.index()].lock() else {
                return;
            };
            let (source, target) = &mut *buffers;
            for _ in 0..times {
                target.copy_from_slice(std::hint::black_box(source));
                std::hint::black_box(&mut *target);
            }
        });
        Ok(())
    };
    best_copy(2.0 * (half * times * buffers.len()) as f64, each, copy)
}

/// The best rate of `copy`, which moves `bytes`. The first run maps the memory and is not timed.
fn best_copy(bytes: f64, each: Duration, mut copy: impl FnMut() -> Result<()>) -> Result<f64> {
    copy()?;
    let start = Instant::now();
    let mut best = 0.0_f64;
    loop {
        let before = Instant::now();
        copy()?;
        best = best.max(bytes / before.elapsed().as_secs_f64());
        if start.elapsed() >= each {
            return Ok(best);
        }
    }
}

/// A cache in sysfs.
#[derive(Debug, Clone, PartialEq)]
struct Cache {
    level: u64,
    bytes: u64,
    /// CPUs that share it.
    cpus: u64,
}

/// Data and unified caches by level, innermost first; empty if there is no sysfs.
fn system_caches(folder: &Path) -> Vec<Cache> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut caches: Vec<Cache> = entries
        .filter_map(|entry| cache(&entry.ok()?.path()))
        .collect();
    caches.sort_by_key(|cache| cache.level);
    caches
}

fn cache(folder: &Path) -> Option<Cache> {
    let read = |name: &str| {
        std::fs::read_to_string(folder.join(name))
            .ok()
            .map(|text| text.trim().to_string())
    };
    let size = read("size")?;
    let (digits, unit) = size.split_at(
        size.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(size.len()),
    );
    let times = [("", 1), ("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30)]
        .iter()
        .find(|(name, _)| *name == unit)?
        .1;
    let bytes = digits.parse::<u64>().ok()?.checked_mul(times)?;
    let cache = Cache {
        level: read("level")?.parse().ok()?,
        bytes,
        cpus: count_cpus(&read("shared_cpu_list")?)?,
    };
    (read("type")? != "Instruction" && bytes > 0 && cache.cpus > 0).then_some(cache)
}

/// The number of CPUs in a list such as "0-3,8,10-11".
fn count_cpus(cpus: &str) -> Option<u64> {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        (last.parse::<u64>().ok()? + 1).checked_sub(first.parse().ok()?)
    };
    cpus.split(',').map(range).sum()
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    /// A folder as Linux has it: (level, type, size, processors).
    fn machine(caches: &[(&str, &str, &str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (index, (level, kind, size, cpus)) in caches.iter().enumerate() {
            let own = folder.path().join(format!("index{index}"));
            std::fs::create_dir(&own).unwrap();
            let files = [
                ("level", level),
                ("type", kind),
                ("size", size),
                ("shared_cpu_list", cpus),
            ];
            files.iter().for_each(|(name, text)| {
                std::fs::write(own.join(name), format!("{text}\n")).unwrap()
            });
        }
        folder
    }

    #[test]
    fn the_system_s_caches_size_the_profile_s_levels() {
        // Two threads on each of eight cores; an instruction cache and one of unknown size beside them.
        let folder = machine(&[
            ("1", "Data", "48K", "0,8"),
            ("1", "Instruction", "32K", "0,8"),
            ("2", "Unified", "2048K", "0,8"),
            ("3", "Unified", "32M", "0-15"),
            ("4", "Unified", "many", "0-15"),
        ]);
        let shown = system_caches(folder.path());
        let cache = |level, bytes, cpus| Cache { level, bytes, cpus };
        assert_eq!(
            shown,
            [
                cache(1, 48 << 10, 2),
                cache(2, 2 << 20, 2),
                cache(3, 32 << 20, 16)
            ]
        );
        let profile = Profile::named("generic-cpu@2").unwrap();
        let sized = |name: &str, per_thread, own: Option<u64>| Sized {
            name: name.into(),
            per_thread,
            private: own.map(Bytes),
        };
        let own = [
            sized("L1", 24 << 10, Some(48 << 10)),
            sized("L2", 1 << 20, Some(2 << 20)),
            sized("LLC", 2 << 20, None),
        ];
        assert_eq!(levels(&profile, &shown), own);
        // 2 MiB of the last level are not four times the MiB of L2 that a thread has.
        assert_eq!(working_set(1 << 20, 2 << 20), None);
        assert_eq!(working_set(16 << 10, 1 << 20), Some(Bytes(128 << 10)));
        // Where the system says nothing, the sizes are the profile's, a shared one by its cores.
        let own = [
            sized("L1", 32 << 10, None),
            sized("L2", 1 << 20, None),
            sized("LLC", 2 << 20, None),
        ];
        assert_eq!(
            levels(&profile, &super::system_caches(&folder.path().join("none"))),
            own
        );
    }

    #[test]
    fn processors_are_listed_as_linux_lists_them() {
        assert_eq!(
            (
                count_cpus("0"),
                count_cpus("0-1"),
                count_cpus("0-3,8,10-11")
            ),
            (Some(1), Some(2), Some(7))
        );
        assert_eq!(
            (count_cpus(""), count_cpus("3-1"), count_cpus("a-b")),
            (None, None, None)
        );
    }

    #[test]
    fn a_copy_that_the_last_cache_may_have_served_is_noted() {
        let last = |bytes| {
            [Cache {
                level: 3,
                bytes,
                cpus: 2,
            }]
        };
        assert_eq!(too_small(400, &last(100)), None);
        let note = too_small(399, &last(100)).unwrap();
        assert!(note.contains("399 B") && note.contains("100 B"), "{note}");
        assert_eq!(too_small(1, &[]), None);
    }

    #[test]
    fn a_copy_in_a_cache_moves_what_it_says() {
        // No memory of any machine is slower than a MB/s or faster than a PB/s: a rate a thousand times off would be.
        let rate = cache_bandwidth(Bytes(64 << 10), Duration::from_millis(5)).unwrap();
        assert!(rate > 1e8 && rate < 1e14, "{rate}");
    }

    #[test]
    fn the_best_copy_is_timed_after_the_first() {
        // Of copies that take 30, 4 and 2 ms the first is not timed and the last is the best: at most 1000 bytes in 2 ms.
        let mut pauses = vec![2, 4, 30];
        let copy = || {
            sleep(Duration::from_millis(pauses.pop().unwrap_or(4)));
            Ok(())
        };
        let rate = best_copy(1000.0, Duration::from_millis(6), copy).unwrap();
        assert!(rate > 1000.0 / 0.03 && rate <= 1000.0 / 0.002, "{rate}");
    }
}

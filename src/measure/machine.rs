//! Memory, disk and processor name of this machine.

use crate::units::Bytes;

/// Brand string of the first processor, or "unknown".
pub fn cpu_name() -> String {
    let brand = sysinfo::System::new().ok().and_then(|mut system| {
        system.refresh_cpu_all();
        let cpu = system.cpus().first()?;
        Some(cpu.brand().trim().to_string())
    });
    brand.unwrap_or_else(|| "unknown".to_string())
}

/// The largest resident memory of this process so far.
pub fn peak_rss() -> Option<Bytes> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(Bytes(kibibytes * 1024))
}

/// Available and total memory, of the cgroup if it is limited.
pub fn memory() -> Option<(Bytes, Bytes)> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let (free, all) = match system.cgroup_limits() {
        Some(limits) if limits.total_memory > 0 => (
            limits.free_memory.min(system.available_memory()),
            limits.total_memory,
        ),
        _ => (system.available_memory(), system.total_memory()),
    };
    (all > 0).then_some((Bytes(free), Bytes(all)))
}

/// Available memory.
pub fn free_memory() -> Option<Bytes> {
    memory().map(|(free, _)| free)
}

//! Memory, disk and processor name of this machine.

use candle_core::Device;

use crate::ops::device_memory;
use crate::units::{Bytes, Seconds};

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

/// CPU time of this process, all threads together; `None` where the system does not report it.
pub fn cpu_time() -> Option<Seconds> {
    #[cfg(unix)]
    {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes to the one struct that it is given, which lives until it returns.
        let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
        (status == 0).then_some(Seconds(time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64))
    }
    #[cfg(not(unix))]
    None
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

/// Available memory of a computing device: a GPU's own, else the machine's.
pub fn free_memory(device: &Device) -> Option<Bytes> {
    match device {
        Device::Cuda(_) => device_memory(device).map(|free| Bytes(free as u64)),
        _ => memory().map(|(free, _)| free),
    }
}

//! A fake NVML library: the C functions that wattune resolves in `libnvidia-ml.so.1`, with their public signatures (NVML API
//! reference and `nvml.h`, docs.nvidia.com/deploy/nvml-api). Built as a shared library by the tests.
//!
//! Returns the contents of the file that `WATTUNE_TEST_CARDS` names, read at every call: one GPU a line,
//! "UUID;name;millijoules;milliwatts". `!15` in place of a number, or of the UUID, is the return code of the function that returns it (the
//! UUID's: of the function that returns the handle); a line of `!9` alone is that of nvmlInit_v2. Millijoules that end in `+` rise by
//! one a call.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::atomic::{AtomicU64, Ordering};

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 2;
const INSUFFICIENT_SIZE: c_int = 7;

type Device = *mut c_void;

fn lines() -> Vec<String> {
    let path = std::env::var("WATTUNE_TEST_CARDS").expect("the test names the file");
    std::fs::read_to_string(path).expect("the test wrote it").lines().map(str::to_string).collect()
}

/// A field of a GPU's line, or its return code. A handle is the number of the line, from one.
fn field(device: Device, field: usize) -> Result<String, c_int> {
    let line = lines().get((device as usize).wrapping_sub(1)).cloned().ok_or(INVALID_ARGUMENT)?;
    let text = line.split(';').nth(field).ok_or(INVALID_ARGUMENT)?;
    match text.strip_prefix('!') {
        Some(code) => Err(code.parse().expect("a return code")),
        None => Ok(text.to_string()),
    }
}

fn answer<T>(found: Result<T, c_int>, give: impl FnOnce(T) -> c_int) -> c_int {
    found.map_or_else(|code| code, give)
}

unsafe fn text(found: Result<String, c_int>, buffer: *mut c_char, length: c_uint) -> c_int {
    answer(found, |text| {
        if text.len() >= length as usize {
            return INSUFFICIENT_SIZE;
        }
        // SAFETY: the caller's buffer holds `length` bytes, of which the text and its zero are no more.
        unsafe {
            buffer.copy_from_nonoverlapping(text.as_ptr().cast(), text.len());
            buffer.add(text.len()).write(0);
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> c_int {
    lines().iter().find_map(|line| line.strip_prefix('!').filter(|code| !code.contains(';'))?.parse().ok()).unwrap_or(SUCCESS)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) -> c_int {
    unsafe { text(Ok("580.95.05".to_string()), version, length) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> c_int {
    unsafe { count.write(lines().len() as c_uint) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut Device) -> c_int {
    let handle = (index as usize + 1) as Device;
    answer(field(handle, 0), |_| {
        unsafe { device.write(handle) };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: Device, uuid: *mut c_char, length: c_uint) -> c_int {
    unsafe { text(field(device, 0), uuid, length) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(device: Device, name: *mut c_char, length: c_uint) -> c_int {
    unsafe { text(field(device, 1), name, length) }
}

/// Millijoules since the driver was loaded.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEnergyConsumption(device: Device, energy: *mut c_ulonglong) -> c_int {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    answer(field(device, 2), |number| {
        let calls = CALLS.fetch_add(u64::from(number.ends_with('+')), Ordering::Relaxed);
        let millijoules: u64 = number.trim_end_matches('+').parse().expect("millijoules");
        unsafe { energy.write(millijoules + calls) };
        SUCCESS
    })
}

/// Milliwatts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPowerUsage(device: Device, power: *mut c_uint) -> c_int {
    answer(field(device, 3), |number| {
        unsafe { power.write(number.parse().expect("milliwatts")) };
        SUCCESS
    })
}

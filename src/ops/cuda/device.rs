//! Opening of a CUDA device, and its memory.

use candle_core::Device;

use super::backend;
use super::self_test::self_test;
use crate::error::{Error, Kind, Result};

/// Skips the self-test of the kernels if it is set.
const SKIP_SELF_TEST: &str = "WATTUNE_SKIP_SELF_TEST";

/// Opens the CUDA device `index`: one stream for all threads, a memory pool that keeps what is freed, and kernels that pass their self-test,
/// unless `WATTUNE_SKIP_SELF_TEST` is set.
///
/// # Errors
/// [`Kind::Device`] without a driver or such a device, and where a kernel gives a wrong result.
pub fn open_cuda(index: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(index).map_err(|source| {
        Error::new(Kind::Device, "the CUDA device cannot be used")
            .value(format!("cuda:{index}: {source}"))
            .rule("a device that `nvidia-smi` lists, and a driver for CUDA 13 (580 or newer)")
            .hint("choose another index with `--device cuda:N`, or use `--device cpu`")
    })?;
    backend::prepare(&device)?;
    if std::env::var_os(SKIP_SELF_TEST).is_none() {
        self_test(&device)?;
    }
    Ok(device)
}

/// Free memory of a CUDA device in bytes; `None` where the driver does not say.
pub fn device_memory(device: &Device) -> Option<usize> {
    backend::free_memory(device)
}

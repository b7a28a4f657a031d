//! The compute device that `--device` names, and the report's `environment` block.

use std::str::FromStr;

use candle_core::Device;

use crate::energy::Computing;
use crate::error::{Error, Kind, Result};
use crate::measure::machine::cpu_name;
use crate::ops::open_cuda;
use crate::report::types::Environment;
use crate::work::Precision;

/// A compute device as `--device` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first accelerator of this build and machine, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU by index.
    Cuda(usize),
    /// An Apple GPU by index.
    Metal(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
        let index = index.parse().map_err(|_| unknown(name))?;
        match kind {
            "auto" if name == kind => Ok(Self::Auto),
            "cpu" if name == kind => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(index)),
            "metal" => Ok(Self::Metal(index)),
            _ => Err(unknown(name)),
        }
    }
}

impl DeviceChoice {
    /// The candle device, and which counter measures it.
    ///
    /// # Errors
    /// [`Kind::Device`] where this build lacks the backend or the machine the device.
    pub fn open(self) -> Result<(Device, Computing)> {
        match self {
            Self::Auto => automatic(),
            Self::Cpu => Ok((Device::Cpu, Computing::Cpu)),
            Self::Cuda(index) if cfg!(feature = "cuda") => {
                Ok((open_cuda(index)?, Computing::Nvidia(index as u32)))
            }
            Self::Metal(index) if cfg!(feature = "metal") => Ok((
                Device::new_metal(index).map_err(unusable)?,
                Computing::Other,
            )),
            Self::Cuda(index) => Err(not_built("cuda", index)),
            Self::Metal(index) => Err(not_built("metal", index)),
        }
    }
}

fn not_built(kind: &str, index: usize) -> Error {
    Error::new(
        Kind::Device,
        format!("this build of wattune has no {kind} support"),
    )
    .value(format!("{kind}:{index}"))
    .hint(format!(
        "compile it in with `cargo build --release --features {kind}`, or use `--device cpu`"
    ))
}

/// The first accelerator this build and this machine have, else the processor.
fn automatic() -> Result<(Device, Computing)> {
    if cfg!(feature = "cuda") && Device::new_cuda(0).is_ok() {
        return Ok((open_cuda(0)?, Computing::Nvidia(0)));
    }
    if cfg!(feature = "metal")
        && let Ok(device) = Device::new_metal(0)
    {
        return Ok((device, Computing::Other));
    }
    Ok((Device::Cpu, Computing::Cpu))
}

fn unknown(name: &str) -> Error {
    Error::new(Kind::Usage, "there is no such device")
        .value(name)
        .rule("cpu, cuda, cuda:N, metal, metal:N or auto")
        .hint("write `--device cpu`, or leave the option out")
}

fn unusable(source: candle_core::Error) -> Error {
    Error::new(Kind::Device, format!("the device cannot be used: {source}"))
        .hint("use `--device cpu`")
}

/// Refuses a dtype that the device cannot compute in.
pub(super) fn check_precision(device: &Device, precision: Precision) -> Result<()> {
    if device.is_cpu() && precision == Precision::F16 {
        return Err(Error::new(Kind::Device, "f16 cannot be computed in on a CPU")
            .at("model.dtype")
            .rule("f32 or bf16 on a CPU")
            .hint("take bf16: `dtype = \"bf16\"` in [model] of a recipe, `--dtype bf16` without one"));
    }
    Ok(())
}

/// Threads that the affinity mask and cgroup allow.
pub fn allowed_threads() -> usize {
    crate::energy::allowed_cores()
}

/// The report's `environment` block.
pub(super) fn environment() -> Environment {
    Environment {
        version: env!("CARGO_PKG_VERSION").to_string(),
        cpu: cpu_name(),
        instructions: Some(crate::ops::instruction_set().to_string()),
        threads: rayon::current_num_threads() as u64,
        os: sysinfo::System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.to_string()),
    }
}

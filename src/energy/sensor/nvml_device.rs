//! The NVML library, and the NVML index of a CUDA device ordinal.
//!
//! The library is loaded at run time. CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER may map ordinal 0
//! to any GPU of the machine; a counter of GPU 0 would then measure other work. Takes the ordinal
//! and the environment, returns the driver's index, or why it cannot be determined.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::Absent;

/// An entry of CUDA_VISIBLE_DEVICES.
#[derive(Debug, Clone, PartialEq, Eq)]
enum VisibleDevice {
    Index(u32),
    /// A UUID or its prefix.
    Uuid(String),
}

/// Loads the library and connects to the driver.
pub(super) fn driver() -> Result<Nvml, Absent> {
    Nvml::init().map_err(|e| no_driver(&e))
}

pub(super) fn no_driver(source: &NvmlError) -> Absent {
    Absent::new(
        format!("no NVIDIA driver: {source}"),
        "install the NVIDIA driver (libnvidia-ml.so.1), or start the container with `--gpus all`",
    )
}

/// The NVML index of the GPU that CUDA calls `ordinal`.
pub(super) fn nvml_index(nvml: &Nvml, ordinal: u32) -> Result<u32, Absent> {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let device = visible_device(ordinal, visible.as_deref()).map_err(|reason| {
        let remedy =
            "`nvidia-smi -L` lists the devices; CUDA_VISIBLE_DEVICES takes their numbers or UUIDs";
        Absent::new(reason, remedy)
    })?;
    match device {
        VisibleDevice::Uuid(prefix) => index_of_uuid(nvml, &prefix),
        VisibleDevice::Index(index) => {
            let pci_order =
                std::env::var("CUDA_DEVICE_ORDER").is_ok_and(|order| order == "PCI_BUS_ID");
            let devices = uuids_and_names(nvml).unwrap_or_default();
            if !pci_order && devices.iter().any(|(_, name)| *name != devices[0].1) {
                return Err(Absent::new(
                    "the GPUs differ, and CUDA numbers them by speed where the driver numbers them by PCI bus",
                    "`export CUDA_DEVICE_ORDER=PCI_BUS_ID`, then choose the GPU again",
                ));
            }
            Ok(index)
        }
    }
}

fn index_of_uuid(nvml: &Nvml, prefix: &str) -> Result<u32, Absent> {
    let devices = uuids_and_names(nvml).map_err(|e| no_driver(&e))?;
    let index = devices
        .iter()
        .position(|(uuid, _)| uuid.starts_with(prefix));
    index.map(|index| index as u32).ok_or_else(|| {
        Absent::new(
            format!("the driver lists no device `{prefix}` of CUDA_VISIBLE_DEVICES"),
            "`nvidia-smi -L` lists the devices",
        )
    })
}

fn uuids_and_names(nvml: &Nvml) -> Result<Vec<(String, String)>, NvmlError> {
    (0..nvml.device_count()?)
        .map(|index| {
            let device = nvml.device_by_index(index)?;
            Ok((device.uuid()?, device.name()?))
        })
        .collect()
}

/// The entry of `list` that `ordinal` selects; without a list the ordinal is the index. An error
/// says why there is none, or none with a counter.
fn visible_device(ordinal: u32, list: Option<&str>) -> Result<VisibleDevice, String> {
    let Some(list) = list else {
        return Ok(VisibleDevice::Index(ordinal));
    };
    // CUDA ignores everything from the first invalid entry on.
    let mut entries = list.split(',').map_while(|entry| {
        let entry = entry.trim();
        let is_uuid = entry.starts_with("GPU-") || entry.starts_with("MIG-");
        let uuid = is_uuid.then(|| VisibleDevice::Uuid(entry.to_string()));
        entry.parse().map(VisibleDevice::Index).ok().or(uuid)
    });
    match entries.nth(ordinal as usize) {
        Some(VisibleDevice::Uuid(uuid)) if uuid.starts_with("MIG-") => Err(format!(
            "`{uuid}` is a MIG slice of a GPU, which has no energy counter"
        )),
        Some(device) => Ok(device),
        None => Err(format!(
            "CUDA_VISIBLE_DEVICES is `{list}`: it has no entry {ordinal}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinals_follow_the_order_of_the_list() {
        // CUDA C++ Programming Guide, environment variables.
        assert_eq!(visible_device(1, None), Ok(VisibleDevice::Index(1)));
        assert_eq!(visible_device(0, Some("2,0")), Ok(VisibleDevice::Index(2)));
        assert_eq!(visible_device(1, Some("2, 0")), Ok(VisibleDevice::Index(0)));
        let uuid = VisibleDevice::Uuid("GPU-8932f937".to_string());
        assert_eq!(visible_device(0, Some("GPU-8932f937")), Ok(uuid));
        let refused = |ordinal, list| visible_device(ordinal, Some(list)).unwrap_err();
        assert!(refused(0, "MIG-1f00").contains("slice"));
        // "0,-1,1": only GPU 0 is visible.
        assert!(refused(1, "0,-1,1").contains("no entry 1"));
        assert!(refused(0, "").contains("no entry 0"));
    }
}

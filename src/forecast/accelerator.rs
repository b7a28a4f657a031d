//! Peak FLOP/s and training power of a device, each with its source.
//!
//! Owns the accelerators of published runs that have no profile, and the ranges around a rated power. Nothing here meters.

use crate::energy::profile::{DeviceKind, Profile};
use crate::energy::{DeviceRef, Interval};
use crate::error::Result;
use crate::text::{did_you_mean, near_matches};
use crate::units::{Watts, significant};
use crate::work::Precision;

/// Power of one device while training, without the facility's overhead (PUE).
#[derive(Debug, Clone, PartialEq)]
pub struct Power {
    /// Averaged over the training.
    pub watts: Interval<Watts>,
    /// Where they and their interval come from.
    pub basis: String,
}

/// A device in an estimate.
#[derive(Debug, Clone, PartialEq)]
pub struct Accelerator {
    /// Name of a profile, or of an unprofiled device.
    pub name: String,
    /// Dense FLOP/s of products in bf16, else f16, else f32.
    pub peak_flops: f64,
    /// Fraction of the peak that tuned GEMM reaches, in (0, 1]; training reaches less.
    pub achievable: f64,
    /// Power while training.
    pub power: Power,
}

/// A device of published runs that too little is known of for a profile.
struct UnprofiledDevice {
    name: &'static str,
    peak_flops: f64,
    low_w: f64,
    power_w: f64,
    high_w: f64,
    basis: &'static str,
}

const UNPROFILED: [UnprofiledDevice; 4] = [
    UnprofiledDevice {
        name: "tpu-v2",
        peak_flops: 46e12,
        low_w: 221.0 * 0.95,
        power_w: 221.0,
        high_w: 221.0 * 1.05,
        basis: "mean system power of a chip while training, measured, 5 % either way (Patterson et al. 2021)",
    },
    UnprofiledDevice {
        name: "tpu-v3",
        peak_flops: 123e12,
        low_w: 283.0 * 0.9,
        power_w: 283.0,
        high_w: 283.0 * 1.1,
        basis: "mean system power of a chip while training, measured, 10 % either way (Patterson et al. 2021)",
    },
    UnprofiledDevice {
        name: "tpu-v4",
        peak_flops: 275e12,
        low_w: 170.0,
        power_w: 378.5,
        high_w: 378.5,
        basis: "system power of a chip (PaLM, arXiv:2204.02311); low: mean power of the bare chip (Google Cloud documentation)",
    },
    UnprofiledDevice {
        name: "nvidia-h800-sxm",
        peak_flops: 989e12,
        low_w: 700.0 * GPU_RATED.0,
        power_w: 700.0,
        high_w: 700.0 * GPU_RATED.1,
        basis: GPU_BASIS,
    },
];

/// Training power over rated power of a GPU: lowest and highest.
const GPU_RATED: (f64, f64) = (0.76, 1.10);
const GPU_BASIS: &str = "rated power; 0.76 (nodes of eight H100, Newkirk et al. 2025) to 1.10 of it (V100 with its share of the \
    system: 330 W over 300 W, Patterson et al. 2021)";
/// The same of a CPU: measured package power over the estimate from its rating, on two machines.
const CPU_RATED: (f64, f64) = (0.71, 1.40);
const CPU_BASIS: &str = "power at full load; 0.71 (Xeon E5-2620 v3) to 1.40 of it (Xeon E3-1240), measured package power over the \
    estimate from the rating (CodeCarbon, cpu_load_profiling)";

impl Power {
    /// Power without uncertainty.
    pub fn exact(watts: Watts, basis: impl Into<String>) -> Self {
        Self {
            watts: Interval::exact(watts),
            basis: basis.into(),
        }
    }
}

impl Accelerator {
    /// A device by the name of a profile, "auto" for this machine's processor, the path of a profile file (it ends in `.toml`), or
    /// one of "tpu-v2", "tpu-v3", "tpu-v4", "nvidia-h800-sxm".
    ///
    /// ```
    /// use wattune::forecast::Accelerator;
    /// assert_eq!(Accelerator::named("nvidia-v100-sxm2").unwrap().peak_flops, 125e12);
    /// assert!(Accelerator::named("tpu-3").unwrap_err().remedy().unwrap().contains("`tpu-v3`"));
    /// ```
    pub fn named(name: &str) -> Result<Accelerator> {
        if let Some(known) = UNPROFILED.iter().find(|known| known.name == name) {
            return Ok(known.accelerator());
        }
        let profile = match name.parse() {
            Ok(DeviceRef::Auto) => Profile::detect(),
            Ok(DeviceRef::File(path)) => Profile::from_file(&path)?,
            Ok(DeviceRef::Named { cores: None, .. }) => Profile::named(name).map_err(|error| {
                let unprofiled = UNPROFILED.iter().map(|known| known.name);
                let near = near_matches(name, Profile::names().chain(unprofiled));
                error.hint(did_you_mean(&near, "`wattune devices` lists every profile"))
            })?,
            Ok(DeviceRef::Named { .. }) | Err(_) => Profile::named(name)?,
        };
        Ok(Self::from_profile(&profile))
    }

    /// A profile's device.
    pub fn from_profile(profile: &Profile) -> Accelerator {
        let peak = |precision| profile.peak_flops.get(&precision);
        let peak = peak(Precision::Bf16)
            .or(peak(Precision::F16))
            .or(peak(Precision::F32));
        let gpu = profile.kind == DeviceKind::Gpu;
        let ((low, high), basis) = if gpu {
            (GPU_RATED, GPU_BASIS)
        } else {
            (CPU_RATED, CPU_BASIS)
        };
        Accelerator {
            name: profile.name.clone(),
            peak_flops: *peak.expect("a profile has a peak for f32"),
            achievable: profile.achievable_flops,
            power: Power {
                watts: Interval {
                    low,
                    central: 1.0,
                    high,
                }
                .map(|share| profile.load_w * share),
                basis: if gpu {
                    format!("{basis}; {}", host_not_added(profile))
                } else {
                    basis.to_string()
                },
            },
        }
    }

    /// A published rated power with this device's relative range.
    pub fn at_rated(&self, rated: Watts) -> Power {
        let watts = self
            .power
            .watts
            .map(|watts| rated * (watts / self.power.watts.central));
        Power {
            watts,
            basis: self.power.basis.clone(),
        }
    }

    /// Vendor and generation: the first two words of its name ("nvidia-a100", "tpu-v3").
    pub fn family(&self) -> &str {
        let end = self
            .name
            .match_indices('-')
            .nth(1)
            .map_or(self.name.len(), |(at, _)| at);
        &self.name[..end]
    }
}

/// The assumption that the host's power is left out.
fn host_not_added(profile: &Profile) -> String {
    let times = profile.whole_machine().map(|times| {
        format!(
            ": with it the energy is about {} times as much",
            significant(times)
        )
    });
    format!(
        "the machine around it is not added{}",
        times.unwrap_or_default()
    )
}

impl UnprofiledDevice {
    fn accelerator(&self) -> Accelerator {
        Accelerator {
            name: self.name.to_string(),
            peak_flops: self.peak_flops,
            achievable: 1.0,
            power: Power {
                watts: Interval {
                    low: Watts(self.low_w),
                    central: Watts(self.power_w),
                    high: Watts(self.high_w),
                },
                basis: self.basis.to_string(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_the_peak_of_the_precision_models_are_trained_in() {
        // Vendor figures: V100 125 TFLOPS in f16 (it has no bf16), A100 312 in bf16, Raspberry Pi in f32 alone.
        assert_eq!(
            Accelerator::named("nvidia-v100-sxm2").unwrap().peak_flops,
            125e12
        );
        let a100 = Accelerator::named("nvidia-a100-sxm4-80gb").unwrap();
        assert_eq!((a100.peak_flops, a100.family()), (312e12, "nvidia-a100"));
        assert!(
            (a100.power.watts.low.0 - 304.0).abs() < 1e-9
                && (a100.power.watts.high.0 - 440.0).abs() < 1e-9
        );
        assert_eq!(a100.at_rated(Watts(350.0)).watts.low, Watts(266.0));
        // A host of 30 % of the whole: 1 / 0.7.
        assert!(
            a100.power
                .basis
                .contains("is not added: with it the energy is about 1.429 times"),
            "{}",
            a100.power.basis
        );
        assert_eq!(
            Accelerator::named("raspberry-pi-5@2").unwrap().peak_flops,
            1.536e11 / 2.0
        );
        assert_eq!(Accelerator::named("tpu-v3").unwrap().family(), "tpu-v3");
    }

    #[test]
    fn an_unknown_device_is_refused_with_what_is_near() {
        let error = Accelerator::named("nvidia-a100").unwrap_err();
        assert!(
            error.remedy().unwrap().contains("nvidia-a100-sxm4-80gb"),
            "{error}"
        );
        assert!(Accelerator::named("nvidia-t4@2").is_err() && Accelerator::named("").is_err());
    }
}

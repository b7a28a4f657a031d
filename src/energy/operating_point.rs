//! Operating points: time and energy of a work under a power limit or at a locked clock.
//!
//! ```text
//! x = ((c - s) / (Pu - s))^(1/a), at most 1     time = 1 - b + b/x     power = min(c, Pu)     energy = time * power / Pu
//! ```
//!
//! `c` the power limit, `Pu` the power of this work without one, `s` = 0.15 of the rated power, `a` = 2.5, `b` the share of the time
//! that follows the core clock; `x` is the clock's share. Valid from half the rated power up: below, clocks collapse (an A40 at a
//! third takes 2.9 times as long). Held against the Zeus traces (NSDI 2023; V100, A40, RTX 6000, P100) in the tests. Sets nothing:
//! [`OperatingPoint::command`] says what does.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::profile::{DeviceKind, Profile};
use crate::error::{Error, Kind, Result};
use crate::units::{Seconds, Watts, significant};

/// Static power over rated power.
const STATIC_SHARE: f64 = 0.15;
/// Exponent of the dynamic power in the clock.
const EXPONENT: f64 = 2.5;
/// Least limit over rated power that the law holds for.
const LEAST_SHARE: f64 = 0.5;

/// Share of the time that follows the core clock: training and reading a prompt.
pub const COMPUTE_BOUND: f64 = 1.0;
/// The same of generating tokens, which waits for memory.
pub const MEMORY_BOUND: f64 = 0.3;

/// A limit of a device's power or clock.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum OperatingPoint {
    /// No limit.
    #[default]
    None,
    /// A power limit.
    Power(Watts),
    /// A power limit as a share of the rated power.
    Share(f64),
    /// A locked core clock in MHz.
    Clock(f64),
}

/// Time, power and energy relative to no limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scaling {
    /// Time over that without limit.
    pub time: f64,
    /// Power over that without limit.
    pub power: f64,
    /// Energy over that without limit.
    pub energy: f64,
}

const FORMS: &str = "`none`, a power limit (`300 W`), a share of the rated power (`60 %`) or a core clock (`1400 MHz`)";

impl FromStr for OperatingPoint {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let text = text.trim();
        if text == "none" {
            return Ok(Self::None);
        }
        let number = |unit: &str| {
            let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
            (number.is_finite() && number > 0.0).then_some(number)
        };
        let clock = number("MHz").map(Self::Clock);
        let power = || number("W").map(|watts| Self::Power(Watts(watts)));
        let share = || number("%").map(|percent| Self::Share(percent / 100.0));
        let parsed = clock.or_else(power).or_else(share);
        parsed.ok_or_else(|| FORMS.to_string())
    }
}

impl fmt::Display for OperatingPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Power(watts) => write!(f, "{} W", watts.0),
            Self::Share(share) => write!(f, "{} %", significant(share * 100.0)),
            Self::Clock(mhz) => write!(f, "{mhz} MHz"),
        }
    }
}

impl Serialize for OperatingPoint {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl OperatingPoint {
    /// What a work that draws `unlimited` takes at this point; `clock_bound` is the share of its time that follows the core clock.
    ///
    /// # Errors
    /// A point below half the rated power, and a clock of a device whose highest clock is not known.
    pub fn scaling(self, profile: &Profile, unlimited: Watts, clock_bound: f64) -> Result<Scaling> {
        let fixed = profile.load_w * STATIC_SHARE;
        let limit = match self {
            Self::None => return Ok(Scaling::UNCHANGED),
            Self::Clock(mhz) => {
                let share = (mhz / self.highest_clock(profile)?).min(1.0);
                // The clock's power at full load decides whether the law holds.
                let at_load = fixed + (profile.load_w - fixed) * share.powf(EXPONENT);
                self.check(profile, at_load)?;
                fixed + (unlimited - fixed) * share.powf(EXPONENT)
            }
            Self::Power(limit) => self.check(profile, limit)?,
            Self::Share(share) => self.check(profile, profile.load_w * share)?,
        };
        if limit >= unlimited || unlimited <= fixed {
            return Ok(Scaling::UNCHANGED);
        }
        let clock = ((limit - fixed) / (unlimited - fixed)).powf(1.0 / EXPONENT);
        let time = 1.0 - clock_bound + clock_bound / clock;
        let power = limit / unlimited;
        Ok(Scaling {
            time,
            power,
            energy: time * power,
        })
    }

    fn highest_clock(self, profile: &Profile) -> Result<f64> {
        profile.highest_mhz.ok_or_else(|| {
            Error::new(
                Kind::Energy,
                "the highest clock of this device is not known",
            )
            .at("operating point")
            .value(format!("{self} of {}", profile.name))
            .rule("a clock is a share of `highest_mhz` in the device's profile")
            .hint("give a power limit such as `60 %`, or a profile file with `highest_mhz`")
        })
    }

    fn check(self, profile: &Profile, limit: Watts) -> Result<Watts> {
        let least = profile.load_w * LEAST_SHARE;
        if limit >= least && limit <= profile.load_w * 1.001 {
            return Ok(limit);
        }
        Err(Error::new(
            Kind::Energy,
            "what a device does at this operating point is not known",
        )
        .at("operating point")
        .value(format!(
            "{self} of {}, {} at full load",
            profile.name, profile.load_w
        ))
        .rule(format!(
            "from {least} to {}: below half the rated power, clocks collapse",
            profile.load_w
        ))
        .hint(format!(
            "give {} or more, such as `60 %`",
            Watts(least.0.ceil())
        )))
    }

    /// What a user with root types to set the point; `None` for no limit.
    pub fn command(self, profile: &Profile) -> Option<String> {
        let nvidia = profile.name.starts_with("nvidia-") && profile.kind == DeviceKind::Gpu;
        let watts = match self {
            Self::None => return None,
            Self::Clock(mhz) if nvidia => return Some(format!("sudo nvidia-smi -lgc 0,{mhz}")),
            Self::Clock(mhz) => {
                let khz = mhz * 1000.0;
                return Some(format!(
                    "echo {khz} | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_max_freq"
                ));
            }
            Self::Power(watts) => watts,
            Self::Share(share) => profile.load_w * share,
        };
        Some(match profile.kind {
            DeviceKind::Gpu if nvidia => format!("sudo nvidia-smi -pl {:.0}", watts.0),
            DeviceKind::Gpu => format!("sudo amd-smi set --power-cap {:.0}", watts.0),
            DeviceKind::Soc => {
                "sudo nvpmodel -m N   # `sudo nvpmodel -q` lists the modes".to_string()
            }
            DeviceKind::Cpu => format!(
                "echo {:.0} | sudo tee /sys/class/powercap/intel-rapl:0/constraint_0_power_limit_uw",
                watts.0 * 1e6
            ),
        })
    }

    /// The limit at which a work that sleeps at `asleep` once it is done takes the least energy within `deadline`: slower while that
    /// saves, at most as slow as the law and the deadline allow. `None` where even no limit is too slow.
    pub fn for_deadline(
        profile: &Profile,
        unlimited: Watts,
        time: Seconds,
        asleep: Watts,
        deadline: Seconds,
    ) -> Option<Self> {
        if time > deadline {
            return None;
        }
        let fixed = profile.load_w * STATIC_SHARE;
        let floor = profile.load_w * LEAST_SHARE;
        if unlimited <= floor || unlimited <= fixed {
            return Some(Self::None);
        }
        let clock_at = |limit: Watts| ((limit - fixed) / (unlimited - fixed)).powf(1.0 / EXPONENT);
        let best = best_clock(fixed - asleep, unlimited - fixed);
        let clock = best.max(clock_at(floor)).max(time / deadline);
        if clock >= 1.0 {
            return Some(Self::None);
        }
        Some(Self::Power(
            fixed + (unlimited - fixed) * clock.powf(EXPONENT),
        ))
    }
}

/// The clock's share of least energy: `((s - p0) / ((a - 1) d))^(1/a)`; 0, as slow as allowed, where idling is as dear as the static
/// power.
fn best_clock(fixed_above_sleep: Watts, dynamic: Watts) -> f64 {
    if fixed_above_sleep.0 <= 0.0 {
        return 0.0;
    }
    (fixed_above_sleep / (dynamic * (EXPONENT - 1.0))).powf(1.0 / EXPONENT)
}

impl Scaling {
    /// No limit, or one above what the work draws.
    pub const UNCHANGED: Self = Self {
        time: 1.0,
        power: 1.0,
        energy: 1.0,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Per limit: watts, and time and energy relative to no limit.
    /// Medians over training jobs of the Zeus trace (ml-energy/zeus, Apache-2.0), at least half the rated power; of the RTX 5090 one
    /// stream of decoding (sudoingX/qwen38-mtp).
    const V100: [[f64; 3]; 5] = [
        [125.0, 1.115, 0.807],
        [150.0, 1.106, 0.842],
        [175.0, 1.062, 0.867],
        [200.0, 1.036, 0.913],
        [225.0, 1.011, 0.954],
    ];
    const A40: [[f64; 3]; 6] = [
        [150.0, 1.249, 0.943],
        [175.0, 1.055, 0.861],
        [200.0, 1.040, 0.874],
        [225.0, 1.015, 0.940],
        [250.0, 1.008, 0.953],
        [275.0, 1.005, 0.984],
    ];
    const RTX_6000: [[f64; 3]; 5] = [
        [150.0, 1.072, 0.784],
        [175.0, 1.054, 0.827],
        [200.0, 1.033, 0.879],
        [225.0, 1.018, 0.935],
        [250.0, 1.007, 0.986],
    ];
    const P100: [[f64; 3]; 5] = [
        [125.0, 1.041, 0.884],
        [150.0, 1.031, 0.946],
        [175.0, 1.017, 0.976],
        [200.0, 1.006, 0.994],
        [225.0, 1.004, 1.002],
    ];
    const RTX_5090: [[f64; 3]; 4] = [
        [400.0, 1.0506, 0.7962],
        [450.0, 1.0177, 0.8793],
        [500.0, 1.004, 0.9517],
        [550.0, 1.0, 0.9981],
    ];
    /// Watts of the work without a limit: the lowest limit, which binds, over its power ratio, which is energy over time.
    fn unlimited(rows: &[[f64; 3]]) -> f64 {
        rows[0][0] / (rows[0][2] / rows[0][1])
    }

    fn rated(watts: f64) -> Profile {
        let mut profile = Profile::named("nvidia-v100-pcie").unwrap();
        profile.load_w = Watts(watts);
        profile
    }

    #[test]
    fn published_rows_are_within_ten_percent_in_energy_and_six_in_time() {
        let cards: [(&str, f64, f64, &[[f64; 3]]); 5] = [
            ("V100", 250.0, COMPUTE_BOUND, &V100),
            ("A40", 300.0, COMPUTE_BOUND, &A40),
            ("RTX 6000", 260.0, COMPUTE_BOUND, &RTX_6000),
            ("P100", 250.0, COMPUTE_BOUND, &P100),
            ("RTX 5090", 600.0, MEMORY_BOUND, &RTX_5090),
        ];
        for (name, full, bound, rows) in cards {
            let profile = rated(full);
            let draws = Watts(unlimited(rows).min(full));
            let errors = rows.iter().map(|[limit, time, energy]| {
                let found = OperatingPoint::Power(Watts(*limit))
                    .scaling(&profile, draws, bound)
                    .unwrap();
                [
                    (found.time / time - 1.0).abs(),
                    (found.energy / energy - 1.0).abs(),
                ]
            });
            let errors: Vec<[f64; 2]> = errors.collect();
            let mean = |which: usize| {
                errors.iter().map(|pair| pair[which]).sum::<f64>() / errors.len() as f64
            };
            eprintln!(
                "{name}: {draws}, time {:.3}, energy {:.3}",
                mean(0),
                mean(1)
            );
            assert!(mean(0) <= 0.06 && mean(1) <= 0.10, "{name}");
        }
    }

    #[test]
    fn the_law_is_refused_below_half_the_rated_power() {
        let a40 = Profile::named("nvidia-a40").unwrap();
        for (point, valid) in [
            ("150 W", true),
            ("149 W", false),
            ("49 %", false),
            ("50 %", true),
            ("301 W", false),
        ] {
            let point: OperatingPoint = point.parse().unwrap();
            assert_eq!(
                point.scaling(&a40, Watts(290.0), 1.0).is_ok(),
                valid,
                "{point}"
            );
        }
        let error = "100 W"
            .parse::<OperatingPoint>()
            .unwrap()
            .scaling(&a40, Watts(290.0), 1.0);
        assert!(error.unwrap_err().to_string().contains("150 W"));
        for bad in ["", "300", "-3 W", "x %", "0 MHz", "1e999 W"] {
            assert!(bad.parse::<OperatingPoint>().is_err(), "{bad}");
        }
        assert_eq!(
            "60 %".parse::<OperatingPoint>().unwrap().to_string(),
            "60 %"
        );
        assert_eq!(
            "200 W"
                .parse::<OperatingPoint>()
                .unwrap()
                .command(&a40)
                .unwrap(),
            "sudo nvidia-smi -pl 200"
        );
    }

    #[test]
    fn slow_or_fast_follows_the_deadline() {
        // s 37.5, p0 25, Pu 250, d 212.5: x* = (12.5 / (1.5 x 212.5))^0.4 = 0.2738, below what half of 250 W gives,
        // (87.5 / 212.5)^0.4 = 0.7013, so that the floor of 125 W or the deadline binds.
        assert!((best_clock(Watts(12.5), Watts(212.5)) - 0.2738).abs() < 1e-4);
        let v100 = rated(250.0);
        let point = |deadline| {
            OperatingPoint::for_deadline(
                &v100,
                Watts(250.0),
                Seconds(7.0),
                Watts(25.0),
                Seconds(deadline),
            )
        };
        let watts = |deadline| match point(deadline) {
            Some(OperatingPoint::Power(watts)) => watts.0,
            other => panic!("{other:?}"),
        };
        assert!((watts(100.0) - 125.0).abs() < 1e-9);
        // At 7 of 8 s: 37.5 + 212.5 x 0.875^2.5 = 189.69 W.
        assert!((watts(8.0) - 189.69).abs() < 0.01, "{}", watts(8.0));
        assert_eq!((point(7.0), point(6.9)), (Some(OperatingPoint::None), None));
        assert_eq!(best_clock(Watts(0.0), Watts(1.0)), 0.0);
    }
}

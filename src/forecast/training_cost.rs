//! Energy and greenhouse gas of training a model elsewhere, as intervals.
//!
//! Owns the formula and its defaults. Takes a `TrainingJob` (the known figures), returns an `Estimate` with every assumption.
//! Nothing here is metered.
//!
//! ```text
//! energy = device time x power x PUE        device time = FLOPs / (MFU x peak), unless known
//! tCO2e  = energy x grid
//! ```
//!
//! (Patterson et al. 2021, section 2.) Known figures are used unchanged. The bounds take every unknown factor at its lowest or
//! highest at once, the central figure takes medians. The facility's overhead (PUE) is applied once.

use serde::{Serialize, Serializer};

use super::accelerator::{Accelerator, Power};
use super::published::achieved;
use crate::energy::baseline::{describe_tokens, training_flops};
use crate::energy::{Grid, Interval, carbon};
use crate::error::{Error, Kind, Result};
use crate::units::{Count, Flops, GramsCo2e, Joules, Pue, Seconds, Watts, significant};

/// How a model is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// From random weights: 6ND.
    Pretraining,
    /// Every weight of a trained model: 6ND.
    FullFineTuning,
    /// Adapters on frozen weights: 4ND.
    Lora,
}

impl Method {
    /// FLOPs of training N = `parameters` on `tokens` tokens: 2N forward, 2N for input gradients and, unless frozen, 2N for
    /// weight gradients (Kaplan et al. 2020, section 2.1). Attention, adapters and recomputation are left out.
    pub fn flops(self, parameters: Count, tokens: Count) -> Flops {
        let all = training_flops(parameters.0, tokens.0, None);
        if self == Method::Lora {
            all * (4.0 / 6.0)
        } else {
            all
        }
    }

    /// The formula as an assumption.
    fn formula(self) -> &'static str {
        match self {
            Method::Pretraining | Method::FullFineTuning => {
                "FLOPs: 6ND; attention and recomputation left out"
            }
            Method::Lora => {
                "FLOPs: 4ND (no gradients of frozen weights); attention, the adapters themselves and recomputation left out"
            }
        }
    }
}

/// Tokens for each parameter where none are given (Hoffmann et al. 2022).
const TOKENS_PER_PARAMETER: f64 = 20.0;

/// A facility's overhead where none is given: the published runs of the table lie between 1.08 and 1.20, most at 1.10. 1.00 is a
/// machine outside any facility.
const PUE: (f64, f64, f64) = (1.0, 1.1, 1.2);

/// The known figures of a training run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrainingJob {
    /// Name of a published run, which is excluded from the MFU statistics.
    pub published_name: Option<String>,
    /// Total FLOPs.
    pub flops: Option<Flops>,
    /// The device.
    pub device: Option<Accelerator>,
    /// Number of devices: divides the wall time, nothing else.
    pub count: Option<u64>,
    /// FLOP/s that one device reaches, averaged over the training.
    pub achieved: Option<f64>,
    /// Power of one device.
    pub power: Option<Power>,
    /// Device time: the sum over all devices.
    pub device_time: Option<Seconds>,
    /// The facility's overhead.
    pub pue: Option<Pue>,
    /// The grid.
    pub grid: Option<Grid>,
    /// Published energy of the machines, without overhead: used where time or power is not known.
    pub energy: Option<Joules>,
    /// Published greenhouse gas, with overhead: used where no grid is known.
    pub carbon: Option<GramsCo2e>,
    /// Assumptions so far.
    pub assumptions: Vec<String>,
}

impl TrainingJob {
    /// Sets the FLOPs from parameters and tokens; pretraining without tokens takes 20 a parameter and says so.
    pub fn count_flops(
        &mut self,
        method: Method,
        parameters: Count,
        tokens: Option<Count>,
    ) -> Result<()> {
        let tokens = match (tokens, method) {
            (Some(tokens), _) => tokens,
            (None, Method::Pretraining) => {
                let tokens = parameters * TOKENS_PER_PARAMETER;
                self.assumptions.push(format!(
                    "{}, 20 for each parameter (Hoffmann et al. 2022)",
                    describe_tokens(tokens.0)
                ));
                tokens
            }
            (None, _) => {
                return Err(Error::new(Kind::Usage, "fine-tuning has no usual number of tokens")
                    .rule("`--tokens` is needed for every method but pretraining")
                    .hint("add `--tokens D`: the tokens of the data times the epochs, as in `--tokens 2M`"));
            }
        };
        self.assumptions.push(method.formula().to_string());
        self.flops = Some(method.flops(parameters, tokens));
        Ok(())
    }
}

/// Cost of a training run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Total FLOPs, if known.
    pub flops: Option<Flops>,
    /// Device name, if known.
    pub device: Option<String>,
    /// Number of devices, if known.
    pub count: Option<u64>,
    /// Device hours: the sum over all devices.
    #[serde(rename = "device_hours", serialize_with = "hours")]
    pub device_time: Option<Interval<Seconds>>,
    /// Wall time, if the number of devices is known.
    #[serde(rename = "wall_hours", serialize_with = "hours")]
    pub wall: Option<Interval<Seconds>>,
    /// Power of one device, if the energy follows from it.
    pub power_w: Option<Interval<Watts>>,
    /// The facility's overhead, applied once.
    pub pue: Interval<Pue>,
    /// The grid, if tCO2e follows from one.
    pub grid: Option<Grid>,
    /// Overhead included.
    #[serde(rename = "energy_mwh", serialize_with = "mwh")]
    pub energy: Interval<Joules>,
    /// Overhead included.
    #[serde(rename = "tco2e", serialize_with = "tonnes")]
    pub carbon: Interval<GramsCo2e>,
    /// Assumptions with their sources.
    pub assumptions: Vec<String>,
}

fn hours<S: Serializer>(
    time: &Option<Interval<Seconds>>,
    s: S,
) -> std::result::Result<S::Ok, S::Error> {
    time.map(|time| time.map(|time| time.0 / 3600.0))
        .serialize(s)
}

fn mwh<S: Serializer>(energy: &Interval<Joules>, s: S) -> std::result::Result<S::Ok, S::Error> {
    energy.map(|energy| energy.kwh() / 1000.0).serialize(s)
}

fn tonnes<S: Serializer>(
    carbon: &Interval<GramsCo2e>,
    s: S,
) -> std::result::Result<S::Ok, S::Error> {
    carbon.map(|carbon| carbon.0 / 1e6).serialize(s)
}

/// The cost of `job`.
///
/// # Errors
/// Too few figures (neither time and power nor FLOPs and a device), and a rate above the device's peak.
pub fn estimate(mut job: TrainingJob) -> Result<Estimate> {
    let mut notes = std::mem::take(&mut job.assumptions);
    let time = total_device_time(&job, &mut notes)?;
    let (machines, power_w) = machine_energy(&job, time, &mut notes)?;
    let pue = job.pue.map(Interval::exact).unwrap_or_else(|| {
        let (low, central, high) = PUE;
        notes.push(format!(
            "PUE: {central}, {low:.1} to {high}, where published runs lie; `--pue P` sets it"
        ));
        Interval { low, central, high }
            .map(|pue| Pue::new(pue).expect("the shipped values are one or more"))
    });
    let energy = pue.with(machines, |pue, energy| pue * energy);
    if !energy.high.0.is_finite() {
        return Err(
            Error::new(Kind::Usage, "this is more energy than a number can hold")
                .hint("check the counts that were given"),
        );
    }
    let (carbon, grid) = greenhouse_gas(&job, energy, &mut notes);
    let wall = time
        .zip(job.count)
        .map(|(time, count)| time.map(|time| time / count as f64));
    Ok(Estimate {
        flops: job.flops,
        device: job.device.map(|device| device.name),
        count: job.count,
        device_time: time,
        wall,
        power_w,
        pue,
        grid,
        energy,
        carbon,
        assumptions: notes,
    })
}

/// Device time: FLOPs over the achieved rate, else as given, else FLOPs over peak x MFU of published runs.
fn total_device_time(
    job: &TrainingJob,
    notes: &mut Vec<String>,
) -> Result<Option<Interval<Seconds>>> {
    let at_rate = |flops: Flops, rate: f64| Seconds(flops.0 / rate);
    let known = match (job.flops, job.achieved, job.device_time) {
        (Some(flops), Some(rate), _) => Some((at_rate(flops, rate), Some(rate))),
        (flops, _, Some(time)) => Some((time, flops.map(|flops| flops.0 / time.0))),
        _ => None,
    };
    if let Some((time, rate)) = known {
        if let (Some(rate), Some(device)) = (rate, &job.device) {
            note_mfu(rate, device, notes)?;
        }
        return Ok(Some(Interval::exact(time)));
    }
    let (Some(flops), Some(device)) = (job.flops, &job.device) else {
        return Ok(None);
    };
    let reached = achieved(device, job.published_name.as_deref());
    let tera = reached
        .fraction
        .map(|share| share * device.peak_flops / 1e12);
    notes.push(format!(
        "achieved: {} TFLOP/s, {} to {} ({:.3} of the peak of {} TFLOP/s, {:.3} to {:.3}; {}); `--achieved-tflops T` sets it",
        significant(tera.central),
        significant(tera.low),
        significant(tera.high),
        reached.fraction.central,
        significant(device.peak_flops / 1e12),
        reached.fraction.low,
        reached.fraction.high,
        reached.basis,
    ));
    Ok(Some(reached.fraction.map_falling(|share| {
        at_rate(flops, share * device.peak_flops)
    })))
}

/// Refuses a rate above the device's peak, else notes its MFU.
fn note_mfu(rate: f64, device: &Accelerator, notes: &mut Vec<String>) -> Result<()> {
    let share = rate / device.peak_flops;
    let (rate, peak) = (
        significant(rate / 1e12),
        significant(device.peak_flops / 1e12),
    );
    if share > 1.0 {
        return Err(Error::new(Kind::Usage, "one device would compute faster than it can")
            .value(format!("{rate} TFLOP/s on one {}", device.name))
            .rule(format!("at most its dense peak of {peak} TFLOP/s"))
            .hint("check that `--hours` are added up over all devices, and that `--achieved-tflops` are of one device, without sparsity"));
    }
    notes.push(format!(
        "achieved: {rate} TFLOP/s on each device, {share:.3} of the peak of {peak} TFLOP/s of {}",
        device.name
    ));
    Ok(())
}

/// Energy without PUE, and the power it follows from: time x known power, else as published, else time x the device's power.
fn machine_energy(
    job: &TrainingJob,
    time: Option<Interval<Seconds>>,
    notes: &mut Vec<String>,
) -> Result<(Interval<Joules>, Option<Interval<Watts>>)> {
    let power = match (time, &job.power, job.energy, &job.device) {
        (Some(_), Some(power), _, _) => power,
        (_, _, Some(energy), _) => {
            notes.push("energy: as published".to_string());
            return Ok((Interval::exact(energy), None));
        }
        (Some(_), None, None, Some(device)) => &device.power,
        _ => return Err(unknown_cost(job)),
    };
    let time = time.ok_or_else(|| unknown_cost(job))?;
    let Power { watts, basis } = power;
    notes.push(format!(
        "power: {}{} a device: {basis}",
        watts.central,
        range(watts.map(|watts| watts.to_string()))
    ));
    Ok((watts.with(time, |watts, time| watts * time), Some(*watts)))
}

/// ", 304 W to 440 W" where the ends differ.
fn range(shown: Interval<String>) -> String {
    if shown.low == shown.high {
        String::new()
    } else {
        format!(", {} to {}", shown.low, shown.high)
    }
}

fn unknown_cost(job: &TrainingJob) -> Error {
    let error = Error::new(
        Kind::Usage,
        "too little is known to say what this training costs",
    )
    .rule("device hours and a device or its power; or parameters (or FLOPs) and a device");
    match (&job.published_name, job.carbon) {
        (None, _) => error.hint("add `--device NAME` (`wattune devices` lists them), or `--hours DEVICE_HOURS --power W`"),
        (Some(name), carbon) => {
            let found = carbon.map_or("no energy and no FLOPs".to_string(), |carbon| format!("{carbon} alone"));
            error
                .value(format!("{name}: {found}"))
                .hint("give the work yourself: `wattune baseline --params N --tokens D --device NAME`")
        }
    }
}

/// Greenhouse gas of `energy` on the known grid, else as published, else on the world's average grid.
fn greenhouse_gas(
    job: &TrainingJob,
    energy: Interval<Joules>,
    notes: &mut Vec<String>,
) -> (Interval<GramsCo2e>, Option<Grid>) {
    let grid = match (&job.grid, job.carbon) {
        (Some(grid), _) => grid.clone(),
        (None, Some(carbon)) => {
            notes.push("tCO2e: as published, for the grid of its source; `--grid G` computes it from the energy".to_string());
            return (Interval::exact(carbon), None);
        }
        (None, None) => {
            let world = Grid::find("world").expect("the shipped table holds the world");
            notes.push("grid: the world's average; `--grid G` sets it".to_string());
            world
        }
    };
    let (central, year) = (
        grid.gco2e_per_kwh,
        grid.year.map_or(String::new(), |year| format!(", {year}")),
    );
    let ends = Interval {
        low: grid.low.unwrap_or(central),
        central,
        high: grid.high.unwrap_or(central),
    };
    let shown = range(ends.map(|grid| significant(grid.0)));
    notes.push(format!(
        "grid: {central}{shown} ({}, {}{year})",
        grid.name, grid.basis
    ));
    (
        energy.with(ends, |energy, grid| carbon(energy, Pue::ONE, grid)),
        Some(grid),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(device: &str, flops: f64) -> TrainingJob {
        TrainingJob {
            flops: Some(Flops(flops)),
            device: Some(Accelerator::named(device).unwrap()),
            ..TrainingJob::default()
        }
    }

    #[test]
    fn a_lora_adapter_costs_four_flops_where_training_costs_six() {
        let (n, d) = (Count(7e9), Count(2e6));
        assert_eq!(Method::Pretraining.flops(n, d), Flops(6.0 * 7e9 * 2e6));
        assert!((Method::Lora.flops(n, d).0 / (4.0 * 7e9 * 2e6) - 1.0).abs() < 1e-12);
        assert_eq!(Method::FullFineTuning.flops(n, d), Flops(6.0 * 7e9 * 2e6));
    }

    #[test]
    fn what_is_given_is_used_as_it_is() {
        // GPT-3: 3.14e23 / 24.6e12 s x 330 W x 1.10 = 1287 MWh; x 429 g/kWh = 552.1 t (Patterson et al. 2021, table 4).
        let job = TrainingJob {
            achieved: Some(24.6e12),
            power: Some(Power::exact(Watts(330.0), "given")),
            pue: Pue::new(1.1),
            grid: Some(Grid::custom(429.0).unwrap()),
            count: Some(10_000),
            ..on("nvidia-v100-sxm2", 3.14e23)
        };
        let cost = estimate(job).unwrap();
        assert_eq!(
            (cost.energy.low, cost.energy.high),
            (cost.energy.central, cost.energy.central)
        );
        assert!(
            (cost.energy.central.kwh() / 1.287e6 - 1.0).abs() < 0.001,
            "{:?}",
            cost.energy
        );
        assert!(
            (cost.carbon.central.0 / 552.1e6 - 1.0).abs() < 0.001,
            "{:?}",
            cost.carbon
        );
        // 14.8 days on 10 000 devices.
        assert!((cost.wall.unwrap().central.0 / 86_400.0 - 14.8).abs() < 0.05);
    }

    #[test]
    fn unknown_factors_widen_the_interval_by_hand() {
        // TPU v3: median 42.3 TFLOP/s of a peak of 123; ends those of all runs, Llama 3.1 8B with 7.2e23 / (1.46e6 h x 3600) / 989.4e12
        // = 0.138454 and the search on TPU v2 with 24.8 / 46 = 0.539130; power 254.7 .. 283 .. 311.3 W; PUE 1.0 .. 1.1 .. 1.2.
        // For 1e18 FLOPs: low 1e18 / (0.539130 x 123e12) x 254.7 = 3.84087 MJ; central 1e18 / 42.3e12 x 283 x 1.1 = 7.35934 MJ;
        // high 1e18 / (0.138454 x 123e12) x 311.3 x 1.2 = 21.93563 MJ.
        let cost = estimate(on("tpu-v3", 1e18)).unwrap();
        let off = |value: Joules, expected: f64| (value.0 / expected - 1.0).abs();
        assert!(
            off(cost.energy.low, 3.84087e6) < 1e-5 && off(cost.energy.central, 7.35934e6) < 1e-5,
            "{:?}",
            cost.energy
        );
        assert!(
            off(cost.energy.high, 21.93563e6) < 1e-5,
            "{:?}",
            cost.energy
        );
        // The world in 2024: 473 g/kWh, up to 505.5 since 2019.
        assert!(
            (cost.carbon.high / cost.carbon.central / (21.93563 / 7.35934) - 505.5 / 473.0).abs()
                < 1e-4
        );
        for word in ["achieved", "power", "PUE", "grid"] {
            assert!(
                cost.assumptions.iter().any(|text| text.starts_with(word)),
                "{word}: {:?}",
                cost.assumptions
            );
        }
    }

    #[test]
    fn hours_decide_where_they_are_known() {
        let job = TrainingJob {
            device_time: Some(Seconds(3600.0)),
            pue: Some(Pue::ONE),
            power: Some(Power::exact(Watts(400.0), "given")),
            ..on("nvidia-a100-sxm4-80gb", 1e17)
        };
        assert_eq!(estimate(job).unwrap().energy.central, Joules(1.44e6));
    }

    #[test]
    fn the_impossible_and_the_unknown_are_refused() {
        // An A100 has a peak of 312 TFLOP/s: 1e18 FLOPs in 1000 s are 1000.
        let fast = TrainingJob {
            device_time: Some(Seconds(1000.0)),
            ..on("nvidia-a100-sxm4-80gb", 1e18)
        };
        assert!(
            estimate(fast)
                .unwrap_err()
                .to_string()
                .contains("312 TFLOP/s")
        );
        let fast = TrainingJob {
            achieved: Some(313e12),
            ..on("nvidia-a100-sxm4-80gb", 1e18)
        };
        assert!(estimate(fast).is_err());
        let error = estimate(TrainingJob {
            flops: Some(Flops(1e18)),
            ..TrainingJob::default()
        })
        .unwrap_err();
        assert!(error.remedy().unwrap().contains("--device"));
        // What 6ND of 1e200 parameters and 1e200 tokens comes to.
        assert!(estimate(on("tpu-v3", f64::INFINITY)).is_err());
        assert!(
            TrainingJob::default()
                .count_flops(Method::Lora, Count(1e9), None)
                .unwrap_err()
                .remedy()
                .unwrap()
                .contains("--tokens")
        );
    }

    #[test]
    fn published_overheads_lie_where_the_assumed_one_does() {
        let known: Vec<f64> = super::super::PublishedRun::all()
            .iter()
            .filter_map(|run| run.pue)
            .map(Pue::value)
            .collect();
        assert!(known.len() > 15 && known.iter().all(|pue| (PUE.0..=PUE.2).contains(pue)));
        assert!(known.iter().filter(|pue| **pue == PUE.1).count() * 2 > known.len());
    }
}

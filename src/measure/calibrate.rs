//! Device profile of this machine: GEMM rates, memory bandwidth and power, measured.
//!
//! Takes the nearest profile and a compute device, returns that profile with what was measured; rates are those of a frozen
//! linear layer, bandwidths those of copies; with a counter the power of idling, products and copies too. Without one, power stays
//! as in the nearest profile, which a note says.

mod bandwidth;
mod time_budget;

use std::thread::sleep;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use self::time_budget::TimeBudget;
use super::machine::cpu_name;
use crate::energy::Computing;
use crate::energy::sensor::{Absent, NvmlSensor, PATIENCE_IF_MEASURED, RaplSensor, Sensor};
use crate::energy::{
    Counters, DeviceRef, Measured, MeasuredCache, MeasuredPower, Profile, allowed_cores,
    part_of_machine,
};
use crate::error::{Error, Result};
use crate::ops::{Context, Linear, Weight, dtype};
use crate::units::{Bytes, MicroJoules, Seconds, Watts};
use crate::work::{Precision, Product, WorkCounter};

/// Sides of the square GEMMs, tried until one takes long enough to be timed.
const SIDES: [usize; 6] = [256, 512, 1024, 2048, 4096, 8192];

/// Time and memory that a calibration takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effort {
    /// Time for each figure after warm-up.
    pub each: Seconds,
    /// Buffer whose copy measures main memory: several times the last cache, at most an eighth of free memory.
    pub buffer: Bytes,
    /// Time for all figures; on a busy machine each gets less.
    pub within: Seconds,
}

impl Effort {
    /// `each` for a figure, less than a minute in all, and 512 MiB: at least four times the last cache of any shipped profile.
    pub fn new(each: Seconds) -> Self {
        Self {
            each,
            buffer: Bytes(512 << 20),
            within: Seconds(45.0),
        }
    }
}

/// A machine before it is measured.
pub struct Calibrator {
    base: Profile,
    name: String,
    device: Device,
    counter: Option<Counters>,
    notes: Vec<String>,
}

/// A calibrated profile.
#[derive(Debug)]
pub struct Calibration {
    /// The nearest profile.
    pub base: Profile,
    /// The nearest profile with the measured figures.
    pub profile: Profile,
    /// The measured figures.
    pub measured: Measured,
    /// Figures that were not measured, and why.
    pub notes: Vec<String>,
}

impl Calibrator {
    /// Calibrates `device` into a profile called `name`, by default the nearest profile's name with "-calibrated". `like` is
    /// the nearest profile.
    ///
    /// # Errors
    /// An unknown device, and a name that no profile may have.
    pub fn new(
        like: &DeviceRef,
        name: Option<&str>,
        device: Device,
        computing: Computing,
    ) -> Result<Self> {
        let base = Profile::resolve(like, computing)?;
        let name = match name {
            Some(name) => name.to_string(),
            None => format!("{}-calibrated", base.name.replace('@', "-cores-")),
        };
        // Refuses an invalid name before anything is measured.
        let unchanged = Measured {
            bandwidth: base.bandwidth,
            ..Measured::default()
        };
        base.calibrated(&name, &unchanged)
            .map_err(|e| e.hint("give another name: `--name my-machine`"))?;
        let mut notes: Vec<String> = base
            .note
            .iter()
            .map(|note| format!("nearest profile {}: {note}", base.name))
            .collect();
        let counter = counter(&base, computing)
            .map_err(|why| notes.push(format!("power is the nearest profile's: {why}")))
            .ok();
        let counter = counter.map(|counter| Counters::new(vec![counter]));
        Ok(Self {
            base,
            name,
            device,
            counter,
            notes,
        })
    }

    /// The name of the profile to be.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Measures each figure, best of several: other work on the machine makes figures too low.
    ///
    /// # Errors
    /// A device that fails, and figures that no profile may have.
    pub fn measure(mut self, effort: Effort, note: &mut dyn FnMut(&str)) -> Result<Calibration> {
        let precisions = precisions(&self.device);
        let mut time = TimeBudget::new(effort.each, effort.within, self.figures(precisions));
        let mut idle = None;
        if self.counter.is_some() {
            note("measuring idle power");
            let each = time.next();
            idle = self
                .with_power(|| {
                    sleep(each);
                    Ok(())
                })?
                .1;
        }
        let mut measured = Measured {
            title: self.title(),
            ..Measured::default()
        };
        let load = self.rates(precisions, &mut time, &mut measured, note);
        note("measuring memory bandwidth");
        let (device, each) = (self.device.clone(), time.next());
        let ((dram, remark), streaming) =
            self.with_power(|| bandwidth::dram(&device, effort.buffer, each))?;
        measured.bandwidth = dram.round();
        self.notes.extend(remark);
        measured.caches = self.caches(&mut time, note)?;
        self.notes.extend(time.note());
        measured.power = self.power(idle, load, streaming);
        self.drop_implausible_power(&mut measured);
        let profile = self.base.calibrated(&self.name, &measured).map_err(|e| {
            e.hint("start from a nearer profile: `--like NAME`, names from `wattune devices`")
        })?;
        Ok(Calibration {
            base: self.base,
            profile,
            measured,
            notes: self.notes,
        })
    }

    /// Measures the GEMM rate of each precision; returns the highest mean power meanwhile.
    fn rates(
        &mut self,
        precisions: &[Precision],
        time: &mut TimeBudget,
        measured: &mut Measured,
        note: &mut dyn FnMut(&str),
    ) -> Option<Watts> {
        let mut load: Option<Watts> = None;
        for precision in precisions {
            note(&format!("measuring {} products", precision.as_str()));
            let each = time.next();
            let device = self.device.clone();
            let best = WarmGemm::new(&device, *precision, each)
                .and_then(|gemm| self.with_power(|| gemm.best(each)));
            match best {
                Ok((rate, watts)) => {
                    measured.rates.insert(*precision, rate.round());
                    load = load.into_iter().chain(watts).reduce(Watts::max);
                }
                Err(e) => self.notes.push(format!(
                    "{} keeps the nearest profile's rate: {}",
                    precision.as_str(),
                    first_line(&e)
                )),
            }
        }
        load
    }

    /// Drops a power that contradicts the profile's other figures, with a note.
    fn drop_implausible_power(&mut self, measured: &mut Measured) {
        let Err(why) = self.base.calibrated(&self.name, measured) else {
            return;
        };
        if let Some(power) = measured.power.take() {
            let MeasuredPower {
                idle,
                load,
                counter,
                ..
            } = power;
            let why = first_line(&why);
            self.notes
                .push(format!("power is the nearest profile's: {counter} showed {idle} idle and {load} under load, but {why}"));
        }
    }

    /// The processor's name: the nearest profile may be of another.
    fn title(&self) -> Option<String> {
        let named = || {
            format!(
                "{}, measured with {} threads",
                cpu_name(),
                rayon::current_num_threads()
            )
        };
        self.device.is_cpu().then(named)
    }

    /// Number of figures: idle power, rates, main memory and all caches but L1.
    fn figures(&self, precisions: &[Precision]) -> usize {
        let caches = if self.device.is_cpu() {
            self.base.caches.len().saturating_sub(1)
        } else {
            0
        };
        usize::from(self.counter.is_some()) + precisions.len() + 1 + caches
    }

    /// Bandwidth of the caches; a GPU's are not measured.
    fn caches(
        &mut self,
        time: &mut TimeBudget,
        note: &mut dyn FnMut(&str),
    ) -> Result<Vec<MeasuredCache>> {
        if !self.device.is_cpu() {
            self.notes.push(
                "the caches are the nearest profile's: on this device only main memory is measured"
                    .to_string(),
            );
            return Ok(Vec::new());
        }
        note("measuring the bandwidth of caches");
        let (caches, notes) = bandwidth::caches(&self.base, || time.next())?;
        self.notes.extend(notes);
        Ok(caches)
    }

    /// Runs `work`; returns its result and the mean power meanwhile, if a counter can be read.
    fn with_power<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<(T, Option<Watts>)> {
        let mark = self.counter.as_mut().map(Counters::snapshot);
        let start = Instant::now();
        let done = work()?;
        let wall = Seconds(start.elapsed().as_secs_f64());
        let energy = self
            .counter
            .as_mut()
            .zip(mark)
            .map(|(counter, mark)| counter.energy_since(&mark));
        let watts = match energy {
            Some(Ok(energy)) => Some(mean_power(energy, wall)),
            Some(Err(gap)) => {
                self.notes
                    .push(format!("a reading of power is missing: {}", gap.reason));
                None
            }
            None => None,
        };
        Ok((done, watts))
    }

    /// Idle and load power, if both were measured and load is higher.
    fn power(
        &mut self,
        idle: Option<Watts>,
        load: Option<Watts>,
        streaming: Option<Watts>,
    ) -> Option<MeasuredPower> {
        let counter = self.counter.as_ref()?.names().join(", ");
        let (idle, load) = idle.zip(load)?;
        if load > idle {
            return Some(MeasuredPower {
                idle,
                load,
                streaming: streaming.filter(|watts| *watts > idle),
                counter,
            });
        }
        self.notes.push(format!(
            "power is the nearest profile's: {counter} showed {idle} idle and {load} under load"
        ));
        None
    }
}

fn mean_power(energy: MicroJoules, wall: Seconds) -> Watts {
    Watts(energy.joules().0 / wall.0)
}

/// The device's energy counter, or why there is none.
fn counter(base: &Profile, computing: Computing) -> Result<Box<dyn Sensor>, String> {
    let why = |absent: Absent| format!("{}; {}", absent.reason, absent.remedy);
    match computing {
        Computing::Cpu if part_of_machine().is_some() || is_part(base, allowed_cores()) => Err(
            "a part of this machine's cores is measured, and its counter would show all of them"
                .to_string(),
        ),
        Computing::Cpu => Ok(Box::new(
            RaplSensor::open_default(PATIENCE_IF_MEASURED).map_err(why)?,
        )),
        Computing::Nvidia(index) => Ok(Box::new(
            NvmlSensor::open_moving(index, PATIENCE_IF_MEASURED).map_err(why)?,
        )),
        Computing::Other => Err("this device has no energy counter that can be read".to_string()),
    }
}

/// Whether the profile is a share of a processor with `cores` cores here, and so charged a share of its power.
fn is_part(base: &Profile, cores: usize) -> bool {
    base.name.contains('@') && base.cores.is_some_and(|share| share < cores)
}

/// Precisions that the device computes in.
fn precisions(device: &Device) -> &'static [Precision] {
    match device.is_cpu() {
        true => &[Precision::F32, Precision::Bf16],
        false => &[Precision::F32, Precision::Bf16, Precision::F16],
    }
}

fn first_line(error: &Error) -> String {
    error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_string()
}

/// A square GEMM after warm-up, and its best rate so far.
struct WarmGemm {
    x: Tensor,
    linear: Linear,
    precision: Precision,
    flops: f64,
    /// FLOP/s.
    rate: f64,
}

impl WarmGemm {
    /// The smallest GEMM that takes a tenth of `each`, else the largest; smaller ones are timed on the way.
    fn new(device: &Device, precision: Precision, each: Duration) -> Result<Self> {
        let mut rate = 0.0_f64;
        let mut warm = None;
        for side in SIDES {
            let mut gemm = Self::with_side(device, precision, side)?;
            gemm.seconds(1)?;
            let seconds = gemm.seconds(1)?;
            rate = rate.max(gemm.flops / seconds);
            gemm.rate = rate;
            warm = Some(gemm);
            if seconds > each.as_secs_f64() / 10.0 {
                break;
            }
        }
        Ok(warm.expect("there is a side to try"))
    }

    fn with_side(device: &Device, precision: Precision, side: usize) -> Result<Self> {
        // Random values: zeros and ones draw less power than real data.
        let random = || Tensor::rand(-1f32, 1f32, (side, side), device);
        let linear = Linear {
            weight: Weight::frozen(random()?.to_dtype(dtype(precision))?),
            bias: None,
            lora: None,
        };
        let product = Product {
            m: side as u64,
            n: side as u64,
            k: side as u64,
            precision,
            rhs_blocks: None,
        };
        Ok(Self {
            x: random()?,
            linear,
            precision,
            flops: product.flops() as f64,
            rate: 0.0,
        })
    }

    /// Wall time of `count` GEMMs in sequence.
    fn seconds(&self, count: usize) -> Result<f64> {
        let counter = WorkCounter::default();
        let context = Context::new(&counter, self.precision);
        let start = Instant::now();
        for _ in 0..count {
            self.linear.forward(context, &self.x, None, None)?;
        }
        self.x.device().synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// The best FLOP/s within `each`. Quick GEMMs are timed in groups, so that launch and synchronisation weigh little.
    fn best(&self, each: Duration) -> Result<f64> {
        let start = Instant::now();
        let group = (0.02 * self.rate / self.flops).ceil().clamp(1.0, 64.0) as usize;
        let mut best = self.rate;
        while start.elapsed() < each {
            best = best.max(self.flops * group as f64 / self.seconds(group)?);
        }
        Ok(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy::sensor::Gap;

    /// A counter that shows what it is told.
    struct Scripted(Vec<Result<u64, Gap>>);

    impl Sensor for Scripted {
        fn name(&self) -> &str {
            "scripted"
        }

        fn read(&mut self) -> Result<MicroJoules, Gap> {
            self.0.remove(0).map(MicroJoules)
        }
    }

    const QUICK: Effort = Effort {
        each: Seconds(0.01),
        buffer: Bytes(8 << 20),
        within: Seconds(60.0),
    };

    fn calibrator(script: Vec<Result<u64, Gap>>) -> Calibrator {
        let mut calibrator = Calibrator::new(
            &device("raspberry-pi-5"),
            Some("pi"),
            Device::Cpu,
            Computing::Cpu,
        )
        .unwrap();
        calibrator.counter = Some(Counters::new(vec![Box::new(Scripted(script))]));
        calibrator.notes.clear();
        calibrator
    }

    fn device(name: &str) -> DeviceRef {
        name.parse().unwrap()
    }

    #[test]
    fn power_is_what_the_counter_rose_by_over_the_time_it_took() {
        // 6 J in 2 s.
        assert_eq!(mean_power(MicroJoules(6_000_000), Seconds(2.0)), Watts(3.0));
        // Idle, then f32, bf16 and copies: nothing, 5 J, 9 J, 1 mJ. Load is the higher power of the products; all windows are at least
        // 10 ms long.
        let readings = [
            0, 0, 0, 5_000_000, 10_000_000, 19_000_000, 19_000_000, 19_001_000,
        ]
        .map(Ok);
        let done = calibrator(readings.into())
            .measure(QUICK, &mut |_: &str| {})
            .unwrap();
        let power = done.measured.power.unwrap();
        assert_eq!(
            (power.idle, power.counter.as_str()),
            (Watts(0.0), "scripted")
        );
        assert!(
            power.load > Watts(0.0) && power.load <= Watts(900.0),
            "{}",
            power.load
        );
        assert_eq!(
            (done.profile.idle_w, done.profile.load_w),
            (power.idle, power.load)
        );
        let streaming = power.streaming.unwrap();
        let picojoules = streaming.0 / done.measured.bandwidth * 1e12;
        assert!(streaming <= Watts(0.1), "{streaming}");
        assert!((done.profile.streamed_pj_per_byte() / picojoules - 1.0).abs() < 1e-9);
        // It is no Raspberry Pi that was measured.
        assert_eq!(
            done.profile.title,
            format!(
                "{}, measured with {} threads",
                cpu_name(),
                rayon::current_num_threads()
            )
        );
        // Of power nothing is to be noted; of memory, what this machine's caches are like.
        assert!(
            done.notes
                .iter()
                .all(|note| note.starts_with("memory: ") || note.contains("was not measured")),
            "{:?}",
            done.notes
        );
    }

    #[test]
    fn a_counter_that_fails_or_makes_no_sense_leaves_the_profile_its_power() {
        let pi = Profile::named("raspberry-pi-5").unwrap();
        let gap = || Err(Gap::unread("told to fail"));
        // Each window's end is read twice before it is given up.
        let failing = vec![
            Ok(0),
            gap(),
            gap(),
            Ok(0),
            gap(),
            gap(),
            Ok(0),
            gap(),
            gap(),
            Ok(0),
            gap(),
            gap(),
        ];
        // More power idle than under load.
        let upside_down = [0, 9, 9, 9, 9, 9, 9, 9].map(|joules| Ok(joules * 1_000_000));
        // A microjoule under load: the traffic to memory takes more.
        let tiny = [0, 0, 0, 1, 1, 2, 2, 9_000_000].map(Ok).into();
        for (script, words) in [
            (failing, "told to fail"),
            (upside_down.into(), "idle"),
            (tiny, "under load, but moving the operands"),
        ] {
            let done = calibrator(script)
                .measure(QUICK, &mut |_: &str| {})
                .unwrap();
            assert_eq!(
                (done.measured.power, done.profile.load_w),
                (None, pi.load_w)
            );
            assert!(
                done.notes.iter().any(|note| note.contains(words)),
                "{:?}",
                done.notes
            );
        }
    }

    #[test]
    fn each_cache_behind_the_first_is_measured_or_said_not_to_be() {
        let readings = [
            0, 0, 0, 5_000_000, 10_000_000, 19_000_000, 19_000_000, 20_000_000,
        ];
        let done = calibrator(readings.map(Ok).into())
            .measure(QUICK, &mut |_: &str| {})
            .unwrap();
        let caches = &done.measured.caches;
        assert_eq!(
            caches
                .iter()
                .map(|cache| cache.name.as_str())
                .collect::<Vec<_>>(),
            ["L1", "L2", "LLC"]
        );
        assert_eq!(caches[0].bandwidth, None);
        for (cache, level) in caches.iter().zip(&done.profile.caches).skip(1) {
            let noted = done
                .notes
                .iter()
                .any(|note| note.starts_with(&format!("{} was not measured", cache.name)));
            assert!(cache.bandwidth.is_some() != noted, "{cache:?}");
            assert_eq!(level.bandwidth, cache.bandwidth.map(|(rate, _)| rate));
        }
    }

    #[test]
    fn a_calibration_keeps_to_its_time_and_says_so() {
        // Half a minute for each of five figures, and next to nothing for all of them.
        let effort = Effort {
            each: Seconds(30.0),
            within: Seconds(0.05),
            ..QUICK
        };
        let start = Instant::now();
        let calibrator = Calibrator::new(
            &device("raspberry-pi-5"),
            Some("pi"),
            Device::Cpu,
            Computing::Other,
        )
        .unwrap();
        let done = calibrator.measure(effort, &mut |_: &str| {}).unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{:?}",
            start.elapsed()
        );
        assert!(
            done.notes
                .iter()
                .any(|note| note.contains("instead of 30 s")),
            "{:?}",
            done.notes
        );
        assert_eq!(done.measured.rates.len(), 2);
    }

    #[test]
    fn a_share_of_a_processor_is_not_measured_by_the_whole_one_s_counter() {
        let share = Profile::named("amd-epyc-7763@2").unwrap();
        assert!(is_part(&share, 64) && is_part(&share, 3));
        // All that this machine has, though the profile's processor has more; and a whole processor.
        assert!(!is_part(&share, 2) && !is_part(&Profile::named("amd-epyc-7763").unwrap(), 128));
        let refused = Calibrator::new(
            &device("generic-cpu"),
            Some("My Machine"),
            Device::Cpu,
            Computing::Cpu,
        )
        .err()
        .unwrap();
        assert!(refused.to_string().contains("--name"), "{refused}");
    }
}

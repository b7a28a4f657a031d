//! Detection of this machine's device profile.
//!
//! Recognises the processor (`/proc/cpuinfo`, else the system's name for it), a GPU by its driver's
//! name, and the physical cores this process may use (affinity, cgroup). An unknown processor gets
//! a generic profile with a note; an unknown GPU is an error.

use super::options::DeviceRef;
use super::profile::{DeviceKind, Profile};
use super::sensor::gpu_name;
use crate::error::{Error, Kind, Result};
use crate::text::{did_you_mean, near_matches};

/// The device that computes. Energy is measured only if it has a readable counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Computing {
    /// The processor.
    Cpu,
    /// The NVIDIA GPU of this CUDA ordinal.
    Nvidia(u32),
    /// A device without a supported counter.
    Other,
}

const NAME_A_PROFILE: &str = "write `device = \"NAME\"` in the recipe's [energy] table with a name from `wattune devices`, or a profile file";

impl Profile {
    /// The profile of a recipe's `energy.device`. A name means all of its cores, `NAME@CORES`
    /// for some cores of a processor, `auto` for the computing device; of a processor `auto` takes
    /// the cores that compute.
    pub fn resolve(device: &DeviceRef, computing: Computing) -> Result<Profile> {
        match device {
            DeviceRef::Auto => Self::of_machine(computing),
            DeviceRef::File(path) => Self::from_file(path),
            DeviceRef::Named { name, cores } => Self::shipped(name, *cores),
        }
    }

    /// The value of `energy.device` that resolves to this profile.
    pub fn reference(&self) -> DeviceRef {
        self.name.parse().unwrap_or_else(|_| DeviceRef::Named {
            name: self.name.clone(),
            cores: None,
        })
    }

    /// The profile of this machine's processor, scaled to the cores that compute; `note` says how it
    /// was recognised.
    pub fn detect() -> Profile {
        let info = cpuinfo();
        let cores = computing_cores();
        let mut profile = recognise(&info).scaled_to(cores);
        let note = profile.note.take().unwrap_or_default();
        let plural = if cores == 1 { "" } else { "s" };
        profile.note = Some(format!("{note}; {cores} core{plural} computing"));
        profile
    }

    /// The profile of the device that computes.
    pub fn of_machine(computing: Computing) -> Result<Profile> {
        match computing {
            Computing::Cpu => Ok(Self::detect()),
            Computing::Nvidia(index) => {
                let name = gpu_name(index).map_err(|absent| {
                    let what = format!(
                        "the graphics processor cannot be recognised: {}",
                        absent.reason
                    );
                    let hint = format!(
                        "{}; or name the device in the recipe's [energy] table",
                        absent.remedy
                    );
                    Error::new(Kind::Energy, what).hint(hint)
                })?;
                Self::of_gpu(&name)
            }
            Computing::Other => match Self::detect() {
                chip if chip.kind == DeviceKind::Soc => Ok(chip),
                _ => {
                    let what = "this device cannot be recognised, and none is guessed";
                    Err(Error::new(Kind::Energy, what).hint(NAME_A_PROFILE))
                }
            },
        }
    }

    /// The profile of a GPU by the name its driver reports ("NVIDIA H100 80GB HBM3").
    pub fn of_gpu(reported: &str) -> Result<Profile> {
        let is_reported = |name: &String| name.eq_ignore_ascii_case(reported.trim());
        let found = Self::all()
            .iter()
            .filter(|p| p.kind != DeviceKind::Cpu)
            .find(|p| p.matches.iter().any(is_reported));
        if let Some(profile) = found {
            return Ok(profile.with_note(format!("recognised by the driver's name `{reported}`")));
        }
        let slug = reported.to_lowercase().replace(' ', "-");
        let gpus = Self::all().iter().filter(|p| p.kind == DeviceKind::Gpu);
        let near = near_matches(&slug, gpus.map(|p| p.name.as_str()));
        let what = "this graphics processor has no profile, and none is guessed";
        Err(Error::new(Kind::Energy, what)
            .value(reported)
            .hint(did_you_mean(&near, NAME_A_PROFILE)))
    }

    fn with_note(&self, note: String) -> Profile {
        Profile {
            note: Some(note),
            ..self.clone()
        }
    }
}

/// Physical cores this process may use: allowed CPUs over threads per core.
pub fn allowed_cores() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cpus / threads_per_core(&cpuinfo())).max(1)
}

/// Physical cores that compute: those this process may use, or its threads if they are fewer.
pub fn computing_cores() -> usize {
    // The command line sets it, whatever stated the number of threads.
    let threads = std::env::var("RAYON_NUM_THREADS").ok();
    let threads = threads.and_then(|threads| threads.parse().ok());
    let threads = threads.filter(|threads| *threads > 0);
    allowed_cores().min(threads.unwrap_or(usize::MAX))
}

/// (CPUs this process may use, CPUs of the system); `None` if it may use all of them.
pub fn part_of_machine() -> Option<(usize, usize)> {
    let allowed = std::thread::available_parallelism().ok()?.get();
    let all = cpu_count(&cpuinfo());
    (allowed < all).then_some((allowed, all))
}

/// CPUs listed in `/proc/cpuinfo`.
fn cpu_count(info: &str) -> usize {
    fields(info).filter(|(key, _)| *key == "processor").count()
}

fn cpuinfo() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

/// The lines "key : value".
fn fields(info: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = info.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(key, value)| (key.trim(), value.trim()))
}

fn field<'a>(info: &'a str, key: &str) -> Option<&'a str> {
    let mut fields = fields(info);
    fields
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value)
}

/// "siblings" over "cpu cores" of the first package; one if the system does not state them.
fn threads_per_core(info: &str) -> usize {
    let number = |key| field(info, key).and_then(|text| text.parse::<usize>().ok());
    match (number("siblings"), number("cpu cores")) {
        (Some(siblings), Some(cores)) if cores > 0 => (siblings / cores).max(1),
        _ => 1,
    }
}

/// The profile of the processor in `/proc/cpuinfo`: by name, else by vendor, family and model, else
/// generic.
fn recognise(info: &str) -> Profile {
    // x86 processors have "model name", Arm boards "Model".
    let name = field(info, "model name").or(field(info, "Model"));
    let name = name
        .map(str::to_string)
        .or_else(system_cpu_name)
        .unwrap_or_default();
    let part = |key| field(info, key).unwrap_or("?");
    let id = format!(
        "{}/{}/{}",
        part("vendor_id"),
        part("cpu family"),
        part("model")
    );
    if let Some(profile) = by_name(&name) {
        profile.with_note(format!("recognised by the processor's name `{name}`"))
    } else if let Some(profile) = processors().find(|p| p.cpuid.contains(&id)) {
        profile.with_note(format!(
            "CPU model not reported (`{name}`); using the {} profile (same family, {id})",
            profile.title
        ))
    } else {
        let generic = Profile::named("generic-cpu").expect("a shipped profile: a test asks for it");
        let name = if name.is_empty() {
            "a processor without a name"
        } else {
            &name
        };
        generic.with_note(format!(
            "no profile for {name}: a generic one is used, name the device in [energy] for better figures"
        ))
    }
}

fn processors() -> impl Iterator<Item = &'static Profile> {
    Profile::all().iter().filter(|p| p.kind != DeviceKind::Gpu)
}

/// The processor with the longest match in `name`: "Apple M4 Max" is not "Apple M4".
fn by_name(name: &str) -> Option<&'static Profile> {
    // A match may end in a space, as a word boundary.
    let padded = format!("{name} ");
    let longest_match = |p: &Profile| {
        let matches = p
            .matches
            .iter()
            .filter(|text| padded.contains(text.as_str()));
        matches.map(String::len).max()
    };
    processors()
        .filter(|p| longest_match(p).is_some())
        .max_by_key(|p| longest_match(p))
}

/// The processor's name on systems without `/proc/cpuinfo` (macOS, Windows).
fn system_cpu_name() -> Option<String> {
    let cpus = sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing());
    let system = sysinfo::System::new_with_specifics(cpus).ok()?;
    let brand = system.cpus().first()?.brand().trim().to_string();
    Some(brand).filter(|brand| !brand.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn x86(name: &str, family: u32, model: u32) -> String {
        format!(
            "vendor_id\t: GenuineIntel\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\nsiblings\t: 4\ncpu cores\t: 2\n"
        )
    }

    #[test]
    fn processors_are_recognised_by_name_then_by_family() {
        let named = recognise(&x86(
            "Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz",
            6,
            85,
        ));
        assert_eq!(named.name, "intel-xeon-platinum-8275cl");
        let same_family = recognise(&x86("Intel(R) Xeon(R) Processor", 6, 207));
        assert_eq!(same_family.name, "intel-xeon-platinum-8592plus");
        assert!(same_family.note.unwrap().contains("CPU model not reported"));
        let unknown = recognise(&x86("Mystery 3000", 1, 2));
        assert_eq!(unknown.name, "generic-cpu");
        assert!(unknown.note.unwrap().contains("Mystery 3000"));
        let pi = recognise("processor : 0\nModel : Raspberry Pi 5 Model B Rev 1.0\n");
        assert_eq!(pi.name, "raspberry-pi-5");
        assert_eq!(
            recognise("model name : Apple M4 Max\n").name,
            "apple-m4-max"
        );
    }

    #[test]
    fn two_threads_of_a_core_count_once() {
        assert_eq!(threads_per_core(&x86("x", 6, 1)), 2);
        assert_eq!(threads_per_core(""), 1);
        // As x86 kernels print them; a Raspberry Pi's have no model names in between.
        let two = "processor\t: 0\nmodel name\t: processor x\n\nprocessor\t: 1\n";
        assert_eq!(cpu_count(two), 2);
        assert!(allowed_cores() >= 1);
        let here = Profile::detect();
        assert!(here.cores.unwrap() <= allowed_cores(), "{here:?}");
    }

    #[test]
    fn an_unknown_gpu_is_an_error() {
        let h100 = Profile::of_gpu("NVIDIA H100 80GB HBM3").unwrap();
        assert_eq!(h100.name, "nvidia-h100-sxm5-80gb");
        let error = Profile::of_gpu("NVIDIA H100 96GB HBM9").unwrap_err();
        assert_eq!(error.kind(), Kind::Energy);
        assert!(error.to_string().contains("nvidia-h100"), "{error}");
    }
}

//! Which profile this machine is.
//!
//! Owns the recognition of the processor (`/proc/cpuinfo`, else the system's own name for it), of a graphics processor by its
//! driver's name, and the number of physical cores this process may use (affinity, cgroup). Never guesses a graphics processor;
//! an unknown processor gets a generic profile that says so.

use super::meter::Computing;
use super::profile::{DeviceKind, Profile};
use super::sensor::gpu_name;
use super::{did_you_mean, near_matches};
use crate::error::{Error, Kind, Result};

impl Profile {
    /// The profile of this machine's processor, scaled to the cores this process may use; its `note` says how it was found.
    pub fn detect() -> Profile {
        let info = cpuinfo();
        let cores = allowed_cores();
        let mut profile = recognise(&info).scaled_to(cores);
        let note = profile.note.take().unwrap_or_default();
        profile.note = Some(format!(
            "{note}; {cores} core{} allowed to this process",
            if cores == 1 { "" } else { "s" }
        ));
        profile
    }

    /// The profile of the device that computes.
    pub fn of_machine(computing: Computing) -> Result<Profile> {
        match computing {
            Computing::Cpu => Ok(Self::detect()),
            Computing::Nvidia(index) => {
                let name = gpu_name(index).map_err(|absent| {
                    Error::new(Kind::Energy, format!("the graphics processor cannot be recognised: {}", absent.reason))
                        .hint(format!("{}; or name the device in the recipe's [energy] table", absent.remedy))
                })?;
                Self::of_gpu(&name)
            }
            Computing::Other => match Self::detect() {
                chip if chip.kind == DeviceKind::Soc => Ok(chip),
                _ => Err(Error::new(Kind::Energy, "this device cannot be recognised, and none is guessed")
                    .hint("write `device = \"NAME\"` in the recipe's [energy] table with a name from `wattune devices`, or a profile file")),
            },
        }
    }

    /// The profile of a graphics processor by the name its driver reports ("NVIDIA H100 80GB HBM3").
    pub fn of_gpu(reported: &str) -> Result<Profile> {
        let same = |name: &String| name.eq_ignore_ascii_case(reported.trim());
        let found = Profile::all()
            .iter()
            .filter(|p| p.kind != DeviceKind::Cpu)
            .find(|p| p.matches.iter().any(same));
        if let Some(profile) = found {
            return Ok(Profile {
                note: Some(format!("recognised by the driver's name `{reported}`")),
                ..profile.clone()
            });
        }
        let slug = reported.to_lowercase().replace(' ', "-");
        let near = near_matches(
            &slug,
            Profile::all()
                .iter()
                .filter(|p| p.kind == DeviceKind::Gpu)
                .map(|p| p.name.as_str()),
        );
        Err(Error::new(Kind::Energy, "this graphics processor has no profile, and none is guessed").value(reported).hint(
            did_you_mean(
                &near,
                "write `device = \"NAME\"` in the recipe's [energy] table with a name from `wattune devices`, or a profile file",
            ),
        ))
    }
}

/// Physical cores this process may use: the system's allowed CPUs, two of which may be one core.
pub fn allowed_cores() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cpus / threads_per_core(&cpuinfo())).max(1)
}

/// The CPUs this process may use and all that the system lists, where the first are fewer.
pub fn part_of_machine() -> Option<(usize, usize)> {
    let allowed = std::thread::available_parallelism().ok()?.get();
    let all = listed(&cpuinfo());
    (allowed < all).then_some((allowed, all))
}

/// The CPUs that `/proc/cpuinfo` lists.
fn listed(info: &str) -> usize {
    info.lines()
        .filter(|line| {
            line.split_once(':')
                .is_some_and(|(key, _)| key.trim() == "processor")
        })
        .count()
}

fn cpuinfo() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

/// The value of the first line "key : value".
fn field<'a>(info: &'a str, key: &str) -> Option<&'a str> {
    info.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim())
}

/// "siblings" over "cpu cores" of the first package; one where the system does not say.
fn threads_per_core(info: &str) -> usize {
    let number = |key| field(info, key).and_then(|text| text.parse::<usize>().ok());
    match (number("siblings"), number("cpu cores")) {
        (Some(siblings), Some(cores)) if cores > 0 => (siblings / cores).max(1),
        _ => 1,
    }
}

/// The profile of the processor that `/proc/cpuinfo` describes: by name, else by vendor, family and model, else generic.
fn recognise(info: &str) -> Profile {
    let fallback = || sysinfo_brand().unwrap_or_default();
    // Arm boards name themselves in "Model"; x86 processors in "model name".
    let name = field(info, "model name")
        .or(field(info, "Model"))
        .map(str::to_string)
        .unwrap_or_else(fallback);
    let padded = format!("{name} ");
    let chips = || Profile::all().iter().filter(|p| p.kind != DeviceKind::Gpu);
    // The longest text wins: "Apple M4 Max" is not "Apple M4".
    let length = |p: &Profile| {
        p.matches
            .iter()
            .filter(|text| padded.contains(text.as_str()))
            .map(String::len)
            .max()
    };
    if let Some(profile) = chips()
        .filter(|p| length(p).is_some())
        .max_by_key(|p| length(p))
    {
        return Profile {
            note: Some(format!("recognised by the processor's name `{name}`")),
            ..profile.clone()
        };
    }
    let part = |key| field(info, key).unwrap_or("?");
    let id = format!(
        "{}/{}/{}",
        part("vendor_id"),
        part("cpu family"),
        part("model")
    );
    if let Some(profile) = chips().find(|p| p.cpuid.contains(&id)) {
        let note = format!(
            "`{name}` hides its model; {} stands for its family ({id})",
            profile.title
        );
        return Profile {
            note: Some(note),
            ..profile.clone()
        };
    }
    let generic = Profile::named("generic-cpu").expect("a shipped profile: a test asks for it");
    let shown = if name.is_empty() {
        "a processor without a name"
    } else {
        &name
    };
    Profile {
        note: Some(format!(
            "no profile for {shown}: a generic one is used, name the device in [energy] for better figures"
        )),
        ..generic
    }
}

/// The processor's name where there is no `/proc/cpuinfo` (macOS, Windows).
fn sysinfo_brand() -> Option<String> {
    let what = sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing());
    let system = sysinfo::System::new_with_specifics(what).ok()?;
    system
        .cpus()
        .first()
        .map(|cpu| cpu.brand().trim().to_string())
        .filter(|brand| !brand.is_empty())
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
    fn processors_are_recognised_by_name_then_family_then_not_at_all() {
        let named = recognise(&x86(
            "Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz",
            6,
            85,
        ));
        assert_eq!(named.name, "intel-xeon-platinum-8275cl");
        let hidden = recognise(&x86("Intel(R) Xeon(R) Processor", 6, 207));
        assert_eq!(hidden.name, "intel-xeon-platinum-8592plus");
        assert!(hidden.note.unwrap().contains("hides its model"));
        let unknown = recognise(&x86("Mystery 3000", 1, 2));
        assert_eq!(unknown.name, "generic-cpu");
        assert!(unknown.note.unwrap().contains("Mystery 3000"));
        assert_eq!(
            recognise("processor : 0\nModel : Raspberry Pi 5 Model B Rev 1.0\n").name,
            "raspberry-pi-5"
        );
        assert_eq!(
            recognise("model name : Apple M4 Max\n").name,
            "apple-m4-max"
        );
    }

    #[test]
    fn two_threads_of_a_core_are_one_core() {
        assert_eq!(threads_per_core(&x86("x", 6, 1)), 2);
        assert_eq!(threads_per_core(""), 1);
        // As the kernel prints them on x86; the Raspberry Pi's have no model names between them.
        assert_eq!(
            listed("processor\t: 0\nmodel name\t: processor x\n\nprocessor\t: 1\n"),
            2
        );
        assert!(allowed_cores() >= 1);
        let here = Profile::detect();
        assert!(here.cores.unwrap() <= allowed_cores(), "{here:?}");
    }

    #[test]
    fn a_graphics_processor_is_never_guessed() {
        assert_eq!(
            Profile::of_gpu("NVIDIA H100 80GB HBM3").unwrap().name,
            "nvidia-h100-sxm5-80gb"
        );
        let error = Profile::of_gpu("NVIDIA H100 96GB HBM9").unwrap_err();
        assert!(
            error.kind() == Kind::Energy && error.to_string().contains("nvidia-h100"),
            "{error}"
        );
    }
}

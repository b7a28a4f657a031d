//! `wattune calibrate`: measures this machine and writes its profile file.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};

use super::model::DeviceArgument;
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::run::{self, Calibration, Calibrator, DeviceRef, Effort, Screen};
use crate::units::{Flops, Seconds, significant};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Profile file to write, ending in `.toml`; must not exist [default: NAME.toml]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Profile name: lower-case letters, digits, hyphens [default: the base profile's name and "calibrated"]
    #[arg(long)]
    name: Option<String>,
    /// Base profile: a name from `wattune devices`, or a profile file
    #[arg(long, value_name = "PROFILE", default_value = "auto")]
    like: DeviceRef,
    #[command(flatten)]
    device: DeviceArgument,
    /// Measurement time for each figure
    #[arg(long, value_name = "TIME", default_value = "2 s")]
    each: Seconds,
    /// Measure nothing; store this run's ratio of measured to counted energy in the profile
    #[arg(long, value_name = "RUN_DIR", conflicts_with_all = ["like", "device", "each"])]
    from_run: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  wattune calibrate --out my-machine.toml --name my-machine
  wattune plan recipe.toml --set energy.device=./my-machine.toml
  wattune calibrate --from-run runs/mine --out mine.toml       counted joules times the run's measured / counted

In a recipe:
  [energy]
  device = \"./my-machine.toml\"

Only runs charged to the same profile can be compared: keep the file with the recipe.";

/// Longest measurement time of one figure: all of them take under a minute.
const LONGEST: Seconds = Seconds(10.0);

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    match &arguments.from_run {
        Some(run) => keep(arguments, run, common),
        None => measure(arguments, common),
    }
}

/// Stores a run's factor in the profile it was charged to.
fn keep(arguments: &Arguments, run: &Path, common: Common) -> Result<ExitCode> {
    let found = run::reconcile(run, arguments.name.as_deref())?;
    let path = arguments
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{}.toml", found.profile.name)));
    check(&path)?;
    write_atomic(&path, found.profile.to_toml()).map_err(Error::while_running)?;
    let (factor, source) = found.profile.factor().unwrap_or((1.0, ""));
    if common.json {
        return out_json(&json!({
            "written": path,
            "name": found.profile.name,
            "nearest": found.base.name,
            "measured_over_counted": { "value": factor, "source": source },
            "compared": found.compared,
            "notes": found.notes,
            "profile": found.profile,
        }));
    }
    let mut text = format!(
        "{} · {} with counted joules times {}\n",
        found.profile.name,
        found.base.name,
        significant(factor)
    );
    let _ = writeln!(text, "\n  {source}");
    out(&(text + &ending(&path, &found.notes)))
}

/// Measures the machine.
fn measure(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    if arguments.each <= Seconds::ZERO || arguments.each > LONGEST {
        let error =
            Error::new(Kind::Usage, "`--each` is out of range").value(arguments.each.to_string());
        return Err(error.rule(format!("more than nothing, at most {LONGEST}")));
    }
    let (device, computing) = arguments.device.device.open()?;
    let calibrator = Calibrator::new(
        &arguments.like,
        arguments.name.as_deref(),
        device,
        computing,
    )?;
    let path = arguments
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{}.toml", calibrator.name())));
    check(&path)?;
    let mut screen = Terminal::new(common.quiet);
    let found = calibrator
        .measure(Effort::new(arguments.each), &mut |line| screen.note(line))
        .map_err(Error::while_running)?;
    write_atomic(&path, found.profile.to_toml()).map_err(Error::while_running)?;
    if common.json {
        out_json(&document(&path, &found))
    } else {
        out(&page(&path, &found))
    }
}

/// Refuses a file that exists or that a recipe cannot name, before anything is measured.
fn check(path: &Path) -> Result<()> {
    if path.extension().is_none_or(|extension| extension != "toml") {
        return Err(Error::new(Kind::Usage, "a profile file ends in `.toml`")
            .at("--out")
            .value(path.display().to_string())
            .hint("for example `--out my-machine.toml`"));
    }
    if path.exists() {
        return Err(Error::new(Kind::Usage, "the file exists already")
            .at(path.display().to_string())
            .hint("give another: `wattune calibrate --out OTHER.toml`"));
    }
    Ok(())
}

fn document(path: &Path, found: &Calibration) -> Value {
    let Calibration {
        base,
        profile,
        measured,
        notes,
    } = found;
    let rates: serde_json::Map<String, Value> = measured
        .rates
        .iter()
        .map(|(precision, rate)| {
            (
                precision.as_str().to_string(),
                json!({ "measured": rate, "nearest": base.rate(*precision) }),
            )
        })
        .collect();
    let power = measured.power.as_ref();
    json!({
        "written": path,
        "name": profile.name,
        "nearest": base.name,
        "flops_per_second": rates,
        "bytes_per_second": { "measured": measured.bandwidth, "nearest": base.bandwidth * base.achievable_bandwidth },
        "caches": measured.caches.iter().map(|cache| json!({
            "name": cache.name,
            "bytes": cache.bytes,
            "bytes_per_second": cache.bandwidth.map(|(rate, _)| rate),
            "working_set_bytes": cache.bandwidth.map(|(_, set)| set),
        })).collect::<Vec<_>>(),
        "power": {
            "idle_w": profile.idle_w,
            "load_w": profile.load_w,
            "source": power.map_or_else(|| format!("the profile {}", base.name), |power| format!("measured with {}", power.counter)),
        },
        "notes": notes,
        "profile": profile,
    })
}

fn page(path: &Path, found: &Calibration) -> String {
    let mut text = format!(
        "{} · measured (in brackets: {})\n\n",
        found.profile.name, found.base.name
    );
    for (label, value) in rows(found) {
        let _ = writeln!(text, "  {label:<10} {value}");
    }
    text + &ending(path, &found.notes)
}

/// What was measured, in brackets what the base profile has.
fn rows(found: &Calibration) -> Vec<(&str, String)> {
    let Calibration {
        base,
        profile,
        measured,
        ..
    } = found;
    let gigabytes = |rate: f64| significant(rate / 1e9);
    let rates = measured.rates.iter().map(|(precision, rate)| {
        let nearest = Flops(base.rate(*precision));
        (
            precision.as_str(),
            format!("{}/s ({nearest}/s)", Flops(*rate)),
        )
    });
    let memory = format!(
        "{} GB/s ({})",
        gigabytes(measured.bandwidth),
        gigabytes(base.bandwidth * base.achievable_bandwidth)
    );
    let caches = measured.caches.iter().filter_map(|cache| {
        let (rate, set) = cache.bandwidth?;
        let value = format!("{} GB/s, copied within {set} a thread", gigabytes(rate));
        Some((cache.name.as_str(), value))
    });
    let power = match &measured.power {
        Some(power) => format!(
            "idle {} ({}), load {} ({}), by {}",
            power.idle, base.idle_w, power.load, base.load_w, power.counter
        ),
        None => format!(
            "not measured: idle {}, load {} from {}",
            profile.idle_w, profile.load_w, base.name
        ),
    };
    rates
        .chain([("memory", memory)])
        .chain(caches)
        .chain([("power", power)])
        .collect()
}

/// The notes, and the recipe key that uses the file.
fn ending(path: &Path, notes: &[String]) -> String {
    let notes: String = notes
        .iter()
        .map(|note| format!("\n  note: {note}\n"))
        .collect();
    format!(
        "{notes}\nWrote {0}. In a recipe: `device = \"{0}\"` in [energy], the path as seen from the recipe.",
        shown(path)
    )
}

/// Prefixes a relative path with `./`, so that a recipe reads it as a path.
fn shown(path: &Path) -> String {
    if path.is_relative() && !path.starts_with(".") && !path.starts_with("..") {
        return format!("./{}", path.display());
    }
    path.display().to_string()
}

//! `wattune baseline`: the cost of training a model.

use std::process::ExitCode;
use std::str::FromStr;

use super::{Common, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::report::format;
use crate::report::text::{Table, bullet};
use crate::run::{
    BaselineCost, BaselineRequest, Interval, Method, PublishedFigures, baseline_cost,
    published_runs,
};
use crate::units::{
    Count, Flops, JOULES_PER_KWH, Joules, ParseQuantityError, Pue, Seconds, Watts, significant,
};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// A published training run, such as gpt-3 or bloom-176b
    #[arg(conflicts_with_all = ["params", "tokens", "flops", "method"])]
    name: Option<String>,
    /// List the published training runs
    #[arg(long, conflicts_with_all = ["name", "params", "flops"])]
    list: bool,
    /// Parameters active per token, such as 1.75e11, 175B or 7M
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "flops",
        allow_hyphen_values = true
    )]
    params: Option<String>,
    /// Training tokens over all epochs, such as 1.4T [default for pretraining: 20 per parameter]
    #[arg(
        long,
        value_name = "D",
        requires = "params",
        allow_hyphen_values = true
    )]
    tokens: Option<String>,
    /// Training FLOPs, instead of parameters and tokens
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    flops: Option<String>,
    /// Training method: 6ND FLOPs, 4ND for lora
    #[arg(long, value_enum, default_value = "pretraining")]
    method: MethodName,
    /// Device profile (see `wattune devices`), a profile file, or tpu-v2, tpu-v3, tpu-v4, nvidia-h800-sxm
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Number of devices, for the wall time
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    count: Option<String>,
    /// Mean TFLOP/s achieved per device
    #[arg(
        long,
        value_name = "T",
        allow_hyphen_values = true,
        conflicts_with = "hours"
    )]
    achieved_tflops: Option<String>,
    /// Mean power per device, in watts
    #[arg(long, value_name = "W", allow_hyphen_values = true)]
    power: Option<String>,
    /// Total device hours
    #[arg(long, value_name = "DEVICE_HOURS", allow_hyphen_values = true)]
    hours: Option<String>,
    /// Power usage effectiveness of the facility
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pue: Option<String>,
    /// Grid: ISO code, US state, cloud region, world, or gCO2e/kWh
    #[arg(long, value_name = "G", allow_hyphen_values = true)]
    grid: Option<String>,
}

const EXAMPLES: &str = "\
Options override published or assumed values. Examples:
  wattune baseline --list                                             the published runs
  wattune baseline gpt-3
  wattune baseline gpt-3 --device nvidia-h100-sxm5-80gb --grid FR      the same work elsewhere
  wattune baseline --params 7B --tokens 1T --device nvidia-a100-sxm4-80gb --pue 1.1 --grid US
  wattune baseline --params 7B --tokens 2M --method lora --device nvidia-a10
  wattune baseline --hours 82432 --power 400 --pue 1.1 --grid 385";

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum MethodName {
    Pretraining,
    FullFineTuning,
    Lora,
}

impl From<MethodName> for Method {
    fn from(name: MethodName) -> Method {
        match name {
            MethodName::Pretraining => Method::Pretraining,
            MethodName::FullFineTuning => Method::FullFineTuning,
            MethodName::Lora => Method::Lora,
        }
    }
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    if arguments.list {
        return list(common);
    }
    let baseline = baseline_cost(&request(arguments)?)?;
    if common.json {
        out_json(&baseline)
    } else {
        out(&page(&baseline))
    }
}

/// The published runs, each with its size and device hours where they are printed.
fn list(common: Common) -> Result<ExitCode> {
    if common.json {
        let names: Vec<&str> = published_runs()
            .iter()
            .map(|run| run.name.as_str())
            .collect();
        return out_json(&names);
    }
    let mut table = Table::new(&["name", "parameters", "tokens", "hardware"]);
    for run in published_runs() {
        table.row([
            run.name.clone(),
            format::or_unknown(run.parameters, |count| significant(count.0)),
            format::or_unknown(run.tokens, |count| significant(count.0)),
            run.hardware.clone(),
        ]);
    }
    out(&table.text(0))
}

fn request(arguments: &Arguments) -> Result<BaselineRequest> {
    let count = quantity::<Count>("--count", arguments.count.as_deref())?;
    if let Some(count) = count.filter(|count| count.0.fract() != 0.0) {
        return Err(refused(
            "--count",
            &count.0.to_string(),
            "a whole number of devices",
            "write `--count 8`",
        ));
    }
    let tera = quantity::<Count>("--achieved-tflops", arguments.achieved_tflops.as_deref())?;
    let hours = quantity::<Count>("--hours", arguments.hours.as_deref())?;
    Ok(BaselineRequest {
        name: arguments.name.clone(),
        parameters: quantity("--params", arguments.params.as_deref())?,
        tokens: quantity("--tokens", arguments.tokens.as_deref())?,
        flops: quantity::<Flops>("--flops", arguments.flops.as_deref())?,
        method: arguments.method.into(),
        device: arguments.device.clone(),
        count: count.map(|count| count.0 as u64),
        achieved: tera.map(|tera| tera.0 * 1e12),
        power: watts(arguments.power.as_deref())?,
        device_time: hours.map(|hours| Seconds(hours.0 * 3600.0)),
        pue: arguments.pue.as_deref().map(pue).transpose()?,
        grid: arguments.grid.clone(),
    })
}

fn refused(flag: &str, value: &str, rule: &str, hint: &str) -> Error {
    Error::new(Kind::Usage, format!("`{flag}` cannot be this"))
        .value(value)
        .rule(rule)
        .hint(hint)
}

/// Parses a quantity above zero.
fn quantity<T: FromStr<Err = ParseQuantityError> + PartialOrd + Default>(
    flag: &str,
    text: Option<&str>,
) -> Result<Option<T>> {
    let Some(text) = text else { return Ok(None) };
    let hint = format!("`wattune baseline --help` shows `{flag}` in examples");
    match text.parse::<T>() {
        Ok(value) if value > T::default() => Ok(Some(value)),
        Ok(_) => Err(refused(flag, text, "more than zero", &hint)),
        Err(error) => Err(refused(flag, text, &error.rule, &hint)),
    }
}

/// Parses watts, with or without the unit.
fn watts(text: Option<&str>) -> Result<Option<Watts>> {
    let with_unit = text.map(|text| {
        if text.trim().parse::<f64>().is_ok() {
            format!("{text} W")
        } else {
            text.to_string()
        }
    });
    quantity("--power", with_unit.as_deref())
}

fn pue(text: &str) -> Result<Pue> {
    let parsed = text.trim().parse().ok().and_then(Pue::new);
    parsed.ok_or_else(|| {
        refused(
            "--pue",
            text,
            "a number of one or more",
            "write `--pue 1.1`; 1 is no overhead",
        )
    })
}

fn page(baseline: &BaselineCost) -> String {
    let estimate = &baseline.estimate;
    let title = match &baseline.name {
        Some(name) => format!("Cost of training {name}"),
        None => "Cost of this training".to_string(),
    };
    let mut rows = vec![
        ("energy", shown(estimate.energy, energy)),
        ("emissions", shown(estimate.carbon, format::carbon)),
    ];
    if let Some(time) = estimate.device_time {
        rows.push(("device hours", shown(time, |time| hours(time.0 / 3600.0))));
    }
    if let (Some(wall), Some(count)) = (estimate.wall, estimate.count) {
        let wall = shown(wall, |wall| format!("{} h", significant(wall.0 / 3600.0)));
        let devices = format::counted(count, "device");
        rows.push(("wall time", format!("{wall} on {devices}")));
    }
    if let Some(power) = estimate.power_w {
        let watts = |power: Watts| format!("{} W", significant(power.0));
        rows.push(("device power", shown(power, watts)));
    }
    rows.push(("PUE", shown(estimate.pue, |pue| significant(pue.value()))));
    rows.extend(estimate.device.clone().map(|device| ("device", device)));
    rows.extend(
        estimate
            .flops
            .map(|flops| ("work", format!("{:.3e} FLOPs", flops.0))),
    );
    rows.extend(baseline.published.iter().flat_map(published));
    let assumptions: String = estimate
        .assumptions
        .iter()
        .map(|text| bullet(text))
        .collect();
    format!(
        "{title}\n\n{}\nAssumptions:\n{assumptions}",
        Table::pairs(["", ""], rows).text(2)
    )
}

/// Figures as published.
fn published(printed: &PublishedFigures) -> Vec<(&'static str, String)> {
    let scope = |has_pue| match has_pue {
        Some(true) => "with PUE",
        Some(false) => "without PUE",
        None => "PUE not stated",
    };
    let energy = printed.energy_mwh.map(|mwh| {
        (
            "published",
            format!("{mwh} MWh, {}", scope(printed.energy_has_pue)),
        )
    });
    let emissions = printed.tco2e.map(|tonnes| {
        (
            "published",
            format!("{tonnes} tCO2e, {}", scope(printed.tco2e_has_pue)),
        )
    });
    let remark = printed.remark.clone().map(|remark| ("note", remark));
    energy.into_iter().chain(emissions).chain(remark).collect()
}

/// "3.4 MWh", with its range where it is not exact.
fn shown<T: Copy>(interval: Interval<T>, form: impl Fn(T) -> String) -> String {
    form(interval.central) + &format::range_suffix(&interval, &form)
}

/// Large counts are grouped by thousands.
fn hours(hours: f64) -> String {
    if hours < 10_000.0 {
        significant(hours)
    } else {
        format::count(hours.round() as u64)
    }
}

/// In units of electricity bills.
fn energy(energy: Joules) -> String {
    let (unit, name) = match energy.0 {
        joules if joules >= 1e3 * JOULES_PER_KWH => (1e3 * JOULES_PER_KWH, "MWh"),
        joules if joules >= JOULES_PER_KWH => (JOULES_PER_KWH, "kWh"),
        _ => (JOULES_PER_KWH / 1e3, "Wh"),
    };
    format!("{} {name}", significant(energy.0 / unit))
}

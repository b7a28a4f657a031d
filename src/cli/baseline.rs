//! `wattune baseline`: what training a model cost or would cost.

use std::fmt::Write;
use std::process::ExitCode;
use std::str::FromStr;

use super::{Common, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::report::show;
use crate::run::{BaselineCost, BaselineRequest, Interval, Method, baseline_cost};
use crate::units::{
    Count, Flops, GramsCo2e, JOULES_PER_KWH, Joules, ParseQuantityError, Pue, Seconds, Watts,
    significant,
};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// A published training run, such as gpt-3 or bloom-176b
    #[arg(conflicts_with_all = ["params", "tokens", "flops", "method"])]
    name: Option<String>,
    /// Parameters that compute on a token (a mixture of experts: the active ones): 1.75e11, 175B, 7M
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "flops",
        allow_hyphen_values = true
    )]
    params: Option<String>,
    /// Training tokens, over all epochs: 1.4T; pretraining without them takes 20 a parameter
    #[arg(
        long,
        value_name = "D",
        requires = "params",
        allow_hyphen_values = true
    )]
    tokens: Option<String>,
    /// FLOPs, in place of parameters and tokens
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    flops: Option<String>,
    /// How it is trained: 6ND, for lora 4ND
    #[arg(long, value_enum, default_value = "pretraining")]
    method: MethodName,
    /// Profile of one device (`wattune devices`), a profile file, or tpu-v2, tpu-v3, tpu-v4, nvidia-h800-sxm
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Devices at once: for the wall time
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    count: Option<String>,
    /// TFLOP/s that one device reaches, averaged over the training
    #[arg(
        long,
        value_name = "T",
        allow_hyphen_values = true,
        conflicts_with = "hours"
    )]
    achieved_tflops: Option<String>,
    /// Watts of one device, averaged over the training
    #[arg(long, value_name = "W", allow_hyphen_values = true)]
    power: Option<String>,
    /// Device hours, added up over all devices
    #[arg(long, value_name = "DEVICE_HOURS", allow_hyphen_values = true)]
    hours: Option<String>,
    /// The facility's energy over its machines'
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pue: Option<String>,
    /// ISO code, US state, cloud region, world, or gCO2e/kWh
    #[arg(long, value_name = "G", allow_hyphen_values = true)]
    grid: Option<String>,
}

const EXAMPLES: &str = "\
What is given replaces what was published or assumed. Examples:
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
    let baseline = baseline_cost(&request(arguments)?)?;
    if common.json {
        out_json(&baseline)
    } else {
        out(&page(&baseline))
    }
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

/// A quantity of more than zero.
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

/// Watts, with the unit or without.
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

/// The estimate for people.
fn page(baseline: &BaselineCost) -> String {
    let estimate = &baseline.estimate;
    let mut text = match &baseline.name {
        Some(name) => format!("What training {name} cost\n\n"),
        None => "What this training would cost\n\n".to_string(),
    };
    let mut row = |label: &str, value: String| {
        let _ = writeln!(text, "  {label:<14} {value}");
    };
    row("energy", shown(estimate.energy, energy));
    row(
        "carbon",
        shown(estimate.carbon, |carbon: GramsCo2e| carbon.to_string()),
    );
    if let Some(time) = estimate.device_time {
        row("device hours", shown(time, |time| hours(time.0 / 3600.0)));
    }
    if let (Some(wall), Some(count)) = (estimate.wall, estimate.count) {
        row(
            "wall time",
            format!(
                "{} on {count} device{}",
                shown(wall, |wall| format!("{} h", significant(wall.0 / 3600.0))),
                if count == 1 { "" } else { "s" }
            ),
        );
    }
    estimate.power_w.iter().for_each(|power| {
        row(
            "device power",
            shown(*power, |power| format!("{} W", significant(power.0))),
        )
    });
    row("PUE", shown(estimate.pue, |pue| significant(pue.value())));
    estimate
        .device
        .iter()
        .for_each(|device| row("device", device.clone()));
    estimate
        .flops
        .iter()
        .for_each(|flops| row("work", format!("{:.3e} FLOPs", flops.0)));
    if let Some(printed) = &baseline.published {
        let scope = |has| match has {
            Some(true) => "with PUE",
            Some(false) => "without PUE",
            None => "PUE not stated",
        };
        printed.energy_mwh.iter().for_each(|mwh| {
            row(
                "published",
                format!("{mwh} MWh, {}", scope(printed.energy_has_pue)),
            )
        });
        printed.tco2e.iter().for_each(|tonnes| {
            row(
                "published",
                format!("{tonnes} tCO2e, {}", scope(printed.tco2e_has_pue)),
            )
        });
        printed
            .remark
            .iter()
            .for_each(|remark| row("note", remark.clone()));
    }
    text += "\nTaken for granted:\n";
    estimate
        .assumptions
        .iter()
        .for_each(|assumption| text += &format!("  {assumption}\n"));
    text
}

/// "3.4 MWh", with the ends where it is not exact.
fn shown<T: Copy + PartialEq>(interval: Interval<T>, show: impl Fn(T) -> String) -> String {
    let Interval { low, central, high } = interval;
    if low == high {
        return show(central);
    }
    format!(
        "{}, between {} and {}",
        show(central),
        show(low),
        show(high)
    )
}

/// Thousands in groups: nobody reads seven digits in a row.
fn hours(hours: f64) -> String {
    if hours < 10_000.0 {
        significant(hours)
    } else {
        show::count(hours.round() as u64)
    }
}

/// In the unit electricity is sold in.
fn energy(energy: Joules) -> String {
    let (unit, name) = match energy.0 {
        joules if joules >= 1e3 * JOULES_PER_KWH => (1e3 * JOULES_PER_KWH, "MWh"),
        joules if joules >= JOULES_PER_KWH => (JOULES_PER_KWH, "kWh"),
        _ => (JOULES_PER_KWH / 1e3, "Wh"),
    };
    format!("{} {name}", significant(energy.0 / unit))
}

//! `wattune meter`: the meters beside another program.

use std::io::BufRead;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::{Common, note, out, out_line};
use crate::error::{Error, Kind, Result};
use crate::report::format;
use crate::run::{
    DeviceChoice, DeviceRef, GridRef, MeterKind, MeterLine, MeterRequest, Metering, Phase,
};
use crate::units::{GramsCo2e, Joules, Pue};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Directory for ledger.jsonl and emissions.csv; neither may exist there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A limit of energy ("5 Wh"), carbon ("2 g") or time ("10 min"); several may be given
    #[arg(long, value_name = "LIMIT", conflicts_with = "command")]
    budget: Vec<String>,
    /// Electricity grid: ISO code, US state, cloud region, "world" or gCO2e/kWh
    #[arg(long, default_value = "world")]
    grid: GridRef,
    /// The facility's energy over the machine's own
    #[arg(long, default_value = "1.0", value_parser = pue)]
    pue: Pue,
    /// The device whose counter is read: cpu, or cuda:N with the processor beside it
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Device profile, for rated power
    #[arg(long, default_value = "auto")]
    profile: DeviceRef,
    /// measured or timed [default: measured where the counters can be read, else timed]
    #[arg(long)]
    meter: Option<MeterKind>,
    /// A command to run and meter
    #[arg(last = true)]
    command: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  wattune meter -- python train.py                 the energy of a command
  wattune meter --json --out run --budget \"5 Wh\"   windows: each line `PHASE [STEP]` on standard input ends one

PHASE is load, train, eval or save. With --json each window is one line of JSON as it ends. `stop` names the limit that another
step, with the largest evaluation and save seen so far after it, would pass.";

fn pue(text: &str) -> std::result::Result<Pue, String> {
    let number = text.parse().ok().and_then(Pue::new);
    number.ok_or_else(|| "a number of at least 1".to_string())
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let request = MeterRequest {
        out: arguments.out.clone(),
        device: arguments.device,
        profile: arguments.profile.clone(),
        meter: arguments.meter,
        grid: arguments.grid.clone(),
        pue: arguments.pue,
        budgets: arguments.budget.clone(),
    };
    let metering = Metering::open(&request)?;
    if let (MeterKind::Timed, Some(why)) = (metering.kind(), metering.not_measured())
        && !common.quiet
    {
        note(&format!("Energy is rated power x wall time: {why}"));
    }
    if arguments.command.is_empty() {
        windows(metering, common)
    } else {
        command(metering, &arguments.command, common)
    }
}

/// Ends a window at each line of standard input.
fn windows(mut metering: Metering, common: Common) -> Result<ExitCode> {
    if common.json {
        out_line(&json!({ "meter": metering.kind(), "why": metering.not_measured() }))?;
    }
    for line in std::io::stdin().lock().lines() {
        let line =
            line.map_err(|e| Error::new(Kind::Io, format!("cannot read standard input: {e}")))?;
        let (phase, step) = boundary(&line)?;
        let ended = metering.end_window(phase, step)?;
        if common.json {
            out_line(&ended)?;
        } else {
            out(&shown(&ended))?;
        }
    }
    finish(metering, common)
}

/// `PHASE [STEP]`.
fn boundary(line: &str) -> Result<(Phase, u64)> {
    let mut words = line.split_whitespace();
    let phase = words.next().and_then(|word| {
        let named = |phase: &&Phase| phase.as_str() == word && **phase != Phase::Lost;
        Phase::ALL.iter().find(named)
    });
    let step = words.next().map_or(Some(0), |word| word.parse().ok());
    match (phase, step, words.next()) {
        (Some(phase), Some(step), None) => Ok((*phase, step)),
        _ => Err(
            Error::new(Kind::Usage, "a line of standard input ends no window")
                .value(line.to_string())
                .rule("load, train, eval or save, and the number of the step")
                .hint("write `train 7`"),
        ),
    }
}

fn shown(line: &MeterLine) -> String {
    let budget = line.budget_spent.map_or(String::new(), |part| {
        format!(", {:.0} % of the budget", 100.0 * part)
    });
    let stop = line.stop.map_or(String::new(), |limit| {
        format!("; another step would pass the {limit} budget")
    });
    format!(
        "{} {}: {} in {}; {} so far{budget}{stop}",
        line.phase.as_str(),
        line.step,
        Joules(line.energy_j),
        line.wall_s.spoken(),
        Joules(line.total_j)
    )
}

/// Runs a command as one window; its exit status is passed on.
fn command(mut metering: Metering, command: &[String], common: Common) -> Result<ExitCode> {
    let status = std::process::Command::new(&command[0])
        .args(&command[1..])
        .status();
    let status = status.map_err(|e| {
        Error::new(Kind::Usage, format!("cannot run the command: {e}"))
            .value(command.join(" "))
            .hint("write the command after `--`: `wattune meter -- python train.py`")
    })?;
    let line = metering.end_window(Phase::Train, 0)?;
    if common.json {
        out_line(&line)?;
    } else {
        note(&format!(
            "{} ({}) in {}: {} {}",
            command[0],
            status,
            line.wall_s.spoken(),
            format::energy(Joules(line.energy_j)),
            format::carbon(GramsCo2e(line.gco2e)),
        ));
    }
    finish(metering, common)?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}

fn finish(metering: Metering, common: Common) -> Result<ExitCode> {
    let folder = metering.finish()?;
    if let Some(folder) = folder.filter(|_| !common.quiet) {
        note(&format!(
            "Wrote ledger.jsonl and emissions.csv to {}",
            folder.display()
        ));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_phase_and_step() {
        assert_eq!(boundary("train 7").unwrap(), (Phase::Train, 7));
        assert_eq!(boundary(" save ").unwrap(), (Phase::Save, 0));
        for bad in ["", "lost 1", "train x", "train 1 2", "step"] {
            assert!(boundary(bad).is_err(), "{bad}");
        }
    }
}

//! `wattune devices`: profiles, and what can be measured here.

use std::fmt::Write;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::{Common, out, out_json};
use crate::error::Result;
use crate::run::{Profile, SensorState as State, sensor};

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {}

const EXAMPLES: &str = "\
Examples:
  wattune devices                          which profile this machine is, what can be measured, every profile
  wattune devices --json                   the same with every figure and its source
  wattune plan recipe.toml --set energy.device=nvidia-t4       what the run would cost elsewhere

A container that sees its host's counters elsewhere: WATTUNE_POWERCAP=/host/sys/class/powercap wattune devices

`NAME@4` is four cores of a processor. For a machine without a profile: `wattune calibrate`.";

pub(super) fn run(_: &Arguments, common: Common) -> Result<ExitCode> {
    let here = Profile::detect();
    let sensors = sensor::probe();
    if common.json {
        let sensors: Vec<Value> = sensors
            .iter()
            .map(|found| match &found.state {
                State::Available => {
                    json!({ "name": found.name, "available": true, "covers": found.covers, "left_out": found.left_out })
                }
                State::Absent(absent) => {
                    json!({ "name": found.name, "available": false, "reason": absent.reason, "remedy": absent.remedy })
                }
            })
            .collect();
        return out_json(&json!({ "here": here, "profiles": Profile::all(), "sensors": sensors }));
    }
    let mut text = format!("This machine counts as {} ({}).\n", here.name, here.title);
    here.note
        .iter()
        .for_each(|note| text += &format!("  {note}\n"));
    text += "\nWhat can be measured here:\n";
    for found in &sensors {
        let _ = match &found.state {
            State::Available => {
                let left_out: String = found
                    .left_out
                    .iter()
                    .map(|zone| format!("\n         without {zone}"))
                    .collect();
                writeln!(text, "  {:<6} yes: {}{left_out}", found.name, found.covers)
            }
            State::Absent(absent) => writeln!(
                text,
                "  {:<6} no: {}\n         {}",
                found.name, absent.reason, absent.remedy
            ),
        };
    }
    text += "\nProfiles (write one as `device` in [energy]; ~ before a power: assumed, or not read at its source; all sources: --json):\n";
    for profile in Profile::all() {
        let mark = |field: &str| {
            if profile
                .sources
                .get(field)
                .is_some_and(|source| source.verified)
            {
                ""
            } else {
                "~"
            }
        };
        let (idle, load) = (mark("idle"), mark("load"));
        let _ = writeln!(
            text,
            "  {:<28} {} · idle {idle}{} · load {load}{}",
            profile.name, profile.title, profile.idle_w, profile.load_w
        );
    }
    out(&text)
}

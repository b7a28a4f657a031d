//! `wattune devices`: device profiles and hardware counters.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::{Common, out, out_json};
use crate::error::Result;
use crate::report::text::{Table, paragraph};
use crate::run::sensor::{self, Availability};
use crate::run::{Profile, SensorState as State};
use crate::units::Watts;

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {}

const EXAMPLES: &str = "\
Examples:
  wattune devices                          the detected device, hardware counters, all profiles
  wattune devices --json                   the same with all figures and sources
  wattune plan recipe.toml --set energy.device=nvidia-t4       cost of the run elsewhere

A container with its host's counters mounted elsewhere: WATTUNE_POWERCAP=/host/sys/class/powercap wattune devices

`NAME@4` is four cores of a processor. To create a profile: `wattune calibrate`.";

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
    out(&page(&here, &sensors))
}

fn page(here: &Profile, sensors: &[Availability]) -> String {
    let mut text = format!("Detected device: {} ({})\n", here.name, here.title);
    text.extend(here.note.iter().map(|note| paragraph(note, 2)));
    let counters = counters_table(sensors);
    text += &format!("\nHardware counters:\n{}", counters.text(2));
    let mut profiles = Table::new(&["profile", "device", "idle", "load"]);
    for profile in Profile::all() {
        let power = |field: &str, watts: Watts| {
            let verified = profile
                .sources
                .get(field)
                .is_some_and(|source| source.verified);
            format!("{}{watts}", if verified { "" } else { "~" })
        };
        profiles.row([
            profile.name.clone(),
            profile.title.clone(),
            power("idle", profile.idle_w),
            power("load", profile.load_w),
        ]);
    }
    text += &format!(
        "\nProfiles, for `device` in [energy] (~: assumed, or not read in its source; sources: --json):\n\n{}",
        profiles.text(2)
    );
    text
}

fn counters_table(sensors: &[Availability]) -> Table {
    let mut counters = Table::new(&["", "", ""]);
    for sensor in sensors {
        let (available, mut lines) = match &sensor.state {
            State::Available => ("yes", vec![sensor.covers.clone()]),
            State::Absent(absent) => ("no", vec![absent.reason.clone(), absent.remedy.clone()]),
        };
        lines.extend(sensor.left_out.iter().map(|zone| format!("without {zone}")));
        for (index, line) in lines.into_iter().enumerate() {
            let [name, available] = if index == 0 {
                [sensor.name.as_str(), available]
            } else {
                [""; 2]
            };
            counters.row([name.to_string(), available.to_string(), line]);
        }
    }
    counters
}

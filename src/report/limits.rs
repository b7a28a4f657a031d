//! What a report's numbers rest on, and what they cannot say.
//!
//! Owns the caveats and their published sources. Takes a report, returns sentences: only those that hold for the meters and
//! baselines it has. Knows nothing of layout.

use super::page::name;
use super::show;
use super::types::{Meter, Report};
use crate::energy::interval::{MODEL_FACTOR, TIMED_FACTOR};

/// Each factor with its value, year and source, then each baseline's source and assumptions.
pub fn assumptions(report: &Report) -> Vec<String> {
    let carbon = &report.carbon;
    let grid_source = carbon.source.as_deref().unwrap_or("source not known");
    let licence = carbon
        .licence
        .as_ref()
        .map_or_else(String::new, |licence| format!(" ({licence})"));
    let mut found = vec![match &report.energy.profile_factor {
        Some(factor) => format!(
            "energy coefficients: device profile `{}`, its counted joules times {}: {}",
            report.energy.device,
            show::number(factor.value),
            factor.source
        ),
        None => format!(
            "energy coefficients: device profile `{}`",
            report.energy.device
        ),
    }];
    found.extend(report.energy.factors.iter().map(|factor| {
        let doubt = if factor.verified {
            ""
        } else {
            "; not verified"
        };
        format!(
            "{}: {}. Source: {}{doubt}",
            factor.name, factor.value, factor.source
        )
    }));
    found.extend([
        format!(
            "grid `{}`: {} gCO2e/kWh, {grid_source}{licence}",
            carbon.grid,
            show::number(carbon.gco2e_per_kwh.0)
        ),
        format!(
            "facility overhead: PUE {}, from the recipe",
            show::number(carbon.pue.value())
        ),
    ]);
    found.extend(carbon.embodied_source.iter().map(|source| {
        format!("the device's manufacture: {source}; in use day and night for that long, the machine around it left out")
    }));
    found.extend(interval(report));
    for baseline in &report.baselines {
        let name = name(baseline);
        found.push(format!("{name}: {}", baseline.source));
        found.extend(
            baseline
                .assumptions
                .iter()
                .map(|assumption| format!("{name}: {assumption}")),
        );
    }
    found
}

/// How the bounds were come by.
fn interval(report: &Report) -> Option<String> {
    report.energy.low_j?;
    Some(match report.energy.meter {
        Meter::Counted => format!(
            "bounds: the counted energy divided and multiplied by {MODEL_FACTOR}, the largest mean error published for models from rated \
             power (arXiv:2506.14551); two counted energies share the error, so their ratio is more certain than either"
        ),
        Meter::Timed => format!(
            "bounds: the timed energy divided and multiplied by {TIMED_FACTOR}, the largest error found against wall meters \
             (arXiv:2509.22092)"
        ),
        Meter::Measured => "bounds: as given with the counters' reading".to_string(),
    })
}

/// What to keep in mind, for the meters that the report shows.
pub fn limits(report: &Report) -> Vec<String> {
    let meters = &report.energy.meters;
    let counted = "Counted energy is a model. Published models of this kind, calibrated on FLOPs, miss a node's meter by 11 % on \
                   average, those made from a device's rated power by 27 to 37 % (arXiv:2506.14551).";
    let measured = "A hardware counter sees every program on the device, and not the power supply, fans or disks: in one \
                    published pair the processor's counter read 60 % of the wall plug (CodeCarbon's load profiles, Threadripper \
                    1950X).";
    let timed = "Power times wall time, without counters, has been found off by up to 40 % against wall meters \
                 (arXiv:2509.22092).";
    let carbon = "Emissions go by the grid's yearly average intensity, not by the hour of the run nor by the marginal plant.";
    let host = "The device's energy is not its machine's: processor, memory and fans around it are in no counted or timed figure here, \
                nor in what other ways of training take.";
    let scope = "Not in the energy: earlier attempts, downloads, the screen, and the use of the model afterwards.";
    let shown = [
        (true, counted),
        (meters.measured_j.is_some(), measured),
        (meters.timed_j.is_some(), timed),
        (report.energy.host_left_out.is_some(), host),
        (true, carbon),
        (true, scope),
    ];
    shown
        .into_iter()
        .filter(|(holds, _)| *holds)
        .map(|(_, text)| text.to_string())
        .collect()
}

//! What a run spent, as blocks of the report: energy by component, emissions, money, memory.
//!
//! Plan and report share them. Knows nothing of how a block is shown.

use std::collections::BTreeMap;

use super::prepare::Prepared;
use super::reconcile::{profile_factor, reconciliation};
use crate::energy::carbon::{LIFE_YEARS, embodied_share};
use crate::energy::grid::dataset_sha256;
use crate::energy::ledger::Totals;
use crate::energy::profile::DeviceKind;
use crate::energy::traffic::{DRAM, Traffic};
use crate::energy::{Account, EnergyBreakdown, Interval, MeterKind, Phase, Profile, Spent};
use crate::forecast::{emissions, machine_over_profile};
use crate::model::MemoryForecast;
use crate::report::energy::{CountedParts, Energy, Factor, HostLeftOut, Meters, ThisMachine};
use crate::report::types::{self, Amounts, Memory};
use crate::units::{Bytes, Flops, GramsCo2e, Joules, Per, Seconds};

/// Range of `energy` on this meter. A counter reading is exact; the limitations name what it does not include.
pub(super) fn interval(kind: MeterKind, energy: Joules) -> Interval<Joules> {
    match kind {
        MeterKind::Counted => Interval::counted(energy),
        MeterKind::Timed => Interval::timed(energy),
        MeterKind::Measured => Interval::exact(energy),
    }
}

/// The run's energy by phase, meter and component.
pub(super) fn energy_block(prepared: &Prepared, account: &Account, steps: u64) -> Energy {
    let kind = account.kind();
    let totals = account.totals();
    let total = account.spent().energy.joules();
    let present = |totals: &Totals| totals.entries > 0;
    let by_phase: BTreeMap<Phase, Joules> = account
        .by_phase()
        .filter(|(_, totals)| present(totals))
        .map(|(p, totals)| (p, totals.on(kind).joules()))
        .collect();
    let absent = account.meters().absent();
    Energy {
        meter: kind,
        total: interval(kind, total),
        by_phase,
        meters: Meters {
            counted_j: totals.energy_j.counted.joules(),
            measured_j: totals.energy_j.measured.map(|energy| energy.joules()),
            timed_j: Some(totals.energy_j.timed.joules()),
        },
        measured_absent: absent.cloned(),
        counted_parts: counted_parts(
            &prepared.profile,
            &totals.breakdown,
            &totals.bytes,
            totals.without_breakdown.joules(),
        ),
        profile_factor: profile_factor(&prepared.profile),
        reconciliation: reconciliation(account),
        flops: totals.flops,
        bytes: totals.bytes.get(DRAM).copied().unwrap_or_default(),
        bytes_by_level: totals.bytes.clone(),
        device: prepared.profile.name.clone(),
        this_machine: this_machine(prepared, steps, totals.energy_j.counted.joules()),
        factors: factors(&prepared.profile),
        host_left_out: host_left_out(&prepared.profile, kind),
    }
}

/// Components of the counted energy, data movement by memory level; `None` where no entry has them.
pub(super) fn counted_parts(
    profile: &Profile,
    parts: &EnergyBreakdown,
    bytes: &Traffic,
    lost: Joules,
) -> Option<CountedParts> {
    let known = parts.arithmetic_j + parts.movement_j + parts.idle_j;
    (known > Joules::ZERO).then(|| CountedParts {
        arithmetic_j: parts.arithmetic_j,
        movement_j: parts.movement_j,
        idle_j: parts.idle_j,
        lost_j: lost,
        movement_by_level_j: profile.movement_by_level(bytes),
        levels_left_out: profile.unknown_levels(bytes),
        movement_without_reuse_j: Some(profile.dram_energy(parts.unreused_bytes)),
    })
}

/// The profile's coefficients with their sources.
pub(super) fn factors(profile: &Profile) -> Vec<Factor> {
    let values = coefficients(profile).into_iter();
    let factor = |(field, name, value): (&str, &str, String)| {
        let known = profile.sources.get(field);
        let source = known.map_or_else(|| "source not known".to_string(), written);
        Factor {
            name: name.to_string(),
            value,
            source,
            verified: known.is_some_and(|source| source.verified),
        }
    };
    let host = (profile.kind == DeviceKind::Gpu)
        .then(|| ("host", "the machine around the device", host(profile)));
    values.chain(host).map(factor).collect()
}

/// The profile's fields with their names and values.
fn coefficients(profile: &Profile) -> [(&'static str, &'static str, String); 8] {
    let each = |of: &BTreeMap<crate::work::Precision, f64>, written: fn(f64) -> String| {
        let each = of
            .iter()
            .map(|(precision, value)| format!("{} in {}", written(*value), precision.as_str()));
        each.collect::<Vec<_>>().join(", ")
    };
    let caches = profile.caches.iter().map(|level| match level.pj_per_byte {
        Some(pj) => format!("{} {} at {pj} pJ a byte", level.name, level.bytes),
        None => format!("{} {}", level.name, level.bytes),
    });
    let percent = |share: f64| format!("{} %", round(share * 100.0));
    let achievable = format!(
        "{} of the peak, {} of the bandwidth",
        percent(profile.achievable_flops),
        percent(profile.achievable_bandwidth)
    );
    let peak = each(&profile.peak_flops, |rate| format!("{}/s", Flops(rate)));
    let operation = each(&profile.pj_per_flop, |pj| format!("{} pJ", round(pj)));
    let bandwidth = format!("{} GB/s", round(profile.bandwidth * 1e-9));
    let dram = format!("{} pJ a byte", round(profile.streamed_pj_per_byte()));
    [
        ("idle", "idle power", profile.idle_w.to_string()),
        ("load", "power at full load", profile.load_w.to_string()),
        ("peak_flops", "peak rate", peak),
        ("bandwidth", "memory bandwidth", bandwidth),
        ("achievable", "what tuned code reaches", achievable),
        ("pj_per_flop", "energy of an operation", operation),
        ("caches", "caches", caches.collect::<Vec<_>>().join(", ")),
        ("dram", "energy of a streamed byte", dram),
    ]
}

/// The machine around an accelerator, where a figure of this meter is the device's alone.
pub(super) fn host_left_out(profile: &Profile, kind: MeterKind) -> Option<HostLeftOut> {
    let alone = profile.kind == DeviceKind::Gpu && kind != MeterKind::Measured;
    alone.then_some(HostLeftOut {
        share: profile.host_share,
    })
}

/// The computing device's figure for `counted` joules of a run of `steps` steps that are counted on another device's profile.
pub(super) fn this_machine(
    prepared: &Prepared,
    steps: u64,
    counted: Joules,
) -> Option<ThisMachine> {
    let ratio = machine_over_profile(&prepared.subject(), steps)?;
    Some(ThisMachine {
        device: prepared.machine.as_ref()?.name.clone(),
        counted_j: counted * ratio,
    })
}

/// What the counted figures lack of an accelerator's machine.
fn host(profile: &Profile) -> String {
    let known = profile.host_share.zip(profile.whole_machine());
    known.map_or_else(
        || "not in the counted figures, its share is not known".to_string(),
        |(share, times)| {
            let percent = round(share * 100.0);
            format!(
                "not in the counted figures: {percent} % of a machine's power, with it they are {} times as much",
                round(times)
            )
        },
    )
}

/// "Title (2024; MIT)".
fn written(source: &crate::energy::profile::Source) -> String {
    match source.year {
        0 => source.title.clone(),
        year => format!("{} ({year}; {})", source.title, source.licence),
    }
}

fn round(value: f64) -> String {
    crate::units::significant(value)
}

/// The emissions of `energy` and the device's share of its manufacture over `time`.
pub(super) fn carbon_block(
    prepared: &Prepared,
    energy: Interval<Joules>,
    time: Seconds,
) -> types::Carbon {
    let (grid, rates) = (&prepared.grid, prepared.budget.rates());
    let manufacture = prepared.profile.embodied;
    let source = prepared
        .profile
        .sources
        .get("embodied")
        .map_or_else(|| "source not known".to_string(), written);
    types::Carbon {
        emissions: emissions(energy, grid, rates),
        embodied_gco2e: manufacture.map(|grams| embodied_share(grams, time)),
        embodied_source: manufacture.map(|grams| {
            format!(
                "{grams} for making {}, spread over {LIFE_YEARS} years: {source}",
                prepared.profile.title
            )
        }),
        grid: grid.code.clone(),
        gco2e_per_kwh: rates.grid,
        pue: rates.pue,
        year: grid.year,
        source: Some(grid.source.clone()),
        place: Some(grid.name.clone()),
        basis: Some(grid.basis.clone()),
        licence: Some(grid.licence.clone()),
        dataset_sha256: grid.year.map(|_| dataset_sha256()),
    }
}

/// The `budget` block without overshoot: limits, and the amounts spent with their bounds.
pub(super) fn budget_block(
    prepared: &Prepared,
    spent: &Spent,
    energy: Interval<Joules>,
) -> types::Budget {
    let rates = prepared.budget.rates();
    let price = rates.price.as_ref();
    let cost = |energy: Joules| price.map(|price| price.cost(rates.pue * energy, spent.time));
    // A price of time does not depend on energy.
    let by_energy = price.is_none_or(|price| price.per == Per::KilowattHour);
    let grams = emissions(energy, &prepared.grid, rates);
    let bound = |joules: Joules, carbon: GramsCo2e| {
        let joules = Some(joules).filter(|end| *end != energy.central);
        Amounts {
            energy: joules,
            carbon: Some(carbon).filter(|end| *end != grams.central),
            cost: joules.filter(|_| by_energy).and_then(cost),
            ..Amounts::default()
        }
    };
    types::Budget {
        limits: prepared.budget.limits().clone(),
        spent: Amounts {
            energy: Some(energy.central),
            carbon: Some(grams.central),
            flops: Some(Flops(spent.flops as f64)),
            time: Some(spent.time),
            cost: cost(energy.central),
        },
        spent_low: bound(energy.low, grams.low),
        spent_high: bound(energy.high, grams.high),
        overshoot_j: None,
        margin_j: None,
    }
}

/// The memory forecast; `available` is the free memory in a plan.
pub(super) fn memory_block(memory: &MemoryForecast, available: Option<Bytes>) -> Memory {
    Memory {
        peak_bytes: memory.peak(),
        weights: memory.weights,
        trained: memory.trained,
        activations: memory.activations,
        temporaries: memory.temporaries,
        program: memory.program,
        available_bytes: available,
    }
}

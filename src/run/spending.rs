//! What a run spent, as the report's blocks: energy and what it is made of, emissions, money, memory.
//!
//! Takes the account and the profile, returns blocks of `report.json`, each figure with its interval where a coefficient is uncertain.
//! Plan and report share them. Knows nothing of how a block is shown.

use std::collections::BTreeMap;

use super::prepare::Prepared;
use super::reconcile::{profile_factor, reconciliation};
use crate::energy::carbon::{LIFE_YEARS, dataset_sha256, embodied_share};
use crate::energy::ledger::Totals;
use crate::energy::profile::DeviceKind;
use crate::energy::traffic::{DRAM, Traffic};
use crate::energy::{Account, EnergyBreakdown, Interval, Limits, MeterKind, Phase, Profile, Spent};
use crate::forecast::emissions;
use crate::model::MemoryForecast;
use crate::report::memory::Memory;
use crate::report::parts::{CountedParts, Factor, HostLeftOut};
use crate::report::types::{self, Amounts};
use crate::units::{Bytes, Flops, Joules, Per, Seconds};

/// What `energy` on this meter may be. A counter is taken at its word; what it cannot see is said in words.
pub(super) fn interval(kind: MeterKind, energy: Joules) -> Interval<Joules> {
    match kind {
        MeterKind::Counted => Interval::counted(energy),
        MeterKind::Timed => Interval::timed(energy),
        MeterKind::Measured => Interval::exact(energy),
    }
}

/// The bounds that differ from the central figure.
pub(super) fn bounds<T: Copy + PartialEq>(of: Interval<T>) -> (Option<T>, Option<T>) {
    (
        Some(of.low).filter(|low| *low != of.central),
        Some(of.high).filter(|high| *high != of.central),
    )
}

/// The run's energy by phase, by meter and by what it is made of.
pub(super) fn energy_block(prepared: &Prepared, account: &Account) -> types::Energy {
    let (kind, totals) = (account.kind(), account.totals());
    let total = account.spent().energy.joules();
    let present = |totals: &Totals| totals.entries > 0;
    let by_phase: BTreeMap<Phase, Joules> = account
        .by_phase()
        .filter(|(_, totals)| present(totals))
        .map(|(p, totals)| (p, totals.on(kind).joules()))
        .collect();
    let (low_j, high_j) = bounds(interval(kind, total));
    let absent = account.meters().absent();
    types::Energy {
        meter: kind,
        total_j: total,
        low_j,
        high_j,
        by_phase,
        meters: types::Meters {
            counted_j: totals.energy_j.counted.joules(),
            measured_j: totals.energy_j.measured.map(|energy| energy.joules()),
            timed_j: Some(totals.energy_j.timed.joules()),
        },
        measured_absent: absent.cloned(),
        counted_parts: counted_parts(
            &prepared.profile,
            &totals.parts,
            &totals.bytes,
            totals.unparted.joules(),
        ),
        profile_factor: profile_factor(&prepared.profile),
        reconciliation: reconciliation(account),
        flops: totals.flops,
        bytes: totals.bytes.get(DRAM).copied().unwrap_or_default(),
        bytes_by_level: totals.bytes.clone(),
        device: prepared.profile.name.clone(),
        factors: factors(&prepared.profile),
        host_left_out: host_left_out(&prepared.profile, kind),
    }
}

/// `parts` as the report shows them, movement by the level that served the bytes; `None` where no entry knew its parts.
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
    let rows = [
        ("idle", "idle power", profile.idle_w.to_string()),
        ("load", "power at full load", profile.load_w.to_string()),
        (
            "peak_flops",
            "peak rate",
            each(&profile.peak_flops, |rate| format!("{}/s", Flops(rate))),
        ),
        (
            "bandwidth",
            "memory bandwidth",
            format!("{} GB/s", round(profile.bandwidth * 1e-9)),
        ),
        ("achievable", "what tuned code reaches", achievable),
        (
            "pj_per_flop",
            "energy of an operation",
            each(&profile.pj_per_flop, |pj| format!("{} pJ", round(pj))),
        ),
        ("caches", "caches", caches.collect::<Vec<_>>().join(", ")),
        (
            "dram",
            "energy of main memory",
            format!("{} pJ a byte", round(profile.dram_pj_per_byte)),
        ),
    ];
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
    rows.into_iter().chain(host).map(factor).collect()
}

/// The machine around an accelerator, where a figure of this meter is the device's alone.
pub(super) fn host_left_out(profile: &Profile, kind: MeterKind) -> Option<HostLeftOut> {
    let alone = profile.kind == DeviceKind::Gpu && kind != MeterKind::Measured;
    alone.then_some(HostLeftOut {
        share: profile.host_share,
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
    let gco2e = emissions(energy, grid, rates);
    let (low_gco2e, high_gco2e) = bounds(gco2e);
    let manufacture = prepared.profile.embodied;
    let source = prepared
        .profile
        .sources
        .get("embodied")
        .map_or_else(|| "source not known".to_string(), written);
    types::Carbon {
        gco2e: gco2e.central,
        low_gco2e,
        high_gco2e,
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

/// The `budget` block without an overshoot: limits, and what was spent with its bounds.
pub(super) fn budget_block(
    prepared: &Prepared,
    spent: &Spent,
    energy: Interval<Joules>,
) -> types::Budget {
    let rates = prepared.budget.rates();
    let by_energy = rates
        .price
        .as_ref()
        .is_none_or(|price| price.per == Per::KilowattHour);
    let cost = |energy: Joules| {
        rates
            .price
            .as_ref()
            .map(|price| price.of(rates.pue * energy, spent.time))
    };
    let carbon = carbon_block(prepared, energy, spent.time);
    let end = |energy_j: Option<Joules>, carbon_gco2e| Amounts {
        energy_j,
        carbon_gco2e,
        cost: energy_j.filter(|_| by_energy).and_then(cost),
        ..Amounts::default()
    };
    let (low, high) = bounds(energy);
    types::Budget {
        limits: amounts(prepared.budget.limits()),
        spent: Amounts {
            energy_j: Some(energy.central),
            carbon_gco2e: Some(carbon.gco2e),
            flops: Some(Flops(spent.flops as f64)),
            time_s: Some(spent.time),
            cost: cost(energy.central),
        },
        spent_low: end(low, carbon.low_gco2e),
        spent_high: end(high, carbon.high_gco2e),
        overshoot_j: None,
        margin_j: None,
    }
}

fn amounts(limits: &Limits) -> Amounts {
    Amounts {
        energy_j: limits.energy,
        carbon_gco2e: limits.carbon,
        flops: limits.flops,
        time_s: limits.time,
        cost: limits.cost.clone(),
    }
}

/// A memory forecast's block; `available` is what is free while it is only a forecast.
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

//! Tests of the ledger: sums, leases, crashes, damaged files.

use std::path::PathBuf;

use super::super::options::MeterKind;
use super::super::spent::Spent;
use super::*;
use crate::error::Kind;
use crate::units::Bytes;

fn energies(counted: u64, measured: Option<u64>, timed: u64) -> Energies {
    Energies {
        counted: MicroJoules(counted),
        measured: measured.map(MicroJoules),
        timed: MicroJoules(timed),
    }
}

fn entry(phase: Phase, step: u64, energy_j: Energies) -> Entry {
    Entry {
        phase,
        step,
        energy_j,
        flops: 100,
        bytes: Traffic::from([("dram".to_string(), Bytes(5))]),
        breakdown: None,
        wall_s: Seconds(0.5),
        t: now(),
        gap: None,
    }
}

fn append(ledger: &mut Ledger, phase: Phase, step: u64, energy_j: Energies) {
    ledger.append(&entry(phase, step, energy_j)).unwrap();
}

fn ledger_path() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.jsonl");
    (dir, path)
}

#[test]
fn phases_add_up_to_the_total_on_every_meter() {
    let (_dir, path) = ledger_path();
    let mut ledger = Ledger::create(&path, "run").unwrap();
    append(&mut ledger, Phase::Load, 0, energies(3, Some(4), 5));
    append(&mut ledger, Phase::Train, 1, energies(10, None, 20));
    append(&mut ledger, Phase::Train, 2, energies(10, Some(7), 20));
    let total = ledger.total();
    assert_eq!(total.energy_j, energies(23, Some(11), 45));
    for kind in [MeterKind::Counted, MeterKind::Measured, MeterKind::Timed] {
        let phases: MicroJoules = ledger.by_phase().map(|(_, totals)| totals.on(kind)).sum();
        assert_eq!(phases, total.on(kind));
    }
    // The unmeasured step counts its 10 counted microjoules on a measured budget.
    assert_eq!(total.on(MeterKind::Measured), MicroJoules(21));
    assert_eq!(
        (total.unmeasured, ledger.phase(Phase::Train).flops),
        (1, 200)
    );
    assert!(Ledger::create(&path, "run").is_err());
}

#[test]
fn gaps_are_summed_by_reason_and_survive_the_file() {
    let (_dir, path) = ledger_path();
    let mut ledger = Ledger::create(&path, "run").unwrap();
    append(&mut ledger, Phase::Train, 1, energies(10, Some(20), 5));
    for step in 2..4 {
        let gap = GapFill {
            reason: "rapl: reset".to_string(),
            meter: MeterKind::Counted,
            factor: 2.0,
            energy_j: MicroJoules(22),
        };
        let gapped = Entry {
            gap: Some(gap),
            ..entry(Phase::Train, step, energies(11, None, 5))
        };
        ledger.append(&gapped).unwrap();
    }
    let check = |ledger: &Ledger| {
        // 20 measured and twice 22 filled; the ratio is that of the measured entry alone.
        assert_eq!(ledger.total().on(MeterKind::Measured), MicroJoules(64));
        assert_eq!(ledger.phase(Phase::Train).ratio(), Some(2.0));
        assert_eq!(ledger.phase(Phase::Eval).ratio(), None);
        // 20 measured where the timed meter has 5.
        assert_eq!(ledger.total().power_ratio(), Some(4.0));
        let totals = GapTotals {
            meter: MeterKind::Counted,
            entries: 2,
            wall_s: Seconds(1.0),
            energy: MicroJoules(44),
        };
        let gaps: Vec<_> = ledger.gaps().collect();
        assert_eq!(gaps, [(Phase::Train, "rapl: reset", &totals)]);
    };
    check(&ledger);
    drop(ledger);
    check(&Ledger::resume(&path, "run").unwrap());
}

#[test]
fn a_crash_costs_the_remainder_of_the_lease_once() {
    let (_dir, path) = ledger_path();
    let mut ledger = Ledger::create(&path, "run").unwrap();
    let lease = Lease {
        steps: 4,
        energy_j: energies(40, None, 80),
        flops: 400,
        time_s: Seconds(2.0),
    };
    ledger.lease(lease, Seconds::ZERO).unwrap();
    append(&mut ledger, Phase::Train, 1, energies(10, None, 20));
    drop(ledger);
    // A power cut in the middle of the second entry.
    let mut torn = std::fs::read(&path).unwrap();
    torn.extend_from_slice(b"{\"phase\":\"train\",\"step\":2,\"ener");
    std::fs::write(&path, torn).unwrap();
    for _ in 0..2 {
        // One step of four is entered, three are lost: 30 counted, 60 timed, 300 FLOPs, 1.5 s; and
        // only once.
        let ledger = Ledger::resume(&path, "run").unwrap();
        assert_eq!(ledger.phase(Phase::Lost).energy_j, energies(30, None, 60));
        let spent = Spent {
            energy: MicroJoules(40),
            flops: 400,
            time: Seconds(2.0),
        };
        assert_eq!(ledger.total().spent(MeterKind::Counted), spent);
    }
}

#[test]
fn a_clean_close_loses_nothing() {
    let (_dir, path) = ledger_path();
    let mut ledger = Ledger::create(&path, "run").unwrap();
    let lease = Lease {
        steps: 9,
        energy_j: energies(90, Some(90), 90),
        flops: 9,
        time_s: Seconds(9.0),
    };
    ledger.lease(lease, Seconds::ZERO).unwrap();
    append(&mut ledger, Phase::Train, 1, energies(10, Some(9), 20));
    ledger.settle(Seconds::ZERO).unwrap();
    drop(ledger);
    let resumed = Ledger::resume(&path, "run").unwrap();
    assert_eq!(resumed.total().energy_j, energies(10, Some(9), 20));
}

#[test]
fn microjoules_survive_the_file() {
    let (_dir, path) = ledger_path();
    let energy = energies(123_456_789_012_345, Some(1), 999_999_999_999);
    let mut ledger = Ledger::create(&path, "run").unwrap();
    append(&mut ledger, Phase::Save, 3, energy);
    drop(ledger);
    assert_eq!(
        Ledger::resume(&path, "run").unwrap().total().energy_j,
        energy
    );
}

#[test]
fn one_process_at_a_time_has_the_ledger() {
    let (_dir, path) = ledger_path();
    let mut ledger = Ledger::create(&path, "run").unwrap();
    append(&mut ledger, Phase::Load, 0, energies(1, None, 1));
    let error = Ledger::resume(&path, "run").unwrap_err();
    assert_eq!(error.kind(), Kind::Run);
    assert!(error.to_string().contains("another process"), "{error}");
    // Reading needs no lock.
    assert_eq!(read_entries(&path).unwrap().len(), 1);
    drop(ledger);
    Ledger::resume(&path, "run").unwrap();
}

#[test]
fn a_ledger_that_lost_entries_is_refused() {
    let (_dir, path) = ledger_path();
    let mut ledger = Ledger::create(&path, "digest").unwrap();
    for step in 0..3 {
        append(&mut ledger, Phase::Train, step, energies(10, None, 1));
    }
    let recorded = ledger.record().unwrap();
    ledger.check_not_less(&recorded).unwrap();
    drop(ledger);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(Ledger::create(&path, "digest").is_err());
    let reopened = Ledger::resume(&path, "digest").unwrap();
    reopened.check_not_less(&recorded).unwrap();
    drop(reopened);
    let error = Ledger::resume(&path, "another recipe").unwrap_err();
    assert!(error.to_string().contains("no longer those"), "{error}");
    // Cut at a line: the remaining entries do not add up to what the checkpoint recorded.
    let cut: String = text.split_inclusive('\n').take(3).collect();
    std::fs::write(&path, cut).unwrap();
    let short = Ledger::resume(&path, "digest").unwrap();
    let error = short.check_not_less(&recorded).unwrap_err().to_string();
    assert!(error.contains("lost entries"), "{error}");
    drop(short);
    for damaged in [String::new(), "\0".repeat(text.len())] {
        std::fs::write(&path, damaged).unwrap();
        let error = Ledger::resume(&path, "digest").unwrap_err().to_string();
        assert!(error.contains("lost entries"), "{error}");
    }
}

#[test]
fn an_invalid_line_is_located() {
    let (_dir, path) = ledger_path();
    let mut ledger = Ledger::create(&path, "run").unwrap();
    append(&mut ledger, Phase::Load, 0, energies(1, None, 1));
    append(&mut ledger, Phase::Load, 0, energies(1, None, 1));
    drop(ledger);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("load", "lunch", 1)).unwrap();
    let error = Ledger::resume(&path, "run").unwrap_err();
    assert_eq!(error.kind(), Kind::Run);
    assert!(error.to_string().contains("line 2"), "{error}");
}

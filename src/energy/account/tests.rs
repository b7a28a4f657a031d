//! Tests of the account on counted budgets and simulated sensors.

use std::path::{Path, PathBuf};

use super::super::budget::Rates;
use super::super::options::Limits;
use super::super::profile::Profile;
use super::super::sensor::{Gap, Sensor};
use super::*;
use crate::units::{GramsPerKwh, Pue, Watts};
use crate::work::Precision;

fn profile() -> Profile {
    Profile::named("generic-cpu").unwrap()
}

fn step() -> Work {
    Work::product(300, 200, 400, Precision::F32)
}

fn save() -> Work {
    Work::sweep(10_000_000, 0)
}

/// Counted microjoules.
fn counted(work: &Work) -> u64 {
    profile().charge(work).energy.0
}

fn energy_limit(energy: u64) -> Limits {
    Limits {
        energy: Some(MicroJoules(energy).joules()),
        ..Limits::default()
    }
}

/// A limit of exactly `count` steps and one save on the counted meter.
fn limit_of_steps(count: u64) -> Limits {
    energy_limit(counted(&step()) * count + counted(&save()))
}

/// A temporary directory with a ledger's path.
fn ledger_path() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.jsonl");
    (dir, path)
}

/// An account on the ledger at `path`, resumed if it exists.
fn open(limits: Limits, path: &Path, meters: Meters, kind: MeterKind) -> Account {
    let ledger = if path.exists() {
        Ledger::resume(path, "run")
    } else {
        Ledger::create(path, "run")
    };
    let rates = Rates {
        grid: GramsPerKwh(473.0),
        pue: Pue::ONE,
        price: None,
    };
    let budget = Budget::new(limits, rates).unwrap();
    Account::new(budget, meters, ledger.unwrap(), kind)
}

fn open_counted(limits: Limits, path: &Path) -> Account {
    let meters = Meters::without_counters(profile());
    open(limits, path, meters, MeterKind::Counted)
}

fn open_measured(limits: Limits, path: &Path, sensor: impl Sensor + 'static) -> Account {
    let meters = Meters::without_counters(profile()).with_counters(vec![Box::new(sensor)], None);
    open(limits, path, meters, MeterKind::Measured)
}

/// A window with `work`, entered in the ledger.
fn spend(account: &mut Account, phase: Phase, number: u64, work: &Work) -> Reading {
    account.begin();
    account.charge(phase, number, work).unwrap()
}

fn predicted_energy(account: &Account, phase: Phase) -> MicroJoules {
    account.forecast(&[(phase, step())]).energy
}

/// A counter that rises by the next increment at every second reading; an increment of zero is a
/// reset.
struct Increments {
    increments: Vec<u64>,
    total: u64,
    window_open: bool,
}

impl Increments {
    fn new(increments: impl IntoIterator<Item = u64>) -> Increments {
        Increments {
            increments: increments.into_iter().collect(),
            total: 0,
            window_open: false,
        }
    }
}

impl Sensor for Increments {
    fn name(&self) -> &str {
        "increments"
    }

    fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
        self.window_open = !self.window_open;
        if !self.window_open {
            match self.increments.remove(0) {
                0 => {
                    // The immediate second reading succeeds.
                    self.increments.insert(0, 1);
                    self.window_open = true;
                    return Err(Gap::lost("told to be reset"));
                }
                increment => self.total += increment,
            }
        }
        Ok(MicroJoules(self.total))
    }
}

#[test]
fn a_counted_budget_is_spent_exactly() {
    let (_dir, path) = ledger_path();
    let mut account = open_counted(limit_of_steps(5), &path);
    let reserve = [(Phase::Save, save())];
    let mut done = 0;
    while account.admit(Phase::Train, &step(), &reserve).unwrap() == Verdict::Continue {
        done += 1;
        spend(&mut account, Phase::Train, done, &step());
    }
    assert_eq!(done, 5);
    let verdict = account.fits(Phase::Train, &step(), &reserve);
    assert_eq!(verdict, Verdict::Stop(Limit::Energy));
    account.charge(Phase::Save, done, &save()).unwrap();
    account.close().unwrap();
    // To the last microjoule, and not one more.
    assert_eq!(account.largest_fraction(), Some((Limit::Energy, 1.0)));
    assert_eq!(account.overshoot(), MicroJoules::ZERO);
    let phases = account.by_phase();
    let sum: MicroJoules = phases
        .map(|(_, totals)| totals.on(MeterKind::Counted))
        .sum();
    assert_eq!(sum, account.totals().energy_j.counted);
}

#[test]
fn reserved_works_are_charged_one_by_one() {
    // A product and a save charged together would overlap on the roofline and reserve too little.
    let (_dir, path) = ledger_path();
    let account = open_counted(Limits::default(), &path);
    let reserved = account.forecast(&[(Phase::Eval, step()), (Phase::Save, save())]);
    assert_eq!(reserved.energy.0, counted(&step()) + counted(&save()));
}

#[test]
fn after_a_crash_the_lease_counts_as_spent() {
    let (_dir, path) = ledger_path();
    let mut first = open_counted(limit_of_steps(50), &path);
    let verdict = first.admit(Phase::Train, &step(), &[]).unwrap();
    assert_eq!(verdict, Verdict::Continue);
    assert_eq!(first.ledger.leased().steps, 1);
    spend(&mut first, Phase::Train, 1, &step());
    let verdict = first.admit(Phase::Train, &step(), &[]).unwrap();
    assert_eq!(verdict, Verdict::Continue);
    let leased = first.ledger.leased().steps;
    drop(first);
    let second = open_counted(limit_of_steps(50), &path);
    // The entered step, and every step of the second lease, of which none is entered.
    assert!(leased > 1);
    assert_eq!(second.spent().energy.0, (1 + leased) * counted(&step()));
    // A lease stays within the budget, and so does its loss.
    assert_eq!(second.overshoot(), MicroJoules::ZERO);
}

#[test]
fn on_a_sensor_a_step_is_predicted_from_recent_ones() {
    let (_dir, path) = ledger_path();
    let counted = counted(&step());
    let sensor = Increments::new([2 * counted, 4 * counted]);
    let mut account = open_measured(Limits::default(), &path, sensor);
    // Before any step: the counted energy.
    assert_eq!(predicted_energy(&account, Phase::Train).0, counted);
    for number in 1..=2 {
        spend(&mut account, Phase::Train, number, &step());
    }
    // Twice and four times the counted energy: mean 3, deviation 1, so 3 + 3 * 1 = 6 times;
    // evaluations use the same ratio.
    assert_eq!(predicted_energy(&account, Phase::Train).0, 6 * counted);
    assert_eq!(predicted_energy(&account, Phase::Eval).0, 6 * counted);
    assert_eq!(account.spent().energy.0, 6 * counted);
    assert_eq!(account.metered_over_counted(), 3.0);
}

#[test]
fn a_counter_that_never_moves_does_not_make_the_ratio_zero() {
    let (_dir, path) = ledger_path();
    struct Still;
    impl Sensor for Still {
        fn name(&self) -> &str {
            "still"
        }

        fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
            Ok(MicroJoules::ZERO)
        }
    }
    let mut account = open_measured(Limits::default(), &path, Still);
    assert_eq!(account.metered_over_counted(), 1.0);
    account.charge(Phase::Train, 1, &step()).unwrap();
    assert_eq!(account.totals().energy_j.measured, Some(MicroJoules::ZERO));
    assert_eq!(account.metered_over_counted(), 1.0);
}

#[test]
fn progress_on_a_sensor_reaches_one_when_the_budget_ends() {
    let (_dir, path) = ledger_path();
    let counted = counted(&step());
    // A step takes four times its counted energy; an evaluation twice, the first one three times.
    let evaluation = step().times(4);
    let budget = 200 * counted;
    let factor = |entry| match entry {
        0 => 12,
        _ if entry % 6 == 0 => 8,
        _ => 4,
    };
    let sensor = Increments::new((0..100).map(|entry| counted * factor(entry)));
    let mut account = open_measured(energy_limit(budget), &path, sensor);
    spend(&mut account, Phase::Eval, 0, &evaluation);
    let ending = [(Phase::Eval, evaluation.clone())];
    let overhead = [(Phase::Eval, evaluation.clone(), 0.2)];
    let mut progress = Vec::new();
    let mut done = 0;
    while account.admit(Phase::Train, &step(), &ending).unwrap() == Verdict::Continue {
        progress.push(account.progress(&step(), &overhead, &ending));
        done += 1;
        spend(&mut account, Phase::Train, done, &step());
        if done % 5 == 0 {
            spend(&mut account, Phase::Eval, done, &evaluation);
        }
    }
    let spent = account.spent().energy;
    assert!(spent.0 + 8 * counted <= budget, "{spent}");
    // Of 200, 12 for the first evaluation; then five steps and an evaluation take 28: some thirty
    // steps. Progress starts near zero, is one half after half of the steps, and nears one only at
    // the end.
    let middle = progress[progress.len() / 2];
    assert!(done > 30 && progress[0] < 0.03, "{progress:?}");
    assert!((middle - 0.5).abs() < 0.1, "{progress:?}");
    let [.., third_last, _, last] = progress[..] else {
        panic!("{progress:?}")
    };
    assert!(third_last < 0.97 && last > 0.94, "{progress:?}");
}

#[test]
fn a_gap_is_filled_with_counted_energy_times_the_runs_ratio() {
    let (_dir, path) = ledger_path();
    let counted = counted(&step());
    // Three times the counted energy, a reset, and twice.
    let sensor = Increments::new([3 * counted, 0, 2 * counted]);
    let mut first = open_measured(Limits::default(), &path, sensor);
    for number in 1..=3 {
        let reading = spend(&mut first, Phase::Train, number, &step());
        assert_eq!(reading.energies().measured.is_none(), number == 2);
    }
    assert_eq!(first.spent().energy.0, (3 + 3 + 2) * counted);
    let gaps: Vec<_> = first.gaps().collect();
    let [(Phase::Train, reason, gap)] = gaps[..] else {
        panic!("{gaps:?}")
    };
    assert_eq!(reason, "increments: told to be reset");
    assert_eq!(gap.energy.0, 3 * counted);
    first.close().unwrap();
    drop(first);
    // A resumed run predicts with the ratio of the phase in the ledger: 5 over 2 of the measured
    // steps. A phase that was not measured is predicted as counted.
    let second = open_measured(Limits::default(), &path, Increments::new([]));
    let expected = (counted as f64 * 2.5).round() as u64;
    assert_eq!(predicted_energy(&second, Phase::Train).0, expected);
    assert_eq!(predicted_energy(&second, Phase::Eval).0, counted);
}

#[test]
fn a_first_step_is_predicted_as_counted_whatever_loading_took() {
    let (_dir, path) = ledger_path();
    let counted = counted(&step());
    // Loading takes a thousand times its counted energy.
    let sensor = Increments::new([1000 * counted, counted]);
    let mut account = open_measured(energy_limit(1003 * counted), &path, sensor);
    spend(&mut account, Phase::Load, 0, &step());
    assert_eq!(predicted_energy(&account, Phase::Train).0, counted);
    let verdict = account.fits(Phase::Train, &step(), &[(Phase::Eval, step())]);
    assert_eq!(verdict, Verdict::Continue);
}

#[test]
fn a_gap_before_its_phase_was_measured_is_filled_by_power() {
    let (_dir, path) = ledger_path();
    // 1 mJ while loading, then a reset in the first step: the power of loading.
    let sensor = Increments::new([1000, 0, 7]);
    let mut account = open_measured(Limits::default(), &path, sensor);
    let load = spend(&mut account, Phase::Load, 0, &save());
    let first = spend(&mut account, Phase::Train, 1, &step());
    let gaps: Vec<_> = account.gaps().collect();
    assert_eq!(
        (gaps[0].0, gaps[0].2.meter),
        (Phase::Train, MeterKind::Timed)
    );
    // By the timed meter, whose power is constant.
    let expected = 1000.0 * first.timed.0 as f64 / load.timed.0 as f64;
    assert!(
        (gaps[0].2.energy.0 as f64 - expected).abs() <= 1.0,
        "{gaps:?} of {expected}"
    );
}

#[test]
fn a_gap_is_filled_with_no_more_than_the_device_can_draw() {
    let (_dir, path) = ledger_path();
    struct Broken;
    impl Sensor for Broken {
        fn name(&self) -> &str {
            "broken"
        }

        fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
            Err(Gap::unread("told to fail"))
        }

        fn max_power(&self) -> Option<Watts> {
            Some(Watts(1.0))
        }
    }
    let mut account = open_measured(Limits::default(), &path, Broken);
    // Thousands of counted joules in no time.
    let work = Work::product(1 << 14, 1 << 14, 1 << 14, Precision::F32);
    let reading = spend(&mut account, Phase::Train, 1, &work);
    let most = (Watts(1.0) * reading.wall).rounded();
    assert!(counted(&work) > most.0);
    assert_eq!(account.spent().energy, most);
}

#[test]
fn what_a_slow_counter_has_not_shown_counts_against_the_budget() {
    let (_dir, path) = ledger_path();
    let counted = counted(&step());
    struct Still;
    impl Sensor for Still {
        fn name(&self) -> &str {
            "still"
        }

        fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
            Ok(MicroJoules::ZERO)
        }
    }
    let mut account = open_measured(energy_limit(5 * counted), &path, Still);
    let mut steps = 0;
    while account.admit(Phase::Train, &step(), &[]).unwrap() == Verdict::Continue {
        steps += 1;
        spend(&mut account, Phase::Train, steps, &step());
    }
    assert_eq!(steps, 5);
}

#[test]
fn time_between_entries_and_before_the_first_counts_in_every_process() {
    let (_dir, path) = ledger_path();
    let start = Instant::now()
        .checked_sub(std::time::Duration::from_secs(100))
        .unwrap();
    let mut first = open_counted(Limits::default(), &path).started_at(start);
    assert!(first.spent().time.0 >= 100.0);
    first.admit(Phase::Train, &step(), &[]).unwrap();
    // Killed.
    drop(first);
    let second = open_counted(Limits::default(), &path);
    let time = second.spent().time;
    assert!((100.0..101.0).contains(&time.0), "{time}");
}

#[test]
fn a_resumed_run_has_the_allowance_of_the_first() {
    let (_dir, path) = ledger_path();
    let mut first = open_counted(limit_of_steps(10), &path);
    first.charge(Phase::Load, 0, &save()).unwrap();
    let reserve = [(Phase::Save, save())];
    let allowance = first.allowance(&reserve);
    for number in 1..=3 {
        first.charge(Phase::Train, number, &step()).unwrap();
    }
    let progress = allowance.fraction(&first.spent_on(Phase::Train));
    first.close().unwrap();
    drop(first);
    let second = open_counted(limit_of_steps(10), &path);
    assert_eq!(second.allowance(&reserve), allowance);
    // Ten steps and a save, less loading (equal to a save) and the save.
    let one = counted(&step()) as f64;
    let expected = 3.0 * one / (10.0 * one - counted(&save()) as f64);
    assert!((progress - expected).abs() < 1e-12);
    let resumed = allowance.fraction(&second.spent_on(Phase::Train));
    assert_eq!(resumed, progress);
}

#[test]
fn a_time_limit_applies_on_every_meter() {
    let (_dir, path) = ledger_path();
    let limits = Limits {
        time: Some(Seconds(1e-9)),
        ..Limits::default()
    };
    let account = open_counted(limits, &path);
    let verdict = account.fits(Phase::Train, &step(), &[]);
    assert_eq!(verdict, Verdict::Stop(Limit::Time));
}

//! The account: what a run spends through.
//!
//! Puts budget, meters and ledger together. Takes the work that comes next and the work that must still be possible after it,
//! returns a verdict; takes the work that was done, returns a reading and writes it down. Knows nothing of what a step is.
//!
//! On the counted meter a prediction is the charge itself. On the others it is the charge times a ratio learnt from the recent
//! entries of its phase (the training steps' where a phase has none yet): mean plus three deviations, each entry weighing as much as its
//! charge, so that a small one with much around it makes no large one dear; before there are any the ratio of
//! what the ledger holds from before, else 1. Time is always predicted that way, from wall time over roofline time.
//!
//! Where the counters fail inside a window, the entry says why, and its counted energy times the run's measured over counted stands in.
//!
//! The margin of a sensor: a step is admitted where it and everything reserved fit as predicted, so what the last step and the ending cost
//! more than predicted is the most by which a budget can be passed. With ratios of measured to counted between `lo` and `hi` that is at
//! most `(hi - lo)` times their counted energy.

use std::collections::VecDeque;
use std::time::Instant;

use super::budget::{Allowance, Budget, Limit, Spent};
use super::charge::Charge;
use super::ledger::{Energies, Entry, Filled, Gapped, Lease, Ledger, Phase, Recorded, Totals, now};
use super::meter::{Meters, Reading, Window};
use super::options::MeterKind;
use crate::error::Result;
use crate::units::{MicroJoules, Seconds};
use crate::work::Work;

/// How many entries of a phase a prediction looks back on.
const RECENT: usize = 20;
/// A lease is synced to disk about this often.
const LEASE_S: f64 = 1.0;

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The next step fits.
    Continue,
    /// It would pass this limit.
    Stop(Limit),
}

/// A ratio of what was seen to what was charged, and what was charged.
type Weighed = (f64, f64);

/// What was seen of recent entries.
#[derive(Debug, Clone, Default)]
struct Recent {
    energy: VecDeque<Weighed>,
    time: VecDeque<Weighed>,
}

impl Recent {
    fn note(&mut self, energy: Weighed, time: Weighed) {
        for (window, (ratio, charged)) in [(&mut self.energy, energy), (&mut self.time, time)] {
            if ratio.is_finite() && charged > 0.0 {
                window.push_back((ratio, charged));
            }
            if window.len() > RECENT {
                window.pop_front();
            }
        }
    }
}

/// The mean; `None` of nothing.
fn mean(ratios: &VecDeque<Weighed>) -> Option<f64> {
    let all: f64 = ratios.iter().map(|(_, charged)| charged).sum();
    (all > 0.0).then(|| {
        ratios
            .iter()
            .map(|(ratio, charged)| ratio * charged)
            .sum::<f64>()
            / all
    })
}

/// Mean plus three (population) deviations; `None` of nothing.
fn cautious(ratios: &VecDeque<Weighed>) -> Option<f64> {
    let (all, mean): (f64, f64) = (
        ratios.iter().map(|(_, charged)| charged).sum(),
        mean(ratios)?,
    );
    let variance = ratios
        .iter()
        .map(|(ratio, charged)| (ratio - mean).powi(2) * charged)
        .sum::<f64>()
        / all;
    Some(mean + 3.0 * variance.sqrt())
}

/// Budget, meters and ledger of one run.
pub struct Account {
    budget: Budget,
    meters: Meters,
    ledger: Ledger,
    kind: MeterKind,
    spent: Spent,
    /// Wall time of earlier runs in this ledger.
    time_before: Seconds,
    opened: Instant,
    /// The most that was to be spent if everything went as predicted when it was admitted; within the budget.
    promised: Option<MicroJoules>,
    window: Option<Window>,
    /// One for each of `Phase::ALL`.
    recent: [Recent; 5],
}

impl Account {
    /// An account on a new or a resumed ledger; `kind` is the meter that decides (`Meters::resolve`). What the ledger holds is spent.
    pub fn new(budget: Budget, meters: Meters, ledger: Ledger, kind: MeterKind) -> Account {
        let spent = ledger.total().spent(kind);
        let (time_before, opened) = (spent.time, Instant::now());
        Account {
            budget,
            meters,
            ledger,
            kind,
            spent,
            time_before,
            opened,
            promised: None,
            window: None,
            recent: Default::default(),
        }
    }

    /// The meter that decides.
    pub fn kind(&self) -> MeterKind {
        self.kind
    }

    /// The limits and rates.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// The meters.
    pub fn meters(&self) -> &Meters {
        &self.meters
    }

    /// What was spent so far on the meter that decides; time is wall time since the run began, earlier runs included.
    pub fn spent(&self) -> Spent {
        Spent {
            time: self.elapsed(),
            ..self.spent
        }
    }

    /// What one phase spent.
    pub fn spent_on(&self, phase: Phase) -> Spent {
        self.ledger.phase(phase).spent(self.kind)
    }

    /// Each phase's sums; they add up to `totals` exactly.
    pub fn by_phase(&self) -> impl Iterator<Item = (Phase, &Totals)> {
        self.ledger.by_phase()
    }

    /// Sums over everything, by meter.
    pub fn totals(&self) -> &Totals {
        self.ledger.total()
    }

    /// How far the energy spent lies past its tightest limit; zero on the counted meter.
    pub fn overshoot(&self) -> MicroJoules {
        self.budget.overshoot(&self.spent())
    }

    /// What the last step and everything after it cost more than predicted: no energy budget is passed by more. `None` before anything was
    /// admitted; zero on the counted meter.
    pub fn margin(&self) -> Option<MicroJoules> {
        self.promised
            .map(|promised| self.spent.energy.saturating_sub(promised))
    }

    /// The entries whose counters failed, by phase and reason.
    pub fn gaps(&self) -> impl Iterator<Item = (Phase, &str, &Gapped)> {
        self.ledger.gaps()
    }

    /// The limit nearest to its end and the part of it that is spent.
    pub fn largest_fraction(&self) -> Option<(Limit, f64)> {
        self.budget.largest_fraction(&self.spent())
    }

    /// What the meter that decides showed so far over what was counted; one before anything was.
    pub fn metered_over_counted(&self) -> f64 {
        let ratio = self.spent.energy.joules() / self.totals().energy_j.counted.joules();
        if ratio.is_finite() && ratio > 0.0 {
            ratio
        } else {
            1.0
        }
    }

    /// What `works` will cost, each charged as an entry of its own: exact on the counted meter but for time.
    pub fn forecast(&self, works: &[(Phase, Work)]) -> Spent {
        works
            .iter()
            .map(|(phase, work)| self.predict(*phase, &self.meters.profile().charge(work)))
            .sum()
    }

    /// What training may spend, in this run and in the earlier ones of a resumed ledger, when `reserved` (final evaluation and
    /// save, every other one still planned) is kept back. Ask once, before the first step.
    pub fn allowance(&self, reserved: &[(Phase, Work)]) -> Allowance {
        let (all, training) = (self.spent(), self.spent_on(Phase::Train));
        let before = Spent {
            energy: all.energy.saturating_sub(training.energy),
            flops: all.flops.saturating_sub(training.flops),
            time: (all.time - training.time).max(Seconds::ZERO),
        };
        self.budget.allowance(&before, &self.forecast(reserved))
    }

    /// Whether counting tells what everything to come will take: nothing but the counted meter's energy and FLOPs is limited.
    pub fn foresees(&self) -> bool {
        self.kind == MeterKind::Counted && self.budget.remaining(&Spent::default()).time.is_none()
    }

    /// How far training is, in 0..=1, where nobody foresees how much is still to come: what it has spent by the midpoint of the step whose
    /// work is `next`, over that and its share of what is left when `ending` is kept back. Its share is that of such a step beside `between`,
    /// works each with how often they come after one step. Where nothing more fits it is one.
    pub fn progress(
        &self,
        next: &Work,
        between: &[(Phase, Work, f64)],
        ending: &[(Phase, Work)],
    ) -> f64 {
        let expected =
            |phase, work: &Work| self.estimate(phase, &self.meters.profile().charge(work), mean);
        let step = expected(Phase::Train, next);
        let beside: Spent = between
            .iter()
            .map(|(phase, work, often)| expected(*phase, work).times(*often))
            .sum();
        let left = self
            .budget
            .remaining(&(self.spent() + self.forecast(ending)));
        let trained = self.spent_on(Phase::Train);
        left.with_trained(&trained, &step, &beside)
            .fraction(&(trained + step.half()))
    }

    /// Whether `next` fits with `reserve` still possible after it. Writes nothing: preflight asks this too.
    pub fn fits(&self, phase: Phase, next: &Work, reserve: &[(Phase, Work)]) -> Verdict {
        let next = self.predict(phase, &self.meters.profile().charge(next));
        self.verdict(&next, &self.forecast(reserve))
    }

    /// The same, asked just before `next` runs: when the answer is to go on, the ledger holds a lease that covers it.
    pub fn admit(
        &mut self,
        phase: Phase,
        next: &Work,
        reserve: &[(Phase, Work)],
    ) -> Result<Verdict> {
        let charge = self.meters.profile().charge(next);
        let (predicted, reserve) = (self.predict(phase, &charge), self.forecast(reserve));
        let verdict = self.verdict(&predicted, &reserve);
        if verdict == Verdict::Continue {
            self.cover(&charge, &predicted, &reserve)?;
            let promised = self.spent.energy + predicted.energy + reserve.energy;
            // An evaluation is admitted without a reserve: the step before it promised more.
            self.promised = self.promised.max(Some(promised));
        }
        Ok(verdict)
    }

    /// Opens the window that the next `charge` closes.
    pub fn begin(&mut self) {
        self.window = Some(self.meters.begin());
    }

    /// Closes the window (an empty one if none is open), charges `work` to it as one entry, and writes it down.
    pub fn charge(&mut self, phase: Phase, step: u64, work: &Work) -> Result<Reading> {
        let window = self.window.take().unwrap_or_else(|| self.meters.begin());
        let reading = self.meters.end(window, work);
        let Charge {
            time,
            flops,
            ref bytes,
            ..
        } = reading.charge;
        let energy_j = reading.energies();
        let (parts, bytes, gap) = (
            Some(reading.charge.breakdown),
            bytes.clone(),
            self.filled(phase, &reading),
        );
        let entry = Entry {
            phase,
            step,
            energy_j,
            flops,
            bytes,
            parts,
            wall_s: reading.wall,
            t: now(),
            gap,
        };
        self.ledger.append(&entry)?;
        let energy = entry.on(self.kind);
        self.spent += Spent {
            energy,
            flops,
            time: Seconds::ZERO,
        };
        // What fills a gap is learnt already.
        let seen = if entry.gap.is_some() {
            f64::NAN
        } else {
            energy.joules() / energy_j.counted.joules()
        };
        self.recent[phase as usize].note(
            (seen, energy_j.counted.joules().0),
            (reading.wall / time, time.0),
        );
        Ok(reading)
    }

    /// Flushes the ledger to disk and returns its sums, for a checkpoint to hold.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`].
    pub fn record(&mut self) -> Result<Recorded> {
        self.ledger.record()
    }

    /// Refuses a ledger that holds less than when a checkpoint was written.
    ///
    /// # Errors
    /// [`crate::error::Kind::Run`].
    pub fn check_not_less(&self, earlier: &Recorded) -> Result<()> {
        self.ledger.check_not_less(earlier)
    }

    /// Ends the run in order: the lease is released, and everything is on disk.
    pub fn close(&mut self) -> Result<()> {
        self.ledger.settle()
    }

    /// What stands in for counters that failed.
    fn filled(&self, phase: Phase, reading: &Reading) -> Option<Filled> {
        let reason = reading.measured.as_ref()?.as_ref().err()?.reason.clone();
        let times = self.ledger.ratio(phase).unwrap_or(1.0);
        Some(Filled {
            reason,
            filled: MeterKind::Counted,
            times,
            energy_j: (reading.counted.joules() * times).rounded(),
        })
    }

    fn elapsed(&self) -> Seconds {
        self.time_before + Seconds(self.opened.elapsed().as_secs_f64())
    }

    fn verdict(&self, next: &Spent, reserve: &Spent) -> Verdict {
        self.budget
            .admits(&self.spent(), next, reserve)
            .map_or_else(Verdict::Stop, |()| Verdict::Continue)
    }

    fn predict(&self, phase: Phase, charge: &Charge) -> Spent {
        self.estimate(phase, charge, cautious)
    }

    /// What `charge` will be on the meter that decides, by `of` the recent ratios.
    fn estimate(
        &self,
        phase: Phase,
        charge: &Charge,
        of: fn(&VecDeque<Weighed>) -> Option<f64>,
    ) -> Spent {
        let seen = |ratios: fn(&Recent) -> &VecDeque<Weighed>| {
            [phase, Phase::Train]
                .into_iter()
                .find_map(|phase| of(ratios(&self.recent[phase as usize])))
        };
        let energy = match self.kind {
            MeterKind::Counted => charge.energy,
            MeterKind::Timed => {
                (charge.energy.joules() * seen(|recent| &recent.energy).unwrap_or(1.0)).rounded()
            }
            MeterKind::Measured => {
                let ratio = seen(|recent| &recent.energy)
                    .or_else(|| self.ledger.ratio(phase))
                    .unwrap_or(1.0);
                (charge.energy.joules() * ratio).rounded()
            }
        };
        Spent {
            energy,
            flops: charge.flops,
            time: charge.time * seen(|recent| &recent.time).unwrap_or(1.0),
        }
    }

    /// Leases as many steps like this one as run in about a second and fit the budget, unless the last lease still covers it.
    /// Until a step's wall time is known, one: the roofline may be far from it.
    fn cover(&mut self, charge: &Charge, predicted: &Spent, reserve: &Spent) -> Result<()> {
        let held = self.ledger.leased();
        if held.steps > 0
            && held.energy_j.on(self.kind) >= predicted.energy
            && held.flops >= predicted.flops
        {
            return Ok(());
        }
        let known = !self.recent[Phase::Train as usize].time.is_empty();
        let mut steps = if known {
            (LEASE_S / predicted.time.0.max(1e-3)).ceil() as u64
        } else {
            1
        };
        while steps > 1 && self.verdict(&times(predicted, steps), reserve) != Verdict::Continue {
            steps /= 2;
        }
        let counted = MicroJoules(charge.energy.0.saturating_mul(steps));
        let total = times(predicted, steps);
        let timed = if self.kind == MeterKind::Timed {
            total.energy
        } else {
            (self.meters.timed_power() * total.time).rounded()
        };
        let measured = (self.kind == MeterKind::Measured).then_some(total.energy);
        self.ledger.lease(Lease {
            steps,
            energy_j: Energies {
                counted,
                measured,
                timed,
            },
            flops: total.flops,
            time_s: total.time,
        })
    }
}

fn times(spent: &Spent, count: u64) -> Spent {
    let energy = MicroJoules(spent.energy.0.saturating_mul(count));
    Spent {
        energy,
        flops: spent.flops.saturating_mul(count),
        time: spent.time * count as f64,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::budget::Rates;
    use super::super::options::Limits;
    use super::super::profile::Profile;
    use super::super::sensor::{Gap, Sensor};
    use super::*;
    use crate::units::{GramsPerKwh, Pue};
    use crate::work::Precision;

    fn rates() -> Rates {
        Rates {
            grid: GramsPerKwh(473.0),
            pue: Pue::ONE,
            price: None,
        }
    }

    fn profile() -> Profile {
        Profile::named("generic-cpu").unwrap()
    }

    fn step() -> Work {
        Work::product(300, 200, 400, Precision::F32)
    }

    fn save() -> Work {
        Work::sweep(10_000_000, 0)
    }

    fn account(limits: Limits, ledger: &Path, meters: Meters, kind: MeterKind) -> Account {
        let ledger = if ledger.exists() {
            Ledger::resume(ledger)
        } else {
            Ledger::create(ledger)
        };
        Account::new(
            Budget::new(limits, rates()).unwrap(),
            meters,
            ledger.unwrap(),
            kind,
        )
    }

    /// A budget of exactly `count` steps and one save on the counted meter.
    fn room_for(count: u64) -> Limits {
        let energy =
            profile().charge(&step()).energy.0 * count + profile().charge(&save()).energy.0;
        Limits {
            energy: Some(MicroJoules(energy).joules()),
            ..Limits::default()
        }
    }

    #[test]
    fn a_counted_budget_holds_the_steps_it_was_made_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut account = account(
            room_for(5),
            &path,
            Meters::without_counters(profile()),
            MeterKind::Counted,
        );
        let reserve = [(Phase::Save, save())];
        let mut done = 0;
        while account.admit(Phase::Train, &step(), &reserve).unwrap() == Verdict::Continue {
            account.begin();
            done += 1;
            account.charge(Phase::Train, done, &step()).unwrap();
        }
        assert_eq!(
            (done, account.fits(Phase::Train, &step(), &reserve)),
            (5, Verdict::Stop(Limit::Energy))
        );
        account.charge(Phase::Save, done, &save()).unwrap();
        account.close().unwrap();
        // Spent to the last microjoule, and not one more.
        assert_eq!(account.largest_fraction(), Some((Limit::Energy, 1.0)));
        assert_eq!(account.overshoot(), MicroJoules::ZERO);
        let phases: MicroJoules = account
            .by_phase()
            .map(|(_, totals)| totals.on(MeterKind::Counted))
            .sum();
        assert_eq!(phases, account.totals().energy_j.counted);
    }

    #[test]
    fn a_reserve_is_charged_entry_by_entry() {
        // A product and a save in one entry would overlap on the roofline and reserve too little.
        let dir = tempfile::tempdir().unwrap();
        let account = account(
            Limits::default(),
            &dir.path().join("l"),
            Meters::without_counters(profile()),
            MeterKind::Counted,
        );
        let apart = account.forecast(&[(Phase::Eval, step()), (Phase::Save, save())]);
        let energy = profile().charge(&step()).energy + profile().charge(&save()).energy;
        assert_eq!(apart.energy, energy);
    }

    #[test]
    fn a_crashed_run_resumes_from_what_it_leased() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut first = account(
            room_for(50),
            &path,
            Meters::without_counters(profile()),
            MeterKind::Counted,
        );
        assert_eq!(
            first.admit(Phase::Train, &step(), &[]).unwrap(),
            Verdict::Continue
        );
        assert_eq!(first.ledger.leased().steps, 1);
        first.begin();
        first.charge(Phase::Train, 1, &step()).unwrap();
        assert_eq!(
            first.admit(Phase::Train, &step(), &[]).unwrap(),
            Verdict::Continue
        );
        let leased = *first.ledger.leased();
        drop(first);
        let second = account(
            room_for(50),
            &path,
            Meters::without_counters(profile()),
            MeterKind::Counted,
        );
        // The step that is entered, and every step of the second lease: none of them is.
        assert!(leased.steps > 1);
        assert_eq!(
            second.spent().energy.0,
            (1 + leased.steps) * profile().charge(&step()).energy.0
        );
        // A lease never reaches past the budget, so neither does what a crash may lose.
        assert_eq!(second.overshoot(), MicroJoules::ZERO);
    }

    /// A counter that rises by the next of these at every second reading; zero stands for a reset.
    struct Steps(Vec<u64>, u64, bool);

    impl Sensor for Steps {
        fn name(&self) -> &str {
            "steps"
        }

        fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
            self.2 = !self.2;
            let risen = if self.2 { None } else { Some(self.0.remove(0)) };
            if risen == Some(0) {
                // Read again at once, it goes on.
                self.0.insert(0, 1);
                self.2 = true;
                return Err(Gap::lost("told to be reset"));
            }
            self.1 += risen.unwrap_or_default();
            Ok(MicroJoules(self.1))
        }
    }

    /// A counter that has not moved yet.
    struct Still;

    impl Sensor for Still {
        fn name(&self) -> &str {
            "still"
        }

        fn read(&mut self) -> std::result::Result<MicroJoules, Gap> {
            Ok(MicroJoules::ZERO)
        }
    }

    #[test]
    fn on_a_sensor_a_step_is_predicted_from_the_recent_ones() {
        let dir = tempfile::tempdir().unwrap();
        let counted = profile().charge(&step()).energy.0;
        let sensor = Steps(vec![2 * counted, 4 * counted], 0, false);
        let meters =
            Meters::without_counters(profile()).with_counters(vec![Box::new(sensor)], None);
        let mut account = account(
            Limits::default(),
            &dir.path().join("l"),
            meters,
            MeterKind::Measured,
        );
        // Before any step: the counted estimate.
        assert_eq!(
            account.forecast(&[(Phase::Train, step())]).energy,
            MicroJoules(counted)
        );
        for number in 1..=2 {
            account.begin();
            account.charge(Phase::Train, number, &step()).unwrap();
        }
        // Twice and four times the counted energy: mean 3, deviation 1, so 3 + 3 * 1 = 6 times; evaluations borrow it.
        let expected = MicroJoules(6 * counted);
        assert_eq!(account.forecast(&[(Phase::Train, step())]).energy, expected);
        assert_eq!(account.forecast(&[(Phase::Eval, step())]).energy, expected);
        assert_eq!(
            (account.spent().energy, account.metered_over_counted()),
            (MicroJoules(6 * counted), 3.0)
        );
    }

    #[test]
    fn a_meter_that_showed_nothing_makes_nothing_else_cost_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let meters = Meters::without_counters(profile()).with_counters(vec![Box::new(Still)], None);
        let mut account = account(
            Limits::default(),
            &dir.path().join("l"),
            meters,
            MeterKind::Measured,
        );
        assert_eq!(account.metered_over_counted(), 1.0);
        account.charge(Phase::Train, 1, &step()).unwrap();
        assert_eq!(
            (
                account.totals().energy_j.measured,
                account.metered_over_counted()
            ),
            (Some(MicroJoules::ZERO), 1.0)
        );
    }

    #[test]
    fn a_small_entry_makes_no_large_one_dear() {
        // 97 parts at ratio 28 and 3 at 100: the mean is 30.16, the variance 97 % of 2.16 squared + 3 % of 69.84 squared = 150.9.
        let ratios = VecDeque::from([(28.0, 0.97), (100.0, 0.03)]);
        let expected = 30.16 + 3.0 * (0.97 * 2.16_f64.powi(2) + 0.03 * 69.84_f64.powi(2)).sqrt();
        assert!((cautious(&ratios).unwrap() - expected).abs() < 1e-9);
        // Entries of one size weigh alike: 2 and 4 have the mean 3 and the deviation 1.
        assert_eq!(
            cautious(&VecDeque::from([(2.0, 0.1), (4.0, 0.1)])),
            Some(6.0)
        );
        assert_eq!(cautious(&VecDeque::new()), None);
    }

    #[test]
    fn the_rate_of_a_sensors_run_ends_when_its_budget_does() {
        let dir = tempfile::tempdir().unwrap();
        let counted = profile().charge(&step()).energy.0;
        // A step takes four times what is counted; an evaluation twice, the first one three times.
        let (evaluation, budget) = (step().times(4), 200 * counted);
        let times = |entry| match entry {
            0 => 12,
            _ if entry % 6 == 0 => 8,
            _ => 4,
        };
        let readings = (0..100).map(|entry| counted * times(entry));
        let meters = Meters::without_counters(profile())
            .with_counters(vec![Box::new(Steps(readings.collect(), 0, false))], None);
        let limits = Limits {
            energy: Some(MicroJoules(budget).joules()),
            ..Limits::default()
        };
        let mut account = account(limits, &dir.path().join("l"), meters, MeterKind::Measured);
        let spend = |account: &mut Account, phase, number, work: &Work| {
            account.begin();
            account.charge(phase, number, work).unwrap();
        };
        spend(&mut account, Phase::Eval, 0, &evaluation);
        let (ending, between) = (
            [(Phase::Eval, evaluation.clone())],
            [(Phase::Eval, evaluation.clone(), 0.2)],
        );
        let (mut course, mut done) = (Vec::new(), 0);
        while account.admit(Phase::Train, &step(), &ending).unwrap() == Verdict::Continue {
            course.push(account.progress(&step(), &between, &ending));
            done += 1;
            spend(&mut account, Phase::Train, done, &step());
            if done % 5 == 0 {
                spend(&mut account, Phase::Eval, done, &evaluation);
            }
        }
        assert!(
            account.spent().energy.0 + 8 * counted <= budget,
            "{}",
            account.spent().energy
        );
        // Of 200, 12 for the first evaluation; then five steps and an evaluation take 28: some thirty steps. It begins at its
        // beginning, is half way after half of the steps, and at its end only there.
        assert!(
            done > 30 && course[0] < 0.03 && (course[course.len() / 2] - 0.5).abs() < 0.1,
            "{course:?}"
        );
        let [.., third, _, last] = course[..] else {
            panic!("{course:?}")
        };
        assert!(third < 0.97 && last > 0.94, "{course:?}");
    }

    #[test]
    fn a_gap_is_filled_by_the_counted_meter_times_what_the_run_showed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let counted = profile().charge(&step()).energy.0;
        // Three times the counted energy, a reset, and twice.
        let sensor = Steps(vec![3 * counted, 0, 2 * counted], 0, false);
        let meters =
            Meters::without_counters(profile()).with_counters(vec![Box::new(sensor)], None);
        let mut first = account(Limits::default(), &path, meters, MeterKind::Measured);
        for number in 1..=3 {
            first.begin();
            let reading = first.charge(Phase::Train, number, &step()).unwrap();
            assert_eq!(reading.energies().measured.is_none(), number == 2);
        }
        assert_eq!(first.spent().energy, MicroJoules((3 + 3 + 2) * counted));
        let gaps: Vec<_> = first
            .gaps()
            .map(|(phase, reason, gapped)| (phase, reason.to_string(), gapped.energy.0))
            .collect();
        assert_eq!(
            gaps,
            [(
                Phase::Train,
                "steps: told to be reset".to_string(),
                3 * counted
            )]
        );
        first.close().unwrap();
        drop(first);
        // A resumed run predicts with what the ledger shows: 5 over 2 of the measured steps.
        let meters = Meters::without_counters(profile())
            .with_counters(vec![Box::new(Steps(vec![], 0, false))], None);
        let second = account(Limits::default(), &path, meters, MeterKind::Measured);
        assert_eq!(
            second.forecast(&[(Phase::Train, step())]).energy.0,
            (counted as f64 * 2.5).round() as u64
        );
    }

    #[test]
    fn a_resumed_run_has_the_allowance_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut first = account(
            room_for(10),
            &path,
            Meters::without_counters(profile()),
            MeterKind::Counted,
        );
        first.charge(Phase::Load, 0, &save()).unwrap();
        let reserve = [(Phase::Save, save())];
        let allowance = first.allowance(&reserve);
        for number in 1..=3 {
            first.charge(Phase::Train, number, &step()).unwrap();
        }
        let progress = allowance.fraction(&first.spent_on(Phase::Train));
        first.close().unwrap();
        drop(first);
        let second = account(
            room_for(10),
            &path,
            Meters::without_counters(profile()),
            MeterKind::Counted,
        );
        assert_eq!(second.allowance(&reserve), allowance);
        // Room for ten steps and a save, less loading (as dear as the save) and the save itself.
        let (one, save) = (
            profile().charge(&step()).energy.0 as f64,
            profile().charge(&save()).energy.0 as f64,
        );
        assert!((progress - 3.0 * one / (10.0 * one - save)).abs() < 1e-12);
        assert_eq!(allowance.fraction(&second.spent_on(Phase::Train)), progress);
    }

    #[test]
    fn wall_time_ends_a_run_whatever_the_meter() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits {
            time: Some(Seconds(1e-9)),
            ..Limits::default()
        };
        let account = account(
            limits,
            &dir.path().join("l"),
            Meters::without_counters(profile()),
            MeterKind::Counted,
        );
        assert_eq!(
            account.fits(Phase::Train, &step(), &[]),
            Verdict::Stop(Limit::Time)
        );
    }
}

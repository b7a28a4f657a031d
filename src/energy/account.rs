//! The account of a run: budget, meters and ledger combined.
//!
//! Takes the next work and the work that must remain possible after it, returns a verdict; takes
//! the work that was done, returns a reading and enters it in the ledger. Independent of what a
//! step does.
//!
//! On the counted meter a prediction is the charge itself. On the others it is the charge times the
//! upper bound of the recent ratios of its phase (`prediction`); before any entry of the phase the
//! factor is that of the phase's entries in a resumed ledger (measured meter), else 1. Another
//! phase's ratio is not used: a file's load takes many times its counted energy, a step does not.
//! Time is always predicted from wall time over roofline time.
//!
//! If the counters fail inside a window, an estimate fills the gap: the window's counted energy
//! times the ratio of its phase or of training; without one, the wall time at the mean measured
//! power; before any measurement, the counted energy. It is at most what the sensors' devices can
//! draw.
//!
//! Overshoot on a sensor: a step is admitted if it and everything reserved fit as predicted, so the
//! budget is exceeded by at most the excess of the last step and the reserve over their prediction.
//! With ratios of measured to counted energy between `lo` and `hi` that is at most `(hi - lo)`
//! times their counted energy.

use std::time::Instant;

use super::budget::{Budget, Limit};
use super::charge::Charge;
use super::entry::{Energies, Entry, GapFill, Lease, Phase, Totals};
use super::ledger::{GapTotals, Ledger, Recorded};
use super::ledger_file::now;
use super::meter::{Meters, Reading, Window};
use super::options::MeterKind;
use super::prediction::{Predictor, Sample, Statistic};
use super::spent::{Allowance, Spent};
use crate::error::Result;
use crate::units::{Joules, MicroJoules, Seconds};
use crate::work::Work;

/// Predicted duration of a lease, which is synced to disk once.
const LEASE_S: f64 = 1.0;

/// Whether the next step may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It fits the budget.
    Continue,
    /// It would exceed this limit.
    Stop(Limit),
}

/// Budget, meters and ledger of one run.
pub struct Account {
    budget: Budget,
    meters: Meters,
    ledger: Ledger,
    kind: MeterKind,
    /// Everything but wall time.
    spent: Spent,
    /// Wall time of the run's earlier processes.
    time_before: Seconds,
    started: Instant,
    /// Largest total that was predicted at an admission; within the budget.
    admitted: Option<MicroJoules>,
    window: Option<Window>,
    predictor: Predictor,
}

impl Account {
    /// An account on a new or resumed ledger, whose entries count as spent; `kind` is the deciding
    /// meter (`Meters::resolve`).
    pub fn new(budget: Budget, meters: Meters, ledger: Ledger, kind: MeterKind) -> Account {
        let spent = ledger.total().spent(kind);
        let time_before = ledger.elapsed();
        Account {
            budget,
            meters,
            ledger,
            kind,
            spent,
            time_before,
            started: Instant::now(),
            admitted: None,
            window: None,
            predictor: Predictor::default(),
        }
    }

    /// Counts wall time from `start`, where the process began to work for the run.
    pub fn started_at(mut self, start: Instant) -> Account {
        self.started = start;
        self
    }

    /// The deciding meter.
    pub fn kind(&self) -> MeterKind {
        self.kind
    }

    /// Limits and rates.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// The meters.
    pub fn meters(&self) -> &Meters {
        &self.meters
    }

    /// The amount spent so far on the deciding meter; time is wall time since the run began,
    /// earlier runs included.
    pub fn spent(&self) -> Spent {
        let elapsed = Seconds(self.started.elapsed().as_secs_f64());
        Spent {
            time: self.time_before + elapsed,
            ..self.spent
        }
    }

    /// The amount spent on one phase.
    pub fn spent_on(&self, phase: Phase) -> Spent {
        self.ledger.phase(phase).spent(self.kind)
    }

    /// Sums of each phase; they add up to `totals` exactly.
    pub fn by_phase(&self) -> impl Iterator<Item = (Phase, &Totals)> {
        self.ledger.by_phase()
    }

    /// Sums over all phases.
    pub fn totals(&self) -> &Totals {
        self.ledger.total()
    }

    /// Energy spent beyond the tightest limit; zero on the counted meter.
    pub fn overshoot(&self) -> MicroJoules {
        self.budget.overshoot(&self.spent())
    }

    /// Upper bound of the overshoot: energy spent beyond what was predicted at the last admission.
    /// `None` before any admission; zero on the counted meter.
    pub fn margin(&self) -> Option<MicroJoules> {
        self.admitted
            .map(|admitted| self.spent.energy.saturating_sub(admitted))
    }

    /// Entries whose counters failed, by phase and reason.
    pub fn gaps(&self) -> impl Iterator<Item = (Phase, &str, &GapTotals)> {
        self.ledger.gaps()
    }

    /// The limit with the largest fraction spent, and that fraction.
    pub fn largest_fraction(&self) -> Option<(Limit, f64)> {
        self.budget.largest_fraction(&self.spent())
    }

    /// Energy on the deciding meter over counted energy so far; one before any entry.
    pub fn metered_over_counted(&self) -> f64 {
        let ratio = self.spent.energy.joules() / self.totals().energy_j.counted.joules();
        if ratio.is_finite() && ratio > 0.0 {
            ratio
        } else {
            1.0
        }
    }

    /// Predicted cost of `works`, each charged as an entry; exact on the counted meter except for
    /// time.
    pub fn forecast(&self, works: &[(Phase, Work)]) -> Spent {
        works
            .iter()
            .map(|(phase, work)| self.predict(*phase, &self.charge_of(work)))
            .sum()
    }

    /// The amount that training may spend, in this run and the earlier ones of a resumed ledger,
    /// with `reserved` (final evaluation and save, every other one still planned) reserved. To be
    /// called once, before the first step.
    pub fn allowance(&self, reserved: &[(Phase, Work)]) -> Allowance {
        let all = self.spent();
        let training = self.spent_on(Phase::Train);
        let before = Spent {
            energy: all.energy.saturating_sub(training.energy),
            flops: all.flops.saturating_sub(training.flops),
            time: (all.time - training.time).max(Seconds::ZERO),
        };
        self.budget.allowance(&before, &self.forecast(reserved))
    }

    /// Whether the cost of all future work is exactly predictable: only counted energy and FLOPs
    /// are limited.
    pub fn is_predictable(&self) -> bool {
        self.kind == MeterKind::Counted && self.budget.remaining(&Spent::default()).time.is_none()
    }

    /// Progress of training in 0..=1 when its total is not predictable:
    /// `t / (spent on training + share * remainder)`. `t` is the amount spent on training at the
    /// midpoint of the step `next`; the remainder is what the budget leaves after `ending`; the
    /// share is that of a step in the cost of a step plus `overhead`, works with their frequency
    /// per step. One if nothing more fits.
    pub fn progress(
        &self,
        next: &Work,
        overhead: &[(Phase, Work, f64)],
        ending: &[(Phase, Work)],
    ) -> f64 {
        let expected =
            |phase, work: &Work| self.estimate(phase, &self.charge_of(work), Statistic::Mean);
        let step = expected(Phase::Train, next);
        let overhead: Spent = overhead
            .iter()
            .map(|(phase, work, frequency)| expected(*phase, work).scaled(*frequency))
            .sum();
        let committed = self.committed() + self.forecast(ending);
        let trained = self.spent_on(Phase::Train);
        self.budget
            .remaining(&committed)
            .with_trained(&trained, &step, &overhead)
            .fraction(&(trained + step.half()))
    }

    /// Whether `next` fits with `reserve` still possible after it. Writes nothing, so that
    /// preflight can call it too.
    pub fn fits(&self, phase: Phase, next: &Work, reserve: &[(Phase, Work)]) -> Verdict {
        let next = self.predict(phase, &self.charge_of(next));
        self.verdict(&next, &self.forecast(reserve))
    }

    /// As `fits`, immediately before `next` runs: on `Continue` the ledger has a lease that covers
    /// it.
    pub fn admit(
        &mut self,
        phase: Phase,
        next: &Work,
        reserve: &[(Phase, Work)],
    ) -> Result<Verdict> {
        let charge = self.charge_of(next);
        let predicted = self.predict(phase, &charge);
        let reserve = self.forecast(reserve);
        let verdict = self.verdict(&predicted, &reserve);
        if verdict == Verdict::Continue {
            if !self.is_leased(&predicted) {
                self.renew_lease(&charge, &predicted, &reserve)?;
            }
            let total = self.spent.energy + predicted.energy + reserve.energy;
            // An evaluation is admitted without a reserve, below the total of the step before it.
            self.admitted = self.admitted.max(Some(total));
        }
        Ok(verdict)
    }

    /// Opens the window that the next `charge` closes.
    pub fn begin(&mut self) {
        self.window = Some(self.meters.begin());
    }

    /// Closes the window (an empty one if none is open), charges `work` to it and enters it in the
    /// ledger.
    pub fn charge(&mut self, phase: Phase, step: u64, work: &Work) -> Result<Reading> {
        let window = self.window.take().unwrap_or_else(|| self.meters.begin());
        let reading = self.meters.end(window, work);
        let charge = &reading.charge;
        let entry = Entry {
            phase,
            step,
            energy_j: reading.energies(),
            flops: charge.flops,
            bytes: charge.bytes.clone(),
            breakdown: Some(charge.breakdown),
            wall_s: reading.wall,
            t: now(),
            gap: self.gap_fill(phase, &reading),
        };
        self.ledger.append(&entry)?;
        let energy = entry.on(self.kind);
        self.spent.energy += energy;
        self.spent.flops = self.spent.flops.saturating_add(charge.flops);
        let counted = reading.counted.joules();
        // The fill of a gap is an estimate, not an observation.
        let energy_ratio = if entry.gap.is_some() {
            f64::NAN
        } else {
            energy.joules() / counted
        };
        self.predictor.record(
            phase,
            Sample::new(energy_ratio, counted.0),
            Sample::new(reading.wall / charge.time, charge.time.0),
        );
        Ok(reading)
    }

    /// Flushes the ledger to disk and returns its sums, to be stored in a checkpoint.
    ///
    /// # Errors
    /// [`crate::error::Kind::Io`].
    pub fn record(&mut self) -> Result<Recorded> {
        self.ledger.record()
    }

    /// Refuses a ledger whose sums are below those of a checkpoint.
    ///
    /// # Errors
    /// [`crate::error::Kind::Run`].
    pub fn check_not_less(&self, earlier: &Recorded) -> Result<()> {
        self.ledger.check_not_less(earlier)
    }

    /// Ends the run in order: releases the lease and syncs the ledger to disk.
    pub fn close(&mut self) -> Result<()> {
        let elapsed = self.spent().time;
        self.ledger.settle(elapsed)
    }

    /// The estimate in place of failed counters; `None` if they did not fail.
    fn gap_fill(&self, phase: Phase, reading: &Reading) -> Option<GapFill> {
        let reason = reading.measured.as_ref()?.as_ref().err()?.reason.clone();
        let ratio = |phase| self.ledger.phase(phase).ratio();
        let (meter, factor) = match ratio(phase).or_else(|| ratio(Phase::Train)) {
            Some(ratio) => (MeterKind::Counted, ratio),
            None => match self.ledger.total().power_ratio() {
                Some(ratio) => (MeterKind::Timed, ratio),
                None => (MeterKind::Counted, 1.0),
            },
        };
        let energy = (reading.energies().on(meter).joules() * factor).rounded();
        let most = self.meters.max_power();
        let most = most.map(|power| (power * reading.wall).rounded());
        Some(GapFill {
            reason,
            meter,
            factor,
            energy_j: most.map_or(energy, |most| energy.min(most)),
        })
    }

    /// What is spent, and an estimate of what the counters have not shown yet.
    fn committed(&self) -> Spent {
        let mut spent = self.spent();
        if self.kind == MeterKind::Measured {
            let ratio = self.predictor.energy_ratio(Phase::Train, Statistic::Mean);
            spent.energy += Joules(self.predictor.unshown() * ratio.unwrap_or(1.0)).rounded();
        }
        spent
    }

    /// The charge of `work` on the run's profile.
    fn charge_of(&self, work: &Work) -> Charge {
        self.meters.profile().charge(work)
    }

    fn verdict(&self, next: &Spent, reserve: &Spent) -> Verdict {
        self.budget
            .admits(&self.committed(), next, reserve)
            .map_or_else(Verdict::Stop, |()| Verdict::Continue)
    }

    /// Upper bound of the cost of `charge`.
    fn predict(&self, phase: Phase, charge: &Charge) -> Spent {
        self.estimate(phase, charge, Statistic::UpperBound)
    }

    /// Converts a charge to energy on the deciding meter and wall time, by the recent ratios of its
    /// phase.
    fn estimate(&self, phase: Phase, charge: &Charge, statistic: Statistic) -> Spent {
        let recent = self.predictor.energy_ratio(phase, statistic);
        let ratio = match self.kind {
            MeterKind::Counted => None,
            MeterKind::Timed => Some(recent.unwrap_or(1.0)),
            MeterKind::Measured => {
                let earlier = || self.ledger.phase(phase).ratio();
                Some(recent.or_else(earlier).unwrap_or(1.0))
            }
        };
        let time_ratio = self.predictor.time_ratio(phase, statistic);
        Spent {
            energy: ratio.map_or(charge.energy, |ratio| {
                (charge.energy.joules() * ratio).rounded()
            }),
            flops: charge.flops,
            time: charge.time * time_ratio.unwrap_or(1.0),
        }
    }

    /// Whether the remainder of the last lease covers `predicted`.
    fn is_leased(&self, predicted: &Spent) -> bool {
        let lease = self.ledger.leased();
        lease.steps > 0
            && lease.energy_j.on(self.kind) >= predicted.energy
            && lease.flops >= predicted.flops
    }

    /// Leases as many steps like this one as run in about a second and fit the budget; one step
    /// until a step's wall time is known, from which the roofline may be far off.
    fn renew_lease(&mut self, charge: &Charge, step: &Spent, reserve: &Spent) -> Result<()> {
        let mut steps = if self.predictor.knows_step_time() {
            (LEASE_S / step.time.0.max(1e-3)).ceil() as u64
        } else {
            1
        };
        while steps > 1 && self.verdict(&step.repeated(steps), reserve) != Verdict::Continue {
            steps /= 2;
        }
        let total = step.repeated(steps);
        let timed = if self.kind == MeterKind::Timed {
            total.energy
        } else {
            (self.meters.timed_power() * total.time).rounded()
        };
        let lease = Lease {
            steps,
            energy_j: Energies {
                counted: MicroJoules(charge.energy.0.saturating_mul(steps)),
                measured: (self.kind == MeterKind::Measured).then_some(total.energy),
                timed,
            },
            flops: total.flops,
            time_s: total.time,
        };
        let elapsed = self.spent().time;
        self.ledger.lease(lease, elapsed)
    }
}

#[cfg(test)]
mod tests;

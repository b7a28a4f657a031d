//! Observer of the training loop: writes steps.jsonl and updates the screen.

use std::path::PathBuf;

use super::{Screen, StepView};
use crate::energy::Account;
use crate::error::{Error, Result};
use crate::report::StepLog;
use crate::report::steps::read_steps;
use crate::train::{Observer, StepRecord};
use crate::units::{Joules, Seconds};

/// Logs steps. A step's line is delayed for the validation loss that may follow, but not past a checkpoint.
pub(super) struct StepLogger<'a> {
    path: PathBuf,
    log: StepLog,
    pending: Option<StepRecord>,
    screen: &'a mut dyn Screen,
    view: StepView,
}

impl<'a> StepLogger<'a> {
    /// Appends to the log at `path`. `steps` is the step limit, `expected_steps` what fits the budget.
    pub(super) fn new(
        path: PathBuf,
        screen: &'a mut dyn Screen,
        steps: u64,
        expected_steps: u64,
    ) -> Result<Self> {
        let (spent, train_wall) = (Joules::ZERO, Seconds::ZERO);
        let log = StepLog::append_to(&path)?;
        let view = StepView {
            steps,
            expected_steps,
            spent,
            budget: None,
            done: 0,
            tokens: 0,
            train_wall,
        };
        Ok(Self {
            path,
            log,
            pending: None,
            screen,
            view,
        })
    }

    /// Adds the validation loss to the last line if a checkpoint came between. The log is replaced atomically, because the
    /// checkpoint relies on its line.
    fn amend(&mut self, step: u64, val_loss: f64) -> Result<()> {
        let mut lines = read_steps(&self.path)?;
        let Some(line) = lines.last_mut().filter(|line| line.step == step) else {
            return Ok(());
        };
        line.val_loss = Some(val_loss);
        self.log = StepLog::replace(&self.path, &lines)?;
        Ok(())
    }

    /// Writes the pending line.
    pub(super) fn flush(&mut self) -> Result<()> {
        match self.pending.take() {
            Some(line) => self.log.write(&line),
            None => Ok(()),
        }
    }
}

impl Observer for StepLogger<'_> {
    fn step(&mut self, record: &StepRecord, account: &Account) -> Result<()> {
        self.flush()?;
        self.view.spent = account.spent().energy.joules();
        self.view.budget = account
            .largest_fraction()
            .map(|(limit, part)| (limit.as_str(), part));
        self.view.done += 1;
        self.view.tokens += record.tokens;
        self.view.train_wall += record.wall_s;
        self.screen.step(record, &self.view);
        self.pending = Some(record.clone());
        Ok(())
    }

    fn evaluating(&mut self, done: usize, of: usize) {
        self.screen.evaluating(done, of);
    }

    fn evaluated(&mut self, step: u64, val_loss: f64) -> Result<()> {
        self.screen.evaluated(step, val_loss);
        if !val_loss.is_finite() {
            return self.flush();
        }
        match &mut self.pending {
            Some(line) => {
                line.val_loss = Some(val_loss);
                self.flush()
            }
            None if step > 0 => self.amend(step, val_loss),
            None => Ok(()),
        }
    }

    fn saving(&mut self) -> Result<()> {
        self.flush()?;
        let synced = std::fs::File::open(&self.path).and_then(|file| file.sync_all());
        synced.map_err(|source| Error::io("sync", &self.path, source))
    }
}

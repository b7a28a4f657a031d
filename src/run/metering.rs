//! The meters beside another program: windows of energy by phase, a budget, the ledger and emissions files of a run.
//!
//! Takes the end of each window with its phase, returns the energy on the meters that do not need to know the work: the counters,
//! else rated power x time. Nothing is counted: what the other program computes is not known here.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use super::machine::environment;
use super::reporting::{EmissionsOf, emissions_row};
use super::{DeviceChoice, limit_of};
use crate::energy::meter::Window;
use crate::energy::{
    Budget, Computing, DeviceRef, Grid, GridRef, Limit, Limits, MeterKind, Meters, Phase, Profile,
    Rates, Spent, carbon,
};
use crate::error::{Error, Kind, Result};
use crate::files::create_atomic;
use crate::report::emissions::Totals;
use crate::units::{MicroJoules, Pue, Seconds};
use crate::work::Work;

/// Steps that the cost of the next one is predicted from.
const RECENT: usize = 20;
/// The ledger is flushed to disk at most so often.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// What is metered, and how.
#[derive(Debug, Clone)]
pub struct MeterRequest {
    /// A directory for ledger.jsonl and emissions.csv.
    pub out: Option<PathBuf>,
    /// The device whose counter is read.
    pub device: DeviceChoice,
    /// Its profile.
    pub profile: DeviceRef,
    /// `None`: measured where the counters are complete, else timed.
    pub meter: Option<MeterKind>,
    /// The electricity grid.
    pub grid: GridRef,
    /// The facility's energy over the machine's own.
    pub pue: Pue,
    /// Limits, each with its unit.
    pub budgets: Vec<String>,
}

/// Open meters.
pub struct Metering {
    meters: Meters,
    kind: MeterKind,
    budget: Budget,
    grid: Grid,
    files: Option<Files>,
    window: Window,
    spent: Spent,
    /// Recent training steps.
    steps: VecDeque<Spent>,
    /// The most expensive evaluation and save.
    largest_eval: Spent,
    largest_save: Spent,
}

/// One window, and the sums so far: a line of `wattune meter --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MeterLine {
    /// What the window was spent on.
    pub phase: Phase,
    /// The training step.
    pub step: u64,
    /// Energy on the deciding meter, joules.
    pub energy_j: f64,
    /// Wall time.
    pub wall_s: Seconds,
    /// The deciding meter.
    pub meter: MeterKind,
    /// Why the counters failed in this window: rated power x time is in their place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<String>,
    /// All windows so far, joules.
    pub total_j: f64,
    /// The same in grams of CO2e, the facility's overhead included.
    pub gco2e: f64,
    /// Fraction spent of the limit nearest to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget_spent: Option<f64>,
    /// The limit that another step, with an evaluation and a save after it, would pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<Limit>,
}

impl Metering {
    /// Opens the meters and the first window; creates the directory.
    ///
    /// # Errors
    /// A device, profile, grid or budget that is not known, a meter that is absent, files that exist.
    pub fn open(request: &MeterRequest) -> Result<Self> {
        let computing = computing(request.device);
        let profile = Profile::resolve(&request.profile, computing)?;
        let grid = Grid::resolve(&request.grid)?;
        let rates = Rates {
            grid: grid.gco2e_per_kwh,
            pue: request.pue,
            price: None,
        };
        let budget = Budget::new(limits(&request.budgets)?, rates)?;
        let mut meters = Meters::open(profile, computing, request.meter);
        let kind = match meters.resolve(request.meter)? {
            MeterKind::Counted if request.meter.is_none() => MeterKind::Timed,
            MeterKind::Counted => return Err(not_counted()),
            kind => kind,
        };
        let files = request.out.as_deref().map(Files::create).transpose()?;
        Ok(Self {
            window: meters.begin(),
            meters,
            kind,
            budget,
            grid,
            files,
            spent: Spent::default(),
            steps: VecDeque::new(),
            largest_eval: Spent::default(),
            largest_save: Spent::default(),
        })
    }

    /// The deciding meter.
    pub fn kind(&self) -> MeterKind {
        self.kind
    }

    /// Why the counters do not decide, with the remedy.
    pub fn not_measured(&self) -> Option<String> {
        let absent = self.meters.absent()?;
        Some(format!("{}; {}", absent.reason, absent.remedy))
    }

    /// Ends the window as part of `phase` and opens the next.
    ///
    /// # Errors
    /// A ledger that cannot be written.
    pub fn end_window(&mut self, phase: Phase, step: u64) -> Result<MeterLine> {
        let next = self.meters.begin();
        let window = std::mem::replace(&mut self.window, next);
        let reading = self.meters.end(window, &Work::default());
        let (measured, gap) = match &reading.measured {
            Some(Ok(energy)) => (Some(*energy), None),
            Some(Err(gap)) => (None, Some(gap.reason.clone())),
            None => (None, None),
        };
        let energy = match self.kind {
            MeterKind::Measured => measured.unwrap_or(reading.timed),
            _ => reading.timed,
        };
        let cost = Spent {
            energy,
            time: reading.wall,
            ..Spent::default()
        };
        self.note(phase, cost);
        if let Some(files) = &mut self.files {
            files.append(&json!({
                "phase": phase,
                "step": step,
                "energy_j": {
                    "counted": null,
                    "measured": measured.map(|energy| energy.joules().0),
                    "timed": reading.timed.joules().0,
                },
                "wall_s": reading.wall,
                "t": unix_seconds(),
            }))?;
        }
        let rates = self.budget.rates();
        let total = self.spent.energy.joules();
        Ok(MeterLine {
            phase,
            step,
            energy_j: energy.joules().0,
            wall_s: reading.wall,
            meter: self.kind,
            gap: gap.filter(|_| self.kind == MeterKind::Measured),
            total_j: total.0,
            gco2e: carbon(total, rates.pue, rates.grid).0,
            budget_spent: self
                .budget
                .largest_fraction(&self.spent)
                .map(|(_, part)| part),
            stop: self.stop(),
        })
    }

    fn note(&mut self, phase: Phase, cost: Spent) {
        self.spent += cost;
        match phase {
            Phase::Train => {
                self.steps.push_back(cost);
                if self.steps.len() > RECENT {
                    self.steps.pop_front();
                }
            }
            Phase::Eval => self.largest_eval = larger(self.largest_eval, cost),
            Phase::Save => self.largest_save = larger(self.largest_save, cost),
            Phase::Load | Phase::Lost => {}
        }
    }

    fn stop(&self) -> Option<Limit> {
        let reserve = self.largest_eval + self.largest_save;
        let next = upper_bound(&self.steps);
        self.budget.admits(&self.spent, &next, &reserve).err()
    }

    /// Writes emissions.csv; returns its path and that of the ledger.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn finish(self) -> Result<Option<PathBuf>> {
        let Some(mut files) = self.files else {
            return Ok(None);
        };
        files.sync()?;
        let energy = self.spent.energy.joules();
        let rates = self.budget.rates();
        let name = files
            .folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let row = emissions_row(EmissionsOf {
            name: &name,
            run_id: "",
            profile: self.meters.profile(),
            grid: &self.grid,
            energy,
        });
        let csv = row.row(&Totals {
            wall: self.spent.time,
            energy,
            emissions: carbon(energy, rates.pue, rates.grid),
            pue: rates.pue,
            meter: self.kind,
            environment: &environment(),
        })?;
        create_atomic(&files.folder.join("emissions.csv"), csv)?;
        Ok(Some(files.folder))
    }
}

/// The device's counter; opens no device.
fn computing(device: DeviceChoice) -> Computing {
    match device {
        DeviceChoice::Cuda(index) => Computing::Nvidia(index as u32),
        DeviceChoice::Metal(_) => Computing::Other,
        DeviceChoice::Cpu | DeviceChoice::Auto => Computing::Cpu,
    }
}

fn limits(texts: &[String]) -> Result<Limits> {
    let mut limits = Limits::default();
    for text in texts {
        match limit_of(text)? {
            "budget.energy" => limits.energy = text.parse().ok(),
            "budget.carbon" => limits.carbon = text.parse().ok(),
            "budget.time" => limits.time = text.parse().ok(),
            _ => {
                return Err(
                    Error::new(Kind::Usage, "the work of another program is not counted")
                        .value(text.clone())
                        .rule("a limit of energy, carbon or time")
                        .hint("write `--budget \"5 Wh\"`"),
                );
            }
        }
    }
    Ok(limits)
}

fn not_counted() -> Error {
    Error::new(Kind::Usage, "the work of another program is not counted")
        .at("--meter")
        .value("counted")
        .rule("measured or timed")
        .hint("leave `--meter` out: measured where the counters can be read, else timed")
}

fn larger(one: Spent, other: Spent) -> Spent {
    Spent {
        energy: one.energy.max(other.energy),
        time: one.time.max(other.time),
        ..one
    }
}

/// Mean and three standard deviations of the recent steps.
fn upper_bound(steps: &VecDeque<Spent>) -> Spent {
    let bound = |amount: &dyn Fn(&Spent) -> f64| {
        let count = steps.len().max(1) as f64;
        let mean = steps.iter().map(amount).sum::<f64>() / count;
        let squares = steps.iter().map(|step| (amount(step) - mean).powi(2));
        mean + 3.0 * (squares.sum::<f64>() / count).sqrt()
    };
    Spent {
        energy: MicroJoules(bound(&|step| step.energy.0 as f64).ceil() as u64),
        time: Seconds(bound(&|step| step.time.0)),
        ..Spent::default()
    }
}

fn unix_seconds() -> f64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0.0, |time| time.as_secs_f64())
}

/// The directory with the ledger.
struct Files {
    folder: PathBuf,
    ledger: File,
    synced: Instant,
}

impl Files {
    fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let path = folder.join("ledger.jsonl");
        let first = json!({ "run": "meter", "t": unix_seconds() });
        create_atomic(&path, format!("{first}\n"))?;
        let ledger = File::options().append(true).open(&path);
        Ok(Self {
            folder: folder.to_path_buf(),
            ledger: ledger.map_err(|e| Error::io("open", &path, e))?,
            synced: Instant::now(),
        })
    }

    fn append(&mut self, line: &Value) -> Result<()> {
        writeln!(self.ledger, "{line}").map_err(|e| self.failed("write", e))?;
        if self.synced.elapsed() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        self.ledger.sync_data().map_err(|e| self.failed("sync", e))
    }

    fn failed(&self, doing: &str, source: std::io::Error) -> Error {
        Error::io(doing, &self.folder.join("ledger.jsonl"), source).while_running()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spent(energy: u64, seconds: f64) -> Spent {
        Spent {
            energy: MicroJoules(energy),
            time: Seconds(seconds),
            ..Spent::default()
        }
    }

    /// By hand: mean 20, population deviation 10; 20 + 3 x 10.
    #[test]
    fn the_next_step_is_bounded_by_mean_and_three_deviations() {
        let steps = VecDeque::from([spent(10, 1.0), spent(30, 1.0)]);
        let bound = upper_bound(&steps);
        assert_eq!((bound.energy, bound.time), (MicroJoules(50), Seconds(1.0)));
        assert_eq!(upper_bound(&VecDeque::new()).energy, MicroJoules(0));
    }

    fn request(budgets: &[&str]) -> MeterRequest {
        MeterRequest {
            out: None,
            device: DeviceChoice::Cpu,
            profile: DeviceRef::Named {
                name: "raspberry-pi-5".into(),
                cores: None,
            },
            meter: Some(MeterKind::Timed),
            grid: GridRef::Named("world".into()),
            pue: Pue::ONE,
            budgets: budgets.iter().map(|text| text.to_string()).collect(),
        }
    }

    /// Two steps of 400 of 1000 leave no room for a third, nor one beside an evaluation of 300.
    #[test]
    fn another_step_is_admitted_only_with_its_evaluation_and_save() {
        let mut metering = Metering::open(&request(&["1 mJ"])).unwrap();
        metering.note(Phase::Train, spent(400, 0.0));
        assert_eq!(metering.stop(), None);
        metering.note(Phase::Eval, spent(100, 0.0));
        assert_eq!(metering.stop(), None);
        metering.note(Phase::Save, spent(101, 0.0));
        assert_eq!(metering.stop(), Some(Limit::Energy));
    }

    #[test]
    fn work_is_refused_by_name() {
        let error = Metering::open(&request(&["1e15 FLOP"])).err().unwrap();
        assert!(error.to_string().contains("not counted"), "{error}");
        let counted = MeterRequest {
            meter: Some(MeterKind::Counted),
            ..request(&[])
        };
        assert!(Metering::open(&counted).is_err());
    }
}

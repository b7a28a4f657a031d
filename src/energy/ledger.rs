//! The ledger: what was spent, line by line, on disk.
//!
//! Owns `ledger.jsonl`: append-only, one JSON object a line, totals in whole microjoules. Takes entries and leases, returns
//! totals by phase and by meter; after a crash, what was leased and never entered counts as spent. Knows nothing of budgets or
//! meters, nor what a phase does.
//!
//! ```text
//! {"phase":"train","step":7,"energy_j":{"counted":41.2,"measured":null,"timed":39.0},"flops":..,"bytes":{..},"wall_s":..,"t":..}
//! {"lease":{"steps":12,"energy_j":{..},"flops":..,"time_s":..},"t":..}      written and synced before those steps run
//! {"settled":true,"t":..}                                                   a clean close: the lease is released
//! {"run":"5f3c..","t":..}                                                   the first line: the digest of what the run was begun with
//! ```
//!
//! An entry whose counters failed has `"measured":null` and beside it what fills the gap:
//! `"gap":{"reason":"rapl: the counter fell back ...","filled":"counted","times":1.08,"energy_j":44.5}`.
//!
//! Entries are written at once but not synced. Whatever a crash or a power cut took since the last synced line is covered by the
//! lease in that line: on resume, lease less the entries after it becomes an entry of phase "lost".

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::entry::as_joules;
pub use super::entry::{Energies, Entry, Filled, Lease, Phase, Totals};
use super::traffic::Traffic;
use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::units::{MicroJoules, Seconds};

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Entry(Entry),
    Lease { lease: Lease, t: f64 },
    Settled { settled: bool, t: f64 },
    Run { run: String, t: f64 },
}

/// The sums of a ledger at one moment: the same ledger never holds less later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// Counted energy.
    #[serde(with = "as_joules")]
    pub counted_j: MicroJoules,
    /// FLOPs of matrix products and attention.
    pub flops: u64,
}

/// Every entry of the ledger at `path`, in the order of spending; leases, and a last line cut short, are passed over.
///
/// # Errors
/// [`Kind::Io`]; [`Kind::Run`] naming file and line of a whole line that is none.
pub fn read_entries(path: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    read_lines(path, |line| {
        if let Line::Entry(entry) = line {
            entries.push(entry);
        }
    })?;
    Ok(entries)
}

/// Gives `take` every whole line, in order; returns the bytes of whole lines, and of the file.
fn read_lines(path: &Path, mut take: impl FnMut(Line)) -> Result<[usize; 2]> {
    let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let whole = text
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |end| end + 1);
    for (number, line) in text[..whole]
        .split(|byte| *byte == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
    {
        take(serde_json::from_slice(line).map_err(|e| damaged(path, number + 1, &e))?);
    }
    Ok([whole, text.len()])
}

/// Keeps the ledger to this process until it ends, however it does.
///
/// # Errors
/// [`Kind::Run`] where another process has it.
fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Error::new(
            Kind::Run,
            "another process is at work in this run",
        )
        .at(path.display().to_string())
        .rule("one process at a time trains in a run directory")
        .hint("wait until it has ended, or stop it and resume the run then")),
        // Some file systems have no locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// The file and its sums.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    lease: Lease,
    /// One for each of `Phase::ALL`.
    phases: [Totals; 5],
    total: Totals,
    gaps: BTreeMap<(Phase, String), Gapped>,
}

/// The gaps of one phase for one reason.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Gapped {
    /// Entries.
    pub entries: u64,
    /// Their wall time.
    pub wall_s: Seconds,
    /// What fills them.
    pub energy: MicroJoules,
}

impl Ledger {
    /// A new ledger whose first line is the digest `run` of the recipe, model and data; complete or absent.
    ///
    /// # Errors
    /// [`Kind::Io`], also if a file is there.
    pub fn create_for_run(path: &Path, run: &str) -> Result<Ledger> {
        let line = Line::Run {
            run: run.to_string(),
            t: now(),
        };
        if path.exists() {
            return Err(Error::io(
                "create",
                path,
                std::io::ErrorKind::AlreadyExists.into(),
            ));
        }
        write_atomic(path, text_of(&line))?;
        Self::resume_run(path, run)
    }

    /// A new ledger; a file already there is refused.
    pub fn create(path: &Path) -> Result<Ledger> {
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(path)
            .map_err(|e| Error::io("create", path, e))?;
        lock(&file, path)?;
        Ok(Self::on(path, file))
    }

    fn on(path: &Path, file: File) -> Ledger {
        let (phases, total) = (Default::default(), Totals::default());
        Ledger {
            path: path.to_path_buf(),
            file,
            lease: Lease::default(),
            phases,
            total,
            gaps: BTreeMap::new(),
        }
    }

    /// The ledger of a run to be continued: a half-written last line is cut off, and a lease that was never settled is entered
    /// as lost, on disk, before anything else.
    ///
    /// # Errors
    /// [`Kind::Io`]; [`Kind::Run`] if a line is damaged or another process has the ledger.
    pub fn resume(path: &Path) -> Result<Ledger> {
        Self::reopen(path, None)
    }

    /// The same for the ledger of [`Ledger::create_for_run`]; `run` is today's digest of the recipe, model and data.
    ///
    /// # Errors
    /// As [`Ledger::resume`]; also [`Kind::Run`] if the ledger is empty or was begun under another digest.
    pub fn resume_run(path: &Path, run: &str) -> Result<Ledger> {
        Self::reopen(path, Some(run))
    }

    fn reopen(path: &Path, run: Option<&str>) -> Result<Ledger> {
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|e| Error::io("open", path, e))?;
        lock(&file, path)?;
        let mut ledger = Self::on(path, file);
        let mut step = 0;
        let mut begun_as = None;
        let [whole, all] = read_lines(path, |line| match line {
            Line::Entry(entry) => {
                step = entry.step;
                ledger.note(&entry);
            }
            Line::Lease { lease, .. } => ledger.lease = lease,
            Line::Settled { .. } => ledger.lease = Lease::default(),
            Line::Run { run, .. } => begun_as = Some(run),
        })?;
        if run.is_some() && whole == 0 {
            return Err(lost_entries(path, "it is empty"));
        }
        if let (Some(run), Some(begun_as)) = (run, begun_as)
            && run != begun_as
        {
            return Err(changed_inputs(path));
        }
        if whole < all {
            ledger
                .file
                .set_len(whole as u64)
                .map_err(|e| Error::io("cut the half-written last line of", path, e))?;
        }
        ledger.enter_what_was_lost(step)?;
        Ok(ledger)
    }

    /// Flushes the ledger to disk and returns its sums.
    pub fn record(&mut self) -> Result<Recorded> {
        self.sync()?;
        Ok(Recorded {
            counted_j: self.total.energy_j.counted,
            flops: self.total.flops,
        })
    }

    /// Refuses a ledger that holds less than it did at `earlier`.
    ///
    /// # Errors
    /// [`Kind::Run`].
    pub fn check_not_less(&self, earlier: &Recorded) -> Result<()> {
        let total = &self.total;
        if total.energy_j.counted >= earlier.counted_j && total.flops >= earlier.flops {
            return Ok(());
        }
        let why = format!(
            "it holds {}, and a checkpoint was written when it held {}",
            total.energy_j.counted.joules(),
            earlier.counted_j.joules()
        );
        Err(lost_entries(&self.path, &why))
    }

    /// Appends an entry. Not synced: the lease covers it.
    pub fn append(&mut self, entry: &Entry) -> Result<()> {
        self.write(&Line::Entry(entry.clone()))?;
        self.note(entry);
        Ok(())
    }

    /// Pays for steps before they run, in place of what is left of the last lease; on disk when this returns.
    pub fn lease(&mut self, lease: Lease) -> Result<()> {
        self.write(&Line::Lease { lease, t: now() })?;
        self.sync()?;
        self.lease = lease;
        Ok(())
    }

    /// What is left of the last lease.
    pub fn leased(&self) -> &Lease {
        &self.lease
    }

    /// Ends a run in order: the lease is released, and everything is on disk.
    pub fn settle(&mut self) -> Result<()> {
        self.write(&Line::Settled {
            settled: true,
            t: now(),
        })?;
        self.sync()?;
        self.lease = Lease::default();
        Ok(())
    }

    /// Sums over everything.
    pub fn total(&self) -> &Totals {
        &self.total
    }

    /// Sums over one phase; the phases' sums add up to the total exactly.
    pub fn phase(&self, phase: Phase) -> &Totals {
        &self.phases[phase as usize]
    }

    /// Each phase with its sums, in the order of a run.
    pub fn by_phase(&self) -> impl Iterator<Item = (Phase, &Totals)> {
        Phase::ALL.into_iter().zip(&self.phases)
    }

    /// The entries whose counters failed, by phase and reason.
    pub fn gaps(&self) -> impl Iterator<Item = (Phase, &str, &Gapped)> {
        self.gaps
            .iter()
            .map(|((phase, reason), gapped)| (*phase, reason.as_str(), gapped))
    }

    /// Measured over counted, of everything that was measured: of the phase, else of the whole run. What a crash took was never measured.
    pub fn ratio(&self, phase: Phase) -> Option<f64> {
        self.phase(phase).ratio().or_else(|| {
            let mut measured = Totals::default();
            self.by_phase()
                .filter(|(phase, _)| *phase != Phase::Lost)
                .for_each(|(_, totals)| measured.add_measured(totals));
            measured.ratio()
        })
    }

    fn note(&mut self, entry: &Entry) {
        if let Some(filled) = &entry.gap {
            let gapped = self
                .gaps
                .entry((entry.phase, filled.reason.clone()))
                .or_default();
            gapped.entries += 1;
            gapped.wall_s += entry.wall_s;
            gapped.energy += filled.energy_j;
        }
        self.total.add(entry);
        self.phases[entry.phase as usize].add(entry);
        self.lease = self.lease.less(entry);
    }

    fn enter_what_was_lost(&mut self, step: u64) -> Result<()> {
        let Lease {
            steps,
            energy_j,
            flops,
            time_s,
        } = self.lease;
        if steps == 0 || energy_j == Energies::default() && flops == 0 {
            self.lease = Lease::default();
            return Ok(());
        }
        let lost = Entry {
            phase: Phase::Lost,
            step,
            energy_j,
            flops,
            bytes: Traffic::new(),
            parts: None,
            wall_s: time_s,
            t: now(),
            gap: None,
        };
        self.append(&lost)?;
        self.settle()
    }

    fn write(&mut self, line: &Line) -> Result<()> {
        self.file
            .write_all(text_of(line).as_bytes())
            .map_err(|e| Error::io("write", &self.path, e).while_running())
    }

    fn sync(&mut self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::io("sync", &self.path, e).while_running())
    }
}

fn text_of(line: &Line) -> String {
    let mut text = serde_json::to_string(line).expect("a line holds numbers and words only");
    text.push('\n');
    text
}

/// The error of a run that is continued under another recipe, model or data than it was begun with.
pub fn changed_inputs(place: &Path) -> Error {
    Error::new(
        Kind::Run,
        "the recipe, the model or the data are no longer those that this run began with",
    )
    .at(place.display().to_string())
    .hint(
        "put back what was changed (`recipe.toml` in the run directory, data files, a moved branch of the hub), or start a new run with another `--out`",
    )
}

fn lost_entries(path: &Path, why: &str) -> Error {
    Error::new(
        Kind::Run,
        "the ledger has lost entries: what this run has spent is not known",
    )
    .at(path.display().to_string())
    .value(why)
    .rule("a resumed run has what is left of its budget")
    .hint("restore the file, or start a new run with another `--out`")
}

fn damaged(path: &Path, line: usize, source: &serde_json::Error) -> Error {
    Error::new(
        Kind::Run,
        format!("the ledger holds a line that is none: {source}"),
    )
    .at(format!("{}, line {line}", path.display()))
    .rule("only the last line may be cut short, by a crash")
    .hint("the file was edited or the disk is damaged: restore it, or start a new run")
}

/// Unix seconds.
pub(super) fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::super::budget::Spent;
    use super::super::options::MeterKind;
    use super::*;
    use crate::units::Bytes;

    fn energies(counted: u64, measured: Option<u64>, timed: u64) -> Energies {
        Energies {
            counted: MicroJoules(counted),
            measured: measured.map(MicroJoules),
            timed: MicroJoules(timed),
        }
    }

    fn entry(phase: Phase, step: u64, energy_j: Energies) -> Entry {
        let bytes = Traffic::from([("dram".to_string(), Bytes(5))]);
        Entry {
            phase,
            step,
            energy_j,
            flops: 100,
            bytes,
            parts: None,
            wall_s: Seconds(0.5),
            t: now(),
            gap: None,
        }
    }

    #[test]
    fn phases_add_up_to_the_total_on_every_meter() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::create(&dir.path().join("ledger.jsonl")).unwrap();
        ledger
            .append(&entry(Phase::Load, 0, energies(3, Some(4), 5)))
            .unwrap();
        ledger
            .append(&entry(Phase::Train, 1, energies(10, None, 20)))
            .unwrap();
        ledger
            .append(&entry(Phase::Train, 2, energies(10, Some(7), 20)))
            .unwrap();
        assert_eq!(ledger.total().energy_j, energies(23, Some(11), 45));
        for kind in [MeterKind::Counted, MeterKind::Measured, MeterKind::Timed] {
            assert_eq!(
                ledger
                    .by_phase()
                    .map(|(_, t)| t.on(kind))
                    .sum::<MicroJoules>(),
                ledger.total().on(kind)
            );
        }
        // The unmeasured step counts its 10 counted microjoules on a measured budget.
        assert_eq!(ledger.total().on(MeterKind::Measured), MicroJoules(21));
        assert_eq!(
            (ledger.total().unmeasured, ledger.phase(Phase::Train).flops),
            (1, 200)
        );
        assert!(Ledger::create(&dir.path().join("ledger.jsonl")).is_err());
    }

    #[test]
    fn a_gap_is_remembered_with_what_fills_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut ledger = Ledger::create(&path).unwrap();
        ledger
            .append(&entry(Phase::Train, 1, energies(10, Some(20), 5)))
            .unwrap();
        for step in 2..4 {
            let filled = Filled {
                reason: "rapl: reset".to_string(),
                filled: MeterKind::Counted,
                times: 2.0,
                energy_j: MicroJoules(22),
            };
            ledger
                .append(&Entry {
                    gap: Some(filled),
                    ..entry(Phase::Train, step, energies(11, None, 5))
                })
                .unwrap();
        }
        let check = |ledger: &Ledger| {
            // 20 measured and twice 22 filled; the ratio is of what was measured alone.
            assert_eq!(ledger.total().on(MeterKind::Measured), MicroJoules(64));
            assert_eq!(
                (ledger.ratio(Phase::Train), ledger.ratio(Phase::Eval)),
                (Some(2.0), Some(2.0))
            );
            let gapped = Gapped {
                entries: 2,
                wall_s: Seconds(1.0),
                energy: MicroJoules(44),
            };
            assert_eq!(
                ledger.gaps().collect::<Vec<_>>(),
                [(Phase::Train, "rapl: reset", &gapped)]
            );
        };
        check(&ledger);
        drop(ledger);
        check(&Ledger::resume(&path).unwrap());
    }

    #[test]
    fn a_crash_costs_the_rest_of_the_lease_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut ledger = Ledger::create(&path).unwrap();
        let lease = Lease {
            steps: 4,
            energy_j: energies(40, None, 80),
            flops: 400,
            time_s: Seconds(2.0),
        };
        ledger.lease(lease).unwrap();
        ledger
            .append(&entry(Phase::Train, 1, energies(10, None, 20)))
            .unwrap();
        drop(ledger);
        // The power cut comes in the middle of the second entry.
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend_from_slice(b"{\"phase\":\"train\",\"step\":2,\"ener");
        std::fs::write(&path, torn).unwrap();
        for _ in 0..2 {
            // One step of four is entered, three are lost: 30 counted, 60 timed, 300 FLOPs, 1.5 s; and only once.
            let ledger = Ledger::resume(&path).unwrap();
            assert_eq!(ledger.phase(Phase::Lost).energy_j, energies(30, None, 60));
            assert_eq!(
                ledger.total().spent(MeterKind::Counted),
                Spent {
                    energy: MicroJoules(40),
                    flops: 400,
                    time: Seconds(2.0)
                }
            );
        }
    }

    #[test]
    fn a_clean_close_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut ledger = Ledger::create(&path).unwrap();
        ledger
            .lease(Lease {
                steps: 9,
                energy_j: energies(90, Some(90), 90),
                flops: 9,
                time_s: Seconds(9.0),
            })
            .unwrap();
        ledger
            .append(&entry(Phase::Train, 1, energies(10, Some(9), 20)))
            .unwrap();
        ledger.settle().unwrap();
        drop(ledger);
        let again = Ledger::resume(&path).unwrap();
        assert_eq!(again.total().energy_j, energies(10, Some(9), 20));
    }

    #[test]
    fn microjoules_survive_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let odd = energies(123_456_789_012_345, Some(1), 999_999_999_999);
        let mut ledger = Ledger::create(&path).unwrap();
        ledger.append(&entry(Phase::Save, 3, odd)).unwrap();
        drop(ledger);
        assert_eq!(Ledger::resume(&path).unwrap().total().energy_j, odd);
    }

    #[test]
    fn one_process_at_a_time_spends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut ledger = Ledger::create(&path).unwrap();
        ledger
            .append(&entry(Phase::Load, 0, energies(1, None, 1)))
            .unwrap();
        let error = Ledger::resume(&path).unwrap_err();
        assert!(
            error.kind() == Kind::Run && error.to_string().contains("another process"),
            "{error}"
        );
        // Reading is free.
        assert_eq!(read_entries(&path).unwrap().len(), 1);
        drop(ledger);
        Ledger::resume(&path).unwrap();
    }

    #[test]
    fn a_ledger_that_lost_entries_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut ledger = Ledger::create_for_run(&path, "digest").unwrap();
        for step in 0..3 {
            ledger
                .append(&entry(Phase::Train, step, energies(10, None, 1)))
                .unwrap();
        }
        let recorded = ledger.record().unwrap();
        ledger.check_not_less(&recorded).unwrap();
        drop(ledger);
        let whole = std::fs::read_to_string(&path).unwrap();
        assert!(Ledger::create_for_run(&path, "digest").is_err());
        let reopened = Ledger::resume_run(&path, "digest").unwrap();
        reopened.check_not_less(&recorded).unwrap();
        drop(reopened);
        let error = Ledger::resume_run(&path, "another recipe").unwrap_err();
        assert!(error.to_string().contains("no longer those"), "{error}");
        // Cut at a line: the entries that are left do not add up to what the checkpoint recorded.
        let cut: String = whole.split_inclusive('\n').take(3).collect();
        std::fs::write(&path, cut).unwrap();
        let short = Ledger::resume_run(&path, "digest").unwrap();
        let error = short.check_not_less(&recorded).unwrap_err().to_string();
        assert!(error.contains("lost entries"), "{error}");
        drop(short);
        for damaged in ["".to_string(), "\0".repeat(whole.len())] {
            std::fs::write(&path, damaged).unwrap();
            let error = Ledger::resume_run(&path, "digest").unwrap_err().to_string();
            assert!(error.contains("lost entries"), "{error}");
        }
    }

    #[test]
    fn a_damaged_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger.jsonl");
        let mut ledger = Ledger::create(&path).unwrap();
        ledger
            .append(&entry(Phase::Load, 0, energies(1, None, 1)))
            .unwrap();
        ledger
            .append(&entry(Phase::Load, 0, energies(1, None, 1)))
            .unwrap();
        drop(ledger);
        let text = std::fs::read_to_string(&path)
            .unwrap()
            .replacen("load", "lunch", 1);
        std::fs::write(&path, text).unwrap();
        let error = Ledger::resume(&path).unwrap_err();
        assert!(
            error.kind() == Kind::Run && error.to_string().contains("line 1"),
            "{error}"
        );
    }
}

//! The run directory: file names, creation and opening.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::files::{DraftDirectory, remove_old_leftovers, write_atomic};

const RECIPE: &str = "recipe.toml";
const PLAN: &str = "plan.json";

/// The folder of one run.
#[derive(Debug, Clone)]
pub struct RunDirectory(PathBuf);

impl RunDirectory {
    /// A new directory that holds the resolved recipe and its forecast; complete or absent. An existing one that holds anything is
    /// refused.
    pub fn create(path: &Path, recipe: &str, plan: &str) -> Result<Self> {
        let taken = || {
            Error::new(Kind::Run, "the run directory exists already")
                .at(path.display().to_string())
                .rule("a run never overwrites another")
                .hint(format!(
                    "choose another with `--out DIR`, or continue that run with `--resume {}`",
                    path.display()
                ))
        };
        let occupied = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        if occupied || path.is_file() {
            return Err(taken());
        }
        let run = Self(path.to_path_buf());
        if path.is_dir() {
            // A mount point or the current directory cannot be replaced. Of two runs that start at once, one makes the file.
            write_atomic(&run.plan(), plan)?;
            return match File::create_new(run.recipe()) {
                Ok(_) => write_atomic(&run.recipe(), recipe).map(|()| run),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(taken()),
                Err(e) => Err(Error::io("create", &run.recipe(), e)),
            };
        }
        if let Some(parent) = path.parent() {
            remove_old_leftovers(parent, Some(path));
        }
        let draft = DraftDirectory::new(path)?;
        write_atomic(&draft.path().join(RECIPE), recipe)?;
        write_atomic(&draft.path().join(PLAN), plan)?;
        // Of two runs that start at once, one gets the place.
        if draft.install_new()? {
            Ok(run)
        } else {
            Err(taken())
        }
    }

    /// An existing run's directory: one that holds a recipe and its forecast (a recipe alone may be anybody's).
    pub fn open(path: &Path) -> Result<Self> {
        let run = Self(path.to_path_buf());
        if run.recipe().is_file() && run.plan().is_file() {
            return Ok(run);
        }
        Err(Error::new(Kind::Run, "this is not a run directory")
            .at(path.display().to_string())
            .rule("a run directory holds recipe.toml and plan.json")
            .hint("give the directory that `wattune train` printed, such as `runs/NAME-TIMESTAMP`"))
    }

    /// Whether a process is training in it: one that does has locked the ledger.
    pub fn is_running(&self) -> bool {
        let ledger = File::open(self.ledger());
        ledger.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// `recipe.toml`: the recipe as resolved.
    pub fn recipe(&self) -> PathBuf {
        self.0.join(RECIPE)
    }

    /// `plan.json`: the forecast.
    pub fn plan(&self) -> PathBuf {
        self.0.join(PLAN)
    }

    /// `steps.jsonl`: one line a step.
    pub fn steps(&self) -> PathBuf {
        self.0.join(crate::report::files::STEPS_JSONL)
    }

    /// `ledger.jsonl`: what was spent.
    pub fn ledger(&self) -> PathBuf {
        self.0.join("ledger.jsonl")
    }

    /// `checkpoints/`.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// `baselines/NAME`: the ledger and steps of a baseline that was trained.
    pub fn baseline(&self, name: &str) -> PathBuf {
        self.0.join("baselines").join(name)
    }

    /// `adapter/`, or `model/` where every weight was trained.
    pub fn result(&self, whole_model: bool) -> PathBuf {
        self.0.join(if whole_model {
            "model"
        } else {
            crate::report::files::ADAPTER_DIR
        })
    }

    /// `report.json`.
    pub fn report(&self) -> PathBuf {
        self.0.join(crate::report::files::REPORT_JSON)
    }

    /// `report.md`.
    pub fn page(&self) -> PathBuf {
        self.0.join(crate::report::files::REPORT_MD)
    }

    /// `report.html`.
    pub fn html_page(&self) -> PathBuf {
        self.0.join(crate::report::files::REPORT_HTML)
    }

    /// `emissions.csv`.
    pub fn emissions(&self) -> PathBuf {
        self.0.join(crate::report::files::EMISSIONS_CSV)
    }

    /// The pages of a finished run that are not there.
    pub fn missing_pages(&self) -> Vec<PathBuf> {
        [self.page(), self.html_page(), self.emissions()]
            .into_iter()
            .filter(|page| !page.is_file())
            .collect()
    }
}

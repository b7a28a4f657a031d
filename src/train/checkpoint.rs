//! Checkpoints: complete or absent; a run resumed from one produces the same bytes.
//!
//! A checkpoint is a directory `step-000050` with `state.json` (the loop's state),
//! `trainer.safetensors` (every trained value and both moments, exactly) and the files of the
//! caller's `export` (the adapter in PEFT's format). It is written under a temporary name, synced
//! and renamed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::adapter::shards::{F32Tensor, read_headers, write_f32s};
use crate::energy::ledger::{Recorded, changed_inputs};
use crate::error::{Error, Kind, Result};
use crate::files::{DraftDirectory, remove_directory, remove_leftovers, sha256, write_atomic};
use crate::model::StoredTensor;
use crate::ops::Parameters;

use super::Stop;
use super::early_stopping::Waited;
use super::metrics::Metrics;

/// File of the loop's state.
const STATE: &str = "state.json";
/// File of the trained values and moments.
const TRAINER: &str = "trainer.safetensors";
/// Tensors of `TRAINER`, one for each row of `Parameters`: f32 (n).
const ROWS: [&str; 3] = ["value", "exp_avg", "exp_avg_sq"];

/// State of the training loop, except the trained values and moments.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Validation loss before the first step, in nats per loss token.
    pub val_loss_before: Option<f64>,
    /// The last evaluation.
    pub val_loss_last: Option<Evaluation>,
    /// The evaluation with the lowest loss.
    pub best: Option<Evaluation>,
    /// How long early stopping has waited.
    #[serde(default)]
    pub waited: Waited,
    /// The last step's loss.
    pub train_loss_last: Option<f64>,
    /// Tokens trained on.
    pub tokens: u64,
    /// Loss tokens trained on.
    pub loss_tokens: u64,
    /// Wall time of training steps, in seconds.
    pub train_wall_s: f64,
    /// Digest of the resolved recipe and of its inputs: a run resumes only with the same ones.
    pub recipe: String,
    /// Sample text of the untrained model, if the caller generated one: a resumed model cannot
    /// reproduce it.
    #[serde(default)]
    pub sample_before: Option<String>,
    /// Of `val_loss_last`, by true class (row) and predicted class (column), of a classifier.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub confusion_matrix: Vec<Vec<u64>>,
    /// Why the loop ended, in the checkpoint written at its end.
    #[serde(default)]
    pub ended: Option<Stop>,
    /// The ledger's total when the checkpoint was written: a ledger with less has lost entries.
    #[serde(default)]
    pub spent: Option<Recorded>,
    /// SHA-256 of the checkpoint's other files, by name.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

/// A validation loss and its step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done before it.
    pub step: u64,
    /// Nats per loss token.
    pub val_loss: f64,
    /// Standard error of `val_loss` over the loss tokens.
    #[serde(default)]
    pub standard_error: Option<f64>,
    /// Of a classifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
}

/// A run's checkpoint folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The folder `dir`, which retains the newest `keep` checkpoints and the best.
    pub fn new(dir: PathBuf, keep: usize) -> Self {
        Self { dir, keep }
    }

    /// The path of the checkpoint after `step`.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:06}"))
    }

    /// Steps of the checkpoints, ascending.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io("read", &self.dir, e)),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut steps: Vec<u64> = names
            .filter_map(|name| name.strip_prefix("step-")?.parse().ok())
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Saves a checkpoint and returns its path; `export` adds the model's files to the new
    /// directory. If the step has a checkpoint, only its state is rewritten. Removes older
    /// checkpoints beyond the limit, except the best.
    pub fn save(
        &self,
        state: &TrainState,
        parameters: &Parameters,
        export: &dyn Fn(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let place = self.path(state.step);
        if place.exists() {
            let files = self.state(state.step)?.files;
            write_atomic(&place.join(STATE), state_text(state, files)?)?;
        } else {
            let draft = DraftDirectory::new(&place)?;
            write_rows(&draft.path().join(TRAINER), parameters)?;
            export(draft.path())?;
            let files = digests(draft.path())?;
            write_atomic(&draft.path().join(STATE), state_text(state, files)?)?;
            draft.replace()?;
        }
        self.prune(state.best.map(|best| best.step))?;
        Ok(place)
    }

    /// Removes the temporary files of a killed process, and checkpoints beyond the limit. `newest`
    /// is the state of the newest checkpoint, read and verified.
    ///
    /// # Errors
    /// [`Kind::Io`].
    pub fn tidy(&self, newest: Option<&TrainState>) -> Result<()> {
        remove_leftovers(&self.dir);
        match newest {
            Some(state) => self.prune(state.best.map(|best| best.step)),
            None => Ok(()),
        }
    }

    /// The ledger's total when the newest checkpoint was written; `None` without a readable one.
    pub fn newest_spent(&self) -> Option<Recorded> {
        let step = self.steps().ok()?.last().copied()?;
        self.state(step).ok()?.spent
    }

    /// Copies the exported files of the checkpoint after `step` to `dir`.
    ///
    /// # Errors
    /// [`Kind::Io`].
    pub fn copy_export(&self, step: u64, dir: &Path) -> Result<()> {
        let place = self.path(step);
        let files = self.state(step)?.files;
        if files.is_empty() {
            return Err(damaged(&place, &format!("{STATE} names no files")));
        }
        for name in files.keys().filter(|name| *name != TRAINER) {
            let to = dir.join(name);
            let folder = to.parent().map_or(Ok(()), fs::create_dir_all);
            folder
                .and_then(|()| fs::copy(place.join(name), &to))
                .map_err(|e| Error::io("write", &to, e))?;
        }
        Ok(())
    }

    /// Removes all but the newest `keep` checkpoints and that of step `best`.
    fn prune(&self, best: Option<u64>) -> Result<()> {
        let steps = self.steps()?;
        let old = steps.len().saturating_sub(self.keep);
        for step in steps[..old].iter().filter(|step| Some(**step) != best) {
            remove_directory(&self.path(*step))?;
        }
        Ok(())
    }

    /// Reads the state of the checkpoint after `step`.
    fn state(&self, step: u64) -> Result<TrainState> {
        let path = self.path(step);
        let text =
            fs::read(path.join(STATE)).map_err(|e| damaged(&path, &format!("{STATE}: {e}")))?;
        let state: TrainState =
            serde_json::from_slice(&text).map_err(|e| damaged(&path, &e.to_string()))?;
        if state.step != step {
            return Err(damaged(
                &path,
                &format!("{STATE} tells of step {}", state.step),
            ));
        }
        let is_inside = |name: &String| {
            let mut parts = Path::new(name).components();
            parts.all(|part| matches!(part, Component::Normal(_)))
        };
        if let Some(name) = state.files.keys().find(|name| !is_inside(name)) {
            return Err(damaged(&path, &format!("{STATE} names the file {name:?}")));
        }
        Ok(state)
    }

    /// The state of the newest checkpoint, if there is one, after a check of its files' digests.
    ///
    /// # Errors
    /// [`Kind::Run`] if its recipe is not `recipe`, or a file is damaged.
    pub fn newest(&self, recipe: &str) -> Result<Option<TrainState>> {
        let Some(step) = self.steps()?.last().copied() else {
            return Ok(None);
        };
        let path = self.path(step);
        let state = self.state(step)?;
        if state.recipe != recipe {
            return Err(changed_inputs(&path));
        }
        for (name, digest) in &state.files {
            let found =
                sha256(&path.join(name)).map_err(|e| damaged(&path, &format!("{name}: {e}")))?;
            if found != *digest {
                return Err(damaged(&path, &format!("{name} has SHA-256 {found}"))
                    .rule(format!("{digest}, as {STATE} says")));
            }
        }
        Ok(Some(state))
    }

    /// Restores the values and moments of `parameters` from the checkpoint after `step`, with one
    /// row in memory at a time.
    pub fn restore(&self, step: u64, parameters: &Parameters) -> Result<()> {
        let path = self.path(step);
        let file = path.join(TRAINER);
        let stored = read_headers(std::slice::from_ref(&file))
            .map_err(|e| damaged(&path, &e.to_string()))?;
        let open = File::open(&file).map_err(|e| damaged(&path, &format!("{TRAINER}: {e}")))?;
        for (index, name) in ROWS.into_iter().enumerate() {
            let row = stored.iter().find(|tensor| tensor.name == name);
            let row = row.ok_or_else(|| damaged(&path, &format!("{TRAINER} holds no `{name}`")))?;
            if row.dtype != Dtype::F32 || row.shape != [parameters.len()] {
                let found = format!("`{name}` holds {:?} {:?}", row.dtype, row.shape);
                return Err(damaged(&path, &found).rule(format!("F32 [{}]", parameters.len())));
            }
            let source = StoredTensor {
                path: &file,
                file: &open,
                tensor: row,
                transposed: false,
            };
            let values = source.f32s().map_err(|e| damaged(&path, &e.to_string()))?;
            parameters.restore_row(index, &values)?;
        }
        Ok(())
    }
}

/// Bytes of a checkpoint of `trained` parameters in f32: value and two moments, and the values
/// again in the exported files.
pub fn checkpoint_bytes(trained: usize) -> usize {
    16 * trained
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::new(Kind::Run, "a checkpoint cannot be read")
        .at(path.display().to_string())
        .value(why)
        .hint("delete this checkpoint's folder: the run then resumes from the one before it")
}

/// Writes the values and moments without a second copy in memory.
fn write_rows(path: &Path, parameters: &Parameters) -> Result<()> {
    parameters.with_rows(|rows| {
        let rows = ROWS.into_iter().zip(rows);
        let tensors = rows.map(|(name, row)| F32Tensor::flat(name, row));
        write_f32s(path, tensors.collect(), false)
    })
}

fn state_text(state: &TrainState, files: BTreeMap<String, String>) -> Result<Vec<u8>> {
    let state = TrainState {
        files,
        ..state.clone()
    };
    serde_json::to_vec_pretty(&state).map_err(|e| Error::new(Kind::Run, e.to_string()))
}

/// SHA-256 of each file in `dir` and its folders, by relative path with `/`.
fn digests(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            let inner = digests(&path)?.into_iter();
            found.extend(inner.map(|(file, digest)| (format!("{name}/{file}"), digest)));
            continue;
        }
        let digest = sha256(&path).map_err(|e| Error::io("read", &path, e))?;
        found.insert(name.into_owned(), digest);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn parameters(value: f32) -> Parameters {
        Parameters::new(vec![("a".into(), vec![2, 2], vec![value; 4])], &Device::Cpu).unwrap()
    }

    #[test]
    fn a_checkpoint_brings_back_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().join("checkpoints"), 2);
        let saved = parameters(0.1);
        for (index, row) in [
            [0.1, f32::MIN_POSITIVE, -0.0, 7.0],
            [1.0, 2.0, 3.0, 4.0],
            [0.5; 4],
        ]
        .iter()
        .enumerate()
        {
            saved.restore_row(index, row).unwrap();
        }
        let state = TrainState {
            step: 7,
            tokens: 99,
            recipe: "r".into(),
            ..TrainState::default()
        };
        checkpoints.save(&state, &saved, &|_| Ok(())).unwrap();
        let other = parameters(9.0);
        let mut found = checkpoints.newest("r").unwrap().unwrap();
        assert_eq!(found.files.keys().collect::<Vec<_>>(), [TRAINER]);
        found.files.clear();
        assert_eq!(found, state);
        checkpoints.restore(7, &other).unwrap();
        assert_eq!(other.snapshot().unwrap(), saved.snapshot().unwrap());
        assert_eq!(checkpoints.newest("another").unwrap_err().kind(), Kind::Run);
    }

    #[test]
    fn a_step_saved_again_stays_whole_and_tells_the_newer_standing() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 1);
        let first = TrainState {
            step: 4,
            recipe: "r".into(),
            ..TrainState::default()
        };
        checkpoints
            .save(&first, &parameters(0.5), &|_| Ok(()))
            .unwrap();
        let second = TrainState {
            best: Some(Evaluation {
                step: 4,
                val_loss: 0.25,
                standard_error: None,
                metrics: None,
            }),
            ..first
        };
        let path = checkpoints
            .save(&second, &parameters(0.5), &|_| {
                panic!("the values are there")
            })
            .unwrap();
        let found = checkpoints.newest("r").unwrap().unwrap();
        assert_eq!(found.files.len(), 1, "the file's digest stays");
        assert_eq!(found.best, second.best);
        checkpoints.restore(4, &parameters(0.0)).unwrap();
        assert_eq!(
            (
                fs::read_dir(dir.path()).unwrap().count(),
                fs::read_dir(path).unwrap().count()
            ),
            (1, 2)
        );
    }

    #[test]
    fn a_damaged_checkpoint_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        let path = checkpoints
            .save(
                &TrainState {
                    step: 3,
                    ..TrainState::default()
                },
                &parameters(0.0),
                &|_| Ok(()),
            )
            .unwrap();
        // Another model's values; a file cut short; none at all.
        let other =
            Parameters::new(vec![("a".into(), vec![3], vec![0.0; 3])], &Device::Cpu).unwrap();
        let whole = fs::read(path.join(TRAINER)).unwrap();
        let mut refusals = vec![checkpoints.restore(3, &other).unwrap_err()];
        fs::write(path.join(TRAINER), &whole[..whole.len() - 5]).unwrap();
        refusals.push(checkpoints.restore(3, &parameters(0.0)).unwrap_err());
        fs::write(path.join(STATE), "{\"step\": 3").unwrap();
        refusals.push(checkpoints.newest("").unwrap_err());
        fs::remove_file(path.join(STATE)).unwrap();
        refusals.push(checkpoints.newest("").unwrap_err());
        for error in refusals {
            assert!(
                error.to_string().contains("step-000003")
                    && error.remedy().unwrap().contains("delete"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        let path = checkpoints
            .save(&TrainState::default(), &parameters(0.5), &|dir| {
                write_atomic(&dir.join("adapter.safetensors"), "exported")
            })
            .unwrap();
        let whole = fs::read(path.join(TRAINER)).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(path.join(TRAINER), flipped).unwrap();
        let error = checkpoints.newest("").unwrap_err().to_string();
        assert!(error.contains("trainer.safetensors has SHA-256"), "{error}");
        fs::write(path.join(TRAINER), whole).unwrap();
        checkpoints.newest("").unwrap();
        fs::remove_file(path.join("adapter.safetensors")).unwrap();
        checkpoints.newest("").unwrap_err();
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_the_limit_holds() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 9);
        for step in [1, 2, 3] {
            let state = TrainState {
                step,
                ..TrainState::default()
            };
            checkpoints
                .save(&state, &parameters(0.0), &|_| Ok(()))
                .unwrap();
        }
        // Another process was killed while it deleted step 0 and wrote step 4.
        for name in ["step-000000", "step-000004"] {
            let suffix = ["deleted", "partial"][usize::from(name.ends_with('4'))];
            let left = format!(".{name}.{}.{suffix}", u32::MAX);
            fs::create_dir(dir.path().join(left)).unwrap();
        }
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        let newest = checkpoints.newest("").unwrap();
        checkpoints.tidy(newest.as_ref()).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [2, 3]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_failed_export_leaves_no_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        let fail = |_: &Path| Err(Error::new(Kind::Io, "disk full"));
        checkpoints
            .save(&TrainState::default(), &parameters(0.0), &fail)
            .unwrap_err();
        assert_eq!(checkpoints.steps().unwrap(), Vec::<u64>::new());
        assert!(checkpoints.newest("").unwrap().is_none());
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        for step in 1..=5 {
            let best = Some(Evaluation {
                step: step.min(2),
                val_loss: 1.0,
                standard_error: None,
                metrics: None,
            });
            let state = TrainState {
                step,
                best,
                ..TrainState::default()
            };
            checkpoints
                .save(&state, &parameters(0.0), &|_| Ok(()))
                .unwrap();
        }
        assert_eq!(checkpoints.steps().unwrap(), [2, 4, 5]);
    }
}

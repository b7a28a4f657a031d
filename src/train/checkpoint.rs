//! Checkpoints: complete or absent, never half; enough to go on with the same bytes.
//!
//! A checkpoint is a directory `step-000050` that holds `state.json` (where the run stood), `trainer.safetensors` (every trained value and
//! both moments, exactly) and what the caller's `export` adds (the adapter as PEFT reads it). It is written under another name, synced and
//! renamed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};

use crate::adapter::shards::{F32s, read_headers, write_f32s};
use crate::error::{Error, Kind, Result};
use crate::model::Source;
use crate::ops::Parameters;

const STATE: &str = "state.json";
const TRAINER: &str = "trainer.safetensors";
const ROWS: [&str; 3] = ["value", "exp_avg", "exp_avg_sq"];

/// Where a run stands: all that the loop carries from step to step beside the trained values.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Standing {
    /// Steps done.
    pub step: u64,
    /// Validation loss before the first step, in nats per loss token.
    pub val_loss_before: Option<f64>,
    /// The last validation loss and the step it was taken after.
    pub val_loss_last: Option<Evaluated>,
    /// The lowest validation loss and its step.
    pub best: Option<Evaluated>,
    /// The last step's loss.
    pub train_loss_last: Option<f64>,
    /// Tokens trained on.
    pub tokens: u64,
    /// Loss tokens trained on.
    pub loss_tokens: u64,
    /// Wall time of training steps, in seconds.
    pub train_wall_s: f64,
    /// A digest of the resolved recipe and of what it read: a run is resumed under what it began with.
    pub recipe: String,
    /// What the model wrote before the first step, if the caller asked it: a resumed model no longer can.
    #[serde(default)]
    pub sample_before: Option<String>,
}

/// A validation loss and the step it was taken after.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Steps done then.
    pub step: u64,
    /// Nats per loss token.
    pub val_loss: f64,
}

/// A run's checkpoint folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The folder `dir`, in which the newest `keep` checkpoints stay, and the best.
    pub fn new(dir: PathBuf, keep: usize) -> Self {
        Self { dir, keep }
    }

    /// The path of the checkpoint after `step`.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:06}"))
    }

    /// Steps of whole checkpoints, ascending.
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

    /// Saves; `export` adds the model's own files to the new directory. Where this step was saved already, its values are those of then, and
    /// only where the run stands is written anew. Older checkpoints beyond the limit are removed, never `best`.
    pub fn save(
        &self,
        standing: &Standing,
        parameters: &Parameters,
        export: &dyn Fn(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let place = self.path(standing.step);
        let draft = self.dir.join(format!(".step-{:06}.partial", standing.step));
        remove_directory(&draft)?;
        fs::create_dir_all(&draft).map_err(|e| Error::io("create", &draft, e))?;
        let state = serde_json::to_vec_pretty(standing)
            .map_err(|e| Error::new(Kind::Run, e.to_string()))?;
        fs::write(draft.join(STATE), state).map_err(|e| Error::io("write", &draft, e))?;
        if place.exists() {
            sync_files(&draft)?;
            fs::rename(draft.join(STATE), place.join(STATE))
                .map_err(|e| Error::io("rename", &draft, e))?;
            sync(&place)?;
            remove_directory(&draft)?;
        } else {
            write_rows(&draft.join(TRAINER), parameters)?;
            export(&draft)?;
            put_in_place(&draft, &place)?;
        }
        self.prune(standing.best.map(|best| best.step))?;
        Ok(place)
    }

    fn prune(&self, best: Option<u64>) -> Result<()> {
        let steps = self.steps()?;
        let old = steps.len().saturating_sub(self.keep);
        for step in steps[..old].iter().filter(|step| Some(**step) != best) {
            remove_directory(&self.path(*step))?;
        }
        Ok(())
    }

    /// The newest whole checkpoint's standing; `None` where there is none.
    pub fn newest(&self, recipe: &str) -> Result<Option<Standing>> {
        let Some(step) = self.steps()?.last().copied() else {
            return Ok(None);
        };
        let path = self.path(step);
        let state =
            fs::read(path.join(STATE)).map_err(|e| damaged(&path, &format!("{STATE}: {e}")))?;
        let standing: Standing =
            serde_json::from_slice(&state).map_err(|e| damaged(&path, &e.to_string()))?;
        if standing.recipe != recipe {
            return Err(Error::new(Kind::Run, "the recipe, the model or the data are no longer those that this run began with")
                .at(path.display().to_string())
                .hint("put back what was changed (`recipe.toml` in the run directory, data files, a moved branch of the hub), or start a new run with another `--out`"));
        }
        match standing.step == step {
            true => Ok(Some(standing)),
            false => Err(damaged(
                &path,
                &format!("{STATE} tells of step {}", standing.step),
            )),
        }
    }

    /// The trained values of the checkpoint after `step`, put back into `parameters` row by row: one is in memory beside them.
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
            let source = Source {
                path: &file,
                file: &open,
                tensor: row,
            };
            let values = source.f32s().map_err(|e| damaged(&path, &e.to_string()))?;
            parameters.restore_row(index, &values)?;
        }
        Ok(())
    }
}

/// Bytes that a checkpoint of `trained` numbers writes, exported files included: three rows and the values once more.
pub fn checkpoint_bytes(trained: usize) -> usize {
    16 * trained
}

fn damaged(path: &Path, why: &str) -> Error {
    Error::new(Kind::Run, "a checkpoint cannot be read")
        .at(path.display().to_string())
        .value(why)
        .hint("delete this checkpoint's folder: the run then resumes from the one before it")
}

/// Writes the three rows one after the other: their bytes are never all in memory beside the rows themselves.
fn write_rows(path: &Path, parameters: &Parameters) -> Result<()> {
    parameters.with_rows(|rows| {
        write_f32s(
            path,
            ROWS.into_iter()
                .zip(rows)
                .map(|(name, row)| F32s::flat(name, row))
                .collect(),
            false,
        )
    })
}

/// Makes the directory `draft` the one at `place`, which is whole at any moment or absent: what was there goes once the new one stands.
pub fn put_in_place(draft: &Path, place: &Path) -> Result<()> {
    sync_files(draft)?;
    let before = place.with_extension("before");
    remove_directory(&before)?;
    match fs::rename(place, &before) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("rename", place, e));
        }
        _ => fs::rename(draft, place).map_err(|e| Error::io("rename", draft, e))?,
    }
    sync(place.parent().unwrap_or(place))?;
    remove_directory(&before)
}

/// Removes a directory, if it is there.
pub fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    }
}

/// Flushes every file below `dir`, and `dir` itself, to the disk.
fn sync_files(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io("read", dir, e))? {
        let path = entry.map_err(|e| Error::io("read", dir, e))?.path();
        if path.is_dir() {
            sync_files(&path)?
        } else {
            sync(&path)?
        }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|e| Error::io("sync", path, e))
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
        let standing = Standing {
            step: 7,
            tokens: 99,
            recipe: "r".into(),
            ..Standing::default()
        };
        checkpoints.save(&standing, &saved, &|_| Ok(())).unwrap();
        let other = parameters(9.0);
        assert_eq!(checkpoints.newest("r").unwrap(), Some(standing));
        checkpoints.restore(7, &other).unwrap();
        assert_eq!(other.snapshot().unwrap(), saved.snapshot().unwrap());
        assert_eq!(checkpoints.newest("another").unwrap_err().kind(), Kind::Run);
    }

    #[test]
    fn a_step_saved_again_stays_whole_and_tells_the_newer_standing() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 1);
        let first = Standing {
            step: 4,
            recipe: "r".into(),
            ..Standing::default()
        };
        checkpoints
            .save(&first, &parameters(0.5), &|_| Ok(()))
            .unwrap();
        let second = Standing {
            best: Some(Evaluated {
                step: 4,
                val_loss: 0.25,
            }),
            ..first
        };
        let path = checkpoints
            .save(&second, &parameters(0.5), &|_| {
                panic!("the values are there")
            })
            .unwrap();
        assert_eq!(checkpoints.newest("r").unwrap(), Some(second));
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
    fn a_directory_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let [draft, place] = ["a.partial", "a"].map(|name| dir.path().join(name));
        for text in ["first", "second"] {
            fs::create_dir(&draft).unwrap();
            fs::write(draft.join(text), text).unwrap();
            put_in_place(&draft, &place).unwrap();
            assert!(place.join(text).exists());
            assert_eq!(
                (
                    fs::read_dir(dir.path()).unwrap().count(),
                    fs::read_dir(&place).unwrap().count()
                ),
                (1, 1)
            );
        }
        assert!(put_in_place(&draft, &place).is_err(), "there is no draft");
        assert!(place.exists(), "what was there stays");
    }

    #[test]
    fn a_damaged_checkpoint_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        let path = checkpoints
            .save(
                &Standing {
                    step: 3,
                    ..Standing::default()
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
    fn a_failed_export_leaves_no_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        let fail = |_: &Path| Err(Error::new(Kind::Io, "disk full"));
        checkpoints
            .save(&Standing::default(), &parameters(0.0), &fail)
            .unwrap_err();
        assert_eq!(checkpoints.steps().unwrap(), Vec::<u64>::new());
        assert!(checkpoints.newest("").unwrap().is_none());
    }

    #[test]
    fn the_newest_and_the_best_stay() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().to_path_buf(), 2);
        for step in 1..=5 {
            let best = Some(Evaluated {
                step: step.min(2),
                val_loss: 1.0,
            });
            let standing = Standing {
                step,
                best,
                ..Standing::default()
            };
            checkpoints
                .save(&standing, &parameters(0.0), &|_| Ok(()))
                .unwrap();
        }
        assert_eq!(checkpoints.steps().unwrap(), [2, 4, 5]);
    }
}

//! The files of a data set's split, by the naming rules of the `datasets` library (`data_files.py`).
//!
//! `data/train-00000-of-00002.parquet`, `train.jsonl`, `dev.csv`, `main/test-...`. Where two readings are
//! possible none is chosen. Knows nothing of records.

use std::path::PathBuf;
use std::sync::LazyLock;

use regex::Regex;

use crate::error::{Error, Kind, Result};
use crate::text;

use super::Progress;
use super::client::{Hub, Listing};
use super::errors::not_cached;
use super::repo::{Repo, RepoKind};

/// Files with a data extension that hold no records.
const NO_RECORDS: [&str; 8] = [
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "package.json",
    "requirements.txt",
    "license.txt",
];
/// The words for each split in a file's name.
const SPLITS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];
const FORMATS: [&str; 6] = ["parquet", "jsonl", "json", "csv", "tsv", "txt"];
/// Names in a message.
const SHOWN: usize = 12;

/// Folder, stem, shard count and format. Older files have a fingerprint after the count.
static DATA_FILE: LazyLock<Regex> = LazyLock::new(|| {
    let formats = FORMATS.join("|");
    let pattern =
        format!(r"^(?:(.*)/)?([^/]*?)(?:-\d{{5}}-of-(\d{{5}})(?:-[^./]*)?)?\.((?i:{formats}))$");
    Regex::new(&pattern).expect("the pattern is valid")
});

/// One split of a data set, on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFiles {
    /// The hub id.
    pub id: String,
    /// The commit of the files.
    pub commit: String,
    /// Files of one format (parquet, jsonl, json, csv, tsv or txt), by name.
    pub files: Vec<PathBuf>,
}

impl Hub {
    /// Fetches the files of a split. `split` is also `folder/split` for one of several configurations, or a file's full name.
    ///
    /// # Errors
    /// When the id or revision is invalid, the request fails, the files are not in the cache offline, or no file or more than
    /// one set of files matches the split: the error lists them.
    pub fn dataset(
        &self,
        id: &str,
        revision: &str,
        split: &str,
        progress: &dyn Progress,
    ) -> Result<DatasetFiles> {
        let repo = Repo::new(RepoKind::Dataset, id, revision)?;
        let listing = self.listing(&repo, progress)?;
        let wanted = files_of_split(&listing.files, split)
            .map_err(|reason| self.no_split(&listing, split, reason))?;
        let files = wanted
            .iter()
            .map(|file| self.file(&listing, file, progress))
            .collect::<Result<_>>()?;
        // Only now: offline, a split fetched in part must not pass for a complete one.
        self.cache(&repo).write_ref(revision, &listing.commit)?;
        Ok(DatasetFiles {
            id: repo.id,
            commit: listing.commit,
            files,
        })
    }

    fn no_split(&self, listing: &Listing, split: &str, reason: NoSplit) -> Error {
        let id = &listing.repo.id;
        let error = |what: String| Error::new(Kind::Hub, what).at(listing.repo.place(None));
        match reason {
            NoSplit::Absent(_) | NoSplit::Incomplete { .. } if self.is_offline() => {
                not_cached(&listing.repo, Some(split))
            }
            NoSplit::Absent(files) if files.is_empty() => {
                error("the data set has no files that can be read".to_string())
                    .value(match listing.files.as_slice() {
                        [] => "no files".to_string(),
                        files => first_names(files),
                    })
                    .rule("parquet, jsonl, json, csv, tsv or txt, not compressed")
                    .hint("convert it to one of these and set data.train to the file")
            }
            NoSplit::Absent(files) => error(format!("the data set has no split `{split}`"))
                .value(first_names(&files))
                .hint(format!(
                    "write the split after the id, as in \"{id}:validation\", or a file, as in \"{id}:{}\"",
                    files[0]
                )),
            NoSplit::Ambiguous(sets) => {
                let choice = |set: &String| format!("\"{id}:{set}\"");
                let choices: Vec<String> = sets.iter().take(SHOWN).map(choice).collect();
                let what = format!("more than one set of files is named for the split `{split}`");
                error(what)
                    .value(first_names(&sets))
                    .hint(format!("choose one of {}", choices.join(", ")))
            }
            NoSplit::Incomplete { name, found, count } => {
                error(format!("the split `{split}` is incomplete"))
                    .value(format!("{found} files `{name}-...`"))
                    .rule(format!("{count} of them"))
                    .hint("choose another revision of the data set")
            }
        }
    }
}

fn first_names(names: &[String]) -> String {
    text::first_few(names.to_vec(), SHOWN).join(", ")
}

/// Why a split has no files.
enum NoSplit {
    /// No file matches; the data files that exist.
    Absent(Vec<String>),
    /// Several sets of files match; for each a `split` that means it alone.
    Ambiguous(Vec<String>),
    /// A sharded set lacks files.
    Incomplete {
        name: String,
        found: usize,
        count: usize,
    },
}

/// A file of records, its path taken apart.
#[derive(Clone, Copy)]
struct DataFile<'a> {
    path: &'a str,
    folder: &'a str,
    /// The name without shard number and extension.
    stem: &'a str,
    format: &'a str,
    /// How many files the set has: 2 for `train-00000-of-00002.parquet`.
    shards: Option<usize>,
}

impl<'a> DataFile<'a> {
    fn parse(path: &'a str) -> Option<Self> {
        let name = path.rsplit('/').next()?.to_ascii_lowercase();
        let hidden = path.split('/').any(|part| part.starts_with(['.', '_']));
        if hidden || NO_RECORDS.contains(&name.as_str()) {
            return None;
        }
        let parts = DATA_FILE.captures(path)?;
        Some(Self {
            path,
            folder: parts.get(1).map_or("", |part| part.as_str()),
            stem: parts.get(2)?.as_str(),
            shards: parts.get(3).and_then(|count| count.as_str().parse().ok()),
            format: parts.get(4)?.as_str(),
        })
    }

    fn is_inside(&self, folder: &str) -> bool {
        let rest = self.folder.strip_prefix(folder);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// Whether one of `words` is in the path. The stem of a shard is one word: `train_sft` is not `train`.
    fn contains(&self, words: &[&str]) -> bool {
        let is_split = |word: &str| words.contains(&word);
        let has_word = |path: &str| {
            let path = path.to_ascii_lowercase();
            let boundary = |c: char| "/-._ ".contains(c) || c.is_ascii_digit();
            path.split(boundary).any(is_split)
        };
        match self.shards {
            Some(_) => is_split(self.stem) || has_word(self.folder),
            None => has_word(self.path),
        }
    }
}

/// Whether a file of this name may hold records.
pub fn is_data_file(name: &str) -> bool {
    DataFile::parse(name).is_some()
}

/// The split that a data file's name has a word for.
pub fn split_in_name(name: &str) -> Option<&'static str> {
    let file = DataFile::parse(name)?;
    let split = SPLITS.iter().find(|(_, words)| file.contains(words));
    split.map(|(split, _)| *split)
}

/// The files of `split`, sorted. `split` is also `folder/split`, `split.format`, both, or a file's full name.
fn files_of_split(files: &[String], split: &str) -> Result<Vec<String>, NoSplit> {
    if files.iter().any(|file| file == split) {
        return Ok(vec![split.to_string()]);
    }
    let paths = |files: &[DataFile]| files.iter().map(|file| file.path.to_string()).collect();
    let mut data: Vec<DataFile> = files.iter().filter_map(|f| DataFile::parse(f)).collect();
    data.sort_by_key(|file| file.path);
    let (folder, name) = split.rsplit_once('/').unwrap_or(("", split));
    let (name, format) = match name.rsplit_once('.') {
        Some((name, format)) if FORMATS.contains(&format) => (name, Some(format)),
        _ => (name, None),
    };
    let in_scope = |file: &&DataFile| {
        (folder.is_empty() || file.is_inside(folder))
            && format.is_none_or(|format| file.format == format)
    };
    let candidates: Vec<DataFile> = data.iter().filter(in_scope).copied().collect();
    let matching = matching(&candidates, name);
    let mut sets: Vec<Vec<DataFile>> = Vec::new();
    for file in &matching {
        let same =
            |set: &&mut Vec<DataFile>| (set[0].folder, set[0].format) == (file.folder, file.format);
        match sets.iter_mut().find(same) {
            Some(set) => set.push(*file),
            None => sets.push(vec![*file]),
        }
    }
    match sets.as_slice() {
        [] => Err(NoSplit::Absent(paths(&data))),
        [set] => require_all_shards(set).map(|()| paths(set)),
        sets => {
            let spec = |set: &Vec<DataFile>| unambiguous_split(set, &matching, name);
            Err(NoSplit::Ambiguous(sets.iter().map(spec).collect()))
        }
    }
}

/// The files that the strongest rule finds: those with exactly the split's name; else those with a word for it in the path;
/// else, for `train`, all files if none has any split in its path.
fn matching<'a>(data: &[DataFile<'a>], split: &str) -> Vec<DataFile<'a>> {
    let select = |test: &dyn Fn(&DataFile) -> bool| -> Vec<DataFile<'a>> {
        data.iter().filter(|file| test(file)).copied().collect()
    };
    let exact = select(&|file| file.stem.eq_ignore_ascii_case(split));
    if !exact.is_empty() {
        return exact;
    }
    let known = SPLITS
        .iter()
        .find(|(name, words)| *name == split || words.contains(&split));
    let words = known.map_or(vec![split], |(_, words)| words.to_vec());
    let by_word = select(&|file| file.contains(&words));
    if !by_word.is_empty() || split != "train" {
        return by_word;
    }
    let names_a_split = |file: &DataFile| {
        file.shards.is_some() || SPLITS.iter().any(|(_, words)| file.contains(words))
    };
    if data.iter().any(names_a_split) {
        return Vec::new();
    }
    data.to_vec()
}

/// The `split` that selects this set and no other.
fn unambiguous_split(set: &[DataFile], matching: &[DataFile], split: &str) -> String {
    let DataFile { folder, format, .. } = set[0];
    let in_folder = matching.iter().filter(|file| file.folder == folder);
    let slash = if folder.is_empty() { "" } else { "/" };
    match set {
        [file] => file.path.to_string(),
        _ if in_folder.count() == set.len() && !folder.is_empty() => format!("{folder}/{split}"),
        _ => format!("{folder}{slash}{split}.{format}"),
    }
}

fn require_all_shards(set: &[DataFile]) -> Result<(), NoSplit> {
    for file in set {
        let Some(count) = file.shards else { continue };
        let same = |other: &&DataFile| (other.stem, other.shards) == (file.stem, file.shards);
        let found = set.iter().filter(same).count();
        if found != count {
            let name = format!("{}/{}", file.folder, file.stem);
            return Err(NoSplit::Incomplete { name, found, count });
        }
    }
    Ok(())
}

//! A data set's files from the hub.
//!
//! Owns `DatasetFiles`. Takes an id, a revision and a split; returns the paths of that split's files and their commit. Knows
//! nothing of records.

use std::path::PathBuf;

use crate::error::{Error, Kind, Result};

use super::fetch::Hub;
use super::listing::{Listing, not_cached};
use super::names::{Repo, RepoKind};
use super::progress::Progress;
use super::split::{self, NoSplit};

/// As many file names as a message shows.
const SHOWN: usize = 12;

/// One split of a data set, on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFiles {
    /// The hub id.
    pub id: String,
    /// The commit the files belong to.
    pub commit: String,
    /// Files of one format (by extension: parquet, jsonl, json, csv, tsv or txt), in the order of their names.
    pub files: Vec<PathBuf>,
}

impl Hub {
    /// Fetches the files of a split. Where a data set has several configurations, `split` is `folder/split`; it may also be the
    /// full name of one file.
    ///
    /// # Errors
    /// When the id or revision is none, the hub refuses or cannot be reached, offline when the files are not in the cache, or
    /// when no file, or more than one set of files, is named for the split: the error lists what is there.
    pub fn dataset(
        &self,
        id: &str,
        revision: &str,
        split: &str,
        progress: &dyn Progress,
    ) -> Result<DatasetFiles> {
        let repo = Repo::new(RepoKind::Dataset, id, revision)?;
        let listing = self.listing(&repo)?;
        let wanted = split::files_of(&listing.files, split)
            .map_err(|reason| self.no_split(&listing, split, reason))?;
        let files = wanted
            .iter()
            .map(|file| self.file(&listing, file, progress))
            .collect::<Result<_>>()?;
        // Recorded only now: offline, a split that was fetched in part does not pass for a whole one.
        self.cache(&repo).record(revision, &listing.commit)?;
        Ok(DatasetFiles {
            id: repo.id,
            commit: listing.commit,
            files,
        })
    }

    fn no_split(&self, listing: &Listing, split: &str, reason: NoSplit) -> Error {
        let id = &listing.repo.id;
        let error = |what: String| Error::new(Kind::Hub, what).at(listing.repo.called());
        match reason {
            NoSplit::Absent(_) | NoSplit::Incomplete(..) if self.is_offline() => not_cached(&listing.repo, Some(split)),
            NoSplit::Absent(files) if files.is_empty() => {
                let there = if listing.files.is_empty() { "no files".to_string() } else { some(&listing.files) };
                error("the data set has no files that can be read".to_string())
                    .value(there)
                    .rule("parquet, jsonl, json, csv, tsv or txt, not compressed")
                    .hint("convert it to one of these and set data.train to the file")
            }
            NoSplit::Absent(files) => error(format!("the data set has no split `{split}`"))
                .value(some(&files))
                .hint(format!("write the split after the id, as in \"{id}:validation\", or a file, as in \"{id}:{}\"", files[0])),
            NoSplit::Ambiguous(sets) => {
                let choices: Vec<String> = sets.iter().take(SHOWN).map(|set| format!("\"{id}:{set}\"")).collect();
                error(format!("more than one set of files is named for the split `{split}`"))
                    .value(some(&sets))
                    .hint(format!("choose one of {}", choices.join(", ")))
            }
            NoSplit::Incomplete(name, here, of) => error(format!("the split `{split}` is incomplete"))
                .value(format!("{here} files `{name}-...`"))
                .rule(format!("{of} of them"))
                .hint("choose another revision of the data set"),
        }
    }
}

/// The first of these names, and how many more there are.
fn some(names: &[String]) -> String {
    let shown = names
        .iter()
        .take(SHOWN)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

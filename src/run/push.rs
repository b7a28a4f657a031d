//! A finished run's result -> a model repository on the hub.

use std::path::Path;

use super::RunDirectory;
use crate::error::{Error, Kind, Result};
use crate::hub::{Hub, Progress, Upload, Uploaded};
use crate::report::files::MODEL_CARD;

/// A run and the repository for its result.
pub struct PushRequest<'a> {
    /// The run directory.
    pub run: &'a Path,
    /// `owner/name`; created unless it exists.
    pub repo: &'a str,
    /// The repository must not be public.
    pub private: bool,
    /// Open a pull request instead of committing to `main`.
    pub create_pr: bool,
}

/// Uploads the adapter folder of a run, or the model folder of a full one, with its model card.
///
/// # Errors
/// When there is no such run, it has no result, or as [`Hub::upload`].
pub fn push(request: &PushRequest<'_>, progress: &dyn Progress) -> Result<Uploaded> {
    let directory = RunDirectory::open(request.run)?;
    let results = [false, true].map(|full| directory.result(full));
    // The report is the last file of a run: without it a result or its card may be unfinished.
    let complete = directory.report().is_file();
    let result = results
        .iter()
        .find(|dir| complete && dir.join(MODEL_CARD).is_file());
    let folder = result.ok_or_else(|| {
        let run = request.run.display().to_string();
        Error::new(Kind::Run, "the run has no result to upload")
            .at(&run)
            .rule("`adapter/` or `model/` with its model card")
            .hint(format!("finish it with `wattune train --resume {run}`"))
    })?;
    let upload = Upload {
        folder,
        repo: request.repo,
        private: request.private,
        create_pr: request.create_pr,
        message: concat!("Upload with wattune ", env!("CARGO_PKG_VERSION")),
    };
    Hub::from_env()?.upload(&upload, progress)
}

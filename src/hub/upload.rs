//! A folder -> one commit of a model repository, or a pull request, through hf-hub.

use std::path::Path;
use std::sync::mpsc::{self, Sender};

use hf_hub::progress::{ProgressEvent, ProgressHandler, UploadEvent};
use hf_hub::repository::{CommitInfo, ModelInfo};
use hf_hub::{HFError, RepoTypeModel, split_id};

use crate::error::{Error, Kind, Result};

use super::Progress;
use super::client::{Client, Hub};
use super::errors::{RequestContext, RequestError, display_url};
use super::repo::{Repo, RepoKind};

/// What is uploaded, and where to.
#[derive(Debug, Clone, Copy)]
pub struct Upload<'a> {
    /// All its files, by their relative paths.
    pub folder: &'a Path,
    /// The model repository `owner/name`, created unless it exists.
    pub repo: &'a str,
    /// The repository must not be public.
    pub private: bool,
    /// A pull request instead of a commit on `main`.
    pub create_pr: bool,
    /// The commit's message.
    pub message: &'a str,
}

/// Where an upload went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// The repository's page.
    pub url: String,
    /// The commit.
    pub commit: Option<String>,
    /// The pull request's page.
    pub pull_request: Option<String>,
}

impl Hub {
    /// Uploads a folder as one commit.
    ///
    /// # Errors
    /// Before the first request when the id is invalid, there is no token, or offline; then when the repository is public
    /// though a private one is wanted, the token may not write to it, or a request fails.
    pub fn upload(&self, upload: &Upload<'_>, progress: &dyn Progress) -> Result<Uploaded> {
        let repo = Repo::new(RepoKind::Model, upload.repo, "main")?;
        if !upload.repo.contains('/') {
            return Err(Error::new(Kind::Hub, "the repository has no owner")
                .value(upload.repo)
                .hint("write it as `--repo OWNER/NAME`"));
        }
        let Some(client) = &self.client else {
            return Err(Error::new(Kind::Hub, "HF_HUB_OFFLINE forbids an upload")
                .hint("run the same command as `HF_HUB_OFFLINE=0 wattune push ...`"));
        };
        if client.token.is_none() {
            return Err(Error::new(Kind::Hub, "an upload needs a token").hint(format!(
                "set HF_TOKEN to a token with write access from {}/settings/tokens, or run `hf auth login`",
                display_url(&client.endpoint)
            )));
        }
        let context = RequestContext {
            key: "--repo",
            upload: true,
            ..client.context(&repo, None)
        };
        client.retry(progress, || client.prepare_repository(upload, &context))?;
        let commit = client.retry(progress, || client.commit(upload, &context, progress))?;
        Ok(Uploaded {
            url: format!("{}/{}", display_url(&client.endpoint), repo.page()),
            commit: commit.commit_oid,
            pull_request: commit.pr_url,
        })
    }
}

impl Client {
    /// Creates the repository unless it exists; refuses a public one where a private one is wanted.
    fn prepare_repository(
        &self,
        upload: &Upload<'_>,
        context: &RequestContext<'_>,
    ) -> Result<(), RequestError> {
        let (owner, name) = split_id(upload.repo);
        match self.api.model(owner, name).info().send() {
            Ok(ModelInfo { private, .. }) if upload.private && private != Some(true) => {
                let what = format!("`{}` exists and is public", upload.repo);
                let page = format!("{}/{}", display_url(&self.endpoint), upload.repo);
                Err(Error::new(Kind::Hub, what)
                    .hint(format!(
                        "make it private on {page}/settings, or leave `--private` out"
                    ))
                    .into())
            }
            Ok(_) => Ok(()),
            Err(HFError::RepoNotFound { .. }) => {
                let create = self.api.create_repository().repo_id(upload.repo);
                let create = create.repo_type(RepoTypeModel).private(upload.private);
                // Another process may have created it meanwhile.
                let created = create.exist_ok(true).send();
                created.map(drop).map_err(|error| context.hf_error(error))
            }
            Err(error) => Err(context.hf_error(error)),
        }
    }

    fn commit(
        &self,
        upload: &Upload<'_>,
        context: &RequestContext<'_>,
        progress: &dyn Progress,
    ) -> Result<CommitInfo, RequestError> {
        let (owner, name) = split_id(upload.repo);
        let model = self.api.model(owner, name);
        let (sender, events) = mpsc::channel();
        let committed = std::thread::scope(|scope| {
            let upload = scope.spawn(move || {
                let commit = model.upload_folder().folder_path(upload.folder);
                let commit = commit.commit_message(upload.message);
                commit
                    .create_pr(upload.create_pr)
                    .progress(Events(sender))
                    .send()
            });
            show(events.iter(), context.repo, progress);
            upload.join()
        });
        let committed = committed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        committed.map_err(|error| context.hf_error(error))
    }
}

/// Forwards hf-hub's events from its threads.
struct Events(Sender<UploadEvent>);

impl ProgressHandler for Events {
    fn on_progress(&self, event: &ProgressEvent) {
        if let ProgressEvent::Upload(event) = event {
            // The receiver outlives the upload.
            let _ = self.0.send(event.clone());
        }
    }
}

fn show(events: impl Iterator<Item = UploadEvent>, repo: &Repo, progress: &dyn Progress) {
    let (mut done, mut total) = (0, 0);
    let advance_to = |bytes: u64, done: &mut u64| {
        progress.advance(bytes.saturating_sub(*done));
        *done = bytes.max(*done);
    };
    for event in events {
        match event {
            UploadEvent::Start { total_bytes, .. } => {
                total = total_bytes;
                progress.start(&repo.id, Some(total));
            }
            UploadEvent::Progress {
                bytes_completed, ..
            } => advance_to(bytes_completed, &mut done),
            UploadEvent::Committing => advance_to(total, &mut done),
            UploadEvent::Complete => progress.finish(),
        }
    }
}

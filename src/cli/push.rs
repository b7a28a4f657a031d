//! `wattune push`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::Result;
use crate::run::{self, PushRequest, Screen};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The run's directory
    run: PathBuf,
    /// The model repository; created unless it exists
    #[arg(long, value_name = "OWNER/NAME")]
    repo: String,
    /// Create a private repository; refuse a public one that exists
    #[arg(long)]
    private: bool,
    /// Open a pull request instead of committing to the main branch
    #[arg(long)]
    create_pr: bool,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let request = PushRequest {
        run: &arguments.run,
        repo: &arguments.repo,
        private: arguments.private,
        create_pr: arguments.create_pr,
    };
    let uploaded = run::push(&request, Terminal::new(common.quiet).downloads())?;
    if common.json {
        return out_json(&json!({
            "repo": arguments.repo,
            "url": uploaded.url,
            "commit": uploaded.commit,
            "pull_request": uploaded.pull_request,
        }));
    }
    match uploaded.pull_request {
        Some(page) => out(&format!("Opened the pull request {page}.")),
        None => out(&format!("Uploaded to {}.", uploaded.url)),
    }
}

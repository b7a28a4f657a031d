//! `wattune merge`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::model::ModelArguments;
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::Result;
use crate::run::{self, MergeRequest, ModelSource};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Output directory; must not exist
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    write(&arguments.model.resolve()?, &arguments.out, common)
}

/// Merges into the directory `out`, and says what was written.
pub(super) fn write(source: &ModelSource, directory: &Path, common: Common) -> Result<ExitCode> {
    let request = MergeRequest {
        source,
        out: directory,
    };
    let summary = run::merge_model(&request, &mut Terminal::new(common.quiet))?;
    let path = directory.display().to_string();
    if common.json {
        let (merged, kept) = (summary.merged, summary.kept);
        return out_json(
            &json!({ "out": path, "files": summary.files, "merged": merged, "kept": kept, "bytes": summary.size }),
        );
    }
    out(&format!(
        "Merged {} of {} tensors into `{path}` ({}).",
        summary.merged,
        summary.merged + summary.kept,
        summary.size
    ))
}

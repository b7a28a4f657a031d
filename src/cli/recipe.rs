//! `wattune recipe init|import|check|schema`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::first_recipe::{self, ImportArguments, InitArguments};
use super::plan::ending;
use super::screen::Terminal;
use super::{Common, note, out, out_json};
use crate::error::Result;
use crate::recipe::{self, DataSource, Validation};
use crate::run::{self, DeviceChoice, Purpose, RenderedSample, Screen, data_files};
use crate::text::first_few;

/// Names in a note of files.
const SHOWN_FILES: usize = 6;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Write a commented recipe: for a model and data, or to start from
    ///
    /// With --model and --data every value is chosen by what they hold and by what fits in this machine's memory, and the recipe says
    /// why. Without them the file lists all keys.
    Init(InitArguments),
    /// Write a recipe from a file of Axolotl or LLaMA-Factory, or from chat records as for OpenAI's fine-tuning
    ///
    /// Every key that is not carried over is listed by name.
    Import(ImportArguments),
    /// Run every check that precedes training
    Check {
        /// Recipe file
        recipe: PathBuf,
        /// Override a recipe key
        #[arg(long = "set", value_name = "KEY=VALUE")]
        overrides: Vec<String>,
    },
    /// Print the JSON Schema of recipes
    Schema,
}

pub(super) fn run(command: &Command, common: Common) -> Result<ExitCode> {
    match command {
        Command::Schema => out_json(&recipe::json_schema()),
        Command::Init(arguments) => first_recipe::init(arguments, common),
        Command::Import(arguments) => first_recipe::import(arguments, common),
        Command::Check { recipe, overrides } => check(recipe, overrides, common),
    }
}

fn check(path: &std::path::Path, overrides: &[String], common: Common) -> Result<ExitCode> {
    let recipe = recipe::load(path, overrides)?;
    let (device, computing) = DeviceChoice::Auto.open()?;
    let mut screen = Terminal::new(common.quiet);
    let purpose = Purpose::Run;
    let located = |error| recipe::locate(error, path, overrides);
    let prepared = run::prepare(recipe, &device, computing, purpose, screen.downloads());
    let prepared = prepared.map_err(located)?;
    let plan = run::plan(&prepared, &mut screen)?;
    screen.clear();
    plan.check_affordable(&prepared).map_err(located)?;
    if !common.quiet && !common.json {
        note_files(&prepared.recipe.data)?;
    }
    let sample = prepared.train.first.as_ref();
    if common.json {
        return out_json(
            &json!({ "ok": true, "steps": plan.steps(), "eos_trained": prepared.train.eos_trained,
            "warnings": prepared.warnings, "first": sample.map(sample_json), "data": plan.plan.run.map(|run| run.data) }),
        );
    }
    let steps = plan.plan.run.as_ref().map(|run| ending(&run.training));
    let mut text = format!(
        "{} is ready. Steps: {}; energy: about {}.\n",
        path.display(),
        steps.unwrap_or_default(),
        plan.energy()
    );
    for warning in &prepared.warnings {
        text += &format!("warning: {warning}\n");
    }
    text += &sample.map(sample_text).unwrap_or_default();
    out(&text)
}

/// Says which files a folder or a pattern stands for.
fn note_files(data: &recipe::Data) -> Result<()> {
    let validation = match &data.validation {
        Validation::Source(source) => Some(source),
        _ => None,
    };
    let sources = [("train", Some(&data.train)), ("validation", validation)];
    for (key, source) in sources {
        let Some(source) = source else {
            continue;
        };
        let files = data_files(source)?;
        if matches!(source, DataSource::Files(paths) if *paths != files) {
            let names = files.iter().map(|path| path.display().to_string());
            note(&format!(
                "data.{key}: {} files in this order: {}\nhint: a list of paths chooses other files or another order",
                files.len(),
                first_few(names.collect(), SHOWN_FILES).join(", ")
            ));
        }
    }
    Ok(())
}

fn sample_json(sample: &RenderedSample) -> Value {
    let pieces = sample
        .pieces
        .iter()
        .map(|piece| json!({ "text": piece.text, "loss": piece.loss }));
    json!({ "place": sample.place, "pieces": pieces.collect::<Vec<_>>() })
}

fn sample_text(sample: &RenderedSample) -> String {
    let pieces = sample.pieces.iter().map(|piece| {
        if piece.loss {
            format!("»{}«", piece.text)
        } else {
            piece.text.clone()
        }
    });
    let place = &sample.place;
    let text: String = pieces.collect();
    format!("\nThe first record ({place}); trained text is marked »«:\n\n{text}")
}

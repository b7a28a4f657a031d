//! `wattune recipe init` and `wattune recipe import`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::eval::column_pairs;
use super::plan::ending;
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::files::write_atomic;
use crate::recipe::{self, Chosen};
use crate::report::format;
use crate::report::text::Table;
use crate::run::{self, DeviceChoice, FirstRecipe, Suggestion};

#[derive(Debug, clap::Args)]
pub(super) struct InitArguments {
    /// File to write; must not exist [default: recipe.toml]
    path: Option<PathBuf>,
    /// The same
    #[arg(long, short, value_name = "FILE", conflicts_with = "path")]
    output: Option<PathBuf>,
    /// Hub id, directory or GGUF file of the model; without it a starter recipe is written
    #[arg(long, requires = "data", value_name = "ID|DIR")]
    model: Option<String>,
    /// Records: a file, a folder, a pattern or a hub id
    #[arg(long, requires = "model")]
    data: Option<String>,
    /// Validation records [default: a file named validation, valid, val, dev or eval beside the training file, else a part of it]
    #[arg(long, requires = "data")]
    validation: Option<String>,
    /// Column of a field, such as `--column prompt=question`
    #[arg(long = "column", value_name = "FIELD=COLUMN", requires = "data")]
    columns: Vec<String>,
    /// A limit of energy ("5 Wh"), carbon ("2 g"), time ("10 min") or work ("1e15 FLOP")
    #[arg(long, requires = "data")]
    budget: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct ImportArguments {
    /// Axolotl or LLaMA-Factory YAML, or chat records (.jsonl) as for OpenAI's fine-tuning
    file: PathBuf,
    /// Recipe to write; must not exist [default: the file's name with .toml]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Model in place of the file's; chat records name none
    #[arg(long, value_name = "ID|DIR")]
    model: Option<String>,
    /// Training records in place of the file's
    #[arg(long)]
    data: Option<String>,
}

pub(super) fn init(arguments: &InitArguments, common: Common) -> Result<ExitCode> {
    let given = arguments.output.as_ref().or(arguments.path.as_ref());
    let path = given.cloned().unwrap_or_else(|| "recipe.toml".into());
    refuse_existing(&path)?;
    if let (Some(model), Some(data)) = (&arguments.model, &arguments.data) {
        let columns = column_pairs(&arguments.columns)?;
        return suggest(
            &FirstRecipe {
                path: &path,
                model,
                data,
                validation: arguments.validation.as_deref(),
                columns: &columns,
                budget: arguments.budget.as_deref(),
            },
            common,
        );
    }
    write_atomic(&path, recipe::starter())?;
    let written = path.display().to_string();
    if common.json {
        return out_json(&json!({ "written": written }));
    }
    out(&format!(
        "Wrote {written}. Next: edit it, then `wattune recipe check {written}`.\n\
         A recipe for a model and data: `wattune recipe init --model ID --data FILE`."
    ))
}

fn refuse_existing(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    Err(Error::new(Kind::Usage, "the file exists already")
        .at(path.display().to_string())
        .hint("give another name: `--output OTHER.toml`"))
}

fn suggest(request: &FirstRecipe<'_>, common: Common) -> Result<ExitCode> {
    let (device, computing) = DeviceChoice::Auto.open()?;
    let mut screen = Terminal::new(common.quiet);
    let found = run::first_recipe(request, &device, computing, &mut screen);
    screen.clear();
    let suggestion = found?;
    write_atomic(request.path, &suggestion.text)?;
    let written = request.path.display().to_string();
    if common.json {
        return out_json(&json!({
            "written": written,
            "chosen": suggestion.choices,
            "plan": suggestion.planned.plan,
        }));
    }
    out(&page(&written, &suggestion))
}

/// What was chosen, what it costs, and what to type next.
fn page(written: &str, suggestion: &Suggestion) -> String {
    let plan = &suggestion.planned.plan;
    let mut chosen = Table::new(&["key", "value", "why"]);
    let all = recipe::in_order(&suggestion.choices).into_iter();
    for Chosen { key, value, why } in all.filter(|choice| !choice.why.is_empty()) {
        chosen.row([key.to_string(), value, why]);
    }
    let mut cost = vec![("memory", format!("{} peak", plan.memory.peak_bytes))];
    if let Some(run) = &plan.run {
        cost.push(("steps", ending(&run.training)));
        cost.push(("energy", format::energy(run.energy.total_j)));
        cost.push((
            "time",
            format!(
                "{} at the profile's usual rates",
                format::time(run.forecast.wall_s)
            ),
        ));
    }
    let mut text = format!(
        "Wrote {written}\n\n{}\nIts plan\n\n{}",
        chosen.text(2),
        Table::pairs(["", ""], cost).text(2)
    );
    for warning in &plan.warnings {
        text += &format!(
            "\n{}",
            crate::report::text::paragraph(&format!("warning: {warning}"), 2)
        );
    }
    text + &format!(
        "\nNext: `wattune data {written}` shows the records as they will be trained,\n      `wattune train {written}` trains."
    )
}

pub(super) fn import(arguments: &ImportArguments, common: Common) -> Result<ExitCode> {
    let file = &arguments.file;
    let path = arguments.output.clone().unwrap_or_else(|| {
        let name = file.file_name().unwrap_or_default();
        PathBuf::from(name).with_extension("toml")
    });
    refuse_existing(&path)?;
    if file
        .extension()
        .is_some_and(|extension| extension == "jsonl")
    {
        return import_chat(arguments, &path, common);
    }
    let named = [
        ("model.id", &arguments.model),
        ("data.train", &arguments.data),
    ];
    let named = named
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.clone()?)));
    let imported = recipe::import(file, &named.collect::<Vec<_>>(), &path)?;
    write_atomic(&path, &imported.text)?;
    let written = path.display().to_string();
    if common.json {
        return out_json(&json!({
            "written": written,
            "from": imported.program,
            "chosen": imported.choices,
            "left_out": imported.left_out,
        }));
    }
    let mut text = format!(
        "Wrote {written} from this {} file: {} keys carried over\n",
        imported.program, imported.carried
    );
    if !imported.left_out.is_empty() {
        let mut table = Table::new(&["not carried over", "why"]);
        for left in &imported.left_out {
            table.row([left.key.clone(), left.why.clone()]);
        }
        text += &format!("\n{}", table.text(2));
    }
    out(&(text
        + &format!("\nNext: `wattune recipe check {written}`, then `wattune train {written}`.")))
}

/// A recipe for chat records, whose messages may have weights.
fn import_chat(arguments: &ImportArguments, path: &Path, common: Common) -> Result<ExitCode> {
    let file = arguments.file.display().to_string();
    let Some(model) = &arguments.model else {
        return Err(Error::new(Kind::Usage, "chat records name no model")
            .at(file.clone())
            .hint(format!(
                "choose an open one: `wattune recipe import {file} --model HuggingFaceTB/SmolLM2-135M-Instruct`"
            )));
    };
    let request = FirstRecipe {
        path,
        model,
        data: arguments.data.as_deref().unwrap_or(&file),
        validation: None,
        columns: &[],
        budget: None,
    };
    suggest(&request, common)
}

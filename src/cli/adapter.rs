//! `wattune adapter inspect|convert|diff`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::{Common, out, out_json};
use crate::error::Result;
use crate::report::text::{Table, bullet, paragraph};
use crate::run::{self, AdapterConversion, AdapterDifference, Inspection, Verdict};
use crate::work::Precision;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Show an adapter's method, ranks, targets and tensors, and which programs load it
    Inspect {
        /// PEFT adapter directory, run directory, or adapter_config.json
        path: PathBuf,
    },
    /// Write an adapter anew: PEFT's tensor names, another dtype, or plain LoRA
    ///
    /// Plain LoRA has one rank and the scaling lora_alpha / r for all modules, which every runtime reads alike: rsLoRA, rank_pattern
    /// and alpha_pattern become part of alpha, rank and B. PiSSA and OLoRA need the adapter before training. DoRA, trained biases and
    /// modules_to_save have no plain form and are refused.
    Convert(ConvertArguments),
    /// Compare two adapters: configuration, and the delta of each module
    ///
    /// Norms are Frobenius norms of the delta scaling B A; what one adapter lacks is zero there.
    Diff {
        /// PEFT adapter directory or run directory
        first: PathBuf,
        /// The same of the other adapter
        second: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct ConvertArguments {
    /// PEFT adapter directory or run directory
    path: PathBuf,
    /// Output directory; must not exist
    #[arg(long)]
    out: PathBuf,
    /// Type of all tensors [default: each keeps its own]
    #[arg(long)]
    dtype: Option<Precision>,
    /// Write plain LoRA
    #[arg(long)]
    plain: bool,
    /// The adapter before training, which is subtracted, as PEFT's path_initial_model_for_weight_conversion
    #[arg(long, value_name = "DIR")]
    initial: Option<PathBuf>,
}

pub(super) fn run(command: &Command, common: Common) -> Result<ExitCode> {
    match command {
        Command::Inspect { path } => inspect(path, common),
        Command::Convert(arguments) => convert(arguments, common),
        Command::Diff { first, second } => {
            let found = run::diff_adapters(first, second)?;
            if common.json {
                return out_json(&found);
            }
            out(&difference_page(&found))
        }
    }
}

fn inspect(path: &Path, common: Common) -> Result<ExitCode> {
    let found = run::inspect_adapter(path)?;
    if common.json {
        return out_json(&found);
    }
    out(&inspection_page(&found))
}

fn convert(arguments: &ConvertArguments, common: Common) -> Result<ExitCode> {
    let converted = run::convert_adapter(&AdapterConversion {
        dir: &arguments.path,
        out: &arguments.out,
        dtype: arguments.dtype,
        plain: arguments.plain,
        initial: arguments.initial.as_deref(),
    })?;
    let path = arguments.out.display().to_string();
    if common.json {
        return out_json(&json!({
            "out": path,
            "changes": converted.changes,
            "tensors": converted.tensors,
            "bytes": converted.bytes,
            "portability": converted.portability,
        }));
    }
    let mut text = format!(
        "Wrote {} tensors to `{path}` ({}).\n",
        converted.tensors, converted.bytes
    );
    text.extend(converted.changes.iter().map(|change| bullet(change)));
    out(&format!("{text}\n{}", verdicts(&converted.portability)))
}

fn inspection_page(found: &Inspection) -> String {
    let config = &found.config;
    let unknown = || "not named".to_string();
    let ranks: Vec<String> = found.ranks().iter().map(usize::to_string).collect();
    let rows = vec![
        ("kind", found.kind.clone()),
        (
            "base model",
            config
                .base_model_name_or_path
                .clone()
                .unwrap_or_else(unknown),
        ),
        ("task", config.task_type.clone().unwrap_or_else(unknown)),
        ("rank", ranks.join(", ")),
        ("lora_alpha", config.lora_alpha.0.to_string()),
        ("target_modules", found.targets()),
        (
            "modules_to_save",
            config
                .modules_to_save
                .clone()
                .unwrap_or_default()
                .join(", "),
        ),
        ("parameters", found.parameters.to_string()),
        ("size", found.bytes.to_string()),
    ];
    let rows = rows.into_iter().filter(|(_, value)| !value.is_empty());
    let mut text = Table::pairs(["adapter", ""], rows.collect()).text(0);
    let mut tensors = Table::new(&["name", "type", "shape"]);
    for tensor in &found.tensors {
        tensors.row([
            tensor.name.clone(),
            tensor.dtype.clone(),
            format!("{:?}", tensor.shape),
        ]);
    }
    if !found.tensors.is_empty() {
        text += &format!("\n{}", tensors.text(0));
    }
    text += &format!("\n{}", verdicts(&found.portability));
    if found.problems.is_empty() {
        text += "\nwattune loads it.\n";
    } else {
        text += "\nwattune does not load it:\n";
        text.extend(found.problems.iter().map(|problem| bullet(problem)));
    }
    text.extend(found.notes.iter().map(|note| paragraph(note, 0)));
    text
}

/// The runtimes' verdicts as a table.
fn verdicts(verdicts: &[Verdict]) -> String {
    let mut table = Table::new(&["runtime", "verdict", "reasons"]);
    for verdict in verdicts {
        let mut reasons = verdict.reasons.iter().cloned();
        let (name, effect) = (verdict.runtime.name(), verdict.effect.words());
        table.row([
            name.into(),
            effect.into(),
            reasons.next().unwrap_or_default(),
        ]);
        for reason in reasons {
            table.row([String::new(), String::new(), reason]);
        }
    }
    table.text(0)
}

fn difference_page(found: &AdapterDifference) -> String {
    let mut text = String::new();
    if found.config.is_empty() {
        text += "The configurations are the same.\n";
    } else {
        let mut keys = Table::new(&["key", "first", "second"]);
        for key in &found.config {
            keys.row([
                key.key.clone(),
                key.first.to_string(),
                key.second.to_string(),
            ]);
        }
        text += &keys.text(0);
    }
    let mut norms = Table::new(&["delta", "first", "second", "difference", "cosine"]).right_from(1);
    let number = |value: f64| format!("{value:.6}");
    let named = found.modules.iter().chain(&found.tensors);
    let named = named.map(|delta| (delta.name.as_str(), delta.shapes_differ, delta.norms));
    for (name, shapes_differ, of) in named.chain([("total", false, found.total)]) {
        let difference = if shapes_differ {
            "other shape".to_string()
        } else {
            number(of.difference)
        };
        let cosine = of
            .cosine
            .map_or(String::new(), |cosine| format!("{cosine:.6}"));
        norms.row([
            name.to_string(),
            number(of.first),
            number(of.second),
            difference,
            cosine,
        ]);
    }
    text + "\n" + &norms.text(0)
}

//! `wattune generate`.

use std::process::ExitCode;

use super::model::{ComputeArguments, ModelArguments};
use super::screen::Terminal;
use super::{Common, out, out_json, write_out};
use crate::error::{Error, Kind, Result};
use crate::run::{self, GenerationJob, Sampling};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    compute: ComputeArguments,
    /// Prompt to continue
    #[arg(long)]
    prompt: String,
    /// Format the prompt as a user message with the model's chat template
    #[arg(long)]
    chat: bool,
    /// Maximum number of new tokens
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Sample from the most likely tokens whose probabilities sum to this (nucleus sampling)
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Sample from the k most likely tokens (0: all)
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Random seed
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Stop before this text
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

/// Refuses sampling settings out of their ranges.
fn check(arguments: &Arguments) -> Result<()> {
    let refuse = |flag: &str, value: f64, rule: &str| {
        Err(Error::new(Kind::Usage, format!("`{flag}` is out of range"))
            .value(value.to_string())
            .rule(rule))
    };
    if !(arguments.temperature >= 0.0 && arguments.temperature.is_finite()) {
        return refuse(
            "--temperature",
            arguments.temperature,
            "a number of at least 0",
        );
    }
    if !(arguments.top_p > 0.0 && arguments.top_p <= 1.0) {
        return refuse("--top-p", arguments.top_p, "above 0, at most 1");
    }
    if arguments.stop.iter().any(String::is_empty) {
        return Err(Error::new(Kind::Usage, "`--stop` is empty")
            .rule("a text of at least one character")
            .hint("leave `--stop` out to end at the end-of-text token or after --max-new-tokens"));
    }
    Ok(())
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    check(arguments)?;
    let source = arguments.model.resolve()?;
    let device = arguments.compute.open()?;
    let job = GenerationJob {
        model: arguments.compute.request(&source, &device),
        prompt: &arguments.prompt,
        chat: arguments.chat,
        max_new_tokens: arguments.max_new_tokens,
        sampling: Sampling {
            temperature: arguments.temperature,
            top_p: arguments.top_p,
            top_k: arguments.top_k,
            seed: arguments.seed,
        },
        stop: &arguments.stop,
    };
    let mut screen = Terminal::new(common.quiet);
    let mut show = |piece: &str| {
        if !common.json {
            // An output that fails ends the text, not the program.
            let _ = write_out(piece);
        }
    };
    let result = run::generate(&job, &mut screen, &mut show)?;
    if common.json {
        out_json(&result)
    } else {
        out("")
    }
}

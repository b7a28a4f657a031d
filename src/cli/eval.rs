//! `wattune eval`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::model::ModelArguments;
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::run::{self, DataOptions, EvaluationJob, Format, OnBadRecord, PromptTemplate, TxtUnit};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Data files (.jsonl .json .csv .tsv .txt .parquet), folders or patterns
    #[arg(long, required = true, num_args = 1..)]
    data: Vec<PathBuf>,
    /// Record format
    #[arg(long, default_value = "auto")]
    format: Format,
    /// Column of a field, such as `--column prompt=question`
    #[arg(long = "column", value_name = "FIELD=COLUMN")]
    columns: Vec<String>,
    /// What a prompt becomes, such as "{prompt} "; "chat": the user's turn of the chat template
    #[arg(long)]
    prompt_template: Option<PromptTemplate>,
    /// Maximum length of a record in tokens
    #[arg(long, default_value_t = 512)]
    max_length: usize,
    /// Records per forward pass
    #[arg(long, default_value_t = 8)]
    micro_batch_size: usize,
    /// Evaluate only the first N records
    #[arg(long)]
    limit: Option<usize>,
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    if arguments.micro_batch_size == 0 || arguments.max_length == 0 {
        let rule = "`--micro-batch-size` and `--max-length` are at least 1";
        return Err(Error::new(Kind::Usage, "a forward pass holds no tokens")
            .value("0")
            .rule(rule));
    }
    let (device, _) = arguments.model.device.device.open()?;
    let job = EvaluationJob {
        model: arguments.model.request(&device),
        data: arguments.data.clone(),
        options: options(arguments)?,
        micro_batch_size: arguments.micro_batch_size,
        limit: arguments.limit,
    };
    let mut screen = Terminal::new(common.quiet);
    let result = run::evaluate(&job, &mut screen)?;
    screen.clear();
    if common.json {
        return out_json(&result);
    }
    out(&format!(
        "loss {:.4} nats per token (perplexity {:.2}) over {} loss tokens of {} records",
        result.loss, result.perplexity, result.loss_tokens, result.examples
    ))
}

fn options(arguments: &Arguments) -> Result<DataOptions> {
    let pair = |text: &String| {
        let split = text
            .split_once('=')
            .map(|(field, column)| (field.to_string(), column.to_string()));
        split.ok_or_else(|| {
            Error::new(Kind::Usage, "a column is given as FIELD=COLUMN")
                .at("--column")
                .value(text.clone())
        })
    };
    let columns = arguments.columns.iter().map(pair).collect::<Result<_>>()?;
    Ok(DataOptions {
        format: arguments.format,
        columns,
        max_length: arguments.max_length,
        on_bad_record: OnBadRecord::Stop,
        txt_unit: TxtUnit::Paragraph,
        prompt_template: arguments.prompt_template.clone(),
    })
}

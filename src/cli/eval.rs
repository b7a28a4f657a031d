//! `wattune eval`.

use std::path::PathBuf;
use std::process::ExitCode;

use super::model::{ComputeArguments, ModelArguments};
use super::screen::Terminal;
use super::{Common, out, out_json};
use crate::error::{Error, Kind, Result};
use crate::recipe::{Quantization, Recipe};
use crate::run::Screen as _;
use crate::run::{
    self, ChoiceJob, Classification, DataOptions, Device, Divergence, Evaluation, EvaluationJob,
    Format, GenerationScores, ModelRequest, ModelSelection, ModelSource, OnBadRecord,
    PromptTemplate, TxtUnit,
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    compute: ComputeArguments,
    /// Data files (.jsonl .json .csv .tsv .txt .parquet), folders or patterns [default: the run's
    /// validation files]
    #[arg(long, num_args = 1..)]
    data: Vec<PathBuf>,
    /// Record format [default: the run's, else auto]
    #[arg(long)]
    format: Option<Format>,
    /// Column of a field, such as `--column prompt=question`
    #[arg(long = "column", value_name = "FIELD=COLUMN")]
    columns: Vec<String>,
    /// What a prompt becomes, such as "{prompt} "; "chat": the user's turn of the chat template
    #[arg(long)]
    prompt_template: Option<PromptTemplate>,
    /// Maximum length of a record in tokens [default: the run's, else 512]
    #[arg(long)]
    max_length: Option<usize>,
    /// Records per forward pass [default: the run's, else 8]
    #[arg(long)]
    micro_batch_size: Option<usize>,
    /// Read multiple-choice records and give acc and acc_norm, as lm-evaluation-harness
    ///
    /// A record has a prompt (or question, query, context), choices (or options, endings) and a label (or answer, gold, answerKey): an
    /// index from 0, a letter, or the text of the choice.
    #[arg(long, conflicts_with_all = ["format", "prompt_template", "max_length", "micro_batch_size", "against"])]
    multiple_choice: bool,
    /// Generate an answer to each prompt and compare it with the record's: exact match, ROUGE, BLEU
    ///
    /// ROUGE as rouge-score without stemming, BLEU as sacrebleu; answers are greedy.
    #[arg(long, conflicts_with_all = ["multiple_choice", "against"])]
    generate: bool,
    /// Tokens of a generated answer at most
    #[arg(long, default_value_t = 128, requires = "generate")]
    max_new_tokens: usize,
    /// Evaluate only the first N records
    #[arg(long)]
    limit: Option<usize>,
    /// Compare predictions with another model's: a run or adapter directory, hub id, model directory or GGUF file
    #[arg(long, value_name = "MODEL")]
    against: Option<String>,
}

impl Arguments {
    pub(super) fn source(&self) -> Result<ModelSource> {
        self.model.resolve()
    }

    pub(super) fn device(&self) -> Result<Device> {
        self.compute.open()
    }

    /// Refuses options of `eval` that `predict` does not have.
    pub(super) fn check_predicts(&self) -> Result<()> {
        let options = [
            (self.multiple_choice, "--multiple-choice"),
            (self.generate, "--generate"),
        ];
        match options.into_iter().find(|(given, _)| *given) {
            None => Ok(()),
            Some((_, option)) => Err(Error::new(
                Kind::Usage,
                "classes are predicted, nothing else",
            )
            .at(option)
            .hint(format!("use `wattune eval {option}`"))),
        }
    }

    /// The job on the model of `source`.
    pub(super) fn job<'a>(
        &self,
        source: &'a ModelSource,
        device: &'a Device,
        screen: &mut Terminal,
    ) -> Result<EvaluationJob<'a>> {
        if [self.micro_batch_size, self.max_length].contains(&Some(0)) {
            let rule = "`--micro-batch-size` and `--max-length` are at least 1";
            return Err(Error::new(Kind::Usage, "a forward pass holds no tokens")
                .value("0")
                .rule(rule));
        }
        let of_run = source.recipe.as_ref();
        let data = match self.data.as_slice() {
            [] => run::validation_files(source, screen.downloads())?,
            files => files.to_vec(),
        };
        Ok(EvaluationJob {
            model: self.compute.request(source, device),
            data,
            options: options(self, of_run)?,
            micro_batch_size: self
                .micro_batch_size
                .or(of_run.map(|recipe| recipe.train.micro_batch_size))
                .unwrap_or(8),
            limit: self.limit,
        })
    }
}

pub(super) fn run(arguments: &Arguments, common: Common) -> Result<ExitCode> {
    let source = arguments.source()?;
    let device = arguments.device()?;
    let mut screen = Terminal::new(common.quiet);
    if arguments.multiple_choice {
        return multiple_choice(arguments, &source, &device, &mut screen, common);
    }
    let job = arguments.job(&source, &device, &mut screen)?;
    if let Some(reference) = &arguments.against {
        return compare(&job, reference, &mut screen, common);
    }
    if arguments.generate {
        let scores = run::evaluate_generations(&job, arguments.max_new_tokens, &mut screen)?;
        screen.clear();
        return generations(&scores, common);
    }
    let result = run::evaluate(&job, &mut screen)?;
    screen.clear();
    if common.json {
        return out_json(&result);
    }
    match &result.classification {
        Some(classification) => out(&classification_text(&result, classification)),
        None => out(&format!(
            "loss {:.4} nats per token (perplexity {:.2}) over {} loss tokens of {} records",
            result.loss,
            result.loss.exp(),
            result.loss_tokens,
            result.examples
        )),
    }
}

/// Prints how far the model's predictions are from those of `reference`.
fn compare(
    job: &EvaluationJob<'_>,
    reference: &str,
    screen: &mut Terminal,
    common: Common,
) -> Result<ExitCode> {
    let reference = ModelSelection::named(reference)?;
    let quantization = reference
        .recipe
        .as_ref()
        .map(|recipe| recipe.model.quantization);
    let request = ModelRequest {
        source: &reference,
        quantization: quantization.unwrap_or(Quantization::None),
        ..job.model
    };
    let found = run::divergence(job, &request, screen)?;
    screen.clear();
    if common.json {
        return out_json(&found);
    }
    out(&divergence_text(&found))
}

/// A divergence in two lines.
pub(super) fn divergence_text(found: &Divergence) -> String {
    format!(
        "loss {:.4} nats per token, {:+.4} against {:.4} of the other model\n\
         KL divergence {:.5} nats (median {:.5}, 99 % {:.5}), the same likeliest token at {:.2} % of {} tokens",
        found.loss,
        found.loss - found.reference_loss,
        found.reference_loss,
        found.kl_divergence,
        found.kl_median,
        found.kl_99,
        100.0 * found.same_top,
        found.loss_tokens
    )
}

fn generations(scores: &GenerationScores, common: Common) -> Result<ExitCode> {
    if common.json {
        return out_json(scores);
    }
    out(&format!(
        "exact match {:.4}, ROUGE-1 {:.4}, ROUGE-2 {:.4}, ROUGE-L {:.4}, BLEU {:.2} over {} records, {} tokens generated",
        scores.exact_match,
        scores.rouge1,
        scores.rouge2,
        scores.rouge_l,
        scores.bleu,
        scores.examples,
        scores.tokens
    ))
}

fn multiple_choice(
    arguments: &Arguments,
    source: &ModelSource,
    device: &Device,
    screen: &mut Terminal,
    common: Common,
) -> Result<ExitCode> {
    let data = match arguments.data.as_slice() {
        [] => run::validation_files(source, screen.downloads())?,
        files => files.to_vec(),
    };
    let job = ChoiceJob {
        model: arguments.compute.request(source, device),
        data,
        columns: column_pairs(&arguments.columns)?,
        limit: arguments.limit,
    };
    let scores = run::evaluate_choices(&job, screen)?;
    screen.clear();
    if common.json {
        return out_json(&scores);
    }
    let error = |error: Option<f64>| error.map_or(String::new(), |error| format!(" ± {error:.4}"));
    out(&format!(
        "acc {:.4}{}, acc_norm {:.4}{} over {} records",
        scores.acc,
        error(scores.acc_stderr),
        scores.acc_norm,
        error(scores.acc_norm_stderr),
        scores.examples
    ))
}

/// Figures, and the confusion matrix with a row for each true class.
fn classification_text(result: &Evaluation, classification: &Classification) -> String {
    let figures = classification.metrics.named().into_iter();
    let figures = figures.map(|(name, figure)| format!("{name} {figure:.4}, "));
    let matrix = &classification.confusion_matrix;
    let mut lines = vec![format!(
        "{}loss {:.4} over {} records",
        figures.collect::<String>(),
        result.loss,
        result.examples
    )];
    if !matrix.is_empty() {
        let labels = classification.labels.join(", ");
        lines.push(format!("true class: records predicted as {labels}"));
    }
    for (label, row) in classification.labels.iter().zip(matrix) {
        let counts: Vec<String> = row.iter().map(u64::to_string).collect();
        lines.push(format!("{label}: {}", counts.join(", ")));
    }
    lines.join("\n")
}

/// The options of the run's recipe, replaced where an argument is given.
fn options(arguments: &Arguments, recipe: Option<&Recipe>) -> Result<DataOptions> {
    let mut options = default_options(recipe);
    if !arguments.columns.is_empty() {
        options.columns = column_pairs(&arguments.columns)?;
    }
    options.format = arguments.format.unwrap_or(options.format);
    options.max_length = arguments.max_length.unwrap_or(options.max_length);
    options.prompt_template = arguments
        .prompt_template
        .clone()
        .or(options.prompt_template);
    Ok(options)
}

/// The values of `--column FIELD=COLUMN`.
pub(super) fn column_pairs(texts: &[String]) -> Result<Vec<(String, String)>> {
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
    texts.iter().map(pair).collect()
}

/// How records are read where no argument says so: as the run of `recipe` did.
pub(super) fn default_options(recipe: Option<&Recipe>) -> DataOptions {
    recipe.map_or_else(
        || DataOptions {
            format: Format::Auto,
            columns: Default::default(),
            max_length: 512,
            on_bad_record: OnBadRecord::Stop,
            txt_unit: TxtUnit::Paragraph,
            prompt_template: None,
            labels: Vec::new(),
            label_kind: Default::default(),
        },
        run::data_options,
    )
}

//! Answers generated for the prompts of records, compared with theirs: exact match, ROUGE and BLEU.

use serde::Serialize;

use super::generate::{Generating, fits};
use super::inference::{load, open};
use super::multiple_choice::{refuse_classifier, refuse_empty};
use super::{EvaluationJob, Screen};
use crate::data::prompted;
use crate::error::Result;
use crate::model::Sampling;
use crate::ops::Context;
use crate::train::metrics::{Bleu, rouge_l, rouge_n, share};
use crate::work::WorkCounter;

/// How well generated answers match.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerationScores {
    /// Share of answers equal to the reference, white space at the ends aside.
    pub exact_match: f64,
    /// Its standard error; `None` of one record.
    pub exact_match_stderr: Option<f64>,
    /// Mean F1 of ROUGE-1, as rouge-score without stemming.
    pub rouge1: f64,
    /// Of ROUGE-2.
    pub rouge2: f64,
    /// Of ROUGE-L.
    #[serde(rename = "rougeL")]
    pub rouge_l: f64,
    /// Corpus BLEU from 0 to 100, as sacrebleu.
    pub bleu: f64,
    /// Records.
    pub examples: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
    /// The answers, in the order of the records.
    pub generated: Vec<String>,
}

/// Generates an answer of at most `max_new_tokens` to each record of the job, greedily.
///
/// # Errors
/// A model or data that cannot be loaded, a classifier, records without an answer, and prompts longer than the positions.
pub fn evaluate_generations(
    job: &EvaluationJob<'_>,
    max_new_tokens: usize,
    screen: &mut dyn Screen,
) -> Result<GenerationScores> {
    let mut model = open(&job.model, screen)?;
    refuse_classifier(&model.architecture, "--generate")?;
    let limit = job.limit.unwrap_or(usize::MAX);
    let records = prompted(&job.data, &job.options, &model.tokenizer, limit)?;
    refuse_empty(&records)?;
    let loaded = load(&mut model, &job.model, screen)?;
    let counter = WorkCounter::default();
    let generating = Generating {
        decoder: &loaded.decoder,
        model: &model,
        context: Context::new(&counter, job.model.precision),
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
        },
        stop: &[],
    };
    let mut bleu = Bleu::default();
    let mut rouge = [0.0; 3];
    let mut tokens = 0;
    let mut generated = Vec::new();
    for (done, record) in records.iter().enumerate() {
        screen.evaluating(done, records.len());
        let room = fits(&model, record.prompt.len())?;
        let answer = generating.answer(&record.prompt, max_new_tokens.min(room), &mut |_| {})?;
        let (said, reference) = (answer.text.trim(), record.reference.trim());
        bleu.add(said, reference);
        let scores = [
            rouge_n(said, reference, 1),
            rouge_n(said, reference, 2),
            rouge_l(said, reference),
        ];
        for (sum, score) in rouge.iter_mut().zip(scores) {
            *sum += score;
        }
        tokens += answer.tokens.len() as u64;
        generated.push(said.to_string());
    }
    let count = records.len() as f64;
    let [rouge1, rouge2, rouge_l] = rouge.map(|sum| sum / count);
    let pairs = generated.iter().zip(&records);
    let exact = share(pairs.map(|(said, record)| said == record.reference.trim()));
    Ok(GenerationScores {
        exact_match: exact.mean,
        exact_match_stderr: exact.standard_error,
        rouge1,
        rouge2,
        rouge_l,
        bleu: bleu.score(),
        examples: records.len() as u64,
        tokens,
        flops: counter.take().flops(),
        generated,
    })
}

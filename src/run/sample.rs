//! The report's sample: one greedy generation before and one after training, counted and charged as evaluation.
//!
//! Always the same number of tokens, so that its cost is known before; the text shown ends at the end-of-text token.

use super::prepare::Prepared;
use crate::data::Example;
use crate::error::Result;
use crate::model::{Decoder, ModelShape, Sampling, Session};
use crate::ops::Context;
use crate::work::{Work, WorkCounter};

/// Tokens generated.
const TOKENS: usize = 48;
/// Longer prompts are skipped.
const MAX_PROMPT: usize = 256;

/// The prompt of the first record that has one.
pub(super) struct SamplePrompt {
    ids: Vec<u32>,
    /// The prompt's text.
    pub(super) text: String,
}

/// Chosen from the first validation records, else training records; `None` if none begins with a prompt, and for
/// a classifier.
pub(super) fn sample_prompt(prepared: &Prepared) -> Result<Option<SamplePrompt>> {
    if prepared.architecture.classifier().is_some() {
        return Ok(None);
    }
    let validation = prepared
        .validation
        .iter()
        .flat_map(|set| set.examples.iter());
    let limit = prepared
        .architecture
        .max_position_embeddings
        .saturating_sub(TOKENS)
        .min(MAX_PROMPT);
    let prompt = |example: &Example| {
        let length = example.loss.iter().position(|loss| *loss)?;
        (length > 1 && length <= limit).then(|| example.tokens[..length].to_vec())
    };
    let Some(ids) = validation
        .chain(prepared.train.examples.iter())
        .take(100)
        .find_map(prompt)
    else {
        return Ok(None);
    };
    let text = prepared.tokenizer.decode(&ids)?;
    Ok(Some(SamplePrompt { ids, text }))
}

impl SamplePrompt {
    /// Work of one generation.
    pub(super) fn work(&self, shape: &ModelShape) -> Work {
        let tokens = self.ids.len()..self.ids.len() + TOKENS - 1;
        shape.prefill(self.ids.len()) + tokens.map(|before| shape.decoding(before)).sum()
    }

    /// Generates; returns the text up to the end-of-text token and the executed work.
    pub(super) fn generate(
        &self,
        prepared: &Prepared,
        decoder: &Decoder,
    ) -> Result<(String, Work)> {
        let counter = WorkCounter::default();
        let mut session =
            Session::new(decoder, Context::new(&counter, prepared.recipe.model.dtype));
        let mut logits = session.read(&self.ids)?;
        let mut ids = Vec::with_capacity(TOKENS);
        loop {
            ids.push(Sampling::GREEDY.choose(&logits, 0));
            if ids.len() == TOKENS {
                break;
            }
            logits = session.read(&ids[ids.len() - 1..])?;
        }
        let eos = prepared.tokenizer.eos_id();
        let end = ids
            .iter()
            .position(|id| Some(*id) == eos)
            .unwrap_or(ids.len());
        Ok((prepared.tokenizer.decode(&ids[..end])?, counter.take()))
    }
}

//! Text generation, streamed token by token.

use serde::Serialize;

use super::Screen;
use super::inference::{ModelRequest, OpenedModel, load, not_finite, open};
use crate::data::Tokenizer;
use crate::error::{Error, Kind, Result};
use crate::model::{Decoder, Sampling, Session};
use crate::ops::Context;
use crate::work::WorkCounter;

/// A generation.
pub struct GenerationJob<'a> {
    /// The model.
    pub model: ModelRequest<'a>,
    /// The prompt.
    pub prompt: &'a str,
    /// Formats the prompt as a user message with the model's chat template.
    pub chat: bool,
    /// Maximum number of new tokens.
    pub max_new_tokens: usize,
    /// Sampling parameters.
    pub sampling: Sampling,
    /// Stop strings, excluded from the result.
    pub stop: &'a [String],
}

/// Generated text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generated {
    /// Token ids of the prompt.
    pub prompt_tokens: Vec<u32>,
    /// Token ids generated, the end-of-text token included.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Executed FLOPs of matrix products and attention.
    pub flops: u64,
}

/// Generates; `show` receives each new piece of text.
///
/// # Errors
/// A model that cannot be loaded, a prompt longer than its positions, and logits that are not finite.
pub fn generate(
    job: &GenerationJob<'_>,
    screen: &mut dyn Screen,
    show: &mut dyn FnMut(&str),
) -> Result<Generated> {
    let mut model = open(&job.model, screen)?;
    if model.architecture.classifier().is_some() {
        return Err(Error::new(
            Kind::Usage,
            "a classifier predicts classes, not the next token",
        )
        .value(model.architecture.class.clone())
        .hint("use `wattune predict --data FILE`"));
    }
    let prompt = encode_prompt(job, &model.tokenizer)?;
    let most = max_tokens(job, &model, prompt.len(), screen)?;
    let loaded = load(&mut model, &job.model, screen)?;
    let counter = WorkCounter::default();
    let generating = Generating {
        decoder: &loaded.decoder,
        model: &model,
        context: Context::new(&counter, job.model.precision),
        sampling: job.sampling,
        stop: job.stop,
    };
    let Answer { tokens, text } = generating.answer(&prompt, most, show)?;
    Ok(Generated {
        prompt_tokens: prompt,
        tokens,
        text,
        flops: counter.take().flops(),
    })
}

/// A loaded model that generates.
pub(super) struct Generating<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) model: &'a OpenedModel,
    pub(super) context: Context<'a>,
    pub(super) sampling: Sampling,
    pub(super) stop: &'a [String],
}

/// What follows a prompt.
pub(super) struct Answer {
    pub(super) tokens: Vec<u32>,
    pub(super) text: String,
}

impl Generating<'_> {
    /// At most `most` tokens after `prompt`; `show` receives each new piece of text.
    pub(super) fn answer(
        &self,
        prompt: &[u32],
        most: usize,
        show: &mut dyn FnMut(&str),
    ) -> Result<Answer> {
        let tokenizer = &self.model.tokenizer;
        let is_end = |id| tokenizer.eos_id() == Some(id) || self.model.end_ids.contains(&id);
        let mut session = Session::new(self.decoder, self.context);
        let mut text = StreamedText::new(self.stop, show);
        let mut tokens = Vec::new();
        let mut logits = session.read(prompt)?;
        for index in 0..most {
            if logits.iter().any(|logit| !logit.is_finite()) {
                return Err(not_finite("output").while_running());
            }
            let token = self.sampling.choose(&logits, index as u64);
            tokens.push(token);
            if is_end(token) {
                break;
            }
            text.update(continuation(tokenizer, prompt, &tokens)?);
            if text.is_stopped || index + 1 == most {
                break;
            }
            logits = session.read(&[token])?;
        }
        Ok(Answer {
            tokens,
            text: text.finish(),
        })
    }
}

fn encode_prompt(job: &GenerationJob<'_>, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let encoding = if job.chat {
        let messages = serde_json::json!([{ "role": "user", "content": job.prompt }]);
        tokenizer.encode(&tokenizer.render_chat(&messages, None, true)?, false)?
    } else {
        tokenizer.encode(job.prompt, true)?
    };
    Ok(encoding.ids)
}

/// New tokens that the job and the model's positions allow.
fn max_tokens(
    job: &GenerationJob<'_>,
    model: &OpenedModel,
    prompt: usize,
    screen: &mut dyn Screen,
) -> Result<usize> {
    let most = fits(model, prompt)?;
    if job.max_new_tokens > most {
        screen.note(&format!("warning: after this prompt the model has positions for {most} tokens: no more are generated"));
    }
    Ok(job.max_new_tokens.min(most))
}

/// New tokens that the model's positions allow after a prompt of so many.
pub(super) fn fits(model: &OpenedModel, prompt: usize) -> Result<usize> {
    let positions = model.architecture.max_position_embeddings;
    if prompt < positions {
        return Ok(positions - prompt);
    }
    Err(Error::new(
        Kind::Usage,
        "the prompt is longer than the model's positions",
    )
    .value(format!("{prompt} tokens"))
    .rule(format!("below {positions}"))
    .hint("shorten the prompt"))
}

/// Text shown as soon as later tokens cannot change it.
struct StreamedText<'a> {
    stops: &'a [String],
    show: &'a mut dyn FnMut(&str),
    text: String,
    /// Bytes shown.
    shown: usize,
    /// Whether a stop string was found.
    is_stopped: bool,
}

impl<'a> StreamedText<'a> {
    fn new(stops: &'a [String], show: &'a mut dyn FnMut(&str)) -> Self {
        Self {
            stops,
            show,
            text: String::new(),
            shown: 0,
            is_stopped: false,
        }
    }

    /// Replaces the text by a longer one and shows what is settled: neither half a character nor the start of a stop string.
    fn update(&mut self, mut text: String) {
        let cut = self.stops.iter().filter_map(|stop| text.find(stop)).min();
        let settled = cut.unwrap_or_else(|| {
            let whole_characters = text.trim_end_matches('\u{fffd}').len();
            whole_characters.min(text.len() - stop_prefix_len(&text, self.stops))
        });
        self.is_stopped = cut.is_some();
        text.truncate(cut.unwrap_or(text.len()));
        self.text = text;
        self.show_to(settled);
    }

    /// Shows the rest and returns the text.
    fn finish(mut self) -> String {
        self.show_to(self.text.len());
        self.text
    }

    /// Shows the text up to byte `end`.
    fn show_to(&mut self, end: usize) {
        if let Some(piece) = self.text.get(self.shown..end)
            && !piece.is_empty()
        {
            (self.show)(piece);
            self.shown = end;
        }
    }
}

/// Bytes at the end of `text` that may be the start of a stop string.
fn stop_prefix_len(text: &str, stops: &[String]) -> usize {
    let prefix = |stop: &String| {
        let ends = stop.char_indices().map(|(end, _)| end);
        ends.filter(|end| text.ends_with(&stop[..*end])).max()
    };
    stops.iter().filter_map(prefix).max().unwrap_or(0)
}

/// The text of `tokens`, decoded with the prompt's last token: a tokenizer may strip the first token's space.
fn continuation(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32]) -> Result<String> {
    let last = &prompt[prompt.len() - 1..];
    let head = tokenizer.decode(last)?;
    let all = tokenizer.decode(&[last, tokens].concat())?;
    match all.strip_prefix(head.as_str()) {
        Some(rest) => Ok(rest.to_string()),
        None => tokenizer.decode(tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_possible_start_of_a_stop_string_is_not_shown() {
        let stops = ["END".to_string(), "\n\n".to_string()];
        let cases = [
            ("a story", 0),
            ("the E", 1),
            ("the EN", 2),
            ("line\n", 1),
            ("the ENd", 0),
        ];
        for (text, expected) in cases {
            assert_eq!(stop_prefix_len(text, &stops), expected, "{text:?}");
        }
        assert_eq!(stop_prefix_len("anything", &[]), 0);
    }

    #[test]
    fn text_is_shown_once_and_in_order() {
        let mut pieces = Vec::new();
        let mut show = |piece: &str| pieces.push(piece.to_string());
        let mut text = StreamedText::new(&[], &mut show);
        for so_far in ["on", "once", "once", "once \u{fffd}", "once é"] {
            text.update(so_far.to_string());
        }
        let shown = text.shown;
        assert_eq!(text.finish(), "once é");
        assert_eq!((pieces.join("|").as_str(), shown), ("on|ce| |é", 7));
    }
}

//! Text from a model.

use serde::Serialize;

use super::Screen;
use super::inference::{ModelRequest, load};
use crate::error::{Error, Kind, Result};
use crate::model::{Sampling, Session};
use crate::ops::Context;
use crate::work::Tally;

/// What is generated.
pub struct GenerationJob<'a> {
    /// The model.
    pub model: ModelRequest<'a>,
    /// What it goes on from.
    pub prompt: &'a str,
    /// Whether the prompt is a message of a person, rendered by the model's chat template.
    pub chat: bool,
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Texts that end the generation; they are not part of it.
    pub stop: &'a [String],
}

/// The result.
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

/// Generates; `show` is given each new piece of text as it comes.
pub fn generate(job: &GenerationJob<'_>, screen: &mut dyn Screen, show: &mut dyn FnMut(&str)) -> Result<Generated> {
    let loaded = load(&job.model, screen.downloads())?;
    let tokenizer = &loaded.tokenizer;
    let prompt = match job.chat {
        true => {
            let messages = serde_json::json!([{ "role": "user", "content": job.prompt }]);
            tokenizer.encode(&tokenizer.render_chat(&messages, None, true)?, false)?.ids
        }
        false => tokenizer.encode(job.prompt, true)?.ids,
    };
    let room = loaded.architecture.max_position_embeddings;
    if prompt.len() >= room {
        return Err(Error::new(Kind::Usage, "the prompt is longer than the model's positions")
            .value(format!("{} tokens", prompt.len()))
            .rule(format!("below {room}"))
            .hint("shorten the prompt"));
    }
    let tally = Tally::default();
    let mut session = Session::new(&loaded.decoder, Context::new(&tally, job.model.precision));
    let mut logits = session.read(&prompt)?;
    let (mut tokens, mut text) = (Vec::new(), String::new());
    for index in 0..job.max_new_tokens.min(room - prompt.len()) {
        let token = job.sampling.choose(&logits, index as u64);
        tokens.push(token);
        if tokenizer.eos_id() == Some(token) {
            break;
        }
        let all = continuation(tokenizer, &prompt, &tokens)?;
        let cut = job.stop.iter().filter_map(|stop| all.find(stop.as_str())).min();
        let fresh = &all[..cut.unwrap_or(all.len())];
        // A token may hold half a character: it is shown once it is whole.
        if let Some(piece) = fresh.strip_prefix(text.as_str()).filter(|piece| !piece.ends_with('\u{fffd}')) {
            show(piece);
            text = fresh.to_string();
        }
        if cut.is_some() {
            break;
        }
        logits = session.read(&[token])?;
    }
    Ok(Generated { prompt_tokens: prompt, tokens, text, flops: tally.take().flops() })
}

/// The text of `tokens` after `prompt`: decoded together, because a tokenizer may strip the first token's space.
fn continuation(tokenizer: &crate::data::Tokenizer, prompt: &[u32], tokens: &[u32]) -> Result<String> {
    let last = &prompt[prompt.len() - 1..];
    let (head, whole) = (tokenizer.decode(last)?, tokenizer.decode(&[last, tokens].concat())?);
    match whole.strip_prefix(head.as_str()) {
        Some(rest) => Ok(rest.to_string()),
        None => tokenizer.decode(tokens),
    }
}

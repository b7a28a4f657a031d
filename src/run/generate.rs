//! Text from a model.

use serde::Serialize;

use super::Screen;
use super::inference::{ModelRequest, load, not_finite};
use crate::error::{Error, Kind, Result};
use crate::model::{Sampling, Session};
use crate::ops::Context;
use crate::work::WorkCounter;

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
pub fn generate(
    job: &GenerationJob<'_>,
    screen: &mut dyn Screen,
    show: &mut dyn FnMut(&str),
) -> Result<Generated> {
    let loaded = load(&job.model, screen.downloads())?;
    let tokenizer = &loaded.tokenizer;
    let prompt = match job.chat {
        true => {
            let messages = serde_json::json!([{ "role": "user", "content": job.prompt }]);
            tokenizer
                .encode(&tokenizer.render_chat(&messages, None, true)?, false)?
                .ids
        }
        false => tokenizer.encode(job.prompt, true)?.ids,
    };
    let room = loaded.architecture.max_position_embeddings;
    if prompt.len() >= room {
        return Err(Error::new(
            Kind::Usage,
            "the prompt is longer than the model's positions",
        )
        .value(format!("{} tokens", prompt.len()))
        .rule(format!("below {room}"))
        .hint("shorten the prompt"));
    }
    let counter = WorkCounter::default();
    let mut session = Session::new(&loaded.decoder, Context::new(&counter, job.model.precision));
    if job.max_new_tokens > room - prompt.len() {
        let most = room - prompt.len();
        screen.note(&format!("warning: after this prompt the model has positions for {most} tokens: no more are generated"));
    }
    let mut logits = session.read(&prompt)?;
    let (mut tokens, mut text, mut shown) = (Vec::new(), String::new(), 0);
    let most = job.max_new_tokens.min(room - prompt.len());
    for index in 0..most {
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err(not_finite("output").while_running());
        }
        let token = job.sampling.choose(&logits, index as u64);
        tokens.push(token);
        if tokenizer.eos_id() == Some(token) {
            break;
        }
        let all = continuation(tokenizer, &prompt, &tokens)?;
        let cut = job
            .stop
            .iter()
            .filter_map(|stop| all.find(stop.as_str()))
            .min();
        // A token may hold half a character, or the beginning of a stop text: both are shown once they are known to stay.
        let sure = cut.unwrap_or_else(|| {
            all.trim_end_matches('\u{fffd}')
                .len()
                .min(all.len() - held_back(&all, job.stop))
        });
        shown = advance(&all[..sure], shown, show);
        text = all[..cut.unwrap_or(all.len())].to_string();
        if cut.is_some() || index + 1 == most {
            break;
        }
        logits = session.read(&[token])?;
    }
    advance(&text, shown, show);
    Ok(Generated {
        prompt_tokens: prompt,
        tokens,
        text,
        flops: counter.take().flops(),
    })
}

/// Shows what `text` has beyond its first `shown` bytes; returns how many are shown then.
fn advance(text: &str, shown: usize, show: &mut dyn FnMut(&str)) -> usize {
    match text.get(shown..) {
        Some(piece) if !piece.is_empty() => {
            show(piece);
            text.len()
        }
        _ => shown,
    }
}

/// Bytes at the end of `text` that begin one of `stops`: the next token may complete it.
fn held_back(text: &str, stops: &[String]) -> usize {
    let begins = |stop: &String| {
        stop.char_indices()
            .map(|(end, _)| end)
            .filter(|end| text.ends_with(&stop[..*end]))
            .max()
    };
    stops.iter().filter_map(begins).max().unwrap_or(0)
}

/// The text of `tokens` after `prompt`: decoded together, because a tokenizer may strip the first token's space.
fn continuation(
    tokenizer: &crate::data::Tokenizer,
    prompt: &[u32],
    tokens: &[u32],
) -> Result<String> {
    let last = &prompt[prompt.len() - 1..];
    let (head, whole) = (
        tokenizer.decode(last)?,
        tokenizer.decode(&[last, tokens].concat())?,
    );
    match whole.strip_prefix(head.as_str()) {
        Some(rest) => Ok(rest.to_string()),
        None => tokenizer.decode(tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_begin_a_stop_text_is_held_back() {
        let stops = ["END".to_string(), "\n\n".to_string()];
        let cases = [
            ("a story", 0),
            ("the E", 1),
            ("the EN", 2),
            ("line\n", 1),
            ("the ENd", 0),
        ];
        for (text, expected) in cases {
            assert_eq!(held_back(text, &stops), expected, "{text:?}");
        }
        assert_eq!(held_back("anything", &[]), 0);
    }

    #[test]
    fn text_is_shown_once_and_whole() {
        let mut pieces = Vec::new();
        let mut shown = 0;
        for sure in ["on", "once", "once", "once é"] {
            shown = advance(sure, shown, &mut |piece: &str| {
                pieces.push(piece.to_string())
            });
        }
        assert_eq!((pieces.join("|").as_str(), shown), ("on|ce| é", 7));
    }
}

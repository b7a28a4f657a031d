//! Text generation: the prompt in one pass, then one token at a time with a cache of keys and
//! values.

use candle_core::Tensor;
use rand::RngExt;

use super::decoder::Decoder;
use super::kv_cache::KvCache;
use crate::error::{Error, Kind, Result};
use crate::ops::{Context, Segments};
use crate::random::{Purpose, stream};

/// How the next token is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0: greedy.
    pub temperature: f64,
    /// Nucleus sampling: only the likeliest tokens whose probabilities reach this sum; 1: all
    /// (Holtzman et al. 2020).
    pub top_p: f64,
    /// Only this many likeliest tokens; 0: all.
    pub top_k: usize,
    /// Seed of the draw.
    pub seed: u64,
}

/// A sequence being generated, with its KV cache.
pub struct Session<'a> {
    decoder: &'a Decoder,
    context: Context<'a>,
    /// Of each block.
    cache: Vec<KvCache>,
    tokens: Vec<u32>,
}

impl<'a> Session<'a> {
    /// An empty sequence.
    pub fn new(decoder: &'a Decoder, context: Context<'a>) -> Self {
        Self {
            decoder,
            context,
            cache: Vec::with_capacity(decoder.architecture().num_hidden_layers),
            tokens: Vec::new(),
        }
    }

    /// Appends `tokens` and returns the logits (V) that follow the last of them.
    pub fn read(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let Some((last, earlier)) = tokens.split_last() else {
            return Err(Error::new(Kind::Usage, "the prompt holds no token")
                .hint("give a prompt that is not empty"));
        };
        let x = if self.tokens.is_empty() {
            self.tokens.extend(tokens);
            self.prefill()?
        } else {
            for token in earlier {
                self.decode(*token)?;
            }
            self.decode(*last)?
        };
        let logits = self.decoder.head_logits(self.context, &x)?;
        Ok(logits.squeeze(0)?.to_vec1()?)
    }

    /// Computes all tokens in one pass; returns the last one's hidden state (1, C).
    fn prefill(&mut self) -> Result<Tensor> {
        let decoder = self.decoder;
        let length = self.tokens.len();
        let segments = Segments::from_lengths([length]);
        let pass = decoder.pass(self.context, &segments, &[], None)?;
        let ids = Tensor::from_slice(&self.tokens, length, decoder.device())?;
        self.cache.clear();
        let (x, _) = decoder.embed(&pass, &ids)?;
        let x = decoder.run_blocks(&pass, x, |_, _, saved| {
            let (keys, values) = saved.keys_and_values()?;
            self.cache.push(KvCache::new(&keys, &values)?);
            Ok(())
        })?;
        Ok(x.narrow(0, length - 1, 1)?.contiguous()?)
    }

    /// Appends one token; returns its hidden state (1, C). Where the rotations of a shorter sequence
    /// end, all keys are computed again, as transformers' Phi-3 does.
    fn decode(&mut self, token: u32) -> Result<Tensor> {
        let position = self.tokens.len();
        self.tokens.push(token);
        if self.decoder.architecture().rotations_end_at(position) {
            return self.prefill();
        }
        let cache = &mut self.cache;
        self.decoder
            .decode_token(self.context, token, position, cache)
    }
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        seed: 0,
    };

    /// Samples token `index` of a sequence from its logits (V).
    pub fn choose(&self, logits: &[f32], index: u64) -> u32 {
        let by_logit = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        let ids = 0..logits.len() as u32;
        if self.temperature == 0.0 {
            return ids.min_by(by_logit).unwrap_or(0);
        }
        let mut ranked: Vec<u32> = ids.collect();
        if (1..ranked.len()).contains(&self.top_k) {
            ranked.select_nth_unstable_by(self.top_k, by_logit);
            ranked.truncate(self.top_k);
        }
        ranked.sort_unstable_by(by_logit);
        let max = ranked
            .first()
            .map_or(0.0, |id| f64::from(logits[*id as usize]));
        let weight = |id: &u32| ((f64::from(logits[*id as usize]) - max) / self.temperature).exp();
        let total: f64 = ranked.iter().map(weight).sum();
        let mut cumulative = 0.0;
        let nucleus = ranked.iter().take_while(|id| {
            let before = cumulative;
            cumulative += weight(id) / total;
            before < self.top_p
        });
        let size = nucleus.count().max(1);
        ranked.truncate(size);
        let total: f64 = ranked.iter().map(weight).sum();
        let mut rest = stream(self.seed, Purpose::Sampling, &[index], "").random::<f64>() * total;
        let chosen = ranked.iter().find(|id| {
            rest -= weight(id);
            rest <= 0.0
        });
        chosen.or(ranked.last()).copied().unwrap_or(0)
    }
}

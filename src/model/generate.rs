//! Text generation with a cache of keys and values: one token at a time after the prompt.

use candle_core::{D, DType, Tensor};
use rand::RngExt;

use super::block::Pass;
use super::decoder::Decoder;
use crate::error::{Error, Kind, Result};
use crate::ops::{Context, Linear, Segments, swiglu};
use crate::random::{Purpose, stream};

/// Rows that a cache without room gets at least.
const MORE: usize = 64;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0: the likeliest token; else logits are divided by it.
    pub temperature: f64,
    /// Only the likeliest tokens whose probabilities reach this sum; 1: all.
    pub top_p: f64,
    /// Only so many likeliest tokens; 0: all.
    pub top_k: usize,
    /// Seeds the draw.
    pub seed: u64,
}

/// A text being generated: its cached keys and values.
pub struct Session<'a> {
    decoder: &'a Decoder,
    context: Context<'a>,
    /// Keys and values (room, Hkv D) of each block: `length` rows of f32, and room for more.
    cache: Vec<[Tensor; 2]>,
    length: usize,
}

/// The first `length` of `rows` (room, C) with `x` (1, C) behind them. Where there is no room, half as much is added.
fn push(rows: &mut Tensor, length: usize, x: &Tensor) -> Result<Tensor> {
    let (room, width) = rows.dims2()?;
    if length == room {
        let larger = Tensor::zeros((room + (room / 2).max(MORE), width), x.dtype(), x.device())?;
        larger.slice_set(rows, 0, 0)?;
        *rows = larger;
    }
    rows.slice_set(&x.contiguous()?, 0, length)?;
    Ok(rows.narrow(0, 0, length + 1)?)
}

impl<'a> Session<'a> {
    /// An empty text.
    pub fn new(decoder: &'a Decoder, context: Context<'a>) -> Self {
        Self {
            decoder,
            context,
            cache: Vec::with_capacity(decoder.architecture().num_hidden_layers),
            length: 0,
        }
    }

    /// Reads `tokens` and returns the logits (V) that follow the last of them.
    pub fn read(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        if tokens.is_empty() {
            return Err(Error::new(Kind::Usage, "the prompt holds no token")
                .hint("give a prompt that is not empty"));
        }
        let mut x = None;
        if self.length == 0 {
            x = Some(self.prefill(tokens)?);
        } else {
            for token in tokens {
                x = Some(self.advance(*token)?);
            }
        }
        let x = x.ok_or_else(|| Error::new(Kind::Tensor, "nothing was read"))?;
        Ok(self
            .decoder
            .head_logits(self.context, &x)?
            .squeeze(0)?
            .to_vec1()?)
    }

    /// The whole prompt at once; returns the last token's (1, C).
    fn prefill(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let segments = Segments::from_lengths([tokens.len()]);
        let rope = self
            .decoder
            .architecture()
            .rope
            .tables(&segments, self.decoder.device())?;
        let pass = Pass {
            context: self.context,
            segments: &segments,
            rope: &rope,
            dropout: None,
        };
        let ids = Tensor::from_slice(tokens, tokens.len(), self.decoder.device())?;
        let mut x = self.decoder.embed(self.context, &ids)?;
        self.cache.clear();
        for block in &self.decoder.blocks {
            let (y, saved) = block.forward(pass, &x)?;
            let (keys, values) = saved.keys_and_values()?;
            self.cache.push([keys.contiguous()?, values.contiguous()?]);
            x = y;
        }
        self.length = tokens.len();
        Ok(x.narrow(0, tokens.len() - 1, 1)?.contiguous()?)
    }

    /// One more token; returns its (1, C).
    fn advance(&mut self, token: u32) -> Result<Tensor> {
        let context = self.context;
        let rope =
            self.decoder
                .architecture()
                .rope
                .tables_from(self.length, 1, self.decoder.device())?;
        let mut x = self.decoder.embed(
            context,
            &Tensor::from_slice(&[token], 1, self.decoder.device())?,
        )?;
        for (block, [keys, values]) in self.decoder.blocks.iter().zip(&mut self.cache) {
            let l = &block.linears;
            let apply = |linear: &Linear, x: &Tensor, base: Option<&Tensor>| {
                Ok::<_, Error>(linear.forward(context, x, None, base)?.0)
            };
            let h = block.input_layernorm.forward(context, &x)?.0;
            // The cache is f32, whatever products read.
            let rotated =
                |x: &Tensor| Ok::<_, Error>(rope.forward(context, x)?.to_dtype(DType::F32)?);
            let q = rotated(&apply(&l.q_proj, &h, None)?)?;
            let k = push(keys, self.length, &rotated(&apply(&l.k_proj, &h, None)?)?)?;
            let v = push(values, self.length, &apply(&l.v_proj, &h, None)?)?;
            let mixed = block.attention.decode(context, &q, &k, &v)?;
            let x1 = apply(&l.o_proj, &mixed, Some(&x))?;
            let h = block.post_attention_layernorm.forward(context, &x1)?.0;
            let (inner, _) = swiglu(
                context,
                &apply(&l.gate_proj, &h, None)?,
                &apply(&l.up_proj, &h, None)?,
            )?;
            x = apply(&l.down_proj, &inner, Some(&x1))?;
        }
        self.length += 1;
        debug_assert_eq!(x.dim(D::Minus1)?, self.decoder.architecture().hidden_size);
        Ok(x)
    }
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        seed: 0,
    };

    /// Chooses the token number `index` of a text from its logits (V).
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
        let mut reached = 0.0;
        let within = ranked.iter().take_while(|id| {
            let before = reached;
            reached += weight(id) / total;
            before < self.top_p
        });
        let kept = within.count().max(1);
        ranked.truncate(kept);
        let total: f64 = ranked.iter().map(weight).sum();
        let mut left = stream(self.seed, Purpose::Sampling, &[index], "").random::<f64>() * total;
        let chosen = ranked.iter().find(|id| {
            left -= weight(id);
            left <= 0.0
        });
        chosen.or(ranked.last()).copied().unwrap_or(0)
    }
}

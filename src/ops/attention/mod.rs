//! Causal or bidirectional grouped-query attention over segments, without a (T, T) score matrix.
//!
//! q is (N, Hq D), k and v (N, Hkv D), the output (N, Hq D); query head h reads key head h / (Hq /
//! Hkv). Query blocks of `QUERY_BLOCK` rows attend to the keys up to the block's end, or to all if
//! bidirectional, one key block at a time (FlashAttention tiling, Dao et al. 2022): memory is linear
//! in T, and the executed work is that of the blocks, not of the full square. The forward pass saves each row's log-sum-exp,
//! from which the backward pass recomputes probabilities.

#[cfg(target_arch = "x86_64")]
mod bf16;
mod cpu;
mod decode;
mod reference;
mod softmax;
mod tile;
mod vector;

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::softcap::{CAP_OPERATIONS, SLOPE_OPERATIONS};
use super::storage::{check_shape, load_activation, save_activation};
use super::{Context, Path, Segments};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// Query rows of one block.
const QUERY_BLOCK: usize = 64;
/// Keys of one block. Their probabilities are summed before they are added to the running sum,
/// which keeps sums of thousands accurate in f32.
const KEY_BLOCK: usize = 256;

/// The sizes of an attention layer.
///
/// With q = k = 0 every visible key has the same probability, so each output row is the mean of the
/// values so far:
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Attention, Context, Segments};
/// # use wattune::work::{Precision, WorkCounter};
/// let attention = Attention {
///     heads: 1, kv_heads: 1, head_dim: 1, causal: true, window: None, scale: None, softcap: None };
/// let zeros = Tensor::new(&[[0f32], [0.], [0.]], &Device::Cpu)?;
/// let v = Tensor::new(&[[1f32], [3.], [8.]], &Device::Cpu)?;
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// let segments = Segments::from_lengths([3]);
/// let (y, _) = attention.forward(context, zeros.clone(), zeros.clone(), v.clone(), &segments)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1.], [2.], [4.]]);
/// let attention = Attention { causal: false, ..attention };
/// let (y, _) = attention.forward(context, zeros.clone(), zeros, v, &segments)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[4.], [4.], [4.]]);
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Whether a token attends to itself and those before it only.
    pub causal: bool,
    /// Sliding window: a token attends to itself and the `window - 1` tokens before it, and after
    /// it unless causal; `None`: to all.
    pub window: Option<usize>,
    /// Factor of the scores; `None`: 1 / sqrt(head_dim).
    pub scale: Option<f64>,
    /// c of c tanh(scaled score / c), before the mask (Gemma 2).
    pub softcap: Option<f64>,
}

/// A query block of a segment and the key rows it attends to, both counted from the segment's
/// start.
#[derive(Clone)]
struct QueryBlock {
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Attention {
    /// The query blocks of a segment of `length` tokens.
    fn query_blocks(&self, length: usize) -> impl Iterator<Item = QueryBlock> + use<> {
        let attention = *self;
        (0..length).step_by(QUERY_BLOCK).map(move |start| {
            let end = (start + QUERY_BLOCK).min(length);
            QueryBlock {
                queries: start..end,
                keys: attention.visible(start, length).start
                    ..attention.visible(end - 1, length).end,
            }
        })
    }

    /// Factor of the scores.
    pub(crate) fn scale(&self) -> f64 {
        self.scale
            .unwrap_or_else(|| 1.0 / (self.head_dim as f64).sqrt())
    }

    /// Operations per score, of which a softcap adds `of_softcap`.
    fn score_operations(&self, operations: usize, of_softcap: usize) -> usize {
        operations + self.softcap.map_or(0, |_| of_softcap)
    }

    /// Query heads per key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Distance from a query to the first key behind it that it does not attend to.
    fn ahead(&self) -> usize {
        if self.causal {
            return 1;
        }
        self.window.unwrap_or(usize::MAX)
    }

    /// The keys that query `i` of a segment of `length` tokens attends to, both counted from the
    /// segment's start.
    fn visible(&self, i: usize, length: usize) -> Range<usize> {
        let start = (i + 1).saturating_sub(self.window.unwrap_or(usize::MAX));
        start..i.saturating_add(self.ahead()).min(length)
    }

    /// Work of `score_gemms` (queries, keys, D) and `value_gemms` (queries, D, keys) products per
    /// head and query block, and of one sweep with `bytes` and `operations` per score.
    fn blocks_cost(
        &self,
        segments: &[usize],
        [score_gemms, value_gemms]: [usize; 2],
        [bytes, operations]: [usize; 2],
    ) -> Work {
        let mut work = Work::default();
        let mut scores = 0;
        for block in segments.iter().flat_map(|t| self.query_blocks(*t)) {
            let (q, k, d) = (block.queries.len(), block.keys.len(), self.head_dim);
            work += &Work::products(self.heads * score_gemms, q, k, d, Precision::F32);
            work += &Work::products(self.heads * value_gemms, q, d, k, Precision::F32);
            scores += self.heads * q * k;
        }
        work + Work::sweep(bytes * scores, operations * scores)
    }
}

/// Work of a forward pass over segments of these lengths: S = Q K^T and O = P V.
pub fn attention_forward_cost(attention: &Attention, segments: &[usize]) -> Work {
    attention.blocks_cost(
        segments,
        [1, 1],
        [4, attention.score_operations(4, CAP_OPERATIONS)],
    )
}

/// Work of a backward pass: S again and dP = dO V^T; dQ = dS K, dK = dS^T Q and dV = P^T dO.
pub fn attention_backward_cost(attention: &Attention, segments: &[usize]) -> Work {
    attention.blocks_cost(
        segments,
        [2, 3],
        [
            8,
            attention.score_operations(6, CAP_OPERATIONS + SLOPE_OPERATIONS),
        ],
    )
}

/// Work of one new token against `keys` cached ones (itself included).
pub fn attention_decode_cost(attention: &Attention, keys: usize) -> Work {
    let seen = keys.min(attention.window.unwrap_or(usize::MAX));
    let (heads, d) = (attention.heads, attention.head_dim);
    Work::products(heads, 1, seen, d, Precision::F32)
        + Work::products(heads, 1, d, seen, Precision::F32)
        + Work::sweep(
            0,
            attention.score_operations(0, CAP_OPERATIONS) * heads * seen,
        )
}

/// Input of `backward`: q, k, v and the output in the compute type, and the log-sum-exp of each row
/// and head (N, Hq).
#[derive(Debug, Clone)]
pub struct AttentionSaved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
}

impl AttentionSaved {
    /// Keys and values (N, Hkv D) in f32, for a KV cache.
    pub fn keys_and_values(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.to_dtype(DType::F32)?, self.v.to_dtype(DType::F32)?))
    }

    /// The output (N, Hq D) in the compute type, the input of the output projection.
    pub fn output(&self) -> &Tensor {
        &self.out
    }
}

impl Attention {
    /// q (N, Hq D), k, v (N, Hkv D) -> (N, Hq D); on the CPU in the compute type, because the next
    /// op is a GEMM.
    pub fn forward(
        &self,
        context: Context<'_>,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: &Segments,
    ) -> Result<(Tensor, AttentionSaved)> {
        let (hq, hkv) = (self.heads, self.kv_heads);
        self.check(
            segments.tokens(),
            &[("q", &q, hq), ("k", &k, hkv), ("v", &v, hkv)],
        )?;
        let cost = attention_forward_cost(self, &lengths(segments));
        context.counter.add(cost);
        let q = save_activation(context, &q)?;
        let k = save_activation(context, &k)?;
        let v = save_activation(context, &v)?;
        let (out, lse) = match context.path(&q) {
            Path::Cpu => self.forward_cpu(context, [&q, &k, &v], segments)?,
            Path::Cuda if self.has_kernel(context) => self.forward_cuda([&q, &k, &v], segments)?,
            path => {
                let wide = |x: &Tensor| load_activation(context, x);
                self.forward_reference(path, [&wide(&q)?, &wide(&k)?, &wide(&v)?], segments)?
            }
        };
        let saved = AttentionSaved {
            q,
            k,
            v,
            out: save_activation(context, &out)?,
            lse,
        };
        Ok((out, saved))
    }

    /// dout (N, Hq D) -> (dq, dk, dv).
    pub fn backward(
        &self,
        context: Context<'_>,
        dout: &Tensor,
        saved: &AttentionSaved,
        segments: &Segments,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (hq, hkv) = (self.heads, self.kv_heads);
        let all = [
            ("q", &saved.q, hq),
            ("k", &saved.k, hkv),
            ("v", &saved.v, hkv),
            ("out", &saved.out, hq),
            ("dout", dout, hq),
        ];
        self.check(segments.tokens(), &all)?;
        check_shape("lse", &saved.lse, &[segments.tokens(), hq])?;
        let cost = attention_backward_cost(self, &lengths(segments));
        context.counter.add(cost);
        if context.path(dout) == Path::Cpu {
            return self.backward_cpu(context, dout, saved, segments);
        }
        if context.path(dout) == Path::Cuda && self.has_kernel(context) {
            let AttentionSaved { q, k, v, out, lse } = saved;
            return self.backward_cuda(dout, [q, k, v], out, lse, segments);
        }
        let wide = |x: &Tensor| load_activation(context, x);
        let saved = AttentionSaved {
            q: wide(&saved.q)?,
            k: wide(&saved.k)?,
            v: wide(&saved.v)?,
            out: wide(&saved.out)?,
            lse: saved.lse.clone(),
        };
        self.backward_reference(dout, &saved, segments)
    }

    /// One new token: q (1, Hq D) against the cached k, v (T, Hkv D), of which a window hides the
    /// oldest -> (1, Hq D). Causal attention only.
    pub fn decode(
        &self,
        context: Context<'_>,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let keys = k.dims2()?.0.max(1);
        let hkv = self.kv_heads;
        self.check(1, &[("q", q, self.heads)])?;
        self.check(keys, &[("k", k, hkv), ("v", v, hkv)])?;
        context.counter.add(attention_decode_cost(self, keys));
        let seen = self.visible(keys - 1, keys);
        match context.path(q) {
            Path::Cpu => self.decode_cpu([q, k, v], seen),
            path => self.decode_reference(path, [q, k, v], seen),
        }
    }

    /// Refuses impossible sizes and tensors, each with its number of heads, of other shapes: the
    /// CPU pass computes addresses from both.
    fn check(&self, tokens: usize, tensors: &[(&str, &Tensor, usize)]) -> Result<()> {
        let divides =
            self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        if !divides || self.head_dim == 0 || self.window == Some(0) {
            return Err(
                Error::new(Kind::Tensor, "attention cannot have these sizes")
                    .value(format!("{self:?}"))
                    .rule("all are at least 1, and kv_heads divides heads"),
            );
        }
        tensors.iter().try_for_each(|(name, tensor, heads)| {
            let width = heads.checked_mul(self.head_dim).unwrap_or(usize::MAX);
            check_shape(name, tensor, &[tokens, width])
        })
    }
}

fn lengths(segments: &Segments) -> Vec<usize> {
    segments.ranges().iter().map(Range::len).collect()
}

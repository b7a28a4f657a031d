//! Elementwise passes over a tile of scores (keys, queries): the mask, the online softmax and its
//! backward pass.
//!
//! Vector lanes are queries: softmax reduces over the rows of a tile, and no tile is transposed.

#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::{Attention, KEY_BLOCK};
use crate::ops::gemm::Element;
use crate::ops::simd::simd;
use crate::ops::softcap::{capped, slope};

/// Some query columns of a tile and the keys of their scores, both counted from the segment's
/// start.
pub(super) struct Panel {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    /// The first key that is padding.
    pub(super) padding: usize,
    /// Row stride: elements from the scores of one key to those of the next.
    pub(super) stride: usize,
}

impl Panel {
    /// Sets the scores of keys that the query does not attend to, and of padding, to minus
    /// infinity.
    pub(super) fn mask(&self, attention: &Attention, scores: &mut [f32]) {
        let first = self.keys.start;
        let count = self.queries.len();
        let ahead = attention.ahead();
        for key in first.max(self.queries.start.saturating_add(ahead))..self.keys.end {
            let hidden = (key - self.queries.start - ahead + 1).min(count);
            scores[(key - first) * self.stride..][..hidden].fill(f32::NEG_INFINITY);
        }
        for key in self.padding.max(first)..self.keys.end {
            scores[(key - first) * self.stride..][..count].fill(f32::NEG_INFINITY);
        }
        let Some(window) = attention.window else {
            return;
        };
        let end = self.queries.end.saturating_sub(window);
        for key in first..self.keys.end.min(end) {
            let visible = (key + window).saturating_sub(self.queries.start);
            scores[(key - first) * self.stride..][visible..count].fill(f32::NEG_INFINITY);
        }
    }
}

/// How a score becomes the logit of the softmax: scale score, or c tanh(scale score / c).
#[derive(Clone, Copy)]
pub(super) struct ScoreScaling {
    scale: f32,
    softcap: Option<f32>,
}

impl ScoreScaling {
    pub(super) fn new(attention: &Attention) -> Self {
        Self {
            scale: attention.scale() as f32,
            softcap: attention.softcap.map(|c| c as f32),
        }
    }

    /// Factor of what `cap_scores` leaves.
    pub(super) fn after_cap(self) -> f32 {
        self.softcap.map_or(self.scale, |_| 1.0)
    }
}

/// scores -> c tanh(scale score / c) of `L` queries, keys `stride` apart; unchanged without a
/// softcap.
pub(super) fn cap_scores<const L: usize>(scores: &mut [f32], stride: usize, scaling: ScoreScaling) {
    let Some(c) = scaling.softcap else { return };
    simd!(|simd| {
        for scores in scores.chunks_mut(stride) {
            let scores = &mut scores[..L];
            for lane in 0..L {
                scores[lane] = capped(simd, scaling.scale * scores[lane], c);
            }
        }
    });
}

/// Calls `$name::<LANES>` with the number of lanes as a constant.
macro_rules! by_lanes {
    ($lanes:expr, $name:ident($($argument:expr),*)) => {
        match $lanes {
            8 => $name::<8>($($argument),*),
            16 => $name::<16>($($argument),*),
            _ => $name::<32>($($argument),*),
        }
    };
}
pub(super) use by_lanes;

/// One online-softmax update (Milakov and Gimelshein 2018) of `L` queries by the scores of one key
/// block, keys `stride` apart.
///
/// scores -> exp(scale (score - max)), not yet divided by the sum. `max` and `sum` (L) are running
/// values that start at `f32::MIN` and zero. The caller multiplies its accumulated P V by `rescale`
/// (L), which is exp(scale (previous max - max)).
pub(super) fn online_softmax<const L: usize>(
    scores: &mut [f32],
    stride: usize,
    scale: f32,
    max: &mut [f32],
    sum: &mut [f32],
    rescale: &mut [f32],
) {
    simd!(|simd| {
        let (mut largest, mut total) = ([0.0f32; L], [0.0f32; L]);
        largest.copy_from_slice(&max[..L]);
        total.copy_from_slice(&sum[..L]);
        for scores in scores.chunks(stride) {
            let scores = &scores[..L];
            for lane in 0..L {
                largest[lane] = if scores[lane] > largest[lane] {
                    scores[lane]
                } else {
                    largest[lane]
                };
            }
        }
        for lane in 0..L {
            rescale[lane] = simd.exp(scale * (max[lane] - largest[lane]));
            total[lane] *= rescale[lane];
        }
        for scores in scores.chunks_mut(KEY_BLOCK * stride) {
            let mut partial = [0.0f32; L];
            for scores in scores.chunks_mut(stride) {
                let scores = &mut scores[..L];
                for lane in 0..L {
                    scores[lane] = simd.exp(scale * (scores[lane] - largest[lane]));
                    partial[lane] += scores[lane];
                }
            }
            for lane in 0..L {
                total[lane] += partial[lane];
            }
        }
        max[..L].copy_from_slice(&largest);
        sum[..L].copy_from_slice(&total);
    });
}

/// Scores, after `cap_scores`, and dP -> P = exp(logit - lse) and dS = scale slope P (dP - delta),
/// in place, of `L` queries, keys `stride` apart; slope: that of the softcap.
pub(super) fn softmax_backward<const L: usize>(
    scores: &mut [f32],
    dp: &mut [f32],
    stride: usize,
    scaling: ScoreScaling,
    lse: &[f32],
    delta: &[f32],
) {
    let (mut lses, mut deltas) = ([0.0; L], [0.0; L]);
    lses[..lse.len()].copy_from_slice(lse);
    deltas[..delta.len()].copy_from_slice(delta);
    let scale = scaling.scale;
    simd!(|simd| {
        for (p, ds) in scores.chunks_mut(stride).zip(dp.chunks_mut(stride)) {
            let (p, ds) = (&mut p[..L], &mut ds[..L]);
            if let Some(c) = scaling.softcap {
                for lane in 0..L {
                    let scale = scale * slope(p[lane], c);
                    p[lane] = simd.exp(p[lane] - lses[lane]);
                    ds[lane] = p[lane] * (ds[lane] - deltas[lane]) * scale;
                }
                continue;
            }
            for lane in 0..L {
                p[lane] = simd.exp(scale * p[lane] - lses[lane]);
                ds[lane] = p[lane] * (ds[lane] - deltas[lane]) * scale;
            }
        }
    });
}

/// out = factor x.
pub(super) fn scale_into<O: Element>(out: &mut [O], x: &[f32], factor: f32) {
    let n = out.len();
    simd!(|_| {
        let (out, x) = (&mut out[..n], &x[..n]);
        for i in 0..n {
            out[i] = O::cast(x[i] * factor);
        }
    });
}

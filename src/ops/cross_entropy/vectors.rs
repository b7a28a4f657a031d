//! The head by vectors, where its table is frozen: a block of rows meets some words at a time, forward and back, so that logits never leave
//! the caches and W is packed once for all rows.
//!
//! Each row's largest logit so far is what its exponentials are held against; where a larger one comes, what was summed is scaled down. With
//! s the sum of exponentials e, dh = scale (e W / s - W[target]).

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;

use super::{Head, Losses};
use crate::error::Result;
use crate::ops::host::{Host, tensor, uninitialized};
use crate::ops::product::{Isa, Matrix, Number, TileArgs, Values, best, even_parts, pack};
use crate::ops::simd::{self, vectorized};
use crate::ops::team::each;
use crate::ops::{Context, issue};

/// Most rows of a block: their logits and their dh stay in a second-level cache.
const ROWS: usize = 64;
/// Words that are packed at a time, for every block.
const WORDS: usize = 512;

impl Head {
    /// Whether rows of h go by vectors.
    pub(super) fn goes_by_vectors(&self, context: Context<'_>, h: &Tensor) -> bool {
        context.fused(h) && best().unit(context.precision).is_none() && !self.weight.is_trained()
    }

    /// h (L, C), targets (L), L > 0 -> the losses, and dh of `scale * sum of losses` where there is a scale.
    pub(super) fn losses_by_vectors(&self, h: &Tensor, targets: &[u32], scale: Option<f64>) -> Result<Losses> {
        let (isa, threads) = (best(), rayon::current_num_threads());
        let (h, (l, c), v) = (h.contiguous()?, h.dims2()?, self.weight.tensor.dims2()?.0);
        let (h, w) = (Host::open_any(&h)?, Host::open_any(&self.weight.tensor)?);
        let h = match h.values() {
            Values::F32(values) => Cow::Borrowed(values),
            narrow => Cow::Owned(narrow.widened().unwrap_or_default()),
        };
        let (table, width) = (w.matrix(v, c), c.next_multiple_of(isa.lanes));
        issue(1 + usize::from(scale.is_some()), l, v, c);
        // As many blocks for each thread; a row's sums do not depend on its block.
        let size = l.div_ceil(l.div_ceil(ROWS).next_multiple_of(threads));
        let mut dh = vec![0.0; if scale.is_some() { l * width } else { 0 }];
        let mut outs = dh.chunks_mut(size * width);
        let rows = h.chunks(size * c).zip(targets.chunks(size));
        let mut blocks: Vec<Block> = rows.map(|(h, targets)| Block::new(h, targets, outs.next())).collect();
        let (mut columns, mut rows) = (Packed::default(), Packed::default());
        for start in (0..v).step_by(WORDS) {
            let words = start..(start + WORDS).min(v);
            columns.fill(isa, &table.t(), 0..c, words.clone());
            if scale.is_some() {
                rows.fill(isa, &table, words.clone(), 0..c);
            }
            each(blocks.iter_mut(), |block| block.meet(isa, &words, &columns, &rows));
        }
        let losses = blocks.iter().flat_map(Block::losses).collect();
        let Some(scale) = scale else { return Ok((losses, None)) };
        each(blocks.iter_mut(), |block| match w.values() {
            Values::F32(w) => block.finish(w, c, scale),
            Values::Bf16(w) => block.finish(w, c, scale),
        });
        drop(blocks);
        if width != c {
            dh = dh.chunks(width).flat_map(|row| &row[..c]).copied().collect();
        }
        Ok((losses, Some(tensor(dh, (l, c))?)))
    }
}

/// Some rows, and what is summed for them over the words so far.
struct Block<'a> {
    h: &'a [f32],
    targets: &'a [u32],
    max: Vec<f32>,
    sums: Vec<f64>,
    at_targets: Vec<f32>,
    /// e W, in rows as wide as whole vectors.
    dh: Option<&'a mut [f32]>,
}

impl<'a> Block<'a> {
    fn new(h: &'a [f32], targets: &'a [u32], dh: Option<&'a mut [f32]>) -> Self {
        let n = targets.len();
        Self { h, targets, max: vec![f32::MIN; n], sums: vec![0.0; n], at_targets: vec![0.0; n], dh }
    }

    /// Goes on with `words`: `columns` is (C, words), `rows` (words, C).
    fn meet(&mut self, isa: &Isa, words: &Range<usize>, columns: &Packed, rows: &Packed) {
        let n = self.targets.len();
        // SAFETY: the product writes every row's first numbers, and only these are read.
        let mut z = unsafe { uninitialized(n * WORDS) };
        columns.product(isa, n, (self.h, self.h.len() / n), false, (&mut z, WORDS));
        for (row, z) in z.chunks_exact_mut(WORDS).enumerate() {
            let (z, target) = (&mut z[..words.len()], self.targets[row] as usize);
            if words.contains(&target) {
                self.at_targets[row] = z[target - words.start];
            }
            let before = self.max[row];
            let (max, sum) = vectorized(
                #[inline(always)]
                || {
                    let max = before.max(simd::max(z));
                    z.iter_mut().for_each(|z| *z = simd::exp(*z - max));
                    (max, simd::sum_of(z, |e| e))
                },
            );
            if max > before {
                let share = simd::exp(before - max);
                self.max[row] = max;
                self.sums[row] *= f64::from(share);
                if let Some(dh) = &mut self.dh {
                    let width = dh.len() / n;
                    dh[row * width..][..width].iter_mut().for_each(|dh| *dh *= share);
                }
            }
            self.sums[row] += sum;
        }
        if let Some(dh) = &mut self.dh {
            let width = dh.len() / n;
            rows.product(isa, n, (&z, WORDS), true, (dh, width));
        }
    }

    fn losses(&self) -> impl Iterator<Item = f32> + use<'_> {
        (0..self.targets.len()).map(|row| self.max[row] + self.sums[row].ln() as f32 - self.at_targets[row])
    }

    /// e W -> dh, with W (V, `c`).
    fn finish<T: Number>(&mut self, w: &[T], c: usize, scale: f64) {
        let Some(dh) = &mut self.dh else { return };
        let width = dh.len() / self.targets.len();
        for (row, dh) in dh.chunks_exact_mut(width).enumerate() {
            let (w, share, scale) = (&w[self.targets[row] as usize * c..][..c], (scale / self.sums[row]) as f32, scale as f32);
            vectorized(
                #[inline(always)]
                || dh.iter_mut().zip(w).for_each(|(dh, w)| *dh = share * *dh - scale * w.widen()),
            );
        }
    }
}

/// A matrix (k, columns) in panels as wide as a tile.
#[derive(Default)]
struct Packed {
    values: Vec<f32>,
    k: usize,
    columns: usize,
}

impl Packed {
    /// Takes these rows and columns of `matrix`.
    fn fill(&mut self, isa: &Isa, matrix: &Matrix<'_>, k: Range<usize>, columns: Range<usize>) {
        (self.k, self.columns) = (k.len(), columns.len());
        let (size, width) = (self.k * isa.columns(), isa.columns());
        self.values.resize(self.columns.div_ceil(width) * size, 0.0);
        each(self.values.chunks_mut(size).zip(columns.clone().step_by(width)), |(panel, first)| {
            pack(isa, matrix, k.clone(), first..(first + width).min(columns.end), panel);
        });
    }

    /// out (m, columns) = a (m, k) times these, or += where it is to `add`; rows of `out` are written up to a whole number of vectors.
    fn product(&self, isa: &Isa, m: usize, (a, a_row): (&[f32], usize), add: bool, (out, out_row): (&mut [f32], usize)) {
        let width = isa.columns();
        assert!(m > 0 && a.len() >= (m - 1) * a_row + self.k, "every row of a has k numbers");
        assert!(out.len() >= (m - 1) * out_row + self.columns.next_multiple_of(isa.lanes), "every row of out has whole vectors");
        let piece = if self.k > isa.deepest { isa.piece } else { self.k };
        for start in (0..self.k).step_by(piece) {
            let k = piece.min(self.k - start);
            // Half of a second-level cache: the other half holds a block's rows.
            let group = (isa.packed / 2 / (k * width)).max(1);
            for first in (0..self.columns).step_by(group * width) {
                for rows in even_parts(0..m, isa.rows) {
                    for column in (first..(first + group * width).min(self.columns)).step_by(width) {
                        let vectors = (self.columns - column).min(width).div_ceil(isa.lanes);
                        let panel = &self.values[column * self.k + start * vectors * isa.lanes..];
                        // SAFETY: these rows and columns lie inside `a` and `out` (checked), and the panel has k rows of whole vectors.
                        unsafe {
                            let out = out.as_mut_ptr().add(rows.start * out_row + column);
                            isa.tile(rows.len(), vectors)(TileArgs {
                                k,
                                a: a.as_ptr().add(rows.start * a_row + start),
                                a_row,
                                a_column: 1,
                                b: panel.as_ptr(),
                                b_row: vectors * isa.lanes,
                                start: if add || start > 0 { out.cast_const() } else { std::ptr::null() },
                                start_row: out_row,
                                out,
                                out_row,
                            });
                        }
                    }
                }
            }
        }
    }
}

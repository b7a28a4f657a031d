//! The head in bf16 blocks: 32 x 32 logits become e^(z - z[target]) while they are in the cache, which is all that is kept of them.
//!
//! With s the sum of these over the vocabulary, a row's loss is ln s, and dh = scale (e W / s - W[target]). bf16 has f32's range, so that e
//! needs no maximum to be held against: a row whose s is beyond `MOST` is left to who keeps logits.

use candle_core::Tensor;

use super::{Head, Losses};
use crate::error::Result;
use crate::ops::Context;
use crate::ops::host::{Host, Shared, Stored, tensor, uninitialized};
use crate::ops::product::blocks::{Operand, Packed, Right, SIDE, Tile, tiles_of};
use crate::ops::product::{Left, Prepared, Start, Term, Values, best, products};
use crate::ops::simd::{self, vectorized};
use crate::ops::team::each;

/// e^60: a loss of 60 nats. The sums of e times W stay far below f32's largest number.
const MOST: f64 = 1e26;

impl Head {
    /// Whether rows of h go through blocks.
    pub(super) fn takes_tiles(&self, context: Context<'_>, h: &Tensor) -> bool {
        context.fused(h) && best().narrow_unit(context.precision).is_some() && !self.weight.is_trained()
    }

    /// h (L, C), targets (L) -> the losses, and dh of `scale * sum of losses` where there is a scale. None where that takes logits: of one row
    /// alone, and where a target is less likely than `MOST` allows.
    pub(super) fn losses_in_tiles(
        &self,
        context: Context<'_>,
        h: &Tensor,
        targets: &[u32],
        scale: Option<f64>,
    ) -> Result<Option<Losses>> {
        if !self.takes_tiles(context, h) {
            return Ok(None);
        }
        let (h, (l, c), v) = (h.contiguous()?, h.dims2()?, self.weight.tensor.dims2()?.0);
        let (h, w) = (Host::open_any(&h)?, Host::open_any(&self.weight.tensor)?);
        let packed = Prepared::new(context.precision, &h.matrix(l, c));
        let Some(packed) = packed.packed() else { return Ok(None) };
        let Some(rows) = packed.operand::<1>() else { return Ok(None) };
        let (panels, strips) = (v.div_ceil(SIDE), l.div_ceil(SIDE));
        // Beyond the last row every e is zero.
        let mut at_targets = vec![f32::INFINITY; strips * SIDE];
        for (row, (at_target, target)) in at_targets.iter_mut().zip(targets).enumerate() {
            let (h, w) = (rounded(h.values(), row, c), rounded(w.values(), *target as usize, c));
            *at_target = simd::dot(&h, &w) as f32;
        }
        // SAFETY: `tiles_of` gives every strip and panel, and each writes its sums and its block.
        let (mut sums, mut e) = unsafe {
            let e = scale.map(|_| Operand::<1>::uninitialized(l, v));
            (uninitialized::<[f32; SIDE]>(strips * panels), e)
        };
        let (write_sums, write_e) = (Shared(sums.as_mut_ptr()), e.as_mut().map(Operand::blocks));
        let terms = [(rows, Right::of(&w.matrix(v, c).t()))];
        tiles_of::<1, 1>(packed.unit(), [&terms], |strip, panel, [tile]| {
            let sums = exponentials(tile, &at_targets[strip * SIDE..], v - panel * SIDE);
            // SAFETY: each strip and panel comes once, and what is written outlives the loop.
            unsafe {
                *write_sums.at(strip * panels + panel) = sums;
                if let Some(write_e) = write_e {
                    write_e.write(strip, panel, tile);
                }
            }
        });
        let mut totals = vec![[0.0f64; SIDE]; strips];
        each(totals.iter_mut().zip(sums.chunks(panels.max(1))), |(total, sums)| {
            sums.iter().for_each(|sums| (0..SIDE).for_each(|row| total[row] += f64::from(sums[row])));
        });
        let totals = &totals.as_flattened()[..l];
        if totals.iter().any(|total| *total > MOST) {
            return Ok(None);
        }
        let losses = totals.iter().map(|total| total.ln() as f32).collect();
        let Some((scale, e)) = scale.zip(e) else { return Ok(Some((losses, None))) };
        let e = Prepared::of(Packed::from_blocks(packed.unit(), e));
        let Some(left) = Left::prepared(l, v, &e) else { return Ok(None) };
        let mut dh = products(&[Term { a: &left, b: w.matrix(v, c) }], Start::Zero);
        each(dh.chunks_mut(c).zip(targets).zip(totals), |((dh, target), total)| {
            let (share, scale) = ((scale / total) as f32, scale as f32);
            let target = rounded(w.values(), *target as usize, c);
            dh.iter_mut().zip(&target).for_each(|(dh, w)| *dh = share * *dh - scale * w);
        });
        Ok(Some((losses, Some(tensor(dh, (l, c))?))))
    }
}

/// A row of (.., `columns`) as blocks hold it.
fn rounded(values: Values<'_>, row: usize, columns: usize) -> Vec<f32> {
    use half::bf16;
    let row = row * columns..(row + 1) * columns;
    match values {
        Values::F32(values) => values[row].iter().map(|x| bf16::of(*x).to_f32()).collect(),
        Values::Bf16(values) => values[row].iter().map(|x| x.to_f32()).collect(),
    }
}

/// The first `words` logits of each row become e^(z - z[target]), the others zero; returns each row's sum.
fn exponentials(tile: &mut Tile, at_targets: &[f32], words: usize) -> [f32; SIDE] {
    const LANES: usize = SIDE / 2;
    let mut sums = [0.0; SIDE];
    if words < SIDE {
        tile.0.chunks_exact_mut(SIDE).for_each(|row| row[words..].fill(f32::NEG_INFINITY));
    }
    let (rows, at_targets) = (tile.0.as_chunks_mut::<SIDE>().0, &at_targets[..SIDE]);
    vectorized(
        #[inline(always)]
        || {
            for row in 0..SIDE {
                let (z, mut lanes) = (&mut rows[row], [0.0f32; LANES]);
                for half in 0..2 {
                    for lane in 0..LANES {
                        let e = simd::exp(z[half * LANES + lane] - at_targets[row]);
                        z[half * LANES + lane] = e;
                        lanes[lane] += e;
                    }
                }
                for width in [8, 4, 2, 1] {
                    for lane in 0..width {
                        lanes[lane] += lanes[lane + width];
                    }
                }
                sums[row] = lanes[0];
            }
        },
    );
    sums
}

//! The layers fused in 32 x 32 tiles: the activation runs on tiles of gate and up while they are in
//! cache, and writes them as packed input of `down`; backward likewise. Intermediate activations are never
//! written as f32 rows.

use candle_core::Tensor;

use super::{FeedForward, FeedForwardSaved, Intermediate};
use crate::error::{Error, Kind, Result};
use crate::ops::activation::{Function, with_function};
use crate::ops::gemm::bf16::{
    BF16_PLANES, Bf16Lhs, BlockWriter, PackedOperand, TILE, Tile, gemm_tiles,
};
use crate::ops::gemm::{MatRef, PackedLhs};
use crate::ops::simd::simd;
use crate::ops::storage::{CpuTensor, SendPtr, check_dims, check_shape, uninit_vec};
use crate::ops::{Branch, Context, Gradients, Linear, LinearInput, LinearSaved, Lora, Weight};
use crate::work::Precision;

/// The outputs of gate and up (N, F), in tiles.
pub(super) struct GateUpTiles {
    shape: (usize, usize),
    gate: SavedTiles,
    up: SavedTiles,
}

/// A matrix in tiles of 32 x 32 in bf16 (`Narrow`) or f32 (`Wide`), zero beyond its last row and
/// column. A tile is addressed by strip (of rows) and panel (of columns).
enum SavedTiles {
    Narrow(PackedOperand),
    Wide { tiles: Vec<Tile>, panels: usize },
}

impl SavedTiles {
    /// A matrix (rows, columns) to be written by `writer`.
    ///
    /// # Safety
    /// Every tile must be written before it is read.
    unsafe fn uninit(precision: Precision, rows: usize, columns: usize) -> Self {
        let panels = columns.div_ceil(TILE);
        // SAFETY: the caller's promise.
        unsafe {
            match precision {
                Precision::F32 => Self::Wide {
                    tiles: uninit_vec(rows.div_ceil(TILE) * panels),
                    panels,
                },
                Precision::Bf16 | Precision::F16 => {
                    Self::Narrow(PackedOperand::uninit(BF16_PLANES, rows, columns))
                }
            }
        }
    }

    fn writer(&mut self) -> TileWriter {
        match self {
            Self::Narrow(operand) => TileWriter::Narrow(operand.block_writer()),
            Self::Wide { tiles, panels } => TileWriter::Wide(SendPtr(tiles.as_mut_ptr()), *panels),
        }
    }

    fn read(&self, strip: usize, panel: usize) -> Tile {
        match self {
            Self::Narrow(operand) => operand.read(strip, panel),
            Self::Wide { tiles, panels } => tiles[strip * panels + panel],
        }
    }
}

/// Writes tiles of a `SavedTiles` from several threads.
#[derive(Clone, Copy)]
enum TileWriter {
    Narrow(BlockWriter),
    Wide(SendPtr<Tile>, usize),
}

impl TileWriter {
    /// # Safety
    /// As `BlockWriter::write`'s.
    unsafe fn write(self, strip: usize, panel: usize, tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Narrow(blocks) => blocks.write(strip, panel, tile),
                Self::Wide(tiles, panels) => *tiles.add(strip * panels + panel) = *tile,
            }
        }
    }
}

/// The right-hand sides of a layer: W, and the term of its adapter.
struct LayerRhs<'a> {
    w: WeightRhs<'a>,
    /// Forward: `scaling * x A^T` (N, r) and B^T. Backward: `scaling * dy B` (N, r) and A.
    lora: Option<(PackedLhs, WeightRhs<'a>)>,
}

/// A weight as the right-hand side of a GEMM.
struct WeightRhs<'a> {
    weight: &'a Weight,
    storage: CpuTensor<'a>,
    transposed: bool,
}

impl<'a> WeightRhs<'a> {
    fn new(weight: &'a Weight, transposed: bool) -> Result<Self> {
        Ok(Self {
            weight,
            storage: weight.storage()?,
            transposed,
        })
    }

    fn matrix(&self) -> Result<MatRef<'_>> {
        let matrix = self.weight.matrix(&self.storage)?;
        Ok(if self.transposed { matrix.t() } else { matrix })
    }
}

impl<'a> LayerRhs<'a> {
    /// `lora`: row-major (N, r) and the factor that it is multiplied by. `transposed`: whether the
    /// weights are multiplied as their transposes (forward).
    fn new(
        context: Context<'_>,
        w: &'a Weight,
        lora: Option<(&[f32], &'a Weight)>,
        transposed: bool,
    ) -> Result<Self> {
        let lora = lora.map(|(scaled, weight)| -> Result<_> {
            let (rows, columns) = weight.dims2()?;
            let r = if transposed { columns } else { rows };
            let scaled = MatRef::from_f32(scaled, scaled.len() / r.max(1), r);
            let packed = PackedLhs::new(context.precision, &scaled);
            Ok((packed, WeightRhs::new(weight, transposed)?))
        });
        Ok(Self {
            w: WeightRhs::new(w, transposed)?,
            lora: lora.transpose()?,
        })
    }

    /// The (lhs, rhs) terms whose sum is the layer's product with `x`.
    fn terms<'b>(&'b self, x: &'b LinearInput) -> Result<Vec<(&'b Bf16Lhs, MatRef<'b>)>> {
        let mut terms = vec![(packed(x.packed())?, self.w.matrix()?)];
        if let Some((rows, weight)) = &self.lora {
            terms.push((packed(rows)?, weight.matrix()?));
        }
        Ok(terms)
    }
}

/// The packed form of a left-hand side; an error if there is none.
fn packed(lhs: &PackedLhs) -> Result<&Bf16Lhs> {
    lhs.packed()
        .ok_or_else(|| Error::new(Kind::Tensor, "the tiled pass needs a packed input"))
}

impl FeedForward<'_> {
    /// gate and up if the tiled pass runs: they are two layers, x is packed, and no layer has a bias,
    /// a trained W or more than A and B of an adapter.
    pub(super) fn tiled_layers(&self, x: &LinearInput) -> Option<&[Linear; 2]> {
        let plain = |linear: &Linear| {
            let lora = linear.lora.as_ref().is_none_or(Lora::is_plain);
            lora && linear.bias.is_none() && !linear.weight.is_trained()
        };
        x.packed().packed()?;
        let layers = self.gate_up.as_array()?;
        (layers.iter().all(plain) && plain(self.down)).then_some(layers)
    }

    /// `forward` without dropout, in tiles.
    pub(super) fn forward_tiles(
        &self,
        context: Context<'_>,
        [gate, up]: &[Linear; 2],
        x: LinearInput,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        let (n, f) = (x.shape().0, gate.weight.dims2()?.0);
        let [of_gate, of_up] = [gate, up].map(|linear| linear.weight.dims2());
        check_dims(
            "up",
            &<[usize; 2]>::from(of_up?),
            &<[usize; 2]>::from(of_gate?),
        )?;
        let (gate_rhs, gate_saved) = layer_rhs(context, gate, &x)?;
        let (up_rhs, up_saved) = layer_rhs(context, up, &x)?;
        context.counter.add(self.activation.cost(n * f, true));
        // SAFETY: `gemm_tiles` visits every tile, and each is written.
        let (mut gate, mut up, mut inner) = unsafe {
            let saved = || SavedTiles::uninit(context.precision, n, f);
            (saved(), saved(), packed(x.packed())?.uninit_like(n, f))
        };
        let (write_gate, write_up) = (gate.writer(), up.writer());
        let write_inner = inner.block_writer();
        let terms = [&*gate_rhs.terms(&x)?, &up_rhs.terms(&x)?];
        gemm_tiles(terms, |strip, panel, [gate, up]| {
            // SAFETY: `gemm_tiles` visits each strip and panel of this shape once, and the buffers
            // outlive it.
            unsafe {
                write_gate.write(strip, panel, gate);
                write_up.write(strip, panel, up);
                with_function!(self.activation, F => gated_tile::<F>(gate, up));
                write_inner.write(strip, panel, gate);
            }
        });
        drop(x);
        let inner = LinearInput::from_packed((n, f), PackedLhs::from_bf16(inner));
        let (y, down_saved) = self.down.forward_input(context, &inner, None, base)?;
        let shape = (n, f);
        let saved = FeedForwardSaved {
            intermediate: Intermediate::Tiles(GateUpTiles { shape, gate, up }),
            gate_up: vec![gate_saved, up_saved],
            down: down_saved,
        };
        Ok((y, saved))
    }

    /// Backward through `down` and the activation: dy (N, C) -> the gradients (N, F) of the outputs of gate
    /// and up, packed.
    pub(super) fn backward_tiles(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        tiles: &GateUpTiles,
        saved: &LinearSaved,
        gradients: &mut Gradients,
    ) -> Result<[LinearInput; 2]> {
        let (n, f) = tiles.shape;
        let (c, down_f) = self.down.weight.dims2()?;
        check_shape("dy", dy, &[n, c])?;
        check_dims("down", &[c, down_f], &[c, f])?;
        let dy = LinearInput::new(context, dy.clone())?;
        let shape = self.down.shape(n, false)?;
        context
            .counter
            .add(shape.backward_cost(context.precision, true));
        let cost = self.activation.backward_cost(n * f, true);
        context.counter.add(cost);
        let down = Branch {
            linear: self.down,
            dy: &dy,
            saved,
        };
        let dxa = down.lora_b_gradient(context, gradients)?;
        let a = self.down.lora.as_ref().map(|lora| &lora.a);
        let rhs = LayerRhs::new(context, &self.down.weight, dxa.as_deref().zip(a), false)?;
        // SAFETY: `gemm_tiles` visits every tile, and each is written.
        let buffer = || packed(dy.packed()).map(|dy| unsafe { dy.uninit_like(n, f) });
        let (mut d_gate, mut d_up) = (buffer()?, buffer()?);
        let mut inner = dxa.is_some().then(buffer).transpose()?;
        if inner.is_some() {
            context.counter.add(self.activation.cost(n * f, true));
        }
        let (write_gate, write_up) = (d_gate.block_writer(), d_up.block_writer());
        let write_inner = inner.as_mut().map(Bf16Lhs::block_writer);
        gemm_tiles([&rhs.terms(&dy)?], |strip, panel, [d_inner]| {
            let mut gate = tiles.gate.read(strip, panel);
            let mut up = tiles.up.read(strip, panel);
            // SAFETY: as in the forward pass.
            unsafe {
                let gradients = [&mut *d_inner, &mut gate, &mut up];
                with_function!(self.activation, F => gated_tile_backward::<F>(gradients));
                write_gate.write(strip, panel, &gate);
                write_up.write(strip, panel, &up);
                if let Some(write_inner) = write_inner {
                    write_inner.write(strip, panel, d_inner);
                }
            }
        });
        let input = |tiles: Bf16Lhs| LinearInput::from_packed((n, f), PackedLhs::from_bf16(tiles));
        if let (Some(inner), Some(dxa)) = (inner, dxa) {
            down.lora_a_gradient(context, &input(inner), &dxa, gradients)?;
        }
        Ok([input(d_gate), input(d_up)])
    }
}

/// Computes `scaling * x A^T` of the adapter and counts the layer's forward pass; returns the
/// layer's right-hand sides and its input of the backward pass.
fn layer_rhs<'a>(
    context: Context<'_>,
    linear: &'a Linear,
    x: &LinearInput,
) -> Result<(LayerRhs<'a>, LinearSaved)> {
    linear.check_input(x)?;
    let shape = linear.shape(x.shape().0, false)?;
    context.counter.add(shape.forward_cost(context.precision));
    let down = linear.lora_down(context, x, &x.lhs(&None)?, None)?;
    let (saved, scaled) = down.unzip();
    let b = linear.lora.as_ref().map(|lora| &lora.b);
    let rhs = LayerRhs::new(context, &linear.weight, scaled.as_deref().zip(b), true)?;
    Ok((rhs, saved.unwrap_or_default()))
}

/// gate = f(gate) up.
fn gated_tile<F: Function>(gate: &mut Tile, up: &Tile) {
    let (gate, up) = (&mut gate.0, &up.0);
    simd!(|simd| {
        for i in 0..TILE * TILE {
            gate[i] = F::value(simd, gate[i]) * up[i];
        }
    });
}

/// From d = dL/d(f(gate) up): gate and up become their gradients, d becomes f(gate) up.
fn gated_tile_backward<F: Function>([d, gate, up]: [&mut Tile; 3]) {
    let (d, gate, up) = (&mut d.0, &mut gate.0, &mut up.0);
    simd!(|simd| {
        for i in 0..TILE * TILE {
            [gate[i], up[i], d[i]] = F::gated_backward(simd, d[i], gate[i], up[i]);
        }
    });
}

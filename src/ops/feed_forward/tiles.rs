//! The layers in blocks: 32 x 32 numbers of gate and up become a block of the last layer's input while they are in the cache, and
//! on the way back a block of its gradient becomes blocks of theirs. Nothing between the layers is ever written in f32 rows.

use candle_core::Tensor;

use super::{FeedForward, FeedForwardSaved, Intermediate};
use crate::error::{Error, Kind, Result};
use crate::ops::gemm::bf16::{
    BF16_PLANES, Bf16Lhs, BlockWriter, PackedOperand, TILE, Tile, gemm_tiles,
};
use crate::ops::gemm::{MatRef, PackedLhs};
use crate::ops::simd::dispatch;
use crate::ops::storage::{CpuTensor, SendPtr, check_shape};
use crate::ops::swiglu::{gradients, swiglu_backward_cost, swiglu_cost, swiglu_element};
use crate::ops::{Branch, Context, Gradients, Linear, LinearInput, LinearSaved, Weight};
use crate::work::Precision;

/// Gate and up (N, F), block by block.
pub(super) struct GateUpTiles {
    shape: (usize, usize),
    gate: SavedTiles,
    up: SavedTiles,
}

/// The numbers of a matrix in the compute type, in blocks of 32 x 32, zero beyond its last row and column.
enum SavedTiles {
    Narrow(PackedOperand),
    Wide { tiles: Vec<Tile>, panels: usize },
}

impl SavedTiles {
    /// # Safety
    /// Every block must be written before it is read.
    unsafe fn uninitialized(precision: Precision, rows: usize, columns: usize) -> Self {
        match precision {
            Precision::F32 => {
                let panels = columns.div_ceil(TILE);
                // SAFETY: the caller's promise.
                let tiles =
                    unsafe { crate::ops::storage::uninit_vec(rows.div_ceil(TILE) * panels) };
                Self::Wide { tiles, panels }
            }
            Precision::Bf16 | Precision::F16 => {
                // SAFETY: the caller's promise.
                Self::Narrow(unsafe { PackedOperand::uninit(BF16_PLANES, rows, columns) })
            }
        }
    }

    /// What writes its blocks.
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

/// The blocks of a `SavedTiles` that several threads write.
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

/// What a sum is made of: W, and the second half of the adapter.
struct LayerRhs<'a> {
    w: WeightRhs<'a>,
    /// The scaled rows of the first half, packed, and B or A.
    low: Option<(PackedLhs, WeightRhs<'a>)>,
}

/// The right side of a product: a weight as it is stored, or transposed.
struct WeightRhs<'a> {
    weight: &'a Weight,
    host: CpuTensor<'a>,
    transposed: bool,
}

impl<'a> WeightRhs<'a> {
    fn new(weight: &'a Weight, transposed: bool) -> Result<Self> {
        Ok(Self {
            weight,
            host: CpuTensor::borrow(&weight.tensor)?,
            transposed,
        })
    }

    fn matrix(&self) -> Result<MatRef<'_>> {
        let matrix = self.weight.matrix(&self.host)?;
        Ok(if self.transposed { matrix.t() } else { matrix })
    }
}

impl<'a> LayerRhs<'a> {
    /// W, and where there is an adapter its scaled rows (N, r) and the weight that they are multiplied by.
    fn new(
        context: Context<'_>,
        w: &'a Weight,
        low: Option<(&[f32], &'a Weight)>,
        transposed: bool,
    ) -> Result<Self> {
        let low = low.map(|(scaled, weight)| -> Result<_> {
            let (rows, columns) = weight.tensor.dims2()?;
            let r = if transposed { columns } else { rows };
            let rows = MatRef::from_f32(scaled, scaled.len() / r.max(1), r);
            Ok((
                PackedLhs::new(context.precision, &rows),
                WeightRhs::new(weight, transposed)?,
            ))
        });
        Ok(Self {
            w: WeightRhs::new(w, transposed)?,
            low: low.transpose()?,
        })
    }

    /// x times W, and the adapter's rows times theirs.
    fn terms<'b>(&'b self, x: &'b LinearInput) -> Result<Vec<(&'b Bf16Lhs, MatRef<'b>)>> {
        let mut terms = vec![(packed(x.prepared())?, self.w.matrix()?)];
        if let Some((rows, factor)) = &self.low {
            terms.push((packed(rows)?, factor.matrix()?));
        }
        Ok(terms)
    }
}

fn packed(prepared: &PackedLhs) -> Result<&Bf16Lhs> {
    prepared
        .packed()
        .ok_or_else(|| Error::new(Kind::Tensor, "blocks are made of what is packed"))
}

impl FeedForward<'_> {
    /// Whether this pass runs: x is packed, and nothing but W and an adapter is to be added or trained.
    pub(super) fn supports_tiles(&self, x: &LinearInput) -> bool {
        let plain = |linear: &&Linear| linear.bias.is_none() && !linear.weight.is_trained();
        x.prepared().packed().is_some() && [self.gate, self.up, self.down].iter().all(plain)
    }

    pub(super) fn forward_tiles(
        &self,
        context: Context<'_>,
        x: LinearInput,
        base: &Tensor,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        let (n, f) = (x.shape().0, self.gate.weight.tensor.dims2()?.0);
        check_shape("up", &self.up.weight.tensor, self.gate.weight.tensor.dims())?;
        let (gate_factors, gate_saved) = self.outer(context, self.gate, &x)?;
        let (up_factors, up_saved) = self.outer(context, self.up, &x)?;
        context.counter.add(swiglu_cost(n * f));
        // SAFETY: `gemm_tiles` gives every block, and each is written.
        let (mut gate, mut up, mut inner) = unsafe {
            let kept = || SavedTiles::uninitialized(context.precision, n, f);
            (kept(), kept(), packed(x.prepared())?.uninit_like(n, f))
        };
        {
            let (write_gate, write_up, write_inner) =
                (gate.writer(), up.writer(), inner.block_writer());
            let (gate, up) = (gate_factors.terms(&x)?, up_factors.terms(&x)?);
            gemm_tiles([&gate, &up], |strip, panel, tiles| {
                let [gate, up] = tiles;
                // SAFETY: `gemm_tiles` gives each strip and panel of this shape once, and what is written outlives it.
                unsafe {
                    write_gate.write(strip, panel, gate);
                    write_up.write(strip, panel, up);
                    swiglu_tile(gate, up);
                    write_inner.write(strip, panel, gate);
                }
            });
        }
        drop(x);
        let inner = LinearInput::packed((n, f), PackedLhs::from_bf16(inner));
        let (y, down) = self.down.forward_input(context, &inner, None, Some(base))?;
        Ok((
            y,
            FeedForwardSaved {
                between: Intermediate::Tiles(GateUpTiles {
                    shape: (n, f),
                    gate,
                    up,
                }),
                gate: gate_saved,
                up: up_saved,
                down,
            },
        ))
    }

    /// Counts a layer that reads x, and runs the first half of its adapter.
    fn outer<'a>(
        &self,
        context: Context<'_>,
        linear: &'a Linear,
        x: &LinearInput,
    ) -> Result<(LayerRhs<'a>, LinearSaved)> {
        linear.expect_input(x)?;
        context.counter.add(
            linear
                .shape(x.shape().0, false)?
                .forward_cost(context.precision),
        );
        let (saved, scaled) = linear.low(context, x, &x.left(&None)?, None)?.unzip();
        let low = scaled
            .as_deref()
            .zip(linear.lora.as_ref().map(|lora| &lora.b));
        Ok((
            LayerRhs::new(context, &linear.weight, low, true)?,
            saved.unwrap_or_default(),
        ))
    }

    pub(super) fn backward_tiles(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        (x, saved, between): (Option<&LinearInput>, &FeedForwardSaved, &GateUpTiles),
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let ((n, f), c) = (between.shape, self.down.weight.tensor.dims2()?.0);
        check_shape("dy", dy, &[n, c])?;
        check_shape("down", &self.down.weight.tensor, &[c, f])?;
        let dy = LinearInput::new(context, dy.clone())?;
        context.counter.add(
            self.down
                .shape(n, false)?
                .backward_cost(context.precision, true),
        );
        context.counter.add(swiglu_backward_cost(n * f));
        let down = Branch {
            linear: self.down,
            dy: &dy,
            saved: &saved.down,
        };
        let d_low = down.lora_b_gradient(context, gradients)?;
        let low = d_low
            .as_deref()
            .zip(self.down.lora.as_ref().map(|lora| &lora.a));
        let factors = LayerRhs::new(context, &self.down.weight, low, false)?;
        // SAFETY: `gemm_tiles` gives every block, and each is written.
        let room = || packed(dy.prepared()).map(|dy| unsafe { dy.uninit_like(n, f) });
        let (mut d_gate, mut d_up) = (room()?, room()?);
        let mut inner = None;
        if d_low.is_some() {
            context.counter.add(swiglu_cost(n * f));
            inner = Some(room()?);
        }
        {
            let terms = factors.terms(&dy)?;
            let (write_gate, write_up, write_inner) = (
                d_gate.block_writer(),
                d_up.block_writer(),
                inner.as_mut().map(Bf16Lhs::block_writer),
            );
            gemm_tiles([&terms], |strip, panel, [d_inner]| {
                let (mut gate, mut up) = (
                    between.gate.read(strip, panel),
                    between.up.read(strip, panel),
                );
                // SAFETY: as in the forward pass.
                unsafe {
                    swiglu_tile_backward(d_inner, &mut gate, &mut up);
                    write_gate.write(strip, panel, &gate);
                    write_up.write(strip, panel, &up);
                    if let Some(write_inner) = write_inner {
                        write_inner.write(strip, panel, d_inner);
                    }
                }
            });
        }
        let packed = |blocks: Bf16Lhs| LinearInput::packed((n, f), PackedLhs::from_bf16(blocks));
        if let (Some(inner), Some(d_low)) = (inner, d_low) {
            down.lora_a_gradient(context, &packed(inner), &d_low, gradients)?;
        }
        drop(dy);
        let (d_gate, d_up) = (packed(d_gate), packed(d_up));
        self.backward_outer(
            context,
            [&d_gate, &d_up],
            (x, saved),
            input_gradient,
            gradients,
        )
    }
}

/// gate = silu(gate) up.
fn swiglu_tile(gate: &mut Tile, up: &Tile) {
    let (gate, up) = (&mut gate.0, &up.0);
    dispatch(
        #[inline(always)]
        |cpu| {
            for i in 0..TILE * TILE {
                gate[i] = swiglu_element(cpu, gate[i], up[i]);
            }
        },
    );
}

/// gate and up become their gradients, from that of silu(gate) up, and d becomes silu(gate) up itself.
fn swiglu_tile_backward(d: &mut Tile, gate: &mut Tile, up: &mut Tile) {
    let (d, gate, up) = (&mut d.0, &mut gate.0, &mut up.0);
    dispatch(
        #[inline(always)]
        |cpu| {
            for i in 0..TILE * TILE {
                [gate[i], up[i], d[i]] = gradients(cpu, d[i], gate[i], up[i]);
            }
        },
    );
}

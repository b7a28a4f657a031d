//! The layers in tile registers: 32 x 32 numbers of gate and up become a block of the last layer's input while they are in the cache, and
//! on the way back a block of its gradient becomes blocks of theirs. Nothing between the layers is ever written in f32 rows.

use candle_core::Tensor;

use super::{Between, FeedForward, FeedForwardSaved};
use crate::error::{Error, Kind, Result};
use crate::ops::host::{Host, Shared, expect_shape};
use crate::ops::product::amx::{Blocks, Operand, Packed, Right, SIDE, Tile, tiles_of};
use crate::ops::product::{Matrix, Prepared};
use crate::ops::simd::vectorized;
use crate::ops::swiglu::{gated, gradients, swiglu_backward_cost, swiglu_cost};
use crate::ops::{Branch, Context, Gradients, Linear, LinearInput, LinearSaved, issue};
use crate::work::Precision;

/// Gate and up (N, F), block by block.
pub(super) struct Saved {
    shape: (usize, usize),
    gate: Kept,
    up: Kept,
}

/// The numbers of a matrix in the compute type, in blocks of 32 x 32, zero beyond its last row and column.
enum Kept {
    Narrow(Operand<1>),
    Wide { tiles: Vec<Tile>, panels: usize },
}

impl Kept {
    /// # Safety
    /// Every block must be written before it is read.
    unsafe fn uninitialized(precision: Precision, rows: usize, columns: usize) -> Self {
        match precision {
            Precision::F32 => {
                let panels = columns.div_ceil(SIDE);
                // SAFETY: the caller's promise.
                let tiles = unsafe { crate::ops::host::uninitialized(rows.div_ceil(SIDE) * panels) };
                Self::Wide { tiles, panels }
            }
            // SAFETY: the caller's promise.
            Precision::Bf16 | Precision::F16 => Self::Narrow(unsafe { Operand::uninitialized(rows, columns) }),
        }
    }

    /// What writes its blocks.
    fn writer(&mut self) -> Writer {
        match self {
            Self::Narrow(operand) => Writer::Narrow(operand.blocks()),
            Self::Wide { tiles, panels } => Writer::Wide(Shared(tiles.as_mut_ptr()), *panels),
        }
    }

    fn read(&self, strip: usize, panel: usize, tile: &mut Tile) {
        match self {
            Self::Narrow(operand) => operand.read(strip, panel, tile),
            Self::Wide { tiles, panels } => *tile = tiles[strip * panels + panel],
        }
    }
}

/// The blocks of a `Kept` that several threads write.
#[derive(Clone, Copy)]
enum Writer {
    Narrow(Blocks<1>),
    Wide(Shared<Tile>, usize),
}

impl Writer {
    /// # Safety
    /// As `Blocks::write`'s.
    unsafe fn write(self, strip: usize, panel: usize, tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Narrow(blocks) => blocks.write(strip, panel, tile),
                Self::Wide(tiles, panels) => *tiles.at(strip * panels + panel) = *tile,
            }
        }
    }
}

/// An adapter's first half and what it is multiplied by: the scaled rows, packed, and B or A.
struct Second<'a> {
    rows: Prepared,
    factor: Host<'a>,
    r: usize,
}

impl<'a> Second<'a> {
    fn new(context: Context<'_>, scaled: &[f32], n: usize, (factor, r): (&'a Tensor, usize)) -> Result<Self> {
        let rows = Prepared::new(context.precision, &Matrix::of(scaled, n, r));
        Ok(Self { rows, factor: Host::open_any(factor)?, r })
    }
}

fn operand<const P: usize>(prepared: &Prepared) -> Result<&Operand<P>> {
    let operand = prepared.packed().and_then(Packed::operand::<P>);
    operand.ok_or_else(|| Error::new(Kind::Tensor, "operands of one sum are packed alike"))
}

impl FeedForward<'_> {
    /// Whether this pass runs: x is packed, and nothing but W and an adapter is to be added or trained.
    pub(super) fn by_tiles(&self, x: &LinearInput) -> bool {
        let plain = |linear: &&Linear| linear.bias.is_none() && !linear.weight.is_trained();
        x.prepared().packed().is_some() && [self.gate, self.up, self.down].iter().all(plain)
    }

    pub(super) fn forward_tiles(
        &self,
        context: Context<'_>,
        x: LinearInput,
        base: &Tensor,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        match context.precision {
            Precision::F32 => self.forward_planes::<3>(context, x, base),
            Precision::Bf16 | Precision::F16 => self.forward_planes::<1>(context, x, base),
        }
    }

    fn forward_planes<const P: usize>(
        &self,
        context: Context<'_>,
        x: LinearInput,
        base: &Tensor,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        let (n, f) = (x.rows(), self.gate.weight.tensor.dims2()?.0);
        expect_shape("up", (n, self.up.weight.tensor.dims2()?.0), (n, f))?;
        let (gate_terms, gate_saved) = self.outer(context, self.gate, &x)?;
        let (up_terms, up_saved) = self.outer(context, self.up, &x)?;
        context.tally.add(swiglu_cost(n * f));
        // SAFETY: `tiles_of` gives every block, and each is written.
        let (mut gate, mut up, mut inner) = unsafe {
            let kept = || Kept::uninitialized(context.precision, n, f);
            (kept(), kept(), Operand::<P>::uninitialized(n, f))
        };
        {
            let (write_gate, write_up, write_inner) = (gate.writer(), up.writer(), inner.blocks());
            let (gate, up) = (gate_terms.terms::<P>(&x)?, up_terms.terms::<P>(&x)?);
            tiles_of::<P, 2>([&gate, &up], |strip, panel, tiles| {
                let [gate, up] = tiles;
                // SAFETY: `tiles_of` gives each strip and panel of this shape once, and what is written outlives it.
                unsafe {
                    write_gate.write(strip, panel, gate);
                    write_up.write(strip, panel, up);
                    activate(gate, up);
                    write_inner.write(strip, panel, gate);
                }
            });
        }
        drop(x);
        let inner = LinearInput::packed((n, f), Prepared::of(Packed::from_blocks(inner)));
        let (y, down) = self.down.forward_prepared(context, &inner, None, Some(base))?;
        Ok((
            y,
            FeedForwardSaved { between: Between::Tiles(Saved { shape: (n, f), gate, up }), gate: gate_saved, up: up_saved, down },
        ))
    }

    /// Counts a layer that reads x, and runs the first half of its adapter.
    fn outer<'a>(&self, context: Context<'_>, linear: &'a Linear, x: &LinearInput) -> Result<(Outer<'a>, LinearSaved)> {
        linear.expect_input(x)?;
        let n = x.rows();
        context.tally.add(linear.shape(n, false)?.forward_cost(context.precision));
        let left = x.left(&None)?;
        let (mut second, mut kept) = (None, LinearSaved::default());
        if let (Some((saved, scaled)), Some(lora)) = (linear.low(context, x, &left, None)?, &linear.lora) {
            second = Some(Second::new(context, &scaled, n, (&lora.b.tensor, lora.b.tensor.dims2()?.1))?);
            kept = saved;
        }
        Ok((Outer { weight: Host::open_any(&linear.weight.tensor)?, shape: linear.weight.tensor.dims2()?, second }, kept))
    }

    pub(super) fn backward_tiles(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        saved: (Option<&LinearInput>, &FeedForwardSaved, &Saved),
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        match context.precision {
            Precision::F32 => self.backward_planes::<3>(context, dy, saved, input_gradient, gradients),
            Precision::Bf16 | Precision::F16 => self.backward_planes::<1>(context, dy, saved, input_gradient, gradients),
        }
    }

    fn backward_planes<const P: usize>(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        (x, saved, between): (Option<&LinearInput>, &FeedForwardSaved, &Saved),
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let ((n, _), (c, f)) = (dy.dims2()?, self.down.weight.tensor.dims2()?);
        expect_shape("dy", (n, f), between.shape)?;
        let dy = LinearInput::new(context, dy.clone())?;
        self.down.expect_gradient(&dy)?;
        context.tally.add(self.down.shape(n, false)?.backward_cost(context.precision, true));
        context.tally.add(swiglu_backward_cost(n * f));
        let down = Branch { linear: self.down, dy: &dy, saved: &saved.down };
        let d_low = down.outer_gradient(context, gradients)?;
        let second = match (&d_low, &self.down.lora) {
            (Some(d_low), Some(lora)) => Some(Second::new(context, d_low, n, (&lora.a.tensor, lora.a.tensor.dims2()?.0))?),
            _ => None,
        };
        let (w, mut inner) = (Host::open_any(&self.down.weight.tensor)?, None);
        // SAFETY: `tiles_of` gives every block, and each is written.
        let (mut d_gate, mut d_up) = unsafe { (Operand::<P>::uninitialized(n, f), Operand::<P>::uninitialized(n, f)) };
        if d_low.is_some() {
            context.tally.add(swiglu_cost(n * f));
            // SAFETY: as above.
            inner = Some(unsafe { Operand::<P>::uninitialized(n, f) });
        }
        {
            let mut terms = vec![(operand::<P>(dy.prepared())?, Right::of(&w.matrix(c, f)))];
            issue(1, n, f, c);
            if let Some(second) = &second {
                issue(1, n, f, second.r);
                terms.push((operand::<P>(&second.rows)?, Right::of(&second.factor.matrix(second.r, f))));
            }
            let (write_gate, write_up, write_inner) = (d_gate.blocks(), d_up.blocks(), inner.as_mut().map(Operand::blocks));
            tiles_of::<P, 1>([&terms], |strip, panel, [d_inner]| {
                let (mut gate, mut up) = (Tile::ZERO, Tile::ZERO);
                between.gate.read(strip, panel, &mut gate);
                between.up.read(strip, panel, &mut up);
                // SAFETY: as in the forward pass.
                unsafe {
                    if let Some(write_inner) = write_inner {
                        let mut inner = gate;
                        activate(&mut inner, &up);
                        write_inner.write(strip, panel, &inner);
                    }
                    deactivate(d_inner, &mut gate, &mut up);
                    write_gate.write(strip, panel, &gate);
                    write_up.write(strip, panel, &up);
                }
            });
        }
        let packed = |operand: Operand<P>| LinearInput::packed((n, f), Prepared::of(Packed::from_blocks(operand)));
        if let (Some(inner), Some(d_low)) = (inner, d_low) {
            down.inner_gradient(context, &packed(inner), &d_low, gradients)?;
        }
        drop(dy);
        let (d_gate, d_up) = (packed(d_gate), packed(d_up));
        self.backward_outer(context, [&d_gate, &d_up], (x, saved), input_gradient, gradients)
    }
}

/// W (out, in) of a layer that reads x, and the second half of its adapter.
struct Outer<'a> {
    weight: Host<'a>,
    shape: (usize, usize),
    second: Option<Second<'a>>,
}

impl Outer<'_> {
    /// x W^T and the adapter.
    fn terms<'a, const P: usize>(&'a self, x: &'a LinearInput) -> Result<Vec<(&'a Operand<P>, Right<'a, P>)>> {
        let (n, (o, i)) = (x.rows(), self.shape);
        issue(1, n, o, i);
        let mut terms = vec![(operand::<P>(x.prepared())?, Right::of(&self.weight.matrix(o, i).t()))];
        if let Some(Second { rows, factor, r }) = &self.second {
            issue(1, n, o, *r);
            terms.push((operand::<P>(rows)?, Right::of(&factor.matrix(o, *r).t())));
        }
        Ok(terms)
    }
}

/// gate = silu(gate) up.
fn activate(gate: &mut Tile, up: &Tile) {
    let (gate, up) = (&mut gate.0, &up.0);
    vectorized(
        #[inline(always)]
        || {
            for i in 0..SIDE * SIDE {
                gate[i] = gated(gate[i], up[i]);
            }
        },
    );
}

/// gate and up become their gradients, from that of silu(gate) up.
fn deactivate(d: &Tile, gate: &mut Tile, up: &mut Tile) {
    let (d, gate, up) = (&d.0, &mut gate.0, &mut up.0);
    vectorized(
        #[inline(always)]
        || {
            for i in 0..SIDE * SIDE {
                (gate[i], up[i]) = gradients(d[i], gate[i], up[i]);
            }
        },
    );
}

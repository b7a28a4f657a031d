//! `y = down(silu(gate(x)) * up(x))`: a block's gated feed-forward layers as one pair (Shazeer 2020, "GLU variants improve transformer").
//!
//! x and y are (N, C), what lies between (N, F). Layer by layer, or in blocks with everything between the layers done while a tile
//! is in the cache (`tiles`): what they read and write of memory takes longer than their products there.

#[cfg(target_arch = "x86_64")]
mod tiles;

use candle_core::Tensor;

use super::swiglu::{SwigluSaved, swiglu, swiglu_backward, swiglu_recompute};
use super::{
    Branch, Context, DropoutMask, Gradients, Linear, LinearInput, LinearSaved,
    backward_shared_input,
};
use crate::error::Result;
#[cfg(target_arch = "x86_64")]
use crate::error::{Error, Kind};

/// The three layers.
#[derive(Debug, Clone, Copy)]
pub struct FeedForward<'a> {
    /// C to F.
    pub gate: &'a Linear,
    /// C to F.
    pub up: &'a Linear,
    /// F to C.
    pub down: &'a Linear,
}

/// What `backward` needs of a forward pass.
pub struct FeedForwardSaved {
    between: Intermediate,
    gate: LinearSaved,
    up: LinearSaved,
    down: LinearSaved,
}

/// What gate and up gave, in the compute type.
enum Intermediate {
    Rows(SwigluSaved),
    #[cfg(target_arch = "x86_64")]
    Tiles(tiles::GateUpTiles),
}

#[cfg(test)]
impl FeedForwardSaved {
    /// Whether the pass ran in blocks.
    pub(super) fn in_tiles(&self) -> bool {
        match &self.between {
            Intermediate::Rows(_) => false,
            #[cfg(target_arch = "x86_64")]
            Intermediate::Tiles(_) => true,
        }
    }
}

/// Which of the layers a dropout mask is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForwardLayer {
    /// `gate_proj`
    Gate,
    /// `up_proj`
    Up,
    /// `down_proj`
    Down,
}

/// The mask of a layer's adapter, (N, in), for its input.
pub type Masks<'a> = &'a dyn Fn(FeedForwardLayer, &LinearInput) -> Option<DropoutMask>;

impl FeedForward<'_> {
    /// x (N, C) -> base + y (N, C). `masks`: where adapters have dropout. `through`: whether a backward pass is sure to ask for
    /// the gradients of what lies between.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: LinearInput,
        masks: Option<Masks<'_>>,
        base: &Tensor,
        through: bool,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        #[cfg(target_arch = "x86_64")]
        if masks.is_none() && through && self.supports_tiles(&x) {
            return self.forward_tiles(context, x, base);
        }
        let _ = through;
        let mask = |part: FeedForwardLayer, x: &LinearInput| masks.and_then(|masks| masks(part, x));
        let (gate, gate_saved) =
            self.gate
                .forward_input(context, &x, mask(FeedForwardLayer::Gate, &x), None)?;
        let (up, up_saved) =
            self.up
                .forward_input(context, &x, mask(FeedForwardLayer::Up, &x), None)?;
        drop(x);
        let (inner, saved) = swiglu(context, &gate, &up)?;
        drop((gate, up));
        let inner = LinearInput::new(context, inner)?;
        let (y, down) = self.down.forward_input(
            context,
            &inner,
            mask(FeedForwardLayer::Down, &inner),
            Some(base),
        )?;
        Ok((
            y,
            FeedForwardSaved {
                between: Intermediate::Rows(saved),
                gate: gate_saved,
                up: up_saved,
                down,
            },
        ))
    }

    /// dy (N, C) and the forward pass's x (where gate or up keeps it) -> dx (N, C) where `input_gradient`. `through`: whether anything is
    /// wanted beyond the last layer's own gradients.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        (x, saved): (Option<&LinearInput>, &FeedForwardSaved),
        (through, input_gradient): (bool, bool),
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let rows = match &saved.between {
            Intermediate::Rows(rows) => rows,
            #[cfg(target_arch = "x86_64")]
            Intermediate::Tiles(_) if !through => {
                return Err(Error::new(
                    Kind::Tensor,
                    "a pass in tiles goes back through all of its layers",
                ));
            }
            #[cfg(target_arch = "x86_64")]
            Intermediate::Tiles(tiles) => {
                return self.backward_tiles(
                    context,
                    dy,
                    (x, saved, tiles),
                    input_gradient,
                    gradients,
                );
            }
        };
        let inner = self
            .down
            .needs_input()
            .then(|| LinearInput::new(context, swiglu_recompute(context, rows)?))
            .transpose()?;
        let d = LinearInput::new(context, dy.clone())?;
        let down = Branch {
            linear: self.down,
            dy: &d,
            saved: &saved.down,
        };
        let Some(d_inner) =
            backward_shared_input(context, &[down], inner.as_ref(), (through, None), gradients)?
        else {
            return Ok(None);
        };
        drop((inner, d));
        let (d_gate, d_up) = swiglu_backward(context, &d_inner, rows)?;
        drop(d_inner);
        let (d_gate, d_up) = (
            LinearInput::new(context, d_gate)?,
            LinearInput::new(context, d_up)?,
        );
        self.backward_outer(
            context,
            [&d_gate, &d_up],
            (x, saved),
            input_gradient,
            gradients,
        )
    }

    /// Gate's and up's backward passes.
    fn backward_outer(
        &self,
        context: Context<'_>,
        [d_gate, d_up]: [&LinearInput; 2],
        (x, saved): (Option<&LinearInput>, &FeedForwardSaved),
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let gate = Branch {
            linear: self.gate,
            dy: d_gate,
            saved: &saved.gate,
        };
        let up = Branch {
            linear: self.up,
            dy: d_up,
            saved: &saved.up,
        };
        backward_shared_input(context, &[gate, up], x, (input_gradient, None), gradients)
    }
}

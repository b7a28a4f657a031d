//! `y = down(f(gate(x)) * up(x))`: a block's gated feed-forward layers as one op (SwiGLU, GeGLU;
//! Shazeer 2020, "GLU variants improve transformer").
//!
//! x and y are (N, C), the intermediate activations (N, F). They run layer by layer, or fused in 32
//! x 32 tiles (`tiles`), which saves the memory traffic of the intermediate activations. gate and up
//! may be one layer, `[gate|up]` (2 F, C).

#[cfg(target_arch = "x86_64")]
mod tiles;

use candle_core::Tensor;

use super::{
    Activation, ActivationSaved, Branch, Context, DropoutMask, Gradients, InputGradient, Linear,
    LinearInput, LinearSaved, backward_shared_input, join_columns, split_columns,
};
use crate::error::Result;
#[cfg(target_arch = "x86_64")]
use crate::error::{Error, Kind};

/// The layers, and the activation function of gate.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use wattune::ops::{Activation, Context, FeedForward, Linear, LinearInput, Weight};
/// # use wattune::work::{Precision, WorkCounter};
/// # let linear = |w: f32| Ok::<_, candle_core::Error>(Linear {
/// #     weight: Weight::frozen(Tensor::new(&[[w]], &Device::Cpu)?), bias: None, lora: None });
/// let (gate_up, down) = ([linear(0.)?, linear(2.)?], linear(3.)?); // 1 x 1 each
/// let activation = Activation::Silu;
/// let layers = FeedForward { activation, gated: true, gate_up: &gate_up, down: &down };
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// let x = Tensor::new(&[[5f32]], &Device::Cpu)?;
/// let input = LinearInput::new(context, x.clone())?;
/// let (y, _) = layers.forward(context, input, None, Some(&x), true)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[5.]]); // 5 + 3 * (silu(0) * 10)
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct FeedForward<'a> {
    /// f.
    pub activation: Activation,
    /// Whether up multiplies f(gate): y = down(f(gate(x)) up(x)), rather than y = down(f(gate(x))).
    pub gated: bool,
    /// gate and up, C to F each; or one layer of both, C to 2 F; or gate alone.
    pub gate_up: &'a [Linear],
    /// F to C.
    pub down: &'a Linear,
}

/// Saved by `forward` for `backward`, which also takes x.
pub struct FeedForwardSaved {
    intermediate: Intermediate,
    gate_up: Vec<LinearSaved>,
    down: LinearSaved,
}

/// The outputs of gate and up, in the compute type.
enum Intermediate {
    Rows(ActivationSaved),
    #[cfg(target_arch = "x86_64")]
    Tiles(tiles::GateUpTiles),
}

#[cfg(test)]
impl FeedForwardSaved {
    /// Whether the pass ran in tiles.
    pub(super) fn in_tiles(&self) -> bool {
        !matches!(self.intermediate, Intermediate::Rows(_))
    }
}

/// The dropout mask (N, in) of a layer's adapter for its input; the layer by its index in
/// `gate_up`, `down` after them.
pub type Masks<'a> = &'a dyn Fn(usize, &LinearInput) -> Option<DropoutMask>;

/// How far a backward pass goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackwardDepth {
    /// Weight gradients of `down` alone.
    Down,
    /// Weight gradients of all layers.
    Weights,
    /// Weight gradients of all layers, and dx.
    Input,
}

impl FeedForward<'_> {
    /// x (N, C) -> y (N, C), added to `base` if given. `masks`: LoRA dropout. `all_layers`: whether the backward
    /// pass, if any, includes gate and up; the tiled pass requires it.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: LinearInput,
        masks: Option<Masks<'_>>,
        base: Option<&Tensor>,
        all_layers: bool,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        #[cfg(target_arch = "x86_64")]
        if masks.is_none()
            && all_layers
            && let Some(layers) = self.tiled_layers(&x)
        {
            return self.forward_tiles(context, layers, x, base);
        }
        let _ = all_layers;
        let apply = |layer, linear: &Linear, x: &LinearInput, base| {
            let mask = masks.and_then(|masks| masks(layer, x));
            linear.forward_input(context, x, mask, base)
        };
        let (mut outputs, mut gate_up_saved) = (Vec::new(), Vec::new());
        for (index, linear) in self.gate_up.iter().enumerate() {
            let (y, saved) = apply(index, linear, &x, None)?;
            outputs.push(y);
            gate_up_saved.push(saved);
        }
        drop(x);
        if let ([both], true) = (outputs.as_slice(), self.gated) {
            let f = both.dims2()?.1 / 2;
            outputs = split_columns(context, both, 1, &[f, f])?;
        }
        let (gate, up) = (&outputs[0], outputs.get(1));
        let (inner, activation_saved) = self.activation.forward(context, gate, up)?;
        drop(outputs);
        let inner = LinearInput::new(context, inner)?;
        let (y, down_saved) = apply(self.gate_up.len(), self.down, &inner, base)?;
        let saved = FeedForwardSaved {
            intermediate: Intermediate::Rows(activation_saved),
            gate_up: gate_up_saved,
            down: down_saved,
        };
        Ok((y, saved))
    }

    /// dy (N, C) and the forward pass's x (where gate or up needs it) -> dx (N, C) with
    /// `BackwardDepth::Input`; adds the gradients of trained weights.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        x: Option<&LinearInput>,
        saved: &FeedForwardSaved,
        depth: BackwardDepth,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let d_gate_up = match &saved.intermediate {
            Intermediate::Rows(rows) => {
                let d = self.backward_down(context, dy, rows, saved, depth, gradients)?;
                let Some(d) = d else { return Ok(None) };
                d
            }
            #[cfg(target_arch = "x86_64")]
            Intermediate::Tiles(_) if depth == BackwardDepth::Down => {
                return Err(Error::new(
                    Kind::Tensor,
                    "a pass in tiles goes back through all of its layers",
                ));
            }
            #[cfg(target_arch = "x86_64")]
            Intermediate::Tiles(tiles) => {
                let d = self.backward_tiles(context, dy, tiles, &saved.down, gradients)?;
                d.into()
            }
        };
        let layers = self.gate_up.iter().zip(&d_gate_up).zip(&saved.gate_up);
        let branch = |((linear, dy), saved)| Branch { linear, dy, saved };
        let branches: Vec<_> = layers.map(branch).collect();
        let dx = InputGradient::when(depth == BackwardDepth::Input);
        backward_shared_input(context, &branches, x, dx, gradients)
    }

    /// Backward through `down` and the activation: the gradients of the outputs of `gate_up`; `None` with
    /// `BackwardDepth::Down`.
    fn backward_down(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        rows: &ActivationSaved,
        saved: &FeedForwardSaved,
        depth: BackwardDepth,
        gradients: &mut Gradients,
    ) -> Result<Option<Vec<LinearInput>>> {
        let inner = self
            .down
            .is_trained()
            .then(|| LinearInput::new(context, self.activation.recompute(context, rows)?))
            .transpose()?;
        let dy = LinearInput::new(context, dy.clone())?;
        let down = Branch {
            linear: self.down,
            dy: &dy,
            saved: &saved.down,
        };
        let dx = InputGradient::when(depth != BackwardDepth::Down);
        let d_inner = backward_shared_input(context, &[down], inner.as_ref(), dx, gradients)?;
        drop((inner, dy));
        let Some(d_inner) = d_inner else {
            return Ok(None);
        };
        let (d_gate, d_up) = self.activation.backward(context, &d_inner, rows)?;
        drop(d_inner);
        let mut d_gate_up: Vec<_> = [Some(d_gate), d_up].into_iter().flatten().collect();
        if d_gate_up.len() > self.gate_up.len() {
            d_gate_up = vec![join_columns(context, &d_gate_up, 1)?];
        }
        let inputs = d_gate_up.into_iter().map(|d| LinearInput::new(context, d));
        Ok(Some(inputs.collect::<Result<_>>()?))
    }
}

//! One decoder block: `x1 = x + o(attention(norm x))`, `y = x1 + down(swiglu(gate, up)(norm x1))`, forward and backward.

use candle_core::Tensor;
use rand::RngExt;

use super::linears::{Linears, NAMES, Needs};
use crate::error::Result;
use crate::ops::{
    Attention, AttentionSaved, Context, Gradients, Linear, LinearInput, LinearSaved, RmsNorm, RmsNormSaved, RopeTables, Segments,
    SwigluSaved, dropout_mask, swiglu, swiglu_again, swiglu_backward,
};
use crate::random::{self, Use};

/// A block's weights.
#[derive(Debug)]
pub(super) struct Block {
    /// `model.layers.N`, the prefix of its tensors.
    pub(super) path: String,
    pub(super) input_layernorm: RmsNorm,
    pub(super) post_attention_layernorm: RmsNorm,
    pub(super) linears: Linears<Linear>,
    pub(super) attention: Attention,
}

/// LoRA dropout of one step: masks are drawn from (seed, step, example, module), so that recomputing, resuming and batching differently
/// redraw the same ones.
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    /// Probability that an element is dropped.
    pub p: f64,
    /// The recipe's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// Each segment's example.
    pub examples: &'a [u64],
}

/// What every block of a pass shares.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) context: Context<'a>,
    pub(super) segments: &'a Segments,
    pub(super) rope: &'a RopeTables,
    pub(super) dropout: Option<Dropout<'a>>,
}

/// What a block's backward pass needs of its forward pass.
pub(super) struct BlockSaved {
    norm: RmsNormSaved,
    attention: AttentionSaved,
    post_norm: RmsNormSaved,
    swiglu: SwigluSaved,
    linears: Linears<LinearSaved>,
}

impl BlockSaved {
    /// The keys (rotated) and values of the pass, for a generation's cache.
    pub(super) fn keys_and_values(&self) -> Result<(Tensor, Tensor)> {
        self.attention.keys_and_values()
    }
}

impl Block {
    /// x (N, C) -> y (N, C). Here and in `backward` a tensor is let go as soon as it has been read: what a step keeps beside it decides whether
    /// it fits in memory.
    pub(super) fn forward(&self, pass: Pass<'_>, x: &Tensor) -> Result<(Tensor, BlockSaved)> {
        let l = &self.linears;
        let (h, norm) = self.input_layernorm.forward(pass.context, x)?;
        let h = LinearInput::new(pass.context, h)?;
        let (q, q_proj) = self.apply(pass, &l.q_proj, NAMES.q_proj, &h, None)?;
        let (k, k_proj) = self.apply(pass, &l.k_proj, NAMES.k_proj, &h, None)?;
        let (v, v_proj) = self.apply(pass, &l.v_proj, NAMES.v_proj, &h, None)?;
        drop(h);
        let rotated = (pass.rope.forward(pass.context, &q)?, pass.rope.forward(pass.context, &k)?);
        drop((q, k));
        let (mixed, attention) = self.attention.forward(pass.context, rotated.0, rotated.1, v, pass.segments)?;
        let (x1, o_proj) = self.apply(pass, &l.o_proj, NAMES.o_proj, &LinearInput::new(pass.context, mixed)?, Some(x))?;
        let (h, post_norm) = self.post_attention_layernorm.forward(pass.context, &x1)?;
        let h = LinearInput::new(pass.context, h)?;
        let (gate, gate_proj) = self.apply(pass, &l.gate_proj, NAMES.gate_proj, &h, None)?;
        let (up, up_proj) = self.apply(pass, &l.up_proj, NAMES.up_proj, &h, None)?;
        drop(h);
        let (inner, swiglu) = swiglu(pass.context, &gate, &up)?;
        drop((gate, up));
        let (y, down_proj) =
            self.apply(pass, &l.down_proj, NAMES.down_proj, &LinearInput::new(pass.context, inner)?, Some(&x1))?;
        let linears = Linears { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj };
        Ok((y, BlockSaved { norm, attention, post_norm, swiglu, linears }))
    }

    /// dy (N, C) -> dx (N, C) where `input_gradient`. Ends as soon as nothing before is trained.
    pub(super) fn backward(
        &self,
        pass: Pass<'_>,
        dy: &Tensor,
        saved: &BlockSaved,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let trains = self.linears.try_map(|linear| Ok(linear.keeps_input()))?;
        let needs = Needs::of(&trains, input_gradient);
        let (context, l, s) = (pass.context, &self.linears, &saved.linears);
        let inner = trains.down_proj.then(|| swiglu_again(context, &saved.swiglu)).transpose()?;
        let down = (inner.as_ref(), &s.down_proj);
        let Some(d_inner) = l.down_proj.backward(context, dy, down, (needs.gate, None), gradients)? else { return Ok(None) };
        drop(inner);
        let (d_gate, d_up) = swiglu_backward(context, &d_inner, &saved.swiglu)?;
        drop(d_inner);
        let h = (trains.gate_proj || trains.up_proj).then(|| self.post_attention_layernorm.again(context, &saved.post_norm));
        let h = h.transpose()?;
        let (gate, up) = ((h.as_ref(), &s.gate_proj), (h.as_ref(), &s.up_proj));
        let dh = l.gate_proj.backward(context, &d_gate, gate, (needs.attention, None), gradients)?;
        drop(d_gate);
        let Some(dh) = l.up_proj.backward(context, &d_up, up, (needs.attention, dh.as_ref()), gradients)? else {
            return Ok(None);
        };
        drop((d_up, h));
        let dx1 = self.post_attention_layernorm.backward(context, &dh, &saved.post_norm, Some(dy), gradients)?;
        drop(dh);
        let o = (Some(saved.attention.output()), &s.o_proj);
        let Some(d_mixed) = l.o_proj.backward(context, &dx1, o, (needs.qkv, None), gradients)? else { return Ok(None) };
        let (dq, dk, dv) = self.attention.backward(context, &d_mixed, &saved.attention, pass.segments)?;
        drop(d_mixed);
        let rotated = (dq, dk);
        let (dq, dk) = (pass.rope.backward(context, &rotated.0)?, pass.rope.backward(context, &rotated.1)?);
        drop(rotated);
        let h = (trains.q_proj || trains.k_proj || trains.v_proj).then(|| self.input_layernorm.again(context, &saved.norm));
        let h = h.transpose()?;
        let (q, k, v) = ((h.as_ref(), &s.q_proj), (h.as_ref(), &s.k_proj), (h.as_ref(), &s.v_proj));
        let dh = l.q_proj.backward(context, &dq, q, (needs.input, None), gradients)?;
        let dh = l.k_proj.backward(context, &dk, k, (needs.input, dh.as_ref()), gradients)?;
        let Some(dh) = l.v_proj.backward(context, &dv, v, (needs.input, dh.as_ref()), gradients)? else { return Ok(None) };
        Ok(Some(self.input_layernorm.backward(context, &dh, &saved.norm, Some(&dx1), gradients)?))
    }

    /// One linear layer, its adapter's input masked where there is dropout; added to `base` where there is one.
    fn apply(
        &self,
        pass: Pass<'_>,
        linear: &Linear,
        name: &str,
        x: &LinearInput,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let mask = match pass.dropout {
            Some(dropout) if linear.lora.is_some() => Some(self.mask(pass, dropout, name, x.tensor())?),
            _ => None,
        };
        linear.forward_prepared(pass.context, x, mask, base)
    }

    fn mask(&self, pass: Pass<'_>, dropout: Dropout<'_>, name: &str, x: &Tensor) -> Result<Tensor> {
        let width = x.dims2()?.1;
        let path = format!("{}.{name}", self.path);
        let mut u = Vec::with_capacity(x.elem_count());
        for (range, example) in pass.segments.ranges().iter().zip(dropout.examples) {
            let mut stream = random::stream(dropout.seed, Use::Dropout, &[dropout.step, *example], &path);
            u.extend((0..range.len() * width).map(|_| stream.random::<f32>()));
        }
        dropout_mask(u, dropout.p, x)
    }
}

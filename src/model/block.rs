//! One decoder block: `x1 = x + o(attention(norm x))`, `y = x1 + down(swiglu(gate, up)(norm x1))`, forward and backward.

use candle_core::Tensor;
use rand_chacha::rand_core::Rng;

use super::linears::{LINEAR_NAMES, Linears, Needs};
use crate::error::Result;
use crate::ops::{
    Attention, AttentionSaved, Branch, Context, DropoutMask, FeedForward, FeedForwardLayer,
    FeedForwardSaved, Gradients, Linear, LinearInput, LinearSaved, RmsNorm, RmsNormSaved,
    RopeTables, Segments, backward_shared_input,
};
use crate::random::{self, Purpose};

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
    feed_forward: FeedForwardSaved,
    /// Of q, k and v.
    qkv: [LinearSaved; 3],
    o: LinearSaved,
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
        let (q, q_proj) = self.apply(pass, &l.q_proj, LINEAR_NAMES.q_proj, &h, None)?;
        let (k, k_proj) = self.apply(pass, &l.k_proj, LINEAR_NAMES.k_proj, &h, None)?;
        let (v, v_proj) = self.apply(pass, &l.v_proj, LINEAR_NAMES.v_proj, &h, None)?;
        drop(h);
        let rotated = (
            pass.rope.forward(pass.context, &q)?,
            pass.rope.forward(pass.context, &k)?,
        );
        drop((q, k));
        let (mixed, attention) =
            self.attention
                .forward(pass.context, rotated.0, rotated.1, v, pass.segments)?;
        let (x1, o_proj) = self.apply(
            pass,
            &l.o_proj,
            LINEAR_NAMES.o_proj,
            &LinearInput::new(pass.context, mixed)?,
            Some(x),
        )?;
        let (h, post_norm) = self.post_attention_layernorm.forward(pass.context, &x1)?;
        let h = LinearInput::new(pass.context, h)?;
        let masks = |part: FeedForwardLayer, x: &LinearInput| {
            let (linear, name) = match part {
                FeedForwardLayer::Gate => (&l.gate_proj, LINEAR_NAMES.gate_proj),
                FeedForwardLayer::Up => (&l.up_proj, LINEAR_NAMES.up_proj),
                FeedForwardLayer::Down => (&l.down_proj, LINEAR_NAMES.down_proj),
            };
            self.mask(pass, linear, name, x)
        };
        let through = Needs::new(&self.trains(), false).gate;
        let masked = pass.dropout.is_some()
            && [&l.gate_proj, &l.up_proj, &l.down_proj]
                .iter()
                .any(|linear| linear.lora.is_some());
        let dropout = masked.then_some(&masks as _);
        let (y, feed_forward) =
            self.feed_forward()
                .forward(pass.context, h, dropout, &x1, through)?;
        Ok((
            y,
            BlockSaved {
                norm,
                attention,
                post_norm,
                feed_forward,
                qkv: [q_proj, k_proj, v_proj],
                o: o_proj,
            },
        ))
    }

    fn feed_forward(&self) -> FeedForward<'_> {
        let l = &self.linears;
        FeedForward {
            gate: &l.gate_proj,
            up: &l.up_proj,
            down: &l.down_proj,
        }
    }

    /// Which layers hold trained values.
    fn trains(&self) -> Linears<bool> {
        self.linears.map(Linear::needs_input)
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
        let trains = self.trains();
        let needs = Needs::new(&trains, input_gradient);
        let (context, l) = (pass.context, &self.linears);
        let again =
            |norm: &RmsNorm, saved: &RmsNormSaved, wanted: bool| -> Result<Option<LinearInput>> {
                wanted
                    .then(|| LinearInput::new(context, norm.recompute(context, saved)?))
                    .transpose()
            };
        let h = again(
            &self.post_attention_layernorm,
            &saved.post_norm,
            trains.gate_proj || trains.up_proj,
        )?;
        let (kept, wanted) = (
            (h.as_ref(), &saved.feed_forward),
            (needs.gate, needs.attention),
        );
        let Some(dh) = self
            .feed_forward()
            .backward(context, dy, kept, wanted, gradients)?
        else {
            return Ok(None);
        };
        drop(h);
        let dx1 = self.post_attention_layernorm.backward(
            context,
            &dh,
            &saved.post_norm,
            Some(dy),
            gradients,
        )?;
        drop(dh);
        let o = (Some(saved.attention.output()), &saved.o);
        let Some(d_mixed) = l
            .o_proj
            .backward(context, &dx1, o, (needs.qkv, None), gradients)?
        else {
            return Ok(None);
        };
        let (dq, dk, dv) =
            self.attention
                .backward(context, &d_mixed, &saved.attention, pass.segments)?;
        drop(d_mixed);
        let rotated = (dq, dk);
        let (dq, dk) = (
            pass.rope.backward(context, &rotated.0)?,
            pass.rope.backward(context, &rotated.1)?,
        );
        drop(rotated);
        let h = again(
            &self.input_layernorm,
            &saved.norm,
            trains.q_proj || trains.k_proj || trains.v_proj,
        )?;
        let input = |dy: Tensor| LinearInput::new(context, dy);
        let (dq, dk, dv) = (input(dq)?, input(dk)?, input(dv)?);
        let [q, k, v] = &saved.qkv;
        let branches = [
            Branch {
                linear: &l.q_proj,
                dy: &dq,
                saved: q,
            },
            Branch {
                linear: &l.k_proj,
                dy: &dk,
                saved: k,
            },
            Branch {
                linear: &l.v_proj,
                dy: &dv,
                saved: v,
            },
        ];
        let Some(dh) = backward_shared_input(
            context,
            &branches,
            h.as_ref(),
            (needs.input, None),
            gradients,
        )?
        else {
            return Ok(None);
        };
        Ok(Some(self.input_layernorm.backward(
            context,
            &dh,
            &saved.norm,
            Some(&dx1),
            gradients,
        )?))
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
        linear.forward_input(pass.context, x, self.mask(pass, linear, name, x), base)
    }

    /// What dropout leaves of a layer's adapter's input, where there is any.
    fn mask(
        &self,
        pass: Pass<'_>,
        linear: &Linear,
        name: &str,
        x: &LinearInput,
    ) -> Option<DropoutMask> {
        let dropout = pass.dropout.filter(|_| linear.lora.is_some())?;
        let (ranges, path, (rows, width)) = (
            pass.segments.ranges(),
            format!("{}.{name}", self.path),
            x.shape(),
        );
        let stream = |example: &u64| {
            random::stream(
                dropout.seed,
                Purpose::Dropout,
                &[dropout.step, *example],
                &path,
            )
        };
        let streams: Vec<_> = dropout.examples.iter().map(stream).collect();
        Some(DropoutMask::sample(
            (rows, width),
            dropout.p,
            |row, numbers| {
                let segment = ranges.partition_point(|range| range.end <= row);
                let mut stream = streams[segment].clone();
                stream.set_word_pos(((row - ranges[segment].start) * width) as u128);
                numbers
                    .iter_mut()
                    .for_each(|number| *number = stream.next_u32());
            },
        ))
    }
}

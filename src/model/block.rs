//! One transformer block, forward and backward: `x1 = x + o(attention(norm x))`,
//! `y = x1 + down(f(gate) up)(norm x1)`, or of `norm x` in a parallel block. The activation f, which
//! norms there are, and on q and k too, are the architecture's data.

use candle_core::{DType, Tensor};

use super::backward::BackwardNeeds;
use super::kv_cache::KvCache;
use super::linears::Linears;
use super::residual::ResidualBranch;
use crate::error::{Error, Kind, Result};
use crate::ops::{
    Activation, Attention, AttentionSaved, BackwardDepth, Branch, Context, DropoutMask, Experts,
    ExpertsSaved, FeedForward, FeedForwardSaved, Gradients, InputGradient, Linear, LinearInput,
    LinearSaved, Norm, NormSaved, RopeTables, Segments, StreamRows, backward_shared_input,
    join_columns, split_columns,
};
use crate::random::{self, Purpose};

/// A block's weights.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) attention_branch: ResidualBranch,
    pub(super) mlp_branch: ResidualBranch,
    /// On q, or each of its heads, before the rotation.
    pub(super) q_norm: Option<Norm>,
    /// On k, or each of its heads, before the rotation.
    pub(super) k_norm: Option<Norm>,
    /// Whether these norms follow the rotation.
    pub(super) norms_rotated_qk: bool,
    /// Its rotation among those of the pass, if it has one.
    pub(super) rope: Option<usize>,
    pub(super) linears: Linears<Linear>,
    /// In place of the MLP's linear layers.
    pub(super) experts: Option<Experts>,
    /// Paths of the linear layers, as `model.layers.N.self_attn.q_proj`.
    pub(super) paths: Linears<String>,
    /// As the architecture's.
    pub(super) qkv_groups: usize,
    pub(super) parallel: bool,
    pub(super) gated_mlp: bool,
    pub(super) attention: Attention,
    pub(super) activation: Activation,
}

/// LoRA dropout of one step. A mask is a function of (seed, step, example, module), so
/// recomputation, a resumed run and another batching draw the same one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Dropout {
    /// Probability that an element is dropped.
    pub p: f64,
    /// The recipe's seed.
    pub seed: u64,
    /// The optimizer step, from 0.
    pub step: u64,
}

/// Inputs of a pass that all blocks share.
pub(super) struct Pass<'a> {
    pub(super) context: Context<'a>,
    pub(super) segments: &'a Segments,
    /// Example of each segment; used by dropout only.
    pub(super) examples: &'a [u64],
    /// Rotations of keys.
    pub(super) ropes: Vec<RopeTables>,
    /// Rotations of queries, with their factors by position.
    pub(super) query_ropes: Vec<RopeTables>,
    pub(super) dropout: Option<Dropout>,
}

/// Everything that a block's forward pass saves for its backward pass.
pub(super) struct BlockSaved {
    qkv: QkvSaved,
    attention: AttentionSaved,
    output: OutputSaved,
}

/// Saved by [`Block::qkv`] for the backward pass.
struct QkvSaved {
    input: NormSaved,
    linears: Vec<LinearSaved>,
    q_norm: Option<NormSaved>,
    k_norm: Option<NormSaved>,
}

/// Saved by [`Block::output`] for the backward pass.
struct OutputSaved {
    o: LinearSaved,
    attention_output: Option<NormSaved>,
    input: NormSaved,
    mlp: MlpSaved,
    mlp_output: Option<NormSaved>,
}

/// Saved by [`Block::mlp`] for the backward pass.
enum MlpSaved {
    Dense(FeedForwardSaved),
    Experts(ExpertsSaved),
}

impl BlockSaved {
    /// The rotated keys and the values (N, Hkv D), for a KV cache.
    pub(super) fn keys_and_values(&self) -> Result<(Tensor, Tensor)> {
        self.attention.keys_and_values()
    }
}

impl Block {
    /// x (N, C) -> y (N, C). Here and in `backward` tensors are dropped as early as possible, which
    /// lowers the peak memory of a step.
    pub(super) fn forward(&self, pass: &Pass<'_>, x: &Tensor) -> Result<(Tensor, BlockSaved)> {
        let ([q, k, v], qkv) = self.qkv(pass, x)?;
        let (attn_output, attention) =
            self.attention
                .forward(pass.context, q, k, v, pass.segments)?;
        let gate_gradients = self.needs(false).gate;
        let (y, output) = self.output(pass, x, attn_output, gate_gradients)?;
        let saved = BlockSaved {
            qkv,
            attention,
            output,
        };
        Ok((y, saved))
    }

    /// x (1, C) of one token that follows those in `cache` -> y (1, C). Saves nothing for a
    /// backward pass.
    pub(super) fn decode(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let ([q, k, v], _) = self.qkv(pass, x)?;
        // The cache is f32, whatever the compute type.
        let q = q.to_dtype(DType::F32)?;
        let (keys, values) = cache.append(&k.to_dtype(DType::F32)?, &v)?;
        let attn_output = self.attention.decode(pass.context, &q, &keys, &values)?;
        Ok(self.output(pass, x, attn_output, false)?.0)
    }

    /// x (N, C) -> q (N, Hq D) and k (N, Hkv D), both rotated, and v (N, Hkv D).
    fn qkv(&self, pass: &Pass<'_>, x: &Tensor) -> Result<([Tensor; 3], QkvSaved)> {
        let (h, input) = self.attention_branch.input(pass.context, x)?;
        let ([q, k, v], linears) = self.project_qkv(pass, &h)?;
        drop(h);
        let rotated = |x: Tensor, tables: &[RopeTables]| match self.rope {
            Some(rope) => tables[rope].forward(pass.context, &x),
            None => Ok(x),
        };
        let normed_and_rotated = |x, norm: &Option<Norm>, tables| {
            if self.norms_rotated_qk {
                let x = rotated(x, tables)?;
                return forward_groups(pass, norm.as_ref(), x);
            }
            let (x, saved) = forward_groups(pass, norm.as_ref(), x)?;
            Ok((rotated(x, tables)?, saved))
        };
        let (rotated_q, q_norm) = normed_and_rotated(q, &self.q_norm, &pass.query_ropes)?;
        let (rotated_k, k_norm) = normed_and_rotated(k, &self.k_norm, &pass.ropes)?;
        let saved = QkvSaved {
            input,
            linears,
            q_norm,
            k_norm,
        };
        Ok(([rotated_q, rotated_k, v], saved))
    }

    /// h (N, C) -> q (N, Hq D), k and v (N, Hkv D).
    fn project_qkv(
        &self,
        pass: &Pass<'_>,
        h: &LinearInput,
    ) -> Result<([Tensor; 3], Vec<LinearSaved>)> {
        let (mut outputs, mut saved) = (Vec::new(), Vec::new());
        for (linear, path) in self.linears.qkv.iter().zip(&self.paths.qkv) {
            let (y, of_linear) = self.linear(pass, linear, path, h, None)?;
            outputs.push(y);
            saved.push(of_linear);
        }
        if let [fused] = outputs.as_slice() {
            let Attention {
                heads,
                kv_heads,
                head_dim,
                ..
            } = self.attention;
            let widths =
                [heads, kv_heads, kv_heads].map(|heads| heads * head_dim / self.qkv_groups);
            outputs = split_columns(pass.context, fused, self.qkv_groups, &widths)?;
        }
        let outputs = outputs.try_into().map_err(|_| {
            Error::new(
                Kind::Model,
                "q, k and v are the output of one layer or of three",
            )
        })?;
        Ok((outputs, saved))
    }

    /// The block's input x (N, C) and the attention's output (N, Hq D) -> y (N, C).
    /// `gate_gradients`: whether the backward pass, if any, computes the gradients of gate and up.
    fn output(
        &self,
        pass: &Pass<'_>,
        x: &Tensor,
        attn_output: Tensor,
        gate_gradients: bool,
    ) -> Result<(Tensor, OutputSaved)> {
        let (o, path) = (&self.linears.o, &self.paths.o);
        let attn_output = LinearInput::new(pass.context, attn_output)?;
        let (attention, mlp) = (&self.attention_branch, &self.mlp_branch);
        let base = attention.base(x);
        let (y, o) = self.linear(pass, o, path, &attn_output, base)?;
        drop(attn_output);
        let (x1, attention_output) = attention.add(pass.context, x, y)?;
        let mlp_input = if self.parallel { x } else { &x1 };
        let (h, input) = mlp.input(pass.context, mlp_input)?;
        let (y, of_mlp) = self.mlp(pass, h, mlp.base(&x1), gate_gradients)?;
        let (y, mlp_output) = mlp.add(pass.context, &x1, y)?;
        let saved = OutputSaved {
            o,
            attention_output,
            input,
            mlp: of_mlp,
            mlp_output,
        };
        Ok((y, saved))
    }

    /// h (N, C) -> the result of the MLP or the experts (N, C), added to `base` if given.
    fn mlp(
        &self,
        pass: &Pass<'_>,
        h: LinearInput,
        base: Option<&Tensor>,
        gate_gradients: bool,
    ) -> Result<(Tensor, MlpSaved)> {
        let (context, l, paths) = (pass.context, &self.linears, &self.paths);
        if let Some(experts) = &self.experts {
            let (y, saved) = experts.forward(context, &h, base)?;
            return Ok((y, MlpSaved::Experts(saved)));
        }
        let mlp = l.gate_up.iter().zip(&paths.gate_up);
        let mlp: Vec<_> = mlp.chain(l.down.iter().zip(&paths.down)).collect();
        let masks = |index: usize, x: &LinearInput| {
            let (linear, path) = mlp.get(index)?;
            pass.mask(linear, path, x)
        };
        let adapted = mlp.iter().any(|(linear, _)| linear.lora.is_some());
        let masked = pass.dropout.is_some() && adapted;
        let dropout = masked.then_some(&masks as _);
        let layers = self.feed_forward()?;
        let (y, saved) = layers.forward(context, h, dropout, base, gate_gradients)?;
        Ok((y, MlpSaved::Dense(saved)))
    }

    fn feed_forward(&self) -> Result<FeedForward<'_>> {
        let l = &self.linears;
        let missing = || Error::new(Kind::Model, "a block without experts has an MLP");
        Ok(FeedForward {
            activation: self.activation,
            gated: self.gated_mlp,
            gate_up: &l.gate_up,
            down: l.down.as_ref().ok_or_else(missing)?,
        })
    }

    /// The gradients to compute; a trained norm needs all of them.
    fn needs(&self, input_gradient: bool) -> BackwardNeeds {
        let branches = [&self.attention_branch, &self.mlp_branch];
        let mut qk_norms = [&self.q_norm, &self.k_norm].into_iter().flatten();
        let norm = branches.iter().any(|branch| branch.is_trained())
            || qk_norms.any(|norm| norm.is_trained());
        let mut linears = self.linears.map(Linear::is_trained);
        // Experts take the place of gate and up.
        linears
            .gate_up
            .extend(self.experts.as_ref().map(Experts::is_trained));
        BackwardNeeds::new(&linears, input_gradient || norm, self.parallel)
    }

    /// dy (N, C) -> dx (N, C) if `input_gradient` or a norm is trained; adds the gradients of
    /// trained weights. Ends as soon as no earlier layer is trained.
    pub(super) fn backward(
        &self,
        pass: &Pass<'_>,
        dy: &Tensor,
        saved: &BlockSaved,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let needs = self.needs(input_gradient);
        let below_mlp = self.feed_forward_backward(pass, dy, &saved.output, needs, gradients)?;
        // What attention's output is added to: in a parallel block y itself.
        let d_sum = if self.parallel {
            Some(dy)
        } else {
            below_mlp.as_ref()
        };
        let Some(d_sum) = d_sum.filter(|_| needs.attention) else {
            return Ok(None);
        };
        let branch = &self.attention_branch;
        let normed = saved.output.attention_output.as_ref();
        let sum = branch.output_backward(pass.context, d_sum, normed, gradients)?;
        let residual = if self.parallel {
            below_mlp
        } else {
            drop(below_mlp);
            Some(sum.residual)
        };
        let Some(d_qkv) = self.attention_backward(pass, sum.layers, saved, needs, gradients)?
        else {
            return Ok(None);
        };
        self.qkv_backward(pass, d_qkv, residual.as_ref(), &saved.qkv, needs, gradients)
    }

    /// dy (N, C) -> dy plus the gradient of the MLP's input (N, C), where that is needed.
    fn feed_forward_backward(
        &self,
        pass: &Pass<'_>,
        dy: &Tensor,
        saved: &OutputSaved,
        needs: BackwardNeeds,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let (context, branch) = (pass.context, &self.mlp_branch);
        let h = branch.recompute_input(context, &saved.input, needs.mlp_input)?;
        let sum = branch.output_backward(context, dy, saved.mlp_output.as_ref(), gradients)?;
        let depth = if needs.mlp_input_gradient {
            BackwardDepth::Input
        } else if needs.gate {
            BackwardDepth::Weights
        } else {
            BackwardDepth::Down
        };
        let (dy, h_saved) = (&sum.layers, h.as_ref());
        let dh = match (&saved.mlp, &self.experts) {
            (MlpSaved::Dense(saved), _) => {
                let layers = self.feed_forward()?;
                layers.backward(context, dy, h_saved, saved, depth, gradients)?
            }
            (MlpSaved::Experts(saved), Some(experts)) if needs.gate => {
                let input = depth == BackwardDepth::Input;
                experts.backward(context, dy, h_saved, saved, input, gradients)?
            }
            (MlpSaved::Experts(_), _) => None,
        };
        drop((h, sum.layers));
        dh.map(|dh| branch.input_backward(context, &dh, &saved.input, &sum.residual, gradients))
            .transpose()
    }

    /// The gradient of the output of `o_proj` (N, C) -> the gradients of q, k (before the rotation)
    /// and v; `None` if nothing before `o_proj` is trained.
    fn attention_backward(
        &self,
        pass: &Pass<'_>,
        d_output: Tensor,
        saved: &BlockSaved,
        needs: BackwardNeeds,
        gradients: &mut Gradients,
    ) -> Result<Option<[Tensor; 3]>> {
        let context = pass.context;
        let d_attn_output = self.linears.o.backward(
            context,
            &d_output,
            Some(saved.attention.output()),
            &saved.output.o,
            InputGradient::when(needs.qkv),
            gradients,
        )?;
        drop(d_output);
        let Some(d_attn_output) = d_attn_output else {
            return Ok(None);
        };
        let (dq, dk, dv) =
            self.attention
                .backward(context, &d_attn_output, &saved.attention, pass.segments)?;
        drop(d_attn_output);
        let rotated_back = |dy: Tensor, tables: &[RopeTables], context| match self.rope {
            Some(rope) => tables[rope].backward(context, &dy),
            None => Ok(dy),
        };
        let before_norm = |dy, tables, norm: Option<&Norm>, saved, gradients: &mut Gradients| {
            let Some((norm, saved)) = norm.zip(saved) else {
                return rotated_back(dy, tables, context);
            };
            if self.norms_rotated_qk {
                let dy = dy.to_dtype(DType::F32)?;
                let dy = norm.backward_groups(context, &dy, saved, gradients)?;
                return rotated_back(dy, tables, context);
            }
            // The norm's backward pass takes f32.
            let dy = rotated_back(dy, tables, context.in_f32())?;
            norm.backward_groups(context, &dy, saved, gradients)
        };
        let QkvSaved { q_norm, k_norm, .. } = &saved.qkv;
        let [of_q, of_k] = [self.q_norm.as_ref(), self.k_norm.as_ref()];
        let dq = before_norm(dq, &pass.query_ropes, of_q, q_norm.as_ref(), gradients)?;
        let dk = before_norm(dk, &pass.ropes, of_k, k_norm.as_ref(), gradients)?;
        Ok(Some([dq, dk, dv]))
    }

    /// The gradients of q, k and v, and of the block's input by all other ways (N, C) -> dx (N, C).
    fn qkv_backward(
        &self,
        pass: &Pass<'_>,
        [dq, dk, dv]: [Tensor; 3],
        residual: Option<&Tensor>,
        saved: &QkvSaved,
        needs: BackwardNeeds,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let context = pass.context;
        let branch = &self.attention_branch;
        let h = branch.recompute_input(context, &saved.input, needs.qkv_input)?;
        let mut d_outputs = vec![dq, dk, dv];
        if self.linears.qkv.len() == 1 {
            d_outputs = vec![join_columns(context, &d_outputs, self.qkv_groups)?];
        }
        let inputs = d_outputs
            .into_iter()
            .map(|dy| LinearInput::new(context, dy));
        let d_outputs = inputs.collect::<Result<Vec<_>>>()?;
        let layers = self.linears.qkv.iter().zip(&d_outputs).zip(&saved.linears);
        let layers: Vec<_> = layers
            .map(|((linear, dy), saved)| Branch { linear, dy, saved })
            .collect();
        let wanted = InputGradient::when(needs.input);
        let dh = backward_shared_input(context, &layers, h.as_ref(), wanted, gradients)?;
        dh.zip(residual)
            .map(|(dh, residual)| {
                branch.input_backward(context, &dh, &saved.input, residual, gradients)
            })
            .transpose()
    }

    /// One linear layer with dropout on its adapter's input, added to `base` if there is one.
    fn linear(
        &self,
        pass: &Pass<'_>,
        linear: &Linear,
        path: &str,
        x: &LinearInput,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, LinearSaved)> {
        let mask = pass.mask(linear, path, x);
        linear.forward_input(pass.context, x, mask, base)
    }
}

impl Pass<'_> {
    /// The dropout mask of the adapter's input x (N, in), if it has an adapter and the pass has
    /// dropout.
    pub(super) fn mask(&self, linear: &Linear, path: &str, x: &LinearInput) -> Option<DropoutMask> {
        let masked = self.dropout.is_some() && linear.lora.is_some();
        masked.then(|| self.mask_at(path, x.shape(), |row| row))
    }

    /// The dropout mask of the input (rows, width) of the adapter on the layer `path`; `position`
    /// returns the token of a row. Without dropout nothing is dropped.
    pub(super) fn mask_at(
        &self,
        path: &str,
        (rows, width): (usize, usize),
        position: impl Fn(usize) -> usize,
    ) -> DropoutMask {
        let dropout = self.dropout.unwrap_or_default();
        let ranges = self.segments.ranges();
        let stream = |example: &u64| {
            let key = [dropout.step, *example];
            random::stream(dropout.seed, Purpose::Dropout, &key, path)
        };
        let (mut segments, mut tokens) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for token in (0..rows).map(position) {
            let segment = ranges.partition_point(|range| range.end <= token);
            segments.push(segment as u32);
            tokens.push((token - ranges[segment].start) as u32);
        }
        let rows_of_bits = StreamRows {
            streams: self.examples.iter().map(stream).collect(),
            segments,
            tokens,
        };
        DropoutMask::from_streams((rows, width), dropout.p, rows_of_bits)
    }
}

/// x (N, H D) -> x normalised by `norm`, if there is one.
fn forward_groups(
    pass: &Pass<'_>,
    norm: Option<&Norm>,
    x: Tensor,
) -> Result<(Tensor, Option<NormSaved>)> {
    let Some(norm) = norm else {
        return Ok((x, None));
    };
    let (y, saved) = norm.forward_groups(pass.context, &x)?;
    Ok((y, Some(saved)))
}

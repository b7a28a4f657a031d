//! The decoder: embedding, blocks, norm, head; losses, and gradients by visiting the blocks in
//! reverse.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use candle_core::{Device, Tensor};

use super::architecture::{Architecture, LinearSpec};
use super::backward::BackwardRange;
use super::batch::Batch;
use super::block::{Block, BlockSaved, Dropout, Pass};
use super::cost::{ModelShape, Recompute, TrainedNames, gather_cost, scatter_cost};
use super::kv_cache::KvCache;
use super::residual::{BranchNorms, ResidualBranch};
use crate::error::{Error, Result};
use crate::ops::{
    Context, Gradients, Linear, LmHead, Lora, LoraShape, Norm, Rope, RopeTables, Segments, Weight,
    embedding, embedding_backward, gather_rows, lora_embedding, lora_embedding_backward, par_map,
    scale, scatter_rows,
};
use crate::work::{Precision, Work, WorkCounter};

/// Where a decoder's tensors come from.
pub struct WeightSource<'a> {
    /// Whether the output embedding is the input embedding's tensor.
    pub tied: bool,
    /// A weight, frozen or trained, by its tensor's name and shape.
    pub weight: &'a dyn Fn(&str, &[usize]) -> Result<Weight>,
    /// The adapter on a linear layer, if it is a target, by the layer's path.
    pub lora: &'a dyn Fn(&str) -> Result<Option<Lora>>,
}

/// Builds the layers of a decoder from their tensors.
struct Builder<'a> {
    architecture: &'a Architecture,
    source: &'a WeightSource<'a>,
    /// Whether weights stay packed for products.
    keep_packed: bool,
    /// The tensors that are trained, so far.
    trained: RefCell<BTreeSet<String>>,
    /// The adapters by path, so far.
    adapters: RefCell<BTreeMap<String, LoraShape>>,
}

impl Builder<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let weight = (self.source.weight)(name, shape)?;
        if weight.is_trained() {
            self.trained.borrow_mut().insert(name.to_string());
        }
        Ok(weight)
    }

    fn lora(&self, path: &str) -> Result<Option<Lora>> {
        let lora = (self.source.lora)(path)?;
        if let Some(lora) = &lora {
            let shape = lora.shape()?;
            self.adapters.borrow_mut().insert(path.to_string(), shape);
        }
        Ok(lora)
    }

    /// What is trained of the tensors built so far.
    fn shape(&self) -> ModelShape {
        let (trained, adapters) = (self.trained.borrow(), self.adapters.borrow());
        let trained = TrainedNames {
            lora: &|path| adapters.get(path).copied(),
            weight: &|name| trained.contains(name),
            tied: self.source.tied,
        };
        ModelShape::new(self.architecture, &trained, false, Precision::F32)
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight> {
        let weight = self.weight(name, &shape)?;
        Ok(if self.keep_packed {
            weight.with_packed_cache()
        } else {
            weight
        })
    }

    /// The embedding or the head.
    fn vocabulary_matrix(&self, name: &str) -> Result<Weight> {
        let a = self.architecture;
        self.matrix(name, [a.vocab_size, a.hidden_size])
    }

    /// The norm of rows of `width` elements.
    fn norm(&self, name: &str, width: usize) -> Result<Norm> {
        let a = self.architecture;
        let tensor = |part| self.weight(&format!("{name}.{part}"), &[width]);
        Ok(Norm {
            kind: a.norm_kind,
            weight: tensor("weight")?,
            bias: a.biases.norm.then(|| tensor("bias")).transpose()?,
            unit_offset: a.norm_unit_offset,
            eps: a.norm_eps,
            factor: 1.0,
        })
    }

    fn linear(&self, block: &str, spec: &LinearSpec) -> Result<Linear> {
        let path = format!("{block}.{}", spec.name);
        let shape = [spec.out_features, spec.in_features];
        let bias = spec
            .bias
            .then(|| self.weight(&format!("{path}.bias"), &[spec.out_features]))
            .transpose()?;
        Ok(Linear {
            weight: self.matrix(&format!("{path}.weight"), shape)?,
            bias,
            lora: self.lora(&path)?,
        })
    }

    fn block(&self, layer: usize) -> Result<Block> {
        let a = self.architecture;
        let path = a.names.block_path(layer);
        let linears = a.linears();
        let norm = |name: Option<&str>, width: usize| {
            name.map(|name| self.norm(&format!("{path}.{name}"), width))
                .transpose()
        };
        let branch = |norms: BranchNorms| {
            Ok::<_, Error>(ResidualBranch {
                input_norm: norm(norms.input, a.hidden_size)?,
                output_norm: norm(norms.output, a.hidden_size)?,
                factor: a.residual_factor,
            })
        };
        let [q_width, k_width] = a.qk_norm_widths().unwrap_or_default();
        Ok(Block {
            attention_branch: branch(a.attention_norms)?,
            mlp_branch: branch(a.mlp_norms)?,
            q_norm: norm(a.qk_norm.map(|_| "self_attn.q_norm"), q_width)?,
            k_norm: norm(a.qk_norm.map(|_| "self_attn.k_norm"), k_width)?,
            rope: a.layers[layer].rope,
            linears: linears.try_map(|spec| self.linear(&path, spec))?,
            paths: linears.map(|spec| format!("{path}.{}", spec.name)),
            qkv_groups: a.qkv_groups,
            parallel: a.parallel,
            gated_mlp: a.gated_mlp,
            attention: a.attention(layer),
            activation: a.activation,
        })
    }
}

/// A model ready to compute.
#[derive(Debug)]
pub struct Decoder {
    architecture: Architecture,
    embed_tokens: Weight,
    embed_lora: Option<Lora>,
    blocks: Vec<Block>,
    norm: Norm,
    head: LmHead,
    device: Device,
    /// Whether threads take shards of a batch.
    data_parallel: bool,
    /// What is trained.
    shape: ModelShape,
    backward: BackwardRange,
}

/// Options of a forward and backward pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BackwardOptions {
    /// Factor on the sum of losses whose gradients are computed.
    pub scale: f64,
    /// Activation checkpointing.
    pub recompute: Recompute,
    /// LoRA dropout.
    pub dropout: Option<Dropout>,
}

/// What is saved of a block's forward pass.
enum SavedActivations {
    /// No backward pass: nothing at or below the block is trained.
    Nothing,
    /// All activations.
    All(Box<BlockSaved>),
    /// The block's input (N, C): its forward pass runs again (activation checkpointing).
    Input(Tensor),
}

impl Decoder {
    /// Builds a decoder from its tensors.
    pub fn assemble(
        architecture: &Architecture,
        source: &WeightSource<'_>,
        device: &Device,
    ) -> Result<Self> {
        let data_parallel = device.is_cpu() && architecture.is_small();
        let builder = Builder {
            architecture,
            source,
            keep_packed: data_parallel,
            trained: RefCell::default(),
            adapters: RefCell::default(),
        };
        let [lm_head, embed_tokens] = architecture.tied_tensors();
        let embed_tokens = builder.vocabulary_matrix(&embed_tokens)?;
        let blocks = (0..architecture.num_hidden_layers)
            .map(|layer| builder.block(layer))
            .collect::<Result<Vec<_>>>()?;
        let weight = if source.tied {
            embed_tokens.clone()
        } else {
            builder.vocabulary_matrix(&lm_head)?
        };
        let names = &architecture.names;
        let norm = builder.norm(&names.norm_path(), architecture.hidden_size)?;
        let head = LmHead {
            weight,
            softcap: architecture.logits_softcap,
            lora: builder.lora(names.lm_head)?,
        };
        let embed_lora = builder.lora(&names.embed_tokens_path())?;
        let shape = builder.shape();
        Ok(Self {
            backward: shape.backward_range(),
            shape,
            architecture: architecture.clone(),
            norm: Norm {
                factor: architecture.logits_factor,
                ..norm
            },
            head,
            embed_tokens,
            embed_lora,
            blocks,
            device: device.clone(),
            data_parallel,
        })
    }

    /// The architecture it was built from.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The device it computes on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Prepares a pass over `segments`, each from position 0; `examples`, one for each segment, key
    /// the masks of `dropout`.
    pub(super) fn pass<'p>(
        &self,
        context: Context<'p>,
        segments: &'p Segments,
        examples: &'p [u64],
        dropout: Option<Dropout>,
    ) -> Result<Pass<'p>> {
        let ropes = self.rope_tables(|rope| rope.tables(segments, &self.device))?;
        let positions = || segments.ranges().iter().flat_map(|range| 0..range.len());
        Ok(Pass {
            context,
            segments,
            examples,
            query_ropes: self.query_tables(&ropes, positions)?,
            ropes,
            dropout,
        })
    }

    fn rope_tables(&self, tables: impl Fn(&Rope) -> Result<RopeTables>) -> Result<Vec<RopeTables>> {
        self.architecture.ropes.iter().map(tables).collect()
    }

    /// The tables of queries at `positions`, from those of keys.
    fn query_tables<P: Iterator<Item = usize>>(
        &self,
        keys: &[RopeTables],
        positions: impl Fn() -> P,
    ) -> Result<Vec<RopeTables>> {
        let Some(scaling) = self.architecture.query_scaling else {
            return Ok(keys.to_vec());
        };
        let tables = |keys| scaling.query_tables(keys, positions());
        keys.iter().map(tables).collect()
    }

    /// ids (N) -> (N, C).
    fn embed(&self, context: Context<'_>, ids: &Tensor) -> Result<Tensor> {
        let mut x = embedding(context, ids, &self.embed_tokens)?;
        if let Some(lora) = &self.embed_lora {
            x = lora_embedding(context, ids, &x, lora)?;
        }
        let factor = self.architecture.embedding_factor(context.precision);
        scale(context, &x, factor)
    }

    /// Embeds `ids` (N) and runs all blocks; `visit` receives each block's number, its input (N, C)
    /// and what it saved for a backward pass. Returns the last block's output (N, C).
    pub(super) fn run_blocks(
        &self,
        pass: &Pass<'_>,
        ids: &Tensor,
        mut visit: impl FnMut(usize, Tensor, BlockSaved) -> Result<()>,
    ) -> Result<Tensor> {
        let mut x = self.embed(pass.context, ids)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(pass, &x)?;
            visit(layer, std::mem::replace(&mut x, y), saved)?;
        }
        Ok(x)
    }

    /// Runs all blocks on one token that follows the `position` earlier ones in `cache`; returns
    /// (1, C).
    pub(super) fn decode_token(
        &self,
        context: Context<'_>,
        token: u32,
        position: usize,
        cache: &mut [KvCache],
    ) -> Result<Tensor> {
        let segments = Segments::from_lengths([1]);
        let tables = |rope: &Rope| rope.tables_from(position, 1, &self.device);
        let ropes = self.rope_tables(tables)?;
        let pass = Pass {
            context,
            segments: &segments,
            examples: &[],
            query_ropes: self.query_tables(&ropes, || std::iter::once(position))?,
            ropes,
            dropout: None,
        };
        let ids = Tensor::from_slice(&[token], 1, &self.device)?;
        let mut x = self.embed(context, &ids)?;
        for (block, cache) in self.blocks.iter().zip(cache) {
            x = block.decode(&pass, &x, cache)?;
        }
        Ok(x)
    }

    /// x (N, C) -> logits (N, V).
    pub(super) fn head_logits(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        self.head.logits(context, &self.norm.forward(context, x)?.0)
    }

    /// Logits (N, V) of every token, for tests and small inputs.
    pub fn logits(&self, context: Context<'_>, batch: &Batch) -> Result<Tensor> {
        let pass = self.pass(context, &batch.segments, &batch.examples, None)?;
        let x = self.run_blocks(&pass, &batch.ids, |_, _, _| Ok(()))?;
        self.head_logits(context, &x)
    }

    /// The loss of each target in nats; saves nothing for a backward pass.
    pub fn losses(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<f32>> {
        batch.check(self.architecture.vocab_size)?;
        let shards = self.shards(context, batch)?;
        if shards.is_empty() {
            return self.shard_losses(context, batch);
        }
        let work = self
            .shape
            .with_pass(context.precision, false)
            .evaluation(&batch.lengths(), batch.loss_tokens());
        let losses = data_parallel(context, &shards, work, |context, shard| {
            self.shard_losses(context, shard)
        })?;
        Ok(losses.concat())
    }

    fn shard_losses(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<f32>> {
        let pass = self.pass(context, &batch.segments, &batch.examples, None)?;
        let x = self.run_blocks(&pass, &batch.ids, |_, _, _| Ok(()))?;
        let selected = self.gather_loss_rows(context, &x, batch)?;
        let (h, _) = self.norm.forward(context, &selected)?;
        self.head.forward(context, &h, &batch.targets)
    }

    /// The loss of each target in nats; adds the gradients of `options.scale * sum of losses` to
    /// `gradients`.
    pub fn losses_and_gradients(
        &self,
        context: Context<'_>,
        batch: &Batch,
        options: BackwardOptions,
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        batch.check(self.architecture.vocab_size)?;
        let shards = self.shards(context, batch)?;
        if shards.is_empty() {
            return self.forward_backward(context, batch, options, gradients);
        }
        let dropout = options.dropout.is_some();
        let shape = self.shape.with_pass(context.precision, dropout);
        let work = shape.training(&batch.lengths(), batch.loss_tokens(), options.recompute);
        let results = data_parallel(context, &shards, work, |context, shard| {
            let mut gradients = gradients.empty_like();
            let losses = self.forward_backward(context, shard, options, &mut gradients)?;
            Ok((losses, gradients))
        })?;
        let mut losses = Vec::with_capacity(batch.loss_tokens());
        for (shard_losses, shard_gradients) in results {
            losses.extend(shard_losses);
            gradients.merge(shard_gradients)?;
        }
        Ok(losses)
    }

    /// Splits a batch for data parallelism; empty if not split. Not split if a shard would have no
    /// loss token: it would have no backward pass, and the work would differ from the whole
    /// batch's; nor with DoRA, whose norms every shard would compute.
    fn shards(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<Batch>> {
        if !self.data_parallel || context.reference || self.shape.has_magnitudes() {
            return Ok(Vec::new());
        }
        let mut shards = batch.split()?;
        if shards.len() == 1 || shards.iter().any(|shard| shard.loss_tokens() == 0) {
            shards.clear();
        }
        Ok(shards)
    }

    fn forward_backward(
        &self,
        context: Context<'_>,
        batch: &Batch,
        options: BackwardOptions,
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let pass = self.pass(context, &batch.segments, &batch.examples, options.dropout)?;
        let (x, saved) = self.forward_saving(&pass, &batch.ids, options.recompute)?;
        let tokens = x.dim(0)?;
        let selected = self.gather_loss_rows(context, &x, batch)?;
        drop(x);
        let (h, norm) = self.norm.forward(context, &selected)?;
        let below_head = !self.backward.is_empty() || self.norm.is_trained();
        let positions: Vec<u32> = match &self.head.lora {
            Some(_) => batch.loss_positions.to_vec1()?,
            None => Vec::new(),
        };
        let masks = |rows: Range<usize>| {
            let positions = &positions[rows];
            let shape = (positions.len(), self.architecture.hidden_size);
            pass.mask(self.architecture.names.lm_head, shape, |row| {
                positions[row] as usize
            })
        };
        let masked = pass.dropout.is_some() && self.head.lora.is_some();
        let (losses, dh) = self.head.forward_backward_masked(
            context,
            &h,
            &batch.targets,
            options.scale,
            below_head,
            masked.then_some(&masks as _),
            gradients,
        )?;
        if let Some(dh) = dh {
            let dx = self.norm.backward(context, &dh, &norm, None, gradients)?;
            drop((selected, h, norm, dh));
            if self.backward.is_empty() {
                return Ok(losses);
            }
            let dx = self.scatter_loss_rows(context, &dx, batch, tokens)?;
            self.backward_blocks(&pass, dx, saved, &batch.ids, gradients)?;
        }
        Ok(losses)
    }

    /// Runs all blocks; returns the last one's output (N, C), and what is saved of each block.
    fn forward_saving(
        &self,
        pass: &Pass<'_>,
        ids: &Tensor,
        recompute: Recompute,
    ) -> Result<(Tensor, Vec<SavedActivations>)> {
        let visited = self.backward.visited();
        let recomputed = visited.start + recompute.count(visited.len());
        let mut activations = Vec::with_capacity(self.blocks.len());
        let x = self.run_blocks(pass, ids, |layer, input, saved| {
            activations.push(if layer < visited.start {
                SavedActivations::Nothing
            } else if layer < recomputed {
                SavedActivations::Input(input)
            } else {
                SavedActivations::All(Box::new(saved))
            });
            Ok(())
        })?;
        Ok((x, activations))
    }

    /// dx (N, C) of the last block's output -> the gradients of everything trained below it.
    fn backward_blocks(
        &self,
        pass: &Pass<'_>,
        mut dx: Tensor,
        activations: Vec<SavedActivations>,
        ids: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        for (layer, activations) in activations.into_iter().enumerate().rev() {
            let block = &self.blocks[layer];
            let saved = match activations {
                SavedActivations::Nothing => break,
                SavedActivations::All(saved) => *saved,
                SavedActivations::Input(x) => block.forward(pass, &x)?.1,
            };
            let input_gradient = self.backward.needs_input_gradient(layer);
            match block.backward(pass, &dx, &saved, input_gradient, gradients)? {
                Some(below) => dx = below,
                None => return Ok(()),
            }
        }
        if self.backward.embedding {
            let factor = self.architecture.embedding_factor(pass.context.precision);
            let dx = scale(pass.context, &dx, factor)?;
            if self.embed_tokens.is_trained() {
                embedding_backward(pass.context, ids, &dx, &self.embed_tokens, gradients)?;
            }
            if let Some(lora) = &self.embed_lora {
                lora_embedding_backward(pass.context, ids, &dx, lora, gradients)?;
            }
        }
        Ok(())
    }

    /// The rows of x (N, C) that predict a target.
    fn gather_loss_rows(&self, context: Context<'_>, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (rows, width) = (batch.targets.len(), self.architecture.hidden_size);
        context.counter.add(gather_cost(rows, width));
        gather_rows(context, x, &batch.loss_positions)
    }

    /// The adjoint of `gather_loss_rows`: (T, C) -> (`tokens`, C), zero elsewhere.
    fn scatter_loss_rows(
        &self,
        context: Context<'_>,
        dx: &Tensor,
        batch: &Batch,
        tokens: usize,
    ) -> Result<Tensor> {
        let (rows, width) = (batch.targets.len(), self.architecture.hidden_size);
        context.counter.add(scatter_cost(tokens, rows, width));
        scatter_rows(context, dx, &batch.loss_positions, tokens)
    }
}

/// Runs `run` on each shard in parallel. Counts `work`, that of the whole batch, which does not
/// depend on the split.
fn data_parallel<T: Send>(
    context: Context<'_>,
    shards: &[Batch],
    work: Work,
    run: impl Fn(Context<'_>, &Batch) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let counter = WorkCounter::default();
    let uncounted = Context {
        counter: &counter,
        ..context
    };
    let results = par_map(shards.iter(), |shard| run(uncounted, shard))
        .into_iter()
        .collect();
    debug_assert_eq!(
        work.flops(),
        counter.take().flops(),
        "shards execute the products of the whole batch"
    );
    context.counter.add(work);
    results
}

//! The decoder: embedding, blocks, norm, head; losses, and gradients by walking the blocks backwards.

use candle_core::{Device, Tensor};

use super::architecture::Architecture;
use super::batch::Batch;
use super::block::{Block, BlockSaved, Dropout, Pass};
use super::cost::{ModelShape, Recompute, gather_cost, scatter_cost};
use super::linears::LINEAR_NAMES;
use crate::error::{Error, Result};
use crate::ops::{
    Context, Gradients, Linear, LmHead, Lora, RmsNorm, RopeTables, Segments, Weight, embedding,
    embedding_backward, gather_rows, par_map, scatter_rows,
};
use crate::work::{Precision, Work, WorkCounter};

/// Where a decoder's tensors come from: `weight` by a tensor's name and shape, `lora` by a linear layer's path.
pub struct WeightSource<'a> {
    /// A weight, frozen or trained.
    pub weight: &'a dyn Fn(&str, &[usize]) -> Result<Weight>,
    /// The adapter on a layer, if it is a target.
    pub lora: &'a dyn Fn(&str) -> Result<Option<Lora>>,
}

impl WeightSource<'_> {
    /// A matrix that products read; `keeps`: whether it keeps its packed forms.
    fn matrix(&self, name: &str, shape: &[usize; 2], keeps: bool) -> Result<Weight> {
        let weight = (self.weight)(name, shape)?;
        Ok(if keeps {
            weight.with_packed_cache()
        } else {
            weight
        })
    }
}

/// A model ready to compute.
#[derive(Debug)]
pub struct Decoder {
    architecture: Architecture,
    embed_tokens: Weight,
    pub(super) blocks: Vec<Block>,
    norm: RmsNorm,
    head: LmHead,
    device: Device,
    /// Whether threads take parts of a batch.
    data_parallel: bool,
    /// The first block whose backward pass runs, and whether its input gradient is wanted.
    first_trainable_layer: (usize, bool),
}

impl Decoder {
    /// Puts a decoder together from its parts.
    pub fn assemble(
        architecture: &Architecture,
        source: &WeightSource<'_>,
        device: &Device,
    ) -> Result<Self> {
        let a = architecture;
        let eps = a.rms_norm_eps;
        let norm = |name: &str| {
            Ok::<_, Error>(RmsNorm {
                weight: (source.weight)(name, &[a.hidden_size])?,
                eps,
            })
        };
        let data_parallel = device.is_cpu() && a.is_small();
        let matrix =
            |name: &str| source.matrix(name, &[a.vocab_size, a.hidden_size], data_parallel);
        let embed_tokens = matrix("model.embed_tokens.weight")?;
        let mut blocks = Vec::with_capacity(a.num_hidden_layers);
        for layer in 0..a.num_hidden_layers {
            let path = format!("model.layers.{layer}");
            blocks.push(Block {
                input_layernorm: norm(&format!("{path}.input_layernorm.weight"))?,
                post_attention_layernorm: norm(&format!("{path}.post_attention_layernorm.weight"))?,
                linears: LINEAR_NAMES
                    .try_map(|name| linear(a, source, (&path, name), data_parallel))?,
                attention: a.attention,
                path,
            });
        }
        let weight = match a.tie_word_embeddings {
            true => embed_tokens.clone(),
            false => matrix("lm_head.weight")?,
        };
        let norm = norm("model.norm.weight")?;
        let trains = |block: &Block| {
            block
                .linears
                .each()
                .iter()
                .any(|l| l.lora.is_some() || l.weight.is_trained())
        };
        let first = blocks.iter().position(trains).unwrap_or(blocks.len());
        let first_trainable_layer = if embed_tokens.is_trained() {
            (0, true)
        } else {
            (first, false)
        };
        let (architecture, head, device) = (a.clone(), LmHead { weight }, device.clone());
        Ok(Self {
            architecture,
            embed_tokens,
            blocks,
            norm,
            head,
            device,
            data_parallel,
            first_trainable_layer,
        })
    }

    /// What it was made from.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Embeds ids (N) for the blocks.
    pub(super) fn embed(&self, context: Context<'_>, ids: &Tensor) -> Result<Tensor> {
        embedding(context, ids, &self.embed_tokens)
    }

    /// x (N, C) -> logits (N, V).
    pub(super) fn head_logits(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        self.head.logits(context, &self.norm.forward(context, x)?.0)
    }

    fn rope(&self, segments: &Segments) -> Result<RopeTables> {
        self.architecture.rope.tables(segments, &self.device)
    }

    /// Logits (N, V) of every token: tests and small inputs only.
    pub fn logits(&self, context: Context<'_>, batch: &Batch) -> Result<Tensor> {
        let rope = self.rope(&batch.segments)?;
        let pass = Pass {
            context,
            segments: &batch.segments,
            rope: &rope,
            dropout: None,
        };
        let mut x = self.embed(context, &batch.ids)?;
        for block in &self.blocks {
            x = block.forward(pass, &x)?.0;
        }
        self.head_logits(context, &x)
    }

    /// The loss of each target in nats. Nothing is kept for a backward pass.
    pub fn losses(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<f32>> {
        batch.check(self.architecture.vocab_size)?;
        let shards = self.shards(context, batch)?;
        if shards.is_empty() {
            return self.shard_losses(context, batch);
        }
        let work = self
            .shape(context.precision, false)?
            .evaluation(&batch.lengths(), batch.loss_tokens());
        Ok(data_parallel(context, &shards, work, |context, shard| {
            self.shard_losses(context, shard)
        })?
        .concat())
    }

    fn shard_losses(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<f32>> {
        let rope = self.rope(&batch.segments)?;
        let pass = Pass {
            context,
            segments: &batch.segments,
            rope: &rope,
            dropout: None,
        };
        let mut x = self.embed(context, &batch.ids)?;
        for block in &self.blocks {
            x = block.forward(pass, &x)?.0;
        }
        let selected = self.gather_loss_rows(context, &x, batch)?;
        let (h, _) = self.norm.forward(context, &selected)?;
        self.head.forward(context, &h, &batch.targets)
    }

    /// The loss of each target, and the gradients of `scale * sum of losses` added to `gradients`.
    pub fn losses_and_gradients(
        &self,
        context: Context<'_>,
        batch: &Batch,
        scale: f64,
        recompute: Recompute,
        dropout: Option<(f64, u64, u64)>,
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        batch.check(self.architecture.vocab_size)?;
        let shards = self.shards(context, batch)?;
        let options = BackwardOptions {
            scale,
            recompute,
            dropout,
        };
        if shards.is_empty() {
            return self.forward_backward(context, batch, options, gradients);
        }
        let shape = self.shape(context.precision, dropout.is_some())?;
        let work = shape.training(&batch.lengths(), batch.loss_tokens(), recompute);
        let results = data_parallel(context, &shards, work, |context, shard| {
            let mut gradients = gradients.empty_like();
            let losses = self.forward_backward(context, shard, options, &mut gradients)?;
            Ok((losses, gradients))
        })?;
        let mut losses = Vec::with_capacity(batch.loss_tokens());
        for (shard_losses, added) in results {
            losses.extend(shard_losses);
            gradients.merge(added)?;
        }
        Ok(losses)
    }

    /// The parts that threads take of a batch: none where it stays whole. A shard without a loss has no way back, so that the work would not be
    /// the whole's.
    fn shards(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<Batch>> {
        if !self.data_parallel || context.reference {
            return Ok(Vec::new());
        }
        let shards = batch.split()?;
        Ok(
            if shards.len() > 1 && shards.iter().all(|shard| shard.loss_tokens() > 0) {
                shards
            } else {
                Vec::new()
            },
        )
    }

    /// What the work of a pass depends on, beside the batch.
    fn shape(&self, precision: Precision, dropout: bool) -> Result<ModelShape> {
        let rank = |linear: &Linear| Ok(linear.shape(0, false)?.r);
        let ranks = self
            .blocks
            .iter()
            .map(|block| block.linears.try_map(rank))
            .collect::<Result<_>>()?;
        Ok(ModelShape::new(
            &self.architecture,
            ranks,
            self.embed_tokens.is_trained(),
            dropout,
            precision,
        ))
    }

    fn forward_backward(
        &self,
        context: Context<'_>,
        batch: &Batch,
        options: BackwardOptions,
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let BackwardOptions {
            scale,
            recompute,
            dropout,
        } = options;
        let rope = self.rope(&batch.segments)?;
        let dropout = dropout.map(|(p, seed, step)| Dropout {
            p,
            seed,
            step,
            examples: &batch.examples,
        });
        let pass = Pass {
            context,
            segments: &batch.segments,
            rope: &rope,
            dropout,
        };
        let (x, kept) = self.forward_saving(pass, &batch.ids, recompute)?;
        let (end, input) = self.first_trainable_layer;
        let any = end < self.blocks.len() || input;
        let selected = self.gather_loss_rows(context, &x, batch)?;
        let rows = x.dims2()?;
        drop(x);
        let (h, norm) = self.norm.forward(context, &selected)?;
        let (losses, dh) =
            self.head
                .forward_backward(context, &h, &batch.targets, scale, any, gradients)?;
        let Some(dh) = dh else { return Ok(losses) };
        let dx = self.norm.backward(context, &dh, &norm, None, gradients)?;
        drop((selected, h, norm, dh));
        context
            .counter
            .add(scatter_cost(rows.0, batch.targets.len(), rows.1));
        let mut dx = scatter_rows(context, &dx, &batch.loss_positions, rows.0)?;
        for (layer, kept) in kept.into_iter().enumerate().rev() {
            let block = &self.blocks[layer];
            let saved = match kept {
                SavedActivations::Nothing => break,
                SavedActivations::All(saved) => *saved,
                SavedActivations::Input(x) => block.forward(pass, &x)?.1,
            };
            match block.backward(pass, &dx, &saved, layer > end || input, gradients)? {
                Some(below) => dx = below,
                None => return Ok(losses),
            }
        }
        if self.embed_tokens.is_trained() {
            embedding_backward(context, &batch.ids, &dx, &self.embed_tokens, gradients)?;
        }
        Ok(losses)
    }

    /// Runs the blocks; each block's `SavedActivations` holds what its backward pass starts from.
    fn forward_saving(
        &self,
        pass: Pass<'_>,
        ids: &Tensor,
        recompute: Recompute,
    ) -> Result<(Tensor, Vec<SavedActivations>)> {
        let mut x = self.embed(pass.context, ids)?;
        let (end, mut kept) = (
            self.first_trainable_layer.0,
            Vec::with_capacity(self.blocks.len()),
        );
        let again = end + recompute.count(self.blocks.len() - end);
        for (layer, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(pass, &x)?;
            kept.push(match layer {
                _ if layer < end => SavedActivations::Nothing,
                _ if layer < again => SavedActivations::Input(x),
                _ => SavedActivations::All(Box::new(saved)),
            });
            x = y;
        }
        Ok((x, kept))
    }

    /// The rows of x that predict a target.
    fn gather_loss_rows(&self, context: Context<'_>, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        context.counter.add(gather_cost(
            batch.targets.len(),
            self.architecture.hidden_size,
        ));
        gather_rows(context, x, &batch.loss_positions)
    }
}

/// What is options of a walk, whatever its batch.
#[derive(Clone, Copy)]
struct BackwardOptions {
    scale: f64,
    recompute: Recompute,
    dropout: Option<(f64, u64, u64)>,
}

/// What `run` makes of each shard. Counts `work`, that of the whole: how a batch is cut is no shard of it.
fn data_parallel<T: Send>(
    context: Context<'_>,
    shards: &[Batch],
    work: Work,
    run: impl Fn(Context<'_>, &Batch) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let counter = WorkCounter::default();
    let own = Context {
        counter: &counter,
        ..context
    };
    let results = par_map(shards.iter(), |shard| run(own, shard))
        .into_iter()
        .collect();
    debug_assert_eq!(
        work.flops(),
        counter.take().flops(),
        "parts execute the products of the whole"
    );
    context.counter.add(work);
    results
}

/// What a block's backward pass starts from.
enum SavedActivations {
    /// It has none: nothing at or below it is trained.
    Nothing,
    /// Its activations.
    All(Box<BlockSaved>),
    /// Its input: the forward pass runs again.
    Input(Tensor),
}

/// The linear layer `name` of `block`; `keeps`: whether it keeps its packed forms.
fn linear(
    a: &Architecture,
    source: &WeightSource<'_>,
    (block, name): (&str, &str),
    keeps: bool,
) -> Result<Linear> {
    let (out_features, in_features) = a.linear_sizes(name);
    let path = format!("{block}.{name}");
    let bias = a
        .linear_bias(name)
        .then(|| (source.weight)(&format!("{path}.bias"), &[out_features]))
        .transpose()?;
    Ok(Linear {
        weight: source.matrix(
            &format!("{path}.weight"),
            &[out_features, in_features],
            keeps,
        )?,
        bias,
        lora: (source.lora)(&path)?,
    })
}

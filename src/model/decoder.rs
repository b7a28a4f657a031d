//! The decoder: embedding, blocks, norm, head; losses, and gradients by walking the blocks backwards.

use candle_core::{Device, Tensor};

use super::architecture::Architecture;
use super::block::{Block, BlockSaved, Dropout, Pass};
use super::cost::{Recompute, scatter_cost, select_cost};
use super::linears::NAMES;
use crate::error::{Error, Kind, Result};
use crate::ops::{
    Context, Gradients, Head, Linear, Lora, RmsNorm, RopeTables, Segments, Weight, embedding, embedding_backward, put_rows,
    take_rows,
};

/// Where a decoder's tensors come from: `weight` by a tensor's name and shape, `lora` by a linear layer's path.
pub struct Parts<'a> {
    /// A weight, frozen or trained.
    pub weight: &'a dyn Fn(&str, &[usize]) -> Result<Weight>,
    /// The adapter on a layer, if it is a target.
    pub lora: &'a dyn Fn(&str) -> Result<Option<Lora>>,
}

/// A model ready to compute.
#[derive(Debug)]
pub struct Decoder {
    architecture: Architecture,
    embed_tokens: Weight,
    pub(super) blocks: Vec<Block>,
    norm: RmsNorm,
    head: Head,
    device: Device,
    /// The first block whose backward pass runs, and whether its input gradient is wanted.
    walk_end: (usize, bool),
}

/// One forward pass's input on the device.
#[derive(Debug, Clone)]
pub struct Batch {
    ids: Tensor,
    segments: Segments,
    examples: Vec<u64>,
    loss_positions: Tensor,
    targets: Vec<u32>,
}

impl Batch {
    /// `tokens` of segments with the given lengths and example numbers, laid end to end; the logits at `loss_positions` predict `targets`.
    pub fn new(
        tokens: &[u32],
        lengths: &[usize],
        examples: Vec<u64>,
        loss_positions: &[u32],
        targets: Vec<u32>,
        device: &Device,
    ) -> Result<Self> {
        let segments = Segments::of_lengths(lengths.iter().copied());
        let ids = Tensor::from_slice(tokens, tokens.len(), device)?;
        let loss_positions = Tensor::from_slice(loss_positions, loss_positions.len(), device)?;
        Ok(Self { ids, segments, examples, loss_positions, targets })
    }

    /// Targets in all.
    pub fn loss_tokens(&self) -> usize {
        self.targets.len()
    }

    /// Refuses token ids beyond the embedding.
    fn check(&self, vocab_size: usize) -> Result<()> {
        let highest = self.ids.max(0)?.to_scalar::<u32>()?.max(self.targets.iter().copied().max().unwrap_or(0));
        if (highest as usize) < vocab_size {
            return Ok(());
        }
        Err(Error::new(Kind::Tokenizer, "a token id lies beyond the model's embedding")
            .value(highest.to_string())
            .rule(format!("below vocab_size = {vocab_size}"))
            .hint("use the tokenizer that was published with the model"))
    }
}

impl Decoder {
    /// Puts a decoder together from its parts.
    pub fn assemble(architecture: &Architecture, parts: &Parts<'_>, device: &Device) -> Result<Self> {
        let a = architecture;
        let eps = a.rms_norm_eps;
        let norm = |name: &str| Ok::<_, Error>(RmsNorm { weight: (parts.weight)(name, &[a.hidden_size])?, eps });
        let embed_tokens = (parts.weight)("model.embed_tokens.weight", &[a.vocab_size, a.hidden_size])?;
        let mut blocks = Vec::with_capacity(a.num_hidden_layers);
        for layer in 0..a.num_hidden_layers {
            let path = format!("model.layers.{layer}");
            blocks.push(Block {
                input_layernorm: norm(&format!("{path}.input_layernorm.weight"))?,
                post_attention_layernorm: norm(&format!("{path}.post_attention_layernorm.weight"))?,
                linears: NAMES.try_map(|name| linear(a, parts, &path, name))?,
                attention: a.attention,
                path,
            });
        }
        let weight = match a.tie_word_embeddings {
            true => embed_tokens.clone(),
            false => (parts.weight)("lm_head.weight", &[a.vocab_size, a.hidden_size])?,
        };
        let norm = norm("model.norm.weight")?;
        let trains = |block: &Block| block.linears.each().iter().any(|l| l.lora.is_some() || l.weight.is_trained());
        let first = blocks.iter().position(trains).unwrap_or(blocks.len());
        let walk_end = if embed_tokens.is_trained() { (0, true) } else { (first, false) };
        let (architecture, head, device) = (a.clone(), Head { weight }, device.clone());
        Ok(Self { architecture, embed_tokens, blocks, norm, head, device, walk_end })
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
        let pass = Pass { context, segments: &batch.segments, rope: &rope, dropout: None };
        let mut x = self.embed(context, &batch.ids)?;
        for block in &self.blocks {
            x = block.forward(pass, &x)?.0;
        }
        self.head_logits(context, &x)
    }

    /// The loss of each target in nats. Nothing is kept for a backward pass.
    pub fn losses(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<f32>> {
        batch.check(self.architecture.vocab_size)?;
        let rope = self.rope(&batch.segments)?;
        let pass = Pass { context, segments: &batch.segments, rope: &rope, dropout: None };
        let mut x = self.embed(context, &batch.ids)?;
        for block in &self.blocks {
            x = block.forward(pass, &x)?.0;
        }
        let selected = self.at_losses(context, &x, batch)?;
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
        let rope = self.rope(&batch.segments)?;
        let dropout = dropout.map(|(p, seed, step)| Dropout { p, seed, step, examples: &batch.examples });
        let pass = Pass { context, segments: &batch.segments, rope: &rope, dropout };
        let (x, kept) = self.forward_keeping(pass, &batch.ids, recompute)?;
        let (end, input) = self.walk_end;
        let any = end < self.blocks.len() || input;
        let selected = self.at_losses(context, &x, batch)?;
        let rows = x.dims2()?;
        drop(x);
        let (h, norm) = self.norm.forward(context, &selected)?;
        let (losses, dh) = self.head.forward_backward(context, &h, &batch.targets, scale, any, gradients)?;
        let Some(dh) = dh else { return Ok(losses) };
        let dx = self.norm.backward(context, &dh, &norm, None, gradients)?;
        drop((selected, h, norm, dh));
        context.tally.add(scatter_cost(rows.0, batch.targets.len(), rows.1));
        let mut dx = put_rows(context, &dx, &batch.loss_positions, rows.0)?;
        for (layer, kept) in kept.into_iter().enumerate().rev() {
            let block = &self.blocks[layer];
            let saved = match kept {
                Kept::Nothing => break,
                Kept::All(saved) => *saved,
                Kept::Input(x) => block.forward(pass, &x)?.1,
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

    /// Runs the blocks; each block's `Kept` holds what its backward pass starts from.
    fn forward_keeping(&self, pass: Pass<'_>, ids: &Tensor, recompute: Recompute) -> Result<(Tensor, Vec<Kept>)> {
        let mut x = self.embed(pass.context, ids)?;
        let (end, mut kept) = (self.walk_end.0, Vec::with_capacity(self.blocks.len()));
        let again = end + recompute.of(self.blocks.len() - end);
        for (layer, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(pass, &x)?;
            kept.push(match layer {
                _ if layer < end => Kept::Nothing,
                _ if layer < again => Kept::Input(x),
                _ => Kept::All(Box::new(saved)),
            });
            x = y;
        }
        Ok((x, kept))
    }

    /// The rows of x that predict a target.
    fn at_losses(&self, context: Context<'_>, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        context.tally.add(select_cost(batch.targets.len(), self.architecture.hidden_size));
        take_rows(context, x, &batch.loss_positions)
    }
}

/// What a block's backward pass starts from.
enum Kept {
    /// It has none: nothing at or below it is trained.
    Nothing,
    /// Its activations.
    All(Box<BlockSaved>),
    /// Its input: the forward pass runs again.
    Input(Tensor),
}

fn linear(a: &Architecture, parts: &Parts<'_>, block: &str, name: &str) -> Result<Linear> {
    let (out_features, in_features) = a.linear_sizes(name);
    let path = format!("{block}.{name}");
    let bias = a.linear_bias(name).then(|| (parts.weight)(&format!("{path}.bias"), &[out_features])).transpose()?;
    Ok(Linear {
        weight: (parts.weight)(&format!("{path}.weight"), &[out_features, in_features])?,
        bias,
        lora: (parts.lora)(&path)?,
    })
}

//! The decoder, or encoder: embedding, blocks, norm, head; losses, and gradients by visiting the
//! blocks in reverse.

use std::ops::Range;

use candle_core::{Device, Tensor};

use super::architecture::Architecture;
use super::backward::BackwardRange;
use super::batch::Batch;
use super::block::{Block, BlockSaved, Dropout, Pass};
use super::builder::{Builder, WeightSource};
use super::cost::ModelShape;
use super::embedding::{Embedding, EmbeddingSaved};
use super::head::{DecoderHead, Pooling};
use super::kv_cache::KvCache;
use super::recompute::Recompute;
use crate::error::{Error, Kind, Result};
use crate::ops::{
    Context, Gradients, LmHead, Norm, NormSaved, OutputLoss, Rope, RopeTables, Segments, TokenRows,
    gather_cost, gather_rows, par_map, scatter_cost, scatter_rows,
};
use crate::work::{Work, WorkCounter};

/// A model ready to compute.
#[derive(Debug)]
pub struct Decoder {
    architecture: Architecture,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Option<Norm>,
    head: DecoderHead,
    device: Device,
    /// Whether threads take shards of a batch.
    data_parallel: bool,
    /// What is trained.
    shape: ModelShape,
    backward: BackwardRange,
}

/// The losses of a batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BatchLosses {
    /// Of each target: in nats, or the squared error of a regression.
    pub losses: Vec<f32>,
    /// Outputs of a classifier or regression, a row for each target (L, K); empty of a model that
    /// predicts tokens.
    pub outputs: Vec<f32>,
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
        let builder = Builder::new(architecture, source, data_parallel);
        let [_, embed_tokens] = architecture.tied_tensors();
        let embed_tokens = builder.vocabulary_matrix(&embed_tokens)?;
        let blocks = (0..architecture.num_hidden_layers)
            .map(|layer| builder.block(layer))
            .collect::<Result<Vec<_>>>()?;
        let head = builder.head(&embed_tokens)?;
        let embedding = builder.embedding(embed_tokens)?;
        let norm = builder.last_norm()?;
        let of_head = match &head {
            DecoderHead::Vocabulary(head) => head.weight.token_rows(),
            DecoderHead::Classifier(_) => None,
        };
        let rows = [embedding.tokens.token_rows(), of_head];
        let rows = rows.map(|rows| rows.map_or(0, TokenRows::len));
        let mut shape = builder.shape();
        shape.token_rows = rows;
        Ok(Self {
            backward: shape.backward_range(),
            shape,
            architecture: architecture.clone(),
            norm,
            head,
            embedding,
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

    /// ids (N) of the pass's segments -> (N, C).
    pub(super) fn embed(&self, pass: &Pass<'_>, ids: &Tensor) -> Result<(Tensor, EmbeddingSaved)> {
        let factor = self.architecture.embedding_factor(pass.context.precision);
        self.embedding
            .forward(pass.context, ids, factor, pass.segments, 0)
    }

    /// Runs all blocks on x (N, C); `visit` receives each block's number, its input (N, C)
    /// and what it saved for a backward pass. Returns the last block's output (N, C).
    pub(super) fn run_blocks(
        &self,
        pass: &Pass<'_>,
        mut x: Tensor,
        mut visit: impl FnMut(usize, Tensor, BlockSaved) -> Result<()>,
    ) -> Result<Tensor> {
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
        let (embedding, a) = (&self.embedding, &self.architecture);
        let factor = a.embedding_factor(context.precision);
        let (mut x, _) = embedding.forward(context, &ids, factor, &segments, position)?;
        for (block, cache) in self.blocks.iter().zip(cache) {
            x = block.decode(&pass, &x, cache)?;
        }
        Ok(x)
    }

    /// x (N, C) -> logits (N, V), of a model that predicts tokens.
    pub(super) fn head_logits(&self, context: Context<'_>, x: &Tensor) -> Result<Tensor> {
        let DecoderHead::Vocabulary(head) = &self.head else {
            return Err(Error::new(
                Kind::Usage,
                "a classifier predicts no next token",
            ));
        };
        head.logits(context, &self.last_norm(context, x)?.0)
    }

    /// x (N, C) behind the norm before the head, if there is one.
    fn last_norm(&self, context: Context<'_>, x: &Tensor) -> Result<(Tensor, Option<NormSaved>)> {
        let Some(norm) = &self.norm else {
            return Ok((x.clone(), None));
        };
        let (h, saved) = norm.forward(context, x)?;
        Ok((h, Some(saved)))
    }

    /// The output of the last block (N, C).
    fn hidden(&self, pass: &Pass<'_>, ids: &Tensor) -> Result<Tensor> {
        let x = self.embed(pass, ids)?.0;
        self.run_blocks(pass, x, |_, _, _| Ok(()))
    }

    /// Logits (N, V) of every token, or of a classifier's loss tokens (L, K), for tests and small
    /// inputs.
    pub fn logits(&self, context: Context<'_>, batch: &Batch) -> Result<Tensor> {
        let pass = self.pass(context, &batch.segments, &batch.examples, None)?;
        let x = self.hidden(&pass, &batch.ids)?;
        let DecoderHead::Classifier(classifier) = &self.head else {
            return self.head_logits(context, &x);
        };
        let selected = self.gather_loss_rows(context, &x, batch)?;
        let (h, _) = self.last_norm(context, &selected)?;
        Ok(classifier.forward(&pass, &h)?.0)
    }

    /// The loss of each target in nats; saves nothing for a backward pass.
    pub fn losses(&self, context: Context<'_>, batch: &Batch) -> Result<Vec<f32>> {
        Ok(self.evaluate(context, batch)?.losses)
    }

    /// The losses of a batch, without class weights, and a classifier's outputs; saves nothing for a backward pass.
    pub fn evaluate(&self, context: Context<'_>, batch: &Batch) -> Result<BatchLosses> {
        self.check(batch)?;
        let shards = self.shards(context, batch)?;
        if shards.is_empty() {
            return self.shard_losses(context, batch);
        }
        let work = self
            .shape
            .with_pass(context.precision, false)
            .evaluation(&batch.lengths(), batch.loss_tokens());
        let parts = data_parallel(context, &shards, work, |context, shard| {
            self.shard_losses(context, shard)
        })?;
        let mut all = BatchLosses::default();
        for part in parts {
            all.losses.extend(part.losses);
            all.outputs.extend(part.outputs);
        }
        Ok(all)
    }

    /// The loss of a classifier's or regression's outputs.
    fn output_loss(&self) -> OutputLoss {
        let head = self.architecture.classifier_head();
        head.map_or(OutputLoss::CrossEntropy, |head| head.problem_type.loss())
    }

    fn check(&self, batch: &Batch) -> Result<()> {
        let predicts_tokens = matches!(self.head, DecoderHead::Vocabulary(_));
        batch.check(self.architecture.vocab_size, predicts_tokens)
    }

    fn shard_losses(&self, context: Context<'_>, batch: &Batch) -> Result<BatchLosses> {
        let pass = self.pass(context, &batch.segments, &batch.examples, None)?;
        let x = self.hidden(&pass, &batch.ids)?;
        let selected = self.gather_loss_rows(context, &x, batch)?;
        let (h, _) = self.last_norm(context, &selected)?;
        match &self.head {
            DecoderHead::Vocabulary(head) => Ok(BatchLosses {
                losses: head.forward(context, &h, &batch.targets)?,
                outputs: Vec::new(),
            }),
            DecoderHead::Classifier(classifier) => {
                let (logits, _) = classifier.forward(&pass, &h)?;
                let outputs = logits.flatten_all()?.to_vec1()?;
                let targets = batch.output_targets(&[]);
                let loss = self.output_loss();
                let (losses, _) = loss.losses(context, logits, targets, None)?;
                Ok(BatchLosses { losses, outputs })
            }
        }
    }

    /// The loss of each target, times the weight of its class if classes have any; adds the gradients of
    /// `options.scale * sum of losses` to `gradients`.
    pub fn losses_and_gradients(
        &self,
        context: Context<'_>,
        batch: &Batch,
        options: BackwardOptions,
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        self.check(batch)?;
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
        let (x, embedding) = self.embed(&pass, &batch.ids)?;
        let embedding = self.backward.embedding.then_some(embedding);
        let (x, saved) = self.forward_saving(&pass, x, options.recompute)?;
        let tokens = x.dim(0)?;
        let selected = self.gather_loss_rows(context, &x, batch)?;
        drop(x);
        let (h, norm_saved) = self.last_norm(context, &selected)?;
        let (losses, dh) = self.head_backward(&pass, batch, &h, options.scale, gradients)?;
        let Some(dh) = dh else { return Ok(losses) };
        let dx = match self.norm.as_ref().zip(norm_saved.as_ref()) {
            Some((norm, saved)) => norm.backward(context, &dh, saved, None, gradients)?,
            None => dh.clone(),
        };
        drop((selected, h, norm_saved, dh));
        if self.backward.is_empty() {
            return Ok(losses);
        }
        let dx = self.scatter_loss_rows(context, &dx, batch, tokens)?;
        let dx = self.backward_blocks(&pass, dx, saved, gradients)?;
        if let (Some(dx), Some(saved)) = (dx, embedding) {
            let factor = self.architecture.embedding_factor(context.precision);
            let (embedding, ids) = (&self.embedding, &batch.ids);
            embedding.backward(context, ids, factor, dx, &saved, gradients)?;
        }
        Ok(losses)
    }

    /// The input of the head (L, C) -> the losses, and their gradient if something below the head is
    /// trained; adds the gradients of the head.
    fn head_backward(
        &self,
        pass: &Pass<'_>,
        batch: &Batch,
        h: &Tensor,
        scale: f64,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f32>, Option<Tensor>)> {
        let context = pass.context;
        let norm_trained = self.norm.as_ref().is_some_and(Norm::is_trained);
        let below = !self.backward.is_empty() || norm_trained;
        let classifier = match &self.head {
            DecoderHead::Vocabulary(head) => {
                return self.vocabulary_backward(pass, head, batch, h, scale, below, gradients);
            }
            DecoderHead::Classifier(classifier) => classifier,
        };
        let (segments, examples) = batch.loss_segments()?;
        let rows = Pass {
            context,
            segments: &segments,
            examples: &examples,
            ropes: Vec::new(),
            query_ropes: Vec::new(),
            dropout: pass.dropout,
        };
        let (logits, saved) = classifier.forward(&rows, h)?;
        let head = self.architecture.classifier_head();
        let targets = batch.output_targets(head.map_or(&[], |head| &head.class_weights));
        let loss = self.output_loss();
        let (losses, dlogits) = loss.losses(context, logits, targets, Some(scale))?;
        let dh = match dlogits {
            Some(dlogits) => classifier.backward(context, &dlogits, &saved, below, gradients)?,
            None => None,
        };
        Ok((losses, dh))
    }

    /// `head_backward` of an output embedding, with LoRA dropout.
    #[expect(clippy::too_many_arguments, reason = "the inputs of an op")]
    fn vocabulary_backward(
        &self,
        pass: &Pass<'_>,
        head: &LmHead,
        batch: &Batch,
        h: &Tensor,
        scale: f64,
        below: bool,
        gradients: &mut Gradients,
    ) -> Result<(Vec<f32>, Option<Tensor>)> {
        let (context, targets) = (pass.context, &batch.targets);
        let masked = pass.dropout.is_some() && head.lora.is_some();
        let positions: Vec<u32> = if masked {
            batch.loss_positions.to_vec1()?
        } else {
            Vec::new()
        };
        let masks = |rows: Range<usize>| {
            let positions = &positions[rows];
            let shape = (positions.len(), self.architecture.hidden_size);
            let path = self.architecture.names.lm_head;
            pass.mask_at(path, shape, |row| positions[row] as usize)
        };
        let masks = masked.then_some(&masks as _);
        head.forward_backward_masked(context, h, targets, scale, below, masks, gradients)
    }

    /// Runs all blocks; returns the last one's output (N, C), and what is saved of each block.
    fn forward_saving(
        &self,
        pass: &Pass<'_>,
        x: Tensor,
        recompute: Recompute,
    ) -> Result<(Tensor, Vec<SavedActivations>)> {
        let visited = self.backward.visited();
        let recomputed = visited.start + recompute.count(visited.len());
        let mut activations = Vec::with_capacity(self.blocks.len());
        let x = self.run_blocks(pass, x, |layer, input, saved| {
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

    /// dx (N, C) of the last block's output -> the gradients of everything trained in the blocks, and
    /// dx of the first block's input if that is needed.
    fn backward_blocks(
        &self,
        pass: &Pass<'_>,
        mut dx: Tensor,
        activations: Vec<SavedActivations>,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
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
                None => return Ok(None),
            }
        }
        Ok(self.backward.embedding.then_some(dx))
    }

    /// The rows with a target (L): those of the batch, or the last of their segments.
    fn loss_rows(&self, batch: &Batch) -> Result<Tensor> {
        let head = self.architecture.classifier_head();
        match head.map(|head| head.pooling) {
            Some(Pooling::Last) => batch.last_rows(),
            Some(Pooling::First | Pooling::Each) | None => Ok(batch.loss_positions.clone()),
        }
    }

    /// The rows of x (N, C) that have a target.
    fn gather_loss_rows(&self, context: Context<'_>, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (rows, width) = (batch.targets.len(), self.architecture.hidden_size);
        context.counter.add(gather_cost(rows, width));
        gather_rows(context, x, &self.loss_rows(batch)?)
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
        scatter_rows(context, dx, &self.loss_rows(batch)?, tokens)
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

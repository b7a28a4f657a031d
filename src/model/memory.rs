//! Forecast of a run's peak memory from sizes alone, and the least activation checkpointing that
//! fits.
//!
//! Takes a model's shape, the number of trained parameters and the tokens of a micro-batch; returns
//! bytes by use. Reads nothing of the machine.

use super::batch::max_shards;
use super::cost::ModelShape;
use super::expert_sizes::ExpertSizes;
use super::recompute::Recompute;
use crate::ops::dtype;
use crate::units::Bytes;

/// The parts of a run's peak memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryForecast {
    /// Frozen weights as stored in memory; of a small model also their packed forms for both
    /// directions.
    pub weights: Bytes,
    /// Trained values, moments and gradients in f32.
    pub trained: Bytes,
    /// Activations saved for the backward pass.
    pub activations: Bytes,
    /// Chunks of logits, the largest temporaries, and allocator fragmentation.
    pub temporaries: Bytes,
    /// The program itself.
    pub program: Bytes,
}

impl MemoryForecast {
    /// The sum of all parts.
    pub fn peak(&self) -> Bytes {
        self.weights + self.trained + self.activations + self.temporaries + self.program
    }
}

/// The program, its tokenizer and records, and the allocator's pages for each size of tensor
/// (benches/LOG.md, "what the forecast of memory leaves out").
const PROGRAM: u64 = 44 << 20;
/// Inverse of the share of bytes allocated and freed within a step that is lost to fragmentation
/// (the same entry).
const SLACK: u64 = 8;
/// One chunk of logits, which becomes its gradient (see `ops::LmHead`): about 24 MiB. The fused CPU
/// pass of a frozen head has none, and peaks up to 6 % below the forecast.
const LOGITS: u64 = 24 << 20;

/// The peak of a step with `tokens` tokens in a micro-batch and `trained` trained parameters: LoRA
/// factors on frozen weights, or all weights.
pub fn forecast_memory(
    shape: &ModelShape,
    trained: u64,
    tokens: usize,
    recompute: Recompute,
) -> MemoryForecast {
    let a = shape.architecture();
    let n = tokens as u64;
    let c = a.hidden_size as u64;
    let sparse = |sizes: ExpertSizes| sizes.per_token * sizes.intermediate_size;
    let f = a.experts.map_or(0, sparse).max(a.intermediate_size) as u64;
    let outputs = a.outputs() as u64;
    let table = a.vocab_size as u64 * c;
    let activations = activations(shape, tokens, recompute);
    let mut logits = LOGITS;
    let mut table_gradients = 0;
    // Packed forms are f32, or three planes of bf16; each shard of a batch has gradients until they
    // are summed.
    let (packed, shards) = if a.is_small() {
        (2 * 6, max_shards(tokens) as u64)
    } else {
        (0, 1)
    };
    let [embedding_trained, head_trained] = shape.trained_embeddings();
    if head_trained {
        // A chunk is as large as the gradient of the table.
        logits = LOGITS.max(4 * table);
    }
    if embedding_trained || head_trained {
        // The sum of the head's and the embedding's, or of chunks: three at once, of which one
        // stays.
        table_gradients = 8 * table;
    }
    let stored = dtype(a.frozen_precision(shape.precision())).size_in_bytes() as u64;
    let frozen = shape.frozen();
    let weights = frozen.parameters * (stored + packed) + frozen.quantized_bytes;
    let short_lived = logits.min(4 * n * outputs) + 4 * n * (4 * f + 4 * c);
    let temporaries = short_lived + (activations + short_lived) / SLACK + table_gradients;
    // Gradients are concatenated for the optimizer after the activations are freed, in fragments
    // too small for a large buffer.
    let flat = if 4 * trained > LOGITS { 4 * trained } else { 0 };
    MemoryForecast {
        weights: Bytes(weights),
        trained: Bytes((12 + 4 * shards) * trained + flat + 4 * shape.kept_factors()),
        activations: Bytes(activations),
        temporaries: Bytes(temporaries),
        program: Bytes(PROGRAM),
    }
}

/// The most activations saved at once. A recomputed block saves its input, in f32, until the
/// backward pass reaches it, and then briefly what any block saves; the blocks above it are freed
/// by then.
fn activations(shape: &ModelShape, tokens: usize, recompute: Recompute) -> u64 {
    let visited = shape.backward_blocks();
    let blocks = shape.architecture().num_hidden_layers;
    let first = blocks - visited;
    let recomputed = recompute.count(visited);
    let saved = |layer: usize| shape.saved_bytes(layer, tokens);
    let input = 4 * (tokens * shape.architecture().hidden_size) as u64;
    let at_head = recomputed as u64 * input + (first + recomputed..blocks).map(saved).sum::<u64>();
    let at_recomputation = (first..first + recomputed)
        .map(|layer| (layer - first + 1) as u64 * input + saved(layer))
        .max();
    at_head.max(at_recomputation.unwrap_or_default())
}

/// The fewest recomputed blocks with which a run fits in `free`; if nothing fits, those with the
/// smallest peak.
pub fn least_recompute(shape: &ModelShape, trained: u64, tokens: usize, free: Bytes) -> Recompute {
    let peak = |recompute: &Recompute| forecast_memory(shape, trained, tokens, *recompute).peak();
    let mut counts = (0..=shape.backward_blocks()).map(Recompute::lowest);
    let smallest = counts.clone().min_by_key(peak).unwrap_or(Recompute::ALL);
    counts
        .find(|recompute| peak(recompute) <= free)
        .unwrap_or(smallest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::targets::ModuleKind;
    use crate::adapter::{Adaptation, Site};
    use crate::model::Architecture;
    use crate::work::Precision;

    /// A tied Llama: hidden and intermediate size, layers, attention and key/value heads,
    /// vocabulary.
    fn llama(sizes: [usize; 6]) -> Architecture {
        let [hidden, inner, layers, heads, kv_heads, vocabulary] = sizes;
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
            "tie_word_embeddings": true,
        });
        Architecture::from_config(&config).unwrap()
    }

    /// SmolLM2-135M's shape in bf16 with rank 16 on every linear layer of the blocks from `first`
    /// on: 30 blocks.
    fn smollm2(first: usize, dropout: bool) -> (ModelShape, u64) {
        let architecture = llama([576, 1536, 30, 9, 3, 49152]);
        let layer = |path: &str| path.split('.').nth(2)?.parse::<usize>().ok();
        let modules = architecture.modules().into_iter();
        let sites: Vec<Site> = modules
            .filter(|module| layer(&module.path).is_some_and(|layer| layer >= first))
            .map(|module| Site {
                path: module.path,
                in_features: module.in_features,
                out_features: module.out_features,
                r: 16,
                lora_alpha: 32.0,
                scaling: 2.0,
                kind: ModuleKind::Linear,
            })
            .collect();
        let adaptation = Adaptation::from(sites);
        let trained = adaptation.parameters() as u64;
        let shape = ModelShape::with_adapters(&architecture, &adaptation, dropout, Precision::Bf16);
        (shape, trained)
    }

    fn saved(shape: &ModelShape, tokens: usize, recompute: Recompute) -> u64 {
        forecast_memory(shape, 0, tokens, recompute).activations.0
    }

    /// By hand, in bf16, 100 tokens: input and x1 2 x 576, q and the attention's output 2 x 576, k
    /// and v 2 x 192, gate and up 2 x 1536, two bytes each; x A^T of seven adapters, 16 elements of
    /// four bytes each. A recomputed block: its input, 576 elements of four bytes.
    #[test]
    fn a_block_saves_its_activations_or_its_input() {
        let (shape, _) = smollm2(0, false);
        let block = 100 * (2 * (4 * 576 + 2 * 192 + 2 * 1536) + 4 * 7 * 16);
        let input = 100 * 4 * 576;
        let lowest = |blocks: usize| saved(&shape, 100, Recompute::lowest(blocks));
        assert_eq!(lowest(0), 30 * block);
        assert_eq!(lowest(7), 23 * block + 7 * input);
        assert_eq!(lowest(29), block + 29 * input);
        // The last block has its input and its activations when it is recomputed.
        assert_eq!(lowest(30), block + 30 * input);
        assert_eq!(saved(&shape, 100, Recompute::ALL), lowest(30));
    }

    /// By hand: 64 x 8 elements of the tied table, four matrices of 8 x 8 and three of 16 x 8 in
    /// the block, three norms of 8; four bytes each, and twice six for the packed forms. 600 tokens
    /// are two shards, each with gradients.
    #[test]
    fn a_small_model_has_packed_weights_and_gradients_of_each_shard() {
        let architecture = llama([8, 16, 1, 2, 2, 64]);
        let nothing = Adaptation::default();
        let shape = ModelShape::with_adapters(&architecture, &nothing, false, Precision::F32);
        let memory = |tokens| forecast_memory(&shape, 1000, tokens, Recompute::NONE);
        let parameters = 512 + 4 * 64 + 3 * 128 + 3 * 8;
        assert_eq!(memory(600).weights.0, parameters * (4 + 12));
        assert_eq!(memory(500).trained.0, 16_000);
        assert_eq!(memory(600).trained.0, 20_000);
    }

    /// Blocks below the lowest adapter save nothing and are never recomputed.
    #[test]
    fn only_blocks_of_the_backward_pass_count() {
        let (all, _) = smollm2(0, false);
        let (upper, _) = smollm2(20, false);
        let nothing_recomputed = saved(&upper, 64, Recompute::NONE);
        assert_eq!(3 * nothing_recomputed, saved(&all, 64, Recompute::NONE));
        let all_recomputed = saved(&upper, 64, Recompute::ALL);
        assert_eq!(saved(&upper, 64, Recompute::lowest(10)), all_recomputed);
    }

    /// One bit for each element that an adapter reads: six times 576 and once 1536.
    #[test]
    fn dropout_masks_are_saved() {
        let [without, with] =
            [false, true].map(|dropout| saved(&smollm2(0, dropout).0, 100, Recompute::NONE));
        assert_eq!(with - without, 30 * 100 * (6 * 576 + 1536) / 8);
    }

    #[test]
    fn the_fewest_blocks_that_fit_are_recomputed() {
        let (shape, trained) = smollm2(0, false);
        let peak = |blocks: usize| {
            forecast_memory(&shape, trained, 1024, Recompute::lowest(blocks)).peak()
        };
        let least = |free: Bytes| least_recompute(&shape, trained, 1024, free).count(30);
        assert_eq!(least(peak(0)), 0);
        assert_eq!(least(Bytes(peak(0).0 - 1)), 1);
        for blocks in [1, 8, 29] {
            assert_eq!(least(peak(blocks)), blocks);
            assert_eq!(least(Bytes(peak(blocks).0 - 1)), (blocks + 1).min(29));
        }
        // Nothing fits: the smallest peak.
        assert_eq!(least(Bytes(0)), 29);
    }
}

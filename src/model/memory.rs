//! How much memory a run will take at its peak, from sizes alone, and how little must be computed again for it to fit.
//!
//! Takes a model's shape, how many numbers are trained and the tokens of a micro-batch; returns bytes by what they hold. Reads nothing of
//! the machine.

use super::batch::max_shards;
use super::cost::{ModelShape, Recompute};
use crate::ops::dtype;
use crate::units::Bytes;

/// The parts of a run's peak memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryForecast {
    /// Frozen weights as they are kept; those of a small model packed for either direction, too.
    pub weights: Bytes,
    /// Trained values, moments and gradients in f32.
    pub trained: Bytes,
    /// What the backward pass keeps of the forward pass.
    pub activations: Bytes,
    /// Chunks of logits, the largest temporaries, and what the allocator cannot use again.
    pub temporaries: Bytes,
    /// The program itself.
    pub program: Bytes,
}

impl MemoryForecast {
    /// All parts together.
    pub fn peak(&self) -> Bytes {
        self.weights + self.trained + self.activations + self.temporaries + self.program
    }
}

/// The program, its tokenizer and records, and the allocator's pages for each size of tensor (benches/LOG.md, "what the forecast of memory
/// leaves out").
const PROGRAM: u64 = 44 << 20;
/// Of what comes and goes within a step, the part that the allocator holds and cannot use again: one in so many (the same entry).
const SLACK: u64 = 8;
/// One chunk of logits, which becomes its gradient (see `ops::LmHead`): about 24 MiB. A frozen table's fused pass on a processor keeps none, and
/// peaks up to 6 % below the forecast.
const LOGITS: u64 = 24 << 20;

/// The peak of a step with `tokens` tokens in a micro-batch, `trained` trained numbers beside (or instead of) the frozen ones.
pub fn forecast_memory(
    shape: &ModelShape,
    trained: u64,
    tokens: usize,
    recompute: Recompute,
) -> MemoryForecast {
    let (a, n) = (shape.architecture(), tokens as u64);
    let (c, f, v) = (
        a.hidden_size as u64,
        a.intermediate_size as u64,
        a.vocab_size as u64,
    );
    let activations = activations(shape, tokens, recompute);
    // Where the table is trained a chunk is as large as its gradient.
    let logits = if shape.all_trained() {
        LOGITS.max(4 * v * c)
    } else {
        LOGITS
    };
    let fleeting = logits.min(4 * n * v) + 4 * n * (4 * f + 4 * c);
    // A trained table's gradient is made from the head's and the embedding's: three of its size at once, of which one stays.
    let tables = if shape.all_trained() { 8 * v * c } else { 0 };
    let temporaries = fleeting + (activations + fleeting) / SLACK + tables;
    // Gradients are laid end to end for the optimizer when the activations are gone; what these leave free is in pieces that a large buffer
    // does not fit in.
    let flat = if 4 * trained > LOGITS { 4 * trained } else { 0 };
    let kept = dtype(a.frozen_precision(shape.precision())).size_in_bytes() as u64;
    // Packed forms are f32, or three parts of bf16; each part of a batch has gradients of its own until they are summed.
    let (packed, parts) = if a.is_small() {
        (2 * 6, max_shards(tokens) as u64)
    } else {
        (0, 1)
    };
    let weights = if shape.all_trained() {
        0
    } else {
        a.parameters() * (kept + packed)
    };
    MemoryForecast {
        weights: Bytes(weights),
        trained: Bytes((12 + 4 * parts) * trained + flat),
        activations: Bytes(activations),
        temporaries: Bytes(temporaries),
        program: Bytes(PROGRAM),
    }
}

/// The most that is kept at once. A block that is computed again holds its input, in f32, until the walk comes to it, and then for a moment
/// what any block keeps: by then the blocks above it hold nothing any more.
fn activations(shape: &ModelShape, tokens: usize, recompute: Recompute) -> u64 {
    let walked = shape.backward_blocks();
    let first = shape.architecture().num_hidden_layers - walked;
    let again = recompute.count(walked);
    let kept = |layer: usize| shape.saved_bytes(layer, tokens);
    let input = 4 * (tokens * shape.architecture().hidden_size) as u64;
    let whole: u64 = (first + again..first + walked).map(kept).sum();
    let at_head = again as u64 * input + whole;
    let at_walk = (first..first + again)
        .map(|layer| (layer - first + 1) as u64 * input + kept(layer))
        .max();
    at_head.max(at_walk.unwrap_or_default())
}

/// The fewest blocks whose activations must be computed again for a run to fit in `free`; where nothing makes it fit, what takes least.
pub fn least_recompute(shape: &ModelShape, trained: u64, tokens: usize, free: Bytes) -> Recompute {
    let peak = |recompute: &Recompute| forecast_memory(shape, trained, tokens, *recompute).peak();
    let counts = || (0..=shape.backward_blocks()).map(Recompute::lowest);
    let least = || counts().min_by_key(peak).unwrap_or(Recompute::ALL);
    counts()
        .find(|recompute| peak(recompute) <= free)
        .unwrap_or_else(least)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Module, Site};
    use crate::model::Architecture;
    use crate::work::Precision;

    /// SmolLM2-135M's shape with rank 16 on every linear layer of the layers from `first` on, bf16: 30 blocks.
    fn smollm2(first: usize, dropout: bool) -> (ModelShape, u64) {
        let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": true}"#;
        let architecture =
            Architecture::from_config(&serde_json::from_str(config).unwrap()).unwrap();
        let layer = |path: &str| {
            path.split('.')
                .nth(2)
                .and_then(|layer| layer.parse::<usize>().ok())
        };
        let modules = architecture
            .modules()
            .into_iter()
            .filter(|module| layer(&module.path).is_some_and(|layer| layer >= first));
        let site = |Module {
                        path,
                        in_features,
                        out_features,
                    }: Module| Site {
            path,
            in_features,
            out_features,
            r: 16,
            lora_alpha: 32.0,
            scaling: 2.0,
        };
        let sites: Vec<Site> = modules.map(site).collect();
        let trained = sites.iter().map(|site| site.parameters() as u64).sum();
        (
            ModelShape::with_adapters(&architecture, &sites, dropout, Precision::Bf16),
            trained,
        )
    }

    /// By hand, in bf16, 100 tokens: input and x1 2 x 576, q and mix 2 x 576, k and v 2 x 192, gate and up 2 x 1536, two bytes each; x A^T of
    /// seven adapters, 16 numbers of four bytes each. A block that is computed again: its input, 576 numbers of four bytes.
    #[test]
    fn a_block_holds_its_activations_or_its_input() {
        let (shape, trained) = smollm2(0, false);
        let block = 100 * (2 * (4 * 576 + 2 * 192 + 2 * 1536) + 4 * 7 * 16);
        let input = 100 * 4 * 576;
        let of = |blocks: usize| {
            forecast_memory(&shape, trained, 100, Recompute::lowest(blocks))
                .activations
                .0
        };
        assert_eq!(of(0), 30 * block);
        assert_eq!(of(7), 23 * block + 7 * input);
        assert_eq!(of(29), block + 29 * input);
        // The last block's input stands beside what it keeps when it is computed again.
        assert_eq!(of(30), block + 30 * input);
        assert_eq!(
            forecast_memory(&shape, trained, 100, Recompute::ALL)
                .activations
                .0,
            of(30)
        );
    }

    /// By hand: 64 x 8 numbers of the table, tied, a block's four of 8 x 8 and three of 16 x 8, three norms of 8; of four bytes, and twice six
    /// for the packed forms. 600 tokens are two parts, each with gradients.
    #[test]
    fn a_small_model_is_packed_beside_itself_and_its_parts_have_gradients() {
        let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 8,
            "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true}"#;
        let architecture =
            Architecture::from_config(&serde_json::from_str(config).unwrap()).unwrap();
        let shape = ModelShape::with_adapters(&architecture, &[], false, Precision::F32);
        let memory = |tokens| forecast_memory(&shape, 1000, tokens, Recompute::NONE);
        assert_eq!(
            memory(600).weights.0,
            (512 + 4 * 64 + 3 * 128 + 3 * 8) * (4 + 12)
        );
        assert_eq!(
            (memory(500).trained.0, memory(600).trained.0),
            (16_000, 20_000)
        );
    }

    /// Blocks below the lowest adapter keep nothing, and are never computed again.
    #[test]
    fn only_walked_blocks_count() {
        let ((all, _), (upper, trained)) = (smollm2(0, false), smollm2(20, false));
        let of = |shape: &ModelShape, recompute| {
            forecast_memory(shape, trained, 64, recompute).activations.0
        };
        assert_eq!(3 * of(&upper, Recompute::NONE), of(&all, Recompute::NONE));
        assert_eq!(
            of(&upper, Recompute::lowest(10)),
            of(&upper, Recompute::ALL)
        );
    }

    /// A mask of a bit for each number that an adapter reads: six times 576 and once 1536.
    #[test]
    fn masks_are_kept() {
        let of = |dropout| {
            forecast_memory(&smollm2(0, dropout).0, 0, 100, Recompute::NONE)
                .activations
                .0
        };
        assert_eq!(of(true) - of(false), 30 * 100 * (6 * 576 + 1536) / 8);
    }

    #[test]
    fn the_fewest_blocks_that_fit_are_computed_again() {
        let (shape, trained) = smollm2(0, false);
        let peak = |blocks: usize| {
            forecast_memory(&shape, trained, 1024, Recompute::lowest(blocks)).peak()
        };
        let least = |free: Bytes| least_recompute(&shape, trained, 1024, free).count(30);
        assert_eq!(least(peak(0)), 0);
        assert_eq!(least(Bytes(peak(0).0 - 1)), 1);
        for blocks in [1, 8, 29] {
            assert_eq!(
                (least(peak(blocks)), least(Bytes(peak(blocks).0 - 1))),
                (blocks, if blocks == 29 { 29 } else { blocks + 1 })
            );
        }
        // Nothing fits: the least of all.
        assert_eq!(least(Bytes(0)), 29);
    }
}

//! What a served model streams and computes in a pass over a batch of sequences, in closed form.
//!
//! Takes an [`Architecture`] with the stored formats of its weights, returns integers: bytes read from memory, FLOPs of matrix
//! products and attention, vector operations that unpack stored blocks. Every matrix is read once a pass and the keys and values of
//! every sequence once; activations, norms and softmax are left out. Knows nothing of devices.

use std::collections::BTreeMap;
use std::ops::Range;

use super::architecture::{Architecture, TensorShape};
use crate::adapter::Adaptation;
use crate::ops::{Rope, StoredFormat};
use crate::work::Precision;

/// A pass over a batch: `sequences` times `tokens` tokens, each sequence with `cached` keys and values before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Sequences of the batch.
    pub sequences: u64,
    /// New tokens of each.
    pub tokens: u64,
    /// Tokens of each that the KV cache holds.
    pub cached: u64,
}

/// What a pass takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PassCost {
    /// FLOPs of matrix products and attention.
    pub flops: u64,
    /// Operations that unpack stored blocks.
    pub unpack_operations: u64,
    /// Bytes read: weights, rows of the embedding, keys and values.
    pub bytes: u64,
}

/// A model in use: its stored bytes, and what its passes follow from.
#[derive(Debug, Clone, PartialEq)]
pub struct ServedShape {
    /// Type of the matrix products.
    pub precision: Precision,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Blocks.
    pub blocks: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Bytes that every pass reads.
    streamed: u64,
    unpack: u64,
    /// Stacks of experts, of which a pass reads those of its tokens.
    experts: Experts,
    embedding_row: u64,
    /// Weights that a token is multiplied by, and those that give its logits.
    block_parameters: u64,
    head_parameters: u64,
    /// Bytes of a key and its value in a layer, and FLOPs of attending to it.
    kv_bytes: u64,
    key_flops: u64,
    /// Layers by sliding window.
    windows: BTreeMap<Option<usize>, u64>,
    /// Lengths after which all positions rotate by other frequencies (LongRoPE), so that no cached key fits.
    rotation_ends: Vec<u64>,
}

/// The stacks of experts of all blocks.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Experts {
    bytes: u64,
    unpack: u64,
    /// Share of the experts that a token passes through.
    share: f64,
}

impl ServedShape {
    /// The model with products in `precision`, its weights in their `stored_formats`, others in `precision`.
    pub fn new(architecture: &Architecture, precision: Precision) -> Self {
        Self::of_blocks(architecture, precision, 0..architecture.num_hidden_layers)
    }

    /// These blocks of the model, with the embedding before its first and the head after its last block.
    pub fn of_blocks(
        architecture: &Architecture,
        precision: Precision,
        blocks: Range<usize>,
    ) -> Self {
        let a = architecture;
        let mut shape = Self::of_size(0, precision);
        let attention = &a.attention;
        let element = precision.size();
        shape.blocks = blocks.len();
        shape.hidden_size = a.hidden_size;
        shape.kv_bytes = 2 * (attention.kv_heads * attention.head_dim) as u64 * element;
        shape.key_flops = 4 * (attention.heads * attention.head_dim) as u64;
        shape.experts.share = a
            .experts
            .map_or(0.0, |sizes| sizes.per_token as f64 / sizes.count as f64);
        for layer in &a.layers[blocks.clone()] {
            *shape.windows.entry(layer.window).or_default() += 1;
        }
        let ends = a.ropes.iter().filter_map(Rope::long_above);
        shape.rotation_ends = ends.map(|length| length as u64).collect();
        for tensor in a.tensors() {
            match a.names.layer_of(&tensor.name) {
                Some(layer) if blocks.contains(&layer) => shape.add_of_block(a, &tensor),
                Some(_) => {}
                None => shape.add_of_ends(a, &tensor, &blocks),
            }
        }
        shape
    }

    /// A model of which only the size is known: every weight read and multiplied once a token.
    pub fn of_size(parameters: u64, precision: Precision) -> Self {
        let bytes = parameters * precision.size();
        Self {
            precision,
            weight_bytes: bytes,
            blocks: 0,
            hidden_size: 0,
            streamed: bytes,
            unpack: 0,
            experts: Experts::default(),
            embedding_row: 0,
            block_parameters: parameters,
            head_parameters: 0,
            kv_bytes: 0,
            key_flops: 0,
            windows: BTreeMap::new(),
            rotation_ends: Vec::new(),
        }
    }

    /// The model with keys and values in `precision`.
    pub fn with_cache_of(mut self, precision: Precision) -> Self {
        self.kv_bytes = self.kv_bytes / self.precision.size() * precision.size();
        self
    }

    /// The model with an unmerged adapter, whose factors are f32.
    pub fn with_adapter(mut self, architecture: &Architecture, adaptation: &Adaptation) -> Self {
        for site in &adaptation.sites {
            let weights = (site.r * (site.in_features + site.out_features)) as u64;
            self.weight_bytes += 4 * weights;
            self.streamed += 4 * weights;
            if site.path == architecture.output_embedding() {
                self.head_parameters += weights;
            } else {
                self.block_parameters += weights;
            }
        }
        self
    }

    fn add_of_block(&mut self, a: &Architecture, tensor: &TensorShape) {
        let (bytes, unpack) = self.stored(a, tensor);
        let parameters = tensor.parameters();
        self.weight_bytes += bytes;
        if tensor.shape.len() == 3 {
            self.block_parameters += (parameters as f64 * self.experts.share).round() as u64;
            self.experts.bytes += bytes;
            self.experts.unpack += unpack;
            return;
        }
        if tensor.shape.len() == 2 {
            self.block_parameters += parameters;
        }
        self.streamed += bytes;
        self.unpack += unpack;
    }

    /// Adds a tensor outside the blocks: a table, of which a pass reads rows, or the head.
    fn add_of_ends(&mut self, a: &Architecture, tensor: &TensorShape, blocks: &Range<usize>) {
        let (bytes, unpack) = self.stored(a, tensor);
        let [head, embed_tokens] = a.tied_tensors();
        let is_table = tensor.name == embed_tokens;
        let is_head = tensor.name == head || (is_table && a.tie_word_embeddings);
        let [first, last] = [blocks.start == 0, blocks.end == a.num_hidden_layers];
        if (is_head && last) || (tensor.name != head && first) {
            self.weight_bytes += bytes;
        }
        if is_table && first {
            self.embedding_row = bytes / (a.vocab_size as u64).max(1);
        }
        if is_head && last {
            self.head_parameters += tensor.parameters();
            self.streamed += bytes;
            self.unpack += unpack;
        }
    }

    /// Bytes of a tensor, and operations that unpack it.
    fn stored(&self, a: &Architecture, tensor: &TensorShape) -> (u64, u64) {
        let parameters = tensor.parameters();
        let format = a.stored_formats.get(&tensor.name);
        let (Some(format), [.., columns]) = (format, tensor.shape.as_slice()) else {
            return (parameters * self.precision.size(), 0);
        };
        let block = format.block_size(*columns);
        let bytes = parameters.div_ceil(block.values) * block.bytes;
        let as_they_are = is_type(*format, self.precision) || tensor.shape.len() < 2;
        let operations = if as_they_are {
            0
        } else {
            format.decode_operations() as u64
        };
        (bytes, parameters * operations)
    }

    /// Bytes of keys and values of a sequence of `tokens` tokens.
    pub fn cache_bytes(&self, tokens: u64) -> u64 {
        self.keys(|window| window.map_or(tokens, |window| tokens.min(window as u64)))
            * self.kv_bytes
    }

    /// The sum of `keys(window)` over the layers.
    fn keys(&self, keys: impl Fn(Option<usize>) -> u64) -> u64 {
        let layers = self.windows.iter();
        layers.map(|(window, count)| count * keys(*window)).sum()
    }

    /// The pass that gives each sequence its next token when `before` of its tokens are cached; all of them again where their rotations
    /// end.
    pub fn next_token(&self, sequences: u64, before: u64) -> Pass {
        let again = self.rotation_ends.contains(&before);
        Pass {
            sequences,
            tokens: if again { before + 1 } else { 1 },
            cached: if again { 0 } else { before },
        }
    }

    /// The cost of a pass that ends with the logits of each sequence's last token.
    pub fn cost(&self, pass: Pass) -> PassCost {
        let Pass {
            sequences,
            tokens,
            cached,
        } = pass;
        let rows = sequences * tokens;
        // Token i attends to itself and the keys before it, at most a window of them.
        let attended = self.keys(|window| {
            let window = window.map_or(u64::MAX, |window| window as u64);
            let growing = window.saturating_sub(cached).min(tokens);
            growing * cached
                + growing * (growing + 1) / 2
                + (tokens - growing) * window.min(cached + tokens)
        });
        let touched = self.keys(|window| {
            let window = window.map_or(u64::MAX, |window| window as u64);
            (cached + tokens).min(window.max(tokens))
        });
        let experts = 1.0 - (1.0 - self.experts.share).powf(rows as f64);
        let of_experts = |all: u64| (all as f64 * experts).round() as u64;
        PassCost {
            flops: 2 * (self.block_parameters * rows + self.head_parameters * sequences)
                + self.key_flops * attended * sequences,
            unpack_operations: self.unpack + of_experts(self.experts.unpack),
            bytes: self.streamed
                + of_experts(self.experts.bytes)
                + self.embedding_row * rows
                + self.kv_bytes * touched * sequences,
        }
    }
}

/// Whether products in `precision` take stored values as they are: those of 16 bits in either type, converted once on loading.
fn is_type(format: StoredFormat, precision: Precision) -> bool {
    format.is_float() && format.bytes_of(1) as u64 == precision.size()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Architecture {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 352,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": false,
            "hidden_act": "silu", "torch_dtype": "bfloat16",
        });
        Architecture::from_config(&config).unwrap()
    }

    #[test]
    fn a_decode_step_reads_the_stored_bytes_and_the_cache_to_the_byte() {
        // Block: q and o 2 x 128 x 128, k and v 2 x 64 x 128, gate, up and down 3 x 352 x 128: 184 320; norms 2 x 128. Head 1024 x 128.
        // Eight bits with a scale of 16 for 32 values: 34 / 32 bytes a weight.
        let mut a = llama();
        let format = |tensor: TensorShape| {
            let is_matrix = tensor.shape.len() == 2;
            let format = if is_matrix {
                StoredFormat::Q8_0
            } else {
                StoredFormat::F32
            };
            (tensor.name, format)
        };
        a.stored_formats = a.tensors().into_iter().map(format).collect();
        let shape = ServedShape::new(&a, Precision::Bf16);
        let blocks = 4 * (184_320 * 34 / 32 + 2 * 128 * 4);
        let head = 1024 * 128 * 34 / 32;
        assert_eq!(shape.weight_bytes, blocks + 2 * head + 128 * 4);
        // Three sequences with 10 keys and the new one: k and v of 2 x 32 in 2 bytes, 4 layers. A row of the table each.
        let cost = shape.cost(shape.next_token(3, 10));
        let cache = 3 * 11 * 4 * 256;
        assert_eq!(cost.bytes, blocks + head + 3 * (128 * 34 / 32) + cache);
        let attention = 4 * 128 * 4;
        assert_eq!(
            cost.flops,
            3 * (2 * (4 * 184_320 + 1024 * 128) + attention * 11)
        );
        // Two operations unpack a weight, once a pass.
        assert_eq!(cost.unpack_operations, 2 * (4 * 184_320 + 1024 * 128));
        let prompt = Pass {
            sequences: 1,
            tokens: 3,
            cached: 0,
        };
        let products = 2 * (3 * 4 * 184_320 + 1024 * 128);
        assert_eq!(shape.cost(prompt).flops, products + attention * (1 + 2 + 3));
    }

    #[test]
    fn parts_of_a_model_sum_to_it_and_windows_end_the_cache() {
        let a = llama();
        let cost = |shape: &ServedShape| shape.cost(shape.next_token(2, 5));
        let all = cost(&ServedShape::new(&a, Precision::Bf16));
        let part = |blocks| cost(&ServedShape::of_blocks(&a, Precision::Bf16, blocks));
        let [front, back] = [part(0..1), part(1..4)];
        assert_eq!(front.bytes + back.bytes, all.bytes);
        assert_eq!(front.flops + back.flops, all.flops);
        let mut windowed = a.clone();
        windowed.layers[0].window = Some(3);
        let shape = ServedShape::new(&windowed, Precision::Bf16);
        // One layer of four keeps 3 of 6 keys of 256 bytes.
        assert_eq!(all.bytes - cost(&shape).bytes, 2 * 3 * 256);
        assert_eq!(shape.cache_bytes(6), (3 * 6 + 3) * 256);
    }
}

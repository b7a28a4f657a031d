//! config.json -> `Architecture`; `Architecture` -> `Work` per step; weights; one decoder or encoder
//! driven by the configuration.
//!
//! Owns the sizes, tensor names and layers of a decoder, its forward and
//! backward passes, and generation. Knows nothing of files on the hub, data sets, optimizers or
//! energy. The forward pass saves each layer's activations; the backward pass visits the layers in
//! reverse, frees them, and ends where nothing below is trained. On a CPU threads share the
//! products of a large model, and take shards of a small model's batch (data parallelism).

mod architecture;
mod backward;
mod batch;
mod block;
mod builder;
mod classify;
mod config;
mod cost;
mod decoder;
mod embedding;
mod encoder_config;
mod expert_sizes;
mod families;
mod family;
mod generate;
mod gguf;
mod head;
mod kv_cache;
mod linears;
mod memory;
mod names;
mod quantized_files;
mod recompute;
mod residual;
mod rope_config;
mod serving;
mod stored;
#[cfg(test)]
mod tests;
mod trainable;
mod trained;
mod weights;

pub use architecture::{Architecture, Biases, ConfigDropout, LayerKind, QkNorm, TensorShape};
pub use batch::Batch;
pub use block::Dropout;
pub use builder::WeightSource;
pub use cost::ModelShape;
pub use decoder::{BackwardOptions, BatchLosses, Decoder};
pub use embedding::{EmbeddingParts, LearnedPositions, TokenTypes};
pub use expert_sizes::ExpertSizes;
pub use generate::{Sampling, Session};
pub use gguf::{Family, ROPE_DIVISORS, is_gguf, read_content};
pub use head::{Classified, ClassifierHead, Head, Pooling, ProblemType};
pub use memory::{MemoryForecast, forecast_memory, least_recompute};
pub use names::{ExpertNames, LinearNames, ModuleNames};
pub use recompute::Recompute;
pub use residual::BranchNorms;
pub use serving::{Pass, PassCost, ServedShape};
pub(crate) use stored::StoredTensor;
pub use trainable::{AdapterStart, TrainableModel, initial_values};
pub use weights::{Weights, random_tensor};

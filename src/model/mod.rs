//! config.json -> `Architecture`; `Architecture` -> `Work` per step; weights; one decoder driven by the configuration.
//!
//! Owns what a Llama-architecture decoder is: sizes, tensor names, layers, forward and backward through them, generation. Knows nothing of
//! files on the hub, data sets, optimizers or energy. The decoder walks its layers forward keeping each one's `Saved`, and backwards
//! freeing it; where nothing below a layer is trained the walk ends. On a processor threads share the products of a large model, and take parts
//! of a small one's batch.

mod architecture;
mod batch;
mod block;
mod config;
mod cost;
mod decoder;
mod generate;
mod linears;
mod memory;
mod stored;
mod trainable;
mod weights;

pub use architecture::{Architecture, Biases, TensorShape};
pub use batch::Batch;
pub use block::Dropout;
pub use cost::{ModelShape, Recompute};
pub use decoder::{Decoder, WeightSource};
pub use generate::{Sampling, Session};
pub use linears::Linears;
pub use memory::{MemoryForecast, forecast_memory, least_recompute};
pub(crate) use stored::StoredTensor as Source;
pub use trainable::{TrainableModel, initial_factors};
pub use weights::{Weights, random_tensor};

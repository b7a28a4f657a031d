//! How much memory a run will take at its peak, from sizes alone.

use super::architecture::Architecture;
use super::cost::Recompute;
use crate::ops::dtype;
use crate::units::Bytes;
use crate::work::Precision;

/// The parts of a run's peak memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryForecast {
    /// Frozen weights in the compute type.
    pub weights: Bytes,
    /// Trained values, moments and gradients in f32.
    pub trained: Bytes,
    /// What the backward pass keeps of the forward pass.
    pub activations: Bytes,
    /// Chunks of logits and the largest temporaries.
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

/// Resident memory of the program before any tensor: measured with `wattune devices` at 30-40 MiB, rounded up.
const PROGRAM: u64 = 48 << 20;
/// One chunk of logits, which becomes its gradient (see `ops::Head`): at most 32 MiB.
const LOGITS: u64 = 32 << 20;

/// The peak of a step with `tokens` tokens in a micro-batch, `trained` trained numbers beside (or instead of) the frozen ones.
pub fn forecast_memory(
    a: &Architecture,
    trained: u64,
    frozen: bool,
    tokens: usize,
    recompute: Recompute,
    precision: Precision,
) -> MemoryForecast {
    let n = tokens as u64;
    let (c, f, layers) = (a.hidden_size as u64, a.intermediate_size as u64, a.num_hidden_layers as u64);
    let (q, kv) = ((a.attention.heads * a.attention.head_dim) as u64, (a.attention.kv_heads * a.attention.head_dim) as u64);
    let size = dtype(precision).size_in_bytes() as u64;
    // Kept by a block in the compute type: input, q, k, v, the mix, x1, gate, up.
    let block = size * n * (2 * c + 2 * q + 2 * kv + 2 * f);
    let activations = match recompute {
        Recompute::Nothing => layers * block,
        Recompute::Blocks => layers * 4 * n * c + block,
    };
    let weights = if frozen { a.parameters() * size } else { 0 };
    MemoryForecast {
        weights: Bytes(weights),
        trained: Bytes(trained * 20),
        activations: Bytes(activations),
        temporaries: Bytes(LOGITS + 4 * n * (4 * f + 4 * c)),
        program: Bytes(PROGRAM),
    }
}

//! Energy and time of requests that a model answers on a device: the prompt in one pass, then one pass a token.
//!
//! Takes a [`ServedShape`] and a profile, returns the cost of one request of a batch that runs together. Each pass is charged as a
//! ledger entry is. Where weights and cache fit into the last cache level, no byte of them comes from main memory.

use crate::energy::{Charge, Profile};
use crate::model::{Pass, ServedShape};
use crate::units::{Bytes, Joules, Seconds};

/// The size of a request, and how many run together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestSize {
    /// Tokens of the prompt, at least one.
    pub prompt: usize,
    /// Tokens of the answer, at least one.
    pub generated: usize,
    /// Requests of a batch, at least one.
    pub batch: usize,
}

/// What a batch of requests takes.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestCost {
    /// The prompts, which give the first generated token of each.
    pub prompt: Charge,
    /// Prompts and further tokens.
    pub total: Charge,
    batch: f64,
}

impl RequestCost {
    /// Of a batch of requests of this size.
    pub fn new(profile: &Profile, shape: &ServedShape, size: RequestSize) -> Self {
        let RequestSize {
            prompt,
            generated,
            batch,
        } = size;
        let sequences = batch as u64;
        let resident = resident(shape, size);
        let charge = |pass: Pass| {
            let cost = shape.cost(pass);
            profile.charge_without_bytes(&profile.streamed_totals(
                shape.precision,
                cost.flops,
                cost.unpack_operations,
                Bytes(cost.bytes),
                resident,
            ))
        };
        let prompts = charge(Pass {
            sequences,
            tokens: prompt as u64,
            cached: 0,
        });
        let mut total = prompts.clone();
        for before in prompt..prompt + generated - 1 {
            total += &charge(shape.next_token(sequences, before as u64));
        }
        Self {
            prompt: prompts,
            total,
            batch: batch as f64,
        }
    }

    /// Energy of one request.
    pub fn energy(&self) -> Joules {
        self.share(self.total.energy.joules())
    }

    /// Energy of one request's prompt.
    pub fn prompt_energy(&self) -> Joules {
        self.share(self.prompt.energy.joules())
    }

    /// One request's share of the batch's `energy`.
    pub fn share(&self, energy: Joules) -> Joules {
        energy / self.batch
    }

    /// FLOPs of one request.
    pub fn flops(&self) -> u64 {
        (self.total.flops as f64 / self.batch).round() as u64
    }

    /// Time from the prompt to the last token.
    pub fn latency(&self) -> Seconds {
        self.total.time
    }
}

/// Memory of the weights and of the keys and values of a batch at its end.
pub fn resident(shape: &ServedShape, size: RequestSize) -> Bytes {
    let tokens = (size.prompt + size.generated) as u64;
    Bytes(shape.weight_bytes + size.batch as u64 * shape.cache_bytes(tokens))
}

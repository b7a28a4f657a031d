//! The seven linear layers of a block, by their names in the checkpoint.

use crate::error::Result;

/// One value for each linear layer of a block: a layer, its saved tensors, its shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Linears<T> {
    /// `self_attn.q_proj`
    pub q_proj: T,
    /// `self_attn.k_proj`
    pub k_proj: T,
    /// `self_attn.v_proj`
    pub v_proj: T,
    /// `self_attn.o_proj`
    pub o_proj: T,
    /// `mlp.gate_proj`
    pub gate_proj: T,
    /// `mlp.up_proj`
    pub up_proj: T,
    /// `mlp.down_proj`
    pub down_proj: T,
}

/// Their names inside a layer, in model order.
pub const LINEAR_NAMES: Linears<&str> = Linears {
    q_proj: "self_attn.q_proj",
    k_proj: "self_attn.k_proj",
    v_proj: "self_attn.v_proj",
    o_proj: "self_attn.o_proj",
    gate_proj: "mlp.gate_proj",
    up_proj: "mlp.up_proj",
    down_proj: "mlp.down_proj",
};

impl<T> Linears<T> {
    /// One value for each.
    pub fn map<U>(&self, f: impl Fn(&T) -> U) -> Linears<U> {
        let Self {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            gate_proj,
            up_proj,
            down_proj,
        } = self;
        Linears {
            q_proj: f(q_proj),
            k_proj: f(k_proj),
            v_proj: f(v_proj),
            o_proj: f(o_proj),
            gate_proj: f(gate_proj),
            up_proj: f(up_proj),
            down_proj: f(down_proj),
        }
    }

    /// One result for each, in model order.
    pub fn try_map<U>(&self, mut f: impl FnMut(&T) -> Result<U>) -> Result<Linears<U>> {
        Ok(Linears {
            q_proj: f(&self.q_proj)?,
            k_proj: f(&self.k_proj)?,
            v_proj: f(&self.v_proj)?,
            o_proj: f(&self.o_proj)?,
            gate_proj: f(&self.gate_proj)?,
            up_proj: f(&self.up_proj)?,
            down_proj: f(&self.down_proj)?,
        })
    }

    /// Each value, in model order.
    pub fn each(&self) -> [&T; 7] {
        [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ]
    }
}

/// Which parts of a block's backward pass are wanted.
///
/// A gradient flows only to where something is trained: the walk through the block ends as soon as nothing before it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// The block's own input gradient.
    pub input: bool,
    /// Back through attention to q, k and v.
    pub qkv: bool,
    /// Back through the MLP's norm into the residual stream.
    pub attention: bool,
    /// Back through the gate.
    pub gate: bool,
}

impl Needs {
    /// What is needed when `trains` says which layers hold trained values and `input` whether anything before the block does.
    pub fn new(trains: &Linears<bool>, input: bool) -> Self {
        let qkv = input || trains.q_proj || trains.k_proj || trains.v_proj;
        let attention = qkv || trains.o_proj;
        Self {
            input,
            qkv,
            attention,
            gate: attention || trains.gate_proj || trains.up_proj,
        }
    }
}

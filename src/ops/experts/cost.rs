//! Work of a mixture of experts, from shapes alone: every token is at k experts, so the rows of
//! their products are known before the routing is. Traffic is that of even routing.

use crate::ops::{Activation, columns_cost};
use crate::work::{Precision, Work};

/// Everything that the cost of a mixture of experts depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsShape {
    /// N.
    pub tokens: usize,
    /// C.
    pub hidden: usize,
    /// F, channels inside an expert.
    pub inner: usize,
    /// E.
    pub experts: usize,
    /// k.
    pub per_token: usize,
    /// Of gate.
    pub activation: Activation,
    /// Which of router, gate and up, and down are trained.
    pub trained: [bool; 3],
}

impl ExpertsShape {
    /// Rows of all experts: a token at each of its experts.
    fn rows(&self) -> usize {
        self.tokens * self.per_token
    }

    /// Products over the rows of all experts, shared evenly; `product` is that of an expert with
    /// this many rows.
    fn products(&self, product: impl Fn(usize) -> Work) -> Work {
        let rows = self.rows();
        let used = self.experts.min(rows).max(1);
        let more = rows % used;
        product(rows / used).times((used - more) as u64)
            + product(rows / used + 1).times(more as u64)
    }

    /// Elements that a pass saves: gate and up, and the outputs, of every row.
    pub fn saved_elements(&self) -> usize {
        self.rows() * (2 * self.inner + self.hidden)
    }

    /// Work of the forward pass.
    pub fn forward_cost(&self, precision: Precision) -> Work {
        let (n, c, f, e) = (self.tokens, self.hidden, self.inner, self.experts);
        let rows = self.rows();
        Work::product(n, e, c, Precision::F32)
            + Work::sweep(12 * n * e, 3 * n * e)
            + Work::sweep(8 * rows * c, 0)
            + self.products(|rows| Work::product(rows, 2 * f, c, precision))
            + columns_cost(rows, 2 * f)
            + self.activation.cost(rows * f, true)
            + self.products(|rows| Work::product(rows, c, f, precision))
            + Work::sweep(12 * rows * c, 2 * rows * c)
    }

    /// Work of the backward pass; `input`: with dx.
    pub fn backward_cost(&self, precision: Precision, input: bool) -> Work {
        let (n, c, f, e) = (self.tokens, self.hidden, self.inner, self.experts);
        let rows = self.rows();
        let [router, gate_up, down] = self.trained;
        let mut work = Work::sweep(20 * rows * c, 3 * rows * c)
            + Work::sweep(12 * n * e, 3 * n * e)
            + self.products(|rows| Work::product(rows, f, c, precision))
            + self.activation.backward_cost(rows * f, true)
            + columns_cost(rows, 2 * f);
        if input {
            work += &Work::product(n, c, e, Precision::F32);
            work += &self.products(|rows| Work::product(rows, c, 2 * f, precision));
            work += &Work::sweep(8 * rows * c, rows * c);
        }
        if router {
            work += &Work::product(e, c, n, Precision::F32);
        }
        if gate_up {
            work += &self.products(|rows| Work::product(2 * f, c, rows, precision));
        }
        if down {
            work += &self.activation.cost(rows * f, true);
            work += &self.products(|rows| Work::product(c, f, rows, precision));
        }
        if gate_up || down {
            work += &Work::sweep(8 * rows * c, 0);
        }
        work
    }
}

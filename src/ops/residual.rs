//! The residual stream's additions. They are never a pass of their own: a product or a norm starts from what it is added to.

use crate::work::Work;

/// Work of adding (n, c) to what a product or norm gives: one more operand is read.
pub fn residual_cost(n: usize, c: usize) -> Work {
    Work::sweep(4 * n * c, n * c)
}

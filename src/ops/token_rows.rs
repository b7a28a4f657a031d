//! Trained rows that replace rows of a frozen table: the embedding, and the output embedding where the two are tied.
//!
//! With rows R (n, C) for the tokens t_1 ... t_n: row t_k of the table is R_k. The table is never copied: rows of x and columns of
//! logits are replaced.

use candle_core::{DType, Device, Tensor};

use super::{Context, Gradients, Weight, matmul};
use crate::error::{Error, Kind, Result};
use crate::work::{Precision, Work};

/// The rows, and where they belong.
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// R, (n, C).
    rows: Weight,
    /// t, (n).
    tokens: Tensor,
    /// (V): the row of each token; 0 for tokens without one.
    row_of: Tensor,
    /// (V): 1 for tokens with a row.
    has_row: Tensor,
}

/// Work of replacing the embeddings of n tokens of c.
pub fn token_rows_cost(n: usize, c: usize) -> Work {
    Work::sweep(12 * n * c, 0)
}

/// Work of the gradient of `rows` rows for n tokens of c.
pub fn token_rows_backward_cost(n: usize, c: usize, rows: usize) -> Work {
    Work::sweep(12 * n * c + 4 * rows * c, 2 * n * c)
}

/// Work of replacing `rows` columns of n rows of logits, with h (n, c).
pub(super) fn token_logits_cost(n: usize, c: usize, rows: usize, precision: Precision) -> Work {
    Work::product(n, rows, c, precision) + Work::sweep(12 * n * rows, 0)
}

/// Work of the gradient of `rows` rows, and with `input_gradient` of their part of dh.
pub(super) fn token_logits_backward_cost(
    n: usize,
    c: usize,
    rows: usize,
    precision: Precision,
    input_gradient: bool,
) -> Work {
    let work = Work::product(rows, c, n, precision) + Work::sweep(12 * n * rows, 0);
    if !input_gradient {
        return work;
    }
    work + Work::product(n, c, rows, precision) + Work::sweep(12 * n * c, n * c)
}

impl TokenRows {
    /// `rows` (n, C) for the distinct `tokens` (n) of a table of `vocab` rows.
    ///
    /// # Errors
    /// A token beyond the table.
    pub fn new(rows: Weight, tokens: &[u32], vocab: usize, device: &Device) -> Result<Self> {
        let mut row_of = vec![0u32; vocab];
        let mut has_row = vec![0f32; vocab];
        for (row, token) in (0..).zip(tokens) {
            let (Some(of), Some(has)) = (
                row_of.get_mut(*token as usize),
                has_row.get_mut(*token as usize),
            ) else {
                return Err(Error::new(Kind::Tensor, "a token lies beyond the table")
                    .value(token.to_string())
                    .rule(format!("below {vocab}")));
            };
            (*of, *has) = (row, 1.0);
        }
        Ok(Self {
            rows,
            tokens: Tensor::from_slice(tokens, tokens.len(), device)?,
            row_of: Tensor::from_vec(row_of, vocab, device)?,
            has_row: Tensor::from_vec(has_row, vocab, device)?,
        })
    }

    /// n.
    pub fn len(&self) -> usize {
        self.tokens.elem_count()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// x (N, C) of the embedded ids (N) with the rows in place.
    pub(super) fn replace(&self, context: Context<'_>, ids: &Tensor, x: &Tensor) -> Result<Tensor> {
        let (n, c) = x.dims2()?;
        context.counter.add(token_rows_cost(n, c));
        let rows = self
            .rows
            .tensor
            .index_select(&self.row_of.index_select(ids, 0)?, 0)?;
        let replaced = self.has_row.index_select(ids, 0)?.to_dtype(DType::U8)?;
        let replaced = replaced.unsqueeze(1)?.broadcast_as((n, c))?;
        Ok(replaced.where_cond(&rows, x)?)
    }

    /// Adds the gradient of the rows for dx (N, C) of the embedded ids (N).
    pub fn embedding_backward(
        &self,
        context: Context<'_>,
        ids: &Tensor,
        dx: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (n, c) = dx.dims2()?;
        context
            .counter
            .add(token_rows_backward_cost(n, c, self.len()));
        let kept = self.has_row.index_select(ids, 0)?.unsqueeze(1)?;
        let dx = dx.broadcast_mul(&kept)?;
        let zeros = Tensor::zeros((self.len(), c), DType::F32, dx.device())?;
        let sums = zeros.index_add(&self.row_of.index_select(ids, 0)?, &dx, 0)?;
        gradients.add(&self.rows, sums)
    }

    /// The logits (N, V) of h (N, C) with the columns of the rows in place. Counts no work.
    pub(super) fn replace_logits(
        &self,
        context: Context<'_>,
        h: &Tensor,
        logits: &Tensor,
    ) -> Result<Tensor> {
        let columns = matmul(context, h, &self.rows.tensor.t()?)?.to_dtype(logits.dtype())?;
        self.with_columns(logits, &columns)
    }

    /// Adds the gradient of the rows for dz (N, V) of the logits of h (N, C). Returns dz without their columns, and with
    /// `input_gradient` their part of dh. Counts no work.
    pub(super) fn logits_backward(
        &self,
        context: Context<'_>,
        h: &Tensor,
        dz: &Tensor,
        input_gradient: bool,
        gradients: &mut Gradients,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let columns = dz.index_select(&self.tokens, 1)?; // (N, n)
        let sums = matmul(context, &columns.t()?.contiguous()?, h)?;
        gradients.add(&self.rows, sums)?;
        let dh = input_gradient.then(|| matmul(context, &columns, &self.rows.tensor));
        let rest = self.with_columns(dz, &columns.zeros_like()?)?;
        Ok((rest, dh.transpose()?))
    }

    /// z (N, V) with other columns (N, n) at the tokens.
    fn with_columns(&self, z: &Tensor, columns: &Tensor) -> Result<Tensor> {
        let index = self.tokens.unsqueeze(0)?.broadcast_as(columns.shape())?;
        Ok(z.scatter(&index.contiguous()?, columns, 1)?)
    }
}

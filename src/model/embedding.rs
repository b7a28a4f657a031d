//! The input of the first block: rows of the token table, scaled; learned positions and token types
//! added to them; a norm.

use candle_core::Tensor;

use crate::error::Result;
use crate::ops::{
    Context, Gradients, Lora, Norm, NormSaved, Segments, Weight, add_scaled, embedding,
    embedding_backward, lora_embedding, lora_embedding_backward, scale,
};

/// What a model adds to the rows of its token table.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct EmbeddingParts {
    /// Learned positions.
    pub positions: Option<LearnedPositions>,
    /// Token types, of which every token has the first.
    pub token_types: Option<TokenTypes>,
    /// Name of the norm of the sum, inside the base.
    pub norm: Option<&'static str>,
}

/// A table of positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LearnedPositions {
    /// Its name, inside the base.
    pub name: &'static str,
    /// Its rows.
    pub rows: usize,
    /// The row of a segment's first token.
    pub first: usize,
}

/// A table of token types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenTypes {
    /// Its name, inside the base.
    pub name: &'static str,
    /// Its rows.
    pub rows: usize,
}

/// The tables and the norm.
#[derive(Debug)]
pub(super) struct Embedding {
    /// (V, C).
    pub(super) tokens: Weight,
    /// On `tokens`.
    pub(super) lora: Option<Lora>,
    /// (P, C).
    pub(super) positions: Option<Weight>,
    /// The row of a segment's first token in `positions`.
    pub(super) first_position: usize,
    /// (T, C).
    pub(super) token_types: Option<Weight>,
    pub(super) norm: Option<Norm>,
}

/// Saved by [`Embedding::forward`] for the backward pass.
pub(super) struct EmbeddingSaved {
    /// Rows of the positions and of the token types (N), u32.
    tables: [Option<Tensor>; 2],
    norm: Option<NormSaved>,
}

impl Embedding {
    /// ids (N) of these segments, each from position `start` -> (N, C). `factor`: of the rows of
    /// `tokens`.
    pub(super) fn forward(
        &self,
        context: Context<'_>,
        ids: &Tensor,
        factor: f64,
        segments: &Segments,
        start: usize,
    ) -> Result<(Tensor, EmbeddingSaved)> {
        let mut rows = embedding(context, ids, &self.tokens)?;
        if let Some(lora) = &self.lora {
            rows = lora_embedding(context, ids, &rows, lora)?;
        }
        let mut x = scale(context, &rows, factor)?;
        drop(rows);
        let mut tables = [None, None];
        if let Some(table) = &self.positions {
            let rows = self.position_rows(segments, start);
            let rows = Tensor::from_vec(rows, ids.dims1()?, ids.device())?;
            x = add_scaled(context, &x, &embedding(context, &rows, table)?, 1.0)?;
            tables[0] = Some(rows);
        }
        if let Some(table) = &self.token_types {
            let rows = ids.zeros_like()?;
            x = add_scaled(context, &x, &embedding(context, &rows, table)?, 1.0)?;
            tables[1] = Some(rows);
        }
        let mut norm = None;
        if let Some(of_sum) = &self.norm {
            let (y, saved) = of_sum.forward_groups(context, &x)?;
            (x, norm) = (y, Some(saved));
        }
        Ok((x, EmbeddingSaved { tables, norm }))
    }

    /// The rows of the positions of these segments' tokens.
    fn position_rows(&self, segments: &Segments, start: usize) -> Vec<u32> {
        let first = (self.first_position + start) as u32;
        let ranges = segments.ranges().iter();
        ranges
            .flat_map(|range| (0..range.len() as u32).map(move |i| first + i))
            .collect()
    }

    /// dx (N, C): adds the gradients of the trained parts.
    pub(super) fn backward(
        &self,
        context: Context<'_>,
        ids: &Tensor,
        factor: f64,
        dx: Tensor,
        saved: &EmbeddingSaved,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let dx = match self.norm.as_ref().zip(saved.norm.as_ref()) {
            Some((norm, saved)) => norm.backward_groups(context, &dx, saved, gradients)?,
            None => dx,
        };
        let tables = [self.positions.as_ref(), self.token_types.as_ref()];
        for (table, rows) in tables.into_iter().zip(&saved.tables) {
            if let (Some(table), Some(rows)) = (table, rows)
                && table.is_trained()
            {
                embedding_backward(context, rows, &dx, table, gradients)?;
            }
        }
        let token_rows = self.tokens.token_rows();
        if !self.tokens.is_trained() && self.lora.is_none() && token_rows.is_none() {
            return Ok(());
        }
        let dx = scale(context, &dx, factor)?;
        if self.tokens.is_trained() {
            embedding_backward(context, ids, &dx, &self.tokens, gradients)?;
        }
        if let Some(rows) = token_rows {
            rows.embedding_backward(context, ids, &dx, gradients)?;
        }
        match &self.lora {
            Some(lora) => lora_embedding_backward(context, ids, &dx, lora, gradients),
            None => Ok(()),
        }
    }
}

//! Work before and behind the blocks: the embedding, the last norm and the head.

use super::ModelShape;
use crate::model::architecture::LinearSpec;
use crate::model::head::{ClassifierHead, ClassifierShape};
use crate::model::trained::TrainedLinear;
use crate::ops::{
    LinearShape, LmHeadShape, add_scaled_cost, embedding_backward_cost, embedding_cost,
    gather_cost, lora_embedding_backward_cost, lora_embedding_cost, norm_backward_cost, norm_cost,
    scale_cost, token_rows_backward_cost, token_rows_cost,
};
use crate::work::Work;

impl ModelShape {
    /// Work of the head's losses, and of their gradients with `input_gradient` or without; `None`: no
    /// gradients.
    pub(super) fn head_cost(&self, loss_tokens: usize, input_gradient: Option<bool>) -> Work {
        let a = &self.architecture;
        if let Some(head) = a.classifier_head() {
            let shape = self.classifier_shape(head, loss_tokens);
            let backward = input_gradient.map(|input| shape.backward_cost(input));
            return backward.unwrap_or_else(|| shape.forward_cost());
        }
        let mut shape = self.lm_head(loss_tokens);
        shape.dropout = self.dropout && shape.lora.is_some() && input_gradient.is_some();
        let backward = input_gradient.map(|input| shape.backward_cost(self.precision, input));
        backward.unwrap_or_else(|| shape.forward_cost(self.precision))
    }

    pub(super) fn lm_head(&self, loss_tokens: usize) -> LmHeadShape {
        let a = &self.architecture;
        LmHeadShape {
            loss_tokens,
            hidden: a.hidden_size,
            vocab: a.vocab_size,
            stored: self.head.last().and_then(|output| output.stored),
            trained: self.trained_embeddings()[1],
            bias: a.biases.lm_head,
            bias_trained: self.head.last().is_some_and(|output| output.bias),
            token_rows: self.token_rows[1],
            lora: self.head.last().and_then(|output| output.lora),
            dropout: false,
            softcap: a.logits_softcap.is_some(),
        }
    }

    pub(super) fn classifier_shape(
        &self,
        head: &ClassifierHead,
        loss_tokens: usize,
    ) -> ClassifierShape {
        let layers = self.architecture.head_linears().into_iter().zip(&self.head);
        let layer = |(layer, trained): (LinearSpec, &TrainedLinear)| LinearShape {
            in_features: layer.in_features,
            out_features: layer.out_features,
            bias: layer.bias,
            ..trained.shape(loss_tokens, self.dropout)
        };
        let mut layers: Vec<LinearShape> = layers.map(layer).collect();
        let output = layers.remove(layers.len() - 1);
        ClassifierShape {
            dense: layers.pop(),
            activation: head.activation,
            output,
            precision: self.precision,
            loss: head.problem_type.loss(),
            weighted: head.is_weighted(),
        }
    }

    pub(super) fn embed_cost(&self, tokens: usize) -> Work {
        let (a, parts) = (&self.architecture, &self.architecture.embedding_parts);
        let c = a.hidden_size;
        let lora = self
            .embedding
            .lora
            .map(|lora| lora_embedding_cost(tokens, c, lora.r));
        let mut work = embedding_cost(tokens, c, self.embedding.stored)
            + lora.unwrap_or_default()
            + scale_cost(tokens, c, a.embedding_factor(self.precision));
        let tables =
            usize::from(parts.positions.is_some()) + usize::from(parts.token_types.is_some());
        work +=
            &(embedding_cost(tokens, c, None) + add_scaled_cost(tokens, c)).times(tables as u64);
        if parts.norm.is_some() {
            work += &norm_cost(a.norm_kind, tokens, c);
        }
        if self.token_rows[0] > 0 {
            work += &token_rows_cost(tokens, c);
        }
        work
    }

    /// Backward of the embedding, of which something is trained.
    pub(super) fn embedding_backward(&self, n: usize) -> Work {
        let (a, parts) = (&self.architecture, &self.architecture.embedding_parts);
        let (c, trained) = (a.hidden_size, self.embedding);
        let mut work = Work::default();
        if parts.norm.is_some() {
            work += &norm_backward_cost(a.norm_kind, n, c, trained.norm);
        }
        let positions = parts.positions.filter(|_| trained.positions);
        let token_types = parts.token_types.filter(|_| trained.token_types);
        let rows = positions.map(|table| table.rows).into_iter();
        for rows in rows.chain(token_types.map(|table| table.rows)) {
            work += &embedding_backward_cost(n, c, rows);
        }
        let token_rows = self.token_rows[0];
        if trained.tokens || trained.lora.is_some() || token_rows > 0 {
            work += &scale_cost(n, c, a.embedding_factor(self.precision));
        }
        if trained.tokens {
            work += &embedding_backward_cost(n, c, a.vocab_size);
        }
        if token_rows > 0 {
            work += &token_rows_backward_cost(n, c, token_rows);
        }
        if let Some(lora) = trained.lora {
            work += &lora_embedding_backward_cost(n, c, lora.r, a.vocab_size);
        }
        work
    }

    /// Work of the norm before the head on `rows` rows, if there is one.
    pub(super) fn last_norm_cost(&self, rows: usize) -> Work {
        let a = &self.architecture;
        let norm = a
            .names
            .norm
            .map(|_| norm_cost(a.norm_kind, rows, a.hidden_size));
        norm.unwrap_or_default()
    }

    /// The rows with a loss, and the norm before the output embedding.
    pub(super) fn final_norm(&self, loss_tokens: usize) -> Work {
        gather_cost(loss_tokens, self.architecture.hidden_size) + self.last_norm_cost(loss_tokens)
    }
}

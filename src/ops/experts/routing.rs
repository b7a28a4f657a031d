//! The router's choice: each token's k experts of highest probability, and their weights.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::error::Result;

/// The rows of a batch by expert. A row is a token at one of its k experts.
pub(super) struct Routes {
    /// Probabilities (N, E).
    probabilities: Vec<Vec<f32>>,
    /// Token and weight of each row, by expert and then token.
    rows: Vec<Row>,
    /// Rows of each expert.
    ranges: Vec<Range<usize>>,
    normalized: bool,
}

#[derive(Clone, Copy)]
struct Row {
    token: usize,
    expert: usize,
    weight: f32,
}

impl Routes {
    /// Chooses `per_token` experts by their probabilities (N, E): of equal ones the first. The
    /// weights are the probabilities, over their sum if `normalized`.
    pub(super) fn new(probabilities: &Tensor, per_token: usize, normalized: bool) -> Result<Self> {
        let experts = probabilities.dims2()?.1;
        let probabilities: Vec<Vec<f32>> = probabilities.to_vec2()?;
        let mut rows = Vec::with_capacity(probabilities.len() * per_token);
        for (token, p) in probabilities.iter().enumerate() {
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
            let chosen = &order[..per_token];
            let sum: f32 = chosen.iter().map(|expert| p[*expert]).sum();
            let total = if normalized { sum } else { 1.0 };
            rows.extend(chosen.iter().map(|&expert| Row {
                token,
                expert,
                weight: p[expert] / total,
            }));
        }
        rows.sort_by_key(|row| row.expert);
        let first = |expert: usize| rows.partition_point(|row| row.expert < expert);
        let ranges = (0..experts).map(|expert| first(expert)..first(expert + 1));
        Ok(Self {
            ranges: ranges.collect(),
            probabilities,
            rows,
            normalized,
        })
    }

    /// The rows of each expert that has any.
    pub(super) fn experts(&self) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let ranges = self.ranges.iter().cloned().enumerate();
        ranges.filter(|(_, range)| !range.is_empty())
    }

    /// The token of each row, u32.
    pub(super) fn tokens(&self, device: &Device) -> Result<Tensor> {
        let tokens: Vec<u32> = self.rows.iter().map(|row| row.token as u32).collect();
        Ok(Tensor::new(tokens, device)?)
    }

    /// The weight of each row, (rows, 1).
    pub(super) fn weights(&self, device: &Device) -> Result<Tensor> {
        let weights: Vec<f32> = self.rows.iter().map(|row| row.weight).collect();
        Ok(Tensor::from_vec(weights, (self.rows.len(), 1), device)?)
    }

    /// For each j below k the row of every token's j-th expert by number, u32 (N).
    pub(super) fn places(&self, device: &Device) -> Result<Vec<Tensor>> {
        let tokens = self.probabilities.len();
        let mut places = vec![Vec::with_capacity(self.rows.len() / tokens.max(1)); tokens];
        for (index, row) in self.rows.iter().enumerate() {
            places[row.token].push(index as u32);
        }
        let per_token = places.first().map_or(0, Vec::len);
        let column = |j: usize| places.iter().map(|places| places[j]).collect::<Vec<u32>>();
        let columns = (0..per_token).map(|j| Ok(Tensor::new(column(j), device)?));
        columns.collect()
    }

    /// The gradients of the rows' weights (rows) -> those of the router's logits (N, E), row-major:
    /// p_e (dp_e - sum p dp), with dp the gradients of the chosen probabilities.
    pub(super) fn logits_gradient(&self, d_weights: &[f32]) -> Vec<f32> {
        let experts = self.ranges.len();
        let tokens = self.probabilities.len();
        // Over a token's rows: sums of w dw, of p and of p dp.
        let mut w_dw = vec![0.0f32; tokens];
        let mut sums = vec![0.0f32; tokens];
        for (row, dw) in self.rows.iter().zip(d_weights) {
            w_dw[row.token] += row.weight * dw;
            sums[row.token] += self.probabilities[row.token][row.expert];
        }
        let mut dp = vec![0.0; tokens * experts];
        let mut p_dp = vec![0.0f32; tokens];
        for (row, dw) in self.rows.iter().zip(d_weights) {
            let d = if self.normalized {
                (dw - w_dw[row.token]) / sums[row.token]
            } else {
                *dw
            };
            dp[row.token * experts + row.expert] = d;
            p_dp[row.token] += self.probabilities[row.token][row.expert] * d;
        }
        for (token, p) in self.probabilities.iter().enumerate() {
            let dp = &mut dp[token * experts..][..experts];
            for (d, p) in dp.iter_mut().zip(p) {
                *d = p * (*d - p_dp[token]);
            }
        }
        dp
    }
}

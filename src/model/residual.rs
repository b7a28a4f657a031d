//! The residual form of a block's attention or feed-forward layers f: `x + factor n(f(n(x)))`, with
//! a norm before the layers (Llama), on their result (OLMo 2) or both (Gemma); or `n(x + factor f(x))`,
//! with the norm on the sum (BERT).
//!
//! Without a norm and a factor on the result, the last layer of f adds it to x itself.

use candle_core::Tensor;

use crate::error::Result;
use crate::ops::{
    Context, Gradients, LinearInput, Norm, NormKind, NormSaved, add_scaled, add_scaled_cost,
    norm_backward_cost, norm_cost, residual_cost, scale, scale_cost,
};
use crate::work::Work;

/// Names of the norms before and after the layers, inside the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BranchNorms {
    /// Before the layers.
    pub input: Option<&'static str>,
    /// On their result.
    pub output: Option<&'static str>,
    /// Whether `output` is on the sum of x and their result.
    pub on_sum: bool,
}

impl BranchNorms {
    /// A norm before the layers.
    pub(super) const fn before(input: &'static str) -> Self {
        Self {
            input: Some(input),
            output: None,
            on_sum: false,
        }
    }

    /// A norm on their result.
    pub(super) const fn after(output: &'static str) -> Self {
        Self {
            input: None,
            output: Some(output),
            on_sum: false,
        }
    }

    /// Both.
    pub(super) const fn around(input: &'static str, output: &'static str) -> Self {
        Self {
            input: Some(input),
            output: Some(output),
            on_sum: false,
        }
    }
}

/// The norms around the layers, and the factor of their result.
#[derive(Debug)]
pub(super) struct ResidualBranch {
    pub(super) input_norm: Option<Norm>,
    pub(super) output_norm: Option<Norm>,
    /// Whether the output norm is on the sum.
    pub(super) on_sum: bool,
    pub(super) factor: f64,
}

/// The gradients of the two terms of a branch's sum, (N, C) each.
pub(super) struct SumGradients {
    /// Of x.
    pub(super) residual: Tensor,
    /// Of the layers' result.
    pub(super) layers: Tensor,
}

impl ResidualBranch {
    /// Whether a norm is trained.
    pub(super) fn is_trained(&self) -> bool {
        let mut norms = [&self.input_norm, &self.output_norm].into_iter().flatten();
        norms.any(|norm| norm.is_trained())
    }

    /// x (N, C) -> the input of the layers; what is saved serves [`ResidualBranch::recompute_input`]
    /// and [`ResidualBranch::input_backward`].
    pub(super) fn input(
        &self,
        context: Context<'_>,
        x: &Tensor,
    ) -> Result<(LinearInput, NormSaved)> {
        let (h, saved) = match &self.input_norm {
            Some(norm) => norm.forward(context, x)?,
            None => {
                let saved = NormSaved::new(context, x)?;
                (saved.x().clone(), saved)
            }
        };
        Ok((LinearInput::new(context, h)?, saved))
    }

    /// The input of the layers again, if `wanted`.
    pub(super) fn recompute_input(
        &self,
        context: Context<'_>,
        saved: &NormSaved,
        wanted: bool,
    ) -> Result<Option<LinearInput>> {
        if !wanted {
            return Ok(None);
        }
        let h = match &self.input_norm {
            Some(norm) => norm.recompute(context, saved)?,
            None => saved.x().clone(),
        };
        Ok(Some(LinearInput::new(context, h)?))
    }

    /// What the last layer adds its result to; `None` if [`ResidualBranch::add`] does.
    pub(super) fn base<'x>(&self, x: &'x Tensor) -> Option<&'x Tensor> {
        let unchanged = self.output_norm.is_none() || self.on_sum;
        (unchanged && self.factor == 1.0).then_some(x)
    }

    /// x and the result y of the last layer, which includes x if `base` gave it -> x1 (N, C).
    pub(super) fn add(
        &self,
        context: Context<'_>,
        x: &Tensor,
        y: Tensor,
    ) -> Result<(Tensor, Option<NormSaved>)> {
        let add = |y: Tensor| match self.base(x) {
            Some(_) => Ok(y),
            None => add_scaled(context, x, &y, self.factor),
        };
        let Some(norm) = &self.output_norm else {
            return Ok((add(y)?, None));
        };
        if self.on_sum {
            let (x1, saved) = norm.forward_groups(context, &add(y)?)?;
            return Ok((x1, Some(saved)));
        }
        let (y, saved) = norm.forward_groups(context, &y)?;
        Ok((add(y)?, Some(saved)))
    }

    /// dx1 (N, C) -> the gradients of x, without those through the layers, and of their result.
    pub(super) fn output_backward(
        &self,
        context: Context<'_>,
        dx1: &Tensor,
        saved: Option<&NormSaved>,
        gradients: &mut Gradients,
    ) -> Result<SumGradients> {
        let mut through_norm = |dy: &Tensor| match self.output_norm.as_ref().zip(saved) {
            Some((norm, saved)) => norm.backward_groups(context, dy, saved, gradients),
            None => Ok(dy.clone()),
        };
        if self.on_sum {
            let residual = through_norm(dx1)?;
            let layers = scale(context, &residual, self.factor)?;
            return Ok(SumGradients { residual, layers });
        }
        Ok(SumGradients {
            residual: dx1.clone(),
            layers: through_norm(&scale(context, dx1, self.factor)?)?,
        })
    }

    /// The gradients of the layers' input and of x in the sum -> dx (N, C).
    pub(super) fn input_backward(
        &self,
        context: Context<'_>,
        dh: &Tensor,
        saved: &NormSaved,
        residual: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        match &self.input_norm {
            Some(norm) => norm.backward(context, dh, saved, Some(residual), gradients),
            None => add_scaled(context, residual, dh, 1.0),
        }
    }
}

/// The cost of a branch around its layers, for `tokens` tokens of `hidden` channels.
#[derive(Debug, Clone, Copy)]
pub(super) struct BranchShape {
    pub(super) tokens: usize,
    pub(super) hidden: usize,
    pub(super) norms: BranchNorms,
    pub(super) norm_kind: NormKind,
    pub(super) factor: f64,
    /// Whether the norms before and after the layers are trained.
    pub(super) trained: [bool; 2],
}

impl BranchShape {
    /// Work of a norm, if there is one.
    fn norm_cost(&self, norm: Option<&str>) -> Work {
        norm.map_or_else(Work::default, |_| {
            norm_cost(self.norm_kind, self.tokens, self.hidden)
        })
    }

    fn norm_backward_cost(&self, trained: bool) -> Work {
        norm_backward_cost(self.norm_kind, self.tokens, self.hidden, trained)
    }

    /// Work of the forward pass, with the addition that the last layer may do.
    pub(super) fn forward_cost(&self) -> Work {
        let (n, c) = (self.tokens, self.hidden);
        let norms = self.recompute_cost() + self.norm_cost(self.norms.output);
        let unchanged = self.norms.output.is_none() || self.norms.on_sum;
        if unchanged && self.factor == 1.0 {
            norms + residual_cost(n, c)
        } else {
            norms + add_scaled_cost(n, c)
        }
    }

    /// Work of `recompute_input`.
    pub(super) fn recompute_cost(&self) -> Work {
        self.norm_cost(self.norms.input)
    }

    /// Work of `output_backward`.
    pub(super) fn output_backward_cost(&self) -> Work {
        let scaled = scale_cost(self.tokens, self.hidden, self.factor);
        match self.norms.output {
            Some(_) => scaled + self.norm_backward_cost(self.trained[1]),
            None => scaled,
        }
    }

    /// Work of `input_backward`.
    pub(super) fn input_backward_cost(&self) -> Work {
        let (n, c) = (self.tokens, self.hidden);
        match self.norms.input {
            Some(_) => self.norm_backward_cost(self.trained[0]) + residual_cost(n, c),
            None => add_scaled_cost(n, c),
        }
    }
}

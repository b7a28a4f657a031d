//! Mixture of experts (Shazeer et al. 2017): each token passes through the k of E gated
//! feed-forward layers that its router prefers, `y = sum over them of w_e FF_e(x)`.
//!
//! w = softmax(router x), over the sum of the chosen ones if `normalized`. Tokens are gathered by
//! expert: only chosen experts compute, and no token is dropped. The choice is made on the host.

mod cost;
mod routing;

use candle_core::Tensor;

pub use cost::ExpertsShape;
use routing::Routes;

use super::storage::{check_shape, load_activation, save_activation};
use super::{
    Activation, BackwardDepth, Branch, Context, FeedForward, FeedForwardSaved, Gradients,
    InputGradient, Linear, LinearInput, LinearSaved, Weight, backward_shared_input, gather_rows,
    residual_cost, softmax,
};
use crate::error::{Error, Kind, Result};
use crate::work::WorkCounter;

/// The router and the experts.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use wattune::ops::{Activation, Context, Experts, LinearInput, Weight};
/// # use wattune::work::{Precision, WorkCounter};
/// # let weight = |w: &[f32], shape: &[usize]|
/// #     Ok::<_, candle_core::Error>(Weight::frozen(Tensor::from_slice(w, shape, &Device::Cpu)?));
/// let experts = Experts {
///     router: weight(&[0., 1.], &[2, 1])?, // prefers the second
///     gate_up: weight(&[1., 1., 1., 2.], &[2, 2, 1])?,
///     down: weight(&[1., 3.], &[2, 1, 1])?,
///     per_token: 1,
///     normalized: true,
///     activation: Activation::Relu,
/// };
/// let counter = WorkCounter::default();
/// let context = Context::new(&counter, Precision::F32);
/// let x = LinearInput::new(context, Tensor::new(&[[5f32]], &Device::Cpu)?)?;
/// let (y, _) = experts.forward(context, &x, None)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[150.]]); // 3 * (relu(5) * 10)
/// # Ok::<(), wattune::error::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Experts {
    /// (E, C).
    pub router: Weight,
    /// gate and up of each expert, (E, 2 F, C).
    pub gate_up: Weight,
    /// (E, C, F).
    pub down: Weight,
    /// k.
    pub per_token: usize,
    /// Whether the weights of a token's experts sum to one.
    pub normalized: bool,
    /// Of gate.
    pub activation: Activation,
}

/// Saved by [`Experts::forward`] for the backward pass.
pub struct ExpertsSaved {
    routes: Routes,
    /// The outputs of the experts (N k, C) in the compute type, by expert.
    outputs: Tensor,
    /// Of each expert that has rows.
    experts: Vec<FeedForwardSaved>,
}

impl Experts {
    /// Whether a weight is trained.
    pub fn is_trained(&self) -> bool {
        self.shape(0)
            .is_ok_and(|shape| shape.trained.contains(&true))
    }

    /// What the cost of `tokens` tokens depends on.
    pub fn shape(&self, tokens: usize) -> Result<ExpertsShape> {
        let (experts, hidden, inner) = self.down.tensor.dims3()?;
        let weights = [&self.router, &self.gate_up, &self.down];
        Ok(ExpertsShape {
            tokens,
            hidden,
            inner,
            experts,
            per_token: self.per_token,
            activation: self.activation,
            trained: weights.map(Weight::is_trained),
        })
    }

    fn checked_shape(&self, tokens: usize) -> Result<ExpertsShape> {
        let shape = self.shape(tokens)?;
        let (e, c, f) = (shape.experts, shape.hidden, shape.inner);
        check_shape("router", &self.router.tensor, &[e, c])?;
        check_shape("gate_up", &self.gate_up.tensor, &[e, 2 * f, c])?;
        if (1..=e).contains(&self.per_token) {
            return Ok(shape);
        }
        Err(
            Error::new(Kind::Tensor, "a token has experts among those of the layer")
                .value(self.per_token.to_string())
                .rule(format!("from 1 to {e}")),
        )
    }

    fn router(&self) -> Linear {
        plain(self.router.clone())
    }

    /// Gate and up, and down, of expert `index`; trained ones have the slots 2 index and 2 index + 1.
    fn expert(&self, index: usize) -> Result<([Linear; 1], Linear)> {
        let part = |stack: &Weight, slot| {
            let mut weight = Weight::frozen(stack.tensor.get(index)?);
            weight.slot = stack.slot.map(|_| slot);
            Ok::<_, Error>(plain(weight))
        };
        let gate_up = part(&self.gate_up, 2 * index)?;
        Ok(([gate_up], part(&self.down, 2 * index + 1)?))
    }

    /// x (N, C) -> y (N, C), added to `base` if given.
    pub fn forward(
        &self,
        context: Context<'_>,
        x: &LinearInput,
        base: Option<&Tensor>,
    ) -> Result<(Tensor, ExpertsSaved)> {
        let shape = self.checked_shape(x.shape().0)?;
        context.counter.add(shape.forward_cost(context.precision));
        if base.is_some() {
            let sum = residual_cost(shape.tokens, shape.hidden);
            context.counter.add(sum);
        }
        let uncounted = WorkCounter::default();
        let context = context.counting(&uncounted);
        let x = load_activation(context, x.tensor()?)?;
        let device = x.device().clone();
        let (logits, _) = self.router().forward(context.in_f32(), &x, None, None)?;
        let (p, _) = softmax(context.path(&logits), &logits)?;
        let routes = Routes::new(&p, self.per_token, self.normalized)?;
        let rows = gather_rows(context, &x, &routes.tokens(&device)?)?;
        let (mut outputs, mut saved) = (Vec::new(), Vec::new());
        for (expert, range) in routes.experts() {
            let (gate_up, down) = self.expert(expert)?;
            let layers = self.feed_forward(&gate_up, &down);
            let input = LinearInput::new(context, rows.narrow(0, range.start, range.len())?)?;
            let (y, of_expert) = layers.forward(context, input, None, None, true)?;
            outputs.push(y);
            saved.push(of_expert);
        }
        drop(rows);
        let outputs = Tensor::cat(&outputs, 0)?;
        let weighted = outputs.broadcast_mul(&routes.weights(&device)?)?;
        let y = sum_rows(context, &weighted, &routes, base)?;
        let saved = ExpertsSaved {
            outputs: save_activation(context, &outputs)?,
            experts: saved,
            routes,
        };
        Ok((y, saved))
    }

    fn feed_forward<'a>(&self, gate_up: &'a [Linear], down: &'a Linear) -> FeedForward<'a> {
        FeedForward {
            activation: self.activation,
            gated: true,
            gate_up,
            down,
        }
    }

    /// dy (N, C), and the forward pass's x where a weight is trained -> dx (N, C), if `input`; adds the
    /// gradients of trained weights.
    pub fn backward(
        &self,
        context: Context<'_>,
        dy: &Tensor,
        x: Option<&LinearInput>,
        saved: &ExpertsSaved,
        input: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let shape = self.checked_shape(dy.dims2()?.0)?;
        let cost = shape.backward_cost(context.precision, input);
        context.counter.add(cost);
        let uncounted = WorkCounter::default();
        let context = context.counting(&uncounted);
        let (device, routes) = (dy.device(), &saved.routes);
        let x = x
            .map(|x| load_activation(context, x.tensor()?))
            .transpose()?;
        let tokens = routes.tokens(device)?;
        let rows = x.as_ref().map(|x| gather_rows(context, x, &tokens));
        let rows = rows.transpose()?;
        let dy_rows = gather_rows(context, dy, &tokens)?;
        let outputs = load_activation(context, &saved.outputs)?;
        let d_weights: Vec<f32> = (&dy_rows * outputs)?.sum(1)?.to_vec1()?;
        let d_outputs = dy_rows.broadcast_mul(&routes.weights(device)?)?;
        let d_rows = self.experts_backward(context, &d_outputs, rows, saved, input, gradients)?;
        drop((dy_rows, d_outputs));
        let d_logits = routes.logits_gradient(&d_weights);
        let d_logits = Tensor::from_vec(d_logits, (shape.tokens, shape.experts), device)?;
        let d_logits = LinearInput::new(context.in_f32(), d_logits)?;
        let x = x
            .map(|x| LinearInput::new(context.in_f32(), x))
            .transpose()?;
        let branch = Branch {
            linear: &self.router(),
            dy: &d_logits,
            saved: &LinearSaved::default(),
        };
        let branches = [branch];
        let context = context.in_f32();
        let wanted = InputGradient::when(input);
        let dx = backward_shared_input(context, &branches, x.as_ref(), wanted, gradients)?;
        let both = dx.zip(d_rows);
        both.map(|(dx, d_rows)| sum_rows(context, &d_rows, routes, Some(&dx)))
            .transpose()
    }

    /// The gradients of the experts' outputs (N k, C) -> those of their inputs, if `input`. `rows`: the
    /// inputs, where a weight is trained.
    fn experts_backward(
        &self,
        context: Context<'_>,
        d_outputs: &Tensor,
        rows: Option<Tensor>,
        saved: &ExpertsSaved,
        input: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let depth = if input {
            BackwardDepth::Input
        } else {
            BackwardDepth::Weights
        };
        let count = self.down.tensor.dims3()?.0;
        let mut by_expert = Gradients::new(2 * count);
        let mut d_rows = Vec::new();
        for ((expert, range), saved) in saved.routes.experts().zip(&saved.experts) {
            let (gate_up, down) = self.expert(expert)?;
            let layers = self.feed_forward(&gate_up, &down);
            let slice = |x: &Tensor| x.narrow(0, range.start, range.len());
            let input = rows.as_ref().map(slice).transpose()?;
            let input = input.map(|input| LinearInput::new(context, input));
            let (input, dy) = (input.transpose()?, slice(d_outputs)?);
            let dx = layers.backward(context, &dy, input.as_ref(), saved, depth, &mut by_expert)?;
            d_rows.extend(dx);
        }
        for (part, stack) in [&self.gate_up, &self.down].into_iter().enumerate() {
            if stack.is_trained() {
                gradients.add(stack, stacked(stack, &by_expert, part)?)?;
            }
        }
        if d_rows.is_empty() {
            return Ok(None);
        }
        Ok(Some(Tensor::cat(&d_rows, 0)?))
    }
}

/// The gradient of a stack (E, ..) of weights from those in every second slot from `part` on; zero for
/// an expert without rows.
fn stacked(stack: &Weight, by_expert: &Gradients, part: usize) -> Result<Tensor> {
    let of_expert = |expert: usize| match by_expert.get(2 * expert + part) {
        Some(gradient) => Ok(gradient.clone()),
        None => Ok(stack.tensor.get(expert)?.zeros_like()?),
    };
    let parts = (0..stack.tensor.dim(0)?).map(of_expert);
    Ok(Tensor::stack(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}

/// The rows (N k, C) -> the sum of each token's (N, C), added to `base` if given.
fn sum_rows(
    context: Context<'_>,
    rows: &Tensor,
    routes: &Routes,
    base: Option<&Tensor>,
) -> Result<Tensor> {
    let mut sum = base.cloned();
    for places in routes.places(rows.device())? {
        let part = gather_rows(context, rows, &places)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    sum.ok_or_else(|| Error::new(Kind::Tensor, "no token has an expert"))
}

fn plain(weight: Weight) -> Linear {
    Linear {
        weight,
        bias: None,
        lora: None,
    }
}

//! Mixtures of experts against the dense mixture under autograd: every expert on every token, with the
//! weights of those that are not chosen zero.

use candle_core::{D, Device, Tensor};

use super::super::{Activation, Context, Experts, ExpertsShape, Gradients, LinearInput, Weight};
use super::{Pair, parameters, random};
use crate::work::Precision;

const TOKENS: usize = 9;
const HIDDEN: usize = 5;
const INNER: usize = 3;
const EXPERTS: usize = 4;
const PER_TOKEN: usize = 2;

fn naive(inputs: &[Tensor], normalized: bool) -> candle_core::Result<Tensor> {
    let [x, router, gate_up, down] = [0, 1, 2, 3].map(|i| &inputs[i]);
    let e = x.matmul(&router.t()?)?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    let chosen = p.to_vec2::<f64>()?.into_iter().flat_map(|p| {
        let rank = |e: usize| p.iter().filter(|other| **other > p[e]).count();
        let chosen = (0..EXPERTS).map(|e| f64::from(u8::from(rank(e) < PER_TOKEN)));
        chosen.collect::<Vec<_>>()
    });
    let chosen = Tensor::from_vec(chosen.collect(), (TOKENS, EXPERTS), &Device::Cpu)?;
    let mut w = (p * chosen)?;
    if normalized {
        w = w.broadcast_div(&w.sum_keepdim(D::Minus1)?)?;
    }
    let mut y = x.zeros_like()?;
    for expert in 0..EXPERTS {
        let both = x.matmul(&gate_up.get(expert)?.t()?)?;
        let gate = both.narrow(1, 0, INNER)?.silu()?;
        let inner = (gate * both.narrow(1, INNER, INNER)?)?;
        let output = inner.matmul(&down.get(expert)?.t()?)?;
        y = (y + output.broadcast_mul(&w.narrow(1, expert, 1)?)?)?;
    }
    Ok(y)
}

#[test]
fn a_token_passes_through_the_experts_that_its_router_prefers() {
    let shapes = [
        vec![TOKENS, HIDDEN],
        vec![EXPERTS, HIDDEN],
        vec![EXPERTS, 2 * INNER, HIDDEN],
        vec![EXPERTS, HIDDEN, INNER],
    ];
    let inputs: Vec<Tensor> = (0..).zip(&shapes).map(|(k, s)| random(40 + k, s)).collect();
    let dy = random(50, &shapes[0]);
    for (normalized, trained) in [(false, false), (true, true), (true, false), (false, true)] {
        let shape = ExpertsShape {
            tokens: TOKENS,
            hidden: HIDDEN,
            inner: INNER,
            experts: EXPERTS,
            per_token: PER_TOKEN,
            activation: Activation::Silu,
            trained: [trained; 3],
        };
        Pair {
            inputs: &inputs,
            dy: &dy,
            op: |context: Context<'_>, inputs: &[Tensor], dy: &Tensor| {
                let named = ["router", "gate_up", "down"].into_iter().zip(&inputs[1..]);
                let parameters = parameters(named);
                let weight = |index: usize| {
                    if trained {
                        return parameters.weight(index);
                    }
                    Ok(Weight::frozen(inputs[index + 1].clone()))
                };
                let experts = Experts {
                    router: weight(0)?,
                    gate_up: weight(1)?,
                    down: weight(2)?,
                    per_token: PER_TOKEN,
                    normalized,
                    activation: Activation::Silu,
                };
                assert_eq!(experts.shape(TOKENS)?, shape);
                let x = LinearInput::new(context, inputs[0].clone())?;
                let (y, saved) = experts.forward(context, &x, None)?;
                let mut gradients = Gradients::new(3);
                let x = trained.then_some(&x);
                let dx = experts.backward(context, dy, x, &saved, true, &mut gradients)?;
                let of_weights = (0..3).map(|slot| gradients.get(slot).cloned());
                Ok((y, [dx].into_iter().chain(of_weights).collect()))
            },
            naive: |inputs: &[Tensor]| naive(inputs, normalized),
            cost: shape.forward_cost(Precision::F32) + shape.backward_cost(Precision::F32, true),
            roundings: 40,
        }
        .prove();
    }
}

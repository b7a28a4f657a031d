//! DoRA against the formula under candle's autograd, with dropout and without, and its FLOPs.

use candle_core::{DType, Device, Tensor, Var};

use super::super::{
    Context, DropoutMask, FLOPS_ISSUED, Gradients, InputGradient, Linear, Lora, Magnitude, Weight,
};
use super::{close, for_each_path, mask as dropout_mask, parameters, random};
use crate::work::WorkCounter;

const SCALING: f64 = 1.5;
/// Tokens, inputs, outputs, rank.
const SIZES: [usize; 4] = [5, 7, 6, 2];

/// `W (x - x') + g (W x' + scaling * B A x') + bias` in f64; the norms in g get no gradient.
fn naive(inputs: &[Var], mask: Option<&DropoutMask>) -> candle_core::Result<Tensor> {
    let [x, w, bias, a, b, m] = [0, 1, 2, 3, 4, 5].map(|i| inputs[i].as_tensor());
    let dropped = match mask {
        Some(mask) => (x * mask.tensor(&Device::Cpu).unwrap().to_dtype(DType::F64)?)?,
        None => x.clone(),
    };
    let adapted = (w + (b.matmul(a)? * SCALING)?)?;
    let norms = adapted.detach().sqr()?.sum(1)?.sqrt()?;
    let v = dropped.matmul(&adapted.t()?)?;
    let scaled = v.broadcast_mul(&(m / norms)?)?;
    ((x - dropped)?.matmul(&w.t()?)? + scaled)?.broadcast_add(bias)
}

#[test]
fn dora_is_the_formula_under_autograd() {
    let [n, i, o, r] = SIZES;
    let shapes = [
        vec![n, i],
        vec![o, i],
        vec![o],
        vec![r, i],
        vec![o, r],
        vec![o],
    ];
    let inputs: Vec<Tensor> = (0..).zip(&shapes).map(|(k, s)| random(90 + k, s)).collect();
    let dy = random(99, &[n, o]);
    let drawn = dropout_mask(8, (n, i), 0.4);
    for mask in [None, Some(&drawn)] {
        let vars: Vec<Var> = inputs
            .iter()
            .map(|x| Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap())
            .collect();
        let expected = naive(&vars, mask).unwrap();
        let weighted = (&expected * dy.to_dtype(DType::F64).unwrap()).unwrap();
        let store = weighted.sum_all().unwrap().backward().unwrap();
        for_each_path(|context: Context<'_>| {
            let trained = [("A", &inputs[3]), ("B", &inputs[4]), ("m", &inputs[5])];
            let parameters = parameters(trained);
            let slot = |k| parameters.weight(k).unwrap();
            let frozen = |k: usize| Weight::frozen(inputs[k].clone());
            let linear = Linear {
                weight: frozen(1),
                bias: Some(frozen(2)),
                lora: Some(Lora {
                    a: slot(0),
                    b: slot(1),
                    bias: None,
                    magnitude: Some(Magnitude::new(slot(2))),
                    scaling: SCALING,
                }),
            };
            let counter = WorkCounter::default();
            let context = Context {
                counter: &counter,
                ..context
            };
            FLOPS_ISSUED.set(0);
            let x = &inputs[0];
            let (y, saved) = linear.forward(context, x, mask.cloned(), None).unwrap();
            let mut gradients = Gradients::new(3);
            let wanted = InputGradient::Compute;
            let dx = linear
                .backward(context, &dy, Some(x), &saved, wanted, &mut gradients)
                .unwrap()
                .unwrap();
            assert_eq!(FLOPS_ISSUED.get(), counter.take().flops());
            close("y", &y, &expected, 64);
            close("dx", &dx, store.get(&vars[0]).unwrap(), 64);
            for (k, name) in ["A", "B", "m"].into_iter().enumerate() {
                let wanted = store.get(&vars[k + 3]).unwrap();
                close(name, gradients.get(k).unwrap(), wanted, 64);
            }
        });
    }
}

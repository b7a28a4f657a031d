//! candle-nn as an outside oracle: its layers, loss and optimizer on the same values. (Its KV cache
//! feeds decoding in `attention`.)

use candle_core::{Device, Tensor, Var};
use candle_nn::ops::layer_norm_slow;
use candle_nn::optim::{AdamW as CandleAdamW, Optimizer, ParamsAdamW};
use candle_nn::{Linear as CandleLinear, Module, RmsNorm as CandleRmsNorm};

use super::adamw::ADAMW;
use super::{close, flat, for_each_path, indices, parameters, random};
use crate::error::Result;
use crate::ops::cross_entropy::cross_entropy_cost;
use crate::ops::{
    AdamW, Gradients, InputGradient, Linear, LmHead, Norm, NormKind, Weight, cross_entropy,
};

#[test]
fn a_linear_layer_with_its_gradients() -> Result<()> {
    let (x, dy) = (Var::from_tensor(&random(1, &[5, 7]))?, random(2, &[5, 3]));
    let (w, bias) = (
        Var::from_tensor(&random(3, &[3, 7]))?,
        Var::from_tensor(&random(4, &[3]))?,
    );
    let theirs = CandleLinear::new(w.as_tensor().clone(), Some(bias.as_tensor().clone()));
    let want = theirs.forward(&x)?;
    let gradients = (&want * &dy)?.sum_all()?.backward()?;
    for_each_path(|context| {
        let slots = parameters([("w", w.as_tensor()), ("bias", bias.as_tensor())]);
        let ours = Linear {
            weight: slots.weight(0).unwrap(),
            bias: Some(slots.weight(1).unwrap()),
            lora: None,
        };
        let (y, saved) = ours.forward(context, &x, None, None).unwrap();
        let (mut got, wanted) = (Gradients::new(2), InputGradient::Compute);
        let dx = ours.backward(context, &dy, Some(&x), &saved, wanted, &mut got);
        close("y", &y, &want, 16);
        close("dx", &dx.unwrap().unwrap(), gradients.get(&x).unwrap(), 16);
        close("dw", got.get(0).unwrap(), gradients.get(&w).unwrap(), 16);
        close(
            "dbias",
            got.get(1).unwrap(),
            gradients.get(&bias).unwrap(),
            16,
        );
    });
    Ok(())
}

#[test]
fn norms_with_their_gradients() -> Result<()> {
    let [x, weight, bias] = [(1, &[5, 7][..]), (2, &[7]), (3, &[7])]
        .map(|(seed, shape)| Var::from_tensor(&random(seed, shape)).unwrap());
    let (dy, eps) = (random(4, &[5, 7]), 1e-5);
    let [w, b] = [&weight, &bias].map(|var| var.as_tensor().clone());
    let rms = CandleRmsNorm::new(w.clone(), eps).forward_diff(&x)?;
    let layer = layer_norm_slow(&x, &w, &b, eps as f32)?;
    let slots = parameters([("weight", weight.as_tensor()), ("bias", bias.as_tensor())]);
    for (kind, want) in [(NormKind::Rms, rms), (NormKind::Layer, layer)] {
        let gradients = (&want * &dy)?.sum_all()?.backward()?;
        let biased = kind == NormKind::Layer;
        let ours = Norm {
            kind,
            weight: slots.weight(0)?,
            bias: biased.then(|| slots.weight(1)).transpose()?,
            unit_offset: false,
            eps,
            factor: 1.0,
        };
        for_each_path(|context| {
            let (y, saved) = ours.forward(context, &x).unwrap();
            let mut got = Gradients::new(2);
            let dx = ours.backward(context, &dy, &saved, None, &mut got).unwrap();
            close("y", &y, &want, 64);
            close("dx", &dx, gradients.get(&x).unwrap(), 128);
            let variables = if biased {
                &[&weight, &bias][..]
            } else {
                &[&weight]
            };
            for (slot, variable) in variables.iter().enumerate() {
                let wanted = gradients.get(variable).unwrap();
                close(&format!("slot {slot}"), got.get(slot).unwrap(), wanted, 64);
            }
        });
    }
    Ok(())
}

#[test]
fn cross_entropy_with_its_gradient() -> Result<()> {
    let (n, v) = (9, 40);
    let (h, w) = (Var::from_tensor(&random(1, &[n, 6]))?, random(2, &[v, 6]));
    let targets = indices(3, n, v);
    let index = Tensor::new(&targets[..], &Device::Cpu)?;
    let want = candle_nn::loss::cross_entropy(&h.matmul(&w.t()?)?, &index)?;
    let gradients = want.backward()?;
    for_each_path(|context| {
        let head = LmHead {
            bias: None,
            weight: Weight::frozen(w.clone()),
            softcap: None,
            lora: None,
        };
        let (scale, none) = (1.0 / n as f64, &mut Gradients::new(0));
        let (losses, dh) = head
            .forward_backward(context, &h, &targets, scale, true, none)
            .unwrap();
        let mean = Tensor::new(losses.iter().sum::<f32>() / n as f32, &Device::Cpu).unwrap();
        close("mean loss", &mean, &want, 32);
        close("dh", &dh.unwrap(), gradients.get(&h).unwrap(), 32);
    });
    Ok(())
}

#[test]
fn cross_entropy_of_logits_with_its_gradient() -> Result<()> {
    let (n, k) = (9, 4);
    let logits = Var::from_tensor(&random(1, &[n, k]))?;
    let targets = indices(3, n, k);
    let index = Tensor::new(&targets[..], &Device::Cpu)?;
    let want = candle_nn::loss::cross_entropy(&logits, &index)?;
    let gradients = want.backward()?;
    for_each_path(|context| {
        let scale = 1.0 / n as f64;
        let (losses, dz) =
            cross_entropy(context, logits.copy().unwrap(), &targets, Some(scale)).unwrap();
        assert_eq!(context.counter.take(), cross_entropy_cost(n, k, true));
        let mean = Tensor::new(losses.iter().sum::<f32>() / n as f32, &Device::Cpu).unwrap();
        close("mean loss", &mean, &want, 32);
        close("dlogits", &dz.unwrap(), gradients.get(&logits).unwrap(), 32);
        let (alone, none) = cross_entropy(context, logits.copy().unwrap(), &targets, None).unwrap();
        assert_eq!(alone, losses);
        assert!(none.is_none());
        assert_eq!(context.counter.take(), cross_entropy_cost(n, k, false));
        assert!(cross_entropy(context, logits.copy().unwrap(), &[4; 9], None).is_err());
    });
    Ok(())
}

/// Ten steps, on gradients handed to candle's optimizer as those of `sum(value * gradient)`.
#[test]
fn ten_steps_of_adamw() -> Result<()> {
    let n = 33;
    let start = random(1, &[n]);
    let gradient = |step: u64| random(10 + step, &[n]);
    let value = Var::from_tensor(&start)?;
    let settings = ParamsAdamW {
        lr: 0.1,
        beta1: ADAMW.beta1,
        beta2: ADAMW.beta2,
        eps: ADAMW.epsilon,
        weight_decay: ADAMW.weight_decay,
    };
    let mut theirs = CandleAdamW::new(vec![value.clone()], settings)?;
    for step in 1..=10 {
        theirs.backward_step(&(value.as_tensor() * gradient(step))?.sum_all()?)?;
    }
    let ours = AdamW {
        max_grad_norm: 0.0,
        ..ADAMW
    };
    for_each_path(|context| {
        let parameters = parameters([("w", &start)]);
        for step in 1..=10 {
            ours.step(context, &parameters, &gradient(step), 0.1, step)
                .unwrap();
        }
        let got = parameters.weight(0).unwrap().tensor;
        assert_ne!(flat(&got), flat(&start));
        close("values", &got, value.as_tensor(), 160);
    });
    Ok(())
}

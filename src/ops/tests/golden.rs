//! PyTorch's values, made by `scripts/ops_reference.py` in f64: forward and backward to 1e-5 of a
//! tensor's largest magnitude, by every implementation.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::super::{
    Activation, AdamW, Attention, Gradients, LmHead, Norm, NormKind, Rope, RopeScaling, Segments,
    Weight,
};
use super::{flat, for_each_path, parameters, trained, within};

const SILU: Activation = Activation::Silu;

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/ops")
            .join(format!("{name}.safetensors"));
        Self(candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    }

    fn get(&self, name: &str) -> Tensor {
        self.0[name].clone()
    }

    fn sizes(&self, name: &str) -> Vec<usize> {
        let sizes = self.0[name].to_vec1::<i64>().unwrap();
        sizes.into_iter().map(|n| n as usize).collect()
    }

    /// `name` as the only trained tensor.
    fn trained(&self, name: &str) -> Weight {
        trained(&self.0[name])
    }

    fn check(&self, name: &str, got: &Tensor) {
        let want = &self.0[name];
        let largest = flat(want).into_iter().fold(0.0f32, |a, b| a.max(b.abs()));
        within(name, got, want, 1e-5 * largest);
    }
}

#[test]
fn attention_with_groups_window_and_segments() {
    let golden = Golden::open("attention");
    let [heads, kv_heads, head_dim, window] = golden.sizes("sizes").try_into().unwrap();
    let attention = Attention {
        heads,
        kv_heads,
        head_dim,
        causal: true,
        window: Some(window),
        scale: None,
        softcap: None,
    };
    let segments = Segments::from_lengths(golden.sizes("segments"));
    for_each_path(|context| {
        let (q, k, v) = (golden.get("q"), golden.get("k"), golden.get("v"));
        let (y, saved) = attention.forward(context, q, k, v, &segments).unwrap();
        let (dq, dk, dv) = attention
            .backward(context, &golden.get("dy"), &saved, &segments)
            .unwrap();
        [("y", y), ("dq", dq), ("dk", dk), ("dv", dv)]
            .iter()
            .for_each(|(name, x)| golden.check(name, x));
    });
}

#[test]
fn rms_norm() {
    let golden = Golden::open("rms_norm");
    let norm = Norm {
        kind: NormKind::Rms,
        weight: golden.trained("weight"),
        bias: None,
        unit_offset: false,
        eps: 1e-5,
        factor: 1.0,
    };
    for_each_path(|context| {
        let mut gradients = Gradients::new(1);
        let (y, saved) = norm.forward(context, &golden.get("x")).unwrap();
        golden.check("y", &y);
        let dx = norm.backward(context, &golden.get("dy"), &saved, None, &mut gradients);
        golden.check("dx", &dx.unwrap());
        golden.check("dweight", gradients.get(0).unwrap());
    });
}

#[test]
fn swiglu_and_its_gradients() {
    let golden = Golden::open("swiglu");
    let (gate, up) = (golden.get("gate"), golden.get("up"));
    for_each_path(|context| {
        let (y, saved) = SILU.forward(context, &gate, Some(&up)).unwrap();
        golden.check("y", &y);
        let (dgate, dup) = SILU.backward(context, &golden.get("dy"), &saved).unwrap();
        golden.check("dgate", &dgate);
        golden.check("dup", &dup.unwrap());
    });
}

/// The names of config.json: exact and tanh GELU differ by 5e-4 at most.
#[test]
fn activations_and_their_gradients() {
    let golden = Golden::open("activation");
    let (x, up, dy) = (golden.get("x"), golden.get("up"), golden.get("dy"));
    for name in ["silu", "gelu", "gelu_pytorch_tanh", "relu"] {
        let activation = Activation::from_name(name).unwrap();
        for_each_path(|context| {
            for (up, [y, dx]) in [(None, ["y", "dx"]), (Some(&up), ["gated", "dgate"])] {
                let (output, saved) = activation.forward(context, &x, up).unwrap();
                golden.check(&format!("{y}_{name}"), &output);
                let (of_x, of_up) = activation.backward(context, &dy, &saved).unwrap();
                golden.check(&format!("{dx}_{name}"), &of_x);
                assert_eq!(of_up.is_some(), up.is_some());
                if let Some(of_up) = of_up {
                    golden.check(&format!("dup_{name}"), &of_up);
                }
            }
        });
    }
}

#[test]
fn cross_entropy() {
    let golden = Golden::open("head");
    let head = LmHead {
        bias: None,
        weight: golden.trained("weight"),
        softcap: None,
        lora: None,
    };
    let targets = golden.sizes("targets");
    let targets: Vec<u32> = targets.into_iter().map(|t| t as u32).collect();
    for_each_path(|context| {
        let mut gradients = Gradients::new(1);
        let h = golden.get("h");
        let (losses, dh) = head
            .forward_backward(context, &h, &targets, 0.3, true, &mut gradients)
            .unwrap();
        for losses in [losses, head.forward(context, &h, &targets).unwrap()] {
            golden.check("losses", &Tensor::new(losses, &Device::Cpu).unwrap());
        }
        golden.check("dh", &dh.unwrap());
        golden.check("dweight", gradients.get(0).unwrap());
    });
}

/// The settings are those of the script. YaRN's attention factor is its default, 0.1 ln(factor) + 1
/// (Peng et al. 2023, section 3.4).
#[test]
fn rope_with_every_scaling() {
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 8.0,
        beta_slow: 1.0,
        attention_factor: 0.1 * 4f64.ln() + 1.0,
        original: 64,
        truncate: true,
    };
    let linear = RopeScaling::Linear { factor: 4.0 };
    let dynamic = RopeScaling::Dynamic {
        factor: 4.0,
        original: 32,
    };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original: 64,
    };
    let cases = [
        ("default", 10_000.0, RopeScaling::None),
        ("linear", 10_000.0, linear),
        ("dynamic", 10_000.0, dynamic),
        ("llama3", 500_000.0, llama3),
        ("yarn", 10_000.0, yarn),
    ];
    for (name, theta, scaling) in cases {
        let golden = Golden::open(&format!("rope_{name}"));
        let rope = Rope {
            head_dim: 16,
            rotary_dim: 16,
            interleaved: false,
            theta,
            scaling,
        };
        let tables = rope
            .tables(&Segments::from_lengths([70]), &Device::Cpu)
            .unwrap();
        for_each_path(|context| {
            golden.check("y", &tables.forward(context, &golden.get("x")).unwrap());
            golden.check("dx", &tables.backward(context, &golden.get("dy")).unwrap());
        });
    }
}

#[test]
fn adamw_with_decay_and_clipping() {
    let golden = Golden::open("adamw");
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-6,
        weight_decay: 0.1,
        lr_ratio: 1.0,
        max_grad_norm: 1.5,
    };
    let (gradients, after) = (golden.get("gradients"), golden.get("after"));
    let norms = flat(&golden.get("norms"));
    assert!(
        norms.iter().any(|norm| *norm < 1.5) && norms.iter().any(|norm| *norm > 1.5),
        "both sides of the limit"
    );
    for_each_path(|context| {
        let parameters = parameters([("w", &golden.get("values"))]);
        for (i, norm) in norms.iter().enumerate() {
            let (gradient, step) = (gradients.get(i).unwrap(), i as u64 + 1);
            let ours = adamw
                .step(context, &parameters, &gradient, 0.02, step)
                .unwrap() as f32;
            assert!((ours - norm).abs() <= 1e-6 * norm, "{ours} is not {norm}");
            let got = Tensor::new(parameters.values(0).unwrap(), &Device::Cpu).unwrap();
            within("values", &got, &after.get(i).unwrap(), 1e-5);
        }
    });
}

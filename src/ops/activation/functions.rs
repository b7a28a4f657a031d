//! The activation functions on one f32, and their slopes, inlined into vector loops.

use std::f32::consts::{FRAC_1_SQRT_2, PI};

use crate::ops::simd::Simd;

/// sqrt(2 / pi), the slope of the argument of tanh at 0 in the tanh approximation of GELU.
pub(super) const TANH_SLOPE: f64 = 0.797_884_560_802_865_4;
/// Factor of x^3 in it (Hendrycks and Gimpel 2016, "Gaussian error linear units").
pub(super) const TANH_CUBIC: f64 = 0.044_715;

/// An activation function f.
pub(in crate::ops) trait Function {
    /// f(x).
    fn value(simd: Simd, x: f32) -> f32;

    /// `[f(x), f'(x)]`.
    fn value_and_slope(simd: Simd, x: f32) -> [f32; 2];

    /// `[dgate, dup, y]` of y = f(gate) up.
    #[inline(always)]
    fn gated_backward(simd: Simd, dy: f32, gate: f32, up: f32) -> [f32; 3] {
        let [value, slope] = Self::value_and_slope(simd, gate);
        [dy * up * slope, dy * value, value * up]
    }
}

/// x sigmoid(x).
pub(in crate::ops) struct Silu;
/// x Phi(x), Phi the standard normal distribution function.
pub(in crate::ops) struct Gelu;
/// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
pub(in crate::ops) struct GeluTanh;
/// The hyperbolic tangent.
pub(in crate::ops) struct Tanh;
/// max(x, 0); its slope at 0 is 0, as in PyTorch.
pub(in crate::ops) struct Relu;

impl Function for Silu {
    #[inline(always)]
    fn value(simd: Simd, x: f32) -> f32 {
        x * sigmoid(simd, x)
    }

    #[inline(always)]
    fn value_and_slope(simd: Simd, x: f32) -> [f32; 2] {
        let s = sigmoid(simd, x);
        [x * s, s * (1.0 + x * (1.0 - s))]
    }

    #[inline(always)]
    fn gated_backward(simd: Simd, dy: f32, gate: f32, up: f32) -> [f32; 3] {
        let s = sigmoid(simd, gate);
        [
            dy * up * s * (1.0 + gate * (1.0 - s)),
            dy * gate * s,
            gate * s * up,
        ]
    }
}

impl Function for Gelu {
    #[inline(always)]
    fn value(simd: Simd, x: f32) -> f32 {
        x * normal(simd, x)[0]
    }

    #[inline(always)]
    fn value_and_slope(simd: Simd, x: f32) -> [f32; 2] {
        let [cdf, density] = normal(simd, x);
        [x * cdf, cdf + x * density]
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn value(simd: Simd, x: f32) -> f32 {
        // (1 + tanh(z)) / 2 = sigmoid(2 z).
        let z = x * (TANH_SLOPE * 2.0) as f32 * (1.0 + TANH_CUBIC as f32 * x * x);
        x * sigmoid(simd, z)
    }

    #[inline(always)]
    fn value_and_slope(simd: Simd, x: f32) -> [f32; 2] {
        let cubic = TANH_CUBIC as f32 * x * x;
        let s = sigmoid(simd, x * (TANH_SLOPE * 2.0) as f32 * (1.0 + cubic));
        let z_slope = (TANH_SLOPE * 2.0) as f32 * (1.0 + 3.0 * cubic);
        [x * s, s + x * s * (1.0 - s) * z_slope]
    }
}

impl Function for Tanh {
    #[inline(always)]
    fn value(simd: Simd, x: f32) -> f32 {
        2.0 * sigmoid(simd, 2.0 * x) - 1.0
    }

    #[inline(always)]
    fn value_and_slope(simd: Simd, x: f32) -> [f32; 2] {
        let value = Self::value(simd, x);
        [value, 1.0 - value * value]
    }
}

impl Function for Relu {
    #[inline(always)]
    fn value(_: Simd, x: f32) -> f32 {
        // Not `max`, which would drop a NaN.
        if x <= 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn value_and_slope(simd: Simd, x: f32) -> [f32; 2] {
        [Self::value(simd, x), if x <= 0.0 { 0.0 } else { 1.0 }]
    }
}

#[inline(always)]
fn sigmoid(simd: Simd, x: f32) -> f32 {
    1.0 / (1.0 + simd.exp(-x))
}

/// The standard normal distribution function of x, within 3e-7, and its density: erfc(z) =
/// exp(-z^2) p(1 / (1 + 0.3275911 z)), p of degree 5 (Abramowitz and Stegun 1964, 7.1.26).
#[inline(always)]
fn normal(simd: Simd, x: f32) -> [f32; 2] {
    let exp = simd.exp(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * FRAC_1_SQRT_2 * x.abs());
    let mut p = 1.061_405_4;
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_72, 0.254_829_6, 0.0] {
        p = p * t + coefficient;
    }
    let upper = 0.5 * p * exp;
    let cdf = if x < 0.0 { upper } else { 1.0 - upper };
    [cdf, exp / (2.0 * PI).sqrt()]
}

//! Soft capping: y = c tanh(x / c), which bounds logits and attention scores by c (Gemma 2).

use candle_core::Tensor;

use super::simd::Simd;
use crate::error::Result;

/// Vector operations of a value.
pub(super) const CAP_OPERATIONS: usize = 8;
/// Vector operations of the slope at a known value, and of the product with it.
pub(super) const SLOPE_OPERATIONS: usize = 4;

/// c tanh(x / c).
#[inline(always)]
pub(super) fn capped(simd: Simd, x: f32, c: f32) -> f32 {
    c * simd.tanh(x / c)
}

/// The slope at y = c tanh(x / c): 1 - (y / c)^2; 0 at a masked score of minus infinity.
#[inline(always)]
pub(super) fn slope(y: f32, c: f32) -> f32 {
    let t = y / c;
    let t = if t < -1.0 { -1.0 } else { t };
    1.0 - t * t
}

/// x with a cap, if there is one.
pub(super) fn capped_tensor(x: Tensor, softcap: Option<f64>) -> Result<Tensor> {
    Ok(match softcap {
        Some(c) => ((x / c)?.tanh()? * c)?,
        None => x,
    })
}

/// dy times the slope at the capped values y, if there is a cap.
pub(super) fn capped_gradient(dy: Tensor, y: &Tensor, softcap: Option<f64>) -> Result<Tensor> {
    Ok(match softcap {
        Some(c) => (dy * (y / c)?.sqr()?.affine(-1.0, 1.0)?)?,
        None => dy,
    })
}

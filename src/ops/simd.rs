//! Elementwise arithmetic and reductions on the CPU's vector instructions.
//!
//! `simd!` compiles a loop for each instruction set and selects one at run time. Reductions use
//! `LANES` partial sums in a fixed order, so all instruction sets agree to the bit, except that a
//! multiply-add rounds once where it is fused. The loops are plain indices over slices of one
//! length, or chunks of a constant length: zipped iterators and a `Vec` behind a reference do not
//! vectorize.

#![allow(clippy::needless_range_loop)]

use super::gemm::Element;

/// Partial sums of a reduction: one for each f32 of the widest vector.
pub(super) const LANES: usize = 16;
/// Elements summed in f32 before the sum is added to an f64.
const BLOCK: usize = 512;

/// Arithmetic of the instruction set that a loop is compiled for; constant-folded there.
#[derive(Clone, Copy)]
pub(super) struct Simd {
    /// Whether a fused multiply-add is one instruction, not a library call.
    fused: bool,
}

/// `simd!(|simd| body)`: runs `body` compiled for the best instruction set of the CPU. Functions it
/// calls must be inlined into it.
macro_rules! simd {
    (|$simd:pat_param| $body:expr) => {
        $crate::ops::simd::dispatch(
            #[inline(always)]
            |$simd| $body,
        )
    };
}
pub(super) use simd;

/// The function that `simd!` expands to; `work` must be `#[inline(always)]`.
#[inline(always)]
pub(super) fn dispatch<R>(work: impl FnOnce(Simd) -> R) -> R {
    match pulp::Arch::new() {
        arch @ pulp::Arch::Scalar => arch.dispatch(
            #[inline(always)]
            || work(Simd { fused: false }),
        ),
        arch => arch.dispatch(
            #[inline(always)]
            || work(Simd { fused: true }),
        ),
    }
}

impl Simd {
    /// a b + c.
    #[inline(always)]
    pub(super) fn mul_add(self, a: f32, b: f32, c: f32) -> f32 {
        if self.fused {
            a.mul_add(b, c)
        } else {
            a * b + c
        }
    }

    /// The dot product in f32, for rows of a few thousand elements at most.
    #[inline(always)]
    pub(super) fn dot<T: Element>(self, a: &[f32], b: &[T]) -> f32 {
        self.dot_map(a, b, T::as_f32)
    }

    /// The dot product of `a` and `wide` of each element of `b`.
    #[inline(always)]
    pub(super) fn dot_map<T: Copy>(self, a: &[f32], b: &[T], wide: impl Fn(T) -> f32) -> f32 {
        assert_eq!(a.len(), b.len(), "rows have one length");
        let (a, a_rest) = a.as_chunks::<LANES>();
        let (b, b_rest) = b.as_chunks::<LANES>();
        let mut lanes = [0.0f32; LANES];
        for i in 0..a.len() {
            for lane in 0..LANES {
                lanes[lane] = self.mul_add(a[i][lane], wide(b[i][lane]), lanes[lane]);
            }
        }
        for lane in 0..a_rest.len() {
            lanes[lane] = self.mul_add(a_rest[lane], wide(b_rest[lane]), lanes[lane]);
        }
        sum_lanes(lanes)
    }

    /// out += alpha x.
    #[inline(always)]
    pub(super) fn axpy(self, out: &mut [f32], alpha: f32, x: &[f32]) {
        assert_eq!(out.len(), x.len(), "rows have one length");
        for i in 0..out.len() {
            out[i] = self.mul_add(alpha, x[i], out[i]);
        }
    }

    /// e^x, within 2.5 ulp on [-87.3, 88]; 0 below, e^88 above.
    ///
    /// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2. ln 2 is subtracted in two parts,
    /// the first exact in f32 times any n here (Cody and Waite 1980). e^r = 1 + r + r^2 q(r), q of
    /// degree 3 and minimax: its relative error on that interval is 1.05e-7.
    #[inline(always)]
    pub(super) fn exp(self, x: f32) -> f32 {
        const LN_2_HIGH: f32 = 0.693_359_4;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        const ROUND: f32 = 12_582_912.0;
        // Not `min`, which would drop a NaN.
        let clamped = if x > 88.0 { 88.0 } else { x };
        let shifted = self.mul_add(clamped, std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = self.mul_add(n, -LN_2_LOW, self.mul_add(n, -LN_2_HIGH, clamped));
        let mut p = 0.008_312_501;
        for coefficient in [0.041_890_33, 0.166_671_16, 0.499_992_3, 1.0, 1.0] {
            p = self.mul_add(r, p, coefficient);
        }
        // Above -87.3 p lies in [0.7, 1.5) and, where n is -126, above 1: adding n to its exponent
        // gives a normal float.
        let value = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
        if x < -87.3 { 0.0 } else { value }
    }

    /// tanh x, within 4 ulp: for |x| < 0.625 an odd polynomial, x + x^3 p(x^2) with p of degree 4 and
    /// minimax (relative error 5e-9); 1 - 2 / (1 + e^(2 |x|)) beyond, where nothing cancels.
    #[inline(always)]
    pub(super) fn tanh(self, x: f32) -> f32 {
        let square = x * x;
        let mut p = -0.005_704_884;
        for coefficient in [0.020_639, -0.053_739_69, 0.133_314_42, -0.333_332_8] {
            p = self.mul_add(square, p, coefficient);
        }
        let near = self.mul_add(square * x, p, x);
        let far = 1.0 - 2.0 / (1.0 + self.exp(2.0 * x.abs()));
        if x.abs() < 0.625 {
            near
        } else {
            far.copysign(x)
        }
    }
}

/// The sum of the lanes, by halves.
#[inline(always)]
pub(super) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

/// The maximum; minus infinity for an empty row.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}

/// The sum of `f` over the elements: `LANES` partial sums in f32 for each `BLOCK`, the blocks in
/// f64.
#[inline(always)]
pub(super) fn sum_map<T: Element>(row: &[T], f: impl Fn(f32) -> f32) -> f64 {
    sum_map2(row, row, |x, _| f(x.as_f32()))
}

/// The sum of `f` over pairs of elements, summed as `sum_map`.
#[inline(always)]
pub(super) fn sum_map2<S: Copy, T: Copy>(a: &[S], b: &[T], f: impl Fn(S, T) -> f32) -> f64 {
    assert_eq!(a.len(), b.len(), "rows have one length");
    let mut total = 0.0;
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let (a, a_rest) = a.as_chunks::<LANES>();
        let (b, b_rest) = b.as_chunks::<LANES>();
        let mut lanes = [0.0f32; LANES];
        for i in 0..a.len() {
            for lane in 0..LANES {
                lanes[lane] += f(a[i][lane], b[i][lane]);
            }
        }
        for lane in 0..a_rest.len() {
            lanes[lane] += f(a_rest[lane], b_rest[lane]);
        }
        total += lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>();
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_the_exponential() {
        for fused in [false, true] {
            let exp = |x| Simd { fused }.exp(x);
            // Against f64's, over the range and its ends.
            for i in -200_000..=200_000 {
                let x = i as f32 * 4.43e-4;
                let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
                if (-87.3..88.0).contains(&x) {
                    assert!(
                        (found / expected - 1.0).abs() < 2.5e-7,
                        "exp({x}) = {found}, not {expected}"
                    );
                }
            }
            assert_eq!(
                (exp(0.0), exp(-1000.0), exp(f32::NEG_INFINITY)),
                (1.0, 0.0, 0.0)
            );
            assert!(
                exp(-87.3) > 1.17e-38 && exp(-87.3) < 1.22e-38,
                "{}",
                exp(-87.3)
            );
            assert!(
                exp(1000.0) > 1e38
                    && exp(1000.0).is_finite()
                    && exp(f32::NAN).is_nan()
                    && exp(-f32::NAN).is_nan()
            );
            assert_eq!(exp(1000.0), exp(88.0));
        }
    }

    #[test]
    fn tanh_is_the_hyperbolic_tangent() {
        for fused in [false, true] {
            let tanh = |x| Simd { fused }.tanh(x);
            for i in -100_000..=100_000 {
                let x = i as f32 * 2.1e-4;
                let (found, expected) = (f64::from(tanh(x)), f64::from(x).tanh());
                assert!(
                    (found - expected).abs() <= 3e-7 * expected.abs(),
                    "tanh({x}) = {found}, not {expected}"
                );
            }
            assert_eq!(
                (tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(1e30)),
                (1.0, -1.0, 1.0)
            );
            assert!(tanh(f32::NAN).is_nan());
        }
    }

    #[test]
    fn reductions_take_every_element_once() {
        for n in [0, 1, 15, 16, 17, 511, 512, 513, 1500] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1000) as f32).collect();
            let expected: f64 = row.iter().map(|x| f64::from(*x)).sum();
            assert_eq!(simd!(|_| sum_map(&row, |x| x)), expected, "sum of {n}");
            assert_eq!(
                sum_map2(&row, &vec![2.0f32; n], |a, b| a * b),
                2.0 * expected
            );
            for fused in [false, true] {
                let mut twice = row.clone();
                Simd { fused }.axpy(&mut twice, 2.0, &row);
                assert!(twice.iter().zip(&row).all(|(twice, x)| *twice == 3.0 * x));
                // Integers below 2^24: exact in f32.
                assert_eq!(
                    f64::from(Simd { fused }.dot(&row, &vec![1.0f32; n])),
                    expected
                );
            }
            assert_eq!(
                max(&row),
                row.iter().copied().fold(f32::NEG_INFINITY, f32::max)
            );
        }
    }
}

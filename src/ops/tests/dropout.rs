//! Dropout: which numbers a mask keeps, and that it does with numbers what its tensor says.

use candle_core::Device;
use half::bf16;
use proptest::prelude::*;

use super::{cases, flat, mask, on, random, tensor, uniform, within};
use crate::ops::DropoutMask;

/// u < p is dropped, u = p is kept; what is kept grows by 1 / (1 - p), so that the mean stays.
#[test]
fn a_mask_keeps_the_mean() {
    // u is the upper 24 bits: 0, just below a quarter, a quarter, almost 1.
    let drawn = [0, (1 << 30) - 1, 1 << 30, u32::MAX];
    let numbers = |p: f64| {
        let mask = DropoutMask::sample((2, 2), p, |row, numbers| {
            numbers.copy_from_slice(&drawn[2 * row..2 * row + 2])
        });
        flat(&mask.tensor(&Device::Cpu).unwrap())
    };
    assert_eq!(numbers(0.25), [0.0, 0.0, 4.0 / 3.0, 4.0 / 3.0]);
    assert_eq!(numbers(0.0), [1.0; 4]);
    let many = mask(7, (200, 200), 0.25).tensor(&Device::Cpu).unwrap();
    // The standard error of the mean is sqrt(p / (1 - p) / 40000) = 0.0029.
    within(
        "mean",
        &many.mean_all().unwrap(),
        &candle_core::Tensor::new(1.0f32, &Device::Cpu).unwrap(),
        0.012,
    );
}

proptest! {
    #![proptest_config(cases(48))]

    /// Any shape, both formats, any number of threads: as the drawn numbers say.
    #[test]
    fn numbers_are_dropped_as_drawn(rows in 1usize..70, columns in 1usize..200, p in 0.0..0.9f64, seed: u64) {
        let drawn = uniform(seed, rows * columns);
        let (x, sum) = (flat(&random(seed ^ 1, &[rows, columns])), flat(&random(seed ^ 2, &[rows, columns])));
        let keep = (1.0 / (1.0 - p)) as f32;
        let want: Vec<f32> = drawn.iter().map(|u| if f64::from(*u) < p { 0.0 } else { keep }).collect();
        for threads in [1, 3] {
            let (masked, narrow, added) = on(threads, || {
                let mask = mask(seed, (rows, columns), p);
                let tensor = tensor(&x, &[rows, columns]);
                let mut added = sum.clone();
                mask.add_masked(&x, &mut added);
                (mask.apply(&tensor).unwrap(), mask.apply(&tensor.to_dtype(candle_core::DType::BF16).unwrap()).unwrap(), added)
            });
            for i in 0..x.len() {
                assert_eq!(masked[i], x[i] * want[i]);
                assert_eq!(narrow[i], bf16::from_f32(x[i]).to_f32() * want[i]);
                assert_eq!(added[i], sum[i] + x[i] * want[i]);
            }
        }
    }
}

//! Rotary embedding: the rotation, its inverse, and every scaling of the frequencies.

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::super::{Context, QueryScaling, Rope, RopeScaling, RopeTables, Segments, rope_cost};
use super::{Pair, cases, close, flat, for_each_path, random, tensor};
use crate::error::Result;
use crate::work::{Precision, WorkCounter};

/// Channel i and i + R/2, or 2i and 2i + 1, as the real and imaginary part of a number rotated by
/// position * frequency. `frequency`: of a pair, in a segment of a length.
fn naive(
    x: &Tensor,
    lengths: &[usize],
    rope: &Rope,
    frequency: impl Fn(usize, usize) -> f64,
) -> candle_core::Result<Tensor> {
    let (n, c) = x.dims2()?;
    let (head_dim, half) = (rope.head_dim, rope.rotary_dim / 2);
    let mut angles = Vec::new();
    for &length in lengths {
        for position in 0..length {
            angles.extend((0..half).map(|i| position as f64 * frequency(i, length)));
        }
    }
    let angles = Tensor::from_vec(angles, (n, 1, half), &Device::Cpu)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let x = x.reshape((n, c / head_dim, head_dim))?;
    let heads = c / head_dim;
    let rotated = x.narrow(2, 0, 2 * half)?;
    let (pairs, dim) = if rope.interleaved {
        (rotated.reshape((n, heads, half, 2))?, 3)
    } else {
        (rotated.reshape((n, heads, 2, half))?, 2)
    };
    let part = |index| pairs.narrow(dim, index, 1)?.squeeze(dim);
    let (re, im) = (part(0)?, part(1)?);
    let real = (re.broadcast_mul(&cos)? - im.broadcast_mul(&sin)?)?;
    let imaginary = (im.broadcast_mul(&cos)? + re.broadcast_mul(&sin)?)?;
    let rest = x.narrow(2, 2 * half, head_dim - 2 * half)?;
    let rotated = Tensor::stack(&[real, imaginary], dim)?.reshape((n, heads, 2 * half))?;
    if 2 * half == head_dim {
        return rotated.reshape((n, c));
    }
    Tensor::cat(&[rotated, rest], 2)?.reshape((n, c))
}

fn prove(
    rope: &Rope,
    lengths: &[usize],
    heads: usize,
    seed: u64,
    frequency: impl Fn(usize, usize) -> f64 + Sync,
) {
    let segments = Segments::from_lengths(lengths.iter().copied());
    let tables = rope.tables(&segments, &Device::Cpu).unwrap();
    let shape = [lengths.iter().sum(), heads * rope.head_dim];
    Pair {
        inputs: &[random(seed, &shape)],
        dy: &random(seed ^ 1, &shape),
        op: |context: Context<'_>, x: &[Tensor], dy: &Tensor| {
            let y = tables.forward(context, &x[0])?;
            Ok((y, vec![Some(tables.backward(context, dy)?)]))
        },
        naive: |x: &[Tensor]| naive(&x[0], lengths, rope, &frequency),
        cost: rope_cost(shape[0], shape[1], heads * rope.rotary_dim).times(2),
        roundings: 8,
    }
    .prove();
}

proptest! {
    #![proptest_config(cases(24))]

    #[test]
    fn rotation_is_its_definition(
        lengths in prop::collection::vec(1usize..50, 1..5),
        heads in 1usize..4,
        half in 1usize..9,
        unrotated in 0usize..5,
        interleaved: bool,
        seed: u64,
    ) {
        let (theta, rotary_dim) = (10_000f64, 2 * half);
        let head_dim = rotary_dim + unrotated;
        let plain = |i: usize, theta: f64| theta.powf(-(i as f64) / half as f64);
        let rope = Rope { head_dim, rotary_dim, interleaved, theta, scaling: RopeScaling::None };
        prove(&rope, &lengths, heads, seed, |i, _| plain(i, theta));
        let rope = Rope { scaling: RopeScaling::Linear { factor: 4.0 }, ..rope };
        prove(&rope, &lengths, heads, seed, |i, _| plain(i, theta) / 4.0);
        if half > 1 {
            // base' = base * (factor * length / original - (factor - 1)) ^ (D / (D - 2)) beyond the
            // original length.
            let rope = Rope { scaling: RopeScaling::Dynamic { factor: 3.0, original: 20 }, ..rope };
            prove(&rope, &lengths, heads, seed, |i, length| {
                let stretch = if length > 20 { 3.0 * length as f64 / 20.0 - 2.0 } else { 1.0 };
                plain(i, theta * stretch.powf(rotary_dim as f64 / (rotary_dim as f64 - 2.0)))
            });
        }
    }
}

/// D = 8, theta 2^16: frequencies 2^0, 2^-4, 2^-8, 2^-12 before scaling.
fn scaled(scaling: RopeScaling) -> Rope {
    Rope {
        head_dim: 8,
        rotary_dim: 8,
        interleaved: false,
        theta: 65536.0,
        scaling,
    }
}

/// Frequencies of Llama 3.1's rule: wavelengths 6.28, 100.5, 1608, 25736. With original 256, low 1,
/// high 4: below 64 unchanged, above 256 divided by 8, and at 100.5 a share of (256 / 100.53 - 1) /
/// 3 = 0.515493 unchanged: 2^-4 * (0.515493 + 0.484507 / 8) = 2^-4 * 0.576056.
#[test]
fn llama3_has_three_zones() {
    let rope = scaled(RopeScaling::Llama3 {
        factor: 8.0,
        low: 1.0,
        high: 4.0,
        original: 256,
    });
    let frequencies = [1.0, 0.576056 / 16.0, 1.0 / 256.0 / 8.0, 1.0 / 4096.0 / 8.0];
    prove(&rope, &[3, 2], 1, 5, |i, _| frequencies[i]);
}

/// YaRN with original 256: pair(rotations) = 8 ln(256 / (2 pi rotations)) / (2 ln 65536); pair(32)
/// = 0.0871, pair(1) = 1.3371. Rounded to 0 and 2: the ramp is 0, 1/2, 1, 1. Not rounded: 0, (1 -
/// 0.0871) / 1.25 = 0.730299, 1, 1. cos and sin times 1.25.
#[test]
fn yarn_ramps_over_dimensions() -> Result<()> {
    for (truncate, share) in [(true, 0.5), (false, 0.730299)] {
        let rope = scaled(RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.25,
            original: 256,
            truncate,
        });
        let second = (share / 4.0 + 1.0 - share) / 16.0;
        let frequencies = [1.0, second, 1.0 / 256.0 / 4.0, 1.0 / 4096.0 / 4.0];
        let x = random(3, &[4, 16]);
        let tables = rope.tables(&Segments::from_lengths([4]), &Device::Cpu)?;
        let want = naive(&x.to_dtype(DType::F64)?, &[4], &rope, |i, _| frequencies[i])?;
        let want = (want * 1.25)?;
        for_each_path(|context| close("y", &tables.forward(context, &x).unwrap(), &want, 16));
    }
    Ok(())
}

/// Each segment by its length: four tokens and fewer by the short divisors, five by the long ones;
/// cos and sin times 1.5.
#[test]
fn longrope_chooses_by_the_length_of_a_segment() -> Result<()> {
    let (short, long) = ([1.0, 2.0, 4.0, 5.0], [2.0, 4.0, 8.0, 16.0]);
    let rope = scaled(RopeScaling::LongRope {
        short: short.to_vec(),
        long: long.to_vec(),
        attention_factor: 1.5,
        original: 4,
    });
    let lengths = [4, 5, 1];
    let frequency = |i: usize, length: usize| {
        let divisors = if length == 5 { long } else { short };
        [1.0, 1.0 / 16.0, 1.0 / 256.0, 1.0 / 4096.0][i] / divisors[i]
    };
    let x = random(3, &[10, 16]);
    let want = (naive(&x.to_dtype(DType::F64)?, &lengths, &rope, frequency)? * 1.5)?;
    let tables = rope.tables(&Segments::from_lengths(lengths), &Device::Cpu)?;
    for_each_path(|context| close("y", &tables.forward(context, &x).unwrap(), &want, 16));
    Ok(())
}

/// Positions restart in every segment; `tables_from` continues where a cache ends; rotating back
/// undoes a rotation.
#[test]
fn positions_restart_and_continue() -> Result<()> {
    let rope = Rope {
        head_dim: 4,
        rotary_dim: 4,
        interleaved: false,
        theta: 100.0,
        scaling: RopeScaling::None,
    };
    let counter = WorkCounter::default();
    let context = Context::new(&counter, Precision::F32);
    let row = random(1, &[1, 8]);
    let x = row.repeat((7, 1))?;
    let tables = rope.tables(&Segments::from_lengths([3, 4]), &Device::Cpu)?;
    let y = tables.forward(context, &x)?;
    let rows = |t: usize| flat(&y.narrow(0, t, 1).unwrap());
    assert_eq!([rows(0), rows(1), rows(2)], [rows(3), rows(4), rows(5)]);
    assert_eq!(rows(0), flat(&row));
    assert_ne!(rows(6), rows(2));
    let at = |position, x| {
        rope.tables_from(position, 1, &Device::Cpu)?
            .forward(context, x)
    };
    assert_eq!(flat(&at(3, &row)?), rows(6));
    close("there and back", &tables.backward(context, &y)?, &x, 8);
    // theta ^ 0 = 1, so at position p channels 0 and 2 rotate by p radians.
    let unit = tensor(&[1.0, 0.0, 0.0, 0.0], &[1, 4]);
    let want = tensor(&[-0.416_146_84, 0.0, 0.909_297_4, 0.0], &[1, 4]);
    close("two radians", &at(2, &unit)?, &want, 4);
    Ok(())
}

/// With beta 0.5 and 4 positions in training the factor is 1 + 0.5 ln(1 + floor(position / 4)).
#[test]
fn queries_beyond_the_trained_length_are_scaled() {
    let scaling = QueryScaling {
        beta: 0.5,
        original: 4,
    };
    let segments = Segments::from_lengths([9, 5]);
    let keys = scaled(RopeScaling::None).tables(&segments, &Device::Cpu);
    let keys = keys.unwrap();
    let positions = (0..9).chain(0..5);
    let queries = scaling.query_tables(&keys, positions.clone()).unwrap();
    let x = random(1, &[14, 16]);
    let factors = [1.0, 1.346_573_6, 1.549_306_1];
    let factors = positions.map(|position| factors[position / 4]);
    let factors = tensor(&factors.collect::<Vec<f32>>(), &[14, 1]);
    for_each_path(|context| {
        for backward in [false, true] {
            let rotate = |tables: &RopeTables| {
                let rotated = if backward {
                    tables.backward(context, &x)
                } else {
                    tables.forward(context, &x)
                };
                rotated.unwrap()
            };
            let want = rotate(&keys).broadcast_mul(&factors).unwrap();
            close("queries", &rotate(&queries), &want, 4);
        }
    });
}

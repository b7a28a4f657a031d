//! Fused projections: which column belongs to which part.

use candle_core::{DType, Tensor};

use super::super::{Context, columns_cost, join_columns, split_columns};
use super::{flat, for_each_path, random};
use crate::work::{Precision, WorkCounter};

/// Column `i` of part `p` of group `g` is column `g * group + start of p + i`, in more groups than a
/// task takes; joining the parts restores the matrix, and in bf16 rounds it.
#[test]
fn parts_are_the_columns_of_each_group() {
    for (n, groups, widths) in [(3, 1, [4, 2, 2]), (5, 2, [3, 1, 2]), (40, 3, [7, 7, 7])] {
        let group: usize = widths.iter().sum();
        let x = random(n as u64, &[n, groups * group]);
        let rows: Vec<Vec<f32>> = x.to_vec2().unwrap();
        for_each_path(|context| {
            let parts = split_columns(context, &x, groups, &widths).unwrap();
            let mut start = 0;
            for (part, width) in parts.iter().zip(widths) {
                let part: Vec<Vec<f32>> = part.to_vec2().unwrap();
                for (row, part) in rows.iter().zip(&part) {
                    let column = |i: &usize| i / width * group + start + i % width;
                    let wanted: Vec<f32> = (0..groups * width).map(|i| row[column(&i)]).collect();
                    assert_eq!(part, &wanted);
                }
                start += width;
            }
            let joined = join_columns(context, &parts, groups).unwrap();
            assert_eq!(flat(&joined), flat(&x));
            let work = context.counter.take();
            assert_eq!(work, columns_cost(n, groups * group).times(2));
        });
        let counter = WorkCounter::default();
        let narrow = Context::new(&counter, Precision::Bf16);
        let mut parts = split_columns(narrow, &x, groups, &widths).unwrap();
        parts[0] = parts[0].to_dtype(DType::BF16).unwrap();
        let joined = join_columns(narrow, &parts, groups).unwrap();
        let wanted = x.to_dtype(DType::BF16).unwrap();
        assert_eq!(joined.dtype(), DType::BF16);
        let wide = |x: &Tensor| flat(&x.to_dtype(DType::F32).unwrap());
        assert_eq!(wide(&joined), wide(&wanted));
    }
}

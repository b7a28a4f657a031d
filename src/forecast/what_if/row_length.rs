//! Batches of the same tokens under another `max_length`: longer records are split into windows, records cut at the old length
//! are joined in pairs. An estimate in one respect: rows are filled in order, not by best fit.

use crate::data::BatchShape;

/// The batches of `steps` with rows of `length` tokens instead of `old`. Packed rows are regrouped, `rows` to a micro-batch;
/// unpacked ones (`rows` is `None`) stay in their micro-batch. `None` if nothing changes.
pub(super) fn regrouped(
    steps: &[Vec<BatchShape>],
    old: usize,
    length: usize,
    rows: Option<usize>,
) -> Option<Vec<BatchShape>> {
    let batches = || steps.iter().flatten();
    let cut: Vec<Vec<usize>> = batches()
        .map(|batch| cut(&batch.segments, old, length))
        .collect();
    let loss: usize = batches().map(|batch| batch.loss_tokens).sum();
    let share = loss as f64 / batches().map(BatchShape::tokens).sum::<usize>().max(1) as f64;
    let shape = |segments: Vec<usize>| {
        let tokens: usize = segments.iter().sum();
        BatchShape {
            segments,
            loss_tokens: (share * tokens as f64).round() as usize,
        }
    };
    let regrouped = match rows {
        Some(rows) => filled(&cut.concat(), rows * length),
        None if cut.iter().eq(batches().map(|batch| &batch.segments)) => return None,
        None => cut,
    };
    Some(regrouped.into_iter().map(shape).collect())
}

/// Segments of at most `length` tokens; where `length` is more than `old`, those cut at `old` are joined two by two.
fn cut(segments: &[usize], old: usize, length: usize) -> Vec<usize> {
    if length < old {
        let windows = |&segment: &usize| {
            let starts = (0..segment).step_by(length);
            starts.map(move |start| length.min(segment - start))
        };
        return segments.iter().flat_map(windows).collect();
    }
    let full = segments.iter().filter(|segment| **segment == old).count();
    let joined = std::iter::repeat_n(2 * old, full / 2).chain(std::iter::repeat_n(old, full % 2));
    segments
        .iter()
        .copied()
        .filter(|segment| *segment != old)
        .chain(joined)
        .collect()
}

/// `segments` in micro-batches of at most `tokens` tokens, in order.
fn filled(segments: &[usize], tokens: usize) -> Vec<Vec<usize>> {
    let mut batches = vec![Vec::new()];
    let mut used = 0;
    for segment in segments {
        if used + segment > tokens && used > 0 {
            batches.push(Vec::new());
            used = 0;
        }
        used += segment;
        let last = batches.len() - 1;
        batches[last].push(*segment);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(segments: &[usize], loss_tokens: usize) -> Vec<Vec<BatchShape>> {
        vec![vec![BatchShape {
            segments: segments.to_vec(),
            loss_tokens,
        }]]
    }

    #[test]
    fn the_same_tokens_stand_in_shorter_and_longer_rows() {
        // Two packed rows of 8: a record of 8, one of 5 and one of 3; half of the tokens have a loss.
        let steps = step(&[8, 5, 3], 8);
        // Rows of 4, two to a micro-batch of 8: 4 4 | 4 1 3.
        let shorter = regrouped(&steps, 8, 4, Some(2)).unwrap();
        assert_eq!(
            shorter,
            [([4, 4].to_vec(), 4), ([4, 1, 3].to_vec(), 4)].map(|(segments, loss_tokens)| {
                BatchShape {
                    segments,
                    loss_tokens,
                }
            })
        );
        // Rows of 16: all in one; the record of 8 was cut, but has no other to go on with.
        let longer = regrouped(&steps, 8, 16, Some(2)).unwrap();
        assert_eq!(
            longer,
            [BatchShape {
                segments: vec![5, 3, 8],
                loss_tokens: 8
            }]
        );
        // Unpacked rows: only what is cut changes anything.
        assert_eq!(regrouped(&step(&[3, 4], 2), 8, 4, None), None);
        assert_eq!(
            regrouped(&step(&[8, 8], 4), 8, 16, None).unwrap()[0].segments,
            [16]
        );
        assert_eq!(
            regrouped(&step(&[7], 7), 8, 4, None).unwrap()[0].segments,
            [4, 3]
        );
    }
}

//! Accuracy on multiple-choice records: `acc` and `acc_norm` of lm-evaluation-harness (`lm_eval/api/task.py`).

/// Whether the right choice of a record was the likeliest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChoiceHit {
    /// By log-likelihood: `acc`.
    pub by_sum: bool,
    /// By log-likelihood per character of the choice: `acc_norm`.
    pub by_character: bool,
}

impl ChoiceHit {
    /// `loglikelihoods` and `characters` of each choice; `label`: the right one. Of equals the first is taken.
    pub fn new(loglikelihoods: &[f64], characters: &[usize], label: usize) -> Self {
        let per_character: Vec<f64> = loglikelihoods
            .iter()
            .zip(characters)
            .map(|(sum, length)| sum / *length as f64)
            .collect();
        Self {
            by_sum: first_largest(loglikelihoods) == Some(label),
            by_character: first_largest(&per_character) == Some(label),
        }
    }
}

fn first_largest(values: &[f64]) -> Option<usize> {
    let mut largest = None;
    for (index, value) in values.iter().enumerate() {
        if largest.is_none_or(|at: usize| *value > values[at]) {
            largest = Some(index);
        }
    }
    largest
}

/// A share of records.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// The share.
    pub mean: f64,
    /// Its standard error; `None` of one record.
    pub standard_error: Option<f64>,
}

/// The share of `true`.
pub fn share(hits: impl Iterator<Item = bool>) -> Share {
    let (mut count, mut hit) = (0.0, 0.0);
    for is_hit in hits {
        count += 1.0;
        hit += f64::from(u8::from(is_hit));
    }
    let mean = hit / count;
    Share {
        mean,
        standard_error: (count > 1.0).then(|| (mean * (1.0 - mean) / (count - 1.0)).sqrt()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_choice_may_win_by_character_alone() {
        let hit = ChoiceHit::new(&[-3.0, -4.0], &[2, 4], 1);
        assert_eq!((hit.by_sum, hit.by_character), (false, true));
        assert!(ChoiceHit::new(&[-1.0, -1.0], &[1, 1], 0).by_sum);
    }

    /// By hand: 3 of 4; sqrt(0.75 x 0.25 / 3).
    #[test]
    fn a_share_has_the_standard_error_of_a_mean() {
        let found = share([true, true, false, true].into_iter());
        assert_eq!((found.mean, found.standard_error), (0.75, Some(0.25)));
        assert_eq!(share([true].into_iter()).standard_error, None);
    }
}

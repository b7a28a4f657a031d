//! Metrics of a classifier from true and predicted classes, as scikit-learn defines them.

use serde::{Deserialize, Serialize};

/// Counts of records by true class (row) and predicted class (column).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

/// Figures of a classification, each from 0 to 1, the correlation from -1 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Share of records whose class is right.
    pub accuracy: f64,
    /// Mean F1 of the classes that occur, true or predicted.
    pub f1_macro: f64,
    /// F1 of all decisions together; equals the accuracy, because a record has one class.
    pub f1_micro: f64,
    /// Matthews' correlation coefficient; 0 where a side has one class alone.
    pub matthews_correlation: f64,
}

/// The class of the largest of `logits`, of equal ones the first.
pub fn predicted_class(logits: &[f32]) -> usize {
    let larger = |best: usize, class: usize| {
        if logits[class] > logits[best] {
            class
        } else {
            best
        }
    };
    (1..logits.len()).fold(0, larger)
}

impl Confusion {
    /// No records yet, of `classes` classes.
    pub fn new(classes: usize) -> Self {
        Self {
            classes,
            counts: vec![0; classes * classes],
        }
    }

    /// Counts the record of class `truth` with these `logits`, one a class.
    pub fn add(&mut self, truth: u32, logits: &[f32]) {
        let predicted = predicted_class(logits);
        self.counts[truth as usize * self.classes + predicted] += 1;
    }

    /// Counts records of classes `truths` with `logits` (L, K), row by row.
    pub fn add_all(&mut self, truths: &[u32], logits: &[f32]) {
        let rows = logits.chunks(self.classes.max(1));
        truths
            .iter()
            .zip(rows)
            .for_each(|(truth, logits)| self.add(*truth, logits));
    }

    /// The counts, a row for each true class.
    pub fn rows(&self) -> Vec<Vec<u64>> {
        let rows = self.counts.chunks(self.classes.max(1));
        rows.map(<[u64]>::to_vec).collect()
    }

    /// The figures; `None` without records.
    pub fn metrics(&self) -> Option<Metrics> {
        let k = self.classes;
        let total = self.counts.iter().sum::<u64>() as f64;
        if total == 0.0 {
            return None;
        }
        let count = |truth: usize, predicted: usize| self.counts[truth * k + predicted] as f64;
        let right: Vec<f64> = (0..k).map(|class| count(class, class)).collect();
        let sums = |count: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
            let sum = |class| (0..k).map(|other| count(class, other)).sum();
            (0..k).map(sum).collect()
        };
        let truths = sums(&count);
        let predictions = sums(&|predicted, truth| count(truth, predicted));
        let f1 = |class: usize| {
            let both = truths[class] + predictions[class];
            (both > 0.0).then(|| 2.0 * right[class] / both)
        };
        let scores: Vec<f64> = (0..k).filter_map(f1).collect();
        let correct: f64 = right.iter().sum();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        // Gorodkin 2004: the covariance of truths and predictions over the root of their variances.
        let covariance = correct * total - dot(&truths, &predictions);
        let variances = (total * total - dot(&truths, &truths))
            * (total * total - dot(&predictions, &predictions));
        Some(Metrics {
            accuracy: correct / total,
            f1_macro: scores.iter().sum::<f64>() / scores.len() as f64,
            f1_micro: correct / total,
            matthews_correlation: if variances > 0.0 {
                covariance / variances.sqrt()
            } else {
                0.0
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scripts/metrics_reference.py` made the cases with scikit-learn.
    #[test]
    fn figures_equal_those_of_scikit_learn() {
        let golden = include_str!("../../tests/golden/metrics.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let classes = case["classes"].as_u64().unwrap() as usize;
            let list =
                |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
            let mut confusion = Confusion::new(classes);
            for (truth, predicted) in list("true").into_iter().zip(list("predicted")) {
                let logit = |class: usize| {
                    if class == predicted as usize {
                        0.5
                    } else {
                        -1.0
                    }
                };
                confusion.add(truth, &(0..classes).map(logit).collect::<Vec<f32>>());
            }
            assert_eq!(
                serde_json::json!(confusion.rows()),
                case["confusion_matrix"]
            );
            let metrics = serde_json::to_value(confusion.metrics().unwrap()).unwrap();
            for (key, found) in metrics.as_object().unwrap() {
                let wanted = case[key].as_f64().unwrap();
                let found = found.as_f64().unwrap();
                assert!(
                    (found - wanted).abs() < 1e-12,
                    "{key}: {found}, not {wanted}"
                );
            }
        }
        assert_eq!(Confusion::new(3).metrics(), None);
    }
}

//! Metrics of a classifier from true and predicted classes, as scikit-learn defines them, and of named
//! entities, as seqeval does.

mod entities;

use serde::{Deserialize, Serialize};

use self::entities::EntityCounts;
use crate::data::MicroBatch;

/// The decisions of a classifier so far.
#[derive(Debug, Clone)]
pub struct Scores {
    confusion: Confusion,
    /// Where the classes are tags of entities.
    entities: Option<EntityCounts>,
}

impl Scores {
    /// None yet, of classes with these names. `words`: whether the words of a record have them, so that they
    /// may be tags of entities.
    pub fn new(labels: &[String], words: bool) -> Self {
        Self {
            confusion: Confusion::new(labels.len()),
            entities: EntityCounts::new(labels).filter(|_| words),
        }
    }

    /// Counts the decisions of a batch by its logits (L, K), row by row.
    pub fn add(&mut self, batch: &MicroBatch, logits: &[f32]) {
        let predicted = logits.chunks(self.confusion.classes.max(1));
        let predicted: Vec<usize> = predicted.map(predicted_class).collect();
        for (truth, predicted) in batch.targets.iter().zip(&predicted) {
            self.confusion.add(*truth as usize, *predicted);
        }
        let Some(entities) = &mut self.entities else {
            return;
        };
        for record in batch.loss_ranges() {
            let truth = batch.targets[record.clone()].iter();
            let truth: Vec<usize> = truth.map(|class| *class as usize).collect();
            entities.add(&truth, &predicted[record]);
        }
    }

    /// The figures; `None` without decisions.
    pub fn metrics(&self) -> Option<Metrics> {
        let metrics = self.confusion.metrics()?;
        Some(match &self.entities {
            Some(entities) => Metrics {
                entity_f1: Some(entities.f1()),
                entity_precision: Some(entities.precision()),
                entity_recall: Some(entities.recall()),
                ..metrics
            },
            None => metrics,
        })
    }

    /// The counts, a row for each true class.
    pub fn confusion(&self) -> Vec<Vec<u64>> {
        self.confusion.rows()
    }
}

/// Counts of decisions by true class (row) and predicted class (column).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

/// Figures of a classification, each from 0 to 1, the correlation from -1 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Share of decisions that are right.
    pub accuracy: f64,
    /// Mean F1 of the classes that occur, true or predicted.
    pub f1_macro: f64,
    /// F1 of all decisions together; equals the accuracy, because a decision is one class.
    pub f1_micro: f64,
    /// Matthews' correlation coefficient; 0 where a side has one class alone.
    pub matthews_correlation: f64,
    /// F1 of entities of the right type and extent, if the classes are their tags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity_f1: Option<f64>,
    /// Share of predicted entities that are right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity_precision: Option<f64>,
    /// Share of true entities that are predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity_recall: Option<f64>,
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
    /// No decisions yet, between `classes` classes.
    fn new(classes: usize) -> Self {
        Self {
            classes,
            counts: vec![0; classes * classes],
        }
    }

    fn add(&mut self, truth: usize, predicted: usize) {
        self.counts[truth * self.classes + predicted] += 1;
    }

    /// The counts, a row for each true class.
    fn rows(&self) -> Vec<Vec<u64>> {
        let rows = self.counts.chunks(self.classes.max(1));
        rows.map(<[u64]>::to_vec).collect()
    }

    /// The figures; `None` without decisions.
    fn metrics(&self) -> Option<Metrics> {
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
            entity_f1: None,
            entity_precision: None,
            entity_recall: None,
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
                confusion.add(truth as usize, predicted as usize);
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

    /// `scripts/metrics_reference.py` made the cases with seqeval.
    #[test]
    fn entities_are_those_of_seqeval() {
        let golden = include_str!("../../tests/golden/metrics.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        let labels: Vec<String> = serde_json::from_value(golden["tags"].clone()).unwrap();
        for case in golden["tagged"].as_array().unwrap() {
            let list = |key: &str| -> Vec<Vec<usize>> {
                serde_json::from_value(case[key].clone()).unwrap()
            };
            let mut scores = Scores::new(&labels, true);
            let batches = list("true").into_iter().zip(list("predicted"));
            for (truth, predicted) in batches {
                let tokens = vec![0; truth.len()];
                let example = crate::data::Example {
                    loss: vec![true; truth.len()],
                    labels: truth.iter().map(|class| *class as u32).collect(),
                    tokens,
                };
                let row = |class: &usize| {
                    let logit = |other| if other == *class { 1.0 } else { 0.0 };
                    (0..labels.len()).map(logit).collect::<Vec<f32>>()
                };
                let logits = predicted.iter().flat_map(row).collect::<Vec<f32>>();
                scores.add(&MicroBatch::new([(0, &example)]), &logits);
            }
            let metrics = scores.metrics().unwrap();
            for (found, key) in [
                (metrics.entity_f1, "f1"),
                (metrics.entity_precision, "precision"),
                (metrics.entity_recall, "recall"),
            ] {
                let wanted = case[key].as_f64().unwrap();
                assert!(
                    (found.unwrap() - wanted).abs() < 1e-12,
                    "{key}: {found:?}, not {wanted}"
                );
            }
        }
    }

    #[test]
    fn other_names_than_tags_have_no_entities() {
        let scores = |names: &[&str], words| {
            let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            Scores::new(&names, words).entities.is_some()
        };
        assert!(scores(&["O", "B-PER", "I-PER"], true));
        assert!(!scores(&["O", "B-PER", "I-PER"], false));
        assert!(!scores(&["NOUN", "VERB"], true));
    }
}

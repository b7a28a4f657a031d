//! Metrics of a classifier or regression: those of scikit-learn for classes and labels, of SciPy for
//! numbers, and of seqeval for named entities.

mod choices;
mod entities;
mod labels;
mod text;
mod values;

use serde::{Deserialize, Serialize};

pub use self::choices::{ChoiceHit, share};
use self::entities::EntityCounts;
use self::labels::LabelCounts;
pub use self::text::{Bleu, rouge_l, rouge_n};
use self::values::ValuePairs;
use crate::data::MicroBatch;
use crate::model::{Architecture, Classified, ProblemType};

/// The decisions of a model so far.
#[derive(Debug, Clone)]
pub struct Scores {
    outputs: usize,
    counts: Counts,
}

#[derive(Debug, Clone)]
enum Counts {
    Classes {
        confusion: Confusion,
        /// Where the classes are tags of entities.
        entities: Option<EntityCounts>,
    },
    Labels(LabelCounts),
    Values(ValuePairs),
}

impl Scores {
    /// None yet, of the model's outputs.
    pub fn new(architecture: &Architecture) -> Self {
        let labels = architecture.labels();
        match architecture.problem_type() {
            Some(ProblemType::MultiLabel) => Self {
                outputs: labels.len(),
                counts: Counts::Labels(LabelCounts::new(labels.len())),
            },
            Some(ProblemType::Regression) => Self {
                outputs: labels.len(),
                counts: Counts::Values(ValuePairs::default()),
            },
            Some(ProblemType::SingleLabel) | None => {
                let words = architecture.classified() == Some(Classified::Tokens);
                Self::of_classes(labels, words)
            }
        }
    }

    /// Of classes with these names. `words`: whether the words of a record have them, so that they
    /// may be tags of entities.
    fn of_classes(labels: &[String], words: bool) -> Self {
        Self {
            outputs: labels.len(),
            counts: Counts::Classes {
                confusion: Confusion::new(labels.len()),
                entities: EntityCounts::new(labels).filter(|_| words),
            },
        }
    }

    /// Counts the decisions of a batch by its outputs (L, K), row by row.
    pub fn add(&mut self, batch: &MicroBatch, outputs: &[f32]) {
        let rows = outputs.chunks(self.outputs.max(1));
        match &mut self.counts {
            Counts::Classes {
                confusion,
                entities,
            } => {
                let predicted: Vec<usize> = rows.map(predicted_class).collect();
                for (truth, predicted) in batch.targets.iter().zip(&predicted) {
                    confusion.add(*truth as usize, *predicted);
                }
                let Some(entities) = entities else { return };
                for record in batch.loss_ranges() {
                    let truth = batch.targets[record.clone()].iter();
                    let truth: Vec<usize> = truth.map(|class| *class as usize).collect();
                    entities.add(&truth, &predicted[record]);
                }
            }
            Counts::Labels(counts) => {
                let truths = batch.values.chunks(self.outputs.max(1));
                truths
                    .zip(rows)
                    .for_each(|(truth, logits)| counts.add(truth, logits));
            }
            Counts::Values(pairs) => {
                let truths = batch.values.iter().zip(outputs);
                truths.for_each(|(truth, predicted)| pairs.add(*truth, *predicted));
            }
        }
    }

    /// The figures; `None` without decisions.
    pub fn metrics(&self) -> Option<Metrics> {
        match &self.counts {
            Counts::Classes {
                confusion,
                entities,
            } => {
                let metrics = confusion.metrics()?;
                let entities = entities.as_ref();
                Some(Metrics {
                    entity_f1: entities.map(EntityCounts::f1),
                    entity_precision: entities.map(EntityCounts::precision),
                    entity_recall: entities.map(EntityCounts::recall),
                    ..metrics
                })
            }
            Counts::Labels(counts) => Some(Metrics {
                accuracy: Some(counts.accuracy()?),
                f1_macro: Some(counts.f1_macro()),
                f1_micro: Some(counts.f1_micro()),
                ..Metrics::default()
            }),
            Counts::Values(pairs) => Some(Metrics {
                pearson_correlation: pairs.pearson(),
                spearman_correlation: pairs.spearman(),
                ..Metrics::default()
            }),
        }
    }

    /// The counts of classes, a row for each true class; empty of labels and numbers.
    pub fn confusion(&self) -> Vec<Vec<u64>> {
        match &self.counts {
            Counts::Classes { confusion, .. } => confusion.rows(),
            Counts::Labels(_) | Counts::Values(_) => Vec::new(),
        }
    }
}

/// Counts of decisions by true class (row) and predicted class (column).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

/// Declares the figures, each with its name for people.
macro_rules! metrics {
    ($($(#[doc = $doc:literal])* $key:ident: $name:literal,)*) => {
        /// Figures of a classifier or regression, each from 0 to 1, correlations from -1 to 1; those
        /// that do not apply are `None`.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
        pub struct Metrics {
            $($(#[doc = $doc])*
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub $key: Option<f64>,)*
        }

        impl Metrics {
            /// The figures that apply, by their names for people.
            pub fn named(&self) -> Vec<(&'static str, f64)> {
                let all = [$(($name, self.$key)),*].into_iter();
                all.filter_map(|(name, figure)| Some((name, figure?))).collect()
            }
        }
    };
}

metrics! {
    /// Share of decisions that are right; of several labels the share of records with all right.
    accuracy: "accuracy",
    /// Mean F1 of the classes that occur, true or predicted; of several labels of all.
    f1_macro: "F1 macro",
    /// F1 of all decisions together; of one class it equals the accuracy.
    f1_micro: "F1 micro",
    /// Matthews' correlation coefficient; 0 where a side has one class alone.
    matthews_correlation: "Matthews correlation",
    /// F1 of entities of the right type and extent, if the classes are their tags.
    entity_f1: "F1 of entities",
    /// Share of predicted entities that are right.
    entity_precision: "precision of entities",
    /// Share of true entities that are predicted.
    entity_recall: "recall of entities",
    /// Pearson's correlation coefficient; none where a side is constant.
    pearson_correlation: "Pearson correlation",
    /// Spearman's rank correlation coefficient; none where a side is constant.
    spearman_correlation: "Spearman correlation",
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
        let matthews = covariance / variances.sqrt();
        Some(Metrics {
            accuracy: Some(correct / total),
            f1_macro: Some(scores.iter().sum::<f64>() / scores.len() as f64),
            f1_micro: Some(correct / total),
            matthews_correlation: Some(if variances > 0.0 { matthews } else { 0.0 }),
            ..Metrics::default()
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
            let mut scores = Scores::of_classes(&labels, true);
            let batches = list("true").into_iter().zip(list("predicted"));
            for (truth, predicted) in batches {
                let tokens = vec![0; truth.len()];
                let example = crate::data::Example {
                    loss: vec![true; truth.len()],
                    labels: truth.iter().map(|class| *class as u32).collect(),
                    values: Vec::new(),
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

    /// `scripts/metrics_reference.py` made the cases with scikit-learn and SciPy.
    #[test]
    fn figures_of_labels_and_numbers_are_those_of_scikit_learn_and_scipy() {
        let golden = include_str!("../../tests/golden/metrics.json");
        let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
        for kind in ["labels", "values"] {
            for case in golden[kind].as_array().unwrap() {
                let rows = |key: &str| -> Vec<Vec<f32>> {
                    serde_json::from_value(case[key].clone()).unwrap()
                };
                let (truths, outputs) = (rows("true"), rows("outputs"));
                let counts = match kind {
                    "labels" => Counts::Labels(LabelCounts::new(truths[0].len())),
                    _ => Counts::Values(ValuePairs::default()),
                };
                let mut scores = Scores {
                    outputs: truths[0].len(),
                    counts,
                };
                for (truth, outputs) in truths.iter().zip(&outputs) {
                    let batch = MicroBatch {
                        values: truth.clone(),
                        ..MicroBatch::default()
                    };
                    scores.add(&batch, outputs);
                }
                let found = serde_json::to_value(scores.metrics().unwrap()).unwrap();
                let wanted = case["metrics"].as_object().unwrap();
                assert_eq!(found.as_object().unwrap().len(), wanted.len(), "{found}");
                for (key, wanted) in wanted {
                    let (found, wanted) = (found[key].as_f64().unwrap(), wanted.as_f64().unwrap());
                    assert!(
                        (found - wanted).abs() < 1e-12,
                        "{key}: {found}, not {wanted}"
                    );
                }
            }
        }
    }

    #[test]
    fn other_names_than_tags_have_no_entities() {
        let scores = |names: &[&str], words| {
            let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            let scores = Scores::of_classes(&names, words);
            matches!(
                scores.counts,
                Counts::Classes {
                    entities: Some(_),
                    ..
                }
            )
        };
        assert!(scores(&["O", "B-PER", "I-PER"], true));
        assert!(!scores(&["O", "B-PER", "I-PER"], false));
        assert!(!scores(&["NOUN", "VERB"], true));
    }
}

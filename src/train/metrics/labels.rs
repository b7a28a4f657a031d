//! Decisions on labels of which several may apply, as scikit-learn scores them.

/// Counts of decisions on labels.
#[derive(Debug, Clone)]
pub(super) struct LabelCounts {
    records: u64,
    /// Records with every label right.
    right: u64,
    labels: Vec<Counts>,
}

/// Decisions on one label.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    truths: u64,
    predictions: u64,
    right: u64,
}

impl Counts {
    /// 0 of a label that never applies and is never predicted.
    fn f1(self) -> f64 {
        let both = self.truths + self.predictions;
        2.0 * self.right as f64 / both.max(1) as f64
    }
}

impl LabelCounts {
    pub(super) fn new(labels: usize) -> Self {
        Self {
            records: 0,
            right: 0,
            labels: vec![Counts::default(); labels],
        }
    }

    /// Counts a record: 0 or 1 of each label, and its logits, above 0 of a label that is predicted.
    pub(super) fn add(&mut self, truth: &[f32], logits: &[f32]) {
        let decisions = truth.iter().zip(logits);
        let decisions = decisions.map(|(truth, logit)| (*truth > 0.5, *logit > 0.0));
        self.records += 1;
        self.right += u64::from(
            decisions
                .clone()
                .all(|(truth, predicted)| truth == predicted),
        );
        for (counts, (truth, predicted)) in self.labels.iter_mut().zip(decisions) {
            counts.truths += u64::from(truth);
            counts.predictions += u64::from(predicted);
            counts.right += u64::from(truth && predicted);
        }
    }

    /// Share of records with every label right; `None` without records.
    pub(super) fn accuracy(&self) -> Option<f64> {
        (self.records > 0).then(|| self.right as f64 / self.records as f64)
    }

    /// Mean F1 of the labels.
    pub(super) fn f1_macro(&self) -> f64 {
        let sum: f64 = self.labels.iter().map(|counts| counts.f1()).sum();
        sum / self.labels.len().max(1) as f64
    }

    /// F1 of all decisions together.
    pub(super) fn f1_micro(&self) -> f64 {
        let sum = |count: fn(&Counts) -> u64| self.labels.iter().map(count).sum();
        let all = Counts {
            truths: sum(|counts| counts.truths),
            predictions: sum(|counts| counts.predictions),
            right: sum(|counts| counts.right),
        };
        all.f1()
    }
}

//! Correlations of predicted and true numbers, as SciPy computes them.

/// Pairs of numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct ValuePairs {
    truths: Vec<f64>,
    predictions: Vec<f64>,
}

impl ValuePairs {
    pub(super) fn add(&mut self, truth: f32, prediction: f32) {
        self.truths.push(truth.into());
        self.predictions.push(prediction.into());
    }

    /// `None` where a side is constant.
    pub(super) fn pearson(&self) -> Option<f64> {
        pearson(&self.truths, &self.predictions)
    }

    /// Pearson's of the ranks.
    pub(super) fn spearman(&self) -> Option<f64> {
        pearson(&ranks(&self.truths), &ranks(&self.predictions))
    }
}

fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    let n = x.len() as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n;
    let (x_mean, y_mean) = (mean(x), mean(y));
    let sum = |product: &dyn Fn(f64, f64) -> f64| -> f64 {
        let pairs = x.iter().zip(y);
        pairs.map(|(x, y)| product(x - x_mean, y - y_mean)).sum()
    };
    let scale = (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt();
    (scale > 0.0).then(|| (sum(&|x, y| x * y) / scale).clamp(-1.0, 1.0))
}

/// The rank of each value from 1; of equal values the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for equal in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let mean = first as f64 + (equal.len() + 1) as f64 / 2.0;
        equal.iter().for_each(|index| ranks[*index] = mean);
        first += equal.len();
    }
    ranks
}

//! Initial LoRA factors: A random, B zero.
//!
//! Takes sizes, the run's seed and the module's path; returns values. Every module has its random stream, so values depend
//! neither on the order of modules nor on the thread count. Knows nothing of sites or files.

use rand_chacha::rand_core::Rng;

use crate::random::{Purpose, stream};

/// Initial A (r, in), row by row: uniform in [-b, b) with `b = 1 / sqrt(in_features)`.
///
/// PEFT draws `kaiming_uniform_(A, a=sqrt(5))`: `b = sqrt(6 / ((1 + a^2) * fan_in))`, and `fan_in` is `in_features`. B is
/// initialised to zero, so an untrained adapter changes nothing.
pub fn kaiming_uniform(in_features: usize, r: usize, seed: u64, path: &str) -> Vec<f32> {
    let bound = 1.0 / (in_features as f32).sqrt();
    let mut random = stream(seed, Purpose::AdapterInit, &[], path);
    // 24 bits: the precision of f32.
    let unit = |bits: u32| (bits >> 8) as f32 / (1 << 24) as f32;
    (0..r * in_features)
        .map(|_| (2.0 * unit(random.next_u32()) - 1.0) * bound)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fill_the_interval_evenly() {
        // in = 64: b = 1/8. A uniform variable on [-b, b) has mean 0 and variance b^2 / 3 = 1/192.
        let values = kaiming_uniform(64, 256, 42, "model.layers.0.self_attn.q_proj");
        let n = values.len() as f64;
        assert_eq!(values.len(), 64 * 256);
        assert!(values.iter().all(|v| (-0.125..0.125).contains(v)));
        let mean = values.iter().map(|v| *v as f64).sum::<f64>() / n;
        let variance = values.iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / n;
        // Three standard errors: 3 * sqrt(1/192 / n) and 3 * (2 / sqrt 45) * b^2 / sqrt n.
        assert!(mean.abs() < 1.7e-3, "{mean}");
        assert!((variance - 1.0 / 192.0).abs() < 1.1e-4, "{variance}");
    }

    #[test]
    fn each_module_and_seed_has_its_own_values() {
        let a = kaiming_uniform(8, 2, 1, "a");
        assert_eq!(a, kaiming_uniform(8, 2, 1, "a"));
        assert_ne!(a, kaiming_uniform(8, 2, 1, "b"));
        assert_ne!(a, kaiming_uniform(8, 2, 2, "a"));
        // A larger rank begins with the same rows.
        assert_eq!(a, kaiming_uniform(8, 3, 1, "a")[..16]);
    }
}

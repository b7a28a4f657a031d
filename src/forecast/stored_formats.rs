//! What quantised weights save or cost beside bf16 weights.

use std::collections::{BTreeMap, BTreeSet};

use super::subject::{Subject, Target};
use crate::adapter::Adaptation;
use crate::model::{Architecture, ModelShape};
use crate::ops::StoredFormat;
use crate::units::{Bytes, Joules};

/// A sentence about the memory, a training step of the longest micro-batch and a generated token, each beside that with bf16 weights;
/// `None` without quantised weights. Bytes fall; decoding is vector work, so energy may rise.
pub(super) fn effect_of_formats(subject: &Subject<'_>) -> Option<String> {
    let formats = &subject.architecture.stored_formats;
    let names: BTreeSet<&str> = formats.values().map(|format| format.name()).collect();
    if names.is_empty() {
        return None;
    }
    let tensors = subject.architecture.tensors();
    let matrices = tensors.iter().filter_map(|tensor| match tensor.shape[..] {
        [rows, columns] => Some((*formats.get(&tensor.name)?, rows, columns)),
        _ => None,
    });
    let stored =
        matrices
            .clone()
            .filter_map(|(format, rows, columns): (StoredFormat, usize, usize)| {
                format.bytes_of_matrix(rows, columns)
            });
    let [stored, plain] = [
        stored.sum::<usize>(),
        matrices
            .map(|(_, rows, columns)| 2 * rows * columns)
            .sum::<usize>(),
    ];
    let unquantised = Architecture {
        stored_formats: BTreeMap::new(),
        stored_in_bf16: true,
        ..subject.architecture.clone()
    };
    let energy = |architecture: &Architecture| -> [Joules; 2] {
        let none = Adaptation::default();
        let adaptation = match subject.target {
            Target::Lora { adaptation, .. } => adaptation,
            Target::All => &none,
        };
        let training =
            ModelShape::with_adapters(architecture, adaptation, false, subject.precision());
        let serving = ModelShape::with_adapters(architecture, &none, false, subject.precision());
        let step = training.training(
            &[subject.longest_batch],
            subject.longest_batch,
            subject.settings.recompute,
        );
        let token = serving.decoding(subject.recipe.report.prompt_tokens);
        [step, token].map(|work| subject.profile.charge(&work).energy.joules())
    };
    let (own, other) = (energy(subject.architecture), energy(&unquantised));
    let [step, token] = [0, 1].map(|of| own[of].0 / other[of].0);
    Some(format!(
        "{} matrices are stored as {}: {} instead of {} in bf16; counted, a training step takes {step:.2} times and a generated token \
         {token:.2} times the energy of bf16 weights",
        formats.len(),
        names.into_iter().collect::<Vec<_>>().join(" and "),
        Bytes(stored as u64),
        Bytes(plain as u64),
    ))
}

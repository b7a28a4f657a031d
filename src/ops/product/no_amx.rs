//! Tile registers where there are none: nothing can be packed for them.

use super::{Matrix, Start};
use crate::work::Precision;

#[cfg(target_arch = "x86_64")]
pub(super) fn permitted() -> bool {
    false
}

/// As `amx::Packed`, of which there is none.
pub(in crate::ops) enum Packed {}

impl Packed {
    pub(super) fn new(_: &Matrix<'_>, _: Precision) -> Option<Self> {
        None
    }
}

pub(super) fn product_by(_: &Matrix<'_>, b: &Packed, _: &mut [f32]) {
    match *b {}
}

pub(super) fn products(terms: &[(&Packed, Matrix<'_>)], _: Start<'_>, _: &mut [f32]) {
    match *terms[0].0 {}
}

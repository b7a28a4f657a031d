//! Blocks where no unit multiplies any: nothing can be packed for them.

use super::{Matrix, Start};
use crate::work::Precision;

/// As `blocks::Unit`, of which there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Unit {}

impl Unit {
    pub(in crate::ops) fn takes(self, _: Precision) -> bool {
        match self {}
    }
}

/// As `blocks::Packed`, of which there is none.
pub(in crate::ops) enum Packed {}

impl Packed {
    pub(super) fn new(_: &Matrix<'_>, _: Precision) -> Option<Self> {
        None
    }
}

pub(super) fn product_by(unit: Unit, _: &Matrix<'_>, _: &Packed, _: &mut [f32]) {
    match unit {}
}

pub(super) fn products(unit: Unit, _: &[(&Packed, Matrix<'_>)], _: Start<'_>, _: &mut [f32]) {
    match unit {}
}

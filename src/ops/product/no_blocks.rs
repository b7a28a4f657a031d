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
    pub(super) fn new(unit: Unit, _: &Matrix<'_>, _: Precision) -> Option<Self> {
        match unit {}
    }

    pub(super) fn held(&self) -> Held {
        match *self {}
    }
}

/// As `blocks::Held`, of which there is none.
pub(in crate::ops) enum Held {}

impl Held {
    pub(super) fn is_like(&self, _: &Self) -> bool {
        match *self {}
    }

    pub(super) fn fill(&mut self, _: &Matrix<'_>) {
        match *self {}
    }

    pub(super) fn product(&self, _: &Packed, _: std::ops::Range<usize>, _: (&mut [f32], usize)) {
        match *self {}
    }

    pub(super) fn add_product(&self, _: usize, _: (&[f32], usize), _: (&mut [f32], usize)) {
        match *self {}
    }
}

pub(super) fn product_by(_: &Matrix<'_>, b: &Packed, _: &mut [f32]) {
    match *b {}
}

pub(super) fn products(terms: &[(&Packed, Matrix<'_>)], _: Start<'_>, _: &mut [f32]) {
    match *terms[0].0 {}
}

//! Blocks where no unit multiplies any: nothing can be packed for them.

use super::{Init, MatRef};
use crate::work::Precision;

/// As `bf16::MatrixUnit`, of which there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum MatrixUnit {}

impl MatrixUnit {
    pub(in crate::ops) fn takes(self, _: Precision) -> bool {
        match self {}
    }
}

/// As `bf16::Bf16Lhs`, of which there is none.
pub(in crate::ops) enum Bf16Lhs {}

impl Bf16Lhs {
    pub(super) fn new(unit: MatrixUnit, _: &MatRef<'_>, _: Precision) -> Option<Self> {
        match unit {}
    }

    pub(super) fn held(&self) -> Bf16Rhs {
        match *self {}
    }
}

/// As `bf16::Bf16Rhs`, of which there is none.
pub(in crate::ops) enum Bf16Rhs {}

impl Bf16Rhs {
    pub(super) fn is_compatible(&self, _: &Self) -> bool {
        match *self {}
    }

    pub(super) fn pack(&mut self, _: &MatRef<'_>) {
        match *self {}
    }

    pub(super) fn gemm(&self, _: &Bf16Lhs, _: std::ops::Range<usize>, _: (&mut [f32], usize)) {
        match *self {}
    }

    pub(super) fn gemm_add(&self, _: usize, _: (&[f32], usize), _: (&mut [f32], usize)) {
        match *self {}
    }
}

pub(super) fn gemm_by_packed(_: &MatRef<'_>, b: &Bf16Lhs, _: &mut [f32]) {
    match *b {}
}

pub(super) fn gemm_sum(terms: &[(&Bf16Lhs, MatRef<'_>)], _: Init<'_>, _: &mut [f32]) {
    match *terms[0].0 {}
}

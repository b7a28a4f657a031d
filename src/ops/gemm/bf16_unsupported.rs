//! Stand-in for `bf16` on targets without a matrix unit: uninhabited types of the same interface.

use std::ops::Range;

use super::{Init, MatMut, MatRef};
use crate::work::Precision;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum MatrixUnit {}

impl MatrixUnit {
    pub(in crate::ops) fn supports(self, _: Precision) -> bool {
        match self {}
    }
}

pub(in crate::ops) enum Bf16Lhs {}

impl Bf16Lhs {
    pub(super) fn new(unit: MatrixUnit, _: &MatRef<'_>, _: Precision) -> Option<Self> {
        match unit {}
    }

    pub(super) fn empty_rhs(&self) -> Bf16Rhs {
        match *self {}
    }
}

pub(in crate::ops) enum Bf16Rhs {}

impl Bf16Rhs {
    pub(super) fn is_compatible(&self, _: &Self) -> bool {
        match *self {}
    }

    pub(super) fn pack(&mut self, _: &MatRef<'_>) {
        match *self {}
    }

    pub(super) fn gemm(&self, _: &Bf16Lhs, _: Range<usize>, _: MatMut<'_>) {
        match *self {}
    }

    pub(super) fn gemm_add(&self, _: MatRef<'_>, _: MatMut<'_>) {
        match *self {}
    }
}

pub(super) fn gemm_by_packed(_: &MatRef<'_>, b: &Bf16Lhs, _: &mut [f32]) {
    match *b {}
}

pub(super) fn gemm_sum(terms: &[(&Bf16Lhs, MatRef<'_>)], _: Init<'_>, _: &mut [f32]) {
    match *terms[0].0 {}
}

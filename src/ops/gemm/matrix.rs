//! Strided views of matrices in CPU slices.

use half::bf16;

use super::packed_rhs::{PackedRhs, PackedWeightCache};
use crate::ops::quantized::QuantizedSlice;
use crate::ops::storage::cast_vec;

/// Contiguous f32 or bf16 elements.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) enum CpuSlice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> CpuSlice<'a> {
    /// The elements from index `start` on.
    pub(in crate::ops) fn slice_from(self, start: usize) -> CpuSlice<'a> {
        match self {
            CpuSlice::F32(values) => CpuSlice::F32(&values[start..]),
            CpuSlice::Bf16(values) => CpuSlice::Bf16(&values[start..]),
        }
    }

    /// An f32 copy of bf16 elements; `None` for f32.
    pub(in crate::ops) fn upcast(&self) -> Option<Vec<f32>> {
        match self {
            CpuSlice::F32(_) => None,
            CpuSlice::Bf16(values) => Some(cast_vec(values)),
        }
    }
}

/// The elements of a matrix, row-major or with strides.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    /// Decoded while they are packed; with the strides of their row-major order, or its transpose.
    Quantized(QuantizedSlice<'a>),
}

impl<'a> From<CpuSlice<'a>> for Values<'a> {
    fn from(slice: CpuSlice<'a>) -> Self {
        match slice {
            CpuSlice::F32(values) => Self::F32(values),
            CpuSlice::Bf16(values) => Self::Bf16(values),
        }
    }
}

impl<'a> Values<'a> {
    /// The elements from index `start` on; of a quantised matrix the first of a row.
    fn slice_from(self, start: usize) -> Self {
        match self {
            Self::F32(values) => Self::F32(&values[start..]),
            Self::Bf16(values) => Self::Bf16(&values[start..]),
            Self::Quantized(values) => Self::Quantized(values.slice_from(start)),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::Quantized(values) => values.len(),
        }
    }
}

/// A read-only matrix with a stride for each dimension, in elements.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct MatRef<'a> {
    pub(super) values: Values<'a>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
    /// The cache of a frozen weight's packed forms, and whether this view is the weight transposed.
    cache: Option<(&'a PackedWeightCache, bool)>,
}

impl<'a> MatRef<'a> {
    /// A row-major matrix that fills its slice.
    pub(in crate::ops) fn new(values: impl Into<Values<'a>>, rows: usize, columns: usize) -> Self {
        let values = values.into();
        assert_eq!(
            Some(values.len()),
            rows.checked_mul(columns),
            "a matrix fills its slice"
        );
        Self::strided(values, [rows, columns], [columns, 1])
    }

    /// A row-major f32 matrix that fills its slice.
    pub(in crate::ops) fn from_f32(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::new(CpuSlice::F32(values), rows, columns)
    }

    /// A matrix of `[rows, columns]` with its first element at the start of `values`.
    pub(in crate::ops) fn strided(
        values: impl Into<Values<'a>>,
        shape: [usize; 2],
        strides: [usize; 2],
    ) -> Self {
        let values = values.into();
        let [rows, columns] = shape;
        let [row_stride, column_stride] = strides;
        let end = span(columns, column_stride, 1).and_then(|row| span(rows, row_stride, row));
        assert!(
            columns == 0 || end.is_some_and(|end| end <= values.len()),
            "a matrix lies inside its slice"
        );
        Self {
            values,
            rows,
            columns,
            row_stride,
            column_stride,
            cache: None,
        }
    }

    /// The same matrix, a frozen weight as stored, with the cache of its packed forms.
    pub(in crate::ops) fn with_cache(self, cache: Option<&'a PackedWeightCache>) -> Self {
        Self {
            cache: cache.map(|cache| (cache, false)),
            ..self
        }
    }

    /// Its elements.
    pub(in crate::ops) fn values(&self) -> Values<'a> {
        self.values
    }

    /// The cached packed form, packed at its first use; `None` without a cache, or if its format is
    /// not that of `empty`.
    pub(super) fn prepacked(&self, empty: &dyn Fn() -> PackedRhs) -> Option<&'a PackedRhs> {
        let (cache, transposed) = self.cache?;
        cache.get_or_pack(transposed, self, empty)
    }

    /// Rows `start..end`.
    pub(in crate::ops) fn row_range(self, start: usize, end: usize) -> Self {
        Self::strided(
            self.values.slice_from(start * self.row_stride),
            [end - start, self.columns],
            [self.row_stride, self.column_stride],
        )
    }

    /// The transpose.
    pub(in crate::ops) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            cache: self.cache.map(|(cache, transposed)| (cache, !transposed)),
            ..self
        }
    }
}

/// Elements of a result (rows, columns).
pub(super) fn area(rows: usize, columns: usize) -> usize {
    rows.checked_mul(columns)
        .expect("a result of two matrices in memory is within the range of an index")
}

/// Elements from the start of the first of `rows` rows to the end of the last, `columns` wide and
/// `stride` apart; `None` beyond the range of an index, which assertions take as too many.
pub(super) fn span(rows: usize, stride: usize, columns: usize) -> Option<usize> {
    if rows == 0 {
        return Some(0);
    }
    (rows - 1).checked_mul(stride)?.checked_add(columns)
}

/// A row-major f32 result, whose rows may be longer than the product's.
pub(in crate::ops) struct MatMut<'a> {
    pub(super) values: &'a mut [f32],
    /// Leading dimension: elements from row to row.
    pub(super) stride: usize,
}

impl<'a> MatMut<'a> {
    /// Rows of `stride` elements from the start of `values` on.
    pub(in crate::ops) fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self { values, stride }
    }

    /// The columns from `first` on.
    pub(super) fn columns_from(&mut self, first: usize) -> MatMut<'_> {
        MatMut::new(&mut self.values[first..], self.stride)
    }
}

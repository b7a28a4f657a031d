//! Quantised weights: formats of blocks, encoding of f32 values into them, decoding, and products of one row.
//!
//! A weight (out, in) is stored row by row as blocks of consecutive values, each with its scale. GEMM decodes a panel while it packs it
//! (`gemm::pack`), so that no dequantised copy of a weight exists; one row of A is multiplied by the blocks as they are read (`dot`).

mod decode;
mod dot;
#[cfg(target_arch = "x86_64")]
mod dot_avx512;
mod encode;
mod format;

use rayon::prelude::*;

use self::decode::decode;
pub(super) use self::dot::dots;
pub use self::format::StoredFormat;

impl StoredFormat {
    /// The values of a matrix (rows, columns) in `blocks`.
    ///
    /// # Panics
    /// Where the blocks are not those of such a matrix, or the format has none.
    pub fn decode(self, blocks: &[u8], shape: [usize; 2]) -> Vec<f32> {
        QuantizedSlice::new(self, blocks, shape).to_vec()
    }
}

/// A quantised matrix, or its rows from one on.
#[derive(Debug, Clone, Copy)]
pub(super) struct QuantizedSlice<'a> {
    format: StoredFormat,
    blocks: &'a [u8],
    /// Values of a row.
    columns: usize,
    /// Index of the first value in row-major order; always that of a row.
    start: usize,
    /// Number of values.
    len: usize,
}

impl<'a> QuantizedSlice<'a> {
    /// A matrix (rows, columns) in `blocks`, which must hold all of it.
    pub(super) fn new(format: StoredFormat, blocks: &'a [u8], [rows, columns]: [usize; 2]) -> Self {
        assert_eq!(
            Some(blocks.len()),
            format.bytes_of_matrix(rows, columns),
            "a matrix fills its blocks"
        );
        Self {
            format,
            blocks,
            columns,
            start: 0,
            len: rows * columns,
        }
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The values from index `start` on, the first of a row.
    pub(super) fn slice_from(self, start: usize) -> Self {
        assert!(
            start <= self.len && start.is_multiple_of(self.columns.max(1)),
            "a part starts with a row"
        );
        Self {
            start: self.start + start,
            len: self.len - start,
            ..self
        }
    }

    /// The values of row `row`.
    pub(super) fn row(&self, row: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.columns];
        self.decode(row * self.columns, &mut values);
        values
    }

    /// All values, row by row.
    pub(super) fn to_vec(self) -> Vec<f32> {
        let mut values = vec![0.0; self.len];
        let rows = values.par_chunks_mut(self.columns.max(1)).enumerate();
        rows.for_each(|(row, out)| self.decode(row * self.columns, out));
        values
    }

    /// Decodes the values from index `at` on, all of one row.
    pub(super) fn decode(&self, at: usize, out: &mut [f32]) {
        assert!(
            at + out.len() <= self.len,
            "decoded values lie inside the matrix"
        );
        decode(self.format, self.blocks, self.columns, self.start + at, out);
    }
}

#[cfg(test)]
mod tests;

//! Keys and values of earlier tokens, for generation.

use candle_core::Tensor;

use crate::error::Result;

/// Minimum number of rows by which a full cache grows.
const MIN_GROWTH: usize = 64;

/// The keys and values of one block: `length` rows of f32 in buffers (capacity, Hkv D).
pub(super) struct KvCache {
    keys: Tensor,
    values: Tensor,
    length: usize,
}

impl KvCache {
    /// A cache that holds the rows of `keys` and `values` (T, Hkv D).
    pub(super) fn new(keys: &Tensor, values: &Tensor) -> Result<Self> {
        Ok(Self {
            keys: keys.contiguous()?,
            values: values.contiguous()?,
            length: keys.dim(0)?,
        })
    }

    /// Appends one token's key and value (1, Hkv D); returns all keys and all values (T, Hkv D).
    pub(super) fn append(&mut self, key: &Tensor, value: &Tensor) -> Result<(Tensor, Tensor)> {
        let keys = push(&mut self.keys, self.length, key)?;
        let values = push(&mut self.values, self.length, value)?;
        self.length += 1;
        Ok((keys, values))
    }
}

/// Writes `row` (1, C) behind the first `length` rows of `buffer` (capacity, C), which grows by
/// half when full; returns the rows in use.
fn push(buffer: &mut Tensor, length: usize, row: &Tensor) -> Result<Tensor> {
    let (capacity, width) = buffer.dims2()?;
    if length == capacity {
        let rows = capacity + (capacity / 2).max(MIN_GROWTH);
        let larger = Tensor::zeros((rows, width), row.dtype(), row.device())?;
        larger.slice_set(buffer, 0, 0)?;
        *buffer = larger;
    }
    buffer.slice_set(&row.contiguous()?, 0, length)?;
    Ok(buffer.narrow(0, 0, length + 1)?)
}

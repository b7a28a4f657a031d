//! Trained parameters: one flat f32 buffer with named views, and its gradients.
//!
//! A trained tensor is a view into the buffer: ops see an optimizer step at once, and clipping and
//! AdamW are one pass each. A frozen weight has no slot, so a gradient for it cannot exist.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::gemm::{MatRef, PackedWeightCache, Values};
use super::parallel::par_for_each;
use super::quantized::{QuantizedSlice, StoredFormat};
use super::storage::{CpuTensor, check_shape};
use super::token_rows::TokenRows;
use crate::error::{Error, Kind, Result};

/// A weight that ops read: frozen, or a view of a trained slot.
#[derive(Debug, Clone)]
pub struct Weight {
    /// The values; of a quantised weight its blocks, in bytes.
    pub tensor: Tensor,
    /// Format and (rows, columns) of a quantised weight.
    quantized: Option<(StoredFormat, [usize; 2])>,
    /// Index of its slot in the parameters; `None` if frozen.
    pub slot: Option<usize>,
    /// Trained rows of a frozen embedding.
    pub(super) token_rows: Option<Arc<TokenRows>>,
    /// Packed forms that are reused across GEMMs.
    pub(super) packings: Option<Arc<PackedWeightCache>>,
}

impl Weight {
    /// A weight that is never trained.
    pub fn frozen(tensor: Tensor) -> Self {
        Self {
            tensor,
            quantized: None,
            slot: None,
            token_rows: None,
            packings: None,
        }
    }

    /// A frozen weight (rows, columns) in `blocks` of `format`.
    ///
    /// # Errors
    /// Blocks of another size.
    pub fn quantized(
        format: StoredFormat,
        [rows, columns]: [usize; 2],
        blocks: Vec<u8>,
    ) -> Result<Self> {
        if format.bytes_of_matrix(rows, columns) != Some(blocks.len()) {
            return Err(Error::new(
                Kind::Tensor,
                format!("a weight in {} has a wrong number of bytes", format.name()),
            )
            .value(blocks.len().to_string()));
        }
        let count = blocks.len();
        let tensor = Tensor::from_vec(blocks, count, &Device::Cpu)?;
        Ok(Self {
            quantized: Some((format, [rows, columns])),
            ..Self::frozen(tensor)
        })
    }

    /// A frozen weight (rows, columns) with these values, quantised.
    ///
    /// # Errors
    /// As [`StoredFormat::encode`]'s.
    pub fn quantize(format: StoredFormat, shape: [usize; 2], values: &[f32]) -> Result<Self> {
        Self::quantized(format, shape, format.encode(values, shape[1])?)
    }

    /// Its format, if it is quantised.
    pub fn stored_format(&self) -> Option<StoredFormat> {
        self.quantized.map(|(format, _)| format)
    }

    /// Rows and columns of a 2-d weight.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self.quantized {
            Some((_, [rows, columns])) => Ok((rows, columns)),
            None => Ok(self.tensor.dims2()?),
        }
    }

    /// The values; of a quantised weight a decoded copy in f32.
    pub fn dequantized(&self) -> Result<Tensor> {
        let Some((format, shape)) = self.quantized else {
            return Ok(self.tensor.clone());
        };
        let values = format.decode(self.storage()?.bytes(), shape);
        Ok(Tensor::from_vec(values, &shape, &Device::Cpu)?)
    }

    /// The decoded rows `ids` (N) of a quantised weight: (N, columns) in f32.
    ///
    /// # Errors
    /// An index beyond the last row; a weight that is not quantised.
    pub(super) fn gather_dequantized(&self, ids: &Tensor) -> Result<Tensor> {
        let (rows, columns) = self.dims2()?;
        let ids: Vec<u32> = ids.to_vec1()?;
        if let Some(beyond) = ids.iter().find(|id| **id as usize >= rows) {
            return Err(
                Error::new(Kind::Tensor, "an index lies beyond the last row")
                    .value(beyond.to_string())
                    .rule(format!("below {rows}")),
            );
        }
        let storage = self.storage()?;
        let Values::Quantized(values) = self.matrix(&storage)?.values() else {
            return Err(Error::new(Kind::Tensor, "the weight is not quantised"));
        };
        let mut out = vec![0.0; ids.len() * columns];
        let tasks = out.chunks_mut(columns.max(1)).zip(&ids);
        par_for_each(tasks, |(out, id)| {
            values.decode(*id as usize * columns, out)
        });
        Ok(Tensor::from_vec(out, (ids.len(), columns), &Device::Cpu)?)
    }

    /// An embedding, or an output embedding, some rows of which are trained.
    pub fn with_token_rows(self, rows: TokenRows) -> Self {
        let token_rows = Some(Arc::new(rows));
        Self { token_rows, ..self }
    }

    /// The trained rows, if any.
    pub fn token_rows(&self) -> Option<&TokenRows> {
        self.token_rows.as_deref()
    }

    /// Caches the packed forms of a frozen weight, one for each direction: twice its size in f32.
    /// Ignored for a trained weight, whose values change, and for a quantised one.
    pub fn with_packed_cache(self) -> Self {
        let cached = !self.is_trained() && self.quantized.is_none();
        let packings = cached.then(Arc::default);
        Self { packings, ..self }
    }

    /// The borrowed values.
    pub(super) fn storage(&self) -> Result<CpuTensor<'_>> {
        match self.quantized {
            Some(_) => CpuTensor::borrow_bytes(&self.tensor),
            None => CpuTensor::borrow(&self.tensor),
        }
    }

    /// The matrix of a 2-d weight in what [`Weight::storage`] returned.
    pub(super) fn matrix<'a>(&'a self, storage: &'a CpuTensor<'_>) -> Result<MatRef<'a>> {
        let (rows, columns) = self.dims2()?;
        let Some((format, shape)) = self.quantized else {
            let matrix = storage.matrix(rows, columns);
            return Ok(matrix.with_cache(self.packings.as_deref()));
        };
        let values = QuantizedSlice::new(format, storage.bytes(), shape);
        Ok(MatRef::new(Values::Quantized(values), rows, columns))
    }

    /// Whether it has a gradient.
    pub fn is_trained(&self) -> bool {
        self.slot.is_some()
    }
}

/// Position of a trained tensor in the buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Name in adapter files.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// First element in the buffer.
    pub offset: usize,
}

impl Slot {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements in the buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// All trained values with AdamW's moments, a (3, n) tensor: values, first and second moments.
#[derive(Debug)]
pub struct Parameters {
    slots: Vec<Slot>,
    state: Tensor,
}

impl Parameters {
    /// Lays the named tensors out in the given order; moments start at zero.
    pub fn new(tensors: Vec<(String, Vec<usize>, Vec<f32>)>, device: &Device) -> Result<Self> {
        let (shapes, data): (Vec<_>, Vec<_>) = tensors
            .into_iter()
            .map(|(name, shape, data)| ((name, shape), data))
            .unzip();
        let mut data = data.into_iter();
        Self::from_fn(shapes, |_, _| Ok(data.next().unwrap_or_default()), device)
    }

    /// As `new`, from names and shapes: `make(index, slot)` returns the values of one tensor at a
    /// time, so that they are never all in memory twice.
    pub fn from_fn(
        shapes: Vec<(String, Vec<usize>)>,
        mut make: impl FnMut(usize, &Slot) -> Result<Vec<f32>>,
        device: &Device,
    ) -> Result<Self> {
        let mut slots = Vec::with_capacity(shapes.len());
        let sizes = shapes
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>());
        let count: usize = sizes.sum();
        // Capacity for the moments too: growing later would copy.
        let mut values = Vec::with_capacity(3 * count);
        for (index, (name, shape)) in shapes.into_iter().enumerate() {
            let slot = Slot {
                name,
                shape,
                offset: values.len(),
            };
            let data = make(index, &slot)?;
            if slot.len() != data.len() {
                let (found, wanted) = (data.len(), slot.len());
                return Err(Error::new(
                    Kind::Tensor,
                    format!(
                        "`{}` holds {found} numbers where its shape wants {wanted}",
                        slot.name
                    ),
                ));
            }
            values.extend_from_slice(&data);
            slots.push(slot);
        }
        let n = values.len();
        values.resize(3 * n, 0.0);
        Ok(Self {
            slots,
            state: Tensor::from_vec(values, (3, n), device)?,
        })
    }

    /// The trained tensors, in order.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Number of trained parameters.
    pub fn len(&self) -> usize {
        self.slots.last().map_or(0, |slot| slot.offset + slot.len())
    }

    /// Whether there are no trained parameters.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A view of slot `index`; later steps are visible through it.
    pub fn weight(&self, index: usize) -> Result<Weight> {
        let slot = &self.slots[index];
        let view = self
            .row(0)?
            .narrow(0, slot.offset, slot.len())?
            .reshape(slot.shape.as_slice())?;
        Ok(Weight {
            tensor: view,
            quantized: None,
            slot: Some(index),
            token_rows: None,
            packings: None,
        })
    }

    /// The (3, n) buffer, for the optimizer.
    pub(super) fn state(&self) -> &Tensor {
        &self.state
    }

    /// Row 0 (values), 1 (first moments) or 2 (second moments) as a flat view.
    fn row(&self, row: usize) -> Result<Tensor> {
        Ok(self.state.narrow(0, row, 1)?.flatten_all()?)
    }

    /// A copy of slot `index`'s values.
    pub fn values(&self, index: usize) -> Result<Vec<f32>> {
        let slot = &self.slots[index];
        Ok(self.row(0)?.narrow(0, slot.offset, slot.len())?.to_vec1()?)
    }

    /// Reads all three rows, without a copy on the CPU.
    pub fn with_rows<T>(&self, read: impl FnOnce([&[f32]; 3]) -> Result<T>) -> Result<T> {
        let state = self.state.to_device(&Device::Cpu)?;
        let host = CpuTensor::borrow_f32(&state)?;
        let (values, moments) = host.f32_slice().split_at(self.len());
        let (first, second) = moments.split_at(self.len());
        read([values, first, second])
    }

    /// A copy of all three rows.
    pub fn snapshot(&self) -> Result<[Vec<f32>; 3]> {
        self.with_rows(|rows| Ok(rows.map(<[f32]>::to_vec)))
    }

    /// Restores row 0 (values), 1 (first moments) or 2 (second moments) from a checkpoint.
    pub fn restore_row(&self, index: usize, row: &[f32]) -> Result<()> {
        if row.len() != self.len() {
            let (found, wanted) = (row.len(), self.len());
            return Err(Error::new(
                Kind::Run,
                format!(
                    "a checkpoint holds {found} trained numbers where this recipe has {wanted}"
                ),
            ));
        }
        let row = Tensor::from_slice(row, (1, self.len()), self.state.device())?;
        Ok(self.state.slice_set(&row, 0, index)?)
    }
}

/// Gradients of one step by slot, accumulated over its micro-batches.
#[derive(Debug, Default)]
pub struct Gradients {
    by_slot: Vec<Option<Tensor>>,
}

impl Gradients {
    /// No gradients yet, for `slots` trained tensors.
    pub fn new(slots: usize) -> Self {
        Self {
            by_slot: vec![None; slots],
        }
    }

    /// No gradients yet, for the same trained tensors.
    pub fn empty_like(&self) -> Self {
        Self::new(self.by_slot.len())
    }

    /// Adds the gradients of other micro-batches, or of other parts of one.
    pub fn merge(&mut self, others: Self) -> Result<()> {
        for (sum, gradient) in self.by_slot.iter_mut().zip(others.by_slot) {
            if let Some(gradient) = gradient {
                add(sum, gradient)?;
            }
        }
        Ok(())
    }

    /// Accumulates the gradient of `weight`; refuses one of a frozen weight.
    pub fn add(&mut self, weight: &Weight, gradient: Tensor) -> Result<()> {
        let Some(entry) = weight.slot.and_then(|slot| self.by_slot.get_mut(slot)) else {
            return Err(Error::new(
                Kind::Tensor,
                "a gradient was computed for a weight that is not trained",
            ));
        };
        add(entry, gradient)
    }

    /// The gradient of slot `index`, if one was computed.
    pub fn get(&self, index: usize) -> Option<&Tensor> {
        self.by_slot.get(index).and_then(Option::as_ref)
    }

    /// All gradients as one flat f32 tensor in the parameters' order; refuses a slot without one.
    pub fn flat(&self, parameters: &Parameters) -> Result<Tensor> {
        let mut parts = Vec::with_capacity(self.by_slot.len());
        for (index, slot) in parameters.slots().iter().enumerate() {
            let Some(gradient) = self.get(index) else {
                return Err(Error::new(
                    Kind::Diverged,
                    format!("`{}` is trained but received no gradient", slot.name),
                ));
            };
            check_shape(&slot.name, gradient, &slot.shape)?;
            parts.push(gradient.flatten_all()?.to_dtype(DType::F32)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

fn add(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + gradient)?,
        None => gradient,
    });
    Ok(())
}

//! Borrowed CPU slices of candle tensors, element casts, and saved activations.

use candle_core::{CpuStorage, DType, Device, Storage, StorageRef, Tensor};

use super::Context;
use super::gemm::{CpuSlice, Element, MatRef};
use super::parallel::par_for_each;
use super::simd::simd;
use crate::error::{Error, Kind, Result};
use crate::work::Precision;

/// Elements of a parallel elementwise task.
pub(super) const ELEMENTS_PER_TASK: usize = 16 * 1024;
/// Rows of a parallel task: fewer cost more than they save.
pub(super) const ROWS_PER_TASK: usize = 16;

/// A contiguous f32 or bf16 CPU tensor, read-locked.
pub(super) struct CpuTensor<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl<'a> CpuTensor<'a> {
    /// Borrows a tensor, which must be f32, contiguous and on the CPU.
    pub(super) fn borrow_f32(tensor: &'a Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 => Self::borrow(tensor),
            other => Err(
                Error::new(Kind::Tensor, "a fused CPU pass needs f32 tensors")
                    .value(format!("{other:?}")),
            ),
        }
    }

    /// Borrows a tensor, which must be f32 or bf16, contiguous and on the CPU.
    pub(super) fn borrow(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(
                Error::new(Kind::Tensor, "a fused pass needs contiguous tensors")
                    .value(format!("{layout:?}")),
            );
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_) | CpuStorage::BF16(_)) => Ok(Self {
                storage,
                start,
                len: end - start,
            }),
            _ => Err(Error::new(
                Kind::Tensor,
                "a fused CPU pass needs f32 or bf16 tensors on the CPU",
            )
            .value(format!("{:?}", tensor.dtype()))),
        }
    }

    /// Borrows the bytes of a quantised weight.
    pub(super) fn borrow_bytes(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::U8(_)), Some((start, end))) => Ok(Self {
                storage,
                start,
                len: end - start,
            }),
            _ => Err(Error::new(
                Kind::Tensor,
                "quantised weights are bytes on the CPU",
            )),
        }
    }

    /// The bytes of a quantised weight; empty for floats.
    pub(super) fn bytes(&self) -> &[u8] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::U8(bytes)) => &bytes[self.start..self.start + self.len],
            _ => &[],
        }
    }

    /// The elements of an f32 tensor; empty for bf16.
    pub(super) fn f32_slice(&self) -> &[f32] {
        match self.slice() {
            CpuSlice::F32(values) => values,
            CpuSlice::Bf16(_) => &[],
        }
    }

    /// The elements, row-major.
    pub(super) fn slice(&self) -> CpuSlice<'_> {
        let range = self.start..self.start + self.len;
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => CpuSlice::F32(&values[range]),
            Storage::Cpu(CpuStorage::BF16(values)) => CpuSlice::Bf16(&values[range]),
            _ => CpuSlice::F32(&[]),
        }
    }

    /// The elements as a row-major matrix.
    pub(super) fn matrix(&self, rows: usize, columns: usize) -> MatRef<'_> {
        MatRef::new(self.slice(), rows, columns)
    }
}

/// An uninitialised buffer of `n` elements: zeroing large results costs a tenth of a small model's
/// step.
///
/// # Safety
/// Every element is written before it is read.
#[allow(clippy::uninit_vec)]
pub(super) unsafe fn uninit_vec<T: Copy>(n: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(n);
    // SAFETY: the capacity is n, and the caller writes before it reads.
    unsafe { values.set_len(n) };
    values
}

/// Casts to another format, in parallel.
pub(super) fn cast_vec<S: Element, T: Element>(values: &[S]) -> Vec<T> {
    // SAFETY: the loop writes every element.
    let mut out = unsafe { uninit_vec(values.len()) };
    let chunks = out.chunks_mut(ELEMENTS_PER_TASK);
    par_for_each(chunks.zip(values.chunks(ELEMENTS_PER_TASK)), |(out, x)| {
        simd!(|_| cast_into(out, x));
    });
    out
}

/// Casts elements up to the length of the shorter slice.
#[inline(always)]
pub(super) fn cast_into<S: Element, T: Element>(out: &mut [T], x: &[S]) {
    let n = out.len().min(x.len());
    let (out, x) = (&mut out[..n], &x[..n]);
    for i in 0..n {
        out[i] = T::cast(x[i].as_f32());
    }
}

/// Saves `x` for the backward pass, as bf16 if products are in bf16.
pub(super) fn save_activation(context: Context<'_>, x: &Tensor) -> Result<Tensor> {
    if context.precision != Precision::Bf16 || x.dtype() != DType::F32 {
        return Ok(x.clone());
    }
    if !context.fused(x) || !x.is_contiguous() {
        return Ok(x.to_dtype(DType::BF16)?);
    }
    let host = CpuTensor::borrow_f32(x)?;
    let narrow = cast_vec::<f32, half::bf16>(host.f32_slice());
    Ok(Tensor::from_vec(narrow, x.shape(), &Device::Cpu)?)
}

/// A saved activation in f32.
pub(super) fn load_activation(context: Context<'_>, x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 {
        return Ok(x.clone());
    }
    if !context.fused(x) {
        return Ok(x.to_dtype(DType::F32)?);
    }
    match CpuTensor::borrow(x)?.slice().upcast() {
        Some(values) => Ok(Tensor::from_vec(values, x.shape(), &Device::Cpu)?),
        None => Ok(x.clone()),
    }
}

/// A CPU tensor of `values`, without a copy.
pub(super) fn f32_tensor(values: Vec<f32>, shape: (usize, usize)) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// `tensor` as contiguous f32.
pub(super) fn to_f32_contiguous(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
}

/// Rejects a tensor that is not of `shape`: the loops of fused passes zip slices, which would
/// silently truncate.
pub(super) fn check_shape(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    check_dims(name, tensor.dims(), shape)
}

/// `check_shape` for operands that are not tensors.
pub(super) fn check_dims(name: &str, found: &[usize], shape: &[usize]) -> Result<()> {
    if found == shape {
        return Ok(());
    }
    Err(Error::new(
        Kind::Tensor,
        format!("`{name}` has a shape that its op cannot take"),
    )
    .value(format!("{found:?}"))
    .rule(format!("{shape:?}")))
}

/// A raw pointer for parallel tasks, each of which writes elements that no other accesses.
pub(super) struct SendPtr<T = f32>(pub(super) *mut T);

impl<T> Clone for SendPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SendPtr<T> {}

// SAFETY: tasks write disjoint elements, as stated at each use.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    /// The pointer `offset` elements on.
    ///
    /// # Safety
    /// `offset` lies inside the pointer's buffer.
    pub(super) unsafe fn add(self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

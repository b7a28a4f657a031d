//! f32 and bf16 slices of CPU tensors: the one door between candle's storage and the fused CPU passes.

use candle_core::{CpuStorage, DType, Device, Storage, StorageRef, Tensor};
use half::bf16;

use super::Context;
use super::gemm::{CpuSlice, Element, MatRef};
use super::parallel::par_for_each;
use super::simd::dispatch;
use crate::error::{Error, Kind, Result};
use crate::work::Precision;

/// A contiguous f32 or bf16 CPU tensor and the lock that keeps its storage readable.
pub(super) struct CpuTensor<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl<'a> CpuTensor<'a> {
    /// Opens `tensor`, which must be f32, contiguous and on the CPU.
    pub(super) fn borrow_f32(tensor: &'a Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 => Self::borrow(tensor),
            other => Err(
                Error::new(Kind::Tensor, "a fused CPU pass needs f32 tensors")
                    .value(format!("{other:?}")),
            ),
        }
    }

    /// Opens `tensor`, which must be f32 or bf16, contiguous and on the CPU.
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

    /// The numbers of an f32 tensor, row-major; none of a bf16 one.
    pub(super) fn f32_slice(&self) -> &[f32] {
        match self.slice() {
            CpuSlice::F32(values) => values,
            CpuSlice::Bf16(_) => &[],
        }
    }

    /// The numbers as a row-major matrix.
    pub(super) fn matrix(&self, rows: usize, columns: usize) -> MatRef<'_> {
        MatRef::new(self.slice(), rows, columns)
    }

    /// The numbers, row-major.
    pub(super) fn slice(&self) -> CpuSlice<'_> {
        let range = self.start..self.start + self.len;
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => CpuSlice::F32(&values[range]),
            Storage::Cpu(CpuStorage::BF16(values)) => CpuSlice::Bf16(&values[range]),
            _ => CpuSlice::F32(&[]),
        }
    }
}

/// Room for `n` numbers that hold nothing yet: zeroing large results costs a tenth of a small model's step.
///
/// # Safety
/// Every number must be written before it is read.
#[allow(clippy::uninit_vec)]
pub(super) unsafe fn uninit_vec<T: Copy>(n: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(n);
    // SAFETY: the capacity is n, and the caller writes before it reads.
    unsafe { values.set_len(n) };
    values
}

/// The same numbers in f32.
pub(super) fn upcast(values: &[bf16]) -> Vec<f32> {
    // SAFETY: the loop writes every number.
    let mut wide = unsafe { uninit_vec(values.len()) };
    par_for_each(
        wide.chunks_mut(ELEMENTS_PER_TASK)
            .zip(values.chunks(ELEMENTS_PER_TASK)),
        |(wide, narrow)| {
            dispatch(
                #[inline(always)]
                |_| {
                    wide.iter_mut()
                        .zip(narrow)
                        .for_each(|(wide, x)| *wide = x.as_f32())
                },
            );
        },
    );
    wide
}

/// The same numbers in bf16.
#[inline(always)]
pub(super) fn to_bf16_into<T: Element>(narrow: &mut [bf16], x: &[T]) {
    let n = narrow.len().min(x.len());
    let (narrow, x) = (&mut narrow[..n], &x[..n]);
    for i in 0..n {
        narrow[i] = bf16::cast(x[i].as_f32());
    }
}

/// What a backward pass keeps of `x`: itself, or a bf16 copy where products are in bf16.
pub(super) fn save_activation(context: Context<'_>, x: &Tensor) -> Result<Tensor> {
    if context.precision != Precision::Bf16 || x.dtype() != DType::F32 {
        return Ok(x.clone());
    }
    if !context.fused(x) || !x.is_contiguous() {
        return Ok(x.to_dtype(DType::BF16)?);
    }
    let host = CpuTensor::borrow_f32(x)?;
    // SAFETY: the loop writes every number.
    let mut narrow = unsafe { uninit_vec(host.len) };
    par_for_each(
        narrow
            .chunks_mut(ELEMENTS_PER_TASK)
            .zip(host.f32_slice().chunks(ELEMENTS_PER_TASK)),
        |(narrow, x)| {
            dispatch(
                #[inline(always)]
                |_| to_bf16_into(narrow, x),
            )
        },
    );
    Ok(Tensor::from_vec(narrow, x.shape(), &Device::Cpu)?)
}

/// A tensor that was `kept`, in f32 again.
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

/// Elements a parallel elementwise task takes.
pub(super) const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// A tensor that owns `values`, on the CPU, without copying them.
pub(super) fn f32_tensor(values: Vec<f32>, shape: (usize, usize)) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// `tensor` as contiguous f32.
pub(super) fn to_f32_contiguous(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
}

/// Refuses a tensor that is not of `shape`: fused passes walk their slices side by side and would stop at the shortest without a word.
pub(super) fn check_shape(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    check_dims(name, tensor.dims(), shape)
}

/// The same of what is no tensor.
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

/// Rows a parallel task takes at least: below this a task costs more than it saves.
pub(super) const ROWS_PER_TASK: usize = 16;

/// Raw pointer that parallel tasks may share; each task writes places no other task touches.
pub(super) struct SendPtr<T = f32>(pub(super) *mut T);

impl<T> Clone for SendPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SendPtr<T> {}

// SAFETY: the users of `SendPtr` (attention's heads, tasks of a product) write disjoint elements, stated at each use.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    /// The pointer `offset` elements on.
    ///
    /// # Safety
    /// `offset` must lie inside the buffer the pointer came from.
    pub(super) unsafe fn add(self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

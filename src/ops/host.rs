//! f32 slices of CPU tensors: the one door between candle's storage and the fused CPU passes.

use candle_core::{CpuStorage, DType, Device, Storage, StorageRef, Tensor};

use crate::error::{Error, Kind, Result};

/// A contiguous f32 CPU tensor and the lock that keeps its storage readable.
pub(super) struct Host<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl<'a> Host<'a> {
    /// Opens `tensor`, which must be f32, contiguous and on the CPU.
    pub(super) fn open(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::new(Kind::Tensor, "a fused pass needs contiguous tensors").value(format!("{layout:?}")));
        };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Self { storage, start, len: end - start }),
            _ => {
                Err(Error::new(Kind::Tensor, "a fused CPU pass needs f32 tensors on the CPU")
                    .value(format!("{:?}", tensor.dtype())))
            }
        }
    }

    /// The numbers, row-major.
    pub(super) fn slice(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.start + self.len],
            _ => &[],
        }
    }
}

/// A tensor that owns `values`, on the CPU, without copying them.
pub(super) fn tensor(values: Vec<f32>, shape: (usize, usize)) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// `tensor` as contiguous f32.
pub(super) fn f32_contiguous(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
}

/// Refuses a tensor that is not of `shape`: fused passes walk their slices side by side and would stop at the shortest without a word.
pub(super) fn expect(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.dims() == shape {
        return Ok(());
    }
    Err(Error::new(Kind::Tensor, format!("`{name}` has a shape that its op cannot take"))
        .value(format!("{:?}", tensor.dims()))
        .rule(format!("{shape:?}")))
}

/// Rows a parallel task takes at least: below this a task costs more than it saves.
pub(super) const ROWS_PER_TASK: usize = 16;

/// Raw pointer that parallel tasks may share; each task writes places no other task touches.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub(super) *mut f32);

// SAFETY: the users of `Shared` (attention's heads) write disjoint elements, stated at each use.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// The pointer `offset` elements on.
    ///
    /// # Safety
    /// `offset` must lie inside the buffer the pointer came from.
    pub(super) unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

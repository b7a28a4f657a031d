//! Memory, launches and products on a device, whichever it is.

use candle_core::{DType, Device, Shape, Tensor};

use super::backend;
use crate::error::{Error, Kind, Result};

/// Threads of a block of an elementwise kernel.
pub(super) const THREADS: usize = 256;

/// The sizes of an attention layer, as attention.cuh declares them.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AttentionShape {
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    pub(super) causal: i32,
    pub(super) window: i32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub(super) enum Arg<'a> {
    /// Its first element's address; null for `None`.
    Tensor(Option<&'a Tensor>),
    /// An `int`.
    Int(usize),
    /// A `u32`.
    Uint(u32),
    /// An `i64`.
    Long(usize),
    /// A `float`.
    Float(f64),
    /// The `AttentionShape`.
    Shape(AttentionShape),
}

impl<'a> From<&'a Tensor> for Arg<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Tensor(Some(tensor))
    }
}

/// The value of an argument, as a kernel takes it.
#[cfg_attr(
    not(any(test, feature = "cuda")),
    expect(dead_code, reason = "for a backend")
)]
#[derive(Clone, Copy)]
pub(super) enum Value {
    Address(u64),
    Int(i32),
    Uint(u32),
    Long(i64),
    Float(f32),
    Shape(AttentionShape),
}

impl Arg<'_> {
    fn value(self) -> Result<Value> {
        let too_large = |n: usize| {
            Error::new(Kind::Tensor, "a size is beyond what a CUDA kernel takes")
                .value(n.to_string())
                .rule("below 2^31")
                .hint("lower `train.micro_batch_size` or `data.max_length`")
        };
        Ok(match self {
            Self::Tensor(None) => Value::Address(0),
            Self::Tensor(Some(tensor)) => Value::Address(address(tensor)?),
            Self::Int(n) => Value::Int(i32::try_from(n).map_err(|_| too_large(n))?),
            Self::Uint(n) => Value::Uint(n),
            Self::Long(n) => Value::Long(i64::try_from(n).map_err(|_| too_large(n))?),
            Self::Float(x) => Value::Float(x as f32),
            Self::Shape(shape) => Value::Shape(shape),
        })
    }
}

/// One launch: the `.cu` file by its stem, the kernel, the blocks, the threads of one, and bytes of dynamic shared memory.
#[cfg_attr(
    not(any(test, feature = "cuda")),
    expect(dead_code, reason = "for a backend")
)]
pub(super) struct Launch<'a> {
    pub(super) source: &'static str,
    pub(super) kernel: &'a str,
    pub(super) grid: [usize; 3],
    pub(super) block: [usize; 3],
    pub(super) shared: usize,
}

impl<'a> Launch<'a> {
    /// A thread an item.
    pub(super) fn of_items(source: &'static str, kernel: &'a str, items: usize) -> Self {
        Self {
            source,
            kernel,
            grid: [items.div_ceil(THREADS), 1, 1],
            block: [THREADS, 1, 1],
            shared: 0,
        }
    }

    /// A block a row.
    pub(super) fn of_rows(source: &'static str, kernel: &'a str, rows: usize) -> Self {
        Self {
            grid: [rows, 1, 1],
            ..Self::of_items(source, kernel, 1)
        }
    }

    /// Runs it on `device`; without a block it does nothing.
    pub(super) fn run(&self, device: &Device, args: &[Arg<'_>]) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        let values = args.iter().map(|arg| arg.value());
        let values = values.collect::<Result<Vec<_>>>()?;
        backend::launch(device, self, &values)
    }
}

/// An output that the kernel fills: uninitialised device memory.
pub(super) fn output(device: &Device, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
    backend::output(device, dtype, shape.into())
}

/// The address of the first element of a contiguous tensor.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    if !tensor.is_contiguous() {
        return Err(Error::new(
            Kind::Tensor,
            "a CUDA kernel needs contiguous tensors",
        ));
    }
    first_address(tensor)
}

/// The address of the first element.
pub(super) fn first_address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    backend::address(tensor.device(), &storage, layout.start_offset())
}

pub(super) fn no_backend(device: &Device) -> Error {
    Error::new(Kind::Device, "this device runs no CUDA kernels").value(format!("{device:?}"))
}

/// The name of an element type in the names of kernels.
pub(super) fn type_name(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        other => Err(Error::new(Kind::Tensor, "a CUDA kernel takes f32 and bf16")
            .value(format!("{other:?}"))),
    }
}

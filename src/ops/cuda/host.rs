//! The device of tests: host memory, the kernels compiled for the host, and products in loops.

use std::cell::Cell;

use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor};
use half::bf16;

use self::library::{library, run, source_of};
use super::launch::{Launch, Value, no_backend};
use super::product::{Gemm, Operand};
use crate::error::Result;

#[path = "../../../tests/cuda_kernels/library.rs"]
mod library;

thread_local! {
    /// Launches of this thread: a test shows with it that the kernels ran.
    pub(in crate::ops) static LAUNCHES: Cell<usize> = const { Cell::new(0) };
    /// A kernel that does nothing.
    pub(in crate::ops) static BROKEN: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Whether this machine has a C++ compiler.
pub(in crate::ops) fn is_available() -> bool {
    library().is_some()
}

/// Memory of NaN.
pub(super) fn output(device: &Device, dtype: DType, shape: Shape) -> Result<Tensor> {
    Ok(Tensor::full(f64::NAN, shape, device)?.to_dtype(dtype)?)
}

/// Kernels write through this address while nothing else uses the tensor.
pub(super) fn address(device: &Device, storage: &Storage, start: usize) -> Result<u64> {
    let at = |first: usize, size: usize| Ok((first + start * size) as u64);
    let Storage::Cpu(storage) = storage else {
        return Err(no_backend(device));
    };
    match storage {
        CpuStorage::F32(x) => at(x.as_ptr() as usize, 4),
        CpuStorage::BF16(x) => at(x.as_ptr() as usize, 2),
        CpuStorage::F64(x) => at(x.as_ptr() as usize, 8),
        CpuStorage::U32(x) => at(x.as_ptr() as usize, 4),
        CpuStorage::U8(x) => at(x.as_ptr() as usize, 1),
        _ => Err(no_backend(device)),
    }
}

pub(super) fn launch(_: &Device, launch: &Launch<'_>, values: &[Value]) -> Result<()> {
    assert_eq!(
        source_of(launch.kernel),
        Some(launch.source),
        "{}",
        launch.kernel
    );
    LAUNCHES.set(LAUNCHES.get() + 1);
    if BROKEN.get() == Some(launch.kernel) {
        return Ok(());
    }
    let address = |value: &Value| match value {
        Value::Address(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Value::Int(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Value::Uint(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Value::Long(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Value::Float(x) => std::ptr::from_ref(x).cast_mut().cast(),
        Value::Shape(x) => std::ptr::from_ref(x).cast_mut().cast(),
    };
    let arguments: Vec<_> = values.iter().map(address).collect();
    // Blocks and threads in a shuffled order.
    run(
        launch.kernel,
        launch.grid,
        launch.block,
        launch.shared,
        arguments,
        7,
    );
    Ok(())
}

/// The element (row, column) of an operand of `rows` by columns.
fn element(operand: Operand, dtype: DType, row: usize, column: usize) -> f32 {
    let (major, minor) = if operand.transposed {
        (row, column)
    } else {
        (column, row)
    };
    let at = major * operand.leading + minor;
    // SAFETY: the address and leading dimension are those of a tensor of this shape.
    unsafe {
        match dtype {
            DType::BF16 => (*(operand.address as *const bf16).add(at)).to_f32(),
            _ => *(operand.address as *const f32).add(at),
        }
    }
}

/// As cublasGemmEx with alpha 1 and beta 0.
pub(super) fn gemm(_: &Device, gemm: &Gemm) -> Result<()> {
    let [m, n, k] = gemm.sizes;
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let product = |l| element(gemm.a, gemm.dtype, i, l) * element(gemm.b, gemm.dtype, l, j);
        let sum: f32 = (0..k).map(product).sum();
        // SAFETY: C has m by n elements, which nothing else uses.
        unsafe { *(gemm.c as *mut f32).add(j * m + i) = sum };
    }
    Ok(())
}

pub(super) fn prepare(_: &Device) -> Result<()> {
    Ok(())
}

pub(super) fn free_memory(_: &Device) -> Option<usize> {
    None
}

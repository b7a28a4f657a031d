//! A CUDA device through candle's and cudarc's handles: memory, launches of the embedded PTX, products by cuBLAS.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, sys as driver,
};
use candle_core::cuda_backend::{CudaDType, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Shape, Storage, Tensor};
use half::bf16;

use super::launch::{AttentionShape, Launch, Value, no_backend};
use super::product::{Gemm, Operand};
use crate::error::{Error, Kind, Result};

/// The PTX of each `.cu` file for compute capability 8.0, which the driver compiles for the device.
#[expect(dead_code, reason = "weights are quantised on the CPU alone so far")]
mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

/// Shared memory of a block that needs no opt-in, in bytes.
const STATIC_LIMIT: usize = 48 * 1024;

// SAFETY: four-byte fields without padding, laid out as in attention.cuh.
unsafe impl DeviceRepr for AttentionShape {}

fn source(name: &str) -> Option<&'static str> {
    Some(match name {
        "activation" => ptx::ACTIVATION,
        "adamw" => ptx::ADAMW,
        "attention_backward" => ptx::ATTENTION_BACKWARD,
        "attention_forward" => ptx::ATTENTION_FORWARD,
        "cross_entropy" => ptx::CROSS_ENTROPY,
        "dropout" => ptx::DROPOUT,
        "gather" => ptx::GATHER,
        "norm" => ptx::NORM,
        "rope" => ptx::ROPE,
        _ => return None,
    })
}

pub(super) fn output(device: &Device, dtype: DType, shape: Shape) -> Result<Tensor> {
    let device = device.as_cuda_device()?;
    let n = shape.elem_count();
    // SAFETY: the kernel that takes the output writes every element before another reads it.
    let storage = unsafe {
        let device_of = || device.clone();
        match dtype {
            DType::F32 => CudaStorage::wrap_cuda_slice(device.alloc::<f32>(n)?, device_of()),
            DType::BF16 => CudaStorage::wrap_cuda_slice(device.alloc::<bf16>(n)?, device_of()),
            DType::F64 => CudaStorage::wrap_cuda_slice(device.alloc::<f64>(n)?, device_of()),
            DType::U32 => CudaStorage::wrap_cuda_slice(device.alloc::<u32>(n)?, device_of()),
            other => {
                return Err(Error::new(Kind::Tensor, "no kernel writes this type")
                    .value(format!("{other:?}")));
            }
        }
    };
    Ok(Tensor::from_storage(
        Storage::Cuda(storage),
        shape,
        BackpropOp::none(),
        false,
    ))
}

pub(super) fn address(device: &Device, storage: &Storage, start: usize) -> Result<u64> {
    fn of<T: CudaDType + DeviceRepr>(storage: &CudaStorage, start: usize) -> Result<u64> {
        let slice: &CudaSlice<T> = storage.as_cuda_slice()?;
        let stream = storage.device.cuda_stream();
        let (first, _) = slice.device_ptr(&stream);
        Ok(first + (start * size_of::<T>()) as u64)
    }
    let Storage::Cuda(storage) = storage else {
        return Err(no_backend(device));
    };
    match storage.dtype() {
        DType::F32 => of::<f32>(storage, start),
        DType::BF16 => of::<bf16>(storage, start),
        DType::F64 => of::<f64>(storage, start),
        DType::U32 => of::<u32>(storage, start),
        DType::U8 => of::<u8>(storage, start),
        other => {
            Err(Error::new(Kind::Tensor, "no kernel reads this type").value(format!("{other:?}")))
        }
    }
}

pub(super) fn launch(device: &Device, launch: &Launch<'_>, values: &[Value]) -> Result<()> {
    let device = device.as_cuda_device()?;
    let failed = |error: candle_core::Error| {
        Error::new(Kind::Device, "a CUDA kernel cannot be launched")
            .value(format!("{}: {error}", launch.kernel))
            .hint("check that the driver supports CUDA 13 (`nvidia-smi`)")
    };
    let ptx = source(launch.source)
        .ok_or_else(|| Error::new(Kind::Device, "no such kernel source").value(launch.source))?;
    let function = device
        .get_or_load_custom_func(launch.kernel, launch.source, ptx)
        .map_err(failed)?;
    if launch.shared > STATIC_LIMIT {
        let attribute =
            driver::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function
            .set_attribute(attribute, launch.shared as i32)
            .w()
            .map_err(failed)?;
    }
    let dims = |[x, y, z]: [usize; 3]| (x as u32, y as u32, z as u32);
    let config = LaunchConfig {
        grid_dim: dims(launch.grid),
        block_dim: dims(launch.block),
        shared_mem_bytes: launch.shared as u32,
    };
    let mut builder = function.builder();
    for value in values {
        match value {
            Value::Address(x) => builder.arg(x),
            Value::Int(x) => builder.arg(x),
            Value::Uint(x) => builder.arg(x),
            Value::Long(x) => builder.arg(x),
            Value::Float(x) => builder.arg(x),
            Value::Shape(x) => builder.arg(x),
        };
    }
    // SAFETY: the arguments are those of the kernel, in its order; tests run the same launches on the host.
    unsafe { builder.launch(config) }.w().map_err(failed)?;
    Ok(())
}

/// The product by cuBLAS: sums in f32, bf16 inputs on tensor cores, f32 inputs without TF32.
pub(super) fn gemm(device: &Device, gemm: &Gemm) -> Result<()> {
    let blas = device.as_cuda_device()?.cublas_handle();
    let operation = |operand: Operand| match operand.transposed {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let of_inputs = match gemm.dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    };
    let [m, n, k] = gemm.sizes.map(|size| size as i32);
    let (alpha, beta) = (1f32, 0f32);
    // SAFETY: addresses, sizes and leading dimensions are those of live tensors of this device.
    let status = unsafe {
        result::gemm_ex(
            *blas.handle(),
            operation(gemm.a),
            operation(gemm.b),
            m,
            n,
            k,
            (&raw const alpha).cast(),
            gemm.a.address as *const _,
            of_inputs,
            gemm.a.leading as i32,
            gemm.b.address as *const _,
            of_inputs,
            gemm.b.leading as i32,
            (&raw const beta).cast(),
            gemm.c as *mut _,
            sys::cudaDataType_t::CUDA_R_32F,
            m,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    status.map_err(|error| {
        Error::new(Kind::Device, "cuBLAS refused a product")
            .value(format!("{m} x {n} x {k}: {error:?}"))
    })
}

/// One stream, without events for each allocation; a pool that keeps freed memory, which would otherwise go back to the
/// system at every synchronisation.
pub(super) fn prepare(device: &Device) -> Result<()> {
    let device = device.as_cuda_device()?;
    // SAFETY: every allocation, launch and product of this process is on the device's one stream.
    unsafe { device.disable_event_tracking() };
    let stream = device.cuda_stream();
    let mut threshold = u64::MAX;
    // SAFETY: the device is open, and the attribute is a 64-bit number.
    let kept = unsafe {
        device::get_default_mem_pool(stream.context().cu_device()).and_then(|pool| {
            let attribute = driver::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
        })
    };
    kept.map_err(|error| {
        Error::new(
            Kind::Device,
            "the memory pool of the CUDA device cannot be set up",
        )
        .value(format!("{error:?}"))
    })
}

/// Free memory in bytes.
pub(super) fn free_memory(device: &Device) -> Option<usize> {
    let stream = device.as_cuda_device().ok()?.cuda_stream();
    let (free, _) = stream.context().mem_get_info().ok()?;
    Some(free)
}

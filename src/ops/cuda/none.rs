//! No device: a build without the feature `cuda`, where no tensor is on one.

use candle_core::{DType, Device, Shape, Storage, Tensor};

use super::launch::{Launch, Value, no_backend};
use super::product::Gemm;
use crate::error::Result;

pub(super) fn output(device: &Device, _: DType, _: Shape) -> Result<Tensor> {
    Err(no_backend(device))
}

pub(super) fn address(device: &Device, _: &Storage, _: usize) -> Result<u64> {
    Err(no_backend(device))
}

pub(super) fn launch(device: &Device, _: &Launch<'_>, _: &[Value]) -> Result<()> {
    Err(no_backend(device))
}

pub(super) fn gemm(device: &Device, _: &Gemm) -> Result<()> {
    Err(no_backend(device))
}

pub(super) fn prepare(_: &Device) -> Result<()> {
    Ok(())
}

pub(super) fn free_memory(_: &Device) -> Option<usize> {
    None
}

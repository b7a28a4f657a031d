//! Reads a tensor of a safetensors file into its final buffer.
//!
//! Takes an open file and a tensor's location; returns its values in the requested type. Files are
//! read, not mapped: the pages of a mapped file count as memory of the process in addition to the
//! copy. Chunks are read and converted in parallel, while they are in the cache. Knows nothing of
//! models.

use std::fs::File;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

use crate::adapter::shards::{TensorEntry, transpose};
use crate::error::{Error, Kind, Result};

/// Elements that one task reads at once: 1 MiB in f32, so that a chunk stays in L2.
const CHUNK: usize = 1 << 18;

/// A tensor in an open file.
pub(crate) struct StoredTensor<'a> {
    /// Named in errors.
    pub(crate) path: &'a Path,
    /// The open file.
    pub(crate) file: &'a File,
    /// The tensor's location.
    pub(crate) tensor: &'a TensorEntry,
    /// Whether the transpose of the tensor is stored.
    pub(crate) transposed: bool,
}

impl StoredTensor<'_> {
    /// Reads the tensor as `dtype` (f32, bf16 or f16) on `device`.
    pub(super) fn tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut shape = self.tensor.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        Ok(match dtype {
            DType::F32 => Tensor::from_vec(self.f32s()?, shape, device)?,
            DType::BF16 => {
                let bits = self.read_as(Dtype::BF16, |wide| bf16::from_f32(wide).to_bits())?;
                Tensor::from_vec(bits.reinterpret_into::<bf16>(), shape, device)?
            }
            DType::F16 => {
                let bits = self.read_as(Dtype::F16, |wide| f16::from_f32(wide).to_bits())?;
                Tensor::from_vec(bits.reinterpret_into::<f16>(), shape, device)?
            }
            other => {
                return Err(
                    Error::new(Kind::Model, "no weight is computed with in this type")
                        .value(format!("{other:?}")),
                );
            }
        })
    }

    /// Reads the values of an unquantised tensor in f32, row-major.
    pub(crate) fn f32s(&self) -> Result<Vec<f32>> {
        self.read_as(Dtype::F32, |wide| wide)
    }

    /// Reads the tensor as it is stored.
    pub(super) fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.tensor.size as usize];
        let tasks = bytes.par_chunks_mut(4 * CHUNK).enumerate();
        tasks.try_for_each(|(index, chunk)| {
            self.read(chunk, self.tensor.start + (index * 4 * CHUNK) as u64)
        })?;
        Ok(bytes)
    }

    /// Reads the elements, each decoded to f32 and converted by `narrow`; if the stored type is
    /// `same`, the bits of `T`, they are copied instead.
    fn read_as<T>(&self, same: Dtype, narrow: impl Fn(f32) -> T + Copy + Sync) -> Result<Vec<T>>
    where
        T: bytemuck::Pod + Default + Send + Sync,
    {
        let Some(size) = element_size(self.tensor.dtype) else {
            return Err(Error::new(
                Kind::Model,
                format!(
                    "the weights of `{}` are stored in a type that cannot be read",
                    self.tensor.name
                ),
            )
            .at(self.path.display().to_string())
            .value(format!("{:?}", self.tensor.dtype))
            .rule("F64, F32, F16 or BF16")
            .hint("use an unquantised copy of the model"));
        };
        let copy = self.tensor.dtype == same && cfg!(target_endian = "little");
        // Zeroed memory comes from the system lazily: a page is first touched when its chunk is
        // read.
        let mut values = vec![T::default(); self.tensor.size as usize / size];
        values.par_chunks_mut(CHUNK).enumerate().try_for_each_init(
            Vec::new,
            |buffer, (index, chunk)| {
                let at = self.tensor.start + (index * CHUNK * size) as u64;
                if copy {
                    return self.read(bytemuck::cast_slice_mut(chunk), at);
                }
                buffer.resize(chunk.len() * size, 0);
                self.read(buffer, at)?;
                convert(self.tensor.dtype, buffer, chunk, narrow);
                Ok(())
            },
        )?;
        match self.tensor.shape.as_slice() {
            [rows, columns] if self.transposed => Ok(transpose(&values, *rows, *columns)),
            _ => Ok(values),
        }
    }

    /// Fills `bytes` from offset `at` of the file.
    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        read_at(self.file, bytes, at).map_err(|source| Error::io("read", self.path, source))
    }
}

/// Bytes of an element of a type that weights are stored in; `None` for any other.
fn element_size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

/// Decodes little-endian elements of `dtype` to f32 and converts them by `narrow`.
fn convert<T>(dtype: Dtype, bytes: &[u8], into: &mut [T], narrow: impl Fn(f32) -> T) {
    fn decode<const N: usize, T>(bytes: &[u8], into: &mut [T], element: impl Fn([u8; N]) -> T) {
        into.iter_mut()
            .zip(bytes.as_chunks::<N>().0)
            .for_each(|(into, bytes)| *into = element(*bytes));
    }
    match dtype {
        Dtype::F64 => decode(
            bytes,
            into,
            |bytes| narrow(f64::from_le_bytes(bytes) as f32),
        ),
        Dtype::F16 => decode(bytes, into, |bytes| {
            narrow(f16::from_le_bytes(bytes).to_f32())
        }),
        Dtype::BF16 => decode(bytes, into, |bytes| {
            narrow(bf16::from_le_bytes(bytes).to_f32())
        }),
        _ => decode(bytes, into, |bytes| narrow(f32::from_le_bytes(bytes))),
    }
}

/// Fills `bytes` from offset `at`; independent of concurrent reads.
#[cfg(unix)]
pub(super) fn read_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

/// Fills `bytes` from offset `at`; independent of concurrent reads.
#[cfg(windows)]
pub(super) fn read_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => (bytes, at) = (&mut bytes[read..], at + read as u64),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::adapter::shards::read_headers;
    use crate::error::Kind;

    /// Two full chunks and a remainder; values that each type rounds differently, both zeros and an
    /// infinity.
    fn sample_values() -> Tensor {
        let values = (0..2 * CHUNK as u32 + 6)
            .map(|i| (f64::from(i) * 0.317).sin() * 10f64.powi((i % 9) as i32 - 5));
        let mut values: Vec<f64> = values.collect();
        (values[0], values[CHUNK], values[CHUNK + 1]) = (0.0, -0.0, f64::INFINITY);
        Tensor::from_vec(values, (2, CHUNK + 3), &Device::Cpu).unwrap()
    }

    /// An open file with `x` and another tensor.
    fn written(x: &Tensor, dir: &Path) -> (PathBuf, File, TensorEntry) {
        let path = dir.join("x.safetensors");
        let other = Tensor::new(&[1u8, 2, 3], &Device::Cpu).unwrap();
        candle_core::safetensors::save(
            &[("other", other), ("x", x.clone())].into_iter().collect(),
            &path,
        )
        .unwrap();
        let stored = read_headers(std::slice::from_ref(&path))
            .unwrap()
            .into_iter()
            .find(|tensor| tensor.name == "x")
            .unwrap();
        let file = File::open(&path).unwrap();
        (path, file, stored)
    }

    /// candle's reader and conversions are the oracle: equal bits from every stored type in every
    /// compute type.
    #[test]
    fn values_are_those_that_candle_reads() {
        let dir = tempfile::tempdir().unwrap();
        for stored_as in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let (path, file, tensor) =
                written(&sample_values().to_dtype(stored_as).unwrap(), dir.path());
            let whole = candle_core::safetensors::load(&path, &Device::Cpu).unwrap()["x"].clone();
            let source = StoredTensor {
                path: &path,
                file: &file,
                tensor: &tensor,
                transposed: false,
            };
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let read = source.tensor(dtype, &Device::Cpu).unwrap();
                assert_eq!(
                    (read.dtype(), read.dims()),
                    (dtype, [2, CHUNK + 3].as_slice())
                );
                let bits = |x: &Tensor| {
                    let x = x
                        .to_dtype(DType::F32)
                        .unwrap()
                        .flatten_all()
                        .unwrap()
                        .to_vec1::<f32>()
                        .unwrap();
                    x.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                // Both convert through f32.
                let wanted = whole.to_dtype(DType::F32).unwrap().to_dtype(dtype).unwrap();
                assert!(bits(&read) == bits(&wanted), "{stored_as:?} as {dtype:?}");
            }
        }
    }

    #[test]
    fn a_tensor_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (path, file, tensor) =
            written(&Tensor::new(&[1i64, 2], &Device::Cpu).unwrap(), dir.path());
        let error = StoredTensor {
            path: &path,
            file: &file,
            tensor: &tensor,
            transposed: false,
        }
        .f32s()
        .unwrap_err();
        assert_eq!(error.kind(), Kind::Model);
        assert!(
            error.to_string().contains("I64")
                && error.to_string().contains("`x`")
                && error.remedy().is_some(),
            "{error}"
        );
        // Truncated after it was opened.
        let (path, file, tensor) = written(&sample_values(), dir.path());
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let error = StoredTensor {
            path: &path,
            file: &file,
            tensor: &tensor,
            transposed: false,
        }
        .f32s()
        .unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(error.to_string().contains("x.safetensors"), "{error}");
    }
}

//! The device passes on CUDA: launches of the kernels beside the ops, and products by cuBLAS.
//!
//! Takes and returns tensors of one device; owns grids, argument order and element types. A kernel returns activations in the
//! compute type, as a fused CPU pass does. Three things touch the device: the memory of an output, a launch and a product
//! (`backend`), by cudarc in a build with the feature `cuda` (`card`). In tests they are host memory, the kernels compiled
//! for the host and a product in loops (`host`), so that everything else runs there without a GPU.

mod attention;
#[cfg(all(feature = "cuda", not(test)))]
#[path = "card.rs"]
mod backend;
#[cfg(test)]
#[path = "host.rs"]
pub(super) mod backend;
#[cfg(not(any(test, feature = "cuda")))]
#[path = "none.rs"]
mod backend;
mod device;
mod elementwise;
mod launch;
mod norm;
mod optimizer;
mod product;
mod rows;
mod self_test;

pub use self::device::{device_memory, open_cuda};
pub(super) use self::elementwise::{Rotation, draw_bits, masked};
pub(super) use self::optimizer::{RunScalars, StepScalars, adamw, square_sum};
pub(super) use self::product::product;
pub(super) use self::rows::{cross_entropy, gather, scatter};
#[cfg(test)]
pub(super) use self::self_test::self_test;

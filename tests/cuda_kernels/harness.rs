//! Buffers between guards, and launches in several orders.
//!
//! Takes a kernel's name, its grid and arguments as a CUDA launch does. Knows nothing of what a kernel computes.

use std::ffi::{c_uint, c_void};

use super::library::{library, run, source_of};

/// Bytes around each buffer, which no kernel may change; their value is NaN in f32 and bf16.
const GUARD: usize = 64;
const POISON: u8 = 0xFF;
/// Order of blocks, and of threads in each: forward, reverse, and two shuffles.
const ORDERS: [c_uint; 4] = [0, 1, 7, 11];

/// Device memory between guards.
pub struct Buffer {
    /// Aligned to 16 bytes.
    words: Vec<u128>,
    bytes: usize,
}

impl Buffer {
    /// `bytes` bytes of NaN.
    fn poisoned(bytes: usize) -> Self {
        let words = (2 * GUARD + bytes).div_ceil(16);
        Self {
            words: vec![u128::from_ne_bytes([POISON; 16]); words],
            bytes,
        }
    }

    /// An output of `n` f32.
    pub fn f32_output(n: usize) -> Self {
        Self::poisoned(4 * n)
    }

    /// An output of `n` bf16.
    pub fn bf16_output(n: usize) -> Self {
        Self::poisoned(2 * n)
    }

    /// A copy of `values`.
    pub fn new<T: bytemuck::Pod>(values: &[T]) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut buffer = Self::poisoned(bytes.len());
        bytemuck::cast_slice_mut(&mut buffer.words)[GUARD..GUARD + bytes.len()]
            .copy_from_slice(bytes);
        buffer
    }

    /// `values` in bf16, to the nearest.
    pub fn bf16(values: &[f32]) -> Self {
        let bits: Vec<u16> = values
            .iter()
            .map(|x| half::bf16::from_f32(*x).to_bits())
            .collect();
        Self::new(&bits)
    }

    /// The contents.
    pub fn get<T: bytemuck::Pod>(&self) -> Vec<T> {
        let all: &[u8] = bytemuck::cast_slice(&self.words);
        bytemuck::cast_slice(&all[GUARD..GUARD + self.bytes]).to_vec()
    }

    /// The contents in f32, of f32.
    pub fn f32s(&self) -> Vec<f32> {
        self.get()
    }

    /// The contents in f32, of bf16.
    pub fn bf16s(&self) -> Vec<f32> {
        let bits: Vec<u16> = self.get();
        bits.iter()
            .map(|bits| half::bf16::from_bits(*bits).to_f32())
            .collect()
    }

    /// The argument of a kernel.
    pub fn arg(&self) -> Arg {
        Arg::Pointer(self.words.as_ptr() as usize + GUARD)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let all: &[u8] = bytemuck::cast_slice(&self.words);
        let outside = all[..GUARD].iter().chain(&all[GUARD + self.bytes..]);
        if !std::thread::panicking() {
            assert!(
                outside.into_iter().all(|byte| *byte == POISON),
                "a kernel wrote beside a buffer"
            );
        }
    }
}

/// An argument of a kernel.
pub enum Arg {
    /// A device address; 0 is null.
    Pointer(usize),
    Int(i32),
    Uint(u32),
    Long(i64),
    Float(f32),
    /// A structure of 32-bit fields.
    Fields(Vec<u32>),
}

impl Arg {
    fn address(&self) -> *mut c_void {
        match self {
            Self::Pointer(x) => std::ptr::from_ref(x).cast_mut().cast(),
            Self::Int(x) => std::ptr::from_ref(x).cast_mut().cast(),
            Self::Uint(x) => std::ptr::from_ref(x).cast_mut().cast(),
            Self::Long(x) => std::ptr::from_ref(x).cast_mut().cast(),
            Self::Float(x) => std::ptr::from_ref(x).cast_mut().cast(),
            Self::Fields(x) => x.as_ptr().cast_mut().cast(),
        }
    }
}

/// Runs kernels in one order of blocks and threads.
pub struct Device {
    order: c_uint,
}

impl Device {
    /// Runs `kernel`; `grid` and `block` in x, y and z, `shared` bytes of dynamic shared memory.
    pub fn launch(
        &self,
        kernel: &str,
        grid: [usize; 3],
        block: [usize; 3],
        shared: usize,
        args: &[Arg],
    ) {
        assert!(source_of(kernel).is_some(), "{kernel}: in no source");
        let addresses = args.iter().map(Arg::address).collect();
        run(kernel, grid, block, shared, addresses, self.order);
    }
}

/// The result of `work`, whose bits must be the same in every order; `None`, and a message, without a C++ compiler.
pub fn in_every_order(
    test: &str,
    work: impl Fn(&Device) -> Vec<Vec<f32>>,
) -> Option<Vec<Vec<f32>>> {
    if library().is_none() {
        println!("skipped: {test}: no C++ compiler (set CXX)");
        return None;
    }
    let bits = |outputs: &[Vec<f32>]| -> Vec<Vec<u32>> {
        let of = |x: &Vec<f32>| x.iter().map(|x| x.to_bits()).collect();
        outputs.iter().map(of).collect()
    };
    let outputs = ORDERS.map(|order| work(&Device { order }));
    for other in &outputs[1..] {
        assert!(
            bits(&outputs[0]) == bits(other),
            "{test}: the result depends on the order of threads"
        );
    }
    outputs.into_iter().next()
}

/// Whether the result of `work` is the same in every order.
pub fn is_ordered(work: impl Fn(&Device) -> Vec<f32>) -> Option<bool> {
    library()?;
    let outputs = ORDERS.map(|order| work(&Device { order }));
    Some(outputs.iter().all(|output| *output == outputs[0]))
}

/// The largest magnitude.
pub fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, x| max.max(x.abs()))
}

/// Fails unless each value is within `relative` of the largest expected one.
pub fn close(name: &str, found: &[f32], expected: &[f32], relative: f32) {
    within(name, found, expected, relative * largest(expected));
}

/// Fails unless each value is within `bound` of the expected one.
pub fn within(name: &str, found: &[f32], expected: &[f32], bound: f32) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(
            error <= bound,
            "{name}, element {i}: {found}, not {expected}; at most {bound} apart"
        );
    }
}

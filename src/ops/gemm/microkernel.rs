//! Register-tiled micro-kernels, one family per instruction set.
//!
//! A micro-kernel keeps an `M` x `V`-vector tile of the result in registers over all of k (BLIS's
//! MR x NR micro-tile). It reads A by broadcasts through two strides and B row by row from a packed
//! panel. The loops are plain indices: an iterator call that is not inlined would spill the
//! registers. Every instruction set sums over k in the same order, with fused multiply-adds if it
//! has them.

#![allow(clippy::needless_range_loop)]

use std::sync::OnceLock;

use super::Precision;
use super::bf16::MatrixUnit;
#[cfg(target_arch = "x86_64")]
use super::bf16::{amx, avx512_bf16};
use super::schedule::even_parts;

/// out (M, V * lanes) = init + the sum over the terms of a (M, k) b (k, V * lanes). Strides are in
/// elements.
///
/// # Safety
/// Each term's `a` is readable at `i * rs_a + j * cs_a` for i < M, j < k; `b`, `init` and `out` at
/// V * lanes elements of each row.
pub(in crate::ops) type MicroKernel = unsafe fn(KernelArgs<'_>);

/// Operands of a micro-kernel.
#[derive(Clone, Copy)]
pub(in crate::ops) struct KernelArgs<'a> {
    pub(in crate::ops) terms: &'a [KernelTerm],
    /// Null for zero; may be `out`.
    pub(in crate::ops) init: *const f32,
    pub(in crate::ops) rs_init: usize,
    pub(in crate::ops) out: *mut f32,
    pub(in crate::ops) rs_out: usize,
}

impl<'a> KernelArgs<'a> {
    /// out = the sum, or out += the sum.
    pub(in crate::ops) fn new(
        terms: &'a [KernelTerm],
        out: *mut f32,
        rs_out: usize,
        accumulate: bool,
    ) -> Self {
        let init = if accumulate {
            out.cast_const()
        } else {
            std::ptr::null()
        };
        Self {
            terms,
            init,
            rs_init: rs_out,
            out,
            rs_out,
        }
    }
}

/// One product of the sum. As in BLIS, `rs` is a row stride and `cs` a column stride.
#[derive(Clone, Copy)]
pub(in crate::ops) struct KernelTerm {
    pub(in crate::ops) k: usize,
    pub(in crate::ops) a: *const f32,
    pub(in crate::ops) rs_a: usize,
    pub(in crate::ops) cs_a: usize,
    pub(in crate::ops) b: *const f32,
    pub(in crate::ops) rs_b: usize,
}

/// Runs a one-term kernel on a strip of `rows` rows, at most `isa.mr` of them at a time.
///
/// # Safety
/// As `MicroKernel`'s, for `rows` rows of `vectors` vectors.
pub(in crate::ops) unsafe fn gemm_strip(
    isa: &Isa,
    rows: usize,
    vectors: usize,
    args: KernelArgs<'_>,
) {
    let term = args.terms[0];
    for rows in even_parts(0..rows, isa.mr) {
        let first = rows.start;
        let init = if args.init.is_null() {
            args.init
        } else {
            args.init.wrapping_add(first * args.rs_init)
        };
        // SAFETY: the caller's promise.
        unsafe {
            let term = KernelTerm {
                a: term.a.add(first * term.rs_a),
                ..term
            };
            isa.kernel(rows.len(), vectors)(KernelArgs {
                terms: &[term],
                init,
                out: args.out.add(first * args.rs_out),
                ..args
            });
        }
    }
}

/// The micro-kernels and blocking parameters of an instruction set.
pub(in crate::ops) struct Isa {
    /// Name in reports.
    pub(in crate::ops) name: &'static str,
    /// MR: maximum rows of a micro-tile.
    pub(in crate::ops) mr: usize,
    /// f32 elements of a vector; a micro-tile is one or two of them wide.
    pub(in crate::ops) lanes: usize,
    /// Micro-kernels, indexed by vectors - 1, then by rows - 1.
    kernels: [&'static [MicroKernel]; 2],
    /// Depth of a panel of B at most: a strip's micro-tiles read a deeper one again from beyond L2.
    pub(super) max_kc: usize,
    /// KC: block size of a k beyond `max_kc`.
    pub(super) kc: usize,
    /// f32 elements of packed B of one task: half of L2.
    pub(super) packed_elements: usize,
    pub(super) transpose: Transpose,
    /// The unit that multiplies bf16 instead.
    pub(in crate::ops) matrix_unit: Option<MatrixUnit>,
}

impl Isa {
    /// The micro-kernel of `rows` by `vectors`.
    pub(in crate::ops) fn kernel(&self, rows: usize, vectors: usize) -> MicroKernel {
        self.kernels[vectors - 1][rows - 1]
    }

    /// NR: maximum columns of a micro-tile.
    pub(in crate::ops) fn nr(&self) -> usize {
        2 * self.lanes
    }

    /// Size of the blocks that a `k` deep product is cut into.
    pub(super) fn block_depth(&self, k: usize) -> usize {
        if k > self.max_kc { self.kc } else { k.max(1) }
    }

    /// The matrix unit for linear layers in `precision`.
    pub(in crate::ops) fn gemm_unit(&self, precision: Precision) -> Option<MatrixUnit> {
        self.matrix_unit.filter(|unit| unit.supports(precision))
    }

    /// The matrix unit of ops that use one in bf16 only (attention): `None` in f32.
    pub(in crate::ops) fn bf16_unit(&self, precision: Precision) -> Option<MatrixUnit> {
        self.matrix_unit.filter(|_| precision != Precision::F32)
    }
}

/// How `pack` transposes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Transpose {
    /// Element by element.
    Portable,
    /// 8 x 8 blocks in AVX2 registers.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 16 x 16 blocks in AVX-512 registers.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A list of micro-kernels with 1, 2, ... rows.
macro_rules! kernels {
    ($name:ident, $vectors:literal, $($rows:literal)*) => { &[$($name::<$rows, $vectors> as MicroKernel),*] };
}

/// For any target: arrays, which the compiler vectorizes.
static PORTABLE: Isa = Isa {
    name: "portable",
    mr: 6,
    lanes: 8,
    kernels: [
        kernels!(portable, 1, 1 2 3 4 5 6),
        kernels!(portable, 2, 1 2 3 4 5 6),
    ],
    max_kc: 2048,
    kc: 768,
    packed_elements: 64 << 10,
    transpose: Transpose::Portable,
    matrix_unit: None,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Isa = Isa {
    name: "avx2",
    kernels: [
        kernels!(avx2, 1, 1 2 3 4 5 6),
        kernels!(avx2, 2, 1 2 3 4 5 6),
    ],
    transpose: Transpose::Avx2,
    ..PORTABLE
};

#[cfg(target_arch = "x86_64")]
static AVX512: Isa = Isa {
    name: "avx512",
    mr: 14,
    lanes: 16,
    kernels: [
        kernels!(avx512, 1, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        kernels!(avx512, 2, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
    ],
    // 32 columns of 6144 rows fill three quarters of a 1 MiB L2.
    max_kc: 6144,
    kc: 2048,
    packed_elements: 128 << 10,
    transpose: Transpose::Avx512,
    matrix_unit: None,
};

/// AVX-512, with AMX for products of many rows.
#[cfg(target_arch = "x86_64")]
static AMX: Isa = Isa {
    name: "amx",
    matrix_unit: Some(MatrixUnit::Amx),
    ..AVX512
};

/// AVX-512, with bf16 dot products for many rows in bf16.
#[cfg(target_arch = "x86_64")]
static AVX512_BF16: Isa = Isa {
    name: "avx512_bf16",
    matrix_unit: Some(MatrixUnit::Avx512Bf16),
    ..AVX512
};

/// The instruction sets of this CPU, fastest first.
pub(in crate::ops) fn available() -> &'static [&'static Isa] {
    static FOUND: OnceLock<Vec<&'static Isa>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut found: Vec<&'static Isa> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            let pairs = avx512_bf16::present();
            let candidates = [
                (wide && amx::permitted(), &AMX),
                (pairs && avx512_bf16::fast(), &AVX512_BF16),
                (wide, &AVX512),
                (pairs && !avx512_bf16::fast(), &AVX512_BF16),
            ];
            let present = candidates.into_iter().filter(|(present, _)| *present);
            found.extend(present.map(|(_, isa)| isa));
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(&AVX2);
            }
        }
        found.push(&PORTABLE);
        found
    })
}

/// The fastest instruction set, or the one that a test has forced on this thread.
pub(in crate::ops) fn best() -> &'static Isa {
    #[cfg(test)]
    if let Some(isa) = FORCED_ISA.get() {
        return isa;
    }
    available()[0]
}

#[cfg(test)]
thread_local! {
    /// Overrides `best` on this thread.
    pub(in crate::ops) static FORCED_ISA: std::cell::Cell<Option<&'static Isa>> = const { std::cell::Cell::new(None) };
}

/// The micro-kernel without intrinsics.
#[inline(always)]
unsafe fn arrays<const M: usize, const V: usize>(
    args: KernelArgs<'_>,
    mul_add: impl Fn(f32, f32, f32) -> f32,
) {
    let mut sums = [[[0.0f32; 8]; V]; M];
    // SAFETY: the caller's promise about every pointer.
    unsafe {
        for term in args.terms {
            for k in 0..term.k {
                let b = term.b.add(k * term.rs_b).cast::<[[f32; 8]; V]>();
                let b = b.read_unaligned();
                for m in 0..M {
                    let a = *term.a.add(m * term.rs_a + k * term.cs_a);
                    for v in 0..V {
                        for lane in 0..8 {
                            sums[m][v][lane] = mul_add(a, b[v][lane], sums[m][v][lane]);
                        }
                    }
                }
            }
        }
        for m in 0..M {
            if !args.init.is_null() {
                let init = args.init.add(m * args.rs_init);
                let init = init.cast::<[[f32; 8]; V]>().read_unaligned();
                for v in 0..V {
                    for lane in 0..8 {
                        sums[m][v][lane] += init[v][lane];
                    }
                }
            }
            let out = args.out.add(m * args.rs_out);
            out.cast::<[[f32; 8]; V]>().write_unaligned(sums[m]);
        }
    }
}

unsafe fn portable<const M: usize, const V: usize>(args: KernelArgs<'_>) {
    // aarch64 always has a fused multiply-add; elsewhere it would be a library call.
    // SAFETY: the caller's promise.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        arrays::<M, V>(args, |a, b, c| a.mul_add(b, c))
    }
    // SAFETY: the caller's promise.
    #[cfg(not(target_arch = "aarch64"))]
    unsafe {
        arrays::<M, V>(args, |a, b, c| a * b + c)
    }
}

/// A micro-kernel of x86-64 intrinsics: name, features, lanes, and the intrinsics for zero, load,
/// broadcast, FMA, add and store.
#[cfg(target_arch = "x86_64")]
macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $zero:ident, $load:ident, $set:ident, $fma:ident, $add:ident, $store:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const M: usize, const V: usize>(args: KernelArgs<'_>) {
            use std::arch::x86_64::*;
            let mut sums = [[$zero(); V]; M];
            // SAFETY: the caller's promise about every pointer; a prefetch reads nothing.
            unsafe {
                if !args.init.is_null() {
                    // The initial values are needed last: prefetched during the loop.
                    for m in 0..M {
                        for v in (0..V).step_by(16 / $lanes) {
                            _mm_prefetch::<_MM_HINT_T0>(
                                args.init.wrapping_add(m * args.rs_init + $lanes * v).cast(),
                            );
                        }
                    }
                }
                for &KernelTerm {
                    k,
                    mut a,
                    rs_a,
                    cs_a,
                    mut b,
                    rs_b,
                } in args.terms
                {
                    for _ in 0..k {
                        let mut row = [$zero(); V];
                        for v in 0..V {
                            row[v] = $load(b.add($lanes * v));
                        }
                        for m in 0..M {
                            let a = $set(*a.add(m * rs_a));
                            for v in 0..V {
                                sums[m][v] = $fma(a, row[v], sums[m][v]);
                            }
                        }
                        (a, b) = (a.add(cs_a), b.add(rs_b));
                    }
                }
                for m in 0..M {
                    for v in 0..V {
                        let mut sum = sums[m][v];
                        if !args.init.is_null() {
                            sum = $add($load(args.init.add(m * args.rs_init + $lanes * v)), sum);
                        }
                        $store(args.out.add(m * args.rs_out + $lanes * v), sum);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel!(
    avx2,
    "avx2,fma",
    8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_set1_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps,
    _mm256_storeu_ps
);
#[cfg(target_arch = "x86_64")]
kernel!(
    avx512,
    "avx512f",
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_set1_ps,
    _mm512_fmadd_ps,
    _mm512_add_ps,
    _mm512_storeu_ps
);

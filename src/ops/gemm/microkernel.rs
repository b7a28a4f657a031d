//! The innermost loops: one tile of a product, for each instruction set.
//!
//! A tile is `M` rows by `V` vectors of the result, kept in registers over the whole of k. A is read by broadcast through two strides, B
//! row by row from a packed panel. Loops here are plain indices: an iterator's call that is not inlined leaves the registers. Every
//! instruction set sums over k in the same order, once, with fused multiply-adds where it has them.

#![allow(clippy::needless_range_loop)]

use std::sync::OnceLock;

use super::Precision;
use super::bf16::MatrixUnit;
#[cfg(target_arch = "x86_64")]
use super::bf16::{amx, avx512_bf16};

/// out (m, V * lanes) = start + the sum over the parts of a (m, k) b (k, V * lanes). Row strides are in numbers; `start` is null for zero and
/// may be `out` itself.
///
/// # Safety
/// Each part's `a` must be readable at `i * a_row + j * a_column` for i < m, j < k; `b`, `start` and `out` at V * lanes numbers in each of
/// their rows.
pub(in crate::ops) type MicroKernel = unsafe fn(KernelArgs<'_>);

/// Where a tile reads and writes.
#[derive(Clone, Copy)]
pub(in crate::ops) struct KernelArgs<'a> {
    pub(in crate::ops) parts: &'a [KernelTerm],
    pub(in crate::ops) start: *const f32,
    pub(in crate::ops) start_row: usize,
    pub(in crate::ops) out: *mut f32,
    pub(in crate::ops) out_row: usize,
}

impl<'a> KernelArgs<'a> {
    /// out = the sum, or out += the sum.
    pub(in crate::ops) fn new(
        parts: &'a [KernelTerm],
        (out, out_row): (*mut f32, usize),
        add: bool,
    ) -> Self {
        Self {
            parts,
            start: if add {
                out.cast_const()
            } else {
                std::ptr::null()
            },
            start_row: out_row,
            out,
            out_row,
        }
    }
}

/// One of the products that a tile sums.
#[derive(Clone, Copy)]
pub(in crate::ops) struct KernelTerm {
    pub(in crate::ops) k: usize,
    pub(in crate::ops) a: *const f32,
    pub(in crate::ops) a_row: usize,
    pub(in crate::ops) a_column: usize,
    pub(in crate::ops) b: *const f32,
    pub(in crate::ops) b_row: usize,
}

/// One instruction set's tiles.
pub(in crate::ops) struct Isa {
    /// The word of reports.
    pub(in crate::ops) name: &'static str,
    /// Most rows of a tile.
    pub(in crate::ops) mr: usize,
    /// Numbers of a vector; a tile is one or two of them wide.
    pub(in crate::ops) lanes: usize,
    /// By vectors - 1, then rows - 1.
    kernels: [&'static [MicroKernel]; 2],
    /// Numbers of k that one panel of B holds at most: more of them, and what the tiles of a strip read again falls out of the cache.
    pub(super) max_kc: usize,
    /// k is cut into pieces of this length where it is deeper.
    pub(super) kc: usize,
    /// Numbers of packed B that one task holds: half of a second-level cache.
    pub(super) packed_elements: usize,
    /// What `pack` transposes in.
    pub(super) transposes: Transposes,
    /// What multiplies products of many rows in blocks instead.
    pub(in crate::ops) matrix_unit: Option<MatrixUnit>,
}

impl Isa {
    /// The tile of `rows` by `vectors`.
    pub(in crate::ops) fn kernel(&self, rows: usize, vectors: usize) -> MicroKernel {
        self.kernels[vectors - 1][rows - 1]
    }

    /// What multiplies products in `precision` in blocks.
    pub(in crate::ops) fn gemm_unit(&self, precision: Precision) -> Option<MatrixUnit> {
        self.matrix_unit.filter(|unit| unit.takes(precision))
    }

    /// What multiplies products in `precision` in blocks where f32 goes by vectors, whatever a unit takes.
    pub(in crate::ops) fn bf16_unit(&self, precision: Precision) -> Option<MatrixUnit> {
        self.matrix_unit.filter(|_| precision != Precision::F32)
    }

    /// Columns of the widest tile.
    pub(in crate::ops) fn nr(&self) -> usize {
        2 * self.lanes
    }
}

/// Registers in which blocks of a matrix are transposed.
#[derive(Clone, Copy)]
pub(super) enum Transposes {
    /// None: number by number.
    Portable,
    /// 8 x 8 of AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 16 x 16 of AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A list of tiles with 1, 2, ... rows.
macro_rules! tiles {
    ($name:ident, $vectors:literal, $($rows:literal)*) => { &[$($name::<$rows, $vectors> as MicroKernel),*] };
}

/// Everywhere: arrays that the compiler turns into whatever vectors the target has.
static PORTABLE: Isa = Isa {
    name: "portable",
    mr: 6,
    lanes: 8,
    kernels: [
        tiles!(portable, 1, 1 2 3 4 5 6),
        tiles!(portable, 2, 1 2 3 4 5 6),
    ],
    max_kc: 2048,
    kc: 768,
    packed_elements: 64 << 10,
    transposes: Transposes::Portable,
    matrix_unit: None,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Isa = Isa {
    name: "avx2",
    mr: 6,
    lanes: 8,
    kernels: [tiles!(avx2, 1, 1 2 3 4 5 6), tiles!(avx2, 2, 1 2 3 4 5 6)],
    max_kc: 2048,
    kc: 768,
    packed_elements: 64 << 10,
    transposes: Transposes::Avx2,
    matrix_unit: None,
};

#[cfg(target_arch = "x86_64")]
static AVX512: Isa = Isa {
    name: "avx512",
    mr: 14,
    lanes: 16,
    kernels: [
        tiles!(avx512, 1, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        tiles!(avx512, 2, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
    ],
    // 32 columns of 6144 rows fill three quarters of a 1 MiB second-level cache.
    max_kc: 6144,
    kc: 2048,
    packed_elements: 128 << 10,
    transposes: Transposes::Avx512,
    matrix_unit: None,
};

/// AVX-512 for what has few rows.
#[cfg(target_arch = "x86_64")]
static AMX: Isa = Isa {
    name: "amx",
    matrix_unit: Some(MatrixUnit::Amx),
    ..AVX512
};

/// AVX-512 for f32 and for what has few rows.
#[cfg(target_arch = "x86_64")]
static AVX512_BF16: Isa = Isa {
    name: "avx512_bf16",
    matrix_unit: Some(MatrixUnit::Avx512Bf16),
    ..AVX512
};

/// Every instruction set that this processor has, best first, and those that are slower than others after these.
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
            found.extend(
                candidates
                    .into_iter()
                    .filter_map(|(has, isa)| has.then_some(isa)),
            );
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(&AVX2);
            }
        }
        found.push(&PORTABLE);
        found
    })
}

/// The instruction set of whatever this thread begins: the best, unless a test has chosen another.
pub(in crate::ops) fn best() -> &'static Isa {
    #[cfg(test)]
    if let Some(isa) = FORCED_ISA.get() {
        return isa;
    }
    available()[0]
}

#[cfg(test)]
thread_local! {
    /// What a test has `best` give on this thread.
    pub(in crate::ops) static FORCED_ISA: std::cell::Cell<Option<&'static Isa>> = const { std::cell::Cell::new(None) };
}

/// The body of the tiles without intrinsics.
#[inline(always)]
unsafe fn arrays<const M: usize, const V: usize>(
    args: KernelArgs<'_>,
    mul_add: impl Fn(f32, f32, f32) -> f32,
) {
    let mut sums = [[[0.0f32; 8]; V]; M];
    // SAFETY: the caller's promise about every pointer.
    unsafe {
        for part in args.parts {
            for k in 0..part.k {
                let b = part
                    .b
                    .add(k * part.b_row)
                    .cast::<[[f32; 8]; V]>()
                    .read_unaligned();
                for m in 0..M {
                    let a = *part.a.add(m * part.a_row + k * part.a_column);
                    for v in 0..V {
                        for lane in 0..8 {
                            sums[m][v][lane] = mul_add(a, b[v][lane], sums[m][v][lane]);
                        }
                    }
                }
            }
        }
        for m in 0..M {
            if !args.start.is_null() {
                let start = args
                    .start
                    .add(m * args.start_row)
                    .cast::<[[f32; 8]; V]>()
                    .read_unaligned();
                for v in 0..V {
                    for lane in 0..8 {
                        sums[m][v][lane] += start[v][lane];
                    }
                }
            }
            args.out
                .add(m * args.out_row)
                .cast::<[[f32; 8]; V]>()
                .write_unaligned(sums[m]);
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

/// A tile of x86-64 intrinsics: its name, features, lanes, and the intrinsics for zero, load, broadcast, multiply-add, add and store.
#[cfg(target_arch = "x86_64")]
macro_rules! tile {
    ($name:ident, $features:literal, $lanes:literal, $zero:ident, $load:ident, $set:ident, $fma:ident, $add:ident, $store:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const M: usize, const V: usize>(args: KernelArgs<'_>) {
            use std::arch::x86_64::*;
            let mut sums = [[$zero(); V]; M];
            // SAFETY: the caller's promise about every pointer; a prefetch reads nothing.
            unsafe {
                if !args.start.is_null() {
                    // What the sums start from is needed last: it comes while they are made.
                    for m in 0..M {
                        for v in (0..V).step_by(16 / $lanes) {
                            _mm_prefetch::<_MM_HINT_T0>(
                                args.start
                                    .wrapping_add(m * args.start_row + $lanes * v)
                                    .cast(),
                            );
                        }
                    }
                }
                for &KernelTerm {
                    k,
                    mut a,
                    a_row,
                    a_column,
                    mut b,
                    b_row,
                } in args.parts
                {
                    for _ in 0..k {
                        let mut row = [$zero(); V];
                        for v in 0..V {
                            row[v] = $load(b.add($lanes * v));
                        }
                        for m in 0..M {
                            let a = $set(*a.add(m * a_row));
                            for v in 0..V {
                                sums[m][v] = $fma(a, row[v], sums[m][v]);
                            }
                        }
                        (a, b) = (a.add(a_column), b.add(b_row));
                    }
                }
                for m in 0..M {
                    for v in 0..V {
                        let mut sum = sums[m][v];
                        if !args.start.is_null() {
                            sum = $add($load(args.start.add(m * args.start_row + $lanes * v)), sum);
                        }
                        $store(args.out.add(m * args.out_row + $lanes * v), sum);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
tile!(
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
tile!(
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

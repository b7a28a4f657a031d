//! The innermost loop on Intel AMX: a 32 x 32 result in tile registers over a block of k.
//!
//! Rust 1.95 has no stable AMX intrinsics, so the loop is inline assembly: one block for each
//! combination of planes, which loads or zeroes the result, runs over k and stores it. Tile
//! registers 0 to 3 are the result, 4 and 5 A, 6 and 7 B.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::unit::{BF16_PLANES, F32_PLANES, K_STEP, ROW_BYTES, Runs, TileOut};

/// Whether the CPU has AMX and the kernel permits it (on Linux a process must request it).
pub(in crate::ops::gemm) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        const TILES_AND_BF16: u32 = 1 << 24 | 1 << 22;
        is_x86_feature_detected!("avx512bf16")
            && __cpuid_count(7, 0).edx & TILES_AND_BF16 == TILES_AND_BF16
            && request_permission()
    })
}

#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA (Linux kernel documentation, "Using XSTATE
    // features in user space applications").
    const REQUEST: usize = 0x1023;
    const TILE_DATA: usize = 18;
    // SAFETY: this call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// Configures this thread's eight tile registers as 16 rows of 64 bytes (palette 1).
pub(super) fn configure() {
    assert!(permitted(), "AMX is permitted");
    // Intel's Software Developer's Manual, volume 1, section 18.2: palette, start row, 14 reserved
    // bytes, then 16 row widths in bytes (u16) and 16 row counts (u8).
    let mut config = [0u8; 64];
    config[0] = 1;
    for register in 0..8 {
        config[16 + 2 * register] = ROW_BYTES as u8;
        config[48 + register] = 16;
    }
    // SAFETY: the instruction is permitted, and the 64 bytes are readable.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) config.as_ptr(), options(nostack, readonly)) };
}

/// Releases the tile registers after `configure`.
pub(super) fn release() {
    // SAFETY: after `configure` the instruction exists; nothing reads the registers afterwards.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// The four products of A's tiles (registers 4, 5) and B's (6, 7).
macro_rules! four {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6
         tdpbf16ps tmm1, tmm4, tmm7
         tdpbf16ps tmm2, tmm5, tmm6
         tdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// Loads both tiles of a plane of A or B.
macro_rules! load {
    (a $plane:literal) => {
        concat!(
            "tileloadd tmm4, [{a} + {row}*1 + 2048*",
            $plane,
            "]\n tileloadd tmm5, [{a} + {row}*1 + 2048*",
            $plane,
            " + 1024]"
        )
    };
    (b $plane:literal) => {
        concat!(
            "tileloadd tmm6, [{b} + {row}*1 + 2048*",
            $plane,
            "]\n tileloadd tmm7, [{b} + {row}*1 + 2048*",
            $plane,
            " + 1024]"
        )
    };
}

/// A step in bf16.
macro_rules! rounded_step {
    () => {
        concat!(load!(b 0), "\n", load!(a 0), "\n", four!(), "\n add {a}, 2048\n add {b}, 2048")
    };
}

/// A step in f32: a = a0 + a1 + a2, 8 of its 24 bits each. The products left out are below 2^-24 of
/// a b.
macro_rules! split_step {
    () => {
        concat!(
            load!(b 2), "\n", load!(a 0), "\n", four!(), "\n",
            load!(b 1), "\n", four!(), "\n",
            load!(a 1), "\n", four!(), "\n",
            load!(b 0), "\n", four!(), "\n",
            load!(a 2), "\n", four!(), "\n",
            load!(a 0), "\n", four!(), "\n",
            "add {a}, 6144\n add {b}, 6144"
        )
    };
}

/// A step of f32 times bf16, whose other planes are zero: the remaining products of `split_step`,
/// in its order.
macro_rules! mixed_step {
    () => {
        concat!(
            load!(b 0), "\n", load!(a 1), "\n", four!(), "\n",
            load!(a 2), "\n", four!(), "\n",
            load!(a 0), "\n", four!(), "\n",
            "add {a}, 6144\n add {b}, 2048"
        )
    };
}

/// A kernel whose first run takes the steps `$first` and whose second takes `$second`.
macro_rules! kernel {
    ($name:ident, $first:expr, $second:expr) => {
        /// out = the runs' products, or out += them.
        ///
        /// # Safety
        /// The tile registers are configured; every step of A and B is readable, `out` is writable
        /// as 32 x 32.
        unsafe fn $name(runs: Runs, out: TileOut) {
            let [(a, b, steps), (next_a, next_b, more)] = runs.map(|run| (run.a, run.b, run.depth.div_ceil(K_STEP)));
            // SAFETY: the caller's promise; the loops run `steps` and `more` times, both tested
            // first.
            unsafe {
                asm!(
                    "test {accumulate}, {accumulate}",
                    "jnz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{out} + {stride}*1]",
                    "tileloadd tmm1, [{out} + {stride}*1 + 64]",
                    "tileloadd tmm2, [{low} + {stride}*1]",
                    "tileloadd tmm3, [{low} + {stride}*1 + 64]",
                    "3:",
                    "test {steps}, {steps}",
                    "jz 5f",
                    "4:",
                    $first,
                    "dec {steps}",
                    "jnz 4b",
                    "5:",
                    "mov {a}, {next_a}",
                    "mov {b}, {next_b}",
                    "test {more}, {more}",
                    "jz 7f",
                    "6:",
                    $second,
                    "dec {more}",
                    "jnz 6b",
                    "7:",
                    "tilestored [{out} + {stride}*1], tmm0",
                    "tilestored [{out} + {stride}*1 + 64], tmm1",
                    "tilestored [{low} + {stride}*1], tmm2",
                    "tilestored [{low} + {stride}*1 + 64], tmm3",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    next_a = in(reg) next_a,
                    next_b = in(reg) next_b,
                    more = inout(reg) more => _,
                    accumulate = in(reg) usize::from(out.accumulate),
                    row = in(reg) ROW_BYTES,
                    out = in(reg) out.ptr,
                    low = in(reg) out.ptr.wrapping_add(16 * out.stride),
                    stride = in(reg) out.stride * size_of::<f32>(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel!(rounded, rounded_step!(), rounded_step!());
kernel!(split, split_step!(), split_step!());
kernel!(mixed, mixed_step!(), mixed_step!());
kernel!(mixed_then_split, mixed_step!(), split_step!());

/// `ActiveUnit::multiply` on AMX.
///
/// # Safety
/// As the kernels'.
pub(super) unsafe fn multiply(planes: usize, runs: Runs, out: TileOut) {
    // SAFETY: the caller's promise.
    unsafe {
        match (planes, runs.map(|run| run.planes)) {
            (BF16_PLANES, _) => rounded(runs, out),
            (_, [F32_PLANES, _]) => split(runs, out),
            (_, [_, F32_PLANES]) => mixed_then_split(runs, out),
            _ => mixed(runs, out),
        }
    }
}

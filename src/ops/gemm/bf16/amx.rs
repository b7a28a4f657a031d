//! The innermost loop in tile registers: 32 x 32 numbers of a result, kept there over a run of k.
//!
//! Rust 1.95 has no stable intrinsics for tile registers, so that the loop is assembly: one block for each way to multiply, which loads
//! or clears the result, runs through k and stores it. Tile registers 0 to 3 hold the result, 4 and 5 A, 6 and 7 B.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::unit::{BF16_PLANES, F32_PLANES, K_STEP, ROW, Runs};

/// Whether the processor has these registers and the system lets this process use them (on Linux a process has to ask).
pub(in crate::ops::gemm) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        const TILES_AND_BF16: u32 = 1 << 24 | 1 << 22;
        is_x86_feature_detected!("avx512bf16")
            && __cpuid_count(7, 0).edx & TILES_AND_BF16 == TILES_AND_BF16
            && asked()
    })
}

#[cfg(target_os = "linux")]
fn asked() -> bool {
    // From the kernel's documentation of extended states: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
    const REQUEST: usize = 0x1023;
    const TILE_DATA: usize = 18;
    // SAFETY: this call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn asked() -> bool {
    false
}

/// Shapes all eight of this thread's registers as 16 rows of 64 bytes (palette 1).
pub(super) fn shape() {
    assert!(
        permitted(),
        "tile registers are used only where they are permitted"
    );
    // Layout: Intel's Software Developer's Manual, volume 1, section 18.2: palette, start row, 14 reserved bytes, then 16 row widths in
    // bytes (u16) and 16 row counts (u8).
    let mut shape = [0u8; 64];
    shape[0] = 1;
    for register in 0..8 {
        shape[16 + 2 * register] = ROW as u8;
        shape[48 + register] = 16;
    }
    // SAFETY: the instruction is permitted, and the 64 bytes are readable.
    unsafe { asm!("ldtilecfg [{0}]", in(reg) shape.as_ptr(), options(nostack, readonly)) };
}

/// Gives them back, after `shape`.
pub(super) fn release() {
    // SAFETY: `shape` was called, so that the instruction exists; nothing is read from the registers afterwards.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// The four products of A's rows (registers 4, 5) and B's columns (6, 7).
macro_rules! four {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6
         tdpbf16ps tmm1, tmm4, tmm7
         tdpbf16ps tmm2, tmm5, tmm6
         tdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// Loads both tiles of A's or B's plane.
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

/// A step of numbers rounded to bf16.
macro_rules! rounded_step {
    () => {
        concat!(load!(b 0), "\n", load!(a 0), "\n", four!(), "\n add {a}, 2048\n add {b}, 2048")
    };
}

/// A step of f32: a = a0 + a1 + a2, each 8 bits of a's 24. The products left out are below 2^-24 of a b.
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

/// A step of f32 times bf16, whose other parts are zero: what is left of `split_step`, in its order.
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

/// A function that runs the first run of k through the steps `$first` and the second through `$second`.
macro_rules! kernel {
    ($name:ident, $first:expr, $second:expr) => {
        /// out (32, 32), `out_row` numbers apart = [out where `onto`] + the runs' products.
        ///
        /// # Safety
        /// This thread's registers are shaped; every step of A and B is readable, out's rows are writable.
        unsafe fn $name(runs: Runs, out: *mut f32, out_row: usize, onto: bool) {
            let [(a, b, steps), (next_a, next_b, more)] = runs.map(|run| (run.a, run.b, run.depth.div_ceil(K_STEP)));
            // SAFETY: the caller's promise; the loops run `steps` and `more` times, both tested before they begin.
            unsafe {
                asm!(
                    "test {onto}, {onto}",
                    "jnz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{out} + {out_row}*1]",
                    "tileloadd tmm1, [{out} + {out_row}*1 + 64]",
                    "tileloadd tmm2, [{low} + {out_row}*1]",
                    "tileloadd tmm3, [{low} + {out_row}*1 + 64]",
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
                    "tilestored [{out} + {out_row}*1], tmm0",
                    "tilestored [{out} + {out_row}*1 + 64], tmm1",
                    "tilestored [{low} + {out_row}*1], tmm2",
                    "tilestored [{low} + {out_row}*1 + 64], tmm3",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    steps = inout(reg) steps => _,
                    next_a = in(reg) next_a,
                    next_b = in(reg) next_b,
                    more = inout(reg) more => _,
                    onto = in(reg) usize::from(onto),
                    row = in(reg) ROW,
                    out = in(reg) out,
                    low = in(reg) out.wrapping_add(16 * out_row),
                    out_row = in(reg) out_row * size_of::<f32>(),
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

/// The loop for these planes, as `ActiveUnit::multiply`'s.
///
/// # Safety
/// As the kernels': this thread's registers are shaped; A's and B's steps are readable, `out` is writable.
pub(super) unsafe fn multiply(
    planes: usize,
    runs: Runs,
    (out, out_row): (*mut f32, usize),
    onto: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (planes, runs.map(|run| run.planes)) {
            (BF16_PLANES, _) => rounded(runs, out, out_row, onto),
            (_, [F32_PLANES, _]) => split(runs, out, out_row, onto),
            (_, [_, F32_PLANES]) => mixed_then_split(runs, out, out_row, onto),
            _ => mixed(runs, out, out_row, onto),
        }
    }
}

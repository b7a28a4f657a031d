//! The kernels, compiled for the host: their library, buffers between guards, launches in several orders.
//!
//! Takes a kernel's name, its grid and arguments as a CUDA launch does. Knows nothing of what a kernel computes.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use regex::Regex;

/// Bytes around each buffer, which no kernel may change; their value is NaN in f32 and bf16.
const GUARD: usize = 64;
const POISON: u8 = 0xFF;
/// Order of blocks, and of threads in each: forward, reverse, and two shuffles.
const ORDERS: [c_uint; 4] = [0, 1, 7, 11];

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const [c_uint; 3],
    *const [c_uint; 3],
    usize,
    *mut *mut c_void,
    c_uint,
) -> c_int;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The kernel sources of the project, and the faulty ones of the tests.
fn sources() -> Vec<PathBuf> {
    let of = |pattern: &str| {
        let pattern = root().join(pattern);
        let found = glob::glob(pattern.to_str().unwrap()).unwrap();
        found.map(Result::unwrap).collect::<Vec<_>>()
    };
    [of("src/ops/**/*.cu"), of("tests/cuda_kernels/*.cu")].concat()
}

/// The kernels of a source, as (name, largest number of threads): `KERNEL(threads, name)`, or a macro that expands to it.
fn kernels_of(source: &str) -> Vec<(String, String)> {
    let macros =
        Regex::new(r"(?m)^#define ([A-Z_]+)\(name\b[^\n]*\n\s*KERNEL\((\d+), name\)").unwrap();
    let direct = Regex::new(r"(?m)^KERNEL\((\d+), (\w+)\)").unwrap();
    let mut kernels: Vec<_> = direct
        .captures_iter(source)
        .map(|found| (found[2].to_string(), found[1].to_string()))
        .collect();
    for definition in macros.captures_iter(source) {
        let used = Regex::new(&format!(r"(?m)^{}\((\w+), ", &definition[1])).unwrap();
        let names = used.captures_iter(source).map(|name| name[1].to_string());
        kernels.extend(names.map(|name| (name, definition[2].to_string())));
    }
    kernels
}

/// One C++ file of all kernels and their table.
fn unit(sources: &[PathBuf]) -> String {
    let (mut includes, mut table) = (String::new(), String::new());
    for path in sources {
        writeln!(includes, "#include {path:?}").unwrap();
        let kernels = kernels_of(&std::fs::read_to_string(path).unwrap());
        assert!(!kernels.is_empty(), "{path:?}: no kernel");
        for (name, threads) in kernels {
            writeln!(
                table,
                "  {{\"{name}\", {threads}, emulation::call<{name}>}},"
            )
            .unwrap();
        }
    }
    format!(
        "{includes}extern const emulation::Kernel KERNELS[] = {{\n{table}  {{nullptr, 0, nullptr}}}};\n"
    )
}

/// Compiles the kernels; `None` without a C++ compiler.
fn compile() -> Option<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    if Command::new(&compiler).arg("--version").output().is_err() {
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_kernels");
    std::fs::create_dir_all(&folder).unwrap();
    let library = folder.join(format!("kernels-{}.so", std::process::id()));
    let generated = library.with_extension("cpp");
    std::fs::write(&generated, unit(&sources())).unwrap();
    let emulation = root().join("tests/cuda_kernels");
    let mut command = Command::new(compiler);
    // Undefined behaviour ends the process: misaligned vectors, overflow, indices beyond arrays.
    command.args(["-std=c++17", "-O2", "-g1", "-shared", "-fPIC", "-Wall"]);
    command.args([
        "-Wno-unknown-pragmas",
        "-Werror",
        "-U_FORTIFY_SOURCE",
        "-ffp-contract=off",
    ]);
    command.args([
        "-fsanitize=alignment,bounds,shift,signed-integer-overflow",
        "-fsanitize-undefined-trap-on-error",
    ]);
    command.arg("-I").arg(&emulation).arg("-o").arg(&library);
    command.arg(emulation.join("emulation.cpp")).arg(&generated);
    let built = command.output().unwrap();
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    Some(library)
}

/// The `launch` function of the compiled kernels; `None` without a C++ compiler.
fn library() -> Option<&'static Mutex<Launch>> {
    static LOADED: OnceLock<Option<Mutex<Launch>>> = OnceLock::new();
    let load = || {
        let library = compile()?;
        let path = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: the library was built by `compile`, and `launch` has this signature there.
        unsafe {
            let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
            assert!(!handle.is_null(), "{library:?} cannot be loaded");
            let launch = libc::dlsym(handle, c"launch".as_ptr());
            assert!(!launch.is_null());
            std::fs::remove_file(&library).unwrap();
            Some(Mutex::new(std::mem::transmute::<*mut c_void, Launch>(
                launch,
            )))
        }
    };
    LOADED.get_or_init(load).as_ref()
}

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
        let launch = library().expect("a launch has a compiler").lock().unwrap();
        let name = CString::new(kernel).unwrap();
        let mut addresses: Vec<_> = args.iter().map(Arg::address).collect();
        let (grid, block) = (grid.map(|n| n as c_uint), block.map(|n| n as c_uint));
        // SAFETY: the arguments are those of the kernel, as each test writes them.
        let status = unsafe {
            launch(
                name.as_ptr(),
                &grid,
                &block,
                shared,
                addresses.as_mut_ptr(),
                self.order,
            )
        };
        assert_eq!(status, 0, "{kernel}: 1: unknown, 2: too many threads");
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

//! The kernels, compiled for the host and loaded.
//!
//! Owns the list of sources, the compiler's flags and the library; also built into the unit tests of `ops`. Knows nothing
//! of buffers.

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use regex::Regex;

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
    let library = format!("wattune-cuda-kernels-{}.so", std::process::id());
    let library = std::env::temp_dir().join(library);
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
    std::fs::remove_file(&generated).unwrap();
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    Some(library)
}

/// The `launch` function of the compiled kernels; `None` without a C++ compiler.
pub fn library() -> Option<&'static Mutex<Launch>> {
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

/// Runs a kernel; `grid` and `block` in x, y and z, one pointer an argument, blocks and threads in `order`.
pub fn run(
    kernel: &str,
    grid: [usize; 3],
    block: [usize; 3],
    shared: usize,
    mut arguments: Vec<*mut c_void>,
    order: c_uint,
) {
    let library = library().expect("a launch has a compiler");
    let launch = library
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let name = CString::new(kernel).unwrap();
    let (grid, block) = (grid.map(|n| n as c_uint), block.map(|n| n as c_uint));
    // SAFETY: the arguments are those of the kernel, as each caller writes them.
    let status = unsafe {
        launch(
            name.as_ptr(),
            &grid,
            &block,
            shared,
            arguments.as_mut_ptr(),
            order,
        )
    };
    assert_eq!(status, 0, "{kernel}: 1: unknown, 2: too many threads");
}

/// The file of a kernel, without its extension.
pub fn source_of(kernel: &str) -> Option<&'static str> {
    static SOURCES: OnceLock<HashMap<String, String>> = OnceLock::new();
    let find = || {
        let of = |path: PathBuf| {
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            let kernels = kernels_of(&std::fs::read_to_string(path).unwrap());
            kernels
                .into_iter()
                .map(move |(name, _)| (name, stem.clone()))
        };
        sources().into_iter().flat_map(of).collect()
    };
    SOURCES.get_or_init(find).get(kernel).map(String::as_str)
}

//! Compiles the CUDA kernels beside the ops to PTX, with the feature `cuda` alone.

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=src/ops");
    let folder = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // Compute capability 8.0, which the driver of every GPU from Ampere on compiles for its own.
    cudaforge::KernelBuilder::new()
        .source_glob("src/ops/**/*.cu")
        .with_compute_override("*.cu", 80)
        .args(["-std=c++17", "-O3"])
        .build_ptx()?
        .write(folder.join("ptx.rs"))?;
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}

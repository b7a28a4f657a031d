//! Where tests find real models and data, and how they say that these are absent.

use std::path::{Path, PathBuf};

/// The folder of real pretrained models and data, or `None` with a visible line that names the skipped test.
pub fn assets(test: &str) -> Option<PathBuf> {
    let folder = match std::env::var_os("WATTUNE_ASSETS") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets"),
    };
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: {test} needs the assets folder (set WATTUNE_ASSETS)");
    None
}

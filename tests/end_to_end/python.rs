//! The Python package, where a Python with transformers is named: `WATTUNE_PYTHON=python3 cargo test --test end_to_end python`.

use std::path::Path;
use std::process::Command;

#[test]
fn the_callback_stops_a_trainer_before_its_budget() {
    let Some(python) = std::env::var_os("WATTUNE_PYTHON") else {
        eprintln!(
            "skipped: the_callback_stops_a_trainer_before_its_budget needs a Python with transformers (set WATTUNE_PYTHON)"
        );
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(python)
        .arg(root.join("tests/python/test_energy_budget.py"))
        .env("PYTHONPATH", root.join("src/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("WATTUNE_BINARY", env!("CARGO_BIN_EXE_wattune"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

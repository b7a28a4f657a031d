//! `plan --probe` from a configuration alone, and `calibrate`: through the program, as a person types them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use wattune::energy::Profile;
use wattune::model::{Architecture, ModelShape, Recompute};
use wattune::ops::adamw_cost;
use wattune::work::Precision;

/// A decoder small enough for milliseconds: one head group, tied embedding, a vocabulary of 96.
const CONFIG: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
    "tie_word_embeddings": true}"#;

/// Sizes of a step: three rows of 16 tokens in each of two micro-batches.
const RECIPE: &str = "[model]\nid = \"./model\"\n[adapter]\nr = 4\n[data]\ntrain = \"not-there.jsonl\"\nmax_length = 16\n\
    [train]\nsteps = 10\nmicro_batch_size = 3\ngradient_accumulation_steps = 2\n";

/// A folder with a recipe and a model directory that holds config.json alone.
fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("model")).unwrap();
    std::fs::write(dir.path().join("model/config.json"), CONFIG).unwrap();
    let recipe = dir.path().join("recipe.toml");
    std::fs::write(&recipe, RECIPE).unwrap();
    (dir, recipe)
}

fn wattune(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wattune"))
        .args(arguments)
        .output()
        .unwrap()
}

/// The document of a command that must succeed.
fn json(arguments: &[&str]) -> Value {
    let output = wattune(&[arguments, &["--json", "--quiet"]].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Exit status and error of a command that must be refused.
fn refused(arguments: &[&str]) -> String {
    let output = wattune(arguments);
    assert_eq!(
        output.status.code(),
        Some(2),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    String::from_utf8(output.stderr).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn number(value: &Value, pointer: &str) -> f64 {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or_else(|| panic!("no number at {pointer} in {value}"))
}

/// FLOPs of one step of `RECIPE`, every weight trained: counted from the architecture, not executed.
fn counted(precision: Precision) -> u64 {
    let architecture = Architecture::from_config(&serde_json::from_str(CONFIG).unwrap()).unwrap();
    let shape = ModelShape::fully_trained(&architecture, precision);
    let step = shape.training(&[16, 16, 16], 45, Recompute::NONE).times(2)
        + adamw_cost(architecture.parameters() as usize);
    step.flops()
}

#[test]
fn a_configuration_alone_is_enough_and_the_figures_fit_together() {
    let (_dir, recipe) = folder();
    let plan = json(&["plan", path(&recipe), "--probe", "3"]);
    // Linear layers of a block, (out, in): q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48; r (in + out) each.
    // 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80) * 2 blocks = 3712.
    assert_eq!(plan["adapter"]["trainable_parameters"], 3712);
    // Embedding 96*32; a block 2*32*32 + 2*16*32 + 3*48*32 + two norms of 32 = 7744; the last norm.
    assert_eq!(plan["model"]["parameters"], 96 * 32 + 2 * 7744 + 32);
    assert!(plan["memory"]["peak_bytes"].as_u64().unwrap() > 0);
    let keys: Vec<&String> = plan["probe"].as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "steps",
            "tokens_per_second",
            "step_s",
            "peak_rss_bytes",
            "flops_per_second",
            "step_j",
            "device",
            "all_steps_j"
        ]
    );
    // Counted for the detected device.
    assert!(number(&plan, "/probe/step_j") > 0.0 && plan["probe"]["device"].is_string());
    assert_eq!(plan["probe"]["steps"], 3);
    // Two micro-batches of three rows of 16 tokens.
    let (step, speed) = (
        number(&plan, "/probe/step_s"),
        number(&plan, "/probe/tokens_per_second"),
    );
    assert!((step * speed - 96.0).abs() < 1e-6, "{step} {speed}");
    let warnings = plan["warnings"].to_string();
    assert!(
        warnings.contains("no tokenizer") && warnings.contains("not-there.jsonl"),
        "{warnings}"
    );
    assert!(plan.get("forecast").is_none() && plan.get("data").is_none());
}

#[test]
fn what_a_probe_executes_is_what_a_step_is_counted_at() {
    let (_dir, recipe) = folder();
    std::fs::write(&recipe, RECIPE.replace("r = 4", "type = \"none\"")).unwrap();
    for (dtype, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
        let dtype = format!("model.dtype={dtype}");
        let plan = json(&["plan", path(&recipe), "--probe", "1", "--set", &dtype]);
        let executed = number(&plan, "/probe/flops_per_second") * number(&plan, "/probe/step_s");
        assert!(
            (executed / counted(precision) as f64 - 1.0).abs() < 1e-9,
            "{executed}"
        );
        assert_eq!(
            plan["adapter"]["trainable_parameters"],
            plan["model"]["parameters"]
        );
    }
}

#[test]
fn frozen_weights_lie_in_memory_once() {
    // 32,768 x 1024 tied embedding and one thin block: 33.6 M parameters, 134 MB in f32. One row of two tokens: only
    // one chunk of logits and the program itself weigh beside it (54 MB measured). Weights kept twice would pass the bound.
    let (dir, recipe) = folder();
    let config = CONFIG
        .replace("\"hidden_size\": 32", "\"hidden_size\": 1024")
        .replace("\"vocab_size\": 96", "\"vocab_size\": 32768");
    std::fs::write(
        dir.path().join("model/config.json"),
        config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
    )
    .unwrap();
    let small = [
        "--set",
        "data.max_length=2",
        "--set",
        "train.micro_batch_size=1",
        "--set",
        "adapter.target_modules=[\"v_proj\"]",
    ];
    let plan = json(&[&["plan", path(&recipe), "--probe", "1"], small.as_slice()].concat());
    let Some(peak) = plan["probe"]["peak_rss_bytes"].as_u64() else {
        assert_ne!(
            std::env::consts::OS,
            "linux",
            "Linux says how much memory a process took"
        );
        return;
    };
    assert!(peak < 134_000_000 + 110_000_000, "{peak}");
}

#[test]
fn a_whole_plan_gains_a_probe() {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart.toml");
    let small = [
        "--set",
        "data.max_length=64",
        "--set",
        "train.micro_batch_size=1",
    ];
    let plain = json(&[&["plan", path(&recipe)], small.as_slice()].concat());
    let probed = json(&[&["plan", path(&recipe), "--probe", "1"], small.as_slice()].concat());
    assert_eq!(plain["forecast"], probed["forecast"]);
    assert_eq!(plain["energy"], probed["energy"]);
    assert!(plain.get("probe").is_none() && number(&probed, "/probe/tokens_per_second") > 0.0);
    let page = wattune(&[&["plan", path(&recipe), "--probe", "1"], small.as_slice()].concat());
    let page = String::from_utf8(page.stdout).unwrap();
    assert!(
        page.contains("tokens/s") && page.contains("energy"),
        "{page}"
    );
}

#[test]
fn what_cannot_be_probed_is_refused_before_it_runs() {
    let (dir, recipe) = folder();
    let plan = |more: &[&str]| refused(&[&["plan", path(&recipe), "--probe", "1"], more].concat());
    assert!(refused(&["plan", path(&recipe), "--probe", "0"]).contains("--probe"));
    assert!(plan(&["--set", "data.max_length=65"]).contains("max_position_embeddings"));
    assert!(plan(&["--set", "model.dtype=f16"]).contains("bf16"));
    assert!(plan(&["--set", "train.micro_batch_size=100000000"]).contains("memory"));
    // Without a probe nothing is left out: a plan needs the tokenizer.
    refused(&["plan", path(&recipe)]);
    std::fs::remove_file(dir.path().join("model/config.json")).unwrap();
    assert!(plan(&[]).contains("config.json"));
}

#[test]
fn a_calibrated_profile_is_one_that_recipes_take() {
    let (dir, recipe) = folder();
    let out = dir.path().join("mine.toml");
    let arguments = [
        "calibrate",
        "--out",
        path(&out),
        "--name",
        "mine",
        "--like",
        "generic-cpu",
        "--device",
        "cpu",
        "--each",
        "20 ms",
    ];
    let found = json(&arguments);
    check_profile(&found, &Profile::from_file(&out).unwrap());
    assert!(refused(&arguments).contains("exists already"));
    let device = [
        "--set",
        "energy.device=./mine.toml",
        "--set",
        "model.id=embedded:tiny",
        "--set",
        "data.max_length=64",
        "--set",
    ];
    let data = format!(
        "data.train={}/recipes/quickstart/train.jsonl",
        env!("CARGO_MANIFEST_DIR")
    );
    let plan = json(
        &[
            &["plan", path(&recipe)],
            device.as_slice(),
            &[data.as_str()],
        ]
        .concat(),
    );
    assert_eq!(plan["energy"]["device"], "mine");
}

/// The calibrated profile holds the measured figures of `calibrate --json`, and the nearest profile's others.
fn check_profile(found: &Value, profile: &Profile) {
    let nearest = Profile::named("generic-cpu").unwrap();
    assert_eq!(
        (found["name"].as_str(), found["nearest"].as_str()),
        (Some("mine"), Some("generic-cpu"))
    );
    // What was measured is what a run is charged by; what was not stays.
    assert_eq!(
        profile.rate(Precision::F32),
        number(found, "/flops_per_second/f32/measured")
    );
    assert_eq!(
        profile.rate(Precision::Bf16),
        number(found, "/flops_per_second/bf16/measured")
    );
    assert_eq!(
        profile.bandwidth * profile.achievable_bandwidth,
        number(found, "/bytes_per_second/measured")
    );
    let caches = found["caches"].as_array().unwrap();
    for ((level, before), cache) in profile.caches.iter().zip(&nearest.caches).zip(caches) {
        assert_eq!(
            (level.name.as_str(), level.bandwidth),
            (
                cache["name"].as_str().unwrap(),
                cache["bytes_per_second"].as_f64()
            )
        );
        assert_eq!(
            (&level.name, level.shared, level.pj_per_byte),
            (&before.name, before.shared, before.pj_per_byte)
        );
        assert!(
            level.bytes.0 == cache["bytes"].as_u64().unwrap_or(before.bytes.0) || level.shared,
            "{cache}"
        );
    }
    assert_eq!(
        (profile.dram_pj_per_byte, profile.caches.len()),
        (nearest.dram_pj_per_byte, caches.len())
    );
    // Between a slow single core and any one machine's best.
    assert!(
        (1e7..1e15).contains(&profile.rate(Precision::F32)),
        "{}",
        profile.rate(Precision::F32)
    );
}

#[test]
fn a_calibration_that_could_not_be_used_is_refused_before_it_measures() {
    assert!(refused(&["calibrate", "--out", "profile.txt"]).contains(".toml"));
    assert!(refused(&["calibrate", "--name", "My Machine"]).contains("--name"));
    assert!(refused(&["calibrate", "--like", "nvidia-h100"]).contains("nvidia-h100-sxm5-80gb"));
    assert!(refused(&["calibrate", "--each", "10 min"]).contains("--each"));
}

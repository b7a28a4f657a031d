//! Adapters against PEFT: module selection, real files, round trips, merging.
//!
//! Expected values come from scripts/peft_targets.py, which asks PEFT itself.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use wattune::adapter::config::{OneOrMany, PeftConfig};
use wattune::adapter::targets::{Module, Site, select, shortest_names};
use wattune::adapter::unsupported::Factor;
use wattune::adapter::{LoraConfig, LoraPair, MergeJob, Targets, load, merge, peft, save};
use wattune::error::Kind;
use wattune::units::Bytes;

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The folder of real models and adapters, or a visible note that `test` is skipped.
fn assets(test: &str) -> Option<PathBuf> {
    let root = std::env::var_os("WATTUNE_ASSETS").map_or(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets"),
        PathBuf::from,
    );
    if root.join("adapters").is_dir() {
        return Some(root);
    }
    eprintln!("skipped: {test} needs {}", root.join("adapters").display());
    None
}

fn modules(list: &Value) -> Vec<Module> {
    let one = |entry: &Value| Module {
        path: entry[0].as_str().unwrap().into(),
        out_features: entry[1].as_u64().unwrap() as usize,
        in_features: entry[2].as_u64().unwrap() as usize,
    };
    list.as_array().unwrap().iter().map(one).collect()
}

/// LoraConfig's keywords as settings; the scripts' defaults are r = 8, lora_alpha = 16.
fn settings(keywords: &Value) -> LoraConfig {
    let mut object = keywords.as_object().unwrap().clone();
    object.entry("r").or_insert(8.into());
    object.entry("lora_alpha").or_insert(16.into());
    PeftConfig::parse(&Value::Object(object).to_string(), Path::new("keywords"))
        .unwrap()
        .settings()
}

/// Settings that PEFT accepts because a part of them matches.
const STRICTER: [&str; 2] = [
    "a name that matches nothing, beside one that does",
    "rank pattern that matches nothing, beside one that does",
];

#[test]
fn modules_are_chosen_as_peft_chooses_them() {
    let golden = golden("peft_targets.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 35);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let modules = modules(&golden["modules"][case["model"].as_str().unwrap()]);
        let got = select(&modules, "lm_head", &settings(&case["settings"]));
        if case.get("error").is_some() || STRICTER.contains(&name) {
            assert_eq!(got.expect_err(name).kind(), Kind::Adapter);
            continue;
        }
        let sites = got.unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected: Vec<(&str, u64, f64)> = case["sites"]
            .as_array()
            .unwrap()
            .iter()
            .map(|site| {
                (
                    modules[site[0].as_u64().unwrap() as usize].path.as_str(),
                    site[1].as_u64().unwrap(),
                    site[2].as_f64().unwrap(),
                )
            })
            .collect();
        let found: Vec<(&str, u64, f64)> = sites
            .iter()
            .map(|site| (site.path.as_str(), site.r as u64, site.scaling))
            .collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn all_linear_is_shortened_as_peft_shortens_it() {
    let golden = golden("peft_targets.json");
    let case = golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .find(|case| case["name"] == "all-linear")
        .unwrap();
    let modules = modules(&golden["modules"]["llama"]);
    let sites = select(&modules, "lm_head", &settings(&case["settings"])).unwrap();
    let paths: Vec<&str> = sites.iter().map(|site| site.path.as_str()).collect();
    let names = shortest_names(&modules, &paths);
    assert_eq!(
        names,
        [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj"
        ]
    );
    let mut sorted = names;
    sorted.sort();
    assert_eq!(Value::from(sorted), case["saved_targets"]);
}

/// What is saved means the same modules when PEFT's rules read it back.
#[test]
fn saved_configurations_mean_the_same_sites() {
    let golden = golden("peft_targets.json");
    for case in golden["cases"].as_array().unwrap() {
        let modules = modules(&golden["modules"][case["model"].as_str().unwrap()]);
        let Ok(sites) = select(&modules, "lm_head", &settings(&case["settings"])) else {
            continue;
        };
        let config =
            PeftConfig::for_sites(&settings(&case["settings"]), &sites, &modules, "base", None)
                .unwrap();
        let reread = PeftConfig::parse(&config.to_text(), Path::new("x")).unwrap();
        assert_eq!(
            select(&modules, "lm_head", &reread.settings()).unwrap(),
            sites,
            "{}",
            case["name"]
        );
    }
}

#[test]
fn a_wrong_name_is_answered_with_the_right_ones() {
    let modules = modules(&golden("peft_targets.json")["modules"]["llama"]);
    let wrong = settings(&serde_json::json!({
        "target_modules": ["q_proj", "qproj"], "exclude_modules": ["lm_head", "embed_tokens"],
        "rank_pattern": {"upproj": 2}, "alpha_pattern": {"x\\..*": 2}, "layers_to_transform": [0, 12],
    }));
    let text = select(&modules, "lm_head", &wrong).unwrap_err().to_string();
    for dead in [
        "`qproj` of `target_modules`",
        "`embed_tokens` of `exclude_modules`",
        "`upproj` of `rank_pattern`",
    ] {
        assert!(text.contains(dead), "{text}");
    }
    assert!(
        text.contains("`x\\..*` of `alpha_pattern`")
            && text.contains("`12` of `layers_to_transform`"),
        "{text}"
    );
    assert!(
        text.contains("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"),
        "{text}"
    );
    assert!(
        text.contains("hint: `q_proj` is nearest to `qproj`"),
        "{text}"
    );
    assert!(
        !text.contains("`q_proj` of") && !text.contains("`lm_head` of"),
        "{text}"
    );
}

#[test]
fn illegal_values_are_refused() {
    let modules = modules(&golden("peft_targets.json")["modules"]["llama"]);
    for (keywords, word) in [
        (
            serde_json::json!({"target_modules": ["q_proj"], "r": 0}),
            "`r`",
        ),
        (
            serde_json::json!({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}}),
            "rank_pattern",
        ),
        (
            serde_json::json!({"target_modules": ["q_proj"], "lora_alpha": 0}),
            "lora_alpha",
        ),
        (
            serde_json::json!({"target_modules": ["q_proj"], "lora_dropout": 1.0}),
            "lora_dropout",
        ),
        (
            serde_json::json!({"target_modules": "(q_proj"}),
            "regular expression",
        ),
        (
            serde_json::json!({"target_modules": []}),
            "no linear layer is left",
        ),
    ] {
        let text = select(&modules, "lm_head", &settings(&keywords))
            .unwrap_err()
            .to_string();
        assert!(text.contains(word), "{text}");
    }
}

// ---- files ----

/// Two layers with one LoRA target each.
fn tiny_modules() -> Vec<Module> {
    let one = |path: &str, out_features, in_features| Module {
        path: path.into(),
        out_features,
        in_features,
    };
    vec![
        one("model.layers.0.q_proj", 3, 2),
        one("model.layers.1.q_proj", 3, 2),
        one("lm_head", 5, 2),
    ]
}

fn tiny_settings() -> LoraConfig {
    settings(
        &serde_json::json!({"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], "rank_pattern": {"1.q_proj": 2}}),
    )
}

fn tiny_sites() -> Vec<Site> {
    select(&tiny_modules(), "lm_head", &tiny_settings()).unwrap()
}

/// (name, shape, values) of every matrix of `tiny_sites`, with values 0.5, 1.0, 1.5, ...
fn tiny_tensors() -> Vec<(String, [usize; 2], Vec<f32>)> {
    let mut tensors = Vec::new();
    for site in tiny_sites() {
        for (half, shape) in [
            (Factor::B, [site.out_features, site.r]),
            (Factor::A, [site.r, site.in_features]),
        ] {
            let values = (1..=shape[0] * shape[1]).map(|i| i as f32 / 2.0).collect();
            tensors.push((peft::tensor_name(&site.path, half), shape, values));
        }
    }
    tensors
}

fn tiny_config() -> PeftConfig {
    PeftConfig::for_sites(
        &tiny_settings(),
        &tiny_sites(),
        &tiny_modules(),
        "tiny/base",
        Some("main"),
    )
    .unwrap()
}

fn save_tiny(dir: &Path, config: &PeftConfig, tensors: &[(String, [usize; 2], Vec<f32>)]) {
    let borrowed: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| (name.clone(), *shape, values.as_slice()))
        .collect();
    save(dir, config, &borrowed).unwrap();
}

#[test]
fn an_adapter_survives_a_round_trip_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("deeper/two"));
    let mut tensors = tiny_tensors();
    save_tiny(&one, &tiny_config(), &tensors);
    tensors.reverse();
    save_tiny(&two, &tiny_config(), &tensors);
    for file in [peft::WEIGHTS_FILE, "adapter_config.json"] {
        assert_eq!(
            fs::read(one.join(file)).unwrap(),
            fs::read(two.join(file)).unwrap(),
            "{file}"
        );
    }
    assert_eq!(fs::read_dir(&one).unwrap().count(), 2);

    let loaded = load(&one).unwrap();
    assert_eq!(loaded.config, tiny_config());
    let fitted = loaded.attach(&tiny_modules()).unwrap();
    assert_eq!(
        fitted
            .iter()
            .map(|pair| pair.site.clone())
            .collect::<Vec<_>>(),
        tiny_sites()
    );
    assert_eq!(fitted[0].a, [0.5, 1.0]);
    assert_eq!(fitted[1].b, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]);

    // The file is what the format asks for: names sorted, marked as PyTorch's.
    let bytes = fs::read(one.join(peft::WEIGHTS_FILE)).unwrap();
    let header = std::str::from_utf8(
        &bytes[8..8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize],
    )
    .unwrap();
    let header: serde_json::Map<String, Value> = serde_json::from_str(header).unwrap();
    assert_eq!(header["__metadata__"], serde_json::json!({"format": "pt"}));
    let names: Vec<&String> = header.keys().filter(|key| *key != "__metadata__").collect();
    assert!(names.is_sorted() && names.len() == 4, "{names:?}");
}

#[test]
fn half_precision_is_read() {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(dir.path(), &tiny_config(), &tiny_tensors());
    let original = load(dir.path()).unwrap();
    for (dtype, encode) in [
        (
            safetensors::Dtype::F16,
            (|v| half::f16::from_f32(v).to_le_bytes()) as fn(f32) -> [u8; 2],
        ),
        (safetensors::Dtype::BF16, |v| {
            half::bf16::from_f32(v).to_le_bytes()
        }),
    ] {
        let encoded: Vec<(String, [usize; 2], Vec<u8>)> = tiny_tensors()
            .into_iter()
            .map(|(name, shape, values)| {
                (name, shape, values.into_iter().flat_map(encode).collect())
            })
            .collect();
        let views = encoded.iter().map(|(name, shape, bytes)| {
            (
                name,
                safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap(),
            )
        });
        fs::write(
            dir.path().join(peft::WEIGHTS_FILE),
            safetensors::serialize(views, None).unwrap(),
        )
        .unwrap();
        // Halves up to 3.0 are exact in both types.
        assert_eq!(load(dir.path()).unwrap(), original);
    }
}

#[test]
fn broken_pairs_are_refused_together() {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = tiny_tensors();
    // Layer 0 loses its A; layer 1, of rank 2, has matrices of rank 1.
    tensors.retain(|(name, ..)| !name.contains("layers.0.q_proj.lora_A"));
    for (name, shape, values) in &mut tensors {
        if name.contains("layers.1.q_proj.lora_B") {
            (*shape, *values) = ([3, 1], vec![1.0; 3]);
        } else if name.contains("layers.1.q_proj.lora_A") {
            (*shape, *values) = ([1, 2], vec![1.0; 2]);
        }
    }
    save_tiny(dir.path(), &tiny_config(), &tensors);
    let text = load(dir.path()).unwrap_err().to_string();
    assert!(
        text.contains("layers.0.q_proj.lora_A.weight` is missing"),
        "{text}"
    );
    assert!(
        text.contains("its shape is [1, 2]") && text.contains("rank 2, so 2 rows"),
        "{text}"
    );
    assert!(
        text.contains("its shape is [3, 1]") && text.contains("rank 2, so 2 columns"),
        "{text}"
    );

    let mut tensors = tiny_tensors();
    tensors[0].2[0] = f32::NAN;
    save_tiny(dir.path(), &tiny_config(), &tensors);
    assert!(
        load(dir.path())
            .unwrap_err()
            .to_string()
            .contains("holds NaN")
    );
}

#[test]
fn an_adapter_of_another_model_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(dir.path(), &tiny_config(), &tiny_tensors());
    let loaded = load(dir.path()).unwrap();
    let mut others = tiny_modules();
    others[0].path = "model.language.layers.0.q_proj".into();
    others[1].in_features = 7;
    let text = loaded.attach(&others).unwrap_err().to_string();
    assert!(
        text.contains(
            "no linear layer `model.layers.0.q_proj`; nearest is `model.language.layers.0.q_proj`"
        ),
        "{text}"
    );
    assert!(
        text.contains("2 columns, but the module has 7 inputs") && text.contains("tiny/base"),
        "{text}"
    );
    // A deeper model: its third layer is named by the list but has no tensor.
    let mut deeper = tiny_modules();
    deeper.push(Module {
        path: "model.layers.2.q_proj".into(),
        out_features: 3,
        in_features: 2,
    });
    let text = loaded.attach(&deeper).unwrap_err().to_string();
    assert!(
        text.contains("`model.layers.2.q_proj`: `adapter_config.json` names this module"),
        "{text}"
    );
}

#[test]
fn missing_files_are_answered_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(&dir.path().join("inner"), &tiny_config(), &tiny_tensors());
    assert!(
        load(dir.path())
            .unwrap_err()
            .remedy()
            .unwrap()
            .contains("inner")
    );
    let inner = dir.path().join("inner");
    fs::rename(
        inner.join(peft::WEIGHTS_FILE),
        inner.join("adapter_model.bin"),
    )
    .unwrap();
    assert!(
        load(&inner)
            .unwrap_err()
            .remedy()
            .unwrap()
            .contains("save_file")
    );
    fs::write(inner.join(peft::WEIGHTS_FILE), b"\x05\0\0\0\0\0\0\0{}").unwrap();
    assert!(load(&inner).unwrap_err().to_string().contains("damaged"));
}

#[test]
fn real_gpt2_adapter_is_refused_by_name() {
    let Some(assets) = assets("real_gpt2_adapter_is_refused_by_name") else {
        return;
    };
    let error = load(&assets.join("adapters/peft-gpt2-lora")).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), Kind::Adapter);
    assert!(
        text.contains("`fan_in_fan_out` is true")
            && text.contains("`base_model.model.score.weight`"),
        "{text}"
    );
    assert!(text.contains("SEQ_CLS"), "{text}");
}

#[test]
fn real_configuration_is_read() {
    let Some(assets) = assets("real_configuration_is_read") else {
        return;
    };
    let path =
        assets.join("adapters/config_only/peft0.19.1_qwen2.5-1.5b_alllinear_adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    let config = PeftConfig::parse(&text, &path).unwrap();
    let Some(OneOrMany::Many(names)) = &config.target_modules else {
        panic!("{config:?}")
    };
    assert_eq!((names.len(), config.r, config.lora_dropout), (7, 16, 0.05));
    assert_eq!(config.layers_to_transform, None::<OneOrMany<usize>>);
    assert_eq!(
        config.settings().target_modules,
        Targets::Names(names.clone())
    );
    // Written again it is the same but for the fields that PEFT has gained since 0.19.
    let mut again: serde_json::Map<String, Value> =
        serde_json::from_str(&config.to_text()).unwrap();
    for gained in ["kasa_config", "monteclora_config", "velora_config"] {
        assert_eq!(again.remove(gained), Some(Value::Null));
    }
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap(),
        Value::Object(again)
    );
}

// ---- merging ----

type Encode = fn(f32) -> Vec<u8>;

/// The three types a weight may have, how each is written, and its unit roundoff.
const TYPES: [(&str, safetensors::Dtype, Encode, f32); 3] = [
    (
        "float32",
        safetensors::Dtype::F32,
        |v| v.to_le_bytes().to_vec(),
        f32::EPSILON,
    ),
    (
        "bfloat16",
        safetensors::Dtype::BF16,
        |v| half::bf16::from_f32(v).to_le_bytes().to_vec(),
        1.0 / 256.0,
    ),
    (
        "float16",
        safetensors::Dtype::F16,
        |v| half::f16::from_f32(v).to_le_bytes().to_vec(),
        1.0 / 2048.0,
    ),
];

fn decode(view: &safetensors::tensor::TensorView) -> Vec<f32> {
    let pairs = || view.data().chunks(2).map(|b| [b[0], b[1]]);
    match view.dtype() {
        safetensors::Dtype::F32 => view
            .data()
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
        safetensors::Dtype::F16 => pairs()
            .map(|b| half::f16::from_le_bytes(b).to_f32())
            .collect(),
        safetensors::Dtype::BF16 => pairs()
            .map(|b| half::bf16::from_le_bytes(b).to_f32())
            .collect(),
        other => panic!("{other:?}"),
    }
}

fn write_model(path: &Path, tensors: &[(&str, safetensors::Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (
            *name,
            safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
        )
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn floats(values: &[f32], encode: Encode) -> Vec<u8> {
    values.iter().flat_map(|v| encode(*v)).collect()
}

fn matrix(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap())
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

fn pair<'a>(
    path: &str,
    out_features: usize,
    in_features: usize,
    a: &'a [f32],
    b: &'a [f32],
    scaling: f64,
) -> LoraPair<'a> {
    let r = a.len() / in_features;
    LoraPair {
        site: Site {
            path: path.into(),
            in_features,
            out_features,
            r,
            lora_alpha: scaling * r as f64,
            scaling,
        },
        a,
        b,
    }
}

#[test]
fn merging_equals_pefts_merge_and_unload() {
    let golden = golden("peft_merge.json");
    for (name, dtype, encode, roundoff) in TYPES {
        let case = &golden[name];
        let (w, a, b) = (matrix(&case["w"]), matrix(&case["a"]), matrix(&case["b"]));
        let expected = matrix(&case["merged"]);
        let (rows, columns) = (8, 16);
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model.safetensors");
        write_model(
            &model,
            &[(
                "model.layers.0.self_attn.k_proj.weight",
                dtype,
                vec![rows, columns],
                floats(&w, encode),
            )],
        );
        let pairs = [pair(
            "model.layers.0.self_attn.k_proj",
            rows,
            columns,
            &a,
            &b,
            case["scaling"].as_f64().unwrap(),
        )];
        let out = dir.path().join("merged");
        let job = MergeJob {
            weights: &[model],
            pairs: &pairs,
            tied: &[],
            copy: &[],
            out: &out,
            max_shard: Bytes(1 << 20),
        };
        merge(&job).unwrap();
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = file
            .tensor("model.layers.0.self_attn.k_proj.weight")
            .unwrap();
        assert_eq!(view.dtype(), dtype);
        let merged = decode(&view);
        assert!(
            w.iter().zip(&merged).any(|(w, m)| (w - m).abs() > 0.05),
            "{name}: nothing was merged"
        );
        // Sums of three products in another order: equal in f32 to a few last places. A 16-bit result then differs by one place
        // where the sum lies on the border of two values (1 of 128 here; rounding B A first, too, would change 45).
        let mut moved = 0;
        for (found, expected) in merged.iter().zip(&expected) {
            let apart = (found - expected).abs();
            if name == "float32" {
                assert!(apart <= 4.0 * f32::EPSILON, "{found} {expected}");
            } else if apart > 0.0 {
                assert!(
                    apart <= expected.abs() * 2.0 * roundoff,
                    "{name}: {found} {expected}"
                );
                moved += 1;
            }
        }
        assert!(moved <= 2, "{name}: {moved} values differ");
    }
}

/// Two files, two layers, an integer tensor; the adapter touches layer 1 only. Returns the weights' paths.
fn sharded_model(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let encode = TYPES[0].2;
    let [one, two] = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    .map(|name| dir.join(name));
    let name = |rest: &str| format!("{prefix}{rest}");
    let layer = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    write_model(
        &one,
        &[
            (
                &name("embed_tokens.weight"),
                TYPES[1].1,
                vec![5, 2],
                floats(&[0.1; 10], TYPES[1].2),
            ),
            (
                &name("layers.0.q_proj.weight"),
                TYPES[0].1,
                vec![3, 2],
                floats(&layer, encode),
            ),
        ],
    );
    write_model(
        &two,
        &[
            (
                &name("layers.1.q_proj.weight"),
                TYPES[0].1,
                vec![3, 2],
                floats(&layer, encode),
            ),
            (
                &name("position_ids"),
                safetensors::Dtype::I64,
                vec![2],
                vec![7; 16],
            ),
        ],
    );
    fs::write(dir.join("config.json"), "{}").unwrap();
    vec![one, two]
}

/// rank 2: B A of row i is b_i0 * (1, 2) + b_i1 * (10, 20).
const A: [f32; 4] = [1.0, 2.0, 10.0, 20.0];
const B: [f32; 6] = [1.0, 0.0, 0.0, 1.0, -1.0, 1.0];

#[test]
fn a_sharded_model_is_merged_by_hand() {
    for prefix in ["model.", ""] {
        let dir = tempfile::tempdir().unwrap();
        let weights = sharded_model(dir.path(), prefix);
        let pairs = [pair("model.layers.1.q_proj", 3, 2, &A, &B, 0.5)];
        let (out, copy) = (
            dir.path().join("deep/merged"),
            [dir.path().join("config.json")],
        );
        // 20 + 24 bytes fit into 44; the next 24 + 16 make a second file.
        let job = MergeJob {
            weights: &weights,
            pairs: &pairs,
            tied: &[],
            copy: &copy,
            out: &out,
            max_shard: Bytes(44),
        };
        let summary = merge(&job).unwrap();
        assert_eq!(
            summary.files,
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors"
            ]
        );
        assert_eq!(
            (summary.merged, summary.kept, summary.size),
            (1, 3, Bytes(84))
        );
        assert_eq!(fs::read(out.join("config.json")).unwrap(), b"{}");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 4);
        let index: Value = serde_json::from_str(
            &fs::read_to_string(out.join("model.safetensors.index.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(index["metadata"]["total_size"], 84);

        let mut seen = 0;
        for (name, file) in index["weight_map"].as_object().unwrap() {
            let bytes = fs::read(out.join(file.as_str().unwrap())).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let view = tensors.tensor(name).unwrap();
            match name.strip_prefix(prefix).unwrap() {
                // Rows (1,2), (3,4), (5,6) plus half of (1,2), (10,20), (9,18).
                "layers.1.q_proj.weight" => {
                    assert_eq!(decode(&view), [1.5, 3.0, 8.0, 14.0, 9.5, 15.0])
                }
                "layers.0.q_proj.weight" => {
                    assert_eq!(decode(&view), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
                }
                "embed_tokens.weight" => assert_eq!(view.data(), floats(&[0.1; 10], TYPES[1].2)),
                "position_ids" => assert_eq!(view.data(), [7; 16]),
                other => panic!("{other}"),
            }
            seen += 1;
        }
        assert_eq!(seen, 4);
    }
}

#[test]
fn a_merge_that_cannot_be_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let weights = sharded_model(dir.path(), "model.");
    let before = fs::read_dir(dir.path()).unwrap().count();
    let out = dir.path().join("merged");
    let tied = [[
        "lm_head.weight".to_string(),
        "model.embed_tokens.weight".to_string(),
    ]];
    let attempt = |pairs: &[LoraPair], copy: &[PathBuf], out: &Path| {
        let job = MergeJob {
            weights: &weights,
            pairs,
            tied: &tied,
            copy,
            out,
            max_shard: Bytes(1 << 20),
        };
        merge(&job).unwrap_err().to_string()
    };
    let fits = pair("model.layers.1.q_proj", 3, 2, &A, &B, 0.5);

    let wide = [0.0; 10];
    let wrong = [
        pair("lm_head", 5, 2, &A, &wide, 1.0),
        pair("model.layers.9.q_proj", 3, 2, &A, &B, 1.0),
        pair("model.layers.0.q_proj", 2, 3, &B, &A, 1.0),
    ];
    let text = attempt(&wrong, &[], &out);
    assert!(
        text.contains("`lm_head.weight` and `model.embed_tokens.weight` are one tensor"),
        "{text}"
    );
    assert!(
        text.contains("no `model.layers.9.q_proj.weight`") && text.contains("[3, 2], not [2, 3]"),
        "{text}"
    );

    let text = attempt(
        std::slice::from_ref(&fits),
        &[dir.path().join("absent.json")],
        &out,
    );
    assert!(text.contains("absent.json"), "{text}");
    assert!(attempt(std::slice::from_ref(&fits), &weights, &out).contains("written anew"));
    let huge = [f32::MAX; 4];
    assert!(
        attempt(
            &[pair("model.layers.1.q_proj", 3, 2, &huge, &B, 2.0)],
            &[],
            &out
        )
        .contains("holds a value that F32 cannot")
    );
    assert!(attempt(std::slice::from_ref(&fits), &[], dir.path()).contains("exists already"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before);
}

//! Merging into safetensors files: PEFT's results, shards, refusals.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;
use wattune::adapter::peft::StoredValues;
use wattune::adapter::targets::{ModuleKind, Site};
use wattune::adapter::{
    Adaptation, LoadedAdapter, MergeJob, MergeWeights, ModelLayout, Part, PeftConfig, merge,
};
use wattune::error::{Error, Kind};
use wattune::units::Bytes;

use super::golden;

type Encode = fn(f64) -> Vec<u8>;

/// The types a weight may have, how each is written, and its unit roundoff.
const TYPES: [(&str, Dtype, Encode, f64); 4] = [
    (
        "float32",
        Dtype::F32,
        |v| (v as f32).to_le_bytes().to_vec(),
        f32::EPSILON as f64,
    ),
    (
        "bfloat16",
        Dtype::BF16,
        |v| half::bf16::from_f64(v).to_le_bytes().to_vec(),
        1.0 / 256.0,
    ),
    (
        "float16",
        Dtype::F16,
        |v| half::f16::from_f64(v).to_le_bytes().to_vec(),
        1.0 / 2048.0,
    ),
    (
        "float64",
        Dtype::F64,
        |v| v.to_le_bytes().to_vec(),
        f64::EPSILON,
    ),
];

fn decode(view: &TensorView) -> Vec<f64> {
    let doubles = view.data().as_chunks().0.iter().copied();
    let words = view.data().as_chunks().0.iter().copied();
    let halves = view.data().as_chunks().0.iter().copied();
    match view.dtype() {
        Dtype::F64 => doubles.map(f64::from_le_bytes).collect(),
        Dtype::F32 => words.map(|b| f32::from_le_bytes(b).into()).collect(),
        Dtype::F16 => halves.map(|b| half::f16::from_le_bytes(b).into()).collect(),
        Dtype::BF16 => halves
            .map(|b| half::bf16::from_le_bytes(b).into())
            .collect(),
        other => panic!("{other:?}"),
    }
}

fn write_model(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (
            *name,
            TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
        )
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn floats(values: &[f64], encode: Encode) -> Vec<u8> {
    values.iter().flat_map(|v| encode(*v)).collect()
}

fn matrix(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|row| row.as_array().unwrap())
        .map(|v| v.as_f64().unwrap())
        .collect()
}

/// LoRA on one layer: its path, sizes [out, in], A, B and scaling.
struct Pair<'a> {
    path: &'a str,
    sizes: [usize; 2],
    a: &'a [f32],
    b: &'a [f32],
    scaling: f64,
}

/// An adapter of these pairs, and what it changes.
fn adapter(pairs: &[Pair]) -> (LoadedAdapter, Adaptation) {
    let mut tensors = BTreeMap::new();
    let mut sites = Vec::new();
    for pair in pairs {
        let [out_features, in_features] = pair.sizes;
        let r = pair.a.len() / in_features;
        let site = Site {
            path: pair.path.into(),
            in_features,
            out_features,
            r,
            lora_alpha: pair.scaling * r as f64,
            scaling: pair.scaling,
            kind: ModuleKind::Linear,
        };
        for (part, values) in [(Part::A, pair.a), (Part::B, pair.b)] {
            let stored = StoredValues {
                shape: part.shape(&site),
                values: values.to_vec(),
            };
            tensors.insert(part.name(pair.path), stored);
        }
        sites.push(site);
    }
    let config = PeftConfig::default();
    let base_embeddings = BTreeMap::new();
    let loaded = LoadedAdapter {
        config,
        tensors,
        base_embeddings,
    };
    (loaded, sites.into())
}

#[test]
fn merging_equals_pefts_merge_and_unload() {
    let golden = golden("peft_merge.json");
    for (name, dtype, encode, roundoff) in TYPES {
        let case = &golden[name];
        let w = matrix(&case["w"]);
        let [a, b] = ["a", "b"].map(|factor| {
            let values = matrix(&case[factor]).into_iter();
            values.map(|value| value as f32).collect::<Vec<_>>()
        });
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
        let (adapter, adaptation) = adapter(&[Pair {
            path: "model.layers.0.self_attn.k_proj",
            sizes: [rows, columns],
            a: &a,
            b: &b,
            scaling: case["scaling"].as_f64().unwrap(),
        }]);
        let out = dir.path().join("merged");
        let job = MergeJob {
            weights: MergeWeights::Files(&[model]),
            stored_names: &BTreeMap::new(),
            layout: &ModelLayout::default(),
            adapter: &adapter,
            adaptation: &adaptation,
            other_head: None,
            other_files: &|_| Ok(()),
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
        let is_f32 = |value: &f64| f64::from(*value as f32) == *value;
        assert_eq!(merged.iter().all(is_f32), dtype != Dtype::F64, "{name}");
        // Sums of three products in another order: equal in f32 to a few last places. A 16-bit result then differs by one place
        // if the sum lies on the border of two values (1 of 128 here; rounding B A first, too, would change 45).
        // The delta is computed in f32 for an F64 weight as well; the weight keeps its digits.
        let mut moved = 0;
        for (found, expected) in merged.iter().zip(&expected) {
            let apart = (found - expected).abs();
            if roundoff <= f64::from(f32::EPSILON) {
                assert!(apart <= 4.0 * f64::from(f32::EPSILON), "{found} {expected}");
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
            (&name("position_ids"), Dtype::I64, vec![2], vec![7; 16]),
        ],
    );
    fs::write(dir.join("config.json"), "{}").unwrap();
    vec![one, two]
}

/// rank 2: B A of row i is b_i0 * (1, 2) + b_i1 * (10, 20).
const A: [f32; 4] = [1.0, 2.0, 10.0, 20.0];
const B: [f32; 6] = [1.0, 0.0, 0.0, 1.0, -1.0, 1.0];

/// A pair on a layer of 3 outputs and 2 inputs.
fn on<'a>(path: &'a str, a: &'a [f32], b: &'a [f32], scaling: f64) -> Pair<'a> {
    Pair {
        path,
        sizes: [3, 2],
        a,
        b,
        scaling,
    }
}

#[test]
fn a_sharded_model_merges_to_values_by_hand() {
    for prefix in ["model.", ""] {
        let dir = tempfile::tempdir().unwrap();
        let weights = sharded_model(dir.path(), prefix);
        let (adapter, adaptation) = adapter(&[on("model.layers.1.q_proj", &A, &B, 0.5)]);
        let out = dir.path().join("deep/merged");
        let other_files = |to: &Path| {
            fs::copy(dir.path().join("config.json"), to.join("config.json")).unwrap();
            Ok(())
        };
        let name = "model.layers.1.q_proj.weight".to_string();
        let stored = name.replacen("model.", prefix, 1);
        let stored_names = BTreeMap::from([(name, stored)]);
        // 20 + 24 bytes fit into 44; the next 24 + 16 make a second file.
        let job = MergeJob {
            weights: MergeWeights::Files(&weights),
            stored_names: &stored_names,
            layout: &ModelLayout::default(),
            adapter: &adapter,
            adaptation: &adaptation,
            other_head: None,
            other_files: &other_files,
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
fn a_refused_merge_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let weights = sharded_model(dir.path(), "model.");
    let before = fs::read_dir(dir.path()).unwrap().count();
    let out = dir.path().join("merged");
    let attempt = |pairs: &[Pair], out: &Path| {
        let (adapter, adaptation) = adapter(pairs);
        let job = MergeJob {
            weights: MergeWeights::Files(&weights),
            stored_names: &BTreeMap::new(),
            layout: &ModelLayout::default(),
            adapter: &adapter,
            adaptation: &adaptation,
            other_head: None,
            other_files: &|_| Err(Error::new(Kind::Io, "absent.json")),
            out,
            max_shard: Bytes(1 << 20),
        };
        merge(&job).unwrap_err().to_string()
    };
    let fits = on("model.layers.1.q_proj", &A, &B, 0.5);

    let wrong = [
        on("model.layers.9.q_proj", &A, &B, 1.0),
        Pair {
            sizes: [2, 3],
            ..on("model.layers.0.q_proj", &B, &A, 1.0)
        },
    ];
    let text = attempt(&wrong, &out);
    assert!(
        text.contains("no `model.layers.9.q_proj.weight`") && text.contains("[3, 2], not [2, 3]"),
        "{text}"
    );

    let fits = std::slice::from_ref(&fits);
    let text = attempt(fits, &out);
    assert!(text.contains("absent.json"), "{text}");
    let huge = [f32::MAX; 4];
    let huge = on("model.layers.1.q_proj", &huge, &B, 2.0);
    assert!(attempt(&[huge], &out).contains("holds a value that F32 cannot"));
    assert!(attempt(fits, dir.path()).contains("exists already"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), before);
}

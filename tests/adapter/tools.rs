//! `adapter::inspect`, `convert` and `diff` on PEFT's files, against dense arithmetic.
//!
//! The adapters of `tests/golden/adapters` are PEFT's own (`scripts/adapter_methods.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use wattune::adapter::portability::Effect;
use wattune::adapter::{Conversion, LoadedAdapter, Part, convert, diff, inspect, load, save};
use wattune::work::Precision;

use super::files::assets;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/adapters")
        .join(case)
}

/// An adapter in a new directory: its configuration's further keys, and pairs (path, r, out, in).
fn adapter(dir: &Path, keys: Value, pairs: &[(&str, usize, usize, usize)]) {
    let mut config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q", "k", "v"], "r": 2, "lora_alpha": 6});
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    let config =
        wattune::adapter::PeftConfig::parse(&config.to_string(), Path::new("keys")).unwrap();
    let mut tensors = Vec::new();
    for (seed, (path, r, out, columns)) in pairs.iter().enumerate() {
        let values = |n: usize, step: f32| -> Vec<f32> {
            (0..n)
                .map(|i| (i as f32 * step + seed as f32).sin())
                .collect()
        };
        tensors.push((
            Part::A.name(path),
            vec![*r, *columns],
            values(r * columns, 0.7),
        ));
        tensors.push((Part::B.name(path), vec![*out, *r], values(r * out, 1.3)));
    }
    let borrowed: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| (name.clone(), shape.clone(), values.as_slice()))
        .collect();
    save(dir, &config, &borrowed).unwrap();
}

const PAIRS: [(&str, usize, usize, usize); 3] =
    [("m.q", 2, 3, 4), ("m.k", 3, 5, 4), ("m.v", 2, 4, 4)];

/// `scaling * B A` of each module as dense matrices in f64; scalings are given.
fn dense(adapter: &LoadedAdapter, scalings: &BTreeMap<&str, f64>) -> BTreeMap<String, Vec<f64>> {
    let one = |(path, scaling): (&&str, &f64)| {
        let [a, b] = [Part::A, Part::B].map(|part| &adapter.tensors[&part.name(path)]);
        let (r, columns) = (a.shape[0], a.shape[1]);
        let mut delta = vec![0.0; b.shape[0] * columns];
        for (row, out) in delta.chunks_exact_mut(columns).enumerate() {
            for k in 0..r {
                for (column, sum) in out.iter_mut().enumerate() {
                    let product =
                        b.values[row * r + k] as f64 * a.values[k * columns + column] as f64;
                    *sum += scaling * product;
                }
            }
        }
        (path.to_string(), delta)
    };
    scalings.iter().map(one).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

#[test]
fn every_trained_value_of_pefts_adapters_is_counted() {
    for entry in std::fs::read_dir(golden("")).unwrap() {
        let dir = entry.unwrap().path();
        let found = inspect(&dir.join("adapter")).unwrap();
        // PEFT's gradients: one for each trained tensor; a tied embedding is stored under both names.
        let file = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let gradients = safetensors::SafeTensors::deserialize(&file).unwrap();
        let count = |(_, view): (&str, safetensors::tensor::TensorView<'_>)| view.data().len() / 4;
        let trained: usize = gradients.iter().map(count).sum();
        let tied = found.config.ensure_weight_tying;
        let copy = found
            .tensors
            .iter()
            .find(|tensor| tied && tensor.name.ends_with("lm_head.weight"));
        let copied = copy.map_or(0, |tensor| tensor.shape.iter().product());
        let expected: usize = trained + copied;
        assert_eq!(found.parameters, expected, "{dir:?}");
        assert_eq!(found.problems, Vec::<String>::new(), "{dir:?}");
        let refused = found.portability[1].effect == Effect::Refuses;
        let text = std::fs::read_to_string(dir.join("golden.json")).unwrap();
        let settings = serde_json::from_str::<Value>(&text).unwrap()["settings"].take();
        let others = [
            "modules_to_save",
            "use_dora",
            "bias",
            "lora_bias",
            "trainable_token_indices",
        ];
        let is_more = others.iter().any(|key| settings.get(key).is_some());
        assert_eq!(refused, is_more, "{dir:?}: {:?}", found.portability);
    }
}

#[test]
fn real_adapters_are_described() {
    let Some(assets) = assets("real_adapters_are_described") else {
        return;
    };
    let found = inspect(&assets.join("adapters/peft-gpt2-lora")).unwrap();
    // 12 layers of A (8, 768) and B (2304, 8), and the head (6, 768).
    assert_eq!(found.parameters, 12 * 8 * (768 + 2304) + 6 * 768);
    assert_eq!(
        (found.ranks(), found.targets()),
        (vec![8], "c_attn".to_string())
    );
    assert!(
        found
            .problems
            .iter()
            .any(|problem| problem.contains("score.weight"))
    );
    let effects: Vec<Effect> = found
        .portability
        .iter()
        .map(|verdict| verdict.effect)
        .collect();
    assert_eq!(effects[0], Effect::Loads);
    assert!(
        effects[1..].iter().all(|effect| *effect == Effect::Refuses),
        "{effects:?}"
    );
    let config = "adapters/config_only/peft0.19.1_qwen2.5-1.5b_alllinear_adapter_config.json";
    let found = inspect(&assets.join(config)).unwrap();
    assert_eq!(found.tensors, []);
    assert!(
        found
            .portability
            .iter()
            .all(|verdict| verdict.effect == Effect::Loads)
    );
}

#[test]
fn the_norms_of_a_difference_are_those_of_dense_deltas() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
    adapter(
        &one,
        json!({"rank_pattern": {"k": 3}, "use_rslora": true}),
        &PAIRS,
    );
    adapter(
        &two,
        json!({"alpha_pattern": {"v": 5}}),
        &[PAIRS[0], ("m.k", 2, 5, 4), ("m.v", 2, 4, 4)],
    );
    let found = diff(&one, &two).unwrap();
    let root = f64::sqrt;
    let first = dense(
        &load(&one).unwrap(),
        &BTreeMap::from([
            ("m.q", 6.0 / root(2.0)),
            ("m.k", 6.0 / root(3.0)),
            ("m.v", 6.0 / root(2.0)),
        ]),
    );
    let second = dense(
        &load(&two).unwrap(),
        &BTreeMap::from([("m.q", 3.0), ("m.k", 3.0), ("m.v", 2.5)]),
    );
    let mut all = Vec::new();
    for module in &found.modules {
        let pairs: Vec<(f64, f64)> = first[&module.name]
            .iter()
            .copied()
            .zip(second[&module.name].iter().copied())
            .collect();
        let difference = norm(pairs.iter().map(|(x, y)| x - y));
        assert!(
            (module.norms.difference - difference).abs() < 1e-9,
            "{module:?}, {difference}"
        );
        let product: f64 = pairs.iter().map(|(x, y)| x * y).sum();
        let cosine =
            product / norm(pairs.iter().map(|pair| pair.0)) / norm(pairs.iter().map(|pair| pair.1));
        assert!(
            (module.norms.cosine.unwrap() - cosine).abs() < 1e-9,
            "{module:?}, {cosine}"
        );
        all.extend(pairs.into_iter().map(|(x, y)| x - y));
    }
    assert!((found.total.difference - norm(all.into_iter())).abs() < 1e-9);
    let keys: Vec<&str> = found.config.iter().map(|key| key.key.as_str()).collect();
    assert_eq!(keys, ["alpha_pattern", "rank_pattern", "use_rslora"]);
    let same = diff(&one, &one).unwrap();
    assert_eq!((same.total.difference, same.config.len()), (0.0, 0));
}

/// The conversion of the adapter in `dir` to its plain form in `out`.
fn plain<'a>(dir: &'a Path, out: &'a Path) -> Conversion<'a> {
    Conversion {
        dir,
        out,
        dtype: None,
        plain: true,
        initial: None,
    }
}

#[test]
fn the_plain_form_is_the_same_function_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let [from, out] = ["from", "out"].map(|name| dir.path().join(name));
    let keys = json!({"rank_pattern": {"k": 3}, "alpha_pattern": {"v": 5}, "use_rslora": true, "target_modules": "m\\.[qkv]"});
    adapter(&from, keys, &PAIRS);
    let job = plain(&from, &out);
    let converted = convert(&job).unwrap();
    assert!(
        converted
            .portability
            .iter()
            .all(|verdict| verdict.effect == Effect::Loads)
    );
    let found = diff(&from, &out).unwrap();
    assert!(
        found.total.difference < 1e-6 * found.total.first,
        "{:?}",
        found.total
    );
    // All have the rank of the largest, and one scaling.
    let loaded = load(&out).unwrap();
    assert!(
        loaded
            .tensors
            .iter()
            .all(|(name, tensor)| tensor.shape[usize::from(name.contains("lora_B"))] == 3)
    );
    assert!(loaded.config.rank_pattern.0.is_empty() && !loaded.config.use_rslora);
    assert!(
        convert(&job)
            .unwrap_err()
            .to_string()
            .contains("exists already")
    );
}

#[test]
fn half_precision_is_rounded_once_and_overflow_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [from, half, huge] = ["from", "half", "huge"].map(|name| dir.path().join(name));
    adapter(&from, json!({"rank_pattern": {"k": 3}}), &PAIRS);
    let job = |from, out, dtype| Conversion {
        dir: from,
        out,
        dtype: Some(dtype),
        plain: false,
        initial: None,
    };
    convert(&job(&from, &half, Precision::Bf16)).unwrap();
    let (wide, narrow) = (load(&from).unwrap(), load(&half).unwrap());
    for (name, tensor) in &wide.tensors {
        let rounded = tensor
            .values
            .iter()
            .map(|value| half::bf16::from_f32(*value).to_f32());
        assert_eq!(narrow.tensors[name].values, rounded.collect::<Vec<f32>>());
    }
    let mut tensors = wide.tensors.clone();
    tensors.values_mut().next().unwrap().values[0] = 1e5;
    let borrowed: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.shape.clone(), tensor.values.as_slice()))
        .collect();
    save(&huge, &wide.config, &borrowed).unwrap();
    let error = convert(&job(&huge, &dir.path().join("none"), Precision::F16)).unwrap_err();
    assert!(error.to_string().contains("does not fit F16"), "{error}");
    assert!(!dir.path().join("none").exists());
}

#[test]
fn an_initial_adapter_is_subtracted() {
    let dir = tempfile::tempdir().unwrap();
    let [trained, initial, out] = ["trained", "initial", "out"].map(|name| dir.path().join(name));
    let keys = json!({"init_lora_weights": "pissa", "lora_alpha": 5});
    let pairs = [PAIRS[0], ("m.k", 2, 5, 4)];
    adapter(&trained, keys.clone(), &pairs);
    // Other values: the seeds of `adapter` are the places.
    adapter(&initial, keys, &[("m.k", 2, 5, 4), PAIRS[0]]);
    let refused = Conversion {
        dir: &trained,
        out: &out,
        dtype: None,
        plain: true,
        initial: None,
    };
    assert!(
        convert(&refused)
            .unwrap_err()
            .to_string()
            .contains("--initial")
    );
    convert(&Conversion {
        initial: Some(&initial),
        ..refused
    })
    .unwrap();
    let scalings = BTreeMap::from([("m.q", 2.5), ("m.k", 2.5)]);
    let open = |dir: &Path| dense(&load(dir).unwrap(), &scalings);
    let plain_init = |dir: &Path| {
        let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        std::fs::write(
            dir.join("adapter_config.json"),
            text.replace("\"pissa\"", "true"),
        )
        .unwrap();
    };
    plain_init(&trained);
    plain_init(&initial);
    let (trained, initial, out) = (open(&trained), open(&initial), open(&out));
    for (path, converted) in &out {
        for (i, value) in converted.iter().enumerate() {
            let expected = trained[path][i] - initial[path][i];
            assert!(
                (value - expected).abs() < 1e-12,
                "{path}: {value}, {expected}"
            );
        }
    }
}

#[test]
fn what_has_no_plain_form_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (case, word) in [
        ("dora", "`use_dora`"),
        ("bias_lora_only", "`bias`"),
        ("lora_bias", "`lora_bias`"),
        ("save_head", "lm_head.weight"),
    ] {
        let from = golden(case).join("adapter");
        let out = dir.path().join(case);
        let job = plain(&from, &out);
        let error = convert(&job).unwrap_err().to_string();
        assert!(
            error.contains(word) && error.contains("merge"),
            "{case}: {error}"
        );
    }
}

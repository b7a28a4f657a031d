//! Model directories, and the embedded models.

use std::fs;
use std::path::{Path, PathBuf};

use wattune::error::{Kind, Result};
use wattune::hub::{ModelFiles, embedded};

use super::WEIGHTS;

const CONFIG: &str = "config.json";
const CARD: &str = "README.md";
const INDEX: &str = "model.safetensors.index.json";

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    files
        .iter()
        .for_each(|(name, text)| fs::write(folder.path().join(name), text).unwrap());
    folder
}

const INDEX_TEXT: &str =
    r#"{"weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors"}}"#;

#[test]
fn a_directory_with_one_weight_file_is_a_model() {
    let dir = folder(&[
        (CONFIG, "{}"),
        (WEIGHTS, "w"),
        ("merges.txt", ""),
        ("chat_template.jinja", ""),
        (CARD, "---\nlicense: mit\n---\n"),
        (INDEX, INDEX_TEXT),
    ]);
    let model = ModelFiles::open(dir.path()).unwrap();
    assert_eq!(model.require_weights().unwrap(), [dir.path().join(WEIGHTS)]);
    assert_eq!(model.config, dir.path().join(CONFIG));
    assert_eq!(
        model.file("merges.txt"),
        Some(dir.path().join("merges.txt"))
    );
    assert_eq!(
        model.file("chat_template.jinja"),
        Some(dir.path().join("chat_template.jinja"))
    );
    assert_eq!(
        (
            model.file("vocab.json"),
            model.file("tokenizer.json"),
            model.commit
        ),
        (None, None, None)
    );
    assert_eq!(
        (model.license.as_deref(), model.revision.as_str()),
        (Some("mit"), "local")
    );
}

#[test]
fn a_missing_shard_is_refused() {
    let dir = folder(&[
        (CONFIG, "{}"),
        (INDEX, INDEX_TEXT),
        ("model-2.safetensors", "w"),
    ]);
    let error = ModelFiles::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("value: model-1.safetensors\n"), "{error}");
    fs::write(dir.path().join("model-1.safetensors"), "w").unwrap();
    let model = ModelFiles::open(dir.path()).unwrap();
    assert_eq!(
        model.weights,
        [
            dir.path().join("model-2.safetensors"),
            dir.path().join("model-1.safetensors")
        ]
    );
    assert_eq!(model.file(INDEX), Some(dir.path().join(INDEX)));
}

#[test]
fn a_configuration_alone_is_a_model_without_weights() {
    let dir = folder(&[(CONFIG, "{}")]);
    let model = ModelFiles::open(dir.path()).unwrap();
    assert!(model.weights.is_empty());
    assert!(
        model
            .require_weights()
            .unwrap_err()
            .to_string()
            .contains("init = \"random\"")
    );
    let dir = folder(&[(CONFIG, "{}"), ("pytorch_model.bin", "w")]);
    let error = ModelFiles::open(dir.path())
        .unwrap()
        .require_weights()
        .unwrap_err();
    assert!(
        error.remedy().unwrap().contains("save_pretrained"),
        "{error}"
    );
    assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
}

#[test]
fn a_directory_without_a_model_says_what_it_has() {
    let remedy = |files: &[(&str, &str)]| {
        ModelFiles::open(folder(files).path())
            .unwrap_err()
            .remedy()
            .unwrap()
            .to_string()
    };
    assert!(remedy(&[("adapter_config.json", "{}")]).contains("--adapter"));
    assert!(remedy(&[("snapshots", "")]).contains("snapshots"));
    assert!(remedy(&[("m.gguf", "")]).contains("--model-file"));
    assert!(remedy(&[]).contains("config.json"));
    assert_eq!(
        ModelFiles::open(Path::new("no/such/dir"))
            .unwrap_err()
            .kind(),
        Kind::Hub
    );
    let file = folder(&[("x", "")]);
    assert!(
        ModelFiles::open(&file.path().join("x"))
            .unwrap_err()
            .to_string()
            .contains("a file, not a directory")
    );
}

#[test]
fn a_git_lfs_pointer_is_refused() {
    let dir = folder(&[
        (CONFIG, "{}"),
        (
            WEIGHTS,
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        ),
    ]);
    let error = ModelFiles::open(dir.path())
        .unwrap()
        .require_weights()
        .unwrap_err();
    assert!(error.remedy().unwrap().contains("git lfs pull"), "{error}");
    let dir = folder(&[(CONFIG, "{}"), (WEIGHTS, "")]);
    assert!(
        ModelFiles::open(dir.path())
            .unwrap()
            .require_weights()
            .is_err()
    );
}

// The forms in the hub's documentation of model cards: a name, `other` with its own name, a list, none.
#[test]
fn the_licence_is_read_in_every_form_of_a_card() {
    let license = |card: &str| {
        let dir = folder(&[(CONFIG, "{}"), (CARD, card)]);
        ModelFiles::open(dir.path()).unwrap().license
    };
    assert_eq!(
        license("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# X").as_deref(),
        Some("apache-2.0")
    );
    assert_eq!(
        license("---\nlicense: \"mit\" # fine\n---\n").as_deref(),
        Some("mit")
    );
    assert_eq!(
        license("---\nlicense: other\nlicense_name: qwen-research\n---\n").as_deref(),
        Some("qwen-research")
    );
    assert_eq!(
        license("---\nlicense: other\n---\n").as_deref(),
        Some("other")
    );
    assert_eq!(
        license("---\r\nlicense:\r\n- mit\r\n- cc-by-4.0\r\ntags: x\r\n---\r\n").as_deref(),
        Some("mit, cc-by-4.0")
    );
    assert_eq!(
        license("---\nlicense: [mit, apache-2.0]\n---\n").as_deref(),
        Some("mit, apache-2.0")
    );
    assert_eq!(license("---\ntags: [x]\n---\nlicense: mit\n"), None);
    assert_eq!(license("# X\nlicense: mit\n"), None);
    assert_eq!(
        license("---\nlicense_name: x\nlicense:\ntags:\n- y\n---\n"),
        None
    );
}

/// The shards of an index, all of which exist.
fn shards(index: &str) -> Result<Vec<String>> {
    let dir = folder(&[(CONFIG, "{}"), (INDEX, index)]);
    for shard in ["a.safetensors", "b.safetensors"] {
        fs::write(dir.path().join(shard), "w").unwrap();
    }
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
    Ok(ModelFiles::open(dir.path())?
        .weights
        .iter()
        .map(name)
        .collect())
}

#[test]
fn shards_come_in_the_order_of_the_index_each_once() {
    let text = r#"{"metadata": {"total_size": 3}, "weight_map": {"z": "b.safetensors", "a": "a.safetensors", "m": "b.safetensors"}}"#;
    assert_eq!(shards(text).unwrap(), ["b.safetensors", "a.safetensors"]);
}

#[test]
fn an_index_with_a_path_elsewhere_or_no_shard_is_refused() {
    for bad in [
        r#"{"weight_map": {"a": "../a.safetensors"}}"#,
        r#"{"weight_map": {"a": "/a.safetensors"}}"#,
        r#"{"weight_map": {"a": "a.bin"}}"#,
        r#"{"weight_map": {"a": 1}}"#,
        r#"{"weight_map": {}}"#,
        r#"{}"#,
        "",
    ] {
        assert_eq!(shards(bad).unwrap_err().kind(), Kind::Hub, "{bad}");
    }
}

#[test]
fn an_embedded_model_is_written_once_and_repaired_when_damaged() {
    let root = tempfile::tempdir().unwrap();
    let model = embedded("tiny", root.path()).unwrap();
    assert_eq!(model.id, "embedded:tiny");
    let weights = fs::read(&model.require_weights().unwrap()[0]).unwrap();
    let written = fs::metadata(&model.config).unwrap().modified().unwrap();
    fs::write(&model.weights[0], "damaged").unwrap();
    let again = embedded("tiny", root.path()).unwrap();
    assert_eq!(again, model);
    assert_eq!(fs::read(&again.weights[0]).unwrap(), weights);
    let unchanged = fs::metadata(&model.config).unwrap().modified().unwrap();
    assert_eq!(unchanged, written);
}

/// The files that transformers' `save_pretrained` writes for tokenizer, processor and generation, those that its tokenizers read,
/// and licences.
const COMPANIONS: [&str; 22] = [
    "COPYING",
    "LICENSE-APACHE",
    "Licence.md",
    "NOTICE",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab.txt",
];

#[test]
fn a_copy_carries_every_file_but_weights_and_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let others = [
        CONFIG,
        WEIGHTS,
        CARD,
        "pytorch_model.bin",
        "license.py",
        "original/tokenizer.model",
        "additional_chat_templates/x.txt",
    ];
    for name in COMPANIONS.iter().chain(&others) {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "{}").unwrap();
    }
    let model = ModelFiles::open(dir.path()).unwrap();
    assert_eq!(model.companions().collect::<Vec<_>>(), COMPANIONS);
}

#[test]
fn an_unknown_embedded_name_lists_the_known_ones() {
    let error = embedded("three", Path::new("unused")).unwrap_err();
    assert_eq!(error.remedy(), Some("set model.id to \"embedded:tiny\""));
}

#[test]
fn a_real_model_directory_is_complete() {
    let assets = std::env::var_os("WATTUNE_ASSETS").map_or(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets"),
        Into::into,
    );
    let dir = assets.join("models/TinyStories-656K");
    if !dir.is_dir() {
        eprintln!(
            "skipped: a_real_model_directory_is_complete needs {}",
            dir.display()
        );
        return;
    }
    let model = ModelFiles::open(&dir).unwrap();
    assert_eq!(model.require_weights().unwrap(), [dir.join(WEIGHTS)]);
    assert_eq!(
        model.file("tokenizer.json"),
        Some(dir.join("tokenizer.json"))
    );
    assert_eq!(
        model.file("special_tokens_map.json"),
        Some(dir.join("special_tokens_map.json"))
    );
}

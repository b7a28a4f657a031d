//! `export`: a GGUF file that another reader finds whole.

use std::fs::File;

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;

use super::lab::{Lab, number, says, set};

#[test]
fn a_run_is_exported_as_the_merged_model() {
    let lab = Lab::new();
    lab.train("run", &set(&["train.steps=2", "train.learning_rate=2e-2"]));
    lab.json(&["merge", "run", "--out", "merged"]);
    let arguments = ["export", "run", "--format", "gguf", "--quantization"];
    let written = lab.json(&[&arguments[..], &["f32", "--out", "exact"]].concat());
    let small = lab.json(&[&arguments[..], &["q8_0", "--out", "small"]].concat());
    assert_eq!(number(&written, "/tensors"), 38.0);
    assert!(number(&small, "/bytes") < 0.3 * number(&written, "/bytes"));
    let modelfile = String::from_utf8(lab.read("small/Modelfile")).unwrap();
    assert!(
        modelfile.starts_with("FROM ./model-Q8_0.gguf\n"),
        "{modelfile}"
    );
    let merged =
        candle_core::safetensors::load(lab.path("merged/model.safetensors"), &Device::Cpu).unwrap();
    let mut file = File::open(lab.path("exact/model-F32.gguf")).unwrap();
    let content = Content::read(&mut file).unwrap();
    assert_eq!(content.tensor_infos.len(), 38);
    let pairs = [
        ("token_embd.weight", "model.embed_tokens.weight", 1),
        (
            "blk.3.attn_v.weight",
            "model.layers.3.self_attn.v_proj.weight",
            1,
        ),
        (
            "blk.1.ffn_norm.weight",
            "model.layers.1.post_attention_layernorm.weight",
            1,
        ),
        (
            "blk.2.attn_q.weight",
            "model.layers.2.self_attn.q_proj.weight",
            4,
        ),
        (
            "blk.2.attn_k.weight",
            "model.layers.2.self_attn.k_proj.weight",
            2,
        ),
    ];
    for (gguf, own, heads) in pairs {
        let read = content.tensor(&mut file, gguf, &Device::Cpu).unwrap();
        let read = read.dequantize(&Device::Cpu).unwrap();
        let mut own = merged[own].clone();
        if heads > 1 {
            // llama.cpp rotates neighbours: the halves of each head are interleaved.
            let (rows, columns) = own.dims2().unwrap();
            let halves = own.reshape((heads, 2, rows / heads / 2, columns)).unwrap();
            let halves = halves.transpose(1, 2).unwrap().contiguous().unwrap();
            own = halves.reshape((rows, columns)).unwrap();
        }
        let flat =
            |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(read.dims(), own.dims(), "{gguf}");
        assert!(flat(&read) == flat(&own), "{gguf}");
    }
    let names: Vec<_> = std::fs::read_dir(lab.path("")).unwrap().collect();
    let temporary = |entry: &std::io::Result<std::fs::DirEntry>| {
        entry
            .as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with('.')
    };
    assert!(!names.iter().any(temporary), "{names:?}");
}

#[test]
fn an_export_that_cannot_be_is_refused() {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("taken")).unwrap();
    let model = ["export", "--model", "embedded:tiny", "--format"];
    let cases: [(&[&str], &[&str]); 3] = [
        (&["gguf", "--out", "taken"], &["exists already", "taken"]),
        (
            &["hf", "--quantization", "q8_0", "--out", "x"],
            &["--quantization", "--format gguf"],
        ),
        (&["hf", "--out", "x"], &["no adapter was given"]),
    ];
    for (arguments, parts) in cases {
        says(&lab.refused(2, &[&model[..], arguments].concat()), parts);
    }
}

/// A model written as GGUF is that model again: the same losses in F32, near ones in Q8_0, whose blocks stay as they are while an
/// adapter is trained on them.
#[test]
fn an_exported_file_is_a_base_model() {
    let lab = Lab::new();
    let losses = |model: &str| {
        let data = lab.path("validation.jsonl").display().to_string();
        let found = lab.json(&["eval", "--model", model, "--data", &data]);
        number(&found, "/loss")
    };
    let export = ["export", "--model", "embedded:tiny", "--format", "gguf"];
    for (quantization, out) in [("f32", "exact"), ("q8_0", "small")] {
        lab.json(&[&export[..], &["--quantization", quantization, "--out", out]].concat());
    }
    let (own, exact) = (losses("embedded:tiny"), losses("exact/model-F32.gguf"));
    assert!((own - exact).abs() < 1e-6, "{own} {exact}");
    let small = losses("small/model-Q8_0.gguf");
    assert!(
        small != own && (small - own).abs() < 0.02 * own,
        "{own} {small}"
    );

    let file = format!("model.id={}", lab.path("small/model-Q8_0.gguf").display());
    let report = lab.train("run", &set(&["train.learning_rate=2e-2", &file]));
    assert!(
        number(&report, "/training/val_loss_after") < number(&report, "/training/val_loss_before")
    );
    let after = lab.json(&["eval", "run"]);
    let recorded = number(&report, "/training/val_loss_after");
    assert!((number(&after, "/loss") - recorded).abs() < 1e-6, "{after}");
    // Decoded, added and written in 16 bits: the result loads as any model.
    lab.json(&["merge", "run", "--out", "merged"]);
    let config = std::fs::read_to_string(lab.path("merged/config.json")).unwrap();
    assert!(config.contains("\"bfloat16\""), "{config}");
    let merged = losses(&lab.path("merged").display().to_string());
    assert!(
        (merged - recorded).abs() < 2e-3 * recorded,
        "{recorded} {merged}"
    );
}

/// llama.cpp's names, its scale alpha / r, and B's rows in its order; read by candle, which knows nothing of ours.
#[test]
fn an_adapter_is_written_alone() {
    let lab = Lab::new();
    lab.train(
        "run",
        &set(&[
            "adapter.use_rslora=true",
            "adapter.r=4",
            "adapter.lora_alpha=6",
            "train.learning_rate=2e-2",
        ]),
    );
    let arguments = [
        "export",
        "run",
        "--format",
        "gguf",
        "--adapter-only",
        "--out",
        "alone",
    ];
    lab.json(&arguments);
    let mut file = std::fs::File::open(lab.path("alone/adapter-F32.gguf")).unwrap();
    let content = Content::read(&mut file).unwrap();
    let metadata = |key: &str| format!("{:?}", content.metadata[key]);
    assert!(
        metadata("general.type").contains("adapter") && metadata("adapter.type").contains("lora")
    );
    assert!(metadata("adapter.lora.alpha").contains("6"));
    let adapter = candle_core::safetensors::load(
        lab.path("run/adapter/adapter_model.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    let mut compared = 0;
    for name in content.tensor_infos.keys() {
        let read = content
            .tensor(&mut file, name, &Device::Cpu)
            .unwrap()
            .dequantize(&Device::Cpu)
            .unwrap();
        let Some(layer) = name.strip_suffix(".attn_v.weight.lora_b") else {
            continue;
        };
        let layer = layer.strip_prefix("blk.").unwrap();
        let b = &adapter
            [&format!("base_model.model.model.layers.{layer}.self_attn.v_proj.lora_B.weight")];
        // Rank-stabilised LoRA scales by 6 / sqrt(4), llama.cpp by 6 / 4.
        let expected = (b * 2.0).unwrap();
        assert_eq!(read.dims2().unwrap(), b.dims2().unwrap());
        let difference = (read - expected)
            .unwrap()
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(difference == 0.0, "{name}: {difference}");
        compared += 1;
    }
    assert!(compared > 0, "{:?}", content.tensor_infos.keys());
    lab.train("dora", &set(&["adapter.use_dora=true"]));
    let refused = lab.refused(
        2,
        &[
            "export",
            "dora",
            "--format",
            "gguf",
            "--adapter-only",
            "--out",
            "x",
        ],
    );
    says(&refused, &["A and B", "merge it"]);
}

#[test]
fn a_damaged_gguf_file_is_refused() {
    let lab = Lab::new();
    lab.json(&[
        "export",
        "--model",
        "embedded:tiny",
        "--format",
        "gguf",
        "--out",
        "whole",
    ]);
    let name = std::fs::read_dir(lab.path("whole")).unwrap();
    let names = name.map(|entry| entry.unwrap().path());
    let whole = names
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "gguf"));
    let whole = std::fs::read(whole.unwrap()).unwrap();
    for (length, part) in [
        (whole.len() - 40, "beyond the end"),
        (1000, "cannot be read"),
        (0, "cannot be read"),
    ] {
        std::fs::write(lab.path("cut.gguf"), &whole[..length]).unwrap();
        let arguments = ["generate", "--model", "cut.gguf", "--prompt", "a"];
        says(&lab.refused(2, &arguments), &["cut.gguf", part]);
    }
    says(
        &lab.refused(2, &["generate", "--model", "none.gguf", "--prompt", "a"]),
        &["none.gguf"],
    );
}

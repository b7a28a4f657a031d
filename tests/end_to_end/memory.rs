//! What a run really takes of memory, beside what was forecast.

use std::fs::File;
use std::io::Write;

use serde_json::json;

use super::lab::{Lab, number, set};

/// 42 million weights in bf16, all zero in a file that takes no room on the disk: far more than a step on eight tokens needs beside them.
fn large_model(lab: &Lab) -> u64 {
    let (hidden, inner, layers, vocab) = (512, 2048, 8, 16_384);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": vocab,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
    });
    let words: serde_json::Map<String, serde_json::Value> = ["</s>", "a", "b", "c", "d"]
        .into_iter()
        .enumerate()
        .map(|(id, word)| (word.to_string(), id.into()))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "unk_token": "</s>", "vocab": words },
    });
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![vocab, hidden]),
        ("model.norm.weight".to_string(), vec![hidden]),
    ];
    for layer in 0..layers {
        let norms =
            ["input_layernorm", "post_attention_layernorm"].map(|name| (name, vec![hidden]));
        let square = [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ];
        let mlp = [
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ];
        let all = norms
            .into_iter()
            .chain(square.map(|name| (name, vec![hidden, hidden])))
            .chain(mlp);
        tensors.extend(
            all.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
        );
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        header.insert(
            name,
            json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] }),
        );
    }
    let header = serde_json::to_vec(&header).unwrap();
    std::fs::create_dir(lab.path("model")).unwrap();
    lab.write("model/config.json", &config.to_string());
    lab.write("model/tokenizer.json", &tokenizer.to_string());
    lab.write("model/tokenizer_config.json", "{\"eos_token\": \"</s>\"}");
    let mut file = File::create(lab.path("model/model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(&header).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    end
}

/// Weights are in memory once: neither a mapped file nor a copy in another type stays beside them, which alone would be half as much again.
#[test]
#[cfg(target_os = "linux")]
fn the_peak_is_what_was_forecast() {
    let lab = Lab::new();
    let bf16 = large_model(&lab);
    lab.edit("validation = \"validation.jsonl\"\n", "");
    lab.write("train.jsonl", "{\"text\": \"a b c d a b c\"}\n");
    for dtype in ["bf16", "f32"] {
        let keys = [
            "model.id=./model",
            &format!("model.dtype={dtype}"),
            "data.format=text",
            "train.steps=2",
            "train.micro_batch_size=1",
        ];
        let report = lab.train(dtype, &set(&keys));
        let (peak, forecast) = (
            number(&report, "/training/peak_rss_bytes"),
            number(&report, "/memory/peak_bytes"),
        );
        assert_eq!(
            number(&report, "/memory/weights"),
            bf16 as f64,
            "{dtype}: what is stored in bf16 stays so"
        );
        assert!(
            (peak / forecast - 1.0).abs() < 0.25,
            "{dtype}: {peak} bytes at the peak, {forecast} forecast"
        );
    }
}

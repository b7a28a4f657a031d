//! The readers, one test each.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Target, fuzz};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;
use wattune::adapter;
use wattune::data::{self, Format, OnBadRecord, Options, Tokenizer, TokenizerFiles, TxtUnit};
use wattune::energy::ledger::Lease;
use wattune::energy::{Ledger, Profile};
use wattune::hub::Silent;
use wattune::model::{Architecture, Weights};
use wattune::recipe;
use wattune::report::{read_report, read_steps};

fn checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn files(paths: &[&str]) -> Vec<Vec<u8>> {
    paths
        .iter()
        .map(|path| fs::read(checkout(path)).unwrap())
        .collect()
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn tokenizer_files(folder: &Path) -> TokenizerFiles {
    let tiny = checkout("recipes/quickstart/tiny");
    let own = |name: &str| {
        let file = folder.join(name);
        Some(if file.is_file() {
            file
        } else {
            tiny.join(name)
        })
        .filter(|path| path.is_file())
    };
    TokenizerFiles {
        tokenizer_json: own("tokenizer.json"),
        tokenizer_config: own("tokenizer_config.json"),
        chat_template: own("chat_template.jinja"),
        ..TokenizerFiles::default()
    }
}

#[test]
fn recipes() {
    fuzz(&Target {
        name: "recipe",
        file: "recipe.toml",
        seeds: files(&[
            "recipes/quickstart.toml",
            "recipes/chat.toml",
            "recipes/tight-carbon.toml",
        ]),
        words: &[
            "[adapter]",
            "r = ",
            "rank_pattern = {",
            "energy = \"",
            " Wh",
            "[[",
            "'''",
            "inf",
            "1e999",
        ],
        read: Box::new(|file| {
            if let Ok(text) = fs::read_to_string(file)
                && let Err(mistakes) = recipe::check(&text, file, &[])
            {
                assert!(mistakes.iter().all(|mistake| !mistake.what.is_empty()));
            }
        }),
    });
}

#[test]
fn model_configurations() {
    fuzz(&Target {
        name: "config",
        file: "config.json",
        seeds: files(&["recipes/quickstart/tiny/config.json"]),
        words: &[
            "\"rope_scaling\":",
            "\"num_hidden_layers\":",
            "\"head_dim\":",
            "\"rope_type\":\"llama3\",",
            "99999999,",
        ],
        read: Box::new(|file| {
            if let Ok(architecture) = Architecture::from_file(file) {
                let _ = (architecture.parameters(), architecture.modules().len());
            }
        }),
    });
}

#[test]
fn tokenizers() {
    let path = "recipes/quickstart/tiny/tokenizer.json";
    fuzz(&Target {
        name: "tokenizer",
        file: "tokenizer.json",
        seeds: files(&[path]),
        words: &[
            "\"type\":\"Strip\",",
            "\"content\":\"\",",
            "\"dropout\":0.5,",
            "\"unk_token\":\"<x>\",",
            "\"id\":4294967295,",
        ],
        read: Box::new(|file| {
            let folder = file.parent().unwrap();
            if let Ok(tokenizer) = Tokenizer::load(&tokenizer_files(folder))
                && let Ok(encoded) = tokenizer.encode("Once upon a time, \u{1f600} <|x|>\n", true)
            {
                let _ = tokenizer.decode(&encoded.ids);
            }
        }),
    });
}

#[test]
fn chat_templates() {
    let conversation = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    ]);
    fuzz(&Target {
        name: "template",
        file: "chat_template.jinja",
        seeds: texts(&[
            "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
            "{%- set ns = namespace(x='a') -%}{% for m in messages if m.role != 'system' %}{% set ns.x = ns.x ~ m.content %}{% endfor %}{{ ns.x[::-1] }}{% if add_generation_prompt %}{{ tools | tojson(indent=2) }}{% endif %}",
            "{% macro f(x, y=2) %}{{ x * y }}{% endmacro %}{{ f('ab') }}{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ raise_exception('no') }}",
        ]),
        words: &[
            "{% for i in range(999999999) %}",
            "{{ 'a' * 999999999 }}",
            "((((",
            "{{ ''.format(",
            "| tojson(indent=9**9)",
            "{% endfor %}",
            "[1,2,3][",
            "{% set x = x ~ x %}",
            "strftime_now('%', ",
        ],
        read: Box::new(move |file| {
            let folder = file.parent().unwrap();
            if let Ok(tokenizer) = Tokenizer::load(&tokenizer_files(folder)) {
                let _ = tokenizer.render_chat(&conversation, None, true);
            }
        }),
    });
}

/// A data file in every format that its fields may have.
fn records(
    name: &'static str,
    file: &'static str,
    seeds: Vec<Vec<u8>>,
    words: &'static [&'static str],
) {
    let tiny = Tokenizer::load(&tokenizer_files(Path::new("absent"))).unwrap();
    fuzz(&Target {
        name,
        file,
        seeds,
        words,
        read: Box::new(move |file| {
            for on_bad_record in [OnBadRecord::Stop, OnBadRecord::Skip] {
                let options = Options {
                    format: Format::Auto,
                    max_length: 64,
                    on_bad_record,
                    txt_unit: TxtUnit::Paragraph,
                    prompt_template: None,
                    labels: Vec::new(),
                    label_kind: Default::default(),
                    columns: Vec::new(),
                };
                let _ = data::load(&[file.to_path_buf()], &options, &tiny, None, &Silent);
            }
        }),
    });
}

#[test]
fn json_lines() {
    let conversation = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    records(
        "jsonl",
        "data.jsonl",
        texts(&[
            "{\"text\": \"one\"}\n{\"text\": \"two\"}\n",
            "{\"prompt\": \"a\", \"completion\": null}\n",
            conversation,
        ]),
        &["{\"text\":", "\\ud800", "\n", "[", "\"messages\":"],
    );
}

#[test]
fn csv() {
    records(
        "csv",
        "data.csv",
        texts(&[
            "text\none\n\"two, \"\"three\"\"\"\n",
            "prompt,completion\na,b\n\"c\nd\",e\n",
        ]),
        &["\"", ",", "\n", "\r", "text,text\n"],
    );
}

/// A Parquet file of one row: {text: "one"}.
fn one_column_of_text() -> Vec<u8> {
    let schema = parse_message_type("message m { optional binary text (UTF8); }").unwrap();
    let mut writer =
        SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let text = [ByteArray::from("one")];
    let typed = column.typed::<ByteArrayType>();
    typed.write_batch(&text, Some(&[1]), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn parquet() {
    records(
        "parquet",
        "data.parquet",
        vec![one_column_of_text()],
        &["PAR1"],
    );
}

#[test]
fn safetensors() {
    let architecture =
        Architecture::from_file(&checkout("recipes/quickstart/tiny/config.json")).unwrap();
    let header =
        br#"{"model.embed_tokens.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#;
    let file = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 24]].concat();
    fuzz(&Target {
        name: "safetensors",
        file: "model.safetensors",
        seeds: vec![file],
        words: &[
            "\"shape\":[",
            "\"BF16\"",
            "18446744073709551615",
            "\"data_offsets\":[",
        ],
        read: Box::new(move |file| {
            let _ = Weights::open(&[file.to_path_buf()], &architecture);
        }),
    });
}

/// A GGUF file of one tensor, with a tokenizer of this kind.
fn a_gguf_file(kind: &str) -> Vec<u8> {
    use wattune::gguf::{TensorInfo, Value, container};
    let tokens = ["<unk>", "<s>", "a", "b", "ab"].map(String::from).to_vec();
    let text = |text: &str| Value::Text(text.into());
    let mut metadata = vec![
        ("general.architecture".to_string(), text("llama")),
        ("tokenizer.ggml.model".to_string(), text(kind)),
        ("tokenizer.ggml.pre".to_string(), text("gpt-2")),
        ("tokenizer.ggml.tokens".to_string(), Value::Texts(tokens)),
        (
            "tokenizer.ggml.merges".to_string(),
            Value::Texts(vec!["a b".into()]),
        ),
        (
            "tokenizer.ggml.scores".to_string(),
            Value::F32s(vec![0.0, 0.0, -1.0, -1.0, -2.0]),
        ),
        (
            "tokenizer.ggml.token_type".to_string(),
            Value::I32s(vec![2, 3, 1, 1, 1]),
        ),
        ("tokenizer.ggml.bos_token_id".to_string(), Value::U32(1)),
    ];
    for (key, size) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
    ] {
        metadata.push((format!("llama.{key}"), Value::U32(size)));
    }
    let tensor = |name: &str, shape: &[usize]| TensorInfo {
        name: name.into(),
        shape: shape.to_vec(),
        format: wattune::ops::StoredFormat::F32,
    };
    let tensors = [
        tensor("token_embd.weight", &[5, 32]),
        tensor("rope_freqs.weight", &[8]),
    ];
    let tensors: Vec<&TensorInfo> = tensors.iter().collect();
    let mut file = container::head(&metadata, &tensors).unwrap();
    file.resize(file.len() + 5 * 32 * 4 + 32, 0);
    file
}

#[test]
fn gguf() {
    fuzz(&Target {
        name: "gguf",
        file: "model.gguf",
        seeds: vec![a_gguf_file("llama"), a_gguf_file("gpt2")],
        words: &[
            "GGUF",
            "token_embd.weight",
            "rope_freqs.weight",
            "blk.0.attn_q.bias",
        ],
        read: Box::new(|file| {
            let Ok(read) = wattune::gguf::reader::GgufFile::open(file) else {
                return;
            };
            let _ = (
                read.tokenizer_json(),
                read.tokenizer_config(),
                read.generation_config(),
            );
            let config = file.with_extension("json");
            let Ok(json) = read.config_json() else { return };
            fs::write(&config, json.to_string()).unwrap();
            if let Ok(architecture) = Architecture::from_file(&config) {
                let _ = Weights::open(&[file.to_path_buf()], &architecture);
            }
        }),
    });
}

#[test]
fn adapter_configurations() {
    let config = r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"v": 4},
        "lora_dropout": 0.0, "bias": "none", "use_rslora": false, "init_lora_weights": true}"#;
    fuzz(&Target {
        name: "adapter_config",
        file: "adapter_config.json",
        seeds: texts(&[config]),
        words: &[
            "\"target_modules\": \"",
            "(.*)*",
            "\"modules_to_save\":[",
            "null,",
            "\"r\": 1e99,",
        ],
        read: Box::new(|file| {
            let _ = adapter::peft::load_config(file.parent().unwrap());
        }),
    });
}

/// An entry, a lease and its end.
fn a_ledger() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.jsonl");
    let mut ledger = Ledger::create(&path, "digest").unwrap();
    ledger
        .lease(Lease::default(), wattune::units::Seconds::ZERO)
        .unwrap();
    ledger.settle(wattune::units::Seconds::ZERO).unwrap();
    fs::read(&path).unwrap()
}

#[test]
fn ledgers() {
    fuzz(&Target {
        name: "ledger",
        file: "ledger.jsonl",
        seeds: vec![a_ledger()],
        words: &[
            "\"phase\":\"train\",",
            "\"lease\":",
            "\"run\":",
            "18446744073709551615",
            "\n",
        ],
        read: Box::new(|file| {
            let _ = Ledger::resume(file, "digest");
        }),
    });
}

#[test]
fn step_logs_and_reports() {
    fuzz(&Target {
        name: "report",
        file: "report.json",
        seeds: files(&["tests/fixtures/report.json"]),
        words: &[
            "1e308",
            "\"low_j\":",
            "null",
            "\"stop_reason\":\"budget:",
            "\n",
        ],
        read: Box::new(|file| {
            let _ = (read_report(file), read_steps(file));
        }),
    });
}

#[test]
fn device_profiles() {
    let profile = Profile::named("raspberry-pi-5").unwrap().to_toml();
    fuzz(&Target {
        name: "profile",
        file: "profile.toml",
        seeds: texts(&[&profile]),
        words: &[
            "inf",
            "nan",
            "-0.0",
            "1e308",
            "1e-308",
            "[[",
            "measured_over_counted = ",
        ],
        read: Box::new(|file| {
            let _ = Profile::from_file(file);
        }),
    });
}

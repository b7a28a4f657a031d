//! The data room against transformers, TRL and real data sets.
//!
//! Golden files are written by `scripts/chat_templates.py` and `scripts/completion_masks.py`. Tests that need real tokenizers and
//! data sets look for them in `../shared/assets` (or WATTUNE_ASSETS) and are skipped by name where it is absent.

use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use wattune::data::{
    Dataset, Format, OnBadRecord, Options, Tokenizer, TokenizerFiles, TxtUnit, load, read,
};
use wattune::error::Kind;
use wattune::hub::Silent;

fn assets(test: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/assets");
    let folder = std::env::var_os("WATTUNE_ASSETS").map_or(beside, PathBuf::from);
    if !folder.is_dir() {
        eprintln!("skipped: {test} needs the assets folder (set WATTUNE_ASSETS)");
        return None;
    }
    Some(folder)
}

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn files(folder: &Path) -> TokenizerFiles {
    let present = |name: &str| Some(folder.join(name)).filter(|path| path.exists());
    TokenizerFiles {
        tokenizer_json: present("tokenizer.json"),
        vocab_json: present("vocab.json"),
        merges: present("merges.txt"),
        tokenizer_config: present("tokenizer_config.json"),
        special_tokens_map: present("special_tokens_map.json"),
        added_tokens: present("added_tokens.json"),
        chat_template: present("chat_template.jinja"),
        config: present("config.json"),
        ..TokenizerFiles::default()
    }
}

/// A tokenizer whose words do not matter, with the given tokenizer_config.json.
fn tokenizer_with(config: &Value) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("vocab.json"), "{\"a\": 0}").unwrap();
    std::fs::write(folder.path().join("merges.txt"), "").unwrap();
    let mut config = config.clone();
    let map = config.as_object_mut().unwrap();
    map.insert("tokenizer_class".into(), "GPT2Tokenizer".into());
    map.remove("added_tokens_decoder");
    let tokens: serde_json::Map<String, Value> =
        ["bos_token", "eos_token", "unk_token", "pad_token"]
            .iter()
            .filter_map(|name| {
                let token = map.get(*name)?;
                Some(
                    token
                        .as_str()
                        .or_else(|| token["content"].as_str())?
                        .to_string(),
                )
            })
            .collect::<std::collections::BTreeSet<String>>()
            .into_iter()
            .zip(1..)
            .map(|(token, id)| {
                (
                    id.to_string(),
                    serde_json::json!({"content": token, "special": true}),
                )
            })
            .collect();
    map.insert("added_tokens_decoder".into(), Value::Object(tokens));
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        config.to_string(),
    )
    .unwrap();
    Tokenizer::load(&files(folder.path())).unwrap()
}

fn render(tokenizer: &Tokenizer, golden: &Value, case: &Value) -> wattune::error::Result<String> {
    let chat = case["chat"].as_str().unwrap();
    let tools = (chat == "tools").then_some(&golden["tools"]);
    tokenizer.render_chat(
        &golden["chats"][chat],
        tools,
        case["add_generation_prompt"].as_bool().unwrap(),
    )
}

#[test]
fn templates_render_as_in_transformers() {
    let golden = golden("chat_templates.json");
    let mut seen = 0;
    for case in golden["own"].as_array().unwrap() {
        let mut config = golden["special"].clone();
        config["chat_template"] = golden["templates"][case["template"].as_str().unwrap()].clone();
        let ours = render(&tokenizer_with(&config), &golden, case);
        let name = format!("{} / {}", case["template"], case["chat"]);
        match case.get("error") {
            Some(error) => assert!(
                ours.unwrap_err()
                    .to_string()
                    .contains(error.as_str().unwrap()),
                "{name}"
            ),
            None => assert_eq!(ours.unwrap(), case["text"].as_str().unwrap(), "{name}"),
        }
        seen += 1;
    }
    assert_eq!(seen, 64);
}

#[test]
fn published_templates_render_as_in_transformers() {
    let Some(assets) = assets("published_templates_render_as_in_transformers") else {
        return;
    };
    let golden = golden("chat_templates.json");
    for case in golden["published"].as_array().unwrap() {
        let name = case["tokenizer"].as_str().unwrap();
        let path = assets
            .join("tokenizers")
            .join(name)
            .join("tokenizer_config.json");
        let config = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let ours = render(&tokenizer_with(&config), &golden, case).unwrap();
        assert_eq!(
            ours.len() as u64,
            case["bytes"].as_u64().unwrap(),
            "{name} {}: {ours}",
            case["chat"]
        );
        assert_eq!(
            hex(&Sha256::digest(&ours)),
            case["sha256"].as_str().unwrap(),
            "{name} {}: {ours}",
            case["chat"]
        );
    }
}

/// Loads one message list by a template and returns what is learned of it.
fn learned(
    tokenizer: &Tokenizer,
    lines: &str,
    format: Format,
) -> wattune::error::Result<(Dataset, Vec<String>)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.jsonl");
    std::fs::write(&path, lines).unwrap();
    let dataset = load(&[path], &options(format, 4096), tokenizer, None, &Silent)?;
    let texts = dataset
        .examples
        .iter()
        .map(|example| learned_text(tokenizer, example))
        .collect();
    Ok((dataset, texts))
}

/// The loss tokens' text, runs joined by `|`.
fn learned_text(tokenizer: &Tokenizer, example: &wattune::data::Example) -> String {
    let mut runs = Vec::new();
    let mut start = 0;
    for run in example.loss.chunk_by(|a, b| a == b) {
        if run[0] {
            runs.push(
                tokenizer
                    .decode(&example.tokens[start..start + run.len()])
                    .unwrap(),
            );
        }
        start += run.len();
    }
    runs.join("|")
}

fn options(format: Format, max_length: usize) -> Options {
    Options {
        format,
        columns: vec![],
        max_length,
        on_bad_record: OnBadRecord::Stop,
        txt_unit: TxtUnit::Paragraph,
        prompt_template: None,
        labels: Vec::new(),
        label_kind: Default::default(),
    }
}

fn mask_hash(dataset: &Dataset) -> String {
    let mut hash = Sha256::new();
    for example in dataset.examples.iter() {
        hash.update((example.tokens.len() as u32).to_le_bytes());
        example
            .tokens
            .iter()
            .for_each(|token| hash.update(token.to_le_bytes()));
        hash.update(
            example
                .loss
                .iter()
                .map(|l| u8::from(*l))
                .collect::<Vec<_>>(),
        );
    }
    hex(&hash.finalize())
}

#[test]
fn completion_masks_equal_trls_on_all_of_e2e() {
    let Some(assets) = assets("completion_masks_equal_trls_on_all_of_e2e") else {
        return;
    };
    for case in golden("completion_masks.json").as_array().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("tokenizer_config.json");
        std::fs::write(
            &config,
            serde_json::json!({"eos_token": case["eos"]}).to_string(),
        )
        .unwrap();
        let tokenizer_json = assets
            .join(case["tokenizer"].as_str().unwrap())
            .join("tokenizer.json");
        let files = TokenizerFiles {
            tokenizer_json: Some(tokenizer_json),
            tokenizer_config: Some(config),
            ..TokenizerFiles::default()
        };
        let tokenizer = Tokenizer::load(&files).unwrap();
        let path = assets.join(case["data"].as_str().unwrap());
        let dataset = load(
            &[path],
            &options(Format::Auto, 2048),
            &tokenizer,
            None,
            &Silent,
        )
        .unwrap();
        let counts = dataset.counts;
        assert_eq!(
            [counts.examples, counts.tokens, counts.loss_tokens].map(Value::from),
            ["examples", "tokens", "loss_tokens"].map(|k| case[k].clone())
        );
        assert_eq!(
            mask_hash(&dataset),
            case["sha256"].as_str().unwrap(),
            "{case}"
        );
        assert!(dataset.eos_trained);
        assert_eq!(
            [
                counts.truncated,
                counts.dropped,
                counts.skipped,
                counts.glued
            ],
            [0; 4]
        );
    }
}

fn qwen(assets: &Path) -> Tokenizer {
    Tokenizer::load(&files(&assets.join("tokenizers/qwen2.5-0.5b-instruct"))).unwrap()
}

#[test]
fn qwen_without_a_tokenizer_json_encodes_as_published() {
    let Some(assets) = assets("qwen_without_a_tokenizer_json_encodes_as_published") else {
        return;
    };
    let tokenizer = qwen(&assets);
    assert_eq!(tokenizer.eos(), Some(("<|im_end|>".into(), 151_645)));
    assert_eq!(tokenizer.vocab_size(), 151_665);
    for case in golden("qwen_ids.json").as_array().unwrap() {
        let ids: Vec<u32> = case["ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect();
        assert_eq!(
            tokenizer
                .encode(case["text"].as_str().unwrap(), false)
                .unwrap()
                .ids,
            ids,
            "{case}"
        );
    }
}

#[test]
fn chatml_learns_the_answer_and_the_end_of_its_turn() {
    let Some(assets) = assets("chatml_learns_the_answer_and_the_end_of_its_turn") else {
        return;
    };
    let lines = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <b>you</b>\n"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you 😀"}]}"#;
    let (dataset, texts) = learned(&qwen(&assets), lines, Format::Auto).unwrap();
    assert_eq!(texts, ["Hello <b>you</b>\n<|im_end|>|See you 😀<|im_end|>"]);
    assert!(dataset.eos_trained);
}

#[test]
fn conversations_with_tools_are_learned_call_by_call() {
    let Some(assets) = assets("conversations_with_tools_are_learned_call_by_call") else {
        return;
    };
    let tokenizer = qwen(&assets);
    let path = assets.join("datasets/llamafactory/glaive_toolcall_en_demo.json");
    let dataset = load(
        std::slice::from_ref(&path),
        &options(Format::Auto, 16_384),
        &tokenizer,
        None,
        &Silent,
    )
    .unwrap();
    let records: Vec<_> = read(&path, TxtUnit::File)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(
        (
            dataset.counts.records,
            dataset.examples.len(),
            dataset.counts.truncated
        ),
        (300, 300, 0)
    );
    for (record, example) in records.iter().zip(dataset.examples.iter()) {
        // Straight from the record: gpt turns as they are, calls as Qwen's template writes them.
        let turns: Vec<String> = record.fields["conversations"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(expected_turn)
            .collect();
        let runs = learned_text(&tokenizer, example);
        let runs: Vec<String> = runs
            .split("<|im_end|>")
            .map(|run| run.trim_start_matches('|').to_string())
            .collect();
        assert_eq!(runs.len(), turns.len() + 1, "{}", record.place);
        for (run, turn) in runs.iter().zip(&turns) {
            // Spaces before an answer belong to its first token or not at all.
            assert_eq!(
                run.trim_start().replace(' ', ""),
                turn.trim_start().replace(' ', ""),
                "{}",
                record.place
            );
        }
    }
}

fn expected_turn(turn: &Value) -> Option<String> {
    let value = turn["value"].as_str().unwrap();
    match turn["from"].as_str().unwrap() {
        "gpt" => Some(value.to_string()),
        "function_call" => {
            let call: Value = serde_json::from_str(value).unwrap();
            Some(format!(
                "<tool_call>\n{{\"name\": \"{}\", \"arguments\": {}}}\n</tool_call>",
                call["name"].as_str().unwrap(),
                call["arguments"]
            ))
        }
        _ => None,
    }
}

#[test]
fn qwen3_learns_reasoning_and_calls_with_their_turn() {
    let Some(assets) = assets("qwen3_learns_reasoning_and_calls_with_their_turn") else {
        return;
    };
    // Qwen3's vocabulary is Qwen2.5's with four more added tokens; its template rewrites reasoning.
    let words = files(&assets.join("tokenizers/qwen2.5-0.5b-instruct"));
    let config = Some(assets.join("tokenizers/qwen3/tokenizer_config.json"));
    let tokenizer = Tokenizer::load(&TokenizerFiles {
        tokenizer_config: config,
        ..words
    })
    .unwrap();
    let lines = r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]}"#;
    let (_, texts) = learned(&tokenizer, lines, Format::Auto).unwrap();
    assert_eq!(texts, ["<think>\nhm\n</think>\n\nA<|im_end|>"]);
    let lines = r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}"#;
    // The template writes an empty reasoning, which the model has to produce as well.
    assert_eq!(
        learned(&tokenizer, lines, Format::Auto).unwrap().1,
        ["<think>\n\n</think>\n\nA<|im_end|>"]
    );
    // Reasoning as a field is learned as in tags; of earlier rounds the template leaves it out.
    let lines = r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "hm"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "B", "reasoning": "so"}]}"#;
    let (dataset, texts) = learned(&tokenizer, lines, Format::Auto).unwrap();
    assert_eq!(texts, ["A<|im_end|>|<think>\nso\n</think>\n\nB<|im_end|>"]);
    assert_eq!(dataset.counts.without_reasoning, 1);
    let path = assets.join("datasets/llamafactory/glaive_toolcall_en_demo.json");
    let dataset = load(
        &[path],
        &options(Format::Auto, 16_384),
        &tokenizer,
        None,
        &Silent,
    )
    .unwrap();
    assert_eq!(
        (dataset.counts.records, dataset.counts.examples),
        (300, 300)
    );
    let turns: usize = dataset
        .examples
        .iter()
        .map(|e| learned_text(&tokenizer, e).matches("<|im_end|>").count())
        .sum();
    // 746 answers and 211 calls, counted in the file.
    assert_eq!(turns, 746 + 211);
}

#[test]
fn loss_weights_are_followed() {
    let Some(assets) = assets("loss_weights_are_followed") else {
        return;
    };
    let tokenizer = qwen(&assets);
    let path = assets.join("datasets/llamafactory/v1_sft_demo.jsonl");
    let dataset = load(
        std::slice::from_ref(&path),
        &options(Format::Auto, 8192),
        &tokenizer,
        None,
        &Silent,
    )
    .unwrap();
    assert_eq!((dataset.counts.records, dataset.examples.len()), (500, 500));
    for (record, example) in read(&path, TxtUnit::File)
        .unwrap()
        .zip(dataset.examples.iter())
    {
        let record = record.unwrap();
        let answer = record.fields["messages"][1]["content"][0]["value"]
            .as_str()
            .unwrap();
        assert_eq!(
            learned_text(&tokenizer, example).trim_start(),
            format!("{answer}<|im_end|>").trim_start(),
            "{}",
            record.place
        );
    }
    let weighted = r#"{"messages": [{"role": "user", "content": "a", "loss_weight": 1}, {"role": "assistant", "content": "b", "loss_weight": 0}]}"#;
    assert_eq!(
        learned(&tokenizer, weighted, Format::Messages).unwrap().1,
        ["a<|im_end|>"]
    );
    let half = weighted.replace(": 1}", ": 0.5}");
    let error = learned(&tokenizer, &half, Format::Messages).unwrap_err();
    assert!(
        error.kind() == Kind::Data && error.to_string().contains("neither 0 nor 1"),
        "{error}"
    );
}

#[test]
fn an_old_layout_is_refused_with_the_conversion() {
    let Some(assets) = assets("an_old_layout_is_refused_with_the_conversion") else {
        return;
    };
    let error = Tokenizer::load(&files(&assets.join("tokenizers/llama2"))).unwrap_err();
    assert_eq!(error.kind(), Kind::Tokenizer);
    assert!(
        error.remedy().unwrap().contains("save_pretrained"),
        "{error}"
    );
}

#[test]
fn real_files_of_every_kind_are_read() {
    let Some(assets) = assets("real_files_of_every_kind_are_read") else {
        return;
    };
    let datasets = assets.join("datasets");
    // Counts from MANIFEST.md and the publishers' pages.
    for (name, count) in [
        ("gsm8k/train.jsonl", 7473),
        ("gsm8k_parquet/train.parquet", 7473),
        ("gsm8k_parquet/test.parquet", 1319),
        ("SST-2/train.tsv", 67_349),
        ("SST-2/dev.tsv", 872),
        ("mlx_wikisql/train.jsonl", 1000),
        ("llamafactory/alpaca_en_demo.json", 999),
    ] {
        let records = read(&datasets.join(name), TxtUnit::Paragraph).unwrap();
        assert_eq!(records.map(Result::unwrap).count(), count, "{name}");
    }
}

#[test]
fn parquet_says_what_json_lines_say() {
    let Some(assets) = assets("parquet_says_what_json_lines_say") else {
        return;
    };
    let all = |name: &str| {
        read(&assets.join("datasets").join(name), TxtUnit::File)
            .unwrap()
            .map(|r| r.unwrap().fields)
            .collect::<Vec<_>>()
    };
    assert_eq!(all("gsm8k_parquet/test.parquet"), all("gsm8k/test.jsonl"));
}

#[test]
fn real_data_sets_fit_a_format() {
    let Some(assets) = assets("real_data_sets_fit_a_format") else {
        return;
    };
    let tokenizer = Tokenizer::load(&files(&assets.join("models/TinyStories-656K"))).unwrap();
    let columns =
        |pairs: [(&str, &str); 2]| pairs.map(|(a, b)| (a.to_string(), b.to_string())).to_vec();
    for (name, columns) in [
        ("gsm8k/test.jsonl", vec![]),
        (
            "gsm8k_parquet/test.parquet",
            columns([("prompt", "question"), ("completion", "answer")]),
        ),
        (
            "SST-2/dev.tsv",
            columns([("prompt", "sentence"), ("completion", "label")]),
        ),
        ("mlx_wikisql/valid.jsonl", vec![]),
        ("llamafactory/alpaca_en_demo.json", vec![]),
        ("tinystories/tinystories_sample.txt", vec![]),
    ] {
        let options = Options {
            columns,
            ..options(Format::Auto, 512)
        };
        let dataset = load(
            &[assets.join("datasets").join(name)],
            &options,
            &tokenizer,
            None,
            &Silent,
        )
        .unwrap();
        let counts = dataset.counts;
        assert_eq!(counts.skipped, 0);
        assert!(
            counts.examples > 0 && counts.loss_tokens > 0 && dataset.eos_trained,
            "{name} {counts:?}"
        );
        assert!(
            dataset
                .examples
                .iter()
                .all(|e| e.tokens.len() <= 512 && !e.loss[0] && e.loss.contains(&true)),
            "{name}"
        );
    }
}

#[test]
fn a_whole_file_is_cut_into_windows() {
    let Some(assets) = assets("a_whole_file_is_cut_into_windows") else {
        return;
    };
    let tokenizer = Tokenizer::load(&files(&assets.join("tokenizers/gpt2"))).unwrap();
    assert_eq!(tokenizer.eos(), None);
    let options = Options {
        txt_unit: TxtUnit::File,
        ..options(Format::Auto, 256)
    };
    let dataset = load(
        &[assets.join("datasets/tinyshakespeare/input.txt")],
        &options,
        &tokenizer,
        None,
        &Silent,
    )
    .unwrap();
    // 338,025 tokens by GPT-2's BPE (301,966 + 36,059 in karpathy/nanoGPT, data/shakespeare); every one but the first is learned.
    assert_eq!(
        (dataset.counts.records, dataset.counts.loss_tokens),
        (1, 338_024)
    );
    assert_eq!(dataset.counts.windows, 338_024_u64.div_ceil(255));
    assert!(!dataset.eos_trained);
}

#[test]
fn threads_do_not_change_a_data_set() {
    let Some(assets) = assets("threads_do_not_change_a_data_set") else {
        return;
    };
    let tokenizer = Tokenizer::load(&files(&assets.join("models/TinyStories-656K"))).unwrap();
    let path = assets.join("datasets/e2e_nlg/valid.jsonl");
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            load(
                std::slice::from_ref(&path),
                &options(Format::Auto, 64),
                &tokenizer,
                None,
                &Silent,
            )
            .unwrap()
        })
    };
    assert_eq!(with(1), with(3));
}

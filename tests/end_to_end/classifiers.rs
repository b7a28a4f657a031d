//! Classifiers through the program: planned, trained, resumed, evaluated, predicted with, and refused.
//!
//! The model is a random one of `scripts/reference.py`, with a tokenizer of whole words written here.

use serde_json::{Value, json};

use super::lab::{Lab, flags, microjoules, number, says, set};
#[cfg(unix)]
use super::resume::{killed_at_checkpoint, resume};

const RECIPE: &str = r#"
name = "small"
seed = 7
[model]
id = "./MODEL"
[adapter]
r = 2
lora_alpha = 6
[data]
train = "train.jsonl"
validation = "validation.jsonl"
max_length = 16
[train]
steps = 60
micro_batch_size = 4
learning_rate = 2e-2
warmup_steps = 0
eval_every = 10
save_every = 10
[energy]
device = "raspberry-pi-5"
meter = "counted"
"#;

/// The word that decides the class, and the class.
const CLASSES: [(&str, &str); 3] = [
    ("awful", "negative"),
    ("plain", "neutral"),
    ("superb", "positive"),
];

const WORDS: [&str; 8] = ["a", "film", "of", "the", "year", "with", "some", "music"];

/// A folder with the model MODEL of `tests/golden/tiny`, a tokenizer, records and a recipe.
fn lab(model: &str) -> Lab {
    let lab = Lab::new();
    std::fs::create_dir(lab.path(model)).unwrap();
    let golden = format!("{}/tests/golden/tiny/{model}", env!("CARGO_MANIFEST_DIR"));
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(
            format!("{golden}/{file}"),
            lab.path(&format!("{model}/{file}")),
        )
        .unwrap();
    }
    lab.write(&format!("{model}/tokenizer.json"), &tokenizer().to_string());
    lab.write("train.jsonl", &records(0..30));
    lab.write("validation.jsonl", &records(30..42));
    lab.write("recipe.toml", &RECIPE.replace("MODEL", model));
    lab
}

/// One token a word, between `[CLS]` and `[SEP]`.
fn tokenizer() -> Value {
    let special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"];
    let classes = CLASSES.map(|(word, _)| word);
    let words = special.iter().chain(&WORDS).chain(&classes);
    let vocabulary: serde_json::Map<String, Value> = words
        .zip(0..)
        .map(|(word, id): (&&str, u32)| (word.to_string(), id.into()))
        .collect();
    let added = |(id, content): (u32, &str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let special_token = |content: &str| json!({"SpecialToken": {"id": content, "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let ids = |id: u32, content: &str| json!({"id": content, "ids": [id], "tokens": [content]});
    let template = [
        special_token("[CLS]"),
        sequence("A"),
        special_token("[SEP]"),
    ];
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": (0..).zip(special).map(added).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        "post_processor": {
            "type": "TemplateProcessing", "single": template, "pair": template,
            "special_tokens": {"[CLS]": ids(1, "[CLS]"), "[SEP]": ids(2, "[SEP]")},
        },
    })
}

/// Texts of two to seven words, one of which decides the class.
fn records(which: std::ops::Range<usize>) -> String {
    let record = |i: usize| {
        let (word, label) = CLASSES[i % 3];
        let length = 1 + i % 6;
        let mut words: Vec<&str> = (0..length).map(|k| WORDS[(i * 5 + k * 3) % 8]).collect();
        words.insert(i % (length + 1), word);
        json!({"text": words.join(" "), "label": label}).to_string() + "\n"
    };
    which.map(record).collect()
}

const EVAL: [&str; 7] = [
    "eval",
    "--model",
    "./bert",
    "--data",
    "validation.jsonl",
    "--adapter",
    "run/adapter",
];

#[test]
fn a_classifier_spends_what_was_planned_and_learns() {
    let lab = lab("bert");
    let keys = set(&["adapter.lora_dropout=0.1"]);
    let (plan, report) = (lab.plan(&keys), lab.train("run", &keys));
    let total = |value: &Value| microjoules(&value["energy"]["total_j"]);
    assert_eq!(total(&plan), total(&report));
    assert_eq!(number(&report, "/training/metrics/accuracy"), 1.0);
    let evaluated = lab.json(&EVAL);
    for key in ["accuracy", "f1_macro", "f1_micro", "matthews_correlation"] {
        let reported = number(&report, &format!("/training/metrics/{key}"));
        assert_eq!(number(&evaluated, &format!("/{key}")), reported, "{key}");
    }
    assert_eq!(
        evaluated["confusion_matrix"],
        json!([[4, 0, 0], [0, 4, 0], [0, 0, 4]])
    );
    let before = number(&report, "/training/val_loss_before");
    assert!(number(&evaluated, "/loss") < 0.5 * before);
}

#[test]
fn every_classifier_spends_what_was_planned() {
    for model in [
        "roberta",
        "electra",
        "distilbert",
        "llama_score",
        "qwen3_score",
    ] {
        let lab = lab(model);
        let keys = set(&[
            "train.steps=3",
            "train.eval_every=2",
            "adapter.lora_dropout=0.1",
        ]);
        let (plan, report) = (lab.plan(&keys), lab.train("run", &keys));
        let total = |value: &Value| microjoules(&value["energy"]["total_j"]);
        assert_eq!(total(&plan), total(&report), "{model}");
    }
}

#[test]
fn a_decoder_gets_a_head_for_classes() {
    let lab = lab("qwen3");
    let keys = set(&["model.task=sequence-classification"]);
    let report = lab.train("run", &keys);
    let evaluated = lab.json(&["eval", "run", "--data", "validation.jsonl", "--quiet"]);
    for path in ["/training/metrics/accuracy", "/training/val_loss_after"] {
        let key = path
            .rsplit('/')
            .next()
            .unwrap()
            .replace("val_loss_after", "loss");
        let [reported, found] = [
            number(&report, path),
            number(&evaluated, &format!("/{key}")),
        ];
        assert!(
            (reported - found).abs() < 1e-6,
            "{key}: {reported}, {found}"
        );
    }
    let by_adapter = ["eval", "--model", "./qwen3", "--adapter", "run/adapter"];
    let data = ["--data", "validation.jsonl", "--quiet"];
    assert_eq!(lab.json(&[&by_adapter[..], &data].concat()), evaluated);
    assert!(number(&evaluated, "/loss") < 0.5 * number(&report, "/training/val_loss_before"));
    let continued = lab.train(
        "again",
        &set(&["adapter.init_from=run/adapter", "train.steps=1"]),
    );
    let before = number(&continued, "/training/val_loss_before");
    assert!((before - number(&evaluated, "/loss")).abs() < 1e-6);
}

#[test]
fn predictions_are_labels_and_probabilities() {
    let lab = lab("bert");
    lab.train("run", &[]);
    lab.write("texts.jsonl", &records(30..42).replace("label", "other"));
    let mut predict = EVAL;
    (predict[0], predict[4]) = ("predict", "texts.jsonl");
    let found = lab.json(&predict);
    assert_eq!(found["labels"], json!(["negative", "neutral", "positive"]));
    let predictions = found["predictions"].as_array().unwrap();
    assert_eq!(predictions.len(), 12);
    for (i, prediction) in predictions.iter().enumerate() {
        assert_eq!(prediction["label"], CLASSES[i % 3].1);
        let probabilities = prediction["probabilities"].as_array().unwrap();
        let sum: f64 = probabilities.iter().filter_map(Value::as_f64).sum();
        assert!((sum - 1.0).abs() < 1e-12 && probabilities.len() == 3);
    }
    let config: Value = serde_json::from_slice(&lab.read("run/adapter/config.json")).unwrap();
    assert_eq!(config["id2label"]["2"], "positive");
    assert_eq!(config["label2id"]["neutral"], 1);
}

#[cfg(unix)]
#[test]
fn a_classifier_resumes_to_the_same_bytes() {
    let lab = lab("bert");
    let keys = set(&["train.save_every=10"]);
    lab.train("whole", &keys);
    killed_at_checkpoint(&lab, "cut", &keys, 10);
    resume(&lab, "cut");
    assert_eq!(lab.adapter("whole"), lab.adapter("cut"));
}

#[test]
fn a_trained_classifier_is_continued() {
    let lab = lab("bert");
    let report = lab.train("run", &[]);
    let keys = set(&["adapter.init_from=run/adapter", "train.steps=1"]);
    let again = lab.train("again", &keys);
    let [after, before] = [
        number(&report, "/training/val_loss_after"),
        number(&again, "/training/val_loss_before"),
    ];
    assert!((after - before).abs() < 1e-6, "{before}, {after}");
}

/// Records whose label is a list of the words that decide, or their sum as a number.
fn labelled(which: std::ops::Range<usize>, label: impl Fn(&[usize]) -> Value) -> String {
    let record = |i: usize| {
        let present: Vec<usize> = (0..3).filter(|k| ((i * 7) >> k) & 1 == 1).collect();
        let words = present.iter().map(|k| CLASSES[*k].0);
        let words: Vec<&str> = [WORDS[i % 8]].into_iter().chain(words).collect();
        json!({"text": words.join(" "), "label": label(&present)}).to_string() + "\n"
    };
    which.map(record).collect()
}

/// What the labels of the records mean is found, planned, learnt, reported, predicted and merged.
#[test]
fn texts_get_several_labels_or_a_number() {
    let names = |present: &[usize]| present.iter().map(|k| CLASSES[*k].1).collect();
    let sum = |present: &[usize]| json!(present.iter().map(|k| *k as f64 - 0.5).sum::<f64>());
    let labels = ["f1_macro", "f1_micro", "accuracy"];
    learns_labels("multi_label_classification", &names, &labels);
    let numbers = ["pearson_correlation", "spearman_correlation"];
    learns_labels("regression", &sum, &numbers);
}

fn learns_labels(problem_type: &str, label: &dyn Fn(&[usize]) -> Value, figures: &[&str]) {
    let model = "qwen3";
    let lab = lab(model);
    lab.write("train.jsonl", &labelled(0..40, label));
    lab.write("validation.jsonl", &labelled(40..56, label));
    let keys = set(&[
        "model.task=sequence-classification",
        "adapter.lora_dropout=0.05",
    ]);
    let (plan, report) = (lab.plan(&keys), lab.train("run", &keys));
    let total = |value: &Value| microjoules(&value["energy"]["total_j"]);
    assert_eq!(total(&plan), total(&report), "{problem_type}");
    let config: Value = serde_json::from_slice(&lab.read("run/adapter/config.json")).unwrap();
    assert_eq!(config["problem_type"], problem_type);
    let data = ["--data", "validation.jsonl", "--quiet"];
    let model = format!("./{model}");
    let adapted = ["--model", &model, "--adapter", "run/adapter"];
    let evaluated = lab.json(&[&["eval"], &adapted[..], &data].concat());
    for key in figures {
        let reported = number(&report, &format!("/training/metrics/{key}"));
        assert_eq!(number(&evaluated, &format!("/{key}")), reported, "{key}");
        assert!(reported > 0.8, "{key}: {reported}");
    }
    let merged = [&["merge"], &adapted[..], &["--out", "merged"]].concat();
    lab.json(&merged);
    let predicted = lab.json(&[&["predict"], &adapted[..], &data].concat());
    let of_merged = ["predict", "--model", "./merged"];
    let of_merged = lab.json(&[&of_merged[..], &data].concat());
    let numbers = |found: &Value| -> Vec<f64> {
        let rows = found["predictions"].as_array().unwrap().iter();
        let numbers = |row: &Value| match &row["value"] {
            Value::Number(value) => vec![value.as_f64().unwrap()],
            _ => serde_json::from_value(row["probabilities"].clone()).unwrap(),
        };
        rows.flat_map(numbers).collect()
    };
    for (x, y) in numbers(&predicted).iter().zip(numbers(&of_merged)) {
        assert!((x - y).abs() < 1e-4, "{problem_type}: {x}, merged {y}");
    }
    assert_eq!(predicted["labels"], of_merged["labels"]);
}

/// The classes of a weighted loss have the matrix of counts in the pages; a class that there is not is
/// refused.
#[test]
fn classes_have_weights_and_a_matrix() {
    let lab = lab("bert");
    let weighted = set(&["train.class_weights={ negative = 5.0, positive = 0.2 }"]);
    let (plan, report) = (lab.plan(&weighted), lab.train("run", &weighted));
    let total = |value: &Value| microjoules(&value["energy"]["total_j"]);
    assert_eq!(total(&plan), total(&report));
    let plain = lab.train("plain", &[]);
    let last = |report| number(report, "/training/train_loss_last");
    assert_ne!(last(&report), last(&plain));
    let matrix = &report["training"]["confusion_matrix"];
    assert_eq!(matrix["labels"], json!(["negative", "neutral", "positive"]));
    let counts: Vec<Vec<u64>> = serde_json::from_value(matrix["counts"].clone()).unwrap();
    assert_eq!(counts.iter().flatten().sum::<u64>(), 12);
    for page in ["run/report.md", "run/report.html"] {
        let text = String::from_utf8(lab.read(page)).unwrap();
        assert!(text.contains("Confusion matrix"), "{page}");
        assert!(text.contains("nats per record"), "{page}");
    }
    let keys = set(&["train.class_weights={ neutrl = 2.0 }"]);
    let arguments = [&["train", "recipe.toml", "--out", "no"], &flags(&keys)[..]];
    let message = lab.refused(2, &arguments.concat());
    says(&message, &["train.class_weights", "neutrl", "neutral"]);
}

/// Records of words with tags: the two words after "of" are a name.
fn tagged(which: std::ops::Range<usize>, labelled: bool) -> String {
    let record = |i: usize| {
        let (place, _) = CLASSES[i % 3];
        let before = (0..i % 3).map(|k| (WORDS[k], "O"));
        let name = [
            ("of", "O"),
            (WORDS[3 + i % 5], "B-PER"),
            (WORDS[7 - i % 4], "I-PER"),
        ];
        let words = before.chain(name).chain([("with", "O"), (place, "O")]);
        let (words, tags): (Vec<_>, Vec<_>) = words.unzip();
        let record = if labelled {
            json!({"tokens": words, "labels": tags})
        } else {
            json!({"tokens": words})
        };
        record.to_string() + "\n"
    };
    which.map(record).collect()
}

#[test]
fn words_get_classes() {
    for model in ["bert", "qwen3"] {
        let lab = lab(model);
        lab.write("train.jsonl", &tagged(0..40, true));
        lab.write("validation.jsonl", &tagged(40..52, true));
        lab.write("words.jsonl", &tagged(40..52, false));
        let keys = set(&[
            "model.task=token-classification",
            "adapter.lora_dropout=0.05",
        ]);
        let (plan, report) = (lab.plan(&keys), lab.train("run", &keys));
        let total = |value: &Value| microjoules(&value["energy"]["total_j"]);
        assert_eq!(total(&plan), total(&report));
        let evaluated = lab.json(&["eval", "run", "--data", "validation.jsonl", "--quiet"]);
        for key in ["accuracy", "entity_f1", "entity_precision", "entity_recall"] {
            let reported = number(&report, &format!("/training/metrics/{key}"));
            assert_eq!(number(&evaluated, &format!("/{key}")), reported, "{key}");
        }
        assert!(number(&evaluated, "/entity_f1") > 0.8, "{evaluated}");
        let model = format!("./{model}");
        let predict = ["predict", "--model", &model, "--adapter", "run/adapter"];
        let data = ["--data", "words.jsonl", "--quiet"];
        let found = lab.json(&[&predict[..], &data].concat());
        assert_eq!(found["labels"], json!(["B-PER", "I-PER", "O"]));
        let predictions = found["predictions"].as_array().unwrap();
        let words = |record: &Value| record.as_array().unwrap().len();
        let counts: Vec<usize> = predictions.iter().map(words).collect();
        assert_eq!(counts, (40..52).map(|i| i % 3 + 5).collect::<Vec<_>>());
    }
}

#[test]
fn what_a_classifier_cannot_do_is_refused() {
    let lab = lab("bert");
    let train = |key: &str| {
        let keys = set(&[key]);
        let arguments = [&["train", "recipe.toml", "--out", "run"], &flags(&keys)[..]];
        lab.refused(2, &arguments.concat())
    };
    let message = train("model.task=causal-lm");
    says(&message, &["model.task", "predicts no next token"]);
    let message = train("data.format=completion");
    says(&message, &["data.format", "classification"]);
    let message = train("data.labels=[\"negative\", \"positive\"]");
    says(
        &message,
        &["`classifier.weight` has shape [3, 32], the labels need [2, 32]"],
    );
    let classes_of = |model: &str| {
        let message = lab.refused(
            2,
            &[
                "train",
                "recipe.toml",
                "--set",
                model,
                "--set",
                "data.format=classification",
            ],
        );
        says(&message, &["task = \"sequence-classification\""]);
    };
    classes_of("model.id=embedded:tiny");
    lab.write("train.jsonl", "{\"tokens\": [\"a\", \"film\"], \"labels\": [\"O\"]}\n{\"tokens\": [\"a\"], \"labels\": [\"B-X\"]}\n{\"tokens\": [\"a\"], \"labels\": [\"I-X\"]}\n");
    let message = train("model.task=token-classification");
    says(&message, &["1 labels, 2 words", "line 1"]);
    let generate = ["generate", "--model", "./bert", "--prompt", "a film"];
    says(&lab.refused(2, &generate), &["wattune predict"]);
    let predict = [
        "predict",
        "--model",
        "embedded:tiny",
        "--data",
        "train.jsonl",
    ];
    says(&lab.refused(2, &predict), &["wattune generate"]);
}

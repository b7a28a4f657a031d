//! Adapters beyond plain LoRA through the program: planned, trained, resumed, continued, merged and evaluated.

use super::lab::{Lab, flags, microjoules, number, set};
#[cfg(unix)]
use super::resume::{killed_at_checkpoint, resume};

/// Keys of recipes, one adapter each.
const ADAPTERS: [&[&str]; 8] = [
    &["adapter.modules_to_save=[\"lm_head\"]"],
    &[
        "adapter.modules_to_save=[\"embed_tokens\", \"norm\"]",
        "adapter.target_modules=[\"q_proj\"]",
    ],
    &[
        "adapter.modules_to_save=[\"embed_tokens\"]",
        "adapter.ensure_weight_tying=true",
        "adapter.loraplus_lr_ratio=4",
    ],
    &[
        "adapter.target_modules=[\"embed_tokens\", \"lm_head\", \"v_proj\"]",
        "adapter.lora_dropout=0.1",
    ],
    &["adapter.use_dora=true", "adapter.lora_dropout=0.1"],
    &[
        "adapter.trainable_token_indices=[7, 5, 300]",
        "adapter.loraplus_lr_ratio=4",
    ],
    &[
        "adapter.init_lora_weights=pissa_niter_4",
        "adapter.use_rslora=true",
    ],
    &[
        "adapter.init_lora_weights=olora",
        "adapter.rank_pattern={ q_proj = 4 }",
        "adapter.lora_dropout=0.1",
    ],
];

fn with<'a>(keys: &[&'a str], more: &[&'a str]) -> Vec<String> {
    set(&[keys, more].concat())
}

#[test]
fn every_adapter_spends_what_was_planned() {
    let lab = Lab::new();
    for (i, keys) in ADAPTERS.iter().enumerate() {
        let keys = with(keys, &["train.steps=3", "train.eval_every=2"]);
        let (plan, report) = (lab.plan(&keys), lab.train(&i.to_string(), &keys));
        let total = |value: &serde_json::Value| microjoules(&value["energy"]["total_j"]);
        assert_eq!(total(&plan), total(&report), "{keys:?}");
        let trained = |value: &serde_json::Value| number(value, "/adapter/trainable_parameters");
        assert_eq!(trained(&plan), trained(&report), "{keys:?}");
    }
}

#[test]
fn every_adapter_merges_to_a_model_of_the_same_loss() {
    let lab = Lab::new();
    for (i, keys) in ADAPTERS.iter().enumerate() {
        let [run, merged] = [format!("run{i}"), format!("merged{i}")];
        lab.train(&run, &with(keys, &["train.learning_rate=2e-2"]));
        let adapter = format!("{run}/adapter");
        let eval = |model: &[&str]| {
            let data = ["eval", "--data", "validation.jsonl", "--quiet"];
            number(&lab.json(&[&data, model].concat()), "/loss")
        };
        let base = eval(&["--model", "embedded:tiny"]);
        let adapted = eval(&["--model", "embedded:tiny", "--adapter", &adapter]);
        let merge = ["merge", "--model", "embedded:tiny", "--quiet"];
        lab.json(&[&merge, &["--adapter", &adapter, "--out", &merged][..]].concat());
        let of_merged = eval(&["--model", &format!("./{merged}")]);
        let difference = (of_merged - adapted).abs();
        assert!(
            difference < 1e-5,
            "{keys:?}: {of_merged}, adapted {adapted}"
        );
        assert!((base - adapted).abs() > 0.02, "{keys:?}: {base}, {adapted}");
        // Continued without a step at a rate above 0, the loss stays.
        let ranks = "r = 2\nlora_alpha = 6\n";
        lab.edit(ranks, "");
        let from = format!("adapter.init_from={adapter}");
        let report = lab.train(&format!("{run}b"), &set(&[&from, "train.steps=1"]));
        lab.edit("[adapter]\n", &format!("[adapter]\n{ranks}"));
        let before = number(&report, "/training/val_loss_before");
        assert!(
            (before - adapted).abs() < 1e-6,
            "{keys:?}: {before}, {adapted}"
        );
    }
}

#[cfg(unix)]
#[test]
fn every_adapter_resumes_to_the_same_bytes() {
    let lab = Lab::new();
    for (i, keys) in ADAPTERS.iter().enumerate() {
        let [whole, cut] = [format!("whole{i}"), format!("cut{i}")];
        let keys = with(keys, &["train.steps=6", "train.save_every=2"]);
        lab.json(
            &[
                &["train", "recipe.toml", "--out", &whole, "--quiet"],
                &flags(&keys)[..],
            ]
            .concat(),
        );
        killed_at_checkpoint(&lab, &cut, &keys, 2);
        resume(&lab, &cut);
        assert_eq!(lab.course(&cut), lab.course(&whole), "{keys:?}");
        assert!(lab.adapter(&cut) == lab.adapter(&whole), "{keys:?}");
    }
}

#[test]
fn the_adapter_of_a_run_is_inspected_converted_and_compared() {
    let lab = Lab::new();
    let keys = [
        "adapter.use_rslora=true",
        "adapter.rank_pattern={ q_proj = 4 }",
    ];
    let report = lab.train("run", &set(&keys));
    let verdicts = &report["adapter"]["portability"];
    assert_eq!(verdicts[2]["verdict"], "computes differently", "{verdicts}");
    let card = String::from_utf8(lab.read("run/adapter/README.md")).unwrap();
    assert!(
        card.contains("| llama.cpp | computes differently |"),
        "{card}"
    );
    let inspected = lab.json(&["adapter", "inspect", "run"]);
    let trained = number(&report, "/adapter/trainable_parameters");
    assert_eq!(number(&inspected, "/parameters"), trained);
    let converted = lab.json(&["adapter", "convert", "run", "--plain", "--out", "plain"]);
    assert!(
        converted["portability"][2]["effect"] == "loads",
        "{converted}"
    );
    let eval = |adapter: &str| {
        let model = ["--model", "embedded:tiny", "--adapter", adapter];
        let data = ["eval", "--data", "validation.jsonl", "--quiet"];
        number(&lab.json(&[&data, &model[..]].concat()), "/loss")
    };
    let (original, plain) = (eval("run/adapter"), eval("plain"));
    assert!((original - plain).abs() < 1e-6, "{original}, {plain}");
    let same = lab.json(&["adapter", "diff", "run", "run"]);
    assert_eq!(number(&same, "/total/difference"), 0.0);
}

#[test]
fn an_initialisation_is_refused_where_it_cannot_be_applied_or_saved() {
    let lab = Lab::new();
    for (keys, word) in [
        (&["adapter.target_modules=[\"lm_head\"]"][..], "`lm_head`"),
        (&["adapter.use_dora=true"], "`use_dora`"),
        (&["model.quantization=nf4"], "quantised weights"),
        (
            &[
                "adapter.use_rslora=true",
                "adapter.rank_pattern={ q_proj = 4 }",
            ],
            "PEFT cannot convert",
        ),
    ] {
        let keys = with(keys, &["adapter.init_lora_weights=pissa"]);
        let arguments = [&["plan", "recipe.toml"], &flags(&keys)[..]].concat();
        let message = lab.refused(2, &arguments);
        assert!(message.contains(word), "{keys:?}: {message}");
    }
}

#[test]
fn the_initial_factors_do_not_depend_on_the_threads() {
    let lab = Lab::new();
    let keys = set(&["adapter.init_lora_weights=pissa", "train.steps=1"]);
    for threads in ["1", "3"] {
        let train = [
            "train",
            "recipe.toml",
            "--quiet",
            "--out",
            threads,
            "--threads",
            threads,
        ];
        lab.json(&[&train, &flags(&keys)[..]].concat());
    }
    assert!(lab.adapter("1") == lab.adapter("3"));
}

#[test]
fn a_portable_adapter_is_refused_before_training_what_would_not_travel() {
    let lab = Lab::new();
    let portable = "adapter.portable=true";
    lab.plan(&set(&[portable]));
    for (key, word) in [
        ("adapter.use_rslora=true", "llama.cpp computes differently"),
        ("adapter.use_dora=true", "`use_dora`"),
        ("adapter.modules_to_save=[\"lm_head\"]", "`modules_to_save`"),
        ("adapter.target_modules=[\"lm_head\"]", "mistral.rs refuses"),
    ] {
        let keys = set(&[portable, key]);
        let arguments = [
            &["train", "recipe.toml", "--out", "none"],
            &flags(&keys)[..],
        ]
        .concat();
        let message = lab.refused(2, &arguments);
        assert!(message.contains(word), "{key}: {message}");
    }
}

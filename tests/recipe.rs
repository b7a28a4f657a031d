//! The recipe from outside: every bad one is refused with a place and a remedy, every good one survives being written out.

#[path = "recipe/written_out.rs"]
mod written_out;

use std::path::{Path, PathBuf};

use wattune::energy::{DeviceRef, Limits};
use wattune::error::Kind;
use wattune::recipe::*;
use wattune::units::{Flops, Joules, Pue};
use wattune::work::Precision;

const SMALLEST: &str =
    "[model]\nid = \"embedded:tiny\"\n[data]\ntrain = \"train.jsonl\"\n[train]\nsteps = 5\n";

fn read(text: &str) -> Recipe {
    parse(text, Path::new("/demo/demo.toml"), &[]).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn with(text: &str, overrides: &[&str]) -> Result<Recipe, String> {
    let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
    parse(text, Path::new("/demo/demo.toml"), &overrides).map_err(|error| error.to_string())
}

#[test]
fn each_bad_recipe_is_refused_with_its_place_and_remedy() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad_recipes");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() > 80, "{}", files.len());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let expected = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("# expect: "))
            .expect("an expectation");
        let Err(error) = load(&file, &[]) else {
            panic!("{} is accepted", file.display())
        };
        assert_eq!((error.kind(), error.exit_status()), (Kind::Recipe, 2));
        let message = error.to_string();
        for part in [expected, "line ", "column ", "hint: ", "^"] {
            assert!(
                message.contains(part),
                "{}: no `{part}` in\n{message}",
                file.display()
            );
        }
        // One mistake in the file is one mistake in the message: none draws another after it.
        assert_eq!(check(&text, &file, &[]).unwrap_err().len(), 1, "{message}");
    }
}

#[test]
fn five_mistakes_are_shown_together() {
    let text = "[model]\nid = \"embedded:tiny\"\ndtype = \"fp16\"\n\n[data]\ntrain = \"train.jsonl\"\nmax_length = 1\n\n[train]\n\
                steps = 200\nepochs = 1.0\nlerning_rate = 2e-4\n\n[budget]\nenergy = \"5 watts\"\n";
    let message = parse(
        text,
        Path::new("demo.toml"),
        &["train.micro_batch_size=0".to_string()],
    )
    .unwrap_err()
    .to_string();
    insta::assert_snapshot!(message);
}

#[test]
fn check_returns_every_diagnostic() {
    let mistakes = check("[model]\nid = 3\n", Path::new("demo.toml"), &[]).unwrap_err();
    let places: Vec<_> = mistakes
        .iter()
        .map(|mistake| (mistake.line, mistake.column))
        .collect();
    // `id = 3` holds its value in column 6; what is missing is missed at the end of the file.
    assert_eq!(
        places,
        [(Some(2), Some(6)), (Some(2), Some(7)), (Some(2), Some(7))]
    );
    assert!(mistakes[1].what.contains("data.train") && mistakes[2].what.contains("train.steps"));
}

/// The values of the design's section 6, typed off by hand.
#[test]
fn defaults_of_model_adapter_and_data_are_as_designed() {
    let recipe = read(SMALLEST);
    let Adapter::Lora(lora) = &recipe.adapter else {
        panic!("LoRA is the default")
    };
    let config = &lora.config;
    assert_eq!((recipe.name.as_str(), recipe.seed), ("demo", 42));
    assert_eq!(recipe.model.id, ModelId::Embedded("tiny".into()));
    let model = &recipe.model;
    assert_eq!(
        (model.revision.as_str(), model.dtype, model.init),
        ("main", Precision::F32, Init::Pretrained)
    );
    assert_eq!(
        (
            config.r,
            config.lora_alpha,
            config.lora_dropout,
            config.use_rslora
        ),
        (16, 32.0, 0.0, false)
    );
    assert_eq!(
        (
            &config.target_modules,
            &config.exclude_modules,
            &lora.init_from
        ),
        (&Targets::AllLinear, &None, &None)
    );
    let data = &recipe.data;
    assert_eq!(
        (&data.train, &data.validation),
        (
            &DataSource::Files(vec!["/demo/train.jsonl".into()]),
            &Validation::None
        )
    );
    assert_eq!(
        (data.format, data.max_length, data.packing, data.shuffle),
        (Format::Auto, 512, true, true)
    );
    assert_eq!(
        (data.on_bad_record, data.txt_unit),
        (OnBadRecord::Stop, TxtUnit::Paragraph)
    );
}

/// The values of the design's section 6, typed off by hand.
#[test]
fn defaults_of_training_energy_and_report_are_as_designed() {
    let recipe = read(SMALLEST);
    let train = &recipe.train;
    assert_eq!(train.length, Length::Steps(5));
    assert_eq!(train.micro_batch_size, 8);
    assert_eq!(train.gradient_accumulation_steps, 1);
    assert_eq!(
        (train.learning_rate, train.schedule, train.warmup),
        (2e-4, Decay::Linear, Warmup::Ratio(0.03))
    );
    assert_eq!(
        (train.adam_beta1, train.adam_beta2, train.adam_epsilon),
        (0.9, 0.999, 1e-8)
    );
    assert_eq!(
        (
            train.weight_decay,
            train.max_grad_norm,
            train.eval_every,
            train.save_every
        ),
        (0.0, 1.0, 50, 50)
    );
    assert_eq!(
        (
            train.save_total_limit,
            train.keep_best,
            train.activation_checkpointing
        ),
        (3, true, Checkpointing::Auto)
    );
    assert_eq!(recipe.budget, Limits::default());
    let energy = &recipe.energy;
    assert_eq!(
        (&energy.device, energy.meter, energy.grid.to_string()),
        (&DeviceRef::Auto, None, "world".to_string())
    );
    assert_eq!(
        (energy.pue, &energy.price, recipe.baseline.from_scratch),
        (Pue::ONE, &None, Compared::Counted)
    );
    let baseline = &recipe.baseline;
    assert_eq!(
        (baseline.full_fine_tuning, baseline.energy_multiple),
        (Compared::Counted, 3.0)
    );
    assert_eq!((baseline.learning_rate, baseline.budget), (None, None));
    let report = &recipe.report;
    assert_eq!(report.prompt_tokens, 256);
    assert_eq!(report.generated_tokens, 128);
    assert_eq!(report.few_shot_examples, 5);
    assert_eq!(
        (report.requests_per_day, &report.larger_model),
        (None, &None)
    );
}

#[test]
fn ids_and_paths_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("owner/local")).unwrap();
    std::fs::write(folder.path().join("records"), "").unwrap();
    let recipe = folder.path().join("r.toml");
    let device = |name: &str| {
        parse(SMALLEST, &recipe, &[format!("energy.device={name}")])
            .unwrap()
            .energy
            .device
    };
    let named = |name: &str, cores| DeviceRef::Named {
        name: name.into(),
        cores,
    };
    assert_eq!(
        device("NVIDIA A10 / A10G"),
        named("NVIDIA A10 / A10G", None)
    );
    assert_eq!(device("raspberry-pi-5@2"), named("raspberry-pi-5", Some(2)));
    assert_eq!(
        device("mine.toml"),
        DeviceRef::File(folder.path().join("mine.toml"))
    );
    let model = |id: &str| {
        let recipe = parse(SMALLEST, &recipe, &[format!("model.id={id}")])
            .unwrap_or_else(|error| panic!("{error}"));
        recipe.model.id
    };
    let data = |train: &str| {
        parse(SMALLEST, &recipe, &[format!("data.train={train}")])
            .unwrap()
            .data
            .train
    };
    assert_eq!(model("gpt2"), ModelId::Hub("gpt2".into()));
    assert_eq!(
        model("HuggingFaceTB/SmolLM2-135M"),
        ModelId::Hub("HuggingFaceTB/SmolLM2-135M".into())
    );
    assert_eq!(
        model("owner/local"),
        ModelId::Directory(folder.path().join("owner/local"))
    );
    assert_eq!(
        model("./later"),
        ModelId::Directory(folder.path().join("later"))
    );
    assert_eq!(model("/models/m"), ModelId::Directory("/models/m".into()));
    assert_eq!(
        model("~/m"),
        ModelId::Directory(std::env::home_dir().unwrap().join("m"))
    );
    assert_eq!(
        data("sub/train.CSV"),
        DataSource::Files(vec![folder.path().join("sub/train.CSV")])
    );
    assert_eq!(
        data("records"),
        DataSource::Files(vec![folder.path().join("records")])
    );
    assert_eq!(
        data("tatsu-lab/alpaca"),
        DataSource::Hub {
            id: "tatsu-lab/alpaca".into(),
            split: "train".into()
        }
    );
    assert_eq!(
        data("GEM/e2e_nlg:test"),
        DataSource::Hub {
            id: "GEM/e2e_nlg".into(),
            split: "test".into()
        }
    );
}

#[test]
fn a_relative_recipe_gives_absolute_paths() {
    let recipe = parse(SMALLEST, Path::new("sub/demo.toml"), &[]).unwrap();
    assert_eq!(
        recipe.data.train,
        DataSource::Files(vec![
            std::env::current_dir().unwrap().join("sub/train.jsonl")
        ])
    );
}

#[test]
fn overrides_are_read_as_toml_or_else_as_text() {
    let recipe = with(
        SMALLEST,
        &[
            "train.steps=7",
            "train.steps = 9",
            "budget.energy=5 Wh",
            "budget.flops=1e15",
            "model.revision=1234567",
            "adapter.target_modules=[\"q_proj\", \"v_proj\"]",
            "adapter.rank_pattern.\"layers\\\\.0=?.*\"=4",
            "adapter.lora_alpha=8",
            "energy.grid=FR",
            "name=one=two",
        ],
    )
    .unwrap();
    let Adapter::Lora(lora) = &recipe.adapter else {
        panic!("LoRA")
    };
    assert_eq!(recipe.train.length, Length::Steps(9));
    assert_eq!(
        (recipe.budget.energy, recipe.budget.flops),
        (Some(Joules(18_000.0)), Some(Flops(1e15)))
    );
    assert_eq!(
        (recipe.model.revision.as_str(), recipe.name.as_str()),
        ("1234567", "one=two")
    );
    assert_eq!(
        lora.config.target_modules,
        Targets::Names(vec!["q_proj".into(), "v_proj".into()])
    );
    assert_eq!(
        lora.config.rank_pattern,
        [("layers\\.0=?.*".to_string(), 4)]
    );
    assert_eq!(
        (lora.config.lora_alpha, recipe.energy.grid.to_string()),
        (8.0, "FR".to_string())
    );
}

#[test]
fn an_override_replaces_the_files_value() {
    let mistaken = SMALLEST.replace("steps = 5", "steps = 0");
    assert!(with(&mistaken, &[]).is_err());
    assert_eq!(
        with(&mistaken, &["train.steps=3"]).unwrap().train.length,
        Length::Steps(3)
    );
}

#[test]
fn an_empty_recipe_lists_every_missing_key() {
    insta::assert_snapshot!(
        parse("", Path::new("empty.toml"), &[])
            .unwrap_err()
            .to_string()
    );
}

#[test]
fn overrides_are_checked_and_named_in_diagnostics() {
    for (text, expected) in [
        (
            "train.lerning_rate=1",
            "did you mean `--set train.learning_rate=...`?",
        ),
        ("steps=5", "did you mean `--set train.steps=...`?"),
        ("train.steps=0", "a whole number of at least 1"),
        ("train.steps=ten", "`train.steps` cannot be text"),
        (
            "train.epochs=1.0",
            "`train.steps` and `train.epochs` cannot both be given (the other one is at line 6)",
        ),
        ("model.dtype=bf8", "did you mean \"bf16\"?"),
        ("train.steps", "write KEY=VALUE"),
        (
            "adapter.target_modules=[q_proj,v_proj]",
            "this value is not TOML",
        ),
        (
            "train=5",
            "`train` is a whole number where a table is needed",
        ),
    ] {
        let message = with(SMALLEST, &[text]).unwrap_err();
        assert!(
            message.contains(expected) && message.contains(&format!("at --set {text}\n")),
            "{text}:\n{message}"
        );
    }
}

#[test]
fn given_keys_are_recorded_with_init_from() {
    let text = format!("{SMALLEST}[adapter]\ninit_from = \"old\"\nr = 8\n");
    let recipe = read(&text);
    let Adapter::Lora(lora) = &recipe.adapter else {
        panic!("LoRA")
    };
    assert_eq!(
        (lora.init_from.as_deref(), &lora.written),
        (Some(Path::new("/demo/old")), &vec!["r".to_string()])
    );
    // Written out, the defaults would contradict the adapter on the next reading.
    let resolved = recipe.to_toml();
    assert!(
        resolved.contains("\nr = 8 ") && resolved.contains("\n# lora_alpha = 32.0 "),
        "{resolved}"
    );
    assert_eq!(read(&resolved), recipe);
}

#[test]
fn patterns_keep_the_files_order() {
    let text = format!("{SMALLEST}[adapter.rank_pattern]\nz_proj = 1\na_proj = 2\nm_proj = 3\n");
    let Adapter::Lora(lora) = read(&text).adapter else {
        panic!("LoRA")
    };
    assert_eq!(
        lora.config.rank_pattern,
        [
            ("z_proj".to_string(), 1),
            ("a_proj".to_string(), 2),
            ("m_proj".to_string(), 3)
        ]
    );
}

#[test]
fn a_resolved_recipe_shows_every_default() {
    insta::assert_snapshot!(read(SMALLEST).to_toml());
}

#[test]
fn the_starter_is_a_valid_recipe() {
    insta::assert_snapshot!(starter());
    let recipe = read(&starter());
    assert_eq!(
        recipe.model.id,
        ModelId::Hub("HuggingFaceTB/SmolLM2-135M".into())
    );
    assert_eq!(
        (recipe.train.length, recipe.budget.energy),
        (Length::Steps(200), Some(Joules(18_000.0)))
    );
    // Each commented line is a line that could stand there, but for what excludes another.
    let optional = [
        "epochs",
        "warmup_steps",
        "validation_fraction",
        "layers_to_transform",
    ];
    let everything: Vec<&str> = starter()
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest)
                if rest.contains(" = ") && !optional.iter().any(|key| rest.starts_with(key)) =>
            {
                rest.to_string()
            }
            _ => line.to_string(),
        })
        .map(|line| &*line.leak())
        .collect();
    read(&everything.join("\n"));
}

#[test]
fn the_schema_describes_every_key_and_no_other() {
    let schema = json_schema();
    let train = &schema["properties"]["train"];
    assert_eq!(
        schema["$schema"],
        "https://json-schema.org/draft/2020-12/schema"
    );
    assert_eq!(train["properties"]["adam_beta1"]["exclusiveMaximum"], 1.0);
    assert_eq!(
        train["properties"]["schedule"]["enum"],
        serde_json::json!(["linear", "cosine", "constant"])
    );
    assert_eq!(
        schema["properties"]["model"]["required"],
        serde_json::json!(["id"])
    );
    for (name, table) in schema["properties"].as_object().unwrap() {
        assert!(table["description"].is_string(), "{name}");
        let Some(keys) = table["properties"].as_object() else {
            continue;
        };
        assert_eq!(table["additionalProperties"], false, "{name}");
        for (key, schema) in keys {
            assert!(
                schema["description"].is_string() && (schema["default"] != schema["examples"]),
                "{name}.{key}"
            );
        }
    }
    let energy = schema["properties"]["budget"]["properties"]["energy"]["pattern"]
        .as_str()
        .unwrap();
    let pattern = regex::Regex::new(energy).unwrap();
    assert!(
        pattern.is_match("5 Wh")
            && pattern.is_match("1.5e3kJ")
            && !pattern.is_match("5")
            && !pattern.is_match("5 Whx")
    );
}

#[test]
fn unreadable_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.toml");
    let refused = |path: &Path| load(path, &[]).unwrap_err();
    let missing = refused(&path);
    assert_eq!(
        (
            missing.kind(),
            missing.remedy().unwrap().contains("recipe init")
        ),
        (Kind::Io, true)
    );
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert_eq!(refused(&path).kind(), Kind::Recipe);
    std::fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(refused(&path).to_string().contains("too long"));
    std::fs::write(&path, "").unwrap();
    assert!(refused(&path).to_string().contains("line 1, column 1"));
}

/// `UPDATE_DOCS=1 cargo test --test recipe` writes the file anew.
#[test]
fn the_reference_in_docs_is_the_generated_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipe.md");
    let generated = reference();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "docs/recipe.md is out of date: run `UPDATE_DOCS=1 cargo test --test recipe`"
    );
    for key in ["`learning_rate`", "`[budget]`", "`target_modules`"] {
        assert!(generated.contains(key), "{key}");
    }
}

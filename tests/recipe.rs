//! The recipe from outside: every bad one is refused with a place and a remedy, every good one survives being written out.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use wattune::adapter::LoraConfig;
use wattune::adapter::options::{Bias, LoraInit, TokenIndices};
use wattune::energy::{DeviceRef, Limits, MeterKind};
use wattune::error::Kind;
use wattune::recipe::*;
use wattune::units::{Flops, GramsCo2e, Joules, Money, Per, Price, Pue, Seconds};
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

fn quantity() -> impl Strategy<Value = f64> {
    prop_oneof![1e-6..1e18f64, (1u32..1000).prop_map(f64::from)]
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z][a-z0-9_]{0,8}", Just("q\"u'o\\t\ne #=.é".to_string())]
}

fn targets() -> impl Strategy<Value = Targets> {
    prop_oneof![
        prop::collection::vec(word(), 1..3).prop_map(Targets::Names),
        Just(Targets::Regex(
            r"model\.layers\.[0-3]\..*(?<!up)_proj".to_string()
        )),
    ]
}

prop_compose! {
    fn lora()(
        (r, lora_alpha, lora_dropout, use_rslora) in (1usize..999, quantity(), 0.0..1.0f64, any::<bool>()),
        target_modules in prop_oneof![Just(Targets::AllLinear), targets()],
        exclude_modules in prop::option::of(targets()),
        ranks in prop::collection::btree_map("[a-z_.]{1,9}", 1usize..99, 0..3),
        alphas in prop::collection::btree_map("[a-z_.]{1,9}", quantity(), 0..3),
        layers in prop::option::of(prop::collection::vec(0usize..99, 1..4)),
        modules_to_save in prop::collection::vec("[a-z_.]{1,9}", 0..3),
        (ensure_weight_tying, use_dora, portable) in any::<(bool, bool, bool)>(),
        bias in prop::sample::select(vec![Bias::None, Bias::All, Bias::LoraOnly]),
        init_from in prop::option::of(word().prop_map(|name| Path::new("/a b").join(name))),
        loraplus_lr_ratio in prop::option::of(quantity()),
        tokens in prop::option::of(prop::collection::btree_map(word(), prop::collection::vec(0u32..99, 1..4), 1..3)),
        init_lora_weights in prop::sample::select(vec![LoraInit::Default, LoraInit::Olora, LoraInit::PissaNiter(3)]),
        written in prop::sample::subsequence(vec!["r", "lora_alpha", "use_rslora"], 0..=3),
    ) -> Lora {
        let names = matches!(target_modules, Targets::Names(_));
        let config = LoraConfig {
            r, lora_alpha, lora_dropout, target_modules, exclude_modules, use_rslora,
            rank_pattern: ranks.into_iter().rev().collect(),
            alpha_pattern: alphas.into_iter().collect(),
            layers_to_transform: layers.filter(|_| names),
            layers_pattern: Vec::new(), init_lora_weights, modules_to_save, trainable_token_indices: tokens.map(TokenIndices::ByModule),
            ensure_weight_tying, use_dora, bias, lora_bias: false,
        };
        let mut lora = Lora { config, loraplus_lr_ratio, portable, init_from, written: Vec::new() };
        if lora.init_from.is_some() {
            // What the recipe did not write is the default.
            let chosen = |name| written.contains(&name);
            lora.config = LoraConfig {
                r: if chosen("r") { r } else { 16 },
                lora_alpha: if chosen("lora_alpha") { lora_alpha } else { 32.0 },
                lora_dropout: 0.0,
                use_rslora: chosen("use_rslora") && use_rslora,
                target_modules: Targets::AllLinear, exclude_modules: None, rank_pattern: vec![], alpha_pattern: vec![],
                ..LoraConfig::default()
            };
            lora.written = written.iter().map(|name| name.to_string()).collect();
        }
        lora
    }
}

prop_compose! {
    fn data()(
        train in prop_oneof![
            word().prop_map(|name| DataSource::Files(vec![Path::new("/d").join(name)])),
            "[a-z]{1,5}".prop_map(|split| DataSource::Hub { id: "owner/name".into(), split }),
        ],
        validation in prop_oneof![
            Just(Validation::None),
            (1e-9..1.0f64).prop_map(Validation::Fraction),
            Just(Validation::Source(DataSource::Files(vec!["/v.csv".into()]))),
        ],
        columns in prop::option::of(word()),
        (max_length, packing, shuffle) in (2usize..9999, any::<bool>(), any::<bool>()),
    ) -> Data {
        Data {
            train, validation, max_length, packing, shuffle, labels: vec!["no".into(), "yes".into()],
            chat_date: "2026-01-31".parse().ok(), format: Format::Alpaca, on_bad_record: OnBadRecord::Skip, txt_unit: TxtUnit::File,
            prompt_template: Some(PromptTemplate::Text { before: "Q: ".into(), after: "\n".into() }),
            columns: columns.map(|column| vec![("prompt".into(), column.clone()), ("completion".into(), column)]).unwrap_or_default(),
        }
    }
}

prop_compose! {
    fn train()(
        length in prop_oneof![(1u64..1 << 32).prop_map(Length::Steps), quantity().prop_map(Length::Epochs)],
        warmup in prop_oneof![(0u64..99).prop_map(Warmup::Steps), (0.0..1.0f64).prop_map(Warmup::Ratio)],
        (learning_rate, adam_epsilon, adam_beta1, adam_beta2) in (1e-9..1.0f64, 1e-12..1.0f64, 0.0..1.0f64, 0.0..1.0f64),
        (weight_decay, max_grad_norm, eval_every, keep_best) in (0.0..9.0f64, 0.0..9.0f64, 0u64..999, any::<bool>()),
        activation_checkpointing in prop_oneof![Just(Checkpointing::Never), (0usize..99).prop_map(Checkpointing::Blocks)],
    ) -> Train {
        Train {
            length, warmup, learning_rate, adam_epsilon, adam_beta1, adam_beta2, weight_decay, max_grad_norm, eval_every, keep_best,
            micro_batch_size: 3, gradient_accumulation_steps: 5, schedule: Decay::Cosine, save_every: 7, save_total_limit: 9,
            activation_checkpointing,
        }
    }
}

prop_compose! {
    fn budget_and_energy()(
        energy in prop::option::of(quantity().prop_map(Joules)),
        carbon in prop::option::of(quantity().prop_map(GramsCo2e)),
        flops in prop::option::of(quantity().prop_map(Flops)),
        time in prop::option::of(quantity().prop_map(Seconds)),
        (amount, price, per_hour) in (prop::option::of(quantity()), quantity(), any::<bool>()),
        (pue, grid) in (1.0..9.0f64, prop_oneof![Just("FR"), Just("12.5")]),
    ) -> (Limits, Energy) {
        let money = |amount| Money { amount, currency: "EUR".into() };
        let price = Price { money: money(price), per: if per_hour { Per::DeviceHour } else { Per::KilowattHour } };
        let budget = Limits { energy, carbon, flops, time, cost: amount.map(money) };
        let energy = Energy { device: DeviceRef::Auto, meter: Some(MeterKind::Timed), grid: grid.parse().unwrap(), pue: Pue::new(pue).unwrap(), price: Some(price) };
        (budget, energy)
    }
}

prop_compose! {
    fn recipe()(
        seed in 0u64..=i64::MAX as u64,
        adapter in prop_oneof![1 => Just(Adapter::None), 9 => lora().prop_map(Adapter::Lora)],
        id in prop_oneof![
            Just(ModelId::Hub("owner/name".into())),
            word().prop_map(|name| ModelId::Directory(Path::new("/m").join(name))),
            Just(ModelId::Embedded("tiny".into())),
        ],
        (revision, data, train, (budget, energy)) in (word(), data(), train(), budget_and_energy()),
        (learning_rate, cap, requests_per_day) in
            (prop::option::of(quantity()), prop::option::of(quantity().prop_map(Joules)), prop::option::of(quantity())),
        (energy_multiple, larger) in (1.0..9.0f64, prop::option::of(prop_oneof![Just("7B"), Just("Qwen/Qwen2.5-0.5B"), Just("1.5e9")])),
    ) -> Recipe {
        let quantization = if adapter == Adapter::None { Quantization::None } else { Quantization::Q8_0 };
        let (from_scratch, full_fine_tuning) = (Compared::Off, Compared::Counted);
        Recipe {
            name: "a run".into(), seed, adapter, data, train, budget, energy,
            model: Model { id, revision, file: Some("q8_0.gguf".into()), dtype: Precision::Bf16, init: Init::Random, task: Task::CausalLm, quantization },
            baseline: Baseline { from_scratch, full_fine_tuning, energy_multiple, learning_rate, budget: cap },
            report: Report {
                requests_per_day, prompt_tokens: 7, generated_tokens: 9, few_shot_examples: 3, larger_model: larger.and_then(LargerModel::parse),
            },
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a recipe holds, written out and read back it is the same, to the last bit of every number.
    #[test]
    fn a_recipe_survives_being_written_out(recipe in recipe()) {
        let text = recipe.to_toml();
        let again = parse(&text, Path::new("/elsewhere/recipe.toml"), &[]);
        prop_assert_eq!(again.map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?, recipe);
    }

    /// No text is a reason to crash.
    #[test]
    fn no_text_crashes_the_reader(text in "[\\[\\]{}a-z_=.\"'# \n\t0-9é-]{0,80}", set in "\\PC{0,30}") {
        let _ = parse(&text, Path::new("r.toml"), std::slice::from_ref(&set));
        let _ = parse(SMALLEST, Path::new("r.toml"), &[set]);
    }
}

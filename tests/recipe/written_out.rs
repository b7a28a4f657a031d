//! Random recipes, written out and read back.

use std::path::Path;

use proptest::prelude::*;
use wattune::adapter::LoraConfig;
use wattune::adapter::options::{Bias, LoraInit, TokenIndices};
use wattune::energy::{DeviceRef, Limits, MeterKind};
use wattune::recipe::*;
use wattune::units::{Flops, GramsCo2e, Joules, Money, Per, Price, Pue, Seconds};
use wattune::work::Precision;

use super::SMALLEST;

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
            class_weights: vec![("yes".into(), 2.5), ("no (C++)".into(), 0.1)],
            micro_batch_size: 3, gradient_accumulation_steps: 5, schedule: Decay::Cosine, save_every: 7, save_total_limit: 9,
            activation_checkpointing, early_stopping: None, early_stopping_gain: 0.0,
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
            model: Model { id, revision, file: Some("q8_0.gguf".into()), dtype: Precision::Bf16, init: Init::Random, task: Task::CausalLm, problem_type: ProblemType::MultiLabelClassification, quantization },
            baseline: Baseline { from_scratch, full_fine_tuning, energy_multiple, learning_rate, budget: cap },
            report: Report {
                requests_per_day, prompt_tokens: 7, generated_tokens: 9, batch: 2, few_shot_examples: 3, larger_model: larger.and_then(LargerModel::parse),
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

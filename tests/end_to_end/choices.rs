//! A plan's table of choices: each row is what the plan of that choice would say.

use serde_json::Value;

use super::lab::{Lab, microjoules, number, says, set, word};

fn row<'a>(plan: &'a Value, choice: &str) -> &'a Value {
    let rows = plan["choices"].as_array().unwrap();
    rows.iter()
        .find(|row| row["choice"] == choice)
        .unwrap_or_else(|| panic!("no row `{choice}` in {rows:#?}"))
}

#[test]
fn every_row_is_what_the_plan_of_that_choice_says() {
    let lab = Lab::new();
    // Two rows to a step and four steps: each step is in the sample, so that a row is exact.
    let plan = lab.plan(&[]);
    let rows = plan["choices"].as_array().unwrap();
    assert!(rows[0]["own"] == true && rows[1..].iter().all(|row| row["own"] == false));
    assert_eq!(
        (
            number(&rows[0], "/ratio"),
            rows[0]["peak_bytes"] == plan["memory"]["peak_bytes"]
        ),
        (1.0, true)
    );
    assert_eq!(
        microjoules(&rows[0]["same_tokens_j"]),
        microjoules(&plan["energy"]["by_phase"]["train"])
    );
    let kinds: std::collections::BTreeSet<&str> =
        rows.iter().map(|row| word(row, "/kind")).collect();
    let wanted = [
        "activation_checkpointing",
        "device",
        "dtype",
        "layers",
        "rank",
        "recipe",
        "targets",
        "trained",
    ];
    assert!(wanted.iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
    // A plan with a shorter `max_length` cuts records and has fewer tokens: see the packed rows below.
    let settable = |row: &&Value| {
        word(row, "/kind") != "max_length"
            && row["set"].as_array().is_some_and(|set| !set.is_empty())
    };
    for row in rows.iter().filter(settable) {
        let keys: Vec<String> = row["set"]
            .as_array()
            .unwrap()
            .iter()
            .map(|key| key.as_str().unwrap().to_string())
            .collect();
        let of_choice = lab.plan(&keys);
        let expected = number(&of_choice, "/energy/by_phase/train");
        assert!(
            (number(row, "/same_tokens_j") / expected - 1.0).abs() < 1e-6,
            "{row}: the plan says {expected} J"
        );
        assert!(
            (number(row, "/step_j") / (expected / 4.0) - 1.0).abs() < 1e-6,
            "{row}"
        );
        assert_eq!(
            row["peak_bytes"], of_choice["memory"]["peak_bytes"],
            "{row}"
        );
        assert_eq!(
            row["trainable_parameters"], of_choice["adapter"]["trainable_parameters"],
            "{row}"
        );
    }
    // What no key of LoRA beside it would let `--set` say: the same model without its adapter.
    lab.edit("r = 2\nlora_alpha = 6\n", "type = \"none\"\n");
    let whole = lab.plan(&[]);
    let expected = number(&whole, "/energy/by_phase/train");
    assert!(
        (number(row(&plan, "every weight trained"), "/same_tokens_j") / expected - 1.0).abs()
            < 1e-6
    );
    assert_eq!(
        row(&plan, "every weight trained")["peak_bytes"],
        whole["memory"]["peak_bytes"]
    );
}

#[test]
fn a_rank_costs_what_it_does_by_hand() {
    // embedded:tiny: hidden 128, queries 128, keys and values 64, MLP 352, 4 layers. Of each layer in + out: q 256, k 192, v 192, o 256, gate,
    // up and down 480 each: 2336. One more rank on all of them is, for each token, 2 (in + out) forward, and backward 2 out for dy B, 2 out for
    // dB, 2 in for dA and 2 in for dx: 6 (in + out). The inputs of the first layer's q, k and v need no dx: 3 times 2 * 128 less.
    // 6 * 4 * 2336 - 768 = 55 296.
    let lab = Lab::new();
    let plan = lab.plan(&[]);
    let tokens = number(&plan, "/training/tokens");
    let flops = |choice: &str| number(row(&plan, choice), "/same_tokens_flops");
    assert_eq!(flops("rank 8") - flops("rank 4"), 4.0 * 55_296.0 * tokens);
    assert_eq!(
        flops("rank 64") - flops("this recipe"),
        62.0 * 55_296.0 * tokens
    );
    // A and B of one rank are 4 * 2336 numbers: values, two moments and gradients in f32; and x A^T of 28 adapters is kept. Of a token a block
    // keeps, in f32: input and x1 2 * 128, q and mix 2 * 128, k and v 2 * 64, gate and up 2 * 352, and 7 adapters of rank 2: 1358 numbers.
    let bytes = |choice: &str| number(row(&plan, choice), "/peak_bytes");
    let tokens = number(&plan, "/memory/activations") / (4.0 * 4.0 * 1358.0);
    assert!(
        tokens.fract() == 0.0 && (1.0..=128.0).contains(&tokens),
        "{tokens} tokens in two rows of at most 64"
    );
    let (trained, kept) = (4.0 * 4.0 * 2336.0 * 16.0, 4.0 * 28.0 * 4.0 * tokens);
    // An eighth of what is kept is lost to the allocator.
    assert_eq!(
        bytes("rank 8") - bytes("rank 4"),
        trained + kept + kept / 8.0
    );
    // q and v alone, rank 2: 4 layers of 2 * (256 + 192) numbers.
    assert_eq!(
        row(&plan, "targets q_proj, v_proj")["trainable_parameters"],
        4 * 2 * 448
    );
}

#[test]
fn longer_and_shorter_rows_are_close_to_their_plan() {
    // Packed rows: filled in order here, by best fit in the plan of the choice.
    let lab = Lab::new();
    lab.edit("packing = false", "packing = true");
    let keys = set(&["train.epochs=1.0", "data.max_length=128"]);
    lab.edit("steps = 4\n", "");
    let plan = lab.plan(&keys);
    let tokens = number(&plan, "/training/tokens");
    for length in [64, 256] {
        let of_choice = lab.plan(&set(&[
            "train.epochs=1.0",
            &format!("data.max_length={length}"),
        ]));
        let expected = number(&of_choice, "/energy/by_phase/train") * tokens
            / number(&of_choice, "/training/tokens");
        let ratio = number(
            row(&plan, &format!("max_length {length}")),
            "/same_tokens_j",
        ) / expected;
        assert!((ratio - 1.0).abs() < 0.05, "max_length {length}: {ratio}");
    }
}

#[test]
fn the_table_marks_the_recipes_row() {
    let lab = Lab::new();
    let output = lab.output(&["plan", "recipe.toml", "--set", "energy.price=0.3 USD/kWh"]);
    let page = String::from_utf8(output.stdout).unwrap();
    says(
        &page,
        &[
            ">  this recipe",
            "\n   rank 4",
            "attention only",
            "layers 2 to 3 of 4",
            "device nvidia-t4",
            "cost",
        ],
    );
    // Every row of the table ends in the same column.
    let table: Vec<&str> = page
        .lines()
        .skip_while(|line| !line.starts_with("   choice"))
        .filter(|line| !line.is_empty())
        .collect();
    let rows: Vec<&&str> = table
        .iter()
        .take_while(|line| !line.contains("warning"))
        .collect();
    assert!(
        rows.len() > 15
            && rows
                .iter()
                .all(|line| line.chars().count() == rows[0].chars().count()),
        "{page}"
    );
    assert!(rows[0].chars().count() <= 100);
}

#[test]
fn the_plan_says_what_computing_activations_again_costs_and_saves() {
    let lab = Lab::new();
    let with = |word: &str| lab.plan(&set(&[&format!("train.activation_checkpointing={word}")]));
    let (kept, two, all) = (with("never"), with("2"), with("always"));
    for (plan, blocks) in [(&kept, 0), (&two, 2), (&all, 4)] {
        assert_eq!(
            (
                &plan["recomputation"]["blocks"],
                &plan["recomputation"]["of"]
            ),
            (&blocks.into(), &4.into())
        );
        let more = |key: &str| {
            microjoules(plan.pointer(key).unwrap()) - microjoules(kept.pointer(key).unwrap())
        };
        assert_eq!(
            microjoules(&plan["recomputation"]["energy_j"]),
            more("/energy/by_phase/train")
        );
        let difference = |key: &str| number(plan, key) - number(&kept, key);
        assert_eq!(
            number(plan, "/recomputation/flops"),
            difference("/energy/flops")
        );
        assert_eq!(
            number(plan, "/recomputation/saved_bytes"),
            -difference("/memory/peak_bytes")
        );
    }
    // Blocks are alike: two of four cost half of what all do.
    assert_eq!(
        2.0 * number(&two, "/recomputation/flops"),
        number(&all, "/recomputation/flops")
    );
    assert!(
        number(&two, "/recomputation/flops") > 0.0
            && number(&two, "/recomputation/saved_bytes") > 0.0
    );
    // The run's own recipe holds the number, and the page says it in words.
    assert_eq!(two["training"]["activation_checkpointing"], 2);
    let page = lab
        .output(&[
            "plan",
            "recipe.toml",
            "--set",
            "train.activation_checkpointing=2",
        ])
        .stdout;
    says(
        &String::from_utf8(page).unwrap(),
        &["less by activation checkpointing in 2 of 4 blocks, for "],
    );
    // Where the walk ends half way up, two blocks are all there are.
    let upper = set(&[
        "adapter.target_modules=[\"q_proj\"]",
        "adapter.layers_to_transform=[2, 3]",
        "train.activation_checkpointing=2",
    ]);
    assert_eq!(lab.plan(&upper)["recomputation"]["of"], 2);
    let three = [
        "adapter.target_modules=[\"q_proj\"]",
        "adapter.layers_to_transform=[2, 3]",
        "train.activation_checkpointing=3",
    ];
    let message = lab.refused(
        2,
        &[
            &["plan", "recipe.toml"],
            &super::lab::flags(&set(&three))[..],
        ]
        .concat(),
    );
    says(
        &message,
        &["train.activation_checkpointing", "3", "at most 2", "always"],
    );
}

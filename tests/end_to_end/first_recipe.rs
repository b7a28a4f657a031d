//! `recipe init --model --data` and `recipe import`: what is written is accepted by the plan.

use crate::common;
use crate::lab::Lab;

/// What a command that must succeed prints.
fn succeeded(lab: &Lab, arguments: &[&str]) -> String {
    let output = lab.output(arguments);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_recipe_for_a_model_and_data_gives_its_reasons_and_is_accepted() {
    let lab = Lab::new();
    let init = [
        "recipe",
        "init",
        "new.toml",
        "--model",
        "embedded:tiny",
        "--data",
        "train.jsonl",
        "--budget",
        "5 Wh",
    ];
    let said = succeeded(&lab, &init);
    assert!(said.contains("wattune train new.toml"), "{said}");
    let recipe = String::from_utf8(lab.read("new.toml")).unwrap();
    for (reason, line) in [
        (
            "# Given: training stops before it is passed",
            "energy = \"5 Wh\"",
        ),
        (
            "# The records have the fields prompt, completion",
            "format = \"completion\"",
        ),
        (
            "# Found beside the training records",
            "validation = \"validation.jsonl\"",
        ),
    ] {
        assert!(recipe.contains(&format!("{reason}\n{line}\n")), "{recipe}");
    }
    // 24 records: a step of one row, and three readings of them.
    assert!(
        recipe.contains("micro_batch_size = 1\n") && recipe.contains("epochs = 3.0\n"),
        "{recipe}"
    );
    let plan = lab.json(&["plan", "new.toml"]);
    assert_eq!(plan["data"]["truncated"], 0);
    assert_eq!(plan["training"]["stop_reason"], "epochs");
    lab.refused(2, &init);
}

#[test]
fn a_budget_that_holds_no_step_writes_nothing() {
    let lab = Lab::new();
    let init = [
        "recipe",
        "init",
        "new.toml",
        "--model",
        "embedded:tiny",
        "--data",
        "train.jsonl",
        "--budget",
        "1 mJ",
    ];
    let said = lab.refused(2, &init);
    assert!(
        said.contains("budget.energy") && !lab.path("new.toml").exists(),
        "{said}"
    );
}

#[test]
fn chat_records_with_weights_are_imported() {
    let lab = Lab::new();
    let line = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]}"#;
    lab.write("chat.jsonl", &format!("{line}\n"));
    let said = lab.refused(2, &["recipe", "import", "chat.jsonl"]);
    assert!(
        said.contains("name no model") && said.contains("--model"),
        "{said}"
    );
}

/// Real data and a real model.
#[test]
fn real_data_sets_are_described() {
    let Some(assets) = common::assets("real_data_sets_are_described") else {
        return;
    };
    let lab = Lab::new();
    let model = assets.join("models/TinyStories-656K").display().to_string();
    let data = |name: &str| assets.join("datasets").join(name).display().to_string();
    for (name, expected) in [
        ("e2e_nlg/valid.jsonl", "format = \"completion\""),
        ("gsm8k/test.jsonl", "format = \"completion\""),
        ("mlx_wikisql/valid.jsonl", "format = \"text\""),
        ("llamafactory/alpaca_en_demo.json", "format = \"alpaca\""),
        ("SST-2/dev.tsv", "columns = { text = \"sentence\" }"),
    ] {
        let path = lab.path("new.toml");
        let _ = std::fs::remove_file(&path);
        succeeded(
            &lab,
            &[
                "recipe",
                "init",
                "new.toml",
                "--model",
                &model,
                "--data",
                &data(name),
            ],
        );
        let recipe = String::from_utf8(lab.read("new.toml")).unwrap();
        assert!(recipe.contains(expected), "{name}: {recipe}");
        lab.json(&["plan", "new.toml"]);
    }
}

/// 24 records with another copy of the first, whose text is a validation record too.
#[test]
fn data_shows_masks_lengths_and_duplicates() {
    let lab = Lab::new();
    let train = String::from_utf8(lab.read("train.jsonl")).unwrap();
    let first = train.lines().next().unwrap();
    lab.write("train.jsonl", &format!("{train}{first}\n"));
    lab.write("validation.jsonl", &format!("{first}\n"));
    let found = lab.json(&["data", "recipe.toml", "--show", "2", "--html", "page.html"]);
    assert_eq!(found["train"]["records"], 25);
    let repeated = serde_json::json!({ "in_train": 1, "validation_in_train": 1 });
    assert_eq!(found["duplicates"], repeated);
    let bars = found["train"]["lengths"].as_array().unwrap();
    let examples: u64 = bars
        .iter()
        .map(|bar| bar["examples"].as_u64().unwrap())
        .sum();
    assert_eq!(examples, 25);
    let shown = found["train"]["shown"].as_array().unwrap();
    assert_eq!([&shown[0]["number"], &shown[1]["number"]], [1, 13]);
    let record: serde_json::Value = serde_json::from_str(first).unwrap();
    let text = |loss: bool| -> String {
        let pieces = shown[0]["pieces"].as_array().unwrap().iter();
        let of_mask = pieces.filter(|piece| piece["loss"] == loss);
        of_mask
            .map(|piece| piece["text"].as_str().unwrap())
            .collect()
    };
    let word = |key: &str| record[key].as_str().unwrap().trim();
    assert!(text(false).contains(word("prompt")), "{}", text(false));
    assert!(text(true).contains(word("completion")), "{}", text(true));
    let page = String::from_utf8(lab.read("page.html")).unwrap();
    assert!(
        page.contains("<mark>") && !page.contains("<script"),
        "{page}"
    );
    // Not a terminal: no escape sequences.
    let said = succeeded(&lab, &["data", "recipe.toml"]);
    assert!(said.contains('»') && !said.contains('\x1b'), "{said}");
    assert!(said.contains("wattune train recipe.toml"), "{said}");
}

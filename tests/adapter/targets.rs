//! Module selection as PEFT selects, and errors that name the remedy.

use std::path::Path;

use serde_json::Value;
use wattune::adapter::config::PeftConfig;
use wattune::adapter::matching::KeyPattern;
use wattune::adapter::targets::{check_ranks, select, shortest_names};
use wattune::error::Kind;

use super::{golden, modules, settings};

/// Settings that PEFT accepts because a part of them matches.
const STRICTER: [&str; 2] = [
    "a name that matches nothing, beside one that does",
    "rank pattern that matches nothing, beside one that does",
];

#[test]
fn modules_are_selected_as_in_peft() {
    let golden = golden("peft_targets.json");
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 35);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let modules = modules(&golden["modules"][case["model"].as_str().unwrap()]);
        let got = select(&modules, "lm_head", &settings(&case["settings"]));
        if case.get("error").is_some() || STRICTER.contains(&name) {
            assert_eq!(got.expect_err(name).kind(), Kind::Adapter);
            continue;
        }
        let sites = got.unwrap_or_else(|error| panic!("{name}: {error}"));
        let site = |site: &Value| {
            let module = &modules[site[0].as_u64().unwrap() as usize];
            let (r, scaling) = (site[1].as_u64().unwrap(), site[2].as_f64().unwrap());
            (module.path.clone(), r, scaling)
        };
        let expected: Vec<_> = case["sites"].as_array().unwrap().iter().map(site).collect();
        let found: Vec<_> = sites
            .into_iter()
            .map(|site| (site.path, site.r as u64, site.scaling))
            .collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn all_linear_is_shortened_as_in_peft() {
    let golden = golden("peft_targets.json");
    let case = golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .find(|case| case["name"] == "all-linear")
        .unwrap();
    let modules = modules(&golden["modules"]["llama"]);
    let sites = select(&modules, "lm_head", &settings(&case["settings"])).unwrap();
    let paths: Vec<&str> = sites.iter().map(|site| site.path.as_str()).collect();
    let names = shortest_names(&modules, &paths);
    assert_eq!(
        names,
        [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj"
        ]
    );
    let mut sorted = names;
    sorted.sort();
    assert_eq!(Value::from(sorted), case["saved_targets"]);
}

/// A saved configuration selects the same modules when read back by PEFT's rules.
#[test]
fn saved_configurations_select_the_same_sites() {
    let golden = golden("peft_targets.json");
    for case in golden["cases"].as_array().unwrap() {
        let modules = modules(&golden["modules"][case["model"].as_str().unwrap()]);
        let Ok(sites) = select(&modules, "lm_head", &settings(&case["settings"])) else {
            continue;
        };
        let config =
            PeftConfig::for_sites(&settings(&case["settings"]), &sites, &modules, "base", None)
                .unwrap();
        let reread = PeftConfig::parse(&config.to_text(), Path::new("x")).unwrap();
        assert_eq!(
            select(&modules, "lm_head", &reread.settings()).unwrap(),
            sites,
            "{}",
            case["name"]
        );
    }
}

#[test]
fn an_unmatched_name_is_an_error_that_lists_the_names() {
    let modules = modules(&golden("peft_targets.json")["modules"]["llama"]);
    let wrong = settings(&serde_json::json!({
        "target_modules": ["q_proj", "qproj"], "exclude_modules": ["lm_head", "embed_tokens"],
        "rank_pattern": {"upproj": 2}, "alpha_pattern": {"x\\..*": 2}, "layers_to_transform": [0, 12],
    }));
    let text = select(&modules, "lm_head", &wrong).unwrap_err().to_string();
    for unmatched in [
        "`qproj` of `target_modules`",
        "`embed_tokens` of `exclude_modules`",
        "`upproj` of `rank_pattern`",
    ] {
        assert!(text.contains(unmatched), "{text}");
    }
    assert!(
        text.contains("`x\\..*` of `alpha_pattern`")
            && text.contains("`12` of `layers_to_transform`"),
        "{text}"
    );
    assert!(
        text.contains("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"),
        "{text}"
    );
    assert!(
        text.contains("hint: `q_proj` is nearest to `qproj`"),
        "{text}"
    );
    assert!(
        !text.contains("`q_proj` of") && !text.contains("`lm_head` of"),
        "{text}"
    );
}

#[test]
fn illegal_values_are_refused() {
    let modules = modules(&golden("peft_targets.json")["modules"]["llama"]);
    for (keywords, word) in [
        (r#"{"target_modules": ["q_proj"], "r": 0}"#, "`r`"),
        (
            r#"{"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}}"#,
            "rank_pattern",
        ),
        (
            r#"{"target_modules": ["q_proj"], "lora_alpha": 0}"#,
            "lora_alpha",
        ),
        (
            r#"{"target_modules": ["q_proj"], "lora_dropout": 1.0}"#,
            "lora_dropout",
        ),
        (r#"{"target_modules": "(q_proj"}"#, "regular expression"),
        (r#"{"target_modules": []}"#, "no linear layer is left"),
    ] {
        let keywords: Value = serde_json::from_str(keywords).unwrap();
        let text = select(&modules, "lm_head", &settings(&keywords))
            .unwrap_err()
            .to_string();
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_wrong_entry_is_answered_with_what_to_type() {
    let modules = modules(&golden("peft_targets.json")["modules"]["llama"]);
    for (keywords, hint) in [
        (
            r#"{"target_modules": "q_proj"}"#,
            r#"`target_modules = ["q_proj"]`"#,
        ),
        (
            r#"{"target_modules": "q_proj,v_proj"}"#,
            r#"`target_modules = ["q_proj", "v_proj"]`"#,
        ),
        (
            r#"{"target_modules": "q_proj, v_porj"}"#,
            r#"`target_modules = ["q_proj", "v_proj"]`"#,
        ),
        (
            r#"{"target_modules": "(q_proj|v_proj)"}"#,
            r#"`target_modules = ["q_proj", "v_proj"]`"#,
        ),
        (
            r#"{"target_modules": "mlp.up_proj"}"#,
            r#"`target_modules = ["mlp.up_proj"]`"#,
        ),
        (
            r#"{"target_modules": "all_linear"}"#,
            r#"`target_modules = "all-linear"`"#,
        ),
        (
            r#"{"target_modules": "all"}"#,
            r#"`target_modules = "all-linear"`"#,
        ),
        (
            r#"{"target_modules": ["all-linear"]}"#,
            r#"`target_modules = "all-linear"`, without brackets"#,
        ),
        (
            r#"{"target_modules": ["q_proj,v_proj"]}"#,
            r#"["q_proj", "v_proj"]"#,
        ),
        (
            r#"{"target_modules": ["q_proj", ".*v_proj"]}"#,
            "`target_modules = '.*v_proj'`",
        ),
        (
            r#"{"target_modules": "[qv]_proj"}"#,
            "`target_modules = '.*[qv]_proj'`",
        ),
        (
            r#"{"target_modules": "model.layers.1"}"#,
            "`target_modules = 'model.layers.1.*'`",
        ),
        (
            r#"{"target_modules": ["q_proj"], "exclude_modules": "q_proj"}"#,
            r#"`exclude_modules = ["q_proj"]`"#,
        ),
        (
            r#"{"target_modules": ["q_proj"], "layers_to_transform": [99]}"#,
            "counted from 0",
        ),
        (
            r#"{"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}"#,
            "`v_proj` of `rank_pattern` matches no adapted linear layer",
        ),
    ] {
        let keywords: Value = serde_json::from_str(keywords).unwrap();
        let error = select(&modules, "lm_head", &settings(&keywords)).unwrap_err();
        assert!(error.to_string().contains(hint), "{keywords}: {error}");
    }
}

#[test]
fn a_rank_that_no_layer_can_use_is_refused() {
    let modules = modules(&golden("peft_targets.json")["modules"]["llama"]);
    // q_proj is 16 x 16, k_proj 8 x 16, up_proj 24 x 16.
    for (keywords, most) in [
        (r#"{"target_modules": ["q_proj"], "r": 16}"#, None),
        (r#"{"target_modules": ["q_proj", "k_proj"], "r": 16}"#, None),
        (
            r#"{"target_modules": ["k_proj"], "r": 9}"#,
            Some("at most 8"),
        ),
        (
            r#"{"target_modules": "all-linear", "r": 5000}"#,
            Some("at most 16"),
        ),
        (
            r#"{"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 9}}"#,
            Some("`rank_pattern`"),
        ),
    ] {
        let keywords: Value = serde_json::from_str(keywords).unwrap();
        let settings = settings(&keywords);
        let sites = select(&modules, "lm_head", &settings).unwrap();
        match (check_ranks(&settings, &sites), most) {
            (Ok(()), None) => {}
            (Err(error), Some(most)) => {
                assert!(error.to_string().contains(most), "{keywords}: {error}");
            }
            (got, _) => panic!("{keywords}: {got:?}"),
        }
    }
}

/// Keys of names and dots are compared without a regular expression, and match the same paths.
#[test]
fn plain_keys_match_as_their_expression() {
    let keys = [
        "q_proj",
        "1.q_proj",
        "layers.1.q_proj",
        r"layers\.1\.q_proj",
        "proj",
        "a",
        "m.layers.1.q_proj",
        "layers-1",
    ];
    let paths = [
        "m.layers.1.q_proj",
        "m.layers.11.q_proj",
        "m.layersx1.q_proj",
        "q_proj",
        "1xq_proj",
        "x.1xq_proj",
        "mxlayers.1.q_proj",
        "",
    ];
    for key in keys {
        let pattern = KeyPattern::new(key, "rank_pattern").unwrap();
        assert!(matches!(pattern, KeyPattern::Plain(_)), "{key}");
        let regex = regex::Regex::new(&format!(r"\A(.*\.)?({key})$")).unwrap();
        for path in paths {
            assert_eq!(
                pattern.matches(path).unwrap(),
                regex.is_match(path),
                "{key} {path}"
            );
        }
    }
    let regex = KeyPattern::new("(?:q|v)_proj", "rank_pattern").unwrap();
    assert!(matches!(regex, KeyPattern::Regex(_)) && regex.matches("m.v_proj").unwrap());
    assert!(KeyPattern::new("a)(b", "rank_pattern").is_err());
}

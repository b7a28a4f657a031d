//! Continuing an adapter: the keys of a recipe beside `init_from`.
//!
//! The adapter's settings hold. A key that the recipe gives must mean the same for the model at hand, in whatever spelling or order:
//! keys are compared in groups by the layers, ranks and alphas that they resolve to. `lora_dropout` is the recipe's if given,
//! because an adapter does not depend on it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::prepare::Target;
use crate::adapter::matching::LayerFilter;
use crate::adapter::targets::{Module, check_values, select_matching};
use crate::adapter::{self, Adaptation, LoraConfig, ModelLayout, Site, Targets};
use crate::error::{Error, Kind, Result};
use crate::recipe::{Lora, lora_setting};
use crate::text::first_few;

/// Keys that choose layers, ranks and alphas; each group is compared by what it resolves to.
const SELECTION: [&str; 3] = ["target_modules", "exclude_modules", "layers_to_transform"];
const RANK: [&str; 2] = ["r", "rank_pattern"];
const ALPHA: [&str; 2] = ["lora_alpha", "alpha_pattern"];
const SCALING: [&str; 1] = ["use_rslora"];
const SAVED: [&str; 4] = [
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "bias",
];
const PARTS: [&str; 2] = ["use_dora", "lora_bias"];
const INIT: [&str; 1] = ["init_lora_weights"];

/// The adapter at `path` as what is trained; `lora` gets its settings where the recipe gives none.
///
/// # Errors
/// An adapter that cannot be loaded, does not fit `modules` or cannot be trained, and keys of the recipe that contradict it.
pub(super) fn continue_adapter(
    lora: &mut Lora,
    path: &Path,
    layout: &ModelLayout,
) -> Result<Target> {
    let adapter = adapter::load(path)?;
    let mut settings = adapter.settings(layout)?;
    let adaptation = adapter.adaptation(layout)?;
    let comparison = Comparison {
        lora,
        settings: &settings,
        adaptation: &adaptation,
        layout,
    };
    comparison.check()?;
    if is_given(lora, "lora_dropout") {
        settings.lora_dropout = lora.config.lora_dropout;
    }
    check_values(&settings).map_err(|error| error.at(path.display().to_string()))?;
    lora.config = with_given_keys(lora, &settings);
    Ok(Target::Lora {
        settings: Box::new(settings),
        adaptation,
        from: Some(Box::new(adapter)),
    })
}

fn is_given(lora: &Lora, key: &str) -> bool {
    lora.written.iter().any(|written| written == key)
}

/// The adapter's settings with the recipe's spelling of the keys that it gives.
fn with_given_keys(lora: &Lora, adapter: &LoraConfig) -> LoraConfig {
    let given = |key| {
        if is_given(lora, key) {
            &lora.config
        } else {
            adapter
        }
    };
    LoraConfig {
        r: given("r").r,
        lora_alpha: given("lora_alpha").lora_alpha,
        lora_dropout: given("lora_dropout").lora_dropout,
        target_modules: given("target_modules").target_modules.clone(),
        exclude_modules: given("exclude_modules").exclude_modules.clone(),
        use_rslora: given("use_rslora").use_rslora,
        rank_pattern: given("rank_pattern").rank_pattern.clone(),
        alpha_pattern: given("alpha_pattern").alpha_pattern.clone(),
        layers_to_transform: given("layers_to_transform").layers_to_transform.clone(),
        layers_pattern: adapter.layers_pattern.clone(),
        init_lora_weights: adapter.init_lora_weights,
        modules_to_save: given("modules_to_save").modules_to_save.clone(),
        trainable_token_indices: given("trainable_token_indices")
            .trainable_token_indices
            .clone(),
        ensure_weight_tying: given("ensure_weight_tying").ensure_weight_tying,
        use_dora: given("use_dora").use_dora,
        bias: given("bias").bias,
        lora_bias: given("lora_bias").lora_bias,
    }
}

/// The keys of a recipe against an adapter.
struct Comparison<'a> {
    lora: &'a Lora,
    settings: &'a LoraConfig,
    adaptation: &'a Adaptation,
    layout: &'a ModelLayout,
}

impl Comparison<'_> {
    fn check(&self) -> Result<()> {
        self.refuse(&SELECTION, self.other_layers()?)?;
        let resolved = self.resolved_on_sites()?;
        let other_ranks = self.differing(&resolved, |site| site.r.to_string(), "rank");
        self.refuse(&RANK, other_ranks)?;
        let other_alphas = self.differing(&resolved, |site| site.lora_alpha.to_string(), "alpha");
        self.refuse(&ALPHA, other_alphas)?;
        let same = self.lora.config.use_rslora == self.settings.use_rslora;
        self.refuse(
            &SCALING,
            (!same).then(|| "the scaling is another".to_string()),
        )?;
        let (recipe, adapter) = (&self.lora.config, self.settings);
        let same = (!is_given(self.lora, "use_dora") || recipe.use_dora == adapter.use_dora)
            && (!is_given(self.lora, "lora_bias") || recipe.lora_bias == adapter.lora_bias);
        let other = (!same).then(|| "its layers have other parts".to_string());
        self.refuse(&PARTS, other)?;
        let same = recipe.init_lora_weights == adapter.init_lora_weights;
        let other = (!same).then(|| "its values are the initial ones".to_string());
        self.refuse(&INIT, other)?;
        self.refuse(&SAVED, self.other_weights())
    }

    /// How the weights that the given keys train in full differ from the adapter's.
    fn other_weights(&self) -> Option<String> {
        let config = with_given_keys(self.lora, self.settings);
        let sites = self.adaptation.sites.clone();
        let recipe = Adaptation::new(self.layout, &config, sites);
        let names = |adaptation: &Adaptation| -> BTreeSet<String> {
            let copies = adaptation.copies.iter();
            copies.flat_map(|copy| copy.tensors().cloned()).collect()
        };
        let (recipe_names, own) = (names(&recipe), names(self.adaptation));
        if recipe.tokens != self.adaptation.tokens {
            return Some("the rows that it trains are others".to_string());
        }
        if recipe_names == own && recipe.unties == self.adaptation.unties {
            return None;
        }
        let own = own.into_iter().map(|name| format!("`{name}`")).collect();
        Some(match first_few(own, 4).join(", ") {
            list if list.is_empty() => "it trains no weight in full".to_string(),
            list => format!("the weights that it trains in full are {list}"),
        })
    }

    fn given<'k>(&self, keys: &[&'k str]) -> Vec<&'k str> {
        let given = keys.iter().copied().filter(|key| is_given(self.lora, key));
        given.collect()
    }

    /// How the layers that the given keys select differ from the adapter's.
    fn other_layers(&self) -> Result<Option<String>> {
        let config = &self.lora.config;
        let sites = self.adaptation.sites.iter();
        let own: BTreeSet<&str> = sites.map(|site| site.path.as_str()).collect();
        let given = self.given(&SELECTION);
        if given.is_empty() {
            return Ok(None);
        }
        if !given.contains(&"target_modules") {
            if let Some(difference) = self.other_layer_numbers()? {
                return Ok(Some(difference));
            }
            let excluding = LoraConfig {
                layers_to_transform: None,
                ..config.clone()
            };
            let left = select_matching(&self.adapted_modules(), "", &excluding)?;
            return Ok(difference(&own, &left));
        }
        let layout = self.layout;
        let selected = select_matching(&layout.modules, &layout.output_embedding, config)?;
        Ok(difference(&own, &selected))
    }

    /// The layers of `layers_to_transform` and of the adapter, if they are not the same.
    fn other_layer_numbers(&self) -> Result<Option<String>> {
        let Some(wanted) = &self.lora.config.layers_to_transform else {
            return Ok(None);
        };
        let filter = LayerFilter::new(&[])?;
        let sites = self.adaptation.sites.iter();
        let numbers = sites.map(|site| filter.index(&site.path));
        let numbers: BTreeSet<Option<usize>> = numbers.collect::<Result<_>>()?;
        if numbers == wanted.iter().copied().map(Some).collect() {
            return Ok(None);
        }
        let numbers: Vec<String> = numbers
            .into_iter()
            .flatten()
            .map(|number| number.to_string())
            .collect();
        Ok(Some(format!(
            "the adapter's layers are {}",
            first_few(numbers, 20).join(", ")
        )))
    }

    /// The modules that the adapter is on.
    fn adapted_modules(&self) -> Vec<Module> {
        let module = |site: &Site| Module {
            path: site.path.clone(),
            out_features: site.out_features,
            in_features: site.in_features,
            kind: site.kind,
        };
        self.adaptation.sites.iter().map(module).collect()
    }

    /// The adapter's layers with the ranks and alphas of the recipe: a default that it does not give is the adapter's.
    fn resolved_on_sites(&self) -> Result<Vec<Site>> {
        let config = &self.lora.config;
        let given = |key| is_given(self.lora, key);
        let every_module = LoraConfig {
            r: if given("r") {
                config.r
            } else {
                self.settings.r
            },
            lora_alpha: if given("lora_alpha") {
                config.lora_alpha
            } else {
                self.settings.lora_alpha
            },
            target_modules: Targets::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            ..config.clone()
        };
        select_matching(&self.adapted_modules(), "", &every_module)
    }

    /// The first layer whose `value` in `resolved` is not the adapter's.
    fn differing(
        &self,
        resolved: &[Site],
        value: impl Fn(&Site) -> String,
        what: &str,
    ) -> Option<String> {
        let mut pairs = resolved.iter().zip(&self.adaptation.sites);
        let (recipe, adapter) = pairs.find(|(recipe, adapter)| value(recipe) != value(adapter))?;
        let path = &adapter.path;
        Some(format!(
            "the {what} of `{path}` is {}, by the recipe {}",
            value(adapter),
            value(recipe)
        ))
    }

    /// The error if a key of the group `keys` is given and `difference` is there.
    fn refuse(&self, keys: &[&str], difference: Option<String>) -> Result<()> {
        let given = self.given(keys);
        let (Some(first), Some(difference)) = (given.first(), difference) else {
            return Ok(());
        };
        let written = |config: &LoraConfig, keys: &[&str]| {
            let settings = keys.iter().filter_map(|key| lora_setting(config, key));
            settings.collect::<Vec<_>>().join("`, `")
        };
        Err(Error::new(
            Kind::Recipe,
            format!("`adapter.{first}` contradicts the adapter that `init_from` continues"),
        )
        .at(format!("adapter.{first}"))
        .value(format!("`{}`", written(&self.lora.config, &given)))
        .rule(format!(
            "the adapter holds `{}`; {difference}",
            written(self.settings, keys)
        ))
        .hint(format!(
            "leave `{}` out of [adapter]: the adapter's settings hold",
            given.join("`, `")
        )))
    }
}

/// The paths that only one of both has, in words.
fn difference(own: &BTreeSet<&str>, selected: &[Site]) -> Option<String> {
    let selected: BTreeSet<&str> = selected.iter().map(|site| site.path.as_str()).collect();
    let name = |paths: Vec<&str>| {
        let paths = paths.into_iter().map(|path| format!("`{path}`")).collect();
        first_few(paths, 4).join(", ")
    };
    let parts: BTreeMap<&str, Vec<&str>> = BTreeMap::from([
        (
            "the recipe adds",
            selected.difference(own).copied().collect(),
        ),
        (
            "the recipe leaves out",
            own.difference(&selected).copied().collect(),
        ),
    ]);
    let parts: Vec<String> = parts
        .into_iter()
        .filter(|(_, paths)| !paths.is_empty())
        .map(|(verb, paths)| format!("{verb} {}", name(paths)))
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::PeftConfig;
    use crate::adapter::targets::ModuleKind;
    use crate::recipe::{self, Adapter};

    fn layout() -> ModelLayout {
        let modules = modules();
        let tensors = modules.iter().map(|module| {
            let name = format!("{}.weight", module.path);
            (name, vec![module.out_features, module.in_features])
        });
        ModelLayout {
            tensors: tensors.collect(),
            modules,
            input_embedding: "model.embed_tokens".into(),
            output_embedding: "lm_head".into(),
            tied: false,
        }
    }

    fn modules() -> Vec<Module> {
        let mut modules = Vec::new();
        for layer in 0..3 {
            for name in [
                "self_attn.q_proj",
                "self_attn.k_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            ] {
                modules.push(Module {
                    path: format!("model.layers.{layer}.{name}"),
                    out_features: 6,
                    in_features: 6,
                    kind: ModuleKind::Linear,
                });
            }
        }
        modules.push(Module {
            path: "lm_head".into(),
            out_features: 6,
            in_features: 6,
            kind: ModuleKind::Linear,
        });
        modules
    }

    fn lora(keys: &str, path: &Path) -> Lora {
        let text = format!(
            "[model]\nid = \"embedded:tiny\"\n[data]\ntrain = \"t.jsonl\"\n[train]\nsteps = 1\n[adapter]\n\
             init_from = \"{}\"\n{keys}\n",
            path.display()
        );
        let recipe = recipe::parse(&text, Path::new("/r.toml"), &[]).unwrap();
        match recipe.adapter {
            Adapter::Lora(lora) => lora,
            Adapter::None => unreachable!("init_from needs LoRA"),
        }
    }

    /// Saves an adapter with this configuration (r = 2, lora_alpha = 4 unless given) on the layers that it selects.
    fn saved(config: &str, dir: &Path) {
        let config = format!(
            r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, {config}}}"#
        );
        let config = PeftConfig::parse(&config, dir).unwrap();
        let (layout, settings) = (layout(), config.settings());
        let sites = select_matching(&layout.modules, "lm_head", &settings).unwrap();
        let adaptation = Adaptation::new(&layout, &settings, sites);
        let values = [0.5; 36];
        let tensors = adaptation.tensors().into_iter();
        let tensors = tensors.map(|tensor| {
            let count: usize = tensor.shape.iter().product();
            (tensor.name, tensor.shape, &values[..count])
        });
        adapter::save(dir, &config, &tensors.collect::<Vec<_>>()).unwrap();
    }

    fn continued(config: &str, keys: &str) -> Result<Lora> {
        let dir = tempfile::tempdir().unwrap();
        saved(config, dir.path());
        let mut lora = lora(keys, dir.path());
        continue_adapter(&mut lora, dir.path(), &layout())?;
        Ok(lora)
    }

    const EVERY: &str = r#""target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]"#;
    const LAYER_1: &str = r#""target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]"#;
    const NO_DOWN: &str = r#""target_modules": ["q_proj", "k_proj", "up_proj"]"#;
    const PATTERNS: &str = r#""target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"q_proj": 7}"#;

    const HEAD: &str = r#""target_modules": ["q_proj"], "modules_to_save": ["lm_head"]"#;

    /// (the adapter's configuration, keys of the recipe): the same layers, ranks, alphas and weights.
    const SAME: [(&str, &str); 27] = [
        (HEAD, ""),
        (HEAD, "modules_to_save = [\"head\", \"lm_head\"]"),
        (EVERY, ""),
        (EVERY, "r = 2"),
        (EVERY, "lora_alpha = 4"),
        (EVERY, "use_rslora = false"),
        (EVERY, "lora_dropout = 0.5"),
        (EVERY, "target_modules = \"all-linear\""),
        (EVERY, "target_modules = \"ALL-LINEAR\""),
        (
            EVERY,
            "target_modules = [\"down_proj\", \"up_proj\", \"q_proj\", \"k_proj\"]",
        ),
        (EVERY, "target_modules = '.*_proj'"),
        (
            EVERY,
            "target_modules = [\"self_attn.q_proj\", \"k_proj\", \"mlp.up_proj\", \"down_proj\"]",
        ),
        (EVERY, "layers_to_transform = [2, 1, 0]"),
        (
            r#""target_modules": "all-linear""#,
            "target_modules = [\"q_proj\", \"k_proj\", \"up_proj\", \"down_proj\"]",
        ),
        (
            r#""target_modules": ".*[qk]_proj""#,
            "target_modules = [\"k_proj\", \"q_proj\"]",
        ),
        (
            NO_DOWN,
            "target_modules = \"all-linear\"\nexclude_modules = [\"down_proj\"]",
        ),
        (NO_DOWN, "exclude_modules = [\"down_proj\"]"),
        (NO_DOWN, "exclude_modules = '.*down.*'"),
        (LAYER_1, "layers_to_transform = [1]"),
        (LAYER_1, "layers_to_transform = 1"),
        (
            LAYER_1,
            "target_modules = [\"k_proj\", \"q_proj\"]\nlayers_to_transform = [1]",
        ),
        (
            LAYER_1,
            "target_modules = ['1.self_attn.q_proj', '1.self_attn.k_proj']",
        ),
        (PATTERNS, "rank_pattern = { k_proj = 3 }"),
        (PATTERNS, "r = 2\nrank_pattern = { \".*k_proj\" = 3 }"),
        (PATTERNS, "r = 3\nrank_pattern = { q_proj = 2 }"),
        (PATTERNS, "alpha_pattern = { q_proj = 7.0 }"),
        (PATTERNS, "lora_alpha = 7\nalpha_pattern = { k_proj = 4 }"),
    ];

    /// (the adapter's configuration, keys of the recipe, words of the error): contradictions.
    const OTHER: [(&str, &str, &[&str]); 21] = [
        (
            EVERY,
            "modules_to_save = [\"lm_head\"]",
            &["`adapter.modules_to_save`", "trains no weight in full"],
        ),
        (
            HEAD,
            "modules_to_save = [\"0.mlp.up_proj\"]",
            &["`adapter.modules_to_save`", "in full are `lm_head.weight`"],
        ),
        (
            EVERY,
            "r = 3",
            &[
                "`adapter.r` contradicts",
                "`r = 3`",
                "holds `r = 2`",
                "leave `r` out",
            ],
        ),
        (
            EVERY,
            "lora_alpha = 5",
            &["`adapter.lora_alpha`", "`lora_alpha = 4.0`"],
        ),
        (
            EVERY,
            "use_rslora = true",
            &["`adapter.use_rslora`", "`use_rslora = false`"],
        ),
        (
            EVERY,
            "rank_pattern = { q_proj = 4 }",
            &["`adapter.rank_pattern`", "`rank_pattern = { q_proj = 4 }`"],
        ),
        (
            EVERY,
            "alpha_pattern = { q_proj = 5 }",
            &["`adapter.alpha_pattern`", "is 4, by the recipe 5"],
        ),
        (
            EVERY,
            "target_modules = [\"q_proj\"]",
            &[
                "`adapter.target_modules`",
                "[\"q_proj\", \"k_proj\", \"up_proj\", \"down_proj\"]",
                "leaves out",
            ],
        ),
        (
            EVERY,
            "target_modules = '.*q_proj'",
            &["`adapter.target_modules`"],
        ),
        (
            EVERY,
            "target_modules = [\"q_porj\"]",
            &["`adapter.target_modules`"],
        ),
        (
            EVERY,
            "exclude_modules = [\"down_proj\"]",
            &[
                "`adapter.exclude_modules`",
                "leaves out `model.layers.0.mlp.down_proj`",
            ],
        ),
        (
            EVERY,
            "layers_to_transform = [1]",
            &[
                "`adapter.layers_to_transform`",
                "the adapter's layers are 0, 1, 2",
            ],
        ),
        (
            EVERY,
            "target_modules = [\"q_proj\", \"k_proj\", \"up_proj\", \"down_proj\"]\nlayers_to_transform = [1]",
            &["layers_to_transform = [1]", "leaves out"],
        ),
        (
            NO_DOWN,
            "target_modules = \"all-linear\"",
            &["adds `model.layers.0.mlp.down_proj`"],
        ),
        (
            NO_DOWN,
            "target_modules = \"all-linear\"\nexclude_modules = [\"up_proj\"]",
            &["adds", "leaves out"],
        ),
        (
            LAYER_1,
            "layers_to_transform = [0, 1]",
            &["the adapter's layers are 1"],
        ),
        (
            LAYER_1,
            "target_modules = [\"q_proj\", \"k_proj\"]",
            &["adds", "layers_to_transform = [1]"],
        ),
        (
            PATTERNS,
            "r = 2",
            &[
                "`adapter.r`",
                "rank_pattern = { k_proj = 3 }",
                "is 3, by the recipe 2",
            ],
        ),
        (
            PATTERNS,
            "rank_pattern = { q_proj = 3 }",
            &["`adapter.rank_pattern`"],
        ),
        (
            PATTERNS,
            "lora_alpha = 4",
            &["`adapter.lora_alpha`", "is 7, by the recipe 4"],
        ),
        (
            r#""target_modules": ["q_proj"], "use_rslora": true"#,
            "use_rslora = false",
            &["`use_rslora = true`"],
        ),
    ];

    #[test]
    fn a_recipe_may_repeat_the_adapter_in_any_spelling() {
        for (config, keys) in SAME {
            if let Err(error) = continued(config, keys) {
                panic!("{config} beside {keys}: {error}");
            }
        }
    }

    #[test]
    fn a_recipe_that_means_something_else_is_refused() {
        for (config, keys, words) in OTHER {
            let error = continued(config, keys).map(drop).expect_err(keys);
            assert_eq!(error.kind(), Kind::Recipe, "{keys}: {error}");
            let text = error.to_string();
            for word in words {
                assert!(text.contains(word), "{keys}: {word}: {text}");
            }
            assert!(!text.contains("Names("), "{text}");
        }
    }

    #[test]
    fn the_adapters_settings_hold_where_the_recipe_gives_none() {
        let lora = continued(PATTERNS, "target_modules = '.*[kq]_proj'").unwrap();
        let config = &lora.config;
        assert_eq!(
            (config.r, config.lora_alpha, config.lora_dropout),
            (2, 4.0, 0.1)
        );
        assert_eq!(config.rank_pattern, [("k_proj".to_string(), 3)]);
        assert_eq!(config.target_modules, Targets::Regex(".*[kq]_proj".into()));
        let dropout = continued(EVERY, "lora_dropout = 0.0").unwrap();
        assert_eq!(dropout.config.lora_dropout, 0.0);
        // Entries of the file without effect do not come back.
        let names = r#""target_modules": ["q_proj", "nope"], "rank_pattern": {"nope": 3}"#;
        let lora = continued(names, "").unwrap();
        assert_eq!(
            lora.config.target_modules,
            Targets::Names(vec!["q_proj".into()])
        );
        assert_eq!(lora.config.rank_pattern, []);
    }

    #[test]
    fn an_adapter_that_cannot_be_trained_is_refused() {
        for (config, word) in [
            (
                r#""target_modules": ["q_proj"], "lora_alpha": 0"#,
                "lora_alpha",
            ),
            (
                r#""target_modules": ["q_proj"], "lora_dropout": 1.0"#,
                "lora_dropout",
            ),
        ] {
            let error = continued(config, "").map(drop).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}

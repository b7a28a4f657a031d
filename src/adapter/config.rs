//! `adapter_config.json`: PEFT's LoraConfig, read and written.
//!
//! Owns every field that peft 0.21.2 writes, their defaults and their order. Takes a file's text or a run's settings; returns
//! a `PeftConfig`, or the text PEFT would write. Fields of variants that are not plain LoRA are kept as JSON: whether they are
//! supported is decided in `unsupported`. Knows nothing of tensors.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Kind, Result};

pub use super::fields::{InitWeights, JsonNumber, LayerNumbers, ModulePattern, Names};
use super::matching::{matches, pattern_key};
use super::options::{LoraConfig, Targets};
use super::targets::{Module, Site, shortest_names};

/// The file's name in an adapter's directory.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The version of PEFT whose file this is.
pub const PEFT_VERSION: &str = "0.21.2";

/// The content of `adapter_config.json`. Fields stand in the file's order, which is alphabetical. A key that a file lacks has
/// PEFT's default; a key that PEFT 0.21 does not know is left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeftConfig {
    /// Activated LoRA.
    pub alora_invocation_tokens: Value,
    /// ModulePattern -> alpha.
    pub alpha_pattern: ModulePattern<JsonNumber>,
    /// Arrow routing.
    pub arrow_config: Value,
    /// For custom models.
    pub auto_mapping: Value,
    /// The model it was trained on: a hub id or a path.
    pub base_model_name_or_path: Option<String>,
    /// `none`, `all` or `lora_only`: which biases were trained.
    pub bias: String,
    /// CorDA initialisation.
    pub corda_config: Value,
    /// Ties adapters of tied layers.
    pub ensure_weight_tying: bool,
    /// EVA initialisation.
    pub eva_config: Value,
    /// Modules left out.
    pub exclude_modules: Option<Names>,
    /// The layers store (in, out): GPT-2's Conv1D.
    pub fan_in_fan_out: bool,
    /// Always true in a saved file.
    pub inference_mode: bool,
    /// How A and B began.
    pub init_lora_weights: InitWeights,
    /// KaSA.
    pub kasa_config: Value,
    /// Layers stacked several times.
    pub layer_replication: Value,
    /// Names of the module lists that hold layers.
    pub layers_pattern: Option<Names>,
    /// Only these layers.
    pub layers_to_transform: Option<LayerNumbers>,
    /// LoftQ initialisation.
    pub loftq_config: Value,
    /// Numerator of the scaling.
    pub lora_alpha: JsonNumber,
    /// B has a bias.
    pub lora_bias: bool,
    /// Dropout before A.
    pub lora_dropout: f64,
    /// LoRA-GA initialisation.
    pub lora_ga_config: Value,
    /// Megatron.
    pub megatron_config: Value,
    /// Megatron's module.
    pub megatron_core: Value,
    /// Modules trained in full and saved beside.
    pub modules_to_save: Value,
    /// Variational sampling.
    pub monteclora_config: Value,
    /// `LORA` here.
    pub peft_type: Option<String>,
    /// Who wrote it.
    pub peft_version: Option<String>,
    /// QALoRA's group size.
    pub qalora_group_size: Value,
    /// Rank.
    pub r: usize,
    /// ModulePattern -> rank.
    pub rank_pattern: ModulePattern<usize>,
    /// Revision of the base model.
    pub revision: Option<String>,
    /// Which modules.
    pub target_modules: Option<Names>,
    /// Parameters, not modules, that are adapted.
    pub target_parameters: Value,
    /// `CAUSAL_LM` here.
    pub task_type: Option<String>,
    /// Single rows of the embedding.
    pub trainable_token_indices: Value,
    /// Block-diagonal LoRA.
    pub use_bdlora: Value,
    /// DoRA.
    pub use_dora: bool,
    /// QALoRA.
    pub use_qalora: bool,
    /// Scaling is alpha / sqrt(r).
    pub use_rslora: bool,
    /// VeLoRA.
    pub velora_config: Value,
}

impl Default for PeftConfig {
    /// PEFT's own defaults (`tuners/lora/config.py`), as saved.
    fn default() -> Self {
        let null = || Value::Null;
        Self {
            alora_invocation_tokens: null(),
            alpha_pattern: ModulePattern::default(),
            arrow_config: null(),
            auto_mapping: null(),
            base_model_name_or_path: None,
            bias: "none".into(),
            corda_config: null(),
            ensure_weight_tying: false,
            eva_config: null(),
            exclude_modules: None,
            fan_in_fan_out: false,
            inference_mode: true,
            init_lora_weights: InitWeights::Plain(true),
            kasa_config: null(),
            layer_replication: null(),
            layers_pattern: None,
            layers_to_transform: None,
            loftq_config: Value::Object(Default::default()),
            lora_alpha: JsonNumber(8.0),
            lora_bias: false,
            lora_dropout: 0.0,
            lora_ga_config: null(),
            megatron_config: null(),
            megatron_core: "megatron.core".into(),
            modules_to_save: null(),
            monteclora_config: null(),
            peft_type: None,
            peft_version: None,
            qalora_group_size: 16.into(),
            r: 8,
            rank_pattern: ModulePattern::default(),
            revision: None,
            target_modules: None,
            target_parameters: null(),
            task_type: None,
            trainable_token_indices: null(),
            use_bdlora: null(),
            use_dora: false,
            use_qalora: false,
            use_rslora: false,
            velora_config: null(),
        }
    }
}

impl PeftConfig {
    /// The file of an adapter with `sites` chosen from `modules` by `settings`. `all-linear` and regular expressions become
    /// the shortest names that mean the same modules; a list stays as it was written.
    ///
    /// # Errors
    /// A pattern of `settings` that is no regular expression.
    pub fn for_sites(
        settings: &LoraConfig,
        sites: &[Site],
        modules: &[Module],
        base_model: &str,
        revision: Option<&str>,
    ) -> Result<Self> {
        let listed = |targets: &Targets| match targets {
            Targets::Names(names) => Some(Names::Many(names.clone())),
            Targets::Regex(pattern) => Some(Names::One(pattern.clone())),
            Targets::AllLinear => None,
        };
        let paths: Vec<&str> = sites.iter().map(|site| site.path.as_str()).collect();
        let (target_modules, exclude_modules) = match &settings.target_modules {
            Targets::Names(names) => (
                Names::Many(names.clone()),
                settings.exclude_modules.as_ref().and_then(listed),
            ),
            // What was excluded is not among the sites: it needs no mention.
            Targets::AllLinear | Targets::Regex(_) => {
                (Names::Many(shortest_names(modules, &paths)), None)
            }
        };
        let alphas: Vec<(String, JsonNumber)> = settings
            .alpha_pattern
            .iter()
            .map(|(key, alpha)| (key.clone(), JsonNumber(*alpha)))
            .collect();
        Ok(Self {
            alpha_pattern: sortable(&alphas, sites, JsonNumber(settings.lora_alpha), |site| {
                JsonNumber(site.lora_alpha)
            })?,
            base_model_name_or_path: Some(base_model.to_string()),
            exclude_modules,
            layers_pattern: (!settings.layers_pattern.is_empty())
                .then(|| Names::Many(settings.layers_pattern.clone())),
            layers_to_transform: settings.layers_to_transform.clone().map(LayerNumbers::Many),
            lora_alpha: JsonNumber(settings.lora_alpha),
            lora_dropout: settings.lora_dropout,
            peft_type: Some("LORA".into()),
            peft_version: Some(PEFT_VERSION.into()),
            r: settings.r,
            rank_pattern: sortable(&settings.rank_pattern, sites, settings.r, |site| site.r)?,
            revision: revision.map(str::to_string),
            target_modules: Some(target_modules),
            task_type: Some("CAUSAL_LM".into()),
            use_rslora: settings.use_rslora,
            ..Self::default()
        })
    }

    /// The settings this file stands for. A file without `target_modules` means no module.
    pub fn settings(&self) -> LoraConfig {
        let targets = |names: &Names| match names {
            Names::One(text) => Targets::from_text(text),
            Names::Many(names) => Targets::Names(names.clone()),
        };
        // `exclude_modules` knows no `all-linear`: there the word is an expression like any other.
        let exclude = |names: &Names| match names {
            Names::One(text) => Targets::Regex(text.clone()),
            Names::Many(names) => Targets::Names(names.clone()),
        };
        let list = |names: &Names| match names {
            Names::One(text) => vec![text.clone()],
            Names::Many(names) => names.clone(),
        };
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha.0,
            lora_dropout: self.lora_dropout,
            target_modules: self
                .target_modules
                .as_ref()
                .map_or(Targets::Names(Vec::new()), targets),
            exclude_modules: self.exclude_modules.as_ref().map(exclude),
            use_rslora: self.use_rslora,
            rank_pattern: self.rank_pattern.0.clone(),
            alpha_pattern: self
                .alpha_pattern
                .0
                .iter()
                .map(|(key, alpha)| (key.clone(), alpha.0))
                .collect(),
            layers_to_transform: self
                .layers_to_transform
                .as_ref()
                .map(|layers| match layers {
                    LayerNumbers::One(layer) => vec![*layer],
                    LayerNumbers::Many(layers) => layers.clone(),
                }),
            layers_pattern: self.layers_pattern.as_ref().map(list).unwrap_or_default(),
        }
    }

    /// Reads a file's text; `place` names the file in errors.
    ///
    /// # Errors
    /// What is not JSON, or a field of another type than PEFT's.
    pub fn parse(text: &str, place: &Path) -> Result<Self> {
        serde_json::from_str(text).map_err(|source| {
            Error::new(Kind::Adapter, format!("`{CONFIG_FILE}` cannot be read: {source}"))
                .at(place.display().to_string())
                .rule("the JSON that PEFT's save_pretrained writes")
                .hint("fetch the file again, or save the adapter again with PEFT's `model.save_pretrained(DIR)`")
        })
    }

    /// The file's text as PEFT writes it: two spaces, sorted keys, no final newline.
    pub fn to_text(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain fields always have a JSON form")
    }
}

/// `pattern`, if it means the same once its keys are sorted, as they are in the file; else one key for each module that
/// differs from `default`.
fn sortable<T: Copy + PartialEq>(
    pattern: &[(String, T)],
    sites: &[Site],
    default: T,
    of_site: impl Fn(&Site) -> T,
) -> Result<ModulePattern<T>> {
    let mut sorted = pattern.to_vec();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let compiled = sorted
        .iter()
        .map(|(key, value)| Ok((pattern_key(key, "pattern")?, *value)))
        .collect::<Result<Vec<_>>>()?;
    for site in sites {
        let mut meant = default;
        for (regex, value) in &compiled {
            if matches(regex, &site.path)? {
                meant = *value;
                break;
            }
        }
        if meant != of_site(site) {
            let differing = sites.iter().filter(|site| of_site(site) != default);
            return Ok(ModulePattern(
                differing
                    .map(|site| (regex::escape(&site.path), of_site(site)))
                    .collect(),
            ));
        }
    }
    Ok(ModulePattern(sorted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> LoraConfig {
        LoraConfig {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            target_modules: Targets::Names(vec!["q_proj".into(), "v_proj".into()]),
            exclude_modules: None,
            use_rslora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
            layers_pattern: Vec::new(),
        }
    }

    fn site(path: &str, r: usize) -> Site {
        Site {
            path: path.into(),
            in_features: 4,
            out_features: 4,
            r,
            lora_alpha: 32.0,
            scaling: 32.0 / r as f64,
        }
    }

    #[test]
    fn a_plain_lora_is_written_as_peft_writes_it() {
        // scripts/peft_targets.py: LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]).
        let golden = include_str!("../../tests/golden/peft_adapter_config.json");
        let config =
            PeftConfig::for_sites(&settings(), &[], &[], "HuggingFaceTB/SmolLM2-135M", None)
                .unwrap();
        assert_eq!(config.to_text(), golden);
        assert_eq!(PeftConfig::parse(golden, Path::new("x")).unwrap(), config);
        assert_eq!(config.settings(), settings());
    }

    #[test]
    fn an_expression_is_saved_as_names() {
        let module = |path: &str| Module {
            path: path.into(),
            out_features: 4,
            in_features: 4,
        };
        let modules = ["m.0.a", "m.0.b", "m.1.a", "m.1.b", "lm_head"].map(module);
        let settings = LoraConfig {
            target_modules: Targets::Regex(r"m\.(0\.[ab]|1\.b)".into()),
            ..settings()
        };
        let sites = [site("m.0.a", 16), site("m.0.b", 16), site("m.1.b", 16)];
        let config = PeftConfig::for_sites(&settings, &sites, &modules, "x", Some("main")).unwrap();
        assert_eq!(
            config.target_modules,
            Some(Names::Many(vec!["0.a".into(), "b".into()]))
        );
        assert_eq!(config.revision.as_deref(), Some("main"));
    }

    #[test]
    fn patterns_that_sorting_would_turn_around_are_spelled_out() {
        // `v_proj` is meant first; sorted, `layers.0.*` would take layer 0's v_proj.
        let settings = LoraConfig {
            rank_pattern: vec![("v_proj".into(), 4), ("layers.0.*".into(), 2)],
            ..settings()
        };
        let sites = [
            site("m.layers.0.q_proj", 2),
            site("m.layers.0.v_proj", 4),
            site("m.layers.1.q_proj", 16),
        ];
        let config = PeftConfig::for_sites(&settings, &sites, &[], "x", None).unwrap();
        let spelled = [
            (r"m\.layers\.0\.q_proj".to_string(), 2),
            (r"m\.layers\.0\.v_proj".to_string(), 4),
        ];
        assert_eq!(config.rank_pattern.0, spelled);
        // And left alone where sorting changes nothing.
        let settings = LoraConfig {
            rank_pattern: vec![("v_proj".into(), 4), ("q_proj".into(), 2)],
            ..settings
        };
        let sites = [site("m.layers.0.q_proj", 2), site("m.layers.0.v_proj", 4)];
        let config = PeftConfig::for_sites(&settings, &sites, &[], "x", None).unwrap();
        assert_eq!(
            config.rank_pattern.0,
            [("q_proj".to_string(), 2), ("v_proj".to_string(), 4)]
        );
    }

    #[test]
    fn old_and_new_files_are_read() {
        let config = PeftConfig::parse(
            r#"{"peft_type":"LORA","target_modules":"all-linear","rank_pattern":{"b":2,"a":4},"alpha_pattern":null,
                "lora_alpha":1.5,"layers_to_transform":3,"from_the_future":{"x":1}}"#,
            Path::new("x"),
        )
        .unwrap();
        let settings = config.settings();
        assert_eq!(settings.target_modules, Targets::AllLinear);
        assert_eq!(
            settings.rank_pattern,
            [("b".to_string(), 2), ("a".to_string(), 4)]
        );
        assert_eq!(
            (
                settings.r,
                settings.lora_alpha,
                settings.layers_to_transform
            ),
            (8, 1.5, Some(vec![3]))
        );
        assert!(config.to_text().contains("\"lora_alpha\": 1.5,\n"));
        assert!(
            PeftConfig::parse(r#"{"r":"eight"}"#, Path::new("x"))
                .unwrap_err()
                .to_string()
                .contains("line 1")
        );
    }
}

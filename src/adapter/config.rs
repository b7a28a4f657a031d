//! `adapter_config.json`: PEFT's LoraConfig, read and written.
//!
//! Owns the keys that peft 0.21.2 writes and their defaults. Takes a file's text or a run's settings; returns a `PeftConfig`, or
//! the text PEFT would write. Keys of variants other than plain LoRA stay JSON; `unsupported` decides about them. Knows nothing of
//! tensors.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};

use super::fields::Fields;
pub use super::fields::{InitWeights, JsonNumber, ModulePattern, OneOrMany};
use super::keys;
use super::matching::{KeyPattern, first_match};
use super::options::{Bias, LoraConfig, LoraInit, Targets, TokenIndices};
use super::targets::{Module, ModuleKind, Site, shortest_names};

/// The file's name in an adapter's directory.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The version of PEFT whose file this is.
pub const PEFT_VERSION: &str = "0.21.2";

/// The content of `adapter_config.json` under PEFT's keys. A key that a file lacks has PEFT's default.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct PeftConfig {
    pub alpha_pattern: ModulePattern<JsonNumber>,
    pub base_model_name_or_path: Option<String>,
    pub bias: Bias,
    pub ensure_weight_tying: bool,
    pub exclude_modules: Option<OneOrMany<String>>,
    pub init_lora_weights: InitWeights,
    pub layers_pattern: Option<OneOrMany<String>>,
    pub layers_to_transform: Option<OneOrMany<usize>>,
    pub lora_alpha: JsonNumber,
    pub lora_bias: bool,
    pub lora_dropout: f64,
    pub modules_to_save: Option<Vec<String>>,
    pub peft_type: Option<String>,
    pub peft_version: Option<String>,
    pub r: usize,
    pub rank_pattern: ModulePattern<usize>,
    pub revision: Option<String>,
    pub target_modules: Option<OneOrMany<String>>,
    pub task_type: Option<String>,
    pub trainable_token_indices: Option<TokenIndices>,
    pub use_dora: bool,
    pub use_rslora: bool,
    /// All other keys of LoraConfig.
    #[serde(flatten)]
    pub variants: Map<String, Value>,
    /// Keys of the file that PEFT 0.21 does not know, sorted. Not written.
    #[serde(skip)]
    pub unknown: Vec<String>,
}

impl Default for PeftConfig {
    /// PEFT's defaults (`tuners/lora/config.py`), as saved.
    fn default() -> Self {
        Self {
            alpha_pattern: ModulePattern::default(),
            base_model_name_or_path: None,
            bias: Bias::None,
            ensure_weight_tying: false,
            exclude_modules: None,
            init_lora_weights: InitWeights::Plain(true),
            layers_pattern: None,
            layers_to_transform: None,
            lora_alpha: JsonNumber(8.0),
            lora_bias: false,
            lora_dropout: 0.0,
            modules_to_save: None,
            peft_type: None,
            peft_version: None,
            r: 8,
            rank_pattern: ModulePattern::default(),
            revision: None,
            target_modules: None,
            task_type: None,
            trainable_token_indices: None,
            use_dora: false,
            use_rslora: false,
            variants: keys::defaults(),
            unknown: Vec::new(),
        }
    }
}

impl PeftConfig {
    /// The file of an adapter with `sites` chosen from `modules` by `settings`. `all-linear` and regular expressions become
    /// the shortest names that match the same modules; a list stays as it was written.
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
        let (target_modules, exclude_modules) = match &settings.target_modules {
            Targets::Names(names) => (
                names.clone(),
                settings.exclude_modules.as_ref().and_then(written_targets),
            ),
            // Excluded modules are not among the sites and need no mention.
            Targets::AllLinear | Targets::Regex(_) => {
                let paths: Vec<&str> = sites.iter().map(|site| site.path.as_str()).collect();
                (shortest_names(modules, &paths), None)
            }
        };
        let alphas: Vec<(String, JsonNumber)> = settings
            .alpha_pattern
            .iter()
            .map(|(key, alpha)| (key.clone(), JsonNumber(*alpha)))
            .collect();
        let lora_alpha = JsonNumber(settings.lora_alpha);
        let mut variants = keys::defaults();
        let conv1d = |site: &Site| site.kind == ModuleKind::Conv1d;
        variants["fan_in_fan_out"] = sites.iter().any(conv1d).into();
        let layers_pattern = Some(&settings.layers_pattern).filter(|pattern| !pattern.is_empty());
        Ok(Self {
            alpha_pattern: sortable(&alphas, sites, lora_alpha, |site| {
                JsonNumber(site.lora_alpha)
            })?,
            base_model_name_or_path: Some(base_model.to_string()),
            bias: settings.bias,
            ensure_weight_tying: settings.ensure_weight_tying,
            exclude_modules,
            layers_pattern: layers_pattern.cloned().map(OneOrMany::Many),
            layers_to_transform: settings.layers_to_transform.clone().map(OneOrMany::Many),
            lora_alpha,
            lora_bias: settings.lora_bias,
            lora_dropout: settings.lora_dropout,
            modules_to_save: Some(settings.modules_to_save.clone())
                .filter(|names| !names.is_empty()),
            peft_type: Some("LORA".into()),
            peft_version: Some(PEFT_VERSION.into()),
            r: settings.r,
            rank_pattern: sortable(&settings.rank_pattern, sites, settings.r, |site| site.r)?,
            revision: revision.map(str::to_string),
            target_modules: Some(OneOrMany::Many(target_modules)),
            task_type: Some("CAUSAL_LM".into()),
            trainable_token_indices: settings.trainable_token_indices.clone(),
            use_dora: settings.use_dora,
            use_rslora: settings.use_rslora,
            variants,
            ..Self::default()
        })
    }

    /// The settings of this file. A file without `target_modules` selects no module; empty lists and texts mean none, as in
    /// PEFT.
    pub fn settings(&self) -> LoraConfig {
        let target_modules = match &self.target_modules {
            Some(OneOrMany::One(text)) => Targets::from_text(text),
            Some(OneOrMany::Many(names)) => Targets::Names(names.clone()),
            None => Targets::Names(Vec::new()),
        };
        // In `exclude_modules` `all-linear` is an expression like any other.
        let exclude_modules = match self.exclude_modules.clone() {
            Some(OneOrMany::One(text)) if !text.is_empty() => Some(Targets::Regex(text)),
            Some(OneOrMany::Many(names)) if !names.is_empty() => Some(Targets::Names(names)),
            _ => None,
        };
        let alphas = self.alpha_pattern.0.iter();
        let layers = self.layers_to_transform.clone().map(OneOrMany::into_vec);
        let layers_pattern = self.layers_pattern.clone().map(OneOrMany::into_vec);
        let mut layers_pattern = layers_pattern.unwrap_or_default();
        layers_pattern.retain(|pattern| !pattern.is_empty());
        LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha.0,
            lora_dropout: self.lora_dropout,
            target_modules,
            exclude_modules,
            use_rslora: self.use_rslora,
            rank_pattern: self.rank_pattern.0.clone(),
            alpha_pattern: alphas.map(|(key, alpha)| (key.clone(), alpha.0)).collect(),
            layers_to_transform: layers.filter(|layers| !layers.is_empty()),
            layers_pattern,
            // A trained adapter no longer depends on its initial values.
            init_lora_weights: LoraInit::Default,
            modules_to_save: self.modules_to_save.clone().unwrap_or_default(),
            trainable_token_indices: self.trainable_token_indices.clone(),
            ensure_weight_tying: self.ensure_weight_tying,
            use_dora: self.use_dora,
            bias: self.bias,
            lora_bias: self.lora_bias,
        }
    }

    /// Reads a file's text; `path` names the file in errors.
    ///
    /// # Errors
    /// What is not a JSON object; every field of another type than PEFT reads, all in one error.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let refuse = |what: String| {
            Error::new(Kind::Adapter, what)
                .at(path.display().to_string())
                .rule("the JSON that PEFT's save_pretrained writes")
                .hint("fetch the file again, or save the adapter again with PEFT's `model.save_pretrained(DIR)`")
        };
        let values: Map<String, Value> = serde_json::from_str(text)
            .map_err(|source| refuse(format!("`{CONFIG_FILE}` cannot be read: {source}")))?;
        let mut fields = Fields::new(values);
        let config = Self::read(&mut fields);
        if fields.problems.is_empty() {
            return Ok(config);
        }
        let list = fields.problems.join("\n  - ");
        Err(refuse(format!(
            "`{CONFIG_FILE}` cannot be read:\n  - {list}"
        )))
    }

    /// The fields as PEFT reads them: null in a switch is false (`init_lora_weights` too).
    fn read(fields: &mut Fields) -> Self {
        let text = "a text or null";
        let names = "a name pattern or a list of names";
        let ranks = "an object of module patterns with whole numbers";
        let alphas = "an object of module patterns with numbers";
        let default = Self::default();
        Self {
            alpha_pattern: fields.optional("alpha_pattern", alphas).unwrap_or_default(),
            base_model_name_or_path: fields.optional("base_model_name_or_path", text),
            bias: fields.required("bias", "none, all or lora_only", default.bias),
            ensure_weight_tying: fields.switch("ensure_weight_tying"),
            exclude_modules: fields.optional("exclude_modules", names),
            init_lora_weights: fields.init_weights(),
            layers_pattern: fields.optional("layers_pattern", names),
            layers_to_transform: fields.optional(
                "layers_to_transform",
                "a layer number or a list of them, from 0",
            ),
            lora_alpha: fields.required("lora_alpha", "a number", default.lora_alpha),
            lora_bias: fields.switch("lora_bias"),
            lora_dropout: fields.required("lora_dropout", "a probability", default.lora_dropout),
            modules_to_save: fields.optional("modules_to_save", "a list of module names"),
            peft_type: fields.optional("peft_type", text),
            peft_version: fields.optional("peft_version", text),
            r: fields.required("r", "a whole number of at least 1", default.r),
            rank_pattern: fields.optional("rank_pattern", ranks).unwrap_or_default(),
            revision: fields.optional("revision", text),
            target_modules: fields.optional("target_modules", names),
            task_type: fields.optional("task_type", text),
            trainable_token_indices: fields.optional(
                "trainable_token_indices",
                "a list of token ids, or an object of such lists by module",
            ),
            use_dora: fields.switch("use_dora"),
            use_rslora: fields.switch("use_rslora"),
            variants: fields.variants(default.variants),
            unknown: fields.unknown(),
        }
    }

    /// The file's text as PEFT writes it: two spaces, sorted keys, no final newline.
    pub fn to_text(&self) -> String {
        let fields = serde_json::to_value(self).expect("plain fields always have a JSON form");
        let sorted: BTreeMap<_, _> = fields.as_object().into_iter().flatten().collect();
        serde_json::to_string_pretty(&sorted).expect("values have a JSON form")
    }
}

fn written_targets(targets: &Targets) -> Option<OneOrMany<String>> {
    match targets {
        Targets::Names(names) => Some(OneOrMany::Many(names.clone())),
        Targets::Regex(pattern) => Some(OneOrMany::One(pattern.clone())),
        Targets::AllLinear => None,
    }
}

/// `pattern`, if sorting its keys, as in the file, does not change its meaning; else one key for each module that differs from
/// `default`.
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
        .map(|(key, value)| Ok((KeyPattern::new(key, "pattern")?, *value)))
        .collect::<Result<Vec<_>>>()?;
    for site in sites {
        let matched = first_match(&compiled, &site.path)?.unwrap_or(default);
        if matched != of_site(site) {
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
            ..LoraConfig::default()
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
            kind: ModuleKind::Linear,
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
            kind: ModuleKind::Linear,
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
            Some(OneOrMany::Many(vec!["0.a".into(), "b".into()]))
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
                .contains("`r` is \"eight\": it must be a whole number")
        );
    }
}

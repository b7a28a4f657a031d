//! Target modules: PEFT's settings and a model's linear layers -> LoRA sites, in model order.
//!
//! Takes the model's linear layers (path, sizes) and `LoraConfig`; returns one `Site` for each selected layer. Selects as PEFT
//! does, but refuses every entry that matches nothing, where PEFT requires only one match. Knows nothing of tensors and files.

use std::collections::BTreeMap;

use crate::error::{Error, Kind, Result};

use super::matching::{KeyPattern, LayerFilter, MatchKind, Matcher, first_match, is_suffix};
use super::options::{LoraConfig, Targets};
use super::target_errors::{no_modules_selected, no_such_module};

/// The kinds of layers that can carry LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ModuleKind {
    /// A linear layer.
    #[default]
    Linear,
    /// A linear layer whose weight files hold transposed, (in, out): transformers' Conv1D.
    Conv1d,
    /// An embedding: `in_features` are its rows, `out_features` its columns.
    Embedding,
}

/// A layer of a model that can carry LoRA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Rows of its weight.
    pub out_features: usize,
    /// Columns of its weight.
    pub in_features: usize,
    /// Its kind.
    pub kind: ModuleKind,
}

/// LoRA on one layer: `y = W x + scaling * B (A x)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// The layer's name.
    pub path: String,
    /// Columns of A.
    pub in_features: usize,
    /// Rows of B.
    pub out_features: usize,
    /// Rows of A, columns of B.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub scaling: f64,
    /// The layer's kind.
    pub kind: ModuleKind,
}

/// The sites of `settings` on a model with the linear layers `modules` (in model order), of which `output_embedding` is the
/// one that `all-linear` leaves out (empty: there is none).
///
/// # Errors
/// An illegal setting, or an entry of a list or pattern that matches no module: the error lists the names that exist.
pub fn select(
    modules: &[Module],
    output_embedding: &str,
    settings: &LoraConfig,
) -> Result<Vec<Site>> {
    check_values(settings)?;
    let chosen = select_modules(modules, output_embedding, settings)?;
    let unmatched = unmatched_entries(modules, &chosen, output_embedding, settings)?;
    if !unmatched.is_empty() {
        return Err(no_such_module(modules, &unmatched, settings));
    }
    if chosen.is_empty() {
        return Err(no_modules_selected(modules, settings));
    }
    sites(chosen, settings)
}

/// The sites of `settings`, as [`select`]; entries that match nothing are no errors.
///
/// # Errors
/// A pattern that is no regular expression.
pub fn select_matching(
    modules: &[Module],
    output_embedding: &str,
    settings: &LoraConfig,
) -> Result<Vec<Site>> {
    sites(
        select_modules(modules, output_embedding, settings)?,
        settings,
    )
}

fn sites(chosen: Vec<&Module>, settings: &LoraConfig) -> Result<Vec<Site>> {
    let ranks = RankResolver::new(settings)?;
    chosen
        .into_iter()
        .map(|module| ranks.site(module))
        .collect()
}

/// The modules that targets, exclusions and layers select, in model order.
pub(super) fn select_modules<'m>(
    modules: &'m [Module],
    output_embedding: &str,
    settings: &LoraConfig,
) -> Result<Vec<&'m Module>> {
    let targets = Matcher::new(&settings.target_modules, "target_modules")?;
    let exclude = settings
        .exclude_modules
        .as_ref()
        .map(|exclude| Matcher::new(exclude, "exclude_modules"))
        .transpose()?;
    let wanted = settings
        .layers_to_transform
        .as_deref()
        .filter(|wanted| !wanted.is_empty());
    let layers = LayerFilter::new(&settings.layers_pattern)?;
    let mut chosen = Vec::new();
    for module in modules {
        let is_embedding = module.kind == ModuleKind::Embedding || module.path == output_embedding;
        if matches!(targets, Matcher::All) && is_embedding {
            continue;
        }
        if let Some(exclude) = &exclude
            && exclude.find(&module.path)? != MatchKind::None
        {
            continue;
        }
        if is_inside(&module.path, &settings.modules_to_save) {
            continue;
        }
        let keep = match (targets.find(&module.path)?, wanted) {
            (MatchKind::None, _) => false,
            (MatchKind::Suffix, Some(wanted)) => layers
                .index(&module.path)?
                .is_some_and(|index| wanted.contains(&index)),
            _ => true,
        };
        if keep {
            chosen.push(module);
        }
    }
    Ok(chosen)
}

/// Whether `path` is a module that ends with one of `names`, or is inside one.
fn is_inside(path: &str, names: &[String]) -> bool {
    let ends = path.match_indices('.').map(|(dot, _)| dot);
    let mut modules = ends.chain([path.len()]).map(|end| &path[..end]);
    modules.any(|module| names.iter().any(|name| is_suffix(module, name)))
}

/// Rank and scaling by module: the defaults and the compiled patterns.
pub(super) struct RankResolver {
    r: usize,
    lora_alpha: f64,
    use_rslora: bool,
    rank_pattern: Vec<(KeyPattern, usize)>,
    alpha_pattern: Vec<(KeyPattern, f64)>,
}

impl RankResolver {
    /// Compiles the patterns of `settings`.
    pub(super) fn new(settings: &LoraConfig) -> Result<Self> {
        let ranks = settings
            .rank_pattern
            .iter()
            .map(|(key, r)| Ok((KeyPattern::new(key, "rank_pattern")?, *r)));
        let alphas = settings
            .alpha_pattern
            .iter()
            .map(|(key, alpha)| Ok((KeyPattern::new(key, "alpha_pattern")?, *alpha)));
        Ok(Self {
            r: settings.r,
            lora_alpha: settings.lora_alpha,
            use_rslora: settings.use_rslora,
            rank_pattern: ranks.collect::<Result<_>>()?,
            alpha_pattern: alphas.collect::<Result<_>>()?,
        })
    }

    /// The rank of the module `path`.
    pub(super) fn rank(&self, path: &str) -> Result<usize> {
        Ok(first_match(&self.rank_pattern, path)?.unwrap_or(self.r))
    }

    /// The site on `module`.
    pub(super) fn site(&self, module: &Module) -> Result<Site> {
        let r = self.rank(&module.path)?;
        let lora_alpha = first_match(&self.alpha_pattern, &module.path)?.unwrap_or(self.lora_alpha);
        let scaling = if self.use_rslora {
            lora_alpha / (r as f64).sqrt()
        } else {
            lora_alpha / r as f64
        };
        let Module {
            path,
            out_features,
            in_features,
            kind,
        } = module.clone();
        Ok(Site {
            path,
            in_features,
            out_features,
            r,
            lora_alpha,
            scaling,
            kind,
        })
    }
}

/// The shortest suffixes that match all of `chosen` and none of the other `modules`, in model order: PEFT's replacement for a long
/// list of `target_modules` (`tuners_utils.py: _find_minimal_target_modules`). `modules` are linear layers: PEFT
/// compares with all modules, which differs only where a container ends like a layer.
pub fn shortest_names(modules: &[Module], chosen: &[&str]) -> Vec<String> {
    let others: Vec<&str> = modules
        .iter()
        .map(|module| module.path.as_str())
        .filter(|path| !chosen.contains(path))
        .collect();
    let mut names: Vec<String> = Vec::new();
    for path in chosen {
        if names.iter().any(|name| is_suffix(path, name)) {
            continue;
        }
        let name = suffixes(path)
            .find(|suffix| !others.iter().any(|other| is_suffix(other, suffix)))
            .unwrap_or(path);
        names.push(name.to_string());
    }
    names
}

/// `c`, `b.c`, `a.b.c` of `a.b.c`.
fn suffixes(path: &str) -> impl Iterator<Item = &str> {
    path.rmatch_indices('.')
        .map(|(dot, _)| &path[dot + 1..])
        .chain(std::iter::once(path))
}

/// Refuses a rank that no layer of this rank can use: B A of a layer (out, in) has a rank of at most min(out, in).
///
/// # Errors
/// A rank above the smaller dimension of every layer that has it.
pub fn check_ranks(settings: &LoraConfig, sites: &[Site]) -> Result<()> {
    let mut usable = BTreeMap::new();
    for site in sites {
        let most = usable.entry(site.r).or_insert(0);
        *most = site.in_features.min(site.out_features).max(*most);
    }
    let Some((r, most)) = usable.into_iter().find(|(r, most)| r > most) else {
        return Ok(());
    };
    let key = if r == settings.r { "r" } else { "rank_pattern" };
    Err(Error::new(
        Kind::Adapter,
        format!(
            "the rank is larger than any of its layers, which makes B A no more expressive: `{key}`"
        ),
    )
    .value(r.to_string())
    .rule(format!(
        "at most {most}, the smaller dimension of the largest of its layers"
    ))
    .hint(format!(
        "write {most} or less; ranks from 4 to 64 are usual"
    )))
}

/// Refuses values with which LoRA cannot be trained.
///
/// # Errors
/// A rank of 0, an alpha that is not above 0, a dropout of 1, and layers that PEFT would not accept.
pub fn check_values(settings: &LoraConfig) -> Result<()> {
    let refuse = |key: &str, value: String, rule: &str| {
        Err(Error::new(Kind::Adapter, format!("`{key}` is not usable"))
            .value(value)
            .rule(rule))
    };
    let ranks = settings.rank_pattern.iter();
    let ranks = ranks.map(|(key, r)| (format!("rank_pattern.\"{key}\""), *r));
    for (key, r) in [("r".to_string(), settings.r)].into_iter().chain(ranks) {
        if r == 0 {
            return refuse(&key, r.to_string(), "a rank is at least 1");
        }
    }
    let alphas = settings.alpha_pattern.iter();
    let alphas = alphas.map(|(key, alpha)| (format!("alpha_pattern.\"{key}\""), *alpha));
    let lora_alpha = ("lora_alpha".to_string(), settings.lora_alpha);
    for (key, alpha) in [lora_alpha].into_iter().chain(alphas) {
        if !alpha.is_finite() || alpha <= 0.0 {
            let rule = "a finite number above 0, which would switch the adapter off";
            return refuse(&key, alpha.to_string(), rule);
        }
    }
    if !(0.0..1.0).contains(&settings.lora_dropout) {
        let rule = "a probability from 0 up to, not including, 1";
        return refuse("lora_dropout", settings.lora_dropout.to_string(), rule);
    }
    if settings.use_dora && settings.lora_bias {
        let rule = "PEFT refuses it beside `use_dora`";
        return refuse("lora_bias", "true".into(), rule);
    }
    check_layers(settings)
}

/// PEFT's rules in `LoraConfig.__post_init__`.
fn check_layers(settings: &LoraConfig) -> Result<()> {
    let is_list = matches!(settings.target_modules, Targets::Names(_));
    if settings.layers_to_transform.is_some() {
        if is_list {
            return Ok(());
        }
        return Err(Error::new(Kind::Adapter, "`layers_to_transform` works with a list of names only")
            .rule("PEFT refuses it beside `all-linear` or a regular expression")
            .hint("write `target_modules` as a list of names, as in `target_modules = [\"q_proj\", \"v_proj\"]`"));
    }
    if settings.layers_pattern.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        Kind::Adapter,
        "`layers_pattern` needs `layers_to_transform`",
    )
    .value(settings.layers_pattern.join(", "))
    .hint(
        "add `layers_to_transform = [0, 1]` with the layers you mean, or remove `layers_pattern`",
    ))
}

/// Each (setting, entry) that matches no module, or, of `rank_pattern` and `alpha_pattern`, none of the `chosen` ones if there are
/// any; `exclude_modules` may name the output embedding in any case.
pub(super) fn unmatched_entries(
    modules: &[Module],
    chosen: &[&Module],
    output_embedding: &str,
    settings: &LoraConfig,
) -> Result<Vec<(&'static str, String)>> {
    let targets = &settings.target_modules;
    let mut unmatched = unmatched_targets(modules, "target_modules", targets, "")?;
    if let Some(exclude) = &settings.exclude_modules {
        let excluded = unmatched_targets(modules, "exclude_modules", exclude, output_embedding)?;
        unmatched.extend(excluded);
    }
    let ranks = settings.rank_pattern.iter();
    let ranks = ranks.map(|(key, _)| ("rank_pattern", key));
    let alphas = settings.alpha_pattern.iter();
    let alphas = alphas.map(|(key, _)| ("alpha_pattern", key));
    for (setting, key) in ranks.chain(alphas) {
        let pattern = KeyPattern::new(key, setting)?;
        let matched = if chosen.is_empty() {
            any_module(modules, |path| pattern.matches(path))?
        } else {
            any_module(chosen.iter().copied(), |path| pattern.matches(path))?
        };
        if !matched {
            unmatched.push((setting, key.clone()));
        }
    }
    let layers = LayerFilter::new(&settings.layers_pattern)?;
    for layer in settings.layers_to_transform.iter().flatten() {
        if !any_module(modules, |path| Ok(layers.index(path)? == Some(*layer)))? {
            unmatched.push(("layers_to_transform", layer.to_string()));
        }
    }
    Ok(unmatched)
}

/// The entries of `targets` that match no module; `optional` may be named although no module has that path.
fn unmatched_targets(
    modules: &[Module],
    setting: &'static str,
    targets: &Targets,
    optional: &str,
) -> Result<Vec<(&'static str, String)>> {
    let entries = match targets {
        Targets::AllLinear => return Ok(Vec::new()),
        Targets::Names(names) => names.clone(),
        Targets::Regex(pattern) => vec![pattern.clone()],
    };
    let matcher = Matcher::new(targets, setting)?;
    let mut unmatched = Vec::new();
    for entry in entries {
        let matched = match matcher {
            Matcher::Names(_) => {
                entry == optional || modules.iter().any(|module| is_suffix(&module.path, &entry))
            }
            _ => any_module(modules, |path| Ok(matcher.find(path)? != MatchKind::None))?,
        };
        if !matched {
            unmatched.push((setting, entry));
        }
    }
    Ok(unmatched)
}

fn any_module<'m>(
    modules: impl IntoIterator<Item = &'m Module>,
    mut test: impl FnMut(&str) -> Result<bool>,
) -> Result<bool> {
    for module in modules {
        if test(&module.path)? {
            return Ok(true);
        }
    }
    Ok(false)
}

//! The trained part of a recipe, resolved against the model's layers.

use super::prepare::Target;
use crate::adapter::{self, LoraConfig};
use crate::error::{Error, Kind, Result};
use crate::model::{Architecture, ModelShape};
use crate::recipe::{self, Adapter, Recipe};

/// The layers that the recipe trains.
///
/// # Errors
/// Targets that match no layer, an adapter of `init_from` that does not fit or that the recipe contradicts.
pub(super) fn target(recipe: &Recipe, architecture: &Architecture) -> Result<Target> {
    let Adapter::Lora(lora) = &recipe.adapter else {
        return Ok(Target::All);
    };
    let modules = architecture.modules();
    let mut settings = lora.config.clone();
    let mut from = None;
    let sites = if let Some(path) = &lora.init_from {
        let adapter = adapter::load(path)?;
        let lora_dropout = settings.lora_dropout;
        settings = LoraConfig {
            lora_dropout,
            ..adapter.config.settings()
        };
        refuse_contradictions(lora, &settings)?;
        let layers = adapter.attach(&modules)?;
        let sites = layers.into_iter().map(|layer| layer.site).collect();
        from = Some(Box::new(adapter));
        sites
    } else {
        adapter::select(&modules, "lm_head", &settings)?
    };
    if let Some(site) = sites.iter().find(|site| site.path == "lm_head") {
        return Err(Error::new(
            Kind::Adapter,
            "an adapter on the output embedding is not supported",
        )
        .value(site.path.clone())
        .hint("leave `lm_head` out of target_modules"));
    }
    Ok(Target::Lora {
        settings: Box::new(settings),
        sites,
        from,
    })
}

/// With `init_from` the adapter's settings hold: keys that the recipe writes may repeat them, not contradict them.
fn refuse_contradictions(lora: &recipe::Lora, adapter: &LoraConfig) -> Result<()> {
    let written = &lora.config;
    let differs = |key: &str| {
        let (differs, value) = match key {
            "r" => (written.r != adapter.r, adapter.r.to_string()),
            "lora_alpha" => (
                written.lora_alpha != adapter.lora_alpha,
                adapter.lora_alpha.to_string(),
            ),
            "use_rslora" => (
                written.use_rslora != adapter.use_rslora,
                adapter.use_rslora.to_string(),
            ),
            "target_modules" => (
                written.target_modules != adapter.target_modules,
                format!("{:?}", adapter.target_modules),
            ),
            "rank_pattern" => (
                written.rank_pattern != adapter.rank_pattern,
                format!("{:?}", adapter.rank_pattern),
            ),
            "alpha_pattern" => (
                written.alpha_pattern != adapter.alpha_pattern,
                format!("{:?}", adapter.alpha_pattern),
            ),
            _ => return None,
        };
        differs.then_some(value)
    };
    let mut keys = lora.written.iter();
    let Some((key, value)) = keys.find_map(|key| Some((key, differs(key)?))) else {
        return Ok(());
    };
    Err(Error::new(
        Kind::Recipe,
        format!("`adapter.{key}` contradicts the adapter that `init_from` continues"),
    )
    .at(format!("adapter.{key}"))
    .rule(format!("the adapter holds {value}"))
    .hint(format!("leave `{key}` out of [adapter]")))
}

/// The shape that a step's work and memory follow from.
pub(super) fn shape_of(
    recipe: &Recipe,
    architecture: &Architecture,
    target: &Target,
) -> ModelShape {
    let dtype = recipe.model.dtype;
    let Target::Lora {
        settings, sites, ..
    } = target
    else {
        return ModelShape::fully_trained(architecture, dtype);
    };
    let dropout = settings.lora_dropout > 0.0;
    ModelShape::with_adapters(architecture, sites, dropout, dtype)
}

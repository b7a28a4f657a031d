//! The trained part of a recipe, resolved against the model's layers.

use super::checks::{dropout_warning, experts_warning};
use super::continued::continue_adapter;
use super::prepare::Target;
use crate::adapter::config::OneOrMany;
use crate::adapter::convert::double_rank;
use crate::adapter::decomposition::check_sites;
use crate::adapter::targets::check_ranks;
use crate::adapter::{Adaptation, LoraConfig, LoraInit, PeftConfig, check_portable};
use crate::error::{Error, Kind, Result};
use crate::model::{Architecture, ModelShape};
use crate::recipe::{Adapter, Quantization, Recipe};

/// The layers that the recipe trains. With `init_from` the recipe gets the adapter's settings.
///
/// # Errors
/// Targets that match no layer, a rank that no layer can use, an adapter of `init_from` that does not fit or that the recipe
/// contradicts.
pub(super) fn target(recipe: &mut Recipe, architecture: &Architecture) -> Result<Target> {
    let Adapter::Lora(lora) = &mut recipe.adapter else {
        if architecture.names.composite.is_some() {
            return Err(Error::new(
                Kind::Model,
                "every weight of a composite model is to be trained, and only its text decoder can be",
            )
            .value(&architecture.class)
            .rule("`adapter.type` = \"lora\": the other parts then stay as they are stored")
            .hint("write `type = \"lora\"` in [adapter], or use the text-only model"));
        }
        return Ok(Target::All);
    };
    let layout = architecture.layout();
    let quantised = recipe.model.quantization != Quantization::None;
    if quantised && lora.config.init_lora_weights.changes_the_base() {
        let init = lora.config.init_lora_weights;
        return Err(Error::new(
            Kind::Adapter,
            format!("`init_lora_weights = \"{init}\"` cannot change quantised weights"),
        )
        .key("adapter.init_lora_weights")
        .hint("write `quantization = \"none\"` in [model], or `init_lora_weights = \"default\"`"));
    }
    let target = match lora.init_from.clone() {
        Some(path) => {
            continue_adapter(lora, &path, &layout).map_err(|e| e.key("adapter.init_from"))?
        }
        None => {
            let adaptation = Adaptation::select(&layout, &lora.config)
                .map_err(|e| e.key("adapter.target_modules"))?;
            check_ranks(&lora.config, &adaptation.sites).map_err(|e| e.key("adapter.r"))?;
            check_init(&lora.config, &adaptation, &layout.output_embedding)
                .map_err(|e| e.key("adapter.init_lora_weights"))?;
            Target::Lora {
                settings: Box::new(lora.config.clone()),
                adaptation,
                from: None,
            }
        }
    };
    let Target::Lora {
        settings,
        adaptation,
        ..
    } = &target
    else {
        return Ok(target);
    };
    if lora.loraplus_lr_ratio.is_some() && adaptation.has_embedding() {
        return Err(Error::new(
            Kind::Adapter,
            "LoRA+ is not supported with LoRA on an embedding",
        )
        .rule("PEFT gives it a rate of its own, 1e-6")
        .hint("leave `loraplus_lr_ratio` out, or the embedding out of `target_modules`"));
    }
    let config = saved_config(settings, adaptation, architecture, "", None)
        .map_err(|e| e.key("adapter.init_lora_weights"))?;
    if lora.portable {
        check_portable(&config).map_err(|e| e.key("adapter.portable"))?;
    }
    Ok(target)
}

/// Refuses an initialisation that cannot be applied to the layers, or not beside other settings.
fn check_init(
    settings: &LoraConfig,
    adaptation: &Adaptation,
    output_embedding: &str,
) -> Result<()> {
    let init = adaptation.init;
    check_sites(init, &adaptation.sites, output_embedding)?;
    let beside = [
        (settings.use_dora, "use_dora"),
        (settings.lora_bias, "lora_bias"),
    ];
    let other = beside.into_iter().find(|(used, _)| *used);
    match other.filter(|_| init != LoraInit::Default) {
        Some((_, key)) => Err(Error::new(
            Kind::Adapter,
            format!("`init_lora_weights = \"{init}\"` cannot be combined with `{key}`"),
        )
        .hint(format!(
            "leave one of the two out: `{key}`, or `init_lora_weights`"
        ))),
        None => Ok(()),
    }
}

/// The configuration that the adapter is saved with; `base` and `revision` name the model.
///
/// # Errors
/// A pattern that is no regular expression.
pub(super) fn saved_config(
    settings: &LoraConfig,
    adaptation: &Adaptation,
    architecture: &Architecture,
    base: &str,
    revision: Option<&str>,
) -> Result<PeftConfig> {
    let modules = architecture.modules();
    let mut config = PeftConfig::for_sites(settings, &adaptation.sites, &modules, base, revision)?;
    // A list of names would match layers of the other parts, too.
    let towers = architecture.names.tower_modules();
    let excluded = config.exclude_modules.take();
    config.exclude_modules = excluded.or(towers.map(OneOrMany::One));
    if let Some(classified) = architecture.classified() {
        config.task_type = Some(classified.task_type().into());
    }
    if adaptation.init.changes_the_base() {
        double_rank(&mut config)?;
    }
    Ok(config)
}

/// Parts of the configurations of the model and of the continued adapter that have no effect.
pub(super) fn config_warnings(target: &Target, architecture: &Architecture) -> Result<Vec<String>> {
    let mut warnings: Vec<String> = dropout_warning(architecture).into_iter().collect();
    if let Target::Lora { settings, .. } = target {
        warnings.extend(experts_warning(architecture, &settings.target_modules));
    }
    if let Target::Lora {
        from: Some(adapter),
        ..
    } = target
    {
        let beside = architecture.names.tower_modules();
        warnings.extend(adapter.warnings(&architecture.layout(), beside.as_deref())?);
    }
    Ok(warnings)
}

/// The shape that a step's work and memory follow from.
pub(super) fn shape_of(
    recipe: &Recipe,
    architecture: &Architecture,
    target: &Target,
) -> ModelShape {
    let dtype = recipe.model.dtype;
    let Target::Lora {
        settings,
        adaptation,
        ..
    } = target
    else {
        return ModelShape::fully_trained(architecture, dtype);
    };
    let dropout = settings.lora_dropout > 0.0;
    ModelShape::with_adapters(architecture, adaptation, dropout, dtype)
}

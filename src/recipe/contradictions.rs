//! What each key allows and all together do not.
//!
//! Takes the recipe as read and the spans of its keys, notes every contradiction with a hint. Pairs of keys that exclude each
//! other are noted where they are read, in `sections`.

use super::key::{Key, keys_of};
use super::reader::Reader;
use super::sections::*;
use super::setting::per;
use crate::adapter::options::{LoraConfig, Targets};

/// Notes every contradiction. A value that is invalid by itself has been noted and has its default here.
pub(super) fn note(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    lora_keys_without_lora(recipe, reader);
    quantised_weights_that_are_trained(recipe, reader);
    model_file_of_another_format(recipe, reader);
    layers_without_names(recipe, reader);
    cost_without_price(recipe, reader);
    measured_baselines(recipe, reader);
    early_stopping(recipe, reader);
}

fn lora_keys_without_lora(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    if recipe.adapter != Adapter::None {
        return;
    }
    for key in keys_of::<LoraConfig>().into_iter().chain([
        &adapter::loraplus_lr_ratio,
        &adapter::portable,
        &adapter::init_from,
    ]) {
        if let Some(span) = reader.span(key) {
            let path = key.path();
            reader.diagnostics.add(
                span,
                format!("`{path}` has no meaning with `adapter.type = \"none\"`, which trains every weight"),
                "only LoRA has it",
                "remove it, or write `type = \"lora\"`",
            );
        }
    }
}

fn quantised_weights_that_are_trained(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    let quantised = recipe.model.quantization != Quantization::None;
    let span = reader.span(&model::quantization);
    if let (Adapter::None, true, Some(span)) = (&recipe.adapter, quantised, span) {
        reader.diagnostics.add(
            span,
            "quantised weights cannot be trained",
            "`adapter.type = \"none\"` trains every weight",
            "write `quantization = \"none\"`, or `type = \"lora\"` in [adapter]",
        );
    }
}

fn model_file_of_another_format(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    let other = |file: &&String| !file.ends_with(".gguf");
    if let (Some(_), Some(span)) = (
        recipe.model.file.as_ref().filter(other),
        reader.span(&model::file),
    ) {
        reader.diagnostics.add(
            span,
            "`model.file` is not a GGUF file",
            "a model in safetensors files is named by its repository or directory alone",
            "name a file that ends in `.gguf`, or remove the key",
        );
    }
}

/// PEFT refuses the pair too: layers are chosen among names.
fn layers_without_names(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    let Adapter::Lora(Lora {
        config, init_from, ..
    }) = &recipe.adapter
    else {
        return;
    };
    if init_from.is_some() && reader.span(&lora::target_modules).is_none() {
        // The adapter names the modules.
        return;
    }
    let (Some(_), Some(span)) = (
        &config.layers_to_transform,
        reader.span(&lora::layers_to_transform),
    ) else {
        return;
    };
    let targets = match &config.target_modules {
        Targets::Names(_) => return,
        Targets::Regex(_) => "a regex in `adapter.target_modules`",
        Targets::AllLinear => "`target_modules = \"all-linear\"`, the default",
    };
    reader.diagnostics.add(
        span,
        format!(
            "`{}` cannot be combined with {targets}",
            lora::layers_to_transform.path()
        ),
        "layers are chosen for a list of names",
        "name modules in a list, as in `target_modules = [\"q_proj\", \"v_proj\"]`",
    );
}

fn cost_without_price(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    let (Some(cost), Some(span)) = (&recipe.budget.cost, reader.span(&budget::cost)) else {
        return;
    };
    let currency = &cost.currency;
    let price_span = reader.span(&energy::price);
    let (span, what, hint) = match (&recipe.energy.price, price_span) {
        (Some(price), Some(at)) if price.money.currency != *currency => {
            let unit = per(price.per);
            let other = &price.money.currency;
            (
                at.max(span),
                format!("`budget.cost` is in {currency} and `energy.price` in {other}"),
                format!(
                    "write the price in {currency}, as in `price = \"0.30 {currency}/{unit}\"`"
                ),
            )
        }
        (None, None) => (
            span,
            "`budget.cost` needs `energy.price`, which is missing".to_string(),
            format!(
                "under `[energy]` add `price = \"0.30 {currency}/kWh\"`, or `price = \"2.50 {currency}/h\"` for a rented device"
            ),
        ),
        // A price that is itself invalid has been noted.
        _ => return,
    };
    let rule = "a budget of money needs a price in the same currency";
    reader.diagnostics.add(span, what, rule, hint);
}

/// A measured baseline needs validation records, and must train differently from the run.
fn measured_baselines(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    let validated = [&validation::validation, &validation::validation_fraction]
        .iter()
        .any(|key| reader.span(key).is_some());
    let mut check = |key: &'static Key, compared: Compared, is_the_run: bool, training: &str| {
        let Some(span) = reader.span(key).filter(|_| compared == Compared::Measured) else {
            return;
        };
        let (path, name) = (key.path(), key.name);
        if is_the_run {
            reader.diagnostics.add(
                span,
                format!("`{path}` cannot be measured against a run that itself {training}"),
                "a baseline is another way of training",
                format!("write `{name} = \"off\"`"),
            );
        } else if !validated {
            reader.diagnostics.add(
                span,
                format!("`{path} = \"measured\"` needs validation records, which are missing"),
                "two ways of training are compared by their validation loss",
                "under `[data]` add `validation_fraction = 0.05`, or `validation = \"validation.jsonl\"`",
            );
        }
    };
    let compared = &recipe.baseline;
    check(
        &baseline::from_scratch,
        compared.from_scratch,
        recipe.model.init == Init::Random,
        "trains from random weights",
    );
    check(
        &baseline::full_fine_tuning,
        compared.full_fine_tuning,
        recipe.adapter == Adapter::None,
        "trains every weight",
    );
}

/// Early stopping needs evaluations during the run.
fn early_stopping(recipe: &Recipe, reader: &mut Reader<'_, '_>) {
    let patience = reader.span(&train::early_stopping);
    let gain = reader.span(&train::early_stopping_gain);
    let (span, what, hint) = match (patience, gain) {
        (None, Some(span)) if recipe.train.early_stopping_gain > 0.0 => (
            span,
            "`train.early_stopping_gain` has no meaning without `train.early_stopping`",
            "write `early_stopping = 3` beside it, or remove it",
        ),
        (Some(span), _) if recipe.data.validation == Validation::None => (
            span,
            "`train.early_stopping` needs validation records, which are missing",
            "under `[data]` add `validation_fraction = 0.05`, or `validation = \"validation.jsonl\"`",
        ),
        (Some(span), _) if recipe.train.eval_every == 0 => (
            span,
            "`train.early_stopping` needs evaluations during the run, and `eval_every` is 0",
            "write `eval_every = 50`",
        ),
        _ => return,
    };
    let rule = "a run stops early by its validation loss";
    reader.diagnostics.add(span, what, rule, hint);
}

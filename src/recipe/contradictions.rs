//! What each key allows and all together do not.
//!
//! Takes what a recipe gives, notes every contradiction at its place with what to type. Knows nothing of what the values become.

use super::Targets;
use super::check::targets;
use super::given::Given;
use super::keys;
use super::mistake::Mistakes;
use crate::units::{Money, Price};

/// Notes what each key allows and all together do not.
pub(super) fn note(given: &Given, mistakes: &mut Mistakes) {
    for (one, other) in [
        ("train.steps", "train.epochs"),
        ("data.validation", "data.validation_fraction"),
        ("train.warmup_ratio", "train.warmup_steps"),
    ] {
        exclusive(given, one, other, mistakes);
    }
    length_is_given(given, mistakes);
    lora_keys_need_lora(given, mistakes);
    layers_need_names(given, mistakes);
    cost_needs_a_price(given, mistakes);
    measured_baselines(given, mistakes);
}

/// Of two keys that say the same thing at most one may be written; the later one is pointed at.
fn exclusive(given: &Given, one: &str, other: &str, mistakes: &mut Mistakes) {
    let (Some(a), Some(b)) = (given.written(one), given.written(other)) else {
        return;
    };
    let what = format!(
        "`{one}` and `{other}` cannot both be given (the other one is at {})",
        mistakes.name(a.min(b))
    );
    mistakes.add(
        a.max(b),
        what,
        format!("`{one}` or `{other}`"),
        "remove one of the two from the recipe",
    );
}

fn length_is_given(given: &Given, mistakes: &mut Mistakes) {
    if given
        .written("train.steps")
        .or(given.written("train.epochs"))
        .is_none()
        && let (Some(steps), Some(epochs)) = (keys::find("train.steps"), keys::find("train.epochs"))
    {
        let place = given.place_of_table("train", mistakes);
        let hint = format!(
            "{} (or `{}`)",
            given.remedy_for_missing(steps),
            epochs.sample()
        );
        mistakes.add(
            place,
            "`train.steps` or `train.epochs` is missing",
            "one of the two says how long to train",
            hint,
        );
    }
}

fn lora_keys_need_lora(given: &Given, mistakes: &mut Mistakes) {
    if given.text("adapter.type") != Some("none") {
        return;
    }
    for (key, place) in given
        .written_in("adapter")
        .filter(|(key, _)| key.is_of_lora())
    {
        let what = format!(
            "`{}` has no meaning with `adapter.type = \"none\"`, which trains every weight",
            key.path
        );
        mistakes.add(
            place,
            what,
            "only LoRA has it",
            "remove it, or write `type = \"lora\"`",
        );
    }
}

/// What is trained to be compared needs records to compare on, and must not be what the run itself is.
fn measured_baselines(given: &Given, mistakes: &mut Mistakes) {
    let validated = given
        .written("data.validation")
        .or(given.written("data.validation_fraction"))
        .is_some();
    let same = [
        (
            "baseline.from_scratch",
            given.text("model.init") == Some("random"),
            "trains from random weights",
        ),
        (
            "baseline.full_fine_tuning",
            given.text("adapter.type") == Some("none"),
            "trains every weight",
        ),
    ];
    for (path, is_the_run, what_it_does) in same {
        let Some(place) = given
            .written(path)
            .filter(|_| given.text(path) == Some("measured"))
        else {
            continue;
        };
        if is_the_run {
            let what =
                format!("`{path}` cannot be measured against a run that itself {what_it_does}");
            mistakes.add(
                place,
                what,
                "a baseline is another way of training",
                format!("write `{} = \"off\"`", &path[9..]),
            );
        } else if !validated {
            let what =
                format!("`{path} = \"measured\"` needs validation records, which are missing");
            let hint = "under `[data]` add `validation_fraction = 0.05`, or `validation = \"validation.jsonl\"`";
            mistakes.add(
                place,
                what,
                "two ways of training are compared by their validation loss",
                hint,
            );
        }
    }
}

/// PEFT refuses the pair too: layers are chosen among names.
fn layers_need_names(given: &Given, mistakes: &mut Mistakes) {
    let path = "adapter.layers_to_transform";
    let (Some(_), Some(place)) = (given.get(path), given.written(path)) else {
        return;
    };
    let what = match given
        .get("adapter.target_modules")
        .map(|value| targets(value, true))
    {
        Some(Some(Targets::Names(_)) | None) => return,
        Some(Some(Targets::Regex(_))) => "a regex in `adapter.target_modules`",
        _ if given.text("adapter.type") == Some("none") => return,
        _ => "`target_modules = \"all-linear\"`, which holds where nothing is written",
    };
    let hint = "name modules in a list, as in `target_modules = [\"q_proj\", \"v_proj\"]`";
    let what = format!("`{path}` cannot stand beside {what}");
    mistakes.add(place, what, "layers are chosen for a list of names", hint);
}

fn cost_needs_a_price(given: &Given, mistakes: &mut Mistakes) {
    let (Some(cost), Some(place)) = (
        given.quantity::<Money>("budget.cost"),
        given.written("budget.cost"),
    ) else {
        return;
    };
    const RULE: &str = "a budget of money needs a price in the same currency";
    match (
        given.quantity::<Price>("energy.price"),
        given.written("energy.price"),
    ) {
        (Some(price), Some(at)) if price.money.currency != cost.currency => {
            let what = format!(
                "`budget.cost` is in {} and `energy.price` in {}",
                cost.currency, price.money.currency
            );
            let unit = if price.per == crate::units::Per::KilowattHour {
                "kWh"
            } else {
                "h"
            };
            let hint = format!(
                "write the price in {0}, as in `price = \"0.30 {0}/{unit}\"`",
                cost.currency
            );
            mistakes.add(at.max(place), what, RULE, hint);
        }
        (None, None) => {
            let hint = format!(
                "under `[energy]` add `price = \"0.30 {0}/kWh\"`, or `price = \"2.50 {0}/h\"` for a rented device",
                cost.currency
            );
            mistakes.add(
                place,
                "`budget.cost` needs `energy.price`, which is missing",
                RULE,
                hint,
            );
        }
        // A price that is itself mistaken has been noted.
        _ => {}
    }
}

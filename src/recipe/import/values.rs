//! YAML values, as JSON, in TOML.

use serde_json::Value;

/// Whether a key has a value: an empty one leaves the trainer's default.
pub(super) fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => true,
    }
}

/// A number, or a text that is one: YAML 1.1 reads `2e-4` as text.
pub(super) fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

/// A flag, number, text or list of these in TOML.
pub(super) fn toml_value(value: &Value) -> Option<toml_edit::Value> {
    Some(match value {
        Value::Bool(flag) => (*flag).into(),
        Value::Number(count) if count.is_i64() => count.as_i64()?.into(),
        Value::String(text) => match text.parse::<f64>() {
            Ok(number) => number.into(),
            Err(_) => text.as_str().into(),
        },
        Value::Array(items) => {
            let items: Option<toml_edit::Array> = items.iter().map(toml_value).collect();
            items?.into()
        }
        number => number.as_f64()?.into(),
    })
}

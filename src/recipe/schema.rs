//! The recipe's JSON Schema (2020-12), for editors that complete and check as one types.
//!
//! Takes the declarations, returns a document. What a schema cannot say (whether an id is a path, whether a regex compiles)
//! `recipe::parse` says.

use serde_json::{Map, Value, json};

use super::key::{Key, Presence, of_table};
use super::sections::TABLES;

/// The JSON Schema of a recipe.
///
/// ```
/// let schema = wattune::recipe::json_schema();
/// assert_eq!(schema["properties"]["train"]["properties"]["learning_rate"]["default"], 2e-4);
/// ```
pub fn json_schema() -> Value {
    let mut properties = properties_of("");
    for (table, about) in TABLES {
        properties.insert(table.into(), table_schema(table, about));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "wattune recipe",
        "description": "What a run is: which model, what is trained, on what, how, within what budget",
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
        "required": ["model", "data"],
        // Steps, epochs, or a budget.
        "anyOf": [
            { "properties": { "train": { "required": ["steps"] } }, "required": ["train"] },
            { "properties": { "train": { "required": ["epochs"] } }, "required": ["train"] },
            { "properties": { "budget": { "minProperties": 1 } }, "required": ["budget"] },
        ],
        // A budget of money needs a price.
        "if": { "properties": { "budget": { "required": ["cost"] } }, "required": ["budget"] },
        "then": { "properties": { "energy": { "required": ["price"] } }, "required": ["energy"] },
    })
}

fn table_schema(table: &str, about: &str) -> Value {
    let mut schema = json!({
        "description": about,
        "type": "object",
        "additionalProperties": false,
        "properties": properties_of(table),
    });
    let required: Vec<&str> = of_table(table)
        .filter(|key| key.presence == Presence::Required)
        .map(|key| key.name)
        .collect();
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    match table {
        "train" => {
            let both = [["steps", "epochs"], ["warmup_ratio", "warmup_steps"]];
            let both = both.map(|keys| json!({ "required": keys }));
            schema["not"] = json!({ "anyOf": both });
        }
        "data" => schema["not"] = json!({ "required": ["validation", "validation_fraction"] }),
        "adapter" => {
            schema["if"] =
                json!({ "properties": { "type": { "const": "none" } }, "required": ["type"] });
            schema["then"] = json!({ "maxProperties": 1 });
        }
        _ => {}
    }
    schema
}

fn properties_of(table: &str) -> Map<String, Value> {
    of_table(table)
        .map(|key| (key.name.to_string(), key_schema(key)))
        .collect()
}

fn key_schema(key: &Key) -> Value {
    let mut schema = json!({ "description": key.doc() });
    if let Value::Object(of_type) = key.values().schema {
        for (word, value) in of_type {
            schema[word] = value;
        }
    }
    let value = toml_as_json(key.value);
    match key.presence {
        Presence::Defaulted => schema["default"] = value,
        Presence::Required | Presence::Optional => schema["examples"] = json!([value]),
    }
    schema
}

/// A declared default or example in JSON.
fn toml_as_json(value: &str) -> Value {
    let document: toml::Table =
        toml::from_str(&format!("x = {value}")).expect("a declared value is TOML");
    serde_json::to_value(&document["x"]).expect("every TOML value of a declaration has a JSON form")
}

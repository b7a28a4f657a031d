//! The recipe's JSON Schema (2020-12), for editors that complete and check as one types.
//!
//! Takes the table of keys, returns a document. What a schema cannot say (whether an id is a path, whether a regex compiles)
//! `recipe::parse` says.

use serde_json::{Map, Value, json};

use super::keys::{self, ALL_LINEAR, FIELDS, Key, Kind, Presence, Range, TABLES};

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
        "required": ["model", "data", "train"],
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
    let needed: Vec<&str> = keys::of_table(table)
        .filter(|key| key.presence == Presence::Needed)
        .map(Key::name)
        .collect();
    if !needed.is_empty() {
        schema["required"] = json!(needed);
    }
    match table {
        "train" => {
            schema["oneOf"] = json!([{ "required": ["steps"] }, { "required": ["epochs"] }]);
            schema["not"] = json!({ "required": ["warmup_ratio", "warmup_steps"] });
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
    keys::of_table(table)
        .map(|key| (key.name().to_string(), key_schema(key)))
        .collect()
}

fn key_schema(key: &Key) -> Value {
    let mut schema = json!({ "description": key.doc });
    let Value::Object(of_kind) = kind_schema(&key.kind) else {
        return schema;
    };
    for (word, value) in of_kind {
        schema[word] = value;
    }
    let value = toml_as_json(key.value);
    match key.presence {
        Presence::Defaulted => schema["default"] = value,
        Presence::Needed | Presence::Optional => schema["examples"] = json!([value]),
    }
    schema
}

fn kind_schema(kind: &Kind) -> Value {
    match kind {
        Kind::Text => json!({ "type": "string", "minLength": 1 }),
        Kind::Name => json!({ "type": "string", "pattern": "^[^/\\\\]*$" }),
        Kind::Choice(words) => json!({ "enum": words() }),
        Kind::ChoiceOrCount { words, .. } => {
            json!({ "anyOf": [{ "enum": words() }, { "type": "integer", "minimum": 0, "maximum": keys::MANY }] })
        }
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Count { least, most } => {
            json!({ "type": "integer", "minimum": least, "maximum": most })
        }
        Kind::Number(range) => number_schema(range),
        Kind::Quantity(quantity) => {
            let kinds = if quantity.bare {
                json!(["string", "number"])
            } else {
                json!("string")
            };
            json!({ "type": kinds, "pattern": format!("^\\s*[0-9.][0-9._]*([eE][+-]?[0-9]+)?\\s*({})\\s*$", quantity.units) })
        }
        Kind::Grid => json!({ "type": ["string", "number"], "minLength": 1, "minimum": 0 }),
        Kind::Modules { all_linear } => {
            let list = json!({ "type": "array", "items": { "type": "string", "minLength": 1 }, "minItems": 1 });
            let regex = json!({ "type": "string", "minLength": 1, "description": "a regex for a module's whole path" });
            if *all_linear {
                json!({ "anyOf": [{ "const": ALL_LINEAR }, list, regex] })
            } else {
                json!({ "anyOf": [list, regex] })
            }
        }
        Kind::Layers => {
            let layer = json!({ "type": "integer", "minimum": 0 });
            json!({ "anyOf": [{ "type": "array", "items": layer, "minItems": 1 }, layer] })
        }
        Kind::Ranks => {
            json!({ "type": "object", "additionalProperties": { "type": "integer", "minimum": 1 } })
        }
        Kind::Alphas => {
            json!({ "type": "object", "additionalProperties": { "type": "number", "exclusiveMinimum": 0 } })
        }
        Kind::Columns => {
            let fields: Map<String, Value> = FIELDS
                .iter()
                .map(|field| {
                    (
                        field.to_string(),
                        json!({ "type": "string", "minLength": 1 }),
                    )
                })
                .collect();
            json!({ "type": "object", "properties": fields, "additionalProperties": false })
        }
    }
}

fn number_schema(range: &Range) -> Value {
    let low = if range.with_low {
        "minimum"
    } else {
        "exclusiveMinimum"
    };
    let mut schema = json!({ "type": "number", low: range.low });
    if let Some(end) = range.below {
        schema["exclusiveMaximum"] = json!(end);
    }
    schema
}

/// A value of the table of keys in JSON.
fn toml_as_json(value: &str) -> Value {
    let document: toml::Table =
        toml::from_str(&format!("x = {value}")).expect("the table's values are TOML");
    serde_json::to_value(&document["x"]).expect("every TOML value of the table has a JSON form")
}

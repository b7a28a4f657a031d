//! Lists and tables among a recipe's values: modules, layers, module patterns, columns.
//!
//! As `setting`, for values with parts. Every part is looked at, so that each invalid one is noted.

use serde_json::{Map, Value as Json, json};
use toml_edit::{Array, InlineTable, Value};

use super::key::{Bounds, Key};
use super::reader::Field;
use super::setting::{Setting, Values, values};
use super::suggest;
use super::tree::{Entry, Node, Raw};
use crate::adapter::options::{Targets, TokenIndices};
use crate::data::options::COLUMN_FIELDS;

/// The word for "every linear layer except the output embedding".
const ALL_LINEAR: &str = "all-linear";

/// Whether `pattern` compiles; module patterns match the full path of a module.
fn is_pattern(pattern: &str, node: &Node, field: &mut Field<'_, '_>) -> bool {
    // Names compile: a long table of them is read without compiling each.
    let is_name_char = |char: char| char.is_ascii_alphanumeric() || matches!(char, '_' | '-' | '.');
    if !pattern.is_empty() && pattern.chars().all(is_name_char) {
        return true;
    }
    let reason = match fancy_regex::Regex::new(&format!("^(?:{pattern})$")) {
        _ if pattern.is_empty() => "it is empty".to_string(),
        Ok(_) => return true,
        Err(error) => {
            let error = error.to_string();
            error.lines().last().unwrap_or_default().trim().to_string()
        }
    };
    let path = field.key.path();
    let what = format!("`{path}` holds something that is not a regex: {reason}");
    field.note(node, what, field.key.rule(), None);
    false
}

/// The items of a list that is not empty, each read by `item`.
fn read_list<T>(
    node: &Node,
    items: &[Node],
    field: &mut Field<'_, '_>,
    item: impl Fn(&Raw) -> Option<T>,
) -> Option<Vec<T>> {
    let read: Vec<Option<T>> = items
        .iter()
        .map(|node| item(&node.raw).or_else(|| field.invalid(node)))
        .collect();
    if items.is_empty() {
        return field.invalid(node);
    }
    read.into_iter().collect()
}

/// The entries of a table in file order; `is_name` notes an invalid name.
fn read_table<T>(
    node: &Node,
    field: &mut Field<'_, '_>,
    is_name: impl Fn(&Entry, &mut Field<'_, '_>) -> bool,
    value: impl Fn(&Raw) -> Option<T>,
) -> Option<Vec<(String, T)>> {
    let Raw::Table(entries) = &node.raw else {
        return field.wrong_type(node);
    };
    let read: Vec<Option<(String, T)>> = entries
        .iter()
        .map(|entry| {
            let named = is_name(entry, field);
            let value = value(&entry.node.raw).or_else(|| field.invalid(&entry.node))?;
            named.then(|| (entry.key.clone(), value))
        })
        .collect();
    read.into_iter().collect()
}

/// An inline table in the given order; an empty one is not written.
fn write_table<T: Setting>(entries: &[(String, T)]) -> Option<Value> {
    let table: InlineTable = entries
        .iter()
        .filter_map(|(name, value)| Some((name, value.write()?)))
        .collect();
    (!table.is_empty()).then(|| table.into())
}

fn is_pattern_entry(entry: &Entry, field: &mut Field<'_, '_>) -> bool {
    if let Bounds::Of(_) = field.key.bounds {
        return true;
    }
    let name = Node {
        span: entry.key_span,
        raw: Raw::Text(entry.key.clone()),
    };
    is_pattern(&entry.key, &name, field)
}

fn is_column_entry(entry: &Entry, field: &mut Field<'_, '_>) -> bool {
    if COLUMN_FIELDS.contains(&entry.key.as_str()) {
        return true;
    }
    let hint = match suggest::nearest_word(&entry.key, &COLUMN_FIELDS) {
        Some(field) => format!("did you mean `{field}`?"),
        None => "write the wanted field first, then the file's column: `columns = { prompt = \"question\" }`".into(),
    };
    field.diagnostics.add(
        entry.key_span,
        format!("unknown record field `{}`", entry.key),
        field.key.rule(),
        hint,
    );
    false
}

fn text(raw: &Raw) -> Option<String> {
    match raw {
        Raw::Text(text) if !text.is_empty() => Some(text.clone()),
        _ => None,
    }
}

fn index(raw: &Raw) -> Option<usize> {
    match raw {
        Raw::Integer(number) => u32::try_from(*number).ok().map(|index| index as usize),
        _ => None,
    }
}

impl Setting for Targets {
    fn values(key: &Key) -> Values {
        let name = json!({ "type": "string", "minLength": 1 });
        let list = json!({ "type": "array", "items": name, "minItems": 1 });
        let mut regex = name;
        regex["description"] = json!("a regex for a module's whole path");
        let rule = "a list of module names, or a regex for a module's whole path";
        match key.bounds {
            Bounds::AllLinear => values(
                format!("\"{ALL_LINEAR}\", {rule}"),
                json!({ "anyOf": [{ "const": ALL_LINEAR }, list, regex] }),
            ),
            _ => values(rule, json!({ "anyOf": [list, regex] })),
        }
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        let all_linear = matches!(field.key.bounds, Bounds::AllLinear);
        match &node.raw {
            Raw::Text(text) if all_linear && text.eq_ignore_ascii_case(ALL_LINEAR) => {
                Some(Targets::AllLinear)
            }
            Raw::Text(regex) => {
                is_pattern(regex, node, field).then(|| Targets::Regex(regex.clone()))
            }
            Raw::List(names) => read_list(node, names, field, text).map(Targets::Names),
            _ => field.wrong_type(node),
        }
    }

    fn write(&self) -> Option<Value> {
        Some(match self {
            Targets::AllLinear => ALL_LINEAR.into(),
            Targets::Names(names) => names.iter().map(String::as_str).collect::<Array>().into(),
            Targets::Regex(regex) => regex.as_str().into(),
        })
    }
}

/// Names of modules, or other texts.
impl Setting for Vec<String> {
    fn values(key: &Key) -> Values {
        let name = json!({ "type": "string", "minLength": 1 });
        let what = match key.bounds {
            Bounds::Of(what) => what,
            _ => "module names",
        };
        values(
            format!("a list of {what}"),
            json!({ "type": "array", "items": name, "minItems": 1 }),
        )
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        match &node.raw {
            Raw::List(names) => read_list(node, names, field, text),
            _ => field.wrong_type(node),
        }
    }

    fn write(&self) -> Option<Value> {
        let names = self.iter().map(String::as_str).collect::<Array>();
        (!self.is_empty()).then(|| names.into())
    }

    fn absent() -> Option<Self> {
        Some(Vec::new())
    }
}

/// Layer numbers.
impl Setting for Vec<usize> {
    fn values(_: &Key) -> Values {
        let layer = json!({ "type": "integer", "minimum": 0 });
        let list = json!({ "type": "array", "items": layer, "minItems": 1 });
        values(
            "a list of layer numbers, from 0",
            json!({ "anyOf": [list, layer] }),
        )
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        match &node.raw {
            Raw::List(layers) => read_list(node, layers, field, index),
            Raw::Integer(_) => read_list(node, std::slice::from_ref(node), field, index),
            _ => field.wrong_type(node),
        }
    }

    fn write(&self) -> Option<Value> {
        let layers = self.iter().filter_map(Setting::write);
        Some(layers.collect::<Array>().into())
    }
}

/// A list of token ids.
fn tokens(raw: &Raw) -> Option<Vec<u32>> {
    let Raw::List(items) = raw else {
        return None;
    };
    let ids = items
        .iter()
        .map(|item| index(&item.raw).map(|id| id as u32));
    ids.collect::<Option<Vec<u32>>>()
        .filter(|ids| !ids.is_empty())
}

impl Setting for TokenIndices {
    fn values(_: &Key) -> Values {
        let token = json!({ "type": "integer", "minimum": 0 });
        let list = json!({ "type": "array", "items": token, "minItems": 1 });
        let by_module = json!({ "type": "object", "additionalProperties": list.clone() });
        values(
            "a list of token ids, or a table of such lists by module",
            json!({ "anyOf": [list, by_module] }),
        )
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        if let Raw::Table(_) = &node.raw {
            let modules = read_table(node, field, |_, _| true, tokens)?;
            return Some(Self::ByModule(modules.into_iter().collect()));
        }
        tokens(&node.raw)
            .map(Self::Embedding)
            .or_else(|| field.invalid(node))
    }

    fn write(&self) -> Option<Value> {
        let list = |tokens: &[u32]| {
            tokens
                .iter()
                .map(|token| i64::from(*token))
                .collect::<Array>()
        };
        Some(match self {
            Self::Embedding(tokens) => list(tokens).into(),
            Self::ByModule(modules) => {
                let entries = modules.iter().map(|(name, tokens)| (name, list(tokens)));
                entries.collect::<InlineTable>().into()
            }
        })
    }
}

fn patterns(key: &Key, value_rule: &str, value_schema: Json) -> Values {
    let what = match key.bounds {
        Bounds::Of(what) => what,
        _ => "module patterns",
    };
    values(
        format!("a table of {what}, each with {value_rule}"),
        json!({ "type": "object", "additionalProperties": value_schema }),
    )
}

/// Module pattern -> rank.
impl Setting for Vec<(String, usize)> {
    fn values(key: &Key) -> Values {
        patterns(
            key,
            "a whole number of at least 1",
            json!({ "type": "integer", "minimum": 1 }),
        )
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        let rank = |raw: &Raw| index(raw).filter(|rank| *rank >= 1);
        read_table(node, field, is_pattern_entry, rank)
    }

    fn write(&self) -> Option<Value> {
        write_table(self)
    }

    fn absent() -> Option<Self> {
        Some(Vec::new())
    }
}

/// Module pattern -> alpha, or class -> weight.
impl Setting for Vec<(String, f64)> {
    fn values(key: &Key) -> Values {
        patterns(
            key,
            "a finite number above 0",
            json!({ "type": "number", "exclusiveMinimum": 0 }),
        )
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        let positive = |alpha: &f64| alpha.is_finite() && *alpha > 0.0;
        let alpha = |raw: &Raw| raw.number().filter(positive);
        read_table(node, field, is_pattern_entry, alpha)
    }

    fn write(&self) -> Option<Value> {
        write_table(self)
    }

    fn absent() -> Option<Self> {
        Some(Vec::new())
    }
}

/// Field -> column.
impl Setting for Vec<(String, String)> {
    fn values(_: &Key) -> Values {
        let column = json!({ "type": "string", "minLength": 1 });
        let columns = COLUMN_FIELDS.map(|field| (field.to_string(), column.clone()));
        let fields = Map::from_iter(columns);
        values(
            format!(
                "a table of the file's columns by wanted field ({})",
                COLUMN_FIELDS.join(", ")
            ),
            json!({ "type": "object", "properties": fields, "additionalProperties": false }),
        )
    }

    fn read(node: &Node, field: &mut Field<'_, '_>) -> Option<Self> {
        read_table(node, field, is_column_entry, text)
    }

    fn write(&self) -> Option<Value> {
        write_table(self)
    }

    fn absent() -> Option<Self> {
        Some(Vec::new())
    }
}

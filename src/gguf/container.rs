//! The GGUF container, version 3: metadata, the list of tensors, then their values.
//!
//! Little-endian. Every tensor begins at a multiple of 32 bytes from the end of the list.

use crate::error::{Error, Kind, Result};
use crate::ops::StoredFormat;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `UINT32`.
    U32(u32),
    /// `FLOAT32`.
    F32(f32),
    /// `BOOL`.
    Bool(bool),
    /// `STRING`.
    Text(String),
    /// An array of `INT32`.
    I32s(Vec<i32>),
    /// An array of `FLOAT32`.
    F32s(Vec<f32>),
    /// An array of `STRING`.
    Texts(Vec<String>),
}

/// A tensor in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Its shape, outermost dimension first; the file holds the reverse.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub format: StoredFormat,
}

impl TensorInfo {
    /// Bytes of its values.
    pub fn size(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        self.format.bytes_of(elements)
    }
}

/// Everything before the first tensor's values.
///
/// # Errors
/// A tensor in a format that GGUF has not.
pub fn head(metadata: &[(String, Value)], tensors: &[&TensorInfo]) -> Result<Vec<u8>> {
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut head, key);
        put_value(&mut head, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        put_text(&mut head, &tensor.name);
        head.extend((tensor.shape.len() as u32).to_le_bytes());
        for dimension in tensor.shape.iter().rev() {
            head.extend((*dimension as u64).to_le_bytes());
        }
        let format = tensor.format;
        let no_type = || Error::new(Kind::Model, format!("GGUF has no {}", format.name()));
        let id = format.ggml_type().ok_or_else(no_type)?;
        head.extend(id.to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset += tensor.size().next_multiple_of(ALIGNMENT);
    }
    align(&mut head);
    Ok(head)
}

/// Adds zeros up to the next multiple of the alignment: every tensor ends so.
pub fn align(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    const ARRAY: u32 = 9;
    let id = |value: &Value| -> u32 {
        match value {
            Value::U32(_) => 4,
            Value::I32s(_) => 5,
            Value::F32(_) | Value::F32s(_) => 6,
            Value::Bool(_) => 7,
            Value::Text(_) | Value::Texts(_) => 8,
        }
    };
    let mut array = |length: usize| {
        out.extend(ARRAY.to_le_bytes());
        out.extend(id(value).to_le_bytes());
        out.extend((length as u64).to_le_bytes());
    };
    match value {
        Value::I32s(values) => array(values.len()),
        Value::F32s(values) => array(values.len()),
        Value::Texts(values) => array(values.len()),
        _ => out.extend(id(value).to_le_bytes()),
    }
    match value {
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push(u8::from(*value)),
        Value::Text(text) => put_text(out, text),
        Value::I32s(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Value::F32s(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Value::Texts(values) => values.iter().for_each(|text| put_text(out, text)),
    }
}

//! Quantised safetensors files: a matrix and the tensors that hold its scales, as blocks of one format.
//!
//! Read as they are: bitsandbytes in 4 bits (NF4 and FP4, with or without double quantisation) and 8 bits (weights alone), FP8 in tiles,
//! compressed-tensors in 8-bit floats and in groups of packed 4-bit integers. Layouts: `bitsandbytes/functional.py` (MIT),
//! `transformers/integrations/finegrained_fp8.py` and compressed-tensors' `compressors/` (both Apache-2.0).

use std::collections::BTreeMap;

use half::{bf16, f16};
use rayon::prelude::*;
use regex::Regex;
use safetensors::tensor::Dtype;
use serde_json::Value;

use super::architecture::Architecture;
use super::config::Config;
use crate::adapter::shards::TensorEntry;
use crate::error::{Error, Kind, Result};
use crate::ops::StoredFormat;

/// Columns and rows of a tile with one scale.
const TILE: usize = 128;
/// Maxima of blocks that are quantised together (double quantisation).
const NESTED_BLOCK: usize = 256;

/// A kind of quantised matrix in safetensors files: the suffixes of its tensors after the layer's path.
struct Scheme {
    format: StoredFormat,
    /// The tensor that gives it away.
    mark: &'static str,
    codes: &'static str,
    /// Its other tensors; each may be missing.
    others: &'static [&'static str],
}

const NESTED: &[&str] = &[
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
];

const SCHEMES: [Scheme; 6] = [
    Scheme {
        format: StoredFormat::NF4,
        mark: ".weight.quant_state.bitsandbytes__nf4",
        codes: ".weight",
        others: NESTED,
    },
    Scheme {
        format: StoredFormat::FP4,
        mark: ".weight.quant_state.bitsandbytes__fp4",
        codes: ".weight",
        others: NESTED,
    },
    Scheme {
        format: StoredFormat::INT8,
        mark: ".SCB",
        codes: ".weight",
        others: &[".weight_format"],
    },
    Scheme {
        format: StoredFormat::FP8,
        mark: ".weight_scale_inv",
        codes: ".weight",
        others: &[".activation_scale"],
    },
    Scheme {
        format: StoredFormat::INT4,
        mark: ".weight_packed",
        codes: ".weight_packed",
        others: &[
            ".weight_scale",
            ".weight_shape",
            ".weight_zero_point",
            ".weight_g_idx",
        ],
    },
    Scheme {
        format: StoredFormat::FP8,
        mark: ".weight_scale",
        codes: ".weight",
        others: &[".input_scale"],
    },
];

/// Reads the bytes of a tensor.
pub(super) type Read<'a> = &'a dyn Fn(&TensorEntry) -> Result<Vec<u8>>;

impl Architecture {
    /// Marks the linear layers that `quantization_config` says are stored quantised; the weight files correct it.
    ///
    /// # Errors
    /// A method that is not read, by its name.
    pub(super) fn quantize_as_stored(&mut self, config: &Config<'_>) -> Result<()> {
        let Some(settings) = config.object("quantization_config")? else {
            return Ok(());
        };
        if settings.object.is_empty() {
            return Ok(());
        }
        let format = format_of(&settings)?;
        let keys = ["llm_int8_skip_modules", "modules_to_not_convert", "ignore"];
        let lists = keys.iter().filter_map(|key| settings.get(key)?.as_array());
        let skipped: Vec<&str> = lists.flatten().filter_map(Value::as_str).collect();
        for layer in 0..self.num_hidden_layers {
            let block = self.names.block_path(layer);
            let paths = self
                .linears(layer)
                .map(|linear| format!("{block}.{}", linear.name));
            let stored = paths
                .iter()
                .filter(|path| !skipped.iter().any(|name| names(name, path)));
            let formats = stored.map(|path| (format!("{path}.weight"), format));
            self.stored_formats.extend(formats);
        }
        Ok(())
    }
}

/// The format of the matrices under this `quantization_config`.
fn format_of(settings: &Config<'_>) -> Result<StoredFormat> {
    let is_set = |key: &str| settings.get(key) == Some(&Value::Bool(true));
    let [in_8_bits, in_4_bits] = [
        ["load_in_8bit", "_load_in_8bit"],
        ["load_in_4bit", "_load_in_4bit"],
    ]
    .map(|keys| keys.into_iter().any(is_set));
    // Older files of bitsandbytes do not name their method.
    let method = match settings.text("quant_method")? {
        None if in_8_bits || in_4_bits => "bitsandbytes",
        method => method.unwrap_or_default(),
    };
    match method {
        "bitsandbytes" if in_8_bits => Ok(StoredFormat::INT8),
        "bitsandbytes" => match settings.text("bnb_4bit_quant_type")? {
            Some("nf4") => Ok(StoredFormat::NF4),
            None | Some("fp4") => Ok(StoredFormat::FP4),
            Some(_) => Err(settings.wrong("bnb_4bit_quant_type", "nf4 or fp4")),
        },
        "fp8" => Ok(StoredFormat::FP8),
        "compressed-tensors" => match settings.text("format")? {
            Some("float-quantized") => Ok(StoredFormat::FP8),
            Some("pack-quantized") => Ok(StoredFormat::INT4),
            _ => Err(settings.wrong("format", "float-quantized or pack-quantized")),
        },
        _ => Err(settings
            .wrong("quant_method", "bitsandbytes, fp8 or compressed-tensors")
            .hint("use the model's original repository, and quantise it with `quantization = \"nf4\"` in [model]; or a GGUF file of it")),
    }
}

/// Whether `pattern` of a list of modules names the layer `path`: its name, a part of its path, or a regular expression after `re:`.
fn names(pattern: &str, path: &str) -> bool {
    match pattern.strip_prefix("re:") {
        Some(pattern) => Regex::new(pattern)
            .is_ok_and(|regex| regex.find(path).is_some_and(|found| found.start() == 0)),
        None => format!(".{path}.").contains(&format!(".{pattern}.")),
    }
}

/// The tensors of the files, with each quantised matrix and its scales as one.
///
/// # Errors
/// Scales that do not fit their matrix, or of a kind that is not read.
pub(super) fn join_scales(entries: Vec<TensorEntry>, read: Read<'_>) -> Result<Vec<TensorEntry>> {
    let named = entries
        .into_iter()
        .map(|tensor| (tensor.name.clone(), tensor));
    let mut found: BTreeMap<String, TensorEntry> = named.collect();
    for scheme in &SCHEMES {
        let layers = found
            .keys()
            .filter_map(|name| name.strip_suffix(scheme.mark));
        let layers: Vec<String> = layers.map(str::to_string).collect();
        for layer in layers {
            let mut take = |suffix: &str| found.remove(&format!("{layer}{suffix}"));
            let mut scales: Vec<TensorEntry> = scheme
                .others
                .iter()
                .filter_map(|suffix| take(suffix))
                .collect();
            if scheme.mark != scheme.codes {
                scales.extend(take(scheme.mark));
            }
            let name = format!("{layer}.weight");
            let Some(codes) = take(scheme.codes) else {
                return Err(refused(&name, "has scales but no codes in the files"));
            };
            let matrix = Matrix {
                format: scheme.format,
                codes: &codes,
                scales: &scales,
                read,
            };
            let shape = matrix
                .shape()
                .map_err(|error| error.at(format!("`{name}`")))?
                .to_vec();
            let joined = TensorEntry {
                name: name.clone(),
                dtype: Dtype::U8,
                format: Some(scheme.format),
                shape,
                scales,
                ..codes
            };
            found.insert(name, joined);
        }
    }
    Ok(found.into_values().collect())
}

/// The blocks of a matrix that `join_scales` joined, in its format.
///
/// # Errors
/// Codes or scales that cannot be read, or that are no numbers.
pub(super) fn blocks(matrix: &TensorEntry, read: Read<'_>) -> Result<Vec<u8>> {
    let of_name = |error: Error| error.at(format!("`{}`", matrix.name));
    let Some(format) = matrix.format else {
        return Err(refused(&matrix.name, "is not quantised"));
    };
    let parts = Matrix {
        format,
        codes: matrix,
        scales: &matrix.scales,
        read,
    };
    parts.blocks(&matrix.shape).map_err(of_name)
}

/// A quantised matrix in several tensors.
struct Matrix<'a> {
    format: StoredFormat,
    codes: &'a TensorEntry,
    scales: &'a [TensorEntry],
    read: Read<'a>,
}

/// `quant_state` of bitsandbytes.
#[derive(serde::Deserialize)]
struct QuantState {
    blocksize: usize,
    shape: [usize; 2],
    #[serde(default)]
    nested_blocksize: Option<usize>,
    #[serde(default)]
    nested_offset: f32,
}

impl Matrix<'_> {
    /// Rows and columns of the matrix. Checks that its tensors fit it.
    fn shape(&self) -> Result<[usize; 2]> {
        let shape = match (self.format, &*self.codes.shape) {
            (StoredFormat::NF4 | StoredFormat::FP4, _) => self.state()?.shape,
            (StoredFormat::INT4, [rows, packed]) if self.codes.dtype == Dtype::I32 => {
                [*rows, packed * 8]
            }
            (StoredFormat::INT8, [rows, columns]) if self.codes.dtype == Dtype::I8 => {
                [*rows, *columns]
            }
            (StoredFormat::FP8, [rows, columns]) if self.codes.dtype == Dtype::F8_E4M3 => {
                [*rows, *columns]
            }
            (format, shape) => {
                let found = format!("{:?} {shape:?}", self.codes.dtype);
                return Err(wrong("codes of another type")
                    .value(found)
                    .rule(format!("a matrix of {}", format.name())));
            }
        };
        let [rows, columns] = shape;
        if rows == 0 || columns == 0 || !self.format.fits_row(columns) {
            return Err(wrong("rows that are not whole blocks")
                .value(format!("{columns} input features"))
                .rule(format!("a multiple of {}", self.format.block_values())));
        }
        let tiles = |shape: &[usize]| match *shape {
            [] | [1] => Some([1, 1]),
            [r] => Some([r, 1]),
            [r, c] => Some([r, c]),
            _ => None,
        };
        let is_tiled = |scales: &TensorEntry| {
            tiles(&scales.shape).is_some_and(|[r, c]| {
                [1, rows, rows.div_ceil(TILE)].contains(&r)
                    && [1, columns.div_ceil(TILE)].contains(&c)
            })
        };
        let fits = match self.format {
            StoredFormat::INT8 => self.one(".SCB")?.shape == [rows],
            StoredFormat::FP8 => is_tiled(self.one("")?),
            StoredFormat::INT4 => {
                let scales = self.one("_scale")?;
                self.find("_zero_point").is_none()
                    && self.find("_g_idx").is_none()
                    && is_tiled(scales)
                    && scales.shape.first() == Some(&rows)
            }
            _ => true,
        };
        if fits {
            return Ok(shape);
        }
        let found: Vec<String> = self
            .scales
            .iter()
            .map(|scales| format!("`{}` {:?}", scales.name, scales.shape))
            .collect();
        Err(wrong("scales of another kind").value(found.join(", ")).rule(match self.format {
            StoredFormat::INT4 => "one scale for a row or for 128 values of it, no zero points, no reordered columns",
            StoredFormat::INT8 => "one scale for a row",
            _ => "one scale for the matrix, a row, or a tile of 128 by 128",
        }))
    }

    /// The tensor of scales whose name ends so; the last is that which gave the scheme away.
    fn find(&self, suffix: &str) -> Option<&TensorEntry> {
        self.scales
            .iter()
            .rev()
            .find(|tensor| tensor.name.ends_with(suffix))
    }

    fn one(&self, suffix: &str) -> Result<&TensorEntry> {
        self.find(suffix)
            .ok_or_else(|| wrong("a tensor of its scales is missing").value(suffix))
    }

    fn state(&self) -> Result<QuantState> {
        let state = self
            .one("bitsandbytes__nf4")
            .or_else(|_| self.one("bitsandbytes__fp4"))?;
        let bytes = (self.read)(state)?;
        let state: QuantState = serde_json::from_slice(&bytes)
            .map_err(|error| wrong("its quant_state is not read").value(error.to_string()))?;
        let [rows, columns] = state.shape;
        let elements = rows.saturating_mul(columns);
        if state.blocksize != self.format.block_values()
            || state
                .nested_blocksize
                .is_some_and(|size| size != NESTED_BLOCK)
        {
            let found = format!("{} and {:?}", state.blocksize, state.nested_blocksize);
            return Err(wrong("blocks of another size")
                .value(found)
                .rule("64 values, and 256 maxima"));
        }
        let maxima = self.one(".absmax")?.shape.iter().product::<usize>();
        if self.codes.size != elements.div_ceil(2) as u64
            || maxima != elements.div_ceil(state.blocksize)
        {
            return Err(
                wrong("codes or maxima do not fit the shape").value(format!("{:?}", state.shape))
            );
        }
        Ok(state)
    }

    /// Codes and scales, block by block.
    fn blocks(&self, shape: &[usize]) -> Result<Vec<u8>> {
        let [rows, columns] = *shape else {
            return Err(wrong("not a matrix"));
        };
        let codes = (self.read)(self.codes)?;
        if let Some(order) = self.find(".weight_format")
            && (self.read)(order)? != [0]
        {
            return Err(wrong("its codes are not stored row by row"));
        }
        let (scales, scale_columns) = match self.format {
            StoredFormat::NF4 | StoredFormat::FP4 => (self.maxima()?, 0),
            StoredFormat::INT4 => self.tiles("_scale")?,
            StoredFormat::INT8 => self.tiles(".SCB")?,
            _ => self.tiles("")?,
        };
        if scales.iter().any(|scale| !scale.is_finite()) {
            return Err(wrong("a scale is not a finite number"));
        }
        if self.format == StoredFormat::FP8 && codes.iter().any(|code| code & 0x7f == 0x7f) {
            return Err(wrong("a value is not a number"));
        }
        let size = self.format.block_size(columns);
        let (values, bytes) = (size.values as usize, size.bytes as usize);
        let code_bytes = bytes - size_of::<f32>();
        let mut out = vec![0; self.format.bytes_of_matrix(rows, columns).unwrap_or(0)];
        let scale_rows = scales.len() / scale_columns.max(1);
        let row_tile = if scale_rows == rows { 1 } else { TILE };
        let scale_is_last = self.format == StoredFormat::INT8;
        let is_one_row = scale_rows == 1;
        out.par_chunks_mut(bytes)
            .zip(codes.par_chunks(code_bytes))
            .enumerate()
            .for_each(|(index, (block, codes))| {
                let (code_start, scale_start) = if scale_is_last {
                    (0, code_bytes)
                } else {
                    (size_of::<f32>(), 0)
                };
                block[code_start..][..codes.len()].copy_from_slice(codes);
                let at = index * values;
                let scale = if scale_columns == 0 {
                    index
                } else {
                    let row = if is_one_row {
                        0
                    } else {
                        at / columns / row_tile
                    };
                    let column = if scale_columns == 1 {
                        0
                    } else {
                        at % columns / TILE
                    };
                    row * scale_columns + column
                };
                block[scale_start..][..size_of::<f32>()]
                    .copy_from_slice(&scales[scale].to_le_bytes());
            });
        Ok(out)
    }

    /// The maxima of blocks: stored, or by double quantisation level times maximum of 256 of them, and their mean.
    fn maxima(&self) -> Result<Vec<f32>> {
        let state = self.state()?;
        if state.nested_blocksize.is_none() {
            return Ok(self.tiles(".absmax")?.0);
        }
        let codes = (self.read)(self.one(".absmax")?)?;
        let levels = self.tiles(".nested_quant_map")?.0;
        let maxima = self.tiles(".nested_absmax")?.0;
        if levels.len() != 256 || maxima.len() != codes.len().div_ceil(NESTED_BLOCK) {
            return Err(wrong("levels or maxima of its maxima do not fit"));
        }
        let value = |(index, code): (usize, &u8)| {
            levels[usize::from(*code)] * maxima[index / NESTED_BLOCK] + state.nested_offset
        };
        Ok(codes.iter().enumerate().map(value).collect())
    }

    /// The values of a tensor of scales in f32, and the length of its rows.
    fn tiles(&self, suffix: &str) -> Result<(Vec<f32>, usize)> {
        let tensor = self.one(suffix)?;
        let bytes = (self.read)(tensor)?;
        let columns = match *tensor.shape {
            [_, columns] => columns,
            _ => 1,
        };
        let values = match tensor.dtype {
            Dtype::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|x| f32::from_le_bytes(*x))
                .collect(),
            Dtype::BF16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|x| bf16::from_le_bytes(*x).to_f32())
                .collect(),
            Dtype::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|x| f16::from_le_bytes(*x).to_f32())
                .collect(),
            Dtype::F8_E8M0 => bytes
                .iter()
                .map(|e| (f64::from(*e) - 127.0).exp2() as f32)
                .collect(),
            other => {
                return Err(wrong("its scales have a type that is not read")
                    .value(format!("{other:?}"))
                    .rule("F32, F16, BF16 or F8_E8M0"));
            }
        };
        Ok((values, columns))
    }
}

fn wrong(why: &str) -> Error {
    Error::new(Kind::Model, format!("a quantised weight cannot be read: {why}"))
        .hint("use another form of the model: unquantised, of bitsandbytes in 4 or 8 bits, or a GGUF file")
}

fn refused(name: &str, why: &str) -> Error {
    wrong(why).at(format!("`{name}`"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use super::*;
    use crate::adapter::shards::read_headers;
    use crate::model::stored::StoredTensor;

    /// Codes and scales of nine matrices, and the values that bitsandbytes, torch and compressed-tensors decode:
    /// `scripts/quantized_files.py`.
    #[test]
    fn matrices_decode_to_the_values_of_their_libraries() {
        let path = Path::new("tests/golden/quantized_files.safetensors");
        let file = File::open(path).unwrap();
        let read = |tensor: &TensorEntry| {
            StoredTensor {
                path,
                file: &file,
                tensor,
                transposed: false,
            }
            .bytes()
        };
        let joined = join_scales(read_headers(&[path.to_path_buf()]).unwrap(), &read).unwrap();
        let mut formats = Vec::new();
        for matrix in joined.iter().filter(|tensor| tensor.format.is_some()) {
            let name = matrix.name.strip_suffix(".weight").unwrap();
            let expected = joined
                .iter()
                .find(|tensor| tensor.name == format!("{name}.expected"))
                .unwrap();
            let bytes = read(expected).unwrap();
            let expected_bits: Vec<u32> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|x| u32::from_le_bytes(*x))
                .collect();
            let format = matrix.format.unwrap();
            let [rows, columns] = *matrix.shape else {
                panic!("{name}")
            };
            let values = format.decode(&blocks(matrix, &read).unwrap(), [rows, columns]);
            let stride = columns.div_ceil(expected.shape[1]);
            let shown = values
                .chunks(columns)
                .flat_map(|row| row.iter().step_by(stride));
            let shown: Vec<u32> = shown.map(|x| x.to_bits()).collect();
            assert_eq!(shown, expected_bits, "{name}");
            formats.push((name, format.name()));
        }
        let expected = [
            ("fp4", "FP4"),
            ("fp8_one", "FP8"),
            ("fp8_rows", "FP8"),
            ("fp8_tiles", "FP8"),
            ("int4_groups", "INT4"),
            ("int4_rows", "INT4"),
            ("int8", "INT8"),
            ("nf4", "NF4"),
            ("nf4_nested", "NF4"),
        ];
        assert_eq!(formats, expected);
        // Nothing but the matrices and what they are compared with is left.
        assert_eq!(joined.len(), 2 * expected.len());
    }

    fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> TensorEntry {
        TensorEntry {
            name: name.into(),
            dtype,
            format: None,
            scales: Vec::new(),
            shape: shape.to_vec(),
            file: 0,
            start: 0,
            size: 0,
        }
    }

    #[test]
    fn scales_of_another_kind_are_refused_by_name() {
        let refused = [
            (
                vec![
                    tensor("a.weight_packed", Dtype::I32, &[4, 32]),
                    tensor("a.weight_scale", Dtype::BF16, &[4, 8]),
                ],
                "scales of another kind",
            ),
            (
                vec![
                    tensor("a.weight_packed", Dtype::I32, &[4, 32]),
                    tensor("a.weight_scale", Dtype::BF16, &[4, 2]),
                    tensor("a.weight_zero_point", Dtype::I32, &[1, 2]),
                ],
                "no zero points",
            ),
            (
                vec![
                    tensor("a.weight", Dtype::F8_E4M3, &[4, 100]),
                    tensor("a.weight_scale", Dtype::F32, &[1]),
                ],
                "a multiple of 128",
            ),
            (
                vec![
                    tensor("a.weight", Dtype::F8_E4M3, &[300, 256]),
                    tensor("a.weight_scale_inv", Dtype::F32, &[7, 2]),
                ],
                "a tile of 128 by 128",
            ),
            (vec![tensor("a.SCB", Dtype::F32, &[4])], "no codes"),
        ];
        for (tensors, why) in refused {
            let error = join_scales(tensors, &|_| Ok(Vec::new()))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(why) && error.contains("`a.weight`"),
                "{why}: {error}"
            );
        }
    }

    #[test]
    fn the_method_is_read_from_config_json() {
        let formats = |settings: serde_json::Value| {
            let mut config: serde_json::Value =
                serde_json::from_str(include_str!("../../tests/golden/tiny/gqa/config.json"))
                    .unwrap();
            config["quantization_config"] = settings;
            let architecture =
                Architecture::from_config(&config).map_err(|error| error.to_string())?;
            let formats = architecture.stored_formats;
            Ok::<_, String>(
                formats
                    .into_iter()
                    .map(|(name, format)| format!("{name} {}", format.name()))
                    .collect::<Vec<_>>(),
            )
        };
        let nf4 = serde_json::json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "down_proj"]});
        let found = formats(nf4).unwrap();
        assert!(
            found.contains(&"model.layers.0.mlp.up_proj.weight NF4".into()),
            "{found:?}"
        );
        assert!(
            !found
                .iter()
                .any(|name| name.contains("down_proj") || name.contains("lm_head")),
            "{found:?}"
        );
        assert!(formats(serde_json::json!({"load_in_8bit": true})).unwrap()[0].ends_with("INT8"));
        let ignored = serde_json::json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*mlp.*", "lm_head"]});
        let found = formats(ignored).unwrap();
        assert!(
            !found.is_empty()
                && found
                    .iter()
                    .all(|name| name.contains("self_attn") && name.ends_with("INT4")),
            "{found:?}"
        );
        assert_eq!(
            formats(serde_json::json!({})).unwrap(),
            Vec::<String>::new()
        );
        for method in ["gptq", "awq", "mxfp4"] {
            let refused = formats(serde_json::json!({"quant_method": method})).unwrap_err();
            assert!(
                refused.contains(method) && refused.contains("nf4"),
                "{refused}"
            );
        }
    }
}

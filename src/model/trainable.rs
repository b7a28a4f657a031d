//! A decoder with the parameters that are trained in it: an adapter's on frozen weights, or every
//! weight.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::Dtype;

use super::trained::is_tied;
use super::weights::normal;
use super::{Architecture, Decoder, WeightSource, Weights};
use crate::adapter::{
    Adaptation, AdapterTensor, Factors, LoadedAdapter, LoraInit, Part, Place, Site, kaiming_uniform,
};
use crate::error::{Error, Kind, Result};
use crate::ops::{Lora, Magnitude, Parameters, Slot, TokenRows, Weight, dtype};
use crate::work::Precision;

/// A decoder and its trainable parameters.
pub struct TrainableModel {
    /// The model.
    pub decoder: Decoder,
    /// The values it trains, under the names of their files.
    pub parameters: Parameters,
}

/// The start of a new adapter.
#[derive(Debug, Clone, Default)]
pub struct AdapterStart {
    init: LoraInit,
    seed: u64,
    /// The factors that the base weights lose, by the layer's path.
    factors: BTreeMap<String, Factors>,
}

impl AdapterStart {
    /// The start of `adaptation` on `weights`, from which its initialisation may take factors.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn new(weights: &Weights, adaptation: &Adaptation, seed: u64) -> Result<Self> {
        let init = adaptation.init;
        let sites = adaptation.sites.iter().filter(|_| init.changes_the_base());
        let factors = sites.map(|site| {
            let w = weights.values(&format!("{}.weight", site.path))?;
            Ok((site.path.clone(), Factors::new(init, w, site, seed)?))
        });
        Ok(Self {
            init,
            seed,
            factors: factors.collect::<Result<_>>()?,
        })
    }

    /// The factors that the base weight of the layer `path` has lost.
    pub fn factors(&self, path: &str) -> Option<&Factors> {
        self.factors.get(path)
    }

    /// The values of a new adapter's tensor.
    fn values(&self, weights: &Weights, tensor: &AdapterTensor<'_>) -> Result<Vec<f32>> {
        let (name, seed) = (&tensor.name, self.seed);
        if let Place::Part(site, part) = tensor.place
            && let Some(factors) = self.factors(&site.path)
        {
            let stored = if part == Part::A {
                &factors.a
            } else {
                &factors.b
            };
            return Ok(stored.values.clone());
        }
        match tensor.place {
            Place::Part(site, Part::A) if self.init == LoraInit::Gaussian => Ok(normal(
                name,
                site.in_features * site.r,
                1.0 / site.r as f64,
                seed,
            )),
            Place::Part(site, Part::A) => {
                Ok(kaiming_uniform(site.in_features, site.r, seed, &site.path))
            }
            Place::Part(site, Part::Magnitude) => {
                let name = format!("{}.weight", site.path);
                row_norms(&weights.frozen_values(&name, site.in_features)?, site)
            }
            Place::Part(site, Part::EmbeddingB) => {
                Ok(normal(name, site.out_features * site.r, 1.0, seed))
            }
            Place::Part(site, part) => Ok(vec![0.0; part.shape(site).iter().product()]),
            Place::Weight(copy) => weights.values_or_random(&copy.tensor, &copy.shape, seed),
            Place::Tokens(set) => {
                let table = weights.frozen_values(&format!("{}.weight", set.path), set.width)?;
                let row = |token: &u32| table[*token as usize * set.width..][..set.width].to_vec();
                Ok(set.tokens.iter().flat_map(row).collect())
            }
        }
    }
}

impl TrainableModel {
    /// A model with an adapter. `weight` returns a frozen weight by name and shape, `values` those of
    /// each trained tensor, in the order of [`Adaptation::tensors`].
    ///
    /// # Errors
    /// What the closures return, and weights that do not fit the architecture.
    pub fn with_adapters(
        architecture: &Architecture,
        adaptation: &Adaptation,
        weight: &dyn Fn(&str, &[usize]) -> Result<Weight>,
        mut values: impl FnMut(&AdapterTensor<'_>) -> Result<Vec<f32>>,
        device: &Device,
    ) -> Result<Self> {
        let tensors = adaptation.tensors();
        let shapes = tensors
            .iter()
            .map(|tensor| (tensor.name.clone(), tensor.shape.clone()));
        let mut shapes: Vec<_> = shapes.collect();
        if shapes.is_empty() {
            // candle has no tensor without elements.
            shapes.push(("none".to_string(), vec![1]));
        }
        let values = |index: usize, slot: &Slot| match tensors.get(index) {
            Some(tensor) => values(tensor),
            None => Ok(vec![0.0; slot.len()]),
        };
        let parameters = Parameters::from_fn(shapes, values, device)?;
        let name = |tensor: &AdapterTensor<'_>| match tensor.place {
            Place::Part(..) | Place::Tokens(_) => tensor.name.clone(),
            Place::Weight(copy) => copy.tensor.clone(),
        };
        let slots: HashMap<String, usize> = tensors.iter().map(name).zip(0..).collect();
        let trained = |name: &str| {
            let slot = slots.get(name);
            slot.map(|slot| parameters.weight(*slot)).transpose()
        };
        let sites = adaptation.sites.iter();
        let sites: HashMap<&str, &Site> = sites.map(|site| (site.path.as_str(), site)).collect();
        let lora = |path: &str| {
            let Some(site) = sites.get(path) else {
                return Ok(None);
            };
            let parts = adaptation.parts(site);
            let part = |part: Part| trained(&part.name(path));
            let (Some(a), Some(b)) = (part(parts[0])?, part(parts[1])?) else {
                return Ok(None);
            };
            Ok(Some(Lora {
                a,
                b,
                bias: part(Part::Bias)?,
                magnitude: part(Part::Magnitude)?.map(Magnitude::new),
                scaling: site.scaling,
            }))
        };
        let source = WeightSource {
            tied: is_tied(architecture, adaptation),
            weight: &|name, shape| {
                if let Some(copy) = trained(name)? {
                    return Ok(copy);
                }
                let frozen = weight(name, shape)?;
                let path = name.strip_suffix(".weight").unwrap_or_default();
                let set = adaptation.tokens.iter().find(|set| set.path == path);
                let rows = set.map(|set| Ok::<_, Error>((set, trained(&set.name())?)));
                match rows.transpose()? {
                    Some((set, Some(rows))) => {
                        let rows = TokenRows::new(rows, &set.tokens, shape[0], device)?;
                        Ok(frozen.with_token_rows(rows))
                    }
                    _ => Ok(frozen),
                }
            },
            lora: &lora,
        };
        let decoder = Decoder::assemble(architecture, &source, device)?;
        Ok(Self {
            decoder,
            parameters,
        })
    }

    /// A model with every weight trained. `values(index, slot)` returns the values of one tensor,
    /// in model order.
    ///
    /// # Errors
    /// What the closure returns.
    pub fn fully_trained(
        architecture: &Architecture,
        values: impl FnMut(usize, &Slot) -> Result<Vec<f32>>,
        device: &Device,
    ) -> Result<Self> {
        let shapes = architecture
            .tensors()
            .into_iter()
            .map(|tensor| (tensor.name, tensor.shape))
            .collect();
        let parameters = Parameters::from_fn(shapes, values, device)?;
        let by_name: HashMap<&str, usize> = (0..)
            .zip(parameters.slots())
            .map(|(i, slot)| (slot.name.as_str(), i))
            .collect();
        let weight = |name: &str, _: &[usize]| {
            let missing = || Error::new(Kind::Model, format!("the model has no tensor `{name}`"));
            parameters.weight(*by_name.get(name).ok_or_else(missing)?)
        };
        let source = WeightSource {
            tied: architecture.tie_word_embeddings,
            weight: &weight,
            lora: &|_| Ok(None),
        };
        let decoder = Decoder::assemble(architecture, &source, device)?;
        Ok(Self {
            decoder,
            parameters,
        })
    }
}

impl Weights {
    /// A frozen weight for compute in `precision`, quantised if the architecture says so. Norms and biases act on the f32 residual stream
    /// and stay f32; on a CPU bf16 matrices stay as stored, because products read them without
    /// rounding.
    pub fn frozen(
        &self,
        name: &str,
        shape: &[usize],
        precision: Precision,
        device: &Device,
    ) -> Result<Weight> {
        if let (Some(format), [rows, columns]) = (self.format(name), shape) {
            let blocks = self.blocks(name, format, *columns)?;
            return Weight::quantized(format, [*rows, *columns], blocks);
        }
        let dtype = if shape.len() == 1 {
            DType::F32
        } else {
            self.frozen_dtype(name, precision, device)?
        };
        Ok(Weight::frozen(self.get(name, dtype, device)?))
    }

    /// A frozen matrix without the factors that `start` holds for its layer, rounded to the type of [`Weights::frozen`] as
    /// PEFT rounds it to that of its base; the weight itself if it holds none.
    ///
    /// # Errors
    /// A weight that cannot be read.
    pub fn frozen_without(
        &self,
        start: &AdapterStart,
        name: &str,
        shape: &[usize],
        precision: Precision,
        device: &Device,
    ) -> Result<Weight> {
        let path = name.strip_suffix(".weight").unwrap_or_default();
        let Some(factors) = start.factors(path) else {
            return self.frozen(name, shape, precision, device);
        };
        if let Some(format) = self.format(name) {
            return Err(Error::new(
                Kind::Adapter,
                "initial factors cannot be taken from a quantised weight",
            )
            .at(format!("`{name}`, stored as {}", format.name()))
            .hint("write `init_lora_weights = \"default\"` in [adapter], or choose weights that are not quantised"));
        }
        let mut w = self.values(name)?;
        factors.subtract_from(&mut w);
        let dtype = self.frozen_dtype(name, precision, device)?;
        let w = Tensor::from_vec(w, shape, &Device::Cpu)?.to_dtype(dtype)?;
        Ok(Weight::frozen(w.to_device(device)?))
    }

    /// The type in which a frozen matrix is stored.
    fn frozen_dtype(&self, name: &str, precision: Precision, device: &Device) -> Result<DType> {
        let as_stored = device.is_cpu() && self.dtype(name)? == Dtype::BF16;
        Ok(if as_stored {
            DType::BF16
        } else {
            dtype(precision)
        })
    }

    /// The values that a frozen weight of `columns` columns computes with: of a quantised one those of its blocks.
    fn frozen_values(&self, name: &str, columns: usize) -> Result<Vec<f32>> {
        let values = self.values(name)?;
        let Some(format) = self.format(name) else {
            return Ok(values);
        };
        let shape = [values.len() / columns.max(1), columns];
        Ok(format.decode(&self.blocks(name, format, columns)?, shape))
    }
}

/// Initial values of an adapter's tensors: those of `from`, else of `start`.
///
/// # Errors
/// A copy of the base's embeddings in `from` that is not the model's.
pub fn initial_values<'a>(
    weights: &'a Weights,
    from: Option<&'a LoadedAdapter>,
    start: &'a AdapterStart,
) -> Result<impl FnMut(&AdapterTensor<'_>) -> Result<Vec<f32>> + 'a> {
    if let Some(adapter) = from {
        check_base_embeddings(weights, adapter)?;
    }
    Ok(move |tensor: &AdapterTensor<'_>| match from {
        Some(adapter) => Ok(adapter.values(&tensor.name)?.to_vec()),
        None => start.values(weights, tensor),
    })
}

/// The norm of each row of W (out, in).
fn row_norms(w: &[f32], site: &Site) -> Result<Vec<f32>> {
    let square = |x: &f32| f64::from(*x).powi(2);
    let rows = w.chunks_exact(site.in_features.max(1));
    let norms = rows.map(|row| row.iter().map(square).sum::<f64>().sqrt() as f32);
    Ok(norms.collect())
}

/// Refuses an adapter that holds other embeddings than the base model's: they may be stored in
/// another precision.
fn check_base_embeddings(weights: &Weights, adapter: &LoadedAdapter) -> Result<()> {
    const TOLERANCE: f32 = 0.01;
    for (name, stored) in &adapter.base_embeddings {
        let base = weights.values(name)?;
        let largest = base.iter().fold(0f32, |largest, x| x.abs().max(largest));
        let mut pairs = base.iter().zip(&stored.values);
        if stored.values.len() != base.len()
            || pairs.any(|(a, b)| (a - b).abs() > TOLERANCE * largest)
        {
            return Err(Error::new(
                Kind::Adapter,
                format!("the adapter holds another `{name}` than the model"),
            )
            .rule("below LoRA on an embedding lies the base model's")
            .hint("choose the base model that it was trained on; a resized vocabulary is not supported"));
        }
    }
    Ok(())
}

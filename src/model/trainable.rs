//! A decoder with the parameters that are trained in it: LoRA factors on frozen weights, or every
//! weight.

use std::collections::HashMap;

use candle_core::{DType, Device};
use safetensors::tensor::Dtype;

use super::{Architecture, Decoder, WeightSource, Weights};
use crate::adapter::peft::tensor_name;
use crate::adapter::unsupported::Factor;
use crate::adapter::{LoadedAdapter, Site, kaiming_uniform};
use crate::error::{Error, Kind, Result};
use crate::ops::{Lora, Parameters, Slot, Weight, dtype};
use crate::work::Precision;

/// A decoder and its trainable parameters.
pub struct TrainableModel {
    /// The model.
    pub decoder: Decoder,
    /// The values it trains, under the names of their files.
    pub parameters: Parameters,
}

impl TrainableModel {
    /// A model with LoRA adapters on `sites`. `weight` returns a frozen weight by name and shape,
    /// `factors` the values of A (r, in) and B (out, r) of each site, in this order.
    ///
    /// # Errors
    /// What the closures return, and weights that do not fit the architecture.
    pub fn with_adapters(
        architecture: &Architecture,
        sites: &[Site],
        weight: &dyn Fn(&str, &[usize]) -> Result<Weight>,
        mut factors: impl FnMut(&Site, Factor) -> Result<Vec<f32>>,
        device: &Device,
    ) -> Result<Self> {
        let mut shapes = Vec::with_capacity(2 * sites.len());
        for site in sites {
            shapes.push((
                tensor_name(&site.path, Factor::A),
                vec![site.r, site.in_features],
            ));
            shapes.push((
                tensor_name(&site.path, Factor::B),
                vec![site.out_features, site.r],
            ));
        }
        if sites.is_empty() {
            // candle has no tensor without elements.
            shapes.push(("none".to_string(), vec![1]));
        }
        let values = |index: usize, slot: &Slot| match sites.get(index / 2) {
            Some(site) if index.is_multiple_of(2) => factors(site, Factor::A),
            Some(site) => factors(site, Factor::B),
            None => Ok(vec![0.0; slot.len()]),
        };
        let parameters = Parameters::from_fn(shapes, values, device)?;
        let by_path: HashMap<&str, usize> = (0..)
            .zip(sites)
            .map(|(i, site)| (site.path.as_str(), i))
            .collect();
        let lora = |path: &str| {
            let Some(index) = by_path.get(path).copied() else {
                return Ok(None);
            };
            Ok(Some(Lora {
                a: parameters.weight(2 * index)?,
                b: parameters.weight(2 * index + 1)?,
                scaling: sites[index].scaling,
            }))
        };
        let source = WeightSource {
            weight,
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
    /// A frozen weight for compute in `precision`. Norms and biases act on the f32 residual stream
    /// and stay f32; on a CPU bf16 matrices stay as stored, because products read them without
    /// rounding.
    pub fn frozen(
        &self,
        name: &str,
        shape: &[usize],
        precision: Precision,
        device: &Device,
    ) -> Result<Weight> {
        let dtype = if shape.len() == 1 {
            DType::F32
        } else if device.is_cpu() && self.dtype(name)? == Dtype::BF16 {
            DType::BF16
        } else {
            dtype(precision)
        };
        Ok(Weight::frozen(self.get(name, dtype, device)?))
    }
}

/// Initial LoRA factors: those of `from`, else A drawn by `kaiming_uniform` and B zero.
///
/// # Errors
/// An adapter that does not fit the architecture's layers.
pub fn initial_factors(
    architecture: &Architecture,
    from: Option<&LoadedAdapter>,
    seed: u64,
) -> Result<impl FnMut(&Site, Factor) -> Result<Vec<f32>>> {
    let attached = from
        .map(|adapter| adapter.attach(&architecture.modules(), architecture.output_embedding()))
        .transpose()?;
    Ok(move |site: &Site, factor: Factor| {
        let Some(attached) = &attached else {
            return Ok(match factor {
                Factor::A => kaiming_uniform(site.in_features, site.r, seed, &site.path),
                Factor::B => vec![0.0; site.out_features * site.r],
            });
        };
        let found = attached.iter().find(|found| found.site.path == site.path);
        let found = found.ok_or_else(|| {
            Error::new(Kind::Adapter, "the adapter lacks a layer").value(site.path.clone())
        })?;
        Ok(match factor {
            Factor::A => found.a.to_vec(),
            Factor::B => found.b.to_vec(),
        })
    })
}

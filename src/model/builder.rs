//! Builds the parts of a decoder from its tensors, and notes which of them are trained.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use super::architecture::{Architecture, LinearSpec};
use super::block::Block;
use super::cost::ModelShape;
use super::embedding::Embedding;
use super::head::{Classifier, ClassifierHead, DecoderHead};
use super::names::ModuleNames;
use super::residual::{BranchNorms, ResidualBranch};
use super::trained::TrainedNames;
use crate::error::{Error, Result};
use crate::ops::{Experts, Linear, LmHead, Lora, LoraShape, Norm, Weight};
use crate::work::Precision;

/// Where a decoder's tensors come from.
pub struct WeightSource<'a> {
    /// Whether the output embedding is the input embedding's tensor.
    pub tied: bool,
    /// A weight, frozen or trained, by its tensor's name and shape.
    pub weight: &'a dyn Fn(&str, &[usize]) -> Result<Weight>,
    /// The adapter on a linear layer, if it is a target, by the layer's path.
    pub lora: &'a dyn Fn(&str) -> Result<Option<Lora>>,
}

/// Builds the layers of a decoder from their tensors.
pub(super) struct Builder<'a> {
    architecture: &'a Architecture,
    source: &'a WeightSource<'a>,
    /// Whether weights stay packed for products.
    keep_packed: bool,
    /// The tensors that are trained, so far.
    trained: RefCell<BTreeSet<String>>,
    /// The adapters by path, so far.
    adapters: RefCell<BTreeMap<String, LoraShape>>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        architecture: &'a Architecture,
        source: &'a WeightSource<'a>,
        keep_packed: bool,
    ) -> Self {
        Self {
            architecture,
            source,
            keep_packed,
            trained: RefCell::default(),
            adapters: RefCell::default(),
        }
    }

    fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let weight = (self.source.weight)(name, shape)?;
        if weight.is_trained() {
            self.trained.borrow_mut().insert(name.to_string());
        }
        Ok(weight)
    }

    fn lora(&self, path: &str) -> Result<Option<Lora>> {
        let lora = (self.source.lora)(path)?;
        if let Some(lora) = &lora {
            let shape = lora.shape()?;
            self.adapters.borrow_mut().insert(path.to_string(), shape);
        }
        Ok(lora)
    }

    /// What is trained of the tensors built so far.
    pub(super) fn shape(&self) -> ModelShape {
        let (trained, adapters) = (self.trained.borrow(), self.adapters.borrow());
        let trained = TrainedNames {
            lora: &|path| adapters.get(path).copied(),
            weight: &|name| trained.contains(name),
            tied: self.source.tied,
        };
        ModelShape::new(self.architecture, &trained, false, Precision::F32)
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight> {
        let weight = self.weight(name, &shape)?;
        Ok(if self.keep_packed {
            weight.with_packed_cache()
        } else {
            weight
        })
    }

    /// The embedding or the head.
    pub(super) fn vocabulary_matrix(&self, name: &str) -> Result<Weight> {
        let a = self.architecture;
        self.matrix(name, [a.vocab_size, a.hidden_size])
    }

    /// The norm of rows of `width` elements.
    fn norm(&self, name: &str, width: usize) -> Result<Norm> {
        let a = self.architecture;
        let tensor = |part| self.weight(&format!("{name}.{part}"), &[width]);
        Ok(Norm {
            kind: a.norm_kind,
            weight: tensor("weight")?,
            bias: a.biases.norm.then(|| tensor("bias")).transpose()?,
            unit_offset: a.norm_unit_offset,
            eps: a.norm_eps,
            factor: 1.0,
        })
    }

    /// The token table and what is added to it.
    pub(super) fn embedding(&self, tokens: Weight) -> Result<Embedding> {
        let a = self.architecture;
        let parts = &a.embedding_parts;
        let table = |name: &str, rows: usize| {
            let path = a.names.base_path(name);
            self.matrix(&format!("{path}.weight"), [rows, a.hidden_size])
        };
        let positions = parts.positions.map(|part| table(part.name, part.rows));
        let token_types = parts.token_types.map(|part| table(part.name, part.rows));
        let norm = parts.norm.map(|name| a.names.base_path(name));
        Ok(Embedding {
            tokens,
            lora: self.lora(&a.names.embed_tokens_path())?,
            positions: positions.transpose()?,
            first_position: parts.positions.map_or(0, |part| part.first),
            token_types: token_types.transpose()?,
            norm: norm
                .map(|path| self.norm(&path, a.hidden_size))
                .transpose()?,
        })
    }

    /// The head, which may share the table `embed_tokens`.
    pub(super) fn head(&self, embed_tokens: &Weight) -> Result<DecoderHead> {
        let a = self.architecture;
        if let Some(head) = a.classifier_head() {
            return Ok(DecoderHead::Classifier(Box::new(self.classifier(head)?)));
        }
        let [lm_head, _] = a.tied_tensors();
        Ok(DecoderHead::Vocabulary(Box::new(LmHead {
            weight: if self.source.tied {
                embed_tokens.clone()
            } else {
                self.vocabulary_matrix(&lm_head)?
            },
            bias: (a.biases.lm_head)
                .then(|| self.weight(&format!("{}.bias", a.names.lm_head), &[a.vocab_size]))
                .transpose()?,
            softcap: a.logits_softcap,
            lora: self.lora(a.names.lm_head)?,
        })))
    }

    /// The norm before the head, if there is one.
    pub(super) fn last_norm(&self) -> Result<Option<Norm>> {
        let a = self.architecture;
        let Some(path) = a.names.norm_path() else {
            return Ok(None);
        };
        Ok(Some(Norm {
            factor: a.logits_factor,
            ..self.norm(&path, a.hidden_size)?
        }))
    }

    fn classifier(&self, head: &ClassifierHead) -> Result<Classifier> {
        let a = self.architecture;
        let linear = |path: &str, out_features: usize| {
            Ok::<_, Error>(Linear {
                weight: self.matrix(&format!("{path}.weight"), [out_features, a.hidden_size])?,
                bias: head
                    .bias
                    .then(|| self.weight(&format!("{path}.bias"), &[out_features]))
                    .transpose()?,
                lora: self.lora(path)?,
            })
        };
        let dense = head.dense.map(|path| linear(path, a.hidden_size));
        Ok(Classifier {
            dense: dense.transpose()?,
            activation: head.activation,
            output: linear(a.names.lm_head, a.outputs())?,
            dense_path: head.dense.unwrap_or_default().to_string(),
            output_path: a.names.lm_head.to_string(),
        })
    }

    fn linear(&self, block: &str, spec: &LinearSpec) -> Result<Linear> {
        let path = format!("{block}.{}", spec.name);
        let shape = [spec.out_features, spec.in_features];
        let bias = spec
            .bias
            .then(|| self.weight(&format!("{path}.bias"), &[spec.out_features]))
            .transpose()?;
        Ok(Linear {
            weight: self.matrix(&format!("{path}.weight"), shape)?,
            bias,
            lora: self.lora(&path)?,
        })
    }

    /// The experts of block `layer`, if it has any.
    fn experts(&self, layer: usize) -> Result<Option<Experts>> {
        let a = self.architecture;
        let Some(sizes) = a.experts.filter(|_| a.layers[layer].sparse) else {
            return Ok(None);
        };
        let [router, gate_up, down] = sizes.shapes(a.hidden_size);
        let names = ModuleNames::EXPERTS.map(|name| a.names.in_block(layer, name));
        Ok(Some(Experts {
            router: self.weight(&format!("{}.weight", names[0]), &router)?,
            gate_up: self.weight(&names[1], &gate_up)?,
            down: self.weight(&names[2], &down)?,
            per_token: sizes.per_token,
            normalized: sizes.normalized,
            activation: a.activation,
        }))
    }

    pub(super) fn block(&self, layer: usize) -> Result<Block> {
        let a = self.architecture;
        let path = a.names.block_path(layer);
        let linears = a.linears(layer);
        let norm = |name: Option<&str>, width: usize| {
            name.map(|name| self.norm(&format!("{path}.{name}"), width))
                .transpose()
        };
        let branch = |norms: BranchNorms| {
            Ok::<_, Error>(ResidualBranch {
                input_norm: norm(norms.input, a.hidden_size)?,
                output_norm: norm(norms.output, a.hidden_size)?,
                on_sum: norms.on_sum,
                factor: a.residual_factor,
            })
        };
        let [q_width, k_width] = a.qk_norm_widths().unwrap_or_default();
        Ok(Block {
            attention_branch: branch(a.attention_norms)?,
            mlp_branch: branch(a.mlp_norms)?,
            q_norm: norm(a.qk_norm.map(|_| a.names.qk_norms[0]), q_width)?,
            k_norm: norm(a.qk_norm.map(|_| a.names.qk_norms[1]), k_width)?,
            norms_rotated_qk: a.norms_rotated_qk,
            rope: a.layers[layer].rope,
            linears: linears.try_map(|spec| self.linear(&path, spec))?,
            experts: self.experts(layer)?,
            paths: linears.map(|spec| format!("{path}.{}", spec.name)),
            qkv_groups: a.qkv_groups,
            parallel: a.parallel,
            gated_mlp: a.gated_mlp,
            attention: a.attention(layer),
            activation: a.activation,
        })
    }
}

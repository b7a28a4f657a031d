//! config.json -> [`Architecture`], for encoders with a classifier.
//!
//! Positions are learned, norms are on the residual sum, attention is bidirectional, and every layer
//! has a bias.

use std::collections::BTreeMap;

use serde_json::Value;

use super::architecture::{Architecture, Biases, LayerKind};
use super::config::{Config, Range};
use super::embedding::{EmbeddingParts, LearnedPositions, TokenTypes};
use super::family::{activation_of, attention, dropout, layer_count, stored_in_bf16};
use super::head::{ClassifierHead, Head};
use super::names::{LinearNames, ModuleNames};
use super::residual::BranchNorms;
use crate::error::Result;
use crate::ops::{Activation, Attention, NormKind};

/// BERT's names; the head is that of BertForSequenceClassification.
const BERT: ModuleNames = ModuleNames {
    base: "bert",
    embed_tokens: "embeddings.word_embeddings",
    layers: "encoder.layer",
    norm: None,
    lm_head: "classifier",
    lm_head_in_files: None,
    linears: LinearNames {
        qkv: &[
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
        ],
        o: "attention.output.dense",
        gate_up: &["intermediate.dense"],
        down: "output.dense",
    },
    composite: None,
};

/// Whether the model type is an encoder's.
pub(super) fn is_encoder(model_type: &str) -> bool {
    model_type == "bert"
}

/// The architecture of an encoder.
pub(super) fn encoder(config: &Config<'_>, model_type: &str) -> Result<Architecture> {
    refuse_decoders(config)?;
    let hidden_size = config.required_size("hidden_size")?;
    let max_position_embeddings = config.required_size("max_position_embeddings")?;
    let layers = layer_count(config)?;
    let output_norm = |name| BranchNorms {
        input: None,
        output: Some(name),
        on_sum: true,
    };
    Ok(Architecture {
        model_type: model_type.to_string(),
        class: "BertForSequenceClassification".to_string(),
        names: BERT,
        hidden_size,
        intermediate_size: config.required_size("intermediate_size")?,
        num_hidden_layers: layers,
        attention: Attention {
            causal: false,
            ..attention(config, hidden_size)?
        },
        layers: vec![
            LayerKind {
                window: None,
                rope: None,
            };
            layers
        ],
        qkv_groups: 1,
        qk_norm: None,
        activation: activation_of(config, "hidden_act")?,
        parallel: false,
        gated_mlp: false,
        attention_norms: output_norm("attention.output.LayerNorm"),
        mlp_norms: output_norm("output.LayerNorm"),
        embedding_factor: 1.0,
        rounds_embedding_factor: false,
        embedding_parts: EmbeddingParts {
            positions: Some(LearnedPositions {
                name: "embeddings.position_embeddings",
                rows: max_position_embeddings,
                first: 0,
            }),
            token_types: Some(TokenTypes {
                name: "embeddings.token_type_embeddings",
                rows: config.required_size("type_vocab_size")?,
            }),
            norm: Some("embeddings.LayerNorm"),
        },
        residual_factor: 1.0,
        logits_factor: 1.0,
        logits_softcap: None,
        vocab_size: config.required_size("vocab_size")?,
        max_position_embeddings,
        norm_kind: NormKind::Layer,
        norm_unit_offset: false,
        norm_eps: config.required_number("layer_norm_eps", Range::NON_NEGATIVE)?,
        ropes: Vec::new(),
        query_scaling: None,
        tie_word_embeddings: false,
        biases: Biases {
            qkv: true,
            o: true,
            mlp: true,
            norm: true,
        },
        initializer_range: config.required_number("initializer_range", Range::NON_NEGATIVE)?,
        stored_in_bf16: stored_in_bf16(config)?,
        stored_formats: BTreeMap::new(),
        dropout: dropout(config)?,
        head: Head::Classifier(ClassifierHead {
            dense: Some("bert.pooler.dense"),
            activation: Activation::Tanh,
            labels: labels(config)?,
        }),
    })
}

/// Refuses settings of a decoder, and positions that are not learned.
fn refuse_decoders(config: &Config<'_>) -> Result<()> {
    for key in ["is_decoder", "add_cross_attention"] {
        if config.flag(key)? {
            return Err(config.wrong(key, "false: only the encoder is supported"));
        }
    }
    let key = "position_embedding_type";
    match config.text(key)? {
        None | Some("absolute") => Ok(()),
        Some(_) => Err(config.wrong(key, "\"absolute\"")),
    }
}

/// The names of `id2label` by id, else `LABEL_0` and so on for `num_labels`, by default two.
fn labels(config: &Config<'_>) -> Result<Vec<String>> {
    let names = |value: &Value| {
        let names = value.as_object()?;
        let name = |id: usize| Some(names.get(&id.to_string())?.as_str()?.to_string());
        (0..names.len()).map(name).collect::<Option<Vec<String>>>()
    };
    let rule = "a name for each of the ids 0, 1, 2 and so on";
    if let Some(names) = config.read("id2label", rule, names)? {
        return Ok(names);
    }
    let count = config.size("num_labels")?.unwrap_or(2);
    Ok((0..count).map(|id| format!("LABEL_{id}")).collect())
}

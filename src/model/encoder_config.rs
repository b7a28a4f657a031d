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
use super::head::{Classified, ClassifierHead, Head, Pooling, ProblemType};
use super::names::ModuleNames;
use super::residual::BranchNorms;
use crate::error::Result;
use crate::ops::{Activation, Attention, NormKind};

/// What the class of an encoder with a classifier has that no key of config.json says.
struct Encoder {
    class: &'static str,
    names: ModuleNames,
    /// The norms of a block: on attention's sum, and on the feed-forward layers'.
    norms: [&'static str; 2],
    /// Path of the linear layer before the output, and its activation.
    dense: (&'static str, Activation),
    /// Whether positions begin behind the padding token's id.
    positions_after_padding: bool,
}

const BERT: Encoder = Encoder {
    class: "BertForSequenceClassification",
    names: ModuleNames::BERT,
    norms: ["attention.output.LayerNorm", "output.LayerNorm"],
    dense: ("bert.pooler.dense", Activation::Tanh),
    positions_after_padding: false,
};

fn family(model_type: &str) -> Option<Encoder> {
    Some(match model_type {
        "bert" => BERT,
        "roberta" | "xlm-roberta" => Encoder {
            class: if model_type == "roberta" {
                "RobertaForSequenceClassification"
            } else {
                "XLMRobertaForSequenceClassification"
            },
            names: ModuleNames::ROBERTA,
            dense: ("classifier.dense", Activation::Tanh),
            positions_after_padding: true,
            ..BERT
        },
        "electra" => Encoder {
            class: "ElectraForSequenceClassification",
            names: ModuleNames::ELECTRA,
            dense: ("classifier.dense", Activation::Gelu),
            ..BERT
        },
        "distilbert" => Encoder {
            class: "DistilBertForSequenceClassification",
            names: ModuleNames::DISTILBERT,
            norms: ["sa_layer_norm", "output_layer_norm"],
            dense: ("pre_classifier", Activation::Relu),
            ..BERT
        },
        _ => return None,
    })
}

/// The architecture of an encoder; `None` of another model type.
pub(super) fn encoder(config: &Config<'_>, model_type: &str) -> Result<Option<Architecture>> {
    let Some(family) = family(model_type) else {
        return Ok(None);
    };
    refuse_unsupported(config)?;
    let hidden_size = config.required_size("hidden_size")?;
    let embedding_parts = embedding_parts(config, &family)?;
    let [attention_norm, mlp_norm] = family.norms;
    let block = LayerKind {
        window: None,
        rope: None,
        sparse: false,
    };
    let num_hidden_layers = layer_count(config)?;
    Ok(Some(Architecture {
        model_type: model_type.to_string(),
        class: family.class.to_string(),
        names: family.names,
        hidden_size,
        intermediate_size: config.required_size("intermediate_size")?,
        num_hidden_layers,
        attention: Attention {
            causal: false,
            ..attention(config, hidden_size)?
        },
        scales_by_layer: false,
        experts: None,
        layers: vec![block; num_hidden_layers],
        qkv_groups: 1,
        qk_norm: None,
        norms_rotated_qk: false,
        activation: activation_of(config, "hidden_act")?,
        parallel: false,
        gated_mlp: false,
        attention_norms: on_sum(attention_norm),
        mlp_norms: on_sum(mlp_norm),
        embedding_factor: 1.0,
        rounds_embedding_factor: false,
        max_position_embeddings: embedding_parts
            .positions
            .map_or(0, |table| table.rows.saturating_sub(table.first)),
        embedding_parts,
        residual_factor: 1.0,
        logits_factor: 1.0,
        logits_softcap: None,
        vocab_size: config.required_size("vocab_size")?,
        norm_kind: NormKind::Layer,
        norm_unit_offset: false,
        norm_eps: config.required_number("layer_norm_eps", Range::NON_NEGATIVE)?,
        ropes: Vec::new(),
        query_scaling: None,
        tie_word_embeddings: false,
        biases: Biases::ALL,
        transposed_linears: false,
        initializer_range: config.required_number("initializer_range", Range::NON_NEGATIVE)?,
        stored_in_bf16: stored_in_bf16(config)?,
        stored_formats: BTreeMap::new(),
        dropout: dropout(config)?,
        head: Head::Classifier(ClassifierHead {
            module: "classifier",
            dense: Some(family.dense.0),
            activation: family.dense.1,
            bias: true,
            pooling: Pooling::First,
            labels: labels(config)?,
            problem_type: ProblemType::SingleLabel,
            class_weights: Vec::new(),
        }),
    }))
}

fn on_sum(name: &'static str) -> BranchNorms {
    BranchNorms {
        input: None,
        output: Some(name),
        on_sum: true,
    }
}

fn embedding_parts(config: &Config<'_>, family: &Encoder) -> Result<EmbeddingParts> {
    let id = |value: &Value| usize::try_from(value.as_u64()?).ok();
    let first = if family.positions_after_padding {
        let key = "pad_token_id";
        let padding = config.read(key, "a token's id", id)?;
        1 + padding.ok_or_else(|| config.wrong(key, "a token's id"))?
    } else {
        0
    };
    let token_types = if config.has("type_vocab_size") {
        Some(TokenTypes {
            name: "embeddings.token_type_embeddings",
            rows: config.required_size("type_vocab_size")?,
        })
    } else {
        None
    };
    Ok(EmbeddingParts {
        positions: Some(LearnedPositions {
            name: "embeddings.position_embeddings",
            rows: config.required_size("max_position_embeddings")?,
            first,
        }),
        token_types,
        norm: Some("embeddings.LayerNorm"),
    })
}

/// Refuses settings of a decoder, positions that are not learned, and embeddings of another width.
fn refuse_unsupported(config: &Config<'_>) -> Result<()> {
    for key in ["is_decoder", "add_cross_attention"] {
        if config.flag(key)? {
            return Err(config.wrong(key, "false: only the encoder is supported"));
        }
    }
    if config.has("embedding_size")
        && config.required_size("embedding_size")? != config.required_size("hidden_size")?
    {
        let rule = "`hidden_size`: a projection of the embeddings is not supported";
        return Err(config.wrong("embedding_size", rule));
    }
    let key = "position_embedding_type";
    match config.text(key)? {
        None | Some("absolute") => Ok(()),
        Some(_) => Err(config.wrong(key, "\"absolute\"")),
    }
}

/// The names of `id2label` by id, else `LABEL_0` and so on for `num_labels`, by default two.
pub(super) fn labels(config: &Config<'_>) -> Result<Vec<String>> {
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

/// The problem that config.json states; else a number if there is one output for a text, as in
/// transformers.
pub(super) fn problem_type(config: &Config<'_>, classified: Classified) -> Result<ProblemType> {
    if classified == Classified::Tokens {
        return Ok(ProblemType::SingleLabel);
    }
    let rule = "regression, single_label_classification or multi_label_classification";
    let stated = config.read("problem_type", rule, |value| {
        ProblemType::from_name(value.as_str()?)
    })?;
    let one_output = labels(config)?.len() == 1;
    Ok(stated.unwrap_or(if one_output {
        ProblemType::Regression
    } else {
        ProblemType::SingleLabel
    }))
}

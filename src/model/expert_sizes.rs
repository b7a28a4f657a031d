//! Mixtures of experts in config.json: their sizes, and the blocks that have them.

use serde_json::Value;

use super::config::Config;
use super::families::Family;
use crate::error::Result;

/// The experts of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertSizes {
    /// Their number.
    pub count: usize,
    /// How many of them a token passes through.
    pub per_token: usize,
    /// Channels inside each.
    pub intermediate_size: usize,
    /// Whether the weights of a token's experts sum to one.
    pub normalized: bool,
}

impl ExpertSizes {
    /// Shapes of the tensors of [`ModuleNames::EXPERTS`].
    pub(super) fn shapes(&self, hidden: usize) -> [Vec<usize>; 3] {
        let (count, inner) = (self.count, self.intermediate_size);
        [
            vec![count, hidden],
            vec![count, 2 * inner, hidden],
            vec![count, hidden, inner],
        ]
    }
}

/// The experts of a family that has them.
///
/// # Errors
/// More experts a token than there are; a router with an auxiliary loss.
pub(super) fn expert_sizes(config: &Config<'_>, family: &Family) -> Result<Option<ExpertSizes>> {
    let Some(normalized) = family.experts else {
        return Ok(None);
    };
    if config.flag("output_router_logits")? {
        let rule = "false: the routers' auxiliary loss is not supported";
        return Err(config.wrong("output_router_logits", rule));
    }
    // transformers 4 and 5 each write one of the two.
    let count = match config.size("num_local_experts")? {
        Some(count) => count,
        None => config.required_size("num_experts")?,
    };
    let per_token = config.required_size("num_experts_per_tok")?;
    if per_token > count {
        let rule = format!("at most the {count} experts");
        return Err(config.wrong("num_experts_per_tok", &rule));
    }
    let inner = if config.has("moe_intermediate_size") {
        "moe_intermediate_size"
    } else {
        "intermediate_size"
    };
    Ok(Some(ExpertSizes {
        count,
        per_token,
        intermediate_size: config.required_size(inner)?,
        normalized: if config.has("norm_topk_prob") {
            config.flag("norm_topk_prob")?
        } else {
            normalized
        },
    }))
}

/// Which blocks have experts: of every `decoder_sparse_step` the last, but not those that
/// `mlp_only_layers` lists.
pub(super) fn sparse_layers(
    config: &Config<'_>,
    family: &Family,
    count: usize,
) -> Result<Vec<bool>> {
    if family.experts.is_none() || !config.has("decoder_sparse_step") {
        return Ok(vec![family.experts.is_some(); count]);
    }
    let step = config.required_size("decoder_sparse_step")?;
    let layers = |value: &Value| value.as_array()?.iter().map(Value::as_u64).collect();
    let dense: Option<Vec<u64>> = config.read("mlp_only_layers", "a list of blocks", layers)?;
    let dense = dense.unwrap_or_default();
    let sparse = |n: usize| n.is_multiple_of(step) && !dense.contains(&(n as u64 - 1));
    Ok((1..=count).map(sparse).collect())
}

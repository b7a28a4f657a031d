//! What an adapter trains in a model: low-rank pairs on layers, and copies of whole weights.
//!
//! Takes a model's layout and a configuration; returns the trained tensors with their names in PEFT's files. Training, files,
//! merge and cost all loop over this list. Knows nothing of values.

use crate::error::{Error, Kind, Result};
use crate::text::{first_few, nearest};

use super::options::{Bias, LoraConfig, LoraInit, TokenIndices};
use super::targets::{self, Module, ModuleKind, Site};

/// Prefix of every name in an adapter's file.
pub const PREFIX: &str = "base_model.model.";
/// End of the name of an embedding's trained rows.
pub(super) const TOKEN_ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// The modules and tensors of a model that an adapter can name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelLayout {
    /// The layers that can carry LoRA, in model order.
    pub modules: Vec<Module>,
    /// Path of the input embedding; empty if there is none.
    pub input_embedding: String,
    /// Path of the output embedding, which `all-linear` leaves out; empty if there is none.
    pub output_embedding: String,
    /// Whether both embeddings are one tensor, listed under the input embedding.
    pub tied: bool,
    /// Every tensor with its shape, in model order.
    pub tensors: Vec<(String, Vec<usize>)>,
}

impl ModelLayout {
    /// Name of the input embedding's tensor.
    pub fn table(&self) -> String {
        format!("{}.weight", self.input_embedding)
    }

    /// Name of the output embedding's tensor.
    pub fn head(&self) -> String {
        format!("{}.weight", self.output_embedding)
    }

    /// The `names` that match no module, by PEFT's rule for `modules_to_save`.
    pub(super) fn missing_modules(&self, names: &[String]) -> Vec<String> {
        let tensors = self.all_tensors();
        let paths = module_paths(&tensors);
        let is_missing = |name: &&String| !paths.iter().any(|path| path.ends_with(*name));
        names.iter().filter(is_missing).cloned().collect()
    }

    /// Every tensor, the output embedding included where it is tied.
    fn all_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = self.tensors.clone();
        let table = tensors.iter().find(|(name, _)| *name == self.table());
        let tied = table.filter(|_| self.tied);
        tensors.extend(tied.map(|(_, shape)| (self.head(), shape.clone())));
        tensors
    }
}

/// A part of a LoRA layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// (r, in).
    A,
    /// (out, r).
    B,
    /// A of an embedding, (r, V).
    EmbeddingA,
    /// B of an embedding, (C, r).
    EmbeddingB,
    /// DoRA's magnitude, (out).
    Magnitude,
    /// Added to B's result, (out).
    Bias,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 6] = [
        Self::A,
        Self::B,
        Self::EmbeddingA,
        Self::EmbeddingB,
        Self::Magnitude,
        Self::Bias,
    ];

    /// End of its name in a file.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::A => ".lora_A.weight",
            Self::B => ".lora_B.weight",
            Self::EmbeddingA => ".lora_embedding_A",
            Self::EmbeddingB => ".lora_embedding_B",
            Self::Magnitude => ".lora_magnitude_vector",
            Self::Bias => ".lora_B.bias",
        }
    }

    /// Its shape on `site`.
    pub fn shape(self, site: &Site) -> Vec<usize> {
        match self {
            Self::A | Self::EmbeddingA => vec![site.r, site.in_features],
            Self::B | Self::EmbeddingB => vec![site.out_features, site.r],
            Self::Magnitude | Self::Bias => vec![site.out_features],
        }
    }

    /// Its name in a file for the layer `path`.
    pub fn name(self, path: &str) -> String {
        format!("{PREFIX}{path}{}", self.suffix())
    }
}

/// A weight of the model that is trained in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightCopy {
    /// Its name in the model.
    pub tensor: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Other names of it in the model: the output embedding's, where both embeddings are trained as one.
    pub aliases: Vec<String>,
    /// Whether its layer has LoRA, under which files name it `base_layer`.
    pub in_lora_layer: bool,
}

impl WeightCopy {
    /// Its names in the model.
    pub fn tensors(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.tensor).chain(&self.aliases)
    }

    /// Its first name in a file.
    pub fn name(&self) -> String {
        self.names().next().unwrap_or_default()
    }

    /// Its names in a file; all hold the same values.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        self.tensors().map(|tensor| match tensor.rsplit_once('.') {
            Some((path, part)) if self.in_lora_layer => format!("{PREFIX}{path}.base_layer.{part}"),
            _ => format!("{PREFIX}{tensor}"),
        })
    }
}

/// Rows of an embedding that are trained alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet {
    /// Path of the embedding.
    pub path: String,
    /// The tokens, in the order of the rows.
    pub tokens: Vec<u32>,
    /// C.
    pub width: usize,
    /// Whether the output embedding is the same table.
    pub tied: bool,
}

impl TokenSet {
    /// Its name in a file.
    pub fn name(&self) -> String {
        format!("{PREFIX}{}{TOKEN_ROWS}", self.path)
    }
}

/// Everything that an adapter trains in a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Adaptation {
    /// The layers with LoRA, in model order.
    pub sites: Vec<Site>,
    /// The weights trained in full, in model order.
    pub copies: Vec<WeightCopy>,
    /// The embeddings of which some rows are trained.
    pub tokens: Vec<TokenSet>,
    /// Whether input and output embedding differ in the adapted model although the base ties them.
    pub unties: bool,
    /// Whether the layers have DoRA's magnitude.
    pub use_dora: bool,
    /// Whether the layers have a bias on B.
    pub lora_bias: bool,
    /// The initial values of the layers' factors.
    pub init: LoraInit,
}

/// The place of a trained tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Place<'a> {
    /// A part of a LoRA layer.
    Part(&'a Site, Part),
    /// A weight of the model.
    Weight(&'a WeightCopy),
    /// Rows of an embedding.
    Tokens(&'a TokenSet),
}

/// A trained tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterTensor<'a> {
    /// Its first name in a file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where it acts.
    pub place: Place<'a>,
}

impl AdapterTensor<'_> {
    /// All names in a file.
    pub fn names(&self) -> Vec<String> {
        match self.place {
            Place::Part(..) | Place::Tokens(_) => vec![self.name.clone()],
            Place::Weight(copy) => copy.names().collect(),
        }
    }
}

impl From<Vec<Site>> for Adaptation {
    fn from(sites: Vec<Site>) -> Self {
        Self {
            sites,
            ..Self::default()
        }
    }
}

impl Adaptation {
    /// What `settings` train in the model.
    ///
    /// # Errors
    /// As [`targets::select`], and an entry of `modules_to_save` that matches no module.
    pub fn select(layout: &ModelLayout, settings: &LoraConfig) -> Result<Self> {
        let sites = targets::select(&layout.modules, &layout.output_embedding, settings)?;
        if let Some(missing) = layout.missing_modules(&settings.modules_to_save).first() {
            return Err(no_module_to_save(missing, &layout.all_tensors()));
        }
        let adaptation = Self::new(layout, settings, sites);
        let mut copies = adaptation.copies.iter();
        if settings.bias != Bias::None && !copies.any(|copy| copy.tensor.ends_with(".bias")) {
            let what = "`bias` trains nothing: the model has no such bias";
            return Err(Error::new(Kind::Adapter, what).hint("leave `bias` out"));
        }
        if let Some(reason) = token_problem(layout, settings, &adaptation) {
            return Err(Error::new(Kind::Adapter, reason)
                .rule("distinct tokens of the vocabulary, for `embed_tokens` or `lm_head`, which nothing else trains")
                .hint("write token ids, as in `trainable_token_indices = [5, 7]`"));
        }
        match adaptation.unsupported(layout, settings) {
            Some(reason) => Err(Error::new(Kind::Adapter, reason).hint(
                "train linear layers by `target_modules`, and embeddings by `modules_to_save`",
            )),
            None => Ok(adaptation),
        }
    }

    /// LoRA on `sites` and the weights of the settings' `modules_to_save`; entries without a module have no effect, as in PEFT.
    pub fn new(layout: &ModelLayout, settings: &LoraConfig, sites: Vec<Site>) -> Self {
        let names = &settings.modules_to_save;
        let in_lora_layer = |tensor: &str| {
            let path = tensor.rsplit_once('.').map_or("", |(path, _)| path);
            sites.iter().any(|site| site.path == path)
        };
        let is_trained = |tensor: &str| {
            let bias = tensor.ends_with(".bias")
                && match settings.bias {
                    Bias::None => false,
                    Bias::All => true,
                    Bias::LoraOnly => in_lora_layer(tensor),
                };
            bias || is_saved(tensor, names)
        };
        let mut copies: Vec<WeightCopy> = layout
            .all_tensors()
            .into_iter()
            .filter(|(tensor, _)| is_trained(tensor))
            .map(|(tensor, shape)| WeightCopy {
                in_lora_layer: in_lora_layer(&tensor),
                tensor,
                shape,
                aliases: Vec::new(),
            })
            .collect();
        let [table, head] = [layout.table(), layout.head()];
        let is_embedding = |copy: &WeightCopy| copy.tensor == table || copy.tensor == head;
        let mut unties = layout.tied && copies.iter().any(is_embedding);
        if unties && settings.ensure_weight_tying {
            let first = copies.iter().position(is_embedding).unwrap_or_default();
            copies[first].tensor = table.clone();
            copies[first].aliases = vec![head.clone()];
            copies.retain(|copy| copy.tensor != head);
            unties = false;
        }
        let lora_on = |path: &str| sites.iter().any(|site| site.path == path);
        let on_embedding = lora_on(&layout.input_embedding) || lora_on(&layout.output_embedding);
        Self {
            unties: unties || (layout.tied && on_embedding),
            copies,
            use_dora: settings.use_dora,
            lora_bias: settings.lora_bias,
            init: settings.init_lora_weights,
            tokens: token_sets(layout, settings),
            sites,
        }
    }

    /// The same as its files hold it: plain LoRA of twice the rank if the initialisation changes the base weights.
    pub fn as_saved(&self) -> Self {
        let mut saved = self.clone();
        if self.init.changes_the_base() {
            saved.sites.iter_mut().for_each(|site| site.r *= 2);
            saved.init = LoraInit::Default;
        }
        saved
    }

    /// Whether an embedding has LoRA.
    pub fn has_embedding(&self) -> bool {
        let mut sites = self.sites.iter();
        sites.any(|site| site.kind == ModuleKind::Embedding)
    }

    /// Why this cannot be trained or loaded.
    pub(super) fn unsupported(
        &self,
        layout: &ModelLayout,
        settings: &LoraConfig,
    ) -> Option<String> {
        let conv1d = |copy: &&WeightCopy| {
            let path = copy.tensor.strip_suffix(".weight");
            let mut modules = layout.modules.iter();
            modules.any(|m| m.kind == ModuleKind::Conv1d && Some(m.path.as_str()) == path)
        };
        let stacked = |copy: &&WeightCopy| copy.shape.len() > 2;
        let copies = || self.copies.iter();
        for (kind, found) in [
            ("a Conv1D layer", copies().find(conv1d)),
            ("experts", copies().find(stacked)),
        ] {
            if let Some(copy) = found {
                return Some(format!(
                    "`modules_to_save` is not supported on {kind}: `{}`",
                    copy.tensor
                ));
            }
        }
        let mut sites = self.sites.iter();
        let embedding = sites.find(|site| site.kind == ModuleKind::Embedding);
        let key = match embedding {
            Some(_) if self.use_dora => "use_dora",
            Some(_) if self.lora_bias => "lora_bias",
            _ if self.unties && settings.ensure_weight_tying => "ensure_weight_tying",
            _ => return None,
        };
        Some(format!(
            "`{key}` is not supported with LoRA on an embedding{}",
            embedding.map_or(String::new(), |site| format!(": `{}`", site.path))
        ))
    }

    /// The parts of a layer, in the order in which they are trained.
    pub fn parts(&self, site: &Site) -> Vec<Part> {
        let mut parts = match site.kind {
            ModuleKind::Linear | ModuleKind::Conv1d => vec![Part::A, Part::B],
            ModuleKind::Embedding => vec![Part::EmbeddingA, Part::EmbeddingB],
        };
        parts.extend(self.use_dora.then_some(Part::Magnitude));
        parts.extend(self.lora_bias.then_some(Part::Bias));
        parts
    }

    /// The trained tensors: the parts of each layer, then the weights.
    pub fn tensors(&self) -> Vec<AdapterTensor<'_>> {
        let parts = self.sites.iter().flat_map(|site| {
            let parts = self.parts(site).into_iter();
            parts.map(move |part| AdapterTensor {
                name: part.name(&site.path),
                shape: part.shape(site),
                place: Place::Part(site, part),
            })
        });
        let weights = self.copies.iter().map(|copy| AdapterTensor {
            name: copy.name(),
            shape: copy.shape.clone(),
            place: Place::Weight(copy),
        });
        let tokens = self.tokens.iter().map(|set| AdapterTensor {
            name: set.name(),
            shape: vec![set.tokens.len(), set.width],
            place: Place::Tokens(set),
        });
        parts.chain(weights).chain(tokens).collect()
    }

    /// The number of rows of the embedding `path` that are trained alone.
    pub fn token_rows(&self, path: &str) -> usize {
        self.tokens_of(path).map_or(0, |set| set.tokens.len())
    }

    /// The trained rows of the embedding `path`; those of the input embedding where the two are tied.
    pub fn tokens_of(&self, path: &str) -> Option<&TokenSet> {
        let mut sets = self.tokens.iter();
        sets.find(|set| set.path == path || set.tied)
    }

    /// Number of trained parameters.
    pub fn parameters(&self) -> usize {
        let tensors = self.tensors();
        let sizes = tensors
            .iter()
            .map(|tensor| tensor.shape.iter().product::<usize>());
        sizes.sum()
    }

    /// Whether the weight `tensor` of the model is trained in full.
    pub fn trains(&self, tensor: &str) -> bool {
        self.copies.iter().any(|copy| copy.tensor == tensor)
    }
}

/// The rows that `trainable_token_indices` names. Lists of tied embeddings that are the same are one.
fn token_sets(layout: &ModelLayout, settings: &LoraConfig) -> Vec<TokenSet> {
    let table = layout
        .tensors
        .iter()
        .find(|(name, _)| *name == layout.table());
    let width = table.map_or(0, |(_, shape)| shape.last().copied().unwrap_or_default());
    let set = |path: &String, tokens: &[u32]| TokenSet {
        path: path.clone(),
        tokens: tokens.to_vec(),
        width,
        tied: layout.tied,
    };
    let input = &layout.input_embedding;
    match &settings.trainable_token_indices {
        None => Vec::new(),
        Some(TokenIndices::Embedding(tokens)) => vec![set(input, tokens)],
        Some(TokenIndices::ByModule(modules)) => {
            let embeddings = [input, &layout.output_embedding];
            let named = embeddings.into_iter().filter_map(|path| {
                let (_, tokens) = modules
                    .iter()
                    .find(|(name, _)| path.ends_with(name.as_str()))?;
                Some(set(path, tokens))
            });
            let mut sets: Vec<TokenSet> = named.collect();
            sets.dedup_by(|head, table| layout.tied && head.tokens == table.tokens);
            sets
        }
    }
}

/// Why the rows of `trainable_token_indices` cannot be trained.
pub(super) fn token_problem(
    layout: &ModelLayout,
    settings: &LoraConfig,
    adaptation: &Adaptation,
) -> Option<String> {
    let key = "trainable_token_indices";
    let embeddings = [&layout.input_embedding, &layout.output_embedding];
    if let Some(TokenIndices::ByModule(modules)) = &settings.trainable_token_indices {
        let is_embedding =
            |name: &&String| embeddings.iter().any(|path| path.ends_with(name.as_str()));
        if let Some(name) = modules.keys().find(|name| !is_embedding(name)) {
            return Some(format!("`{name}` of `{key}` is no embedding of the model"));
        }
    }
    let sets = &adaptation.tokens;
    if layout.tied && (sets.len() > 1 || sets.iter().any(|set| set.path != layout.input_embedding))
    {
        return Some(format!(
            "`{key}` names other rows of `lm_head` than of the embedding that it is tied to"
        ));
    }
    let table = layout
        .tensors
        .iter()
        .find(|(name, _)| *name == layout.table());
    let vocab = table.map_or(0, |(_, shape)| shape.first().copied().unwrap_or_default());
    for set in sets {
        let mut seen = std::collections::BTreeSet::new();
        let mut tokens = set.tokens.iter();
        if let Some(token) = tokens.find(|token| **token as usize >= vocab || !seen.insert(**token))
        {
            let why = if seen.contains(token) {
                "twice".to_string()
            } else {
                format!("but the vocabulary has {vocab} rows")
            };
            return Some(format!("`{key}` holds the token {token} {why}"));
        }
        let of_set = |path: &&&String| set.tied || **path == &set.path;
        for path in embeddings.iter().filter(of_set) {
            let has_lora = adaptation.sites.iter().any(|site| site.path == **path);
            if has_lora || adaptation.trains(&format!("{path}.weight")) {
                return Some(format!(
                    "`{path}` is trained as a whole beside its rows of `{key}`"
                ));
            }
        }
    }
    None
}

/// The paths of all modules that hold a tensor, directly or in a module inside them.
fn module_paths(tensors: &[(String, Vec<usize>)]) -> Vec<&str> {
    let mut paths: Vec<&str> = tensors
        .iter()
        .flat_map(|(name, _)| modules_of(name))
        .collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// The paths of the modules that contain `tensor`.
fn modules_of(tensor: &str) -> impl Iterator<Item = &str> {
    tensor.match_indices('.').map(|(dot, _)| &tensor[..dot])
}

/// Whether a module that contains `tensor` is named by one of `names`: its path ends with it, at a dot or not (PEFT's
/// `utils/other.py: _set_trainable`).
pub(super) fn is_saved(tensor: &str, names: &[String]) -> bool {
    modules_of(tensor).any(|path| names.iter().any(|name| path.ends_with(name.as_str())))
}

fn no_module_to_save(name: &str, tensors: &[(String, Vec<usize>)]) -> Error {
    let mut last: Vec<&str> = Vec::new();
    for path in module_paths(tensors) {
        let segment = path.rsplit('.').next().unwrap_or(path);
        if !last.contains(&segment) && segment.parse::<usize>().is_err() {
            last.push(segment);
        }
    }
    let hint = match nearest(name, last.iter().copied(), 0.7) {
        Some(near) => format!("`{near}` is nearest to `{name}`"),
        None => "name modules by the ends of their paths, as in `modules_to_save = [\"lm_head\"]`"
            .into(),
    };
    let listed = last.iter().map(|segment| segment.to_string()).collect();
    Error::new(
        Kind::Adapter,
        format!("`{name}` of `modules_to_save` matches no module of the model"),
    )
    .rule(format!(
        "the modules are {}",
        first_few(listed, 30).join(", ")
    ))
    .hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> ModelLayout {
        let tensor = |name: &str, shape: &[usize]| (name.to_string(), shape.to_vec());
        ModelLayout {
            input_embedding: "model.embed_tokens".into(),
            output_embedding: "lm_head".into(),
            tied: true,
            tensors: vec![
                tensor("model.embed_tokens.weight", &[8, 4]),
                tensor("model.layers.0.input_layernorm.weight", &[4]),
                tensor("model.layers.0.mlp.up_proj.weight", &[6, 4]),
                tensor("model.norm.weight", &[4]),
            ],
            ..ModelLayout::default()
        }
    }

    fn saved(names: &[&str], ensure_weight_tying: bool) -> (Vec<String>, bool) {
        let settings = LoraConfig {
            modules_to_save: names.iter().map(|name| name.to_string()).collect(),
            ensure_weight_tying,
            ..LoraConfig::default()
        };
        let adaptation = Adaptation::new(&layout(), &settings, Vec::new());
        let names = adaptation.copies.iter().flat_map(WeightCopy::names);
        (
            names.map(|name| name.replace(PREFIX, "")).collect(),
            adaptation.unties,
        )
    }

    /// `scripts/adapter_methods.py` shows the same names in PEFT's files.
    #[test]
    fn modules_are_named_by_the_ends_of_their_paths() {
        let norms = ["model.layers.0.input_layernorm.weight", "model.norm.weight"];
        assert_eq!(saved(&["norm"], false).0, norms);
        assert_eq!(
            saved(&["mlp"], false).0,
            ["model.layers.0.mlp.up_proj.weight"]
        );
        assert!(saved(&["mlp.weight"], false).0.is_empty());
    }

    #[test]
    fn a_tied_embedding_is_trained_alone_unless_the_tie_is_ensured() {
        let [table, head] = ["model.embed_tokens.weight", "lm_head.weight"];
        assert_eq!(saved(&["embed_tokens"], false), (vec![table.into()], true));
        assert_eq!(saved(&["lm_head"], false), (vec![head.into()], true));
        let both = vec![table.to_string(), head.to_string()];
        assert_eq!(
            saved(&["embed_tokens", "lm_head"], false),
            (both.clone(), true)
        );
        for names in [
            &["embed_tokens"][..],
            &["lm_head"],
            &["embed_tokens", "lm_head"],
        ] {
            assert_eq!(saved(names, true), (both.clone(), false), "{names:?}");
        }
        assert!(!saved(&["mlp"], true).1);
    }

    #[test]
    fn token_rows_are_distinct_rows_of_an_embedding_that_nothing_else_trains() {
        let by_module = |name: &str, tokens: &[u32]| {
            let modules = [(name.to_string(), tokens.to_vec())];
            TokenIndices::ByModule(modules.into_iter().collect())
        };
        let problem = |tokens: TokenIndices, saved: &[&str], tied: bool| {
            let layout = ModelLayout { tied, ..layout() };
            let settings = LoraConfig {
                trainable_token_indices: Some(tokens),
                modules_to_save: saved.iter().map(|name| name.to_string()).collect(),
                ..LoraConfig::default()
            };
            let adaptation = Adaptation::new(&layout, &settings, Vec::new());
            token_problem(&layout, &settings, &adaptation).unwrap_or_default()
        };
        let list = |tokens: &[u32]| TokenIndices::Embedding(tokens.to_vec());
        assert_eq!(problem(list(&[7, 0]), &[], true), "");
        assert_eq!(problem(by_module("lm_head", &[7]), &[], false), "");
        assert_eq!(problem(list(&[7]), &["lm_head"], false), "");
        for (found, word) in [
            (problem(list(&[8]), &[], true), "8 rows"),
            (problem(list(&[3, 3]), &[], true), "3 twice"),
            (problem(by_module("mlp", &[3]), &[], true), "`mlp`"),
            (problem(by_module("lm_head", &[3]), &[], true), "tied"),
            (
                problem(list(&[3]), &["lm_head"], true),
                "`lm_head` is trained",
            ),
        ] {
            assert!(found.contains(word), "{found}: {word}");
        }
        // The same rows of tied embeddings are one set.
        let both = [("embed_tokens", vec![1, 2]), ("lm_head", vec![1, 2])];
        let both = both.map(|(name, tokens)| (name.to_string(), tokens));
        let settings = LoraConfig {
            trainable_token_indices: Some(TokenIndices::ByModule(both.into_iter().collect())),
            ..LoraConfig::default()
        };
        assert_eq!(
            Adaptation::new(&layout(), &settings, Vec::new())
                .tokens
                .len(),
            1
        );
    }

    #[test]
    fn a_module_that_is_not_there_is_refused_by_name() {
        let settings = LoraConfig {
            modules_to_save: vec!["lm_heed".into()],
            ..LoraConfig::default()
        };
        let layout = ModelLayout {
            modules: vec![Module {
                path: "model.layers.0.mlp.up_proj".into(),
                out_features: 6,
                in_features: 4,
                kind: ModuleKind::Linear,
            }],
            ..layout()
        };
        let text = Adaptation::select(&layout, &settings)
            .unwrap_err()
            .to_string();
        assert!(text.contains("`lm_heed` of `modules_to_save`"), "{text}");
        assert!(text.contains("`lm_head` is nearest"), "{text}");
    }
}

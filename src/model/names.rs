//! Names of a decoder's modules, as in its files and for PEFT.

/// Names of the linear layers inside a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearNames {
    /// q, k and v; or one layer with the columns of all three.
    pub qkv: &'static [&'static str],
    /// The attention's output.
    pub o: &'static str,
    /// gate and up; or one layer with the columns of both; or the one before the activation where
    /// nothing gates it.
    pub gate_up: &'static [&'static str],
    /// The output of the MLP.
    pub down: &'static str,
}

/// Names of the modules outside the blocks, and of the linear layers inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModuleNames {
    /// The decoder without its head, whose files omit this prefix: `model`.
    pub base: &'static str,
    /// The embedding, inside the base.
    pub embed_tokens: &'static str,
    /// The list of blocks, inside the base.
    pub layers: &'static str,
    /// The norm before the head, inside the base, if there is one.
    pub norm: Option<&'static str>,
    /// The output embedding, or the output layer of a classifier.
    pub lm_head: &'static str,
    /// Its name in files, if it is another.
    pub lm_head_in_files: Option<&'static str>,
    /// The linear layers, inside a block.
    pub linears: LinearNames,
    /// The norms of q and k inside a block.
    pub qk_norms: [&'static str; 2],
    /// Names, in files that hold each expert by itself, of a block's mixture of experts.
    pub experts_in_files: ExpertNames,
    /// The composite model that the decoder is a part of.
    pub composite: Option<Composite>,
    /// Beginnings of the names of tensors in files that the model does not read: heads of
    /// pre-training.
    pub unread: &'static [&'static str],
}

/// Names of a block's experts in files that hold each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertNames {
    /// The module of the router and the experts.
    pub module: &'static str,
    /// gate, up and down of an expert.
    pub parts: [&'static str; 3],
}

/// A model of several modalities around the decoder, whose other parts stay as they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Composite {
    /// Prefix, in files, of the decoder with its head.
    pub prefix: &'static str,
    /// Base of the decoder under that prefix.
    pub base: &'static str,
    /// Modules beside the decoder, in files and inside `model`.
    pub towers: &'static [&'static str],
}

impl ModuleNames {
    /// The router (a module), and the stacks of the experts' gate and up, and down, inside a block.
    pub const EXPERTS: [&str; 3] = [
        "mlp.gate",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ];

    /// Llama's, which most families share.
    pub const LLAMA: Self = Self {
        base: "model",
        embed_tokens: "embed_tokens",
        layers: "layers",
        norm: Some("norm"),
        lm_head: "lm_head",
        lm_head_in_files: None,
        linears: LinearNames {
            qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            o: "self_attn.o_proj",
            gate_up: &["mlp.gate_proj", "mlp.up_proj"],
            down: "mlp.down_proj",
        },
        qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
        experts_in_files: ExpertNames {
            module: "mlp",
            parts: ["gate_proj", "up_proj", "down_proj"],
        },
        composite: None,
        unread: &[],
    };

    /// Mixtral's.
    pub const MIXTRAL: Self = Self {
        experts_in_files: ExpertNames {
            module: "block_sparse_moe",
            parts: ["w1", "w3", "w2"],
        },
        ..Self::LLAMA
    };

    /// Phi-3's: q, k and v are one layer, and so are gate and up.
    pub const PHI3: Self = Self {
        linears: LinearNames {
            qkv: &["self_attn.qkv_proj"],
            gate_up: &["mlp.gate_up_proj"],
            ..Self::LLAMA.linears
        },
        ..Self::LLAMA
    };

    /// GLM's: gate and up are one layer.
    pub const GLM: Self = Self {
        linears: LinearNames {
            gate_up: &["mlp.gate_up_proj"],
            ..Self::LLAMA.linears
        },
        ..Self::LLAMA
    };

    /// Hunyuan's.
    pub const HUNYUAN: Self = Self {
        qk_norms: ["self_attn.query_layernorm", "self_attn.key_layernorm"],
        ..Self::LLAMA
    };

    /// Phi-2's.
    pub const PHI: Self = Self {
        norm: Some("final_layernorm"),
        linears: LinearNames {
            o: "self_attn.dense",
            gate_up: &["mlp.fc1"],
            down: "mlp.fc2",
            ..Self::LLAMA.linears
        },
        ..Self::LLAMA
    };

    /// GPT-NeoX's.
    pub const GPT_NEOX: Self = Self {
        base: "gpt_neox",
        embed_tokens: "embed_in",
        norm: Some("final_layer_norm"),
        lm_head_in_files: Some("embed_out"),
        linears: LinearNames {
            qkv: &["attention.query_key_value"],
            o: "attention.dense",
            gate_up: &["mlp.dense_h_to_4h"],
            down: "mlp.dense_4h_to_h",
        },
        ..Self::LLAMA
    };

    /// GPT-2's.
    pub const GPT2: Self = Self {
        base: "transformer",
        embed_tokens: "wte",
        layers: "h",
        norm: Some("ln_f"),
        linears: LinearNames {
            qkv: &["attn.c_attn"],
            o: "attn.c_proj",
            gate_up: &["mlp.c_fc"],
            down: "mlp.c_proj",
        },
        ..Self::LLAMA
    };

    /// StarCoder 2's.
    pub const STARCODER2: Self = Self {
        linears: LinearNames {
            gate_up: &["mlp.c_fc"],
            down: "mlp.c_proj",
            ..Self::LLAMA.linears
        },
        ..Self::LLAMA
    };

    /// Llama's inside a composite model with a vision tower (LLaVA, Gemma 3, Mistral 3).
    pub const IN_LLAVA: Self = Self {
        base: "model.language_model",
        composite: Some(Composite {
            prefix: "language_model",
            base: "model",
            towers: &["vision_tower", "multi_modal_projector"],
        }),
        ..Self::LLAMA
    };

    /// BERT's with a classifier.
    pub const BERT: Self = Self {
        base: "bert",
        embed_tokens: "embeddings.word_embeddings",
        layers: "encoder.layer",
        norm: None,
        lm_head: "classifier",
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
        unread: &["cls.", "bert.pooler.", "pooler."],
        ..Self::LLAMA
    };

    /// RoBERTa's.
    pub const ROBERTA: Self = Self {
        base: "roberta",
        lm_head: "classifier.out_proj",
        unread: &["lm_head.", "roberta.pooler.", "pooler."],
        ..Self::BERT
    };

    /// ELECTRA's.
    pub const ELECTRA: Self = Self {
        base: "electra",
        lm_head: "classifier.out_proj",
        unread: &[
            "discriminator_predictions.",
            "generator_predictions.",
            "generator_lm_head.",
        ],
        ..Self::BERT
    };

    /// DistilBERT's.
    pub const DISTILBERT: Self = Self {
        base: "distilbert",
        layers: "transformer.layer",
        linears: LinearNames {
            qkv: &["attention.q_lin", "attention.k_lin", "attention.v_lin"],
            o: "attention.out_lin",
            gate_up: &["ffn.lin1"],
            down: "ffn.lin2",
        },
        unread: &[
            "vocab_transform.",
            "vocab_layer_norm.",
            "vocab_projector.",
            "pre_classifier.",
        ],
        ..Self::BERT
    };

    /// The name of tensor `name` in files that do not name it as PEFT: those of the bare decoder,
    /// which lack the prefix of the base, or of a composite model.
    pub fn other_name(&self, name: &str) -> String {
        let rest = name.strip_prefix(self.base);
        let rest = rest.and_then(|rest| rest.strip_prefix('.'));
        match (self.composite, rest) {
            (Some(composite), Some(rest)) => {
                format!("{}.{}.{rest}", composite.prefix, composite.base)
            }
            (Some(composite), None) => format!("{}.{name}", composite.prefix),
            (None, Some(rest)) => self.router_in_files(name).unwrap_or(rest.to_string()),
            (None, None) => {
                let head = name.strip_prefix(self.lm_head).zip(self.lm_head_in_files);
                head.map_or_else(|| name.to_string(), |(part, head)| format!("{head}{part}"))
            }
        }
    }

    /// Whether files may hold a tensor of this name that the model does not read.
    pub fn is_unread(&self, name: &str) -> bool {
        self.unread.iter().any(|prefix| name.starts_with(prefix))
    }

    /// The name of a router's weight in files, where it is another.
    fn router_in_files(&self, name: &str) -> Option<String> {
        let [router, ..] = Self::EXPERTS;
        let path = name.strip_suffix(".weight")?.strip_suffix(router)?;
        let module = self.experts_in_files.module;
        (module != "mlp").then(|| format!("{path}{module}.gate.weight"))
    }

    /// The names of an expert stack's parts in files that hold each expert by itself, in the order
    /// of its values; empty for other tensors.
    pub fn expert_parts(&self, name: &str, experts: usize) -> Vec<String> {
        let [_, gate_up, down] = Self::EXPERTS;
        let ExpertNames { module, parts } = self.experts_in_files;
        let (path, parts) = match (name.strip_suffix(gate_up), name.strip_suffix(down)) {
            (Some(path), _) => (path, &parts[..2]),
            (_, Some(path)) => (path, &parts[2..]),
            _ => return Vec::new(),
        };
        let of_expert = |expert: usize| {
            let part = move |part| format!("{path}{module}.experts.{expert}.{part}.weight");
            parts.iter().map(part)
        };
        (0..experts).flat_map(of_expert).collect()
    }

    /// Whether a tensor is of a composite model's other parts.
    pub fn is_of_tower(&self, name: &str) -> bool {
        let name = name.strip_prefix("model.").unwrap_or(name);
        let of = |tower: &&str| {
            name.strip_prefix(*tower)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        self.composite
            .is_some_and(|composite| composite.towers.iter().any(of))
    }

    /// An expression, as PEFT reads it, for the modules of a composite model's other parts.
    pub fn tower_modules(&self) -> Option<String> {
        let towers = self.composite?.towers.join("|");
        Some(format!(r"model\.({towers})\..*"))
    }

    /// Path of the embedding.
    pub fn embed_tokens_path(&self) -> String {
        self.base_path(self.embed_tokens)
    }

    /// Path of the norm before the head.
    pub fn norm_path(&self) -> Option<String> {
        self.norm.map(|norm| self.base_path(norm))
    }

    /// Path of a module inside the base.
    pub(super) fn base_path(&self, name: &str) -> String {
        format!("{}.{name}", self.base)
    }

    /// Path of block `layer`.
    pub fn block_path(&self, layer: usize) -> String {
        format!("{}.{}.{layer}", self.base, self.layers)
    }

    /// Path of a module inside block `layer`.
    pub fn in_block(&self, layer: usize, name: &str) -> String {
        format!("{}.{name}", self.block_path(layer))
    }

    /// The block of a module inside one.
    pub fn layer_of(&self, path: &str) -> Option<usize> {
        let rest = path.strip_prefix(self.base)?.strip_prefix('.')?;
        let rest = rest.strip_prefix(self.layers)?.strip_prefix('.')?;
        rest.split('.').next()?.parse().ok()
    }
}

impl LinearNames {
    /// The names, in model order.
    pub fn iter(&self) -> impl Iterator<Item = &'static str> + use<> {
        let qkv = self.qkv.iter().copied().chain([self.o]);
        qkv.chain(self.gate_up.iter().copied()).chain([self.down])
    }

    /// The last segment of `name`, or all of it if another layer's is the same: a target that means
    /// this layer alone.
    pub fn target(&self, name: &'static str) -> &'static str {
        let last = |name: &'static str| name.rsplit('.').next().unwrap_or(name);
        let same = self.iter().filter(|other| last(other) == last(name));
        if same.count() == 1 { last(name) } else { name }
    }
}

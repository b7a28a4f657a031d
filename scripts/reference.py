"""Golden files of tiny random models, made with transformers and peft: the outside opinion that the Rust tests are held to.

    python scripts/reference.py [NAME...]          # all models, or those named; writes tests/golden/tiny/NAME/

Needs torch, transformers and peft (golden.json names the versions used). CPU, one thread, float32 end to end, eager
attention, each sequence run alone without padding. Deterministic: a second run writes the same bytes.

Three kinds of model. All have hidden 32 and 2 layers or 3; every weight is random, norms (not 1) and biases (not 0) too.

full: gqa (4 heads, 2 kv) · tied (tied embeddings, head_dim 12 although hidden/heads = 8) · biases (attention and MLP
biases) · qwen2 (bias on q, k, v alone) · llama3rope (rope scaling whose three frequency zones are all hit: head_dim 16)
  config.json, model.safetensors   as transformers saves them
  adapter/                         as PEFT saves it: r 4, lora_alpha 12, all-linear, A and B both non-zero
  golden.safetensors
    input_ids i64 [T], segments i64 [S] (lengths that sum to T), loss_mask u8 [T] (1: this token is predicted; the first
    of a segment never is; one segment has a masked stretch in its middle, as a second turn would)
    base.logits.I, adapter.logits.I   f32 [segment I's length, vocab]
    base.grad.HF_NAME                 d(base loss)/dW of every weight, no adapter; tied weights once, as embed_tokens
    adapter.grad.PEFT_NAME            d(adapter loss)/dA, dB at the saved adapter, base frozen
    adapter.final.PEFT_NAME           the adapter after ten steps
  golden.json
    versions, segments, input_ids, loss_mask, loss_tokens, base_loss, adapter_loss,
    optimizer (its settings), steps [{step, lr, loss, grad_norm}], loss_after,
    noise (largest difference to the same figures from sdpa attention over one right-padded batch: what float32
    rounding alone does; a test's tolerance may not be smaller)
  PEFT_NAME is the name in adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight.
  A step's loss is taken before its update; grad_norm is the global L2 norm before clipping. Losses are nats per loss
  token, weighted by token over both segments.

families: qwen3 (q/k norm on each head, biases on q, k, v, o, a sliding window from layer 1 on) · smollm3 (tied, layer 1
without rotation, biases) · granite (four multipliers, biases) · olmo2 (norms on results, q/k norm over the rows, biases) ·
olmo3 (the same, windows and rotations by layer type) · gemma (tied, norms that scale by 1 + weight, embedding x
sqrt(hidden), tanh GELU, biases) · gemma2 (the same, norms before and after, scale, window by layer type, both softcaps) ·
gemma3 (gemma2 without softcaps, q/k norm on each head, rotations by layer type) · phi3 (q, k, v in one layer, gate and up
in one, a window, LongRoPE on the first six of eight channels of a head, whose long factors begin within the greedy ids) ·
gpt_neox (q, k, v in one layer by head, parallel branches of two LayerNorms, half of a head rotates, biases) · starcoder2 (LayerNorm, MLP without a gate, biases, a
window) · stablelm (parallel branches of one LayerNorm, biases on q, k, v, half of a head rotates) · gpt2 (weights stored
(in, out), learned positions, the scale divided by the block's number) · cohere (parallel branches of one LayerNorm without bias,
neighbouring channels rotate, a factor of the logits, biases) · cohere2 (the same, windows, full attention without rotation) · glm
(gate and up in one layer, half of a head rotates, biases on q, k, v) · glm4 (the same, norms before and after) · exaone4 (norms on
results, q/k norm on each head, windows, full attention without rotation) · ernie4_5 (neighbouring channels rotate, tied, biases) ·
seed_oss (biases) · helium (neighbouring channels rotate, biases but on o) · qwen3_moe (experts whose weights sum to one, and a
block without) · olmoe (experts, q/k norm over the rows) · mixtral (experts) · hunyuan (q/k norm on each head behind the rotation,
whose base alpha scales) · phi (parallel branches of one LayerNorm, half of a head rotates, biases, one on the logits too) ·
gemma3_vision (gemma3 in the composite class, beside a vision tower) · ministral3 (yarn, a factor of queries by position,
tied, in the composite class)
  as full, with 3 layers; golden.json also holds greedy: ten ids that the adapted model continues segment 0 with.

classifiers (sequence classification, three classes; bert_regression one value, llama_labels three labels a text, bert_weighted weights of the
classes in the loss): bert (positions, token types, norms behind the residual addition, biases, a
pooler) · roberta (positions from the padding id on) · electra (another activation) · distilbert (no token types, other names) ·
llama_score, qwen2_score, qwen3_score (the decoders, the last token's classes) · bert_tokens, qwen2_tokens (classes of the tokens
that loss_mask marks: labels are theirs in order, logits.I f32 [marked tokens, classes])
  as full, with task_type SEQ_CLS, so that the adapter holds the classifier too (modules_to_save); logits.I f32 [classes].
  loss_mask marks the classified token, golden.json holds labels, one a segment; losses are nats per segment.

logits only: linear, dynamic, yarn (rope scaling, a 100-token segment past the original 64 positions, then a 20-token one
inside them: `dynamic` must scale the first and not the second) · longrope (the same in Phi-3, 12 of 16 channels) · mistral (sliding window 16 over 40 tokens, then 10)
  config.json, model.safetensors; golden.safetensors: input_ids, segments, base.logits.I; golden.json: versions,
  segments, input_ids, noise.

Models of the first and third kind with rope scaling also get config_v4.json: the same config in the words of transformers 4 (rope_theta and
rope_scaling instead of rope_parameters), as most published checkpoints have it; the script checks that both read alike.
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, BertConfig, Cohere2Config, CohereConfig, DistilBertConfig, ElectraConfig,
                          Ernie4_5Config, Exaone4Config, GPT2Config, GPTNeoXConfig, Gemma2Config, Gemma3Config, Gemma3TextConfig,
                          GemmaConfig, Glm4Config, GlmConfig, GraniteConfig, HeliumConfig, HunYuanDenseV1Config, LlamaConfig, Mistral3Config, MistralConfig,
                          MixtralConfig, Olmo2Config, Olmo3Config, OlmoeConfig, Phi3Config, PhiConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig,
                          RobertaConfig, SeedOssConfig, SmolLM3Config, StableLmConfig, Starcoder2Config)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path("tests/golden/tiny")  # relative: it is written to adapter_config.json
STEPS = 10
OPTIMIZER = {"lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
MAX_GRAD_NORM = 1.0
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
             tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, use_cache=False)
LONG = dict(SMALL, vocab_size=48, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)  # head_dim 16


def rope(rope_type, theta=10000.0, **settings):
    return {"rope_type": rope_type, "rope_theta": theta, **settings}


FULL = {
    "gqa": lambda: LlamaConfig(**SMALL, vocab_size=96, intermediate_size=48),
    "tied": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True}, head_dim=12,
                                vocab_size=96, intermediate_size=32),
    "biases": lambda: LlamaConfig(**SMALL, vocab_size=64, intermediate_size=40, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SMALL, vocab_size=64, intermediate_size=40),
    # Wavelengths of head_dim 16 at theta 500000: 6.3 (kept), 32 (between 64/4 and 64/1: blended), 167 and up (divided by 8).
    "llama3rope": lambda: LlamaConfig(
        **{**LONG, "vocab_size": 64, "intermediate_size": 32}, max_position_embeddings=512,
        rope_parameters=rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=64)),
}
LOGITS_ONLY = {
    "linear": (lambda: LlamaConfig(**LONG, max_position_embeddings=256, rope_parameters=rope("linear", factor=4.0)), (100, 20)),
    # dynamic counts from max_position_embeddings: it has no original length of its own.
    "dynamic": (lambda: LlamaConfig(**LONG, max_position_embeddings=64, rope_parameters=rope("dynamic", factor=4.0)), (100, 20)),
    "yarn": (lambda: LlamaConfig(**LONG, max_position_embeddings=256,
                                 rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=64)), (100, 20)),
    "longrope": (lambda: Phi3Config(**LONG, pad_token_id=0, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope(
        "longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.2, 1.4, 1.5, 2.0], long_factor=[1.0, 1.5, 2.0, 4.0, 8.0, 16.0])),
                 (100, 20)),
    "neox_serial": (lambda: GPTNeoXConfig(**{k: v for k, v in LONG.items() if k not in ("num_key_value_heads", "rms_norm_eps")}, hidden_act="gelu_new",
                                          attention_bias=False, use_parallel_residual=False, rope_parameters=rope("default")), (40, 10)),
    "mistral": (lambda: MistralConfig(**{**LONG, "num_attention_heads": 4, "num_key_value_heads": 2}, head_dim=8,
                                      sliding_window=16, max_position_embeddings=64), (40, 10)),
}
# Decoder families, every quirk on; smaller than the models above, with greedy continuations.
FAMILY = {**SMALL, "num_hidden_layers": 3, "vocab_size": 48, "intermediate_size": 24, "num_attention_heads": 4}
GEMMA3 = dict(head_dim=12, attention_bias=True, pad_token_id=0, query_pre_attn_scalar=7, sliding_window=5,
              layer_types=["sliding_attention", "full_attention", "sliding_attention"],
              rope_parameters={"sliding_attention": rope("default", 1e2), "full_attention": rope("linear", 1e4, factor=4.0)})
VISION = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
FAMILIES = {
    "qwen3": lambda: Qwen3Config(**FAMILY, head_dim=12, attention_bias=True, use_sliding_window=True, sliding_window=5,
                                 max_window_layers=1, rope_parameters=rope("default", 1e4)),
    "smollm3": lambda: SmolLM3Config(**{**FAMILY, "tie_word_embeddings": True}, no_rope_layers=[1, 0, 1], attention_bias=True,
                                     mlp_bias=True, pad_token_id=0, rope_parameters=rope("default", 1e4)),
    "granite": lambda: GraniteConfig(**FAMILY, attention_bias=True, embedding_multiplier=3.0, residual_multiplier=0.4,
                                     attention_multiplier=0.25, logits_scaling=2.0, rope_parameters=rope("default", 1e4)),
    "olmo2": lambda: Olmo2Config(**FAMILY, pad_token_id=0, attention_bias=True, rope_parameters=rope("default", 1e4)),
    "olmo3": lambda: Olmo3Config(**FAMILY, pad_token_id=0, sliding_window=5,
                                 layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                 rope_parameters={"sliding_attention": rope("default", 1e4), "full_attention":
                                                  rope("yarn", 1e4, factor=4.0, original_max_position_embeddings=8)}),
    "gemma": lambda: GemmaConfig(**{**FAMILY, "tie_word_embeddings": True}, head_dim=12, attention_bias=True, pad_token_id=0,
                                 rope_parameters=rope("default", 1e4)),
    "gemma3": lambda: Gemma3TextConfig(**{**FAMILY, "tie_word_embeddings": True}, **GEMMA3),
    "gemma2": lambda: Gemma2Config(**{**FAMILY, "tie_word_embeddings": True}, **{**GEMMA3, "rope_parameters": rope("default", 1e4)},
                                   attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
    "gemma3_vision": lambda: Gemma3Config(
        text_config={**FAMILY, **GEMMA3, "model_type": "gemma3_text"}, mm_tokens_per_image=4, tie_word_embeddings=True,
        vision_config={**VISION, "model_type": "siglip_vision_model"}),
    "ministral3": lambda: Mistral3Config(
        text_config={**FAMILY, "model_type": "ministral3", "head_dim": 12, "max_position_embeddings": 64, "rope_parameters": rope(
            "yarn", 1e4, factor=16.0, original_max_position_embeddings=4, mscale=1.0, mscale_all_dim=0.7, llama_4_scaling_beta=0.5)},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8}, tie_word_embeddings=True),
}
# Models without sdpa attention: noise comes from padding alone.
OTHER = {"gemma2": "eager"}
LAYER_NORM = {k: v for k, v in FAMILY.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
# The same for families with other modules than Llama's.
OTHER_MODULES = {
    "phi3": lambda: Phi3Config(**FAMILY, pad_token_id=0, sliding_window=5, max_position_embeddings=64, original_max_position_embeddings=16,
                               rope_parameters=rope("longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.25, 1.5],
                                                    long_factor=[1.5, 2.0, 4.0])),
    "gpt_neox": lambda: GPTNeoXConfig(**LAYER_NORM, layer_norm_eps=1e-5, rope_parameters=rope("default", partial_rotary_factor=0.5)),
    "starcoder2": lambda: Starcoder2Config(**LAYER_NORM, num_key_value_heads=2, norm_epsilon=1e-5, sliding_window=5,
                                           rope_parameters=rope("default")),
    "stablelm": lambda: StableLmConfig(**LAYER_NORM, num_key_value_heads=2, layer_norm_eps=1e-5, use_qkv_bias=True,
                                       use_parallel_residual=True, rope_parameters=rope("default", partial_rotary_factor=0.5)),
}
FAMILIES |= OTHER_MODULES
COHERE = dict(LAYER_NORM, num_key_value_heads=2, layer_norm_eps=1e-5, logit_scale=0.5, tie_word_embeddings=True, attention_bias=True,
              pad_token_id=0, rope_parameters=rope("default"))
WINDOWS = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
EXPERTS = dict(num_experts_per_tok=2, rope_parameters=rope("default"))
GLM = dict(FAMILY, head_dim=12, pad_token_id=0, rope_parameters=rope("default", partial_rotary_factor=0.5))
# Later additions, whose seeds follow those of the others.
LATER = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=24, n_positions=256, vocab_size=48, resid_pdrop=0.0, embd_pdrop=0.0,
                               attn_pdrop=0.0, scale_attn_by_inverse_layer_idx=True, bos_token_id=1, eos_token_id=2, use_cache=False),
    "cohere": lambda: CohereConfig(**COHERE),
    "cohere2": lambda: Cohere2Config(**COHERE, **WINDOWS),
    "glm": lambda: GlmConfig(**GLM),
    "glm4": lambda: Glm4Config(**GLM),
    "exaone4": lambda: Exaone4Config(**FAMILY, **WINDOWS, rope_parameters=rope("default")),
    "ernie4_5": lambda: Ernie4_5Config(**{**FAMILY, "tie_word_embeddings": True}, head_dim=12, use_bias=True, pad_token_id=0,
                                       rope_parameters=rope("default")),
    "seed_oss": lambda: SeedOssConfig(**FAMILY, head_dim=12, attention_out_bias=True, mlp_bias=True, attention_dropout=0.0,
                                      residual_dropout=0.0, rope_parameters=rope("default")),
    "helium": lambda: HeliumConfig(**FAMILY, head_dim=8, attention_bias=True, mlp_bias=True, pad_token_id=0, rope_parameters=rope("default")),
    "qwen3_moe": lambda: Qwen3MoeConfig(**FAMILY, **EXPERTS, head_dim=12, attention_bias=True, moe_intermediate_size=8, num_experts=4,
                                        norm_topk_prob=True, mlp_only_layers=[1]),
    "olmoe": lambda: OlmoeConfig(**{**FAMILY, "intermediate_size": 8, "num_hidden_layers": 2}, **EXPERTS, num_experts=5, pad_token_id=0),
    "mixtral": lambda: MixtralConfig(**{**FAMILY, "intermediate_size": 8, "num_hidden_layers": 2}, **EXPERTS, num_local_experts=5),
    "hunyuan": lambda: HunYuanDenseV1Config(**FAMILY, head_dim=12, attention_bias=True, pad_token_id=0, eod_token_id=2, rope_parameters=rope(
        "dynamic", 1e4, alpha=50.0, factor=1.0)),
    "phi": lambda: PhiConfig(**LAYER_NORM, num_key_value_heads=2, layer_norm_eps=1e-5, resid_pdrop=0.0, embd_pdrop=0.0,
                             attention_dropout=0.0, rope_parameters=rope("default", partial_rotary_factor=0.5)),
}
FAMILIES |= LATER
ENCODER = dict(vocab_size=48, max_position_embeddings=24, pad_token_id=0, num_labels=3)
BERT_LIKE = {**ENCODER, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
             "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSIFIERS = {
    "bert": lambda: BertConfig(**BERT_LIKE),
    "roberta": lambda: RobertaConfig(**{**BERT_LIKE, "pad_token_id": 2}, type_vocab_size=1),
    "electra": lambda: ElectraConfig(**BERT_LIKE, embedding_size=32),
    "distilbert": lambda: DistilBertConfig(**ENCODER, dim=32, n_layers=2, n_heads=4, hidden_dim=40, dropout=0.0, attention_dropout=0.0,
                                           seq_classif_dropout=0.0),
    "llama_score": lambda: LlamaConfig(**FAMILY, pad_token_id=0, num_labels=3, rope_parameters=rope("default")),
    "qwen2_score": lambda: Qwen2Config(**FAMILY, pad_token_id=0, num_labels=3, rope_parameters=rope("default")),
    "qwen3_score": lambda: Qwen3Config(**FAMILY, pad_token_id=0, head_dim=12, num_labels=3, rope_parameters=rope("default")),
    "bert_tokens": lambda: BertConfig(**BERT_LIKE),
    "bert_regression": lambda: BertConfig(**{**BERT_LIKE, "num_labels": 1}),
    "llama_labels": lambda: LlamaConfig(**FAMILY, pad_token_id=0, num_labels=3, problem_type="multi_label_classification",
                                        rope_parameters=rope("default")),
    "bert_weighted": lambda: BertConfig(**BERT_LIKE),
    "qwen2_tokens": lambda: Qwen2Config(**FAMILY, pad_token_id=0, num_labels=3, rope_parameters=rope("default")),
}
# Later additions, whose seeds follow those of the others.
ADDED_HEADS = ["bert_regression", "llama_labels", "bert_weighted"]
# Where PEFT's all-linear names layers of the head that modules_to_save copies.
HEADLESS_TARGETS = {name: ".*encoder.*(query|key|value|dense)" for name in ("roberta", "electra")}
HEADLESS_TARGETS |= {name: ".*layers.*_proj" for name in CLASSIFIERS if name.startswith(("llama", "qwen"))}
HEADLESS_TARGETS["bert_tokens"] = HEADLESS_TARGETS["roberta"]
HEADLESS_TARGETS["distilbert"] = ".*(q_lin|k_lin|v_lin|out_lin|lin1|lin2)"
LABELS = [2, 0]
# Of each segment, by model: a value, or whether it has each label; and the weights of the classes in the loss.
VALUES = {"bert_regression": [[0.7], [-1.3]], "llama_labels": [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]}
CLASS_WEIGHTS = {"bert_weighted": [0.5, 2.0, 3.0]}
# Of the tokens that a mask marks.
TOKEN_LABELS = [2, 0, 1, 1, 0, 2, 1, 2, 0, 2, 1, 0, 1]
# Per segment: 0 = context, 1 = predicted.
LOSS_MASKS = [[0] * 4 + [1] * 3 + [0] * 2 + [1] * 4, [0] * 3 + [1] * 6]


def randomise(model, seed):
    """Fills every parameter: matrices N(0, 0.2^2), biases N(0, 0.3^2), norm weights uniform in [0.5, 1.5],
    in [-0.5, 0.5] where 1 + weight is the scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if ("norm" in name.lower() or ".ln_" in name) and name.endswith("weight"):
                offset = -0.5 if model.config.model_type.startswith("gemma") else 0.5
                p.copy_(torch.rand(p.shape, generator=generator) + offset)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if name.endswith("bias") else 0.2))


def randomise_adapter(model, seed):
    """A ~ N(0, 0.2^2), B ~ N(0, 0.1^2): with B = 0 the gradient of A would be zero and prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if "lora_A" in name else 0.1))


def save_model(name, config, seed):
    """A random model's config.json (and config_v4.json where it says anything) and model.safetensors."""
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    config._attn_implementation = "eager"
    model = auto_class(name, config).from_config(config).float()
    randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    saved = json.loads((folder / "config.json").read_text())
    if name not in FAMILIES | CLASSIFIERS and saved["rope_parameters"]["rope_type"] != "default":
        save_old_config(folder, saved)


def save_old_config(folder, config):
    """The config in transformers 4's words, read back to prove that it means the same."""
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        config["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if scaling["rope_type"] in ("linear", "dynamic"):  # the oldest spelling
        scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    old = folder / "config_v4.json"
    old.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    new = AutoConfig.from_pretrained(folder)
    known = {k: v for k, v in AutoConfig.from_pretrained(old).rope_parameters.items() if k != "type"}
    assert known == new.rope_parameters, (known, new.rope_parameters)


def auto_class(name, config):
    if name.endswith("_tokens"):
        return AutoModelForTokenClassification
    if name in CLASSIFIERS:
        return AutoModelForSequenceClassification
    return AutoModelForImageTextToText if is_composite(config) else AutoModelForCausalLM


def is_composite(config):
    return hasattr(config, "vision_config")


def load(name, adapter=False, attention="eager"):
    """The model from its saved files: goldens describe what is on disk."""
    kind = auto_class(name, AutoConfig.from_pretrained(GOLDEN / name))
    model = kind.from_pretrained(GOLDEN / name, attn_implementation=attention, dtype=torch.float32)
    if adapter:
        return peft.PeftModel.from_pretrained(model, GOLDEN / name / "adapter", is_trainable=True)
    return model.requires_grad_(True)


def task_type(name):
    if name.endswith("_tokens"):
        return "TOKEN_CLS"
    return "SEQ_CLS" if name in CLASSIFIERS else "CAUSAL_LM"


def save_adapter(name, seed):
    """A PEFT adapter whose r is not its alpha; its target list sorted, for PEFT writes a set in hash order."""
    base = load(name)
    base.name_or_path = (GOLDEN / name).as_posix()
    targets = r"model\.language_model\..*_proj" if is_composite(base.config) else "all-linear"
    if name in HEADLESS_TARGETS:
        targets = HEADLESS_TARGETS[name]
    if getattr(base.config, "num_local_experts", None):  # "all-linear" would include the experts
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = peft.LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=targets,
                               task_type=task_type(name))
    model = peft.get_peft_model(base, settings)
    randomise_adapter(model, seed)
    folder = GOLDEN / name / "adapter"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    tidy_adapter_config(folder, (GOLDEN / name).as_posix())


def tidy_adapter_config(folder, base_model):
    """Sorts the target list and names the base model portably."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base_model
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def file_name(name):
    """The name of a PEFT parameter in adapter_model.safetensors."""
    return name.replace(".modules_to_save.default", "").replace(".default.weight", ".weight")


def random_ids(vocab, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


def run(model, sequences, masks, padded=False):
    """Logits of each sequence and the mean negative log-likelihood of the tokens that `masks` marks, or of the classes."""
    if padded:
        width = max(len(s) for s in sequences)
        ids = torch.stack([torch.nn.functional.pad(s, (0, width - len(s))) for s in sequences])
        seen = torch.stack([(torch.arange(width) < len(s)).long() for s in sequences])
        out = model(input_ids=ids, attention_mask=seen).logits
        logits = [row[: len(s)] if row.dim() == 2 else row for row, s in zip(out, sequences)]
    else:
        logits = [model(input_ids=s[None]).logits[0] for s in sequences]
    if "TokenClassification" in type(model).__name__:
        logits = [l[m.bool()] for l, m in zip(logits, masks)]
        return logits, torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(TOKEN_LABELS))
    if logits[0].dim() == 1:
        return logits, class_loss(Path(model.config._name_or_path).name, torch.stack(list(logits)))
    total = sum(
        torch.nn.functional.cross_entropy(l[:-1], s[1:], reduction="none")[m[1:].bool()].sum()
        for l, s, m in zip(logits, sequences, masks)
    )
    return logits, total / sum(int(m.sum()) for m in masks)


def class_loss(name, logits):
    """As transformers' classes compute it (loss_utils.ForSequenceClassificationLoss); class weights are torch's."""
    if name not in VALUES:
        weights = torch.tensor(CLASS_WEIGHTS[name]) if name in CLASS_WEIGHTS else None
        return torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS), weight=weights)
    values = torch.tensor(VALUES[name])
    if values.shape[1] == 1:
        return torch.nn.functional.mse_loss(logits, values)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, values)


def measure(model, sequences, masks, padded=False):
    """(logits, loss, gradient of every trainable parameter by name)."""
    model.zero_grad()
    logits, loss = run(model, sequences, masks, padded)
    loss.backward()
    grads = {file_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [l.detach().clone() for l in logits], loss.item(), grads


def trained(model):
    """Copies of the trainable tensors by name."""
    return {file_name(n): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def trainer_groups(trainable):
    """The Trainer's parameter groups: no decay of vectors."""
    vectors = [p for p in trainable if p.dim() == 1]
    groups = [{"params": [p for p in trainable if p.dim() > 1]}]
    return groups + [{"params": vectors, "weight_decay": 0.0}] * bool(vectors)


def train(model, sequences, masks, padded=False, groups=None):
    """Ten AdamW steps at a constant rate on the one batch: (a record per step, loss afterwards, weights afterwards). `groups`:
    parameter groups in place of the one with all that is trained."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups or trainer_groups(trainable), **{**OPTIMIZER, "betas": tuple(OPTIMIZER["betas"])}, foreach=False)
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        _, loss = run(model, sequences, masks, padded)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM, foreach=False)
        optimizer.step()
        steps.append({"step": step, "lr": OPTIMIZER["lr"], "loss": loss.item(), "grad_norm": norm.item()})
    with torch.no_grad():
        return steps, run(model, sequences, masks, padded)[1].item(), trained(model)


def difference(a, b):
    """Largest absolute difference over two lists or dicts of tensors."""
    pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else zip(a, b)
    return max((x - y).abs().max().item() for x, y in pairs)


def versions():
    return {"python": ".".join(map(str, sys.version_info[:2])), "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__, "peft": peft.__version__, "safetensors": safetensors.__version__}


def write(name, tensors, record, sequences):
    """golden.safetensors and golden.json."""
    tensors["input_ids"] = torch.cat(sequences)
    tensors["segments"] = torch.tensor([len(s) for s in sequences])
    save_file({k: v.contiguous() for k, v in tensors.items()}, GOLDEN / name / "golden.safetensors", metadata={"format": "pt"})
    head = {"model": name, "made_by": "scripts/reference.py", "versions": versions(), "attention": "eager",
            "segments": [len(s) for s in sequences], "input_ids": torch.cat(sequences).tolist()}
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in (head | record).items()]  # one line a key
    (GOLDEN / name / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for path in (GOLDEN / name).rglob("*.safetensors"):
        path.chmod(0o644)


def golden_full(name, seed):
    save_model(name, (FULL | FAMILIES | CLASSIFIERS)[name](), seed)
    save_adapter(name, seed + 1)
    masks = [torch.tensor(m, dtype=torch.uint8) for m in LOSS_MASKS]
    if name in CLASSIFIERS and not name.endswith("_tokens"):
        masks = [(torch.arange(len(m)) == 0).to(torch.uint8) for m in masks]
    sequences = random_ids(load(name).config.get_text_config().vocab_size, [len(m) for m in masks], seed + 2)
    tensors, record, noise = {"loss_mask": torch.cat(masks)}, {}, {}
    for kind in ("base", "adapter"):
        model = load(name, adapter=kind == "adapter")
        logits, loss, grads = measure(model, sequences, masks)
        again = measure(load(name, kind == "adapter", OTHER.get(name, "sdpa")), sequences, masks, padded=True)
        noise |= {f"{kind}_logits": difference(logits, again[0]), f"{kind}_loss": abs(loss - again[1]),
                  f"{kind}_grad": difference(grads, again[2])}
        assert all(g.abs().max() > 0 for g in grads.values()), "a gradient is zero"
        assert noise[f"{kind}_logits"] < 1e-4 and noise[f"{kind}_grad"] < 1e-4, noise
        record[f"{kind}_loss"] = loss
        tensors |= {f"{kind}.logits.{i}": l for i, l in enumerate(logits)}
        tensors |= {f"{kind}.grad.{n}": g for n, g in grads.items()}
    steps, after, final = train(model, sequences, masks)
    again = train(load(name, True, OTHER.get(name, "sdpa")), sequences, masks, padded=True)
    noise |= {"step_loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, again[0])), "loss_after": abs(after - again[1]),
              "step_grad_norm": max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(steps, again[0])),
              "adapter_final": difference(final, again[2])}
    assert steps[0]["loss"] == record["adapter_loss"]
    tensors |= {f"adapter.final.{n}": p for n, p in final.items()}
    record |= {"loss_mask": torch.cat(masks).tolist(), "loss_tokens": int(torch.cat(masks).sum()),
               "optimizer": {"type": "AdamW", **OPTIMIZER, "max_grad_norm": MAX_GRAD_NORM, "schedule": "constant"},
               "steps": steps, "loss_after": after, "noise": noise}
    if name in CLASSIFIERS:
        record["labels"] = TOKEN_LABELS if name.endswith("_tokens") else LABELS
        for key, by_model in (("values", VALUES), ("class_weights", CLASS_WEIGHTS)):
            if name in by_model:
                record[key] = by_model[name]
    if name in FAMILIES:
        record["greedy"] = greedy(load(name, adapter=True), sequences[0])
    write(name, tensors, record, sequences)
    losses = f"base {record['base_loss']:.6f} adapter {record['adapter_loss']:.6f} after {after:.6f}"
    return f"{losses} noise {max(noise.values()):.1e}"


def greedy(model, ids):
    """The ten likeliest tokens after `ids`, each recomputed from the whole sequence."""
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
    return ids[-10:].tolist()


def golden_logits(name, seed):
    make, lengths = LOGITS_ONLY[name]
    save_model(name, make(), seed)
    model = load(name)
    sequences = random_ids(model.config.vocab_size, lengths, seed + 2)
    with torch.no_grad():
        logits = [model(input_ids=s[None]).logits[0] for s in sequences]
        other = load(name, attention="sdpa")
        noise = difference(logits, [other(input_ids=s[None]).logits[0] for s in sequences])
    assert noise < 1e-4, noise
    write(name, {f"base.logits.{i}": l for i, l in enumerate(logits)}, {"noise": {"base_logits": noise}}, sequences)
    return f"noise {noise:.1e}"


def main():
    os.chdir(ROOT)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    later = ["longrope", *OTHER_MODULES, "neox_serial"]
    known = [name for name in [*FULL, *LOGITS_ONLY, *FAMILIES] if name not in [*later, *LATER]]
    # The place in a list: naming one model does not change it.
    seeds = {name: 100 * i for i, name in enumerate(known)} | {name: 8000 + 100 * i for i, name in enumerate([*later, *LATER])}
    seeds |= {name: 10000 + 100 * i for i, name in enumerate(CLASSIFIERS) if name not in ADDED_HEADS}
    seeds |= {name: 11000 + 100 * i for i, name in enumerate(ADDED_HEADS)}
    seeds["qwen2_tokens"] = 20000  # ten steps from the other seeds amplify rounding beyond 1e-4
    unknown = set(sys.argv[1:]) - set(seeds)
    if unknown:
        sys.exit(f"no such model: {', '.join(sorted(unknown))} (known: {', '.join(seeds)})")
    for name, seed in seeds.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(name, golden_logits(name, seed) if name in LOGITS_ONLY else golden_full(name, seed), flush=True)


if __name__ == "__main__":
    main()

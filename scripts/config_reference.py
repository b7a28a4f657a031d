"""How transformers reads config.json: the class defaults that the program embeds, and the golden file of its tests.

    python scripts/config_reference.py     # writes src/model/class_defaults.json and tests/golden/config_variants.json

Needs torch and transformers (the golden file names the versions). class_defaults.json: for each model type the declared
default of every key that the program reads (null: derived from other keys); `rope_theta` is the class's `default_theta`.
config_variants.json: configurations and the figures of the model that transformers builds from each, or the error. A variant
under "refused" is one that transformers accepts, ignoring a key or with a warning; the program refuses it.
"""

import copy
import dataclasses
import json
import re
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Ministral3Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROOT = Path(__file__).resolve().parent.parent
MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text", "phi3",
               "gpt_neox", "stablelm", "starcoder2", "ministral3", "gpt2", "cohere", "cohere2", "glm", "glm4", "exaone4", "ernie4_5", "seed_oss",
               "helium", "qwen3_moe", "olmoe", "mixtral", "hunyuan_v1_dense", "phi"]
ENCODERS = ["bert", "roberta", "xlm-roberta", "electra", "distilbert"]
READ = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings attention_bias mlp_bias sliding_window
use_sliding_window max_window_layers layer_types attention_dropout no_rope_layers no_rope_layer_interval
embedding_multiplier residual_multiplier attention_multiplier logits_scaling hidden_activation query_pre_attn_scalar attn_logit_softcapping
final_logit_softcapping original_max_position_embeddings resid_pdrop embd_pdrop hidden_dropout residual_dropout embedding_dropout layer_norm_eps norm_epsilon use_parallel_residual use_bias
use_qkv_bias n_embd n_inner n_layer n_head n_positions activation_function layer_norm_epsilon attn_pdrop scale_attn_weights
scale_attn_by_inverse_layer_idx logit_scale attention_out_bias sliding_window_pattern num_experts num_local_experts num_experts_per_tok
moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers router_jitter_noise output_router_logits""".split()
READ_OF_ENCODERS = READ + """layer_norm_eps type_vocab_size hidden_dropout_prob attention_probs_dropout_prob classifier_dropout is_decoder add_cross_attention
embedding_size pad_token_id dim hidden_dim n_layers n_heads activation dropout seq_classif_dropout""".split()

# Declared, but read by no layer.
UNREAD = {"gemma3_text": ["attn_logit_softcapping"]}
# Keyword arguments that are no fields, with their defaults; DistilBERT's class has its eps in the code.
KEYWORDS = {"qwen3_moe": {"num_local_experts": None}, "olmoe": {"num_local_experts": None}, "mixtral": {"num_experts": None},
            "cohere2": {"sliding_window_pattern": 4}, "glm": {"partial_rotary_factor": 0.5}, "glm4": {"partial_rotary_factor": 0.5},
            "gemma3_text": {"sliding_window_pattern": 6, "rope_local_base_freq": 10000.0}, "phi3": {"partial_rotary_factor": 1.0},
            "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000.0}, "stablelm": {"partial_rotary_factor": 0.25}, "phi": {"partial_rotary_factor": 0.5},
            "distilbert": {"layer_norm_eps": 1e-12},
            "ministral3": {"rope_parameters": {k: v for k, v in Ministral3Config().rope_parameters.items() if k != "max_position_embeddings"}}}

TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = dict(type="longrope", short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.0, 2.0, 4.0, 8.0])
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)

SIZES_OF_270M = dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
                     head_dim=256, vocab_size=262144, sliding_window=512, max_position_embeddings=32768)


def tiny(model_type="llama", drop=(), **keys):
    config = {"model_type": model_type, **TINY, **keys}
    return {k: v for k, v in config.items() if k not in drop}


def gpt2(**keys):
    return {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **keys}


# Obeyed, or an error in transformers too.
VARIANTS = {
    "plain": tiny(),
    "both spellings of theta: the table's holds": tiny(rope_theta=5e5, rope_parameters=dict(rope_type="default", rope_theta=2e4)),
    "theta in the table alone": tiny(rope_parameters=dict(rope_type="default", rope_theta=2e4)),
    "theta at the top alone": tiny(rope_theta=5e5),
    "a table without theta, theta at the top": tiny(rope_theta=5e5, rope_parameters=dict(rope_type="linear", factor=2.0)),
    "a table without theta, none at the top": tiny(rope_parameters=dict(rope_type="linear", factor=2.0)),
    "theta in an old table, another at the top": tiny(rope_theta=5e5, rope_scaling=dict(type="linear", factor=2.0, rope_theta=3e4)),
    "both tables: rope_scaling holds": tiny(rope_scaling=dict(type="linear", factor=2.0),
                                            rope_parameters=dict(rope_type="linear", factor=8.0, rope_theta=2e4)),
    "an empty rope_scaling is none": tiny(rope_scaling={}, rope_theta=3e4),
    "rope_scaling null": tiny(rope_scaling=None, rope_theta=3e4),
    "rope_parameters null": tiny(rope_parameters=None, rope_theta=3e4),
    "rope_scaling no object": tiny(rope_scaling="linear"),
    "rope_scaling a number": tiny(rope_scaling=4.0),
    "rope_scaling a list": tiny(rope_scaling=[1.0]),
    "rope_parameters no object": tiny(rope_parameters="yarn"),
    "rope kind unknown": tiny(rope_scaling=dict(rope_type="magic", factor=2.0)),
    "rope_type beats type": tiny(rope_scaling=dict(rope_type="linear", type="dynamic", factor=2.0)),
    "linear without factor": tiny(rope_scaling=dict(type="linear")),
    "llama3, original absent": tiny(rope_scaling=LLAMA3),
    "llama3, original in the table": tiny(rope_scaling=dict(LLAMA3, original_max_position_embeddings=64)),
    "llama3, original at the top": tiny(rope_scaling=LLAMA3, original_max_position_embeddings=16),
    "llama3, original at both": tiny(rope_scaling=dict(LLAMA3, original_max_position_embeddings=64), original_max_position_embeddings=16),
    "dynamic": tiny(rope_scaling=dict(type="dynamic", factor=2.0)),
    "dynamic, original in the table": tiny(rope_scaling=dict(type="dynamic", factor=2.0, original_max_position_embeddings=32)),
    "yarn": tiny(rope_scaling=YARN),
    "yarn, factors of zero": tiny(rope_scaling=dict(YARN, beta_fast=0, beta_slow=0, mscale=0.0, mscale_all_dim=1.0)),
    "yarn, mscale": tiny(rope_scaling=dict(YARN, mscale=0.7, mscale_all_dim=1.3)),
    "yarn, attention_factor": tiny(rope_scaling=dict(YARN, attention_factor=1.5)),
    "yarn, not truncated": tiny(rope_scaling=dict(YARN, truncate=False, beta_fast=16.0, beta_slow=2.0)),
    "yarn, factor null": tiny(rope_scaling=dict(YARN, factor=None)),
    "yarn, factor below one": tiny(rope_scaling=dict(YARN, factor=0.5)),
    "head_dim": tiny(head_dim=16),
    "head_dim null": tiny(head_dim=None),
    "key/value heads null": tiny(num_key_value_heads=None),
    "key/value heads absent": tiny(drop=["num_key_value_heads"]),
    "eps absent": tiny(drop=["rms_norm_eps"]),
    "eps null": tiny(rms_norm_eps=None),
    "sizes absent": {"model_type": "llama", "num_hidden_layers": 2},
    "vocabulary absent": tiny(drop=["vocab_size"]),
    "vocabulary null": tiny(vocab_size=None),
    "vocabulary a text": tiny(vocab_size="64"),
    "vocabulary a fraction": tiny(vocab_size=64.5),
    "layers true": tiny(num_hidden_layers=True),
    "positions absent": tiny(drop=["max_position_embeddings"], rope_scaling=LLAMA3),
    "tied": tiny(tie_word_embeddings=True),
    "tied null": tiny(tie_word_embeddings=None),
    "biases": tiny(attention_bias=True, mlp_bias=True),
    "activation swish": tiny(hidden_act="swish"),
    "activation null": tiny(hidden_act=None),
    "model_type absent": tiny(drop=["model_type"], architectures=["LlamaForCausalLM"]),
    "model_type null": tiny(model_type=None),
    "model_type unknown": tiny(model_type="llama9"),
    "bf16 by its old name": tiny(torch_dtype="bfloat16"),
    "bf16 by its new name": tiny(dtype="bfloat16"),
    "both dtypes: the new one holds": tiny(dtype="float32", torch_dtype="bfloat16"),
    "dtype unknown": tiny(dtype="int3"),
    "mistral": tiny("mistral"),
    "mistral, window null": tiny("mistral", sliding_window=None),
    "mistral, window 16": tiny("mistral", sliding_window=16),
    "mistral, heads and key/value heads absent": tiny("mistral", hidden_size=128, drop=["num_attention_heads", "num_key_value_heads"]),
    "mistral, attention_bias is none of its keys": tiny("mistral", attention_bias=False),
    "mistral, attention_bias": tiny("mistral", attention_bias=True),
    "qwen2, mlp_bias": tiny("qwen2", mlp_bias=True),
    "qwen2": tiny("qwen2", attention_bias=False),
    "qwen2, window not used": tiny("qwen2", sliding_window=16, use_sliding_window=False, max_window_layers=1),
    "qwen2, window used": tiny("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1),
    "qwen2, window used, size absent": tiny("qwen2", use_sliding_window=True, max_window_layers=2),
    "qwen2, layers of the window absent": tiny("qwen2", sliding_window=16, use_sliding_window=True),
    "qwen2, layer_types": tiny("qwen2", sliding_window=16, use_sliding_window=True,
                               layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "qwen2, layer_types, window not used": tiny("qwen2", sliding_window=16, layer_types=["full_attention"] * 3),
    "qwen2, too few layer_types": tiny("qwen2", layer_types=["full_attention"] * 2),
    "qwen3": tiny("qwen3"),
    "qwen3, head_dim 16, biases": tiny("qwen3", head_dim=16, attention_bias=True),
    "qwen3, everything absent": {"model_type": "qwen3", "num_hidden_layers": 2},
    "qwen3, window used": tiny("qwen3", sliding_window=16, use_sliding_window=True, max_window_layers=1, head_dim=8),
    "qwen3, theta in the table": tiny("qwen3", head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "smollm3": tiny("smollm3", pad_token_id=0, num_hidden_layers=5),
    "smollm3, no_rope_layers": tiny("smollm3", pad_token_id=0, no_rope_layers=[0, 1, 1]),
    "smollm3, interval 2, window": tiny("smollm3", pad_token_id=0, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=16),
    "smollm3, too few no_rope_layers": tiny("smollm3", pad_token_id=0, no_rope_layers=[0, 1]),
    "granite": tiny("granite", attention_multiplier=0.2, embedding_multiplier=6.0, residual_multiplier=0.3, logits_scaling=4.0),
    "granite, multipliers absent": tiny("granite"),
    "olmo2": tiny("olmo2", drop=["num_key_value_heads"]),
    "olmo3": tiny("olmo3", num_hidden_layers=4),
    "olmo3, yarn by its old keys": tiny("olmo3", rope_theta=5e5, rope_scaling=YARN),
    "olmo3, type alone is not read": tiny("olmo3", rope_scaling=dict(type="linear", factor=2.0)),
    "olmo3, by layer type": tiny("olmo3", layer_types=["full_attention", "sliding_attention", "full_attention"], rope_parameters={
        "full_attention": dict(YARN, rope_theta=1e6), "sliding_attention": dict(rope_type="default", rope_theta=2e4)}),
    "gemma": tiny("gemma"),
    "gemma, gelu means tanh": tiny("gemma", hidden_act="gelu"),
    "gemma, everything absent": {"model_type": "gemma", "num_hidden_layers": 2},
    "gemma2": tiny("gemma2"),
    "gemma2, everything absent": {"model_type": "gemma2", "num_hidden_layers": 3},
    "gemma2, its keys": tiny("gemma2", head_dim=16, query_pre_attn_scalar=144, sliding_window=8, hidden_act="gelu",
                             attn_logit_softcapping=20.0, final_logit_softcapping=10.0),
    "gemma2, no caps": tiny("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3, final_logit_softcapping": tiny("gemma3_text", final_logit_softcapping=30.0),
    "gemma3": tiny("gemma3_text", num_hidden_layers=7),
    "gemma3, the sizes of 270M": {**SIZES_OF_270M, "model_type": "gemma3_text"},
    "gemma3, everything absent": {"model_type": "gemma3_text", "num_hidden_layers": 2},
    "gemma3, by its old keys": tiny("gemma3_text", num_hidden_layers=4, head_dim=16, sliding_window=8, sliding_window_pattern=2,
                                    query_pre_attn_scalar=9, rope_theta=5e5, rope_local_base_freq=2e4,
                                    rope_scaling=dict(rope_type="linear", factor=8.0)),
    "gemma3, by layer type": tiny("gemma3_text", layer_types=["full_attention", "sliding_attention", "full_attention"], rope_parameters={
        "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6), "sliding_attention": dict(rope_type="default", rope_theta=2e4)}),
    "gemma3, a window of null": tiny("gemma3_text", sliding_window=None),
    "gpt_neox": tiny("gpt_neox"),
    "gpt_neox, everything absent": {"model_type": "gpt_neox", "num_hidden_layers": 2},
    "gpt_neox, its keys": tiny("gpt_neox", layer_norm_eps=1e-3, rotary_pct=0.5, rotary_emb_base=5e5, tie_word_embeddings=True),
    "gpt_neox, no biases of attention": tiny("gpt_neox", attention_bias=False, use_parallel_residual=False),
    "gpt_neox, the table holds": tiny("gpt_neox", rotary_pct=0.5, rope_parameters=dict(rope_type="default", partial_rotary_factor=1.0, rope_theta=2e4)),
    "stablelm": tiny("stablelm"),
    "stablelm, everything absent": {"model_type": "stablelm", "num_hidden_layers": 2},
    "stablelm, parallel, biases": tiny("stablelm", use_parallel_residual=True, use_qkv_bias=True, partial_rotary_factor=0.5),
    "starcoder2": tiny("starcoder2", sliding_window=16),
    "starcoder2, everything absent": {"model_type": "starcoder2", "num_hidden_layers": 2},
    "starcoder2, no biases": tiny("starcoder2", use_bias=False, norm_epsilon=1e-3, tie_word_embeddings=False),
    "phi3": tiny("phi3", pad_token_id=0),
    "phi3, everything absent": {"model_type": "phi3", "num_hidden_layers": 2},
    "phi3, window": tiny("phi3", pad_token_id=0, sliding_window=16),
    "phi3, a part of a head": tiny("phi3", pad_token_id=0, partial_rotary_factor=0.75),
    "phi3, the table's part holds": tiny("phi3", pad_token_id=0, partial_rotary_factor=0.75,
                                         rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25)),
    "phi3, longrope": tiny("phi3", pad_token_id=0, original_max_position_embeddings=32, rope_scaling=LONGROPE),
    "phi3, su": tiny("phi3", pad_token_id=0, original_max_position_embeddings=32, rope_scaling=dict(
        LONGROPE, type="su", original_max_position_embeddings=32)),
    "phi3, longrope, original absent": tiny("phi3", pad_token_id=0, rope_scaling=LONGROPE),
    "phi3, longrope, factor": tiny("phi3", pad_token_id=0, original_max_position_embeddings=32, rope_scaling=dict(LONGROPE, factor=2.0)),
    "phi3, longrope, attention_factor": tiny("phi3", pad_token_id=0, original_max_position_embeddings=32,
                                             rope_scaling=dict(LONGROPE, attention_factor=1.25)),
    "phi3, a list too short": tiny("phi3", pad_token_id=0, original_max_position_embeddings=32, partial_rotary_factor=0.5, rope_scaling=LONGROPE),
    "phi3, linear": tiny("phi3", pad_token_id=0, rope_scaling=dict(type="linear", factor=2.0)),
    "llama, longrope": tiny(rope_parameters=dict(LONGROPE, rope_type="longrope", original_max_position_embeddings=32)),
    "ministral3": tiny("ministral3", head_dim=16, tie_word_embeddings=True, rope_parameters=dict(
        YARN, rope_theta=1e6, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)),
    "ministral3, everything absent": {"model_type": "ministral3", "num_hidden_layers": 2},
    "gpt2": gpt2(),
    "gpt2, everything absent": {"model_type": "gpt2"},
    "gpt2, its keys": gpt2(n_inner=48, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, activation_function="relu", layer_norm_epsilon=1e-3),
    "cohere": tiny("cohere"),
    "cohere, everything absent": {"model_type": "cohere", "num_hidden_layers": 2},
    "cohere2": tiny("cohere2", num_hidden_layers=5),
    "cohere2, its keys": tiny("cohere2", sliding_window=8, sliding_window_pattern=2, logit_scale=0.25, attention_bias=True, layer_norm_eps=1e-3),
    "glm": tiny("glm", pad_token_id=0),
    "glm, whole heads rotate": tiny("glm", pad_token_id=0, head_dim=16, attention_bias=False, partial_rotary_factor=1.0),
    "glm4": tiny("glm4", pad_token_id=0),
    "glm4, everything absent": {"model_type": "glm4", "num_hidden_layers": 2},
    "exaone4": tiny("exaone4", num_hidden_layers=5),
    "exaone4, no windows": tiny("exaone4", sliding_window=None, layer_types=["full_attention"] * 3, tie_word_embeddings=True),
    "exaone4, pattern 2": tiny("exaone4", sliding_window=8, sliding_window_pattern=2),
    "ernie4_5": tiny("ernie4_5"),
    "ernie4_5, biases": tiny("ernie4_5", use_bias=True, head_dim=None),
    "seed_oss": tiny("seed_oss"),
    "seed_oss, biases": tiny("seed_oss", head_dim=8, attention_out_bias=True, mlp_bias=True, attention_bias=False),
    "helium": tiny("helium", head_dim=8),
    "helium, biases": tiny("helium", head_dim=8, attention_bias=True, mlp_bias=True),
    "qwen3_moe": tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16),
    "qwen3_moe, everything absent": {"model_type": "qwen3_moe", "num_hidden_layers": 2},
    "qwen3_moe, dense blocks": tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, mlp_only_layers=[1]),
    "qwen3_moe, windows": tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, use_sliding_window=True, sliding_window=8),
    "qwen3_moe, as transformers 5 writes it": tiny("qwen3_moe", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": tiny("olmoe", num_experts=4, num_experts_per_tok=2),
    "mixtral": tiny("mixtral", num_local_experts=4),
    "mixtral, window": tiny("mixtral", num_local_experts=4, sliding_window=8, head_dim=16),
    "qwen3, yarn": tiny("qwen3", head_dim=16, rope_theta=1e6, rope_scaling=YARN),
}
# Accepted by transformers, which ignores the key, warns, or computes with a number that no model was trained with.
REFUSED = {
    "linear, factor negative": tiny(rope_scaling=dict(type="linear", factor=-2.0)),
    "linear, factor zero": tiny(rope_scaling=dict(type="linear", factor=0.0)),
    "llama3, factor negative": tiny(rope_scaling=dict(LLAMA3, factor=-8.0)),
    "llama3, ranges reversed": tiny(rope_scaling=dict(LLAMA3, low_freq_factor=4.0, high_freq_factor=1.0)),
    "yarn, beta_fast negative": tiny(rope_scaling=dict(YARN, beta_fast=-1.0)),
    "yarn, attention_factor negative": tiny(rope_scaling=dict(YARN, attention_factor=-1.0)),
    "theta negative": tiny(rope_theta=-1e4),
    "theta zero": tiny(rope_theta=0.0),
    "eps negative": tiny(rms_norm_eps=-1e-5),
    "initializer_range negative": tiny(initializer_range=-0.02),
    "partial_rotary_factor": tiny(partial_rotary_factor=0.5),
    "partial_rotary_factor in the table": tiny(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)),
    "qwen3, partial_rotary_factor": tiny("qwen3", partial_rotary_factor=0.25),
    "llama, sliding_window": tiny(sliding_window=16),
    "llama, layer_types": tiny(layer_types=["sliding_attention"] * 3),
    "llama, no_rope_layers": tiny(no_rope_layers=[1, 0, 1]),
    "llama, attn_logit_softcapping": tiny(attn_logit_softcapping=50.0),
    "llama, embedding_multiplier": tiny(embedding_multiplier=12.0),
    "llama, num_experts": tiny(num_experts=8),
    "mistral, layer_types": tiny("mistral", sliding_window=16, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "qwen2, unknown layer_types": tiny("qwen2", layer_types=["linear_attention"] * 3),
    "stablelm, norms of q and k": tiny("stablelm", qk_layernorm=True),
    "cohere, norms of q and k": tiny("cohere", use_qk_norm=True),
    "mixtral, auxiliary loss": tiny("mixtral", num_local_experts=4, output_router_logits=True),
    "mixtral, more experts a token than there are": tiny("mixtral", num_local_experts=4, num_experts_per_tok=5),
    "olmoe, clip_qkv": tiny("olmoe", clip_qkv=8.0),
    "quantised": tiny(quantization_config={"quant_method": "gptq", "bits": 4}),
    "gemma3, bidirectional": tiny("gemma3_text", use_bidirectional_attention=True),
    "gemma3, attn_logit_softcapping is not read": tiny("gemma3_text", attn_logit_softcapping=50.0),
    "an activation that nothing implements": tiny(hidden_act="quick_gelu"),
}


def figures(config):
    """What transformers builds: sizes, tensors of the first block and around, rotary frequencies, windows."""
    kind = config["model_type"]
    if kind == "mistral" and "layer_types" in config:  # AutoConfig.from_pretrained does this
        kind = "ministral"
    parsed = CONFIG_MAPPING[kind].from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed)
    model.tie_weights()
    inner = model.base_model
    block = first_of(inner, "layers", "h")[0]
    attention = first_of(block, "self_attn", "attention", "attn")
    norm = first_of(inner, "norm", "final_layer_norm", "ln_f")
    types = getattr(parsed, "layer_types", None) or ["sliding_attention"] * parsed.num_hidden_layers
    window = getattr(parsed, "sliding_window", None) if getattr(parsed, "use_sliding_window", True) else None
    rotated = getattr(parsed, "no_rope_layers", None) or [1] * parsed.num_hidden_layers
    if kind == "cohere2" or kind == "exaone4" and window:
        rotated = [t == "sliding_attention" for t in types]
    outer = {n: list(p.shape) for n, p in model.named_parameters() if not re.search(r"\.(layers|h)\.[1-9]", n)}
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "tensors": outer, "tied": "lm_head.weight" not in outer,
        "layers": parsed.num_hidden_layers, "heads": parsed.num_attention_heads, "head_dim": first_of(attention, "head_dim", "head_size"),
        "eps": getattr(norm, "variance_epsilon", None) or norm.eps, "scaling": attention.scaling,
        "max_position_embeddings": parsed.max_position_embeddings, "initializer_range": parsed.initializer_range,
        "windows": [window if t == "sliding_attention" else None for t in types], "bf16": parsed.dtype == torch.bfloat16,
        "ropes": [rope(parsed, kind) if used and hasattr(inner, "rotary_emb") else None for kind, used in zip(types, rotated)],
        "softcaps": [block.self_attn.attn_logit_softcapping if kind == "gemma2" else None,
                     getattr(parsed, "final_logit_softcapping", None)],
        "factors": [embedding_factor(parsed), getattr(parsed, "residual_multiplier", 1.0),
                    getattr(parsed, "logits_scaling", 1.0 / getattr(parsed, "logit_scale", 1.0))],
    }


def first_of(module, *names):
    return next(getattr(module, name) for name in names if hasattr(module, name))


def embedding_factor(parsed):
    return parsed.hidden_size ** 0.5 if parsed.model_type.startswith("gemma") else getattr(parsed, "embedding_multiplier", 1.0)


def rope(parsed, layer_type):
    """The rotary frequencies of a layer type, and the factor on cos and sin."""
    with torch.device("meta"):
        rotary = AutoModelForCausalLM.from_config(parsed).base_model.rotary_emb
    rotary = type(rotary)(parsed)
    if hasattr(rotary, "inv_freq"):
        return [rotary.attention_scaling, *rotary.inv_freq.tolist()]
    return [getattr(rotary, f"{layer_type}_attention_scaling"), *getattr(rotary, f"{layer_type}_inv_freq").tolist()]


def read(config):
    try:
        return {"read": figures(copy.deepcopy(config))}
    except Exception as error:  # any refusal counts, whatever its type
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def defaults(model_type):
    config = CONFIG_MAPPING[model_type]
    declared = {f.name: f.default for f in dataclasses.fields(config)}
    known = [k for k in (READ_OF_ENCODERS if model_type in ENCODERS else READ) if k in declared and k not in UNREAD.get(model_type, ())]
    read = {k: declared[k] for k in known}
    if "rope_parameters" in declared:
        theta = config.default_theta
        read["rope_theta"] = theta["global"] if isinstance(theta, dict) else theta
    return read | KEYWORDS.get(model_type, {})


def write(path, rows):
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()]
    (ROOT / path).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    write("src/model/class_defaults.json", {t: defaults(t) for t in MODEL_TYPES + ENCODERS})
    rows = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}}
    rows |= {name: {"config": config, **read(config)} for name, config in VARIANTS.items()}
    rows |= {name: {"config": config, "refused": True} for name, config in REFUSED.items()}
    write("tests/golden/config_variants.json", rows)


main()

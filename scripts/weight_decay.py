#!/usr/bin/env python3
"""Which parameters transformers' Trainer decays, for src/ops/tests/adamw.rs: $PY scripts/weight_decay.py

Writes tests/golden/weight_decay.json, from random weights and without a download:
  names   [name, dimensions, whether it is decayed] of the trained parameters of one layer of several models, and of adapters on
          one of them, by Trainer.get_decay_parameter_names, under their names in files;
  steps   values, gradients and the values after each of three steps of torch.optim.AdamW with the Trainer's two groups.
Made with peft 0.21.2, transformers 5.24.0, torch 2.15.0.
"""

import json
import pathlib

import torch
import transformers as t
from peft import LoraConfig, get_peft_model

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "weight_decay.json"
SMALL = dict(hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=8)
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
    "llama with biases": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, head_dim=2)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SMALL, head_dim=2)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SMALL)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SMALL)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=4, n_layer=1, n_head=2, vocab_size=8, n_positions=8)),
}
ADAPTERS = {
    "lora": dict(target_modules="all-linear"),
    "dora": dict(target_modules=["q_proj"], use_dora=True),
    "biases": dict(target_modules=["q_proj"], bias="all"),
    "modules in full": dict(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "input_layernorm"]),
}


def decayed(model: torch.nn.Module) -> set[str]:
    return set(t.Trainer.get_decay_parameter_names(None, model))


def names(model: torch.nn.Module) -> list:
    chosen = decayed(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def in_file(name: str) -> str:
        short = name.replace(".default", "").replace("modules_to_save.", "")
        return short.removesuffix(".weight") if "magnitude" in short else short

    return [[in_file(name), list(p.shape), name in chosen] for name, p in trained]


def adapted(settings: dict) -> torch.nn.Module:
    return get_peft_model(MODELS["llama with biases"](), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))


def steps() -> dict:
    torch.manual_seed(0)
    model = MODELS["qwen3"]()
    wanted = ["model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight"]
    wanted += ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
    parameters = dict(model.named_parameters())
    chosen = decayed(model)
    with torch.no_grad():
        for name in wanted:
            parameters[name].normal_()
    start = {name: parameters[name].flatten().tolist() for name in wanted}
    groups = [
        {"params": [parameters[n] for n in wanted if n in chosen], "weight_decay": 0.3},
        {"params": [parameters[n] for n in wanted if n not in chosen], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99), eps=1e-6)
    gradients, after = [], []
    for _ in range(3):
        for name in wanted:
            parameters[name].grad = torch.randn_like(parameters[name])
        gradients.append([x for name in wanted for x in parameters[name].grad.flatten().tolist()])
        torch.nn.utils.clip_grad_norm_([parameters[name] for name in wanted], 1.0)
        optimizer.step()
        after.append([x for name in wanted for x in parameters[name].flatten().tolist()])
    shapes = {name: list(parameters[name].shape) for name in wanted}
    tensors = [[name, shapes[name], start[name]] for name in wanted]
    return {"tensors": tensors, "gradients": gradients, "after": after}


def main() -> None:
    torch.set_num_threads(1)
    golden = {"names": {kind: names(build()) for kind, build in MODELS.items()}}
    golden["names"] |= {f"adapter: {kind}": names(adapted(settings)) for kind, settings in ADAPTERS.items()}
    golden["steps"] = steps()
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()

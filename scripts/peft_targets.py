#!/usr/bin/env python3
"""PEFT's own answers, for tests/adapter: $PY scripts/peft_targets.py

Writes, from random weights and without a download:
  tests/golden/peft_targets.json         which modules LoRA lands on, with which rank and scaling, for many settings;
  tests/golden/peft_adapter_config.json  the adapter_config.json of a plain LoRA, byte for byte but for the order of
                                         target_modules (a Python set there; sorted here);
  tests/golden/peft_merge.json           a tiny weight, its A and B, and merge_and_unload's result.
Made with peft 0.21.2, transformers 5.23.0, torch 2.15.0.
"""

import json
import pathlib
import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden"
warnings.filterwarnings("ignore")


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, vocab_size=32
        )
    )


def nested() -> torch.nn.Module:
    """Numbers at several depths, as in a mixture of experts, and a list that is not called `layers`."""
    linear = lambda: torch.nn.Linear(4, 4)
    expert = lambda: torch.nn.ModuleDict({"w1": linear(), "w2": linear()})
    layer = lambda: torch.nn.ModuleDict({"experts": torch.nn.ModuleList([expert(), expert()]), "proj": linear()})
    return torch.nn.ModuleDict(
        {
            "tower": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer(), layer(), layer()])}),
            "h": torch.nn.ModuleList([torch.nn.ModuleDict({"proj": linear(), "big_proj": linear()}) for _ in range(2)]),
        }
    )


ATTENTION = ["q_proj", "v_proj"]
# (name, model, settings of LoraConfig)
CASES = [
    ("names", "llama", dict(target_modules=ATTENTION)),
    ("a name is no substring", "nested", dict(target_modules=["proj"])),
    ("a name that matches nothing, beside one that does", "llama", dict(target_modules=["proj", "up_proj"])),
    ("dotted suffix", "llama", dict(target_modules=["self_attn.q_proj", "mlp.down_proj"])),
    ("suffix with a layer number", "llama", dict(target_modules=["1.self_attn.q_proj"])),
    ("full path", "llama", dict(target_modules=["model.layers.11.mlp.up_proj"])),
    ("output embedding by name", "llama", dict(target_modules=["lm_head"])),
    ("all-linear", "llama", dict(target_modules="all-linear")),
    ("All-Linear in capitals", "llama", dict(target_modules="All-Linear")),
    ("all-linear, few excluded", "llama", dict(target_modules="all-linear", exclude_modules=["gate_proj", "k_proj"])),
    ("all-linear, excluded by regex", "llama", dict(target_modules="all-linear", exclude_modules=r".*layers\.(?:[2-9]|10)\..*")),
    ("regex", "llama", dict(target_modules=r".*\.(q|v)_proj")),
    ("regex must match all", "llama", dict(target_modules=r"model\.layers\.1")),
    ("regex with lookahead", "llama", dict(target_modules=r"model\.layers\.(?!0\.)\d\.self_attn\.[qo]_proj")),
    ("regex, first alternative too short", "llama", dict(target_modules=r".*\.(up|up_proj)")),
    ("regex without anchors of its own", "llama", dict(target_modules=r".*q_proj|.*o_proj")),
    ("exclude wins", "llama", dict(target_modules=ATTENTION, exclude_modules=["v_proj"])),
    ("exclude one path", "llama", dict(target_modules=ATTENTION, exclude_modules=["model.layers.1.self_attn.q_proj"])),
    ("everything excluded", "llama", dict(target_modules=["q_proj"], exclude_modules=["q_proj"])),
    ("layers", "llama", dict(target_modules=ATTENTION, layers_to_transform=[1, 11])),
    ("one layer as a number", "llama", dict(target_modules=ATTENTION, layers_to_transform=1)),
    ("no layers means all", "llama", dict(target_modules=ATTENTION, layers_to_transform=[])),
    ("full path passes the layer filter", "llama", dict(target_modules=["q_proj", "model.layers.5.mlp.up_proj"], layers_to_transform=[0])),
    ("layers drop what has no number", "llama", dict(target_modules=["lm_head", "q_proj"], layers_to_transform=[0])),
    ("layers and their pattern", "llama", dict(target_modules=["q_proj"], layers_to_transform=[2], layers_pattern="layers")),
    ("layers with a regex", "llama", dict(target_modules=r".*q_proj", layers_to_transform=[2])),
    ("layers with all-linear", "llama", dict(target_modules="all-linear", layers_to_transform=[2])),
    ("pattern without layers", "llama", dict(target_modules=["q_proj"], layers_pattern="layers")),
    ("rslora", "llama", dict(target_modules=["o_proj"], r=5, lora_alpha=3, use_rslora=True)),
    ("rank pattern", "llama", dict(target_modules=ATTENTION, rank_pattern={"q_proj": 4})),
    ("rank pattern, first match holds", "llama", dict(target_modules=ATTENTION, rank_pattern={r"layers\.1\..*": 2, "q_proj": 4, "v_proj": 32})),
    ("rank pattern needs a dot before it", "nested", dict(target_modules=["proj", "big_proj"], rank_pattern={"proj": 2})),
    ("rank pattern that matches nothing, beside one that does", "llama", dict(target_modules=["up_proj", "q_proj"], rank_pattern={"proj": 2, "p_proj": 3, "up_proj": 4})),
    ("rank pattern with a caret", "llama", dict(target_modules=["q_proj"], rank_pattern={r"^model.layers.1.self_attn.q_proj": 3})),
    ("rank pattern with alternatives", "llama", dict(target_modules=ATTENTION, rank_pattern={r"1\.self_attn\.q_proj|v_proj": 6})),
    ("alpha pattern", "llama", dict(target_modules=ATTENTION, alpha_pattern={"v_proj": 7, r".*\.2\..*": 1})),
    ("both patterns and rslora", "llama", dict(target_modules=ATTENTION, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 2}, use_rslora=True)),
    ("nested numbers: the first counts", "nested", dict(target_modules=["w1", "proj"], layers_to_transform=[2])),
    ("nested numbers: a list at the root has no parent", "nested", dict(target_modules=["proj", "big_proj"], layers_to_transform=[1])),
    ("nested numbers: pattern at the root", "nested", dict(target_modules=["proj"], layers_to_transform=[1], layers_pattern=["h"])),
    ("nested numbers: two patterns", "nested", dict(target_modules=["proj", "w2"], layers_to_transform=[0, 1], layers_pattern=["h", "experts"])),
    ("all-linear without an output embedding", "nested", dict(target_modules="all-linear")),
]


def targets() -> None:
    models = {"llama": lambda: llama(12), "nested": nested}
    modules = {
        name: [[path, m.out_features, m.in_features] for path, m in build().named_modules() if isinstance(m, torch.nn.Linear)]
        for name, build in models.items()
    }
    lines = []
    for name, model, settings in CASES:
        index = {path: i for i, (path, _, _) in enumerate(modules[model])}
        case = {"name": name, "model": model, "settings": settings}
        try:
            config = LoraConfig(**{"r": 8, "lora_alpha": 16, **settings})
            built = inject_adapter_in_model(config, models[model]())
            layers = [(path, m) for path, m in built.named_modules() if isinstance(m, LoraLayer)]
            # [index into the model's modules, rank, scaling]
            case["sites"] = [[index[path], m.r["default"], m.scaling["default"]] for path, m in layers]
            saved = config.target_modules
            case["saved_targets"] = sorted(saved) if isinstance(saved, set) else saved
        except ValueError as error:
            case["error"] = type(error).__name__
        lines.append(json.dumps(case))
    text = '{"modules": ' + json.dumps(modules) + ',\n"cases": [\n' + ",\n".join(lines) + "\n]}\n"
    (GOLDEN / "peft_targets.json").write_text(text)


def adapter_config() -> None:
    model = get_peft_model(
        llama(2), LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
    config["target_modules"].sort()
    (GOLDEN / "peft_adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def merge() -> None:
    """A round trip through PEFT: B filled with noise, merged by merge_and_unload in each dtype."""
    out = {}
    for dtype in ["float64", "float32", "bfloat16", "float16"]:
        torch.manual_seed(1)
        model = get_peft_model(llama(1), LoraConfig(r=3, lora_alpha=4, target_modules=["k_proj"], use_rslora=True))
        path = "base_model.model.model.layers.0.self_attn.k_proj"
        layer = model.get_submodule(path)
        weight = layer.base_layer.weight.data
        weight.mul_(20)
        layer.lora_B["default"].weight.data.normal_()
        layer.base_layer.to(getattr(torch, dtype))
        if dtype == "float64":
            # Values that float32 does not hold.
            layer.base_layer.weight.data.mul_(1 + 2.0**-40)
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        out[dtype] = {
            "scaling": layer.scaling["default"],
            "w": layer.base_layer.weight.data.double().tolist(),
            "a": a.float().tolist(),
            "b": b.float().tolist(),
            "merged": model.merge_and_unload().get_submodule("model.layers.0.self_attn.k_proj").weight.double().tolist(),
        }
    (GOLDEN / "peft_merge.json").write_text(json.dumps(out))


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    targets()
    adapter_config()
    merge()

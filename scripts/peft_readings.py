#!/usr/bin/env python3
"""How PEFT reads edited adapter files, for tests/adapter/readings.rs: $PY scripts/peft_readings.py

An adapter on q_proj and v_proj of a tiny Llama is saved by PEFT, edited and loaded again. Writes tests/golden/peft_readings.json,
from random weights and without a download: the modules, the saved configuration, the tensors and for each edit
  error    the exception, if PEFT refuses it; else
  sites    [path, r, scaling] of every LoRA layer whose tensors are those of the file;
  dropped  modules with tensors in the file that PEFT puts nowhere;
  missing  LoRA layers that got no tensors;
  plain    whether the logits are those of the base weights plus the sites' scaling * B A;
  warned   whether PEFT warns.
Made with peft 0.21.2, transformers 5.24.0, torch 2.15.0.
"""

import json
import os
import pathlib
import tempfile
import warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft_targets import llama
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "golden" / "peft_readings.json"
IDS = torch.arange(20)[None]
PREFIX = "base_model.model."
Q1, O1 = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
REGEX = {"target_modules": ".*(q|v)_proj"}


def each(key: str, *values) -> list[dict]:
    return [{key: value} for value in values]


def edits(config: dict) -> list[dict]:
    """Changes of the configuration; `...` removes a key."""
    cases = [{}] + [{key: value} for key in config for value in (None, ...)]
    cases += each("target_modules", "q_proj", "q_proj,v_proj", "all-linear", "ALL-LINEAR", ["all-linear"], [], "", "(", 3, ["nope"], ["proj"])
    cases += each("target_modules", ["q_proj"], ["q_proj", "nope"], ["v_proj", "q_proj", "nope"], ["q_proj", "q_proj", "v_proj"])
    cases += each("target_modules", ".*q_proj", ".*(q|v)_proj", ".*layers.0.*q_proj", "(?i).*Q_proj|.*v_proj", r".*\.q_proj$|.*v_proj")
    cases += each("target_modules", ["model.layers.0.self_attn.q_proj"], ["layers.0.self_attn.q_proj", "v_proj"], ["q_proj", "v_proj", "o_proj"])
    cases += each("layers_to_transform", 0, [0], [1], [], [0, 1], [1, 0], [5], [-1], ["0"], "0")
    cases += [{"layers_to_transform": [0, 1], "layers_pattern": p} for p in ("layers", ["layers"], "", [], "h", ["h", "layers"])]
    cases += each("layers_pattern", "layers", [], "")
    cases += [REGEX | {"layers_to_transform": v} for v in ([0], [], None)] + [REGEX | {"layers_pattern": v} for v in ("layers", "", None)]
    cases += each("exclude_modules", "q_proj", ".*q_proj", ["q_proj"], [], "", ["nope"], ["self_attn"], "all-linear", ["model.layers.0.self_attn.q_proj"], 3)
    cases += each("rank_pattern", {"nope": 2}, {"q_proj": 4}, {"q_proj": 8}, {"q_proj": 0}, {"q_proj": 4.0}, {"q_proj": "4"}, {"(": 4}, [])
    cases += [{"r": 2, "rank_pattern": {"q_proj": 4, "1.self_attn.v_proj": 4, ".*v_proj": 4}}]
    cases += each("alpha_pattern", {"nope": 2}, {"q_proj": 16}, {"q_proj": 8.0}, {"q_proj": None}, {"(": 4}, [], {"q_proj": 0})
    cases += [{"alpha_pattern": {"v_proj": 3, r"layers\.0\..*": 5}}, {"alpha_pattern": {r"layers\.0\..*": 5, "v_proj": 3}}]
    cases += each("r", 8, 4.0, "4", 0, -1) + each("lora_alpha", 16, 1.5, "8", 0, -8) + each("lora_dropout", 0.1, 1.0, 1.5, "0.1", 1)
    cases += each("bias", "all", "lora_only", "None", "", False)
    cases += each("use_rslora", True, 0, 1) + each("fan_in_fan_out", True) + each("use_dora", True) + each("lora_bias", True)
    cases += each("init_lora_weights", False, "", "gaussian", "Gaussian", "eva", "EVA", "olora", "pissa", "pissa_niter_4", "PiSSA", "corda")
    cases += each("init_lora_weights", "orthogonal", "mica", "lora_ga", "true", "kaiming", 1)
    cases += each("peft_type", "lora", "VERA", "ADALORA", "nope") + each("task_type", "causal_lm", "")
    cases += each("modules_to_save", [], ["lm_head"], ["q_proj"]) + each("trainable_token_indices", [1], {})
    cases += each("target_parameters", [], "x") + each("alora_invocation_tokens", [1], []) + each("layer_replication", [[0, 2], [1, 2]], [])
    cases += each("megatron_config", {}) + each("megatron_core", "x") + each("qalora_group_size", 3) + each("use_qalora", True)
    cases += each("loftq_config", {"loftq_bits": 4}) + each("eva_config", {"rho": 2.0}) + each("corda_config", {"x": 1})
    cases += each("velora_config", {}) + each("use_bdlora", {}, True) + each("arrow_config", {}) + each("kasa_config", {})
    cases += each("ensure_weight_tying", True) + each("inference_mode", False) + each("peft_version", "99.0")
    cases += [{"unknown_key": 1}, {"lora_aplha": 16}, {"enable_lora": [True]}, {"runtime_config": {"ephemeral_gpu_offload": True}}]
    return cases


def moved(tensors: dict, kind: str) -> dict:
    """Changes of the tensors' names."""
    if kind == "one module lost":
        return {name: t for name, t in tensors.items() if Q1 not in name}
    if kind == "one module elsewhere":
        return {name.replace(Q1, O1): t for name, t in tensors.items()}
    if kind == "one module more":
        return tensors | {name.replace(Q1, O1): t.clone() for name, t in tensors.items() if Q1 in name}
    if kind == "prefix lost":
        return {name.removeprefix(PREFIX): t for name, t in tensors.items()}
    if kind == "adapter name kept":
        return {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    return tensors


KINDS = ["one module lost", "one module elsewhere", "one module more", "prefix lost", "adapter name kept"]


def plain_logits(tensors: dict, sites: list) -> torch.Tensor:
    model = llama(2)
    with torch.no_grad():
        for path, _, scaling in sites:
            a, b = (tensors[f"{PREFIX}{path}.lora_{half}.weight"] for half in "AB")
            model.get_submodule(path).weight += scaling * b @ a
        return model(IDS).logits


def reading(folder: pathlib.Path, config: dict, tensors: dict) -> dict:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(llama(2), folder).eval()
            with torch.no_grad():
                logits = model(IDS).logits
        except Exception as error:
            return {"error": type(error).__name__}
    layers = {name.removeprefix(PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    sites, missing = [], []
    for path, layer in layers.items():
        given = tensors.get(f"{PREFIX}{path}.lora_B.weight")
        if given is not None and "default" in layer.lora_B and torch.equal(layer.lora_B["default"].weight, given):
            sites.append([path, layer.r["default"], layer.scaling["default"]])
        else:
            missing.append(path)
    files = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    plain = torch.allclose(logits, plain_logits(tensors, sites), atol=1e-5)
    warned = any("peft" in warning.filename for warning in caught)
    return {"sites": sites, "dropped": sorted(files - {s[0] for s in sites}), "missing": missing, "plain": plain, "warned": warned}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(2), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    modules = [[path, m.out_features, m.in_features] for path, m in llama(2).named_modules() if isinstance(m, torch.nn.Linear)]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"].sort()
        tensors = load_file(folder / "adapter_model.safetensors")
        for edit in edits(config):
            edited = {key: value for key, value in (config | edit).items() if value is not ...}
            removed = [key for key, value in edit.items() if value is ...]
            given = {key: value for key, value in edit.items() if value is not ...}
            cases.append({"set": given, "remove": removed} | reading(folder, edited, tensors))
        for kind in KINDS:
            cases.append({"set": {}, "remove": [], "tensors": kind} | reading(folder, config, moved(tensors, kind)))
    values = {name: [list(t.shape), t.flatten().tolist()] for name, t in sorted(tensors.items())}
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps({"modules": modules, "config": config, "tensors": values})
    GOLDEN.write_text(f'{head[:-1]},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()

"""Golden files of PEFT's initialisations that change the base weights, on the tiny models of scripts/reference.py.

    python scripts/adapter_inits.py     # writes tests/golden/adapter_inits/NAME/

Needs torch, transformers and peft. As scripts/adapter_methods.py: CPU, one thread, float32, the same sequences and optimizer.

  adapter/            the adapter after ten steps, converted to plain LoRA by PEFT (path_initial_model_for_weight_conversion)
  golden.safetensors  initial.PEFT_NAME: the factors before training; grad.PEFT_NAME: d(loss)/d(tensor) there
  golden.json         base (the tiny model), settings (LoraConfig's), segments, input_ids, loss_mask, base_loss, loss (with the
                      initial adapter), steps [{step, lr, loss, grad_norm}], loss_after, converted_loss (the converted adapter
                      on the original base)
"""

import json
import os
import shutil
import sys
import tempfile

import adapter_methods as methods
import peft
import reference as ref
import torch
from pathlib import Path
from safetensors.torch import save_file

GOLDEN = Path("tests/golden/adapter_inits")
CASES = {
    "pissa": ("gqa", dict(target_modules="all-linear", init_lora_weights="pissa", use_rslora=True)),
    "pissa_patterns": ("qwen2", dict(target_modules=["q_proj", "down_proj"], init_lora_weights="pissa",
                                     rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 5})),
    "olora": ("qwen2", dict(target_modules=["k_proj", "o_proj", "gate_proj", "down_proj"], init_lora_weights="olora")),
}


def golden(name, seed):
    base_name, settings = CASES[name]
    base = methods.base_model(ref.GOLDEN / base_name)
    base.name_or_path = (ref.GOLDEN / base_name).as_posix()
    masks = [torch.tensor(m, dtype=torch.uint8) for m in ref.LOSS_MASKS]
    sequences = ref.random_ids(base.config.vocab_size, [len(m) for m in masks], seed + 2)
    with torch.no_grad():
        base_loss = ref.run(base, sequences, masks)[1].item()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings))
    initial = {methods.file_name(n): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    loss, grads = methods.measure(model, sequences, masks)
    folder = GOLDEN / name / "adapter"
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as start:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
        steps, after = methods.train(model, sequences, masks)
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)
    (folder / "README.md").unlink(missing_ok=True)
    ref.tidy_adapter_config(folder, (ref.GOLDEN / base_name).as_posix())
    plain = peft.PeftModel.from_pretrained(methods.base_model(ref.GOLDEN / base_name), folder)
    with torch.no_grad():
        converted = ref.run(plain, sequences, masks)[1].item()
    assert abs(loss - base_loss) < 1e-4 and abs(converted - after) < 1e-4, (loss, base_loss, converted, after)
    tensors = {f"initial.{n}": v for n, v in initial.items()} | {f"grad.{n}": v for n, v in grads.items()}
    save_file({n: v.contiguous() for n, v in tensors.items()}, GOLDEN / name / "golden.safetensors")
    record = {"made_by": "scripts/adapter_inits.py", "versions": ref.versions(), "base": base_name, "settings": settings,
              "segments": [len(s) for s in sequences], "input_ids": torch.cat(sequences).tolist(),
              "loss_mask": torch.cat(masks).tolist(), "base_loss": base_loss, "loss": loss, "steps": steps,
              "loss_after": after, "converted_loss": converted}
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()]
    (GOLDEN / name / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for path in (GOLDEN / name).rglob("*.safetensors"):
        path.chmod(0o644)
    return f"base {base_loss:.6f} initial {loss:.6f} after {after:.6f} converted {converted:.6f}"


def main():
    os.chdir(ref.ROOT)
    torch.set_num_threads(1)
    for i, name in enumerate(CASES):
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(name, golden(name, 100 * i + 50), flush=True)


if __name__ == "__main__":
    main()

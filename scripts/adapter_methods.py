"""Golden files of adapters beyond plain LoRA on the tiny models of scripts/reference.py, made with transformers and peft.

    python scripts/adapter_methods.py [NAME...]      # all cases, or those named; writes tests/golden/adapters/NAME/
    python scripts/adapter_methods.py --loss MODEL_DIR [ADAPTER_DIR]   # the loss of any model, by PEFT

Needs torch, transformers, peft and bitsandbytes (golden.json names the versions). CPU, one thread, float32, eager attention, each sequence
run alone; the sequences, loss masks and optimizer are those of scripts/reference.py. Deterministic.

  adapter/            as PEFT saves it, every trained tensor moved away from its initial value
  golden.safetensors  grad.PEFT_NAME: d(loss)/d(tensor) of every trained tensor at the saved adapter
  golden.json         versions, base (the tiny model), quantization (of the linear layers of its blocks, by bitsandbytes' own
                      formulas), settings (LoraConfig's), segments, input_ids, loss_mask, base_loss,
                      loss, merged_loss (PEFT's merge_and_unload, saved and read again), steps [{step, lr, loss,
                      grad_norm}], loss_after, noise (differences to sdpa attention over one right-padded batch)
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import reference as ref

GOLDEN = Path("tests/golden/adapters")
QV = ["q_proj", "v_proj"]
# name -> (tiny model, LoraConfig's settings)
CASES = {
    "save_head": ("gqa", dict(target_modules=QV, modules_to_save=["lm_head"])),
    "save_both": ("gqa", dict(target_modules=["down_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "save_table_of_tied": ("tied", dict(target_modules=QV, modules_to_save=["embed_tokens"])),
    "save_head_of_tied": ("tied", dict(target_modules=QV, modules_to_save=["lm_head"])),
    "save_tied": ("tied", dict(target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    # Every norm ends with "norm"; up_proj and o_proj are trained in full, with their biases.
    "save_norms": ("smollm3", dict(target_modules=["v_proj", "up_proj"], modules_to_save=["norm", "up_proj", "o_proj"])),
    "save_last_norm": ("olmo2", dict(target_modules=["1.self_attn.q_proj"], modules_to_save=["model.norm"])),
    "lora_table": ("granite", dict(target_modules=["embed_tokens", "1.mlp.up_proj"])),
    "lora_head": ("gqa", dict(target_modules=["lm_head"])),
    "lora_table_of_tied": ("tied", dict(target_modules=["embed_tokens"])),
    "lora_both_of_tied": ("tied", dict(target_modules=["embed_tokens", "lm_head", "v_proj"])),
    "dora": ("qwen2", dict(target_modules="all-linear", use_dora=True, use_rslora=True)),
    "dora_head": ("gqa", dict(target_modules=["lm_head", "gate_proj"], use_dora=True)),
    "bias_all": ("biases", dict(target_modules=["q_proj"], bias="all")),
    "bias_lora_only": ("biases", dict(target_modules=["1.self_attn.k_proj", "down_proj"], bias="lora_only")),
    "lora_bias": ("biases", dict(target_modules=["v_proj", "down_proj"], lora_bias=True)),
    "nf4": ("qwen2", dict(target_modules="all-linear")),
    "nf4_dora": ("gqa", dict(target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["up_proj"])),
    "int8": ("tied", dict(target_modules=["o_proj", "gate_proj"])),
    "tokens": ("gqa", dict(target_modules=QV, trainable_token_indices=[85, 3, 48])),
    "tokens_of_both": ("gqa", dict(target_modules=["o_proj"], trainable_token_indices={"embed_tokens": [88, 0], "lm_head": [2, 45]})),
    "tokens_of_tied": ("tied", dict(target_modules=QV, trainable_token_indices=[30, 1, 42])),
    "tokens_scaled": ("granite", dict(target_modules=QV, trainable_token_indices=[28, 13])),
}
QUANTIZATION = {"nf4": "nf4", "nf4_dora": "nf4", "int8": "int8"}


def file_name(name):
    """The name of a trained parameter in adapter_model.safetensors."""
    name = name.replace("modules_to_save.default.", "").replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return name.replace(".default", "")


def base_model(path, attention="eager", quantization=None):
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype=torch.float32)
    for name, module in model.named_modules():
        if quantization and isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = quantised(module.weight.data, quantization)
    return model


def quantised(weight, quantization):
    """The values of a weight after it was quantised. Linear4bit on a CPU decodes rows wrongly that are not whole blocks (0.50.2)."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as dequantize

    if quantization == "int8":
        codes, maxima, _ = bnb.int8_vectorwise_quant(weight.clone())
        return bnb.int8_vectorwise_dequant(codes, maxima)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quantization)
    return dequantize(codes.reshape(-1), state.absmax, state.code, 64, weight.shape, weight.dtype)


def load(name, attention="eager"):
    base = base_model(ref.GOLDEN / CASES[name][0], attention, QUANTIZATION.get(name))
    return peft.PeftModel.from_pretrained(base, GOLDEN / name / "adapter", is_trainable=True)


def move(model, seed):
    """Moves every trained tensor from its initial value: pairs as reference.randomise_adapter, others by noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator) if p.requires_grad else None
            if noise is None:
                continue
            if "lora_magnitude" in name:
                p.mul_(1 + 0.1 * noise)
            elif "lora_A" in name or "lora_embedding_A" in name:
                p.copy_(noise * 0.2)
            elif "lora_B" in name or "lora_embedding_B" in name:
                p.copy_(noise * 0.1)
            else:
                p.add_(noise * 0.05)


def save(name, seed):
    """The adapter's files."""
    base_name, settings = CASES[name]
    base = base_model(ref.GOLDEN / base_name, quantization=QUANTIZATION.get(name))
    base.name_or_path = (ref.GOLDEN / base_name).as_posix()
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings))
    move(model, seed)
    folder = GOLDEN / name / "adapter"
    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    ref.tidy_adapter_config(folder, (ref.GOLDEN / base_name).as_posix())


def measure(model, sequences, masks, padded=False):
    """(loss, gradient of every trained tensor)."""
    model.zero_grad()
    loss = ref.run(model, sequences, masks, padded)[1]
    loss.backward()
    grads = {file_name(n): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), grads


def train(model, sequences, masks, padded=False):
    """As reference.train, with the Trainer's parameter groups: no decay of norms and biases. (steps, loss afterwards)"""
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in trained if name in decayed], "weight_decay": ref.OPTIMIZER["weight_decay"]},
              {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0}]
    return ref.train(model, sequences, masks, padded, groups)[:2]


def merged_loss(model, sequences, masks):
    """The loss of the merged model, saved and read again. A broken tie needs a config that says so."""
    merged = model.merge_and_unload()
    head, table = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    merged.config.tie_word_embeddings = bool(torch.equal(head, table))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        state = {name: p.detach().clone() for name, p in merged.state_dict().items()}
        merged.save_pretrained(folder, state_dict=state)
        return ref.run(base_model(folder), sequences, masks)[1].item()


def golden(name, seed):
    save(name, seed)
    base_name, settings = CASES[name]
    masks = [torch.tensor(m, dtype=torch.uint8) for m in ref.LOSS_MASKS]
    base = base_model(ref.GOLDEN / base_name, quantization=QUANTIZATION.get(name))
    sequences = ref.random_ids(base.config.vocab_size, [len(m) for m in masks], seed + 2)
    with torch.no_grad():
        base_loss = ref.run(base, sequences, masks)[1].item()
    loss, grads = measure(load(name), sequences, masks)
    again, grads_again = measure(load(name, "sdpa"), sequences, masks, padded=True)
    steps, after = train(load(name), sequences, masks)
    steps_again, after_again = train(load(name, "sdpa"), sequences, masks, padded=True)
    noise = {"loss": abs(loss - again), "grad": ref.difference(grads, grads_again), "loss_after": abs(after - after_again),
             "step_loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, steps_again))}
    assert noise["loss"] < 1e-4 and noise["grad"] < 1e-4, noise
    assert all(g.abs().max() > 0 for g in grads.values()), "a gradient is zero"
    merged = merged_loss(load(name), sequences, masks)
    # PEFT merges LoRA on one of two tied embeddings into the one table: both change.
    if not (base_name == "tied" and "lora" in name):
        assert abs(merged - loss) < 1e-4, (merged, loss)
    save_file({f"grad.{n}": g.contiguous() for n, g in grads.items()}, GOLDEN / name / "golden.safetensors")
    record = {"made_by": "scripts/adapter_methods.py", "versions": ref.versions(), "base": base_name,
              "quantization": QUANTIZATION.get(name, "none"), "settings": settings,
              "segments": [len(s) for s in sequences], "input_ids": torch.cat(sequences).tolist(),
              "loss_mask": torch.cat(masks).tolist(), "base_loss": base_loss, "loss": loss, "merged_loss": merged,
              "steps": steps, "loss_after": after, "noise": noise}
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()]
    (GOLDEN / name / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for path in (GOLDEN / name).rglob("*.safetensors"):
        path.chmod(0o644)
    return f"base {base_loss:.6f} adapted {loss:.6f} merged {merged:.6f} after {after:.6f} noise {max(noise.values()):.1e}"


def loss_of(model_dir, adapter_dir=None):
    """The loss on the sequences of the first case with that vocabulary's size, by PEFT."""
    model = base_model(model_dir)
    if adapter_dir:
        model = peft.PeftModel.from_pretrained(model, adapter_dir)
    masks = [torch.tensor(m, dtype=torch.uint8) for m in ref.LOSS_MASKS]
    sequences = ref.random_ids(model.config.vocab_size, [len(m) for m in masks], 2)
    with torch.no_grad():
        return ref.run(model, sequences, masks)[1].item()


def main():
    os.chdir(ref.ROOT)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    if sys.argv[1:2] == ["--loss"]:
        return print(loss_of(*sys.argv[2:]))
    unknown = set(sys.argv[1:]) - set(CASES)
    if unknown:
        sys.exit(f"no such case: {', '.join(sorted(unknown))} (known: {', '.join(CASES)})")
    for i, name in enumerate(CASES):
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(name, golden(name, 100 * i), flush=True)


if __name__ == "__main__":
    main()

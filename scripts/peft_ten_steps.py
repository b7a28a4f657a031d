"""Ten training steps with PEFT and torch on a real model: what `train` must reproduce, loss by loss.

    python scripts/peft_ten_steps.py MODEL_DIR DATA_JSONL OUT_DIR [--start ADAPTER_DIR] [--valid VALID_JSONL]

The committed golden files come from TinyStories-656K and the E2E NLG set's first 80 training records:

    A=../shared/assets
    python scripts/peft_ten_steps.py $A/models/TinyStories-656K $A/datasets/e2e_nlg/train.jsonl OUT \
        --valid $A/datasets/e2e_nlg/valid.jsonl --base-model raincandy-u/TinyStories-656K
    OUT/ten_steps.json -> tests/golden/tinystories_e2e_ten_steps.json
    OUT/start          -> tests/golden/tinystories_start_adapter

    with --start tests/golden/tinystories_start_adapter --weight-decay 0.1 --loraplus-lr-ratio 16:
    OUT/ten_steps.json -> tests/golden/tinystories_loraplus_ten_steps.json

Start: PEFT's own initialisation at `--seed` (A Kaiming-uniform), then B ~ N(0, 0.02^2), so that every gradient is non-zero
from the first step; saved to OUT_DIR/start, and loaded from there. Steps: records in file order, no shuffling, `--batch` to a
step; AdamW (betas 0.9, 0.999, eps 1e-8, no decay), gradients clipped to a global norm of 1, transformers'
get_linear_schedule_with_warmup(0, steps): lr of step i (from 0) = lr * (1 - i / steps). Loss = summed negative
log-likelihood of the batch's loss tokens / their number. The adapter afterwards is saved to OUT_DIR/end.

ten_steps.json, also printed: settings, versions, sha256 {model, data} of the files read, bos (ids that the tokenizer adds by
itself), examples, truncated, dropped, steps [{step, lr, loss, grad_norm (before clipping), tokens (with bos and eos, without
padding), loss_tokens}], first_grad_norms and end_norms {PEFT name: L2 norm of that tensor's gradient in step 0, and of its
weights after the last}, loss_after (over all records trained on), and with --valid: valid {sha256, examples, truncated,
dropped, tokens, loss_tokens, loss_base, loss_start, loss_end} over its first `--valid-limit` records, cut at --max-length too.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers

import completion_loss as cl
from peft.optimizers import create_loraplus_optimizer
from reference import file_name, tidy_adapter_config, versions


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packing-style", choices=["padded", "alone"], default="padded",
                        help="padded: one right-padded batch a step; alone: each record by itself (the same mathematics)")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--loraplus-lr-ratio", type=float, help="LoRA+: PEFT's create_loraplus_optimizer with this ratio")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lora-alpha", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="start from this adapter instead of making one")
    parser.add_argument("--base-model", help="name to write as the adapter's base model (default: the directory's name)")
    parser.add_argument("--valid", type=Path, help="evaluate on this file before and after")
    parser.add_argument("--valid-limit", type=int, default=200)
    return parser.parse_args()


def base_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def make_start(args):
    """Writes OUT/start."""
    settings = peft.LoraConfig(r=args.r, lora_alpha=args.lora_alpha, lora_dropout=0.0, target_modules="all-linear",
                               task_type="CAUSAL_LM")
    torch.manual_seed(args.seed)
    model = peft.get_peft_model(base_model(args.model_dir), settings)
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return save(model, args.out / "start", args)


def save(model, folder, args):
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    tidy_adapter_config(folder, args.base_model or args.model_dir.name)
    return folder


def train(model, examples, args):
    """(a record per step, L2 norm of each tensor's gradient in step 0)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings = dict(lr=args.lr, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    if args.loraplus_lr_ratio:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=args.loraplus_lr_ratio,
                                              loraplus_weight_decay=args.weight_decay, **settings)
    else:
        optimizer = torch.optim.AdamW(trainable, weight_decay=args.weight_decay, **settings)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=args.steps)
    steps, first = [], None
    for step in range(args.steps):
        batch = examples[step * args.batch : (step + 1) * args.batch]
        optimizer.zero_grad()
        loss = cl.summed_loss(model, batch, args.packing_style == "padded") / cl.loss_tokens(batch)
        loss.backward()
        first = first or {file_name(n): p.grad.norm().item() for n, p in model.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0, foreach=False)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        steps.append({"step": step, "lr": lr, "loss": loss.item(), "grad_norm": norm.item(),
                      "tokens": cl.tokens(batch), "loss_tokens": cl.loss_tokens(batch)})
    return steps, first


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main():
    args = arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    encoder = cl.Encoder(args.model_dir)
    examples, counts = cl.encode_all(encoder, cl.read_records(args.data, args.steps * args.batch), args.max_length)
    if len(examples) < args.steps * args.batch:
        needed = f"{args.steps * args.batch} needed: lower --steps or --batch"
        raise SystemExit(f"{args.data}: {len(examples)} usable records, {needed}")
    base = base_model(args.model_dir)
    valid = None
    if args.valid:
        held_out, cut = cl.encode_all(encoder, cl.read_records(args.valid, args.valid_limit), args.max_length)
        valid = {"sha256": sha256(args.valid), "examples": len(held_out), **cut, "tokens": cl.tokens(held_out),
                 "loss_tokens": cl.loss_tokens(held_out), "loss_base": cl.evaluate(base, held_out)}
    model = peft.PeftModel.from_pretrained(base, args.start or make_start(args), is_trainable=True)
    if valid:
        valid["loss_start"] = cl.evaluate(model, held_out)
    steps, first = train(model, examples, args)
    save(model, args.out / "end", args)
    config = model.peft_config["default"]
    record = {
        "made_by": "scripts/peft_ten_steps.py", "versions": versions(),
        "settings": {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": "all-linear", "lr": args.lr,
                     "schedule": "linear", "warmup_steps": 0, "betas": [0.9, 0.999], "eps": 1e-8,
                     "weight_decay": args.weight_decay, "loraplus_lr_ratio": args.loraplus_lr_ratio, "max_grad_norm": 1.0, "batch": args.batch, "max_length": args.max_length,
                     "packing_style": args.packing_style, "seed": args.seed},
        "sha256": {"model": sha256(args.model_dir / "model.safetensors"), "data": sha256(args.data)},
        "bos": encoder.special, "eos": encoder.eos, "examples": len(examples), **counts, "steps": steps,
        "first_grad_norms": first,
        "end_norms": {file_name(n): p.detach().norm().item() for n, p in model.named_parameters() if p.requires_grad},
        "loss_after": cl.evaluate(model, examples),
    }
    if valid:
        record["valid"] = valid | {"loss_end": cl.evaluate(model, held_out)}
    text = json.dumps(record, indent=1)
    (args.out / "ten_steps.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

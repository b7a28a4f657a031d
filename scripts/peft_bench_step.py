"""What `scripts/bench` sets wattune beside: training steps with transformers and PEFT on the processor, timed from within.

    python scripts/peft_bench_step.py MODEL_DIR --dtype bf16 --compile

A step: random ids, a loss at every token (or behind a masked prompt), backward, fused AdamW; no clipping, no schedule. The first
steps (compiling, first allocations) are not counted; the median of the others is the step's time. Prints one JSON line: step_s,
steps_s, warmup_s, first_loss, trained, ready_s (to the first forward, from --started-at on the system's monotonic clock), threads,
versions.
"""

import argparse
import json
import os
import statistics
import time

BEGAN = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="of the frozen weights and the arithmetic")
    parser.add_argument("--adapter-dtype", choices=["f32", "same"], default="f32", help="f32 is PEFT's default")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--full", action="store_true", help="train every weight, no adapter")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=0, help="tokens at each row's beginning that have no loss")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--threads", type=int, help="default: all that torch takes")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=5, help="counted steps, at least")
    parser.add_argument("--seconds", type=float, default=0, help="counted time, at least")
    parser.add_argument("--started-at", type=float, default=BEGAN, help="when the process was started, CLOCK_MONOTONIC")
    return parser.parse_args()


def load(args):
    """The model as it is trained, and its trained parameters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=DTYPES[args.dtype])
    if not args.full:
        settings = peft.LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=args.adapter_dtype == "f32")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return model, [p for p in model.parameters() if p.requires_grad]


def rows(args, vocab_size):
    ids = torch.randint(vocab_size, (args.batch, args.seq))
    labels = ids.clone()
    labels[:, : args.prompt] = -100
    return ids, labels


def main():
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    model, trained = load(args)
    vocab_size = model.config.vocab_size
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    step_of = torch.compile(model) if args.compile else model
    ready = time.monotonic() - args.started_at
    times, first_loss = [], None
    while len(times) < args.warmup + args.steps or sum(times[args.warmup :]) < args.seconds:
        ids, labels = rows(args, vocab_size)
        begin = time.perf_counter()
        loss = step_of(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - begin)
        first_loss = loss.item() if first_loss is None else first_loss
    counted = times[args.warmup :]
    print(json.dumps({
        "step_s": statistics.median(counted), "steps_s": counted, "warmup_s": times[: args.warmup], "first_loss": first_loss,
        "trained": sum(p.numel() for p in trained), "ready_s": ready, "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }))


if __name__ == "__main__":
    main()

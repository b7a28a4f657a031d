"""Completion loss by PEFT, or of a merged model by plain transformers: proves that what wattune writes, they read alike.

    python scripts/peft_eval.py MODEL_DIR ADAPTER_DIR DATA_JSONL [--limit N] [--max-length L]
    python scripts/peft_eval.py MODEL_DIR none DATA_JSONL          # the base model alone
    python scripts/peft_eval.py --merged DIR DATA_JSONL            # a merged directory; --tokenizer DIR if it holds none

Prints one JSON object: loss (nats per loss token, weighted by token), loss_tokens, tokens (with bos and eos), examples,
truncated, dropped. An adapter tensor that PEFT misses or does not know is an error, not a warning.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from safetensors import safe_open

import completion_loss as cl
from reference import file_name


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="MODEL_DIR ADAPTER_DIR DATA_JSONL", help="with --merged: DATA_JSONL alone")
    parser.add_argument("--merged", type=Path, metavar="DIR", help="a merged model's directory")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="where tokenizer.json is (default: the model's directory)")
    parser.add_argument("--limit", type=int, help="the first N records only")
    parser.add_argument("--max-length", type=int, help="cut longer records at the end")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    wanted = 1 if args.merged else 3
    if len(args.paths) != wanted:
        parser.error(f"{len(args.paths)} paths given, {wanted} wanted" + (" with --merged: DATA_JSONL" if args.merged else ""))
    return args


def load_base(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        sys.exit(f"{folder}: transformers does not read it cleanly: {wrong}")
    return model


def load_adapter(base, folder):
    """The base with its adapter, after comparing the file's tensor names with those that PEFT expects."""
    model = peft.PeftModel.from_pretrained(base, folder)
    expected = {file_name(n) for n, _ in model.named_parameters() if "lora_" in n}
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    if expected != found:
        sys.exit(f"{folder}: missing {sorted(expected - found)}, unknown {sorted(found - expected)}")
    return model


def main():
    args = arguments()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    folder = args.merged or Path(args.paths[0])
    model = load_base(folder)
    if not args.merged and args.paths[1] != "none":
        model = load_adapter(model, args.paths[1])
    records = cl.read_records(args.paths[-1], args.limit)
    examples, counts = cl.encode_all(cl.Encoder(args.tokenizer or folder), records, args.max_length)
    if not examples:
        sys.exit(f"{args.paths[-1]}: no record has a loss token within --max-length")
    loss = cl.evaluate(model.eval(), examples, args.batch)
    sizes = {"loss_tokens": cl.loss_tokens(examples), "tokens": cl.tokens(examples), "examples": len(examples)}
    print(json.dumps({"loss": loss, **sizes, **counts}))


if __name__ == "__main__":
    main()

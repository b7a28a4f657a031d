"""`wattune generate` beside transformers' `generate` on this machine, in turn: time of one more token, greedy, with a cache of keys and values.

    cargo build --release
    python scripts/bench_generate.py > benches/results/DATE-generate.md          a Python with torch and transformers
    python scripts/bench_generate.py --model tinyllama-1.1b --prompt 4 --rounds 5
    python scripts/bench_generate.py --model tinyllama-1.1b --prompt 4 --dtype bf16 --quantization q8_0 q4_0 nf4 --no-torch

A token's time is the difference of two texts, of few and of many tokens, over the difference of their lengths: for wattune of two whole
processes, for transformers of two calls in this one. The weights are those of `scripts/bench`, stored in bf16.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.dont_write_bytecode = True
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bench_inputs as inputs
import bench_page as page
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help=f"one of {', '.join(inputs.SHAPES)}, or a model's directory")
    parser.add_argument("--prompt", type=int, nargs="+", default=[4, 1000], help="tokens before the first new one")
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--many", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--quantization", nargs="*", default=[], help="also wattune alone with weights in these formats, in bf16")
    parser.add_argument("--no-torch", action="store_true", help="wattune alone: ratios are to its bf16")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/wattune")
    parser.add_argument("--work", type=Path, help="folder for weights (default: a temporary one)")
    args = parser.parse_args()
    if not 0 < args.few < args.many or args.rounds < 1:
        parser.error("--few is at least 1 and below --many, --rounds at least 1")
    if not args.binary.is_file():
        parser.error(f"{args.binary} is not there: cargo build --release, or give --binary PATH")
    return args


def wattune(args, model, dtype, prompt, quantization="none"):
    """Seconds of one process for each number of new tokens."""
    for new in (args.few, args.many):
        command = [args.binary, "generate", "--model", model, "--prompt", " ".join(["7"] * prompt), "--max-new-tokens", str(new),
                   "--dtype", dtype, "--quantization", quantization, "--device", "cpu", "--json", "--quiet"]
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        took = time.monotonic() - begin
        if done.returncode:
            sys.exit(f"exit status {done.returncode} of {' '.join(map(str, command[:4]))} ...\n{done.stderr}")
        told = json.loads(done.stdout)
        if (len(told["prompt_tokens"]), len(told["tokens"])) != (prompt, new):
            sys.exit(f"{prompt} and {new} tokens were meant, not {len(told['prompt_tokens'])} and {len(told['tokens'])}")
        yield took


def reference(args, model, prompt):
    """Seconds of one call for each number of new tokens."""
    ids = torch.full((1, prompt), 7)
    for new in (args.few, args.many):
        begin = time.monotonic()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0)
        yield time.monotonic() - begin


def main():
    args = arguments()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="wattune-generate-") as temporary:
        directory, _ = inputs.model_directory(args.model, args.work or Path(temporary))
        engines = ["wattune"] if args.no_torch else ["wattune", "transformers"]
        load = {dtype: transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype]).eval()
                for dtype in args.dtype if not args.no_torch}
        kinds = [(who, dtype) for dtype in args.dtype for who in engines] + [("wattune", name) for name in args.quantization]
        cases = [(who, dtype, prompt) for prompt in args.prompt for who, dtype in kinds]
        found = {case: [] for case in cases}
        for number in range(args.rounds):
            for case in cases:
                who, dtype, prompt = case
                if who == "transformers":
                    run = reference(args, load[dtype], prompt)
                elif dtype in DTYPES:
                    run = wattune(args, directory, dtype, prompt)
                else:
                    run = wattune(args, directory, "bf16", prompt, dtype)
                few, many = run
                if many <= few:
                    sys.exit(f"{' '.join(map(str, case))} before: {args.many} tokens took no longer than {args.few}: give a larger --many")
                found[case].append((many - few) / (args.many - args.few))
                print(f"round {number + 1}: {who} {dtype}, {prompt} before: {1e3 * found[case][-1]:.1f} ms a token", file=sys.stderr, flush=True)
    reference_versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts = [*page.machine(), *page.versions(args, ROOT, reference_versions)]
    print(f"# generating with {Path(args.model).name}'s shape: {datetime.date.today()}\n")
    print(__doc__.strip().split("\n\n")[-1] + "\n")
    print(page.table(["machine and versions", ""], facts) + "\n")
    rows = []
    for prompt in args.prompt:
        rivals = [("wattune", "bf16")] if args.no_torch else [("transformers", dtype) for dtype in args.dtype]
        fastest = [min(found[*rival, prompt][i] for rival in rivals) for i in range(args.rounds)]
        for case in [case for case in cases if case[2] == prompt]:
            ratios = [over / own for own, over in zip(found[case], fastest)]
            rows.append([" ".join(case[:2]), prompt, " ".join(f"{1e3 * one:.1f}" for one in found[case]),
                         f"**{1e3 * statistics.median(found[case]):.1f}**", " ".join(f"{one:.2f}" for one in ratios)])
    print(page.table(["case", "tokens before", "ms a token, each round", "median", f"tokens/s to {'wattune bf16' if args.no_torch else 'the fastest of transformers'}, each round"], rows))


if __name__ == "__main__":
    main()

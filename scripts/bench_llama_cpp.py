"""`wattune generate` beside llama.cpp on one GGUF file and the same threads, in turn: tokens a second of a prompt and of new tokens.

    cargo build --release && pip install xllamacpp
    python scripts/bench_llama_cpp.py FILE.gguf                 a file of `wattune export --format gguf`, for example
    python scripts/bench_llama_cpp.py FILE.gguf --prompt 512 --new 64 --rounds 3 --threads 2

llama.cpp's rates are its own (`timings` of its server); wattune's are differences of whole processes: of a long and a short prompt,
of few and many new tokens. Both are greedy and end at the number of tokens alone. Prints a line for each round, then medians and ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

import xllamacpp

ROOT = Path(__file__).resolve().parent.parent
FEW, SHORT = 8, 8


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="words of the long prompt")
    parser.add_argument("--new", type=int, default=72, help="new tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="f32", help="compute precision of wattune")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/wattune")
    return parser.parse_args()


def text(words):
    return " ".join(["time"] * words)


def wattune(args, words, new):
    """Seconds of a process, and the tokens of its prompt."""
    command = [args.binary, "generate", "--model", args.file, "--prompt", text(words), "--max-new-tokens", str(new), "--dtype", args.dtype,
               "--threads", str(args.threads), "--json", "--quiet"]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert len(told["tokens"]) == new, f"{len(told['tokens'])} new tokens, not {new}: the model ends its text"
    return time.monotonic() - begin, len(told["prompt_tokens"])


def rates_of_wattune(args):
    (few, short), (many, _), (long_prompt, length) = wattune(args, SHORT, FEW), wattune(args, SHORT, args.new), wattune(args, args.prompt, FEW)
    return (length - short) / (long_prompt - few), (args.new - FEW) / (many - few)


def rates_of_llama_cpp(server, args):
    def complete(words, new):
        body = {"prompt": text(words), "n_predict": new, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["timings"]

    return complete(args.prompt, FEW)["prompt_per_second"], complete(SHORT, args.new)["predicted_per_second"]


def main():
    args = arguments()
    params = xllamacpp.CommonParams()
    params.model.path = str(args.file)
    params.n_ctx = 2 * args.prompt + args.new
    params.verbosity = 0
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    found = []
    for number in range(args.rounds):
        own, other = rates_of_wattune(args), rates_of_llama_cpp(server, args)
        found.append([*own, *other])
        print(f"round {number + 1}: prompt {own[0]:.1f} and {other[0]:.1f} tokens/s, new {own[1]:.1f} and {other[1]:.1f} tokens/s (wattune, llama.cpp)", flush=True)
    prompt, new, other_prompt, other_new = [statistics.median(column) for column in zip(*found)]
    version = getattr(xllamacpp, "__version__", "?")
    print(f"medians, {args.file.name}, {args.threads} threads, xllamacpp {version}: prompt {prompt:.1f} / {other_prompt:.1f} = {prompt / other_prompt:.2f}, "
          f"new {new:.1f} / {other_new:.1f} = {new / other_new:.2f}")


if __name__ == "__main__":
    main()

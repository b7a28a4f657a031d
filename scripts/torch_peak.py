"""How fast torch multiplies large matrices here: one JSON object, {"f32": {"flops_s", "side", "transposed"}, "bf16": ...}.

    python scripts/torch_peak.py [--threads N] [--seconds S]

Square products, the right factor as it stands and transposed (as a linear layer has it); each is repeated for S seconds, and the
best single product counts. torch uses MKL for f32 and oneDNN for bf16. A side whose one product would take more than S seconds, by the
rate at the side before it, is left out: torch has no fast bf16 product for processors without AVX-512, where one of 4096 takes minutes.
"""

import argparse
import json
import time

import torch

SIDES = (256, 1024, 2048, 4096)


def best_rate(dtype, side, transposed, seconds):
    left, right = (torch.rand(side, side).sub_(0.5).to(dtype) for _ in range(2))
    right = right.t() if transposed else right
    out = torch.empty(side, side, dtype=dtype)
    torch.mm(left, right, out=out)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        tried = []
        for side in SIDES:
            if not tried or 2 * side**3 / max(tried)[0] <= args.seconds:
                tried += [(best_rate(dtype, side, transposed, args.seconds), side, transposed) for transposed in (False, True)]
        flops_s, side, transposed = max(tried)
        found[name] = {"flops_s": flops_s, "side": side, "transposed": transposed}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

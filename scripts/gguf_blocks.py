"""tests/golden/gguf_blocks.json: rows of values and the bytes that gguf-py quantises them to.

    pip install gguf numpy && python scripts/gguf_blocks.py
"""

import json
import pathlib

import gguf
import numpy as np

FORMATS = ["F16", "BF16", "Q4_0", "Q5_0", "Q5_1", "Q8_0"]

random = np.random.default_rng(7)
outlier = random.normal(0, 0.01, 32)
outlier[19] = -3.0
rows = {
    "normal": random.normal(0, 0.05, 96),
    "zeros": np.zeros(32),
    "constant": np.full(32, 0.3),
    "one outlier": outlier,
    "halves of a step": np.arange(-16, 16) * 0.5,
    "equal magnitudes": np.where(np.arange(32) % 3 == 0, -1.5, 1.5),
    "large": random.normal(0, 3e4, 32),
}
# A value whose quotient lies within half a step of float32 under a whole number: the rounding before the truncation decides.
wide = random.normal(0, 0.05, (500000, 32)).astype(np.float32)
scale = np.take_along_axis(wide, abs(wide).argmax(1, keepdims=True), 1) / np.float32(-8)
sums = wide.astype(np.float64) * (np.float32(1) / scale) + 8.5
rounds = np.trunc(sums) != np.trunc(sums.astype(np.float32))
assert rounds.any()
rows["rounds up before it is truncated"] = wide[rounds.any(1)][0]
golden = []
for name, values in rows.items():
    values = values.astype(np.float32)
    stored = {
        kind: gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8).tobytes().hex()
        for kind in FORMATS
        if not (name == "large" and kind == "F16")
    }
    golden.append({"name": name, "bits": [int(x) for x in values.view(np.uint32)], "stored": stored})
path = pathlib.Path(__file__).parent.parent / "tests/golden/gguf_blocks.json"
path.write_text(json.dumps(golden) + "\n")

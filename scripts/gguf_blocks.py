"""tests/golden/gguf_blocks.json: rows of values and the bytes that gguf-py quantises them to.

    pip install gguf numpy && python scripts/gguf_blocks.py
"""

import json
import pathlib

import gguf
import numpy as np

FORMATS = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]

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
# Values near a whole number, where float32 decides: in the sum, and in the product already.
wide = random.normal(0, 0.05, (1000000, 32)).astype(np.float32)
inverse = np.float32(1) / (np.take_along_axis(wide, abs(wide).argmax(1, keepdims=True), 1) / np.float32(-8))
exact = wide.astype(np.float64) * inverse + 8.5
by_float32 = np.trunc(wide * inverse + np.float32(8.5))
for name, other in {"sum in float32": exact, "product in float32": exact.astype(np.float32)}.items():
    differs = (np.trunc(other) != by_float32).any(1)
    rows[name] = wide[differs][0]
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

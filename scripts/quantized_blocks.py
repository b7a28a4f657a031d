"""tests/golden/quantized_blocks.json: what gguf-py, bitsandbytes, torch and compressed-tensors decode from blocks, and what bitsandbytes quantises values to.

    pip install gguf bitsandbytes compressed-tensors torch numpy && python scripts/quantized_blocks.py
"""

import json
import pathlib

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as dequantize
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

random = np.random.default_rng(11)


def scales(count):
    return random.normal(0, 0.01, count).astype(np.float16).view(np.uint8).reshape(count, 2)


def blocks(size, offsets, count=2):
    """Random bytes with f16 scales at these offsets."""
    made = random.integers(0, 256, (count, size), dtype=np.uint8)
    for offset in offsets:
        made[:, offset : offset + 2] = scales(count)
    return made


made = {
    "Q4_0": blocks(18, [0]),
    "Q4_1": blocks(20, [0, 2]),
    "Q5_0": blocks(22, [0]),
    "Q5_1": blocks(24, [0, 2]),
    "Q8_0": blocks(34, [0]),
    "Q2_K": blocks(84, [80, 82]),
    "Q3_K": blocks(110, [108]),
    "Q4_K": blocks(144, [0, 2]),
    "Q5_K": blocks(176, [0, 2]),
    "Q6_K": blocks(210, [208]),
    "MXFP4": blocks(17, [], 4),
}
# Ordinary exponents, and the smallest, which are subnormal.
made["MXFP4"][:, 0] = [118, 0, 1, 2]
golden = {}
for name, rows in made.items():
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name]).astype(np.float32)
    golden[name] = {"blocks": rows.tobytes().hex(), "values": values.tobytes().hex()}

# Rows of 80 values: blocks of 64 run over their ends, and the last is shorter. Ties with midpoints of levels, zeros.
values = random.normal(0, 0.05, (5, 80)).astype(np.float32)
values[1, :64] = 0.0
values[2, 10] = 3.0
tensor = torch.from_numpy(values)
for kind in ["nf4", "fp4"]:
    codes, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type=kind)
    # Not `bnb.dequantize_4bit`: on a CPU, 0.50.2 takes wrong maxima where rows are not whole blocks.
    decoded = dequantize(codes.reshape(-1), state.absmax, state.code, 64, tensor.shape, torch.float32)
    codes = codes.numpy().reshape(-1)
    codes = np.pad(codes, (0, -len(codes) % 32)).reshape(-1, 32)
    absmax = state.absmax.numpy().reshape(-1, 1).view(np.uint8)
    golden[kind.upper()] = {
        "from": values.tobytes().hex(),
        "blocks": np.concatenate([absmax, codes], 1).tobytes().hex(),
        "values": decoded.numpy().tobytes().hex(),
    }
values[3] = 0.0
codes, maxima, _ = bnb.int8_vectorwise_quant(torch.from_numpy(values.copy()))
decoded = bnb.int8_vectorwise_dequant(codes, maxima)
rows = np.concatenate([codes.numpy().view(np.uint8), maxima.numpy().reshape(-1, 1).view(np.uint8)], 1)
golden["INT8"] = {
    "from": values.tobytes().hex(),
    "blocks": rows.tobytes().hex(),
    "values": decoded.numpy().tobytes().hex(),
}
scale = random.uniform(0.001, 0.01, (2, 1)).astype(np.float32)
codes = random.integers(0, 256, (2, 128), dtype=np.uint8)
codes[(codes & 0x7F) == 0x7F] = 0
decoded = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy() * scale
golden["FP8"] = {"blocks": np.concatenate([scale.view(np.uint8), codes], 1).tobytes().hex(), "values": decoded.tobytes().hex()}
codes = random.integers(-8, 8, (2, 128), dtype=np.int8)
words = pack_to_int32(torch.from_numpy(codes), 4).numpy().view(np.uint8)
decoded = codes.astype(np.float32) * scale
golden["INT4"] = {"blocks": np.concatenate([scale.view(np.uint8), words], 1).tobytes().hex(), "values": decoded.tobytes().hex()}
path = pathlib.Path(__file__).parent.parent / "tests/golden/quantized_blocks.json"
path.write_text(json.dumps(golden) + "\n")

"""tests/golden/quantized_files.safetensors: matrices as bitsandbytes, FP8 and compressed-tensors models store them, each with its
values dequantised by those libraries under NAME.expected: of larger ones every twelfth or sixteenth column.

    pip install bitsandbytes compressed-tensors safetensors torch && python scripts/quantized_files.py
"""

import json
import pathlib

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as dequantize
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import save_file

torch.manual_seed(3)
made = {}


def four_bits(name, kind, nested):
    # Blocks of 64 run over the ends of these rows; the last is shorter. More than 256 blocks, so that there are two nested maxima.
    w = torch.randn(*((204, 84) if nested else (5, 81))) * 0.05
    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
    for key, value in state.as_dict(packed=True).items():
        made[f"{name}.weight.{key}"] = value
    made[f"{name}.weight"] = codes
    maxima = state.absmax
    if nested:
        maxima = bnb.dequantize_blockwise(maxima, state.state2) + state.offset
    expected = dequantize(codes.reshape(-1), maxima, state.code, 64, w.shape, torch.float32)
    made[f"{name}.expected"] = expected[:, ::12] if nested else expected


def int8(name):
    w = torch.randn(6, 80) * 0.05
    made[f"{name}.weight"], made[f"{name}.SCB"], _ = bnb.int8_vectorwise_quant(w.half())
    made[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    made[f"{name}.expected"] = bnb.int8_vectorwise_dequant(made[f"{name}.weight"], made[f"{name}.SCB"])


def fp8(name, suffix, scale, count):
    """Scales of every kind of tile. Codes of every finite value, subnormal ones too."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F][torch.randint(0, 254, (count, 256))].view(torch.float8_e4m3fn)
    rows = scale.float().reshape(scale.shape if scale.ndim == 2 else (-1, 1))
    if rows.shape[0] == 2:
        rows = rows.repeat_interleave(128, 0)[:count]
    made[f"{name}.weight"], made[f"{name}.{suffix}"] = codes, scale
    made[f"{name}.expected"] = codes.float()[:, ::16] * rows.repeat_interleave(256 // rows.shape[1], 1)[:, ::16]


def packed(name, groups):
    codes = torch.randint(-8, 8, (5, 256), dtype=torch.int8)
    scale = (torch.rand(5, groups) * 0.01).to(torch.bfloat16)
    words = pack_to_int32(codes, 4)
    assert torch.equal(unpack_from_int32(words, 4, codes.shape), codes)
    made[f"{name}.weight_packed"], made[f"{name}.weight_scale"] = words, scale
    made[f"{name}.weight_shape"] = torch.tensor(codes.shape)
    made[f"{name}.expected"] = codes.float() * scale.float().repeat_interleave(256 // groups, 1)


four_bits("nf4", "nf4", False)
four_bits("fp4", "fp4", False)
four_bits("nf4_nested", "nf4", True)
int8("int8")
fp8("fp8_tiles", "weight_scale_inv", torch.rand(2, 2), 130)
fp8("fp8_rows", "weight_scale", torch.rand(7, 1).to(torch.bfloat16), 7)
fp8("fp8_one", "weight_scale", torch.rand(1), 3)
packed("int4_groups", 2)
packed("int4_rows", 1)
path = pathlib.Path(__file__).parent.parent / "tests/golden/quantized_files.safetensors"
save_file({name: value.contiguous() for name, value in made.items()}, path)
print(path, path.stat().st_size, json.dumps(sorted(made)))

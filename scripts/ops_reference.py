"""PyTorch's opinion on each op, forward and backward: small files that the op tests are held to.

    python scripts/ops_reference.py                # writes tests/golden/ops/NAME.safetensors

Needs torch, transformers (frequencies of a stretched RoPE) and safetensors. Inputs are random f32; everything is computed from them in
f64 and stored in f32, so a difference beyond 1e-5 of a tensor's largest value is the op's own. Deterministic: a second run writes the
same bytes. Layout as in wattune's ops: tokens first, (N, C), segments end to end. `d` before a name is the gradient of
sum(y * dy) with respect to it.

  attention  q, k, v, dy -> y, dq, dk, dv; segments (lengths), sizes (heads, kv_heads, head_dim, window)
  rms_norm   x, weight, dy -> y, dx, dweight; eps 1e-5
  swiglu     gate, up, dy -> y, dgate, dup
  activation x, up, dy -> y_NAME, dx_NAME of NAME(x), gated_NAME, dgate_NAME, dup_NAME of NAME(x) up; NAME as in config.json
  head       h, weight, targets -> losses, dh, dweight of 0.3 * sum of losses
  rope_KIND  x, dy -> y, dx of one segment; KIND: default, linear, dynamic, llama3, yarn (settings below)
  adamw      values, gradients (steps, n) -> after (steps, n) and norms (steps) before clipping
"""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden/ops"
HEADS, KV_HEADS, HEAD_DIM, WINDOW, LENGTHS = 4, 2, 6, 16, (70, 1, 5)
ROPES = {
    "default": dict(rope_theta=10000.0),
    "linear": dict(rope_theta=10000.0, factor=4.0),
    "dynamic": dict(rope_theta=10000.0, factor=4.0),
    "llama3": dict(rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64),
    "yarn": dict(rope_theta=10000.0, factor=4.0, beta_fast=8.0, beta_slow=1.0, original_max_position_embeddings=64),
}


def random(*shape, size=1.0):
    """Numbers that f32 holds exactly, as f64."""
    return (torch.randn(*shape) * size).float().double()


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def save(name, **tensors):
    stored = {k: (t.detach().float() if t.is_floating_point() else t).contiguous() for k, t in tensors.items()}
    save_file(stored, GOLDEN / f"{name}.safetensors")


def attention():
    n = sum(LENGTHS)
    q, k, v = leaves(random(n, HEADS * HEAD_DIM, size=2), random(n, KV_HEADS * HEAD_DIM, size=2), random(n, KV_HEADS * HEAD_DIM))
    dy = random(n, HEADS * HEAD_DIM)
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    mask = (segment[:, None] == segment[None, :]) & (j <= i) & (i - j < WINDOW)
    heads = lambda x: x.view(n, -1, HEAD_DIM).transpose(0, 1)[None]
    y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask, enable_gqa=True)
    y = y[0].transpose(0, 1).reshape(n, -1)
    (y * dy).sum().backward()
    sizes = torch.tensor([HEADS, KV_HEADS, HEAD_DIM, WINDOW])
    save("attention", q=q, k=k, v=v, dy=dy, y=y, dq=q.grad, dk=k.grad, dv=v.grad, segments=torch.tensor(LENGTHS), sizes=sizes)


def rms_norm():
    (x, weight), dy = leaves(random(5, 33), random(33)), random(5, 33)
    y = F.rms_norm(x, (33,), weight, eps=1e-5)
    (y * dy).sum().backward()
    save("rms_norm", x=x, weight=weight, dy=dy, y=y, dx=x.grad, dweight=weight.grad)


def swiglu():
    (gate, up), dy = leaves(random(5, 33, size=4), random(5, 33)), random(5, 33)
    y = F.silu(gate) * up
    (y * dy).sum().backward()
    save("swiglu", gate=gate, up=up, dy=dy, y=y, dgate=gate.grad, dup=up.grad)


def activation():
    x, up, dy = random(5, 33, size=2), random(5, 33), random(5, 33)
    made = {}
    for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        plain, gate, factor = leaves(x, x, up)
        made[f"y_{name}"], made[f"gated_{name}"] = ACT2FN[name](plain), ACT2FN[name](gate) * factor
        ((made[f"y_{name}"] + made[f"gated_{name}"]) * dy).sum().backward()
        made |= {f"dx_{name}": plain.grad, f"dgate_{name}": gate.grad, f"dup_{name}": factor.grad}
    save("activation", x=x, up=up, dy=dy, **made)


def head():
    h, weight = leaves(random(7, 12), random(50, 12))
    targets = torch.randint(0, 50, (7,))
    losses = F.cross_entropy(h @ weight.T, targets, reduction="none")
    (0.3 * losses.sum()).backward()
    save("head", h=h, weight=weight, targets=targets, losses=losses, dh=h.grad, dweight=weight.grad)


def rope(kind):
    """One segment of 70 tokens, 2 heads of 16 channels; `dynamic` was trained on 32 positions, the others on 64 or any number."""
    length, heads, head_dim = 70, 2, 16
    config = LlamaConfig(hidden_size=heads * head_dim, num_attention_heads=heads, head_dim=head_dim,
                         max_position_embeddings=32 if kind == "dynamic" else 256,
                         rope_parameters={"rope_type": kind, **ROPES[kind]})
    if kind == "default":
        frequencies, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    angles = torch.arange(length).double()[:, None] * frequencies.double()
    angles = torch.cat((angles, angles), dim=-1)[None]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    (x,), dy = leaves(random(length, heads * head_dim)), random(length, heads * head_dim)
    split = x.view(length, heads, head_dim).transpose(0, 1)[None]
    y = apply_rotary_pos_emb(split, split, cos, sin)[0][0].transpose(0, 1).reshape(length, -1)
    (y * dy).sum().backward()
    save(f"rope_{kind}", x=x, dy=dy, y=y, dx=x.grad)


def adamw():
    """Six steps of torch.optim.AdamW with decay, clipped at 1.5: some of the gradients are beyond it, some are not."""
    values, gradients = random(37), random(6, 37) * torch.tensor([1.0, 0.01, 3.0, 0.2, 0.1, 1.0]).double()[:, None]
    gradients = gradients.float().double()
    parameter = torch.nn.Parameter(values.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.02, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    after, norms = [], []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        norms.append(torch.nn.utils.clip_grad_norm_([parameter], 1.5))
        optimizer.step()
        after.append(parameter.detach().clone())
    save("adamw", values=values, gradients=gradients, after=torch.stack(after), norms=torch.stack(norms))


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for make in (attention, rms_norm, swiglu, head, adamw):
        make()
    for kind in ROPES:
        rope(kind)
    activation()


if __name__ == "__main__":
    main()

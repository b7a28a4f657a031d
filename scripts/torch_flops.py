"""What torch counts for one LoRA training step: an outside check on wattune's own FLOP count.

    python scripts/torch_flops.py                  # writes tests/golden/torch_flops.json and prints it

Shapes: the tiny `gqa` golden with its committed adapter (r 4), and TinyStories-656K's shape with random weights (hidden 128,
2 layers, 8 heads, 4 kv, intermediate 384, vocab 2048, tied) and r 8 all-linear; batch 2, T 64, no padding, loss on every
position but the last, forward and backward, base frozen.

What FlopCounterMode counts, and where wattune's count may rightly differ:
  * matrix products alone, one multiply-add = 2 FLOPs (mm, addmm, bmm, sdpa); elementwise work is nothing, as in `Work::flops`.
  * attention is the full T x T square: no causal skipping, with eager (bmm) and sdpa alike. Heads count as num_attention_heads
    in both products; kv heads are repeated first, which is no FLOP.
  * sdpa's backward is counted as five products of that square (scores recomputed), eager's as four: 2.5 x and 2 x its forward.
  * lm_head runs on all B*T positions here, in wattune on the loss positions alone: `closed_form.lm_head_per_position` is what one
    costs forward, and again backward (dx; its frozen weight gets no gradient).
  * autograd gives no dx into the frozen embedding, so layer 0's first products (q, k, v and their A) have no dx there.
  * LoRA A and B are separate small products: per site and position 2r(in + out) forward, as much for dA and dB, and as much
    for the gradients passed on, of which layer 0's q, k, v need only B's (dA is made from it).
  * RoPE is elementwise: nothing.
`closed_form` derives every one of these terms from the shapes alone; the script fails where torch's total differs from it.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from reference import GOLDEN, ROOT, versions

BATCH, LENGTH = 2, 64
TINYSTORIES = dict(vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
                   num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=512, use_cache=False)


def gqa(attention):
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "gqa", attn_implementation=attention, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, GOLDEN / "gqa" / "adapter", is_trainable=True)


def tinystories(attention):
    config = transformers.LlamaConfig(**TINYSTORIES)
    config._attn_implementation = attention
    base = transformers.AutoModelForCausalLM.from_config(config)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, settings)


def by_op(counter):
    """{op: FLOPs}, largest first."""
    counts = {str(op).removeprefix("aten."): int(n) for op, n in counter.get_flop_counts()["Global"].items()}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def count(model):
    """FLOPs of one forward and one backward."""
    ids = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return {"total": forward.get_total_flops() + backward.get_total_flops(),
            "forward": {"total": forward.get_total_flops(), "by_op": by_op(forward)},
            "backward": {"total": backward.get_total_flops(), "by_op": by_op(backward)}}


def closed_form(c, r):
    """The same step from its shapes: 2mnk a product."""
    n, h = BATCH * LENGTH, c.hidden_size
    q, kv, inner = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.intermediate_size
    first = [(h, q), (h, kv), (h, kv)]  # (in, out) of q, k, v: in layer 0 their input needs no gradient
    sites = [*first, (q, h), (h, inner), (h, inner), (inner, h)]
    base = sum(2 * n * i * o for i, o in sites)
    lora_a, lora_b = sum(2 * n * i * r for i, _ in sites), sum(2 * n * r * o for _, o in sites)
    # Two products of the T x T square forward, q k^T and p v, in every head.
    square = 2 * 2 * BATCH * c.num_attention_heads * LENGTH * LENGTH * c.head_dim
    saved = sum(2 * n * i * (o + r) for i, o in first)  # layer 0: no dx through W or A
    layers = c.num_hidden_layers
    return {
        "base_linear_forward": layers * base, "base_linear_dx": layers * base, "lora_forward": layers * (lora_a + lora_b),
        "lora_dx": layers * (lora_a + lora_b), "lora_dw": layers * (lora_a + lora_b), "layer0_dx_not_needed": -saved,
        "attention_square_forward": layers * square, "lm_head_forward": 2 * n * h * c.vocab_size,
        "lm_head_dx": 2 * n * h * c.vocab_size, "lm_head_per_position": 2 * h * c.vocab_size,
    }


def attention_backward(terms, attention):
    """Eager keeps the scores (4 products of the square, 2 of them forward); sdpa recomputes them (5)."""
    return terms["attention_square_forward"] * (5 if attention == "sdpa" else 4) // 2


def case(make):
    result = {}
    for attention in ("eager", "sdpa"):
        model = make(attention)
        config, r = model.config, model.peft_config["default"].r
        counted, terms = count(model), closed_form(config, r)
        terms["attention_square_backward"] = attention_backward(terms, attention)
        expected = sum(v for k, v in terms.items() if k != "lm_head_per_position")
        result[attention] = counted | {"closed_form": terms, "difference": counted["total"] - expected}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "tie_word_embeddings")
    shape = {k: getattr(config, k) for k in sizes}
    return {"shape": shape | {"batch": BATCH, "length": LENGTH, "r": r, "targets": "all-linear"}, **result}


def main():
    os.chdir(ROOT)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    record = {"made_by": "scripts/torch_flops.py", "versions": versions(), "gqa": case(gqa), "tinystories": case(tinystories)}
    print(json.dumps(record, indent=1))
    for name in ("gqa", "tinystories"):
        for attention in ("eager", "sdpa"):
            assert record[name][attention]["difference"] == 0, (name, attention)
    Path("tests/golden/torch_flops.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

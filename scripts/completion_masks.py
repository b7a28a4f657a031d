"""Token ids and loss masks of prompt/completion data, by transformers' tokenizers: writes tests/golden/completion_masks.json.

    python scripts/completion_masks.py [ASSETS]      (transformers 5.23)

Prompt and completion are encoded as one text, then eos; a token is learned when it ends past the prompt. `trl_differs` counts the
examples where this is not TRL's mask (SFTTrainer: as many tokens are not learned as the prompt alone encodes to): only where one
token straddles the prompt's end, which TRL warns of and masks. Of ids and masks only the sha256 over all examples is kept: per
example its length, its ids (32 bit, little endian) and one byte of mask each.
"""

import hashlib
import json
import pathlib
import struct
import sys

from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "assets"
# Tokenizer folder, its eos token.
TOKENIZERS = [("tokenizers/gpt2", "<|endoftext|>"), ("tokenizers/phi-3-mini", "<|endoftext|>"), ("models/TinyStories-656K", "<|end_story|>")]
DATA = ["datasets/e2e_nlg/train.jsonl", "datasets/e2e_nlg/valid.jsonl"]


def masks(tokenizer, path):
    """(ids, mask, whether TRL's mask differs) of each record."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(record["prompt"])["input_ids"]
        both = tokenizer(record["prompt"] + record["completion"], return_offsets_mapping=True)
        ids = both["input_ids"] + [tokenizer.eos_token_id]
        mask = [int(end > len(record["prompt"])) for _, end in both["offset_mapping"]] + [1]
        trl = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
        differs = trl != mask
        # Where they differ, the prompt's last token grew past the prompt's end.
        assert differs == (ids[: len(prompt)] != prompt)
        yield ids, mask, differs


def main():
    golden = []
    for folder, eos in TOKENIZERS:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / folder / "tokenizer.json"), eos_token=eos)
        for data in DATA:
            digest, tokens, learned, examples, differing = hashlib.sha256(), 0, 0, 0, 0
            for ids, mask, differs in masks(tokenizer, ASSETS / data):
                digest.update(struct.pack(f"<I{len(ids)}I", len(ids), *ids) + bytes(mask))
                tokens, learned, examples, differing = tokens + len(ids), learned + sum(mask), examples + 1, differing + differs
            counts = {"examples": examples, "tokens": tokens, "loss_tokens": learned, "trl_differs": differing}
            golden.append({"tokenizer": folder, "eos": eos, "data": data} | counts | {"sha256": digest.hexdigest()})
    (ROOT / "tests" / "golden" / "completion_masks.json").write_text(json.dumps(golden, indent=1) + "\n")


main()

"""What the PEFT side of a comparison shares: completion records encoded as DESIGN section 5 says, and their loss.

Takes a model directory's tokenizer.json (through the `tokenizers` crate's own binding, so that ids are those of the Rust
side) and JSONL records {"prompt", "completion"}; returns (ids, loss mask) pairs, right-padded batches, and summed
negative log-likelihoods. Knows nothing of adapters or optimizers.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer


def eos_token_id(folder, tokenizer):
    """tokenizer_config.json's eos_token, else config.json's single eos_token_id."""
    path = Path(folder) / "tokenizer_config.json"
    token = json.loads(path.read_text()).get("eos_token") if path.exists() else None
    token = token["content"] if isinstance(token, dict) else token
    if token is not None:
        return tokenizer.token_to_id(token)
    eos = json.loads((Path(folder) / "config.json").read_text())["eos_token_id"]
    if not isinstance(eos, int):
        raise SystemExit(f"{folder}: eos is not one token: {eos}")
    return eos


class Encoder:
    """Turns a record into token ids and a loss mask."""

    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.eos = eos_token_id(folder, self.tokenizer)
        self.special = self.tokenizer.encode("").ids  # what the tokenizer adds by itself, e.g. [bos]

    def encode(self, prompt, completion):
        """One string, + eos. A token is a loss token when its end lies past the prompt's end; eos is one."""
        encoding = self.tokenizer.encode(prompt + completion)
        loss = [end > len(prompt) for _, end in encoding.offsets]  # offsets and len are both in characters
        loss[0] = False  # nothing comes before it
        return encoding.ids + [self.eos], loss + [True]


def read_records(path, limit=None):
    """The first `limit` records of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return records[:limit]


def encode_all(encoder, records, max_length=None):
    """(examples, counts): examples longer than `max_length` are cut at the end; those left with no loss token dropped."""
    examples, counts = [], {"truncated": 0, "dropped": 0}
    for record in records:
        ids, loss = encoder.encode(record["prompt"], record["completion"])
        if max_length is not None and len(ids) > max_length:
            ids, loss = ids[:max_length], loss[:max_length]
            counts["truncated"] += 1
        if any(loss):
            examples.append((ids, loss))
        else:
            counts["dropped"] += 1
    return examples, counts


def pad(examples, pad_id=0):
    """(input_ids, attention_mask, labels), each [B, longest], padded on the right; a label that does not count is -100."""
    width = max(len(ids) for ids, _ in examples)
    ids, seen, labels = [], [], []
    for tokens, loss in examples:
        rest = width - len(tokens)
        ids.append(tokens + [pad_id] * rest)
        seen.append([1] * len(tokens) + [0] * rest)
        labels.append([t if l else -100 for t, l in zip(tokens, loss)] + [-100] * rest)
    return torch.tensor(ids), torch.tensor(seen), torch.tensor(labels)


def summed_loss(model, examples, padded=True):
    """Sum over loss tokens of the negative log-likelihood in nats: one padded batch, or each example alone."""
    if not padded:
        return sum(summed_loss(model, [example]) for example in examples)
    ids, seen, labels = pad(examples)
    logits = model(input_ids=ids, attention_mask=seen).logits.float()
    predicted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(predicted, wanted, ignore_index=-100, reduction="sum")


def loss_tokens(examples):
    return sum(sum(loss) for _, loss in examples)


def tokens(examples):
    return sum(len(ids) for ids, _ in examples)


def evaluate(model, examples, batch=16):
    """Token-weighted mean loss over all examples, summed in double precision across batches."""
    total = 0.0
    with torch.no_grad():
        for i in range(0, len(examples), batch):
            total += summed_loss(model, examples[i : i + batch]).item()
    return total / loss_tokens(examples)

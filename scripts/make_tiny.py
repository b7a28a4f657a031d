"""Writes what `embedded:tiny` and the quickstart are made of: text, tokenizer, model configuration, task records.

    python scripts/make_tiny.py recipes/quickstart           # (re)write everything
    python scripts/make_tiny.py recipes/quickstart --check   # write nothing; fail where a file in the tree differs

Needs Python 3.10 and the `tokenizers` package (0.23). Everything follows from SEED: the same bytes on every machine. Writes

    pretraining/corpus.txt, pretraining/validation.txt   one paragraph per blank-line block (not kept in the tree)
    train.jsonl, validation.jsonl                        the quickstart's task: {prompt, completion}
    tiny/config.json, tokenizer.json, tokenizer_config.json

but no weights: `wattune train recipes/quickstart/pretrain.toml` makes those.
"""

import argparse
import json
import pathlib
import sys

from tiny_language import Random, hours, paragraph
from tiny_words import MACHINES, ROOMS

SEED = 20240607
CORPUS_PARAGRAPHS, VALIDATION_PARAGRAPHS = 18000, 150
TRAIN_RECORDS, VALIDATION_RECORDS = 1500, 150
END = "<|end|>"
VOCABULARY = 1024

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 352,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    # What quickstart/pretrain.toml trained on (report.json's training.tokens): the pretraining baseline reads it here.
    "pretraining_tokens": 6023101,
    "vocab_size": VOCABULARY,
}
TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "eos_token": END,
    "model_max_length": CONFIG["max_position_embeddings"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def paragraphs(rng, count):
    """`count` different paragraphs."""
    seen = {}
    while len(seen) < count:
        seen.setdefault(paragraph(rng))
    return list(seen)


def record(rng):
    """One record of the task: a meter reading in fields, and the sentence that says it, with the energy worked out."""
    (device, _), room = rng.pick(MACHINES), rng.pick(ROOMS)
    power, time = rng.between(1, 9), rng.between(1, 9)
    used = power * time
    verdict = "little" if used < 10 else "a fair amount" if used < 30 else "a lot"
    return (f"device: {device} | room: {room} | power: {power} kW | hours: {time} =>",
            f" The {device} in the {room} ran for {hours(time)} at {power} kW, so it used {used} kWh. That is {verdict}.")


def records(rng, count):
    """`count` records with different prompts."""
    seen = {}
    while len(seen) < count:
        prompt, completion = record(rng)
        seen.setdefault(prompt, completion)
    return list(seen.items())


def train_tokenizer(texts):
    """A byte-level BPE of VOCABULARY tokens, learned from the corpus alone; token 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False))
    assert tokenizer.get_vocab_size() == VOCABULARY and tokenizer.token_to_id(END) == CONFIG["eos_token_id"]
    return tokenizer.to_str(pretty=True) + "\n"


def files():
    """Relative path -> text."""
    texts = paragraphs(Random(SEED), CORPUS_PARAGRAPHS + VALIDATION_PARAGRAPHS)
    task = records(Random(SEED + 1), TRAIN_RECORDS + VALIDATION_RECORDS)
    blocks = lambda some: "\n\n".join(some) + "\n"
    lines = lambda some: "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in some)
    return {
        "pretraining/corpus.txt": blocks(texts[:CORPUS_PARAGRAPHS]),
        "pretraining/validation.txt": blocks(texts[CORPUS_PARAGRAPHS:]),
        "train.jsonl": lines(task[:TRAIN_RECORDS]),
        "validation.jsonl": lines(task[TRAIN_RECORDS:]),
        "tiny/config.json": json.dumps(CONFIG, indent=2) + "\n",
        "tiny/tokenizer.json": train_tokenizer(texts[:CORPUS_PARAGRAPHS]),
        "tiny/tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2) + "\n",
    }


def main():
    arguments = argparse.ArgumentParser(description="Writes the text, tokenizer, configuration and records of the quickstart.")
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("--check", action="store_true", help="compare with what stands there; write nothing")
    options = arguments.parse_args()
    differing = []
    for name, text in files().items():
        path = options.folder / name
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not name.startswith("pretraining/") and (not path.exists() or path.read_text(encoding="utf-8") != text):
            differing.append(str(path))
    if differing:
        sys.exit("differs from what scripts/make_tiny.py writes: " + ", ".join(differing))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes tests/golden/tokenizer_files.json: token ids of transformers' AutoTokenizer for every file that may add tokens or settings.

Usage: tokenizer_files.py [OUT]. Needs transformers. A case is a tokenizer.json (one of `bases`, changed by `tokenizer`), the other
files of a model directory by name, and the ids and decoded text of each text.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "tests/golden/tokenizer_files.json")


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("l", "l"), ("ll", "o"), ("Ġ", "w")]
    vocab = {piece: i for i, piece in enumerate(["<s>", "</s>", *letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece():
    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "don", "'", "t", ".", ",", "a", "##b", "cat", "!"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


BASES = {"byte_level": byte_level(), "word_piece": word_piece()}
SIZE = {name: tokenizer.get_vocab_size() for name, tokenizer in BASES.items()}
N = SIZE["byte_level"]
TEXTS = ["hello <im> world", "a<im>b", "a  <im>  b <u>c<u> im", "hello</s> <s>x", "<im><u> <IM>", "don't . a", ""]


def token(content, **flags):
    defaults = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(content=content, **{**defaults, **flags})


def entry(i, content, **flags):
    return dict(id=i, **token(content, **flags))


def marked(content, **flags):
    return dict(__type="AddedToken", **token(content, **flags))


FLAGS = ["lstrip", "rstrip", "single_word", "normalized"]
FAST = "PreTrainedTokenizerFast"
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


def cases():
    def case(name, tokenizer=None, base="byte_level", **files):
        config = {"tokenizer_class": FAST, **files.pop("config", {})}
        return {"name": name, "base": base, "tokenizer": tokenizer or {}, "files": {"tokenizer_config": config, **files}}

    yield case("nothing added")
    yield case("tokenizer.json alone", {"added_tokens": [entry(0, "<s>"), entry(1, "</s>"), entry(N, "<im>")]})
    for flag in FLAGS:
        for special in (True, False):
            flags = {flag: True, "special": special}
            yield case(f"tokenizer.json: {flags}", {"added_tokens": [entry(N, "<im>", **flags)]})
            yield case(f"added_tokens_decoder: {flags}", config={"added_tokens_decoder": {str(N): token("<im>", **flags)}})
            yield case(
                f"added_tokens_decoder over tokenizer.json: {flags}",
                {"added_tokens": [entry(N, "<im>")]},
                config={"added_tokens_decoder": {str(N): token("<im>", **flags)}},
            )
    yield case("added_tokens_decoder: content alone", config={"added_tokens_decoder": {str(N): {"content": "<im>"}}})
    yield case(
        "added_tokens_decoder: ids out of order",
        config={"added_tokens_decoder": {str(N + 1): token("<u>"), str(N): token("<im>")}},
    )
    yield case(
        "added_tokens_decoder beside tokenizer.json",
        {"added_tokens": [entry(N, "<im>")]},
        config={"added_tokens_decoder": {str(N + 1): token("<u>")}},
    )
    yield case("added_tokens_decoder: a word of the vocabulary", config={"added_tokens_decoder": {"1": token("</s>")}})
    yield case("additional_special_tokens", config={"additional_special_tokens": ["<im>", "<u>"]})
    yield case("additional_special_tokens: objects", config={"additional_special_tokens": [marked("<im>", rstrip=True)]})
    yield case("extra_special_tokens: list", config={"extra_special_tokens": ["<im>", "<u>"]})
    yield case("extra_special_tokens: named", config={"extra_special_tokens": {"image_token": "<im>", "video_token": "<u>"}})
    yield case("both lists", config={"extra_special_tokens": ["<im>"], "additional_special_tokens": ["<u>"]})
    yield case("named tokens", config={"pad_token": "<im>", "sep_token": "<u>", "eos_token": "</s>"})
    yield case("named token: an object", config={"pad_token": marked("<im>", lstrip=True, special=False)})
    yield case("named token: null", config={"pad_token": None, "cls_token": "<im>"})
    yield case("a token of the model's own name", config={"image_token": "<im>", "bos_token": "<s>"})
    yield case("a key that ends in _token and is a flag", config={"add_bos_token": True, "add_eos_token": True})
    yield case(
        "decoder, list and names together",
        config={"added_tokens_decoder": {str(N): token("<u>")}, "extra_special_tokens": ["<IM>"], "pad_token": "<im>"},
    )
    yield case("special_tokens_map.json: names", special_tokens_map={"pad_token": "<im>", "sep_token": "<u>"})
    yield case("special_tokens_map.json: objects", special_tokens_map={"pad_token": token("<im>", rstrip=True, special=False)})
    yield case("special_tokens_map.json: list", special_tokens_map={"additional_special_tokens": ["<im>", "<u>"]})
    yield case(
        "special_tokens_map.json over tokenizer_config.json",
        special_tokens_map={"pad_token": "<im>"},
        config={"pad_token": "<u>"},
    )
    yield case(
        "special_tokens_map.json beside added_tokens_decoder",
        special_tokens_map={"pad_token": "<im>"},
        config={"added_tokens_decoder": {str(N): token("<u>")}},
    )
    yield case("added_tokens.json", added_tokens={"<im>": N, "<u>": N + 1})
    yield case("added_tokens.json: ids out of order", added_tokens={"<u>": N + 1, "<im>": N})
    yield case("added_tokens.json: a special one", added_tokens={"<im>": N}, special_tokens_map={"pad_token": "<im>"})
    yield case(
        "added_tokens.json beside added_tokens_decoder",
        added_tokens={"<im>": N},
        config={"added_tokens_decoder": {str(N): token("<u>")}},
    )
    yield case("added_tokens.json beside tokenizer.json", {"added_tokens": [entry(N, "<u>")]}, added_tokens={"<u>": N, "<im>": N + 1})
    yield case("an empty content", {"added_tokens": [entry(N, "<im>")]}, config={"extra_special_tokens": ["", "<u>"]})
    yield case("split_special_tokens", {"added_tokens": [entry(N, "<im>"), entry(N + 1, "<u>", special=False)]}, config={"split_special_tokens": True})
    yield case("add_bos_token beside tokenizer.json", config={"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True})
    yield case("add_bos_token false beside a template", {"post_processor": BOS}, config={"bos_token": "<s>", "add_bos_token": False})
    yield case("add_prefix_space of a general class", config={"add_prefix_space": True})
    yield case("add_prefix_space of GPT2Tokenizer", config={"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"})
    yield case(
        "truncation and padding",
        {
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        },
    )
    for cleanup in (True, False):
        yield case(f"clean_up_tokenization_spaces {cleanup}: WordPiece", base="word_piece", config={"clean_up_tokenization_spaces": cleanup})
        yield case(f"clean_up_tokenization_spaces {cleanup}: BPE", config={"clean_up_tokenization_spaces": cleanup})
    yield case(
        "normalized token: WordPiece",
        base="word_piece",
        config={"added_tokens_decoder": {str(SIZE["word_piece"]): token("<IM>", normalized=True, special=False)}},
    )


def reference(case):
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = json.loads(BASES[case["base"]].to_str())
        tokenizer.update(case["tokenizer"])
        files = {"tokenizer": tokenizer, "config": {"model_type": "llama"}, **case["files"]}
        for name, content in files.items():
            Path(folder, f"{name}.json").write_text(json.dumps(content))
        loaded = AutoTokenizer.from_pretrained(folder)
        texts = []
        for text in TEXTS:
            ids = loaded(text).input_ids
            texts.append({"text": text, "ids": ids, "decoded": loaded.decode(ids)})
        return {**case, "class": type(loaded).__name__, "texts": texts}


def main():
    results = []
    for case in cases():
        try:
            results.append(reference(case))
        except Exception as error:
            print(f"{case['name']}: {type(error).__name__}: {str(error)[:150]}")
    bases = {name: json.loads(tokenizer.to_str()) for name, tokenizer in BASES.items()}
    golden = {"transformers": transformers.__version__, "bases": bases, "cases": results}
    OUT.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n")
    print(f"{len(results)} cases in {OUT}")


if __name__ == "__main__":
    main()

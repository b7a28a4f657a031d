"""Special tokens and chat templates that transformers finds among a tokenizer's files: writes tests/golden/chat_files.json.

    python scripts/chat_files.py        (transformers 5.24)
"""

import json
import pathlib
import tempfile

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
ADDED = {"__type": "AddedToken", "content": "<a>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
PLAIN = {key: value for key, value in ADDED.items() if key != "__type"}
FAST = "PreTrainedTokenizerFast"

CONFIGS = [
    ({"tokenizer_class": FAST}, None),
    ({"tokenizer_class": FAST, "bos_token": "<b>", "eos_token": "<e>", "add_bos_token": True}, None),
    ({"tokenizer_class": FAST, "bos_token": None, "eos_token": ADDED}, None),
    ({"tokenizer_class": FAST, "eot_token": "<t>", "image_token": ADDED}, None),
    ({"tokenizer_class": FAST, "extra_special_tokens": {"eot_token": "<t>", "boi": "<i>"}}, None),
    ({"tokenizer_class": FAST, "extra_special_tokens": ["<t>"], "additional_special_tokens": ["<u>"]}, None),
    ({"tokenizer_class": FAST, "additional_special_tokens": ["<u>"], "eos_token": "<e>"}, None),
    ({"tokenizer_class": FAST, "eos_token": "<e>"}, {"eos_token": "<m>", "pad_token": PLAIN}),
    ({"tokenizer_class": FAST, "eos_token": "<e>", "added_tokens_decoder": {"0": PLAIN | {"special": True}}}, {"eos_token": "<m>", "pad_token": "<p>"}),
    ({"tokenizer_class": FAST}, {"eot_token": "<t>", "eos_token": "<m>"}),
    ({"tokenizer_class": FAST}, {"extra_special_tokens": {"eot_token": "<t>"}}),
    ({"tokenizer_class": FAST, "mask_token": "<m>", "cls_token": "<c>", "sep_token": "<s>", "unk_token": "<u>", "pad_token": "<p>"}, None),
    ({"tokenizer_class": "LlamaTokenizerFast"}, None),
    ({"tokenizer_class": "LlamaTokenizer", "bos_token": "<b>"}, None),
    ({"tokenizer_class": "GPT2Tokenizer", "bos_token": None}, None),
    ({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<e>"}, None),
    ({"tokenizer_class": "GemmaTokenizerFast"}, None),
    ({"tokenizer_class": "GPTNeoXTokenizerFast"}, None),
    ({}, {"bos_token": "<b>"}),
]
LIST = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
TEMPLATES = [
    ({}, {"chat_template": "S"}),
    ({}, {"chat_template": LIST}),
    ({}, {"chat_template": LIST[1:]}),
    ({}, {"chat_template": LIST[:1]}),
    ({}, {"chat_template": {"default": "D", "tool_use": "T"}}),
    ({}, {"chat_template": LIST + [{"name": "default", "template": "D2"}]}),
    ({"default": "J"}, {"chat_template": "S"}),
    ({"default": "J"}, {"chat_template": LIST}),
    ({"default": "J", "tool_use": "JT"}, {}),
    ({"default": "J", "rag": "JR"}, {"chat_template": LIST}),
    ({"tool_use": "JT"}, {"chat_template": "S"}),
    ({}, {"chat_template": ""}),
]


def tokenizer(config, special_map=None, jinja=None):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        words = ["<a>", "<b>", "<e>", "<unk>", "x"]
        model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text("{}")
        if special_map is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
        for name, template in (jinja or {}).items():
            path = folder / "chat_template.jinja" if name == "default" else folder / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_text(template)
        return AutoTokenizer.from_pretrained(folder)


def chosen(tok, tools):
    try:
        return tok.get_chat_template(tools=tools)
    except ValueError:
        return None


def main():
    special = [
        {"tokenizer_config": config, "special_tokens_map": special, "expected": tokenizer(config, special).special_tokens_map} for config, special in CONFIGS
    ]
    templates = []
    for jinja, config in TEMPLATES:
        tok = tokenizer({"tokenizer_class": FAST} | config, jinja=jinja)
        templates.append({"jinja": jinja, "tokenizer_config": config, "expected": [chosen(tok, None), chosen(tok, [{}])]})
    path = ROOT / "tests" / "golden" / "chat_files.json"
    path.write_text(json.dumps({"special_tokens": special, "templates": templates}, indent=1) + "\n")


main()

"""Token ids by transformers' Qwen2 tokenizer, made from vocab.json and merges.txt: writes tests/golden/qwen_ids.json.

    python scripts/qwen_ids.py [ASSETS]      (transformers 5.23)
"""

import json
import pathlib
import sys

from transformers import AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
ASSETS = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "assets"
TEXTS = [
    "Hello, world! It's 2024 and we'll spend 3.14 kWh.",
    "<|im_start|>user\nHi  there\t\n\n  x<|im_end|>\n",
    "Zu\u0308rich, Z\u00fcrich; na\u0131ve \u2014 \u4f60\u597d\uff0c\u4e16\u754c \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "def f(x):\r\n    return x**2  # DON'T\n\n\n",
    "<tool_call>\n{\"name\": \"f\"}\n</tool_call> <|endoftext|>",
]


def main():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizers" / "qwen2.5-0.5b-instruct")
    golden = [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS]
    (ROOT / "tests" / "golden" / "qwen_ids.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


main()

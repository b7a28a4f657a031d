"""Small tables and how `datasets` reads them: writes tests/golden/tables.json.

    python scripts/tables.py      (pandas 3.1, pyarrow 26, datasets 5.2)

Each case is a file name, its bytes (one character a byte) and what `datasets.load_dataset("json" | "csv" | "parquet")` makes of
them: `rows`, or the class of the `error`. A .tsv is read with sep="\\t", as `datasets` does for a .tsv in a repository.
"""

import datetime
import decimal
import io
import json
import os
import pathlib
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
import datasets
import pyarrow as pa
import pyarrow.parquet as pq

SHOWN = ("text", "text.1", "prompt", "completion", "messages")
ROOT = pathlib.Path(__file__).resolve().parent.parent
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TWO = '{"text": "x"}', '{"text": "y"}'

TEXTS = {
    # JSON: how records are laid out
    "lines.jsonl": "\n".join(TWO) + "\n",
    "no_last_line_end.jsonl": "\n".join(TWO),
    "blank_lines.jsonl": f"\n{TWO[0]}\n\n  \n{TWO[1]}\n\n",
    "crlf.jsonl": "\r\n".join(TWO) + "\r\n",
    "cr.jsonl": "\r".join(TWO) + "\r",
    "byte_order_mark.jsonl": "\ufeff" + "\n".join(TWO),
    "list.jsonl": f"[{', '.join(TWO)}]",
    "list_over_lines.jsonl": "[\n" + ",\n".join(TWO) + "\n]\n",
    "list.json": f"[{', '.join(TWO)}]",
    "lines.json": "\n".join(TWO),
    "one_object.json": '{"text": "x"}',
    "one_pretty.json": '{\n  "text": "x"\n}\n',
    "one_pretty.jsonl": '{\n  "text": "x"\n}\n',
    "pretty.jsonl": '{\n  "text": "x"\n}\n{\n  "text": "y"\n}\n',
    "joined.jsonl": "".join(TWO),
    "empty_list.json": "[]",
    "empty.jsonl": "",
    "cut.jsonl": TWO[0] + '\n{"text": "y',
    "trailing_comma.json": f"[{TWO[0]}, {TWO[1]},]",
    "scalars.jsonl": '1\n"a"\n',
    # JSON: values
    "nan.jsonl": '{"text": "x", "score": NaN}\n{"text": "y", "score": 1.0}\n',
    "infinity.jsonl": '{"text": "x", "score": -Infinity}\n{"text": "y", "score": 1.0}\n',
    "null_first.jsonl": '{"prompt": "a", "completion": null}\n{"prompt": "b", "completion": "c"}\n',
    "key_missing_first.jsonl": '{"prompt": "a"}\n{"prompt": "b", "completion": "c"}\n',
    "doubled_key.jsonl": '{"text": "x", "text": "y"}\n',
    "escapes.jsonl": '{"text": "\\u00e9 \\ud83d\\ude00 \\n \\u0000"}\n',
    "lone_surrogate.jsonl": '{"text": "\\ud83d"}\n',
    "json_text.jsonl": json.dumps({"messages": json.dumps(CHAT)}) + "\n",
    # CSV
    "plain.csv": "text,n\nx,1\ny,2\n",
    "crlf.csv": "text,n\r\nx,1\r\ny,2\r\n",
    "cr.csv": "text,n\rx,1\ry,2\r",
    "byte_order_mark.csv": "\ufefftext,n\nx,1\n",
    "quotes.csv": 'text,n\n"a ""b"" c",1\n"x,\ny",2\n',
    "quote_inside.csv": 'text,n\na "b" c,1\n',
    "space_before_quote.csv": 'text,n\n1, "b"\n',
    "quote_all.csv": '"text","n"\n"x","1"\n',
    "blank_lines.csv": "text,n\n\nx,1\n\n\ny,2\n\n",
    "unclosed.csv": 'prompt,completion\na," b\nc, d\ne, f\n',
    "unclosed_header.csv": 'prompt,"completion\na,b\n',
    "text_after_quote.csv": 'text,n\n"a" b,1\n',
    "quote_not_doubled.csv": 'text,n\n"he said "hi" to me",1\n',
    "swallowed.csv": 'prompt,completion\na," b\nc, d\ne," f"\n',
    "doubled_column.csv": "text,text,n\nx,y,1\n",
    "unnamed_column.csv": ",text\n0,x\n1,y\n",
    "long_row.csv": "text,n\nx,1\ny,2,3\n",
    "short_row.csv": "text,n\nx,1\ny\n",
    "header_only.csv": "text,n\n",
    "empty.csv": "",
    "semicolon.csv": "prompt;completion\na;b\n",
    "one_column.csv": "text\nx\ny\n",
    "line_end_in_header.csv": '"te\nxt",n\nx,1\n',
    # TSV
    "plain.tsv": "text\tn\nx\t1\n",
    "quoted.tsv": 'prompt\tcompletion\na\t" he said ""hi"""\n',
    "quoted_tab.tsv": 'prompt\tcompletion\na\t"b\tc"\n',
    "quoted_lines.tsv": 'prompt\tcompletion\na\t"b\nc"\n',
    "open_quote.tsv": 'text\tn\n"open\t1\nx\t2\n',
    "inner_quote.tsv": 'text\tn\na "b" c\t1\n',
    "two_open_quotes.tsv": 'text\tn\n"open\t1\n"shut\t2\n',
    "commas.tsv": "prompt,completion\na,b\n",
}
ENCODED = {
    "utf16.jsonl": ("\n".join(TWO) + "\n", "utf-16"),
    "utf16le.jsonl": ("\n".join(TWO) + "\n", "utf-16-le"),
    "utf16be.csv": ("text,n\nx,1\n", "utf-16-be"),
    "utf16.csv": ("text,n\nx,1\n", "utf-16"),
    "utf32.json": (f"[{TWO[0]}]", "utf-32"),
    "cp1252.csv": ("text,n\nx,1\ncaf\u00e9 \u201ccr\u00e8me\u201d \u20ac,2\n", "cp1252"),
    "cp1252.jsonl": ('{"text": "x"}\n{"text": "caf\u00e9 \u201ccr\u00e8me\u201d d\u2019\u00e9t\u00e9"}\n', "cp1252"),
    "shift_jis.csv": ("text,n\n\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u65e5\u672c\u8a9e\u306e\u6587\u7ae0,1\n", "shift_jis"),
    "gbk.jsonl": ('{"text": "\u4e2d\u6587\u6570\u636e\u96c6\u7684\u4f8b\u5b50"}\n', "gbk"),
    "cp1251.csv": ("text,n\n\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440,1\n", "cp1251"),
}
OTHERS = {
    "pointer.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    "page.csv": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n",
    "page.json": b"<html>\n<body>Not found</body></html>\n",
}


def tables():
    """Parquet: every type beside a text column, with its extreme values."""
    two = {"text": ["x", "y"]}
    big, small = 2**63 - 1, -(2**63)
    columns = {
        "timestamp_ms": pa.array([big, small], pa.timestamp("ms")),
        "timestamp_us": pa.array([big, small], pa.timestamp("us", tz="UTC")),
        "timestamp_ns": pa.array([big, small], pa.timestamp("ns")),
        "date": pa.array([2**31 - 1, -(2**31)], pa.date32()),
        "time_ms": pa.array([2**31 - 1, -1], pa.time32("ms")),
        "time_us": pa.array([big, -1], pa.time64("us")),
        "duration": pa.array([big, small], pa.duration("us")),
        "decimal": pa.array([decimal.Decimal("-0.01"), None], pa.decimal128(38, 2)),
        "float_nan": pa.array([float("nan"), float("inf")], pa.float64()),
        "half": pa.array([1.5, None], pa.float16()),
        "binary": pa.array([b"\xff\xfe", b""], pa.binary()),
        "fixed": pa.array([b"\xff\xfe", None], pa.binary(2)),
        "uint64": pa.array([2**64 - 1, 0], pa.uint64()),
        "null": pa.array([None, None], pa.null()),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
        "map_of_dates": pa.array([[(datetime.date(1, 1, 1), 1)], None], pa.map_(pa.date32(), pa.int32())),
        "struct": pa.array([{"a": {"b": big}}, None], pa.struct([("a", pa.struct([("b", pa.timestamp("us"))]))])),
        "list": pa.array([[big], []], pa.list_(pa.timestamp("ms"))),
        "dictionary": pa.array(["u", "v"]).dictionary_encode(),
    }
    for name, column in columns.items():
        yield f"{name}.parquet", pa.table({**two, "other": column}), {}
    yield "all_columns.parquet", pa.table({**two, **columns}), {}
    yield "large_string.parquet", pa.table({"text": pa.array(["x", None], pa.large_string())}), {}
    yield "string_view.parquet", pa.table({"text": pa.array(["x", None], pa.string_view())}), {}
    yield "text_as_dictionary.parquet", pa.table({"text": pa.array(["u", "v", "u"]).dictionary_encode()}), {}
    yield "doubled_column.parquet", pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), {}
    yield "no_rows.parquet", pa.table({"text": pa.array([], pa.string())}), {}
    yield "lz4.parquet", pa.table(two), {"compression": "lz4"}
    yield "brotli.parquet", pa.table(two), {"compression": "brotli"}
    yield "delta.parquet", pa.table(two), {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    yield "data_page_v2.parquet", pa.table(two), {"data_page_version": "2.0"}
    yield "messages.parquet", pa.table({"messages": pa.array([CHAT, None])}), {}
    yield "messages_as_text.parquet", pa.table({"messages": [json.dumps(CHAT)], "tools": ["[]"]}), {}


def files():
    yield from ((name, text.encode()) for name, text in TEXTS.items())
    yield from ((name, text.encode(encoding)) for name, (text, encoding) in ENCODED.items())
    yield from OTHERS.items()
    for name, table, options in tables():
        sink = io.BytesIO()
        pq.write_table(table, sink, **{"compression": "none", "store_schema": name.startswith("duration"), "write_statistics": False, **options})
        yield name, sink.getvalue()


def plain(value):
    """As JSON: what JSON cannot say is shown as text."""
    return json.loads(json.dumps(value, default=str, allow_nan=True).replace("NaN", "null").replace("-Infinity", "null").replace("Infinity", "null"))


def read(name, content):
    kind = {"jsonl": "json", "tsv": "csv"}.get(extension := name.rsplit(".", 1)[1], extension)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_bytes(content)
        options = {"sep": "\t"} if extension == "tsv" else {}
        try:
            table = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=f"{folder}/cache", **options)
            shown = [name for name in table.column_names if name in SHOWN]
            return {"columns": table.column_names, "rows": table.num_rows, "values": {name: plain(table[name][:]) for name in shown}}
        except Exception as error:
            cause = error.__cause__ or error
            return {"error": f"{type(cause).__name__}: {cause}".splitlines()[0][:120]}


def main():
    datasets.logging.set_verbosity(50)
    datasets.disable_progress_bars()
    cases = [{"file": name, "content": content.decode("latin-1"), "reference": read(name, content)} for name, content in files()]
    target = ROOT / "tests/golden/tables.json"
    target.write_text(json.dumps({"cases": cases}, indent=0, ensure_ascii=False) + "\n")
    for case in cases:
        print(case["file"], json.dumps(case["reference"], ensure_ascii=False)[:200])


if __name__ == "__main__":
    main()

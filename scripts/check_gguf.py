"""A GGUF file of `wattune export` against three readers that know nothing of it: transformers, gguf-py and llama.cpp.

    python scripts/check_gguf.py MODEL_DIR FILE.gguf

MODEL_DIR is the model that was exported, with any adapter merged (`wattune merge`). Checks that

- transformers reads the file back with the loss of MODEL_DIR (1e-4 for F32; printed for other formats);
- every tensor in F16, BF16, Q8_0, Q4_0, Q5_0 or Q5_1 holds the bytes that gguf-py makes of MODEL_DIR's values;
- llama.cpp encodes a set of texts to the token ids of MODEL_DIR's tokenizer, and its greedy continuation of F32 and F16 files
  begins with the tokens of transformers.

Needs torch, transformers, gguf and xllamacpp (llama.cpp as a Python package); without the last its part is skipped by name.
"""

import json
import os
import sys
import urllib.error
import urllib.request

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "Once upon a time there was a little girl who liked to play outside.",
    "  two spaces, a tab\tand\n\n\nthree lines ",
    "It's 12345.678 o'clock; don't YOU'LL see? (a+b)*c == d_e[0]",
    "Grüße, naïve café – “quoted” … 你好,世界 🎉👩‍👩‍👧 Привет",
    "<s> <|endoftext|> [INST]",
    "",
    "x",
]
EXACT = {"F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1"}


def load_tokenizer(directory):
    path = os.path.join(directory, "tokenizer.json")
    if os.path.exists(path):  # AutoTokenizer rebuilds some families' from their class instead
        return PreTrainedTokenizerFast(tokenizer_file=path)
    return AutoTokenizer.from_pretrained(directory)


def check_loss(directory, path, tokenizer, kind):
    own = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    folder, name = os.path.split(os.path.abspath(path))
    try:
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    except (ValueError, RuntimeError) as error:
        print(f"SKIPPED: transformers does not read the file: {str(error).splitlines()[0]}")
        return own
    ids = tokenizer(TEXTS[0] + " " + TEXTS[2], return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for model in (own, read)]
    print(f"loss of transformers: {losses[0]:.6f} from the directory, {losses[1]:.6f} from the file")
    keys = ("head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types", "rope_parameters", "hidden_activation")
    values = lambda model: {key: getattr(model.config, key, None) for key in keys}
    misread = [key for key in keys if values(own)[key] != values(read)[key]]
    if misread:
        print(f"  not compared: transformers reads another {', '.join(misread)} from the file")
    else:
        assert kind != 0 or abs(losses[0] - losses[1]) < 1e-4, losses
    return own


def unpermute(values, heads):
    return values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def check_tensors(own, reader):
    config, state = own.config, own.state_dict()
    architecture = reader.fields["general.architecture"].contents()
    permutes = architecture in ("llama", "granite", "smollm3")
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    compared, kinds = 0, {}
    for name, values in state.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor = stored.pop(found, None)
        if tensor is None:
            assert found in (None, "output.weight") and config.tie_word_embeddings, f"{name} -> {found} is missing"
            continue
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        values = values.float().numpy()
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if permutes and ".q_proj." in name:
            values = unpermute(values, config.num_attention_heads)
        if permutes and ".k_proj." in name:
            values = unpermute(values, config.num_key_value_heads)
        if tensor.tensor_type.name == "F32":
            assert (tensor.data.reshape(values.shape) == values).all(), name
        elif tensor.tensor_type.name in EXACT:
            expected = gguf.quants.quantize(values, tensor.tensor_type).view(np.uint8).reshape(-1)
            assert (tensor.data.view(np.uint8).reshape(-1) == expected).all(), name
        else:
            back = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            error = np.abs(back.reshape(values.shape) - values).max() / np.abs(values).max()
            assert error < 0.2, (name, error)
        compared += 1
    assert set(stored) <= {"rope_freqs.weight"}, f"surplus tensors {sorted(stored)}"
    print(f"{compared} tensors hold what gguf-py makes of them: {kinds}")


def check_llama_cpp(own, path, tokenizer, greedy):
    try:
        import xllamacpp
    except ImportError:
        print("SKIPPED: llama.cpp (pip install xllamacpp)")
        return
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 256
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def post(place, body):
        request = urllib.request.Request(server.listening_address + place, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            return json.load(urllib.request.urlopen(request))
        except urllib.error.HTTPError as error:
            raise SystemExit(f"llama.cpp refuses {body}: {error.read().decode()}") from None

    wrong = 0
    for text in TEXTS:
        ours = post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        theirs = tokenizer(text).input_ids
        if ours != theirs:
            wrong += 1
            print(f"  {text!r}\n    llama.cpp    {ours}\n    transformers {theirs}")
    print(f"llama.cpp encodes {len(TEXTS) - wrong} of {len(TEXTS)} texts as transformers")
    prompt = tokenizer(TEXTS[0][:20], return_tensors="pt").input_ids
    expected = own.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1]:].tolist()
    answer = post("/completion", {"prompt": prompt[0].tolist(), "n_predict": 16, "temperature": 0, "return_tokens": True, "cache_prompt": False})
    pairs = zip(answer["tokens"], expected)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(answer["tokens"]), len(expected)))
    print(f"llama.cpp's greedy tokens equal transformers' for {same} of {len(expected)}: {answer['content']!r}")
    assert wrong == 0, "texts are encoded otherwise"
    assert not greedy or same >= 8, (answer["tokens"], expected)


def main():
    directory, path = sys.argv[1:3]
    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.file_type"].contents()
    tokenizer = load_tokenizer(directory)
    own = check_loss(directory, path, tokenizer, kind)
    check_tensors(own, reader)
    check_llama_cpp(own, path, tokenizer, greedy=kind in (0, 1, 32))
    print("PASS")


main()

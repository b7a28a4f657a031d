"""What both engines read: a model directory, a tokenizer whose words are the ids, rows of random ids, a recipe.

A shape without published weights here gets random ones of the usual size (root mean square 0.019), written once in bf16, so that
both engines read one file. A real directory is linked, not copied. The tokenizer stands in for the model's own: every row is then
full to the last token, and no training step's work depends on how text became ids.
"""

import json
import random
from pathlib import Path

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "bfloat16",
         "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}
# From the published config.json of HuggingFaceTB/SmolLM2-135M and TinyLlama/TinyLlama_v1.1 (both Apache-2.0).
SHAPES = {
    "smollm2-135m": {
        **LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "tie_word_embeddings": True},
    "tinyllama-1.1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False},
}
# Steps that the rows of a data file last before they come again.
STEPS_OF_ROWS = 8
# Numbers drawn at once: the driver must stay smaller than what it measures.
CHUNK = 1 << 20
# High bytes of bf16 numbers of either sign between 2^-7 and 2^-5; the low byte holds the exponent's last bit and the mantissa.
HIGH_BYTE = bytes(0x3C | (byte & 0x80) for byte in range(256))
ONE = b"\x80\x3f"


def tensors(config):
    """(name, shape) of every weight, as checkpoints call them."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, rows in [("q", hidden), ("k", key_value), ("v", key_value), ("o", hidden)]:
            yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def count(shape):
    product = 1
    for side in shape:
        product *= side
    return product


def write_weights(config, path):
    """model.safetensors: the header's length, the header, the tensors end to end."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors(config):
        begin, end = end, end + 2 * count(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = random.Random(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors(config):
            left = count(shape)
            if len(shape) == 1:
                file.write(ONE * left)
                continue
            while left:
                now = min(left, CHUNK)
                numbers = bytearray(2 * now)
                numbers[0::2] = draw.randbytes(now)
                numbers[1::2] = draw.randbytes(now).translate(HIGH_BYTE)
                file.write(numbers)
                left -= now


def write_tokenizer(vocab_size, folder):
    """Word N is id N; word 0 ends a text."""
    words = ", ".join(f'"{number}": {number}' for number in range(vocab_size))
    (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, '
        '"pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null, '
        '"model": {"type": "WordLevel", "unk_token": "0", "vocab": {' + words + "}}}\n")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "0"}\n')


def model_directory(model, folder):
    """(the directory for `model`, made under `folder` on first use, its configuration): a shape's name or a real directory's path."""
    made = folder / "models" / Path(model).name
    if not made.exists():
        making = folder / "making"
        making.mkdir(parents=True)
        if model in SHAPES:
            (making / "config.json").write_text(json.dumps(SHAPES[model], indent=1))
            write_weights(SHAPES[model], making / "model.safetensors")
        else:
            real = Path(model).resolve()
            for file in [real / "config.json", *real.glob("model*.safetensors*")]:
                (making / file.name).symlink_to(file)
        write_tokenizer(json.loads((making / "config.json").read_text())["vocab_size"], making)
        made.parent.mkdir(exist_ok=True)
        making.rename(made)
    return made, json.loads((made / "config.json").read_text())


def prompt_length(case):
    """Tokens at a row's beginning that have no loss by the mask."""
    return int(case.masked * case.seq)


def loss_tokens(case):
    """The first token of a row has nothing before it to be predicted from."""
    return case.batch * (case.seq - max(prompt_length(case), 1))


def data_file(case, vocab_size, folder):
    """Rows of `case.seq` tokens, the last of them the end of the text, which the tokenizer adds."""
    path = folder / f"{case.batch}x{case.seq}-of-{vocab_size}-masked-{prompt_length(case)}.jsonl"
    if not path.exists():
        draw = random.Random(1)
        with open(path, "w") as file:
            for _ in range(STEPS_OF_ROWS * case.batch):
                words = [str(draw.randrange(1, vocab_size)) for _ in range(case.seq - 1)]
                cut = prompt_length(case)
                prompt, rest = " ".join(words[:cut]), " ".join(words[cut:])
                record = {"prompt": prompt + " ", "completion": rest} if cut else {"text": rest}
                file.write(json.dumps(record) + "\n")
    return path


def recipe(case, steps, model, data):
    """The recipe's text: as the PEFT script, no clipping, a constant rate; no evaluation, no save before the end."""
    adapter = 'type = "none"' if case.full else f"r = {case.r}\nlora_alpha = {2 * case.r}"
    return f"""name = "bench"
[model]
id = {json.dumps(str(model))}
dtype = "{case.dtype}"
[adapter]
{adapter}
[data]
train = {json.dumps(str(data))}
format = "{'completion' if case.masked else 'text'}"
max_length = {case.seq}
packing = true
shuffle = false
[train]
steps = {steps}
micro_batch_size = {case.batch}
learning_rate = 1e-4
schedule = "constant"
warmup_steps = 0
max_grad_norm = 0
eval_every = 0
save_every = 0
save_total_limit = 1
keep_best = false
activation_checkpointing = "{'always' if case.recompute else 'never'}"
"""

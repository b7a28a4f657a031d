#!/usr/bin/env python3
"""Writes tests/golden/choices.json and tests/golden/text_metrics.json.

Log-likelihoods, acc and acc_norm by lm-evaluation-harness (lm-eval 0.4) on a local model; ROUGE by rouge-score, BLEU by sacrebleu.

    python scripts/eval_reference.py MODEL_DIR        # TinyStories-656K
"""

import json
import sys
from pathlib import Path

import numpy as np
import sacrebleu
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rouge_score.rouge_scorer import RougeScorer

GOLDEN = Path(__file__).parent.parent / "tests/golden"

RECORDS = [
    ("Once upon a time, there was a little", ["girl named Lily.", "engine of the economy.", "quarterly report."], 0),
    ("The dog was happy and wagged its", ["tail.", "philosophy.", "thunder and lightning storm."], 0),
    ("Tim was sad because he lost his", ["democracy.", "toy."], 1),
    ("The sun was shining and the birds were", ["singing.", "taxes.", "very very very very very small."], 0),
    ("Mom said, \"It is time to go to", ["bed.\"", "bankruptcy.\"", "orbit around the moon.\"", "the.\""], 0),
    ("Lily wanted to play in the", ["park.", "stock market.", "algorithm."], 0),
    ("He ate a big red", ["apple.", "apple and it was yummy.", "idea."], 1),
    ("They all lived happily ever", ["after.", "before.", "under the table."], 0),
    ("The cat saw a ", ["bird.", "mouse in the house.", "theorem."], 0),
    ("Ben had a green kite and Sue had a purple", ["kite.", "tax.", "kite that could fly very high."], 0),
    ("The frog jumped over the log and fell into the", ["water.", "spreadsheet.", "sky."], 0),
    ("Sam drew a picture with his new", ["crayons.", "government.", "noise of the river."], 0),
    ("It was raining, so they took an", ["umbrella.", "elephant to the theatre."], 0),
    ("She said thank", ["you.", "tree.", "you and gave him a big hug."], 2),
]

PAIRS = [
    ("The fan ran for 2 hours.", "The fan ran for 2 hours."),
    ("the cat sat on the mat", "The cat is on the mat."),
    ("A quick brown fox; jumps over it!", "The quick brown fox jumps over the lazy dog"),
    ("", "Nothing was written."),
    ("It costs $3.50, or 1,000 yen.", "It cost $3.50 (1,000 yen)."),
    ("well-known e.g. this", "a well-known one, e.g. that"),
]


def choices(model_dir):
    model = HFLM(pretrained=model_dir, device="cpu", batch_size=1, dtype="float32")
    # This tokenizer merges words: a prompt that ends within a token of prompt and choice leaves nothing to score.
    scored = lambda prompt, options: all(model._encode_pair(prompt, " " + choice)[1] for choice in options)
    kept = [record for record in RECORDS if scored(*record[:2])]
    assert len(kept) >= 6, len(kept)
    requests = [
        Instance("loglikelihood", {}, (prompt, " " + choice), index)
        for index, (prompt, options, _) in enumerate(kept)
        for choice in options
    ]
    flat = iter(model.loglikelihood(requests, disable_tqdm=True))
    records, acc, acc_norm = [], [], []
    for prompt, options, gold in kept:
        lls = [next(flat)[0] for _ in options]
        # lm_eval/api/task.py, multiple_choice: acc by the sum, acc_norm by the sum over the characters of the choice
        acc.append(float(np.argmax(lls) == gold))
        acc_norm.append(float(np.argmax(np.array(lls) / np.array([float(len(option)) for option in options])) == gold))
        records.append({"prompt": prompt, "choices": options, "label": gold, "loglikelihoods": lls})
    stderr = lambda hits: float(np.std(hits, ddof=1) / np.sqrt(len(hits)))
    return {
        "records": records,
        "acc": float(np.mean(acc)),
        "acc_norm": float(np.mean(acc_norm)),
        "acc_stderr": stderr(acc),
        "acc_norm_stderr": stderr(acc_norm),
    }


def text_metrics():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [scorer.score(reference, said) for said, reference in PAIRS]
    mean = lambda name: float(np.mean([score[name].fmeasure for score in rouge]))
    said, references = zip(*PAIRS)
    return {
        "pairs": PAIRS,
        "rouge1": mean("rouge1"),
        "rouge2": mean("rouge2"),
        "rougeL": mean("rougeL"),
        "bleu": sacrebleu.corpus_bleu(list(said), [list(references)]).score,
        "bleu_first_two": sacrebleu.corpus_bleu(list(said[:2]), [list(references[:2])]).score,
        "bleu_one_word": sacrebleu.corpus_bleu(["cat"], [["cat"]]).score,
    }


for name, value in (("choices", choices(sys.argv[1])), ("text_metrics", text_metrics())):
    (GOLDEN / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")

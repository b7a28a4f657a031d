"""Metrics of classifications by scikit-learn and of named entities by seqeval: the figures that train/metrics.rs is held to.

    python scripts/metrics_reference.py     # writes tests/golden/metrics.json

Needs scikit-learn and seqeval (the file names the versions used). Random true and predicted classes; some cases have classes that never
occur, or occur in one of the two alone.
"""

import json
from importlib.metadata import version
from pathlib import Path
from random import Random

import sklearn
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef
from seqeval import metrics as seqeval

TARGET = Path(__file__).resolve().parent.parent / "tests/golden/metrics.json"


def case(classes, true, predicted):
    return {
        "classes": classes, "true": true, "predicted": predicted,
        "confusion_matrix": confusion_matrix(true, predicted, labels=range(classes)).tolist(),
        "accuracy": accuracy_score(true, predicted),
        "f1_macro": f1_score(true, predicted, average="macro", zero_division=0),
        "f1_micro": f1_score(true, predicted, average="micro", zero_division=0),
        "matthews_correlation": matthews_corrcoef(true, predicted),
    }


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-LOC"]


def tagged(true, predicted):
    names = [[[TAGS[i] for i in record] for record in records] for records in (true, predicted)]
    return {"true": true, "predicted": predicted, "f1": float(seqeval.f1_score(*names)),
            "precision": float(seqeval.precision_score(*names, zero_division=0)), "recall": float(seqeval.recall_score(*names, zero_division=0))}


def main():
    random = Random(7)
    draw = lambda classes, n: [random.randrange(classes) for _ in range(n)]
    cases = [case(k, draw(k, n), draw(k, n)) for k, n in [(2, 30), (3, 40), (5, 60)]]
    agreeing = draw(3, 50)
    cases.append(case(3, agreeing, [c if random.random() < 0.8 else (c + 1) % 3 for c in agreeing]))
    cases.append(case(4, draw(2, 20), [3 if c == 1 else c for c in draw(2, 20)]))  # class 2 never, 3 predicted alone
    cases.append(case(2, [1] * 8, [1] * 8))
    cases.append(case(2, [0, 1, 1, 0], [0, 0, 0, 0]))
    agree = lambda record: [tag if random.random() < 0.8 else random.randrange(len(TAGS)) for tag in record]
    records = [draw(len(TAGS), n) for n in (1, 3, 12, 30, 40)]
    entities = [tagged(records, [draw(len(TAGS), len(r)) for r in records]), tagged(records, [agree(r) for r in records]),
                tagged([[0, 0]], [[0, 1]]), tagged([[1, 2, 2, 0, 4]], [[2, 2, 2, 0, 3]])]
    lines, tags = (",\n ".join(json.dumps(c) for c in list_of) for list_of in (cases, entities))
    TARGET.write_text(f'{{"scikit-learn": "{sklearn.__version__}", "seqeval": "{version("seqeval")}", "cases": [\n {lines}\n],\n'
                      f'"tags": {json.dumps(TAGS)}, "tagged": [\n {tags}\n]}}\n')


if __name__ == "__main__":
    main()

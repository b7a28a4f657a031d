"""Metrics of classifications by scikit-learn, of numbers by SciPy and of named entities by seqeval: the figures that train/metrics.rs is held to.

    python scripts/metrics_reference.py     # writes tests/golden/metrics.json

Needs scikit-learn and seqeval (the file names the versions used). Random true and predicted classes; some cases have classes that never
occur, or occur in one of the two alone.
"""

import json
from importlib.metadata import version
from pathlib import Path
from random import Random

import sklearn
from scipy.stats import pearsonr, spearmanr
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


def labelled(true, logits):
    """Records with 0 or 1 of each label; a label is predicted where its logit is above 0."""
    predicted = [[int(logit > 0) for logit in record] for record in logits]
    return {"true": true, "outputs": logits, "metrics": {
        "accuracy": accuracy_score(true, predicted), "f1_macro": f1_score(true, predicted, average="macro", zero_division=0),
        "f1_micro": f1_score(true, predicted, average="micro", zero_division=0)}}


def valued(true, predicted):
    metrics = {"pearson_correlation": pearsonr(true, predicted)[0], "spearman_correlation": spearmanr(true, predicted)[0]}
    constant = len(set(predicted)) == 1
    return {"true": [[x] for x in true], "outputs": [[x] for x in predicted],
            "metrics": {} if constant else {k: float(v) for k, v in metrics.items()}}


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
    # Quarters are exact in f32, and often equal.
    quarters = lambda n: [random.randrange(-20, 20) / 4 for _ in range(n)]
    labels = [labelled([draw(2, k) for _ in range(n)], [quarters(k) for _ in range(n)]) for k, n in [(3, 12), (4, 30)]]
    labels.append(labelled([[0, 1, 0], [0, 1, 1]], [[-1.0, 1.0, -1.0], [-1.0, 0.5, -0.5]]))  # label 0 never
    values = [valued(quarters(n), quarters(n)) for n in (8, 40)] + [valued([1.0, 2.0, 3.0], [0.5, 0.5, 0.5])]
    lines, tags, labels, values = (",\n ".join(json.dumps(c) for c in list_of) for list_of in (cases, entities, labels, values))
    TARGET.write_text(f'{{"scikit-learn": "{sklearn.__version__}", "seqeval": "{version("seqeval")}", "cases": [\n {lines}\n],\n'
                      f'"tags": {json.dumps(TAGS)}, "tagged": [\n {tags}\n],\n'
                      f'"labels": [\n {labels}\n],\n"values": [\n {values}\n]}}\n')


if __name__ == "__main__":
    main()

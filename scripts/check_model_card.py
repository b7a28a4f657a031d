"""Reads a generated model card with huggingface_hub and asserts that nothing changed on the way.

    cargo test --test report && python scripts/check_model_card.py

The card is the one that tests/report.rs writes from tests/fixtures/report.json; the values it must give back stand in
`card_facts()` there. Needs huggingface_hub (tested with 2.4.0). Another card: python scripts/check_model_card.py README.md
"""

import json
import pathlib
import re
import sys

from huggingface_hub import ModelCard

ROOT = pathlib.Path(__file__).resolve().parent.parent
GENERATED = ROOT / "target/tmp/report/README.md"


def check_form(card: ModelCard) -> dict:
    """What holds for every card."""
    data = card.data.to_dict()
    emissions = data["co2_eq_emissions"]
    assert type(emissions["emissions"]) in (int, float), emissions
    assert all(isinstance(value, str) for key, value in emissions.items() if key != "emissions"), emissions
    assert data["library_name"] in ("peft", "transformers"), data
    assert all(isinstance(tag, str) for tag in data["tags"]), data
    for code in re.findall(r"```python\n(.*?)```", card.text, re.S):
        compile(code, "card", "exec")
    # The card written by the library itself reads the same.
    assert ModelCard(str(card)).data.to_dict() == data
    return data


def check_fixture(data: dict) -> None:
    report = json.loads((ROOT / "tests/fixtures/report.json").read_text())
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["tuetschek/e2e_nlg"]
    assert "lora" in data["tags"]
    emissions = data["co2_eq_emissions"]
    assert emissions["emissions"] == report["carbon"]["gco2e"]
    assert emissions["training_type"] == "fine-tuning"
    assert emissions["geographical_location"] == 'no: "anywhere"\n24_700_000'
    assert emissions["hardware_used"] == "Example CPU 2.0 GHz, 2 threads"


def main() -> None:
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GENERATED
    data = check_form(ModelCard.load(path))
    if path == GENERATED:
        check_fixture(data)
    print(f"{path.name}: valid, {data['co2_eq_emissions']['emissions']} gCO2e")


if __name__ == "__main__":
    main()

"""Reads a generated emissions.csv with pandas and lets CodeCarbon append to it.

    cargo test --test report && python scripts/check_emissions.py

The file is the one that tests/report.rs writes from tests/fixtures/report.json. Needs codecarbon (tested with 3.3.2), which
brings pandas; where dash is installed too, CodeCarbon's board loads it as well. Another file: python scripts/check_emissions.py emissions.csv
"""

import json
import pathlib
import shutil
import sys
import tempfile

import pandas as pd
from codecarbon.output_methods.emissions_data import EmissionsData
from codecarbon.output_methods.file import FileOutput

ROOT = pathlib.Path(__file__).resolve().parent.parent
GENERATED = ROOT / "target/tmp/report/emissions.csv"
COLUMNS = list(EmissionsData.__dataclass_fields__)
# What its board sums and rounds: it must be there, as numbers.
REQUIRED = ["duration", "emissions", "energy_consumed"]


def check_form(table: pd.DataFrame) -> None:
    """What holds for every file: the columns in their order, and numbers where CodeCarbon has numbers."""
    assert list(table.columns) == COLUMNS, set(table.columns) ^ set(COLUMNS)
    for name, field in EmissionsData.__dataclass_fields__.items():
        if field.type in (float, "float"):
            assert pd.api.types.is_numeric_dtype(table[name]), name
    assert table[REQUIRED].notna().all().all()
    rate = table.emissions / table.duration
    assert ((table.emissions_rate - rate).abs() <= 1e-9 * rate).all()


def check_fixture(table: pd.DataFrame) -> None:
    """Kilograms are kilowatt-hours, the facility's overhead included, times the grid's intensity."""
    carbon = json.loads((ROOT / "tests/fixtures/report.json").read_text())["carbon"]
    expected = table.energy_consumed[0] * carbon["gco2e_per_kwh"] / 1000
    assert abs(table.emissions[0] - expected) < 1e-12, (table.emissions[0], expected)
    assert table.pue[0] == carbon["pue"]


def check_append(path: pathlib.Path) -> None:
    """CodeCarbon accepts the header and appends a row of its own instead of moving the file away."""
    row = {name: 1.0 if field.type in (float, "float") else "x" for name, field in EmissionsData.__dataclass_fields__.items()}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, pathlib.Path(folder) / "emissions.csv")
        FileOutput("emissions.csv", folder).out(EmissionsData(**row), None)
        after = pd.read_csv(pathlib.Path(folder) / "emissions.csv")
        assert len(after) == len(pd.read_csv(path)) + 1, "CodeCarbon replaced the file"
        assert after.emissions.iloc[-1] == 1.0 and after.os.iloc[-1] == "x"


def check_board(table: pd.DataFrame) -> str:
    """CodeCarbon's board (carbonboard) finds the project and sums it up; needs dash."""
    try:
        from codecarbon.viz.data import Data
    except ImportError as missing:
        return f"not tried: {missing}"
    project = table.project_name[0]
    rows = Data.get_project_data(table, project).data
    summary = Data.get_project_summary(rows)
    assert len(rows) == len(table), (len(rows), len(table))
    for key in ("duration", "emissions", "energy_consumed"):
        assert abs(summary["total"][key] - table[key].sum()) <= 1e-12 * table[key].sum(), key
    assert summary["last_run"]["timestamp"] == table.timestamp.iloc[-1]
    return "loaded"


def main() -> None:
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GENERATED
    table = pd.read_csv(path)
    check_form(table)
    check_append(path)
    if path == GENERATED:
        check_fixture(table)
    print(f"{path.name}: {len(table)} row, {table.emissions.sum()} kgCO2e; CodeCarbon's board: {check_board(table)}")


if __name__ == "__main__":
    main()

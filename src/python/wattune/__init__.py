"""wattune: the program (`wattune` on the path, `python -m wattune`), and its energy budget for PyTorch trainers."""

from typing import Any

__all__ = ["EnergyBudget", "Meter", "binary"]


def __getattr__(name: str) -> Any:
    # transformers is needed by the callback alone.
    if name == "EnergyBudget":
        from .budget import EnergyBudget

        return EnergyBudget
    if name in ("Meter", "binary"):
        from . import meter

        return getattr(meter, name)
    raise AttributeError(f"module 'wattune' has no attribute '{name}'")

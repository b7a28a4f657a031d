"""An energy budget as a callback of transformers' Trainer, and of what is built on it (TRL, sentence-transformers)."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .meter import Meter


class EnergyBudget(TrainerCallback):
    """Stops training before its budget is passed, and writes what it cost.

    >>> Trainer(..., callbacks=[EnergyBudget("5 Wh", out="runs/mine")])

    A step is admitted while what is spent, the predicted cost of the step (mean and three deviations of the last twenty) and the
    largest evaluation and save seen so far fit in the budget: on a sensor a prediction, so a last step that costs more than any
    before it can pass the budget by the difference. The first step is never refused.

    `budget`: one limit or several, of energy ("5 Wh"), carbon ("2 g") or time ("10 min").
    `out`: directory of ledger.jsonl and emissions.csv; the Trainer's `output_dir` where it is None.
    `grid`, `pue`, `meter`, `profile`: as the keys of a wattune recipe. `device`: "cpu", "cuda:N", or None: the Trainer's.

    The energy of evaluations and saves is charged to their phases. Logs gain `energy/joules`, `energy/joules_per_token` (where the
    Trainer counts tokens) and `budget/left`. One process on one device; several are refused.
    """

    def __init__(
        self,
        budget: str | list[str] | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        grid: str | float = "world",
        pue: float = 1.0,
        device: str | None = None,
        meter: str | None = None,
        profile: str | None = None,
    ) -> None:
        self._options = {"budget": budget, "grid": grid, "pue": pue, "meter": meter, "profile": profile}
        self._out = out
        self._device = device
        self._meter: Meter | None = None
        self.stop_reason: str | None = None
        """`budget:energy` and the like where the budget ended the run."""
        self.total_j: float = 0.0
        """Energy of all windows, joules."""
        self.gco2e: float = 0.0
        """Their emissions, grams."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            raise ValueError(
                f"EnergyBudget meters one process on one device, and {args.world_size} train: "
                "start one process with CUDA_VISIBLE_DEVICES=0"
            )
        device = self._device
        if device is None:
            device = f"cuda:{args.device.index or 0}" if args.device.type == "cuda" else "cpu"
        out = args.output_dir if self._out is None else self._out
        self._meter = Meter(device=device, out=out, **self._options)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0 and self._meter is not None and self._meter.last is None:
            self._end("load", state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        return self._stop(self._end("train", state), control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        return self._stop(self._end("eval", state), control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        return self._stop(self._end("save", state), control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or self._meter is None or self._meter.last is None:
            return
        last = self._meter.last
        ours = {"energy/joules": last["total_j"]}
        if state.num_input_tokens_seen:
            ours["energy/joules_per_token"] = last["total_j"] / state.num_input_tokens_seen
        if "budget_spent" in last:
            ours["budget/left"] = 1.0 - last["budget_spent"]
        # The Trainer has put a copy into its history before it calls.
        logs.update(ours)
        if state.log_history:
            state.log_history[-1].update(ours)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._meter is not None:
            self._end("save", state)
            self._meter.close()
            self._meter = None

    def _end(self, phase: str, state: TrainerState) -> dict[str, Any]:
        # Evaluation and save without training: nothing is metered.
        if self._meter is None:
            return {}
        window = self._meter.end(phase, state.global_step)
        self.total_j = window["total_j"]
        self.gco2e = window["gco2e"]
        return window

    def _stop(self, window: dict[str, Any], control: TrainerControl) -> TrainerControl:
        if window.get("stop"):
            self.stop_reason = f"budget:{window['stop']}"
            control.should_training_stop = True
        return control

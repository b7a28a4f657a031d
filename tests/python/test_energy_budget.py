"""EnergyBudget under transformers' Trainer on a CPU. Run by `tests/end_to_end/python.rs`, or by

    WATTUNE_BINARY=target/debug/wattune PYTHONPATH=src/python python tests/python/test_energy_budget.py
"""

import csv
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import wattune
from wattune.meter import Meter, MeterError


def trainer(folder, callback, steps):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    records = [{"input_ids": torch.arange(16) % 64, "labels": torch.arange(16) % 64} for _ in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=5,
        save_steps=10,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        include_num_input_tokens_seen=True,
    )
    return Trainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=records,
        eval_dataset=records[:4],
        callbacks=[callback],
    )


class EnergyBudgetTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_a_run_ends_by_itself_and_its_ledger_adds_up(self):
        # Timed energy: rated power of the profile, 12 W at full load of a Raspberry Pi 5's four cores, by wall time.
        callback = wattune.EnergyBudget("1 kWh", out=self.folder / "run", meter="timed", profile="raspberry-pi-5")
        run = trainer(self.folder / "out", callback, 12)
        run.train()
        self.assertEqual(run.state.global_step, 12)
        self.assertIsNone(callback.stop_reason)
        lines = [json.loads(line) for line in (self.folder / "run/ledger.jsonl").read_text().splitlines()]
        entries = lines[1:]
        phases = [entry["phase"] for entry in entries]
        self.assertEqual(phases[0], "load")
        self.assertEqual(phases.count("train"), 12)
        # Some versions of transformers evaluate after the last step too.
        evaluated = [entry["step"] for entry in entries if entry["phase"] == "eval"]
        self.assertEqual(evaluated[:2], [5, 10])
        self.assertEqual([entry["step"] for entry in entries if entry["phase"] == "train"], list(range(1, 13)))
        self.assertTrue(all(entry["energy_j"]["counted"] is None for entry in entries))
        total = sum(entry["energy_j"]["timed"] for entry in entries)
        self.assertAlmostEqual(total, callback.total_j, places=5)
        # Power is the same in every window, so energy follows wall time.
        watts = {round(entry["energy_j"]["timed"] / entry["wall_s"], 2) for entry in entries if entry["wall_s"] > 1e-3}
        self.assertLessEqual(max(watts) - min(watts), 0.02)
        with open(self.folder / "run/emissions.csv") as file:
            (row,) = csv.DictReader(file)
        self.assertAlmostEqual(float(row["energy_consumed"]), callback.total_j / 3.6e6, places=12)
        self.assertAlmostEqual(float(row["emissions"]), callback.gco2e / 1e3, places=12)
        logs = [log for log in run.state.log_history if "energy/joules" in log]
        self.assertTrue(logs and all(0 < log["budget/left"] <= 1 for log in logs))

    def test_training_stops_before_a_time_budget(self):
        callback = wattune.EnergyBudget(["2 s", "1 kWh"], meter="timed", profile="raspberry-pi-5")
        run = trainer(self.folder / "out", callback, 100_000)
        run.train()
        self.assertEqual(callback.stop_reason, "budget:time")
        self.assertTrue(0 < run.state.global_step < 100_000)
        entries = [json.loads(line) for line in (self.folder / "out/ledger.jsonl").read_text().splitlines()][1:]
        steps = [entry["wall_s"] for entry in entries if entry["phase"] in ("train", "load")]
        self.assertLess(sum(steps), 2.0)
        self.assertGreater(sum(entry["wall_s"] for entry in entries), 1.0)

    def test_what_the_program_refuses_is_raised(self):
        with self.assertRaisesRegex(MeterError, "apples"):
            Meter("5 apples")
        with Meter("5 Wh", meter="timed") as meter:
            self.assertRaisesRegex(MeterError, "ends no window", meter.end, "rest")

    def test_the_module_runs_the_program(self):
        said = subprocess.run([sys.executable, "-m", "wattune", "--version"], capture_output=True, text=True, check=True)
        self.assertTrue(said.stdout.startswith("wattune "))


if __name__ == "__main__":
    unittest.main()

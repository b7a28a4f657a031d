"""Windows of energy from `wattune meter --json`, a subprocess. Needs nothing but Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any


def binary() -> str:
    """The path of the program: `WATTUNE_BINARY`, else that of this installation, else the one on the path.

    Raises FileNotFoundError where there is none.
    """
    named = os.environ.get("WATTUNE_BINARY")
    if named:
        return named
    name = "wattune" + (sysconfig.get_config_var("EXE") or "")
    user = sysconfig.get_preferred_scheme("user")
    folders = [
        Path(sysconfig.get_path("scripts")),
        Path(sysconfig.get_path("scripts", vars={"base": sys.base_prefix})),
        Path(sysconfig.get_path("scripts", scheme=user)),
        # `pip install --target DIR`
        Path(__file__).parent.parent / "bin",
    ]
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    found = shutil.which("wattune")
    if found is None:
        raise FileNotFoundError(
            f"the program `{name}` is in none of {', '.join(map(str, folders))} and not on the path; "
            "reinstall it by `pip install --force-reinstall wattune`, or set WATTUNE_BINARY"
        )
    return found


class MeterError(RuntimeError):
    """What the program said before it ended."""


class Meter:
    """Open meters; each `end` closes a window and opens the next.

    `budget` is one limit or several, each with its unit ("5 Wh", "2 g", "10 min"). With `out`, a directory, the windows are
    written to its ledger.jsonl and the sums to its emissions.csv.
    """

    def __init__(
        self,
        budget: str | list[str] | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        grid: str | float = "world",
        pue: float = 1.0,
        device: str = "cpu",
        meter: str | None = None,
        profile: str | None = None,
    ) -> None:
        budgets = [budget] if isinstance(budget, str) else list(budget or [])
        command = [binary(), "meter", "--json", "--quiet", "--grid", str(grid), "--pue", str(pue), "--device", device]
        for limit in budgets:
            command += ["--budget", limit]
        for name, value in (("--out", out), ("--meter", meter), ("--profile", profile)):
            if value is not None:
                command += [name, os.fspath(value)]
        # A session of its own: Ctrl-C goes to the trainer, which ends the meter.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        opened = self._line()
        self.meter: str = opened["meter"]
        """measured or timed: the meter that the budget binds on."""
        self.why: str | None = opened["why"]
        """Why the counters do not decide, with the remedy."""
        self.last: dict[str, Any] | None = None
        """The last window."""

    def end(self, phase: str, step: int = 0) -> dict[str, Any]:
        """Ends the window as part of `phase`: load, train, eval or save.

        Returns `energy_j` and `wall_s` of the window, `total_j` and `gco2e` of all, `budget_spent` (a fraction) and `stop`: the
        limit that another step, with the largest evaluation and save seen so far after it, would pass.
        """
        try:
            self._process.stdin.write(f"{phase} {step}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error() from None
        self.last = self._line()
        return self.last

    def close(self) -> None:
        """Writes the files and ends the program. A second call does nothing."""
        if self._process.stdin.closed:
            return
        self._process.stdin.close()
        said = self._process.stderr.read()
        if self._release() != 0:
            raise MeterError(said.strip())

    def _line(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        window = json.loads(line) if line.startswith("{") and line.endswith("}\n") else None
        if window is None or "error" in window:
            raise self._error()
        return window

    def _error(self) -> MeterError:
        self._process.kill()
        said = self._process.stderr.read().strip()
        status = self._release()
        return MeterError(said or f"`wattune meter` ended with status {status}")

    def _release(self) -> int:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        return self._process.wait()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

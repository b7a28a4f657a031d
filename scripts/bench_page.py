"""The Markdown page of a benchmark: machine, versions, peaks, each round's figures, ratios. Takes what was measured, measures nothing."""

import datetime
import hashlib
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

# Instruction sets that decide how fast matrices are multiplied, as Linux calls them.
INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile",
                    "asimd", "sve", "bf16", "i8mm")


def giga(rate):
    return f"{rate / 1e9:,.0f}"


def mega(count):
    return f"{count / 1e6:,.0f}"


def seconds(value):
    """Three significant digits or more."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def median(values):
    return statistics.median(values)


def machine():
    """(label, text) of the machine, as far as the system tells."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, flags = platform.processor() or platform.machine(), set()
    if Path("/proc/cpuinfo").exists():
        fields = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        flags = set(fields.get("flags", fields.get("Features", "")).split())
        name = fields.get("model name", name)
        if "cpu family" in fields:
            name += f" (family {fields['cpu family']}, model {fields['model']})"
    yield "processor", name
    yield "cores this process may use", f"{cores} of {os.cpu_count()}"
    yield "instruction sets", ", ".join(name for name in INSTRUCTION_SETS if name in flags) or "not known"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"
    yield "system", f"{platform.system()} {platform.release()}"


def versions(args, root, reference):
    """(label, text) of what was compared. The checkout may have moved on since the binary was built: its hash is the binary's own."""

    def git(*words):
        done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = ", with changes not committed" if git("status", "--porcelain", "--untracked-files=no") else ""
    with open(args.binary, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    version = subprocess.run([args.binary, "--version"], capture_output=True, text=True).stdout.strip()
    yield "wattune", f"{version}, checkout {git('rev-parse', '--short=12', 'HEAD') or 'not known'}{changed}, binary sha256 {digest[:12]}"
    yield from reference.items()
    yield "Python of the driver", platform.python_version()


def repeat(args):
    """The command as given, without paths that hold on one machine alone."""
    words = [*args.setups, "--rounds", args.rounds, "--seconds", f"{args.seconds:g}"]
    for text in args.case or []:
        words += ["--case", text]
    words += ["--no-torch"] if args.no_torch else []
    return ("" if args.no_torch else "PY=PYTHON ") + shlex.join(["scripts/bench", *map(str, words)])


METHOD = """\
A wattune case is two whole `wattune train` processes, of few and of many steps (the column "steps"); a step's time is the difference of their
wall times over the difference of their steps. Nothing is self-reported but the FLOPs, which are counted, not timed. A torch case is the
median of its steps after the first three, timed by `scripts/peft_bench_step.py` itself: starting, compiling and slow steps are left out, in its
favour. Both read one weights file and rows of random ids, full to the last token; a loss at every token unless said; AdamW, no clipping.

- **peak RSS**: of the whole process, as the system says (`ru_maxrss`); weights mapped from the file count too. Median of rounds; the first round of a
  compiled case may compile, later ones find it in torch's cache.
- **to the first forward**: from the start of the process. wattune: until its ledger shows, to a reader outside, that loading is done; median
  of rounds, each the mean of both runs; the tokens are in its cache. torch: by its own clock, importing included.
- **share of the peak**: executed FLOP/s (matrix products and attention, difference of the two runs) over the best rate of a large
  matrix product in that precision, with as many threads, measured in the same round: the higher of torch's (`scripts/torch_peak.py`: the
  best single product of sides 256 to 4096) and wattune's own (`wattune calibrate`: the same, by the product that `calibrate` uses).
- **first loss**: before any update, on other random ids of the same kind: near to each other where both compute the same function."""


def document(args, root, reference, load, sections):
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    facts = [*machine(), *versions(args, root, reference), ("load average before", f"{load[0]:.2f}, {load[1]:.2f}, {load[2]:.2f} (1, 5, 15 min)")]
    floor = f"A child's peak RSS cannot read lower than the driver's own, {mega(driver)} MB."
    parts = [f"# {', '.join(args.setups)}: {datetime.date.today()}", f"To repeat:\n\n```sh\n{repeat(args)}\n```",
             table(["machine and versions", ""], facts), f"## How it was measured\n\n{METHOD}\n\n{floor}", *sections]
    return "\n\n".join(parts) + "\n"


def section(setup, rounds):
    """One setup: peaks, cases, ratios."""
    figures = [found for found, _ in rounds]
    parts = [f"## {setup.title}", peaks([found for _, found in rounds]), cases(setup.cases, figures)]
    held = [row for row in (ratio(one, figures) for one in setup.ratios) if row]
    if held:
        parts.append(table(["ratio", "each round", "median", "goal"], held))
    return "\n\n".join([*parts, *adapters(setup.cases, figures)])


def peaks(rounds):
    rows = []
    for threads in rounds[0]:
        for who, precision in rounds[0][threads]:
            rates = [found[threads][who, precision] for found in rounds]
            by = {"torch": {"f32": "torch (MKL)", "bf16": "torch (oneDNN)"}[precision], "wattune": "wattune calibrate"}[who]
            rows.append([by, precision, threads or "all", " ".join(map(giga, rates)), giga(max(rates))])
    return table(["large matrix product", "precision", "threads", "GFLOP/s, each round", "best"], rows)


def cases(listed, figures):
    head = ["case", "step, s, each round", "steps", "tokens/s, each round", "tokens/s, median", "GFLOP a step", "GFLOP/s", "share of the peak",
            "peak RSS, MB", "to the first forward, s", "first loss"]
    rows = []
    for case in listed:
        found = [one[case.label] for one in figures]
        rows.append([
            case.label, " ".join(seconds(one.step_s) for one in found), found[-1].steps, " ".join(f"{one.tokens_s:,.0f}" for one in found),
            f"**{median([one.tokens_s for one in found]):,.0f}**", *work(found), mega(median([one.peak_rss for one in found])),
            f"{median([one.ready_s for one in found]):.2f}", f"{found[0].first_loss:.3f}"])
    return table(head, rows)


def work(found):
    """A step's FLOPs, their rate and its share of the peak, where they are counted."""
    if found[0].flops is None:
        return ["", "", ""]
    share = median([one.flops / one.step_s / one.peak_flops_s for one in found])
    return [f"{found[0].flops / 1e9:,.2f}", giga(median([one.flops / one.step_s for one in found])), f"{share:.0%}"]


def ratio(wanted, figures):
    """The row of one ratio, None where one of its cases was left out."""
    under = [label for label in wanted.under if label in figures[0]]
    if wanted.over not in figures[0] or not under:
        return None
    best = max if wanted.of == "tokens_s" else min
    values = [getattr(one[wanted.over], wanted.of) / best(getattr(one[label], wanted.of) for label in under) for one in figures]
    missing = len(wanted.under) - len(under)
    title = wanted.title + (f" ({missing} of {len(wanted.under)} left out)" if missing else "")
    return [title, " ".join(f"{value:.2f}" for value in values), f"**{median(values):.2f}**", wanted.goal]


def adapters(listed, figures):
    """A line for each precision that ran with several thread counts: are the adapter's bytes the same?"""
    for dtype in sorted({case.dtype for case in listed if case.threads}):
        of = [case for case in listed if case.threads and case.dtype == dtype and case.engine == "wattune"]
        counts = {one[case.label].steps for case in of for one in figures}
        digests = {one[case.label].adapter for case in of for one in figures}
        if len(of) > 1 and len(counts) == 1:
            same = "the same at every thread count and in every round" if len(digests) == 1 else "NOT the same at every thread count"
            yield f"Adapter bytes, {dtype}: {same}."

"""What is measured beside what: the cases of each setup, and the ratios that decide."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One way to train one model; `label` names it in the table."""

    label: str
    engine: str  # "wattune" or "torch"
    model: str  # a shape's name or a directory
    dtype: str = "bf16"
    batch: int = 4
    seq: int = 256
    r: int = 16
    full: bool = False
    adapter_dtype: str = "same"  # torch only: "same" or "f32", PEFT's default
    compiled: bool = False  # torch only
    threads: int | None = None  # None: all that the process may use
    masked: float = 0.0  # share of a row that is prompt and has no loss
    recompute: bool = False  # activations computed again in the backward pass


@dataclass(frozen=True)
class Ratio:
    """`of` of the case `over`, divided by the best among the cases `under`."""

    title: str
    over: str
    under: tuple
    of: str  # "tokens_s", "step_s", "flops" (a step's) or "peak_rss"
    goal: str = ""


@dataclass(frozen=True)
class Setup:
    title: str
    cases: list
    ratios: list


def smollm2(_models):
    size = "smollm2-135m"
    cases = [Case("wattune bf16", "wattune", size), Case("wattune f32", "wattune", size, "f32"),
             Case("PEFT f32", "torch", size, "f32")]
    for adapter in ("f32", "same"):
        name = {"f32": "f32 adapters", "same": "bf16 adapters"}[adapter]
        cases += [Case(f"PEFT bf16, {name}", "torch", size, adapter_dtype=adapter),
                  Case(f"PEFT bf16, {name}, compiled", "torch", size, adapter_dtype=adapter, compiled=True)]
    compiled = tuple(case.label for case in cases if case.compiled)
    eager = tuple(case.label for case in cases if case.label.startswith("PEFT bf16") and not case.compiled)
    return Setup("SmolLM2-135M's shape, 4 x 256, r = 16 on all linears", cases, [
        Ratio("tokens/s, bf16, to the fastest compiled PEFT", "wattune bf16", compiled, "tokens_s", "at least 1.3"),
        Ratio("tokens/s, bf16, to the fastest eager PEFT", "wattune bf16", eager, "tokens_s", "at least 2"),
        Ratio("tokens/s, f32, to PEFT f32", "wattune f32", ("PEFT f32",), "tokens_s", "at least 2.5"),
        Ratio("peak RSS, bf16, to the smallest PEFT", "wattune bf16", compiled + eager, "peak_rss"),
    ])


def tinyllama(_models):
    base = Case("wattune bf16", "wattune", "tinyllama-1.1b", batch=1, seq=512)
    eager = replace(base, label="PEFT bf16, bf16 adapters", engine="torch")
    compiled = replace(eager, label="PEFT bf16, bf16 adapters, compiled", compiled=True)
    return Setup("TinyLlama-1.1B's shape, 1 x 512, r = 16 on all linears", [base, eager, compiled], [
        Ratio("tokens/s to the fastest PEFT", base.label, (eager.label, compiled.label), "tokens_s"),
        Ratio("peak RSS to the smallest PEFT", base.label, (eager.label, compiled.label), "peak_rss"),
    ])


def real_models(title, models):
    """Each real model directory, f32, r = 8, 8 x 128."""
    cases, ratios = [], []
    for path in models:
        ours = Case(f"{path.name}, wattune f32", "wattune", str(path), "f32", 8, 128, 8)
        eager = replace(ours, label=f"{path.name}, PEFT f32", engine="torch")
        compiled = replace(eager, label=f"{path.name}, PEFT f32, compiled", compiled=True)
        cases += [ours, eager, compiled]
        ratios += [Ratio(f"{path.name}, tokens/s to PEFT", ours.label, (eager.label,), "tokens_s",
                         "at least 3" if path.name == "TinyStories-656K" else "at least 1"),
                   Ratio(f"{path.name}, tokens/s to compiled PEFT", ours.label, (compiled.label,), "tokens_s")]
    return Setup(title, cases, ratios)


def tinystories(models):
    return real_models("TinyStories-656K, f32, 8 x 128, r = 8 on all linears",
                       [path for path in models if path.name == "TinyStories-656K"])


def assets(models):
    return real_models("Every real model at hand, f32, 8 x 128, r = 8 on all linears", models)


def sequence(_models):
    ours, theirs = [], []
    for seq in (256, 512, 1024, 2048):
        case = Case(f"wattune bf16, {2048 // seq} x {seq}", "wattune", "smollm2-135m", batch=2048 // seq, seq=seq)
        ours.append(case)
        theirs.append(replace(case, label=case.label.replace("wattune", "PEFT"), engine="torch"))
    return Setup("SmolLM2-135M's shape, 2,048 tokens a step in rows of 256 to 2,048, r = 16", ours + theirs, [
        Ratio("time per token at 2048 to 256, wattune", ours[-1].label, (ours[0].label,), "step_s", "at most 1.5"),
        Ratio("time per token at 2048 to 256, PEFT", theirs[-1].label, (theirs[0].label,), "step_s"),
        Ratio("peak RSS at 2048 to 256, wattune", ours[-1].label, (ours[0].label,), "peak_rss"),
        Ratio("peak RSS at 2048 to 256, PEFT", theirs[-1].label, (theirs[0].label,), "peak_rss"),
    ])


def full(_models):
    lora = Case("wattune bf16, LoRA", "wattune", "smollm2-135m")
    whole = replace(lora, label="wattune bf16, full", full=True)
    their_lora = replace(lora, label="PEFT bf16, LoRA", engine="torch")
    eager = replace(whole, label="PyTorch bf16, full", engine="torch")
    compiled = replace(eager, label="PyTorch bf16, full, compiled", compiled=True)
    return Setup("LoRA against full fine-tuning, SmolLM2-135M's shape, 4 x 256", [lora, whole, their_lora, eager, compiled], [
        Ratio("FLOPs of a step, LoRA to full, wattune", lora.label, (whole.label,), "flops", "about 0.71"),
        Ratio("time of a step, LoRA to full, wattune", lora.label, (whole.label,), "step_s", "at most 0.80"),
        Ratio("time of a step, LoRA to full, PyTorch", their_lora.label, (eager.label,), "step_s"),
        Ratio("tokens/s of full fine-tuning, wattune to PyTorch", whole.label, (eager.label,), "tokens_s", "at least 1"),
        Ratio("tokens/s of full fine-tuning, wattune to compiled PyTorch", whole.label, (compiled.label,), "tokens_s"),
    ])


def threads(_models):
    cases = [Case(f"wattune {dtype}, {count} thread{'s' * (count > 1)}", "wattune", "smollm2-135m", dtype, threads=count)
             for dtype in ("bf16", "f32") for count in (2, 1)]  # the faster first: its time sets the step counts
    return Setup("One thread and two, SmolLM2-135M's shape, 4 x 256, r = 16", cases, [
        Ratio("tokens/s, two threads to one, bf16", cases[0].label, (cases[1].label,), "tokens_s", "at least 1.6"),
        Ratio("tokens/s, two threads to one, f32", cases[2].label, (cases[3].label,), "tokens_s", "at least 1.8"),
    ])


def masked(_models):
    whole = Case("wattune bf16, every loss", "wattune", "smollm2-135m")
    prompt = replace(whole, label="wattune bf16, prompt masked", masked=0.75)
    theirs = [replace(case, label=case.label.replace("wattune", "PEFT"), engine="torch") for case in (whole, prompt)]
    return Setup("Three quarters of each row prompt without a loss, SmolLM2-135M's shape, 4 x 256", [whole, prompt, *theirs], [
        Ratio("time of a step, masked to every loss, wattune", prompt.label, (whole.label,), "step_s", "below 1"),
        Ratio("time of a step, masked to every loss, PEFT", theirs[1].label, (theirs[0].label,), "step_s"),
        Ratio("FLOPs of a step, masked to every loss, wattune", prompt.label, (whole.label,), "flops"),
    ])


# Name on the command line -> what makes the setup from the real model directories at hand.
SETUPS = {"smollm2-135m": smollm2, "tinyllama-1.1b": tinyllama, "tinystories": tinystories, "assets": assets,
          "sequence": sequence, "full": full, "threads": threads, "masked": masked}

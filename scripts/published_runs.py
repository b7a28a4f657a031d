#!/usr/bin/env python3
"""Makes src/forecast/published_runs.csv from a table of published training runs.

    python3 scripts/published_runs.py RUNS.csv > src/forecast/published_runs.csv

RUNS.csv has the columns model,params,tokens,flops,accelerator,count,accelerator_hours,power_w,pue,grid_gco2_per_kwh,energy_mwh,tco2e,source:
one row a run, figures as the paper, report or model card prints them, blank where it prints none; remarks stand in square brackets
behind the source. Facts with their sources; the four traces of BERT are of ml-energy/zeus (Apache-2.0).

Changes made, and no others:

- device: the profile or accelerator that the printed name means (DEVICE); blank where it means none.
- parameters: those that compute on a token; for a mixture of experts the active ones.
- flops: the published count, else 6ND of parameters and tokens; flops_basis says which. No 6ND for distilled models, whose teacher's
  passes it leaves out.
- achieved_tflops: per device, from the remark, where the source prints it.
- power_is: "measured" where the remark says so, else "rated".
- energy_has_pue, tco2e_has_pue: from the remark ("incl. PUE", "excl. PUE"); blank where the source does not say.
- A run listed on several devices has the device behind its name.
- inconsistent: why a row is refused (INCONSISTENT), checked here against the row's own figures.
- remark: ours (REMARK).
"""

import csv
import re
import sys
from collections import Counter

DEVICE = {
    "TPUv2": "tpu-v2", "TPUv3": "tpu-v3", "TPUv4": "tpu-v4", "V100": "nvidia-v100-sxm2", "A100": "nvidia-a100-sxm4-80gb",
    "A100-80GB": "nvidia-a100-sxm4-80gb", "A100-40GB": "nvidia-a100-sxm4-40gb", "H100": "nvidia-h100-sxm5-80gb",
    "H100-80GB": "nvidia-h100-sxm5-80gb", "H800": "nvidia-h800-sxm", "A40": "nvidia-a40", "P100": "nvidia-p100-pcie-16gb",
    "Quadro RTX 6000": "nvidia-quadro-rtx-6000",
}
DISTILLED = ["Llama-3.2-1B", "Llama-3.2-3B"]
INCONSISTENT = {
    "Llama-3.3-70B": "the card prints 12.9 tCO2e for 7.0 million device hours; the Llama 3.1 70B card prints 2,040 t for the same hours",
    "OPT-175B (as restated)": "324 MWh at the printed 231 gCO2e/kWh are 74.8 tCO2e, and 70 are printed",
}
REMARK = {
    "GPT-3 175B": "552.1 tCO2e count the overhead of 1.10 once: 1287 MWh contain it already (3.14e23 FLOPs at 24.6 TFLOP/s and 330 W "
    "are 1170 MWh at the machines). The 502 t of Luccioni et al. 2022, table 4, are the same run without it: 552.1 / 1.10",
    "GPT-3 175B (as restated)": "502 tCO2e leave the overhead out (552.1 / 1.10), while 1287 MWh contain it: 502 t are not "
    "1287 MWh x 429 gCO2e/kWh, which are 552.1 t",
    "GShard-600B": "net of the owner's carbon-free energy; 201 gCO2e/kWh and 4.8 t gross",
    "Switch Transformer 1.5T": "net of the owner's carbon-free energy; 403 gCO2e/kWh and 72.2 t gross",
    "BLOOM 176B": "the same run is 183 tCO2e in LLaMA's table 15: 385 instead of 57 gCO2e/kWh, and an overhead of 1.1",
    "BLOOM-175B (LLaMA restatement)": "the same run is 24.69 tCO2e in its own report: 57 instead of 385 gCO2e/kWh, without overhead",
    "PaLM 540B": "no energy or tCO2e was read in the source",
    "GLM-130B": "the source gives at most 60 days, no hours",
}
RESTATED = re.compile(r"\((as restated|LLaMA restatement)\)")


def named(rows):
    """Rows whose source is "same" name the source of the row before, and its remarks."""
    before = ""
    for row in rows:
        if row["model"].startswith("BLOOMz"):
            row["source"] = "Luccioni, Jernite, Strubell 2023 (arXiv:2311.16863)"
        same = re.match(r"same( table)?; ?(.*)", row["source"])
        row["source"] = f"{before}; {same[2]}" if same else row["source"]
        before = before if same else row["source"]
    return rows


def device(row):
    # Zeus caps its V100 at 250 W: the PCIe card.
    return "nvidia-v100-pcie" if "zeus" in row["source"] and row["accelerator"] == "V100" else DEVICE.get(row["accelerator"], "")


def remarks(source):
    head, _, tail = source.partition(" [")
    return head.strip(), tail


def active(row):
    text = row["model"] + row["source"]
    if found := re.search(r"(\d+)B[ -]active", text):
        return float(found[1]) * 1e9
    share = re.search(r"([\d.]+)% active", text)
    return row["params"] and float(row["params"]) * (float(share[1]) / 100 if share else 1)


def flops(row, parameters):
    if row["flops"]:
        return row["flops"], "published"
    distilled = any(row["model"].startswith(name) for name in DISTILLED)
    if parameters and row["tokens"] and not distilled:
        return f"{6 * parameters * float(row['tokens']):.6g}", "6ND"
    return "", ""


def overhead(row, source):
    """Whether energy and tCO2e contain the overhead, as "yes", "no" or ""."""
    both = "yes" if "incl. PUE" in source or "product of inputs" in source else "no" if "excl. PUE" in source else ""
    if row["model"] == "GPT-3 175B (as restated)":
        return "yes", "no"
    if row["model"] == "BLOOM whole project":
        return "no", "no"  # 1163.088 MWh x 57 gCO2e/kWh, the intensity of its site, are 66.3 t
    return both if row["energy_mwh"] else "", both if row["tco2e"] else ""


def check_inconsistent(rows):
    by_name = {row["model"]: row for row in rows}
    opt, llama, same = (by_name[name] for name in ["OPT-175B (as restated)", "Llama-3.3-70B", "Llama-3.1-70B"])
    printed = float(opt["energy_mwh"]) * float(opt["grid_gco2_per_kwh"]) / 1000
    assert printed / float(opt["tco2e"]) > 1.05
    assert llama["accelerator_hours"] == same["accelerator_hours"] and float(same["tco2e"]) > 100 * float(llama["tco2e"])


def whole(value):
    return f"{float(value):.12g}" if value else ""


def main():
    rows = named(list(csv.DictReader(open(sys.argv[1], newline=""))))
    check_inconsistent(rows)
    names = Counter(row["model"] for row in rows)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow("name,restated,parameters,tokens,flops,flops_basis,hardware,device,count,device_hours,achieved_tflops,power_w,power_is,"
                 "pue,gco2e_per_kwh,energy_mwh,energy_has_pue,tco2e,tco2e_has_pue,inconsistent,remark,source".split(","))
    for row in rows:
        name, (source, tail) = row["model"], remarks(row["source"])
        parameters = active(row)
        count, basis = flops(row, parameters)
        achieved = re.search(r"(?:achieved )?([\d.]+) TFLOPS/(?:chip|GPU)", tail)
        power_is = ("measured" if "MEASURED" in tail or "actual row" in tail or "system power" in tail else "rated") if row["power_w"] else ""
        energy_has, tco2e_has = overhead(row, row["source"])
        hardware = row["accelerator"]
        out.writerow([
            name if names[name] == 1 else f"{name} on {hardware}", "yes" if RESTATED.search(name) else "no", whole(parameters),
            whole(row["tokens"]), count, basis, hardware, device(row), row["count"], whole(row["accelerator_hours"]),
            achieved[1] if achieved else "", row["power_w"], power_is, row["pue"], row["grid_gco2_per_kwh"], row["energy_mwh"],
            energy_has, row["tco2e"], tco2e_has, INCONSISTENT.get(name, ""), REMARK.get(name, ""), source,
        ])


if __name__ == "__main__":
    main()

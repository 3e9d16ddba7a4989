"""
All that only a machine with a GPU can say, measured in one command and written down.

    make gpu                                        # on a GPU: at most 35 minutes; docs/results/gpu.json, docs/gpu.md
    python benchmarks/gpu.py --device cpu --quick   # a rehearsal: every branch with tiny shapes, figures mean nothing

Each measurement is a benchmark of this folder in a process of its own, so that none takes another down with it: what fails
or does not fit in the time is named in the page. What was measured is kept in `--work`, and the same command given again
measures the rest. The order is that of importance.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import common
import torch

from siq_vl.plots import bar_plot
from siq_vl.results import read_results, table_rows, write_results

BENCHMARKS = Path(__file__).resolve().parent
LEAST = 20.0  # seconds that a measurement needs at the very least
BASELINE = "padded, sdpa"


@dataclass(frozen=True)
class Measurement:
    """One benchmark to run.

    Attributes:
        group: what is measured: a model in a stage, or the name of the page's section.
        way: of training it; empty where there is but one.
        script: of this folder.
        arguments: of the script.
        seconds: that it may take.
    """

    group: str
    way: str
    script: str
    arguments: tuple[str, ...]
    seconds: float = 120

    @property
    def name(self) -> str:
        return f"{self.group}, {self.way}" if self.way else self.group


def measurements(options: argparse.Namespace) -> list[Measurement]:
    """Return everything to measure, the most important first."""
    flash = find_spec("flash_attn") is not None
    packed = ("--batching", "packed", "--workers", "4")
    best = (*packed, "--cached", "--compile")
    ways: dict[str, tuple[str, ...]] = {
        BASELINE: (),
        "padded, eager": ("--attn_implementation", "eager"),
        "packed, sdpa": packed,
        "packed, flex": (*packed, "--attn_implementation", "flex_attention"),
        "packed, flash": (*packed, "--attn_implementation", "flash_attention_2"),
        "padded, stored features": ("--cached",),
        "padded, checkpointed": ("--checkpointing",),
        "packed, compiled": (*packed, "--compile"),
        "all": (*best, "--attn_implementation", "flash_attention_2" if flash else "flex_attention"),
    }
    if not flash:
        del ways["packed, flash"]
    models = {"0.5b": (("1", "LoRA"), ("2", "LoRA"), ("3", "LoRA"), ("3", "QLoRA"))}
    if options.quick:  # the shapes are the same tiny ones, and compiling takes minutes
        models = {"0.5b": (("1", "LoRA"), ("3", "QLoRA"))}
        ways = {way: tuple(word for word in words if word != "--compile") for way, words in ways.items()}
    else:
        models["1.5b"] = (("1", "LoRA"), ("2", "LoRA"), ("3", "QLoRA"))
    found = []
    for model, runs in models.items():
        chosen = ways if model == "0.5b" else {name: ways[name] for name in (BASELINE, "packed, sdpa", "all")}
        for stage, method in runs:
            label = f"{model}, stage {stage}" + (" QLoRA" if method == "QLoRA" else "")
            for way, arguments in chosen.items():
                fixed = ("--shape", model, "--stage", stage, "--method", method)
                found.append(Measurement(label, way, "step.py", (*fixed, *arguments)))
    profiled = ("--shape", "0.5b", "--stage", "2", "--profile", *packed)
    found += [
        Measurement("Against Idefics3 under TRL", "", "idefics3.py", ("--shape", "0.5b", "--rows", "128"), 400),
        Measurement("Generation", "", "generation.py", ("--shape", "0.5b", "--batch_sizes", "1", "32"), 300),
        Measurement("What fits where", "", "fits.py", (), 600),
        Measurement("Profile of stage 2", "", "step.py", profiled),
    ]
    # Slowest and fastest way of every model, and the other benchmarks, come before the ways in between.
    return sorted(found, key=lambda one: one.way not in (BASELINE, "all", ""))


def run(measurement: Measurement, options: argparse.Namespace, seconds: float) -> str:
    """Run a measurement, keep its results in `--work`, and return why there are none, or an empty string."""
    results = kept_file(measurement, options)
    command = [sys.executable, str(BENCHMARKS / measurement.script), *measurement.arguments]
    command += ["--device", options.device, "--results", str(results), *(["--quick"] if options.quick else [])]
    log = results.with_suffix(".log")
    try:
        with open(log, "w") as output:
            ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:.0f} s"
    if ended.returncode or not results.exists():
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"failed: {last[0].strip()[:200] if last else 'it said nothing'} (all of it: {log})"
    return ""


def kept_file(measurement: Measurement, options: argparse.Namespace) -> Path:
    """Return the file that holds a measurement's results, by its name."""
    name = "".join(character if character.isalnum() or character in ".-" else "-" for character in measurement.name)
    return options.work / f"{name}.json"


def measure_all(options: argparse.Namespace) -> dict[str, str]:
    """Run what is not measured yet, as long as there is time; return why a measurement is missing, by name."""
    options.work.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    missing = {}
    planned = [one for one in measurements(options) if options.only in one.name]
    for number, measurement in enumerate(planned, 1):
        left = ends - time.monotonic()
        if kept_file(measurement, options).exists():
            why = ""
        elif left < LEAST:
            why = f"not run: the {options.minutes:g} minutes were over"
        else:
            why = run(measurement, options, min(measurement.seconds, left))
        if why:
            missing[measurement.name] = why
        print(f"{number} of {len(planned)}, {measurement.name}: {why or 'measured'}", flush=True)
    return missing


def step_table(options: argparse.Namespace) -> str:
    """Return the table of all ways of training."""
    header = ["model, stage", "way", "samples/s", "tokens/s", "MFU", "peak GiB", f"times {BASELINE}"]
    rows = []
    baselines: dict[str, float] = {}
    for measurement in measurements(options):
        file = kept_file(measurement, options)
        if not measurement.way or not file.exists():
            continue
        figures = read_results(file)["figures"]
        if measurement.way == BASELINE:
            baselines[measurement.group] = figures["tokens/s"]
        share = "" if figures["MFU"] is None else f"{figures['MFU']:.0%}"
        gain = ""
        if measurement.group in baselines:
            gain = f"{figures['tokens/s'] / baselines[measurement.group]:.2f}"
        speed = (f"{figures['samples/s']:.1f}", f"{figures['tokens/s']:,.0f}")
        rows.append([measurement.group, measurement.way, *speed, share, f"{figures['peak GiB']:.2f}", gain])
    return common.table(header, sorted(rows, key=lambda row: row[0]))


def other_tables(options: argparse.Namespace) -> dict[str, str]:
    """Return the tables of the other benchmarks as they kept them, by name."""
    tables = {}
    for measurement in measurements(options):
        file = kept_file(measurement, options)
        if measurement.way or not file.exists():
            continue
        for name, (header, *rows) in read_results(file)["tables"].items():
            tables[f"{measurement.group}: {name}"] = common.table(header, rows)
    return tables


def targets_table(steps: str) -> str:
    """Return what was aimed at beside the best that was reached."""
    header, *rows = table_rows(steps)
    measured = [dict(zip(header, row, strict=True)) for row in rows]
    lines = []
    for group in ("0.5b, stage 1", "0.5b, stage 2"):
        shares = [int(row["MFU"].rstrip("%")) for row in measured if row["model, stage"] == group and row["MFU"]]
        lines.append([group, "MFU", "at least 45%", f"{max(shares)}%" if shares else "not measured"])
    for group, most in (("0.5b, stage 3 QLoRA", 4), ("1.5b, stage 3 QLoRA", 8)):
        peaks = [float(row["peak GiB"]) for row in measured if row["model, stage"] == group]
        lines.append([group, "peak GiB", f"below {most}", f"{min(peaks):.2f}" if peaks else "not measured"])
    return common.table(["run", "figure", "wanted", "best"], lines)


def page(tables: dict[str, str], missing: dict[str, str], environment: str, plot: str) -> str:
    """Return the page in Markdown."""
    parts = ["# On a GPU", f"`make gpu` measured this page. {environment}.", f"![tokens a second]({plot})"]
    for name, table in tables.items():
        parts += [f"## {name}", table]
    absent = common.table(["measurement", "why"], [[name, why] for name, why in missing.items()])
    parts += ["## Not measured", absent if missing else "Nothing is missing.", NANOVLM]
    return "\n\n".join(parts) + "\n"


NANOVLM = (
    "nanoVLM's own loop is not among these: its code is no package, and none of it is copied here. Its model's shape is "
    "SigLIP with pixel shuffle and a Llama-like decoder; `padded, sdpa` is what its loop does with ours."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, figures that mean nothing: does it run?")
    parser.add_argument("--minutes", type=float, default=35, help="for all measurements")
    parser.add_argument("--only", default="", help="measurements whose name holds this")
    parser.add_argument("--work", type=Path, default=Path("outputs/gpu"), help="where measurements are kept")
    parser.add_argument("--results", type=Path, default=Path("docs/results/gpu.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/gpu.md"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU: run on one, or rehearse with --device cpu --quick")
    missing = measure_all(options)
    steps = step_table(options)
    tables = {"Targets": targets_table(steps), "Training": steps, **other_tables(options)}
    environment = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU: A REHEARSAL, NO MEASUREMENT"
    write_results(options.results, tables, {"measured on": environment, "missing": missing})
    plot = options.page.with_suffix(".svg")
    plot.parent.mkdir(parents=True, exist_ok=True)
    header, *rows = table_rows(steps)
    speeds = {", ".join(row[:2]): float(row[header.index("tokens/s")].replace(",", "")) for row in rows}
    plot.write_text(bar_plot(speeds, "tokens a second"), encoding="utf-8")
    options.page.write_text(page(tables, missing, environment, plot.name), encoding="utf-8")
    print(f"\n{steps}\n\nwrote {options.results}, {options.page} and {plot}; {len(missing)} not measured")


if __name__ == "__main__":
    main()

"""
Ablations of stage 3 on the tiny model: every arm trained with several seeds, one table with 95% intervals.

    python ablate.py
    python ablate.py --list
    python ablate.py --only control structured terse --seeds 5 --steps 460

The arms are those of `recipes/tiny/ablations.yaml`; one is added there. Runs go side by side, one a GPU, or one a core
where there is none. What is done is not done again, so the same command goes on where it was interrupted; the runs, their
logs and answers are in `outputs/ablations/<arm>/`, the results beside them: `ablations.md`, its tables in `tables.json`,
every number in `results.json`, and as plots `ablations.svg` and, for the arms that are trained with `--emergence_steps`,
`emergence.svg`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from siq_vl import cli
from siq_vl.ablation import comparison
from siq_vl.ablation.arms import Plan, jobs_of, read_plan
from siq_vl.ablation.jobs import Jobs
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.emergence_figure import EMERGENCE_FIGURE, EMERGENCE_FILE, read_emergence
from siq_vl.locks import Lock
from siq_vl.plots import emergence_plot
from siq_vl.results import write_results


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path("recipes/tiny/ablations.yaml"), help="the arms")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablations"), help="folder of runs and results")
    parser.add_argument("--list", action="store_true", help="say what the arms are, and stop")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run and report these arms alone")
    parser.add_argument("--seeds", type=int, help="runs an arm")
    parser.add_argument("--steps", type=int, help="optimizer steps a run")
    parser.add_argument("--count", type=int, help="ordinary questions that a run is asked")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, or one a core")
    return parser.parse_args()


def say(line: str) -> None:
    cli.say(line)
    sys.stdout.flush()


def run_all(plan: Plan, options: argparse.Namespace) -> Jobs:
    """Run what is not done yet, telling what ends and for how long the rest will take."""
    gpus = [str(device) for device in range(torch.cuda.device_count())]
    if gpus and "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    slots = options.jobs
    if slots is None:
        slots = len(gpus) or os.cpu_count() or 1
    jobs = Jobs(jobs_of(plan, options.output), options.output, slots, say, gpus)
    jobs.run()
    return jobs


def asked_arms(plan: Plan, jobs: Jobs) -> list[str]:
    """Return the arms that have been asked in all their ways."""
    asked = []
    for name, arm in plan.arms.items():
        if all(f"{name}/{way}" in jobs.seconds for way in arm.ways):
            asked.append(name)
    return asked


def result_of(plan: Plan, name: str, out: Path) -> comparison.Result:
    """Read the answers of an arm, and how long its runs took."""
    arm = plan.arms[name]
    answers = {}
    for way in arm.ways:
        answers[way] = [kept.read_predictions(out / name / way / f"{seed}.jsonl") for seed in plan.seeds_of(name)]
    seconds = []
    if arm.is_trained:
        for checkpoint in plan.checkpoints_of(name, out).values():
            settings = json.loads((checkpoint / "training_settings.json").read_text(encoding="utf-8"))
            seconds.append(settings["seconds"])
    return comparison.Result(arm.about, plan.steps_of(name), seconds, comparison.estimates(answers))


def emerged(plan: Plan, names: list[str], out: Path) -> dict[str, list[dict[str, float]]]:
    """Return how reasoning emerged in the arms that are trained with `--emergence_steps`."""
    means = {}
    for name in names:
        folders = [out / name / seed for seed in plan.seeds_of(name)]
        if all((folder / EMERGENCE_FILE).exists() for folder in folders):
            means[name] = comparison.mean_over_seeds([read_emergence(folder) for folder in folders])
    return means


def write_report(plan: Plan, asked: list[str], out: Path) -> None:
    """Write and print what came of the arms that have been asked."""
    results = {name: result_of(plan, name, out) for name in asked}
    text = comparison.report(results, plan.compare)
    (out / "ablations.md").write_text(text, encoding="utf-8")
    (out / "ablations.svg").write_text(comparison.plot(results), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(comparison.numbers(results, plan.compare), indent=1))
    write_results(out / "tables.json", comparison.tables(results, plan.compare), {"count": plan.count})
    means = emerged(plan, asked, out)
    if means:
        (out / EMERGENCE_FIGURE).write_text(emergence_plot(means), encoding="utf-8")
    say(f"\n{text}\nresults: {out}/ablations.md, results.json and plots beside it")


def run_and_report(plan: Plan, options: argparse.Namespace) -> None:
    """Run the plan, and write what is known of it then, failures or not."""
    started = time.monotonic()
    jobs = run_all(plan, options)
    asked = asked_arms(plan, jobs)
    if asked:
        write_report(plan, asked, options.output)
    say(f"{time.monotonic() - started:.0f} s in all")
    if jobs.failures:
        sys.exit(f"error: {', '.join(jobs.failures)} failed, and {len(jobs.waiting)} jobs could not start: see above")


def main() -> None:
    options = parse_options()
    plan = read_plan(options.plan, seeds=options.seeds, steps=options.steps, count=options.count)
    if options.only:
        plan = plan.only(options.only)
    if options.list:
        for name, arm in plan.arms.items():
            say(f"{name:15} {arm.about}")
        return
    with Lock(options.output):
        run_and_report(plan, options)


if __name__ == "__main__":
    cli.run(main)

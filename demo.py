"""
The whole story on a bare machine: three stages, their baselines, one table, one page, one answer.

    make demo                       # or: python demo.py

Stages 1, 2 and 3 are trained with `recipes/tiny/`, beside a blind model (stage 2 with every picture withheld) and a
control (stage 2 continued on direct answers for as long as stage 3 takes); the traces of stage 3 are made first.
Everything lands in `outputs/tiny/`: the page in `report.html`, its tables as numbers in `results.json`. What is already
there is not made again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from siq_vl import cli
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import Item, held_out_items, majority_answers
from siq_vl.evaluation.report import write_report
from siq_vl.evaluation.tables import accuracy_table, caption_table, difference_line
from siq_vl.locks import Lock
from siq_vl.results import checksum_of_weights, write_results

OUT = Path("outputs/tiny")
EVALUATION = OUT / "evaluation"
# Rows of the control are shorter than stage 3's: with half as many steps again it trains for as long (see the seconds).
CONTROL_STEPS = 690
TRACES = 14720  # stage 3 has as many rows, and sees each once

TRAINING = {
    "stage1": "train_sft.py --stage 1",
    "stage2": "train_sft.py --stage 2",
    "blind": f"train_sft.py --stage 2 --blind true --output_dir {OUT}/blind",
    "stage3": "train_distill.py",
    "control": f"train_sft.py --stage 2 --model_name_or_path {OUT}/stage2 --max_steps {CONTROL_STEPS} "
    f"--data_seed_offset 4 --output_dir {OUT}/control",
}
MAKING = {
    **TRAINING,
    "traces": f"generate_traces.py --teacher figures --style structured --count {TRACES} --output {OUT}/traces",
}
ROUNDS = (("stage1",), ("stage2", "blind", "traces"), ("stage3", "control"))
LAST_WRITTEN = {"traces": "report.html"}  # by a training: config.json
EVALUATING = (("stage1", "blind", "stage2"), ("control", "stage3"))


def run_together(commands: dict[str, str]) -> None:
    """Run commands side by side, the cores shared out among them; the first failure ends all.

    Their progress goes to `outputs/tiny/logs/<name>.log`; on failure its last lines are shown.
    """
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    running = {}
    (OUT / "logs").mkdir(parents=True, exist_ok=True)
    for name, command in commands.items():
        print(f"$ python {command}", flush=True)
        with open(OUT / "logs" / f"{name}.log", "w") as log:
            arguments = [sys.executable, *shlex.split(command)]
            running[name] = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        while any(process.poll() is None for process in running.values()):
            failed = [name for name, process in running.items() if process.poll()]
            if failed:
                break
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    for name, process in running.items():
        if process.returncode > 0:
            tail = "\n".join((OUT / "logs" / f"{name}.log").read_text().splitlines()[-15:])
            raise SystemExit(f"{tail}\nerror: {name} failed; the whole output is in {OUT}/logs/{name}.log")


def train_all() -> None:
    """Train every model that has no checkpoint yet, and make the traces of stage 3."""
    for together in ROUNDS:
        missing = {
            name: MAKING[name] for name in together if not (OUT / name / LAST_WRITTEN.get(name, "config.json")).exists()
        }
        if missing:
            started = time.monotonic()
            run_together(missing)
            print(f"  {', '.join(missing)}: {time.monotonic() - started:.0f} s\n", flush=True)


def evaluate_all(count: int) -> None:
    """Ask every model the held-out questions, and the first stage for captions too."""
    commands = {}
    for names in EVALUATING:
        models = " ".join(f"--model {name}={OUT}/{name}" for name in names)
        extra = "--blind blind --captions stage1" if "blind" in names else ""
        commands["evaluate-" + "-".join(names)] = (
            f"evaluate_vqa.py {models} {extra} --count {count} --output {EVALUATION}"
        )
    run_together(commands)


def majority(items: list[Item]) -> list[kept.Prediction]:
    """Answer every question with the commonest training answer to its type."""
    commonest = majority_answers()
    return [kept.judge(item, commonest[item.domain, item.type]) for item in items]


def settings_of(name: str) -> dict:
    return json.loads((OUT / name / "training_settings.json").read_text())


def curve_of(name: str) -> list[tuple[int, float]]:
    entries = map(json.loads, (OUT / name / "training_log.jsonl").read_text().splitlines())
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def tell(items: list[Item]) -> None:
    """Print the tables and write the page."""
    columns = ("blind", "stage1", "stage2", "control", "stage3")
    answers = {"majority": majority(items), **{name: kept.read(EVALUATION / f"{name}.jsonl") for name in columns}}
    captions = json.loads((EVALUATION / "stage1.captions.json").read_text())
    multi_step = {
        name: [p for p in answers[name] if p.group == "held out" and p.multi_step] for name in ("control", "stage3")
    }
    seconds = {name: round(settings_of(name)["seconds"]) for name in TRAINING}
    lines = [
        difference_line("stage 3 over its control, multi-step", multi_step["control"], multi_step["stage3"]),
        "seconds of training: " + ", ".join(f"{name} {taken}" for name, taken in seconds.items()),
    ]
    accuracies, facts = accuracy_table(answers), caption_table(captions["scores"], captions["count"])
    tables = {
        "Accuracy in percent on held-out figures, with 95% intervals": accuracies + "\n\n" + "\n".join(lines),
        "Stage 1: caption facts right, in percent": facts,
    }
    write_results(
        OUT / "results.json",
        {"accuracy": accuracies, "captions": facts},
        {
            "stage 3 over its control": lines[0],
            "seconds of training": seconds,
            "weights": {name: checksum_of_weights(OUT / name) for name in TRAINING},
        },
    )
    for title, table in reversed(tables.items()):
        print(f"{title}\n\n{table}\n")
    stages = {f"stage {stage}": answers[f"stage{stage}"] for stage in (1, 2, 3)}
    page = OUT / "report.html"
    write_report(page, items, stages, tables, {name: curve_of(name) for name in TRAINING})
    print(f"page: {page}")


def ask_one(items: list[Item]) -> None:
    """Ask the last stage one question about a picture file."""
    item = next(item for item in items if item.domain == "charts" and item.multi_step)
    picture = OUT / "example.png"
    item.image.save(picture)
    question = ["ask.py", str(picture), item.question, "--model", str(OUT / "stage3")]
    print(f"\n$ python {shlex.join(question)}", flush=True)
    subprocess.run([sys.executable, *question], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=900, help="held-out questions; a fifth as many of each other group"
    )
    options = parser.parse_args()
    started = time.monotonic()
    with Lock(OUT):
        train_all()
        evaluate_all(options.count)
        items = held_out_items(options.count)
        tell(items)
        ask_one(items)
    print(f"\n{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    cli.run(main)

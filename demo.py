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
import shlex
import subprocess
import sys
import time
from pathlib import Path

from siq_vl import cli
from siq_vl.ablation.jobs import Job, Jobs
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

# What is trained: the command, and what has to be there before.
TRAINING = {
    "stage1": ("train_sft.py --stage 1", ()),
    "stage2": ("train_sft.py --stage 2", ("stage1",)),
    "blind": (f"train_sft.py --stage 2 --blind true --output_dir {OUT}/blind", ("stage1",)),
    "stage3": ("train_distill.py", ("stage2", "traces")),
    "control": (
        f"train_sft.py --stage 2 --model_name_or_path {OUT}/stage2 --max_steps {CONTROL_STEPS} "
        f"--data_seed_offset 4 --output_dir {OUT}/control",
        ("stage2",),
    ),
}
# The longest answer that the tables of the documents were made with; what is longer is a loop at this size.
MAX_NEW_TOKENS = 128
# Models that one process asks, one after the other.
EVALUATED_TOGETHER = (("stage1", "blind", "stage2"), ("control", "stage3"))
# The second stage, the blind model and the traces are made side by side, on two cores too.
SIDE_BY_SIDE = 3


def jobs_of(count: int) -> list[Job]:
    """Return the commands of the demo: trainings, the traces of stage 3, and `count` held-out questions to each model."""
    jobs = []
    for name, (command, after) in TRAINING.items():
        jobs.append(Job(name, command, OUT / name / "config.json", after=after, kind=name, once=True))
    # Traces need no model. They wait for stage 1 all the same, which trains on all cores.
    command = f"generate_traces.py --teacher figures --style structured --count {TRACES} --output {OUT}/traces"
    jobs.append(Job("traces", command, OUT / "traces" / "report.html", after=("stage1",), kind="traces", once=True))
    for names in EVALUATED_TOGETHER:
        models = " ".join(f"--model {name}={OUT}/{name}" for name in names)
        extra = " --blind blind --captions stage1" if "blind" in names else ""
        command = (
            f"evaluate_vqa.py {models}{extra} --count {count} --max_new_tokens {MAX_NEW_TOKENS} --output {EVALUATION}"
        )
        weights = tuple(OUT / name / "model.safetensors" for name in names)
        answers = EVALUATION / f"{names[-1]}.jsonl"
        jobs.append(Job("evaluate-" + "-".join(names), command, answers, weights, names, "evaluation"))
    return jobs


def run_all(count: int) -> None:
    """Run what is not done yet; the last lines of a failure are shown, and end the demo."""
    jobs = Jobs(jobs_of(count), OUT / "logs", SIDE_BY_SIDE, say)
    jobs.run()
    if jobs.failures:
        raise SystemExit(f"error: {', '.join(jobs.failures)} failed: see above; the logs are in {OUT}/logs")


def say(line: str) -> None:
    cli.say(line)
    sys.stdout.flush()


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
    answers = {
        "majority": majority(items),
        **{name: kept.read_predictions(EVALUATION / f"{name}.jsonl") for name in columns},
    }
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
        run_all(options.count)
        items = held_out_items(options.count)
        tell(items)
        ask_one(items)
    print(f"\n{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    cli.run(main)

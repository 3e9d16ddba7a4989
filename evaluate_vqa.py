"""
Evaluate checkpoints, ours or any image-text-to-text model's, on held-out drawn figures or on any source of a recipe.

    python evaluate_vqa.py --model stage3=outputs/tiny/stage3
    python evaluate_vqa.py --model stage2=outputs/tiny/stage2 --model stage3=outputs/tiny/stage3 --report report.html
    python evaluate_vqa.py --model stage2=outputs/tiny/stage2 --model blind=outputs/tiny/blind --blind blind
    python evaluate_vqa.py --model baseline=outputs/tiny/stage2 --model student=outputs/tiny/stage3 --before_after --card
    python evaluate_vqa.py --captions stage1 --model stage1=outputs/tiny/stage1
    python evaluate_vqa.py --model stage3=outputs/tiny/stage3 --shifts --count 300
    python evaluate_vqa.py --model stage3=outputs/siq-vl-0.5b/stage3 --source path/to/ChartQA --split test
    accelerate launch --multi_gpu evaluate_vqa.py --model stage3=outputs/siq-vl-0.5b/stage3 --source path/to/ChartQA

Each model's answers are appended to `<output>/<name>.jsonl` batch by batch, and the same command goes on where it was
interrupted. One table of accuracies with 95% intervals is printed, every pair of neighbouring models is compared on the
questions that both answered, and faults are counted and named. So are answers that ran into `--max_new_tokens`, whose
default is what the checkpoint was trained on. `--report` also writes a page to look at, and its tables
as Markdown beside it. `--before_after` adds the report's Table 3 and A.6, the first model beside the last; `--card` writes
them into the last one's model card. `--shifts` asks the same questions about pictures that were moved, framed, rotated,
blurred, and so on, in place of the ordinary table. `--results` keeps the tables in a file.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from siq_vl import cli
from siq_vl.data.adapters import FORMATS
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.sources import Source
from siq_vl.evaluation.generation import fitting_new_tokens
from siq_vl.evaluation.held_out import described, held_out_items
from siq_vl.evaluation.items import Item, items_of
from siq_vl.evaluation.losses import reference_losses
from siq_vl.evaluation.predictions import ANSWER_METRICS, Prediction, caption_scores
from siq_vl.evaluation.report import write_report
from siq_vl.evaluation.runner import (
    RunSettings,
    cut_off_note,
    fault_report,
    fingerprint,
    load_any,
    process_state,
    run,
    same_questions,
)
from siq_vl.evaluation.shifts import CLEAN, SHIFTS, shift_table, shifted
from siq_vl.evaluation.summaries import before_after, change_table, without_picture_line
from siq_vl.evaluation.tables import accuracy_table, caption_table, comparison_line, ordinary, yes_no_table
from siq_vl.hub import write_card
from siq_vl.processing_siq_vl import SiQVLProcessor
from siq_vl.results import checksum_of_weights, write_results


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=CHECKPOINT", help="repeat for several")
    parser.add_argument(
        "--blind", action="append", default=[], metavar="NAME", help="withhold the pictures from this model"
    )
    parser.add_argument(
        "--captions", action="append", default=[], metavar="NAME", help="also score this model's captions"
    )
    parser.add_argument(
        "--count", type=int, default=900, help="ordinary questions; a fifth as many of each other group"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"), help="folder of the answers")
    parser.add_argument("--report", type=Path, metavar="PAGE.html", help="write a page, and its tables beside it")
    parser.add_argument(
        "--before_after", action="store_true", help="print Table 3 and A.6 of the report, losses of the references too"
    )
    parser.add_argument("--card", action="store_true", help="write that table into the last model's card")
    parser.add_argument("--batch_size", type=int, default=64, help="questions answered together")
    parser.add_argument(
        "--max_new_tokens", type=int, help="bound on an answer, rationale included; by default what fits each model"
    )
    parser.add_argument("--max_thinking_tokens", type=int, help="bound on the rationale; the answer follows")
    parser.add_argument("--no_thinking", action="store_true", help="ask for answers without reasoning")
    parser.add_argument("--described", action="store_true", help="show drawn figures' captions in place of pictures")
    parser.add_argument("--shifts", action="store_true", help="a table of drawn pictures moved, framed, blurred, ...")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the tables in this file, too")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a checkpoint carries")
    source = parser.add_argument_group("another source of questions, with the fields of a recipe's `sources`")
    source.add_argument("--source", metavar="PATH", help="Hub id, local file or folder; drawn figures by default")
    source.add_argument("--format", choices=FORMATS, help="told by the columns")
    source.add_argument("--subset", help="configuration of a Hub data set, or a sub-folder")
    source.add_argument("--split", default="test", help="split to read")
    source.add_argument("--image_folder", help="where named pictures lie, if not beside the rows")
    source.add_argument("--instruction", help="added to every question; for captions, asks")
    source.add_argument("--rows", type=int, help="rows to read at most, from the first")
    source.add_argument(
        "--metric", choices=ANSWER_METRICS, help="how answers are compared; by default the format's own"
    )
    options = parser.parse_args()
    for given in options.model:
        if "=" not in given:
            raise ValueError(
                f"--model is {given!r}; write it as NAME=CHECKPOINT, for instance stage3=outputs/tiny/stage3"
            )
    options.model = dict(given.split("=", 1) for given in options.model)  # of a repeated name the last
    for name in (*options.blind, *options.captions):
        if name not in options.model:
            raise ValueError(
                f"{name!r} is none of the models {', '.join(options.model)}: pass it as --model {name}=CHECKPOINT"
            )
    options.before_after |= options.card
    if options.count < 5:
        raise ValueError(f"--count is {options.count}; it must be at least 5")
    for name in ("captions", "described", "shifts"):
        if getattr(options, name) and options.source:
            raise ValueError(f"--{name} needs pictures whose facts are known: leave --source out")
    for name in ("captions", "described", "before_after", "report"):
        if options.shifts and getattr(options, name):
            raise ValueError(f"--shifts prints a table of its own: leave --{name} out, or run it apart")
    return options


def questions(options: argparse.Namespace) -> list[Item]:
    """Return the drawn questions, or those of the source."""
    if options.source is None:
        return held_out_items(options.count)
    config = SourceConfig(
        path=options.source,
        format=options.format,
        subset=options.subset,
        split=options.split,
        image_folder=options.image_folder,
        instruction=options.instruction,
    )
    return items_of(Source(config), options.rows, metric=options.metric)


def ways_of(options: argparse.Namespace, items: list[Item]) -> dict[str, list[Item]]:
    """Return what every model is asked, by the name of how its pictures are shown."""
    if options.described:
        return {"described": [described(item) for item in items]}
    if options.shifts:
        drawn = [item for item in items if item.group == "held out"]
        return {shift: shifted(drawn, shift) for shift in SHIFTS}
    return {CLEAN: items}


def losses_of(options: argparse.Namespace, name: str, items: Sequence[Item], model, processor, settings) -> dict:
    """Return the losses of the reference outputs, by kind and question; none for models of other kinds than ours."""
    if not options.before_after or not isinstance(processor, SiQVLProcessor):
        return {}
    counted = [item for item in items if item.group != "combinations" and item.group != "hard"]
    losses = {}
    for kind in ("trace", "answer"):
        losses[kind] = reference_losses(
            model,
            processor,
            counted,
            traces=kind == "trace",
            blind=settings.blind,
            template_options=settings.template_options,
            batch_size=options.batch_size,
            progress=f"{name}, {kind}",
        )
    return losses


def tell(
    options: argparse.Namespace,
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Prediction]],
    losses: Mapping[str, Mapping[str, Mapping[str, float]]],
    bounds: Mapping[str, int],
) -> None:
    """Print the tables, the comparisons, the faults and what was cut off; write the page, and the last model's card."""
    notes = []
    for first, second in pairwise(answers):
        shared = same_questions(ordinary(answers[first]), ordinary(answers[second]))
        notes.append(comparison_line(f"{second} over {first}", *shared))
    notes += fault_report(answers).splitlines()
    notes += cut_off_notes(answers, bounds)
    accuracies = accuracy_table(answers)
    print(f"\n{accuracies}")
    print("".join(f"\n{note}" for note in notes))
    tables = {}
    if items and all(item.metric == "yes_no" for item in items):
        tables["Yes or no"] = yes_no_table(answers)
    keep_results(options, {"accuracy": accuracies, **tables}, answers, bounds)
    if options.before_after:
        compared = {name: ordinary(predictions) for name, predictions in answers.items()}
        tables["Before and after"] = before_after(compared, losses)
        if len(compared) > 1:
            tables["What has changed"] = changes(options, compared)
    for table in tables.values():
        print(f"\n{table}")
    if options.card:
        folder = Path(list(options.model.values())[-1])
        write_card(folder, before_after="\n\n".join(tables.values()))
        print(f"\nmodel card: {folder / 'README.md'}")
    if options.report is not None:
        write_report(options.report, items, answers, tables, notes=notes)
        print(f"\npage: {options.report}")


def changes(options: argparse.Namespace, answers: Mapping[str, Sequence[Prediction]]) -> str:
    """Return what has changed from the first model to the last, and what a blind one among them says of the last."""
    first, *_, last = answers
    parts = [change_table(*same_questions(answers[first], answers[last]))]
    for name in options.blind:
        if name != last:
            shared = same_questions(answers[last], answers[name])
            parts.append(without_picture_line(f"{last} beside {name}", *shared))
    return "\n\n".join(parts)


def tell_shifts(
    options: argparse.Namespace, answers: Mapping[str, Mapping[str, Sequence[Prediction]]], bounds: Mapping[str, int]
) -> None:
    """Print the table of shifts."""
    table = shift_table(answers)
    print(f"\n{table}")
    of_models: dict[str, list[Prediction]] = {}
    for name, by_shift in answers.items():
        faults = fault_report({f"{name}, {shift}": predictions for shift, predictions in by_shift.items()})
        if faults:
            print(f"\n{faults}")
        of_models[name] = []
        for predictions in by_shift.values():
            of_models[name] += predictions
    for note in cut_off_notes(of_models, bounds):
        print(f"\n{note}")
    keep_results(options, {"shifts": table}, of_models, bounds)


def cut_off_notes(answers: Mapping[str, Sequence[Prediction]], bounds: Mapping[str, int]) -> list[str]:
    """Return a line for every model some of whose answers the bound on new tokens ended."""
    notes = [cut_off_note(name, predictions, bounds[name]) for name, predictions in answers.items()]
    return [note for note in notes if note]


def keep_results(
    options: argparse.Namespace,
    tables: Mapping[str, str],
    answers: Mapping[str, Sequence[Prediction]],
    bounds: Mapping[str, int],
) -> None:
    """Write the results file, if one is wanted."""
    if options.results is None:
        return
    cut_off = {}
    for name, predictions in answers.items():
        cut_off[name] = sum(prediction.cut_off for prediction in predictions)
    weights = {name: checksum_of_weights(checkpoint) for name, checkpoint in options.model.items()}
    figures = {"weights": weights, "max_new_tokens": dict(bounds), "cut off": cut_off}
    write_results(options.results, tables, figures)


def tell_captions(options: argparse.Namespace, name: str, items: Sequence[Item], model, processor) -> None:
    """Have a model describe some of the pictures; keep its scores, and print them."""
    described_items = [item for item in items if item.group == "held out"][: options.count // 3]
    scores = caption_scores(model, processor, described_items, progress=f"{name} captions")
    kept = {"count": len(described_items), "scores": scores}
    (options.output / f"{name}.captions.json").write_text(json.dumps(kept))
    print(f"\n{name}\n\n{caption_table(scores, len(described_items))}")


def main() -> None:
    options = parse_options()
    items = questions(options)
    ways = ways_of(options, items)
    is_first_process = process_state().is_main_process
    answers: dict[str, dict[str, list[Prediction]]] = {}
    losses: dict[str, dict] = {}
    bounds: dict[str, int] = {}
    for name, checkpoint in options.model.items():
        model, processor = load_any(checkpoint, trust_remote_code=options.trust_remote_code)
        settings = RunSettings(
            batch_size=options.batch_size,
            max_new_tokens=fitting_new_tokens(checkpoint) if options.max_new_tokens is None else options.max_new_tokens,
            max_thinking_tokens=options.max_thinking_tokens,
            blind=name in options.blind,
            template_options={"enable_thinking": False} if options.no_thinking else None,
        )
        answers[name] = {}
        bounds[name] = settings.max_new_tokens
        for way, asked in ways.items():
            identity: dict[str, object] = {"checkpoint": fingerprint(checkpoint)}
            if way != CLEAN:
                identity[way] = True
            file, progress = options.output / f"{name}.jsonl", name
            if options.shifts:
                file, progress = options.output / name / f"{way}.jsonl", f"{name}, {way}"
            answers[name][way] = run(model, processor, asked, file, settings, identity=identity, progress=progress)
        if not is_first_process:
            continue
        # With --shifts there are several ways, and no losses; else the only one.
        losses[name] = losses_of(options, name, asked, model, processor, settings)
        if name in options.captions:
            tell_captions(options, name, items, model, processor)
    if not is_first_process:
        return
    if options.shifts:
        tell_shifts(options, answers, bounds)
        return
    (way,) = ways
    tell(options, items, {name: by_way[way] for name, by_way in answers.items()}, losses, bounds)


if __name__ == "__main__":
    cli.run(main)

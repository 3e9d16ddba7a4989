"""
Reasoning traces for stage 3, generated offline, verified, once.

    python generate_traces.py --teacher figures --count 300
    python generate_traces.py --teacher transformers --model Qwen/Qwen3-VL-2B-Thinking --questions mine.jsonl
    OPENAI_API_KEY=... python generate_traces.py --teacher openai --model NAME --base_url http://host:8000/v1 --questions mine.jsonl

The store (`--output`, `outputs/traces` by default) holds one row a trace, kept or rejected with its reasons; a second run,
with more teachers, samples or questions, does only what is missing. Its page is `report.html`.
"""

import argparse
import sys

from siq_vl import cli
from siq_vl.distill import options as settings
from siq_vl.distill.card import push_to_hub, write_card
from siq_vl.distill.pipeline import Progress, Run
from siq_vl.distill.questions import LeftOut
from siq_vl.distill.selection import announce, settle
from siq_vl.distill.store_page import write_page
from siq_vl.distill.teachers.base import TeacherLost
from siq_vl.distill.traces import TraceStore
from siq_vl.distill.yields import summarize, tables

INTERRUPTED = 130


def generate(options: argparse.Namespace, store: TraceStore, left_out: LeftOut) -> Progress:
    """Ask every teacher what is missing; stop early where one's budget is spent or the run is interrupted."""
    verification = settings.verification_from(options)
    announce(store, verification)
    progress = Progress()
    for teacher in settings.teachers_from(options):
        budget = settings.budget_from(options)
        budget.carry_over(*store.spent(teacher.name))
        run = Run(
            teacher,
            settings.prompts_from(options, teacher),
            store,
            verification,
            samples=options.samples,
            budget=budget,
            embed=options.images == "embed",
        )
        total = options.count * options.samples if options.count else None
        progress = run.over(settings.questions_from(options, left_out), total)
        print(
            f"{teacher.name}: {progress.made} new traces, {progress.skipped} were there, {progress.failed} without answer"
        )
        for error, count in progress.failures.most_common(3):
            print(f"  {count} x {error}")
        if progress.ended != "done":
            break
    if left_out.count:
        print(f"{left_out.count} rows of {options.questions} cannot be asked and are left out: see {left_out.path}")
    return progress


def main() -> None:
    options = settings.parse_options(__doc__)
    verification, selection = settings.verification_from(options), settings.selection_from(options)
    lost: TeacherLost | None = None
    with TraceStore(options.output) as store:
        if options.retry_failed:
            print(f"asking again for {store.drop_failed()} traces")
        try:
            progress = generate(options, store, LeftOut(options.output / "left_out.jsonl"))
        except TeacherLost as error:
            progress, lost = Progress(ended="lost"), error
        settle(store, verification, selection, progress=True)
        if lost is not None and not store.shards():
            raise lost
    for title, table in tables(summarize(options.output)).items():
        print(f"\n{title}\n\n{table}")
    write_card(options.output)
    print(f"\ntraces: {options.output}/data, page: {write_page(options.output)}")
    if lost is not None:
        raise lost
    if progress.ended == "budget":
        print("the budget is spent: raise it and run the same command to go on")
    if progress.ended == "interrupted":
        sys.exit(INTERRUPTED)
    if options.push_to_hub:
        print(push_to_hub(options.output, options.push_to_hub))


if __name__ == "__main__":
    cli.run(main)

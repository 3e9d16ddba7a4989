"""
Reasoning traces for stage 3, generated offline, verified, once.

    python generate_traces.py --teacher figures --count 300
    python generate_traces.py --teacher transformers --model Qwen/Qwen3-VL-2B-Instruct --questions mine.jsonl
    OPENAI_API_KEY=... python generate_traces.py --teacher openai --model NAME --base_url http://host:8000/v1 --questions mine.jsonl

`--questions` takes what a recipe's sources take, too: a Hub id, a folder, a published file. With `--describe` no questions
are asked: a teacher describes the pictures of the store's kept traces, for a student that reads in place of seeing.

The store (`--output`, `outputs/traces` by default) holds one row a trace, kept or rejected with its reasons; a second run,
with more teachers, samples or questions, does only what is missing. Its page is `report.html`.
"""

import sys
from collections.abc import Iterator, Mapping

from siq_vl import cli
from siq_vl.distill.card import push_to_hub, write_card
from siq_vl.distill.options import Options, parse_options
from siq_vl.distill.pipeline import Progress, Run
from siq_vl.distill.questions import LeftOut, TraceQuestion
from siq_vl.distill.selection import record_rules, update_verdicts
from siq_vl.distill.store_page import write_page
from siq_vl.distill.teachers.base import TeacherLost
from siq_vl.distill.traces import TraceStore, evaluated_part
from siq_vl.distill.yields import longer_replies, store_yield, tables
from siq_vl.terms import is_hub_id, source_name, warnings_of

INTERRUPTED = 130


def generate(options: Options, store: TraceStore, left_out: LeftOut) -> Progress:
    """Ask every teacher what is missing; stop early where one's budget is spent or the run is interrupted."""
    record_rules(store, options.verification)
    named = [
        options.teacher.model,
        source_name({"path": options.questions.questions, "subset": options.questions.subset}),
    ]
    for line in warnings_of(filter(is_hub_id, named)):
        print(f"TERMS: {line}")
    origin = options.questions.described()
    if asked := evaluated_part(origin):
        print(f"WARNING: these are questions of {asked}: do not evaluate on it what is trained on the traces")
    progress = Progress()
    for teacher in options.teachers():
        budget = options.budget(teacher)
        budget.carry_over(store.spent(teacher.name))
        run = Run(
            teacher,
            options.prompts(teacher),
            store,
            options.verification,
            samples=options.store.samples,
            budget=budget,
            # Pictures that are described lie in the store of traces already.
            embed=options.store.images == "embed" and not options.questions.describe,
        )
        # Noted with the first question that is there: what cannot be opened is no part of the store.
        questions = noting(options.open_questions(left_out), store, origin)
        progress = run.over(questions, options.total)
        print(
            f"{teacher.name}: {progress.made} new traces, {progress.skipped} were there, {progress.failed} without answer"
        )
        for error, count in progress.failures.most_common(3):
            print(f"  {count} x {error}")
        if progress.ended != "done":
            break
    if left_out.count:
        print(
            f"{left_out.count} rows of {options.questions.questions} cannot be asked and are left out: "
            f"see {left_out.path}"
        )
    return progress


def noting(questions: Iterator[TraceQuestion], store: TraceStore, origin: Mapping[str, str]) -> Iterator[TraceQuestion]:
    """Yield questions, and have the store note where they are from."""
    for number, question in enumerate(questions):
        if number == 0:
            store.note_questions(origin)
        yield question


def main() -> None:
    options = parse_options(__doc__)
    folder = options.folder
    lost: TeacherLost | None = None
    with TraceStore(folder) as store:
        if options.store.retry_failed:
            print(f"asking again for {store.drop_failed()} traces")
        try:
            progress = generate(options, store, LeftOut(folder / "left_out.jsonl"))
        except TeacherLost as error:
            progress, lost = Progress(ended="lost"), error
        # A teacher that is lost halfway leaves traces that were paid for: they are judged and shown before it is told.
        update_verdicts(store, options.verification, options.selected, progress=True)
        if lost is not None and not store.shards():
            raise lost
    found = store_yield(folder)
    for title, table in tables(found).items():
        print(f"\n{title}\n\n{table}")
    for name, teacher in found.teachers.items():
        if teacher.cut:
            print(
                f"\nWARNING: {len(teacher.cut)} replies of {name} were cut off; the same command with "
                f"{longer_replies(teacher)} asks for these again, and for no others"
            )
    write_card(folder)
    if options.questions.describe:
        write_card(options.store.output)  # it counts the descriptions
    print(f"\ntraces: {folder}/data, page: {write_page(folder)}")
    if lost is not None:
        raise lost
    if progress.ended == "budget":
        print("the budget is spent: raise it and run the same command to go on")
    if progress.ended == "interrupted":
        sys.exit(INTERRUPTED)
    if options.store.push_to_hub:
        print(push_to_hub(options.store.output, options.store.push_to_hub))


if __name__ == "__main__":
    cli.run(main)

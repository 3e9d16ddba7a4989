"""The command line of `generate_traces.py`, and what is built from it."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from siq_vl.data.figures.dataset import SPLITS, STYLES
from siq_vl.distill.budget import Budget
from siq_vl.distill.prompts import TEMPLATES, Prompts, families
from siq_vl.distill.questions import TASKS, ImagePolicy, LeftOut, TraceQuestion, figure_questions, file_questions
from siq_vl.distill.selection import KEEP, SCOPES, Selection
from siq_vl.distill.teachers.base import Teacher
from siq_vl.distill.teachers.oracle import FiguresTeacher
from siq_vl.distill.verification import RULES, Verification
from siq_vl.parsing.answers import MATCHES

TEACHERS = ("figures", "transformers", "openai")
DEFAULT_MAX_NEW_TOKENS = 1024


def parse_options(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: settings that do not go together.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/traces"), help="the store; more is added to it")
    parser.add_argument("--samples", type=int, default=1, help="answers wanted for each question")
    parser.add_argument(
        "--images", choices=("embed", "reference"), default="embed", help="pictures, or only their paths"
    )
    parser.add_argument("--retry_failed", action="store_true", help="ask again where the teacher had no answer")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the store, privately, as a data set")
    _add_questions(parser.add_argument_group("questions"))
    _add_teacher(parser.add_argument_group("teacher"))
    _add_budget(parser.add_argument_group("budget, over all runs with this teacher"))
    _add_rules(parser.add_argument_group("verification and selection"))
    options = parser.parse_args(argv)
    if options.teacher == "figures" and options.questions:
        raise ValueError(
            "the figures teacher knows drawn figures alone: leave --questions out, or pass another --teacher"
        )
    if options.teacher != "figures" and not options.model:
        raise ValueError(f"--teacher {options.teacher} needs --model")
    if options.images == "reference" and not options.questions:
        raise ValueError("drawn pictures have no files to refer to: use --images embed")
    if options.count is None:
        options.count = 0 if options.questions else 300
    if options.count < 0:
        raise ValueError(f"--count is {options.count}; it must be at least 1, or 0 for all of a file's questions")
    if not options.count and not options.questions:
        raise ValueError("--count is 0; the drawn data has no end, so pass how many questions to draw")
    if options.sampling is not None:
        options.sampling = _json_object(options.sampling)
    return options


def _add_questions(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--questions", type=Path, help="a .jsonl or .parquet file; by default drawn figures")
    group.add_argument("--count", type=int, help="how many; default: 300 drawn ones, or the whole file")
    group.add_argument("--split", choices=SPLITS, default="train", help="of the drawn figures")
    group.add_argument("--figures_seed", type=int, default=3, help="stream of drawn figures")
    group.add_argument("--task", choices=TASKS, default="general", help="of a file's questions that name none")
    group.add_argument("--image_root", type=Path, help="pictures are read below it; default: the file's folder")
    group.add_argument("--allow_remote", action="store_true", help="download pictures that are given as URLs")


def _add_teacher(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--teacher", choices=TEACHERS, default="figures")
    group.add_argument("--model", help="folder or Hub id, or the model's name on the server")
    group.add_argument("--revision", help="of the model's weights")
    group.add_argument("--prompts", choices=families(), help="family of templates; default: the teacher's own")
    group.add_argument("--hint", action="store_true", help="show the gold answer to the teacher; the traces say so")
    group.add_argument("--target_words", type=int, default=0, help="length of reasoning to ask for")
    group.add_argument("--max_new_tokens", type=int, default=0, help="bound on a reply; default: the teacher's own")
    group.add_argument("--sampling", help="JSON, such as '{\"temperature\": 0.6}'")
    group.add_argument("--seed", type=int, default=0, help="of sampling, and of the oracle's faults")
    group.add_argument("--style", choices=STYLES, nargs="+", default=list(STYLES), help="figures: one teacher each")
    group.add_argument("--error_rate", type=float, default=0.0, help="figures: share of traces with a fault put in")
    group.add_argument("--batch_size", type=int, default=8, help="transformers: requests generated together")
    group.add_argument("--trust_remote_code", action="store_true", help="transformers: run the model's own code")
    group.add_argument("--base_url", nargs="+", default=["http://127.0.0.1:8000/v1"], help="openai: one or several")
    group.add_argument("--api_key_env", default="OPENAI_API_KEY", help="openai: environment variable with the key")
    group.add_argument("--in_flight", type=int, default=64, help="openai: requests under way at once")
    group.add_argument("--timeout", type=float, default=300.0, help="openai: seconds an attempt may take")
    group.add_argument("--backoff", type=float, default=1.0, help="openai: seconds before the second try; then doubled")
    group.add_argument("--attempts", type=int, default=6, help="openai: tries of one request")


def _add_budget(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max_tokens", type=int, default=0, help="read and written together; 0: no bound")
    group.add_argument("--max_cost", type=float, default=0.0, help="in the prices' unit; 0: no bound")
    group.add_argument("--price_in", type=float, default=0.0, help="a million tokens read")
    group.add_argument("--price_out", type=float, default=0.0, help="a million tokens written")


def _add_rules(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--skip_rules", choices=tuple(RULES), nargs="*", default=[], metavar="RULE", help=", ".join(RULES)
    )
    group.add_argument("--match", choices=MATCHES, default="number", help="how answers are compared with gold ones")
    group.add_argument("--min_length", type=int, default=1, help="of a rationale, in words and marks")
    group.add_argument("--max_length", type=int, default=2048, help="of a rationale, in words and marks")
    group.add_argument("--language", default="en", help="of rationales; '' for any")
    group.add_argument("--keep", choices=KEEP, default="all", help="of a question's accepted samples")
    group.add_argument("--target_length", type=int, default=0, help="the best sample is nearest to it; 0: the shortest")
    group.add_argument("--duplicates", choices=SCOPES, default="question", help="where near-duplicates are looked for")
    group.add_argument("--similarity", type=float, default=0.9, help="from which a rationale is a near-duplicate")
    group.add_argument("--min_agreement", type=float, default=0.0, help="share of other traces with the same answer")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--sampling is no JSON ({error}): write it as '{{\"temperature\": 0.6}}'") from error
    if not isinstance(value, dict):
        raise ValueError(f"--sampling is {text}; it must be a JSON object such as '{{\"temperature\": 0.6}}'")
    return value


def questions_from(options: argparse.Namespace, left_out: LeftOut | None = None) -> Iterator[TraceQuestion]:
    """Return the questions that the options name; rows of a file that cannot be asked go to `left_out`."""
    if options.questions:
        policy = ImagePolicy(options.image_root or options.questions.parent, options.allow_remote)
        return file_questions(options.questions, policy, task=options.task, limit=options.count, left_out=left_out)
    return figure_questions(options.count, split=options.split, seed=options.figures_seed)


def teachers_from(options: argparse.Namespace) -> Iterator[Teacher]:
    """Yield the teachers that the options name, each loaded when its turn comes."""
    if options.teacher == "figures":
        for style in dict.fromkeys(options.style):
            yield FiguresTeacher(style, options.error_rate, options.seed)
    elif options.teacher == "openai":
        from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher

        sampling = {"max_tokens": options.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, "seed": options.seed}
        settings = ServerSettings(
            options.model,
            options.base_url,
            options.api_key_env,
            {**sampling, **(options.sampling or {})},
            options.in_flight,
            options.timeout,
            options.attempts,
            options.backoff,
        )
        yield ServerTeacher(settings, revision=options.revision or "")
    else:
        from siq_vl.distill.teachers.local import TransformersTeacher  # loads torch: the other teachers need none

        yield TransformersTeacher(
            options.model,
            revision=options.revision,
            sampling=options.sampling,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
        )


def prompts_from(options: argparse.Namespace, teacher: Teacher) -> Prompts:
    """Return the templates for a teacher: those asked for, or its own."""
    return Prompts(options.prompts or teacher.prompts_family, options.hint, options.target_words, TEMPLATES)


def budget_from(options: argparse.Namespace) -> Budget:
    """Return the budget; what earlier runs have spent is not yet counted."""
    bound = options.max_new_tokens or (options.sampling or {}).get("max_tokens") or DEFAULT_MAX_NEW_TOKENS
    return Budget(options.max_tokens, options.max_cost, options.price_in, options.price_out, bound)


def verification_from(options: argparse.Namespace) -> Verification:
    """Return the rules for single traces."""
    return Verification(
        tuple(options.skip_rules), options.match, options.min_length, options.max_length, options.language
    )


def selection_from(options: argparse.Namespace) -> Selection:
    """Return the rules among traces."""
    return Selection(options.keep, options.target_length, options.duplicates, options.similarity, options.min_agreement)

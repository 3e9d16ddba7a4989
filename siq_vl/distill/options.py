"""The command line of `generate_traces.py`: dataclasses whose fields are its options, and what is built from them."""

import json
import logging
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from siq_vl.data.figures.dataset import SPLITS, STYLES
from siq_vl.distill.budget import Budget, BudgetLimits
from siq_vl.distill.prompts import Prompts, families
from siq_vl.distill.questions import (
    PROMPT_TASKS,
    ImagePolicy,
    LeftOut,
    TraceQuestion,
    figure_questions,
    file_questions,
)
from siq_vl.distill.selection import Selection
from siq_vl.distill.teachers.base import Teacher
from siq_vl.distill.teachers.oracle import FiguresTeacher
from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher
from siq_vl.distill.verification import Verification

logger = logging.getLogger(__name__)

TEACHERS = ("figures", "transformers", "openai")
DEFAULT_MAX_NEW_TOKENS = 1024
_DRAWN_COUNT = 300
# Options by their old names, which mean tokens where models are trained.
_RENAMED = {"--min_length": "--min_words", "--max_length": "--max_words"}


@dataclass
class StoreArguments:
    """The store, and what becomes of it."""

    output: Path = field(default=Path("outputs/traces"), metadata={"help": "the store; more is added to it"})
    samples: int = field(default=1, metadata={"help": "answers wanted for each question"})
    images: str = field(
        default="embed", metadata={"choices": ("embed", "reference"), "help": "keep pictures, or only their paths"}
    )
    retry_failed: bool = field(default=False, metadata={"help": "ask again where the teacher had no answer"})
    push_to_hub: str | None = field(
        default=None, metadata={"metavar": "REPO", "help": "upload the store, privately, as a data set"}
    )


@dataclass
class QuestionArguments:
    """Where the questions are from."""

    _argument_group_name = "questions"

    questions: Path | None = field(
        default=None, metadata={"help": "a .jsonl or .parquet file; by default drawn figures"}
    )
    count: int | None = field(
        default=None, metadata={"help": f"how many; default: {_DRAWN_COUNT} drawn ones, or the whole file"}
    )
    split: str = field(default="train", metadata={"choices": SPLITS, "help": "of the drawn figures"})
    figures_seed: int = field(default=3, metadata={"help": "stream of drawn figures"})
    task: str = field(
        default="general", metadata={"choices": PROMPT_TASKS, "help": "of a file's questions that name none"}
    )
    image_root: Path | None = field(
        default=None, metadata={"help": "pictures are read below it; default: the file's folder"}
    )
    allow_remote: bool = field(default=False, metadata={"help": "download pictures that are given as URLs"})

    def __post_init__(self) -> None:
        if self.count is None:
            # 0 stands for all of a file's questions; drawn ones have no end.
            self.count = 0 if self.questions else _DRAWN_COUNT
        if self.count < 0:
            raise ValueError(f"--count is {self.count}; it must be at least 1, or 0 for all of a file's questions")
        if not self.count and not self.questions:
            raise ValueError("--count is 0; the drawn data has no end, so pass how many questions to draw")

    def open(self, left_out: LeftOut | None = None) -> Iterator[TraceQuestion]:
        """Yield the questions; rows of a file that cannot be asked go to `left_out`."""
        count = self.count or 0
        if self.questions is None:
            return figure_questions(count, split=self.split, seed=self.figures_seed)
        policy = ImagePolicy(self.image_root or self.questions.parent, self.allow_remote)
        return file_questions(self.questions, policy, task=self.task, limit=count, left_out=left_out)


@dataclass
class TeacherArguments:
    """Who is asked, and how."""

    _argument_group_name = "teacher"

    teacher: str = field(
        default="figures",
        metadata={"choices": TEACHERS, "help": "the scripted oracle, a model in this process, or a server"},
    )
    model: str | None = field(default=None, metadata={"help": "folder or Hub id, or the model's name on the server"})
    revision: str | None = field(default=None, metadata={"help": "of the model's weights"})
    prompts: str | None = field(
        default=None,
        metadata={"help": "family of templates, a folder of siq_vl/distill/templates; default: the teacher's own"},
    )
    hint: bool = field(default=False, metadata={"help": "show the gold answer to the teacher; the traces say so"})
    target_words: int = field(default=0, metadata={"help": "words of reasoning to ask for; 0: as many as it likes"})
    max_new_tokens: int = field(
        default=0, metadata={"help": "bound on a reply, in the teacher's tokens; default: the teacher's own"}
    )
    sampling: str | None = field(default=None, metadata={"help": "JSON, such as '{\"temperature\": 0.6}'"})
    seed: int = field(default=0, metadata={"help": "of sampling, and of the oracle's faults"})
    style: list[str] = field(
        default_factory=lambda: list(STYLES), metadata={"choices": STYLES, "help": "figures: one teacher each"}
    )
    error_rate: float = field(default=0.0, metadata={"help": "figures: share of traces with a fault put in"})
    batch_size: int = field(default=8, metadata={"help": "transformers: requests generated together"})
    trust_remote_code: bool = field(default=False, metadata={"help": "transformers: run the model's own code"})

    def __post_init__(self) -> None:
        if self.teacher != "figures" and not self.model:
            raise ValueError(f"--teacher {self.teacher} needs --model")
        # Looked at here, since the model is loaded before its prompts are.
        if self.prompts is not None and self.prompts not in families():
            raise ValueError(f"--prompts is {self.prompts!r}; it must be one of {', '.join(families())}")
        _ = self.sampling_settings

    @property
    def sampling_settings(self) -> dict:
        """The sampling settings that are asked for.

        Raises:
            ValueError: `sampling` is no JSON object.
        """
        if self.sampling is None:
            return {}
        try:
            settings = json.loads(self.sampling)
        except json.JSONDecodeError as error:
            raise ValueError(f"--sampling is no JSON ({error}): write it as '{{\"temperature\": 0.6}}'") from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"--sampling is {self.sampling}; it must be a JSON object such as '{{\"temperature\": 0.6}}'"
            )
        return settings


@dataclass
class Options:
    """All options, by what they are about.

    Raises:
        ValueError: settings that do not go together.
    """

    store: StoreArguments
    questions: QuestionArguments
    teacher: TeacherArguments
    server: ServerSettings
    limits: BudgetLimits
    verification: Verification
    selection: Selection

    def __post_init__(self) -> None:
        if self.teacher.teacher == "figures" and self.questions.questions:
            raise ValueError(
                "the figures teacher knows drawn figures alone: leave --questions out, or pass another --teacher"
            )
        if self.store.images == "reference" and not self.questions.questions:
            raise ValueError("drawn pictures have no files to refer to: use --images embed")

    def teachers(self) -> Iterator[Teacher]:
        """Yield the teachers that are asked, each loaded when its turn comes."""
        asked = self.teacher
        if asked.teacher == "figures":
            # A style that is given twice is one teacher all the same.
            for style in dict.fromkeys(asked.style):
                yield FiguresTeacher(style, asked.error_rate, asked.seed)
        elif asked.teacher == "openai":
            sampling = {"max_tokens": asked.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, "seed": asked.seed}
            sampling.update(asked.sampling_settings)
            yield ServerTeacher(asked.model or "", self.server, sampling=sampling, revision=asked.revision or "")
        else:
            from siq_vl.distill.teachers.local import TransformersTeacher  # loads torch: the other teachers need none

            yield TransformersTeacher(
                asked.model or "",
                revision=asked.revision,
                sampling=asked.sampling_settings,
                max_new_tokens=asked.max_new_tokens,
                batch_size=asked.batch_size,
                seed=asked.seed,
                trust_remote_code=asked.trust_remote_code,
            )

    def prompts(self, teacher: Teacher) -> Prompts:
        """Return the templates for a teacher: those asked for, or its own."""
        family = self.teacher.prompts or teacher.prompts_family
        return Prompts(family, self.teacher.hint, self.teacher.target_words)

    def budget(self) -> Budget:
        """Return a teacher's budget; what earlier runs have spent is not yet counted."""
        bound = self.teacher.max_new_tokens or self.teacher.sampling_settings.get("max_tokens")
        return Budget(self.limits, max_new_tokens=bound or DEFAULT_MAX_NEW_TOKENS)


def parse_options(description: str, argv: list[str] | None = None) -> Options:
    """Parse the command line.

    Raises:
        ValueError: a setting that cannot be, or settings that do not go together.
    """
    parts = (
        StoreArguments, QuestionArguments, TeacherArguments, ServerSettings, BudgetLimits, Verification, Selection,
    )  # fmt: skip
    parser = HfArgumentParser(parts, description=description, formatter_class=RawDescriptionHelpFormatter)
    for given in sys.argv[1:] if argv is None else argv:
        old = given.partition("=")[0]
        if old in _RENAMED:
            logger.warning("%s is deprecated: it counts words, and is called %s now", old, _RENAMED[old])
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return Options(*parsed)

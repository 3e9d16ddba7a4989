"""The command line of `generate_traces.py`: dataclasses whose fields are its options, and what is built from them."""

import json
import logging
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from siq_vl.data.adapters import FORMATS
from siq_vl.data.figures.dataset import SPLITS, STYLES
from siq_vl.data.mixture_config import FIGURES, SourceConfig
from siq_vl.data.sources import Source
from siq_vl.distill.budget import Budget, BudgetLimits
from siq_vl.distill.descriptions import DESCRIPTIONS, pictures_to_describe
from siq_vl.distill.prompts import Prompts, families
from siq_vl.distill.questions import (
    PROMPT_TASKS,
    ImagePolicy,
    LeftOut,
    TraceQuestion,
    figure_questions,
    file_questions,
    is_file_of_questions,
)
from siq_vl.distill.schema import DESCRIPTION_TASKS
from siq_vl.distill.selection import Selection
from siq_vl.distill.source_questions import TURNS, source_questions
from siq_vl.distill.teachers.base import Teacher
from siq_vl.distill.teachers.models import defaults_for, request_fields
from siq_vl.distill.teachers.oracle import FiguresTeacher
from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher
from siq_vl.distill.traces import is_evaluated
from siq_vl.distill.verification import Verification

logger = logging.getLogger(__name__)

TEACHERS = ("figures", "transformers", "openai")
_DRAWN_COUNT = 300
_SUFFIXES = (".jsonl", ".json", ".parquet")
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
    """Where the questions are from: drawn figures, a file of questions, or any source of a recipe, by its fields."""

    _argument_group_name = "questions, of a source with the fields of a recipe's `sources`"

    questions: str | None = field(
        default=None,
        metadata={
            "aliases": ["--source"],
            "metavar": "PATH",
            "help": "a Hub id, file or folder that a recipe could train on, or a file of questions; default: drawn figures",
        },
    )
    count: int | None = field(
        default=None, metadata={"help": f"how many; default: {_DRAWN_COUNT} drawn ones, or all of a source"}
    )
    split: str = field(default="train", metadata={"help": f"to read; of the drawn figures {', '.join(SPLITS)}"})
    subset: str | None = field(default=None, metadata={"help": "configuration of a Hub data set, or a sub-folder"})
    format: str | None = field(
        default=None, metadata={"help": f"one of {', '.join(FORMATS)}; by default told by the columns"}
    )
    data_files: str | None = field(default=None, metadata={"help": "file of a Hub data set, where it has several"})
    streaming: bool = field(default=False, metadata={"help": "read a Hub data set row by row, rather than all of it"})
    instruction: str | None = field(default=None, metadata={"help": "added to every question; for captions, asks"})
    turns: str = field(
        default="all", metadata={"choices": TURNS, "help": "of a row with several questions: all, or the first alone"}
    )
    figures_seed: int = field(default=3, metadata={"help": "stream of drawn figures"})
    task: str | None = field(
        default=None,
        metadata={"choices": PROMPT_TASKS, "help": "which prompt; default: a file's own, or what suits the format"},
    )
    describe: list[str] = field(
        default_factory=list,
        metadata={
            "choices": DESCRIPTION_TASKS,
            "help": "ask no questions, but have the pictures of the store's kept traces described, for a student that "
            "reads in place of seeing: their captions, the text in them, or both",
        },
    )
    image_root: Path | None = field(
        default=None,
        metadata={
            "aliases": ["--image_folder"],
            "help": "pictures are read below it; default: the folder of the rows",
        },
    )
    allow_remote: bool = field(
        default=False,
        metadata={"aliases": ["--allow_remote_images"], "help": "download pictures that are given as URLs"},
    )

    def __post_init__(self) -> None:
        if self.describe and self.questions:
            raise ValueError("--describe is about the pictures of the store's traces: leave --questions out")
        if self.count is None:
            # 0 stands for all of a source's questions, or of a store's pictures; drawn ones have no end.
            self.count = 0 if self.questions or self.describe else _DRAWN_COUNT
        if self.count < 0:
            raise ValueError(f"--count is {self.count}; it must be at least 1, or 0 for all of a source's questions")
        if not self.count and not self.questions and not self.describe:
            raise ValueError("--count is 0; the drawn data has no end, so pass how many questions to draw")
        if not self.questions and self.split not in SPLITS:
            raise ValueError(f"--split is {self.split!r}; of the drawn figures it must be one of {', '.join(SPLITS)}")
        for name in ("subset", "format", "data_files", "instruction", "streaming"):
            if getattr(self, name) and not self.questions:
                raise ValueError(f"--{name} is about a source: name it with --questions")
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"--format is {self.format!r}; it must be one of {', '.join(FORMATS)}")

    @property
    def _is_file_of_questions(self) -> bool:
        """Whether the questions are in the form of this project's own files, rather than in a published one."""
        named = self.subset or self.format or self.data_files or self.instruction or self.streaming
        return not named and is_file_of_questions(Path(self.questions or ""))

    def _check_split(self, folder: Path) -> None:
        """Refuse a folder whose files are of other splits, all of which would be read where none is of the one asked for.

        Raises:
            ValueError: it is one that models are evaluated on.
        """
        if not folder.is_dir() or is_evaluated(self.split):
            return
        names = sorted(str(file.relative_to(folder)) for suffix in _SUFFIXES for file in folder.rglob(f"*{suffix}"))
        if any(self.split in name for name in names):
            return
        evaluated = [name for name in names if is_evaluated(name)]
        if evaluated:
            raise ValueError(
                f"no file of {folder.name} is of the split {self.split}, and {', '.join(evaluated[:5])} are there: pass the "
                "--split of one of them, and do not evaluate on it what is trained on its traces"
            )

    def described(self) -> dict[str, str]:
        """Return what a store notes of where its questions are from."""
        if self.describe:
            return {"source": "pictures of the traces"}
        if not self.questions:
            return {"source": FIGURES, "split": self.split}
        # Never an absolute path: a store is shared.
        path = Path(self.questions)
        noted = {"source": path.resolve().name if path.exists() else self.questions}
        for name in ("subset", "data_files"):
            if value := getattr(self, name):
                noted[name] = value
        if not self._is_file_of_questions:  # such a file says nothing of splits
            noted["split"] = self.split
        return noted

    def open(self, left_out: LeftOut | None = None) -> Iterator[TraceQuestion]:
        """Return the questions; rows of a file or source that cannot be asked go to `left_out`."""
        count = self.count or 0
        if self.questions is None:
            return figure_questions(count, split=self.split, seed=self.figures_seed)
        path = Path(self.questions)
        if self._is_file_of_questions:
            policy = ImagePolicy(self.image_root or path.parent, self.allow_remote)
            return file_questions(path, policy, task=self.task or "general", limit=count, left_out=left_out)
        if path.is_file() and path.suffix not in _SUFFIXES:
            raise ValueError(
                f"{path.name} is no source of questions: pass a .jsonl, .json or .parquet file, or a folder"
            )
        self._check_split(path)
        source = Source(
            SourceConfig(
                path=self.questions,
                format=self.format,
                subset=self.subset,
                data_files=self.data_files,
                split=self.split,
                streaming=self.streaming,
                image_folder=str(self.image_root) if self.image_root else None,
                allow_remote_images=self.allow_remote,
                instruction=self.instruction,
            )
        )
        return source_questions(source, task=self.task, turns=self.turns, limit=count, left_out=left_out)


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
    sampling: str | None = field(
        default=None,
        metadata={"help": "JSON, such as '{\"temperature\": 0.6}', in place of what the model's card has"},
    )
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
        sampling = self.sampling_settings
        for bound in ("max_tokens", "max_new_tokens"):
            if self.max_new_tokens and bound in sampling:
                raise ValueError(
                    f"--max_new_tokens is {self.max_new_tokens}, and --sampling sets {bound} too: bound a reply in one place"
                )

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
        if self.teacher.teacher == "figures" and self.questions.describe:
            raise ValueError("drawn figures have captions of their own: pass another --teacher to describe pictures")
        drawn = not self.questions.questions and not self.questions.describe
        if self.store.images == "reference" and drawn:
            raise ValueError("drawn pictures have no files to refer to: use --images embed")

    def teachers(self) -> Iterator[Teacher]:
        """Yield the teachers that are asked, each loaded when its turn comes."""
        asked = self.teacher
        if asked.teacher == "figures":
            # A style that is given twice is one teacher all the same.
            for style in dict.fromkeys(asked.style):
                yield FiguresTeacher(style, asked.error_rate, asked.seed)
        elif asked.teacher == "openai":
            model = asked.model or ""
            defaults = defaults_for(model)
            given = {"seed": asked.seed, **asked.sampling_settings}
            yield ServerTeacher(
                model,
                self.server,
                sampling=request_fields(model, given, asked.max_new_tokens),
                revision=asked.revision or "",
                prompts_family=defaults.prompts,
                system=defaults.system,
            )
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

    @property
    def folder(self) -> Path:
        """The store that is written: of traces, or, inside it, of descriptions."""
        if self.questions.describe:
            return self.store.output / DESCRIPTIONS
        return self.store.output

    @property
    def selected(self) -> Selection:
        """How accepted traces are chosen among one another; of descriptions all are kept."""
        if self.questions.describe:
            return Selection(duplicates="none")
        return self.selection

    @property
    def total(self) -> int | None:
        """How many traces are wanted in all; None where that is not known before the questions have been read."""
        asked = self.questions
        if not asked.count:
            return None
        return asked.count * self.store.samples * max(1, len(asked.describe))

    def open_questions(self, left_out: LeftOut) -> Iterator[TraceQuestion]:
        """Return what is asked; rows that cannot be asked go to `left_out`."""
        asked = self.questions
        if asked.describe:
            return pictures_to_describe(
                self.store.output, asked.describe, image_root=asked.image_root, limit=asked.count or 0
            )
        return asked.open(left_out)

    def prompts(self, teacher: Teacher) -> Prompts:
        """Return the templates for a teacher: those asked for, or its own."""
        family = self.teacher.prompts or teacher.prompts_family
        if self.questions.describe:
            return Prompts(family, tasks=DESCRIPTION_TASKS)
        return Prompts(family, self.teacher.hint, self.teacher.target_words)

    def budget(self, teacher: Teacher) -> Budget:
        """Return a teacher's budget; what earlier runs have spent is not yet counted."""
        return Budget(self.limits, max_new_tokens=teacher.max_new_tokens)


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

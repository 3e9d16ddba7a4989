"""Prompts: template files in `templates/<family>/<task>.jinja`, each with its version in its first line.

A family is a way of asking that suits some teachers. It holds templates only for the tasks that it words otherwise than
the family `default`, and uses `default`'s for the others.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, UndefinedError

from siq_vl.distill.questions import PROMPT_TASKS, TraceQuestion

TEMPLATES = Path(__file__).parent / "templates"
# Families that word nothing otherwise yet. Traces name them, so they are not simply `default`: such a trace would be
# asked for again.
_LIKE_DEFAULT = ("qwen3_vl_instruct",)
_VERSION = re.compile(r"\A\{#\s*version:\s*(\d+)\s*#\}\n")


def families(folder: Path = TEMPLATES) -> list[str]:
    """Return the prompt families."""
    folders = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted({*folders, *_LIKE_DEFAULT})


@dataclass(frozen=True)
class Prompts:
    """The prompts of one teacher.

    Attributes:
        family: one of `families`.
        hint: whether the gold answer is shown to the teacher. It never is otherwise.
        target_words: length of reasoning to ask for; 0 asks for none.
        folder: where the templates lie.
        tasks: what is asked for; every one of them needs a template.
    """

    family: str = "default"
    hint: bool = False
    target_words: int = 0
    folder: Path = TEMPLATES
    tasks: tuple[str, ...] = PROMPT_TASKS

    def __post_init__(self) -> None:
        known = families(self.folder)
        for task in self.tasks:
            if self.family not in known or not (self.folder / self._file(task)).is_file():
                raise ValueError(
                    f"prompt family {self.family!r} has no {task}.jinja; the families are {', '.join(known)}"
                )

    def _file(self, task: str) -> str:
        """Return the template of a task, below the folder: the family's own, else the default one."""
        own = f"{self.family}/{task}.jinja"
        if (self.folder / own).is_file():
            return own
        return f"default/{task}.jinja"

    @cached_property
    def _templates(self) -> dict[str, Template]:
        environment = Environment(
            loader=FileSystemLoader(self.folder),
            undefined=StrictUndefined,
            autoescape=False,
            keep_trailing_newline=False,
        )
        templates = {}
        for task in self.tasks:
            templates[task] = environment.get_template(self._file(task))
        return templates

    def render(self, question: TraceQuestion) -> str:
        """Return the user turn for a question, the pictures left out.

        Raises:
            ValueError: a hint is asked for and the question has no gold answer, or it has more choices than letters.
        """
        if self.hint and not question.golds:
            raise ValueError(f"question {question.id} has no gold answer to give as a hint: leave --hint out")
        hint = question.golds[0] if self.hint else ""
        try:
            return self._rendered(question.task, question.question, question.choices, hint)
        except UndefinedError as error:
            raise ValueError(
                f"question {question.id} does not fit the template {self._file(question.task)} ({error})"
            ) from error

    def _rendered(self, task: str, question: str, choices: tuple[str, ...], hint: str) -> str:
        return self._templates[task].render(
            question=question, choices=choices, hint=hint, target_words=self.target_words
        )

    @cached_property
    def versions(self) -> dict[str, str]:
        """By task, `family/task@version-checksum`, which a trace stores of its prompt.

        The checksum is of what the template renders, includes and target length too: another prompt is another trace,
        wherever its words come from, and moving the same words to another file changes nothing.

        Raises:
            ValueError: a template whose first line is not its version.
        """
        hint = "HINT" if self.hint else ""
        found = {}
        for task in self.tasks:
            file = self._file(task)
            version = _VERSION.match((self.folder / file).read_text(encoding="utf-8"))
            if not version:
                raise ValueError(f"{file} must begin with a line {{# version: N #}}")
            text = self._rendered(task, "QUESTION", ("FIRST", "SECOND"), hint)
            checksum = hashlib.sha256(text.encode()).hexdigest()[:8]
            found[task] = f"{self.family}/{task}@{version.group(1)}-{checksum}"
        return found

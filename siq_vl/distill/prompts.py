"""Prompts: template files in `templates/<family>/<task>.jinja`, each with its version in its first line."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from siq_vl.distill.questions import TASKS, TraceQuestion

TEMPLATES = Path(__file__).parent / "templates"
_VERSION = re.compile(r"\A\{#\s*version:\s*(\d+)\s*#\}\n")
_ENVIRONMENT: dict[str, Any] = {"undefined": StrictUndefined, "autoescape": False, "keep_trailing_newline": False}


def families() -> list[str]:
    """Return the prompt families: one folder of templates for each kind of teacher."""
    return sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir())


@dataclass(frozen=True)
class Prompts:
    """The prompts of one teacher.

    Attributes:
        family: a folder of `folder`.
        hint: whether the gold answer is shown to the teacher. It never is otherwise.
        target_words: length of reasoning to ask for; 0 asks for none.
        folder: where the families lie.
    """

    family: str = "default"
    hint: bool = False
    target_words: int = 0
    folder: Path = TEMPLATES

    def __post_init__(self) -> None:
        for task in TASKS:
            if not (self.folder / self.family / f"{task}.jinja").is_file():
                raise ValueError(
                    f"prompt family {self.family!r} has no {task}.jinja; the families are {', '.join(families())}"
                )

    @cached_property
    def _environment(self) -> Environment:
        return Environment(loader=FileSystemLoader(self.folder), **_ENVIRONMENT)

    @cached_property
    def _templates(self) -> dict:
        return {task: self._environment.get_template(f"{self.family}/{task}.jinja") for task in TASKS}

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
                f"question {question.id} does not fit the template {self.family}/{question.task}.jinja ({error})"
            ) from error

    def _rendered(self, task: str, question: str, choices: tuple[str, ...], hint: str) -> str:
        return self._templates[task].render(
            question=question, choices=choices, hint=hint, target_words=self.target_words
        )

    @cached_property
    def versions(self) -> dict[str, str]:
        """By task, `family/task@version-checksum`; the checksum is of what the template renders, its includes too.

        Raises:
            ValueError: a template whose first line is not its version.
        """
        found = {}
        for task in TASKS:
            name = f"{self.family}/{task}"
            version = _VERSION.match((self.folder / f"{name}.jinja").read_text(encoding="utf-8"))
            if not version:
                raise ValueError(f"{name}.jinja must begin with a line {{# version: N #}}")
            text = self._rendered(task, "QUESTION", ("FIRST", "SECOND"), "HINT" if self.hint else "")
            found[task] = f"{name}@{version.group(1)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return found

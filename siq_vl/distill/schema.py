"""What a trace is: the columns of a store, said once for who writes, verifies, selects and reads them."""

import json
from dataclasses import dataclass
from typing import Annotated, TypedDict, get_type_hints

from datasets import Features, Image, List, Value

DESCRIPTION_TASKS = ("caption", "ocr")  # of stores of descriptions: what pictures show, and the text in them

Text = Annotated[str, Value("string")]
Texts = Annotated[list[str], List(Value("string"))]
Images = Annotated[list[bytes], List(Image())]


class TeacherTrace(TypedDict):
    """What the teacher was asked, how, and what it replied; nothing changes this once it is stored.

    Attributes:
        trace_id: see `traces.trace_id`.
        sample_id: the question's id, unique in its source.
        images: the encoded pictures; none in a store that keeps their paths alone.
        image_paths: where the pictures were read from, below the image root.
        question: the question as it was read, without the prompt around it.
        golds: the gold answers, one of which is enough; possibly none.
        choices: the texts of a multiple choice.
        kind: how answers are compared, one of `answers.KINDS`.
        task: which prompt was used, one of `questions.PROMPT_TASKS`, or of `DESCRIPTION_TASKS`.
        teacher: the teacher's name.
        teacher_kind: `"figures"`, `"transformers"`, `"openai"`, or another that a `Teacher` of your own names.
        revision: of the teacher's weights or script.
        prompt: the prompt's family, task, version and checksum, see `Prompts.versions`.
        hinted: whether the teacher was shown a gold answer.
        sampling: the teacher's sampling settings, as JSON.
        repeat: number of the sample, from 0, among those of one question and teacher.
        output: all of the teacher's text.
        finish_reason: `"stop"`, `"length"`, what a server said instead, or `""` where nothing came.
        error: why there is no text, else the empty string.
        prompt_tokens: tokens read, pictures included, by the teacher's own count.
        completion_tokens: tokens written.
        seconds: from asking to having.
        attempts: how often it was asked.
        injected: the fault that the scripted oracle put in on purpose; verification never sees it.
    """

    trace_id: Text
    sample_id: Text
    images: Images
    image_paths: Texts
    question: Text
    golds: Texts
    choices: Texts
    kind: Text
    task: Text
    teacher: Text
    teacher_kind: Text
    revision: Text
    prompt: Text
    hinted: Annotated[bool, Value("bool")]
    sampling: Text
    repeat: Annotated[int, Value("int32")]
    output: Text
    finish_reason: Text
    error: Text
    prompt_tokens: Annotated[int, Value("int64")]
    completion_tokens: Annotated[int, Value("int64")]
    seconds: Annotated[float, Value("float64")]
    attempts: Annotated[int, Value("int32")]
    injected: Text


class Verdict(TypedDict):
    """What verification and selection write about a trace; both may write it again.

    Attributes:
        rationale: the reasoning, taken out of the output.
        answer: the final answer, taken out of the output.
        rationale_tokens: the rationale's length in words, numbers and punctuation marks.
        rejected_by: the rules that reject it; none for a trace that is kept.
        agreement: the share of the question's other answers that are the same; None where there is no other.
        verdict: `"kept"` or `"rejected"`.
    """

    rationale: Text
    answer: Text
    rationale_tokens: Annotated[int, Value("int32")]
    rejected_by: Texts
    agreement: Annotated[float | None, Value("float64")]
    verdict: Text


class TraceRow(TeacherTrace, Verdict):
    """One row of a store. Pictures are bytes here, and `{"bytes": ..., "path": None}` in the shards, as `datasets` has it."""


def _features() -> Features:
    """Return the columns of `TraceRow`, in its order, as `datasets` describes them."""
    columns = {}
    for base in (TeacherTrace, Verdict):
        for name, hint in get_type_hints(base, include_extras=True).items():
            (columns[name],) = hint.__metadata__
    return Features(columns)


FEATURES = _features()
VERDICT_COLUMNS = tuple(Verdict.__annotations__)
_BOUNDS = ("max_new_tokens", "max_tokens")  # what local models and servers call the bound of a reply


def reply_bound(sampling: str) -> int:
    """Return the most tokens that a reply could have, by the column `sampling`; 0 where it does not say."""
    settings = _settings(sampling)
    for name in _BOUNDS:
        if isinstance(settings.get(name), int):
            return settings[name]
    return 0


def without_bound(sampling: str) -> dict:
    """Return the settings of the column `sampling`, that bound left out."""
    settings = _settings(sampling)
    for name in _BOUNDS:
        settings.pop(name, None)
    return settings


def _settings(sampling: str) -> dict:
    """Return the settings that a store's column holds; none where a store that was mended holds no JSON there."""
    try:
        settings = json.loads(sampling)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(settings, dict):
        return {}
    return settings


@dataclass
class TokensSpent:
    """What the replies of a teacher have taken.

    Attributes:
        read: tokens read.
        written: tokens written.
        replies: replies that say how many tokens they read.
        unread: replies with text that do not.
        unwritten: replies with text that do not say how many tokens they wrote.
    """

    read: int = 0
    written: int = 0
    replies: int = 0
    unread: int = 0
    unwritten: int = 0

    def add(self, prompt_tokens: int, completion_tokens: int, *, text: bool) -> None:
        """Count one reply, which must have read and written some tokens where it has `text`."""
        self.read += prompt_tokens
        self.written += completion_tokens
        if prompt_tokens > 0:
            self.replies += 1
        if text and not prompt_tokens:
            self.unread += 1
        if text and not completion_tokens:
            self.unwritten += 1

"""What a teacher is: pictures and a question in, text out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from siq_vl.distill.questions import EncodedPicture, TraceQuestion


class TeacherLost(ValueError):
    """The teacher cannot go on at all (wrong key, unknown model, no server): the run stops, and nothing is recorded."""


@dataclass(frozen=True)
class TeacherRequest:
    """One request: the pictures and the words of the user turn; `repeat` counts the samples of one question."""

    question: TraceQuestion
    pictures: Sequence[EncodedPicture]
    prompt: str
    repeat: int = 0


@dataclass(frozen=True)
class TeacherReply:
    """One reply.

    Attributes:
        text: the whole output.
        finish_reason: `"stop"`, `"length"`, or `""` where nothing came.
        prompt_tokens: tokens read, pictures included, by the teacher's own count.
        completion_tokens: tokens written.
        seconds: from asking to having.
        attempts: how often it was asked.
        error: why there is no text, else the empty string.
        injected: the fault that the scripted oracle put in on purpose; verification never sees it.
    """

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    attempts: int = 1
    error: str = ""
    injected: str = ""


class Teacher(ABC):
    """A source of reasoning.

    Attributes:
        kind: `"figures"`, `"transformers"` or `"openai"`.
        name: what the teacher is called in the store, unique among the teachers of a question.
        revision: of the weights or of the script.
        prompts_family: the folder of templates made for it.
        in_flight: calls of `generate` worth having under way at once.
        batch_size: requests worth giving to one call.
        max_new_tokens: the most tokens of a reply, which a budget reserves for it.
    """

    kind: ClassVar[str]
    name: str
    revision: str = ""
    prompts_family: str = "default"
    in_flight: int = 1
    batch_size: int = 1
    max_new_tokens: int = 1024

    @abstractmethod
    def settings(self) -> dict:
        """Return the sampling settings that belong to a trace: another value here is another trace."""

    @abstractmethod
    async def generate(self, requests: Sequence[TeacherRequest]) -> list[TeacherReply]:
        """Answer requests, in their order; a request that fails gets a `TeacherReply` with an `error`.

        Raises:
            TeacherLost: no request can succeed any more.
        """

    async def close(self) -> None:  # noqa: B027 - most teachers hold nothing
        """Release connections."""

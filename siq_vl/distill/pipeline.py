"""Asking a teacher everything that is missing, and keeping each answer the moment it is there."""

import asyncio
import json
import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from tqdm.auto import tqdm

from siq_vl.distill.budget import Budget
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import Picture, TraceQuestion
from siq_vl.distill.selection import verdict_columns
from siq_vl.distill.teachers.base import Asked, Said, Teacher
from siq_vl.distill.traces import TraceStore, storable, trace_id
from siq_vl.distill.verification import Trace, Verification, read

logger = logging.getLogger(__name__)


_FAILURES = 1000


@dataclass(frozen=True)
class Job:
    """One trace that is missing."""

    id: str
    question: TraceQuestion
    repeat: int


@dataclass
class Progress:
    """What a run has done: traces by verdict, and why it ended."""

    made: int = 0
    skipped: int = 0
    rejected: Counter = field(default_factory=Counter)
    failed: int = 0
    failures: Counter = field(default_factory=Counter)  # by how their errors begin; `_FAILURES` kinds at most
    ended: str = "done"  # or "budget" or "interrupted"


class Run:
    """One pass of one teacher over questions.

    Args:
        teacher: who is asked.
        prompts: how.
        store: where the answers go.
        verification: the rules for each answer.
        samples: answers wanted for each question.
        budget: what may be spent.
        embed: put pictures into the store; otherwise it keeps their paths.
        progress: show a bar.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Prompts,
        store: TraceStore,
        verification: Verification,
        *,
        samples: int = 1,
        budget: Budget | None = None,
        embed: bool = True,
        progress: bool = True,
    ):
        if samples < 1:
            raise ValueError(f"samples is {samples}; it must be at least 1")
        self._teacher, self._prompts, self._store, self._verification = teacher, prompts, store, verification
        self._samples, self._budget, self._embed = samples, budget or Budget(), embed
        self._sampling = json.dumps(teacher.settings(), sort_keys=True)
        self._stop = False
        self.progress = Progress()
        self._bar_shown = progress
        self._bar = tqdm(disable=True)

    def missing(self, questions: Iterable[TraceQuestion]) -> Iterator[Job]:
        """Yield the jobs that the store has no trace of, question by question.

        Raises:
            ValueError: two questions have the same id.
        """
        known = self._store.trace_ids()
        seen: set[int] = set()
        for question in questions:
            same = {
                "teacher": self._teacher.name,
                "revision": self._teacher.revision,
                "prompt": self._prompts.versions[question.task],
                "hinted": self._prompts.hint,
                "sampling": self._sampling,
            }
            for repeat in range(self._samples):
                id = trace_id(question.id, same, repeat)
                number = int(id, 16)
                if number in seen:
                    raise ValueError(f"two questions have the id {question.id!r}: ids must be unique in a source")
                seen.add(number)
                if number in known:
                    self.progress.skipped += 1
                    self._bar.update()
                else:
                    yield Job(id, question, repeat)

    def over(self, questions: Iterable[TraceQuestion], total: int | None = None) -> Progress:
        """Ask everything that is missing; every finished answer is in the store when this returns or raises.

        Ctrl-C (or SIGTERM) lets what is under way finish and asks nothing more; a second one gives that up, too.

        Raises:
            ValueError: the teacher is lost, or the questions are at fault.
        """
        asyncio.run(self._over(questions, total))
        return self.progress

    async def _over(self, questions: Iterable[TraceQuestion], total: int | None) -> None:
        jobs = self.missing(questions)
        with (
            tqdm(total=total, desc=self._teacher.name, unit="trace", disable=not self._bar_shown) as self._bar,
            _interruptible(self._interrupt),
        ):
            workers = [asyncio.create_task(self._work(jobs)) for _ in range(max(1, self._teacher.in_flight))]
            self._cancel = lambda: [worker.cancel() for worker in workers]
            try:
                done = await asyncio.gather(*workers, return_exceptions=True)
            finally:
                await self._teacher.close()
        for outcome in done:
            if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
                raise outcome

    def _interrupt(self) -> None:
        if self._stop:
            self._cancel()
        else:
            logger.warning("stopping: what is under way is waited for; interrupt again not to wait")
        self._stop, self.progress.ended = True, "interrupted"

    async def _work(self, jobs: Iterator[Job]) -> None:
        try:
            while not self._stop and (batch := self._take(jobs)):
                asked = [one for job in batch if (one := await self._prepare(job)) is not None]
                if asked and not await self._ask([job for job, _ in asked], [request for _, request in asked]):
                    return
                await asyncio.sleep(0)
        except BaseException:
            self._stop = True  # the others finish what they have under way
            raise

    def _take(self, jobs: Iterator[Job]) -> list[Job]:
        batch: list[Job] = []
        for job in jobs:
            batch.append(job)
            if len(batch) >= self._teacher.batch_size:
                break
        return batch

    async def _prepare(self, job: Job) -> tuple[Job, Asked] | None:
        """Open the pictures and write the prompt; where that cannot be done, the job ends without a teacher."""
        question, part = job.question, "picture"
        try:
            # A picture from elsewhere must not keep the requests under way from their answers.
            pictures = await asyncio.to_thread(question.pictures) if question.remote else question.pictures()
            part = "prompt"
            prompt = self._prompts.render(question)
        except ValueError as error:
            where = f" of {question.origin}" if question.origin else ""
            self._keep(job, [], Said("", "", attempts=0, error=f"{part}{where}: {error}"))
            return None
        return job, Asked(question, pictures, prompt, job.repeat)

    async def _ask(self, jobs: list[Job], asked: list[Asked]) -> bool:
        """Ask one batch and keep the answers; return False once the budget has no room for another request."""
        while asked:
            granted = await self._budget.reserve(len(asked))
            if not granted:
                self._stop, self.progress.ended = True, "budget"
                return False
            said: list[Said] = []
            try:
                said = await self._teacher.generate(asked[:granted])
            finally:
                for place in range(granted):
                    await self._budget.settle(said[place] if said else None)
            for job, request, answer in zip(jobs[:granted], asked[:granted], said, strict=True):
                self._keep(job, list(request.pictures), answer)
            jobs, asked = jobs[granted:], asked[granted:]
        return True

    def _keep(self, job: Job, pictures: list[Picture], said: Said) -> None:
        question = job.question
        said = replace(
            said, text=storable(said.text), finish_reason=storable(said.finish_reason), error=storable(said.error)
        )
        parsed, tokens = read(said.text)
        trace = Trace(
            question.question,
            question.golds,
            question.kind,
            question.choices,
            said.text,
            said.finish_reason,
            self._prompts.hint,
            said.error,
            parsed,
            tokens,
        )
        judged = verdict_columns(trace, self._verification)
        self._store.append(
            {
                "trace_id": job.id,
                "sample_id": question.id,
                "images": [picture.data for picture in pictures] if self._embed else [],
                "image_paths": [picture.path for picture in pictures if picture.path],
                "question": question.question,
                "golds": list(question.golds),
                "choices": list(question.choices),
                "kind": question.kind,
                "task": question.task,
                "teacher": self._teacher.name,
                "teacher_kind": self._teacher.kind,
                "revision": self._teacher.revision,
                "prompt": self._prompts.versions[question.task],
                "hinted": self._prompts.hint,
                "sampling": self._sampling,
                "repeat": job.repeat,
                "output": said.text,
                "finish_reason": said.finish_reason,
                "error": said.error,
                "prompt_tokens": said.prompt_tokens,
                "completion_tokens": said.completion_tokens,
                "seconds": said.seconds,
                "attempts": said.attempts,
                "injected": said.injected,
                **judged,
            }
        )
        self.progress.made += 1
        if said.error:
            self.progress.failed += 1
            if len(self.progress.failures) < _FAILURES:
                self.progress.failures[said.error[:80]] += 1
        self.progress.rejected.update(judged["rejected_by"])
        self._bar.update()
        if self.progress.made % 64 == 0:
            self._bar.set_postfix(rejected=sum(self.progress.rejected.values()), failed=self.progress.failed)


@contextmanager
def _interruptible(interrupt: Callable[[], None]) -> Iterator[None]:
    """Call `interrupt` on SIGINT and SIGTERM while the block runs, where the platform can."""
    loop = asyncio.get_running_loop()
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, interrupt)
            signals.append(number)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)

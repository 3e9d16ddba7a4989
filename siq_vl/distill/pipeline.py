"""Asking a teacher everything that is missing, and keeping each answer the moment it is there."""

import asyncio
import json
import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from siq_vl.distill.budget import Budget
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import EncodedPicture, TraceQuestion
from siq_vl.distill.schema import TeacherTrace, reply_bound, without_bound
from siq_vl.distill.teachers.base import Teacher, TeacherReply, TeacherRequest
from siq_vl.distill.traces import TraceStore, storable, trace_id
from siq_vl.distill.verification import RuleInput, Verification

logger = logging.getLogger(__name__)

_KINDS_OF_FAILURE = 1000  # counted at most, however differently a server words its errors
_ERROR_START = 80  # characters by which errors are told apart


@dataclass(frozen=True)
class MissingTrace:
    """A trace that the store does not have yet."""

    id: str
    question: TraceQuestion
    repeat: int


@dataclass
class Progress:
    """What a run has done.

    Attributes:
        made: new traces in the store.
        skipped: traces that were there already.
        rejected: new traces by the rules that reject them.
        failed: new traces for which the teacher had no answer.
        failures: these, by how their errors begin.
        ended: `"done"`, `"budget"` where it was spent before, or `"interrupted"`.
    """

    made: int = 0
    skipped: int = 0
    rejected: Counter = field(default_factory=Counter)
    failed: int = 0
    failures: Counter = field(default_factory=Counter)
    ended: str = "done"


class Run:
    """One pass of one teacher over questions.

    Args:
        teacher: who is asked.
        prompts: how.
        store: where the traces go.
        verification: the rules for each trace.
        samples: traces wanted of each question.
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
        self._teacher = teacher
        self._prompts = prompts
        self._store = store
        self._verification = verification
        self._samples = samples
        self._budget = budget or Budget()
        self._embed = embed
        self._sampling = json.dumps(teacher.settings(), sort_keys=True)
        self._stop = False  # whether no worker takes up anything more
        self._workers: list[asyncio.Task] = []
        self.progress = Progress()
        self._bar_shown = progress
        self._bar = tqdm(disable=True)

    def missing(self, questions: Iterable[TraceQuestion]) -> Iterator[MissingTrace]:
        """Yield what the store has no trace of, question by question.

        Raises:
            ValueError: two questions have the same id.
        """
        known = self._store.trace_ids()
        shorter, cut = self._with_smaller_bounds()
        seen: set[int] = set()
        for question in questions:
            # Whatever is in here makes another trace when it changes. Stores of earlier runs hang on these words.
            asked_how = {
                "teacher": self._teacher.name,
                "revision": self._teacher.revision,
                "prompt": self._prompts.versions[question.task],
                "hinted": self._prompts.hint,
                "sampling": self._sampling,
            }
            for repeat in range(self._samples):
                id = trace_id(question.id, asked_how, repeat)
                number = int(id, 16)
                if number in seen:
                    raise ValueError(f"two questions have the id {question.id!r}: ids must be unique in a source")
                seen.add(number)
                if number in known:
                    self._skip()
                    continue
                # A reply that ended within a smaller bound is what a greater one would have given.
                earlier = [trace_id(question.id, {**asked_how, "sampling": each}, repeat) for each in shorter]
                finished = {int(each, 16) for each in earlier} & known - cut
                if finished:
                    self._skip()
                else:
                    yield MissingTrace(id, question, repeat)

    def _skip(self) -> None:
        self.progress.skipped += 1
        self._bar.update()

    def _with_smaller_bounds(self) -> tuple[list[str], set[int]]:
        """Return the settings that differ from this run's in a smaller bound alone, and the ids of traces that were cut."""
        settings: set[str] = set()
        cut: set[int] = set()
        for table in self._store.columns("trace_id", "teacher", "sampling", "finish_reason"):
            for row in table.to_pylist():
                if row["teacher"] != self._teacher.name:
                    continue
                settings.add(row["sampling"])
                if row["finish_reason"] == "length":
                    cut.add(int(row["trace_id"], 16))
        same = without_bound(self._sampling)
        shorter = []
        for sampling in sorted(settings):
            if without_bound(sampling) == same and reply_bound(sampling) < reply_bound(self._sampling):
                shorter.append(sampling)
        return shorter, cut

    def over(self, questions: Iterable[TraceQuestion], total: int | None = None) -> Progress:
        """Ask everything that is missing; every finished answer is in the store when this returns or raises.

        Ctrl-C (or SIGTERM) lets what is under way finish and asks nothing more; a second one gives that up, too.

        Raises:
            ValueError: the teacher is lost, or the questions are at fault.
        """
        asyncio.run(self._over(questions, total))
        return self.progress

    async def _over(self, questions: Iterable[TraceQuestion], total: int | None) -> None:
        # All workers draw from one iterator, so nothing is asked twice and no question is made before its turn.
        missing = self.missing(questions)
        with (
            tqdm(total=total, desc=self._teacher.name, unit="trace", disable=not self._bar_shown) as self._bar,
            _interruptible(self._interrupt),
        ):
            for _ in range(max(1, self._teacher.in_flight)):
                self._workers.append(asyncio.create_task(self._work(missing)))
            try:
                # Every worker is waited for, whatever becomes of one: what is under way has been paid for.
                outcomes = await asyncio.gather(*self._workers, return_exceptions=True)
            finally:
                await self._teacher.close()
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
                raise outcome

    def _interrupt(self) -> None:
        if self._stop:
            for worker in self._workers:
                worker.cancel()
        else:
            logger.warning("stopping: what is under way is waited for; interrupt again not to wait")
        self._stop = True
        self.progress.ended = "interrupted"

    async def _work(self, missing: Iterator[MissingTrace]) -> None:
        try:
            while not self._stop:
                batch = self._next_batch(missing)
                if not batch:
                    return
                wanted, requests = await self._requests(batch)
                if not await self._ask(wanted, requests):
                    return
                # Where a teacher answers without ever waiting, the other workers and signals get their turn here.
                await asyncio.sleep(0)
        except BaseException:
            self._stop = True  # the others finish what they have under way
            raise

    def _next_batch(self, missing: Iterator[MissingTrace]) -> list[MissingTrace]:
        batch: list[MissingTrace] = []
        for wanted in missing:
            batch.append(wanted)
            if len(batch) >= self._teacher.batch_size:
                break
        return batch

    async def _requests(self, batch: Iterable[MissingTrace]) -> tuple[list[MissingTrace], list[TeacherRequest]]:
        """Open pictures and write prompts; where that cannot be done, the trace ends here, without a teacher.

        Returns:
            The traces that a teacher can be asked for, and their requests.
        """
        askable: list[MissingTrace] = []
        requests: list[TeacherRequest] = []
        for wanted in batch:
            question = wanted.question
            part = "picture"
            try:
                if question.remote:
                    # A picture from elsewhere must not keep the requests under way from their answers.
                    pictures = await asyncio.to_thread(question.pictures)
                else:
                    pictures = question.pictures()
                part = "prompt"
                prompt = self._prompts.render(question)
            except ValueError as error:
                where = f" of {question.origin}" if question.origin else ""
                no_reply = TeacherReply("", "", attempts=0, error=f"{part}{where}: {error}")
                self._keep(wanted, [], no_reply)
                continue
            askable.append(wanted)
            requests.append(TeacherRequest(question, pictures, prompt, wanted.repeat))
        return askable, requests

    async def _ask(self, batch: list[MissingTrace], requests: list[TeacherRequest]) -> bool:
        """Ask one batch and keep the answers; return False once the budget has no room for another request."""
        while requests:
            granted = await self._budget.reserve(len(requests))
            if not granted:
                self._stop = True
                self.progress.ended = "budget"
                return False
            replies: list[TeacherReply] = []
            try:
                replies = await self._teacher.generate(requests[:granted])
            finally:
                for reply in replies:
                    await self._budget.spend(reply)
                # A teacher that raised has replied to nothing.
                for _ in range(granted - len(replies)):
                    await self._budget.release()
            for wanted, request, reply in zip(batch[:granted], requests[:granted], replies, strict=True):
                self._keep(wanted, request.pictures, reply)
            batch = batch[granted:]
            requests = requests[granted:]
        return True

    def _keep(self, wanted: MissingTrace, pictures: Sequence[EncodedPicture], reply: TeacherReply) -> None:
        """Judge a reply and put it into the store."""
        trace = self._trace(wanted, pictures, reply)
        verdict = self._verification.verdict(RuleInput.of(trace))
        self._store.append({**trace, **verdict})
        self._count(trace["error"], verdict["rejected_by"])

    def _trace(self, wanted: MissingTrace, pictures: Sequence[EncodedPicture], reply: TeacherReply) -> TeacherTrace:
        question = wanted.question
        return {
            "trace_id": wanted.id,
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
            "repeat": wanted.repeat,
            # What a teacher wrote can be any text; it is paid for, so it is made to fit.
            "output": storable(reply.text),
            "finish_reason": storable(reply.finish_reason),
            "error": storable(reply.error),
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "seconds": reply.seconds,
            "attempts": reply.attempts,
            "injected": reply.injected,
        }

    def _count(self, error: str, rejected_by: Sequence[str]) -> None:
        self.progress.made += 1
        self.progress.rejected.update(rejected_by)
        if error:
            self.progress.failed += 1
            if len(self.progress.failures) < _KINDS_OF_FAILURE:
                self.progress.failures[error[:_ERROR_START]] += 1
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

"""Commands that wait for one another, run a few at a time, and not again once they are done.

A job is done when what it makes exists and its stamp, `<name>.job.json`, names the same command and the same contents of
the files that it reads. So a second call does what is missing, and what follows from files that have changed since.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from siq_vl.files import write_text

LAST_LINES = 15
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: unique, with slashes as in a path: its log and stamp lie at `<folder of logs>/<name>`.
        command: a python script and its arguments, as on a command line.
        makes: a file that is there once it is done.
        reads: files that are there before, and whose contents it depends on.
        after: names of the jobs that have to be done before.
        kind: jobs of one kind take about as long.
        once: done as soon as `makes` exists, whoever made it.
    """

    name: str
    command: str
    makes: Path
    reads: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    kind: str = ""
    once: bool = False


@dataclass(frozen=True)
class _RunningJob:
    """A job under way: its process, when it began, and what its stamp will have to agree with."""

    job: Job
    identity: dict
    process: subprocess.Popen
    started: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Jobs:
    """Jobs that are run side by side.

    After `run`, `seconds` has what is done, `failures` the last lines of what failed, and `waiting` names the jobs that
    waited for those.

    Args:
        jobs: what is to be done, in the order of preference.
        logs: folder of logs and stamps.
        slots: jobs at a time.
        gpus: devices, in turn given to the slots. The cores are shared out, unless OMP_NUM_THREADS is set.
        tell: given a line whenever a job ends.

    Raises:
        ValueError: no slot, or a job waits for one that is not there; from `run`, a file to read that nobody makes.
    """

    def __init__(
        self, jobs: Sequence[Job], logs: Path, slots: int, tell: Callable[[str], None], gpus: Sequence[str] = ()
    ):
        if slots < 1:
            raise ValueError(f"jobs at a time are {slots}; it must be at least 1")
        names = {job.name for job in jobs}
        for job in jobs:
            for name in job.after:
                if name not in names:
                    raise ValueError(f"job {job.name!r} waits for {name!r}, which is no job")
        self.logs, self.slots, self.tell, self.gpus = logs, slots, tell, gpus
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self.waiting: list[str] = []
        self._todo = list(jobs)  # those that wait for others
        self._ready: list[Job] = []
        self._running: dict[int, _RunningJob] = {}  # by slot
        self._order = {job: place for place, job in enumerate(jobs)}
        self._by_kind: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        """Run what is not done; a failure keeps back only what waits for it, and an interruption ends what is running."""
        try:
            self._look()
            while self._ready or self._running:
                self._fill_slots()
                time.sleep(_POLL_SECONDS)
                if self._collect():
                    self._look()
        finally:
            for running in self._running.values():
                running.process.terminate()
            for running in self._running.values():
                running.process.wait()
        self.waiting = [job.name for job in self._todo]

    def _look(self) -> None:
        """Move the jobs that wait for nothing any more to those that are ready, or to those that are done already."""
        moved = True
        # One that is done already may be what the next one waits for.
        while moved:
            moved = False
            for job in list(self._todo):
                if not self.seconds.keys() >= set(job.after):
                    continue
                self._todo.remove(job)
                moved = True
                stamp = self._stamp(job)
                if _is_done(job, stamp):
                    self._note(job, stamp.get("seconds", 0.0))
                else:
                    self._ready.append(job)
        self._ready.sort(key=self._order.__getitem__)

    def _fill_slots(self) -> None:
        """Start as many jobs as there are free slots."""
        side_by_side = min(self.slots, len(self._running) + len(self._ready))
        for slot in range(self.slots):
            if self._ready and slot not in self._running:
                self._start(slot, self._ready.pop(0), side_by_side)

    def _note(self, job: Job, seconds: float) -> None:
        """Count a job as done; one without a time says nothing of how long its kind takes."""
        self.seconds[job.name] = seconds
        if seconds:
            self._by_kind[job.kind].append(seconds)

    def _log_of(self, job: Job) -> Path:
        return self.logs / f"{job.name}.log"

    def _stamp_of(self, job: Job) -> Path:
        return self.logs / f"{job.name}.job.json"

    def _stamp(self, job: Job) -> dict:
        path = self._stamp_of(job)
        if not path.exists():
            return {}
        return json.loads(path.read_text(encoding="utf-8"))

    def _start(self, slot: int, job: Job, side_by_side: int) -> None:
        identity = _identity(job)  # of what it reads now, whatever becomes of that in the meantime
        threads = max(1, (os.cpu_count() or 1) // side_by_side)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        path = self._log_of(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stamp_of(job).unlink(missing_ok=True)  # from here on it is half done
        with open(path, "w", encoding="utf-8") as log:
            print(f"$ python {job.command}", file=log, flush=True)
            process = subprocess.Popen(
                [sys.executable, *shlex.split(job.command)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._running[slot] = _RunningJob(job, identity, process, time.monotonic())

    def _collect(self) -> bool:
        """Note what has ended; return whether anything has."""
        ended = [slot for slot, running in self._running.items() if running.process.poll() is not None]
        for slot in ended:
            running = self._running.pop(slot)
            job, process, seconds = running.job, running.process, round(running.seconds, 1)
            if process.returncode == 0 and job.makes.exists():
                stamp = {**running.identity, "seconds": seconds}
                write_text(self._stamp_of(job), json.dumps(stamp, indent=1))
                self._note(job, seconds)
                self.tell(f"{job.name}: {seconds:.0f} s{self._left()}")
            else:
                self.failures[job.name] = self._last_lines(job, process.returncode)
                self.tell(f"{job.name} failed{self._left()}\n{self.failures[job.name]}")
        return bool(ended)

    def _last_lines(self, job: Job, status: int) -> str:
        path = self._log_of(job)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        reason = f"exit status {status}"
        if status == 0:
            reason = f"it made no {job.makes}"
        lines.append(f"{reason}; the whole log is {path}")
        return "\n".join(f"    {line}" for line in lines)

    def _left(self) -> str:
        """Say what is left, and for about how long: from the mean seconds of the jobs of each kind that are done."""
        left = []  # jobs, and how long each has run so far
        for job in (*self._todo, *self._ready):
            if not self._is_kept_back(job):
                left.append((job, 0.0))
        for running in self._running.values():
            left.append((running.job, running.seconds))
        if not left:
            return ""
        seconds = 0.0
        for job, spent in left:
            known = self._by_kind.get(job.kind)
            # A kind of which nothing is done yet may take any time.
            if not known:
                return f"; {len(left)} left"
            seconds += max(0.0, sum(known) / len(known) - spent)
        return f"; {len(left)} left, about {seconds / self.slots / 60:.0f} min"

    def _is_kept_back(self, job: Job) -> bool:
        """Tell whether a job waits, directly or not, for one that failed."""
        if any(name in self.failures for name in job.after):
            return True
        return any(self._is_kept_back(other) for other in self._todo if other.name in job.after)


def _is_done(job: Job, stamp: dict) -> bool:
    """Tell whether what a job makes is there, and made by the same command from the same contents."""
    if not job.makes.exists():
        return False
    if job.once:
        return True
    return stamp == {**stamp, **_identity(job)}


def _identity(job: Job) -> dict:
    """Return what a stamp has to agree with: the command, and checksums of what it reads."""
    checksums = {}
    for path in job.reads:
        if not path.exists():
            raise ValueError(f"job {job.name!r} reads {path}, which does not exist: make it first")
        with open(path, "rb") as file:
            checksums[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"command": job.command, "reads": checksums}

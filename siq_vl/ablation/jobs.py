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
        self._todo = list(jobs)
        self._ready: list[Job] = []
        self._order = {job: place for place, job in enumerate(jobs)}
        self._running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
        self._by_kind: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        """Run what is not done; a failure keeps back only what waits for it, and an interruption ends what is running."""
        try:
            self._look()
            while self._ready or self._running:
                free = [slot for slot in range(self.slots) if slot not in self._running]
                side_by_side = min(self.slots, len(self._running) + len(self._ready))
                for slot in free[: len(self._ready)]:
                    self._start(slot, self._ready.pop(0), side_by_side)
                time.sleep(_POLL_SECONDS)
                if self._collect():
                    self._look()
        finally:
            for _, process, _ in self._running.values():
                process.terminate()
            for _, process, _ in self._running.values():
                process.wait()
        self.waiting = [job.name for job in self._todo]

    def _look(self) -> None:
        """Move the jobs that wait for nothing any more to those that are ready, or to those that are done already."""
        while found := [job for job in self._todo if all(name in self.seconds for name in job.after)]:
            for job in found:
                self._todo.remove(job)
                stamp = self._stamp(job)
                if job.makes.exists() and (job.once or {**stamp, **_identity(job)} == stamp):
                    self._note(job, stamp.get("seconds"))
                else:
                    self._ready.append(job)
        self._ready.sort(key=self._order.__getitem__)

    def _note(self, job: Job, seconds: float | None) -> None:
        self.seconds[job.name] = seconds or 0.0
        if seconds:
            self._by_kind[job.kind].append(seconds)

    def _beside(self, job: Job, ending: str) -> Path:
        return self.logs / f"{job.name}{ending}"

    def _stamp(self, job: Job) -> dict:
        path = self._beside(job, ".job.json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _start(self, slot: int, job: Job, side_by_side: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // side_by_side)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        path = self._beside(job, ".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._beside(job, ".job.json").unlink(missing_ok=True)  # from here on it is half done
        with open(path, "w", encoding="utf-8") as log:
            print(f"$ python {job.command}", file=log, flush=True)
            arguments = [sys.executable, *shlex.split(job.command)]
            process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._running[slot] = (job, process, time.monotonic())

    def _collect(self) -> bool:
        """Note what has ended; return whether anything has."""
        ended = [(slot, *entry) for slot, entry in self._running.items() if entry[1].poll() is not None]
        for slot, job, process, started in ended:
            del self._running[slot]
            seconds = round(time.monotonic() - started, 1)
            if process.returncode == 0 and job.makes.exists():
                stamp = json.dumps({**_identity(job), "seconds": seconds}, indent=1)
                _write_whole(self._beside(job, ".job.json"), stamp)
                self._note(job, seconds)
                self.tell(f"{job.name}: {seconds:.0f} s{self._left()}")
            else:
                self.failures[job.name] = self._last_lines(job, process.returncode)
                self.tell(f"{job.name} failed{self._left()}\n{self.failures[job.name]}")
        return bool(ended)

    def _last_lines(self, job: Job, status: int) -> str:
        path = self._beside(job, ".log")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        ended = f"exit status {status}" if status else f"it made no {job.makes}"
        return "\n".join(f"    {line}" for line in (*lines, f"{ended}; the whole log is {path}"))

    def _left(self) -> str:
        """Say what is left, and for about how long: from the mean seconds of the jobs of each kind that are done."""
        running = [(job, time.monotonic() - started) for job, _, started in self._running.values()]
        left = [*((job, 0.0) for job in (*self._todo, *self._ready) if not self._kept_back(job)), *running]
        if not left:
            return ""
        if any(job.kind not in self._by_kind for job, _ in left):
            return f"; {len(left)} left"
        means = {kind: sum(seconds) / len(seconds) for kind, seconds in self._by_kind.items()}
        seconds = sum(max(0.0, means[job.kind] - spent) for job, spent in left)
        return f"; {len(left)} left, about {seconds / self.slots / 60:.0f} min"

    def _kept_back(self, job: Job) -> bool:
        """Tell whether a job waits, directly or not, for one that failed."""
        todo = {other.name: other for other in self._todo}
        return any(name in self.failures or (name in todo and self._kept_back(todo[name])) for name in job.after)


def _identity(job: Job) -> dict:
    """Return what a stamp has to agree with: the command, and checksums of what it reads."""
    for path in job.reads:
        if not path.exists():
            raise ValueError(f"job {job.name!r} reads {path}, which does not exist: make it first")
    return {"command": job.command, "reads": {str(path): _checksum(path) for path in job.reads}}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

"""
Walk the whole real path on this machine: every command of the documents, against a Hub of miniatures, from an empty cache.

    make rehearsal                                    # every stage, size and configuration, on this environment's major
    make rehearsal-quick                              # one size, one teacher
    python -m rehearsal.walk --folder FOLDER          # goes on with a walk: what is done is not done again
    python -m rehearsal.walk --results docs/results/rehearsal-5.json

Each step is a process of its own. Its output is kept in `<folder>/logs`; a failed step is named, and all that does not
need it goes on. `log.json` in the folder holds every step with its command, seconds, exit status and what it left.
"""

import argparse
import importlib.metadata
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rehearsal.server import TOKEN, RehearsalHub
from rehearsal.steps import Step, all_steps, quick_steps, script_of

REPO_ROOT = Path(__file__).resolve().parent.parent
_SHOWN = 300  # characters of a failure
# What the surroundings must not decide: caches, tokens, and whether libraries may ask a Hub at all.
_LEFT_OUT = (
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
)


@dataclass
class Done:
    """A step that was taken.

    Attributes:
        name: of the step.
        command: as it was run, shortened.
        rc: its exit status.
        seconds: by the clock.
        cpu: seconds of the processor.
        requests: that the Hub was asked meanwhile.
        outcome: "ok", "refused as it must", or what went wrong.
        made: what it left, in bytes.
    """

    name: str
    command: str
    rc: int
    seconds: float
    cpu: float
    requests: int
    outcome: str
    made: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether the step did what it has to."""
        return self.outcome in ("ok", "refused as it must")


def environment(folder: Path, address: str) -> dict[str, str]:
    """Return the surroundings of every step: this Hub and no other, caches of its own, the one account's token."""
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    own = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "hf"),
        "HF_MODULES_CACHE": str(folder / "hf" / "modules"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": str(REPO_ROOT),
    }
    return {**kept, **own}


class Processes:
    """Runs steps as commands of their own, as a user does."""

    def __init__(self, surroundings: Mapping[str, str]):
        self.surroundings = dict(surroundings)

    def run(self, command: str, cwd: Path, log: Path) -> tuple[int, float, float]:
        """Run a command, its output going to a file; return exit status, seconds and CPU-seconds."""
        words = script_of(command, REPO_ROOT)
        if command.startswith("accelerate launch"):
            words = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", *words]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        with log.open("ab") as output:
            ended = subprocess.run(
                [sys.executable, *words], cwd=cwd, env=self.surroundings, stdout=output, stderr=output, check=False
            )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return ended.returncode, time.monotonic() - started, cpu

    def close(self) -> None:
        """Do nothing: every process has ended."""


class Forks:
    """Runs steps in processes that are forked from one which has loaded the libraries."""

    def __init__(self, surroundings: Mapping[str, str], log: Path):
        self._output = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rehearsal.forks"],
            cwd=REPO_ROOT,
            env=dict(surroundings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
        )
        self._read()

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process of the libraries has ended: see {self._output.name}")
        return line

    def run(self, command: str, cwd: Path, log: Path) -> tuple[int, float, float]:
        """Run a command, its output going to a file; return exit status, seconds and CPU-seconds."""
        order = {"argv": script_of(command, REPO_ROOT), "cwd": str(cwd), "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._read())
        return told["rc"], told["seconds"], told["cpu"]

    def close(self) -> None:
        """End the process, which ends with its input."""
        self._process.stdin.close()
        self._process.wait()
        self._output.close()


class Walk:
    """One walk through the steps.

    Args:
        folder: of the caches, the outputs, the logs and the record of what is done.
        steps: to be taken.
        forked: fork the steps off one process, which is quicker, rather than start each as a command.
    """

    def __init__(self, folder: Path, steps: list[Step], forked: bool):
        self.folder, self.steps = folder, steps
        self.work, self.logs, self.record = folder / "work", folder / "logs", folder / "log.json"
        for path in (self.work / "docs", self.logs):
            path.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO_ROOT / "docs" / "example.png", self.work / "docs")
        self.done: dict[str, Done] = {}
        if self.record.exists():
            told = json.loads(self.record.read_text())["steps"]
            self.done = {each["name"]: Done(**each) for each in told}
        contents = folder / "hub"
        fresh = not contents.exists()
        self.hub = RehearsalHub(contents)
        surroundings = environment(folder, self.hub.address)
        self.runner: Processes | Forks
        if forked:
            self.runner = Forks(surroundings, self.logs / "libraries.txt")
        else:
            self.runner = Processes(surroundings)
        if fresh:
            self._make_contents(contents)

    def _make_contents(self, contents: Path) -> None:
        log = self.logs / "contents.txt"
        rc, seconds, cpu = self.runner.run(f"-m rehearsal.contents {contents}", REPO_ROOT, log)
        if rc:
            raise ValueError(f"the miniatures could not be made: see {log}")
        self.hub.reload(contents)
        _say(f"the miniatures: {_size(contents) / 1e6:.1f} MB in {seconds:.0f} s, {cpu:.0f} CPU-seconds")

    def close(self) -> None:
        """End the Hub and the processes."""
        self.runner.close()
        self.hub.close()

    def take_all(self) -> list[Done]:
        """Take every step that is not done, in order; return all of them."""
        for number, step in enumerate(self.steps, 1):
            before = self.done.get(step.name)
            if before is not None and before.ok:
                continue
            lacking = [name for name in step.needs if name in self._names() and not self._ok(name)]
            if lacking:
                self.done[step.name] = Done(step.name, "", -1, 0, 0, 0, f"not tried: needs {', '.join(lacking)}", {})
            else:
                self.done[step.name] = self._take(number, step)
            made = self.done[step.name]
            _say(
                f"{number:2} of {len(self.steps)}  {made.seconds:6.1f} s  {made.cpu:5.1f} CPU-s  {step.name}: {made.outcome}"
            )
            self._write()
        return [self.done[step.name] for step in self.steps]

    def _names(self) -> set[str]:
        return {step.name for step in self.steps}

    def _ok(self, name: str) -> bool:
        return name in self.done and self.done[name].ok

    def _take(self, number: int, step: Step) -> Done:
        command = f"{step.command} {step.short}".strip()
        log = self.logs / f"{number:02}-{re.sub(r'[^a-z0-9.]+', '-', step.name.casefold()).strip('-')}.txt"
        log.write_text(f"$ {command}\n")
        asked = len(self.hub.asked)
        rc, seconds, cpu = self.runner.run(command, self.work, log)
        outcome = self._outcome(step, rc, log.read_text(errors="replace"))
        made = {path: _size(self.work / path) for path in step.makes if (self.work / path).exists()}
        requests = len(self.hub.asked) - asked
        return Done(step.name, command, rc, round(seconds, 1), round(cpu, 1), requests, outcome, made)

    def _outcome(self, step: Step, rc: int, printed: str) -> str:
        """Say whether a step did what it has to."""
        lines = [line for line in printed.splitlines() if line.strip()]
        last = " ".join(lines[-1].split())[-_SHOWN:]
        if step.refuses:
            if rc == 0:
                return "should have been refused"
            return "refused as it must" if re.search(step.refuses, last) else f"refused in other words: {last}"
        if rc != 0:
            return f"failed: {last}"
        lacking = [path for path in step.makes if not (self.work / path).exists()]
        if lacking:
            return f"left no {', '.join(lacking)}"
        if step.says and not re.search(step.says, printed):
            return f"did not say {step.says!r}"
        return "ok"

    def _write(self) -> None:
        told = {
            "transformers": importlib.metadata.version("transformers"),
            "huggingface_hub": importlib.metadata.version("huggingface_hub"),
            "datasets": importlib.metadata.version("datasets"),
            "unknown": self.hub.unknown,
            "steps": [asdict(self.done[step.name]) for step in self.steps if step.name in self.done],
        }
        self.record.write_text(json.dumps(told, indent=1) + "\n")


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def table(steps: list[Done]) -> str:
    """Return the steps as a Markdown table."""
    major = importlib.metadata.version("transformers").split(".")[0]
    lines = [f"| step, transformers {major} | CPU-seconds | requests | outcome |", "|---|---:|---:|---|"]
    for step in steps:
        lines.append(f"| {step.name} | {step.cpu:.1f} | {step.requests} | {step.outcome} |")
    return "\n".join(lines)


def main() -> None:
    """Take the walk; exit status 1 if a step did not do what it has to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the walk; a new temporary one by default")
    parser.add_argument("--quick", action="store_true", help="one size, one teacher")
    parser.add_argument("--forked", action="store_true", help="fork the steps off one process; of --quick, always")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="steps whose names hold one of these")
    parser.add_argument("--list", action="store_true", help="print the commands, and take no step")
    parser.add_argument("--results", type=Path, metavar="FILE.json", help="keep the table in this file, too")
    options = parser.parse_args()
    major = importlib.metadata.version("transformers").split(".")[0]
    steps = quick_steps(major) if options.quick else all_steps(major)
    if options.only:
        steps = [step for step in steps if any(part in step.name for part in options.only)]
    if options.list:
        for step in steps:
            _say(shlex.join(f"{step.command} {step.short}".split()))
        return
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="rehearsal-"))).resolve()
    walk = Walk(folder, steps, options.quick or options.forked)
    try:
        taken = walk.take_all()
    finally:
        walk.close()
    _say(f"\n{table(taken)}\n\nlog: {walk.record}")
    if walk.hub.unknown:
        _say(f"asked of the Hub and not known to it: {sorted(set(walk.hub.unknown))}")
    if options.results:
        from siq_vl.results import write_results  # loads torch, which a walk by itself has no need of

        figures = {"steps": len(taken), "failed": sum(not step.ok for step in taken)}
        write_results(options.results, {"walk": table(taken)}, figures)
    sys.exit(0 if all(step.ok for step in taken) else 1)


if __name__ == "__main__":
    main()

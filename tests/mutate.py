"""
Changes the code, one change at a time, and sees whether the tests notice.

    python tests/mutate.py                        # every entry of tests/mutations.yaml that has no verdict yet
    python tests/mutate.py --only seeds --jobs 2  # those whose file or name has the word
    python tests/mutate.py --again                # all of them, whatever was found before

An entry names a file, a text that stands in it once, what takes its place, and the tests that should fail then. Every
change is made in a copy of the working tree, never in place. First the named tests run on a copy without any change: they
have to pass there, or their failing would say nothing. Verdicts are kept in `outputs/mutants/`, one for each state of the
changed file and of the tests, so that the same command goes on where it was interrupted; the table is written there too.

The heavy libraries are imported once; each change then gets a process that is forked from this one.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutations.yaml"
KEPT = ROOT / "outputs" / "mutants"
LIBRARIES = ("pytest", "torch", "transformers", "datasets", "accelerate", "trl", "peft", "scipy.stats", "hypothesis")
CPU_SECONDS, WALL_SECONDS = 240, 600  # a change that never ends counts as noticed
# What pytest's exit status says: its tests failed, or could not even be collected.
FAILED, NOT_COLLECTED = 1, 2


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        file: path in the repository.
        old: a text that the file has once.
        new: what takes its place.
        tests: node ids that should fail, as narrow as can be.
        about: what the change breaks.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    about: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: {self.about or ' '.join(self.old.split())[:60]}"

    def applied(self, text: str) -> str:
        """Return the file's text with the change.

        Raises:
            ValueError: the old text is not there once, or the new one is the same.
        """
        count = text.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.name}: the old text stands {count} times in the file; it must be once:\n{self.old}"
            )
        if self.old == self.new:
            raise ValueError(f"{self.name}: the new text is the old one")
        return text.replace(self.old, self.new)


def read_mutations(path: Path = LIST) -> list[Mutation]:
    """Return the entries of a list: by file, `old`, `new`, `tests` (one or several) and `about`."""
    found = []
    for file, entries in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for entry in entries:
            tests = entry["tests"]
            tests = (tests,) if isinstance(tests, str) else tuple(tests)
            found.append(Mutation(file, entry["old"], entry["new"], tests, entry.get("about", "")))
    return found


def copy_tree(target: Path) -> None:
    """Copy what git knows of the working tree, and what it would know, to a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in dict.fromkeys(listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def key_of(mutation: Mutation) -> str:
    """Return what a verdict depends on: the changed file, and the files of the tests that should notice."""
    digest = hashlib.sha256(mutation.applied((ROOT / mutation.file).read_text(encoding="utf-8")).encode())
    for name in sorted({test.partition("::")[0] for test in mutation.tests} | {"tests/conftest.py"}):
        digest.update((ROOT / name).read_bytes())
    digest.update(repr(mutation.tests).encode())
    return digest.hexdigest()


def run_tests(tree: Path, tests: Sequence[str], log: Path, options: Sequence[str]) -> int:
    """Run tests in a forked process, in a tree of its own; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        os.setsid()  # so that what the tests start ends with them
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests")))]
        pytest = sys.modules["pytest"]
        scratch = tempfile.mkdtemp(dir=tree.parent)
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={scratch}/t", *options, *tests]
        status = int(pytest.main(["-o", "addopts=", *arguments]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass
class Running:
    mutation: Mutation | None
    folder: Path
    log: Path
    began: float


class Runs:
    """Forked runs, a few at a time."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.running: dict[int, Running] = {}

    def start(self, mutation: Mutation | None, tests: Sequence[str], log: Path, options: Sequence[str]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        tree = folder / "tree"
        copy_tree(tree)
        if mutation is not None:
            changed = tree / mutation.file
            changed.write_text(mutation.applied(changed.read_text(encoding="utf-8")), encoding="utf-8")
        self.running[run_tests(tree, tests, log, options)] = Running(mutation, folder, log, time.monotonic())

    def wait(self) -> tuple[Running, int, float]:
        """Return a run that has ended, its exit status, and its CPU-seconds."""
        while True:
            for child, run in list(self.running.items()):
                ended, status, used = os.wait4(child, os.WNOHANG)
                if ended:
                    del self.running[child]
                    _kill(child)  # what the tests started and left
                    shutil.rmtree(run.folder, ignore_errors=True)
                    return run, os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
                if time.monotonic() - run.began > WALL_SECONDS:
                    _kill(child)
            time.sleep(0.02)


def _kill(group: int) -> None:
    """End the processes of a group, where there are any left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def verdict_of(status: int) -> str:
    """Return what an exit status of pytest says of a change; a negative one is a signal."""
    if status == 0:
        return "survived"
    if status == FAILED or status < 0:
        return "killed"
    return "broken" if status == NOT_COLLECTED else f"error {status}"


def _first_failure(log: Path) -> str:
    """Return the test that noticed a change, without its parameters."""
    found = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found.group(1) if found else ""


def table(mutations: Sequence[Mutation], keys: Mapping[Mutation, str], verdicts: Mapping[str, dict]) -> str:
    lines = ["| file | change | verdict | CPU s |", "|---|---|---|---|"]
    for mutation in mutations:
        found = verdicts.get(keys[mutation], {"verdict": "not run", "seconds": 0.0})
        about = (mutation.about or f"{mutation.old} -> {mutation.new}").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {mutation.file} | {about} | {found['verdict']} | {found['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def sound(mutations: Sequence[Mutation], jobs: int) -> bool:
    """Run every named test once on unchanged copies, file by file; say which do not pass."""
    by_file: dict[str, dict[str, None]] = {}
    for mutation in mutations:
        for test in mutation.tests:
            by_file.setdefault(test.partition("::")[0], {})[test] = None
    runs, failed, left = Runs(jobs), [], list(by_file.items())
    while left or runs.running:
        while left and len(runs.running) < jobs:
            file, tests = left.pop(0)
            runs.start(None, list(tests), KEPT / f"unchanged-{Path(file).stem}.log", ["-p", "no:randomly"])
        run, status, seconds = runs.wait()
        say(
            f"unchanged, {run.log.stem.removeprefix('unchanged-')}: {'passes' if status == 0 else 'FAILS'}, {seconds:.0f} s"
        )
        if status:
            failed.append(run.log)
    for log in failed:
        say(log.read_text(encoding="utf-8", errors="replace")[-3000:])
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="words, one of which the name of a change must have")
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time")
    parser.add_argument("--again", action="store_true", help="run what has a verdict already, too")
    parser.add_argument("--trusted", action="store_true", help="do not run the tests on unchanged copies first")
    parser.add_argument("--list", type=Path, default=LIST, help="the changes")
    options = parser.parse_args()
    mutations = read_mutations(options.list)
    if options.only:
        mutations = [each for each in mutations if any(word in each.name for word in options.only)]
    KEPT.mkdir(parents=True, exist_ok=True)
    kept = KEPT / "verdicts.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    verdicts = {entry["key"]: entry for entry in map(json.loads, lines)}
    keys = {each: key_of(each) for each in mutations}  # of the files as they are now
    todo = [each for each in mutations if options.again or keys[each] not in verdicts]
    say(f"{len(mutations)} changes, {len(todo)} to run")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    if todo:
        for name in LIBRARIES:
            importlib.import_module(name)
        gc.freeze()  # forked processes need not go through the libraries' objects, which takes half of a short run's time
        if not options.trusted and not sound(todo, options.jobs):
            return 1
    runs, waiting = Runs(options.jobs), list(todo)
    while waiting or runs.running:
        while waiting and len(runs.running) < options.jobs:
            mutation = waiting.pop(0)
            log = KEPT / f"{keys[mutation][:12]}.log"
            runs.start(mutation, mutation.tests, log, ["-x"])
        run, status, seconds = runs.wait()
        found = verdict_of(status)
        say(f"{found}, {seconds:.1f} s: {run.mutation.name}")
        verdicts[keys[run.mutation]] = entry = {
            **asdict(run.mutation),
            "key": keys[run.mutation],
            "verdict": found,
            "seconds": round(seconds, 1),
            "noticed_by": _first_failure(run.log),
        }
        with open(kept, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if found == "killed":
            run.log.unlink()
    (KEPT / "table.md").write_text(table(mutations, keys, verdicts), encoding="utf-8")
    found = [verdicts[keys[each]]["verdict"] for each in mutations]
    counts = {verdict: found.count(verdict) for verdict in sorted(set(found))}
    say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    say(f"{100 * found.count('killed') / max(1, len(found)):.1f}% of {len(found)} killed; table: {KEPT / 'table.md'}")
    return 0 if found.count("killed") >= 0.95 * len(found) else 1


if __name__ == "__main__":
    sys.exit(main())

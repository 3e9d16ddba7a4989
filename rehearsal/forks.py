"""
Run scripts in processes that are forked from one which has loaded the libraries: each step starts in a moment.

    python -m rehearsal.forks

Reads one JSON object a line, `{"argv": [...], "cwd": "...", "log": "...", "env": {...}}`, and answers each with its exit
status, seconds and CPU-seconds.
"""

import importlib
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    ("trl", "peft", "siq_vl.training.run", "siq_vl.training.starting_model", "siq_vl.planning.plan")
    + ("siq_vl.distill.teachers.local", "generate_traces", "evaluate_vqa", "rehearsal.contents")
)  # fmt: skip


def run_forked(order: dict) -> dict:
    """Run one script in a process of its own, and return how it ended."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_run(order))
    _, status, usage = os.wait4(child, 0)
    return {
        "rc": os.waitstatus_to_exitcode(status),
        "seconds": round(time.monotonic() - started, 2),
        "cpu": round(usage.ru_utime + usage.ru_stime, 2),
    }


def _run(order: dict) -> int:
    """Run a script as `python` would, its output going to a file; return its exit status."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(order["cwd"])
    os.environ.update(order.get("env", {}))
    sys.argv = list(order["argv"])
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    status = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        status = _status(ended)
    except BaseException:  # noqa: BLE001 - the interpreter's own place, whose part is played here
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _status(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    sys.stderr.write(f"{ended.code}\n")
    return 1


def main() -> None:
    """Load the libraries, then run what is asked for until the input ends."""
    sys.path.insert(0, str(REPO_ROOT))
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_forked(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

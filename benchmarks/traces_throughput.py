"""
How much of a server's capacity `generate_traces.py` uses, and how much memory a long run takes.

    python benchmarks/traces_throughput.py                              # 200 ms, 64 at once: share of capacity
    python benchmarks/traces_throughput.py --latency 0.01 --count 100000    # memory over 100,000 questions

The server (`tests/chat_server.py`) runs in a process of its own, and the store, with drawn pictures, is the real one.
Capacity is `slots / latency` requests a second; the share is that of the server's own clock, from the first request to
the last answer. A few more requests than slots are kept under way, so that one waits whenever a slot falls free. Memory is
the client's resident set, read at every twentieth of the run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
from common import REPO_ROOT

from siq_vl.distill.pipeline import Run
from siq_vl.distill.prompts import Prompts
from siq_vl.distill.questions import TraceQuestion, figure_questions
from siq_vl.distill.selection import Selection, record_rules, update_verdicts
from siq_vl.distill.teachers.server import ServerSettings, ServerTeacher
from siq_vl.distill.traces import TraceStore
from siq_vl.distill.verification import Verification
from siq_vl.distill.yields import store_yield


def watched(questions: Iterator[TraceQuestion], count: int, seen: list[tuple[int, float]]) -> Iterator[TraceQuestion]:
    """Pass questions on, noting (questions so far, MiB resident) twenty times."""
    process = psutil.Process()
    for number, question in enumerate(questions):
        if number % max(1, count // 20) == 0:
            seen.append((number, process.memory_info().rss / 2**20))
        yield question
    seen.append((count, process.memory_info().rss / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds of one answer")
    parser.add_argument("--slots", type=int, default=64, help="answers that the server works on at once")
    parser.add_argument("--in_flight", type=int, default=80, help="requests that the client keeps under way")
    parser.add_argument("--count", type=int, default=6400)
    options = parser.parse_args()
    script = REPO_ROOT / "tests" / "chat_server.py"
    command = [sys.executable, str(script), f"--latency={options.latency}", f"--slots={options.slots}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    memory: list[tuple[int, float]] = []
    try:
        # Its first line is the port that it was given.
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        settings = ServerSettings([f"{url}/v1"], in_flight=options.in_flight)
        rules = Verification(skip_rules=["answer"])  # the server answers none of the questions
        with tempfile.TemporaryDirectory() as folder, TraceStore(Path(folder)) as store:
            record_rules(store, rules)
            started, cpu = time.perf_counter(), time.process_time()
            questions = watched(figure_questions(options.count), options.count, memory)
            teacher = ServerTeacher("adder", settings, sampling={"max_tokens": 64})
            progress = Run(teacher, Prompts(), store, rules).over(questions, options.count)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            counts = json.load(urlopen(f"{url}/counts"))
            update_verdicts(store, rules, Selection())
            settled = psutil.Process().memory_info().rss / 2**20
            made = store_yield(Path(folder)).made
    finally:
        server.kill()
    capacity = options.slots / options.latency
    rate = counts["answered"] / counts["seconds"]
    print(f"{made} traces, {progress.failed} failed, {counts['requests']} requests, most at once {counts['peak']}")
    print(f"capacity {capacity:.1f} a second, served {rate:.1f}: {100 * rate / capacity:.1f}% ({seconds:.1f} s in all)")
    print(f"client's processor time a trace: {1000 * cpu / made:.2f} ms")
    resident = [f"{number}: {size:.0f}" for number, size in memory]
    print(f"MiB resident: {', '.join(resident)}; settled: {settled:.0f}")


if __name__ == "__main__":
    main()

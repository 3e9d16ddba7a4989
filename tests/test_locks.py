"""One run at a time in a folder: the second is refused at once, and a killed one is in nobody's way."""

import errno
import fcntl
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from siq_vl.locks import Lock

REPO_ROOT = Path(__file__).resolve().parent.parent

# Holds a folder and has a child, as a run has loader processes; tells both ids.
HOLDER = """
import os, sys, time
sys.path.insert(0, {root!r})
from siq_vl.locks import Lock
lock = Lock({folder!r}, is_file={is_file})
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(request):
    """Starts a process that holds a folder or a file."""
    started = []

    def hold(folder: Path, is_file: bool = False) -> subprocess.Popen:
        code = HOLDER.format(root=str(REPO_ROOT), folder=str(folder), is_file=is_file)
        process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True)
        started.append((process, int(process.stdout.readline())))
        return process

    yield hold
    for process, child in started:
        process.kill()
        process.wait()
        process.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_by_name(tmp_path, holder):
    process = holder(tmp_path / "out")
    with pytest.raises(ValueError) as refused:
        Lock(tmp_path / "out")
    message = str(refused.value)
    assert f"{tmp_path / 'out'} is being written by another process (process {process.pid} on " in message
    assert "wait for it or end it, or pass another output folder" in message
    Lock(tmp_path / "elsewhere").release()
    Lock(tmp_path / "out", held=False).release()  # a rank that leaves the lock to the main process


def test_a_killed_run_is_in_nobodys_way(tmp_path, holder):
    """Not even while its child processes are still there."""
    holder(tmp_path).kill()
    deadline = time.monotonic() + 20
    while True:
        try:
            Lock(tmp_path).release()
            break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.01)  # the kill takes a moment to arrive


def test_files_of_one_folder_are_written_side_by_side(tmp_path, holder):
    holder(tmp_path / "one.jsonl", is_file=True)
    with pytest.raises(ValueError, match="one.jsonl is being written by another process"):
        Lock(tmp_path / "one.jsonl", is_file=True)
    with Lock(tmp_path / "two.jsonl", is_file=True), Lock(tmp_path):
        pass


def test_nothing_is_left_behind(tmp_path):
    refused = pytest.raises(ValueError, match=f"process {os.getpid()}, which is this one")
    with Lock(tmp_path / "new" / "folder"), refused:
        Lock(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    lock = Lock(tmp_path)
    lock.release()
    lock.release()


def test_an_error_lets_go(tmp_path):
    with pytest.raises(KeyError), Lock(tmp_path):
        raise KeyError
    Lock(tmp_path).release()


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it: what is locked then is no file of the folder any more."""
    original, removed = fcntl.lockf, []

    def lockf(file, operation):
        if not removed:
            removed.append(os.unlink(tmp_path / ".lock"))
        return original(file, operation)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with Lock(tmp_path):
        assert removed and (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    Lock(tmp_path).release()
    assert "cannot be locked here: see that no other run writes to it" in caplog.text


@pytest.mark.parametrize(
    ("script", "arguments", "folder"),
    [
        ("train_sft.py", ["--stage", "1", "--output_dir", "out"], "out"),
        ("train_distill.py", ["--output_dir", "out", "--model_name_or_path", "."], "out"),
        ("generate_traces.py", ["--teacher", "figures", "--count", "1", "--output", "out"], "out"),
        ("ablate.py", ["--plan", str(REPO_ROOT / "recipes/tiny/ablations.yaml"), "--output", "out"], "out"),
        ("demo.py", [], "outputs/tiny"),
        ("pretrain_backbones.py", ["--phase", "text", "--work", "out"], "out/text"),
    ],
)
def test_every_script_that_writes_a_folder_refuses(script, arguments, folder, tmp_path, holder, monkeypatch):
    process = holder(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO_ROOT / script), run_name="__main__")
    assert str(ended.value).startswith(f"error: {folder} is being written by another process (process {process.pid} ")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_two_evaluations_of_one_name(tmp_path, holder, monkeypatch):
    from siq_vl.evaluation.held_out import held_out_items
    from siq_vl.evaluation.runner import RunSettings, run

    process = holder(tmp_path / "stage3.jsonl", is_file=True)
    with pytest.raises(ValueError, match=f"stage3.jsonl is being written by another process .process {process.pid} "):
        run(None, None, held_out_items(1), tmp_path / "stage3.jsonl", RunSettings())

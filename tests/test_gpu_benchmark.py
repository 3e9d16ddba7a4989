"""`make gpu` survives what fails, goes on where it was, keeps to its time, and writes down what is missing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from siq_vl.results import read_results, write_results
from tests.conftest import REPO_ROOT


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO_ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def asked(tmp_path):
    """The command line of a rehearsal of two measurements."""
    places = ["--work", tmp_path / "work", "--results", tmp_path / "gpu.json", "--page", tmp_path / "gpu.md"]
    return [str(word) for word in ["gpu.py", "--device", "cpu", "--quick", "--only", "stage 1", *places]]


def scripted(calls, tokens, fails=()):
    """Return what stands in for `subprocess.run`: writes results of so many tokens a second, or fails."""

    def run(command, stdout, stderr, timeout):
        way = "all" if "--cached" in command else " ".join(command[command.index("--method") + 2 :])
        calls.append(way)
        if any(word in command for word in fails):
            stdout.write("CUDA out of memory\n")
            return SimpleNamespace(returncode=1)
        share = 0.49 if way == "all" else 0.41
        figures = {"samples/s": 1.0, "tokens/s": tokens[way == "all"], "MFU": share, "peak GiB": 3.5}
        results = command[command.index("--results") + 1]
        write_results(Path(results), {}, figures)
        return SimpleNamespace(returncode=0)

    return run


def test_what_fails_is_named_and_only_that_is_measured_again(gpu, asked, monkeypatch, tmp_path):
    calls: list[str] = []
    monkeypatch.setattr(sys, "argv", asked)
    monkeypatch.setattr(gpu.subprocess, "run", scripted(calls, (1000.0, 2500.0), fails=["eager"]))
    gpu.main()
    planned = len(calls)
    page = (tmp_path / "gpu.md").read_text()
    assert "| 0.5b, stage 1, padded, eager | failed: CUDA out of memory" in page
    tables = read_results(tmp_path / "gpu.json")["tables"]
    rows = {tuple(row[:2]): row for row in tables["Training"][1:]}
    assert rows["0.5b, stage 1", "all"][-1] == "2.50"
    assert ["0.5b, stage 1", "MFU", "at least 45%", "49%"] in tables["Targets"]
    assert (tmp_path / "gpu.svg").read_text().startswith("<svg")

    calls.clear()
    monkeypatch.setattr(gpu.subprocess, "run", scripted(calls, (1000.0, 2500.0)))
    gpu.main()
    assert len(calls) == 1 < planned
    assert "Nothing is missing." in (tmp_path / "gpu.md").read_text()


def test_what_hangs_and_what_comes_too_late_is_named(gpu, asked, monkeypatch, tmp_path):
    def hangs(command, stdout, stderr, timeout):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(sys, "argv", [*asked, "--minutes", "1"])
    monkeypatch.setattr(gpu.subprocess, "run", hangs)
    clock = iter([0.0, 0.0, *[50.0] * 100])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    gpu.main()
    missing = read_results(tmp_path / "gpu.json")["figures"]["missing"]
    assert missing["0.5b, stage 1, padded, sdpa"] == "not done within 60 s"
    assert set(list(missing.values())[1:]) == {"not run: the 1 minutes were over"}
    assert json.loads((tmp_path / "gpu.json").read_text())["tables"]["Targets"][1][-1] == "not measured"


def test_without_a_gpu_it_says_how_to_rehearse(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU: run on one, or rehearse with --device cpu --quick"):
        gpu.main()

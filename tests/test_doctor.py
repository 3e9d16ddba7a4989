"""The doctor: what it finds, what it says would break, and fixes that really fit."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from siq_vl.planning import doctor
from siq_vl.planning.doctor import GIB, NOTE, OK, PROBLEM
from siq_vl.planning.plan import plan

REPO_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def found(findings) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_a_bare_clone_would_train_stage_1(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    told = capsys.readouterr().out
    problems = [line for line in told.splitlines() if line.startswith(PROBLEM) and "packages" not in line]
    assert not problems
    assert ended.value.code == (1 if PROBLEM in told else 0)


def test_packages(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# comment\ntorch>=1.0\nno-such-package==1.0\npytest>=999\nnumpy==0.0.1  # old\n")
    findings = list(doctor.check_packages(path))
    broken = next(finding for finding in findings if finding.level == PROBLEM)
    assert "no-such-package" in broken.text and "pytest >= 999" in broken.text and "torch" not in broken.text
    assert broken.fix.endswith("pip install -r requirements.txt")
    assert any(finding.level == NOTE and "0.0.1 is tested" in finding.text for finding in findings)
    assert any(finding.level == OK and finding.text.startswith("1 as in") for finding in findings)


def test_an_interpreter_without_packages_is_told_what_is_missing():
    """Isolated from site-packages, where not even torch can be imported."""
    process = subprocess.run(
        [sys.executable, "-S", "-m", "siq_vl.planning.doctor"],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 1 and not process.stderr
    assert "missing of requirements.txt: torch, transformers" in process.stdout
    assert "fix: " in process.stdout


def test_the_hub_is_never_waited_for_long(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        started = time.monotonic()
        finding = doctor.check_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.3)
    assert finding.level == NOTE and "no answer" in finding.text
    assert time.monotonic() - started < 10
    assert doctor.check_hub("http://127.0.0.1:1", seconds=2).level == NOTE


def test_an_answering_hub(monkeypatch):
    from fake_hub import FakeHub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub = FakeHub(token="t")
    assert doctor.check_hub(hub.address).level == OK
    hub.close()


def test_offline_is_said():
    assert "HF_HUB_OFFLINE" in doctor.check_hub("http://127.0.0.1:1").text


def test_what_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    sources = ["data/llava_instruct_150k.json", "derek-thomas/ScienceQA", "lmms-lab/textvqa"]
    recipe = doctor.parse("2", "siq-vl-0.5b", ["--sources", *sources])
    offline = list(doctor.check_inputs(recipe, online=False))
    missing = {finding.text.split()[0] for finding in offline if finding.level == PROBLEM}
    assert missing == {
        "google/siglip2-large-patch16-512",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "data/llava_instruct_150k.json",
        "derek-thomas/ScienceQA",
        "lmms-lab/textvqa",
    }
    assert all(finding.fix for finding in offline if finding.level == PROBLEM)
    assert found(offline)["start"].level == NOTE  # an earlier stage's work
    online = [finding for finding in doctor.check_inputs(recipe, online=True) if finding.level == PROBLEM]
    assert [finding.text.split()[0] for finding in online] == ["data/llava_instruct_150k.json"]
    (tmp_path / "cache" / "datasets--lmms-lab--textvqa" / "snapshots" / "abc").mkdir(parents=True)
    cached = list(doctor.check_inputs(recipe, online=False))
    assert any(finding.level == OK and "textvqa" in finding.text for finding in cached)


def test_traces_are_an_earlier_commands_work(tmp_path):
    recipe = doctor.parse("3", "tiny", ["--traces", str(tmp_path / "traces")])
    finding = found(doctor.check_inputs(recipe, online=False))["traces"]
    assert finding.level == NOTE and f"generate_traces.py --output {tmp_path / 'traces'}" in finding.text
    (tmp_path / "traces").mkdir()
    assert found(doctor.check_inputs(recipe, online=False))["traces"].level == OK


def test_a_stage_that_fits():
    assert doctor.check_memory("2", "tiny", [], 64 * GIB, "here").level == OK


@pytest.mark.parametrize(
    ("pick", "share", "expected"),
    [(max, 1.01, "--per_device_train_batch_size 4"), (min, 1.01, "--load_in_4bit"), (min, 0.5, "no setting")],
    ids=["a smaller batch", "all together", "hopeless"],
)
def test_the_first_change_that_fits_is_named(monkeypatch, pick, share, expected):
    """Every change is held against the prediction: the one named fits, and none before it does."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "bitsandbytes" or None)
    overrides = ["--per_device_train_batch_size", "8", "--gradient_checkpointing", "false"]
    recipe = doctor.parse("2", "tiny", overrides)
    predict = doctor.memory_of(recipe)
    needed = {}
    for options in doctor.changes(recipe):
        changed = doctor.parse("2", "tiny", [*overrides, *options])
        assert changed.training.train_batch_size * changed.training.gradient_accumulation_steps == 32
        needed[" ".join(options)] = predict(changed)
    batches = [size for options, size in needed.items() if options.startswith("--per_device")]
    free = int(share * pick(batches) / doctor._USABLE)
    finding = doctor.check_memory("2", "tiny", overrides, free, "here")
    assert finding.level == PROBLEM and expected in finding.fix
    fitting = [options for options, size in needed.items() if size <= doctor._USABLE * free]
    assert finding.fix.startswith(fitting[0] if fitting else "no setting of this recipe fits")


@pytest.mark.parametrize("options", [[], ["--batching", "packed", "--pack_tokens", "300"]], ids=["padded", "packed"])
def test_doctor_and_plan_predict_the_same(options):
    recipe = doctor.parse("2", "tiny", options)
    planned = plan(recipe, "answer").splitlines()
    (total,) = [line.split("|")[2] for line in planned if line.startswith("| **total** |") and line.count("|") == 3]
    assert doctor.memory_of(recipe)(recipe) / 2**20 == pytest.approx(float(total.replace(",", "")), abs=0.05)


def test_without_an_effective_batch_size_accumulation_makes_up_for_a_smaller_batch():
    recipe = doctor.parse("1", "tiny", ["--effective_batch_size", "0"])
    (first, *_) = doctor.changes(recipe)
    assert first == ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2"]


def test_settings_that_the_machine_lacks(monkeypatch):
    recipe = doctor.parse("2", "tiny", ["--load_in_4bit", "true"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    old_gpu = doctor.Device("an old GPU", 8 * GIB, bf16=False, is_gpu=True)
    findings = list(doctor.check_settings(recipe, old_gpu))
    assert [finding.name for finding in findings] == ["load_in_4bit", "bf16"]
    assert all(finding.level == PROBLEM and finding.fix for finding in findings)


def test_a_full_disk(monkeypatch):
    recipe = doctor.parse("1", "tiny", [])
    assert doctor.check_disk(recipe).level == OK
    monkeypatch.setattr("shutil.disk_usage", lambda path: __import__("collections").namedtuple("U", "free")(1000))
    assert doctor.check_disk(recipe).level == PROBLEM


def test_a_recipe_that_does_not_parse(monkeypatch):
    monkeypatch.setattr(doctor, "check_packages", lambda path: iter(()))
    finding = found(doctor.examine("1", "nonesuch", []))["recipe"]
    assert finding.level == PROBLEM and "must be one of" in finding.text

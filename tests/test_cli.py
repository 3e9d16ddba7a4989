"""The commands: bad input ends in one line that names the fix, and leaves nothing behind."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from siq_vl.data.images import open_image

REPO_ROOT = Path(__file__).resolve().parent.parent


def run(monkeypatch, script: str, *arguments: str) -> str:
    """Run a script as `__main__` and return the line it exits with."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO_ROOT / script), run_name="__main__")
    message = str(ended.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture
def pictures(tmp_path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.jpg")
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:300])
    (tmp_path / "empty.png").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "is not a file: pass the path"),
        ("text.png", "is not a picture that can be read: pass a PNG"),
        ("empty.png", "is not a picture that can be read: pass a PNG"),
        ("cut.jpg", "is damaged and cannot be decoded"),
        (".", "is not a file"),
    ],
)
def test_ask_refuses_bad_pictures(pictures, monkeypatch, name, message):
    assert message in run(monkeypatch, "ask.py", str(pictures / name), "What is this?")


def test_ask_refuses_an_empty_question_and_a_missing_checkpoint(pictures, monkeypatch):
    good = str(pictures / "good.jpg")
    assert "the question is empty" in run(monkeypatch, "ask.py", good, "  ")
    assert "holds no checkpoint" in run(monkeypatch, "ask.py", good, "What?", "--model", str(pictures))
    assert "does not exist" in run(monkeypatch, "ask.py", good, "What?", "--model", str(pictures / "nowhere"))


def test_an_oversized_picture_is_refused(pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="too many pixels"):
        open_image(pictures / "good.jpg")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_sft.py", ["--stage", "3"], "stage is '3'; pass --stage 1 or --stage 2"),
        ("train_sft.py", [], "pass --stage 1 or --stage 2"),
        ("train_sft.py", ["--stage", "1", "--recipe", "huge"], "recipe is 'huge'; it must be one of"),
        ("train_sft.py", ["--stage", "2"], "run `python train_sft.py --stage 1 --recipe tiny` first"),
        ("train_distill.py", [], "run `python train_sft.py --stage 2 --recipe tiny` first"),
        ("evaluate_vqa.py", ["--model", "outputs"], "write it as NAME=CHECKPOINT"),
        ("evaluate_vqa.py", ["--model", "a=b", "--blind", "c"], "'c' is none of the models a"),
    ],
)
def test_scripts_refuse_bad_settings(monkeypatch, tmp_path, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in run(monkeypatch, script, *arguments)
    assert list(tmp_path.rglob("*.safetensors")) == list(tmp_path.rglob("config.json")) == []

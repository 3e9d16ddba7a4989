"""The commands: bad input ends in one line that names the fix, and leaves nothing behind."""

import errno
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import SafetensorError

from siq_vl import cli
from siq_vl.data.images import open_image
from siq_vl.evaluation import statistics

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--lerning_rate", "1"],
            "not used by the HfArgumentParser: .*correct the field in stage1.yaml or on the command",
        ),
        (["--eval_strategy", "steps", "--eval_steps", "0", "--logging_steps", "0"], "requires .*correct the field"),
    ],
)
def test_what_the_libraries_find_wrong_with_a_field_is_one_line_too(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, run(monkeypatch, "train_sft.py", "--stage", "1", *arguments))


def ends_with(main) -> str:
    """Run a function as a script's `main` and return the line it exits with."""
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message
    return message.removeprefix("error: ")


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.setenv("SIQ_VL_DEBUG", "0")


class TestWhatIsOneLine:
    def test_an_error_of_ours(self, tmp_path):
        assert "is not a file: pass the path" in ends_with(lambda: open_image(tmp_path / "nowhere.png"))

    def failures(self):
        image = Image.new("RGB", (2, 2))
        torch = pytest.importorskip("torch")
        return [
            lambda: torch.optim.SGD([]),  # raised in torch's files
            lambda: torch.ones(2).numpy().reshape(3),  # raised below Python, in a frame of ours
            lambda: list(zip([1], [1, 2], strict=True)),
            lambda: int("one"),
            lambda: json.loads("{"),
            lambda: image.resize((1, 1), resample=99),
            lambda: max([]),
            lambda: image.nothing,
            lambda: 1 / 0,
        ]

    def test_everything_else_keeps_its_traceback(self):
        for failure in self.failures():
            with pytest.raises((ValueError, ArithmeticError, AttributeError)):
                cli.run(failure)

    def test_a_mistake_inside_a_statement_of_ours_keeps_its_traceback(self):
        """The frame is ours, but no `raise` of ours said it."""
        with pytest.raises(ValueError, match="math domain error|nonnegative"):
            cli.run(lambda: statistics.wilson(5, 1))

    def test_debug_shows_all(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "argv", ["ask.py", str(tmp_path / "nowhere.png"), "What?", "--debug"])
        with pytest.raises(ValueError, match="is not a file"):
            runpy.run_path(str(REPO_ROOT / "ask.py"), run_name="__main__")
        assert os.environ["SIQ_VL_DEBUG"] == "1"  # for the commands that a script starts
        assert sys.argv == ["ask.py", str(tmp_path / "nowhere.png"), "What?"]

    @pytest.mark.parametrize(
        ("given", "left"),
        [
            (["--debug", "a.png"], ["a.png"]),
            (["--debug", "underflow_overflow", "--x"], ["--debug", "underflow_overflow", "--x"]),
            (["--debug", "underflow_overflow", "--debug"], ["--debug", "underflow_overflow"]),
            (["--debugging"], ["--debugging"]),
        ],
    )
    def test_the_trainers_own_debug_is_left_to_it(self, given, left):
        taken = cli._take_debug(given)
        assert given == left and taken == (
            "--debugging" not in left and left != ["--debug", "underflow_overflow", "--x"]
        )


def raising(error, cause=None):
    def main():
        raise error from cause

    return main


class TestDisk:
    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (errno.ENOSPC, "out/a: the disk is full: free some space"),
            (errno.EDQUOT, "out/a: the quota of this disk is used up"),
            (errno.EROFS, "out/a: the folder is on a read-only file system"),
            (errno.EACCES, "out/a: this user has no permission"),
            (errno.EFBIG, "out/a: the file is larger than allowed here"),
        ],
    )
    def test_of_the_system(self, number, message):
        error = OSError(number, os.strerror(number), "out/a")
        assert ends_with(raising(error)).startswith(message)
        assert ends_with(raising(RuntimeError("an error occurred while generating the data set"), error)).startswith(
            message
        )

    def test_really_full(self):
        def main():
            with open("/dev/full", "w") as file:
                file.write("text")

        assert "the disk is full" in ends_with(main)

    @pytest.mark.parametrize(
        "error",
        [
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            Exception("No space left on device (os error 28)"),
            RuntimeError("basic_ios::clear: iostream error"),
            RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/2"),
        ],
    )
    def test_of_libraries_that_say_so_in_words(self, error):
        assert "disk" in ends_with(raising(error)) and "pass another folder" in ends_with(raising(error))

    @pytest.mark.parametrize(
        "error",
        [OSError(errno.EACCES, "Permission denied"), OSError(errno.ENOENT, "No such file", "a"), OSError("text")],
    )
    def test_other_errors_keep_their_traceback(self, error):
        with pytest.raises(OSError):
            cli.run(raising(error))

    @pytest.mark.parametrize(
        ("script", "arguments"),
        [
            ("train_sft.py", ["--stage", "1", "--output_dir", "out"]),
            ("generate_traces.py", ["--teacher", "figures", "--count", "1", "--output", "out"]),
            ("ablate.py", ["--plan", str(REPO_ROOT / "recipes/tiny/ablations.yaml"), "--output", "out"]),
            ("demo.py", []),
            ("pretrain_backbones.py", ["--phase", "text", "--work", "out"]),
        ],
    )
    def test_scripts_on_a_read_only_disk(self, script, arguments, monkeypatch, tmp_path):
        def mkdir(path, *_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        assert "is on a read-only file system: pass another one" in run(monkeypatch, script, *arguments)

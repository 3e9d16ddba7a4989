"""Drawn pictures changed a little: what the changes do, and the table of them."""

import sys

import numpy as np
import pytest
from PIL import Image

import evaluate_vqa
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.predictions import judge
from siq_vl.evaluation.shifts import CLEAN, SHIFTS, shifted
from siq_vl.results import by_name, read_results


@pytest.fixture(scope="module")
def items():
    return held_out_items(6)[:6]


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_changes_the_picture_and_nothing_else(items, shift):
    for item, changed in zip(items, shifted(items, shift), strict=True):
        assert (changed.id, changed.question, changed.golds) == (item.id, item.question, item.golds)
        same = changed.image.size == item.image.size and changed.image.tobytes() == item.image.tobytes()
        assert same == (shift == CLEAN)
    assert [item.image.tobytes() for item in shifted(items, shift)] == [
        item.image.tobytes() for item in shifted(items, shift)
    ]


@pytest.mark.parametrize(("pixels", "shift"), [(1, "moved by 1 px"), (3, "moved by 3 px"), (6, "moved by 6 px")])
def test_moved_towards_the_wider_margins(pixels, shift):
    image = Image.new("RGB", (96, 96), (240, 240, 240))
    image.paste((0, 0, 0), (2, 60, 30, 90))  # room on the right and above
    expected = Image.new("RGB", (96, 96), (240, 240, 240))
    expected.paste((0, 0, 0), (2 + pixels, 60 - pixels, 30 + pixels, 90 - pixels))
    assert SHIFTS[shift](image, None).tobytes() == expected.tobytes()


def test_canvases(items):
    picture = np.asarray(items[0].image)
    framed = np.asarray(SHIFTS["border of 12 px"](items[0].image, None))
    assert (
        framed.shape == (120, 120, 3)
        and (framed[12:108, 12:108] == picture).all()
        and (framed[:12] == picture[0, 0]).all()
    )
    wide = np.asarray(SHIFTS["canvas twice as wide"](items[0].image, None))
    assert wide.shape == (96, 192, 3) and (wide[:, 48:144] == picture).all()


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Runs the command with a model that is right about the first picture shown in each way, and says nothing else."""

    def run(model, processor, items, path, settings, *, identity, progress):
        asked.append((path.name, identity))
        return [judge(item, item.answer if place == 0 else "none") for place, item in enumerate(items)]

    def evaluate(*options):
        monkeypatch.setattr(sys, "argv", ["evaluate_vqa.py", "--model", "tiny=.", "--count", "5", *options])
        evaluate_vqa.main()
        return capsys.readouterr().out

    asked = evaluate_asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_vqa, "run", run)
    monkeypatch.setattr(evaluate_vqa, "load_any", lambda *arguments, **options: (None, None))
    evaluate.asked = evaluate_asked
    return evaluate


def test_the_table_of_shifts(evaluate, tmp_path):
    printed = evaluate("--shifts", "--results", "results/shifts.json")
    assert [name for name, _ in evaluate.asked] == [f"{shift}.jsonl" for shift in SHIFTS]
    # What was answered of one shift is not taken for what is said of another.
    assert len({str(identity) for _, identity in evaluate.asked}) == len(SHIFTS)
    table = by_name(read_results(tmp_path / "results" / "shifts.json")["tables"]["shifts"])
    assert table.keys() == SHIFTS.keys()
    for shift, row in table.items():
        assert row["n"] == "5" and row["tiny"].startswith("20.0 ±") and shift in printed


def test_the_ordinary_table_is_kept(evaluate, tmp_path):
    evaluate("--results", "results/tiny.json")
    assert [name for name, _ in evaluate.asked] == ["tiny.jsonl"]
    table = by_name(read_results(tmp_path / "results" / "tiny.json")["tables"]["accuracy"])
    assert table["all"]["n"] == "5" and table["all"]["tiny"].startswith("20.0 ±")


@pytest.mark.parametrize(
    "options", [["--source", "rows.jsonl"], ["--described"], ["--before_after"], ["--captions", "tiny"]]
)
def test_refuses(evaluate, options):
    with pytest.raises(ValueError, match="--shifts (needs pictures whose facts are known|prints a table of its own)"):
        evaluate("--shifts", *options)


@pytest.mark.parametrize(("options", "bound"), [([], 1024), (["--max_new_tokens", "7"], 7)])
@pytest.mark.parametrize("shifts", [[], ["--shifts"]])
def test_answers_that_were_cut_off_are_counted_apart(evaluate, monkeypatch, tmp_path, options, bound, shifts):
    def run(model, processor, items, path, settings, *, identity, progress):
        assert settings.max_new_tokens == bound
        outputs = ["<think>still at it", items[1].answer, *[item.answer for item in items[2:]]]
        return [
            judge(item, output, cut_off=place < 2)
            for place, (item, output) in enumerate(zip(items, outputs, strict=True))
        ]

    (tmp_path / "training_settings.json").write_text('{"training": {"max_length": 1024}}')
    monkeypatch.setattr(evaluate_vqa, "run", run)
    printed = evaluate(*options, *shifts, "--results", "results.json", *([] if shifts else ["--report", "page.html"]))
    ways, asked = (len(SHIFTS), 5) if shifts else (1, 7)
    line = (
        f"tiny: {2 * ways} of {asked * ways} answers were cut off at {bound} tokens, {ways} of them before an answer, which "
        f"counts as wrong: pass --max_new_tokens {2 * bound}"
    )
    assert line in printed
    figures = read_results(tmp_path / "results.json")["figures"]
    assert figures["cut off"] == {"tiny": 2 * ways} and figures["max_new_tokens"] == {"tiny": bound}
    if not shifts:
        assert line in (tmp_path / "page.md").read_text() and line in (tmp_path / "page.html").read_text()
        assert (tmp_path / "page.html").read_text().count("cut off by the bound on new tokens") == 2

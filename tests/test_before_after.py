"""Baseline beside student: the losses of reference outputs, the table, the model card."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPO_ROOT

from siq_vl.data.collation import ConversationCollator
from siq_vl.data.figures.rows import assistant_turn, reasoned
from siq_vl.data.mixture_config import SourceConfig
from siq_vl.data.sources import Source
from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.items import items_of
from siq_vl.evaluation.losses import reference_losses
from siq_vl.evaluation.summaries import before_after, change_table, without_picture_line
from siq_vl.hub import model_card, write_card


@pytest.fixture(scope="module")
def items():
    return held_out_items(10)


@pytest.mark.parametrize("traces", [True, False])
def test_losses_are_the_models_own(items, make_model, processor, traces):
    """Of each question alone, as `forward` computes it; the batch's size and padding change nothing."""
    model = make_model()
    unusable = [
        replace(items[0], id="no gold", golds=()),
        replace(items[1], id="broken", fault="unreadable"),
        replace(items[2], id="damaged", images=(b"no picture",)),
    ]
    found = reference_losses(model, processor, [*items, *unusable], traces=traces, batch_size=4)
    assert found.keys() == {item.id for item in items}
    for item in items:
        text = reasoned(item.reasoning, item.answer) if traces else item.answer
        row = {"images": item.open_images(), "prompt": item.prompt(), "completion": assistant_turn(text)}
        with torch.no_grad():
            assert found[item.id] == pytest.approx(
                model(**ConversationCollator(processor)([row])).loss.item(), rel=1e-4
            )
    blind = reference_losses(model, processor, items, traces=traces, blind=True)
    assert all(blind[item.id] != found[item.id] for item in items)


def test_a_question_without_a_rationale_has_no_trace(items, make_model, processor):
    bare = [replace(item, reasoning="") for item in items]
    assert reference_losses(make_model(), processor, bare, traces=True) == {}


@pytest.fixture(scope="module")
def said(items):
    return {
        "baseline": [kept.judge(item, item.answer if place % 2 else "wrong") for place, item in enumerate(items)],
        "student": [kept.judge(item, reasoned(item.reasoning, item.answer)) for item in items],
    }


def test_table(said):
    losses = {"baseline": {"trace": {"a": 9.0, "b": 9.5}, "answer": {}}, "student": {"trace": {"a": 8.5}}}
    table = before_after(said, losses)
    rows = {
        line[0]: line[1:]
        for line in ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
    }
    assert rows[f"{len(said['student'])} questions"] == ["baseline", "student", "change"]
    assert rows["accuracy, percent"] == ["50.0", "100.0", "+50.0"]
    assert rows["- the report's: 1 - accuracy"] == ["0.500", "0.000", "-0.500"]
    assert rows["correct rate"] == ["0.5000", "1.0000", "+0.5000"]
    assert rows["average loss of the teacher's trace, nats a token"] == ["9.250", "8.500", "-0.750"]
    assert rows["- of the gold answer without tags or rationale"] == ["-", "-", "-"]
    assert rows["ROUGE-L against the teacher's rationale"] == ["0.000", "1.000", "+1.000"]
    assert rows["hallucination, percent of stated facts"][1] == "0.0"
    assert rows["CoT length, words and marks"][0] == "0.0" and float(rows["CoT length, words and marks"][1]) > 5
    assert "change" not in before_after({"alone": said["student"]}, {})


def test_changes_by_pattern(items):
    def made(place: int, right: bool, rationale: str) -> kept.Prediction:
        answer = items[place].answer if right else "wrong"
        return kept.judge(items[place], reasoned(rationale, answer))

    before = [
        made(0, True, "a b"),
        made(1, True, "a"),
        made(2, False, "a b c"),
        made(3, False, "a"),
        made(4, True, "a"),
    ]
    after = [made(0, False, "a b c d"), made(1, True, "a"), made(2, True, "a"), made(3, True, "a b"), made(4, True, "")]
    rows = {}
    for row in change_table(before, after).splitlines():
        title, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        rows[title] = cells
    assert rows["answer"] == ["questions", "rationale shorter", "as long", "longer", "by, on average"]
    assert rows["right -> right"] == ["2", "1", "1", "0", "-0.5"]
    assert rows["right -> wrong"] == ["1", "0", "0", "1", "+2.0"]
    assert rows["wrong -> right"] == ["2", "1", "0", "1", "-0.5"]
    assert rows["wrong -> wrong"] == ["0", "0", "0", "0", "-"]
    assert rows["all"] == ["5", "2", "1", "2", "+0.0"]
    line = without_picture_line("after beside before", after, before)
    assert line == (
        "after beside before: 2 of 4 right answers are given without the picture too, and 0 of 1 wrong ones are wrong "
        "without it as well"
    )


def test_traces_of_a_source_are_rationale_and_answer(tmp_path, make_image):
    make_image(0).save(tmp_path / "picture.png")
    row = {
        "image": "picture.png",
        "question": "What is it?",
        "answer": "<think>It is grey.</think><answer>noise</answer>",
    }
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [row, {**row, "answer": "noise"}])))
    traced, plain = items_of(Source(SourceConfig(path=str(tmp_path / "rows.jsonl"), split="test")))
    assert (traced.golds, traced.reasoning) == (("noise",), "It is grey.")
    assert (plain.golds, plain.reasoning) == (("noise",), "")


def test_card_holds_what_lies_beside_it(tmp_path):
    settings = json.loads((REPO_ROOT / "training_settings.json").read_text())
    (tmp_path / "training_settings.json").write_text(json.dumps(settings))
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == model_card(settings)
    (tmp_path / "emergence.svg").write_text("<svg/>")
    write_card(tmp_path, before_after="| a | b |")
    write_card(tmp_path, repo_id="me/it")  # as pushing does: the table is still there
    text = (tmp_path / "README.md").read_text()
    assert "## Before and after\n\n| a | b |\n" in text and "](emergence.svg)" in text and '"me/it"' in text
    with pytest.raises(ValueError, match=r"has no training_settings.json"):
        write_card(tmp_path / "nothing")


def test_command_writes_the_card(tmp_path, checkpoint):
    settings = (REPO_ROOT / "training_settings.json").read_text()
    (checkpoint / "training_settings.json").write_text(settings)
    command = [
        sys.executable,
        "evaluate_vqa.py",
        "--model",
        f"baseline={checkpoint}",
        "--model",
        f"student={checkpoint}",
    ]
    command += ["--count", "5", "--max_new_tokens", "3", "--output", str(tmp_path / "out"), "--card"]
    ran = subprocess.run(
        [*command, "--report", str(tmp_path / "page.html")], cwd=REPO_ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = [line for line in ran.stdout.splitlines() if "average loss" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[1]) > 0 and cells[1] == cells[2] and cells[3] == "+0.000"
    assert line in (checkpoint / "README.md").read_text()
    assert line in (tmp_path / "page.md").read_text()
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("| all") and "+0.0" in line]
    assert line in (checkpoint / "README.md").read_text()
    assert line in (tmp_path / "page.md").read_text()

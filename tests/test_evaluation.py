"""Answers, intervals, tables and the page."""

import re

import pytest

from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import held_out_items, majority_answers
from siq_vl.evaluation.statistics import paired_difference, wilson
from siq_vl.evaluation.tables import accuracy_table
from siq_vl.parsing.answers import matches, parse


@pytest.mark.parametrize(
    ("text", "rationale", "answer", "well_formed"),
    [
        ("<think>tea 4. ham 7</think><answer>11</answer>", "tea 4. ham 7", "11", True),
        (" <think> a b </think>\n<answer> yes </answer> ", "a b", "yes", True),
        ("11", "", "11", False),
        ("<answer>11</answer>", "", "11", False),
        ("<think>still going", "still going", "", False),
        ("<think>a</think><answer>11", "a", "11", False),
        ("", "", "", False),
    ],
)
def test_parse(text, rationale, answer, well_formed):
    parsed = parse(text)
    assert (parsed.rationale, parsed.answer, parsed.well_formed) == (rationale, answer, well_formed)


def test_matches_ignores_case_and_full_stop_only():
    assert matches(" Red.", "red")
    assert not matches("dark red", "red")
    assert not matches("", "red")


def test_wilson_against_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81 of 263, 15 of 148, 0 of 20.
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)
    with pytest.raises(ValueError, match="count is 0"):
        wilson(0, 0)


def test_paired_difference():
    mean, half = paired_difference([True, False, False, False], [True, True, True, False])
    assert mean == 0.5
    assert half == pytest.approx(1.959964 * (1 / 3 / 4) ** 0.5)
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_difference([True], [True, False])


@pytest.fixture(scope="module")
def items():
    return held_out_items(60)


def test_items_cover_every_group(items):
    assert {item.group for item in items} == {"held out", "combinations", "hard"}
    assert len({item.id for item in items}) == len(items)
    assert items == held_out_items(60)


def test_gold_answers_score_full_marks_and_wrong_ones_none(items):
    right = [kept.judge(item, f"<think>x</think><answer>{item.answer}</answer>") for item in items]
    wrong = [kept.judge(item, "nonsense") for item in items]
    table = accuracy_table({"right": right, "wrong": wrong})
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert re.search(r"60 +\| 100\.0 ± 3\.0 +\| +0\.0 ± 3\.0", rows["all"])
    assert {"scenes", "charts", "documents", "new combinations", "hard (reported only)"} <= rows.keys()


def test_majority_is_a_training_answer_for_every_question(items):
    commonest = majority_answers(300)
    assert all((item.domain, item.type) in commonest for item in items)


def test_predictions_survive_the_file(items, tmp_path):
    made = [kept.judge(item, item.answer) for item in items]
    kept.write_predictions(made, tmp_path / "a.jsonl")
    assert kept.read_predictions(tmp_path / "a.jsonl") == made
    with pytest.raises(ValueError, match="run evaluate_vqa.py"):
        kept.read_predictions(tmp_path / "b.jsonl")


def test_blind_generation_withholds_the_pictures(items, make_model, processor, monkeypatch):
    model, few = make_model(), items[:4]
    calls = []
    features = type(model.model).get_image_features
    monkeypatch.setattr(type(model.model), "get_image_features", lambda *a, **k: calls.append(1) or features(*a, **k))
    blind = kept.predict(model, processor, few, blind=True)
    assert not calls
    seeing = kept.predict(model, processor, few)
    assert calls
    assert [p.id for p in blind] == [p.id for p in seeing] == [item.id for item in few]

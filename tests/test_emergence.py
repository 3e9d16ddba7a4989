"""Emergence: what is measured while stage 3 trains, that it changes nothing, and the figure of it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from conftest import REPO_ROOT
from svg import number_of_points
from test_distill import STYLES, parse, write_store

from siq_vl.data.figures.rows import training_rows
from siq_vl.evaluation import emergence_figure as told
from siq_vl.evaluation.metrics import METRICS, step_score
from siq_vl.parsing.answers import parse as taken_apart
from siq_vl.plots import emergence_plot
from siq_vl.training.callbacks import Sample, append_entry
from siq_vl.training.emergence import EmergenceCallback, emergence, watched_rows
from siq_vl.training.run import make_trainer, traces_for_stage
from siq_vl.training.starting_model import load_for_stage

WATCH = ("--emergence_steps", "2", "--emergence_count", "5")
MEASURES = {"well_formed", "length", "teacher_length", "steps_found", "steps_in_order", "arithmetic", "structure"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), STYLES[:2], 12)


def train(store: Path, folder: Path, *overrides: str):
    """Three steps from the shipped model, with a loss logged after each."""
    steps = ("--max_steps", "3", "--effective_batch_size", "2", "--logging_steps", "1")
    recipe = parse(REPO_ROOT, store, folder, *steps, *overrides)
    model, processor = load_for_stage(recipe)
    traces = traces_for_stage(recipe, processor)
    trainer = make_trainer(recipe, model, processor, traces.rows, watched=watched_rows(recipe, traces))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def watched(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    return train(store, folder, *WATCH), folder


def test_watching_changes_nothing(watched, store, tmp_path):
    alone = train(store, tmp_path).state.log_history
    history = [entry for entry in watched[0].state.log_history if "emergence/length" not in entry]
    names = ("loss", "grad_norm", "mean_token_accuracy", "num_tokens", "step")
    assert [[entry.get(name) for name in names] for entry in history] == [
        [entry.get(name) for name in names] for entry in alone
    ]
    assert sum("loss" in entry for entry in history) == 3


def test_measures_are_kept_logged_and_drawn(watched):
    trainer, folder = watched
    entries = told.read_emergence(folder)
    assert [entry["step"] for entry in entries] == [0, 2, 3]
    assert all(entry.keys() == MEASURES | {"step", "accuracy", "count"} and entry["count"] == 5 for entry in entries)
    # The shipped model went through stage 3 itself.
    assert entries[0]["well_formed"] == 1 and entries[0]["accuracy"] >= 0.8 and entries[0]["structure"] > 0.5
    logged = [entry for entry in trainer.state.log_history if "emergence/length" in entry]
    assert [[entry["step"], entry["emergence/structure"]] for entry in logged] == [
        [entry["step"], entry["structure"]] for entry in entries
    ]
    assert "emergence/count" not in logged[0]
    ElementTree.parse(folder / told.EMERGENCE_FIGURE)


def test_the_questions_are_of_every_style_and_domain(store, tmp_path):
    recipe = parse(REPO_ROOT, store, tmp_path, "--emergence_steps", "1", "--emergence_count", "12")
    recipe.traces.teachers = []  # every teacher of the store
    rows = watched_rows(recipe, traces_for_stage(recipe, None))
    expected = [list(training_rows("validation", 12, "reason", style=style)) for style in STYLES[:2]]
    assert [row["completion"] for row in rows] == [expected[index // 3 % 2][index]["completion"] for index in range(12)]
    recipe.run.emergence_steps = 0
    assert watched_rows(recipe, None) == []


def test_other_teachers_and_students_are_watched_on_validation_rows(store, tmp_path):
    recipe = parse(REPO_ROOT, store, tmp_path, *WATCH, "--student", "text", "--direct_share", "0.5")
    kept = list(training_rows("validation", 30, "reason", direct_share=0.5))
    traces = SimpleNamespace(validation=kept, report=SimpleNamespace(sources=[]))
    rows = watched_rows(recipe, traces)
    assert len(rows) == 5 and all("<think></think>" not in Sample.from_row(row).wanted for row in rows)
    assert rows == [row for row in kept if row["chat_template_kwargs"]["enable_thinking"]][:5]
    assert watched_rows(recipe, SimpleNamespace(validation=None, report=None)) == []


def test_measures_of_given_answers(processor):
    truth = "<think>Jan 7, Feb 3. 7 - 3 = 4</think><answer>4</answer>"
    answers = [truth, "<think>Feb 3, Jan 7. 7 - 3 = 5</think><answer>5</answer>", "4", "<think>Jan 7, Jan"]
    found = emergence(answers, [taken_apart(truth)] * 4, processor.tokenizer)
    assert (found["well_formed"], found["accuracy"], found["count"]) == (0.5, 0.5, 4)
    tokens = [len(processor.tokenizer.encode(taken_apart(text).rationale)) for text in answers]
    assert found["length"] == sum(tokens) / 4 and found["teacher_length"] == tokens[0]
    assert found["steps_found"] == pytest.approx((1 + 2 / 3 + 0 + 1 / 3) / 4, abs=1e-4)
    assert found["steps_in_order"] == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert found["arithmetic"] == 0.25


def test_rows_without_a_rationale_are_refused(processor):
    with pytest.raises(ValueError, match="none of the 2 held-out rows has a rationale"):
        EmergenceCallback(list(training_rows("validation", 2, "answer")), processor, 1)


def test_a_resumed_run_writes_its_steps_again(tmp_path):
    path = tmp_path / "emergence.jsonl"
    for step in (0, 2, 4, 2):
        entries = append_entry(path, {"step": step, "again": step == 2})
    assert [entry["step"] for entry in entries] == [0, 2]
    assert told.read_emergence(tmp_path) == entries


class TestStepScore:
    REFERENCE = "columns: Jan 7, Feb 3. Jan 7. Feb 3. 7 > 3"

    @pytest.mark.parametrize(
        ("rationale", "found", "in_order", "arithmetic"),
        [
            (REFERENCE, 1, 1, 1),
            ("Jan 7. Feb 3. 7 > 3", 3 / 5, 1, 1),
            ("7 > 3. Feb 3. Jan 7.", 3 / 5, 2 / 3, 1),
            ("Jan 8. Feb 3. 8 > 3", 1 / 5, 1, 1),
            ("Jan 7. Feb 3. 3 > 7", 2 / 5, 1, 0),
            ("Jan 7. Jan 7. Jan 7. Jan 7", 1 / 5, 1, 0),
            ("so it is.", 0, 0, 0),
            ("", 0, 0, 0),
        ],
    )
    def test_parts(self, rationale, found, in_order, arithmetic):
        row = step_score(f"<think>{rationale}</think><answer>Jan</answer>", self.REFERENCE)
        wanted = {"found": found, "in_order": in_order, "arithmetic": arithmetic}
        if rationale.count("Jan 7") == 4:
            wanted["found"] = 2 / 5  # the reference says it twice
        assert row == pytest.approx({"score": sum(wanted.values()) / 3, **wanted})

    def test_words_count_where_there_are_no_numbers(self):
        reference = "<think>The star in the corner is red. Both have one color</think><answer>yes</answer>"
        row = step_score("<think>The star in the corner is red.</think><answer>yes</answer>", reference)
        assert row["found"] == 0.5 and row["arithmetic"] == 1
        assert step_score("<think>The ball at the top is blue.</think><answer>yes</answer>", reference)["found"] == 0
        assert METRICS["step_score"].compute(["yes"], [reference])["step_score"] == 0


def test_the_command_draws_runs_side_by_side(watched, tmp_path):
    entries = told.read_emergence(watched[1])
    (tmp_path / "other").mkdir()
    slower = [{**entry, "length": entry["length"] / 2, "well_formed": 0.5} for entry in entries]
    (tmp_path / "other" / told.EMERGENCE_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in slower))
    figure = tmp_path / "figures" / "both.svg"
    command = [sys.executable, "-m", "siq_vl.evaluation.emergence_figure", f"a<b={watched[1]}", str(tmp_path / "other")]
    ran = subprocess.run([*command, "--output", str(figure)], cwd=REPO_ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("| a<b ") == ran.stdout.count("| other ") == 3
    tree = ElementTree.fromstring(figure.read_text())
    solid = [element for element in tree.iter() if element.get("id", "").startswith("curve")]
    dashed = [element for element in tree.iter() if element.get("id", "").startswith("reference")]
    assert len(solid) == 4 * 2 and len(dashed) == 2
    assert all("stroke-dasharray" in ElementTree.tostring(line, encoding="unicode") for line in dashed)
    assert all(number_of_points(line) == 3 for line in solid)
    assert {"a<b", "other"} <= {element.text for element in tree.iter()}
    ran = subprocess.run([*command[:3], str(tmp_path)], cwd=REPO_ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and "train with --emergence_steps" in ran.stderr


def test_a_run_of_one_entry_can_be_drawn():
    entry = dict.fromkeys(MEASURES | {"accuracy", "step"}, 0)
    ElementTree.fromstring(emergence_plot({"run": [entry]}))


def test_teachers_rationales_are_perfect(processor):
    """The oracle's own outputs, as answers: the ends of all scales."""
    rows = list(training_rows("validation", 30, "reason"))
    outputs = [Sample.from_row(row).wanted for row in rows]
    found = emergence(outputs, list(map(taken_apart, outputs)), processor.tokenizer)
    assert found["structure"] == found["well_formed"] == found["accuracy"] == 1
    assert found["length"] == found["teacher_length"] > 0

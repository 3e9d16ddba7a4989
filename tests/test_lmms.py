"""The adapter for lmms-eval, against a stand-in for the three names that it takes from the harness."""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import yaml
from conftest import REPO_ROOT

from siq_vl.evaluation.held_out import held_out_items
from siq_vl.evaluation.runner import RunSettings, load_any, run

TASK = REPO_ROOT / "siq_vl" / "evaluation" / "lmms" / "tasks" / "siq_vl_figures"


@dataclass
class Request:
    """What the harness hands over: context, generation settings, pictures of a row, number of the row, task, split."""

    args: tuple


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's class, imported as the harness imports a plugin's."""

    class Base:
        def __init__(self):
            self.task_dict = {}

    for name, held in {"api": {}, "api.instance": {"Instance": Request}, "api.model": {"lmms": Base}}.items():
        module = ModuleType(f"lmms_eval.{name}")
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module)
    monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
    [(name, found)] = importlib.import_module("siq_vl.evaluation.lmms.models").AVAILABLE_MODELS.items()
    monkeypatch.delitem(sys.modules, f"siq_vl.evaluation.lmms.models.{name}", raising=False)
    yield getattr(importlib.import_module(f"siq_vl.evaluation.lmms.models.{name}"), found)
    sys.modules.pop(f"siq_vl.evaluation.lmms.models.{name}", None)


def test_the_harness_gets_the_answers_that_the_runner_gets(adapter, checkpoint, tmp_path):
    items = held_out_items(10)
    expected = run(*load_any(str(checkpoint)), items, tmp_path / "ours.jsonl", RunSettings(4, 6))
    model = adapter(pretrained=str(checkpoint), batch_size="3", max_new_tokens=6, device="cuda:0")
    model.task_dict = {"task": {"test": [{"item": item} for item in items]}}
    requests = [
        Request(
            (item.question, {"max_new_tokens": 6 - place % 2}, lambda row: [row["item"].image], place, "task", "test")
        )
        for place, item in enumerate(items)
    ]
    assert model.generate_until(requests) == [made.answer for made in expected]
    model.keep_rationale = True
    assert model.generate_until(requests) == [made.output.strip() for made in expected]


def test_endings_and_arguments(adapter, checkpoint):
    model = adapter(pretrained=str(checkpoint))
    assert model._answer("<think>a. b</think><answer>42. Done</answer>", ["\n\n", ". "]) == "42"
    assert model._answer("yes\n", "\n") == "yes"
    with pytest.raises(ValueError, match="unknown model_args beams"):
        adapter(pretrained=str(checkpoint), beams=3)
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])


def test_the_task_scores_as_the_runner_does(monkeypatch):
    monkeypatch.syspath_prepend(str(TASK))
    utils = importlib.import_module("utils")
    sys.modules.pop("utils")
    [item] = held_out_items(5)[:1]
    row = {"image": item.image, "answer": item.answer}
    assert utils.score(row, [f" {item.answer}. "]) == {"exact_match": 1.0}
    assert utils.score(row, ["nonsense"]) == {"exact_match": 0.0}
    assert [picture.size for picture in utils.visual(row)] == [item.image.size]
    named = yaml.load((TASK / "siq_vl_figures.yaml").read_text().replace("!function ", ""), yaml.SafeLoader)
    assert (named["task"], named["doc_to_visual"], named["process_results"]) == (
        "siq_vl_figures",
        "utils.visual",
        "utils.score",
    )
    assert {metric["metric"] for metric in named["metric_list"]} == set(utils.score(row, [""]))

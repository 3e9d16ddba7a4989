"""What the repo ships: the tiny backbones, and the checkpoint that the repo itself is."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from siq_vl.evaluation import predictions as kept
from siq_vl.evaluation.held_out import held_out_items
from siq_vl.loading import load_checkpoint
from siq_vl.pretraining.gates import failures, gate_accuracies

REPO_ROOT = Path(__file__).resolve().parent.parent
BACKBONES = REPO_ROOT / "backbones"


def test_backbones_are_small():
    """Those that recipes use; with the tower in progress and the shipped checkpoint, all weights of the repo are too."""
    in_progress = BACKBONES / "siglip2-reading"
    used = [path for path in BACKBONES.rglob("*") if path.is_file() and in_progress not in path.parents]
    assert sum(path.stat().st_size for path in used) <= 16 * 2**20
    weights = [REPO_ROOT / "model.safetensors", *BACKBONES.rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in weights) <= 40 * 10**6


def test_measured_gates_are_those_of_the_shipped_language_model():
    folder = BACKBONES / "qwen2.5-tiny"
    model = Qwen2ForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    measured = json.loads((BACKBONES / "measured.json").read_text())
    for name, again in gate_accuracies(model, tokenizer, count=50, types=("value", "sum")).items():
        assert again["steps"] == pytest.approx(measured["gates"][name]["steps"], abs=0.15), name
    assert measured["gates_missed"] == failures(measured["gates"]) == []
    assert measured["training"].keys() == {"text", "vision", "captions"}


def test_the_repo_is_a_checkpoint(as_a_stranger):
    (results,) = as_a_stranger(REPO_ROOT, picture=held_out_items(1)[0].image)
    assert results["config"] == "SiQVLConfig"
    assert results["answer"].strip()
    assert results["pipeline"] == results["answer"]


@pytest.fixture(scope="module")
def answers() -> list[kept.Prediction]:
    model, processor = load_checkpoint(str(REPO_ROOT))
    return kept.predict(model, processor, held_out_items(90))


def test_the_repo_reasons_and_answers(answers):
    ordinary = [answer for answer in answers if answer.group == "held out"]
    assert sum(answer.well_formed for answer in ordinary) / len(ordinary) > 0.95
    # The README's table has the figure; this only says that the weights are the trained ones.
    assert sum(answer.correct for answer in ordinary) / len(ordinary) > 0.85

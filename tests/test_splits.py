"""What is evaluated never trained: every place that draws a figure draws it from the split it may take."""

import hashlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO_ROOT

from siq_vl.data import mixtures
from siq_vl.data.feature_cache.pictures import Pictures
from siq_vl.data.figures import dataset, rows
from siq_vl.data.figures.dataset import FigureSample, content_split, sample
from siq_vl.data.figures.documents import Receipt
from siq_vl.data.figures.figure import Question
from siq_vl.data.mixture_config import MixtureConfig, SourceConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.evaluation import held_out as evaluated
from siq_vl.pretraining import captions, gates, text, vision
from siq_vl.processing_siq_vl import _load_backbone_tokenizer
from siq_vl.training import emergence, run

# Of the captions, questions and answers of the first 40 samples of each split that is never trained on.
FINGERPRINTS = {
    "validation": "87ce236124b5a466",
    "test": "4651cb577c56d07e",
    "combinations": "063ab2aceb98d0d5",
}


@pytest.fixture
def drawn(monkeypatch):
    """The splits that figures were drawn from, with how many of each, wherever a module drew them."""
    counts: Counter[str] = Counter()

    def noted(split, index, **options):
        counts[split] += 1
        return sample(split, index, **options)

    for module in (dataset, rows, evaluated, mixtures, emergence):
        monkeypatch.setattr(module, "sample", noted)
    return counts


@pytest.mark.parametrize("split", FINGERPRINTS)
def test_the_same_contents_are_held_out_everywhere(split):
    digest = hashlib.sha256()
    for index in range(40):
        made = sample(split, index)
        digest.update("|".join((made.figure.caption, made.question.text, made.question.answer)).encode())
    assert digest.hexdigest()[:16] == FINGERPRINTS[split]


def test_held_out_questions_are_of_the_test_split(drawn):
    items = evaluated.held_out_items(30)
    assert drawn == {"test": 36, "combinations": 6}
    assert Counter(item.group for item in items) == {"held out": 30, "combinations": 6, "hard": 6}
    for item in items:
        split, seed, domain, index = item.id.removesuffix("/hard").split("/")
        hard = item.group == "hard"
        again = sample(split, int(index), seed=int(seed), domain=domain, hard=hard)
        assert again.hard is hard
        assert content_split(again.figure) == ("combinations" if item.group == "combinations" else "test")
        assert (item.question, item.answer) == (again.question.text, again.question.answer)
        assert item.reasoning == dataset.rationale(again.figure, again.question, "structured")
        assert (seed, again.figure.caption) == ("0", item.caption)


def test_the_majority_is_the_commonest_training_answer(monkeypatch):
    said = iter(["red", "blue", "blue", "red", "blue", "green"] * 3)
    splits = set()

    def scripted(split, index, *, domain, **options):
        splits.add(split)
        question = Question("color", "?", next(said), ())
        return SimpleNamespace(question=question)

    monkeypatch.setattr(evaluated, "sample", scripted)
    assert evaluated.majority_answers(6) == {(domain, "color"): "blue" for domain in dataset.DOMAINS}
    assert splits == {"train"}


def test_training_rows_are_of_the_train_split(drawn):
    alone = build_mixture(MixtureConfig(data_seed_offset=4), "answer", 3)
    made = alone.rows[0]
    assert drawn == {"train": 1}
    assert made == rows.row(sample("train", 0, seed=4), "answer") != rows.row(sample("train", 0), "answer")
    mixtures.DrawnFigures(SourceConfig("figures"), "answer", 4, False).row(0, Pictures())
    assert drawn == {"train": 2}
    blind = build_mixture(MixtureConfig(blind=True), "answer", 3).rows[0]
    assert blind["images"] == [] and made["images"]


def test_what_is_watched_in_training_is_of_the_validation_split(drawn):
    said = SimpleNamespace(
        run=SimpleNamespace(sample_count=3, sample_steps=1, emergence_count=12, emergence_steps=1),
        data=SimpleNamespace(sources=[SimpleNamespace(path="figures")], blind=False),
        traces=SimpleNamespace(weights={"figures-terse": 1.0, "figures-structured": 1.0}, student="multimodal"),
    )
    _, held_out = run.hold_out(said, SimpleNamespace(rows=None), "answer")
    assert len(held_out) == 3 and drawn == {"validation": 3}
    watched = emergence.watched_rows(said, SimpleNamespace(validation=None))
    assert len(watched) == 12 and drawn == {"validation": 15}
    for index, made in enumerate(watched):  # the styles by turns of every domain
        style = ("terse", "structured")[index // 3 % 2]
        assert made["completion"] == rows.row(sample("validation", index), "reason", style=style)["completion"]


@pytest.fixture(scope="module")
def backbone_tokenizer():
    return _load_backbone_tokenizer(str(REPO_ROOT / "backbones" / "qwen2.5-tiny"))


def test_stage_0_learns_from_the_train_split_alone(drawn, backbone_tokenizer):
    batches = text.TextBatches(backbone_tokenizer, 4, seed=1)
    for step in range(4):
        batches(step)
    pixels, _ = captions.figure_batch(step=2, size=3, seed=5)
    assert drawn.keys() == {"train"}
    wanted = [sample("train", index, seed=5) for index in (6, 7, 8)]
    assert torch.equal(pixels, vision.pixel_batch(wanted))
    text.corpus(40)  # a tokenizer may know the words of combinations that nobody sees drawn
    assert drawn.keys() == {"train", "combinations"}


def test_stage_0_knows_the_words_of_the_train_split(monkeypatch):
    splits = set()

    def scripted(split, index, **options):
        splits.add(split)
        return FigureSample("", Receipt((("tea", 7),)), None)

    monkeypatch.setattr(dataset, "sample", scripted)
    assert vision.figure_words() == sorted({*map(str, range(100)), "tea"})
    assert splits == {"train"}


def test_the_gates_are_asked_of_the_test_split(drawn):
    asked = gates._described_questions(2, gates.figures.sample)
    assert drawn.keys() == {"test"}
    assert max(map(len, asked.values())) == 2


def test_rows_ask_in_several_ways_and_answer_directly_as_often_as_they_shall():
    drawn = [sample("train", index) for index in range(30)]
    for share, thinking in ((0.0, {True}), (1.0, {False})):
        made = [rows.row(each, "reason", direct_share=share) for each in drawn]
        assert {row["chat_template_kwargs"]["enable_thinking"] for row in made} == thinking
        assert all(("<think></think>" in row["completion"][0]["content"][0]["text"]) == (share == 1) for row in made)
    few = [rows.row(each, "reason", direct_share=0.2)["chat_template_kwargs"]["enable_thinking"] for each in drawn]
    assert few.count(False) < 12
    asked = [rows.row(each, "caption")["prompt"][0]["content"][-1]["text"] for each in drawn]
    assert set(asked) == set(rows.CAPTION_PROMPTS)


def test_described_questions_show_no_picture():
    (item,) = evaluated.held_out_items(5)[:1]
    asked = evaluated.described(item)
    assert asked.open_images() == [] and item.open_images()
    assert asked.prompt() == rows.user_turn(f"{item.caption}\n{item.question}", images=0)

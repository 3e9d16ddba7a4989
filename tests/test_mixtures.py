"""Mixtures: shares, bounds, quality filters, scores of pictures and texts, counts, and the recipe that states them."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from siq_vl.data.conversations import Conversation, Dropped, message, text_of
from siq_vl.data.figures.rows import training_rows
from siq_vl.data.filters import filtered
from siq_vl.data.mixture_config import FilterConfig
from siq_vl.data.mixtures import build_mixture
from siq_vl.data.scoring import SiglipScorer, scored_text
from siq_vl.training import recipes
from siq_vl.training.arguments import DataArguments
from siq_vl.training.recipes import parse_recipe
from siq_vl.training.run import make_trainer, mixture_for_stage, rows_needed, train_and_save
from siq_vl.training.starting_model import load_for_stage


@pytest.fixture
def source(tmp_path, make_image):
    """Writes a source of rows, by default numbered questions on pictures of their own; returns its path."""

    def write(name: str, rows: int | list[dict]) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if isinstance(rows, int):
            rows = [
                {"image": f"{number}.png", "prompt": f"{name} {number}?", "completion": f"{name} {number}"}
                for number in range(rows)
            ]
        for name_of_image in {row["image"] for row in rows if row.get("image")}:
            make_image(int(Path(name_of_image).stem)).save(folder / name_of_image)
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


def build(*sources: dict, count: int | None = None, task: str = "answer", **options):
    config = {name: options.pop(name) for name in list(options) if name in ("blind", "data_seed_offset")}
    return build_mixture(DataArguments(sources=list(sources), **config), task, count, **options)


def answers(rows) -> list[str]:
    return [text_of(row["messages"][-1]) for row in rows]


def used(mixture) -> dict[str, int]:
    return {each.name: each.used for each in mixture.report.sources}


# Shares and bounds


@pytest.mark.parametrize(("count", "wanted"), [(40, (30, 10)), (7, (5, 2)), (100, (75, 25))])
def test_weights_are_shares_of_the_rows(count, wanted, source):
    sources = ({"path": source("a", 12), "weight": 3}, {"path": source("b", 12), "weight": 1})
    mixture = build(*sources, count=count)
    assert tuple(used(mixture).values()) == wanted
    drawn = Counter(answer.split()[0] for answer in answers(mixture.rows))
    assert (drawn["a"], drawn["b"]) == wanted
    repeats = Counter(answers(mixture.rows)).values()
    assert max(repeats) == -(-max(wanted) // 12)  # a source starts over only once all its rows were used


def test_streams_keep_their_shares(source):
    sources = ({"path": source("a", 12), "weight": 3, "streaming": True}, {"path": source("b", 12), "weight": 1})
    rows = list(islice(build(*sources).rows, 40))
    assert Counter(row["source"] for row in rows) == {"a.jsonl": 30, "b.jsonl": 10}
    assert len(set(answers(rows))) == 12 + 10


def test_without_weights_every_row_is_used_once_an_epoch(source):
    mixture = build({"path": source("a", 5)}, {"path": source("b", 9)})
    assert sorted(answers(mixture.rows)) == sorted([f"a {n}" for n in range(5)] + [f"b {n}" for n in range(9)])


def test_weights_without_a_number_of_rows_repeat_none(source):
    sources = ({"path": source("a", 4), "weight": 0.5}, {"path": source("b", 9), "weight": 0.5})
    mixture = build(*sources)
    assert used(mixture) == {"a.jsonl": 4, "b.jsonl": 4}
    assert len(set(answers(mixture.rows))) == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_max_samples_bounds_a_source(streaming, source):
    mixture = build({"path": source("a", 20), "max_samples": 3, "streaming": streaming}, count=12)
    rows = list(islice(mixture.rows, 12))
    assert len(rows) == 12 and len(set(answers(rows))) == 3


def test_one_seed_gives_one_mixture(source):
    sources = ({"path": source("a", 20), "weight": 1}, {"path": source("b", 20), "weight": 1})
    first, again, other = (answers(build(*sources, count=16, data_seed_offset=seed).rows) for seed in (1, 1, 2))
    assert first == again != other


def test_figures_alone_are_the_rows_they_always_were():
    mixture = build_mixture(DataArguments(data_seed_offset=5), "caption", 6)
    for ours, theirs in zip(mixture.rows, training_rows("train", 6, "caption", seed=5), strict=True):
        assert ours["images"][0].tobytes() == theirs["images"][0].tobytes()
        assert {**ours, "images": 0} == {**theirs, "images": 0}


def test_figures_mix_with_other_sources(source):
    sources = ({"path": "figures", "weight": 1}, {"path": source("a", 4), "weight": 1})
    rows = list(build(*sources, count=8).rows)
    assert Counter(row["source"] for row in rows) == {"figures": 4, "a.jsonl": 4}
    drawn = list(training_rows("train", 4, "answer"))
    assert {row["images"][0].tobytes() for row in rows if row["source"] == "figures"} == {
        row["images"][0].tobytes() for row in drawn
    }
    streamed = list(islice(build({**sources[0], "streaming": True}, sources[1]).rows, 8))
    assert Counter(row["source"] for row in streamed) == {"figures": 4, "a.jsonl": 4}


def test_blind_withholds_every_picture(source):
    rows = list(build({"path": source("a", 3)}, {"path": "figures", "max_samples": 3}, blind=True).rows)
    assert len(rows) == 6
    for row in rows:
        assert row["images"] == []
        assert all(part["type"] == "text" for turn in row["messages"] for part in turn["content"])


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "weight is set for a alone"),
        ({"sources": [{"path": "a", "weight": 0}]}, "weight of a is 0"),
        ({"sources": [{"path": "a", "max_samples": 0}]}, "max_samples of a is 0"),
        ({"sources": [{"path": "a", "filters": {"min_ratings": {"beauty": 3}}}]}, "min_ratings has beauty"),
        ({"sources": [{"path": "a", "filters": {"min_ratings": {"relevance": 6}}}]}, "each from 1 to 5"),
        ({"sources": [{"path": "a", "filters": {"min_image_text_score": 2}}]}, "lies between -1 and 1"),
        ({"max_bad_share": 2}, "max_bad_share is 2"),
        ({"max_image_side": 0}, "max_image_side is 0"),
    ],
)
def test_bad_mixtures_are_refused(config, error):
    with pytest.raises(ValueError, match=error):
        DataArguments(**config)


def test_endless_sources_need_weights_and_steps(source):
    path = source("a", 2)
    with pytest.raises(ValueError, match="figures has no known size: set `weight`"):
        build({"path": path}, {"path": "figures"}, count=4)
    with pytest.raises(ValueError, match="drawn figures have no end: set max_steps"):
        build({"path": path, "weight": 1}, {"path": "figures", "weight": 1})
    with pytest.raises(ValueError, match="drawn figures have no end"):
        build({"path": "figures"})


def test_sources_of_one_name_are_counted_apart(source, tmp_path):
    path = source("a", 3)
    mixture = build({"path": path, "max_samples": 1}, {"path": path, "max_samples": 2})
    assert used(mixture) == {"a.jsonl": 1, "a.jsonl #2": 2}


# Filters


def conversation(*answers: str, ratings: dict | None = None) -> Conversation:
    turns = [
        turn
        for number, answer in enumerate(answers)
        for turn in (message("user", f"question {number}", number == 0), message("assistant", answer))
    ]
    return Conversation(["cat.png"], turns, ratings or {})


def test_low_ratings_drop_turns_one_by_one():
    ratings = {"relevance": [2, 5, 5], "formatting": [5, 5, None], "visual_dependency": [1, 1, 1]}
    kept = filtered(
        conversation("a", "b", "c", ratings=ratings), FilterConfig(min_ratings={"relevance": 3, "formatting": 3})
    )
    assert kept.texts("assistant") == ["b", "c"]
    assert [part["type"] for part in kept.messages[0]["content"]] == ["image", "text"]  # the picture moves along
    with pytest.raises(Dropped, match="low visual_dependency rating"):
        filtered(conversation("a", "b", "c", ratings=ratings), FilterConfig(min_ratings={"visual_dependency": 2}))
    unrated = conversation("a", ratings={"relevance": [1]})
    assert filtered(unrated, FilterConfig(min_ratings={"formatting": 5})) is unrated


@pytest.mark.parametrize(
    ("answer", "config", "reason"),
    [
        ("I'm sorry, but I cannot help with that.", {"drop_refusals": True}, "refusal"),
        ("I\u2019m unable to view pictures.", {"drop_refusals": True}, "refusal"),
        ("The sign reads: I'm sorry, but we are closed.", {}, None),
        ("A closed shop. The owner says that I cannot see it.", {"drop_refusals": True}, None),
        ("Nope", {"drop_refusals": True, "refusal_phrases": ["nope"]}, "refusal"),
        ("ab", {"min_answer_characters": 3}, "answer too short"),
        ("abc", {"min_answer_characters": 3, "max_answer_characters": 3}, None),
        ("abcd", {"max_answer_characters": 3}, "answer too long"),
        ("abc", {"max_question_characters": 9}, "question too long"),
        ("abc", {"max_question_characters": 10}, None),
        ("abc", {"max_turns": 0}, "too many turns"),
    ],
)
def test_refusals_and_lengths(answer, config, reason):
    if reason is None:
        assert filtered(conversation(answer), FilterConfig(**config)).texts("assistant") == [answer]
    else:
        with pytest.raises(Dropped) as dropped:
            filtered(conversation(answer), FilterConfig(**config))
        assert dropped.value.reason == reason and not dropped.value.defect


def repeated() -> list[dict]:
    """Two rows on one picture, of which the second also comes in other spelling, and one on another."""
    return [
        {"image": "0.png", "prompt": "What is it?", "completion": "one"},
        {"image": "0.png", "prompt": "what is it", "completion": "two"},
        {"image": "0.png", "prompt": "Which colour?", "completion": "three"},
        {"image": "3.png", "prompt": "What is it?", "completion": "four"},
        {"prompt": "Say hello.", "completion": "five"},
        {"prompt": "Say hello!", "completion": "six"},
    ]


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({}, {}),
        ({"drop_duplicate_questions": True}, {"duplicate question": 2}),
        ({"drop_duplicate_images": True}, {"duplicate image": 2}),
        (
            {"drop_duplicate_images": True, "drop_duplicate_questions": True},
            {"duplicate image": 2, "duplicate question": 1},
        ),
    ],
)
def test_duplicates_are_told_by_content(filters, wanted, source):
    mixture = build({"path": source("a", repeated()), "filters": filters})
    assert mixture.report.to_dict()["sources"][0]["dropped"] == wanted
    assert len(mixture.rows) == 6 - sum(wanted.values())


def test_duplicates_are_found_across_sources(source):
    filters = {"drop_duplicate_questions": True}
    row = {"image": "0.png", "prompt": "What is it?", "completion": "one"}
    mixture = build(
        {"path": source("a", [row])}, {"path": source("b", [row, {**row, "prompt": "Who?"}]), "filters": filters}
    )
    assert used(mixture) == {"a.jsonl": 1, "b.jsonl": 2}  # a source that is not filtered is not remembered
    mixture = build(
        {"path": source("a", [row]), "filters": filters},
        {"path": source("b", [row, {**row, "prompt": "Who?"}]), "filters": filters},
    )
    assert used(mixture) == {"a.jsonl": 1, "b.jsonl": 1}


# Pictures that do not fit their text


@pytest.fixture
def siglip(tokenizer, processor) -> SiglipScorer:
    """A scorer on a tiny two-tower model with random weights."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8})
    return SiglipScorer(SiglipModel(config), processor.image_processor, tokenizer)


def test_scores_are_the_cosine_of_the_two_towers(siglip, make_image, monkeypatch):
    images, texts = [make_image(1), make_image(2)], ["A Cat", "a dog " * 40]
    scores = siglip(images, texts)
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores)
    assert scores[0] == pytest.approx(siglip([images[0]], ["a cat"])[0], abs=1e-5)  # lower case, one by one
    towers = siglip.model
    pixels = siglip.image_processor(images, return_tensors="pt")["pixel_values"]
    ids = siglip.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        vision, text = towers.vision_model(pixel_values=pixels), towers.text_model(input_ids=ids)
        wanted = torch.cosine_similarity(vision.pooler_output[:1], text.pooler_output)
    assert scores[0] == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_that_do_not_match_are_dropped(streaming, source, siglip):
    """The threshold lies between the scores that the tiny model gives."""
    path = source("a", 20)
    plain = list(build({"path": path}).rows)
    scores = {
        text_of(row["messages"][-1]): siglip(
            row["images"], [f"{text_of(row['messages'][0])} {text_of(row['messages'][-1])}"]
        )[0]
        for row in plain
    }
    ranked = sorted(scores.values())
    least = (ranked[7] + ranked[8]) / 2
    mixture = build(
        {"path": path, "streaming": streaming, "filters": {"min_image_text_score": least}}, scorer=siglip, count=None
    )
    rows = list(islice(mixture.rows, 13))
    assert set(answers(rows)) == {answer for answer, score in scores.items() if score > least}
    assert mixture.report.to_dict()["sources"][0]["dropped"] == {"image and text do not match": 8}


def test_a_picture_that_cannot_be_scored_is_a_bad_row(source, siglip, tmp_path):
    path = source("a", 6)
    (tmp_path / "a" / "2.png").write_bytes(b"nothing")
    mixture = build({"path": path, "filters": {"min_image_text_score": -1}}, scorer=siglip)
    assert mixture.report.to_dict()["sources"][0]["dropped"] == {"image that cannot be read": 1}
    assert len(mixture.rows) == 5


def test_the_compared_text_is_the_answer_with_its_question_if_short():
    assert scored_text(conversation("a cat")) == "question 0 a cat"
    assert scored_text(conversation("a cat on a grey roof", "later")) == "a cat on a grey roof"


def test_checkpoints_with_both_towers_score_others_are_refused(siglip, tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    for part in (siglip.model, siglip.image_processor, siglip.tokenizer):
        part.save_pretrained(both)
    SiglipVisionModel(SiglipVisionConfig(**siglip.model.config.vision_config.to_dict())).save_pretrained(one)
    loaded = SiglipScorer.from_pretrained(str(both))
    for name, weight in siglip.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)
    with pytest.raises(ValueError, match="siglip_vision_model checkpoint, which has no text tower"):
        SiglipScorer.from_pretrained(str(one))


# The recipe and the model card

RECIPE = """
vision_tower: backbones/siglip2-tiny
language_model: backbones/qwen2.5-tiny
sources:
  - path: {talk}
    weight: 3
    filters:
      drop_refusals: true
      min_answer_characters: 2
  - path: figures
    weight: 1
max_steps: 2
per_device_train_batch_size: 8
logging_steps: 1
report_to: none
save_strategy: "no"
gradient_checkpointing: false
max_length: 256
"""


def test_a_recipe_states_its_mixture_and_the_card_its_counts(source, tmp_path, monkeypatch):
    rows = [
        {
            "image": f"{n}.png",
            "prompt": f"What is {n}?",
            "completion": "I'm unable to help." if n in (3, 7) else f"It is {n}.",
        }
        for n in range(14)
    ]
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    (tmp_path / "recipes" / "mine" / "stage1.yaml").write_text(RECIPE.format(talk=source("talk", rows)))
    monkeypatch.setattr(recipes, "RECIPES", tmp_path / "recipes")
    recipe = parse_recipe(("1",), ["--recipe", "mine", "--output_dir", str(tmp_path / "out")])
    assert [each.weight for each in recipe.data.sources] == [3, 1]
    assert recipe.data.sources[0].filters.drop_refusals
    assert rows_needed(recipe) == 16
    model, processor = load_for_stage(recipe)
    mixture = mixture_for_stage(recipe, "answer", processor)
    trainer = make_trainer(recipe, model, processor, mixture.rows)
    folder = train_and_save(trainer, processor, recipe, mixture.report)
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2
    counts = json.loads((folder / "training_settings.json").read_text())["data_counts"]["sources"]
    assert [(each["name"], each["share"], each["used"]) for each in counts] == [
        ("talk.jsonl", 0.75, 12),
        ("figures", 0.25, 4),
    ]
    assert counts[0]["dropped"] == {"refusal": 2} and (counts[0]["read"], counts[0]["kept"]) == (14, 12)
    card = (folder / "README.md").read_text()
    assert "| talk.jsonl | 75.0% | 12 | 12 of 14 | refusal: 2 |" in card
    assert str(tmp_path) not in card


def test_sources_can_be_named_on_the_command_line(source, tmp_path):
    arguments = ["--stage", "2", "--sources", source("a", 2), "figures", "--output_dir", str(tmp_path)]
    assert [Path(each.path).name for each in parse_recipe(("2",), arguments).data.sources] == ["a.jsonl", "figures"]


def test_without_max_steps_a_finite_mixture_is_read_once_an_epoch(source, tmp_path):
    arguments = ["--stage", "2", "--max_steps", "-1", "--output_dir", str(tmp_path)]
    assert rows_needed(parse_recipe(("2",), [*arguments, "--sources", source("a", 2)])) is None
    with pytest.raises(ValueError, match="neither train_samples nor max_steps"):
        rows_needed(parse_recipe(("2",), arguments))

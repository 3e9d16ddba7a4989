"""Stage 0 by small cases: what the tiny tower and language model are taught, and how it is measured."""

import numpy as np
import pytest
import torch
from conftest import REPO_ROOT
from transformers import SiglipImageProcessor

from siq_vl.data.figures.charts import ColumnChart, RowChart
from siq_vl.data.figures.dataset import FigureSample, sample
from siq_vl.data.figures.documents import Plate, Signs
from siq_vl.data.figures.drawing import CELL
from siq_vl.data.figures.scenes import Scene
from siq_vl.parsing.arithmetic import count_statements, false_statements
from siq_vl.pretraining import captions, gates, text, vision
from siq_vl.processing_siq_vl import _load_backbone_tokenizer


@pytest.fixture(scope="module")
def backbone_tokenizer():
    return _load_backbone_tokenizer(str(REPO_ROOT / "backbones" / "qwen2.5-tiny"))


def test_calculations_are_right():
    counted = 0
    for index in range(30):
        for (asked, _), (found, _) in zip(*[iter(text.calculation_drill("train", index, 0))] * 2, strict=True):
            line = f"{asked} {found}"
            counted += count_statements(line)
            assert not false_statements(line.removesuffix(".")), line
            if "same" in found or "different" in found:
                one, other = asked.split()[:2]
                assert (one == other) == ("same" in found)
    assert counted > 300


def test_rows_are_look_ups_then_calculations_then_both(backbone_tokenizer):
    batches = text.TextBatches(backbone_tokenizer, 4, seed=3, look_up_steps=4, calculation_steps=4)

    def wanted(kind, index):
        return text.encode(backbone_tokenizer, kind("train", index, 3))

    def conversation(split, index, seed):
        return text.turn(*text.conversation(split, index, seed))

    for index in (0, 15):
        assert batches._row(index) == wanted(text.look_up_drill, index)
    for index in (16, 31, 35):  # after the calculations every fifth is one
        assert batches._row(index) == wanted(text.calculation_drill, index)
    for index in (32, 33, 34, 36):
        assert batches._row(index) == wanted(conversation, index)


def test_rows_are_learnt_where_they_answer_and_padding_nowhere(backbone_tokenizer):
    pieces = [("pairs: red star.", False), ("red", False), ("star.", True)]
    ids, labels = text.encode(backbone_tokenizer, pieces)
    answer = backbone_tokenizer("star.")["input_ids"]
    assert ids[-len(answer) :] == answer and labels == [-100] * (len(ids) - len(answer)) + answer
    batch = text.pad([(ids, labels), (answer, answer)], pad_token_id=0)
    longer, shorter = len(ids), len(answer)
    assert batch["input_ids"][1].tolist() == answer + [0] * (longer - shorter)
    assert batch["labels"][1].tolist() == answer + [-100] * (longer - shorter)
    assert batch["attention_mask"].tolist() == [[1] * longer, [1] * shorter + [0] * (longer - shorter)]


def test_batches_of_like_length_come_in_any_order(backbone_tokenizer):
    batches = text.TextBatches(backbone_tokenizer, 4, seed=0)
    lengths = [[batches(4 * bucket + part)["input_ids"].shape[1] for part in range(4)] for bucket in range(4)]
    assert any(four != sorted(four) for four in lengths)
    rows = [row for part in range(4) for row in batches(part)["attention_mask"].sum(1).tolist()]
    assert sorted(rows) == sorted(len(batches._row(index)[0]) for index in range(16))


def test_cells_are_row_by_row_and_hold_what_is_drawn_there():
    """A cell is wherever the picture changes with its fact."""
    word_ids = {"top-right": 0, "ball": 1, "red": 2, "Jan": 3, "7": 4}
    scene = FigureSample("a", Scene((("ball", "red", "top-right"),)), None)
    chart = FigureSample("b", ColumnChart((("Jan", 7),)), None)
    targets = vision.cell_words([scene, chart], word_ids)
    assert targets.shape == (2, 16, 5)
    assert targets[0].nonzero()[:, 0].unique().tolist() == [2, 3, 6, 7]
    assert targets[0, 2].tolist() == [1, 1, 1, 0, 0]
    assert targets[1].nonzero().tolist() == [[12, 3], [12, 4]]
    others = {
        Scene((("ball", "red", "top-right"),)): Scene((("star", "blue", "top-right"),)),
        RowChart((("Jan", 7), ("Feb", 9))): RowChart((("Jan", 8), ("Feb", 9))),
        Signs((("red", "STOP"), ("blue", "BANK"))): Signs((("red", "STOP"), ("blue", "TAXI"))),
        Plate("red", "A", 17): Plate("red", "A", 82),
    }
    for figure, other in others.items():
        pictures = [np.asarray(FigureSample("same", each, None).image).astype(int) for each in (figure, other)]
        changed = np.abs(pictures[0] - pictures[1]).sum(-1)
        for (row, column), fact in figure.cells().items():
            cell = changed[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            assert bool(cell.any()) == (fact not in other.facts), (figure, row, column)


def test_pixels_are_those_of_the_image_processor():
    samples = [sample("train", index) for index in range(3)]
    wanted = vision.image_processor()([each.image for each in samples], return_tensors="pt")["pixel_values"]
    assert torch.allclose(vision.pixel_batch(samples), wanted, atol=1e-6)
    assert isinstance(vision.image_processor(), SiglipImageProcessor)


def test_the_towers_loss_is_summed_over_words_and_averaged_over_cells():
    torch.manual_seed(0)
    model = vision.TowerWithWordHead(7).eval()
    pixels, targets = vision.pixel_batch([sample("train", 0), sample("train", 1)]), torch.zeros(2, 16, 7)
    targets[0, 3, 2] = 1
    with torch.no_grad():
        logits = model.word_logits(model.tower(pixels).last_hidden_state)
        share = torch.sigmoid(logits)
        each = -(targets * share.log() + (1 - targets) * (1 - share).log())
        assert model(pixels, targets).item() == pytest.approx(each.sum().item() / 32, rel=1e-4)


def test_read_accuracy_is_of_whole_labelled_cells(monkeypatch):
    samples = [FigureSample("a", Scene((("ball", "red", "top-left"),)), None)]
    words = ["ball", "red", "top-left", "star"]
    logits = torch.full((1, 16, 4), -1.0)
    logits[0, [0, 1, 4], :3] = 1.0  # three of the four cells in full
    logits[0, 5, 0] = 1.0  # a part of the fourth
    logits[0, 10, 3] = 1.0  # a word where there is none
    model = vision.TowerWithWordHead(4)
    monkeypatch.setattr(model, "word_logits", lambda features: logits)
    assert vision.read_accuracy(model, words, samples) == 0.75


def test_captions_are_learnt_through_a_frozen_tower(backbone_tokenizer):
    torch.manual_seed(0)
    tower = vision.TowerWithWordHead(1).tower
    language_model = text.language_model(backbone_tokenizer)
    captioner = captions.Captioner(tower, language_model, backbone_tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    pixels, told = captions.figure_batch(0, 2, seed=0)
    rows = captions.caption_rows(backbone_tokenizer, told, captioner.image_tokens)
    captioner.caption_loss(pixels, rows).backward()
    assert not any(weight.requires_grad for weight in tower.parameters()) and not tower.training
    assert captioner.projector.weight.grad.abs().sum() > 0
    learnt = [backbone_tokenizer.decode([i for i in labels if i != -100]) for labels in rows["labels"].tolist()]
    assert [said.removesuffix("<|im_end|>") for said in learnt] == [
        sample("train", index, seed=0).figure.caption for index in range(2)
    ]


def test_gates_are_look_ups_and_sums_step_by_step():
    def row(steps: float, direct: float = 0.0) -> dict[str, float]:
        return {"steps": steps, "direct": direct, "questions": 9}

    assert gates.failures({"charts/sum": row(0.9), "charts/value": row(0.95), "charts/maximum": row(0.0)}) == []
    found = gates.failures({"charts/sum": row(0.89, 1.0), "scenes/color": row(0.94, 1.0), "charts/maximum": row(0.0)})
    assert [line.split(":")[0] for line in found] == ["charts/sum", "scenes/color"]

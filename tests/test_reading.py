"""Stage 0 of the tower that reads: its labels, losses and optimiser, and that a run goes on where it was stopped."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from siq_vl.data.world import dataset as world
from siq_vl.data.world.canvas import Canvas, Drawn
from siq_vl.data.world.figure import NOT_SHOWN
from siq_vl.data.world.fonts import FACES
from siq_vl.pretraining import captions, gates, loop, reading, text, world_text
from siq_vl.pretraining.reading_accuracy import CHANGES, fact_accuracy, reading_accuracy, strewn
from siq_vl.processing_siq_vl import _load_backbone_tokenizer
from tests.conftest import REPO_ROOT

SIDE = 32


@pytest.fixture
def small(monkeypatch):
    """Return a tower of one layer for pictures of 32 px."""
    whole = reading.tower_config

    def config(side: int):
        made = whole(side)
        made.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2})
        return made

    monkeypatch.setattr(reading, "tower_config", config)
    torch.manual_seed(0)
    return reading.ReadingTower(SIDE)


def lettered(text: str = "Jan 7") -> Drawn:
    canvas = Canvas(SIDE, SIDE, (255, 255, 255))
    canvas.write(1, 8, text, FACES[0], 11, (0, 0, 0), facts=("Jan", "7"))
    return canvas.drawn


def test_losses_are_those_worked_out_apart(small):
    pictures = [lettered(), lettered("F 20")]
    labels = reading.label_batch(pictures)
    logits = small(reading.pixel_batch(pictures))
    losses = reading.dense_losses(logits, labels)
    full = labels["letters"] > 0
    read = cross_entropy(logits["letters"][full], labels["letters"][full])
    unread = cross_entropy(logits["letters"][~full], labels["letters"][~full])
    assert full.sum() == 4 + 3
    torch.testing.assert_close(losses["letters"], read + 3 * unread)
    for name in ("seen", "facts"):
        picked = torch.where(labels[name] > 0, logits[name].sigmoid(), 1 - logits[name].sigmoid())
        torch.testing.assert_close(losses[name], -picked.log().sum() / labels[name].shape[:2].numel())


def test_muon_has_the_layers_matrices_and_adamw_the_rest(small):
    optimizer = reading.MuonAndAdamW(small, 1.5e-3)
    counts = [len(group["params"]) for group in optimizer.param_groups]
    assert counts[0] == 6  # query, key, value, output, and the two of the MLP
    assert sum(counts) == len(list(small.parameters()))
    before = {name: parameter.clone() for name, parameter in small.named_parameters()}
    sum(reading.batch_losses(small, [lettered()]).values()).backward()
    optimizer.step()
    changed = {name for name, parameter in small.named_parameters() if not torch.equal(parameter, before[name])}
    unused = {name for name, parameter in small.named_parameters() if not parameter.grad.any()}
    assert changed | unused == set(before)
    assert not any("layers" in name and name.endswith("weight") for name in unused)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(small, tmp_path):
    begun = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    pictures = [lettered(text) for text in ("Jan 1", "Feb 2", "Mar 3", "Apr 4")]

    def train(folder: str, *counts: int) -> dict:
        small.load_state_dict(begun)
        for count in counts:
            loop.run(
                small,
                lambda step: reading.batch_losses(small, [pictures[step]]),
                tmp_path / folder,
                steps=count,
                learning_rate=1.0,
                optimizer=reading.MuonAndAdamW(small, 1.5e-3),
                factor_at=lambda step, steps, warmup: 1 / (1 + step),
                save_every=2,
                log_every=2,
            )
        return {name: tensor.clone() for name, tensor in small.state_dict().items()}

    unbroken, resumed = train("unbroken", 4), train("resumed", 2, 4)
    for name, tensor in unbroken.items():
        torch.testing.assert_close(tensor, resumed[name], rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "resumed" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4]


def test_the_rate_is_steady_and_falls_at_the_end():
    factors = [loop.steady_then_down(step, 100, 10) for step in (0, 9, 10, 70, 85, 99)]
    assert factors == pytest.approx([0.1, 1, 1, 1, 0.5, 1 / 30], abs=1e-6)


def test_a_tower_for_small_pictures_begins_one_for_larger(small):
    larger = reading.ReadingTower(2 * SIDE)
    reading.load_smaller(larger, small.state_dict())
    own = dict(larger.named_parameters())
    for name, parameter in small.named_parameters():
        if not name.endswith("position_embedding.weight"):
            assert torch.equal(own[name], parameter)
            continue
        # The corners stay where they are.
        assert torch.allclose(own[name][0], parameter[0], atol=1e-5)
        assert torch.allclose(own[name][-1], parameter[-1], atol=1e-5)


def test_a_written_tower_goes_on_with_its_heads(small, tmp_path):
    reading.save_reading_tower(small.eval(), tmp_path)
    read = reading.load_reading_tower(tmp_path).eval()
    pixels = reading.pixel_batch([lettered()])
    for name, logits in small(pixels).items():
        assert torch.equal(read(pixels)[name], logits)


def test_what_is_read_is_counted(small):
    pictures = [lettered(), lettered("F 20")]
    labels = reading.label_batch(pictures)

    class Perfect(torch.nn.Module):
        side = SIDE

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            letters = torch.nn.functional.one_hot(labels["letters"], 100).float()
            letters[1, 4] = letters[1, 4].flip(-1)  # the "F", in the second row of patches, is not read
            facts = labels["facts"] - 0.5
            facts[1] *= -1
            return {"letters": letters, "seen": labels["seen"], "facts": facts}

    read = reading_accuracy(Perfect(), pictures)
    assert read["asked"] == 4
    assert read["words"] == pytest.approx(3 / 4)
    assert read["characters"] == pytest.approx(6 / 7)
    facts = fact_accuracy(Perfect(), pictures)
    assert facts["cells"] == facts["recall"] == pytest.approx(0.5)
    assert facts["precision"] < 0.05  # of the second picture every word is named but the right ones


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_takes_the_letters_with_it(name):
    (picture,) = strewn(96, 1, "test", words=("Oslo",), faces=FACES[:1])
    changed = CHANGES[name](picture)
    assert len(changed.letters) == len(picture.letters)
    background = changed.image.convert("L").getpixel((0, 0))
    inside = [
        one for one in changed.letters if 2 < one.x < changed.image.width - 2 and 2 < one.y < changed.image.height - 2
    ]
    assert inside
    for one in inside:
        box = (round(one.x) - 4, round(one.y) - 4, round(one.x) + 5, round(one.y) + 5)
        low, high = changed.image.convert("L").crop(box).getextrema()
        assert max(abs(low - background), abs(high - background)) > 30


def test_drills_of_the_worlds_text_tell_the_truth():
    for index in range(60):
        (listed, _), *pieces = world_text.look_up_drill("train", index, 0)
        pairs = [tuple(pair.split()) for pair in listed.removeprefix("pairs: ").rstrip(".").split(", ")]
        for (known, learnt), (found, supervised) in zip(pieces[0::2], pieces[1::2], strict=True):
            assert (learnt, supervised) == (False, True)
            followed = {found for key, found in pairs if key == known} | {key for key, found in pairs if found == known}
            assert found.rstrip(".") in (followed or {NOT_SHOWN})
        for (asked, _), (answer, _) in zip(*[iter(world_text.calculation_drill("train", index, 0))] * 2, strict=True):
            if match := re.fullmatch(r"(\d+) ([+-]) (\d+) =", asked):
                left, right = int(match[1]), int(match[3])
                assert int(answer.rstrip(".")) == (left + right if match[2] == "+" else left - right)


def test_the_worlds_conversations_come_from_the_split():
    for index in range(30):
        user, response = world_text.conversation("train", index, seed=5)
        told = world.sample("train", index, seed=5)
        assert user.startswith(told.figure.caption + "\n")
        if response.startswith("<think>"):
            assert re.fullmatch(r"<think>.+</think><answer>.+</answer>", response)
            assert user.endswith("step by step.")


def test_gates_can_be_asked_of_the_world():
    asked = gates._described_questions(2, world.sample)
    assert {"scenes/color", "charts/sum", "documents/text"} <= set(asked)
    assert all(len(rows) <= 2 for rows in asked.values())


def test_captions_of_the_world_are_learnt_at_the_towers_size():
    tower = reading.ReadingTower(reading.SIDE).tower
    pixels, told = captions.world_batch(step=1, size=2, seed=5)
    samples = [world.sample("train", index, seed=5) for index in (2, 3)]
    assert told == [sample.figure.caption for sample in samples]
    assert pixels.shape == (2, 3, reading.SIDE, reading.SIDE)
    wanted = samples[1].drawn.resized(reading.SIDE, reading.SIDE).image
    assert torch.equal(pixels[1], reading.pixel_batch([SimpleNamespace(image=wanted)])[0])
    tokenizer = _load_backbone_tokenizer(str(REPO_ROOT / "backbones" / "qwen2.5-tiny"))
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    captioner = captions.Captioner(tower, text.language_model(tokenizer), image_token_id)
    rows = captions.caption_rows(tokenizer, told, captioner.image_tokens)
    assert (rows["input_ids"] == image_token_id).sum(-1).tolist() == [64, 64]
    captioner.caption_loss(pixels, rows).backward()
    assert captioner.projector.weight.grad.abs().sum() > 0
